"""Runs cases: ours and the peers on the same inputs, each behind the gate, timed in turn; one row of a results file per case."""

import contextlib
import datetime
import gc
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import mla_numba
from mla_numba.dispatch import backend_module
from perf import calls, ceilings, machine, results, traffic
from perf.cases import Case
from perf.gate import Gate
from perf.inputs import Inputs, make_inputs
from perf.peers import CPU_PEERS, GPU_PEERS, PEERS, Peer
from perf.peers.base import one_line
from perf.peers.checkout import Checkout
from perf.peers.ours import Invariant
from perf.timer import MIN_SAMPLES, Call, CudaTimer, HostTimer, Timer, first_call, host_us, interleave, spread

# A peer that takes longer on a GPU, or on a CPU, is left out: twenty samples of it would be the run.
PEER_CAP_US, CPU_PEER_CAP_US = 60_000.0, 1_000_000.0
TUNING_SAMPLES = 3
PART_SAMPLES = 10
# The device is kept busy for so much longer than the host took for a call when it was asked alone.
LEAD_FACTOR, LEAD_EXTRA_US = 1.5, 100.0
OURS, UNPLANNED = "ours", "ours, unplanned"
PARTS = {"schedule": "plan_us", "decode": "decode_us", "merge": "merge_us"}

Report = Callable[[str], None]


class GateError(Exception):
    """Our own result is wrong: there is no row to write."""


@dataclass
class Contender:
    """A call that passed the gate, and what is known of it before it is timed."""

    call: Call
    rel_err: float
    first_s: float
    host_us: float | None = None
    note: str = ""


@dataclass
class Run:
    """What a run has in common for all its cases.

    Attributes
    ----------
    backend : str
        A backend that this machine runs; its place decides the timer and the library of the inputs.
    peers : dict
        Those that can be used here, by name.
    absent : dict
        Those that cannot, with the reason.
    choices : dict
        Variants that peers keep from case to case.
    """

    backend: str
    timer: Timer
    library: str
    samples: int
    peers: dict[str, Peer]
    absent: dict[str, str]
    choices: dict[Any, str] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.backend != "cpu"

    @property
    def peer_cap_us(self) -> float:
        return PEER_CAP_US if self.on_gpu else CPU_PEER_CAP_US


def start(backend: str = "auto", peer_names: Sequence[str] | None = None, samples: int = MIN_SAMPLES) -> Run:
    """Choose backend and peers for this machine.

    Parameters
    ----------
    peer_names : sequence of str, optional
        Peers' names, folders of other checkouts of this repository, which have a slash, and "invariant", this one under `batch_invariant`.
        Default: all other implementations that take arrays of the backend's place.

    Raises
    ------
    ValueError
        The backend cannot run here, a peer's name is unknown, two contenders would have one
        name, or fewer than `MIN_SAMPLES` samples are asked for.
    """
    available = mla_numba.available_backends()
    if backend == "auto":
        backend = available[0]
    elif backend not in available:
        from mla_numba.dispatch import unavailable

        raise mla_numba.BackendUnavailable(backend, {backend: unavailable(backend)})
    if samples < MIN_SAMPLES:
        raise ValueError(f"samples={samples} must be at least {MIN_SAMPLES}: p10 and p90 of fewer mean nothing")
    names = (CPU_PEERS if backend == "cpu" else GPU_PEERS) if peer_names is None else peer_names
    known = [*PEERS, Invariant.name]
    unknown = [name for name in names if name not in known and "/" not in name]
    if unknown:
        raise ValueError(f"no peer {', '.join(unknown)}; there are {', '.join(known)}, and folders of other checkouts, with a slash")
    library = "numpy" if backend == "cpu" else "torch" if _torch_with_gpu() else "numba"
    ours = {Invariant.name: Invariant(backend, library)}
    peers = [PEERS.get(name) or ours.get(name) or Checkout(name, backend, library) for name in names]
    repeated = [name for name, count in Counter([OURS, UNPLANNED, *(peer.name for peer in peers)]).items() if count > 1]
    if repeated:
        raise ValueError(f"more than one contender would be called {', '.join(repeated)}; a checkout's name is its folder's")
    absent = {peer.name: _why_not(peer, library) for peer in peers}
    return Run(backend, HostTimer() if backend == "cpu" else CudaTimer(), library, samples,
               {peer.name: peer for peer in peers if absent[peer.name] is None},
               {name: reason for name, reason in absent.items() if reason is not None})


def _torch_with_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def _why_not(peer: Peer, library: str) -> str | None:
    reason = peer.available()
    if reason is None and peer.library != library:
        reason = f"takes arrays of {peer.library}, this run's are of {library}"
    return reason


def new_document(run: Run, commit: str | None = None) -> results.Results:
    """A results file without rows: provenance, and the ceilings, which are measured here."""
    peers = {f"peer {name}": peer.version() for name, peer in run.peers.items()}
    peers |= {f"peer {name}": f"absent: {why}" for name, why in run.absent.items()}
    device = machine.describe_gpu() if run.on_gpu else machine.describe_cpu()
    device["before"] = _clocks(run)
    device["power_limit_w"] = device["before"].get("power_limit_w")
    return {"device": device, "versions": machine.versions() | peers, "commit": commit or machine.commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "ceilings": ceilings.measure(run.timer), "rows": []}


def _clocks(run: Run) -> dict[str, Any]:
    return machine.Nvml().now() if run.on_gpu else {}


def measure(run: Run, cases: Iterable[Case], path: str | Path, *, time_limit: float = math.inf, commit: str | None = None,
            report: Report = lambda text: None, starting: Report = lambda text: None) -> tuple[results.Results, list[str]]:
    """Measure `cases` into a new results file at `path`, which is whole after each of them.

    Parameters
    ----------
    time_limit : float
        Seconds after which no further case is begun.
    report, starting : callable
        Told a line for each row; told what is being done.

    Returns
    -------
    document : dict
    failures : list of str
        A line for each case without a row: its result was wrong, or it could not run, or time was up.
    """
    begin = time.perf_counter()
    starting("ceilings")
    results.write(path, new_document(run, commit))
    failures = []
    for case in cases:
        if time.perf_counter() - begin > time_limit:
            failures.append(f"{case.name}: not begun, {time_limit:.0f} s were over")
            continue
        starting(case.name)
        try:
            row = measure_case(run, case, results.load(path)["ceilings"], starting)
        except Exception as error:
            # One case may lack memory, or be wrong; the others are worth their time.
            failures.append(f"{case.name}: {one_line(error)}")
            report(failures[-1])
            continue
        results.append(path, row)
        report(case.name)
    document = results.load(path)
    document["device"]["after"] = _clocks(run)
    document["device"]["seconds"] = round(time.perf_counter() - begin, 1)
    results.write(path, document)
    return document, failures


def measure_case(run: Run, case: Case, limits: dict[str, float | None], starting: Report = lambda text: None) -> results.Row:
    """A row of the results file.

    Raises
    ------
    GateError
        Our own result is wrong.
    """
    try:
        inputs = make_inputs(case, run.library)
        gate = Gate(inputs)
        starting(f"{case.name}: {run.backend}")
        contenders = _our_contenders(run, inputs, gate)
        notes = {name: f"absent: {why}" for name, why in run.absent.items()}
        for name, peer in run.peers.items():
            starting(f"{case.name}: {name}")
            found = _peer_contender(run, peer, inputs, gate)
            if isinstance(found, Contender):
                contenders[name] = found
                notes |= {name: found.note} if found.note else {}
            else:
                notes[name] = found
        starting(f"{case.name}: {len(contenders)} contenders in turn")
        lead_us = {name: LEAD_FACTOR * contender.host_us + LEAD_EXTRA_US for name, contender in contenders.items() if contender.host_us}
        samples = interleave(run.timer, {name: contender.call for name, contender in contenders.items()}, run.samples, lead_us)
        parts = _parts(run, contenders.get(UNPLANNED), lead_us.get(UNPLANNED, 0.0))
        return _row(run, case, limits, contenders, samples, parts, notes)
    finally:
        # What the frames of this case held is garbage now; the next case may need the memory.
        inputs = gate = contenders = None
        free_memory(run)


def free_memory(run: Run) -> None:
    gc.collect()
    if run.library == "torch":
        import torch

        torch.cuda.empty_cache()


def _our_contenders(run: Run, inputs: Inputs, gate: Gate) -> dict[str, Contender]:
    """With a plan made before, as the peers' metadata are; on a GPU also planning for itself, where the plan is not a case's own."""
    plan, plan_s = first_call(run.timer, lambda: calls.make_plan(mla_numba, inputs, run.backend))
    planned = _admitted(run, lambda: calls.decode(mla_numba, inputs, plan, run.backend), lambda raw: raw, gate)
    if isinstance(planned, str):
        raise GateError(planned)
    planned.first_s += plan_s
    contenders = {OURS: planned}
    if run.on_gpu and inputs.case.num_workers is None:
        unplanned = _admitted(run, lambda: calls.decode(mla_numba, inputs, None, run.backend), lambda raw: raw, gate)
        if isinstance(unplanned, str):
            raise GateError(f"without a plan: {unplanned}")
        contenders[UNPLANNED] = unplanned
    return contenders


def _admitted(run: Run, call: Call, result: Callable[[Any], tuple[Any, Any]], gate: Gate, cap_us: float = math.inf) -> Contender | str:
    """The contender, its host cost measured, if its result is right and it is quick enough; else why not."""
    raw, first_s = first_call(run.timer, call)
    verdict = gate.check(*result(raw))
    if verdict.reason is not None:
        return f"failed: {verdict.reason}"
    contender = Contender(call, verdict.rel_err, first_s)
    microseconds = run.timer.sample(call)
    if microseconds > cap_us:
        return f"skipped: {microseconds / 1e3:.0f} ms a call"
    if run.on_gpu:
        contender.host_us = host_us(run.timer, call, microseconds)
    return contender


def _peer_contender(run: Run, peer: Peer, inputs: Inputs, gate: Gate) -> Contender | str:
    """The peer's fastest variant; or why it has none. A peer's own error is a reason, and no end of the run."""
    case = inputs.case
    reason = "our own knob: its time is that of the case without it" if case.num_workers is not None else peer.supports(case)
    if reason is not None:
        return f"not supported: {reason}"
    key = (peer.name, peer.tuning_key(case))
    kept = run.choices.get(key)
    variants = peer.variants(case) if kept is None else (kept,)
    found: dict[str, Contender] = {}
    reasons: dict[str, str] = {}
    for variant in variants:
        try:
            admitted = _admitted(run, peer.prepare(inputs, variant), lambda raw: peer.result(raw, inputs), gate, run.peer_cap_us)
        except Exception as error:
            admitted = f"failed: {one_line(error)}"
        if isinstance(admitted, Contender):
            found[variant] = admitted
        else:
            reasons[variant] = admitted
    if not found:
        return next(iter(reasons.values()))
    best = _fastest(run, found)
    if peer.tuning_key(case) is not None:
        run.choices[key] = best
    contender = found[best]
    if len(peer.variants(case)) > 1:
        contender.note = f"splits: {best}, of {', '.join(peer.variants(case))}"
    contender.note += "".join(f"; splits {variant} {why}" for variant, why in reasons.items())
    return contender


def _fastest(run: Run, found: dict[str, Contender]) -> str:
    if len(found) == 1:
        return next(iter(found))
    lead_us = {name: LEAD_FACTOR * contender.host_us + LEAD_EXTRA_US for name, contender in found.items() if contender.host_us}
    samples = interleave(run.timer, {name: contender.call for name, contender in found.items()}, TUNING_SAMPLES, lead_us)
    return min(samples, key=lambda name: statistics.median(samples[name]))


@contextlib.contextmanager
def traced_launches(backend: str) -> Iterator[list[tuple[str, Any, Any]]]:
    """(kernel's name, event before, event after) of what `backend` launches inside the block, by Numba or by the driver. The events
    keep a kernel from starting before the one ahead of it has ended."""
    from numba import cuda

    from mla_numba.host import launch

    configured = launch.configured
    launches: list[tuple[str, Any, Any]] = []

    def timed(name: str, call: Call) -> None:
        begin, end = cuda.event(), cuda.event()
        begin.record()
        call()
        end.record()
        launches.append((name, begin, end))

    def traced(kernel: Any, *configuration: Any) -> Callable[..., None]:
        return lambda *arguments: timed(kernel.py_func.__name__, lambda: configured(kernel, *configuration)(*arguments))

    with contextlib.ExitStack() as stack:
        for module in (launch, backend_module(backend)):
            if hasattr(module, "configured"):
                stack.enter_context(mock.patch.object(module, "configured", traced))
        if backend == "hopper":
            from mla_numba.host.gpu import BoundKernel

            launched = BoundKernel.launch
            stack.enter_context(mock.patch.object(BoundKernel, "launch", lambda kernel, stream: timed(
                kernel.spec.name, lambda: launched(kernel, stream))))
        yield launches


def _parts(run: Run, unplanned: Contender | None, lead_us: float) -> dict[str, float]:
    """Medians of our kernels' own times, by events around each."""
    if unplanned is None:
        return {}
    times: dict[str, list[float]] = {}
    for _ in range(PART_SAMPLES):
        with traced_launches(run.backend) as launches:
            # Events of their own for each kernel cost the host as much again.
            run.timer.sample(unplanned.call, 2 * lead_us)
        for kernel, begin, end in launches:
            part = next((name for word, name in PARTS.items() if word in kernel), None)
            if part is not None:
                times.setdefault(part, []).append(begin.elapsed_time(end) * 1e3)
    return {part: statistics.median(values) for part, values in times.items()}


def _row(run: Run, case: Case, limits: dict[str, float | None], contenders: dict[str, Contender], samples: dict[str, list[float]],
         parts: dict[str, float], notes: dict[str, str]) -> results.Row:
    work = traffic.work(case)
    spreads = {name: spread(values) for name, values in samples.items()}
    ours, planned = spreads[OURS], contenders[OURS]
    peers = [name for name in contenders if name in run.peers]
    tflops = limits.get("bf16_matmul_tflops") if run.on_gpu else limits.get("f32_matmul_tflops")
    # Without torch and CuPy nobody multiplied matrices: only memory can be said to bind.
    binds, floor_us = traffic.bound(work, float(limits["read_gbs"] or 0), tflops or math.inf)
    if UNPLANNED in spreads:
        parts = {**parts, "unplanned_us": spreads[UNPLANNED].median}
    return {
        "case": case.name, "suite": case.suite, "kernel": "dense_decode", "backend": run.backend, "batch": case.batch,
        "seq_len_q": case.seq_len_q, "num_heads_q": case.num_heads_q, "seq_len_k_mean": case.seq_len_k_mean,
        "seq_lens": list(case.seq_lens), "varlen": case.varlen, "causal": case.causal, "page_size": case.page_size, "dtype": case.dtype,
        "num_workers": case.num_workers,
        "ours_us": ours.median, "ours_us_p10": ours.p10, "ours_us_p90": ours.p90,
        "samples_us": [round(value, 3) for value in samples[OURS]], "host_us": planned.host_us, "compile_s": planned.first_s,
        "kernel_us": parts, "tflops": work.tflops(ours.median), "gbs": work.gbs(ours.median), "bound": binds,
        "sol": floor_us / ours.median, "rel_err": planned.rel_err,
        "peers_us": {**dict.fromkeys(notes), **{name: spreads[name].median for name in peers}},
        "peers_us_p10": {name: spreads[name].p10 for name in peers}, "peers_us_p90": {name: spreads[name].p90 for name in peers},
        "peers_host_us": {name: contenders[name].host_us for name in peers},
        "peers_rel_err": {name: contenders[name].rel_err for name in peers},
        "peers_version": {name: run.peers[name].version() for name in peers},
        "peers_note": notes,
    }
