"""What attention takes of a server's step: layers of a projection and a decode, in a CUDA graph, and one call after the other.

The suites time a call by itself, behind a flush. Here it has neighbours, as in a server: each of `LAYERS` layers multiplies by weights of
its own (DeepSeek-V3's projection to latents, 7,168 x 2,112 in bfloat16, 30 MB) and decodes over a cache of its own, so that both are cold
and what overlaps may overlap. Of a graph that is the GPU's time per layer, less the projection's; of eager calls the whole time per layer,
host and GPU, projection included.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
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

LAYERS, HIDDEN, PROJECTED = 32, 7168, 2112
ROUNDS, TRIAL_ROUNDS, EAGER_ROUNDS = 15, 3, 7
CASES = ("b1_q1_h128_k1024", "b1_q1_h16_k1024", "b4_q1_h128_k8192", "b16_q1_h128_k1024", "b32_q1_h16_k2048", "b64_q1_h128_k2048",
         "b128_q1_h16_k4096_normal", "azure_conv_32_h128", "azure_conv_128_h128", "mooncake_32_h16")

Call = Callable[[], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", action="append", metavar="NAME", help="a case, or any shape so named; may be given again")
    parser.add_argument("--peers", metavar="A,B", default="flashmla,fa3", help="beside it (%(default)s)")


def run(args: argparse.Namespace, console: Console) -> int:
    found = measure.start("auto", args.peers.split(","))
    if found.library != "torch":
        raise ValueError(f"a step needs torch on a GPU, for graphs and projections; here is {found.backend} with {found.library} arrays")
    for name, why in found.absent.items():
        console.print(f"absent: {name}: {why}", style="dim", highlight=False, markup=False)
    contenders: dict[str, Peer] = {"ours": Ours(found.backend, found.library), **found.peers}
    table = Table(title=f"us per layer of {LAYERS}: attention in a CUDA graph (and over ours) | eager, with the projection")
    for heading in ("case", "projection", *contenders, *(f"{name} eager" for name in contenders)):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for name in args.case or CASES:
        table.add_row(*_row(find(name), contenders, console))
        # Of a case graphs hold the caches; the next one may need the memory.
        gc.collect()
    console.print(table)
    return 0


class _Step:
    """The layers, their projection captured alone."""

    def __init__(self, case: Case):
        import torch

        first = make_inputs(case, "torch")
        self.layers = [first, *(replace(first, q=torch.randn_like(first.q), kv_cache=torch.randn_like(first.kv_cache))
                                for _ in range(LAYERS - 1))]
        options = {"device": "cuda", "dtype": torch.bfloat16}
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
    with torch.cuda.stream(stream):
        # Compiles, makes workspaces, and what the peers make in a first call.
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph


def _graph_us(graph: Any) -> float:
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / LAYERS * 1e3


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
            trial_us = min(_graph_us(graph) for _ in range(TRIAL_ROUNDS))
            if best is None or trial_us < best[0]:
                best = trial_us, graph, step
    return best[1:] if best is not None else reason or "it has no variant"


def _row(case: Case, contenders: dict[str, Peer], console: Console) -> list[str]:
    made = _Step(case)
    gate, alone = Gate(made.layers[0]), made.of([lambda: None] * LAYERS)
    found: dict[str, tuple[Any, Call]] = {"projection": (_captured(alone), alone)}
    for name, peer in contenders.items():
        try:
            best = _best(peer, case, made, gate)
        except Exception as error:
            best = one_line(error)
        if isinstance(best, str):
            console.print(f"{case.name}: {name}: {best}", style="dim", highlight=False, markup=False)
        else:
            found[name] = best
    samples: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(ROUNDS):
        names = list(found)
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            samples[name].append(_graph_us(found[name][0]))
    graph_us = {name: statistics.median(times) for name, times in samples.items()}
    projection = graph_us["projection"]
    ours = graph_us.get("ours", projection) - projection
    row = [case.name, f"{projection:.1f}"]
    for name in contenders:
        us = graph_us.get(name, projection) - projection
        row.append("" if name not in found else f"{us:.1f}" if name == "ours" or ours == 0 else f"{us:.1f} ({us / ours:.2f})")
    return row + ["" if name not in found else f"{statistics.median(_eager_us(found[name][1]) for _ in range(EAGER_ROUNDS)):.1f}"
                  for name in contenders]
