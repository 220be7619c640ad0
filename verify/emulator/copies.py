"""Asynchronous copies that a thread begins itself: 16 bytes by cp.async, boxes to global memory by TMA; in groups that it waits for."""

from typing import Any, Protocol

from .findings import Finding
from .machine import Thread


class Copy(Protocol):
    """Something that is read and written later."""

    def read(self) -> None: ...

    def write(self) -> None: ...


class Copies:
    """A thread's copies of one kind, "cp.async" or "bulk", in the order in which it began them."""

    def __init__(self, thread: Thread, kind: str):
        if not thread.block.grid.copies:
            raise ValueError(f"{thread.block.grid.name} begins asynchronous copies: launch it with copies=True")
        self._thread, self.kind = thread, kind
        self.begun = 0
        self._open: list[Copy] = []
        # Groups that are not known to be done: their copies, and the number of the last one.
        self._groups: list[tuple[list[Copy], int]] = []
        self._not_arrived = 0

    def begin(self, copy: Copy) -> None:
        self._open.append(copy)
        machine = self._thread.block.machine
        machine.later(copy.read)
        machine.later(copy.write)

    def commit(self) -> None:
        self._groups.append((self._open, self.begun))
        self._open = []

    def wait(self, pending: int, read_only: bool = False) -> None:
        """Complete all groups but the `pending` youngest; `read_only`: as far as reading goes."""
        done = self._groups[:len(self._groups) - pending]
        for copies, last in done:
            for copy in copies:
                copy.read()
                if not read_only:
                    copy.write()
            self._thread.clock[self._thread.copy_agent] = last
        if not read_only:
            del self._groups[:len(done)]

    def arrive(self, barrier: Any) -> None:
        """Once all that was begun is done, arrive at an mbarrier."""
        copies, last = [copy for group, _ in self._groups for copy in group] + self._open, self.begun
        self._open, self._groups = [], []
        self._not_arrived += 1

        def arrive() -> None:
            for copy in copies:
                copy.write()
            self._not_arrived -= 1
            barrier.arrive_for_copies(self._thread.copy_agent, last)

        self._thread.block.machine.later(arrive)

    def require_idle(self, thread: Thread) -> None:
        """Stores by TMA end with the kernel; a copy to shared memory that nobody waited for is a mistake."""
        if self.kind == "bulk":
            self.wait(0)
        elif self._open or self._groups or self._not_arrived:
            raise Finding("in flight", f"{thread.describe()} ended while its copies to shared memory are in flight")


def copies_of(thread: Thread, kind: str) -> Copies:
    if thread.copies is None:
        thread.copies = Copies(thread, kind)
    if thread.copies.kind != kind:
        raise NotImplementedError(f"{thread.describe()} begins copies of both kinds, cp.async and bulk: one is modelled")
    return thread.copies
