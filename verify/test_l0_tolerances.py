"""The bounds hold for every honest kernel, even an adversarial one; they are tight; and each seeded bug breaks them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.mla import mla_decode_ref
from reference.paged import query_groups
from reference.rounding import mla_decode_emulated, round_to
from verify.tolerances import (
    ACCUMULATE,
    FUNCTION,
    PIECE,
    decode_bounds,
    float64_error,
    gamma,
    merge_bounds,
    rel_err,
    unit_roundoff,
    worst_ratio,
)

pytestmark = pytest.mark.l0

DTYPES = ("bfloat16", "float16", "float32")
REGIMES = ("normal", "uniform", "one_hot", "rising", "falling", "alternating", "offset", "tiny_values")
PAGE_SIZE = 16
HEAD_DIM_V = 64


def problem(seed, regime, dtype, seq_lens, *, num_heads_q=8, num_heads_kv=1, seq_len_q=1, head_dim_qk=576):
    """(q, kv_cache, block_table, seq_lens), all values exact in `dtype`, pages shuffled. The last 16 of K's columns steer the logits."""
    rng = np.random.default_rng(seed)
    columns = -(-max(*seq_lens, 1) // PAGE_SIZE)
    q = rng.standard_normal((len(seq_lens), seq_len_q, num_heads_q, head_dim_qk))
    block_table = rng.permutation(len(seq_lens) * columns).reshape(len(seq_lens), columns)
    kv_cache = rng.standard_normal((block_table.size, PAGE_SIZE, num_heads_kv, head_dim_qk))
    token = (np.argsort(block_table.ravel()) % columns)[:, None, None, None] * PAGE_SIZE + np.arange(PAGE_SIZE)[:, None, None]
    steer = {"one_hot": 2.0 * head_dim_qk ** 0.5 * (rng.random(token.shape) < 0.02), "rising": 0.2 * token, "falling": -0.2 * token,
             "alternating": 40.0 * (-1.0) ** token, "offset": np.full(token.shape, 400.0)}.get(regime)
    if steer is not None:
        q[..., -16:], kv_cache[..., -16:] = head_dim_qk ** 0.5 / 16.0, steer
    if regime == "uniform":
        q[:] = 0.0
    if regime == "tiny_values":
        kv_cache[..., :HEAD_DIM_V] *= 1e-6
    return round_to(q, dtype), round_to(kv_cache, dtype), block_table, np.array(seq_lens)


def ratios(result, bounds):
    """(out, lse): largest error over bound."""
    return worst_ratio(result[0], bounds[0], bounds[2]), worst_ratio(result[1], bounds[1], bounds[3])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2 ** 32 - 1), regime=st.sampled_from(REGIMES), dtype=st.sampled_from(DTYPES), block_n=st.sampled_from([16, 64]),
       seq_lens=st.lists(st.integers(0, 400), min_size=1, max_size=3), num_heads_kv=st.sampled_from([1, 2]), seq_len_q=st.integers(1, 2))
def test_honest_decode_is_within(seed, regime, dtype, block_n, seq_lens, num_heads_kv, seq_len_q):
    args = problem(seed, regime, dtype, seq_lens, num_heads_kv=num_heads_kv, seq_len_q=seq_len_q)
    bounds = decode_bounds(*args, dtype=dtype, head_dim_v=HEAD_DIM_V)
    assert max(ratios(mla_decode_emulated(*args, dtype=dtype, head_dim_v=HEAD_DIM_V, block_n=block_n), bounds)) <= 1.0
    for got, want in zip(bounds[:2], mla_decode_ref(*args, head_dim_v=HEAD_DIM_V), strict=True):
        np.testing.assert_array_equal(got, want)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2 ** 32 - 1), regime=st.sampled_from(REGIMES), dtype=st.sampled_from(DTYPES), cut=st.integers(0, 10),
       seq_len=st.integers(0, 160))
def test_merge_of_honest_decodes_is_within(seed, regime, dtype, cut, seq_len):
    q, kv_cache, table, seq_lens = problem(seed, regime, dtype, [seq_len, 160])
    first = np.minimum(seq_lens, cut * PAGE_SIZE)
    parts = [(q, kv_cache, table[:, :cut], first), (q, kv_cache, table[:, cut:], seq_lens - first)]
    options = {"dtype": dtype, "head_dim_v": HEAD_DIM_V}
    states = [mla_decode_emulated(*part, **options) for part in parts]
    exact = [decode_bounds(*part, **options) for part in parts]
    merged = float32_merge(states, dtype)
    assert max(ratios(merged, merge_bounds(states, dtype=dtype))) <= 1.0
    whole = merge_bounds([part[:2] for part in exact], dtype=dtype, state_bounds=[part[2:] for part in exact])
    assert max(ratios(merged, whole)) <= 1.0
    for got, want in zip(whole[:2], mla_decode_ref(q, kv_cache, table, seq_lens, head_dim_v=HEAD_DIM_V), strict=True):
        np.testing.assert_allclose(got, want, rtol=float64_error(8000), atol=float64_error(8000))


def float32_merge(states, dtype):
    """Two states, in float32."""
    lses = np.stack([np.where(np.isinf(lse), -np.inf, lse) for _, lse in states]).astype(np.float32)
    largest = lses.max(axis=0)
    empty = np.isneginf(largest)
    weights = np.where(empty, np.float32(0.5), np.exp(lses - np.where(empty, np.float32(0.0), largest)))
    total = weights.sum(axis=0)
    rows = (weights / total).swapaxes(-1, -2)[..., None]
    return round_to(sum(w * out for w, (out, _) in zip(rows, states, strict=True)), dtype), np.where(empty, np.inf, largest + np.log(total))


def adversary(args, dtype, row, column):
    """One element of out, off in the same direction in every step of the arithmetic that the bound grants."""
    q, kv_cache, block_table, seq_lens = args
    (_, keys), = query_groups((1, 1, 1, q.shape[-1]), kv_cache, block_table, seq_lens, causal=True, cu_seqlens_q=None)
    values = keys[:, column]
    scale_log2 = math.log2(math.e) * q.shape[-1] ** -0.5
    x = scale_log2 * (keys @ q[0, 0, row])
    weights = np.exp2(x - x.max())
    out = weights @ values / weights.sum()
    shift = scale_log2 * gamma(q.shape[-1]) * (np.abs(keys) @ np.abs(q[0, 0, row])) + FUNCTION
    # All steps push away from 0: tokens on that side of the average are too heavy, the others too light.
    shifted = np.exp2(x + np.sign(out) * np.sign(values - out) * shift)
    shifted /= shifted.max()
    unit, least = unit_roundoff(dtype)
    p_error = np.minimum(np.maximum(unit * shifted, least), shifted)
    g = len(keys) * ACCUMULATE
    # One piece or many, each loses as much of itself.
    piece = 0.0 if dtype == "float32" else PIECE
    numerator = (shifted + np.sign(out) * np.sign(values) * (p_error + (g + piece) * shifted)) @ values
    result = numerator / ((1.0 - g) * shifted.sum())
    return out, result + np.sign(out) * max(unit * abs(result), least)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adversarial_arithmetic_is_within_and_comes_near(regime, dtype):
    args = problem(3, regime, dtype, [300], num_heads_q=4)
    out, _, bound, _ = decode_bounds(*args, dtype=dtype, head_dim_v=HEAD_DIM_V)
    reached = []
    for row, column in np.ndindex(4, HEAD_DIM_V):
        exact, got = adversary(args, dtype, row, column)
        assert exact == pytest.approx(out[0, 0, row, column], rel=1e-9, abs=float64_error(8000))
        reached.append(abs(got - exact) / bound[0, 0, row, column])
    assert max(reached) <= 1.0
    assert max(reached) >= 0.4


@pytest.mark.parametrize("seq_len", [64, 128, 300])
def test_bound_is_within_eight_times_of_an_ordinary_error(seq_len):
    args = problem(5, "normal", "bfloat16", [seq_len] * 2, num_heads_q=32)
    bounds = decode_bounds(*args, dtype="bfloat16", head_dim_v=512)
    out, _ = mla_decode_emulated(*args, dtype="bfloat16")
    assert bounds[2].max() <= 8.0 * np.abs(out - bounds[0]).max()


def without_rescale(q, kv_cache, block_table, seq_lens, head_dim_v, block_n=64):
    """Online softmax that forgets to rescale what it has when the maximum grows; otherwise exact."""
    out = np.zeros((*q.shape[:-1], head_dim_v))
    for index, keys in query_groups(q.shape, kv_cache, block_table, seq_lens, causal=True, cu_seqlens_q=None):
        logits = q.shape[-1] ** -0.5 * (q[index] @ keys.T)
        largest = np.maximum.accumulate(logits, axis=1)[:, np.minimum(np.arange(len(keys)) | (block_n - 1), len(keys) - 1)]
        p = np.exp(logits - largest)
        out[index] = p @ keys[:, :head_dim_v] / p.sum(axis=1, keepdims=True)
    return out


def unmasked_tail(q, kv_cache, block_table, seq_lens, **options):
    return mla_decode_emulated(q, kv_cache, block_table, seq_lens + 1, **options)


def missing_last_token(q, kv_cache, block_table, seq_lens, **options):
    return mla_decode_emulated(q, kv_cache, block_table, seq_lens - 1, **options)


def wrong_scale(*args, **options):
    return mla_decode_emulated(*args, softmax_scale=1.01 * args[0].shape[-1] ** -0.5, **options)


def swapped_page(q, kv_cache, block_table, seq_lens, **options):
    other = block_table.copy()
    other[[0, 1], 0] = other[[1, 0], 0]
    return mla_decode_emulated(q, kv_cache, other, seq_lens, **options)


def shifted_columns(*args, **options):
    out, lse = mla_decode_emulated(*args, **options)
    return np.roll(out, 1, axis=-1), lse


def lse_in_base_two(*args, **options):
    out, lse = mla_decode_emulated(*args, **options)
    return out, lse / math.log(2.0)


def p_of_too_few_bits(q, kv_cache, block_table, seq_lens, *, dtype, head_dim_v):
    """A float8-like P: 4 bits of significand."""
    out, lse = np.zeros((*q.shape[:-1], head_dim_v)), np.zeros(q.shape[:-1])
    for index, keys in query_groups(q.shape, kv_cache, block_table, seq_lens, causal=True, cu_seqlens_q=None):
        logits = q.shape[-1] ** -0.5 * (q[index] @ keys.T)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        mantissa, exponent = np.frexp(p)
        out[index] = np.ldexp(np.rint(mantissa * 16.0) / 16.0, exponent) @ keys[:, :head_dim_v] / p.sum(axis=1, keepdims=True)
        lse[index] = np.log(p.sum(axis=1)) + logits.max(axis=1)
    return round_to(out, dtype), lse.swapaxes(-1, -2)


BUGS = (unmasked_tail, missing_last_token, wrong_scale, swapped_page, shifted_columns, lse_in_base_two, p_of_too_few_bits)


@pytest.mark.parametrize("seq_len", [64, 129, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_bug_exceeds_the_bound(bug, dtype, seq_len):
    args = problem(seq_len, "normal", dtype, [seq_len, seq_len], num_heads_q=16)
    bounds = decode_bounds(*args, dtype=dtype, head_dim_v=HEAD_DIM_V)
    assert max(ratios(bug(*args, dtype=dtype, head_dim_v=HEAD_DIM_V), bounds)) > 1.0


@pytest.mark.parametrize("regime", ["normal", "rising"])
def test_missing_rescale_exceeds_the_bound(regime):
    args = problem(9, regime, "bfloat16", [300, 200], num_heads_q=16)
    out, _, bound, _ = decode_bounds(*args, dtype="bfloat16", head_dim_v=HEAD_DIM_V)
    assert worst_ratio(without_rescale(*args, HEAD_DIM_V), out, bound) > 1.0


def test_rows_that_see_nothing_are_exact():
    args = problem(0, "normal", "bfloat16", [0, 1], seq_len_q=2)
    out, lse, out_bound, lse_bound = decode_bounds(*args, dtype="bfloat16", head_dim_v=HEAD_DIM_V, empty_lse=-math.inf)
    assert np.all(out[0] == 0.0) and np.all(lse[0] == -np.inf) and np.all(out_bound[0] == 0.0) and np.all(lse_bound[0] == 0.0)
    assert worst_ratio(lse[0], lse[0], lse_bound[0]) == 0.0
    assert worst_ratio(-lse[0], lse[0], lse_bound[0]) == math.inf


def test_bound_of_absurd_logits_is_large_not_nan():
    q, kv_cache, table, seq_lens = problem(0, "normal", "float32", [40])
    bounds = decode_bounds(1e15 * q, 1e15 * kv_cache, table, seq_lens, dtype="float32", head_dim_v=HEAD_DIM_V)
    assert not any(np.isnan(array).any() for array in bounds)


@pytest.mark.parametrize(("got", "want", "bound", "ratio"), [
    ([1.0, 2.0], [1.0, 2.5], [0.0, 1.0], 0.5), ([np.nan], [0.0], [1.0], math.inf), ([np.nan], [np.nan], [0.0], 0.0),
    ([np.inf], [1.0], [1.0], math.inf), ([1e-9], [0.0], [0.0], math.inf), ([], [], [], 0.0)])
def test_worst_ratio(got, want, bound, ratio):
    assert worst_ratio(got, want, np.array(bound)) == ratio


def test_rel_err():
    assert rel_err([3.0, 4.0], [3.0, 0.0]) == 4.0 / 3.0
    assert rel_err([0.0], [0.0]) == 0.0 and rel_err([1.0], [0.0]) == math.inf
