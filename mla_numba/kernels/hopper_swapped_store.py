"""The end of a piece of few rows (hopper_swapped): hopper_store's three ways, where every warp has columns of all rows.

Partial O lies as the tensor core left it, of each warp num_rows / 2 strips of 512 bytes: strip (tile, j) has the warp's 16 columns of that
tile of rows 8 j to 8 j + 7; a lane has four floats of it, rows 2 (lane % 4) and the next of column lane / 4, then of the column 8 further.
For hopper_merge strips (tile, j) and (tile + 1, j) are a pair of hopper_part's: first those of tiles 0 and 1, then those of 2 and 3.
Maxima and sums are there once for each warp, row by row: lanes 0 to num_rows - 1 have a row each.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from numba import cuda
from numba.cuda import types

from .. import ptx
from ..scheduler import MERGE_LEAST_PARTS
from .hopper_config import (
    MINUS_INFINITY,
    NUM_WARPS,
    PIECE_FIRST_SLOT,
    PIECE_NUM_PARTS,
    PIECE_Q_LEN,
    PIECE_ROW_BEGIN,
    PIECE_SPLIT,
    STRIP_BYTES,
    SWAPPED_STAGE_SMEM,
    TILE_COLUMNS,
    HopperConfig,
    inline,
)
from .hopper_part import PAIR_BYTES, store_pair, words_4_and_5
from .hopper_store import Part
from .hopper_swapped import row_of

i32, i64, u32, u64, f32 = np.int32, np.int64, np.uint32, np.uint64, np.float32


def make_swapped_store(config: HopperConfig, store: SimpleNamespace) -> tuple[Callable[..., None], ...]:
    """(end_piece, store_piece), for the consumer warps, before and after the sums are exchanged."""
    NUM_ROWS, ROWS, PAIRS, TILE_FLOATS = config.num_rows, config.num_rows // 4, config.num_rows // 8, config.num_rows // 2
    # Results on their way: 16 columns of four tiles.
    STAGE_SMEM, STAGE_ROW_BYTES = SWAPPED_STAGE_SMEM, 4 * 32
    WARP_PART_BYTES, ROW_BYTES = config.warp_part_bytes, 4 * NUM_ROWS
    to_pair = ptx.cvt_bf16x2 if config.dtype == "bfloat16" else ptx.cvt_f16x2
    release_q, claim, announce, await_announced = store.release_q, store.claim, store.announce, store.await_announced
    pair_weights, store_lse, whole_row = store.pair_weights, store.store_lse, store.whole_row

    @inline
    def of_row(value, lane, i):
        """What the lane of this thread's row i has."""
        return cuda.shfl_sync(0xFFFFFFFF, value, i32(row_of(lane, i)))

    @inline
    def add_tile(tile_rmem, other_o, weights_rmem, others_rmem, is_second):
        """A tile's columns of `add_other`."""
        other_rmem = cuda.local.array(TILE_FLOATS, types.float32)
        for j in range(PAIRS):
            ptx.ld_global_v4_f32(other_rmem, 4 * j, other_o + u64(j * STRIP_BYTES))
        for r in range(TILE_FLOATS):
            i = r // 4 * 2 + r % 2
            if is_second:
                tile_rmem[r] = ptx.fma_rn(others_rmem[i], other_rmem[r], ptx.mul_rn(weights_rmem[i], tile_rmem[r]))
            else:
                tile_rmem[r] = ptx.fma_rn(weights_rmem[i], tile_rmem[r], ptx.mul_rn(others_rmem[i], other_rmem[r]))

    @inline
    def store_tile(tile_rmem, o_part):
        """A tile's columns of a piece's O to its slot, for the other one of two pieces, not divided by the sums."""
        for j in range(PAIRS):
            ptx.st_global_v4_f32(o_part + u64(j * STRIP_BYTES), tile_rmem[4 * j], tile_rmem[4 * j + 1], tile_rmem[4 * j + 2],
                                 tile_rmem[4 * j + 3])

    @inline
    def store_packed(tile_rmem, next_rmem, o_part, lane):
        """The same of two tiles for hopper_merge, as hopper_part says."""
        last_words = words_4_and_5(o_part, lane)
        for j in range(PAIRS):
            store_pair(o_part + u64(j * PAIR_BYTES), last_words + u64(j * PAIR_BYTES), tile_rmem, 4 * j, next_rmem, 4 * j)

    @inline
    def stage_tile(tile_rmem, j, place, factors_rmem):
        """This warp's 16 columns of 16 rows of a tile, divided by the sums, row by row to `place`, the lane's."""
        ptx.stmatrix_x4_trans(
            place,
            to_pair(tile_rmem[4 * j + 1] * factors_rmem[2 * j + 1], tile_rmem[4 * j] * factors_rmem[2 * j]),
            to_pair(tile_rmem[4 * j + 3] * factors_rmem[2 * j + 1], tile_rmem[4 * j + 2] * factors_rmem[2 * j]),
            to_pair(tile_rmem[4 * j + 5] * factors_rmem[2 * j + 3], tile_rmem[4 * j + 4] * factors_rmem[2 * j + 2]),
            to_pair(tile_rmem[4 * j + 7] * factors_rmem[2 * j + 3], tile_rmem[4 * j + 6] * factors_rmem[2 * j + 2]))

    @inline
    def add_other(o_rmem, other_o, weight, other_weight, lane, is_second):
        """O = both pieces' weighted sum, the first piece's share rounded last on either side."""
        weights_rmem, others_rmem = cuda.local.array(ROWS, types.float32), cuda.local.array(ROWS, types.float32)
        for i in range(ROWS):
            weights_rmem[i], others_rmem[i] = of_row(weight, lane, i), of_row(other_weight, lane, i)
        add_tile(o_rmem.t0, other_o, weights_rmem, others_rmem, is_second)
        add_tile(o_rmem.t1, other_o + u64(PAIRS * STRIP_BYTES), weights_rmem, others_rmem, is_second)
        add_tile(o_rmem.t2, other_o + u64(2 * PAIRS * STRIP_BYTES), weights_rmem, others_rmem, is_second)
        add_tile(o_rmem.t3, other_o + u64(3 * PAIRS * STRIP_BYTES), weights_rmem, others_rmem, is_second)

    @inline
    def store_results(o_rmem, factor, row_address, base, thread_idx):
        """This warp's 16 columns of each of four tiles, of all rows, through its own part of shared memory, 32 bytes at a time. `factor`
        and `row_address` are of the lane's row."""
        lane, warp = thread_idx & u32(31), thread_idx >> u32(5)
        stage = base + u32(STAGE_SMEM) + warp * u32(NUM_ROWS * STAGE_ROW_BYTES)
        factors_rmem, quad_rmem = cuda.local.array(ROWS, types.float32), cuda.local.array(4, types.uint32)
        for i in range(ROWS):
            factors_rmem[i] = of_row(factor, lane, i)
        # stmatrix as in hopper_swapped's store_p: lane l has the place of row l % 8 of matrix l / 8. The chunks of 16 bytes of a row change
        # places so that no two of 8 rows share banks; the tile's are bits 5 and 6.
        row = (lane >> u32(4)) * u32(8) + (lane & u32(7))
        place = stage + row * u32(STAGE_ROW_BYTES) + ((((lane >> u32(3)) & u32(1)) ^ (row & u32(7))) << u32(4))
        for j in range(0, PAIRS, 2):
            rows = place + u32(8 * j * STAGE_ROW_BYTES)
            stage_tile(o_rmem.t0, j, rows, factors_rmem)
            stage_tile(o_rmem.t1, j, rows ^ u32(32), factors_rmem)
            stage_tile(o_rmem.t2, j, rows ^ u32(64), factors_rmem)
            stage_tile(o_rmem.t3, j, rows ^ u32(96), factors_rmem)
        # The lanes' matrices are there.
        cuda.syncwarp()
        chunk = lane & u32(7)
        columns = i64((chunk >> u32(1)) * u32(2 * TILE_COLUMNS) + (warp & u32(3)) * u32(32) + (chunk & u32(1)) * u32(16))
        for i in range(0, NUM_ROWS, 4):
            row = (lane >> u32(3)) + u32(i)
            address = cuda.shfl_sync(0xFFFFFFFF, row_address, i32(row))
            if address != 0:
                ptx.ld_shared_v4_b32(quad_rmem, 0, stage + row * u32(STAGE_ROW_BYTES) + ((chunk ^ (row & u32(7))) << u32(4)))
                ptx.st_global_v4_b32(u64(address + columns), quad_rmem[0], quad_rmem[1], quad_rmem[2], quad_rmem[3])
        # They have been read.
        cuda.syncwarp()

    @inline
    def end_piece(regs, base, words, problem, partials):
        """Free the piece's place. If its O goes to its slot, it is stored here, so that it is on its way while the sums are exchanged."""
        num_parts = ptx.ld_shared_i32(words + u32(PIECE_NUM_PARTS))
        # What follows from the thread's place, anew: kept over the steps it would cost registers.
        thread_idx = ptx.opaque_b32(u32(cuda.threadIdx.x))
        lane, warp = thread_idx & u32(31), thread_idx >> u32(5)
        row = i32(ptx.ld_shared_i32(words + u32(PIECE_ROW_BEGIN)) + i32(lane & u32(NUM_ROWS - 1)))
        rows_of_request = i32(ptx.ld_shared_i32(words + u32(PIECE_Q_LEN)) * problem.heads_per_kv)
        release_q(base, lane, words, False)
        # No merge kernel follows where a job is whole, or in two pieces.
        ends_here = 0 < num_parts < MERGE_LEAST_PARTS
        is_last = ends_here
        counter, o_part, state_part = u64(0), u64(0), u64(0)
        # A rehearsal's job is in no parts: its O goes to a slot that nobody reads.
        is_rehearsal = num_parts == 0
        if num_parts != 1:
            # Slots are (slot, KV head) of O and of states, 8 warps' parts each.
            split, step = u32(ptx.ld_shared_i32(words + u32(PIECE_SPLIT))), u32(cuda.gridDim.z)
            first_part = u32(u32(u32(ptx.ld_shared_i32(words + u32(PIECE_FIRST_SLOT))) * step) + u32(cuda.blockIdx.z))
            part_warp = u32(u32(u32(first_part + u32(split * step)) * u32(NUM_WARPS)) + warp)
            # The warps of a warpgroup, which the merge waits for together, count up one word; a pair's warps have one each.
            word = warp if ends_here else warp & u32(NUM_WARPS // 2)
            counter = partials.counters + u64(u32(u32(first_part * u32(NUM_WARPS)) + word)) * u64(4)
            o_part = partials.o + u64(part_warp) * u64(WARP_PART_BYTES) + u64(lane * u32(16))
            state_part = partials.states + u64(part_warp) * u64(2 * ROW_BYTES) + u64((lane & u32(NUM_ROWS - 1)) * u32(4))
            if ends_here:
                is_last = claim(counter, lane) > 0
                if not is_last:
                    store_tile(regs.o_rmem.t0, o_part)
                    store_tile(regs.o_rmem.t1, o_part + u64(PAIRS * STRIP_BYTES))
                    store_tile(regs.o_rmem.t2, o_part + u64(2 * PAIRS * STRIP_BYTES))
                    store_tile(regs.o_rmem.t3, o_part + u64(3 * PAIRS * STRIP_BYTES))
            else:
                store_packed(regs.o_rmem.t0, regs.o_rmem.t1, o_part, lane)
                store_packed(regs.o_rmem.t2, regs.o_rmem.t3, o_part + u64(PAIRS * PAIR_BYTES), lane)
            counter = u64(0) if is_rehearsal else counter
        return Part(is_last, row, rows_of_request, counter, o_part, state_part)

    @inline
    def store_piece(regs, part, base, ends, words, problem, results):
        """The piece's rows: to the results, or to its slot of the workspace, if more pieces are to come. Maximum and sum are the lane's
        row's."""
        thread_idx = ptx.opaque_b32(u32(cuda.threadIdx.x))
        lane, warp = thread_idx & u32(31), thread_idx >> u32(5)
        maximum, total = ends
        # The maximum of a row that sees nothing here must not count.
        if part.counter != u64(0):
            maximum = maximum if total > f32(0) else MINUS_INFINITY
        if part.is_last:
            if part.counter == u64(0):
                factor, lse2 = whole_row(total, maximum)
            else:
                factor = f32(1)
                await_announced(part.counter, lane)
                # The other piece's slot is the next one, or the one before.
                is_second = ptx.ld_shared_i32(words + u32(PIECE_SPLIT)) == 1
                distance = i64(cuda.gridDim.z) * i64(NUM_WARPS)
                distance = i64(-distance) if is_second else distance
                other_o = u64(i64(part.o) + distance * i64(WARP_PART_BYTES))
                other_state = u64(i64(part.state) + distance * i64(2 * ROW_BYTES))
                weight, other_weight, lse2 = pair_weights(maximum, total, ptx.ld_global_f32(other_state),
                                                          ptx.ld_global_f32(other_state + u64(ROW_BYTES)))
                add_other(regs.o_rmem, other_o, weight, other_weight, lane, is_second)
            row_address = store_lse(part.row, words, warp >> u32(2), warp == 0 and lane < u32(NUM_ROWS), part.rows_of_request,
                                    i32(cuda.blockIdx.z), problem.heads_per_kv, lse2, results)
            store_results(regs.o_rmem, factor, row_address, base, thread_idx)
        elif part.counter != u64(0):
            if lane < u32(NUM_ROWS):
                ptx.st_global_f32(part.state, maximum)
                ptx.st_global_f32(part.state + u64(ROW_BYTES), total)
            announce(part.counter, lane)

    return end_piece, store_piece
