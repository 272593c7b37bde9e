"""Workers come, drain and die while requests run, on simulated engines: no answer is wrong, and none is lost in silence.

The simulated KV is the state after the prompt's tokens, so that KV of another prompt gives other tokens here, too.
"""

from __future__ import annotations

import random
import signal

import pytest

from support.cluster import Topology, Worker, connector
from support.load import Load, expected_texts
from support.process import wait_until

# Fast enough to see much of it in seconds, slow enough that requests are in every state when a worker goes.
PACE = ("--sim-decode-us-per-step", "2000", "--sim-prefill-us-per-token", "50")

THREADS = 8
EVENTS = 9


def bodies(count: int) -> list[dict]:
    rng = random.Random(40)
    return [
        {"prompt": [rng.randrange(7, 1000) for _ in range(rng.randrange(20, 400))], "max_tokens": rng.randrange(1, 30),
         "temperature": 0, "ignore_eos": True}
        for _ in range(count)
    ]


@pytest.fixture
def topology(settings):
    flags = (*connector(), *PACE, "--drain-grace", "10s")
    with Topology(settings, {"prefill": 3, "decode": 3}, engine="sim", worker_flags=flags) as topology:
        yield topology


def test_no_answer_is_wrong_while_workers_come_and_go(topology: Topology):
    asked = bodies(40)
    expected = expected_texts(topology.api, asked)
    rng = random.Random(41)
    killed = 0
    with Load(topology.api.url, asked, expected, threads=THREADS) as load:
        for number in range(EVENTS):
            count = load.count()
            wait_until("requests go on", lambda: load.count() >= count + 25, 60)
            worker: Worker = rng.choice(topology.of_role(("prefill", "decode")[number % 2]))
            # The loss of a machine, a restart in good order, and a worker that is killed and leaves its engine behind.
            if number % 3 == 1:
                worker.process.signal(signal.SIGTERM)
                assert worker.process.wait(60) == 0
            else:
                killed += worker.role == "decode"
                worker.kill() if number % 3 == 0 else worker.process.kill()
            worker.start().wait_ready()
            topology.wait_connected(6)
    total = load.count()
    assert total > EVENTS * 25
    assert load.outcomes["wrong"] == load.outcomes["bad"] == 0, load.details
    # What a decode worker had begun when it was killed ends with an error, and nothing else does.
    assert load.outcomes["broken"] + load.outcomes["refused"] <= killed * THREADS, load.details
    assert all("lost" in detail for detail in load.details), load.details
    topology.wait_idle()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_one_role_alone_is_not_enough(settings, role: str):
    with Topology(settings, {}, engine="sim") as topology:
        worker = topology.add_worker(role, *connector())
        worker.start().wait_ready()
        topology.wait_connected(1)
        assert not topology.api.is_healthy()
        answer = topology.api.complete(model="tiny")
        assert answer.status == 503 and answer.error["message"], answer.text
        assert int(answer.headers["retry-after"]) > 0
        # With the other role it is.
        other = topology.add_worker({"prefill": "decode", "decode": "prefill"}[role], *connector())
        other.start().wait_ready()
        topology.wait_connected(2)
        assert topology.api.complete(model="tiny").status == 200
