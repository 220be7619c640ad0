"""Every property against every backend of ours that runs here; `python -m verify` does the same with a table."""

import pytest

import mla_numba
from verify import runner
from verify.levels import level
from verify.properties import PROPERTIES, Property
from verify.targets import Target, ours


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    profile = runner.PROFILES[metafunc.config.getoption("--verify-profile")]
    targets = [ours(name) for name in mla_numba.available_backends()]
    runs = [pytest.param(*run, profile.shrink_s, id=f"{run[0].name}-{run[1]}-{run[2].name}", marks=level(run[0].name))
            for run in runner.plan_runs(targets, tuple(PROPERTIES.values()), None, profile)]
    metafunc.parametrize(("target", "dims", "prop", "examples", "shrink_s"), runs)


def test_property(target: Target, dims: str, prop: Property, examples: int, shrink_s: float, request: pytest.FixtureRequest) -> None:
    result = runner.run_property(target, prop, dims, examples=examples, shrink_s=shrink_s,
                                 seed=request.config.getoption("--verify-seed"))
    assert result.status == "passed", result.message
