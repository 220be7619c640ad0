"""Merge of the partial results that `hopper_decode` leaves of jobs in three pieces or more.

    m = max lse2_i        O = sum 2^(lse2_i - m) O_i / sum 2^(lse2_i - m)        lse2 = m + log2 of that sum

Partial O lies as the tensor core left it in the registers of the decode's warps: of each (slot, KV head, row tile, warp) 32 strips of
512 bytes, strip i the columns 8 i to 8 i + 7 of 16 rows. A thread block here merges one strip of one job: its 8 warps share the
parts out (part i to warp i % 8), a lane has 16 bytes of each, and the first warp adds up what the 8 found, in order.

    lane l of strip i: rows l / 4 and l / 4 + 8, columns 8 i + 2 (l % 4) and the next, of each

The work is a flat list, jobs x strips, that a grid of fixed size walks, so that nobody needs to look at the lengths. It is launched
programmatically: where there is room its blocks wait on the machine for the decode's end, the list's first row in hand.
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
    MERGE_COLUMNS,
    MERGE_FIRST_SLOT,
    MERGE_NUM_PARTS,
    MERGE_Q_BATCH,
    MERGE_Q_BEGIN,
    MERGE_Q_LEN,
    MERGE_ROW_BEGIN,
    TOTAL_MERGES,
)
from .hopper_decode import BLOCK_M, MINUS_INFINITY, NUM_WARPS, WARP_PART_BYTES

i32, u32, u64, f32 = np.int32, np.uint32, np.uint64, np.float32

MERGE_WARPS = 8
NUM_THREADS = 32 * MERGE_WARPS
STRIP_BYTES = 512
STRIPS = WARP_PART_BYTES // STRIP_BYTES
# Parts that a warp loads at a time: their latencies overlap.
UNROLL = 4
BATCH, BATCH_ROWS = UNROLL * 4, UNROLL * 2
# What a lane hands to the first warp: lse2 and sum of two rows, four columns of O.
STATE_FLOATS = 8
STATES_SMEM = MERGE_WARPS * 32 * STATE_FLOATS


def merge_signature() -> types.Type:
    """Types of the kernel's arguments, in the order of `hopper_merge`'s."""
    table, i, stride, address = types.CPointer(types.int32), types.int32, types.int64, types.uint64
    return types.void(table, table, address, address, address, stride, stride, stride, address, stride, stride, stride, i, i, i, types.float32)


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
    def merge_parts(state_rmem, o_address, lse2_address, o_step, lse2_step, num_parts, warp):
        """This warp's share of the parts."""
        v_rmem, lse2_rmem = cuda.local.array(BATCH, types.float32), cuda.local.array(BATCH_ROWS, types.float32)
        for r in range(2):
            state_rmem[r] = MINUS_INFINITY
        for i in range(2, STATE_FLOATS):
            state_rmem[i] = f32(0)
        for begin in range(warp, num_parts, MERGE_WARPS * UNROLL):
            for i in range(UNROLL):
                part = begin + i * MERGE_WARPS
                lse2_rmem[2 * i], lse2_rmem[2 * i + 1] = MINUS_INFINITY, MINUS_INFINITY
                for c in range(4):
                    v_rmem[4 * i + c] = f32(0)
                if part < num_parts:
                    lse2_rmem[2 * i] = ptx.ld_global_f32(lse2_address + u64(part) * lse2_step)
                    lse2_rmem[2 * i + 1] = ptx.ld_global_f32(lse2_address + u64(part) * lse2_step + u64(32))
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
                state_rmem[r] = largest + math.log2(sums_rmem[r])
                state_rmem[4 + 2 * r] /= sums_rmem[r]
                state_rmem[5 + 2 * r] /= sums_rmem[r]

    def hopper_merge(merges, totals, o_partial, lse2_partial, out, out_batch_stride, out_token_stride, out_head_stride, lse,
                     lse_batch_stride, lse_head_stride, lse_token_stride, row_tiles, num_kv_heads, heads_per_kv, empty_lse):
        states_smem = cuda.shared.array(STATES_SMEM, types.float32)
        warp, lane = i32(cuda.threadIdx.x) >> 5, i32(cuda.threadIdx.x) & 31
        state_rmem = cuda.local.array(STATE_FLOATS, types.float32)
        items_per_job = num_kv_heads * row_tiles * NUM_WARPS * STRIPS
        num_items = totals[TOTAL_MERGES] * items_per_job
        for item in range(i32(cuda.blockIdx.x), num_items, i32(cuda.gridDim.x)):
            merge, rest = item // items_per_job * MERGE_COLUMNS, item % items_per_job
            num_parts, first_slot = merges[merge + MERGE_NUM_PARTS], merges[merge + MERGE_FIRST_SLOT]
            q_batch, q_begin = merges[merge + MERGE_Q_BATCH], merges[merge + MERGE_Q_BEGIN]
            num_rows, row_begin = merges[merge + MERGE_Q_LEN] * heads_per_kv, merges[merge + MERGE_ROW_BEGIN]
            strip, rest = rest % STRIPS, rest // STRIPS
            part_warp, rest = rest % NUM_WARPS, rest // NUM_WARPS
            tile, kv_head = rest % row_tiles, rest // row_tiles
            wg, tile_row = part_warp >> 2, (part_warp & 3) * 16 + (lane >> 2)
            part = (u64(first_slot) * u64(num_kv_heads) + u64(kv_head)) * u64(row_tiles) + u64(tile)
            step = u64(num_kv_heads * row_tiles)
            row = row_begin + tile * BLOCK_M + tile_row
            # The decode has ended, and its partial results are visible; the tables above are older.
            ptx.griddepcontrol_wait()
            if row - (lane >> 2) < num_rows:
                merge_parts(state_rmem, o_partial + (part * u64(NUM_WARPS) + u64(part_warp)) * u64(WARP_PART_BYTES)
                            + u64(strip * STRIP_BYTES + lane * 16),
                            lse2_partial + ((part * u64(2) + u64(wg)) * u64(BLOCK_M) + u64(tile_row)) * u64(4),
                            step * u64(NUM_WARPS * WARP_PART_BYTES), step * u64(2 * BLOCK_M * 4), num_parts, warp)
                for i in range(STATE_FLOATS):
                    states_smem[(warp * STATE_FLOATS + i) * 32 + lane] = state_rmem[i]
                # All warps: their states are there. (The rows, and so the way here, are the same for all of the block.)
                cuda.syncthreads()
                if warp == 0:
                    add_warps(state_rmem, states_smem, lane)
                    for r in range(2):
                        if row + 8 * r < num_rows:
                            token, head = q_begin + (row + 8 * r) // heads_per_kv, kv_head * heads_per_kv + (row + 8 * r) % heads_per_kv
                            address = out + u64(q_batch * out_batch_stride + token * out_token_stride + head * out_head_stride)
                            ptx.st_global_b32(address + u64(wg * HEAD_DIM_V + strip * 16 + (lane & 3) * 4),
                                              to_pair(state_rmem[5 + 2 * r], state_rmem[4 + 2 * r]))
                            if wg == 0 and strip == 0 and lane & 3 == 0:
                                ptx.st_global_f32(lse + u64(q_batch * lse_batch_stride + head * lse_head_stride + token * lse_token_stride),
                                                  state_rmem[r] * f32(LN_2) if state_rmem[r] > MINUS_INFINITY else empty_lse)
                # All warps: the states have been read.
                cuda.syncthreads()

    return hopper_merge
