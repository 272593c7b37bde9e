"""The OpenAI Python SDK as a client: it parses every answer with its own types."""

from __future__ import annotations

import asyncio
import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from equality.cases import NO_SPACE, SCHEMA, WEATHER, strict

pytestmark = pytest.mark.engine

HELLO = [{"role": "user", "content": "Hello"}]

TOOL = {
    "tools": [strict(WEATHER)],
    "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    "max_tokens": 120,
    "logit_bias": NO_SPACE,
}

# An answer that ends by itself.
SHORT = {"extra_body": {"structured_outputs": {"choice": ["a short answer, and no other"]}}}


@pytest.fixture(scope="module")
def client(candidate):
    with openai.OpenAI(base_url=f"{candidate.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def greedy(**fields) -> dict:
    return {"model": "tiny", "temperature": 0, "max_tokens": 16} | fields


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_chat_answers(client):
    answer = client.chat.completions.create(messages=HELLO, **greedy())
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens + answer.usage.prompt_tokens == answer.usage.total_tokens


def test_a_chat_stream_adds_up_to_the_answer(client):
    answer = client.chat.completions.create(messages=HELLO, **greedy())
    text, finish, usage = "", None, None
    stream = client.chat.completions.create(
        messages=HELLO, stream=True, stream_options={"include_usage": True}, **greedy()
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert text == answer.choices[0].message.content
    assert finish == answer.choices[0].finish_reason
    assert usage.completion_tokens == answer.usage.completion_tokens


def test_the_stream_helper_follows_a_stream(client):
    with client.chat.completions.stream(messages=HELLO, **greedy(max_tokens=60), **SHORT) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert final.choices[0].message.content == deltas == "a short answer, and no other"


def test_completions_answer_and_stream(client):
    answer = client.completions.create(prompt="Hello", **greedy())
    stream = client.completions.create(prompt="Hello", stream=True, **greedy())
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_several_prompts_and_choices_keep_their_order(client):
    answer = client.completions.create(prompt=["one", "two"], n=2, seed=1, **greedy(temperature=1.0))
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_logprobs_name_the_tokens_of_the_text(client):
    answer = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, **greedy())
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    # The likeliest of the alternatives is the greedy choice itself.
    assert all(token.top_logprobs[0].token == token.token for token in content)


def test_a_json_schema_shapes_the_answer(client):
    answer = client.chat.completions.create(
        messages=HELLO,
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}},
        **greedy(max_tokens=120, logit_bias=NO_SPACE),
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"name", "kind", "count", "ready"}


def test_parse_returns_an_object_of_the_given_type(client):
    class Verdict(BaseModel):
        verdict: Literal["yes", "no"]
        certain: bool

    answer = client.chat.completions.parse(messages=HELLO, response_format=Verdict, **greedy(max_tokens=80))
    assert answer.choices[0].message.parsed.verdict in ("yes", "no")


def test_a_named_tool_is_called(client):
    answer = client.chat.completions.create(messages=HELLO, **greedy(**TOOL))
    (call,) = answer.choices[0].message.tool_calls
    assert call.id and call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city", "unit"}


def test_a_streamed_tool_call_adds_up(client):
    name, arguments, finish = "", "", None
    stream = client.chat.completions.create(messages=HELLO, stream=True, **greedy(**TOOL))
    for chunk in stream:
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or []:
                assert call.index == 0
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    assert name == "get_weather"
    assert set(json.loads(arguments)) == {"city", "unit"}
    # A call that was demanded by name ends as an answer does.
    assert finish in ("stop", "tool_calls")


def test_a_tool_result_can_be_sent_back(client):
    answer = client.chat.completions.create(messages=HELLO, **greedy(**TOOL))
    message = answer.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12 degrees"}
    messages = [*HELLO, message.to_dict(), result]
    assert client.chat.completions.create(messages=messages, tools=TOOL["tools"], **greedy())


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as refusal:
        client.chat.completions.create(messages=HELLO, **greedy(model="other"))
    assert "other" in refusal.value.body["message"]


def test_a_bad_value_is_a_bad_request_that_names_the_field(client):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(messages=HELLO, **greedy(temperature=-1))
    assert "temperature" in str(refusal.value.body)


def test_embeddings_are_not_found(client):
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="Hello")


def test_the_asynchronous_client_runs_requests_side_by_side(candidate):
    async def ask_many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{candidate.url}/v1", api_key="unused") as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(messages=HELLO, **greedy()) for _ in range(12))
            )
        return [answer.choices[0].message.content for answer in answers]

    assert len(set(asyncio.run(ask_many()))) == 1
