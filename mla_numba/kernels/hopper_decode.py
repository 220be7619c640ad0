"""Dense MLA decode for Hopper: TMA, wgmma, and two warpgroups that take turns between the tensor core and the exponentials.

A thread block attends 64 packed query rows to pairs of 64-token blocks. Two consumer warpgroups hold O between them, left and right;
a third brings the tiles. With even block j, odd block j + 1:

    warpgroup 0 (O left)   | mask, max, exp P0 | O_l += P0 V0_l | P0 to smem | O_l += P1 V1_l, S = Q K(j+2)      |
    warpgroup 1 (O right)  |     S = Q K(j+1)        | mask, max, exp P1 | O_r += P1 V1_r, O_r += P0 V0_r | S = ... |
    warpgroup 2, one warp  | TMA: K0 tiles 0-3, K1 tiles 4-8, K0 tiles 4-8, K1 tiles 0-3, each as its last reader is done |

While one warpgroup exponentiates, the other one's products keep the tensor core busy ("seesaw"). A tile of V is a tile of K: the cache
is read once. The running maximum goes 0 -> 1 -> 0 through max_smem, and only follows where a row grew by more than 2^8.

    shared     Q 9 tiles | K0 9 tiles | K1 9 tiles | P0 1 tile | max, scales, sums, pieces, mbarriers    tile = 64 rows x 128 bytes
               P1 lies in Q's tile 8, which both warpgroups keep in registers (q8_rmem)
    registers  consumers 232: O 128, S 32, P 16, Q tile 8 16, the rest addresses; producer 40

Who waits for whom (see the table in docs/kernel.md; one line each where it happens):

    full[buffer][tile]    producer's TMA -> the warpgroup that multiplies Q by that buffer; one phase a use
    empty[buffer][side]   the 4 warps of the side's last reader -> producer; side 0 is tiles 0-3, side 1 is tiles 4-8
    q_full, q_empty       producer (piece and Q) -> 8 consumer warps; 8 consumer warps -> producer; one phase a piece
    P0_MAX, P1_MAX, P0_STORED, P1_STORED, SUMS    named barriers of the 256 consumers
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from .. import ptx
from ..contract import HEAD_DIM_QK, HEAD_DIM_V, LN_2
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
    MERGE_LEAST_PARTS,
    NOT_SPLIT,
    WORKER_COLUMNS,
)
from .schedule import piece_end

i32, i64, u32, u64, f32 = np.int32, np.int64, np.uint32, np.uint64, np.float32

inline = cuda.jit(device=True, forceinline=True, fastmath=True)

# Below any score, and finite, so that a difference of two is a number.
NO_SCORE = f32(-1e30)
MINUS_INFINITY = f32(-np.inf)
# The maximum may lag so many powers of two behind: P stays below 2^8, exact after the division by the sum.
MAX_LAG = f32(8)

BLOCK_M = 64                            # query rows of a thread block: the M of wgmma
BLOCK_N = 64                            # tokens of a step: rows of a tile
TILE_COLUMNS = 64                       # 128 bytes of 16-bit elements: the width of the swizzle
TILE_BYTES = 64 * 128
NUM_TILES = HEAD_DIM_QK // TILE_COLUMNS     # of Q and of a block of K: 9, of which 8 are V
LEFT_TILES = HEAD_DIM_V // TILE_COLUMNS // 2    # of a block, read last by warpgroup 0; the others by warpgroup 1
NUM_CONSUMERS = 256
NUM_WARPS = NUM_CONSUMERS // 32         # of consumers, each with 16 rows and half of the columns of O
WARP_PART_BYTES = 16 * (HEAD_DIM_V // 2) * 4
# Strips of another piece's O that are in flight while this one's are weighted.
STRIPS_AT_ONCE = 8
OTHER_REGISTERS = 4 * STRIPS_AT_ONCE
NUM_THREADS = 384

# Named barriers; 0 is syncthreads.
P0_MAX, P1_MAX, P0_STORED, P1_STORED, SUMS, WARPGROUP = 1, 2, 3, 4, 5, 6

# Shared memory, bytes from a multiple of 1,024.
Q_SMEM = 0
K0_SMEM = Q_SMEM + NUM_TILES * TILE_BYTES
K1_SMEM = K0_SMEM + NUM_TILES * TILE_BYTES
P0_SMEM = K1_SMEM + NUM_TILES * TILE_BYTES
P1_SMEM = Q_SMEM + (NUM_TILES - 1) * TILE_BYTES
MAX_SMEM = P0_SMEM + TILE_BYTES
SCALE0_SMEM = MAX_SMEM + 4 * BLOCK_M
SCALE1_SMEM = SCALE0_SMEM + 4 * BLOCK_M
SUM_SMEM = SCALE1_SMEM + 4 * BLOCK_M
PIECE_SMEM = SUM_SMEM + 2 * 4 * BLOCK_M
PIECE_BYTES = 64
FULL_SMEM = PIECE_SMEM + 2 * PIECE_BYTES
EMPTY_SMEM = FULL_SMEM + 2 * NUM_TILES * 8
Q_FULL_SMEM = EMPTY_SMEM + 2 * 2 * 8
Q_EMPTY_SMEM = Q_FULL_SMEM + 8
SMEM_BYTES = Q_EMPTY_SMEM + 8 + 1024

# A piece, as the producer describes it to the consumers: int32 words of piece_smem.
(PIECE_NUM_BLOCKS, PIECE_BEGIN_BLOCK, PIECE_SEQ_LEN, PIECE_SLOT, PIECE_NUM_PARTS, PIECE_Q_BATCH, PIECE_Q_BEGIN, PIECE_Q_LEN,
 PIECE_ROW_BEGIN) = (4 * word for word in range(9))
END_OF_WORK = -1


@dataclass(frozen=True)
class HopperConfig:
    """What one compiled kernel is made for."""

    dtype: str
    page_size: int

    @property
    def box_rows(self) -> int:
        """Tokens of a TMA box: a page, or a block's part of it."""
        return min(self.page_size, BLOCK_N)

    @property
    def pages_per_block(self) -> int:
        return BLOCK_N // self.box_rows


def decode_signature() -> types.Type:
    """Types of the kernel's arguments, in the order of `hopper_decode`'s."""
    table, i, f = types.CPointer(types.int32), types.int32, types.float32
    stride = types.int64
    return types.void(types.uint64, types.uint64, types.uint64, stride, stride, i, table, table, table, types.uint64, stride, stride, stride,
                      types.uint64, stride, stride, stride, types.uint64, types.uint64, types.uint64, i, i, i, f, f)


@cache
def make_decode_kernel(config: HopperConfig) -> Callable[..., None]:
    """The kernel for `config`, not yet compiled. Grid (row tiles of a job, workers, KV heads), NUM_THREADS threads, SMEM_BYTES."""
    PAGE_SIZE, BOX_ROWS, PAGES_PER_BLOCK = config.page_size, config.box_rows, config.pages_per_block
    BOX_BYTES = BOX_ROWS * 128

    wgmma_qk = ptx.make_wgmma(64, config.dtype)
    wgmma_qk_rmem = ptx.make_wgmma(64, config.dtype, a_in_registers=True)
    wgmma_pv = ptx.make_wgmma(256, config.dtype, b_transposed=True)
    wgmma_pv_rmem = ptx.make_wgmma(256, config.dtype, a_in_registers=True, b_transposed=True)
    wait_all, wait_all_but_1, wait_all_but_4 = (ptx.make_wgmma_wait_group(pending) for pending in (0, 1, 4))
    o_fence, s_fence, p_fence = ptx.make_registers_fence(128), ptx.make_registers_fence(32), ptx.make_registers_fence(16, types.uint32)
    consumer_registers, producer_registers = ptx.make_setmaxnreg("inc", 232), ptx.make_setmaxnreg("dec", 40)
    to_pair = ptx.cvt_bf16x2 if config.dtype == "bfloat16" else ptx.cvt_f16x2
    K_MAJOR, MN_MAJOR = u64(ptx.DESCRIPTOR_K_MAJOR), u64(ptx.DESCRIPTOR_MN_MAJOR)
    L2_POLICY = u64(ptx.EVICT_FIRST)

    # ---------------------------------------------------------------------------------------------------------------- producer

    @inline
    def load_page_ids(block_table, column_stride, first, num_entries, lane):
        """This lane's page of the 32 from `first` on; -1, which TMA reads as zeros, past what the request uses."""
        page = i32(-1)
        if first + lane < num_entries:
            page = ptx.ld_global_i32(block_table + u64(i32(first + lane) * column_stride))
        return page

    @inline
    def load_tiles(base, buffer, side, tile_begin, tile_end, use, kv_map, kv_head, row, pages, lane):
        """Wait until the last reader of these tiles is done with their former use, then fill them."""
        # 4 warps of warpgroup `side` arrived; phase `use` - 1, so that the first use does not wait.
        ptx.mbarrier_wait_parity(base + u32(EMPTY_SMEM + (buffer * 2 + side) * 8), (use & u32(1)) ^ u32(1))
        if lane == 0:
            for tile in range(tile_begin, tile_end):
                full = base + u32(FULL_SMEM + (buffer * NUM_TILES + tile) * 8)
                # The only arrival; the phase completes with the tile's last byte.
                ptx.mbarrier_arrive_expect_tx(full, u32(TILE_BYTES))
                for box in range(PAGES_PER_BLOCK):
                    ptx.tma_load_4d(base + u32(K0_SMEM + buffer * NUM_TILES * TILE_BYTES + tile * TILE_BYTES + box * BOX_BYTES), kv_map, full,
                                    i32(tile * TILE_COLUMNS), i32(row), i32(kv_head), i32(pages[box]), L2_POLICY)

    @inline
    def block_pages(pages, window_pages, block, window_first):
        """The pages of a block, from the window that the lanes of the warp hold."""
        for box in range(PAGES_PER_BLOCK):
            if PAGES_PER_BLOCK == 1:
                entry = block * BLOCK_N // PAGE_SIZE
            else:
                entry = block * PAGES_PER_BLOCK + box
            pages[box] = cuda.shfl_sync(0xFFFFFFFF, window_pages, entry - window_first)

    @inline
    def produce_q(base, q_map, piece, num_blocks, begin_block, seq_len, slot, num_parts, q_batch, q_begin, q_len, row_begin, heads_per_kv, kv_head, lane):
        """Describe the piece, and load its rows of Q."""
        # 8 consumer warps arrived, done with the piece before, its Q and its P1; the first piece does not wait.
        ptx.mbarrier_wait_parity(base + u32(Q_EMPTY_SMEM), (u32(piece) & u32(1)) ^ u32(1))
        if lane == 0:
            if num_blocks > 0:
                for tile in range(NUM_TILES):
                    ptx.tma_load_4d(base + u32(Q_SMEM + tile * TILE_BYTES), q_map, base + u32(Q_FULL_SMEM), i32(tile * TILE_COLUMNS),
                                    q_begin * heads_per_kv + row_begin, kv_head, q_batch, L2_POLICY)
            words = base + u32(PIECE_SMEM) + (u32(piece) & u32(1)) * u32(PIECE_BYTES)
            ptx.st_shared_i32(words + u32(PIECE_NUM_BLOCKS), num_blocks)
            ptx.st_shared_i32(words + u32(PIECE_BEGIN_BLOCK), begin_block)
            ptx.st_shared_i32(words + u32(PIECE_SEQ_LEN), seq_len)
            ptx.st_shared_i32(words + u32(PIECE_SLOT), slot)
            ptx.st_shared_i32(words + u32(PIECE_NUM_PARTS), num_parts)
            ptx.st_shared_i32(words + u32(PIECE_Q_BATCH), q_batch)
            ptx.st_shared_i32(words + u32(PIECE_Q_BEGIN), q_begin)
            ptx.st_shared_i32(words + u32(PIECE_Q_LEN), q_len)
            ptx.st_shared_i32(words + u32(PIECE_ROW_BEGIN), row_begin)
            # The only arrival; completes with Q's last byte, and releases the words above.
            ptx.mbarrier_arrive_expect_tx(base + u32(Q_FULL_SMEM), u32(NUM_TILES * TILE_BYTES) if num_blocks > 0 else u32(0))

    @inline
    def produce(base, lane, q_map, kv_map, block_table, table_row_stride, table_column_stride, max_pages, jobs, workers, starts,
                heads_per_kv, split_blocks):
        """Walk the worker's pieces; keep both buffers as full as their readers allow."""
        tile_idx, worker, kv_head = i32(cuda.blockIdx.x), i32(cuda.blockIdx.y), i32(cuda.blockIdx.z)
        even_pages, odd_pages = cuda.local.array(PAGES_PER_BLOCK, types.int32), cuda.local.array(PAGES_PER_BLOCK, types.int32)
        piece = i32(0)
        use0 = u32(0)
        use1 = u32(0)
        begin_job, end_job = workers[worker * WORKER_COLUMNS + BEGIN_JOB], workers[worker * WORKER_COLUMNS + END_JOB]
        block, last_end_block = workers[worker * WORKER_COLUMNS + BEGIN_BLOCK], workers[worker * WORKER_COLUMNS + END_BLOCK]
        split = workers[worker * WORKER_COLUMNS + BEGIN_SPLIT]
        # The first job's row lies in `starts` too, where it can be read before the job's number has come.
        row_of_job, row_idx = starts, worker * JOB_COLUMNS
        for job in range(begin_job, end_job + 1):
            # All of the job at once, before anything that the compiler must not move loads across.
            request, seq_len = row_of_job[row_idx + JOB_REQUEST], row_of_job[row_idx + JOB_SEQ_LEN]
            q_batch, q_begin = row_of_job[row_idx + JOB_Q_BATCH], row_of_job[row_idx + JOB_Q_BEGIN]
            q_len, row_begin = row_of_job[row_idx + JOB_Q_LEN], row_of_job[row_idx + JOB_ROW_BEGIN] + tile_idx * BLOCK_M
            end_block, first_slot = row_of_job[row_idx + JOB_NUM_BLOCKS], row_of_job[row_idx + JOB_FIRST_SLOT]
            num_parts = row_of_job[row_idx + JOB_NUM_PARTS]
            row_of_job, row_idx = jobs, (job + 1) * JOB_COLUMNS
            if job == end_job:
                end_block = last_end_block
            num_entries = min(max_pages, (seq_len + PAGE_SIZE - 1) // PAGE_SIZE)
            table = block_table + u64(i32(request) * table_row_stride)
            more = row_begin < q_len * heads_per_kv
            while more:
                stop = piece_end(block, end_block, split_blocks)
                slot = first_slot + split if first_slot != NOT_SPLIT else i32(NOT_SPLIT)
                # The first piece's Q, and one without blocks, at once; the others' when K's buffers, free before Q's, are on their way.
                q_first = piece == 0 or stop <= block
                if q_first:
                    produce_q(base, q_map, piece, i32(stop - block), i32(block), seq_len, slot, num_parts, q_batch, q_begin, q_len, row_begin,
                              heads_per_kv, kv_head, lane)
                window_first = i32(block * BLOCK_N // PAGE_SIZE) & i32(-32)
                window = load_page_ids(table, table_column_stride, window_first, num_entries, lane)
                next_window = load_page_ids(table, table_column_stride, window_first + 32, num_entries, lane)
                for pair in range(block, stop, 2):
                    if pair * BLOCK_N // PAGE_SIZE >= window_first + 32:
                        window_first += 32
                        window = next_window
                        next_window = load_page_ids(table, table_column_stride, window_first + 32, num_entries, lane)
                    block_pages(even_pages, window, pair, window_first)
                    row = pair * BLOCK_N % PAGE_SIZE
                    load_tiles(base, 0, 0, 0, LEFT_TILES, use0, kv_map, kv_head, row, even_pages, lane)
                    if pair == block:
                        load_tiles(base, 0, 1, LEFT_TILES, NUM_TILES, use0, kv_map, kv_head, row, even_pages, lane)
                        if not q_first:
                            produce_q(base, q_map, piece, i32(stop - block), i32(block), seq_len, slot, num_parts, q_batch, q_begin, q_len, row_begin,
                                      heads_per_kv, kv_head, lane)
                    if pair + 1 < stop:
                        # The odd block's pages may be the first of the next window.
                        odd_first, odd_window = window_first, window
                        if (pair + 1) * BLOCK_N // PAGE_SIZE >= window_first + 32:
                            odd_first, odd_window = window_first + 32, next_window
                        block_pages(odd_pages, odd_window, pair + 1, odd_first)
                        load_tiles(base, 1, 1, LEFT_TILES, NUM_TILES, use1, kv_map, kv_head, (pair + 1) * BLOCK_N % PAGE_SIZE, odd_pages, lane)
                    if pair > block:
                        load_tiles(base, 0, 1, LEFT_TILES, NUM_TILES, use0, kv_map, kv_head, row, even_pages, lane)
                    if pair + 1 < stop:
                        load_tiles(base, 1, 0, 0, LEFT_TILES, use1, kv_map, kv_head, (pair + 1) * BLOCK_N % PAGE_SIZE, odd_pages, lane)
                        use1 += u32(1)
                    use0 += u32(1)
                piece += 1
                split += 1
                block = stop
                more = block < end_block
            block, split = i32(0), i32(0)
        # 8 consumer warps arrived, done with the last piece.
        ptx.mbarrier_wait_parity(base + u32(Q_EMPTY_SMEM), (u32(piece) & u32(1)) ^ u32(1))
        if lane == 0:
            ptx.st_shared_i32(base + u32(PIECE_SMEM + PIECE_NUM_BLOCKS) + (u32(piece) & u32(1)) * u32(PIECE_BYTES), i32(END_OF_WORK))
            ptx.mbarrier_arrive(base + u32(Q_FULL_SMEM))

    # --------------------------------------------------------------------------------------------------------------- consumers

    @inline
    def release(mbar, lane):
        """This warp is done with what `mbar` guards; 4 or 8 warps make the phase."""
        if lane == 0:
            ptx.mbarrier_arrive(mbar)

    @inline
    def load_q8(q8_rmem, base, thread):
        """Q's last tile to registers, as wgmma's A; its place becomes P1's."""
        lane = thread & u32(31)
        row = (thread >> u32(5)) * u32(16) + (lane & u32(15))
        for k in range(4):
            chunk = u32(2 * k) + (lane >> u32(4))
            ptx.ldmatrix_x4(q8_rmem, 4 * k, base + u32(P1_SMEM) + row * u32(128) + ((chunk ^ (row & u32(7))) << u32(4)))

    @inline
    def qk_tile(s_rmem, base, k_smem, full, tile, parity, accumulate):
        """S += Q K^T over the 64 dims of a tile of shared memory."""
        # Producer's TMA of this tile; `parity` of the buffer's use.
        ptx.mbarrier_wait_parity(full + u32(tile * 8), parity)
        q_desc = K_MAJOR | u64((base + u32(Q_SMEM)) >> u32(4))
        k_desc = K_MAJOR | u64(k_smem >> u32(4))
        ptx.wgmma_fence()
        for k in range(4):
            wgmma_qk(s_rmem, q_desc + u64(tile * (TILE_BYTES >> 4) + k * 2), k_desc + u64(tile * (TILE_BYTES >> 4) + k * 2),
                     u32(1) if k > 0 else u32(accumulate))
        ptx.wgmma_commit_group()

    @inline
    def qk_last_tile(s_rmem, q8_rmem, k_smem, full, parity):
        """S += Q K^T over the last 64 dims, with Q from registers."""
        ptx.mbarrier_wait_parity(full + u32((NUM_TILES - 1) * 8), parity)
        k_desc = K_MAJOR | u64(k_smem >> u32(4))
        ptx.wgmma_fence()
        for k in range(4):
            wgmma_qk_rmem(s_rmem, q8_rmem[4 * k], q8_rmem[4 * k + 1], q8_rmem[4 * k + 2], q8_rmem[4 * k + 3],
                          k_desc + u64((NUM_TILES - 1) * (TILE_BYTES >> 4) + k * 2), u32(1))
        ptx.wgmma_commit_group()

    @inline
    def pv_rmem(o_rmem, p_rmem, v_smem):
        """O += P V, P from registers."""
        v_desc = MN_MAJOR | u64(v_smem >> u32(4))
        ptx.wgmma_fence()
        for k in range(4):
            wgmma_pv_rmem(o_rmem, p_rmem[4 * k], p_rmem[4 * k + 1], p_rmem[4 * k + 2], p_rmem[4 * k + 3], v_desc + u64(k * 128), u32(1))
        ptx.wgmma_commit_group()

    @inline
    def pv_smem(o_rmem, p_smem, v_smem):
        """O += P V, P from shared memory: the other warpgroup's."""
        p_desc = K_MAJOR | u64(p_smem >> u32(4))
        v_desc = MN_MAJOR | u64(v_smem >> u32(4))
        ptx.wgmma_fence()
        for k in range(4):
            wgmma_pv(o_rmem, p_desc + u64(k * 2), v_desc + u64(k * 128), u32(1))
        ptx.wgmma_commit_group()

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
    def lagging_max(old, new):
        return old if new <= old + MAX_LAG else new

    @inline
    def rescale(o_rmem, factor_a, factor_b):
        """O *= factor, by row; most often no row of the warp needs it."""
        if cuda.any_sync(0xFFFFFFFF, factor_a != f32(1) or factor_b != f32(1)):
            for i in range(32):
                o_rmem[4 * i] *= factor_a
                o_rmem[4 * i + 1] *= factor_a
                o_rmem[4 * i + 2] *= factor_b
                o_rmem[4 * i + 3] *= factor_b

    @inline
    def pack(p_rmem, s_rmem, factor_a, factor_b):
        """P as wgmma's A, 16-bit, from S's registers: the layouts of D and A agree."""
        for i in range(8):
            p_rmem[2 * i] = to_pair(s_rmem[4 * i + 1] * factor_a, s_rmem[4 * i] * factor_a)
            p_rmem[2 * i + 1] = to_pair(s_rmem[4 * i + 3] * factor_b, s_rmem[4 * i + 2] * factor_b)

    @inline
    def store_p(p_rmem, p_smem, thread):
        """P to shared memory in the swizzled layout; each warp its own 16 rows."""
        lane = thread & u32(31)
        row = (thread >> u32(5)) * u32(16) + (lane & u32(15))
        for k in range(4):
            chunk = u32(2 * k) + (lane >> u32(4))
            ptx.stmatrix_x4(p_smem + row * u32(128) + ((chunk ^ (row & u32(7))) << u32(4)), p_rmem[4 * k], p_rmem[4 * k + 1],
                            p_rmem[4 * k + 2], p_rmem[4 * k + 3])
        # Before the barrier after which the other warpgroup's wgmma reads it.
        ptx.fence_proxy_async_shared()

    @inline
    def mask(s_rmem, first_token, visible_a, visible_b, thread):
        """Scores of tokens that a row does not see become -inf."""
        token = first_token + i32((thread & u32(3)) * u32(2))
        for i in range(8):
            for c in range(2):
                if token + i * 8 + c >= visible_a:
                    s_rmem[4 * i + c] = MINUS_INFINITY
                if token + i * 8 + c >= visible_b:
                    s_rmem[4 * i + 2 + c] = MINUS_INFINITY

    @inline
    def zero_tail(k_smem, num_tokens, thread, barrier_idx):
        """Zero the rows of V past the request's end, where the cache may hold NaN, which even P = 0 would let through."""
        # All 4 warps of this warpgroup, whose wgmma have read these rows as K.
        ptx.bar_sync(u32(barrier_idx), u32(128))
        for row in range(num_tokens + i32(thread >> u32(6)), BLOCK_N, 2):
            chunk = thread & u32(63)
            ptx.st_shared_v4_b32(k_smem + (chunk >> u32(3)) * u32(TILE_BYTES) + u32(row) * u32(128) + ((chunk & u32(7)) << u32(4)), u32(0), u32(0),
                             u32(0), u32(0))
        ptx.fence_proxy_async_shared()
        # All 4 warps of this warpgroup, before its wgmma reads the rows as V; the other warpgroup's waits for P.
        ptx.bar_sync(u32(barrier_idx), u32(128))

    @inline
    def visible_to(row, seq_len, q_len, heads_per_kv, causal):
        """Tokens that a packed row sees; a row that is none sees all, so that it makes no block a masked one."""
        if causal == 0 or row >= q_len * heads_per_kv:
            return seq_len
        return seq_len - (q_len - i32(1) - row // heads_per_kv)

    @inline
    def hide_unseen(s_rmem, k_smem, first_token, all_see, words, thread, heads_per_kv, causal, barrier_idx):
        """Mask the block if a row of the tile does not see all of it. Nothing is in flight here."""
        if first_token + BLOCK_N > all_see:
            # Of the few blocks at a request's end; what is read again here need not be kept in registers.
            seq_len, q_len = ptx.ld_shared_i32(words + u32(PIECE_SEQ_LEN)), ptx.ld_shared_i32(words + u32(PIECE_Q_LEN))
            row = ptx.ld_shared_i32(words + u32(PIECE_ROW_BEGIN)) + i32((thread >> u32(5)) * u32(16) + ((thread & u32(31)) >> u32(2)))
            mask(s_rmem, first_token, visible_to(row, seq_len, q_len, heads_per_kv, causal),
                 visible_to(row + i32(8), seq_len, q_len, heads_per_kv, causal), thread)
            if first_token + BLOCK_N > seq_len:
                zero_tail(k_smem, seq_len - first_token, thread, barrier_idx)

    @inline
    def even_step(s_rmem, o_rmem, p_rmem, q8_rmem, sums_rmem, base, row_smem, thread, lane, scale_log2e, first_token, all_see, words, heads_per_kv, causal, parity, HAS_ODD, HAS_NEXT):
        """Warpgroup 0: softmax of the even block, O_left += P0 V0 + P1 V1, S of the next even block."""
        base = ptx.opaque_b32(base)
        k0_smem, k1_smem = base + u32(K0_SMEM), base + u32(K1_SMEM)
        hide_unseen(s_rmem, k0_smem, first_token, all_see, words, thread, heads_per_kv, causal, WARPGROUP)
        old_a, old_b = ptx.ld_shared_f32(row_smem + u32(MAX_SMEM)), ptx.ld_shared_f32(row_smem + u32(MAX_SMEM + 32))
        max_a = lagging_max(old_a, row_max(s_rmem, 0) * scale_log2e)
        max_b = lagging_max(old_b, row_max(s_rmem, 1) * scale_log2e)
        scale_a, scale_b = ptx.ex2(old_a - max_a), ptx.ex2(old_b - max_b)
        cuda.syncwarp()
        if thread & u32(3) == 0:
            ptx.st_shared_f32(row_smem + u32(MAX_SMEM), max_a)
            ptx.st_shared_f32(row_smem + u32(MAX_SMEM + 32), max_b)
            ptx.st_shared_f32(row_smem + u32(SCALE0_SMEM), scale_a)
            ptx.st_shared_f32(row_smem + u32(SCALE0_SMEM + 32), scale_b)
        rescale(o_rmem, scale_a, scale_b)
        sums_rmem[0] = sums_rmem[0] * scale_a + exp_row(s_rmem, 0, scale_log2e, max_a)
        sums_rmem[1] = sums_rmem[1] * scale_b + exp_row(s_rmem, 1, scale_log2e, max_b)
        pack(p_rmem, s_rmem, f32(1), f32(1))
        # Warpgroup 0 arrives, warpgroup 1 waits: the maximum after the even block, and that Q's tile 8 has been read.
        ptx.bar_arrive(u32(P0_MAX), u32(NUM_CONSUMERS))
        o_fence(o_rmem)
        p_fence(p_rmem)
        pv_rmem(o_rmem, p_rmem, k0_smem)
        wait_all()
        o_fence(o_rmem)
        p_fence(p_rmem)
        release(base + u32(EMPTY_SMEM + 0), lane)
        # Warpgroup 1 arrives, warpgroup 0 waits: the maximum after the odd block; and that it no longer reads P0.
        ptx.bar_sync(u32(P1_MAX), u32(NUM_CONSUMERS))
        scale_a, scale_b = ptx.ld_shared_f32(row_smem + u32(SCALE1_SMEM)), ptx.ld_shared_f32(row_smem + u32(SCALE1_SMEM + 32))
        pack(p_rmem, s_rmem, scale_a, scale_b)
        store_p(p_rmem, base + u32(P0_SMEM), thread)
        # Warpgroup 0 arrives, warpgroup 1 waits: P0 and V0 are there.
        ptx.bar_arrive(u32(P0_STORED), u32(NUM_CONSUMERS))
        if HAS_ODD:
            # Warpgroup 1 arrives, warpgroup 0 waits: P1 and V1 are there.
            ptx.bar_sync(u32(P1_STORED), u32(NUM_CONSUMERS))
            rescale(o_rmem, scale_a, scale_b)
            sums_rmem[0] *= scale_a
            sums_rmem[1] *= scale_b
            o_fence(o_rmem)
            pv_smem(o_rmem, base + u32(P1_SMEM), k1_smem)
        if HAS_NEXT:
            full = base + u32(FULL_SMEM)
            s_fence(s_rmem)
            for tile in range(4):
                qk_tile(s_rmem, base, k0_smem, full, tile, parity, tile > 0)
            wait_all_but_4()
            o_fence(o_rmem)
            release(base + u32(EMPTY_SMEM + 16), lane)
            for tile in range(4, NUM_TILES - 1):
                qk_tile(s_rmem, base, k0_smem, full, tile, parity, True)
            qk_last_tile(s_rmem, q8_rmem, k0_smem, full, parity)
            wait_all()
            s_fence(s_rmem)
        elif HAS_ODD:
            wait_all()
            o_fence(o_rmem)
            release(base + u32(EMPTY_SMEM + 16), lane)

    @inline
    def odd_step(s_rmem, o_rmem, p_rmem, q8_rmem, sums_rmem, base, row_smem, thread, lane, scale_log2e, first_token, all_see, words, heads_per_kv, causal, parity, HAS_ODD, HAS_NEXT):
        """Warpgroup 1: softmax of the odd block, O_right += P1 V1 + P0 V0, S of the next odd block."""
        base = ptx.opaque_b32(base)
        v0_smem, v1_smem = base + u32(K0_SMEM + LEFT_TILES * TILE_BYTES), base + u32(K1_SMEM + LEFT_TILES * TILE_BYTES)
        k1_smem = base + u32(K1_SMEM)
        new_a, new_b = NO_SCORE, NO_SCORE
        if HAS_ODD:
            hide_unseen(s_rmem, k1_smem, first_token, all_see, words, thread, heads_per_kv, causal, WARPGROUP + 1)
            new_a, new_b = row_max(s_rmem, 0) * scale_log2e, row_max(s_rmem, 1) * scale_log2e
        # Warpgroup 0 arrives, warpgroup 1 waits: the maximum after the even block.
        ptx.bar_sync(u32(P0_MAX), u32(NUM_CONSUMERS))
        old_a, old_b = ptx.ld_shared_f32(row_smem + u32(MAX_SMEM)), ptx.ld_shared_f32(row_smem + u32(MAX_SMEM + 32))
        max_a, max_b = lagging_max(old_a, new_a), lagging_max(old_b, new_b)
        scale_a, scale_b = ptx.ex2(old_a - max_a), ptx.ex2(old_b - max_b)
        both_a = scale_a * ptx.ld_shared_f32(row_smem + u32(SCALE0_SMEM))
        both_b = scale_b * ptx.ld_shared_f32(row_smem + u32(SCALE0_SMEM + 32))
        cuda.syncwarp()
        if thread & u32(3) == 0:
            ptx.st_shared_f32(row_smem + u32(MAX_SMEM), max_a)
            ptx.st_shared_f32(row_smem + u32(MAX_SMEM + 32), max_b)
            ptx.st_shared_f32(row_smem + u32(SCALE1_SMEM), scale_a)
            ptx.st_shared_f32(row_smem + u32(SCALE1_SMEM + 32), scale_b)
        # Warpgroup 1 arrives, warpgroup 0 waits: the maximum after the odd block; P0's former use is over.
        ptx.bar_arrive(u32(P1_MAX), u32(NUM_CONSUMERS))
        sums_rmem[0] *= both_a
        sums_rmem[1] *= both_b
        if HAS_ODD:
            sums_rmem[0] += exp_row(s_rmem, 0, scale_log2e, max_a)
            sums_rmem[1] += exp_row(s_rmem, 1, scale_log2e, max_b)
        rescale(o_rmem, both_a, both_b)
        if HAS_ODD:
            pack(p_rmem, s_rmem, f32(1), f32(1))
            o_fence(o_rmem)
            p_fence(p_rmem)
            pv_rmem(o_rmem, p_rmem, v1_smem)
            store_p(p_rmem, base + u32(P1_SMEM), thread)
        else:
            o_fence(o_rmem)
        # Warpgroup 0 arrives, warpgroup 1 waits: P0 and V0 are there.
        ptx.bar_sync(u32(P0_STORED), u32(NUM_CONSUMERS))
        pv_smem(o_rmem, base + u32(P0_SMEM), v0_smem)
        if HAS_ODD:
            # Warpgroup 1 arrives, warpgroup 0 waits: P1 and V1 are there.
            ptx.bar_arrive(u32(P1_STORED), u32(NUM_CONSUMERS))
            wait_all_but_1()
            p_fence(p_rmem)
            release(base + u32(EMPTY_SMEM + 24), lane)
        wait_all()
        o_fence(o_rmem)
        release(base + u32(EMPTY_SMEM + 8), lane)
        if HAS_NEXT:
            qk_odd(s_rmem, q8_rmem, base, parity)

    @inline
    def qk_odd(s_rmem, q8_rmem, base, parity):
        """S of an odd block, its tiles in the order in which they come."""
        k1_smem, full = base + u32(K1_SMEM), base + u32(FULL_SMEM + NUM_TILES * 8)
        s_fence(s_rmem)
        for tile in range(4, NUM_TILES - 1):
            qk_tile(s_rmem, base, k1_smem, full, tile, parity, tile > 4)
        qk_last_tile(s_rmem, q8_rmem, k1_smem, full, parity)
        for tile in range(4):
            qk_tile(s_rmem, base, k1_smem, full, tile, parity, True)
        wait_all()
        s_fence(s_rmem)

    @inline
    def qk_even(s_rmem, q8_rmem, base, parity):
        """S of the first block of a piece."""
        k0_smem, full = base + u32(K0_SMEM), base + u32(FULL_SMEM)
        s_fence(s_rmem)
        for tile in range(NUM_TILES - 1):
            qk_tile(s_rmem, base, k0_smem, full, tile, parity, tile > 0)
        qk_last_tile(s_rmem, q8_rmem, k0_smem, full, parity)
        wait_all()
        s_fence(s_rmem)

    @inline
    def attend_even(s_rmem, o_rmem, p_rmem, q8_rmem, sums_rmem, base, row_smem, thread, lane, scale_log2e, begin_block, num_blocks,
                    all_see, words, heads_per_kv, causal, parity):
        """Warpgroup 0's part of a piece; returns the parity of its buffer's next use."""
        qk_even(s_rmem, q8_rmem, base, parity)
        parity ^= u32(1)
        token = begin_block * i32(BLOCK_N)
        left = num_blocks
        while left > 2:
            even_step(s_rmem, o_rmem, p_rmem, q8_rmem, sums_rmem, base, row_smem, thread, lane, scale_log2e, token, all_see, words, heads_per_kv, causal, parity, True, True)
            parity ^= u32(1)
            token += i32(2 * BLOCK_N)
            left -= i32(2)
        if left == 2:
            even_step(s_rmem, o_rmem, p_rmem, q8_rmem, sums_rmem, base, row_smem, thread, lane, scale_log2e, token, all_see, words, heads_per_kv, causal, parity, True, False)
        else:
            even_step(s_rmem, o_rmem, p_rmem, q8_rmem, sums_rmem, base, row_smem, thread, lane, scale_log2e, token, all_see, words, heads_per_kv, causal, parity, False, False)
        return parity

    @inline
    def attend_odd(s_rmem, o_rmem, p_rmem, q8_rmem, sums_rmem, base, row_smem, thread, lane, scale_log2e, begin_block, num_blocks,
                   all_see, words, heads_per_kv, causal, parity):
        """Warpgroup 1's part of a piece; returns the parity of its buffer's next use."""
        token = begin_block * i32(BLOCK_N) + i32(BLOCK_N)
        left = num_blocks
        if left > 1:
            qk_odd(s_rmem, q8_rmem, base, parity)
            parity ^= u32(1)
        while left > 3:
            odd_step(s_rmem, o_rmem, p_rmem, q8_rmem, sums_rmem, base, row_smem, thread, lane, scale_log2e, token, all_see, words, heads_per_kv, causal, parity, True, True)
            parity ^= u32(1)
            token += i32(2 * BLOCK_N)
            left -= i32(2)
        if left > 1:
            odd_step(s_rmem, o_rmem, p_rmem, q8_rmem, sums_rmem, base, row_smem, thread, lane, scale_log2e, token, all_see, words, heads_per_kv, causal, parity, True, False)
            left -= i32(2)
        if left == 1:
            odd_step(s_rmem, o_rmem, p_rmem, q8_rmem, sums_rmem, base, row_smem, thread, lane, scale_log2e, token, all_see, words, heads_per_kv, causal, parity, False, False)
        return parity

    @inline
    def store_partial(o_rmem, factor_a, factor_b, lse2_a, lse2_b, o_part, lse2_part, lane):
        """O of a piece to its slot, as the registers hold it: 512 bytes of a warp side by side, 32 times (hopper_merge reads it so)."""
        if lane & u32(3) == 0:
            ptx.st_global_f32(lse2_part, lse2_a)
            ptx.st_global_f32(lse2_part + u64(32), lse2_b)
        for i in range(32):
            ptx.st_global_v4_f32(o_part + u64(i * 512), ptx.mul_rn(o_rmem[4 * i], factor_a), ptx.mul_rn(o_rmem[4 * i + 1], factor_a),
                                 ptx.mul_rn(o_rmem[4 * i + 2], factor_b), ptx.mul_rn(o_rmem[4 * i + 3], factor_b))

    @inline
    def claim(counter, lane):
        """How many have been here before this warp."""
        before = u32(0)
        if lane == 0:
            before = ptx.atom_add_acq_rel(counter, u32(1))
        return u32(cuda.shfl_sync(0xFFFFFFFF, i32(before), 0))

    @inline
    def announce(counter, lane):
        """What this warp wrote is there for all."""
        ptx.fence_acq_rel_gpu()
        cuda.syncwarp()
        if lane == 0:
            ptx.atom_add_acq_rel(counter, u32(1))

    @inline
    def await_announced(counter, lane):
        """Until both warps have claimed and the first has announced; makes the counter ready for the next launch."""
        if lane == 0:
            while ptx.ld_acquire(counter) != u32(3):
                pass
            ptx.st_relaxed(counter, u32(0))
        cuda.syncwarp()
        ptx.fence_acq_rel_gpu()

    @inline
    def pair_weights(mine, other, is_second):
        """Of a row in two pieces: the weight of this one, of the other one, lse2 of both. Equal bits on whichever side it runs."""
        first, second = (other, mine) if is_second else (mine, other)
        largest = max(first, second)
        if largest == MINUS_INFINITY:
            return f32(0), f32(0), MINUS_INFINITY
        weight_first, weight_second = ptx.ex2(first - largest), ptx.ex2(second - largest)
        total = weight_first + weight_second
        weight_first, weight_second = weight_first / total, weight_second / total
        lse2 = largest + math.log2(total)
        return (weight_second, weight_first, lse2) if is_second else (weight_first, weight_second, lse2)

    @inline
    def add_other(o_rmem, half, factor, weight, other_weight, other_rmem, i, count, is_second):
        """Strips i to i + count of a row: O = both pieces' weighted sum, the first piece's share rounded last on either side."""
        for k in range(count):
            for c in range(2):
                x = ptx.mul_rn(o_rmem[4 * (i + k) + 2 * half + c], factor)
                y = other_rmem[4 * k + 2 * half + c]
                if is_second:
                    o_rmem[4 * (i + k) + 2 * half + c] = ptx.fma_rn(other_weight, y, ptx.mul_rn(weight, x))
                else:
                    o_rmem[4 * (i + k) + 2 * half + c] = ptx.fma_rn(weight, x, ptx.mul_rn(other_weight, y))

    @inline
    def swap_words(a, b, take_b, distance):
        """Of two words here and in the lane `distance` away: the pair (own a, its a) in the lower lane, (its b, own b) in the upper one."""
        other = u32(cuda.shfl_xor_sync(0xFFFFFFFF, i32(a if take_b else b), distance))
        return (other, b) if take_b else (a, other)

    @inline
    def store_result(o_rmem, half, factor, row_address, lane):
        """A row of O, this warp's 256 columns. The 4 lanes of a row transpose 4 x 4 words, so that each stores 16 bytes, and all 64."""
        odd, upper = lane & u32(1) != 0, lane & u32(2) != 0
        for i in range(0, 32, 4):
            w0 = to_pair(o_rmem[4 * i + 2 * half + 1] * factor, o_rmem[4 * i + 2 * half] * factor)
            w1 = to_pair(o_rmem[4 * i + 2 * half + 5] * factor, o_rmem[4 * i + 2 * half + 4] * factor)
            w2 = to_pair(o_rmem[4 * i + 2 * half + 9] * factor, o_rmem[4 * i + 2 * half + 8] * factor)
            w3 = to_pair(o_rmem[4 * i + 2 * half + 13] * factor, o_rmem[4 * i + 2 * half + 12] * factor)
            w0, w1 = swap_words(w0, w1, odd, 1)
            w2, w3 = swap_words(w2, w3, odd, 1)
            w0, w2 = swap_words(w0, w2, upper, 2)
            w1, w3 = swap_words(w1, w3, upper, 2)
            if row_address != 0:
                ptx.st_global_v4_b32(u64(row_address) + u64(i * 16), u32(w0), u32(w1), u32(w2), u32(w3))

    @inline
    def finish_row(o_rmem, half, factor, lse2, row, words, wg, lane, rows_of_request, kv_head, heads_per_kv, out, out_batch_stride,
                   out_token_stride, out_head_stride, lse, lse_batch_stride, lse_head_stride, lse_token_stride, empty_lse):
        """A row's result."""
        # Opaque, lest the reciprocal for the division be kept in a register across all pieces.
        heads = i32(ptx.opaque_b32(u32(heads_per_kv)))
        q_batch, token = ptx.ld_shared_i32(words + u32(PIECE_Q_BATCH)), ptx.ld_shared_i32(words + u32(PIECE_Q_BEGIN)) + row // heads
        head = kv_head * heads + row % heads
        row_address = i64(0)
        if row < rows_of_request:
            row_address = (i64(out) + q_batch * out_batch_stride + token * out_token_stride + head * out_head_stride
                           + i64(wg * u32(HEAD_DIM_V) + (lane & u32(3)) * u32(16)))
            if wg == 0 and lane & u32(3) == 0:
                ptx.st_global_f32(lse + u64(q_batch * lse_batch_stride + head * lse_head_stride + token * lse_token_stride),
                                  lse2 * f32(LN_2) if lse2 > MINUS_INFINITY else empty_lse)
        store_result(o_rmem, half, factor, row_address, lane)

    @inline
    def finish(o_rmem, sums_rmem, max_a, max_b, base, words, heads_per_kv, empty_lse, out, out_batch_stride, out_token_stride,
               out_head_stride, lse, lse_batch_stride, lse_head_stride, lse_token_stride, o_partial, lse2_partial, counters):
        """Free the piece's place, and store its rows: to the results, or to its slot of the workspace, if more pieces are to come."""
        kv_head, num_kv_heads = i32(cuda.blockIdx.z), i32(cuda.gridDim.z)
        slot, num_parts = ptx.ld_shared_i32(words + u32(PIECE_SLOT)), ptx.ld_shared_i32(words + u32(PIECE_NUM_PARTS))
        # What follows from the thread's place, anew: kept over the steps it would cost registers that O needs.
        thread_idx = ptx.opaque_b32(u32(cuda.threadIdx.x))
        lane, warp, wg = thread_idx & u32(31), thread_idx >> u32(5), thread_idx >> u32(7)
        tile_row = ((thread_idx & u32(127)) >> u32(5)) * u32(16) + (lane >> u32(2))
        row = ptx.ld_shared_i32(words + u32(PIECE_ROW_BEGIN)) + i32(tile_row)
        rows_of_request = ptx.ld_shared_i32(words + u32(PIECE_Q_LEN)) * heads_per_kv
        cuda.syncwarp()
        # This warp is done with Q and P1; the producer may load the next. (The words stay until the piece after.)
        release(base + u32(Q_EMPTY_SMEM), lane)
        factor_a, lse2_a = f32(0), MINUS_INFINITY
        if sums_rmem[0] > f32(0):
            factor_a, lse2_a = f32(1) / sums_rmem[0], max_a + math.log2(sums_rmem[0])
        factor_b, lse2_b = f32(0), MINUS_INFINITY
        if sums_rmem[1] > f32(0):
            factor_b, lse2_b = f32(1) / sums_rmem[1], max_b + math.log2(sums_rmem[1])
        is_last = True
        if num_parts > 1 and row - i32(lane >> u32(2)) < rows_of_request:
            part = (u64(slot) * u64(num_kv_heads) + u64(kv_head)) * u64(cuda.gridDim.x) + u64(cuda.blockIdx.x)
            o_part = o_partial + (part * u64(NUM_WARPS) + u64(warp)) * u64(WARP_PART_BYTES) + u64(lane * u32(16))
            lse2_part = lse2_partial + ((part * u64(2) + u64(wg)) * u64(BLOCK_M) + u64(tile_row)) * u64(4)
            if num_parts >= MERGE_LEAST_PARTS:
                store_partial(o_rmem, factor_a, factor_b, lse2_a, lse2_b, o_part, lse2_part, lane)
                is_last = False
            else:
                # Of two pieces this is the first (slot even) or the second, and the earlier one to end leaves its O to the later one.
                is_second = slot & 1 == 1
                even_part = part - u64(num_kv_heads) * u64(cuda.gridDim.x) if is_second else part
                counter = counters + (even_part * u64(NUM_WARPS) + u64(warp)) * u64(4)
                before = claim(counter, lane)
                if before == 0:
                    store_partial(o_rmem, factor_a, factor_b, lse2_a, lse2_b, o_part, lse2_part, lane)
                    announce(counter, lane)
                    is_last = False
                else:
                    await_announced(counter, lane)
                    step = u64(num_kv_heads) * u64(cuda.gridDim.x)
                    other = part - step if is_second else part + step
                    other_o = o_partial + (other * u64(NUM_WARPS) + u64(warp)) * u64(WARP_PART_BYTES) + u64(lane * u32(16))
                    other_lse2 = lse2_partial + ((other * u64(2) + u64(wg)) * u64(BLOCK_M) + u64(tile_row)) * u64(4)
                    weight_a, other_weight_a, lse2_a = pair_weights(lse2_a, ptx.ld_global_f32(other_lse2), is_second)
                    weight_b, other_weight_b, lse2_b = pair_weights(lse2_b, ptx.ld_global_f32(other_lse2 + u64(32)), is_second)
                    other_rmem = cuda.local.array(OTHER_REGISTERS, types.float32)
                    for i in range(0, 32, STRIPS_AT_ONCE):
                        for k in range(STRIPS_AT_ONCE):
                            ptx.ld_global_v4_f32(other_rmem, 4 * k, other_o + u64((i + k) * 512))
                        add_other(o_rmem, 0, factor_a, weight_a, other_weight_a, other_rmem, i, STRIPS_AT_ONCE, is_second)
                        add_other(o_rmem, 1, factor_b, weight_b, other_weight_b, other_rmem, i, STRIPS_AT_ONCE, is_second)
                    factor_a, factor_b = f32(1), f32(1)
        if is_last:
            finish_row(o_rmem, 0, factor_a, lse2_a, row, words, wg, lane, rows_of_request, kv_head, heads_per_kv, out, out_batch_stride,
                       out_token_stride, out_head_stride, lse, lse_batch_stride, lse_head_stride, lse_token_stride, empty_lse)
            finish_row(o_rmem, 1, factor_b, lse2_b, row + i32(8), words, wg, lane, rows_of_request, kv_head, heads_per_kv, out,
                       out_batch_stride, out_token_stride, out_head_stride, lse, lse_batch_stride, lse_head_stride, lse_token_stride, empty_lse)

    @inline
    def consume(base, wg, thread, heads_per_kv, causal, scale_log2e, empty_lse, out, out_batch_stride, out_token_stride, out_head_stride,
                lse, lse_batch_stride, lse_head_stride, lse_token_stride, o_partial, lse2_partial, counters):
        """A warpgroup's walk over the pieces that the producer announces."""
        lane = thread & u32(31)
        s_rmem, o_rmem = cuda.local.array(32, types.float32), cuda.local.array(128, types.float32)
        p_rmem, q8_rmem = cuda.local.array(16, types.uint32), cuda.local.array(16, types.uint32)
        sums_rmem = cuda.local.array(2, types.float32)
        tile_row = (thread >> u32(5)) * u32(16) + (lane >> u32(2))
        parity = u32(0)
        words = base + u32(PIECE_SMEM)
        while True:
            base = ptx.opaque_b32(base)
            row_smem = base + tile_row * u32(4)
            # Producer arrives: the piece's words, and Q.
            ptx.mbarrier_wait_parity(base + u32(Q_FULL_SMEM), (words >> u32(6)) & u32(1))
            num_blocks = ptx.ld_shared_i32(words + u32(PIECE_NUM_BLOCKS))
            if num_blocks < 0:
                break
            for i in range(128):
                o_rmem[i] = f32(0)
            sums_rmem[0] = f32(0)
            sums_rmem[1] = f32(0)
            max_a, max_b = f32(0), f32(0)
            if num_blocks > 0:
                begin_block = ptx.ld_shared_i32(words + u32(PIECE_BEGIN_BLOCK))
                # The first row of the tile sees least.
                all_see = visible_to(ptx.ld_shared_i32(words + u32(PIECE_ROW_BEGIN)), ptx.ld_shared_i32(words + u32(PIECE_SEQ_LEN)),
                                     ptx.ld_shared_i32(words + u32(PIECE_Q_LEN)), heads_per_kv, causal)
                load_q8(q8_rmem, base, thread)
                if wg == 0:
                    parity = attend_even(s_rmem, o_rmem, p_rmem, q8_rmem, sums_rmem, base, row_smem, thread, lane, scale_log2e,
                                         begin_block, num_blocks, all_see, words, heads_per_kv, causal, parity)
                else:
                    parity = attend_odd(s_rmem, o_rmem, p_rmem, q8_rmem, sums_rmem, base, row_smem, thread, lane, scale_log2e,
                                        begin_block, num_blocks, all_see, words, heads_per_kv, causal, parity)
                # Anew: kept over the steps it would cost a register that O needs.
                side = ptx.opaque_b32(u32(cuda.threadIdx.x)) >> u32(7)
                sum_a = sums_rmem[0] + cuda.shfl_xor_sync(0xFFFFFFFF, sums_rmem[0], 1)
                sum_a += cuda.shfl_xor_sync(0xFFFFFFFF, sum_a, 2)
                sum_b = sums_rmem[1] + cuda.shfl_xor_sync(0xFFFFFFFF, sums_rmem[1], 1)
                sum_b += cuda.shfl_xor_sync(0xFFFFFFFF, sum_b, 2)
                if thread & u32(3) == 0:
                    ptx.st_shared_f32(row_smem + u32(SUM_SMEM) + side * u32(4 * BLOCK_M), sum_a)
                    ptx.st_shared_f32(row_smem + u32(SUM_SMEM + 32) + side * u32(4 * BLOCK_M), sum_b)
                # Both warpgroups arrive and wait: each other's sums, and the last maximum.
                ptx.bar_sync(u32(SUMS), u32(NUM_CONSUMERS))
                sums_rmem[0] = ptx.ld_shared_f32(row_smem + u32(SUM_SMEM)) + ptx.ld_shared_f32(row_smem + u32(SUM_SMEM + 4 * BLOCK_M))
                sums_rmem[1] = ptx.ld_shared_f32(row_smem + u32(SUM_SMEM + 32)) + ptx.ld_shared_f32(row_smem + u32(SUM_SMEM + 4 * BLOCK_M + 32))
                max_a, max_b = ptx.ld_shared_f32(row_smem + u32(MAX_SMEM)), ptx.ld_shared_f32(row_smem + u32(MAX_SMEM + 32))
                # Both warpgroups arrive and wait: the maximum has been read.
                ptx.bar_sync(u32(SUMS), u32(NUM_CONSUMERS))
                if side == 0 and thread & u32(3) == 0:
                    ptx.st_shared_f32(row_smem + u32(MAX_SMEM), NO_SCORE)
                    ptx.st_shared_f32(row_smem + u32(MAX_SMEM + 32), NO_SCORE)
            finish(o_rmem, sums_rmem, max_a, max_b, base, words, heads_per_kv, empty_lse, out, out_batch_stride, out_token_stride,
                   out_head_stride, lse, lse_batch_stride, lse_head_stride, lse_token_stride, o_partial, lse2_partial, counters)
            # The other of the two places for a piece's words; bit 6 is the piece's parity.
            words ^= u32(PIECE_BYTES)

    def hopper_decode(q_map, kv_map, block_table, table_row_stride, table_column_stride, max_pages, jobs, workers, starts,
                      out, out_batch_stride, out_token_stride, out_head_stride, lse, lse_batch_stride, lse_head_stride, lse_token_stride,
                      o_partial, lse2_partial, counters, heads_per_kv, causal, split_blocks, scale_log2e, empty_lse):
        thread_idx = u32(cuda.threadIdx.x)
        wg, thread = thread_idx >> u32(7), thread_idx & u32(127)
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        if thread_idx == 0:
            ptx.prefetch_tensormap(q_map)
            ptx.prefetch_tensormap(kv_map)
            for i in range(2 * NUM_TILES):
                ptx.mbarrier_init(base + u32(FULL_SMEM + 8 * i), u32(1))
            for i in range(4):
                ptx.mbarrier_init(base + u32(EMPTY_SMEM + 8 * i), u32(4))
            ptx.mbarrier_init(base + u32(Q_FULL_SMEM), u32(1))
            ptx.mbarrier_init(base + u32(Q_EMPTY_SMEM), u32(8))
            ptx.fence_mbarrier_init()
        if thread_idx < BLOCK_M:
            ptx.st_shared_f32(base + u32(MAX_SMEM) + thread_idx * u32(4), NO_SCORE)
        # All threads: the mbarriers and the first maximum are there.
        cuda.syncthreads()
        ptx.griddepcontrol_wait()
        ptx.griddepcontrol_launch_dependents()
        if wg == 2:
            producer_registers()
            if thread < 32:
                if thread == 0:
                    ptx.fence_proxy_tensormap_acquire(q_map)
                    ptx.fence_proxy_tensormap_acquire(kv_map)
                produce(base, i32(thread), q_map, kv_map, block_table, table_row_stride, table_column_stride, max_pages, jobs, workers,
                        starts, heads_per_kv, split_blocks)
        else:
            consumer_registers()
            consume(base, wg, thread, heads_per_kv, causal, scale_log2e, empty_lse, out, out_batch_stride, out_token_stride, out_head_stride,
                    lse, lse_batch_stride, lse_head_stride, lse_token_stride, o_partial, lse2_partial, counters)

    return hopper_decode
