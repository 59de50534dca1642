#!/usr/bin/env python3
"""Runs the demo pair through engines of this machine's GPUs and compares its tokens with ONNX Runtime's on the CPU.

usage: plugins/check/engines.py [ENGINE ...] [--target CKPT] [--plugin-library FILE] [--prompts 60] [--engines DIR]
                                [--build-only] [--json]

    plugins/check/engines.py tensorrt_rtx-float32 tensorrt_rtx-float16 tensorrt_rtx-bfloat16      # the default
    plugins/check/engines.py tensorrt-bfloat16 tensorrt-bfloat16-int8 tensorrt-bfloat16-fp8 onnxruntime-float16
    plugins/check/engines.py tensorrt-bfloat16-tp4 --target CKPT                                  # on four GPUs

An ENGINE is LIBRARY-DTYPE[-QUANTIZATION][-tpN]; onnxruntime stands for its CUDA provider. Engines that DIR does not
hold yet are built into it, and so is the pair in float32 for ONNX Runtime on the CPU. TensorRT-RTX builds on any
machine, so that DIR can be made on one (--build-only) and checked on another. Then the same evaluation prompts are
decoded plainly, with exact speculation and with FLy, and each engine says which tokens it finds most probable at every
position of the prompts and of the CPU's plain answers.

It passes (exit status 0) when an engine answers at least 99 % as many prompts right as the CPU in every mode, and in
float32 also emits the same tokens for at least 99 % of the prompts, and finds the same tokens most probable, in the
same order, at 99 % of the positions, with log probabilities within 0.001; fewer bits break near ties otherwise.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from fly_trt import LLM, FlyError, RequestOutput, SamplingParams
from fly_trt.benchmark.checks import is_right
from fly_trt.benchmark.workload import BenchmarkPrompt, read_prompts
from fly_trt.engines.directory import LoadedEngines
from fly_trt.errors import ConfigError
from fly_trt.manifest import Dtype, Quantization
from fly_trt.text.prompts import Prompt
from fly_trt.tokens import FloatArray, IntArray

EVAL_PROMPTS = Path(__file__).resolve().parents[2] / "tests" / "assets" / "pair" / "eval.jsonl"
MODES: dict[str, dict[str, Any]] = {"plain": {"method": None}, "exact": {"acceptance": "exact"}, "FLy": {}}
ENGINES = ["tensorrt_rtx-float32", "tensorrt_rtx-float16", "tensorrt_rtx-bfloat16"]
REFERENCE = "cpu-float32"
MAX_TOKENS = 160
LEAST_SHARE = 0.99
MOST_DIFFERENCE = 1e-3  # of log probabilities in float32, nats


@dataclass
class Row:
    """One engine in one mode; `num_same` counts prompts with the reference's tokens, `first_difference` is the position
    of the first token that differs in any prompt."""

    engine: str
    mode: str
    num_prompts: int
    num_right: int
    num_same: int
    first_difference: int | None
    mean_acceptance_length: float
    tokens_per_second: float
    passes: bool = True


@dataclass
class TopRow:
    """The most probable tokens of one engine; `num_same` counts positions with the reference's tokens in its order, and
    `largest_difference` is that of their log probabilities, nats."""

    engine: str
    num_positions: int
    num_same: int
    largest_difference: float
    passes: bool


def build_engines(folder: Path, names: list[str], flags: dict[str, str | None]) -> dict[str, Path]:
    """The engine directories by name, the reference first; those that are missing are built. `flags` are those of
    fly-build that hold for all of them; a plugin library is for full TensorRT alone."""
    wanted = {REFERENCE: {"backend": "onnxruntime", "dtype": "float32"}} | {name: settings_of(name) for name in names}
    for name, settings in wanted.items():
        if not (folder / name / "fly.json").is_file():
            from fly_build.pipeline import build, make_plan
            from fly_build.recipe import load_recipe

            print(f"building {folder / name}", file=sys.stderr)
            shared = {k: v for k, v in flags.items() if k != "plugin_library" or name.startswith("tensorrt-")}
            build(make_plan(load_recipe("demo", shared | settings), folder / name), lambda step, fraction: None)
    return {name: folder / name for name in wanted}


def settings_of(name: str) -> dict[str, Any]:
    """The flags of fly-build that an engine's name stands for. Raises ConfigError for a name that is none."""
    library, *parts = name.split("-")
    if library not in ("tensorrt", "tensorrt_rtx", "onnxruntime") or not parts or parts[0] not in get_args(Dtype):
        raise ConfigError(f"{name}: expected LIBRARY-DTYPE[-QUANTIZATION][-tpN], such as tensorrt-bfloat16-int8-tp2")
    if library == "onnxruntime":
        settings: dict[str, Any] = {"backend": "onnxruntime", "device": "cuda"}
    else:
        settings = {"backend": "tensorrt", "tensorrt_library": library}
    settings["dtype"] = parts.pop(0)
    for part in parts:
        if part in get_args(Quantization):
            settings["quantization"] = part
        elif part[:2] == "tp" and part[2:].isdigit():
            settings["tp_size"] = int(part[2:])
        else:
            raise ConfigError(f"{name}: {part!r} is no quantization and no tpN")
    return settings


def check(engines: dict[str, Path], num_prompts: int) -> tuple[list[Row], list[TopRow]]:
    records = read_prompts(EVAL_PROMPTS)[:num_prompts]
    rows = []
    answers: list[RequestOutput] = []
    for mode, settings in MODES.items():
        reference: Row | None = None
        expected: list[RequestOutput] = []
        for name, directory in engines.items():
            outputs, seconds = _generate(directory, settings, [record.prompt for record in records])
            if reference is None:
                expected = outputs
                answers = answers or outputs
            row = _row(name, mode, records, outputs, expected, seconds)
            reference = reference or row
            row.passes = row.num_right >= LEAST_SHARE * reference.num_right
            if _is_full_precision(name):
                row.passes &= row.num_same >= LEAST_SHARE * row.num_prompts
            rows.append(row)
    return rows, check_top_tokens(engines, answers)


def _is_full_precision(name: str) -> bool:
    return "-float32" in name and not any(f"-{kind}" in name for kind in get_args(Quantization))


def check_top_tokens(engines: dict[str, Path], answers: list[RequestOutput]) -> list[TopRow]:
    texts = [np.array([*answer.prompt_token_ids, *answer.outputs[0].token_ids], np.int64) for answer in answers]
    (reference, (expected_ids, expected_logprobs)), *others = (
        (name, _top_tokens(directory, texts)) for name, directory in engines.items()
    )
    rows = [TopRow(reference, len(expected_ids), len(expected_ids), 0.0, passes=True)]
    for name, (ids, logprobs) in others:
        is_same = (ids == expected_ids).all(axis=-1)
        difference = float(np.abs(logprobs - expected_logprobs)[is_same].max(initial=0.0))
        num_same = int(is_same.sum())
        agrees = num_same >= LEAST_SHARE * len(ids) and difference <= MOST_DIFFERENCE
        rows.append(TopRow(name, len(ids), num_same, difference, passes=agrees or not _is_full_precision(name)))
    return rows


def _top_tokens(directory: Path, texts: list[IntArray]) -> tuple[IntArray, FloatArray]:
    """What the target finds most probable at each position of all texts: ids [n, k] and log probabilities [n, k]."""
    ids, logprobs = [], []
    with LoadedEngines(directory, max_batch_size=1) as engines:
        engine = engines.target
        for text in texts:
            tokens = text[: engine.info.max_num_tokens]
            step = engine.step(0, 1, len(tokens), with_top=True)
            step.set_row(0, 0, tokens)
            engine.run(step)
            assert step.top_ids is not None
            assert step.top_logprobs is not None
            ids.append(step.top_ids[0].copy())
            logprobs.append(step.top_logprobs[0].copy())
    return np.concatenate(ids), np.concatenate(logprobs)


def _generate(directory: Path, settings: dict[str, Any], prompts: list[Prompt]) -> tuple[list[RequestOutput], float]:
    params = SamplingParams(max_tokens=MAX_TOKENS)
    with LLM(directory, speculative_config=settings) as llm:
        llm.generate(prompts, params)  # kernels are compiled and graphs captured
        started = time.perf_counter()
        return llm.generate(prompts, params), time.perf_counter() - started


def _row(
    name: str,
    mode: str,
    records: list[BenchmarkPrompt],
    outputs: list[RequestOutput],
    expected: list[RequestOutput],
    seconds: float,
) -> Row:
    differences = [_first_difference(a, b) for a, b in zip(outputs, expected, strict=True)]
    found = [position for position in differences if position is not None]
    metrics = [output.metrics for output in outputs]
    steps = sum(m.num_spec_steps for m in metrics)
    return Row(
        engine=name,
        mode=mode,
        num_prompts=len(records),
        num_right=sum(
            r.check is not None and is_right(r.check, o.outputs[0].text) for r, o in zip(records, outputs, strict=True)
        ),
        num_same=len(records) - len(found),
        first_difference=min(found, default=None),
        mean_acceptance_length=1 + sum(m.num_accepted_tokens for m in metrics) / steps if steps else 1.0,
        tokens_per_second=sum(m.num_output_tokens for m in metrics) / seconds,
    )


def _first_difference(output: RequestOutput, expected: RequestOutput) -> int | None:
    ours, theirs = output.outputs[0].token_ids, expected.outputs[0].token_ids
    if ours == theirs:
        return None
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def _print(rows: list[Row]) -> None:
    table = Table(title="The demo pair against ONNX Runtime on the CPU in float32")
    for column in ("engine", "mode", "right", "same tokens", "first difference", "acceptance length", "tok/s", ""):
        table.add_column(column, justify="left" if column in ("engine", "mode") else "right")
    for row in rows:
        table.add_row(
            row.engine,
            row.mode,
            f"{row.num_right} of {row.num_prompts}",
            f"{row.num_same} of {row.num_prompts}",
            "" if row.first_difference is None else str(row.first_difference),
            f"{row.mean_acceptance_length:.2f}",
            f"{row.tokens_per_second:.0f}",
            "ok" if row.passes else "FAILED",
        )
    Console().print(table)


def _print_top_tokens(rows: list[TopRow]) -> None:
    table = Table(title="The most probable tokens")
    for column in ("engine", "same tokens", "largest difference", ""):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for row in rows:
        same, verdict = f"{row.num_same} of {row.num_positions}", "ok" if row.passes else "FAILED"
        table.add_row(row.engine, same, f"{row.largest_difference:.1e}", verdict)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ENGINE", default=ENGINES)
    parser.add_argument("--target", metavar="CKPT", help="in place of the demo's, with the same answers")
    parser.add_argument("--plugin-library", metavar="FILE", help="for the heads of full TensorRT's engines")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--engines", type=Path, metavar="DIR", help="where engines are kept [a temporary folder]")
    parser.add_argument("--build-only", action="store_true", help="build into --engines and stop; needs no GPU")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.build_only and args.engines is None:
        parser.error("--build-only: give --engines DIR to build into")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            flags = {"target": args.target, "plugin_library": args.plugin_library}
            engines = build_engines(args.engines or Path(temporary), args.names, flags)
            rows, top_rows = ([], []) if args.build_only else check(engines, args.prompts)
    except FlyError as error:
        parser.exit(2, f"engines: {error}\n")
    if args.json:
        report = {"modes": [asdict(row) for row in rows], "top_tokens": [asdict(row) for row in top_rows]}
        print(json.dumps(report, indent=2))
    elif rows:
        _print(rows)
        _print_top_tokens(top_rows)
    sys.exit(not all(row.passes for row in (*rows, *top_rows)))


if __name__ == "__main__":
    main()
