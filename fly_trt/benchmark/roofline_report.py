"""What a roofline found, as tables for people and as one object for machines."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from fly_trt.benchmark.model_cost import Machine, ModelCost
from fly_trt.benchmark.report import SCHEMA_VERSION, as_record, engine_record, machine_record, threads, version_record
from fly_trt.benchmark.roofline import ModeFigures, Roofline, StepFigures
from fly_trt.engines.directory import Role


def roofline_record(roofline: Roofline) -> dict[str, Any]:
    """Limits in bytes and MACs per second, what the models need of them, the steps in ms, and the modes in ms by output
    token, with what `fly-bench` says of them."""
    manifest, benchmark = roofline.engines.manifest, roofline.benchmark
    return {
        "schema_version": SCHEMA_VERSION,
        "engine": engine_record(roofline.engines),
        "machine": machine_record(roofline.engines) | {"limits": dataclasses.asdict(roofline.machine)},
        "versions": version_record(manifest),
        "costs": {
            role: {**dataclasses.asdict(cost), "weight_bytes": cost.weight_bytes, "macs_per_token": cost.macs_per_token}
            for role, cost in roofline.costs.items()
        },
        "steps": [{**dataclasses.asdict(step), "limit_ms": step.limit_ms} for step in roofline.steps],
        "modes": [dataclasses.asdict(mode) for mode in roofline.modes],
        "benchmark": None if benchmark is None else as_record(benchmark),
    }


def roofline_tables(roofline: Roofline) -> Group:
    return Group(_steps(roofline), *([_modes(roofline)] if roofline.modes else []))


def _steps(roofline: Roofline) -> Table:
    """A row for each step: medians with their range, beside the time that reading and arithmetic take at least."""
    caption = "; ".join(f"{role}: {_cost(cost)}" for role, cost in roofline.costs.items()) + threads(roofline.engines)
    table = Table(title=f"{roofline.engines.directory}: {_machine(roofline.machine)}", caption=caption)
    columns = ("engine", "rows x tokens", "cached", "measured ms", "weights + cache ms", "products + attention ms")
    for name in (*columns, "limit", "measured / limit"):
        table.add_column(name, justify="left" if name in ("engine", "limit") else "right")
    for step in roofline.steps:
        table.add_row(
            step.role,
            f"{step.batch_size} x {step.num_tokens}",
            str(step.num_cached),
            f"{step.measured.median:.2f} ({step.measured.min:.2f}-{step.measured.max:.2f})",
            f"{step.weights_ms:.2f} + {step.cache_ms:.2f}",
            f"{step.products_ms:.2f} + {step.attention_ms:.2f}",
            _limit(step),
            f"{step.measured.median / step.limit_ms:.2f}",
        )
    return table


def _modes(roofline: Roofline) -> Table:
    """A row for each mode and load, in ms by output token; in brackets what the steps that were made take at least."""
    loads = dict.fromkeys(mode.load for mode in roofline.modes)
    title = "modes, ms by output token (the same steps at their limits)"
    table = Table(title=f"{title}, {next(iter(loads))}" if len(loads) == 1 else title)
    for name in ("mode", *(["load"] if len(loads) > 1 else [])):
        table.add_column(name)
    for name in ("tokens/s", "at the limit", "limit / measured", "target", "drafts", "outside engines"):
        table.add_column(name, justify="right")
    for mode in roofline.modes:
        engines = sum(mode.measured_ms.values())
        table.add_row(
            mode.mode,
            *([mode.load] if len(loads) > 1 else []),
            f"{mode.tokens_per_second:.1f}",
            f"{mode.at_limit:.1f}",
            f"{mode.at_limit / mode.tokens_per_second:.2f}",
            _part(mode, {"target"}),
            _part(mode, mode.measured_ms.keys() - {"target"}),
            f"{mode.total_ms - engines:.2f}",
        )
    return table


def _part(mode: ModeFigures, roles: set[Role]) -> str:
    def total(by_role: Mapping[Role, float]) -> float:
        return sum(by_role.get(role, 0.0) for role in roles)

    return f"{total(mode.measured_ms):.2f} ({total(mode.limit_ms):.2f})" if roles else "-"


def _machine(machine: Machine) -> str:
    rates = ", ".join(
        f"{kind} products {rate / 1e9:.0f} GMAC/s ({_kernel(machine, rate)})"
        for kind, rate in machine.product_rates.items()
    )
    nominal = machine.nominal_int8_rate
    units = "" if nominal is None else f"; int8 units by number and clock up to {nominal / 1e9:.0f}"
    return f"memory {machine.memory_bandwidth / 1e9:.1f} GB/s, {rates}{units}"


def _kernel(machine: Machine, rate: float) -> str:
    """Whose rate it is."""
    return next(name for name, own in machine.kernels.items() if own == rate)


def _limit(step: StepFigures) -> str:
    """What it is that the step is limited by most."""
    if step.memory_ms > step.arithmetic_ms:
        return "weights" if step.weights_ms > step.cache_ms else "cache"
    return "products" if step.products_ms > step.attention_ms else "attention"


def _cost(cost: ModelCost) -> str:
    macs = " and ".join(f"{count / 1e6:.1f} M {kind}" for kind, count in cost.macs_per_token.items())
    text = f"{cost.weight_bytes / 1e6:.1f} MB of weights, {macs} MACs a token"
    vocabulary = sum(cost.vocabulary.macs.values()) / 1e6
    text += f", of them {vocabulary:.1f} M for the vocabulary"
    if cost.num_experts:
        text += f", {cost.experts_per_token} of {cost.num_experts} experts"
    return text
