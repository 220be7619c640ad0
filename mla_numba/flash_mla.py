"""FlashMLA's Python interface over `mla_decode`: ``from mla_numba import flash_mla`` in place of ``import flash_mla``.

All three epochs of its API work: February 2025 and September 2025, where `get_mla_metadata` is given the lengths and returns two
tensors, and today's, where it returns an empty `FlashMLASchedMeta` that the first call fills. NumPy and CuPy arrays work as torch
tensors do. Only dense decoding is here; the arguments of the sparse and FP8 kernels are refused by name.

Source: FlashMLA 9241ae3, flash_mla/flash_mla_interface.py; 1408756 and 414a2f3 for the older epochs.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from . import validate
from .api import Plan, make_plan, mla_decode
from .arrays import ArrayView, on_device, table_like_kind, view
from .config import DecodeShape
from .contract import HEAD_DIM_QK, HEAD_DIM_V
from .dispatch import choose_backend

# All that FlashMLA takes, and what its metadata calls do not tell.
PAGE_SIZE = 64
# What FlashMLA calls that which errors of `mla_decode` name.
_NAMES = {"kv_cache": "k_cache", "seq_lens": "cache_seqlens", "plan_decode": "get_mla_metadata"}


@dataclass
class FlashMLASchedMeta:
    """Filled by the first `flash_mla_with_kvcache` it is given to; later calls need the same shapes and the same lengths.

    As in FlashMLA the lengths are not compared, so make a new one for every decoding step. Use `plan_decode` with
    ``check_values=True`` to have them compared. Unlike there its tables are made for who asks, of the lengths as they are then.
    """

    have_initialized: bool = False
    config: DecodeShape | None = None
    plan: Plan | None = None
    _seq_lens: ArrayView | None = field(default=None, repr=False)

    @property
    def tile_scheduler_metadata(self) -> Any:
        """(num_sm_parts, 8) int32; None before the first call."""
        return self._tables[0]

    @property
    def num_splits(self) -> Any:
        """(batch + 1,) int32; None before the first call."""
        return self._tables[1]

    @property
    def _tables(self) -> tuple[Any, Any]:
        # The calls have the plan: another one, for tables that hardly anybody looks at, would be a kernel more in each step.
        if self.plan is None or self._seq_lens is None:
            return None, None
        with on_device(self.plan.device):
            return _metadata(self.plan.backend, self.plan.shape, self._seq_lens)


def get_mla_metadata(cache_seqlens: Any = None, num_q_tokens_per_head_k: int | None = None, num_heads_k: int = 1,
                     num_heads_q: int | None = None, is_fp8_kvcache: bool = False, topk: int | None = None, *,
                     num_heads_per_head_k: int | None = None) -> tuple[Any, Any]:
    """Scheduling metadata, in the form of the epoch that the arguments belong to.

    Parameters
    ----------
    cache_seqlens : array, (batch,) int32, optional
        Without it: today's epoch.
    num_q_tokens_per_head_k, num_heads_per_head_k : int
        seq_len_q * num_heads_q // num_heads_k; the second is its name in the first epoch.
    num_heads_k : int
        KV heads.
    num_heads_q : int, optional
        A multiple of `num_heads_k`; otherwise not needed.
    is_fp8_kvcache, topk
        Of the FP8 and sparse kernels: refused.

    Returns
    -------
    (FlashMLASchedMeta, None)
        Without arguments.
    (tile_scheduler_metadata, num_splits)
        (num_sm_parts, 8) and (batch + 1,) int32, of the library of `cache_seqlens`. They show how the batch is cut, in FlashMLA's
        columns. A call that is given them plans again from its own arguments, which tell more (causal, page size), so that
        metadata gone stale cannot make it wrong.

    Raises
    ------
    ValueError, TypeError
        As `plan_decode`.
    """
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    _refuse(is_fp8_kvcache=is_fp8_kvcache or None, topk=topk)
    num_heads_k = validate.require_count(num_heads_k, "num_heads_k")
    if num_q_tokens_per_head_k is None:
        num_q_tokens_per_head_k = num_heads_per_head_k
    rows = validate.require_count(num_q_tokens_per_head_k, "num_q_tokens_per_head_k")
    if num_heads_q is not None:
        validate.require_heads(validate.require_count(num_heads_q, "num_heads_q"), num_heads_k)
    lens = view(cache_seqlens, "cache_seqlens")
    validate.require_ndim(lens, 1, "(batch,)")
    validate.require_dtype(lens, ("int32",))
    validate.require_whole_elements(lens)
    batch = lens.shape[0]
    shape = DecodeShape(batch, 1, batch, rows * num_heads_k, num_heads_k, HEAD_DIM_QK, HEAD_DIM_V, PAGE_SIZE, "bfloat16",
                        causal=False, batch_invariant=False)
    with on_device(lens.device):
        return _metadata(choose_backend("auto", shape, lens.device), shape, lens)


def flash_mla_with_kvcache(q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any, head_dim_v: int, tile_scheduler_metadata: Any,
                           num_splits: Any = None, softmax_scale: float | None = None, causal: bool = False,
                           is_fp8_kvcache: bool = False, indices: Any = None, attn_sink: Any = None, extra_k_cache: Any = None,
                           extra_indices_in_kvcache: Any = None, topk_length: Any = None,
                           extra_topk_length: Any = None) -> tuple[Any, Any]:
    """Dense MLA decoding over a paged cache, called as FlashMLA's.

    Parameters
    ----------
    q : array, (batch, seq_len_q, num_heads_q, head_dim)
    k_cache : array, (num_blocks, page_block_size, num_heads_k, head_dim)
    block_table : array, (batch, max_num_blocks_per_seq) int32
    cache_seqlens : array, (batch,) int32
    head_dim_v : int
    tile_scheduler_metadata, num_splits
        What `get_mla_metadata` returned.
    softmax_scale : float, optional
        Default head_dim ** -0.5.
    causal : bool
        Bottom-right aligned.
    is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length
        Of the FP8 and sparse kernels: refused.

    Returns
    -------
    out : array, (batch, seq_len_q, num_heads_q, head_dim_v)
    softmax_lse : array, (batch, num_heads_q, seq_len_q)
        float32, natural logarithm; +inf for a row that sees nothing.

    Raises
    ------
    ValueError, TypeError
        As `mla_decode`; `StalePlanError` when a `FlashMLASchedMeta` is used with other shapes than at its first call.
    """
    _refuse(is_fp8_kvcache=is_fp8_kvcache or None, indices=indices, attn_sink=attn_sink, extra_k_cache=extra_k_cache,
            extra_indices_in_kvcache=extra_indices_in_kvcache, topk_length=topk_length, extra_topk_length=extra_topk_length)
    if isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        if num_splits is not None:
            raise ValueError("num_splits must be None beside a FlashMLASchedMeta, which holds its own")
    elif num_splits is None:
        raise TypeError("tile_scheduler_metadata must be a FlashMLASchedMeta, or a tensor with num_splits beside it; "
                        f"got {type(tile_scheduler_metadata).__name__} and num_splits=None")
    plan = None
    try:
        if num_splits is None:
            if not tile_scheduler_metadata.have_initialized:
                _fill(tile_scheduler_metadata, q, k_cache, block_table, cache_seqlens, head_dim_v, causal)
            plan = tile_scheduler_metadata.plan
        return mla_decode(q, k_cache, block_table, cache_seqlens, head_dim_v=head_dim_v, softmax_scale=softmax_scale, causal=causal,
                          plan=plan)
    except (TypeError, ValueError) as error:
        error.args = (re.sub(r"\w+", lambda word: _NAMES.get(word[0], word[0]), str(error)),)
        raise


def _fill(meta: FlashMLASchedMeta, q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any, head_dim_v: int, causal: bool) -> None:
    kv_view, table, lens = view(k_cache, "kv_cache"), view(block_table, "block_table"), view(cache_seqlens, "seq_lens")
    shape = validate.decode_shape(view(q, "q"), kv_view, table, lens, None, validate.require_count(head_dim_v, "head_dim_v"),
                                  validate.require_flag(causal, "causal"), False)
    # 0 would say that queries are ragged.
    validate.require_count(shape.seq_len_q, "seq_len_q")
    name = choose_backend("auto", shape, lens.device, kv_view)
    with on_device(lens.device):
        meta.plan = make_plan(name, shape, lens, None, None, max_seq_len=table.shape[1] * shape.page_size)
    meta.config, meta._seq_lens, meta.have_initialized = shape, lens, True


def _metadata(name: str, shape: DecodeShape, seq_lens: ArrayView) -> tuple[Any, Any]:
    """(num_sm_parts, 8), (batch + 1,): FlashMLA's tables, where a job is a whole request, in the library of `seq_lens`."""
    schedule = make_plan(name, shape, seq_lens, None, None, rows_per_job=max(shape.seq_len_q * shape.heads_per_kv, 1)).schedule
    return table_like_kind(schedule.workers, seq_lens), table_like_kind(schedule.num_splits, seq_lens)


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} belongs to FlashMLA's FP8 or sparse kernels, which mla_numba does not have; leave it out")
