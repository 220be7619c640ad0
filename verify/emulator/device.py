"""A GPU for `mla_numba.host.hopper`: host arrays under addresses of its own, kernels run by the machine. And a decode on it."""

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mla_numba import validate
from mla_numba.arrays import ArrayView, view
from mla_numba.config import DecodeShape, ScheduleConfig
from mla_numba.contract import EMPTY_LSE
from mla_numba.host import hopper
from mla_numba.host.launch import Arguments, KernelSpec, Strided, formats
from mla_numba.host.schedule import Schedule, make_host_schedule

from .findings import Finding
from .instructions import Instructions
from .language import Edits, Language
from .machine import Machine
from .tma import MAP_BYTES, TensorMap

# Static shared memory that the linker would reserve: what the kernels' arrays may take.
STATIC_SMEM = 48 * 1024
_TABLES = ("jobs", "workers", "starts", "merges", "totals")


class _BoundKernel:
    """As `mla_numba.host.gpu.BoundKernel`: its arguments lie in memory."""

    def __init__(self, spec: KernelSpec, grid: tuple[int, int, int], values: Sequence[Any]):
        self.spec, self.grid = spec, grid
        self._letters = formats(spec.types())
        in_memory = Arguments(self._letters, values)
        self.setters: Sequence[Callable[..., None]] = in_memory.setters
        self._memory = in_memory.memory

    def arguments(self) -> list[Any]:
        values = struct.unpack("@" + "".join(self._letters), self._memory)
        return [struct.unpack(f"{len(value) // 8}Q", value) if isinstance(value, bytes) else value for value in values]


class EmulatedGpu:
    """`mla_numba.host.hopper.Device`. Launches are queued; `run` executes them.

    Parameters
    ----------
    seed, timing
        As `Machine`'s.
    num_sms : int
        What the host is told.
    edits : mapping, optional
        As `Language`'s.
    """

    def __init__(self, seed: int = 0, *, num_sms: int = 2, timing: Any = None, edits: Edits | None = None):
        self.machine = Machine(seed, timing=timing)
        self.num_sms = num_sms
        self.maps: dict[int, TensorMap] = {}
        self.ptx = Instructions(self.machine, self.maps)
        self.language = Language(self.machine, self.ptx, edits)
        self.unfinished: dict[int, int] = {}
        self._workspaces: dict[str, np.ndarray] = {}
        self._addresses: dict[str, int] = {}
        self._copies: list[tuple[Strided, Strided]] = []

    def place(self, array: ArrayView, writable: bool = False) -> ArrayView:
        """The array as the GPU sees it: the same bytes, at an address that is aligned as they are."""
        low, high = array.extent
        num_bytes = high - low if array.size else 0
        data = np.zeros(0, np.uint8)
        if num_bytes:
            data = np.frombuffer((ctypes.c_char * num_bytes).from_address(array.pointer + low), np.uint8)
        address = self.machine.memory.add(array.name, data, writable=writable, offset=(array.pointer + low) % 16)
        return replace(array, pointer=address - low, device=0)

    def place_schedule(self, schedule: Schedule) -> Schedule:
        """The tables of a schedule made on the host, as if in device memory."""
        addresses = {name: self.machine.memory.add(name, np.ascontiguousarray(schedule.table(name)).reshape(-1).view(np.uint8))
                     for name in _TABLES}
        return replace(schedule, addresses=addresses)

    def tensor_map(self, dtype: str, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
        """The words of a map that a kernel has for parameters: where they lie."""
        if dtype not in ("bfloat16", "float16"):
            raise Finding("misaligned", f"tensor map of {dtype}: only 16-bit elements are modelled")
        return struct.pack(f"{MAP_BYTES // 8}Q", *self.add_map(TensorMap(address, sizes, strides, box)))

    def add_map(self, tensor_map: TensorMap) -> tuple[int, ...]:
        at = self.machine.memory.add("tensor map", np.zeros(MAP_BYTES, np.uint8))
        self.maps[at] = tensor_map
        return tuple(range(at, at + MAP_BYTES, 8))

    def workspace(self, num_floats: int, stream: int, purpose: str) -> int:
        if purpose not in self._workspaces:
            # What is not said to be zero is what former calls left there.
            fill = 0 if purpose in ("counters", "zeros") else 0xFF
            self._workspaces[purpose] = np.full(4 * num_floats, fill, np.uint8)
            self._addresses[purpose] = self.machine.memory.add(purpose, self._workspaces[purpose], writable=True,
                                                               written=purpose != "partials")
        return self._addresses[purpose]

    def bind(self, spec: KernelSpec, grid: tuple[int, int, int], *arguments: Any) -> "_BoundKernel":
        return _BoundKernel(spec, grid, arguments)

    def launch_bound(self, stream: int, *kernels: "_BoundKernel") -> None:
        for kernel in kernels:
            self.launch(kernel.spec, kernel.grid, stream, *kernel.arguments())

    def launch(self, spec: KernelSpec, grid: tuple[int, int, int], stream: int, *arguments: Any) -> None:
        module = self.language.load(f"mla_numba.kernels.{spec.module}")
        kernel = getattr(module, spec.make)(*spec.configuration)
        typed = [self.language.argument(kind, value) for kind, value in zip(spec.types().args, arguments, strict=True)]
        static = min(STATIC_SMEM, 227 * 1024 - spec.smem_bytes)
        self.machine.launch(kernel, spec.module, grid, spec.num_threads, spec.smem_bytes, static, typed,
                            cluster_size=spec.cluster_size)

    def copy(self, destination: Strided, source: Strided, stream: int) -> None:
        if self.machine.grids:
            self._copies.append((destination, source))
        else:
            self._copy(destination, source)

    def clear(self, address: int, num_words: int, stream: int) -> None:
        # Asked for only behind a call that ended between its launches, and such a call's device is at its end, too: `run` has no grid that
        # would take back what its decode counts up. To do nothing here would hide it if one went on.
        raise NotImplementedError("a call that another one left unfinished is not modelled")

    def run(self) -> None:
        """Execute what was launched.

        Raises
        ------
        Finding
        """
        self.machine.run()
        for destination, source in self._copies:
            self._copy(destination, source)
        if "counters" in self._workspaces and self._workspaces["counters"].any():
            raise Finding("grid", "counters that the next launch needs at 0 were left at other values")

    def _copy(self, destination: Strided, source: Strided) -> None:
        self._array(destination)[...] = self._array(source)

    def _array(self, memory: Strided) -> np.ndarray:
        extent = sum((n - 1) * stride for n, stride in zip(memory.shape, memory.strides, strict=True)) + 2
        buffer, offset = self.machine.memory.find(memory.address, extent)
        return np.ndarray(memory.shape, np.uint16, buffer.data.data, offset, memory.strides)


def decode(q: np.ndarray, kv_cache: np.ndarray, block_table: np.ndarray, seq_lens: np.ndarray, head_dim_v: int, softmax_scale: float | None,
           causal: bool, *, cu_seqlens_q: np.ndarray | None = None, plan: Schedule | None = None, out: np.ndarray | None = None,
           lse: np.ndarray | None = None, batch_invariant: bool = False, empty_lse: str = "+inf",
           device: EmulatedGpu | None = None, **changes: int) -> tuple[np.ndarray, np.ndarray]:
    """`mla_decode(..., backend="hopper")` of NumPy arrays on an emulated GPU; `changes` to how the backend wants the work cut.

    Raises
    ------
    Finding
        A kernel broke a rule of the machine.
    NotImplementedError
        The backend refuses the call.
    """
    device = EmulatedGpu() if device is None else device
    inputs = [view(array, name) for array, name in ((q, "q"), (kv_cache, "kv_cache"), (block_table, "block_table"), (seq_lens, "seq_lens"))]
    offsets = None if cu_seqlens_q is None else view(cu_seqlens_q, "cu_seqlens_q")
    shape = validate.decode_shape(*inputs, offsets, head_dim_v, causal, batch_invariant)
    placed = [device.place(array) for array in inputs[:3]]
    reasons = hopper.unsupported(shape) + hopper.unsupported_layout(placed[1])
    if reasons:
        raise NotImplementedError("; ".join(reasons))
    schedule = make_schedule(shape, seq_lens, cu_seqlens_q, device.num_sms, **changes) if plan is None else plan
    out = np.full((*q.shape[:-1], head_dim_v), np.nan, q.dtype) if out is None else out
    lse = np.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), np.nan, np.float32) if lse is None else lse
    results = [device.place(view(array, name), writable=True) for array, name in ((out, "out"), (lse, "lse"))]
    if shape.total_q == 0:
        return out, lse
    if shape.ragged:
        placed[0] = placed[0].with_leading_axis()
        results = [result.with_leading_axis() for result in results]
    scale = validate.softmax_scale_or_default(softmax_scale, shape.head_dim_qk)
    hopper.decode(shape, device.place_schedule(schedule), *placed, *results, scale, EMPTY_LSE[empty_lse], 0, device)
    device.run()
    return out, lse


def make_schedule(shape: DecodeShape, seq_lens: np.ndarray, cu_seqlens_q: np.ndarray | None, num_sms: int, max_seq_len: int | None = None,
                  **changes: int) -> Schedule:
    """The tables that the device's scheduler would fill, made on the host; `changes` to its configuration."""
    config: ScheduleConfig = replace(hopper.schedule_config(shape, num_sms, max_seq_len), **changes)
    return make_host_schedule(config, shape, seq_lens, cu_seqlens_q)

