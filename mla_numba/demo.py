"""First light: decode a batch as it stood in a real server on whatever this machine has, check every row against float64, time it.

    python -m mla_numba [--batch NAME | --lens 100,200,...] [--heads 128] [--backend auto] ...

The check is written out here, in NumPy, because a wheel has no `reference`; verify/test_l0_docs.py holds the two against each other.
"""

import argparse
import json
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numba
import numpy as np
from numba import cuda
from numba.cuda import config as numba_cuda_config

from . import __version__
from .api import mla_decode, plan_decode
from .config import DecodeShape, ceil_div
from .contract import BACKENDS, DTYPES, HEAD_DIM_LATENT, HEAD_DIM_QK, HEAD_DIM_ROPE, HEAD_DIM_V
from .dispatch import choose_backend, unavailable
from .dtypes import NUMPY_DTYPE, STORAGE_DTYPE
from .errors import BackendUnavailable

DEFAULT_BATCH = "azure_conv_32"
# DeepSeek-V3 without the latent: each head would keep a key of 128 + 64 columns and a value of 128.
MULTI_HEAD_COLUMNS = 320
# The result and the probabilities are rounded to the dtype once each: four times its unit roundoff. In float32 the sums weigh more.
REL_BOUND = {"bfloat16": 2.0**-7, "float16": 2.0**-9, "float32": 2.0**-16}
LSE_BOUND = 1e-3
# What no request may see: slots past a length, table columns past its pages.
POISON_KV, POISON_PAGE = np.nan, 2147480000


@dataclass(frozen=True)
class Batch:
    """Requests to decode: lengths, and the ids of the blocks of tokens that each begins with (equal ids: equal tokens up to there)."""

    name: str
    source: str
    seq_lens: list[int]
    prefix_blocks: list[list[int]]
    prefix_block_tokens: int = 0


def load_batches() -> dict[str, Batch]:
    document = json.loads(files(__package__).joinpath("data/serving_batches.json").read_text())
    return {name: Batch(name, document["sources"][name.partition("_")[0]], entry["seq_lens"],
                        entry.get("prefix_blocks", [[]] * len(entry["seq_lens"])), entry.get("prefix_block_tokens", 0))
            for name, entry in document["batches"].items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if the result is right, 1 if it is not, 2 if it cannot run."""
    args = _parse(argv)
    if args.list:
        _list_batches()
        return 0
    try:
        _report_machine()
        _require_tested_numpy()
        return _run(args)
    except (BackendUnavailable, ImportError, MemoryError) as error:
        print(f"\nmla_numba: {error or 'not enough memory for this batch'}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mla_numba", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="list the batches that come with the package")
    parser.add_argument("--batch", default=DEFAULT_BATCH, choices=sorted(load_batches()), metavar="NAME", help="a batch of --list")
    parser.add_argument("--lens", type=_lengths, metavar="N,N,...", help="tokens of each request, instead of a batch")
    parser.add_argument("--heads", type=_count, default=128, help="query heads (%(default)s)")
    parser.add_argument("--seq-len-q", type=_count, default=1, help="query tokens per request (%(default)s)")
    parser.add_argument("--page-size", type=_count, default=64, help="tokens per page (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--backend", default="auto", choices=("auto", *BACKENDS))
    parser.add_argument("--seed", type=lambda text: _integer(text, 0), default=0)
    return parser.parse_args(argv)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not least <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer from {least} to {2**31 - 1}")
    return value


def _count(text: str) -> int:
    return _integer(text, 1)


def _lengths(text: str) -> list[int]:
    return [_integer(part, 0) for part in text.split(",")]


def _require_tested_numpy() -> None:
    """pip keeps to the range; a NumPy installed afterwards, or found on PYTHONPATH, may not."""
    if not (2, 2) <= tuple(map(int, np.__version__.split(".")[:2])) < (2, 5):
        raise ImportError(f"NumPy is {np.__version__}, but must be 2.2 to 2.4: numba-cuda 0.30 cannot compile with 2.5 "
                          "(it uses np.row_stack, which is gone); pip install 'numpy>=2.2,<2.5'")


def _list_batches() -> None:
    for batch in load_batches().values():
        lens = batch.seq_lens
        print(f"{batch.name:15} {len(lens):3} requests of {min(lens):5,} to {max(lens):6,} tokens, {sum(lens):9,} in all   {batch.source}")


def _report_machine() -> None:
    print(f"mla_numba {__version__}: multi-head latent attention decode, in Numba\n")
    _line("machine", f"{cpu_name()}, {numba.config.NUMBA_NUM_THREADS} threads; Python {platform.python_version()}, {platform.system()}")
    _line("gpu", _gpu())
    packages = ("numba", "numba-cuda", "numpy", "ml_dtypes", "scipy")
    _line("versions", ", ".join(f"{package} {version(package)}" for package in packages))
    for i, name in enumerate(BACKENDS):
        _line("" if i else "backends", f"{name:7} {' '.join('; '.join(unavailable(name)).split()) or 'can run here'}")


def _line(label: str, text: str) -> None:
    print(textwrap.fill(text, 100, initial_indent=f"{label:10}", subsequent_indent=" " * 10))


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return next(line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _gpu() -> str:
    if numba_cuda_config.ENABLE_CUDASIM:
        return "Numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1)"
    try:
        device = cuda.get_current_device()
    except cuda.CudaSupportError as error:
        # Its text has a heading, then a line that says what is wrong.
        return f"none: {str(error).removeprefix('Error at driver init:').strip().partition(chr(10))[0]}"
    major, minor = device.compute_capability
    driver, runtime = (".".join(map(str, module.get_version())) for module in (cuda.cudadrv.driver, cuda.runtime))
    return f"{device.name}, sm_{major}{minor}, {device.MULTIPROCESSOR_COUNT} SMs; driver for CUDA {driver}, libraries of CUDA {runtime}"


def _run(args: argparse.Namespace) -> int:
    batch = load_batches()[args.batch]
    if args.lens is not None:
        batch = Batch("--lens", "", args.lens, [[]] * len(args.lens))
    size = len(batch.seq_lens)
    shape = DecodeShape(size, args.seq_len_q, size * args.seq_len_q, args.heads, 1, HEAD_DIM_QK, HEAD_DIM_V, args.page_size, args.dtype,
                        causal=True, batch_invariant=False)
    backend = choose_backend(args.backend, shape, None)
    rng = np.random.default_rng(args.seed)
    block_table, num_pages = _block_table(batch, args.page_size, rng)
    _report_batch(batch, args, num_pages)

    with _progress("filling the cache"):
        q, kv_cache = _values(batch, args, block_table, num_pages, rng)
    seq_lens = np.array(batch.seq_lens, np.int32)
    on_gpu = backend != "cpu" and not numba_cuda_config.ENABLE_CUDASIM
    with _progress("compiling the kernels, or loading them from Numba's cache"):
        decode = _decoder(q, kv_cache, block_table, seq_lens, args, backend, on_gpu)
        out, lse = decode()
    with _progress("decoding"):
        seconds = _time_on_gpu(decode) if on_gpu else _time_on_host(decode)
    with _progress("checking every row against float64"):
        errors = _errors(out, lse, q, kv_cache, block_table, batch.seq_lens)
    return _report_result(errors, seconds, backend, on_gpu, batch, args)


def _block_table(batch: Batch, page_size: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Pages in random order; what requests begin with in common lies in pages that they share. Also the number of pages."""
    pages: dict[tuple[int, ...], int] = {}
    columns = max(ceil_div(length, page_size) for length in batch.seq_lens)
    table = np.full((len(batch.seq_lens), max(columns, 1)), -1)
    for request, (length, blocks) in enumerate(zip(batch.seq_lens, batch.prefix_blocks, strict=True)):
        # The last block may be partly filled; only whole ones are shared.
        tokens_shared = min(len(blocks), length // batch.prefix_block_tokens) * batch.prefix_block_tokens if blocks else 0
        for column in range(ceil_div(length, page_size)):
            key: tuple[int, ...] = (-1, request, column)
            if (column + 1) * page_size <= tokens_shared:
                # Its id stands for all the tokens up to its end, so the last block of a page is key enough.
                key = (blocks[((column + 1) * page_size - 1) // batch.prefix_block_tokens], column)
            table[request, column] = pages.setdefault(key, len(pages))
    table = np.where(table < 0, POISON_PAGE, np.append(rng.permutation(len(pages)), 0)[table])
    return table.astype(np.int32), max(len(pages), 1)


def _values(batch: Batch, args: argparse.Namespace, block_table: np.ndarray, num_pages: int,
            rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Normal values, q four times as wide: logits of standard deviation 4, a softmax with peaks. NaN in every slot past a length."""
    dtype = NUMPY_DTYPE[args.dtype]
    q = (4 * rng.standard_normal((len(batch.seq_lens), args.seq_len_q, args.heads, HEAD_DIM_QK), np.float32)).astype(dtype)
    kv_cache = np.empty((num_pages, args.page_size, 1, HEAD_DIM_QK), dtype)
    for page in kv_cache:
        page[:] = rng.standard_normal(page.shape, np.float32)
    for length, pages in zip(batch.seq_lens, block_table, strict=True):
        if length % args.page_size:
            kv_cache[pages[length // args.page_size], length % args.page_size:] = POISON_KV
    return q, kv_cache


def _decoder(q: np.ndarray, kv_cache: np.ndarray, block_table: np.ndarray, seq_lens: np.ndarray, args: argparse.Namespace, backend: str,
             on_gpu: bool) -> Callable[[], tuple[Any, Any]]:
    """The decode as a server runs it in every layer of a step: arrays in place, one plan for all."""
    arrays: list[Any] = [q, kv_cache, block_table, seq_lens]
    if on_gpu:
        arrays = [cuda.to_device(array.view(STORAGE_DTYPE[str(array.dtype)])) for array in arrays]
    plan = plan_decode(arrays[3], num_heads_q=args.heads, seq_len_q=args.seq_len_q, page_size=args.page_size, dtype=args.dtype,
                       backend=backend, max_seq_len=int(seq_lens.max(initial=0)))
    return lambda: mla_decode(*arrays, plan=plan, backend=backend)


def _enough(seconds: list[float]) -> bool:
    """At least 3 decodes and 2 seconds of them, at most 20."""
    return len(seconds) >= 20 or (len(seconds) >= 3 and sum(seconds) >= 2)


def _time_on_host(decode: Callable[[], Any]) -> list[float]:
    seconds: list[float] = []
    while not _enough(seconds):
        begin = time.perf_counter()
        decode()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _time_on_gpu(decode: Callable[[], Any]) -> list[float]:
    """Between events, the L2 cache overwritten before each decode: in a server other layers come between."""
    seconds: list[float] = []
    source, target = cuda.device_array(2**28, np.uint8), cuda.device_array(2**28, np.uint8)
    begin, end = cuda.event(), cuda.event()
    while not _enough(seconds):
        target.copy_to_device(source)
        begin.record()
        decode()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return seconds


def float64_rows(q: np.ndarray, kv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One request in float64, causal: out (seq_len_q, heads, head_dim_v) and lse (heads, seq_len_q) from all its tokens `kv`, in order."""
    seq_len_q, heads, head_dim_qk = q.shape
    out, lse = np.zeros((seq_len_q, heads, HEAD_DIM_V)), np.full((heads, seq_len_q), np.inf)
    for s in range(seq_len_q):
        seen = kv[: max(len(kv) - (seq_len_q - 1 - s), 0)].astype(np.float64)
        if len(seen):
            logits = q[s].astype(np.float64) @ seen.T * head_dim_qk**-0.5
            largest = logits.max(axis=1, keepdims=True)
            weights = np.exp(logits - largest)
            total = weights.sum(axis=1, keepdims=True)
            out[s] = weights @ seen[:, :HEAD_DIM_V] / total
            lse[:, s] = (largest + np.log(total))[:, 0]
    return out, lse


@dataclass(frozen=True)
class _Errors:
    relative: float     # norm of the difference over norm of the result, all rows together
    largest: float      # of the absolute differences
    lse: float          # largest absolute difference


def _errors(out: Any, lse: Any, q: np.ndarray, kv_cache: np.ndarray, block_table: np.ndarray, seq_lens: list[int]) -> _Errors:
    out, lse = (array.copy_to_host() if hasattr(array, "copy_to_host") else array for array in (out, lse))
    out = out.view(q.dtype)
    squares, norm, largest, lse_error = 0.0, 0.0, 0.0, 0.0
    for i, length in enumerate(seq_lens):
        pages = block_table[i, : ceil_div(length, kv_cache.shape[1])]
        right, right_lse = float64_rows(q[i], kv_cache[pages].reshape(-1, HEAD_DIM_QK)[:length])
        difference = out[i].astype(np.float64) - right
        squares, norm = squares + (difference**2).sum(), norm + (right**2).sum()
        # max of Python would pass over a NaN.
        largest = float(np.maximum(largest, np.abs(difference).max()))
        same = lse[i] == right_lse
        lse_error = float(np.maximum(lse_error, np.abs(np.where(same, 0, lse[i]) - np.where(same, 0, right_lse)).max()))
    return _Errors((squares / norm) ** 0.5 if norm else squares**0.5, largest, lse_error)


def _report_batch(batch: Batch, args: argparse.Namespace, num_pages: int) -> None:
    lens, tokens = batch.seq_lens, sum(batch.seq_lens)
    itemsize = NUMPY_DTYPE[args.dtype].itemsize
    token_bytes, multi_head_bytes = HEAD_DIM_QK * itemsize, args.heads * MULTI_HEAD_COLUMNS * itemsize
    print()
    _line("batch", f"{batch.name}: {len(lens)} requests of {min(lens):,} to {max(lens):,} tokens, {tokens:,} in all")
    if batch.source:
        _line("", batch.source)
    _line("shape", f"{args.seq_len_q} query x {args.heads} heads x ({HEAD_DIM_LATENT} latent + {HEAD_DIM_ROPE} RoPE), {args.dtype}, "
                   f"causal; pages of {args.page_size}, shuffled")
    _line("cache", f"{num_pages * args.page_size * token_bytes / 1e6:,.1f} MB in {num_pages:,} pages, one layer; "
                   f"{token_bytes:,} bytes a token")
    _line("", f"{tokens * multi_head_bytes / 1e6:,.0f} MB would be the keys and values of all heads, "
              f"{multi_head_bytes / token_bytes:.0f} times as much a token")
    print()


def _report_result(errors: _Errors, seconds: list[float], backend: str, on_gpu: bool, batch: Batch, args: argparse.Namespace) -> int:
    right = errors.relative <= REL_BOUND[args.dtype] and errors.lse <= LSE_BOUND
    pairs = sum(max(length - s, 0) for length in batch.seq_lens for s in range(args.seq_len_q)) * args.heads
    flops = 2 * (HEAD_DIM_QK + HEAD_DIM_V) * pairs
    kv_bytes = sum(batch.seq_lens) * HEAD_DIM_QK * NUMPY_DTYPE[args.dtype].itemsize
    median = statistics.median(seconds)
    print()
    _line("error", f"out {errors.relative:.1e} relative (bound {REL_BOUND[args.dtype]:.1e}), {errors.largest:.1e} at most; "
                   f"lse {errors.lse:.1e} (bound {LSE_BOUND:.0e})")
    _line("time", f"{median * 1e3:.4g} ms a decode on {backend}, median of {len(seconds)} ({min(seconds) * 1e3:.4g} to "
                  f"{max(seconds) * 1e3:.4g}){', L2 cache cold' if on_gpu else ''}")
    _line("rate", f"{flops / median / 1e9:,.1f} GFLOP/s; {kv_bytes / median / 1e9:,.2f} GB/s of latents, each counted once")
    print(f"\n{'right' if right else 'WRONG'}: {len(batch.seq_lens) * args.seq_len_q * args.heads:,} rows "
          f"{'agree' if right else 'do not agree'} with float64")
    return 0 if right else 1


@contextmanager
def _progress(what: str) -> Any:
    print(f"{what} ... ", end="", flush=True)
    begin = time.perf_counter()
    yield
    print(f"{time.perf_counter() - begin:.1f} s", flush=True)
