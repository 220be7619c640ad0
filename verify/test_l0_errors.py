"""Every rule of the contract: the bad call raises the named error, saying what it got, and the next good call still works."""

import re

import ml_dtypes
import numpy as np
import pytest

import mla_numba
from mla_numba import BackendUnavailable, StalePlanError, flash_mla, merge_states, mla_decode, plan_decode

pytestmark = pytest.mark.l0

_BF16 = ml_dtypes.bfloat16
_BATCH, _SEQ_LEN_Q, _HEADS, _DIM, _DIM_V, _PAGE, _PAGES = 2, 2, 4, 24, 16, 8, 6


def _good():
    rng = np.random.default_rng(0)
    return dict(q=rng.standard_normal((_BATCH, _SEQ_LEN_Q, _HEADS, _DIM)).astype(_BF16),
                kv_cache=rng.standard_normal((_PAGES, _PAGE, 1, _DIM)).astype(_BF16),
                block_table=np.array([[0, 1, 2], [3, 4, 5]], np.int32), seq_lens=np.array([20, 9], np.int32), head_dim_v=_DIM_V,
                backend="cpu")


def _good_ragged():
    call = _good()
    return {**call, "q": call["q"].reshape(-1, _HEADS, _DIM), "cu_seqlens_q": np.array([0, 1, 4], np.int32)}


def _good_plan(**changes):
    return plan_decode(**{**dict(seq_lens=np.array([20, 9], np.int32), num_heads_q=_HEADS, seq_len_q=_SEQ_LEN_Q, page_size=_PAGE,
                                 head_dim_qk=_DIM, head_dim_v=_DIM_V, backend="cpu"), **changes})


def _case(name, error, match, **changes):
    return pytest.param(error, match, changes, id=name)


def _read_only(shape, dtype):
    array = np.empty(shape, dtype)
    array.flags.writeable = False
    return array


class _Elsewhere:
    """What DLPack says is on a GPU."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, *, stream):
        assert stream == 1
        return self._array.__dlpack__()

    def __dlpack_device__(self):
        return 2, 1


def _askew(shape, dtype):
    """Rows that begin at odd addresses."""
    row = shape[-1] * np.dtype(dtype).itemsize + 1
    strides = [row * int(np.prod(shape[i + 1:-1])) for i in range(len(shape) - 1)]
    return np.ndarray(shape, dtype, bytearray(row * int(np.prod(shape[:-1]))), 0, (*strides, np.dtype(dtype).itemsize))


_OUT, _LSE = (_BATCH, _SEQ_LEN_Q, _HEADS, _DIM_V), (_BATCH, _HEADS, _SEQ_LEN_Q)
_zeros = np.zeros
_DECODE = [
    _case("q-not-an-array", TypeError, "q must be an array.* got list", q=[1.0]),
    _case("q-none", TypeError, "q must be an array.* got NoneType", q=None),
    _case("q-3d", ValueError, "q has 3 dimensions.* needs 4", q=_zeros((2, 4, 24), _BF16)),
    _case("q-float64", TypeError, "q has dtype float64.* bfloat16 or float16 or float32", q=_zeros((2, 2, 4, 24))),
    _case("q-int32", TypeError, "q has dtype int32", q=_zeros((2, 2, 4, 24), np.int32)),
    _case("q-big-endian", TypeError, "q has dtype >f4", q=_zeros((2, 2, 4, 24), ">f4")),
    _case("q-other-head-dim", ValueError, r"q has shape \(2, 2, 4, 23\).*\(2, 2, 4, 24\)", q=_zeros((2, 2, 4, 23), _BF16)),
    _case("q-other-batch", ValueError, r"q has shape \(3, 2, 4, 24\).*one entry per entry of seq_lens", q=_zeros((3, 2, 4, 24), _BF16)),
    _case("q-last-axis-strided", ValueError, "q has a stride of 4 bytes on its last axis", q=_zeros((2, 2, 4, 48), _BF16)[..., ::2]),
    _case("q-no-heads", ValueError, "num_heads_q=0 must be a positive multiple", q=_zeros((2, 2, 0, 24), _BF16)),
    _case("q-misaligned", ValueError, "q must be aligned to its 2-byte elements",
          q=np.frombuffer(bytearray(2 * 2 * 4 * 24 * 2 + 1), np.uint8)[1:].view(_BF16).reshape(2, 2, 4, 24)),
    _case("q-strides-misaligned", ValueError, "q must be aligned to its 2-byte elements.* strides", q=_askew((2, 2, 4, 24), _BF16)),
    _case("kv-not-an-array", TypeError, "kv_cache must be an array", kv_cache="pages"),
    _case("kv-3d", ValueError, "kv_cache has 3 dimensions", kv_cache=_zeros((6, 8, 24), _BF16)),
    _case("kv-other-dtype", TypeError, "kv_cache has dtype float16, but must be bfloat16, as q",
          kv_cache=_zeros((6, 8, 1, 24), np.float16)),
    _case("kv-last-axis-strided", ValueError, "kv_cache has a stride of 4 bytes", kv_cache=_zeros((6, 8, 1, 48), _BF16)[..., ::2]),
    _case("kv-heads-do-not-divide", ValueError, "num_heads_q=4 must be a positive multiple of num_heads_kv=3",
          kv_cache=_zeros((6, 8, 3, 24), _BF16)),
    _case("kv-no-heads", ValueError, "num_heads_kv=0", kv_cache=_zeros((6, 8, 0, 24), _BF16)),
    _case("kv-page-size-0", ValueError, "page_size=0 must be at least 1", kv_cache=_zeros((6, 0, 1, 24), _BF16)),
    _case("table-none", TypeError, "block_table must be an array.* got NoneType", block_table=None),
    _case("table-int64", TypeError, "block_table has dtype int64, but must be int32", block_table=_zeros((2, 3), np.int64)),
    _case("table-1d", ValueError, r"block_table has 1 dimensions.*\(batch, max_pages\)", block_table=_zeros(6, np.int32)),
    _case("table-other-batch", ValueError, r"block_table has shape \(3, 3\).*one row per entry", block_table=_zeros((3, 3), np.int32)),
    _case("lens-int64", TypeError, "seq_lens has dtype int64, but must be int32", seq_lens=_zeros(2, np.int64)),
    _case("lens-uint32", TypeError, "seq_lens has dtype uint32", seq_lens=_zeros(2, np.uint32)),
    _case("lens-2d", ValueError, "seq_lens has 2 dimensions", seq_lens=_zeros((2, 1), np.int32)),
    _case("lens-list", TypeError, "seq_lens must be an array", seq_lens=[20, 9]),
    _case("head-dim-v-0", ValueError, "head_dim_v must be from 1", head_dim_v=0),
    _case("head-dim-v-too-large", ValueError, "head_dim_v=25 must be from 1 to head_dim_qk=24", head_dim_v=25),
    _case("head-dim-v-float", TypeError, "head_dim_v must be an integer, got 16.0", head_dim_v=16.0),
    _case("head-dim-v-bool", TypeError, "head_dim_v must be an integer, got True", head_dim_v=True),
    _case("scale-string", TypeError, "softmax_scale must be a real number or None, got '1'", softmax_scale="1"),
    _case("scale-nan", ValueError, "softmax_scale must be finite", softmax_scale=float("nan")),
    _case("scale-inf", ValueError, "softmax_scale must be finite", softmax_scale=float("inf")),
    _case("scale-negative", ValueError, "softmax_scale must be finite and not negative, got -1.0", softmax_scale=-1.0),
    _case("scale-beyond-float32", ValueError, "softmax_scale must be finite.* got 1e\\+39", softmax_scale=1e39),
    _case("scale-beyond-float64", ValueError, "softmax_scale must be finite", softmax_scale=10**400),
    _case("scale-bool", TypeError, "softmax_scale must be a real number", softmax_scale=True),
    _case("causal-int", TypeError, "causal must be True or False, got 1", causal=1),
    _case("causal-none", TypeError, "causal must be True or False, got None", causal=None),
    _case("batch-invariant-int", TypeError, "batch_invariant must be True or False", batch_invariant=0),
    _case("check-values-string", TypeError, "check_values must be True or False", check_values="yes"),
    _case("empty-lse-unknown", ValueError, r"empty_lse must be one of '\+inf', '-inf', got 'nan'", empty_lse="nan"),
    _case("empty-lse-number", TypeError, "empty_lse must be a string", empty_lse=float("inf")),
    _case("backend-unknown", ValueError, "backend must be one of 'auto'.* got 'cuda'", backend="cuda"),
    _case("backend-number", TypeError, "backend must be a string", backend=0),
    _case("backend-not-there", BackendUnavailable, "backend='hopper' cannot run this call: hopper: ", backend="hopper"),
    _case("plan-other-type", TypeError, "plan must be a Plan from plan_decode, got dict", plan={}),
    _case("out-shape", ValueError, r"out has shape \(2, 2, 4, 15\).*\(2, 2, 4, 16\)", out=_zeros((2, 2, 4, 15), _BF16)),
    _case("out-dtype", TypeError, "out has dtype float32, but must be bfloat16", out=_zeros(_OUT, np.float32)),
    _case("out-read-only", ValueError, "out is read-only", out=_read_only(_OUT, _BF16)),
    _case("out-last-axis-strided", ValueError, "out has a stride of 4 bytes", out=_zeros((2, 2, 4, 32), _BF16)[..., ::2]),
    _case("out-broadcast", ValueError, "out has strides .*elements share memory",
          out=np.lib.stride_tricks.as_strided(_zeros((1, 2, 4, 16), _BF16), _OUT, (0, 256, 32, 2))),
    _case("out-overlaps-itself", ValueError, "out has strides .*elements share memory",
          out=np.lib.stride_tricks.as_strided(_zeros(256, _BF16), _OUT, (128, 64, 30, 2))),
    _case("lse-shape", ValueError, r"lse has shape \(2, 2, 4\).*\(2, 4, 2\).*num_heads_q", lse=_zeros((2, 2, 4), np.float32)),
    _case("lse-dtype", TypeError, "lse has dtype float64, but must be float32", lse=_zeros(_LSE)),
    _case("lse-read-only", ValueError, "lse is read-only", lse=_read_only(_LSE, np.float32)),
    _case("lse-elsewhere", ValueError, "lse is in cuda:1, but q is in host memory", lse=_Elsewhere(_zeros(_LSE, np.float32))),
    _case("stream-string", TypeError, "stream must be an integer handle or a CUDA stream object, got str", stream="default"),
    _case("stream-negative", ValueError, "stream must be a handle from 0, got -1", stream=-1),
    _case("cu-seqlens-with-4d-q", ValueError, "q has 4 dimensions.* needs 3.*cu_seqlens_q", cu_seqlens_q=_zeros(3, np.int32)),
]
_RAGGED = [
    _case("q-4d", ValueError, "q has 4 dimensions.* needs 3", q=_zeros((2, 2, 4, 24), _BF16)),
    _case("offsets-length", ValueError, r"cu_seqlens_q has shape \(2,\).*\(3,\)", cu_seqlens_q=_zeros(2, np.int32)),
    _case("offsets-dtype", TypeError, "cu_seqlens_q has dtype int64", cu_seqlens_q=_zeros(3, np.int64)),
    _case("offsets-2d", ValueError, "cu_seqlens_q has 2 dimensions", cu_seqlens_q=_zeros((3, 1), np.int32)),
    _case("out-uniform-form", ValueError, r"out has shape .*\(total_q, num_heads_q, head_dim_v\)", out=_zeros(_OUT, _BF16)),
    _case("offsets-begin", ValueError, "cu_seqlens_q must run from 0 to total_q=4, got 1 to 4", check_values=True,
          cu_seqlens_q=np.array([1, 2, 4], np.int32)),
    _case("offsets-end", ValueError, "cu_seqlens_q must run from 0 to total_q=4, got 0 to 5", check_values=True,
          cu_seqlens_q=np.array([0, 2, 5], np.int32)),
    _case("offsets-fall", ValueError, r"cu_seqlens_q\[1\]=5 and cu_seqlens_q\[2\]=4", check_values=True,
          cu_seqlens_q=np.array([0, 5, 4], np.int32)),
]
_VALUES = [
    _case("length-negative", ValueError, r"seq_lens\[1\]=-1 must be from 0 to 24", seq_lens=np.array([20, -1], np.int32)),
    _case("length-over-capacity", ValueError, r"seq_lens\[0\]=25 must be from 0 to 24", seq_lens=np.array([25, 9], np.int32)),
    _case("page-past-the-cache", ValueError, r"block_table\[1, 1\]=6 must be from 0 to 5",
          block_table=np.array([[0, 1, 2], [3, 6, 5]], np.int32)),
    _case("page-negative", ValueError, r"block_table\[0, 0\]=-1 must be from 0 to 5",
          block_table=np.array([[-1, 1, 2], [3, 4, 5]], np.int32)),
]


def _raises(error, match, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    assert re.search(match, str(caught.value)), str(caught.value)


def _next_good_call_works():
    out, lse = mla_decode(**_good())
    assert np.isfinite(out.astype(np.float32)).all() and np.isfinite(lse).all()


@pytest.mark.parametrize(("error", "match", "changes"), _DECODE)
def test_decode(error, match, changes):
    _raises(error, match, mla_decode, **{**_good(), **changes})
    _next_good_call_works()


@pytest.mark.parametrize(("error", "match", "changes"), _RAGGED)
def test_ragged(error, match, changes):
    _raises(error, match, mla_decode, **{**_good_ragged(), **changes})
    _next_good_call_works()


@pytest.mark.parametrize(("error", "match", "changes"), _VALUES)
def test_values_under_check_values(error, match, changes):
    _raises(error, match, mla_decode, **{**_good(), **changes}, check_values=True)
    _next_good_call_works()


def test_values_that_are_just_right():
    """A table that is full, and garbage right behind lengths that fill their pages."""
    mla_decode(**{**_good(), "seq_lens": np.array([24, 9], np.int32)}, check_values=True)
    table = np.array([[0, 1, 99], [3, -7, 2**31 - 1]], np.int32)
    mla_decode(**{**_good(), "seq_lens": np.array([16, 8], np.int32), "block_table": table}, check_values=True)


@pytest.mark.parametrize("changes", [pytest.param(case.values[2], id=case.id) for case in _VALUES])
def test_values_without_check_values_read_zeros(changes):
    """The same bad values, unchecked: an answer of the right shape, no crash, and pages outside the cache read as zeros."""
    call = {**_good(), **changes}
    out, _ = mla_decode(**call)
    lens = np.maximum(call["seq_lens"], 0)
    table = np.pad(call["block_table"], ((0, 0), (0, 1)), constant_values=_PAGES)
    zero_page = np.where((table >= 0) & (table < _PAGES), table, _PAGES).astype(np.int32)
    padded = np.concatenate([call["kv_cache"], np.zeros((1, _PAGE, 1, _DIM), _BF16)])
    expected, _ = mla_decode(**{**call, "kv_cache": padded, "block_table": zero_page, "seq_lens": lens})
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))


def test_out_that_overlaps_an_input():
    call = _good()
    memory = np.zeros(_BATCH * _SEQ_LEN_Q * _HEADS * _DIM, _BF16)
    q = memory.reshape(call["q"].shape)
    _raises(ValueError, "out shares memory with q", mla_decode, **{**call, "q": q, "out": memory[:int(np.prod(_OUT))].reshape(_OUT)})
    _next_good_call_works()


def test_out_beside_an_input_in_one_buffer():
    """Interleaved columns of one buffer overlap as ranges, and share nothing."""
    call = _good()
    buffer = np.zeros((*call["q"].shape[:-1], _DIM + _DIM_V), _BF16)
    buffer[..., :_DIM] = call["q"]
    out, _ = mla_decode(**{**call, "q": buffer[..., :_DIM]}, out=buffer[..., _DIM:])
    np.testing.assert_array_equal(out.view(np.uint16), mla_decode(**call)[0].view(np.uint16))


@pytest.mark.parametrize("change", [dict(seq_len_q=1), dict(num_heads_q=2), dict(page_size=16), dict(head_dim_qk=32), dict(head_dim_v=8),
                                    dict(dtype="float16"), dict(causal=False), dict(batch_invariant=True),
                                    dict(seq_lens=np.array([20, 9, 1], np.int32))], ids=lambda change: next(iter(change)))
def test_plan_for_other_shapes(change):
    name = "batch" if "seq_lens" in change else next(iter(change))
    _raises(StalePlanError, f"plan was made for {name}=", mla_decode, **_good(), plan=_good_plan(**change))
    mla_decode(**_good(), plan=_good_plan())


def test_plan_for_other_lengths():
    plan = _good_plan(seq_lens=np.array([20, 8], np.int32))
    _raises(StalePlanError, "request 1 had seq_len=8 where this call has request 1 with seq_len=9", mla_decode, **_good(), plan=plan,
            check_values=True)
    mla_decode(**_good(), plan=_good_plan(), check_values=True)


_PLAN = [
    _case("lens-list", TypeError, "seq_lens must be an array", seq_lens=[1]),
    _case("lens-int64", TypeError, "seq_lens has dtype int64", seq_lens=_zeros(2, np.int64)),
    _case("lens-2d", ValueError, "seq_lens has 2 dimensions", seq_lens=_zeros((2, 2), np.int32)),
    _case("heads-0", ValueError, "num_heads_q must be from 1", num_heads_q=0),
    _case("heads-float", TypeError, "num_heads_q must be an integer", num_heads_q=4.0),
    _case("heads-kv", ValueError, "num_heads_q=4 must be a positive multiple of num_heads_kv=3", num_heads_kv=3),
    _case("seq-len-q-0", ValueError, "seq_len_q must be from 1", seq_len_q=0),
    _case("page-size-0", ValueError, "page_size must be from 1", page_size=0),
    _case("head-dims", ValueError, "head_dim_v=25 must be from 1 to head_dim_qk=24", head_dim_v=25),
    _case("dtype", ValueError, "dtype must be one of 'bfloat16'", dtype="int8"),
    _case("num-workers-0", ValueError, "num_workers must be from 1", num_workers=0),
    _case("max-seq-len-negative", ValueError, "max_seq_len must be from 0", max_seq_len=-1),
    _case("max-seq-len-float", TypeError, "max_seq_len must be an integer", max_seq_len=9.0),
    _case("lens-misaligned", ValueError, "seq_lens must be aligned", seq_lens=_askew((2, 1), np.int32)[:, 0]),
    _case("offsets-elsewhere", ValueError, "cu_seqlens_q is in cuda:1, but seq_lens is in host memory",
          cu_seqlens_q=_Elsewhere(np.array([0, 1, 4], np.int32))),
    _case("total-q", ValueError, "total_q must be from 0", cu_seqlens_q=np.array([0, 1, 2], np.int32), total_q=-1),
]


@pytest.mark.parametrize(("error", "match", "changes"), _PLAN)
def test_plan(error, match, changes):
    _raises(error, match, _good_plan, **changes)
    mla_decode(**_good(), plan=_good_plan())


def _state(shape=_OUT, lse_shape=_LSE, dtype=_BF16):
    return np.zeros(shape, dtype), np.zeros(lse_shape, np.float32)


_MERGE = [
    pytest.param(TypeError, "states must be a sequence of .* got NoneType", None, id="none"),
    pytest.param(ValueError, "states is empty", [], id="empty"),
    pytest.param(TypeError, r"states\[0\] must be a pair", [np.zeros(3)], id="not-pairs"),
    pytest.param(TypeError, r"states\[1\]\[0\] has dtype float16, but must be bfloat16", [_state(), _state(dtype=np.float16)], id="dtypes"),
    pytest.param(ValueError, r"states\[1\]\[0\] has shape", [_state(), _state((1, 2, 4, 16))], id="shapes"),
    pytest.param(ValueError, r"states\[0\]\[1\] has shape", [_state(lse_shape=(2, 2, 4))], id="lse-shape"),
    pytest.param(ValueError, r"states\[0\]\[0\] has shape \(2, 3\)", [_state((2, 3))], id="2d"),
    pytest.param(TypeError, r"states\[0\]\[1\] has dtype float64", [(np.zeros(_OUT, _BF16), np.zeros(_LSE))], id="lse-dtype"),
    pytest.param(ValueError, r"states\[0\]\[1\] is in cuda:1", [(_state()[0], _Elsewhere(_state()[1]))], id="elsewhere"),
    pytest.param(ValueError, r"states\[0\]\[0\] must be aligned", [(_askew(_OUT, _BF16), _state()[1])], id="misaligned"),
    pytest.param(ValueError, r"states\[0\]\[1\] must be aligned", [(_state()[0], _askew(_LSE, np.float32))], id="lse-misaligned"),
    pytest.param(ValueError, r"states\[0\]\[0\] has a stride of 4 bytes on its last axis",
                 [(np.zeros((*_OUT[:-1], 32), _BF16)[..., ::2], _state()[1])], id="strided"),
]


@pytest.mark.parametrize(("error", "match", "states"), _MERGE)
def test_merge_states(error, match, states):
    _raises(error, match, merge_states, states)
    out, lse = merge_states([_state(), _state()])
    assert (lse == np.float32(np.log(2))).all() and not out.astype(np.float32).any()


_REFUSED = ["indices", "attn_sink", "extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length"]


@pytest.mark.parametrize("name", _REFUSED)
def test_flash_mla_refuses_sparse_arguments(name):
    call = _good()
    metadata, _ = flash_mla.get_mla_metadata()
    arguments = (call["q"], call["kv_cache"], call["block_table"], call["seq_lens"], _DIM_V, metadata)
    _raises(ValueError, f"{name} belongs to FlashMLA's FP8 or sparse kernels", flash_mla.flash_mla_with_kvcache, *arguments,
            **{name: np.zeros(1, np.int32)})
    flash_mla.flash_mla_with_kvcache(*arguments)


def test_flash_mla_metadata():
    call = _good()
    arguments = (call["q"], call["kv_cache"], call["block_table"], call["seq_lens"], _DIM_V)
    decode = flash_mla.flash_mla_with_kvcache
    _raises(TypeError, "tile_scheduler_metadata must be a FlashMLASchedMeta", decode, *arguments, None)
    metadata, _ = flash_mla.get_mla_metadata()
    _raises(ValueError, "num_splits must be None", decode, *arguments, metadata, np.zeros(3, np.int32))
    _raises(ValueError, "is_fp8_kvcache belongs to", decode, *arguments, metadata, is_fp8_kvcache=True)
    for epoch in (metadata, None), flash_mla.get_mla_metadata(call["seq_lens"], 8, 1):
        _raises(ValueError, r"^k_cache has 3 dimensions", decode, call["q"], call["kv_cache"][0], *arguments[2:], *epoch)
        _raises(TypeError, "^cache_seqlens has dtype int64", decode, *arguments[:3], np.zeros(2, np.int64), _DIM_V, *epoch)
    decode(*arguments, metadata)
    _raises(StalePlanError, "plan was made for causal=False.* a new one with get_mla_metadata", decode, *arguments, metadata, causal=True)
    _raises(ValueError, "topk belongs to", flash_mla.get_mla_metadata, call["seq_lens"], 8, 1, 4, False, 64)


def test_errors_are_values_or_types():
    assert issubclass(BackendUnavailable, ValueError) and issubclass(StalePlanError, ValueError)
    assert issubclass(mla_numba.WrongNumbaCuda, ImportError)


def test_the_table_is_as_long_as_promised():
    assert sum(map(len, (_DECODE, _RAGGED, _VALUES, _PLAN, _MERGE, _REFUSED))) >= 60
