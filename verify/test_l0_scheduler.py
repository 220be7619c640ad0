"""The tile scheduler's invariants (mla_numba/scheduler.py), on plain Python ints."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import cuda

from mla_numba.config import DecodeShape, ScheduleConfig, ceil_div
from mla_numba.host import simt
from mla_numba.host.schedule import build_arguments, make_host_schedule
from mla_numba.scheduler import (
    BEGIN_BLOCK,
    BEGIN_JOB,
    BEGIN_SPLIT,
    END_BLOCK,
    END_JOB,
    FIRST_IS_SPLIT,
    JOB_FIRST_SLOT,
    JOB_NUM_BLOCKS,
    JOB_NUM_PARTS,
    JOB_Q_BATCH,
    JOB_Q_BEGIN,
    JOB_Q_LEN,
    JOB_REQUEST,
    JOB_ROW_BEGIN,
    LAST_IS_SPLIT,
    MERGE_FIRST_SLOT,
    MERGE_LEAST_PARTS,
    MERGE_MAX_SHARES,
    MERGE_NUM_PARTS,
    MERGE_NUM_SHARES,
    MERGE_Q_BATCH,
    MERGE_Q_BEGIN,
    MERGE_Q_LEN,
    MERGE_ROW_BEGIN,
    MERGE_SHARE,
    NEVER_CUT,
    REHEARSAL,
    TOTAL_EXTRA_SPLITS,
    TOTAL_JOBS,
    TOTAL_MERGES,
    make_scheduler,
)

pytestmark = pytest.mark.l0
_scheduler = make_scheduler(lambda function: function, lambda: None)
_MERGE_COPIES = {MERGE_Q_BATCH: JOB_Q_BATCH, MERGE_Q_BEGIN: JOB_Q_BEGIN, MERGE_Q_LEN: JOB_Q_LEN, MERGE_ROW_BEGIN: JOB_ROW_BEGIN}


def _shape(batch, *, seq_len_q=1, total_q=None, heads=128, causal=True, batch_invariant=False):
    return DecodeShape(batch, seq_len_q, batch * seq_len_q if total_q is None else total_q, heads, 1, 576, 512, 64, "bfloat16", causal,
                       batch_invariant)


def _int32(values):
    return np.asarray(values, np.int32)


def _pieces(schedule):
    """{job: [(begin_block, end_block, split, worker)]} as a kernel walks them; jobs in the order met."""
    found = {}
    for worker, row in enumerate(schedule.workers):
        split = row[BEGIN_SPLIT]
        for job in range(row[BEGIN_JOB], row[END_JOB] + 1):
            num_parts = schedule.num_splits[job + 1] - schedule.num_splits[job]
            block = row[BEGIN_BLOCK] if job == row[BEGIN_JOB] else 0
            end = row[END_BLOCK] if job == row[END_JOB] else schedule.jobs[job, JOB_NUM_BLOCKS]
            while True:
                stop = _scheduler.piece_end(block, end, schedule.config.split_blocks, num_parts)
                found.setdefault(job, []).append((int(block), int(stop), int(split), worker))
                split, block = split + 1, stop
                if block >= end:
                    break
            split = 0
    return found


def _check(schedule, shape):
    config, num_jobs = schedule.config, int(schedule.totals[TOTAL_JOBS])
    pieces = _pieces(schedule)
    assert sorted(pieces) == list(range(num_jobs))
    slots = set()
    for job, walked in pieces.items():
        num_blocks = schedule.jobs[job, JOB_NUM_BLOCKS]
        assert [piece[2] for piece in walked] == list(range(schedule.num_splits[job + 1] - schedule.num_splits[job]))
        assert walked[0][0] == 0 and walked[-1][1] == num_blocks
        assert all(before[1] == after[0] for before, after in zip(walked, walked[1:], strict=False))
        assert num_blocks == 0 or all(begin < end for begin, end, _, _ in walked)
        if config.split_blocks:
            is_cut = config.split_blocks < num_blocks <= (config.max_cut_blocks or NEVER_CUT)
            assert len(walked) == (ceil_div(num_blocks, config.split_blocks) if is_cut else 1)
        if len(walked) > 1:
            if config.split_blocks:
                assert all(begin % config.split_blocks == 0 for begin, _, _, _ in walked)
                assert all(end - begin == config.split_blocks for begin, end, _, _ in walked[:-1])
            else:
                assert min(end - begin for begin, end, _, _ in walked) >= config.min_split_blocks
            for _, _, split, _ in walked:
                slot = _scheduler.slot_of(schedule.num_splits, job, split)
                assert 0 <= slot < schedule.num_slots and slot not in slots
                slots.add(slot)
    # A rehearsal writes where no piece does, but in the workspace.
    for row in schedule.starts:
        if row[JOB_REQUEST] == REHEARSAL and row[JOB_NUM_PARTS] == 0:
            assert row[JOB_FIRST_SLOT] < schedule.num_slots and row[JOB_FIRST_SLOT] not in slots
    # Of each job of three pieces or more a row for each share of its merge.
    rows = iter(schedule.merges[:schedule.totals[TOTAL_MERGES]])
    for job, walked in sorted(pieces.items()):
        shares = 1
        while len(walked) > max(shares * config.merge_share_parts, config.merge_alone_parts) and shares < MERGE_MAX_SHARES:
            shares *= 2
        for share in range(shares if len(walked) >= MERGE_LEAST_PARTS else 0):
            row = next(rows)
            assert (row[MERGE_SHARE], row[MERGE_NUM_SHARES], row[MERGE_NUM_PARTS]) == (share, shares, len(walked))
            assert row[MERGE_FIRST_SLOT] == schedule.jobs[job, JOB_FIRST_SLOT] == _scheduler.slot_of(schedule.num_splits, job, 0)
            for column, of_job in _MERGE_COPIES.items():
                assert row[column] == schedule.jobs[job, of_job]
    assert next(rows, None) is None
    if config.merge_alone_parts == 8 and config.merge_share_parts >= 4:
        # What hopper sizes the merge's grid by.
        assert schedule.totals[TOTAL_MERGES] <= min(schedule.extra_splits // 2, schedule.config.max_jobs(shape) * MERGE_MAX_SHARES)
    if not config.split_blocks:
        assert schedule.totals[TOTAL_EXTRA_SPLITS] < config.num_workers
    assert schedule.num_splits[num_jobs] == num_jobs + schedule.totals[TOTAL_EXTRA_SPLITS]
    assert (schedule.num_splits[num_jobs:] == schedule.num_splits[num_jobs]).all()
    for row in schedule.workers:
        if row[BEGIN_JOB] < num_jobs:
            assert bool(row[FIRST_IS_SPLIT]) == (len(pieces[row[BEGIN_JOB]]) > 1)
            assert bool(row[LAST_IS_SPLIT]) == (len(pieces[row[END_JOB]]) > 1)
        else:
            assert row[END_JOB] < row[BEGIN_JOB]
    # Every packed query row of every request is in exactly one job.
    rows = {}
    for job in schedule.jobs[:num_jobs]:
        q_len = job[JOB_Q_LEN]
        end = min(job[JOB_ROW_BEGIN] + config.rows_per_job, q_len * shape.heads_per_kv)
        rows.setdefault((job[JOB_REQUEST], job[JOB_Q_BEGIN], q_len), []).append((job[JOB_ROW_BEGIN], end))
    for (_, _, q_len), ranges in rows.items():
        assert ranges[0][0] == 0 and ranges[-1][1] == q_len * shape.heads_per_kv
        assert all(before[1] == after[0] for before, after in zip(ranges, ranges[1:], strict=False))


@st.composite
def problems(draw):
    batch = draw(st.integers(1, 12), label="batch")
    lens = draw(st.lists(st.one_of(st.sampled_from([-3, 0, 0, 1, 63, 64, 65, 128, 4096]), st.integers(0, 5000)), min_size=batch,
                         max_size=batch), label="seq_lens")
    heads = draw(st.sampled_from([1, 3, 16, 128]), label="heads")
    causal = draw(st.booleans(), label="causal")
    q_lens = draw(st.one_of(st.sampled_from([1, 2, 5]), st.lists(st.integers(0, 4), min_size=batch, max_size=batch)), label="q_lens")
    choices = dict(rows_per_job=[16, 64, 128], block_n=[32, 64], num_workers=[1, 2, 7, 66, 132], overhead_blocks=[1, 5],
                   min_split_blocks=[1, 4, 8], split_blocks=[0, 0, 0, 5, 16], max_cut_blocks=[0, 0, 1, 20, 200],
                   uncut_blocks=[0, 5, NEVER_CUT], merge_alone_parts=[8, 8, 1], merge_share_parts=[8, 4, 2, 1, 3])
    config = ScheduleConfig(**{name: draw(st.sampled_from(values), label=name) for name, values in choices.items()})
    if isinstance(q_lens, list):
        cu_seqlens_q = _int32(np.cumsum([0, *q_lens]))
        return config, _shape(batch, seq_len_q=0, total_q=sum(q_lens), heads=heads, causal=causal), _int32(lens), cu_seqlens_q
    return config, _shape(batch, seq_len_q=q_lens, heads=heads, causal=causal), _int32(lens), None


@given(problems())
def test_pieces_tile_every_job_and_fit_the_workspace(problem):
    config, shape, lens, cu_seqlens_q = problem
    _check(make_host_schedule(config, shape, lens, cu_seqlens_q), shape)


@given(problems())
def test_workers_finish_together(problem):
    """No worker's cost exceeds the average by more than the restarts and the minimum piece allow."""
    config, shape, lens, cu_seqlens_q = problem
    # A job that is left whole may be as long as it likes.
    config = replace(config, max_cut_blocks=0)
    schedule = make_host_schedule(config, shape, lens, cu_seqlens_q)
    num_jobs = int(schedule.totals[TOTAL_JOBS])
    total = int(schedule.jobs[:num_jobs, JOB_NUM_BLOCKS].sum()) + num_jobs * config.overhead_blocks
    load = np.zeros(config.num_workers, int)
    for walked in _pieces(schedule).values():
        for begin, end, _, worker in walked:
            load[worker] += end - begin
        for worker in {piece[3] for piece in walked}:
            load[worker] += config.overhead_blocks
    # What a worker may leave of its share, or pay again, and may take beyond its share.
    piece = max(config.min_split_blocks, config.split_blocks, config.uncut_blocks)
    assert load.max() <= ceil_div(total, config.num_workers) + 2 * config.overhead_blocks + 2 * piece


@given(problems())
def test_what_is_never_cut_is_one_piece(problem):
    config, shape, lens, cu_seqlens_q = problem
    schedule = make_host_schedule(replace(config, uncut_blocks=NEVER_CUT, split_blocks=0), shape, lens, cu_seqlens_q)
    assert schedule.totals[TOTAL_EXTRA_SPLITS] == schedule.totals[TOTAL_MERGES] == schedule.num_slots == 0
    walked = _pieces(schedule)
    assert all(len(of_job) == 1 for of_job in walked.values())
    if len(walked) <= config.num_workers:
        # Nobody has more than a share, which is the mean, or one job.
        loads = {}
        for (begin, end, _, worker), in walked.values():
            loads.setdefault(worker, []).append(end - begin + config.overhead_blocks)
        share = max(ceil_div(sum(map(sum, loads.values())), config.num_workers), config.overhead_blocks + max(config.min_split_blocks, 2))
        assert all(len(load) == 1 or sum(load) <= share for load in loads.values())


@given(problems(), st.integers(0, 11))
def test_batch_invariant_pieces_do_not_depend_on_the_batch(problem, pick):
    config, shape, lens, cu_seqlens_q = problem
    if cu_seqlens_q is not None or not config.split_blocks:
        return
    pick %= shape.batch
    one = make_host_schedule(config, _shape(1, seq_len_q=shape.seq_len_q, heads=shape.num_heads_q, causal=shape.causal),
                             lens[pick:pick + 1], None)
    whole = make_host_schedule(config, shape, lens, None)
    jobs_per_request = len(one.jobs)
    alone = [[piece[:3] for piece in walked] for walked in _pieces(one).values()]
    together = [[piece[:3] for piece in _pieces(whole)[pick * jobs_per_request + i]] for i in range(jobs_per_request)]
    assert alone == together


# (workers, lengths) -> pieces; FlashMLA's own answers stand in ../shared/research/features.md section 1.7.
_KNOWN = [
    pytest.param(132, [4096], 16, id="1x4096-not-64-pieces-of-one-block"),
    pytest.param(132, [131072], 128, id="1x131072"),
    pytest.param(132, [4096] * 128, 128, id="128x4096-not-split"),
    pytest.param(66, [4096] * 128, 128, id="128x4096-two-requests-a-worker"),
    pytest.param(132, [64] * 20000, 20000, id="20000-requests"),
    pytest.param(132, [0] * 7, 7, id="all-empty"),
]


@pytest.mark.parametrize(("num_workers", "lens", "num_pieces"), _KNOWN)
def test_known_batches(num_workers, lens, num_pieces):
    shape = _shape(len(lens))
    schedule = make_host_schedule(ScheduleConfig(128, 64, num_workers, 5, 4), shape, _int32(lens), None)
    assert schedule.num_splits[-1] == num_pieces
    _check(schedule, shape)


@pytest.mark.parametrize(("num_blocks", "num_pieces"), [(1, 1), (4, 1), (5, 1), (6, 3), (16, 8)])
def test_short_jobs_are_not_cut(num_blocks, num_pieces):
    """As Hopper cuts them: pieces of two blocks, but none of a job of five or fewer."""
    config = ScheduleConfig(128, 64, 66, 5, 2, uncut_blocks=5)
    schedule = make_host_schedule(config, _shape(2), _int32([64 * num_blocks] * 2), None)
    assert schedule.num_splits.tolist() == [0, num_pieces, 2 * num_pieces]
    _check(schedule, _shape(2))


@pytest.mark.parametrize(("num_blocks", "num_pieces"), [(5, 1), (6, 6), (16, 16), (64, 64), (65, 33), (128, 64), (1024, 128)])
def test_long_jobs_are_not_cut_into_single_blocks(num_blocks, num_pieces):
    """As Hopper cuts for one row tile: of one block where a job has 64 or fewer, else of two at least."""
    config = ScheduleConfig(64, 64, 132, 5, 1, uncut_blocks=5)
    schedule = make_host_schedule(config, _shape(1, heads=16), _int32([64 * num_blocks]), None)
    assert schedule.num_splits.tolist() == [0, num_pieces]
    _check(schedule, _shape(1, heads=16))


def test_idle_workers_rehearse_what_the_others_will_do():
    """Where jobs are merged the last one, the stores of partial results; else all, every other one only the end of a piece."""
    def rehearsals(num_blocks):
        starts = make_host_schedule(ScheduleConfig(128, 64, 6, 5, 2, uncut_blocks=5), _shape(1), _int32([64 * num_blocks]), None).starts
        return [(row[JOB_NUM_BLOCKS], row[JOB_NUM_PARTS], row[JOB_Q_LEN]) for row in starts if row[JOB_REQUEST] == REHEARSAL]

    assert rehearsals(8) == [(2, 0, 0)]
    assert rehearsals(4) == [(2, 1, 0), (0, 1, 0), (2, 1, 0), (0, 1, 0), (2, 1, 0)]
    assert rehearsals(12) == []


def test_causal_mask_shortens_the_first_queries():
    """With 128 queries of one head and 64 rows a job, the first job sees 64 tokens fewer than the second."""
    schedule = make_host_schedule(ScheduleConfig(64, 64, 4, 5, 4), _shape(1, seq_len_q=128, heads=1), _int32([640]), None)
    assert schedule.jobs[:, JOB_NUM_BLOCKS].tolist() == [9, 10]


@pytest.mark.parametrize("offsets", [[0, 9, 0, 9, 0], [5, -7, 2**31 - 1, 3, -1], [9, 9, 9, 9, 9]])
def test_offsets_that_no_batch_has_stay_inside_the_tables(offsets):
    shape = _shape(4, seq_len_q=0, total_q=9, heads=1)
    schedule = make_host_schedule(ScheduleConfig(1, 64, 3, 5, 4), shape, _int32([100] * 4), _int32(offsets))
    used = schedule.jobs[: int(schedule.totals[TOTAL_JOBS])]
    assert ((used[:, JOB_Q_BEGIN] >= 0) & (used[:, JOB_Q_BEGIN] + used[:, JOB_Q_LEN] <= 9)).all()


def test_lengths_near_2_31_do_not_overflow():
    schedule = make_host_schedule(ScheduleConfig(128, 64, 132, 5, 4), _shape(1), _int32([2**31 - 1]), None)
    assert schedule.jobs[0, JOB_NUM_BLOCKS] == 2**25


@pytest.mark.parametrize("field", ["rows_per_job", "block_n", "num_workers", "overhead_blocks", "min_split_blocks", "merge_alone_parts",
                                   "merge_share_parts"])
def test_config_rules(field):
    values = dict(rows_per_job=64, block_n=64, num_workers=1, overhead_blocks=1, min_split_blocks=1)
    with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
        ScheduleConfig(**{**values, field: 0})
    for may_be_0 in ("split_blocks", "uncut_blocks"):
        with pytest.raises(ValueError, match=f"{may_be_0}=-1"):
            ScheduleConfig(**values, **{may_be_0: -1})


class _Warps:
    """Threads as warps of four lanes, as `kernels.schedule` has them."""

    def __init__(self, num_threads):
        self.lane = threading.local()
        self.barriers, self.values = [threading.Barrier(4) for _ in range(num_threads // 4)], np.zeros(num_threads, np.int64)

    def begin(self, axis, num_jobs, first=0):
        edges = [axis[min(first + i, num_jobs)] for i in range(5)]
        return SimpleNamespace(edge=edges[self.lane.thread % 4], next_edge=edges[self.lane.thread % 4 + 1], edges=edges, first=first)

    def move(self, axis, num_jobs, window, position):
        while window.first + 4 <= num_jobs and window.edges[4] <= position:
            window = self.begin(axis, num_jobs, window.first + 4)
        return window

    def pick(self, window, position, value):
        warp = self.lane.thread // 4
        self.values[self.lane.thread] = value
        self.barriers[warp].wait()
        picked = self.values[4 * warp + sum(edge <= position for edge in window.edges[:4]) - 1]
        self.barriers[warp].wait()
        return int(picked)

    def same(self, value):
        return value

    def abort(self):
        for barrier in self.barriers:
            barrier.abort()


@given(problems())
def test_warps_build_the_same_tables_in_32_bits(problem):
    """As on the device: three warps, of four lanes each, and numbers that are taken modulo 2^32."""
    config, shape, lens, cu_seqlens_q = problem
    host = make_host_schedule(config, shape, lens, cu_seqlens_q)
    barrier, threads, warps = threading.Barrier(12), range(12), _Warps(12)
    scheduler = make_scheduler(lambda function: function, barrier.wait, lambda value: int(value) % 2**32, 4, warps)
    tables = {name: np.full(size, -7, np.int32) for name, (_, size) in host.places.items()}
    offsets = np.zeros(1, np.int64) if cu_seqlens_q is None else cu_seqlens_q.astype(np.int64)
    arguments = [0] * len(threads), lens.astype(np.int64), offsets, *build_arguments(config, shape), *tables.values()

    def build(thread):
        warps.lane.thread = thread
        try:
            scheduler.build(thread, len(threads), *arguments)
        except BaseException:
            # Whoever waits for this thread fails, too.
            barrier.abort()
            warps.abort()
            raise

    with ThreadPoolExecutor(len(threads)) as pool:
        list(pool.map(build, threads))
    assert_same_tables(tables.get, host)


@pytest.mark.sim
@given(problems())
def test_device_builds_the_same_tables(problem):
    """In the simulator 8 threads build what one does on the host."""
    _assert_simulated(*problem)


@pytest.mark.sim
@pytest.mark.parametrize(("batch", "num_workers"), [(3, 400), (4100, 3)])
def test_device_builds_what_shared_memory_does_not_hold(batch, num_workers):
    """Beginnings of more workers than WORKERS_SMEM, positions of more jobs than AXIS_SMEM."""
    lens = np.random.default_rng(batch).integers(0, 30_000, batch, dtype=np.int32)
    _assert_simulated(ScheduleConfig(128, 64, num_workers, 5, 2), _shape(batch), lens, None)


def _assert_simulated(config, shape, lens, cu_seqlens_q):
    host = make_host_schedule(config, shape, lens, cu_seqlens_q)
    device = simt.make_schedule(config, shape, lens, cu_seqlens_q, 0, lambda count, _: (cuda.device_array(count, np.int32), 0), None)
    assert_same_tables(lambda name: device.table(name).copy_to_host(), host)


def assert_same_tables(table, host):
    """`table` gives the other schedule's by their names."""
    for name in ("jobs", "workers", "starts", "num_splits", "merges", "totals"):
        rows = host.totals[TOTAL_MERGES] if name == "merges" else None
        np.testing.assert_array_equal(table(name)[:rows], host.table(name)[:rows], err_msg=name)
