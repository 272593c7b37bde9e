"""Compares two servers' answers to the same request, whole.

What may differ is taken out first: ids, times, the server's own fingerprint, and
whether an absent value is written as null. A stream is put together before, since
where one chunk ends is the server's choice.
"""

from __future__ import annotations

import math
import re

from .api import Answer

# Ids and times of one answer, the server's name for itself, what depends on what its
# cache held before, and the number of tokens thought, which vLLM counts otherwise in a
# stream than not (0.32).
OWN = {"id", "created", "system_fingerprint", "prompt_tokens_details", "completion_tokens_details", "metrics"}

# Log-probabilities go through other software on the way to text; the engine is the same.
TOLERANCE = 1e-4

# Fields that vLLM (0.32) calls by the name that its engine has for them, and ours by
# the name that the client sent: `max_tokens` is what a prompt left to be generated, set or not.
OTHER_NAMES = {("logprobs", "top_logprobs"), ("max_tokens", "prompt"), ("input_tokens", "prompt")}

# Texts and lists that a stream delivers in pieces.
PIECES = {"content", "text", "reasoning", "reasoning_content", "arguments", "token_ids",
          "tokens", "token_logprobs", "top_logprobs", "text_offset", "refusal"}


def first_difference(expected: Answer, actual: Answer) -> str | None:
    """Where two answers differ first, in words; None if they are equal."""
    if expected.status != actual.status:
        return f"status: {expected.status} expected, got {actual.status}: {actual.text[:400]}"
    if expected.status != 200:
        return first_difference_of_errors(expected, actual)
    if expected.is_stream != actual.is_stream:
        return f"stream: {expected.is_stream} expected, got {actual.is_stream}"
    if expected.is_stream:
        if actual.done != expected.done:
            return f"[DONE]: {expected.done} expected, got {actual.done}"
        whole = (assemble(expected.events), assemble(actual.events))
    else:
        whole = (expected.json, actual.json)
    return differ(*(clean(answer, OWN) for answer in whole), "stream" if expected.is_stream else "answer")


def first_difference_of_errors(expected: Answer, actual: Answer) -> str | None:
    """Where two refusals differ. Each says in its own words what is wrong; ours may name a field where vLLM names none."""
    for whose, answer in (("expected", expected), ("actual", actual)):
        if wrong := misshapen(answer):
            return f"error ({whose}): {wrong} in {answer.text[:400]}"
    if not names_the_same(expected.error["param"], actual.error["param"]):
        return f"error.param: {expected.error['param']!r} expected, got {actual.error['param']!r}: {actual.text[:400]}"
    return None


def names_the_same(expected: str | None, actual: str | None) -> bool:
    """Whether both name one field, as far as vLLM names one.

    `body` in front is not a field, and a capitalized part is a class of vLLM's. One of
    them may go further into the field than the other: `prompt` and `prompt.0`.
    """
    if expected is None or (expected, actual) in OTHER_NAMES:
        return True
    theirs, ours = ([part for part in re.split(r"[.\[\]]+", name or "") if part] for name in (expected, actual))
    theirs = [part for part in theirs[theirs[0] == "body":] if not part[0].isupper()]
    shared = min(len(theirs), len(ours))
    return shared > 0 and theirs[:shared] == ours[:shared]


def misshapen(answer: Answer) -> str | None:
    """What keeps a refusal from being an error of the OpenAI API."""
    error = answer.error
    if set(error) != {"message", "type", "param", "code"}:
        return f"{sorted(error)} as fields of the error"
    if not (isinstance(error["message"], str) and error["message"]):
        return "no message"
    if not isinstance(error["type"], str):
        return "no type"
    if not isinstance(error["param"], str | None):
        return "param is no string"
    if error["code"] != answer.status:
        return f"code {error['code']!r} with status {answer.status}"
    return None


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
    return {key: element for key, element in kept.items() if element is not None and element != {}}


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
