"""`python -m perf`: measure, compare, plot, explain. perf/README.md says how to read it."""

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mla_numba.contract import BACKENDS
from perf import cases, results
from perf.timer import MIN_SAMPLES

RESULTS = Path(__file__).with_name("results")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 where a result was wrong or something got slower, or 2 for a wrong argument."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments.insert(0, "run")
    try:
        args = _parser().parse_args(arguments)
        return int(COMMANDS[args.command](args, Console()))
    except (ValueError, OSError) as error:
        print(f"perf: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from perf import explain, step

    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure a suite (the default command)")
    run.add_argument("--suite", choices=cases.SUITES, help="default: quick on a GPU, cpu without one")
    run.add_argument("--seed", type=int, default=0, help="of the suite drawn: other shapes, drawn at random (%(default)s)")
    run.add_argument("--case", action="append", metavar="NAME", help="a case, or any shape so named, instead; may be given again")
    run.add_argument("--backend", choices=("auto", *BACKENDS), default="auto")
    run.add_argument("--peers", metavar="A,B", help="peers to measure beside it, folders of other checkouts (with a slash), "
                     "invariant (this one under batch_invariant), or none; default: all peers that can be imported")
    run.add_argument("--samples", type=int, default=MIN_SAMPLES, help="of each contender and case (%(default)s, and no fewer)")
    run.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="begin no case after them")
    run.add_argument("--out", type=Path, metavar="FILE", help="default: perf/results/DEVICE-SUITE-TIME.json")
    run.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the pictures there")
    run.add_argument("--commit", help="what was measured, where the checkout has no git to ask")
    run.add_argument("--list", action="store_true", help="print the cases, and measure nothing")
    compare = commands.add_parser("compare", help="two results files: did it get slower?")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    plot = commands.add_parser("plot", help="pictures of a results file")
    plot.add_argument("file", type=Path)
    plot.add_argument("--out", type=Path, metavar="FOLDER", help="default: beside the file")
    explain.add_arguments(commands.add_parser("explain", help="one case: bytes, FLOPs, floors, where the rest goes"))
    step.add_arguments(commands.add_parser("step", help="what attention takes of a server's step, in a CUDA graph and eager"))
    return parser


def _run(args: argparse.Namespace, console: Console) -> int:
    if args.list:
        _list(args.suite, args.seed, console)
        return 0
    from perf import measure, report

    run = measure.start(args.backend, None if args.peers is None else _names(args.peers), args.samples)
    suite = args.suite or ("quick" if run.on_gpu else "cpu")
    chosen = [cases.find(name) for name in args.case] if args.case else cases.suite(suite, args.seed)
    path = args.out or RESULTS / f"{_device_slug(run)}-{'case' if args.case else suite}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    for name, why in run.absent.items():
        console.print(f"absent: {name}: {why}", style="dim", highlight=False, markup=False)

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))

        def starting(what: str) -> None:
            progress.update(task, description=what)

        def done(what: str) -> None:
            document = results.load(path)
            last = document["rows"][-1] if document["rows"] else None
            text = report.line(last, document) if last is not None and last["case"] == what else what
            progress.console.print(text, highlight=False, soft_wrap=True, markup=False)
            progress.advance(task)

        document, failures = measure.measure(run, chosen, path, time_limit=args.time_limit, commit=args.commit, report=done,
                                             starting=starting)
    if document["rows"]:
        console.print()
        report.print_report(document, console)
    for failure in failures:
        console.print(f"no row: {failure}", style="bold red", highlight=False, markup=False)
    console.print(f"{len(document['rows'])} rows in {document['device']['seconds']:.0f} s: {path}", highlight=False)
    if args.plots is not None and document["rows"]:
        _draw(document, args.plots, path.stem, console)
    return 1 if any("not begun" not in failure for failure in failures) else 0


def _device_slug(run: object) -> str:
    from perf import machine

    device = machine.describe_gpu() if run.on_gpu else machine.describe_cpu()
    return re.sub(r"[^a-z0-9]+", "-", device["name"].lower().removeprefix("nvidia ")).strip("-")


def _list(suite: str | None, seed: int, console: Console) -> None:
    for name in (suite,) if suite else cases.SUITES:
        chosen = cases.suite(name, seed)
        console.print(f"[bold]{name}[/]: {len(chosen)} cases", highlight=False)
        if suite:
            for case in chosen:
                console.print(f"  {case.name:32} {sum(case.seq_lens):>9,} tokens", highlight=False)


def _compare(args: argparse.Namespace, console: Console) -> int:
    from perf import compare

    verdict = compare.print_comparison(results.load(args.before), results.load(args.after), console)
    return 1 if verdict == "slower" else 0


def _plot(args: argparse.Namespace, console: Console) -> int:
    _draw(results.load(args.file), args.out or args.file.parent, args.file.stem, console)
    return 0


def _draw(document: results.Results, folder: Path, stem: str, console: Console) -> None:
    from perf import plots

    for picture in plots.plot_all(document, folder, stem):
        console.print(f"picture: {picture}", highlight=False)


def _names(peers: str) -> list[str]:
    """Of `--peers`."""
    return [name for name in peers.split(",") if name != "none"]


def _step(args: argparse.Namespace, console: Console) -> int:
    from perf import step

    return step.measure_steps(args.case or step.CASES, _names(args.peers), console)


def _explain(args: argparse.Namespace, console: Console) -> int:
    from perf import explain

    explain.explain(explain.case_from(args), console, results.load(args.results) if args.results else None)
    return 0


COMMANDS = {"run": _run, "compare": _compare, "plot": _plot, "explain": _explain, "step": _step}


if __name__ == "__main__":
    sys.exit(main())
