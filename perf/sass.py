"""What the compiler made of the Hopper kernels, told without a GPU: `python -m perf.sass` (`make sass`).

Registers, spills and warnings as nvJitLink's assembler reports them; the instructions that matter, counted in the machine code.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mla_numba.host.launch import KernelSpec

# (dtype, page_size, row_tiles, num_rows).
VARIANTS = (*(("bfloat16", page_size, 1, 64) for page_size in (16, 64, 128)),
            *(("bfloat16", page_size, row_tiles, 64) for page_size, row_tiles in ((16, 2), (64, 2), (64, 3), (64, 4))),
            ("float16", 16, 4, 64),
            ("bfloat16", 64, 1, 16), ("float16", 128, 1, 16), ("bfloat16", 16, 1, 32), ("float16", 64, 1, 32))
# The numbers of warnings that cost most of the speed: setmaxnreg ignored (C7504), wgmma serialised (C7508, and whatever else may be why).
HARMFUL_WARNING = re.compile(r"\((C75\d\d)\)")
OPCODES = ("HGMMA", "WARPGROUP.DEPBAR", "UTMALDG", "UTMALDG.5D.MULTICAST", "UCGABAR_WAIT", "CCTL.E.PF2", "USETMAXREG", "SYNCS", "BAR",
           "STSM", "LDSM", "VOTE", "DSETP", "LDL", "STL")


@dataclass(frozen=True)
class SassReport:
    """One compiled kernel."""

    name: str
    registers: int          # a thread's at launch; setmaxnreg moves them between warpgroups afterwards
    stack_bytes: int
    spill_bytes: int
    smem_bytes: int         # dynamic
    warnings: tuple[str, ...]
    opcodes: Counter[str]
    num_instructions: int
    seconds: float          # to compile


def find_tool(name: str) -> str | None:
    """A tool of the CUDA wheels, which are as new as the libNVVM beside them; else the machine's own."""
    try:
        import nvidia
    except ImportError:
        return shutil.which(name)
    for path in nvidia.__path__:
        for found in Path(path).glob(f"**/bin/{name}"):
            return str(found)
    return shutil.which(name)


def inspect(spec: "KernelSpec") -> SassReport:
    """Compile as the host does, and disassemble.

    Raises
    ------
    FileNotFoundError
        There is no nvdisasm.
    """
    from mla_numba.host.compiler import compile_kernel, without_gpu

    nvdisasm = find_tool("nvdisasm")
    if nvdisasm is None:
        raise FileNotFoundError("nvdisasm is not installed: pip install 'mla_numba[test]' brings it")
    begin = time.perf_counter()
    with without_gpu():
        cubin, log = compile_kernel(spec)
    seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([nvdisasm, "-c", path], capture_output=True, text=True, check=True).stdout
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", text)
    counts = Counter({opcode: sum(f"{operation}.".startswith(opcode + ".") for operation in operations) for opcode in OPCODES})
    stack, stores, loads = (int(n) for n in re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log).groups())  # type: ignore[union-attr]
    registers = int(re.search(r"Used (\d+) registers", log)[1])  # type: ignore[index]
    warnings = tuple(sorted(set(HARMFUL_WARNING.findall(log))))
    return SassReport(spec.name, registers, stack, stores + loads, spec.smem_bytes, warnings, counts, len(operations), seconds)


def hopper_kernels(variants: Sequence[tuple[str, int, int, int]] = VARIANTS) -> Iterator[SassReport]:
    """A report for the decode kernel of each (dtype, page_size, row_tiles, num_rows), for the merge kernel of each (dtype, num_rows), and
    for the plan's."""
    from mla_numba.host.hopper import decode_spec, merge_spec, schedule_spec

    for variant in variants:
        yield inspect(decode_spec(*variant))
    for dtype, num_rows in dict.fromkeys((dtype, num_rows) for dtype, _, _, num_rows in variants):
        yield inspect(merge_spec(dtype, num_rows))
    yield inspect(schedule_spec())


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a kernel spills or was compiled with a harmful warning, 2 if it cannot be told."""
    parser = argparse.ArgumentParser(prog="python -m perf.sass", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float16"), help="only this; repeatable")
    parser.add_argument("--page-size", action="append", type=int, choices=(16, 64, 128), help="only this; repeatable")
    args = parser.parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    variants = [variant for variant in VARIANTS if variant[0] in (args.dtype or variant) and variant[1] in (args.page_size or variant)]
    table = Table("kernel", "registers", "stack", "spills", "smem", *OPCODES, "all", "warnings", "s", box=None, pad_edge=False)
    console, bad = Console(width=None if sys.stdout.isatty() else 180), False
    try:
        with console.status("compiling for sm_90a ..."):
            for report in hopper_kernels(variants):
                bad |= bool(report.spill_bytes or report.stack_bytes or report.warnings)
                table.add_row(report.name, *map(str, (report.registers, report.stack_bytes, report.spill_bytes, report.smem_bytes)),
                              *(str(report.opcodes[opcode]) for opcode in OPCODES), str(report.num_instructions), " ".join(report.warnings),
                              f"{report.seconds:.1f}")
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    console.print(table)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
