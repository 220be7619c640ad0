"""A schedule: the tables that `mla_numba.scheduler` fills, in host or device memory, with the configuration they were made for."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numba import cuda

from ..config import DecodeShape, ScheduleConfig, ceil_div
from ..scheduler import (
    JOB_COLUMNS,
    MAX_TRIALS,
    MERGE_COLUMNS,
    MERGE_MAX_SHARES,
    NEVER_CUT,
    NUM_TOTALS,
    TOTAL_EXTRA_SPLITS,
    WORKER_COLUMNS,
    make_scheduler,
    num_partial_slots,
)
from .capture import is_capturing
from .launch import numba_stream

# Memory for so many int32 and work on a stream: an array of any library that shows its memory to Numba, and where it lies (0 where nobody
# asks).
NewWords = Callable[[int, int], tuple[Any, int]]
# Tables begin at multiples of a cache line, in int32.
_LINE_WORDS = 32

_build_on_host = make_scheduler(lambda function: function, lambda: None).build


def _table(name: str) -> Any:
    """One of a schedule's tables as an array, made when somebody asks for it: a slice of a device array takes 20 us."""
    return cached_property(lambda schedule: schedule.table(name))


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables of int32, all in one array; columns as named in `mla_numba.scheduler`."""

    config: ScheduleConfig
    memory: Any                                         # NumPy's, or in device memory
    places: dict[str, tuple[int, tuple[int, ...]]]      # where in `memory` each table begins, its shape
    addresses: dict[str, int]                           # of the tables, in device memory
    extra_splits: int                                   # pieces beyond one per job, no more than which the lengths can make

    jobs = _table("jobs")               # (max_jobs, JOB_COLUMNS)
    workers = _table("workers")         # (num_workers, WORKER_COLUMNS)
    num_splits = _table("num_splits")   # (max_jobs + 1,), cumulative
    starts = _table("starts")           # (num_workers, JOB_COLUMNS)
    merges = _table("merges")           # (max_jobs * MERGE_MAX_SHARES, MERGE_COLUMNS), of which the first totals[TOTAL_MERGES] are written
    totals = _table("totals")           # (NUM_TOTALS,)

    @property
    def num_slots(self) -> int:
        """Partial results that the workspace must hold."""
        _, (max_jobs, _) = self.places["jobs"]
        return num_partial_slots(self.extra_splits, max_jobs)

    def table(self, name: str) -> Any:
        """As a NumPy or Numba device array."""
        begin, shape = self.places[name]
        memory = self.memory
        if not isinstance(memory, np.ndarray) and not hasattr(memory, "copy_to_host"):
            # It is the library's on the stream in use, for which there is nothing to wait.
            memory = cuda.as_cuda_array(memory, sync=False)
        return memory[begin:begin + math.prod(shape)].reshape(shape)


@lru_cache(maxsize=256)
def layout(config: ScheduleConfig, shape: DecodeShape) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
    """`Schedule.places`, in the order of `scheduler.build`'s last arguments, and how many int32 they take."""
    max_jobs = config.max_jobs(shape)
    shapes = {"jobs": (max_jobs, JOB_COLUMNS), "axis": (max_jobs + 1,), "trials": (MAX_TRIALS, config.num_workers),
              "num_splits": (max_jobs + 1,), "workers": (config.num_workers, WORKER_COLUMNS), "starts": (config.num_workers, JOB_COLUMNS),
              "merges": (max_jobs * MERGE_MAX_SHARES, MERGE_COLUMNS), "totals": (NUM_TOTALS,)}
    places, begin = {}, 0
    for name, size in shapes.items():
        places[name] = begin, size
        begin += ceil_div(math.prod(size), _LINE_WORDS) * _LINE_WORDS
    return places, begin


def _cuts_nothing(config: ScheduleConfig) -> bool:
    return config.uncut_blocks >= NEVER_CUT and config.split_blocks == 0


def build_arguments(config: ScheduleConfig, shape: DecodeShape) -> tuple[int, ...]:
    """Of `scheduler.build`, between the lengths and the tables."""
    # Chosen here, not there: the compiler chose anew in each step of the walk, and plans took 24% longer (H200).
    min_split_blocks = NEVER_CUT if _cuts_nothing(config) else config.min_split_blocks
    return (shape.seq_len_q, shape.total_q, shape.heads_per_kv, shape.causal, config.rows_per_job, config.block_n,
            config.overhead_blocks, min_split_blocks, config.split_blocks, config.max_cut_blocks or NEVER_CUT, config.uncut_blocks,
            config.merge_alone_parts, config.merge_share_parts)


def make_host_schedule(config: ScheduleConfig, shape: DecodeShape, seq_lens: np.ndarray, cu_seqlens_q: np.ndarray | None) -> Schedule:
    """Plain Python, no compilation: with 132 workers 3 ms for 32 requests, 0.3 s for 20,000 (a virtual Xeon)."""
    places, num_words = layout(config, shape)
    schedule = Schedule(config, np.zeros(num_words, np.int32), places, {}, 0)
    cu_seqlens = np.zeros(1, np.int32) if cu_seqlens_q is None else cu_seqlens_q
    # int64, so that rounding a length up to blocks cannot overflow as NumPy's int32 would.
    _build_on_host(0, 1, [0], seq_lens.astype(np.int64), cu_seqlens.astype(np.int64), *build_arguments(config, shape),
                   *map(schedule.table, places))
    return replace(schedule, extra_splits=int(schedule.totals[TOTAL_EXTRA_SPLITS]))


def _max_extra_splits(config: ScheduleConfig, shape: DecodeShape) -> int | None:
    """Pieces beyond one per job, at most; None if the lengths decide."""
    if config.split_blocks == 0:
        return 0 if _cuts_nothing(config) else config.num_workers - 1
    if config.max_cut_blocks == 0:
        return None
    return config.max_jobs(shape) * (ceil_div(config.max_cut_blocks, config.split_blocks) - 1)


def rounded_up(extra_splits: int) -> int:
    """To four bits, so that steps whose requests grow share a workspace, and calls that were prepared for it."""
    unit = 1 << max(extra_splits.bit_length() - 4, 0)
    return ceil_div(extra_splits, unit) * unit


def make_device_schedule(config: ScheduleConfig, shape: DecodeShape, new_words: NewWords, build: Callable[[Schedule], None],
                         stream: int, max_seq_len: int | None) -> Schedule:
    """Filled by `build`, a small kernel on `stream`; the host never sees the lengths, except that `batch_invariant` reads one integer back.

    There the number of pieces follows from the lengths and not from the number of workers, and the workspace must hold them. Of a CUDA
    graph, whose lengths are not there yet, it must hold as many as requests of `max_seq_len` have.
    """
    if config.split_blocks > 0 and is_capturing(stream):
        if max_seq_len is None:
            raise ValueError("batch_invariant=True in a CUDA graph needs a plan made with max_seq_len, got none: the workspace must "
                             "suffice for the lengths of every replay")
        config = replace(config, max_cut_blocks=max(ceil_div(max_seq_len, config.block_n), 1))
    places, num_words = layout(config, shape)
    memory, address = new_words(num_words, stream)
    addresses = {name: address + 4 * begin for name, (begin, _) in places.items()}
    extra_splits = _max_extra_splits(config, shape)
    schedule = Schedule(config, memory, places, addresses, extra_splits or 0)
    build(schedule)
    if extra_splits is None:
        extra_splits = int(schedule.totals.copy_to_host(stream=numba_stream(stream))[TOTAL_EXTRA_SPLITS])
        schedule = replace(schedule, extra_splits=rounded_up(extra_splits))
    return schedule
