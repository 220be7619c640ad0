"""The Hopper kernels' own source in the emulator: drawn pairs of case and schedule, planted bugs, the same bits whatever the schedule.

Levels: l0. Neither a GPU nor the simulator takes part.
"""

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase
from numba import cuda

pytestmark = pytest.mark.l0
if cuda.config.ENABLE_CUDASIM:
    pytest.skip("the simulator has no Hopper kernels to take them from", allow_module_level=True)

from verify import runner  # noqa: E402
from verify.cases import MLACase  # noqa: E402
from verify.checks import assert_same_results  # noqa: E402
from verify.emulator.device import decode  # noqa: E402
from verify.emulator.mutants import MANY, MUTANTS, ONE, PAIR, SEVERAL, Mutant  # noqa: E402
from verify.emulator.pairs import PairFailure, Schedule, check, pairs  # noqa: E402
from verify.properties import PROPERTIES, Property  # noqa: E402
from verify.targets import emulated  # noqa: E402

# 200 pairs, in parts that test processes can share out.
PARTS, PAIRS_PER_PART = 8, 25


@pytest.mark.parametrize("part", range(PARTS))
def test_pairs_run_clean(part: int) -> None:
    ran = 0

    @hypothesis.seed(part)
    @hypothesis.settings(max_examples=PAIRS_PER_PART, phases=(Phase.generate,), database=None, deadline=None, derandomize=False,
                         suppress_health_check=tuple(HealthCheck))
    @hypothesis.given(pairs())
    def run(pair: tuple[MLACase, Schedule]) -> None:
        nonlocal ran
        try:
            check(*pair)
        except NotImplementedError:
            hypothesis.reject()
        ran += 1

    run()
    assert ran >= PAIRS_PER_PART


@pytest.mark.parametrize("prop", [pytest.param(prop, id=name) for name, prop in PROPERTIES.items()])
def test_property_holds(prop: Property) -> None:
    """What the suite asks of every backend, each call on a schedule of its own."""
    result = runner.run_property(emulated(), prop, "emulated", examples=runner.PROFILES["quick"].examples["emulated"], seed=0)
    assert result.status in ("passed", "not applicable"), result.message


@pytest.mark.parametrize("mutant", [pytest.param(mutant, id=mutant.name.replace(" ", "-")) for mutant in MUTANTS])
def test_mutant_is_found(mutant: Mutant) -> None:
    kind, _, runs = mutant.run()
    assert kind, f"{runs} pairs ran on the mutant {mutant.name!r} and nothing was found"


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in
                                  (("one-piece", ONE), ("pair", PAIR), ("several-pieces", SEVERAL), ("many-parts", MANY))])
def test_healthy_kernel_gives_the_same_bits_on_every_schedule(case: tuple[MLACase, int]) -> None:
    """13 schedules of each case, 52 in all: no finding, and no bit depends on who came first."""
    inputs = case[0].build()
    results = [decode(inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens, inputs.head_dim_v, inputs.softmax_scale,
                      inputs.causal, device=Schedule(seed, case[1]).gpu()) for seed in range(13)]
    for seed, result in enumerate(results):
        assert_same_results(result, results[0], f"schedule {seed}")


def test_failure_prints_a_line_that_runs_it_again() -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "mask one token late")
    case, num_sms = mutant.cases[0]
    with pytest.raises(PairFailure) as failure:
        check(case, Schedule(3, num_sms), {mutant.module: [(mutant.old, mutant.new)]})
    assert failure.value.kind == "wrong"
    assert str(failure.value).endswith(f'python -m verify.emulator replay "{case}" --seed 3 --num-sms {num_sms}')


def test_edit_that_fits_no_place_is_refused() -> None:
    with pytest.raises(ValueError, match="must fit one place, and fits 0"):
        Mutant("typo", "mla_numba.kernels.hopper_decode", "no such text", "").run()
