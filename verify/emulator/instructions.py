"""`mla_numba.ptx` by other means: every intrinsic under its own name, with the PTX ISA's meaning, for the thread whose turn it is.

The sections are in the docstrings of `mla_numba.ptx`, which these functions stand in for.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from mla_numba import ptx as real

from . import tma
from .barriers import MBarrier, mbarrier, named_barrier
from .findings import Finding
from .machine import WARP, Machine, Warp
from .registers import Registers
from .tensor_core import tensor_of

f32 = np.float32
WORD = 0xFFFFFFFF
L2_POLICIES = (real.EVICT_FIRST, real.EVICT_LAST)


def signed(value: int) -> int:
    value &= WORD
    return value - (1 << 32) if value >> 31 else value


class Instructions:
    """The intrinsics, bound to a machine."""

    DESCRIPTOR_K_MAJOR, DESCRIPTOR_MN_MAJOR = real.DESCRIPTOR_K_MAJOR, real.DESCRIPTOR_MN_MAJOR
    EVICT_FIRST, EVICT_LAST = real.EVICT_FIRST, real.EVICT_LAST

    def __init__(self, machine: Machine, tensor_maps: dict[int, tma.TensorMap]):
        self._machine = machine
        self._maps = tensor_maps

    def _line(self) -> int:
        """Of the kernel's call of the instruction that asks."""
        return self._machine.lines.number(sys._getframe(2))

    def _barrier(self, address: int) -> MBarrier:
        return mbarrier(self._machine.current.block, address & WORD)

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

    def mul_rn(self, a: Any, b: Any) -> Any:
        return f32(a) * f32(b)

    def fma_rn(self, a: Any, b: Any, c: Any) -> Any:
        # The product of two floats is exact in 53 bits; the sum rounds once more there, by less than a float32 can show but in ties.
        return f32(float(a) * float(b) + float(c))

    def cvt_bf16x2(self, high: Any, low: Any) -> int:
        return _bfloat16(high) << 16 | _bfloat16(low)

    def cvt_f16x2(self, high: Any, low: Any) -> int:
        return int(f32(high).astype(np.float16).view(np.uint16)) << 16 | int(f32(low).astype(np.float16).view(np.uint16))

    def opaque_b32(self, value: Any) -> int:
        return int(value) & WORD

    # mbarriers.

    def mbarrier_init(self, mbar_smem: int, count: int) -> None:
        thread = self._machine.current
        block, address = thread.block, mbar_smem & WORD
        if address in block.mbarriers:
            raise Finding("barrier", f"the mbarrier at {address:#x} is initialised again")
        if not 0 < count < 2 ** 20:
            raise Finding("barrier", f"an mbarrier for {count} arrivals: it takes 1 .. 2^20 - 1")
        block.smem.hold_barrier(address, True)
        block.mbarriers[address] = MBarrier(block, address, int(count), thread)

    def fence_mbarrier_init(self) -> None:
        self._show_barriers()

    def _show_barriers(self) -> None:
        """The mbarriers whose initialisation this thread knows of become known to TMA."""
        thread = self._machine.current
        for barrier in thread.block.mbarriers.values():
            if not barrier.known_to_async:
                barrier.require_made(thread)
                barrier.known_to_async = True

    def mbarrier_arrive(self, mbar_smem: int) -> None:
        self._barrier(mbar_smem).arrive(self._machine.current)

    def mbarrier_arrive_expect_tx(self, mbar_smem: int, num_bytes: int) -> None:
        barrier = self._barrier(mbar_smem)
        barrier.expect(self._machine.current, int(num_bytes))
        barrier.arrive(self._machine.current)

    def mbarrier_wait_parity(self, mbar_smem: int, parity: int) -> None:
        self._machine.touch()
        self._barrier(mbar_smem).wait(self._machine.current, int(parity))

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
        thread.clock[thread.index] += 1
        self._show_barriers()

    def fence_acq_rel_gpu(self) -> None:
        """Orders what the thread's own release and acquire already order here."""

    def fence_proxy_tensormap_acquire(self, tensor_map: int) -> None:
        self._map(tensor_map)

    # Memory.

    def smem_address(self, array: Any) -> int:
        return int(array.address)

    def ld_shared_f32(self, address: int) -> Any:
        return self._load_shared(address & WORD, self._line()).f32[(address & WORD) >> 2]

    def ld_shared_i32(self, address: int) -> int:
        return signed(int(self._load_shared(address & WORD, self._line()).u32[(address & WORD) >> 2]))

    def _load_shared(self, address: int, line: int) -> Any:
        self._machine.touch()
        thread = self._machine.current
        thread.block.smem.read(thread, address, 1, line)
        return thread.block.smem

    def st_shared_f32(self, address: int, value: Any) -> None:
        self._store_shared(address & WORD, self._line()).f32[(address & WORD) >> 2] = f32(value)

    def st_shared_i32(self, address: int, value: int) -> None:
        self._store_shared(address & WORD, self._line()).u32[(address & WORD) >> 2] = int(value) & WORD

    def _store_shared(self, address: int, line: int) -> Any:
        self._machine.touch()
        thread = self._machine.current
        thread.block.smem.write(thread, address, 1, line)
        return thread.block.smem

    def st_shared_v4_b32(self, address: int, a: int, b: int, c: int, d: int) -> None:
        self._machine.touch()
        thread = self._machine.current
        first = thread.block.smem.write(thread, address & WORD, 4, self._line())
        thread.block.smem.u32[first:first + 4] = (a, b, c, d)

    def ld_shared_v4_b32(self, registers: Registers, first: int, address: int) -> None:
        self._machine.touch()
        thread = self._machine.current
        word = thread.block.smem.read(thread, address & WORD, 4, self._line())
        for i in range(4):
            registers[first + i] = int(thread.block.smem.u32[word + i])

    def ldmatrix_x4(self, registers: Registers, first: int, row_smem: int) -> None:
        line = self._line()

        def load(warp: Warp, values: dict[int, int]) -> dict[int, list[int]]:
            rows = warp.block.smem.read_rows(warp.threads, _matrix_rows(values, warp), line)
            # (matrix, row, column pair) to lanes: lane l has row l / 4, pair l % 4, of every matrix.
            words = np.ascontiguousarray(rows).view(np.uint32).reshape(4, 32)
            return {lane: words[:, lane].tolist() for lane in range(WARP)}

        for i, word in enumerate(self._machine.meet("ldmatrix", line, row_smem & WORD, load)):
            registers[first + i] = word

    def stmatrix_x4(self, row_smem: int, a: int, b: int, c: int, d: int) -> None:
        line = self._line()

        def store(warp: Warp, values: dict[int, tuple[int, ...]]) -> None:
            smem = warp.block.smem
            rows = _matrix_rows({lane: value[0] for lane, value in values.items()}, warp)
            smem.write_rows(warp.threads, rows, line)
            words = np.array([values[lane][1:] for lane in range(WARP)], np.uint32)
            smem.rows[rows] = np.ascontiguousarray(words.T).view(np.uint16).reshape(32, 8)

        self._machine.meet("stmatrix", line, (row_smem & WORD, a, b, c, d), store)

    def ld_global_i32(self, address: int) -> int:
        return int(self._load_global(address, 4, self._line(), constant=True).view(np.int32)[0])

    def ld_global_f32(self, address: int) -> Any:
        return self._load_global(address, 4, self._line()).view(np.float32)[0]

    def ld_global_v4_f32(self, registers: Registers, first: int, address: int) -> None:
        for i, value in enumerate(self._load_global(address, 16, self._line()).view(np.float32)):
            registers[first + i] = value

    def _load_global(self, address: int, num_bytes: int, line: int, constant: bool = False) -> np.ndarray:
        self._machine.touch()
        return self._machine.memory.read(self._machine.current, int(address), num_bytes, line, constant=constant)

    def st_global_v4_f32(self, address: int, a: Any, b: Any, c: Any, d: Any) -> None:
        self._store_global(address, np.array((a, b, c, d), np.float32), self._line())

    def st_global_v4_b32(self, address: int, a: int, b: int, c: int, d: int) -> None:
        self._store_global(address, np.array((a, b, c, d), np.uint32), self._line())

    def st_global_b32(self, address: int, value: int) -> None:
        self._store_global(address, np.array([int(value) & WORD], np.uint32), self._line())

    def st_global_f32(self, address: int, value: Any) -> None:
        self._store_global(address, np.array([value], np.float32), self._line())

    def _store_global(self, address: int, value: np.ndarray, line: int) -> None:
        self._machine.touch()
        self._machine.memory.write(self._machine.current, int(address), value, line)

    def atom_add_acq_rel(self, address: int, value: int) -> int:
        self._machine.pause()
        thread = self._machine.current
        word, stamp = self._machine.memory.strong(int(address))
        before = int(word[0])
        word[0] = (before + int(value)) & WORD
        stamp.give(thread)
        stamp.take(thread)
        return before

    def ld_acquire(self, address: int) -> int:
        self._machine.poll()
        thread = self._machine.current
        word, stamp = self._machine.memory.strong(int(address))
        stamp.give(thread)
        return int(word[0])

    def st_relaxed(self, address: int, value: int) -> None:
        self._machine.touch()
        word, _ = self._machine.memory.strong(int(address))
        word[0] = int(value) & WORD

    # Tensor core.

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

    def make_wgmma(self, n: int, dtype: str, a_in_registers: bool = False, b_transposed: bool = False) -> Callable[..., None]:
        machine = self._machine

        def multiply(d: Registers, a: Any, b: int, accumulate: int, line: int) -> None:
            if len(d) != n // 2:
                raise Finding("out of bounds", f"wgmma of n = {n} accumulates into {n // 2} registers; the array has {len(d)}")
            machine.meet("wgmma", line, (d, a, int(b), int(accumulate)),
                         lambda warp, values: tensor_of(warp).issue(values, n, dtype, b_transposed, line))

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

    def tma_load_4d(self, dst_smem: int, tensor_map: int, mbar_smem: int, x: int, y: int, z: int, w: int, l2_policy: int) -> None:
        if int(l2_policy) not in L2_POLICIES:
            raise Finding("misaligned", f"{int(l2_policy):#x} is no L2 cache policy")
        machine = self._machine
        tma.load(machine, machine.current, self._map(tensor_map), (signed(x), signed(y), signed(z), signed(w)), dst_smem & WORD,
                 self._barrier(mbar_smem), self._line())

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

    def griddepcontrol_wait(self) -> None:
        machine = self._machine
        thread = machine.current
        grid = thread.block.grid
        thread.block.waited = True
        if not machine.grids_before_ended(grid):
            grid.waiting.append(thread)
            machine.wait(lambda: "the grids before this one")
        thread.clock[-1] = max(thread.clock[-1], grid.number)

    def griddepcontrol_launch_dependents(self) -> None:
        self._machine.trigger(self._machine.current.block)


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


def _bfloat16(value: Any) -> int:
    """Bits of a float32 rounded to nearest even."""
    bits = int(f32(value).view(np.uint32))
    if bits & 0x7FFFFFFF > 0x7F800000:
        return 0x7FFF
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
