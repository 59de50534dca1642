"""CacheAttention of plugins/cpu, by each kind of lanes of this machine, against NumPy in float64; and that a token's
bits are its own: the same in every step shape, batch, cache capacity, and number of threads."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from cpu_operators import CpuOperators, Node

CHUNK = 256  # keys whose weights the kernels form together
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


@dataclass(frozen=True)
class Layer:
    """One attention layer: B sequences whose first `cached` tokens are in the cache, and T new ones."""

    query: np.ndarray  # [B, T, Hq, D]
    key: np.ndarray  # [B, T, Hkv, D]
    value: np.ndarray
    cached: tuple[int, ...]
    past_key: np.ndarray  # [B, Hkv, S, D]
    past_value: np.ndarray
    rotation: np.ndarray | None = None  # angles [B, T, R / 2]
    norms: np.ndarray | None = None  # [2, D] of queries and of keys
    softcap: float = 0
    window: int = 0
    scale: float = 0.2
    is_packed: bool = True

    @classmethod
    def random(
        cls,
        cached: tuple[int, ...],
        num_tokens: int,
        *,
        heads: tuple[int, int] = (6, 2),
        dim: int = 32,
        capacity: int = 0,
        dtype: str = "float32",
        rotated: int = 0,
        has_norms: bool = False,
        **others: Any,
    ) -> "Layer":
        rng = np.random.default_rng(sum(cached) + num_tokens)
        batch, capacity = len(cached), capacity or -(-(max(cached) + num_tokens) // 16) * 16
        query, key, value = (
            rng.normal(size=(batch, num_tokens, count, dim)).astype(np.float32) for count in (heads[0], *heads[1:] * 2)
        )
        past = rng.normal(size=(2, batch, heads[1], capacity, dim)).astype(dtype)
        angles = rng.uniform(0, 6, (batch, num_tokens, rotated // 2)) if rotated else None
        norms = rng.uniform(0.5, 1.5, (2, dim)).astype(np.float32) if has_norms else None
        return cls(query, key, value, cached, *past, rotation=angles, norms=norms, **others)

    @property
    def num_tokens(self) -> int:
        return self.query.shape[1]

    def node(self) -> Node:
        batch, tokens, heads, _ = self.query.shape
        states = [
            part.reshape(batch, tokens, part.shape[2] * part.shape[3]) for part in (self.query, self.key, self.value)
        ]
        if self.is_packed:
            states = [np.concatenate(states, axis=-1), None, None]
        angles = self.rotation
        turns = [None, None] if angles is None else [f(angles).astype(np.float32) for f in (np.cos, np.sin)]
        names = ["query", "key", "value", "write_indices", "past_key", "past_value", "cos", "sin"]
        values = [*states, np.array(self.cached), blocks(self.past_key), self.past_value, *turns]
        norms = [None, None] if self.norms is None else list(self.norms)
        attributes = {"num_heads": heads, "num_kv_heads": self.key.shape[2], "scale": self.scale, "epsilon": 1e-5}
        attributes |= {"softcap": float(self.softcap), "window": self.window}
        cache = TYPES[str(self.past_key.dtype)]
        return Node(
            "CacheAttention",
            dict(zip([*names, "query_norm", "key_norm"], [*values, *norms], strict=True)),
            attributes,
            ("y", "present_key", "present_value"),
            (TensorProto.FLOAT, cache, cache),
        )

    def prepared(self, states: np.ndarray, norm: int) -> np.ndarray:
        """Queries or keys after norm and rotation."""
        x = states.astype(np.float64)
        if self.norms is not None:
            x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * self.norms[norm]
        if self.rotation is not None:
            half = self.rotation.shape[-1]
            cosine, sine = (f(self.rotation)[:, :, None] for f in (np.cos, np.sin))
            left, right = x[..., :half].copy(), x[..., half : 2 * half].copy()
            x[..., :half] = left * cosine - right * sine
            x[..., half : 2 * half] = right * cosine + left * sine
        return x

    def expected(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """y [B, T, Hq D] in float64, and the caches [B, Hkv, S, D]."""
        keys, values = self.past_key.copy(), self.past_value.copy()
        new = self.prepared(self.key, 1).swapaxes(1, 2), self.value.swapaxes(1, 2)
        for row, at in enumerate(self.cached):
            keys[row, :, at : at + self.num_tokens] = new[0][row]
            values[row, :, at : at + self.num_tokens] = new[1][row]
        queries = self.prepared(self.query, 0) * self.scale
        group = self.query.shape[2] // self.key.shape[2]
        y = np.zeros(self.query.shape)
        for row, at in enumerate(self.cached):
            for t in range(self.num_tokens):
                end = at + t + 1
                seen = slice(max(0, end - self.window) if self.window else 0, end)
                k, v = (np.repeat(cache[row, :, seen].astype(np.float64), group, axis=0) for cache in (keys, values))
                scores = np.einsum("hd,hsd->hs", queries[row, t], k)
                if self.softcap:
                    scores = self.softcap * np.tanh(scores / self.softcap)
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                y[row, t] = np.einsum("hs,hsd->hd", weights / weights.sum(axis=-1, keepdims=True), v)
        return y.reshape(*y.shape[:2], -1), keys, values

    def rows(self, rows: slice) -> "Layer":
        """Some of its sequences."""
        fields = ("query", "key", "value", "cached", "past_key", "past_value", "rotation")
        return self._cut(fields, lambda array: array[rows])

    def tokens(self, first: int, end: int) -> "Layer":
        """Some of its tokens, which come behind those before them."""
        fields = ("query", "key", "value", "rotation")
        part = self._cut(fields, lambda array: array[:, first:end])
        return dataclasses.replace(part, cached=tuple(at + first for at in self.cached))

    def after(self, keys: np.ndarray, values: np.ndarray) -> "Layer":
        """With a cache that a step left, in blocks."""
        return dataclasses.replace(self, past_key=unblocked(keys), past_value=values)

    def _cut(self, fields: tuple[str, ...], cut: Any) -> "Layer":
        arrays = {name: value for name in fields if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, **{name: cut(value) for name, value in arrays.items()})


def blocks(keys: np.ndarray) -> np.ndarray:
    """[B, H, S, D] -> [B, H, S / 16, D, 16]."""
    batch, heads, capacity, dim = keys.shape
    return np.ascontiguousarray(keys.reshape(batch, heads, capacity // 16, 16, dim).swapaxes(3, 4))


def unblocked(keys: np.ndarray) -> np.ndarray:
    batch, heads, num_blocks, dim, _ = keys.shape
    return keys.swapaxes(3, 4).reshape(batch, heads, num_blocks * 16, dim)


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


CASES = {
    "one token": Layer.random((0,), 1),
    "one token behind others": Layer.random((300, 17), 1),
    "behind a long cache": Layer.random((1500,), 1, heads=(9, 3)),
    "a prompt": Layer.random((0,), 70),
    "a long prompt": Layer.random((0,), 530, dim=16, heads=(2, 1)),
    "at the borders of chunks": Layer.random((CHUNK - 3, CHUNK - 2, 2 * CHUNK - 1, 2 * CHUNK), 4),
    "a head each": Layer.random((250,), 13, heads=(3, 3)),
    "all share one": Layer.random((250,), 3, heads=(8, 1)),
    "rotated": Layer.random((5, 250), 9, rotated=32),
    "rotated in part": Layer.random((5, 250), 9, rotated=20, dim=48),
    "norms": Layer.random((5, 250), 9, rotated=32, has_norms=True),
    "capped": Layer.random((250,), 9, softcap=2.0),
    "a window": Layer.random((0, 250, 700), 9, window=40),
    "a window of one chunk": Layer.random((0, 250, 700), 9, window=CHUNK),
    "a window of one key": Layer.random((250,), 9, window=1),
    "a window for a prompt": Layer.random((3,), 300, window=100, heads=(3, 3), dim=16),
    "apart": Layer.random((250, 3), 9, is_packed=False),
    "80 channels": Layer.random((250,), 9, dim=80),
    "128 channels": Layer.random((250,), 9, dim=128),
    "256 channels": Layer.random((250,), 9, dim=256, heads=(2, 1)),
}


@pytest.fixture(scope="module", params=["avx2", "avx512"])
def kind(request: pytest.FixtureRequest, offered_kinds: list[str]) -> str:
    if request.param not in offered_kinds:
        pytest.skip(f"this machine has {', '.join(offered_kinds)}")
    return str(request.param)


def of_type(layer: Layer, dtype: str) -> Layer:
    return dataclasses.replace(layer, past_key=layer.past_key.astype(dtype), past_value=layer.past_value.astype(dtype))


def test_attention_is_numpys(kind: str, cpu_operators: CpuOperators) -> None:
    layers = {(name, dtype): of_type(layer, dtype) for name, layer in CASES.items() for dtype in TYPES}
    found = cpu_operators.run(kind, [layer.node() for layer in layers.values()])
    for (name, dtype), (y, keys, values) in zip(layers, found, strict=True):
        right, right_keys, right_values = layers[name, dtype].expected()
        of_key, of_output = (1e-3, 1e-3) if dtype == "float16" else (1e-5, 1e-5)
        np.testing.assert_allclose(unblocked(keys), right_keys, rtol=of_key, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(values, right_values, name)
        np.testing.assert_allclose(y, right, atol=of_output, err_msg=name)


def test_all_kinds_of_lanes_give_the_same_bits(offered_kinds: list[str], cpu_operators: CpuOperators) -> None:
    layers = []
    for dtype in TYPES:
        options = {"dtype": dtype, "rotated": 20, "has_norms": True, "softcap": 30.0}
        layers += [Layer.random((250, 600), 13, dim=48, **options), Layer.random((900,), 1, **options)]
    kinds = [kind for kind in ("avx2", "avx512") if kind in offered_kinds]
    first, *others = [cpu_operators.run(kind, [layer.node() for layer in layers]) for kind in kinds]
    for other in others:
        assert_same_bits(first, other)


def assert_same_bits(ours: list[list[np.ndarray]], theirs: list[list[np.ndarray]]) -> None:
    for left, right in zip(ours, theirs, strict=True):
        assert [array.tobytes() for array in left] == [array.tobytes() for array in right]


def test_a_token_has_the_same_bits_in_every_step(cpu_operators: CpuOperators) -> None:
    cuts = ([1] * 75, [7, 64, 2, 67], [16] * 6)
    options = {"rotated": 32, "heads": (3, 1)}
    wholes = [
        Layer.random((CHUNK - 70,), 140, dtype=dtype, window=window, **options)
        for dtype in TYPES
        for window in (0, 100)
    ]
    found = cpu_operators.run("", [whole.node() for whole in wholes])
    # Each step has the cache that the whole leaves, of which it sees a part.
    steps = [
        whole.tokens(end - size, end).after(*cache)
        for whole, (_, *cache) in zip(wholes, found, strict=True)
        for sizes in cuts
        for size, end in zip(sizes, np.cumsum(sizes), strict=True)
    ]
    parts = iter(cpu_operators.run("", [step.node() for step in steps]))
    for whole, (expected, *_) in zip(wholes, found, strict=True):
        for sizes in cuts:
            y = np.concatenate([next(parts)[0] for _ in sizes], axis=1)
            where = f"{whole.past_key.dtype}, window {whole.window}, {sizes}"
            np.testing.assert_array_equal(bits(y), bits(expected[:, : y.shape[1]]), where)


def test_steps_leave_the_cache_that_one_step_leaves(cpu_operators: CpuOperators) -> None:
    whole = Layer.random((9,), 24, dtype="float16", rotated=32)
    [[_, *expected]] = cpu_operators.run("", [whole.node()])
    cache = blocks(whole.past_key), whole.past_value
    for first, end in ((0, 17), (17, 24)):
        [[_, *cache]] = cpu_operators.run("", [whole.tokens(first, end).after(*cache).node()])
    for ours, theirs in zip(cache, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_a_sequence_has_the_same_bits_alone_and_in_a_cache_of_any_size(
    num_tokens: int, cpu_operators: CpuOperators
) -> None:
    batch = Layer.random((3, 700, 255, 31), num_tokens, dtype="float16")
    longer = [
        dataclasses.replace(batch, past_key=longer_cache(batch.past_key), past_value=longer_cache(batch.past_value))
    ]
    alone = [batch.rows(slice(row, row + 1)) for row in range(4)]
    [expected, *_], longer_found, *others = cpu_operators.run("", [part.node() for part in (batch, *longer, *alone)])
    np.testing.assert_array_equal(bits(longer_found[0]), bits(expected))
    np.testing.assert_array_equal(bits(np.concatenate([y for y, *_ in others])), bits(expected))


def longer_cache(cache: np.ndarray) -> np.ndarray:
    return np.concatenate([cache, np.full_like(cache, np.nan)], axis=2)


def test_the_number_of_threads_changes_no_bit(cpu_operators: CpuOperators) -> None:
    layers = [
        Layer.random((1500,), 1, heads=(3, 1)),
        Layer.random((1500,), 1, heads=(12, 4), dtype="float16"),
        Layer.random((700, 40), 40, heads=(9, 3), dtype="float16"),
        Layer.random((0,), 300),
    ]
    nodes = [layer.node() for layer in layers]
    one, three = (dataclasses.replace(cpu_operators, num_threads=n).run("", nodes * 2) for n in (1, 3))
    assert_same_bits(one, three)


def test_many_tokens_behind_many_keep_little_memory_and_their_bits(cpu_operators: CpuOperators) -> None:
    """Their chunks, shared out among threads, would leave 64 MiB to be merged."""
    whole = Layer.random((63_488,), 2048, heads=(1, 1), dim=16)
    near = dataclasses.replace(whole, cached=(0,))
    assert cpu_operators.peak_memory([whole.node()]) - cpu_operators.peak_memory([near.node()]) < 32 << 20
    [[y, *cache]] = cpu_operators.run("", [whole.node()])
    [[last, *_]] = cpu_operators.run("", [whole.tokens(2044, 2048).after(*cache).node()])
    np.testing.assert_array_equal(bits(last[0]), bits(y[0, -4:]))


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_not_a_number_reaches_only_those_who_see_it(dtype: str, kind: str, cpu_operators: CpuOperators) -> None:
    layer = Layer.random((300, 300, 300), 12, dtype=dtype)
    bad = dataclasses.replace(layer, query=layer.query.copy(), key=layer.key.copy(), value=layer.value.copy())
    bad.query[0, 5] = np.nan
    bad.query[0, 6, :, 3] = np.inf
    bad.key[1, 4] = np.nan
    bad.value[2, 7, :, 2] = np.nan
    windowed = dataclasses.replace(bad, window=5)
    [clean, *_], [y, *_], [in_window, *_] = cpu_operators.run(kind, [layer.node(), bad.node(), windowed.node()])
    is_nan = np.isnan(y.reshape(*bad.query.shape)).all(axis=2)  # of all heads alike
    right = np.zeros(is_nan.shape, bool)
    right[0, 5:7] = right[1, 4:] = True
    right[2, 7:, 2] = True
    np.testing.assert_array_equal(is_nan, right)
    assert (np.isnan(y) == np.repeat(right[:, :, None], 6, axis=2).reshape(y.shape)).all()
    np.testing.assert_array_equal(bits(y[~np.isnan(y)]), bits(clean[~np.isnan(y)]))
    right[1, 9:] = right[2, 12:] = False
    np.testing.assert_array_equal(np.isnan(in_window.reshape(*bad.query.shape)).all(axis=2), right)


def test_a_capped_score_of_infinity_is_not_a_number(cpu_operators: CpuOperators) -> None:
    layer = Layer.random((30,), 3, softcap=5.0)
    layer.query[0, 1, :, 0] = np.inf
    [[y, *_]] = cpu_operators.run("", [layer.node()])
    assert np.isnan(y[0]).all(axis=-1).tolist() == np.isnan(y[0]).any(axis=-1).tolist() == [False, True, False]


def test_extreme_numbers(kind: str, cpu_operators: CpuOperators) -> None:
    """16 bits hold the largest that they can in place of larger ones. Where scores lie far apart, the nearest key is
    left alone."""
    layer = Layer.random((3,), 2, dtype="float16")
    layer.value[0, 0, 0, :4] = [1e6, -1e6, np.inf, np.nan]
    layer.key[0, 1, 1, :4] = [1e6, -1e6, -np.inf, 65500]
    far = [Layer.random((300,), 2, scale=scale) for scale in (60.0, 300.0)]
    [_, keys, values], *found = cpu_operators.run(kind, [part.node() for part in (layer, *far)])
    np.testing.assert_array_equal(values[0, 0, 3, :4], np.float16([65504, -65504, 65504, np.nan]))
    np.testing.assert_array_equal(unblocked(keys)[0, 1, 4, :4], np.float16([65504, -65504, -65504, 65504]))
    for part, (y, *_) in zip(far, found, strict=True):
        np.testing.assert_allclose(y, part.expected()[0], atol=2e-3)


def test_a_step_that_the_cache_has_no_room_for_is_refused(cpu_operators: CpuOperators) -> None:
    layer = dataclasses.replace(Layer.random((10,), 8), cached=(25,))
    with pytest.raises(RuntimeError, match="8 tokens from position 25 on, in a cache with room for 32"):
        cpu_operators.run("", [layer.node()])


def test_what_it_cannot_do_is_refused(cpu_operators: CpuOperators) -> None:
    def node(inputs: dict[str, Any], attributes: dict[str, Any], **layer: Any) -> Node:
        made = Layer.random((10, 20), 2, **layer).node()
        return dataclasses.replace(made, inputs=made.inputs | inputs, attributes=made.attributes | attributes)

    def tables(*shape: int) -> np.ndarray:
        return np.ones(shape, np.float32)

    dim, heads, norms = "the size of a head is a multiple of 16", "num_heads is a multiple", "query_norm and key_norm"
    rotation = "R at most D"
    cases = [
        (dim, node({}, {}, dim=24)),
        (heads, node({}, {}, heads=(5, 2))),
        (heads, node({"query": tables(2, 2, 4 * 32)}, {"num_heads": 0})),
        (rotation, node({}, {}, rotated=40)),
        (rotation, node({"cos": tables(1, 1, 16), "sin": tables(1, 1, 16)}, {})),
        (rotation, node({"cos": tables(2, 2, 16), "sin": tables(2, 1, 16)}, {})),
        (rotation, node({"cos": tables(2, 2, 16)}, {})),
        (rotation, node({"sin": tables(2, 2, 16)}, {})),
        (norms, node({"query_norm": tables(16)}, {})),
        (norms, node({"key_norm": tables(31)}, {})),
        ("write_indices has one", node({"write_indices": np.array([1])}, {})),
        ("past_key is", node({"past_value": tables(2, 2, 16, 32)}, {})),
        ("query is", node({"query": tables(2, 2, 9 * 32)}, {})),
    ]
    for (right, _), said in zip(cases, cpu_operators.refusals([node for _, node in cases]), strict=True):
        assert "CacheAttention: " in said
        assert right in said


class Computed(Node):
    """With keys and values that come from another node: without tokens these have no memory."""

    def model(self) -> bytes:
        model = onnx.load_from_string(super().model())
        [node] = model.graph.node
        for name in ("key", "value"):
            node.input[list(node.input).index(name)] = f"computed.{name}"
            model.graph.node.insert(0, onnx.helper.make_node("Neg", [name], [f"computed.{name}"]))
        made: bytes = model.SerializeToString()
        return made


def test_a_step_of_no_tokens_leaves_the_cache_as_it_was(cpu_operators: CpuOperators) -> None:
    layer = Layer.random((10,), 1, is_packed=False).tokens(0, 0)
    node = Computed(**vars(layer.node()))
    [[y, keys, values]] = cpu_operators.run("", [node])
    assert y.shape == (1, 0, 6 * 32)
    np.testing.assert_array_equal(keys, node.inputs["past_key"])
    np.testing.assert_array_equal(values, layer.past_value)
