"""A cache of more than 2^31 elements: addresses are computed in 64 bits."""

from dataclasses import replace

import numpy as np
import pytest

import mla_numba
from verify.cases import DTYPES, MLACase
from verify.checks import assert_same_results
from verify.targets import ours, simulator

CASE = MLACase(seq_lens=(500, 65, 0), num_heads_q=16, pages="shuffled", spare_pages=0, seed=1)
NUM_PAGES = 2 ** 31 // (CASE.page_size * CASE.head_dim_qk) + 100


def _large_cache(backend: str, pages: np.ndarray, ids: np.ndarray):
    """`pages` at places `ids` of a cache full of NaN (GPU) or of zeros (CPU, where memory that nobody writes costs nothing)."""
    shape = (NUM_PAGES, *pages.shape[1:])
    if backend == "cpu":
        cache = np.zeros(shape, DTYPES["bfloat16"])
        cache[ids] = pages
        return cache
    from numba import cuda

    cache = cuda.device_array(shape, np.uint16)
    cuda.cudadrv.driver.device_memset(cache, 0xFF, cache.nbytes)
    for page, place in zip(pages, ids, strict=True):
        cache[place].copy_to_device(np.ascontiguousarray(page.view(np.uint16)))
    return cache


@pytest.mark.skipif(simulator(), reason="the simulator has no such memory")
@pytest.mark.parametrize("backend", [pytest.param(name, marks=pytest.mark.l0 if name == "cpu" else pytest.mark.l1)
                                     for name in mla_numba.available_backends()])
def test_pages_beyond_2_31_elements(backend: str) -> None:
    target, inputs = ours(backend), CASE.build()
    ids = np.linspace(0, NUM_PAGES - 1, len(inputs.kv_cache)).astype(np.int64)
    table = np.where(inputs.block_table < len(ids), ids[inputs.block_table.clip(0, len(ids) - 1)], -1).astype(np.int32)
    large = replace(inputs, kv_cache=_large_cache(backend, inputs.kv_cache, ids), block_table=table)
    assert_same_results(target(large), target(inputs), "a larger cache")
