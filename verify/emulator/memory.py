"""Shared and global memory that remember who touched each word last, and refuse accesses that nothing orders.

For every 4 bytes: the agent and epoch of the last write (see `clocks`), whether it came from the async proxy (TMA, wgmma), its
source line; the agents that have read since. An access is a finding unless the accesses before it that it conflicts with are covered
by the right clock of the accessing thread:

    access                     earlier write by threads    earlier write by TMA    earlier reads (for a write)
    by a thread                clock                       clock                   clock
    by wgmma or TMA            fenced (proxy fence)        clock                   clock

(PTX ISA 8.10 to 8.12 and 9.7.13.4. That a thread's read may be followed by TMA's write without a proxy fence is what every TMA
pipeline builds on: the read's value has come before the thread arrives at the barrier.)
"""

import bisect
from typing import Any

import numpy as np

from .findings import Finding, Lines

NOBODY, BARRIER = -1, -2


def words_of(rows: np.ndarray) -> np.ndarray:
    """Indices of the words of rows of 16 bytes."""
    words: np.ndarray = (rows.reshape(-1)[:, None] * 4 + np.arange(4)).reshape(-1)
    return words


class SharedMemory:
    """A thread block's shared memory: bytes, by 32-bit address from 0."""

    def __init__(self, block: Any, num_bytes: int, rng: np.random.Generator):
        num_words = num_bytes // 4
        self._block = block
        self.num_bytes = num_bytes
        self.u32 = rng.integers(0, 2 ** 32, num_words, np.uint32)
        self.f32 = self.u32.view(np.float32)
        self.u16 = self.u32.view(np.uint16)
        # Rows of 16 bytes: what ldmatrix, wgmma and TMA move.
        self.rows = self.u16[:num_words // 4 * 8].reshape(-1, 8)
        self._writer = np.full(num_words, NOBODY, np.int16)
        self._write_epoch = np.zeros(num_words, np.int32)
        self._write_line = np.full(num_words, -1, np.int32)
        self._by_async = np.zeros(num_words, bool)
        self._reader = np.full(num_words, NOBODY, np.int16)
        self._read_epoch = np.zeros(num_words, np.int32)
        self._read_line = np.full(num_words, -1, np.int32)
        # Readers of a word beyond the last one, and the reads of asynchronous agents: (epoch, line) of every word.
        self._others: dict[int, dict[int, tuple[int, int]]] = {}
        self._agents: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _require_inside(self, address: int, num_bytes: int, alignment: int) -> None:
        if self._block.alive == 0:
            raise Finding("out of bounds", f"shared memory of {self._block.name}, which has ended")
        if address % alignment:
            raise Finding("misaligned", f"shared address {address:#x} is no multiple of {alignment}")
        if not 0 <= address <= self.num_bytes - num_bytes:
            raise Finding("out of bounds", f"shared address {address:#x}, {num_bytes} bytes: the block has {self.num_bytes:#x}")

    def require_row(self, address: int) -> int:
        """Index of the row of 16 bytes at an address."""
        self._require_inside(address, 16, 16)
        return address >> 4

    def require_word(self, address: int) -> int:
        self._require_inside(address, 4, 4)
        return address >> 2

    def read(self, thread: Any, address: int, num_words: int, line: int) -> int:
        """Note a thread's read; returns the first word's index."""
        self._require_inside(address, 4 * num_words, 4 * num_words)
        first = address >> 2
        clock, slot = thread.clock, thread.agent
        for word in range(first, first + num_words):
            writer = self._writer[word]
            if writer < 0:
                self._no_data(word)
            if clock[writer] < self._write_epoch[word]:
                self._race("read", thread.describe(), line, word, "write")
            reader = self._reader[word]
            if reader not in (slot, NOBODY) and clock[reader] < self._read_epoch[word]:
                self._others.setdefault(word, {})[int(reader)] = (int(self._read_epoch[word]), int(self._read_line[word]))
            self._reader[word], self._read_epoch[word], self._read_line[word] = slot, clock[slot], line
        return first

    def write(self, thread: Any, address: int, num_words: int, line: int) -> int:
        """Note a thread's write; returns the first word's index."""
        self._require_inside(address, 4 * num_words, 4 * num_words)
        first = address >> 2
        clock, slot = thread.clock, thread.agent
        for word in range(first, first + num_words):
            writer = self._writer[word]
            if writer == BARRIER:
                self._no_data(word)
            if writer >= 0 and clock[writer] < self._write_epoch[word]:
                self._race("write", thread.describe(), line, word, "write")
            reader = self._reader[word]
            if reader >= 0 and clock[reader] < self._read_epoch[word]:
                self._race("write", thread.describe(), line, word, "read")
            for agent, (epochs, _) in self._agents.items():
                if clock[agent] < epochs[word]:
                    self._race("write", thread.describe(), line, word, "async read", agent)
            if word in self._others:
                self._check_others(thread.describe(), line, word, clock)
            self._writer[word], self._write_epoch[word], self._write_line[word] = slot, clock[slot], line
            self._by_async[word] = False
            self._reader[word] = NOBODY
        return first

    def read_rows(self, threads: list[Any], rows: np.ndarray, line: int) -> np.ndarray:
        """Note that each of the threads reads its row of 16 bytes; returns the rows, (threads, 8) of 16 bits."""
        words = rows[:, None] * 4 + np.arange(4)
        clocks = np.stack([thread.clock for thread in threads])
        lanes = np.arange(len(threads))[:, None]
        self._require_data(words)
        unordered = clocks[lanes, self._writer[words]] < self._write_epoch[words]
        if unordered.any():
            lane, i = np.argwhere(unordered)[0]
            self._race("read", threads[lane].describe(), line, words[lane, i], "write")
        readers, slots = self._reader[words], np.array([[thread.agent] for thread in threads])
        kept = (readers >= 0) & (readers != slots) & (clocks[lanes, readers] < self._read_epoch[words])
        for word in words[kept]:
            self._others.setdefault(int(word), {})[int(self._reader[word])] = (int(self._read_epoch[word]), int(self._read_line[word]))
        self._reader[words], self._read_epoch[words], self._read_line[words] = slots, clocks[lanes, slots], line
        return self.rows[rows]

    def write_rows(self, threads: list[Any], rows: np.ndarray, line: int) -> None:
        """Note that each of the threads writes its row of 16 bytes."""
        words, lanes = rows[:, None] * 4 + np.arange(4), np.arange(len(threads))[:, None]
        clocks = np.stack([thread.clock for thread in threads])
        writers, readers = self._writer[words], self._reader[words]
        suspect = (writers == BARRIER) | ((writers >= 0) & (clocks[lanes, writers] < self._write_epoch[words]))
        suspect |= (readers >= 0) & (clocks[lanes, readers] < self._read_epoch[words])
        for agent, (epochs, _) in self._agents.items():
            suspect |= clocks[:, agent, None] < epochs[words]
        if suspect.any() or len(np.unique(rows)) < len(rows) or (self._others and self._others.keys() & set(words.ravel().tolist())):
            # `write` has the rules: this only sees that, taken together, nothing can break one. What might is looked at one by one.
            for thread, row in zip(threads, rows, strict=True):
                self.write(thread, int(row) * 16, 4, line)
            return
        slots = np.array([[thread.agent] for thread in threads])
        self._writer[words], self._write_epoch[words], self._write_line[words] = slots, clocks[lanes, slots], line
        self._by_async[words] = False
        self._reader[words] = NOBODY

    def async_read(self, thread: Any, agent: int, epoch: int, rows: np.ndarray, line: int) -> None:
        """Note that `agent`, on behalf of `thread`, reads rows of 16 bytes at any time until its `epoch`."""
        words = words_of(rows)
        self._require_data(words)
        writers = self._writer[words]
        known = np.where(self._by_async[words], thread.clock[writers], thread.fenced[writers])
        unordered = known < self._write_epoch[words]
        if unordered.any():
            word = words[np.argmax(unordered)]
            if thread.clock[self._writer[word]] >= self._write_epoch[word]:
                raise Finding("race", f"{self._agent(agent, thread)} reads {self._where(word)} at {self._text(line)}, which "
                              f"{self._last_write(word)}: ordered, but without a proxy fence between the write and the asynchronous read")
            self._race("read", self._agent(agent, thread), line, word, "write")
        if agent not in self._agents:
            self._agents[agent] = np.zeros(len(self._writer), np.int32), np.full(len(self._writer), -1, np.int32)
        epochs, lines = self._agents[agent]
        epochs[words], lines[words] = epoch, line

    def async_write(self, thread: Any, agent: int, epoch: int, words: np.ndarray, line: int, *, async_proxy: bool = True) -> None:
        """Note that `agent`, on behalf of `thread`, writes words at any time until its `epoch`; by the async proxy, or as threads do."""
        who = self._agent(agent, thread)
        writers = self._writer[words]
        if (writers == BARRIER).any():
            self._no_data(words[np.argmax(writers == BARRIER)])
        known = thread.clock[writers]
        if async_proxy:
            known = np.where(self._by_async[words], known, thread.fenced[writers])
        unordered = (writers >= 0) & (known < self._write_epoch[words])
        if unordered.any():
            self._race("write", who, line, words[np.argmax(unordered)], "write")
        readers = self._reader[words]
        unordered = (readers >= 0) & (thread.clock[readers] < self._read_epoch[words])
        if unordered.any():
            self._race("write", who, line, words[np.argmax(unordered)], "read")
        for reading, (epochs, _) in self._agents.items():
            unordered = epochs[words] > thread.clock[reading]
            if unordered.any():
                self._race("write", who, line, words[np.argmax(unordered)], "async read", reading)
        if self._others:
            for word in self._others.keys() & set(words.tolist()):
                self._check_others(who, line, word, thread.clock)
        self._writer[words], self._write_epoch[words], self._write_line[words] = agent, epoch, line
        self._by_async[words] = async_proxy
        self._reader[words] = NOBODY

    def hold_barrier(self, address: int, held: bool) -> None:
        """Mark 8 bytes as an mbarrier's, which only its own instructions may touch, or free them."""
        self._require_inside(address, 8, 8)
        word = address >> 2
        self._writer[word:word + 2] = BARRIER if held else NOBODY
        self._reader[word:word + 2] = NOBODY

    def _require_data(self, words: np.ndarray) -> None:
        missing = self._writer[words] < 0
        if missing.any():
            self._no_data(words.reshape(-1)[np.argmax(missing)])

    def _no_data(self, word: int) -> None:
        if self._writer[word] == BARRIER:
            raise Finding("barrier", f"an mbarrier lies at {self._where(word)}")
        raise Finding("uninitialised", f"{self._where(word)} is read, and nobody has written it")

    def _check_others(self, who: str, line: int, word: int, clock: np.ndarray) -> None:
        for slot, (epoch, read_line) in self._others.pop(word).items():
            if clock[slot] < epoch:
                raise Finding("race", f"{who} writes {self._where(word)} at {self._text(line)}; {self._block.agent_name(slot)} reads it at "
                              f"{self._text(read_line)}, and nothing orders them")

    def _race(self, access: str, who: str, line: int, word: int, earlier: str, agent: int = NOBODY) -> None:
        if earlier == "write":
            before = self._last_write(word)
        else:
            slot = agent if earlier == "async read" else int(self._reader[word])
            read_line = self._agents[agent][1][word] if earlier == "async read" else self._read_line[word]
            before = f"{self._block.agent_name(slot)} reads it at {self._text(int(read_line))}"
        raise Finding("race", f"{who} {access}s {self._where(word)} at {self._text(line)}; {before}, and nothing orders them")

    def _last_write(self, word: int) -> str:
        return f"{self._block.agent_name(int(self._writer[word]))} writes at {self._text(int(self._write_line[word]))}"

    def _agent(self, agent: int, thread: Any) -> str:
        return f"{self._block.agent_name(agent)}, issued by {thread.describe()},"

    def _where(self, word: int) -> str:
        return f"shared memory {int(word) * 4:#x}"

    def _text(self, line: int) -> str:
        return str(self._block.machine.lines.text(int(line)))


class Buffer:
    """A piece of global memory: an array of the host under an address of its own."""

    def __init__(self, name: str, address: int, data: np.ndarray, writable: bool):
        self.name, self.address, self.writable = name, address, writable
        self.data = data
        self.end = address + len(data)
        num_words = -(-len(data) // 4)
        # (block, agent, epoch, line) of the last write and of the last read; block NOBODY: the host, or none.
        self.written = np.full((num_words, 4), NOBODY, np.int64) if writable else None
        self.last_read = np.full((num_words, 4), NOBODY, np.int64) if writable else None
        self.stamps: dict[int, Any] = {}


class GlobalMemory:
    """All buffers. Between them lie gaps, so that an address off the end of one is in none."""

    GAP = 1 << 20

    def __init__(self, lines: Lines):
        self._lines = lines
        self._starts: list[int] = []
        self._buffers: list[Buffer] = []
        self._next = 1 << 40

    def add(self, name: str, data: np.ndarray, *, writable: bool = False, written: bool = True, offset: int = 0) -> int:
        """Give contiguous bytes (uint8) an address, `offset` past a multiple of 1,024; `written=False`: reading them first is a finding."""
        buffer = Buffer(name, self._next + offset, data, writable)
        if buffer.written is not None and written:
            buffer.written[:, 0] = 0
            buffer.written[:, 1:] = 0
        self._starts.append(buffer.address)
        self._buffers.append(buffer)
        self._next = -(-(buffer.end + self.GAP) // 1024) * 1024
        return buffer.address

    def find(self, address: int, num_bytes: int, alignment: int = 1) -> tuple[Buffer, int]:
        """The buffer that holds the bytes, and where in it they begin."""
        i = bisect.bisect_right(self._starts, address) - 1
        if i < 0 or not 0 <= address - self._starts[i] <= len(self._buffers[i].data) - num_bytes:
            near = "before all buffers" if i < 0 else f"{address - self._buffers[i].end} bytes past the end of {self._buffers[i].name}"
            raise Finding("out of bounds", f"global address {address:#x}, {num_bytes} bytes: {near}")
        if address % alignment:
            raise Finding("misaligned", f"global address {address:#x} in {self._buffers[i].name} is no multiple of {alignment}")
        return self._buffers[i], address - self._starts[i]

    def read(self, thread: Any, address: int, num_bytes: int, line: int, *, constant: bool = False) -> np.ndarray:
        """A thread's read of aligned bytes; `constant`: through the path that must see no writes (ld.global.nc)."""
        buffer, offset = self.find(address, num_bytes, num_bytes)
        if buffer.written is not None:
            if constant:
                raise Finding("race", f"{buffer.name} is read with ld.global.nc at {self._lines.text(line)}, but kernels write to it")
            words = slice(offset >> 2, (offset + num_bytes + 3) >> 2)
            self._require_ordered(thread, buffer, buffer.written[words], offset, line, "read", "writes")
            buffer.last_read[words] = (thread.block.cluster.uid, thread.agent, thread.clock[thread.agent], line)
        return buffer.data[offset:offset + num_bytes]

    def write(self, thread: Any, address: int, value: np.ndarray, line: int, by: tuple[int, int] | None = None) -> None:
        """A thread's write of aligned bytes; `by`: the agent that writes on its behalf, and the agent's epoch."""
        num_bytes = value.nbytes
        buffer, offset = self.find(address, num_bytes, num_bytes)
        if buffer.written is None:
            raise Finding("out of bounds", f"{buffer.name} is an input, and written at {self._lines.text(line)}")
        words = slice(offset >> 2, (offset + num_bytes + 3) >> 2)
        self._require_ordered(thread, buffer, buffer.written[words], offset, line, "write", "writes", needs_data=False)
        self._require_ordered(thread, buffer, buffer.last_read[words], offset, line, "write", "reads", needs_data=False)
        buffer.written[words] = (thread.block.cluster.uid, *(by or (thread.agent, thread.clock[thread.agent])), line)
        buffer.last_read[words] = NOBODY
        buffer.data[offset:offset + num_bytes] = value.view(np.uint8)

    def strong(self, address: int) -> tuple[np.ndarray, Any]:
        """A word that atomics and acquiring loads share: the word, and what was released to it. Races on it are none."""
        from .clocks import GlobalStamp

        buffer, offset = self.find(address, 4, 4)
        if buffer.written is None:
            raise Finding("out of bounds", f"{buffer.name} is an input, and subject of an atomic")
        return buffer.data[offset:offset + 4].view(np.uint32), buffer.stamps.setdefault(offset, GlobalStamp())

    def _require_ordered(self, thread: Any, buffer: Buffer, records: np.ndarray, offset: int, line: int, access: str, earlier: str,
                         needs_data: bool = True) -> None:
        for i, (uid, agent, epoch, earlier_line) in enumerate(records.tolist()):
            if uid == NOBODY and needs_data:
                raise Finding("uninitialised", f"{thread.describe()} reads {buffer.name} + {offset + 4 * i} at {self._lines.text(line)}, "
                              "and nobody has written it")
            if uid > 0 and not thread.has_seen(uid, agent, epoch):
                raise Finding("race", f"{thread.describe()} {access}s {buffer.name} + {offset + 4 * i} at {self._lines.text(line)}; agent "
                              f"{agent} of cluster {uid} {earlier} it at {self._lines.text(earlier_line)}, and nothing orders them")
