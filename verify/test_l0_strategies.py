"""What cases and strategies claim is so: poison where nobody may look, logits of the regime's shape, every kind of case drawn."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from reference.mla import softmax
from reference.paged import query_groups
from verify.cases import DTYPES, LAYOUTS, PAGES, VALUES, Inputs, MLACase
from verify.properties import PROPERTIES
from verify.strategies import DEEPSEEK, DIMS, SMALL, TINY, mla_cases

pytestmark = pytest.mark.l0

PATTERNED = {"seq_lens": (130, 200, 1, 64), "num_heads_q": 4, "head_dim_qk": 48, "head_dim_v": 32, "page_size": 16, "pages": "shuffled"}


def logits_of(inputs: Inputs) -> list[np.ndarray]:
    """softmax_scale * q.k, (heads, tokens), of every query token that sees any."""
    q = np.asarray(inputs.q).astype(np.float64)
    scale = inputs.q.shape[-1] ** -0.5 if inputs.softmax_scale is None else inputs.softmax_scale
    groups = query_groups(q.shape, inputs.kv_cache, inputs.block_table, inputs.seq_lens, causal=inputs.causal,
                          cu_seqlens_q=inputs.cu_seqlens_q)
    return [scale * (q[index] @ keys.T) for index, keys in groups if len(keys)]


def used_columns(case: MLACase, inputs: Inputs) -> np.ndarray:
    return np.arange(inputs.block_table.shape[1]) < -(-np.array(case.seq_lens)[:, None] // case.page_size)


@hypothesis.given(st.sampled_from(list(DIMS.values())).flatmap(lambda dims: mla_cases(dims, ragged=True)))
def test_repr_pastes_back(case: MLACase) -> None:
    assert MLACase.parse(repr(case)) == case
    assert eval(repr(case)) == case


@pytest.mark.parametrize("text", ["MLACase(", "MLACase(64)", "print(1)", "MLACase(seq_lens=(1,), page=3)", "MLACase(seq_lens=open('x'))",
                                  "MLACase(seq_lens=(1,), values='odd')", "MLACase(seq_lens=(1,), q_lens=(1, 2))", "",
                                  "MLACase(seq_lens=5)", "MLACase(seq_lens=())", "MLACase(seq_lens=(1,), page_size=0)",
                                  "MLACase(seq_lens=(1,), num_heads_q=3, num_heads_kv=2)", "MLACase(seq_lens=(1,), head_dim_v=577)"])
def test_what_is_not_a_case_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a case like"):
        MLACase.parse(text)


@hypothesis.given(mla_cases(SMALL, ragged=True), st.booleans())
def test_builds_repeat(case: MLACase, poison: bool) -> None:
    first, second = case.build(poison), case.build(poison)
    for name in ("q", "kv_cache", "block_table", "seq_lens"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()


@hypothesis.given(mla_cases(SMALL, ragged=True))
def test_poison_is_where_nobody_may_look_and_nowhere_else(case: MLACase) -> None:
    poisoned, clean = case.build(), case.build(poison=False)
    seen, used = poisoned.seen_slots(), used_columns(case, poisoned)
    cache = poisoned.kv_cache.astype(np.float32)
    assert np.isfinite(cache[seen]).all() and not np.isfinite(cache[~seen]).any()
    assert np.array_equal(clean.kv_cache[seen], poisoned.kv_cache[seen]) and not clean.kv_cache[~seen].any()
    assert np.isfinite(poisoned.q.astype(np.float32)).all() and np.array_equal(poisoned.q, clean.q)
    num_pages = len(poisoned.kv_cache)
    assert ((poisoned.block_table[used] >= 0) & (poisoned.block_table[used] < num_pages)).all()
    assert np.count_nonzero((poisoned.block_table < 0) | (poisoned.block_table >= num_pages)) >= 0.75 * np.count_nonzero(~used) - 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_have_the_strides_they_promise(layout: str) -> None:
    inputs = MLACase(seq_lens=(5, 9), seq_len_q=2, num_heads_q=4, num_heads_kv=2, head_dim_qk=24, head_dim_v=16, page_size=4,
                     spare_columns=1, layout=layout).build()
    for array in (inputs.q, inputs.kv_cache):
        assert array.flags.c_contiguous == (layout == "contiguous")
        assert array.strides[-1] == array.itemsize
        aligned = array.ctypes.data % 16 == 0 and all(stride % 16 == 0 for stride in array.strides[:-1])
        assert aligned == (layout != "unaligned")
    if layout in ("padded", "unaligned"):
        for array in (inputs.q, inputs.kv_cache):
            base = array.base.astype(np.float32)
            assert np.count_nonzero(np.isnan(base)) >= base.size - array.size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", VALUES)
def test_regimes_have_the_logits_they_promise(values: str, dtype: str) -> None:
    inputs = MLACase(values=values, dtype=dtype, **PATTERNED).build()
    logits = logits_of(inputs)
    if values == "one_hot":
        assert min(softmax(row)[0].max(axis=1).min() for row in logits) > 0.5
    for row in (row for row in logits if row.shape[1] > 100):
        half = row.shape[1] // 2
        trend = row[:, half:].mean() - row[:, :half].mean()
        holds = {
            "normal": 1 < np.ptp(row) < 20,
            "uniform": not row.any(),
            "one_hot": np.median(row) + 15 < row.max(),
            "rising": trend > 10 and (row.argmax(axis=1) > 0.8 * row.shape[1]).all(),
            "falling": trend < -10 and (row.argmax(axis=1) < 0.2 * row.shape[1]).all(),
            "alternating": (row > 8).any() and (row < -8).any(),
            "negative": (row < -100).all(),
            "large": np.ptp(row) > 90,
            "ties": (np.count_nonzero(row == row.max(axis=1, keepdims=True), axis=1) > 10).all(),
            "tiny": 0 < np.abs(row).max() < 1e-2,
        }[values]
        assert holds, f"{values}: logits from {row.min():.3g} to {row.max():.3g}, trend {trend:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", VALUES)
def test_bounds_are_tight_enough_to_tell(values: str, dtype: str) -> None:
    """A bound wider than the numbers would pass anything."""
    inputs = MLACase(values=values, dtype=dtype, **PATTERNED).build()
    out, _, out_bound, lse_bound = inputs.bounds()
    size = np.abs(out).max()
    assert np.median(out_bound) < {"bfloat16": 0.05, "float16": 0.01, "float32": 0.005}[dtype] * size
    assert np.median(lse_bound) < 0.01


def _kinds_not_drawn(dims, drawn: list[MLACase]) -> list[str]:
    ends = [(case, length) for case in drawn for length in case.seq_lens]
    kinds = {
        "length 0": any(length == 0 for _, length in ends),
        "length 1": any(length == 1 for _, length in ends),
        "one under a page's end": any(case.page_size > 2 and length % case.page_size == case.page_size - 1 for case, length in ends),
        "at a page's end": any(length and length % case.page_size == 0 for case, length in ends),
        "one past a page's end": any(case.page_size > 2 and length % case.page_size == 1 for case, length in ends),
        "one under a tile's end": any(length + 1 in dims.edges for _, length in ends),
        "one past a tile's end": any(length - 1 in dims.edges for _, length in ends),
        "inside a page": any(case.page_size > 4 and 1 < length % case.page_size < case.page_size - 1 for case, length in ends),
        "many pages": any(length > 3 * case.page_size for case, length in ends),
        "only empty requests": any(not any(case.seq_lens) for case in drawn),
        "ragged": any(case.q_lens for case in drawn),
        "no query in a request": any(case.q_lens and 0 in case.q_lens for case in drawn),
        "several queries": any(case.seq_len_q > 1 for case in drawn),
        "some rows of a request see nothing": any(
            case.causal and 0 < length < count for case in drawn for length, count in zip(case.seq_lens, case.query_counts, strict=True)),
        "several KV heads": any(case.num_heads_kv > 1 for case in drawn),
        "a largest batch": any(case.batch == dims.max_batch for case in drawn),
        "no spare page": any(case.spare_pages == 0 for case in drawn),
        "a scale of its own": any(case.softmax_scale == 1.0 for case in drawn),
    }
    return [kind for kind, found in kinds.items() if not found]


@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
def test_strategies_draw_every_kind_of_case(dims) -> None:
    drawn: list[MLACase] = []
    # Which cases are drawn changes with the constants of all that is imported, and of long requests few are shorter than their queries: 2
    # to 21 of 1,000 cases.
    for seed in range(10):
        @hypothesis.seed(seed)
        @hypothesis.settings(max_examples=400)
        @hypothesis.given(mla_cases(dims, ragged=True))
        def collect(case: MLACase) -> None:
            drawn.append(case)

        collect()
        missing = _kinds_not_drawn(dims, drawn)
        if not missing:
            break
    assert missing == []
    for name, choices in (("values", VALUES), ("pages", PAGES), ("layout", LAYOUTS), ("dtype", DTYPES), ("causal", (True, False))):
        assert {getattr(case, name) for case in drawn} == set(choices)
    ends = [(case, length) for case in drawn for length in case.seq_lens]
    assert max(sum(case.seq_lens) for case in drawn) <= dims.max_tokens
    edges = sum(length in (0, 1) or min(abs(length - edge) for edge in (*dims.edges, case.page_size)) <= 1 for case, length in ends)
    assert edges > 0.4 * len(ends), f"{edges} of {len(ends)} lengths lie at an edge"


def test_shared_pages_are_shared() -> None:
    shared = 0
    for seed in range(20):
        case = MLACase(seq_lens=(40, 40, 17), head_dim_qk=24, head_dim_v=16, page_size=8, pages="shared", seed=seed)
        inputs = case.build()
        ids = inputs.block_table[used_columns(case, inputs)]
        shared += len(ids) > len(set(ids))
    assert shared >= 10


def test_shuffled_pages_are_out_of_order() -> None:
    table = MLACase(seq_lens=(640,), head_dim_qk=24, head_dim_v=16, page_size=8, pages="shuffled").build().block_table
    assert (np.diff(table[0]) < 0).any()


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_get_the_cases_they_need(name: str) -> None:
    needs = PROPERTIES[name].cases

    @hypothesis.settings(max_examples=50)
    @hypothesis.given(mla_cases(SMALL, ragged=PROPERTIES[name].ragged, **needs))
    def draw(case: MLACase) -> None:
        assert case.batch >= needs.get("min_batch", 1)
        assert case.q_lens is not None or case.seq_len_q >= needs.get("min_seq_len_q", 1)
        hidden = [count - 1 if case.causal else 0 for count in case.query_counts]
        if needs.get("empty"):
            assert any(count and length <= most for count, length, most in zip(case.query_counts, case.seq_lens, hidden, strict=True))

    draw()


def test_deepseek_dims_are_deepseek_v3() -> None:
    assert DEEPSEEK.head_dims == ((576, 512),)
    assert {1, 64, 126, 128} <= {heads for heads, _ in DEEPSEEK.heads}
    assert TINY.max_tokens < 100
