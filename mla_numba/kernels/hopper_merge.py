"""Merge of the partial results that `hopper_decode` leaves of split jobs.

    m = max lse2_i        O = sum 2^(lse2_i - m) O_i / sum 2^(lse2_i - m)        lse2 = m + log2 of that sum        in the order of i

Partial O lies as the tensor core left it in the registers of the decode's warps: of each (slot, KV head, row tile, warp) 32 strips of
512 bytes, strip i the columns 8 i to 8 i + 7 of 16 rows. A warp here merges one strip of one job, a lane its 16 bytes:

    lane l of strip i: rows l / 4 and l / 4 + 8, columns 8 i + 2 (l % 4) and the next, of each

The work is a flat list, split jobs x strips, that a grid of fixed size walks, so that nobody needs to look at the lengths. It is
launched programmatically: where there is room its blocks wait on the machine for the decode's end, the list's first row in hand.
UNROLL parts are loaded at a time: their latencies overlap.
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

NUM_THREADS = 128
STRIP_BYTES = 512
STRIPS = WARP_PART_BYTES // STRIP_BYTES                 # of a warp's part: 32
ITEMS_PER_WARP_PART = STRIPS * 32 // NUM_THREADS        # a thread block takes four strips
UNROLL = 4
BATCH, BATCH_ROWS = UNROLL * 4, UNROLL * 2


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
    def merge_strip(o_rmem, lse2_rmem, o_address, lse2_address, part_bytes, part_rows, num_parts):
        """O and lse2 of this lane's two rows over all parts; O is divided already."""
        v_rmem, part_lse2_rmem = cuda.local.array(BATCH, types.float32), cuda.local.array(BATCH_ROWS, types.float32)
        sums_rmem = cuda.local.array(2, types.float32)
        for r in range(2):
            lse2_rmem[r], sums_rmem[r] = MINUS_INFINITY, f32(0)
        for c in range(4):
            o_rmem[c] = f32(0)
        for begin in range(0, num_parts, UNROLL):
            for i in range(UNROLL):
                part_lse2_rmem[2 * i], part_lse2_rmem[2 * i + 1] = MINUS_INFINITY, MINUS_INFINITY
                if begin + i < num_parts:
                    rows = lse2_address + u64(begin + i) * part_rows
                    part_lse2_rmem[2 * i], part_lse2_rmem[2 * i + 1] = ptx.ld_global_f32(rows), ptx.ld_global_f32(rows + u64(32))
                    ptx.ld_global_v4_f32(v_rmem, 4 * i, o_address + u64(begin + i) * part_bytes)
            for r in range(2):
                largest = lse2_rmem[r]
                for i in range(UNROLL):
                    largest = max(largest, part_lse2_rmem[2 * i + r])
                if largest > MINUS_INFINITY:
                    scale = ptx.ex2(lse2_rmem[r] - largest)
                    lse2_rmem[r] = largest
                    sums_rmem[r] *= scale
                    o_rmem[2 * r] *= scale
                    o_rmem[2 * r + 1] *= scale
                    for i in range(UNROLL):
                        if part_lse2_rmem[2 * i + r] > MINUS_INFINITY:
                            weight = ptx.ex2(part_lse2_rmem[2 * i + r] - largest)
                            sums_rmem[r] += weight
                            o_rmem[2 * r] += weight * v_rmem[4 * i + 2 * r]
                            o_rmem[2 * r + 1] += weight * v_rmem[4 * i + 2 * r + 1]
        for r in range(2):
            if sums_rmem[r] > f32(0):
                lse2_rmem[r] += math.log2(sums_rmem[r])
                o_rmem[2 * r] /= sums_rmem[r]
                o_rmem[2 * r + 1] /= sums_rmem[r]

    def hopper_merge(merges, totals, o_partial, lse2_partial, out, out_batch_stride, out_token_stride, out_head_stride, lse,
                     lse_batch_stride, lse_head_stride, lse_token_stride, row_tiles, num_kv_heads, heads_per_kv, empty_lse):
        warp, lane = i32(cuda.threadIdx.x) >> 5, i32(cuda.threadIdx.x) & 31
        o_rmem, lse2_rmem = cuda.local.array(4, types.float32), cuda.local.array(2, types.float32)
        items_per_job = num_kv_heads * row_tiles * NUM_WARPS * ITEMS_PER_WARP_PART
        num_items = totals[TOTAL_MERGES] * items_per_job
        for item in range(i32(cuda.blockIdx.x), num_items, i32(cuda.gridDim.x)):
            merge, rest = item // items_per_job * MERGE_COLUMNS, item % items_per_job
            num_parts, first_slot = merges[merge + MERGE_NUM_PARTS], merges[merge + MERGE_FIRST_SLOT]
            q_batch, q_begin = merges[merge + MERGE_Q_BATCH], merges[merge + MERGE_Q_BEGIN]
            num_rows, row_begin = merges[merge + MERGE_Q_LEN] * heads_per_kv, merges[merge + MERGE_ROW_BEGIN]
            strip, rest = rest % ITEMS_PER_WARP_PART * (NUM_THREADS // 32) + warp, rest // ITEMS_PER_WARP_PART
            part_warp, rest = rest % NUM_WARPS, rest // NUM_WARPS
            tile, kv_head = rest % row_tiles, rest // row_tiles
            wg, tile_row = part_warp >> 2, (part_warp & 3) * 16 + (lane >> 2)
            part = (u64(first_slot) * u64(num_kv_heads) + u64(kv_head)) * u64(row_tiles) + u64(tile)
            parts_step = u64(num_kv_heads * row_tiles)
            # The decode has ended, and its partial results are visible; the tables above are older.
            ptx.griddepcontrol_wait()
            row = row_begin + tile * BLOCK_M + tile_row
            if row - (lane >> 2) < num_rows:
                merge_strip(o_rmem, lse2_rmem, o_partial + (part * u64(NUM_WARPS) + u64(part_warp)) * u64(WARP_PART_BYTES)
                            + u64(strip * STRIP_BYTES + lane * 16), lse2_partial + (part * u64(BLOCK_M) + u64(tile_row)) * u64(4),
                            parts_step * u64(NUM_WARPS * WARP_PART_BYTES), parts_step * u64(BLOCK_M * 4), num_parts)
                for r in range(2):
                    if row + 8 * r < num_rows:
                        token, head = q_begin + (row + 8 * r) // heads_per_kv, kv_head * heads_per_kv + (row + 8 * r) % heads_per_kv
                        address = out + u64(q_batch * out_batch_stride + token * out_token_stride + head * out_head_stride)
                        ptx.st_global_b32(address + u64(wg * HEAD_DIM_V + strip * 16 + (lane & 3) * 4), to_pair(o_rmem[2 * r + 1], o_rmem[2 * r]))
                        if wg == 0 and strip == 0 and lane & 3 == 0:
                            ptx.st_global_f32(lse + u64(q_batch * lse_batch_stride + head * lse_head_stride + token * lse_token_stride),
                                              lse2_rmem[r] * f32(LN_2) if lse2_rmem[r] > MINUS_INFINITY else empty_lse)

    return hopper_merge
