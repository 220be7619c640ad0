"""perf's measuring side without a GPU: what is in the suites, what the timer does with a clock, what the gate stops, the cpu mode whole."""

# Peers that are made up here have the methods of all, whether they need their arguments or not.
# ruff: noqa: ARG002

import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mla_numba
from perf import cases, ceilings, gate, inputs, measure, read_kernel, results, timer, traffic
from perf.__main__ import main
from perf.peers import CPU_PEERS, GPU_PEERS, PEERS
from perf.peers.numpy_way import NumpyWay

pytestmark = pytest.mark.l0

ROOT = Path(__file__).resolve().parents[1]

# batch, queries, heads, mean length, lengths differ: the rows that the peers were measured on before the project began.
BASELINE = """
128 1 128 4096 1   128 1 128 8192 1   128 1 128 16384 1  128 1 128 32768 1  128 2 128 4096 1   128 2 128 8192 1
128 2 128 16384 1  128 2 128 32768 1  128 1 16 4096 1    128 1 16 16384 1   128 1 32 4096 1    128 1 32 16384 1
128 1 64 4096 1    128 1 64 16384 1   1 1 128 1024 0     1 1 128 8192 0     1 1 128 65536 0    4 1 128 1024 0
4 1 128 8192 0     4 1 128 65536 0    16 1 128 1024 0    16 1 128 8192 0    16 1 128 65536 0   1 1 16 1024 0
1 1 16 8192 0      1 1 16 65536 0     4 1 16 1024 0      4 1 16 8192 0      4 1 16 65536 0     16 1 16 1024 0
16 1 16 8192 0     16 1 16 65536 0    64 1 16 1024 0     64 1 16 8192 0     64 1 16 65536 0    128 4 16 4096 1
16 1 64 4096 0     32 1 128 4096 0    64 1 128 4096 0    128 1 128 1024 0   128 1 128 2048 0   256 1 128 2048 1
132 4 16 4096 0    64 2 16 512 0
"""
SMALL = cases.Case("small", (130, 5, 77), seq_len_q=2, num_heads_q=6, page_size=16, suite="test")
LIMITS = {"read_gbs": 10.0, "f32_matmul_tflops": 0.1, "bf16_matmul_tflops": None}


class FakeTimer:
    """Every call takes as many microseconds as it returns; `log` has the calls in order."""

    flush_bytes = 1

    def __init__(self):
        self.log = []

    def sample(self, call, lead_us=0.0, before=None):
        value = call()
        self.log.append((value, lead_us, before))
        return 1.0 if isinstance(value, tuple) else float(value)

    def wait(self):
        self.log.append("wait")


# Suites

def test_full_has_the_baseline():
    numbers = list(map(int, BASELINE.split()))
    rows = {tuple(numbers[i:i + 5]) for i in range(0, len(numbers), 5)}
    assert len(rows) == 44
    for suite in ("full", "baseline"):
        have = {(case.batch, case.seq_len_q, case.num_heads_q, case.seq_len_k_mean, case.varlen) for case in cases.suite(suite)
                if case.page_size == 64 and case.causal and case.num_workers is None}
        assert rows - have == set()


def test_suites_have_what_they_say():
    counts = {name: len(cases.suite(name)) for name in cases.SUITES}
    assert counts["baseline"] == 44
    assert counts["flashmla"] == 16
    assert counts["serving"] == 27
    assert counts["quick"] <= 8
    full = cases.suite("full")
    assert len({case.name for case in full}) == len(full)
    shapes = {replace(case, name="", suite="", causal=case.causal or case.seq_len_q == 1) for case in full}
    assert len(shapes) == len(full)
    flashmla = cases.suite("flashmla")
    assert {(case.seq_len_q, case.causal, case.seq_len_k_mean) for case in flashmla} == {
        (q, causal, mean) for q in (1, 2) for causal in (True, False) for mean in (4096, 8192, 16384, 32768)}
    assert {case.name for case in flashmla} <= {case.name for case in full}
    rows = {(case.num_heads_q, case.seq_len_q) for case in full}
    assert {(12, 1), (24, 1), (48, 1), (96, 1), (112, 1), (16, 3)} <= rows
    assert {case.page_size for case in full} >= {16, 32, 64, 128, 256}


def test_drawn_shapes_are_the_seeds():
    drawn = cases.suite("drawn", 3)
    assert drawn == cases.suite("drawn", 3)
    assert len(drawn) > 95
    assert not set(drawn) & set(cases.suite("drawn"))
    for case in drawn:
        tokens = sum(case.seq_lens)
        assert tokens <= 5_000_000
        assert tokens * case.seq_len_q * case.num_heads_q <= 320_000_000
    # Short and long, few and many: each tenth of either range, by its logarithm, has some.
    for values, ends in (([case.batch for case in drawn], (0, 10)), ([case.seq_len_k_mean for case in drawn], (6, 17))):
        tenths = np.histogram(np.log2(values), bins=10, range=ends)[0]
        assert tenths[:8].min() > 0
    assert {case.page_size for case in drawn} == {16, 32, 64, 128}
    assert {case.varlen for case in drawn} == {False, True}


@pytest.mark.parametrize("name", cases.SUITES)
def test_cases_can_be_found_and_decoded(name):
    for case in cases.suite(name):
        found = cases.find(case.name)
        assert replace(found, suite=case.suite, causal=case.causal) == case
        assert min(case.seq_lens) >= case.seq_len_q
        assert case.num_heads_q % case.num_heads_kv == 0


@pytest.mark.parametrize("spread", ["equal", "normal", "uniform", "bimodal", "giant", "step2"])
def test_lengths_of_every_spread_have_the_mean(spread):
    lengths = cases.spread_lengths(spread, 128, 4096)
    assert sum(lengths) == 128 * 4096
    assert min(lengths) >= 1
    assert len(set(lengths)) == 1 if spread == "equal" else len(set(lengths)) > 1
    assert lengths == cases.spread_lengths(spread, 128, 4096)
    if spread == "step2":
        assert set(np.diff(lengths)) == {2}


def test_wrong_names_say_what_is_near():
    with pytest.raises(ValueError, match="b128_q1_h128_k4096"):
        cases.find("b128_q1_h128k4096")
    for name in ("b0_q1_h128_k4096", "b1_q0_h128_k4096", "b1_q1_h0_k4096", "b1_q5_h16_k4"):
        with pytest.raises(ValueError, match="at least"):
            cases.find(name)
    with pytest.raises(ValueError, match="is none of quick"):
        cases.suite("everything")
    with pytest.raises(ValueError, match="always the same"):
        cases.suite("quick", 1)


@pytest.mark.parametrize("name", ["b4_q1_h64_k3000", "b3_q2_h5_k70_giant_p16_w7_full", "b2_q1_h16_k100_p1"])
def test_any_shape_can_be_named(name):
    case = cases.find(name)
    # With one query causal or not is the same, and has one name.
    assert case.name == name and case.suite == "shape" and sum(case.seq_lens) == case.batch * case.seq_len_k_mean
    assert min(case.seq_lens) >= case.seq_len_q


def test_requests_share_the_pages_of_their_prefix_blocks():
    case = cases.Case("two", (1100, 1030), prefix_blocks=((7, 8, 9), (7, 8)))
    table, num_pages = cases.block_table(case, np.random.default_rng(0))
    # Two whole blocks of 512 tokens in common: 16 pages of 64.
    assert (table[0, :16] == table[1, :16]).all()
    assert not set(table[0, 16:18]) & set(table[1, 16:17])
    assert num_pages == len(set(table[0, :18]) | set(table[1, :17])) == 19


@pytest.mark.parametrize("name", ["mooncake_32_h16", "mooncake_128_h16", "azure_conv_32_h16"])
def test_pages_are_as_many_as_the_traffic_model_counts(name):
    case = cases.find(name)
    num_pages = cases.block_table(case, np.random.default_rng(0))[1]
    tokens = traffic.work(case).unique_kv_bytes / (576 * 2)
    assert tokens <= num_pages * case.page_size < tokens + case.batch * case.page_size


# Timer

def test_contenders_take_turns():
    clock = FakeTimer()
    times = timer.interleave(clock, {"a": lambda: 3, "b": lambda: 5, "c": lambda: 7}, 4, {"b": 40.0})
    assert times == {"a": [3.0] * 4, "b": [5.0] * 4, "c": [7.0] * 4}
    assert [entry[0] for entry in clock.log] == [3, 5, 7, 5, 7, 3, 7, 3, 5, 3, 5, 7]
    assert {entry[:2] for entry in clock.log} == {(3, 0.0), (5, 40.0), (7, 0.0)}


def test_spread_is_median_and_tenths():
    assert timer.spread([float(value) for value in range(101)]) == timer.Spread(50.0, 10.0, 90.0)


def test_host_cost_is_the_mean_of_calls_without_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timer.time, "perf_counter", lambda: now[0])
    calls = []

    def call():
        calls.append(None)
        now[0] += 30e-6

    assert timer.host_us(FakeTimer(), call, device_us=100.0) == pytest.approx(30.0)
    assert len(calls) == timer.HOST_CALLS
    calls.clear()
    timer.host_us(FakeTimer(), call, device_us=1e6)
    assert len(calls) == timer.LEAST_HOST_CALLS


def test_cuda_timer_flushes_until_the_host_has_queued_the_call():
    log = []

    class Event:
        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            assert isinstance(end, Event)
            return 0.25

    class Cuda:
        event = Event

        @staticmethod
        def synchronize():
            log.append("wait")

    clock = object.__new__(timer.CudaTimer)
    clock._cuda, clock._flush_us, clock._flush = Cuda, 100.0, lambda: log.append("flush")
    assert clock.sample(lambda: log.append("call")) == 250.0
    # What is queued behind the second event would hold it up.
    assert log == ["flush", "event", "call", "event", "wait"]
    log.clear()
    clock.sample(lambda: log.append("call"), lead_us=250.0)
    assert log == ["flush"] * 3 + ["event", "call", "event", "wait"]


def test_host_timer_writes_more_than_the_last_cache(monkeypatch):
    monkeypatch.setattr(timer, "last_level_cache_bytes", lambda: 1000)
    monkeypatch.setattr(timer.HostTimer, "settle_s", 0.0)
    clock = timer.HostTimer()
    assert clock.flush_bytes == 4000
    before = clock._buffer.copy()
    assert clock.sample(lambda: None) >= 0
    assert (clock._buffer != before).all()
    monkeypatch.setattr(timer, "host_memory_bytes", lambda: 8000)
    assert timer.HostTimer().flush_bytes == 1000


def test_read_kernel_loads_16_bytes_four_times():
    from numba import cuda
    from numba.cuda import types

    if cuda.config.ENABLE_CUDASIM:
        pytest.skip("the simulator compiles nothing")
    signature = types.void(types.int64[::1], types.int64[::1])
    ptx, _ = cuda.compile(read_kernel.make_read_kernel(), signature, device=False, abi="numba", cc=(9, 0), output="ptx")
    assert ptx.count("ld.global.v2.u64") == 4
    assert ptx.count("ld.global") == 4


# Gate

@pytest.fixture(scope="module")
def small():
    """Inputs of SMALL, its gate, and a right result."""
    made = inputs.make_inputs(SMALL, "numpy")
    return made, gate.Gate(made), mla_numba.mla_decode(*made.arrays, backend="cpu")


def test_inputs_are_random_and_shuffled(small):
    made, _, _ = small
    assert 0.9 < made.kv_cache.astype(np.float32).std() < 1.1
    used = made.block_table[0, :9]
    assert sorted(used) != list(used)
    assert (made.pages(0) == made.kv_cache[used]).all()


def test_gate_lets_a_right_result_pass(small):
    _, judge, (out, lse) = small
    verdict = judge.check(out, lse)
    assert verdict.reason is None
    assert 0 < verdict.rel_err < 5e-3
    assert judge.check(out, None).reason is None


@pytest.mark.parametrize(("change", "names"), [
    (lambda out, lse: (out * 1.02, lse), "out"),
    (lambda out, lse: (out, lse + 1e-2), "lse"),
    (lambda out, lse: (np.where(np.arange(3)[:, None, None, None] == 1, np.float32(math.nan), out), lse), "out of request 1"),
    (lambda out, lse: (out[::-1], lse), "out"),
], ids=["scaled", "lse", "nan", "requests swapped"])
def test_gate_stops_a_wrong_result(small, change, names):
    _, judge, (out, lse) = small
    verdict = judge.check(*(array.astype(np.float32) for array in change(out.astype(np.float32), lse)))
    assert f"wrong: {names}" in verdict.reason


def test_gate_stops_what_leaves_a_few_of_many_tokens_out():
    """Whose bounds are wide: each element is within its own."""
    made = inputs.make_inputs(cases.find("b1_q1_h16_k8192"), "numpy")
    judge, results = gate.Gate(made), []
    for seq_lens in (made.seq_lens, made.seq_lens - 64):
        results.append(judge.check(mla_numba.mla_decode(*made.arrays[:3], seq_lens, backend="cpu")[0], None))
    assert results[0].reason is None and results[0].rel_err < 0.003
    assert results[1].reason.startswith("wrong: the relative error of out is ") and "above the 0.00391 that bfloat16" in results[1].reason


def a_run(**peers):
    run = measure.start("cpu", ["numpy"])
    run.timer = FakeTimer()
    run.peers = peers
    run.absent = {"elsewhere": "not here"}
    return run


def test_only_right_peers_get_a_time():
    class Wrong(NumpyWay):
        def result(self, raw, inputs):
            return raw[0], raw[1] + np.float32(0.01)

    class Broken(NumpyWay):
        def prepare(self, inputs, variant):
            raise RuntimeError("no such\nthing")

    class Choosy(NumpyWay):
        def supports(self, case):
            return "not my kind"

    class Varied(NumpyWay):
        def variants(self, case):
            return ("bad", "good")

        def prepare(self, inputs, variant):
            if variant == "bad":
                raise ValueError("bad splits")
            return super().prepare(inputs, variant)

    row = measure.measure_case(a_run(right=NumpyWay(), wrong=Wrong(), broken=Broken(), choosy=Choosy(), varied=Varied()), SMALL, LIMITS)
    assert row["peers_us"] == {"right": 1.0, "varied": 1.0, "wrong": None, "broken": None, "choosy": None, "elsewhere": None}
    assert row["peers_note"]["wrong"].startswith("failed: wrong: lse of request")
    assert row["peers_note"]["broken"] == "failed: RuntimeError: no such thing"
    assert row["peers_note"]["choosy"] == "not supported: not my kind"
    assert row["peers_note"]["elsewhere"] == "absent: not here"
    assert row["peers_note"]["varied"] == "splits: good, of bad, good; splits bad failed: ValueError: bad splits"
    assert row["peers_rel_err"].keys() == {"right", "varied"}
    assert row["seq_lens"] == list(SMALL.seq_lens)
    results.ROW(row, "row")


def test_slow_peers_are_left_out():
    class Slow(FakeTimer):
        def sample(self, call, lead_us=0.0, before=None):
            super().sample(call, lead_us, before)
            return 2 * measure.CPU_PEER_CAP_US

    run = a_run(slow=NumpyWay())
    run.timer = Slow()
    row = measure.measure_case(run, SMALL, LIMITS)
    assert row["peers_us"]["slow"] is None
    assert row["peers_note"]["slow"] == "skipped: 2000 ms a call"


def test_a_choice_of_variant_is_kept():
    class Varied(NumpyWay):
        name = "varied"
        asked = 0

        def variants(self, case):
            return ("1", "2")

        def tuning_key(self, case):
            return case.num_heads_q

        def prepare(self, inputs, variant):
            Varied.asked += 1
            return super().prepare(inputs, variant)

    run = a_run(varied=Varied())
    measure.measure_case(run, SMALL, LIMITS)
    measure.measure_case(run, SMALL, LIMITS)
    assert Varied.asked == 3


def test_no_row_of_a_wrong_result_of_ours(monkeypatch, tmp_path):
    right = mla_numba.mla_decode
    monkeypatch.setattr(mla_numba, "mla_decode", lambda *args, **kwargs: (right(*args, **kwargs)[0][::-1], right(*args, **kwargs)[1]))
    monkeypatch.setattr(ceilings, "measure", lambda timer: LIMITS | {"copy_gbs": None})
    said = []
    document, failures = measure.measure(a_run(), [SMALL], tmp_path / "r.json", report=said.append)
    assert document["rows"] == []
    assert len(failures) == 1
    assert "small: GateError: failed: wrong: out of request" in failures[0]
    assert said == failures


def test_kernels_are_timed_one_by_one(monkeypatch):
    from mla_numba.host import launch

    class Kernel:
        def __init__(self, name):
            self.py_func = SimpleNamespace(__name__=name)

        def __call__(self, *arguments):
            launched.append(arguments)

    class Event:
        def record(self):
            launched.append("event")

        def elapsed_time(self, end):
            return 0.002

    launched = []
    monkeypatch.setattr(launch, "configured", lambda kernel, *configuration: kernel)
    monkeypatch.setattr("numba.cuda.event", Event)
    with measure.traced_launches("simt") as launches:
        launch.configured(Kernel("simt_merge"), 1, 2, 0)("argument")
    assert launched == ["event", ("argument",), "event"]
    assert [name for name, _, _ in launches] == ["simt_merge"]

    from mla_numba.host import simt

    def call():
        for name in ("build_schedule", "simt_decode", "simt_merge"):
            simt.configured(Kernel(name), 1, 2, 0)()

    run = a_run()
    run.backend, run.timer = "simt", FakeTimer()
    parts = measure._parts(run, measure.Contender(lambda: (call(),), 0.0, 0.0), 10.0)
    assert parts == pytest.approx({"plan_us": 2.0, "decode_us": 2.0, "merge_us": 2.0})


def test_hoppers_kernels_are_timed_one_by_one(monkeypatch):
    gpu = pytest.importorskip("mla_numba.host.gpu", reason="cuda.bindings is not installed")
    from mla_numba.host import hopper

    launched = []
    monkeypatch.setattr("numba.cuda.event", lambda: SimpleNamespace(record=lambda: launched.append("event")))
    monkeypatch.setattr(gpu.BoundKernel, "launch", lambda kernel, stream: launched.append((kernel.spec.name, stream)))
    monkeypatch.setattr(gpu, "current_context", lambda: 5)
    device = gpu.Gpu.__new__(gpu.Gpu)
    device._context = 5
    specs = hopper.schedule_spec(), hopper.decode_spec("bfloat16", 64, 1, 16), hopper.merge_spec("bfloat16", 16)
    with measure.traced_launches("hopper") as launches:
        device.launch_bound(7, *(gpu.BoundKernel(None, spec, (1, 1, 1), "i", [0]) for spec in specs))
    assert launched == [event for spec in specs for event in ("event", (spec.name, 7), "event")]
    found = [next(part for word, part in measure.PARTS.items() if word in name) for name, _, _ in launches]
    assert found == ["plan_us", "decode_us", "merge_us"]


def test_lengths_that_cannot_be_are_refused():
    for name in ("b1_q1_h16_k1024_giant", "b128_q1_h16_k64_step2"):
        with pytest.raises(ValueError, match="lengths cannot be made for batch="):
            cases.find(name)
    for spread, batch, mean, least in (("giant", 2, 100, 1), ("step2", 4, 64, 3), ("bimodal", 9, 50, 4), ("normal", 3, 2, 2)):
        lengths = cases.spread_lengths(spread, batch, mean, least)
        assert min(lengths) >= least and sum(lengths) == batch * mean


# Peers and command line

def test_a_step_without_torch_on_a_gpu_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(measure, "start", lambda *_: SimpleNamespace(library="numpy", backend="cpu"))
    assert main(["step", "--case", "b1_q1_h16_k1024"]) == 2
    assert "a step needs torch on a GPU" in capsys.readouterr().err



def test_peers_are_named_and_say_why_they_are_absent():
    assert GPU_PEERS == ("flashmla", "fa3", "triton", "flashinfer", "sdpa")
    assert CPU_PEERS == ("numpy",)
    for name in GPU_PEERS:
        reason = PEERS[name].available()
        assert reason is None or len(reason) > 5


def test_peers_refuse_what_would_harm_them():
    case = cases.find("b128_q1_h128_k4096")
    assert PEERS["flashmla"].supports(case) is None
    assert "64 only" in PEERS["flashmla"].supports(replace(case, page_size=16))
    assert "576 and 512 only" in PEERS["flashmla"].supports(replace(case, head_dim_qk=512))
    assert "multiples of 16" in PEERS["fa3"].supports(replace(case, page_size=8))
    assert "one query" in PEERS["triton"].supports(replace(case, seq_len_q=2))
    assert "equal lengths" in PEERS["sdpa"].supports(replace(case, seq_lens=(5, 6)))
    assert "float32" in PEERS["fa3"].supports(replace(case, dtype="float32"))


def test_start_refuses_what_it_cannot_measure(monkeypatch):
    with pytest.raises(ValueError, match="at least 20"):
        measure.start("cpu", samples=19)
    with pytest.raises(ValueError, match="no peer nobody"):
        measure.start("cpu", ["nobody"])
    monkeypatch.setattr(mla_numba, "available_backends", lambda: ["cpu"])
    with pytest.raises(mla_numba.BackendUnavailable, match="hopper"):
        measure.start("hopper")
    assert "takes arrays of torch" in measure.start("cpu", ["flashmla"]).absent["flashmla"] or PEERS["flashmla"].available() is not None


@pytest.fixture
def quick_machine(monkeypatch):
    """Caches small, and threads that need no rest."""
    monkeypatch.setattr(timer, "last_level_cache_bytes", lambda: 2**20)
    monkeypatch.setattr(timer.HostTimer, "settle_s", 0.0)
    monkeypatch.setattr(ceilings, "CPU_MATMUL_SIZE", 512)


@pytest.mark.usefixtures("quick_machine")
def test_cpu_mode_from_end_to_end(tmp_path, capsys):
    path = tmp_path / "cpu.json"
    assert main(["--backend", "cpu", "--suite", "smoke", "--out", str(path), "--commit", "0123abc"]) == 0
    document = results.load(path)
    assert document["commit"] == "0123abc"
    assert document["ceilings"]["read_gbs"] > 0
    assert document["ceilings"]["f32_matmul_tflops"] > 0
    assert [row["case"] for row in document["rows"]] == [case.name for case in cases.suite("smoke")]
    for row in document["rows"]:
        assert len(row["samples_us"]) == timer.MIN_SAMPLES
        assert row["peers_us"]["numpy"] > 0
    printed = capsys.readouterr().out
    assert "2 rows in" in printed
    assert main(["compare", str(path), str(path)]) == 0
    assert "no change" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_machine")
def test_a_run_stops_between_cases_when_time_is_up(tmp_path, capsys):
    path = tmp_path / "none.json"
    assert main(["--backend", "cpu", "--suite", "smoke", "--out", str(path), "--peers", "none", "--time-limit", "0"]) == 0
    assert results.load(path)["rows"] == []
    assert capsys.readouterr().out.count("not begun") == 2


def test_command_line_lists_and_refuses(capsys, tmp_path):
    assert main(["--list", "--suite", "flashmla"]) == 0
    assert capsys.readouterr().out.count("tokens") == 16
    assert main(["--list", "--suite", "drawn", "--seed", "3"]) == 0
    assert cases.suite("drawn", 3)[-1].name in capsys.readouterr().out
    assert main(["--backend", "cpu", "--case", "nothing_like_it"]) == 2
    assert "no case" in capsys.readouterr().err
    assert main(["explain", "b1_q1_h128_k8192"]) == 0
    assert main(["compare", "/nowhere/a.json", "/nowhere/b.json"]) == 2
    assert main(["plot", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["explain", "--lens", "a,b"])
    assert "argument --lens: 'a,b' must be integers" in capsys.readouterr().err


def test_this_package_under_batch_invariant_is_a_peer(monkeypatch):
    knobs, decode = [], mla_numba.mla_decode
    monkeypatch.setattr(mla_numba, "mla_decode", lambda *arrays, **options: knobs.append(options) or decode(*arrays, **options))
    run = measure.start("cpu", ["invariant"])
    row = measure.measure_case(run, SMALL, LIMITS)
    assert row["peers_us"]["invariant"] > 0 and 0 < row["peers_rel_err"]["invariant"] < 0.01
    assert {(options.get("batch_invariant", False), options["plan"].shape.batch_invariant) for options in knobs} == {
        (False, False), (True, True)}


# Another checkout

def copy_package(folder):
    shutil.copytree(ROOT / "mla_numba", folder / "mla_numba", ignore=shutil.ignore_patterns("__pycache__", "data"))
    return folder


def packages_of_checkouts():
    return [name for name in sys.modules if name.startswith("mla_numba_of_") and "." not in name]


@pytest.fixture
def checkout(tmp_path):
    """A copy of the package in another folder."""
    yield copy_package(tmp_path / "before")
    for name in [name for name in sys.modules if name.startswith("mla_numba_of_")]:
        del sys.modules[name]


def test_another_checkout_is_a_peer(checkout):
    run = measure.start("cpu", [str(checkout)])
    assert list(run.peers) == ["before"] and run.absent == {}
    row = measure.measure_case(run, SMALL, LIMITS)
    assert row["peers_us"]["before"] > 0 and row["peers_rel_err"]["before"] == row["rel_err"]
    assert row["peers_version"]["before"] == "mla_numba of no commit"
    package, = (sys.modules[name] for name in packages_of_checkouts())
    assert package is not mla_numba and Path(package.dispatch.backend_module("cpu").__file__).is_relative_to(checkout)


def test_checkouts_in_folders_of_one_name_are_two_packages(checkout, tmp_path):
    folders = [checkout, copy_package(tmp_path / "elsewhere" / checkout.name)]
    for folder in folders:
        measure.start("cpu", [str(folder)])
    assert {Path(sys.modules[name].__file__).parents[1] for name in packages_of_checkouts()} == set(folders)
    with pytest.raises(ValueError, match="more than one contender would be called before"):
        measure.start("cpu", [str(folder) for folder in folders])


@pytest.mark.parametrize("name", ["numpy", "ours"])
def test_a_checkout_cannot_take_a_contenders_name(name):
    with pytest.raises(ValueError, match=f"more than one contender would be called {name}"):
        measure.start("cpu", [f"/any/{name}", "numpy"])


def test_a_checkout_that_cannot_stand_beside_this_one_is_absent(checkout):
    dispatch = checkout / "mla_numba" / "dispatch.py"
    dispatch.write_text(dispatch.read_text().replace('".host.cpu"', '"mla_numba.host.cpu"'))
    run = measure.start("cpu", [str(checkout), "./no/such/folder"])
    assert run.peers == {}
    assert "names its own package" in run.absent["before"] and "FileNotFoundError" in run.absent["folder"]
