"""What a plan takes of the memory of each GPU, before anything is built: arithmetic on shapes.

Weights, caches and the logits' buffer are what the engines will allocate. Scratch memory is TensorRT's to decide and
only estimated, from the largest step that the engine is built for: what a layer and the verification head hold at a
time, none of it fused. It knows plans, and asks no GPU and no library.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fly_build.plan import ModelPlan
from fly_build.tensorrt_builder import Sizes
from fly_trt.manifest import Limits

CARD_BYTES = 80 * 10**9  # of an "80 GB" card, which has 85.5: the rest is left to CUDA, NCCL and kernels
MOST_SLOTS = 4096
HEAD_COPIES = 3  # float32 tensors of the size of the logits in the head's functions: scores, their logs, probabilities
HIDDEN_COPIES = 4
PAGED_LOGIT_BYTES = 8  # TensorRT-LLM's own, and float32 again: what the acceptance reads or the plugin writes


@dataclass(frozen=True)
class GpuMemory:
    """Bytes that the models on one GPU take, `cache` for each slot; `logits` and `scratch` are of steps of all rows."""

    rank: int
    num_slots: int
    weights: int
    cache_per_slot: int
    logits: int
    scratch: int

    @property
    def cache(self) -> int:
        return self.num_slots * self.cache_per_slot

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.logits + self.scratch

    @property
    def fits(self) -> bool:
        return self.total <= CARD_BYTES


@dataclass(frozen=True)
class GpuPlan:
    """One GPU, and with how many slots the engines would still fit into a card, if they were built for them."""

    memory: GpuMemory
    most_slots: int

    def summary(self) -> dict[str, int | bool]:
        """What follows from the parts, under the names that a plan as JSON has."""
        return {"total": self.memory.total, "fits_80_gb": self.memory.fits, "most_slots_80_gb": self.most_slots}


def plan_gpus(models: Sequence[ModelPlan], limits: Limits, *, with_plugins: bool) -> list[GpuPlan]:
    """For each rank of the largest model. A model with fewer ranks is on the first GPU. `with_plugins`: the head's
    kernels need no scratch memory."""
    num_ranks = max(model.engine.tensor_parallel_size for model in models)
    present = [[model for model in models if rank < model.engine.tensor_parallel_size] for rank in range(num_ranks)]
    return [_plan_gpu(rank, models, limits, with_plugins) for rank, models in enumerate(present)]


def plan_paged_gpus(models: Sequence[ModelPlan], limits: Limits, cache_tokens: int) -> list[GpuPlan]:
    """For each rank of the target, of a library with a paged cache, where a sequence takes so many tokens of it. A slot
    here is a sequence of the greatest length; shorter ones share the same blocks."""
    target = models[0]

    def plan(rank: int) -> GpuPlan:
        present = [model for model in models if rank < model.engine.tensor_parallel_size]

        def memory(num_slots: int) -> GpuMemory:
            rows = [num_slots * (limits.max_draft_len + 1 if model is target else 1) for model in present]
            logits = sum(count * model.engine.vocab_size for count, model in zip(rows, present, strict=True))
            return GpuMemory(
                rank=rank,
                num_slots=num_slots,
                weights=sum(model.weight_bytes() for model in present),
                cache_per_slot=sum(model.engine.kv_bytes_per_token() * cache_tokens for model in present),
                logits=PAGED_LOGIT_BYTES * logits,
                scratch=max(limits.max_num_tokens * _layer_bytes(model) for model in present),
            )

        return _fitted(memory, limits.max_batch_size)

    return [plan(rank) for rank in range(target.engine.tensor_parallel_size)]


def _plan_gpu(rank: int, models: Sequence[ModelPlan], limits: Limits, with_plugins: bool) -> GpuPlan:
    weights = sum(model.weight_bytes() for model in models)

    def memory(num_slots: int) -> GpuMemory:
        sizes = Sizes.of(limits.model_copy(update={"max_batch_size": num_slots}))
        tokens = max(num_slots * sizes.max_row_tokens, sizes.max_num_tokens)
        return GpuMemory(
            rank=rank,
            num_slots=num_slots,
            weights=weights,
            cache_per_slot=sum(model.engine.kv_bytes_per_token() * sizes.cache_tokens for model in models),
            logits=sum(tokens * model.engine.vocab_size * _item_bytes(model) for model in models),
            scratch=sum(_scratch(model, tokens, sizes.cache_tokens, with_plugins) for model in models),
        )

    return _fitted(memory, limits.max_batch_size)


def _fitted(memory: Callable[[int], GpuMemory], num_slots: int) -> GpuPlan:
    fitting, too_many = 0, MOST_SLOTS + 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if memory(middle).fits else (fitting, middle)
    return GpuPlan(memory(num_slots), fitting)


def _scratch(model: ModelPlan, tokens: int, cache_tokens: int, with_plugins: bool) -> int:
    """Of one step of so many tokens in all."""
    config, engine = model.checkpoint.config, model.engine
    num_ranks = engine.tensor_parallel_size
    item = _item_bytes(model)
    head = engine.vocab_size * ((0 if with_plugins else HEAD_COPIES * 4) + (item if num_ranks > 1 else 0))
    mask = cache_tokens
    if engine.dtype == "float32" or getattr(config, "attn_logit_softcapping", None):  # scores are written out
        mask += cache_tokens * (4 + item) * config.num_attention_heads // num_ranks
    one_cache = engine.kv_bytes_per_token() * cache_tokens // (2 * engine.num_layers)  # for slots that change places
    return tokens * (_layer_bytes(model) + head + mask) + one_cache


def _layer_bytes(model: ModelPlan) -> int:
    """What one token takes of a layer's activations."""
    config, engine = model.checkpoint.config, model.engine
    num_ranks = engine.tensor_parallel_size
    heads = config.num_attention_heads // num_ranks + 2 * engine.rank_kv_heads
    values = HIDDEN_COPIES * config.hidden_size + heads * engine.head_dim
    values += 3 * config.intermediate_size // num_ranks + _expert_values(config) // num_ranks
    return values * _item_bytes(model)


def _expert_values(config: Any) -> int:
    """A token has the weights of its experts gathered for it."""
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    is_mixture = any(getattr(config, name, None) for name in ("num_local_experts", "num_experts"))
    return config.num_experts_per_tok * 3 * width * config.hidden_size if is_mixture else 0


def _item_bytes(model: ModelPlan) -> int:
    return 4 if model.engine.kv_cache_dtype == "float32" else 2
