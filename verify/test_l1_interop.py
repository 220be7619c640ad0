"""Array interchange on a GPU: results of the same library on the same device, on the caller's stream."""

import threading

import ml_dtypes
import numpy as np
import pytest
from numba import cuda

from mla_numba import arrays, flash_mla, merge_states, mla_decode, plan_decode
from mla_numba.dispatch import unavailable
from verify.cases import MLACase
from verify.checks import assert_within
from verify.libraries import LIBRARIES, to_torch
from verify.tolerances import decode_bounds, merge_bounds

pytestmark = [pytest.mark.l1, pytest.mark.skipif(not cuda.is_available(), reason="needs a GPU")]


def _inputs(seed=0):
    rng = np.random.default_rng(seed)
    return dict(q=rng.standard_normal((3, 2, 16, 576), np.float32).astype(ml_dtypes.bfloat16),
                kv_cache=rng.standard_normal((24, 64, 1, 576), np.float32).astype(ml_dtypes.bfloat16),
                block_table=rng.permutation(24).reshape(3, 8).astype(np.int32), seq_lens=np.array([500, 0, 65], np.int32))


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_in_library_out(library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    into, back = LIBRARIES[library]
    inputs = _inputs()
    arrays = {name: into(array) for name, array in inputs.items()}
    plan = plan_decode(arrays["seq_lens"], num_heads_q=16, seq_len_q=2)
    results = mla_decode(**arrays, plan=plan, check_values=True)
    assert {type(result) for result in results} == {type(arrays["q"])}
    out, lse = map(back, results)
    out_ref, lse_ref, out_bound, lse_bound = decode_bounds(**inputs, dtype="bfloat16")
    assert_within("out", out, out_ref, out_bound)
    assert_within("lse", lse, lse_ref, lse_bound)
    # The second of these calls repeats the first, with arrays at other addresses.
    for _ in range(2):
        again = mla_decode(**{name: into(array) for name, array in inputs.items()}, plan=plan)
        for result, expected in zip(map(back, again), (out, lse), strict=True):
            np.testing.assert_array_equal(result.view(np.uint8), expected.view(np.uint8))
    merged, _ = map(back, merge_states([results, results]))
    want, _, bound, _ = merge_bounds([(out, lse)] * 2, dtype="bfloat16")
    assert_within("merged out", merged, want, bound)


@pytest.mark.parametrize("backend", ["simt", "auto"])
def test_any_strides(backend):
    """Padded, transposed and reversed CuPy arrays give the bits of contiguous ones. (Only simt reads reversed caches.)"""
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    arrays = {name: cupy.asarray(array) for name, array in _inputs().items()}
    out, lse = mla_decode(**arrays, backend=backend)
    strided = {name: cupy.repeat(array[::-1], 2, axis=0)[::-2] for name, array in arrays.items()}
    strided["kv_cache"] = cupy.ascontiguousarray(strided["kv_cache"].transpose(2, 1, 0, 3)).transpose(2, 1, 0, 3)
    if backend == "simt":
        strided["kv_cache"] = cupy.ascontiguousarray(strided["kv_cache"][:, ::-1])[:, ::-1]
    given_out = cupy.empty((2, 3, 16, 520), out.dtype).transpose(1, 0, 2, 3)[..., :512]
    results = mla_decode(**strided, out=given_out, check_values=True, backend=backend)
    assert strided["q"].strides[0] < 0 and not strided["kv_cache"].flags.c_contiguous and results[0] is given_out
    assert (given_out.astype(cupy.float32) == out.astype(cupy.float32)).all() and (results[1] == lse).all()


def test_cuda_array_interface_alone():
    class Foreign:
        def __init__(self, array):
            self.array, self.__cuda_array_interface__ = array, array.__cuda_array_interface__

    into, back = LIBRARIES["numba"]
    results = mla_decode(**{name: Foreign(into(array)) for name, array in _inputs().items()}, check_values=True)
    assert all(cuda.is_cuda_array(result) for result in results)
    for got, expected in zip(results, mla_decode(**_inputs()), strict=True):
        np.testing.assert_array_equal(back(got).view(np.uint8), expected.view(np.uint8))


def test_flash_mla_as_its_readme_calls_it():
    pytest.importorskip("torch", reason="torch is not installed")
    inputs = _inputs()
    tensors = {name: to_torch(array) for name, array in inputs.items()}
    expected, _ = mla_decode(**tensors)
    arguments = (tensors["q"], tensors["kv_cache"], tensors["block_table"], tensors["seq_lens"], 512)
    for metadata in (flash_mla.get_mla_metadata(), flash_mla.get_mla_metadata(tensors["seq_lens"], 2 * 16, 1)):
        out, lse = flash_mla.flash_mla_with_kvcache(*arguments, *metadata, causal=True)
        assert out.is_cuda and lse.is_cuda and (out == expected).all()
    assert metadata[0].is_cuda and metadata[0].shape[1] == 8 and metadata[1].shape == (4,)


def test_callers_current_stream():
    """The inputs are made on the caller's stream behind a long kernel; reading them early would read garbage."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {name: to_torch(array) for name, array in _inputs().items()}
    expected, _ = mla_decode(**tensors)
    late = torch.full_like(tensors["kv_cache"], float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        late.copy_(tensors["kv_cache"])
        out, _ = mla_decode(**{**tensors, "kv_cache": late})
        torch.cuda.current_stream().synchronize()
    assert (out == expected).all()


def test_values_are_checked_on_the_callers_stream():
    """As above, with lengths that are wrong until the stream gets to them."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {name: to_torch(array) for name, array in _inputs().items()}
    late = torch.full_like(tensors["seq_lens"], -1)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        late.copy_(tensors["seq_lens"])
        mla_decode(**{**tensors, "seq_lens": late}, check_values=True)


@pytest.mark.parametrize("backend", ["simt", "auto"])
def test_per_thread_streams_run_side_by_side(backend):
    """Two threads, each on CUDA's per-thread default stream, whose handle is 2 in both: what one leaves to be merged is its own."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    # Many pieces, so that every call has partial results.
    case = MLACase(seq_lens=(3000, 0, 700), num_heads_q=128, pages="shuffled")
    inputs = case.build()
    arrays_of = [[to_torch(array) for array in (q, inputs.kv_cache, inputs.block_table, inputs.seq_lens)]
                 for q in (inputs.q, inputs.q[:, :, ::-1].copy())]
    expected = [mla_decode(*given, backend=backend) for given in arrays_of]
    results = [[], []]
    torch.cuda.synchronize()

    def run(i):
        for _ in range(40):
            results[i].append(mla_decode(*arrays_of[i], backend=backend, stream=2))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for i in range(2):
        assert len(results[i]) == 40
        for result in results[i]:
            assert all(torch.equal(got, wanted) for got, wanted in zip(result, expected[i], strict=True))


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("same_stream", [True, False])
@pytest.mark.parametrize("is_named", [False, True])
def test_graph_plans_anew_at_each_replay(planned, same_stream, is_named):
    """Plan and decode are captured together, as a server captures a step, in torch's own mode; then the lengths change."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {name: to_torch(array) for name, array in _inputs().items()}
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def step():
        # The tables are memory of the graph's, as the results are: the plan may go.
        current = torch.cuda.current_stream() if is_named else None
        plan = plan_decode(tensors["seq_lens"], num_heads_q=16, seq_len_q=2, stream=current) if planned else None
        return mla_decode(**tensors, plan=plan, stream=current)

    # Compiles, and makes the stream's workspace; torch.cuda.graph has a stream of its own else, where no call has been.
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream if same_stream else None):
        out, lse = step()
    for seq_lens in ([500, 0, 65], [1, 512, 300], [0, 0, 0]):
        tensors["seq_lens"].copy_(torch.tensor(seq_lens))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        expected_out, expected_lse = mla_decode(**tensors)
        assert (out == expected_out).all() and (lse == expected_lse).all(), seq_lens


@pytest.mark.parametrize("backend", ["simt", "auto"])
def test_cupys_graphs(backend):
    """A step in a graph of CuPy's, whose arrays tell of the stream that they are on: nobody waits for it."""
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    given = {name: cupy.asarray(array) for name, array in _inputs().items()}
    given |= dict(zip(("out", "lse"), mla_decode(**given), strict=True))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for _ in range(2):
            plan = plan_decode(given["seq_lens"], num_heads_q=16, seq_len_q=2, backend=backend)
            mla_decode(**given, plan=plan)
            stream.synchronize()
            stream.begin_capture()
            plan = plan_decode(given["seq_lens"], num_heads_q=16, seq_len_q=2, backend=backend)
            mla_decode(**given, plan=plan)
            graph = stream.end_capture()
        for seq_lens in ([500, 0, 65], [1, 512, 300]):
            given["seq_lens"][:] = cupy.array(seq_lens, cupy.int32)
            graph.launch()
            stream.synchronize()
            expected = mla_decode(**{name: given[name] for name in _inputs()}, backend=backend)
            assert (given["out"] == expected[0]).all() and (given["lse"] == expected[1]).all(), seq_lens


@pytest.mark.parametrize("shape", [(1, 2, 16, 576), (3, 2, 1, 576), (3, 1, 1, 576), (1, 1, 1, 576)], ids=str)
def test_expanded_arrays(shape):
    """Strides of 0: q's are right, the cache's are no matter of hopper's."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {name: to_torch(array) for name, array in _inputs().items()}
    q = tensors.pop("q")[:shape[0], :shape[1], :shape[2]]
    results = [mla_decode(given, **tensors) for given in (q.expand(3, 2, 16, 576), q.expand(3, 2, 16, 576).contiguous())]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    tensors["kv_cache"] = tensors["kv_cache"][:1].expand(24, -1, -1, -1)
    with pytest.raises(ValueError, match="TMA takes none"):
        mla_decode(q.expand(3, 2, 16, 576), **tensors, backend="hopper")
    tensors["q"] = q.expand(3, 2, 16, 576)
    expected = mla_decode(**{**tensors, "kv_cache": tensors["kv_cache"].contiguous()}, backend="simt")
    assert all(torch.equal(*pair) for pair in zip(mla_decode(**tensors), expected, strict=True))


def test_host_arrays_on_a_stream_that_waits_for_no_other():
    """They are there before a kernel on the stream reads them."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    inputs, stream = _inputs(), torch.cuda.Stream()
    expected = mla_decode(**inputs)
    for _ in range(20):
        plan = plan_decode(inputs["seq_lens"], num_heads_q=16, seq_len_q=2, stream=stream, backend="auto")
        for result, wanted in zip(mla_decode(**inputs, stream=stream, plan=plan), expected, strict=True):
            np.testing.assert_array_equal(result.view(np.uint8), wanted.view(np.uint8))


def test_graph_plans_a_batch_invariant_step_anew():
    """As eager calls cut it, up to the longest request that the plan was told of; a longer one is attended all the same."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng, max_seq_len, max_pages = np.random.default_rng(0), 3000, 80
    q, cache = (to_torch(rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16))
                for shape in ((3, 1, 128, 576), (3 * max_pages, 64, 1, 576)))
    tensors = dict(q=q, kv_cache=cache, block_table=to_torch(rng.permutation(3 * max_pages).reshape(3, max_pages).astype(np.int32)),
                   seq_lens=to_torch(np.array([3000, 0, 1024], np.int32)), batch_invariant=True)

    def step():
        plan = plan_decode(tensors["seq_lens"], num_heads_q=128, batch_invariant=True, max_seq_len=max_seq_len)
        return mla_decode(**tensors, plan=plan)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(ValueError, match="needs a plan made with max_seq_len"):
            mla_decode(**tensors)
        captured = step()
    for seq_lens in ([3000, 0, 1024], [1025, 2999, 64], [3000, 3000, 3000], [5120, 5, 2000], [0, 4000, 5120], [7, 0, 2048]):
        tensors["seq_lens"].copy_(torch.tensor(seq_lens))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        for result, expected in zip(captured, mla_decode(**tensors), strict=True):
            for request, seq_len in enumerate(seq_lens):
                if seq_len <= max_seq_len:
                    assert (result[request] == expected[request]).all(), (seq_lens, request)
                else:
                    # 2^-8 is bfloat16's rounding, for values below 1.
                    torch.testing.assert_close(result[request], expected[request], rtol=2 ** -7, atol=2 ** -9)


def test_torch_tensors_are_told_at_once():
    torch = pytest.importorskip("torch")

    def tensors(**changes):
        made = dict(q=torch.empty((3, 2, 16, 576), dtype=torch.bfloat16, device="cuda"),
                    lens=torch.empty(8, dtype=torch.int32, device="cuda")[1:4])
        return list({**made, **changes}.values())

    recognise = arrays.recogniser(tensors())
    # torch may take it away or change it: calls are told by their fingerprints then, and are right all the same (`arrays.recogniser`).
    if recognise is None:
        pytest.skip(f"torch {torch.__version__} has no such way, or another one")
    alike = tensors()
    assert recognise(alike) == [tensor.data_ptr() for tensor in alike] == arrays.fingerprint(alike)[1]
    with torch.no_grad():
        assert recognise(alike) is not None
    shape, options = (3, 2, 16, 576), dict(dtype=torch.bfloat16, device="cuda")
    for other in (torch.empty((3, 2, 32, 576), **options), torch.empty((3, 16, 2, 576), **options).transpose(1, 2), None, 3,
                  torch.empty(shape, dtype=torch.float16, device="cuda"), torch.empty(shape, dtype=torch.bfloat16),
                  torch.nn.Parameter(torch.empty(shape, **options)), torch.empty((3, 4, 16, 576), **options)[:, :2], np.zeros(shape)):
        assert recognise(tensors(q=other)) is None
    # Aligned otherwise.
    assert recognise(tensors(lens=torch.empty(8, dtype=torch.int32, device="cuda")[:3])) is None


# The rest of this file runs on any GPU; this is about hopper's two launches, and its merge alone leaves counters to a later call.
@pytest.mark.skipif(bool(unavailable("hopper")), reason="; ".join(unavailable("hopper")))
def test_a_call_after_one_that_ended_between_its_launches(monkeypatch):
    """As by Ctrl-C: the decode has counted its parts up, and no merge takes them back."""
    from mla_numba.host.gpu import Gpu

    to_device, to_host = LIBRARIES["numba"]
    arrays = {name: to_device(array) for name, array in _inputs().items()}
    plan = plan_decode(arrays["seq_lens"], num_heads_q=16, seq_len_q=2, backend="hopper")
    right = [to_host(result) for result in mla_decode(**arrays, plan=plan)]
    launch_bound = Gpu.launch_bound

    def without_merge(gpu, stream, decode, _merge):
        launch_bound(gpu, stream, decode)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Gpu, "launch_bound", without_merge)
        with pytest.raises(KeyboardInterrupt):
            mla_decode(**arrays, plan=plan)
    for _ in range(2):
        for result, expected in zip(mla_decode(**arrays, plan=plan), right, strict=True):
            np.testing.assert_array_equal(to_host(result), expected)
