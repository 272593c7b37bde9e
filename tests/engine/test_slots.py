"""A client that goes away frees its place in the engine."""

from __future__ import annotations

import httpx
import pytest

from support.process import wait_until

pytestmark = pytest.mark.engine

# As many tokens as fit: seconds of work that nobody waits for.
LONG = {"prompt": "Hello", "max_tokens": 2000, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def worker(topology):
    return topology.workers[0]


def is_running(worker, count: int) -> bool:
    return worker.status().get("running") == count


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_slot(topology, worker, stream):
    with httpx.Client(base_url=topology.api.url, trust_env=False) as client:
        body = LONG | {"stream": stream}
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as response:
                # Held: an iterator that is dropped closes the connection.
                lines = response.iter_lines()
                next(lines)
                wait_until("the request runs", lambda: is_running(worker, 1), 120)
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.3))
    wait_until("nothing runs", lambda: is_running(worker, 0), 120)


def test_a_choice_that_stops_early_frees_its_slot(topology, worker):
    answer = topology.api.complete(LONG["prompt"], max_tokens=2000, ignore_eos=True, stop=["a", "e", "o"])
    assert answer.json["choices"][0]["finish_reason"] == "stop"
    wait_until("nothing runs", lambda: is_running(worker, 0), 120)
