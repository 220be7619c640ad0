"""The Hopper kernels' geometry: tiles, shared memory, barriers, and the groups of values that their parts hand to each other."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from ..contract import HEAD_DIM_QK, HEAD_DIM_V
from ..scheduler import (
    JOB_COLUMNS,
    JOB_FIRST_SLOT,
    JOB_NUM_BLOCKS,
    JOB_NUM_PARTS,
    JOB_Q_BATCH,
    JOB_Q_BEGIN,
    JOB_Q_LEN,
    JOB_ROW_BEGIN,
    JOB_SEQ_LEN,
)

f32 = np.float32

# Below any score, and finite, so that a difference of two is a number.
NO_SCORE = f32(-1e30)
MINUS_INFINITY = f32(-np.inf)
# In the seesaw the maximum may lag so many powers of two behind: P stays below 2^8, and the division by the sum takes that out again.
MAX_LAG = f32(8)
# Steps of a piece in which it does not, since the largest weight is then 1, which 16 bits hold exactly. Over 23 cases of 128 heads the
# relative error is 1.005 times FlashMLA's with 2 of them, 1.000 with 16, 0.999 with 32; 16 take 2.3% more time than 2, 32 take 3.1% (H200).
# The stream, whose maximum never lags, waits for memory.
EXACT_STEPS = 16
# Of a consumer's `parity`: bit 0 is the parity of its K buffer's next use, bit 6 the piece's, from this one on it counts the piece's steps.
NEXT_STEP = 1 << 8

BLOCK_M = 64                            # query rows of a thread block: the M of wgmma
BLOCK_N = 64                            # tokens of a step: rows of a tile
TILE_COLUMNS = 64                       # 128 bytes of 16-bit elements: the width of the swizzle
TILE_BYTES = 64 * 128
# The swizzle's atom: rows of a tile that lie together whatever the page size.
ATOM_ROWS = 8
ATOM_BYTES = ATOM_ROWS * 128
NUM_TILES = HEAD_DIM_QK // TILE_COLUMNS     # of Q and of a block of K: 9, of which 8 are V
# A block's sides: tiles read last by warpgroup 0, and those read last by warpgroup 1.
LEFT_TILES = HEAD_DIM_V // TILE_COLUMNS // 2
SIDE_BEGIN, SIDE_TILES = (0, LEFT_TILES), (LEFT_TILES, NUM_TILES - LEFT_TILES)
# In a cluster a thread block loads half of a side: the first one these tiles, the second one the rest.
HALF_TILES = 2
K_STEPS = 4                             # wgmma of 16 along a tile's 64 columns, or along a block's 64 tokens

NUM_CONSUMERS = 256
NUM_WARPS = NUM_CONSUMERS // 32         # of consumers, each with 16 rows and half of the columns of O
NUM_THREADS = NUM_CONSUMERS + 128
# An SM has 65,536 registers; a block begins with 168 x 384 = 64,512 of them, which become 232 x 256 + 40 x 128.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40

# A warp's part of a partial O, as its registers hold it: 32 strips of 16 rows x 8 columns, 16 bytes a lane. (hopper_part's take three
# quarters of it.)
STRIPS = 32
STRIP_BYTES = 512
WARP_PART_BYTES = STRIPS * STRIP_BYTES
# A warpgroup's states of 64 rows: maxima, base 2, then the sums of the exponentials relative to them.
SUMS_OFFSET = 4 * BLOCK_M
STATE_BYTES = 2 * SUMS_OFFSET

# Named barriers; 0 is syncthreads. S0_ASKED is hopper_seesaw's; WARPGROUP + 0 and + 1 are the consumer warpgroups' own.
P0_FREE, P0_STORED, P1_STORED, SUMS, S0_ASKED, WARPGROUP, MBARRIERS_MADE = 1, 2, 3, 4, 5, 6, 8

# Rows that a job has at most where tokens are wgmma's M and rows its N (hopper_swapped).
SWAPPED_ROWS = (16, 32)

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
EMPTY_SMEM = FULL_SMEM + 2 * 2 * 8
Q_FULL_SMEM = EMPTY_SMEM + 2 * 2 * 8
Q_EMPTY_SMEM = Q_FULL_SMEM + 8
SMEM_BYTES = Q_EMPTY_SMEM + 8 + 1024
# Of hopper_swapped, whose Q is smaller, behind it: each warp's maxima of a block, each warp's sums of a piece, and 16-bit results.
WARP_MAX_SMEM = Q_SMEM + NUM_TILES * SWAPPED_ROWS[-1] * 128
WARP_SUM_SMEM = WARP_MAX_SMEM + NUM_WARPS * SWAPPED_ROWS[-1] * 4
SWAPPED_STAGE_SMEM = WARP_SUM_SMEM + NUM_WARPS * SWAPPED_ROWS[-1] * 4
# A thread has two rows, 8 apart, in every array of a value per row.
NEXT_ROW = 8 * 4

# A piece, as the producer describes it to the consumers: its job's row, but with the first row of the row tile and the blocks of the
# piece; then the piece's first block, and its number in the job. int32 words of piece_smem.
PIECE_Q_BATCH, PIECE_Q_BEGIN, PIECE_Q_LEN, PIECE_ROW_BEGIN, PIECE_SEQ_LEN, PIECE_NUM_BLOCKS, PIECE_FIRST_SLOT, PIECE_NUM_PARTS = (
    4 * column for column in (JOB_Q_BATCH, JOB_Q_BEGIN, JOB_Q_LEN, JOB_ROW_BEGIN, JOB_SEQ_LEN, JOB_NUM_BLOCKS, JOB_FIRST_SLOT,
                              JOB_NUM_PARTS))
PIECE_BEGIN_BLOCK, PIECE_SPLIT = 4 * JOB_COLUMNS, 4 * (JOB_COLUMNS + 1)
PIECE_WORDS = JOB_COLUMNS + 2
END_OF_WORK = -1

# A consumer's arrays: S 32 floats, O 128 floats, P and Q's last tile 16 words each, the sums of its two rows.
Registers = namedtuple("Registers", "s_rmem o_rmem p_rmem q8_rmem sums_rmem")
# Of hopper_swapped: S and each of the four tiles of O num_rows / 2 floats, the sums of num_rows / 4 rows.
SwappedRegisters = namedtuple("SwappedRegisters", "s_rmem o_rmem sums_rmem")
Tiles = namedtuple("Tiles", "t0 t1 t2 t3")
# A consumer thread's place: the block's shared memory, its first row there, its number in the warpgroup and in the warp.
Place = namedtuple("Place", "base row_smem thread lane")
# What all rows of a launch have in common.
Problem = namedtuple("Problem", "heads_per_kv causal scale_log2e")
# The arrays that a launch reads; strides in bytes.
Tables = namedtuple("Tables", "block_table row_stride column_stride max_pages num_requests cache jobs workers starts split_blocks")
# Addresses of the tensor maps. They are parameters of the kernel, of so many words each, behind so many others: TMA wants them at multiples
# of 64 bytes, and the first parameter lies 16 bytes behind one (sm_90), so that six words of 8 bytes fill up to the next.
Maps = namedtuple("Maps", "q left right")
MAP_WORDS, FIRST_MAP = 16, 6
# The cache itself, for prefetches.
Cache = namedtuple("Cache", "address page_stride token_stride head_stride num_pages")
# The arrays that it writes; strides in bytes.
Results = namedtuple("Results", "out out_batch_stride out_token_stride out_head_stride lse lse_batch_stride lse_head_stride "
                     "lse_token_stride empty_lse")
Partials = namedtuple("Partials", "o states counters")


@dataclass(frozen=True)
class HopperConfig:
    """What one compiled decode kernel is made for.

    Attributes
    ----------
    row_tiles : int
        Of a job, 1 to 4: as many thread blocks walk the same blocks of the cache.
    num_rows : int
        Of a row tile: BLOCK_M, or one of SWAPPED_ROWS, with one row tile.
    """

    dtype: str
    page_size: int
    row_tiles: int
    num_rows: int = BLOCK_M

    def __str__(self) -> str:
        return f"{self.dtype}-{self.page_size}-{self.row_tiles}" + (f"-{self.num_rows}" if self.is_swapped else "")

    @property
    def is_swapped(self) -> bool:
        """Whether tokens are wgmma's M and rows its N, as 64 rows would be padding for the most part, or as the call is short."""
        return self.num_rows < BLOCK_M

    @property
    def cluster_size(self) -> int:
        """Thread blocks, of neighbouring row tiles, that load for each other: each loads half of a side of a block for both."""
        return 2 if self.row_tiles % 2 == 0 else 1

    @property
    def is_stream(self) -> bool:
        """Whether blocks are attended one after another (hopper_stream), not two at a time (hopper_seesaw): memory limits one row tile, so
        that buffers have to be free soon; the tensor core more of them."""
        return self.row_tiles == 1

    @property
    def prefetches(self) -> bool:
        """Whether blocks are brought to L2 ahead of their loads: one row tile is limited by memory's bandwidth, more by latency, too."""
        return not self.is_stream

    @property
    def is_read_once(self) -> bool:
        """Whether what is loaded may leave L2 first, as no other thread block asks for it, but in a short call, where nothing leaves."""
        return self.row_tiles == self.cluster_size

    @property
    def q_tile_bytes(self) -> int:
        return self.num_rows * 128

    @property
    def warp_part_bytes(self) -> int:
        """A warp's part of a partial O."""
        return self.num_rows * HEAD_DIM_V * 4 // NUM_WARPS if self.is_swapped else WARP_PART_BYTES

    @property
    def num_states(self) -> int:
        """Copies of a partial result's maxima and sums: of each warpgroup; or, as all warps have columns of all rows, of each warp."""
        return NUM_WARPS if self.is_swapped else 2

    @property
    def page_rows(self) -> int:
        """Tokens of a block in one page."""
        return min(self.page_size, BLOCK_N)

    @property
    def pages_per_block(self) -> int:
        return BLOCK_N // self.page_rows

    @property
    def box_rows(self) -> int:
        """Tokens of a TMA box, which has all tiles of a side: a block's, or, as smaller pages lie anywhere, an atom's."""
        return BLOCK_N if self.pages_per_block == 1 else ATOM_ROWS

    @property
    def next_tile_bytes(self) -> int:
        """From a tile of a side of K to the next one: boxes lie one after another, and in each its tiles."""
        return self.box_rows * 128

    def next_atom_bytes(self, side: int) -> int:
        """From 8 rows of a tile of K to the next ones."""
        return ATOM_BYTES if self.pages_per_block == 1 else SIDE_TILES[side] * ATOM_BYTES


def inline(function: Callable[..., Any]) -> Any:
    """A device function that becomes part of its caller, so that constants among its arguments choose its branches."""
    dispatcher = cuda.jit(device=True, forceinline=True, fastmath=True)(function)
    template_for = getattr(dispatcher, "get_call_template", None)
    # To the emulator it stays a plain function.
    if template_for is not None:
        # Numba would infer the function's types anew for each constant: 3 s of 14 for a kernel, and not a byte of its machine code.
        dispatcher.get_call_template = lambda args, kws: template_for(tuple(map(types.unliteral, args)), kws)
    return dispatcher
