"""Timing: one call a sample, cold L2, contenders in turn.

A sample is [flush] [event] [call] [event] on one stream, and then a wait: what is queued behind an event holds it up, an empty kernel's by
0.7 us, a short call's by 0.5 to 1.5, as it happens (H200). A flush writes a buffer several times the last-level cache, then reads a part of
it that is no longer there: the cache is left cold, and clean. (Lines left dirty would be written back while the call runs, or not,
as its loads' priorities have it: 404 us became 427 with evict_first loads, 410 became 412 without, H100.) It is repeated as often as it
takes to keep the device busy while the host queues the call: otherwise the time between the events would be the host's. Contenders take
turns sample by sample, each round beginning with another one, so that clocks and temperature are the same for all.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from perf.read_kernel import READ_THREADS, make_read_kernel

Call = Callable[[], Any]

MIN_SAMPLES = 20
# The flush buffer in last-level caches. Four would do for the cache; sixteen of an H200's take 0.25 ms, which most hosts need no longer.
FLUSH_CACHES = 16
# Of it, what is read: enough to push out all that was written last.
CLEAN_CACHES, CLEAN_BLOCKS_PER_SM = 4, 16
# Calls for the host's cost: enough for a mean, few enough for the device's queue of 1,024 launches.
HOST_CALLS, LEAST_HOST_CALLS, HOST_CALLS_US = 20, 5, 50_000


class Timer(Protocol):
    """A clock for calls. `sample` gives the microseconds of one, waited for.

    The flush before it keeps the device busy for `lead_us`. With `before`, that is called instead: the caches are what it leaves.
    """

    flush_bytes: int

    def sample(self, call: Call, lead_us: float = 0.0, before: Call | None = None) -> float: ...

    def wait(self) -> None: ...


@dataclass(frozen=True)
class Spread:
    """Median and 10th and 90th percentile, in microseconds."""

    median: float
    p10: float
    p90: float


def spread(samples: list[float]) -> Spread:
    p10, median, p90 = np.percentile(samples, (10, 50, 90))
    return Spread(float(median), float(p10), float(p90))


def interleave(timer: Timer, calls: Mapping[str, Call], samples: int, lead_us: Mapping[str, float] | None = None) -> dict[str, list[float]]:
    """Microseconds of every sample of every call, taken in turn; `lead_us`: how long the device is kept busy before each."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(samples):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timer.sample(calls[name], (lead_us or {}).get(name, 0.0)))
    return times


def host_us(timer: Timer, call: Call, device_us: float) -> float:
    """What one call costs the host: many without waiting for the device."""
    count = int(np.clip(HOST_CALLS_US / max(device_us, 1), LEAST_HOST_CALLS, HOST_CALLS))
    timer.wait()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    cost = (time.perf_counter() - begin) / count * 1e6
    timer.wait()
    return cost


def first_call(timer: Timer, call: Call) -> tuple[Any, float]:
    """The result of a call, waited for, and its seconds: compilation, if it compiles."""
    timer.wait()
    begin = time.perf_counter()
    result = call()
    timer.wait()
    return result, time.perf_counter() - begin


class CudaTimer:
    """CUDA events on the default stream, which is also torch's current one unless somebody changed it."""

    def __init__(self) -> None:
        from numba import cuda
        from numba.cuda import types

        self._cuda = cuda
        self._stream = cuda.legacy_default_stream()
        self.flush_bytes = FLUSH_CACHES * int(cuda.get_current_device().L2_CACHE_SIZE)
        self._buffer = cuda.device_array(self.flush_bytes, np.uint8)
        blocks = CLEAN_BLOCKS_PER_SM * int(cuda.get_current_device().MULTIPROCESSOR_COUNT)
        whole = 8 * blocks * READ_THREADS
        first = self._buffer.view(np.int64)[:CLEAN_CACHES * self.flush_bytes // FLUSH_CACHES // 8 // whole * whole]
        sums = cuda.device_array(blocks * READ_THREADS, np.int64)
        read = cuda.jit(types.void(types.int64[::1], types.int64[::1]))(make_read_kernel())[blocks, READ_THREADS, self._stream]
        self._read = lambda: read(first, sums)
        self._flush_us = 1.0
        self._flush_us = float(np.median([self.sample(self._flush) for _ in range(5)]))

    def _flush(self) -> None:
        self._cuda.cudadrv.driver.device_memset(self._buffer, 0, self.flush_bytes, self._stream)
        self._read()

    def sample(self, call: Call, lead_us: float = 0.0, before: Call | None = None) -> float:
        begin, end = self._cuda.event(), self._cuda.event()
        for _ in range(max(1, math.ceil(lead_us / self._flush_us))):
            (before or self._flush)()
        begin.record()
        # Kept until all is over: to free device memory may wait for the device.
        result = call()
        end.record()
        self.wait()
        del result
        return float(begin.elapsed_time(end)) * 1e3

    def wait(self) -> None:
        self._cuda.synchronize()


class HostTimer:
    """The host's clock, for the cpu backend: caches cold, and the threads of the call before asleep."""

    # OpenBLAS's threads spin on, on the cores that the next call needs. 2 threads of an EPYC, our 23 ms beside NumPy's way: 33 ms after
    # a rest of 0.04 s, 25 after 0.15.
    settle_s = 0.15

    def __init__(self) -> None:
        self.flush_bytes = min(4 * last_level_cache_bytes(), host_memory_bytes() // 8)
        self._buffer = np.zeros(self.flush_bytes, np.uint8)
        self._value = 1

    def _flush(self) -> None:
        self._buffer.fill(self._value)
        self._value ^= 1

    # A `Timer` takes a lead; this one queues nothing, and needs none.
    def sample(self, call: Call, lead_us: float = 0.0, before: Call | None = None) -> float:  # noqa: ARG002
        (before or self._flush)()
        time.sleep(self.settle_s)
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e6

    def wait(self) -> None:
        pass


def host_memory_bytes() -> int:
    """Virtual machines tell of the whole host's cache, 480 MiB and more, whatever memory they have: buffers are measured by this too."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def last_level_cache_bytes() -> int:
    """Of the CPU, as Linux tells it; 32 MiB where it does not."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size and size[-1] in units), default=32 * 2**20)
