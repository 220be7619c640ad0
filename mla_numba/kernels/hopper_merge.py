"""Merge of the partial results that `hopper_decode` leaves of jobs in three pieces or more.

    m = max lse2_i        O = sum 2^(lse2_i - m) O_i / sum 2^(lse2_i - m)        lse2 = m + log2 of that sum

Partial O lies as the tensor core left it in the registers of the decode's warps: of each (slot, KV head, row tile, warp) 32 strips of
512 bytes, strip i the columns 8 i to 8 i + 7 of 16 rows; a lane has 16 bytes of a strip:

    lane l of strip i: rows l / 4 and l / 4 + 8, columns 8 i + 2 (l % 4) and the next, of each

A thread block of 8 warps merges strips of 8 x 8 columns, or its share of them: the more parts, the more blocks share (the table says):

    shares   strips of a block   warps of a strip   parts of a warp
    1        8                   1                  all, up to 8 at once
    2        4                   2                  every 2nd
    4        2                   4                  every 4th
    8        1                   8                  every 8th: 8 of 64

and where a strip has several warps, the first adds up what they found. What decides the order of a sum is the job's number of parts
alone. A grid of fixed size walks the list (row of the merge table, KV head, 16 rows, half of O, 8 strips), so that nobody needs to look at
the lengths. It is launched programmatically: its blocks come onto the machine as the decode's leave, and read the list before they wait.
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
    MERGE_MAX_SHARES,
    MERGE_NUM_PARTS,
    MERGE_NUM_SHARES,
    MERGE_Q_BATCH,
    MERGE_Q_BEGIN,
    MERGE_Q_LEN,
    MERGE_ROW_BEGIN,
    MERGE_SHARE,
    TOTAL_MERGES,
)
from .hopper_config import BLOCK_M, MINUS_INFINITY, NEXT_ROW, NUM_WARPS, STRIP_BYTES, STRIPS, WARP_PART_BYTES, Partials, Results

i64, u32, u64, f32 = np.int64, np.uint32, np.uint64, np.float32

MERGE_WARPS = MERGE_MAX_SHARES
NUM_THREADS = 32 * MERGE_WARPS
# 16 rows by 8 strips, or a share of them, are an item of the list.
ITEM_ROWS = 16
ITEMS_PER_HALF = STRIPS // MERGE_WARPS
# Parts that a warp loads at a time: their latencies overlap.
UNROLL = 8
BATCH, BATCH_ROWS = UNROLL * 4, UNROLL * 2
# What a lane hands to the first warp of its strip: lse2 and sum of two rows, four columns of O.
STATE_FLOATS = 8
STATES_SMEM = MERGE_WARPS * 32 * STATE_FLOATS

# A row of the merge table.
Job = namedtuple("Job", "num_parts first_slot q_batch q_begin num_rows row_begin share num_shares")
# What a launch has in common.
Shape = namedtuple("Shape", "row_tiles row_groups num_kv_heads heads_per_kv")


def merge_signature() -> types.Type:
    """Types of the kernel's arguments, in the order of `hopper_merge`'s."""
    table, i, stride, address = types.CPointer(types.int32), types.int32, types.int64, types.uint64
    return types.void(table, table, address, address, address, stride, stride, stride, address, stride, stride, stride, i, i, i, i,
                      types.float32)


@cache
def make_merge_kernel(dtype: str) -> Callable[..., None]:
    """The kernel, not yet compiled. Any grid of one dimension, NUM_THREADS threads. `row_groups` are the 16 rows of a job that may be in
    use, of 4 * `row_tiles`."""
    to_pair = ptx.cvt_bf16x2 if dtype == "bfloat16" else ptx.cvt_f16x2
    inline = cuda.jit(device=True, forceinline=True)

    @inline
    def read_job(merges, row, heads_per_kv):
        at = u32(row * u32(MERGE_COLUMNS))
        return Job(u32(merges[at + MERGE_NUM_PARTS]), u32(merges[at + MERGE_FIRST_SLOT]), merges[at + MERGE_Q_BATCH],
                   merges[at + MERGE_Q_BEGIN], u32(u32(merges[at + MERGE_Q_LEN]) * heads_per_kv), u32(merges[at + MERGE_ROW_BEGIN]),
                   u32(merges[at + MERGE_SHARE]), u32(merges[at + MERGE_NUM_SHARES]))

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
    def merge_parts(state_rmem, o_address, lse2_address, o_step, lse2_step, part, num_parts, stride):
        """Parts part, part + stride, ... in order; the addresses are the first one's, the steps those to the next one."""
        v_rmem, lse2_rmem = cuda.local.array(BATCH, types.float32), cuda.local.array(BATCH_ROWS, types.float32)
        for r in range(2):
            state_rmem[r] = MINUS_INFINITY
        for i in range(2, STATE_FLOATS):
            state_rmem[i] = f32(0)
        while part < num_parts:
            for i in range(UNROLL):
                lse2_rmem[2 * i], lse2_rmem[2 * i + 1] = MINUS_INFINITY, MINUS_INFINITY
                for c in range(4):
                    v_rmem[4 * i + c] = f32(0)
                if part < num_parts:
                    lse2_rmem[2 * i] = ptx.ld_global_f32(lse2_address)
                    lse2_rmem[2 * i + 1] = ptx.ld_global_f32(lse2_address + u64(NEXT_ROW))
                    ptx.ld_global_v4_f32(v_rmem, 4 * i, o_address)
                part, o_address, lse2_address = u32(part + stride), o_address + o_step, lse2_address + lse2_step
            add_batch(state_rmem, lse2_rmem, v_rmem, UNROLL)

    @inline
    def add_warps(state_rmem, states_smem, first_warp, num_warps, lane):
        """The states of a strip's warps, in order."""
        sums_rmem = cuda.local.array(2, types.float32)
        for r in range(2):
            largest = MINUS_INFINITY
            for w in range(num_warps):
                largest = max(largest, states_smem[((first_warp + w) * STATE_FLOATS + r) * 32 + lane])
            state_rmem[r], sums_rmem[r] = largest, f32(0)
            state_rmem[4 + 2 * r], state_rmem[5 + 2 * r] = f32(0), f32(0)
            if largest > MINUS_INFINITY:
                for w in range(num_warps):
                    state = (first_warp + w) * STATE_FLOATS * 32 + lane
                    scale = ptx.ex2(states_smem[state + r * 32] - largest)
                    sums_rmem[r] += scale * states_smem[state + (2 + r) * 32]
                    state_rmem[4 + 2 * r] += scale * states_smem[state + (4 + 2 * r) * 32]
                    state_rmem[5 + 2 * r] += scale * states_smem[state + (5 + 2 * r) * 32]
            state_rmem[2 + r] = sums_rmem[r]

    @inline
    def store_state(state_rmem, job, first_row, kv_head, half, strip, lane, heads_per_kv, results):
        """Results of this lane's two rows."""
        column_bytes = half * u32(HEAD_DIM_V) + strip * u32(16) + (lane & u32(3)) * u32(4)
        for r in range(2):
            row = u32(first_row + (lane >> u32(2)) + u32(8 * r))
            if row < job.num_rows:
                token, head = i64(job.q_begin) + i64(row // heads_per_kv), i64(kv_head * heads_per_kv + row % heads_per_kv)
                total = state_rmem[2 + r]
                factor = f32(1) / total if total > f32(0) else f32(0)
                address = results.out + u64(job.q_batch * results.out_batch_stride + token * results.out_token_stride
                                            + head * results.out_head_stride)
                ptx.st_global_b32(address + u64(column_bytes), to_pair(state_rmem[5 + 2 * r] * factor, state_rmem[4 + 2 * r] * factor))
                if column_bytes == 0:
                    ptx.st_global_f32(results.lse + u64(job.q_batch * results.lse_batch_stride + head * results.lse_head_stride
                                                        + token * results.lse_token_stride),
                                      (state_rmem[r] + math.log2(total)) * f32(LN_2) if total > f32(0) else results.empty_lse)

    @inline
    def merge_item(state_rmem, states_smem, job, place, warp, lane, shape, partials, results):
        """Item `place` of a row of the table: 8 strips of 16 rows, or this share of them."""
        group, half, rest = place % u32(ITEMS_PER_HALF), place // u32(ITEMS_PER_HALF) % u32(2), place // u32(2 * ITEMS_PER_HALF)
        row_group, kv_head = u32(u32(rest) % shape.row_groups), u32(u32(rest) // shape.row_groups)
        first_row = u32(job.row_begin + row_group * u32(ITEM_ROWS))
        if first_row < job.num_rows:
            # The warps from first_warp on have one strip, of every so many-th part each; a block's strips lie so far apart, too.
            first_part = u32(warp & (job.num_shares - u32(1)))
            first_warp = u32(warp - first_part)
            strip = u32(group * u32(MERGE_WARPS) + first_warp + job.share)
            # Slots are (slot, KV head, row tile) of O, 8 warps' parts, and of lse2, twice 64 rows.
            tile, part_warp = row_group // u32(NUM_WARPS // 2), half * u32(NUM_WARPS // 2) + row_group % u32(NUM_WARPS // 2)
            step = u32(shape.num_kv_heads * shape.row_tiles)
            slot = u64((job.first_slot + first_part) * step + kv_head * shape.row_tiles + tile)
            o_part = partials.o + (slot * u64(NUM_WARPS) + u64(part_warp)) * u64(WARP_PART_BYTES) + u64(strip * u32(STRIP_BYTES)
                                                                                                       + lane * u32(16))
            lse2_part = partials.lse2 + (slot * u64(2 * BLOCK_M) + u64(part_warp * u32(ITEM_ROWS) + (lane >> u32(2)))) * u64(4)
            stride = u64(job.num_shares * step)
            merge_parts(state_rmem, o_part, lse2_part, stride * u64(NUM_WARPS * WARP_PART_BYTES), stride * u64(2 * BLOCK_M * 4), first_part,
                        job.num_parts, job.num_shares)
            if job.num_shares > 1:
                for i in range(STATE_FLOATS):
                    states_smem[(warp * STATE_FLOATS + i) * 32 + lane] = state_rmem[i]
                # All warps: their states are there. (All of a block come here together: what decides it is the same for all.)
                cuda.syncthreads()
                if first_part == 0:
                    add_warps(state_rmem, states_smem, first_warp, job.num_shares, lane)
                # All warps: the states have been read.
                cuda.syncthreads()
            if first_part == 0:
                store_state(state_rmem, job, first_row, kv_head, half, strip, lane, shape.heads_per_kv, results)

    def hopper_merge(merges, totals, o_partial, lse2_partial, out, out_batch_stride, out_token_stride, out_head_stride, lse,
                     lse_batch_stride, lse_head_stride, lse_token_stride, row_tiles, row_groups, num_kv_heads, heads_per_kv, empty_lse):
        partials, shape = Partials(o_partial, lse2_partial, u64(0)), Shape(u32(row_tiles), u32(row_groups), u32(num_kv_heads),
                                                                                u32(heads_per_kv))
        results = Results(out, out_batch_stride, out_token_stride, out_head_stride, lse, lse_batch_stride, lse_head_stride,
                          lse_token_stride, empty_lse)
        states_smem = cuda.shared.array(STATES_SMEM, types.float32)
        warp, lane = u32(cuda.threadIdx.x) >> u32(5), u32(cuda.threadIdx.x) & u32(31)
        state_rmem = cuda.local.array(STATE_FLOATS, types.float32)
        items_per_row = u32(shape.num_kv_heads * shape.row_groups * u32(2 * ITEMS_PER_HALF))
        num_items, item = u32(u32(totals[TOTAL_MERGES]) * items_per_row), u32(cuda.blockIdx.x)
        # Some row, where there is none: it is not used.
        job = read_job(merges, u32(item // items_per_row) if item < num_items else u32(0), shape.heads_per_kv)
        # The decode has ended, and its partial results are visible; the tables above are older. Also where there is nothing to do: a grid
        # that ends without having waited lets the next one start before the decode has ended.
        ptx.griddepcontrol_wait()
        while item < num_items:
            place = u32(item % items_per_row)
            item = u32(item + u32(cuda.gridDim.x))
            merge_item(state_rmem, states_smem, job, place, warp, lane, shape, partials, results)
            if item < num_items:
                job = read_job(merges, u32(item // items_per_row), shape.heads_per_kv)

    return hopper_merge
