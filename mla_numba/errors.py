"""Exceptions of their own name; everything else a caller can do wrong raises plain ``ValueError`` or ``TypeError``."""

from collections.abc import Mapping, Sequence


class BackendUnavailable(ValueError):
    """The backend asked for (or every backend, with ``"auto"``) cannot run this call.

    Parameters
    ----------
    asked : str
        The ``backend`` argument.
    reasons : mapping of str to sequence of str
        Per backend, why it cannot; kept as the attribute ``reasons``.
    """

    def __init__(self, asked: str, reasons: Mapping[str, Sequence[str]]):
        self.asked = asked
        self.reasons = {name: list(why) for name, why in reasons.items()}
        detail = "; ".join(f"{name}: {', '.join(why)}" for name, why in self.reasons.items())
        super().__init__(f"backend={asked!r} cannot run this call: {detail}")


class StalePlanError(ValueError):
    """A plan was used with shapes, or (under ``check_values=True``) lengths, other than those it was made for."""


class WrongNumbaCuda(ImportError):
    """``numba.cuda`` is the copy inside numba, not the numba-cuda package that the kernels are written for."""
