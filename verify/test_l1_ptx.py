"""On a GPU every intrinsic does what `verify.ptx_effects` says, bit for bit. Levels: l1.

One of them: `python -m pytest verify/test_l1_ptx.py -k tma_store`.
"""

from functools import cache

import numpy as np
import pytest
from numba import cuda

if cuda.config.ENABLE_CUDASIM:
    pytest.skip("the simulator has no PTX", allow_module_level=True)

from cuda.bindings import driver

from mla_numba.host.compiler import compile_kernel
from mla_numba.host.driver import checked
from mla_numba.host.tensor_map import encode
from mla_numba.kernels.hopper_config import FIRST_MAP
from verify.levels import on_hopper
from verify.ptx_effects import EFFECTS, Arrays, Effect

# A kernel that waits for ever ends with the process alone.
pytestmark = [*on_hopper(), pytest.mark.timeout(60, method="thread")]


def _attributes(effect: Effect) -> list[driver.CUlaunchAttribute]:
    attributes = []
    if effect.cluster_size > 1:
        cluster = driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = effect.cluster_size, 1, 1
        attributes.append(cluster)
    if effect.num_launches > 1:
        programmatic = driver.CUlaunchAttribute()
        programmatic.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        programmatic.value.programmaticStreamSerializationAllowed = 1
        attributes.append(programmatic)
    return attributes


@cache
def _kernel(effect: Effect) -> driver.CUfunction:
    code, _ = compile_kernel(effect)
    library = checked(driver.cuLibraryLoadData(code, None, None, 0, None, None, 0), "cuLibraryLoadData")
    (kernel,) = checked(driver.cuLibraryEnumerateKernels(1, library), "cuLibraryEnumerateKernels")
    return driver.CUfunction(int(kernel))


def _run(effect: Effect, inputs: Arrays) -> Arrays:
    """The arrays after the launch."""
    memory = {name: cuda.to_device(array) for name, array in inputs.items()}
    words: list[int] = []
    maps = []
    for name, array in memory.items():
        address = array.__cuda_array_interface__["data"][0]
        if name not in effect.tensor_maps:
            words.append(address)
            continue
        given = effect.tensor_maps[name]
        encoded = np.frombuffer(encode(given.dtype, address, given.sizes, given.strides, given.box), np.uint64)
        if effect.map_is_parameter:
            words += [0] * FIRST_MAP + encoded.tolist()
        else:
            maps.append(cuda.to_device(encoded))
            words.append(maps[-1].__cuda_array_interface__["data"][0])
    arguments = np.array(words, np.uint64)
    pointers = arguments.ctypes.data + 8 * np.arange(len(words), dtype=np.uint64)

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = effect.num_blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = effect.num_threads, 1, 1
    config.sharedMemBytes = effect.smem_bytes
    config.attrs = _attributes(effect)
    config.numAttrs = len(config.attrs)
    for _ in range(effect.num_launches):
        checked((*driver.cuLaunchKernelEx(config, _kernel(effect), pointers.ctypes.data, 0), None), "cuLaunchKernelEx")
    return {name: array.copy_to_host() for name, array in memory.items()}


@pytest.mark.parametrize("effect", EFFECTS.values(), ids=EFFECTS)
def test_effect(effect: Effect) -> None:
    for seed in range(3):
        inputs = effect.inputs(np.random.default_rng(seed))
        effect.check(inputs, _run(effect, inputs))
