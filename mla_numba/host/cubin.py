"""Kernels as cubins: compiled once per machine, kept on disk, loaded by the driver.

A kept cubin is named after everything that it follows from: the sources of kernels and intrinsics, the compilers' versions, the
configuration and the signature. `MLA_NUMBA_CACHE_DIR` says where (default `~/.cache/mla_numba`); where that cannot be written,
every process compiles anew.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import tempfile
from collections.abc import Sequence
from functools import cache
from typing import Any

from cuda.bindings import driver, nvjitlink

from .compiler import compile_kernels
from .driver import checked
from .launch import KernelSpec

_SOURCES = ("ptx/*.py", "kernels/*.py", "contract.py", "scheduler.py", "config.py")


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
    named = os.environ.get("MLA_NUMBA_CACHE_DIR")
    try:
        return pathlib.Path(named) if named else pathlib.Path.home() / ".cache" / "mla_numba"
    except RuntimeError:
        # A user without a home, as in some containers. In this place there is no file, and none can be written.
        return pathlib.Path(os.devnull)


def load_kernels(specs: Sequence[KernelSpec], device_idx: int) -> list[Any]:
    """The driver's handles of kernels; those that are not on disk are compiled."""
    found: dict[KernelSpec, bytes] = {}
    for spec in specs:
        with contextlib.suppress(OSError):
            found[spec] = _path(spec).read_bytes()
    missing = [spec for spec in specs if spec not in found]
    for spec, (code, _) in zip(missing, compile_kernels(missing), strict=True):
        _keep(_path(spec), code)
        found[spec] = code
    return [_load(spec, found[spec], device_idx) for spec in specs]


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
    # Launched in 4.8 us, where the library's own handle takes 5.2 (an H200's host).
    return checked(driver.cuKernelGetFunction(kernel), "cuKernelGetFunction")


def _keep(path: pathlib.Path, code: bytes) -> None:
    """Whole or not at all, whatever other processes do."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:
        pass
