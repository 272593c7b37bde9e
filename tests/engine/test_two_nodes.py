"""An engine over two nodes: half of each layer in either, one of them without a request plane of its own.

Both run on this machine; what goes between them (torch's rendezvous, vLLM's message queues) is what goes between two.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from support.cluster import ENGINE_ENVIRONMENT, ENGINE_FLAGS, Topology
from support.process import Process, descendants, free_port, kill, wait_until

pytestmark = pytest.mark.engine

PROMPTS = ["The quick brown fox", "naïve café 1024", "prefill decode cache " * 20, "x"]


def answers(topology: Topology) -> list[str]:
    def answer(prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        return topology.api.post("/v1/completions", body).json["choices"][0]["text"]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(answer, PROMPTS))


@pytest.fixture
def second(settings, tmp_path):
    """Starts the second node of an engine, given the flags of both."""
    started = []

    def start(*flags: str) -> Process:
        command = [settings.binaries / "stator-agg", "--headless", "--model", settings.model, *ENGINE_FLAGS, *flags, "--node-rank", "1"]
        environment = ENGINE_ENVIRONMENT | {"STATOR_PYTHON": str(settings.python)}
        started.append(Process("second node", command, tmp_path / "second.log", environment))
        return started[-1]

    yield start
    for node in started:
        below = descendants(node.pid)
        node.stop()
        for pid in below:
            kill(pid)


def test_an_engine_over_two_nodes_answers_as_one_and_both_come_back_when_one_is_lost(settings, topology, second):
    expected = answers(topology)
    flags = ("--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    node = second(*flags)
    with Topology(settings, worker_flags=(*flags, "--node-rank", "0")) as two:
        assert answers(two) == expected

        # Half of the model is lost with its node. The first one learns of it with its next step.
        lost = descendants(node.pid)
        for pid in lost:
            kill(pid)
        (worker,) = two.workers
        assert two.api.post("/v1/completions", {"prompt": "lost", "max_tokens": 4}).status == 503
        wait_until("the loss is noticed", lambda: worker.status().get("state") != "ready", 30)
        worker.wait_ready()
        two.wait_connected(1)
        assert answers(two) == expected
        assert node.status() is None
