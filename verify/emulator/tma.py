"""TMA: boxes of a tensor between global and shared memory, by piece, at any moment until the mbarrier completes."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .findings import Finding
from .machine import Block, Machine, Thread
from .memory import words_of

ELEMENT_BYTES = 2
BOX_ROW_BYTES = 128
MAP_BYTES = 128


@dataclass(frozen=True)
class TensorMap:
    """What `cuTensorMapEncodeTiled` is given: 16-bit elements, 128-byte swizzle; innermost axis first, `strides` of the others."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def __post_init__(self) -> None:
        rules = [(self.address % 16 == 0, f"address {self.address:#x} is no multiple of 16"),
                 (all(0 < size <= 2 ** 32 for size in self.sizes), f"sizes {self.sizes} are not in 1 .. 2^32"),
                 (all(stride % 16 == 0 and 0 < stride < 2 ** 40 for stride in self.strides),
                  f"strides {self.strides} are no multiples of 16 below 2^40"),
                 (all(0 < n <= 256 for n in self.box), f"box {self.box} is not in 1 .. 256"),
                 (self.box[0] * ELEMENT_BYTES == BOX_ROW_BYTES, f"rows of the box {self.box} are not the swizzle's {BOX_ROW_BYTES} bytes"),
                 (len(self.sizes) == len(self.box) == len(self.strides) + 1, "ranks differ")]
        for holds, message in rules:
            if not holds:
                raise Finding("misaligned", f"tensor map: {message}")

    @property
    def box_bytes(self) -> int:
        return int(np.prod(self.box)) * ELEMENT_BYTES

    def places(self, coordinates: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(global addresses, inside) of the box's elements, (rows, elements of a row)."""
        grids = np.meshgrid(*(at + np.arange(n) for at, n in zip(coordinates[::-1], self.box[::-1], strict=True)), indexing="ij")
        addresses = np.full(grids[0].shape, self.address, np.int64)
        inside = np.ones(grids[0].shape, bool)
        for index, size, stride in zip(grids, self.sizes[::-1], (*self.strides[::-1], ELEMENT_BYTES), strict=True):
            addresses += index.astype(np.int64) * stride
            inside &= (index >= 0) & (index < size)
        return addresses.reshape(-1, self.box[0]), inside.reshape(-1, self.box[0])


def smem_rows(address: int, num_bytes: int) -> np.ndarray:
    """Indices of the 16-byte rows of shared memory that a box's chunks go to, (rows of the box, 8)."""
    addresses = address + np.arange(0, num_bytes, 16)
    return ((addresses ^ (addresses >> 3 & 0x70)) >> 4).reshape(-1, 8)


def load(machine: Machine, thread: Thread, tensor_map: TensorMap, coordinates: tuple[int, ...], block: Block, address: int, barrier: Any,
         line: int) -> None:
    """Start a load to a block's shared memory; the bytes land in any order, each landing counted at the block's mbarrier."""
    barrier.require_made(thread)
    if not barrier.known_to_async:
        raise Finding("barrier", f"TMA to {address:#x} behind an mbarrier whose initialisation no fence has made known to the async proxy")
    # Also for a box that lies outside of the tensor: an H100 says CUDA_ERROR_ILLEGAL_ADDRESS.
    machine.memory.find(tensor_map.address, ELEMENT_BYTES, ELEMENT_BYTES)
    smem = block.smem
    rows = _box_rows(smem, address, tensor_map)
    smem.async_write(thread, barrier.agent, barrier.phase + 1, words_of(rows), line)
    addresses, inside = tensor_map.places(coordinates)

    def land(begin: int, end: int) -> None:
        smem.rows[rows[begin:end].reshape(-1)] = gather(machine, addresses[begin:end], inside[begin:end]).reshape(-1, 8)
        barrier.complete_bytes((end - begin) * BOX_ROW_BYTES)

    pieces = machine.rng.choice((1, 1, 2, 3)) if machine.hostile else 1
    cuts = sorted({0, len(rows), *(machine.rng.randrange(len(rows)) for _ in range(pieces - 1))})
    for begin, end in zip(cuts, cuts[1:], strict=False):
        machine.later(lambda begin=begin, end=end: land(begin, end), (end - begin) * BOX_ROW_BYTES)


def _box_rows(smem: Any, address: int, tensor_map: TensorMap) -> np.ndarray:
    """Where a box lies in shared memory, as rows of 16 bytes."""
    if address % BOX_ROW_BYTES:
        raise Finding("misaligned", f"TMA at shared address {address:#x}, which is no multiple of {BOX_ROW_BYTES}")
    rows = smem_rows(address, tensor_map.box_bytes)
    if rows.max() >= len(smem.rows):
        raise Finding("out of bounds", f"TMA at shared address {address:#x} reaches past the block's {smem.num_bytes:#x} bytes")
    return rows


class Store:
    """A box on its way to global memory."""

    def __init__(self, machine: Machine, thread: Thread, tensor_map: TensorMap, coordinates: tuple[int, ...], address: int, epoch: int,
                 line: int):
        self._machine, self._thread, self._epoch, self._line = machine, thread, epoch, line
        self._written = False
        self._smem = thread.block.smem
        self._rows = _box_rows(self._smem, address, tensor_map)
        self._smem.async_read(thread, thread.copy_agent, epoch, self._rows, line)
        self._addresses, self._inside = tensor_map.places(coordinates)
        self._elements: np.ndarray | None = None

    def read(self) -> None:
        """Read shared memory, now if not before."""
        if self._elements is None:
            self._elements = self._smem.rows[self._rows.reshape(-1)].reshape(-1, BOX_ROW_BYTES // ELEMENT_BYTES)

    def write(self) -> None:
        """The box is in global memory, and who waited for it knows."""
        if self._written:
            return
        self.read()
        self._written = True
        for row in np.flatnonzero(self._inside.any(axis=1)):
            columns = np.flatnonzero(self._inside[row])
            values = self._elements[row, columns]
            # Rows begin and end at multiples of 4 bytes, or a word would be two writers'.
            words = np.ascontiguousarray(values).view(np.uint32)
            for i, word in enumerate(words):
                self._machine.memory.write(self._thread, int(self._addresses[row, columns[0]]) + 4 * i, np.array([word]), self._line,
                                           (self._thread.copy_agent, self._epoch))


def gather(machine: Machine, addresses: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """16-bit elements from global memory; zeros where the tensor ends."""
    values = np.zeros(addresses.shape, np.uint16)
    if inside.any():
        wanted = addresses[inside]
        first, last = int(wanted.min()), int(wanted.max())
        buffer, offset = machine.memory.find(first, last + ELEMENT_BYTES - first, ELEMENT_BYTES)
        elements = buffer.data[offset:offset + last + ELEMENT_BYTES - first].view(np.uint16)
        values[inside] = elements[(wanted - first) // ELEMENT_BYTES]
    return values
