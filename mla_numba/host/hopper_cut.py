"""How the `hopper` backend cuts its work, as far as the host decides it: the rows of a job, how many workers share the jobs, whether any is
cut, and how a merge is shared.

Kernels and grids follow from that, so it is chosen before a kernel has read the lengths: by the shape and, where the caller tells, by the
longest request. The rest is `scheduler`'s. Times are an H200's.
"""

import math
from functools import lru_cache
from typing import NamedTuple

from numba import cuda

from ..config import DecodeShape, ScheduleConfig, ceil_div
from ..contract import INVARIANT_SPLIT_TOKENS
from ..kernels.hopper_config import BLOCK_M, BLOCK_N, SWAPPED_ROWS
from ..scheduler import NEVER_CUT

# What starting a piece costs, in blocks of 64 tokens (two pieces of 4 blocks together took a worker 8 us longer than one of 6, H100); the
# fewest blocks that are worth it; and how many are sooner attended by one worker than merged (4 blocks: 19.5 us whole, 23.9 in two pieces).
_OVERHEAD_BLOCKS, _MIN_SPLIT_BLOCKS, _UNCUT_BLOCKS = 4, 2, 5
# The same where one row tile reads the cache. One block is worth a piece there (up to 9% less on short calls, 1% more on some long ones;
# with 128 heads 23% more on 4 requests of 1,024 tokens).
_OVERHEAD_BLOCKS_OF_ONE_TILE, _MIN_SPLIT_BLOCKS_OF_ONE_TILE = 5, 1
# And where its requests are half as many as SMs or more: a block takes 2.2 us there, not 1.5, as all SMs wait for memory, and to begin a
# piece is 2 to 3 of them; 0 to 1.4% less on batches of 128 and 256, up to 4% more on those of 32.
_OVERHEAD_BLOCKS_AT_MEMORY = 3
# Row tiles that may walk a worker's pieces together, reading the cache once from memory and again from L2.
_MAX_TEAM = 4
# A call has tiles of 16 rows, however many rows its requests have, if each SM has one job or none, and no more blocks in all: what it takes
# is then the way to the first block and back (128 heads x 1,024 tokens: 17.2 us -> 12.5; 4 x 1,024: 17.4 -> 16.3). Jobs of few blocks may
# be as many as SMs: they are hardly cut, and there is less to merge (64 x 512 tokens, 2 queries of 16 heads: 23.1 us -> 19.6).
_BLOCKS_OF_SMALL_TILES, _FEW_BLOCKS = 4, 8
# Pieces that a warp of the merge adds up, where a job has more than the 8 of a warp alone. Of few rows 4, whose loads take one latency, not
# two (5 to 7% less of 16 heads x 1,024 tokens; of 64 rows 4 to 7% more, as blocks are too many); 2 where half of the SMs are its own (7%
# less of that again; 3 to 7% more where they are not).
_MERGE_SHARE_PARTS, _MERGE_SHARE_PARTS_OF_FEW_ROWS, _MERGE_SHARE_PARTS_OF_HALF = 8, 4, 2


class _Shares(NamedTuple):
    """Of jobs of one kind.

    Half of the workers do where all would have no more than `half_blocks` blocks each, or, if nearly each of that half has a job of its
    own, `whole_blocks`: what is not cut need not be merged, and the merge's thread blocks have SMs to begin on (up to 20% less). A job
    alone, of one row tile, lacks one worker in 3 up to `one_job_blocks` for each: what is more than eight times eight pieces is merged
    less side by side (3 to 16% less). A job that four workers or more may have is merged by a kernel, whose thread blocks want SMs to
    begin on while the decode runs: one worker in `left_out` is left out for them, unless all would have more than `left_out_blocks` each.
    """

    half_blocks: int
    left_out: int
    left_out_blocks: float = math.inf
    one_job_blocks: int = 0
    whole_blocks: int = 0


# The merge of a job of 16 rows is cheapest, and then fewer SMs ask memory for as much: up to 10% less; 1% more with 128 blocks each. Of a
# small tile, whose blocks others read, too, it is L2 that is asked, and with 4 blocks each all workers are better (by 2 to 13%).
_OF_16_ROWS = _Shares(half_blocks=1, left_out=5, left_out_blocks=16, one_job_blocks=8)
_OF_SMALL_TILES = _Shares(half_blocks=1, left_out=5, left_out_blocks=3)
# With 32 and 64 rows and more than 4 blocks for each of all a job alone takes 3 to 8% less by all but the merge's. Two row tiles and 3.4 to
# 3.9 blocks take 5% less by them than by half, but 30 and 33 jobs 5 to 6% less by half.
_OF_ONE_TILE = _Shares(half_blocks=2, left_out=33, one_job_blocks=4)
_OF_MORE = _Shares(half_blocks=3, left_out=33, whole_blocks=4)
# One worker in so many is left out of a job alone.
_LEFT_OUT_OF_ONE_JOB = 3


def team_size(row_tiles: int, num_kv_heads: int, num_sms: int) -> int:
    """Row tiles that a worker attends together: as fills the machine best, and at least two where there are two."""
    def use(team: int) -> float:
        workers = num_sms // (team * num_kv_heads)
        return workers * team * num_kv_heads / num_sms * row_tiles / (ceil_div(row_tiles, team) * team)

    return max(range(min(row_tiles, 2), min(row_tiles, _MAX_TEAM) + 1), key=lambda team: (use(team), team))


def schedule_config(shape: DecodeShape, num_sms: int | None = None, max_seq_len: int | None = None) -> ScheduleConfig:
    """For the current device, or for one of so many SMs; no request has more than `max_seq_len` tokens, if that is known."""
    # How many rows the requests of a ragged batch have is not known, nor into how many jobs they come apart.
    num_blocks = None if max_seq_len is None or shape.ragged else ceil_div(max_seq_len, BLOCK_N)
    return _config_of(shape, cuda.get_current_device().MULTIPROCESSOR_COUNT if num_sms is None else num_sms, num_blocks)


# By blocks, not tokens, which are more at each step of a server.
@lru_cache(maxsize=256)
def _config_of(shape: DecodeShape, num_sms: int, num_blocks: int | None) -> ScheduleConfig:
    rows_per_job, team = _job_size(shape, num_sms, num_blocks)
    overhead_blocks, min_split_blocks = _OVERHEAD_BLOCKS, _MIN_SPLIT_BLOCKS
    if team == 1:
        overhead_blocks, min_split_blocks = _OVERHEAD_BLOCKS_OF_ONE_TILE, _MIN_SPLIT_BLOCKS_OF_ONE_TILE
        if 2 * shape.batch * shape.num_heads_kv >= num_sms:
            overhead_blocks = _OVERHEAD_BLOCKS_AT_MEMORY
    most = max(num_sms // (team * shape.num_heads_kv), 1)
    num_workers = _num_workers(shape, rows_per_job, most, num_blocks)
    return ScheduleConfig(rows_per_job=rows_per_job, block_n=BLOCK_N, overhead_blocks=overhead_blocks, min_split_blocks=min_split_blocks,
                          num_workers=num_workers, uncut_blocks=_uncut_blocks(shape, rows_per_job, most, num_blocks, num_workers),
                          split_blocks=INVARIANT_SPLIT_TOKENS // BLOCK_N if shape.batch_invariant else 0,
                          merge_share_parts=_merge_share_parts(shape, rows_per_job, most, num_workers))


def _is_short(shape: DecodeShape, rows_per_job: int, most: int, num_blocks: int | None) -> bool:
    """Whether all jobs are known to be sooner attended whole than merged. So are small tiles of a few blocks more where not each has a
    second worker, as several have the same length (5% less; 8% more of 100 requests of 16 heads and 0 to 512 tokens)."""
    if num_blocks is None:
        return False
    lacks_a_second = _is_small_tile(shape, rows_per_job) and most // 2 < shape.num_jobs(rows_per_job) <= most
    return num_blocks <= (_FEW_BLOCKS if lacks_a_second else _UNCUT_BLOCKS)


def _is_small_tile(shape: DecodeShape, rows_per_job: int) -> bool:
    """Whether it has few rows of a request that has more: other jobs read the same blocks."""
    return rows_per_job == min(SWAPPED_ROWS) < _num_rows(shape)


def _half(most: int) -> int:
    return most - most // 2


def _num_rows(shape: DecodeShape) -> int:
    """Packed rows of a request and KV head."""
    return max(shape.seq_len_q, 1) * shape.heads_per_kv


def _job_size(shape: DecodeShape, num_sms: int, num_blocks: int | None) -> tuple[int, int]:
    """(Rows of a job, row tiles that walk it together.) No request has more than `num_blocks` blocks, if that is known."""
    num_rows, least_rows = _num_rows(shape), min(SWAPPED_ROWS)
    team = team_size(ceil_div(num_rows, BLOCK_M), shape.num_heads_kv, num_sms)
    if shape.ragged:
        return team * BLOCK_M, team
    # Not under batch_invariant: the bits of a row are another kernel's then.
    if num_blocks is not None and not shape.batch_invariant:
        num_jobs = shape.num_jobs(least_rows) * shape.num_heads_kv
        if num_jobs <= num_sms and (num_blocks <= _FEW_BLOCKS or num_jobs * num_blocks <= _BLOCKS_OF_SMALL_TILES * num_sms):
            return least_rows, 1
    return min([rows for rows in SWAPPED_ROWS if num_rows <= rows], default=team * BLOCK_M), team


def _num_workers(shape: DecodeShape, rows_per_job: int, most: int, num_blocks: int | None) -> int:
    """How many of the workers that fit the machine share the jobs of a KV head: one for each job at least."""
    if shape.ragged:
        return most
    num_jobs = shape.num_jobs(rows_per_job)
    shares = _OF_ONE_TILE if rows_per_job <= BLOCK_M else _OF_MORE
    if rows_per_job == min(SWAPPED_ROWS):
        shares = _OF_SMALL_TILES if _is_small_tile(shape, rows_per_job) else _OF_16_ROWS
    # For each worker if all take part.
    blocks = math.inf if num_blocks is None else num_jobs * num_blocks / most
    has_job_each = 4 * num_jobs > 3 * _half(most)
    workers = most
    if _is_short(shape, rows_per_job, most, num_blocks):
        workers = num_jobs
    elif blocks <= max(shares.half_blocks, shares.whole_blocks if has_job_each else 0):
        workers = _half(most)
    elif num_jobs == 1 and blocks <= shares.one_job_blocks:
        workers = most - most // _LEFT_OUT_OF_ONE_JOB
    elif 4 * num_jobs <= most and not shares.left_out_blocks < blocks < math.inf:
        workers = most - most // shares.left_out
    return min(most, max(workers, num_jobs, 1))


def _uncut_blocks(shape: DecodeShape, rows_per_job: int, most: int, num_blocks: int | None, num_workers: int) -> int:
    """No job of so many is cut: of any number, if all are known to be short, and there is a worker for each. Then no merge is launched (5%
    less), and a request that is longer than was told is its worker's alone."""
    is_each_ones = _is_short(shape, rows_per_job, most, num_blocks) and shape.num_jobs(rows_per_job) <= num_workers
    return NEVER_CUT if is_each_ones and not shape.batch_invariant else _UNCUT_BLOCKS


def _merge_share_parts(shape: DecodeShape, rows_per_job: int, most: int, num_workers: int) -> int:
    if rows_per_job not in SWAPPED_ROWS:
        return _MERGE_SHARE_PARTS
    # Not under batch_invariant, where the order of a sum may not follow from what the batch leaves idle.
    has_half = num_workers <= _half(most) and not shape.batch_invariant
    return _MERGE_SHARE_PARTS_OF_HALF if has_half else _MERGE_SHARE_PARTS_OF_FEW_ROWS


def tiles_of(config: ScheduleConfig) -> tuple[int, int]:
    """(Row tiles of a job, rows of a tile)."""
    return ceil_div(config.rows_per_job, BLOCK_M), min(config.rows_per_job, BLOCK_M)


def is_for_kernels(config: ScheduleConfig) -> bool:
    """Whether there are kernels for jobs of so many rows."""
    return config.rows_per_job in SWAPPED_ROWS or config.rows_per_job in range(BLOCK_M, _MAX_TEAM * BLOCK_M + 1, BLOCK_M)
