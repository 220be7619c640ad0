"""Print the extra of setup.cfg that fits this machine's NVIDIA driver: cu13, cu12, or the first argument (default nothing) without one."""

import ctypes
import sys


def cuda_major() -> int:
    """The newest CUDA that the driver runs; 0 without a driver. Asks the driver library itself, and creates no context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    return version.value // 1000 if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


if __name__ == "__main__":
    major = cuda_major()
    fallback = sys.argv[1] if len(sys.argv) > 1 else ""
    print("cu13" if major >= 13 else "cu12" if major == 12 else fallback)
