"""Conversations over two real engines: each turn goes where the earlier ones are cached, and the usage says so."""

from __future__ import annotations

import random

import pytest

from support.cluster import Topology
from support.process import wait_until

pytestmark = pytest.mark.engine

BLOCK = 32
CONVERSATIONS = 6


@pytest.fixture(scope="module")
def two(settings):
    with Topology(settings, 2, worker_flags=("--kv-relay", "embedded"), processor_flags=("--router-mode", "kv")) as two:
        yield two


class Conversation:
    """A prompt that grows by each answer, and by what its user says to it."""

    def __init__(self, number: int):
        self.rng = random.Random(number)
        self.tokens = self.says(400)
        self.worker: str | None = None

    def says(self, count: int) -> list[int]:
        return [self.rng.randrange(7, 1000) for _ in range(count)]

    def turn(self, topology: Topology) -> tuple[str, int]:
        """Returns the reason of the router, and how many tokens were cached."""
        body = {"prompt": self.tokens, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = topology.api.post("/v1/completions", body, headers={"x-stator-route": "explain"})
        assert answer.status == 200, answer.text
        self.tokens = self.tokens + answer.json["choices"][0]["token_ids"] + self.says(60)
        return answer.headers["x-stator-route-reason"], answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]


def caches(topology: Topology) -> dict[str, dict]:
    return {target["worker"]: target["cache"] for target in topology.processor.targets()}


def test_each_turn_is_computed_where_the_earlier_ones_are(two: Topology):
    wait_until("both caches are known", lambda: all(
        cache["known_from"] == "events" for cache in caches(two).values()))
    conversations = [Conversation(number) for number in range(CONVERSATIONS)]
    homes = []
    for conversation in conversations:
        reason, cached = conversation.turn(two)
        assert cached == 0
        homes.append(reason.split(":")[0])
    for _ in range(2):
        for conversation, home in zip(conversations, homes):
            before = len(conversation.tokens) - 60
            reason, cached = conversation.turn(two)
            # All full blocks of what was there; the answer's last token is not in the cache.
            assert cached == (before - 1) // BLOCK * BLOCK
            assert reason.startswith(f"{home}:") and f"{cached} cached" in reason, reason
    for cache in caches(two).values():
        assert cache["missing_share"] == 0


def test_what_an_engine_forgets_is_not_expected_of_it(two: Topology):
    conversation = Conversation(100)
    home = conversation.turn(two)[0].split(":")[0]
    worker = next(worker for worker in two.workers if worker.id in home)
    worker.kill()
    two.wait_connected(1)
    reason, cached = conversation.turn(two)
    assert cached == 0 and worker.id not in reason
    worker.start().wait_ready()
    two.wait_connected(2)
    wait_until("the new engine's cache is known", lambda: caches(two)[worker.id]["known_from"] == "events")
    assert caches(two)[worker.id]["device_blocks"] == 0
    # It goes on where it is cached now.
    reason, cached = conversation.turn(two)
    assert cached > 0 and worker.id not in reason
