"""The tile scheduler on the device: one thread block fills the schedule, so that planning needs no look at the lengths from the host."""

from collections.abc import Callable

import numpy as np
from numba import cuda
from numba.cuda import config, int32, types

from ..scheduler import MAX_TRIALS, make_scheduler

LANES = 32
# The simulator runs every thread as a Python thread, and has no warps.
NUM_THREADS = 8 if config.ENABLE_CUDASIM else LANES * MAX_TRIALS
# What shared memory holds, of 48 KB: positions of so many jobs, and beginnings of so many workers. A trial is a chain of loads from them.
AXIS_SMEM, WORKERS_SMEM = 4096, 384


@cuda.jit(device=True)
def _sync():
    cuda.syncthreads()


@cuda.jit(device=True)
def _count_within(values, i, last, limit):
    """Of the LANES values after i, as far as `last`, how many are `limit` or less. By all lanes of a warp."""
    mine = np.uint32(i + 1 + cuda.laneid)
    return np.uint32(cuda.popc(cuda.ballot_sync(0xFFFFFFFF, np.uint32(values[min(mine, last)]) <= limit and mine <= last)))


_warps = {} if config.ENABLE_CUDASIM else {"natural": np.uint32, "lanes": LANES, "count_within": _count_within}
_scheduler = make_scheduler(cuda.jit(device=True), _sync, **_warps)
visible_tokens, piece_end, slot_of = _scheduler.visible_tokens, _scheduler.piece_end, _scheduler.slot_of
_build = _scheduler.build


@cuda.jit
def build_schedule(seq_lens, cu_seqlens_q, seq_len_q, total_q, heads_per_kv, causal, rows_per_job, block_n, overhead_blocks,
                   min_split_blocks, split_blocks, max_cut_blocks, uncut_blocks, merge_alone_parts, merge_share_parts, jobs, axis, trials,
                   num_splits, workers, starts, merges, totals):
    """Fill the schedule (see `scheduler.build`). Grid 1, block NUM_THREADS."""
    sums_smem = cuda.shared.array(NUM_THREADS, int32)
    axis_smem = cuda.shared.array(AXIS_SMEM, int32)
    trials_smem = cuda.shared.array((MAX_TRIALS, WORKERS_SMEM), int32)
    if axis.size <= AXIS_SMEM:
        axis = axis_smem
    if workers.shape[0] <= WORKERS_SMEM:
        trials = trials_smem
    _build(cuda.threadIdx.x, NUM_THREADS, sums_smem, seq_lens, cu_seqlens_q, seq_len_q, total_q, heads_per_kv, causal, rows_per_job,
           block_n, overhead_blocks, min_split_blocks, split_blocks, max_cut_blocks, uncut_blocks, merge_alone_parts, merge_share_parts,
           jobs, axis, trials, num_splits, workers, starts, merges, totals)


def schedule_signature() -> types.Type:
    """Types of the kernel's arguments, in the order of `build_schedule`'s."""
    lengths = types.Array(types.int32, 1, "A")
    jobs, axis, trials, num_splits, workers, starts, merges, totals = (types.Array(types.int32, n, "C") for n in (2, 1, 2, 1, 2, 2, 2, 1))
    return types.void(lengths, lengths, *[types.int64] * 13, jobs, axis, trials, num_splits, workers, starts, merges, totals)


def make_schedule_kernel() -> Callable[..., None]:
    """The kernel, not yet compiled."""
    kernel: Callable[..., None] = build_schedule.py_func
    return kernel
