"""What serving through Triton costs: streams one after another and side by side, beside the Python runtime.

Starts a tritonserver (tools/tritonserver) on a repository that fly-triton's code writes for ENGINE_DIR, and measures in
one run, rounds interleaved: tokens per second of all prompts as gRPC streams one after another and all at once, the
same through LLM in this process, the time to a stream's first tokens and to its last, and how soon the slot of a client
that went away is free. Prompts are those of the demo pair's evaluation set; medians of the rounds.
"""

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fly_trt import LLM, SamplingParams
from fly_trt.benchmark.workload import read_prompts
from fly_trt.serving.triton.repository import make_plan, write_model
from triton_server import TritonServer

EVAL_PROMPTS = Path(__file__).parents[1] / "tests" / "assets" / "pair" / "eval.jsonl"


class Measurement:
    """`rates`: tokens per second of each way, a figure a round; the others are seconds."""

    def __init__(self, engine_dir: Path, prompts: list[str], max_tokens: int) -> None:
        self.rates: dict[str, list[float]] = {}
        self.firsts: list[float] = []
        self.lasts: list[float] = []
        self.frees: list[float] = []
        self._engine_dir = engine_dir
        self._prompts = prompts
        self._max_tokens = max_tokens

    def run(self, server: TritonServer) -> None:
        """One round."""
        settings = {"max_tokens": self._max_tokens, "stream": True}
        connections = [server.connect() for _ in self._prompts]
        for connection in connections:
            connection.is_server_ready()  # connected before the clock runs
        started = time.perf_counter()
        alone = [server.stream("fly", connections[0], text_input=p, **settings).finish() for p in self._prompts]
        self._record("Triton, one after another", sum(len(stream.token_ids) for stream in alone), started)
        self.firsts += [stream.seconds[0] for stream in alone]
        self.lasts += [stream.seconds[-1] for stream in alone]
        started = time.perf_counter()
        pairs = zip(self._prompts, connections, strict=True)
        together = [server.stream("fly", connection, text_input=p, **settings) for p, connection in pairs]
        num_tokens = sum(len(stream.finish().token_ids) for stream in together)
        self._record("Triton, all at once", num_tokens, started)
        self.frees.append(self._seconds_to_free(server))
        params = SamplingParams(max_tokens=self._max_tokens)
        with LLM(self._engine_dir) as llm:  # loaded anew, so that it is not there while the server is measured
            llm.generate(self._prompts[:2], SamplingParams(max_tokens=8))
            started = time.perf_counter()
            outputs = [llm.generate(prompt, params)[0] for prompt in self._prompts]
            self._record("LLM, one after another", sum(o.metrics.num_output_tokens for o in outputs), started)
            started = time.perf_counter()
            outputs = llm.generate(self._prompts, params)
            self._record("LLM, all at once", sum(o.metrics.num_output_tokens for o in outputs), started)

    def _record(self, way: str, num_tokens: int, started: float) -> None:
        self.rates.setdefault(way, []).append(num_tokens / (time.perf_counter() - started))

    def _seconds_to_free(self, server: TritonServer) -> float:
        """From the end of a client's stream to the server's own word that no request runs."""
        stream = server.stream(text_input=self._prompts[0], max_tokens=1900, stream=True, end_id=-1)
        server.wait_for("num_requests_running", 1)
        threading.Thread(target=stream.disconnect).start()
        started = time.perf_counter()
        server.wait_for("num_requests_running", 0)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    prompts = [str(record.prompt) for record in read_prompts(EVAL_PROMPTS)[: arguments.streams]]
    measurement = Measurement(arguments.engine_dir, prompts, arguments.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        write_model(make_plan(arguments.engine_dir, repository), lambda done, total: None)
        with TritonServer(repository, Path(folder) / "server.log") as server:
            Measurement(arguments.engine_dir, prompts, arguments.max_tokens).run(server)  # warms up
            for _ in range(arguments.rounds):
                measurement.run(server)
    table = Table(title=f"{arguments.engine_dir}: {len(prompts)} prompts, median of {arguments.rounds} rounds")
    for column in ("", "tokens/s", "range"):
        table.add_column(column, justify="right" if column else "left")
    for way, values in measurement.rates.items():
        table.add_row(way, f"{statistics.median(values):.0f}", f"{min(values):.0f} - {max(values):.0f}")
    Console().print(table)
    first, last = (1e3 * statistics.median(seconds) for seconds in (measurement.firsts, measurement.lasts))
    print(f"a stream alone: first tokens after {first:.0f} ms, last after {last:.0f} ms (medians)")
    free = measurement.frees
    print(f"a client that goes away: its slot is free after {statistics.median(free):.2f} s, at most {max(free):.2f} s")


if __name__ == "__main__":
    main()
