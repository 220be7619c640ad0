"""The producer of `hopper_decode`: one warp that walks the worker's pieces and keeps both K buffers as full as their readers allow.

All lanes look up pages, 32 at a time, and wait; lane 0 loads, but not before all lanes have seen the phase that they wait for: one that
came late would find the phase after it, and wait for ever.
"""

from collections import namedtuple
from collections.abc import Callable

import numpy as np
from numba import cuda

from .. import ptx
from ..scheduler import (
    BEGIN_BLOCK,
    BEGIN_JOB,
    BEGIN_SPLIT,
    END_BLOCK,
    END_JOB,
    JOB_COLUMNS,
    JOB_FIRST_SLOT,
    JOB_NUM_BLOCKS,
    JOB_NUM_PARTS,
    JOB_Q_BATCH,
    JOB_Q_BEGIN,
    JOB_Q_LEN,
    JOB_REQUEST,
    JOB_ROW_BEGIN,
    JOB_SEQ_LEN,
    NOT_SPLIT,
    WORKER_COLUMNS,
)
from .hopper_config import (
    BLOCK_M,
    BLOCK_N,
    EMPTY_SMEM,
    END_OF_WORK,
    FULL_SMEM,
    K0_SMEM,
    LEFT_TILES,
    NUM_TILES,
    PIECE_BEGIN_BLOCK,
    PIECE_BYTES,
    PIECE_NUM_BLOCKS,
    PIECE_NUM_PARTS,
    PIECE_Q_BATCH,
    PIECE_Q_BEGIN,
    PIECE_Q_LEN,
    PIECE_ROW_BEGIN,
    PIECE_SEQ_LEN,
    PIECE_SLOT,
    PIECE_SMEM,
    Q_EMPTY_SMEM,
    Q_FULL_SMEM,
    Q_SMEM,
    TILE_BYTES,
    TILE_COLUMNS,
    HopperConfig,
    inline,
)

i32, u32, u64 = np.int32, np.uint32, np.uint64

# Entries of a block table that the warp holds at a time, one a lane.
WINDOW = 32
# Two windows of a request's block table, and the place of the first one in it. The lanes hold a page id each.
Pages = namedtuple("Pages", "first window next_window")
# Bits of `turns`: 0 and 1 are the parities of the buffers' uses, this one that of the piece; this one is set after the first piece; from
# this one on is the number of jobs after this one.
PIECE_TURN, LATER_TURN, JOBS_TURN = 2, 3, 4


def make_producer(config: HopperConfig) -> Callable[..., None]:
    """`produce(base, lane, tables, problem)`, for the producer's warp. It has few registers: numbers are kept to 32 bits, where Numba
    would make 64 of a sum."""
    PAGE_SIZE, BOX_ROWS, PAGES_PER_BLOCK = config.page_size, config.box_rows, config.pages_per_block
    BLOCKS_PER_PAGE = max(PAGE_SIZE // BLOCK_N, 1)
    BOX_BYTES = BOX_ROWS * 128
    L2_POLICY = u64(ptx.EVICT_FIRST)

    @inline
    def load_i32(table, idx):
        return ptx.ld_global_i32(table + u64(idx * 4))

    @inline
    def tile_idx():
        """Row tile of this thread block; asked for anew each time, as a register is dear."""
        return i32(ptx.opaque_b32(u32(cuda.blockIdx.x)))

    @inline
    def first_page(block):
        """Place in the block table of a block's first page."""
        return i32(u32(block) // u32(BLOCKS_PER_PAGE) * u32(PAGES_PER_BLOCK))

    @inline
    def load_page_ids(tables, job, first, lane):
        """This lane's page of the window from `first` on; -1, which TMA reads as zeros, past what the request uses."""
        entry, page = i32(first + i32(ptx.opaque_b32(u32(lane)))), i32(-1)
        num_pages = i32((u32(load_i32(job, JOB_SEQ_LEN)) + u32(PAGE_SIZE - 1)) // u32(PAGE_SIZE))
        if entry < min(tables.max_pages, num_pages):
            block_table = tables.block_table + u64(load_i32(job, JOB_REQUEST) * tables.row_stride)
            page = ptx.ld_global_i32(block_table + u64(entry * tables.column_stride))
        return page

    @inline
    def first_row(block):
        """A block's place in its page."""
        return i32(u32(block) % u32(BLOCKS_PER_PAGE) * u32(BLOCK_N))

    @inline
    def page_of_lane(pages, block, lane):
        """Page of box `lane` of a block, which is in one of the two windows."""
        entry = i32(first_page(i32(block)) - pages.first)
        return cuda.shfl_sync(0xFFFFFFFF, pages.window if entry < WINDOW else pages.next_window, i32(entry + lane) & i32(WINDOW - 1))

    @inline
    def load_tiles(base, buffer, side, tile_begin, tile_end, turns, kv_map, kv_head, block, pages, lane):
        """Wait until the last reader of these tiles is done with their former use, then fill them."""
        # Opaque, lest the addresses of tiles and boxes be kept in registers across the loops.
        base, lane = ptx.opaque_b32(base), i32(ptx.opaque_b32(u32(lane)))
        # 4 warps of warpgroup `side` arrived; the phase before the use's own.
        ptx.mbarrier_wait_parity(base + u32(EMPTY_SMEM + (buffer * 2 + side) * 8), (turns >> u32(buffer) & u32(1)) ^ u32(1))
        cuda.syncwarp()
        # Each of the first lanes loads a box, of a page of its own.
        page, row = page_of_lane(pages, block, lane), first_row(block)
        # A loop that stays one: its counter is opaque. Unrolled, its addresses would cost registers.
        tile = u32(tile_begin)
        while tile < tile_end:
            ptx.nounroll()
            full = base + u32(FULL_SMEM + buffer * NUM_TILES * 8) + tile * u32(8)
            if lane == 0:
                # The only arrival; the phase completes with the tile's last byte.
                ptx.mbarrier_arrive_expect_tx(full, u32(TILE_BYTES))
            if lane < PAGES_PER_BLOCK:
                place = base + u32(K0_SMEM + buffer * NUM_TILES * TILE_BYTES) + tile * u32(TILE_BYTES) + u32(lane) * u32(BOX_BYTES)
                ptx.tma_load_4d(place, kv_map, full, i32(tile * u32(TILE_COLUMNS)), row, kv_head, page, L2_POLICY)
            tile = ptx.opaque_b32(tile + u32(1))

    @inline
    def load_work(tables, column):
        """Of the worker's row. Its address is made anew each time: kept it would cost registers."""
        return load_i32(tables.workers, i32(ptx.opaque_b32(u32(cuda.blockIdx.y)) * u32(WORKER_COLUMNS)) + column)

    @inline
    def split_of(begin_block, tables):
        """Number of the piece of its job that begins at a block; if not at the first, then where the worker begins, or at a multiple."""
        if begin_block == 0:
            return i32(0)
        if tables.split_blocks == 0:
            return load_work(tables, BEGIN_SPLIT)
        return i32(u32(begin_block) // u32(tables.split_blocks))

    @inline
    def produce_piece(base, tables, turns, begin_block, end_block, job, heads_per_kv, kv_head, lane):
        """Describe a piece, and load its rows of Q. What only this needs of the job is read anew: kept it would cost registers."""
        parity = turns >> u32(PIECE_TURN) & u32(1)
        # 8 consumer warps arrived, done with the piece before, its Q and its P1; the first piece does not wait.
        ptx.mbarrier_wait_parity(base + u32(Q_EMPTY_SMEM), parity ^ u32(1))
        cuda.syncwarp()
        if lane == 0:
            # Opaque, lest it be made before the loop around this, and kept.
            num_blocks = i32(i32(ptx.opaque_b32(u32(end_block))) - begin_block)
            row_begin = i32(load_i32(job, JOB_ROW_BEGIN) + tile_idx() * BLOCK_M)
            if num_blocks > 0:
                q_batch, q_row = load_i32(job, JOB_Q_BATCH), i32(load_i32(job, JOB_Q_BEGIN) * heads_per_kv + row_begin)
                for tile in range(NUM_TILES):
                    ptx.tma_load_4d(base + u32(Q_SMEM + tile * TILE_BYTES), tables.q_map, base + u32(Q_FULL_SMEM), i32(tile * TILE_COLUMNS),
                                    q_row, kv_head, q_batch, L2_POLICY)
            # While Q comes. Read one by one: together they would cost registers.
            words = base + u32(PIECE_SMEM) + parity * u32(PIECE_BYTES)
            ptx.st_shared_i32(words + u32(PIECE_NUM_BLOCKS), num_blocks)
            ptx.st_shared_i32(words + u32(PIECE_BEGIN_BLOCK), begin_block)
            ptx.st_shared_i32(words + u32(PIECE_ROW_BEGIN), row_begin)
            ptx.st_shared_i32(words + u32(PIECE_SEQ_LEN), load_i32(job, JOB_SEQ_LEN))
            ptx.st_shared_i32(words + u32(PIECE_NUM_PARTS), load_i32(job, JOB_NUM_PARTS))
            ptx.st_shared_i32(words + u32(PIECE_Q_BATCH), load_i32(job, JOB_Q_BATCH))
            ptx.st_shared_i32(words + u32(PIECE_Q_BEGIN), load_i32(job, JOB_Q_BEGIN))
            ptx.st_shared_i32(words + u32(PIECE_Q_LEN), load_i32(job, JOB_Q_LEN))
            slot = load_i32(job, JOB_FIRST_SLOT)
            if slot != NOT_SPLIT:
                slot = i32(slot + split_of(begin_block, tables))
            ptx.st_shared_i32(words + u32(PIECE_SLOT), slot)
            # The only arrival; completes with Q's last byte, and releases the words above.
            ptx.mbarrier_arrive_expect_tx(base + u32(Q_FULL_SMEM), u32(NUM_TILES * TILE_BYTES) if num_blocks > 0 else u32(0))

    @inline
    def piece_end(block, end_block, split_blocks):
        """`scheduler.piece_end` in 32 bits: the shared one's sums are of 64 here, and the registers are 40."""
        if split_blocks == 0:
            return end_block
        return min(end_block, i32((u32(block) // u32(split_blocks) + u32(1)) * u32(split_blocks)))

    @inline
    def produce(base, lane, tables, problem):
        """Walk the worker's pieces, job by job; within a piece, pairs of blocks."""
        worker, kv_head = i32(cuda.blockIdx.y), i32(cuda.blockIdx.z)
        kv_map, heads_per_kv = tables.kv_map, problem.heads_per_kv
        # The first job's row lies in `starts` too, and comes while the job's number does.
        job = tables.starts + u64(worker * (4 * JOB_COLUMNS))
        ptx.prefetch_global_l2(job)
        turns = u32(i32(load_work(tables, END_JOB) - load_work(tables, BEGIN_JOB))) << u32(JOBS_TURN)
        block = load_work(tables, BEGIN_BLOCK)
        while i32(turns) >= 0:
            num_rows, row_begin = i32(load_i32(job, JOB_Q_LEN) * heads_per_kv), load_i32(job, JOB_ROW_BEGIN)
            end_block = load_i32(job, JOB_NUM_BLOCKS)
            if turns >> u32(JOBS_TURN) == 0:
                end_block = load_work(tables, END_BLOCK)
            more = i32(row_begin + tile_idx() * BLOCK_M) < num_rows
            while more:
                stop = piece_end(block, end_block, tables.split_blocks)
                begin = block
                # Asked for before Q and the piece's words, whose latencies they share: 0.5 to 0.9 us of 17 to 39 (H100).
                first = i32(first_page(block) & i32(-WINDOW))
                pages = Pages(first, load_page_ids(tables, job, first, lane), load_page_ids(tables, job, i32(first + WINDOW), lane))
                # The first piece's Q, and one without blocks, at once; the others' when K's buffers, free before Q's, are on their way.
                if turns & u32(1 << LATER_TURN) == 0 or stop <= block:
                    produce_piece(base, tables, turns, begin, stop, job, heads_per_kv, kv_head, lane)
                while block < stop:
                    odd = i32(block + 1)
                    if first_page(block) >= i32(pages.first + WINDOW):
                        first = i32(pages.first + WINDOW)
                        pages = Pages(first, pages.next_window, load_page_ids(tables, job, i32(first + WINDOW), lane))
                    load_tiles(base, 0, 0, 0, LEFT_TILES, turns, kv_map, kv_head, block, pages, lane)
                    if block == begin:
                        load_tiles(base, 0, 1, LEFT_TILES, NUM_TILES, turns, kv_map, kv_head, block, pages, lane)
                        if turns & u32(1 << LATER_TURN) != 0:
                            produce_piece(base, tables, turns, begin, stop, job, heads_per_kv, kv_head, lane)
                    if odd < stop:
                        load_tiles(base, 1, 1, LEFT_TILES, NUM_TILES, turns, kv_map, kv_head, odd, pages, lane)
                    if block > begin:
                        load_tiles(base, 0, 1, LEFT_TILES, NUM_TILES, turns, kv_map, kv_head, block, pages, lane)
                    if odd < stop:
                        load_tiles(base, 1, 0, 0, LEFT_TILES, turns, kv_map, kv_head, odd, pages, lane)
                        turns = u32(turns ^ u32(1 << 1))
                    turns = u32(turns ^ u32(1 << 0))
                    block = i32(block + 2)
                turns = u32((turns ^ u32(1 << PIECE_TURN)) | u32(1 << LATER_TURN))
                block = stop
                more = block < end_block
            block = i32(0)
            turns = u32(turns - u32(1 << JOBS_TURN))
            job = tables.jobs + u64(i32(load_work(tables, END_JOB) - i32(turns >> u32(JOBS_TURN))) * (4 * JOB_COLUMNS))
        parity = turns >> u32(PIECE_TURN) & u32(1)
        # 8 consumer warps arrived, done with the last piece.
        ptx.mbarrier_wait_parity(base + u32(Q_EMPTY_SMEM), parity ^ u32(1))
        cuda.syncwarp()
        if lane == 0:
            ptx.st_shared_i32(base + u32(PIECE_SMEM + PIECE_NUM_BLOCKS) + parity * u32(PIECE_BYTES), i32(END_OF_WORK))
            ptx.mbarrier_arrive(base + u32(Q_FULL_SMEM))

    return produce
