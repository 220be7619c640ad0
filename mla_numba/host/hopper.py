"""Backend `hopper`: TMA and wgmma kernels for compute capability 9.0. Arrays are described, not wrapped: a launch packs addresses."""

import math
import threading
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, Protocol

import numpy as np
from numba import cuda

from ..config import DecodeShape, ScheduleConfig, ceil_div
from ..contract import HEAD_DIM_QK, HEAD_DIM_V, LOG2_E
from ..kernels import hopper_config
from ..kernels.hopper_config import FIRST_MAP, HALF_TILES, NUM_TILES, NUM_WARPS, SIDE_TILES, TILE_COLUMNS, HopperConfig
from ..scheduler import MERGE_MAX_SHARES
from . import simt
from .hopper_cut import is_for_kernels, tiles_of
from .hopper_cut import schedule_config as schedule_config
from .launch import ArrayMemory, KernelSpec, Strided, array_words
from .schedule import NewWords, Schedule, build_arguments, layout, make_device_schedule
from .simt import merge_states as merge_states
from .workspaces import stream_key

COMPUTE_CAPABILITY = (9, 0)
# It is given arrays as they are described, not as Numba device arrays.
TAKES_DESCRIPTIONS = True
# Tensor maps that a prepared launch finds by the address alone, and workspaces that it finds by the stream alone; `Device` has them all.
_MAX_KEPT = 256
# ex2.approx flushes smaller ones, and 0 times the infinity that hides a token would be no number.
_LEAST_SCALE = float(np.finfo(np.float32).tiny)


def unavailable(device: int | None = None) -> list[str]:
    """Why this machine, on this GPU or the current one, cannot run the backend."""
    if simt.SIMULATOR:
        return ["the CUDA simulator has neither TMA nor wgmma"]
    reasons = simt.unavailable()
    if not reasons:
        capability = (cuda.get_current_device() if device is None else cuda.gpus[device]).compute_capability
        if tuple(capability) != COMPUTE_CAPABILITY:
            reasons = [f"the GPU has compute capability {capability[0]}.{capability[1]}, and wgmma needs 9.0"]
    return reasons


def unsupported(shape: DecodeShape, _device: int | None = None) -> list[str]:
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
    steps = list(zip(kv_cache.shape[:-1], kv_cache.strides[:-1], strict=True))
    if kv_cache.pointer % 16 or any(stride % 16 or stride < 0 for _, stride in steps):
        return ["kv_cache: TMA needs its first element and all strides at multiples of 16 bytes"]
    if kv_cache.size > 0 and any(size > 1 and stride == 0 for size, stride in steps):
        return ["kv_cache: an axis has a stride of 0, and TMA takes none"]
    return []


def make_schedule(config: ScheduleConfig, shape: DecodeShape, seq_lens: ArrayMemory, cu_seqlens_q: ArrayMemory | None, stream: int,
                  new_words: NewWords, max_seq_len: int | None) -> Schedule:
    from .gpu import gpu

    device = gpu(seq_lens.device or 0)
    lengths = seq_lens, seq_lens if cu_seqlens_q is None else cu_seqlens_q
    layouts = [(array.shape, array.strides) for array in lengths]

    def build(schedule: Schedule) -> None:
        kernel = _plan_kernel(device, schedule.config, shape, *layouts)
        with _launch_lock:
            for put, address in zip(kernel.setters, (*[array.pointer for array in lengths], *schedule.addresses.values()), strict=True):
                put(address)
            device.launch_bound(stream, kernel)

    return make_device_schedule(config, shape, new_words, build, stream, max_seq_len)


@lru_cache(maxsize=_MAX_KEPT)
def _plan_kernel(device: Any, config: ScheduleConfig, shape: DecodeShape, *lengths: tuple[tuple[int, ...], tuple[int, ...]]) -> Any:
    """What fills a schedule, of which the addresses of `lengths`, that are so long with such strides, and of the tables are to be set."""
    if is_for_kernels(config):
        # Not a plan that is only looked at (flash_mla): its decode comes next.
        row_tiles, num_rows = tiles_of(config)
        # The first one takes as long to compile as the others (`compile_kernels`), of which the one that is linked soonest comes last.
        device.load(decode_spec(shape.dtype, shape.page_size, row_tiles, num_rows), schedule_spec(), merge_spec(shape.dtype, num_rows))
    places, _ = layout(config, shape)
    tables = [(size, tuple(4 * math.prod(size[i + 1:]) for i in range(len(size)))) for _, size in places.values()]
    before, behind = ([word for array in arrays for word in array_words(None, *array)] for arrays in (lengths, tables))
    return device.bind(schedule_spec(), (1, 1, 1), *before, *build_arguments(config, shape), *behind)


class Bound(Protocol):
    """A kernel and its arguments, some of which are to be set before each launch."""

    @property
    def setters(self) -> Sequence[Callable[..., None]]:
        """One for each run of arguments that were None, which it takes."""


class Device(Protocol):
    """What `decode` needs of a GPU: `gpu.Gpu`, or the emulator of verify/emulator."""

    num_sms: int
    # Of calls that did not come to their end (an error, an interrupt): how many counters, by their address. What the decode counted up no
    # merge took back; the next one would take parts for there that are not.
    unfinished: dict[int, int]

    def tensor_map(self, dtype: str, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
        """As a kernel takes it for a parameter."""

    def workspace(self, num_floats: int, stream: int, purpose: str) -> int:
        """Address of memory that stays; `stream` is a `stream_key`."""

    def bind(self, spec: KernelSpec, grid: tuple[int, int, int], *arguments: Any) -> "Bound":
        """A kernel to be launched by `launch_bound`; of its arguments those that are None are set before."""

    def launch_bound(self, stream: int, *kernels: Any) -> None:
        """Launch kernels that `bind` made, one behind the other."""

    def copy(self, destination: Strided, source: Strided, stream: int) -> None: ...

    def clear(self, address: int, num_words: int, stream: int) -> None: ...


@cache
def decode_spec(dtype: str, page_size: int, row_tiles: int, num_rows: int) -> KernelSpec:
    config = HopperConfig(dtype, page_size, row_tiles, num_rows)
    return KernelSpec("hopper_decode", "make_decode_kernel", (config,), "decode_signature", hopper_config.NUM_THREADS,
                      hopper_config.SMEM_BYTES, fastmath=True, cluster_size=config.cluster_size)


@cache
def merge_spec(dtype: str, num_rows: int) -> KernelSpec:
    from ..kernels.hopper_merge import NUM_THREADS, blocks_per_sm

    # Not fastmath: here infinities are data.
    return KernelSpec("hopper_merge", "make_merge_kernel", (dtype, num_rows), "merge_signature", NUM_THREADS, 0, fastmath=False,
                      blocks_per_sm=blocks_per_sm(num_rows))


@cache
def schedule_spec() -> KernelSpec:
    from ..kernels.schedule import NUM_THREADS

    return KernelSpec("schedule", "make_schedule_kernel", (), "schedule_signature", NUM_THREADS, 0, fastmath=False, waits_itself=False)


# Held from the decode launch to the merge launch: another thread's decode on the same stream must not come between them.
_launch_lock = threading.Lock()


def _c_strides(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Byte strides of the leading three of four axes of 16-bit elements in C order."""
    return 2 * shape[1] * shape[2] * shape[3], 2 * shape[2] * shape[3], 2 * shape[3]


def _q_map(shape: DecodeShape, q: ArrayMemory, num_rows: int, device: Device) -> Callable[[int, int], bytes]:
    """How a q that lies as this one, at any address aligned alike, gets its tensor map: a function of its address and the stream.

    The map is of (packed rows, tiles, KV heads, q batches), a box is a row tile. Packed rows are token by token, head by head; where q's
    strides have no such axis, or suit no TMA, q is copied first."""
    q_batches, tokens = q.shape[:2]
    heads, kv_heads = shape.heads_per_kv, shape.num_heads_kv
    batch_stride, token_stride, head_stride = q.strides[:3]
    group_stride, num_floats = heads * head_stride, q.size // 2
    sizes, box = (TILE_COLUMNS, tokens * heads, NUM_TILES, kv_heads, q_batches), (TILE_COLUMNS, num_rows, NUM_TILES, 1, 1)
    packed = tokens == 1 or (kv_heads == 1 and token_stride == group_stride)
    steps = (tokens * heads, head_stride), (kv_heads, group_stride), (q_batches, batch_stride)
    fits = packed and q.pointer % 16 == 0 and all(step % 16 == 0 and step >= (size > 1) for size, step in steps)
    # TMA takes no stride of 0; that of an axis of one does not matter.
    strides = (head_stride or 16, 2 * TILE_COLUMNS, group_stride or 16, batch_stride or 16)
    row = 2 * HEAD_DIM_QK
    copy_strides = (row, 2 * TILE_COLUMNS, tokens * heads * row, kv_heads * tokens * heads * row)
    five = (q_batches, tokens, kv_heads, heads, HEAD_DIM_QK)
    source_strides = (batch_stride, token_stride, group_stride, head_stride, 2)
    destination_strides = (copy_strides[3], heads * row, copy_strides[2], row, 2)

    @lru_cache(maxsize=_MAX_KEPT)
    def in_place(address: int, _stream: int) -> bytes:
        return device.tensor_map(shape.dtype, address, sizes, strides, box)

    def of_a_copy(address: int, stream: int) -> bytes:
        copied = device.workspace(num_floats, stream_key(stream), "q")
        device.copy(Strided(copied, five, destination_strides), Strided(address, five, source_strides), stream)
        return device.tensor_map(shape.dtype, copied, sizes, copy_strides, box)

    return in_place if fits else of_a_copy


def _kv_maps(shape: DecodeShape, kv_cache: ArrayMemory, config: HopperConfig, device: Device) -> Callable[[int], tuple[bytes, bytes]]:
    """How a cache that lies as this one, at any address that TMA takes, gets its tensor maps: boxes are the left and right sides of blocks,
    or the two halves of a right side; of eight tokens, if pages are smaller than a block."""
    page_stride, token_stride, head_stride = kv_cache.strides[:3]
    num_pages, heads = kv_cache.shape[0], shape.num_heads_kv
    if num_pages == 0:
        # A tensor map has a page at least, and must begin where there is memory (H100). Every page id reads as zeros.
        page_stride, token_stride, head_stride = _c_strides((1, shape.page_size, heads, HEAD_DIM_QK))
    sizes = (TILE_COLUMNS, shape.page_size, NUM_TILES, heads, max(num_pages, 1))
    strides = (token_stride or 16, 2 * TILE_COLUMNS, head_stride or 16, page_stride or 16)
    box_tiles = SIDE_TILES if config.cluster_size == 1 else (HALF_TILES, SIDE_TILES[1] - HALF_TILES)
    left, right = ((TILE_COLUMNS, config.box_rows, tiles, 1, 1) for tiles in box_tiles)

    @lru_cache(maxsize=_MAX_KEPT)
    def tensor_maps(address: int) -> tuple[bytes, bytes]:
        if num_pages == 0:
            address = device.workspace(page_stride // 4, 0, "zeros")
        return (device.tensor_map(shape.dtype, address, sizes, strides, left),
                device.tensor_map(shape.dtype, address, sizes, strides, right))

    return tensor_maps


class Launch(Protocol):
    """Of a decode whose arrays are at these addresses, on a stream; by the tables of a plan like the one it was prepared for."""

    def __call__(self, schedule: Schedule, stream: int, q: int, kv_cache: int, block_table: int, out: int, lse: int) -> None: ...


def prepare(shape: DecodeShape, schedule: Schedule, q: ArrayMemory, kv_cache: ArrayMemory, block_table: ArrayMemory, out: ArrayMemory,
            lse: ArrayMemory, softmax_scale: float, empty_lse: float, device: Device | None = None) -> Launch:
    """All that follows from how the arrays lie, done once for calls that differ in addresses, stream and lengths only.

    What it returns holds on to none of the arrays.
    """
    from ..kernels.hopper_merge import ITEM_ROWS, ITEMS_PER_GROUP, blocks_per_sm

    if device is None:
        from .gpu import gpu

        device = gpu(q.device or 0)
    num_workers, rows_per_job, split_blocks = schedule.config.num_workers, schedule.config.rows_per_job, schedule.config.split_blocks
    num_slots, num_kv_heads, heads_per_kv = schedule.num_slots, shape.num_heads_kv, shape.heads_per_kv
    row_tiles, num_rows = tiles_of(schedule.config)
    config = HopperConfig(shape.dtype, shape.page_size, row_tiles, num_rows)
    q_map, kv_maps = _q_map(shape, q, num_rows, device), _kv_maps(shape, kv_cache, config, device)
    rows = max(num_slots, 1) * num_kv_heads * rows_per_job
    # A word for each warp of a row tile, 0 between launches.
    num_counters = rows // num_rows * NUM_WARPS
    # O, and maxima and sums.
    row_floats = HEAD_DIM_V + 2 * config.num_states
    kernel, merge_kernel = decode_spec(shape.dtype, shape.page_size, row_tiles, num_rows), merge_spec(shape.dtype, num_rows)
    # A job's rows are those of a request, or as many as its tiles have.
    row_groups = ceil_div(rows_per_job if shape.ragged else min(rows_per_job, shape.seq_len_q * heads_per_kv), ITEM_ROWS)
    # A job has two pieces beyond the first for each row that it has in the merge table, or more, if a share has four. Where shares are
    # smaller a thread block may have several rows: it goes on to the next.
    merge_rows = min(schedule.extra_splits // 2, schedule.config.max_jobs(shape) * MERGE_MAX_SHARES)
    merge_items = ITEMS_PER_GROUP * row_groups
    merge_rows = max(1, min(merge_rows, blocks_per_sm(num_rows) * device.num_sms // (merge_items * num_kv_heads)))
    num_requests, max_pages = block_table.shape
    out_shape, out_strides, out_floats = out.shape, out.strides[:3], out.size // 2
    # The kernels store 16 bytes of a row at a time.
    copies_out = any(step % 16 for step in (*out_strides, out.pointer))
    written_strides = _c_strides(out_shape) if copies_out else out_strides
    # Tables, workspaces and maps, with the block table behind them; the cache; out; lse: each call has its own.
    decode = device.bind(kernel, (row_tiles, num_workers, num_kv_heads), *[None] * FIRST_MAP, None, None, None,
                         None, *block_table.strides, max_pages, num_requests, None, *kv_cache.strides[:3], kv_cache.shape[0],
                         None, *written_strides, None, *lse.strides,
                         heads_per_kv, int(shape.causal), split_blocks, max(softmax_scale * LOG2_E, _LEAST_SCALE), empty_lse)
    set_tables_and_maps, set_cache, set_out, set_lse = decode.setters
    kernels: list[Any] = [decode]
    if num_slots > 0:
        # Tables and workspaces, with out behind them; lse.
        merge = device.bind(merge_kernel, (merge_items, num_kv_heads, merge_rows), *[None] * 5, None, *written_strides, None, *lse.strides,
                            row_tiles, heads_per_kv, empty_lse)
        set_merge_tables_and_out, set_merge_lse = merge.setters
        kernels.append(merge)

    @lru_cache(maxsize=_MAX_KEPT)
    def workspaces(stream: int) -> tuple[int, int, int]:
        o_partial = device.workspace(rows * row_floats, stream, "partials")
        return o_partial, o_partial + rows * HEAD_DIM_V * 4, device.workspace(num_counters, stream, "counters")

    def launch(schedule: Schedule, stream: int, q: int, kv_cache: int, block_table: int, out: int, lse: int) -> None:
        tables = schedule.addresses
        with _launch_lock:
            key = stream_key(stream)
            o_partial, state_partial, counters = workspaces(key)
            written = device.workspace(out_floats, key, "out") if copies_out else out
            set_tables_and_maps(tables["jobs"], tables["workers"], tables["starts"], o_partial, state_partial, counters,
                                q_map(q, stream), *kv_maps(kv_cache), block_table)
            set_cache(kv_cache)
            set_out(written)
            set_lse(lse)
            if num_slots > 0:
                set_merge_tables_and_out(tables["merges"], tables["totals"], o_partial, state_partial, counters, written)
                set_merge_lse(lse)
            if counters in device.unfinished:
                device.clear(counters, device.unfinished[counters], stream)
            device.unfinished[counters] = num_counters
            device.launch_bound(stream, *kernels)
            del device.unfinished[counters]
            if copies_out:
                five = (*out_shape[:3], 1, HEAD_DIM_V)
                device.copy(Strided(out, five, (*out_strides, 0, 2)), Strided(written, five, (*written_strides, 0, 2)), stream)

    return launch


def decode(shape: DecodeShape, schedule: Schedule, q: ArrayMemory, kv_cache: ArrayMemory, block_table: ArrayMemory, out: ArrayMemory,
           lse: ArrayMemory, softmax_scale: float, empty_lse: float, stream: int, device: Device | None = None) -> Launch:
    """Decode; returns what does it again, with arrays that lie alike, at less cost."""
    launch = prepare(shape, schedule, q, kv_cache, block_table, out, lse, softmax_scale, empty_lse, device)
    launch(schedule, stream, q.pointer, kv_cache.pointer, block_table.pointer, out.pointer, lse.pointer)
    return launch
