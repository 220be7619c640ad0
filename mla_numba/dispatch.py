"""Which backend runs a call: the first that can, or the one asked for; with reasons when none does."""

import importlib
from functools import cache
from types import ModuleType

from numba import cuda

from .arrays import ArrayView
from .config import DecodeShape
from .contract import BACKENDS
from .errors import BackendUnavailable
from .validate import require_choice

# A backend is a module with unavailable, unsupported, schedule_config, make_schedule, decode and merge_states. The first two are told the
# device of the arrays, as GPUs may differ; None is the current one. Its schedule_config and its make_schedule may make use of max_seq_len,
# or not. Its decode may return a `hopper.Launch`, which repeats it for arrays that lie alike;
# else it returns None.
_MODULES = {"hopper": ".host.hopper", "simt": ".host.simt", "cpu": ".host.cpu"}


@cache
def backend_module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name], __package__)


def unavailable(name: str, device: int | None = None) -> list[str]:
    """Why this machine, on this GPU or the current one, cannot run backend `name`; empty if it can."""
    if name not in _MODULES:
        return ["this version of mla_numba does not have it yet"]
    return list(backend_module(name).unavailable(device))


def available_backends() -> list[str]:
    """The backends that this machine can run, best first."""
    return [name for name in BACKENDS if not unavailable(name)]


def choose_backend(asked: str, shape: DecodeShape | None, device: int | None, kv_cache: ArrayView | None = None) -> str:
    """The backend for a call.

    Parameters
    ----------
    asked : str
        A backend's name, or "auto".
    shape : DecodeShape or None
        The call; None for calls that every backend takes, as `merge_states`.
    device : int or None
        CUDA ordinal of the arrays; None for host memory.
    kv_cache : ArrayView, optional
        The cache, where it is known: a backend may need it to lie in a certain way.

    Raises
    ------
    BackendUnavailable
        With the reasons of the backend asked for, or of all.
    """
    require_choice(asked, "backend", ("auto", *BACKENDS))
    reasons = {}
    for name in BACKENDS if asked == "auto" else (asked,):
        why = unavailable(name, device)
        if not why and shape is not None:
            why = list(backend_module(name).unsupported(shape, device))
            if kv_cache is not None and device is not None:
                why += getattr(backend_module(name), "unsupported_layout", lambda _: [])(kv_cache)
        if name == "cpu" and device is not None:
            why.append(f"the arrays are on cuda:{device}, and it reads host memory")
        if asked == "auto" and name != "cpu" and cuda.config.ENABLE_CUDASIM:
            why.append("the CUDA simulator is slow, and used only when asked for by name")
        if not why:
            return name
        reasons[name] = why
    raise BackendUnavailable(asked, reasons)
