"""Which device is a thread's current one: for a block, in Numba's way, and as other libraries of the thread expect it afterwards."""

from functools import cache
from typing import Any

from numba import cuda


def current_context() -> int:
    """Where the driver's calls of this thread go; 0 if nowhere."""
    from cuda.bindings import driver

    return int(driver.cuCtxGetCurrent()[1])


@cache
def device_context(device_idx: int) -> Any:
    """`numba.cuda.gpus[device_idx]`, for `with` blocks in which the device is the thread's current one.

    To know a device's context numba-cuda (0.30.4) makes it the thread's current one in place of what was, and then takes it away: after the
    first block on another device none is current, and what CuPy takes for memory of that device is the first one's. So what was current
    is put back.
    """
    manager = cuda.gpus[device_idx]
    # The bindings of the driver are imported only where there is one.
    if not cuda.config.ENABLE_CUDASIM:
        from cuda.bindings import driver

        before = current_context()
        manager.get_primary_context()
        if current_context() != before:
            driver.cuCtxPushCurrent(driver.CUcontext(before))
    return manager
