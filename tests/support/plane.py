"""A client of the tcp plane, for what no processor would send: one worker, one request at a time.

It speaks proto/README.md and the few fields of proto/stator/worker/v1/worker.proto that tests need.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

HELLO, WELCOME, SUBMIT, STEP = 1, 2, 4, 6
VERSION = b"STATOR" + struct.pack("<HH", 1, 1)
LEGS = {"unspecified": 0, "prefill": 1, "decode": 2, "local": 3, "release": 4}
# worker.proto, Code.
INVALID_REQUEST = 1


@dataclass
class Answer:
    """The deltas of a stream, merged."""

    tokens: int = 0
    finish: int = 0
    code: int = 0
    message: str = ""
    kv_transfer_params: bytes = b""


def ask(address: str, leg: str, prompt: list[int], params: bytes = b"") -> Answer:
    """Sends one request of one token to the worker at `host:port`, and returns its answer."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        stream = connection.makefile("rb")
        connection.sendall(frame(HELLO, VERSION + field(1, b"tests")))
        if read_frame(stream)[0] != WELCOME:
            raise ConnectionError("the worker does not take this connection")
        request = field(1, b"tests") + field(2, struct.pack(f"<{len(prompt)}I", *prompt)) + field(3, field(9, 1))
        request += (field(8, params) if params else b"") + field(12, LEGS[leg])
        connection.sendall(frame(SUBMIT, struct.pack("<I", 1) + request))
        answer = Answer()
        while not answer.finish:
            kind, payload = read_frame(stream)
            if kind == STEP:
                for number, value in fields(payload):
                    if number == 1:
                        take(answer, value)
        return answer


def take(answer: Answer, delta: bytes) -> None:
    for number, value in fields(delta):
        if number == 2:
            answer.tokens += 1
        elif number == 5:
            answer.finish = value
        elif number == 8:
            answer.kv_transfer_params = value
        elif number == 9:
            error = dict(fields(value))
            answer.code, answer.message = error.get(1, 0), error.get(2, b"").decode()


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack("<IB", len(payload) + 1, kind) + payload


def read_frame(stream) -> tuple[int, bytes]:
    head = stream.read(5)
    if len(head) < 5:
        raise ConnectionError("the worker closed the connection")
    length, kind = struct.unpack("<IB", head)
    return kind, stream.read(length - 1)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes) -> bytes:
    """One protobuf field: a number, or bytes of any kind."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def fields(message: bytes):
    """The fields of a protobuf message: (number, value)."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = number()
        match key & 7:
            case 0:
                yield key >> 3, number()
            case 1 | 5 as size:
                at += 8 if size == 1 else 4
            case 2:
                length = number()
                yield key >> 3, message[at:at + length]
                at += length
