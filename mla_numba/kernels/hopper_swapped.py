"""The schedule of few rows: hopper_stream's, with tokens as the M of wgmma and rows as its N, so that 64 rows need not be padding.

    S^T = K Q^T        64 tokens x num_rows; a warp has 16 tokens
    O^T += V^T P^T     columns of O x num_rows; of each of the four tiles of its warpgroup a warp has 16 columns

    shared     Q 9 tiles of num_rows rows | maxima of 8 warps | sums of 8 warps | results | K0 | K1 | P0 and P1 in P0's tile | as ever
    registers  O 2 num_rows, S num_rows / 2

A row's maximum is one over the four warps of a warpgroup, by way of shared memory, where wgmma of both warpgroups reads P, too. A thread
has rows 2 (lane % 4), the next, and those 8, 16, 24 further; S, O and sums of a row lie in the same threads, so that O is rescaled without
a shuffle. O is a quarter or half of the registers of 64 rows, and so is all that begins, rescales and stores it.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from numba import cuda
from numba.cuda import types

from .. import ptx
from .hopper_config import (
    BLOCK_N,
    FULL_SMEM,
    K_STEPS,
    MAX_SMEM,
    MINUS_INFINITY,
    NEXT_STEP,
    NO_SCORE,
    NUM_CONSUMERS,
    NUM_WARPS,
    P0_FREE,
    P0_SMEM,
    PIECE_Q_LEN,
    PIECE_ROW_BEGIN,
    PIECE_SEQ_LEN,
    Q_SMEM,
    SIDE_BEGIN,
    SIDE_TILES,
    SUMS,
    TILE_BYTES,
    WARP_MAX_SMEM,
    WARP_SUM_SMEM,
    WARPGROUP,
    HopperConfig,
    inline,
)
from .hopper_products import NEXT_COLUMNS
from .hopper_stream import K_SMEM, P_STORED, SCALE_SMEM, V_BEGIN, walk_blocks

i32, u32, u64, f32 = np.int32, np.uint32, np.uint64, np.float32


@inline
def row_of(lane, i):
    """A thread's row i."""
    return (lane & u32(3)) * u32(2) + u32(8 * (i // 2) + i % 2)


def make_swapped(config: HopperConfig, products: SimpleNamespace, softmax: SimpleNamespace,
                 release_q: Callable[..., None]) -> tuple[Callable[..., None], ...]:
    """(begin_o, clear_o, attend_even, attend_odd, exchange_sums): O at a piece's begin, and of one without blocks; what warpgroup 0 and
    what warpgroup 1 does of a piece, and both at its end."""
    NUM_ROWS = config.num_rows
    # Of a thread: rows, and pairs of them; registers of a tile of O.
    ROWS, PAIRS, TILE_FLOATS = NUM_ROWS // 4, NUM_ROWS // 8, NUM_ROWS // 2
    P_SMEM = (P0_SMEM, P0_SMEM + config.q_tile_bytes)
    to_pair = ptx.cvt_bf16x2 if config.dtype == "bfloat16" else ptx.cvt_f16x2
    wgmma_qk = ptx.make_wgmma(NUM_ROWS, config.dtype)
    wgmma_pv = ptx.make_wgmma(NUM_ROWS, config.dtype, a_transposed=True)
    wait_all, release = products.wait_all, products.release
    tile_fence, tile_begin = ptx.make_registers_fence(TILE_FLOATS), ptx.make_registers_begin(TILE_FLOATS)
    # A transposed A's form is a transposed B's.
    descriptor, K_MAJOR, SIDE_K_MAJOR, SIDE_MN_MAJOR = products.descriptor, products.K_MAJOR, products.SIDE_K_MAJOR, products.SIDE_MN_MAJOR
    NEXT_Q_TILE, NEXT_K_TILE, NEXT_TOKENS = config.q_tile_bytes >> 4, products.NEXT_K_TILE, products.NEXT_ROWS
    # Where a side of a block begins.
    SIDE_OFFSET = tuple(begin * TILE_BYTES >> 4 for begin in SIDE_BEGIN)
    piece_words, visible_to, zero_tail, next_max = softmax.piece_words, softmax.visible_to, softmax.zero_tail, softmax.next_max

    @inline
    def o_fence(o_rmem):
        tile_fence(o_rmem.t0)
        tile_fence(o_rmem.t1)
        tile_fence(o_rmem.t2)
        tile_fence(o_rmem.t3)

    @inline
    def begin_o(o_rmem):
        """Anything: the first product begins O."""
        tile_begin(o_rmem.t0)
        tile_begin(o_rmem.t1)
        tile_begin(o_rmem.t2)
        tile_begin(o_rmem.t3)

    @inline
    def clear_o(o_rmem):
        """O = 0."""
        for i in range(TILE_FLOATS):
            o_rmem.t0[i], o_rmem.t1[i], o_rmem.t2[i], o_rmem.t3[i] = f32(0), f32(0), f32(0), f32(0)

    @inline
    def load_rows(values, address):
        """What lies there for this thread's rows."""
        for i in range(ROWS):
            values[i] = ptx.ld_shared_f32(address + u32(4 * (8 * (i // 2) + i % 2)))

    @inline
    def store_rows(address, values):
        for i in range(ROWS):
            ptx.st_shared_f32(address + u32(4 * (8 * (i // 2) + i % 2)), values[i])

    @inline
    def qk_side(s_rmem, base, buffer, side, parity, accumulate):
        """S^T (+)= K Q^T over the dims of one side of a block. A group."""
        # Producer's TMA of this side; bit 0 of `parity` is of the buffer's use.
        ptx.mbarrier_wait_parity(base + u32(FULL_SMEM + (buffer * 2 + side) * 8), parity & u32(1))
        q_desc = descriptor(K_MAJOR, base + u32(Q_SMEM)) + u64(SIDE_BEGIN[side] * NEXT_Q_TILE)
        k_desc = descriptor(SIDE_K_MAJOR[side], base + u32(K_SMEM[buffer])) + u64(SIDE_OFFSET[side])
        ptx.wgmma_fence()
        for tile in range(SIDE_TILES[side]):
            for k in range(K_STEPS):
                wgmma_qk(s_rmem, k_desc + u64(tile * NEXT_K_TILE + k * NEXT_COLUMNS),
                         q_desc + u64(tile * NEXT_Q_TILE + k * NEXT_COLUMNS), u32(1) if tile > 0 or k > 0 else u32(accumulate))
        ptx.wgmma_commit_group()

    @inline
    def qk_block(s_rmem, base, wg, parity):
        """S^T of the block in this warpgroup's buffer, its sides in the order in which they come."""
        tile_fence(s_rmem)
        qk_side(s_rmem, base, wg, wg, parity, False)
        qk_side(s_rmem, base, wg, 1 - wg, parity, True)
        wait_all()
        tile_fence(s_rmem)

    @inline
    def add_pv(o_rmem, base, buffer, wg, lane, accumulate):
        """O^T (+)= V^T P^T of this warpgroup's columns of a block, whose side of V is free then."""
        p_desc = descriptor(K_MAJOR, base + u32(P_SMEM[buffer]))
        v_desc = descriptor(SIDE_MN_MAJOR[wg], base + u32(K_SMEM[buffer] + V_BEGIN[wg]))
        o_fence(o_rmem)
        ptx.wgmma_fence()
        for k in range(K_STEPS):
            tokens, p_tokens, adds = v_desc + u64(k * NEXT_TOKENS[wg]), p_desc + u64(k * NEXT_COLUMNS), u32(1) if k > 0 else u32(accumulate)
            wgmma_pv(o_rmem.t0, tokens, p_tokens, adds)
            wgmma_pv(o_rmem.t1, tokens + u64(NEXT_K_TILE), p_tokens, adds)
            wgmma_pv(o_rmem.t2, tokens + u64(2 * NEXT_K_TILE), p_tokens, adds)
            wgmma_pv(o_rmem.t3, tokens + u64(3 * NEXT_K_TILE), p_tokens, adds)
        ptx.wgmma_commit_group()
        wait_all()
        o_fence(o_rmem)
        release(base, buffer, wg, lane)

    @inline
    def hide_unseen(s_rmem, k_smem, first_token, all_see, parity, at, problem, barrier_idx):
        """Mask the block if a row does not see all of it. Nothing is in flight here."""
        if first_token > i32(all_see - i32(BLOCK_N)):
            words = piece_words(at.base, parity)
            seq_len, q_len = ptx.ld_shared_i32(words + u32(PIECE_SEQ_LEN)), ptx.ld_shared_i32(words + u32(PIECE_Q_LEN))
            # Each lane looks at a row.
            row = i32(ptx.ld_shared_i32(words + u32(PIECE_ROW_BEGIN)) + i32(at.lane & u32(NUM_ROWS - 1)))
            visible = i32(visible_to(row, seq_len, q_len, problem) - first_token - i32((at.thread >> u32(5)) * u32(16)))
            for i in range(ROWS):
                seen = i32(cuda.shfl_sync(0xFFFFFFFF, visible, i32(row_of(at.lane, i))) - i32(at.lane >> u32(2)))
                if seen <= i32(0):
                    s_rmem[4 * (i // 2) + i % 2] = MINUS_INFINITY
                if seen <= i32(8):
                    s_rmem[4 * (i // 2) + 2 + i % 2] = MINUS_INFINITY
            if first_token > i32(seq_len - i32(BLOCK_N)):
                zero_tail(k_smem, i32(seq_len - first_token), at.thread, barrier_idx)

    @inline
    def block_max(max_rmem, s_rmem, at, wg):
        """Maxima of this warp's tokens, to where the other warps of the warpgroup find them."""
        for i in range(ROWS):
            value = max(s_rmem[4 * (i // 2) + i % 2], s_rmem[4 * (i // 2) + 2 + i % 2])
            value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, 4))
            value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, 8))
            max_rmem[i] = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, 16))
        if at.lane < u32(4):
            store_rows(at.row_smem + u32(WARP_MAX_SMEM + wg * 4 * 4 * NUM_ROWS) + (at.thread >> u32(5)) * u32(4 * NUM_ROWS), max_rmem)

    @inline
    def raise_max(max_rmem, scale_rmem, at, wg, scale_log2e, parity, is_first):
        """The maximum after this block, and what O is to be multiplied by: 4 warps' maxima, and the one before."""
        for w in range(4):
            load_rows(scale_rmem, at.row_smem + u32(WARP_MAX_SMEM + (wg * 4 + w) * 4 * NUM_ROWS))
            for i in range(ROWS):
                max_rmem[i] = max(max_rmem[i], scale_rmem[i])
        for i in range(ROWS):
            scale_rmem[i] = NO_SCORE
        if not is_first:
            load_rows(scale_rmem, at.row_smem + u32(MAX_SMEM))
        for i in range(ROWS):
            max_rmem[i] = next_max(scale_rmem[i], max_rmem[i] * scale_log2e, parity)
            scale_rmem[i] = ptx.ex2(scale_rmem[i] - max_rmem[i])

    @inline
    def exponentiate(s_rmem, sums_rmem, max_rmem, scale_rmem, scale_log2e):
        """P^T of S^T, with this thread's part of the rows' sums."""
        for i in range(ROWS):
            a = ptx.ex2(s_rmem[4 * (i // 2) + i % 2] * scale_log2e - max_rmem[i])
            b = ptx.ex2(s_rmem[4 * (i // 2) + 2 + i % 2] * scale_log2e - max_rmem[i])
            s_rmem[4 * (i // 2) + i % 2] = a
            s_rmem[4 * (i // 2) + 2 + i % 2] = b
            sums_rmem[i] = sums_rmem[i] * scale_rmem[i] + (a + b)

    @inline
    def store_p(s_rmem, p_smem, at):
        """P to shared memory, row by row in the swizzled layout; each warp its own 16 tokens."""
        # Lane l has the place of row l % 8 of matrix l / 8: 8 tokens of 8 rows, then the next 8 tokens, then both of the next 8 rows.
        row = (at.lane >> u32(4)) * u32(8) + (at.lane & u32(7))
        chunk = (at.thread >> u32(5)) * u32(2) + ((at.lane >> u32(3)) & u32(1))
        place = p_smem + row * u32(128) + ((chunk ^ (row & u32(7))) << u32(4))
        for j in range(0, PAIRS, 2):
            ptx.stmatrix_x4_trans(place + u32(8 * j * 128), to_pair(s_rmem[4 * j + 1], s_rmem[4 * j]),
                                  to_pair(s_rmem[4 * j + 3], s_rmem[4 * j + 2]), to_pair(s_rmem[4 * j + 5], s_rmem[4 * j + 4]),
                                  to_pair(s_rmem[4 * j + 7], s_rmem[4 * j + 6]))
        # Before the barriers after which wgmma of both warpgroups reads it.
        ptx.fence_proxy_async_shared()

    @inline
    def rescale(o_rmem, scale_rmem, has_o):
        """O *= scale, by row; not if no row needs it, nor before a piece's first product, where there is no O."""
        needed = scale_rmem[0] != f32(1)
        for i in range(1, ROWS):
            needed = needed | (scale_rmem[i] != f32(1))
        if cuda.any_sync(0xFFFFFFFF, needed and has_o):
            for i in range(ROWS):
                first = 4 * (i // 2) + i % 2
                for half in range(0, 4, 2):
                    o_rmem.t0[first + half] *= scale_rmem[i]
                    o_rmem.t1[first + half] *= scale_rmem[i]
                    o_rmem.t2[first + half] *= scale_rmem[i]
                    o_rmem.t3[first + half] *= scale_rmem[i]

    @inline
    def own_block(regs, at, problem, wg, token, left, all_see, parity):
        """S and P of the block in this warpgroup's own buffer, and its columns of O += P V. The warpgroup is a constant."""
        s_rmem, base, lane, scale_log2e = regs.s_rmem, ptx.opaque_b32(at.base), at.lane, problem.scale_log2e
        max_rmem, scale_rmem = cuda.local.array(ROWS, types.float32), cuda.local.array(ROWS, types.float32)

        # S.
        qk_block(s_rmem, base, wg, parity)
        if wg == 0 and left == 1:
            release_q(base, lane, u32(0), True)
        hide_unseen(s_rmem, base + u32(K_SMEM[wg]), token, all_see, parity, at, problem, WARPGROUP + wg)

        # Softmax.
        is_first = wg == 0 and parity < u32(NEXT_STEP)
        block_max(max_rmem, s_rmem, at, wg)
        if is_first:
            # Warpgroup 1 arrives, warpgroup 0 waits: the last maximum of the piece before has been read. (Later P1_STORED says that P0
            # has been read.)
            ptx.bar_sync(u32(P0_FREE), u32(NUM_CONSUMERS))
        # All 4 warps of this warpgroup: their maxima are there.
        ptx.bar_sync(u32(WARPGROUP + wg), u32(128))
        raise_max(max_rmem, scale_rmem, at, wg, scale_log2e, parity, is_first)
        exponentiate(s_rmem, regs.sums_rmem, max_rmem, scale_rmem, scale_log2e)

        # P for both warpgroups.
        store_p(s_rmem, base + u32(P_SMEM[wg]), at)
        # All 4 warps of this warpgroup: P is there, the old maximum has been read.
        ptx.bar_sync(u32(WARPGROUP + wg), u32(128))
        if at.thread < u32(4):
            store_rows(at.row_smem + u32(MAX_SMEM), max_rmem)
            store_rows(at.row_smem + u32(SCALE_SMEM[wg]), scale_rmem)
        # This warpgroup arrives, the other one waits: P, V, maximum and scale are there.
        ptx.bar_arrive(u32(P_STORED[wg]), u32(NUM_CONSUMERS))

        # O += P V; a piece's first product begins O.
        rescale(regs.o_rmem, scale_rmem, not is_first)
        add_pv(regs.o_rmem, base, wg, wg, lane, not is_first)

    @inline
    def other_block(regs, at, wg, parity):
        """This warpgroup's columns of O += P V, of the block in the other one's buffer. The warpgroup is a constant."""
        base = ptx.opaque_b32(at.base)
        scale_rmem = cuda.local.array(ROWS, types.float32)
        # The other warpgroup arrives, this one waits: P, V, maximum and scale are there.
        ptx.bar_sync(u32(P_STORED[1 - wg]), u32(NUM_CONSUMERS))
        is_first = wg == 1 and parity < u32(NEXT_STEP)
        load_rows(scale_rmem, at.row_smem + u32(SCALE_SMEM[1 - wg]))
        for i in range(ROWS):
            regs.sums_rmem[i] *= scale_rmem[i]
        rescale(regs.o_rmem, scale_rmem, not is_first)
        add_pv(regs.o_rmem, base, 1 - wg, wg, at.lane, not is_first)

    @inline
    def exchange_sums(sums_rmem, at):
        """(Last maximum, sum over all warps) of this lane's row."""
        thread_idx = ptx.opaque_b32(u32(cuda.threadIdx.x))
        for i in range(ROWS):
            total = sums_rmem[i] + cuda.shfl_xor_sync(0xFFFFFFFF, sums_rmem[i], 4)
            total = total + cuda.shfl_xor_sync(0xFFFFFFFF, total, 8)
            sums_rmem[i] = total + cuda.shfl_xor_sync(0xFFFFFFFF, total, 16)
        if at.lane < u32(4):
            store_rows(at.row_smem + u32(WARP_SUM_SMEM) + (thread_idx >> u32(5)) * u32(4 * NUM_ROWS), sums_rmem)
        # Both warpgroups arrive and wait: each other's sums, and the last maximum.
        ptx.bar_sync(u32(SUMS), u32(NUM_CONSUMERS))
        row_smem = at.base + (at.lane & u32(NUM_ROWS - 1)) * u32(4)
        total = f32(0)
        for w in range(NUM_WARPS):
            total += ptx.ld_shared_f32(row_smem + u32(WARP_SUM_SMEM + w * 4 * NUM_ROWS))
        return ptx.ld_shared_f32(row_smem + u32(MAX_SMEM)), total

    return begin_o, clear_o, *walk_blocks(own_block, other_block, release_q), exchange_sums
