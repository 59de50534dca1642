"""What a step of a model has to do at least: bytes that it reads and multiply-accumulates (MACs), counted from the
ONNX graph, and from those the time that it cannot beat on a machine.

Counted are linear layers, experts of mixtures (those that the tokens use), attention over what the cache holds, the
vocabulary projection with one operation of the head a logit, at positions whose logits are read. Norms, activations and
quantising are not: what they take shows as distance from the limit. A model that fits into the processor's cache may
beat its limit, for the bytes are taken to come from memory. Which operators are products and which attention stands in
two tables, to which an operator is added with a line each.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np

from fly_trt.errors import ConfigError
from fly_trt.manifest import ModelEngine

Arithmetic = Literal["float32", "int8"]
CACHE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
PADDING = 64  # columns that a kernel may add to its weights at most


def _plain(dims: tuple[int, ...], attributes: Mapping[str, Any]) -> tuple[int, int]:
    return (dims[0], dims[1]) if not attributes.get("transB") else (dims[1], dims[0])


# By operator: what it multiplies in, and inputs K and outputs N of a layer by dims and attributes of its weight.
PRODUCTS: dict[str, tuple[Arithmetic, Callable[[tuple[int, ...], Mapping[str, Any]], tuple[int, int]]]] = {
    "MatMul": ("float32", _plain),
    "Gemm": ("float32", _plain),
    "MatMulInteger": ("int8", _plain),
    "MatMulIntegerToFloat": ("int8", _plain),
    "MatMulNBits": ("int8", lambda dims, attributes: (attributes["K"], attributes["N"])),
    "Int8Linear": ("int8", lambda dims, attributes: (4 * dims[1], 16 * dims[0])),  # [N/16, K/4, 16, 4]
}
# Of operators that do more than a product, how many inputs are the product's.
PRODUCT_INPUTS = {"Int8Linear": 3}
# Those of plugins/cpu have their window as an attribute, ONNX's as the distance that its mask allows.
ATTENTION = ("Attention", "CacheAttention")
EXPERT_GATHERS = ("GatherND",)


class Row(NamedTuple):
    """Of a step: tokens in the slot before it, tokens that it processes, and positions whose logits are read."""

    num_cached: int
    num_tokens: int
    num_logits: int = 1


@dataclass(frozen=True, slots=True)
class Machine:
    """The best of the rounds: a limit is what the machine can do when nothing else happens on it.

    memory_bandwidth: bytes read per second. product_rates: MACs per second of large matrix products by the fastest
    kernel, kernels: by every kernel that was measured. nominal_int8_rate: what the CPU's integer units could do by
    their number and its clock, MACs per second; None where they are not known. It is no measured figure.
    """

    memory_bandwidth: float
    product_rates: Mapping[Arithmetic, float]
    kernels: Mapping[str, float]
    nominal_int8_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Layers:
    """Linear layers: bytes of their weights with scales, and MACs for each token that goes through them."""

    num_bytes: int = 0
    macs: Mapping[Arithmetic, int] = field(default_factory=dict)

    def __add__(self, other: "Layers") -> "Layers":
        kinds = dict.fromkeys((*self.macs, *other.macs))
        macs = {kind: self.macs.get(kind, 0) + other.macs.get(kind, 0) for kind in kinds}
        return Layers(self.num_bytes + other.num_bytes, macs)

    def milliseconds(self, machine: Machine, num_tokens: float) -> float:
        """Of the products."""
        return 1e3 * num_tokens * sum(count / machine.product_rates[kind] for kind, count in self.macs.items())


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one step has to do at least.

    layers: those that every token goes through. experts: all of a mixture's, of which a token goes through
    `experts_per_token` of `num_experts`. vocabulary: the projection, for positions whose logits are read. windows: by
    layer with attention, how many keys a query sees at most, itself included; None means all. attention_macs: of one
    query and one key in one layer, in float32. cache_bytes: of one token in one layer.
    """

    layers: Layers
    experts: Layers
    num_experts: int
    experts_per_token: int
    vocabulary: Layers
    vocab_size: int
    windows: tuple[int | None, ...]
    attention_macs: int
    cache_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Of a step that reads all of them."""
        return self.layers.num_bytes + self.experts.num_bytes + self.vocabulary.num_bytes

    @property
    def macs_per_token(self) -> Mapping[Arithmetic, int]:
        """Of a token whose logits are read, with nothing cached."""
        share = self.experts_per_token / self.num_experts if self.num_experts else 0
        used = Layers(0, {kind: round(share * count) for kind, count in self.experts.macs.items()})
        return (self.layers + used + self.vocabulary).macs

    def weights_ms(self, machine: Machine, rows: Iterable[Row]) -> float:
        """Reading them once, and of the experts as many as so many tokens are expected to choose where each is as
        likely as the others."""
        rows = tuple(rows)
        num_bytes: float = self.layers.num_bytes
        if any(row.num_logits for row in rows):
            num_bytes += self.vocabulary.num_bytes
        if self.num_experts:
            missed = (1 - self.experts_per_token / self.num_experts) ** sum(row.num_tokens for row in rows)
            num_bytes += (1 - missed) * self.experts.num_bytes
        return 1e3 * num_bytes / machine.memory_bandwidth

    def cache_ms(self, machine: Machine, rows: Iterable[Row]) -> float:
        """Reading the valid keys and values that the rows' tokens see."""
        tokens = sum(_keys(row, window) for row in rows for window in self.windows)
        return 1e3 * tokens * self.cache_bytes / machine.memory_bandwidth

    def products_ms(self, machine: Machine, rows: Iterable[Row]) -> float:
        rows = tuple(rows)
        num_tokens, num_logits = sum(row.num_tokens for row in rows), sum(row.num_logits for row in rows)
        share = self.experts_per_token / self.num_experts if self.num_experts else 0
        head = 1e3 * num_logits * self.vocab_size / machine.product_rates["float32"]
        linear = self.layers.milliseconds(machine, num_tokens) + self.experts.milliseconds(machine, share * num_tokens)
        return linear + self.vocabulary.milliseconds(machine, num_logits) + head

    def attention_ms(self, machine: Machine, rows: Iterable[Row]) -> float:
        pairs = sum(_pairs(row, window) for row in rows for window in self.windows)
        return 1e3 * pairs * self.attention_macs / machine.product_rates["float32"]

    def memory_ms(self, machine: Machine, rows: Iterable[Row]) -> float:
        rows = tuple(rows)
        return self.weights_ms(machine, rows) + self.cache_ms(machine, rows)

    def arithmetic_ms(self, machine: Machine, rows: Iterable[Row]) -> float:
        rows = tuple(rows)
        return self.products_ms(machine, rows) + self.attention_ms(machine, rows)

    def limit_ms(self, machine: Machine, rows: Iterable[Row]) -> float:
        """Memory and arithmetic may overlap, so that a step takes the larger of both at least."""
        rows = tuple(rows)
        return max(self.memory_ms(machine, rows), self.arithmetic_ms(machine, rows))


def _keys(row: Row, window: int | None) -> int:
    """That any of the row's tokens sees."""
    held = row.num_cached + row.num_tokens
    return held if window is None else min(held, window - 1 + row.num_tokens)


def _pairs(row: Row, window: int | None) -> int:
    """Of a query and a key that it sees."""
    first, last = row.num_cached + 1, row.num_cached + row.num_tokens
    if window is None or last <= window:
        return (first + last) * row.num_tokens // 2
    growing = max(window - row.num_cached, 0)
    return (first + window) * growing // 2 + window * (row.num_tokens - growing)


def count_cost(onnx: ModuleType, path: Path, model: ModelEngine) -> ModelCost:
    """Of the model in `path`. Raises ConfigError for a graph without an operator that is known as attention."""
    return _Graph(onnx, onnx.load(path, load_external_data=False).graph).cost(path, model)


class _Product(NamedTuple):
    """A linear layer: where in the graph, inputs K and outputs N, and what it costs."""

    place: int
    inputs: int
    outputs: int
    cost: Layers


class _Weight(NamedTuple):
    """As a product reads it: name of the stored tensor, dims, bytes."""

    name: str
    dims: tuple[int, ...]
    num_bytes: int


class _Graph:
    """The nodes of the graph with those inside them, and its weights by name: also those that are cast or transposed
    when the session is made (half precision, a shared embedding table), which a step reads as float32."""

    def __init__(self, onnx: ModuleType, graph: Any) -> None:
        self._onnx = onnx
        self._nodes = [(node, list(_with_inner(node))) for node in graph.node]
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._weights = {name: self._weight(tensor) for name, tensor in self._stored.items()}
        self._makers: dict[str, Any] = {}
        for _, inner in self._nodes:
            for node in inner:
                self._makers |= dict.fromkeys(node.output, node)
                source = self._weights.get(node.input[0]) if node.input else None
                if node.op_type in ("Cast", "Transpose") and source is not None:
                    dims = source.dims[::-1] if node.op_type == "Transpose" else source.dims
                    self._weights[node.output[0]] = _Weight(source.name, dims, 4 * math.prod(dims))

    def cost(self, path: Path, model: ModelEngine) -> ModelCost:
        attention = [self._find(inner, ATTENTION) for _, inner in self._nodes]
        layers = [index for index, node in enumerate(attention) if node is not None]
        if len(layers) != model.num_layers:
            raise ConfigError(
                f"roofline: {path}: {len(layers)} of {model.num_layers} layers have an operator that is known as "
                f"attention ({', '.join(ATTENTION)}): add the other one to ATTENTION in model_cost.py"
            )
        products = self._products()
        is_vocabulary = [model.vocab_size <= product.outputs < model.vocab_size + PADDING for product in products]
        last = len(products) - 1 - is_vocabulary[::-1].index(True)
        after = next(product for product in products if product.place > layers[0])
        experts, num_experts, experts_per_token = self._experts()
        return ModelCost(
            layers=_sum(product.cost for product in products[:last] + products[last + 1 :]),
            experts=experts,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            vocabulary=products[last].cost,
            vocab_size=model.vocab_size,
            windows=tuple(self._window(node) for node in attention if node is not None),
            attention_macs=2 * after.inputs,  # query by key, and weight by value, over all heads
            cache_bytes=2 * model.num_kv_heads * model.head_dim * CACHE_BYTES[model.kv_cache_dtype],
        )

    def _products(self) -> list[_Product]:
        """In the order of the graph. Two branches may have the same one, which then counts once."""
        found: list[_Product] = []
        counted: set[str] = set()
        for index, (_, inner) in enumerate(self._nodes):
            for node in inner:
                operands = node.input[: PRODUCT_INPUTS.get(node.op_type)]
                read = [self._weights[name] for name in operands if name in self._weights]
                matrices = [weight for weight in read if len(weight.dims) > 1]
                if node.op_type not in PRODUCTS or not matrices or matrices[0].name in counted:
                    continue
                kind, shape = PRODUCTS[node.op_type]
                attributes = {each.name: self._onnx.helper.get_attribute_value(each) for each in node.attribute}
                inputs, outputs = shape(matrices[0].dims, attributes)
                new = [weight for weight in read if weight.name not in counted]
                counted |= {weight.name for weight in new}
                num_bytes = sum(weight.num_bytes for weight in new)
                found.append(_Product(index, inputs, outputs, Layers(num_bytes, {kind: inputs * outputs})))
        return found

    def _experts(self) -> tuple[Layers, int, int]:
        """Weights of mixtures, their experts in the first dimension, and how many there are and a token has."""
        found, num_experts, chosen = Layers(), 0, 0
        for _, inner in self._nodes:
            for node in inner:
                weight = self._weights.get(node.input[0]) if node.op_type in EXPERT_GATHERS else None
                if weight is not None and len(weight.dims) == 3:
                    found += Layers(weight.num_bytes, {"float32": math.prod(weight.dims)})
                    router = self._maker(node.input[1], ("TopK",))
                    num_experts, chosen = weight.dims[0], int(self._value(router.input[1]))
        return found, num_experts, chosen

    def _window(self, attention: Any) -> int | None:
        """Keys that a query sees at most."""
        own = next((each.i for each in attention.attribute if each.name == "window"), 0)
        if own or attention.op_type != "Attention":
            return own or None
        mask = attention.input[3] if len(attention.input) > 3 else ""
        return int(self._value(self._maker(mask, ("Less",)).input[1])) if mask else None

    def _maker(self, name: str, operators: Sequence[str]) -> Any:
        """The nearest node of these operators that the value comes from, or None."""
        waiting, seen = deque([name]), {name}
        while waiting:
            node = self._makers.get(waiting.popleft())
            if node is None:
                continue
            if node.op_type in operators:
                return node
            waiting += [each for each in node.input if each not in seen]
            seen |= set(node.input)
        return None

    def _value(self, name: str) -> float:
        return float(np.ravel(self._onnx.numpy_helper.to_array(self._stored[name]))[0])

    def _find(self, nodes: Iterable[Any], operators: Sequence[str]) -> Any:
        return next((node for node in nodes if node.op_type in operators), None)

    def _weight(self, tensor: Any) -> _Weight:
        item = self._onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        return _Weight(tensor.name, tuple(tensor.dims), int(item) * math.prod(tensor.dims))


def _with_inner(node: Any) -> Iterator[Any]:
    """The node, and those of its branches."""
    yield node
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _with_inner(inner)


def _sum(parts: Iterable[Layers]) -> Layers:
    return sum(parts, Layers())
