"""What is launched: kernels by their specification, arrays by where they lie."""

import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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


class Strided(NamedTuple):
    """16-bit elements in device memory, five axes; strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class KernelSpec:
    """A kernel to be made: `mla_numba.kernels.<module>` has the function `make`, which takes `configuration`, and `signature`.

    Specs are compared by identity: whoever hands them out keeps one for each configuration.
    """

    module: str
    make: str
    configuration: tuple[Any, ...]
    signature: str
    num_threads: int
    smem_bytes: int         # dynamic
    fastmath: bool
    blocks_per_sm: int = 1  # that registers must suffice for
    cluster_size: int = 1   # thread blocks along x that run together
    waits_itself: bool = True   # for the kernel before it (griddepcontrol.wait), so that it may start sooner

    @property
    def name(self) -> str:
        return "-".join([self.module, *(str(part) for part in self.configuration)])

    def kernel(self) -> Callable[..., None]:
        made: Callable[..., None] = getattr(self._module(), self.make)(*self.configuration)
        return made

    def types(self) -> Any:
        """Numba's types of the kernel and its arguments."""
        return getattr(self._module(), self.signature)()

    def _module(self) -> Any:
        return importlib.import_module(f"..kernels.{self.module}", __package__)


def array_words(address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """What Numba's kernels take for an array of int32: two owners, size, bytes of an element, address, shape, strides."""
    return 0, 0, math.prod(shape), 4, address, *shape, *strides


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
