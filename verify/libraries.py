"""NumPy arrays as the arrays of each library that `mla_numba` takes, on any device, and back; bfloat16 as the library has it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numba import cuda

from mla_numba.arrays import on_device


class Library(NamedTuple):
    """`into(array, device=0)` makes an array of the library of a NumPy array, `back` the other way."""

    into: Callable[..., Any]
    back: Callable[[Any], np.ndarray]


def _bits(array: np.ndarray, as_integers: type = np.uint16) -> np.ndarray:
    """Of bfloat16, which neither torch nor Numba takes from NumPy."""
    return array.view(as_integers) if array.dtype == ml_dtypes.bfloat16 else array


def to_torch(array: np.ndarray, device: int = 0) -> Any:
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(_bits(array, np.int16))).to(f"cuda:{device}")
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
    with on_device(device):
        return cuda.to_device(np.ascontiguousarray(_bits(array)))


def _from_numba(array: Any) -> np.ndarray:
    copied: np.ndarray = array.copy_to_host()
    return copied.view(ml_dtypes.bfloat16) if copied.dtype == np.uint16 else copied


def _to_jax(array: np.ndarray, device: int = 0) -> Any:
    import jax

    return jax.device_put(array, jax.devices("cuda")[device])


# By what must be installed.
LIBRARIES = {
    "numpy": Library(lambda array, device=0: array, np.asarray),
    "torch": Library(to_torch, from_torch),
    "cupy": Library(_to_cupy, _from_cupy),
    "numba": Library(_to_numba, _from_numba),
    "jax": Library(_to_jax, np.asarray),
}
