"""Where the libraries that quantise keep a linear layer's codes, scales and zero points.

Each layout was written after the library that makes it: AutoAWQ 0.2.9, GPTQModel 7.7, compressed-tensors 0.20 and
ModelOpt 0.47. Shapes and types are checked at once; codes are read when the layer is written.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from fly_build.quantization import CodeArray, FloatArray
from fly_build.quantized_weight import Codes, QuantizedWeight
from fly_build.stored import Stored
from fly_trt.errors import CheckpointError

IntArray = npt.NDArray[np.int32]
FIX = "give the original and use --quantization"
# Position in an int32 of AutoAWQ's GEMM layout -> which of the 8 outputs lies there, and the reverse.
AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
OUTPUT_PLACES = np.argsort(AWQ_ORDER)


@dataclass(frozen=True)
class Scheme:
    """How the linear layers of one checkpoint are quantised. `suffix` names the tensor that such a layer has;
    `group_size` None is one scale for each output, or for the whole weight. `is_v1`: GPTQ's first format, which stores
    zero points less one. `kv_cache_algorithm`: how the checkpoint wants its KV cache, for libraries that follow it."""

    method: str
    kind: Codes
    suffix: str
    read: "Callable[[Scheme, LinearTensors], QuantizedWeight]"
    bits: int = 8
    group_size: int | None = None
    is_v1: bool = False
    keeps_activations: bool = True
    kv_cache_algorithm: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """With scales, where blocks have them."""
        return self.bits + (16 / self.group_size if self.group_size else 0)


class LinearTensors:
    """The tensors of one linear layer `name`.*, each read when it is asked for."""

    def __init__(self, checkpoint: str, name: str, shape: tuple[int, int], stored: Mapping[str, Stored]) -> None:
        self.checkpoint, self.name, self.shape = checkpoint, name, shape
        self._stored = stored
        self.used: set[str] = set()

    def has(self, suffix: str) -> bool:
        return f"{self.name}.{suffix}" in self._stored

    def expect(self, suffix: str, kind: str, *shapes: tuple[int, ...]) -> None:
        """Raises CheckpointError unless there is such a tensor, of this type (as safetensors calls it; any float where
        it is "float") and one of these shapes."""
        key = f"{self.name}.{suffix}"
        self.used.add(key)
        if key not in self._stored:
            raise CheckpointError(f"{self.checkpoint}: no {key}: the checkpoint is incomplete: download it again")
        found = self._stored[key]
        is_of_kind = found.kind in ("F32", "F16", "BF16") if kind == "float" else found.kind == kind
        if not is_of_kind or found.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise CheckpointError(
                f"{self.checkpoint}: {key} is {found.kind} {list(found.shape)}, expected {kind} {wanted}: the "
                "checkpoint is not what its quantization_config says"
            )

    def tensor(self, suffix: str) -> torch.Tensor:
        return self._stored[f"{self.name}.{suffix}"].read()

    def floats(self, suffix: str) -> FloatArray:
        return self.tensor(suffix).to(torch.float32).numpy()

    def integers(self, suffix: str) -> IntArray:
        return self.tensor(suffix).numpy()


def read_awq(scheme: Scheme, linear: LinearTensors) -> QuantizedWeight:
    """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]: 8 outputs to an int32, in AWQ_ORDER."""
    columns, rows = linear.shape
    groups = _num_groups(scheme, linear)
    linear.expect("qweight", "I32", (rows, columns // 8))
    linear.expect("qzeros", "I32", (groups, columns // 8))
    linear.expect("scales", "float", (groups, columns))

    def unpacked(suffix: str) -> CodeArray:
        fields = _fields(linear.integers(suffix), 4, OUTPUT_PLACES)
        return _signed(fields.reshape(-1, columns), 4).T

    return _integers(
        scheme, linear, lambda: unpacked("qweight"), lambda: linear.floats("scales").T, lambda: unpacked("qzeros")
    )


def read_gptq(scheme: Scheme, linear: LinearTensors) -> QuantizedWeight:
    """qweight [in * bits / 32, out], qzeros [groups, out * bits / 32], scales [groups, out], g_idx [in]: the group of
    each input."""
    columns, rows = linear.shape
    groups, packed = _num_groups(scheme, linear), 32 // scheme.bits
    linear.expect("qweight", "I32", (rows // packed, columns))
    linear.expect("qzeros", "I32", (groups, columns // packed))
    linear.expect("scales", "float", (groups, columns))
    order = None
    if linear.has("g_idx"):
        linear.expect("g_idx", "I32", (rows,))
        order = _order(linear, linear.integers("g_idx"), scheme.group_size or rows)

    def codes() -> CodeArray:
        fields = _fields(linear.integers("qweight").T, scheme.bits).reshape(columns, rows)
        signed = _signed(fields, scheme.bits)
        return signed if order is None else signed[:, order]

    def zero_points() -> CodeArray:
        fields = _fields(linear.integers("qzeros"), scheme.bits).reshape(groups, columns)
        # What overflows in the first format wraps around, as it did when it was written.
        stored = (fields + np.uint8(scheme.is_v1)) & np.uint8((1 << scheme.bits) - 1)
        return _signed(stored, scheme.bits).T

    return _integers(scheme, linear, codes, lambda: linear.floats("scales").T, zero_points, order)


def read_packed(scheme: Scheme, linear: LinearTensors) -> QuantizedWeight:
    """weight_packed [out, in * bits / 32], weight_scale [out, groups], weight_zero_point [out * bits / 32, groups], all
    shifted by 2**(bits - 1)."""
    columns, rows = linear.shape
    groups, packed = _num_groups(scheme, linear), 32 // scheme.bits
    linear.expect("weight_packed", "I32", (columns, -(-rows // packed)))
    linear.expect("weight_scale", "float", (columns, groups))
    linear.expect("weight_shape", "I64", (2,))
    order = None
    if linear.has("weight_g_idx"):
        linear.expect("weight_g_idx", "I32", (rows,))
        order = _order(linear, linear.integers("weight_g_idx"), scheme.group_size or rows)

    def codes() -> CodeArray:
        fields = _fields(linear.integers("weight_packed"), scheme.bits).reshape(columns, -1)[:, :rows]
        signed = _signed(fields, scheme.bits)
        return signed if order is None else signed[:, order]

    def zero_points() -> CodeArray:
        fields = _fields(linear.integers("weight_zero_point").T, scheme.bits).reshape(groups, -1)[:, :columns]
        return _signed(fields, scheme.bits).T

    has_zero_points = linear.has("weight_zero_point")
    if has_zero_points:
        linear.expect("weight_zero_point", "I32", (-(-columns // packed), groups))
    read_zero_points = zero_points if has_zero_points else None
    return _integers(scheme, linear, codes, lambda: linear.floats("weight_scale"), read_zero_points, order)


def read_modelopt_int4(scheme: Scheme, linear: LinearTensors) -> QuantizedWeight:
    """weight uint8 [out / 2, in], an even output in the low half; weight_scale [out, groups]; pre_quant_scale [in],
    which the layer's input is multiplied by."""
    columns, rows = linear.shape
    linear.expect("weight", "U8", (columns // 2, rows))
    linear.expect("weight_scale", "float", (columns, _num_groups(scheme, linear)))
    factors = None
    if linear.has("pre_quant_scale"):
        linear.expect("pre_quant_scale", "float", (rows,))
        factors = lambda: linear.floats("pre_quant_scale")  # noqa: E731

    def codes() -> CodeArray:
        packed = linear.tensor("weight").numpy()
        halves = np.stack([packed & 15, packed >> 4], axis=1).reshape(columns, rows).astype(np.int8)
        return (halves ^ np.int8(8)) - np.int8(8)  # two's complement of 4 bits

    return _integers(scheme, linear, codes, lambda: linear.floats("weight_scale"), None, factors=factors)


def read_int8(scheme: Scheme, linear: LinearTensors) -> QuantizedWeight:
    """weight int8 [out, in], weight_scale for each output or for all."""
    linear.expect("weight", "I8", linear.shape)
    scales = _expect_scales(linear)
    if linear.has("weight_zero_point"):
        raise CheckpointError(
            f"{linear.checkpoint}: {linear.name} has zero points for 8 bits, which are not read: {FIX}"
        )
    return QuantizedWeight(
        f"{linear.name}.weight",
        "int8",
        linear.shape,
        linear.shape[1],
        lambda: linear.tensor("weight").numpy(),
        lambda: linear.floats("weight_scale").reshape(scales),
        has_one_scale=scales == (1, 1),
    )


def read_fp8(scheme: Scheme, linear: LinearTensors) -> QuantizedWeight:
    """weight float8_e4m3fn [out, in], weight_scale for each output or for all, and input_scale where activations were
    calibrated."""
    linear.expect("weight", "F8_E4M3", linear.shape)
    scales = _expect_scales(linear)
    activation_scale = None
    if scheme.keeps_activations and linear.has("input_scale"):
        linear.expect("input_scale", "float", (), (1,))
        activation_scale = float(linear.floats("input_scale").reshape(()))
    return QuantizedWeight(
        f"{linear.name}.weight",
        "fp8",
        linear.shape,
        linear.shape[1],
        lambda: linear.tensor("weight").view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn),
        lambda: linear.floats("weight_scale").reshape(scales),
        has_one_scale=scales == (1, 1),
        activation_scale=activation_scale,
    )


def _expect_scales(linear: LinearTensors) -> tuple[int, int]:
    """The shape of weight_scale, as scales have it here."""
    columns = linear.shape[0]
    linear.expect("weight_scale", "float", (), (1,), (columns,), (columns, 1))
    size = linear.tensor("weight_scale").numel()
    return (size, 1)


def _num_groups(scheme: Scheme, linear: LinearTensors) -> int:
    columns, rows = linear.shape
    size = scheme.group_size or rows
    if rows % size or columns % 8:
        raise CheckpointError(
            f"{linear.checkpoint}: {linear.name} has {rows} inputs and {columns} outputs, which groups of {size} and 8 "
            f"do not divide: {FIX}"
        )
    return rows // size


def _order(linear: LinearTensors, groups: IntArray, size: int) -> npt.NDArray[np.int64] | None:
    """The inputs group by group, or None where they lie so already."""
    if (groups < 0).any() or (np.bincount(groups) != size).any():
        raise CheckpointError(f"{linear.checkpoint}: {linear.name} has groups of other sizes than {size}: {FIX}")
    in_place = np.arange(len(groups)) // size
    return None if (groups == in_place).all() else np.argsort(groups, kind="stable")


def _fields(words: IntArray, bits: int, places: Iterable[int] = range(8)) -> npt.NDArray[np.uint8]:
    """int32 [..., n] -> their unsigned fields [..., n, 32 / bits], the lowest first; those of 4 bits as `places` says.

    Large models have so many that a pass over all of them counts, hence no wider types and no fancy indices.
    """
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8).reshape(*words.shape, 4)
    if bits == 8:
        return octets
    fields = np.empty((*words.shape, 8), np.uint8)
    for index, place in enumerate(places):
        octet = octets[..., place // 2]
        fields[..., index] = octet >> 4 if place % 2 else octet & 15
    return fields


def _signed(fields: npt.NDArray[np.uint8], bits: int) -> CodeArray:
    """Unsigned codes around their middle."""
    return fields.view(np.int8) - np.int8(8) if bits == 4 else (fields ^ np.uint8(128)).view(np.int8)


def _integers(
    scheme: Scheme,
    linear: LinearTensors,
    codes: Callable[[], CodeArray],
    scales: Callable[[], FloatArray],
    zero_points: Callable[[], CodeArray] | None,
    order: npt.NDArray[np.int64] | None = None,
    factors: Callable[[], FloatArray] | None = None,
) -> QuantizedWeight:
    """Zero points that are all in the middle are none. They are small enough to be looked at first."""
    if zero_points is not None and not zero_points().any():
        zero_points = None
    return QuantizedWeight(
        f"{linear.name}.weight",
        scheme.kind,
        linear.shape,
        scheme.group_size or linear.shape[1],
        codes,
        scales,
        zero_points,
        input_factors=factors,
        input_order=order,
    )
