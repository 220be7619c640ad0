"""Split-KV MLA decode for any NVIDIA GPU, and for Numba's CUDA simulator. FP32 units only: the kernel to read first.

A thread block attends `block_m` packed query rows to `block_n` tokens a step. The tile of K is read from global memory once and
serves as V in place, being its first `head_dim_v` columns. With DeepSeek's dims, block_m = 64, block_n = 16, 8 warps:

              dims 0 ........... 575                tokens 0..15                     columns 0 ............. 511
             +----+----+- - -+----+                 +----------+                     +--------------------------+
     64 rows | w0 | w1 |     | w7 |  q_smem         |  s_smem  |                     | rows  0- 7 of O   warp 0 |
             +----+----+- - -+----+   sum over      | 64 x 16, |   softmax,          | rows  8-15        warp 1 |
                       x             --------->     | 8 times  |  ---------->   x    |  ...                     |
             +----+----+- - -+----+  the warps      +----------+  P in place         | rows 56-63        warp 7 |
   16 tokens | w0 | w1 |     | w7 |  k_smem                          k_smem as V     +--------------------------+
             +----+----+- - -+----+                                                    o_rmem

   S = Q K^T  a warp takes a slice of 72 dims of the whole S tile, a lane 8 rows x 4 tokens of that partial sum (s_rmem)
   softmax    4 threads per row, 4 tokens each: they add up the 8 partial sums, and agree on the row's maximum in max_smem
   O += P V   a warp owns 8 rows of O, a lane 16 columns of each: 128 registers of every thread hold O from first step to last

   step       look up pages of tile i+1 | QK | softmax | load tile i+1 into registers | PV | registers to k_smem
   shared     q 148,480  k 37,120  s 40,960  max 1,024  scale 256 = 227,840 bytes of Hopper's 232,448: one thread block per SM
   registers  O 128, tile i+1 36 (in flight during PV), S 32 and operands: under 255, nothing spills

The names say the memory: _smem shared, _rmem registers, plain arguments global. All of shared memory is one array of floats, and
Q_SMEM, K_SMEM, ... are where each tile begins in it: a slice would cost the compiler the knowledge of alignment, and with it the
16-byte loads. Rows lie ROW = 580 floats apart, 4 more than a multiple of 32: 16 bytes of each of 8 rows meet every bank once.
Nothing here relies on the lanes of a warp running in step, so in the simulator a "warp" has 4 lanes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import config as numba_config
from numba.cuda import libdevice, types

from ..config import ceil_div
from ..contract import LN_2
from ..scheduler import (
    BEGIN_BLOCK,
    BEGIN_JOB,
    BEGIN_SPLIT,
    END_BLOCK,
    END_JOB,
    JOB_NUM_BLOCKS,
    JOB_Q_BATCH,
    JOB_Q_BEGIN,
    JOB_Q_LEN,
    JOB_REQUEST,
    JOB_ROW_BEGIN,
    JOB_SEQ_LEN,
)
from .schedule import piece_end, slot_of, visible_tokens

SIMULATOR = bool(numba_config.ENABLE_CUDASIM)

# Unsigned indices, so that no code is made for Python's negative ones: addresses become one register plus a constant.
at = np.uint64

# Below any score, and finite: the kernel is compiled with fastmath, which may assume that there is no infinity.
NO_SCORE = np.float32(-1e30)
MINUS_INFINITY = np.float32(-np.inf)

# What lets the compiler load four neighbouring floats at once. The simulator takes no alignment.
SMEM_ALIGNMENT = None if SIMULATOR else 16

# Forced inlining, because an array of registers cannot be passed to a call. The simulator knows no such option.
inline = cuda.jit(device=True) if SIMULATOR else cuda.jit(device=True, forceinline=True, fastmath=True)


@dataclass(frozen=True)
class SimtConfig:
    """The tiles of one compiled kernel; what follows from them are properties. Sizes in elements unless named bytes."""

    head_dim_qk: int
    head_dim_v: int
    dtype: str
    block_m: int            # query rows of a thread block
    block_n: int            # tokens of a step
    num_threads: int = 256
    warp_size: int = 32     # smaller in the simulator

    def __post_init__(self) -> None:
        lanes = self.warp_size
        rules = {
            f"num_threads must be a multiple of warp_size={lanes}": self.num_threads % lanes == 0,
            "block_m must be a power of two": self.block_m & (self.block_m - 1) == 0,
            f"block_m must be at most num_threads={self.num_threads}": self.block_m <= self.num_threads,
            f"block_m must be a multiple of s_lane_rows={self.s_lane_rows}": self.block_m % self.s_lane_rows == 0,
            f"block_n must be a multiple of 4 and of num_warps={self.num_warps}": self.block_n % max(4, self.num_warps) == 0,
            f"block_n must be a multiple of s_lane_tokens={self.s_lane_tokens}": self.block_n % self.s_lane_tokens == 0,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ValueError(f"{self}: {'; '.join(broken)}")

    @property
    def num_warps(self) -> int:
        return self.num_threads // self.warp_size

    def blocks_per_sm(self, smem_of_sm: int) -> int:
        """Thread blocks to run on an SM together: two where small tiles leave room for the second. Bounds the registers."""
        # The driver keeps 1 KB of every block for itself.
        return 2 if self.block_m <= 16 and 2 * (self.smem_bytes + 1024) <= smem_of_sm else 1

    # S: lanes of a warp as s_lane_rows x s_lane_tokens, each with s_rows x s_tokens of the tile, in a slice of s_dims dims.
    @property
    def s_lane_rows(self) -> int:
        return min(self.block_m, max(self.warp_size // 4, 2))

    @property
    def s_lane_tokens(self) -> int:
        return self.warp_size // self.s_lane_rows

    @property
    def s_rows(self) -> int:
        return self.block_m // self.s_lane_rows

    @property
    def s_tokens(self) -> int:
        return self.block_n // self.s_lane_tokens

    @property
    def s_dims(self) -> int:
        return 4 * ceil_div(self.head_dim_qk, 4 * self.num_warps)

    # Softmax: threads of a row, each with softmax_tokens of it.
    @property
    def threads_per_row(self) -> int:
        return min(self.num_threads // self.block_m, self.block_n)

    @property
    def softmax_tokens(self) -> int:
        return self.block_n // self.threads_per_row

    # O: warps as o_warp_rows x o_warp_columns, each with o_rows rows; a lane has o_columns columns of each, o_vector side by side.
    @property
    def o_rows(self) -> int:
        return self.s_lane_rows

    @property
    def o_warp_rows(self) -> int:
        return self.block_m // self.o_rows

    @property
    def o_warp_columns(self) -> int:
        return self.num_warps // self.o_warp_rows

    @property
    def o_columns(self) -> int:
        columns = ceil_div(self.head_dim_v, self.warp_size * self.o_warp_columns)
        return columns if columns < 4 else 4 * ceil_div(columns, 4)

    @property
    def o_vector(self) -> int:
        return min(self.o_columns, 4)

    # The KV tile: a warp copies whole tokens, a lane copy_dims elements of each.
    @property
    def copy_tokens(self) -> int:
        return self.block_n // self.num_warps

    @property
    def copy_dims(self) -> int:
        columns = self.o_columns * self.warp_size * self.o_warp_columns
        return ceil_div(max(self.s_dims * self.num_warps, columns), self.warp_size)

    # Shared memory, in floats.
    @property
    def row_floats(self) -> int:
        return 32 * ceil_div(self.copy_dims * self.warp_size, 32) + 4

    @property
    def s_row_floats(self) -> int:
        return self.block_n + 4

    @property
    def smem_floats(self) -> dict[str, int]:
        return {"q": self.block_m * self.row_floats, "k": self.block_n * self.row_floats,
                "s": self.num_warps * self.block_m * self.s_row_floats,
                "max": self.block_m * self.threads_per_row, "scale": self.block_m}

    @property
    def smem_bytes(self) -> int:
        return 4 * sum(self.smem_floats.values())


# math.exp2 came with Python 3.11.
exp2 = np.exp2 if SIMULATOR else libdevice.exp2f


@inline
def _bfloat16_to_float32(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inline
def _float32_to_bfloat16(value):
    """To nearest, ties to even. By its bits, because fastmath may assume that there is no NaN."""
    bits = np.float32(value).view(np.uint32)
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16(0x7FFF)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@inline
def _to_float32(value):
    return np.float32(value)


@inline
def _to_float16(value):
    return np.float16(value)


@dataclass(frozen=True)
class StorageType:
    """How the elements of a dtype lie in memory, and the device functions between that and float32."""

    element: types.Type
    to_float32: Callable[[Any], Any]
    from_float32: Callable[[Any], Any]


STORAGE = {"bfloat16": StorageType(types.uint16, _bfloat16_to_float32, _float32_to_bfloat16),
           "float16": StorageType(types.float16, _to_float32, _to_float16),
           "float32": StorageType(types.float32, _to_float32, _to_float32)}


def decode_signature(dtype: str) -> types.Type:
    """Types of the kernel's arguments, so that it is compiled once whatever the strides of its arrays."""
    element, i32, i64, f32 = STORAGE[dtype].element, types.int32, types.int64, types.float32
    strides = types.UniTuple(i64, 3)
    return types.void(element[::1], i64, strides, element[::1], i64, strides, i64, types.uint32, i32[:, :], i32[:, ::1], i32[:, ::1],
                      i32[::1], element[:, :, :, :], f32[:, :, :], f32[:, :, :, ::1], f32[:, :, ::1], i64, types.boolean, i64, f32, f32)


@cache
def make_decode_kernel(config: SimtConfig) -> Callable[..., None]:
    """The kernel for `config`, not yet compiled. Grid (workers, KV heads), `num_threads` threads, `smem_bytes` dynamic shared memory."""
    HEAD_DIM_QK, HEAD_DIM_V, BLOCK_M, BLOCK_N = config.head_dim_qk, config.head_dim_v, config.block_m, config.block_n
    LANES, NUM_WARPS = config.warp_size, config.num_warps
    S_LANE_ROWS, S_LANE_TOKENS, S_ROWS, S_TOKENS = config.s_lane_rows, config.s_lane_tokens, config.s_rows, config.s_tokens
    S_DIMS, THREADS_PER_ROW, SOFTMAX_TOKENS = config.s_dims, config.threads_per_row, config.softmax_tokens
    O_ROWS, O_WARP_COLUMNS, O_COLUMNS, VECTOR = config.o_rows, config.o_warp_columns, config.o_columns, config.o_vector
    COPY_TOKENS, COPY_DIMS, ROW, S_ROW = config.copy_tokens, config.copy_dims, config.row_floats, config.s_row_floats
    ROW_TURNS = ceil_div(BLOCK_M, NUM_WARPS)
    O_SIZE, S_SIZE, KV_SIZE = O_ROWS * O_COLUMNS, S_ROWS * S_TOKENS, COPY_TOKENS * COPY_DIMS

    floats = config.smem_floats
    Q_SMEM = 0
    K_SMEM = Q_SMEM + floats["q"]
    S_SMEM = K_SMEM + floats["k"]
    MAX_SMEM = S_SMEM + floats["s"]
    SCALE_SMEM = MAX_SMEM + floats["max"]
    # P takes the place of the first warp's partial sums, element by element as the softmax consumes them.
    P_SMEM = S_SMEM
    O_SMEM = Q_SMEM

    storage = STORAGE[config.dtype]
    element, to_float32, from_float32 = storage.element, storage.to_float32, storage.from_float32

    @inline
    def load_q(smem, warp_idx, lane_idx, q, q_origin, q_strides, jobs, job, kv_head, heads_per_kv):
        """Q tile to shared memory as float32, a warp per row; zeros where there is no row, and past head_dim_qk."""
        row_begin = jobs[job, JOB_ROW_BEGIN]
        num_rows = jobs[job, JOB_Q_LEN] * heads_per_kv - row_begin
        q_batch, q_begin = jobs[job, JOB_Q_BATCH], jobs[job, JOB_Q_BEGIN]
        for i in range(ROW_TURNS):
            row = warp_idx + i * NUM_WARPS
            if row < BLOCK_M:
                token = q_begin + (row_begin + row) // heads_per_kv
                head = kv_head * heads_per_kv + (row_begin + row) % heads_per_kv
                offset = q_origin + q_batch * q_strides[0] + token * q_strides[1] + head * q_strides[2]
                for j in range(COPY_DIMS):
                    dim = lane_idx + j * LANES
                    value = np.float32(0)
                    if row < num_rows and dim < HEAD_DIM_QK:
                        value = to_float32(q[at(offset + dim)])
                    smem[at(Q_SMEM + row * ROW + dim)] = value

    @inline
    def look_up(offset_rmem, warp_idx, block_table, request, end_token, num_pages, page_size, kv_origin, kv_strides, kv_head, block):
        """Where in the cache the tokens of `block` lie that this warp copies; -1 past the end, the table and outside the cache."""
        for i in range(COPY_TOKENS):
            token = np.uint32(block * BLOCK_N + warp_idx + i * NUM_WARPS)
            offset_rmem[i] = -1
            column = token // page_size
            if token < end_token and column < block_table.shape[1]:
                page = block_table[request, column]
                if 0 <= page < num_pages:
                    offset_rmem[i] = (kv_origin + page * kv_strides[0] + token % page_size * kv_strides[1]
                                      + kv_head * kv_strides[2])

    @inline
    def load_kv(kv_rmem, offset_rmem, lane_idx, kv_cache):
        """KV tile from global memory to registers, a warp per token; nothing is read where there is no token."""
        for i in range(COPY_TOKENS):
            for j in range(COPY_DIMS):
                kv_rmem[i * COPY_DIMS + j] = 0
            if offset_rmem[i] >= 0:
                for j in range(COPY_DIMS):
                    dim = lane_idx + j * LANES
                    if dim < HEAD_DIM_QK:
                        kv_rmem[i * COPY_DIMS + j] = kv_cache[at(offset_rmem[i] + dim)]

    @inline
    def store_kv(smem, kv_rmem, warp_idx, lane_idx):
        """KV tile from registers to shared memory, as float32."""
        for i in range(COPY_TOKENS):
            for j in range(COPY_DIMS):
                smem[at(K_SMEM + (warp_idx + i * NUM_WARPS) * ROW + lane_idx + j * LANES)] = to_float32(kv_rmem[i * COPY_DIMS + j])

    @inline
    def qk(smem, warp_idx, lane_idx):
        """S = Q K^T over this warp's slice of the dims, to its own part of s_smem."""
        # Neighbouring lanes share a row, lanes two apart share a token: either way pairs read the same 16 bytes.
        lane_row = lane_idx // 2 % S_LANE_ROWS
        lane_token = lane_idx % 2 + lane_idx // (2 * S_LANE_ROWS) * 2
        s_rmem = cuda.local.array(S_SIZE, types.float32)
        for i in range(S_SIZE):
            s_rmem[i] = 0
        for step in range(S_DIMS // 4):
            dim = warp_idx * S_DIMS + step * 4
            for r in range(S_ROWS):
                for t in range(S_TOKENS):
                    for d in range(4):
                        s_rmem[r * S_TOKENS + t] += (smem[at(Q_SMEM + (lane_row + r * S_LANE_ROWS) * ROW + dim + d)]
                                                     * smem[at(K_SMEM + (lane_token + t * S_LANE_TOKENS) * ROW + dim + d)])
        for r in range(S_ROWS):
            for t in range(S_TOKENS):
                row = warp_idx * BLOCK_M + lane_row + r * S_LANE_ROWS
                smem[at(S_SMEM + row * S_ROW + lane_token + t * S_LANE_TOKENS)] = s_rmem[r * S_TOKENS + t]

    @inline
    def softmax(smem, tid, num_visible, scale_log2, row_max, row_sum):
        """S to P = exp2(scale_log2 S - row_max), rounded as V is. Returns the new maximum and this thread's share of the row's sum.

        `num_visible` counts the tokens of this block that the row sees. `row_max` is in units of log2.
        """
        row, part = tid // THREADS_PER_ROW, tid % THREADS_PER_ROW
        score_rmem = cuda.local.array(SOFTMAX_TOKENS, types.float32)
        if row < BLOCK_M:
            part_max = NO_SCORE
            for t in range(SOFTMAX_TOKENS):
                token = part + t * THREADS_PER_ROW
                score = np.float32(0)
                for warp in range(NUM_WARPS):
                    score += smem[at(S_SMEM + (warp * BLOCK_M + row) * S_ROW + token)]
                score_rmem[t] = score * scale_log2
                if token < num_visible:
                    part_max = max(part_max, score_rmem[t])
            smem[at(MAX_SMEM + row * THREADS_PER_ROW + part)] = part_max
        cuda.syncthreads()  # max_smem is whole, and nobody reads partial sums any more
        if row < BLOCK_M:
            old_max = row_max
            for i in range(THREADS_PER_ROW):
                row_max = max(row_max, smem[at(MAX_SMEM + row * THREADS_PER_ROW + i)])
            scale = exp2(old_max - row_max)
            row_sum *= scale
            for t in range(SOFTMAX_TOKENS):
                token = part + t * THREADS_PER_ROW
                p = np.float32(0)
                if token < num_visible:
                    p = exp2(score_rmem[t] - row_max)
                row_sum += p
                smem[at(P_SMEM + row * S_ROW + token)] = to_float32(from_float32(p))
            if part == 0:
                smem[at(SCALE_SMEM + row)] = scale
        return row_max, row_sum

    @inline
    def pv_token(smem, o_rmem, p_begin, v_begin):
        """O += P V of one token."""
        for c in range(O_COLUMNS):
            v = smem[at(v_begin + c // VECTOR * (VECTOR * LANES) + c % VECTOR)]
            for r in range(O_ROWS):
                o_rmem[r * O_COLUMNS + c] += smem[at(p_begin + r * S_ROW)] * v

    @inline
    def pv(smem, o_rmem, first_row, first_column):
        """O = scale O + P V, with V the first columns of k_smem."""
        for r in range(O_ROWS):
            scale = smem[at(SCALE_SMEM + first_row + r)]
            for c in range(O_COLUMNS):
                o_rmem[r * O_COLUMNS + c] *= scale
        for step in range(BLOCK_N // 4):
            # Four calls, because the compiler leaves a loop this large as it is; so P of four tokens is one load.
            p_begin = P_SMEM + first_row * S_ROW + step * 4
            v_begin = K_SMEM + first_column + step * 4 * ROW
            pv_token(smem, o_rmem, p_begin, v_begin)
            pv_token(smem, o_rmem, p_begin + 1, v_begin + ROW)
            pv_token(smem, o_rmem, p_begin + 2, v_begin + 2 * ROW)
            pv_token(smem, o_rmem, p_begin + 3, v_begin + 3 * ROW)

    @inline
    def store_lse(smem, tid, jobs, job, kv_head, heads_per_kv, slot, sees_any, row_max, row_sum, lse, lse2_partial, empty_lse):
        """1 / row sum to scale_smem, 0 for a row that sees nothing; log of the sum to `lse`, or to `slot` of the workspace."""
        row, part = tid // THREADS_PER_ROW, tid % THREADS_PER_ROW
        if row < BLOCK_M:
            smem[at(MAX_SMEM + row * THREADS_PER_ROW + part)] = row_sum
        cuda.syncthreads()  # every thread's share of the sums is in max_smem
        if row < BLOCK_M and part == 0:
            total = np.float32(0)
            for i in range(THREADS_PER_ROW):
                total += smem[at(MAX_SMEM + row * THREADS_PER_ROW + i)]
            smem[at(SCALE_SMEM + row)] = np.float32(1) / total if sees_any else np.float32(0)
            job_row = jobs[job, JOB_ROW_BEGIN] + row
            if slot >= 0:
                lse2_partial[slot, kv_head, row] = row_max + np.float32(math.log2(total)) if sees_any else MINUS_INFINITY
            elif job_row < jobs[job, JOB_Q_LEN] * heads_per_kv:
                token = jobs[job, JOB_Q_BEGIN] + job_row // heads_per_kv
                head = kv_head * heads_per_kv + job_row % heads_per_kv
                lse[jobs[job, JOB_Q_BATCH], head, token] = (
                    (row_max + np.float32(math.log2(total))) * np.float32(LN_2) if sees_any else empty_lse)
        cuda.syncthreads()  # scale_smem is whole

    @inline
    def store_o(smem, o_rmem, warp_idx, lane_idx, first_row, first_column, jobs, job, kv_head, heads_per_kv, slot, out, o_partial):
        """O / row sum to `out`, or to `slot` of the workspace: through shared memory, where a warp takes whole rows of it."""
        for r in range(O_ROWS):
            scale = smem[at(SCALE_SMEM + first_row + r)]
            for c in range(O_COLUMNS):
                column = first_column + c // VECTOR * (VECTOR * LANES) + c % VECTOR
                smem[at(O_SMEM + (first_row + r) * ROW + column)] = o_rmem[r * O_COLUMNS + c] * scale
        cuda.syncthreads()  # O is whole in shared memory
        row_begin = jobs[job, JOB_ROW_BEGIN]
        num_rows = jobs[job, JOB_Q_LEN] * heads_per_kv - row_begin
        q_batch, q_begin = jobs[job, JOB_Q_BATCH], jobs[job, JOB_Q_BEGIN]
        for i in range(ROW_TURNS):
            row = warp_idx + i * NUM_WARPS
            if row < min(num_rows, BLOCK_M):
                token = q_begin + (row_begin + row) // heads_per_kv
                head = kv_head * heads_per_kv + (row_begin + row) % heads_per_kv
                for column in range(lane_idx, HEAD_DIM_V, LANES):
                    value = smem[at(O_SMEM + row * ROW + column)]
                    if slot >= 0:
                        o_partial[slot, kv_head, row, column] = value
                    else:
                        out[q_batch, token, head, column] = from_float32(value)
        cuda.syncthreads()  # O has left shared memory

    def simt_decode(q, q_origin, q_strides, kv_cache, kv_origin, kv_strides, num_pages, page_size, block_table, jobs, workers,
                    num_splits, out, lse, o_partial, lse2_partial, heads_per_kv, causal, split_blocks, scale_log2, empty_lse):
        worker, kv_head = cuda.blockIdx.x, cuda.blockIdx.y
        tid = np.uint32(cuda.threadIdx.x)
        warp_idx, lane_idx = tid // LANES, tid % LANES

        # What this thread owns: O_ROWS rows of O from first_row on, in columns from first_column on; a share of softmax_row.
        first_row = warp_idx // O_WARP_COLUMNS * O_ROWS
        first_column = warp_idx % O_WARP_COLUMNS * (O_COLUMNS * LANES) + lane_idx * VECTOR
        softmax_row = tid // THREADS_PER_ROW

        smem = cuda.shared.array(0, types.float32, SMEM_ALIGNMENT)
        o_rmem = cuda.local.array(O_SIZE, types.float32)
        kv_rmem = cuda.local.array(KV_SIZE, element)
        offset_rmem = cuda.local.array(COPY_TOKENS, types.int64)

        for job in range(workers[worker, BEGIN_JOB], workers[worker, END_JOB] + 1):
            block, split = 0, 0
            if job == workers[worker, BEGIN_JOB]:
                block, split = workers[worker, BEGIN_BLOCK], workers[worker, BEGIN_SPLIT]

            # One piece of the job, unless batch_invariant cuts it at fixed blocks; a job without tokens is one empty piece.
            while True:
                end_block = workers[worker, END_BLOCK] if job == workers[worker, END_JOB] else jobs[job, JOB_NUM_BLOCKS]
                num_parts = num_splits[job + 1] - num_splits[job]
                stop = piece_end(block, end_block, split_blocks, num_parts)
                request, seq_len, q_len = jobs[job, JOB_REQUEST], jobs[job, JOB_SEQ_LEN], jobs[job, JOB_Q_LEN]
                job_row = jobs[job, JOB_ROW_BEGIN] + softmax_row
                visible = 0
                if softmax_row < BLOCK_M and job_row < q_len * heads_per_kv:
                    visible = visible_tokens(seq_len, q_len, job_row // heads_per_kv, causal)
                sees_any = visible > block * BLOCK_N
                row_max, row_sum = NO_SCORE, np.float32(0)

                load_q(smem, warp_idx, lane_idx, q, q_origin, q_strides, jobs, job, kv_head, heads_per_kv)
                look_up(offset_rmem, warp_idx, block_table, request, seq_len, num_pages, page_size, kv_origin, kv_strides, kv_head,
                        block)
                load_kv(kv_rmem, offset_rmem, lane_idx, kv_cache)
                store_kv(smem, kv_rmem, warp_idx, lane_idx)
                cuda.syncthreads()  # q_smem and k_smem are whole
                for i in range(O_SIZE):
                    o_rmem[i] = 0
                while block < stop:
                    look_up(offset_rmem, warp_idx, block_table, request, min(seq_len, stop * BLOCK_N), num_pages, page_size,
                            kv_origin, kv_strides, kv_head, block + 1)
                    qk(smem, warp_idx, lane_idx)
                    cuda.syncthreads()  # every warp's part of s_smem is whole
                    row_max, row_sum = softmax(smem, tid, visible - block * BLOCK_N, scale_log2, row_max, row_sum)
                    cuda.syncthreads()  # P and scale_smem are whole
                    load_kv(kv_rmem, offset_rmem, lane_idx, kv_cache)
                    pv(smem, o_rmem, first_row, first_column)
                    cuda.syncthreads()  # nobody reads k_smem as V, or P, any more
                    store_kv(smem, kv_rmem, warp_idx, lane_idx)
                    cuda.syncthreads()  # the next k_smem is whole
                    block += 1

                slot = slot_of(num_splits, job, split) if num_parts > 1 else -1
                store_lse(smem, tid, jobs, job, kv_head, heads_per_kv, slot, sees_any, row_max, row_sum, lse, lse2_partial, empty_lse)
                store_o(smem, o_rmem, warp_idx, lane_idx, first_row, first_column, jobs, job, kv_head, heads_per_kv, slot, out, o_partial)
                split += 1
                if block >= (workers[worker, END_BLOCK] if job == workers[worker, END_JOB] else jobs[job, JOB_NUM_BLOCKS]):
                    break

    return simt_decode
