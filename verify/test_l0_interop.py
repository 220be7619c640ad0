"""Array interchange in host memory: what goes in comes out, of the same library, without copies of the cache."""

import contextlib
import ctypes
import subprocess
import sys
import types
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from mla_numba import api, arrays, merge_states, mla_decode, plan_decode
from mla_numba.host import context
from verify.checks import assert_within
from verify.tolerances import merge_bounds

pytestmark = pytest.mark.l0


def _inputs(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return dict(q=rng.standard_normal((2, 2, 4, 24)).astype(dtype), kv_cache=rng.standard_normal((6, 8, 1, 24)).astype(dtype),
                block_table=np.array([[5, 1, 2], [3, 4, 0]], np.int32), seq_lens=np.array([20, 9], np.int32))


_OPTIONS = dict(head_dim_v=16, backend="cpu")


def _bits(array):
    return np.asarray(array).view(np.uint8)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=lambda dtype: np.dtype(dtype).name)
def test_strided_inputs_and_given_outputs(dtype):
    """Any strides but the last axis's, negative ones too, and results written where the caller says: bitwise the contiguous answer."""
    inputs = _inputs(dtype)
    out, lse = mla_decode(**inputs, **_OPTIONS)
    assert out.dtype == dtype and out.shape == (2, 2, 4, 16) and lse.dtype == np.float32 and lse.shape == (2, 4, 2)
    strided = {name: np.repeat(array, 2, axis=0)[::2] for name, array in inputs.items()}
    strided["q"] = np.ascontiguousarray(inputs["q"].transpose(2, 1, 0, 3)).transpose(2, 1, 0, 3)
    strided["kv_cache"] = np.ascontiguousarray(inputs["kv_cache"][::-1])[::-1]
    given_out = np.empty((2, 4, 2, 20), dtype).transpose(0, 2, 1, 3)[..., :16]
    given_lse = np.empty((2, 2, 4), np.float32).transpose(0, 2, 1)
    results = mla_decode(**strided, **_OPTIONS, out=given_out, lse=given_lse)
    assert results[0] is given_out and results[1] is given_lse
    np.testing.assert_array_equal(_bits(np.ascontiguousarray(given_out)), _bits(out))
    np.testing.assert_array_equal(given_lse, lse)


def test_empty_batches():
    inputs = _inputs()
    empty = {**inputs, "q": inputs["q"][:0], "block_table": inputs["block_table"][:0], "seq_lens": inputs["seq_lens"][:0]}
    out, lse = mla_decode(**empty, **_OPTIONS)
    assert out.shape == (0, 2, 4, 16) and lse.shape == (0, 4, 2)
    no_rows = {**inputs, "q": inputs["q"][:, :0]}
    plan = plan_decode(inputs["seq_lens"], num_heads_q=4, page_size=8, head_dim_qk=24, head_dim_v=16, dtype="float32", backend="cpu",
                       cu_seqlens_q=np.zeros(3, np.int32))
    for options in ({}, dict(plan=plan, check_values=True)):
        out, lse = mla_decode(**no_rows, **_OPTIONS, **options)
        assert out.shape == (2, 0, 4, 16) and lse.shape == (2, 4, 0)


class _Library:
    """A library that is known by DLPack and the array API alone."""

    @staticmethod
    def empty(shape, *, dtype, device):
        assert device == "cpu"
        return _Array(np.full(shape, -1, dtype))


class _Array:
    def __init__(self, memory):
        self.memory, self.device = memory, "cpu"

    def __dlpack__(self, **kwargs):
        return self.memory.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.memory.__dlpack_device__()

    def __array_namespace__(self):
        return _Library


def test_dlpack_alone():
    inputs = _inputs()
    out, lse = mla_decode(**inputs, **_OPTIONS)
    wrapped = {name: _Array(array) for name, array in inputs.items()}
    plan = plan_decode(wrapped["seq_lens"], num_heads_q=4, seq_len_q=2, page_size=8, head_dim_qk=24, head_dim_v=16, dtype="float32",
                       backend="cpu")
    results = mla_decode(**wrapped, **_OPTIONS, plan=plan)
    assert [type(result) for result in results] == [_Array, _Array]
    np.testing.assert_array_equal(results[0].memory, out)
    np.testing.assert_array_equal(results[1].memory, lse)
    merged, _ = merge_states([results, results], backend="cpu")
    want, _, bound, _ = merge_bounds([(out, lse)] * 2, dtype="float32")
    assert_within("out", merged.memory, want, bound)


class _OnDevice(_Array):
    """Said to be on a GPU; it notes the stream that its library is told of."""

    def __dlpack__(self, *, stream):
        self.told = stream
        return self.memory.__dlpack__()

    def __dlpack_device__(self):
        return 2, 1


@pytest.mark.parametrize(("stream", "told"), [(None, 1), (0, 1), (2, 2), (77, 77), (types.SimpleNamespace(ptr=77), 77)])
def test_dlpack_is_told_the_stream_that_will_read(stream, told):
    array = _OnDevice(np.zeros((2, 3), np.float32))
    assert arrays.view(array, "q", stream).device == 1
    assert array.told == told


class _Nameless(_Array):
    __array_namespace__ = property()


def test_dlpack_without_an_array_namespace_needs_given_outputs():
    inputs = _inputs()
    wrapped = {name: _Nameless(array) for name, array in inputs.items()}
    with pytest.raises(TypeError, match="q is of _Nameless, which has no __array_namespace__"):
        mla_decode(**wrapped, **_OPTIONS)
    given = _Nameless(np.empty((2, 2, 4, 16), np.float32)), _Nameless(np.empty((2, 4, 2), np.float32))
    results = mla_decode(**wrapped, **_OPTIONS, out=given[0], lse=given[1])
    assert results[0] is given[0] and results[1] is given[1]
    np.testing.assert_array_equal(given[0].memory, mla_decode(**inputs, **_OPTIONS)[0])


def test_dlpack_arrays_may_begin_within_their_memory():
    """Where `byte_offset` says."""
    memory = np.arange(24, dtype=np.float32).reshape(4, 6)

    class Sliced(_Array):
        def __dlpack__(self, **kwargs):
            capsule = self.memory.__dlpack__(**kwargs)
            pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
            pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
            arrays._DLTensor.from_address(pointer_of(capsule, b"dltensor")).byte_offset = 24
            return capsule

    np.testing.assert_array_equal(arrays.view(Sliced(memory[:3]), "q").storage(), memory[1:])


def test_results_of_lazy_libraries_are_there_before_they_are_written_to():
    """JAX's, whose `empty` returns before the memory is there."""
    waited = []

    class Lazy(_Array):
        def __array_namespace__(self):
            return Lazy

        @staticmethod
        def empty(shape, *, dtype, device):
            assert device == "cpu"
            made = Lazy(np.empty(shape, dtype))
            made.block_until_ready = lambda: waited.append(made)
            return made

    results = mla_decode(**{name: Lazy(array) for name, array in _inputs().items()}, **_OPTIONS)
    assert waited == list(results)


@pytest.mark.parametrize(("kind", "waits"), [("dlpack", 1), ("torch", 0)])
def test_libraries_that_know_of_no_stream_of_ours_are_waited_for(kind, waits, monkeypatch):
    waited = []
    monkeypatch.setattr("numba.cuda.synchronize", lambda: waited.append(kind))
    memory = api._Memory("hopper", 0, describe=True)
    memory.read(arrays.ArrayView("q", kind, "float32", 4, (2,), (4,), 4096, 0, True, None))
    memory.finish()
    assert len(waited) == waits


def test_dlpack_that_refuses_names_the_argument():
    inputs = _inputs()
    inputs["block_table"].flags.writeable = False
    with pytest.raises(TypeError, match="block_table does not let its memory be seen through DLPack: "):
        mla_decode(**{name: _Array(array) for name, array in inputs.items()}, **_OPTIONS)


class _Tensor:
    """As torch's: of the meta device, or with memory at `address`."""

    __module__, dtype, layout, shape, is_cuda = "torch", "torch.float32", "strided", (2, 3), False

    def __init__(self, device="meta", address=4096, is_neg=False):
        self.device, self.address, self.is_neg = types.SimpleNamespace(type=device), address, lambda: is_neg

    def data_ptr(self):
        if self.address is None:
            raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")
        return self.address

    def element_size(self):
        return 4

    def stride(self):
        return 3, 1


@pytest.mark.parametrize(("array", "error"), [
    (type("Mine", (_Tensor,), {})(), "q is on device .* but must be on the CPU or a CUDA device"),
    (type("Size", (tuple,), {"__module__": "torch"})(), "q must be an array .* got Size"),
    (_Tensor("cpu", None), "q does not tell where its elements lie: Cannot access data pointer"),
    (_Tensor("cpu", 0), "q is of type _Tensor and has no memory of its own"),
    (_Tensor("cpu", is_neg=True), "q is a view of numbers whose signs are to be turned"),
], ids=["meta", "no tensor", "vmap", "no memory", "negated"])
def test_what_torch_has_that_is_no_array_in_memory(array, error, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(Tensor=_Tensor, strided="strided"))
    with pytest.raises(TypeError, match=error):
        arrays.view(array, "q")
    assert arrays.view(_Tensor("cpu"), "q").pointer == 4096


def test_what_has_the_cuda_interface_alone_lies_where_cuda_says(monkeypatch):
    """Which device is current does not matter."""
    array = types.SimpleNamespace(__cuda_array_interface__={"data": (4096, False)})
    current = [0]

    @contextlib.contextmanager
    def on_device(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(arrays, "device_of", {4096: 1}.__getitem__)
    monkeypatch.setattr(arrays, "on_device", on_device)
    monkeypatch.setattr("numba.cuda.as_cuda_array", lambda array: (array, current[-1]))
    monkeypatch.setattr(arrays, "_view_numba", lambda array, name: types.SimpleNamespace(pointer=4096, size=6, device=array[1]))
    assert arrays.view(array, "q").device == 1 and current == [0]


class _DeviceMemory:
    """What Numba's device arrays do in a copy to the host."""

    def __init__(self, view):
        self.host = view.storage()

    def copy_to_host(self, stream):
        assert stream == 7
        if any(step < 0 for step in self.host.strides):
            raise NotImplementedError
        return self.host.copy()


@pytest.mark.parametrize("array", [np.arange(24, dtype=np.int32).reshape(4, 6)[::-1, ::-2], np.zeros((0, 3), np.int32)[::-1],
                                   np.arange(3, dtype=np.int32)], ids=["backwards", "empty", "forwards"])
def test_values_of_device_arrays_of_any_strides_are_read_on_the_callers_stream(array, monkeypatch):
    monkeypatch.setattr(arrays, "on_device", contextlib.nullcontext)
    monkeypatch.setattr(arrays, "numba_stream", lambda stream: stream)
    monkeypatch.setattr(arrays.ArrayView, "device_storage", lambda view: _DeviceMemory(view))
    view = replace(arrays.view(array, "block_table"), device=0)
    np.testing.assert_array_equal(arrays.to_host(view, 7), array)


class _ReplacingDevice:
    """The context of a device, 2, as numba-cuda's device comes to know it: in place of a thread's current one, which it then pops."""

    def __init__(self, stack):
        self._stack = stack

    def get_primary_context(self):
        if self._stack[-1:] != [2]:
            self._stack[-1:] = [2]
            self._stack.pop()


@pytest.mark.parametrize("stack", [[], [1], [3, 1], [2], [1, 2]])
def test_a_devices_first_use_leaves_a_threads_contexts_as_they_were(stack, monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda.bindings is not installed")
    now = list(stack)
    monkeypatch.setattr(driver, "cuCtxGetCurrent", lambda: (0, now[-1] if now else 0))
    monkeypatch.setattr(driver, "cuCtxPushCurrent", lambda context: now.append(int(context)))
    device = _ReplacingDevice(now)
    numba_cuda = types.SimpleNamespace(gpus=[None, device], config=types.SimpleNamespace(ENABLE_CUDASIM=False))
    monkeypatch.setattr(context, "cuda", numba_cuda)
    assert context.device_context.__wrapped__(1) is device
    assert now == stack


class _Thread:
    """A thread's contexts, of devices, as the driver has them, and what the CUDA runtime takes for current: the driver's, if it has one.
    CuPy's memory is of the driver's, or, as seen on two H200s, of device 0 if none is current."""

    def __init__(self, *contexts):
        self.contexts, self.runtimes = list(contexts), 0
        runtime = types.SimpleNamespace(getDevice=lambda: self.contexts[-1] if self.contexts else self.runtimes)
        self.cupy = types.ModuleType("cupy")
        self.cupy.cuda = types.SimpleNamespace(runtime=runtime, Device=self._device,
                                               get_current_stream=lambda device: types.SimpleNamespace(ptr=7))
        self.cupy.empty = lambda *_: types.SimpleNamespace(on=self.contexts[-1] if self.contexts else 0,
                                                          data=types.SimpleNamespace(ptr=4096))

    def _set(self, device):
        self.runtimes, self.contexts[-1:] = device, [device]

    @contextlib.contextmanager
    def _device(self, device):
        before = self.cupy.cuda.runtime.getDevice()
        if device != before:
            self._set(device)
        yield
        self._set(before)

    @contextlib.contextmanager
    def on_device(self, device):
        self.contexts.append(device)
        yield
        assert self.contexts.pop() == device


@pytest.mark.parametrize("contexts", [(), (0,), (1,)])
def test_cupys_memory_is_of_the_device_it_is_asked_for(contexts, monkeypatch):
    """Of plans, made within `on_device`, and of results, made before it; in a thread that has used a device, or none yet."""
    thread = _Thread(*contexts)
    monkeypatch.setitem(sys.modules, "cupy", thread.cupy)
    like = arrays.ArrayView("q", "cupy", "float32", 4, (2,), (4,), 4096, 1, True, None)
    words, results = arrays.device_words(like), arrays.allocator(like, ((2,), "float32"))
    for _ in range(2):
        with thread.on_device(1):
            assert words(8, 7)[0].on == 1
        assert [array.on for array in results()] == [1]
    assert thread.contexts == list(contexts or (0,))


def test_mixed_libraries_are_refused():
    inputs = _inputs()
    with pytest.raises(TypeError, match="kv_cache is a dlpack array, but q is a numpy array"):
        mla_decode(**{**inputs, "kv_cache": _Array(inputs["kv_cache"])}, **_OPTIONS)


def test_merging_states_of_no_columns_is_refused():
    with pytest.raises(ValueError, match="head_dim_v, its last axis, must be at least 1"):
        merge_states([(np.zeros((1, 1, 2, 0), np.float32), np.zeros((1, 2, 1), np.float32))], backend="cpu")


def test_torch_cpu_tensors():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    inputs = _inputs(ml_dtypes.bfloat16)
    tensors = {name: torch.from_numpy(inputs[name]) for name in ("block_table", "seq_lens")}
    tensors |= {name: torch.from_numpy(inputs[name].view(np.int16)).view(torch.bfloat16) for name in ("q", "kv_cache")}
    out, lse = mla_decode(**tensors, **_OPTIONS)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    expected = mla_decode(**inputs, **_OPTIONS)
    np.testing.assert_array_equal(out.view(torch.int16).numpy(), expected[0].view(np.int16))
    np.testing.assert_array_equal(lse.numpy(), expected[1])


def test_neither_torch_nor_cupy_is_imported():
    """Nor, for the CPU, what looks for a CUDA driver."""
    code = ("import sys, numpy as np, mla_numba\n"
            "mla_numba.mla_decode(np.ones((1, 1, 1, 8), np.float32), np.ones((1, 4, 1, 8), np.float32), np.zeros((1, 1), np.int32),\n"
            "                     np.ones(1, np.int32), head_dim_v=4, backend='cpu')\n"
            "sys.exit(bool({'torch', 'cupy', 'reference', 'verify', 'perf', 'mla_numba.host.simt'} & set(sys.modules)))")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numba_cuda_that_is_not_numba_cudas_is_refused():
    """numba's own copy of numba.cuda is what a site folder put on PYTHONPATH gives."""
    code = ("import sys, types, numba\n"
            "fake = types.ModuleType('numba.cuda'); fake.__file__ = '/somewhere/numba/cuda/__init__.py'\n"
            "sys.modules['numba.cuda'] = fake; numba.cuda = fake\n"
            "import mla_numba")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "WrongNumbaCuda" in done.stderr and "pip install numba-cuda" in done.stderr, done.stderr
