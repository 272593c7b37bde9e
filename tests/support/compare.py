"""Compares two servers' answers to the same request, whole.

What may differ is taken out first: ids, times, the server's own fingerprint, and
whether an absent value is written as null. A stream is put together before, since
where one chunk ends is the server's choice.
"""

from __future__ import annotations

import json
import math

from .api import Answer

# Ids and times of one answer, the server's name for itself, what depends on what its
# cache held before, and the number of tokens thought, which vLLM counts otherwise in a
# stream than not (0.32).
OWN = {"id", "created", "system_fingerprint", "prompt_tokens_details", "completion_tokens_details", "metrics"}

# Log-probabilities go through other software on the way to text; the engine is the same.
TOLERANCE = 1e-4

# Texts and lists that a stream delivers in pieces.
PIECES = {"content", "text", "reasoning", "reasoning_content", "arguments", "token_ids",
          "tokens", "token_logprobs", "top_logprobs", "text_offset", "refusal"}


def first_difference(body: dict, expected: Answer, actual: Answer) -> str | None:
    """Where two answers to `body` differ first, in words; None if they are equal."""
    if expected.status != actual.status:
        return f"status: {expected.status} expected, got {actual.status}: {actual.text[:400]}"
    if expected.status != 200:
        return None
    if expected.is_stream != actual.is_stream:
        return f"stream: {expected.is_stream} expected, got {actual.is_stream}"
    # vLLM adds the prompt's tokens to a stream that echoes the prompt, asked for or not.
    unasked = set() if body.get("return_token_ids") else {"prompt_token_ids"}
    if expected.is_stream:
        if actual.done != expected.done:
            return f"[DONE]: {expected.done} expected, got {actual.done}"
        whole = (assemble(expected.events), assemble(actual.events))
    else:
        whole = (expected.json, actual.json)
    return differ(*(clean(answer, OWN | unasked) for answer in whole), "stream" if expected.is_stream else "answer")


def differ(expected: object, actual: object, where: str) -> str | None:
    """Walks two values side by side."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in [*expected, *(key for key in actual if key not in expected)]:
            if key not in actual:
                return f"{where}.{key}: {expected[key]!r} expected, absent"
            if key not in expected:
                return f"{where}.{key}: not expected, got {actual[key]!r}"
            if found := differ(expected[key], actual[key], f"{where}.{key}"):
                return found
        return None
    if isinstance(expected, list) and isinstance(actual, list):
        for index, (left, right) in enumerate(zip(expected, actual)):
            if found := differ(left, right, f"{where}[{index}]"):
                return found
        if len(expected) != len(actual):
            return f"{where}: {len(expected)} elements expected, got {len(actual)}"
        return None
    if is_number(expected) and is_number(actual):
        if math.isclose(expected, actual, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            return None
    elif expected == actual and type(expected) is type(actual):
        return None
    return f"{where}: {expected!r} expected, got {actual!r}"


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def clean(value: object, without: set[str]) -> object:
    """Takes out nulls, and the fields named in `without`."""
    if isinstance(value, list):
        return [clean(element, without) for element in value]
    if not isinstance(value, dict):
        return value
    kept = {key: clean(element, without) for key, element in value.items() if key not in without}
    if "arguments" in kept:
        kept["arguments"] = parsed(kept["arguments"])
    return {key: element for key, element in kept.items() if element is not None and element != {}}


def parsed(arguments: str | None) -> object:
    """The arguments of a call as a value: vLLM's white space differs between a stream and an answer."""
    try:
        return json.loads(arguments or "")
    except ValueError:
        return arguments


def assemble(events: list[dict]) -> dict:
    """Puts a stream's chunks together into one answer."""
    whole: dict = {}
    choices: dict[int, dict] = {}
    for event in events:
        for key, value in event.items():
            if key == "choices":
                for choice in value:
                    merge(choices.setdefault(choice["index"], {}), choice)
            elif value is not None:
                whole[key] = value
    whole["choices"] = [choices[index] for index in sorted(choices)]
    return whole


def merge(into: dict, piece: dict) -> None:
    for key, value in piece.items():
        if value is None:
            continue
        if key in PIECES and into.get(key) is not None:
            into[key] = into[key] + value
        elif key == "tool_calls":
            merge_calls(into.setdefault("tool_calls", []), value)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            # A copy: later pieces are merged into it.
            into[key] = {} if isinstance(value, dict) else value
            if isinstance(value, dict):
                merge(into[key], value)


def merge_calls(calls: list[dict], pieces: list[dict]) -> None:
    """Tool calls come in pieces too, each with its index."""
    for piece in pieces:
        while len(calls) <= piece["index"]:
            calls.append({})
        merge(calls[piece["index"]], piece)
