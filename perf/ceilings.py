"""The machine's limits, measured in the process that measures the kernels, with the same timer, on random data.

Medians on a GPU. A CPU is seldom alone, and a limit is what it can do when it is: there the quickest sample counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perf.read_kernel import READ_THREADS, make_read_kernel
from perf.timer import CudaTimer, HostTimer, Timer, host_memory_bytes, interleave, spread

SAMPLES = 20
CPU_SAMPLES = 10

READ_BYTES = 2**31
RANDOM_BYTES = 2**26
# Thread blocks per SM; the best of them counts.
READ_BLOCKS_PER_SM = (8, 16, 32)
# Few matmuls before: after fifty in a row the chip is at its power limit, and slower than any kernel here would find it
# (H200: 693 TFLOPS against 790).
MATMUL_SIZE, MATMUL_WARM_UP = 8192, 3
CPU_COPY_CACHES, CPU_MATMUL_SIZE = 8, 2048


def measure(timer: Timer) -> dict[str, float | None]:
    """read_gbs, copy_gbs (read + written), bf16_matmul_tflops (None without torch and CuPy); on a GPU launch_us, an empty kernel's time;
    on the CPU f32_matmul_tflops."""
    if isinstance(timer, CudaTimer):
        return _measure_gpu(timer)
    return _measure_cpu(timer)


def _times(timer: Timer, call: Any, samples: int, warm_up: int = 2) -> list[float]:
    """Microseconds of a call right after another: its buffers are larger than any cache, so that none needs to be flushed."""
    for _ in range(warm_up):
        call()
    return [timer.sample(call, before=call) for _ in range(samples)]


def _median(timer: Timer, call: Any, samples: int, warm_up: int = 2) -> float:
    return spread(_times(timer, call, samples, warm_up)).median


def _random_device_array(num_bytes: int) -> Any:
    from numba import cuda

    # A part drawn on the host, the rest copies of it: the same bytes again are as random to memory.
    part = cuda.to_device(np.random.default_rng(0).integers(-2**63, 2**63, RANDOM_BYTES // 8))
    array = cuda.device_array(num_bytes // 8, np.int64)
    for begin in range(0, array.size, part.size):
        target = array[begin:begin + part.size]
        target.copy_to_device(part[:target.size])
    return array


def _measure_gpu(timer: CudaTimer) -> dict[str, float | None]:
    from numba import cuda
    from numba.cuda import types

    num_sms = cuda.get_current_device().MULTIPROCESSOR_COUNT
    read = cuda.jit(types.void(types.int64[::1], types.int64[::1]))(make_read_kernel())
    empty = cuda.jit(types.void())(_empty)
    source = _random_device_array(READ_BYTES)
    rates = []
    for blocks in (num_sms * per_sm for per_sm in READ_BLOCKS_PER_SM):
        whole = 8 * blocks * READ_THREADS
        part = source[:source.size // whole * whole]
        sums = cuda.device_array(blocks * READ_THREADS, np.int64)
        microseconds = _median(timer, lambda part=part, sums=sums, blocks=blocks: read[blocks, READ_THREADS](part, sums), SAMPLES)
        rates.append(part.size * 8 / microseconds / 1e3)
    half = source.size // 2
    target, copied = source[:half], source[half:2 * half]
    copy_us = _median(timer, lambda: target.copy_to_device(copied), SAMPLES)
    empty[num_sms, READ_THREADS]()
    launch_us = spread(interleave(timer, {"empty": lambda: empty[num_sms, READ_THREADS]()}, SAMPLES)["empty"]).median
    return {"read_gbs": max(rates), "copy_gbs": 16 * half / copy_us / 1e3, "bf16_matmul_tflops": _bf16_matmul_tflops(timer),
            "launch_us": launch_us}


def _empty() -> None:
    pass


def _bf16_matmul_tflops(timer: Timer) -> float | None:
    matmul = _torch_matmul() or _cupy_matmul()
    if matmul is None:
        return None
    return 2 * MATMUL_SIZE**3 / _median(timer, matmul, SAMPLES, MATMUL_WARM_UP) / 1e6


def _torch_matmul() -> Any:
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _cupy_matmul() -> Any:
    try:
        import cupy
        import ml_dtypes

        a, b = (cupy.random.standard_normal((MATMUL_SIZE, MATMUL_SIZE), cupy.float32).astype(ml_dtypes.bfloat16) for _ in range(2))
        cupy.matmul(a, b)
    except (ImportError, TypeError, ValueError, NotImplementedError):
        # No CuPy, or one that does not multiply bfloat16.
        return None
    return lambda: cupy.matmul(a, b)


def _measure_cpu(timer: HostTimer) -> dict[str, float | None]:
    import numba

    @numba.njit(parallel=True, nogil=True)
    def read(source):
        total = 0
        for i in numba.prange(source.size):
            total += source[i]
        return total

    @numba.njit(parallel=True, nogil=True)
    def copy(target, source):
        for i in numba.prange(source.size):
            target[i] = source[i]

    rng = np.random.default_rng(0)
    num_bytes = min(CPU_COPY_CACHES * timer.flush_bytes // 4, host_memory_bytes() // 8)
    source = np.resize(rng.integers(-2**31, 2**31, RANDOM_BYTES // 8), num_bytes // 8)
    target = np.empty_like(source)
    square = rng.standard_normal((CPU_MATMUL_SIZE, CPU_MATMUL_SIZE), np.float32)
    read_us, copy_us, matmul_us = (min(_times(timer, call, CPU_SAMPLES)) for call in (
        lambda: read(source), lambda: copy(target, source), lambda: square @ square))
    return {"read_gbs": source.nbytes / read_us / 1e3, "copy_gbs": 2 * source.nbytes / copy_us / 1e3, "bf16_matmul_tflops": None,
            "f32_matmul_tflops": 2 * CPU_MATMUL_SIZE**3 / matmul_us / 1e6}
