"""What a run prints: a table that fits a terminal, and one line per row that carries its own verdict."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from perf import datasheet, traffic
from perf.results import Results, Row, limits

SHORT_DTYPE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def shape_of(row: Row) -> str:
    """b=128 sq=1 h=128 len=~4096 bf16 p64; ~ says that the lengths differ."""
    length = f"~{row['seq_len_k_mean']:.0f}" if row["varlen"] else f"{row['seq_len_k_mean']:.0f}"
    mask = "" if row["causal"] or row["seq_len_q"] == 1 else " full"
    dtype = SHORT_DTYPE[row["dtype"]]
    return f"b={row['batch']} sq={row['seq_len_q']} h={row['num_heads_q']} len={length}{mask} {dtype} p{row['page_size']}"


def _figures(value: float) -> str:
    """Whole from 100 on, three significant figures below."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _of_ceiling(value: float, ceiling: float | None) -> str:
    return f" {value / ceiling:.0%} of {_figures(ceiling)}" if ceiling else ""


def line(row: Row, document: Results) -> str:
    """One row as one line: shape, time, both rates as fractions of the measured ceilings, which of them binds, the peers.

    Greppable, and complete: what it says needs no other line.
    """
    read_gbs, tflops = limits(document)
    ridge = f", ridge {traffic.ridge(read_gbs, tflops):.0f}" if read_gbs and tflops else ""
    parts = [f"dense {shape_of(row)} {row['backend']}",
             f"{row['ours_us']:.1f} us (p10 {row['ours_us_p10']:.1f}, p90 {row['ours_us_p90']:.1f})",
             f"{_figures(row['gbs'])} GB/s{_of_ceiling(row['gbs'], read_gbs)}",
             f"{_figures(row['tflops'])} TFLOPS{_of_ceiling(row['tflops'], tflops)}",
             f"AI {row['tflops'] * 1e3 / row['gbs']:.0f}{ridge}: {row['bound']}-bound, {row['sol']:.0%} of the limit"]
    parts += [f"{time / row['ours_us']:.2f}x {peer}" for peer, time in row["peers_us"].items() if time]
    if row["rel_err"] is not None:
        parts.append(f"err {row['rel_err']:.1e}")
    return " | ".join([*parts, "cold L2"])


def table(document: Results) -> Table:
    """All rows. What all of them share (a page size, a dtype) is said once, in the title."""
    rows = document["rows"]
    peers = sorted({peer for row in rows for peer, time in row["peers_us"].items() if time})
    columns: dict[str, Callable[[Row], str]] = {
        "b": lambda row: str(row["batch"]), "sq": lambda row: str(row["seq_len_q"]), "h": lambda row: str(row["num_heads_q"]),
        "length": lambda row: f"{'~' if row['varlen'] else ''}{row['seq_len_k_mean']:.0f}", "page": lambda row: str(row["page_size"]),
        "type": lambda row: SHORT_DTYPE[row["dtype"]], "mask": lambda row: "causal" if row["causal"] else "full",
        "backend": lambda row: row["backend"],
    }
    shared = {name: text(rows[0]) for name, text in columns.items() if len({text(row) for row in rows}) == 1 and name != "length"}
    result = Table(box=None, pad_edge=False, header_style="bold", title_justify="left", title_style="bold",
                   title=f"{document['device']['name']}   " + "  ".join(f"{name} {text}" for name, text in shared.items()))
    columns = {name: text for name, text in columns.items() if name not in shared}
    for name in (*columns, "us", "±", "GB/s", "TFLOPS", "of limit", *peers):
        result.add_column(name, justify="left" if name in ("type", "mask", "backend") else "right", no_wrap=True)
    for row in rows:
        spread = (row["ours_us_p90"] - row["ours_us_p10"]) / 2 / row["ours_us"]
        result.add_row(*(text(row) for text in columns.values()), f"{row['ours_us']:.1f}", f"{spread:.1%}", _figures(row["gbs"]),
                       _figures(row["tflops"]), f"{row['sol']:.0%} {row['bound'][:3]}",
                       *(_peer_cell(row["peers_us"].get(peer), row["ours_us"], with_time=len(peers) <= 2) for peer in peers))
    return result


def _peer_cell(time: float | None, ours_us: float, with_time: bool) -> str:
    if not time:
        return "-"
    ratio = f"[{'green' if time > ours_us else 'red'}]{time / ours_us:.2f}x[/]"
    return f"{time:.1f} {ratio}" if with_time else ratio


def legend(document: Results) -> list[str]:
    """What the columns mean, and against which ceilings."""
    ceilings, sheet = document["ceilings"], datasheet.datasheet_of(document["device"]["name"])
    measured = ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in ceilings.items() if value)
    backends = ", ".join(sorted({row["backend"] for row in document["rows"]})) or "none"
    lines = [f"{document['date']}, commit {(document['commit'] or 'unknown')[:12]}; ours: {backends}",
             "us: median of decode and merge, cold L2, planned before; ±: half of p10 to p90; ~: lengths differ, mean.",
             "of limit: floor of the binding ceiling (memory, compute) / us. Peers: how many times as long as ours they take.",
             f"ceilings measured in the same run: {measured or 'none'}"]
    if sheet:
        lines.append(f"datasheet of {sheet.name}: read gbs {sheet.read_gbs:.6g}, bf16 matmul tflops {sheet.tflops:.6g}")
    if any(row["sol"] > 1 for row in document["rows"]):
        lines.append("over 100% of a limit: the machine was slower while its ceilings were measured, so they are too low")
    return lines


def print_report(document: Results, console: Console) -> None:
    if document["rows"]:
        console.print(table(document))
    for text in legend(document):
        console.print(text, style="dim", highlight=False, markup=False)
