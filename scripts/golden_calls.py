#!/usr/bin/env python3
"""Writes crates/processor/tests/golden/constraints.json: how vLLM constrains answers to requests with tools.

Each row is a request, the name of the tool parser, and what vLLM's parser makes of the request: the constraint that
goes to the engine. Needs an environment with vLLM (`.venv` after the set-up):

    .venv/bin/python scripts/golden_calls.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import vllm
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.abstract_parser import DelegatingParser
from vllm.parser.mistral import MistralParser
from vllm.tool_parsers import ToolParserManager

GOLDEN = Path(__file__).resolve().parent.parent / "crates/processor/tests/golden/constraints.json"

# Those that Stator offers (`crates/text/src/tools`), without cohere, whose parser composes its own tag
# with a library of Cohere's, and without second names of the same parser.
PARSERS = [
    "deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4", "deepseek_v41", "gemma4", "glm45", "hermes", "hy_v4",
    "inkling", "kimi_k2", "kimi_k3", "llama3_json", "llama4_pythonic", "minimax_m2", "minimax_m3", "mistral", "pythonic",
    "qwen3_coder", "step3",
]


def tool(name: str, parameters: object = None, strict: bool | None = None) -> dict:
    function = {"name": name, "description": "It is described"}
    function |= {} if parameters is None else {"parameters": parameters}
    function |= {} if strict is None else {"strict": strict}
    return {"type": "function", "function": function}


def schema(properties: dict, *required: str, **others) -> dict:
    return {"type": "object", "properties": properties, "required": list(required)} | others


CITY = schema({"city": {"type": "string"}, "days": {"type": "integer", "default": 1}}, "city")
# Every kind of parameter that a builder tells from others.
KINDS = schema(
    {
        "text": {"type": "string"},
        "short": {"type": "string", "maxLength": 5, "minLength": 1},
        "level": {"enum": ["low", "high", 3, None, 1.5, "é"]},
        "side": {"type": "string", "enum": ["left", "right"]},
        "one": {"enum": ["alone"]},
        "fixed": {"type": "string", "const": "yes"},
        "either": {"type": ["string", "number"]},
        "numbers": {"type": ["integer", "null"]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/Item"}},
        "any": {"description": "whatever"},
        "both": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "a\"b&c": {"type": "boolean"},
    },
    "text", "missing", "level",
    **{"$defs": {"Item": {"type": "object"}}},
)
OPTIONAL = {"type": "object", "properties": {"q": {"type": "number"}}}
OPEN = {"type": "object", "properties": {"q": {"type": "string"}}, "additionalProperties": True}

TOOLS = {
    "loose": [tool("weather", CITY), tool("now")],
    "strict": [tool("weather", CITY, True), tool("now", {}, True), tool("never", None, True)],
    "mixed": [tool("weather", CITY), tool("now", OPTIONAL, True), tool("off", OPTIONAL, False)],
    "kinds": [tool("kinds", KINDS), tool("same", KINDS, True), tool("optional", OPTIONAL), tool("open", OPEN)],
    "strict_kinds": [tool("kinds", KINDS, True), tool("optional", OPTIONAL, True), tool("open", OPEN, True)],
}

# Parsers whose calls are not JSON and whose builders look into the schemas, and one more for comparison.
LOOKING_IN = ["glm45", "hermes", "hy_v4", "kimi_k3"]

STRUCTURE = {"type": "structural_tag", "format": {"type": "const_string", "value": "x"}}
LEGACY = {"type": "structural_tag", "triggers": ["<f"], "structures": [{"begin": "<f>", "schema": OPTIONAL, "end": "</f>"}]}
FORMATS = [
    {"structured_outputs": {"regex": "[a-z]+"}},
    {"structured_outputs": {"choice": ["left", "right"]}},
    {"structured_outputs": {"json": CITY}},
    {"structured_outputs": {"json": json.dumps(CITY)}},
    {"structured_outputs": {"json_object": True}},
    {"structured_outputs": {"grammar": 'root ::= "a" | "b"'}},
    {"structured_outputs": {"structural_tag": json.dumps(STRUCTURE)}},
    {"structured_outputs": {"structural_tag": json.dumps(LEGACY)}},
    {"structured_outputs": {"json": {"type": "integer", "multipleOf": 3}}},
    {"structured_outputs": {"json": schema({"a": {"type": "array", "uniqueItems": True}})}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}},
    {"response_format": STRUCTURE},
    {"response_format": {"type": "text"}},
]


def requests(parser: str) -> Iterator[dict]:
    for tools in TOOLS:
        if "kinds" in tools and parser not in LOOKING_IN:
            continue
        first = TOOLS[tools][0]["function"]["name"]
        for choice in ("auto", "required", {"type": "function", "function": {"name": first}}):
            for parallel in (None,) if "kinds" in tools else (None, False):
                body = {"tools": tools, "tool_choice": choice}
                yield body | ({} if parallel is None else {"parallel_tool_calls": parallel})
    yield {"tools": "strict"}
    yield {"tools": "strict", "tool_choice": "none"}
    formats = FORMATS if parser in LOOKING_IN[:2] else FORMATS[-3:]
    for answer in formats:
        for tools in ("strict", "loose"):
            yield {"tools": tools, "tool_choice": "auto"} | answer
            yield {"tools": tools, "tool_choice": "auto", "parallel_tool_calls": False} | answer
        yield {"tools": "strict", "tool_choice": "required"} | answer


def adjusted(name: str, body: dict) -> dict | None:
    """The constraint of a request after vLLM's parser adjusted it; its defaults left out."""
    body = json.loads(json.dumps(body | {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS[body["tools"]]}))
    request = ChatCompletionRequest.model_validate(body)
    if request.tool_choice != "none":
        request = parser(name, request.tools).adjust_request(request)
    outputs = request.extract_structured_outputs()
    if outputs is None:
        return None
    kinds = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
    found = {kind: value for kind in kinds if (value := getattr(outputs, kind)) is not None}
    for kind in ("json", "structural_tag"):
        if isinstance(found.get(kind), str):
            found[kind] = json.loads(found[kind])
    return found


def parser(name: str, tools: list) -> DelegatingParser:
    """vLLM's parser, without a tokenizer that has the tokens which it looks for when it is made."""
    kind = ToolParserManager.get_tool_parser(name)
    made = kind.__new__(kind)
    made.tools = tools
    engine = SimpleNamespace(adjust_request=lambda request: request)
    if name == "mistral":
        engine = MistralParser.__new__(MistralParser)
        engine.model_tokenizer = None
    made._parser_engine = engine
    made._extractor = SimpleNamespace(token_suffix="")
    whole = DelegatingParser.__new__(DelegatingParser)
    whole._reasoning_parser, whole._tool_parser = None, made
    return whole


def main():
    # Most requests look alike for several parsers: each is written once, with an answer per parser.
    rows: dict[str, dict] = {}
    for name in PARSERS:
        for body in requests(name):
            row = rows.setdefault(json.dumps(body), {"request": body, "constraints": {}})
            row["constraints"][name] = adjusted(name, body)
    golden = {"vllm": vllm.__version__, "tools": TOOLS, "rows": list(rows.values())}
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1024:.0f} KiB, {len(rows)} requests, vLLM {vllm.__version__}")


if __name__ == "__main__":
    main()
