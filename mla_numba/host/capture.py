"""What is made while a caller's stream is being captured, but for later calls, too."""

import contextlib
from collections.abc import Iterator

from cuda.bindings import driver

from .cubin import checked


@contextlib.contextmanager
def beside_captures() -> Iterator[None]:
    """The calling thread may allocate and load meanwhile, which a stream that is being captured forbids else (CUDA's modes global and
    thread-local)."""
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = checked(driver.cuThreadExchangeStreamCaptureMode(relaxed), "cuThreadExchangeStreamCaptureMode")
    try:
        yield
    finally:
        checked(driver.cuThreadExchangeStreamCaptureMode(before), "cuThreadExchangeStreamCaptureMode")
