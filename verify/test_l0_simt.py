"""The simt backend's own parts: what its kernels compile to for GPUs that are not here, and small decodes in the CUDA simulator.

Levels: l0. The property suite (test_properties.py) covers the rest, in the simulator too.
"""

import itertools
import re
import subprocess
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

import mla_numba
from mla_numba.config import DecodeShape
from mla_numba.host import simt
from mla_numba.host.workspaces import Workspaces
from mla_numba.kernels import simt_merge
from mla_numba.kernels.simt_decode import SIMULATOR, SimtConfig, decode_signature, make_decode_kernel
from perf.sass import find_tool
from verify.cases import LAYOUTS, MLACase
from verify.checks import assert_same_results, assert_within
from verify.tolerances import merge_bounds

pytestmark = pytest.mark.l0

# Shared memory of a thread block and of an SM, by compute capability (CUDA C++ Programming Guide, technical specifications).
SMEM_LIMITS = {(7, 5): 64 * 1024, (8, 0): 163 * 1024, (9, 0): 227 * 1024, (12, 0): 99 * 1024}
SMEM_OF_SM = {(7, 5): 64 * 1024, (8, 0): 164 * 1024, (9, 0): 228 * 1024, (12, 0): 100 * 1024}
REGISTERS_PER_SM = 65536


def _shape(**changes):
    values = dict(batch=1, seq_len_q=1, total_q=1, num_heads_q=128, num_heads_kv=1, head_dim_qk=576, head_dim_v=512, page_size=64,
                  dtype="bfloat16", causal=True, batch_invariant=False)
    return DecodeShape(**{**values, **changes})


def _tool(name):
    return find_tool(name) or pytest.skip(f"{name} is not installed: it comes with the extra test")


def _compile(function, signature, cc, monkeypatch, tmp_path, **options):
    """ptxas's report and the SASS of a kernel, compiled as the host does."""
    import numba.cuda.dispatcher
    from numba import cuda

    ptxas, nvdisasm = _tool("ptxas"), _tool("nvdisasm")
    # numba-cuda asks the current device for its capability when it compiles a device function, even here.
    monkeypatch.setattr(numba.cuda.dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=cc))
    ptx, _ = cuda.compile(function, signature, device=False, abi="numba", cc=cc, output="ptx", **options)
    source, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    source.write_text(ptx)
    captured = dict(capture_output=True, text=True, check=True)
    report = subprocess.run([ptxas, f"-arch=sm_{cc[0]}{cc[1]}", "-v", source, "-o", cubin], **captured).stderr
    return report, subprocess.run([nvdisasm, "-c", cubin], **captured).stdout


@pytest.mark.skipif(SIMULATOR, reason="the simulator compiles nothing")
@pytest.mark.parametrize(("cc", "rows", "dtype"), [
    pytest.param(cc, rows, dtype, id=f"sm_{cc[0]}{cc[1]}-rows{rows}-{dtype}")
    for cc, rows, dtype in [*(((9, 0), rows, "bfloat16") for rows in (1, 8, 16, 32, 128)), ((9, 0), 16, "float16"),
                            ((9, 0), 128, "float32"), *((cc, 128, "bfloat16") for cc in ((7, 5), (8, 0), (12, 0)))]])
def test_decode_kernel_compiles_without_spills(cc, rows, dtype, monkeypatch, tmp_path):
    config = simt.choose_config(_shape(num_heads_q=rows, dtype=dtype), SMEM_LIMITS[cc])
    assert config.smem_bytes <= SMEM_LIMITS[cc]
    blocks_per_sm = config.blocks_per_sm(SMEM_OF_SM[cc])
    report, sass = _compile(make_decode_kernel(config), decode_signature(dtype), cc, monkeypatch, tmp_path, fastmath=True,
                            launch_bounds=(config.num_threads, blocks_per_sm))
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    assert registers * config.num_threads * blocks_per_sm <= REGISTERS_PER_SM
    assert not re.search(r"\b(LDL|STL)\b", sass)
    # P V of four tokens is unrolled, and Q, K and P come four floats a load.
    assert len(re.findall(r"\bFFMA\b", sass)) >= 4 * config.o_rows * config.o_columns
    assert re.search(r"\bLDS\S*\.128\b", sass)


@pytest.mark.skipif(SIMULATOR, reason="the simulator compiles nothing")
def test_merge_kernels_compile_without_spills(monkeypatch, tmp_path):
    functions = (simt_merge.make_merge_kernel("bfloat16", 512), *simt_merge.make_state_kernels("bfloat16", 512))
    signatures = (simt_merge.merge_signature("bfloat16"), *simt_merge.state_signatures("bfloat16"))
    for function, signature in zip(functions, signatures, strict=True):
        report, _ = _compile(function, signature, (9, 0), monkeypatch, tmp_path)
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report


@pytest.mark.skipif(SIMULATOR, reason="the simulator compiles nothing")
def test_numpy_that_numba_cuda_cannot_take_is_a_reason(monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.5.2")
    assert simt.unavailable.__wrapped__() == ["numba-cuda 0.30 compiles nothing with NumPy 2.5.2: pip install 'numpy<2.5'"]


@pytest.mark.skipif(SIMULATOR, reason="the simulator has its own tiles")
def test_deepseek_tile_on_hopper():
    config = simt.choose_config(_shape(), SMEM_LIMITS[9, 0])
    assert (config.block_m, config.block_n) == (64, 16)
    # What the kernel file's picture says.
    assert {name: 4 * size for name, size in config.smem_floats.items()} == {
        "q": 148_480, "k": 37_120, "s": 40_960, "max": 1_024, "scale": 256}
    assert config.smem_bytes == 227_840
    assert (config.s_dims, config.o_rows * config.o_columns, config.copy_tokens * config.copy_dims) == (72, 128, 36)


@pytest.mark.skipif(SIMULATOR, reason="the simulator has its own tiles")
def test_tile_does_not_depend_on_the_batch():
    shapes = [_shape(batch=batch, total_q=batch, num_heads_q=heads) for batch in (1, 7, 20_000) for heads in (1, 3, 16, 128, 1000)]
    tiles = {(shape.num_heads_q, simt.choose_config(shape, SMEM_LIMITS[9, 0])) for shape in shapes}
    assert len(tiles) == 5


@pytest.mark.skipif(SIMULATOR, reason="the simulator has its own tiles")
def test_every_dim_has_a_tile_or_a_reason():
    for dim_qk, dim_v in itertools.product((1, 4, 31, 64, 192, 576, 1024), (1, 5, 33, 128, 512, 1024)):
        if dim_v <= dim_qk:
            config = simt.choose_config(_shape(head_dim_qk=dim_qk, head_dim_v=dim_v), SMEM_LIMITS[7, 5])
            assert config is not None and config.row_floats % 32 == 4
            assert config.row_floats >= max(config.s_dims * config.num_warps, dim_v)
    assert simt.choose_config(_shape(head_dim_qk=16_384), SMEM_LIMITS[9, 0]) is None


@pytest.mark.skipif(SIMULATOR, reason="the simulator has its own tiles")
@pytest.mark.parametrize(("changes", "rule"), [
    (dict(block_m=48), "block_m must be a power of two"),
    (dict(block_n=12), "block_n must be a multiple of 4 and of num_warps=8"),
    (dict(num_threads=100), "num_threads must be a multiple of warp_size=32"),
    (dict(block_m=512), "block_m must be at most num_threads=256"),
], ids=lambda value: str(value))
def test_config_names_the_broken_rule(changes, rule):
    values = dict(head_dim_qk=576, head_dim_v=512, dtype="bfloat16", block_m=64, block_n=16)
    with pytest.raises(ValueError, match=rule):
        SimtConfig(**{**values, **changes})


def _plan(case, **knobs):
    inputs = case.build()
    return mla_numba.plan_decode(
        inputs.seq_lens, num_heads_q=case.num_heads_q, seq_len_q=case.seq_len_q, num_heads_kv=case.num_heads_kv, page_size=case.page_size,
        head_dim_qk=case.head_dim_qk, head_dim_v=case.head_dim_v, dtype=case.dtype, causal=case.causal, cu_seqlens_q=inputs.cu_seqlens_q,
        backend="simt", **knobs)


def _decode(case, num_workers=None, max_seq_len=None, **knobs):
    inputs = case.build()
    plan = None
    if num_workers is not None or max_seq_len is not None:
        plan = _plan(case, num_workers=num_workers, max_seq_len=max_seq_len, **knobs)
    return mla_numba.mla_decode(inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens, head_dim_v=case.head_dim_v, plan=plan,
                                causal=case.causal, cu_seqlens_q=inputs.cu_seqlens_q, backend="simt", **knobs)


def _check(case, got):
    out, lse, out_bound, lse_bound = case.build().bounds()
    assert_within("out", got[0], out, out_bound)
    assert_within("lse", got[1], lse, lse_bound)


TINY = dict(head_dim_qk=12, head_dim_v=8, page_size=4)
# A tile in the simulator is 4 rows (2 if there are no more) x 4 tokens. Every build poisons what no request sees.
CASES = {
    "tails-of-a-block": MLACase(seq_lens=(0, 1, 3, 4, 5), num_heads_q=2, **TINY),
    "two-tiles-of-rows": MLACase(seq_lens=(6, 9), num_heads_q=5, values="rising", **TINY),
    "causal": MLACase(seq_lens=(7, 2), seq_len_q=3, num_heads_q=2, values="alternating", **TINY),
    "ragged": MLACase(seq_lens=(5, 0, 9), q_lens=(2, 1, 0), num_heads_q=3, **TINY),
    "kv-heads": MLACase(seq_lens=(9, 3), num_heads_q=4, num_heads_kv=2, seq_len_q=2, causal=False, **TINY),
    "odd-pages": MLACase(seq_lens=(8, 5), num_heads_q=2, pages="shuffled", layout="padded", spare_columns=2, **{**TINY, "page_size": 3}),
    "page-of-1": MLACase(seq_lens=(6,), num_heads_q=1, pages="shuffled", layout="unaligned", **{**TINY, "page_size": 1}),
    "odd-dims": MLACase(seq_lens=(6, 2), num_heads_q=2, head_dim_qk=19, head_dim_v=13, page_size=4, layout="transposed"),
    "bfloat16": MLACase(seq_lens=(6, 11), num_heads_q=3, dtype="bfloat16", values="one_hot", **TINY),
    "float16": MLACase(seq_lens=(6, 11), num_heads_q=3, dtype="float16", values="falling", **TINY),
    "float32": MLACase(seq_lens=(6, 11), num_heads_q=3, dtype="float32", values="large", **TINY),
}


@pytest.mark.sim
class TestInSimulator:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_equals_float64(self, case):
        _check(case, _decode(case))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_arrays_that_lie_as_a_devices_may(self, layout):
        """Host arrays reach a kernel as contiguous copies; these are where they are, and nothing beside the results is touched."""
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        case = MLACase(seq_lens=(9, 3), num_heads_q=2, seq_len_q=2, dtype="float32", pages="shuffled", layout=layout, **TINY)
        inputs, plan = case.build(), _plan(case, num_workers=2)
        canvases = [np.full((4, 4, 5, 9), np.nan, np.float32), np.full((2, 6, 3), np.nan, np.float32)]
        out, lse = canvases[0][1:3, 1:3, ::3, :8], canvases[1].transpose(0, 2, 1)[:, :2, 1::3]
        arrays = map(FakeCUDAArray, (inputs.q, inputs.kv_cache, inputs.block_table, out, lse))
        simt.decode(plan.shape, plan.schedule, *arrays, case.head_dim_qk ** -0.5, np.inf, 0)
        _check(case, (out.copy(), lse.copy()))
        out[...], lse[...] = np.nan, np.nan
        assert all(np.isnan(canvas).all() for canvas in canvases)

    @pytest.mark.parametrize("num_workers", [1, 2, 5])
    def test_splits_and_merge(self, num_workers):
        case = MLACase(seq_lens=(21, 0, 4), seq_len_q=2, num_heads_q=2, values="rising", **TINY)
        got = _decode(case, num_workers=num_workers)
        _check(case, got)
        assert_same_results(_decode(case, num_workers=num_workers), got, "a rerun")

    def test_batch_invariant(self):
        case = MLACase(seq_lens=(21, 3), num_heads_q=2, values="falling", **TINY)
        got = _decode(case, batch_invariant=True)
        _check(case, got)
        first = case.build().take([0])
        alone = mla_numba.mla_decode(first.q, first.kv_cache, first.block_table, first.seq_lens, head_dim_v=case.head_dim_v, backend="simt",
                                     batch_invariant=True)
        assert_same_results(alone, (got[0][:1], got[1][:1]), "the rest of the batch")

    def test_a_plan_of_a_graph_does_not_wait_for_the_lengths(self, monkeypatch):
        """Its workspace suffices for requests of `max_seq_len`; longer ones are cut nowhere."""
        monkeypatch.setattr("mla_numba.host.schedule.is_capturing", lambda stream: True)
        case = MLACase(seq_lens=(21, 3, 17, 0, 16), num_heads_q=2, values="falling", **TINY)
        schedule = _plan(case, batch_invariant=True, max_seq_len=17).schedule
        # Pieces are of 8 tokens here, and of 17 there are 3, each of which has a place; and there is one for a rehearsal.
        assert np.diff(schedule.num_splits.copy_to_host()).tolist() == [1, 1, 3, 1, 2] and schedule.num_slots == 5 * 3 + 1
        _check(case, _decode(case, batch_invariant=True, max_seq_len=17))
        with pytest.raises(ValueError, match="batch_invariant=True in a CUDA graph needs a plan made with max_seq_len"):
            _plan(case, batch_invariant=True)

    @pytest.mark.parametrize(("seq_lens", "num_slots"), [((8, 3), 0), ((21, 3), 5), ((21, 9), 6), ((140, 3), 21), ((145, 3), 21),
                                                         ((140, 11), 21), ((155, 3), 23)])
    def test_plans_of_about_as_many_pieces_have_equal_slots(self, seq_lens, num_slots):
        """One for each piece of 8 tokens beyond a request's first one, of many some more; for the first ones; and for a rehearsal."""
        case = MLACase(seq_lens=seq_lens, num_heads_q=2, **TINY)
        assert _plan(case, batch_invariant=True).schedule.num_slots == num_slots

    @pytest.mark.parametrize("page", [-1, 2, 2147480000])
    def test_bad_page_reads_zeros(self, page):
        case = MLACase(seq_lens=(8,), num_heads_q=2, dtype="float32", spare_pages=0, **TINY)
        inputs = case.build()
        zeroed = inputs.kv_cache.copy()
        zeroed[inputs.block_table[0, 1]] = 0
        arguments = dict(head_dim_v=case.head_dim_v, backend="simt")
        want = mla_numba.mla_decode(inputs.q, zeroed, inputs.block_table, inputs.seq_lens, **arguments)
        inputs.block_table[0, 1] = page
        assert_same_results(mla_numba.mla_decode(inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens, **arguments), want,
                            "whether a page is outside the cache or zero")

    def test_length_over_capacity_reads_zeros(self):
        case = MLACase(seq_lens=(8,), num_heads_q=2, dtype="float32", **TINY)
        inputs = case.build()
        want = mla_numba.mla_decode(inputs.q, np.concatenate([inputs.kv_cache, np.zeros_like(inputs.kv_cache[:1])]),
                                    np.append(inputs.block_table, [[len(inputs.kv_cache)]], axis=1).astype(np.int32),
                                    inputs.seq_lens + 3, head_dim_v=case.head_dim_v, backend="simt")
        got = mla_numba.mla_decode(inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens + 3, head_dim_v=case.head_dim_v,
                                   backend="simt")
        assert_same_results(got, want, "whether tokens lie past the table or in a page of zeros")

    def test_a_grown_workspace_leaves_the_former_one(self, monkeypatch):
        """It may be in a captured graph."""
        monkeypatch.setattr(simt, "_workspaces", Workspaces())
        small = weakref.ref(simt._workspace(3, 8, 0, 7))
        assert simt._workspace(2, 8, 0, 7) is small()
        large = simt._workspace(5, 8, 0, 7)
        # Twice as large, lest one that grows with each step be made each time.
        assert large.size == 2 * 3 * 9 and small() is not None
        assert simt._workspace(3, 8, 0, 7) is large

    def test_merge_states(self):
        rng = np.random.default_rng(0)
        outs = rng.standard_normal((3, 2, 1, 2, 8)).astype(np.float16)
        lses = rng.standard_normal((3, 2, 2, 1)).astype(np.float32)
        lses[1, 0], lses[2, 0, 1], lses[:, 1, 0] = np.inf, -np.inf, np.inf
        states = list(zip(outs, lses, strict=True))
        out, lse = mla_numba.merge_states(states, backend="simt")
        want_out, want_lse, out_bound, lse_bound = merge_bounds(states, dtype="float16")
        assert_within("out", out, want_out, out_bound)
        assert_within("lse", lse, want_lse, lse_bound)
        assert lse[1, 0, 0] == np.inf and np.all(out[1, 0, 0] == 0)
