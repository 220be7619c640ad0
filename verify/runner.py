"""Runs properties against targets: one function that the tests, the mutants and `python -m verify` share, and the latter's tables."""

import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis.errors import Flaky, Unsatisfiable

from verify.cases import MLACase
from verify.properties import PROPERTIES, Property
from verify.strategies import DIMS, mla_cases
from verify.targets import RAGGED, Target


@dataclass(frozen=True)
class Profile:
    """How many cases a property gets, by the dims they are drawn from, and how long a failing one may be made smaller."""

    examples: dict[str, int]
    shrink_s: float


PROFILES = {
    "quick": Profile({"small": 40, "tiny": 3, "deepseek": 8, "long": 0, "emulated": 1}, 20),
    "default": Profile({"small": 100, "tiny": 20, "deepseek": 20, "long": 2, "emulated": 5}, 60),
    "deep": Profile({"small": 3000, "tiny": 300, "deepseek": 1000, "long": 100, "emulated": 100}, 300),
}
# The first property's cases are one call each, and the most telling.
WEIGHT = {"equals_float64": 3}


class PropertyFailure(AssertionError):
    """A property does not hold; the message says where, and how to see it again."""


def reproducer(target: Target, prop: Property, case: MLACase) -> str:
    """Two ways to run one case again: a command line (not for mutants), and Python."""
    module = target.python.rpartition("(")[0].rpartition(".")[0]
    lines = [f"import verify.properties, {module}; from verify.cases import MLACase",
             f"verify.properties.{prop.name}({target.python}, {case})"]
    if target.options:
        lines.insert(0, f"python -m verify {target.options} --property {prop.name} --replay {shlex.quote(str(case))}")
    return "\n".join(f"    {line}" for line in lines)


def check(target: Target, prop: Property, case: MLACase) -> float:
    """Run one case. Returns the worst error / bound.

    Raises
    ------
    PropertyFailure
        The property does not hold, or the target raised anything but NotImplementedError.
    NotImplementedError
        The target refuses the case.
    """
    try:
        return prop.check(target, case)
    except NotImplementedError:
        raise
    except Exception as error:
        # Python 3.10 has no add_note, so the reproducer is part of the message.
        what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        raise PropertyFailure(f"{prop.name}: {prop.claim}\n  {what}\n{reproducer(target, prop, case)}") from error


def cases_for(target: Target, prop: Property, dims: str) -> hypothesis.strategies.SearchStrategy[MLACase]:
    return mla_cases(DIMS[dims], ragged=prop.ragged and RAGGED in target.knobs, **prop.cases)


@dataclass
class Result:
    """One row of the table."""

    target: str
    dims: str
    property: str
    status: str = "passed"          # or "failed", "not applicable", "refused" (every case was)
    cases: int = 0
    refused: int = 0
    worst: float = 0.0              # error / bound, of the cases that passed
    seconds: float = 0.0
    message: str = ""
    case: str = ""


def run_property(target: Target, prop: Property, dims: str, *, examples: int, seed: int, shrink_s: float = 0.0,
                 on_case: Callable[[Result], None] = lambda result: None) -> Result:
    """Draw cases until `examples` have run or one fails, which is then made smaller for up to `shrink_s` seconds."""
    result = Result(target.name, dims, prop.name)
    result.message = prop.not_applicable(target)
    if result.message:
        result.status = "not applicable"
        return result
    start = time.perf_counter()
    smallest: list[tuple[MLACase, str]] = []
    stop_shrinking = math.inf

    def body(case: MLACase) -> None:
        nonlocal stop_shrinking
        # Time is up: only the smallest failure so far, which Hypothesis runs once more at the end, is still run.
        if time.perf_counter() > stop_shrinking and case != smallest[-1][0]:
            hypothesis.reject()
        try:
            worst = check(target, prop, case)
        except NotImplementedError:
            result.refused += 1
            hypothesis.reject()
        except PropertyFailure as failure:
            if not smallest:
                stop_shrinking = time.perf_counter() + shrink_s
            smallest.append((case, str(failure)))
            raise
        if not smallest:
            result.cases += 1
            result.worst = max(result.worst, worst)
            on_case(result)

    phases = (Phase.generate, Phase.shrink) if shrink_s else (Phase.generate,)
    settings = hypothesis.settings(max_examples=examples, phases=phases, verbosity=Verbosity.quiet, database=None, deadline=None,
                                   derandomize=False, report_multiple_bugs=False, print_blob=False,
                                   suppress_health_check=tuple(HealthCheck))
    try:
        hypothesis.seed(seed)(settings(hypothesis.given(cases_for(target, prop, dims))(body)))()
    except Unsatisfiable:
        # Every case was refused.
        pass
    except (PropertyFailure, Flaky):
        # Flaky: a failure that does not show again, as a race's. It has failed all the same.
        result.status, result.case, result.message = "failed", str(smallest[-1][0]), smallest[-1][1]
    if result.status == "passed" and result.cases == 0:
        result.status, result.message = "refused", f"the target refused all of {result.refused} cases"
    result.seconds = time.perf_counter() - start
    return result


def together(parts: Sequence[Result]) -> Result:
    """One row of what was drawn in parts: the first failure, if there is one; seconds are summed over processes."""
    first = next((part for status in ("failed", "passed") for part in parts if part.status == status), parts[0])
    return replace(first, cases=sum(part.cases for part in parts), refused=sum(part.refused for part in parts),
                   worst=max(part.worst for part in parts), seconds=sum(part.seconds for part in parts))


def replay(target: Target, prop: Property, case: MLACase) -> Result:
    """One case, no drawing."""
    result = Result(target.name, "", prop.name)
    result.message = prop.not_applicable(target, case)
    if result.message:
        result.status = "not applicable"
        return result
    start = time.perf_counter()
    try:
        result.worst = check(target, prop, case)
        result.cases = 1
    except NotImplementedError as error:
        result.status, result.refused, result.message = "refused", 1, str(error)
    except PropertyFailure as failure:
        result.status, result.cases, result.case, result.message = "failed", 1, str(case), str(failure)
    result.seconds = time.perf_counter() - start
    return result


def plan_runs(targets: Sequence[Target], properties: Sequence[Property], dims: Sequence[str] | None,
              profile: Profile) -> Iterator[tuple[Target, str, Property, int]]:
    """(target, dims, property, examples) of every row of the table."""
    for target in targets:
        for name in dims or target.dims:
            for prop in properties if profile.examples[name] else ():
                yield target, name, prop, profile.examples[name] * WEIGHT.get(prop.name, 1)


def holds(results: Sequence[Result]) -> bool:
    """Whether nothing failed, and every target really ran something."""
    ran = {result.target for result in results if result.cases}
    return bool(results) and all(result.status != "failed" for result in results) and ran == {result.target for result in results}


def as_json(results: Sequence[Result], **about: object) -> dict[str, object]:
    return {**about, "holds": holds(results), "results": [asdict(result) for result in results]}


def select(names: Sequence[str] | None) -> list[Property]:
    """Properties by name; all without names."""
    unknown = sorted(set(names or ()) - set(PROPERTIES))
    if unknown:
        raise ValueError(f"--property {', '.join(unknown)} must be of {', '.join(PROPERTIES)}")
    return [prop for name, prop in PROPERTIES.items() if not names or name in names]
