"""Many requests per second at a given pace, whether or not the server keeps up. Cheap enough to run beside it.

Speaks just enough HTTP: keep-alive connections, answers with a content-length, no streams.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from urllib.parse import urlsplit


async def flood(url: str, bodies: list[dict], rate: float, seconds: float, leave: float = 0.0, patience: float = 120) -> Counter:
    """Offers `rate` requests per second; a share of `leave` is given up before the answer.

    Returns how many there were of each status; `left` are those given up, `lost` those without an answer.
    """
    target = urlsplit(url)
    payloads = [encode(target.netloc, body) for body in bodies]
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    outcomes: Counter = Counter()
    rng = random.Random(50)

    async def one(payload: bytes, leaves: bool) -> None:
        try:
            reader, writer = idle.pop() if idle else await asyncio.open_connection(target.hostname, target.port)
            writer.write(payload)
            if leaves:
                await asyncio.sleep(rng.uniform(0, 0.05))
                writer.close()
                outcomes["left"] += 1
                return
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), patience)
            await reader.readexactly(content_length(head))
            outcomes[int(head.split(b" ", 2)[1])] += 1
            idle.append((reader, writer))
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            outcomes["lost"] += 1

    running = set()
    started = time.monotonic()
    for number in range(round(rate * seconds)):
        # What the clock has run ahead is made up for without a pause.
        ahead = started + number / rate - time.monotonic()
        if ahead > 0:
            await asyncio.sleep(ahead)
        task = asyncio.create_task(one(payloads[number % len(payloads)], rng.random() < leave))
        running.add(task)
        task.add_done_callback(running.discard)
    outcomes["offered_per_second"] = round(number / (time.monotonic() - started))
    await asyncio.gather(*running)
    outcomes["answered_per_second"] = round((number + 1) / (time.monotonic() - started))
    for _, writer in idle:
        writer.close()
    return outcomes


def encode(host: str, body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


def content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return int(value)
    return 0
