"""FlashMLA's interface over NumPy arrays: the three epochs of its API give one answer, and metadata in its own form."""

import ml_dtypes
import numpy as np
import pytest

from mla_numba import flash_mla, mla_decode
from mla_numba.scheduler import BEGIN_BLOCK, BEGIN_JOB, END_BLOCK, END_JOB

pytestmark = pytest.mark.l0

_LENS = np.array([300, 0, 65], np.int32)
_HEADS, _SEQ_LEN_Q = 4, 2


def _arguments(num_heads_kv=1):
    rng = np.random.default_rng(0)
    return (rng.standard_normal((3, _SEQ_LEN_Q, _HEADS, 576), np.float32).astype(ml_dtypes.bfloat16),
            rng.standard_normal((15, 64, num_heads_kv, 576), np.float32).astype(ml_dtypes.bfloat16),
            rng.permutation(15).reshape(3, 5).astype(np.int32), _LENS, 512)


def _epochs(num_heads_kv):
    rows = _SEQ_LEN_Q * _HEADS // num_heads_kv
    return {"February 2025": flash_mla.get_mla_metadata(_LENS, num_heads_per_head_k=rows, num_heads_k=num_heads_kv),
            "September 2025": flash_mla.get_mla_metadata(_LENS, rows, num_heads_kv, num_heads_q=_HEADS, is_fp8_kvcache=False, topk=None),
            "today": flash_mla.get_mla_metadata()}


@pytest.mark.parametrize("num_heads_kv", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_epochs_agree(num_heads_kv, causal):
    arguments = _arguments(num_heads_kv)
    expected = mla_decode(*arguments[:4], head_dim_v=512, causal=causal)
    for epoch, (metadata, num_splits) in _epochs(num_heads_kv).items():
        for _layer in range(2):
            out, lse = flash_mla.flash_mla_with_kvcache(*arguments, metadata, num_splits, softmax_scale=576**-0.5, causal=causal)
            np.testing.assert_array_equal(out.view(np.uint16), expected[0].view(np.uint16), err_msg=epoch)
            np.testing.assert_array_equal(lse, expected[1], err_msg=epoch)
        assert np.isposinf(lse[1]).all() and not out[1].astype(np.float32).any()


def test_metadata_has_flash_mlas_form():
    """(num_sm_parts, 8) and (batch + 1,) int32, where the parts cover every block of every request once."""
    for epoch, (metadata, num_splits) in _epochs(1).items():
        if epoch == "today":
            assert isinstance(metadata, flash_mla.FlashMLASchedMeta) and not metadata.have_initialized and num_splits is None
            assert metadata.tile_scheduler_metadata is None and metadata.num_splits is None
            flash_mla.flash_mla_with_kvcache(*_arguments(), metadata)
            assert metadata.have_initialized and metadata.config.num_heads_q == _HEADS
            metadata, num_splits = metadata.tile_scheduler_metadata, metadata.num_splits
        assert metadata.dtype == num_splits.dtype == np.int32
        assert metadata.shape[1] == 8 and num_splits.shape == (4,) and num_splits[0] == 0
        parts = [row for row in metadata if row[BEGIN_JOB] < len(_LENS)]
        assert (parts[0][BEGIN_JOB], parts[0][BEGIN_BLOCK]) == (0, 0) and parts[-1][END_JOB] == len(_LENS) - 1
        for before, after in zip(parts, parts[1:], strict=False):
            assert (after[BEGIN_JOB], after[BEGIN_BLOCK]) in {(before[END_JOB], before[END_BLOCK]), (before[END_JOB] + 1, 0)}


def test_the_plan_is_told_what_the_table_holds(monkeypatch):
    told, make_plan = [], flash_mla.make_plan
    monkeypatch.setattr(flash_mla, "make_plan", lambda *arguments, max_seq_len=None, **overrides: told.append(max_seq_len)
                        or make_plan(*arguments, max_seq_len=max_seq_len, **overrides))
    meta = flash_mla.FlashMLASchedMeta()
    for _layer in range(2):
        flash_mla.flash_mla_with_kvcache(*_arguments(), meta)
    assert told == [5 * 64]
    # FlashMLA's tables are another plan, for who asks: they show a whole request's cut, whatever it is told.
    assert meta.num_splits.shape == (4,) and told == [5 * 64, None]


def test_the_plan_is_for_a_backend_that_takes_the_cache(monkeypatch):
    asked, choose_backend = [], flash_mla.choose_backend
    monkeypatch.setattr(flash_mla, "choose_backend", lambda *arguments: asked.append(arguments) or choose_backend(*arguments))
    _, k_cache, *_ = arguments = _arguments()
    flash_mla.flash_mla_with_kvcache(*arguments, flash_mla.FlashMLASchedMeta())
    assert [kv_cache.pointer for *_, kv_cache in asked] == [k_cache.ctypes.data]


def test_metadata_of_no_query_is_refused_and_stays_empty():
    q, *others = _arguments()
    metadata = flash_mla.FlashMLASchedMeta()
    with pytest.raises(ValueError, match="seq_len_q must be from 1"):
        flash_mla.flash_mla_with_kvcache(q[:, :0], *others, metadata)
    assert not metadata.have_initialized
