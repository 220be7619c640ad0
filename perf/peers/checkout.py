"""Another checkout of this repository: what a change is worth, in the same process, on the same inputs, in turn with what it changed."""

# Every peer has the same methods, whether it needs all their arguments or not.
# ruff: noqa: ARG002

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from perf import calls, machine
from perf.cases import Case
from perf.inputs import Inputs
from perf.peers.base import Peer, one_line


class Checkout(Peer):
    """Its name is the folder's.

    Parameters
    ----------
    folder : path
        The checkout; the package in it is imported under another name than this one's.
    backend, library : str
        The run's.
    """

    def __init__(self, folder: str | Path, backend: str, library: str):
        self._folder = Path(folder).resolve()
        self.name, self.library, self._backend = self._folder.name, library, backend

    def available(self) -> str | None:
        try:
            available = self._package().available_backends()
        except Exception as error:
            return one_line(error)
        return None if self._backend in available else f"its backend {self._backend} does not run here"

    def version(self) -> str:
        return f"mla_numba {machine.commit(self._folder) or 'of no commit'}"

    def supports(self, case: Case) -> str | None:
        return None

    def prepare(self, inputs: Inputs, variant: str) -> Callable[[], Any]:
        package = self._package()
        plan = calls.make_plan(package, inputs, self._backend)
        return lambda: calls.decode(package, inputs, plan, self._backend)

    def result(self, raw: tuple[Any, Any], inputs: Inputs) -> tuple[Any, Any]:
        return raw

    def _package(self) -> ModuleType:
        """Its `mla_numba`, imported once."""
        # Folders of one name are several packages.
        name = f"mla_numba_of_{hashlib.sha256(str(self._folder).encode()).hexdigest()[:12]}"
        if name not in sys.modules:
            root = self._folder / "mla_numba"
            # Until 2026-11-29 backends and kernels were imported by the package's name: those of this checkout would run.
            for module in ("dispatch.py", "host/launch.py"):
                if '"mla_numba.' in (root / module).read_text():
                    raise ImportError(f"{root / module} names its own package, so that it cannot stand beside another one")
            spec = importlib.util.spec_from_file_location(name, root / "__init__.py", submodule_search_locations=[str(root)])
            if spec is None or spec.loader is None:
                raise ImportError(f"{root} is no package")
            package = sys.modules[name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(package)
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]
