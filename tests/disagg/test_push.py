"""The connector with which the prefill engine writes KV into the decode engine, both knowing the request by one id."""

from __future__ import annotations

import random

import pytest

from equality.cases import TEXT, Case, assert_equal_answers, completion
from support.api import Api
from support.cluster import Topology, connector

from .test_equality import WORDS

pytestmark = pytest.mark.engine

COUNT = 20


@pytest.fixture(scope="module")
def push(settings):
    with Topology(settings, {"prefill": 1, "decode": 1}, worker_flags=connector("NixlPushConnector")) as topology:
        yield topology


@pytest.mark.parametrize("number", range(COUNT))
def test_answer_equals_that_of_one_engine(number: int, push: Topology, reference: Api):
    rng = random.Random(60 + number)
    words = round(10 * 60 ** (number / (COUNT - 1)))
    fields = [{}, {"n": 2, "temperature": 0.9, "seed": 3}, {"stream": True}, {"max_tokens": 1}][number % 4]
    body = completion(" ".join(rng.choice(WORDS) for _ in range(words)), ignore_eos=True, **fields)
    assert_equal_answers(Case(str(number), TEXT, body), body, reference, push.api)


def test_no_prompt_is_computed_twice_and_nothing_is_left(push: Topology):
    (decode,) = push.of_role("decode")
    push.wait_idle(20)
    assert decode.metric("stator_prompt_tokens_total") > 0
    assert decode.metric("stator_handoff_recomputed_tokens_total") == 0
