"""What a client sees when a part of a hand-off fails: the right answer, from elsewhere, or an error that says so.

One story on one set of real engines, told in the order of this file: each failure costs an engine, and a start of one
takes seconds. Engines are stopped for a moment (SIGSTOP) so that requests are in a known state when one is killed. A
worker that is stopped itself is taken for lost after ten seconds, which a slow machine needs for less.
"""

from __future__ import annotations

import concurrent.futures
import random
import signal
import time
from collections.abc import Iterator

import pytest

from support.api import Answer, Api
from support.cluster import Topology, Worker, connector
from support.load import Load, expected_texts
from support.plane import ask
from support.process import frozen, wait_until

from .test_leaving import LONG, Client

pytestmark = pytest.mark.engine

# A request that has not ended by then hangs. Under vLLM's own 5 s for a peer that is gone, several times over.
BOUND = 60

# KV that nobody fetches is kept this long by the two prefill workers.
LEASE, SHORT_LEASE = 15, 6

# So few blocks that three long prompts after a lease have overwritten what it kept.
FEW_BLOCKS = ("--num-gpu-blocks-override", "80")


def body(number: int, **fields) -> dict:
    """A request whose prompt no other has: some 300 tokens."""
    rng = random.Random(number)
    prompt = [rng.randrange(7, 1000) for _ in range(rng.randrange(200, 400))]
    return {"prompt": prompt, "temperature": 0, "max_tokens": 24, "ignore_eos": True, "return_token_ids": True} | fields


class Story:
    """The topology, and what has the right answers."""

    def __init__(self, topology: Topology, reference: Api):
        self.topology = topology
        self.reference = reference
        self.pool = concurrent.futures.ThreadPoolExecutor(16)
        self.bodies = (body(number) for number in range(10_000))

    def worker(self, name: str) -> Worker:
        return next(worker for worker in self.topology.workers if worker.name == name)

    def at(self, worker: Worker) -> int:
        """How many requests the processor has at a worker."""
        targets = self.topology.processor.targets()
        return sum(target["booked"]["requests"] for target in targets if target["worker"] == worker.id)

    def send(self, count: int, **fields) -> list[Pending]:
        return [Pending(self, next(self.bodies) | fields) for _ in range(count)]

    def handoffs(self, outcome: str) -> float:
        return self.topology.processor.metric(f'stator_processor_handoffs_total{{model="tiny",outcome="{outcome}"}}')


class Pending:
    """A request under way."""

    def __init__(self, story: Story, body: dict):
        self.story = story
        self.body = body
        self.future = story.pool.submit(Api(story.topology.api.url).post, "/v1/completions", body)

    def answer(self) -> Answer:
        return self.future.result(BOUND)

    def assert_right(self) -> None:
        answer = self.answer()
        assert answer.status == 200, answer.text
        # Tokens, not text: where a prompt ends amid a character, vLLM (0.32) puts the prompt before the answer.
        expected = self.story.reference.post("/v1/completions", self.body)
        assert answer.json["choices"][0]["token_ids"] == expected.json["choices"][0]["token_ids"]


def assert_refused(answer: Answer, status: int = 503) -> None:
    assert answer.status == status, answer.text
    assert answer.error["message"] and answer.error["type"] and answer.error["code"] == status, answer.text
    if status == 503:
        assert int(answer.headers["retry-after"]) > 0


@pytest.fixture(scope="module")
def story(settings, reference) -> Iterator[Story]:
    with Topology(settings, {}, processor_flags=("--namespace", "one")) as topology:
        here = ("--namespace", "one")
        for lease in (LEASE, SHORT_LEASE):
            topology.add_worker("prefill", *here, *FEW_BLOCKS, *connector(extra={"kv_lease_duration": lease}))
        for _ in range(2):
            topology.add_worker("decode", *here, *connector(kv_load_failure_policy="fail"))
        for worker in topology.workers:
            worker.start()
        for worker in topology.workers:
            worker.wait_ready()
        topology.wait_connected(4)
        yield Story(topology, reference)


def test_a_client_that_leaves_between_engines_that_never_met_leaves_nothing(story: Story):
    prefills, decodes = (story.topology.of_role(role) for role in ("prefill", "decode"))
    with frozen(*(decode.process.pid for decode in decodes)):
        clients = [Client(story.topology, LONG | next(story.bodies)) for _ in range(4)]
        wait_until("KV is kept for all of them", lambda: sum(
            worker.metric("stator_handoffs_total") for worker in prefills) == 4, 30)
        for client in clients:
            client.leave()
    story.topology.wait_idle(LEASE - 5)


@pytest.fixture(scope="module")
def without_a_decode_worker(story: Story) -> dict:
    """One of two decode workers is killed with requests in its hands."""
    lost, other = story.topology.of_role("decode")
    long, short = story.topology.of_role("prefill")
    # One answer at each decode worker is on its way to the client.
    streams = [Client(story.topology, LONG | body(5000 + number, max_tokens=1500)) for number in range(2)]
    for stream in streams:
        stream.wait_for(b"data: ")
    before = short.metric("stator_handoffs_total")

    def computed() -> float:
        """How many prompts the worker with the short lease has computed."""
        return short.metric("stator_handoffs_total") - before

    with frozen(*lost.engine_pids()):
        with frozen(*other.engine_pids(), *long.engine_pids()):
            waiting = []
            # One after the other: from the first one on that waits at the long lease, they go to the short one.
            while story.at(long) == 0 or computed() < 4:
                waiting += story.send(1)
                wait_until("it is somewhere", lambda: computed() + story.at(long) == len(waiting), BOUND)
            # One of its requests is a stream, and those at the long lease may all be its own.
            assert story.at(lost) - 1 > story.at(long), "nothing is kept for the worker that is stopped"
        wait_until("those of the other worker are answered", lambda: story.at(other) <= 1, BOUND)
        wait_until("the short lease is over", lambda: short.kv_usage() == 0, BOUND)
        # What was kept by it is overwritten.
        address = next(target["address"] for target in story.topology.processor.targets()
                       if target["worker"] == short.id)
        for number in range(3):
            ask(address, "prefill", body(6000 + number)["prompt"] * 4)
        lost.kill()
    return {"streams": streams, "waiting": waiting}


class TestTheDecodeWorkerDies:
    def test_before_it_fetched(self, without_a_decode_worker: dict):
        # Some of the KV is overwritten by now.
        for request in without_a_decode_worker["waiting"]:
            request.assert_right()

    def test_amid_an_answer(self, without_a_decode_worker: dict):
        broken = []
        for stream in without_a_decode_worker["streams"]:
            seen = stream.wait_for(b"[DONE]", b'"error"')
            broken.append(b'"error"' in seen)
            stream.leave()
        # The tokens that were sent cannot be taken back: that one answer ends with an error event.
        assert sorted(broken) == [False, True]


@pytest.fixture(scope="module")
def without_a_prefill_worker(story: Story) -> dict:
    """One of two prefill workers is killed with requests in its hands, and in the hands of the decode worker."""
    story.topology.wait_idle(LEASE + 10)
    (lost, other), decode = story.topology.of_role("prefill"), story.worker("decode-1")
    (decoding,) = story.send(1, max_tokens=600)
    wait_until("an answer is generated", lambda: decode.status().get("running") == 1 or decoding.future.done(), BOUND)
    handed = lost.metric("stator_handoffs_total")
    # What the other one gets stays there, so that its short lease does not run.
    with frozen(decode.process.pid), frozen(*other.engine_pids()):
        between = story.send(4)
        wait_until("some are computed and not fetched",
                   lambda: lost.metric("stator_handoffs_total") > handed and story.at(lost) == 0, BOUND)
        with frozen(*lost.engine_pids()):
            during = story.send(4)
            wait_until("some are being computed", lambda: lost.status().get("requests", 0) > 0, BOUND)
            lost.kill()
    return {"between": between, "during": during, "decoding": decoding, "before": story.send(2)}


class TestThePrefillWorkerDies:
    def test_before_the_hand_off(self, without_a_prefill_worker: dict):
        for request in without_a_prefill_worker["before"]:
            request.assert_right()

    def test_while_it_computes(self, without_a_prefill_worker: dict):
        for request in without_a_prefill_worker["during"]:
            request.assert_right()

    def test_before_its_kv_was_fetched(self, story: Story, without_a_prefill_worker: dict):
        for request in without_a_prefill_worker["between"]:
            request.assert_right()
        assert story.handoffs("failed") > 0

    def test_after_its_kv_was_fetched(self, without_a_prefill_worker: dict):
        without_a_prefill_worker["decoding"].assert_right()


def test_workers_come_and_go_while_requests_run(story: Story):
    story.topology.wait_idle()
    bodies = [body(7000 + number, max_tokens=16) for number in range(12)]
    expected = expected_texts(story.topology.api, bodies)
    old = [story.worker("prefill-1"), story.worker("decode-1")]
    new = [story.worker("prefill-0"), story.worker("decode-0")]
    with Load(story.topology.api.url, bodies, expected, threads=3) as load:
        for worker in new:
            worker.start()
        for worker in new:
            worker.wait_ready()
        story.topology.wait_connected(4)
        old[0].process.signal(signal.SIGTERM)
        assert old[0].process.wait(BOUND) == 0
        count = load.count()
        wait_until("requests go on", lambda: load.count() >= count + 20, BOUND)
        old[1].kill()
        count = load.count()
        wait_until("requests go on", lambda: load.count() >= count + 20, BOUND)
    assert load.outcomes["wrong"] == load.outcomes["bad"] == 0, load.details
    # An answer that had begun at the worker that was killed cannot go on elsewhere: one per thread, at most.
    assert load.outcomes["broken"] + load.outcomes["refused"] <= 3, load.details
    story.topology.wait_idle()


@pytest.fixture(scope="module")
def other(story: Story) -> Worker:
    """The only prefill worker from here on; its KV has another type."""
    worker = story.topology.add_worker("prefill", "--namespace", "one", "--dtype", "bfloat16", *connector())
    worker.start().wait_ready()
    story.topology.wait_connected(3)
    story.worker("prefill-0").kill()
    story.topology.wait_connected(2)
    return worker


class TestAnEngineOfAnotherKind:
    """The engines refuse each other when they meet."""

    def test_a_hand_off_that_cannot_be_is_an_error(self, story: Story, other: Worker):
        started = time.monotonic()
        answer = story.send(1)[0].answer()
        assert_refused(answer, answer.status)
        assert answer.status >= 500
        assert time.monotonic() - started < BOUND

    def test_an_engine_that_may_compute_the_prompt_itself_does(self, story: Story, other: Worker):
        own = story.topology.add_worker("decode", "--namespace", "one", *connector(kv_load_failure_policy="recompute"))
        own.start().wait_ready()
        story.worker("decode-0").kill()
        story.topology.wait_connected(2)
        for request in story.send(3):
            request.assert_right()
        assert own.metric("stator_handoff_recomputed_tokens_total") > 0

    def test_so_it_does_when_the_prefill_worker_dies_before_the_fetch(self, story: Story, other: Worker):
        own = story.worker("decode-2")
        handed = other.metric("stator_handoffs_total")
        with frozen(*own.engine_pids()):
            requests = story.send(2)
            wait_until("KV is kept", lambda: other.metric("stator_handoffs_total") == handed + 2, BOUND)
            other.kill()
        for request in requests:
            request.assert_right()

    def test_without_a_prefill_worker_a_request_is_refused_for_now(self, story: Story):
        story.topology.wait_connected(1)
        assert not story.topology.api.is_healthy()
        assert_refused(story.send(1)[0].answer())
