"""The cpu backend's own parts: its arithmetic on every bit pattern, and decodes at the edges of its tiles, jobs and splits."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numba
import numpy as np
import pytest

import mla_numba
from mla_numba.host import cpu
from mla_numba.kernels import cpu_math
from verify.cases import MLACase
from verify.checks import assert_same_results, assert_within

pytestmark = pytest.mark.l0
HALVES = pytest.mark.parametrize(("code", "dtype"), [(cpu_math.BFLOAT16, ml_dtypes.bfloat16), (cpu_math.FLOAT16, np.float16)],
                                 ids=["bfloat16", "float16"])


@numba.njit
def _exp2(x, out):
    for i in range(x.size):
        out[i] = cpu_math.exp2(x[i])


@numba.njit
def _widen(bits, out, code):
    for i in range(bits.size):
        out[i] = cpu_math.widen(bits[i], code)


@numba.njit
def _narrow(x, out, code):
    for i in range(x.size):
        out[i] = cpu_math.narrow(x[i], code)


def test_exp2_is_within_2_ulp():
    x = -np.concatenate([np.linspace(0, 126, 1_000_000), np.geomspace(1e-30, 1, 100_000)]).astype(np.float32)
    got = np.empty_like(x)
    _exp2(x, got)
    want = np.exp2(x.astype(np.float64))
    assert np.max(np.abs(got - want) / np.spacing(want.astype(np.float32))) <= 2


def test_exp2_at_its_ends():
    x = np.array([0, -0.0, -1, -126, -126.01, -1e30, -np.inf, np.nan], np.float32)
    got = np.empty_like(x)
    _exp2(x, got)
    np.testing.assert_array_equal(got, np.array([1, 1, 0.5, 2.0**-126, 0, 0, 0, np.nan], np.float32))


@HALVES
def test_widen_all_patterns(code, dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    got = np.empty(bits.size, np.float32)
    _widen(bits, got, code)
    np.testing.assert_array_equal(got.view(np.uint32), bits.view(dtype).astype(np.float32).view(np.uint32))


@HALVES
def test_narrow_rounds_to_nearest_even(code, dtype):
    values = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    ordered = np.unique(values[np.isfinite(values)]).astype(np.float64)
    middles = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)
    random = np.random.default_rng(0).integers(0, 2**32, 500_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([values, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf)), random])
    got = np.empty(x.size, np.uint16)
    _narrow(x, got, code)
    with np.errstate(all="ignore"):
        want = x.astype(dtype)
    nan = np.isnan(x)
    np.testing.assert_array_equal(got[~nan], want.view(np.uint16)[~nan])
    assert np.isnan(got[nan].view(dtype).astype(np.float32)).all()


def _decode(inputs, **options):
    return mla_numba.mla_decode(inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens, head_dim_v=inputs.head_dim_v,
                                causal=inputs.causal, cu_seqlens_q=inputs.cu_seqlens_q, backend="cpu", **options)


def _deepseek(**changes):
    return MLACase(**{"seq_lens": (1, 255, 257, 700), "num_heads_q": 16, "pages": "shuffled", "spare_columns": 2, **changes})


@pytest.mark.parametrize("case", [
    _deepseek(),
    _deepseek(dtype="float16", seq_len_q=2),
    _deepseek(dtype="float32", layout="unaligned"),
    _deepseek(seq_lens=(0, 1, 300, -5), seq_len_q=3, num_heads_q=128),
    _deepseek(q_lens=(0, 40, 1, 3), causal=False, layout="padded"),
    _deepseek(seq_lens=(9, 600), num_heads_q=6, num_heads_kv=3, head_dim_qk=37, head_dim_v=19, page_size=1, layout="transposed"),
    _deepseek(seq_lens=(3000,), page_size=256, values="rising"),
    _deepseek(seq_lens=(513, 512), num_heads_q=1, page_size=48, values="one_hot"),
], ids=repr)
def test_decode_matches_float64(case):
    inputs = case.build()
    out, lse = _decode(inputs)
    want_out, want_lse, out_bound, lse_bound = inputs.bounds()
    assert_within("out", out, want_out, out_bound)
    assert_within("lse", lse, want_lse, lse_bound)
    assert_same_results(_decode(inputs), (out, lse), "running again")


def test_invisible_bytes_change_no_bit():
    case = _deepseek(seq_len_q=2)
    assert_same_results(_decode(case.build(poison=True)), _decode(case.build(poison=False)), "what no request may see")


def test_bad_pages_and_length_over_capacity_read_zeros():
    inputs = _deepseek(seq_lens=(200, 200, 200)).build(poison=False)
    want = _decode(inputs)
    inputs.kv_cache[inputs.block_table[0, 1]] = 0
    zeroed = _decode(inputs)
    for bad in (-1, len(inputs.kv_cache), 2147480000, -(2**31)):
        inputs.block_table[0, 1] = bad
        assert_same_results(_decode(inputs), zeroed, f"page id {bad}, a page of zeros otherwise,")
    inputs.seq_lens[2] = 64 * inputs.block_table.shape[1] + 1000
    out, lse = _decode(inputs)
    assert np.isfinite(lse).all()
    assert_same_results((out[1], lse[1]), (want[0][1], want[1][1]), "another request's length over capacity")


def test_batch_invariant_is_bitwise_the_same_alone_and_anywhere():
    inputs = _deepseek(seq_lens=(5, 2500, 1024, 1025), q_lens=(1, 2, 9, 1)).build()
    rows = inputs.rows(*_decode(inputs, batch_invariant=True))
    for order in ((1,), (2,), (3, 1, 1), (2, 0, 1, 3)):
        taken = inputs.take(order)
        at = inputs.taken_rows(order)
        assert_same_results(taken.rows(*_decode(taken, batch_invariant=True)), (rows[0][at], rows[1][at]), f"taking requests {order}")


def test_a_job_of_more_than_are_cut_is_one_piece(monkeypatch):
    chosen = cpu.schedule_config
    monkeypatch.setattr(cpu, "schedule_config", lambda shape, **known: replace(chosen(shape, **known), split_blocks=1, max_cut_blocks=2))
    # Blocks are of 256 tokens.
    inputs = _deepseek(seq_lens=(700, 20, 500)).build()
    plan = mla_numba.plan_decode(inputs.seq_lens, num_heads_q=inputs.q.shape[2], batch_invariant=True)
    assert np.diff(plan.schedule.num_splits).tolist() == [1, 1, 2]
    got = mla_numba.mla_decode(inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens, plan=plan, batch_invariant=True)
    out, lse, out_bound, lse_bound = inputs.bounds()
    assert_within("out", got[0], out, out_bound)
    assert_within("lse", got[1], lse, lse_bound)


def test_number_of_threads_and_splits_stays_within_the_bound():
    inputs = _deepseek(seq_lens=(3000, 20)).build()
    want_out, want_lse, out_bound, lse_bound = inputs.bounds()
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        out, lse = _decode(inputs)
    finally:
        numba.set_num_threads(before)
    assert_within("out", out, want_out, out_bound)
    assert_within("lse", lse, want_lse, lse_bound)


def test_cache_with_negative_strides():
    inputs = _deepseek(num_heads_q=4, num_heads_kv=2).build()
    backwards = np.ascontiguousarray(inputs.kv_cache[::-1, :, ::-1])[::-1, :, ::-1]
    assert_same_results(_decode(replace(inputs, kv_cache=backwards)), _decode(inputs), "the cache's strides")


def test_many_tiny_requests():
    lengths = tuple(int(n) for n in np.random.default_rng(0).integers(0, 4, 20_000))
    inputs = MLACase(seq_lens=lengths, num_heads_q=2, head_dim_qk=12, head_dim_v=8, page_size=2).build()
    out, lse = _decode(inputs)
    some = list(range(0, 20_000, 97))
    want_out, want_lse, out_bound, lse_bound = inputs.take(some).bounds()
    assert_within("out", out[some], want_out, out_bound)
    assert_within("lse", lse[some], want_lse, lse_bound)


def test_python_threads_may_call_at_once():
    inputs = _deepseek(num_heads_q=64).build()
    want = _decode(inputs)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: _decode(inputs), range(20)):
            assert_same_results(got, want, "other threads' calls")


def test_blas_threads_are_restored():
    threads = cpu._blas_threads()
    if threads is None:
        pytest.skip("SciPy's BLAS is not OpenBLAS")
    before = threads[0]()
    with cpu._one_blas_thread():
        assert threads[0]() == 1
    assert threads[0]() == before


def test_merge_ignores_what_has_no_weight():
    inputs = _deepseek(seq_lens=(300,)).build()
    out, lse = _decode(inputs)
    for empty in (np.inf, -np.inf):
        nothing = np.full_like(out, np.nan), np.full_like(lse, empty)
        merged = mla_numba.merge_states([nothing, (out, lse)], backend="cpu")
        assert_same_results(merged, (out, lse), "a state that saw nothing")
        merged_out, merged_lse = mla_numba.merge_states([nothing, nothing], empty_lse="-inf", backend="cpu")
        assert not merged_out.astype(np.float32).any() and (merged_lse == -np.inf).all()
