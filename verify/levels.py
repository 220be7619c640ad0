"""The marker of a test that runs a backend: what it needs of the machine."""

import pytest

from verify.targets import simulator


def level(backend: str) -> list[pytest.MarkDecorator]:
    """l0 where no GPU is needed (with `sim` for the simulator), l1 on a GPU."""
    if backend == "cpu":
        return [pytest.mark.l0]
    return [pytest.mark.l0, pytest.mark.sim] if simulator() else [pytest.mark.l1]
