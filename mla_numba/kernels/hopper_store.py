"""The consumers' epilogue: a piece's rows of O to the results, to its slot of the workspace, or merged with the other one of two pieces.

Of a job in two pieces, the earlier one to end leaves its O in its slot, and the later one merges both, warp by warp: `counters` has a
word for each warp of each split job, 0 between launches; a pair's is 1 and 2 as warps claim, 3 when what the first wrote is there. Of a job
in more pieces all leave theirs, and count the word up; hopper_merge waits for it.
"""

import math
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
from numba import cuda
from numba.cuda import types

from .. import ptx
from ..contract import HEAD_DIM_V, LN_2
from ..scheduler import MERGE_LEAST_PARTS
from .hopper_config import (
    MINUS_INFINITY,
    NEXT_ROW,
    NUM_WARPS,
    P0_SMEM,
    PIECE_FIRST_SLOT,
    PIECE_NUM_BLOCKS,
    PIECE_NUM_PARTS,
    PIECE_Q_BATCH,
    PIECE_Q_BEGIN,
    PIECE_Q_LEN,
    PIECE_ROW_BEGIN,
    PIECE_SPLIT,
    Q_EMPTY_SMEM,
    STATE_BYTES,
    STRIP_BYTES,
    STRIPS,
    SUMS_OFFSET,
    WARP_PART_BYTES,
    HopperConfig,
    inline,
)
from .hopper_part import PAIR_BYTES, store_pair, words_4_and_5

i32, i64, u32, u64, f32 = np.int32, np.int64, np.uint32, np.uint64, np.float32

WARP_ROWS = 16
# Strips of another piece's O that are in flight while this one's are weighted.
STRIPS_AT_ONCE = 8
OTHER_REGISTERS = 4 * STRIPS_AT_ONCE
# A warp's part of P0's place, where the results of as many strips lie as 8 rows of 128 bytes: whole lines, with which a call of 128 heads
# takes 0.2 to 1 us less than with halves of 16 rows (H200).
STAGE_STRIPS, STAGE_ROWS = 8, 8
STAGE_ROW_BYTES = 16 * STAGE_STRIPS
STAGE_BYTES = STAGE_ROWS * STAGE_ROW_BYTES
# A warp's part of a piece: whether it has the last word on its rows, and does not leave them in its slot; this thread's first row (of few
# rows the lane's), and how many the request has; where the warp's counter, O and state are, 0 if the piece is the whole job, or the warp
# has no row of it.
Part = namedtuple("Part", "is_last row rows_of_request counter o state")
# Of a pair's counter: both warps have claimed it, and the first has announced what it wrote.
ANNOUNCED = 3


@inline
def query_and_head(row, heads_per_kv):
    """A packed row's query and head, of its KV head's; the remainder by a product, as another division is 18 instructions."""
    query = u32(row // heads_per_kv)
    return query, u32(row - u32(query * heads_per_kv))


def make_store(config: HopperConfig) -> SimpleNamespace:
    """The functions below, by name: release_q, end_piece and store_piece, for the consumer warps, the last two before and after the sums
    are exchanged; others are hopper_swapped_store's, too."""
    to_pair = ptx.cvt_bf16x2 if config.dtype == "bfloat16" else ptx.cvt_f16x2

    @inline
    def store_o(o_rmem, o_part):
        """A piece's O to its slot, for the other one of two pieces, as the registers hold it, not divided by the sums: 512 bytes of a warp
        side by side, 32 times."""
        for i in range(STRIPS):
            ptx.st_global_v4_f32(o_part + u64(i * STRIP_BYTES), o_rmem[4 * i], o_rmem[4 * i + 1], o_rmem[4 * i + 2], o_rmem[4 * i + 3])

    @inline
    def store_packed(o_rmem, o_part, lane):
        """The same for hopper_merge, two strips at a time, as hopper_part says."""
        last_words = words_4_and_5(o_part, lane)
        for i in range(STRIPS // 2):
            store_pair(o_part + u64(i * PAIR_BYTES), last_words + u64(i * PAIR_BYTES), o_rmem, 8 * i, o_rmem, 8 * i + 4)

    @inline
    def store_state(state_part, max_a, max_b, sum_a, sum_b, lane):
        """Maxima and sums of this thread's two rows."""
        if lane & u32(3) == 0:
            ptx.st_global_f32(state_part, max_a)
            ptx.st_global_f32(state_part + u64(NEXT_ROW), max_b)
            ptx.st_global_f32(state_part + u64(SUMS_OFFSET), sum_a)
            ptx.st_global_f32(state_part + u64(SUMS_OFFSET + NEXT_ROW), sum_b)

    @inline
    def claim(counter, lane):
        """How many have been here before this warp."""
        before = u32(0)
        if lane == 0:
            before = ptx.atom_add_relaxed(counter, u32(1))
        return u32(cuda.shfl_sync(0xFFFFFFFF, i32(before), 0))

    @inline
    def announce(counter, lane):
        """What this warp wrote is there for all: the release is lane 0's, of all that it has seen."""
        cuda.syncwarp()
        if lane == 0:
            ptx.red_add_u32(counter, u32(1))

    @inline
    def await_announced(counter, lane):
        """Until both warps have claimed and the first has announced; makes the counter ready for the next launch."""
        if lane == 0:
            while ptx.ld_acquire(counter) != u32(ANNOUNCED):
                pass
            ptx.st_relaxed(counter, u32(0))
        cuda.syncwarp()

    @inline
    def pair_weights(my_max, my_sum, other_max, other_sum):
        """Of a row in two pieces: the weight of this one, of the other one, lse2 of both. Equal bits on whichever side it runs, as products
        are rounded before they are added."""
        largest = max(my_max, other_max)
        if largest == MINUS_INFINITY:
            return f32(0), f32(0), MINUS_INFINITY
        mine, other = ptx.ex2(my_max - largest), ptx.ex2(other_max - largest)
        total = ptx.mul_rn(mine, my_sum) + ptx.mul_rn(other, other_sum)
        return mine / total, other / total, largest + math.log2(total)

    @inline
    def add_other(o_rmem, half, weight, other_weight, other_rmem, i, is_second):
        """Strips from i on of a row: O = both pieces' weighted sum, the first piece's share rounded last on either side."""
        for k in range(STRIPS_AT_ONCE):
            for c in range(2):
                x = o_rmem[4 * (i + k) + 2 * half + c]
                y = other_rmem[4 * k + 2 * half + c]
                if is_second:
                    o_rmem[4 * (i + k) + 2 * half + c] = ptx.fma_rn(other_weight, y, ptx.mul_rn(weight, x))
                else:
                    o_rmem[4 * (i + k) + 2 * half + c] = ptx.fma_rn(weight, x, ptx.mul_rn(other_weight, y))

    @inline
    def stage_address(stage, row, chunk):
        """Of 16 bytes of one of 8 rows of 128 bytes; the chunks of a row change places so that no two rows share banks."""
        return stage + row * u32(STAGE_ROW_BYTES) + ((chunk ^ row) << u32(4))

    @inline
    def store_lse(row, words, wg, is_first, rows_of_request, kv_head, heads_per_kv, lse2, results):
        """Store a row's lse, if `is_first`; returns where this warpgroup's columns of the row go, 0 if the request has no
        such row."""
        # Opaque, lest the reciprocal for the division be kept in a register across all pieces; unsigned, lest it be one of 64 bits.
        heads = ptx.opaque_b32(u32(heads_per_kv))
        query, head_of_kv = query_and_head(u32(row), heads)
        q_batch = ptx.ld_shared_i32(words + u32(PIECE_Q_BATCH))
        token = i32(ptx.ld_shared_i32(words + u32(PIECE_Q_BEGIN)) + i32(query))
        head = i32(i32(u32(kv_head) * heads) + i32(head_of_kv))
        address = i64(0)
        if row < rows_of_request:
            address = (i64(results.out) + q_batch * results.out_batch_stride + token * results.out_token_stride
                       + head * results.out_head_stride + i64(wg * u32(HEAD_DIM_V)))
            if is_first:
                ptx.st_global_f32(results.lse + u64(q_batch * results.lse_batch_stride + head * results.lse_head_stride
                                                    + token * results.lse_token_stride),
                                  lse2 * f32(LN_2) if lse2 > MINUS_INFINITY else results.empty_lse)
        return address

    @inline
    def line_address(row_address, lane, row):
        """Where this lane's 16 bytes of a line of the warp's row `row` go, if `row_address` is what lane `row` has; 0 if there is none."""
        address = cuda.shfl_sync(0xFFFFFFFF, row_address, i32(row))
        return address + i64((lane & u32(7)) * u32(16)) if address != 0 else address

    @inline
    def store_results(o_rmem, factors, row_address, base, thread_idx):
        """The warp's 16 rows, 256 columns of each: 8 rows of 64 columns at a time through its part of P0's place, so that the lanes store
        whole lines of 128 bytes, four at a time. `factors` are of this thread's two rows, `row_address` is of the lane's own."""
        lane = thread_idx & u32(31)
        stage = base + u32(P0_SMEM) + (thread_idx >> u32(5)) * u32(STAGE_BYTES)
        # stmatrix: lane l has the place of row l % 8 of matrix l / 8, which is a strip's 8 rows. Of strips 4 to 7 bit 6 is the other one.
        in_smem = stage_address(stage, lane & u32(7), lane >> u32(3))
        # Lanes 8 r to 8 r + 7 store row r, then row r + 4.
        row = lane >> u32(3)
        first, second = stage_address(stage, row, lane & u32(7)), stage_address(stage, row + u32(4), lane & u32(7))
        quad_rmem = cuda.local.array(8, types.uint32)
        for half in range(2):
            factor = factors[half]
            address = line_address(row_address, lane, u32(8 * half) + row)
            address_below = line_address(row_address, lane, u32(8 * half + 4) + row)
            for i in range(0, STRIPS, STAGE_STRIPS):
                for s in range(0, STAGE_STRIPS, 4):
                    w = 4 * (i + s) + 2 * half
                    ptx.stmatrix_x4(in_smem ^ u32(16 * s),
                                    to_pair(o_rmem[w + 1] * factor, o_rmem[w] * factor),
                                    to_pair(o_rmem[w + 5] * factor, o_rmem[w + 4] * factor),
                                    to_pair(o_rmem[w + 9] * factor, o_rmem[w + 8] * factor),
                                    to_pair(o_rmem[w + 13] * factor, o_rmem[w + 12] * factor))
                # The lanes' matrices are there.
                cuda.syncwarp()
                ptx.ld_shared_v4_b32(quad_rmem, 0, first)
                ptx.ld_shared_v4_b32(quad_rmem, 4, second)
                if address != 0:
                    ptx.st_global_v4_b32(u64(address) + u64(i * 16), quad_rmem[0], quad_rmem[1], quad_rmem[2], quad_rmem[3])
                if address_below != 0:
                    ptx.st_global_v4_b32(u64(address_below) + u64(i * 16), quad_rmem[4], quad_rmem[5], quad_rmem[6], quad_rmem[7])
                # They have been read.
                cuda.syncwarp()

    @inline
    def whole_row(total, maximum):
        """Of a row in one piece, whose weights, relative to 2^maximum, sum to `total`: what O is to be multiplied by, and lse2."""
        factor, lse2 = f32(0), MINUS_INFINITY
        if total > f32(0):
            factor, lse2 = f32(1) / total, maximum + math.log2(total)
        return factor, lse2

    @inline
    def release_q(base, lane, words, in_step):
        """This warp is done with a piece's Q and P1: before the step of a last block that has no other beside it, which reads neither, or,
        with an even number of blocks, at the end; only there `words` are read. (They stay until the piece after the next.)"""
        # All lanes have read Q's last tile.
        cuda.syncwarp()
        if lane == 0 and (in_step or ptx.ld_shared_i32(words + u32(PIECE_NUM_BLOCKS)) & i32(1) == 0):
            # 8 consumer warps arrive, producer waits.
            ptx.mbarrier_arrive(base + u32(Q_EMPTY_SMEM))

    @inline
    def end_piece(regs, base, words, problem, partials):
        """Free the piece's place. If its O goes to its slot, it is stored here, so that it is on its way while the sums are exchanged."""
        num_parts = ptx.ld_shared_i32(words + u32(PIECE_NUM_PARTS))
        # What follows from the thread's place, anew: kept over the steps it would cost registers that O needs.
        thread_idx = ptx.opaque_b32(u32(cuda.threadIdx.x))
        lane, warp, wg = thread_idx & u32(31), thread_idx >> u32(5), thread_idx >> u32(7)
        tile_row = ((thread_idx & u32(127)) >> u32(5)) * u32(16) + (lane >> u32(2))
        row = i32(ptx.ld_shared_i32(words + u32(PIECE_ROW_BEGIN)) + i32(tile_row))
        rows_of_request = i32(ptx.ld_shared_i32(words + u32(PIECE_Q_LEN)) * problem.heads_per_kv)
        release_q(base, lane, words, False)
        # No merge kernel follows where a job is whole or in two pieces. A warp without rows goes to the end of such a piece, too, and makes
        # the code near for those that have some (2 us of 43, H100); it keeps away from that of others (3 us of 27).
        ends_here = 0 < num_parts < MERGE_LEAST_PARTS
        is_last = ends_here
        counter, o_part, state_part = u64(0), u64(0), u64(0)
        # A rehearsal's job is in no parts: its O goes to a slot that nobody reads.
        is_rehearsal = num_parts == 0
        if is_rehearsal or (num_parts > 1 and i32(row - i32(lane >> u32(2))) < rows_of_request):
            # Slots are (slot, KV head, row tile) of O, 8 warps' parts, and of states, twice 64 rows' maxima and sums. Numbers of parts are
            # of 32 bits: half as many instructions, which short calls meet cold.
            row_tiles, split = u32(cuda.gridDim.x), u32(ptx.ld_shared_i32(words + u32(PIECE_SPLIT)))
            step = u32(u32(cuda.gridDim.z) * row_tiles)
            first_part = u32(u32(u32(ptx.ld_shared_i32(words + u32(PIECE_FIRST_SLOT))) * step) + u32(u32(cuda.blockIdx.z) * row_tiles)
                             + u32(cuda.blockIdx.x))
            part = u32(first_part + u32(split * step))
            counter = partials.counters + u64(u32(first_part * u32(NUM_WARPS)) + warp) * u64(4)
            o_part = partials.o + u64(u32(part * u32(NUM_WARPS)) + warp) * u64(WARP_PART_BYTES) + u64(lane * u32(16))
            state_part = partials.states + u64(u32(part * u32(2)) + wg) * u64(STATE_BYTES) + u64(tile_row * u32(4))
            if ends_here:
                is_last = claim(counter, lane) > 0
                if not is_last:
                    store_o(regs.o_rmem, o_part)
            else:
                store_packed(regs.o_rmem, o_part, lane)
            counter = u64(0) if is_rehearsal else counter
        return Part(is_last, row, rows_of_request, counter, o_part, state_part)

    @inline
    def store_piece(regs, part, base, maxima, words, problem, results):
        """The piece's rows: to the results, or to its slot of the workspace, if more pieces are to come."""
        o_rmem, heads_per_kv, (max_a, max_b) = regs.o_rmem, problem.heads_per_kv, maxima
        kv_head = i32(cuda.blockIdx.z)
        thread_idx = ptx.opaque_b32(u32(cuda.threadIdx.x))
        lane, wg = thread_idx & u32(31), thread_idx >> u32(7)
        # The maximum of a row that sees nothing here must not count.
        if part.counter != u64(0):
            max_a = max_a if regs.sums_rmem[0] > f32(0) else MINUS_INFINITY
            max_b = max_b if regs.sums_rmem[1] > f32(0) else MINUS_INFINITY
        if part.is_last:
            if part.counter == u64(0):
                factor_a, lse2_a = whole_row(regs.sums_rmem[0], max_a)
                factor_b, lse2_b = whole_row(regs.sums_rmem[1], max_b)
            else:
                factor_a, factor_b = f32(1), f32(1)
                await_announced(part.counter, lane)
                # The other piece's slot is the next one, or the one before.
                is_second = ptx.ld_shared_i32(words + u32(PIECE_SPLIT)) == 1
                step = i64(cuda.gridDim.z) * i64(cuda.gridDim.x)
                distance = i64(-step) if is_second else step
                other_o = u64(i64(part.o) + distance * i64(NUM_WARPS * WARP_PART_BYTES))
                other_state = u64(i64(part.state) + distance * i64(2 * STATE_BYTES))
                other_sums = other_state + u64(SUMS_OFFSET)
                weight_a, other_weight_a, lse2_a = pair_weights(
                    max_a, regs.sums_rmem[0], ptx.ld_global_f32(other_state), ptx.ld_global_f32(other_sums))
                weight_b, other_weight_b, lse2_b = pair_weights(
                    max_b, regs.sums_rmem[1], ptx.ld_global_f32(other_state + u64(NEXT_ROW)),
                    ptx.ld_global_f32(other_sums + u64(NEXT_ROW)))
                other_rmem = cuda.local.array(OTHER_REGISTERS, types.float32)
                for i in range(0, STRIPS, STRIPS_AT_ONCE):
                    for k in range(STRIPS_AT_ONCE):
                        ptx.ld_global_v4_f32(other_rmem, 4 * k, other_o + u64((i + k) * STRIP_BYTES))
                    add_other(o_rmem, 0, weight_a, other_weight_a, other_rmem, i, is_second)
                    add_other(o_rmem, 1, weight_b, other_weight_b, other_rmem, i, is_second)
            # Lanes 0 to 15 have a row each, as do 16 to 31: one chain of a division and products of 64 bits, not two.
            of_row = i32((lane & u32(7)) * u32(4))
            lse2_a, lse2_b = cuda.shfl_sync(0xFFFFFFFF, lse2_a, of_row), cuda.shfl_sync(0xFFFFFFFF, lse2_b, of_row)
            row = i32(part.row - i32(lane >> u32(2)) + i32(lane & u32(WARP_ROWS - 1)))
            row_address = store_lse(row, words, wg, wg == 0 and lane < u32(WARP_ROWS), part.rows_of_request, kv_head, heads_per_kv,
                                    lse2_b if lane & u32(8) else lse2_a, results)
            store_results(o_rmem, (factor_a, factor_b), row_address, base, thread_idx)
        elif part.counter != u64(0):
            store_state(part.state, max_a, max_b, regs.sums_rmem[0], regs.sums_rmem[1], lane)
            announce(part.counter, lane)

    return SimpleNamespace(release_q=release_q, end_piece=end_piece, store_piece=store_piece, claim=claim, announce=announce,
                           await_announced=await_announced, pair_weights=pair_weights, store_lse=store_lse, whole_row=whole_row)
