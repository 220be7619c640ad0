"""Multi-head latent attention decode and the merge of partial states, in float64 (reference/README.md has the maths)."""

import math

import numpy as np

from reference.paged import query_groups

# Repeated from mla_numba.contract on purpose; verify/test_l0_reference.py asserts that they agree.
HEAD_DIM_LATENT = 512
HEAD_DIM_ROPE = 64
HEAD_DIM_QK = HEAD_DIM_LATENT + HEAD_DIM_ROPE
HEAD_DIM_V = HEAD_DIM_LATENT
EMPTY_LSE = {"+inf": math.inf, "-inf": -math.inf}


def softmax(logits):
    """Softmax over the last axis and the natural log of its sum: (probabilities, lse). Shifted by the maximum, so nothing overflows."""
    largest = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / total, (largest + np.log(total))[..., 0]


def mla_decode_ref(q, kv_cache, block_table, seq_lens, *, head_dim_v=HEAD_DIM_V, softmax_scale=None, causal=True, cu_seqlens_q=None,
                   empty_lse=math.inf):
    """Decode a batch against its paged cache in float64.

    Parameters
    ----------
    q : array (batch, seq_len_q, num_heads_q, head_dim_qk), or ragged (total_q, num_heads_q, head_dim_qk) with `cu_seqlens_q`
        Any dtype that NumPy can cast to float64, ml_dtypes.bfloat16 too.
    kv_cache : array (num_pages, page_size, num_heads_kv, head_dim_qk)
        V is the first `head_dim_v` columns of K. Reads outside the cache or past the table's columns give zeros.
    block_table : int array (batch, max_pages)
    seq_lens : int array (batch,)
        Tokens of each request, the query tokens included; negative is none.
    softmax_scale : float, optional
        Default head_dim_qk ** -0.5.
    causal : bool
        Query token s of n sees the tokens below seq_len - (n - 1 - s), else all.
    cu_seqlens_q : int array (batch + 1,), optional
        Where each request's rows begin in a ragged q.
    empty_lse : float
        lse of a row that sees no token; its out is 0.

    Returns
    -------
    out : float64 array, q's shape with head_dim_v for its last axis
    lse : float64 array (batch, num_heads_q, seq_len_q), ragged (num_heads_q, total_q)
        Natural log of the sum of exp(softmax_scale * q.k).
    """
    q = np.asarray(q).astype(np.float64)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    out = np.zeros((*q.shape[:-1], head_dim_v))
    lse = np.full(q.shape[:-1], float(empty_lse))
    for index, keys in query_groups(q.shape, kv_cache, block_table, seq_lens, causal=causal, cu_seqlens_q=cu_seqlens_q):
        if len(keys) > 0:
            probabilities, lse[index] = softmax(softmax_scale * (q[index] @ keys.T))
            out[index] = probabilities @ keys[:, :head_dim_v]
    return out, lse.swapaxes(-1, -2)


def merge_states_ref(states, *, empty_lse=math.inf):
    """Attention over the union of disjoint sets of tokens, from each set's (out, lse): (out, lse) in float64.

    Shapes as `mla_decode_ref` returns them. An lse of either infinity means that the set was empty for that row.
    """
    lses = np.stack([np.asarray(lse, np.float64).swapaxes(-1, -2) for _, lse in states])
    outs = np.stack([np.asarray(out).astype(np.float64) for out, _ in states])
    lses[np.isinf(lses)] = -np.inf
    outs[lses == -np.inf] = 0.0
    largest = lses.max(axis=0)
    seen = largest != -np.inf
    weights = np.exp(lses - np.where(seen, largest, 0.0))
    total = np.where(seen, weights.sum(axis=0), 1.0)
    out = (weights[..., None] * outs).sum(axis=0) / total[..., None]
    lse = np.where(seen, largest + np.log(total), empty_lse)
    return out, lse.swapaxes(-1, -2)
