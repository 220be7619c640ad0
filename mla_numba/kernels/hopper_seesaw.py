"""The schedule where two row tiles or more read a block: two warpgroups that take turns between the tensor core and the exponentials.

With even block j, odd block j + 1:

    warpgroup 0 (O left)   | mask, max, exp P0 | O_l += P0 V0_l | P0 to smem | O_l += P1 V1_l, S = Q K(j+2)      |
    warpgroup 1 (O right)  |     S = Q K(j+1)        | mask, max, exp P1 | O_r += P1 V1_r, O_r += P0 V0_r | S = ... |
    warpgroup 2, one warp  | TMA: K0 left, K1 right, K0 right, K1 left side, each as its last reader is done              |

While one warpgroup exponentiates, the other one's products keep the tensor core busy ("seesaw"). The running maximum goes 0 -> 1 -> 0
through max_smem, and only follows where a row grew by more than 2^8.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from .. import ptx
from .hopper_config import (
    BLOCK_N,
    K0_SMEM,
    K1_SMEM,
    LEFT_TILES,
    MAX_SMEM,
    NEXT_STEP,
    NO_SCORE,
    NUM_CONSUMERS,
    P0_MAX,
    P0_SMEM,
    P0_STORED,
    P1_MAX,
    P1_SMEM,
    P1_STORED,
    SCALE0_SMEM,
    SCALE1_SMEM,
    TILE_BYTES,
    WARPGROUP,
    inline,
)

i32, u32, f32 = np.int32, np.uint32, np.float32


def make_seesaw(products: SimpleNamespace, softmax: SimpleNamespace, release_q: Callable[..., None]) -> tuple[Callable[..., None], ...]:
    """(attend_even, attend_odd): what warpgroup 0 and what warpgroup 1 does of a piece."""
    store_p, pv_rmem, pv_smem, qk_side, qk_block = products.store_p, products.pv_rmem, products.pv_smem, products.qk_side, products.qk_block
    wait_all, wait_all_but_1, release = products.wait_all, products.wait_all_but_1, products.release
    o_fence, s_fence, p_fence = products.o_fence, products.s_fence, products.p_fence
    add_own_pv, add_other_pv = products.add_own_pv, products.add_other_pv
    row_max, exp_row, lagging_max, rescale = softmax.row_max, softmax.exp_row, softmax.lagging_max, softmax.rescale
    raise_max, store_max, load_rows = softmax.raise_max, softmax.store_max, softmax.load_rows
    pack, exponentiate, hide_unseen = softmax.pack, softmax.exponentiate, softmax.hide_unseen

    @inline
    def even_step(regs, at, problem, parity, has_odd, left):
        """Warpgroup 0: softmax of the even block, O_left += P0 V0 + P1 V1, and S of the next even block, if more than two are left. The
        flag is a constant."""
        s_rmem, o_rmem, p_rmem, sums_rmem = regs.s_rmem, regs.o_rmem, regs.p_rmem, regs.sums_rmem
        base, lane, scale_log2e = ptx.opaque_b32(at.base), at.lane, problem.scale_log2e
        k0_smem, k1_smem = base + u32(K0_SMEM), base + u32(K1_SMEM)

        # Softmax.
        max_a, max_b, scale_a, scale_b = raise_max(s_rmem, at, scale_log2e, SCALE0_SMEM, parity)
        # Before anything is exponentiated: in a piece's first step warpgroup 1 waits for it, too.
        # Warpgroup 0 arrives, warpgroup 1 waits: the maximum after the even block, and that Q's tile 8 has been read.
        ptx.bar_arrive(u32(P0_MAX), u32(NUM_CONSUMERS))
        rescale(o_rmem, scale_a, scale_b, parity >= u32(NEXT_STEP))
        exponentiate(regs, scale_log2e, max_a, max_b, scale_a, scale_b)

        # O_left += P0 V0.
        add_own_pv(regs, base, k0_smem, 0, lane)

        # P0, with the maximum after the odd block, for warpgroup 1.
        # Warpgroup 1 arrives, warpgroup 0 waits: the maximum after the odd block; and that it no longer reads P0.
        ptx.bar_sync(u32(P1_MAX), u32(NUM_CONSUMERS))
        scale_a, scale_b = load_rows(at.row_smem + u32(SCALE1_SMEM))
        pack(p_rmem, s_rmem, scale_a, scale_b)
        store_p(p_rmem, base + u32(P0_SMEM), at)
        # Warpgroup 0 arrives, warpgroup 1 waits: P0 and V0 are there.
        ptx.bar_arrive(u32(P0_STORED), u32(NUM_CONSUMERS))

        # O_left += P1 V1, and S of the next even block.
        if has_odd:
            # Warpgroup 1 arrives, warpgroup 0 waits: P1 and V1 are there.
            ptx.bar_sync(u32(P1_STORED), u32(NUM_CONSUMERS))
            rescale(o_rmem, scale_a, scale_b, True)
            sums_rmem[0] *= scale_a
            sums_rmem[1] *= scale_b
            if left > 2:
                # In one arm whole: no branch around products in flight.
                o_fence(o_rmem)
                s_fence(s_rmem)
                pv_smem(o_rmem, base + u32(P1_SMEM), k1_smem, 0)
                qk_side(regs, base, 0, 0, parity, False)
                # Of the two groups in flight P1 V1 is the older one.
                wait_all_but_1()
                o_fence(o_rmem)
                release(base, 1, 0, lane)
                qk_side(regs, base, 0, 1, parity, True)
                wait_all()
                s_fence(s_rmem)
            else:
                add_other_pv(regs, base, base + u32(P1_SMEM), k1_smem, 0, lane)

    @inline
    def odd_step(regs, at, problem, parity, has_odd):
        """Warpgroup 1: softmax of the odd block, O_right += P1 V1 + P0 V0. The flag is a constant."""
        s_rmem, o_rmem, p_rmem, sums_rmem = regs.s_rmem, regs.o_rmem, regs.p_rmem, regs.sums_rmem
        base, lane, scale_log2e = ptx.opaque_b32(at.base), at.lane, problem.scale_log2e
        v0_smem, v1_smem = base + u32(K0_SMEM + LEFT_TILES * TILE_BYTES), base + u32(K1_SMEM + LEFT_TILES * TILE_BYTES)

        # Softmax.
        new_a, new_b = NO_SCORE, NO_SCORE
        if has_odd:
            new_a, new_b = row_max(s_rmem, 0) * scale_log2e, row_max(s_rmem, 1) * scale_log2e
        # Warpgroup 0 arrives, warpgroup 1 waits: the maximum after the even block.
        ptx.bar_sync(u32(P0_MAX), u32(NUM_CONSUMERS))
        old_a, old_b = load_rows(at.row_smem + u32(MAX_SMEM))
        max_a, max_b = lagging_max(old_a, new_a, parity), lagging_max(old_b, new_b, parity)
        scale_a, scale_b = ptx.ex2(old_a - max_a), ptx.ex2(old_b - max_b)
        scale0_a, scale0_b = load_rows(at.row_smem + u32(SCALE0_SMEM))
        both_a, both_b = scale_a * scale0_a, scale_b * scale0_b
        store_max(at, SCALE1_SMEM, max_a, max_b, scale_a, scale_b)
        # Warpgroup 1 arrives, warpgroup 0 waits: the maximum after the odd block; P0's former use is over.
        ptx.bar_arrive(u32(P1_MAX), u32(NUM_CONSUMERS))
        sums_rmem[0] *= both_a
        sums_rmem[1] *= both_b
        if has_odd:
            sums_rmem[0] += exp_row(s_rmem, 0, scale_log2e, max_a)
            sums_rmem[1] += exp_row(s_rmem, 1, scale_log2e, max_b)
        rescale(o_rmem, both_a, both_b, parity >= u32(NEXT_STEP))

        # O_right += P1 V1 + P0 V0; P1 for warpgroup 0.
        if has_odd:
            pack(p_rmem, s_rmem, f32(1), f32(1))
            o_fence(o_rmem)
            p_fence(p_rmem)
            pv_rmem(o_rmem, p_rmem, v1_smem, 1)
            store_p(p_rmem, base + u32(P1_SMEM), at)
        else:
            o_fence(o_rmem)
        # Warpgroup 0 arrives, warpgroup 1 waits: P0 and V0 are there.
        ptx.bar_sync(u32(P0_STORED), u32(NUM_CONSUMERS))
        pv_smem(o_rmem, base + u32(P0_SMEM), v0_smem, 1)
        if has_odd:
            # Warpgroup 1 arrives, warpgroup 0 waits: P1 and V1 are there.
            ptx.bar_arrive(u32(P1_STORED), u32(NUM_CONSUMERS))
            wait_all_but_1()
            p_fence(p_rmem)
            release(base, 1, 1, lane)
        wait_all()
        o_fence(o_rmem)
        release(base, 0, 1, lane)

    @inline
    def attend_even(regs, at, problem, begin_block, num_blocks, all_see, parity):
        """Warpgroup 0's part of a piece; returns the parity of its buffer's next use."""
        token, left = begin_block * i32(BLOCK_N), num_blocks
        qk_block(regs, at.base, 0, parity)
        while True:
            parity = u32(parity ^ u32(1))
            hide_unseen(regs.s_rmem, ptx.opaque_b32(at.base) + u32(K0_SMEM), token, all_see, parity, at, problem, WARPGROUP)
            if left < 2:
                break
            even_step(regs, at, problem, parity, True, left)
            parity = u32(parity + u32(NEXT_STEP))
            token += i32(2 * BLOCK_N)
            left -= i32(2)
            if left == 0:
                break
        if left == 1:
            release_q(at.base, at.lane, u32(0), True)
            even_step(regs, at, problem, parity, False, left)
        return parity

    @inline
    def attend_odd(regs, at, problem, begin_block, num_blocks, all_see, parity):
        """Warpgroup 1's part of a piece; returns the parity of its buffer's next use."""
        token, left = begin_block * i32(BLOCK_N) + i32(BLOCK_N), num_blocks
        while left > 1:
            qk_block(regs, at.base, 1, parity)
            parity = u32(parity ^ u32(1))
            hide_unseen(regs.s_rmem, ptx.opaque_b32(at.base) + u32(K1_SMEM), token, all_see, parity, at, problem, WARPGROUP + 1)
            odd_step(regs, at, problem, parity, True)
            parity = u32(parity + u32(NEXT_STEP))
            token += i32(2 * BLOCK_N)
            left -= i32(2)
        if left == 1:
            release_q(at.base, at.lane, u32(0), True)
            odd_step(regs, at, problem, parity, False)
        return parity

    return attend_even, attend_odd
