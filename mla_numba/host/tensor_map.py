"""Tensor maps: what TMA must know of a tensor, 128 bytes in device memory, made once per tensor and kept."""

import threading
from typing import Any

import numpy as np
from cuda.bindings import driver

from .cubin import checked

MAP_BYTES = 128
_NUM_SLOTS = 4096
_DTYPES = {"bfloat16": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
           "float16": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16}


def encode(dtype: str, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """The 128 bytes of a tensor map of 16-bit elements with 128-byte swizzle.

    `sizes` and `box` innermost first; `strides` in bytes, of all axes but the innermost.
    """
    word, size = driver.cuuint32_t, driver.cuuint64_t
    tensor_map = checked(driver.cuTensorMapEncodeTiled(
        _DTYPES[dtype], len(sizes), address, [size(n) for n in sizes], [size(n) for n in strides], [word(n) for n in box],
        [word(1)] * len(sizes), driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        # To promote to 256 bytes, which rows of 1,152 straddle, costs 1% where memory is the limit (H100).
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B, driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE), f"cuTensorMapEncodeTiled({sizes}, {strides}, {box})")
    return np.array([int(part) for part in tensor_map.opaque], dtype=np.uint64)


class TensorMaps:
    """The maps of one device. A map is a function of its key, so a kept one is never wrong, whatever now lies at its address."""

    def __init__(self) -> None:
        self._buffer = 0
        # (dtype, address, sizes, strides, box): the map's address.
        self.known: dict[Any, int] = {}
        self._lock = threading.Lock()

    def address(self, dtype: str, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> int:
        """Where the map lies in device memory."""
        key = (dtype, address, sizes, strides, box)
        with self._lock:
            known = self.known.get(key)
            if known is not None:
                return known
            # While a stream is captured into a graph, making a map is no part of the graph, and must be allowed.
            mode = checked(driver.cuThreadExchangeStreamCaptureMode(driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED),
                           "cuThreadExchangeStreamCaptureMode")
            try:
                return self._add(key)
            finally:
                driver.cuThreadExchangeStreamCaptureMode(mode)

    def _add(self, key: Any) -> int:
        if len(self.known) % _NUM_SLOTS == 0:
            # Kernels in flight and captured graphs may use any map: none is overwritten, room is added.
            self._buffer = int(checked(driver.cuMemAlloc(_NUM_SLOTS * MAP_BYTES), "cuMemAlloc"))
        slot = self._buffer + len(self.known) % _NUM_SLOTS * MAP_BYTES
        data = encode(*key)
        checked((*driver.cuMemcpyHtoD(slot, data.ctypes.data, MAP_BYTES), None), "cuMemcpyHtoD")
        self.known[key] = slot
        return slot
