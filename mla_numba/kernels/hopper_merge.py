"""Merge of the partial results that `hopper_decode` leaves of jobs in three pieces or more.

    m = max lse2_i        O = sum 2^(lse2_i - m) O_i / sum 2^(lse2_i - m)        lse2 = m + log2 of that sum

Partial O lies as the tensor core left it in the registers of the decode's warps: of each (slot, KV head, row tile, warp) 32 strips of
512 bytes, strip i the columns 8 i to 8 i + 7 of 16 rows; a lane has 16 bytes of a strip:

    lane l of strip i: rows l / 4 and l / 4 + 8, columns 8 i + 2 (l % 4) and the next, of each

    up to FEW_PARTS parts    a warp merges a strip, a thread block of 8 warps 8 strips
    more                     a thread block merges a strip: part i goes to warp i % 8, the first warp adds up what the 8 found

The work is a flat list, jobs x strips, that a grid of fixed size walks, so that nobody needs to look at the lengths; of a job in few
parts every eighth item is taken by all of a block, the others by none. It is launched programmatically: where there is room its
blocks wait on the machine for the decode's end, the list's first row in hand.
"""

import math
from collections import namedtuple
from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from .. import ptx
from ..contract import HEAD_DIM_V, LN_2
from ..scheduler import (
    MERGE_COLUMNS,
    MERGE_FIRST_SLOT,
    MERGE_NUM_PARTS,
    MERGE_Q_BATCH,
    MERGE_Q_BEGIN,
    MERGE_Q_LEN,
    MERGE_ROW_BEGIN,
    TOTAL_MERGES,
)
from .hopper_config import BLOCK_M, MINUS_INFINITY, NEXT_ROW, NUM_WARPS, STRIP_BYTES, STRIPS, WARP_PART_BYTES, Partials, Results

i32, u32, u64, f32 = np.int32, np.uint32, np.uint64, np.float32

MERGE_WARPS = 8
NUM_THREADS = 32 * MERGE_WARPS
FEW_PARTS = 16
# Parts that a warp loads at a time: their latencies overlap.
UNROLL = 4
BATCH, BATCH_ROWS = UNROLL * 4, UNROLL * 2
# What a lane hands to the first warp: lse2 and sum of two rows, four columns of O.
STATE_FLOATS = 8
STATES_SMEM = MERGE_WARPS * 32 * STATE_FLOATS

# A job, and the part of it that a block merges: the first of its rows of this lane, whose columns, of which KV head.
Job = namedtuple("Job", "num_parts first_slot q_batch q_begin num_rows")
Place = namedtuple("Place", "row kv_head part_warp strip lane")


def merge_signature() -> types.Type:
    """Types of the kernel's arguments, in the order of `hopper_merge`'s."""
    table, i, stride, address = types.CPointer(types.int32), types.int32, types.int64, types.uint64
    return types.void(table, table, address, address, address, stride, stride, stride, address, stride, stride, stride, i, i, i,
                      types.float32)


@cache
def make_merge_kernel(dtype: str) -> Callable[..., None]:
    """The kernel, not yet compiled. Any grid of one dimension, NUM_THREADS threads."""
    to_pair = ptx.cvt_bf16x2 if dtype == "bfloat16" else ptx.cvt_f16x2
    inline = cuda.jit(device=True, forceinline=True)

    @inline
    def add_batch(state_rmem, lse2_rmem, v_rmem, count):
        """Take `count` parts into the running state: lse2 (0, 1: the maximum), sums (2, 3), O (4 to 7)."""
        for r in range(2):
            largest = state_rmem[r]
            for i in range(count):
                largest = max(largest, lse2_rmem[2 * i + r])
            if largest > MINUS_INFINITY:
                scale = ptx.ex2(state_rmem[r] - largest)
                state_rmem[r] = largest
                state_rmem[2 + r] *= scale
                state_rmem[4 + 2 * r] *= scale
                state_rmem[5 + 2 * r] *= scale
                for i in range(count):
                    weight = ptx.ex2(lse2_rmem[2 * i + r] - largest)
                    state_rmem[2 + r] += weight
                    state_rmem[4 + 2 * r] += weight * v_rmem[4 * i + 2 * r]
                    state_rmem[5 + 2 * r] += weight * v_rmem[4 * i + 2 * r + 1]

    @inline
    def merge_parts(state_rmem, o_address, lse2_address, o_step, lse2_step, first, num_parts, stride):
        """Parts first, first + stride, ... in order."""
        v_rmem, lse2_rmem = cuda.local.array(BATCH, types.float32), cuda.local.array(BATCH_ROWS, types.float32)
        for r in range(2):
            state_rmem[r] = MINUS_INFINITY
        for i in range(2, STATE_FLOATS):
            state_rmem[i] = f32(0)
        for begin in range(first, num_parts, stride * UNROLL):
            for i in range(UNROLL):
                part = begin + i * stride
                lse2_rmem[2 * i], lse2_rmem[2 * i + 1] = MINUS_INFINITY, MINUS_INFINITY
                for c in range(4):
                    v_rmem[4 * i + c] = f32(0)
                if part < num_parts:
                    lse2_rmem[2 * i] = ptx.ld_global_f32(lse2_address + u64(part) * lse2_step)
                    lse2_rmem[2 * i + 1] = ptx.ld_global_f32(lse2_address + u64(part) * lse2_step + u64(NEXT_ROW))
                    ptx.ld_global_v4_f32(v_rmem, 4 * i, o_address + u64(part) * o_step)
            add_batch(state_rmem, lse2_rmem, v_rmem, UNROLL)

    @inline
    def add_warps(state_rmem, states_smem, lane):
        """The states of all warps, in order."""
        sums_rmem = cuda.local.array(2, types.float32)
        for r in range(2):
            largest = MINUS_INFINITY
            for w in range(MERGE_WARPS):
                largest = max(largest, states_smem[(w * STATE_FLOATS + r) * 32 + lane])
            state_rmem[r], sums_rmem[r] = largest, f32(0)
            state_rmem[4 + 2 * r], state_rmem[5 + 2 * r] = f32(0), f32(0)
            if largest > MINUS_INFINITY:
                for w in range(MERGE_WARPS):
                    scale = ptx.ex2(states_smem[(w * STATE_FLOATS + r) * 32 + lane] - largest)
                    sums_rmem[r] += scale * states_smem[(w * STATE_FLOATS + 2 + r) * 32 + lane]
                    state_rmem[4 + 2 * r] += scale * states_smem[(w * STATE_FLOATS + 4 + 2 * r) * 32 + lane]
                    state_rmem[5 + 2 * r] += scale * states_smem[(w * STATE_FLOATS + 5 + 2 * r) * 32 + lane]
            state_rmem[2 + r] = sums_rmem[r]

    @inline
    def store_state(state_rmem, job, at, heads_per_kv, results):
        """Results of this lane's two rows."""
        is_left = at.part_warp < NUM_WARPS // 2
        column_bytes = (0 if is_left else HEAD_DIM_V) + at.strip * 16 + (at.lane & 3) * 4
        for r in range(2):
            row = at.row + 8 * r
            if row < job.num_rows:
                token, head = job.q_begin + row // heads_per_kv, at.kv_head * heads_per_kv + row % heads_per_kv
                total = state_rmem[2 + r]
                factor = f32(1) / total if total > f32(0) else f32(0)
                address = results.out + u64(job.q_batch * results.out_batch_stride + token * results.out_token_stride
                                            + head * results.out_head_stride)
                ptx.st_global_b32(address + u64(column_bytes), to_pair(state_rmem[5 + 2 * r] * factor, state_rmem[4 + 2 * r] * factor))
                if is_left and at.strip == 0 and at.lane & 3 == 0:
                    ptx.st_global_f32(results.lse + u64(job.q_batch * results.lse_batch_stride + head * results.lse_head_stride
                                                        + token * results.lse_token_stride),
                                      (state_rmem[r] + math.log2(total)) * f32(LN_2) if total > f32(0) else results.empty_lse)

    @inline
    def read_job(merges, merge, heads_per_kv):
        return Job(merges[merge + MERGE_NUM_PARTS], merges[merge + MERGE_FIRST_SLOT], merges[merge + MERGE_Q_BATCH],
                   merges[merge + MERGE_Q_BEGIN], merges[merge + MERGE_Q_LEN] * heads_per_kv), merges[merge + MERGE_ROW_BEGIN]

    def hopper_merge(merges, totals, o_partial, lse2_partial, out, out_batch_stride, out_token_stride, out_head_stride, lse,
                     lse_batch_stride, lse_head_stride, lse_token_stride, row_tiles, num_kv_heads, heads_per_kv, empty_lse):
        partials = Partials(o_partial, lse2_partial, u64(0))
        results = Results(out, out_batch_stride, out_token_stride, out_head_stride, lse, lse_batch_stride, lse_head_stride,
                          lse_token_stride, empty_lse)
        states_smem = cuda.shared.array(STATES_SMEM, types.float32)
        warp, lane = i32(cuda.threadIdx.x) >> 5, i32(cuda.threadIdx.x) & 31
        state_rmem = cuda.local.array(STATE_FLOATS, types.float32)
        items_per_job = num_kv_heads * row_tiles * NUM_WARPS * STRIPS
        num_items = totals[TOTAL_MERGES] * items_per_job
        for item in range(i32(cuda.blockIdx.x), num_items, i32(cuda.gridDim.x)):
            job, row_begin = read_job(merges, item // items_per_job * MERGE_COLUMNS, heads_per_kv)
            # Of a job the first eighth of the items are those that blocks take together where there are few parts.
            is_few = job.num_parts <= FEW_PARTS
            rest = item % items_per_job
            group, rest = rest % (STRIPS // MERGE_WARPS), rest // (STRIPS // MERGE_WARPS)
            part_warp, rest = rest % NUM_WARPS, rest // NUM_WARPS
            tile, rest = rest % row_tiles, rest // row_tiles
            kv_head, member = rest % num_kv_heads, rest // num_kv_heads
            first_row = row_begin + tile * BLOCK_M + (part_warp & 3) * 16
            # The decode has ended, and its partial results are visible; the tables above are older.
            ptx.griddepcontrol_wait()
            if first_row < job.num_rows and (member == 0 or not is_few):
                strip, first, stride = group * MERGE_WARPS + member, warp, MERGE_WARPS
                if is_few:
                    strip, first, stride = group * MERGE_WARPS + warp, 0, 1
                # Slots are (slot, KV head, row tile) of O, 8 warps' parts, and of lse2, twice 64 rows.
                step = u64(num_kv_heads * row_tiles)
                part = u64(job.first_slot) * step + u64(kv_head) * u64(row_tiles) + u64(tile)
                o_part = partials.o + (part * u64(NUM_WARPS) + u64(part_warp)) * u64(WARP_PART_BYTES) + u64(strip * STRIP_BYTES + lane * 16)
                lse2_part = partials.lse2 + (part * u64(2 * BLOCK_M) + u64(part_warp * 16 + (lane >> 2))) * u64(4)
                merge_parts(state_rmem, o_part, lse2_part, step * u64(NUM_WARPS * WARP_PART_BYTES), step * u64(2 * BLOCK_M * 4), first,
                            job.num_parts, stride)
                if not is_few:
                    for i in range(STATE_FLOATS):
                        states_smem[(warp * STATE_FLOATS + i) * 32 + lane] = state_rmem[i]
                    # All warps: their states are there. (All of a block come here together: what decides it is the same for all.)
                    cuda.syncthreads()
                    if warp == 0:
                        add_warps(state_rmem, states_smem, lane)
                    # All warps: the states have been read.
                    cuda.syncthreads()
                if is_few or warp == 0:
                    store_state(state_rmem, job, Place(first_row + (lane >> 2), kv_head, part_warp, strip, lane), heads_per_kv, results)
        # Also where there was nothing to do: a grid that ends without having waited lets the next one start before the decode has ended.
        ptx.griddepcontrol_wait()

    return hopper_merge
