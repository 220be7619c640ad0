"""Backend `cpu`: Numba's threads over SciPy's BLAS. Arrays are NumPy's; bfloat16 is handed over as uint16."""

import ctypes
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import ml_dtypes
import numba
import numba.experimental.function_type
import numpy as np
from numba import types
from numba.extending import get_cython_function_address
from numpy.lib.stride_tricks import as_strided

from ..config import DecodeShape, ScheduleConfig
from ..contract import INVARIANT_SPLIT_TOKENS, LOG2_E
from ..kernels import cpu_math
from ..kernels.cpu import SGEMM, compile_kernels
from .schedule import NewWords, Schedule, make_host_schedule

_BLAS_MODULE = "scipy.linalg.cython_blas"
_LOCK = threading.Lock()
_DTYPE_CODES = {"bfloat16": cpu_math.BFLOAT16, "float16": cpu_math.FLOAT16, "float32": cpu_math.FLOAT32}

# One core of a 2.4 GHz EPYC (512 KB of L2), 128 rows: tiles of 64, 128, 256 and 512 tokens reach 67%, 74%, 77% and 78% of its GEMM rate;
# in another run, jobs of 64, 128 and 256 rows (tiles of 256) 75%, 84% and 90%.
_BLOCK_N = 256
_MAX_ROWS_PER_JOB = 256


# The import of numba.experimental.function_type lets an object of this kind be an argument.
class _Sgemm(types.WrapperAddressProtocol):
    """SciPy's sgemm as an argument, so that its address is no part of the compiled code and the code can be cached on disk.

    np.dot would call the same function, but knows neither a leading dimension (V inside K) nor an addend (O).
    """

    def __wrapper_address__(self) -> int:
        return get_cython_function_address(_BLAS_MODULE, "sgemm")

    def signature(self) -> Any:
        return SGEMM.signature


@cache
def unavailable(_device: int | None = None) -> list[str]:
    """Why this machine cannot run the backend."""
    try:
        get_cython_function_address(_BLAS_MODULE, "sgemm")
    except (ImportError, ValueError) as error:
        return [f"SciPy's BLAS cannot be loaded ({error})"]
    return []


def unsupported(shape: DecodeShape, _device: int | None = None) -> list[str]:
    """Why this shape cannot run here: there is none that cannot."""
    return []


def schedule_config(shape: DecodeShape, max_seq_len: int | None = None) -> ScheduleConfig:
    rows = (shape.total_q if shape.ragged else shape.seq_len_q) * shape.heads_per_kv
    return ScheduleConfig(rows_per_job=max(1, min(rows, _MAX_ROWS_PER_JOB)), block_n=_BLOCK_N, num_workers=numba.get_num_threads(),
                          overhead_blocks=1, min_split_blocks=1,
                          split_blocks=INVARIANT_SPLIT_TOKENS // _BLOCK_N if shape.batch_invariant else 0)


def make_schedule(config: ScheduleConfig, shape: DecodeShape, seq_lens: np.ndarray, cu_seqlens_q: np.ndarray | None,
                  stream: int, new_words: NewWords, max_seq_len: int | None) -> Schedule:
    return make_host_schedule(config, shape, seq_lens, cu_seqlens_q)


@cache
def _blas_threads() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """(get, set) of the thread count of the OpenBLAS behind `_BLAS_MODULE`; None where it is another BLAS."""
    # Looking a name up in an extension module finds those of the libraries that it is linked with.
    library = ctypes.CDLL(importlib.import_module(_BLAS_MODULE).__file__)
    for prefix in ("scipy_openblas", "openblas"):
        if hasattr(library, f"{prefix}_set_num_threads"):
            return getattr(library, f"{prefix}_get_num_threads"), getattr(library, f"{prefix}_set_num_threads")
    return None


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """The workers are the threads: OpenBLAS's own would be shared by them all, one call at a time.

    Holds a lock, as kernels run without the GIL: a call that ends must not restore the threads under one that still runs (its bits
    would change), and one of Numba's threading layers, workqueue, ends the process when two Python threads enter it.
    """
    with _LOCK:
        threads = _blas_threads()
        if threads is None:
            yield
            return
        get_num_threads, set_num_threads = threads
        before = get_num_threads()
        set_num_threads(1)
        try:
            yield
        finally:
            set_num_threads(before)


def _flat(array: np.ndarray) -> tuple[np.ndarray, int]:
    """The memory that `array` spans, as one axis, and where its first element lies there."""
    if array.size == 0:
        return array.reshape(-1), 0
    span = [(n - 1) * stride // array.itemsize for n, stride in zip(array.shape, array.strides, strict=True)]
    lowest = array[tuple(slice(None, None, -1 if extent < 0 else None) for extent in span)]
    return as_strided(lowest, (sum(map(abs, span)) + 1,), (array.itemsize,), writeable=False), -sum(n for n in span if n < 0)


def decode(shape: DecodeShape, schedule: Schedule, q: np.ndarray, kv_cache: np.ndarray, block_table: np.ndarray, out: np.ndarray,
           lse: np.ndarray, softmax_scale: float, empty_lse: float, stream: Any) -> None:
    config, dtype = schedule.config, _DTYPE_CODES[shape.dtype]
    element = np.dtype(f"u{q.itemsize}")
    decode_kernel, merge_kernel = compile_kernels(numba.from_dtype(element))
    q, kv_cache, out = q.view(element), kv_cache.view(element), out.view(element)
    rows_shape = schedule.num_slots, shape.num_heads_kv, config.rows_per_job
    o_partial, lse2_partial = np.empty((*rows_shape, shape.head_dim_v), np.float32), np.empty(rows_shape, np.float32)
    with _one_blas_thread():
        decode_kernel(_Sgemm(), schedule.jobs, schedule.workers, schedule.num_splits, q, *_flat(kv_cache), kv_cache, block_table,
                      out, lse, o_partial, lse2_partial, config.block_n, config.split_blocks, shape.causal, softmax_scale * LOG2_E,
                      empty_lse, dtype)
        if schedule.num_slots > 0:
            merge_kernel(schedule.jobs, schedule.num_splits, out, lse, o_partial, lse2_partial, empty_lse, dtype)


def merge_states(outs: Sequence[np.ndarray], lses: Sequence[np.ndarray], out: np.ndarray, lse: np.ndarray, empty_lse: float,
                 stream: Any) -> None:
    """Merge attention over disjoint sets of tokens; an lse of either infinity says that a row saw nothing."""
    def values(array: np.ndarray) -> np.ndarray:
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array

    # What a state says of rows that it gives no weight is not looked at, NaN or not.
    with np.errstate(all="ignore"):
        lse_of = np.stack([np.where(np.isinf(part), -np.inf, part) for part in lses]).astype(np.float32)
        largest = lse_of.max(axis=0)
        empty = largest == -np.inf
        weights = np.exp(lse_of - np.where(empty, 0, largest))
        total = np.where(empty, 1, weights.sum(axis=0))
        lse[...] = np.where(empty, empty_lse, largest + np.log(total))
        # Sums begin at -0, which added to a number leaves its bits alone, also where that is -0; a row that saw nothing is +0.
        merged = np.full(out.shape, -0.0, np.float32)
        for weight, part in zip((weights / total).swapaxes(2, 3)[..., None], outs, strict=True):
            merged += weight * np.where(weight == 0, np.float32(-0.0), values(part).astype(np.float32))
        values(out)[...] = np.where(empty.swapaxes(1, 2)[..., None], np.float32(0), merged)
