"""The layers of a decoder as blocks that can run one by one or be left out: block 2 i is the attention of layer i,
block 2 i + 1 its MLP.

A block is left out by making it silent: it adds nothing to the hidden states that pass it by. How transformers writes
the layer around it, with norms before or after and with multipliers, does not matter then. It knows models and graphs;
which blocks are worth leaving out is knapsack.py's to know.
"""

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import torch
from torch.onnx.ops import symbolic
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from fly_build.checkpoint import Checkpoint
from fly_build.graph_patterns import only_reader
from fly_build.operators import written_out_attention
from fly_trt.errors import CheckpointError

ATTENTION_NAME = "fly_blocks"
HALVES = ("self_attn", "mlp")
SILENT_DOMAIN, SILENT_OPERATOR = "fly_build", "Silent"
MIN_LAYERS = 3
CHUNK_TOKENS = 256
TOLERANCE = 1e-3


def num_blocks(checkpoint: Checkpoint) -> int:
    return 2 * int(checkpoint.config.num_hidden_layers)


def kept_attentions(total: int, skipped: Collection[int]) -> list[int]:
    """Layers whose attention is not among the blocks `skipped`, of `total` blocks."""
    return [block // 2 for block in range(0, total, 2) if block not in skipped]


def check_blocks(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a model that has no blocks to leave out. Reads no weights."""
    layers = getattr(getattr(checkpoint.empty_model, "model", None), "layers", ())
    if not all(isinstance(getattr(layer, half, None), torch.nn.Module) for layer in layers for half in HALVES):
        raise CheckpointError(f"{checkpoint.name}: {_no_blocks(checkpoint)}")
    if len(layers) < MIN_LAYERS:
        raise CheckpointError(
            f"{checkpoint.name}: {len(layers)} layers, of which a self-draft keeps the first and the last: it needs "
            f"{MIN_LAYERS} at least: leave --self-draft out"
        )


def _no_blocks(checkpoint: Checkpoint) -> str:
    return (
        f"the decoder layers of {checkpoint.architecture} are not attention and then an MLP, each added to the hidden "
        "states, so that none can be skipped: leave --self-draft out"
    )


class _Silent(torch.nn.Module):
    """Takes the place of the block `half` and says nothing."""

    def __init__(self, half: str, zeros: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.is_attention = half == "self_attn"
        self.zeros = zeros

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        zeros = self.zeros(hidden_states)
        return (zeros, None) if self.is_attention else zeros


def silence(model: Any, skipped: Collection[int]) -> None:
    """Makes blocks silent in a model that is to be traced, and numbers the other attentions, and so their caches, from
    0 on. `drop_silent` takes what is left of them out of the graph."""
    layers = model.model.layers
    for block in skipped:
        half = HALVES[block % 2]
        setattr(layers[block // 2], half, _Silent(half, _traced_zeros))
    for index, layer in enumerate(kept_attentions(2 * len(layers), skipped)):
        layers[layer].self_attn.layer_idx = index


def _traced_zeros(x: torch.Tensor) -> torch.Tensor:
    return symbolic(f"{SILENT_DOMAIN}::{SILENT_OPERATOR}", (x,), dtype=x.dtype, shape=x.shape, version=1)


def drop_silent(model: ir.Model) -> None:
    """Takes silent blocks out of a traced graph, with the norms and sums around them."""
    graph = model.graph
    for node in [node for node in graph if node.op_type == SILENT_OPERATOR and node.domain == SILENT_DOMAIN]:
        value = node.outputs[0]
        while (user := only_reader(value)) is not None and user.op_type != "Add":
            value = user.outputs[0]
        assert user is not None, "what a block says is added"
        (passed_by,) = (read for read in user.inputs if read is not None and read is not value)
        ir.convenience.replace_all_uses_with(user.outputs[0], passed_by)
    ir_passes.RemoveUnusedNodesPass()(model)
    graph.opset_imports.pop(SILENT_DOMAIN, None)


class _TextCache(Cache):
    """Keys and values of texts of one length, [m, Hkv, capacity, D] by layer. A step writes those of its tokens behind
    the `start` tokens that were read, and sees them all up to its `end`."""

    is_compileable = False

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.start = self.end = 0
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False
        self._num_layers = num_layers
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        news = (key_states, value_states)
        if layer_idx not in self._held:
            key, value = (new.new_empty((*new.shape[:2], self.capacity, new.shape[3])) for new in news)
            self._held[layer_idx] = key, value
        for held, new in zip(self._held[layer_idx], news, strict=True):
            held[:, :, self.start : self.end] = new
        key, value = self._held[layer_idx]
        return key[:, :, : self.end], value[:, :, : self.end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.capacity

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self.end, 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self._num_layers


class _Running:
    """The cache of the step that runs: mask functions get none from transformers."""

    cache: _TextCache


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return written_out_attention(query, key, value, attention_mask, softcap).transpose(1, 2).contiguous(), None


def _mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> torch.Tensor:
    """bool [1, 1, T, S]."""
    cache = _Running.cache
    distance = torch.arange(cache.start, cache.end)[:, None] - torch.arange(cache.end)[None]
    seen = distance >= 0
    return (seen if local_size is None else seen & (distance < local_size))[None, None]


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _mask)


class BlockDecoder:
    """A checkpoint's model on m texts of one length, in torch and in the dtype of its `tensors`, which it shares.

    `read` runs whole models; `run` runs one block on other hidden states of the tokens that `look` saw last, which
    attend to what was read before. Raises CheckpointError where the blocks are not all that the layers do.
    """

    def __init__(self, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
        self._checkpoint = checkpoint
        self._model = checkpoint.make_empty_model(tensors["model.embed_tokens.weight"].dtype)
        self._model.load_state_dict(tensors, assign=True)
        self._model.requires_grad_(False)
        self._model.set_attn_implementation(ATTENTION_NAME)
        self._layers = self._model.model.layers
        self._arguments: list[dict[str, Any]] = []
        self._cache = _TextCache(len(self._layers), 0)

    def start(self, capacity: int) -> None:
        """New texts of at most `capacity` tokens."""
        self._cache = _TextCache(len(self._layers), capacity)

    def rewind(self, num_tokens: int) -> None:
        """What comes next follows the first `num_tokens` tokens that were read."""
        self._cache.start = num_tokens

    def read(self, ids: torch.Tensor, skipped: Collection[int] = ()) -> torch.Tensor:
        """Reads on, ids int64 [m, T], without the blocks `skipped`. Returns what `logits` reads, [m, T, H]."""
        outputs = []
        with contextlib.ExitStack() as stack:
            for block in skipped:
                stack.enter_context(self._silent(block))
            for chunk in ids.split(CHUNK_TOKENS, dim=1):
                outputs.append(self._forward(chunk))
                self._cache.start = self._cache.end
        return torch.cat(outputs, dim=1)

    def look(self, ids: torch.Tensor) -> torch.Tensor:
        """The hidden states [m, T, H] of ids int64 [m, T] before the first block; they do not become part of what was
        read."""
        seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def note(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.append((arguments[0], named))

        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in self._layers]
        try:
            self._forward(ids)
        finally:
            for hook in hooks:
                hook.remove()
        self._arguments = [named for _, named in seen]
        self._check(*[hidden for hidden, _ in seen][:2])
        return seen[0][0]

    def run(self, block: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [m, T, H] after the block, of those before it."""
        layer = block // 2
        with self._silent(block ^ 1), torch.no_grad():
            result: torch.Tensor = self._layers[layer](hidden, **self._arguments[layer])
        return result

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[m, T, V] of what `read` returned, before what keeps their order."""
        with torch.no_grad():
            result: torch.Tensor = self._model.lm_head(hidden)
        return result

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last block as `read` returns them."""
        with torch.no_grad():
            result: torch.Tensor = self._model.model.norm(hidden)
        return result

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        cache = _Running.cache = self._cache
        cache.end = cache.start + ids.shape[1]
        positions = torch.arange(cache.start, cache.end).expand(len(ids), -1)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # past_key_values: transformers 5.20 knows no newer name
            output = self._model.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        result: torch.Tensor = output.last_hidden_state
        return result

    def _check(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """That the two blocks of the first layer, one after the other, are the layer."""
        after = self.run(1, self.run(0, first))
        if not isinstance(after, torch.Tensor) or (after - second).norm() > TOLERANCE * second.norm():
            raise CheckpointError(f"{self._checkpoint.name}: {_no_blocks(self._checkpoint)}")

    @contextlib.contextmanager
    def _silent(self, block: int) -> Iterator[None]:
        layer, half = self._layers[block // 2], HALVES[block % 2]
        speaking = getattr(layer, half)
        setattr(layer, half, _Silent(half, torch.zeros_like))
        try:
            yield
        finally:
            setattr(layer, half, speaking)
