"""What a peer is: something that decodes, and says of itself what it can."""

import hashlib
import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from perf.cases import Case
from perf.inputs import Inputs


class Peer:
    """Base of the adapters. What a call needs but a server makes once per step (metadata, plans, workspace) belongs into `prepare`.

    Attributes
    ----------
    name, library : str
        Its key in results; whose arrays it takes.
    """

    name = ""
    library = "torch"

    def available(self) -> str | None:
        """Why it cannot be used on this machine; None if it can."""
        raise NotImplementedError

    def version(self) -> str:
        """Of an available peer."""
        raise NotImplementedError

    def supports(self, case: Case) -> str | None:
        """Why it cannot run `case`; None if it can."""
        raise NotImplementedError

    def variants(self, case: Case) -> tuple[str, ...]:  # noqa: ARG002
        """Ways to run a case, of which the fastest counts; the first is the peer's own choice, if it has one."""
        return ("",)

    def tuning_key(self, case: Case) -> Any:
        """Cases of one key run the variant that was best for the first of them; None: decided anew for each case."""
        return None if len(self.variants(case)) > 1 else ""

    def prepare(self, inputs: Inputs, variant: str) -> Callable[[], Any]:
        """The call to time."""
        raise NotImplementedError

    def result(self, raw: Any, inputs: Inputs) -> tuple[Any, Any | None]:
        """out and lse of the contract (natural logarithm; None if it gives none) from what the call returned."""
        raise NotImplementedError


def import_first(*names: str) -> ModuleType:
    """The first of these modules that there is; raises the last one's ImportError."""
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return importlib.import_module(names[-1])


def why_no_import(*names: str) -> str | None:
    try:
        import_first(*names)
    except Exception as error:
        return one_line(error)
    return None


def why_no_gpu(capability: tuple[int, int] | None = None) -> str | None:
    """Why torch has no GPU (of that compute capability) here; None if it has."""
    reason = why_no_import("torch")
    if reason is not None:
        return reason
    import torch

    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    got = torch.cuda.get_device_capability()
    if capability is not None and got != capability:
        return f"needs compute capability {capability[0]}.{capability[1]}, this device has {got[0]}.{got[1]}"
    return None


def why_not_deepseek(case: Case) -> str | None:
    """Why a kernel made for DeepSeek's dims in 16 bits cannot run `case`."""
    if (case.head_dim_qk, case.head_dim_v) != (576, 512):
        return f"head dims {case.head_dim_qk} and {case.head_dim_v}: it has 576 and 512 only"
    if case.dtype == "float32":
        return "no float32"
    return None


def version_of(path: str | Path | None, *distributions: str) -> str:
    """Of the first distribution that is installed; else what identifies the file that was loaded."""
    for name in distributions:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    if path is None or not Path(path).is_file():
        return "unknown"
    return f"{Path(path).name} sha256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]}"


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
