"""How a worker of tools/bench_peers.py talks: a line of JSON per prompt on stdin, a line of JSON per answer on stdout.

Workers run in their peers' own environments, so this module knows nothing but the standard library. It is also where
the clock runs, so that the seconds of every peer cover the same work: from the prompt's text to the answer's text.
"""

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
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


class Completion(NamedTuple):
    """prompt_token_ids: what the peer made of the prompt, to see that all peers read the same. token_ids: the new
    tokens, the end-of-sequence token included. first_token_seconds: since the start, where the library tells."""

    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    first_token_seconds: float | None = None


class Session(Protocol):
    """A loaded model, or pair of models, that decodes greedily and one prompt at a time."""

    libraries: tuple[str, ...]

    def generate(self, prompt: str, max_tokens: int) -> Completion: ...


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


def _answer(session: Session, prompt: str, max_tokens: int) -> dict[str, Any]:
    started = time.perf_counter()
    completion = session.generate(prompt, max_tokens)
    seconds = time.perf_counter() - started
    return {
        **completion._asdict(),
        "seconds": seconds,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
