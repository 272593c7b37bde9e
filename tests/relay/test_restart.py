"""A relay that is killed and started again: conversations go on without it, and afterwards the processor knows what the
engines' caches hold, as if nothing had been."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from support.cluster import Relay, Topology
from support.process import wait_until

BLOCK = 32
CONVERSATIONS = 6

# A relay's word is missed after 5 s (`proto/README.md`); one that starts finds engines by their cards and asks them to
# tell again at once. The rest is for a busy machine.
KNOWN_AGAIN_SECONDS = 30


class Conversation:
    """A prompt that grows by each answer, and what the engines must have cached of it."""

    def __init__(self, number: int):
        self.rng = random.Random(number)
        self.tokens = self.says(300)
        # Full blocks from the start on, by worker: those of the turns that it computed.
        self.cached: dict[str, int] = {}

    def says(self, count: int) -> list[int]:
        return [self.rng.randrange(7, 1000) for _ in range(count)]

    def turn(self, topology: Topology) -> tuple[str, int, int]:
        """Returns who answered, how many tokens it had cached, and how many it must have had."""
        body = {"prompt": self.tokens, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = topology.api.post("/v1/completions", body, headers={"x-stator-route": "explain"})
        assert answer.status == 200, answer.text
        reason = answer.headers["x-stator-route-reason"]
        worker = next(worker.id for worker in topology.workers if worker.id in reason.split(":")[0])
        full = (len(self.tokens) - 1) // BLOCK
        expected = min(self.cached.get(worker, 0), full) * BLOCK
        told = self.tokens + answer.json["choices"][0]["token_ids"]
        # The answer's last token is in no cache.
        self.cached[worker] = (len(told) - 1) // BLOCK
        self.tokens = told + self.says(60)
        return worker, answer.json["usage"]["prompt_tokens_details"]["cached_tokens"], expected


@contextmanager
def two_engines(settings, engine: str) -> Iterator[tuple[Topology, Relay]]:
    relay = Relay(settings)
    flags = {"worker_flags": relay.worker_flags, "processor_flags": ("--router-mode", "kv")}
    try:
        with Topology(settings, 2, engine, **flags) as topology:
            relay.start(topology)
            yield topology, relay
    finally:
        relay.stop()


def caches(topology: Topology) -> dict[str, dict]:
    return {target["worker"]: target["cache"] for target in topology.processor.targets()}


def are_known_from(topology: Topology, source: str) -> Callable[[], bool]:
    return lambda: all(cache["known_from"] == source for cache in caches(topology).values())


def held(topology: Topology, conversations: list[Conversation]) -> dict[str, int]:
    """The blocks in each engine's cache. The prompts are random and few: they share none, and none is evicted."""
    return {worker.id: sum(conversation.cached.get(worker.id, 0) for conversation in conversations)
            for worker in topology.workers}


def wait_known(topology: Topology, relay: Relay, conversations: list[Conversation]) -> None:
    """Waits until the processor's view, and the relay's, is what the engines hold."""
    expected = held(topology, conversations)

    def is_known() -> bool:
        view = {worker: cache["device_blocks"] for worker, cache in caches(topology).items()}
        return are_known_from(topology, "events")() and view == expected \
            and relay.metric("stator_kv_relay_blocks") == sum(expected.values())

    wait_until(f"it is known that engines hold {expected}", is_known, KNOWN_AGAIN_SECONDS)


def turns(topology: Topology, conversations: list[Conversation]) -> list[tuple[str, int, int]]:
    """One turn of each, side by side."""
    with ThreadPoolExecutor(len(conversations)) as pool:
        return list(pool.map(lambda conversation: conversation.turn(topology), conversations))


def kill_and_restart(topology: Topology, relay: Relay) -> None:
    wait_until("both caches are known", are_known_from(topology, "events"), KNOWN_AGAIN_SECONDS)
    conversations = [Conversation(number) for number in range(CONVERSATIONS)]
    homes = [conversation.turn(topology)[0] for conversation in conversations]
    assert len(set(homes)) == 2, "both engines have something to remember"
    wait_known(topology, relay, conversations)
    for conversation, home in zip(conversations, homes):
        worker, cached, expected = conversation.turn(topology)
        assert (worker, cached) == (home, expected) and cached > 0
    wait_known(topology, relay, conversations)

    # Killed while all of them are talking.
    with ThreadPoolExecutor(1) as beside:
        talking = beside.submit(turns, topology, conversations)
        relay.kill()
        for _, cached, expected in talking.result():
            assert cached == expected
    wait_until("the processor misses the relay", are_known_from(topology, "routing"), KNOWN_AGAIN_SECONDS)
    # What was sent where is known all the same: the second of these turns finds the first.
    without = turns(topology, conversations)
    for conversation, (home, cached, expected) in zip(conversations, without):
        assert cached == expected
        worker, cached, expected = conversation.turn(topology)
        assert (worker, cached) == (home, expected) and cached > 0

    # Started again while they talk: what engines did without it, they tell again.
    with ThreadPoolExecutor(1) as beside:
        talking = beside.submit(turns, topology, conversations)
        relay.start(topology)
        for _, cached, expected in talking.result():
            assert cached == expected
    wait_known(topology, relay, conversations)
    for conversation in conversations:
        best = max(conversation.cached.values())
        worker, cached, expected = conversation.turn(topology)
        # Where most of it is, and all that is there is found.
        assert cached == expected == best * BLOCK
    wait_known(topology, relay, conversations)
    for cache in caches(topology).values():
        assert cache["missing_share"] == 0


def test_simulated_engines_are_known_again_after_the_relay_is_killed(settings):
    with two_engines(settings, "sim") as (topology, relay):
        kill_and_restart(topology, relay)


@pytest.mark.engine
def test_real_engines_are_known_again_after_the_relay_is_killed(settings):
    with two_engines(settings, "vllm") as (topology, relay):
        kill_and_restart(topology, relay)
