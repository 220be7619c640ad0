"""What the emulator reports: one exception, with the place in the kernel's source and the words to act on."""

import sys
from types import CodeType, FrameType

KINDS = ("race", "uninitialised", "out of bounds", "misaligned", "in flight", "barrier", "divergence", "deadlock", "grid", "registers")


class Finding(Exception):
    """A kernel broke a rule of the machine.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    message : str
        What happened, to whom, where in memory.
    """

    def __init__(self, kind: str, message: str):
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Lines:
    """Places in the source as numbers, one an instruction, so that every byte of memory can remember who touched it last, and lanes that
    meet in two instructions of one line are told apart."""

    def __init__(self) -> None:
        # By the code's identity, which `_places` keeps, and the instruction: to hash code, or to ask for its line, takes long.
        self._numbers: dict[tuple[int, int], int] = {}
        self._places: list[tuple[CodeType, int]] = []

    def number(self, frame: FrameType) -> int:
        code = frame.f_code
        key = (id(code), frame.f_lasti)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._places)
            self._places.append((code, frame.f_lineno))
        return number

    def text(self, number: int) -> str:
        if number < 0:
            return "nowhere"
        code, line = self._places[number]
        return place(code, line)


def place(code: CodeType, line: int) -> str:
    return f"{code.co_filename.rpartition('/')[2]}:{line} in {code.co_name}"


def kernel_stack(is_kernel: "frozenset[str]", frame: FrameType | None = None) -> str:
    """The calls from the kernel to where the current thread is, outermost first; only lines of the files in `is_kernel`."""
    at = sys._getframe(1) if frame is None else frame
    calls = []
    while at is not None:
        if at.f_code.co_filename in is_kernel:
            calls.append(place(at.f_code, at.f_lineno))
        at = at.f_back
    return " > ".join(reversed(calls))
