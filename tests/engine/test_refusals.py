"""Nothing that a client sends costs an engine its life.

Each request here would have killed or deafened a vLLM engine, or is close to one that
does: it is refused with a 4xx that names the field, and the engine answers on.
"""

from __future__ import annotations

import concurrent.futures
import json

import pytest

pytestmark = pytest.mark.engine

VOCABULARY = 1024
MAX_MODEL_LEN = 2048


@pytest.fixture(scope="module")
def plain_answer(candidate) -> str:
    return answer_text(candidate.complete())


@pytest.fixture(autouse=True)
def engine_answers_afterwards(candidate, plain_answer):
    yield
    assert answer_text(candidate.complete()) == plain_answer


def answer_text(answer) -> str:
    assert answer.status == 200, answer.text
    return answer.json["choices"][0]["text"]


def assert_refused(answer, field: str, status: int = 400) -> None:
    assert answer.status == status, answer.text[:1000]
    error = answer.error
    assert error["type"] and error["code"] == status, error
    assert field in (error.get("param") or "") or field in error["message"], error


@pytest.mark.parametrize("prompt", [
    [VOCABULARY], [5, 6, VOCABULARY + 1], [2**31], [2**32], [2**63], [-1], [1.5],
    [], "", [[]], [[5], []], [""], None, {}, 7, [None], [[5], "text"], [[[5]]],
], ids=repr)
def test_a_prompt_outside_the_vocabulary_or_of_no_kind(candidate, prompt):
    assert_refused(candidate.complete(prompt), "prompt")


@pytest.mark.parametrize("length", [MAX_MODEL_LEN, MAX_MODEL_LEN + 1, 100_000])
def test_a_prompt_that_leaves_no_room(candidate, length):
    answer = candidate.complete([7] * length)
    assert_refused(answer, str(MAX_MODEL_LEN))


def test_a_text_that_leaves_no_room(candidate):
    assert_refused(candidate.complete("word " * 20_000), str(MAX_MODEL_LEN))
    assert_refused(candidate.chat("word " * 20_000), str(MAX_MODEL_LEN))


def test_the_longest_prompt_is_served(candidate):
    answer = candidate.complete([7] * (MAX_MODEL_LEN - 1), max_tokens=1)
    assert answer.status == 200, answer.text
    assert answer.json["usage"]["completion_tokens"] == 1


BAD_SAMPLING = {
    "temperature": [-0.1, 1e300, "hot", []],
    "top_p": [0, -1, 1.01, "x"],
    "top_k": [-2, 1.5, "x"],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1, "x"],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1],
    "max_tokens": [-1, "many", 1.5, 2**64],
    "min_tokens": [-1, 9, "x"],
    "n": [0, -1, 2**40, "x"],
    "seed": ["x", 2**70],
    "stop": [7, [7], {"a": 1}, [""]],
    "stop_token_ids": [[VOCABULARY], [-1], ["x"], "x", [2**40]],
    "logit_bias": [{str(VOCABULARY): 1}, {"-1": 1}, {"x": 1}, {"5": "x"}, [5]],
    "allowed_token_ids": [[], [VOCABULARY], [-1], ["x"]],
    "bad_words": [[""], [7], 7],
    "logprobs": [21, -2, "x"],
    "prompt_logprobs": [21, -2, "x"],
    "stream": ["x", 1.5],
    "echo": ["x"],
    "cache_salt": ["", 7],
    "priority": ["x", 2**70],
}


@pytest.mark.parametrize(("field", "value"), [
    pytest.param(field, value, id=f"{field}={value!r}") for field, values in BAD_SAMPLING.items() for value in values
])
def test_a_value_out_of_range(candidate, field, value):
    assert_refused(candidate.complete(**{field: value}), field)


@pytest.mark.parametrize("constraint", [
    {}, {"regex": "[a-"}, {"regex": "(", "choice": ["a"]}, {"choice": []}, {"grammar": "root ::= "},
    {"grammar": "not a grammar {"}, {"json": "{"}, {"json": {"type": "no-such-type"}}, {"json": 7}, {"regex": 7},
    {"json": {"$ref": "#/nowhere"}}, {"no_such_kind": 1}, "regex",
], ids=json.dumps)
def test_a_constraint_that_no_grammar_can_be_made_of(candidate, constraint):
    answer = candidate.complete(structured_outputs=constraint)
    assert_refused(answer, "structured_outputs")


@pytest.mark.parametrize("response_format", [
    {"type": "json_schema"}, {"type": "xml"}, {}, "json", {"type": "json_schema", "json_schema": {"schema": 7}},
], ids=json.dumps)
def test_a_response_format_of_no_kind(candidate, response_format):
    assert_refused(candidate.chat(response_format=response_format), "response_format")


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b'"text"', b"null", b"{'single': 1}", b'{"prompt": "\xff"}', b"[" * 100_000,
    b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x"} trailing',
], ids=lambda body: repr(body[:40]))
def test_a_body_that_is_no_request(candidate, body):
    answer = candidate.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status == 400, answer.text[:500]
    assert answer.error["message"]


@pytest.mark.parametrize("messages", [
    None, [], "text", [{}], [{"role": 7, "content": "x"}], [{"role": "user", "content": 7}],
    [{"role": "user", "content": [{"type": "no-such-part"}]}], [7],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
], ids=json.dumps)
def test_messages_of_no_kind(candidate, messages):
    assert_refused(candidate.chat(messages=messages), "messages")


def test_a_template_that_fails_is_the_clients_fault(topology):
    processor = topology.add_processor("--trust-request-chat-template").wait_ready()
    try:
        assert processor.api.chat(chat_template="{{ messages[0].content }}").status == 200
        for template in ("{% for %}", "{{ nothing.at.all }}", "{% for a in range(10**9) %}{{ a }}{% endfor %}"):
            answer = processor.api.chat(chat_template=template)
            assert answer.status == 400, answer.text[:500]
            assert "not accepted" not in answer.error["message"]
    finally:
        processor.stop()


def test_equal_request_ids_do_not_meet(candidate):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        ask = lambda _: candidate.complete(request_id="the-same", max_tokens=60)  # noqa: E731
        answers = list(pool.map(ask, range(4)))
    assert [answer.status for answer in answers] == [200] * 4


def test_other_paths_and_methods(candidate):
    assert candidate.get("/v1/nothing").status == 404
    assert candidate.get("/v1/chat/completions").status == 405
    assert candidate.post("/v1/embeddings", {"model": "tiny", "input": "x"}).status == 404
