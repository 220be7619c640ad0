"""What is measured: shapes of decodes, and the suites that they form. Pure data: the values are made by `perf.inputs`.

Equal shapes have equal names, so a case that two suites share is one case. Lengths that differ are drawn from fixed seeds and scaled to the
mean that the name says, so that cases of one mean do the same work, however it is spread.
"""

import difflib
import re
from dataclasses import dataclass, replace

import numpy as np

from mla_numba.config import ceil_div
from mla_numba.demo import load_batches

# The names that `_case` gives.
_SHAPE = re.compile(r"b(?P<batch>\d+)_q(?P<seq_len_q>\d+)_h(?P<heads>\d+)_k(?P<mean>\d+)(_(?P<spread>normal|uniform|bimodal|giant|step2))?"
                    r"(_p(?P<page_size>[1-9]\d*))?(_w(?P<num_workers>[1-9]\d*))?(?P<full>_full)?")
# Tokens of a block in `Case.prefix_blocks`: Mooncake's.
PREFIX_BLOCK_TOKENS = 512
# Of the suite `drawn`: shapes; tokens of a batch (5.8 GB of cache), and head x query x token products, at most (1 ms of an H200).
_NUM_DRAWN, _MAX_TOKENS, _MAX_SCORES = 100, 5_000_000, 320_000_000


@dataclass(frozen=True)
class Case:
    """One decode. `prefix_blocks`: per request, the ids of the 512-token blocks it begins with; equal ids lie in the same pages.

    `num_workers` asks our plan for that many workers, which is how many pieces a long request is cut into; None: what fills the machine.
    """

    name: str
    seq_lens: tuple[int, ...]
    seq_len_q: int = 1
    num_heads_q: int = 128
    num_heads_kv: int = 1
    head_dim_qk: int = 576
    head_dim_v: int = 512
    page_size: int = 64
    dtype: str = "bfloat16"
    causal: bool = True
    prefix_blocks: tuple[tuple[int, ...], ...] | None = None
    suite: str = ""
    num_workers: int | None = None

    @property
    def batch(self) -> int:
        return len(self.seq_lens)

    @property
    def varlen(self) -> bool:
        return len(set(self.seq_lens)) > 1

    @property
    def seq_len_k_mean(self) -> float:
        return sum(self.seq_lens) / self.batch


def spread_lengths(spread: str, batch: int, mean: int, least: int = 1) -> tuple[int, ...]:
    """`batch` lengths of at least `least` tokens, whose sum is batch * mean.

    equal; normal: standard deviation mean / 2, as in FlashMLA's tests; uniform: 0 to 2 mean; bimodal: one in eight is nine times as long
    as the others; giant: one request has a quarter of all tokens; step2: a little below and above, in steps of 2, as in FlashMLA's
    benchmark script.
    """
    rng = np.random.default_rng((batch, mean))
    shares = {
        "equal": lambda: np.ones(batch),
        "normal": lambda: np.maximum(rng.normal(1, 0.5, batch), 0),
        "uniform": lambda: rng.uniform(0, 2, batch),
        "bimodal": lambda: rng.permutation(np.where(np.arange(batch) % 8, 1, 9)),
        "giant": lambda: rng.permutation(np.append(np.ones(batch - 1), (batch - 1) / 3)),
        "step2": lambda: mean - least + 2 * np.arange(batch) - (batch - 1),
    }[spread]().astype(float)
    if not (shares.sum() > 0 and shares.min() >= 0):
        raise ValueError(f"{spread} lengths cannot be made for batch={batch}, mean={mean} and at least {least} tokens")
    ends = np.rint(np.cumsum(shares) * (batch * (mean - least) / shares.sum())).astype(int)
    return tuple((least + np.diff(ends, prepend=0)).tolist())


def _case(suite: str, batch: int, seq_len_q: int, num_heads_q: int, mean: int, spread: str = "equal", *, causal: bool = True,
          page_size: int = 64, num_workers: int | None = None) -> Case:
    name = f"b{batch}_q{seq_len_q}_h{num_heads_q}_k{mean}"
    name += "" if spread == "equal" else f"_{spread}"
    name += "" if page_size == 64 else f"_p{page_size}"
    name += "" if num_workers is None else f"_w{num_workers}"
    # One query per request sees all tokens either way.
    name += "" if causal or seq_len_q == 1 else "_full"
    return Case(name, spread_lengths(spread, batch, mean, seq_len_q), seq_len_q, num_heads_q, page_size=page_size, causal=causal,
                suite=suite, num_workers=num_workers)


def _baseline() -> list[Case]:
    """The 44 rows that FlashMLA and FA3 were measured on before this project began (one H200, 2026-11-23)."""
    shapes = [(128, q, 128, mean, "normal") for q in (1, 2) for mean in (4096, 8192, 16384, 32768)]
    shapes += [(128, 1, heads, mean, "normal") for heads in (16, 32, 64) for mean in (4096, 16384)]
    shapes += [(batch, 1, 128, mean, "equal") for batch in (1, 4, 16) for mean in (1024, 8192, 65536)]
    shapes += [(batch, 1, 16, mean, "equal") for batch in (1, 4, 16, 64) for mean in (1024, 8192, 65536)]
    shapes += [(128, 4, 16, 4096, "normal"), (16, 1, 64, 4096, "equal"), (32, 1, 128, 4096, "equal"), (64, 1, 128, 4096, "equal"),
               (128, 1, 128, 1024, "equal"), (128, 1, 128, 2048, "equal"), (256, 1, 128, 2048, "normal"), (132, 4, 16, 4096, "equal"),
               (64, 2, 16, 512, "equal")]
    return [_case("baseline", *shape) for shape in shapes]


def _flashmla() -> list[Case]:
    """The 16 performance cases of FlashMLA 9241ae3, tests/test_flash_mla_dense_decoding.py."""
    return [_case("flashmla", 128, q, 128, mean, "normal", causal=causal)
            for causal in (True, False) for q in (1, 2) for mean in (4096, 8192, 16384, 32768)]


def _bench() -> list[Case]:
    """The cases of FlashMLA's benchmark/bench_flash_mla.py: lengths mean + 2 i; its block table is not shuffled, ours is."""
    return [_case("bench", 128, 1, 128, mean, "step2") for mean in (1024, 2048, 4096, 8192, 16384, 32768)]


def _sweeps() -> list[Case]:
    cases = [_case("sweep batch", batch, 1, 128, 4096) for batch in (1, 2, 4, 8, 16, 66, 96, 132, 198, 264)]
    cases += [_case("sweep length", 128, 1, 128, mean) for mean in (64, 256, 512, 4096, 8192)]
    cases += [_case("sweep length", 1, 1, 128, mean) for mean in (256, 4096, 16384, 131072)]
    # Rows of a KV head, heads x queries, around the 64 of a tensor-core tile.
    rows = [(1, heads) for heads in (12, 24, 48, 64, 96, 112)] + [(3, 16), (3, 48), (3, 128), (4, 16), (5, 16)]
    cases += [_case("sweep rows", 128, q, heads, 4096) for q, heads in rows]
    cases += [_case("sweep splits", 4, 1, 128, 8192, num_workers=workers) for workers in (8, 33, 66, 132, 264)]
    cases += [_case("sweep pages", 128, 1, 128, 4096, page_size=size) for size in (16, 32, 128, 256)]
    cases += [_case("sweep spread", 128, 1, 128, 4096, spread) for spread in ("uniform", "bimodal", "giant")]
    return cases


def _serving() -> list[Case]:
    """Batches as they stood in servers (mla_numba/data/README.md), with the heads of 8, 2 and 1 tensor-parallel GPUs."""
    cases = []
    for batch in load_batches().values():
        blocks = tuple(map(tuple, batch.prefix_blocks)) if any(batch.prefix_blocks) else None
        cases += [Case(f"{batch.name}_h{heads}", tuple(batch.seq_lens), num_heads_q=heads, prefix_blocks=blocks, suite="serving")
                  for heads in (16, 64, 128)]
    return cases


def _drawn(seed: int) -> list[Case]:
    """Shapes that nobody has chosen: 1 to 1,024 requests of 64 to 131,072 tokens, uniform in their logarithms, and whatever heads, queries,
    spreads and pages a server might have."""
    rng, drawn = np.random.default_rng(seed), []
    all_heads = (4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 112, 128)
    while len(drawn) < _NUM_DRAWN:
        batch, mean = (int(np.rint(2 ** rng.uniform(*exponents))) for exponents in ((0, 10), (6, 17)))
        queries, heads = int(rng.choice([1, 1, 1, 2, 3, 4, 5, 8])), int(rng.choice(all_heads))
        spread, page_size = str(rng.choice(["equal", "normal", "uniform", "bimodal", "giant"])), int(rng.choice([64, 64, 64, 16, 32, 128]))
        if batch * mean <= _MAX_TOKENS and batch * mean * queries * heads <= _MAX_SCORES:
            drawn.append(_case("drawn", batch, queries, heads, mean, spread if batch > 2 else "equal", page_size=page_size))
    return drawn


def _quick() -> list[Case]:
    shapes = [(128, 1, 128, 4096, "normal"), (128, 1, 16, 4096, "normal"), (128, 2, 128, 4096, "normal"), (1, 1, 128, 8192, "equal"),
              (16, 1, 128, 1024, "equal")]
    return [_case("quick", *shape) for shape in shapes]


def _cpu() -> list[Case]:
    azure = next(case for case in _serving() if case.name == "azure_conv_32_h128")
    return [_case("cpu", 8, 1, 128, 4096), _case("cpu", 8, 1, 16, 4096), _case("cpu", 1, 1, 128, 16384),
            replace(azure, suite="cpu")]


def _smoke() -> list[Case]:
    return [_case("smoke", 3, 2, 16, 200, "normal"), _case("smoke", 2, 1, 4, 300, "bimodal", page_size=16)]


_SUITES = {
    "quick": _quick, "baseline": _baseline, "flashmla": _flashmla, "bench": _bench, "sweeps": _sweeps, "serving": _serving,
    "full": lambda: [*_baseline(), *_flashmla(), *_bench(), *_sweeps()], "cpu": _cpu, "smoke": _smoke, "drawn": lambda: _drawn(0),
}
SUITES = tuple(_SUITES)


def suite(name: str, seed: int = 0) -> tuple[Case, ...]:
    """The cases of a suite, each once; raises ValueError for a name that is not in `SUITES`. `seed` is of those that are drawn."""
    if name not in _SUITES:
        raise ValueError(f"suite {name!r} is none of {', '.join(SUITES)}")
    if seed and name != "drawn":
        raise ValueError(f"the cases of suite {name!r} are always the same: a seed, got {seed}, is for suite 'drawn'")
    cases = _drawn(seed) if seed else _SUITES[name]()
    if name == "flashmla":
        # As FlashMLA counts its 16, though with one query per request causal or not is the same.
        return tuple(cases)
    once: dict[str, Case] = {}
    for case in cases:
        once.setdefault(case.name, case)
    return tuple(once.values())


def find(name: str) -> Case:
    """The case of that name, of whatever suite, or the one whose name says its shape; raises ValueError, with names that are near."""
    by_name = {case.name: case for suite_name in reversed(SUITES) for case in _SUITES[suite_name]()}
    if name not in by_name:
        shape = _SHAPE.fullmatch(name)
        if shape is None:
            near = difflib.get_close_matches(name, by_name, n=3, cutoff=0.4)
            raise ValueError(f"no case {name!r}; near it: {', '.join(near) or 'none'}; python -m perf --list prints all, and any shape "
                             "has a name: b4_q1_h64_k3000, then _normal or another spread, _p32 for pages of 32, _w8 for 8 workers, _full "
                             "without the causal mask")
        batch, seq_len_q, heads, mean = map(int, shape.group("batch", "seq_len_q", "heads", "mean"))
        if min(batch, seq_len_q, heads) < 1 or mean < seq_len_q:
            raise ValueError(f"case {name!r} must have a request, a query and a head at least, and a token for each query")
        return _case("shape", batch, seq_len_q, heads, mean, shape["spread"] or "equal", causal=shape["full"] is None,
                     page_size=int(shape["page_size"] or 64), num_workers=int(shape["num_workers"]) if shape["num_workers"] else None)
    return by_name[name]


def block_table(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Pages in random order, (batch, max_pages) int32, and how many there are; requests share the pages of prefix blocks they share.

    Only whole blocks are shared: the last one may be partly filled.
    """
    pages: dict[tuple[int, ...], int] = {}
    columns = max(ceil_div(length, case.page_size) for length in case.seq_lens)
    table = np.full((case.batch, columns), -1)
    for request, length in enumerate(case.seq_lens):
        blocks = case.prefix_blocks[request] if case.prefix_blocks else ()
        tokens_shared = min(len(blocks), length // PREFIX_BLOCK_TOKENS) * PREFIX_BLOCK_TOKENS
        for column in range(ceil_div(length, case.page_size)):
            end = (column + 1) * case.page_size
            # A block's id stands for all the tokens up to its end, so the last block of a page is key enough.
            key = (blocks[(end - 1) // PREFIX_BLOCK_TOKENS], column) if end <= tokens_shared else (-1, request, column)
            table[request, column] = pages.setdefault(key, len(pages))
    shuffled = rng.permutation(len(pages))
    # Columns that no length reaches name page 0: whether a peer leaves them alone is for others to find out.
    return np.where(table < 0, 0, shuffled[table]).astype(np.int32), len(pages)
