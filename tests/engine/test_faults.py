"""Real processes die, and what a client sees of it."""

from __future__ import annotations

import signal

import pytest

from support.cluster import Topology
from support.process import descendants, is_alive, kill, wait_until

pytestmark = pytest.mark.engine

LONG = {"max_tokens": 2000, "ignore_eos": True, "stream": True}


def test_a_worker_that_comes_back_adopts_its_engine(settings):
    with Topology(settings, worker_flags=("--engine-keep",)) as topology:
        (worker,) = topology.workers
        before = topology.api.complete().json["choices"]
        engine = worker.engine_pid()

        worker.process.kill()
        assert is_alive(engine)
        worker.start().wait_ready()
        topology.wait_connected(1)

        assert worker.engine_pid() == engine
        assert topology.api.complete().json["choices"] == before
        # What ran for the worker that died runs no more.
        wait_until("nothing runs", lambda: worker.status()["running"] == 0, 30)


def test_an_engine_that_dies_is_started_again(settings):
    with Topology(settings) as topology:
        (worker,) = topology.workers
        before = topology.api.complete().json["choices"]
        engine = worker.engine_pid()

        with topology.api.client.stream("POST", "/v1/completions", json={"prompt": "Hello", **LONG}) as response:
            lines = response.iter_lines()
            next(lines)
            for pid in (engine, *descendants(engine)):
                kill(pid)
            rest = list(lines)
        # The stream ends with an error event, not in silence.
        assert any('"error"' in line for line in rest), rest[-3:]

        wait_until("another engine runs", lambda: worker.engine_pid() not in (None, engine))
        worker.wait_ready()
        topology.wait_connected(1)
        assert topology.api.complete().json["choices"] == before

        # Without --engine-keep no engine outlives its worker.
        engine = worker.engine_pid()
        worker.process.kill()
        wait_until("the engine ended too", lambda: not is_alive(engine), 60)


def test_a_worker_told_to_end_finishes_what_runs(settings):
    with Topology(settings) as topology:
        (worker,) = topology.workers
        with topology.api.client.stream(
            "POST", "/v1/completions", json={"prompt": "Hello", **LONG, "max_tokens": 600}
        ) as response:
            lines = response.iter_lines()
            next(lines)
            engine = worker.engine_pid()
            worker.process.signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]", rest[-3:]
        assert worker.process.wait(60) == 0
        assert not is_alive(engine)
