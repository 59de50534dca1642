"""What an answer is worth: by the checks of a prompts file, its reference answers, or else by how the target reads it.

A judge gives each answer a score from 0 to 1. The target's own plain greedy answers are scored in the same way and are
what a candidate's scores are compared with. It knows prompts and answers, and of engines only how to read with them.
"""

import json
import math
import shlex
import subprocess
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fly_trt.benchmark.checks import is_right
from fly_trt.benchmark.client import Exchange
from fly_trt.benchmark.likelihood import Likelihood
from fly_trt.benchmark.workload import BenchmarkPrompt
from fly_trt.errors import ConfigError

CHECKS, REFERENCES, COMMAND, AGREEMENT = "checks", "references", "command", "agreement"
DEFAULT_COMMAND_TIMEOUT = 600.0  # seconds, for all answers of a batch
PUNCTUATION = " \t\r\n.,;:!?\"'`*"  # around an answer: how it is set, and not what it is


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to judge. quality: what is kept, in words. caveats: what a claim does not say. is_binary: scores are always
    0 or 1."""

    quality: str
    is_binary: bool
    caveats: Sequence[str] = ()


KINDS: Mapping[str, Kind] = {
    CHECKS: Kind("right answers", is_binary=True),
    REFERENCES: Kind("answers that are their reference", is_binary=True),
    COMMAND: Kind("score", is_binary=False),
    AGREEMENT: Kind(
        "likelihood per token",
        is_binary=False,
        caveats=[
            "That says how probable the target finds the answers, and not whether they are right: they were not judged "
            "by checks or reference answers."
        ],
    ),
}


@dataclass(frozen=True, slots=True)
class Score:
    """value: from 0 to 1. log_likelihood: of the answer under the target, in nats, where it was read."""

    value: float
    log_likelihood: float | None = None


class Judge(Protocol):
    """Scores answers, each with the index of its prompt. The same answer has the same score."""

    @property
    def kind(self) -> str: ...

    def scores(self, answers: Sequence[tuple[int, Exchange]]) -> list[Score]: ...


def make_judge(
    prompts: Sequence[BenchmarkPrompt],
    likelihood: Likelihood,
    *,
    judge: str | None = None,
    score_command: str | None = None,
    command_timeout: float = DEFAULT_COMMAND_TIMEOUT,
) -> Judge:
    """A score_command where one is given, else what the prompts offer: checks, reference answers, else agreement with
    the target. judge: one of KINDS instead. Raises ConfigError where only a part of the prompts has what it takes."""
    kind = judge or choose_kind(prompts, has_command=score_command is not None)
    if kind not in KINDS:
        raise ConfigError(f"judge {kind!r}: expected one of {', '.join(KINDS)}")
    if (kind == COMMAND) != (score_command is not None):
        fix = "give the command" if kind == COMMAND else "leave out one of them"
        raise ConfigError(f"judge {kind!r} and score_command {score_command!r} do not go together: {fix}")
    if score_command is not None:
        return CommandJudge(prompts, score_command, command_timeout)
    if kind == AGREEMENT:
        return AgreementJudge(likelihood)
    wanted, missing = _OFFERS[kind][0], [n for n, prompt in enumerate(prompts, 1) if not _OFFERS[kind][1](prompt)]
    if missing:
        raise ConfigError(
            f"judge {kind!r}: {len(missing)} of {len(prompts)} prompts have no {wanted}, number {missing[0]} first: "
            "give each of them one, or choose another judge"
        )
    return CheckJudge(prompts) if kind == CHECKS else ReferenceJudge(prompts)


def choose_kind(prompts: Sequence[BenchmarkPrompt], *, has_command: bool = False) -> str:
    """The first of KINDS that all prompts are fit for. Raises ConfigError where some have a check or a reference answer
    and none of both is complete: nobody would expect that those are not looked at."""
    if has_command:
        return COMMAND
    counts = {kind: sum(map(has, prompts)) for kind, (_, has) in _OFFERS.items()}
    for kind, count in counts.items():
        if count == len(prompts):
            return kind
    if not any(counts.values()):
        return AGREEMENT
    kind = max(counts, key=lambda kind: counts[kind])
    wanted, has = _OFFERS[kind]
    first = next(number for number, prompt in enumerate(prompts, 1) if not has(prompt))
    raise ConfigError(
        f"{counts[kind]} of {len(prompts)} prompts have a {wanted}, number {first} has none: give each of them one, "
        f"leave out those without, or judge by {AGREEMENT!r}"
    )


class CheckJudge:
    """1 for an answer that passes its prompt's check, else 0."""

    kind = CHECKS

    def __init__(self, prompts: Sequence[BenchmarkPrompt]) -> None:
        self._checks = [prompt.check for prompt in prompts]

    def scores(self, answers: Sequence[tuple[int, Exchange]]) -> list[Score]:
        return [Score(float(self._is_right(index, answer.text))) for index, answer in answers]

    def _is_right(self, index: int, text: str) -> bool:
        check = self._checks[index]
        return check is not None and is_right(check, text)


class ReferenceJudge:
    """1 for an answer that is its prompt's reference, but for case, spaces, and marks around it, else 0."""

    kind = REFERENCES

    def __init__(self, prompts: Sequence[BenchmarkPrompt]) -> None:
        self._references = [normalised(prompt.reference or "") for prompt in prompts]

    def scores(self, answers: Sequence[tuple[int, Exchange]]) -> list[Score]:
        return [Score(float(normalised(answer.text) == self._references[index])) for index, answer in answers]


class AgreementJudge:
    """How probable the target finds the answer's tokens next to those that it would have chosen in their places: the
    geometric mean over the tokens of p(token) / p(most probable token), each given what comes before it in the answer.
    1 is what the target itself would have said."""

    kind = AGREEMENT

    def __init__(self, likelihood: Likelihood) -> None:
        self._likelihood = likelihood

    def scores(self, answers: Sequence[tuple[int, Exchange]]) -> list[Score]:
        """Answers of one prompt are read after another, since they mostly begin alike."""
        found: dict[int, Score] = {}
        for place in sorted(range(len(answers)), key=lambda place: answers[place][0]):
            exchange = answers[place][1]
            reading = self._likelihood.read(exchange.prompt_token_ids, exchange.token_ids)
            found[place] = Score(reading.quality, reading.log_likelihood)
        return [found[place] for place in range(len(answers))]


class CommandJudge:
    """What a command of the user's prints: a number from 0 to 1 for each line {"prompt", "reference", "output"} of JSON
    that it reads, in the same order. It is run once for a batch, without a shell, and asked once about each answer, so
    that the same text has the same score also where it is drawn by lot. timeout: seconds."""

    kind = COMMAND

    def __init__(self, prompts: Sequence[BenchmarkPrompt], command: str, timeout: float) -> None:
        self._prompts = prompts
        self._timeout = timeout
        self._known: dict[tuple[int, str], float] = {}
        try:
            self._arguments = shlex.split(command)
        except ValueError as error:
            raise ConfigError(f"score_command {command!r}: {error}: mend the quotes") from None
        if not self._arguments:
            raise ConfigError("score_command: expected a command such as 'python score.py'")

    def scores(self, answers: Sequence[tuple[int, Exchange]]) -> list[Score]:
        asked = list(dict.fromkeys((index, answer.text) for index, answer in answers))
        if new := [key for key in asked if key not in self._known]:
            self._known.update(zip(new, self._ask(new), strict=True))
        return [Score(self._known[index, answer.text]) for index, answer in answers]

    def _ask(self, answers: Sequence[tuple[int, str]]) -> list[float]:
        lines = [
            json.dumps({"prompt": self._prompts[n].prompt, "reference": self._prompts[n].reference, "output": text})
            for n, text in answers
        ]
        try:
            done = subprocess.run(
                self._arguments, input="\n".join([*lines, ""]).encode(), capture_output=True, timeout=self._timeout
            )
        except subprocess.TimeoutExpired:
            raise self._error(
                f"not done with {len(lines)} answers after {self._timeout:g} s: make it faster, or give it more time "
                "with --score-timeout"
            ) from None
        except OSError as error:
            raise self._error(f"{error.strerror}: give a program that can be run") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing on stderr"]
            how = f"exit status {done.returncode}" if done.returncode > 0 else f"ended by signal {-done.returncode}"
            raise self._error(f"{how}: {said[-1]}")
        printed = done.stdout.decode(errors="replace").split("\n")
        numbers = printed[:-1] if printed[-1].strip() == "" else printed
        if len(numbers) != len(lines):
            raise self._error(f"{len(numbers)} lines for {len(lines)} answers, expected a number from 0 to 1 for each")
        return [self._number(place, text.strip()) for place, text in enumerate(numbers, start=1)]

    def _number(self, place: int, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 <= number <= 1:
            raise self._error(f"line {place} of its output is {text[:40]!r}, expected a number from 0 to 1")
        return number

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"score_command {shlex.join(self._arguments)!r}: {problem}")


def normalised(text: str) -> str:
    """For comparing answers: compatible characters, no case, single spaces, and no marks around it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(PUNCTUATION)


# What a prompt must have to be judged so, in words and as a predicate; in the order in which they are preferred.
_OFFERS: Mapping[str, tuple[str, Callable[[BenchmarkPrompt], bool]]] = {
    CHECKS: ("check", lambda prompt: prompt.check is not None),
    REFERENCES: ("reference answer", lambda prompt: prompt.reference is not None),
}
