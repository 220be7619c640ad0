"""The producer of `hopper_decode`: one warp that walks the worker's pieces and keeps both K buffers as full as their readers allow.

All lanes look up pages, 32 at a time, and wait; lane 0 loads (0 to 7, if pages are under 64 tokens, eight tokens each), but not before all
lanes have seen the phase that they wait for: one that came late would find the phase after it, and wait for ever.
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
    JOB_NUM_BLOCKS,
    JOB_NUM_PARTS,
    JOB_Q_BATCH,
    JOB_Q_BEGIN,
    JOB_Q_LEN,
    JOB_REQUEST,
    JOB_ROW_BEGIN,
    JOB_SEQ_LEN,
    REHEARSAL,
    WORKER_COLUMNS,
)
from .hopper_config import (
    BLOCK_M,
    BLOCK_N,
    EMPTY_SMEM,
    END_OF_WORK,
    FULL_SMEM,
    HALF_TILES,
    K0_SMEM,
    NUM_TILES,
    PIECE_BEGIN_BLOCK,
    PIECE_BYTES,
    PIECE_NUM_BLOCKS,
    PIECE_ROW_BEGIN,
    PIECE_SMEM,
    PIECE_SPLIT,
    PIECE_WORDS,
    Q_EMPTY_SMEM,
    Q_FULL_SMEM,
    Q_SMEM,
    SIDE_BEGIN,
    SIDE_TILES,
    TILE_BYTES,
    TILE_COLUMNS,
    HopperConfig,
    inline,
)

i32, i64, u16, u32, u64, f32 = np.int32, np.int64, np.uint16, np.uint32, np.uint64, np.float32

# Entries of a block table that the warp holds at a time, one a lane.
WINDOW = 32
# Two windows of a request's block table, and the place of the first one in it. The lanes hold a page id each.
Pages = namedtuple("Pages", "first window next_window")
# Bits of `turns`: 0 and 1 are the parities of the buffers' uses, this one that of the piece; this one is set if the last piece's Q is free
# after its K; from this one on is the number of jobs after this one.
PIECE_TURN, LATE_Q_TURN, JOBS_TURN = 2, 3, 4


@inline
def load_row(table, row, num_columns, lane):
    """A row of a table, a column a lane: all of it comes at once."""
    return ptx.ld_global_i32(table + u64(u32(row) * u32(4 * num_columns) + u32(min(lane, i32(num_columns - 1))) * u32(4)))


@inline
def column(row, idx):
    """A column of such a row, for all lanes."""
    return cuda.shfl_sync(0xFFFFFFFF, row, idx)


def make_producer(config: HopperConfig) -> Callable[..., None]:
    """(first_rows, prefetch_page_ids, produce), for all warps, an idle one, and the producer's. That has few registers: numbers are kept to
    32 bits, where Numba would make 64 of a sum, and of a row of a table every lane holds a column."""
    PAGE_SIZE, PAGE_ROWS, PAGES_PER_BLOCK = config.page_size, config.page_rows, config.pages_per_block
    BLOCKS_PER_PAGE = max(PAGE_SIZE // BLOCK_N, 1)
    BOX_ROWS, NEXT_TILE, NEXT_BOX = config.box_rows, config.next_tile_bytes, tuple(config.next_atom_bytes(side) for side in range(2))
    BOXES, BOXES_PER_PAGE = BLOCK_N // BOX_ROWS, PAGE_ROWS // BOX_ROWS
    # What leaves first makes room for what comes: read by others too, it would be gone before they ask.
    L2_POLICY = u64(ptx.EVICT_FIRST if config.is_read_once else ptx.EVICT_NORMAL)
    CLUSTER_SIZE, PREFETCHES, Q_TILE_BYTES = config.cluster_size, config.prefetches, config.q_tile_bytes
    # Both thread blocks of a cluster.
    CTA_MASK = u16(3)

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
        num_pages, request = i32(u32(u32(column(job, JOB_SEQ_LEN)) + u32(PAGE_SIZE - 1)) // u32(PAGE_SIZE)), column(job, JOB_REQUEST)
        # A rehearsal has no pages.
        num_pages = num_pages if request >= 0 else i32(0)
        if entry < min(tables.max_pages, num_pages):
            # Neither is negative: products of unsigned numbers take half as many instructions.
            block_table = tables.block_table + u64(u32(request)) * u64(tables.row_stride)
            page = ptx.ld_global_i32(block_table + u64(u32(entry)) * u64(tables.column_stride))
        return page

    @inline
    def first_row(block):
        """A block's place in its page."""
        return i32(u32(block) % u32(BLOCKS_PER_PAGE) * u32(BLOCK_N))

    @inline
    def page_of_lane(pages, block, lane):
        """Page `lane` of a block's, which is in one of the two windows."""
        entry = i32(first_page(i32(block)) - pages.first)
        return cuda.shfl_sync(0xFFFFFFFF, pages.window if entry < WINDOW else pages.next_window, i32(entry + lane) & i32(WINDOW - 1))

    @inline
    def load_box(place, kv_map, full, row, tile, kv_head, page):
        """A box of the cache, in a cluster to both blocks."""
        if CLUSTER_SIZE > 1:
            ptx.tma_load_5d_multicast(place, kv_map, full, i32(0), row, tile, kv_head, page, CTA_MASK, L2_POLICY)
        else:
            ptx.tma_load_5d(place, kv_map, full, i32(0), row, tile, kv_head, page, L2_POLICY)

    @inline
    def load_side(base, buffer, side, turns, maps, kv_head, block, pages, lane):
        """Wait until the last reader of a side of a block is done with its former use, then fill it; in a cluster its half of it, for both
        blocks, while the other one loads the rest."""
        # Opaque, lest the addresses of tiles and boxes be kept in registers across the loops.
        base, lane = ptx.opaque_b32(base), i32(ptx.opaque_b32(u32(lane)))
        # 4 warps of warpgroup `side` arrived, of each block that shares it; the phase before the use's own.
        ptx.mbarrier_wait_parity(base + u32(EMPTY_SMEM + (buffer * 2 + side) * 8), (turns >> u32(buffer) & u32(1)) ^ u32(1))
        cuda.syncwarp()
        # Each of the first lanes loads a box, of this page, from this row of it on.
        page, row = page_of_lane(pages, block, i32(u32(lane) // u32(BOXES_PER_PAGE))), first_row(block)
        if BOXES_PER_PAGE > 1:
            row = i32(u32(lane) % u32(BOXES_PER_PAGE) * u32(BOX_ROWS))
        full = base + u32(FULL_SMEM + (buffer * 2 + side) * 8)
        first = u32(0)
        kv_map = maps.left if side == 0 else maps.right
        if CLUSTER_SIZE > 1:
            first = ptx.cluster_ctarank() * u32(HALF_TILES)
            # Boxes of 2 and of 3 tiles.
            kv_map = maps.right if side == 1 and first > u32(0) else maps.left
        tile = first + u32(SIDE_BEGIN[side])
        place = base + u32(K0_SMEM + (buffer * NUM_TILES + SIDE_BEGIN[side]) * TILE_BYTES) + first * u32(NEXT_TILE)
        if lane == 0:
            # The only arrival; the phase completes with the side's last byte.
            ptx.mbarrier_arrive_expect_tx(full, u32(SIDE_TILES[side] * TILE_BYTES))
        if u32(lane) < u32(BOXES):
            load_box(place + u32(lane) * u32(NEXT_BOX[side]), kv_map, full, row, i32(tile), kv_head, page)

    @inline
    def prefetch(cache, kv_head, block, end_block, pages, lane):
        """Bring blocks to L2: half of the tokens by each of the first two row tiles' thread blocks."""
        # Opaque, lest the head's place be found before the loop around this, ahead of the first loads.
        kv_head = i32(ptx.opaque_b32(u32(kv_head)))
        while block < end_block:
            ptx.nounroll()
            token = i32(tile_idx() * i32(BLOCK_N // 2) + lane)
            page = page_of_lane(pages, block, i32(u32(token) // u32(PAGE_ROWS)))
            # Whatever id is in the block table.
            if u32(page) < u32(cache.num_pages) and tile_idx() < 2:
                row = i32(first_row(block) + i32(u32(token) % u32(PAGE_ROWS)))
                address = cache.address + u64(page * cache.page_stride + row * cache.token_stride + kv_head * cache.head_stride)
                for tile in range(NUM_TILES):
                    ptx.prefetch_global_l2(address + u64(tile * 2 * TILE_COLUMNS))
            block = i32(ptx.opaque_b32(u32(block + 1)))

    @inline
    def split_of(begin_block, work, tables):
        """Number of the piece of its job that begins at a block; if not at the first, then where the worker begins, or at a multiple."""
        if begin_block == 0:
            return i32(0)
        if tables.split_blocks == 0:
            return column(work, BEGIN_SPLIT)
        return i32(u32(begin_block) // u32(tables.split_blocks))

    @inline
    def load_q(base, q_map, turns, num_blocks, job, heads_per_kv, kv_head, lane):
        """Load a piece's rows of Q, once their place is free; in the phase that `announce_piece` completes."""
        parity = turns >> u32(PIECE_TURN) & u32(1)
        # 8 consumer warps arrived, done with the piece before, its Q and its P1; the first piece does not wait.
        ptx.mbarrier_wait_parity(base + u32(Q_EMPTY_SMEM), parity ^ u32(1))
        cuda.syncwarp()
        row_begin = i32(column(job, JOB_ROW_BEGIN) + tile_idx() * BLOCK_M)
        q_batch, q_row = column(job, JOB_Q_BATCH), i32(column(job, JOB_Q_BEGIN) * heads_per_kv + row_begin)
        if lane == 0 and num_blocks > 0:
            ptx.tma_load_5d(base + u32(Q_SMEM), q_map, base + u32(Q_FULL_SMEM), i32(0), q_row, i32(0), kv_head, q_batch, L2_POLICY)

    @inline
    def announce_piece(base, tables, turns, begin_block, end_block, work, job, lane):
        """Describe a piece, while its Q comes."""
        parity = turns >> u32(PIECE_TURN) & u32(1)
        # Opaque, lest it be made before the loop around this, and kept.
        num_blocks = i32(i32(ptx.opaque_b32(u32(end_block))) - begin_block)
        row_begin = i32(column(job, JOB_ROW_BEGIN) + tile_idx() * BLOCK_M)
        split = split_of(begin_block, work, tables)
        # The job's row, but for what is the piece's own.
        word = job
        word = row_begin if lane == i32(PIECE_ROW_BEGIN // 4) else word
        word = num_blocks if lane == i32(PIECE_NUM_BLOCKS // 4) else word
        word = begin_block if lane == i32(PIECE_BEGIN_BLOCK // 4) else word
        word = split if lane == i32(PIECE_SPLIT // 4) else word
        if lane < PIECE_WORDS:
            ptx.st_shared_i32(base + u32(PIECE_SMEM) + parity * u32(PIECE_BYTES) + u32(lane) * u32(4), word)
        cuda.syncwarp()
        if lane == 0:
            # The only arrival; completes with Q's last byte, and releases the words of all lanes.
            ptx.mbarrier_arrive_expect_tx(base + u32(Q_FULL_SMEM), u32(NUM_TILES * Q_TILE_BYTES) if num_blocks > 0 else u32(0))

    @inline
    def piece_end(block, end_block, split_blocks, job):
        """`scheduler.piece_end` in 32 bits: the shared one's sums are of 64 here, and the registers are 40."""
        if split_blocks == 0 or column(job, JOB_NUM_PARTS) == 1:
            return end_block
        return min(end_block, i32((u32(block) // u32(split_blocks) + u32(1)) * u32(split_blocks)))

    @inline
    def first_rows(tables, lane):
        """The worker's row, and its first job's, which lies in `starts` too, so that it comes while the job's number does."""
        worker = i32(cuda.blockIdx.y)
        work, job = load_row(tables.workers, worker, WORKER_COLUMNS, lane), load_row(tables.starts, worker, JOB_COLUMNS, lane)
        # Opaque, lest they be loaded where they are used.
        return i32(ptx.opaque_b32(u32(work))), i32(ptx.opaque_b32(u32(job)))

    @inline
    def prefetch_page_ids(tables, lane):
        """Bring to L2 what this worker will ask the block table for if all requests are alike. (If not, its neighbours may.) By an idle
        warp, while the producer waits for its rows: 0 to 0.8 us less of 18 to 31 (H100). Not in the producer's own branch, which without
        clusters grows by 470 instructions then: 0 to 0.7 us more of 10 to 21 (H200)."""
        # By floats, in 20 instructions less than by integers; it is a guess.
        request = u32((f32(u32(u32(cuda.blockIdx.y) * u32(tables.num_requests))) + f32(0.5)) / f32(cuda.gridDim.y))
        entry = i32(lane * i32(WINDOW))
        if entry < tables.max_pages:
            ptx.prefetch_global_l2(tables.block_table + u64(i64(request) * tables.row_stride + entry * tables.column_stride))

    @inline
    def produce(base, lane, maps, tables, problem, work, job):
        """Walk the worker's pieces, job by job; within a piece, pairs of blocks."""
        kv_head, heads_per_kv = i32(cuda.blockIdx.z), problem.heads_per_kv
        turns = u32(u32(i32(column(work, END_JOB) - column(work, BEGIN_JOB))) << u32(JOBS_TURN))
        block = column(work, BEGIN_BLOCK)
        if column(job, JOB_REQUEST) == i32(REHEARSAL):
            # This worker has no work. It rehearses: two blocks of zeros, or the end of a piece, nothing kept, so that the kernel's code
            # is in L2 when the others come to it: 0.3 to 2 us of 19 to 85 where another kernel ran before (H100).
            turns, block, end_block = u32(0), i32(0), column(job, JOB_NUM_BLOCKS)
            work = end_block if lane == i32(END_BLOCK) else i32(0)
        while i32(turns) >= 0:
            num_rows, row_begin = i32(column(job, JOB_Q_LEN) * heads_per_kv), column(job, JOB_ROW_BEGIN)
            end_block = column(job, JOB_NUM_BLOCKS)
            if turns >> u32(JOBS_TURN) == 0:
                end_block = column(work, END_BLOCK)
            # A block of a cluster goes along wherever one of them has rows.
            more = i32(row_begin + (tile_idx() & i32(-CLUSTER_SIZE)) * BLOCK_M) < num_rows or column(job, JOB_REQUEST) == i32(REHEARSAL)
            while more:
                stop = piece_end(block, end_block, tables.split_blocks, job)
                begin = block
                # Q first, as it needs no page ids, if its place is free or there are no blocks: it is as long on its way as a block of K.
                # Else when K's buffers, free before it, are on their way.
                is_late = turns & u32(1 << LATE_Q_TURN) != 0 and stop > block
                if not is_late:
                    load_q(base, maps.q, turns, i32(stop - block), job, heads_per_kv, kv_head, lane)
                # Asked for before the piece's words, whose latency they share.
                first = i32(first_page(block) & i32(-WINDOW))
                pages = Pages(first, load_page_ids(tables, job, first, lane), load_page_ids(tables, job, i32(first + WINDOW), lane))
                if not is_late:
                    announce_piece(base, tables, turns, begin, stop, work, job, lane)
                while block < stop:
                    odd = i32(block + 1)
                    if first_page(block) >= i32(pages.first + WINDOW):
                        first = i32(pages.first + WINDOW)
                        pages = Pages(first, pages.next_window, load_page_ids(tables, job, i32(first + WINDOW), lane))
                    load_side(base, 0, 0, turns, maps, kv_head, block, pages, lane)
                    load_side(base, 0, 1, turns, maps, kv_head, block, pages, lane)
                    if block == begin and is_late:
                        load_q(base, maps.q, turns, i32(stop - block), job, heads_per_kv, kv_head, lane)
                        announce_piece(base, tables, turns, begin, stop, work, job, lane)
                    if odd < stop:
                        load_side(base, 1, 1, turns, maps, kv_head, odd, pages, lane)
                        load_side(base, 1, 0, turns, maps, kv_head, odd, pages, lane)
                        turns = u32(turns ^ u32(1 << 1))
                    turns = u32(turns ^ u32(1 << 0))
                    if PREFETCHES:
                        # The pair behind this one: farther ones would leave L2 again before they are loaded.
                        prefetch(tables.cache, kv_head, i32(block + 2), min(stop, i32(block + 4)), pages, lane)
                    block = i32(block + 2)
                # Of a piece of an even number of blocks Q is free after K's buffers, else before.
                turns = u32((turns ^ u32(1 << PIECE_TURN)) | u32(1 << LATE_Q_TURN))
                turns = u32(turns ^ u32((u32(stop - begin) & u32(1)) << u32(LATE_Q_TURN)))
                block = stop
                more = block < end_block
            block = i32(0)
            turns = u32(turns - u32(1 << JOBS_TURN))
            if i32(turns) >= 0:
                # Opaque, lest the lane's column be found before the loop around this, ahead of the first loads.
                job = load_row(tables.jobs, i32(column(work, END_JOB) - i32(turns >> u32(JOBS_TURN))), JOB_COLUMNS,
                               i32(ptx.opaque_b32(u32(lane))))
        parity = turns >> u32(PIECE_TURN) & u32(1)
        # 8 consumer warps arrived, done with the last piece.
        ptx.mbarrier_wait_parity(base + u32(Q_EMPTY_SMEM), parity ^ u32(1))
        cuda.syncwarp()
        if lane == 0:
            ptx.st_shared_i32(base + u32(PIECE_SMEM + PIECE_NUM_BLOCKS) + parity * u32(PIECE_BYTES), i32(END_OF_WORK))
            ptx.mbarrier_arrive(base + u32(Q_FULL_SMEM))

    return first_rows, prefetch_page_ids, produce
