"""Requests that no server should be impressed by: each a name, what is sent, and the statuses that are right.

Used by load_serve.py, among healthy requests, and one by one by the tests. What is sent is bytes, cut where the sender
waits. It needs a server whose --body-timeout is short, or slow senders take their time.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = "Content-Type: application/json"
TEXT = "Content-Type: text/plain"
CLOSED = 0  # in place of a status: the connection was closed without an answer
MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class Malformed:
    """parts: what is sent, with a wait of `pause` seconds before each but the first. statuses: which answers are right.
    keeps_silent: nothing more is sent and the connection stays open, so that the server has to end it."""

    name: str
    parts: tuple[bytes, ...]
    statuses: tuple[int, ...]
    pause: float = 0.0


def request(
    path: str, body: bytes, *, method: str = "POST", headers: Sequence[str] = (JSON,), length: int | None = None
) -> bytes:
    """length: what Content-Length says, where it lies."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: load",
        "Connection: close",
        f"Content-Length: {len(body) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _bodies() -> dict[str, tuple[str, bytes, tuple[int, ...]]]:
    """Bodies of a well-formed request."""

    def completion(**fields: Any) -> tuple[str, bytes, tuple[int, ...]]:
        return COMPLETIONS, json.dumps({"prompt": "a", "max_tokens": 2} | fields).encode(), (400,)

    def chat(**fields: Any) -> tuple[str, bytes, tuple[int, ...]]:
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2} | fields
        return CHAT, json.dumps(body).encode(), (400,)

    def raw(body: bytes, *statuses: int) -> tuple[str, bytes, tuple[int, ...]]:
        return COMPLETIONS, body, statuses or (400,)

    schema: dict[str, Any] = {"type": "object"}
    for _ in range(60):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return {
        # what is no JSON
        "no body": raw(b""),
        "truncated JSON": raw(b'{"prompt": "a", "max_to'),
        "two JSON values": raw(b'{"prompt": "a"}{"prompt": "b"}'),
        "single quotes": raw(b"{'prompt': 'a'}"),
        "broken UTF-8": raw(b'{"prompt": "\xff\xfe"}'),
        "cut off UTF-8": raw(b'{"prompt": "\xf0\x9f\x98"}'),
        "UTF-16": raw('{"prompt": "a"}'.encode("utf-16")),
        "a NUL byte": raw(b'{"prompt": "a\x00"}'),
        "100,000 lists in lists": raw(b"[" * 100_000),
        "deep objects": raw(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        "an integer of 100,000 digits": raw(b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}"),
        "1e999": raw(b'{"prompt": "a", "temperature": 1e999}'),
        "NaN": raw(b'{"prompt": "a", "temperature": NaN}'),
        "-Infinity": raw(b'{"prompt": "a", "top_p": -Infinity}'),
        "only spaces": raw(b" " * 100_000),
        "a list": raw(b'["prompt", "a"]'),
        "a number": raw(b"5"),
        "null": raw(b"null"),
        # fields that are wrong
        "a prompt that is a number": completion(prompt=5),
        "a prompt that is an object": completion(prompt={"text": "a"}),
        "a mixed prompt": completion(prompt=["a", 5]),
        "an empty prompt": completion(prompt=""),
        "token ids beyond the vocabulary": completion(prompt=[5, 2**31]),
        "negative token ids": completion(prompt=[-1]),
        "half of a surrogate pair": completion(prompt="\ud83d"),
        "a prompt that is too long": completion(prompt="a b " * 200_000),
        "an unknown field": completion(temprature=0.5),
        "an unknown model": (COMPLETIONS, b'{"prompt": "a", "model": "gpt-17"}', (404,)),
        "a seed beyond 64 bits": (*completion(seed=2**200)[:2], (200, 400)),
        "a negative temperature": completion(temperature=-1),
        "a huge temperature": (*completion(temperature=1e308)[:2], (200, 400)),
        "a temperature that is a text": completion(temperature="0.5"),
        "top_p of 2": completion(top_p=2),
        "n of 0": completion(n=0),
        "n of a billion": completion(n=10**9, temperature=1.0),
        "max_tokens of -5": completion(max_tokens=-5),
        "max_tokens that is a fraction": completion(max_tokens=2.5),
        "1,000 stop strings": completion(stop=["a"] * 1000),
        "a stop string of a megabyte": completion(stop="a" * MEGABYTE),
        "an empty stop string": completion(stop=[""]),
        "100,000 bad words": completion(bad_words=["a"] * 100_000),
        "a logit_bias of letters": completion(logit_bias={"a": 1}),
        "a logit_bias of a million": completion(logit_bias={"5": 10**6}),
        "logprobs of a million": completion(logprobs=10**6),
        "an unknown policy": completion(acceptance="everything"),
        "a threshold that is a text": completion(fly_entropy_threshold="low"),
        "a stream_options that is a list": completion(stream=True, stream_options=[]),
        "a regex that does not compile": completion(structured_outputs={"regex": "(" * 50}),
        "a schema of an unknown type": completion(structured_outputs={"json": {"type": "wish"}}),
        "a deep schema": (*completion(structured_outputs={"json": schema})[:2], (400,)),
        "a regex of a megabyte": completion(structured_outputs={"regex": "a" * MEGABYTE}),
        "a choice of nothing": completion(structured_outputs={"choice": []}),
        "a grammar that does not parse": completion(structured_outputs={"grammar": "?::?"}),
        "two kinds of grammars": completion(structured_outputs={"regex": "a", "choice": ["a"]}),
        "no messages": chat(messages=[]),
        "messages that are a text": chat(messages="a"),
        "an unknown role": chat(messages=[{"role": "wizard", "content": "a"}]),
        "a message without a role": chat(messages=[{"content": "a"}]),
        "content of numbers": chat(messages=[{"role": "user", "content": [1, 2]}]),
        "a tool without a name": chat(tools=[{"type": "function", "function": {}}]),
        "a tool that is not there": chat(tool_choice={"type": "function", "function": {"name": "x"}}),
        "a response_format of an unknown type": chat(response_format={"type": "poem"}),
        "10 MB": raw(b'{"prompt": "' + b"a" * 10 * MEGABYTE + b'"}', 413),
        "10 MB of spaces": raw(b" " * 10 * MEGABYTE, 413),
    }


def _wires(pause: float) -> list[Malformed]:
    """What is wrong with the request itself. pause: more than the server's body_timeout."""
    body = b'{"prompt": "a", "max_tokens": 2}'
    whole = request(COMPLETIONS, body)
    chunked = request(COMPLETIONS, b"", headers=(JSON, "Transfer-Encoding: chunked")).replace(
        b"Content-Length: 0\r\n", b""
    )
    get = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    kept = get.replace(b"close", b"keep-alive")
    return [
        Malformed("a slow sender", (whole[:-5], b"x"), (408,), pause),
        Malformed("a slow sender of chunks", (chunked + b"5\r\n", b"x"), (408,), pause),
        Malformed("a Content-Length that is too long", (request(COMPLETIONS, body, length=500), b""), (408,), pause),
        Malformed("a Content-Length that is too short", (request(COMPLETIONS, body, length=5),), (400,)),
        Malformed("a negative Content-Length", (request(COMPLETIONS, body, length=-5),), (400,)),
        Malformed("a Content-Length of 10^30", (request(COMPLETIONS, body, length=10**30),), (400, 413)),
        Malformed("two Content-Lengths", (request(COMPLETIONS, body, headers=(JSON, "Content-Length: 7")),), (400,)),
        Malformed("a chunk size that is none", (chunked + b"XYZ\r\n",), (400,)),
        Malformed("an endless chunk size", (chunked + b"F" * 100_000,), (400, CLOSED)),
        Malformed("chunks of 10 MB", (chunked + b"989680\r\n" + b"a" * 10 * MEGABYTE + b"\r\n0\r\n\r\n",), (413,)),
        Malformed("no HTTP at all", (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",), (400,)),
        Malformed("a text", (b"hello\r\n\r\n",), (400,)),
        Malformed("a bad version", (b"GET / HTTP/33\r\n\r\n",), (400,)),
        Malformed("no Host", (b"GET /health HTTP/1.1\r\n\r\n",), (400,)),
        Malformed("a header without a colon", (get + b"hello\r\n\r\n",), (400,)),
        Malformed("a NUL in a header", (get + b"X: \x00\r\n\r\n",), (400,)),
        Malformed("a flood of headers", (get + b"X-Flood: a\r\n" * 100_000 + b"\r\n",), (400, CLOSED)),
        Malformed(
            "a path of a megabyte", (b"GET /" + b"a" * MEGABYTE + b" HTTP/1.1\r\nHost: a\r\n\r\n",), (400, CLOSED)
        ),
        Malformed(
            "a text in place of JSON", (request(COMPLETIONS, body, headers=("Content-Type: text/plain",)),), (415,)
        ),
        Malformed("no content type", (request(COMPLETIONS, body, headers=()),), (415,)),
        Malformed("a method that is none", (request(COMPLETIONS, body, method="BREW"),), (405,)),
        Malformed("a GET of a POST", (request(COMPLETIONS, b"", method="GET"),), (405,)),
        Malformed("an unknown path", (request("/v1/embeddings", body),), (404,)),
        Malformed("a way up", (request("/../../etc/passwd", b"", method="GET"),), (404,)),
        Malformed("gone in the middle of the head", (whole[:30],), (CLOSED,)),
        Malformed(
            "pipelined: a good one, then garbage",
            (kept + b"\r\nGARBAGE\r\n\r\n",),
            (200,),
        ),
    ]


def malformed_requests(pause: float) -> list[Malformed]:
    """All of them. pause: seconds, more than the server's --body-timeout."""
    bodies = [Malformed(name, (request(path, body),), statuses) for name, (path, body, statuses) in _bodies().items()]
    return [*bodies, *_wires(pause)]


async def send(kind: Malformed, host: str, port: int, timeout: float) -> int:
    """The status of the (first) answer, or CLOSED. Raises TimeoutError when the server does neither."""
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            for index, part in enumerate(kind.parts):
                if index:
                    await asyncio.sleep(kind.pause)
                writer.write(part)
                await writer.drain()
            if kind.statuses == (CLOSED,):
                return CLOSED
            line = await reader.readline()
        except (ConnectionResetError, BrokenPipeError):
            line = b""
        finally:
            writer.transport.abort()
    return int(line.split()[1]) if line.startswith(b"HTTP/") else CLOSED
