"""Streams that are being captured: which are, and what is made meanwhile, but for later calls, too. The simulator captures none."""

import contextlib
from collections.abc import Iterator

from numba import cuda

from .driver import bindings, checked


def is_capturing(stream: int) -> bool:
    """Whether what goes to the stream now becomes part of a CUDA graph."""
    if cuda.config.ENABLE_CUDASIM:
        return False
    driver = bindings()
    # The default stream may not even be asked while another one is captured.
    error, status = driver.cuStreamIsCapturing(driver.CUstream(stream))
    return bool(not error and status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)


@contextlib.contextmanager
def beside_captures() -> Iterator[None]:
    """In the block the calling thread may allocate and load, whatever stream is being captured: CUDA's modes global and thread-local
    forbid it else."""
    if cuda.config.ENABLE_CUDASIM:
        yield
        return
    driver = bindings()
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = checked(driver.cuThreadExchangeStreamCaptureMode(relaxed), "cuThreadExchangeStreamCaptureMode")
    try:
        yield
    finally:
        checked(driver.cuThreadExchangeStreamCaptureMode(before), "cuThreadExchangeStreamCaptureMode")
