"""The GPU's plan kernel fills the tables that the host fills. Levels: l1."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from numba import cuda

from mla_numba.arrays import view
from mla_numba.config import DecodeShape
from mla_numba.host import hopper
from mla_numba.host.schedule import make_host_schedule
from verify.levels import on_hopper
from verify.test_l0_scheduler import assert_same_tables, problems

pytestmark = on_hopper()


def _new_words(count, _stream):
    memory = cuda.to_device(np.full(count, 0x5A5A5A5A, np.int32))
    return memory, memory.__cuda_array_interface__["data"][0]


def _check(config, shape, lens, cu_seqlens_q):
    on_device = [None if array is None else view(cuda.to_device(array), "lengths") for array in (lens, cu_seqlens_q)]
    device = hopper.make_schedule(config, shape, *on_device, 0, _new_words, None)
    assert_same_tables(lambda name: device.table(name).copy_to_host(), make_host_schedule(config, shape, lens, cu_seqlens_q))


@given(problems())
def test_device_builds_the_same_tables(problem):
    _check(*problem)


@pytest.mark.parametrize("num_workers", [33, 132, 500])
@pytest.mark.parametrize("batch", [1, 300, 5000])
def test_device_builds_the_same_tables_of_many(batch, num_workers):
    """More requests than threads, more jobs than shared memory holds, more workers than it holds."""
    lens = np.random.default_rng(batch).integers(0, 4096, batch, dtype=np.int32)
    shape = DecodeShape(batch, 1, batch, 16, 1, 576, 512, 64, "bfloat16", True, False)
    config = dataclasses.replace(hopper.schedule_config(shape), num_workers=num_workers)
    _check(config, shape, lens, None)
