"""This package as a peer, another way than the run's own calls."""

# Every peer has the same methods, whether it needs all their arguments or not.
# ruff: noqa: ARG002

from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import mla_numba
from perf import calls
from perf.cases import Case
from perf.inputs import Inputs
from perf.peers.base import Peer


class Ours(Peer):
    """`backend` and `library` are the run's; `knobs` are options of its plans and calls."""

    knobs: ClassVar[dict[str, bool]] = {}

    def __init__(self, backend: str, library: str):
        self._backend, self.library = backend, library

    def available(self) -> str | None:
        return None

    def supports(self, case: Case) -> str | None:
        return None

    def prepare(self, inputs: Inputs, variant: str) -> Callable[[], Any]:
        package = self._package()
        plan = calls.make_plan(package, inputs, self._backend, **self.knobs)
        return lambda: calls.decode(package, inputs, plan, self._backend, **self.knobs)

    def result(self, raw: tuple[Any, Any], inputs: Inputs) -> tuple[Any, Any]:
        return raw

    def _package(self) -> ModuleType:
        return mla_numba


class Invariant(Ours):
    """Under `batch_invariant`: what that costs, in turn with calls without."""

    name = "invariant"
    knobs: ClassVar[dict[str, bool]] = {"batch_invariant": True}

    def version(self) -> str:
        return "this one, batch_invariant=True"
