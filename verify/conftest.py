"""Says what runs here, and how much of it: pytest --verify-profile quick|default|deep, as in `python -m verify`."""

import hypothesis
import pytest

from verify.runner import PROFILES

# Compilation is part of the first example, so deadlines would say nothing; and CI draws the same cases every time.
hypothesis.settings.register_profile("verify", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("verify")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--verify-profile", choices=tuple(PROFILES), default="quick", help="how many cases each property gets")
    parser.addoption("--verify-seed", type=int, default=0, help="of the drawing of cases")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from verify.targets import simulator

    if not simulator():
        # `make test` runs them in a process of their own; `pytest -m l0`, or a file by its name, is no reason for them to fail.
        for item in items:
            if item.get_closest_marker("sim") is not None:
                item.add_marker(pytest.mark.skip(reason="needs NUMBA_ENABLE_CUDASIM=1"))


def pytest_report_header() -> str:
    import mla_numba
    from verify.targets import simulator

    running = ", ".join(mla_numba.available_backends())
    return f"mla_numba {mla_numba.__version__}, backends: {running}{' (CUDA in the simulator)' if simulator() else ''}"
