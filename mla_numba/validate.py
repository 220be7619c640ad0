"""The rules of the contract that a call can break: one function each, saying what was got and what is needed."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import ArrayView
from .config import DecodeShape
from .contract import DTYPES, EMPTY_LSE, LOG2_E

_INT32_MAX = 2**31 - 1
# Kernels multiply by scale * log2(e), in float32.
_SOFTMAX_SCALE_MAX = float(np.finfo(np.float32).max) / LOG2_E


def require_flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def require_count(value: Any, name: str, least: int = 1) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not least <= value <= _INT32_MAX:
        raise ValueError(f"{name} must be from {least} to {_INT32_MAX}, got {value}")
    return int(value)


def require_choice(value: Any, name: str, choices: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def require_empty_lse(value: Any) -> float:
    return EMPTY_LSE[require_choice(value, "empty_lse", tuple(EMPTY_LSE))]


def softmax_scale_or_default(value: Any, head_dim_qk: int) -> float:
    if value is None:
        return float(head_dim_qk) ** -0.5
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"softmax_scale must be a real number or None, got {value!r}")
    try:
        scale = float(value)
    except OverflowError:
        scale = math.inf
    if not 0 <= scale <= _SOFTMAX_SCALE_MAX:
        raise ValueError(f"softmax_scale must be finite and not negative, got {value!r} (a float32, also times log2(e))")
    return scale


def require_ndim(array: ArrayView, ndim: int, axes: str) -> None:
    if array.ndim != ndim:
        raise ValueError(f"{array.name} has {array.ndim} dimensions, shape {array.shape}, but needs {ndim}: {axes}")


def require_dtype(array: ArrayView, dtypes: Sequence[str], why: str = "") -> None:
    if array.dtype not in dtypes:
        raise TypeError(f"{array.name} has dtype {array.dtype}, but must be {' or '.join(dtypes)}{why}")


def require_shape(array: ArrayView, shape: tuple[int, ...], axes: str) -> None:
    if array.shape != shape:
        raise ValueError(f"{array.name} has shape {array.shape}, but must have shape {shape}: {axes}")


def require_last_axis_contiguous(array: ArrayView) -> None:
    if array.size > 0 and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        raise ValueError(f"{array.name} has a stride of {array.strides[-1]} bytes on its last axis, but that axis must be contiguous "
                         f"({array.itemsize} bytes)")


def require_whole_elements(array: ArrayView) -> None:
    if array.pointer % array.itemsize or any(stride % array.itemsize for stride in array.strides):
        raise ValueError(f"{array.name} must be aligned to its {array.itemsize}-byte elements, got address {array.pointer:#x} "
                         f"and strides {array.strides}")


def require_same_place(arrays: Sequence[ArrayView]) -> None:
    first = arrays[0]
    for array in arrays[1:]:
        if array.device != first.device:
            raise ValueError(f"{array.name} is in {array.place}, but {first.name} is in {first.place}: all arrays must be in one place")
        if array.kind != first.kind:
            raise TypeError(f"{array.name} is a {array.kind} array, but {first.name} is a {first.kind} array: "
                            "all arrays must be of one library")


def require_output(array: ArrayView, shape: tuple[int, ...], dtype: str, axes: str) -> None:
    require_dtype(array, (dtype,))
    require_shape(array, shape, axes)
    require_whole_elements(array)
    if not array.writable:
        raise ValueError(f"{array.name} is read-only, but the result is to be written to it")
    extent = array.itemsize
    for stride, n in sorted((abs(stride), n) for n, stride in zip(array.shape, array.strides, strict=True) if n > 1):
        if stride < extent and array.size > 0:
            raise ValueError(f"{array.name} has strides {array.strides} for shape {array.shape}: elements share memory or interleave, but "
                             "each axis must step over all that lies inside it")
        extent += (n - 1) * stride


def require_no_overlap(written: ArrayView, arrays: Sequence[ArrayView]) -> None:
    for array in arrays:
        # NumPy compares addresses and reads nothing, so arrays in device memory can be asked about as well.
        if np.shares_memory(written.storage(), array.storage()):
            raise ValueError(f"{written.name} shares memory with {array.name}, but the result must have its own")


def require_heads(num_heads_q: int, num_heads_kv: int) -> None:
    if num_heads_q < 1 or num_heads_kv < 1 or num_heads_q % num_heads_kv:
        raise ValueError(f"num_heads_q={num_heads_q} must be a positive multiple of num_heads_kv={num_heads_kv}")


def require_head_dims(head_dim_qk: int, head_dim_v: int) -> None:
    if not 1 <= head_dim_v <= head_dim_qk:
        raise ValueError(f"head_dim_v={head_dim_v} must be from 1 to head_dim_qk={head_dim_qk}, of which V is the first columns")


def require_cu_seqlens_shape(cu_seqlens_q: ArrayView, batch: int) -> None:
    require_ndim(cu_seqlens_q, 1, "(batch + 1,)")
    require_dtype(cu_seqlens_q, ("int32",))
    require_shape(cu_seqlens_q, (batch + 1,), "(batch + 1,)")
    require_whole_elements(cu_seqlens_q)


def decode_shape(q: ArrayView, kv_cache: ArrayView, block_table: ArrayView, seq_lens: ArrayView, cu_seqlens_q: ArrayView | None,
                 head_dim_v: int, causal: bool, batch_invariant: bool) -> DecodeShape:
    """Every rule about shapes, dtypes and places of the inputs of `mla_decode`; the shape that they make together."""
    inputs = [q, kv_cache, block_table, seq_lens] + ([] if cu_seqlens_q is None else [cu_seqlens_q])
    if cu_seqlens_q is None:
        require_ndim(q, 4, "(batch, seq_len_q, num_heads_q, head_dim_qk), or 3 with cu_seqlens_q")
    else:
        require_ndim(q, 3, "(total_q, num_heads_q, head_dim_qk) with cu_seqlens_q")
    require_ndim(kv_cache, 4, "(num_pages, page_size, num_heads_kv, head_dim_qk)")
    require_ndim(block_table, 2, "(batch, max_pages)")
    require_ndim(seq_lens, 1, "(batch,)")
    require_dtype(q, DTYPES)
    require_dtype(kv_cache, (q.dtype,), ", as q")
    require_dtype(block_table, ("int32",))
    require_dtype(seq_lens, ("int32",))
    require_same_place(inputs)
    for array in inputs:
        require_whole_elements(array)
    require_last_axis_contiguous(q)
    require_last_axis_contiguous(kv_cache)
    _, page_size, num_heads_kv, head_dim_qk = kv_cache.shape
    require_shape(q, (*q.shape[:-1], head_dim_qk), "the last axis as kv_cache's, head_dim_qk")
    require_heads(q.shape[-2], num_heads_kv)
    require_head_dims(head_dim_qk, head_dim_v)
    if page_size < 1:
        raise ValueError(f"kv_cache has shape {kv_cache.shape}: page_size={page_size} must be at least 1")
    batch = seq_lens.shape[0]
    require_shape(block_table, (batch, block_table.shape[1]), "one row per entry of seq_lens")
    if cu_seqlens_q is None:
        require_shape(q, (batch, *q.shape[1:]), "one entry per entry of seq_lens")
        seq_len_q, total_q = q.shape[1], batch * q.shape[1]
    else:
        require_cu_seqlens_shape(cu_seqlens_q, batch)
        seq_len_q, total_q = 0, q.shape[0]
    return DecodeShape(batch, seq_len_q, total_q, q.shape[-2], num_heads_kv, head_dim_qk, head_dim_v, page_size, q.dtype, causal,
                       batch_invariant)


def require_seq_len_values(seq_lens: np.ndarray, capacity: int) -> None:
    """`check_values`: lengths from 0 to what a row of the block table can hold."""
    for request, length in enumerate(seq_lens.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(f"seq_lens[{request}]={length} must be from 0 to {capacity}, the tokens that a row of block_table holds")


def require_page_ids(block_table: np.ndarray, seq_lens: np.ndarray, page_size: int, num_pages: int) -> None:
    """`check_values`: page ids inside the cache, wherever a length says that they are used."""
    columns = np.arange(block_table.shape[1])
    used = columns < -(-seq_lens.astype(np.int64)[:, None] // page_size)
    bad = np.argwhere(used & ((block_table < 0) | (block_table >= num_pages)))
    if len(bad):
        request, column = bad[0]
        raise ValueError(f"block_table[{request}, {column}]={block_table[request, column]} must be from 0 to {num_pages - 1}: "
                         f"kv_cache has {num_pages} pages, and seq_lens[{request}]={seq_lens[request]} uses this one")


def require_cu_seqlens_values(cu_seqlens_q: np.ndarray, total_q: int) -> None:
    """`check_values`: offsets that begin at 0, never fall, and end at the rows of q."""
    offsets = cu_seqlens_q.tolist()
    if offsets[0] != 0 or offsets[-1] != total_q:
        raise ValueError(f"cu_seqlens_q must run from 0 to total_q={total_q}, got {offsets[0]} to {offsets[-1]}")
    for request, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if end < begin:
            raise ValueError(f"cu_seqlens_q must not fall, got cu_seqlens_q[{request}]={begin} and cu_seqlens_q[{request + 1}]={end}")
