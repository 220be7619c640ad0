"""Backend `simt`: the portable Numba-CUDA kernels. Arrays are Numba device arrays; bfloat16 is handed over as uint16.

Runs in Numba's CUDA simulator too (NUMBA_ENABLE_CUDASIM=1), with tiles of a few rows and tokens.
"""

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from ..config import DecodeShape, ScheduleConfig, ceil_div
from ..contract import INVARIANT_SPLIT_TOKENS, LOG2_E
from ..kernels import simt_merge
from ..kernels.simt_decode import SIMULATOR, STORAGE, SimtConfig, decode_signature, make_decode_kernel
from .capture import beside_captures
from .launch import configured, numba_stream
from .schedule import NewWords, Schedule, build_arguments, make_device_schedule
from .workspaces import Workspaces, stream_key

# Tokens that a piece of a split request has at least.
_MIN_SPLIT_TOKENS = 128
# Thread blocks of the merge walk the job table, so that 20,000 requests need no 20,000 x rows of them.
_MAX_MERGE_BLOCKS = 1024

# Partial results per (device, stream), from call to call: calls on one stream run one after the other.
_workspaces = Workspaces()
# Held from the decode launch to the merge launch: another thread's decode on the same stream must not come between them.
_launch_lock = threading.Lock()


@cache
def unavailable(_device: int | None = None) -> list[str]:
    """Why this machine cannot run the backend."""
    if SIMULATOR:
        return []
    if np.lib.NumpyVersion(np.__version__) >= "2.5.0":
        return [f"numba-cuda 0.30 compiles nothing with NumPy {np.__version__}: pip install 'numpy<2.5'"]
    error = cuda.cuda_error()
    if error is not None:
        return [f"no CUDA driver: {' '.join(str(error).split())}"]
    if len(cuda.gpus) == 0:
        return ["the CUDA driver finds no device"]
    if not cuda.is_available():
        return ["libNVVM is not installed: install numba-cuda[cu12] or numba-cuda[cu13]"]
    return []


@cache
def _device_limits(device_idx: int) -> tuple[int, int, int]:
    """SMs; most shared memory of a thread block, of an SM, in bytes."""
    if SIMULATOR:
        return 3, 48 * 1024, 48 * 1024
    device = cuda.gpus[device_idx]
    return (device.MULTIPROCESSOR_COUNT, device.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device.MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)


def _device_idx() -> int:
    return 0 if SIMULATOR else cuda.get_current_device().id


@cache
def choose_config(shape: DecodeShape, smem_limit: int) -> SimtConfig | None:
    """The largest tile that the rows of a request fill and that fits; None if not even the smallest does.

    Never a function of the batch, so that `batch_invariant` holds.
    """
    rows = max(shape.seq_len_q, 1) * shape.heads_per_kv
    sizes: dict[str, int] = {"num_threads": 8, "warp_size": 4} if SIMULATOR else {}
    block_ms, block_ns = ((4, 2), (4,)) if SIMULATOR else ((64, 32, 16, 8, 4), (16, 8))
    for block_m in block_ms:
        if block_m // 2 < rows or block_m == block_ms[-1]:
            for block_n in block_ns:
                config = SimtConfig(shape.head_dim_qk, shape.head_dim_v, shape.dtype, block_m, block_n, **sizes)
                if config.smem_bytes <= smem_limit:
                    return config
    return None


def _config(shape: DecodeShape) -> SimtConfig:
    config = choose_config(shape, _device_limits(_device_idx())[1])
    if config is None:
        raise ValueError("; ".join(unsupported(shape)))
    return config


def unsupported(shape: DecodeShape, device: int | None = None) -> list[str]:
    """Why this shape cannot run on the device, or the current one."""
    smem_limit = _device_limits(_device_idx() if device is None else device)[1]
    if choose_config(shape, smem_limit) is None:
        return [f"head_dim_qk={shape.head_dim_qk} needs more shared memory than the {smem_limit} bytes of a thread block on this device"]
    return []


def schedule_config(shape: DecodeShape, max_seq_len: int | None = None) -> ScheduleConfig:
    config = _config(shape)
    num_sms, _, smem_of_sm = _device_limits(_device_idx())
    split_tokens = 2 * config.block_n if SIMULATOR else INVARIANT_SPLIT_TOKENS
    return ScheduleConfig(rows_per_job=config.block_m, block_n=config.block_n,
                          num_workers=max(1, num_sms * config.blocks_per_sm(smem_of_sm) // shape.num_heads_kv), overhead_blocks=2,
                          min_split_blocks=1 if SIMULATOR else _MIN_SPLIT_TOKENS // config.block_n,
                          split_blocks=split_tokens // config.block_n if shape.batch_invariant else 0)


def make_schedule(config: ScheduleConfig, shape: DecodeShape, seq_lens: Any, cu_seqlens_q: Any | None, stream: int,
                  new_words: NewWords, max_seq_len: int | None) -> Schedule:
    from ..kernels.schedule import NUM_THREADS, build_schedule

    def build(schedule: Schedule) -> None:
        configured(build_schedule, 1, NUM_THREADS, numba_stream(stream))(
            seq_lens, seq_lens if cu_seqlens_q is None else cu_seqlens_q, *build_arguments(schedule.config, shape),
            *map(schedule.table, schedule.places))

    return make_device_schedule(config, shape, new_words, build, stream, max_seq_len)


def _compile(function: Any, signature: Any, **options: Any) -> Any:
    if SIMULATOR:
        return cuda.jit(function)
    # Without link-time optimisation the compiler's last word is the PTX that verify/test_l0_simt.py judges, in a third of the time.
    return cuda.jit(signature, lto=False, **options)(function)


@cache
def _decode_kernel(config: SimtConfig, device_idx: int) -> Any:
    kernel = _compile(make_decode_kernel(config), decode_signature(config.dtype), fastmath=True,
                      launch_bounds=(config.num_threads, config.blocks_per_sm(_device_limits(device_idx)[2])))
    if not SIMULATOR:
        from cuda.bindings import driver

        (overload,) = kernel.overloads.values()
        # More than 48 KB must be asked for, per kernel and device.
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        handle = overload._codelibrary.get_cufunc().kernel.handle
        (error,) = driver.cuKernelSetAttribute(attribute, config.smem_bytes, handle, device_idx)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cuKernelSetAttribute({config.smem_bytes} bytes of shared memory) failed: {error}")
    return kernel


@cache
def _merge_kernel(dtype: str, head_dim_v: int, device_idx: int) -> Any:
    return _compile(simt_merge.make_merge_kernel(dtype, head_dim_v), simt_merge.merge_signature(dtype))


@cache
def _state_kernels(dtype: str, head_dim_v: int, device_idx: int) -> tuple[Any, Any]:
    functions, signatures = simt_merge.make_state_kernels(dtype, head_dim_v), simt_merge.state_signatures(dtype)
    return _compile(functions[0], signatures[0]), _compile(functions[1], signatures[1])


def _flat(array: Any) -> tuple[Any, int, tuple[int, ...]]:
    """All that `array` spans as one contiguous axis; where its first element lies there; the element strides of its axes but the last.

    So the kernels know that neighbours in the last axis are neighbours in memory, which no type of a strided array says.
    """
    itemsize = array.dtype.itemsize
    strides = tuple(stride // itemsize for stride in array.strides)
    if array.size == 0:
        return cuda.device_array(1, array.dtype), 0, strides[:-1]
    steps = [(size - 1) * stride for size, stride in zip(array.shape, strides, strict=True)]
    origin = -sum(min(step, 0) for step in steps)
    span = origin + sum(max(step, 0) for step in steps) + 1
    if SIMULATOR:
        return cuda.to_device(np.lib.stride_tricks.as_strided(array._ary, (span,), (itemsize,))), origin, strides[:-1]
    interface = {"shape": (span,), "typestr": array.dtype.str, "version": 3,
                 "data": (array.__cuda_array_interface__["data"][0] - origin * itemsize, False)}
    return cuda.from_cuda_array_interface(interface, owner=array, sync=False), origin, strides[:-1]


def _workspace(num_rows: int, head_dim_v: int, device_idx: int, stream: int) -> Any:
    """Room for `num_rows` partial rows and their lse2, uninitialised."""
    num_floats = max(num_rows, 1) * (head_dim_v + 1)
    return _workspaces.get((device_idx, stream_key(stream)), num_floats, _floats)


def _floats(count: int) -> Any:
    with beside_captures():
        return cuda.device_array(count, np.float32)


def _partials(shape: tuple[int, int, int], head_dim_v: int, device_idx: int, stream: int) -> tuple[Any, Any]:
    """o_partial (*shape, head_dim_v) and lse2_partial `shape` in the workspace of `stream`."""
    shape = (max(shape[0], 1), *shape[1:])
    num_rows = shape[0] * shape[1] * shape[2]
    workspace = _workspace(num_rows, head_dim_v, device_idx, stream)
    split = num_rows * head_dim_v
    return workspace[:split].reshape(*shape, head_dim_v), workspace[split:split + num_rows].reshape(*shape)


def decode(shape: DecodeShape, schedule: Schedule, q: Any, kv_cache: Any, block_table: Any, out: Any, lse: Any, softmax_scale: float,
           empty_lse: float, stream: int) -> None:
    device_idx, launch_stream = _device_idx(), numba_stream(stream)
    config = _config(shape)
    max_jobs = schedule.jobs.shape[0]
    num_workers, rows_per_job = schedule.config.num_workers, schedule.config.rows_per_job
    decode_kernel = _decode_kernel(config, device_idx)
    merge_kernel = _merge_kernel(shape.dtype, shape.head_dim_v, device_idx)
    with _launch_lock:
        o_partial, lse2_partial = _partials((schedule.num_slots, shape.num_heads_kv, rows_per_job), shape.head_dim_v, device_idx, stream)
        configured(decode_kernel, (num_workers, shape.num_heads_kv), config.num_threads, launch_stream, config.smem_bytes)(
            *_flat(q), *_flat(kv_cache), kv_cache.shape[0], np.uint32(shape.page_size), block_table, schedule.jobs,
            schedule.workers, schedule.num_splits, out, lse, o_partial, lse2_partial, shape.heads_per_kv, shape.causal,
            schedule.config.split_blocks, np.float32(softmax_scale * LOG2_E), np.float32(empty_lse))
        if schedule.num_slots > 0:
            grid = min(max_jobs, _MAX_MERGE_BLOCKS), shape.num_heads_kv, ceil_div(rows_per_job, simt_merge.NUM_WARPS)
            configured(merge_kernel, grid, simt_merge.NUM_THREADS, launch_stream)(
                schedule.jobs, schedule.num_splits, o_partial, lse2_partial, out, lse, shape.heads_per_kv, np.float32(empty_lse))


def merge_states(outs: Sequence[Any], lses: Sequence[Any], out: Any, lse: Any, empty_lse: float, stream: int) -> None:
    """Merge attention over disjoint sets of tokens; an lse of either infinity says that a row saw nothing."""
    device_idx, launch_stream = _device_idx(), numba_stream(stream)
    num_rows, head_dim_v = out.shape[0] * out.shape[1] * out.shape[2], out.shape[3]
    (dtype,) = [name for name, storage in STORAGE.items() if np.dtype(storage.element.name) == out.dtype]
    take_state, merge_parts = _state_kernels(dtype, head_dim_v, device_idx)
    grid = max(1, ceil_div(num_rows, simt_merge.NUM_WARPS))
    with _launch_lock:
        parts = _partials((len(outs), 1, num_rows), head_dim_v, device_idx, stream)
        for state, (state_out, state_lse) in enumerate(zip(outs, lses, strict=True)):
            configured(take_state, grid, simt_merge.NUM_THREADS, launch_stream)(state, state_out, state_lse, *parts)
        configured(merge_parts, grid, simt_merge.NUM_THREADS, launch_stream)(*parts, out, lse, np.float32(empty_lse))
