"""Several GPUs: a call runs where its arrays are, whichever device is the caller's current one, and leaves that as it was. Levels: l1."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from numba import cuda

from mla_numba import StalePlanError, available_backends, flash_mla, merge_states, mla_decode, plan_decode
from mla_numba.arrays import view
from verify.cases import MLACase
from verify.checks import assert_same_results, assert_within
from verify.libraries import LIBRARIES, from_torch, to_torch

# `make test` runs all levels on any machine, most of which have one GPU, or none.
pytestmark = [pytest.mark.l1, pytest.mark.skipif(not cuda.is_available() or len(cuda.gpus) < 2, reason="needs two GPUs")]

# Requests in many pieces, in one, in none; and few enough to be one launch.
CASES = {"many pieces": MLACase(seq_lens=(3000, 0, 700), num_heads_q=128, pages="shuffled", spare_columns=1),
         "one launch": MLACase(seq_lens=(70, 200), seq_len_q=2, num_heads_q=16, pages="shuffled")}
BACKENDS = [name for name in available_backends() if name != "cpu"]


@pytest.fixture(params=["torch", "cupy", "numba"])
def library(request):
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return LIBRARIES[request.param]


def _arrays(case, into, device):
    inputs = case.build()
    return [into(array, device) for array in (inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens)]


def _knobs(case):
    return dict(num_heads_q=case.num_heads_q, seq_len_q=case.seq_len_q, page_size=case.page_size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_call_runs_where_its_arrays_are(library, case, backend):
    """In turn on both devices, so that each call but the first ones is repeated; the current device is the other one, or not."""
    into, back = library
    current, inputs = cuda.get_current_device().id, case.build()
    out, lse, out_bound, lse_bound = inputs.bounds()
    arrays = [_arrays(case, into, device) for device in range(2)]
    first = {}
    for turn in range(3):
        for device in (1, 0):
            known = dict(max_seq_len=max(case.seq_lens)) if turn else {}
            plan = plan_decode(arrays[device][3], **_knobs(case), backend=backend, **known)
            for options in (dict(plan=plan), {}):
                results = mla_decode(*arrays[device], backend=backend, **options)
                assert [view(result, "result").device for result in results] == [device, device]
                got = [back(result) for result in results]
                assert_within("out", got[0], out, out_bound)
                assert_within("lse", got[1], lse, lse_bound)
                assert_same_results(got, first.setdefault((bool(options), bool(turn)), got), f"cuda:{device}, turn {turn}")
                assert cuda.get_current_device().id == current
            merged, _ = merge_states([results, results], backend=backend)
            assert view(merged, "merged").device == device


@pytest.mark.parametrize("name", ["torch", "cupy", "numba"])
def test_a_process_that_begins_on_the_second_device(name):
    """The first test above in a process of its own, whose first call is on cuda:1: nobody has used that device before."""
    pytest.importorskip(name, reason=f"{name} is not installed")
    test = f"{__file__}::{test_a_call_runs_where_its_arrays_are.__name__}[{name}-many pieces-{BACKENDS[0]}]"
    # It is no worker of this run.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", test], env=env,
                         capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert "1 passed" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thread_that_begins_on_the_second_device(library, backend):
    """It has used no device before."""
    case, results = CASES["many pieces"], []
    tensors = _arrays(case, library.into, 1)
    expected = [library.back(result) for result in mla_decode(*tensors, backend=backend)]

    def run():
        for _ in range(2):
            plan = plan_decode(tensors[3], **_knobs(case), backend=backend)
            results.append([library.back(result) for result in mla_decode(*tensors, plan=plan, backend=backend)])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(results) == 2
    for result in results:
        assert_same_results(result, expected, "a thread of its own")


def test_torchs_current_device_does_not_matter():
    """Results are the same, and on the arrays' device, whether that is torch's current one or the other."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    case = CASES["many pieces"]
    expected = None
    for device in (0, 1):
        tensors = _arrays(case, to_torch, device)
        for current in (1, 0):
            with torch.cuda.device(current):
                results = [from_torch(result) for result in mla_decode(*tensors)]
                assert torch.cuda.current_device() == current
                flash = flash_mla.flash_mla_with_kvcache(*tensors, 512, *flash_mla.get_mla_metadata(), causal=True)
                assert {result.device.index for result in flash} == {device}
            expected = results if expected is None else expected
            assert_same_results(results, expected, f"cuda:{device} while {current} is current")


def test_what_has_the_cuda_interface_alone_is_decoded_where_it_lies():
    """It does not tell the device, nor is that the current one."""
    pytest.importorskip("cupy", reason="cupy is not installed")
    case = CASES["many pieces"]
    expected = mla_decode(*_arrays(case, LIBRARIES["numba"].into, 1))
    cupys = [array.view("uint16") if array.itemsize == 2 else array for array in _arrays(case, LIBRARIES["cupy"].into, 1)]
    results = mla_decode(*[SimpleNamespace(__cuda_array_interface__=array.__cuda_array_interface__) for array in cupys])
    assert [view(result, "result").device for result in results] == [1, 1]
    assert_same_results(*[[LIBRARIES["numba"].back(result) for result in each] for each in (results, expected)], "the interface alone")


def test_a_plan_of_host_lengths_is_of_the_gpu_that_was_current():
    inputs = CASES["many pieces"].build()
    plan = plan_decode(inputs.seq_lens, **_knobs(CASES["many pieces"]), backend=BACKENDS[0])
    arrays = inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens
    first = mla_decode(*arrays, plan=plan)
    with cuda.gpus[1]:
        with pytest.raises(StalePlanError, match="plan was made for gpu=0, but this call has gpu=1"):
            mla_decode(*arrays, plan=plan)
        assert_same_results(mla_decode(*arrays, backend=plan.backend), first, "the other GPU")


def test_arrays_of_two_devices_are_refused(library):
    q, kv_cache, block_table, seq_lens = _arrays(CASES["one launch"], library.into, 0)
    other = _arrays(CASES["one launch"], library.into, 1)
    with pytest.raises(ValueError, match="kv_cache is in cuda:1, but q is in cuda:0"):
        mla_decode(q, other[1], block_table, seq_lens)
    with pytest.raises(StalePlanError, match="plan was made for device=1, but this call has device=0"):
        mla_decode(q, kv_cache, block_table, seq_lens, plan=plan_decode(other[3], **_knobs(CASES["one launch"])))


def test_a_graph_on_the_second_device():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    case = CASES["many pieces"]
    tensors = _arrays(case, to_torch, 1)

    def step():
        return mla_decode(*tensors, plan=plan_decode(tensors[3], **_knobs(case)))

    with torch.cuda.device(1):
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # On a stream of this device: torch's own is of the device that was current when a process first captured.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            captured = step()
        for seq_lens in ([3000, 0, 700], [1, 2999, 64]):
            tensors[3].copy_(torch.tensor(seq_lens, dtype=torch.int32))
            graph.replay()
            torch.cuda.synchronize()
            for result, expected in zip(captured, step(), strict=True):
                assert torch.equal(result, expected), seq_lens


def test_two_threads_on_two_devices():
    """At once: what they share is the host's alone."""
    pytest.importorskip("torch", reason="torch is not installed")
    case, failures = CASES["many pieces"], []
    tensors = [_arrays(case, to_torch, device) for device in range(2)]
    expected = [from_torch(result) for result in mla_decode(*tensors[0])]

    def run(device):
        try:
            for _ in range(100):
                assert_same_results([from_torch(result) for result in mla_decode(*tensors[device])], expected, f"cuda:{device}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(device,)) for device in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
