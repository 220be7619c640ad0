"""Runs small decodes of a backend under NVIDIA's compute-sanitizer: `python -m perf.sanitize [--backend simt] [--tools memcheck ...]`.

The checker slows a kernel by one or two orders of magnitude, so the shapes are as small as they can be and still take every path: empty
requests, part-filled pages and row tiles, few rows, several queries, a split with its merge, by the merge kernel and by the later of two
workers. Results are checked against float64 as well.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "synccheck")


def shapes() -> list[tuple[Any, int | None]]:
    """Cases, and how many workers they are cut for; None: as many as fill the machine."""
    from verify.cases import MLACase

    return [(MLACase(seq_lens=(0, 1, 65, 130), num_heads_q=16, pages="shuffled"), None),
            (MLACase(seq_lens=(700, 3), num_heads_q=3, seq_len_q=2, page_size=16, pages="shuffled"), None),
            (MLACase(seq_lens=(380, 700), num_heads_q=16, dtype="float16"), 2),
            (MLACase(seq_lens=(500, 90), num_heads_q=16, seq_len_q=2, page_size=32), None),
            (MLACase(seq_lens=(0, 130, 65), num_heads_q=40, pages="shuffled"), None),
            (MLACase(seq_lens=(1500,), num_heads_q=64, dtype="float16"), None),
            (MLACase(seq_lens=(380, 700), num_heads_q=64), 2),
            (MLACase(seq_lens=(600, 40), num_heads_q=128, pages="shuffled"), None)]


def decode_all(backend: str) -> None:
    """What runs under the checker."""
    from verify.checks import assert_within
    from verify.targets import ours

    target = ours(backend)
    for case, num_workers in shapes():
        inputs = case.build()
        knobs = {} if num_workers is None else {"plan": target.plan(inputs, num_workers)}
        out, lse = target(inputs, **knobs)
        want_out, want_lse, out_bound, lse_bound = inputs.bounds()
        worst = max(assert_within("out", out, want_out, out_bound), assert_within("lse", lse, want_lse, lse_bound))
        print(f"{case}: error {worst:.2f} of the bound", flush=True)


def command(tool: str, backend: str, kernel: str, checker: str = "compute-sanitizer") -> list[str]:
    """The command line of one check. API errors are not reported: the CUDA runtime probes for driver functions that may be absent."""
    only = ["--kernel-name", f"kns={kernel}"] if kernel else []
    return [checker, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "1", "--print-limit", "1000", *only,
            sys.executable, "-m", "perf.sanitize", "--inside", "--backend", backend]


def main(argv: Sequence[str] | None = None) -> int:
    """0 if no checker finds anything, 1 if one does, 2 if it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m perf.sanitize", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", default="simt")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--kernel", default="mla_numba", help="only kernels with this in their name; '' for all (default: %(default)s)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.inside:
        decode_all(args.backend)
        return 0
    checker = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if checker is None:
        print("compute-sanitizer is not on PATH: it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    root = Path(__file__).resolve().parents[1]
    failed = []
    for tool in args.tools:
        print(f"{tool}, backend {args.backend}", flush=True)
        if subprocess.run(command(tool, args.backend, args.kernel, checker), cwd=root, check=False).returncode:
            failed.append(tool)
    print(f"found something: {', '.join(failed)}" if failed else f"{', '.join(args.tools)}: nothing found")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
