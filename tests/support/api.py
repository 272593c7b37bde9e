"""An HTTP client that shows an answer as it came: status, headers, JSON or server-sent events."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import httpx

# Generous: the machine may be compiling beside the tests.
TIMEOUT = httpx.Timeout(120.0)


@dataclass
class Answer:
    status: int
    headers: httpx.Headers
    # The body of an answer that is not a stream; None if it is no JSON.
    json: dict | None = None
    # The events of a stream, without its end mark.
    events: list[dict] = field(default_factory=list)
    # Whether a stream ended with `[DONE]`.
    done: bool = False
    text: str = ""

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def error(self) -> dict:
        """The error object of a refusal."""
        return (self.json or {}).get("error") or {}


class Api:
    """One server under test, over one keep-alive connection."""

    def __init__(self, url: str, key: str | None = None):
        self.url = url.rstrip("/")
        self.key = key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT, trust_env=False)

    def post(self, path: str, body: object = None, **options) -> Answer:
        if body is not None:
            options["json"] = body
        with self.client.stream("POST", path, **options) as response:
            return read(response)

    def get(self, path: str, **options) -> Answer:
        with self.client.stream("GET", path, **options) as response:
            return read(response)

    def is_healthy(self) -> bool:
        return self.answers("/health")

    def answers(self, path: str) -> bool:
        """Whether a GET is answered with 200."""
        try:
            return self.client.get(path, timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def chat(self, content: str = "Hello", **fields) -> Answer:
        """A short greedy chat request; `fields` are added or replaced."""
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
        return self.post("/v1/chat/completions", body | fields)

    def complete(self, prompt: object = "Hello", **fields) -> Answer:
        """A short greedy completion; `fields` are added or replaced."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 8}
        return self.post("/v1/completions", body | fields)


def read(response: httpx.Response) -> Answer:
    answer = Answer(response.status_code, response.headers)
    if not answer.is_stream:
        response.read()
        answer.text = response.text
        try:
            answer.json = response.json()
        except ValueError:
            pass
        return answer
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:"):
            continue
        if data == "[DONE]":
            answer.done = True
        else:
            answer.events.append(json.loads(data))
    return answer
