"""Launching Numba kernels: grids as small as the work is."""

import warnings
from typing import Any, Protocol

from numba import cuda
from numba.cuda.core.errors import NumbaPerformanceWarning


class ArrayMemory(Protocol):
    """Where an array lies: what a launch needs of it (`mla_numba.arrays.ArrayView` is one). `strides` are in bytes."""

    @property
    def pointer(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def strides(self) -> tuple[int, ...]: ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> int | None: ...

    @property
    def owner(self) -> Any: ...


def numba_stream(handle: int) -> Any:
    """Numba's object for a CUstream given as an integer; 0 is the default stream."""
    return 0 if handle == 0 or cuda.config.ENABLE_CUDASIM else cuda.external_stream(handle)


def configured(kernel: Any, grid: Any, num_threads: int, stream: Any, smem_bytes: int = 0) -> Any:
    """`kernel[grid, num_threads, stream, smem_bytes]`, ready to be called.

    Numba warns of grids under 128 blocks; a short batch has no more work, and its caller can do nothing about it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaPerformanceWarning)
        return kernel[grid, num_threads, stream, smem_bytes]
