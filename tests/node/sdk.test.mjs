// The OpenAI Node SDK as a client. Run by tests/sdk/test_node_sdk.py, which sets STATOR_URL.

import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.STATOR_URL}/v1`, apiKey: "unused", maxRetries: 0 });

const messages = [{ role: "user", content: "Hello" }];
// White space of the tiny model, which would write nothing else between JSON tokens.
const noSpace = { 204: -100, 205: -100, 208: -100, 227: -100 };
const greedy = { model: "tiny", temperature: 0, max_tokens: 16 };

const weather = {
  type: "function",
  function: {
    name: "get_weather",
    strict: true,
    parameters: {
      type: "object",
      properties: { city: { enum: ["Berlin", "東京"] } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};

const verdict = {
  type: "json_schema",
  json_schema: {
    name: "verdict",
    strict: true,
    schema: {
      type: "object",
      properties: { verdict: { enum: ["yes", "no"] } },
      required: ["verdict"],
      additionalProperties: false,
    },
  },
};

test("models are listed", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.deepEqual(ids, ["tiny"]);
});

test("chat answers", async () => {
  const answer = await client.chat.completions.create({ messages, ...greedy });
  assert.equal(answer.choices[0].message.role, "assistant");
  assert.ok(answer.choices[0].message.content.length > 0);
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
});

test("a stream adds up to the answer", async () => {
  const answer = await client.chat.completions.create({ messages, ...greedy });
  const stream = await client.chat.completions.create({
    messages, stream: true, stream_options: { include_usage: true }, ...greedy,
  });
  let text = "";
  let usage;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, answer.choices[0].message.content);
  assert.equal(usage.completion_tokens, answer.usage.completion_tokens);
});

test("the stream helper follows a stream", async () => {
  const runner = client.chat.completions.stream({ messages, ...greedy });
  let text = "";
  runner.on("content", (delta) => (text += delta));
  assert.equal(await runner.finalContent(), text);
});

test("completions answer", async () => {
  const answer = await client.completions.create({ prompt: "Hello", ...greedy });
  assert.equal(answer.object, "text_completion");
});

test("a json schema shapes the answer", async () => {
  const answer = await client.chat.completions.parse({ messages, response_format: verdict, ...greedy, max_tokens: 60 });
  assert.ok(["yes", "no"].includes(JSON.parse(answer.choices[0].message.content).verdict));
});

test("a tool is called", async () => {
  const answer = await client.chat.completions.create({
    messages, tools: [weather], tool_choice: { type: "function", function: { name: "get_weather" } }, ...greedy, max_tokens: 100, logit_bias: noSpace,
  });
  const [call] = answer.choices[0].message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["city"]);
});

test("a streamed tool call adds up", async () => {
  const runner = client.chat.completions.stream({
    messages, tools: [weather], tool_choice: { type: "function", function: { name: "get_weather" } }, ...greedy, max_tokens: 100, logit_bias: noSpace,
  });
  const answer = await runner.finalChatCompletion();
  const [call] = answer.choices[0].message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["city"]);
});

test("refusals have their own classes", async () => {
  await assert.rejects(client.chat.completions.create({ messages, ...greedy, model: "other" }), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ messages, ...greedy, top_p: 7 }), OpenAI.BadRequestError);
  await assert.rejects(client.embeddings.create({ model: "tiny", input: "Hello" }), OpenAI.NotFoundError);
});

test("a stream can be left", async () => {
  const stream = await client.chat.completions.create({
    messages, stream: true, ...greedy, max_tokens: 1500, ignore_eos: true,
  });
  let chunks = 0;
  for await (const _ of stream) if (++chunks === 3) break;
  assert.equal(chunks, 3);
});
