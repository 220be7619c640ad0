"""The properties of an MLA decode, each once: `check(target, case)` raises AssertionError, or returns the worst error / bound.

Nothing here depends on pytest or Hypothesis: `python -m verify`, the tests and the mutants run the same functions. The float64 oracle
says how far a result may be off (`Inputs.bounds`); all but the first property compare the target with itself, so that a mistake that
target and oracle share still shows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reference.mla import merge_states_ref
from reference.paged import gather_tokens
from verify.cases import DTYPES, LAYOUTS, POISON, TABLE_GARBAGE, Inputs, MLACase, ceil_div
from verify.checks import assert_same_bits, assert_same_results, assert_within
from verify.targets import BAD_VALUES, BATCH_INVARIANT, EMPTY_LSE, MERGE, OUT, RAGGED, SPLITS, Target, to_kind, to_numpy
from verify.tolerances import merge_bounds

WORKERS = (1, 3, 20)


@dataclass(frozen=True)
class Property:
    """`cases`: what `strategies.mla_cases` must draw for it. `ragged`: whether it is about ragged queries too."""

    name: str
    check: Callable[[Target, MLACase], float]
    needs: frozenset[str]
    ragged: bool
    cases: dict[str, Any] = field(default_factory=dict)

    @property
    def claim(self) -> str:
        return (self.check.__doc__ or "").partition("\n")[0]

    def not_applicable(self, target: Target, case: MLACase | None = None) -> str:
        """Why it says nothing about a target, or a case; empty if it does."""
        missing = sorted(self.needs - target.knobs)
        if missing:
            return f"needs {', '.join(missing)}"
        if case is not None and case.q_lens is not None and not (self.ragged and RAGGED in target.knobs):
            return "needs uniform queries"
        return ""


PROPERTIES: dict[str, Property] = {}


def _property(*needs: str, ragged: bool = True, **cases: Any) -> Callable[[Callable[[Target, MLACase], float]], Callable[..., float]]:
    def register(check: Callable[[Target, MLACase], float]) -> Callable[[Target, MLACase], float]:
        PROPERTIES[check.__name__] = Property(check.__name__, check, frozenset(needs), ragged, cases)
        return check
    return register


@_property()
def equals_float64(target: Target, case: MLACase) -> float:
    """Every element of out and lse is within its bound of the float64 oracle."""
    return _equals_oracle(target, case.build(), {})


@_property()
def page_permutation(target: Target, case: MLACase) -> float:
    """Where in the cache the pages lie changes no bit."""
    inputs = case.build()
    order = case.rng().permutation(len(inputs.kv_cache))
    table = np.array(inputs.block_table)
    used = _used_columns(inputs)
    table[used] = np.argsort(order)[table[used]]
    moved = replace(inputs, kv_cache=inputs.kv_cache[order], block_table=table)
    assert_same_results(target(moved), target(inputs), "moving pages")
    return 0.0


@_property()
def poison(target: Target, case: MLACase) -> float:
    """What lies in slots, pages and table columns that no request may see (NaN, infinities, wild ids) changes no bit."""
    assert_same_results(target(case.build(poison=True)), target(case.build(poison=False)), "poison where no request may look")
    return 0.0


@_property()
def strides(target: Target, case: MLACase) -> float:
    """The strides of the arrays change no bit."""
    plain = target(replace(case, layout="contiguous").build())
    refusals = []
    for layout in LAYOUTS[1:]:
        try:
            got = target(replace(case, layout=layout).build())
        except NotImplementedError as refusal:
            refusals.append(refusal)
            continue
        assert_same_results(got, plain, f"the layout {layout!r}")
    if len(refusals) == len(LAYOUTS) - 1:
        raise refusals[0]
    return 0.0


@_property(min_batch=2)
def batch_permutation(target: Target, case: MLACase) -> float:
    """Requests in another order give the results in that order."""
    inputs = case.build()
    order = case.rng().permutation(inputs.batch)
    permuted, rows = inputs.take(order), inputs.taken_rows(order)
    out, lse = inputs.rows(*target(inputs))
    out_bound, lse_bound = inputs.rows(*inputs.bounds()[2:])
    return _same_rows(permuted.rows(*target(permuted)), (out[rows], lse[rows]), (out_bound[rows], lse_bound[rows]))


@_property(SPLITS)
def split_count(target: Target, case: MLACase) -> float:
    """Cutting the batch for 1 or for 20 workers changes results by rounding only, and never those of empty rows."""
    inputs = case.build()
    bounds = inputs.bounds()[2:]
    plans = [target.plan(inputs, workers) for workers in WORKERS]
    first, *others = (target(inputs, plan=plan) for plan in plans)
    assert_same_results(target(inputs, plan=plans[1]), others[0], "a plan used twice")
    return max(_same_rows(cut, first, bounds, f"{workers} workers: ") for workers, cut in zip(WORKERS[1:], others, strict=True))


@_property(SPLITS)
def longest_request(target: Target, case: MLACase) -> float:
    """With a plan that was told the longest request, or that there are only short ones, every element is within its bound of the oracle."""
    inputs = case.build()
    plans = [target.plan(inputs, max_seq_len=max_seq_len) for max_seq_len in (int(inputs.seq_lens.max(initial=0)), 1)]
    return _equals_oracle(target, inputs, *({"plan": plan} for plan in plans))


@_property(ragged=False)
def merge_of_halves(target: Target, case: MLACase) -> float:
    """Decoding two halves of the tokens and merging by lse gives the whole."""
    inputs = case.build()
    head, tail = _halves(inputs, case.rng())
    states = [target(part) for part in (head, tail)]
    exact = [part.bounds() for part in (head, tail)]
    whole_out, whole_lse, *bounds = merge_bounds([(out, lse) for out, lse, _, _ in exact], dtype=inputs.dtype,
                                                 state_bounds=[tuple(bound) for _, _, *bound in exact], empty_lse=target.empty_lse)
    merged = target.merge(states) if target.merge else merge_states_ref(states, empty_lse=target.empty_lse)
    # One of the two is exact, which halves what two results of that bound may be apart.
    worst = _same_rows(merged, (whole_out, whole_lse), [bound / 2 for bound in bounds], "merged against the oracle: ")
    whole_bounds = inputs.bounds()[2:]
    return max(worst, _same_rows(merged, target(inputs), [(a + b) / 2 for a, b in zip(bounds, whole_bounds, strict=True)], "merged "))


@_property(MERGE, ragged=False)
def merge_of_many(target: Target, case: MLACase) -> float:
    """merge_states of the oracle's own states, empty ones with either sentinel among them, is within its bound; of one, is that one."""
    inputs = case.build()
    rng = case.rng()
    states = []
    for part in (*_halves(inputs, rng), *_halves(inputs, rng)):
        out, lse = part.bounds()[:2]
        lse = np.where(np.isinf(lse) & (rng.random(lse.shape) < 0.5), -np.inf, lse)
        # What an empty state's out holds must not matter.
        out[np.isinf(lse.swapaxes(-1, -2))] = np.nan
        states.append((out.astype(DTYPES[case.dtype]), lse.astype(np.float32)))
    out, lse, *bounds = merge_bounds(states, dtype=case.dtype)
    worst = _same_rows(target.merge(states), (out, lse), [bound / 2 for bound in bounds])
    out, lse = states[0]
    seen = np.isfinite(lse).swapaxes(-1, -2)
    assert_same_bits("out of rows that saw something", target.merge(states[:1])[0][seen], out[seen], "merging one state with nothing")
    return worst


@_property(min_seq_len_q=2)
def causal_rows(target: Target, case: MLACase) -> float:
    """A query token gives what it gives alone, against the tokens that it may see."""
    inputs = case.build()
    requests = np.repeat(np.arange(inputs.batch), inputs.q_lens())
    hidden = np.concatenate([np.arange(n)[::-1] for n in inputs.q_lens()]) if case.causal else 0
    single = replace(inputs, q=inputs.flat_q[:, None], block_table=inputs.block_table[requests], cu_seqlens_q=None,
                     seq_lens=np.maximum(inputs.seq_lens[requests] - hidden, 0).astype(np.int32))
    return _same_rows(inputs.rows(*target(inputs)), single.rows(*target(single)), inputs.rows(*inputs.bounds()[2:]))


@_property()
def inside_hull(target: Target, case: MLACase) -> float:
    """out is an average: no column of it leaves the range of that column of V, but for rounding."""
    inputs = case.build()
    out, _ = inputs.rows(*target(inputs))
    bound, _ = inputs.rows(*inputs.bounds()[2:])
    worst = 0.0
    for request in range(inputs.batch):
        rows, heads_per_kv = inputs.rows_of(request), case.num_heads_q // case.num_heads_kv
        tokens = gather_tokens(inputs.kv_cache, inputs.block_table[request], inputs.seq_lens[request])[..., :inputs.head_dim_v]
        if len(tokens) == 0:
            continue
        # A row may see none, and is 0 then.
        low = np.repeat(np.minimum(tokens.min(axis=0), 0 if case.causal else np.inf), heads_per_kv, axis=0)
        high = np.repeat(np.maximum(tokens.max(axis=0), 0 if case.causal else -np.inf), heads_per_kv, axis=0)
        got = out[rows].astype(np.float64)
        worst = max(worst, assert_within("out", got, np.clip(np.nan_to_num(got), low, high), bound[rows]))
    return worst


@_property(empty=True)
def empty_rows(target: Target, case: MLACase) -> float:
    """A row that sees no token has out = 0, every bit, and the sentinel for its lse."""
    inputs = case.build()
    _, lse_ref = inputs.rows(*inputs.bounds()[:2])
    empty = np.isinf(lse_ref)
    sentinels = {"+inf": np.inf, "-inf": -np.inf} if EMPTY_LSE in target.knobs else {"": target.empty_lse}
    for sentinel, value in sentinels.items():
        out, lse = inputs.rows(*(target(inputs, empty_lse=sentinel) if sentinel else target(inputs)))
        assert_same_bits("out of empty rows", out[empty], np.zeros_like(out[empty]), "seeing nothing")
        assert_same_bits("lse of empty rows", lse[empty], np.full_like(lse[empty], value), f"the sentinel {value}")
        if not np.isfinite(lse[~empty]).all():
            raise AssertionError(f"lse is {lse[~empty][~np.isfinite(lse[~empty])][0]} in a row that sees tokens")
    return 0.0


@_property()
def reruns(target: Target, case: MLACase) -> float:
    """The same call gives the same bits, every time."""
    inputs = case.build()
    first = target(inputs)
    for _ in range(2):
        assert_same_results(target(inputs), first, "running it again")
    return 0.0


@_property(OUT)
def given_outputs(target: Target, case: MLACase) -> float:
    """Results written into the caller's strided arrays, full of NaN, have the same bits, and nothing beside them is touched."""
    inputs = case.build()
    want = target(inputs)
    canvases = [to_kind(np.full([n + 2 for n in result.shape[:-1]] + [result.shape[-1] + 16], np.nan, result.dtype), target.arrays)
                for result in want]
    where = [(*(slice(1, -1) for _ in result.shape[:-1]), slice(8, -8)) for result in want]
    out, lse = (canvas[inside] for canvas, inside in zip(canvases, where, strict=True))
    assert_same_results(target(inputs, out=out, lse=lse), want, "writing into given arrays")
    for name, canvas, inside, result in zip(("out", "lse"), canvases, where, want, strict=True):
        expected = np.full(canvas.shape, np.nan, result.dtype)
        expected[inside] = result
        assert_same_bits(name, to_numpy(canvas, inputs.dtype), expected, "writing a result, there and nowhere else,")
    return 0.0


@_property()
def inputs_untouched(target: Target, case: MLACase) -> float:
    """A call writes to none of its inputs."""
    inputs = case.build()
    arrays = target.arrays_of(inputs)
    before = {name: np.array(to_numpy(array, inputs.dtype)) for name, array in arrays.items()}
    target(inputs, arrays)
    for name, array in arrays.items():
        assert_same_bits(name, to_numpy(array, inputs.dtype), before[name], "a call")
    return 0.0


@_property(BATCH_INVARIANT)
def batch_invariant(target: Target, case: MLACase) -> float:
    """Under batch_invariant a request's bits are the same alone, at any place in any batch, and (with plans) however it is cut."""
    inputs = case.build()
    out, lse = inputs.rows(*target(inputs, batch_invariant=True))
    worst = _same_rows((out, lse), inputs.rows(*target(inputs)), inputs.rows(*inputs.bounds()[2:]), "batch_invariant against not: ")
    order = case.rng().permutation(np.repeat(np.arange(inputs.batch), 2))
    for requests in ([request] for request in range(inputs.batch)):
        alone, rows = inputs.take(requests), inputs.taken_rows(requests)
        assert_same_results(alone.rows(*target(alone, batch_invariant=True)), (out[rows], lse[rows]), "being alone")
    larger, rows = inputs.take(order), inputs.taken_rows(order)
    assert_same_results(larger.rows(*target(larger, batch_invariant=True)), (out[rows], lse[rows]), "being in a larger batch")
    if SPLITS in target.knobs:
        for cut in (*({"num_workers": workers} for workers in WORKERS[1:]), {"max_seq_len": 1}):
            plan = target.plan(inputs, batch_invariant=True, **cut)
            assert_same_results(inputs.rows(*target(inputs, batch_invariant=True, plan=plan)), (out, lse), f"a plan for {cut}")
    return worst


@_property()
def head_slice(target: Target, case: MLACase) -> float:
    """A KV head's queries, or the first of them, give the same without the other heads."""
    inputs = case.build()
    heads_per_kv = case.num_heads_q // case.num_heads_kv
    kv_head = int(case.rng().integers(case.num_heads_kv))
    first = kv_head * heads_per_kv
    out, lse = inputs.rows(*target(inputs))
    out_bound, lse_bound = inputs.rows(*inputs.bounds()[2:])
    worst = 0.0
    for count in {1, heads_per_kv}:
        heads = slice(first, first + count)
        part = replace(inputs, q=inputs.q[..., heads, :], kv_cache=inputs.kv_cache[:, :, kv_head:kv_head + 1])
        worst = max(worst, _same_rows(part.rows(*target(part)), (out[:, heads], lse[:, heads]), (out_bound[:, heads], lse_bound[:, heads])))
    return worst


@_property(RAGGED)
def ragged_queries(target: Target, case: MLACase) -> float:
    """Ragged queries give what one call per request gives."""
    counts = case.query_counts if case.q_lens is not None else tuple(case.rng().integers(0, case.seq_len_q + 1, case.batch).tolist())
    inputs = replace(case, seq_len_q=1, q_lens=counts).build()
    out, lse = inputs.rows(*target(inputs))
    out_bound, lse_bound = inputs.rows(*inputs.bounds()[2:])
    worst = 0.0
    for request in np.flatnonzero(counts):
        rows = inputs.rows_of(request)
        alone = replace(inputs.take([request]), q=inputs.q[rows][None], cu_seqlens_q=None)
        worst = max(worst, _same_rows((out[rows], lse[rows]), alone.rows(*target(alone)), (out_bound[rows], lse_bound[rows])))
    return worst


@_property()
def other_page_size(target: Target, case: MLACase) -> float:
    """The same tokens in pages of another size give the same."""
    inputs = case.build()
    rng = case.rng()
    page_size = int(rng.choice([size for size in (1, 3, 16, 64, 2 * case.page_size) if size != case.page_size]))
    counts = [ceil_div(int(seq_len), page_size) for seq_len in inputs.seq_lens]
    kv_cache = np.full((sum(counts) + 1, page_size, *inputs.kv_cache.shape[2:]), POISON[0], inputs.kv_cache.dtype)
    table = np.full((inputs.batch, max(counts)), TABLE_GARBAGE[0], np.int32)
    free = rng.permutation(len(kv_cache))
    for request, count in enumerate(counts):
        table[request, :count], free = free[:count], free[count:]
        tokens = gather_tokens(inputs.kv_cache, inputs.block_table[request], inputs.seq_lens[request])
        for column in range(count):
            in_page = tokens[column * page_size:(column + 1) * page_size]
            kv_cache[table[request, column], :len(in_page)] = in_page
    paged = replace(inputs, kv_cache=kv_cache, block_table=table)
    return _same_rows(target(paged), target(inputs), inputs.bounds()[2:])


@_property()
def logit_shift(target: Target, case: MLACase) -> float:
    """The same constant added to all logits of a row shifts its lse by that constant, and nothing else."""
    inputs = case.build()
    # The last column of K becomes 1 everywhere; what q holds there is then added to every logit of a row.
    kv_cache, q, q_shifted = np.array(inputs.kv_cache), np.array(inputs.q), np.array(inputs.q)
    kv_cache[..., -1][inputs.seen_slots()] = 1
    constants = np.exp2(case.rng().integers(-3, 6, inputs.q.shape[:-1]))
    q[..., -1], q_shifted[..., -1] = 0, constants
    plain, shifted = replace(inputs, kv_cache=kv_cache, q=q), replace(inputs, kv_cache=kv_cache, q=q_shifted)
    out, lse = target(plain)
    scale = case.head_dim_qk ** -0.5 if case.softmax_scale is None else case.softmax_scale
    want = lse.astype(np.float64) + scale * constants.swapaxes(-1, -2)
    bounds = [(a + b) / 2 for a, b in zip(plain.bounds()[2:], shifted.bounds()[2:], strict=True)]
    return _same_rows(target(shifted), (out, want), bounds)


@_property(BAD_VALUES)
def bad_values(target: Target, case: MLACase) -> float:
    """A page id outside the cache reads as a page of zeros, a length past the table too, a negative length is 0: every bit."""
    inputs = case.build(poison=False)
    rng = case.rng()
    num_pages, page_size = inputs.kv_cache.shape[:2]
    used = _used_columns(inputs)
    # Some requests run past the end of the table; the columns on the way there then count, and name page 0.
    overrun = rng.random(inputs.batch) < 0.3
    lens = np.where(overrun, used.shape[1] * page_size + rng.integers(1, 2 * page_size + 1, inputs.batch), inputs.seq_lens)
    used |= overrun[:, None]
    bad_table = np.where(used, inputs.block_table, 0)
    wild = used & (rng.random(used.shape) < 0.3)
    # In the good call the last page, num_pages, holds zeros, and the table reaches as far as the longest length.
    good_table = np.pad(np.where(wild, num_pages, bad_table), ((0, 0), (0, 2)), constant_values=num_pages)
    bad_table[wild] = rng.choice([num_pages, num_pages + 1, -1, 2 ** 31 - 1, -(2 ** 31)], np.count_nonzero(wild))
    bad = replace(inputs, block_table=bad_table.astype(np.int32), seq_lens=np.where(lens == 0, -5, lens).astype(np.int32))
    good = replace(inputs, block_table=good_table.astype(np.int32), seq_lens=lens.astype(np.int32),
                   kv_cache=np.pad(inputs.kv_cache, ((0, 1), (0, 0), (0, 0), (0, 0))))
    assert_same_results(target(bad), target(good), "a bad page id or length, where the other call has a page of zeros or length 0,")
    return 0.0


def _equals_oracle(target: Target, inputs: Inputs, *calls: dict[str, Any]) -> float:
    """Of calls with these knobs."""
    out, lse, out_bound, lse_bound = inputs.bounds()
    lse[lse == np.inf] = target.empty_lse
    worst = 0.0
    for knobs in calls:
        got_out, got_lse = target(inputs, **knobs)
        worst = max(worst, assert_within("lse", got_lse, lse, lse_bound), assert_within("out", got_out, out, out_bound))
    return worst


def _same_rows(got: Any, want: Any, bounds: Any, what: str = "") -> float:
    """Two results of a decode that may each be off by `bounds`."""
    return max(assert_within(f"{what}lse", got[1], want[1], 2 * bounds[1]), assert_within(f"{what}out", got[0], want[0], 2 * bounds[0]))


def _used_columns(inputs: Inputs) -> np.ndarray:
    """(batch, max_pages) bool: the entries of the block table that a length covers."""
    return np.arange(inputs.block_table.shape[1]) < -(-inputs.seq_lens[:, None] // inputs.kv_cache.shape[1])


def _halves(inputs: Inputs, rng: np.random.Generator) -> tuple[Inputs, Inputs]:
    """The first pages of every request, which all of its queries see, and the rest."""
    page_size, hidden = inputs.kv_cache.shape[1], inputs.q.shape[1] - 1 if inputs.causal else 0
    pages = [int(rng.integers(0, max(seq_len - hidden, 0) // page_size + 1)) for seq_len in inputs.seq_lens]
    columns = np.arange(inputs.block_table.shape[1])
    rest = [row[(columns + first) % max(len(row), 1)] for row, first in zip(inputs.block_table, pages, strict=True)]
    taken = np.array(pages, np.int32) * page_size
    head = replace(inputs, seq_lens=taken.astype(np.int32), causal=False)
    tail = replace(inputs, seq_lens=(inputs.seq_lens - taken).astype(np.int32), block_table=np.array(rest, np.int32))
    return head, tail
