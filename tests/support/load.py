"""Requests that run beside a test: each has one right answer, and every other outcome is kept."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Sequence

import httpx

from .api import TIMEOUT, read


class Load:
    """Sends requests over and over, from several threads, until told to stop.

    An outcome is `right`, `wrong`, `refused` (a status with an error of the OpenAI API), `broken` (a stream that ends
    with an error event) or `bad` (anything else: a hang, a stream that ends in silence, an error of no form).
    """

    def __init__(self, url: str, bodies: Sequence[dict], expected: Sequence[str], threads: int = 4):
        """`expected[i]`: the text that `bodies[i]` is answered with. Every other request is a stream."""
        self.url = url
        self.pairs = list(zip(bodies, expected))
        self.outcomes: Counter[str] = Counter()
        self.details: list[str] = []
        self.stopped = threading.Event()
        self.numbers = itertools.count()
        self.threads = [threading.Thread(target=self.run, daemon=True) for _ in range(threads)]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def count(self) -> int:
        return self.outcomes.total()

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=TIMEOUT, trust_env=False) as client:
            while not self.stopped.is_set():
                number = next(self.numbers)
                body, expected = self.pairs[number % len(self.pairs)]
                try:
                    outcome, detail = self.ask(client, body | {"stream": number % 2 == 0}, expected)
                except (httpx.HTTPError, ValueError) as error:
                    outcome, detail = "bad", repr(error)
                self.outcomes[outcome] += 1
                if outcome != "right":
                    self.details.append(f"{outcome}: {detail}")

    def ask(self, client: httpx.Client, body: dict, expected: str) -> tuple[str, str]:
        with client.stream("POST", "/v1/completions", json=body) as response:
            answer = read(response)
        if answer.status != 200:
            return ("refused" if answer.error.get("message") else "bad"), f"{answer.status} {answer.text[:300]}"
        if not answer.is_stream:
            text = answer.json["choices"][0]["text"]
        elif any("error" in event for event in answer.events):
            return "broken", str(answer.events[-1])[:300]
        elif not answer.done:
            return "bad", "a stream that ended in silence"
        else:
            text = "".join(choice["text"] for event in answer.events for choice in event["choices"])
        return ("right" if text == expected else "wrong"), f"{text!r} for {str(body)[:200]}"


def expected_texts(api, bodies: Sequence[dict]) -> list[str]:
    """The texts that an undisturbed server answers with."""
    texts = []
    for body in bodies:
        answer = api.post("/v1/completions", body)
        assert answer.status == 200, answer.text
        texts.append(answer.json["choices"][0]["text"])
    return texts
