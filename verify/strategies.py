"""Hypothesis strategies. They draw the structure of a case and a seed, never elements: small to shrink, quick to draw, any size.

Lengths are drawn where kernels break: at 0 and 1, around pages, tiles and where a scheduler cuts. A budget of tokens per case keeps
the largest in reach of the float64 oracle, and of a simulator that runs every GPU thread as a Python thread.
"""

from dataclasses import dataclass

from hypothesis import strategies as st

from verify.cases import DTYPES, LAYOUTS, PAGES, VALUES, MLACase


@dataclass(frozen=True)
class Dims:
    """The sizes that a family of cases is drawn from."""

    name: str
    head_dims: tuple[tuple[int, int], ...]      # (head_dim_qk, head_dim_v)
    heads: tuple[tuple[int, int], ...]          # (num_heads_q, num_heads_kv)
    page_sizes: tuple[int, ...]
    edges: tuple[int, ...]                      # lengths that tiles, splits and their neighbours begin at
    max_tokens: int                             # of a whole case, and so of one request
    max_batch: int
    max_seq_len_q: int
    max_rows: int                               # num_heads_q * queries of a request


SMALL = Dims("small", head_dims=((24, 16), (16, 16), (40, 32)), heads=((1, 1), (2, 1), (6, 1), (4, 2), (6, 3), (3, 3)),
             page_sizes=(4, 1, 8, 5, 16), edges=(8, 16, 32, 64), max_tokens=150, max_batch=5, max_seq_len_q=4, max_rows=24)
# For CUDA's simulator in Python: the same structure in tens of tokens.
TINY = Dims("tiny", head_dims=((12, 8), (8, 8)), heads=((1, 1), (2, 1), (4, 2), (5, 1)), page_sizes=(4, 8, 3), edges=(4, 8, 16),
            max_tokens=40, max_batch=3, max_seq_len_q=3, max_rows=10)
DEEPSEEK = Dims("deepseek", head_dims=((576, 512),),
                heads=((16, 1), (1, 1), (3, 1), (9, 1), (63, 1), (64, 1), (126, 1), (128, 1), (8, 2), (12, 4)),
                page_sizes=(64, 64, 64, 1, 16, 128), edges=(64, 128, 192, 512, 1024), max_tokens=1300, max_batch=6, max_seq_len_q=4,
                max_rows=128)
# Several pieces of every kind of split; the oracle takes seconds.
LONG = Dims("long", head_dims=((576, 512),), heads=((16, 1), (64, 1), (128, 1), (16, 2)), page_sizes=(64, 64, 256, 16),
            edges=(1024, 2048, 4096, 8192), max_tokens=9000, max_batch=4, max_seq_len_q=2, max_rows=128)
# For the emulator of the Hopper kernels: DeepSeek's dims and real pages, but a few blocks of tokens, a second or two.
EMULATED = Dims("emulated", head_dims=((576, 512),), heads=((16, 1), (1, 1), (3, 1), (64, 1), (66, 1), (128, 1), (8, 2), (12, 4)),
                page_sizes=(64, 64, 16, 32, 128, 8), edges=(64, 128, 192, 256), max_tokens=520, max_batch=4, max_seq_len_q=3, max_rows=130)
DIMS = {dims.name: dims for dims in (SMALL, TINY, DEEPSEEK, LONG, EMULATED)}


def lengths(dims: Dims, page_size: int, most: int) -> st.SearchStrategy[int]:
    """Lengths from 0 to `most`, mostly at an edge of a page or a tile, or one beside it."""
    edges = {0, 1} | {edge + beside for edge in (*dims.edges, page_size, 2 * page_size, most) for beside in (-1, 0, 1)}
    near = sorted(length for length in edges if 0 <= length <= most)
    return st.one_of(st.sampled_from(near), st.integers(0, most))


@st.composite
def mla_cases(draw, dims: Dims, *, ragged: bool = False, min_batch: int = 1, min_seq_len_q: int = 1, empty: bool = False,
              dtypes: tuple[str, ...] = tuple(DTYPES)) -> MLACase:
    """Cases of the given sizes.

    Parameters
    ----------
    ragged : bool
        Whether half of them have the ragged form.
    min_batch, min_seq_len_q : int
        Lower ends.
    empty : bool
        Every case has a query row that sees nothing.
    dtypes : tuple of str
        The dtypes to draw from.
    """
    page_size = draw(st.sampled_from(dims.page_sizes), label="page_size")
    head_dim_qk, head_dim_v = draw(st.sampled_from(dims.head_dims), label="head_dims")
    num_heads_q, num_heads_kv = draw(st.sampled_from(dims.heads), label="heads")
    batch = draw(st.integers(min_batch, dims.max_batch), label="batch")
    budget, seq_lens = dims.max_tokens, []
    for _ in range(batch):
        seq_lens.append(draw(lengths(dims, page_size, budget), label="seq_len"))
        budget -= seq_lens[-1]
    seq_lens = draw(st.permutations(seq_lens), label="order")
    causal = draw(st.booleans(), label="causal")
    most_q = max(min(dims.max_seq_len_q, dims.max_rows // num_heads_q), min_seq_len_q)
    seq_len_q = draw(st.integers(min_seq_len_q, most_q), label="seq_len_q")
    q_lens = None
    if ragged and draw(st.booleans(), label="ragged"):
        q_lens = tuple(draw(st.integers(0, most_q), label="q_len") for _ in range(batch))
        seq_len_q = 1
    if empty:
        request = draw(st.integers(0, batch - 1), label="empty request")
        if q_lens is not None:
            q_lens = tuple(max(n, int(i == request)) for i, n in enumerate(q_lens))
        rows = seq_len_q if q_lens is None else q_lens[request]
        seq_lens[request] = draw(st.integers(0, rows - 1 if causal else 0), label="empty seq_len")
    return MLACase(
        seq_lens=tuple(seq_lens), seq_len_q=seq_len_q, q_lens=q_lens, num_heads_q=num_heads_q, num_heads_kv=num_heads_kv,
        head_dim_qk=head_dim_qk, head_dim_v=head_dim_v, page_size=page_size, causal=causal,
        dtype=draw(st.sampled_from(dtypes), label="dtype"),
        softmax_scale=draw(st.sampled_from((None, None, 0.07, 1.0, 0.0)), label="softmax_scale"),
        pages=draw(st.sampled_from(PAGES), label="pages"),
        values=draw(st.sampled_from(VALUES), label="values"),
        layout=draw(st.sampled_from(LAYOUTS), label="layout"),
        spare_pages=draw(st.integers(0, 2), label="spare_pages"),
        spare_columns=draw(st.integers(0, 2), label="spare_columns"),
        seed=draw(st.integers(0, 2 ** 16), label="seed"),
    )
