"""Kernels as cubins: compiled once per machine, kept on disk, loaded by the driver.

A kept cubin is named after everything that it follows from: the sources of kernels and intrinsics, the compilers' versions, the
configuration and the signature. `MLA_NUMBA_CACHE_DIR` says where (default `~/.cache/mla_numba`); where that cannot be written,
every process compiles anew.
"""

import contextlib
import gc
import hashlib
import importlib.metadata
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

from cuda.bindings import driver, nvjitlink
from numba import cuda

from .launch import KernelSpec

_SOURCES = ("ptx/*.py", "kernels/*.py", "contract.py", "scheduler.py", "config.py")


def checked(result: tuple[Any, ...], what: str) -> Any:
    """The values of a driver call, or its error as an exception."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{what} failed: {error.name}")
    return values[0] if len(values) == 1 else tuple(values)


@cache
def _sources_digest() -> str:
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(root.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    # libNVVM and nvJitLink are of one CUDA release.
    digest.update(f"{importlib.metadata.version('numba-cuda')} {nvjitlink.version()}".encode())
    return digest.hexdigest()


def cache_dir() -> pathlib.Path:
    return pathlib.Path(os.environ.get("MLA_NUMBA_CACHE_DIR") or pathlib.Path.home() / ".cache" / "mla_numba")


def compile_kernel(spec: KernelSpec) -> tuple[bytes, str]:
    """The cubin of a kernel for sm_90a, and the linker's report. Needs no GPU."""
    return _link(_to_ltoir(spec))


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


def load_kernels(specs: Sequence[KernelSpec], device_idx: int) -> list[Any]:
    """The driver's handles of kernels. Of those that are not on disk Numba compiles one after the other, and what it has done is linked
    meanwhile."""
    with ThreadPoolExecutor() as linkers:
        found: list[bytes | Future[tuple[bytes, str]]] = []
        for spec in specs:
            try:
                found.append(_path(spec).read_bytes())
            except OSError:
                found.append(linkers.submit(_link, _to_ltoir(spec)))
    handles = []
    for spec, code in zip(specs, found, strict=True):
        if isinstance(code, Future):
            code, _ = code.result()
            _keep(_path(spec), code)
        handles.append(_load(spec, code, device_idx))
    return handles


def _path(spec: KernelSpec) -> pathlib.Path:
    compiled_for = f"{spec.num_threads} {spec.fastmath} {spec.blocks_per_sm}"
    key = hashlib.sha256(f"{_sources_digest()} {spec.name} {spec.types()} {compiled_for}".encode()).hexdigest()
    return cache_dir() / f"{spec.name}-{key[:32]}.cubin"


def _load(spec: KernelSpec, code: bytes, device_idx: int) -> Any:
    library = checked(driver.cuLibraryLoadData(code, None, None, 0, None, None, 0), f"cuLibraryLoadData of {spec.name}")
    (kernel,) = checked(driver.cuLibraryEnumerateKernels(1, library), "cuLibraryEnumerateKernels")
    if spec.smem_bytes > 0:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuKernelSetAttribute(attribute, spec.smem_bytes, kernel, device_idx),
                f"asking for {spec.smem_bytes} bytes of shared memory")
    return driver.CUfunction(int(kernel))


def _keep(path: pathlib.Path, code: bytes) -> None:
    """Whole or not at all, whatever other processes do."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:
        pass
