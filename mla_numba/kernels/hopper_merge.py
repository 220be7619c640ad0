"""Merge of the partial results that `hopper_decode` leaves of split jobs: a thread block a row, a thread four of its 512 columns.

    m = max lse2_i        O = sum 2^(lse2_i - m) O_i / sum 2^(lse2_i - m)        lse2 = m + log2 of that sum        in the order of i

A split job is merged by the blocks of the worker that holds its first piece, so that the grid needs no look at the lengths. It is
launched programmatically: its blocks are on the machine and wait when the decode ends. UNROLL parts are loaded at a time: their
latencies overlap.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from .. import ptx
from ..contract import HEAD_DIM_V, LN_2
from ..scheduler import (
    BEGIN_BLOCK,
    BEGIN_JOB,
    END_JOB,
    JOB_COLUMNS,
    JOB_Q_BATCH,
    JOB_Q_BEGIN,
    JOB_Q_LEN,
    JOB_ROW_BEGIN,
    WORKER_COLUMNS,
)
from .hopper_decode import MINUS_INFINITY
from .schedule import slot_of

i32, u32, u64, f32 = np.int32, np.uint32, np.uint64, np.float32

COLUMNS = 4
NUM_THREADS = HEAD_DIM_V // COLUMNS
UNROLL = 8
BATCH = UNROLL * COLUMNS


def merge_signature() -> types.Type:
    table, i, stride, address = types.CPointer(types.int32), types.int32, types.int64, types.uint64
    return types.void(table, table, table, address, address, address, stride, stride, stride, address, stride, stride, stride, i, i, types.float32)


@cache
def make_merge_kernel(dtype: str) -> Callable[..., None]:
    """The kernel, not yet compiled. Grid (rows of a job, workers, KV heads), NUM_THREADS threads."""
    to_pair = ptx.cvt_bf16x2 if dtype == "bfloat16" else ptx.cvt_f16x2

    def hopper_merge(jobs, workers, num_splits, o_partial, lse2_partial, out, out_batch_stride, out_token_stride, out_head_stride, lse,
                     lse_batch_stride, lse_head_stride, lse_token_stride, rows_per_job, heads_per_kv, empty_lse):
        row, worker, kv_head, num_kv_heads = i32(cuda.blockIdx.x), i32(cuda.blockIdx.y), i32(cuda.blockIdx.z), i32(cuda.gridDim.z)
        thread = u32(cuda.threadIdx.x)
        v_rmem = cuda.local.array(BATCH, types.float32)
        o_rmem = cuda.local.array(COLUMNS, types.float32)
        lse2_rmem = cuda.local.array(UNROLL, types.float32)
        # The decode has ended, and its partial results are visible.
        ptx.griddepcontrol_wait()
        begin_job, end_job = workers[worker * WORKER_COLUMNS + BEGIN_JOB], workers[worker * WORKER_COLUMNS + END_JOB]
        if workers[worker * WORKER_COLUMNS + BEGIN_BLOCK] > 0:
            begin_job += 1
        for job in range(begin_job, end_job + 1):
            num_parts = num_splits[job + 1] - num_splits[job]
            job_row = jobs[job * JOB_COLUMNS + JOB_ROW_BEGIN] + row
            if num_parts > 1 and job_row < jobs[job * JOB_COLUMNS + JOB_Q_LEN] * heads_per_kv:
                first = (u64(slot_of(num_splits, job, 0)) * u64(num_kv_heads) + u64(kv_head)) * u64(rows_per_job) + u64(row)
                step = u64(num_kv_heads) * u64(rows_per_job)
                row_max = MINUS_INFINITY
                total = f32(0)
                for c in range(COLUMNS):
                    o_rmem[c] = f32(0)
                for begin in range(0, num_parts, UNROLL):
                    for i in range(UNROLL):
                        lse2_rmem[i] = MINUS_INFINITY
                        if begin + i < num_parts:
                            part = first + u64(begin + i) * step
                            lse2_rmem[i] = ptx.ld_global_f32(lse2_partial + part * u64(4))
                            ptx.ld_global_v4_f32(v_rmem, i * COLUMNS, o_partial + (part * u64(HEAD_DIM_V) + u64(thread * u32(COLUMNS))) * u64(4))
                    new_max = row_max
                    for i in range(UNROLL):
                        new_max = max(new_max, lse2_rmem[i])
                    if new_max > MINUS_INFINITY:
                        scale = ptx.ex2(row_max - new_max)
                        total *= scale
                        for c in range(COLUMNS):
                            o_rmem[c] *= scale
                        for i in range(UNROLL):
                            if lse2_rmem[i] > MINUS_INFINITY:
                                weight = ptx.ex2(lse2_rmem[i] - new_max)
                                total += weight
                                for c in range(COLUMNS):
                                    o_rmem[c] += weight * v_rmem[i * COLUMNS + c]
                        row_max = new_max
                factor = f32(0)
                natural = empty_lse
                if total > f32(0):
                    factor = f32(1) / total
                    natural = (row_max + math.log2(total)) * f32(LN_2)
                q_batch, token = jobs[job * JOB_COLUMNS + JOB_Q_BATCH], jobs[job * JOB_COLUMNS + JOB_Q_BEGIN] + job_row // heads_per_kv
                head = kv_head * heads_per_kv + job_row % heads_per_kv
                address = out + u64(q_batch * out_batch_stride + token * out_token_stride + head * out_head_stride) + u64(thread * u32(2 * COLUMNS))
                ptx.st_global_b32(address, to_pair(o_rmem[1] * factor, o_rmem[0] * factor))
                ptx.st_global_b32(address + u64(4), to_pair(o_rmem[3] * factor, o_rmem[2] * factor))
                if thread == 0:
                    ptx.st_global_f32(lse + u64(q_batch * lse_batch_stride + head * lse_head_stride + token * lse_token_stride), natural)

    return hopper_merge
