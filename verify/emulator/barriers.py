"""mbarriers and named barriers: arrivals, phases, and the clocks they hand on."""

from .clocks import Stamp
from .findings import Finding
from .machine import WARP, Block, Thread, Warp

MAX_PENDING_BYTES = 2 ** 20 - 1


class MBarrier:
    """64 bits of shared memory: a phase, arrivals to come, bytes to come (PTX ISA 9.7.13.15)."""

    def __init__(self, block: Block, address: int, count: int, thread: Thread):
        self._block, self._address, self.count = block, address, count
        self.agent = block.agent_of_barrier(block.num_mbarriers)
        block.num_mbarriers += 1
        self.phase = 0
        self._pending = count
        self._bytes = 0
        self._arriving = block.new_stamp()
        self._completed: Stamp | None = None
        self._waiting: dict[Thread, int] = {}
        self._maker, self._made_at = thread, int(thread.clock[thread.agent])
        self.known_to_async = False
        self.shown_by: Thread | None = None

    def require_made(self, thread: Thread) -> None:
        """Its initialisation must have happened before any use, and its block must not have ended."""
        if self._block.alive == 0:
            raise Finding("barrier", f"{thread.describe()} uses an mbarrier of {self._block.name}, which has ended")
        if not thread.has_seen(self._block.cluster.uid, self._maker.agent, self._made_at):
            raise Finding("barrier", f"{thread.describe()} uses the mbarrier at {self._address:#x}, which {self._maker.describe()} "
                          "initialises, and nothing orders them")

    def stamp_making(self, stamp: Stamp) -> None:
        """Who gets this stamp knows of its initialisation."""
        stamp.clock[self._maker.agent] = max(stamp.clock[self._maker.agent], self._made_at)

    def arrive(self, thread: Thread, count: int = 1) -> None:
        self.require_made(thread)
        if count > self._pending:
            raise Finding("barrier", f"{thread.describe()} arrives at the mbarrier at {self._address:#x}: phase {self.phase} expects no "
                          f"more than {self._pending} of {self.count} arrivals")
        self._arriving.take(thread)
        self._pending -= count
        self._advance()

    def expect(self, thread: Thread, num_bytes: int) -> None:
        self.require_made(thread)
        self._bytes += num_bytes
        if self._bytes > MAX_PENDING_BYTES:
            raise Finding("barrier", f"the mbarrier at {self._address:#x} waits for {self._bytes} bytes, more than {MAX_PENDING_BYTES}")

    def arrive_for_copies(self, agent: int, epoch: int) -> None:
        """An arrival by a thread's copies, which are there."""
        self._arriving.clock[agent] = max(self._arriving.clock[agent], epoch)
        self._pending -= 1
        self._advance()

    def complete_bytes(self, num_bytes: int) -> None:
        """TMA has delivered some."""
        self._bytes -= num_bytes
        self._advance()

    def wait(self, thread: Thread, parity: int) -> None:
        """Until the phase of this parity has completed."""
        self.require_made(thread)
        while not self.has_completed(parity):
            self._waiting[thread] = self.phase
            self._block.machine.wait(self._describe)
            del self._waiting[thread]
        if self._completed is not None:
            self._completed.give(thread)

    def test(self, thread: Thread, parity: int) -> int:
        """Whether it has completed, without waiting."""
        self.require_made(thread)
        if not self.has_completed(parity):
            return 0
        if self._completed is not None:
            self._completed.give(thread)
        return 1

    def _describe(self) -> str:
        return (f"phase {self.phase} of the mbarrier at {self._address:#x} ({self._pending} of {self.count} arrivals and {self._bytes} "
                "bytes missing)")

    def has_completed(self, parity: int) -> bool:
        return (self.phase - 1) & 1 == parity & 1

    def require_idle(self, address: int) -> None:
        if self._bytes:
            raise Finding("barrier", f"{self._block.name} ended while the mbarrier at {address:#x} waits for {self._bytes} bytes")

    def _advance(self) -> None:
        if self._pending or self._bytes:
            return
        for thread, phase in self._waiting.items():
            # Woken when its phase completed, and not yet had a turn.
            if phase < self.phase:
                raise Finding("barrier", f"phase overrun: phase {self.phase} of the mbarrier at {self._address:#x} completes while "
                              f"{thread.describe()}, which waits for phase {phase}, has not seen that one complete")
        self._completed, self._arriving = self._arriving, self._block.new_stamp()
        self._completed.clock[self.agent] = self.phase + 1
        self.phase += 1
        self._pending = self.count
        self._block.machine.wake(self._waiting)


class NamedBarrier:
    """One of the 16 barriers of `bar.sync` and `bar.arrive`, which count threads by whole warps (PTX ISA 9.7.13.1)."""

    def __init__(self, block: Block, number: int):
        self._block, self._number = block, number
        self._expected: int | None = None
        self._whole_block = False
        self._arrived = 0
        self._warps: set[int] = set()
        self._stamp = block.new_stamp()
        self._waiting: list[Thread] = []

    def arrive(self, warp: Warp, num_threads: int | None, line: int) -> Stamp:
        """A warp arrives. `num_threads` None: all of the block. Returns what the barrier will hand on."""
        block = self._block
        expected = block.alive if num_threads is None else num_threads
        if expected % WARP or not 0 < expected <= len(block.threads):
            raise Finding("barrier", f"barrier {self._number} at {block.machine.lines.text(line)} is for {expected} threads: it needs a "
                          f"multiple of {WARP} up to {len(block.threads)}")
        if self._expected is not None and self._expected != expected:
            raise Finding("barrier", f"barrier {self._number} is for {self._expected} threads to those who are there, for {expected} to "
                          f"warp {warp.index} at {block.machine.lines.text(line)}")
        if warp.index in self._warps:
            raise Finding("barrier", f"warp {warp.index} arrives at barrier {self._number} again at {block.machine.lines.text(line)}, "
                          f"before the others have ({self._arrived} of {self._expected} threads have)")
        self._expected, self._whole_block = expected, num_threads is None
        self._warps.add(warp.index)
        for thread in warp.threads:
            self._stamp.take(thread)
        self._arrived += len(warp.threads)
        stamp = self._stamp
        if self._arrived >= expected:
            self._complete()
        return stamp

    def wait(self, thread: Thread, stamp: Stamp) -> None:
        """Until all have arrived with whom `stamp` is shared."""
        if stamp is self._stamp:
            self._waiting.append(thread)
            self._block.machine.wait(lambda: f"barrier {self._number} ({self._arrived} of {self._expected} threads have arrived)")
        stamp.give(thread)

    def thread_ended(self) -> None:
        """A barrier of the whole block does not wait for threads that have ended."""
        if self._whole_block and self._expected is not None:
            self._expected -= 1
            if self._arrived >= self._expected:
                self._complete()

    def _complete(self) -> None:
        self._block.machine.wake(self._waiting)
        self._expected, self._arrived, self._warps, self._waiting = None, 0, set(), []
        self._stamp = self._block.new_stamp()


def named_barrier(block: Block, number: int) -> NamedBarrier:
    if not 0 <= number < 16:
        raise Finding("barrier", f"barrier {number}: there are 16, from 0")
    return block.named.setdefault(number, NamedBarrier(block, number))


def mbarrier(block: Block, address: int) -> MBarrier:
    """The mbarrier at an address."""
    found = block.mbarriers.get(address)
    if found is None:
        raise Finding("barrier", f"no mbarrier has been initialised at {address:#x}")
    return found
