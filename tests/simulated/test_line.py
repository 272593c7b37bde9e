"""One line of prompts for all processors, held by a NATS server: on simulated engines, with processes that are killed.

Prompts have no beginning in common unless a test says so.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import random
import string
from contextlib import ExitStack, contextmanager
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.cluster import Processor, Settings, Topology, connector
from support.process import Process, free_port, frozen, wait_until

# What a prefill worker computes of a prompt in a second, and how much at once: so a prompt of 900 tokens has most of its
# room, and takes 0.2 s or, at a slow worker, 1 s.
STEADY = ("--sim-prefill-us-per-token", "200", "--max-num-batched-tokens", "512")
SLOW = ("--sim-prefill-us-per-token", "1000", "--max-num-batched-tokens", "512")
WORDS = random.Random(7)
NUMBERS = itertools.count()


def prompt(words: int = 300) -> str:
    """A prompt that no other begins like."""
    letters = ("".join(WORDS.choices(string.ascii_lowercase, k=6)) for _ in range(words))
    return f"{next(NUMBERS)} {' '.join(letters)}"


class Nats:
    """A NATS server that can be killed and started again."""

    def __init__(self, folder: Path, *flags: str):
        port = str(free_port())
        self.log = folder / f"nats-{port}.log"
        self.command = ["nats-server", "-a", "127.0.0.1", "-p", port, *flags]
        self.flags = ("--nats-server", f"nats://127.0.0.1:{port}")
        self.start()

    def start(self) -> None:
        self.log.unlink(missing_ok=True)
        self.process = Process("nats-server", self.command, self.log)
        self.process.wait_until("the NATS server is ready", lambda: "Server is ready" in self.process.text())


@pytest.fixture
def nats(settings, tmp_path) -> Iterator[Nats]:
    server = Nats(settings.folder, "-js", "-sd", str(tmp_path))
    yield server
    server.process.stop()


@contextmanager
def served(settings: Settings, nats: Nats, prefill: tuple[tuple[str, ...], ...] = (STEADY,) * 3,
           router: str = "round-robin", shared: bool = True) -> Iterator[Topology]:
    """Prefill workers with flags of their own and a decode worker behind two processors that share a line."""
    plane = ("--request-plane", "nats", *nats.flags, *connector())
    topology = Topology(settings, workers={"decode": 1}, engine="sim", worker_flags=plane,
                        processor_flags=("--prefill-dispatch", "queue", "--router-mode", router, *nats.flags))
    for flags in prefill:
        topology.add_worker("prefill", *plane, *flags)
    with topology:
        topology.add_processor(*topology.processor_flags).wait_ready()
        if shared:
            wait_until("the line is open", lambda: all(queue(each)["shared"] for each in topology.processors))
        yield topology


def queue(processor: Processor) -> dict:
    return processor.api.get("/workers").json["models"][0]["prefill_queue"]


def taken(topology: Topology) -> dict[str, int]:
    """How many prompts each prefill worker got."""
    names = {worker.id: worker.name for worker in topology.of_role("prefill")}
    counts = dict.fromkeys(names.values(), 0)
    for processor in topology.processors:
        for target in processor.targets():
            if target["role"] == "prefill" and target["worker"] in names:
                counts[names[target["worker"]]] += target["decisions"]
    return counts


def ask(processor: Processor, text: str, **fields) -> httpx.Response:
    """A completion over a connection of its own."""
    body = {"prompt": text, "max_tokens": 2, "temperature": 0} | fields
    return httpx.post(f"{processor.api.url}/v1/completions", json=body, timeout=90, trust_env=False)


@contextmanager
def asked(processors: list[Processor], count: int) -> Iterator[list[concurrent.futures.Future]]:
    """So many prompts at once, each processor in turn."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        turns = itertools.cycle(processors)
        yield [pool.submit(ask, next(turns), prompt()) for _ in range(count)]


def wait_waiting(processor: Processor, least: int) -> None:
    wait_until(f"{least} prompts wait", lambda: queue(processor)["requests"] >= least)


def test_two_processors_share_a_line_and_a_slow_worker_gets_fewer(settings, nats):
    with served(settings, nats, (STEADY, STEADY, SLOW)) as topology:
        with asked(topology.processors, 36) as answers:
            wait_waiting(topology.processors[1], 4)
        assert [answer.result().status_code for answer in answers] == [200] * 36
        counts = taken(topology)
        assert sum(counts.values()) == 36, counts
        fast = min(counts["prefill-0"], counts["prefill-1"])
        assert 0 < counts["prefill-2"] < fast * 0.6, counts
        topology.wait_idle()


def test_a_prompt_goes_to_the_worker_that_has_its_beginning(settings, nats):
    told = (*STEADY, "--kv-relay", "embedded")
    with served(settings, nats, (told,) * 3, router="kv") as topology:
        beginning = prompt()
        before = taken(topology)
        assert ask(topology.processor, beginning).status_code == 200
        after = taken(topology)
        home = max(after, key=lambda name: after[name] - before[name])
        ids = {worker.name: worker.id for worker in topology.of_role("prefill")}

        def knows(processor: Processor) -> bool:
            caches = {target["worker"]: target["cache"]["device_blocks"] for target in processor.targets()}
            return caches[ids[home]] > 0

        wait_until("both know of the cache", lambda: all(knows(each) for each in topology.processors))
        for turn in range(8):
            assert ask(topology.processors[turn % 2], f"{beginning} {prompt(4)}").status_code == 200
        assert taken(topology)[home] - after[home] == 8, (home, after, taken(topology))


def test_who_waits_behind_a_processor_that_was_killed_is_served(settings, nats):
    with served(settings, nats) as topology:
        mine, lost = topology.processors
        with asked([lost], 48) as answers:
            wait_waiting(lost, 8)
            with asked([mine], 6) as own:
                wait_waiting(mine, 1)
                lost.process.kill()
                # What ran for the lost one, some six of its prompts, was given up; its tickets cost a question each.
                wait_until("those behind another are answered", lambda: all(answer.done() for answer in own))
            assert [answer.result().status_code for answer in own] == [200] * 6
            assert queue(mine)["shared"]
        # The first may have been answered before.
        assert sum(answer.exception() is not None for answer in answers) >= 8
        topology.processors.remove(lost)
        topology.wait_idle()


def test_a_processor_that_hangs_holds_nobody_up_and_goes_on(settings, nats):
    with served(settings, nats) as topology:
        mine, slow = topology.processors
        with asked([slow], 18) as answers:
            wait_waiting(slow, 6)
            with frozen(slow.process.pid), asked([mine], 6) as own:
                pass
            assert [answer.result().status_code for answer in own] == [200] * 6
        assert [answer.result().status_code for answer in answers] == [200] * 18
        topology.wait_idle()


def test_prompts_of_a_worker_that_was_killed_are_computed_by_others(settings, nats):
    with served(settings, nats) as topology:
        with asked(topology.processors, 24) as answers:
            wait_waiting(topology.processor, 3)
            topology.of_role("prefill")[0].kill()
        assert [answer.result().status_code for answer in answers] == [200] * 24
        lost = topology.of_role("prefill")[0]
        topology.workers.remove(lost)
        topology.wait_idle()


def test_everybody_is_told_when_the_server_starts_again_and_the_line_opens_again(settings, nats):
    def waiting() -> int:
        return sum(queue(processor)["requests"] for processor in topology.processors)

    with served(settings, nats) as topology:
        prefill = [worker.process.pid for worker in topology.of_role("prefill")]
        # Who comes while nobody is connected is refused: so all are there before.
        with ExitStack() as held:
            held.enter_context(frozen(*prefill))
            with asked(topology.processors, 24) as answers:
                wait_until("all wait", lambda: waiting() == 24)
                held.close()
                wait_until("the first are computed", lambda: waiting() < 24)
                nats.process.kill()
                nats.start()
        told = [answer.result() for answer in answers]
        # A prompt that a worker computed at that moment is told so; who waited notices nothing.
        assert {answer.status_code for answer in told} <= {200, 502, 503}, [answer.text for answer in told]
        computed = [answer.text for answer in told if answer.status_code != 200]
        assert len(computed) <= 9, computed
        wait_until("the line is open", lambda: all(queue(each)["shared"] for each in topology.processors))
        with asked(topology.processors, 12) as answers:
            pass
        assert [answer.result().status_code for answer in answers] == [200] * 12
        topology.wait_idle()


def test_without_jetstream_each_processor_has_a_queue_and_says_why(settings):
    nats = Nats(settings.folder)
    try:
        with served(settings, nats, shared=False) as topology:
            wait_until("the remedy is said", lambda: "nats-server -js" in topology.processor.process.text())
            with asked(topology.processors, 12) as answers:
                pass
            assert [answer.result().status_code for answer in answers] == [200] * 12
            assert not queue(topology.processor)["shared"]
    finally:
        nats.process.stop()
