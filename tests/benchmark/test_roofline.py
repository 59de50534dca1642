"""What a step has to do at least, counted from the engine's graph, beside what it takes."""

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import safe_open

from fly_trt.benchmark.roofline import Machine, ModelCost, Roofline, run_roofline
from fly_trt.cli.bench import main
from fly_trt.errors import ConfigError

PAIR = Path(__file__).parents[1] / "assets" / "pair"


@pytest.fixture(scope="module", params=["demo_engine", "demo_int8_engine"])
def roofline(request: pytest.FixtureRequest) -> Roofline:
    return run_roofline(request.getfixturevalue(request.param), 2, None, lambda what, done, total: None)


def _linear_sizes(checkpoint: Path) -> list[tuple[int, int]]:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    output = "lm_head.weight" if "lm_head.weight" in shapes else "model.embed_tokens.weight"
    return [tuple(shape) for name, shape in shapes.items() if "_proj" in name or name == output]


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_token_is_multiplied_with_every_weight_of_every_linear_layer_once(roofline: Roofline, role: str) -> None:
    sizes = _linear_sizes(PAIR / role)
    num_weights = sum(rows * columns for rows, columns in sizes)
    cost = roofline.costs[role]
    if roofline.engines.manifest.target.quantization == "int8":
        assert cost.macs_per_token == {"int8": num_weights}
        num_scales = sum(rows for rows, _ in sizes)
        constants = cost.weight_bytes - num_weights - 4 * num_scales  # the products' other operands, a few bytes each
        assert 0 <= constants <= 8 * len(sizes)
    else:
        assert cost.macs_per_token == {"float32": num_weights}
        assert cost.weight_bytes == 4 * num_weights


def test_every_step_has_its_time_and_the_larger_limit(roofline: Roofline) -> None:
    assert {(step.role, step.batch_size, step.num_tokens) for step in roofline.steps} == {
        (role, *shape) for role in ("target", "draft") for shape in ((1, 1), (1, 16), (1, 64), (4, 1), (4, 16))
    }
    for step in roofline.steps:
        assert len(step.measured.rounds) == 2
        assert step.measured.min > 0
        assert step.limit_ms == max(step.memory_ms, step.arithmetic_ms) > 0


def test_limits_are_bytes_over_bandwidth_and_macs_over_rate() -> None:
    machine = Machine(memory_bandwidth=20e9, product_rates={"float32": 50e9, "int8": 100e9})
    cost = ModelCost(weight_bytes=200_000_000, macs_per_token={"float32": 10_000_000, "int8": 100_000_000})
    assert cost.memory_ms(machine) == pytest.approx(10)
    assert cost.arithmetic_ms(machine, 16) == pytest.approx(16 * (0.2 + 1.0))


def test_the_command_prints_machine_and_steps(demo_engine: Path) -> None:
    result = CliRunner().invoke(main, [str(demo_engine), "--roofline", "--rounds", "1", "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["machine"]["limits"]["memory_bandwidth"] > 1e8
    assert record["machine"]["limits"]["product_rates"].keys() == {"float32", "int8"}
    assert [step["num_tokens"] for step in record["steps"] if step["role"] == "draft"] == [1, 16, 64, 1, 16]
    table = CliRunner().invoke(main, [str(demo_engine), "--roofline", "--rounds", "1"])
    assert "GB/s" in table.stdout
    assert "1 x 16" in table.stdout


def test_engines_of_another_backend_and_flags_without_effect_are_refused(demo_engine: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(demo_engine, engine, copy_function=os.link)
    manifest = json.loads((engine / "fly.json").read_text())
    (engine / "fly.json").unlink()
    for backend in ("tensorrt", "onnxruntime"):
        (engine / "fly.json").write_text(json.dumps(manifest | {"backend": backend, "device": "cuda"}))
        with pytest.raises(ConfigError, match=f"built for {backend} on cuda: the limits of a GPU"):
            run_roofline(engine, 1, None, lambda what, done, total: None)
    for name, value in (("plot", "a.png"), ("modes", "fly"), ("num_prompts", "16"), ("preset", "paper")):
        result = CliRunner().invoke(main, [str(demo_engine), "--roofline", f"--{name.replace('_', '-')}", value])
        assert result.exit_code == 2
        assert f"{name}: has no effect with --roofline" in result.stderr
