"""Engines of TensorRT-LLM 1.2, built by its own API: a checkpoint becomes its model, whose network gets FLy's plugin
behind the logits before it is compiled, one engine a rank.

It knows tensorrt_llm's names (names.py of fly_trt.integrations says where they were read) and one model at a time.
tensorrt_llm is imported by the functions that need it, and lives in an environment of its own.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fly_trt.engines.tensorrt_library import PLUGIN_NAMESPACE, PLUGIN_VERSION
from fly_trt.errors import CheckpointError, EngineError
from fly_trt.manifest import Dtype, Limits, Quantization
from fly_trt.verification import FlyPolicy

PLUGIN = "PackedLooseAccept"
MAX_STOP_TOKENS = 64
LOGITS = "logits"
RAW_LOGITS = "target_logits"
# Of the network, beside the logits, in the plugin's order.
PLUGIN_INPUTS = ("last_token_ids", "input_ids", "context_lengths")
WEIGHT_ONLY: dict[Quantization, str] = {"int8": "W8A16", "int4": "W4A16"}
QUANTIZED_CONFIG = "hf_quant_config.json"
# What of ModelOpt's description of a checkpoint QuantConfig has too.
QUANTIZED_FIELDS = ("group_size", "has_zero_point", "pre_quant_scale", "exclude_modules")


def find_creator(trt: Any) -> Any:
    """Of the plugin. Raises EngineError where the library that was loaded does not have it."""
    creator = trt.get_plugin_registry().get_creator(PLUGIN, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    if creator is None:
        raise EngineError(f"{PLUGIN}: not among TensorRT's plugins: build libfly_plugins.so of this fly-trt")
    return creator


@dataclass(frozen=True)
class LoosePlugin:
    """FLy as the plugin's fields have it: baked into the engine. vocab_size: columns that are tokens, since the logits
    of several ranks are padded."""

    policy: FlyPolicy
    entropy_top_k: int
    vocab_size: int
    stop_token_ids: Sequence[int]

    def make(self, trt: Any) -> Any:
        """The plugin; its library must be loaded. Raises EngineError where it is not."""
        creator = find_creator(trt)
        policy = self.policy
        numbers: dict[str, Any] = {
            "entropy_threshold": np.array([policy.entropy_threshold], np.float64),
            "use_full_entropy": np.array([policy.use_full_entropy], np.int32),
            "entropy_top_k": np.array([self.entropy_top_k], np.int32),
            "window": np.array([policy.window], np.int32),
            "lookahead": np.array([policy.lookahead], np.int32),
            "vocab_size": np.array([self.vocab_size], np.int32),
            "stop_token_ids": np.array(self.stop_token_ids or [-1], np.int32),
        }
        kinds = {"float64": trt.PluginFieldType.FLOAT64, "int32": trt.PluginFieldType.INT32}
        # The collection keeps no reference to the numbers: they live until the plugin is made.
        fields = [trt.PluginField(name, values, kinds[values.dtype.name]) for name, values in numbers.items()]
        return creator.create_plugin(PLUGIN, trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)


def put_behind_logits(network: Any, plugin: Any) -> None:
    """The output `logits` of a TensorRT network becomes the plugin's, by that name; the model's own is no output any
    more. Raises EngineError for a network without it or without what the plugin reads."""
    outputs = _named(network.get_output, network.num_outputs)
    inputs = _named(network.get_input, network.num_inputs)
    missing = [name for name in (LOGITS,) if name not in outputs] + [
        name for name in PLUGIN_INPUTS if name not in inputs
    ]
    if missing:
        raise EngineError(
            f"the network that TensorRT-LLM made has no {' and no '.join(missing)}: expected one of TensorRT-LLM 1.2, "
            "with packed inputs"
        )
    raw = outputs[LOGITS]
    network.unmark_output(raw)
    raw.name = RAW_LOGITS
    layer = network.add_plugin_v3([raw, *(inputs[name] for name in PLUGIN_INPUTS)], [], plugin)
    layer.name = PLUGIN
    rewritten = layer.get_output(0)
    rewritten.name = LOGITS
    network.mark_output(rewritten)


def let_pass_rewriting(trt: Any) -> None:
    """TensorRT-LLM rewrites a network before it is compiled, and there looks at each layer as one of the kinds in a
    table; it raises NotImplementedError for any other, which plugins of version 3 are: its own are of version 2."""
    from tensorrt_llm.graph_rewriting import Layer

    Layer.TRT_LAYER_TYPE_TO_LAYER.setdefault(trt.LayerType.PLUGIN_V3, trt.IPluginV3Layer)


def _named(get: Callable[[int], Any], count: int) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in map(get, range(count))}


def with_plugin(model_class: Any, plugin: LoosePlugin) -> Any:
    """A class of TensorRT-LLM's models whose networks have the plugin. TensorRT-LLM asks for the model's own class by
    name here and there, so the name stays."""

    class Model(model_class):
        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            import tensorrt as trt
            from tensorrt_llm._common import default_trtnet

            result = super().forward(*arguments, **keywords)
            let_pass_rewriting(trt)
            put_behind_logits(default_trtnet(), plugin.make(trt))
            return result

    Model.__name__ = Model.__qualname__ = model_class.__name__
    return Model


@dataclass(frozen=True)
class EngineBuild:
    """One model: folder of its checkpoint, architecture as its config.json names it, what is computed in and with
    which weights, for how many ranks. is_prequantized: the checkpoint says how. plugin: None for a draft, or for exact
    acceptance."""

    name: str
    folder: Path
    architecture: str
    dtype: Dtype
    quantization: Quantization
    is_prequantized: bool
    num_ranks: int
    limits: Limits
    plugin: LoosePlugin | None

    def save(self, rank: int, folder: Path) -> None:
        """Builds the engine of one rank into `folder`: rank{rank}.engine, and config.json with rank 0. Raises
        CheckpointError for an architecture that TensorRT-LLM has no engine of."""
        from tensorrt_llm.builder import build
        from tensorrt_llm.mapping import Mapping
        from tensorrt_llm.models import MODEL_MAP

        model_class = MODEL_MAP.get(self.architecture)
        if model_class is None:
            raise CheckpointError(
                f"{self.name}: TensorRT-LLM has no engine of a {self.architecture}: leave --engine out, or choose "
                "another model"
            )
        mapping = Mapping(world_size=self.num_ranks, rank=rank, tp_size=self.num_ranks)
        # Each rank has its part of the embeddings, as of everything else.
        parts = {"use_parallel_embedding": True, "embedding_sharding_dim": 0} if self.num_ranks > 1 else {}
        model = model_class.from_hugging_face(
            str(self.folder), dtype=self.dtype, mapping=mapping, quant_config=self._quant_config(), **parts
        )
        if self.plugin is not None:
            # Not before: from_hugging_face may make an object of the class that it names, whatever it was called on.
            model.__class__ = with_plugin(type(model), self.plugin)
        engine = build(model, self._build_config(model))
        engine.save(str(folder))

    def _build_config(self, model: Any) -> Any:
        """build() itself adds the drafts to max_seq_len. No chunked context: a round's drafts follow its last prompt
        token in one step; what is cached is reused in blocks, which needs paged context attention."""
        from tensorrt_llm.builder import BuildConfig
        from tensorrt_llm.models.modeling_utils import SpeculativeDecodingMode

        plugin_config = model.default_plugin_config()
        plugin_config.remove_input_padding = True
        plugin_config.paged_kv_cache = True
        plugin_config.use_paged_context_fmha = True
        limits = self.limits
        return BuildConfig(
            max_input_len=limits.max_seq_len,
            max_seq_len=limits.max_seq_len,
            max_batch_size=limits.max_batch_size,
            max_num_tokens=limits.max_num_tokens,
            max_beam_width=1,
            max_draft_len=limits.max_draft_len,
            speculative_decoding_mode=SpeculativeDecodingMode.DRAFT_TOKENS_EXTERNAL,
            gather_context_logits=False,
            strongly_typed=True,
            plugin_config=plugin_config,
        )

    def _quant_config(self) -> Any:
        """As TensorRT-LLM's own loader has it: weights alone are rounded while they are read, and all else that is
        quantised comes from a checkpoint that ModelOpt quantised."""
        from tensorrt_llm.models.modeling_utils import QuantConfig
        from tensorrt_llm.quantization import QuantAlgo

        if not self.is_prequantized:
            algorithm = WEIGHT_ONLY.get(self.quantization)
            return QuantConfig(quant_algo=None if algorithm is None else QuantAlgo(algorithm))
        described = read_quantized_config(self.name, self.folder)
        algorithms = {
            name: QuantAlgo(described[name])
            for name in ("quant_algo", "kv_cache_quant_algo")
            if described.get(name) is not None
        }
        own = {name: described[name] for name in QUANTIZED_FIELDS if described.get(name) is not None}
        return QuantConfig(**algorithms, **own)


def read_quantized_config(name: str, folder: Path) -> dict[str, Any]:
    """What ModelOpt says of a checkpoint that it quantised. Raises CheckpointError where it says nothing."""
    path = folder / QUANTIZED_CONFIG
    try:
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["quantization"]
        described["quant_algo"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name}: no usable {QUANTIZED_CONFIG} ({type(error).__name__}): TensorRT-LLM's engines are built from "
            "checkpoints that ModelOpt quantised and exported for Hugging Face"
        ) from None
    return described
