"""Dense MLA decode for Hopper: TMA, wgmma, and two warpgroups that take turns between the tensor core and the exponentials.

A thread block attends 64 packed query rows to pairs of 64-token blocks. Two consumer warpgroups hold O between them, left and right;
a third brings the tiles. With even block j, odd block j + 1:

    warpgroup 0 (O left)   | mask, max, exp P0 | O_l += P0 V0_l | P0 to smem | O_l += P1 V1_l, S = Q K(j+2)      |
    warpgroup 1 (O right)  |     S = Q K(j+1)        | mask, max, exp P1 | O_r += P1 V1_r, O_r += P0 V0_r | S = ... |
    warpgroup 2, one warp  | TMA: K0 left, K1 right, K0 right, K1 left side, each as its last reader is done              |

While one warpgroup exponentiates, the other one's products keep the tensor core busy ("seesaw"). A tile of V is a tile of K: the cache
is read once. The running maximum goes 0 -> 1 -> 0 through max_smem, and only follows where a row grew by more than 2^8.

    shared     Q 9 tiles | K0 9 tiles | K1 9 tiles | P0 1 tile | max, scales, sums, pieces, mbarriers    tile = 64 rows x 128 bytes
               P1 lies in Q's tile 8, which both warpgroups keep in registers (q8_rmem)
    registers  consumers 232: O 128, S 32, P 16, Q tile 8 16, the rest addresses; producer 40

Who waits for whom (see the table in docs/kernel.md; one line each where it happens):

    full[buffer][side]    producer's TMA -> the warpgroup that multiplies Q by that buffer; one phase a use
    empty[buffer][side]   the 4 warps of the side's last reader -> producer; side 0, left, is tiles 0-3, side 1, right, is tiles 4-8
                          In a cluster each producer loads half a side for both blocks: 4 warps of both -> both producers
    q_full, q_empty       producer (piece and Q) -> 8 consumer warps; 8 consumer warps -> producer; one phase a piece
    P0_MAX, P1_MAX, P0_STORED, P1_STORED, SUMS    named barriers of the 256 consumers

This file is the schedule. hopper_load brings the tiles, hopper_products multiplies, hopper_softmax is in between, hopper_store ends a
piece, hopper_config has the numbers.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from .. import ptx
from .hopper_config import (
    BLOCK_M,
    BLOCK_N,
    CONSUMER_REGISTERS,
    EMPTY_SMEM,
    FIRST_MAP,
    FULL_SMEM,
    K0_SMEM,
    K1_SMEM,
    LEFT_TILES,
    MAP_WORDS,
    MAX_SMEM,
    NEXT_ROW,
    NEXT_STEP,
    NO_SCORE,
    NUM_CONSUMERS,
    NUM_WARPS,
    P0_MAX,
    P0_SMEM,
    P0_STORED,
    P1_MAX,
    P1_SMEM,
    P1_STORED,
    PIECE_BEGIN_BLOCK,
    PIECE_BYTES,
    PIECE_NUM_BLOCKS,
    PIECE_Q_LEN,
    PIECE_ROW_BEGIN,
    PIECE_SEQ_LEN,
    PRODUCER_REGISTERS,
    Q_EMPTY_SMEM,
    Q_FULL_SMEM,
    SCALE0_SMEM,
    SCALE1_SMEM,
    SUM_SMEM,
    SUMS,
    TILE_BYTES,
    WARPGROUP,
    Cache,
    HopperConfig,
    Maps,
    Partials,
    Place,
    Problem,
    Registers,
    Results,
    Tables,
    inline,
)
from .hopper_load import make_producer
from .hopper_products import make_products
from .hopper_softmax import make_softmax
from .hopper_store import make_store

i32, u32, f32 = np.int32, np.uint32, np.float32


def decode_signature() -> types.Type:
    """Types of the kernel's arguments, in the order of `hopper_decode`'s."""
    address, stride, i, f = types.uint64, types.int64, types.int32, types.float32
    tensor_map = types.UniTuple(types.uint64, MAP_WORDS)
    return types.void(*[address] * FIRST_MAP, tensor_map, tensor_map, tensor_map, address, stride, stride, i, i, address, stride, stride,
                      stride, i, address, stride, stride, stride, address, stride, stride, stride, i, i, i, f, f)


@cache
def make_decode_kernel(config: HopperConfig) -> Callable[..., None]:
    """The kernel for `config`, not yet compiled. Grid (row tiles of a job, workers, KV heads), NUM_THREADS threads, SMEM_BYTES."""
    first_rows, prefetch_page_ids, produce = make_producer(config)
    (release_q, end_piece, store_piece), products, softmax = make_store(config), make_products(config), make_softmax(config)
    load_q8, store_p, pv_rmem, pv_smem = products.load_q8, products.store_p, products.pv_rmem, products.pv_smem
    qk_side, qk_block = products.qk_side, products.qk_block
    row_max, exp_row, lagging_max, rescale = softmax.row_max, softmax.exp_row, softmax.lagging_max, softmax.rescale
    pack, visible_to, hide_unseen, piece_words = softmax.pack, softmax.visible_to, softmax.hide_unseen, softmax.piece_words
    CLUSTER_SIZE = config.cluster_size
    wait_all, wait_all_but_1 = ptx.make_wgmma_wait_group(0), ptx.make_wgmma_wait_group(1)
    o_fence, s_fence, p_fence = ptx.make_registers_fence(128), ptx.make_registers_fence(32), ptx.make_registers_fence(16, types.uint32)
    take_registers = ptx.make_setmaxnreg("inc", CONSUMER_REGISTERS)
    give_registers = ptx.make_setmaxnreg("dec", PRODUCER_REGISTERS)
    # The maps lie one behind the other.
    q_map_address, left_map_address, right_map_address = (ptx.make_parameter_address(FIRST_MAP + i * MAP_WORDS) for i in range(3))

    @inline
    def release(base, buffer, side, lane):
        """This warp is done with one side of a K buffer. 4 warps of each block that shares it make the phase, the producers wait."""
        if lane == 0:
            mbar = base + u32(EMPTY_SMEM + (buffer * 2 + side) * 8)
            ptx.mbarrier_arrive(mbar)
            if CLUSTER_SIZE > 1:
                ptx.mbarrier_arrive_remote(ptx.mapa_shared_cluster(mbar, ptx.cluster_ctarank() ^ u32(1)))

    @inline
    def load_rows(address):
        """What lies there for this thread's two rows."""
        return ptx.ld_shared_f32(address), ptx.ld_shared_f32(address + u32(NEXT_ROW))

    @inline
    def store_rows(address, a, b):
        ptx.st_shared_f32(address, a)
        ptx.st_shared_f32(address + u32(NEXT_ROW), b)

    @inline
    def even_step(regs, at, problem, parity, has_odd, has_next):
        """Warpgroup 0: softmax of the even block, O_left += P0 V0 + P1 V1, S of the next even block. The flags are constants."""
        s_rmem, o_rmem, p_rmem, sums_rmem = regs.s_rmem, regs.o_rmem, regs.p_rmem, regs.sums_rmem
        base, lane, scale_log2e = ptx.opaque_b32(at.base), at.lane, problem.scale_log2e
        k0_smem, k1_smem = base + u32(K0_SMEM), base + u32(K1_SMEM)

        # Softmax.
        old_a, old_b = load_rows(at.row_smem + u32(MAX_SMEM))
        max_a = lagging_max(old_a, row_max(s_rmem, 0) * scale_log2e, parity)
        max_b = lagging_max(old_b, row_max(s_rmem, 1) * scale_log2e, parity)
        scale_a, scale_b = ptx.ex2(old_a - max_a), ptx.ex2(old_b - max_b)
        cuda.syncwarp()
        if at.thread & u32(3) == 0:
            store_rows(at.row_smem + u32(MAX_SMEM), max_a, max_b)
            store_rows(at.row_smem + u32(SCALE0_SMEM), scale_a, scale_b)
        # Before anything is exponentiated: in a piece's first step warpgroup 1 waits for it, too.
        # Warpgroup 0 arrives, warpgroup 1 waits: the maximum after the even block, and that Q's tile 8 has been read.
        ptx.bar_arrive(u32(P0_MAX), u32(NUM_CONSUMERS))
        rescale(o_rmem, scale_a, scale_b, parity >= u32(NEXT_STEP))
        sums_rmem[0] = sums_rmem[0] * scale_a + exp_row(s_rmem, 0, scale_log2e, max_a)
        sums_rmem[1] = sums_rmem[1] * scale_b + exp_row(s_rmem, 1, scale_log2e, max_b)
        pack(p_rmem, s_rmem, f32(1), f32(1))

        # O_left += P0 V0.
        o_fence(o_rmem)
        p_fence(p_rmem)
        pv_rmem(o_rmem, p_rmem, k0_smem, 0)
        wait_all()
        o_fence(o_rmem)
        p_fence(p_rmem)
        release(base, 0, 0, lane)

        # P0, with the maximum after the odd block, for warpgroup 1.
        # Warpgroup 1 arrives, warpgroup 0 waits: the maximum after the odd block; and that it no longer reads P0.
        ptx.bar_sync(u32(P1_MAX), u32(NUM_CONSUMERS))
        scale_a, scale_b = load_rows(at.row_smem + u32(SCALE1_SMEM))
        pack(p_rmem, s_rmem, scale_a, scale_b)
        store_p(p_rmem, base + u32(P0_SMEM), at)
        # Warpgroup 0 arrives, warpgroup 1 waits: P0 and V0 are there.
        ptx.bar_arrive(u32(P0_STORED), u32(NUM_CONSUMERS))

        # O_left += P1 V1.
        if has_odd:
            # Warpgroup 1 arrives, warpgroup 0 waits: P1 and V1 are there.
            ptx.bar_sync(u32(P1_STORED), u32(NUM_CONSUMERS))
            rescale(o_rmem, scale_a, scale_b, True)
            sums_rmem[0] *= scale_a
            sums_rmem[1] *= scale_b
            o_fence(o_rmem)
            pv_smem(o_rmem, base + u32(P1_SMEM), k1_smem, 0)

        # S of the next even block.
        if has_next:
            s_fence(s_rmem)
            qk_side(regs, base, 0, 0, parity, False)
            # Of the two groups in flight P1 V1 is the older one.
            wait_all_but_1()
            o_fence(o_rmem)
            release(base, 1, 0, lane)
            qk_side(regs, base, 0, 1, parity, True)
            wait_all()
            s_fence(s_rmem)
        elif has_odd:
            wait_all()
            o_fence(o_rmem)
            release(base, 1, 0, lane)

    @inline
    def odd_step(regs, at, problem, parity, has_odd, has_next):
        """Warpgroup 1: softmax of the odd block, O_right += P1 V1 + P0 V0, S of the next odd block. The flags are constants."""
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
        cuda.syncwarp()
        if at.thread & u32(3) == 0:
            store_rows(at.row_smem + u32(MAX_SMEM), max_a, max_b)
            store_rows(at.row_smem + u32(SCALE1_SMEM), scale_a, scale_b)
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

        # S of the next odd block.
        if has_next:
            qk_block(regs, base, 1, parity)

    @inline
    def attend_even(regs, at, problem, begin_block, num_blocks, all_see, parity):
        """Warpgroup 0's part of a piece; returns the parity of its buffer's next use."""
        qk_block(regs, at.base, 0, parity)
        parity = u32(parity ^ u32(1))
        token = begin_block * i32(BLOCK_N)
        left = num_blocks
        while True:
            # Here for all steps: a copy in each was 800 instructions more.
            hide_unseen(regs.s_rmem, ptx.opaque_b32(at.base) + u32(K0_SMEM), token, all_see, parity, at, problem, WARPGROUP)
            if left <= 2:
                break
            even_step(regs, at, problem, parity, True, True)
            parity = u32((parity ^ u32(1)) + u32(NEXT_STEP))
            token += i32(2 * BLOCK_N)
            left -= i32(2)
        if left == 2:
            even_step(regs, at, problem, parity, True, False)
        else:
            release_q(at.base, at.lane, u32(0), True)
            even_step(regs, at, problem, parity, False, False)
        return parity

    @inline
    def attend_odd(regs, at, problem, begin_block, num_blocks, all_see, parity):
        """Warpgroup 1's part of a piece; returns the parity of its buffer's next use."""
        token = begin_block * i32(BLOCK_N) + i32(BLOCK_N)
        left = num_blocks
        if left > 1:
            qk_block(regs, at.base, 1, parity)
            parity = u32(parity ^ u32(1))
        while left > 1:
            hide_unseen(regs.s_rmem, ptx.opaque_b32(at.base) + u32(K1_SMEM), token, all_see, parity, at, problem, WARPGROUP + 1)
            if left <= 3:
                break
            odd_step(regs, at, problem, parity, True, True)
            parity = u32((parity ^ u32(1)) + u32(NEXT_STEP))
            token += i32(2 * BLOCK_N)
            left -= i32(2)
        if left > 1:
            odd_step(regs, at, problem, parity, True, False)
            parity = u32(parity + u32(NEXT_STEP))
            left -= i32(2)
        if left == 1:
            release_q(at.base, at.lane, u32(0), True)
            odd_step(regs, at, problem, parity, False, False)
        return parity

    @inline
    def exchange_sums(sums_rmem, row_smem, thread, side):
        """Row sums over the 4 threads of a row and both warpgroups; the last maximum, which begins anew for the next piece."""
        for half in range(2):
            total = sums_rmem[half] + cuda.shfl_xor_sync(0xFFFFFFFF, sums_rmem[half], 1)
            sums_rmem[half] = total + cuda.shfl_xor_sync(0xFFFFFFFF, total, 2)
        if thread & u32(3) == 0:
            store_rows(row_smem + u32(SUM_SMEM) + side * u32(4 * BLOCK_M), sums_rmem[0], sums_rmem[1])
        # Both warpgroups arrive and wait: each other's sums, and the last maximum.
        ptx.bar_sync(u32(SUMS), u32(NUM_CONSUMERS))
        left_a, left_b = load_rows(row_smem + u32(SUM_SMEM))
        right_a, right_b = load_rows(row_smem + u32(SUM_SMEM + 4 * BLOCK_M))
        sums_rmem[0], sums_rmem[1] = left_a + right_a, left_b + right_b
        max_a, max_b = load_rows(row_smem + u32(MAX_SMEM))
        # Both warpgroups arrive and wait: the maximum has been read.
        ptx.bar_sync(u32(SUMS), u32(NUM_CONSUMERS))
        if side == 0 and thread & u32(3) == 0:
            store_rows(row_smem + u32(MAX_SMEM), NO_SCORE, NO_SCORE)
        # The 4 threads of a row, before the next piece reads what the first of them wrote.
        cuda.syncwarp()
        return max_a, max_b

    @inline
    def consume(base, wg, thread, problem, results, partials):
        """A warpgroup's walk over the pieces that the producer announces."""
        lane = thread & u32(31)
        regs = Registers(cuda.local.array(32, types.float32), cuda.local.array(128, types.float32), cuda.local.array(16, types.uint32),
                         cuda.local.array(16, types.uint32), cuda.local.array(2, types.float32))
        tile_row = (thread >> u32(5)) * u32(16) + (lane >> u32(2))
        # Bit 0: of the K buffer's next use. Bit 6: of the piece; it tells the two places for a piece's words apart. The rest: the steps.
        parity = u32(0)
        while True:
            base = ptx.opaque_b32(base)
            at = Place(base, base + tile_row * u32(4), thread, lane)
            # Producer arrives: the piece's words, and Q.
            ptx.mbarrier_wait_parity(base + u32(Q_FULL_SMEM), (parity >> u32(6)) & u32(1))
            words = piece_words(base, parity)
            num_blocks = ptx.ld_shared_i32(words + u32(PIECE_NUM_BLOCKS))
            if num_blocks < 0:
                break
            for i in range(128):
                regs.o_rmem[i] = f32(0)
            regs.sums_rmem[0] = f32(0)
            regs.sums_rmem[1] = f32(0)
            max_a, max_b = f32(0), f32(0)
            if num_blocks > 0:
                begin_block = ptx.ld_shared_i32(words + u32(PIECE_BEGIN_BLOCK))
                # The first row of the tile sees least.
                all_see = visible_to(ptx.ld_shared_i32(words + u32(PIECE_ROW_BEGIN)), ptx.ld_shared_i32(words + u32(PIECE_SEQ_LEN)),
                                     ptx.ld_shared_i32(words + u32(PIECE_Q_LEN)), problem)
                load_q8(regs.q8_rmem, at)
                if wg == 0:
                    parity = attend_even(regs, at, problem, begin_block, num_blocks, all_see, parity)
                else:
                    parity = attend_odd(regs, at, problem, begin_block, num_blocks, all_see, parity)
            part = end_piece(regs, base, piece_words(base, parity), problem, partials)
            if num_blocks > 0:
                # The side, anew: kept over the steps it would cost a register that O needs.
                max_a, max_b = exchange_sums(regs.sums_rmem, at.row_smem, thread, ptx.opaque_b32(u32(cuda.threadIdx.x)) >> u32(7))
            store_piece(regs, part, base, max_a, max_b, piece_words(base, parity), problem, results)
            parity = u32((parity ^ u32(PIECE_BYTES)) & u32(NEXT_STEP - 1))

    def hopper_decode(jobs, workers, starts, o_partial, state_partial, counters, _q_map, _left_map, _right_map, block_table,
                      table_row_stride, table_column_stride, max_pages, num_requests, kv_cache, page_stride, token_stride, head_stride,
                      num_pages, out, out_batch_stride, out_token_stride, out_head_stride, lse, lse_batch_stride, lse_head_stride,
                      lse_token_stride, heads_per_kv, causal, split_blocks, scale_log2e, empty_lse):
        thread_idx = u32(cuda.threadIdx.x)
        wg, thread = thread_idx >> u32(7), thread_idx & u32(127)
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        problem = Problem(heads_per_kv, causal, scale_log2e)
        maps = Maps(q_map_address(), left_map_address(), right_map_address())
        tables = Tables(block_table, table_row_stride, table_column_stride, max_pages, num_requests,
                        Cache(kv_cache, page_stride, token_stride, head_stride, num_pages), jobs, workers, starts, split_blocks)
        ptx.griddepcontrol_wait()
        # By all warps, as the first thing; the producer's alone waits for them.
        work, job = first_rows(tables, i32(thread_idx & u32(31)))
        if thread_idx == 0:
            for i in range(2 * 2):
                ptx.mbarrier_init(base + u32(FULL_SMEM + 8 * i), u32(1))
                ptx.mbarrier_init(base + u32(EMPTY_SMEM + 8 * i), u32(NUM_WARPS // 2 * CLUSTER_SIZE))
            ptx.mbarrier_init(base + u32(Q_FULL_SMEM), u32(1))
            ptx.mbarrier_init(base + u32(Q_EMPTY_SMEM), u32(NUM_WARPS))
            ptx.fence_mbarrier_init()
        elif thread_idx == NUM_CONSUMERS + 32:
            # By an idle warp, at once: a load would wait for a map that is far.
            ptx.prefetch_tensormap(maps.q)
            ptx.prefetch_tensormap(maps.left)
            ptx.prefetch_tensormap(maps.right)
        if thread_idx < BLOCK_M:
            ptx.st_shared_f32(base + u32(MAX_SMEM) + thread_idx * u32(4), NO_SCORE)
        if CLUSTER_SIZE > 1:
            ptx.barrier_cluster_arrive_relaxed()
        ptx.griddepcontrol_launch_dependents()
        # All threads: the mbarriers and the first maximum are there.
        cuda.syncthreads()
        if CLUSTER_SIZE > 1:
            # All threads of both blocks: the other block's mbarriers are there, too.
            ptx.barrier_cluster_wait()
        if wg == 2:
            give_registers()
            if thread < 32:
                produce(base, i32(thread), maps, tables, problem, work, job)
            elif thread < 64:
                prefetch_page_ids(tables, i32(thread & u32(31)))
        else:
            take_registers()
            results = Results(out, out_batch_stride, out_token_stride, out_head_stride, lse, lse_batch_stride, lse_head_stride,
                              lse_token_stride, empty_lse)
            consume(base, wg, thread, problem, results, Partials(o_partial, state_partial, counters))
        if CLUSTER_SIZE > 1:
            # All threads of both blocks: nobody loads into the other one, or arrives there, any more.
            ptx.barrier_cluster_arrive_relaxed()
            ptx.barrier_cluster_wait()

    return hopper_decode
