"""Array interchange: what a caller's array is, described without copying, and results of the same kind.

NumPy, CuPy, torch and Numba arrays are taken as they are; any other library through DLPack, and its own `empty` (array API) makes
the results. torch and CuPy are imported only by a caller who passes their arrays.
"""

import contextlib
import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from operator import attrgetter, methodcaller
from typing import Any

import numpy as np

from .dtypes import NUMPY_DTYPE, STORAGE_DTYPE
from .host.capture import beside_captures, is_capturing
from .host.context import device_context, device_of
from .host.launch import numba_stream


@dataclass(frozen=True)
class ArrayView:
    """An array of the caller: where its elements lie. `strides` are in bytes."""

    name: str               # the argument it came as
    kind: str               # "numpy", "cupy", "torch", "numba" or "dlpack"
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    pointer: int
    device: int | None      # CUDA ordinal; None for host memory
    writable: bool
    owner: Any              # keeps the memory alive

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def place(self) -> str:
        return "host memory" if self.device is None else f"cuda:{self.device}"

    def with_leading_axis(self) -> "ArrayView":
        extent = self.shape[0] * self.strides[0] if self.ndim else self.itemsize
        return replace(self, shape=(1, *self.shape), strides=(extent, *self.strides))

    @property
    def extent(self) -> tuple[int, int]:
        """Where the bytes of all elements begin and end, counted from `pointer`; negative strides begin before it."""
        steps = [(n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)]
        return sum(min(step, 0) for step in steps), sum(max(step, 0) for step in steps) + self.itemsize

    def storage(self) -> np.ndarray:
        """The same memory as a NumPy array of the type that kernels see (host memory only)."""
        dtype = STORAGE_DTYPE[self.dtype]
        if self.size == 0:
            return np.empty(self.shape, dtype)
        low, high = self.extent
        buffer: Any = (ctypes.c_char * (high - low)).from_address(self.pointer + low)
        return np.ndarray(self.shape, dtype, buffer, -low, self.strides)

    def device_storage(self) -> Any:
        """The same memory as a Numba device array of the type that kernels see (device memory only)."""
        from numba import cuda

        interface = {"shape": self.shape, "strides": self.strides, "typestr": STORAGE_DTYPE[self.dtype].str,
                     "data": (self.pointer, not self.writable), "version": 3}
        return cuda.from_cuda_array_interface(interface, owner=self.owner, sync=False)


def view(array: Any, name: str, stream: Any = None) -> ArrayView:
    """Describe `array`, the argument called `name`; what DLPack's libraries are to have done with it is done before `stream` goes on.

    Raises
    ------
    TypeError
        It is not an array that this library can read. (What its elements must be is a rule of `validate`.)
    """
    if isinstance(array, np.ndarray):
        return ArrayView(name, "numpy", str(array.dtype), array.itemsize, array.shape, array.strides, array.ctypes.data, None,
                         array.flags.writeable, array)
    kind: Any = type(array)
    library = _library(kind)
    # Not all that these libraries make is an array.
    if library == "torch" and isinstance(array, sys.modules["torch"].Tensor):
        described = _view_torch(array, name)
    elif library == "cupy" and isinstance(array, sys.modules["cupy"].ndarray):
        described = ArrayView(name, "cupy", str(array.dtype), array.itemsize, array.shape, array.strides, array.data.ptr, array.device.id,
                              True, array)
    elif library == "numba":
        described = _view_numba(array, name)
    elif hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        described = _view_dlpack(array, name, stream)
    elif hasattr(array, "__cuda_array_interface__"):
        described = _view_interface(array, name)
    else:
        raise TypeError(f"{name} must be an array (NumPy, CuPy, torch, Numba device array, or anything with __dlpack__ or "
                        f"__cuda_array_interface__), got {kind.__name__}")
    if described.pointer == 0 and described.size > 0:
        # Some of torch's: distributed and masked ones, and those whose storage was let go.
        raise TypeError(f"{name} is of type {kind.__name__} and has no memory of its own: give the local or dense array in it")
    return described


@lru_cache(maxsize=256)
def _library(kind: Any) -> str:
    """The library of an array of type `kind`, "" for others; subclasses too, wherever they were written."""
    for name in (base.__module__.partition(".")[0] for base in kind.__mro__):
        if name in ("torch", "cupy"):
            return name
        if name.startswith("numba"):
            return "numba"
    return ""


def fingerprint(arrays: Sequence[Any]) -> tuple[list[Any], list[int]] | None:
    """Words that are equal only where all is that `view` tells of the arrays but names, owners, addresses, and strides of axes of one
    element, and where addresses are aligned alike; and the addresses.

    None if an array is not of torch, CuPy or Numba, or does not tell.
    """
    words: list[Any] = []
    addresses = []
    try:
        for array in arrays:
            kind: Any = type(array)
            library = _library(kind)
            if library == "torch":
                address = array.data_ptr()
                # Most are contiguous: to ask that takes half as long as to ask for strides. What is not dense has no address, and raises.
                words += kind, array.dtype, array.shape, None if array.is_contiguous() else array.stride(), array.device, array.is_neg()
            elif library == "cupy":
                memory = array.data
                address = memory.ptr
                words += kind, array.dtype, array.shape, array.strides, memory.device_id
            elif library == "numba":
                memory = array.gpu_data
                address = memory.device_pointer_value or 0
                words += kind, array.dtype, array.shape, array.strides, memory.context.device.id
            else:
                return None
            # No address at all is another matter: of what has elements `view` refuses it.
            words += address % 16, address == 0
            addresses.append(address)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return words, addresses


def recogniser(arrays: Sequence[Any]) -> Callable[[Sequence[Any]], list[int] | None] | None:
    """The quick way to tell that as many others have the `fingerprint` of these: the function returns where they begin, or None if they
    have not, or if it cannot tell. It holds on to none of them. None if there is no such way.

    torch tensors are told by what code made by torch.compile checks its inputs with, all in one call: of 4 tensors 1.8 us, a fingerprint
    takes 5.2 (H200's host, torch 2.11).
    """
    kinds: list[Any] = [type(array) for array in arrays]
    guards = _tensor_guards() if all(_library(kind) == "torch" for kind in kinds) else None
    if guards is None:
        return None
    check = guards(arrays)
    places = [array.data_ptr() & 15 for array in arrays]

    def addresses_if_alike(given: Sequence[Any]) -> list[int] | None:
        if check(*given):
            addresses = [array.data_ptr() for array in given]
            # Those without an address have a closer look.
            if [address & 15 for address in addresses] == places and all(addresses):
                return addresses
        return None

    return addresses_if_alike


@cache
def _tensor_guards() -> Callable[[Sequence[Any]], Callable[..., bool]] | None:
    """The function that makes of tensors one that compares others with them: type, dtype, device, layout, shape, strides. It belongs to
    torch and may change: None if this torch has it not, or if it does not tell apart what it must."""
    torch = sys.modules["torch"]

    def make(tensors: Sequence[Any]) -> Callable[..., bool]:
        check: Callable[..., bool] = torch._C._dynamo.guards.TensorGuards(
            *tensors, dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors]).check
        return check

    try:
        one = torch.empty_strided((2, 3), (3, 1), dtype=torch.float32, device="cpu")
        check = make([one, one])
        others = [torch.empty_strided(shape, strides, dtype=dtype, device="cpu") for shape, strides, dtype in (
            ((2, 3), (3, 1), torch.float32), ((3, 2), (2, 1), torch.float32), ((2, 3), (1, 2), torch.float32),
            ((2, 3), (3, 1), torch.int32), ((1, 2, 3), (6, 3, 1), torch.float32))]
        tells = [bool(check(one, other)) for other in others] + [bool(check(other, one)) for other in others]
    except (AttributeError, TypeError, RuntimeError):
        return None
    return make if tells == 2 * [True, False, False, False, False] else None


def address_of(kind: str) -> Callable[[Any], int]:
    """The function that tells where an array of torch, CuPy or Numba begins."""
    address: Callable[[Any], int]
    address = methodcaller("data_ptr") if kind == "torch" else attrgetter("data.ptr" if kind == "cupy" else "gpu_data.device_pointer_value")
    return address


def allocator(like: ArrayView, *results: tuple[Sequence[int], str]) -> Callable[[], list[Any]]:
    """The function that makes an array of each shape and dtype, as `empty_like_kind` does, for torch, CuPy and Numba; it holds on to
    nothing of `like`."""
    kind, make = _maker(like)
    return partial(make, [kind(shape, dtype) for shape, dtype in results])


def _maker(like: ArrayView) -> tuple[Callable[[Sequence[int], str], Any], Callable[[Sequence[Any]], list[Any]]]:
    """What the library of `like` (torch, CuPy, Numba) calls an array of a shape and a dtype, and the function that makes one of each such
    kind where `like` is; they hold on to nothing of it."""
    if like.kind == "torch":
        torch, empty_now = sys.modules["torch"], _torch_empty(like.owner.device, like.device)

        def torch_kind(shape: Sequence[int], dtype: str) -> Any:
            return tuple(shape), _c_steps(tuple(shape)), getattr(torch, dtype)

        def make_torchs(kinds: Sequence[Any]) -> list[Any]:
            empty = empty_now()
            return [empty(*kind) for kind in kinds]

        return torch_kind, make_torchs
    if like.kind == "numba":
        from numba import cuda

        ordinal = like.device

        def make_numbas(kinds: Sequence[Any]) -> list[Any]:
            with on_device(ordinal):
                return [cuda.device_array(*kind) for kind in kinds]

        return lambda shape, dtype: (tuple(shape), STORAGE_DTYPE[dtype]), make_numbas
    import cupy

    on_its_device = _cupy_device(like.device)

    def make_cupys(kinds: Sequence[Any]) -> list[Any]:
        with on_its_device():
            return [cupy.empty(*kind) for kind in kinds]

    return lambda shape, dtype: (tuple(shape), NUMPY_DTYPE[dtype]), make_cupys


@lru_cache(maxsize=256)
def _c_steps(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in C order, in elements."""
    return tuple(math.prod(shape[i + 1:]) for i in range(len(shape)))


def _torch_empty(device: Any, index: int | None) -> Callable[[], Callable[..., Any]]:
    """The function that tells by what torch makes a tensor of (shape, strides, dtype) on a device soonest, whichever is current now."""
    torch = sys.modules["torch"]

    def anywhere(shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> Any:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    try:
        # What code made by torch.compile calls, on the current device: 2.2 us; torch.empty_strided takes 3.7, torch.empty 5.6 (H200's host,
        # torch 2.11).
        here, current = torch._C._dynamo.guards._empty_strided_cuda, torch._C._cuda_getDevice
    except AttributeError:
        return lambda: anywhere
    return lambda: here if index is not None and current() == index else anywhere


def _cupy_device(device: int | None) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The function that makes the context manager of CuPy's in which it takes memory of a device.

    Nothing where the device is current: CuPy's own would make it the CUDA runtime's current one as it ends, and if it is so within
    `on_device` only, the runtime and the driver disagree afterwards.
    """
    import cupy

    current, other, same = cupy.cuda.runtime.getDevice, cupy.cuda.Device, contextlib.nullcontext()
    return lambda: same if current() == device else other(device)


def device_words(like: ArrayView) -> Callable[[int, int], tuple[Any, int]]:
    """The function that makes so many int32 in device memory for work on a stream, and tells where; it holds on to nothing of `like`.

    By the library of `like`, if that is torch or CuPy and the stream its current one: they keep what is freed, for whoever asks on that
    stream next, which takes no time, and makes graphs that are captured their own. Else by Numba.
    """
    ordinal = like.device
    if ordinal is None or like.kind not in ("torch", "cupy"):
        return lambda count, stream: _numba_words(count, stream, ordinal)
    kind, make = _maker(like)
    address, current = address_of(like.kind), current_stream(like.kind, ordinal)

    def words(count: int, stream: int) -> tuple[Any, int]:
        if stream != current():
            return _numba_words(count, stream, ordinal)
        (array,) = make([kind((count,), "int32")])
        return array, address(array)

    return words


# Of plans in graphs that Numba made memory for: nobody tells when a graph is gone.
_words_of_graphs: list[Any] = []


def _numba_words(count: int, stream: int, device: int | None) -> tuple[Any, int]:
    from numba import cuda

    with on_device(device), beside_captures():
        array = cuda.device_array(count, np.int32)
    if is_capturing(stream):
        _words_of_graphs.append(array)
    return array, 0 if cuda.config.ENABLE_CUDASIM else int(array.__cuda_array_interface__["data"][0])


def empty_like_kind(like: ArrayView, shape: Sequence[int], dtype: str) -> Any:
    """A new array of the library and in the place of `like`; contents undefined."""
    shape = tuple(shape)
    if like.kind in ("torch", "cupy", "numba"):
        return allocator(like, (shape, dtype))()[0]
    if like.kind == "dlpack":
        array = like.owner[0]
        if not hasattr(array, "__array_namespace__"):
            raise TypeError(f"{like.name} is of {type(array).__name__}, which has no __array_namespace__ to make a result with: "
                            "give mla_decode out= and lse=, or arrays of a library that has")
        library = array.__array_namespace__()
        # Libraries that have no bfloat16 of their own take ml_dtypes's, or have no such array.
        result = library.empty(shape, dtype=getattr(library, dtype, NUMPY_DTYPE[dtype]), device=array.device)
        # Libraries that compute lazily, as JAX does, must have made the memory before a kernel writes to it.
        getattr(result, "block_until_ready", lambda: None)()
        return result
    return np.empty(shape, NUMPY_DTYPE[dtype])


def table_like_kind(table: Any, like: ArrayView) -> Any:
    """An int32 table of a backend (NumPy or Numba device array) as an array of the library of `like`."""
    if like.kind == "torch":
        import torch

        return torch.as_tensor(table, device=like.owner.device)
    if like.kind == "cupy":
        import cupy

        return cupy.asarray(table)
    if like.kind == "numba":
        return table
    return table.copy_to_host() if hasattr(table, "copy_to_host") else table


def to_host(array_view: ArrayView, stream: int) -> np.ndarray:
    """The elements in host memory; from a device this copies them after what is on `stream`, and waits for it."""
    if array_view.device is None:
        return array_view.storage()
    # Numba copies forwards only.
    low = sum(max(n - 1, 0) * min(stride, 0) for n, stride in zip(array_view.shape, array_view.strides, strict=True))
    forwards = replace(array_view, pointer=array_view.pointer + low, strides=tuple(map(abs, array_view.strides)))
    with on_device(array_view.device):
        copied = forwards.device_storage().copy_to_host(stream=numba_stream(stream))
    return copied[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in array_view.strides)]


def current_stream(kind: str, device: int | None) -> Callable[[], int]:
    """The function that tells the current stream of a library on a device, as `stream_handle` does."""
    if kind == "torch" and device is not None:
        # As Triton does: torch.cuda.current_stream, which makes an object of it, takes ten times as long.
        return partial(sys.modules["torch"]._C._cuda_getCurrentRawStream, device)
    if kind == "cupy":
        current = sys.modules["cupy"].cuda.get_current_stream
        return lambda: int(current(device).ptr)
    return lambda: 0


def stream_handle(stream: Any, kind: str, device: int | None) -> int:
    """The CUDA stream to run on, as an integer: the one given, or the current one of the library `kind`. 0 is the default stream.

    `stream` may be an integer, or a stream object of torch, CuPy, Numba or cuda.core.
    """
    if stream is None:
        return current_stream(kind, device)()
    if isinstance(stream, int | np.integer) and not isinstance(stream, bool):
        if stream < 0:
            raise ValueError(f"stream must be a handle from 0, got {stream}")
        return int(stream)
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr", "handle"):
        if hasattr(stream, attribute):
            handle = getattr(stream, attribute)
            return int(getattr(handle, "value", handle) or 0)
    raise TypeError(f"stream must be an integer handle or a CUDA stream object, got {type(stream).__name__}")


def on_device(device: int | None) -> contextlib.AbstractContextManager[Any]:
    """For blocks in which `device` is Numba's current one; nothing to do for host memory."""
    return contextlib.nullcontext() if device is None else device_context(device)


def _view_torch(tensor: Any, name: str) -> ArrayView:
    if tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{name} is on device {tensor.device}, but must be on the CPU or a CUDA device")
    if tensor.layout is not sys.modules["torch"].strided:
        raise TypeError(f"{name} has layout {tensor.layout}, but must be dense")
    try:
        pointer = tensor.data_ptr()
    except RuntimeError as error:
        # Those of torch.vmap.
        raise TypeError(f"{name} does not tell where its elements lie: {error}") from error
    if tensor.is_neg():
        raise TypeError(f"{name} is a view of numbers whose signs are to be turned, but must hold its elements: give its resolve_neg()")
    itemsize = tensor.element_size()
    strides = tuple(stride * itemsize for stride in tensor.stride())
    return ArrayView(name, "torch", str(tensor.dtype).removeprefix("torch."), itemsize, tuple(tensor.shape), strides, pointer,
                     tensor.device.index if tensor.is_cuda else None, True, tensor)


def _view_numba(array: Any, name: str) -> ArrayView:
    from numba import cuda

    if not cuda.is_cuda_array(array):
        raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    # Numba has no bfloat16: such arrays are uint16.
    dtype = "bfloat16" if array.dtype == np.uint16 else str(array.dtype)
    pointer = array.__cuda_array_interface__["data"][0]
    # The simulator's arrays have no memory of a device.
    context = array.gpu_data.context if hasattr(array, "gpu_data") else cuda.current_context()
    return ArrayView(name, "numba", dtype, array.dtype.itemsize, array.shape, array.strides, pointer, context.device.id, True, array)


def _view_interface(array: Any, name: str) -> ArrayView:
    """Of what has nothing but a `__cuda_array_interface__`, which does not tell the device."""
    from numba import cuda

    with on_device(device_of(array.__cuda_array_interface__["data"][0])):
        # What comes back is Numba's, and has the interface too.
        return _view_numba(cuda.as_cuda_array(array), name)


class _DLTensor(ctypes.Structure):
    """DLPack's header of an array (dlpack.h, DLTensor)."""

    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int), ("device_id", ctypes.c_int), ("ndim", ctypes.c_int),
                ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64)]


# dlpack.h: (DLDataTypeCode, bits, lanes); DLDeviceType.
_DLPACK_DTYPE = {(4, 16, 1): "bfloat16", (2, 16, 1): "float16", (2, 32, 1): "float32", (0, 32, 1): "int32"}
_DLPACK_CPU, _DLPACK_CUDA = 1, 2


def _view_dlpack(array: Any, name: str, stream: Any) -> ArrayView:
    device_type, device_id = array.__dlpack_device__()
    if device_type not in (_DLPACK_CPU, _DLPACK_CUDA):
        raise TypeError(f"{name} is on DLPack device type {int(device_type)}, but must be on the CPU (1) or a CUDA device (2)")
    # The producer must order its work before what the stream does next: 1 is the default stream in DLPack's terms.
    handle = stream_handle(stream, "dlpack", device_id) or 1
    try:
        capsule = array.__dlpack__(stream=handle) if device_type == _DLPACK_CUDA else array.__dlpack__()
    except BufferError as error:
        raise TypeError(f"{name} does not let its memory be seen through DLPack: {error}") from error
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = _DLTensor.from_address(pointer_of(capsule, b"dltensor"))
    dtype = _DLPACK_DTYPE.get((tensor.code, tensor.bits, tensor.lanes), f"DLPack type ({tensor.code}, {tensor.bits}, {tensor.lanes})")
    itemsize = tensor.bits * tensor.lanes // 8
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    # No strides means C order.
    steps = tensor.strides[:tensor.ndim] if tensor.strides else _c_steps(shape)
    strides = tuple(step * itemsize for step in steps)
    # Nobody takes the capsule over, so holding it holds the array.
    return ArrayView(name, "dlpack", dtype, itemsize, shape, strides, (tensor.data or 0) + tensor.byte_offset,
                     int(device_id) if device_type == _DLPACK_CUDA else None, True, (array, capsule))
