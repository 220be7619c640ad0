"""The tile scheduler on the device: one thread block fills the schedule, so that planning needs no look at the lengths from the host."""

from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from numba import cuda
from numba.cuda import config, int32, types

from ..scheduler import MAX_TRIALS, make_scheduler

i32, u32 = np.int32, np.uint32

LANES = 32
# Eight of 16 warps try shares; the rest is done by all, a request or a worker a thread, in most batches. The simulator runs every thread as
# a Python thread, and has no warps.
NUM_THREADS = 8 if config.ENABLE_CUDASIM else 512
# What shared memory holds, of 48 KB: positions of so many jobs, and beginnings of so many workers, which are walked and searched.
AXIS_SMEM, WORKERS_SMEM = 4096, 384
# `scheduler.Window` of a warp's lane, whose job is the lane-th from the first one on; they reach as far as `end`.
Window = namedtuple("Window", "edge next_edge first end")


@cuda.jit(device=True)
def _sync():
    cuda.syncthreads()


@cuda.jit(device=True)
def _window_from(axis, num_jobs, first):
    """A job a lane, from `first` on; those behind the last one begin and end there."""
    job = u32(first + u32(cuda.laneid))
    edge, next_edge = u32(axis[min(job, num_jobs)]), u32(axis[min(u32(job + u32(1)), num_jobs)])
    return Window(edge, next_edge, first, u32(cuda.shfl_sync(0xFFFFFFFF, i32(next_edge), LANES - 1)))


@cuda.jit(device=True)
def _begin_window(axis, num_jobs):
    return _window_from(axis, num_jobs, u32(0))


@cuda.jit(device=True)
def _move_window(axis, num_jobs, window, position):
    """By all lanes of a warp. To load a window takes as long as all else of a step, so it is done where it must be."""
    while window.end <= position and u32(window.first + u32(LANES)) <= num_jobs:
        window = _window_from(axis, num_jobs, u32(window.first + u32(LANES)))
    return window


@cuda.jit(device=True)
def _pick(window, position, value):
    """The value of the last lane whose job begins there or before; behind the last job all lanes have the same."""
    count = cuda.popc(cuda.ballot_sync(0xFFFFFFFF, window.edge <= position))
    return u32(cuda.shfl_sync(0xFFFFFFFF, i32(value), i32(count - 1)))


@cuda.jit(device=True)
def _of_warp(value):
    """What all lanes have the same of; so the compiler knows it, and that they go one way."""
    return cuda.shfl_sync(0xFFFFFFFF, i32(value), 0)


_warp = SimpleNamespace(begin=_begin_window, move=_move_window, pick=_pick, same=_of_warp)
_warps = {} if config.ENABLE_CUDASIM else {"natural": u32, "lanes": LANES, "warp": _warp}
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
