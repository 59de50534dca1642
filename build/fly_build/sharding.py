"""How a decoder is spread over several GPUs (tensor parallelism): which part of every parameter a rank has, and the
configuration that the ranks' common graph is traced with.

Arithmetic on a transformers configuration and on names and shapes: it knows no graph and reads no weight. The heads of
an attention and the columns of an MLP, also of each expert, are dealt out evenly, and so are the tokens of the
vocabulary, in embeddings and head, where they divide. A product whose input is spread over the ranks is summed over
them (collectives.py). Everything else every rank has whole.

By vocabulary rather than whole: of Llama 3.1 405B on 8 GPUs, embeddings and head take 8.4 GB a rank when they are whole
and 1.1 GB when they are not, of 51 GB in all, and the head is read in every step.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from fly_build.quantized_weight import QuantizedWeight
from fly_build.schema import TP_SIZES
from fly_build.tensors import Parameter
from fly_trt.errors import CheckpointError

RANK_PARAMETER = "rank"  # beside a weight that is cut by vocabulary: 1 at the rank's own number, 0 at the others'

# What lies along the dimension that is cut, one behind another: query heads, key-value heads, or what is simply even.
QUERY, KEY_VALUE, EVEN = "query", "key_value", "even"
# By the end of a parameter's name: the dimension, and what lies along it.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    **{f"self_attn.q_proj.{kind}": (0, (QUERY,)) for kind in ("weight", "bias")},
    **{f"self_attn.{name}_proj.{kind}": (0, (KEY_VALUE,)) for name in "kv" for kind in ("weight", "bias")},
    "self_attn.qkv_proj.weight": (0, (QUERY, KEY_VALUE, KEY_VALUE)),
    "self_attn.o_proj.weight": (1, (QUERY,)),
    **{f"mlp.{name}_proj.{kind}": (0, (EVEN,)) for name in ("gate", "up") for kind in ("weight", "bias")},
    "mlp.gate_up_proj.weight": (0, (EVEN, EVEN)),
    "mlp.down_proj.weight": (1, (EVEN,)),
    "mlp.experts.gate_up_proj": (1, (EVEN, EVEN)),
    "mlp.experts.down_proj": (2, (EVEN,)),
}
VOCABULARY = {
    f"{module}.{kind}": (0, (EVEN,)) for module in ("embed_tokens", "lm_head") for kind in ("weight", RANK_PARAMETER)
}
# Of olmo2, which takes the norm of all heads together; where each head has its own, they share these weights.
WIDE_NORMS = {"self_attn.q_norm.weight": (0, (QUERY,)), "self_attn.k_norm.weight": (0, (KEY_VALUE,))}
HAS_WIDE_NORMS = ("olmo2",)


@dataclass(frozen=True)
class Cut:
    """The part of a tensor that a rank has: `ranges` (start, length) of dimension `dim`, one behind another."""

    dim: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        return sum(length for _, length in self.ranges)

    def of(self, tensor: Parameter) -> Parameter:
        """A view where the part is in one piece, else a copy. Raises CheckpointError where it would cut through what a
        quantised weight has one scale for."""
        if isinstance(tensor, QuantizedWeight):
            shards = [tensor.shard(self.dim, start, start + length) for start, length in self.ranges]
            return QuantizedWeight.joined(shards)
        parts = [tensor.narrow(self.dim, start, length) for start, length in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)


@dataclass(frozen=True)
class Sharding:
    """One decoder on `num_ranks` ranks. Raises nothing: `shard` makes those that can be."""

    num_ranks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    by_vocabulary: bool
    has_wide_norms: bool

    @property
    def rank_kv_heads(self) -> int:
        """Where there are fewer than ranks, several ranks have the same one."""
        return max(1, self.num_kv_heads // self.num_ranks)

    def cut(self, name: str, shape: tuple[int, ...], rank: int) -> Cut | None:
        """The part of the parameter of this name and (whole) shape that the rank has; None means all of it."""
        found = self._layout(name)
        if found is None:
            return None
        dim, kinds = found
        num_even = kinds.count(EVEN)
        known = {QUERY: self.num_heads * self.head_dim, KEY_VALUE: self.num_kv_heads * self.head_dim}
        ranges, start = [], 0
        for kind in kinds:
            size = known.get(kind) or shape[dim] // num_even
            offset, length = self._part(kind, size, rank)
            ranges.append((start + offset, length))
            start += size
        return Cut(dim, tuple(ranges))

    def part(self, name: str, tensor: Parameter, rank: int) -> Parameter:
        """What the rank has of a parameter, see `Cut.of`."""
        cut = self.cut(name, tuple(tensor.shape), rank)
        return tensor if cut is None else cut.of(tensor)

    def rank_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same for all ranks."""
        cut = self.cut(name, shape, 0)
        return shape if cut is None else (*shape[: cut.dim], cut.length, *shape[cut.dim + 1 :])

    def rank_config(self, config: Any) -> Any:
        """The configuration of a model of one rank's size."""
        rank = copy.deepcopy(config)
        rank.head_dim = self.head_dim  # else it would be guessed from the number of heads
        rank.num_attention_heads = self.num_heads // self.num_ranks
        rank.num_key_value_heads = self.rank_kv_heads
        for name in _columns(config):
            setattr(rank, name, getattr(config, name) // self.num_ranks)
        if self.by_vocabulary:
            rank.vocab_size = config.vocab_size // self.num_ranks
            rank.pad_token_id = None  # must be below vocab_size, and only training uses it
        return rank

    def rank_vectors(self) -> dict[str, torch.Tensor]:
        """The parameters RANK_PARAMETER of a model that is cut by vocabulary, of all ranks one behind another, as if a
        checkpoint had them."""
        if not self.by_vocabulary:
            return {}
        vectors = torch.eye(self.num_ranks).flatten()
        return {f"{module}.{RANK_PARAMETER}": vectors for module in ("model.embed_tokens", "lm_head")}

    def _layout(self, name: str) -> tuple[int, tuple[str, ...]] | None:
        layouts = LAYOUTS | (VOCABULARY if self.by_vocabulary else {}) | (WIDE_NORMS if self.has_wide_norms else {})
        return next((layout for end, layout in layouts.items() if name == end or name.endswith(f".{end}")), None)

    def _part(self, kind: str, size: int, rank: int) -> tuple[int, int]:
        if kind != KEY_VALUE:
            return rank * size // self.num_ranks, size // self.num_ranks
        first = rank * self.num_kv_heads // self.num_ranks
        return first * self.head_dim, self.rank_kv_heads * self.head_dim


def shard(name: str, config: Any, head_dim: int, num_ranks: int) -> Sharding:
    """The sharding of a supported model. Raises CheckpointError for sizes that do not divide, with what would."""
    reason = _indivisible(config, num_ranks)
    if reason is not None:
        able = [f"--tp-size {size}" for size in TP_SIZES if _indivisible(config, size) is None]
        fix = f"use {' or '.join(able)}" if able else "build it for one GPU"
        raise CheckpointError(f"{name}: {reason} among {num_ranks} ranks: {fix}")
    return Sharding(
        num_ranks=num_ranks,
        num_heads=config.num_attention_heads,
        num_kv_heads=_kv_heads(config),
        head_dim=head_dim,
        by_vocabulary=config.vocab_size % num_ranks == 0,
        has_wide_norms=config.model_type in HAS_WIDE_NORMS,
    )


def _indivisible(config: Any, num_ranks: int) -> str | None:
    """What cannot be dealt out, or None."""
    if config.num_attention_heads % num_ranks:
        return f"{config.num_attention_heads} attention heads (num_attention_heads) cannot be divided"
    kv_heads = _kv_heads(config)
    if kv_heads % num_ranks and num_ranks % kv_heads:
        return f"{kv_heads} key-value heads (num_key_value_heads) can be neither divided nor repeated"
    for name in _columns(config):
        if getattr(config, name) % num_ranks:
            return f"{getattr(config, name)} columns of an MLP ({name}) cannot be divided"
    return None


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _columns(config: Any) -> list[str]:
    """The fields that say how wide an MLP is."""
    return [name for name in ("intermediate_size", "moe_intermediate_size") if getattr(config, name, None)]
