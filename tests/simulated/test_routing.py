"""Where prompts go: by what the caches of simulated engines hold, as their relays tell."""

from __future__ import annotations

import pytest

from support.cluster import Topology
from support.process import wait_until

EVENTS = ("--kv-relay", "embedded")


@pytest.fixture(scope="module")
def fleet(settings):
    """Three workers that tell what their caches hold, behind a processor that asks."""
    flags = {"worker_flags": EVENTS, "processor_flags": ("--router-mode", "kv")}
    with Topology(settings, workers=3, engine="sim", **flags) as topology:
        wait_until("all caches are known", lambda: all(
            target["cache"]["known_from"] == "events" for target in topology.processor.targets()))
        yield topology


def known(topology: Topology) -> dict[str, int]:
    return {target["worker"]: target["cache"]["device_blocks"] for target in topology.processor.targets()}


def explained(topology: Topology, prompt: str) -> dict:
    answer = topology.api.post("/route/explain", {"prompt": prompt})
    return answer.json["prompts"][0]["legs"][0]


def test_a_second_turn_goes_where_the_first_was_computed(fleet):
    for name in "ABCD":
        first = f"{name} conversation. " + "It has a long beginning, which all of its turns repeat. " * 20
        before = known(fleet)
        assert fleet.api.complete(first, max_tokens=4).status == 200
        wait_until("its blocks are known", lambda: known(fleet) != before)
        home = max(known(fleet), key=lambda worker: known(fleet)[worker] - before[worker])
        for turn in ("Go on.", "And then?"):
            leg = explained(fleet, first + turn)
            assert leg["chosen"]["worker"] == home, leg
            answer = fleet.api.complete(first + turn, max_tokens=4)
            usage = answer.json["usage"]
            details = usage["prompt_tokens_details"]
            assert details and details["cached_tokens"] > usage["prompt_tokens"] * 0.7, usage


def test_what_was_expected_was_found(fleet):
    assert fleet.processor.metric("stator_processor_cache_expected_tokens_total") > 0
    assert fleet.processor.metric("stator_processor_cache_missing_tokens_total") == 0
