"""What is launched: kernels by their specification, arrays by where they lie."""

import importlib
import math
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np
from numba import cuda
from numba.cuda import types
from numba.cuda.core.errors import NumbaPerformanceWarning

# struct's letters for the types of a kernel's arguments; tuples are of words, as bytes, arrays are what `array_words` makes of them.
_LETTERS = {"int32": "i", "int64": "q", "uint64": "Q", "float32": "f"}


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


def formats(signature: Any) -> list[str]:
    """How struct packs the arguments of a kernel, word by word."""
    def letters(argument: Any) -> list[str]:
        if isinstance(argument, types.UniTuple):
            return [f"{8 * argument.count}s"]
        if isinstance(argument, types.Array):
            return list("QQqqQ" + 2 * argument.ndim * "q")
        return [_LETTERS[str(argument)]]

    return [letter for argument in signature.args for letter in letters(argument)]


class Arguments:
    """A kernel's arguments in memory of their own, laid out as C lays out a struct's members.

    Parameters
    ----------
    letters : sequence of str
        From `formats`.
    values : sequence
        What they are; None for those that are to be set before a launch.

    Attributes
    ----------
    memory : np.ndarray, uint8
    setters : list of callables
        One for each run of arguments that were None, which it takes: a launch again costs what has changed.
    """

    def __init__(self, letters: Sequence[str], values: Sequence[Any]):
        self.memory = np.zeros(struct.calcsize("@" + "".join(letters)), np.uint8)
        self.setters = []
        begin, behind = 0, ""
        for is_open, run in groupby(zip(letters, values, strict=True), lambda argument: argument[1] is None):
            run_letters, run_values = zip(*run, strict=True)
            begin = struct.calcsize(f"@{behind}0{run_letters[0][-1]}")
            if begin % 8:
                raise ValueError(f"arguments from {run_letters[0]!r} on are packed by themselves: they must begin at a multiple of 8, "
                                 f"not at {begin}")
            put = partial(struct.Struct("@" + "".join(run_letters)).pack_into, self.memory.data, begin)
            if is_open:
                self.setters.append(put)
            else:
                put(*run_values)
            behind += "".join(run_letters)


def array_words(address: int | None, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int | None, ...]:
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
