"""The emulator at work: explore pairs of a case and a schedule, replay one, let the mutants loose, draw a run."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from verify.cases import MLACase

from .mutants import MUTANTS
from .pairs import PairFailure, Schedule, check, pairs
from .timeline import draw, record

PROFILES = {"quick": 200, "default": 1000, "deep": 5000}
TIMELINE = MLACase(seq_lens=(64 * 11 - 20,), num_heads_q=64)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m verify.emulator", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    explore = commands.add_parser("explore", help="draw pairs of a case and a schedule, and run them")
    explore.add_argument("--profile", choices=PROFILES, default="default", help=f"how many: {PROFILES} (default: %(default)s)")
    explore.add_argument("--seed", type=int, default=0, help="of the drawing (default: %(default)s)")
    replay = commands.add_parser("replay", help="run one pair, as a failure prints it")
    replay.add_argument("case", help="'MLACase(seq_lens=(65,), ...)'")
    replay.add_argument("--seed", type=int, default=0, help="of the machine (default: %(default)s)")
    replay.add_argument("--num-sms", type=int, default=2, help="the work is cut for so many (default: %(default)s)")
    replay.add_argument("--share-parts", type=int, help="pieces of a merge's block, at most (default: as the backend has it)")
    replay.add_argument("--small-tiles", action="store_true", help="jobs of 16 rows, however many a request has")
    mutants = commands.add_parser("mutants", help="is every planted bug found?")
    mutants.add_argument("--name", help="only those with this in their name")
    timeline = commands.add_parser("timeline", help="draw a thread block's run")
    timeline.add_argument("--case", default=str(TIMELINE), help="what it decodes (default: %(default)s)")
    timeline.add_argument("--cycles", type=float, nargs=2, metavar=("FIRST", "LAST"), help="the part to show (default: all)")
    timeline.add_argument("--out", type=Path, default=Path("timeline.png"), help="PNG or SVG (default: %(default)s)")
    return parser.parse_args(arguments)


def explore(options: argparse.Namespace, console: Console) -> int:
    """1 if a pair fails; it is printed, not shrunk."""
    count = PROFILES[options.profile]
    begin, refused, worst = time.perf_counter(), 0, 0.0
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console,
                  transient=True) as progress:
        bar = progress.add_task("pairs", total=count)

        @hypothesis.seed(options.seed)
        @hypothesis.settings(max_examples=count, phases=(Phase.generate,), database=None, deadline=None,
                             suppress_health_check=tuple(HealthCheck))
        @hypothesis.given(pairs())
        def run(pair: tuple[MLACase, Schedule]) -> None:
            nonlocal refused, worst
            try:
                worst = max(worst, check(*pair))
            except NotImplementedError:
                refused += 1
                hypothesis.reject()
            progress.advance(bar)

        try:
            run()
        except PairFailure as failure:
            console.print(f"FAILED {failure}", style="red", markup=False, highlight=False, soft_wrap=True)
            return 1
    console.print(f"{count} pairs ran clean, {refused} refused, worst error / bound {worst:.3f}, {time.perf_counter() - begin:.0f} s",
                  highlight=False)
    return 0


def replay(options: argparse.Namespace, console: Console) -> int:
    try:
        worst = check(MLACase.parse(options.case), Schedule(options.seed, options.num_sms, options.share_parts, options.small_tiles))
    except PairFailure as failure:
        console.print(str(failure), style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    console.print(f"clean; worst error / bound {worst:.3f}", highlight=False)
    return 0


def mutants(options: argparse.Namespace, console: Console) -> int:
    """1 if one is missed."""
    table = Table("mutant", "found as", "pairs", "s", box=None, pad_edge=False)
    kinds: Counter[str] = Counter()
    for mutant in MUTANTS:
        if options.name and options.name not in mutant.name:
            continue
        begin = time.perf_counter()
        kind, message, runs = mutant.run()
        kinds[kind or "missed"] += 1
        table.add_row(mutant.name, kind or "[red]missed[/]", str(runs), f"{time.perf_counter() - begin:.1f}")
        if options.name:
            console.print(message, markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    console.print(", ".join(f"{count} {kind}" for kind, count in kinds.most_common()), highlight=False)
    return int(kinds["missed"] > 0)


def timeline(options: argparse.Namespace, console: Console) -> int:
    timing = record(MLACase.parse(options.case))
    draw(timing, options.out, *(options.cycles or ()))
    console.print(f"{options.out}: {max(span.end for span in timing.spans):.0f} cycles of the model", highlight=False)
    return 0


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        command = {"explore": explore, "replay": replay, "mutants": mutants, "timeline": timeline}[options.command]
        return command(options, console)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
