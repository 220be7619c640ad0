"""The schedule where two row tiles or more read a block: two warpgroups that take turns between the tensor core and the exponentials.

With even block j, odd block j + 1:

    warpgroup 0   | max, exp P0 | O_left += P0 V0_left    | O_left += P1 V1_left, S = Q K(j + 2)            | max, exp P0 | ...
                                v P0_STORED               ^ P1_STORED                            v S0_ASKED
    warpgroup 1   | S = Q K1    | O_right += P0 V0_right, max, exp P1 | O_right += P1 V1_right   | S = Q K1    | ...
    warpgroup 2, one warp  TMA: K0 left, K0 right, K1 right, K1 left side, each as its last reader is done

While one warpgroup exponentiates, the other one's products keep the tensor core busy ("seesaw"), and S of the odd block waits until that
of the even one has been asked for: if the two shared the tensor core, both would end late, and both warpgroups exponentiate at once.
P0 is of the maximum after the even block, P1 of that after the odd one; whoever stores a P has written the maximum, and what O is to be
multiplied by.
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
    NEXT_STEP,
    NUM_CONSUMERS,
    P0_FREE,
    P0_SMEM,
    P0_STORED,
    P1_SMEM,
    P1_STORED,
    S0_ASKED,
    SCALE0_SMEM,
    SCALE1_SMEM,
    TILE_BYTES,
    WARPGROUP,
    inline,
)

i32, u32, f32 = np.int32, np.uint32, np.float32


def make_seesaw(products: SimpleNamespace, softmax: SimpleNamespace, release_q: Callable[..., None]) -> tuple[Callable[..., None], ...]:
    """(attend_even, attend_odd): what warpgroup 0 and what warpgroup 1 does of a piece."""
    qk_side, ask_qk, await_qk, qk_block = products.qk_side, products.ask_qk, products.await_qk, products.qk_block
    store_p, pv_smem = products.store_p, products.pv_smem
    wait_all, wait_all_but_1, release = products.wait_all, products.wait_all_but_1, products.release
    o_fence, s_fence, add_own_pv, add_other_pv = products.o_fence, products.s_fence, products.add_own_pv, products.add_other_pv
    hide_unseen, raise_max, follow_max = softmax.hide_unseen, softmax.raise_max, softmax.follow_max
    exponentiate, rescale = softmax.exponentiate, softmax.rescale

    @inline
    def even_step(regs, at, problem, parity, left):
        """Warpgroup 0: softmax of the even block, O_left += P0 V0 + P1 V1, and S of the next even block, if more than two are left."""
        s_rmem, o_rmem = regs.s_rmem, regs.o_rmem
        base, lane, scale_log2e = ptx.opaque_b32(at.base), at.lane, problem.scale_log2e
        k0_smem, k1_smem = base + u32(K0_SMEM), base + u32(K1_SMEM)

        # Softmax.
        is_first = parity < u32(NEXT_STEP)
        if is_first:
            # Warpgroup 1 arrives, warpgroup 0 waits: the last maximum of the piece before has been read, and its results have left P0's
            # place. (Later K0's right side, loaded anew, says that P0 has been read.)
            ptx.bar_sync(u32(P0_FREE), u32(NUM_CONSUMERS))
        max_a, max_b, scale_a, scale_b = raise_max(s_rmem, at, scale_log2e, SCALE0_SMEM, parity, is_first)
        exponentiate(regs, scale_log2e, max_a, max_b, scale_a, scale_b)

        # P0 for warpgroup 1.
        store_p(regs.p_rmem, base + u32(P0_SMEM), at)
        # Warpgroup 0 arrives, warpgroup 1 waits: P0, V0, maximum and scale are there.
        ptx.bar_arrive(u32(P0_STORED), u32(NUM_CONSUMERS))

        # O_left += P0 V0.
        rescale(o_rmem, scale_a, scale_b, not is_first)
        add_own_pv(regs, base, k0_smem, 0, lane, True)

        # O_left += P1 V1, and S of the next even block.
        if left > 1:
            # Warpgroup 1 arrives, warpgroup 0 waits: P1, V1, maximum and scale are there.
            ptx.bar_sync(u32(P1_STORED), u32(NUM_CONSUMERS))
            follow_max(regs, at, SCALE1_SMEM, True)
            if left > 2:
                # In one arm whole: no branch around products in flight.
                o_fence(o_rmem)
                s_fence(s_rmem)
                pv_smem(o_rmem, base + u32(P1_SMEM), k1_smem, 0, True)
                qk_side(regs, base, 0, 0, parity, False)
                # Of the two groups in flight P1 V1 is the older one.
                wait_all_but_1()
                o_fence(o_rmem)
                release(base, 1, 0, lane)
                qk_side(regs, base, 0, 1, parity, True)
                # Warpgroup 0 arrives, warpgroup 1 waits: the tensor core has been asked for S of the even block.
                ptx.bar_arrive(u32(S0_ASKED), u32(NUM_CONSUMERS))
                await_qk(regs)
            else:
                add_other_pv(regs, base, base + u32(P1_SMEM), k1_smem, 0, lane, True)

    @inline
    def odd_step(regs, at, problem, parity, left):
        """Warpgroup 1: O_right += P0 V0, softmax of the odd block under it, O_right += P1 V1."""
        s_rmem, o_rmem = regs.s_rmem, regs.o_rmem
        base, lane, scale_log2e = ptx.opaque_b32(at.base), at.lane, problem.scale_log2e
        v0_smem, v1_smem = base + u32(K0_SMEM + LEFT_TILES * TILE_BYTES), base + u32(K1_SMEM + LEFT_TILES * TILE_BYTES)

        # Warpgroup 0 arrives, warpgroup 1 waits: P0, V0, maximum and scale are there.
        ptx.bar_sync(u32(P0_STORED), u32(NUM_CONSUMERS))
        follow_max(regs, at, SCALE0_SMEM, parity >= u32(NEXT_STEP))
        if left > 1:
            # O_right += P0 V0, and softmax.
            o_fence(o_rmem)
            pv_smem(o_rmem, base + u32(P0_SMEM), v0_smem, 1, True)
            max_a, max_b, scale_a, scale_b = raise_max(s_rmem, at, scale_log2e, SCALE1_SMEM, parity, False)
            exponentiate(regs, scale_log2e, max_a, max_b, scale_a, scale_b)

            # P1 for warpgroup 0.
            store_p(regs.p_rmem, base + u32(P1_SMEM), at)
            # Warpgroup 1 arrives, warpgroup 0 waits: P1, V1, maximum and scale are there.
            ptx.bar_arrive(u32(P1_STORED), u32(NUM_CONSUMERS))
            wait_all()
            o_fence(o_rmem)
            release(base, 0, 1, lane)

            # O_right += P1 V1.
            rescale(o_rmem, scale_a, scale_b, True)
            add_own_pv(regs, base, v1_smem, 1, lane, True)
        else:
            add_other_pv(regs, base, base + u32(P0_SMEM), v0_smem, 1, lane, True)

    @inline
    def attend_even(regs, at, problem, begin_block, num_blocks, all_see, parity):
        """Warpgroup 0's part of a piece; returns the parity of its buffer's next use."""
        token, left = i32(begin_block * i32(BLOCK_N)), num_blocks
        ask_qk(regs, at.base, 0, parity)
        # Warpgroup 0 arrives, warpgroup 1 waits: the tensor core has been asked for S of the even block.
        ptx.bar_arrive(u32(S0_ASKED), u32(NUM_CONSUMERS))
        await_qk(regs)
        while left > 0:
            parity = u32(parity ^ u32(1))
            hide_unseen(regs.s_rmem, ptx.opaque_b32(at.base) + u32(K0_SMEM), token, all_see, parity, at, problem, WARPGROUP)
            if left == 1:
                release_q(at.base, at.lane, u32(0), True)
            even_step(regs, at, problem, parity, left)
            parity = u32(parity + u32(NEXT_STEP))
            token, left = i32(token + i32(2 * BLOCK_N)), i32(left - i32(2))
        return parity

    @inline
    def attend_odd(regs, at, problem, begin_block, num_blocks, all_see, parity):
        """Warpgroup 1's part of a piece; returns the parity of its buffer's next use."""
        token, left = i32((begin_block + i32(1)) * i32(BLOCK_N)), num_blocks
        # Warpgroup 1 arrives, warpgroup 0 waits: the piece before's maximum has been read, and its results have left P0's place.
        ptx.bar_arrive(u32(P0_FREE), u32(NUM_CONSUMERS))
        while left > 0:
            # Warpgroup 0 arrives, warpgroup 1 waits: the tensor core has been asked for S of the even block.
            ptx.bar_sync(u32(S0_ASKED), u32(NUM_CONSUMERS))
            if left > 1:
                qk_block(regs, at.base, 1, parity)
                parity = u32(parity ^ u32(1))
                hide_unseen(regs.s_rmem, ptx.opaque_b32(at.base) + u32(K1_SMEM), token, all_see, parity, at, problem, WARPGROUP + 1)
            else:
                release_q(at.base, at.lane, u32(0), True)
            odd_step(regs, at, problem, parity, left)
            parity = u32(parity + u32(NEXT_STEP))
            token, left = i32(token + i32(2 * BLOCK_N)), i32(left - i32(2))
        return parity

    return attend_even, attend_odd
