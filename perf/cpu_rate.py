"""Rate of the cpu backend against this machine's float32 GEMM and the plain NumPy way: `python perf/cpu_rate.py [--requests 8 ...]`.

FLOPs are 2 (head_dim_qk + head_dim_v) per token, head and query. Medians; ours, the matmul and NumPy take turns.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mla_numba.config import DecodeShape
from mla_numba.host import cpu

HEAD_DIM_QK, HEAD_DIM_V, PAGE_SIZE = 576, 512, 64
GEMM_SIZE = 4096


def numpy_way(q, kv_cache, block_table, scale):
    """Gather each request's pages, then matmul, softmax, matmul in float32."""
    out = np.empty((*q.shape[:3], HEAD_DIM_V), q.dtype)
    for request, pages in enumerate(block_table):
        k = kv_cache[pages].reshape(-1, HEAD_DIM_QK).astype(np.float32)
        scores = q[request, 0].astype(np.float32) @ k.T * np.float32(scale)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[request, 0] = (p / p.sum(axis=1, keepdims=True)) @ k[:, :HEAD_DIM_V]
    return out


def seconds(function):
    # Threads of the way measured before spin for a while, on the cores that this one needs.
    time.sleep(0.3)
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--samples", type=int, default=5)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16 if args.dtype == "bfloat16" else args.dtype)
    max_pages = -(-args.tokens // PAGE_SIZE)
    q = rng.standard_normal((args.requests, 1, args.heads, HEAD_DIM_QK), np.float32).astype(dtype)
    kv_cache = rng.standard_normal((args.requests * max_pages, PAGE_SIZE, 1, HEAD_DIM_QK), np.float32).astype(dtype)
    block_table = rng.permutation(len(kv_cache)).astype(np.int32).reshape(args.requests, max_pages)
    seq_lens = np.full(args.requests, max_pages * PAGE_SIZE, np.int32)
    scale = HEAD_DIM_QK**-0.5

    shape = DecodeShape(batch=args.requests, seq_len_q=1, total_q=args.requests, num_heads_q=args.heads, num_heads_kv=1,
                        head_dim_qk=HEAD_DIM_QK, head_dim_v=HEAD_DIM_V, page_size=PAGE_SIZE, dtype=args.dtype, causal=True,
                        batch_invariant=False)
    schedule = cpu.make_schedule(cpu.schedule_config(shape), shape, seq_lens, None, None)
    out, lse = np.empty((*q.shape[:3], HEAD_DIM_V), dtype), np.empty((args.requests, args.heads, 1), np.float32)
    storage = np.uint16 if dtype.itemsize == 2 else np.float32

    def ours():
        cpu.decode(shape, schedule, q.view(storage), kv_cache.view(storage), block_table, out.view(storage), lse, scale, np.inf, None)

    first_call = seconds(ours)
    square = rng.standard_normal((GEMM_SIZE, GEMM_SIZE), np.float32)
    ways = {"float32 matmul": lambda: square @ square, "mla_numba cpu": ours,
            "NumPy, gather and matmul": lambda: numpy_way(q, kv_cache, block_table, scale)}
    decode_flops = 2 * (HEAD_DIM_QK + HEAD_DIM_V) * args.heads * int(seq_lens.sum())
    flops = dict(zip(ways, (2 * GEMM_SIZE**3, decode_flops, decode_flops), strict=True))
    times = {name: [] for name in ways}
    for _ in range(args.samples):
        for name, way in ways.items():
            times[name].append(seconds(way))
    rates = {name: flops[name] / median(times[name]) / 1e9 for name in ways}
    case = f"{args.requests} requests x {args.heads} heads x {seq_lens[0]} tokens, {args.dtype}"
    table = Table("", "ms", "GFLOP/s", "of the matmul", title=f"{case}, {schedule.config.num_workers} threads")
    for name in ways:
        table.add_row(name, f"{median(times[name]) * 1e3:.0f}", f"{rates[name]:.0f}", f"{rates[name] / rates['float32 matmul']:.0%}")
    console = Console()
    console.print(table)
    console.print(f"ours / NumPy: {rates['mla_numba cpu'] / rates['NumPy, gather and matmul']:.2f}x    first call: {first_call:.1f} s")
    error = np.abs(out.astype(np.float64) - numpy_way(q, kv_cache, block_table, scale).astype(np.float64)).max()
    console.print(f"largest difference from NumPy: {error:.1e}")


if __name__ == "__main__":
    main()
