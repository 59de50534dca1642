#!/usr/bin/env python3
"""Kills a rank of an engine that spans several GPUs while it serves, and looks at what becomes of the others.

usage: plugins/check/kill_rank.py ENGINE_DIR [--times 10] [--seconds 60] [--json]

Each time the engine is loaded anew, a request runs, and a rank above 0 is killed at a random moment. The caller has to
be told in one line within --seconds, and no process of a rank may be left. The exit status is 1 where that is not so;
a caller that is never told ends the check with the stacks of all threads.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fly_trt import LLM, EngineError, FlyError, SamplingParams

PROMPT = "### Instruction:\nSpell out: 21.\n### Response:\n"
SEED = 16
LONGEST_PAUSE = 2.0  # seconds between the first request and the kill
END_SECONDS = 30.0  # for the processes to end after the caller was told


@dataclass
class Kill:
    """seconds: from the kill to the caller's being told; num_left: rank processes that did not end."""

    line: str
    seconds: float
    num_left: int
    passes: bool


def rank_processes() -> list[int]:
    """Of this process, zombies included."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = path.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            name = path.joinpath("cmdline").read_bytes()
            if parent == str(os.getpid()) and (b"fly_trt.engines.rank_process" in name or not name):
                found.append(int(path.name))
    return found


def kill_one(directory: Path, rng: random.Random, seconds: float) -> Kill:
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    killed_at: list[float] = []

    def kill() -> None:
        os.kill(rng.choice(rank_processes()), signal.SIGKILL)
        killed_at.append(time.monotonic())
        faulthandler.dump_traceback_later(seconds, exit=True)

    with LLM(directory) as llm:
        llm.generate(PROMPT, params)
        threading.Timer(rng.uniform(0, LONGEST_PAUSE), kill).start()
        try:
            while True:
                llm.generate([PROMPT, PROMPT], params)
        except EngineError as error:
            line = str(error)
        taken = time.monotonic() - killed_at[0]
    faulthandler.cancel_dump_traceback_later()
    deadline = time.monotonic() + END_SECONDS
    while rank_processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    num_left = len(rank_processes())
    return Kill(line, taken, num_left, passes="was killed by SIGKILL" in line and "\n" not in line and not num_left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0, help="in which the caller has to be told [60]")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng, kills = random.Random(SEED), []
    try:
        for _ in range(args.times):
            kills.append(kill := kill_one(args.engine_dir, rng, args.seconds))
            verdict = "ok" if kill.passes else "FAILED"
            print(f"{verdict}: {kill.num_left} left, told after {kill.seconds:.2f} s: {kill.line}", file=sys.stderr)
    except FlyError as error:
        parser.exit(2, f"kill_rank: {error}\n")
    if args.json:
        print(json.dumps([asdict(kill) for kill in kills], indent=2))
    sys.exit(not all(kill.passes for kill in kills))


if __name__ == "__main__":
    main()
