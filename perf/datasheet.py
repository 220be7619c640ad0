"""Ceilings of the Hopper parts, for floors on a machine without one, and beside the measured ones.

`tflops` is dense bfloat16. Vendors print the rate with 2:4 sparsity, twice as much; and no library reaches the dense one for long, as
the clock falls at the power limit: the measured H200 shows by how much.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    name: str
    num_sms: int
    read_gbs: float
    tflops: float
    source: str


# H100 and H200: NVIDIA's datasheets and the H100 whitepaper, as collected in https://glennklockwood.com/garden/processors/h100 and, for
# HBM3e, https://openmetal.io/resources/blog/how-the-h200-is-built-for-memory-bound-ai-workloads/. H800: FlashMLA's deep-dive of
# 2025-04-22 reckons with 3,350 GB/s and, as it throttles there, 865 TFLOPS. H20: https://willitrunai.com/es/gpus/h20-96gb; NVIDIA
# publishes no datasheet, and the SM count comes from Geekbench's reports (https://zangshuxian.com/new/674733024499207168).
DATASHEETS = (
    Machine("H800 SXM", 132, 3350, 989.4, "H100 with less NVLink and FP64"),
    Machine("H100 SXM", 132, 3350, 989.4, "NVIDIA's datasheet and whitepaper"),
    Machine("H200 SXM", 132, 4800, 989.4, "NVIDIA's datasheet"),
    Machine("H20", 78, 4000, 148, "vendors and press; no datasheet"),
)
# A kernel that sums, and cuBLAS on 8192 x 8192 bfloat16 matrices, on one H200 with driver 580 (2026-11-23; others since then 4,503 to 4,594
# and 753 to 807).
MEASURED_H200 = Machine("H200, measured", 132, 4437, 790, "this project, 700 W")
MACHINES = (*DATASHEETS, MEASURED_H200)

# An empty kernel on an H200, timed as the cases are (cold, behind the flush, nothing behind it; 2.7 to 2.9 in eight files), and two of
# them, as decode and merge are.
EMPTY_KERNEL_US, TWO_EMPTY_KERNELS_US = 2.8, 4.8


def datasheet_of(device_name: str) -> Machine | None:
    """The datasheet's numbers for a GPU, by the name its driver gives ("NVIDIA H200", "NVIDIA H100 80GB HBM3"); None if unknown."""
    # Not a part of this list: PCIe and NVL boards have other memory and clocks.
    if "PCIe" in device_name or "NVL" in device_name:
        return None
    return next((machine for machine in DATASHEETS if machine.name.split()[0] in device_name.split()), None)
