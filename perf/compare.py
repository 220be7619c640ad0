"""Did it get slower? Two results files, matched row by row, with a verdict that knows the noise.

A row's noise is the spread of its samples: half of p10 to p90, of both runs together (the root of the sum of squares), relative to the
medians. A row is slower or faster when its medians are further apart than that and than `LEAST`. That is 1.8 standard
deviations of a sample, but 4.6 of the difference of two medians of 20, so it also covers clocks that drift between two runs.

The verdict on the whole is about the median of the ratios. Its noise is the larger of what the rows' spreads imply and of what the scatter
of the ratios implies: rows that disagree prove nothing together. Medians for both, because one row that moved by half must not hide
that the others moved by 5% (it did, with means: perf/results/h200_quick_slow.json).
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from perf.results import Results, Row, limits

# No difference below this counts, however quiet the samples.
LEAST = 0.01
# Standard errors that the median of scattered ratios must be away from 1.
SCATTER_ERRORS = 2.0
# Of normal values: standard error of the median over that of the mean; standard deviation over median absolute deviation.
MEDIAN_ERROR, DEVIATION_OF_MAD = 1.2533, 1.4826

SHAPE_KEYS = ("kernel", "batch", "seq_len_q", "num_heads_q", "seq_len_k_mean", "varlen", "causal", "page_size", "dtype")
VERDICT_STYLE = {"slower": "bold red", "faster": "bold green", "no change": "dim"}


@dataclass(frozen=True)
class Change:
    """A ratio of times, second over first, and the relative difference from which it counts."""

    ratio: float
    noise: float

    @property
    def verdict(self) -> str:
        change = math.log(self.ratio)
        if abs(change) <= math.log1p(max(self.noise, LEAST)):
            return "no change"
        return "slower" if change > 0 else "faster"


@dataclass(frozen=True)
class Comparison:
    """`rows` are (row of the first file, row of the second, change); `peers` are controls, whose code is the same in both runs."""

    rows: list[tuple[Row, Row, Change]]
    overall: Change
    peers: dict[str, Change]
    only_first: list[Row]
    only_second: list[Row]

    @property
    def verdict(self) -> str:
        return self.overall.verdict


def row_key(row: Row) -> tuple[object, ...]:
    """What two rows that measure the same thing have in common; the name of the case says what the shape does not (workers)."""
    return (*(row[name] for name in SHAPE_KEYS), tuple(row["seq_lens"]), row["case"], row["backend"])


def _change(first: tuple[float, float, float], second: tuple[float, float, float]) -> Change:
    """From (median, p10, p90) of both."""
    spreads = [(p90 - p10) / 2 / median for median, p10, p90 in (first, second)]
    return Change(second[0] / first[0], math.hypot(*spreads))


def overall(changes: Sequence[Change]) -> Change:
    """The median of the ratios, and its noise."""
    logs = [math.log(change.ratio) for change in changes]
    middle = statistics.median(logs)
    error = MEDIAN_ERROR / math.sqrt(len(logs))
    from_spread = error * statistics.median(change.noise for change in changes)
    from_scatter = SCATTER_ERRORS * error * DEVIATION_OF_MAD * statistics.median(abs(log - middle) for log in logs)
    return Change(math.exp(middle), max(from_spread, from_scatter))


def _indexed(document: Results) -> dict[tuple[object, ...], Row]:
    """By what is measured; rows that measure the same are told apart by their order."""
    seen: Counter[tuple[object, ...]] = Counter()
    rows = {}
    for row in document["rows"]:
        key = row_key(row)
        rows[(*key, seen[key])] = row
        seen[key] += 1
    return rows


def _peer_times(row: Row, peer: str) -> tuple[float, float, float] | None:
    times = [row.get(name, {}).get(peer) for name in ("peers_us", "peers_us_p10", "peers_us_p90")]
    return None if None in times else tuple(times)


def compare(first: Results, second: Results) -> Comparison:
    """Match the rows of two results; raises ValueError if none has a match."""
    rows_a, rows_b = _indexed(first), _indexed(second)
    pairs = [(rows_a[key], rows_b[key]) for key in rows_a if key in rows_b]
    if not pairs:
        raise ValueError("the two files have no row in common: a row matches by its case, its shape and its backend")
    ours = ("ours_us", "ours_us_p10", "ours_us_p90")
    rows = [(a, b, _change(tuple(a[name] for name in ours), tuple(b[name] for name in ours))) for a, b in pairs]
    peers = {}
    for peer in sorted({peer for a, _ in pairs for peer in a["peers_us"]}):
        times = [(_peer_times(a, peer), _peer_times(b, peer)) for a, b in pairs]
        changes = [_change(a, b) for a, b in times if a and b]
        if changes:
            peers[peer] = overall(changes)
    return Comparison(rows, overall([change for _, _, change in rows]), peers, [rows_a[key] for key in rows_a if key not in rows_b],
                      [rows_b[key] for key in rows_b if key not in rows_a])


def print_comparison(first: Results, second: Results, console: Console) -> str:
    """Print the table and the verdict; returns the verdict."""
    result = compare(first, second)
    table = Table("case", "backend", "before us", "after us", "ratio", "noise", "verdict", box=None, pad_edge=False)
    for name in table.columns[2:6]:
        name.justify = "right"
    for a, b, change in result.rows:
        table.add_row(a["case"], a["backend"], f"{a['ours_us']:.1f}", f"{b['ours_us']:.1f}", f"{change.ratio:.3f}",
                      f"±{max(change.noise, LEAST):.1%}", f"[{VERDICT_STYLE[change.verdict]}]{change.verdict}")
    console.print(table)
    for line in _remarks(first, second, result):
        console.print(line)
    counts = Counter(change.verdict for _, _, change in result.rows)
    counted = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICT_STYLE if counts[verdict])
    console.print(f"[{VERDICT_STYLE[result.verdict]}]{result.verdict}[/]: median ratio {result.overall.ratio:.3f} "
                  f"±{max(result.overall.noise, LEAST):.1%} over {len(result.rows)} rows ({counted})")
    return result.verdict


def _remarks(first: Results, second: Results, result: Comparison) -> list[str]:
    """What else must be known to believe the verdict."""
    lines = []
    names = [document["device"]["name"] for document in (first, second)]
    if names[0] != names[1]:
        lines.append(f"[bold]different devices: {names[0]}, then {names[1]}[/]")
    both = zip(("GB/s", "TFLOPS"), limits(first), limits(second), strict=True)
    ceilings = [f"{name} {before:.4g} -> {after:.4g}" for name, before, after in both if before and after]
    if ceilings:
        lines.append("ceilings, before and after: " + ", ".join(ceilings))
    for peer, change in result.peers.items():
        moved = "" if change.verdict == "no change" else ": the machine, or the peer's version, changed too"
        lines.append(f"control {peer}: {change.ratio:.3f} ±{max(change.noise, LEAST):.1%}, {change.verdict}{moved}")
    if result.only_first or result.only_second:
        lines.append(f"without a match: {len(result.only_first)} rows of the first file, {len(result.only_second)} of the second")
    return lines
