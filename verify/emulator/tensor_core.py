"""wgmma: matrices in shared memory by descriptor, fragments in registers, and asynchrony between issue and wait.

Every warp of a warpgroup multiplies its own 16 rows of A, on its own time. Between issue and wait its operands are read at a moment that
chance picks; the accumulator's registers are poison until the wait and a registers fence.
"""

from functools import cache
from typing import Any

import numpy as np

from .findings import Finding
from .machine import Thread, Warp
from .registers import IN_FLIGHT, Registers

K = 16
SWIZZLE_128B = 1


@cache
def accumulator_places(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column), each (32 lanes, n / 2 registers), of D's fragment: PTX ISA 9.7.15.5.1.1, figure of D for m64nNk16."""
    lane, i = np.arange(32)[:, None], np.arange(n // 2)[None, :]
    return lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2


@cache
def _a_places() -> tuple[np.ndarray, np.ndarray]:
    """(row, k), each (32 lanes, 8 elements), of A's fragment in four registers of two elements."""
    lane, element = np.arange(32)[:, None], np.arange(8)[None, :]
    register = element // 2
    return lane // 4 + 8 * (register % 2), 8 * (register // 2) + 2 * (lane % 4) + element % 2


@cache
def _chunk_offsets(count: int, mn_major: bool, leading: int, stride: int) -> np.ndarray:
    """Offsets of an operand's chunks of 8 elements: (count, 2) chunks along k, or (16, count / 8) along the other axis if MN-major.

    With 128-byte swizzle (PTX ISA 9.7.15.5.1): atoms of 8 rows of 128 bytes. K-major, a row is one of the `count` rows and the stride
    offset leads from atom to atom; MN-major, a row is one k, the stride offset leads 8 k on, the leading offset 64 elements on.
    """
    if mn_major:
        k, chunk = np.arange(K)[:, None], np.arange(count // 8)[None, :]
        return chunk // 8 * leading + k // 8 * stride + k % 8 * 128 + chunk % 8 * 16
    row, chunk = np.arange(count)[:, None], np.arange(2)[None, :]
    return row // 8 * stride + row % 8 * 128 + chunk * 16


def operand_rows(descriptor: int, count: int, mn_major: bool) -> np.ndarray:
    """Indices of the 16-byte rows of shared memory that hold an operand."""
    if descriptor >> 62 != SWIZZLE_128B:
        raise Finding("misaligned", f"descriptor {descriptor:#x} has swizzle mode {descriptor >> 62}; here only 128 bytes (1) is modelled")
    start = (descriptor & 0x3FFF) << 4
    addresses = start + _chunk_offsets(count, mn_major, (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4)
    # The swizzle: which of a row's eight chunks, xor which of eight rows, by address bits.
    return (addresses ^ (addresses >> 3 & 0x70)) >> 4


def to_float32(bits: np.ndarray, dtype: str) -> np.ndarray:
    """16-bit elements as float32."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


class Accumulator:
    """D of a warp's 16 rows while wgmma may write it: 32 lanes' arrays of registers as one matrix."""

    def __init__(self, arrays: list[Registers], n: int, uninitialised: bool):
        self._rows, self._columns = accumulator_places(n)
        self.n, self.pending = n, 0
        self.matrix = np.zeros((16, n), np.float32)
        if not uninitialised:
            self.matrix[self._rows, self._columns] = np.array(arrays, np.float32)
        for array in arrays:
            list.__setitem__(array, slice(None), [IN_FLIGHT] * len(array))
            array.flight = self

    def land(self, array: Registers, lane: int) -> None:
        """The values come to a lane's registers."""
        list.__setitem__(array, slice(None), list(self.matrix[self._rows[lane], self._columns[lane]]))
        array.flight = None


class _Multiply:
    """One wgmma of a warp, from issue to completion."""

    def __init__(self, tensor: "WarpTensor", accumulator: Accumulator, a: Any, b_rows: np.ndarray, accumulate: bool, dtype: str,
                 a_mn_major: bool, b_mn_major: bool):
        self._tensor, self.accumulator, self._a, self._b_rows = tensor, accumulator, a, b_rows
        self._accumulate, self._dtype, self._a_mn_major, self._b_mn_major = accumulate, dtype, a_mn_major, b_mn_major
        self._operands: tuple[np.ndarray, np.ndarray] | None = None
        self.done_at = 0.0

    def read(self) -> None:
        """Read the operands, now if not before."""
        if self._operands is not None:
            return
        smem = self._tensor.warp.block.smem
        b = to_float32(smem.rows[self._b_rows], self._dtype)
        b = b.reshape(K, -1) if self._b_mn_major else b.reshape(-1, K).T
        if isinstance(self._a, np.ndarray):
            a = to_float32(smem.rows[self._a], self._dtype)
            a = a.reshape(K, 16).T if self._a_mn_major else a.reshape(16, K)
        else:
            words = np.array([array[first:first + 4] for array, first in self._a], np.uint32)
            a = np.empty((16, K), np.float32)
            a[_a_places()] = to_float32(words.view(np.uint16), self._dtype)
        self._operands = a, b

    def complete(self) -> None:
        self.read()
        a, b = self._operands
        product = a @ b
        matrix = self.accumulator.matrix
        matrix[...] = matrix + product if self._accumulate else product
        self.accumulator.pending -= 1
        if not isinstance(self._a, np.ndarray):
            for array, _ in self._a:
                array.pins -= 1


class WarpTensor:
    """A warp's part of the tensor core: groups of wgmma, in order."""

    def __init__(self, warp: Warp):
        self.warp = warp
        self._open: list[_Multiply] = []
        self._groups: list[list[_Multiply]] = []
        # Groups that the warp has waited for, all there have been.
        self.completed = 0
        # What the four warps of a warpgroup must have in common: the instructions, in order.
        self.issued: list[tuple[Any, ...]] = []

    @property
    def _committed(self) -> int:
        return self.completed + len(self._groups)

    def issue(self, values: dict[int, Any], n: int, dtype: str, a_mn_major: bool, b_mn_major: bool, line: int) -> None:
        """`values` by lane: (D, A as a descriptor or (registers, first), descriptor of B, accumulate)."""
        warp, block = self.warp, self.warp.block
        threads = warp.threads
        _, a, b, accumulate = values[0]
        if any(value[2] != b or bool(value[3]) != bool(accumulate) or (not isinstance(a, tuple) and value[1] != a)
               for value in values.values()):
            raise Finding("divergence", f"the lanes of warp {warp.index} give different descriptors or flags to one wgmma")
        arrays = [values[thread.lane][0] for thread in threads]
        operands = arrays + ([values[thread.lane][1][0] for thread in threads] if isinstance(a, tuple) else [])
        for thread, array in zip(threads * 2, operands, strict=False):
            if array.dirty:
                raise Finding("registers", f"{thread.describe()} wrote registers of a wgmma's operand after its last wgmma.fence")
        self._check_warpgroup((n, dtype, a_mn_major, b_mn_major, isinstance(a, tuple), b, bool(accumulate), line))
        flight = arrays[0].flight
        if any(array.flight is not flight for array in arrays) or (flight is not None and flight.n != n):
            raise Finding("divergence", f"the lanes of warp {warp.index} accumulate into registers of different wgmma")
        if flight is None:
            flight = Accumulator(arrays, n, uninitialised=not accumulate)
        flight.pending += 1
        agent, epoch = block.agent_of_warp(warp.index), self._committed + 1
        b_rows = operand_rows(b, n, b_mn_major)
        smem = block.smem
        _require_inside(smem, b_rows, "B")
        smem.async_read(threads[0], agent, epoch, b_rows.reshape(-1), line)
        if isinstance(a, tuple):
            where: Any = [values[thread.lane][1] for thread in threads]
            for array, _ in where:
                array.pins += 1
        else:
            where, first = operand_rows(a, 64, a_mn_major), 16 * (warp.index % 4)
            where = where[:, first // 8:][:, :2] if a_mn_major else where[first:][:16]
            _require_inside(smem, where, "A")
            smem.async_read(threads[0], agent, epoch, where.reshape(-1), line)
        multiply = _Multiply(self, flight, where, b_rows, bool(accumulate), dtype, a_mn_major, b_mn_major)
        self._open.append(multiply)
        machine = block.machine
        if machine.timing is not None:
            multiply.done_at = machine.timing.multiply(warp, n, a_mn_major or b_mn_major)
        choice = machine.rng.random()
        if choice < 0.4 or machine.timing is not None:
            multiply.read()
        elif choice < 0.7:
            machine.later(multiply.read)

    def commit(self) -> None:
        self._groups.append(self._open)
        self._open = []

    def wait(self, pending: int) -> None:
        """Complete all but the `pending` youngest groups; all lanes know of it."""
        if self._open:
            raise Finding("in flight", f"warp {self.warp.index} waits for wgmma that it has not committed to a group")
        while len(self._groups) > pending:
            group = self._groups.pop(0)
            for multiply in group:
                multiply.complete()
            if self.warp.block.machine.timing is not None:
                self.warp.block.machine.timing.awaited(self.warp, max(multiply.done_at for multiply in group))
            self.completed += 1
        agent = self.warp.block.agent_of_warp(self.warp.index)
        for thread in self.warp.threads:
            thread.clock[agent] = self.completed

    def require_idle(self, thread: Thread) -> None:
        if self._open or self._groups:
            raise Finding("in flight", f"{thread.describe()} ended while wgmma of its warp are in flight")

    def _check_warpgroup(self, instruction: tuple[Any, ...]) -> None:
        """The warps of a warpgroup issue the same wgmma in the same order."""
        self.issued.append(instruction)
        first = self.warp.index // 4 * 4
        for warp in self.warp.block.warps[first:first + 4]:
            other = warp.tensor.issued if warp.tensor is not None else []
            if len(other) >= len(self.issued) and other[len(self.issued) - 1] != instruction:
                raise Finding("divergence", f"wgmma {len(self.issued)} of warp {self.warp.index} is not that of warp {warp.index}")


def _require_inside(smem: Any, rows: np.ndarray, operand: str) -> None:
    if rows.max() >= len(smem.rows):
        raise Finding("out of bounds", f"{operand} of a wgmma reaches to shared address {int(rows.max()) * 16:#x}; the block has "
                      f"{smem.num_bytes:#x}")


def tensor_of(warp: Warp) -> WarpTensor:
    if warp.tensor is None:
        warp.tensor = WarpTensor(warp)
    return warp.tensor
