"""One problem, written down: `MLACase` is its structure and a seed, `build` makes the arrays, the same ones every time.

A case names everything that may matter (lengths, pages, strides, the shape of the logits) and draws nothing but random numbers
from its seed, so its `repr`, pasted back, is the whole reproducer. All that no request may see is poison: NaN and infinities in
the unseen slots of used pages, in pages that nobody uses and around strided arrays, and garbage past the used columns of the table.
"""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import ml_dtypes
import numpy as np

from verify.tolerances import decode_bounds

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
PAGES = ("identity", "shuffled", "shared")
LAYOUTS = ("contiguous", "padded", "transposed", "unaligned")
VALUES = ("normal", "uniform", "one_hot", "rising", "falling", "alternating", "negative", "large", "ties", "tiny")

POISON = (np.nan, np.inf, -np.inf)
# FlashMLA's tests use the first; the others look like a flag, an overflow, a plausible page and a page just past the end.
TABLE_GARBAGE = (2147480000, -1, -(2 ** 31), 0, "num_pages")
# How far, in natural-log units, the patterned regimes swing the logits; 200 is far below what exp can represent in float32.
SWING = {"one_hot": 25.0, "rising": 30.0, "falling": 30.0, "alternating": 15.0, "negative": 200.0}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Inputs:
    """The arguments of one decode call, as NumPy arrays."""

    q: np.ndarray
    kv_cache: np.ndarray
    block_table: np.ndarray
    seq_lens: np.ndarray
    head_dim_v: int
    softmax_scale: float | None = None
    causal: bool = True
    cu_seqlens_q: np.ndarray | None = None

    @property
    def dtype(self) -> str:
        return str(self.q.dtype)

    @property
    def ragged(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch(self) -> int:
        return len(self.seq_lens)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-3], self.q.shape[-2], self.q.shape[-3])

    def bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(out, lse, out_bound, lse_bound) in float64: the truth, and how far from it a kernel may be."""
        return decode_bounds(self.q, self.kv_cache, self.block_table, self.seq_lens, dtype=self.dtype, head_dim_v=self.head_dim_v,
                             softmax_scale=self.softmax_scale, causal=self.causal, cu_seqlens_q=self.cu_seqlens_q)

    def rows_of(self, request: int) -> slice:
        """The query rows of a request on the axis that `flat_q`, `rows` and a ragged q share."""
        if self.cu_seqlens_q is None:
            return slice(request * self.q.shape[1], (request + 1) * self.q.shape[1])
        return slice(int(self.cu_seqlens_q[request]), int(self.cu_seqlens_q[request + 1]))

    def q_lens(self) -> list[int]:
        return [self.rows_of(request).stop - self.rows_of(request).start for request in range(self.batch)]

    @property
    def flat_q(self) -> np.ndarray:
        return self.q.reshape(-1, *self.q.shape[-2:])

    def rows(self, out: np.ndarray, lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A result as (total_q, heads, head_dim_v) and (total_q, heads), whichever form the queries have."""
        return out.reshape(-1, *out.shape[-2:]), lse.swapaxes(-1, -2).reshape(-1, out.shape[-2])

    def take(self, requests: Sequence[int]) -> "Inputs":
        """The same requests in another order, some of them, or some of them twice."""
        order = list(requests)
        q = self.q[order] if not self.ragged else np.concatenate([self.q[self.rows_of(i)] for i in order])
        cu_seqlens_q = None
        if self.ragged:
            lengths = self.q_lens()
            cu_seqlens_q = np.cumsum([0] + [lengths[i] for i in order]).astype(np.int32)
        return replace(self, q=q, block_table=self.block_table[order], seq_lens=self.seq_lens[order], cu_seqlens_q=cu_seqlens_q)

    def taken_rows(self, requests: Sequence[int]) -> np.ndarray:
        """Where the rows of `take(requests)` lie among the rows of these inputs."""
        return np.concatenate([np.arange(self.rows_of(i).start, self.rows_of(i).stop) for i in requests])

    def seen_slots(self) -> np.ndarray:
        """(num_pages, page_size) bool: the slots of the cache that some request's length covers."""
        seen = np.zeros(self.kv_cache.shape[:2], bool)
        for request, column, count in _pages_in_use(self.seq_lens, self.kv_cache.shape[1]):
            seen[self.block_table[request, column], :count] = True
        return seen


def _pages_in_use(seq_lens: Sequence[int] | np.ndarray, page_size: int) -> Iterator[tuple[int, int, int]]:
    """(request, column of its table, tokens in that page) of every page that a length covers."""
    for request, seq_len in enumerate(seq_lens):
        for column in range(ceil_div(int(seq_len), page_size)):
            yield request, column, min(page_size, int(seq_len) - column * page_size)


@dataclass(frozen=True, repr=False)
class MLACase:
    """Parameters
    ----------
    seq_lens : tuple of int
        Tokens per request.
    seq_len_q, q_lens : int, tuple of int
        Queries per request, the same for all; or one count each, which makes the ragged form.
    softmax_scale : float, optional
        None: the default of the contract.
    pages : str
        How pages lie: "identity", "shuffled", or "shared" (requests share a prefix of request 0's pages).
    values : str
        Which logits: see `VALUES`.
    layout : str
        Strides of every array: "contiguous"; "padded" and "transposed" keep 16-byte alignment; "unaligned" keeps an element's.
    spare_pages, spare_columns : int
        Pages of the cache and columns of the table that nobody uses.
    """

    seq_lens: tuple[int, ...]
    seq_len_q: int = 1
    q_lens: tuple[int, ...] | None = None
    num_heads_q: int = 1
    num_heads_kv: int = 1
    head_dim_qk: int = 576
    head_dim_v: int = 512
    page_size: int = 64
    dtype: str = "bfloat16"
    causal: bool = True
    softmax_scale: float | None = None
    pages: str = "identity"
    values: str = "normal"
    layout: str = "contiguous"
    spare_pages: int = 1
    spare_columns: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("dtype", DTYPES), ("pages", PAGES), ("values", VALUES), ("layout", LAYOUTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}")
        counts = self.seq_len_q, self.num_heads_q, self.num_heads_kv, self.head_dim_qk, self.head_dim_v, self.page_size
        rules = {
            f"seq_lens={self.seq_lens!r} must be a tuple of at least one integer":
                isinstance(self.seq_lens, tuple) and self.seq_lens and all(isinstance(length, int) for length in self.seq_lens),
            "seq_len_q, heads, head dims and page_size must be integers from 1": all(isinstance(n, int) and n >= 1 for n in counts),
            "num_heads_q must be a multiple of num_heads_kv": self.num_heads_kv and self.num_heads_q % self.num_heads_kv == 0,
            "head_dim_v must be at most head_dim_qk": self.head_dim_v <= self.head_dim_qk,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ValueError("; ".join(broken))
        if self.q_lens is not None and len(self.q_lens) != len(self.seq_lens):
            raise ValueError(f"q_lens={self.q_lens} must have one entry for each of seq_lens={self.seq_lens}")

    def __repr__(self) -> str:
        given = [f for f in fields(self) if f.name == "seq_lens" or getattr(self, f.name) != f.default]
        return f"MLACase({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    @classmethod
    def parse(cls, text: str) -> "MLACase":
        """The case whose `repr` is `text`; nothing in the text is executed."""
        try:
            call = ast.parse(text.strip(), mode="eval").body
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "MLACase" and not call.args):
                raise ValueError("not a call of MLACase with keywords")
            return cls(**{keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords})
        except (SyntaxError, TypeError, ValueError) as error:
            raise ValueError(f"{text!r} is not a case like 'MLACase(seq_lens=(65,), num_heads_q=16)': {error}") from error

    @property
    def batch(self) -> int:
        return len(self.seq_lens)

    @property
    def query_counts(self) -> tuple[int, ...]:
        return self.q_lens if self.q_lens is not None else (self.seq_len_q,) * self.batch

    @property
    def scale(self) -> float:
        """What the patterned regimes divide by."""
        return self.softmax_scale or self.head_dim_qk ** -0.5

    def rng(self) -> np.random.Generator:
        """For what a property draws on top of the case: not the stream that `build` uses, and the same on every call."""
        return np.random.default_rng([self.seed, 1])

    def build(self, poison: bool = True) -> Inputs:
        """The arrays. Without `poison`, zeros lie wherever it would, and page 0 stands past the used columns of the table."""
        rng = np.random.default_rng([self.seed, 0])
        block_table, num_pages = self._block_table(rng)
        q, kv_cache = self._values(rng, block_table, num_pages)
        unseen = np.ones((num_pages, self.page_size), bool)
        unused = np.ones(block_table.shape, bool)
        for request, column, count in _pages_in_use(self.seq_lens, self.page_size):
            unseen[block_table[request, column], :count] = False
            unused[request, column] = False
        kv_cache[unseen] = np.resize(POISON, (np.count_nonzero(unseen), 1, 1)) if poison else 0
        garbage = [num_pages if value == "num_pages" else value for value in TABLE_GARBAGE]
        block_table[unused] = np.resize(garbage, np.count_nonzero(unused)) if poison else 0
        dtype = DTYPES[self.dtype]
        cu_seqlens_q = None
        if self.q_lens is not None:
            cu_seqlens_q = self._lay_out(np.cumsum((0, *self.q_lens)).astype(np.int32), poison)
        else:
            q = q.reshape(self.batch, self.seq_len_q, *q.shape[1:])
        return Inputs(self._lay_out(q.astype(dtype), poison), self._lay_out(kv_cache.astype(dtype), poison),
                      self._lay_out(block_table.astype(np.int32), poison), self._lay_out(np.array(self.seq_lens, np.int32), poison),
                      self.head_dim_v, self.softmax_scale, self.causal, cu_seqlens_q)

    def _block_table(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        counts = [ceil_div(seq_len, self.page_size) for seq_len in self.seq_lens]
        table = np.zeros((self.batch, max(counts, default=0) + self.spare_columns), np.int64)
        used = 0
        for request, count in enumerate(counts):
            shared = rng.integers(0, min(count, counts[0]) + 1) if self.pages == "shared" and request > 0 else 0
            table[request, :shared] = table[0, :shared]
            table[request, shared:count] = np.arange(used, used + count - shared)
            used += count - shared
        num_pages = used + self.spare_pages
        if self.pages != "identity":
            table = rng.permutation(num_pages)[table] if num_pages else table
        return table, num_pages

    def _values(self, rng: np.random.Generator, block_table: np.ndarray, num_pages: int) -> tuple[np.ndarray, np.ndarray]:
        """q as (total_q, heads, dim) and the cache, in float32."""
        q = rng.standard_normal((sum(self.query_counts), self.num_heads_q, self.head_dim_qk), np.float32)
        kv = rng.standard_normal((num_pages, self.page_size, self.num_heads_kv, self.head_dim_qk), np.float32)
        if self.values == "uniform":
            q[:] = 0
        elif self.values == "large":
            q *= 40
        elif self.values == "tiny":
            size = 2.0 ** -8 if self.dtype == "float16" else 2.0 ** -50
            q, kv = q * size, kv * size
        elif self.values == "ties":
            # Small integers, so that the dot products of equal keys are equal in every order of summation.
            q, kv = np.sign(q) * (np.abs(q) > 0.7), np.sign(kv) * (np.abs(kv) > 0.7)
            slots = kv.reshape(-1, *kv.shape[2:])
            slots[3:] = slots[np.arange(3, len(slots)) % 3]
        elif self.values in SWING:
            # All queries look along one direction of signs, so a key's component along it, in [-1, 1], sets its logit.
            direction = np.sign(rng.standard_normal(self.head_dim_qk)).astype(np.float32)
            strength = SWING[self.values] / (self.scale * self.head_dim_qk)
            q = strength * direction * (1 + 0.05 * q)
            kv = 0.2 * kv + direction * self._pattern(rng, block_table, num_pages)[:, :, None, None]
        return q.astype(np.float32), kv.astype(np.float32)

    def _pattern(self, rng: np.random.Generator, block_table: np.ndarray, num_pages: int) -> np.ndarray:
        """(num_pages, page_size): each slot's share of the swing, by its place in the first request that has it."""
        pattern = np.zeros((num_pages, self.page_size), np.float32)
        for request in reversed(range(self.batch)):
            seq_len = self.seq_lens[request]
            place = np.arange(seq_len) / max(seq_len - 1, 1)
            share = {"rising": 2 * place - 1, "falling": 1 - 2 * place, "negative": np.full(seq_len, -1.0),
                     "alternating": (-1.0) ** (np.arange(seq_len) // rng.choice([1, 16, 64])),
                     "one_hot": np.zeros(seq_len)}[self.values]
            # Seen by every query of the request that sees anything.
            first_sees = seq_len - (max(self.query_counts[request] - 1, 0) if self.causal else 0)
            if self.values == "one_hot" and seq_len:
                share[rng.integers(0, max(first_sees, 1))] = 1
            for column in range(ceil_div(seq_len, self.page_size)):
                in_page = share[column * self.page_size:(column + 1) * self.page_size]
                pattern[block_table[request, column], :len(in_page)] = in_page
        return pattern

    def _lay_out(self, array: np.ndarray, poison: bool) -> np.ndarray:
        """`array` with the strides of the layout, poison between its elements. The last axis of q and of the cache stays contiguous."""
        if self.layout == "contiguous":
            return array
        if self.layout == "transposed":
            axes = (*reversed(range(array.ndim - 1)), array.ndim - 1)
            return np.ascontiguousarray(array.transpose(axes)).transpose(axes)
        gap = 1 if self.layout == "unaligned" else 16 // array.itemsize
        around = np.empty([n + 1 for n in array.shape[:-1]] + [array.shape[-1] + 2 * gap], array.dtype)
        around[:] = (np.nan if array.dtype.kind != "i" else TABLE_GARBAGE[0]) if poison else 0
        inside = around[(*(slice(n) for n in array.shape[:-1]), slice(gap, gap + array.shape[-1]))]
        inside[:] = array
        return inside
