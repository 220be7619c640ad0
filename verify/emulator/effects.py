"""The effects of single intrinsics (`verify.ptx_effects`) in the emulator."""

from typing import Any

import numpy as np

from mla_numba.kernels.hopper_config import FIRST_MAP
from verify.ptx_effects import Arrays, Effect

from .device import EmulatedGpu
from .tma import TensorMap


def run(effect: Effect, inputs: Arrays, seed: int) -> Arrays:
    """The arrays after the effect's launches."""
    gpu = EmulatedGpu(seed)
    machine = gpu.machine
    results = {name: np.array(array) for name, array in inputs.items()}
    written = effect.expected(inputs)
    arguments: list[Any] = []
    for name, array in results.items():
        address = machine.memory.add(name, array.reshape(-1).view(np.uint8), writable=name in written)
        if name in effect.tensor_maps:
            given = effect.tensor_maps[name]
            words = gpu.add_map(TensorMap(address, given.sizes, given.strides, given.box))
            arguments.append((0,) * FIRST_MAP + words if effect.map_is_parameter else words[0])
        else:
            arguments.append(address)
    kernel = getattr(gpu.language.load("verify.ptx_kernels"), effect.make)(*effect.configuration)
    for launch in range(effect.num_launches):
        machine.launch(kernel, effect.name, (effect.num_blocks, 1, 1), effect.num_threads, effect.smem_bytes, 0, arguments,
                       programmatic=effect.num_launches > 1 or launch > 0, cluster_size=effect.cluster_size, copies=True)
    machine.run()
    return results
