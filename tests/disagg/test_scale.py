"""64 workers under more requests than they can take, on simulated engines: afterwards nothing is left of them."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from support.cluster import Topology, Worker, connector
from support.flood import flood
from support.process import wait_until

ROLES = {"prefill": 32, "decode": 32}
RATE = 1000
SECONDS = 2

# What a second wave may add to a process that has seen a first one: allocators keep some of what they had.
GROWTH_MIB = 24


def bodies(seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [{"model": "tiny", "prompt": [rng.randrange(7, 1000) for _ in range(40)], "max_tokens": 4, "ignore_eos": True}
            for _ in range(200)]


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_nothing_is_left_of_many_requests(settings):
    # The engines take no time: what is measured is what stands before them.
    flags = (*connector(), "--sim-speedup", "0")
    with Topology(settings, ROLES, engine="sim", worker_flags=flags) as topology:
        processor = topology.processor.process.pid
        idle = descriptors(processor)
        resident = []
        for wave in range(2):
            outcomes = asyncio.run(flood(topology.api.url, bodies(wave), RATE, SECONDS, leave=0.1))
            print(f"wave {wave}: {dict(outcomes)}")
            assert set(outcomes) <= {200, 503, "left", "offered_per_second", "answered_per_second"}, outcomes
            assert outcomes[200] > 0
            topology.wait_idle()
            wait_until("all connections of clients are closed", lambda: descriptors(processor) <= idle + 8, 60)
            resident.append([resident_mib(pid) for pid in (processor, *(worker.process.pid for worker in topology.workers))])
        growth = [after - before for before, after in zip(*resident)]
        print(f"processor {resident[1][0]:.0f} MiB, largest growth {max(growth):.1f} MiB")
        assert max(growth) < GROWTH_MIB, growth
        assert all(decided(worker, topology) > 0 for worker in topology.workers), "some workers got nothing"
        for outcome in ("failed", "expired", "abandoned"):
            assert topology.processor.metric(f'stator_processor_handoffs_total{{model="tiny",outcome="{outcome}"}}') == 0


def decided(worker: Worker, topology: Topology) -> int:
    return next(target["decisions"] for target in topology.processor.targets() if target["worker"] == worker.id)
