"""The oracle against cases worked by hand, against a second oracle written another way, and against ml_dtypes' rounding."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_numba import contract
from reference import mla, rounding
from reference.mla import merge_states_ref, mla_decode_ref
from reference.paged import gather_tokens
from reference.rounding import mla_decode_emulated, round_to
from verify.checks import assert_within
from verify.tolerances import decode_bounds, float64_error

pytestmark = pytest.mark.l0


def cache_of(tokens, page_size=1):
    """A cache of one KV head whose pages hold the rows of `tokens` in order, and the table row that names them."""
    tokens = np.asarray(tokens, np.float64)
    return tokens.reshape(-1, page_size, 1, tokens.shape[-1]), np.arange(len(tokens) // page_size)[None, :]


# Two tokens, K = V. With scale 1, q = (ln 3, 0) gives them the logits ln 3 and 0: probabilities 3/4 and 1/4.
TWO_TOKENS = [[1.0, 8.0], [0.0, 4.0]]
Q_LN3 = [math.log(3.0), 0.0]


def decode_two(q, seq_lens, **options):
    kv_cache, table = cache_of(TWO_TOKENS)
    q = np.asarray(q, np.float64)
    table = np.repeat(table, len(seq_lens), axis=0)
    return mla_decode_ref(q, kv_cache, table, seq_lens, head_dim_v=2, **{"softmax_scale": 1.0, **options})


def test_one_token_gives_its_value():
    out, lse = decode_two([[[Q_LN3]]], [1], softmax_scale=0.5)
    assert out.shape == (1, 1, 1, 2) and lse.shape == (1, 1, 1)
    np.testing.assert_array_equal(out[0, 0, 0], TWO_TOKENS[0])
    assert lse[0, 0, 0] == pytest.approx(0.5 * math.log(3.0), abs=float64_error(8))


def test_two_tokens():
    out, lse = decode_two([[[Q_LN3]]], [2])
    np.testing.assert_allclose(out[0, 0, 0], [0.75, 7.0], rtol=float64_error(8))
    assert lse[0, 0, 0] == pytest.approx(math.log(4.0), abs=float64_error(8))


def test_default_scale_is_the_root_of_head_dim_qk():
    _, lse = decode_two([[[[2.0, 0.0]]]], [1], softmax_scale=None)
    assert lse[0, 0, 0] == pytest.approx(math.sqrt(2.0), abs=float64_error(8))


def test_causal_is_aligned_to_the_last_token():
    q = [[[Q_LN3], [Q_LN3]]]
    out, lse = decode_two(q, [2])
    np.testing.assert_allclose(out[0, :, 0], [[1.0, 8.0], [0.75, 7.0]], rtol=float64_error(8))
    np.testing.assert_allclose(lse[0, 0], [math.log(3.0), math.log(4.0)], rtol=float64_error(8))
    out, _ = decode_two(q, [2], causal=False)
    np.testing.assert_allclose(out[0, :, 0], [[0.75, 7.0], [0.75, 7.0]], rtol=float64_error(8))


@pytest.mark.parametrize("sentinel", [math.inf, -math.inf])
@pytest.mark.parametrize("seq_len", [0, -3])
def test_empty_request(seq_len, sentinel):
    out, lse = decode_two([[[Q_LN3]], [[Q_LN3]]], [seq_len, 2], empty_lse=sentinel)
    assert np.all(out[0] == 0.0) and lse[0, 0, 0] == sentinel
    np.testing.assert_allclose(out[1, 0, 0], [0.75, 7.0], rtol=float64_error(8))


def test_more_queries_than_tokens_leave_the_first_rows_empty():
    out, lse = decode_two([[[Q_LN3], [Q_LN3]]], [1])
    np.testing.assert_array_equal(out[0, :, 0], [[0.0, 0.0], TWO_TOKENS[0]])
    np.testing.assert_allclose(lse[0, 0], [math.inf, math.log(3.0)], rtol=float64_error(8))


def test_ragged_queries():
    out, lse = decode_two([[Q_LN3], [Q_LN3], [Q_LN3]], [2, 1, 2], cu_seqlens_q=[0, 2, 2, 3])
    np.testing.assert_allclose(out[:, 0], [[1.0, 8.0], [0.75, 7.0], [0.75, 7.0]], rtol=float64_error(8))
    np.testing.assert_allclose(lse, [[math.log(3.0), math.log(4.0), math.log(4.0)]], rtol=float64_error(8))


def test_each_kv_head_serves_its_own_group_of_query_heads():
    kv_cache = np.array([[10.0, 20.0]]).reshape(1, 1, 2, 1)
    out, lse = mla_decode_ref(np.ones((1, 1, 4, 1)), kv_cache, [[0]], [1], head_dim_v=1, softmax_scale=1.0)
    np.testing.assert_array_equal(out[0, 0, :, 0], [10.0, 10.0, 20.0, 20.0])
    np.testing.assert_array_equal(lse[0, :, 0], [10.0, 10.0, 20.0, 20.0])


def test_tokens_are_gathered_through_the_table():
    kv_cache = np.full((5, 2, 1, 1), np.nan)
    kv_cache[3, :, 0, 0], kv_cache[1, 0, 0, 0] = [1.0, 2.0], 3.0
    np.testing.assert_array_equal(gather_tokens(kv_cache, [3, 1, 2147480000], 3)[:, 0, 0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("page", [-1, 5, 2147480000])
def test_page_outside_the_cache_and_token_past_the_table_read_as_zeros(page):
    kv_cache = np.ones((5, 2, 1, 1))
    np.testing.assert_array_equal(gather_tokens(kv_cache, [page, 0], 6)[:, 0, 0], [0.0, 0.0, 1.0, 1.0, 0.0, 0.0])


def test_merge_by_hand():
    # Sums of exp: 3 and 1.
    states = [(np.array([[[1.0]]]), np.array([[math.log(3.0)]])), (np.array([[[5.0]]]), np.array([[0.0]]))]
    out, lse = merge_states_ref(states)
    assert out[0, 0, 0] == pytest.approx(2.0, rel=float64_error(8)) and lse[0, 0] == pytest.approx(math.log(4.0), rel=float64_error(8))


@pytest.mark.parametrize("sentinel", [math.inf, -math.inf])
def test_merge_with_empty_states(sentinel):
    empty = (np.full((1, 1, 1), np.nan), np.full((1, 1), sentinel))
    full = (np.full((1, 1, 1), 7.0), np.full((1, 1), -900.0))
    out, lse = merge_states_ref([empty, full])
    assert out[0, 0, 0] == 7.0 and lse[0, 0] == -900.0
    out, lse = merge_states_ref([empty, empty], empty_lse=sentinel)
    assert out[0, 0, 0] == 0.0 and lse[0, 0] == sentinel


def mla_decode_scalar(q, kv_cache, block_table, seq_lens, head_dim_v, softmax_scale, causal):
    """The second oracle: one scalar at a time, exactly rounded sums, no maximum taken out. Uniform queries."""
    batch, seq_len_q, num_heads_q, head_dim_qk = q.shape
    num_pages, page_size, num_heads_kv, _ = kv_cache.shape
    out = np.empty((batch, seq_len_q, num_heads_q, head_dim_v))
    lse = np.empty((batch, num_heads_q, seq_len_q))

    def element(b, token, head, d):
        column = token // page_size
        page = block_table[b][column] if column < len(block_table[b]) else num_pages
        return float(kv_cache[page, token % page_size, head, d]) if page in range(num_pages) else 0.0

    for b, s, h in np.ndindex(batch, seq_len_q, num_heads_q):
        head = h * num_heads_kv // num_heads_q
        seen = [t for t in range(seq_lens[b]) if not causal or t - seq_lens[b] <= s - seq_len_q]
        exps = [math.exp(softmax_scale * math.fsum(float(q[b, s, h, d]) * element(b, t, head, d) for d in range(head_dim_qk)))
                for t in seen]
        total = math.fsum(exps)
        lse[b, h, s] = math.log(total) if seen else math.inf
        for d in range(head_dim_v):
            out[b, s, h, d] = math.fsum(e * element(b, t, head, d) for t, e in zip(seen, exps, strict=True)) / total if seen else 0.0
    return out, lse


@st.composite
def small_problems(draw):
    """Structure and a seed: (q, kv_cache, block_table, seq_lens). Some pages are shared, some lie outside, some lengths pass the table."""
    batch, seq_len_q, num_heads_kv, heads_per_kv, page_size, max_pages = (
        draw(st.integers(1, most), label=label) for most, label in
        [(3, "batch"), (3, "seq_len_q"), (2, "num_heads_kv"), (3, "heads_per_kv"), (4, "page_size"), (4, "max_pages")])
    seq_lens = draw(st.lists(st.integers(-1, page_size * max_pages + 2), min_size=batch, max_size=batch), label="seq_lens")
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1), label="seed"))
    q = rng.standard_normal((batch, seq_len_q, num_heads_kv * heads_per_kv, 5)).astype(ml_dtypes.bfloat16)
    kv_cache = rng.standard_normal((6, page_size, num_heads_kv, 5)).astype(ml_dtypes.bfloat16)
    return q, kv_cache, rng.integers(-1, 7, (batch, max_pages)), seq_lens


@settings(max_examples=60, deadline=None)
@given(small_problems(), st.booleans())
def test_equals_the_second_oracle(problem, causal):
    q, kv_cache, block_table, seq_lens = problem
    out, lse = mla_decode_ref(q, kv_cache, block_table, seq_lens, head_dim_v=3, softmax_scale=0.7, causal=causal)
    out_scalar, lse_scalar = mla_decode_scalar(q, kv_cache, block_table, seq_lens, 3, 0.7, causal)
    np.testing.assert_allclose(out, out_scalar, rtol=float64_error(800), atol=float64_error(800))
    np.testing.assert_allclose(lse, lse_scalar, rtol=float64_error(800), atol=float64_error(800))

    flat = q.reshape(-1, *q.shape[2:])
    starts = np.arange(len(q) + 1) * q.shape[1]
    ragged, ragged_lse = mla_decode_ref(flat, kv_cache, block_table, seq_lens, head_dim_v=3, softmax_scale=0.7, causal=causal,
                                        cu_seqlens_q=starts)
    np.testing.assert_array_equal(ragged, out.reshape(ragged.shape))
    np.testing.assert_array_equal(ragged_lse, lse.swapaxes(0, 1).reshape(ragged_lse.shape))


@settings(max_examples=40, deadline=None)
@given(small_problems(), st.integers(0, 4))
def test_merge_of_parts_is_the_whole(problem, cut):
    q, kv_cache, block_table, seq_lens = problem
    cut = min(cut, block_table.shape[1])
    first = np.clip(seq_lens, 0, cut * kv_cache.shape[1])
    options = {"head_dim_v": 3, "causal": False}
    states = [mla_decode_ref(q, kv_cache, block_table[:, :cut], first, **options),
              mla_decode_ref(q, kv_cache, block_table[:, cut:], seq_lens - first, empty_lse=-math.inf, **options)]
    for merged, whole in zip(merge_states_ref(states), mla_decode_ref(q, kv_cache, block_table, seq_lens, **options), strict=True):
        np.testing.assert_allclose(merged, whole, rtol=float64_error(800), atol=float64_error(80))


@settings(max_examples=30, deadline=None)
@given(small_problems(), st.sampled_from([1, 3, 64]))
def test_emulation_in_float32_follows_the_oracle(problem, block_n):
    got = mla_decode_emulated(*problem, dtype="float32", head_dim_v=3, block_n=block_n)
    *want, out_bound, lse_bound = decode_bounds(*problem, dtype="float32", head_dim_v=3)
    assert_within("out", got[0], want[0], out_bound)
    assert_within("lse", got[1], want[1], lse_bound)


def test_logits_of_thousands_do_not_overflow():
    out, lse = decode_two([[[[5000.0, 0.0]]]], [2])
    np.testing.assert_array_equal(out[0, 0, 0], TWO_TOKENS[0])
    assert lse[0, 0, 0] == 5000.0


NUMPY_DTYPE = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def assert_same_rounding(x, dtype):
    want = x.astype(NUMPY_DTYPE[dtype]).astype(np.float64)
    got = round_to(x, dtype)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[got == 0.0]), np.signbit(want[got == 0.0]))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", NUMPY_DTYPE)
def test_rounding_is_that_of_the_dtype(dtype):
    # Every upper half of a float32 (every bfloat16 there is) with the lower halves that decide: exact, about a tie, last before the next.
    upper = np.arange(2 ** 16, dtype=np.uint32) << np.uint32(16)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        assert_same_rounding((upper | np.uint32(lower)).view(np.float32), dtype)
    # Every float16 and its upper neighbour's midpoint, from either side.
    half = np.arange(2 ** 16 - 1, dtype=np.uint16)
    middle = (half.view(np.float16).astype(np.float32) + (half + np.uint16(1)).view(np.float16).astype(np.float32)) / np.float32(2.0)
    for x in (half.view(np.float16).astype(np.float32), middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))):
        assert_same_rounding(x, dtype)
    rng = np.random.default_rng(0)
    assert_same_rounding(rng.integers(0, 2 ** 32, 200_000, dtype=np.uint32).view(np.float32), dtype)
    assert_same_rounding(np.float32(2.0) ** rng.uniform(-30, 18, 200_000).astype(np.float32), dtype)
    # The tie between float16's largest number and infinity.
    assert_same_rounding(np.array([65520.0, np.nextafter(65520.0, 0.0), -65520.0]), dtype)
    if dtype != "bfloat16":  # ml_dtypes rounds float64 twice, by way of float32
        assert_same_rounding(2.0 ** rng.uniform(-160, 130, 200_000), dtype)


def test_constants_agree_with_the_contract():
    for name in ("HEAD_DIM_LATENT", "HEAD_DIM_ROPE", "HEAD_DIM_QK", "HEAD_DIM_V", "EMPTY_LSE"):
        assert getattr(mla, name) == getattr(contract, name)
    assert tuple(rounding.FORMATS) == contract.DTYPES
