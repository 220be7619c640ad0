"""The schedule where one row tile reads a block: memory is the limit, so each block is attended at once, and its buffer is free again soon.

    warpgroup 0   | S = Q K0, P0 | O_left += P0 V0_left   |             | O_left += P1 V1_left   | S = Q K0, P0 | ...
                                 v P0_STORED                            ^ P1_STORED
    warpgroup 1                  | O_right += P0 V0_right | S = Q K1, P1 | O_right += P1 V1_right | ...
    warpgroup 2, one warp  TMA: K0 left, K0 right, K1 right, K1 left side, each as its last reader is done

Of the 4.6 us in which two blocks come from memory the tensor core needs 3.0 (an H200 at 4.27 TB/s, at 790 TFLOPS), so loads are all that
has to overlap. P0 is of the maximum after the even block, P1 of that after the odd one; whoever stores a P has written the maximum, and
what O is to be multiplied by.
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
    SCALE0_SMEM,
    SCALE1_SMEM,
    TILE_BYTES,
    WARPGROUP,
    inline,
)

i32, u32 = np.int32, np.uint32

# By buffer: a block of K, its P, what that block multiplies O by, and the barrier at which these are there.
K_SMEM, P_SMEM, SCALE_SMEM, P_STORED = (K0_SMEM, K1_SMEM), (P0_SMEM, P1_SMEM), (SCALE0_SMEM, SCALE1_SMEM), (P0_STORED, P1_STORED)
# By warpgroup: where its columns of V begin in a block.
V_BEGIN = (0, LEFT_TILES * TILE_BYTES)


def make_stream(products: SimpleNamespace, softmax: SimpleNamespace, release_q: Callable[..., None]) -> tuple[Callable[..., None], ...]:
    """(attend_even, attend_odd): what warpgroup 0 and what warpgroup 1 does of a piece."""
    qk_block, store_p, add_own_pv, add_other_pv = products.qk_block, products.store_p, products.add_own_pv, products.add_other_pv
    hide_unseen, raise_max, follow_max = softmax.hide_unseen, softmax.raise_max, softmax.follow_max
    exponentiate, rescale = softmax.exponentiate, softmax.rescale

    @inline
    def own_block(regs, at, problem, wg, token, left, all_see, parity):
        """S and P of the block in this warpgroup's own buffer, and its columns of O += P V. The warpgroup is a constant."""
        s_rmem, base, lane, scale_log2e = regs.s_rmem, ptx.opaque_b32(at.base), at.lane, problem.scale_log2e

        # S.
        qk_block(regs, base, wg, parity)
        if wg == 0 and left == 1:
            release_q(base, lane, u32(0), True)
        hide_unseen(s_rmem, base + u32(K_SMEM[wg]), token, all_see, parity, at, problem, WARPGROUP + wg)

        # Softmax.
        is_first = wg == 0 and parity < u32(NEXT_STEP)
        if is_first:
            # Warpgroup 1 arrives, warpgroup 0 waits: the last maximum of the piece before has been read, and its results have left P0's
            # place. (Later P1_STORED says that P0 has been read.)
            ptx.bar_sync(u32(P0_FREE), u32(NUM_CONSUMERS))
        max_a, max_b, scale_a, scale_b = raise_max(s_rmem, at, scale_log2e, SCALE_SMEM[wg], parity, is_first)
        exponentiate(regs, scale_log2e, max_a, max_b, scale_a, scale_b)

        # P for the other warpgroup.
        store_p(regs.p_rmem, base + u32(P_SMEM[wg]), at)
        # This warpgroup arrives, the other one waits: P, V, maximum and scale are there.
        ptx.bar_arrive(u32(P_STORED[wg]), u32(NUM_CONSUMERS))

        # O += P V; a piece's first product begins O.
        rescale(regs.o_rmem, scale_a, scale_b, not is_first)
        add_own_pv(regs, base, base + u32(K_SMEM[wg] + V_BEGIN[wg]), wg, lane, not is_first)

    @inline
    def other_block(regs, at, wg, parity):
        """This warpgroup's columns of O += P V, of the block in the other one's buffer. The warpgroup is a constant."""
        base = ptx.opaque_b32(at.base)
        # The other warpgroup arrives, this one waits: P, V, maximum and scale are there.
        ptx.bar_sync(u32(P_STORED[1 - wg]), u32(NUM_CONSUMERS))
        is_first = wg == 1 and parity < u32(NEXT_STEP)
        follow_max(regs, at, SCALE_SMEM[1 - wg], not is_first)
        add_other_pv(regs, base, base + u32(P_SMEM[1 - wg]), base + u32(K_SMEM[1 - wg] + V_BEGIN[wg]), wg, at.lane,
                     not is_first)

    return walk_blocks(own_block, other_block, release_q)


def walk_blocks(own_block: Callable[..., None], other_block: Callable[..., None],
                release_q: Callable[..., None]) -> tuple[Callable[..., None], ...]:
    """(attend_even, attend_odd), of what a warpgroup does of the block in its own buffer, and of the one in the other's."""
    @inline
    def attend_even(regs, at, problem, begin_block, num_blocks, all_see, parity):
        """Warpgroup 0's part of a piece; returns the parity of its buffer's next use."""
        token, left = i32(begin_block * i32(BLOCK_N)), num_blocks
        while left > 0:
            own_block(regs, at, problem, 0, token, left, all_see, parity)
            parity = u32(parity ^ u32(1))
            if left > 1:
                other_block(regs, at, 0, parity)
            parity = u32(parity + u32(NEXT_STEP))
            token = i32(token + i32(2 * BLOCK_N))
            left = i32(left - i32(2))
        return parity

    @inline
    def attend_odd(regs, at, problem, begin_block, num_blocks, all_see, parity):
        """Warpgroup 1's part of a piece; returns the parity of its buffer's next use."""
        token, left = i32(begin_block * i32(BLOCK_N) + i32(BLOCK_N)), num_blocks
        # Warpgroup 1 arrives, warpgroup 0 waits: the piece before's maximum has been read, and its results have left P0's place.
        ptx.bar_arrive(u32(P0_FREE), u32(NUM_CONSUMERS))
        while left > 0:
            if left == 1:
                release_q(at.base, at.lane, u32(0), True)
            other_block(regs, at, 1, parity)
            if left > 1:
                own_block(regs, at, problem, 1, token, left, all_see, parity)
                parity = u32(parity ^ u32(1))
            parity = u32(parity + u32(NEXT_STEP))
            token = i32(token + i32(2 * BLOCK_N))
            left = i32(left - i32(2))
        return parity

    return attend_even, attend_odd
