"""What attention takes of a server's step: layers of a projection and a decode, in a CUDA graph, and one call after the other.

The suites time a call by itself, behind a flush. Here it has neighbours, as in a server: each of `LAYERS` layers multiplies by weights of
its own (DeepSeek-V3's projection to latents, 7,168 x 2,112 in bfloat16, 30 MB) and decodes over a cache of its own, so that both are cold
and what overlaps may overlap. Of a graph that is the GPU's time per layer, less the projection's; of eager calls the whole time per layer,
host and GPU, projection included.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from perf import measure
from perf.cases import Case, find
from perf.gate import Gate
from perf.inputs import make_inputs
from perf.peers.base import Peer, one_line
from perf.peers.ours import Ours
from perf.timer import Call, interleave

LAYERS, HIDDEN, PROJECTED = 32, 7168, 2112
ROUNDS, TRIAL_ROUNDS, EAGER_ROUNDS = 15, 3, 7
CASES = ("b1_q1_h128_k1024", "b1_q1_h16_k1024", "b4_q1_h128_k8192", "b16_q1_h128_k1024", "b32_q1_h16_k2048", "b64_q1_h128_k2048",
         "b128_q1_h16_k4096_normal", "azure_conv_32_h128", "azure_conv_128_h128", "mooncake_32_h16")

PROJECTION = "projection"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", action="append", metavar="NAME", help="a case, or any shape so named; may be given again")
    parser.add_argument("--peers", metavar="A,B", default="flashmla,fa3", help="beside it (%(default)s)")


def measure_steps(names: Sequence[str], peers: Sequence[str], console: Console) -> int:
    """Print a table of cases by name. Exit status: 1 where ours is wrong, or cannot."""
    run = measure.start("auto", peers)
    if run.library != "torch":
        raise ValueError(f"a step needs torch on a GPU, for graphs and projections; here is {run.backend} with {run.library} arrays")
    for name, why in run.absent.items():
        console.print(f"absent: {name}: {why}", style="dim", highlight=False, markup=False)
    contenders: dict[str, Peer] = {measure.OURS: Ours(run.backend, run.library), **run.peers}
    table = Table(title=f"us per layer of {LAYERS}: attention in a CUDA graph (and over ours) | eager, with the projection")
    for heading in ("case", "projection", *contenders, *(f"{name} eager" for name in contenders)):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    good = True
    for case in map(find, names):
        found = _measure(case, contenders, console)
        table.add_row(case.name, *_columns(found, contenders))
        good &= measure.OURS in found
        measure.free_memory(run)
    console.print(table)
    return 0 if good else 1


class _Step:
    """The layers' inputs and weights."""

    def __init__(self, case: Case):
        import torch

        first = make_inputs(case, "torch")
        self.layers = [first, *(replace(first, q=torch.randn_like(first.q), kv_cache=torch.randn_like(first.kv_cache))
                                for _ in range(LAYERS - 1))]
        options = {"device": first.q.device, "dtype": torch.bfloat16}
        self._weights = [torch.randn(HIDDEN, PROJECTED, **options) for _ in range(LAYERS)]
        self._hidden = torch.randn(case.batch * case.seq_len_q, HIDDEN, **options)
        self._projected = torch.empty(case.batch * case.seq_len_q, PROJECTED, **options)

    def of(self, calls: Sequence[Call]) -> Call:
        """The step whose layers call these."""
        import torch

        def step() -> None:
            for weights, call in zip(self._weights, calls, strict=True):
                torch.mm(self._hidden, weights, out=self._projected)
                call()

        return step


def _captured(step: Call) -> Any:
    import torch

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # Compiles, makes workspaces, and what the peers make in a first call.
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph


class _ReplayTimer:
    """A `Timer` of the replays of a step's graph: per layer, and nothing flushed, as its layers flush for one another."""

    flush_bytes = 0

    # A `Timer` takes a lead and what comes before; a replay needs neither.
    def sample(self, call: Call, lead_us: float = 0.0, before: Call | None = None) -> float:  # noqa: ARG002
        import torch

        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        self.wait()
        return float(begin.elapsed_time(end)) / LAYERS * 1e3

    def wait(self) -> None:
        import torch

        torch.cuda.synchronize()


def _eager_us(step: Call) -> float:
    import torch

    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / LAYERS * 1e6


def _best(peer: Peer, case: Case, made: _Step, gate: Gate) -> tuple[Any, Call] | str:
    """A graph of the peer's fastest variant, and the step in it; or why there is none."""
    reason, best = peer.supports(case), None
    for variant in peer.variants(case) if reason is None else ():
        calls = [peer.prepare(inputs, variant) for inputs in made.layers]
        reason = gate.check(*peer.result(calls[0](), made.layers[0])).reason
        if reason is None:
            step = made.of(calls)
            graph = _captured(step)
            trial_us = min(_ReplayTimer().sample(graph.replay) for _ in range(TRIAL_ROUNDS))
            if best is None or trial_us < best[0]:
                best = trial_us, graph, step
    return best[1:] if best is not None else reason or "it has no variant"


def _measure(case: Case, contenders: dict[str, Peer], console: Console) -> dict[str, tuple[float, float]]:
    """Per layer (of a graph, eager) in us, of the projection alone and of steps with each contender that can and is right."""
    made = _Step(case)
    gate, alone = Gate(made.layers[0]), made.of([lambda: None] * LAYERS)
    found: dict[str, tuple[Any, Call]] = {PROJECTION: (_captured(alone), alone)}
    for name, peer in contenders.items():
        try:
            best = _best(peer, case, made, gate)
        except Exception as error:
            best = one_line(error)
        if isinstance(best, str):
            console.print(f"{case.name}: {name}: {best}", style="dim", highlight=False, markup=False)
        else:
            found[name] = best
    samples = interleave(_ReplayTimer(), {name: graph.replay for name, (graph, _) in found.items()}, ROUNDS)
    return {name: (statistics.median(samples[name]), statistics.median(_eager_us(step) for _ in range(EAGER_ROUNDS)))
            for name, (_, step) in found.items()}


def _columns(found: dict[str, tuple[float, float]], contenders: dict[str, Peer]) -> list[str]:
    projection, _ = found[PROJECTION]
    attention = {name: graph_us - projection for name, (graph_us, _) in found.items()}
    ours = attention.get(measure.OURS)
    columns = [f"{projection:.1f}"]
    for name in contenders:
        over = f" ({attention[name] / ours:.2f})" if ours and name in found and name != measure.OURS else ""
        columns.append(f"{attention[name]:.1f}{over}" if name in found else "")
    return columns + [f"{found[name][1]:.1f}" if name in found else "" for name in contenders]
