"""Thread blocks as cooperative threads under a seeded scheduler, and the asynchronous machinery beside them.

Every GPU thread is a greenlet that runs the kernel's Python function. It runs until it must wait (a barrier, a warp's collective, an
acquiring poll) or until its fuse burns down; then the scheduler picks another one, or lets one of the pending asynchronous events
happen: some bytes of TMA land, a wgmma reads its operands, a block or a grid starts. Who comes next is drawn from the seed, as are
how eager events are, which warps are starved, and how many blocks are resident.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from greenlet import GreenletExit, greenlet

from .clocks import Stamp
from .findings import Finding, Lines, kernel_stack
from .memory import GlobalMemory, SharedMemory

WARP = 32
# Of a block; they have agents, see `clocks`.
MAX_WARPS = 32
MAX_BARRIERS = 64
REGISTERS_PER_SM = 65536
SMEM_LIMIT = 227 * 1024
# A thread may be preempted after so many accesses to memory.
FUSE = 40
# The slow ones are among the first so many warps of a block.
SLOWEST_WARP = 12
# How often one of them gets its turn all the same, so that nobody polls in vain.
SLOW_TURNS = 0.02
MAX_IDLE_POLLS = 20_000


class Thread:
    """One GPU thread."""

    __slots__ = ("agent", "block", "clock", "cluster_phase", "copies", "copy_agent", "dirty", "fenced", "foreign", "fuse", "greenlet",
                 "index", "lane", "released", "waits_for", "warp")

    def __init__(self, block: "Block", index: int, warp: "Warp"):
        self.block, self.index, self.lane, self.warp = block, index, index % WARP, warp
        self.agent = block.first_agent + index
        row = block.rank * block.grid.num_threads + index
        self.clock, self.fenced = block.cluster.clocks[row], block.cluster.fenced[row]
        self.clock[self.agent] = 1
        self.foreign: dict[int, np.ndarray] | None = None
        self.greenlet: greenlet | None = None
        # What for, in words as they are when somebody asks.
        self.waits_for: Callable[[], str] | None = None
        # Arrays of registers written since the last wgmma.fence.
        self.dirty: list[Any] = []
        self.fuse = 0
        # The phase of the cluster's barrier at which it has arrived and not waited.
        self.cluster_phase: int | None = None
        # What the thread knew at its last fence.acq_rel, which its relaxed stores release.
        self.released: dict[int, np.ndarray] = {}
        # Its asynchronous copies, see `copies`.
        self.copy_agent = block.agent_of_copies(index)
        self.copies: Any = None

    def describe(self) -> str:
        return f"{self.block.name} thread {self.index} (warp {self.warp.index}, lane {self.lane})"

    def has_seen(self, uid: int, agent: int, epoch: int) -> bool:
        """Whether an access by an agent of some cluster happened before now."""
        if uid == self.block.cluster.uid:
            return bool(self.clock[agent] >= epoch)
        if self.block.machine.grid_of(uid) < self.clock[-1]:
            return True
        return bool(self.foreign and uid in self.foreign and self.foreign[uid][agent] >= epoch)


class Meeting:
    """A warp's collective instruction, while lanes are still to come."""

    __slots__ = ("kind", "line", "results", "values", "waiting")

    def __init__(self, kind: str, line: int):
        self.kind, self.line = kind, line
        self.values: dict[int, Any] = {}
        self.waiting: list[Thread] = []
        self.results: Any = None


class Warp:
    """32 threads; the instructions that they must execute together meet here."""

    __slots__ = ("block", "ended", "index", "meeting", "now", "registers", "tensor", "threads")

    def __init__(self, block: "Block", index: int):
        self.block, self.index = block, index
        self.threads: list[Thread] = []
        self.meeting: Meeting | None = None
        self.ended = 0
        self.tensor: Any = None
        self.registers = block.registers
        self.now = 0.0


class Cluster:
    """Thread blocks that run together, most often one: they share clocks, a barrier, and the addresses of their shared memory."""

    def __init__(self, machine: "Machine", grid: "Grid", index: tuple[int, int, int], uid: int):
        self.uid, self.grid = uid, grid
        self.agents_per_block = grid.num_threads * (2 if grid.copies else 1) + MAX_WARPS + MAX_BARRIERS
        self.num_agents = grid.cluster_size * self.agents_per_block + 1
        self.clocks = np.zeros((grid.cluster_size * grid.num_threads, self.num_agents), np.int32)
        self.fenced = np.zeros_like(self.clocks)
        # Dynamic shared memory lies where the alignment of 16 lets it, in all blocks alike; static arrays lie behind it.
        dynamic_smem = machine.rng.randrange(0, 1024, 16) if machine.timing is None else 0
        self.blocks = [Block(machine, self, rank, (index[0] + rank, *index[1:]), dynamic_smem) for rank in range(grid.cluster_size)]
        # Its barrier: the arrivals of the phase, and who waits.
        self.phase, self.arrived, self.stamp = 0, 0, Stamp(self.num_agents)
        self.last_stamp = self.stamp
        self.waiting: list[Thread] = []

    def complete_phase(self) -> None:
        """The barrier's phase is complete when all threads that have not ended have arrived."""
        if self.arrived and self.arrived == sum(block.alive for block in self.blocks):
            self.last_stamp, self.stamp = self.stamp, Stamp(self.num_agents)
            self.arrived, self.phase = 0, self.phase + 1
            waiting, self.waiting = self.waiting, []
            self.blocks[0].machine.wake(waiting)


class Block:
    """A thread block: threads, shared memory, barriers."""

    def __init__(self, machine: "Machine", cluster: Cluster, rank: int, index: tuple[int, int, int], dynamic_smem: int):
        grid = cluster.grid
        self.machine, self.grid, self.cluster, self.rank, self.index = machine, grid, cluster, rank, index
        self.name = f"{grid.name}{list(index)}"
        self.first_agent = rank * cluster.agents_per_block
        # Registers of a thread at launch: as many as the SM has for so many, in steps of 8.
        self.registers = min(REGISTERS_PER_SM // grid.num_threads // 8 * 8, 255)
        self.free_registers = 0
        self.warps = [Warp(self, i) for i in range(-(-grid.num_threads // WARP))]
        for i in range(grid.num_threads):
            self.warps[i // WARP].threads.append(Thread(self, i, self.warps[i // WARP]))
        self.threads = [thread for warp in self.warps for thread in warp.threads]
        self.dynamic_smem = dynamic_smem
        self.static_arrays: dict[Any, int] = {}
        self.next_static = -(-(dynamic_smem + grid.smem_bytes) // 16) * 16
        self.alive = grid.num_threads
        self.smem = SharedMemory(self, self.next_static + grid.static_smem, machine.numpy_rng)
        self.mbarriers: dict[int, Any] = {}
        self.num_mbarriers = 0
        self.named: dict[int, Any] = {}
        self.triggered = False
        # Threads that wait for registers.
        self.register_queue: list[Thread] = []

    def agent_of_warp(self, warp: int) -> int:
        """The tensor core's, on behalf of a warp."""
        return self.first_agent + self.grid.num_threads + warp

    def agent_of_barrier(self, number: int) -> int:
        if number >= MAX_BARRIERS:
            raise Finding("barrier", f"more than {MAX_BARRIERS} mbarriers in {self.name}: the emulator has no more")
        return self.first_agent + self.grid.num_threads + MAX_WARPS + number

    def agent_of_copies(self, thread: int) -> int:
        return self.first_agent + self.grid.num_threads + MAX_WARPS + MAX_BARRIERS + thread

    def agent_name(self, agent: int) -> str:
        rank, place = divmod(agent, self.cluster.agents_per_block)
        block = self.cluster.blocks[rank]
        if place < self.grid.num_threads:
            return block.threads[place].describe()
        place -= self.grid.num_threads
        if place < MAX_WARPS:
            return f"{block.name} wgmma of warp {place}"
        if place < MAX_WARPS + MAX_BARRIERS:
            address = next((at for at, barrier in block.mbarriers.items() if barrier.agent == agent), 0)
            return f"{block.name} TMA behind the mbarrier at {address:#x}"
        return f"a copy of {block.threads[place - MAX_WARPS - MAX_BARRIERS].describe()}"

    def new_stamp(self) -> Stamp:
        return Stamp(self.cluster.num_agents)


class Grid:
    """A launch of a kernel."""

    def __init__(self, machine: "Machine", number: int, kernel: Callable[..., None], name: str, shape: tuple[int, int, int],
                 num_threads: int, smem_bytes: int, static_smem: int, arguments: Sequence[Any], programmatic: bool, cluster_size: int,
                 copies: bool):
        if smem_bytes + static_smem > SMEM_LIMIT:
            raise Finding("out of bounds", f"{name} asks for {smem_bytes + static_smem} bytes of shared memory; a block has {SMEM_LIMIT}")
        self.kernel, self.name, self.shape, self.num_threads = kernel, name, shape, num_threads
        self.smem_bytes, self.static_smem, self.arguments, self.programmatic = smem_bytes, static_smem, arguments, programmatic
        self.number, self.cluster_size, self.copies = number, cluster_size, copies
        # As the kernel's parameters are counted: each element of a tuple is one.
        self.parameters = [word for argument in arguments for word in (argument if isinstance(argument, tuple) else (argument,))]
        # The first blocks of clusters, which lie along x.
        self.to_start = [(x, y, z) for z in range(shape[2]) for y in range(shape[1]) for x in range(0, shape[0], cluster_size)]
        machine.rng.shuffle(self.to_start)
        self.left = self.untriggered = shape[0] * shape[1] * shape[2]
        self.waiting: list[Thread] = []
        # Whether one of its blocks has waited for the grids before it.
        self.waited = False

    @property
    def ended(self) -> bool:
        return self.left == 0


class Machine:
    """The GPU.

    Parameters
    ----------
    seed : int
        Everything that chance decides.
    timing : timeline.Timing, optional
        Decides instead of chance: what comes next is what its clocks say comes first.
    """

    def __init__(self, seed: int = 0, *, timing: Any = None):
        self.rng = random.Random(seed)
        self.numpy_rng = np.random.default_rng(seed)
        self.timing = timing
        hostile = self.hostile = timing is None
        self.lines = Lines()
        self.memory = GlobalMemory(self.lines)
        self.kernel_files: set[str] = set()
        self.grids: list[Grid] = []
        self._grid_numbers: list[int] = [-1]
        self.ready: list[Thread] = []
        self.events: list[Callable[[], None]] = []
        self.current: Thread = None  # type: ignore[assignment]
        self._hub: greenlet | None = None
        self._resident: list[Block] = []
        self.event_rate = self.rng.choice((0.002, 0.02, 0.2, 0.7)) if hostile else 0.0
        self.max_resident = self.rng.choice((1, 2, 4, 1000)) if hostile else 1000
        # Threads, by their number in a block, that hardly get a turn while others are ready: whole warps, and some lanes of others.
        warps = self.rng.sample(range(SLOWEST_WARP), 3)
        whole, some = self.rng.choice(((0, 0), (1, 0), (2, 0), (0, 1), (0, 1), (1, 1)))
        self._slow = {WARP * warp + lane for warp in warps[:whole] for lane in range(WARP)}
        self._slow |= {WARP * warp + lane for warp in warps[2:2 + some] for lane in self.rng.sample(range(WARP), 8)}
        self.steps = 0
        self.idle_polls = 0

    def grid_of(self, uid: int) -> int:
        """Number of the grid that a cluster belongs to."""
        return self._grid_numbers[uid]

    def launch(self, kernel: Callable[..., None], name: str, shape: tuple[int, int, int], num_threads: int, smem_bytes: int,
               static_smem: int, arguments: Sequence[Any], programmatic: bool = True, cluster_size: int = 1, copies: bool = False) -> None:
        """Queue a kernel on the stream.

        Parameters
        ----------
        programmatic : bool
            It may start when all blocks of the one before have said so.
        cluster_size : int
            Blocks of a cluster, along x.
        copies : bool
            Whether threads may begin asynchronous copies of their own (cp.async, stores by TMA).
        """
        self.grids.append(Grid(self, len(self.grids), kernel, name, shape, num_threads, smem_bytes, static_smem, arguments, programmatic,
                               cluster_size, copies))

    def run(self) -> None:
        """Until all grids have ended.

        Raises
        ------
        Finding
            A rule was broken; the message ends with where the thread was.
        """
        from greenlet import getcurrent

        self._hub = getcurrent()
        try:
            thread = self._pick()
            while thread is not None:
                self.current = thread
                # Comes back when a thread ends, or hands over to one that has not begun: begun by another thread, it would
                # inherit the depth of that one's calls.
                thread = thread.greenlet.switch() or self._pick()
        finally:
            # Greenlets that never ended would keep their frames alive.
            for block in self._resident:
                for thread in block.threads:
                    if thread.greenlet is not None and not thread.greenlet.dead:
                        thread.greenlet.throw(GreenletExit)
            self._resident = []

    def pause(self) -> None:
        """The current thread may go on whenever the scheduler lets it."""
        self.ready.append(self.current)
        self._switch()

    def wait(self, what: Callable[[], str]) -> None:
        """The current thread goes on when somebody wakes it; `what` says what for."""
        thread = self.current
        thread.waits_for = what
        self._switch()
        if self.timing is not None:
            self.timing.resumed(thread)
        thread.waits_for = None

    def wake(self, threads: Iterable[Thread]) -> None:
        """What these threads wait for has happened."""
        if self.timing is not None:
            self.timing.woke(self, threads)
        self.ready += threads

    def poll(self) -> None:
        """Let others go before a look at something that only they can change."""
        self.idle_polls += 1
        if self.idle_polls > MAX_IDLE_POLLS:
            raise Finding("deadlock", f"{self.current.describe()} polls, and nothing else has happened for {MAX_IDLE_POLLS} polls")
        self.pause()

    def touch(self) -> None:
        """Once per access to memory: now and then, let others go first."""
        thread = self.current
        thread.fuse -= 1
        if self.timing is not None:
            self.timing.spend(thread.warp, "memory")
        elif thread.fuse < 0:
            thread.fuse = self.rng.randrange(1, 2 * FUSE)
            self.pause()

    def later(self, event: Callable[[], None], num_bytes: int = 0) -> None:
        """Let an asynchronous event, which moves so many bytes, happen some time."""
        if self.timing is not None:
            self.timing.schedule(self.current.warp, event, num_bytes)
        else:
            self.events.append(event)

    def meet(self, kind: str, line: int, value: Any, execute: Callable[[Warp, dict[int, Any]], Any]) -> Any:
        """A collective of the current thread's warp: `execute` gets the values of all lanes and returns theirs, or one for all."""
        self.idle_polls = 0
        thread = self.current
        warp = thread.warp
        meeting = warp.meeting
        if meeting is None:
            meeting = warp.meeting = Meeting(kind, line)
        elif meeting.kind != kind or meeting.line != line:
            raise Finding("divergence", f"{thread.describe()} executes {kind} at {self.lines.text(line)} while lanes "
                          f"{sorted(meeting.values)} of its warp are at {meeting.kind} at {self.lines.text(meeting.line)}")
        meeting.values[thread.lane] = value
        if len(meeting.values) < len(warp.threads):
            meeting.waiting.append(thread)
            self.wait(lambda: f"the other lanes at {kind}")
        else:
            warp.meeting = None
            if self.timing is not None:
                self.timing.spend(warp, kind)
            meeting.results = execute(warp, meeting.values)
            self.wake(meeting.waiting)
        results = meeting.results
        return results[thread.lane] if isinstance(results, dict) else results

    def _switch(self) -> None:
        thread = self.current
        following = self._pick()
        self.steps += 1
        if following is not thread:
            self.current = following
            (following.greenlet if following.greenlet else self._hub).switch(following)
        self.current = thread

    def _pick(self) -> Thread | None:
        while True:
            if self.timing is not None and self.timing.happens(self.ready):
                continue
            if self.events and (not self.ready or self.rng.random() < self.event_rate):
                self._happen()
            elif self.ready and not (self.hostile and self.rng.random() < 0.01 and self._startable()):
                return self._take()
            elif not self._start_something():
                if not self._resident:
                    return None
                raise Finding("deadlock", self._deadlock())

    def _take(self) -> Thread:
        ready, slow = self.ready, self._slow
        if self.timing is not None:
            return ready.pop(min(range(len(ready)), key=lambda i: ready[i].warp.now))
        i = int(self.rng.random() * len(ready))
        if slow and ready[i].index in slow and self.rng.random() > SLOW_TURNS:
            others = [i for i, thread in enumerate(ready) if thread.index not in slow]
            i = self.rng.choice(others) if others else i
        ready[i], ready[-1] = ready[-1], ready[i]
        return ready.pop()

    def _happen(self) -> None:
        i = int(self.rng.random() * len(self.events))
        self.events[i], self.events[-1] = self.events[-1], self.events[i]
        self.events.pop()()
        # Events end; where they come seldom, thousands of polls lie between them.
        self.idle_polls = 0

    def _startable(self) -> Grid | None:
        """The first grid that has blocks to start, if it may."""
        if len(self._resident) >= self.max_resident:
            return None
        for i, grid in enumerate(self.grids):
            if grid.to_start:
                before = self.grids[i - 1] if i else None
                allowed = before is None or before.ended or (grid.programmatic and before.untriggered == 0 and not before.to_start)
                return grid if allowed else None
        return None

    def _start_something(self) -> bool:
        grid = self._startable()
        if grid is None:
            return False
        self._grid_numbers.append(grid.number)
        cluster = Cluster(self, grid, grid.to_start.pop(), len(self._grid_numbers) - 1)
        if not grid.programmatic:
            cluster.clocks[:, -1] = grid.number
        for block in cluster.blocks:
            self._resident.append(block)
            for thread in block.threads:
                thread.greenlet = greenlet(self._body(thread), self._hub)
                thread.fuse = self.rng.randrange(1, 2 * FUSE)
            self.ready += block.threads
        return True

    def _body(self, thread: Thread) -> Callable[[], None]:
        def run() -> None:
            try:
                # Infinities and NaN are data here; a greenlet begins with NumPy's defaults.
                with np.errstate(all="ignore"):
                    thread.block.grid.kernel(*thread.block.grid.arguments)
            except Finding as finding:
                if "\n" not in str(finding):
                    raise Finding(finding.kind, f"{str(finding).partition(': ')[2]}\n  in {thread.describe()}\n"
                                  f"  at {_kernel_frames(finding, self.kernel_files)}") from None
                raise
            self._end(thread)

        return run

    def _end(self, thread: Thread) -> None:
        block = thread.block
        warp = thread.warp
        warp.ended += 1
        if warp.meeting is not None:
            raise Finding("divergence", f"{thread.describe()} has ended, and lanes {sorted(warp.meeting.values)} of its warp wait for it "
                          f"at {warp.meeting.kind} at {self.lines.text(warp.meeting.line)}")
        if warp.tensor is not None:
            warp.tensor.require_idle(thread)
        if thread.copies is not None:
            thread.copies.require_idle(thread)
        block.alive -= 1
        barrier = block.named.get(0)
        if barrier is not None:
            barrier.thread_ended()
        block.cluster.complete_phase()
        if block.alive == 0:
            self._end_block(block)

    def _end_block(self, block: Block) -> None:
        grid = block.grid
        for address, barrier in block.mbarriers.items():
            barrier.require_idle(address)
        self.trigger(block)
        grid.left -= 1
        self._resident.remove(block)
        if grid.ended:
            if grid.programmatic and grid.number > 0 and not grid.waited:
                raise Finding("grid", f"{grid.name} ended without griddepcontrol.wait: what is launched after it may start before the "
                              "grids before it have ended")
            # In stream order: a grid has ended, to those that wait, when the ones before it have too.
            for later in self.grids[grid.number + 1:]:
                if all(other.ended for other in self.grids[:later.number]):
                    self.wake(later.waiting)
                    later.waiting = []

    def trigger(self, block: Block) -> None:
        """A block lets the next grid start."""
        if not block.triggered:
            block.triggered = True
            block.grid.untriggered -= 1

    def grids_before_ended(self, grid: Grid) -> bool:
        return all(other.ended for other in self.grids[:grid.number])

    def _deadlock(self) -> str:
        """Who waits for what: one line for all threads that wait at the same place for the same thing."""
        groups: dict[tuple[str, str, str], list[int]] = {}
        for block in self._resident:
            for thread in block.threads:
                if thread.greenlet is not None and not thread.greenlet.dead:
                    where = kernel_stack(frozenset(self.kernel_files), thread.greenlet.gr_frame)
                    groups.setdefault((block.name, thread.waits_for() if thread.waits_for else "a turn", where), []).append(thread.index)
        lines = [f"{block}: {_ranges(threads)} wait for {what}\n    at {where}" for (block, what, where), threads in groups.items()]
        waiting = [grid.name for grid in self.grids if grid.to_start]
        return "\n  ".join(["nobody can go on:", *lines, *(f"{name}: has blocks that cannot start" for name in waiting)])


def _kernel_frames(error: BaseException, files: set[str]) -> str:
    """The kernel's lines on the way to where `error` was raised."""
    from .findings import place

    calls, at = [], error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename in files:
            calls.append(place(at.tb_frame.f_code, at.tb_lineno))
        at = at.tb_next
    return " > ".join(calls)


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return "threads " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
