"""The Hopper kernels' own source in the emulator: drawn pairs of case and schedule, planted bugs, the same bits whatever the schedule.

Levels: l0. Neither a GPU nor the simulator takes part.
"""

import math
import re
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase
from numba import cuda

pytestmark = pytest.mark.l0
if cuda.config.ENABLE_CUDASIM:
    pytest.skip("the simulator has no Hopper kernels to take them from", allow_module_level=True)

# After the skip: the simulator lacks what they import.
from mla_numba.config import DecodeShape, ScheduleConfig, ceil_div  # noqa: E402
from mla_numba.host import hopper  # noqa: E402
from mla_numba.host.schedule import Schedule as Tables  # noqa: E402
from mla_numba.host.schedule import make_host_schedule  # noqa: E402
from mla_numba.kernels.hopper_merge import ITEM_ROWS, ITEMS_PER_GROUP  # noqa: E402
from reference.mla import merge_states_ref  # noqa: E402
from verify import runner  # noqa: E402
from verify.cases import DTYPES, MLACase  # noqa: E402
from verify.checks import assert_same_results, assert_within  # noqa: E402
from verify.emulator.device import EmulatedGpu, decode  # noqa: E402
from verify.emulator.mutants import (  # noqa: E402
    FEW,
    FEW_PAIR,
    MANY,
    MUTANTS,
    ONE,
    PAIR,
    SEVERAL,
    THREE,
    TWO_PIECES,
    Mutant,
)
from verify.emulator.pairs import FEW_SHARE_PARTS, PairFailure, Schedule, check, pairs  # noqa: E402
from verify.properties import PROPERTIES, Property  # noqa: E402
from verify.targets import emulated  # noqa: E402
from verify.tolerances import FUNCTION, PIECE, UNIT, gamma, unit_roundoff, worst_ratio  # noqa: E402

# 40 pairs, in parts that test processes can share out: 200, as `explore --profile quick` draws, take two cores 8 minutes.
PARTS, PAIRS_PER_PART = 8, 5
# Of the mutants of few rows every seventh: the others take two cores 2 minutes more (`python -m verify.emulator mutants` has them all).
FEW_ROWS_STEP = 7
_FEW_ROWS = [mutant for mutant in MUTANTS if mutant.name.endswith(", few rows")]
PLANTED = [mutant for mutant in MUTANTS if mutant not in _FEW_ROWS] + _FEW_ROWS[::FEW_ROWS_STEP]


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


def test_documents_have_the_numbers_of_mutants() -> None:
    root = Path(__file__).resolve().parents[1]
    said = {path: re.findall(rf"{len(PLANTED)} of (?:the )?{len(MUTANTS)} |- {len(MUTANTS)} mutants", (root / path).read_text())
            for path in ("README.md", "docs/emulator.md")}
    assert {path: len(numbers) for path, numbers in said.items()} == {"README.md": 1, "docs/emulator.md": 2}


@pytest.mark.parametrize("mutant", [pytest.param(mutant, id=mutant.name.replace(" ", "-")) for mutant in PLANTED])
def test_mutant_is_found(mutant: Mutant) -> None:
    kind, _, runs = mutant.run()
    assert kind, f"{runs} pairs ran on the mutant {mutant.name!r} and nothing was found"


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in
                                  (("one-piece", ONE), ("three-blocks", THREE), ("pair", PAIR), ("several-pieces", SEVERAL),
                                   ("many-parts", MANY), ("two-row-tiles", TWO_PIECES), ("few-rows", FEW), ("pair-of-few", FEW_PAIR))])
def test_healthy_kernel_gives_the_same_bits_on_every_schedule(case: tuple[MLACase, int]) -> None:
    """6 schedules of each case, 48 in all: no finding, and no bit depends on who came first."""
    inputs = case[0].build()
    results = [decode(inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens, inputs.head_dim_v, inputs.softmax_scale,
                      inputs.causal, device=EmulatedGpu(seed, num_sms=case[1])) for seed in range(6)]
    for seed, result in enumerate(results):
        assert_same_results(result, results[0], f"schedule {seed}")


@pytest.mark.parametrize("num_heads", [16, 48, 128])
def test_a_job_of_more_than_are_cut_is_one_piece(num_heads: int) -> None:
    """Under `batch_invariant` others end at the multiples, here of two blocks."""
    inputs = MLACase(seq_lens=(330, 70, 250), num_heads_q=num_heads, pages="shuffled").build()
    got = decode(inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens, inputs.head_dim_v, inputs.softmax_scale, inputs.causal,
                 batch_invariant=True, device=EmulatedGpu(0, num_sms=4), split_blocks=2, max_cut_blocks=4)
    out, lse, out_bound, lse_bound = inputs.bounds()
    assert_within("out", got[0], out, out_bound)
    assert_within("lse", got[1], lse, lse_bound)


@pytest.mark.parametrize("num_heads", [8, 32, 64])
def test_a_scale_of_zero_weighs_all_tokens_alike(num_heads: int) -> None:
    """And no others: 0 times the infinity that hides a token would be no number."""
    check(MLACase(seq_lens=(65, 130), num_heads_q=num_heads, seq_len_q=2, softmax_scale=0.0), Schedule(0, 3, 8))


@pytest.mark.parametrize(("num_heads_kv", "axes"), [(1, (0,)), (1, (2,)), (1, (1, 2)), (2, (2,)), (2, (0, 1, 2))], ids=str)
def test_an_expanded_q_is_read_as_its_copy(num_heads_kv: int, axes: tuple[int, ...]) -> None:
    """Axes with a stride of 0, which TMA does not take."""
    inputs = MLACase(seq_lens=(70, 9), num_heads_q=16, num_heads_kv=num_heads_kv, seq_len_q=2).build()
    one = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(4))
    expanded = np.broadcast_to(inputs.q[one], inputs.q.shape)
    results = [decode(q, inputs.kv_cache, inputs.block_table, inputs.seq_lens, inputs.head_dim_v, inputs.softmax_scale, inputs.causal)
               for q in (expanded, np.ascontiguousarray(expanded))]
    assert_same_results(*results, "expanded")


@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_cache_without_pages_reads_as_zeros(page_size: int) -> None:
    """Whatever the table says, and where nobody but the rehearsing worker reads."""
    case = MLACase(seq_lens=(0,), num_heads_q=16, page_size=page_size, spare_pages=0, spare_columns=1)
    check(case, Schedule(0, 3, 8))
    inputs = case.build()
    inputs.block_table[:], inputs.seq_lens[:] = 0, 5
    out, lse = decode(inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens, inputs.head_dim_v, None, True)
    assert not out.astype(np.float32).any()
    np.testing.assert_allclose(lse, math.log(5), rtol=1e-6)


@pytest.mark.parametrize(("num_heads", "num_blocks", "error"), [(16, 7, 0.0), (64, 7, 0.0), (128, 7, 0.0), (16, 33, 0.0), (64, 33, 0.0),
                                                                (128, 33, 100 / 100.24 - 1)])
def test_the_largest_weight_is_exact(num_heads: int, num_blocks: int, error: float) -> None:
    """It is if the maximum is its own, and P 1. In the seesaw that may lag behind EXACT_STEPS of a piece: P is 100.24, in bfloat16 100."""
    gap, last, rng = math.log(100.24), (num_blocks - 1) * 64, np.random.default_rng(0)
    q, k = (np.zeros(shape, DTYPES["bfloat16"]) for shape in ((1, 1, num_heads, 576), (num_blocks, 64, 1, 576)))
    q[..., 0], k[..., 1:] = 1, rng.standard_normal((num_blocks, 64, 1, 575))
    # The first token is the heaviest until the last one comes, the rest weigh nothing.
    k[..., 0] = -8
    k[0, 0, 0, 0], k[-1, 0, 0, 0] = 0, 1
    out, _ = decode(q, k, np.arange(num_blocks, dtype=np.int32)[None], np.array([last + 1], np.int32), 512, gap, True, num_workers=1)
    v = k[[0, -1], 0, 0, 1:512].astype(np.float64)
    want = (v[0] + 100.24 * v[1]) / 101.24
    shares = out[0, 0, :, 1:].astype(np.float64) @ want / (want @ want) - 1
    np.testing.assert_allclose(shares, error, atol=3e-4)


def _made_up_states(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(maxima, sums) of rows, some of which, and the first one of every KV head in all parts, see nothing."""
    maxima = rng.normal(0, 4, shape).astype(np.float32)
    maxima[rng.random(shape) < 0.1] = -np.inf
    maxima.reshape(*shape[:2], -1)[..., 0] = -np.inf
    # What the decode leaves is not divided by the sums of exponentials relative to the maxima.
    return maxima, np.where(np.isfinite(maxima), rng.uniform(0.5, 100, shape), 0).astype(np.float32)


def _merge_of(num_parts: int, num_kv_heads: int, num_heads_q: int, rows_per_job: int) -> Tables:
    """Of one request in so many parts, of a block each."""
    shape = DecodeShape(1, 1, 1, num_heads_q, num_kv_heads, 576, 512, 64, "float16", True, False)
    config = ScheduleConfig(rows_per_job=rows_per_job, block_n=64, num_workers=2, overhead_blocks=1, min_split_blocks=1, split_blocks=1)
    schedule = make_host_schedule(config, shape, np.array([64 * num_parts], np.int32), None)
    assert schedule.num_splits[1] == num_parts
    return schedule


def _with_rare(o: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Some infinite, some no numbers."""
    chance = rng.random(o.shape)
    return np.where(chance < 5e-4, np.float32(np.inf), np.where(chance > 1 - 5e-4, np.float32(np.nan), o))


def _packed(o: np.ndarray, slot_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of strips (..., pair, strip, lane, float) as they lie in a warp's part, a slot of so many bytes, as hopper_part says; and what
    of each float is there."""
    bits = o.view(np.uint32)
    # (..., pair, strip, lane, word of three) to (..., pair, lane, word of six).
    words = np.moveaxis(bits[..., :3] & ~np.uint32(0xFF) | bits[..., 3:] >> np.array([8, 16, 24], np.uint32) & 0xFF, -3, -2)
    words = words.reshape(*words.shape[:-2], 6)
    pairs = np.concatenate([words[..., part].reshape(*words.shape[:-2], -1) for part in (slice(4), slice(4, 6))], axis=-1)
    slots = np.full((*pairs.shape[:-2], slot_bytes // 4), 0x7FC00000, np.uint32)
    slots[..., :pairs.shape[-2] * pairs.shape[-1]] = pairs.reshape(*pairs.shape[:-2], -1)
    return slots, (bits & ~np.uint32(0xFF)).view(np.float32)


def _check_merge(schedule: Tables, num_rows: int, num_sms: int, slots: np.ndarray, states: np.ndarray, counters: np.ndarray,
                 rows: np.ndarray, lse2: np.ndarray) -> None:
    """Merge the parts that lie in the first three arrays; they are `rows` (slot, KV head, row, column) and `lse2` (slot, KV head, row)."""
    num_parts, (num_kv_heads, heads) = int(schedule.num_splits[1]), rows.shape[1:3]
    num_heads_q = num_kv_heads * heads
    gpu = EmulatedGpu(num_parts, num_sms=num_sms)
    out, lse = np.full((1, num_heads_q, 512), np.nan, np.float16), np.full((num_heads_q, 1), np.nan, np.float32)
    address = {name: gpu.machine.memory.add(name, array.reshape(-1).view(np.uint8), writable=name in ("counters", "out", "lse"))
               for name, array in (("o", slots), ("states", states), ("counters", counters), ("out", out), ("lse", lse))}
    tables = gpu.place_schedule(schedule).addresses
    items = ITEMS_PER_GROUP * ceil_div(heads, ITEM_ROWS)
    gpu.launch(hopper.merge_spec("float16", num_rows), (items, num_kv_heads, num_sms), 0, tables["merges"], tables["totals"],
               address["o"], address["states"], address["counters"], address["out"], 0, 0, 1024, address["lse"], 0, 4, 0,
               ceil_div(heads, num_rows), heads, np.inf)
    gpu.run()
    assert not counters.any()

    parts = [(rows[i].reshape(1, num_heads_q, 512), math.log(2) * lse2[i].reshape(num_heads_q, 1)) for i in range(num_parts)]
    want, want_lse = merge_states_ref(parts)
    weighted, _ = merge_states_ref([(np.abs(part), part_lse) for part, part_lse in parts])
    # A weight is an exp2 of a rounded difference of up to 2^5; sums of num_parts products.
    relative = 2 * FUNCTION + 2 * 2 ** 5 * UNIT + gamma(2 * num_parts + 8)
    step, least = unit_roundoff("float16")
    assert_within("out", out, want, relative * weighted + step * np.abs(want) + least)
    assert_within("lse", lse, want_lse, relative + FUNCTION + 4 * UNIT * np.abs(np.where(np.isfinite(want_lse), want_lse, 0)))


@pytest.mark.parametrize(("num_parts", "num_kv_heads", "num_heads_q", "num_sms"), [
    (3, 1, 16, 1), (8, 2, 34, 3), (9, 1, 80, 2), (16, 1, 5, 1), (17, 1, 20, 3), (33, 1, 16, 2), (132, 1, 1, 3)])
def test_merge_kernel_alone(num_parts: int, num_kv_heads: int, num_heads_q: int, num_sms: int) -> None:
    """Partial results made up, some rows empty in some or all parts, some numbers infinite or none, against float64."""
    heads, rng = num_heads_q // num_kv_heads, np.random.default_rng(num_parts)
    row_tiles = ceil_div(heads, 64)
    schedule = _merge_of(num_parts, num_kv_heads, num_heads_q, 64 * row_tiles)
    # (slot, KV head, row tile, half, warp of it, strip, lane's row, lane's columns, row 8 further on, column): see hopper_merge.
    o = rng.standard_normal((schedule.num_slots, num_kv_heads, row_tiles, 2, 4, 32, 8, 4, 2, 2)).astype(np.float32)
    maxima, sums = _made_up_states((schedule.num_slots, num_kv_heads, row_tiles, 64), rng)
    lse2 = maxima + np.log2(np.where(sums > 0, sums, 1).astype(float))
    sums_of_o = sums.reshape(*sums.shape[:3], 4, 2, 8).transpose(0, 1, 2, 3, 5, 4)[:, :, :, None, :, None, :, None, :, None]
    o = np.where(sums_of_o > 0, _with_rare(o, rng), o)
    given = (o * sums_of_o).astype(np.float32).reshape(*o.shape[:5], 16, 2, 32, 4)
    slots, there = _packed(given, 32 * 512)
    assert worst_ratio(there, given, PIECE * np.abs(given)) <= 1
    o = there.reshape(o.shape) / np.where(sums_of_o > 0, sums_of_o, 1).astype(float)
    states = np.ascontiguousarray(np.broadcast_to(np.stack((maxima, sums), 3)[:, :, :, None], (*sums.shape[:3], 2, 2, 64)))
    # Of the warps that have rows all parts are there.
    counters = np.zeros((schedule.num_slots, num_kv_heads, row_tiles, 2, 4), np.uint32)
    counters[0] = num_parts * (16 * np.arange(4 * row_tiles).reshape(row_tiles, 1, 4) < heads)
    rows = o.transpose(0, 1, 2, 4, 8, 6, 3, 5, 7, 9).reshape(schedule.num_slots, num_kv_heads, row_tiles * 64, 512)[:, :, :heads]
    _check_merge(schedule, 64, num_sms, slots, states, counters, rows, lse2.reshape(*lse2.shape[:2], -1)[:, :, :heads])


@pytest.mark.parametrize(("num_rows", "num_parts", "num_kv_heads", "num_heads_q", "num_sms"), [
    (16, 8, 2, 20, 3), (16, 33, 1, 5, 2), (32, 17, 1, 20, 3)])
def test_merge_kernel_alone_of_few_rows(num_rows: int, num_parts: int, num_kv_heads: int, num_heads_q: int, num_sms: int) -> None:
    """The same, as hopper_swapped leaves partial results."""
    heads, rng = num_heads_q // num_kv_heads, np.random.default_rng(num_parts)
    schedule = _merge_of(num_parts, num_kv_heads, num_heads_q, num_rows)
    # (slot, KV head, half, warp of it, tile, 8 rows, lane's column, lane's rows, column 8 further on, row): see hopper_swapped_store.
    o = rng.standard_normal((schedule.num_slots, num_kv_heads, 2, 4, 4, num_rows // 8, 8, 4, 2, 2)).astype(np.float32)
    maxima, sums = _made_up_states((schedule.num_slots, num_kv_heads, num_rows), rng)
    lse2 = maxima + np.log2(np.where(sums > 0, sums, 1).astype(float))
    sums_of_o = sums.reshape(*sums.shape[:2], 1, 1, 1, num_rows // 8, 1, 4, 1, 2)
    o = np.where(sums_of_o > 0, _with_rare(o, rng), o)
    # Pairs are of the same rows in tiles 0 and 1, or 2 and 3.
    pairs = (o * sums_of_o).astype(np.float32).reshape(*o.shape[:4], 2, 2, num_rows // 8, 32, 4).swapaxes(5, 6)
    slots, there = _packed(np.ascontiguousarray(pairs).reshape(*o.shape[:4], num_rows // 4, 2, 32, 4), num_rows * 256)
    o = there.reshape(pairs.shape).swapaxes(5, 6).reshape(o.shape) / np.where(sums_of_o > 0, sums_of_o, 1).astype(float)
    # Of every warp.
    states = np.ascontiguousarray(np.broadcast_to(np.stack((maxima, sums), 2)[:, :, None], (*sums.shape[:2], 8, 2, num_rows)))
    # The 4 warps of a warpgroup count up its first word.
    counters = np.zeros((schedule.num_slots, num_kv_heads, 2, 4), np.uint32)
    counters[0, :, :, 0] = 4 * num_parts
    rows = o.transpose(0, 1, 5, 7, 9, 2, 4, 3, 8, 6).reshape(schedule.num_slots, num_kv_heads, num_rows, 512)[:, :, :heads]
    _check_merge(schedule, num_rows, num_sms, slots, states, counters, rows, lse2[:, :, :heads])


def test_rare_events_are_no_deadlock() -> None:
    """The merge polls 20,000 times and more while TMA's bytes come, every 500th turn."""
    case = MLACase(seq_lens=(0, 519, 1, 0), num_heads_q=16, softmax_scale=0.07, pages="shuffled", values="alternating", spare_pages=0,
                   seed=5679)
    assert check(case, Schedule(201, 5, FEW_SHARE_PARTS)) < 1


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
