"""Calls that repeat an earlier one with other arrays: quick, and the same launches and errors as if it were the first.

The arrays say that they are on a GPU; the driver writes down what it is to launch. Level: l0.
"""

import ctypes
import gc
import inspect
import struct
import sys
import threading
import types
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from numba import cuda

pytestmark = pytest.mark.l0
if cuda.config.ENABLE_CUDASIM:
    pytest.skip("the simulator has no hopper backend", allow_module_level=True)

# After the skip: the simulator lacks what they import.
from mla_numba import (  # noqa: E402
    BackendUnavailable,
    Plan,
    StalePlanError,
    api,
    arrays,
    flash_mla,
    mla_decode,
    plan_decode,
    validate,
)
from mla_numba.config import DecodeShape  # noqa: E402
from mla_numba.host import capture, gpu, hopper, hopper_cut, launch  # noqa: E402
from mla_numba.host.schedule import Schedule, rounded_up  # noqa: E402
from mla_numba.host.workspaces import Workspaces  # noqa: E402
from mla_numba.kernels import hopper_config, hopper_decode, hopper_merge  # noqa: E402
from mla_numba.scheduler import JOB_COLUMNS, num_partial_slots  # noqa: E402

_BF16 = ml_dtypes.bfloat16
_BATCH, _HEADS, _PAGES = 2, 16, 4
_MB = 2**20


class _CupyArray:
    """As CuPy's: memory at an address that nobody reads."""

    def __init__(self, address, shape, dtype=_BF16, strides=None, device=0):
        self.shape, self.dtype, self.itemsize = shape, np.dtype(dtype), np.dtype(dtype).itemsize
        self.c_strides = np.empty(shape, np.dtype([("", self.dtype)])).strides
        self.strides = strides or self.c_strides
        self.data, self.device = SimpleNamespace(ptr=address, device_id=device), SimpleNamespace(id=device)


class _TorchTensor:
    """As torch's."""

    layout = "strided"

    def __init__(self, address, shape, dtype=_BF16, strides=None, device=0):
        self._array = _CupyArray(address, shape, dtype, strides, device)
        self.shape, self.dtype, self.is_cuda = shape, f"torch.{np.dtype(dtype).name}", device >= 0
        self.device = SimpleNamespace(type="cuda" if self.is_cuda else "cpu", index=device)

    def data_ptr(self):
        return self._array.data.ptr

    def is_contiguous(self):
        return self._array.strides == self._array.c_strides

    def stride(self):
        return tuple(step // self._array.itemsize for step in self._array.strides)

    def is_neg(self):
        return False

    def element_size(self):
        return self._array.itemsize


class _NumbaArray:
    """As Numba's: bfloat16 is uint16."""

    def __init__(self, address, shape, dtype=_BF16, strides=None, device=0):
        self._array = _CupyArray(address, shape, np.uint16 if dtype == _BF16 else dtype, strides, device)
        self.shape, self.dtype, self.strides = shape, self._array.dtype, self._array.strides
        self.gpu_data = SimpleNamespace(device_pointer_value=address, context=SimpleNamespace(device=self._array.device))
        self.__cuda_array_interface__ = {"data": (address, False)}


_CupyArray.__module__, _TorchTensor.__module__, _NumbaArray.__module__ = "cupy", "torch", "numba.cuda"


class _TensorGuards:
    """As torch's: tensors made in another mode of torch than the present one are not told."""

    mode = "train"

    def __init__(self, *tensors, dynamic_dims_sizes, dynamic_dims_strides):
        self._facts = [(type(tensor), self.mode, tensor.dtype, tensor.device.index, tuple(shape), tuple(strides))
                       for tensor, shape, strides in zip(tensors, dynamic_dims_sizes, dynamic_dims_strides, strict=True)]

    def check(self, *tensors):
        if not all(isinstance(tensor, _TorchTensor) for tensor in tensors):
            return False
        return self._facts == [(type(tensor), self.mode, tensor.dtype, tensor.device.index, tensor.shape, tensor.stride())
                               for tensor in tensors]


class _Library:
    """A module `torch` or `cupy` whose arrays are new, one behind the other, and which has a current stream; or Numba's arrays."""

    def __init__(self, name, guards=None):
        self.name, self.array = name, {"torch": _TorchTensor, "cupy": _CupyArray, "numba": _NumbaArray}[name]
        self.next, self.stream = 2**32, 0
        self.module = types.ModuleType(name)
        self.module.Tensor = self.module.ndarray = self.array
        self.module.strided = "strided"
        self.module.empty_strided = lambda shape, strides, *, dtype, device: self.new(shape, dtype, strides)
        self.module.empty = lambda shape, dtype, device=None: self.new(shape if isinstance(shape, tuple) else (shape,), dtype)
        for dtype in ("bfloat16", "float32", "int32"):
            setattr(self.module, dtype, dtype)
        self.module._C = SimpleNamespace(_cuda_getCurrentRawStream=lambda device: self.stream)
        if guards is not None:
            self.module._C._dynamo = SimpleNamespace(guards=SimpleNamespace(TensorGuards=guards))
        self.module.cuda = SimpleNamespace(Device=lambda device: nullcontext(), runtime=SimpleNamespace(getDevice=lambda: 0),
                                           get_current_stream=lambda device: SimpleNamespace(ptr=self.stream))

    def new(self, shape, dtype, strides=None):
        self.next += _MB
        return self.array(self.next, shape, dtype, strides and tuple(step * np.dtype(dtype).itemsize for step in strides))

    def inputs(self, base=_MB, **changes):
        arrays = dict(q=self.array(base, (_BATCH, 1, _HEADS, 576)), kv_cache=self.array(base + _MB, (_PAGES, 64, 1, 576)),
                      block_table=self.array(base + 2 * _MB, (_BATCH, 3), np.int32),
                      seq_lens=self.array(base + 3 * _MB, (_BATCH,), np.int32))
        return {**arrays, **changes}


class _Driver:
    """cuda.bindings.driver, but for what it takes a GPU to do; `current` is the thread's context."""

    def __init__(self, real):
        self._real, self.current, self.launches = real, 1, []
        self._before: list[int] = []
        self.mode = real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
        self.cuThreadExchangeStreamCaptureMode = self._exchange
        self.cuCtxPushCurrent, self.cuCtxPopCurrent = self._push, self._pop
        self.cuStreamCreate = lambda flags: (0, real.CUstream(2**20))
        self.status = real.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        self.cuStreamIsCapturing = lambda stream: (0, self.status)
        self.cuStreamSynchronize = self.cuStreamDestroy = self.cuMemsetD32Async = lambda *arguments: (0,)
        self.cuLaunchKernelEx = lambda config, function, _, extra: (self._launch(config, function, extra),)

    def __getattr__(self, name):
        return getattr(self._real, name)

    def _exchange(self, mode):
        before, self.mode = self.mode, mode
        return 0, before

    def _push(self, context):
        self._before.append(self.current)
        self.current = int(context)
        return (0,)

    def _pop(self):
        popped, self.current = self.current, self._before.pop()
        return 0, popped

    def _launch(self, config, spec, extra):
        _, buffer, _, size, end = (ctypes.c_uint64 * 5).from_address(extra)
        assert end == 0
        packed = ctypes.string_at(buffer, ctypes.c_uint64.from_address(size).value)
        words = struct.unpack("@" + "".join(launch.formats(spec.types())), packed)
        grid = config.gridDimX, config.gridDimY, config.gridDimZ
        self.launches.append((spec.name, self.current, int(config.hStream), grid, words))
        return 0


class _Machine:
    """Numba's device, which `with` makes current."""

    MULTIPROCESSOR_COUNT = 132

    def __init__(self, driver):
        self._driver = driver

    def __enter__(self):
        self._driver.cuCtxPushCurrent(1)

    def __exit__(self, *_):
        self._driver.cuCtxPopCurrent()


class _Run:
    """`mla_decode` with a driver that writes down launches; `validated` counts the calls that went the long way."""

    def __init__(self, library, monkeypatch, guards=None):
        self.library = _Library(library, guards)
        self.driver = _Driver(gpu.driver)
        if library == "numba":
            monkeypatch.setattr("numba.cuda.device_array", self.library.new)
        else:
            monkeypatch.setitem(sys.modules, library, self.library.module)
        monkeypatch.setattr(gpu, "driver", self.driver)
        monkeypatch.setattr(capture, "bindings", lambda: self.driver)
        memory = iter(range(2**40, 2**50, 2**34))
        # The capture mode in which memory was asked for, and kernels were.
        self.modes: list[object] = []

        def device_array(size, _dtype):
            self.modes.append(self.driver.mode)
            return SimpleNamespace(size=size, __cuda_array_interface__={"data": (next(memory), False)})

        def load_kernels(specs, _device_idx):
            self.modes.append(self.driver.mode)
            return specs

        monkeypatch.setattr(gpu, "cuda", SimpleNamespace(device_array=device_array))
        monkeypatch.setattr(gpu, "device_context", lambda _device_idx: _Machine(self.driver))
        monkeypatch.setattr(gpu, "current_context", lambda: self.driver.current)
        monkeypatch.setattr(hopper_cut, "cuda", SimpleNamespace(get_current_device=lambda: _Machine))
        monkeypatch.setattr(gpu, "load_kernels", load_kernels)
        self.encoded: list[tuple] = []
        monkeypatch.setattr(gpu, "encode", lambda *key: self.encoded.append(key) or hash(key).to_bytes(128, "little", signed=True))
        device = gpu.Gpu(0)
        self.copies = []
        monkeypatch.setattr(device, "copy", lambda *arguments: self.copies.append(arguments))
        monkeypatch.setattr(gpu, "gpu", lambda device_idx: device)
        monkeypatch.setattr(hopper, "unavailable", lambda device: [])
        for module in (api, arrays):
            monkeypatch.setattr(module, "on_device", lambda device_idx: nullcontext())
        self.validated, decode_shape = 0, validate.decode_shape

        def counting(*arguments):
            self.validated += 1
            return decode_shape(*arguments)

        monkeypatch.setattr(validate, "decode_shape", counting)
        self.plan = self.make_plan()
        api._prepared_calls.cache_clear()
        monkeypatch.setattr(arrays, "_tensor_guards", cache(arrays._tensor_guards.__wrapped__))

    def make_plan(self, base=2**30):
        shape = DecodeShape(_BATCH, 1, _BATCH, _HEADS, 1, 576, 512, 64, "bfloat16", causal=True, batch_invariant=False)
        addresses = {name: base + i * 4096 for i, name in enumerate(("jobs", "workers", "starts", "merges", "totals"))}
        places = {"jobs": (0, (_BATCH, JOB_COLUMNS))}
        return Plan("hopper", shape, 0, Schedule(hopper_cut.schedule_config(shape, 132), None, places, addresses, extra_splits=4), 0)

    def __call__(self, arrays=None, plan=None, planned=True, **options):
        """(results, launches, copies) of a call."""
        self.driver.launches, self.copies[:] = [], []
        results = mla_decode(**(arrays or self.library.inputs()), plan=plan or (self.plan if planned else None), **options)
        return results, self.driver.launches, list(self.copies)

    def as_the_first(self, *arguments, **options):
        """(launches, copies) of a call that finds nothing prepared, and leaves nothing behind."""
        plan = options.pop("plan", None) or self.make_plan()
        plan.__dict__["_prepared"] = []
        begin = self.library.next
        _, *launched = self(*arguments, plan=plan, **options)
        self.library.next = begin
        return launched


@pytest.fixture(params=["torch", "torch-guards", "cupy", "numba"])
def run(request, monkeypatch):
    library, _, guards = request.param.partition("-")
    return _Run(library, monkeypatch, _TensorGuards if guards else None)


_VARIANTS = {
    "same": lambda library: (library.inputs(), {}),
    "other-addresses": lambda library: (library.inputs(base=64 * _MB), {}),
    "q-to-be-copied": lambda library: (library.inputs(q=library.array(_MB + 8, (_BATCH, 1, _HEADS, 576))), {}),
    "other-strides": lambda library: (library.inputs(q=library.array(_MB, (_BATCH, 1, _HEADS, 576), strides=(20480, 20480, 1280, 2))), {}),
    "results-given": lambda library: (library.inputs(), dict(out=library.new((_BATCH, 1, _HEADS, 512), _BF16),
                                                             lse=library.new((_BATCH, _HEADS, 1), np.float32))),
    "out-to-be-copied": lambda library: (library.inputs(), dict(out=library.array(99 * _MB + 8, (_BATCH, 1, _HEADS, 512)))),
    "softmax_scale": lambda library: (library.inputs(), dict(softmax_scale=0.5)),
    "empty_lse": lambda library: (library.inputs(), dict(empty_lse="-inf")),
    "stream": lambda library: (library.inputs(), dict(stream=7)),
}


@pytest.mark.parametrize("variant", _VARIANTS)
def test_a_repeated_call_launches_what_a_first_one_does(run, variant):
    run()
    arrays, options = _VARIANTS[variant](run.library)
    expected = run.as_the_first(arrays, **options)
    run(arrays, **options)
    # New results come to lie where the first call's did.
    run.library.next -= _MB * (2 - len({"out", "lse"} & options.keys()))
    validated = run.validated
    results, *launched = run(arrays, **options)
    assert run.validated == validated, "it went the long way"
    assert launched == expected and [len(part) for part in launched] == [2, variant.endswith("to-be-copied")]
    assert [type(result) for result in results] == [run.library.array] * 2
    assert results[0].shape == (_BATCH, 1, _HEADS, 512) and results[1].shape == (_BATCH, _HEADS, 1)
    assert all(result is options[name] for name, result in zip(("out", "lse"), results, strict=True) if name in options)


# Of a call in a sequence: where its inputs lie, how q does, whether results are given, which plan, what else is said.
_CALLS = st.fixed_dictionaries({
    "base": st.sampled_from([_MB, 64 * _MB, 256 * _MB]), "q": st.sampled_from(["packed", "strided", "misaligned", "padded heads"]),
    "given": st.sampled_from(["", "out", "lse", "out lse", "out misaligned"]), "plan": st.sampled_from([2**30, 2**31]),
    "said": st.fixed_dictionaries({}, optional={"softmax_scale": st.sampled_from([0.5, 1.0]), "empty_lse": st.just("-inf"),
                                                "stream": st.sampled_from([7, 2])})})


def _address(array):
    return arrays.view(array, "an array").pointer


def _arguments(launched, kernel):
    """By name; the kernel is known by its function."""
    return dict(zip(inspect.signature(kernel).parameters, launched[4], strict=True))


def _assert_says_where_arrays_are(run, given, results, plan, launches, copies):
    """The launches' arguments, against the arrays themselves."""
    decode = _arguments(launches[0], hopper_decode.make_decode_kernel(hopper_config.HopperConfig("bfloat16", 64, 1, 16)))
    merge = _arguments(launches[1], hopper_merge.make_merge_kernel("bfloat16", 16))
    map_at = {hash(key).to_bytes(128, "little", signed=True): key[1] for key in run.encoded}
    copied_to = {copy[1].address: copy[0].address for copy in copies}
    q, kv_cache, block_table = (_address(given[name]) for name in ("q", "kv_cache", "block_table"))
    assert map_at[decode["_q_map"]] == copied_to.get(q, q)
    assert [map_at[decode["_left_map"]], map_at[decode["_right_map"]], decode["kv_cache"]] == 3 * [kv_cache]
    assert decode["block_table"] == block_table
    out, lse = map(_address, results)
    for arguments, tables in ((decode, ("jobs", "workers", "starts")), (merge, ("merges", "totals"))):
        assert copied_to.get(arguments["out"], arguments["out"]) == out
        assert arguments["lse"] == lse
        assert [arguments[name] for name in tables] == [plan.schedule.addresses[name] for name in tables]
        assert [arguments[name] for name in ("o_partial", "state_partial", "counters", "out")] == [
            decode[name] for name in ("o_partial", "state_partial", "counters", "out")]


@pytest.mark.parametrize("library", ["torch", "torch-guards", "cupy", "numba"])
@hypothesis.given(calls=st.lists(_CALLS, min_size=2, max_size=8))
def test_calls_in_any_order_launch_what_first_ones_do(library, calls):
    """Nothing that a call leaves behind shows in a later one."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        name, _, guards = library.partition("-")
        run = _Run(name, monkeypatch, _TensorGuards if guards else None)
        lib = run.library
        for call in calls:
            base, wanted = call["base"], call["given"]
            shape, strides = (_BATCH, 1, _HEADS, 576), {"strided": (20480, 20480, 1280, 2), "padded heads": (24576, 24576, 1152, 2)}
            q = lib.array(base + 8 * (call["q"] == "misaligned"), shape, strides=strides.get(call["q"]))
            options = dict(call["said"])
            if "out" in wanted:
                options["out"] = lib.array(base + 99 * _MB + 8 * ("misaligned" in wanted), (_BATCH, 1, _HEADS, 512))
            if "lse" in wanted:
                options["lse"] = lib.array(base + 98 * _MB, (_BATCH, _HEADS, 1), np.float32)
            plan, given = run.make_plan(call["plan"]), lib.inputs(base, q=q)
            expected = run.as_the_first(given, plan=run.make_plan(call["plan"]), **options)
            results, *launched = run(given, plan=plan, **options)
            assert launched == expected
            _assert_says_where_arrays_are(run, given, results, plan, *launched)


def test_layers_and_steps_of_one_shape_share_what_is_prepared(run):
    run()
    later = run.make_plan(base=2**31)
    expected = run.as_the_first(run.library.inputs(base=64 * _MB), plan=run.make_plan(base=2**31))
    validated = run.validated
    _, *launched = run(run.library.inputs(base=64 * _MB), plan=later)
    assert run.validated == validated and launched == expected


@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
def test_a_call_without_a_plan_is_repeated_too(run, ragged):
    """Three launches, the first of which fills the tables that the others read; their memory is of the caller's library."""
    def inputs(base):
        offsets = {"cu_seqlens_q": run.library.array(base + 8 * _MB, (_BATCH + 1,), np.int32)} if ragged else {}
        q = {"q": run.library.array(base, (5, _HEADS, 576))} if ragged else {}
        return run.library.inputs(base, **q, **offsets)

    run(inputs(_MB), planned=False)
    validated, begin = run.validated, run.library.next
    _, launches, _ = run(inputs(64 * _MB), planned=False)
    assert run.validated == validated, "it went the long way"
    assert [launch[0].partition("-")[0] for launch in launches] == ["schedule", "hopper_decode", "hopper_merge"]
    plan, decode, merge = (launch[4] for launch in launches)
    # Arrays: two owners, size, bytes of an element, address, shape, strides. Addresses of the lengths, of the offsets, of `jobs`.
    assert (plan[4], plan[11]) == (67 * _MB, (72 if ragged else 67) * _MB) and begin < plan[31] <= run.library.next
    assert decode[0] == plan[31] and merge[1] - merge[0] > 0
    api._prepared_calls().clear()
    run.library.next = begin
    assert run(inputs(64 * _MB), planned=False)[1] == launches


def test_tables_for_a_named_stream_are_not_the_librarys(run, monkeypatch):
    """It would give them to the next who asks on the current stream, while the named one still reads them. If that is the current one, they
    are; if it is being captured, they stay, and are made beside the capture."""
    made, results = [], dict(out=run.library.new((_BATCH, 1, _HEADS, 512), _BF16), lse=run.library.new((_BATCH, _HEADS, 1), np.float32))
    monkeypatch.setattr("numba.cuda.device_array", lambda count, dtype: made.append(run.driver.mode) or SimpleNamespace(
        __cuda_array_interface__={"data": (2**45, False)}))
    monkeypatch.setattr(arrays, "_words_of_graphs", [])
    for repeats in (0, 1):
        _, launches, _ = run(planned=False, stream=7, **results)
        assert launches[0][2] == 7 and len(made) == repeats + 1 and run.validated == 1
    run.library.stream = 7
    run(planned=False, stream=7, **results)
    assert len(made) == (3 if run.library.name == "numba" else 2) and not arrays._words_of_graphs
    run.driver.status = run.driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
    run(planned=False, stream=8, **results)
    assert set(made) == {run.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED} and len(arrays._words_of_graphs) == 1


def test_more_pieces_need_another_workspace(run):
    """Though nothing else differs."""
    run()
    plan = replace(run.plan, schedule=replace(run.plan.schedule, extra_splits=4000))
    assert run(plan=plan)[1][0][4][3:6] == run.as_the_first(plan=replace(plan))[0][0][4][3:6] != run()[1][0][4][3:6]


def test_batch_invariant_calls_without_a_plan_are_prepared_each_time(run, monkeypatch):
    """How many pieces there are is read back, and may be another number."""
    monkeypatch.setattr(Schedule, "totals", SimpleNamespace(copy_to_host=lambda stream: [1, 1, 0]))
    for calls in (1, 2, 3):
        run(planned=False, batch_invariant=True)
        assert run.validated == calls


def test_a_plan_of_host_lengths_is_of_the_gpu_that_was_current(run):
    plan = replace(run.plan, gpu=1)
    with pytest.raises(StalePlanError, match="plan was made for gpu=1, but this call has gpu=0"):
        run(plan=plan)


def test_tensor_maps_are_made_once_whoever_prepares_the_call(run):
    run()
    assert len(run.encoded) == 3
    run.as_the_first(run.library.inputs())
    assert len(run.encoded) == 3
    run.as_the_first(run.library.inputs(base=64 * _MB))
    assert len(run.encoded) == 6


def test_kernels_are_bound_once_whoever_prepares_the_call(run):
    run()
    expected = run.as_the_first(run.library.inputs(base=64 * _MB), plan=run.make_plan(base=2**31), stream=7)
    assert gpu.gpu(0).bind.cache_info().misses == 2
    gpu.gpu(0).bind.cache_clear()
    assert run.as_the_first(run.library.inputs(base=64 * _MB), plan=run.make_plan(base=2**31), stream=7) == expected
    run.as_the_first(softmax_scale=0.5)
    assert gpu.gpu(0).bind.cache_info().misses == 3


def test_memory_and_kernels_are_made_beside_what_is_captured(run):
    run()
    modes = run.driver.CUstreamCaptureMode
    # Decode and merge, partial results, counters.
    assert run.modes == 4 * [modes.CU_STREAM_CAPTURE_MODE_RELAXED]
    assert run.driver.mode == modes.CU_STREAM_CAPTURE_MODE_GLOBAL


def test_a_batch_invariant_plan_of_a_graph_waits_for_no_length(run):
    """Its workspace has room for requests of `max_seq_len`, and its kernel is told to cut none that is longer."""
    run.driver.status = run.driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
    lens, said = run.library.inputs()["seq_lens"], dict(num_heads_q=_HEADS, batch_invariant=True, backend="hopper")
    with pytest.raises(ValueError, match="needs a plan made with max_seq_len"):
        plan_decode(lens, **said)
    schedule = plan_decode(lens, max_seq_len=2100, **said).schedule
    # 33 blocks are three pieces of 16.
    assert (schedule.extra_splits, schedule.num_slots) == (_BATCH * 2, _BATCH * 3 + 1)
    (name, _, _, _, words), = run.driver.launches
    # Behind two arrays of lengths, seven words each, and eight numbers.
    assert name == "schedule" and words[22:24] == (16, 33)


def test_the_current_stream_is_asked_for_each_time(run):
    run()
    for stream in (0, 5, 9, 5):
        run.library.stream = stream
        _, launches, _ = run()
        # Numba has no current stream.
        assert {launch[2] for launch in launches} == {0 if run.library.name == "numba" else stream}
    assert run.validated == 1


def test_torch_tensors_are_told_at_once_and_in_another_mode_from_the_second_call_on(monkeypatch):
    run, asked = _Run("torch", monkeypatch, _TensorGuards), []
    monkeypatch.setattr(api, "fingerprint", lambda given: asked.append(len(given)) or arrays.fingerprint(given))
    run()
    expected, asked[:] = run(run.library.inputs(base=64 * _MB))[1], []
    run.library.next -= 2 * _MB
    assert run(run.library.inputs(base=64 * _MB))[1] == expected and not asked
    monkeypatch.setattr(_TensorGuards, "mode", "inference")
    for _ in range(3):
        run()
    assert asked == [4] and run.validated == 1


@pytest.mark.parametrize("lie", [True, False])
def test_guards_that_do_not_tell_tensors_apart_are_not_used(monkeypatch, lie):
    class Guards(_TensorGuards):
        def check(self, *_tensors):
            return lie

    run = _Run("torch", monkeypatch, Guards)
    assert arrays._tensor_guards() is None
    run()
    with pytest.raises(StalePlanError):
        run(run.library.inputs(q=run.library.array(_MB, (_BATCH, 1, 2 * _HEADS, 576))))
    run()
    assert run.validated == 2


def test_torch_makes_results_the_quick_way_where_their_device_is_current(monkeypatch):
    run, made, current = _Run("torch", monkeypatch), [], 0

    def quick(shape, strides, dtype):
        made.append((shape, strides, dtype))
        return run.library.new(shape, dtype)

    run.library.module._C._dynamo = SimpleNamespace(guards=SimpleNamespace(_empty_strided_cuda=quick))
    run.library.module._C._cuda_getDevice = lambda: current
    run()
    made.clear()
    run()
    assert made == [((_BATCH, 1, _HEADS, 512), (_HEADS * 512, _HEADS * 512, 512, 1), "bfloat16"),
                    ((_BATCH, _HEADS, 1), (_HEADS, 1, 1), "float32")]
    current = 1
    results, _, _ = run()
    assert len(made) == 2 and [result.shape for result in results] == [(_BATCH, 1, _HEADS, 512), (_BATCH, _HEADS, 1)]


def test_torch_makes_results_in_host_memory_without_cuda(monkeypatch):
    """Which a torch that was built for CUDA has not on a machine without a GPU: to ask for its device raises."""
    library = _Library("torch")
    monkeypatch.setitem(sys.modules, "torch", library.module)
    library.module._C._dynamo = SimpleNamespace(guards=SimpleNamespace(_empty_strided_cuda=None))
    library.module._C._cuda_getDevice = None
    like = arrays.view(library.array(_MB, (2, 3), device=-1), "q")
    (made,) = arrays.allocator(like, ((4, 5), "float32"))()
    assert made.shape == (4, 5)


def test_counters_are_cleared_after_a_call_that_ended_between_its_launches(run):
    run()
    first_launch, results = run.driver.cuLaunchKernelEx, iter([0, KeyboardInterrupt])
    cleared = []

    def launch(*arguments):
        if next(results) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return first_launch(*arguments)

    run.driver.cuLaunchKernelEx = launch
    run.driver.cuMemsetD32Async = lambda *arguments: cleared.append((len(run.driver.launches), *arguments)) or (0,)
    with pytest.raises(KeyboardInterrupt):
        run()
    run.driver.cuLaunchKernelEx = first_launch
    for _ in range(2):
        run.driver.launches.clear()
        _, launches, _ = run()
        assert len(launches) == 2
    # Once, before the launches; where the merge has its counters, and all of them.
    ((num_launched, address, value, num_words, stream),) = cleared
    counters = launches[1][4][4]
    assert (num_launched, address, value, int(stream)) == (0, counters, 0, 0) and num_words >= 2 * _BATCH


def test_the_device_is_current_at_each_launch(run):
    run()
    run.driver.current = 99
    _, launches, _ = run()
    assert {launch[1] for launch in launches} == {1} and run.driver.current == 99


_BAD = {
    "kv_cache-misaligned": (BackendUnavailable, "TMA needs its first element", lambda lib: dict(
        kv_cache=lib.array(2 * _MB + 2, (_PAGES, 64, 1, 576)))),
    "seq_lens-misaligned": (ValueError, "seq_lens must be aligned", lambda lib: dict(seq_lens=lib.array(4 * _MB + 2, (_BATCH,), np.int32))),
    "block_table-misaligned": (ValueError, "block_table must be aligned", lambda lib: dict(
        block_table=lib.array(3 * _MB + 1, (_BATCH, 3), np.int32))),
    "q-dtype": (TypeError, "kv_cache has dtype bfloat16, but must be float16", lambda lib: dict(
        q=lib.array(_MB, (_BATCH, 1, _HEADS, 576), np.float16))),
    "kv_cache-strided": (ValueError, "kv_cache has a stride of 4 bytes", lambda lib: dict(
        kv_cache=lib.array(2 * _MB, (_PAGES, 64, 1, 576), strides=(147456, 2304, 2304, 4)))),
    "heads": (StalePlanError, "plan was made for num_heads_q=16", lambda lib: dict(q=lib.array(_MB, (_BATCH, 1, 2 * _HEADS, 576)))),
    "other-device": (ValueError, "kv_cache is in cuda:1, but q is in cuda:0", lambda lib: dict(
        kv_cache=lib.array(2 * _MB, (_PAGES, 64, 1, 576), device=1))),
    "host-memory": (ValueError, "block_table is in host memory", lambda lib: dict(block_table=np.zeros((_BATCH, 3), np.int32))),
    "no-array": (TypeError, "kv_cache must be an array", lambda lib: dict(kv_cache=None)),
    "out-dtype": (TypeError, "out has dtype float32", lambda lib: dict(out=lib.new((_BATCH, 1, _HEADS, 512), np.float32))),
    "out-over-q": (ValueError, "out shares memory with q", lambda lib: dict(out=lib.array(_MB, (_BATCH, 1, _HEADS, 512)))),
    "lse-over-out": (ValueError, "lse shares memory with out", lambda lib: dict(
        out=lib.array(9 * _MB, (_BATCH, 1, _HEADS, 512)), lse=lib.array(9 * _MB + 64, (_BATCH, _HEADS, 1), np.float32))),
    "causal": (StalePlanError, "plan was made for causal=True", lambda lib: dict(causal=False)),
    "batch_invariant": (StalePlanError, "plan was made for batch_invariant=False", lambda lib: dict(batch_invariant=True)),
    "head_dim_v": (BackendUnavailable, "head_dim_v=256", lambda lib: dict(head_dim_v=256)),
    "causal-1": (TypeError, "causal must be True or False, got 1", lambda lib: dict(causal=1)),
    "head_dim_v-float": (TypeError, "head_dim_v must be an integer, got 512.0", lambda lib: dict(head_dim_v=512.0)),
    "head_dim_v-list": (TypeError, "head_dim_v must be an integer", lambda lib: dict(head_dim_v=[512])),
    "scale-array": (TypeError, "softmax_scale must be a real number", lambda lib: dict(softmax_scale=np.ones(2))),
    "stream": (ValueError, "stream must be a handle from 0, got -1", lambda lib: dict(stream=-1)),
    "backend": (StalePlanError, "plan was made for backend='hopper'", lambda lib: dict(backend="simt")),
}


@pytest.mark.parametrize("case", _BAD)
def test_a_bad_call_after_good_ones_says_what_is_wrong(run, case, monkeypatch):
    monkeypatch.setattr("mla_numba.host.simt.unavailable", lambda device: [])
    monkeypatch.setattr("mla_numba.host.simt.unsupported", lambda shape, device: [])
    error, match, changes = _BAD[case]
    given = dict(out=run.library.new((_BATCH, 1, _HEADS, 512), _BF16), lse=run.library.new((_BATCH, _HEADS, 1), np.float32))
    for _ in range(2):
        run()
        run(**given)
        run(out=given["out"])
    with pytest.raises(error, match=match) as caught:
        run({**run.library.inputs(), **changes(run.library)})
    assert type(caught.value) is error and not run.driver.launches
    assert len(run()[1]) == 2


def test_results_that_lie_between_the_inputs_rows_are_taken_each_time(run):
    """As ranges they overlap; as elements they do not."""
    q = run.library.array(_MB, (_BATCH, 1, _HEADS, 576), strides=(_HEADS * 4096, 4096, 4096, 2))
    out = run.library.array(_MB + 2048, (_BATCH, 1, _HEADS, 512), strides=(_HEADS * 4096, 4096, 4096, 2))
    for _ in range(40):
        results, launches, _ = run(run.library.inputs(q=q), out=out)
        assert results[0] is out and len(launches) == 2
    assert len(run.plan._prepared) == 1


def test_a_bounded_number_of_calls_is_kept(run):
    for i in range(100):
        run(softmax_scale=i / 100)
    assert len(run.plan._prepared) == api._MAX_PREPARED_CALLS


@pytest.mark.parametrize("planned", [True, False])
def test_no_array_is_kept_alive(run, planned):
    arrays = run.library.inputs()
    given = dict(out=run.library.new((_BATCH, 1, _HEADS, 512), _BF16), lse=run.library.new((_BATCH, _HEADS, 1), np.float32))
    for options in (given, {}, given, {}):
        results, _, _ = run(arrays, planned=planned, **options)
    alive = [weakref.ref(array) for array in (*arrays.values(), *given.values(), *results)]
    del arrays, given, results, options
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def test_values_are_checked_each_time(run, monkeypatch):
    run()
    checked = []
    monkeypatch.setattr(api, "_check_values", lambda *arguments: checked.append(arguments))
    for _ in range(3):
        run(check_values=True)
    assert len(checked) == 3 and run.validated == 4


def test_flash_mla_repeats_too(run):
    arrays = run.library.inputs()
    meta = flash_mla.FlashMLASchedMeta(have_initialized=True, plan=run.plan)
    for _ in range(3):
        flash_mla.flash_mla_with_kvcache(arrays["q"], arrays["kv_cache"], arrays["block_table"], arrays["seq_lens"], 512, meta, causal=True)
    assert run.validated == 1
    with pytest.raises(ValueError, match="k_cache has 3 dimensions"):
        flash_mla.flash_mla_with_kvcache(arrays["q"], run.library.array(_MB, (_PAGES, 64, 576)), arrays["block_table"], arrays["seq_lens"],
                                         512, meta, causal=True)


def test_a_workspace_that_grows_with_each_step_is_made_a_few_times(monkeypatch):
    """What a batch-invariant plan needs grows as requests do, and what has become too small is kept for the graphs that may have it."""
    _Run("cupy", monkeypatch)
    device = gpu.gpu(0)
    addresses = [device.workspace(needed, 7, "partials") for needed in range(1000, 100_000, 10)]
    kept = device._workspaces._kept[7, "partials"]
    assert len(set(addresses)) == len(kept) <= 8
    assert sum(memory.size for memory in kept) <= 4 * 100_000
    assert device.workspace(5000, 7, "partials") == addresses[-1]


@pytest.mark.parametrize("num_jobs", [1, 40, 10_000])
def test_workspaces_of_batch_invariant_plans_are_five_times_what_is_needed_at_most(num_jobs):
    """As docs/contract.md says, whatever their pieces begin with; of so many jobs or fewer."""
    for begin in (1, 2, 3, 50, 200):
        workspaces, held = Workspaces(), []
        for extra_splits in range(begin, 3000):
            asked = num_partial_slots(rounded_up(extra_splits), num_jobs)
            workspaces.get("", asked, lambda size, held=held: held.append(size) or SimpleNamespace(size=size))
            assert sum(held) <= 5 * num_partial_slots(extra_splits, num_jobs)


@pytest.mark.parametrize(("stream", "is_shared"), [(7, True), (2, False)])
def test_threads_share_a_streams_workspace_but_not_the_per_thread_streams(run, stream, is_shared):
    """Its handle is 2 in all threads, and each has another one."""
    workspaces = []

    def call():
        # At an odd place, so that it is copied.
        q = run.library.array(_MB + 8, (_BATCH, 1, _HEADS, 576))
        _, (decode, _), ((copied, _, _),) = run(run.library.inputs(q=q), stream=stream)
        # Partial results, states, counters, which follow the plan's three tables; and q.
        workspaces.append((*decode[4][3:6], copied))

    call()
    call()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert workspaces[0] == workspaces[1]
    assert [mine == other for mine, other in zip(workspaces[0], workspaces[2], strict=True)] == 4 * [is_shared]


def test_threads_do_not_mix_up_their_launches(run):
    """Each thread has inputs and a stream of its own; a launch of arguments from two calls, or a merge behind a foreign decode, shows."""
    num_threads, num_calls = 4, 50
    run()
    calls = [(run.library.inputs(base=(i + 1) * 64 * _MB), dict(stream=i + 3, out=run.library.new((_BATCH, 1, _HEADS, 512), _BF16),
                                                              lse=run.library.new((_BATCH, _HEADS, 1), np.float32)))
             for i in range(num_threads)]
    expected = {options["stream"]: run.as_the_first(arrays, **options)[0] for arrays, options in calls}
    run.driver.launches = []

    def repeat(arrays, options):
        for _ in range(num_calls):
            mla_decode(**arrays, plan=run.plan, **options)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=repeat, args=call) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(run.driver.launches) == 2 * num_threads * num_calls
    for decode, merge in zip(run.driver.launches[::2], run.driver.launches[1::2], strict=True):
        assert [decode, merge] == expected[decode[2]]
