"""Memory that calls leave partial results in, one piece for each stream, kept from call to call."""

import threading
from collections.abc import Callable, Hashable
from typing import Any

# cuda.h, CU_STREAM_PER_THREAD.
_PER_THREAD_STREAM = 2


def stream_key(handle: int) -> int:
    """What tells a stream from all others: its handle, but of CUDA's per-thread default stream, which is another one in each thread."""
    return handle if handle != _PER_THREAD_STREAM else ~threading.get_ident()


class Workspaces:
    """Memory that is kept, by what it is for.

    Former, smaller pieces may be in captured graphs, so they are kept, too. Each is twice as large as the one before, or more, lest what
    needs a little more at each step be held many times.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, list[Any]] = {}

    def get(self, key: Hashable, size: int, make: Callable[[int], Any]) -> Any:
        """The newest, if its `size` suffices, else what `make` makes of a size."""
        kept = self._kept.setdefault(key, [])
        if not kept or kept[-1].size < size:
            kept.append(make(max(size, 2 * kept[-1].size if kept else 1)))
        return kept[-1]
