"""Our answers equal those of vLLM's own server, token for token.

Both serve the same model with the same flags. Requests go out one at a time, so that
both engines see the same batches; the cache of prefixes fills up in the same order.
"""

from __future__ import annotations

import json

import pytest

from support.api import Api

from .cases import CHAT, Case, Plain, all_cases, assert_equal_answers

CASES = all_cases()

pytestmark = pytest.mark.engine


def test_there_are_enough_cases():
    assert len(CASES) >= 200


@pytest.fixture(scope="session")
def ask(reference: Api):
    """Answers of the reference server that cases are derived from."""
    known: dict[str, Plain] = {}

    def ask(path: str, body: dict) -> Plain:
        key = json.dumps([path, body])
        if key not in known:
            answer = reference.post(path, body | {"return_token_ids": True})
            assert answer.status == 200, answer.text
            choice = answer.json["choices"][0]
            text = choice["message"]["content"] if path == CHAT else choice["text"]
            known[key] = Plain(text, choice["token_ids"])
        return known[key]

    return ask


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_answer_equals_vllm(case: Case, reference: Api, candidate: Api, ask):
    assert_equal_answers(case, case.resolve(ask), reference, candidate)
