"""The emulator's rules, each on a kernel of a few lines: what is broken is found, and what is in order is not. Levels: l0."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import cuda as numba_cuda
from numba.cuda import types

pytestmark = pytest.mark.l0
if numba_cuda.config.ENABLE_CUDASIM:
    pytest.skip("the emulator takes Numba's own types", allow_module_level=True)

from verify.emulator.device import EmulatedGpu  # noqa: E402
from verify.emulator.effects import run as run_effect  # noqa: E402
from verify.emulator.findings import Finding  # noqa: E402
from verify.emulator.tma import TensorMap  # noqa: E402
from verify.ptx_effects import EFFECTS, Effect  # noqa: E402

MBAR, DATA = 1024, 2048     # shared addresses, from the block's dynamic memory on
NUM_THREADS, SMEM_BYTES = 64, 48 * 1024
SEEDS = range(5)
f32 = np.float32


class Kit:
    """What a kernel under test is made of."""

    def __init__(self, seed: int):
        self.gpu = EmulatedGpu(seed)
        self.gpu.machine.kernel_files.add(__file__)
        self.cuda, self.ptx = self.gpu.language.cuda, self.gpu.ptx
        memory = self.gpu.machine.memory
        self.input = memory.add("input", np.zeros(16 * 1024, np.uint8))
        self.output = memory.add("output", np.zeros(16 * 1024, np.uint8), writable=True, written=False)
        self.words = memory.add("words", np.zeros(64, np.uint8), writable=True)
        self.map = memory.add("map", np.zeros(128, np.uint8))
        self.gpu.maps[self.map] = TensorMap(self.input, (64, 64, 1, 1), (128, 128 * 64, 128 * 64), (64, 64, 1, 1))

    @property
    def thread(self) -> int:
        return int(self.cuda.threadIdx.x)

    def base(self) -> int:
        """Of the block's shared memory, at a multiple of 1,024."""
        return (self.ptx.smem_address(self.cuda.shared.array(0, types.uint8)) + 1023) & ~1023

    def one_mbarrier(self, count: int = 1) -> int:
        mbar = self.base() + MBAR
        if self.thread == 0:
            self.ptx.mbarrier_init(mbar, count)
            self.ptx.fence_mbarrier_init()
        self.cuda.syncthreads()
        return mbar

    def load(self, mbar: int, num_bytes: int = 8192) -> None:
        """A tile by TMA behind the mbarrier."""
        self.ptx.mbarrier_arrive_expect_tx(mbar, num_bytes)
        self.ptx.tma_load_4d(self.base() + DATA, self.map, mbar, 0, 0, 0, 0, self.ptx.EVICT_FIRST)

    def run(self, kernel: Callable[[], None], shape: tuple[int, int, int] = (1, 1, 1), num_threads: int = NUM_THREADS,
            cluster_size: int = 1) -> None:
        self.gpu.machine.launch(kernel, "kernel", shape, num_threads, SMEM_BYTES, 1024, (), programmatic=False, cluster_size=cluster_size,
                                copies=True)
        self.gpu.machine.run()


def _store(k: Kit, place: int, value: float = 1.0) -> None:
    k.ptx.st_shared_f32(k.base() + DATA + 4 * place, f32(value))


def _read(k: Kit, place: int) -> Any:
    return k.ptx.ld_shared_f32(k.base() + DATA + 4 * place)


# Kernels that break a rule: (kind, part of the message, kernel).
BROKEN: dict[str, tuple[str, str, Callable[[Kit], Callable[[], None]]]] = {}
# Kernels that are in order.
HEALTHY: dict[str, Callable[[Kit], Callable[[], None]]] = {}


def broken(kind: str, text: str) -> Callable[..., Any]:
    def register(make: Callable[[Kit], Callable[[], None]]) -> None:
        BROKEN[make.__name__] = kind, text, make
    return register


def healthy(make: Callable[[Kit], Callable[[], None]]) -> None:
    HEALTHY[make.__name__] = make


@broken("race", "nothing orders them")
def two_threads_write(k):
    return lambda: _store(k, 0)


@broken("race", "nothing orders them")
def write_after_read_without_barrier(k):
    def kernel():
        _store(k, k.thread)
        k.cuda.syncthreads()
        _read(k, k.thread ^ 32)
        _store(k, k.thread)
    return kernel


@healthy
def two_shared_arrays_made_in_one_line(k):
    def kernel():
        a, b = k.cuda.shared.array(32, types.float32), k.cuda.shared.array(32, types.float32)
        (a if k.thread < 32 else b)[k.thread & 31] = f32(1)
    return kernel


@healthy
def write_barrier_read_barrier_write(k):
    def kernel():
        for _ in range(2):
            _store(k, k.thread)
            k.cuda.syncthreads()
            _read(k, k.thread ^ 32)
            k.cuda.syncthreads()
    return kernel


@broken("race", "nothing orders them")
def shuffle_is_no_barrier(k):
    def kernel():
        _store(k, k.thread)
        k.cuda.shfl_xor_sync(0xFFFFFFFF, 0, 1)
        _read(k, k.thread ^ 1)
    return kernel


@healthy
def syncwarp_orders_a_warp(k):
    def kernel():
        _store(k, k.thread)
        k.cuda.syncwarp()
        _read(k, k.thread ^ 1)
    return kernel


@broken("race", "nothing orders them")
def syncwarp_orders_no_other_warp(k):
    def kernel():
        _store(k, k.thread)
        k.cuda.syncthreads()
        _store(k, k.thread)
        k.cuda.syncwarp()
        _read(k, k.thread ^ 32)
    return kernel


@broken("race", "nothing orders them")
def arriving_is_not_waiting(k):
    def kernel():
        if k.thread < 32:
            _store(k, k.thread)
            k.ptx.bar_arrive(1, 64)
            _store(k, k.thread)
        else:
            k.ptx.bar_sync(1, 64)
            _read(k, k.thread - 32)
    return kernel


@healthy
def one_warp_arrives_the_other_waits(k):
    def kernel():
        if k.thread < 32:
            _store(k, k.thread)
            k.ptx.bar_arrive(1, 64)
        else:
            k.ptx.bar_sync(1, 64)
            _read(k, k.thread - 32)
    return kernel


@broken("uninitialised", "nobody has written it")
def shared_memory_read_first(k):
    return lambda: _read(k, k.thread)


@broken("uninitialised", "nobody has written it")
def global_memory_read_first(k):
    return lambda: k.ptx.ld_global_f32(k.output + 4 * k.thread)


@broken("registers", "nobody has written")
def register_read_first(k):
    def kernel():
        array = k.cuda.local.array(4, types.float32)
        k.ptx.ex2(array[0])
    return kernel


@broken("out of bounds", "the block has")
def past_shared_memory(k):
    return lambda: k.ptx.st_shared_f32(k.base() + 2 * SMEM_BYTES, f32(0))


@broken("out of bounds", "past the end of output")
def past_a_buffer(k):
    return lambda: k.ptx.st_global_f32(k.output + 16 * 1024 + 4 * k.thread, f32(0))


@broken("out of bounds", "is an input")
def input_written(k):
    return lambda: k.ptx.st_global_f32(k.input, f32(0))


@broken("out of bounds", "no negative coordinates")
def store_before_the_tensor(k):
    def kernel():
        if k.thread == 0:
            k.ptx.tma_store_4d(k.base() + DATA, k.map, 0, -8, 0, 0)
    return kernel


@broken("misaligned", "no multiple of 4")
def odd_address(k):
    return lambda: k.ptx.st_shared_f32(k.base() + 2, f32(0))


@broken("misaligned", "no multiple of 16")
def odd_vector(k):
    return lambda: k.ptx.st_global_v4_f32(k.output + 4, f32(0), f32(0), f32(0), f32(0))


def _store_matrices(k: Kit, row: int) -> None:
    k.ptx.stmatrix_x4(k.base() + DATA + 16 * row, 0, 0, 0, 0)


@healthy
def matrices_stored_read_and_stored_again(k):
    def kernel():
        for _ in range(2):
            _store_matrices(k, k.thread)
            k.cuda.syncthreads()
            _read(k, 4 * (k.thread ^ 32))
            k.cuda.syncthreads()
    return kernel


@broken("race", "nothing orders them")
def two_lanes_store_one_row_of_a_matrix(k):
    return lambda: _store_matrices(k, k.thread & ~1)


@broken("race", "nothing orders them")
def two_warps_store_one_matrix(k):
    return lambda: _store_matrices(k, k.thread & 31)


def _stored_after_a_read(k: Kit, read_again: bool) -> Callable[[], None]:
    """Warp 0 stores matrices after warp 1 has read them, of which only time tells; before that, perhaps, it reads them itself."""
    def kernel():
        _store_matrices(k, k.thread)
        k.cuda.syncthreads()
        if k.thread >= 32:
            _read(k, 4 * (k.thread - 32))
            k.cuda.syncwarp()
            if k.thread == 32:
                k.ptx.st_relaxed(k.words, 1)
        else:
            while k.ptx.ld_acquire(k.words) == 0:
                pass
            if read_again:
                _read(k, 4 * k.thread)
            _store_matrices(k, k.thread)
    return kernel


@broken("race", "reads it at")
def matrix_stored_over_what_another_warp_read(k):
    return _stored_after_a_read(k, False)


@broken("race", "reads it at")
def matrix_stored_over_what_another_warp_and_its_own_read(k):
    return _stored_after_a_read(k, True)


@broken("race", "reads it at")
def matrix_stored_over_what_tma_reads(k):
    k.gpu.maps[k.map] = TensorMap(k.output, (64, 64, 1, 1), (128, 128 * 64, 128 * 64), (64, 64, 1, 1))

    def kernel():
        for i in range(8):
            _store_matrices(k, 64 * i + k.thread)
        k.ptx.fence_proxy_async_shared()
        k.cuda.syncthreads()
        if k.thread == 0:
            k.ptx.tma_store_4d(k.base() + DATA, k.map, 0, 0, 0, 0)
            k.ptx.cp_async_bulk_commit_group()
        if k.thread < 32:
            k.cuda.syncwarp()
            _store_matrices(k, k.thread)
    return kernel


@broken("barrier", "an mbarrier lies at")
def matrix_stored_over_an_mbarrier(k):
    def kernel():
        mbar = k.one_mbarrier()
        k.ptx.stmatrix_x4(mbar + 16 * k.thread, 0, 0, 0, 0)
    return kernel


def _stored_while_multiplied(k: Kit, row: int, column: int) -> Callable[[], None]:
    """Warp 1 stores two columns in a row of a transposed A, of whose 64 columns each warp multiplies 16, once its own wgmma has ended."""
    wgmma, wait, fence = k.ptx.make_wgmma(8, "bfloat16", a_transposed=True), k.ptx.make_wgmma_wait_group(0), k.ptx.make_registers_fence(4)

    def kernel():
        d_rmem = k.cuda.local.array(4, types.float32)
        for i in range(8):
            _store_matrices(k, 64 * i + k.thread)
        k.ptx.fence_proxy_async_shared()
        k.cuda.syncthreads()
        # A: 64 rows of 128 bytes; B is the first 8 of them.
        descriptor = k.ptx.matrix_descriptor(1024) | k.base() + DATA >> 4
        k.ptx.wgmma_fence()
        wgmma(d_rmem, descriptor, descriptor, 0)
        k.ptx.wgmma_commit_group()
        wait()
        fence(d_rmem)
        if k.thread == 32:
            _store(k, 32 * row + (column // 2 ^ 4 * (row % 8)))
    return kernel


@healthy
def own_columns_of_transposed_a_stored(k):
    return _stored_while_multiplied(k, 12, 20)


@healthy
def rows_past_transposed_a_stored(k):
    return _stored_while_multiplied(k, 16, 4)


@broken("race", "reads it at")
def another_warps_columns_of_transposed_a_stored(k):
    return _stored_while_multiplied(k, 12, 4)


@broken("misaligned", "ldmatrix or stmatrix")
def odd_matrix_row(k):
    return lambda: k.ptx.ldmatrix_x4(k.cuda.local.array(4, types.uint32), 0, k.base() + 8)


@broken("out of bounds", "global address")
def box_outside_of_a_tensor_that_lies_nowhere(k):
    k.gpu.maps[k.map] = TensorMap(16, (64, 64, 1, 1), (128, 128 * 64, 128 * 64), (64, 64, 1, 1))

    def kernel():
        mbar = k.one_mbarrier()
        if k.thread == 0:
            k.ptx.mbarrier_arrive_expect_tx(mbar, 8192)
            k.ptx.tma_load_4d(k.base() + DATA, k.map, mbar, 0, 0, 0, -1, k.ptx.EVICT_FIRST)
    return kernel


@broken("misaligned", "no multiple of 128")
def odd_box(k):
    def kernel():
        mbar = k.one_mbarrier()
        if k.thread == 0:
            k.ptx.tma_load_4d(k.base() + DATA + 64, k.map, mbar, 0, 0, 0, 0, k.ptx.EVICT_FIRST)
    return kernel


@broken("race", "TMA behind the mbarrier")
def tile_read_before_it_came(k):
    def kernel():
        mbar = k.one_mbarrier()
        if k.thread == 0:
            k.load(mbar)
            _read(k, 0)
    return kernel


@healthy
def tile_awaited(k):
    def kernel():
        mbar = k.one_mbarrier()
        if k.thread == 0:
            k.load(mbar)
        k.ptx.mbarrier_wait_parity(mbar, 0)
        _read(k, k.thread)
    return kernel


@broken("race", "TMA behind the mbarrier")
def tile_over_data_being_read(k):
    def kernel():
        mbar = k.one_mbarrier()
        _store(k, k.thread)
        k.ptx.fence_proxy_async_shared()
        k.cuda.syncthreads()
        _read(k, k.thread)
        if k.thread == 0:
            k.load(mbar)
        k.ptx.mbarrier_wait_parity(mbar, 0)
    return kernel


@broken("race", "nothing orders them")
def tile_over_stores_without_a_proxy_fence(k):
    def kernel():
        mbar = k.one_mbarrier()
        _store(k, k.thread)
        k.cuda.syncthreads()
        if k.thread == 0:
            k.load(mbar)
        k.ptx.mbarrier_wait_parity(mbar, 0)
    return kernel


@healthy
def fence_by_the_issuing_thread_after_the_barrier(k):
    def kernel():
        mbar = k.one_mbarrier()
        _store(k, k.thread)
        k.cuda.syncthreads()
        if k.thread == 0:
            k.ptx.fence_proxy_async_shared()
            k.load(mbar)
        k.ptx.mbarrier_wait_parity(mbar, 0)
    return kernel


@broken("deadlock", "bytes missing")
def more_bytes_expected_than_come(k):
    def kernel():
        mbar = k.one_mbarrier()
        if k.thread == 0:
            k.load(mbar, 8192 + 16)
        k.ptx.mbarrier_wait_parity(mbar, 0)
    return kernel


@broken("barrier", "waits for 16 bytes")
def block_ends_before_its_bytes(k):
    def kernel():
        mbar = k.one_mbarrier()
        if k.thread == 0:
            k.ptx.mbarrier_arrive_expect_tx(mbar, 16)
    return kernel


@broken("barrier", "nothing orders them")
def mbarrier_used_before_it_is_seen(k):
    def kernel():
        mbar = k.base() + MBAR
        if k.thread == 0:
            k.ptx.mbarrier_init(mbar, NUM_THREADS)
        while mbar not in k.gpu.machine.current.block.mbarriers:
            k.gpu.machine.pause()
        k.ptx.mbarrier_arrive(mbar)
    return kernel


@broken("barrier", "no mbarrier has been initialised")
def mbarrier_without_initialisation(k):
    return lambda: k.ptx.mbarrier_arrive(k.base() + MBAR)


@broken("barrier", "an mbarrier lies at")
def mbarrier_overwritten(k):
    def kernel():
        mbar = k.one_mbarrier()
        if k.thread == 1:
            k.ptx.st_shared_f32(mbar, f32(0))
    return kernel


@broken("deadlock", "wait for phase 0")
def one_arrival_too_few(k):
    def kernel():
        mbar = k.one_mbarrier(NUM_THREADS + 1)
        k.ptx.mbarrier_arrive(mbar)
        k.ptx.mbarrier_wait_parity(mbar, 0)
    return kernel


@broken("barrier", "phase overrun")
def phase_overrun(k):
    def kernel():
        mbar = k.one_mbarrier()
        if k.thread == 0:
            # Until thread 32 waits.
            other = k.gpu.machine.current.block.threads[32]
            while other.waits_for is None or "mbarrier" not in other.waits_for():
                k.gpu.machine.pause()
            k.ptx.mbarrier_arrive(mbar)
            k.ptx.mbarrier_arrive(mbar)
        elif k.thread == 32:
            k.ptx.mbarrier_wait_parity(mbar, 0)
    return kernel


@broken("barrier", "before the others have")
def barrier_twice_by_one_warp(k):
    def kernel():
        if k.thread < 32:
            k.ptx.bar_arrive(1, 64)
            k.ptx.bar_arrive(1, 64)
    return kernel


@broken("barrier", "is for 64 threads to those who are there, for 32")
def barrier_of_two_counts(k):
    def kernel():
        if k.thread < 32:
            k.ptx.bar_arrive(1, 64)
        k.cuda.syncthreads()
        if k.thread >= 32:
            k.ptx.bar_sync(1, 32)
    return kernel


@broken("barrier", "there are 16")
def barrier_17(k):
    return lambda: k.ptx.bar_sync(17, 64)


@broken("deadlock", "barrier 1 (32 of 64 threads have arrived)")
def barrier_that_half_reach(k):
    def kernel():
        if k.thread < 32:
            k.ptx.bar_sync(1, 64)
    return kernel


@broken("divergence", "while lanes")
def lanes_at_different_collectives(k):
    def kernel():
        if k.thread & 1:
            k.cuda.any_sync(0xFFFFFFFF, True)
        else:
            k.cuda.shfl_xor_sync(0xFFFFFFFF, 0, 1)
    return kernel


@broken("divergence", "while lanes")
def lanes_at_different_collectives_of_one_line(k):
    return lambda: k.cuda.shfl_xor_sync(0xFFFFFFFF, 0, 1) if k.thread & 1 else k.cuda.shfl_xor_sync(0xFFFFFFFF, 0, 2)


@broken("divergence", "has ended")
def collective_after_lanes_ended(k):
    def kernel():
        if k.thread & 1:
            k.cuda.shfl_xor_sync(0xFFFFFFFF, 0, 2)
    return kernel


@broken("divergence", "has ended")
def matrix_moved_by_half_a_warp(k):
    def kernel():
        if k.thread & 1:
            k.ptx.movmatrix_trans(0)
    return kernel


@broken("registers", "setmaxnreg.inc to 40")
def registers_increased_to_fewer(k):
    take = k.ptx.make_setmaxnreg("inc", 40)

    def kernel():
        take()
    return kernel


@broken("race", "nothing orders them")
def blocks_share_a_word(k):
    return lambda: k.ptx.st_global_f32(k.output + 4 * k.thread, f32(0))


@broken("race", "nothing orders them")
def flag_without_release(k):
    def kernel():
        if k.thread == 0:
            if k.cuda.blockIdx.x == 0:
                k.ptx.st_global_f32(k.output, f32(1))
                k.ptx.st_relaxed(k.words, 1)
            else:
                while k.ptx.ld_acquire(k.words) == 0:
                    pass
                k.ptx.ld_global_f32(k.output)
    return kernel


@healthy
def flag_with_release(k):
    def kernel():
        if k.thread == 0:
            if k.cuda.blockIdx.x == 0:
                k.ptx.st_global_f32(k.output, f32(1))
                k.ptx.atom_add_acq_rel(k.words, 1)
            else:
                while k.ptx.ld_acquire(k.words) == 0:
                    pass
                k.ptx.ld_global_f32(k.output)
    return kernel


@broken("deadlock", "polls")
def flag_that_nobody_sets(k):
    def kernel():
        if k.thread == 0:
            while k.ptx.ld_acquire(k.words) == 0:
                pass
    return kernel


def _clustered(k: Kit, shown: bool) -> Callable[[], None]:
    """Each of two blocks arrives at the other one's mbarrier."""
    def kernel():
        mbar = k.base() + MBAR
        if k.thread == 0:
            k.ptx.mbarrier_init(mbar, 1)
            if shown:
                k.ptx.fence_mbarrier_init()
        k.cuda.syncwarp()
        k.ptx.barrier_cluster_arrive_relaxed()
        k.cuda.syncthreads()
        k.ptx.barrier_cluster_wait()
        if k.thread == 0:
            k.ptx.mbarrier_arrive_remote(k.ptx.mapa_shared_cluster(mbar, k.ptx.cluster_ctarank() ^ 1))
        k.ptx.mbarrier_wait_parity(mbar, 0)
        k.ptx.barrier_cluster_arrive_relaxed()
        k.ptx.barrier_cluster_wait()
    return kernel


@healthy
def mbarriers_shown_to_the_cluster(k):
    return _clustered(k, True)


@broken("barrier", "nothing orders them")
def mbarriers_not_shown_to_the_cluster(k):
    return _clustered(k, False)


@broken("out of bounds", "as its own shared memory")
def other_blocks_address_as_its_own(k):
    return lambda: k.ptx.ld_shared_i32(k.ptx.mapa_shared_cluster(k.base() + DATA, k.ptx.cluster_ctarank() ^ 1))


BLOCKS = {"blocks_share_a_word": 2, "flag_without_release": 2, "flag_with_release": 2}
CLUSTERS = ("mbarriers_shown_to_the_cluster", "mbarriers_not_shown_to_the_cluster", "other_blocks_address_as_its_own")


def _run(make: Callable[[Kit], Callable[[], None]], seed: int) -> None:
    kit = Kit(seed)
    # Blocks that wait for each other must be resident together.
    kit.gpu.machine.max_resident = 1000
    cluster_size = 2 if make.__name__ in CLUSTERS else 1
    kit.run(make(kit), (BLOCKS.get(make.__name__, cluster_size), 1, 1), cluster_size=cluster_size)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rule_is_found(name: str) -> None:
    kind, text, make = BROKEN[name]
    for seed in SEEDS:
        with pytest.raises(Finding) as finding:
            _run(make, seed)
        assert finding.value.kind == kind and text in str(finding.value), finding.value
        # Where the thread was, but for what shows only when a block has ended.
        assert name == "block_ends_before_its_bytes" or "at test_l0_emulator_rules.py:" in str(finding.value)


@pytest.mark.parametrize("name", HEALTHY)
def test_kernel_in_order_runs_clean(name: str) -> None:
    for seed in SEEDS:
        _run(HEALTHY[name], seed)


def test_grid_that_does_not_wait_is_found() -> None:
    kit = Kit(0)
    for _ in range(2):
        kit.gpu.machine.launch(lambda: kit.ptx.griddepcontrol_launch_dependents(), "kernel", (2, 1, 1), 32, 0, 0, ())
    with pytest.raises(Finding, match=r"ended without griddepcontrol\.wait"):
        kit.gpu.machine.run()


def test_one_block_of_a_grid_may_wait_for_all() -> None:
    kit = Kit(0)

    def kernel() -> None:
        kit.ptx.griddepcontrol_launch_dependents()
        if kit.cuda.blockIdx.x == 1:
            kit.ptx.griddepcontrol_wait()

    for _ in range(2):
        kit.gpu.machine.launch(kernel, "kernel", (2, 1, 1), 32, 0, 0, ())
    kit.gpu.machine.run()


def test_dependent_grid_may_start_early_and_waits_for_all() -> None:
    """Over some seeds the second grid begins before the first has ended, and after its wait has always seen what it wrote."""
    early = 0
    for seed in range(10):
        kit = Kit(seed)
        first_ended = []

        def first(kit=kit):
            kit.ptx.griddepcontrol_launch_dependents()
            kit.cuda.syncwarp()
            kit.ptx.st_global_f32(kit.output + 4 * (kit.thread + 32 * kit.cuda.blockIdx.x), f32(1))

        def second(kit=kit, seen=first_ended):
            seen.append(kit.gpu.machine.grids[0].ended)
            kit.ptx.griddepcontrol_wait()
            for block in range(2):
                kit.ptx.ld_global_f32(kit.output + 4 * (kit.thread + 32 * block))

        for kernel in (first, second):
            kit.gpu.machine.launch(kernel, kernel.__name__, (2, 1, 1), 32, 0, 0, ())
        kit.gpu.machine.run()
        early += not all(first_ended)
    assert early > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("effect", EFFECTS.values(), ids=EFFECTS)
def test_intrinsic_has_its_effect(effect: Effect, seed: int) -> None:
    """What NumPy says of every intrinsic holds in the emulator, as it does on a GPU (test_l1_ptx)."""
    inputs = effect.inputs(np.random.default_rng(seed))
    effect.check(inputs, run_effect(effect, inputs, seed))
