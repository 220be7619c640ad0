"""The gate: no time is reported of a result that was not checked against float64.

Sampled rows: the shortest request, the longest, and some between; of each the first head, the last, and some between, for every query
token. The bounds are those of `verify.tolerances`, derived and not tuned; a peer is held to the same.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from perf.inputs import Inputs
from verify.targets import to_numpy
from verify.tolerances import decode_bounds, rel_err, unit_roundoff, worst_ratio

NUM_REQUESTS, NUM_HEADS = 4, 4


@dataclass(frozen=True)
class Verdict:
    """`reason` is None if the result is right; `rel_err` is of the sampled rows of out."""

    rel_err: float
    reason: str | None


class Gate:
    """What the sampled rows of a case must be, computed once for all contenders."""

    def __init__(self, inputs: Inputs, seed: int = 0):
        case = self._case = inputs.case
        rng = np.random.default_rng(seed)
        by_length = np.argsort(case.seq_lens, kind="stable")
        self._requests = _pick(by_length, NUM_REQUESTS, rng)
        # Heads of more than one KV head are kept whole: which head is whose depends on how many there are.
        all_heads = np.arange(case.num_heads_q)
        self._heads = _pick(all_heads, NUM_HEADS, rng) if case.num_heads_kv == 1 else all_heads
        self._want = [self._bounds(inputs, request) for request in self._requests]

    def _bounds(self, inputs: Inputs, request: int) -> tuple[np.ndarray, ...]:
        case = self._case
        q = to_numpy(inputs.q[int(request):int(request) + 1], case.dtype)[:, :, self._heads]
        pages = inputs.pages(request)
        return decode_bounds(q, pages, np.arange(len(pages))[None], [case.seq_lens[request]], dtype=case.dtype, head_dim_v=case.head_dim_v,
                             causal=case.causal)

    def check(self, out: Any, lse: Any | None) -> Verdict:
        """Of a contender's out (batch, seq_len_q, num_heads_q, head_dim_v) and lse (batch, num_heads_q, seq_len_q), if it gives one."""
        outs, refs, reason = [], [], None
        for request, (out_ref, lse_ref, out_bound, lse_bound) in zip(map(int, self._requests), self._want, strict=True):
            got = to_numpy(out[request:request + 1], self._case.dtype)[:, :, self._heads]
            ratios = {"out": worst_ratio(got, out_ref, out_bound)}
            if lse is not None:
                ratios["lse"] = worst_ratio(to_numpy(lse[request:request + 1], "float32")[:, self._heads], lse_ref, lse_bound)
            for name, ratio in ratios.items():
                if not ratio <= 1 and reason is None:
                    reason = f"wrong: {name} of request {request} is {ratio:.3g} times its float64 bound away"
            outs.append(got.astype(np.float64).ravel())
            refs.append(out_ref.ravel())
        error, dtype = rel_err(np.concatenate(outs), np.concatenate(refs)), self._case.dtype
        unit, _ = unit_roundoff(dtype)
        # P and the result are rounded: two errors of u^2 / 3 in the mean square, together 0.82 u. Bounds of single elements grow with a
        # request, and let a few of its tokens be missing.
        if reason is None and dtype != "float32" and not error <= unit:
            reason = f"wrong: the relative error of out is {error:.3g}, above the {unit:.3g} that {dtype} rounds by"
        return Verdict(error, reason)


def _pick(ordered: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The first, the last, and some between, sorted and distinct."""
    if len(ordered) <= count:
        return np.sort(ordered)
    between = rng.choice(ordered[1:-1], count - 2, replace=False)
    return np.sort(np.concatenate((ordered[[0, -1]], between)))
