"""`--backend tensorrt-llm`: a directory that TensorRT-LLM's server and LLM API are started from, and what it refuses.

Nothing here has TensorRT-LLM: its keys are held against the table of names, and its programs are stand-ins that say how
they were called.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from click.testing import CliRunner

from fly_build.backends import tensorrt_llm as backend
from fly_build.cli import main
from fly_build.pipeline import build, make_plan
from fly_build.recipe import load_recipe
from fly_build.schema import SpeculativeMode
from fly_build.tensorrt_llm_files import HOOK, MODES_WITHOUT_DRAFT, TRITON_CONFIG
from fly_trt.errors import CheckpointError, ConfigError
from fly_trt.integrations.tensorrt_llm.environment import Acceptance
from fly_trt.integrations.tensorrt_llm.modes import check_mode
from fly_trt.integrations.tensorrt_llm.names import SERVE
from fly_trt.manifest import Manifest, read_manifest
from fly_trt.params import SpeculativeConfig
from tiny_models import PAIR, TinyPair, add_demo_tokenizer

# Which classes of llm_args.py the mappings of the YAML are.
TOP = ("BaseLlmArgs", "TorchLlmArgs")
CLASSES = {
    "kv_cache_config": ("KvCacheConfig",),
    "cuda_graph_config": ("CudaGraphConfig", "BaseCudaGraphConfig"),
    "speculative_config": (
        "DecodingBaseConfig",
        "EagleDecodingConfig",
        "Eagle3DecodingConfig",
        "MTPDecodingConfig",
        "DraftTargetDecodingConfig",
        "PARDDecodingConfig",
        "DFlashDecodingConfig",
        "SADecodingConfig",
    ),
}
PROGRAM = '#!/bin/sh\nenv | grep -e FLY_TRT -e LLM_CONFIG | sort\nfor argument in "$@"; do echo "$argument"; done\n'
# As the wheel's .pth file does where the variable is set.
AS_INSTALLED = f"import os, sys; os.environ.get('FLY_TRT_TRTLLM') and sys.modules.setdefault({HOOK!r}, sys)\n"
ABSENT = ["onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_llm"]
WITHOUT_GRAPHS = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); from fly_build.cli import main; main()"
GB = 1e9


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "installed_version", lambda: None)


def _build(output: Path, target: object = PAIR / "target", **fields: Any) -> Manifest:
    flags = {"target": str(target), "draft": str(PAIR / "draft"), "backend": "tensorrt-llm", "max_seq_len": 512}
    plan = make_plan(load_recipe(None, flags | fields), output)
    return build(plan, lambda step, fraction: None)


def _yaml(folder: Path, name: str = "tensorrt_llm.yaml") -> dict[str, Any]:
    return yaml.safe_load((folder / name).read_text(encoding="utf-8"))


def test_the_directory_says_what_is_served(tmp_path: Path) -> None:
    speculative = {"num_speculative_tokens": 12, "preset": "vllm", "fly_window_size": 8}
    manifest = _build(tmp_path / "engine", tp_size=2, max_batch_size=4, speculative=speculative)
    assert manifest == read_manifest(tmp_path / "engine", verify_hashes=True)
    assert (manifest.backend, manifest.device) == ("tensorrt-llm", "cuda")
    assert manifest.library_versions == {"tensorrt_llm": "1.3"}
    assert manifest.draft is not None
    for folder, model in (("target", manifest.target), ("draft", manifest.draft)):
        assert (model.model, model.tensor_parallel_size) == ("tensorrt_llm.yaml", 2)
        assert model.source.checkpoint == str(PAIR / folder)
    assert SpeculativeConfig.from_dict(manifest.speculative).method == "draft_model"
    assert manifest.limits.max_draft_len == 12
    assert _yaml(tmp_path / "engine") == {
        "model": str(PAIR / "target"),
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "max_batch_size": 4,
        "max_seq_len": 512,
        "max_num_tokens": 8192,
        "attn_backend": "TRTLLM",
        "cuda_graph_config": {"max_batch_size": 4, "enable_padding": True},
        "kv_cache_config": {"enable_block_reuse": True, "free_gpu_memory_fraction": 0.9, "dtype": "auto"},
        "speculative_config": {
            "decoding_type": "Draft_Target",
            "max_draft_len": 12,
            "speculative_model": str(PAIR / "draft"),
        },
        "enable_chunked_prefill": True,
    }
    assert _yaml(tmp_path / "engine", "triton.yaml") == _yaml(tmp_path / "engine") | {"triton_config": TRITON_CONFIG}


def _modes() -> list[tuple[str, SpeculativeMode]]:
    main: tuple[SpeculativeMode, ...] = ("draft_target", "eagle3", "mtp", "pard", "dflash", "sa")
    return [("1.2", "eagle3"), ("1.2", "mtp"), *(("1.3", mode) for mode in main)]


@pytest.mark.parametrize(("release", "mode"), _modes())
def test_every_key_is_in_the_table_of_names(release: str, mode: SpeculativeMode, tmp_path: Path) -> None:
    fields = {"draft": None} if mode in MODES_WITHOUT_DRAFT else {}
    manifest = _build(tmp_path / "engine", tensorrt_llm_release=release, speculative_mode=mode, **fields)
    assert manifest.library_versions == {"tensorrt_llm": release}
    in_release = {"1.2": "1.2", "1.3": "main"}[release]
    known = {name.name for name in SERVE if in_release in name.releases}

    def check(keys: dict[str, Any], owners: tuple[str, ...]) -> None:
        for key, value in keys.items():
            assert any(f"{owner}.{key}" in known for owner in owners), key
            if isinstance(value, dict):
                check(value, CLASSES[key])

    arguments = _yaml(tmp_path / "engine")
    check(arguments, TOP)
    speculative = arguments["speculative_config"]
    assert f"{check_mode(speculative, in_release).config}.decoding_type" in known
    assert speculative.get("max_draft_len", speculative.get("num_nextn_predict_layers")) == 15
    settings = SpeculativeConfig.from_dict(manifest.speculative)
    assert (settings.acceptance, settings.method is None) == ("fly", False)


def test_the_flag_of_the_server_is_in_the_table() -> None:
    (serve,) = [name for name in SERVE if name.file.endswith("serve.py")]
    assert "extra_llm_api_options" in serve.parameters


def test_1_2_reads_a_prompt_in_one_step(tmp_path: Path) -> None:
    head = {"speculative_mode": "eagle3", "tensorrt_llm_release": "1.2"}
    _build(tmp_path / "engine", max_num_tokens=64, **head)
    arguments = _yaml(tmp_path / "engine")
    assert arguments["max_num_tokens"] == 512
    assert "enable_chunked_prefill" not in arguments


def _programs(folder: Path, *names: str) -> dict[str, str]:
    """An environment whose PATH has stand-ins, and the Python of the tests beside them."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(PROGRAM, encoding="utf-8")
        (folder / name).chmod(0o755)
    (folder / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    (folder / "python3").chmod(0o755)
    (folder / "sitecustomize.py").write_text(AS_INSTALLED, encoding="utf-8")
    return {**os.environ, "PATH": f"{folder}:/usr/bin:/bin", "PYTHONPATH": str(folder)}


def test_the_start_script_sets_the_rule_and_starts_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "an engine"
    manifest = _build(folder, speculative={"preset": "paper", "fly_entropy_threshold": 0.25})
    environment = _programs(tmp_path / "bin", "trtllm-serve")
    command = [folder / "serve.sh", "--port", "8001"]
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = finished.stdout.splitlines()
    variables = dict(line.split("=", 1) for line in lines if "=" in line)
    acceptance = Acceptance.from_environment(variables)
    assert acceptance == Acceptance("paper", 0.25, None, tuple(manifest.head.stop_token_ids))
    assert lines[len(variables) :] == [
        str(PAIR / "target"), "--extra_llm_api_options", str(folder / "tensorrt_llm.yaml"), "--port", "8001"
    ]  # fmt: skip


def test_triton_reads_the_same_arguments_beside_models_of_its_own(tmp_path: Path) -> None:
    _build(tmp_path / "engine")
    environment = _programs(tmp_path / "bin", "tritonserver")
    model = tmp_path / "llmapi" / "tensorrt_llm" / "1"
    model.mkdir(parents=True)
    command = [tmp_path / "engine" / "triton.sh", tmp_path / "llmapi", "--http-port", "1"]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    (model / "model.py").touch()
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = finished.stdout.splitlines()
    assert f"LLM_CONFIG_PATH={tmp_path / 'engine' / 'triton.yaml'}" in lines
    assert lines[-4:] == ["--model-repository", str(tmp_path / "llmapi"), "--http-port", "1"]


@pytest.mark.parametrize("missing", ["trtllm-serve", "fly-trt"])
def test_the_start_script_says_what_is_missing(missing: str, tmp_path: Path) -> None:
    _build(tmp_path / "engine")
    environment = _programs(tmp_path / "bin", *({"trtllm-serve"} - {missing}))
    if missing == "fly-trt":
        # Without site-packages, where fly-trt's .pth may be.
        (tmp_path / "bin" / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', encoding="utf-8")
    finished = subprocess.run(
        [tmp_path / "engine" / "serve.sh"], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert missing in finished.stderr.splitlines()[-1]


@pytest.mark.parametrize(("script", "program"), [("serve.sh", "trtllm-serve"), ("triton.sh", "tritonserver")])
def test_a_checkpoint_that_has_moved_is_named(script: str, program: str, tmp_path: Path) -> None:
    """TensorRT-LLM would take its folder for a hub id."""
    shutil.copytree(PAIR / "draft", tmp_path / "a draft")
    _build(tmp_path / "engine", draft=str(tmp_path / "a draft"))
    environment = _programs(tmp_path / "bin", program)
    (tmp_path / "a draft").rename(tmp_path / "elsewhere")
    finished = subprocess.run(
        [tmp_path / "engine" / script], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1
    said = f"{script}: no such folder, build it again where it is now: {tmp_path / 'a draft'}\n"
    assert (finished.stdout, finished.stderr) == ("", said)


def test_exact_acceptance_leaves_the_server_as_it_is(tmp_path: Path) -> None:
    _build(tmp_path / "engine", speculative={"acceptance": "exact"})
    environment = _programs(tmp_path / "bin", "trtllm-serve") | Acceptance("vllm").to_environment()
    (tmp_path / "bin" / "sitecustomize.py").unlink()
    command = [tmp_path / "engine" / "serve.sh"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    variables = dict(line.split("=", 1) for line in finished.stdout.splitlines() if "=" in line)
    assert "FLY_TRT_TRTLLM" in variables
    assert Acceptance.from_environment(variables) is None


def test_it_needs_none_of_the_libraries_that_make_graphs(tmp_path: Path) -> None:
    """As in TensorRT-LLM's own environment."""
    for flags in ("-o", tmp_path / "engine"), ("--dry-run",), ("--engine", "--dry-run"):
        command = [sys.executable, "-c", WITHOUT_GRAPHS, "demo", "--backend", "tensorrt-llm", *map(str, flags)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
    assert read_manifest(tmp_path / "engine").draft is not None


def test_the_installed_release_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backend, "installed_version", lambda: "1.2.1")
    with pytest.raises(ConfigError, match=r"decoding_type Draft_Target of TensorRT-LLM 1\.2 does not take FLy"):
        _build(tmp_path / "engine")
    manifest = _build(tmp_path / "engine", speculative_mode="eagle3")
    assert manifest.library_versions == {"tensorrt_llm": "1.2.1"}
    assert "speculative_model_dir" in _yaml(tmp_path / "engine")["speculative_config"]


def test_a_draft_too_short_for_the_window_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for length, warned in ((7, False), (6, True)):
        caplog.clear()
        _build(tmp_path / str(length), speculative={"num_speculative_tokens": length})
        assert ("draft at least 7" in caplog.text) == warned


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no draft": (
        {"draft": None},
        "speculative_mode draft_target: there is no draft, .*: add --draft, or --spec",
    ),
    "a draft too many": (
        {"speculative_mode": "mtp"},
        "speculative_mode mtp: drafts without a draft model: leave",
    ),
    "a revision": (
        {"draft_revision": "abc"},
        "draft_revision 'abc': TensorRT-LLM's speculative_config has no rev",
    ),
    "an inner draft": ({"inner_draft": "org/small"}, "inner_draft: backend tensorrt-llm has no chains"),
    "a self-draft": ({"draft": None, "self_draft": True}, "self_draft: backend tensorrt-llm makes none"),
    "another drafter": (
        {"speculative": {"method": "multi_level"}},
        "speculative.method 'multi_level': .* has draft_",
    ),
    "lookup": (
        {"speculative": {"prompt_lookup_max": 3}},
        "speculative.prompt_lookup_max: TensorRT-LLM drafts by",
    ),
    "another rule": (
        {"speculative": {"acceptance": "margin"}},
        "speculative.acceptance 'margin': TensorRT-LLM has",
    ),
    "other numbers": ({"entropy_top_k": 5}, "entropy_top_k 5: FLy in TensorRT-LLM's PyTorch backend has its presets'"),
    "a plugin library": ({"plugin_library": "a"}, "plugin_library: belongs to backend tensorrt or tensorrt-llm-engine"),
    "a timing cache": ({"timing_cache": "a"}, "timing_cache: belongs to backend tensorrt, got"),
    "a library": ({"tensorrt_library": "tensorrt"}, "tensorrt_library: belongs to backend tensorrt, got"),
    "a CPU": ({"device": "cpu"}, "device 'cpu': engines of backend tensorrt-llm run on cuda"),
    "float32": ({"dtype": "float32"}, "dtype 'float32': TensorRT-LLM's kernels have 16 bits"),
    "no drafts": ({"max_draft_len": 0}, "max_draft_len 0: backend tensorrt-llm has no steps without drafts"),
    "a draft on one GPU": (
        {"tp_size": 2, "draft_tp_size": 1},
        "draft_tp_size 1: the draft is a part of the target's model",
    ),
    "three ranks": ({"tp_size": 3}, "tp_size 3: expected 1, or 2, 4, 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_setting_cannot_reach_is_refused_by_name(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        load_recipe(None, {"target": "org/target", "draft": "org/draft", "backend": "tensorrt-llm"} | fields)


@pytest.mark.parametrize("mode", ["draft_target", "pard", "dflash", "sa"])
def test_modes_that_do_not_take_it_are_refused_before_a_checkpoint_is_looked_for(mode: str) -> None:
    draft = {} if mode == "sa" else {"draft": "./gone"}
    flags = {"target": "./gone", "backend": "tensorrt-llm", "tensorrt_llm_release": "1.2", "speculative_mode": mode}
    with pytest.raises(ConfigError, match=r"of TensorRT-LLM 1\.2 does not take FLy"):
        make_plan(load_recipe(None, flags | draft), Path("nowhere"))


def test_weights_are_not_rounded_here(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization 'int8': .* rounds no weights.* or add --engine for int8"):
        _build(tmp_path / "engine", quantization="int8")


@pytest.mark.parametrize(
    ("method", "release", "message"),
    [
        ("awq", "1.3", "quantised by awq, and TensorRT-LLM main reads modelopt, fp8, compressed-tensors"),
        ("compressed-tensors", "1.2", "quantised by compressed-tensors, and TensorRT-LLM 1.2 reads modelopt, fp8:"),
        ("compressed-tensors", "1.3", None),
        ("fp8", "1.3", None),
    ],
)
def test_quantised_checkpoints_that_its_loader_reads(
    method: str, release: str, message: str | None, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    floats = {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}, "input_activations": None}
    described: dict[str, Any] = {
        "awq": {"version": "gemm", "bits": 4, "group_size": 128},
        "compressed-tensors": {"format": "float-quantized", "config_groups": {"group_0": floats}},
        "fp8": {"weight_block_size": [128, 128]},
    }[method]
    target = Path(shutil.copytree(tiny_pair.target, tmp_path / "target"))
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, **described}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    pair = {"target": target, "draft": str(tiny_pair.draft), "max_seq_len": 128}
    fields = {"tensorrt_llm_release": release, "speculative_mode": "eagle3" if release == "1.2" else "draft_target"}
    if message is None:
        assert _build(tmp_path / "engine", **pair, **fields).target.quantization == "fp8"
        return
    with pytest.raises(CheckpointError, match=message):
        _build(tmp_path / "engine", **pair, **fields)


def test_an_eagle3_head_is_known_by_its_architecture(tiny_pair: TinyPair, tmp_path: Path) -> None:
    draft = Path(shutil.copytree(tiny_pair.draft, tmp_path / "draft"))
    config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    (draft / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLMEagle3"]}))
    pair = {"target": tiny_pair.target, "draft": str(draft), "max_seq_len": 128}
    with pytest.raises(CheckpointError, match="is an EAGLE3 head: add --speculative-mode eagle3"):
        _build(tmp_path / "engine", **pair)
    for file in draft.glob("tokenizer*"):  # heads have none
        file.unlink()
    assert _build(tmp_path / "engine", **pair, speculative_mode="eagle3").draft is not None


def test_a_model_that_cannot_be_exported_is_served_all_the_same(tmp_path: Path, caplog: Any) -> None:
    """What computes it is TensorRT-LLM; only the memory of its ranks is not known here."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    other = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 896, "pad_token_id": 0}
    transformers.Glm4Config(**sizes, **other).save_pretrained(tmp_path / "t")
    add_demo_tokenizer(tmp_path / "t")
    flags = {"target": str(tmp_path / "t"), "draft": str(PAIR / "draft"), "backend": "tensorrt-llm", "tp_size": 2}
    plan = make_plan(load_recipe(None, flags), tmp_path / "engine", to_build=False)
    assert plan.gpus == []
    assert "how TensorRT-LLM spreads a glm4 over GPUs is not known here" in caplog.text
    with pytest.raises(CheckpointError, match="model type 'glm4' is not supported"):
        make_plan(load_recipe(None, flags | {"backend": "tensorrt"}), tmp_path / "engine", to_build=False)


LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072, "eos_token_id": 1}
SIZES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "405b": {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "intermediate_size": 53248},
}


@pytest.fixture(scope="module")
def fp8_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations and tokenizers of the fp8 checkpoints, and no weights."""
    folder = tmp_path_factory.mktemp("shapes")
    described = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    for name, sizes in SIZES.items():
        transformers.LlamaConfig(**LLAMA, **sizes, architectures=["LlamaForCausalLM"]).save_pretrained(folder / name)
        (folder / name / "hf_quant_config.json").write_text(json.dumps(described), encoding="utf-8")
        add_demo_tokenizer(folder / name)
    return folder


@pytest.mark.parametrize("form", [(), ("--engine",)], ids=["pytorch", "engine"])
def test_the_plan_of_405b_on_eight_gpus(form: tuple[str, ...], fp8_pair: Path) -> None:
    flags = ["llama-3.1-405b-trtllm", "--target", str(fp8_pair / "405b"), "--draft", str(fp8_pair / "8b"), *form]
    result = CliRunner().invoke(main, [*flags, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    target, draft = plan["models"]
    for model in (target, draft):
        assert (model["quantization"], model["kv_cache_quantization"]) == ("fp8", "fp8")
        assert len(model["other_ranks"]) == 7
    # A byte a linear weight, two for embeddings, head and norms, of which a rank has an eighth but of the norms.
    linear, plain = 126 * (2 * 16384 * (16384 + 1024) + 3 * 16384 * 53248), 2 * 128256 * 16384
    norms = (2 * 126 + 1) * 16384
    assert target["weight_bytes"] == linear // 8 + 2 * plain // 8 + 2 * norms
    tokens = -(-(8192 + 25) // 32) * 32
    assert target["kv_bytes_per_slot"] == tokens * 2 * 126 * 128  # one KV head a rank, a byte a value
    assert draft["kv_bytes_per_slot"] == tokens * 2 * 32 * 128
    assert [gpu["rank"] for gpu in plan["gpus"]] == list(range(8))
    for gpu in plan["gpus"]:
        assert gpu["weights"] == target["weight_bytes"] + draft["weight_bytes"]
        assert gpu["cache_per_slot"] == target["kv_bytes_per_slot"] + draft["kv_bytes_per_slot"]
        assert gpu["logits"] == 8 * 128256 * 16 * (26 + 1)
        assert gpu["total"] == gpu["weights"] + 16 * gpu["cache_per_slot"] + gpu["logits"] + gpu["scratch"]
        assert gpu["total"] / GB == pytest.approx(59.6, abs=0.1)
        assert gpu["fits_80_gb"]
    commands = "\n".join(plan["commands"])
    if form:
        assert "fly-build --backend tensorrt-llm --engine " in commands
        assert "--tp-size 8 --draft-tp-size 8 " in commands
        assert "--plugin-library $FLY_PLUGINS" in commands
    else:
        assert f"trtllm-serve {fp8_pair / '405b'} --extra_llm_api_options " in commands
        assert "engines/llama-3.1-405b-trtllm/serve.sh" in commands
    shown = CliRunner().invoke(main, [*flags, "--dry-run"], env={"COLUMNS": "150"})
    assert all(command in shown.stdout for command in plan["commands"])


def test_a_draft_on_the_first_gpu_counts_there_alone(fp8_pair: Path) -> None:
    flags = {"target": str(fp8_pair / "405b"), "draft": str(fp8_pair / "8b"), "engine": True, "draft_tp_size": 1}
    plan = make_plan(load_recipe("llama-3.1-405b-trtllm", flags), Path("nowhere"), to_build=False)
    first, *others = (gpu.memory for gpu in plan.gpus)
    assert len({memory.total for memory in others}) == 1
    assert first.weights - others[0].weights == plan.models[1].weight_bytes()
