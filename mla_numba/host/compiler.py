"""Kernels compiled, by Numba to LTO-IR and by nvJitLink to cubins. Needs no GPU."""

import contextlib
import gc
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from cuda.bindings import nvjitlink
from numba import cuda
from numba.cuda import dispatcher

from .launch import KernelSpec

# What the other process runs: it imports what this one would, and from the same places.
_BESIDE = f"import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from {__name__} import compile_beside; compile_beside()"


def compile_kernel(spec: KernelSpec) -> tuple[bytes, str]:
    """The cubin of a kernel for sm_90a, and the linker's report."""
    return _link(_to_ltoir(spec))


def compile_kernels(specs: Sequence[KernelSpec]) -> list[tuple[bytes, str]]:
    """The same of several kernels: the first one in this process, the others in another one meanwhile, as Numba uses one core of a
    process. Where there can be no other process, all in this one."""
    first, rest = specs[:1], specs[1:]
    with ThreadPoolExecutor() as beside:
        others = beside.submit(_by_another_process, rest)
        compiled = _compile_here(first)
    return compiled + (others.result() or _compile_here(rest))


def _by_another_process(specs: Sequence[KernelSpec]) -> list[tuple[bytes, str]]:
    """What another process makes of them; nothing if there is no Python to run: a program that Python is embedded in says that it is the
    executable itself."""
    if not specs or not Path(sys.executable or "").name.startswith("python"):
        return []
    try:
        process = subprocess.run([sys.executable, "-c", _BESIDE], input=pickle.dumps(sys.path) + pickle.dumps(specs),
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        compiled: list[tuple[bytes, str]] = pickle.loads(process.stdout)
    except Exception:
        # It may fail, and what is no pickle of ours, as what a talkative Python prints, may raise anything.
        return []
    return compiled


def compile_beside() -> None:
    """What the other process does."""
    # numba-cuda asks the current device for its capability when it compiles a device function, which would make a context here.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=(9, 0))
    pickle.dump(_compile_here(pickle.load(sys.stdin.buffer)), sys.stdout.buffer)


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
