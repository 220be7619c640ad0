"""Kernels as cubins: compiled once per machine, kept on disk, loaded by the driver.

A kept cubin is named after everything that it follows from: the sources of kernels and intrinsics, the compilers' versions, the
configuration and the signature. `MLA_NUMBA_CACHE_DIR` says where (default `~/.cache/mla_numba`); where that cannot be written,
every process compiles anew.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from functools import cache
from typing import Any

from cuda.bindings import driver
from numba import cuda

_SOURCES = ("ptx/*.py", "kernels/*.py", "contract.py", "scheduler.py", "config.py")

# Seconds spent compiling in this process, by kernel name; kernels that came from disk are not in it.
compile_seconds: dict[str, float] = {}


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
    for package in ("numba-cuda", "nvidia-nvvm", "nvidia-cuda-nvcc-cu12"):
        try:
            digest.update(importlib.metadata.version(package).encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(b"-")
    return digest.hexdigest()


def cache_dir() -> pathlib.Path:
    return pathlib.Path(os.environ.get("MLA_NUMBA_CACHE_DIR") or pathlib.Path.home() / ".cache" / "mla_numba")


def _compiled(make: Callable[[], Callable[..., None]], signature: Any, name: str, num_threads: int, fastmath: bool) -> bytes:
    begin = time.perf_counter()
    # By link-time optimisation, of the whole program: of one part among others nvJitLink ignores setmaxnreg (C7504), keeps to 168
    # registers, spills and serialises every wgmma (C7509): 102 TFLOPS where this gives six times that (H200, batch 66 x 128 x 4,096).
    kernel = cuda.jit(signature, lto=True, fastmath=fastmath, launch_bounds=(num_threads, 1))(make())
    (overload,) = kernel.overloads.values()
    cubin = overload._codelibrary.get_cubin()
    code = bytes(getattr(cubin, "code", cubin))
    compile_seconds[name] = time.perf_counter() - begin
    return code


@cache
def load_kernel(make: Callable[[], Callable[..., None]], signature: Any, name: str, num_threads: int, smem_bytes: int, fastmath: bool,
                device_idx: int) -> Any:
    """The driver's handle of the kernel that `make` returns; `name` tells its configuration apart from others."""
    key = hashlib.sha256(f"{_sources_digest()} {name} {signature} {num_threads} {fastmath}".encode()).hexdigest()
    path = cache_dir() / f"{name}-{key[:32]}.cubin"
    try:
        code = path.read_bytes()
    except OSError:
        code = _compiled(make, signature, name, num_threads, fastmath)
        _keep(path, code)
    library = checked(driver.cuLibraryLoadData(code, None, None, 0, None, None, 0), f"cuLibraryLoadData of {name}")
    (kernel,) = checked(driver.cuLibraryEnumerateKernels(1, library), "cuLibraryEnumerateKernels")
    if smem_bytes > 0:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuKernelSetAttribute(attribute, smem_bytes, kernel, device_idx), f"asking for {smem_bytes} bytes of shared memory")
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
