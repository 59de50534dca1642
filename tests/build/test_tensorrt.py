"""TensorRT engines, really built by TensorRT-RTX, which needs no GPU for it: which layers they consist of, what the
manifest says of them, and that the graph they are made of computes what transformers computes.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import transformers
from click.testing import CliRunner

from fly_build import tensorrt_builder
from fly_build.checkpoint import open_checkpoint
from fly_build.cli import main
from fly_build.head import append_head
from fly_build.pipeline import Plan, build, make_plan
from fly_build.recipe import load_recipe
from fly_build.tensorrt_graph import attention_names, fix_cache_length
from fly_trt.engines.tensorrt_library import import_library
from fly_trt.errors import ConfigError, EngineError
from fly_trt.manifest import Dtype, Limits, read_manifest
from simulated_cuda import SimulatedCuda
from tiny_models import (
    MAX_SEQ_LEN,
    PAIR,
    SHAPE,
    TinyPair,
    add_demo_tokenizer,
    check_against_transformers,
    save_tiny,
    tiny_runner,
)
from traced_once import export_once

pytest.importorskip("tensorrt_rtx")

SMALL = {"max_seq_len": MAX_SEQ_LEN, "max_num_tokens": 64, "max_draft_len": 8}  # so that a trace serves several tests
TINY: dict[str, Any] = {**SHAPE, "vocab_size": 896}
HEAD_DIM = {"head_dim": 16}
WINDOW = {"sliding_window": 12}
CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", HEAD_DIM),
    "mistral": ("MistralConfig", WINDOW),
    "phi3": ("Phi3Config", {}),
    "gemma2": ("Gemma2Config", HEAD_DIM | WINDOW | {"query_pre_attn_scalar": 40}),
    "olmo2": ("Olmo2Config", {}),  # rotates in float32
}
NUM_LAYERS = TINY["num_hidden_layers"]


def _config(name: str, **changes: Any) -> Any:
    kind, fields = CONFIGS[name]
    return getattr(transformers, kind)(**TINY | fields | changes)


def _checkpoint(config: Any, folder: Path) -> Path:
    save_tiny(config, folder)
    add_demo_tokenizer(folder)
    return folder


def _plan(target: Path, output: Path, **fields: Any) -> Plan:
    flags = {"backend": "tensorrt", "tensorrt_library": "tensorrt_rtx", "target": str(target), **SMALL, **fields}
    return make_plan(load_recipe(None, flags), output)


def _silent(step: str, fraction: float) -> None:
    pass


@pytest.mark.parametrize("name", CONFIGS)
def test_the_graph_with_masks_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    """Run by ONNX Runtime in float32. TensorRT's parser reads the same operators."""
    model, runner, graph = tiny_runner(_config(name), tmp_path, attention="mask")
    check_against_transformers(model, runner)
    attentions = [node for node in graph.graph if node.op_type == "Attention"]
    assert len(attentions) == (0 if name == "gemma2" else NUM_LAYERS)
    for node in attentions:
        assert node.inputs[3] is not None
        assert [value for value in node.inputs[4:] if value is not None] == []
        assert dict(node.attributes.items()).keys() == {"scale"}


EVERYDAY_BUILDS: list[tuple[str, Dtype]] = [("llama", "bfloat16"), ("gemma2", "bfloat16"), ("llama", "float32")]
# What their graphs have of their own is tested above, every day; that the builder likes it, in a long run.
LONG_BUILDS: list[tuple[str, Dtype]] = [
    *((name, "bfloat16") for name in CONFIGS if name not in ("llama", "gemma2")),
    ("llama", "float16"),
]


@pytest.mark.parametrize(
    ("name", "dtype"), [*EVERYDAY_BUILDS, *(pytest.param(*build, marks=pytest.mark.long) for build in LONG_BUILDS)]
)
def test_engines_have_native_attention_and_cache_updates(name: str, dtype: Dtype, tmp_path: Path) -> None:
    checkpoint = _checkpoint(_config(name), tmp_path / "checkpoint")
    manifest = build(_plan(checkpoint, tmp_path / "engine", dtype=dtype), _silent)
    record = manifest.target.tensorrt
    assert record is not None
    native = 0 if name == "gemma2" or dtype == "float32" else NUM_LAYERS
    assert record.layers.model_dump(exclude={"total"}) == {
        "native_attention": native,
        "decomposed_attention": NUM_LAYERS - native,
        "kv_cache_update": 2 * NUM_LAYERS,
        "plugin": 0,
        "collective": 0,
    }
    assert record.layers.total > 100
    assert (manifest.target.dtype, manifest.target.kv_cache_dtype) == (dtype, dtype)


def test_every_attention_of_the_network_has_its_mask_and_the_count_of_valid_keys(tmp_path: Path) -> None:
    """TensorRT-RTX's parser drops the count; a causal triangle that it anchors at the first key would be wrong."""
    library, network, names = _parsed(tmp_path)
    made = tensorrt_builder._replace_attentions(library.trt, network, names)
    assert len(made) == NUM_LAYERS
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    inputs = {layer.name: layer for layer in layers if layer.type.name == "ATTENTION_INPUT"}
    read = {layer.get_input(i).name for layer in layers for i in range(layer.num_inputs) if layer.get_input(i)}
    assert len(inputs) == 2 * NUM_LAYERS  # the parser's are left, but nothing reads them
    for attention, name in zip(made, names, strict=True):
        assert attention.causal_kind == library.trt.CausalMaskKind.NONE
        assert attention.mask.name == name.mask
        assert attention.key_value_lengths.dtype == library.trt.int32
        assert [attention.get_input(i).name for i in range(3)] == [name.query, name.key, name.value]
        assert attention.get_output(0).name in read
        assert name.output not in read


def _parsed(tmp_path: Path) -> tuple[Any, Any, list[tensorrt_builder.AttentionNames]]:
    graph = _fixed_graph(tmp_path)
    builder = tensorrt_builder.EngineBuilder(import_library("tensorrt_rtx"), _sizes(), "float32", None, None)
    _, network = builder._parse(tmp_path / "fixed.onnx")
    return builder.library, network, attention_names(graph)


def _fixed_graph(tmp_path: Path) -> ir.Model:
    _, _, graph = tiny_runner(_config("llama"), tmp_path, attention="mask")
    fix_cache_length(graph, _sizes().cache_tokens)
    ir.save(graph, tmp_path / "fixed.onnx")
    return graph


@pytest.mark.parametrize(("max_draft_len", "max_num_tokens"), [(8, 9), (8, 64), (25, 26), (0, 1)])
def test_a_slot_has_room_for_the_longest_step_behind_the_last_draft(max_draft_len: int, max_num_tokens: int) -> None:
    limits = Limits(max_batch_size=4, max_seq_len=256, max_draft_len=max_draft_len, max_num_tokens=max_num_tokens)
    sizes = tensorrt_builder.Sizes.of(limits)
    longest = max(sizes.max_row_tokens, sizes.max_num_tokens)
    assert sizes.cache_tokens >= limits.max_seq_len + max_draft_len + longest


def _sizes() -> tensorrt_builder.Sizes:
    return tensorrt_builder.Sizes.of(Limits(max_batch_size=4, max_seq_len=128, max_draft_len=8, max_num_tokens=64))


def test_a_head_dimension_without_a_kernel_is_computed_in_parts_and_said(tmp_path: Path) -> None:
    checkpoint = _checkpoint(_config("llama", head_dim=12), tmp_path / "checkpoint")
    flags = ["--max-seq-len", "64", "--max-num-tokens", "64", "-o", str(tmp_path / "engine")]
    result = CliRunner().invoke(main, ["--target", str(checkpoint), "--backend", "tensorrt", *flags])
    assert result.exit_code == 0, result.output
    assert "warning: target: no kernel computes the attention of 2 of 2 layers whole" in result.stderr
    layers = read_manifest(tmp_path / "engine").target.tensorrt.layers  # type: ignore[union-attr]
    assert (layers.native_attention, layers.decomposed_attention) == (0, 2)


@pytest.fixture(scope="module", params=["bfloat16", pytest.param("float16", marks=pytest.mark.long)])
def demo_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo pair as a user builds it."""
    output = tmp_path_factory.mktemp("demo") / "engine"
    flags = ["demo", "--backend", "tensorrt", "--tensorrt-library", "tensorrt_rtx", "--dtype", request.param]
    result = CliRunner().invoke(main, [*flags, "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    return output


def test_the_demo_pair_is_compiled_whole_and_its_manifest_says_so(demo_engine: Path) -> None:
    manifest = read_manifest(demo_engine, verify_hashes=True)
    assert manifest.backend == "tensorrt"
    assert manifest.draft is not None
    for engine in (manifest.target, manifest.draft):
        record = engine.tensorrt
        assert record is not None
        assert (record.library, record.version) == ("tensorrt_rtx", manifest.library_versions["tensorrt_rtx"])
        assert (record.compute_capability, record.head, record.plugin_library) == ("8.0", "functions", None)
        assert record.layers.native_attention == engine.num_layers
        assert record.layers.decomposed_attention == 0
        assert record.layers.kv_cache_update == 2 * engine.num_layers
        assert record.cache_tokens >= manifest.limits.max_seq_len + manifest.limits.max_num_tokens
        assert record.max_row_tokens > manifest.limits.max_draft_len
    files = {path.relative_to(demo_engine).as_posix() for path in demo_engine.rglob("model*")}
    assert files == {"target/model.plan", "draft/model.plan"}, "the graph is only an intermediate file"


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops")
def test_timings_are_written_aside_and_renamed(tmp_path: Path) -> None:
    """TensorRT-RTX has the calls but times nothing, so that only the file's way is seen here."""
    graph = _fixed_graph(tmp_path)
    timings = tmp_path / "folder" / "timings"
    for _ in range(2):
        builder = tensorrt_builder.EngineBuilder(import_library("tensorrt_rtx"), _sizes(), "float32", None, timings)
        builder.build(tmp_path / "fixed.onnx", attention_names(graph), NUM_LAYERS, lambda fraction: None)
        assert [path.name for path in timings.parent.iterdir()] == ["timings"]


def test_compiling_shows_progress_and_ends_at_ctrl_c(tiny_pair: TinyPair, tmp_path: Path) -> None:
    seen: list[float] = []

    def report(step: str, fraction: float) -> None:
        if step == "target: compile":
            seen.append(fraction)
            if 0 < fraction < 1:
                raise KeyboardInterrupt

    plan = _plan(tiny_pair.target, tmp_path / "engine")
    with pytest.raises(KeyboardInterrupt):
        build(plan, report)
    assert len(seen) == 2
    assert list(tmp_path.iterdir()) == []

    seen.clear()
    build(plan, lambda step, fraction: seen.append(fraction) if step == "target: compile" else None)
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    assert seen == sorted(seen)
    assert len(set(seen)) > 3


def test_profiles_cover_decode_verification_and_prefill() -> None:
    sizes = _sizes()
    assert list(sizes.profiles()) == [
        ((1, 1, 1), (2, 1, 1), (4, 1, 1)),
        ((1, 2, 1), (2, 16, 16), (4, 16, 16)),
        ((1, 1, 1), (1, 64, 1), (1, 64, 64)),
    ]
    assert sizes.cache_tokens == 256  # 128 + 8 drafts + the longest step of 64, in whole blocks


def test_with_plugins_the_head_is_two_nodes_that_the_parser_finds_by_name(tmp_path: Path) -> None:
    save_tiny(_config("llama"), tmp_path)
    graph = export_once(open_checkpoint(str(tmp_path)), MAX_SEQ_LEN, attention="mask").model
    append_head(graph, 3, [2], form="plugins")
    assert len(graph.functions) == 0
    gate, accept = (node for node in graph.graph if node.domain == "fly")
    assert (gate.op_type, accept.op_type) == ("EntropyGate", "LooseWindowAccept")
    attributes = {name: attribute.value for name, attribute in gate.attributes.items()}
    assert attributes == {"plugin_namespace": "fly", "plugin_version": "2", "top_k": 3}
    assert [len(gate.inputs), len(gate.outputs), len(accept.inputs), len(accept.outputs)] == [2, 7, 11, 2]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "plugins of RTX": ({"plugin_library": "libfly_plugins.so"}, "tensorrt_rtx has no plugin layers: leave it out"),
    "timings of RTX": ({"timing_cache": "file"}, "tensorrt_rtx times nothing while it builds: leave it out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_tensorrt_cannot_build_is_refused_at_once(case: str, tiny_pair: TinyPair, tmp_path: Path) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        _plan(tiny_pair.target, tmp_path / "engine", **fields)


def test_a_library_that_is_not_installed_is_named_with_its_extra(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(EngineError, match=r"tensorrt_rtx: not installed: pip install 'fly-trt\[tensorrt-rtx\]'"):
        _plan(tiny_pair.target, tmp_path / "engine")
    with pytest.raises(EngineError, match="tensorrt and tensorrt_rtx: not installed"):
        import_library()


@pytest.mark.parametrize("field", ["tensorrt_library", "plugin_library", "timing_cache"])
def test_flags_of_tensorrt_are_refused_for_another_backend(field: str) -> None:
    value = "tensorrt_rtx" if field == "tensorrt_library" else "file"
    with pytest.raises(ConfigError, match=f"{field}: belongs to backend tensorrt.*, got backend 'onnxruntime'"):
        load_recipe(None, {"target": str(PAIR / "target"), field: value})


@pytest.mark.parametrize(("found", "is_warned"), [((9, 0), True), ((10, 0), True), ((8, 9), False), ((12, 0), False)])
def test_a_build_for_rtx_cards_on_a_machine_with_another_gpu_is_warned_of(
    found: tuple[int, int],
    is_warned: bool,
    tiny_pair: TinyPair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu = SimulatedCuda()
    gpu.compute_capability = found
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=gpu))
    _plan(tiny_pair.target, tmp_path / "engine")
    said = [record.message for record in caplog.records if "--tensorrt-library tensorrt" in record.message]
    assert len(said) == is_warned
    assert all(f"compute capability {found[0]}.{found[1]}" in message for message in said)


def test_the_default_dtype_is_the_backends(tiny_pair: TinyPair, tmp_path: Path) -> None:
    for flags, dtype in (({}, "bfloat16"), ({"backend": "onnxruntime", "tensorrt_library": None}, "float32")):
        (model,) = _plan(tiny_pair.target, tmp_path / "engine", **flags).models
        assert model.engine.dtype == dtype


def test_a_graph_that_the_parser_refuses_is_an_error_with_its_reason(tmp_path: Path) -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    node = ir.node("NoSuchOperator", [x])
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24}, name="broken")
    ir.save(ir.Model(graph, ir_version=11), tmp_path / "broken.onnx")
    builder = tensorrt_builder.EngineBuilder(import_library("tensorrt_rtx"), _sizes(), "float32", None, None)
    with pytest.raises(EngineError, match=r"cannot parse the graph: .*NoSuchOperator"):
        builder.build(tmp_path / "broken.onnx", [], 0, lambda fraction: None)
