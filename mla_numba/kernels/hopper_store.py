"""The consumers' epilogue: a piece's rows of O to the results, to its slot of the workspace, or merged with the other one of two pieces.

Of a job in two pieces, the earlier one to end leaves its O in its slot, and the later one merges both, warp by warp: `counters` has a
word for each warp of each split job, 0 between launches; a pair's is 1 and 2 as warps claim, 3 when what the first wrote is there. Of a job
in more pieces all leave theirs, and count the word up; hopper_merge waits for it.
"""

import math
from collections.abc import Callable

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
    PIECE_FIRST_SLOT,
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

i32, i64, u32, u64, f32 = np.int32, np.int64, np.uint32, np.uint64, np.float32

# Strips of another piece's O that are in flight while this one's are weighted.
STRIPS_AT_ONCE = 8
OTHER_REGISTERS = 4 * STRIPS_AT_ONCE
# Of a pair's counter: both warps have claimed it, and the first has announced what it wrote.
ANNOUNCED = 3


def make_store(config: HopperConfig) -> Callable[..., None]:
    """`finish_piece(regs, max_a, max_b, base, words, problem, results, partials)`, for the consumer warps."""
    to_pair = ptx.cvt_bf16x2 if config.dtype == "bfloat16" else ptx.cvt_f16x2

    @inline
    def store_partial(regs, max_a, max_b, o_part, state_part, lane):
        """A piece's O and state to its slot, as the registers hold them, not divided by the sums: 512 bytes of a warp side by side, 32
        times (hopper_merge reads it so)."""
        o_rmem = regs.o_rmem
        if lane & u32(3) == 0:
            ptx.st_global_f32(state_part, max_a)
            ptx.st_global_f32(state_part + u64(NEXT_ROW), max_b)
            ptx.st_global_f32(state_part + u64(SUMS_OFFSET), regs.sums_rmem[0])
            ptx.st_global_f32(state_part + u64(SUMS_OFFSET + NEXT_ROW), regs.sums_rmem[1])
        for i in range(STRIPS):
            ptx.st_global_v4_f32(o_part + u64(i * STRIP_BYTES), o_rmem[4 * i], o_rmem[4 * i + 1], o_rmem[4 * i + 2], o_rmem[4 * i + 3])

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
    def pair_weights(my_max, my_sum, other_max, other_sum, is_second):
        """Of a row in two pieces: the weight of this one, of the other one, lse2 of both. Equal bits on whichever side it runs."""
        first_max, first_sum, second_max, second_sum = my_max, my_sum, other_max, other_sum
        if is_second:
            first_max, first_sum, second_max, second_sum = other_max, other_sum, my_max, my_sum
        largest = max(first_max, second_max)
        if largest == MINUS_INFINITY:
            return f32(0), f32(0), MINUS_INFINITY
        first, second = ptx.ex2(first_max - largest), ptx.ex2(second_max - largest)
        total = ptx.fma_rn(first, first_sum, ptx.mul_rn(second, second_sum))
        lse2 = largest + math.log2(total)
        return (second / total, first / total, lse2) if is_second else (first / total, second / total, lse2)

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
    def swap_words(a, b, take_b, distance):
        """Of two words here and in the lane `distance` away: the pair (own a, its a) in the lower lane, (its b, own b) in the upper one."""
        other = u32(cuda.shfl_xor_sync(0xFFFFFFFF, i32(a if take_b else b), distance))
        return (other, b) if take_b else (a, other)

    @inline
    def store_row(o_rmem, half, factor, row_address, lane):
        """A row of O, this warp's 256 columns. The 4 lanes of a row transpose 4 x 4 words, so that each stores 16 bytes, and all 64."""
        odd, upper = lane & u32(1) != 0, lane & u32(2) != 0
        for i in range(0, STRIPS, 4):
            w0 = to_pair(o_rmem[4 * i + 2 * half + 1] * factor, o_rmem[4 * i + 2 * half] * factor)
            w1 = to_pair(o_rmem[4 * i + 2 * half + 5] * factor, o_rmem[4 * i + 2 * half + 4] * factor)
            w2 = to_pair(o_rmem[4 * i + 2 * half + 9] * factor, o_rmem[4 * i + 2 * half + 8] * factor)
            w3 = to_pair(o_rmem[4 * i + 2 * half + 13] * factor, o_rmem[4 * i + 2 * half + 12] * factor)
            w0, w1 = swap_words(w0, w1, odd, 1)
            w2, w3 = swap_words(w2, w3, odd, 1)
            w0, w2 = swap_words(w0, w2, upper, 2)
            w1, w3 = swap_words(w1, w3, upper, 2)
            if row_address != 0:
                ptx.st_global_v4_b32(u64(row_address) + u64(i * 16), u32(w0), u32(w1), u32(w2), u32(w3))

    @inline
    def finish_row(o_rmem, half, factor, lse2, row, words, wg, lane, rows_of_request, kv_head, heads_per_kv, results):
        """A row's result."""
        # Opaque, lest the reciprocal for the division be kept in a register across all pieces; unsigned, lest it be one of 64 bits.
        heads = ptx.opaque_b32(u32(heads_per_kv))
        q_batch = ptx.ld_shared_i32(words + u32(PIECE_Q_BATCH))
        token = ptx.ld_shared_i32(words + u32(PIECE_Q_BEGIN)) + i32(u32(row) // heads)
        head = kv_head * i32(heads) + i32(u32(row) % heads)
        row_address = i64(0)
        if row < rows_of_request:
            row_address = (i64(results.out) + q_batch * results.out_batch_stride + token * results.out_token_stride
                           + head * results.out_head_stride + i64(wg * u32(HEAD_DIM_V) + (lane & u32(3)) * u32(16)))
            if wg == 0 and lane & u32(3) == 0:
                ptx.st_global_f32(results.lse + u64(q_batch * results.lse_batch_stride + head * results.lse_head_stride
                                                    + token * results.lse_token_stride),
                                  lse2 * f32(LN_2) if lse2 > MINUS_INFINITY else results.empty_lse)
        store_row(o_rmem, half, factor, row_address, lane)

    @inline
    def whole_row(total, maximum):
        """Of a row in one piece, whose weights, relative to 2^maximum, sum to `total`: what O is to be multiplied by, and lse2."""
        factor, lse2 = f32(0), MINUS_INFINITY
        if total > f32(0):
            factor, lse2 = f32(1) / total, maximum + math.log2(total)
        return factor, lse2

    @inline
    def finish_piece(regs, max_a, max_b, base, words, problem, results, partials):
        """Free the piece's place, and store its rows: to the results, or to its slot of the workspace, if more pieces are to come."""
        o_rmem, heads_per_kv = regs.o_rmem, problem.heads_per_kv
        kv_head, num_kv_heads = i32(cuda.blockIdx.z), i32(cuda.gridDim.z)
        num_parts = ptx.ld_shared_i32(words + u32(PIECE_NUM_PARTS))
        # What follows from the thread's place, anew: kept over the steps it would cost registers that O needs.
        thread_idx = ptx.opaque_b32(u32(cuda.threadIdx.x))
        lane, warp, wg = thread_idx & u32(31), thread_idx >> u32(5), thread_idx >> u32(7)
        tile_row = ((thread_idx & u32(127)) >> u32(5)) * u32(16) + (lane >> u32(2))
        row = i32(ptx.ld_shared_i32(words + u32(PIECE_ROW_BEGIN)) + i32(tile_row))
        # A rehearsal's job is in no parts: nothing of it is stored.
        rows_of_request = i32(ptx.ld_shared_i32(words + u32(PIECE_Q_LEN)) * heads_per_kv) if num_parts > 0 else i32(0)
        cuda.syncwarp()
        if lane == 0:
            # 8 consumer warps arrive, producer waits: this one is done with Q and P1. (The words stay until the piece after the next.)
            ptx.mbarrier_arrive(base + u32(Q_EMPTY_SMEM))
        is_split, is_last = num_parts > 1, True
        factor_a, factor_b, lse2_a, lse2_b = f32(1), f32(1), MINUS_INFINITY, MINUS_INFINITY
        if not is_split:
            factor_a, lse2_a = whole_row(regs.sums_rmem[0], max_a)
            factor_b, lse2_b = whole_row(regs.sums_rmem[1], max_b)
        elif row - i32(lane >> u32(2)) < rows_of_request:
            # The maximum of a row that sees nothing here must not count.
            max_a = max_a if regs.sums_rmem[0] > f32(0) else MINUS_INFINITY
            max_b = max_b if regs.sums_rmem[1] > f32(0) else MINUS_INFINITY
            # Slots are (slot, KV head, row tile) of O, 8 warps' parts, and of states, twice 64 rows' maxima and sums.
            step, split = u64(num_kv_heads) * u64(cuda.gridDim.x), ptx.ld_shared_i32(words + u32(PIECE_SPLIT))
            first_part = (u64(ptx.ld_shared_i32(words + u32(PIECE_FIRST_SLOT))) * step + u64(kv_head) * u64(cuda.gridDim.x)
                          + u64(cuda.blockIdx.x))
            part = first_part + u64(split) * step
            counter = partials.counters + (first_part * u64(NUM_WARPS) + u64(warp)) * u64(4)
            o_part = partials.o + (part * u64(NUM_WARPS) + u64(warp)) * u64(WARP_PART_BYTES) + u64(lane * u32(16))
            state_part = partials.states + (part * u64(2) + u64(wg)) * u64(STATE_BYTES) + u64(tile_row * u32(4))
            if num_parts >= MERGE_LEAST_PARTS:
                store_partial(regs, max_a, max_b, o_part, state_part, lane)
                announce(counter, lane)
                is_last = False
            else:
                is_second = split == 1
                if claim(counter, lane) == 0:
                    store_partial(regs, max_a, max_b, o_part, state_part, lane)
                    announce(counter, lane)
                    is_last = False
                else:
                    await_announced(counter, lane)
                    other = part - step if is_second else part + step
                    other_o = partials.o + (other * u64(NUM_WARPS) + u64(warp)) * u64(WARP_PART_BYTES) + u64(lane * u32(16))
                    other_state = partials.states + (other * u64(2) + u64(wg)) * u64(STATE_BYTES) + u64(tile_row * u32(4))
                    other_sums = other_state + u64(SUMS_OFFSET)
                    weight_a, other_weight_a, lse2_a = pair_weights(
                        max_a, regs.sums_rmem[0], ptx.ld_global_f32(other_state), ptx.ld_global_f32(other_sums), is_second)
                    weight_b, other_weight_b, lse2_b = pair_weights(
                        max_b, regs.sums_rmem[1], ptx.ld_global_f32(other_state + u64(NEXT_ROW)),
                        ptx.ld_global_f32(other_sums + u64(NEXT_ROW)), is_second)
                    other_rmem = cuda.local.array(OTHER_REGISTERS, types.float32)
                    for i in range(0, STRIPS, STRIPS_AT_ONCE):
                        for k in range(STRIPS_AT_ONCE):
                            ptx.ld_global_v4_f32(other_rmem, 4 * k, other_o + u64((i + k) * STRIP_BYTES))
                        add_other(o_rmem, 0, weight_a, other_weight_a, other_rmem, i, is_second)
                        add_other(o_rmem, 1, weight_b, other_weight_b, other_rmem, i, is_second)
        if is_last:
            finish_row(o_rmem, 0, factor_a, lse2_a, row, words, wg, lane, rows_of_request, kv_head, heads_per_kv, results)
            finish_row(o_rmem, 1, factor_b, lse2_b, i32(row + 8), words, wg, lane, rows_of_request, kv_head, heads_per_kv, results)

    return finish_piece
