"""`--backend tensorrt-llm --engine`: TensorRT-LLM 1.2's builder, of which a stand-in is called, and the plugin behind
the logits of networks that TensorRT-RTX really builds."""

import importlib
import importlib.metadata
import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorrt_rtx")

import stand_in_tensorrt_llm as stand_in
from fly_build.backends import tensorrt_llm_engine as backend
from fly_build.pipeline import build, make_plan
from fly_build.recipe import load_recipe
from fly_build.tensorrt_llm_engine import PLUGIN, put_behind_logits
from fly_trt.engines.tensorrt_library import PLUGIN_NAMESPACE, PLUGIN_VERSION
from fly_trt.errors import CheckpointError, ConfigError, EngineError
from fly_trt.manifest import Manifest, read_manifest
from stand_in_tensorrt_llm import BuildConfig, Creator, Mapping, QuantAlgo, QuantConfig, SpeculativeDecodingMode, trt
from tiny_models import PAIR, TinyPair

PROGRAMS = ("fly-build", "fly-generate")
FP8 = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"], "producer": {"name": "x"}}


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of what is installed, by distribution name."""
    installed = {"tensorrt-llm": "1.2.1"}
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "tensorrt-llm" and name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return installed


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of libfly_plugins.so, which nothing here loads."""
    path = tmp_path / "built" / "libfly_plugins.so"
    path.parent.mkdir()
    path.write_bytes(b"plugins")
    loaded: list[Path] = []
    monkeypatch.setattr(backend, "import_library", lambda name: _Library(loaded))
    return path


class _Library:
    version = "10.14.1.48"

    def __init__(self, loaded: list[Path]) -> None:
        self.load_plugins = loaded.append

    @property
    def trt(self) -> Any:
        return importlib.import_module("tensorrt")


@pytest.fixture
def built() -> Iterator[list[dict[str, Any]]]:
    with stand_in.installed({(PLUGIN, PLUGIN_VERSION, PLUGIN_NAMESPACE): Creator()}) as records:
        yield records


def _build(pair: TinyPair, output: Path, **fields: Any) -> Manifest:
    flags = {"target": str(pair.target), "draft": str(pair.draft), "backend": "tensorrt-llm", "engine": True}
    plan = make_plan(load_recipe(None, flags | {"max_draft_len": 8, "max_batch_size": 4} | fields), output)
    return build(plan, lambda step, fraction: None)


def test_the_plugin_takes_the_place_of_the_logits() -> None:
    """On a real network, which is built with it."""
    builder = trt.Builder(stand_in.LOGGER)
    network = stand_in.Network(builder.create_network(0))
    inputs = {name: network.real.add_input(name, trt.int32, (-1,)) for name in stand_in.INPUTS}
    stand_in._current.append(network)
    model = stand_in.Model("", "float16", Mapping(), QuantConfig(), {})
    try:
        model(**inputs)
    finally:
        stand_in._current.pop()
    put_behind_logits(network, "plugin")
    assert network.plugins == [(["target_logits", "last_token_ids", "input_ids", "context_lengths"], "plugin")]
    assert network.num_outputs == 1
    (output,) = [network.get_output(0)]
    last = network.get_layer(network.num_layers - 1)
    assert (output.name, last.get_output(0).name, last.get_input(0).name) == ("logits", "logits", "target_logits")
    assert output.dtype == trt.float32
    profile = builder.create_optimization_profile()
    for name in stand_in.INPUTS:
        profile.set_shape(name, (1,), (4,), (64,))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network.real, config) is not None


def test_a_pair_is_built_and_only_the_target_has_the_plugin(
    tiny_pair: TinyPair, built: list[dict[str, Any]], versions: dict[str, str], library: Path, tmp_path: Path
) -> None:
    manifest = _build(
        tiny_pair,
        tmp_path / "engine",
        plugin_library=str(library),
        tp_size=2,
        draft_tp_size=2,
        speculative={"preset": "vllm", "fly_entropy_threshold": 0.5, "num_speculative_tokens": 7},
    )
    assert manifest == read_manifest(tmp_path / "engine", verify_hashes=True)
    assert (manifest.backend, manifest.device) == ("tensorrt-llm-engine", "cuda")
    assert [manifest.target.model, *manifest.target.other_ranks] == ["target/rank0.engine", "target/rank1.engine"]
    assert manifest.draft is not None
    assert manifest.draft.tensor_parallel_size == 2
    assert {"libfly_plugins.so", "target/config.json", "draft/config.json"} <= manifest.files.keys()
    assert manifest.library_versions == {"tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48"}

    assert [(Path(record["folder"]), record["mapping"]) for record in built] == [
        (folder, Mapping(world_size=2, rank=rank, tp_size=2))
        for folder in (tiny_pair.target, tiny_pair.draft)
        for rank in (0, 1)
    ]
    for record in built:
        assert record["outputs"] == [("logits", trt.float32)]
        assert record["class"] == "Model"  # its own name, with the plugin too
        assert (record["dtype"], record["quant_config"]) == ("bfloat16", QuantConfig())
        assert record["options"] == {"use_parallel_embedding": True, "embedding_sharding_dim": 0}
    assert [len(record["plugins"]) for record in built] == [1, 1, 0, 0]
    ((inputs, plugin),) = built[1]["plugins"]
    assert inputs == ["target_logits", "last_token_ids", "input_ids", "context_lengths"]
    real, whole = trt.PluginFieldType.FLOAT64, trt.PluginFieldType.INT32
    assert plugin == {
        "name": PLUGIN,
        "fields": {
            "entropy_threshold": (real, [0.5]),
            "use_full_entropy": (whole, [0]),
            "entropy_top_k": (whole, [3]),
            "window": (whole, [6]),
            "lookahead": (whole, [6]),
            "vocab_size": (whole, [896]),
            "stop_token_ids": (whole, manifest.head.stop_token_ids),
        },
    }


def test_what_the_engines_are_built_for(
    tiny_pair: TinyPair, built: list[dict[str, Any]], versions: dict[str, str], tmp_path: Path
) -> None:
    """Rounds are prompts: a step holds a whole sequence and its drafts."""
    manifest = _build(tiny_pair, tmp_path / "engine", speculative={"acceptance": "exact"}, max_num_tokens=16)
    assert manifest.limits.model_dump() == {
        "max_batch_size": 4, "max_seq_len": 128, "max_draft_len": 8, "max_num_tokens": 136
    }  # fmt: skip
    config: BuildConfig = built[0]["build_config"]
    assert not built[0]["plugins"]
    plugins = config.plugin_config
    assert (plugins.use_paged_context_fmha, plugins.paged_kv_cache, plugins.remove_input_padding) == (True, True, True)
    expected = BuildConfig(
        max_input_len=128,
        max_seq_len=128,
        max_batch_size=4,
        max_num_tokens=136,
        max_draft_len=8,
        speculative_decoding_mode=SpeculativeDecodingMode.DRAFT_TOKENS_EXTERNAL,
        plugin_config=plugins,
    )
    assert config == expected


@pytest.mark.parametrize(("quantization", "algorithm"), [("int8", QuantAlgo.W8A16), ("int4", QuantAlgo.W4A16)])
def test_weights_alone_are_rounded(
    quantization: str,
    algorithm: QuantAlgo,
    tiny_pair: TinyPair,
    built: list[dict[str, Any]],
    versions: dict[str, str],
    tmp_path: Path,
) -> None:
    exact = {"acceptance": "exact"}
    manifest = _build(tiny_pair, tmp_path / "engine", quantization=quantization, speculative=exact)
    assert manifest.target.quantization == quantization
    assert [record["quant_config"] for record in built] == [QuantConfig(quant_algo=algorithm)] * 2


def test_a_quantised_checkpoint_says_how(
    tiny_pair: TinyPair, built: list[dict[str, Any]], versions: dict[str, str], tmp_path: Path
) -> None:
    target = Path(shutil.copytree(tiny_pair.target, tmp_path / "target"))
    (target / "hf_quant_config.json").write_text(json.dumps({"quantization": FP8}), encoding="utf-8")
    exact = {"acceptance": "exact"}
    manifest = _build(tiny_pair, tmp_path / "engine", target=str(target), speculative=exact)
    assert (manifest.target.quantization, manifest.target.kv_cache_quantization) == ("fp8", "fp8")
    assert manifest.draft is not None
    assert (manifest.draft.quantization, manifest.draft.kv_cache_quantization) == ("none", "none")
    expected = QuantConfig(quant_algo=QuantAlgo.FP8, kv_cache_quant_algo=QuantAlgo.FP8, exclude_modules=["lm_head"])
    assert [record["quant_config"] for record in built] == [expected, QuantConfig()]


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (
            {"quant_algo": "W4A16_AWQ", "group_size": 32, "kv_cache_quant_algo": "FP8"},
            "int4 weights with a KV cache of FP8",
        ),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}, "fp8 weights with a KV cache of INT8"),
    ],
)
def test_a_cache_that_blocks_cannot_be_reused_of_is_refused(
    described: dict[str, Any], message: str, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    """TensorRT-LLM's builder raises RuntimeError, after the weights have been read."""
    target = Path(shutil.copytree(tiny_pair.target, tmp_path / "target"))
    (target / "hf_quant_config.json").write_text(json.dumps({"quantization": described}), encoding="utf-8")
    flags = {"target": str(target), "backend": "tensorrt-llm", "engine": True}
    with pytest.raises(CheckpointError, match=message):
        make_plan(load_recipe(None, flags), tmp_path / "engine", to_build=False)


@pytest.mark.parametrize("found", [None, "1.1.0", "1.3.0rc4", "1.20.0"])
def test_another_release_is_refused_before_anything_is_read(
    found: str | None, tiny_pair: TinyPair, versions: dict[str, str], tmp_path: Path
) -> None:
    versions.clear()
    versions.update({} if found is None else {"tensorrt-llm": found})
    message = f"found {f'tensorrt_llm {found}' if found else 'no tensorrt_llm'}, expected 1.2.x, .*tensorrt_llm_env.sh"
    with pytest.raises(ConfigError, match=message):
        _build(tiny_pair, tmp_path / "engine", target=str(tmp_path / "gone"))


def test_a_loose_target_needs_the_plugin(tiny_pair: TinyPair, versions: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^plugin_library: FLy in TensorRT-LLM's engines is a plugin: add --plugin-"):
        _build(tiny_pair, tmp_path / "engine")


def test_a_library_without_the_plugin_is_an_error(
    tiny_pair: TinyPair, versions: dict[str, str], library: Path, tmp_path: Path
) -> None:
    """As one of an older fly-trt: before a checkpoint is looked for, and weights are read for an hour."""
    with stand_in.installed({}), pytest.raises(EngineError, match="PackedLooseAccept: not among TensorRT's plugins"):
        _build(tiny_pair, tmp_path / "engine", target="./gone", plugin_library=str(library))
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("OtherForCausalLM", "no engine of a OtherForCausalLM"), ("Unplugged", "has no last_token_ids: expected one of")],
)
def test_models_that_cannot_have_it(
    architecture: str,
    message: str,
    tiny_pair: TinyPair,
    built: list[dict[str, Any]],
    versions: dict[str, str],
    library: Path,
    tmp_path: Path,
) -> None:
    target = Path(shutil.copytree(tiny_pair.target, tmp_path / "target"))
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}), encoding="utf-8")
    with pytest.raises((CheckpointError, EngineError), match=message):
        _build(tiny_pair, tmp_path / "engine", target=str(target), plugin_library=str(library))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a mode": ({"speculative_mode": "mtp"}, "speculative_mode: belongs to backend tensorrt-llm, got"),
    "a release": ({"tensorrt_llm_release": "1.2"}, "tensorrt_llm_release: belongs to backend tensorrt-llm, got"),
    "a timing cache": ({"timing_cache": "file"}, "timing_cache: belongs to backend tensorrt, got"),
    "an inner draft": ({"inner_draft": "org/small"}, "inner_draft: backend tensorrt-llm-engine has no chains"),
    "a self-draft": ({"draft": None, "self_draft": True}, "self_draft: backend tensorrt-llm-engine makes none"),
    "another drafter": ({"speculative": {"method": "suffix"}}, "speculative.method 'suffix'.*multi_level and draft_"),
    "another rule": ({"speculative": {"acceptance": "typical"}}, "speculative.acceptance 'typical': TensorRT-LLM has"),
    "a guard": ({"speculative": {"exact_first": 2}}, "speculative.exact_first: TensorRT-LLM drafts by itself"),
    "many probabilities": ({"entropy_top_k": 9}, "entropy_top_k 9: the plugin looks at 8 at most"),
    "float32": ({"dtype": "float32"}, "dtype 'float32': TensorRT-LLM's attention has 16 bits"),
    "no drafts": ({"max_draft_len": 0}, "max_draft_len 0: backend tensorrt-llm-engine has no steps without drafts"),
    "a plugin for nothing": (
        {"plugin_library": "a", "speculative": {"fly_entropy_threshold": math.inf}},
        "plugin_library 'a': acceptance is exact, which needs no plugin",
    ),
    "a CPU": ({"device": "cpu"}, "device 'cpu': engines of backend tensorrt-llm-engine run on cuda"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_had_is_refused_by_name(case: str) -> None:
    fields, message = REFUSED[case]
    flags = {"target": "org/target", "draft": "org/draft", "backend": "tensorrt-llm", "engine": True}
    with pytest.raises(ConfigError, match=message):
        load_recipe(None, flags | fields)


def test_fp8_of_an_original_is_refused_with_what_makes_it(tmp_path: Path) -> None:
    flags = {"target": str(PAIR / "target"), "backend": "tensorrt-llm", "engine": True, "quantization": "fp8"}
    with pytest.raises(ConfigError, match=r"quantization 'fp8': TensorRT-LLM calibrates it.*hf_ptq.py --qformat fp8"):
        make_plan(load_recipe(None, flags), tmp_path / "engine", to_build=False)


def test_engine_belongs_to_tensorrt_llm() -> None:
    for backend_name in (None, "tensorrt"):
        with pytest.raises(ConfigError, match="engine: belongs to backend tensorrt-llm, got backend '"):
            load_recipe(None, {"target": "org/a", "backend": backend_name, "engine": True})
    own = {"target": "org/a", "backend": "tensorrt-llm-engine"}
    assert load_recipe(None, own) == load_recipe(None, own | {"backend": "tensorrt-llm", "engine": True})


def test_exact_match_needs_no_plugin(tiny_pair: TinyPair, tmp_path: Path) -> None:
    flags = {"target": str(tiny_pair.target), "backend": "tensorrt-llm", "engine": True}
    cases: tuple[tuple[dict[str, Any], bool], ...] = (
        ({"acceptance": "exact"}, False),
        ({"fly_entropy_threshold": math.inf}, False),
        ({"fly_entropy_threshold": 0.3}, True),
    )
    for speculative, has_plugin in cases:
        plan = make_plan(load_recipe(None, flags | {"speculative": speculative}), tmp_path / "engine", to_build=False)
        assert ("--plugin-library $FLY_PLUGINS" in plan.commands[1]) == has_plugin


def test_the_commands_of_a_plan_build_what_was_planned(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """Through two shells, with names that mean something to both, and what a recipe has and no flag."""
    folder = Path(shutil.copytree(tiny_pair.target, tmp_path / "it's $HOME"))
    recipe = tmp_path / "a recipe.yaml"
    content = {"target": str(folder), "backend": "tensorrt-llm", "entropy_top_k": 4, "max_batch_size": 3}
    recipe.write_text(json.dumps(content | {"speculative": {"preset": "vllm", "fly_entropy_threshold": 0.5}}))
    flags = {"engine": True, "max_draft_len": 9}
    planned = load_recipe(str(recipe), flags)
    plan = make_plan(planned, Path("an engine"), to_build=False)
    (tmp_path / "tools").mkdir()
    environment = tmp_path / "tools" / "tensorrt_llm_env.sh"
    environment.write_text('#!/bin/bash\n[ "$1" = make ] || exec bash -c "${*:2}"\n', encoding="utf-8")
    program = '#!/bin/bash\nfor word in "$@"; do echo "$word"; done >>"$SEEN"\n'
    for path, text in ((environment, environment.read_text()), *((tmp_path / n, program) for n in PROGRAMS)):
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    seen = tmp_path / "seen"
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SEEN": str(seen), "FLY_PLUGINS": "/plugins/libfly_plugins.so"}
    for command in plan.commands:
        subprocess.run(["sh", "-c", command], cwd=tmp_path, env=variables, check=True)
    words = seen.read_text(encoding="utf-8").splitlines()
    assert words[-2:] == ["an engine", "Tell me"]
    built, given = words[:-2], {}
    assert built[:3] == ["--backend", "tensorrt-llm", "--engine"]
    *pairs, file = built[3:]
    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        given[name.removeprefix("--").replace("-", "_")] = value
    assert (given.pop("_o"), given.pop("plugin_library")) == ("an engine", "/plugins/libfly_plugins.so")
    repeated = load_recipe(file, flags | given)
    assert repeated.speculative == planned.speculative
    assert (repeated.target, repeated.entropy_top_k) == (planned.target, planned.entropy_top_k)
    assert (repeated.max_batch_size, repeated.max_draft_len) == (3, 9)


def test_drafts_too_short_for_the_window_are_warned_of(
    tiny_pair: TinyPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {"target": str(tiny_pair.target), "backend": "tensorrt-llm", "engine": True}
    for length, speculative, warned in ((7, {}, False), (6, {}, True), (6, {"acceptance": "exact"}, False)):
        caplog.clear()
        fields = {"max_draft_len": length, "speculative": speculative}
        make_plan(load_recipe(None, flags | fields), tmp_path / "engine", to_build=False)
        assert ("max_draft_len 6: FLy loosens a token that 6 more of its draft follow" in caplog.text) == warned
