"""Backend `hopper`: TMA and wgmma kernels for compute capability 9.0. Arrays are described, not wrapped: a launch packs addresses."""

import threading
from functools import cache
from typing import Any, Protocol

import numpy as np
from numba import cuda

from ..config import DecodeShape, ScheduleConfig, ceil_div
from ..contract import HEAD_DIM_QK, HEAD_DIM_V, INVARIANT_SPLIT_TOKENS, LOG2_E
from . import simt
from .launch import ArrayMemory, KernelSpec, Strided, numba_stream
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


def schedule_config(shape: DecodeShape, num_sms: int | None = None) -> ScheduleConfig:
    """For the current device, or for one of so many SMs."""
    from ..kernels.hopper_config import BLOCK_M, BLOCK_N

    if num_sms is None:
        num_sms = cuda.gpus[_device_idx()].MULTIPROCESSOR_COUNT
    team = team_size(ceil_div(max(shape.seq_len_q, 1) * shape.heads_per_kv, BLOCK_M), shape.num_heads_kv, num_sms)
    return ScheduleConfig(rows_per_job=team * BLOCK_M, block_n=BLOCK_N, num_workers=max(1, num_sms // (team * shape.num_heads_kv)),
                          overhead_blocks=_OVERHEAD_BLOCKS, min_split_blocks=_MIN_SPLIT_BLOCKS,
                          split_blocks=INVARIANT_SPLIT_TOKENS // BLOCK_N if shape.batch_invariant else 0)


def make_schedule(config: ScheduleConfig, shape: DecodeShape, seq_lens: Any, cu_seqlens_q: Any | None, stream: int) -> Schedule:
    return make_device_schedule(config, shape, seq_lens, cu_seqlens_q, numba_stream(stream))


class Device(Protocol):
    """What `decode` needs of a GPU: `gpu.Gpu`, or the emulator of verify/emulator."""

    num_sms: int

    def tensor_map(self, dtype: str, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> int: ...

    def workspace(self, num_floats: int, stream: int, purpose: str) -> int: ...

    def launch(self, spec: KernelSpec, grid: tuple[int, int, int], stream: int, *arguments: Any) -> None: ...

    def copy(self, destination: Strided, source: Strided, stream: int) -> None: ...


@cache
def decode_spec(dtype: str, page_size: int) -> KernelSpec:
    from ..kernels import hopper_config as kernel

    return KernelSpec("hopper_decode", "make_decode_kernel", (kernel.HopperConfig(dtype, page_size),), "decode_signature",
                      kernel.NUM_THREADS, kernel.SMEM_BYTES, fastmath=True)


@cache
def merge_spec(dtype: str) -> KernelSpec:
    from ..kernels.hopper_merge import NUM_THREADS

    # Not fastmath: here infinities are data.
    return KernelSpec("hopper_merge", "make_merge_kernel", (dtype,), "merge_signature", NUM_THREADS, 0, fastmath=False)


# Held from the decode launch to the merge launch: another thread's decode on the same stream must not come between them.
_launch_lock = threading.Lock()


def _c_strides(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Byte strides of the leading three of four axes of 16-bit elements in C order."""
    return 2 * shape[1] * shape[2] * shape[3], 2 * shape[2] * shape[3], 2 * shape[3]


def _q_map(shape: DecodeShape, q: ArrayMemory, device: Device, stream: int) -> int:
    """Tensor map of q as (packed rows, KV heads, q batches). Packed rows are token by token, head by head; where q's strides have no
    such axis, or suit no TMA, q is copied first."""
    from ..kernels.hopper_config import BLOCK_M, TILE_COLUMNS

    q_batches, tokens = q.shape[:2]
    heads, kv_heads = shape.heads_per_kv, shape.num_heads_kv
    batch_stride, token_stride, head_stride = q.strides[:3]
    address, group_stride = q.pointer, heads * head_stride
    packed = tokens == 1 or (kv_heads == 1 and token_stride == group_stride)
    if not packed or address % 16 or head_stride % 16 or batch_stride % 16 or min(head_stride, batch_stride) < 0:
        source = Strided(address, (q_batches, tokens, kv_heads, heads, HEAD_DIM_QK),
                         (batch_stride, token_stride, group_stride, head_stride, 2), q.owner)
        head_stride = 2 * HEAD_DIM_QK
        group_stride, batch_stride = tokens * heads * head_stride, kv_heads * tokens * heads * head_stride
        address = device.workspace(q.size // 2, stream, "q")
        device.copy(Strided(address, source.shape, (batch_stride, heads * head_stride, group_stride, head_stride, 2)), source, stream)
    # TMA takes no stride of 0; that of an axis of one does not matter.
    strides = (head_stride or 16, group_stride or 16, batch_stride or 16)
    return device.tensor_map(shape.dtype, address, (HEAD_DIM_QK, tokens * heads, kv_heads, q_batches), strides,
                             (TILE_COLUMNS, BLOCK_M, 1, 1))


def _kv_map(shape: DecodeShape, kv_cache: ArrayMemory, device: Device) -> int:
    from ..kernels.hopper_config import BLOCK_N, TILE_COLUMNS

    page_stride, token_stride, head_stride = kv_cache.strides[:3]
    return device.tensor_map(shape.dtype, kv_cache.pointer, (HEAD_DIM_QK, shape.page_size, shape.num_heads_kv, max(kv_cache.shape[0], 1)),
                             (token_stride or 16, head_stride or 16, page_stride or 16),
                             (TILE_COLUMNS, min(shape.page_size, BLOCK_N), 1, 1))


def decode(shape: DecodeShape, schedule: Schedule, q: ArrayMemory, kv_cache: ArrayMemory, block_table: ArrayMemory, out: ArrayMemory,
           lse: ArrayMemory, softmax_scale: float, empty_lse: float, stream: int, device: Device | None = None) -> None:
    from ..kernels.hopper_config import BLOCK_M

    if device is None:
        from .gpu import gpu

        device = gpu(q.device or 0)
    kv_map = _kv_map(shape, kv_cache, device)
    num_workers, rows_per_job = schedule.config.num_workers, schedule.config.rows_per_job
    tables, row_tiles = schedule.addresses, rows_per_job // BLOCK_M
    rows = max(schedule.num_slots, 1) * shape.num_heads_kv * rows_per_job
    with _launch_lock:
        q_map = _q_map(shape, q, device, stream)
        out_address, out_strides = out.pointer, out.strides[:3]
        # The kernels store 16 bytes of a row at a time.
        copied_out = out_address % 16 != 0 or any(stride % 16 for stride in out_strides)
        if copied_out:
            out_address, out_strides = device.workspace(out.size // 2, stream, "out"), _c_strides(out.shape)
        results = (out_address, *out_strides, lse.pointer, *lse.strides)
        # O, and lse2 once for each half of the columns.
        o_partial = device.workspace(rows * (HEAD_DIM_V + 2), stream, "partials")
        partials = (o_partial, o_partial + rows * HEAD_DIM_V * 4)
        # A word for each 16 rows and half of the columns, 0 between launches.
        counters = device.workspace(rows // 16 * 2, stream, "counters")
        device.launch(
            decode_spec(shape.dtype, shape.page_size), (row_tiles, num_workers, shape.num_heads_kv), stream,
            q_map, kv_map, block_table.pointer, *block_table.strides, block_table.shape[1], tables["jobs"], tables["workers"],
            tables["starts"], *results, *partials, counters, shape.heads_per_kv, int(shape.causal), schedule.config.split_blocks,
            max(softmax_scale * LOG2_E, _LEAST_SCALE), empty_lse)
        if schedule.num_slots > 0:
            # About as many thread blocks as the SMs hold together.
            device.launch(merge_spec(shape.dtype), (3 * device.num_sms, 1, 1), stream, tables["merges"], tables["totals"], *partials,
                          *results, row_tiles, shape.num_heads_kv, shape.heads_per_kv, empty_lse)
        if copied_out:
            five = (*out.shape[:3], 1, HEAD_DIM_V)
            device.copy(Strided(out.pointer, five, (*out.strides[:3], 0, 2), out.owner),
                        Strided(out_address, five, (*out_strides, 0, 2)), stream)
