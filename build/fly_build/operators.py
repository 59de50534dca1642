"""How transformers' building blocks appear in the ONNX graph, as single opset-24 operators.

transformers lets a caller register attention and mask functions and pass its own KV cache; the implementations here
emit `Attention`, the sliding-window mask and `TensorScatter`. RMSNorm modules and rotary functions have no such
interface, so they are replaced for the duration of the export, each only after a probe on random values shows that
the operator computes the same function; what the probe does not recognise is exported as it is written.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch.onnx.ops import symbolic
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

OPSET_VERSION = 24
ATTENTION_NAME = "fly_onnx"
PROBE_TOLERANCE = 1e-5

# How attention says which keys a query sees. "lengths": the operator's causal attribute and count of valid keys, for
# ONNX Runtime. "mask": a boolean tensor [B, 1, T, S], for TensorRT, whose parser drops the count without a word (seen
# in tensorrt_rtx 1.7.1) and whose causal flag is anchored at the first key (its headers say so); it refuses a soft cap,
# so there attention is written out.
AttentionForm = Literal["lengths", "mask"]


class SlotCache(Cache):
    """Writes new keys and values into the caller's buffers at `write_indices` with TensorScatter.

    `past` holds key and value of each layer in turn, [B, Hkv, S, D]; `present` receives the updated tensors in the
    same order. `positions` int64 [B, T] and `kv_length` int64 [B] describe the step for attention and masks.
    """

    is_compileable = False

    def __init__(self, past: list[torch.Tensor], write_indices: torch.Tensor, num_tokens: int) -> None:
        self.past = past
        self.present: list[torch.Tensor] = list(past)
        self.write_indices = write_indices
        self.positions = write_indices[:, None] + torch.arange(num_tokens)[None]
        # Not write_indices + num_tokens, which is a number of the host: a GPU would wait for its copy in every step.
        self.kv_length = self.positions[:, -1] + 1
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for index, new in ((2 * layer_idx, key_states), (2 * layer_idx + 1, value_states)):
            past = self.past[index]
            self.present[index] = symbolic(
                "TensorScatter",
                (past, new, self.write_indices),
                attrs={"axis": 2, "mode": "linear"},
                dtype=past.dtype,
                shape=past.shape,
                version=OPSET_VERSION,
            )
        return self.present[2 * layer_idx], self.present[2 * layer_idx + 1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.past[0].shape[2]

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self.past[0].shape[2], 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * (len(self.past) // 2)


class _TracedStep:
    """The step that is being traced: attention and mask functions get no cache argument from transformers."""

    cache: SlotCache
    max_seq_len: int
    form: AttentionForm


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    if _TracedStep.form == "lengths":
        attrs: dict[str, Any] = {"is_causal": 1, "scale": scale}
        if softcap:
            attrs["softcap"] = float(softcap)
        output = _attention_operator(query, key, value, attention_mask, _TracedStep.cache.kv_length, attrs)
    else:
        assert attention_mask is not None
        query = (query.float() * scale).to(query.dtype)  # TensorRT would scale the whole key cache in every step
        if softcap:
            output = written_out_attention(query, key, value, attention_mask, float(softcap))
        else:
            output = _attention_operator(query, key, value, attention_mask, None, {"scale": 1.0})
    return output.transpose(1, 2).contiguous(), None


def _attention_operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kv_length: torch.Tensor | None,
    attrs: dict[str, Any],
) -> torch.Tensor:
    return symbolic(
        "Attention",
        (query, key, value, mask, None, None, kv_length),
        attrs=attrs,
        dtype=query.dtype,
        shape=query.shape,
        version=OPSET_VERSION,
    )


def written_out_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Attention of a scaled query, with a soft cap or without, of standard operators; the softmax in float32. Query
    heads that share a key-value head get a dimension of their own, so that keys and values are broadcast, not repeated.
    """
    batch, num_heads, length, head_dim = query.shape
    num_kv_heads = key.shape[1]
    grouped = query.reshape(batch, num_kv_heads, num_heads // num_kv_heads, length, head_dim)
    scores = torch.matmul(grouped, key[:, :, None].transpose(-1, -2)).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(mask[:, :, None], scores, torch.finfo(torch.float32).min)
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    return torch.matmul(weights, value[:, :, None]).reshape(batch, num_heads, length, head_dim)


def _mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> torch.Tensor | None:
    """bool [B, 1, T, S], or None where the operator's causal attribute says it all: where it counts the valid keys and
    the sequence cannot outgrow a window."""
    window = local_size if local_size is not None and local_size < _TracedStep.max_seq_len else None
    if _TracedStep.form == "lengths" and window is None:
        return None
    key_positions = torch.arange(_TracedStep.cache.past[0].shape[2])
    distance = _TracedStep.cache.positions[:, None, :, None] - key_positions[None, None, None, :]
    if window is None:
        return distance >= 0
    return distance < window if _TracedStep.form == "lengths" else (distance >= 0) & (distance < window)


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _mask)


def rms_normalization(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return symbolic(
        "RMSNormalization",
        (x, weight),
        attrs={"axis": -1, "epsilon": float(epsilon)},
        dtype=x.dtype,
        shape=x.shape,
        version=OPSET_VERSION,
    )


def rotary_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, D]; cos and sin [B, T, R], whose two halves are equal, R <= D. The operator has one dtype, that of
    cos and sin, since olmo2 rotates half precision in float32."""
    if cos.dtype != x.dtype:
        return rotary_embedding(x.to(cos.dtype), cos, sin).to(x.dtype)
    half = cos.shape[-1] // 2
    attrs: dict[str, Any] = {"interleaved": 0}
    if cos.shape[-1] < x.shape[-1]:
        attrs["rotary_embedding_dim"] = cos.shape[-1]
    return symbolic(
        "RotaryEmbedding",
        (x, cos[..., :half], sin[..., :half]),
        attrs=attrs,
        dtype=x.dtype,
        shape=x.shape,
        version=OPSET_VERSION,
    )


def _norm_weight_offset(module: torch.nn.Module) -> float | None:
    """0 or 1 when the module computes x / rms(x) * (offset + weight) over its last axis, None when it does not."""
    weight = getattr(module, "weight", None)
    epsilon = _epsilon(module)
    if (
        not isinstance(weight, torch.Tensor)
        or weight.ndim != 1
        or epsilon is None
        or len(list(module.parameters())) != 1
    ):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, weight.shape[0], generator=generator)
    probe_weight = torch.randn(weight.shape[0], generator=generator)
    normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    try:
        got = torch.func.functional_call(module, {"weight": probe_weight}, (x,))
    except (TypeError, RuntimeError):
        return None
    for offset in (0.0, 1.0):
        if torch.allclose(got, normalized * (offset + probe_weight), atol=PROBE_TOLERANCE):
            return offset
    return None


def _epsilon(module: torch.nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _is_half_rotation(function: Callable[..., Any], head_dim: int) -> bool:
    """Whether function(q, k, cos, sin) rotates the two halves of the leading cos.shape[-1] channels of each head."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, head_dim, generator=generator) for heads in (2, 1))
    angles = torch.rand(1, 3, head_dim // 2, generator=generator)
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    try:
        results = function(q, k, cos, sin)
    except (TypeError, RuntimeError):
        return False
    for x, got in zip((q, k), results, strict=True):
        first, second = x.chunk(2, dim=-1)
        rotated = x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
        if got.shape != x.shape or not torch.allclose(got, rotated, atol=PROBE_TOLERANCE):
            return False
    return True


@contextlib.contextmanager
def onnx_operators(model: torch.nn.Module, head_dim: int, max_seq_len: int, attention: AttentionForm) -> Iterator[None]:
    """While open, `model` traces to Attention, TensorScatter, RMSNormalization and RotaryEmbedding operators."""
    _TracedStep.max_seq_len = max_seq_len
    _TracedStep.form = attention
    replaced: list[tuple[Any, str, Any]] = []
    norms = []
    for module in model.modules():
        offset = _norm_weight_offset(module) if "norm" in type(module).__name__.lower() else None
        if offset is not None:
            epsilon = float(_epsilon(module) or 0.0)
            module.forward = _norm_forward(module, offset, epsilon)
            norms.append(module)
    for name in sorted({type(module).__module__ for module in model.modules()}):
        namespace: Any = sys.modules[name]
        rotate = getattr(namespace, "apply_rotary_pos_emb", None)
        if rotate is not None and _is_half_rotation(rotate, head_dim):
            replaced.append((namespace, "apply_rotary_pos_emb", rotate))
            namespace.apply_rotary_pos_emb = _rotate_both
    try:
        yield
    finally:
        for module in norms:
            del module.forward
        for namespace, name, original in replaced:
            setattr(namespace, name, original)


def _norm_forward(module: torch.nn.Module, offset: float, epsilon: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        weight: Any = module.weight.float()
        if offset:
            weight = weight + offset
        return rms_normalization(x.float(), weight, epsilon).to(x.dtype)

    return forward


def _rotate_both(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_embedding(q, cos, sin), rotary_embedding(k, cos, sin)


def rows_at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[B, L, H] of hidden [B, T, H]; positions int64 [B, L] count through all rows of the step, b * T + t.

    Through all rows because of ONNX Runtime's CUDA provider, whose GatherND reads host memory that is gone when a
    captured graph is launched again."""
    flat = symbolic(
        "Reshape",
        (hidden, torch.tensor([-1, hidden.shape[-1]])),
        dtype=hidden.dtype,
        shape=(hidden.shape[0] * hidden.shape[1], hidden.shape[2]),
        version=OPSET_VERSION,
    )
    shape = (*positions.shape, hidden.shape[2])
    operands = flat, positions
    return symbolic("Gather", operands, attrs={"axis": 0}, dtype=hidden.dtype, shape=shape, version=OPSET_VERSION)


def trace_step(
    model: Any, input_ids: torch.Tensor, write_indices: torch.Tensor, positions: torch.Tensor, past: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """One decoder step: logits [B, L, V] at `positions`, see rows_at, and the updated cache tensors, in the order of
    `past`. The hidden states are gathered where they enter the vocabulary projection: behind the last norm, before the
    projection and whatever an architecture does with logits (granite's scale, gemma's soft cap)."""
    cache = SlotCache(past, write_indices, input_ids.shape[1])
    _TracedStep.cache = cache
    projection = model.get_output_embeddings()
    hook = projection.register_forward_pre_hook(lambda module, given: (rows_at(given[0], positions),))
    try:
        output = model(input_ids=input_ids, position_ids=cache.positions, past_key_values=cache, use_cache=True)
    finally:
        hook.remove()
    return (output.logits, *cache.present)
