"""What a plan says of the memory of each GPU: for the recipes of models that no test can build, from nothing but their
configurations, on a machine without TensorRT, a GPU or weights.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from click.testing import CliRunner

from fly_build.cli import main
from fly_build.gpu_memory import CARD_BYTES
from fly_build.pipeline import build, make_plan
from fly_build.recipe import load_recipe
from tiny_models import add_demo_tokenizer, save_tiny, tiny_llama

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072, "eos_token_id": 1}
SIZES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "70b": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
    "405b": {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "intermediate_size": 53248},
}
WITHOUT_TENSORRT = (
    "import sys; sys.modules.update(dict.fromkeys(['tensorrt', 'tensorrt_rtx', 'cuda'])); "
    "from fly_build.cli import main; main()"
)
GB = 1e9


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with the configuration and a tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, sizes in SIZES.items():
        transformers.LlamaConfig(**LLAMA, **sizes).save_pretrained(folder / name)
        add_demo_tokenizer(folder / name)
    return folder


def _command(shapes: Path, recipe: str, target: str, *flags: str) -> list[str]:
    pair = ("--target", str(shapes / target), "--draft", str(shapes / "8b"))
    return [recipe, *pair, *flags, "--dry-run", "--json"]


def _dry_run(shapes: Path, recipe: str, target: str, *flags: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, _command(shapes, recipe, target, *flags))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


FP8_ON_TWO = ("--quantization", "fp8", "--tp-size", "2", "--draft-tp-size", "2")


@pytest.mark.parametrize(
    ("recipe", "target", "flags", "num_ranks", "weights"),
    [
        ("llama-3.1-70b", "70b", (), 4, 35.3),
        ("llama-3.1-70b", "70b", FP8_ON_TWO, 2, 36.3),
        ("llama-3.1-405b", "405b", (), 8, 51.3),
    ],
)
def test_recipes_of_large_models_fit_on_their_gpus(
    shapes: Path, recipe: str, target: str, flags: tuple[str, ...], num_ranks: int, weights: float
) -> None:
    plan = _dry_run(shapes, recipe, target, *flags)
    models = {Path(model["source"]["checkpoint"]).name: model for model in plan["models"]}
    assert models[target]["weight_bytes"] / GB == pytest.approx(weights, abs=0.1)
    assert [gpu["rank"] for gpu in plan["gpus"]] == list(range(num_ranks))
    for gpu in plan["gpus"]:
        assert gpu["weights"] == sum(model["weight_bytes"] for model in models.values())
        assert gpu["cache_per_slot"] == sum(model["kv_bytes_per_slot"] for model in models.values())
        assert (
            gpu["total"]
            == gpu["weights"] + plan["max_batch_size"] * gpu["cache_per_slot"] + gpu["logits"] + gpu["scratch"]
        )
        assert gpu["fits_80_gb"]
        assert gpu["most_slots_80_gb"] > plan["max_batch_size"]


def test_a_plan_needs_no_tensorrt(shapes: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TENSORRT, *_command(shapes, "llama-3.1-70b", "70b")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout) == _dry_run(shapes, "llama-3.1-70b", "70b")


def test_what_does_not_fit_is_said(shapes: Path) -> None:
    """405B in bfloat16 on eight GPUs."""
    plan = _dry_run(shapes, "llama-3.1-405b", "405b", "--quantization", "none")
    assert not any(gpu["fits_80_gb"] or gpu["most_slots_80_gb"] for gpu in plan["gpus"])


def test_a_draft_on_the_first_gpu_counts_there_alone(shapes: Path) -> None:
    first, *others = _dry_run(shapes, "llama-3.1-70b", "70b", "--draft-tp-size", "1")["gpus"]
    assert len({gpu["total"] for gpu in others}) == 1
    assert (first["weights"] - others[0]["weights"]) / GB == pytest.approx(16.06, abs=0.01)
    assert first["most_slots_80_gb"] < others[0]["most_slots_80_gb"]


def test_the_most_slots_are_those_with_which_it_still_fits(shapes: Path) -> None:
    def gpu(**fields: int) -> Any:
        target = {"target": str(shapes / "70b"), "draft": str(shapes / "8b")}
        return make_plan(load_recipe("llama-3.1-70b", target | fields), Path("nowhere"), to_build=False).gpus[0]

    most = gpu().most_slots
    assert gpu(max_batch_size=most).memory.fits
    assert not gpu(max_batch_size=most + 1).memory.fits
    assert gpu(max_batch_size=most).memory.total <= CARD_BYTES


def test_planned_weights_are_those_that_are_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    save_tiny(tiny_llama(vocab_size=896, hidden_size=512, num_attention_heads=8), tmp_path / "checkpoint")
    add_demo_tokenizer(tmp_path / "checkpoint")
    flags = {"backend": "tensorrt", "tensorrt_library": "tensorrt_rtx", "target": str(tmp_path / "checkpoint")}
    plan = make_plan(load_recipe(None, flags | {"tp_size": 2}), tmp_path / "engine")
    written: list[int] = []

    def report(step: str, fraction: float) -> None:
        if "compile" in step:
            written.extend(path.stat().st_size for path in tmp_path.rglob("model.onnx.data"))
            raise KeyboardInterrupt  # what is compiled is not asked here

    with pytest.raises(KeyboardInterrupt):
        build(plan, report)
    assert written == [pytest.approx(plan.models[0].weight_bytes(), rel=0.02)]


def test_the_table_has_a_row_for_each_gpu(shapes: Path) -> None:
    flags = ["llama-3.1-405b", "--target", str(shapes / "405b"), "--draft", str(shapes / "8b"), "--dry-run"]
    result = CliRunner().invoke(main, flags, env={"COLUMNS": "150"})
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if " GB" in line]
    assert [row[1] for row in rows[-8:]] == [str(rank) for rank in range(8)]
    assert all("yes" in row for row in rows[-8:])
