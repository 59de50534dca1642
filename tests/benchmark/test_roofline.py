"""What a step has to do at least, counted from the engine's graph, beside what it takes."""

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import safe_open

from fly_trt.benchmark.measure import BenchmarkConfig
from fly_trt.benchmark.roofline import Roofline, run_roofline
from fly_trt.cli.bench import main
from fly_trt.errors import ConfigError

FEW = ("--roofline", "--rounds", "1", "--num-prompts", "1", "--max-tokens", "4")
PAIR = Path(__file__).parents[1] / "assets" / "pair"


@pytest.fixture(scope="module", params=["demo_engine", "demo_int8_engine"])
def roofline(request: pytest.FixtureRequest) -> Roofline:
    return run_roofline(request.getfixturevalue(request.param), 2, None, lambda what, done, total: None)


def _linear_sizes(checkpoint: Path) -> list[tuple[int, int]]:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    output = "lm_head.weight" if "lm_head.weight" in shapes else "model.embed_tokens.weight"
    return [tuple(shape) for name, shape in shapes.items() if "_proj" in name or name == output]


def _num_norm_weights(checkpoint: Path) -> int:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        return sum(file.get_slice(name).get_shape()[0] for name in file.keys() if "norm" in name)  # noqa: SIM118


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_token_is_multiplied_with_every_weight_of_every_linear_layer_once(roofline: Roofline, role: str) -> None:
    sizes = _linear_sizes(PAIR / role)
    num_weights = sum(rows * columns for rows, columns in sizes)
    cost = roofline.costs[role]
    if roofline.engines.manifest.target.quantization == "int8":
        assert cost.macs_per_token == {"int8": num_weights}
        num_scales = sum(rows for rows, _ in sizes)
        constants = cost.weight_bytes - num_weights - 4 * num_scales  # the products' other operands, a few bytes each
        norms = 4 * _num_norm_weights(PAIR / role)  # which are among them where a product takes in the norm before it
        assert 0 <= constants <= norms + 8 * len(sizes)
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


def test_a_mode_has_the_limit_of_the_steps_that_it_made(demo_engine: Path) -> None:
    config = BenchmarkConfig(modes=["autoregressive,exact"], num_prompts=2, rounds=2, max_tokens=12, perplexity=False)
    roofline = run_roofline(demo_engine, 1, None, lambda what, done, total: None, config=config)
    assert roofline.benchmark is not None
    plain, exact = roofline.modes
    assert (plain.mode, exact.mode) == ("autoregressive", "exact")
    tokens = [sum(row.num_output_tokens.rounds) for row in roofline.benchmark.rows]
    assert plain.num_steps == {"target": tokens[0]}  # the prompt's step brings the first one
    assert 0 < exact.num_steps["target"] < tokens[1]
    assert exact.num_steps["draft"] > 0
    for mode, steps in zip(roofline.modes, roofline.benchmark.steps, strict=True):
        assert sum(mode.measured_ms.values()) <= mode.total_ms
        limits = {
            role: sum(roofline.costs[role].limit_ms(roofline.machine, step.rows) for step in steps if step.role == role)
            for role in mode.num_steps
        }
        num_tokens = tokens[roofline.modes.index(mode)]
        assert mode.limit_ms == pytest.approx({role: limit / num_tokens for role, limit in limits.items()})
        assert mode.at_limit == pytest.approx(1e3 * num_tokens / sum(limits.values()))
        firsts = [step.rows for step in steps if step.role == "target" and step.rows[0].num_cached == 0]
        assert len(firsts) == 4  # prompts, whole, by rounds
        assert all(len(rows) == 1 for rows in firsts)


def test_steps_are_measured_behind_as_many_tokens_as_asked_for(demo_engine: Path) -> None:
    roofline = run_roofline(demo_engine, 1, None, lambda what, done, total: None, cached=[0, 700])
    assert roofline.modes == []
    own = [step for step in roofline.steps if step.role == "target"]
    assert [step.num_cached for step in own] == [0] * 5 + [700] * 5
    for short, long in zip(own[:5], own[5:], strict=True):
        assert (short.batch_size, short.num_tokens) == (long.batch_size, long.num_tokens)
        assert (short.weights_ms, short.products_ms) == (long.weights_ms, long.products_ms)
        assert long.cache_ms > short.cache_ms > 0
        assert long.attention_ms > short.attention_ms > 0
    longest = 2048 - 64
    with pytest.raises(ConfigError, match=f"cached_tokens 2000: .* max_seq_len 2048, expected 0 to {longest}"):
        run_roofline(demo_engine, 1, None, lambda what, done, total: None, cached=[2000])


def test_the_command_prints_machine_and_steps(demo_engine: Path) -> None:
    result = CliRunner().invoke(main, [str(demo_engine), *FEW, "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["machine"]["limits"]["memory_bandwidth"] > 1e8
    assert record["machine"]["limits"]["product_rates"].keys() == {"float32", "int8"}
    assert [mode["mode"] for mode in record["modes"]] == list(record["benchmark"]["settings"]["modes"])
    assert [step["num_tokens"] for step in record["steps"] if step["role"] == "draft"] == [1, 16, 64, 1, 16]
    table = CliRunner().invoke(main, [str(demo_engine), *FEW, "--modes", "fly"])
    assert "GB/s" in table.stdout
    assert "1 x 16" in table.stdout
    assert "at the limit" in table.stdout


def test_engines_of_another_backend_and_flags_without_effect_are_refused(demo_engine: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(demo_engine, engine, copy_function=os.link)
    manifest = json.loads((engine / "fly.json").read_text())
    (engine / "fly.json").unlink()
    for backend in ("tensorrt", "onnxruntime"):
        (engine / "fly.json").write_text(json.dumps(manifest | {"backend": backend, "device": "cuda"}))
        with pytest.raises(ConfigError, match=f"built for {backend} on cuda: the limits of a GPU"):
            run_roofline(engine, 1, None, lambda what, done, total: None)
    for name, value in (("plot", "a.png"), ("traces", "a.jsonl"), ("request_rate", "2"), ("devices", "0")):
        result = CliRunner().invoke(main, [str(demo_engine), "--roofline", f"--{name.replace('_', '-')}", value])
        assert result.exit_code == 2
        assert f"{name}: has no effect with --roofline" in result.stderr
    result = CliRunner().invoke(main, [str(demo_engine), "--cached-tokens", "100"])
    assert result.exit_code == 2
    assert "cached_tokens: has no effect without --roofline" in result.stderr
