"""Pictures of a results file, without a display: roofline, bandwidth over length, TFLOPS over heads x queries.

Colours are Okabe and Ito's, told apart by the colour-blind; each contender has its own marker too, and its name at the end of its points.
"""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from perf import datasheet, traffic
from perf.results import Results, Row, limits

STYLE = {"hopper": ("#D55E00", "o"), "simt": ("#000000", "o"), "cpu": ("#000000", "o"), "flashmla": ("#0072B2", "s"),
         "fa3": ("#009E73", "^"), "triton": ("#E69F00", "D"), "flashinfer": ("#CC79A7", "v"), "sdpa": ("#56B4E9", "P"),
         "numpy": ("#0072B2", "s")}
OTHER_STYLE = ("#777777", "X")
OURS = ("hopper", "simt", "cpu")
GREY, LIGHT = "#666666", "#DDDDDD"
RC = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": "#333333",
      "xtick.color": GREY, "ytick.color": GREY, "axes.titlesize": 11, "axes.titlelocation": "left", "figure.dpi": 150}
MAX_PANELS = 4
MAX_TICKS = 9
LABEL_GAP_POINTS = 13

# (contender, row, its microseconds)
Point = tuple[str, Row, float]


def _points(rows: Iterable[Row]) -> list[Point]:
    points = []
    for row in rows:
        points.append((row["backend"], row, row["ours_us"]))
        points += [(peer, row, time) for peer, time in row["peers_us"].items() if time]
    return points


def _tflops(row: Row, us: float) -> float:
    return row["tflops"] * row["ours_us"] / us


def _gbs(row: Row, us: float) -> float:
    return row["gbs"] * row["ours_us"] / us


def _intensity(row: Row) -> float:
    return row["tflops"] * 1e3 / row["gbs"]


def _name(contender: str) -> str:
    return f"mla_numba {contender}" if contender in OURS else contender


def _by_contender(points: list[Point]) -> dict[str, list[Point]]:
    """Ours last, to be drawn on top."""
    series: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        series[point[0]].append(point)
    return dict(sorted(series.items(), key=lambda item: (item[0] in OURS, item[0])))


def _draw(axes: Axes, contender: str, x: list[float], y: list[float], line: bool) -> None:
    colour, marker = STYLE.get(contender, OTHER_STYLE)
    axes.plot(x, y, marker=marker, color=colour, markersize=6 if contender in OURS else 5, linewidth=1.5 if line else 0,
              markeredgecolor="white", markeredgewidth=0.6, alpha=0.9, zorder=4 if contender in OURS else 3, clip_on=False)


def _label_ends(axes: Axes, ends: dict[str, float]) -> None:
    """Names at the right edge, at the height of where each series ends, moved apart until they are readable."""
    low, high = (axes.transData.transform((1, value))[1] for value in axes.get_ylim())
    gap = LABEL_GAP_POINTS * axes.figure.dpi / 72
    heights = {name: min(max(axes.transData.transform((1, value))[1], low), high) for name, value in ends.items()}
    names = sorted(heights, key=heights.__getitem__)
    for _ in range(100):
        for below, above in itertools.pairwise(names):
            overlap = gap - (heights[above] - heights[below])
            if overlap > 0:
                heights[below] -= overlap / 2
                heights[above] += overlap / 2
    for name in names:
        colour, marker = STYLE.get(name, OTHER_STYLE)
        y = (heights[name] - low) / (high - low)
        axes.plot([1.03], [y], marker=marker, color=colour, markersize=5, transform=axes.transAxes, clip_on=False)
        axes.annotate(_name(name), (1.03, y), xytext=(7, 0), textcoords="offset points", xycoords="axes fraction", va="center",
                      color=colour, weight="bold" if name in OURS else "normal", fontsize=9)


def _plain_ticks(axis: Any, values: Iterable[float]) -> None:
    """Ticks at `values`, or at the powers of two between them where they are many; written as numbers and not as powers."""
    ticks = sorted(values)
    if len(ticks) > MAX_TICKS and axis.axis_name == "x":
        ticks = [2**power for power in range(32) if ticks[0] <= 2**power <= ticks[-1]]
    axis.set_major_locator(plt.FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(round(value)) if value >= 1 else f"{value:g}"))


def _short(count: int) -> str:
    return f"{count // 1024}k" if count and count % 1024 == 0 else str(count)


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... from `low` to `high`."""
    ticks = [step * 10.0**power for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
             for step in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def _subtitle(document: Results) -> str:
    return f"{document['device']['name']} · cold caches, medians · {document['date'][:10]} · {(document['commit'] or 'unknown')[:10]}"


def _finish(figure: Figure, document: Results, title: str, path: str | Path) -> Path:
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
    figure.text(0.01, 0.005, _subtitle(document), fontsize=8, color=GREY, va="bottom")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return path


def roofline(document: Results, path: str | Path) -> Path:
    """TFLOPS over FLOPs per byte, log-log: measured ceilings as a line, the datasheet's thin beside it, every row as a marker."""
    points = _points(document["rows"])
    unit, scale = _unit(points)
    read_gbs, peak = limits(document)
    sheet = datasheet.datasheet_of(document["device"]["name"])
    roofs = [(read_gbs, peak * scale, dict(linewidth=1.8))] if read_gbs and peak else []
    roofs += [(sheet.read_gbs, sheet.tflops * scale, dict(linewidth=0.8, linestyle=(0, (4, 3))))] if sheet else []
    x = [_intensity(row) for _, row, _ in points]
    y = [_tflops(row, us) * scale for _, row, us in points]
    ridges = [top / (gbs * scale / 1e3) for gbs, top, _ in roofs]
    left, right = min(x + ridges) / 1.8, max(x + ridges) * 1.8
    bottom = min(y + [left * gbs * scale / 1e3 for gbs, _, _ in roofs]) / 1.3
    top = max(y + [top for _, top, _ in roofs]) * 1.8
    with plt.rc_context(RC):
        figure, axes = plt.subplots(figsize=(9.3, 5.6))
        figure.subplots_adjust(left=0.085, right=0.8, top=0.9, bottom=0.13)
        axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte of compulsory traffic", ylabel=unit)
        _plain_ticks(axes.xaxis, _decades(left, right))
        _plain_ticks(axes.yaxis, _decades(bottom, top))
        axes.set(xlim=(left, right), ylim=(bottom, top))
        axes.grid(color=LIGHT, linewidth=0.6, zorder=0)
        for ridge, (gbs, height, line) in zip(ridges, roofs, strict=True):
            axes.plot([left, ridge, right], [left * gbs * scale / 1e3, height, height], color=GREY, zorder=2, **line)
        if read_gbs and peak:
            # Above the upper of the lines: below them lie the points.
            beside = (f", {sheet.read_gbs:.0f} datasheet", f", {sheet.tflops:.0f} datasheet") if sheet else ("", "")
            _slope_label(axes, left * 1.1, max(gbs for gbs, _, _ in roofs) * scale / 1e3, f"{read_gbs:.0f} GB/s measured{beside[0]}")
            axes.annotate(f"{peak * scale:.3g} {unit} measured{beside[1]}", (right, max(height for _, height, _ in roofs)), xytext=(-2, 4),
                          textcoords="offset points", ha="right", fontsize=8, color=GREY)
        ends = {}
        for contender, group in _by_contender(points).items():
            heights = [_tflops(row, us) * scale for _, row, us in group]
            _draw(axes, contender, [_intensity(row) for _, row, _ in group], heights, line=False)
            ends[contender] = max(heights)
        _label_ends(axes, ends)
        return _finish(figure, document, "MLA decode against the roofline", path)


def _unit(points: list[Point]) -> tuple[str, float]:
    """What rates are written in, and how many of it are a TFLOPS: a CPU's are GFLOPS."""
    return ("TFLOPS", 1.0) if max(_tflops(row, us) for _, row, us in points) >= 1 else ("GFLOPS", 1e3)


def _slope_label(axes: Axes, x: float, slope: float, text: str) -> None:
    """Along the line y = slope x, from where `x` or the bottom of the picture is."""
    x = max(x, axes.get_ylim()[0] * 1.2 / slope)
    (x0, y0), (x1, y1) = axes.transData.transform([(x, slope * x), (2 * x, 2 * slope * x)])
    axes.annotate(text, (x, slope * x), xytext=(-3, 5), textcoords="offset points", fontsize=8, color=GREY,
                  rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)), rotation_mode="anchor")


def _groups(rows: list[Row], x: Callable[[Row], float], same: Callable[[Row], tuple[Any, ...]],
            order: Callable[[list[Row]], Any], variety: Callable[[Row], Any]) -> list[list[Row]]:
    """Rows that differ in `x` alone, at least three of them: the `MAX_PANELS` groups that come first in `order`, each of another `variety`
    as long as there are more."""
    groups: dict[tuple[Any, ...], dict[float, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: (x(row), row["seq_len_q"])):
        groups[(row["backend"], *same(row))].setdefault(x(row), row)
    lists = [list(group.values()) for group in groups.values() if len(group) >= 3]
    lists.sort(key=order)
    kinds = [variety(group[0]) for group in lists]
    repeats = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
    return [lists[i] for i in sorted(range(len(lists)), key=repeats.__getitem__)[:MAX_PANELS]]


def _requests(row: Row) -> str:
    return f"{row['batch']} request{'s' if row['batch'] > 1 else ''}"


def _same(row: Row, *names: str) -> tuple[Any, ...]:
    """The keys `names` of a row, and how its lengths differ: deviation over mean, coarsely, so that draws of one distribution are alike."""
    return (*(row[name] for name in names), round(4 * statistics.pstdev(row["seq_lens"]) / max(row["seq_len_k_mean"], 1)))


def _panels(document: Results, groups: list[list[Row]], *, x: Callable[[Row], float], y: Callable[[Row, float], float],
            limit: Callable[[Row], float] | None, labels: tuple[str, str], title: str, panel_title: Callable[[Row], str],
            path: str | Path, decorate: Callable[[Axes], None] = lambda axes: None) -> Path:
    """One panel for each group of rows, with the same scale, a line for each contender, and the limit above them."""
    columns = min(len(groups), 2)
    lines = math.ceil(len(groups) / columns)
    with plt.rc_context(RC):
        figure, grid = plt.subplots(lines, columns, figsize=(1.7 + 5.2 * columns, 1.1 + 3.4 * lines), squeeze=False)
        width, height = figure.get_size_inches()
        figure.subplots_adjust(left=0.75 / width, right=1 - 1.75 / width, top=1 - 0.85 / height, bottom=0.75 / height, wspace=0.7,
                               hspace=0.42)
        for axes, rows in zip(grid.flat, groups, strict=False):
            points = _points(rows)
            values = sorted({x(row) for row in rows})
            heights = [y(row, us) for _, row, us in points] + [limit(row) for row in rows if limit]
            axes.set(xscale="log", xlim=(values[0] / 1.15, values[-1] * 1.15), ylim=(0, max(heights) * 1.12))
            decorate(axes)
            if limit:
                axes.plot(values, [limit(next(row for row in rows if x(row) == value)) for value in values], color=GREY, linewidth=1.2)
                axes.annotate("measured limit", (values[-1], limit(rows[-1])), xytext=(0, 4), textcoords="offset points", fontsize=8,
                              color=GREY, ha="right")
            ends = {}
            for contender, group in _by_contender(points).items():
                _draw(axes, contender, [x(row) for _, row, _ in group], [y(row, us) for _, row, us in group], line=True)
                ends[contender] = y(group[-1][1], group[-1][2])
            _plain_ticks(axes.xaxis, values)
            axes.grid(axis="y", color=LIGHT, linewidth=0.6, zorder=0)
            axes.set_title(panel_title(rows[0]))
            axes.set(xlabel=labels[0], ylabel=labels[1])
            _label_ends(axes, ends)
        for axes in list(grid.flat)[len(groups):]:
            axes.set_visible(False)
        return _finish(figure, document, title, path)


def bandwidth(document: Results, path: str | Path) -> Path | None:
    """GB/s over the requests' length, memory-bound shapes first; None if no shape was measured at three lengths."""
    read_gbs, peak = limits(document)
    limit = (lambda row: min(read_gbs, peak * 1e3 / _intensity(row))) if read_gbs and peak else None
    groups = _groups(document["rows"], lambda row: row["seq_len_k_mean"],
                     lambda row: _same(row, "batch", "seq_len_q", "num_heads_q", "causal", "page_size", "dtype"),
                     lambda rows: (sum(row["bound"] == "compute" for row in rows) / len(rows), -len(rows), -rows[0]["batch"]),
                     lambda row: (row["num_heads_q"], row["seq_len_q"]))
    if not groups:
        return None
    return _panels(document, groups, x=lambda row: row["seq_len_k_mean"], y=_gbs, limit=limit,
                   labels=("tokens per request", "GB/s"), title="Bandwidth over length",
                   panel_title=lambda row: f"{_requests(row)}, {row['num_heads_q']} heads"
                                           + (f" × {row['seq_len_q']} queries" if row["seq_len_q"] > 1 else "") + f", {row['dtype']}",
                   path=path)


def tflops(document: Results, path: str | Path) -> Path | None:
    """TFLOPS over heads x queries, the rows that share a KV token; None if no batch was measured at three of them."""
    read_gbs, peak = limits(document)
    unit, scale = _unit(_points(document["rows"]))
    limit = (lambda row: min(_intensity(row) * read_gbs / 1e3, peak) * scale) if read_gbs and peak else None
    groups = _groups(document["rows"], lambda row: row["num_heads_q"] * row["seq_len_q"],
                     # Means that differ by a token are one: a length has room for its queries.
                     lambda row: (*_same(row, "batch", "page_size", "dtype"), round(math.log2(max(row["seq_len_k_mean"], 1)), 1)),
                     lambda rows: (-len(rows), -rows[0]["batch"], rows[0]["seq_len_k_mean"]), lambda row: None)
    if not groups:
        return None

    def tile_edges(axes: Axes) -> None:
        low, high = axes.get_xlim()
        for edge in range(traffic.ROWS_PER_TILE, int(high) + 1, traffic.ROWS_PER_TILE):
            if edge >= low:
                axes.axvline(edge, color=LIGHT, linewidth=0.8, zorder=0)

    return _panels(document, groups, x=lambda row: row["num_heads_q"] * row["seq_len_q"],
                   y=lambda row, us: _tflops(row, us) * scale, limit=limit,
                   labels=("heads × queries (grey: full tiles of 64 rows)", unit), title=f"{unit} over heads × queries",
                   panel_title=lambda row: f"{_requests(row)} × {_short(round(row['seq_len_k_mean']))} tokens"
                                           + (" (mean)" if row["varlen"] else "") + f", {row['dtype']}",
                   path=path, decorate=tile_edges)


def plot_all(document: Results, folder: str | Path, stem: str) -> list[Path]:
    """Every picture that the rows are enough for: folder/stem-roofline.png, -bandwidth.png, -tflops.png."""
    if not document["rows"]:
        raise ValueError("the results file has no rows to plot")
    pictures = [function(document, Path(folder) / f"{stem}-{function.__name__}.png") for function in (roofline, bandwidth, tflops)]
    return [path for path in pictures if path]
