"""Backend `hopper`: TMA and wgmma kernels for compute capability 9.0. Arrays are described, not wrapped: a launch packs addresses."""

import struct
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from numba import cuda

from ..config import DecodeShape, ScheduleConfig, ceil_div
from ..contract import HEAD_DIM_QK, HEAD_DIM_V, INVARIANT_SPLIT_TOKENS, LOG2_E
from . import simt
from .launch import ArrayMemory, configured, numba_stream
from .schedule import Schedule, make_device_schedule
from .simt import merge_states as merge_states

COMPUTE_CAPABILITY = (9, 0)
# `decode` is given arrays as they are described, not as Numba device arrays.
TAKES_DESCRIPTIONS = True
# What starting a piece costs, in blocks of 64 tokens; and the fewest blocks that are worth it.
_OVERHEAD_BLOCKS = 2
_MIN_SPLIT_BLOCKS = 2
# Row tiles that may walk a worker's pieces together, reading the cache once from memory and again from L2.
_MAX_TEAM = 4
# ex2.approx flushes smaller ones, and 0 times the infinity that hides a token would be no number.
_LEAST_SCALE = float(np.finfo(np.float32).tiny)


@cache
def unavailable() -> list[str]:
    """Why this machine cannot run the backend."""
    if simt.SIMULATOR:
        return ["the CUDA simulator has neither TMA nor wgmma"]
    reasons = simt.unavailable()
    if not reasons:
        capability = cuda.gpus[_device_idx()].compute_capability
        if tuple(capability) != COMPUTE_CAPABILITY:
            reasons = [f"the GPU has compute capability {capability[0]}.{capability[1]}, and wgmma needs 9.0"]
    return reasons


def _device_idx() -> int:
    return cuda.get_current_device().id


def unsupported(shape: DecodeShape) -> list[str]:
    """Why this shape cannot run here."""
    reasons = []
    if (shape.head_dim_qk, shape.head_dim_v) != (HEAD_DIM_QK, HEAD_DIM_V):
        reasons.append(f"head_dim_qk={shape.head_dim_qk}, head_dim_v={shape.head_dim_v}: it has {HEAD_DIM_QK} and {HEAD_DIM_V}")
    if shape.dtype not in ("bfloat16", "float16"):
        reasons.append(f"dtype {shape.dtype}: it has bfloat16 and float16")
    if shape.page_size % 64 != 0 and shape.page_size not in (8, 16, 32):
        reasons.append(f"page_size={shape.page_size}: it has 8, 16, 32 and multiples of 64")
    return reasons


def unsupported_layout(kv_cache: ArrayMemory) -> list[str]:
    """Why a cache that lies so cannot be read."""
    if kv_cache.pointer % 16 or any(stride % 16 or stride < 0 for stride in kv_cache.strides[:-1]):
        return ["kv_cache: TMA needs its first element and all strides at multiples of 16 bytes"]
    return []


def team_size(row_tiles: int, num_kv_heads: int, num_sms: int) -> int:
    """Row tiles that a worker attends together: as fills the machine best, and at least two where there are two."""
    def use(team: int) -> float:
        workers = num_sms // (team * num_kv_heads)
        return workers * team * num_kv_heads / num_sms * row_tiles / (ceil_div(row_tiles, team) * team)

    return max(range(min(row_tiles, 2), min(row_tiles, _MAX_TEAM) + 1), key=lambda team: (use(team), team))


def schedule_config(shape: DecodeShape) -> ScheduleConfig:
    from ..kernels.hopper_decode import BLOCK_M, BLOCK_N

    num_sms = cuda.gpus[_device_idx()].MULTIPROCESSOR_COUNT
    team = team_size(ceil_div(max(shape.seq_len_q, 1) * shape.heads_per_kv, BLOCK_M), shape.num_heads_kv, num_sms)
    return ScheduleConfig(rows_per_job=team * BLOCK_M, block_n=BLOCK_N, num_workers=max(1, num_sms // (team * shape.num_heads_kv)),
                          overhead_blocks=_OVERHEAD_BLOCKS, min_split_blocks=_MIN_SPLIT_BLOCKS,
                          split_blocks=INVARIANT_SPLIT_TOKENS // BLOCK_N if shape.batch_invariant else 0)


def make_schedule(config: ScheduleConfig, shape: DecodeShape, seq_lens: Any, cu_seqlens_q: Any | None, stream: int) -> Schedule:
    return make_device_schedule(config, shape, seq_lens, cu_seqlens_q, numba_stream(stream))


class _Kernel:
    """A loaded kernel and the memory that its arguments are passed in. Used under `_launch_lock`."""

    def __init__(self, function: Any, formats: str, num_threads: int, smem_bytes: int):
        from cuda.bindings import driver

        self._driver, self._function = driver, function
        # Every argument has 8 bytes of its own; cuLaunchKernelEx takes the addresses of them all.
        self._pack = struct.Struct("<" + "".join(code if code in "Qq" else code + "4x" for code in formats)).pack_into
        self._arguments = np.zeros(len(formats), np.uint64)
        self._pointers = self._arguments.ctypes.data + 8 * np.arange(len(formats), dtype=np.uint64)
        self._pointers_address = self._pointers.ctypes.data
        self._num_threads, self._smem_bytes = num_threads, smem_bytes
        self._configs: dict[tuple[tuple[int, int, int], int], Any] = {}

    def launch(self, grid: tuple[int, int, int], stream: int, *arguments: Any) -> None:
        self._pack(self._arguments.data, 0, *arguments)
        config = self._configs.get((grid, stream))
        if config is None:
            config = self._configs[grid, stream] = self._config(grid, stream)
        (error,) = self._driver.cuLaunchKernelEx(config, self._function, self._pointers_address, 0)
        if error:
            raise RuntimeError(f"cuLaunchKernelEx failed: {error.name}")

    def _config(self, grid: tuple[int, int, int], stream: int) -> Any:
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = self._num_threads, 1, 1
        config.sharedMemBytes, config.hStream = self._smem_bytes, driver.CUstream(stream)
        # Blocks may come onto the machine while the kernel before ends; they wait for it with griddepcontrol.wait.
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
        return config


def _formats(signature: Any) -> str:
    """struct's letters for the arguments of a kernel."""
    letters = {"int32": "i", "int64": "q", "uint64": "Q", "float32": "f"}
    return "".join(letters.get(str(argument), "Q") for argument in signature.args)


@cache
def _kernel(make: Callable[[], Callable[..., None]], signature: Any, name: str, num_threads: int, smem_bytes: int, fastmath: bool,
            device_idx: int) -> _Kernel:
    from .cubin import load_kernel

    return _Kernel(load_kernel(make, signature, name, num_threads, smem_bytes, fastmath, device_idx), _formats(signature), num_threads, smem_bytes)


@cache
def _decode_kernel(dtype: str, page_size: int, device_idx: int) -> _Kernel:
    from ..kernels import hopper_decode

    return _kernel(partial(hopper_decode.make_decode_kernel, hopper_decode.HopperConfig(dtype, page_size)), hopper_decode.decode_signature(),
                   f"hopper_decode-{dtype}-{page_size}", hopper_decode.NUM_THREADS, hopper_decode.SMEM_BYTES, True, device_idx)


@cache
def _merge_kernel(dtype: str, device_idx: int) -> _Kernel:
    from ..kernels import hopper_merge

    # Not fastmath: here infinities are data.
    return _kernel(partial(hopper_merge.make_merge_kernel, dtype), hopper_merge.merge_signature(), f"hopper_merge-{dtype}",
                   hopper_merge.NUM_THREADS, 0, False, device_idx)


@cache
def _merge_blocks(device_idx: int) -> int:
    """Thread blocks of the merge: two for each block of threads that an SM holds of them."""
    return int(8 * cuda.gpus[device_idx].MULTIPROCESSOR_COUNT)


@cache
def _tensor_maps(device_idx: int) -> Any:
    from .tensor_map import TensorMaps

    return TensorMaps()


# Held from the decode launch to the merge launch: another thread's decode on the same stream must not come between them.
_launch_lock = threading.Lock()
# Memory per (device, stream, purpose), grown as needed. A former, smaller one may be in a captured graph: it is kept.
_workspaces: dict[tuple[int, int, str], list[Any]] = {}


def _workspace(num_floats: int, device_idx: int, stream: int, purpose: str) -> int:
    """Address of `num_floats` floats, zeros when new, a multiple of 256 bytes."""
    kept = _workspaces.setdefault((device_idx, stream, purpose), [])
    if not kept or kept[-1].size < num_floats:
        kept.append(cuda.to_device(np.zeros(max(num_floats, 1), np.float32)))
    return int(kept[-1].__cuda_array_interface__["data"][0])


def _c_strides(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Byte strides of the leading three of four axes of 16-bit elements in C order."""
    return 2 * shape[1] * shape[2] * shape[3], 2 * shape[2] * shape[3], 2 * shape[3]


@cache
def _copy_kernel() -> Any:
    def copy(destination: Any, source: Any) -> None:
        """Grid of any size; arrays of equal shape and 16-bit elements, any strides."""
        for i in range(cuda.grid(1), source.size, cuda.gridsize(1)):
            rest, e = i // source.shape[4], i % source.shape[4]
            rest, d = rest // source.shape[3], rest % source.shape[3]
            rest, c = rest // source.shape[2], rest % source.shape[2]
            destination[rest // source.shape[1], rest % source.shape[1], c, d, e] = source[rest // source.shape[1], rest % source.shape[1], c, d, e]

    return cuda.jit(copy)


def _as_uint16(address: int, shape: tuple[int, ...], strides: tuple[int, ...], owner: Any) -> Any:
    interface = {"shape": shape, "strides": strides, "typestr": "<u2", "data": (address, False), "version": 3}
    return cuda.from_cuda_array_interface(interface, owner=owner, sync=False)


def _copied(destination: Any, source: Any, stream: int) -> None:
    configured(_copy_kernel(), min(1024, ceil_div(source.size, 256)), 256, numba_stream(stream))(destination, source)


def _q_map(shape: DecodeShape, q: ArrayMemory, maps: Any, stream: int) -> int:
    """Tensor map of q as (packed rows, KV heads, q batches). Packed rows are token by token, head by head; where q's strides have no
    such axis, or suit no TMA, q is copied first."""
    from ..kernels.hopper_decode import BLOCK_M, TILE_COLUMNS

    q_batches, tokens = q.shape[:2]
    heads, kv_heads = shape.heads_per_kv, shape.num_heads_kv
    batch_stride, token_stride, head_stride = q.strides[:3]
    address, group_stride = q.pointer, heads * head_stride
    packed = tokens == 1 or (kv_heads == 1 and token_stride == group_stride)
    if not packed or address % 16 or head_stride % 16 or batch_stride % 16 or min(head_stride, batch_stride) < 0:
        source = _as_uint16(address, (q_batches, tokens, kv_heads, heads, HEAD_DIM_QK),
                            (batch_stride, token_stride, group_stride, head_stride, 2), q.owner)
        head_stride = 2 * HEAD_DIM_QK
        group_stride, batch_stride = tokens * heads * head_stride, kv_heads * tokens * heads * head_stride
        address = _workspace(q.size // 2, q.device or 0, stream, "q")
        _copied(_as_uint16(address, source.shape, (batch_stride, heads * head_stride, group_stride, head_stride, 2), None), source, stream)
    # TMA takes no stride of 0; that of an axis of one does not matter.
    strides = (head_stride or 16, group_stride or 16, batch_stride or 16)
    return int(maps.address(shape.dtype, address, (HEAD_DIM_QK, tokens * heads, kv_heads, q_batches), strides, (TILE_COLUMNS, BLOCK_M, 1, 1)))


def _kv_map(shape: DecodeShape, kv_cache: ArrayMemory, maps: Any) -> int:
    from ..kernels.hopper_decode import TILE_COLUMNS, HopperConfig

    page_stride, token_stride, head_stride = kv_cache.strides[:3]
    return int(maps.address(shape.dtype, kv_cache.pointer, (HEAD_DIM_QK, shape.page_size, shape.num_heads_kv, max(kv_cache.shape[0], 1)),
                            (token_stride or 16, head_stride or 16, page_stride or 16),
                            (TILE_COLUMNS, HopperConfig(shape.dtype, shape.page_size).box_rows, 1, 1)))


def decode(shape: DecodeShape, schedule: Schedule, q: ArrayMemory, kv_cache: ArrayMemory, block_table: ArrayMemory, out: ArrayMemory, lse: ArrayMemory,
           softmax_scale: float, empty_lse: float, stream: int) -> None:
    from ..kernels.hopper_decode import BLOCK_M

    device_idx = q.device or 0
    maps = _tensor_maps(device_idx)
    kv_map = _kv_map(shape, kv_cache, maps)
    num_workers, rows_per_job = schedule.config.num_workers, schedule.config.rows_per_job
    tables, row_tiles = schedule.addresses, rows_per_job // BLOCK_M
    rows = max(schedule.num_slots, 1) * shape.num_heads_kv * rows_per_job
    with _launch_lock:
        q_map = _q_map(shape, q, maps, stream)
        out_address, out_strides = out.pointer, out.strides[:3]
        # The kernels store 16 bytes of a row at a time.
        copied_out = out_address % 16 != 0 or any(stride % 16 for stride in out_strides)
        if copied_out:
            out_address, out_strides = _workspace(out.size // 2, device_idx, stream, "out"), _c_strides(out.shape)
        results = (out_address, *out_strides, lse.pointer, *lse.strides)
        # O, and lse2 once for each half of the columns.
        o_partial = _workspace(rows * (HEAD_DIM_V + 2), device_idx, stream, "partials")
        partials = (o_partial, o_partial + rows * HEAD_DIM_V * 4)
        # A word for each 16 rows and half of the columns, 0 between launches.
        counters = _workspace(rows // 16 * 2, device_idx, stream, "counters")
        _decode_kernel(shape.dtype, shape.page_size, device_idx).launch(
            (row_tiles, num_workers, shape.num_heads_kv), stream, q_map, kv_map, block_table.pointer, *block_table.strides,
            block_table.shape[1], tables["jobs"], tables["workers"], tables["starts"], *results, *partials, counters, shape.heads_per_kv,
            int(shape.causal), schedule.config.split_blocks, max(softmax_scale * LOG2_E, _LEAST_SCALE), empty_lse)
        if schedule.num_slots > 0:
            _merge_kernel(shape.dtype, device_idx).launch(
                (_merge_blocks(device_idx), 1, 1), stream, tables["merges"], tables["totals"], *partials, *results, row_tiles,
                shape.num_heads_kv, shape.heads_per_kv, empty_lse)
        if copied_out:
            five = (*out.shape[:3], 1, HEAD_DIM_V)
            _copied(_as_uint16(out.pointer, five, (*out.strides[:3], 0, 2), out.owner),
                    _as_uint16(out_address, five, (*out_strides, 0, 2), None), stream)
