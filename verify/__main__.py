"""The property suite outside pytest: against our backends, or against any decode that has the signature in verify/targets.py."""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from verify import runner
from verify.cases import MLACase
from verify.properties import PROPERTIES
from verify.strategies import DIMS
from verify.suite import find_targets, run_suite
from verify.targets import ARRAY_KINDS, Target, simulator


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


def verdict(results: Sequence[runner.Result]) -> str:
    """What the results say in a line. A property of which the target took no case is not one that holds."""
    failed = sum(result.status == "failed" for result in results)
    if failed:
        return f"{failed} of {len(results)} failed"
    if not runner.holds(results):
        return "a target ran no case at all"
    unseen = sum(result.status == "refused" for result in results)
    return f"nothing failed, but of {unseen} of {len(results)} every case was refused" if unseen else "all properties hold"


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
    cases, refused = sum(result.cases for result in results), sum(result.refused for result in results)
    good = runner.holds(results)
    console.print(f"{verdict(results)}: {cases} cases, {refused} refused, profile {options.profile}, seed {options.seed}, "
                  f"{sum(result.seconds for result in results):.0f} s", style="bold green" if good else "bold red", highlight=False)
    if options.json:
        about = {"profile": options.profile, "seed": options.seed, "machine": machine(), "python": platform.python_version(),
                 "numpy": np.__version__}
        options.json.write_text(json.dumps(runner.as_json(results, **about), indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
