"""Adapters that not every worker serves, on simulated engines."""

from __future__ import annotations

import pytest

from support import adapter
from support.cluster import Topology, Worker
from support.process import wait_until


@pytest.fixture(scope="module")
def x(settings):
    return adapter.write(settings.folder / "adapter-x", settings.model, seed=1)


@pytest.fixture
def pair(settings, x):
    """The first worker serves the adapter `x`, the second one does not."""
    topology = Topology(settings, workers=0, engine="sim", processor_flags=("--router-mode", "round-robin"))
    topology.add_worker("agg", *adapter.flags(x=x))
    topology.add_worker("agg")
    with topology:
        yield topology


def decisions(topology: Topology) -> list[int]:
    """How many requests each worker was sent."""
    targets = {target["worker"]: target["decisions"] for target in topology.processor.targets()}
    return [targets[worker.id] for worker in topology.workers]


def text(topology: Topology, model: str) -> str:
    answer = topology.api.complete("one prompt", model=model, max_tokens=20, ignore_eos=True)
    assert answer.status == 200 and answer.json["model"] == model, answer.text
    return answer.json["choices"][0]["text"]


def test_an_adapter_is_asked_of_its_worker_alone_and_goes_with_it(pair, x):
    listed = {model["id"]: model for model in pair.api.get("/v1/models").json["data"]}
    assert listed["x"]["parent"] == "tiny" and listed["x"]["root"] == str(x.resolve())

    adapted = {text(pair, "x") for _ in range(6)}
    assert decisions(pair) == [6, 0]
    base = {text(pair, "tiny") for _ in range(6)}
    assert decisions(pair) == [9, 3]
    assert len(adapted) == len(base) == 1 and adapted != base
    assert pair.api.complete(model="y").status == 404

    first: Worker = pair.workers[0]
    first.kill()
    pair.wait_connected(1)
    refusal = pair.api.complete(model="x")
    assert refusal.status == 503 and refusal.headers["retry-after"], refusal.text
    assert pair.api.complete(model="tiny").status == 200
    first.start().wait_ready()
    wait_until("the adapter is back", lambda: pair.api.complete(model="x").status == 200)


@pytest.mark.parametrize(("flags", "remedy"), [
    (("--lora-modules", "x={path}"), "--enable-lora"),
    (("--enable-lora", "--lora-modules", "x=/nowhere"), "adapter_config.json"),
    (("--enable-lora", "--lora-modules", "x={path}", '{{"name": "x", "path": "{path}"}}'), "two adapters"),
    (("--enable-lora", "--lora-modules", "tiny={path}"), "--served-model-name"),
])
def test_adapters_that_cannot_be_served_are_refused_at_the_start(settings, tmp_path, x, flags, remedy):
    flags = tuple(flag.format(path=x) for flag in flags)
    worker = Worker(settings, "refused", tmp_path, "sim", flags).start()
    assert worker.process.wait() != 0
    assert "--lora-modules" in worker.process.text() and remedy in worker.process.text(), worker.process.text()
