"""The kernels' own source, executed with other meanings of `cuda`, `numpy`'s integers and `ptx`.

A module of `mla_numba/kernels` is read, changed if a mutant says so, and run in a namespace of its own, whose imports are answered
here. Its functions are then plain Python: integers without an end, cut to size where the source says `u32(...)` as Numba does; floats
of float32.
"""

import builtins
import importlib
import importlib.util
import linecache
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from .findings import Finding
from .instructions import Instructions
from .machine import WARP, Machine, Warp
from .registers import Registers

Edits = Mapping[str, Sequence[tuple[str, str]]]
_ITEM_BYTES = {"uint8": 1, "int32": 4, "uint32": 4, "float32": 4, "uint64": 8}


def _unsigned(bits: int) -> Callable[[Any], int]:
    mask = (1 << bits) - 1

    def cast(value: Any) -> int:
        return int(value) & mask

    return cast


def _signed(bits: int) -> Callable[[Any], int]:
    mask, half, whole = (1 << bits) - 1, 1 << (bits - 1), 1 << bits

    def cast(value: Any) -> int:
        value = int(value) & mask
        return value - whole if value >= half else value

    return cast


class SharedArray:
    """A `cuda.shared.array`, for the thread whose turn it is."""

    def __init__(self, machine: Machine, address: int, count: int, kind: str):
        self._machine, self.address, self._count = machine, address, count
        self._float, self._num_words = kind == "float32", -(-_ITEM_BYTES[kind] // 4)

    def _place(self, index: Any) -> int:
        if not 0 <= int(index) < self._count:
            raise Finding("out of bounds", f"element {int(index)} of a shared array of {self._count}")
        return self.address + 4 * self._num_words * int(index)

    def __getitem__(self, index: Any) -> Any:
        self._machine.touch()
        thread = self._machine.current
        word = thread.block.smem.read(thread, self._place(index), self._num_words, self._machine.lines.number(sys._getframe(1)))
        if self._num_words == 2:
            return int(thread.block.smem.u32[word:word + 2].view(np.uint64)[0])
        return thread.block.smem.f32[word] if self._float else _signed(32)(thread.block.smem.u32[word])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._machine.touch()
        thread = self._machine.current
        word = thread.block.smem.write(thread, self._place(index), self._num_words, self._machine.lines.number(sys._getframe(1)))
        if self._num_words == 2:
            thread.block.smem.u32[word:word + 2].view(np.uint64)[0] = int(value)
        elif self._float:
            thread.block.smem.f32[word] = np.float32(value)
        else:
            thread.block.smem.u32[word] = int(value) & 0xFFFFFFFF


class Pointer:
    """A kernel argument of type `CPointer(int32)`."""

    def __init__(self, machine: Machine, address: int):
        self._machine, self._address = machine, address

    def __getitem__(self, index: Any) -> int:
        machine = self._machine
        data = machine.memory.read(machine.current, self._address + 4 * int(index), 4, machine.lines.number(sys._getframe(1)))
        return int(data.view(np.int32)[0])


class _Index:
    """threadIdx, blockIdx, ...: whose turn it is."""

    def __init__(self, of: Callable[[], tuple[int, int, int]]):
        self._of = of

    x = property(lambda self: self._of()[0])
    y = property(lambda self: self._of()[1])
    z = property(lambda self: self._of()[2])


class Cuda:
    """What kernels use of `numba.cuda`."""

    def __init__(self, machine: Machine, ptx: Instructions):
        self._machine, self._ptx = machine, ptx
        self.threadIdx = _Index(lambda: (machine.current.index, 0, 0))
        self.blockIdx = _Index(lambda: machine.current.block.index)
        self.blockDim = _Index(lambda: (machine.current.block.grid.num_threads, 1, 1))
        self.gridDim = _Index(lambda: machine.current.block.grid.shape)
        self.local = SimpleNamespace(array=lambda count, kind: Registers(machine, count))
        self.shared = SimpleNamespace(array=self._shared_array)
        self.config = SimpleNamespace(ENABLE_CUDASIM=False)

    def jit(self, function: Any = None, **_: Any) -> Any:
        """Kernels and device functions are what they are."""
        return (lambda decorated: decorated) if function is None else function

    def _shared_array(self, count: int, kind: Any, alignment: int | None = None) -> SharedArray:
        block = self._machine.current.block
        if count == 0:
            return SharedArray(self._machine, block.dynamic_smem, 0, str(kind))
        frame = sys._getframe(1)
        key = (frame.f_code, frame.f_lasti)
        if key not in block.static_arrays:
            # Aligned as asked, and no better.
            item_bytes = _ITEM_BYTES[str(kind)]
            aligned = alignment or item_bytes
            address = -(-block.next_static // (2 * aligned)) * 2 * aligned + aligned
            block.static_arrays[key], block.next_static = address, address + count * item_bytes
            if block.next_static > block.smem.num_bytes:
                raise Finding("out of bounds", f"static shared arrays of {block.grid.name} take more than {block.grid.static_smem} bytes")
        return SharedArray(self._machine, block.static_arrays[key], count, str(kind))

    def syncthreads(self) -> None:
        self._ptx.sync_block(0, None, self._machine.lines.number(sys._getframe(1)))

    def syncwarp(self, mask: int = 0xFFFFFFFF) -> None:
        self._require_whole(mask)
        self._machine.meet("syncwarp", self._machine.lines.number(sys._getframe(1)), None, _join_clocks)

    def shfl_sync(self, mask: int, value: Any, lane: Any) -> Any:
        self._require_whole(mask)
        return self._machine.meet("shfl.sync", self._machine.lines.number(sys._getframe(1)), (value, int(lane)),
                                  lambda warp, values: {at: values[source % WARP][0] for at, (_, source) in values.items()})

    def shfl_xor_sync(self, mask: int, value: Any, distance: int) -> Any:
        self._require_whole(mask)
        return self._machine.meet("shfl.sync", self._machine.lines.number(sys._getframe(1)), value,
                                  lambda warp, values: {at: values[at ^ distance] for at in values})

    def any_sync(self, mask: int, predicate: Any) -> bool:
        self._require_whole(mask)
        return bool(self._machine.meet("vote.any", self._machine.lines.number(sys._getframe(1)), bool(predicate),
                                       lambda warp, values: any(values.values())))

    def _require_whole(self, mask: int) -> None:
        if int(mask) != 0xFFFFFFFF:
            raise Finding("divergence", f"mask {int(mask):#x}: here only whole warps are modelled")


def _join_clocks(warp: Warp, _: Any) -> None:
    """A warp's barrier: every lane has seen what all lanes have."""
    cluster = warp.block.cluster
    rows = [warp.block.rank * warp.block.grid.num_threads + thread.index for thread in warp.threads]
    cluster.clocks[rows] = cluster.clocks[rows].max(axis=0)
    cluster.fenced[rows] = cluster.fenced[rows].max(axis=0)
    cluster.clocks[rows, [thread.agent for thread in warp.threads]] += 1
    foreign = [thread.foreign for thread in warp.threads if thread.foreign]
    if foreign:
        from .clocks import joined

        merged: dict[int, np.ndarray] = {}
        for clocks in foreign:
            merged = joined(merged, clocks)
        for thread in warp.threads:
            thread.foreign = dict(merged)


class Language:
    """Loads modules with kernels under these meanings; one per machine.

    Parameters
    ----------
    edits : mapping, optional
        By module ("mla_numba.kernels.hopper_decode"): pairs of a text that it has once, and what to run in its place.
    """

    def __init__(self, machine: Machine, ptx: Instructions, edits: Edits | None = None):
        self._machine, self._edits = machine, edits or {}
        self.cuda = Cuda(machine, ptx)
        self._modules: dict[str, ModuleType] = {}
        numpy = ModuleType("numpy")
        numpy.__getattr__ = lambda name: getattr(np, name)  # type: ignore[method-assign]
        for bits in (8, 16, 32, 64):
            setattr(numpy, f"uint{bits}", _unsigned(bits))
            setattr(numpy, f"int{bits}", _signed(bits))
        real_cuda = importlib.import_module("numba.cuda")
        self._answers = {
            "math": SimpleNamespace(log2=_log2), "numpy": numpy, "numba": SimpleNamespace(cuda=self.cuda),
            "mla_numba": SimpleNamespace(ptx=ptx),
            "numba.cuda": SimpleNamespace(types=real_cuda.types, config=self.cuda.config, int32=real_cuda.types.int32, jit=self.cuda.jit)}

    def load(self, name: str) -> ModuleType:
        """A module, executed anew."""
        if name in self._modules:
            return self._modules[name]
        spec = importlib.util.find_spec(name)
        path = str(spec.origin)  # type: ignore[union-attr]
        with open(path, encoding="utf-8") as file:
            source = file.read()
        if name in self._edits:
            for old, new in self._edits[name]:
                if source.count(old) != 1:
                    raise ValueError(f"the edit of {name} must fit one place, and fits {source.count(old)}: {old!r}")
                source = source.replace(old, new)
            # Of its own name, so that tracebacks show the edited lines.
            path = f"{path} (edited)"
            linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
        module = ModuleType(name)
        module.__package__ = name.rpartition(".")[0]
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._import}
        self._modules[name] = module
        self._machine.kernel_files.add(path)
        exec(compile(source, path, "exec"), module.__dict__)
        return module

    def _import(self, name: str, namespace: Any = None, local: Any = None, names: Any = (), level: int = 0) -> Any:
        """What an import statement of a loaded module gets."""
        full = name
        if level > 0:
            package = namespace["__package__"].split(".")
            full = ".".join(package[:len(package) - level + 1] + ([name] if name else []))
        if full in self._answers:
            return self._answers[full]
        if full.startswith("mla_numba.kernels."):
            return self.load(full)
        return builtins.__import__(name, namespace, local, names, level)

    def argument(self, kind: Any, value: Any) -> Any:
        """A kernel's argument, as its declared type makes it."""
        if isinstance(value, tuple):
            return value
        text = str(kind)
        if text == "float32":
            return np.float32(value)
        if text.endswith("*"):
            return Pointer(self._machine, int(value))
        return _signed(64)(value) if text == "int64" else _signed(32)(value) if text == "int32" else _unsigned(64)(value)


def _log2(x: Any) -> Any:
    return np.float32(math.log2(x)) if x > 0 else np.float32(-np.inf if x == 0 else np.nan)
