"""A client that leaves costs no KV: whatever it had is free again, long before the lease of 30 s is over."""

from __future__ import annotations

import random
import socket
import time

import httpx
import pytest

from support.cluster import Topology
from support.plane import INVALID_REQUEST, ask
from support.process import frozen, wait_until

pytestmark = pytest.mark.engine

# Within this nothing may be left. A lease is 30 s, and the last request took one a moment ago.
SECONDS = 20

LONG = {"max_tokens": 400, "ignore_eos": True, "temperature": 0, "stream": True}


class Client:
    """A client that can leave at any moment, also while it waits for an answer's head."""

    def __init__(self, topology: Topology, body: dict):
        request = httpx.Request("POST", f"{topology.api.url}/v1/completions", json=body)
        self.socket = socket.create_connection((request.url.host, request.url.port), timeout=60)
        head = [b"POST /v1/completions HTTP/1.1"] + [b": ".join(pair) for pair in request.headers.raw]
        self.socket.sendall(b"\r\n".join([*head, b"", request.read()]))

    def wait_for(self, *what: bytes) -> bytes:
        """Reads until one of these has come; returns what has been read."""
        seen = b""
        while not any(one in seen for one in what):
            piece = self.socket.recv(65536)
            if not piece:
                raise ConnectionError(f"the answer ended in silence: {seen[-200:]!r}")
            seen += piece
        return seen

    def leave(self) -> None:
        self.socket.close()


@pytest.fixture(autouse=True)
def nothing_is_left(pd):
    pd.wait_idle()
    yield
    pd.wait_idle(SECONDS)


@pytest.fixture
def prompt() -> list[int]:
    """About 900 tokens that no cache has."""
    rng = random.Random()
    return [rng.randrange(7, 1000) for _ in range(900)]


def test_during_prefill(pd: Topology, prompt: list[int]):
    (prefill,) = pd.of_role("prefill")
    handed = prefill.metric("stator_handoffs_total")
    with frozen(*prefill.engine_pids()):
        client = Client(pd, LONG | {"prompt": prompt})
        wait_until("the prompt is at the prefill worker", lambda: prefill.status().get("requests") == 1, 30)
        client.leave()
        wait_until("it was given up there", lambda: prefill.status().get("requests") == 0, 30)
    pd.wait_idle(SECONDS)
    assert prefill.metric("stator_handoffs_total") == handed, "the prompt was computed for nobody"


def test_between_the_legs(pd: Topology, prompt: list[int]):
    prefill, decode = pd.workers
    with frozen(decode.process.pid):
        client = Client(pd, LONG | {"prompt": prompt})
        wait_until("KV is kept", lambda: prefill.status().get("running") == 0 and prefill.kv_usage() > 0, 30)
        client.leave()
    pd.wait_idle(SECONDS)


def test_during_decode(pd: Topology, prompt: list[int]):
    prefill, decode = pd.workers
    client = Client(pd, LONG | {"prompt": prompt})
    client.wait_for(b"data: ")
    wait_until("the answer is generated", lambda: decode.status().get("running") == 1, 30)
    client.leave()
    wait_until("nothing is generated", lambda: decode.status().get("running") == 0, SECONDS)


@pytest.mark.parametrize("stream", [True, False])
def test_at_any_moment(pd: Topology, stream: bool):
    rng = random.Random(30)
    for _ in range(40):
        body = LONG | {"prompt": [rng.randrange(7, 1000) for _ in range(600)], "stream": stream, "n": rng.choice([1, 2])}
        client = Client(pd, body | {"temperature": 0.8, "max_tokens": 60})
        # From before the prefill to within the answer.
        time.sleep(rng.uniform(0, 0.2))
        client.leave()


def test_a_decode_worker_computes_no_prompt_by_itself(pd: Topology):
    address = {target["role"]: target["address"] for target in pd.processor.targets()}
    for leg in ("unspecified", "decode", "prefill"):
        answer = ask(address["decode"], leg, [7, 8, 9])
        assert (answer.code, answer.tokens) == (INVALID_REQUEST, 0), answer
    assert "hand-off" in ask(address["decode"], "unspecified", [7, 8, 9]).message
    assert "kv_transfer_params" in ask(address["decode"], "decode", [7, 8, 9]).message
    for leg in ("unspecified", "local", "decode", "release"):
        assert ask(address["prefill"], leg, [7, 8, 9]).code == INVALID_REQUEST
