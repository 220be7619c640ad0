"""What low precision does to a number, and to an honest decode: rounding to the input dtypes, emulated on float64."""

import math

import numpy as np

from reference.mla import HEAD_DIM_V
from reference.paged import query_groups

# Significand bits with the implicit one; exponent of the smallest (subnormal) quantum; exponent of the first power of two too large.
FORMATS = {"bfloat16": (8, -133, 128), "float16": (11, -24, 16), "float32": (24, -149, 128)}


def round_to(x, dtype):
    """`x` rounded to nearest, ties to even, to the named dtype, as float64: subnormals, overflow to inf, NaN and -0 included."""
    bits, least, limit = FORMATS[dtype]
    x = np.asarray(x, np.float64)
    finite = np.where(np.isfinite(x), x, 0.0)
    quantum = np.ldexp(1.0, np.maximum(np.frexp(finite)[1] - bits, least))
    rounded = np.rint(finite / quantum) * quantum
    rounded = np.where(np.abs(rounded) >= 2.0 ** limit, np.copysign(np.inf, rounded), rounded)
    return np.where(np.isfinite(x), rounded, x)


def mla_decode_emulated(q, kv_cache, block_table, seq_lens, *, dtype, head_dim_v=HEAD_DIM_V, softmax_scale=None, causal=True,
                        cu_seqlens_q=None, empty_lse=math.inf, block_n=64):
    """`mla_decode_ref` as an honest kernel computes it: (out rounded to `dtype`, lse), both float32.

    Float32 logits, online softmax in base 2 over blocks of `block_n` tokens, P rounded to `dtype`, the row sum from the unrounded
    P, float32 accumulation.
    """
    q = np.asarray(q).astype(np.float32)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    scale_log2 = np.float32(softmax_scale * math.log2(math.e))
    out = np.zeros((*q.shape[:-1], head_dim_v), np.float32)
    lse = np.full(q.shape[:-1], empty_lse, np.float32)
    for index, keys in query_groups(q.shape, kv_cache, block_table, seq_lens, causal=causal, cu_seqlens_q=cu_seqlens_q):
        if len(keys) == 0:
            continue
        keys = keys.astype(np.float32)
        largest = np.full((len(q[index]), 1), -np.inf, np.float32)
        total = np.zeros_like(largest)
        acc = np.zeros_like(out[index])
        for block in range(0, len(keys), block_n):
            tile = keys[block:block + block_n]
            logits = scale_log2 * (q[index] @ tile.T)
            before, largest = largest, np.maximum(largest, logits.max(axis=1, keepdims=True))
            rescale = np.exp2(before - largest)
            p = np.exp2(logits - largest)
            total = total * rescale + p.sum(axis=1, keepdims=True)
            acc = acc * rescale + round_to(p, dtype).astype(np.float32) @ tile[:, :head_dim_v]
        out[index] = round_to(acc / total, dtype)
        lse[index] = (np.float32(math.log(2)) * (largest + np.log2(total)))[:, 0]
    return out, lse.swapaxes(-1, -2)
