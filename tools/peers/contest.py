"""The run of tools/bench_peers.py: who takes part, whose turn it is, and what came out.

Every mode of a peer in a precision is a contestant with a worker of its own. A contestant that fails keeps the reason
and leaves the run; the others go on.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fly_trt.benchmark.checks import Check, is_right
from peers.catalogue import FLY, Peer
from peers.environments import Preparation, PreparationError
from peers.protocol import Settings
from peers.worker import Worker, WorkerError

Question = str | list[list[int]]
# Threads of the worker that had its turn before may still spin, waiting for more work: OpenMP's by default as long as
# 0.2 s. They must be asleep before the next one is timed.
PAUSE_SECONDS = 0.3


@dataclass(frozen=True)
class Conditions:
    """The same for all contestants. engine: fly-trt's. timeout: seconds for loading, and for an answer. num_requests:
    prompts in flight at most."""

    target: Path
    draft: Path
    engine: Path
    max_tokens: int
    rounds: int
    threads: int
    num_assistant_tokens: int
    timeout: float
    num_requests: int = 1


@dataclass
class Contestant:
    """One mode of one peer in one precision. `answers`: a list a round, an answer a prompt; `reason`: why it did not
    run, or not to its end."""

    peer: Peer
    mode: str
    precision: str
    answers: list[list[dict[str, Any]]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    reason: str | None = None

    @property
    def name(self) -> str:
        return f"{self.peer.name} {self.mode} {self.precision}"

    def rates(self) -> list[float]:
        """Tokens per second of each round: new ones, or where prompts are read, those."""
        return [sum(map(_num_tokens, answers)) / sum(a["seconds"] for a in answers) for answers in self.answers]

    def record(self) -> dict[str, Any]:
        """Who it is, whatever it was asked."""
        record = {"peer": self.peer.name, "mode": self.mode, "precision": self.precision, "reason": self.reason}
        if self.reason is not None:
            return record
        memory = round(max(answer["peak_memory_mib"] for answers in self.answers for answer in answers))
        return record | {"peak_memory_mib": memory, "versions": self.versions}

    def readings(self) -> list[dict[str, Any]]:
        """What was read, by lengths and requests in flight; medians over the rounds."""
        if self.reason is not None:
            return []
        found = []
        for same in zip(*self.answers, strict=True):
            seconds, tokens = [a["seconds"] for a in same], [a["token_seconds"] for a in same]
            found.append(
                {name: same[0][name] for name in ("num_prompt_tokens", "num_requests")}
                | {"seconds": statistics.median(seconds), "seconds_by_round": seconds}
                | {"token_seconds": statistics.median(tokens), "token_seconds_by_round": tokens}
                | {"tokens_per_second": _num_tokens(same[0]) / statistics.median(seconds)}
            )
        return found

    def summary(self, checks: list[Check | None], reference: "Contestant | None") -> dict[str, Any]:
        """For people and machines; a check a prompt. Speed and the prompts' tokens are compared with `reference`'s."""
        summary = self.record()
        if self.reason is not None:
            return summary
        last, rates = self.answers[-1], self.rates()
        checked = [(check, a["text"]) for check, a in zip(checks, last, strict=True) if check is not None]
        firsts = [a["first_token_seconds"] for a in last if a["first_token_seconds"] is not None]
        summary |= {
            "tokens_per_second": statistics.median(rates),
            "tokens_per_second_range": [min(rates), max(rates)],
            "time_to_first_token": statistics.median(firsts) if firsts else None,
            "num_output_tokens": sum(len(a["token_ids"]) for a in last),
            "num_right": sum(is_right(check, text) for check, text in checked),
            "num_checked": len(checked),
            "texts": [a["text"] for a in last],
        }
        if reference is not None:
            pairs = zip(last, reference.answers[-1], strict=True)
            summary["ratio_to_fly"] = summary["tokens_per_second"] / statistics.median(reference.rates())
            summary["num_prompts_read_differently"] = sum(
                a["prompt_token_ids"] != b["prompt_token_ids"] for a, b in pairs
            )
        return summary


def _num_tokens(answer: dict[str, Any]) -> int:
    if "num_requests" in answer:
        return answer["num_requests"] * answer["num_prompt_tokens"]
    return len(answer["token_ids"])


class Run:
    """All contestants on all prompts: texts, or lists of token ids to be read together. What fails is left with its
    reason, and the others go on. `say` takes a line for each round and for each thing that is prepared."""

    def __init__(
        self, conditions: Conditions, prompts: Sequence[Question], folder: Path, say: Callable[[str], None]
    ) -> None:
        self._conditions = conditions
        self._prompts = prompts
        self._say = say
        self._logs = folder / "logs"
        self._preparation = Preparation(folder, say)

    def side_by_side(self, contestants: list[Contestant]) -> None:
        """All are loaded, and take turns prompt by prompt."""
        with contextlib.ExitStack() as stack:
            workers = {}
            for contestant in tqdm(contestants, desc="loading", unit="mode", disable=None, leave=False):
                with _kept_reason(contestant):
                    workers[contestant.name] = stack.enter_context(self._start(contestant))
            with self._progress(len(workers)) as progress:
                for number in range(self._conditions.rounds):
                    for contestant in contestants:
                        contestant.answers.append([])
                    for prompt in self._prompts:
                        for contestant in contestants:
                            if contestant.reason is None:
                                with _kept_reason(contestant):
                                    self._turn(contestant, workers[contestant.name], prompt)
                                if contestant.reason is not None:
                                    workers[contestant.name].stop()
                                progress.update()
                    self._say_round(number + 1, contestants)

    def one_at_a_time(self, contestants: list[Contestant]) -> None:
        """Each is loaded for its turn of a whole round: for models of which memory holds only one."""
        with self._progress(len(contestants)) as progress:
            for number in range(self._conditions.rounds):
                for contestant in contestants:
                    contestant.answers.append([])
                    if contestant.reason is None:
                        with _kept_reason(contestant), self._start(contestant) as worker:
                            for prompt in self._prompts:
                                self._turn(contestant, worker, prompt)
                                progress.update()
                self._say_round(number + 1, contestants)

    def _say_round(self, number: int, contestants: list[Contestant]) -> None:
        """A round may take half an hour, and only a terminal has a progress bar."""
        rates = [f"{each.name} {each.rates()[-1]:.1f}" for each in contestants if each.reason is None]
        left = [each.name for each in contestants if each.reason is not None]
        parts = [f"tokens/s of {', '.join(rates)}"] * bool(rates) + [f"left the run: {', '.join(left)}"] * bool(left)
        self._say(f"round {number} of {self._conditions.rounds}: {'; '.join(parts)}")

    def _start(self, contestant: Contestant) -> Worker:
        conditions, peer = self._conditions, contestant.peer
        target, draft = conditions.engine, conditions.draft
        if peer.name != FLY:
            target = self._preparation.model(peer, conditions.target, contestant.precision)
            draft = self._preparation.model(peer, conditions.draft, contestant.precision)
        settings = Settings(
            contestant.mode,
            contestant.precision,
            str(target),
            str(draft),
            conditions.threads,
            conditions.num_assistant_tokens,
            conditions.num_requests,
            not isinstance(self._prompts[0], str),
        )
        log = self._logs / f"{contestant.name.replace(' ', '-')}.log"
        worker = Worker(self._preparation.python(peer), peer.worker, settings, log, conditions.timeout)
        contestant.versions = worker.versions
        try:
            worker.ask(self._prompts[0], conditions.max_tokens, conditions.timeout)  # warms up
        except BaseException:
            worker.stop()
            raise
        return worker

    def _turn(self, contestant: Contestant, worker: Worker, prompt: Question) -> None:
        time.sleep(PAUSE_SECONDS)
        contestant.answers[-1].append(worker.ask(prompt, self._conditions.max_tokens, self._conditions.timeout))

    def _progress(self, num_contestants: int) -> tqdm:
        total = self._conditions.rounds * len(self._prompts) * num_contestants
        return tqdm(total=total, unit="answer", disable=None, leave=False)


@contextlib.contextmanager
def _kept_reason(contestant: Contestant) -> Iterator[None]:
    try:
        yield
    except (WorkerError, PreparationError, OSError) as error:
        contestant.reason = str(error)
