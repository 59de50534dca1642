"""What fly-build calls of tensorrt_llm 1.2, written from the texts that fly_trt.integrations.tensorrt_llm.names lists:
the same modules, names and keywords, and no others. Each class says where it was read.

Networks are real ones of TensorRT-RTX and are really built; what that library lacks, a plugin layer, is an identity
layer that is marked. A model is five inputs and one matrix product, named as DecoderModelForCausalLM names them.
"""

import dataclasses
import enum
import json
import sys
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_rtx as trt

VOCAB_SIZE, HIDDEN = 896, 8
INPUTS = ("input_ids", "last_token_ids", "context_lengths", "host_context_lengths", "host_request_types")
LOGGER = trt.Logger(trt.Logger.ERROR)
built: list[dict[str, Any]] = []


# tensorrt_llm/mapping.py, as llm_args.py (2026-02) calls it.
@dataclasses.dataclass
class Mapping:
    world_size: int = 1
    rank: int = 0
    tp_size: int = 1


# tensorrt_llm/quantization: builder.py and llm_utils.py make members of the values that checkpoints name.
class QuantAlgo(enum.StrEnum):
    W8A16 = "W8A16"
    W4A16 = "W4A16"
    FP8 = "FP8"


# tensorrt_llm/models/modeling_utils.py (a text of 2025).
class SpeculativeDecodingMode(enum.Enum):
    NONE = 1
    DRAFT_TOKENS_EXTERNAL = 2


@dataclasses.dataclass
class QuantConfig:
    quant_algo: QuantAlgo | None = None
    kv_cache_quant_algo: QuantAlgo | None = None
    group_size: int = 128
    smoothquant_val: float = 0.5
    clamp_val: list[float] | None = None
    use_meta_recipe: bool = False
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    exclude_modules: list[str] | None = None
    mamba_ssm_cache_dtype: str | None = None


# tensorrt_llm/plugin/plugin.py (commit 035b99e0): context FMHA over pages is off unless it is asked for.
class PluginConfig:
    __slots__ = ("paged_kv_cache", "remove_input_padding", "use_paged_context_fmha")

    def __init__(self) -> None:
        self.paged_kv_cache = self.remove_input_padding = True
        self.use_paged_context_fmha = False


# tensorrt_llm/builder.py (a text of 2025).
@dataclasses.dataclass
class BuildConfig:
    max_input_len: int = 1024
    max_seq_len: int | None = None
    max_batch_size: int = 2048
    max_beam_width: int = 1
    max_num_tokens: int = 8192
    gather_context_logits: bool = False
    strongly_typed: bool = True
    max_draft_len: int = 0
    speculative_decoding_mode: SpeculativeDecodingMode = SpeculativeDecodingMode.NONE
    plugin_config: PluginConfig = dataclasses.field(default_factory=PluginConfig)


class Network:
    """tensorrt_llm/network.py keeps TensorRT's network as trt_network. This one is it, with plugin layers."""

    def __init__(self, real: Any) -> None:
        self.real, self.plugins, self.plugin_layers = real, [], set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def add_plugin_v3(self, inputs: list[Any], shape_inputs: list[Any], plugin: Any) -> Any:
        assert shape_inputs == []
        self.plugins.append(([tensor.name for tensor in inputs], plugin))
        self.plugin_layers.add(self.real.num_layers)
        return self.real.add_identity(inputs[0])


class Layer:
    """tensorrt_llm/graph_rewriting.py (commit 138f96d4): kinds of layers, no plugin of version 3 among them."""

    TRT_LAYER_TYPE_TO_LAYER: typing.ClassVar = {
        trt.LayerType.CAST: trt.ICastLayer,
        trt.LayerType.CONSTANT: trt.IConstantLayer,
        trt.LayerType.IDENTITY: trt.IIdentityLayer,
        trt.LayerType.MATRIX_MULTIPLY: trt.IMatrixMultiplyLayer,
        trt.LayerType.PLUGIN_V2: trt.IPluginV2Layer,
        trt.LayerType.SHUFFLE: trt.IShuffleLayer,
    }


def optimize(network: Network) -> None:
    """The same file: a pattern of attention plugins, for which every layer is looked at as its own class."""
    for index in range(network.num_layers):
        is_plugin = index in network.plugin_layers
        kind = trt.LayerType.PLUGIN_V3 if is_plugin else network.get_layer(index).type
        if kind not in Layer.TRT_LAYER_TYPE_TO_LAYER:
            raise NotImplementedError(f"Unknown layer type: {kind}")


_current: list[Network] = []


def default_trtnet() -> Network:
    assert _current, "Use builder to create network first"
    return _current[-1]


class Model:
    """tensorrt_llm/models/llama/model.py (commit a451bf93) and modeling_utils.py: forward is called while the network
    is the default one, and marks `logits`, after a cast to logits_dtype where that is another type."""

    def __init__(self, folder: str, dtype: str, mapping: Mapping, quant_config: QuantConfig, options: dict) -> None:
        self.mapping, self.record = mapping, {
            "folder": folder,
            "dtype": dtype,
            "mapping": mapping,
            "quant_config": quant_config,
            "options": options,
        }  # fmt: skip

    @classmethod
    def from_hugging_face(
        cls,
        hf_model_or_dir: str,
        dtype: str = "auto",
        mapping: Mapping | None = None,
        quant_config: QuantConfig | None = None,
        **kwargs: Any,
    ) -> "Model":
        assert kwargs.keys() <= {"use_parallel_embedding", "embedding_sharding_dim"}  # of PretrainedConfig
        assert (Path(hf_model_or_dir) / "config.json").is_file()
        assert mapping is not None
        assert quant_config is not None
        # Where the unified loader is off, models/{llama,qwen}/model.py make one of the class that they name, not of
        # `cls` (texts of 2024 and 2025).
        named = {known.__name__: known for known in (Model, Unplugged)}
        return named[cls.__name__](hf_model_or_dir, dtype, mapping, quant_config, kwargs)

    def default_plugin_config(self, **kwargs: Any) -> PluginConfig:
        return PluginConfig()

    def __call__(self, **inputs: Any) -> Any:
        return self.forward(**inputs)

    def forward(self, input_ids: Any, last_token_ids: Any, **others: Any) -> Any:
        network = default_trtnet().real
        hidden = network.add_cast(last_token_ids, trt.float32).get_output(0)
        column = network.add_shuffle(hidden)
        column.reshape_dims = (-1, 1)
        padded = -(-VOCAB_SIZE // self.mapping.tp_size) * self.mapping.tp_size
        self.weights = np.ones((1, padded), np.float32)
        head = network.add_constant(self.weights.shape, self.weights).get_output(0)
        plain = trt.MatrixOperation.NONE
        logits = network.add_matrix_multiply(column.get_output(0), plain, head, plain).get_output(0)
        network.mark_output(logits)
        logits.name = "logits"
        return logits


class Unplugged(Model):
    """A model whose network is not packed: it has other inputs."""

    def forward(self, input_ids: Any, last_token_ids: Any, **others: Any) -> Any:
        logits = super().forward(input_ids, last_token_ids, **others)
        last_token_ids.name = "position_ids"
        return logits


class Engine:
    """tensorrt_llm/builder.py (commit 47cb03ab): config.json with rank 0 alone."""

    def __init__(self, rank: int, plan: bytes) -> None:
        self.rank, self.plan = rank, plan

    def save(self, engine_dir: str) -> None:
        if self.rank == 0:
            Path(engine_dir, "config.json").write_text(json.dumps({"version": "1.2.1"}), encoding="utf-8")
        Path(engine_dir, f"rank{self.rank}.engine").write_bytes(self.plan)


def build(model: Model, build_config: BuildConfig) -> Engine:
    builder = trt.Builder(LOGGER)
    network = Network(builder.create_network(0))
    profile = builder.create_optimization_profile()
    inputs = {}
    for name in INPUTS:
        inputs[name] = network.real.add_input(name, trt.int32, (-1,))
        profile.set_shape(name, (1,), (4,), (64,))
    _current.append(network)
    try:
        model(**inputs)
    finally:
        _current.pop()
    optimize(network)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network.real, config)
    assert plan is not None
    outputs = [network.real.get_output(index) for index in range(network.real.num_outputs)]
    built.append(
        model.record
        | {
            "build_config": build_config,
            "class": type(model).__name__,
            "plugins": network.plugins,
            "outputs": [(tensor.name, tensor.dtype) for tensor in outputs],
        }
    )
    return Engine(model.mapping.rank, bytes(plan))


class Creator:
    """TensorRT's IPluginCreatorV3One; fields are read while it is called, and not kept."""

    @staticmethod
    def create_plugin(name: str, field_collection: Any, phase: Any) -> dict[str, Any]:
        assert phase == trt.TensorRTPhase.BUILD
        fields = {field.name: (field.type, np.array(field.data).tolist()) for field in field_collection}
        return {"name": name, "fields": fields}


class _Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:
        return self.creators.get((type, version, plugin_namespace))


@contextmanager
def installed(creators: dict[tuple[str, str, str], Any]) -> Iterator[list[dict[str, Any]]]:
    """tensorrt_llm, and as `tensorrt` the library that is there, whose plugin registry has the creators. Yields what
    was built."""
    registry = _Registry()
    registry.creators |= creators
    tensorrt = types.ModuleType("tensorrt")
    tensorrt.__dict__.update({name: getattr(trt, name) for name in dir(trt) if not name.startswith("__")})
    tensorrt.__version__ = "10.14.1.48"
    tensorrt.get_plugin_registry = lambda: registry
    models = {"LlamaForCausalLM": Model, "Unplugged": Unplugged}
    modules = {
        "tensorrt": tensorrt,
        "tensorrt_llm": types.ModuleType("tensorrt_llm"),
        "tensorrt_llm.builder": _module(build=build, BuildConfig=BuildConfig, Engine=Engine),
        "tensorrt_llm.mapping": _module(Mapping=Mapping),
        "tensorrt_llm.models": _module(MODEL_MAP=models),
        "tensorrt_llm.models.modeling_utils": _module(
            QuantConfig=QuantConfig, SpeculativeDecodingMode=SpeculativeDecodingMode
        ),
        "tensorrt_llm.quantization": _module(QuantAlgo=QuantAlgo),
        "tensorrt_llm.graph_rewriting": _module(Layer=Layer),
        "tensorrt_llm._common": _module(default_trtnet=default_trtnet),
    }
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    built.clear()
    kinds = dict(Layer.TRT_LAYER_TYPE_TO_LAYER)
    try:
        yield built
    finally:
        Layer.TRT_LAYER_TYPE_TO_LAYER.clear()
        Layer.TRT_LAYER_TYPE_TO_LAYER.update(kinds)
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _module(**names: Any) -> types.ModuleType:
    module = types.ModuleType("tensorrt_llm")
    module.__dict__.update(names)
    return module
