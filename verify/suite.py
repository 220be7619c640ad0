"""A run of the suite as the command line asks for it: its targets, its rows, one after another or shared by processes.

Not in `__main__`, whose functions other processes cannot be told by name.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from unittest import mock

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mla_numba.config import ceil_div
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


# The most cases that one process draws of a row: a row of thousands is drawn in parts, whatever the number of processes.
PART_EXAMPLES = 200
# Between the seeds of two parts, so that those of no two `--seed` meet.
_NEXT_PART = 1 << 32


@dataclass(frozen=True)
class Part:
    """A row of the table to be, or a part of one."""

    row: int
    part: int
    target: int             # its place among the targets, which other processes have, too
    dims: str
    property: str
    examples: int

    def run(self, options: argparse.Namespace, targets: Sequence[Target],
            on_case: Callable[[runner.Result], None] = lambda result: None) -> runner.Result:
        return runner.run_property(targets[self.target], PROPERTIES[self.property], self.dims, examples=self.examples,
                                   seed=options.seed + self.part * _NEXT_PART, shrink_s=runner.PROFILES[options.profile].shrink_s,
                                   on_case=on_case)


def parts_of(targets: Sequence[Target], plan: Sequence[tuple[Target, str, Property, int]]) -> list[Part]:
    """The rows, cut into nearly equal parts."""
    parts = []
    for row, (target, dims, prop, examples) in enumerate(plan):
        count = max(1, ceil_div(examples, PART_EXAMPLES))
        parts += [Part(row, part, targets.index(target), dims, prop.name, examples * (part + 1) // count - examples * part // count)
                  for part in range(count)]
    return parts


# Of a process among several: its own targets.
_targets: list[Target] = []


def _begin_process(options: argparse.Namespace) -> None:
    _targets[:] = find_targets(options, Console(quiet=True))


def _run_apart(options: argparse.Namespace, part: Part) -> runner.Result:
    return part.run(options, _targets)


def _in_processes(options: argparse.Namespace, parts: Sequence[Part]) -> Iterator[tuple[Part, runner.Result]]:
    """Parts and their results, as they are done."""
    # A thread each, as together they have the machine's cores: said in the environment that they are born into, and not in this process.
    threads = {f"{library}_NUM_THREADS": os.environ.get(f"{library}_NUM_THREADS", "1") for library in ("OMP", "OPENBLAS", "NUMBA")}
    with (mock.patch.dict(os.environ, threads),
          ProcessPoolExecutor(options.jobs, get_context("spawn"), _begin_process, (options,)) as pool):
        # The dims whose cases take longest are the last ones.
        futures = {pool.submit(_run_apart, options, part): part for part in reversed(parts)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def run_suite(options: argparse.Namespace, targets: Sequence[Target], console: Console) -> list[runner.Result]:
    """Every property against every target, with a progress bar."""
    plan = list(runner.plan_runs(targets, runner.select(options.property), options.dims, runner.PROFILES[options.profile]))
    parts = parts_of(targets, plan)
    results: dict[Part, runner.Result] = {}
    columns = (TextColumn("{task.description}", table_column=None), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=sum(part.examples for part in parts))
        done = 0

        def in_turn() -> Iterator[tuple[Part, runner.Result]]:
            for part in parts:
                progress.update(bar, description=f"{targets[part.target].name} {part.dims} {part.property}")
                yield part, part.run(options, targets, lambda result: progress.update(bar, completed=done + result.cases))

        for part, result in _in_processes(options, parts) if options.jobs > 1 else in_turn():
            done += part.examples
            progress.update(bar, description=f"{result.target} {result.dims} {result.property}", completed=done)
            results[part] = result
            if result.status == "failed":
                console.print(f"FAILED {result.target} {result.message}\n", style="red", highlight=False, markup=False, soft_wrap=True)
    return [runner.together([results[part] for part in parts if part.row == row]) for row in range(len(plan))]
