"""Streams that are being captured: which are, and what is made meanwhile, but for later calls, too."""

import contextlib
from collections.abc import Iterator

from cuda.bindings import driver

from .cubin import checked


def is_capturing(stream: int) -> bool:
    """Whether what goes to the stream now becomes part of a CUDA graph."""
    # The default stream may not even be asked while another one is captured.
    error, status = driver.cuStreamIsCapturing(driver.CUstream(stream))
    return bool(error == driver.CUresult.CUDA_SUCCESS and status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)


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
