"""What fly-serve costs over the Python runtime: throughput with several requests in flight, and time to first token.

usage: tools/bench_serve.py ENGINE_DIR [--in-flight 8] [--prompts 24] [--rounds 5] [--max-tokens 160] [--client raw]
                            [--profile FILE]

The same prompts, greedy, go to AsyncLLM in a process of its own, and over HTTP to a fly-serve process, streamed and
whole, from a client in a third process. The ways take turns round by round; figures are medians. Each way has a round
of requests in flight together, for tokens per second, and one of requests one after another, for the time to the first
token, of which "outside" is what passes outside the engine thread. The client costs too, and on a machine with few
cores takes them from the server: its processor time is shown beside that of the process with the engine, whose rise
over AsyncLLM's own is what serving costs where others' work makes the clock unsure. `--client openai` measures with the
official package, whose own time is larger; `raw` reads no more of an answer than it must. --profile writes a cProfile
of the server's event loop.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from fly_trt.benchmark.workload import read_prompts

EVAL_PROMPTS = Path(__file__).parents[1] / "tests" / "assets" / "pair" / "eval.jsonl"
WAYS = ("AsyncLLM", "HTTP, streamed", "HTTP, whole")
WARM_UP_TOKENS = 16
TO_FIRST = "fly_trt:time_to_first_token_seconds"
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class Settings(NamedTuple):
    engine_dir: Path
    prompts: list[str]
    max_tokens: int
    in_flight: int


class Answer(NamedTuple):
    """Tokens of an answer, and seconds from asking to the first of them; the whole answer's where it comes as one."""

    num_tokens: int
    to_first: float


class Round(NamedTuple):
    """One round of one way. cpu_seconds: processor time of the process that asks. to_first_inside: the mean time to
    the first token as the engine thread counts it, from a request's arrival at the runtime."""

    answers: list[Answer]
    seconds: float
    cpu_seconds: float
    to_first_inside: float = 0.0

    @property
    def rate(self) -> float:
        return sum(answer.num_tokens for answer in self.answers) / self.seconds

    @property
    def to_first_outside(self) -> float:
        """The mean time to the first token beyond what the engine thread counts: what is between it and who asks."""
        return statistics.mean(answer.to_first for answer in self.answers) - self.to_first_inside


Ask = Callable[[str, int], Awaitable[Answer]]
"""From a prompt and max_tokens to an answer."""


async def run_round(ask: Ask, prompts: Sequence[str], max_tokens: int, in_flight: int) -> Round:
    waiting = iter(prompts)
    answers: list[Answer] = []

    async def work() -> None:
        for prompt in waiting:
            answers.append(await ask(prompt, max_tokens))

    started, cpu_started = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work() for _ in range(in_flight)))
    return Round(answers, time.perf_counter() - started, time.process_time() - cpu_started)


# --- who asks: processes that are told of rounds over a pipe ----------------------------------------------------------


def answer_over_pipe(
    pipe: Connection, asks: dict[str, Ask], loop: asyncio.AbstractEventLoop, read_metric: Callable[[str], float]
) -> None:
    """Runs a round for each (way, prompts, max_tokens, in_flight) that comes, until None does. read_metric: of the
    runtime, by name."""

    def read_firsts() -> tuple[float, float]:
        return read_metric(f"{TO_FIRST}_sum"), read_metric(f"{TO_FIRST}_count")

    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        way, *what = asked
        before = read_firsts()
        found = loop.run_until_complete(run_round(asks[way], *what))
        seconds, count = (new - old for new, old in zip(read_firsts(), before, strict=True))
        pipe.send(found._replace(to_first_inside=seconds / count))


def runtime_process(pipe: Connection, engine_dir: Path) -> None:
    from fly_trt import AsyncLLM, RequestOutputKind, SamplingParams

    llm = AsyncLLM(engine_dir)

    async def ask(prompt: str, max_tokens: int) -> Answer:
        params = SamplingParams(max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA)
        started, to_first, num_tokens = time.perf_counter(), 0.0, 0
        async for output in llm.generate(prompt, params):
            to_first = to_first or time.perf_counter() - started
            num_tokens = output.metrics.num_output_tokens
        return Answer(num_tokens, to_first)

    answer_over_pipe(pipe, {"AsyncLLM": ask}, asyncio.new_event_loop(), lambda name: llm.metrics()[name])
    llm.shutdown()


def client_process(pipe: Connection, url: str, kind: str) -> None:
    def read_metric(name: str) -> float:
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            found = re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    client = RawClient(url) if kind == "raw" else OpenAIClient(url)
    asks: dict[str, Ask] = {"HTTP, streamed": client.streamed, "HTTP, whole": client.whole}
    answer_over_pipe(pipe, asks, asyncio.new_event_loop(), read_metric)


def body_of(prompt: str, max_tokens: int, *, is_streamed: bool) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    return body | ({"stream": True, "stream_options": {"include_usage": True}} if is_streamed else {})


class RawClient:
    """HTTP/1.1 on a socket for each request: what a client costs at least."""

    def __init__(self, url: str) -> None:
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port

    async def streamed(self, prompt: str, max_tokens: int) -> Answer:
        return await self._ask(body_of(prompt, max_tokens, is_streamed=True), b"data: ")

    async def whole(self, prompt: str, max_tokens: int) -> Answer:
        return await self._ask(body_of(prompt, max_tokens, is_streamed=False), b'"usage"')

    async def _ask(self, body: dict[str, Any], sign_of_tokens: bytes) -> Answer:
        started, to_first, text = time.perf_counter(), 0.0, b""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        while read := await reader.read(1 << 16):
            text += read
            if not to_first and sign_of_tokens in text:
                to_first = time.perf_counter() - started
        writer.close()
        assert text.startswith(b"HTTP/1.1 200"), text
        return Answer(_num_tokens(text), to_first)


def _num_tokens(text: bytes) -> int:
    return int(re.findall(rb'"completion_tokens": ?(\d+)', text)[-1])


class OpenAIClient:
    """The official package."""

    def __init__(self, url: str) -> None:
        from openai import AsyncOpenAI

        self._client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    async def streamed(self, prompt: str, max_tokens: int) -> Answer:
        started, to_first, num_tokens = time.perf_counter(), 0.0, 0
        body: Any = body_of(prompt, max_tokens, is_streamed=True)
        async for chunk in await self._client.completions.create(model=await self._model(), **body):
            to_first = to_first or time.perf_counter() - started
            num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
        return Answer(num_tokens, to_first)

    async def whole(self, prompt: str, max_tokens: int) -> Answer:
        started = time.perf_counter()
        body: Any = body_of(prompt, max_tokens, is_streamed=False)
        answer = await self._client.completions.create(model=await self._model(), **body)
        return Answer(answer.usage.completion_tokens, time.perf_counter() - started)

    async def _model(self) -> str:
        if not hasattr(self, "_name"):
            self._name = (await self._client.models.list()).data[0].id
        return self._name


# --- what is started --------------------------------------------------------------------------------------------------


class Server:
    """A fly-serve process, which `profile` has write what its event loop did."""

    def __init__(self, engine_dir: Path, profile: Path | None) -> None:
        command = [sys.executable, "-m", "fly_trt.cli.serve"]
        if profile is not None:
            command[1:1] = ["-m", "cProfile", "-o", str(profile)]
        self._process = subprocess.Popen(
            [*command, str(engine_dir), "--port", "0", "--no-access-log"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r" at (http://\S+?):? ", line):
                self.url = found[1]
                return
        raise SystemExit("fly-serve did not start")

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


class Asker:
    """A process that asks."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments))
        self._process.start()
        assert self._pipe.recv() == "ready"

    def round(self, way: str, prompts: Sequence[str], max_tokens: int, in_flight: int) -> Round:
        self._pipe.send((way, prompts, max_tokens, in_flight))
        found = self._pipe.recv()
        assert isinstance(found, Round)
        return found

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


# --- what is measured -------------------------------------------------------------------------------------------------


class Figures:
    """Of one way, a value for each round. client_cpu and engine_cpu: processor seconds of a round in flight."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.firsts: list[float] = []
        self.firsts_outside: list[float] = []
        self.client_cpu: list[float] = []
        self.engine_cpu: list[float] = []
        self.num_tokens: set[int] = set()


def measure(settings: Settings, kind: str, num_rounds: int, profile: Path | None) -> dict[str, Figures]:
    figures = {way: Figures() for way in WAYS}
    with ExitStack() as stack:
        server = Server(settings.engine_dir, profile)
        stack.callback(server.close)
        runtime, client = Asker(runtime_process, settings.engine_dir), Asker(client_process, server.url, kind)
        for asker in (runtime, client):
            stack.callback(asker.close)
        askers = {way: runtime if way == "AsyncLLM" else client for way in WAYS}
        for way, asker in askers.items():
            asker.round(way, settings.prompts[: settings.in_flight], WARM_UP_TOKENS, settings.in_flight)
        for number in range(num_rounds):
            ways = WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]
            for way in ways:
                of_way, asker = figures[way], askers[way]
                cpu_before = server.cpu_seconds
                together = asker.round(way, settings.prompts, settings.max_tokens, settings.in_flight)
                of_way.rates.append(together.rate)
                if way == "AsyncLLM":
                    of_way.engine_cpu.append(together.cpu_seconds)
                else:
                    of_way.client_cpu.append(together.cpu_seconds)
                    of_way.engine_cpu.append(server.cpu_seconds - cpu_before)
                of_way.num_tokens.add(sum(answer.num_tokens for answer in together.answers))
            for way in ways[::-1]:
                alone = askers[way].round(way, settings.prompts[: settings.in_flight], settings.max_tokens, 1)
                figures[way].firsts += [answer.to_first for answer in alone.answers]
                figures[way].firsts_outside.append(alone.to_first_outside)
            said = (
                f"{way} {found.rates[-1]:.1f} tokens/s, {found.engine_cpu[-1]:.2f} s of CPU"
                for way, found in figures.items()
            )
            print(f"round {number + 1}: {'; '.join(said)}", file=sys.stderr, flush=True)
    return figures


def show(figures: dict[str, Figures], title: str) -> None:
    table = Table(title=title)
    columns = ("", "tokens/s", "range", "of AsyncLLM", "first token, ms", "outside, ms", "engine CPU, s", "client, s")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    own = figures["AsyncLLM"]
    for way, found in figures.items():
        # Rounds of the same number are compared, since they had the same neighbours on the machine.
        share = statistics.median(rate / ours for rate, ours in zip(found.rates, own.rates, strict=True))
        has_first = way != "HTTP, whole"
        table.add_row(
            way,
            f"{statistics.median(found.rates):.1f}",
            f"{min(found.rates):.1f} - {max(found.rates):.1f}",
            f"{100 * share:.1f} %",
            f"{1e3 * statistics.median(found.firsts):.1f}" if has_first else "",
            f"{1e3 * statistics.median(found.firsts_outside):.2f}" if has_first else "",
            f"{statistics.median(found.engine_cpu):.2f}",
            f"{statistics.median(found.client_cpu):.2f}" if found.client_cpu else "",
        )
    Console(width=120).print(table)
    same = len(set.union(*(found.num_tokens for found in figures.values()))) == 1
    print(f"{'the same' if same else 'NOT the same'} number of tokens in every round: {figures[WAYS[0]].num_tokens}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--in-flight", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--client", choices=["raw", "openai"], default="raw")
    parser.add_argument("--profile", type=Path, help="write a cProfile of the server here")
    arguments = parser.parse_args()
    prompts = [str(record.prompt) for record in read_prompts(EVAL_PROMPTS)[: arguments.prompts]]
    settings = Settings(arguments.engine_dir, prompts, arguments.max_tokens, arguments.in_flight)
    figures = measure(settings, arguments.client, arguments.rounds, arguments.profile)
    title = f"{settings.engine_dir}: {len(prompts)} prompts, {settings.in_flight} in flight, client {arguments.client}"
    show(figures, f"{title}, medians of {arguments.rounds} rounds")


if __name__ == "__main__":
    main()
