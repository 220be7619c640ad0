"""The public calls: validate, plan, allocate, launch. The only place where all parts meet."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from . import validate
from .arrays import (
    ArrayView,
    address_of,
    allocator,
    current_stream,
    device_words,
    empty_like_kind,
    fingerprint,
    on_device,
    recogniser,
    stream_handle,
    to_host,
    view,
)
from .config import DecodeShape
from .contract import DTYPES, HEAD_DIM_QK, HEAD_DIM_V
from .dispatch import backend_module, choose_backend
from .errors import StalePlanError
from .host.launch import numba_stream
from .host.schedule import Schedule, make_host_schedule
from .scheduler import JOB_REQUEST, JOB_SEQ_LEN

# Calls kept for plans of one shape, and without a plan; they may differ in strides and options. And shapes of plans: a server's batch
# sizes. One that has to be prepared anew takes 0.14 ms of a step (a 2-core Xeon, with a stubbed driver).
_MAX_PREPARED_CALLS, _MAX_SHAPES = 16, 256


@dataclass(frozen=True)
class Plan:
    """How a batch is cut over the workers; made by `plan_decode`, good for every layer of a step.

    Attributes
    ----------
    backend : str
        The backend that it is for.
    shape : DecodeShape
        The shape of the calls that it serves.
    device : int or None
        CUDA ordinal; None for host memory.
    schedule : Schedule
        The tables (see `mla_numba.scheduler`).
    gpu : int or None
        Where they lie, and calls run: `device`, or for host memory the GPU that was current; None if on none.
    """

    backend: str
    shape: DecodeShape
    device: int | None
    schedule: Schedule = field(repr=False)
    gpu: int | None

    @cached_property
    def _prepared(self) -> "list[_PreparedCall]":
        """What calls with plans for the same shape have prepared, the last one first."""
        return _prepared_calls(self.backend, self.shape, self.device, self.schedule.config, self.schedule.extra_splits)


@lru_cache(maxsize=_MAX_SHAPES)
def _prepared_calls(*_plan: Any) -> "list[_PreparedCall]":
    """Without arguments: of calls that plan for themselves."""
    return []


def plan_decode(seq_lens: Any, *, num_heads_q: int, seq_len_q: int = 1, num_heads_kv: int = 1, page_size: int = 64,
                head_dim_qk: int = HEAD_DIM_QK, head_dim_v: int = HEAD_DIM_V, dtype: str = "bfloat16", causal: bool = True,
                cu_seqlens_q: Any = None, total_q: int | None = None, batch_invariant: bool = False, backend: str = "auto",
                num_workers: int | None = None, max_seq_len: int | None = None, stream: Any = None) -> Plan:
    """Cut a batch over the workers of a backend, once for all layers of a decoding step.

    Parameters
    ----------
    seq_lens : array, (batch,) int32
        Tokens of each request, in host or device memory; on a device it is read by a kernel on `stream`, not by the host.
    num_heads_q, seq_len_q, num_heads_kv, page_size, head_dim_qk, head_dim_v : int
        As the shapes of `mla_decode`'s arguments. `seq_len_q` is ignored with `cu_seqlens_q`.
    dtype : {"bfloat16", "float16", "float32"}
        Of q and the cache.
    causal, batch_invariant, backend, stream
        As in `mla_decode`.
    cu_seqlens_q : array, (batch + 1,) int32, optional
        For ragged queries.
    total_q : int, optional
        Rows of the ragged q. Without it the last entry of `cu_seqlens_q` is read, which on a device waits for it.
    num_workers : int, optional
        Workers to cut for, instead of what fills the machine. The result differs by rounding only.
    max_seq_len : int, optional
        No request has more tokens. Without it nobody on the host knows, as lengths on a device are read there; with it short calls are cut
        in a way that suits them (up to 40% less time with `hopper`). A longer request is attended all the same, if not as fast (told 512 or
        less, maybe by one worker alone), and the result differs by rounding only. While a CUDA graph is captured a batch-invariant plan
        needs it, and the workspace is sized by it.

    Returns
    -------
    Plan
        For `mla_decode(..., plan=plan)` with the same shapes and lengths.

    Raises
    ------
    ValueError, TypeError
        An argument breaks a rule; the message names it.

    Notes
    -----
    On the current stream of torch or CuPy the tables are their memory, if `seq_lens` is theirs: keep the plan until what another stream
    does with it is done, as with any of their arrays.
    """
    lens = view(seq_lens, "seq_lens", stream)
    validate.require_ndim(lens, 1, "(batch,)")
    validate.require_dtype(lens, ("int32",))
    validate.require_whole_elements(lens)
    stream_int = stream_handle(stream, lens.kind, lens.device)
    batch = lens.shape[0]
    num_heads_q = validate.require_count(num_heads_q, "num_heads_q")
    num_heads_kv = validate.require_count(num_heads_kv, "num_heads_kv")
    validate.require_heads(num_heads_q, num_heads_kv)
    head_dim_qk = validate.require_count(head_dim_qk, "head_dim_qk")
    head_dim_v = validate.require_count(head_dim_v, "head_dim_v")
    validate.require_head_dims(head_dim_qk, head_dim_v)
    cu_seqlens = None
    if cu_seqlens_q is None:
        seq_len_q = validate.require_count(seq_len_q, "seq_len_q")
        total_q = batch * seq_len_q
    else:
        cu_seqlens = view(cu_seqlens_q, "cu_seqlens_q", stream)
        validate.require_cu_seqlens_shape(cu_seqlens, batch)
        validate.require_same_place([lens, cu_seqlens])
        seq_len_q = 0
        total_q = validate.require_count(int(to_host(cu_seqlens, stream_int)[-1]) if total_q is None else total_q, "total_q", least=0)
    shape = DecodeShape(batch, seq_len_q, total_q, num_heads_q, num_heads_kv, head_dim_qk, head_dim_v,
                        validate.require_count(page_size, "page_size"), validate.require_choice(dtype, "dtype", DTYPES),
                        validate.require_flag(causal, "causal"), validate.require_flag(batch_invariant, "batch_invariant"))
    if num_workers is not None:
        num_workers = validate.require_count(num_workers, "num_workers")
    if max_seq_len is not None:
        max_seq_len = validate.require_count(max_seq_len, "max_seq_len", least=0)
    name = choose_backend(backend, shape, lens.device)
    with on_device(lens.device):
        return make_plan(name, shape, lens, cu_seqlens, stream, max_seq_len, num_workers=num_workers)


def mla_decode(q: Any, kv_cache: Any, block_table: Any, seq_lens: Any, *, head_dim_v: int = HEAD_DIM_V,
               softmax_scale: float | None = None, causal: bool = True, cu_seqlens_q: Any = None, plan: Plan | None = None,
               out: Any = None, lse: Any = None, backend: str = "auto", batch_invariant: bool = False, empty_lse: str = "+inf",
               check_values: bool = False, stream: Any = None) -> tuple[Any, Any]:
    """Attention of a few new query tokens per request over its paged latent KV cache.

    Parameters
    ----------
    q : array, (batch, seq_len_q, num_heads_q, head_dim_qk), or (total_q, num_heads_q, head_dim_qk) with `cu_seqlens_q`
        bfloat16, float16 or float32; last axis contiguous.
    kv_cache : array, (num_pages, page_size, num_heads_kv, head_dim_qk), dtype of q
        K; its first `head_dim_v` columns are V. Last axis contiguous, other strides free.
    block_table : array, (batch, max_pages) int32
        The page that holds each `page_size` tokens of a request.
    seq_lens : array, (batch,) int32
        Tokens of each request, the new ones included.
    head_dim_v : int
        Columns of K that are V.
    softmax_scale : float, optional
        Factor on q·k; default head_dim_qk ** -0.5.
    causal : bool
        Query token s of a request of length L sees the tokens before L - (seq_len_q - 1 - s); otherwise every query sees all L.
    cu_seqlens_q : array, (batch + 1,) int32, optional
        Ragged queries: request i has the rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q.
    plan : Plan, optional
        From `plan_decode` with the same shapes and lengths; without it the call plans for itself.
    out, lse : array, optional
        Where to write the results.
    backend : {"auto", "hopper", "simt", "cpu"}
        "auto" takes the first that can; a name is used or refused.
    batch_invariant : bool
        A request's result is bitwise the same alone and in any batch.
    empty_lse : {"+inf", "-inf"}
        lse of a query row that sees no token; its out is exactly 0.
    check_values : bool
        Also check lengths, page ids, offsets and the plan's lengths. On a device this waits for the values.
    stream : int or stream object, optional
        Default: the current stream of the arrays' library, of whose memory results are that are not given: another one must wait for it.

    Returns
    -------
    out : array, (batch, seq_len_q, num_heads_q, head_dim_v), or (total_q, num_heads_q, head_dim_v)
        dtype, library and place of q.
    lse : array, (batch, num_heads_q, seq_len_q), or (num_heads_q, total_q)
        float32, natural logarithm of the sum of exp(softmax_scale * q·k) over the tokens seen.

    Raises
    ------
    ValueError, TypeError
        An argument breaks a rule of docs/contract.md; the message names it, what it got and what it needs. Subclasses in
        `mla_numba.errors`: `BackendUnavailable`, `StalePlanError`.

    Notes
    -----
    The contract follows FlashMLA 9241ae3 (`flash_mla_with_kvcache`), widened to any page size, ragged queries and any head count.
    """
    found = None
    if plan is None or isinstance(plan, Plan):
        prepared = _prepared_calls() if plan is None else plan._prepared
        schedule = None if plan is None else plan.schedule
        given = [q, kv_cache, block_table, seq_lens]
        for array in (cu_seqlens_q, out, lse):
            if array is not None:
                given.append(array)
        said = (head_dim_v, softmax_scale, causal, batch_invariant, empty_lse, check_values, backend)
        # Types come first: True is 1, and 512 is 512.0, where the rules tell them apart.
        options = (*map(type, said), *said, cu_seqlens_q is None, out is None, lse is None, stream is None)
        for call in prepared:
            if call.options == options and call.recognise is not None:
                addresses = call.recognise(given)
                if addresses is not None and call.keeps_results_apart(addresses):
                    return call(schedule, addresses, out, lse, stream)
        found = fingerprint(given)
        if found is not None:
            words, addresses = found
            for call in prepared:
                if call.options == options and call.words == words and call.keeps_results_apart(addresses):
                    if call.recognise is not None:
                        # It was not, as if torch was in another mode (no_grad, inference_mode) the last time: the next one will be.
                        call.recognise = recogniser(given)
                    return call(schedule, addresses, out, lse, stream)

    named = (q, "q"), (kv_cache, "kv_cache"), (block_table, "block_table"), (seq_lens, "seq_lens")
    inputs = [view(array, name, stream) for array, name in named]
    q_view, kv_view, table_view, lens_view = inputs
    cu_view = None
    if cu_seqlens_q is not None:
        cu_view = view(cu_seqlens_q, "cu_seqlens_q", stream)
        inputs.append(cu_view)
    shape = validate.decode_shape(q_view, kv_view, table_view, lens_view, cu_view, validate.require_count(head_dim_v, "head_dim_v"),
                                  validate.require_flag(causal, "causal"), validate.require_flag(batch_invariant, "batch_invariant"))
    scale = validate.softmax_scale_or_default(softmax_scale, shape.head_dim_qk)
    empty = validate.require_empty_lse(empty_lse)
    check_values = validate.require_flag(check_values, "check_values")
    stream_int = stream_handle(stream, q_view.kind, q_view.device)
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan from plan_decode, got {type(plan).__name__}")
    name = choose_backend(backend if plan is None or backend != "auto" else plan.backend, shape, q_view.device, kv_view)
    if plan is not None:
        _require_fitting(plan, name, shape, q_view)
    if check_values:
        with on_device(q_view.device):
            _check_values(plan, shape, kv_view, table_view, lens_view, cu_view, stream_int)

    tokens = "total_q" if shape.ragged else "seq_len_q"
    batch = "" if shape.ragged else "batch, "
    out_view = _result(out, "out", q_view, (*q_view.shape[:-1], shape.head_dim_v), shape.dtype,
                       f"({batch}{tokens}, num_heads_q, head_dim_v)", inputs, stream)
    validate.require_last_axis_contiguous(out_view)
    lse_view = _result(lse, "lse", q_view, _lse_shape(q_view), "float32", f"({batch}num_heads_q, {tokens})", [*inputs, out_view],
                       stream)
    if shape.total_q == 0:
        return _owner(out_view), _owner(lse_view)

    with on_device(q_view.device):
        scheduler = None
        if plan is None:
            scheduler = _scheduler(name, shape, lens_view)
            schedule = scheduler(inputs[3:], stream_int)
        else:
            schedule = plan.schedule
        if shape.ragged:
            q_view, unified_out, unified_lse = q_view.with_leading_axis(), out_view.with_leading_axis(), lse_view.with_leading_axis()
        else:
            unified_out, unified_lse = out_view, lse_view
        module = backend_module(name)
        memory = _Memory(name, stream_int, getattr(module, "TAKES_DESCRIPTIONS", False))
        arguments = [memory.read(array) for array in (q_view, kv_view, table_view)]
        results = [memory.write(array) for array in (unified_out, unified_lse)]
        launch = module.decode(shape, schedule, *arguments, *results, scale, empty, stream_int)
        memory.finish()
        can_repeat = found is not None and q_view.device is not None and not check_values and launch is not None
        # Without a plan the number of pieces, and so the launch, may be another one the next time.
        can_repeat &= plan is not None or not batch_invariant
        # One is there already if this call was not repeated because the results given lie among the inputs.
        if can_repeat and all((call.options, call.words) != (options, words) for call in prepared):
            results_given = [result for result, array in ((out_view, out), (lse_view, lse)) if array is not None]
            results_made = [result for result, array in ((out_view, out), (lse_view, lse)) if array is None]
            prepared.insert(0, _PreparedCall(options, words, recogniser(given), launch, scheduler, inputs, results_given, results_made))
            del prepared[_MAX_PREPARED_CALLS:]
    return _owner(out_view), _owner(lse_view)


class _PreparedCall:
    """A call that kept every rule, ready to be made again with arrays at other addresses. It holds on to no array."""

    def __init__(self, options: tuple[Any, ...], words: list[Any], recognise: Callable[[Sequence[Any]], list[int] | None] | None,
                 launch: Callable[..., None], scheduler: "_Scheduler | None", inputs: Sequence[ArrayView],
                 results_given: Sequence[ArrayView], results_made: Sequence[ArrayView]):
        q = inputs[0]
        # All that the rules and the launch depend on but the addresses, the stream and the plan's tables; `recognise` is `words` at once.
        self.options, self.words, self.recognise = options, words, recognise
        self._launch, self._kind, self._device, self._address_of = launch, q.kind, q.device, address_of(q.kind)
        self._current_stream = current_stream(q.kind, q.device)
        self._new_results = allocator(q, *((result.shape, result.dtype) for result in results_made)) if results_made else None
        self._num_inputs = len(inputs)
        # Lengths and offsets, for calls that plan for themselves.
        self._scheduler, self._lengths = scheduler, [replace(array, owner=None) for array in inputs[3:]]
        self._extents = [array.extent for array in (*inputs, *results_given)]
        self._apart: Sequence[int] = ()

    def keeps_results_apart(self, addresses: Sequence[int]) -> bool:
        """Whether results that were given lie wholly before or behind every other array. Others need a closer look."""
        # Where nothing has moved since they were looked at, as from token to token of a layer, they need not be again.
        if len(addresses) == self._num_inputs or addresses == self._apart:
            return True
        for i in range(self._num_inputs, len(addresses)):
            low, high = (addresses[i] + end for end in self._extents[i])
            for address, (other_low, other_high) in zip(addresses[:i], self._extents, strict=False):
                if address + other_low < high and low < address + other_high:
                    return False
        self._apart = addresses
        return True

    def __call__(self, schedule: Schedule | None, addresses: Sequence[int], out: Any, lse: Any, stream: Any) -> tuple[Any, Any]:
        handle = self._current_stream() if stream is None else stream_handle(stream, self._kind, self._device)
        if self._new_results is not None:
            made = self._new_results()
            out, lse = made[0] if out is None else out, made[-1] if lse is None else lse
        if self._scheduler is not None:
            lengths = [replace(array, pointer=address) for array, address in zip(self._lengths, addresses[3:], strict=False)]
            schedule = self._scheduler(lengths, handle)
        self._launch(schedule, handle, addresses[0], addresses[1], addresses[2], self._address_of(out), self._address_of(lse))
        return out, lse


def merge_states(states: Sequence[tuple[Any, Any]], *, empty_lse: str = "+inf", backend: str = "auto",
                 stream: Any = None) -> tuple[Any, Any]:
    """Merge attention over disjoint sets of tokens into attention over all of them.

    Parameters
    ----------
    states : sequence of (out, lse)
        Results of `mla_decode` for the same queries over different tokens. An lse of +inf or -inf says that the row saw nothing.
    empty_lse : {"+inf", "-inf"}
        lse of a row that saw nothing in any state.
    backend, stream
        As in `mla_decode`.

    Returns
    -------
    out, lse : array
        As `mla_decode` returns.

    Raises
    ------
    ValueError, TypeError
        `states` is empty, or an array breaks a rule; the message names it.
    """
    if not isinstance(states, Iterable):
        raise TypeError(f"states must be a sequence of (out, lse), got {type(states).__name__}")
    pairs = list(states)
    if not pairs:
        raise ValueError("states is empty, but must hold at least one (out, lse)")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"states[{i}] must be a pair (out, lse), got {type(pair).__name__}")
    empty = validate.require_empty_lse(empty_lse)
    outs = [view(pair[0], f"states[{i}][0]", stream) for i, pair in enumerate(pairs)]
    lses = [view(pair[1], f"states[{i}][1]", stream) for i, pair in enumerate(pairs)]
    first = outs[0]
    validate.require_dtype(first, DTYPES)
    if first.ndim not in (3, 4):
        raise ValueError(f"{first.name} has shape {first.shape}, but needs 4 dimensions, (batch, seq_len_q, num_heads_q, head_dim_v), "
                         "or 3, (total_q, num_heads_q, head_dim_v)")
    if first.shape[-1] < 1:
        raise ValueError(f"{first.name} has shape {first.shape}, but head_dim_v, its last axis, must be at least 1")
    lse_shape = _lse_shape(first)
    validate.require_same_place([*outs, *lses])
    for out_view, lse_view in zip(outs, lses, strict=True):
        validate.require_dtype(out_view, (first.dtype,), f", as {first.name}")
        validate.require_shape(out_view, first.shape, f"as {first.name}")
        validate.require_last_axis_contiguous(out_view)
        validate.require_dtype(lse_view, ("float32",))
        validate.require_shape(lse_view, lse_shape, f"as the lse of {first.name}")
        validate.require_whole_elements(out_view)
        validate.require_whole_elements(lse_view)
    name = choose_backend(backend, None, first.device)
    out_view = view(empty_like_kind(first, first.shape, first.dtype), "out")
    lse_view = view(empty_like_kind(first, lse_shape, "float32"), "lse")
    if out_view.size == 0:
        return _owner(out_view), _owner(lse_view)
    with on_device(first.device):
        stream_int = stream_handle(stream, first.kind, first.device)
        memory = _Memory(name, stream_int)

        def unify(array: ArrayView) -> ArrayView:
            return array if first.ndim == 4 else array.with_leading_axis()

        arguments = [[memory.read(unify(array)) for array in group] for group in (outs, lses)]
        results = [memory.write(unify(array)) for array in (out_view, lse_view)]
        backend_module(name).merge_states(*arguments, *results, empty, stream_int)
        memory.finish()
    return _owner(out_view), _owner(lse_view)


class _Memory:
    """Brings arrays to where a backend reads them: as they are, or host arrays to the GPU and results back."""

    def __init__(self, backend: str, stream: int, describe: bool = False):
        self._on_host = backend == "cpu"
        self._describe = describe
        self._stream = stream
        self._results: list[tuple[np.ndarray, Any]] = []
        self._wait = False

    def read(self, array: ArrayView) -> Any:
        if self._on_host:
            return array.storage()
        if array.device is None:
            from numba import cuda

            # On the stream that reads it, which need not wait for the default one; of a copy, as nobody waits for that of a plan's lengths.
            copied = cuda.to_device(np.array(array.storage(), order="C"), stream=numba_stream(self._stream))
            return view(copied, array.name) if self._describe else copied
        self._wait |= array.kind == "dlpack"
        return array if self._describe else array.device_storage()

    def write(self, array: ArrayView) -> Any:
        if self._on_host or array.device is not None:
            return self.read(array)
        from numba import cuda

        host = array.storage()
        device = cuda.device_array(host.shape, host.dtype)
        self._results.append((host, device))
        return view(device, array.name) if self._describe else device

    def finish(self) -> None:
        """Copy results back; wait where the caller's library cannot know of our stream."""
        if self._results or self._wait:
            from numba import cuda

            # The copies below run on the default stream.
            cuda.synchronize()
        for host, device in self._results:
            host[...] = device.copy_to_host()


def make_plan(name: str, shape: DecodeShape, seq_lens: ArrayView, cu_seqlens_q: ArrayView | None, stream: Any,
              max_seq_len: int | None = None, **overrides: int | None) -> Plan:
    """A plan from arguments that have been validated, on the current device; `overrides` as `_scheduler`'s."""
    make_schedule = _scheduler(name, shape, seq_lens, max_seq_len, **overrides)
    lengths = [seq_lens] if cu_seqlens_q is None else [seq_lens, cu_seqlens_q]
    schedule = make_schedule(lengths, stream_handle(stream, seq_lens.kind, seq_lens.device))
    return Plan(name, shape, seq_lens.device, schedule, _gpu_of(name, seq_lens))


def _gpu_of(backend: str, array: ArrayView) -> int | None:
    """Where calls with this array run: on its device, or the current one, or on none."""
    if array.device is not None or backend == "cpu":
        return array.device
    from numba import cuda

    return 0 if cuda.config.ENABLE_CUDASIM else int(cuda.get_current_device().id)


# Lengths, with offsets behind them if queries are ragged, and the stream's handle become a schedule.
_Scheduler = Callable[[Sequence[ArrayView], int], Schedule]


def _scheduler(name: str, shape: DecodeShape, like: ArrayView, max_seq_len: int | None = None, **overrides: int | None) -> _Scheduler:
    """For lengths in the place of `like`, of which it holds on to nothing.

    `max_seq_len` is `plan_decode`'s; `overrides` are fields of the backend's `ScheduleConfig`, None keeps its choice.
    """
    module: ModuleType = backend_module(name)
    changes: dict[str, Any] = {field_name: value for field_name, value in overrides.items() if value is not None}
    config = module.schedule_config(shape, max_seq_len=max_seq_len)
    if changes:
        config = replace(config, **changes)
    new_words = device_words(like)

    def make_schedule(lengths: Sequence[ArrayView], stream: int) -> Schedule:
        memory = _Memory(name, stream, getattr(module, "TAKES_DESCRIPTIONS", False))
        lens, *offsets = map(memory.read, lengths)
        schedule: Schedule = module.make_schedule(config, shape, lens, offsets[0] if offsets else None, stream, new_words,
                                                  max_seq_len)
        return schedule

    return make_schedule


def _require_fitting(plan: Plan, backend: str, shape: DecodeShape, q: ArrayView) -> None:
    """A plan serves calls of its own backend, place and shape."""
    pairs = [("backend", plan.backend, backend), ("device", plan.device, q.device), ("gpu", plan.gpu, _gpu_of(backend, q))]
    pairs += [(item.name, getattr(plan.shape, item.name), getattr(shape, item.name)) for item in fields(DecodeShape)]
    for name, planned, got in pairs:
        if planned != got:
            raise StalePlanError(f"plan was made for {name}={planned!r}, but this call has {name}={got!r}: make a new one with plan_decode")


def _check_values(plan: Plan | None, shape: DecodeShape, kv_cache: ArrayView, block_table: ArrayView, seq_lens: ArrayView,
                  cu_seqlens_q: ArrayView | None, stream: int) -> None:
    lens, table = to_host(seq_lens, stream), to_host(block_table, stream)
    offsets = None if cu_seqlens_q is None else to_host(cu_seqlens_q, stream)
    validate.require_seq_len_values(lens, table.shape[1] * shape.page_size)
    validate.require_page_ids(table, lens, shape.page_size, kv_cache.shape[0])
    if offsets is not None:
        validate.require_cu_seqlens_values(offsets, shape.total_q)
    # Without rows there is nothing to attend, and a plan of ragged queries fits uniform ones, too.
    if plan is None or shape.total_q == 0:
        return
    jobs = plan.schedule.jobs
    planned = jobs.copy_to_host(stream=numba_stream(stream)) if hasattr(jobs, "copy_to_host") else jobs
    now = make_host_schedule(plan.schedule.config, shape, lens, offsets).jobs
    stale = np.flatnonzero((planned != now).any(axis=1))
    if len(stale):
        was, is_now = planned[stale[0]], now[stale[0]]
        raise StalePlanError(f"plan was made for other lengths: request {was[JOB_REQUEST]} had seq_len={was[JOB_SEQ_LEN]} where this call "
                             f"has request {is_now[JOB_REQUEST]} with seq_len={is_now[JOB_SEQ_LEN]}: make a new one with plan_decode")


def _result(given: Any, name: str, like: ArrayView, shape: tuple[int, ...], dtype: str, axes: str, others: list[ArrayView],
            stream: Any) -> ArrayView:
    """The array to write a result to: the caller's, if it keeps the rules, or a new one."""
    if given is None:
        return view(empty_like_kind(like, shape, dtype), name)
    array = view(given, name, stream)
    validate.require_output(array, shape, dtype, axes)
    validate.require_same_place([like, array])
    validate.require_no_overlap(array, others)
    return array


def _lse_shape(q: ArrayView) -> tuple[int, ...]:
    """Of q or out, (..., tokens, heads, dim): (..., heads, tokens)."""
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def _owner(array: ArrayView) -> Any:
    return array.owner[0] if array.kind == "dlpack" else array.owner
