"""The property suite outside pytest: against our backends, or against any decode that has the signature in verify/targets.py."""

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from verify import runner
from verify.cases import MLACase
from verify.properties import PROPERTIES, Property
from verify.strategies import DIMS
from verify.targets import ARRAY_KINDS, Target, emulated, external, ours, simulator


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m verify", description=__doc__)
    parser.add_argument("--backend", action="append", metavar="NAME", help="a backend of ours (default: all that run here); repeatable")
    parser.add_argument("--emulated", action="store_true", help="the Hopper kernels in the emulator (docs/emulator.md); needs no GPU")
    parser.add_argument("--target", action="append", metavar="PKG.MODULE:CALLABLE", help="another implementation; repeatable")
    parser.add_argument("--profile", choices=runner.PROFILES, default="default", help="how many cases (default: %(default)s)")
    parser.add_argument("--property", action="append", metavar="NAME", help=f"one of {', '.join(PROPERTIES)}; repeatable")
    parser.add_argument("--dims", action="append", choices=DIMS, help="sizes to draw from (default: what suits the target); repeatable")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that share the properties (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing of cases (default: %(default)s)")
    parser.add_argument("--replay", metavar="CASE", help="run one case, as printed: 'MLACase(seq_lens=(65,), ...)'")
    parser.add_argument("--arrays", choices=ARRAY_KINDS, help="what the target is given (default: numpy; numba for ours on a GPU)")
    parser.add_argument("--empty-lse", choices=("+inf", "-inf"), default="+inf", help="lse of a row that sees nothing, of --target")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    return parser.parse_args(arguments)


def find_targets(options: argparse.Namespace, console: Console) -> list[Target]:
    """What was asked for; without a word, every backend of ours that runs here."""
    targets = [external(path, arrays=options.arrays or "numpy", empty_lse=math.inf if options.empty_lse == "+inf" else -math.inf)
               for path in options.target or ()]
    if options.emulated:
        targets.append(emulated(options.seed))
    if options.backend or not targets:
        from mla_numba.contract import BACKENDS
        from mla_numba.dispatch import unavailable

        for name in options.backend or BACKENDS:
            reasons = unavailable(name)
            if not reasons:
                targets.append(ours(name, arrays=options.arrays))
            elif options.backend:
                raise ValueError(f"--backend {name} cannot run here: {', '.join(reasons)}")
            else:
                console.print(f"{name}: not here: {', '.join(reasons)}", style="dim", markup=False, highlight=False)
    return targets


# A row of the table to be: target, dims, property, examples.
Row = tuple[Target, str, Property, int]
# Of a process among several: its own targets.
_targets: list[Target] = []


def _begin_process(options: argparse.Namespace) -> None:
    _targets[:] = find_targets(options, Console(quiet=True))


def _run_apart(options: argparse.Namespace, target: int, dims: str, prop: str, examples: int) -> runner.Result:
    return runner.run_property(_targets[target], PROPERTIES[prop], dims, examples=examples, seed=options.seed,
                               shrink_s=runner.PROFILES[options.profile].shrink_s)


def _in_processes(options: argparse.Namespace, targets: Sequence[Target], plan: Sequence[Row]) -> Iterator[tuple[int, runner.Result]]:
    """(number of the row, result), as rows are done."""
    # A thread each, as together they have the machine's cores: said in the environment that they are born into, and not in this process.
    threads = {f"{library}_NUM_THREADS": os.environ.get(f"{library}_NUM_THREADS", "1") for library in ("OMP", "OPENBLAS", "NUMBA")}
    with (mock.patch.dict(os.environ, threads),
          ProcessPoolExecutor(options.jobs, get_context("spawn"), _begin_process, (options,)) as pool):
        futures = {pool.submit(_run_apart, options, targets.index(target), dims, prop.name, examples): number
                   for number, (target, dims, prop, examples) in enumerate(plan)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def run_suite(options: argparse.Namespace, targets: Sequence[Target], console: Console) -> list[runner.Result]:
    """Every property against every target, with a progress bar."""
    plan = list(runner.plan_runs(targets, runner.select(options.property), options.dims, runner.PROFILES[options.profile]))
    results: dict[int, runner.Result] = {}
    columns = (TextColumn("{task.description}", table_column=None), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=sum(examples for *_, examples in plan))
        done = 0

        def in_turn() -> Iterator[tuple[int, runner.Result]]:
            for number, (target, dims, prop, examples) in enumerate(plan):
                progress.update(bar, description=f"{target.name} {dims} {prop.name}")
                yield number, runner.run_property(target, prop, dims, examples=examples, seed=options.seed,
                                                  shrink_s=runner.PROFILES[options.profile].shrink_s,
                                                  on_case=lambda result: progress.update(bar, completed=done + result.cases))

        for number, result in _in_processes(options, targets, plan) if options.jobs > 1 else in_turn():
            done += plan[number][3]
            progress.update(bar, description=f"{result.target} {result.dims} {result.property}", completed=done)
            results[number] = result
            if result.status == "failed":
                console.print(f"FAILED {result.target} {result.message}\n", style="red", highlight=False, markup=False, soft_wrap=True)
    return [results[number] for number in range(len(plan))]


def replay(options: argparse.Namespace, targets: Sequence[Target], console: Console) -> list[runner.Result]:
    """One case through every property, or those asked for."""
    case = MLACase.parse(options.replay)
    results = []
    for target in targets:
        for prop in runner.select(options.property):
            result = runner.replay(target, prop, case)
            results.append(result)
            if result.status == "failed":
                console.print(f"FAILED {target.name} {result.message}\n", style="red", highlight=False, markup=False, soft_wrap=True)
    return results


def summary(results: Sequence[runner.Result]) -> Table:
    table = Table(title=None, box=None, pad_edge=False)
    for heading, justify in (("target", "left"), ("dims", "left"), ("property", "left"), ("", "left"), ("cases", "right"),
                             ("refused", "right"), ("worst error / bound", "right"), ("seconds", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)
    styles = {"passed": "green", "failed": "bold red", "refused": "yellow", "not applicable": "dim"}
    for result in results:
        worst = f"{result.worst:.3f}" if result.worst else "exact" if result.status == "passed" else ""
        table.add_row(result.target, result.dims, result.property, f"[{styles[result.status]}]{result.status}[/]", str(result.cases),
                      str(result.refused or ""), worst, f"{result.seconds:.1f}")
    return table


def machine() -> str:
    """The GPU, if there is one, and the CPU."""
    from numba import cuda

    from mla_numba.demo import cpu_name

    return f"{cuda.get_current_device().name}, {cpu_name()}" if cuda.is_available() and not simulator() else cpu_name()


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        if options.json:
            # Before hours of work, not after them.
            options.json.touch()
        targets = find_targets(options, console)
        results = (replay if options.replay else run_suite)(options, targets, console)
    except (ImportError, AttributeError, ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 2
    console.print(summary(results))
    failed = sum(result.status == "failed" for result in results)
    cases, refused = sum(result.cases for result in results), sum(result.refused for result in results)
    good = runner.holds(results)
    verdict = "all properties hold" if good else f"{failed} of {len(results)} failed" if failed else "a target ran no case at all"
    console.print(f"{verdict}: {cases} cases, {refused} refused, profile {options.profile}, seed {options.seed}, "
                  f"{sum(result.seconds for result in results):.0f} s", style="bold green" if good else "bold red", highlight=False)
    if options.json:
        about = {"profile": options.profile, "seed": options.seed, "machine": machine(), "python": platform.python_version(),
                 "numpy": np.__version__}
        options.json.write_text(json.dumps(runner.as_json(results, **about), indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
