"""What is made while a caller's stream is being captured, but for later calls, too."""

import contextlib
from collections.abc import Iterator

from cuda.bindings import driver

from .cubin import checked


@contextlib.contextmanager
def beside_captures() -> Iterator[None]:
    """In the block the calling thread may allocate and load, whatever stream is being captured: CUDA's modes global and thread-local
    forbid it else."""
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = checked(driver.cuThreadExchangeStreamCaptureMode(relaxed), "cuThreadExchangeStreamCaptureMode")
    try:
        yield
    finally:
        checked(driver.cuThreadExchangeStreamCaptureMode(before), "cuThreadExchangeStreamCaptureMode")
