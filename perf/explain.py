"""Why a case takes as long as it does: bytes and FLOPs, the floor on each machine, what cutting it into tiles adds, what was measured.

The schedule is the project's own scheduler, run here with tiles of 64 rows by 64 tokens, the smallest that wgmma fills, and one thread
block per SM. What a particular backend does differs in its tiles, not in kind.
"""

import heapq
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from mla_numba.config import DecodeShape, ScheduleConfig, ceil_div
from mla_numba.host.schedule import Schedule, make_host_schedule
from mla_numba.scheduler import BEGIN_BLOCK, BEGIN_JOB, END_BLOCK, END_JOB, JOB_NUM_BLOCKS
from perf import datasheet, traffic
from perf.cases import Case, find
from perf.results import Results, Row, limits

BLOCK_N = 64
MIN_SPLIT_BLOCKS = 2
OVERHEAD_BLOCKS = 2


@dataclass(frozen=True)
class Cut:
    """How a case falls into jobs, and jobs onto SMs.

    Parameters
    ----------
    num_jobs : int
        Tiles of rows: requests x row tiles, per KV head.
    waves : float
        Jobs of all KV heads over SMs.
    whole_balance, split_balance : float
        Blocks of the busiest SM over the average of all: each job done by one SM, the next free one taking the next; and as the
        scheduler cuts.
    split_pieces : int
        Pieces of jobs that were cut, per KV head.
    """

    num_jobs: int
    waves: float
    whole_balance: float
    split_balance: float
    split_pieces: int


def cut(case: Case, num_sms: int) -> Cut:
    """Run the scheduler for `case` on a GPU of `num_sms`."""
    # A worker is a thread block per KV head.
    fitting_workers = max(1, num_sms // case.num_heads_kv)
    config = ScheduleConfig(rows_per_job=traffic.ROWS_PER_TILE, block_n=BLOCK_N, num_workers=case.num_workers or fitting_workers,
                            overhead_blocks=OVERHEAD_BLOCKS, min_split_blocks=MIN_SPLIT_BLOCKS)
    shape = DecodeShape(batch=case.batch, seq_len_q=case.seq_len_q, total_q=case.batch * case.seq_len_q, num_heads_q=case.num_heads_q,
                        num_heads_kv=case.num_heads_kv, head_dim_qk=case.head_dim_qk, head_dim_v=case.head_dim_v, page_size=case.page_size,
                        dtype=case.dtype, causal=case.causal, batch_invariant=False)
    schedule = make_host_schedule(config, shape, np.array(case.seq_lens), None)
    blocks = schedule.jobs[:, JOB_NUM_BLOCKS]
    average = max(blocks.sum() * case.num_heads_kv / num_sms, 1e-9)
    busiest = worker_blocks(schedule).max() * ceil_div(config.num_workers, fitting_workers)
    pieces = np.diff(schedule.num_splits)
    return Cut(num_jobs=len(blocks), waves=len(blocks) * case.num_heads_kv / num_sms,
               whole_balance=float(_longest_unsplit(blocks.tolist(), fitting_workers) / average), split_balance=float(busiest / average),
               split_pieces=int(pieces[pieces > 1].sum()))


def worker_blocks(schedule: Schedule) -> np.ndarray:
    """KV blocks that each worker walks."""
    before = np.concatenate([[0], np.cumsum(schedule.jobs[:, JOB_NUM_BLOCKS])])
    workers = schedule.workers
    walked = before[workers[:, END_JOB]] + workers[:, END_BLOCK] - before[workers[:, BEGIN_JOB]] - workers[:, BEGIN_BLOCK]
    return np.where(workers[:, END_JOB] < workers[:, BEGIN_JOB], 0, walked)


def _longest_unsplit(blocks: list[int], num_workers: int) -> int:
    """Blocks of the busiest worker when the next job goes to whoever is free first, as a GPU hands out thread blocks."""
    loads = [0] * num_workers
    for count in blocks:
        heapq.heapreplace(loads, loads[0] + count)
    return max(loads)


@dataclass(frozen=True)
class Part:
    """A share of a measured time, and where its size comes from."""

    name: str
    us: float
    origin: str


def parts(case: Case, row: Row, document: Results) -> list[Part]:
    """A row's time, taken apart. What is computed assumes that the parts do not overlap, so the rest can be too small, even negative."""
    num_sms, work = document["device"]["sms"], traffic.work(case)
    read_gbs, peak = limits(document)
    if not (read_gbs and peak):
        raise ValueError("the results file has no ceilings, so nothing can be said about its floors")
    binds, floor_us = traffic.bound(work, read_gbs, peak)
    found = [Part("floor", floor_us, f"computed: {binds} at the ceiling measured in that run")]
    if num_sms:
        padded_us = max(work.bytes / read_gbs / 1e3, work.flops / peak / 1e6 * traffic.tile_padding(case))
        found.append(Part("row tiles not full", padded_us - floor_us, f"computed: rows padded to {traffic.ROWS_PER_TILE}"))
        found.append(Part("imbalance of SMs", padded_us * (cut(case, num_sms).split_balance - 1), "computed: busiest over average SM"))
        launch_us = document["ceilings"].get("launch_us")
        found.append(Part("launch", launch_us or datasheet.EMPTY_KERNEL_US,
                          "measured: an empty kernel" if launch_us else "an empty kernel on an H200"))
    merge_us = row.get("kernel_us", {}).get("merge_us")
    if merge_us:
        found.append(Part("merge", merge_us, "measured: that kernel alone"))
    return [*found, Part("the rest", row["ours_us"] - sum(part.us for part in found), "inside the decode kernel, or hidden by overlap")]


def matching_rows(case: Case, document: Results) -> list[Row]:
    """The rows of a results file that measured `case`."""
    names = ("batch", "seq_len_q", "num_heads_q", "causal", "page_size", "dtype")
    rows = [row for row in document["rows"]
            if row["seq_lens"] == list(case.seq_lens) and all(row[name] == getattr(case, name) for name in names)]
    # The same shape may have been measured with other numbers of workers, under other names.
    return [row for row in rows if row["case"] == case.name] or rows


def explain(case: Case, console: Console, document: Results | None = None) -> None:
    """Print all that can be said about `case`; with a results file, also where the time of its rows goes.

    Raises
    ------
    ValueError
        The results file has no row of this case, or no ceilings.
    """
    work = traffic.work(case)
    lengths = f"{case.seq_lens[0]}" if not case.varlen else f"{min(case.seq_lens)} to {max(case.seq_lens)}, mean {case.seq_len_k_mean:.0f}"
    queries = "1 query" if case.seq_len_q == 1 else f"{case.seq_len_q} queries"
    console.print(f"[bold]{case.name}[/]: {case.batch} requests of {lengths} tokens, {case.num_heads_q} heads × {queries}, "
                  f"{case.dtype}, pages of {case.page_size}", highlight=False)
    console.print(_work_table(work))
    console.print(_floor_table(work))
    _print_cut(case, console)
    if document is not None:
        rows = matching_rows(case, document)
        if not rows:
            raise ValueError(f"the results file has no row of this case: {case.name}")
        for row in rows:
            console.print(_parts_table(case, row, document))


def _plain_table(*columns: str, title: str) -> Table:
    """First and last column are text, the others numbers."""
    table = Table(box=None, pad_edge=False, title=f"\n{title}", title_justify="left", title_style="bold", header_style="dim",
                  show_header=any(columns))
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if 0 < i < len(columns) - 1 else "left", no_wrap=i < len(columns) - 1)
    return table


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.2f}"


def _work_table(work: traffic.Work) -> Table:
    table = _plain_table("", "MB", "", title="what must move and be computed")
    shared = "" if work.kv_bytes == work.unique_kv_bytes else f"once for all who share it; counted per request {_megabytes(work.kv_bytes)}"
    for name, count, remark in (("KV", work.unique_kv_bytes, shared), ("q", work.q_bytes, ""), ("out", work.out_bytes, ""),
                                ("lse", work.lse_bytes, "")):
        table.add_row(name, _megabytes(count), remark)
    table.add_row("together", _megabytes(work.bytes), f"and {work.flops / 1e9:,.2f} GFLOP: {work.intensity:.1f} FLOP per byte")
    return table


def _floor_table(work: traffic.Work) -> Table:
    table = _plain_table("machine", "GB/s", "TFLOPS", "ridge", "memory us", "compute us", "floor us", "source", title="floors")
    for machine in datasheet.MACHINES:
        binds, floor_us = traffic.bound(work, machine.read_gbs, machine.tflops)
        both = {"memory": work.bytes / machine.read_gbs / 1e3, "compute": work.flops / machine.tflops / 1e6}
        table.add_row(machine.name, f"{machine.read_gbs:.0f}", f"{machine.tflops:.0f}",
                      f"{traffic.ridge(machine.read_gbs, machine.tflops):.0f}", f"{both['memory']:.1f}", f"{both['compute']:.1f}",
                      f"[bold]{floor_us:.1f}[/] {binds[:3]}", f"[dim]{machine.source}")
    return table


def _print_cut(case: Case, console: Console) -> None:
    machine = datasheet.MEASURED_H200
    found = cut(case, machine.num_sms)
    rows = case.seq_len_q * case.num_heads_q // case.num_heads_kv
    plain = traffic.work(case)
    split = traffic.work(case, split_pieces=found.split_pieces, rows_per_piece=min(rows, traffic.ROWS_PER_TILE))
    tiles = f"tiles of {traffic.ROWS_PER_TILE} rows × {BLOCK_N} tokens"
    table = _plain_table("", "", "", title=f"what a kernel adds: {machine.num_sms} SMs, {tiles}")
    table.add_row("row tiles", f"{traffic.tile_padding(case):.2f}×",
                  f"{rows} rows share a KV token and are computed in tiles of {traffic.ROWS_PER_TILE}")
    table.add_row("unsplit", f"{found.whole_balance:.2f}×",
                  f"busiest over average SM: {found.num_jobs * case.num_heads_kv} row tiles, {found.waves:.2f} waves")
    table.add_row("split", f"{found.split_balance:.2f}×",
                  f"busiest over average SM, as the tile scheduler cuts: {found.split_pieces} pieces of split tiles")
    table.add_row("partials", f"{_megabytes(split.partial_bytes)} MB",
                  f"written and read: {split.partial_bytes / plain.bytes:.1%} of the traffic, "
                  f"{split.partial_bytes / machine.read_gbs / 1e3:.1f} us if all from memory; L2 usually keeps them")
    table.add_row("launch", f"{datasheet.EMPTY_KERNEL_US} us", f"an empty kernel on an H200; two of them {datasheet.TWO_EMPTY_KERNELS_US}")
    console.print(table)


def _parts_table(case: Case, row: Row, document: Results) -> Table:
    table = _plain_table("", "us", "of it", "", title=f"where {row['ours_us']:.1f} us go: {row['backend']}, {document['device']['name']}")
    for part in parts(case, row, document):
        table.add_row(part.name, f"{part.us:.1f}", f"{part.us / row['ours_us']:.0%}", f"[dim]{part.origin}")
    kernels = row.get("kernel_us", {})
    apart = [("its plan", kernels.get("plan_us"), "made before: not in it"),
             ("with its own plan", kernels.get("unplanned_us"), "for comparison"),
             ("host", row["host_us"], "of a call, while the GPU is busy: not in it"),
             ("first call", 1e6 * (row.get("compile_s") or 0), "with its plan and what had to be compiled")]
    for name, time, remark in (*apart, *((peer, time, "for comparison") for peer, time in row["peers_us"].items())):
        if time:
            table.add_row(*(f"[dim]{text}[/]" for text in (name, f"{time:.1f}", f"{time / row['ours_us']:.0%}", remark)))
    return table


def add_arguments(parser: ArgumentParser) -> None:
    """The options of `python -m perf explain`."""
    parser.add_argument("case", nargs="?", help="name of a case of the grid; without it the options below make one")
    parser.add_argument("--batch", type=int, default=128, help="requests (default: %(default)s)")
    parser.add_argument("--len", type=int, default=4096, help="tokens of each (default: %(default)s)")
    parser.add_argument("--lens", type=_lengths, help="lengths one by one: 100,2000,...")
    parser.add_argument("--heads", type=int, default=128, help="query heads (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=1, help="query tokens of each request (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=1, help="KV heads (default: %(default)s)")
    parser.add_argument("--page-size", type=int, default=64, help="tokens of a page (default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(traffic.ITEMSIZE), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--results", metavar="FILE", help="a results file: also says where the measured time goes")


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} must be integers with commas between them") from None


def case_from(args: Namespace) -> Case:
    """The case that the options of `add_arguments` name or describe; raises ValueError for one that cannot be."""
    if args.case:
        return find(args.case)
    seq_lens = args.lens or (args.len,) * args.batch
    counts = {"--batch": len(seq_lens), "--heads": args.heads, "--queries": args.queries, "--kv-heads": args.kv_heads,
              "--page-size": args.page_size}
    for option, count in counts.items():
        if count < 1:
            raise ValueError(f"{option} is {count}, but must be at least 1")
    for length in seq_lens:
        if not 0 <= length < 2**31:
            raise ValueError(f"a request has {length} tokens, but must have from 0 to {2**31 - 1}")
    if args.heads % args.kv_heads:
        raise ValueError(f"--heads is {args.heads}, but must be a multiple of --kv-heads, {args.kv_heads}")
    length = "mixed" if args.lens else args.len
    return Case(f"b{len(seq_lens)}_q{args.queries}_h{args.heads}_k{length}", seq_lens, args.queries, args.heads, args.kv_heads,
                page_size=args.page_size, dtype=args.dtype)
