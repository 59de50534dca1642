"""Weight quantisation by rounding to nearest, in NumPy: no data is looked at, so the same weights always give the same
codes. A weight is [N, K], N outputs of K inputs; codes keep that shape unless said otherwise."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

# Activations are uint8 around 128, weights int8. On x86 without VNNI or AMX the kernel adds two products in 16 bits
# with saturation (vpmaddubsw), so the sum of two must fit: 2 * 255 * 64 < 2**15. With the full range, seen on an AVX2
# machine: errors of 2.5 standard deviations of the output instead of 0.3. All machines get the same tokens this way.
WEIGHT_LIMIT = 64
ACTIVATION_LIMIT = 127
ACTIVATION_ZERO_POINT = 128
SMALLEST_ROW_MAXIMUM = 1e-12

BLOCK_SIZE = 32
PACKED_COLUMNS, PACKED_ROWS = 16, 64  # multiples that a packed weight's outputs and inputs are padded to
INT8_ACCUMULATION = 4

FP8_LIMIT = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
# Of a block's largest magnitude, which codes it may become: a smaller scale clips it and is finer for all the others.
INT4_LARGEST_CODES = (7.0, 7.5, 8.0)

FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.int8]
Array = npt.NDArray[Any]


def quantize_int8(weight: FloatArray) -> tuple[CodeArray, FloatArray]:
    """weight [N, K] -> int8 [K, N] in -64..64 and float32 scales [N]: weight.T is about int8 * scales."""
    scales = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny * WEIGHT_LIMIT) / WEIGHT_LIMIT
    quantized = np.rint(weight / scales[:, None]).astype(np.int8)
    return np.ascontiguousarray(quantized.T), scales.astype(np.float32)


def packed_shape(columns: int, rows: int) -> tuple[int, int, int, int]:
    return -(-columns // PACKED_COLUMNS), -(-rows // PACKED_ROWS) * (PACKED_ROWS // 4), PACKED_COLUMNS, 4


def pack_int8(codes: Array) -> Array:
    """codes [N, K] in -64..64 -> uint8 [N / 16, K / 4, 16, 4], 64 added, N and K padded up with zeros: what Int8Linear
    of plugins/cpu reads from front to back."""
    shape = packed_shape(*codes.shape)
    blocks, fours, columns, four = shape
    padded = np.full((blocks * columns, fours * four), WEIGHT_LIMIT, np.uint8)
    padded[: codes.shape[0], : codes.shape[1]] = codes.astype(np.int16) + WEIGHT_LIMIT
    return np.ascontiguousarray(padded.reshape(blocks, columns, fours, four).transpose(0, 2, 1, 3))


def quantize_blocks(
    weight: FloatArray, bits: int, scale_dtype: npt.DTypeLike = np.float32
) -> tuple[CodeArray, FloatArray]:
    """weight [N, K] -> codes [N, K] of 4 or 8 bits and scales [N, blocks] of either sign, which `scale_dtype` holds
    exactly.

    The value of largest magnitude of a block becomes the most negative code, which has one step more than the most
    positive one. The last block may be shorter.
    """
    blocks = _in_blocks(weight, BLOCK_SIZE)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)
    most = 1 << (bits - 1)
    scales = (largest / -most).astype(scale_dtype).astype(np.float32)
    steps = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales != 0)
    codes = np.clip(np.rint(steps), -most, most - 1).astype(np.int8)
    return codes.reshape(len(weight), -1)[:, : weight.shape[1]], scales[..., 0]


def quantize_channels(weight: FloatArray, scale_dtype: npt.DTypeLike) -> tuple[CodeArray, FloatArray]:
    """weight [N, K] -> codes [N, K] in -127..127 and positive scales [N, 1], which `scale_dtype` holds exactly."""
    scales = _rounded(np.abs(weight).max(axis=1, keepdims=True) / 127, scale_dtype)
    return np.clip(np.rint(weight / scales), -127, 127).astype(np.int8), scales


def quantize_int4(weight: FloatArray, block_size: int, scale_dtype: npt.DTypeLike) -> tuple[CodeArray, FloatArray]:
    """weight [N, K] -> codes [N, K] in -8..7 and positive scales [N, K / block_size], which `scale_dtype` holds
    exactly: of each block the scale with the least squared error."""
    blocks = _in_blocks(weight, block_size)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    codes, scales, errors = np.zeros(blocks.shape, np.int8), np.ones_like(largest), np.full_like(largest, np.inf)
    for code in INT4_LARGEST_CODES:
        tried = _rounded(largest / code, scale_dtype)
        rounded = np.clip(np.rint(blocks / tried), -8, 7)
        error = np.square(rounded * tried - blocks).sum(axis=2, keepdims=True)
        is_better = error < errors
        codes = np.where(is_better, rounded.astype(np.int8), codes)
        scales, errors = np.where(is_better, tried, scales), np.minimum(error, errors)
    return codes.reshape(weight.shape), scales[..., 0]


def quantize_fp8(weight: FloatArray, scale_dtype: npt.DTypeLike) -> tuple[Array, FloatArray]:
    """weight [N, K] -> float8_e4m3fn [N, K] and positive scales [N, 1], which `scale_dtype` holds exactly."""
    scales = _rounded(np.abs(weight).max(axis=1, keepdims=True) / FP8_LIMIT, scale_dtype)
    return np.clip(weight / scales, -FP8_LIMIT, FP8_LIMIT).astype(ml_dtypes.float8_e4m3fn), scales


def pack_blocks(codes: CodeArray, bits: int, block_size: int) -> npt.NDArray[np.uint8]:
    """Signed codes [N, K] -> MatMulNBits' packed uint8 [N, blocks, block_size * bits / 8] around the operator's default
    zero point 2**(bits - 1), low half first. K is padded with zeros."""
    shifted: npt.NDArray[np.uint8] = (_in_blocks(codes, block_size) + np.int16(1 << (bits - 1))).astype(np.uint8)
    return shifted if bits == 8 else shifted[..., 0::2] | (shifted[..., 1::2] << np.uint8(4))


def _in_blocks(weight: Array, block_size: int) -> Array:
    """[N, K] -> [N, blocks, block_size], the last block filled up with zeros."""
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % block_size)))
    return padded.reshape(len(weight), -1, block_size)


def _rounded(scales: FloatArray, dtype: npt.DTypeLike) -> FloatArray:
    """As they will be stored, so that the codes are those of the stored scales. A row of zeros has any scale."""
    stored = scales.astype(dtype).astype(np.float32)
    return np.where(stored > 0, stored, np.float32(1))
