"""fly-serve under load: many clients with random requests, some of which go away, and malformed ones among them.

Starts fly-serve on ENGINE_DIR as a process and has `--clients` clients ask for `--seconds`. Greedy answers are compared
with those of `LLM.generate`, which are computed before; the others are checked for what they promise. Every second the
server's memory is read. At the end all gauges have to be zero and the counters have to agree with what the clients saw;
then SIGTERM comes while answers are under way, of which none may be lost. Prints a report; exits with 1 where anything
is wrong.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from fly_trt import LLM, SamplingParams
from fly_trt.acceptance import AcceptanceParams
from malformed_requests import malformed_requests, send

EVAL_PROMPTS = Path(__file__).parents[1] / "tests" / "assets" / "pair" / "eval.jsonl"
POLICIES = ("exact", "fly")
BODY_SECONDS = 5.0
ANSWER_SECONDS = 600.0
WARM_SECONDS = 60.0  # memory may grow so long
FLAGS = ("--port", "0", "--log-requests", "--tool-call-parser", "hermes")
GROWTH = 1.05  # and then by no more than this
GROWTH_BYTES = 8_000_000
NUM_DRAINED = 6  # answers that are under way when SIGTERM comes
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}


@dataclass
class Tally:
    """What the clients saw."""

    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)  # sequences, by finish reason
    num_cut: int = 0  # sequences of clients that went away
    num_tokens: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds since the start, and bytes

    def check(self, is_right: bool, what: str) -> None:
        if not is_right:
            self.failures.append(what)

    def end(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> None:
        self.ended.update("stop" if c["finish_reason"] == "tool_calls" else c["finish_reason"] for c in choices)
        if usage is not None:
            self.num_tokens += usage["completion_tokens"]


class Load:
    """The clients of one server. `expected`: text by prompt, policy and max_tokens."""

    def __init__(self, url: str, expected: dict[tuple[str, str, int], str], tally: Tally, seed: int) -> None:
        self.url = url
        self.host, port = url.removeprefix("http://").split(":")
        self.port = int(port)
        self.tally = tally
        self._expected = expected
        self._random = random.Random(seed)
        self._malformed = malformed_requests(BODY_SECONDS + 1)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self._client = httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, limits=limits)
        self._kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (6, self.greedy),
            (6, self.greedy_stream),
            (3, self.goes_away),
            (2, self.sampled),
            (2, self.structured),
            (1, self.chat_with_tools),
            (1, self.tokenized),
            (4, self.malformed),
        ]

    async def run(self, num_clients: int, seconds: float) -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._be_a_client(until) for _ in range(num_clients)))

    async def close(self) -> None:
        await self._client.aclose()

    async def _be_a_client(self, until: float) -> None:
        weights, kinds = zip(*self._kinds, strict=True)
        while time.monotonic() < until:
            (kind,) = self._random.choices(kinds, weights)
            self.tally.kinds[kind.__name__] += 1
            try:
                await kind()
            except Exception as error:
                self.tally.failures.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    def _choose(self) -> tuple[dict[str, Any], str]:
        """A greedy request and its text."""
        prompt, acceptance, max_tokens = self._random.choice(list(self._expected))
        body = {"prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "acceptance": acceptance}
        return body, self._expected[prompt, acceptance, max_tokens]

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self._client.post(path, json=body)
        answer: dict[str, Any] = response.json()
        if response.status_code != 200:
            raise AssertionError(f"{response.status_code}: {answer}")
        self.tally.end(answer["choices"], answer["usage"])
        return answer

    async def greedy(self) -> None:
        body, want = self._choose()
        answer = await self._post("/v1/completions", body)
        self.tally.check(answer["choices"][0]["text"] == want, f"greedy: another text for {body}")

    async def greedy_stream(self) -> None:
        body, want = self._choose()
        text = await self._stream(body)
        self.tally.check(text == want, f"greedy_stream: another text for {body}")

    async def _stream(self, body: dict[str, Any]) -> str:
        """Its text; raises where it does not end as it should."""
        more = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = []
        async with self._client.stream("POST", "/v1/completions", json=body | more) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    chunks.append(line[6:])
        if not chunks or chunks.pop() != "[DONE]":
            raise AssertionError(f"a stream without its end: {chunks[-1:]}")
        read = [json.loads(chunk) for chunk in chunks]
        if errors := [chunk["error"] for chunk in read if "error" in chunk]:
            raise AssertionError(f"a stream ended with {errors}")
        choices = [choice for chunk in read for choice in chunk["choices"]]
        self.tally.end([choice for choice in choices if choice["finish_reason"]], read[-1]["usage"])
        return "".join(choice["text"] for choice in choices)

    async def goes_away(self) -> None:
        """After some of a stream, or before a whole answer has come."""
        body, _ = self._choose()
        body |= {"max_tokens": 500, "ignore_eos": True, "stream": self._random.random() < 0.7}
        self.tally.num_cut += 1
        if body["stream"]:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                num_lines = self._random.randrange(12)
                async for _ in response.aiter_lines():
                    if (num_lines := num_lines - 1) < 0:
                        return
        else:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._client.post("/v1/completions", json=body), self._random.uniform(0.0, 0.5))

    async def sampled(self) -> None:
        body, _ = self._choose()
        n = self._random.randint(1, 3)
        top_p = self._random.uniform(0.1, 1.0)
        body |= {"n": n, "temperature": self._random.uniform(0.1, 1.5), "top_p": top_p, "logprobs": 2, "seed": 1}
        answer = await self._post("/v1/completions", body)
        self.tally.check(len(answer["choices"]) == n, f"sampled: {len(answer['choices'])} choices for n {n}")
        for choice in answer["choices"]:
            is_whole = len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"])
            self.tally.check(is_whole, "sampled: logprobs without their tokens")

    async def structured(self) -> None:
        body, _ = self._choose()
        body |= {"structured_outputs": {"json": SCHEMA}, "max_tokens": 200, "temperature": self._random.choice([0, 1])}
        choice = (await self._post("/v1/completions", body))["choices"][0]
        if choice["finish_reason"] == "stop":
            value = json.loads(choice["text"])
            is_valid = value.keys() == {"name", "count"} and value["name"] in ("a", "b") and 0 <= value["count"] <= 99
            self.tally.check(is_valid, f"structured: {value}")

    async def chat_with_tools(self) -> None:
        messages = [{"role": "user", "content": self._choose()[0]["prompt"]}]
        body = {"messages": messages, "tools": [TOOL], "tool_choice": "required", "max_tokens": 200, "temperature": 0}
        choice = (await self._post("/v1/chat/completions", body))["choices"][0]
        for call in choice["message"].get("tool_calls") or ():
            if choice["finish_reason"] != "length":
                self.tally.check(json.loads(call["function"]["arguments"]).keys() == {"name", "count"}, f"tool: {call}")

    async def tokenized(self) -> None:
        prompt = self._choose()[0]["prompt"]
        found = (await self._client.post("/tokenize", json={"prompt": prompt, "add_special_tokens": False})).json()
        back = (await self._client.post("/detokenize", json={"tokens": found["tokens"]})).json()
        self.tally.check(back == {"prompt": prompt}, f"tokenized: {back}")

    async def malformed(self) -> None:
        kind = self._random.choice(self._malformed)
        status = await send(kind, self.host, self.port, ANSWER_SECONDS)
        self.tally.check(status in kind.statuses, f"malformed: {kind.name}: {status}, expected {kind.statuses}")
        if status == 200:  # of those that may also be answered, nothing is known of the answer
            self.tally.num_cut += 1

    async def metrics(self) -> dict[str, float]:
        text = (await self._client.get("/metrics")).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {"".join([s.name.removeprefix("fly_trt:"), *s.labels.values()]): s.value for s in samples}

    async def drain(self, terminate: Callable[[], None]) -> None:
        """SIGTERM while answers are under way: all of them come, and are right."""
        bodies = [self._choose() for _ in range(NUM_DRAINED)]
        tasks = [asyncio.create_task(self._stream(body)) for body, _ in bodies]
        while (await self.metrics())["num_requests_running"] == 0 and not all(task.done() for task in tasks):
            await asyncio.sleep(0.001)
        terminate()
        texts = await asyncio.gather(*tasks, return_exceptions=True)
        for (body, want), text in zip(bodies, texts, strict=True):
            self.tally.check(text == want, f"drain: {text!r} for {body}")


class Process:
    """fly-serve, from its line that says where it listens until it is told to end."""

    def __init__(self, engine_dir: Path, log: Path, num_threads: int) -> None:
        flags = ["--num-threads", str(num_threads), "--body-timeout", str(BODY_SECONDS), *FLAGS]
        self._log = log
        with log.open("wb") as file:
            command = [sys.executable, "-m", "fly_trt.cli.serve", str(engine_dir), *flags]
            self._process = subprocess.Popen(command, stderr=file)

    def url(self) -> str:
        while not (found := re.search(r" at (http://\S+): ", self._log.read_text())):
            if self._process.poll() is not None:
                raise RuntimeError(self._log.read_text())
            time.sleep(0.05)
        return found[1]

    def memory(self) -> int:
        """Resident bytes."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * 4096

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self._process.wait(ANSWER_SECONDS)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def expected_texts(engine_dir: Path, num_prompts: int) -> dict[tuple[str, str, int], str]:
    lines = EVAL_PROMPTS.read_text(encoding="utf-8").splitlines()[:num_prompts]
    prompts = [json.loads(line)["prompt"] for line in lines]
    found = {}
    with LLM(engine_dir) as llm:
        for acceptance in POLICIES:
            for max_tokens in (1, 7, 60, 160):
                params = SamplingParams(max_tokens=max_tokens, acceptance=AcceptanceParams(acceptance=acceptance))
                for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
                    found[prompt, acceptance, max_tokens] = output.outputs[0].text
    return found


async def _watch(process: Process, tally: Tally, started: float) -> None:
    while True:
        tally.memory.append((time.monotonic() - started, process.memory()))
        await asyncio.sleep(1)


async def _settle(load: Load) -> dict[str, float]:
    """The metrics once nothing is under way; aborts of those that went last take a step."""
    for _ in range(600):
        metrics = await load.metrics()
        if metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0:
            break
        await asyncio.sleep(0.1)
    return metrics


def check_metrics(tally: Tally, metrics: dict[str, float]) -> None:
    """Those of clients that went away may have ended in any way, or never have begun."""
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        tally.check(metrics[gauge] == 0, f"metrics: {gauge} is {metrics[gauge]}")
    for reason in ("stop", "length"):
        counted, seen = metrics.get(f"request_success_total{reason}", 0), tally.ended[reason]
        is_right = seen <= counted <= seen + tally.num_cut
        tally.check(is_right, f"metrics: {counted:.0f} ended with {reason}, clients saw {seen} (+{tally.num_cut})")
    tokens = metrics["generation_tokens_total"]
    tally.check(tokens >= tally.num_tokens, f"metrics: {tokens:.0f} tokens, clients saw {tally.num_tokens}")


def check_memory(tally: Tally) -> str:
    after = [size for seconds, size in tally.memory if seconds >= WARM_SECONDS]
    if len(after) < 30:
        return "memory: too short a run to say"
    third = len(after) // 3
    first, last = statistics.median(after[:third]), statistics.median(after[-third:])
    tally.check(last <= GROWTH * first + GROWTH_BYTES, f"memory: {first / 1e6:.0f} MB grew to {last / 1e6:.0f} MB")
    return (
        f"memory: {first / 1e6:.0f} MB after a minute, {last / 1e6:.0f} MB at the end, most {max(after) / 1e6:.0f} MB"
    )


async def run(
    engine_dir: Path, log: Path, *, clients: int, seconds: float, seed: int = 0, threads: int = 1, num_prompts: int = 24
) -> tuple[Tally, str]:
    """What was seen, and a line of memory."""
    expected = expected_texts(engine_dir, num_prompts)
    process = Process(engine_dir, log, threads)
    try:
        tally = Tally()
        load = Load(process.url(), expected, tally, seed)
        watch = asyncio.create_task(_watch(process, tally, time.monotonic()))
        await load.run(clients, seconds)
        check_metrics(tally, await _settle(load))
        watch.cancel()
        await load.drain(process.terminate)
        code = await asyncio.to_thread(process.wait)
        tally.check(code == 0, f"exit code {code}")
        await load.close()
    finally:
        process.kill()
    text = log.read_text()
    tally.check("Traceback" not in text and " broke: " not in text, "the log has an error of the server's own")
    return tally, check_memory(tally)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("load_serve.log"), help="what the server says")
    given = parser.parse_args()
    tally, memory = asyncio.run(
        run(
            given.engine_dir,
            given.log,
            clients=given.clients,
            seconds=given.seconds,
            seed=given.seed,
            threads=given.num_threads,
        )
    )
    print(
        f"{sum(tally.kinds.values())} requests of {given.clients} clients in {given.seconds:g} s: {dict(tally.kinds)}"
    )
    print(f"{sum(tally.ended.values())} completions ended: {dict(tally.ended)}, {tally.num_tokens} tokens; {memory}")
    for failure, count in Counter(tally.failures).most_common(50):
        print(f"WRONG ({count}): {failure}")
    print("all was right" if not tally.failures else f"{len(tally.failures)} failures")
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
