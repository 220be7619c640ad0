"""Merge of partial attention results: one query row per warp, a lane `columns` of its columns.

Each part i comes normalised by its own row sum, with lse2_i, the base-2 logarithm of that sum (-inf where it saw nothing):

    m = max lse2_i        total = sum 2^(lse2_i - m)        O = sum 2^(lse2_i - m) O_i / total        lse2 = m + log2(total)

always in the order of i, so that equal inputs give equal bits. Not fastmath: here infinities are data.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from ..config import ceil_div
from ..contract import LN_2, LOG2_E
from ..scheduler import JOB_Q_BATCH, JOB_Q_BEGIN, JOB_Q_LEN, JOB_ROW_BEGIN
from .schedule import slot_of
from .simt_decode import MINUS_INFINITY, SIMULATOR, STORAGE, exp2

LANES, NUM_WARPS = (4, 2) if SIMULATOR else (32, 4)
NUM_THREADS = LANES * NUM_WARPS

inline = cuda.jit(device=True) if SIMULATOR else cuda.jit(device=True, forceinline=True)


@inline
def _merge_row(o_rmem, lane_idx, o_partial, lse2_partial, first_slot, num_parts, group, row):
    """Merged O of a row, this lane's columns of it, to `o_rmem`; returns its lse2, -inf if no part saw anything."""
    row_max = MINUS_INFINITY
    for part in range(num_parts):
        row_max = max(row_max, lse2_partial[first_slot + part, group, row])
    # A row that saw nothing is +0; any other sum begins at -0, which added to a number leaves its bits alone, also where that is -0.
    for c in range(o_rmem.shape[0]):
        o_rmem[c] = np.float32(0) if row_max == MINUS_INFINITY else np.float32(-0.0)
    if row_max == MINUS_INFINITY:
        return row_max
    total = np.float32(0)
    for part in range(num_parts):
        if lse2_partial[first_slot + part, group, row] > MINUS_INFINITY:
            weight = exp2(lse2_partial[first_slot + part, group, row] - row_max)
            total += weight
            for c in range(o_rmem.shape[0]):
                column = lane_idx + c * LANES
                if column < o_partial.shape[3]:
                    o_rmem[c] += weight * o_partial[first_slot + part, group, row, column]
    for c in range(o_rmem.shape[0]):
        o_rmem[c] /= total
    return row_max + np.float32(math.log2(total))


@inline
def _natural_lse(lse2, empty_lse):
    return empty_lse if lse2 == MINUS_INFINITY else lse2 * np.float32(LN_2)


@cache
def make_merge_kernel(dtype: str, head_dim_v: int) -> Callable[..., None]:
    """Merge of the split jobs of a schedule, not yet compiled. Grid (any, KV heads, ceil(rows of a job / NUM_WARPS))."""
    COLUMNS = ceil_div(head_dim_v, LANES)
    from_float32 = STORAGE[dtype].from_float32

    def simt_merge(jobs, num_splits, o_partial, lse2_partial, out, lse, heads_per_kv, empty_lse):
        tid = np.uint32(cuda.threadIdx.x)
        warp_idx, lane_idx = tid // LANES, tid % LANES
        kv_head, row = cuda.blockIdx.y, cuda.blockIdx.z * NUM_WARPS + warp_idx
        o_rmem = cuda.local.array(COLUMNS, types.float32)
        for job in range(cuda.blockIdx.x, jobs.shape[0], cuda.gridDim.x):
            num_parts = num_splits[job + 1] - num_splits[job]
            job_row = jobs[job, JOB_ROW_BEGIN] + row
            if num_parts > 1 and row < o_partial.shape[2] and job_row < jobs[job, JOB_Q_LEN] * heads_per_kv:
                lse2 = _merge_row(o_rmem, lane_idx, o_partial, lse2_partial, slot_of(num_splits, job, 0), num_parts, kv_head, row)
                q_batch, token = jobs[job, JOB_Q_BATCH], jobs[job, JOB_Q_BEGIN] + job_row // heads_per_kv
                head = kv_head * heads_per_kv + job_row % heads_per_kv
                if lane_idx == 0:
                    lse[q_batch, head, token] = _natural_lse(lse2, empty_lse)
                for c in range(COLUMNS):
                    column = lane_idx + c * LANES
                    if column < head_dim_v:
                        out[q_batch, token, head, column] = from_float32(o_rmem[c])

    return simt_merge


def merge_signature(dtype: str) -> types.Type:
    """Types of the arguments of `make_merge_kernel`'s kernel."""
    i32, i64, f32 = types.int32, types.int64, types.float32
    return types.void(i32[:, ::1], i32[::1], f32[:, :, :, ::1], f32[:, :, ::1], STORAGE[dtype].element[:, :, :, :], f32[:, :, :], i64, f32)


@cache
def make_state_kernels(dtype: str, head_dim_v: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """Merge of whole results, not yet compiled: a kernel that takes in one state as a part, and one that merges the parts.

    Parts lie as (states, 1, rows, head_dim_v), row (batch * seq_len + token) * heads + head. Grid ceil(rows / NUM_WARPS).
    """
    COLUMNS = ceil_div(head_dim_v, LANES)
    to_float32, from_float32 = STORAGE[dtype].to_float32, STORAGE[dtype].from_float32

    def take_state(state, out, lse, o_partial, lse2_partial):
        tid = np.uint32(cuda.threadIdx.x)
        warp_idx, lane_idx = tid // LANES, tid % LANES
        row = cuda.blockIdx.x * NUM_WARPS + warp_idx
        if row < o_partial.shape[2]:
            head = row % out.shape[2]
            token = row // out.shape[2] % out.shape[1]
            batch = row // out.shape[2] // out.shape[1]
            for column in range(lane_idx, head_dim_v, LANES):
                o_partial[state, 0, row, column] = to_float32(out[batch, token, head, column])
            if lane_idx == 0:
                value = lse[batch, head, token]
                lse2_partial[state, 0, row] = MINUS_INFINITY if math.isinf(value) else value * np.float32(LOG2_E)

    def merge_parts(o_partial, lse2_partial, out, lse, empty_lse):
        tid = np.uint32(cuda.threadIdx.x)
        warp_idx, lane_idx = tid // LANES, tid % LANES
        row = cuda.blockIdx.x * NUM_WARPS + warp_idx
        o_rmem = cuda.local.array(COLUMNS, types.float32)
        if row < o_partial.shape[2]:
            lse2 = _merge_row(o_rmem, lane_idx, o_partial, lse2_partial, 0, o_partial.shape[0], 0, row)
            head = row % out.shape[2]
            token = row // out.shape[2] % out.shape[1]
            batch = row // out.shape[2] // out.shape[1]
            if lane_idx == 0:
                lse[batch, head, token] = _natural_lse(lse2, empty_lse)
            for c in range(COLUMNS):
                column = lane_idx + c * LANES
                if column < head_dim_v:
                    out[batch, token, head, column] = from_float32(o_rmem[c])

    return take_state, merge_parts


def state_signatures(dtype: str) -> tuple[types.Type, types.Type]:
    """Types of the arguments of `make_state_kernels`' kernels."""
    element, f32 = STORAGE[dtype].element, types.float32
    parts, out, lse = (f32[:, :, :, ::1], f32[:, :, ::1]), element[:, :, :, :], f32[:, :, :]
    return types.void(types.int64, out, lse, *parts), types.void(*parts, out, lse, f32)
