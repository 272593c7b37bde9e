"""Tokens that come from the prefix cache are counted as vLLM counts them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.api import Answer, Api

pytestmark = pytest.mark.engine

# Four blocks of 32 tokens that no other test sends.
PREFIX = [900, *range(100, 227)]

# Some blocks of text. A test begins its own with words that no other has.
LONG = "a frozen river, a city and a bridge that nobody crosses before the night is over; " * 8

USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def cached_tokens(answer: Answer) -> int:
    assert answer.status == 200, answer.text
    usage = answer.events[-1]["usage"] if answer.is_stream else answer.json["usage"]
    return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


@pytest.mark.parametrize("salt", [None, "tenant-1", "tenant-2"])
def test_cached_tokens_grow_with_the_shared_prefix(reference, candidate, salt):
    prompts = [PREFIX, PREFIX, PREFIX[:70], [*PREFIX, 5, 6, 7], [901, *PREFIX], PREFIX[:32], PREFIX[:33]]
    fields = {"cache_salt": salt} if salt else {}

    def counts(server) -> list[int]:
        return [cached_tokens(server.complete(prompt, max_tokens=1, **fields)) for prompt in prompts]

    # Block by block, and never the whole prompt: its last token has to be computed.
    expected = [0, 96, 64, 128, 0, 0, 32]
    assert counts(reference) == expected
    assert counts(candidate) == expected


def completions(server: Api, fields: dict) -> list[Answer]:
    first = "completions " + str(fields) + LONG
    return [server.complete(prompt, **fields) for prompt in (first, first, first + "and more", first[:300])]


def conversation(server: Api, fields: dict) -> list[Answer]:
    turns = [{"role": "user", "content": "conversation " + str(fields) + LONG}]
    answers = []
    for reply in ("Nobody.", "The river.", "At night."):
        answers.append(server.chat(messages=turns, **fields))
        turns = [*turns, {"role": "assistant", "content": reply}, {"role": "user", "content": "Why? " + LONG[:150]}]
    return answers


def tools(server: Api, fields: dict) -> list[Answer]:
    tool = {"type": "function", "function": {"name": "cross", "description": LONG, "parameters": {"type": "object"}}}
    return [server.chat(question + str(fields), tools=[tool], **fields) for question in ("One?", "One?", "Two?")]


@pytest.mark.parametrize("fields", [{}, USAGE, {"n": 2, "seed": 1, "temperature": 1.0},
                                    {"n": 2, "seed": 1, "temperature": 1.0} | USAGE, {"cache_salt": "tenant-3"}], ids=str)
@pytest.mark.parametrize("ask", [completions, conversation, tools])
def test_cached_tokens_are_those_of_vllm(
    reference: Api, candidate: Api, ask: Callable[[Api, dict], list[Answer]], fields: dict,
):
    expected, actual = ([cached_tokens(answer) for answer in ask(server, fields)] for server in (reference, candidate))
    assert actual == expected
    assert any(expected), "nothing came from the cache"


@pytest.mark.parametrize("fields", [{}, USAGE], ids=str)
def test_cached_tokens_of_several_prompts_are_their_sum(reference: Api, candidate: Api, fields: dict):
    # vLLM (0.32) says for a list what one of its prompts had in the cache, the last, or in a stream the first that
    # answers, while the prompts' tokens are those of all. Ours says the sum of what vLLM says of each alone.
    first = 920 + len(fields)
    prompts = [[first + 10 * index, *range(300, 410 - 20 * index)] for index in range(3)]
    for sent in (prompts, prompts, prompts[1:], prompts[:1]):
        expected = sum(cached_tokens(reference.complete(prompt, **fields)) for prompt in sent)
        assert cached_tokens(candidate.complete(sent, **fields)) == expected
