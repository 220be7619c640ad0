"""NumPy arrays as the arrays of each library that `mla_numba` takes, on any device, and back; bfloat16 as the library has it."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numba import cuda


class Library(NamedTuple):
    """How arrays get there and back.

    Attributes
    ----------
    module : str
        What must be installed.
    into : callable
        (NumPy array, device = 0) to an array of the library.
    back : callable
        And back.
    device_of : callable
        The device that an array of it is on; None in host memory.
    """

    module: str
    into: Callable[..., Any]
    back: Callable[[Any], np.ndarray]
    device_of: Callable[[Any], int | None]


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def to_torch(array: np.ndarray, device: int = 0) -> Any:
    import torch

    # torch knows int16, not uint16, of old.
    bits = torch.from_numpy(np.ascontiguousarray(_bits(array)).view(np.int16 if array.dtype == ml_dtypes.bfloat16 else array.dtype))
    tensor = bits.to(f"cuda:{device}")
    return tensor.view(torch.bfloat16) if array.dtype == ml_dtypes.bfloat16 else tensor


def from_torch(tensor: Any) -> np.ndarray:
    import torch

    is_bfloat16 = tensor.dtype == torch.bfloat16
    array: np.ndarray = (tensor.view(torch.int16) if is_bfloat16 else tensor).cpu().numpy()
    return array.view(ml_dtypes.bfloat16) if is_bfloat16 else array


def _to_cupy(array: np.ndarray, device: int = 0) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        return cupy.asarray(array)


def _from_cupy(array: Any) -> np.ndarray:
    with array.device:
        copied: np.ndarray = array.get()
    return copied


def _to_numba(array: np.ndarray, device: int = 0) -> Any:
    with cuda.gpus[device]:
        return cuda.to_device(np.ascontiguousarray(_bits(array)))


def _from_numba(array: Any) -> np.ndarray:
    copied: np.ndarray = array.copy_to_host()
    return copied.view(ml_dtypes.bfloat16) if copied.dtype == np.uint16 else copied


def _to_jax(array: np.ndarray, device: int = 0) -> Any:
    jax = importlib.import_module("jax")
    return jax.device_put(array, jax.devices("cuda")[device])


LIBRARIES = {
    "numpy": Library("numpy", lambda array, device=0: array, np.asarray, lambda array: None),
    "torch": Library("torch", to_torch, from_torch, lambda tensor: tensor.device.index),
    "cupy": Library("cupy", _to_cupy, _from_cupy, lambda array: array.device.id),
    "numba": Library("numba", _to_numba, _from_numba, lambda array: array.gpu_data.context.device.id),
    "jax": Library("jax", _to_jax, np.asarray, lambda array: array.device.id),
}
