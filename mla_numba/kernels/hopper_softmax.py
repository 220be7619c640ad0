"""The consumers' softmax over a block of scores in registers: mask, running maximum, exponentials, P as wgmma reads it.

A thread has two rows of S, a and b, 8 apart, and in each the columns 8 i + 2 (thread % 4) and the next: s_rmem[4 i], [4 i + 1] of row
a, [4 i + 2], [4 i + 3] of row b.
"""

from types import SimpleNamespace

import numpy as np
from numba import cuda

from .. import ptx
from .hopper_config import (
    ATOM_ROWS,
    BLOCK_M,
    BLOCK_N,
    EXACT_STEPS,
    LEFT_TILES,
    MAX_LAG,
    MAX_SMEM,
    MINUS_INFINITY,
    NEXT_ROW,
    NEXT_STEP,
    NO_SCORE,
    NUM_CONSUMERS,
    PIECE_BYTES,
    PIECE_Q_LEN,
    PIECE_ROW_BEGIN,
    PIECE_SEQ_LEN,
    PIECE_SMEM,
    SUM_SMEM,
    SUMS,
    TILE_BYTES,
    HopperConfig,
    inline,
)

i32, u32, f32 = np.int32, np.uint32, np.float32


def make_softmax(config: HopperConfig) -> SimpleNamespace:
    """The functions below, by name."""
    to_pair = ptx.cvt_bf16x2 if config.dtype == "bfloat16" else ptx.cvt_f16x2
    PAGES_PER_BLOCK, NEXT_TILE = config.pages_per_block, config.next_tile_bytes
    NEXT_ATOM = tuple(config.next_atom_bytes(side) for side in range(2))
    MAY_LAG = not config.is_stream

    @inline
    def load_rows(address):
        """What lies there for this thread's two rows."""
        return ptx.ld_shared_f32(address), ptx.ld_shared_f32(address + u32(NEXT_ROW))

    @inline
    def store_rows(address, a, b):
        ptx.st_shared_f32(address, a)
        ptx.st_shared_f32(address + u32(NEXT_ROW), b)

    @inline
    def row_max(s_rmem, half):
        """Maximum of this thread's row `half` of S, over the 4 threads that share it."""
        value = max(s_rmem[2 * half], s_rmem[2 * half + 1])
        for i in range(1, 8):
            value = max(value, max(s_rmem[4 * i + 2 * half], s_rmem[4 * i + 2 * half + 1]))
        value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, 1))
        return max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, 2))

    @inline
    def exp_row(s_rmem, half, scale_log2e, row_maximum):
        """S = 2^(S scale - max) of a row; returns this thread's part of its sum."""
        total = f32(0)
        for i in range(8):
            a = ptx.ex2(s_rmem[4 * i + 2 * half] * scale_log2e - row_maximum)
            b = ptx.ex2(s_rmem[4 * i + 2 * half + 1] * scale_log2e - row_maximum)
            s_rmem[4 * i + 2 * half] = a
            s_rmem[4 * i + 2 * half + 1] = b
            total += a + b
        return total

    @inline
    def next_max(old, new, parity):
        """The maximum after a block; in the seesaw, but in the first steps of a piece, the old one while the new one is not much larger."""
        lag = MAX_LAG if MAY_LAG and parity >= u32(EXACT_STEPS * NEXT_STEP) else f32(0)
        return old if new <= old + lag else new

    @inline
    def raise_max(s_rmem, at, scale_log2e, scale_smem, parity, is_first):
        """Take S into the maximum, which begins with a piece's first block; returns it, and what O is to be multiplied by."""
        old_a, old_b = NO_SCORE, NO_SCORE
        if not is_first:
            old_a, old_b = load_rows(at.row_smem + u32(MAX_SMEM))
        max_a = next_max(old_a, row_max(s_rmem, 0) * scale_log2e, parity)
        max_b = next_max(old_b, row_max(s_rmem, 1) * scale_log2e, parity)
        scale_a, scale_b = ptx.ex2(old_a - max_a), ptx.ex2(old_b - max_b)
        # All 4 threads of a row have read the old one.
        cuda.syncwarp()
        if at.thread & u32(3) == 0:
            store_rows(at.row_smem + u32(MAX_SMEM), max_a, max_b)
            store_rows(at.row_smem + u32(scale_smem), scale_a, scale_b)
        return max_a, max_b, scale_a, scale_b

    @inline
    def rescale(o_rmem, factor_a, factor_b, has_o):
        """O *= factor, by row; not if no row of the warp needs it, nor before a piece's first product, where there is no O."""
        if cuda.any_sync(0xFFFFFFFF, (factor_a != f32(1) or factor_b != f32(1)) and has_o):
            for i in range(32):
                o_rmem[4 * i] *= factor_a
                o_rmem[4 * i + 1] *= factor_a
                o_rmem[4 * i + 2] *= factor_b
                o_rmem[4 * i + 3] *= factor_b

    @inline
    def follow_max(regs, at, scale_smem, has_o):
        """Multiply the sums and O by what the other warpgroup's block has raised the maximum by."""
        scale_a, scale_b = load_rows(at.row_smem + u32(scale_smem))
        regs.sums_rmem[0] *= scale_a
        regs.sums_rmem[1] *= scale_b
        rescale(regs.o_rmem, scale_a, scale_b, has_o)

    @inline
    def exponentiate(regs, scale_log2e, max_a, max_b, scale_a, scale_b):
        """P of S, with the sums of its rows; in 16 bits it is wgmma's A, as the layouts of D and A agree."""
        s_rmem, p_rmem, sums_rmem = regs.s_rmem, regs.p_rmem, regs.sums_rmem
        sums_rmem[0] = sums_rmem[0] * scale_a + exp_row(s_rmem, 0, scale_log2e, max_a)
        sums_rmem[1] = sums_rmem[1] * scale_b + exp_row(s_rmem, 1, scale_log2e, max_b)
        for i in range(8):
            p_rmem[2 * i] = to_pair(s_rmem[4 * i + 1], s_rmem[4 * i])
            p_rmem[2 * i + 1] = to_pair(s_rmem[4 * i + 3], s_rmem[4 * i + 2])

    @inline
    def exchange_sums(sums_rmem, at):
        """Row sums over the 4 threads of a row and both warpgroups; returns the last maximum of the thread's two rows."""
        # The side, anew: kept over the steps it would cost a register that O needs.
        side = ptx.opaque_b32(u32(cuda.threadIdx.x)) >> u32(7)
        for half in range(2):
            total = sums_rmem[half] + cuda.shfl_xor_sync(0xFFFFFFFF, sums_rmem[half], 1)
            sums_rmem[half] = total + cuda.shfl_xor_sync(0xFFFFFFFF, total, 2)
        if at.thread & u32(3) == 0:
            store_rows(at.row_smem + u32(SUM_SMEM) + side * u32(4 * BLOCK_M), sums_rmem[0], sums_rmem[1])
        # Both warpgroups arrive and wait: each other's sums, and the last maximum.
        ptx.bar_sync(u32(SUMS), u32(NUM_CONSUMERS))
        left_a, left_b = load_rows(at.row_smem + u32(SUM_SMEM))
        right_a, right_b = load_rows(at.row_smem + u32(SUM_SMEM + 4 * BLOCK_M))
        sums_rmem[0], sums_rmem[1] = left_a + right_a, left_b + right_b
        return load_rows(at.row_smem + u32(MAX_SMEM))

    @inline
    def piece_words(base, parity):
        """Where the words of the piece lie. From an opaque address: kept over the steps they would cost a register that O needs."""
        return u32(ptx.opaque_b32(base) + u32(PIECE_SMEM) + (parity & u32(PIECE_BYTES)))

    @inline
    def visible_to(row, seq_len, q_len, problem):
        """Tokens that a packed row sees; a row that is none sees all, so that it makes no block a masked one."""
        if problem.causal == 0 or row >= i32(q_len * problem.heads_per_kv):
            return seq_len
        # Unsigned, lest the division be one of 64 bits.
        return i32(seq_len - (q_len - i32(1) - i32(u32(row) // u32(problem.heads_per_kv))))

    @inline
    def mask(s_rmem, first_token, visible_a, visible_b, thread):
        """Scores of tokens that a row does not see become -inf."""
        token = i32(first_token + i32((thread & u32(3)) * u32(2)))
        seen_a, seen_b = i32(visible_a - token), i32(visible_b - token)
        for i in range(8):
            for c in range(2):
                # In 32 bits: a sum with a constant would have 64.
                if seen_a <= i32(8 * i + c):
                    s_rmem[4 * i + c] = MINUS_INFINITY
                if seen_b <= i32(8 * i + c):
                    s_rmem[4 * i + 2 + c] = MINUS_INFINITY

    @inline
    def row_offset(tile, row):
        """Where a row of one of the eight tiles of V lies in a block."""
        if PAGES_PER_BLOCK == 1:
            return tile * u32(TILE_BYTES) + row * u32(128)
        side = tile // u32(LEFT_TILES)
        atom = row // u32(ATOM_ROWS) * (u32(NEXT_ATOM[1]) if side else u32(NEXT_ATOM[0])) + row % u32(ATOM_ROWS) * u32(128)
        return side * u32(LEFT_TILES * TILE_BYTES) + tile % u32(LEFT_TILES) * u32(NEXT_TILE) + atom

    @inline
    def zero_tail(k_smem, num_tokens, thread, barrier_idx):
        """Zero the rows of V past the request's end, where the cache may hold NaN, which even P = 0 would let through."""
        # All 4 warps of this warpgroup, whose wgmma have read these rows as K.
        ptx.bar_sync(u32(barrier_idx), u32(128))
        chunk = thread & u32(63)
        for row in range(i32(num_tokens + i32(thread >> u32(6))), i32(BLOCK_N), i32(2)):
            address = k_smem + row_offset(chunk >> u32(3), u32(row)) + ((chunk & u32(7)) << u32(4))
            ptx.st_shared_v4_b32(address, u32(0), u32(0), u32(0), u32(0))
        # All 4 warps of this warpgroup, before its wgmma reads the rows as V; the other warpgroup's waits for P. `store_p`, which comes
        # before either product, has the proxy fence.
        ptx.bar_sync(u32(barrier_idx), u32(128))

    @inline
    def hide_unseen(s_rmem, k_smem, first_token, all_see, parity, at, problem, barrier_idx):
        """Mask the block if a row of the tile does not see all of it. Nothing is in flight here."""
        if first_token > i32(all_see - i32(BLOCK_N)):
            # Of the few blocks at a request's end; what is read again here need not be kept in registers.
            words = piece_words(at.base, parity)
            seq_len, q_len = ptx.ld_shared_i32(words + u32(PIECE_SEQ_LEN)), ptx.ld_shared_i32(words + u32(PIECE_Q_LEN))
            tile_row = (at.thread >> u32(5)) * u32(16) + ((at.thread & u32(31)) >> u32(2))
            row = i32(ptx.ld_shared_i32(words + u32(PIECE_ROW_BEGIN)) + i32(tile_row))
            visible_a, visible_b = visible_to(row, seq_len, q_len, problem), visible_to(i32(row + i32(8)), seq_len, q_len, problem)
            mask(s_rmem, first_token, visible_a, visible_b, at.thread)
            if first_token > i32(seq_len - i32(BLOCK_N)):
                zero_tail(k_smem, i32(seq_len - first_token), at.thread, barrier_idx)

    return SimpleNamespace(load_rows=load_rows, store_rows=store_rows, raise_max=raise_max, next_max=next_max, follow_max=follow_max,
                           rescale=rescale, exponentiate=exponentiate, exchange_sums=exchange_sums, visible_to=visible_to,
                           hide_unseen=hide_unseen, zero_tail=zero_tail, piece_words=piece_words)
