"""Split-KV decode on the CPU: a worker is a thread, which walks its pieces of the schedule and keeps one job's state in its cache.

    per KV tile of block_n tokens:  pages --widen--> K [tokens, head_dim_qk] float32, once for all rows
        S [tokens, rows] = scale_log2 K Q^T     BLAS    (rows adjacent: softmax is vectorised across rows, without reductions)
        P = exp2(S - max), rounded to the input dtype;  O *= exp2(old max - max)
        O [rows, head_dim_v] += P^T V           BLAS    (V is the first head_dim_v columns of the same K: a leading dimension, no copy)
    at the end of a piece:          O / row sum --> out and lse, or a slot of the partial results, which `merge` adds up

float32 bytes of a worker at DeepSeek's shape, 128 rows and tiles of 256: Q 295 K, K 590 K, O 262 K, S 131 K.

`kv_flat` is the memory of `kv_cache`, whose first element is at `kv_origin`: Numba knows that the slices of a flat array are
contiguous, which those of an array of any strides are not, and converts them 6 times as fast.

A tile holds only tokens that some row of the job sees, so nothing else is read. The shapes of all BLAS calls follow from the
request alone, and BLAS runs single-threaded inside a worker: hence bitwise reruns and `batch_invariant`.
"""

import inspect
import zlib
from functools import cache

import numpy as np
from numba import njit, prange, types

from .. import scheduler
from ..contract import LN_2
from ..scheduler import (
    BEGIN_BLOCK,
    BEGIN_JOB,
    BEGIN_SPLIT,
    END_BLOCK,
    END_JOB,
    JOB_NUM_BLOCKS,
    JOB_Q_BATCH,
    JOB_Q_BEGIN,
    JOB_Q_LEN,
    JOB_REQUEST,
    JOB_ROW_BEGIN,
    JOB_SEQ_LEN,
)
from . import cpu_math
from .cpu_math import exp2, helper, narrow, widen

# Fortran's sgemm(transa, transb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc), all by reference.
SGEMM = types.FunctionType(types.void(*[types.voidptr] * 13))

_AS_IS, _TRANSPOSED = ord("N"), ord("T")
_ZERO, _ONE = np.float32(0), np.float32(1)
_NEG_INF = np.float32(-np.inf)

_scheduler = scheduler.make_scheduler(helper(), lambda: None)
_visible_tokens, _piece_end, _slot_of = _scheduler.visible_tokens, _scheduler.piece_end, _scheduler.slot_of


@helper()
def _gemm(sgemm, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    """c[m, n] = alpha a b + beta c in Fortran's order: the leading dimension is the stride of the second index."""
    trans, sizes, factors = np.empty(2, np.uint8), np.empty(6, np.int32), np.empty(2, np.float32)
    trans[0], trans[1] = trans_a, trans_b
    sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5] = m, n, k, lda, ldb, ldc
    factors[0], factors[1] = alpha, beta
    sgemm(trans.ctypes, trans[1:].ctypes, sizes.ctypes, sizes[1:].ctypes, sizes[2:].ctypes, factors.ctypes,
          a.ctypes, sizes[3:].ctypes, b.ctypes, sizes[4:].ctypes, factors[1:].ctypes, c.ctypes, sizes[5:].ctypes)


@helper()
def _load_q(q, job, heads_per_kv, kv_head, dtype, q_tile):
    for r in range(q_tile.shape[0]):
        row = job[JOB_ROW_BEGIN] + r
        q_row = q[job[JOB_Q_BATCH], job[JOB_Q_BEGIN] + row // heads_per_kv, kv_head * heads_per_kv + row % heads_per_kv]
        for column in range(q_tile.shape[1]):
            q_tile[r, column] = widen(q_row[column], dtype)


@helper()
def _load_kv(kv_flat, kv_origin, kv_cache, pages, kv_head, begin, dtype, kv_tile):
    """Tokens `begin` and on, one to a row; zeros where the table ends or names a page that the cache does not have."""
    num_pages, page_size = kv_cache.shape[0], kv_cache.shape[1]
    page_stride, slot_stride = kv_cache.strides[0] // kv_cache.itemsize, kv_cache.strides[1] // kv_cache.itemsize
    head_begin = kv_origin + kv_head * (kv_cache.strides[2] // kv_cache.itemsize)
    for t in range(kv_tile.shape[0]):
        page_idx, slot = divmod(begin + t, page_size)
        page = pages[page_idx] if page_idx < pages.shape[0] else -1
        if 0 <= page < num_pages:
            row_begin = head_begin + page * page_stride + slot * slot_stride
            kv_row = kv_flat[row_begin: row_begin + kv_tile.shape[1]]
            for column in range(kv_tile.shape[1]):
                kv_tile[t, column] = widen(kv_row[column], dtype)
        else:
            kv_tile[t] = _ZERO


@helper()
def _mask(s_tile, job, heads_per_kv, begin):
    """-inf where a row does not see a token that a later query of the job does. Tokens of the tile start at `begin`."""
    for r in range(s_tile.shape[1]):
        q_idx = (job[JOB_ROW_BEGIN] + r) // heads_per_kv
        visible = _visible_tokens(job[JOB_SEQ_LEN], job[JOB_Q_LEN], q_idx, True)
        for t in range(max(visible - begin, 0), s_tile.shape[0]):
            s_tile[t, r] = _NEG_INF


@helper()
def _softmax_step(s_tile, row_max, row_sum, rescale, dtype):
    """Turn S into P in place, update max and sum, and leave in `rescale` what O is to be multiplied by."""
    num_tokens, num_rows = s_tile.shape
    for r in range(num_rows):
        rescale[r] = row_max[r]
    for t in range(num_tokens):
        for r in range(num_rows):
            score, largest = s_tile[t, r], row_max[r]
            row_max[r] = score if score > largest else largest
    # A row that has seen nothing yet keeps max = -inf: 0 in its place makes every exp2 here 0, not NaN.
    shift, tile_sum = np.empty(num_rows, np.float32), np.zeros(num_rows, np.float32)
    for r in range(num_rows):
        shift[r] = row_max[r] if row_max[r] > _NEG_INF else _ZERO
        rescale[r] = exp2(rescale[r] - shift[r])
    for t in range(num_tokens):
        for r in range(num_rows):
            p = exp2(s_tile[t, r] - shift[r])
            tile_sum[r] += p
            s_tile[t, r] = p
    for t in range(num_tokens):
        for r in range(num_rows):
            s_tile[t, r] = widen(narrow(s_tile[t, r], dtype), dtype)
    for r in range(num_rows):
        row_sum[r] = row_sum[r] * rescale[r] + tile_sum[r]


@helper()
def _attend(sgemm, kv_flat, kv_origin, kv_cache, pages, job, heads_per_kv, kv_head, begin, end, block_n, causal, scale_log2, dtype,
            q_tile, kv_buffer, s_buffer, o_tile, lse2):
    """Attention of the job's rows over tokens [begin, end): O normalised by its own row sum, and lse in base 2 (-inf: saw nothing)."""
    num_rows, head_dim_qk = q_tile.shape
    head_dim_v = o_tile.shape[1]
    first_row_sees = _visible_tokens(job[JOB_SEQ_LEN], job[JOB_Q_LEN], job[JOB_ROW_BEGIN] // heads_per_kv, causal)
    row_max = np.full(num_rows, _NEG_INF)
    row_sum = np.zeros(num_rows, np.float32)
    rescale = np.empty(num_rows, np.float32)
    o_tile[:] = _ZERO
    for tile_begin in range(begin, end, block_n):
        num_tokens = min(block_n, end - tile_begin)
        kv_tile = kv_buffer[:num_tokens]
        s_tile = s_buffer[: num_tokens * num_rows].reshape(num_tokens, num_rows)
        _load_kv(kv_flat, kv_origin, kv_cache, pages, kv_head, tile_begin, dtype, kv_tile)
        _gemm(sgemm, _TRANSPOSED, _AS_IS, num_rows, num_tokens, head_dim_qk, scale_log2, q_tile, head_dim_qk, kv_tile, head_dim_qk,
              _ZERO, s_tile, num_rows)
        if tile_begin + num_tokens > first_row_sees:
            _mask(s_tile, job, heads_per_kv, tile_begin)
        _softmax_step(s_tile, row_max, row_sum, rescale, dtype)
        for r in range(num_rows):
            if rescale[r] != 1:
                for column in range(head_dim_v):
                    o_tile[r, column] *= rescale[r]
        _gemm(sgemm, _AS_IS, _TRANSPOSED, head_dim_v, num_rows, num_tokens, _ONE, kv_tile, head_dim_qk, s_tile, num_rows,
              _ONE, o_tile, head_dim_v)
    for r in range(num_rows):
        lse2[r] = _NEG_INF
        if row_sum[r] != 0:
            lse2[r] = row_max[r] + np.log2(row_sum[r])
            for column in range(head_dim_v):
                o_tile[r, column] /= row_sum[r]


@helper()
def _store_row(o_row, lse2, job, heads_per_kv, kv_head, r, dtype, empty_lse, out, lse):
    row = job[JOB_ROW_BEGIN] + r
    q_batch, q_pos, head = job[JOB_Q_BATCH], job[JOB_Q_BEGIN] + row // heads_per_kv, kv_head * heads_per_kv + row % heads_per_kv
    out_row = out[q_batch, q_pos, head]
    for column in range(o_row.shape[0]):
        out_row[column] = narrow(o_row[column], dtype)
    lse[q_batch, head, q_pos] = empty_lse if lse2 == _NEG_INF else LN_2 * lse2


@helper()
def _num_rows(job, heads_per_kv, rows_per_job):
    return min(rows_per_job, job[JOB_Q_LEN] * heads_per_kv - job[JOB_ROW_BEGIN])


@helper()
def _walk(worker, sgemm, jobs, num_splits, q, kv_flat, kv_origin, kv_cache, block_table, out, lse, o_partial, lse2_partial,
          block_n, split_blocks, causal, scale_log2, empty_lse, dtype):
    """All pieces of one worker, a row of the worker table."""
    num_heads_kv, rows_per_job, head_dim_v = o_partial.shape[1:]
    heads_per_kv = q.shape[2] // num_heads_kv
    q_buffer = np.empty((rows_per_job, q.shape[3]), np.float32)
    kv_buffer = np.empty((block_n, q.shape[3]), np.float32)
    s_buffer = np.empty(block_n * rows_per_job, np.float32)
    o_buffer = np.empty((rows_per_job, head_dim_v), np.float32)
    lse2 = np.empty(rows_per_job, np.float32)
    split = worker[BEGIN_SPLIT]
    for job_idx in range(worker[BEGIN_JOB], worker[END_JOB] + 1):
        job = jobs[job_idx]
        num_rows = _num_rows(job, heads_per_kv, rows_per_job)
        last_row = job[JOB_ROW_BEGIN] + num_rows - 1
        num_tokens = _visible_tokens(job[JOB_SEQ_LEN], job[JOB_Q_LEN], last_row // heads_per_kv, causal)
        block = worker[BEGIN_BLOCK] if job_idx == worker[BEGIN_JOB] else 0
        end_block = worker[END_BLOCK] if job_idx == worker[END_JOB] else job[JOB_NUM_BLOCKS]
        num_parts = num_splits[job_idx + 1] - num_splits[job_idx]
        q_tile, o_tile = q_buffer[:num_rows], o_buffer[:num_rows]
        while True:
            stop = _piece_end(block, end_block, split_blocks, num_parts)
            for kv_head in range(num_heads_kv):
                _load_q(q, job, heads_per_kv, kv_head, dtype, q_tile)
                _attend(sgemm, kv_flat, kv_origin, kv_cache, block_table[job[JOB_REQUEST]], job, heads_per_kv, kv_head,
                        block * block_n, min(stop * block_n, num_tokens), block_n, causal, scale_log2, dtype,
                        q_tile, kv_buffer, s_buffer, o_tile, lse2)
                if num_parts == 1:
                    for r in range(num_rows):
                        _store_row(o_tile[r], lse2[r], job, heads_per_kv, kv_head, r, dtype, empty_lse, out, lse)
                else:
                    slot = _slot_of(num_splits, job_idx, split)
                    for r in range(num_rows):
                        lse2_partial[slot, kv_head, r] = lse2[r]
                        for column in range(head_dim_v):
                            o_partial[slot, kv_head, r, column] = o_tile[r, column]
            split += 1
            block = stop
            if block >= end_block:
                break
        split = 0


@helper()
def _merge_row(o_partial, lse2_partial, o_row):
    """Weighted sum, in the order of the splits, of one row's partial results (num_splits, head_dim_v); returns lse in base 2."""
    total_max = _NEG_INF
    for split in range(lse2_partial.shape[0]):
        total_max = max(total_max, lse2_partial[split])
    o_row[:] = _ZERO
    if total_max == _NEG_INF:
        return _NEG_INF
    total = _ZERO
    for split in range(lse2_partial.shape[0]):
        weight = exp2(lse2_partial[split] - total_max)
        total += weight
        for column in range(o_row.shape[0]):
            o_row[column] += weight * o_partial[split, column]
    o_row /= total
    return total_max + np.log2(total)


def _decode(sgemm, jobs, workers, num_splits, q, kv_flat, kv_origin, kv_cache, block_table, out, lse, o_partial, lse2_partial,
            block_n, split_blocks, causal, scale_log2, empty_lse, dtype):
    for worker in prange(workers.shape[0]):
        _walk(workers[worker], sgemm, jobs, num_splits, q, kv_flat, kv_origin, kv_cache, block_table, out, lse, o_partial, lse2_partial,
              block_n, split_blocks, causal, scale_log2, empty_lse, dtype)


def _merge(jobs, num_splits, out, lse, o_partial, lse2_partial, empty_lse, dtype):
    num_heads_kv, rows_per_job, head_dim_v = o_partial.shape[1:]
    heads_per_kv = out.shape[2] // num_heads_kv
    for job_idx in prange(jobs.shape[0]):
        splits = num_splits[job_idx + 1] - num_splits[job_idx]
        if splits > 1:
            first = _slot_of(num_splits, job_idx, 0)
            o_row = np.empty(head_dim_v, np.float32)
            for kv_head in range(num_heads_kv):
                for r in range(_num_rows(jobs[job_idx], heads_per_kv, rows_per_job)):
                    lse2 = _merge_row(o_partial[first: first + splits, kv_head, r], lse2_partial[first: first + splits, kv_head, r], o_row)
                    _store_row(o_row, lse2, jobs[job_idx], heads_per_kv, kv_head, r, dtype, empty_lse, out, lse)


@cache
def compile_kernels(element):
    """`decode` and `merge` for arrays of `element`, uint16 or uint32: 16 to 20 s of CPU time, or 1 s from the disk (2.4 GHz EPYC).

    One signature takes arrays of any strides, alignment and writability.
    """
    table, tables = types.Array(types.int32, 1, "C"), types.Array(types.int32, 2, "C")
    inputs, page_ids = (types.Array(dtype, ndim, "A", readonly=True, aligned=False) for dtype, ndim in ((element, 4), (types.int32, 2)))
    out, lse = (types.Array(dtype, ndim, "A", aligned=False) for dtype, ndim in ((element, 4), (types.float32, 3)))
    flat = types.Array(element, 1, "C", readonly=True, aligned=False)
    partials = types.Array(types.float32, 4, "C"), types.Array(types.float32, 3, "C")
    count, real = types.int64, types.float32
    decode = (SGEMM, tables, tables, table, inputs, flat, count, inputs, page_ids, out, lse, *partials, count, count, types.boolean,
              real, real, count)
    merge = (tables, table, out, lse, *partials, real, count)
    return _compile(_decode, decode), _compile(_merge, merge)


def _compile(function, signature):
    # Numba's disk cache looks for changes in this file alone: the name carries what is compiled in from the others.
    sources = "".join(inspect.getsource(module) for module in (scheduler, cpu_math))
    function.__qualname__ = f"{function.__name__}_{zlib.crc32(sources.encode()):08x}"
    try:
        return njit(types.void(*signature), parallel=True, cache=True)(function)
    except RuntimeError:  # no directory that the cache could be written to
        return njit(types.void(*signature), parallel=True)(function)
