"""The producer of `hopper_decode`: one warp that walks the worker's pieces and keeps both K buffers as full as their readers allow.

All lanes look up pages, 32 at a time, and wait; lane 0 loads, but not before all lanes have seen the phase that they wait for: one that
came late would find the phase after it, and wait for ever.
"""

from collections import namedtuple
from collections.abc import Callable

import numpy as np
from numba import cuda
from numba.cuda import types

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
from .schedule import piece_end

i32, u32, u64 = np.int32, np.uint32, np.uint64

# Entries of a block table that the warp holds at a time, one a lane.
WINDOW = 32
Job = namedtuple("Job", "request seq_len q_batch q_begin q_len row_begin num_blocks first_slot num_parts")


def make_producer(config: HopperConfig) -> Callable[..., None]:
    """`produce(base, lane, tables, problem)`, for the producer's warp."""
    PAGE_SIZE, BOX_ROWS, PAGES_PER_BLOCK = config.page_size, config.box_rows, config.pages_per_block
    BOX_BYTES = BOX_ROWS * 128
    L2_POLICY = u64(ptx.EVICT_FIRST)

    @inline
    def load_page_ids(table, column_stride, first, num_entries, lane):
        """This lane's page of the window from `first` on; -1, which TMA reads as zeros, past what the request uses."""
        page = i32(-1)
        if first + lane < num_entries:
            page = ptx.ld_global_i32(table + u64(i32(first + lane) * column_stride))
        return page

    @inline
    def block_pages(pages, window_pages, block, window_first):
        """The pages of a block, from the window that the lanes of the warp hold."""
        for box in range(PAGES_PER_BLOCK):
            entry = (block * BLOCK_N + box * BOX_ROWS) // PAGE_SIZE
            pages[box] = cuda.shfl_sync(0xFFFFFFFF, window_pages, entry - window_first)

    @inline
    def load_tiles(base, buffer, side, tile_begin, tile_end, use, kv_map, kv_head, row, pages, lane):
        """Wait until the last reader of these tiles is done with their former use, then fill them."""
        # 4 warps of warpgroup `side` arrived; phase `use` - 1, so that the first use does not wait.
        ptx.mbarrier_wait_parity(base + u32(EMPTY_SMEM + (buffer * 2 + side) * 8), (use & u32(1)) ^ u32(1))
        cuda.syncwarp()
        if lane == 0:
            for tile in range(tile_begin, tile_end):
                full = base + u32(FULL_SMEM + (buffer * NUM_TILES + tile) * 8)
                # The only arrival; the phase completes with the tile's last byte.
                ptx.mbarrier_arrive_expect_tx(full, u32(TILE_BYTES))
                k_smem = base + u32(K0_SMEM + (buffer * NUM_TILES + tile) * TILE_BYTES)
                for box in range(PAGES_PER_BLOCK):
                    ptx.tma_load_4d(k_smem + u32(box * BOX_BYTES), kv_map, full, i32(tile * TILE_COLUMNS), i32(row), i32(kv_head),
                                    i32(pages[box]), L2_POLICY)

    @inline
    def produce_piece(base, q_map, piece, num_blocks, begin_block, slot, job, heads_per_kv, kv_head, lane):
        """Describe a piece, and load its rows of Q."""
        parity = u32(piece) & u32(1)
        # 8 consumer warps arrived, done with the piece before, its Q and its P1; the first piece does not wait.
        ptx.mbarrier_wait_parity(base + u32(Q_EMPTY_SMEM), parity ^ u32(1))
        cuda.syncwarp()
        if lane == 0:
            if num_blocks > 0:
                for tile in range(NUM_TILES):
                    ptx.tma_load_4d(base + u32(Q_SMEM + tile * TILE_BYTES), q_map, base + u32(Q_FULL_SMEM), i32(tile * TILE_COLUMNS),
                                    job.q_begin * heads_per_kv + job.row_begin, kv_head, job.q_batch, L2_POLICY)
            words = base + u32(PIECE_SMEM) + parity * u32(PIECE_BYTES)
            ptx.st_shared_i32(words + u32(PIECE_NUM_BLOCKS), num_blocks)
            ptx.st_shared_i32(words + u32(PIECE_BEGIN_BLOCK), begin_block)
            ptx.st_shared_i32(words + u32(PIECE_SEQ_LEN), job.seq_len)
            ptx.st_shared_i32(words + u32(PIECE_SLOT), slot)
            ptx.st_shared_i32(words + u32(PIECE_NUM_PARTS), job.num_parts)
            ptx.st_shared_i32(words + u32(PIECE_Q_BATCH), job.q_batch)
            ptx.st_shared_i32(words + u32(PIECE_Q_BEGIN), job.q_begin)
            ptx.st_shared_i32(words + u32(PIECE_Q_LEN), job.q_len)
            ptx.st_shared_i32(words + u32(PIECE_ROW_BEGIN), job.row_begin)
            # The only arrival; completes with Q's last byte, and releases the words above.
            ptx.mbarrier_arrive_expect_tx(base + u32(Q_FULL_SMEM), u32(NUM_TILES * TILE_BYTES) if num_blocks > 0 else u32(0))

    @inline
    def read_job(table, row_idx, tile_idx):
        """All of a job at once, before anything that the compiler must not move loads across."""
        return Job(table[row_idx + JOB_REQUEST], table[row_idx + JOB_SEQ_LEN], table[row_idx + JOB_Q_BATCH], table[row_idx + JOB_Q_BEGIN],
                   table[row_idx + JOB_Q_LEN], table[row_idx + JOB_ROW_BEGIN] + tile_idx * BLOCK_M, table[row_idx + JOB_NUM_BLOCKS],
                   table[row_idx + JOB_FIRST_SLOT], table[row_idx + JOB_NUM_PARTS])

    @inline
    def produce(base, lane, tables, problem):
        """Walk the worker's pieces, job by job; within a piece, pairs of blocks."""
        tile_idx, worker, kv_head = i32(cuda.blockIdx.x), i32(cuda.blockIdx.y), i32(cuda.blockIdx.z)
        kv_map, column_stride, heads_per_kv = tables.kv_map, tables.column_stride, problem.heads_per_kv
        even_pages, odd_pages = cuda.local.array(PAGES_PER_BLOCK, types.int32), cuda.local.array(PAGES_PER_BLOCK, types.int32)
        piece, use0, use1 = i32(0), u32(0), u32(0)
        workers, worker_row = tables.workers, worker * WORKER_COLUMNS
        begin_job, end_job, split = workers[worker_row + BEGIN_JOB], workers[worker_row + END_JOB], workers[worker_row + BEGIN_SPLIT]
        block, last_end_block = workers[worker_row + BEGIN_BLOCK], workers[worker_row + END_BLOCK]
        # The first job's row lies in `starts` too, where it can be read before the job's number has come.
        row_of_job, row_idx = tables.starts, worker * JOB_COLUMNS
        for job_idx in range(begin_job, end_job + 1):
            job = read_job(row_of_job, row_idx, tile_idx)
            row_of_job, row_idx = tables.jobs, (job_idx + 1) * JOB_COLUMNS
            end_block = last_end_block if job_idx == end_job else job.num_blocks
            num_entries = min(tables.max_pages, (job.seq_len + PAGE_SIZE - 1) // PAGE_SIZE)
            table = tables.block_table + u64(i32(job.request) * tables.row_stride)
            more = job.row_begin < job.q_len * heads_per_kv
            while more:
                stop = piece_end(block, end_block, tables.split_blocks)
                slot = job.first_slot + split if job.first_slot != NOT_SPLIT else i32(NOT_SPLIT)
                # The first piece's Q, and one without blocks, at once; the others' when K's buffers, free before Q's, are on their way.
                q_first = piece == 0 or stop <= block
                if q_first:
                    produce_piece(base, tables.q_map, piece, i32(stop - block), i32(block), slot, job, heads_per_kv, kv_head, lane)
                window_first = i32(block * BLOCK_N // PAGE_SIZE) & i32(-WINDOW)
                window = load_page_ids(table, column_stride, window_first, num_entries, lane)
                next_window = load_page_ids(table, column_stride, window_first + WINDOW, num_entries, lane)
                for even in range(block, stop, 2):
                    odd = even + 1
                    if even * BLOCK_N // PAGE_SIZE >= window_first + WINDOW:
                        window_first += WINDOW
                        window = next_window
                        next_window = load_page_ids(table, column_stride, window_first + WINDOW, num_entries, lane)
                    block_pages(even_pages, window, even, window_first)
                    even_row, odd_row = even * BLOCK_N % PAGE_SIZE, odd * BLOCK_N % PAGE_SIZE
                    load_tiles(base, 0, 0, 0, LEFT_TILES, use0, kv_map, kv_head, even_row, even_pages, lane)
                    if even == block:
                        load_tiles(base, 0, 1, LEFT_TILES, NUM_TILES, use0, kv_map, kv_head, even_row, even_pages, lane)
                        if not q_first:
                            produce_piece(base, tables.q_map, piece, i32(stop - block), i32(block), slot, job, heads_per_kv, kv_head, lane)
                    if odd < stop:
                        # The odd block's pages may be the first of the next window.
                        odd_first, odd_window = window_first, window
                        if odd * BLOCK_N // PAGE_SIZE >= window_first + WINDOW:
                            odd_first, odd_window = window_first + WINDOW, next_window
                        block_pages(odd_pages, odd_window, odd, odd_first)
                        load_tiles(base, 1, 1, LEFT_TILES, NUM_TILES, use1, kv_map, kv_head, odd_row, odd_pages, lane)
                    if even > block:
                        load_tiles(base, 0, 1, LEFT_TILES, NUM_TILES, use0, kv_map, kv_head, even_row, even_pages, lane)
                    if odd < stop:
                        load_tiles(base, 1, 0, 0, LEFT_TILES, use1, kv_map, kv_head, odd_row, odd_pages, lane)
                        use1 += u32(1)
                    use0 += u32(1)
                piece += 1
                split += 1
                block = stop
                more = block < end_block
            block, split = i32(0), i32(0)
        parity = u32(piece) & u32(1)
        # 8 consumer warps arrived, done with the last piece.
        ptx.mbarrier_wait_parity(base + u32(Q_EMPTY_SMEM), parity ^ u32(1))
        cuda.syncwarp()
        if lane == 0:
            ptx.st_shared_i32(base + u32(PIECE_SMEM + PIECE_NUM_BLOCKS) + parity * u32(PIECE_BYTES), i32(END_OF_WORK))
            ptx.mbarrier_arrive(base + u32(Q_FULL_SMEM))

    return produce
