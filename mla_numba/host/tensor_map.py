"""Tensor maps: what TMA must know of a tensor, in 128 bytes."""

import numpy as np
from cuda.bindings import driver

from .driver import checked

_DTYPES = {"bfloat16": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
           "float16": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16}


def encode(dtype: str, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """A tensor map of 16-bit elements with 128-byte swizzle. TMA takes it at a multiple of 64 bytes.

    `sizes` and `box` innermost first; `strides` in bytes, of all axes but the innermost.
    """
    word, size = driver.cuuint32_t, driver.cuuint64_t
    tensor_map = checked(driver.cuTensorMapEncodeTiled(
        _DTYPES[dtype], len(sizes), address, [size(n) for n in sizes], [size(n) for n in strides], [word(n) for n in box],
        [word(1)] * len(sizes), driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        # To promote to 256 bytes, which rows of 1,152 straddle, costs 1% where memory is the limit (H100).
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B, driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE), f"cuTensorMapEncodeTiled({sizes}, {strides}, {box})")
    return np.array([int(part) for part in tensor_map.opaque], dtype=np.uint64).tobytes()
