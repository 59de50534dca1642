"""What was measured, as a table for people and as one object for machines."""

import dataclasses
import math
import os
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

import fly_trt
from fly_trt.benchmark.client import Load
from fly_trt.benchmark.machine_limits import cpu_info, matrix_instructions
from fly_trt.benchmark.measure import Benchmark
from fly_trt.benchmark.results import Row, Spread
from fly_trt.engines import find_backend
from fly_trt.engines.directory import LoadedEngines
from fly_trt.manifest import Manifest, ModelEngine
from fly_trt.params import SpeculativeConfig
from fly_trt.service.config import resolve_speculative_config
from fly_trt.service.setting import describe_setting

SCHEMA_VERSION = 1
NOTHING = "-"
MODE_WIDTH = 22  # columns of a terminal; a longer name goes on below
LIBRARIES = ("numpy", "tokenizers", "onnxruntime", "cuda-python")


def as_record(benchmark: Benchmark) -> dict[str, Any]:
    """Everything, figures of single rounds included, as JSON has it; an infinite request rate is "inf"."""
    config = benchmark.config
    given = (config.prompts and str(config.prompts)) or ("built-in" if config.random_tokens is None else "random")
    settings = {
        "prompts": given,
        "num_prompts": config.num_prompts,
        "num_checks": sum(prompt.check is not None for prompt in benchmark.prompts),
        **{name: getattr(config, name) for name in ("random_tokens", "chat", "max_tokens", "ignore_eos")},
        **{name: getattr(config, name) for name in ("temperature", "seed", "rounds", "perplexity")},
        "loads": [_load(load) for load in config.loads],
        "modes": {mode: _speculation(speculative) for mode, speculative in benchmark.modes.items()},
        "running": {mode: _setting(benchmark, mode) for mode in benchmark.modes},
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "engine": engine_record(benchmark.engines),
        "machine": machine_record(benchmark.engines),
        "versions": version_record(benchmark.engines.manifest),
        "settings": settings,
        "results": [{**dataclasses.asdict(row), "load": _load(row.load)} for row in benchmark.rows],
    }


def as_table(benchmark: Benchmark) -> Table:
    """A row for each mode, under the name of its load where there are several; medians, and the speeds with their range
    over the rounds. Columns without a figure are left out, which leaves about 120 columns of a terminal."""
    config = benchmark.config
    load = f", {config.loads[0]}" if len(config.loads) == 1 else ""
    times = f"median of {config.rounds} rounds" if config.rounds > 1 else "1 round"
    seconds = " and ".join(f"{role} {took:.1f} s" for role, took in benchmark.engines.load_seconds.items())
    default = _default(benchmark.engines.manifest)
    table = Table(
        title=f"{benchmark.engines.directory}: {config.num_prompts} prompts{load}, {times}",
        caption=f"engines loaded once: {seconds}{threads(benchmark.engines)}; default: {default}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    shown = [column for column in COLUMNS if any(column[1](row) != NOTHING for row in benchmark.rows)]
    table.add_column("mode", max_width=MODE_WIDTH, overflow="fold")
    for name, _ in shown:
        table.add_column(name, justify="right")
    last_load = config.loads[0] if len(config.loads) == 1 else None
    for row in benchmark.rows:
        if row.load != last_load:
            table.add_row(Text(str(row.load), "bold"))
            last_load = row.load
        # As texts, in which brackets are no markup.
        table.add_row(Text(row.mode.replace(",", ", ")), *(Text(figure(row)) for _, figure in shown))
    return table


def threads(engines: LoadedEngines) -> str:
    """The CPU threads that compute, as the end of a caption; nothing where a GPU does."""
    return f"; {engines.threads}" if engines.threads else ""


def _number(spread: Spread | None, form: str) -> str:
    return NOTHING if spread is None else format(spread.median, form)


def _rate(spread: Spread | None) -> str:
    if spread is None:
        return NOTHING
    digits = 0 if spread.median >= 100 else 1
    if len(spread.rounds) == 1:
        return f"{spread.median:.{digits}f}"
    return f"{spread.median:.{digits}f} ({spread.min:.{digits}f}-{spread.max:.{digits}f})"


def _milliseconds(spread: Spread | None) -> str:
    return _number(spread, ".0f" if spread is not None and spread.median >= 100 else ".1f")


def _factor(spread: Spread | None) -> str:
    return NOTHING if spread is None else f"{spread.median:.2f}x"


def _by_source(row: Row) -> str:
    """Where there are several sources, a line for each."""
    figures = [f"{source} {spread.median:.2f}" for source, spread in row.accepted_by_source.items()]
    return "\n".join(figures) if len(figures) > 1 else NOTHING


def _over_exact(row: Row) -> str:
    """Where there is no plain decoding to compare it with."""
    return NOTHING if row.speed_up_over_autoregressive is not None else _factor(row.speed_up_over_exact)


def _right(row: Row) -> str:
    if row.right_answers is None:
        return NOTHING
    interval = row.right_answers_interval
    shares = "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return f"{row.right_answers.median:g}/{row.num_checks}{shares}"


def _common_prefix(row: Row) -> str:
    """Where no answers are right or wrong."""
    return NOTHING if row.num_checks else _number(row.common_prefix_with_autoregressive, ".0%")


def _loosened(row: Row) -> str:
    return NOTHING if row.mean_acceptance_length is None else _number(row.loosened_per_100, ".1f")


def _perplexity(row: Row) -> str:
    """As above."""
    if row.nll_per_token is None or row.perplexity_over_autoregressive is not None:
        return NOTHING
    return f"{math.exp(row.nll_per_token.median):.3f}"


def _percentiles(row: Row) -> str:
    medians = [_milliseconds(s) for s in (row.inter_token_latency_ms_p50, row.inter_token_latency_ms_p99)]
    return NOTHING if NOTHING in medians else " / ".join(medians)


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("tokens/s", lambda row: _rate(row.tokens_per_second)),
    ("over\nAR", lambda row: _factor(row.speed_up_over_autoregressive)),
    ("over\nexact", _over_exact),
    ("accept.\nlength", lambda row: _number(row.mean_acceptance_length, ".2f")),
    ("accepted\nby source", _by_source),
    ("loose\n/ 100", _loosened),
    ("TTFT\nms", lambda row: _milliseconds(row.time_to_first_token_ms)),
    ("ITL ms\np50 / p99", _percentiles),
    ("right [95 %]", _right),
    ("same\nas AR", lambda row: _number(row.same_as_autoregressive, ".0%")),
    ("prefix\nas AR", _common_prefix),
    ("ppl\nratio", lambda row: _number(row.perplexity_over_autoregressive, ".3f")),
    ("ppl", _perplexity),
)


def _speculation(config: SpeculativeConfig) -> dict[str, Any]:
    return {"method": None} if config.method is None else dataclasses.asdict(config)


def _setting(benchmark: Benchmark, mode: str) -> str:
    """One line."""
    return str(describe_setting(benchmark.engines.manifest, benchmark.modes[mode]))


def _default(manifest: Manifest) -> str:
    """What the engine runs where nobody says otherwise, and what fly-tune found of it."""
    return str(describe_setting(manifest, resolve_speculative_config(manifest, {})))


def _load(load: Load) -> dict[str, Any]:
    rate = load.request_rate
    return {
        "concurrency": load.concurrency,
        "request_rate": "inf" if rate is not None and math.isinf(rate) else rate,
    }


def engine_record(engines: LoadedEngines) -> dict[str, Any]:
    manifest = engines.manifest
    models = {"target": manifest.target, "draft": manifest.draft, "inner_draft": manifest.inner_draft}
    return {
        "directory": str(engines.directory),
        "name": manifest.name,
        "backend": manifest.backend,
        "limits": manifest.limits.model_dump(),
        **{role: _model(model) if model else None for role, model in models.items()},
        "load_seconds": dict(engines.load_seconds),
    }


def _model(model: ModelEngine) -> dict[str, Any]:
    return {"dtype": model.dtype, "quantization": model.quantization, **model.source.model_dump()}


def machine_record(engines: LoadedEngines) -> dict[str, Any]:
    gpu = num_threads = None
    if find_backend(engines.directory, engines.manifest).is_gpu:
        from fly_trt.engines.cuda import device_name

        gpu = device_name()
    else:
        from fly_trt.engines.onnxruntime import num_pool_threads

        num_threads = num_pool_threads()
    return {
        "cpu": cpu_info().get("model name") or platform.processor() or platform.machine(),
        "instructions": matrix_instructions(),
        "num_cores": os.cpu_count(),
        "gpu": gpu,
        "num_threads": num_threads,
        "platform": platform.platform(),
    }


def version_record(manifest: Manifest) -> dict[str, str]:
    found = {"fly-trt": fly_trt.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    plan = manifest.target.tensorrt
    return found | ({plan.library: plan.version} if plan else {})
