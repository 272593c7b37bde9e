"""What prefill and decode workers answer together equals what vLLM's own server answers alone.

Prompts of 20 to 1,500 tokens, each with other parameters. The decode worker's own numbers
say that it computed none of the prompts' tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from equality.cases import CHAT, SCHEMA, STREAM, TEXT, Body, Case, assert_equal_answers, chat, completion
from support.api import Api
from support.cluster import Topology

pytestmark = pytest.mark.engine

COUNT = 200
SHORTEST, LONGEST = 20, 1500

WORDS = ("river work water world money night day city bridge frozen nobody crosses machine learning router the of and "
         "in 世界 機械 学習 東京 天気 Привет мир naïve café straße 🚀 🎉 def return {} [1, 2] 3.14 <b> \n \t").split(" ")

OBJECT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}

# Parameters by what they try. Those of a stream are asked for as one every other time.
PLAIN: list[Body] = [
    {}, {"max_tokens": 1}, {"ignore_eos": True, "max_tokens": 60}, {"min_tokens": 12},
    {"logit_bias": {"2": 100}, "min_tokens": 5}, {"stop": ["a", "e"]}, {"stop": "on", "ignore_eos": True, "max_tokens": 60},
    {"stop": ["e"], "include_stop_str_in_output": True}, {"stop_token_ids": list(range(300, 500))},
    {"presence_penalty": 1.5, "ignore_eos": True}, {"frequency_penalty": -1.0, "repetition_penalty": 1.2},
    {"repetition_penalty": 1.4, "ignore_eos": True}, {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 3},
    {"n": 3, "temperature": 1.0, "seed": 11}, {"n": 2, "temperature": 0.9, "seed": 5, "stop": ["a"]},
    {"structured_outputs": {"choice": ["positive", "negative", "neutral"]}},
    {"structured_outputs": {"regex": r"\d{4}-\d{2}-\d{2}"}}, {"structured_outputs": {"json": SCHEMA}, "max_tokens": 80},
    {"response_format": OBJECT, "max_tokens": 80}, {"allowed_token_ids": [300, 400, 500, 600]},
    {"bad_words": ["th", " book"]}, {"return_token_ids": True}, {"cache_salt": "tenant"},
]
ONLY_TEXT: list[Body] = [
    {"logprobs": 3}, {"logprobs": 0, "max_tokens": 1}, {"logprobs": 2, "n": 2, "temperature": 1.0, "seed": 1},
    {"echo": True}, {"echo": True, "logprobs": 2, "max_tokens": 5}, {"echo": True, "logprobs": 1, "n": 2, "temperature": 0.9, "seed": 2},
]
ONLY_CHAT: list[Body] = [
    {"logprobs": True, "top_logprobs": 3}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2, "stop": ["a"]},
]
# Log-probabilities of the prompt do not go with a stream.
WHOLE: list[Body] = [{"prompt_logprobs": 2}, {"prompt_logprobs": 0, "max_tokens": 1}]


def cases(tokens_of: Callable[[str], int]) -> list[Case]:
    """`COUNT` requests, the same in every run. `tokens_of`: the tokens of one word with a space in front."""
    rng = random.Random(20)
    chosen = []
    for index in range(COUNT):
        path, make, own = ((TEXT, completion, ONLY_TEXT), (CHAT, chat, ONLY_CHAT))[index % 2]
        kinds = [(fields, True) for fields in PLAIN + own] + [(fields, False) for fields in WHOLE]
        fields, streams = kinds[index // 2 % len(kinds)]
        # Evenly over the orders of magnitude; the chat template adds some tokens.
        length = round(SHORTEST * (LONGEST / SHORTEST) ** rng.random())
        words = [f"case {index}"]
        while length > 0:
            words.append(rng.choice(WORDS))
            length -= tokens_of(words[-1])
        body = make(" ".join(words), **fields)
        if streams and rng.random() < 0.5:
            body |= STREAM
        chosen.append(Case(f"{index}-{'chat' if path == CHAT else 'text'}", path, body))
    return chosen


@pytest.fixture(scope="module")
def by_number(reference: Api) -> list[Case]:
    counts = {}
    for word in set(WORDS):
        answer = reference.post("/tokenize", {"model": "tiny", "prompt": f" {word}", "add_special_tokens": False})
        counts[word] = answer.json["count"]
    return cases(counts.__getitem__)


@pytest.mark.parametrize("number", range(COUNT))
def test_answer_equals_that_of_one_engine(number: int, by_number: list[Case], reference: Api, pd: Topology):
    case = by_number[number]
    assert_equal_answers(case, case.body, reference, pd.api)


def test_no_prompt_is_computed_twice(pd: Topology):
    (decode,) = pd.of_role("decode")
    (prefill,) = pd.of_role("prefill")

    def numbers() -> dict[str, float]:
        return {
            "prompts": decode.metric("stator_prompt_tokens_total"),
            "not computed": decode.metric("stator_cached_prompt_tokens_total"),
            "from its own cache": decode.metric("vllm:prefix_cache_hits_total"),
            "computed again": decode.metric("stator_handoff_recomputed_tokens_total"),
            "computed by prefill": prefill.metric("stator_prompt_tokens_total"),
        }

    before = numbers()
    rng = random.Random(21)
    lengths = (20, 31, 32, 33, 64, 500, 1500)
    for length in lengths:
        answer = pd.api.complete([rng.randrange(7, 1000) for _ in range(length)])
        assert answer.json["usage"]["prompt_tokens"] == length
    total = sum(lengths)
    pd.wait_idle()
    growth = {name: after - before[name] for name, after in numbers().items()}
    assert growth == {
        "prompts": total, "not computed": total, "from its own cache": 0, "computed again": 0, "computed by prefill": total,
    }
    # Nor was one in the tests before.
    assert decode.metric("stator_handoff_recomputed_tokens_total") == 0
    assert decode.metric('stator_legs_total{role="decode",leg="local"}') == 0


@pytest.mark.parametrize("fields", [{}, STREAM, {"n": 2, "seed": 1, "temperature": 1.0}], ids=str)
def test_cached_tokens_are_those_of_one_engine(fields: Body, reference: Api, pd: Topology):
    def conversation(server: Api) -> list[int]:
        turns = [{"role": "user", "content": f"cached {fields} " + "a bridge over a frozen river, " * 12}]
        counts = []
        for reply in ("Nobody.", "The river.", "At night."):
            answer = server.chat(messages=turns, **fields)
            usage = answer.events[-1]["usage"] if answer.is_stream else answer.json["usage"]
            counts.append((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            turns = [*turns, {"role": "assistant", "content": reply}, {"role": "user", "content": "Why? " * 30}]
        return counts

    expected = conversation(reference)
    assert conversation(pd.api) == expected
    assert any(expected), "nothing came from the cache"
