"""The tile scheduler: cuts every request's KV blocks over the workers so that all finish together. Integers only.

The work of a batch is laid end to end on one axis, job after job, each job `overhead_blocks` long plus its KV blocks:

    job 0          job 1      job 2                                          job 3
    |oo|----------|oo|-----|oo|---------------------------------------------|oo|--|
    worker 0 ............. | worker 1 ............ | worker 2 .............. | worker 3

A worker walks whole jobs while they fit into its share, then takes a piece of the next one if at least `min_split_blocks` fit and
at least as many remain (else it stops at the job's edge, or finishes the job). Continuing a job costs the overhead again. With a
job of `uncut_blocks` or fewer that it begins with it goes on to the end, as merging would take longer; with NEVER_CUT none is cut, and
nothing to be merged: a worker takes the jobs that fit into the average, or one that does not, the last one the rest. The share is the
least that suffices, but of long jobs it is not of one block alone; it is found by trying, from the average up, on the device by a warp
each. Under `split_blocks` (batch_invariant) pieces end at its multiples, and every multiple ends a piece, whoever works there; but a job of
more than `max_cut_blocks` is one piece.

Against FlashMLA's scheduler: a minimum length (it cuts 1 x 4096 tokens into 64 pieces of one block), the causal mask, ragged
queries, and time: a warp takes a step per worker, in which it looks at 32 jobs, where FlashMLA's thread takes one per request.

`make_scheduler` returns the functions compiled by the given `jit`: identity for plain Python, `njit` for the host,
`cuda.jit(device=True)` for the device. `build` is run by `num_threads` threads together, of which the host has one.

Invariants (verify/test_l0_scheduler.py; names after FlashMLA 9241ae3, get_decoding_sched_meta.cu): the pieces of a job tile
[0, num_blocks) without gap or overlap; its split ids are 0 .. n - 1 in order of blocks; there are at most
num_jobs + num_workers - 1 pieces in all (without `split_blocks`); idle workers have begin_job == num_jobs.
"""

from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

# Columns of the job table, int32 (max_jobs, JOB_COLUMNS).
JOB_REQUEST, JOB_Q_BATCH, JOB_Q_BEGIN, JOB_Q_LEN, JOB_ROW_BEGIN, JOB_SEQ_LEN, JOB_NUM_BLOCKS, JOB_FIRST_SLOT, JOB_NUM_PARTS = range(9)
JOB_COLUMNS = 9
# JOB_FIRST_SLOT of a job in one piece, which goes to no slot.
NOT_SPLIT = -1
# Columns of the worker table, int32 (num_workers, WORKER_COLUMNS): FlashMLA's tile_scheduler_metadata, with jobs for requests.
# end_job is inclusive, end_block exclusive.
BEGIN_JOB, END_JOB, BEGIN_BLOCK, END_BLOCK, BEGIN_SPLIT, FIRST_IS_SPLIT, LAST_IS_SPLIT = range(7)
WORKER_COLUMNS = 8
# Columns of the merge table, int32 (max_jobs * MERGE_MAX_SHARES, MERGE_COLUMNS): of each job of MERGE_LEAST_PARTS pieces or more as
# many rows, equal but for the share, as thread blocks should share what one does of a job in `merge_alone_parts` pieces or fewer: 2, 4
# or 8, so that each has `merge_share_parts` or fewer, if it can be. A row has all that merging needs. (Of two pieces the later one's
# worker can merge both as it ends.)
MERGE_LEAST_PARTS = 3
MERGE_MAX_SHARES = 8
(MERGE_FIRST_SLOT, MERGE_NUM_PARTS, MERGE_Q_BATCH, MERGE_Q_BEGIN, MERGE_Q_LEN, MERGE_ROW_BEGIN, MERGE_SHARE,
 MERGE_NUM_SHARES) = range(8)
MERGE_COLUMNS = 8
# Starts, int32 (num_workers, JOB_COLUMNS): the row of a worker's first job, so that it need not wait to know its number. An idle worker's
# may be of a job that is none, to rehearse: where jobs have to be merged, the last one's, in no parts, with a slot that no piece has; else
# all idle ones', in one part, every other one's without blocks, so that it comes to the end of a piece at once.
REHEARSAL = -1
REHEARSAL_BLOCKS = 2
# `totals`, int32 (3,): jobs in use; pieces beyond one per job (what the workspace is sized by); rows of
# the merge table.
TOTAL_JOBS, TOTAL_EXTRA_SPLITS, TOTAL_MERGES = range(3)
NUM_TOTALS = 3
# An `uncut_blocks` that no job has, of no effect under `split_blocks`, and with it a `min_split_blocks`; sums stay below 2**32.
NEVER_CUT = 2**30
# How work is cut: of `config.ScheduleConfig` what a step of the walk looks at.
Cut = namedtuple("Cut", "overhead_blocks min_split_blocks split_blocks max_cut_blocks uncut_blocks")
# What a lane has in view of the work's axis as it walks: where its job begins, where the next one does, the job.
Window = namedtuple("Window", "edge next_edge job")
# Shares that are tried at a time; of 112 batches none needs a larger one than the sixth.
MAX_TRIALS = 8
# No share is of one block alone where jobs have more than these, in the mean: 128 pieces of one block took 19.8 us, 64 of two 16.4, 32 of
# four 19.0 (one request of 8,192 tokens, 16 heads, H200). For every backend: it binds where each worker would have one block, so that
# merging is most of the work.
MOST_SINGLE_BLOCKS = 64


def num_partial_slots(extra_splits: int, num_jobs: int) -> int:
    """Slots of the partial-result workspace that `slot_of` can name when there are `extra_splits` pieces beyond one per job, and behind
    them the one that a rehearsal fills."""
    return extra_splits + min(extra_splits, num_jobs) + 1 if extra_splits > 0 else 0


def make_scheduler(jit: Callable[[Any], Any], sync: Callable[[], None], natural: Callable[[Any], Any] = int, lanes: int = 1,
                   warp: SimpleNamespace | None = None) -> SimpleNamespace:
    """Compile the scheduler with `jit`.

    `sync` is the barrier between the threads that run `build` together. `natural` makes of a number that is not negative what they compute
    fastest with. `lanes` of them, a warp, try a share together, each with a job in view, as `warp` has it; without it see `_one_lane`.
    """

    @jit
    def _divide(a, b):
        """a // b, neither negative."""
        return natural(natural(a) // natural(b))

    @jit
    def visible_tokens(seq_len, q_len, q_idx, causal):
        """Tokens that query `q_idx` of a request sees: all, or those up to its own place, counted from the end."""
        if causal:
            return max(seq_len - (q_len - 1 - q_idx), 0)
        return max(seq_len, 0)

    @jit
    def piece_end(block, end_block, split_blocks, num_parts):
        """Where the piece that begins at `block` ends, of a job in so many: at the next multiple of `split_blocks`, or where the worker
        stops."""
        if split_blocks == 0 or num_parts == 1:
            return end_block
        return min(end_block, (block // split_blocks + 1) * split_blocks)

    @jit
    def slot_of(num_splits, job, split):
        """Workspace slot of a piece. Only split jobs use slots, and before the job no more can be split than there are jobs, or extra
        pieces: the next split job's slots begin behind this one's, as its number is larger and its extra pieces are by splits - 1."""
        extra = num_splits[job] - job
        return extra + min(extra, job) + split

    @jit
    def _q_range(request, cu_seqlens_q, seq_len_q, total_q):
        """(first query token, query tokens) of a request; offsets that no batch can have are brought into [0, total_q]."""
        if seq_len_q > 0:
            return 0, seq_len_q
        begin = min(max(cu_seqlens_q[request], 0), total_q)
        return begin, min(max(cu_seqlens_q[request + 1], begin), total_q) - begin

    @jit
    def _jobs_of(q_len, heads_per_kv, rows_per_job):
        return _divide(q_len * heads_per_kv + rows_per_job - 1, rows_per_job)

    @jit
    def _fill_jobs(jobs, job, request, seq_len, q_begin, q_len, ragged, heads_per_kv, rows_per_job, block_n, causal):
        """Write the jobs of a request from row `job` on, as far as the table reaches; return the row after them."""
        num_jobs = _jobs_of(q_len, heads_per_kv, rows_per_job)
        for i in range(min(num_jobs, jobs.shape[0] - job)):
            row_end = min((i + 1) * rows_per_job, q_len * heads_per_kv)
            tokens = visible_tokens(seq_len, q_len, _divide(row_end - 1, heads_per_kv), causal)
            jobs[job + i, JOB_REQUEST] = request
            jobs[job + i, JOB_Q_BATCH] = 0 if ragged else request
            jobs[job + i, JOB_Q_BEGIN] = q_begin
            jobs[job + i, JOB_Q_LEN] = q_len
            jobs[job + i, JOB_ROW_BEGIN] = i * rows_per_job
            jobs[job + i, JOB_SEQ_LEN] = max(seq_len, 0)
            jobs[job + i, JOB_NUM_BLOCKS] = _divide(tokens + block_n - 1, block_n)
            jobs[job + i, JOB_FIRST_SLOT] = NOT_SPLIT
            jobs[job + i, JOB_NUM_PARTS] = 1
        return job + num_jobs

    def _one_lane() -> SimpleNamespace:
        """What a warp does together, of one thread."""
        @jit
        def begin(axis, num_jobs):
            """At the first job. Behind the last one both edges are the same."""
            return Window(axis[0], axis[min(1, num_jobs)], 0)

        @jit
        def move(axis, num_jobs, window, position):
            """As far as the job that `position` is in, or behind the last. Positions do not fall."""
            while window.job < num_jobs and window.next_edge <= position:
                window = Window(window.next_edge, axis[min(window.job + 2, num_jobs)], window.job + 1)
            return window

        @jit
        def pick(_window, _position, value):
            """Of what each lane has made of its job that of the lane in whose job the position is."""
            return value

        @jit
        def same(value):
            """What is the same for all lanes."""
            return value

        return SimpleNamespace(begin=begin, move=move, pick=pick, same=same)

    warp = warp or _one_lane()
    begin_window, move_window, pick, same = warp.begin, warp.move, warp.pick, warp.same

    @jit
    def _last_within(values, first, last, limit):
        """The last `i` in [first, last] with values[i] <= limit, of ascending values; that of the first is."""
        low, high = natural(first), natural(last)
        while low < high:
            middle = natural((low + high + 1) // 2)
            if natural(values[middle]) <= natural(limit):
                low = middle
            else:
                high = natural(middle - 1)
        return low

    @jit
    def _next_begin(begin, reach, edge, next_edge, cut):
        """Where the next worker begins, if one begins at `begin` and its share reaches as far as `reach`, in the job between the edges.

        Block b of a job is at its edge + cut.overhead_blocks + b; who begins there, at the edge + b, as the overhead comes again."""
        first_block, split_blocks = natural(edge + cut.overhead_blocks), cut.split_blocks
        # The work may end here; then both edges are the same.
        is_whole = begin == edge and next_edge <= natural(first_block + cut.uncut_blocks)
        if split_blocks > 0:
            if reach <= first_block:
                return edge
            # The nearest multiple, but not the one where it begins.
            stop = natural(_divide(2 * (reach - first_block) + split_blocks, 2 * split_blocks) * split_blocks)
            if begin >= edge and stop <= natural(begin - edge):
                stop = natural(begin - edge + split_blocks)
            takes_job = is_whole or natural(first_block + stop) >= next_edge or next_edge > natural(first_block + cut.max_cut_blocks)
            return next_edge if takes_job else natural(edge + stop)
        takes_job = is_whole or natural(reach + cut.min_split_blocks) > next_edge
        takes_none = not is_whole and reach < natural(first_block + cut.min_split_blocks)
        stop = next_edge if takes_job else natural(reach - cut.overhead_blocks)
        return edge if takes_none else stop

    @jit
    def _walk(lane, share, begins, num_workers, axis, num_jobs, cut):
        """Give every worker as much as fits into `share`, the last one what is left, and tell whether that fits, too. `begins`
        (num_workers,) is where each begins. All `lanes` threads go the same way, the first writes."""
        begin, worker, last, window = natural(0), natural(0), natural(num_workers - 1), begin_window(axis, num_jobs)
        while worker < last:
            if lane == 0:
                begins[worker] = begin
            reach = natural(begin + share)
            window = move_window(axis, num_jobs, window, reach)
            # Each lane as if `reach` were in its own job, so that nobody waits to know in whose it is.
            begin = pick(window, reach, _next_begin(begin, reach, natural(window.edge), natural(window.next_edge), cut))
            worker = natural(worker + 1)
        if lane == 0:
            begins[last] = begin
        return natural(begin + share) >= natural(axis[num_jobs]) or cut.min_split_blocks >= NEVER_CUT

    @jit
    def _try_shares(thread, num_threads, sums, trials, num_workers, axis, num_jobs, cut):
        """The row of `trials` (shares tried at a time, num_workers) with the least share in which all work fits.

        A worker leaves less than an overhead and a piece of its share unused, and may pay the overhead twice, so that the largest
        candidate surely suffices; not for a job of more than `max_cut_blocks`, which is taken whole all the same."""
        num_trials, trial, lane = min(num_threads // lanes, trials.shape[0]), same(thread // lanes), thread % lanes
        piece = 1 if axis[num_jobs] <= num_jobs * (cut.overhead_blocks + MOST_SINGLE_BLOCKS) else 2
        if cut.min_split_blocks < NEVER_CUT:
            piece = max(cut.min_split_blocks, piece)
        least = max(_divide(axis[num_jobs] + num_workers - 1, num_workers), natural(cut.overhead_blocks + piece))
        most = least + 2 * cut.overhead_blocks + max(cut.min_split_blocks, cut.split_blocks, cut.uncut_blocks)
        cut = Cut(natural(cut.overhead_blocks), natural(cut.min_split_blocks), natural(cut.split_blocks), natural(cut.max_cut_blocks),
                  natural(cut.uncut_blocks))
        best, share = -1, natural(least + trial)
        while best < 0:
            if trial < num_trials:
                fits = _walk(lane, share, trials[trial], num_workers, axis, natural(num_jobs), cut)
                if lane == 0:
                    sums[trial] = fits or share >= most
            sync()  # every trial has its verdict
            for t in range(num_trials):
                if best < 0 and sums[t] != 0:
                    best = t
            sync()  # and everybody has seen it
            share = natural(share + num_trials)
        return best

    @jit
    def _begin_worker(workers, worker, begins, axis, num_jobs, split_blocks):
        """The columns that say where a worker begins."""
        job = _last_within(axis, 0, num_jobs, begins[worker])
        block, split = begins[worker] - axis[job], 0
        if block > 0:
            # Before it came those that begin inside the job, and the one that begins it.
            split = _divide(block, split_blocks) if split_blocks > 0 else worker - _last_within(begins, 0, worker, axis[job])
        workers[worker, BEGIN_JOB] = job
        workers[worker, BEGIN_BLOCK] = block
        workers[worker, BEGIN_SPLIT] = split

    @jit
    def _extra_splits(begins, num_workers, axis, job, num_blocks, split_blocks, max_cut_blocks):
        """Pieces of a job beyond the first: workers that begin inside it."""
        if split_blocks > 0:
            multiples = _divide(num_blocks + split_blocks - 1, split_blocks)
            return natural(max(multiples, 1) - 1 if num_blocks <= max_cut_blocks else 0)
        before = _last_within(begins, 0, num_workers - 1, axis[job])
        return natural(_last_within(begins, before, num_workers - 1, axis[job + 1] - 1) - before)

    @jit
    def _end_worker(workers, worker, jobs, num_jobs, num_splits):
        """The columns of a worker that follow from where it and the next one begin. Reads only BEGIN_* of other rows."""
        begin_job = workers[worker, BEGIN_JOB]
        end_job, end_block = num_jobs, 0
        if worker + 1 < workers.shape[0]:
            end_job, end_block = workers[worker + 1, BEGIN_JOB], workers[worker + 1, BEGIN_BLOCK]
        if end_block == 0:
            end_job -= 1
            end_block = jobs[end_job, JOB_NUM_BLOCKS] if end_job >= begin_job else 0
        idle = begin_job == num_jobs
        workers[worker, END_JOB] = end_job
        workers[worker, END_BLOCK] = end_block
        workers[worker, FIRST_IS_SPLIT] = not idle and num_splits[begin_job + 1] - num_splits[begin_job] > 1
        workers[worker, LAST_IS_SPLIT] = not idle and num_splits[end_job + 1] - num_splits[end_job] > 1
        workers[worker, WORKER_COLUMNS - 1] = 0

    @jit
    def _merge_shares(num_parts, merge_alone_parts, merge_share_parts):
        """Rows that a job of so many pieces has in the merge table."""
        if num_parts < MERGE_LEAST_PARTS:
            return 0
        shares = 1
        while shares < MERGE_MAX_SHARES and num_parts > max(shares * merge_share_parts, merge_alone_parts):
            shares *= 2
        return shares

    @jit
    def _fill_merge(merges, row, jobs, job, share, num_shares):
        merges[row, MERGE_FIRST_SLOT] = jobs[job, JOB_FIRST_SLOT]
        merges[row, MERGE_NUM_PARTS] = jobs[job, JOB_NUM_PARTS]
        merges[row, MERGE_Q_BATCH] = jobs[job, JOB_Q_BATCH]
        merges[row, MERGE_Q_BEGIN] = jobs[job, JOB_Q_BEGIN]
        merges[row, MERGE_Q_LEN] = jobs[job, JOB_Q_LEN]
        merges[row, MERGE_ROW_BEGIN] = jobs[job, JOB_ROW_BEGIN]
        merges[row, MERGE_SHARE] = share
        merges[row, MERGE_NUM_SHARES] = num_shares

    @jit
    def _fill_rehearsal(starts, worker, num_blocks, num_parts, slot, block_n):
        """A job of no rows, whose q and pages are nowhere."""
        starts[worker, JOB_REQUEST] = REHEARSAL
        starts[worker, JOB_Q_BATCH] = REHEARSAL
        starts[worker, JOB_SEQ_LEN] = num_blocks * block_n
        starts[worker, JOB_NUM_BLOCKS] = num_blocks
        starts[worker, JOB_FIRST_SLOT] = slot
        starts[worker, JOB_NUM_PARTS] = num_parts

    @jit
    def _scan(thread, num_threads, sums, value):
        """Exclusive prefix sum over the threads: (sum of `value` in the threads before this one, sum in all)."""
        sums[thread] = value
        sync()
        distance = 1
        while distance < num_threads:
            below = sums[thread - distance] if thread >= distance else 0
            sync()
            sums[thread] += below
            sync()
            distance *= 2
        through, total = sums[thread], sums[num_threads - 1]
        sync()
        return through - value, total

    @jit
    def build(thread, num_threads, sums, seq_lens, cu_seqlens_q, seq_len_q, total_q, heads_per_kv, causal, rows_per_job,
              block_n, overhead_blocks, min_split_blocks, split_blocks, max_cut_blocks, uncut_blocks, merge_alone_parts,
              merge_share_parts, jobs, axis, trials, num_splits, workers, starts, merges, totals):
        """Fill the schedule.

        Every thread takes a contiguous chunk of the requests, then of the jobs, then of the workers. `sums` (num_threads,) is
        scratch that all of them see (shared memory on the device); `axis` (max_jobs + 1,) and `trials` (up to MAX_TRIALS,
        num_workers) are scratch, too, and may be larger. `seq_len_q` is 0 for ragged queries; `cu_seqlens_q` is read only then.
        """
        batch = seq_lens.shape[0]
        max_jobs = jobs.shape[0]
        num_workers = workers.shape[0]

        chunk = (batch + num_threads - 1) // num_threads
        begin, end = min(thread * chunk, batch), min((thread + 1) * chunk, batch)
        count = 0
        for request in range(begin, end):
            q_begin, q_len = _q_range(request, cu_seqlens_q, seq_len_q, total_q)
            count += _jobs_of(q_len, heads_per_kv, rows_per_job)
        job, num_jobs = _scan(thread, num_threads, sums, count)
        # Only offsets that overlap, which check_values=True refuses, make more jobs than the table holds.
        num_jobs = min(num_jobs, max_jobs)
        for request in range(begin, end):
            q_begin, q_len = _q_range(request, cu_seqlens_q, seq_len_q, total_q)
            job = _fill_jobs(jobs, job, request, seq_lens[request], q_begin, q_len, seq_len_q == 0, heads_per_kv, rows_per_job,
                             block_n, causal)
        sync()  # every job is in the table

        chunk = (num_jobs + num_threads - 1) // num_threads
        begin, end = min(thread * chunk, num_jobs), min((thread + 1) * chunk, num_jobs)
        cost = 0
        for job in range(begin, end):
            cost += overhead_blocks + jobs[job, JOB_NUM_BLOCKS]
        position, total_cost = _scan(thread, num_threads, sums, cost)
        for job in range(begin, end):
            axis[job] = position
            position += overhead_blocks + jobs[job, JOB_NUM_BLOCKS]
        if thread == 0:
            axis[num_jobs] = total_cost
        sync()  # the axis is whole

        best = _try_shares(thread, num_threads, sums, trials, num_workers, axis, num_jobs,
                           Cut(overhead_blocks, min_split_blocks, split_blocks, max_cut_blocks, uncut_blocks))
        begins = trials[best]
        for worker in range(thread, num_workers, num_threads):
            _begin_worker(workers, worker, begins, axis, num_jobs, split_blocks)

        extra = 0
        for job in range(begin, end):
            num_splits[job] = _extra_splits(begins, num_workers, axis, job, jobs[job, JOB_NUM_BLOCKS], split_blocks, max_cut_blocks)
            extra += num_splits[job]
        extra, total_extra = _scan(thread, num_threads, sums, extra)
        for job in range(begin, end):
            of_job = num_splits[job]
            num_splits[job] = job + extra
            extra += of_job
        if thread == 0:
            totals[TOTAL_JOBS] = num_jobs
            totals[TOTAL_EXTRA_SPLITS] = total_extra
        # Rows that a ragged batch left unused: jobs of no rows in no pieces.
        for job in range(num_jobs + thread, max_jobs + 1, num_threads):
            num_splits[job] = num_jobs + total_extra
            if job < max_jobs:
                for column in range(JOB_COLUMNS):
                    jobs[job, column] = 0
        sync()  # num_splits is whole, and every worker has its beginning

        for worker in range(thread, num_workers, num_threads):
            _end_worker(workers, worker, jobs, num_jobs, num_splits)
        count = 0
        for job in range(begin, end):
            num_parts = num_splits[job + 1] - num_splits[job]
            jobs[job, JOB_NUM_PARTS] = num_parts
            if num_parts > 1:
                jobs[job, JOB_FIRST_SLOT] = slot_of(num_splits, job, 0)
            count += _merge_shares(num_parts, merge_alone_parts, merge_share_parts)
        row, total_merges = _scan(thread, num_threads, sums, count)
        for job in range(begin, end):
            num_shares = _merge_shares(jobs[job, JOB_NUM_PARTS], merge_alone_parts, merge_share_parts)
            for share in range(num_shares):
                _fill_merge(merges, row, jobs, job, share, num_shares)
                row += 1
        if thread == 0:
            totals[TOTAL_MERGES] = total_merges
        sync()  # jobs are whole
        for worker in range(thread, num_workers, num_threads):
            job = workers[worker, BEGIN_JOB]
            for column in range(JOB_COLUMNS):
                starts[worker, column] = jobs[job, column] if job < num_jobs else 0
            if job == num_jobs and (total_merges == 0 or worker == num_workers - 1):
                _fill_rehearsal(starts, worker, (num_workers - worker) % 2 * REHEARSAL_BLOCKS, 0 if total_merges > 0 else 1,
                                total_extra + min(total_extra, num_jobs), block_n)

    return SimpleNamespace(visible_tokens=visible_tokens, piece_end=piece_end, slot_of=slot_of, build=build)
