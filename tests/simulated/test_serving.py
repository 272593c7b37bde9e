"""How processor and workers hang together, on simulated engines: routing, loss, drain, access."""

from __future__ import annotations

import concurrent.futures
import signal
import socket

import httpx
import pytest

from support.cluster import Topology
from support.process import wait_until

LONG = {"prompt": "Hello", "max_tokens": 1500, "ignore_eos": True, "stream": True}


def decisions(topology: Topology) -> list[int]:
    return sorted(target["decisions"] for target in topology.processor.targets())


def test_requests_take_turns(simulated):
    before = decisions(simulated)
    for _ in range(6):
        assert simulated.api.complete().status == 200
    assert sum(decisions(simulated)) - sum(before) == 6
    assert all(after - earlier == 3 for earlier, after in zip(before, decisions(simulated)))


def test_equal_prompts_get_equal_answers_from_every_worker(simulated):
    answers = [simulated.api.complete(max_tokens=40, ignore_eos=True).json["choices"][0]["text"] for _ in range(4)]
    assert len(set(answers)) == 1


def test_many_streams_run_side_by_side_and_keep_apart(simulated):
    def ask(index: int) -> tuple[int, str]:
        fields = {"max_tokens": 40, "ignore_eos": True}
        answer = simulated.api.complete(f"prompt number {index % 10}", stream=True, **fields)
        assert answer.done
        return index % 10, "".join(event["choices"][0]["text"] for event in answer.events)

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = set(pool.map(ask, range(200)))
    assert len(answers) == 10, "one text for each prompt"


def test_a_reader_that_stops_reading_holds_up_nobody(simulated):
    # With the smallest of buffers here, and candidates that make some 40 MB of the answer, neither the kernel nor
    # the processor can have it all.
    small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)]
    transport = httpx.HTTPTransport(socket_options=small)
    with httpx.Client(base_url=simulated.api.url, transport=transport, timeout=60) as slow:
        much = {"n": 32, "temperature": 1.0, "logprobs": 20}
        with slow.stream("POST", "/v1/completions", json=LONG | much) as answer:
            assert answer.status_code == 200
            # Nothing is read from here on.
            for _ in range(10):
                assert simulated.api.complete(max_tokens=20).status == 200
            running = [target["booked"]["requests"] for target in simulated.processor.targets()]
            assert sum(running) > 0, "the answer was over before it was read"


@pytest.mark.parametrize("policy", ["round-robin", "random", "least-loaded"])
def test_each_policy_serves(simulated, policy):
    processor = simulated.add_processor("--router-mode", policy).wait_ready()
    try:
        wait_until("both workers are open", lambda: all(
            target["availability"] == "open" for target in processor.targets()) and len(processor.targets()) == 2)
        for _ in range(4):
            assert processor.api.complete().status == 200
    finally:
        processor.stop()


def test_keys_are_asked_for(simulated):
    processor = simulated.add_processor(key="secret").wait_ready()
    try:
        assert processor.api.complete().status == 200
        for headers in ({"authorization": ""}, {"authorization": "Bearer other"}):
            refusal = processor.api.post("/v1/completions", {"prompt": "x"}, headers=headers)
            assert refusal.status == 401 and refusal.error["message"]
        assert processor.api.get("/health", headers={"authorization": ""}).status == 200
    finally:
        processor.stop()


def test_a_body_over_the_limit_is_refused(simulated):
    processor = simulated.add_processor("--max-body-bytes", "10000").wait_ready()
    try:
        assert processor.api.complete("x" * 20_000).status == 413
        assert processor.api.complete().status == 200
    finally:
        processor.stop()


def test_the_metrics_count_requests(simulated):
    simulated.api.complete()
    text = simulated.api.get("/metrics").text
    assert any(line.startswith("stator_") and not line.endswith(" 0") for line in text.splitlines())
    assert "# TYPE" in text


def test_what_is_open_is_said_at_start_up(simulated):
    text = simulated.processor.process.text()
    assert simulated.api.url.rpartition(":")[2] in text
    assert "key" in text


def test_tokens_go_to_text_and_back(simulated):
    tokens = simulated.api.post("/tokenize", {"model": "tiny", "prompt": "naïve 🚀"}).json
    assert tokens["count"] == len(tokens["tokens"]) > 0
    text = simulated.api.post("/detokenize", {"model": "tiny", "tokens": tokens["tokens"]}).json
    assert text["prompt"] == "naïve 🚀"


class TestLoss:
    """Each test has a topology of its own: it does not survive."""

    def test_a_stream_whose_worker_dies_ends_with_an_error_event(self, settings):
        with Topology(settings, engine="sim") as topology:
            with topology.api.client.stream("POST", "/v1/completions", json=LONG) as response:
                lines = response.iter_lines()
                next(lines)
                topology.workers[0].process.kill()
                rest = list(lines)
            assert any('"error"' in line for line in rest), rest[-3:]

    def test_the_other_worker_takes_over_new_requests(self, settings):
        with Topology(settings, workers=2, engine="sim") as topology:
            topology.workers[0].process.kill()
            topology.wait_connected(1)
            for _ in range(4):
                assert topology.api.complete().status == 200
            topology.workers[0].start().wait_ready()
            topology.wait_connected(2)

    def test_without_workers_a_request_is_refused_for_now(self, settings):
        with Topology(settings, engine="sim") as topology:
            topology.workers[0].process.kill()
            wait_until("no worker is left", lambda: not topology.api.is_healthy())
            refusal = topology.api.complete(model="tiny")
            # Its registration is still there: it may come back.
            assert refusal.status == 503, refusal.text
            assert refusal.headers["retry-after"]

    @pytest.mark.parametrize("who", ["processor", "worker"])
    def test_a_process_told_to_end_finishes_what_runs(self, settings, who):
        with Topology(settings, engine="sim") as topology:
            target = topology.processor.process if who == "processor" else topology.workers[0].process
            with topology.api.client.stream("POST", "/v1/completions", json=LONG) as response:
                lines = response.iter_lines()
                next(lines)
                target.signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]", rest[-3:]
            assert target.wait() == 0
