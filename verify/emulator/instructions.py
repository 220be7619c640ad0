"""`mla_numba.ptx` by other means: every intrinsic under its own name, with the PTX ISA's meaning, for the thread whose turn it is.

The sections are in the docstrings of `mla_numba.ptx`, which these functions stand in for.
"""

import math
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mla_numba import ptx as real

from . import tma
from .barriers import MBarrier, mbarrier, named_barrier
from .clocks import known_to
from .copies import copies_of
from .findings import Finding
from .machine import WARP, Block, Machine, Thread, Warp
from .registers import UNINITIALISED, Registers
from .tensor_core import tensor_of

f32 = np.float32
WORD = 0xFFFFFFFF
_FLOAT, _BITS = struct.Struct("<f"), struct.Struct("<I")
L2_POLICIES = {"evict_first": real.EVICT_FIRST, "evict_last": real.EVICT_LAST, "evict_normal": real.EVICT_NORMAL}
# The rank of the block whose shared memory an address is of, above the bits that shared memory needs: so the compiler makes them
# (`LEA R5, SR_CgaCtaId, 0x400, 0x18` in the machine code of any kernel with shared memory).
RANK_SHIFT = 24


def signed(value: int) -> int:
    value &= WORD
    return value - (1 << 32) if value >> 31 else value


class Instructions:
    """The intrinsics, bound to a machine."""

    matrix_descriptor = staticmethod(real.matrix_descriptor)
    EVICT_FIRST, EVICT_LAST, EVICT_NORMAL = real.EVICT_FIRST, real.EVICT_LAST, real.EVICT_NORMAL

    def __init__(self, machine: Machine, tensor_maps: dict[int, tma.TensorMap]):
        self._machine = machine
        self._maps = tensor_maps

    def _line(self) -> int:
        """Of the kernel's call of the instruction that asks."""
        return self._machine.lines.number(sys._getframe(2))

    def _own(self, address: int) -> int:
        """Where in the block's own shared memory an address is."""
        block, address = self._machine.current.block, int(address) & WORD
        if address >> RANK_SHIFT != block.rank:
            raise Finding("out of bounds", f"{block.name} uses {address:#x} as its own shared memory, block {address >> RANK_SHIFT}'s")
        return address & ((1 << RANK_SHIFT) - 1)

    def _barrier(self, address: int) -> MBarrier:
        return mbarrier(self._machine.current.block, self._own(address))

    # Arithmetic.

    def ex2(self, x: Any) -> Any:
        if self._machine.timing is not None:
            self._machine.timing.spend(self._machine.current.warp, "ex2")
        try:
            y = f32(math.pow(2.0, float(x)))
        except OverflowError:
            return f32(np.inf)
        # Flushed to zero below the normal range.
        return y if y >= 2.0 ** -126 or y != y else f32(0)

    def lg2_approx(self, x: Any) -> Any:
        x = f32(x)
        # Subnormals are flushed to zero.
        return f32(np.log2(x)) if x >= 2.0 ** -126 or x != x else f32(-np.inf if abs(x) < 2.0 ** -126 else np.nan)

    def rcp_approx(self, x: Any) -> Any:
        x = f32(x)
        with np.errstate(divide="ignore"):
            # Subnormals are flushed to zero, with their sign.
            y = f32(1) / (f32(np.copysign(0, x)) if abs(x) < 2.0 ** -126 else x)
        return f32(np.copysign(0, y)) if abs(y) < 2.0 ** -126 else y

    def mul_rn(self, a: Any, b: Any) -> Any:
        return f32(a) * f32(b)

    def fma_rn(self, a: Any, b: Any, c: Any) -> Any:
        # The product of two floats is exact in 53 bits; the sum rounds once more there, by less than a float32 can show but in ties.
        return f32(float(a) * float(b) + float(c))

    def cvt_bf16x2(self, high: Any, low: Any) -> int:
        return _bfloat16(high) << 16 | _bfloat16(low)

    def cvt_f16x2(self, high: Any, low: Any) -> int:
        return int(f32(high).astype(np.float16).view(np.uint16)) << 16 | int(f32(low).astype(np.float16).view(np.uint16))

    def bits_of_f32(self, x: Any) -> int:
        return _bits(x)

    def f32_of_bits(self, bits: int) -> Any:
        (x,) = _FLOAT.unpack(_BITS.pack(int(bits) & WORD))
        return f32(x)

    def prmt(self, a: int, b: int, selector: int) -> int:
        given = np.array([int(a) & WORD, int(b) & WORD], np.uint32).view(np.uint8)
        digits = [int(selector) >> 4 * i & 0xF for i in range(4)]
        # Digits from 8 on repeat a byte's sign. No kernel asks for that, and no GPU was asked what it does.
        if max(digits) > 7:
            raise NotImplementedError(f"prmt selects by {int(selector):#06x}, which asks for signs of bytes")
        return int(given[digits].view(np.uint32)[0])

    def opaque_b32(self, value: Any) -> int:
        return int(value) & WORD

    # mbarriers.

    def mbarrier_init(self, mbar_smem: int, count: int) -> None:
        thread = self._machine.current
        block, address = thread.block, self._own(mbar_smem)
        if address in block.mbarriers:
            raise Finding("barrier", f"the mbarrier at {address:#x} is initialised again")
        if not 0 < count < 2 ** 20:
            raise Finding("barrier", f"an mbarrier for {count} arrivals: it takes 1 .. 2^20 - 1")
        block.smem.hold_barrier(address, True)
        block.mbarriers[address] = MBarrier(block, address, int(count), thread)

    def mbarrier_inval(self, mbar_smem: int) -> None:
        block = self._machine.current.block
        self._barrier(mbar_smem).require_made(self._machine.current)
        self._barrier(mbar_smem).require_idle(self._own(mbar_smem))
        block.smem.hold_barrier(self._own(mbar_smem), False)
        del block.mbarriers[self._own(mbar_smem)]

    def fence_mbarrier_init(self) -> None:
        thread = self._machine.current
        for barrier in self._show_barriers():
            # To the cluster, when this thread arrives at its barrier.
            barrier.shown_by = thread

    def _show_barriers(self) -> list[MBarrier]:
        """The mbarriers whose initialisation this thread knows of become known to TMA: those that were not before."""
        thread = self._machine.current
        shown = [barrier for barrier in thread.block.mbarriers.values() if not barrier.known_to_async]
        for barrier in shown:
            barrier.require_made(thread)
            barrier.known_to_async = True
        return shown

    def mbarrier_arrive(self, mbar_smem: int) -> None:
        self._barrier(mbar_smem).arrive(self._machine.current)

    def mbarrier_arrive_count(self, mbar_smem: int, count: int) -> None:
        self._barrier(mbar_smem).arrive(self._machine.current, int(count))

    def mbarrier_expect_tx(self, mbar_smem: int, num_bytes: int) -> None:
        self._barrier(mbar_smem).expect(self._machine.current, int(num_bytes))

    def mbarrier_arrive_expect_tx(self, mbar_smem: int, num_bytes: int) -> None:
        barrier = self._barrier(mbar_smem)
        barrier.expect(self._machine.current, int(num_bytes))
        barrier.arrive(self._machine.current)

    def mbarrier_wait_parity(self, mbar_smem: int, parity: int) -> None:
        self._machine.touch()
        self._barrier(mbar_smem).wait(self._machine.current, int(parity))

    mbarrier_wait_parity_cluster = mbarrier_wait_parity

    def mbarrier_test_wait_parity(self, mbar_smem: int, parity: int) -> int:
        self._machine.touch()
        return self._barrier(mbar_smem).test(self._machine.current, int(parity))

    # Named barriers, fences.

    def bar_sync(self, barrier_idx: int, num_threads: int) -> None:
        self.sync_block(int(barrier_idx), int(num_threads), self._line())

    def bar_arrive(self, barrier_idx: int, num_threads: int) -> None:
        line = self._line()

        def arrive(warp: Warp, values: dict[int, tuple[int, int]]) -> None:
            number, count = _same(values, warp)
            named_barrier(warp.block, number).arrive(warp, count, line)

        self._machine.meet("bar.arrive", line, (int(barrier_idx), int(num_threads)), arrive)

    def sync_block(self, number: int, num_threads: int | None, line: int) -> None:
        """bar.sync; `num_threads` None: all of the block."""
        machine = self._machine
        thread = machine.current
        barrier = named_barrier(thread.block, number)
        stamp = machine.meet("bar.sync", line, (number, num_threads),
                             lambda warp, values: barrier.arrive(warp, _same(values, warp)[1], line))
        barrier.wait(thread, stamp)

    def fence_proxy_async_shared(self) -> None:
        thread = self._machine.current
        np.maximum(thread.fenced, thread.clock, out=thread.fenced)
        thread.clock[thread.agent] += 1
        self._show_barriers()

    fence_proxy_async = fence_proxy_async_shared

    def fence_acq_rel_gpu(self) -> None:
        """The thread's relaxed stores from now on release what it knows now."""
        thread = self._machine.current
        thread.released = known_to(thread)
        thread.clock[thread.agent] += 1

    fence_acq_rel_cluster = fence_acq_rel_gpu

    def fence_proxy_tensormap_acquire(self, tensor_map: int) -> None:
        self._map(tensor_map)

    # Memory.

    def smem_address(self, array: Any) -> int:
        return self._machine.current.block.rank << RANK_SHIFT | int(array.address)

    def ld_shared_f32(self, address: int) -> Any:
        return self._load_shared(self._own(address), self._line()).f32[self._own(address) >> 2]

    def ld_shared_i32(self, address: int) -> int:
        return signed(int(self._load_shared(self._own(address), self._line()).u32[self._own(address) >> 2]))

    def _load_shared(self, address: int, line: int) -> Any:
        self._machine.touch()
        thread = self._machine.current
        thread.block.smem.read(thread, address, 1, line)
        return thread.block.smem

    def st_shared_f32(self, address: int, value: Any) -> None:
        self._store_shared(self._own(address), self._line()).f32[self._own(address) >> 2] = f32(value)

    def st_shared_i32(self, address: int, value: int) -> None:
        self._store_shared(self._own(address), self._line()).u32[self._own(address) >> 2] = int(value) & WORD

    def _store_shared(self, address: int, line: int) -> Any:
        self._machine.touch()
        thread = self._machine.current
        thread.block.smem.write(thread, address, 1, line)
        return thread.block.smem

    def st_shared_v4_b32(self, address: int, a: int, b: int, c: int, d: int) -> None:
        self._machine.touch()
        thread = self._machine.current
        first = thread.block.smem.write(thread, self._own(address), 4, self._line())
        thread.block.smem.u32[first:first + 4] = (a, b, c, d)

    def ld_shared_v4_b32(self, registers: Registers, first: int, address: int) -> None:
        self._machine.touch()
        thread = self._machine.current
        word = thread.block.smem.read(thread, self._own(address), 4, self._line())
        _fill(registers, first, thread.block.smem.u32[word:word + 4].tolist())

    def ldmatrix_x4(self, registers: Registers, first: int, row_smem: int) -> None:
        self._load_matrices(registers, first, row_smem, False, self._line())

    def ldmatrix_x4_trans(self, registers: Registers, first: int, row_smem: int) -> None:
        self._load_matrices(registers, first, row_smem, True, self._line())

    def _load_matrices(self, registers: Registers, first: int, row_smem: int, transposed: bool, line: int) -> None:
        def load(warp: Warp, values: dict[int, int]) -> dict[int, list[int]]:
            rows = warp.block.smem.read_rows(warp.threads, _matrix_rows(values, warp), line)
            # (matrix, row, column pair) to lanes: lane l has row l / 4, pair l % 4, of every matrix.
            words = _transposed(rows, transposed).view(np.uint32).reshape(4, 32)
            return {lane: words[:, lane].tolist() for lane in range(WARP)}

        _fill(registers, first, self._machine.meet("ldmatrix", line, self._own(row_smem), load))

    def stmatrix_x4(self, row_smem: int, a: int, b: int, c: int, d: int) -> None:
        self._store_matrices((self._own(row_smem), a, b, c, d), False, self._line())

    def stmatrix_x4_trans(self, row_smem: int, a: int, b: int, c: int, d: int) -> None:
        self._store_matrices((self._own(row_smem), a, b, c, d), True, self._line())

    def _store_matrices(self, operands: tuple[int, ...], transposed: bool, line: int) -> None:
        def store(warp: Warp, values: dict[int, tuple[int, ...]]) -> None:
            smem = warp.block.smem
            rows = _matrix_rows({lane: value[0] for lane, value in values.items()}, warp)
            smem.write_rows(warp.threads, rows, line)
            words = np.array([values[lane][1:] for lane in range(WARP)], np.uint32)
            smem.rows[rows] = _transposed(np.ascontiguousarray(words.T).view(np.uint16).reshape(32, 8), transposed)

        self._machine.meet("stmatrix", line, operands, store)

    def movmatrix_trans(self, value: int) -> int:
        def move(_: Warp, values: dict[int, int]) -> dict[int, int]:
            matrix = np.array([values[lane] for lane in range(WARP)], np.uint32).view(np.uint16).reshape(8, 8)
            return dict(enumerate(np.ascontiguousarray(matrix.T).view(np.uint32).reshape(-1).tolist()))

        result: int = self._machine.meet("movmatrix", self._line(), int(value) & WORD, move)
        return result

    def ld_global_i32(self, address: int) -> int:
        return int(self._load_global(address, 4, self._line(), constant=True).view(np.int32)[0])

    def prefetch_global_l2(self, address: int) -> None:
        self._machine.memory.find(int(address), 1)

    def ld_global_f32(self, address: int) -> Any:
        return self._load_global(address, 4, self._line()).view(np.float32)[0]

    def ld_global_v4_f32(self, registers: Registers, first: int, address: int) -> None:
        _fill(registers, first, self._load_global(address, 16, self._line()).view(np.float32))

    def ld_global_v4_b32(self, registers: Registers, first: int, address: int) -> None:
        _fill(registers, first, self._load_global(address, 16, self._line()).view(np.uint32).tolist())

    def ld_global_v2_b32(self, registers: Registers, first: int, address: int) -> None:
        _fill(registers, first, self._load_global(address, 8, self._line()).view(np.uint32).tolist())

    def _load_global(self, address: int, num_bytes: int, line: int, constant: bool = False) -> np.ndarray:
        self._machine.touch()
        return self._machine.memory.read(self._machine.current, int(address), num_bytes, line, constant=constant)

    def st_global_v4_f32(self, address: int, a: Any, b: Any, c: Any, d: Any) -> None:
        self._store_global(address, np.array((a, b, c, d), np.float32), self._line())

    def st_global_v4_b32(self, address: int, a: int, b: int, c: int, d: int) -> None:
        self._store_global(address, np.array((a, b, c, d), np.uint32), self._line())

    def st_global_v2_b32(self, address: int, a: int, b: int) -> None:
        self._store_global(address, np.array((a, b), np.uint32), self._line())

    def st_global_b32(self, address: int, value: int) -> None:
        self._store_global(address, np.array([int(value) & WORD], np.uint32), self._line())

    def st_global_f32(self, address: int, value: Any) -> None:
        self._store_global(address, np.array([value], np.float32), self._line())

    def _store_global(self, address: int, value: np.ndarray, line: int) -> None:
        self._machine.touch()
        self._machine.memory.write(self._machine.current, int(address), value, line)

    # Words that blocks share.

    def _atomic(self, address: int, change: Callable[[int], int], acquire: bool, release: bool) -> int:
        """Replace a word by what `change` makes of it; returns what was there."""
        self._machine.pause()
        thread = self._machine.current
        word, stamp = self._machine.memory.strong(int(address))
        before = int(word[0])
        after = change(before) & WORD
        if after != before:
            self._machine.idle_polls = 0
        word[0] = after
        if acquire:
            stamp.give(thread)
        if release:
            stamp.take(thread)
        return before

    def atom_add_acq_rel(self, address: int, value: int) -> int:
        return self._atomic(address, lambda before: before + int(value), True, True)

    def atom_add_relaxed(self, address: int, value: int) -> int:
        return self._atomic(address, lambda before: before + int(value), False, False)

    def atom_cas_acq_rel(self, address: int, expected: int, value: int) -> int:
        self._machine.poll()
        return self._atomic(address, lambda before: int(value) if before == int(expected) & WORD else before, True, True)

    def red_add_u32(self, address: int, value: int) -> None:
        self._atomic(address, lambda before: before + int(value), False, True)

    def red_inc_u32(self, address: int, bound: int) -> None:
        self._atomic(address, lambda before: before + 1 if before < int(bound) else 0, False, False)

    def red_add_f32(self, address: int, value: Any) -> None:
        self._machine.pause()
        word, _ = self._machine.memory.strong(int(address))
        number = word.view(np.float32)
        number[0] = number[0] + f32(value)

    def ld_acquire(self, address: int) -> int:
        self._machine.poll()
        word, stamp = self._machine.memory.strong(int(address))
        stamp.give(self._machine.current)
        return int(word[0])

    def st_relaxed(self, address: int, value: int) -> None:
        self._machine.touch()
        word, stamp = self._machine.memory.strong(int(address))
        stamp.replace(self._machine.current.released)
        word[0] = int(value) & WORD
        self._machine.idle_polls = 0

    # Tensor core.

    def make_registers_begin(self, count: int) -> Callable[[Registers], None]:
        def registers_begin(registers: Registers) -> None:
            for i in range(count):
                registers[i] = UNINITIALISED

        return registers_begin

    def make_registers_fence(self, count: int, _element: Any = None) -> Callable[[Registers], None]:
        def registers_fence(registers: Registers) -> None:
            if len(registers) < count:
                raise Finding("out of bounds", f"a fence of {count} registers on an array of {len(registers)}")
            flight = registers.flight
            if flight is not None and flight.pending == 0:
                flight.land(registers, self._machine.current.lane)

        return registers_fence

    def wgmma_fence(self) -> None:
        self._machine.meet("wgmma.fence", self._line(), None, _clean)

    def wgmma_commit_group(self) -> None:
        self._machine.meet("wgmma.commit_group", self._line(), None, lambda warp, _: tensor_of(warp).commit())

    def make_wgmma_wait_group(self, pending: int) -> Callable[[], None]:
        def wgmma_wait_group() -> None:
            line = self._machine.lines.number(sys._getframe(1))
            self._machine.meet("wgmma.wait_group", line, None, lambda warp, _: tensor_of(warp).wait(pending))

        return wgmma_wait_group

    def make_wgmma(self, n: int, dtype: str, a_in_registers: bool = False, b_transposed: bool = False,
                   a_transposed: bool = False) -> Callable[..., None]:
        # It refuses what there is no instruction for.
        real.make_wgmma(n, dtype, a_in_registers, b_transposed, a_transposed)
        machine = self._machine

        def multiply(d: Registers, a: Any, b: int, accumulate: int, line: int) -> None:
            if len(d) != n // 2:
                raise Finding("out of bounds", f"wgmma of n = {n} accumulates into {n // 2} registers; the array has {len(d)}")
            machine.meet("wgmma", line, (d, a, int(b), int(accumulate)),
                         lambda warp, values: tensor_of(warp).issue(values, n, dtype, a_transposed, b_transposed, line))

        if a_in_registers:
            def wgmma(d: Registers, a: Registers, first: int, b: int, accumulate: int) -> None:
                multiply(d, (a, int(first)), b, accumulate, machine.lines.number(sys._getframe(1)))
        else:
            def wgmma(d: Registers, a: int, b: int, accumulate: int) -> None:  # type: ignore[misc]
                multiply(d, int(a), b, accumulate, machine.lines.number(sys._getframe(1)))
        return wgmma

    # TMA.

    def _map(self, address: int) -> tma.TensorMap:
        found = self._maps.get(int(address))
        if found is None:
            raise Finding("out of bounds", f"no tensor map lies at {int(address):#x}")
        return found

    def prefetch_tensormap(self, tensor_map: int) -> None:
        self._map(tensor_map)

    def make_parameter_address(self, idx: int) -> Callable[[], int]:
        """Of a tensor map's first word: where it lies. (No kernel asks for another one.)"""
        def parameter_address() -> int:
            address = int(self._machine.current.block.grid.parameters[idx])
            self._map(address)
            return address

        return parameter_address

    def make_createpolicy(self, priority: str, fraction: float = 1.0) -> Callable[[], int]:
        if fraction != 1.0:
            raise NotImplementedError(f"createpolicy of a fraction of {fraction}: 1 is modelled")
        return lambda: L2_POLICIES[priority]

    def _place(self, tensor_map: int, coordinates: tuple[int, ...], l2_policy: int) -> tuple[tma.TensorMap, tuple[int, ...]]:
        if int(l2_policy) not in L2_POLICIES.values():
            raise Finding("misaligned", f"{int(l2_policy):#x} is no L2 cache policy")
        return self._map(tensor_map), tuple(signed(int(at)) for at in coordinates)

    def tma_load_4d(self, dst_smem: int, tensor_map: int, mbar_smem: int, x: int, y: int, z: int, w: int, l2_policy: int) -> None:
        machine = self._machine
        where = self._place(tensor_map, (x, y, z, w), l2_policy)
        tma.load(machine, machine.current, *where, machine.current.block, self._own(dst_smem), self._barrier(mbar_smem), self._line())

    def tma_load_5d(self, dst_smem: int, tensor_map: int, mbar_smem: int, x: int, y: int, z: int, w: int, v: int, l2_policy: int) -> None:
        machine = self._machine
        where = self._place(tensor_map, (x, y, z, w, v), l2_policy)
        tma.load(machine, machine.current, *where, machine.current.block, self._own(dst_smem), self._barrier(mbar_smem), self._line())

    def tma_load_4d_multicast(self, dst_smem: int, tensor_map: int, mbar_smem: int, x: int, y: int, z: int, w: int, cta_mask: int,
                              l2_policy: int) -> None:
        self._multicast(dst_smem, self._place(tensor_map, (x, y, z, w), l2_policy), mbar_smem, int(cta_mask), self._line())

    def tma_load_5d_multicast(self, dst_smem: int, tensor_map: int, mbar_smem: int, x: int, y: int, z: int, w: int, v: int, cta_mask: int,
                              l2_policy: int) -> None:
        self._multicast(dst_smem, self._place(tensor_map, (x, y, z, w, v), l2_policy), mbar_smem, int(cta_mask), self._line())

    def _multicast(self, dst_smem: int, where: tuple[tma.TensorMap, tuple[int, ...]], mbar_smem: int, cta_mask: int, line: int) -> None:
        machine, address, mbar = self._machine, self._own(dst_smem), self._own(mbar_smem)
        for block in machine.current.block.cluster.blocks:
            if cta_mask >> block.rank & 1:
                tma.load(machine, machine.current, *where, block, address, mbarrier(block, mbar), line)

    def tma_prefetch_4d(self, tensor_map: int, x: int, y: int, z: int, w: int, l2_policy: int) -> None:
        self._place(tensor_map, (x, y, z, w), l2_policy)

    def tma_store_4d(self, src_smem: int, tensor_map: int, x: int, y: int, z: int, w: int) -> None:
        where = self._place(tensor_map, (x, y, z, w), real.EVICT_NORMAL)
        if min(where[1]) < 0:
            raise Finding("out of bounds", f"a store to {where[1]}: TMA stores to no negative coordinates")
        thread = self._machine.current
        copies = copies_of(thread, "bulk")
        copies.begun += 1
        copies.begin(tma.Store(self._machine, thread, *where, self._own(src_smem), copies.begun, self._line()))

    def cp_async_bulk_commit_group(self) -> None:
        copies_of(self._machine.current, "bulk").commit()

    def make_cp_async_bulk_wait_group(self, pending: int, read: bool = False) -> Callable[[], None]:
        return lambda: copies_of(self._machine.current, "bulk").wait(pending, read)

    # Copies by threads.

    def cp_async_16(self, dst_smem: int, src: int) -> None:
        self._copy(self._own(dst_smem), int(src), 16, self._line())

    def cp_async_16_zfill(self, dst_smem: int, src: int, num_bytes: int) -> None:
        self._copy(self._own(dst_smem), int(src), int(num_bytes), self._line())

    def _copy(self, address: int, src: int, num_bytes: int, line: int) -> None:
        if not 0 <= num_bytes <= 16:
            raise Finding("out of bounds", f"cp.async of {num_bytes} bytes: it copies up to 16")
        thread = self._machine.current
        copies = copies_of(thread, "cp.async")
        copies.begun += 1
        first = thread.block.smem.require_row(address) * 4
        thread.block.smem.async_write(thread, thread.copy_agent, copies.begun, np.arange(first, first + 4), line, async_proxy=False)
        copies.begin(_RowCopy(self._machine, thread, first // 4, src, num_bytes, line))

    def cp_async_commit_group(self) -> None:
        copies_of(self._machine.current, "cp.async").commit()

    def make_cp_async_wait_group(self, pending: int) -> Callable[[], None]:
        return lambda: copies_of(self._machine.current, "cp.async").wait(pending)

    def cp_async_mbarrier_arrive_noinc(self, mbar_smem: int) -> None:
        barrier = self._barrier(mbar_smem)
        barrier.require_made(self._machine.current)
        copies_of(self._machine.current, "cp.async").arrive(barrier)

    # The cluster.

    def cluster_ctarank(self) -> int:
        return self._machine.current.block.rank

    def mapa_shared_cluster(self, address: int, cta_rank: int) -> int:
        if not 0 <= int(cta_rank) < self._machine.current.block.grid.cluster_size:
            raise Finding("out of bounds", f"block {int(cta_rank)} of a cluster of {self._machine.current.block.grid.cluster_size}")
        return int(cta_rank) << RANK_SHIFT | self._own(address)

    def _of_cluster(self, address: int) -> tuple[Block, int]:
        """The block that an address of the cluster's shared memory is in, and where there."""
        rank, address = int(address) >> RANK_SHIFT, int(address) & ((1 << RANK_SHIFT) - 1)
        return self._machine.current.block.cluster.blocks[rank], address

    def barrier_cluster_arrive(self) -> None:
        self._arrive_at_cluster(lambda thread: thread.block.cluster.stamp.take(thread), self._line())

    def barrier_cluster_arrive_relaxed(self) -> None:
        def take(thread: Thread) -> None:
            for barrier in thread.block.mbarriers.values():
                if barrier.shown_by is thread:
                    barrier.stamp_making(thread.block.cluster.stamp)

        self._arrive_at_cluster(take, self._line())

    def _arrive_at_cluster(self, take: Callable[[Thread], None], line: int) -> None:
        thread = self._machine.current
        cluster = thread.block.cluster

        def arrive(warp: Warp, _: Any) -> None:
            for thread in warp.threads:
                take(thread)
            cluster.arrived += len(warp.threads)
            cluster.complete_phase()

        if thread.cluster_phase is not None:
            raise Finding("barrier", f"{thread.describe()} arrives at the cluster's barrier again, and has not waited there")
        thread.cluster_phase = cluster.phase
        self._machine.meet("barrier.cluster.arrive", line, None, arrive)

    def barrier_cluster_wait(self) -> None:
        thread = self._machine.current
        cluster = thread.block.cluster
        if thread.cluster_phase is None:
            raise Finding("barrier", f"{thread.describe()} waits at the cluster's barrier, and has not arrived there")
        while cluster.phase == thread.cluster_phase:
            cluster.waiting.append(thread)
            self._machine.wait(lambda: f"the cluster's barrier ({cluster.arrived} threads have arrived)")
        thread.cluster_phase = None
        cluster.last_stamp.give(thread)

    def mbarrier_arrive_cluster(self, mbar_cluster: int) -> None:
        block, address = self._of_cluster(mbar_cluster)
        mbarrier(block, address).arrive(self._machine.current)

    # Weaker: it hands on less to the other block. What TMA may overwrite after it is known all the same.
    mbarrier_arrive_remote = mbarrier_arrive_cluster

    def st_async_b32(self, address: int, value: int, mbar_cluster: int) -> None:
        machine = self._machine
        block, place = self._of_cluster(address)
        barrier_block, mbar = self._of_cluster(mbar_cluster)
        if barrier_block is not block:
            raise Finding("barrier", "st.async with an mbarrier of another block than its address")
        barrier = mbarrier(block, mbar)
        barrier.require_made(machine.current)
        word, bits = block.smem.require_word(place), int(value) & WORD
        block.smem.async_write(machine.current, barrier.agent, barrier.phase + 1, np.array([word]), self._line(), async_proxy=False)

        def land() -> None:
            block.smem.u32[word] = bits
            barrier.complete_bytes(4)

        machine.later(land)

    def ld_shared_cluster_b32(self, address: int) -> int:
        smem, word = self._load_cluster(address, self._line())
        return int(smem.u32[word])

    def ld_shared_cluster_f32(self, address: int) -> Any:
        smem, word = self._load_cluster(address, self._line())
        return smem.f32[word]

    def _load_cluster(self, address: int, line: int) -> tuple[Any, int]:
        self._machine.touch()
        block, place = self._of_cluster(address)
        return block.smem, block.smem.read(self._machine.current, place, 1, line)

    # The block and the grid.

    def make_setmaxnreg(self, action: str, count: int) -> Callable[[], None]:
        def setmaxnreg() -> None:
            machine = self._machine
            thread = machine.current
            line = machine.lines.number(sys._getframe(1))
            machine.meet("setmaxnreg", line, None, lambda warp, _: _request_registers(warp, action, count))
            while thread.warp.registers != count:
                thread.block.register_queue.append(thread)
                machine.wait(lambda: f"{count} registers a thread")
                _request_registers(thread.warp, action, count)

        return setmaxnreg

    def nounroll(self) -> None:
        """For the assembler."""

    def griddepcontrol_wait(self) -> None:
        machine = self._machine
        thread = machine.current
        grid = thread.block.grid
        grid.waited = True
        if not machine.grids_before_ended(grid):
            grid.waiting.append(thread)
            machine.wait(lambda: "the grids before this one")
        thread.clock[-1] = max(thread.clock[-1], grid.number)

    def griddepcontrol_launch_dependents(self) -> None:
        self._machine.trigger(self._machine.current.block)


class _RowCopy:
    """16 bytes on their way to shared memory."""

    def __init__(self, machine: Machine, thread: Thread, row: int, src: int, num_bytes: int, line: int):
        self._row, self._smem = row, thread.block.smem
        self._bytes = np.zeros(16, np.uint8)
        if src % 16:
            raise Finding("misaligned", f"cp.async from global address {src:#x}, which is no multiple of 16")
        if num_bytes:
            for at in range(0, num_bytes, 4):
                data = machine.memory.read(thread, src + at, 4, line)
                self._bytes[at:min(at + 4, num_bytes)] = data[:num_bytes - at]
        self._written = False

    def read(self) -> None:
        """Global memory has been read."""

    def write(self) -> None:
        if not self._written:
            self._written = True
            self._smem.rows[self._row] = self._bytes.view(np.uint16)


def _fill(registers: Registers, first: int, values: Iterable[Any]) -> None:
    for i, value in enumerate(values):
        registers[first + i] = value


def _transposed(rows: np.ndarray, transposed: bool) -> np.ndarray:
    """Four matrices of eight rows of eight elements, each transposed or not."""
    matrices = rows.reshape(4, 8, 8)
    return np.ascontiguousarray(matrices.swapaxes(1, 2) if transposed else matrices).reshape(32, 8)


def _same(values: dict[int, Any], warp: Warp) -> Any:
    first = values[0]
    if any(value != first for value in values.values()):
        raise Finding("divergence", f"the lanes of warp {warp.index} of {warp.block.name} give different operands: "
                      f"{sorted(set(values.values()))}")
    return first


def _clean(warp: Warp, _: Any) -> None:
    for thread in warp.threads:
        for array in thread.dirty:
            array.dirty = False
        thread.dirty.clear()


def _matrix_rows(values: dict[int, int], warp: Warp) -> np.ndarray:
    """Row indices of the addresses that the lanes give."""
    addresses = np.array([values[lane] for lane in range(WARP)])
    if (addresses % 16).any():
        raise Finding("misaligned", f"warp {warp.index} gives ldmatrix or stmatrix a row at {int(addresses[addresses % 16 != 0][0]):#x}")
    if addresses.max() + 16 > warp.block.smem.num_bytes:
        raise Finding("out of bounds", f"a matrix row at shared address {int(addresses.max()):#x}; the block has "
                      f"{warp.block.smem.num_bytes:#x}")
    return addresses >> 4


def _request_registers(warp: Warp, action: str, count: int) -> None:
    """Give registers back to the block's pool, or take some if there are enough."""
    if warp.registers == count:
        return
    if (count > warp.registers) != (action == "inc") or count % 8 or not 24 <= count <= 256:
        raise Finding("registers", f"setmaxnreg.{action} to {count} by warp {warp.index}, which has {warp.registers}")
    block = warp.block
    needed = (count - warp.registers) * WARP
    if needed <= block.free_registers:
        block.free_registers -= needed
        warp.registers = count
        queue, block.register_queue = block.register_queue, []
        block.machine.wake(queue)


def _bits(value: Any) -> int:
    """Of a float32."""
    (bits,) = _BITS.unpack(_FLOAT.pack(value))
    return int(bits)


def _bfloat16(value: Any) -> int:
    """Bits of a float32 rounded to nearest even."""
    bits = _bits(value)
    if bits & 0x7FFFFFFF > 0x7F800000:
        return 0x7FFF
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
