"""One thread block's run as a picture: who waits, loads, multiplies, exponentiates, and which barrier lets whom go on.

The machine runs by clocks here instead of chance. The order of what happens is the kernel's own; the lengths come from a rough model
(`COSTS`, in clock cycles of one SM), good enough to see what overlaps what, and no measurement.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_numba.config import ceil_div
from mla_numba.kernels.hopper_config import BLOCK_M
from verify.cases import MLACase

from .device import EmulatedGpu, decode

# What a warp's instruction occupies it for. `ex2` (with the multiply-add before it) and `memory` are charged by the lane: a quarter
# of an SM takes 4 exponentials a cycle. The rest are latencies as micro-benchmarks of Hopper give them, rounded;
# for movmatrix none was found, and it is taken for half an ldmatrix.
COSTS = {"ex2": 10 / 32, "memory": 2 / 32, "shfl.sync": 8.0, "vote.any": 8.0, "syncwarp": 4.0, "bar.sync": 15.0, "bar.arrive": 8.0,
         "ldmatrix": 30.0, "stmatrix": 16.0, "movmatrix": 15.0, "wgmma.fence": 4.0, "wgmma": 4.0, "wgmma.commit_group": 2.0,
         "wgmma.wait_group": 10.0, "setmaxnreg": 20.0}
# wgmma of 64 x n x 16: n / 2 cycles of the tensor core, if shared memory keeps up (FACTS.md's model).
CYCLES_PER_COLUMN = 0.5
TMA_LATENCY = 700.0
# Of an SM whose row tile alone reads a block of the cache: 4,400 GB/s / 132 / 1.75 GHz. Of two that share one half comes from L2.
BYTES_PER_CYCLE = 19.0

# Gaps shorter than this are drawn as none.
JOIN_CYCLES = 12.0

_COLOURS = {"loads": "#5aae61", "S = Q K": "#2166ac", "O += P V": "#67a9cf", "exponentials": "#e08214", "waits for data": "#e5f5e0",
            "waits for the tensor core": "#deebf7", "waits for a warp": "#d9d9d9"}


@dataclass(frozen=True)
class Span:
    """Something that took from `begin` to `end`; `row` is whose."""

    row: str
    kind: str
    begin: float
    end: float
    label: str = ""


@dataclass(frozen=True)
class Arrow:
    """What `source` did let `target` go on at time `at`."""

    source: str
    target: str
    at: float


class Timing:
    """The clocks: every warp has its own (`Warp.now`); the tensor core has one for each quarter of an SM, memory one."""

    def __init__(self, row_tiles: int = 1) -> None:
        self._bytes_per_cycle = row_tiles * BYTES_PER_CYCLE
        self.spans: list[Span] = []
        self.arrows: list[Arrow] = []
        self._last: dict[tuple[str, str], int] = {}
        self._woken: dict[Any, tuple[float, str]] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._memory_free = 0.0
        self._tensor_free: dict[int, float] = {}
        self._event_time: float | None = None

    def spend(self, warp: Any, kind: str) -> None:
        """A warp, or a lane of it, executes something."""
        begin = warp.now
        warp.now += COSTS[kind]
        if kind == "ex2":
            self._add(row_of(warp), "exponentials", begin, warp.now)

    def multiply(self, warp: Any, n: int, reads_v: bool) -> float:
        """A wgmma is issued: when will it be done? V alone is not K-major, whichever operand it is."""
        begin = max(warp.now, self._tensor_free.get(warp.index % 4, 0.0))
        end = self._tensor_free[warp.index % 4] = begin + n * CYCLES_PER_COLUMN
        self._add(tensor_row(warp), "O += P V" if reads_v else "S = Q K", begin, end)
        return end

    def awaited(self, warp: Any, done_at: float) -> None:
        """A warp has waited for its wgmma."""
        if done_at > warp.now:
            self._add(row_of(warp), "waits for the tensor core", warp.now, done_at)
            warp.now = done_at

    def schedule(self, warp: Any, event: Callable[[], None], num_bytes: int) -> None:
        """TMA of so many bytes is issued; `event` lets it land."""
        begin = max(warp.now, self._memory_free)
        self._memory_free = begin + num_bytes / self._bytes_per_cycle
        self._add("TMA", "loads", begin, self._memory_free)
        heapq.heappush(self._events, (self._memory_free + TMA_LATENCY, len(self.spans), event))

    def happens(self, ready: Sequence[Any]) -> bool:
        """Let the next event happen, if no thread comes first."""
        if not self._events or (ready and min(thread.warp.now for thread in ready) <= self._events[0][0]):
            return False
        self._event_time, _, event = heapq.heappop(self._events)
        event()
        self._event_time = None
        return True

    def woke(self, machine: Any, threads: Iterable[Any]) -> None:
        """What these threads wait for happens now, by the current thread or TMA."""
        for thread in threads:
            if self._event_time is not None:
                self._woken[thread] = self._event_time, "TMA"
            else:
                self._woken[thread] = machine.current.warp.now, row_of(machine.current.warp)

    def resumed(self, thread: Any) -> None:
        """A thread goes on, and its warp's clock with it."""
        at, source = self._woken.pop(thread)
        warp = thread.warp
        if at > warp.now:
            row = row_of(warp)
            # Lanes that wait for each other are one warp that is not there yet.
            if source != row:
                self._add(row, "waits for data" if source == "TMA" else "waits for a warp", warp.now, at)
                self.arrows.append(Arrow(source, row, at))
            warp.now = at

    def _add(self, row: str, kind: str, begin: float, end: float) -> None:
        """A span; one that goes on where the last of its kind and row ended is one with it."""
        i = self._last.get((row, kind))
        if i is not None and begin - self.spans[i].end < JOIN_CYCLES:
            self.spans[i] = Span(row, kind, self.spans[i].begin, end)
        else:
            self._last[row, kind] = len(self.spans)
            self.spans.append(Span(row, kind, begin, end))


def row_of(warp: Any) -> str:
    return f"warp {warp.index}"


def tensor_row(warp: Any) -> str:
    return f"warp {warp.index}'s wgmma"


def record(case: MLACase) -> Timing:
    """Run a decode's first thread block by clocks."""
    inputs = case.build()
    timing = Timing(ceil_div(case.seq_len_q * case.num_heads_q // case.num_heads_kv, BLOCK_M))
    decode(inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens, inputs.head_dim_v, inputs.softmax_scale, inputs.causal,
           cu_seqlens_q=inputs.cu_seqlens_q, device=EmulatedGpu(num_sms=1, timing=timing))
    return timing


def draw(timing: Timing, path: Path, first: float = 0.0, last: float | None = None) -> None:
    """Write the picture, SVG or PNG by the name: the producer's warp, and the first warp of each consumer warpgroup.

    Parameters
    ----------
    first, last : float
        The cycles to show.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    last = max(span.end for span in timing.spans) if last is None else last
    rows = {"warp 8": "producer", "TMA": "TMA", "warp 0": "warpgroup 0", "warp 0's wgmma": "its wgmma", "warp 4": "warpgroup 1",
            "warp 4's wgmma": "its wgmma"}
    places = {row: -place for place, row in enumerate(rows)}
    figure, axes = plt.subplots(figsize=(14, 4.2))
    used = {}
    for span in timing.spans:
        if span.row in places and span.end > first and span.begin < last:
            used[span.kind] = _COLOURS[span.kind]
            axes.barh(places[span.row], span.end - span.begin, left=span.begin, height=0.7, color=_COLOURS[span.kind], linewidth=0)
    for arrow in timing.arrows:
        if arrow.source in places and arrow.target in places and first < arrow.at < last:
            axes.annotate("", (arrow.at, places[arrow.target]), (arrow.at, places[arrow.source]),
                          arrowprops={"arrowstyle": "->", "color": "#777777", "linewidth": 0.7})
    axes.set_xlim(first, last)
    axes.set_yticks(list(places.values()), list(rows.values()))
    axes.set_xlabel("cycles of a rough model; the order is the kernel's own")
    axes.legend(handles=[Patch(color=colour, label=kind) for kind, colour in _COLOURS.items() if kind in used], ncols=len(used),
                loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
    figure.savefig(path, bbox_inches="tight", dpi=110)
    plt.close(figure)
