"""`stator up` on real engines with the environment that a user has.

Other suites ask vLLM for engines of one process and one thread, which start sooner. Here everything is as vLLM has it
by itself, and both engines share the cores of this machine.
"""

from __future__ import annotations

import os
import signal

import pytest
from support.api import Api
from support.cluster import read_metric
from support.process import Process, free_port

FLAGS = ["--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8", "--block-size", "32",
         "--kv-cache-memory-bytes", str(64 << 20)]

# Beyond all that the launcher and its children give each other to end.
END_SECONDS = 90


@pytest.fixture
def up(settings, monkeypatch):
    """A topology of one prefill and one decode worker that says it is ready."""
    for name in ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    port = free_port()
    folder = settings.folder / "up"
    folder.mkdir(mode=0o700)
    command = [
        settings.binaries / "stator", "up", settings.model, "--served-model-name", "tiny", "--http-port", str(port),
        "--prefill-workers", "1", "--decode-workers", "1", "--plain", "--", *FLAGS,
    ]
    environment = {
        "STATOR_PYTHON": str(settings.python), "STATOR_STATE_DIR": str(folder), "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    process = Process("stator up", command, settings.folder / "up.log", environment)
    try:
        process.wait_until("it says that it is ready", lambda: "\nready: " in f"\n{process.text()}")
        yield process, Api(f"http://127.0.0.1:{port}")
    finally:
        process.stop()


def test_two_engines_share_the_cores_and_hand_over_in_time(up):
    process, api = up
    for length in (20, 400, 1200):
        prompt = [7 + (31 * at + length) % 900 for at in range(length)]
        answer = api.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 8, "ignore_eos": True})
        assert answer.status == 200, answer.text
        assert answer.json["usage"]["completion_tokens"] == 8
    handoffs = {
        outcome: read_metric(api, f'stator_processor_handoffs_total{{model="tiny",outcome="{outcome}"}}')
        for outcome in ("done", "expired", "failed", "abandoned", "local")
    }
    assert handoffs == {"done": 3, "expired": 0, "failed": 0, "abandoned": 0, "local": 0}
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(END_SECONDS) == 0
