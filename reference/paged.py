"""The paged cache and the rule of who sees what: the only place that knows pages, lengths and the causal mask."""

import numpy as np


def gather_tokens(kv_cache, pages, seq_len):
    """The first `seq_len` tokens of one request, in order: (seq_len, num_heads_kv, head_dim_qk) float64.

    `pages` is the request's row of the block table. A page id outside the cache, and a token past the row's last column, reads as
    zeros. Slots past `seq_len` and pages that are not in use are never read.
    """
    num_pages, page_size, num_heads_kv, head_dim_qk = kv_cache.shape
    tokens = np.zeros((max(int(seq_len), 0), num_heads_kv, head_dim_qk))
    for column, begin in zip(range(len(pages)), range(0, len(tokens), page_size), strict=False):
        page = int(pages[column])
        if 0 <= page < num_pages:
            in_use = tokens[begin:begin + page_size]
            in_use[:] = kv_cache[page, :len(in_use)]
    return tokens


def num_visible(seq_len, seq_len_q, query, causal):
    """How many of the first tokens query token `query` of `seq_len_q` sees; the last query token is the last token (bottom-right)."""
    hidden = seq_len_q - 1 - query if causal else 0
    return max(int(seq_len) - hidden, 0)


def query_groups(q_shape, kv_cache, block_table, seq_lens, *, causal, cu_seqlens_q):
    """Every (query token, KV head) of a batch, as pairs (index, keys).

    `index` selects from q, or from any array that starts with q's axes but the last, the query heads that share the KV head;
    `keys` (visible tokens, head_dim_qk) float64 are the tokens that they see. No mask is needed: what is seen is a prefix.
    """
    num_heads_kv = kv_cache.shape[2]
    heads_per_kv = q_shape[-2] // num_heads_kv
    for request, seq_len in enumerate(seq_lens):
        if cu_seqlens_q is None:
            tokens = [(request, query) for query in range(q_shape[1])]
        else:
            tokens = [(row,) for row in range(cu_seqlens_q[request], cu_seqlens_q[request + 1])]
        kv = gather_tokens(kv_cache, block_table[request], seq_len)
        for query, token in enumerate(tokens):
            visible = num_visible(seq_len, len(tokens), query, causal)
            for head in range(num_heads_kv):
                yield (*token, slice(head * heads_per_kv, (head + 1) * heads_per_kv)), kv[:visible, head]
