"""Another checkout of this repository: what a change is worth, in the same process, on the same inputs, in turn with what it changed."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from perf import machine
from perf.peers.base import one_line
from perf.peers.ours import Ours


class Checkout(Ours):
    """Its name is the folder's.

    Parameters
    ----------
    folder : path
        The checkout; the package in it is imported under another name than this one's.
    backend, library : str
        The run's.
    """

    def __init__(self, folder: str | Path, backend: str, library: str):
        super().__init__(backend, library)
        self._folder = Path(folder).resolve()
        self.name = self._folder.name

    def available(self) -> str | None:
        try:
            available = self._package().available_backends()
        except Exception as error:
            return one_line(error)
        return None if self._backend in available else f"its backend {self._backend} does not run here"

    def version(self) -> str:
        return f"mla_numba {machine.commit(self._folder) or 'of no commit'}"

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
