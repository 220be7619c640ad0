"""The test of the tests: the decode of verify/mutants.py passes every property, and each of its bugs is caught by the one named."""

import pytest

from verify import runner
from verify.mutants import MUTANTS, mutant
from verify.properties import PROPERTIES, Property

pytestmark = pytest.mark.l0


def _run(bug: str, prop: Property, examples: int) -> runner.Result:
    return runner.run_property(mutant(bug), prop, "small", examples=examples, seed=0)


@pytest.mark.parametrize("prop", [pytest.param(prop, id=name) for name, prop in PROPERTIES.items()])
def test_healthy_decode_passes(prop: Property) -> None:
    result = _run("", prop, 25)
    assert result.status == "passed", result.message


@pytest.mark.parametrize("bug", [pytest.param(bug, id=bug.replace(" ", "-")) for bug in MUTANTS])
def test_bug_is_caught(bug: str) -> None:
    result = _run(bug, PROPERTIES[MUTANTS[bug]], 150)
    assert result.status == "failed", f"{MUTANTS[bug]} ran {result.cases} cases on the mutant {bug!r} and saw nothing"


def test_every_property_catches_some_bug() -> None:
    assert set(MUTANTS.values()) == set(PROPERTIES)
