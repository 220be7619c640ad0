"""Dense MLA decode for Hopper: TMA brings blocks of the cache, two warpgroups multiply and exponentiate, O stays in registers.

A thread block attends 64 packed query rows, or 16 or 32, to 64-token blocks of the cache, even ones from buffer K0, odd ones from K1:

    warpgroup 0            S = Q K0, P0 = softmax; the left 256 columns of O: O_left += P0 V0_left, O_left += P1 V1_left
    warpgroup 1            S = Q K1, P1 = softmax; the right 256 columns:     O_right += P0 V0_right, O_right += P1 V1_right
    warpgroup 2, one warp  TMA: the sides of K0 and K1, each as its last reader is done

A tile of V is a tile of K: the cache is read once. In which order is hopper_stream's, where memory is the limit (one row tile), or
hopper_seesaw's, where the tensor core is; hopper_swapped has the former for 16 and 32 rows, with all products transposed.

    shared     Q 9 tiles | K0 9 tiles | K1 9 tiles | P0 1 tile | max, scales, sums, pieces, mbarriers    tile = 64 rows x 128 bytes
               P1 lies in Q's tile 8, which both warpgroups keep in registers (q8_rmem)
    registers  consumers 232: O 128, S 32, P 16, Q tile 8 16, the rest addresses; producer 40

Who waits for whom (see the table in docs/kernel.md; one line each where it happens):

    full[buffer][side]    producer's TMA -> the warpgroup that multiplies Q by that buffer; one phase a use
    empty[buffer][side]   the 4 warps of the side's last reader -> producer; side 0, left, is tiles 0-3, side 1, right, is tiles 4-8
                          In a cluster each producer loads half a side for both blocks: 4 warps of both -> both producers
    q_full, q_empty       producer (piece and Q) -> 8 consumer warps; 8 consumer warps -> producer; one phase a piece
    P0_FREE, P0_STORED, P1_STORED, S0_ASKED, SUMS    named barriers of the 256 consumers; WARPGROUP + 0, + 1 of 128 each
    MBARRIERS_MADE        warpgroup 2 -> consumers, once (in a cluster its barrier)

This file is the kernel and its walk over the pieces. hopper_load brings the tiles, hopper_products multiplies, hopper_softmax is in
between, hopper_stream and hopper_seesaw order them, hopper_store ends a piece; hopper_swapped and hopper_swapped_store are these for few
rows; hopper_config has the numbers.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from .. import ptx
from .hopper_config import (
    CONSUMER_REGISTERS,
    EMPTY_SMEM,
    FIRST_MAP,
    FULL_SMEM,
    MAP_WORDS,
    MBARRIERS_MADE,
    NEXT_STEP,
    NUM_CONSUMERS,
    NUM_THREADS,
    NUM_WARPS,
    PIECE_BEGIN_BLOCK,
    PIECE_BYTES,
    PIECE_NUM_BLOCKS,
    PIECE_Q_LEN,
    PIECE_ROW_BEGIN,
    PIECE_SEQ_LEN,
    PRODUCER_REGISTERS,
    Q_EMPTY_SMEM,
    Q_FULL_SMEM,
    Cache,
    HopperConfig,
    Maps,
    Partials,
    Place,
    Problem,
    Registers,
    Results,
    SwappedRegisters,
    Tables,
    Tiles,
    inline,
)
from .hopper_load import make_producer
from .hopper_products import make_products
from .hopper_seesaw import make_seesaw
from .hopper_softmax import make_softmax
from .hopper_store import make_store
from .hopper_stream import make_stream
from .hopper_swapped import make_swapped
from .hopper_swapped_store import make_swapped_store

i32, u32, f32 = np.int32, np.uint32, np.float32


def decode_signature() -> types.Type:
    """Types of the kernel's arguments, in the order of `hopper_decode`'s."""
    address, stride, i, f = types.uint64, types.int64, types.int32, types.float32
    tensor_map = types.UniTuple(types.uint64, MAP_WORDS)
    return types.void(*[address] * FIRST_MAP, tensor_map, tensor_map, tensor_map, address, stride, stride, i, i, address, stride, stride,
                      stride, i, address, stride, stride, stride, address, stride, stride, stride, i, i, i, f, f)


def make_beginning(config: HopperConfig) -> tuple[Callable[..., None], ...]:
    """(begin_o, clear_o): what a piece begins with, and O of one without blocks."""
    # With two row tiles and more it would be 1 to 1.5% more of long calls; with one it is up to 5% less of short ones (H200).
    FIRST_PRODUCT_BEGINS_O = config.is_stream
    o_begin = ptx.make_registers_begin(128)

    @inline
    def clear_o(o_rmem):
        """O = 0."""
        for i in range(128):
            o_rmem[i] = f32(0)

    @inline
    def begin_o(o_rmem):
        """O = 0, or, where the first product begins it, anything."""
        if not FIRST_PRODUCT_BEGINS_O:
            clear_o(o_rmem)
        else:
            o_begin(o_rmem)

    return begin_o, clear_o


@cache
def make_decode_kernel(config: HopperConfig) -> Callable[..., None]:
    """The kernel for `config`, not yet compiled. Grid (row tiles of a job, workers, KV heads), NUM_THREADS threads, SMEM_BYTES."""
    first_rows, prefetch_page_ids, produce = make_producer(config)
    products, softmax, store = make_products(config), make_softmax(config), make_store(config)
    IS_SWAPPED = config.is_swapped
    if IS_SWAPPED:
        begin_o, clear_o, attend_even, attend_odd, exchange_sums = make_swapped(config, products, softmax, store.release_q)
        end_piece, store_piece = make_swapped_store(config, store)
    else:
        attend_even, attend_odd = (make_stream if config.is_stream else make_seesaw)(products, softmax, store.release_q)
        end_piece, store_piece, exchange_sums = store.end_piece, store.store_piece, softmax.exchange_sums
        begin_o, clear_o = make_beginning(config)
    load_q8, visible_to, piece_words = products.load_q8, softmax.visible_to, softmax.piece_words
    # Of hopper_swapped: of a tile of S or O, and of sums.
    TILE_FLOATS, NUM_SUMS = config.num_rows // 2, config.num_rows // 4 if IS_SWAPPED else 2
    CLUSTER_SIZE = config.cluster_size
    take_registers = ptx.make_setmaxnreg("inc", CONSUMER_REGISTERS)
    give_registers = ptx.make_setmaxnreg("dec", PRODUCER_REGISTERS)
    # The maps lie one behind the other.
    q_map_address, left_map_address, right_map_address = (ptx.make_parameter_address(FIRST_MAP + i * MAP_WORDS) for i in range(3))

    @inline
    def consume(base, wg, thread, regs, problem, results, partials):
        """A warpgroup's walk over the pieces that the producer announces."""
        lane = thread & u32(31)
        tile_row = (lane & u32(3)) * u32(2) if IS_SWAPPED else (thread >> u32(5)) * u32(16) + (lane >> u32(2))
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
            begin_o(regs.o_rmem)
            for i in range(NUM_SUMS):
                regs.sums_rmem[i] = f32(0)
            # The maxima of the thread's two rows; of few rows maximum and sum of the lane's.
            ends = f32(0), f32(0)
            if num_blocks > 0:
                begin_block = ptx.ld_shared_i32(words + u32(PIECE_BEGIN_BLOCK))
                # The first row of the tile sees least.
                all_see = visible_to(ptx.ld_shared_i32(words + u32(PIECE_ROW_BEGIN)), ptx.ld_shared_i32(words + u32(PIECE_SEQ_LEN)),
                                     ptx.ld_shared_i32(words + u32(PIECE_Q_LEN)), problem)
                if not IS_SWAPPED:
                    load_q8(regs.q8_rmem, at)
                # This way round the even block's code, the first one that is needed, lies first (see below).
                if wg == 1:
                    parity = attend_odd(regs, at, problem, begin_block, num_blocks, all_see, parity)
                else:
                    parity = attend_even(regs, at, problem, begin_block, num_blocks, all_see, parity)
            else:
                clear_o(regs.o_rmem)
                # Keeps the zeros here: without an instruction of its own this arm's 64 lie ahead of the branch, on all pieces' way.
                cuda.syncwarp()
            part = end_piece(regs, base, piece_words(base, parity), problem, partials)
            if num_blocks > 0:
                ends = exchange_sums(regs.sums_rmem, at)
            store_piece(regs, part, base, ends, piece_words(base, parity), problem, results)
            parity = u32((parity ^ u32(PIECE_BYTES)) & u32(NEXT_STEP - 1))

    def hopper_decode(jobs, workers, starts, o_partial, state_partial, counters, _q_map, _left_map, _right_map, block_table,
                      table_row_stride, table_column_stride, max_pages, num_requests, kv_cache, page_stride, token_stride, head_stride,
                      num_pages, out, out_batch_stride, out_token_stride, out_head_stride, lse, lse_batch_stride, lse_head_stride,
                      lse_token_stride, heads_per_kv, causal, split_blocks, scale_log2e, empty_lse):
        thread_idx = u32(cuda.threadIdx.x)
        # The compiler is to know that it is one number a warp. Else each shuffle of the producer has a second copy, for lanes that do not
        # run together: 470 instructions, and a jump each (0 to 3% of short calls, H200).
        warp = u32(cuda.shfl_sync(0xFFFFFFFF, i32(thread_idx >> u32(5)), 0))
        wg, thread = warp >> u32(2), thread_idx & u32(127)
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        problem = Problem(heads_per_kv, causal, scale_log2e)
        maps = Maps(q_map_address(), left_map_address(), right_map_address())
        tables = Tables(block_table, table_row_stride, table_column_stride, max_pages, num_requests,
                        Cache(kv_cache, page_stride, token_stride, head_stride, num_pages), jobs, workers, starts, split_blocks)
        ptx.griddepcontrol_wait()
        # By all warps, as the first thing; the producer's alone waits for them.
        work, job = first_rows(tables, i32(thread_idx & u32(31)))
        if thread_idx == NUM_CONSUMERS:
            for i in range(2 * 2):
                ptx.mbarrier_init(base + u32(FULL_SMEM + 8 * i), u32(1))
                ptx.mbarrier_init(base + u32(EMPTY_SMEM + 8 * i), u32(NUM_WARPS // 2 * CLUSTER_SIZE))
            ptx.mbarrier_init(base + u32(Q_FULL_SMEM), u32(1))
            ptx.mbarrier_init(base + u32(Q_EMPTY_SMEM), u32(NUM_WARPS))
            ptx.fence_mbarrier_init()
        if CLUSTER_SIZE > 1:
            ptx.barrier_cluster_arrive_relaxed()
        elif wg == 2:
            # Warpgroup 2 arrives, the consumers wait: the mbarriers are there.
            ptx.bar_arrive(u32(MBARRIERS_MADE), u32(NUM_THREADS))
        ptx.griddepcontrol_launch_dependents()
        # By idle warps that have arrived: nobody waits for them (with one row tile 0 to 1% less, H200).
        if thread_idx == NUM_CONSUMERS + 32:
            # A load would wait for a map that is far.
            ptx.prefetch_tensormap(maps.q)
            ptx.prefetch_tensormap(maps.left)
            ptx.prefetch_tensormap(maps.right)
        elif warp == NUM_WARPS + 2:
            prefetch_page_ids(tables, i32(thread_idx & u32(31)))
        if CLUSTER_SIZE > 1:
            # All threads of both blocks: the other block's mbarriers are there, too.
            ptx.barrier_cluster_wait()
        elif wg < 2:
            ptx.bar_sync(u32(MBARRIERS_MADE), u32(NUM_THREADS))
        else:
            # The producer's lanes: lane 0 has made them.
            cuda.syncwarp()
        # This way round the compiler puts the producer's code right behind what is above, not behind the consumers', 50 KB further on: 2 to
        # 6% less of calls up to 40 us that find the code of another kernel where theirs is to be (H200).
        if wg < 2:
            take_registers()
            results = Results(out, out_batch_stride, out_token_stride, out_head_stride, lse, lse_batch_stride, lse_head_stride,
                              lse_token_stride, empty_lse)
            partials = Partials(o_partial, state_partial, counters)
            if IS_SWAPPED:
                tiles = Tiles(cuda.local.array(TILE_FLOATS, types.float32), cuda.local.array(TILE_FLOATS, types.float32),
                              cuda.local.array(TILE_FLOATS, types.float32), cuda.local.array(TILE_FLOATS, types.float32))
                consume(base, wg, thread, SwappedRegisters(cuda.local.array(TILE_FLOATS, types.float32), tiles,
                                                           cuda.local.array(NUM_SUMS, types.float32)), problem, results, partials)
            else:
                consume(base, wg, thread, Registers(cuda.local.array(32, types.float32), cuda.local.array(128, types.float32),
                                                    cuda.local.array(16, types.uint32), cuda.local.array(16, types.uint32),
                                                    cuda.local.array(2, types.float32)), problem, results, partials)
        else:
            give_registers()
            if warp == NUM_WARPS:
                produce(base, i32(thread), maps, tables, problem, work, job)
        if CLUSTER_SIZE > 1:
            # All threads of both blocks: nobody loads into the other one, or arrives there, any more.
            ptx.barrier_cluster_arrive_relaxed()
            ptx.barrier_cluster_wait()

    return hopper_decode
