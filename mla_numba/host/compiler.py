"""Kernels compiled, by Numba to LTO-IR and by nvJitLink to cubins; `without_gpu` where there is none."""

import contextlib
import gc
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from cuda.bindings import nvjitlink
from numba import cuda
from numba.cuda import dispatcher

from .launch import KernelSpec

# What the other process runs: it imports what this one would, and from the same places.
_BESIDE = (f"import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from {__name__} import compile_beside; "
           "compile_beside(int(sys.argv[1]))")


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """In the block Numba compiles for compute capability 9.0 without a GPU, or without a context on one: when it compiles a device function
    it asks the current device for its capability."""
    asked = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=(9, 0))
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


def compile_kernel(spec: KernelSpec) -> tuple[bytes, str]:
    """The cubin of a kernel for sm_90a, and the linker's report."""
    return _link(_to_ltoir(spec))


def compile_kernels(specs: Sequence[KernelSpec]) -> list[tuple[bytes, str]]:
    """The same of several kernels: the first one in this process, the others in another one meanwhile, as Numba uses one core of a
    process. Where there can be no other process, all in this one."""
    if len(specs) < 2:
        return _compile_here(specs)
    first, rest = specs[:1], specs[1:]
    with ThreadPoolExecutor() as beside:
        others = beside.submit(_by_another_process, rest)
        compiled = _compile_here(first)
    return compiled + (others.result() or _compile_here(rest))


def _by_another_process(specs: Sequence[KernelSpec]) -> list[tuple[bytes, str]]:
    """What another process makes of them; nothing if there is no Python to run: a program that Python is embedded in says that it is the
    executable itself."""
    if not Path(sys.executable or "").name.startswith("python"):
        return []
    try:
        # Not by its standard output, where what a Python runs when it starts may print.
        with tempfile.TemporaryFile() as results:
            subprocess.run([sys.executable, "-c", _BESIDE, str(results.fileno())], input=pickle.dumps(sys.path) + pickle.dumps(specs),
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, pass_fds=[results.fileno()])
            results.seek(0)
            compiled: list[tuple[bytes, str]] = pickle.load(results)
    except (OSError, subprocess.SubprocessError, EOFError):
        # There is no such program, or it fails, or is another one and writes nothing.
        return []
    return compiled


def compile_beside(descriptor: int) -> None:
    """What the other process does; its results go to the open file `descriptor`."""
    with without_gpu(), open(descriptor, "wb") as results:
        pickle.dump(_compile_here(pickle.load(sys.stdin.buffer)), results)


def _compile_here(specs: Sequence[KernelSpec]) -> list[tuple[bytes, str]]:
    """Numba compiles one after the other, and what it has done is linked meanwhile."""
    with ThreadPoolExecutor() as linkers:
        linked = [linkers.submit(_link, _to_ltoir(spec)) for spec in specs]
    return [future.result() for future in linked]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Numba makes millions of objects and drops few: looking for those is an eighth of its time (1.5 s of 12 for the three kernels of a
    call, a virtual Xeon)."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _to_ltoir(spec: KernelSpec) -> bytes:
    with _no_garbage_collection():
        code, _ = cuda.compile(spec.kernel(), spec.types(), device=False, abi="numba", cc=(9, 0, "a"), output="ltoir",
                               fastmath=spec.fastmath, launch_bounds=(spec.num_threads, spec.blocks_per_sm))
    return bytes(code)


def _link(ltoir: bytes) -> tuple[bytes, str]:
    """By link-time optimisation, of the whole program: of one part among others, as Numba's PTX would be, nvJitLink ignores setmaxnreg
    (C7504), keeps to 168 registers, spills and serialises every wgmma (C7509): 102 TFLOPS where this gives 606 (H200, batch 66 x
    128 heads x 4,096 tokens).
    """
    options = ["-arch=sm_90a", "-lto", "-verbose"]
    linker = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(linker, nvjitlink.InputType.LTOIR, ltoir, len(ltoir), "kernel")
        nvjitlink.complete(linker)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, cubin)
        report = bytearray(nvjitlink.get_info_log_size(linker))
        nvjitlink.get_info_log(linker, report)
    finally:
        nvjitlink.destroy(linker)
    return bytes(cubin), report.rstrip(b"\0").decode()
