"""A run of the suite as the command line asks for it: its targets, its rows, one after another or shared by processes.

Not in `__main__`, whose functions other processes cannot be told by name.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from unittest import mock

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from verify import runner
from verify.properties import PROPERTIES, Property
from verify.targets import Target, emulated, external, ours


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


def _run_row(options: argparse.Namespace, row: Row, on_case: Callable[[runner.Result], None] = lambda result: None) -> runner.Result:
    target, dims, prop, examples = row
    return runner.run_property(target, prop, dims, examples=examples, seed=options.seed,
                               shrink_s=runner.PROFILES[options.profile].shrink_s, on_case=on_case)


def _run_apart(options: argparse.Namespace, target: int, dims: str, prop: str, examples: int) -> runner.Result:
    return _run_row(options, (_targets[target], dims, PROPERTIES[prop], examples))


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
            for number, row in enumerate(plan):
                progress.update(bar, description=f"{row[0].name} {row[1]} {row[2].name}")
                yield number, _run_row(options, row, lambda result: progress.update(bar, completed=done + result.cases))

        for number, result in _in_processes(options, targets, plan) if options.jobs > 1 else in_turn():
            done += plan[number][3]
            progress.update(bar, description=f"{result.target} {result.dims} {result.property}", completed=done)
            results[number] = result
            if result.status == "failed":
                console.print(f"FAILED {result.target} {result.message}\n", style="red", highlight=False, markup=False, soft_wrap=True)
    return [results[number] for number in range(len(plan))]
