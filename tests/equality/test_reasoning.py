"""With a reasoning parser, thoughts and answer are told apart as vLLM does it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.api import Api
from support.cluster import Reference, Topology

from .cases import CHAT, NO_SPACE, SCHEMA, STREAM, WEATHER, Case, assert_equal_answers, chat, strict

pytestmark = pytest.mark.engine

PARSER = ("--reasoning-parser", "qwen3")

# </think> of the tiny model, more or less likely: thoughts of different lengths, or no end.
ENDS = [{}, {"1005": 3}, {"1005": 5}, {"1005": 100}]

# Holds for the answer only, in which </think> then cannot come again.
WORDS = {"structured_outputs": {"regex": "[a-z]{2,9}( [a-z]{2,9}){1,6}"}}


def bodies() -> Iterator[dict]:
    for bias in ENDS:
        yield chat("Think first", logit_bias=bias, max_tokens=50, **WORDS)
        yield chat("Think and stop", logit_bias=bias, max_tokens=50, stop=["a", "e"], **WORDS)
    yield chat("Do not think", chat_template_kwargs={"enable_thinking": False})
    yield chat("Keep it to yourself", include_reasoning=False, max_tokens=50)
    yield chat("With logprobs", logit_bias=ENDS[2], logprobs=True, top_logprobs=1, **WORDS)
    yield chat("With ids", logit_bias=ENDS[2], return_token_ids=True, **WORDS)
    schema = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    yield chat("An object", logit_bias=ENDS[1] | NO_SPACE, response_format=schema, max_tokens=120)
    yield chat("An object", chat_template_kwargs={"enable_thinking": False}, response_format=schema, max_tokens=120)
    yield chat("A tool", logit_bias=ENDS[1] | NO_SPACE, tools=[strict(WEATHER)], max_tokens=120)
    history = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two", "reasoning_content": "after one comes two"},
        {"role": "user", "content": "And then?"},
    ]
    yield chat(history, logit_bias=ENDS[2], **WORDS)


CASES = [
    Case(f"reasoning-{index}{suffix}", CHAT, body | fields)
    for index, body in enumerate(bodies())
    for suffix, fields in (("", {}), ("-stream", STREAM))
]


@pytest.fixture(scope="module")
def servers(settings) -> Iterator[tuple[Api, Api]]:
    flags = ("--reasoning-field-name", "reasoning")
    with (
        Reference(settings, *PARSER) as reference,
        Topology(settings, worker_flags=PARSER, processor_flags=flags) as topology,
    ):
        yield reference.api, topology.api


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_answer_equals_vllm(case: Case, servers: tuple[Api, Api]):
    assert_equal_answers(case, case.body, *servers)
