"""What the `hopper` backend needs of a GPU: kernels launched by packed arguments, memory that is kept, tensor maps, strided copies."""

import struct
from functools import cache
from typing import Any

import numpy as np
from cuda.bindings import driver
from numba import cuda

from ..config import ceil_div
from .cubin import load_kernel
from .launch import KernelSpec, Strided, configured, numba_stream
from .tensor_map import TensorMaps

# struct's letters for the types of a kernel's arguments; all others are addresses.
_LETTERS = {"int32": "i", "int64": "q", "uint64": "Q", "float32": "f"}


def formats(signature: Any) -> str:
    """How struct packs the arguments of a kernel."""
    return "".join(_LETTERS.get(str(argument), "Q") for argument in signature.args)


class _Kernel:
    """A loaded kernel and the memory that its arguments are passed in."""

    def __init__(self, function: Any, letters: str, spec: KernelSpec):
        self._function, self._spec = function, spec
        # Every argument has 8 bytes of its own; cuLaunchKernelEx takes the addresses of them all.
        self._pack = struct.Struct("<" + "".join(letter if letter in "Qq" else letter + "4x" for letter in letters)).pack_into
        self._arguments = np.zeros(len(letters), np.uint64)
        self._pointers = self._arguments.ctypes.data + 8 * np.arange(len(letters), dtype=np.uint64)
        self._pointers_address = self._pointers.ctypes.data
        self._configs: dict[tuple[tuple[int, int, int], int], Any] = {}

    def launch(self, grid: tuple[int, int, int], stream: int, *arguments: Any) -> None:
        self._pack(self._arguments.data, 0, *arguments)
        config = self._configs.get((grid, stream))
        if config is None:
            config = self._configs[grid, stream] = self._config(grid, stream)
        (error,) = driver.cuLaunchKernelEx(config, self._function, self._pointers_address, 0)
        if error:
            raise RuntimeError(f"cuLaunchKernelEx failed: {error.name}")

    def _config(self, grid: tuple[int, int, int], stream: int) -> Any:
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = self._spec.num_threads, 1, 1
        config.sharedMemBytes, config.hStream = self._spec.smem_bytes, driver.CUstream(stream)
        # Blocks may come onto the machine while the kernel before ends; they wait for it with griddepcontrol.wait.
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
        return config


class Gpu:
    """One device. Whoever launches holds a lock: the memory of a kernel's arguments is shared by all threads."""

    def __init__(self, device_idx: int):
        self._device_idx = device_idx
        self.num_sms = int(cuda.gpus[device_idx].MULTIPROCESSOR_COUNT)
        self._maps = TensorMaps()
        self._kernels: dict[KernelSpec, _Kernel] = {}
        # Memory per (stream, purpose), grown as needed. A former, smaller one may be in a captured graph: it is kept.
        self._memory: dict[tuple[int, str], list[Any]] = {}
        self.tensor_map = self._maps.address

    def workspace(self, num_floats: int, stream: int, purpose: str) -> int:
        """Address of `num_floats` floats, zeros when new, a multiple of 256 bytes; the same memory for the same stream and purpose."""
        kept = self._memory.setdefault((stream, purpose), [])
        if not kept or kept[-1].size < num_floats:
            kept.append(cuda.to_device(np.zeros(max(num_floats, 1), np.float32)))
        return int(kept[-1].__cuda_array_interface__["data"][0])

    def launch(self, spec: KernelSpec, grid: tuple[int, int, int], stream: int, *arguments: Any) -> None:
        """Launch a kernel; it may start before the one ahead of it in the stream has ended."""
        kernel = self._kernels.get(spec)
        if kernel is None:
            kernel = self._kernels[spec] = _Kernel(load_kernel(spec, self._device_idx), formats(spec.types()), spec)
        kernel.launch(grid, stream, *arguments)

    def copy(self, destination: Strided, source: Strided, stream: int) -> None:
        num_blocks = min(1024, ceil_div(int(np.prod(source.shape)), 256))
        configured(_copy_kernel(), num_blocks, 256, numba_stream(stream))(_array(destination), _array(source))


def _array(memory: Strided) -> Any:
    interface = {"shape": memory.shape, "strides": memory.strides, "typestr": "<u2", "data": (memory.address, False), "version": 3}
    return cuda.from_cuda_array_interface(interface, owner=memory.owner, sync=False)


@cache
def _copy_kernel() -> Any:
    def copy(destination: Any, source: Any) -> None:
        """Grid of any size; arrays of equal shape and 16-bit elements, any strides."""
        for i in range(cuda.grid(1), source.size, cuda.gridsize(1)):
            rest, e = i // source.shape[4], i % source.shape[4]
            rest, d = rest // source.shape[3], rest % source.shape[3]
            rest, c = rest // source.shape[2], rest % source.shape[2]
            a, b = rest // source.shape[1], rest % source.shape[1]
            destination[a, b, c, d, e] = source[a, b, c, d, e]

    return cuda.jit(copy)


@cache
def gpu(device_idx: int) -> Gpu:
    return Gpu(device_idx)
