"""Who has seen what: vector clocks. An access is ordered after another one if its thread's clock covers the other one's epoch.

A clock is a row of numbers, one per *agent* of a cluster of thread blocks (most often of one): its threads, the tensor core on behalf
of each warp (counting groups of wgmma that the warp has waited for), TMA behind each mbarrier (counting its phases), and the copies
that a thread has begun (counting them). A last number counts the grids that are known to have ended. Every thread has two clocks:
`clock`, what it knows to have happened, and `fenced`, the part of it that a proxy fence has made known to the async proxy; both are
handed on by every barrier. Clocks of other clusters come with atomics alone, and are kept apart in `foreign`.
"""

from typing import Any

import numpy as np


class Stamp:
    """What a synchronisation hands on: the clocks of all that released, joined."""

    __slots__ = ("clock", "fenced", "foreign")

    def __init__(self, num_agents: int):
        self.clock = np.zeros(num_agents, np.int32)
        self.fenced = np.zeros(num_agents, np.int32)
        self.foreign: dict[int, np.ndarray] | None = None

    def take(self, thread: Any) -> None:
        """`thread` releases what it did; what it does next belongs to a new epoch."""
        np.maximum(self.clock, thread.clock, out=self.clock)
        np.maximum(self.fenced, thread.fenced, out=self.fenced)
        if thread.foreign:
            self.foreign = joined(self.foreign, thread.foreign)
        thread.clock[thread.agent] += 1

    def give(self, thread: Any) -> None:
        """`thread` acquires it."""
        np.maximum(thread.clock, self.clock, out=thread.clock)
        np.maximum(thread.fenced, self.fenced, out=thread.fenced)
        if self.foreign:
            thread.foreign = joined(thread.foreign, self.foreign)


class GlobalStamp:
    """The same for a word of global memory, which threads of all blocks release to and acquire from."""

    __slots__ = ("clusters",)

    def __init__(self) -> None:
        self.clusters: dict[int, np.ndarray] = {}

    def take(self, thread: Any) -> None:
        self.clusters = joined(self.clusters, known_to(thread))
        thread.clock[thread.agent] += 1

    def replace(self, clusters: dict[int, np.ndarray]) -> None:
        """A plain store: who reads it acquires what came with it, and nothing older."""
        self.clusters = clusters

    def give(self, thread: Any) -> None:
        uid = thread.block.cluster.uid
        own = self.clusters.get(uid)
        if own is not None:
            np.maximum(thread.clock, own, out=thread.clock)
        others = {other: clock for other, clock in self.clusters.items() if other != uid}
        if others:
            thread.foreign = joined(thread.foreign, others)
            for clock in others.values():
                thread.clock[-1] = max(thread.clock[-1], clock[-1])


def known_to(thread: Any) -> dict[int, np.ndarray]:
    """All that a thread has seen, by cluster."""
    return joined(thread.foreign, {thread.block.cluster.uid: thread.clock})


def joined(a: dict[int, np.ndarray] | None, b: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    result = dict(a or {})
    for uid, clock in b.items():
        result[uid] = np.maximum(result[uid], clock) if uid in result else clock.copy()
    return result
