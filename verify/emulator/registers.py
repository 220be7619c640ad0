"""A thread's arrays of registers, and the values that must not be used: not yet written, or still in flight."""

from typing import Any, NoReturn

from .findings import Finding


class Poison:
    """A value that nobody may compute with."""

    # NumPy leaves operators with it to it.
    __array_ufunc__ = None
    __slots__ = ("_kind", "_message")

    def __init__(self, kind: str, message: str):
        self._kind, self._message = kind, message

    def _refuse(self, *_: Any) -> NoReturn:
        raise Finding(self._kind, self._message)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _refuse
    __mod__ = __rmod__ = __pow__ = __rpow__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _refuse
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __neg__ = __abs__ = __invert__ = __bool__ = __int__ = __float__ = _refuse
    __index__ = __lt__ = __le__ = __gt__ = __ge__ = __array__ = _refuse

    def __eq__(self, other: object) -> bool:
        self._refuse()

    __hash__ = object.__hash__


UNINITIALISED = Poison("registers", "a register is used that nobody has written")
IN_FLIGHT = Poison("in flight", "a register is used that a wgmma has not written yet: it may be after wgmma.wait_group and a registers "
                   "fence")


class Registers(list):  # type: ignore[type-arg]
    """A `cuda.local.array`. `flight`: the accumulator of a wgmma that owns it now; `pins`: wgmma that read it and have not ended."""

    __slots__ = ("dirty", "flight", "machine", "pins")

    def __init__(self, machine: Any, count: int):
        super().__init__([UNINITIALISED] * count)
        self.machine = machine
        self.flight: Any = None
        self.pins = 0
        self.dirty = False

    def __setitem__(self, i: Any, value: Any) -> None:
        if self.pins or self.flight is not None:
            raise Finding("in flight", f"register {i} of an array is written while a wgmma {'reads' if self.pins else 'adds to'} it")
        if not 0 <= i < len(self):
            raise Finding("out of bounds", f"register {i} of an array of {len(self)}")
        if not self.dirty:
            self.dirty = True
            self.machine.current.dirty.append(self)
        list.__setitem__(self, i, value)
