"""The geometry of one decode, frozen: the shape of the problem, and how the scheduler cuts it up."""

from dataclasses import dataclass


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class DecodeShape:
    """All of a decode that is not data. Two calls with equal shapes run the same compiled kernel and may share a plan.

    The kernels see one form of the query tensor, (num_q_batches, q_batch_len, num_heads_q, head_dim_qk): uniform queries are
    (batch, seq_len_q, ...), ragged queries are (1, total_q, ...), and ``cu_seqlens_q`` says where each request begins.
    """

    batch: int
    seq_len_q: int          # queries per request; 0 when ragged
    total_q: int            # batch * seq_len_q, or the rows of a ragged q
    num_heads_q: int
    num_heads_kv: int
    head_dim_qk: int
    head_dim_v: int
    page_size: int
    dtype: str
    causal: bool
    batch_invariant: bool

    @property
    def ragged(self) -> bool:
        return self.seq_len_q == 0

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one KV head; query token s and head h of a group form packed row s * heads_per_kv + h."""
        return self.num_heads_q // self.num_heads_kv

    def num_jobs(self, rows_per_job: int) -> int:
        """Of uniform queries, for each KV head."""
        return self.batch * ceil_div(self.seq_len_q * self.heads_per_kv, rows_per_job)


@dataclass(frozen=True)
class ScheduleConfig:
    """How a backend wants its work cut. Block counts are KV blocks of ``block_n`` tokens.

    A *job* is what one worker does at a time: ``rows_per_job`` packed query rows of one request, for every KV head, over a run of
    KV blocks. A *worker* walks a contiguous run of (job, block) pairs; on a GPU it is a team of thread blocks, on the CPU a thread.
    """

    rows_per_job: int
    block_n: int
    num_workers: int
    overhead_blocks: int    # what starting a job costs, in KV blocks
    min_split_blocks: int   # no piece of a split job is shorter
    split_blocks: int = 0   # 0: cut where the balance wants it; else cut every job at these multiples (batch_invariant)
    max_cut_blocks: int = 0     # under split_blocks a job of more is left whole, so that a workspace of known size suffices; 0: none is
    uncut_blocks: int = 0   # a job of no more is left whole by a worker that begins with it; scheduler.NEVER_CUT: none is cut
    merge_alone_parts: int = 8  # of a job in more pieces several thread blocks share a part of the merge,
    merge_share_parts: int = 8  # so that each has no more of them than this

    def __post_init__(self) -> None:
        for name in ("rows_per_job", "block_n", "num_workers", "overhead_blocks", "min_split_blocks", "merge_alone_parts",
                     "merge_share_parts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("split_blocks", "max_cut_blocks", "uncut_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or positive")

    def max_jobs(self, shape: DecodeShape) -> int:
        """Rows that the job table needs, from shapes alone (a ragged batch may use fewer)."""
        if shape.ragged:
            return max(shape.batch + shape.total_q * shape.heads_per_kv // self.rows_per_job, 1)
        return shape.num_jobs(self.rows_per_job)
