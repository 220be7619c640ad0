"""This package under `batch_invariant`: what that costs, in turn with calls without."""

# Every peer has the same methods, whether it needs all their arguments or not.
# ruff: noqa: ARG002

from collections.abc import Callable
from typing import Any

import mla_numba
from perf import calls
from perf.cases import Case
from perf.inputs import Inputs
from perf.peers.base import Peer


class Invariant(Peer):
    """`backend` and `library` are the run's."""

    name = "invariant"

    def __init__(self, backend: str, library: str):
        self._backend, self.library = backend, library

    def available(self) -> str | None:
        return None

    def version(self) -> str:
        return "this one, batch_invariant=True"

    def supports(self, case: Case) -> str | None:
        return None

    def prepare(self, inputs: Inputs, variant: str) -> Callable[[], Any]:
        plan = calls.make_plan(mla_numba, inputs, self._backend, batch_invariant=True)
        return lambda: calls.decode(mla_numba, inputs, plan, self._backend, batch_invariant=True)

    def result(self, raw: tuple[Any, Any], inputs: Inputs) -> tuple[Any, Any]:
        return raw
