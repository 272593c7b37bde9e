"""The requests of the equality suite: the same list in every run.

A case is a path and a body. Some bodies need to know what the model says without
them, a stop string that really occurs for instance: those are functions of a `Plain`,
which asks the reference server. Cases are grouped by what they try.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from support.api import Api
from support.compare import first_difference

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"

PROMPTS = [
    "Hello",
    "The quick brown fox jumps over",
    "Once upon a time, in a city near a frozen river,",
    "def fibonacci(n):\n    ",
    "naïve café, straße, señor: déjà vu",
    "你好，世界！机器学习",
    "こんにちは、東京の天気は",
    "Привет, мир! Ελληνικά: καλημέρα",
    "🙂 🚀 🎉 and 👩‍🔬 with 👍🏽 under 🇩🇪",
    "  leading and trailing spaces  ",
    "tabs\tand\nnew\n\nlines\r\n",
    '{"name": "value", "list": [1, 2, 3]}',
    "<|im_start|>user\nspecial tokens in the text<|im_end|>\n",
    "UPPER lower MiXeD 0123456789 3.14159",
    "a",
    "e\u0301 is not \u00e9, and \ufffd is itself",
    "the world of water and money " * 12,
    "work, day by day; night by night. " * 30,
]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["router", "worker", "cache"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "ready": {"type": "boolean"},
    },
    "required": ["name", "kind", "count", "ready"],
    "additionalProperties": False,
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Berlin", "東京", "Zürich"]},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}

CLOCK = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}

# Tab, line feed, carriage return and space of the tiny model: where JSON allows white
# space between its tokens, a random model would write nothing else.
NO_SPACE = {"204": -100, "205": -100, "208": -100, "227": -100}

Body = dict


def strict(tool: dict) -> dict:
    """A tool whose arguments are held to their schema."""
    return {"type": "function", "function": tool["function"] | {"strict": True}}


def named(tool: dict) -> dict:
    """The choice of one tool."""
    return {"type": "function", "function": {"name": tool["function"]["name"]}}


def no_parameters() -> dict:
    """A tool that says nothing of its arguments."""
    return {"type": "function", "function": {"name": "ping"}}


@dataclass
class Plain:
    """The reference's answer to a body before the case's own fields are added."""

    text: str
    tokens: list[int]


@dataclass
class Case:
    name: str
    path: str
    body: Body | Callable[[Callable[[str, Body], Plain]], Body]

    @property
    def is_refused(self) -> bool:
        """Whether both servers must refuse it."""
        return self.name.startswith("refused")

    def resolve(self, ask: Callable[[str, Body], Plain]) -> Body:
        return self.body(ask) if callable(self.body) else self.body


def completion(prompt: object, **fields) -> Body:
    return {"prompt": prompt, "temperature": 0, "max_tokens": 24} | fields


def chat(content: object, **fields) -> Body:
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    return {"messages": messages, "temperature": 0, "max_tokens": 24} | fields


def derived(path: str, body: Body, fields: Callable[[Plain], Body]):
    """A body whose further fields depend on the plain answer."""
    return lambda ask: body | fields(ask(path, body))


def plain_text() -> Iterator:
    for index, prompt in enumerate(PROMPTS):
        yield TEXT, completion(prompt, max_tokens=(1, 5, 24, 60)[index % 4])
        yield CHAT, chat(prompt, max_tokens=(60, 24, 2, 1)[index % 4])
    yield TEXT, completion("Hello", max_tokens=None)
    yield CHAT, {"messages": [{"role": "user", "content": "no limits"}], "temperature": 0}
    yield CHAT, chat("new name", max_tokens=None, max_completion_tokens=9)
    yield CHAT, chat("both names", max_tokens=4, max_completion_tokens=7)


def token_prompts() -> Iterator:
    rng = random.Random(1)
    for length in (1, 2, 31, 32, 33, 64, 200):
        yield TEXT, completion([rng.randrange(7, 1000) for _ in range(length)])
    yield TEXT, completion([[10, 20, 30], [40, 50, 60, 70], [80]])
    yield TEXT, completion(PROMPTS[:4], max_tokens=10)
    yield TEXT, completion(["one prompt in a list"])
    yield TEXT, completion([7] * 2040, max_tokens=20)
    yield TEXT, completion([[300, 301], [302, 303]], n=2, temperature=0.8, seed=4)
    yield TEXT, completion(PROMPTS[8], add_special_tokens=False)
    yield TEXT, completion(PROMPTS[16], truncate_prompt_tokens=10)
    yield CHAT, chat(PROMPTS[16], truncate_prompt_tokens=12)


def stop_strings() -> Iterator:
    def cut(start: int, end: int) -> Callable[[Plain], Body]:
        # Character positions cross token boundaries at will.
        return lambda plain: {"stop": plain.text[start:end] or "never"}

    for index, (start, end) in enumerate([(3, 5), (4, 9), (0, 1), (7, 8), (5, 12), (10, 14), (1, 3), (12, 13)]):
        prompt = PROMPTS[index]
        yield TEXT, derived(TEXT, completion(prompt, ignore_eos=True), cut(start, end))
        yield CHAT, derived(CHAT, chat(prompt, ignore_eos=True), cut(start, end))
    base = completion(PROMPTS[2], ignore_eos=True)
    yield TEXT, derived(TEXT, base, lambda p: {"stop": ["never", p.text[8:11], p.text[4:6]]})
    yield TEXT, derived(TEXT, base, lambda p: {"stop": p.text[5:9], "include_stop_str_in_output": True})
    yield TEXT, derived(TEXT, base, lambda p: {"stop": p.text[5:9], "min_tokens": 12})
    yield TEXT, derived(TEXT, base, lambda p: {"stop": p.text[5:9], "logprobs": 2})
    yield TEXT, derived(TEXT, base, lambda p: {"stop": p.text[2:4], "echo": True})
    base = chat(PROMPTS[5], ignore_eos=True)
    yield CHAT, derived(CHAT, base, lambda p: {"stop": p.text[6:8], "include_stop_str_in_output": True})
    yield CHAT, derived(CHAT, base, lambda p: {"stop": [p.text[6:8] + "no", p.text[9:11]]})
    yield CHAT, derived(CHAT, base, lambda p: {"stop": p.text[6:8], "n": 2, "temperature": 1.0, "seed": 6})
    yield CHAT, chat("nothing to stop at", stop=[])
    yield CHAT, chat("a stop that never comes", stop="\u2603\u2603", max_tokens=12)


def stop_tokens() -> Iterator:
    for index in (2, 6, 9):
        body = completion(PROMPTS[index], ignore_eos=True)
        yield TEXT, derived(TEXT, body, lambda p: {"stop_token_ids": [p.tokens[5]]})
        yield TEXT, derived(TEXT, body, lambda p: {
            "stop_token_ids": [p.tokens[7], p.tokens[3]], "include_stop_str_in_output": True})
        body = chat(PROMPTS[index], ignore_eos=True)
        yield CHAT, derived(CHAT, body, lambda p: {"stop_token_ids": [p.tokens[4]]})
    yield TEXT, completion("ends by itself", logit_bias={"2": 100})
    yield CHAT, chat("ends by itself", logit_bias={"2": 100})
    yield CHAT, chat("ends by the other end token", logit_bias={"0": 100})
    yield CHAT, chat("not at the end token", logit_bias={"2": 100}, ignore_eos=True, max_tokens=5)
    yield CHAT, chat("not before", logit_bias={"2": 100}, min_tokens=6)
    for least in (1, 10, 24):
        yield TEXT, completion(PROMPTS[3], min_tokens=least)
        yield CHAT, chat(PROMPTS[1], min_tokens=least, max_tokens=40)


def logprobs() -> Iterator:
    for index, count in enumerate((0, 1, 3, 5, 20)):
        yield TEXT, completion(PROMPTS[index + 3], logprobs=count, max_tokens=10)
        yield CHAT, chat(PROMPTS[index + 4], logprobs=True, top_logprobs=count, max_tokens=10)
    yield CHAT, chat("no alternatives", logprobs=True)
    yield CHAT, chat("as ids", logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True)
    yield CHAT, chat("thoughts hidden, where none are told apart", logprobs=True, include_reasoning=False)
    yield TEXT, completion("as ids", logprobs=2, return_tokens_as_token_ids=True)
    yield TEXT, completion("with temperature", logprobs=2, temperature=0.9, seed=3)
    yield CHAT, chat("two choices", logprobs=True, top_logprobs=1, n=2, max_tokens=6, temperature=1.0, seed=9)


def prompt_logprobs() -> Iterator:
    for count in (0, 1, 3):
        yield TEXT, completion(PROMPTS[count + 4], prompt_logprobs=count, max_tokens=4)
        yield CHAT, chat(PROMPTS[count + 4], prompt_logprobs=count, max_tokens=4)


def several_choices() -> Iterator:
    for count, seed in ((2, 1), (3, 2), (4, 3)):
        yield TEXT, completion(PROMPTS[count], n=count, seed=seed, temperature=1.0)
        yield CHAT, chat(PROMPTS[count + 4], n=count, seed=seed, temperature=0.8)


def sampling() -> Iterator:
    settings = [
        {"temperature": 1.0}, {"temperature": 0.5, "top_p": 0.9}, {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "min_p": 0.05}, {"temperature": 0.9, "top_p": 0.5, "top_k": 50, "min_p": 0.01},
        {"temperature": 1.0, "presence_penalty": 1.5}, {"temperature": 0.001}, {"temperature": 2.0},
        {"temperature": 1.0, "top_k": -1}, {"temperature": 1.0, "top_k": 0},
    ]
    for seed, fields in enumerate(settings):
        path, make = ((TEXT, completion), (CHAT, chat))[seed % 2]
        yield path, make(PROMPTS[seed], seed=seed, **fields)
    # The model's own defaults (temperature 0.7, top_k 20, top_p 0.8).
    for seed in (11, 12):
        yield TEXT, {"prompt": "defaults", "seed": seed, "max_tokens": 20}
        yield CHAT, {"messages": [{"role": "user", "content": "defaults"}], "seed": seed, "max_tokens": 20}


def penalties() -> Iterator:
    for fields in (
        {"presence_penalty": 2.0}, {"presence_penalty": -2.0}, {"frequency_penalty": 1.7},
        {"frequency_penalty": -1.0}, {"repetition_penalty": 1.4}, {"repetition_penalty": 0.8},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    ):
        yield TEXT, completion(PROMPTS[16], ignore_eos=True, **fields)
        yield CHAT, chat(PROMPTS[1], ignore_eos=True, **fields)


def token_choice() -> Iterator:
    base = completion(PROMPTS[1], ignore_eos=True)
    yield TEXT, derived(TEXT, base, lambda p: {"logit_bias": {str(p.tokens[0]): -100, str(p.tokens[3]): 5}})
    yield TEXT, derived(TEXT, base, lambda p: {"allowed_token_ids": sorted(set(p.tokens[:6]))})
    yield TEXT, completion("only these", allowed_token_ids=[300, 400, 500, 600])
    yield TEXT, completion("very likely", logit_bias={"500": 100, "501": 99.5}, max_tokens=4)
    base = chat(PROMPTS[0], ignore_eos=True)
    yield CHAT, derived(CHAT, base, lambda p: {"logit_bias": {str(t): -50 for t in p.tokens[:4]}})
    yield CHAT, derived(CHAT, base, lambda p: {"allowed_token_ids": sorted(set(p.tokens[2:9]))})
    for word in (" book", "th", " frozen", " river city", "é"):
        yield CHAT, chat(PROMPTS[0], bad_words=[word], ignore_eos=True)
    base = completion(PROMPTS[2], ignore_eos=True)
    yield TEXT, derived(TEXT, base, lambda p: {"bad_words": [p.text[:6], p.text[9:11]]})


def special_tokens() -> Iterator:
    # Ids 1 and 2 are <|im_start|> and <|im_end|>; 1000 and up are the visible markers.
    for shown in (True, False):
        for path, make in ((TEXT, completion), (CHAT, chat)):
            yield path, make("markers", logit_bias={"1": 8, "3": 8}, ignore_eos=True, skip_special_tokens=shown)
    yield CHAT, chat("the end shown", skip_special_tokens=False, logit_bias={"2": 6})
    yield TEXT, completion("joined", spaces_between_special_tokens=False, logit_bias={"1": 8})
    yield TEXT, completion("as ids", allowed_token_ids=[1000, 1001, 1004, 1005])


def echo() -> Iterator:
    for index in (0, 4, 8):
        yield TEXT, completion(PROMPTS[index], echo=True)
    yield TEXT, completion(PROMPTS[7], echo=True, logprobs=2, max_tokens=5)
    yield TEXT, completion([11, 12, 13, 400], echo=True)
    yield TEXT, completion(PROMPTS[1], echo=True, max_tokens=0)
    yield TEXT, completion(PROMPTS[1], echo=True, n=2, temperature=0.7, seed=8)


def structured() -> Iterator:
    constraints = [
        {"choice": ["positive", "negative", "neutral"]},
        {"choice": ["機械", "学習", "🚀"]},
        {"regex": r"[a-z]{3,8}@[a-z]{2,5}\.(com|org)"},
        {"regex": r"\d{4}-\d{2}-\d{2}"},
        {"json": SCHEMA},
        {"json": SCHEMA, "disable_additional_properties": True},
        {"grammar": 'root ::= "SELECT " column " FROM " table\ncolumn ::= "name" | "count"\ntable ::= "routers" | "workers"'},
    ]
    for constraint in constraints:
        yield TEXT, completion("A constrained answer:", structured_outputs=constraint, max_tokens=80)
        yield CHAT, chat("A constrained answer, please", structured_outputs=constraint, max_tokens=80)
    schema = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    for prompt in (PROMPTS[0], PROMPTS[5], PROMPTS[11]):
        yield CHAT, chat(prompt, response_format=schema, max_tokens=80)
    yield TEXT, completion("As JSON:", response_format=schema, max_tokens=80)
    yield CHAT, chat("any object", response_format={"type": "json_object"}, max_tokens=30)
    yield CHAT, chat("plain", response_format={"type": "text"})
    yield CHAT, chat("two objects", response_format=schema, n=2, seed=5, temperature=1.0, max_tokens=80)
    yield CHAT, chat("cut off", response_format=schema, max_tokens=5)
    yield CHAT, chat("with logprobs", structured_outputs={"choice": ["left", "right"]}, logprobs=True, top_logprobs=2)


def token_ids() -> Iterator:
    for index in (3, 8):
        yield TEXT, completion(PROMPTS[index], return_token_ids=True)
        yield CHAT, chat(PROMPTS[index], return_token_ids=True)
    yield TEXT, completion([5, 6, 7, 300], return_token_ids=True, n=2, temperature=1.0, seed=1)


def conversations() -> Iterator:
    system = {"role": "system", "content": "You answer in short sentences."}
    turns = [
        {"role": "user", "content": "What is a block?"},
        {"role": "assistant", "content": "A part of the cache."},
        {"role": "user", "content": "And a prefix?"},
    ]
    yield CHAT, chat([system, *turns])
    yield CHAT, chat(turns)
    yield CHAT, chat([{"role": "developer", "content": "Be brief."}, turns[0]])
    yield CHAT, chat([{"role": "user", "content": [{"type": "text", "text": "first part, "}, {"type": "text", "text": "second part"}]}])
    yield CHAT, chat([{"role": "user", "name": "ann", "content": "with a name"}])
    yield CHAT, chat([{"role": "user", "content": ""}])
    yield CHAT, chat([*turns[:2]], continue_final_message=True, add_generation_prompt=False)
    yield CHAT, chat([turns[0], {"role": "assistant", "content": "A part of "}],
                     continue_final_message=True, add_generation_prompt=False, echo=True)
    yield CHAT, chat(turns, add_generation_prompt=False)
    yield CHAT, chat(turns, add_special_tokens=True)
    yield CHAT, chat(turns, chat_template_kwargs={"enable_thinking": False})
    yield CHAT, chat(turns, chat_template_kwargs={"enable_thinking": True})
    yield CHAT, chat(turns, echo=True)
    for prompt in PROMPTS[12:16]:
        yield CHAT, chat([system, {"role": "user", "content": prompt}])


def tools() -> Iterator:
    question = [{"role": "user", "content": "What is the weather in Zürich?"}]
    history = [
        *question,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call-1", "type": "function", "function": {
                "name": "get_weather", "arguments": '{"city": "Zürich", "unit": "celsius"}'}}]},
        {"role": "tool", "tool_call_id": "call-1", "content": "12 degrees, rain"},
    ]
    both = [WEATHER, CLOCK]
    yield CHAT, chat(question, tools=both)
    yield CHAT, chat(question, tools=both, tool_choice="auto")
    yield CHAT, chat(question, tools=both, tool_choice="none")
    yield CHAT, chat(history, tools=both)
    yield CHAT, chat(history)
    # A call in the form that the tool parser reads, spelled by a grammar.
    call = r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "(Berlin|Zürich)"\}\}\n</tool_call>'
    for regex in (call, "let me see " + call, call + r"\n" + call):
        yield CHAT, chat(question, tools=both, tool_choice="auto", structured_outputs={"regex": regex}, max_tokens=150)


def forced_tools() -> Iterator:
    """A call must come. Arguments are held to a schema for strict tools only; else the model may write any JSON."""
    question = [{"role": "user", "content": "What is the weather in Zürich?"}]
    # A random model calls again and again: where a call may be the last, the end token is what it likes best.
    ends = {"max_tokens": 100, "logit_bias": NO_SPACE | {"2": 100}}
    loose = [WEATHER, CLOCK]
    for tools in ([strict(tool) for tool in loose], loose, [WEATHER, strict(CLOCK)]):
        yield CHAT, chat(question, tools=tools, tool_choice="required", **ends)
        yield CHAT, chat(question, tools=tools[1:], tool_choice="required", **ends)
        yield CHAT, chat(question, tools=tools, tool_choice="required", parallel_tool_calls=False, **ends)
        for tool in tools:
            yield CHAT, chat(question, tools=tools, tool_choice=named(tool), **ends)
            yield CHAT, chat(question, tools=tools, tool_choice=named(tool), n=2, seed=3, **ends | {"temperature": 1.0})
    # Without the bias, calls follow each other until they are cut off, wherever that is.
    for tools in ([strict(tool) for tool in loose], loose):
        for most in (1, 4, 9, 17, 26, 40, 75):
            yield CHAT, chat(question, tools=tools, tool_choice="required", max_tokens=most)
            yield CHAT, chat(question, tools=tools, tool_choice=named(tools[most % 2]), max_tokens=most)
        yield CHAT, chat(question, tools=tools, tool_choice="required", max_tokens=60, n=3, seed=5, temperature=1.0)
        yield CHAT, chat(question, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=30)
    # Kinds of values that a random model comes to with other seeds.
    for seed in range(4):
        yield CHAT, chat(question, tools=loose, tool_choice="required", seed=seed, **ends | {"temperature": 1.5})
    yield CHAT, chat(question, tools=[no_parameters()], tool_choice="required", **ends)
    yield CHAT, chat(question, tools=[strict(no_parameters())], tool_choice=named(no_parameters()), **ends)
    yield CHAT, chat(question, tools=loose, tool_choice="required", stop=["get"], **ends)
    yield CHAT, chat(question, tools=loose, tool_choice="required", return_token_ids=True, logprobs=True, **ends)
    # The call wins over another constraint.
    yield CHAT, chat(question, tools=loose, tool_choice="required", structured_outputs={"regex": "[a-z]+"}, **ends)
    yield CHAT, chat(question, tools=loose, tool_choice=named(CLOCK), response_format={"type": "json_object"}, **ends)


def allowed_tools() -> Iterator:
    """A call may come, in a form that is held to if a tool is strict or only one call may come."""
    question = [{"role": "user", "content": "What is the weather in Zürich?"}]
    shaped = [strict(WEATHER), CLOCK]
    # The token <tool_call> comes often, so that there are calls.
    calls = {"logit_bias": NO_SPACE | {"1000": 6}, "max_tokens": 60}
    for most in (1, 3, 8, 15, 24, 60):
        yield CHAT, chat(question, tools=shaped, **calls | {"max_tokens": most})
    for prompt in PROMPTS[:2]:
        yield CHAT, chat(prompt, tools=shaped, **calls)
        yield CHAT, chat(prompt, tools=[WEATHER, CLOCK], **calls)
        yield CHAT, chat(prompt, tools=[WEATHER, CLOCK], parallel_tool_calls=False, **calls)
        yield CHAT, chat(prompt, tools=shaped, parallel_tool_calls=False, **calls)
    # A strict tool and a constraint: a call, or what the constraint says.
    schema = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    constraints = [
        {"structured_outputs": {"regex": "[a-z]{3,9}"}},
        {"structured_outputs": {"choice": ["left", "right"]}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json_object": True}},
        {"structured_outputs": {"grammar": 'root ::= "SELECT " ("name" | "count")'}},
        {"response_format": schema},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "text"}},
    ]
    for constraint in constraints:
        for tools in ([strict(WEATHER), strict(CLOCK)], [WEATHER, CLOCK]):
            once = {"tools": tools, "parallel_tool_calls": False, "tool_choice": "auto"}
            yield CHAT, chat(question, **once, **constraint, **calls | {"max_tokens": 90})
        yield CHAT, chat(question, tools=shaped, **constraint, **calls | {"max_tokens": 90})
        without = calls | {"logit_bias": NO_SPACE, "max_tokens": 90}
        yield CHAT, chat(question, tools=[strict(WEATHER)], **constraint, **without)


# Answers of a model, well formed and not: spelled by a constraint with one choice.
ANSWERS = [
    '<tool_call>\n{"name": "get_time", "arguments": 7}\n</tool_call>',
    '<tool_call>\n{"name": "get_time", "arguments": -1.50e3}\n</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": [1.0, 1e22, 0.1, 1E-7, -0, -0.0, 123456789012345678901234567890]}</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": null}</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": "7"}</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": {"a":1,"a":2, "b" : {"c":[ ]}}}</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": {"text": "\\u00fc \\n \\/ \\" \\ud83d\\ude00 \u007f <b>"}}</tool_call>',
    '<tool_call>{"arguments": {"zone": 1}, "name": "get_time"}</tool_call>',
    '<tool_call>{"name": "get_time"}</tool_call>',
    '<tool_call>{"name": "no_such_tool", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": {"zone": 1}</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": {"zone": 1}}}</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": {"zone": 1}',
    '<tool_call>{"name": "get_time", "arguments": {"zone": 1}}',
    '<tool_call>{"name": "get_time", "arguments": {"zone": 1}} ',
    '<tool_call>not JSON</tool_call>',
    '<tool_call></tool_call>',
    '<tool_call>',
    'before <tool_call>{"name": "get_time", "arguments": {"zone": 1}}</tool_call> after',
    ' \n<tool_call>{"name": "get_time", "arguments": {"zone": 1}}</tool_call>\n<tool_call>\n{"name": "get_time", "arguments": {"zone": 2}}\n</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": {"zone": 1}}</tool_call><tool_call>{"name": "get_w',
    'no call < at <tool all</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": {"text": "</tool_call>"}}</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": {"name": "inner", "arguments": {"x": 1}}}</tool_call>',
]


def spelled_tools() -> Iterator:
    """What a parser makes of an answer, whole and cut off."""
    for index, answer in enumerate(ANSWERS):
        spelled = {"tools": [WEATHER, CLOCK], "structured_outputs": {"choice": [answer]}}
        yield CHAT, chat("spell", **spelled, max_tokens=200)
        yield CHAT, chat("spell", **spelled, max_tokens=8 + 3 * (index % 8))
        yield CHAT, chat("spell", **spelled, max_tokens=30 + 2 * (index % 8))
    yield CHAT, chat("spell", tools=[CLOCK], tool_choice="none", structured_outputs={"choice": [ANSWERS[0]]}, max_tokens=200)
    yield CHAT, chat("spell", structured_outputs={"choice": [ANSWERS[0]]}, max_tokens=200)


def passing() -> Iterator:
    """Fields that must be accepted without changing the answer."""
    for fields in (
        {"user": "someone"}, {"cache_salt": "salt-1"}, {"priority": 0}, {"priority": 5}, {"seed": 7},
        {"request_id": "mine"}, {"model": "tiny"}, {"n": 1}, {"logit_bias": {}},
    ):
        yield CHAT, chat("passing fields", **fields)
        yield TEXT, completion("passing fields", **fields)
    yield CHAT, chat("an unknown field", no_such_field=1)


def refused() -> Iterator:
    """Both servers must refuse these, with the same status."""
    for fields in (
        {"temperature": -1}, {"temperature": "hot"}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -5},
        {"min_p": 2}, {"presence_penalty": 3}, {"frequency_penalty": -3}, {"repetition_penalty": 0},
        {"max_tokens": -1}, {"max_tokens": 100_000}, {"min_tokens": 50}, {"n": 0}, {"n": "two"},
        {"logit_bias": {"5000": 1}}, {"allowed_token_ids": [5000]}, {"allowed_token_ids": []},
        {"structured_outputs": {"regex": "[a-"}}, {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}}, {"stop": 5}, {"seed": "x"},
        {"model": "no-such-model"}, {"stream_options": {"include_usage": True}}, {"prompt_logprobs": -3},
        {"cache_salt": ""}, {"n": 2}, {"stream": True, "prompt_logprobs": 1},
    ):
        yield TEXT, completion("refused", **fields)
        yield CHAT, chat("refused", **fields)
    yield TEXT, completion("refused", logprobs=21)
    yield TEXT, completion([5000])
    yield TEXT, completion([-1])
    yield TEXT, completion([])
    yield TEXT, completion("")
    yield TEXT, completion([[]])
    yield TEXT, completion([7] * 2048)
    yield TEXT, {"temperature": 0}
    yield CHAT, {"messages": []}
    yield CHAT, {"messages": "hello"}
    yield CHAT, {}
    yield CHAT, chat([{"content": "no role"}])
    yield CHAT, chat("too many", logprobs=True, top_logprobs=21)
    yield CHAT, chat("not asked for", top_logprobs=2)
    yield CHAT, chat("no such tool", tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "none"}})
    yield CHAT, chat("no tools", tool_choice="required")
    # A form of calls cannot hold for what xgrammar lacks, which is refused with a strict tool as without.
    for tool in (WEATHER, strict(WEATHER)):
        lacking = {"type": "string", "pattern": "^[a-c]{2}$", "maxLength": 2}
        yield CHAT, chat("not in xgrammar", tools=[tool], structured_outputs={"json": lacking})
    yield CHAT, chat("both", continue_final_message=True, add_generation_prompt=True)


# Families that are also asked for as a stream, each with the share that is.
FAMILIES = [
    (plain_text, 2), (token_prompts, 2), (stop_strings, 1), (stop_tokens, 2), (logprobs, 1), (prompt_logprobs, 0),
    (several_choices, 2), (sampling, 3), (penalties, 4), (token_choice, 3), (special_tokens, 1), (echo, 1),
    (structured, 2), (token_ids, 1), (conversations, 3), (tools, 1),
    (forced_tools, 1), (allowed_tools, 1), (spelled_tools, 1), (passing, 0), (refused, 0),
]

STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def all_cases() -> list[Case]:
    cases = []
    for family, share in FAMILIES:
        name = family.__name__
        streamed = itertools.count()
        for index, (path, body) in enumerate(family()):
            kind = "chat" if path == CHAT else "text"
            cases.append(Case(f"{name}-{index}-{kind}", path, body))
            if share and next(streamed) % share == 0:
                cases.append(Case(f"{name}-{index}-{kind}-stream", path, streaming(body)))
    return cases


def streaming(body: Body | Callable) -> Body | Callable:
    if callable(body):
        return lambda ask: body(ask) | STREAM
    return body | STREAM


def assert_equal_answers(case: Case, body: Body, reference: Api, candidate: Api) -> None:
    """Sends a body to both servers, one after the other; fails with the first difference."""
    expected = reference.post(case.path, body)
    actual = candidate.post(case.path, body)
    difference = first_difference(expected, actual)
    if difference is None and case.is_refused != (expected.status != 200):
        difference = f"the case expects a refusal: {case.is_refused}, got {expected.status} {expected.text[:400]}"
    if difference is not None:
        request = json.dumps(body, ensure_ascii=False)
        pytest.fail(f"{difference}\nrequest: POST {case.path} {request[:1000]}", pytrace=False)
