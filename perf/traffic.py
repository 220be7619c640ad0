"""What a decode must move and compute, from its shape alone, and how long that takes on a machine whose ceilings are known.

Bytes: each KV token that a request sees once per KV head, whatever the number of query heads and rows that share it; q, out and lse
once. What two requests have in common (pages that they share) is one thing in memory, so `bytes` counts it once; `kv_bytes` counts it
per request. FLOPs: 2 (head_dim_qk + head_dim_v) for every token that a query row sees, so the causal mask's discount is taken.
A floor needs nothing else. What a kernel adds of its own (partial results of split requests) is counted only when asked for.
"""

from dataclasses import dataclass

from mla_numba.config import ceil_div
from perf.cases import PREFIX_BLOCK_TOKENS, Case

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
FLOAT32_BYTES = 4
# Rows of wgmma's smallest tile: a job of fewer rows costs the tensor core as much.
ROWS_PER_TILE = 64


@dataclass(frozen=True)
class Work:
    """Bytes and FLOPs of one decode.

    Parameters
    ----------
    flops : int
        Multiplications and additions of Q K^T and P V.
    kv_bytes, unique_kv_bytes : int
        Of the KV tokens seen, counted per request; and of the pages they lie in, those that requests share counted once.
    q_bytes, out_bytes, lse_bytes : int
        Read once, written once, written once.
    partial_bytes : int
        Written by split requests and read by the merge.
    """

    flops: int
    kv_bytes: int
    unique_kv_bytes: int
    q_bytes: int
    out_bytes: int
    lse_bytes: int
    partial_bytes: int = 0

    @property
    def bytes(self) -> int:
        """What must cross the memory bus."""
        return self.unique_kv_bytes + self.q_bytes + self.out_bytes + self.lse_bytes + self.partial_bytes

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / max(self.bytes, 1)

    def tflops(self, us: float) -> float:
        return self.flops / us / 1e6

    def gbs(self, us: float) -> float:
        return self.bytes / us / 1e3


def work(case: Case, *, split_pieces: int = 0, rows_per_piece: int = ROWS_PER_TILE, flashmla_formulas: bool = False) -> Work:
    """The work of `case`.

    Parameters
    ----------
    split_pieces, rows_per_piece : int
        Pieces of split requests, whose float32 out and lse pass through memory, and the query rows of each, per KV head.
    flashmla_formulas : bool
        Count as FlashMLA's own test does, for comparison with its published tables: FLOPs without the causal discount, bytes per
        request without lse and partials. Source: FlashMLA 9241ae3, tests/test_flash_mla_dense_decoding.py.
    """
    itemsize = ITEMSIZE[case.dtype]
    lengths = [max(length, 0) for length in case.seq_lens]
    rows = case.batch * case.seq_len_q * case.num_heads_q
    token_bytes = case.num_heads_kv * case.head_dim_qk * itemsize
    kv_bytes = sum(lengths) * token_bytes
    q_bytes, out_bytes = rows * case.head_dim_qk * itemsize, rows * case.head_dim_v * itemsize
    flops_per_token = 2 * (case.head_dim_qk + case.head_dim_v) * case.num_heads_q
    if flashmla_formulas:
        return Work(sum(lengths) * case.seq_len_q * flops_per_token, kv_bytes, kv_bytes, q_bytes, out_bytes, lse_bytes=0)
    visible = sum(max(length - hidden, 0) for length in lengths for hidden in range(case.seq_len_q)) if case.causal else \
        sum(lengths) * case.seq_len_q
    return Work(flops=visible * flops_per_token, kv_bytes=kv_bytes, unique_kv_bytes=_unique_tokens(case, lengths) * token_bytes,
                q_bytes=q_bytes, out_bytes=out_bytes, lse_bytes=rows * FLOAT32_BYTES,
                partial_bytes=2 * split_pieces * case.num_heads_kv * rows_per_piece * (case.head_dim_v + 1) * FLOAT32_BYTES)


def _unique_tokens(case: Case, lengths: list[int]) -> int:
    """Tokens seen, a page that requests share counted once. As `cases.block_table` lays them."""
    if case.prefix_blocks is None:
        return sum(lengths)
    shared, unique = set(), 0
    for length, blocks in zip(lengths, case.prefix_blocks, strict=True):
        pages = min(len(blocks), length // PREFIX_BLOCK_TOKENS) * PREFIX_BLOCK_TOKENS // case.page_size
        # A block's id stands for all the tokens up to its end, so the last block of a page is key enough.
        shared |= {(blocks[((page + 1) * case.page_size - 1) // PREFIX_BLOCK_TOKENS], page) for page in range(pages)}
        unique += length - pages * case.page_size
    return unique + len(shared) * case.page_size


def ridge(read_gbs: float, tflops: float) -> float:
    """FLOPs per byte above which compute binds."""
    return tflops * 1e3 / read_gbs


def bound(work: Work, read_gbs: float, tflops: float) -> tuple[str, float]:
    """("memory" or "compute", floor in microseconds): the ceiling that binds, and the time below which no kernel can be."""
    memory_us, compute_us = work.bytes / read_gbs / 1e3, work.flops / tflops / 1e6
    return ("memory", memory_us) if memory_us >= compute_us else ("compute", compute_us)


def tile_padding(case: Case, rows_per_tile: int = ROWS_PER_TILE) -> float:
    """Rows that the tensor core computes, over those there are: 1 where the rows of a KV head fill whole tiles."""
    rows = case.seq_len_q * case.num_heads_q // case.num_heads_kv
    return ceil_div(rows, rows_per_tile) * rows_per_tile / rows
