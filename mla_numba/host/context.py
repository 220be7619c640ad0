"""Which device is a thread's current one: for a block, in Numba's way, and as other libraries of the thread expect it afterwards. And whose
some memory is."""

from functools import cache
from typing import Any

from numba import cuda

from .driver import bindings


def current_context() -> int:
    """Where the driver's calls of this thread go; 0 if nowhere."""
    return int(bindings().cuCtxGetCurrent()[1])


@cache
def device_context(device_idx: int) -> Any:
    """`numba.cuda.gpus[device_idx]`, for `with` blocks in which the device is the thread's current one.

    To know a device's context numba-cuda (0.30.4) makes it the thread's current one in place of what was, and then takes it away: after the
    first block on another device none is current, and what CuPy takes for memory of that device is the first one's. So what was current
    is put back.
    """
    manager = cuda.gpus[device_idx]
    if not cuda.config.ENABLE_CUDASIM:
        before = current_context()
        manager.get_primary_context()
        if current_context() != before:
            bindings().cuCtxPushCurrent(bindings().CUcontext(before))
    return manager


def device_of(address: int) -> int | None:
    """The GPU whose memory this is; None if it is no GPU's, as that of an array without elements."""
    # The driver's own cuPointerGetAttribute, by cuda.bindings 13.3, says 0 of memory on GPU 1.
    from cuda.bindings import runtime

    error, attributes = runtime.cudaPointerGetAttributes(address)
    return int(attributes.device) if not error and attributes.device >= 0 else None
