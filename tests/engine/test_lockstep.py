"""The data-parallel ranks of a mixture of experts: one model over several real engines, which step together."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from support.cluster import ROOT, Topology
from support.process import descendants, is_alive, kill, wait_until

pytestmark = pytest.mark.engine

PROMPTS = ["The quick brown fox", "naïve café 1024", "prefill decode cache " * 20, "x"]


@pytest.fixture(scope="module")
def mixture(settings, tmp_path_factory):
    """The settings with a tiny mixture of experts as the model."""
    folder = tmp_path_factory.mktemp("mixture")
    subprocess.run([sys.executable, ROOT / "scripts" / "make_model.py", folder, "--experts", "8"], check=True)
    return replace(settings, model=folder)


def answers(topology: Topology, rank: int | None = None) -> list[str]:
    headers = {} if rank is None else {"x-data-parallel-rank": str(rank)}

    def answer(prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        return topology.api.post("/v1/completions", body, headers=headers).json["choices"][0]["text"]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(answer, PROMPTS))


def test_ranks_answer_as_one_engine_does_and_end_together(mixture):
    with Topology(mixture) as single:
        expected = answers(single)
    with Topology(mixture, worker_flags=("--data-parallel-size", "2")) as topology:
        # Only one rank has requests, then the other, then both; in between all of them sleep.
        for rank in (0, 1, None, 1):
            assert answers(topology, rank) == expected
            topology.wait_idle()

        # The other rank waits for the lost one for ever, and neither can be started again alone.
        (worker,) = topology.workers
        before = worker.engine_pids()
        for pid in descendants(worker.engine_leaders()[0]):
            kill(pid)
        assert worker.process.wait(60) != 0
        wait_until("no process of them is left", lambda: not any(is_alive(pid) for pid in before), 20)
