"""What is under test: a backend of ours, or any function of the signature that every MLA decode can be given.

    f(q, kv_cache, block_table, seq_lens, head_dim_v, softmax_scale, causal) -> (out, lse)

A function that does not take a case (a dtype, a page size) says so by raising NotImplementedError; the case then counts as refused.
What a target can do beyond that signature are its `knobs`; a property that needs one it lacks is "not applicable" to it.
"""

import importlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from verify.cases import DTYPES, Inputs
from verify.checks import assert_result

ARRAY_KINDS = ("numpy", "numba", "torch", "cupy")

RAGGED = "ragged"                       # cu_seqlens_q=
OUT = "out"                             # out=, lse=: results into the caller's arrays
SPLITS = "splits"                       # plan=: a schedule for a given number of workers
BATCH_INVARIANT = "batch_invariant"     # batch_invariant=True
EMPTY_LSE = "empty_lse"                 # empty_lse="-inf"
MERGE = "merge"                         # its own merge_states
BAD_VALUES = "bad_values"               # wrong page ids and lengths read as zeros and as none
KNOBS = frozenset({RAGGED, OUT, SPLITS, BATCH_INVARIANT, EMPTY_LSE, MERGE, BAD_VALUES})


@dataclass(frozen=True)
class Target:
    """`decode` takes the seven arguments, and by keyword what its knobs name; `plan` and `merge` come with SPLITS and MERGE.

    `python` and `options` make the same target again, as an expression and on the command line.
    """

    name: str
    decode: Callable[..., Any]
    dims: tuple[str, ...]
    knobs: frozenset[str] = frozenset()
    plan: Callable[..., Any] | None = None
    merge: Callable[..., Any] | None = None
    arrays: str = "numpy"
    empty_lse: float = math.inf
    python: str = ""
    options: str = ""

    def arrays_of(self, inputs: Inputs) -> dict[str, Any]:
        """q, kv_cache, block_table and seq_lens as the target takes them; for NumPy's they are those of `inputs`."""
        named = {"q": inputs.q, "kv_cache": inputs.kv_cache, "block_table": inputs.block_table, "seq_lens": inputs.seq_lens}
        return {name: to_kind(array, self.arrays) for name, array in named.items()}

    def __call__(self, inputs: Inputs, given: dict[str, Any] | None = None, **knobs: Any) -> tuple[np.ndarray, np.ndarray]:
        """Decode `inputs`, as the arrays `given` if there are any, and check the form of the result."""
        if inputs.ragged:
            knobs["cu_seqlens_q"] = inputs.cu_seqlens_q
        # The default belongs to our contract; other functions are given the number.
        scale = inputs.softmax_scale if self.knobs or inputs.softmax_scale is not None else inputs.q.shape[-1] ** -0.5
        knobs = {name: to_kind(value, self.arrays) for name, value in knobs.items()}
        arrays = self.arrays_of(inputs) if given is None else given
        out, lse = self.decode(*arrays.values(), inputs.head_dim_v, scale, inputs.causal, **knobs)
        # Copies: the target may hand out the same memory in its next call.
        out, lse = np.array(to_numpy(out, inputs.dtype)), np.array(to_numpy(lse, "float32"))
        assert_result(out, lse, inputs.out_shape, inputs.lse_shape, inputs.dtype)
        return out, lse


def to_kind(array: Any, kind: str) -> Any:
    """A NumPy array as one of the library that the target takes, strides kept; on the GPU if there is one. Other values as they are."""
    if kind == "numpy" or not isinstance(array, np.ndarray):
        return array
    itemsize = array.itemsize
    # All that lies between the first element and the last, the poison in the gaps too, moves as one flat array.
    extent = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)) // itemsize + 1 if array.size else 0
    flat = np.array(np.lib.stride_tricks.as_strided(array, (extent,), (itemsize,)))
    if kind == "torch":
        import torch

        moved = torch.from_numpy(flat.view(f"i{itemsize}")).to("cuda" if torch.cuda.is_available() else "cpu")
        strides = [stride // itemsize for stride in array.strides]
        return torch.as_strided(moved.view(getattr(torch, str(array.dtype))), array.shape, strides)
    if kind == "cupy":
        import cupy

        return cupy.lib.stride_tricks.as_strided(cupy.asarray(flat), array.shape, array.strides)
    from numba import cuda

    # Numba has no bfloat16; its arrays of uint16 stand for it.
    moved = cuda.to_device(flat.view(np.uint16) if str(array.dtype) == "bfloat16" else flat)
    interface = {**moved.__cuda_array_interface__, "shape": array.shape, "strides": array.strides}
    return cuda.from_cuda_array_interface(interface, owner=moved)


def to_numpy(array: Any, dtype: str) -> np.ndarray:
    """What a target returned, as a NumPy array; `dtype` is what 16 bits without a name of their own stand for."""
    if type(array).__module__.startswith("torch"):
        import torch

        host = array.detach().cpu()
        array = host.view(torch.int16).numpy().view(DTYPES["bfloat16"]) if host.dtype is torch.bfloat16 else host.numpy()
    for to_host in ("copy_to_host", "get"):
        array = getattr(array, to_host)() if hasattr(array, to_host) else array
    return array.view(DTYPES[dtype]) if array.dtype == np.uint16 else array


def external(path: str, *, arrays: str = "numpy", dims: tuple[str, ...] = ("deepseek", "long"), empty_lse: float = math.inf) -> Target:
    """The target named "pkg.module:callable"."""
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"--target {path!r} must be of the form pkg.module:callable")
    function = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    if not callable(function):
        raise ValueError(f"--target {path!r} is {function!r}, but must be callable")
    return Target(path, function, dims, arrays=arrays, empty_lse=empty_lse,
                  options=f"--target {path} --arrays {arrays} --empty-lse={empty_lse:+}",
                  python=f"verify.targets.external({path!r}, arrays={arrays!r}, empty_lse=float('{empty_lse}'))")


def ours(backend: str, *, arrays: str | None = None) -> Target:
    """A backend of mla_numba with every knob of `mla_decode`. On a GPU it gets device arrays, with their strides, by default."""
    import mla_numba

    arrays = arrays or ("numpy" if backend == "cpu" or simulator() else "numba")

    def decode(q: Any, kv_cache: Any, block_table: Any, seq_lens: Any, head_dim_v: int, softmax_scale: float | None, causal: bool,
               **knobs: Any) -> Any:
        try:
            return mla_numba.mla_decode(q, kv_cache, block_table, seq_lens, head_dim_v=head_dim_v, softmax_scale=softmax_scale,
                                        causal=causal, backend=backend, **knobs)
        except mla_numba.BackendUnavailable as error:
            raise NotImplementedError(str(error)) from error

    def plan(inputs: Inputs, num_workers: int | None = None, batch_invariant: bool = False, max_seq_len: int | None = None) -> Any:
        cu_seqlens_q = to_kind(inputs.cu_seqlens_q, arrays)
        try:
            return mla_numba.plan_decode(
                to_kind(inputs.seq_lens, arrays), num_heads_q=inputs.q.shape[-2], seq_len_q=1 if inputs.ragged else inputs.q.shape[1],
                num_heads_kv=inputs.kv_cache.shape[2], page_size=inputs.kv_cache.shape[1], head_dim_qk=inputs.q.shape[-1],
                head_dim_v=inputs.head_dim_v, dtype=inputs.dtype, causal=inputs.causal, cu_seqlens_q=cu_seqlens_q, backend=backend,
                batch_invariant=batch_invariant, num_workers=num_workers, max_seq_len=max_seq_len)
        except mla_numba.BackendUnavailable as error:
            raise NotImplementedError(str(error)) from error

    def merge(states: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        out, lse = mla_numba.merge_states([(to_kind(out, arrays), to_kind(lse, arrays)) for out, lse in states], backend=backend)
        return to_numpy(out, str(states[0][0].dtype)), to_numpy(lse, "float32")

    dims: tuple[str, ...] = ("deepseek", "long") if backend == "hopper" else ("small", "deepseek", "long")
    if backend != "cpu" and simulator():
        dims = ("tiny",)
    return Target(backend, decode, dims, KNOBS, plan, merge, arrays, python=f"verify.targets.ours({backend!r}, arrays={arrays!r})",
                  options=f"--backend {backend} --arrays {arrays}")


def emulated(seed: int = 0) -> Target:
    """The Hopper kernels in the emulator, every call on another schedule. It has no merge_states: that is simt's."""
    from mla_numba import validate
    from mla_numba.arrays import view
    from mla_numba.host.schedule import Schedule
    from verify.emulator import device

    seeds = itertools.count(seed)

    def decode(*arguments: Any, **knobs: Any) -> tuple[np.ndarray, np.ndarray]:
        return device.decode(*arguments, **knobs, device=device.EmulatedGpu(next(seeds)))

    def plan(inputs: Inputs, num_workers: int | None = None, batch_invariant: bool = False, max_seq_len: int | None = None) -> Schedule:
        offsets = None if inputs.cu_seqlens_q is None else view(inputs.cu_seqlens_q, "cu_seqlens_q")
        arrays = (inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens)
        views = [view(array, name) for array, name in zip(arrays, ("q", "kv_cache", "block_table", "seq_lens"), strict=True)]
        shape = validate.decode_shape(*views, offsets, inputs.head_dim_v, inputs.causal, batch_invariant)
        changes = {} if num_workers is None else {"num_workers": num_workers}
        return device.make_schedule(shape, inputs.seq_lens, inputs.cu_seqlens_q, 2, max_seq_len, **changes)

    return Target("emulated", decode, ("emulated",), KNOBS - {MERGE}, plan, python=f"verify.targets.emulated({seed})", options="--emulated")


def simulator() -> bool:
    """Whether Numba runs CUDA kernels in Python (NUMBA_ENABLE_CUDASIM=1)."""
    from numba import config

    return bool(config.ENABLE_CUDASIM)
