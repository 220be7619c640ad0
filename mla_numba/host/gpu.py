"""What the `hopper` backend needs of a GPU: kernels launched by packed arguments, memory that is kept, tensor maps, strided copies."""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from cuda.bindings import driver
from numba import cuda

from ..config import ceil_div
from .capture import beside_captures
from .context import current_context, device_context
from .cubin import load_kernels
from .driver import checked
from .launch import Arguments, KernelSpec, Strided, configured, formats, numba_stream
from .tensor_map import encode
from .workspaces import Workspaces

# What `extra` of cuLaunchKernelEx says (cuda.h, CU_LAUNCH_PARAM_*).
_END, _BUFFER_POINTER, _BUFFER_SIZE = 0, 1, 2
# Bound kernels kept, which calls share that differ in addresses alone, a decode and a merge for each shape; and launch configurations for
# each, by stream.
_MAX_BOUND, _MAX_CONFIGS = 512, 256
# Tensor maps kept: some for each layer's cache, which calls of all shapes share.
_MAX_MAPS = 4096


class BoundKernel:
    """A loaded kernel, its grid, and memory that its arguments are passed in: `setters` are those of `launch.Arguments`."""

    def __init__(self, function: Any, spec: KernelSpec, grid: tuple[int, int, int], letters: Sequence[str], values: Sequence[Any]):
        arguments = Arguments(letters, values)
        self.setters, self.spec = arguments.setters, spec
        self._function, self._grid = function, grid
        size = np.array([arguments.memory.size], np.uint64)
        extra = np.array([_BUFFER_POINTER, arguments.memory.ctypes.data, _BUFFER_SIZE, size.ctypes.data, _END], np.uint64)
        self._extra, self._keep = int(extra.ctypes.data), (arguments, size, extra)
        self._configs: dict[int, Any] = {}

    def launch(self, stream: int) -> None:
        """With the arguments that are in memory, in the current context."""
        config = self._configs.get(stream) or self._config(stream)
        (error,) = driver.cuLaunchKernelEx(config, self._function, 0, self._extra)
        if error:
            raise RuntimeError(f"cuLaunchKernelEx failed: {error.name}")

    def _config(self, stream: int) -> Any:
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self._grid
        config.blockDimX, config.blockDimY, config.blockDimZ = self.spec.num_threads, 1, 1
        config.sharedMemBytes, config.hStream = self.spec.smem_bytes, driver.CUstream(stream)
        attributes = []
        if self.spec.waits_itself:
            # Blocks may come onto the machine while the kernel before ends.
            early = driver.CUlaunchAttribute()
            early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            early.value.programmaticStreamSerializationAllowed = 1
            attributes.append(early)
        if self.spec.cluster_size > 1:
            cluster = driver.CUlaunchAttribute()
            cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = self.spec.cluster_size, 1, 1
            attributes.append(cluster)
        config.attrs, config.numAttrs = attributes, len(attributes)
        if len(self._configs) == _MAX_CONFIGS:
            self._configs.clear()
        self._configs[stream] = config
        return config


class _Memory(NamedTuple):
    """Floats in device memory."""

    size: int
    address: int
    owner: Any


class Gpu:
    """One device, whichever the calling thread's current one is. Whoever launches holds a lock: the memory of a bound kernel's arguments is
    shared by all threads."""

    def __init__(self, device_idx: int):
        self._numba = device_context(device_idx)
        self._device_idx = device_idx
        self.num_sms = int(self._numba.MULTIPROCESSOR_COUNT)
        with self._numba:
            self._context = current_context()
        self._kernels: dict[KernelSpec, tuple[Any, list[str]]] = {}
        # One for all who bind alike: calls that are not repeated, of DLPack's arrays say, would take 0.17 ms more (H200's host).
        self.bind = lru_cache(maxsize=_MAX_BOUND)(self._bind)
        self.unfinished: dict[int, int] = {}
        # A map follows from what it is made of: a kept one is never wrong, whatever now lies at its address.
        self.tensor_map = lru_cache(maxsize=_MAX_MAPS)(self._encode)
        self._workspaces = Workspaces()

    def _encode(self, dtype: str, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
        with self._numba:
            return encode(dtype, address, sizes, strides, box)

    def workspace(self, num_floats: int, stream: int, purpose: str) -> int:
        """Address of `num_floats` floats, zeros when new, a multiple of 256 bytes; the same memory for the same purpose and `stream`, a
        `stream_key`."""
        memory: _Memory = self._workspaces.get((stream, purpose), num_floats, self._zeros)
        return memory.address

    def _zeros(self, num_floats: int) -> _Memory:
        with self._numba, beside_captures():
            owner = cuda.device_array(num_floats, np.float32)
            address = int(owner.__cuda_array_interface__["data"][0])
            # Not on the default stream, which streams that are being captured may wait for.
            own = checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING), "cuStreamCreate")
            self.clear(address, num_floats, int(own))
            checked(driver.cuStreamSynchronize(own), "cuStreamSynchronize")
            checked(driver.cuStreamDestroy(own), "cuStreamDestroy")
        return _Memory(num_floats, address, owner)

    def load(self, *specs: KernelSpec) -> None:
        """Have these kernels ready; together they are sooner."""
        missing = [spec for spec in specs if spec not in self._kernels]
        if missing:
            with self._numba, beside_captures():
                functions = load_kernels(missing, self._device_idx)
            for spec, function in zip(missing, functions, strict=True):
                self._kernels[spec] = function, formats(spec.types())

    def _bind(self, spec: KernelSpec, grid: tuple[int, int, int], *arguments: Any) -> BoundKernel:
        """A kernel to be launched by `launch_bound`; of its arguments those that are None are set before."""
        self.load(spec)
        function, letters = self._kernels[spec]
        return BoundKernel(function, spec, grid, letters, arguments)

    def launch_bound(self, stream: int, *kernels: BoundKernel) -> None:
        """Launch kernels one behind the other; one that waits itself may start before the one ahead of it in the stream has ended."""
        is_current = current_context() == self._context
        if not is_current:
            # Numba's way of making a device current costs more than a launch (5.6 and 3.7 us, H100 machine).
            checked(driver.cuCtxPushCurrent(driver.CUcontext(self._context)), "cuCtxPushCurrent")
        try:
            for kernel in kernels:
                kernel.launch(stream)
        finally:
            if not is_current:
                checked(driver.cuCtxPopCurrent(), "cuCtxPopCurrent")

    def copy(self, destination: Strided, source: Strided, stream: int) -> None:
        num_blocks = min(1024, ceil_div(int(np.prod(source.shape)), 256))
        with self._numba:
            configured(_copy_kernel(), num_blocks, 256, numba_stream(stream))(_array(destination), _array(source))

    def clear(self, address: int, num_words: int, stream: int) -> None:
        """Make words of 32 bits 0, in the order of the stream."""
        with self._numba:
            checked(driver.cuMemsetD32Async(address, 0, num_words, driver.CUstream(stream)), "cuMemsetD32Async")


def _array(memory: Strided) -> Any:
    interface = {"shape": memory.shape, "strides": memory.strides, "typestr": "<u2", "data": (memory.address, False), "version": 3}
    return cuda.from_cuda_array_interface(interface, sync=False)


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
