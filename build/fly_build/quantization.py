"""Weight quantisation for ONNX Runtime's kernels, in NumPy: int8 per column for the CPU, and blocks of 4 or 8 bits."""

from typing import Any

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
INT8_ACCUMULATION = 4

FloatArray = npt.NDArray[np.float32]


def quantize_int8(weight: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """weight [N, K] -> int8 [K, N] in -64..64 and float32 scales [N]: weight.T is about int8 * scales."""
    scales = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny * WEIGHT_LIMIT) / WEIGHT_LIMIT
    quantized = np.rint(weight / scales[:, None]).astype(np.int8)
    return np.ascontiguousarray(quantized.T), scales.astype(np.float32)


def quantize_blocks(
    weight: FloatArray, bits: int, scale_dtype: npt.DTypeLike = np.float32
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """weight [N, K] -> MatMulNBits' packed uint8 [N, blocks, BLOCK_SIZE * bits / 8] and scales [N, blocks].

    Symmetric around the operator's default zero point 2**(bits - 1); the value of largest magnitude of a block becomes
    the most negative code, which has one step more than the most positive one. K is padded with zeros.
    """
    columns, rows = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -rows % BLOCK_SIZE)))
    blocks = padded.reshape(columns, -1, BLOCK_SIZE)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)
    zero_point = 1 << (bits - 1)
    scales = (largest / -zero_point).astype(scale_dtype)
    steps = np.divide(blocks, scales.astype(np.float32), out=np.zeros_like(blocks), where=scales != 0)
    codes = np.clip(np.rint(steps) + zero_point, 0, 2 * zero_point - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, scales[..., 0]
