"""Every error bound of the project, derived from the arithmetic a kernel is allowed, never tuned to one. Per row and per element.

**What is granted.** Inputs are exact in their dtype. With g(n) = n a / (1 - n a), a = `ACCUMULATE` (a float32 operation that may
truncate, as tensor cores do), a row of L visible tokens is computed with
- dot products of length D in any order: error <= g(D) |q|.|k_j|;
- base-2 logits x_j = c q.k_j, c = softmax_scale log2(e) rounded once; every later operation on x_j or on the row maximum rounds to
  float32, u = `UNIT`, on numbers of size at most X = max_j (|x_j| + c g(D) |q|.|k_j|);
- exp2 within 4 ulp, log2 within 4 ulp or 4 ulp of 1 (ex2.approx and lg2.approx have 2): `FUNCTION` = 8 ulp bounds an exp2 as a shift of
  its argument, and two log2 of sums up to 2^8 L are off by at most (8 + log2 L) FUNCTION;
- at most R = L / 16 + 8 rescales (KV blocks of 16 tokens or more, pieces of a split and their merge), each one exp2 and one rounding;
- P rounded to the input dtype (unit roundoff u_p; half a smallest subnormal, t_p, where that is more), scaled by at most 2^8 when the
  maximum may lag, and flushed to zero below the normal range: 2^-126 2^8 = `FLUSH`, relative to the row's largest P;
- the row sum, and P.V, in float32 in any order, in pieces or not; out rounded to its dtype once. Where that has 16 bits, each piece's P.V
  may lose the last byte of its float32 on its way to the others: an error of at most `PIECE` of it, here p, elsewhere 0.

**Weights.** All errors of a logit, and those that come with the maximum or a rescale, are a shift of x_j by at most

    d_j = c (g(D) |q|.|k_j| + D FLUSH) + (R + 10) u (X + log2 L) + (R + 10 + log2 L) FUNCTION

so the kernel averages with w_j f_j, where w is the exact softmax and 1 / h_j <= f_j <= h_j = 2^d_j. A factor that all f_j share
cancels: dividing by that of the heaviest token j* is as good, which gives h_j = 2^(d_j + d_j*), h_j* = 1, tight when one token has
it all. Each row takes whichever makes H = sum_j w_j h_j smaller.

**out.** The kernel has N / S, N = sum w_j f_j (1 + e_j) v_j, S = sum w_j f_j (1 + b_j), |b_j| <= B = g(L + 2R + 32),
|w_j f_j e_j| <= r_j + C (w_j h_j + r_j), C = B + p (1 + B), r_j = min(max(u_p w_j h_j, t_p max_i w_i h_i), w_j h_j). Since
sum w_j (v_j - out) = 0,

    N - out S = sum w_j (f_j - 1) (v_j - out) + sum w_j f_j (e_j v_j - b_j out)
    S >= (1 - B) sum w_j / h_j >= (1 - B) / H                                                       (Cauchy-Schwarz)
    |N / S - out| <= H / (1 - B) (sum_j [w_j (h_j - 1) + r_j + C (w_j h_j + r_j)] |v_j| + [H - 1 + B H] |out|)

and the final rounding adds u_p of what stands there, or t_p; float32 products flushed to zero add a FLUSH per operation.

**lse** = ln 2 log2 of S times the scale, where no common factor cancels: |error| <= ln H + B / (1 - B) + FUNCTION + 4 u |lse|, with H
from the plain h_j = 2^d_j (log of the mean is concave, so the error downwards is no larger).

Two runs of one problem (other splits, other backend) differ by at most the sum of their bounds: compare with ``2 * bound``.
Nothing here depends on the machine or on chance, so a failure is a bug. The price: errors that really add up like sqrt(L) are
granted L, so a bug that moves one token in thousands hides in a long request; look for those in short ones (L up to about 1000).
Overflow of a float32 dot product is outside.
"""

import math

import numpy as np

from reference.mla import HEAD_DIM_V, merge_states_ref, softmax
from reference.paged import query_groups
from reference.rounding import FORMATS

UNIT = 2.0 ** -24
ACCUMULATE = 2.0 ** -23
FUNCTION = 2.0 ** -20
FLUSH = 2.0 ** -118
PIECE = 2.0 ** -15
LEAST_BLOCK = 16


def unit_roundoff(dtype):
    """(u, t): rounding x to `dtype` errs by at most max(u |x|, t); t is half the smallest number, flushed subnormals included."""
    bits, least, _ = FORMATS[dtype]
    return 2.0 ** -bits, max(2.0 ** (least - 1), FLUSH)


def float64_error(operations):
    """Relative error of so many float64 operations: for comparing what was computed in float64 twice."""
    return operations * 2.0 ** -53


def gamma(n):
    """Relative error of n float32 operations in any order, of the sum of absolute values."""
    return n * ACCUMULATE / (1.0 - n * ACCUMULATE)


def _weights(log2_weights, shift):
    """w_j h_j of the docstring, for the plain and for the centred choice of h."""
    heaviest = np.expand_dims(log2_weights.argmax(axis=-1), -1)
    centred = shift + np.take_along_axis(shift, heaviest, axis=-1)
    np.put_along_axis(centred, heaviest, 0.0, axis=-1)
    # 2^1000 stands for "no bound"; inf would turn into NaN where it meets a zero.
    return tuple(np.exp2(np.minimum(log2_weights + h, 1000.0)) for h in (shift, centred))


def out_bound(log2_weights, shift, values, out, *, dtype, operations, p_dtype=None, piece=0.0, value_errors=None):
    """Bound on |out| of a kernel that averages `values` with softmax weights: array like `out`.

    Parameters
    ----------
    log2_weights, shift : arrays (..., rows, n)
        log2 of the exact weights w_j; d_j.
    values, value_errors : arrays (..., n, head_dim_v)
        v_j, and how far the kernel's own v_j may be from it (default: exact).
    out : array (..., rows, head_dim_v)
        The exact average.
    operations : int
        Float32 operations on the way to a sum (L + 2R + 32).
    dtype, p_dtype : str
        What out, and P, are rounded to; None: P stays float32.
    piece : float
        How far of itself a piece's P.V may be from what was computed.
    """
    unit, least = unit_roundoff(dtype)
    p_unit, p_least = unit_roundoff(p_dtype) if p_dtype else (0.0, 0.0)
    g = gamma(operations)
    plain, centred = _weights(log2_weights, shift)
    heavy = np.where(centred.sum(axis=-1, keepdims=True) < plain.sum(axis=-1, keepdims=True), centred, plain)
    total = heavy.sum(axis=-1, keepdims=True)
    drift = heavy - np.exp2(log2_weights)
    rounding = np.minimum(np.maximum(p_unit * heavy, p_least * heavy.max(axis=-1, keepdims=True)), heavy)
    error = (drift + rounding + (g + piece * (1.0 + g)) * (heavy + rounding)) @ np.abs(values)
    error += (drift.sum(axis=-1, keepdims=True) + g * total) * np.abs(out)
    if value_errors is not None:
        error += (1.0 + g) * (heavy @ value_errors)
    error *= total / (1.0 - g)
    return error + unit * (np.abs(out) + error) + least + operations * FLUSH


def lse_bound(log2_weights, shift, lse, *, operations):
    """Bound on |lse| of a kernel, like `lse` (..., rows); the other arguments as in `out_bound`."""
    g = gamma(operations)
    return np.log(_weights(log2_weights, shift)[0].sum(axis=-1)) + g / (1.0 - g) + FUNCTION + 4.0 * UNIT * np.abs(lse)


def decode_bounds(q, kv_cache, block_table, seq_lens, *, dtype, head_dim_v=HEAD_DIM_V, softmax_scale=None, causal=True,
                  cu_seqlens_q=None, empty_lse=math.inf):
    """What a decode must give and how far from it it may be: (out_ref, lse_ref, out_bound, lse_bound), float64.

    Arguments and shapes as `reference.mla.mla_decode_ref`; `dtype` names the dtype of the inputs, of P and of out. Both bounds of a
    row that sees nothing are 0.
    """
    q = np.asarray(q).astype(np.float64)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    out = np.zeros((*q.shape[:-1], head_dim_v))
    lse = np.full(q.shape[:-1], float(empty_lse))
    out_err, lse_err = np.zeros_like(out), np.zeros_like(lse)
    scale_log2 = softmax_scale * math.log2(math.e)
    head_dim_qk = q.shape[-1]
    for index, keys in query_groups(q.shape, kv_cache, block_table, seq_lens, causal=causal, cu_seqlens_q=cu_seqlens_q):
        if len(keys) == 0:
            continue
        values = keys[:, :head_dim_v]
        logits = softmax_scale * (q[index] @ keys.T)
        probabilities, lse[index] = softmax(logits)
        out[index] = probabilities @ values
        log2_weights = math.log2(math.e) * (logits - lse[index][:, None])
        rescales = -(-len(keys) // LEAST_BLOCK) + 8
        shift = abs(scale_log2) * (gamma(head_dim_qk) * (np.abs(q[index]) @ np.abs(keys).T) + head_dim_qk * FLUSH)
        size = (math.log2(math.e) * np.abs(logits) + shift).max(axis=1, keepdims=True) + math.log2(len(keys))
        shift += (rescales + 10) * UNIT * size + (rescales + 10 + math.log2(len(keys))) * FUNCTION
        operations = len(keys) + 2 * rescales + 32
        out_err[index] = out_bound(log2_weights, shift, values, out[index], dtype=dtype, operations=operations, p_dtype=dtype,
                                   piece=0.0 if dtype == "float32" else PIECE)
        lse_err[index] = lse_bound(log2_weights, shift, lse[index], operations=operations)
    return out, lse.swapaxes(-1, -2), out_err, lse_err.swapaxes(-1, -2)


def merge_bounds(states, *, dtype, state_bounds=None, empty_lse=math.inf):
    """The same four arrays for a merge of [(out, lse), ...] (float32 lse, float32 arithmetic, out rounded to `dtype`).

    With `state_bounds`, [(out_bound, lse_bound), ...], `states` are the exact ones and the kernel's inputs may be that far off, so
    that merge(decode(A), decode(B)) can be held against the whole.
    """
    out, lse = merge_states_ref(states, empty_lse=empty_lse)
    lses = np.stack([np.asarray(part, np.float64).swapaxes(-1, -2) for _, part in states], axis=-1)
    seen = np.isfinite(lses)
    rows_seen = seen.any(axis=-1, keepdims=True)
    lses = np.where(seen, lses, 0.0)
    values = np.stack([np.asarray(part).astype(np.float64) for part, _ in states], axis=-2)
    values = np.where(seen[..., None], values, 0.0)
    size = math.log2(math.e) * np.abs(lses).max(axis=-1, keepdims=True)
    shift = np.zeros_like(lses) + 10 * UNIT * size + (4 + math.log2(len(states))) * FUNCTION
    value_errors = None
    if state_bounds is not None:
        value_errors = np.stack([bound for bound, _ in state_bounds], axis=-2)
        values = np.abs(values) + value_errors
        shift += math.log2(math.e) * np.stack([bound.swapaxes(-1, -2) for _, bound in state_bounds], axis=-1)
    lse_rows = np.where(rows_seen, lse.swapaxes(-1, -2)[..., None], 0.0)
    log2_weights = np.where(seen, math.log2(math.e) * (lses - lse_rows), np.where(rows_seen, -np.inf, 0.0))
    operations = len(states) + 32
    # One row of its own values each, hence the axis of length 1 before the states'.
    log2_weights, shift = log2_weights[..., None, :], shift[..., None, :]
    out_err = out_bound(log2_weights, shift, values, out[..., None, :], dtype=dtype, operations=operations, value_errors=value_errors)
    lse_err = lse_bound(log2_weights, shift, lse_rows, operations=operations)
    out_err, lse_err = np.where(rows_seen, out_err[..., 0, :], 0.0), np.where(rows_seen, lse_err, 0.0)[..., 0]
    return out, lse, out_err, lse_err.swapaxes(-1, -2)


def worst_ratio(got, want, bound):
    """The largest |got - want| / bound; 1 or less is within. Equal values count 0 (infinities too), NaN in `got` alone counts inf."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(same, 0.0, np.abs(got - want) / bound)
    return float(np.max(np.where(np.isnan(ratio), np.inf, ratio), initial=0.0))


def rel_err(out, ref):
    """||out - ref|| / ||ref||, the one figure to print; 0 when they are equal."""
    out, ref = np.asarray(out).astype(np.float64), np.asarray(ref).astype(np.float64)
    difference, size = np.linalg.norm(out - ref), np.linalg.norm(ref)
    return 0.0 if difference == 0.0 else float(difference / size) if size > 0.0 else math.inf


def ex2_bound(power):
    """Of `ex2.approx`, 2 ulp of the correctly rounded result: PTX ISA 9.7.3.21."""
    return 2.0 ** -22 * np.abs(power)


def rcp_bound(reciprocal):
    """Of `rcp.approx`, 1 ulp: PTX ISA 9.7.3.13."""
    return 2.0 ** -23 * np.abs(reciprocal)


def lg2_bound(logarithm):
    """Of `lg2.approx`: absolute for arguments from 0.5 to 2, else relative: PTX ISA 9.7.3.20."""
    return 2.0 ** -22 * np.maximum(1.0, np.abs(logarithm))
