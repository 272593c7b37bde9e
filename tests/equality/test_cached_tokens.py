"""Tokens that come from the prefix cache are counted as vLLM counts them."""

from __future__ import annotations

import pytest

from support.api import Answer

pytestmark = pytest.mark.engine

# Four blocks of 32 tokens that no other test sends.
PREFIX = [900, *range(100, 227)]


def cached_tokens(answer: Answer) -> int:
    assert answer.status == 200, answer.text
    return (answer.json["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0


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
