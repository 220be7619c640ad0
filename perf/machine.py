"""Where a measurement was made: the device and its clocks, the versions of all that took part, the commit."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mla_numba.demo import cpu_name

PACKAGES = ("numba", "numba-cuda", "llvmlite", "numpy", "ml_dtypes", "scipy", "torch", "cupy-cuda13x", "cupy-cuda12x", "triton",
            "cuda-bindings", "nvidia-nvvm")
ROOT = Path(__file__).resolve().parents[1]


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    from mla_numba import __version__

    # A checkout need not be installed.
    found = {"python": platform.python_version(), "mla_numba": __version__}
    return found | {name: got for name in PACKAGES if (got := package_version(name)) is not None}


def commit(root: Path = ROOT) -> str | None:
    """Of a checkout, with "-dirty" if tracked files differ from it; None where there is no git."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_cpu() -> dict[str, Any]:
    import numba

    from perf.timer import last_level_cache_bytes

    return {"name": cpu_name(), "sms": None, "driver": None, "threads": numba.get_num_threads(), "cores": os.cpu_count(),
            "last_level_cache_bytes": last_level_cache_bytes(), "os": f"{platform.system()} {platform.release()}"}


def describe_gpu() -> dict[str, Any]:
    from numba import cuda

    device = cuda.get_current_device()
    name = device.name.decode() if isinstance(device.name, bytes) else str(device.name)
    return {"name": name, "sms": int(device.MULTIPROCESSOR_COUNT), "driver": Nvml().driver(),
            "compute_capability": ".".join(map(str, device.compute_capability)), "l2_bytes": int(device.L2_CACHE_SIZE),
            "cuda": ".".join(map(str, cuda.cudadrv.driver.get_version())), "host": cpu_name(), "python": sys.version.split()[0]}


class Nvml:
    """Clocks and power of Numba's current device by NVML; whatever it does not tell is None, all of it without `pynvml`."""

    def __init__(self) -> None:
        try:
            import pynvml
            from numba import cuda

            pynvml.nvmlInit()
            self._nvml: Any = pynvml
            # By PCI address: NVML's order is not CUDA's, and CUDA_VISIBLE_DEVICES does not touch it.
            device = cuda.get_current_device()
            address = f"{device.PCI_DOMAIN_ID:08x}:{device.PCI_BUS_ID:02x}:{device.PCI_DEVICE_ID:02x}.0"
            self._device = pynvml.nvmlDeviceGetHandleByPciBusId(address.encode())
        except Exception:
            self._nvml = None

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        if self._nvml is None:
            return None
        try:
            return question(self._nvml)
        except Exception:
            return None

    def driver(self) -> str | None:
        got = self._ask(lambda nvml: nvml.nvmlSystemGetDriverVersion())
        return got.decode() if isinstance(got, bytes) else got

    def now(self) -> dict[str, Any]:
        """Clocks, power, temperature, and why the clock is not higher."""
        device = getattr(self, "_device", None)
        return {
            "sm_mhz": self._ask(lambda nvml: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)),
            "memory_mhz": self._ask(lambda nvml: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_MEM)),
            "sm_mhz_max": self._ask(lambda nvml: nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_SM)),
            "power_w": self._ask(lambda nvml: nvml.nvmlDeviceGetPowerUsage(device) / 1e3),
            "power_limit_w": self._ask(lambda nvml: nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1e3),
            "temperature_c": self._ask(lambda nvml: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)),
            "throttle_reasons": self._ask(lambda nvml: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device)),
        }

