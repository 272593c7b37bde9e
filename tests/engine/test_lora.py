"""LoRA adapters on real engines: the answers of vLLM's own server, and caches that keep adapters apart."""

from __future__ import annotations

import pytest

from support import adapter
from support.cluster import Reference, Topology, connector
from support.compare import first_difference
from support.process import kill, wait_until

pytestmark = pytest.mark.engine

BLOCK = 32
# Four blocks and a bit.
PROMPT = [900, *range(100, 235)]


@pytest.fixture(scope="module")
def lora_flags(settings):
    folder = settings.folder / "adapters"
    return adapter.flags(x=adapter.write(folder / "x", settings.model, 1), y=adapter.write(folder / "y", settings.model, 2))


@pytest.fixture(scope="module")
def ours(settings, lora_flags):
    """A worker with two adapters, behind a processor that routes by what caches hold."""
    flags = {"worker_flags": (*lora_flags, "--kv-relay", "embedded"), "processor_flags": ("--router-mode", "kv")}
    with Topology(settings, **flags) as topology:
        wait_until("its cache is known", lambda: topology.processor.targets()[0]["cache"]["known_from"] == "events")
        yield topology


@pytest.fixture(scope="module")
def theirs(settings, lora_flags):
    with Reference(settings, *lora_flags) as reference:
        yield reference.api


def test_adapters_answer_as_with_vllm(ours: Topology, theirs):
    texts = set()
    for model in ("tiny", "x", "y"):
        fields = {"model": model, "max_tokens": 24, "ignore_eos": True, "logprobs": 2}
        answers = [api.complete("A frozen river", **fields) for api in (theirs, ours.api)]
        assert first_difference(*answers) is None
        chats = [api.chat("And then?", model=model, max_tokens=24) for api in (theirs, ours.api)]
        assert first_difference(*chats) is None
        texts.add(answers[1].json["choices"][0]["text"])
    assert len(texts) == 3, "adapters change what is said"


def test_adapters_are_listed_as_with_vllm(ours: Topology, theirs):
    def listed(api) -> list[tuple]:
        return [(model["id"], model["root"], model["parent"]) for model in api.get("/v1/models").json["data"]]

    assert listed(ours.api) == listed(theirs)
    unknown = [api.complete(model="z") for api in (theirs, ours.api)]
    assert [answer.status for answer in unknown] == [404, 404]


def test_what_an_adapter_has_cached_is_foreseen_and_found(ours: Topology):
    def foreseen(model: str) -> int:
        explained = ours.api.post("/route/explain", {"prompt": PROMPT, "model": model}).json
        return explained["prompts"][0]["legs"][0]["candidates"][0]["cached_tokens"]["device"]

    def found(model: str) -> int:
        usage = ours.api.complete(PROMPT, model=model).json["usage"]
        return (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)

    blocks = len(PROMPT) // BLOCK * BLOCK
    for model in ("x", "tiny", "y"):
        # What the others have computed is of no use to it.
        assert (foreseen(model), found(model)) == (0, 0)
        wait_until("its blocks are known", lambda: foreseen(model) == blocks)
        assert found(model) == blocks
    assert ours.processor.metric("stator_processor_cache_missing_tokens_total") == 0


def test_a_hand_off_computes_both_legs_with_the_adapter(settings, lora_flags, ours: Topology):
    flags = (*lora_flags, *connector())
    with Topology(settings, {"prefill": 1, "decode": 1}, worker_flags=flags) as pair:
        for model in ("x", "tiny", "y", "x"):
            fields = {"model": model, "max_tokens": 24, "ignore_eos": True, "logprobs": 2}
            answers = [api.complete(PROMPT[1:], **fields) for api in (ours.api, pair.api)]
            assert first_difference(*answers) is None
        assert pair.processor.metric('stator_processor_handoffs_total{model="tiny",outcome="done"}') == 4


def test_the_next_engine_has_the_adapters_too(ours: Topology):
    (worker,) = ours.workers
    fields = {"prompt": "A frozen river", "model": "x", "max_tokens": 24, "ignore_eos": True}
    before = ours.api.complete(**fields).json["choices"][0]["text"]
    engine = worker.engine_pid()
    for pid in worker.engine_pids():
        kill(pid)
    wait_until("another engine runs", lambda: worker.engine_pid() not in (None, engine))
    worker.wait_ready()
    ours.wait_connected(1)
    assert ours.api.complete(**fields).json["choices"][0]["text"] == before
