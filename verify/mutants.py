"""The test of the tests: a split-KV paged decode in NumPy, and bugs that can be switched on in it, one at a time.

The algorithm is the one of the kernels (pages, tiles, online softmax in base 2, pieces, merge), with every knob that a property may
need, so that all properties run on it. `MUTANTS` names each bug and a property that must catch it; test_l0_mutants.py holds them to it.
"""

import math
from typing import Any

import numpy as np

from verify.cases import DTYPES, Inputs, ceil_div
from verify.targets import KNOBS, Target

TILE = 8
INVARIANT_TILES = 2
DEFAULT_WORKERS = 3
# A number of workers, and the tokens of the longest request, if they were told.
_Plan = tuple[int, int | None]

MUTANTS = {
    "one token too many": "equals_float64",
    "one token too few": "equals_float64",
    "length of the next request": "equals_float64",
    "tail masked but not zero-filled": "poison",
    "tail zero-filled but not masked": "equals_float64",
    "last tile dropped if not full": "equals_float64",
    "first tile of a page only": "other_page_size",
    "causal ignored": "causal_rows",
    "causal one token too many": "causal_rows",
    "causal aligned to the top left": "causal_rows",
    "pages taken in the order they lie": "page_permutation",
    "table row of the next request": "batch_permutation",
    "strides ignored": "strides",
    "page id clamped": "bad_values",
    "negative page id counts from the end": "bad_values",
    "table column clamped": "bad_values",
    "negative length not clamped": "bad_values",
    "KV head 0 for all": "head_slice",
    "heads interleaved over KV heads": "head_slice",
    "RoPE left out": "logit_shift",
    "V from the last columns of K": "equals_float64",
    "V shifted by a column": "equals_float64",
    "V too large": "inside_hull",
    "scale squared": "equals_float64",
    "scale of head_dim_v by default": "equals_float64",
    "scale for exp, used with exp2": "equals_float64",
    "maximum begins at 0": "equals_float64",
    "no maximum": "equals_float64",
    "accumulator not rescaled": "equals_float64",
    "row sum not rescaled": "equals_float64",
    "state kept from the request before": "batch_permutation",
    "accumulator in the input dtype": "equals_float64",
    "P in 4 bits": "equals_float64",
    "not divided by the row sum": "inside_hull",
    "lse in base 2": "equals_float64",
    "lse in the input dtype": "equals_float64",
    "lse without the maximum": "logit_shift",
    "merge without weights": "split_count",
    "merge drops a piece": "split_count",
    "merge counts pieces that saw nothing": "split_count",
    "nothing past the longest request that the plan was told": "longest_request",
    "merge in any order": "reruns",
    "another result each time, in one buffer": "reruns",
    "inputs written to": "inputs_untouched",
    "pieces follow the batch": "batch_invariant",
    "empty rows not written": "empty_rows",
    "empty rows hold -0": "empty_rows",
    "empty lse of the other sign": "empty_rows",
    "ragged rows begin at 0": "ragged_queries",
    "given outputs written as if contiguous": "given_outputs",
    "merge_states trusts +inf": "merge_of_many",
    "merge_states in base 2": "merge_of_halves",
}


def mutant(bug: str = "") -> Target:
    """The decode with one bug, or, without a name, as it should be."""
    if bug and bug not in MUTANTS:
        raise ValueError(f"bug={bug!r} must be one of {', '.join(map(repr, MUTANTS))}")
    decode = _Decode(bug)
    return Target(bug or "healthy", decode, ("small",), KNOBS,
                  lambda inputs, num_workers=None, batch_invariant=False, max_seq_len=None: (num_workers or DEFAULT_WORKERS, max_seq_len),
                  decode.merge_states, python=f"verify.mutants.mutant({bug!r})")


def _weight(x: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """exp2(x - largest), and 0 where nothing was seen, be it that there is no maximum yet."""
    return np.exp2(x - np.where(largest == -np.inf, 0, largest))


class _Decode:
    """Where a bug would be written, `self.bug` is asked for it."""

    def __init__(self, bug: str):
        self.bug = bug
        self.rng = np.random.default_rng()
        self.state = (np.zeros((0, 0), np.float32),) * 3
        self.buffers: dict[Any, np.ndarray] = {}

    def __call__(self, q: np.ndarray, kv_cache: np.ndarray, block_table: np.ndarray, seq_lens: np.ndarray, head_dim_v: int,
                 softmax_scale: float | None, causal: bool, *, cu_seqlens_q: np.ndarray | None = None,
                 plan: _Plan = (DEFAULT_WORKERS, None), out: Any = None, lse: Any = None, batch_invariant: bool = False,
                 empty_lse: str = "+inf") -> tuple[Any, Any]:
        bug = self.bug
        inputs = Inputs(q, kv_cache, block_table, seq_lens, head_dim_v, softmax_scale, causal, cu_seqlens_q)
        if softmax_scale is None:
            softmax_scale = (head_dim_v if bug == "scale of head_dim_v by default" else q.shape[-1]) ** -0.5
        if bug == "scale squared":
            softmax_scale = softmax_scale ** 2
        scale_log2 = np.float32(softmax_scale * (1.0 if bug == "scale for exp, used with exp2" else math.log2(math.e)))
        empty = {"+inf": np.inf, "-inf": -np.inf}[empty_lse] * (-1 if bug == "empty lse of the other sign" else 1)
        if bug == "strides ignored":
            kv_cache = np.lib.stride_tricks.as_strided(kv_cache, kv_cache.shape, np.empty_like(kv_cache, order="C").strides)
        if bug == "another result each time, in one buffer" and out is None:
            out = self.buffers.setdefault((inputs.out_shape, q.dtype), np.empty(inputs.out_shape, q.dtype))
        out = np.full(inputs.out_shape, np.nan, q.dtype) if out is None else out
        lse = np.full(inputs.lse_shape, np.nan, np.float32) if lse is None else lse
        result = out
        if bug == "given outputs written as if contiguous":
            out = np.lib.stride_tricks.as_strided(out, out.shape, np.empty_like(out, order="C", subok=False).strides)

        num_workers, max_seq_len = plan
        lengths = [int(n) if bug == "negative length not clamped" else max(int(n), 0) for n in seq_lens]
        if bug == "nothing past the longest request that the plan was told" and max_seq_len is not None:
            lengths = [min(n, max_seq_len) for n in lengths]
        piece = max(ceil_div(sum(ceil_div(abs(n), TILE) for n in lengths), num_workers), 1)
        if batch_invariant and bug != "pieces follow the batch":
            piece = INVARIANT_TILES
        for request in range(inputs.batch):
            after = (request + 1) % inputs.batch
            rows = inputs.rows_of(request)
            if rows.start == rows.stop:
                continue
            queries = inputs.flat_q[slice(rows.stop - rows.start) if bug == "ragged rows begin at 0" and inputs.ragged else rows]
            seq_len = abs(lengths[after if bug == "length of the next request" else request])
            table = block_table[after if bug == "table row of the next request" else request]
            # Bugs make NaN and overflow; so do, in passing, vector instructions on matrices without any.
            with np.errstate(all="ignore"):
                o, lse2 = self._request(queries.astype(np.float32), kv_cache, table, seq_len, head_dim_v, scale_log2, causal,
                                        piece)
            if bug == "another result each time, in one buffer":
                o *= np.float32(1 + self.rng.random() / 512)
            unseen = lse2 == -np.inf
            o[unseen] = np.nan if bug == "empty rows not written" else -0.0 if bug == "empty rows hold -0" else 0.0
            lse_rows = np.where(unseen, np.float32(empty), lse2 * np.float32(1.0 if bug == "lse in base 2" else math.log(2)))
            if bug == "lse in the input dtype":
                lse_rows = lse_rows.astype(q.dtype)
            (out[rows] if inputs.ragged else out[request])[...] = o.astype(q.dtype)
            (lse[:, rows] if inputs.ragged else lse[request])[...] = lse_rows.T
        if bug == "inputs written to":
            kv_cache[:1] = 0
        return result, lse

    def _request(self, q: np.ndarray, kv_cache: np.ndarray, table: np.ndarray, seq_len: int, head_dim_v: int, scale_log2: np.float32,
                 causal: bool, piece: int) -> tuple[np.ndarray, np.ndarray]:
        """All rows of one request: o (q_len, heads, head_dim_v) and lse2 (q_len, heads), -inf where a row sees nothing."""
        bug = self.bug
        q_len, num_heads, _ = q.shape
        num_heads_kv = kv_cache.shape[2]
        o, lse2 = np.zeros((q_len, num_heads, head_dim_v), np.float32), np.full((q_len, num_heads), -np.inf, np.float32)
        seq_len += {"one token too many": 1, "one token too few": -1}.get(bug, 0)
        hidden = {"causal ignored": 0 * np.arange(q_len), "causal aligned to the top left": seq_len - 1 - np.arange(q_len),
                  "causal one token too many": np.maximum(q_len - 2 - np.arange(q_len), 0)}.get(bug, np.arange(q_len)[::-1])
        visible = np.maximum(seq_len - hidden if causal else np.full(q_len, seq_len), 0)
        num_tiles = max(seq_len, 0) // TILE if bug == "last tile dropped if not full" else ceil_div(max(seq_len, 0), TILE)
        for kv_head in range(num_heads_kv):
            heads = np.arange(num_heads).reshape(num_heads_kv, -1)[kv_head]
            if bug == "heads interleaved over KV heads":
                heads = np.arange(num_heads).reshape(-1, num_heads_kv)[:, kv_head]
            rows = q[:, heads].reshape(-1, q.shape[-1])
            row_visible = np.repeat(visible, len(heads))
            cache = kv_cache[:, :, 0 if bug == "KV head 0 for all" else kv_head]
            parts = [self._piece(rows, cache, table, seq_len, row_visible, range(begin, min(begin + piece, num_tiles)), head_dim_v,
                                 scale_log2) for begin in range(0, num_tiles, piece)]
            if parts:
                merged_o, merged_lse2 = self._merge(parts)
                o[:, heads] = merged_o.reshape(q_len, len(heads), -1)
                lse2[:, heads] = merged_lse2.reshape(q_len, len(heads))
        return o, lse2

    def _piece(self, rows: np.ndarray, cache: np.ndarray, table: np.ndarray, seq_len: int, visible: np.ndarray, tiles: range,
               head_dim_v: int, scale_log2: np.float32) -> tuple[np.ndarray, np.ndarray]:
        """Online softmax over some tiles: o, normalised, and lse2 of each row."""
        bug = self.bug
        dtype = cache.dtype
        head_dim_qk = rows.shape[1]
        acc = np.zeros((len(rows), head_dim_v), np.float32)
        total = np.zeros((len(rows), 1), np.float32)
        largest = np.full((len(rows), 1), 0.0 if bug in ("maximum begins at 0", "no maximum") else -np.inf, np.float32)
        if bug == "state kept from the request before" and self.state[0].shape == acc.shape:
            acc, total, largest = self.state
        for tile in tiles:
            tokens = np.arange(tile * TILE, (tile + 1) * TILE)
            keys = self._load(cache, table, tokens, seq_len)
            values = keys[:, -head_dim_v:] if bug == "V from the last columns of K" else keys[:, :head_dim_v]
            if bug == "V shifted by a column":
                values = np.roll(values, 1, axis=1)
            if bug == "V too large":
                values = values * np.float32(1.2)
            depth = head_dim_v if bug == "RoPE left out" else head_dim_qk
            logits = scale_log2 * (rows[:, :depth] @ keys[:, :depth].T)
            if bug != "tail zero-filled but not masked":
                logits = np.where(tokens < visible[:, None], logits, -np.inf)
            before = largest
            if bug != "no maximum":
                largest = np.maximum(largest, logits.max(axis=1, keepdims=True))
            rescale, p = _weight(before, largest), _weight(logits, largest)
            total = total * (1 if bug == "row sum not rescaled" else rescale) + p.sum(axis=1, keepdims=True)
            p = np.round(p * 16) / 16 if bug == "P in 4 bits" else p.astype(dtype).astype(np.float32)
            acc = acc * (1 if bug == "accumulator not rescaled" else rescale) + p @ values
            if bug == "accumulator in the input dtype":
                acc = acc.astype(dtype).astype(np.float32)
        self.state = acc, total, largest
        lse2 = np.log2(total) + (0 if bug == "lse without the maximum" else np.where(total > 0, largest, 0))
        return acc if bug == "not divided by the row sum" else acc / np.where(total > 0, total, 1), lse2[:, 0]

    def _load(self, cache: np.ndarray, table: np.ndarray, tokens: np.ndarray, seq_len: int) -> np.ndarray:
        """A tile in float32; zeros for tokens past the length, and where the table or its page id leads nowhere."""
        bug = self.bug
        num_pages, page_size, head_dim_qk = cache.shape
        columns, slots = np.divmod(tokens, page_size)
        if bug == "first tile of a page only":
            slots = slots % TILE
        used = (tokens < seq_len) | (bug == "tail masked but not zero-filled")
        if bug == "table column clamped":
            columns = np.minimum(columns, len(table) - 1)
        used = used & (columns < len(table))
        pages = np.full(len(tokens), -1)
        pages[used] = columns[used] if bug == "pages taken in the order they lie" else table[columns[used]]
        if bug == "page id clamped":
            pages[used] = np.clip(pages[used], 0, num_pages - 1)
        if bug == "negative page id counts from the end":
            pages[used] = np.where(pages[used] < 0, pages[used] % max(num_pages, 1), pages[used])
        found = (pages >= 0) & (pages < num_pages)
        tile = np.zeros((len(tokens), head_dim_qk), np.float32)
        tile[found] = cache[pages[found], slots[found]]
        return tile

    def _merge(self, parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """Weigh each piece's o by its share of the sum, in the order of the pieces."""
        bug = self.bug
        if bug == "merge in any order":
            parts = [parts[i] for i in self.rng.permutation(len(parts))]
        if bug == "merge drops a piece" and len(parts) > 2:
            parts = parts[:-1]
        lse2 = np.stack([part for _, part in parts])
        if bug == "merge counts pieces that saw nothing":
            lse2 = np.where((lse2 == -np.inf) & (lse2 > -np.inf).any(axis=0), 0, lse2)
        largest = lse2.max(axis=0)
        weights = _weight(lse2, largest)
        total = np.zeros_like(largest)
        o = np.zeros_like(parts[0][0])
        for weight, (part, _) in zip(weights, parts, strict=True):
            total += weight
            o += (np.ones_like(weight) if bug == "merge without weights" else weight)[:, None] * part
        return o / np.where(total > 0, total, 1)[:, None], np.log2(total) + np.where(total > 0, largest, 0)

    def merge_states(self, states: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """The public merge: natural logarithms, and either infinity for a state that saw nothing."""
        bug = self.bug
        to_log2 = np.float32(1.0 if bug == "merge_states in base 2" else math.log2(math.e))
        parts = []
        for out, lse in states:
            lse2 = to_log2 * lse.swapaxes(-1, -2)
            if bug != "merge_states trusts +inf":
                lse2 = np.where(np.isinf(lse2), -np.inf, lse2)
            o = np.where((lse2 == -np.inf)[..., None], 0, out.astype(np.float32))
            parts.append((o.reshape(-1, out.shape[-1]), lse2.reshape(-1)))
        with np.errstate(all="ignore"):
            o, lse2 = self._merge(parts)
        lse = np.where(lse2 == -np.inf, np.inf, lse2 / to_log2).astype(np.float32)
        out, (_, like) = states[0][0], states[0]
        return o.reshape(out.shape).astype(DTYPES[str(out.dtype)]), lse.reshape(like.swapaxes(-1, -2).shape).swapaxes(-1, -2)
