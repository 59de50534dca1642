"""How a worker of tools/bench_peers.py talks: a line of JSON per prompt on stdin, or for several prompts that are in
flight together, and a line of JSON per answer on stdout.

Workers run in their peers' own environments, so this module knows nothing but the standard library. It is also where
the clock runs, so that the seconds of every peer cover the same work: from the prompt's text to the answer's text.
"""

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True)
class Settings:
    """What a worker loads. target and draft: folders of models in the peer's own format, or fly-trt's engine."""

    mode: str
    precision: str
    target: str
    draft: str
    threads: int
    num_assistant_tokens: int
    num_requests: int = 1
    reads: bool = False
    """It is asked to read prompts, so many in flight, and not to complete one."""


class Completion(NamedTuple):
    """prompt_token_ids: what the peer made of the prompt, to see that all peers read the same. token_ids: the new
    tokens, the end-of-sequence token included. first_token_seconds: since the start, where the library tells."""

    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    first_token_seconds: float | None = None


class Reading(NamedTuple):
    """Of prompts in flight together: seconds until all of them have their first token, and of a token after it, for
    each of them."""

    seconds: float
    token_seconds: float

    @classmethod
    def of(cls, started: float, moments: Sequence[float]) -> "Reading":
        """moments: of the tokens of the prompt whose first one came last. Of the tokens the median counts."""
        gaps = [later - earlier for earlier, later in pairwise(moments)]
        return cls(moments[0] - started, median(gaps))


class Session(Protocol):
    """A loaded model, or pair of models, that decodes greedily: one prompt at a time, or token ids of as many as the
    settings say, all of one length, each with `num_tokens` tokens and no end before."""

    libraries: tuple[str, ...]

    def generate(self, prompt: str, max_tokens: int) -> Completion: ...

    def read(self, prompts: list[list[int]], num_tokens: int) -> Reading: ...


class UnavailableError(Exception):
    """This machine or this release does not offer what is asked. The message is the reason."""


def serve(load: Callable[[Settings], Session]) -> None:
    """Loads what sys.argv[1] says and answers prompts until stdin ends. Between prompts it waits in a read, so an
    idle worker costs memory but no time."""
    # Libraries print to stdout, also from C++: give them stderr and keep the real stdout for the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        session = load(Settings(**json.loads(sys.argv[1])))
        send({"versions": {name: version(name) for name in session.libraries}})
        for line in sys.stdin:
            send(_answer(session, **json.loads(line)))
    except UnavailableError as error:
        send({"unavailable": str(error)})
    except Exception as error:
        traceback.print_exc()
        first_line = (str(error).strip().splitlines() or [""])[0]
        send({"error": f"{type(error).__name__}: {first_line}"})


def _answer(session: Session, prompt: str | list[list[int]], max_tokens: int) -> dict[str, Any]:
    if not isinstance(prompt, str):
        reading = session.read(prompt, max_tokens)
        return {
            **reading._asdict(),
            "num_requests": len(prompt),
            "num_prompt_tokens": len(prompt[0]),
            "peak_memory_mib": _peak_memory_mib(),
        }
    started = time.perf_counter()
    completion = session.generate(prompt, max_tokens)
    seconds = time.perf_counter() - started
    return {
        **completion._asdict(),
        "seconds": seconds,
        "peak_memory_mib": _peak_memory_mib(),
    }


def _peak_memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
