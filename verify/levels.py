"""The markers of tests that run a backend: what they need of the machine."""

import pytest

from mla_numba.host import hopper
from verify.targets import simulator


def level(backend: str) -> list[pytest.MarkDecorator]:
    """l0 where no GPU is needed (with `sim` for the simulator), l1 on a GPU."""
    if backend == "cpu":
        return [pytest.mark.l0]
    return [pytest.mark.l0, pytest.mark.sim] if simulator() else [pytest.mark.l1]


def on_hopper() -> list[pytest.MarkDecorator]:
    """l1, of what is for the Hopper kernels alone; skipped elsewhere, with the backend's own reasons."""
    reasons = hopper.unavailable()
    # Skipped, not failed: `make test` runs all levels on any machine, and `-ra` prints the reasons. A list is no condition to pytest.
    return [pytest.mark.l1, pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))]
