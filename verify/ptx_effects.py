"""What each intrinsic of `mla_numba.ptx` must do: a kernel of `verify.ptx_kernels`, its inputs, and what NumPy says comes out.

`EFFECTS` is for whoever can run kernels, a GPU or an emulator: draw `inputs`, put the arrays (and the tensor maps of those that have
one) into device memory, launch `kernel` with their addresses in order, `check` what the arrays then hold.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numba.cuda import types

from mla_numba import ptx
from mla_numba.kernels.hopper_config import FIRST_MAP, MAP_WORDS
from verify import ptx_kernels
from verify.ptx_kernels import ALL_BITS, TILE_BYTES, TURNS, WARP
from verify.tolerances import ex2_bound, lg2_bound, rcp_bound, worst_ratio

Arrays = dict[str, np.ndarray]

# The kernels bring the start of their shared memory to a multiple of 1,024.
ALIGNMENT = 1024
# (w, z, y, x); boxes reach over the ends of y and x.
TENSOR_SHAPE = (3, 2, 80, 128)
# Inside but for the last rows; over two edges; a page that there is not.
BOXES = ((64, 40, 1, 2), (-32, -8, 0, 0), (0, 0, 0, 3))
# Of two tiles of 64 columns each: over two edges; a page that there is not.
BOXES_5D = ((0, -8, 1, 1, 2), (0, 0, 0, 0, 3))
# Of stores: an H100 takes no negative ones.
STORE_BOXES = ((64, 40, 1, 2), (96, 72, 0, 0), (0, 0, 0, 3))


@dataclass(frozen=True)
class TensorMap:
    """The arguments of `mla_numba.host.tensor_map.encode`, but for the address: 16-bit elements, innermost axis first."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    dtype: str = "bfloat16"


@dataclass(frozen=True, eq=False)
class Effect:
    """A kernel and what it does, bit for bit.

    Parameters
    ----------
    name : str
    make, configuration
        The function of `verify.ptx_kernels` that makes the kernel, and its arguments.
    inputs : callable
        A random generator to the arrays before the launch, by name, in the order of the kernel's arguments.
    expected : callable
        Those arrays to the ones that the kernel writes, as they are after it. The others it leaves alone.
    num_threads, num_blocks, cluster_size, smem_bytes : int
        The launch; shared memory is dynamic.
    num_launches : int
        More than one: one after the other, with programmatic stream serialization.
    fastmath : bool
    blocks_per_sm : int
        What it is compiled with, and for.
    tensor_maps : mapping
        By name, of the arrays in whose place the kernel is given a tensor map.
    map_is_parameter : bool
        The map itself is the parameter, behind `FIRST_MAP` words of padding; otherwise its address.
    bound : callable, optional
        Expected values to the error they may have, where the instruction is an approximation.
    """

    name: str
    make: str
    inputs: Callable[[np.random.Generator], Arrays]
    expected: Callable[[Arrays], Arrays]
    configuration: tuple[Any, ...] = ()
    num_threads: int = WARP
    num_blocks: int = 1
    cluster_size: int = 1
    smem_bytes: int = 0
    num_launches: int = 1
    fastmath: bool = False
    blocks_per_sm: int = 1
    tensor_maps: Mapping[str, TensorMap] = field(default_factory=dict)
    map_is_parameter: bool = False
    bound: Callable[[np.ndarray], np.ndarray] | None = None

    def kernel(self) -> Callable[..., None]:
        made: Callable[..., None] = getattr(ptx_kernels, self.make)(*self.configuration)
        return made

    def types(self) -> Any:
        """Numba's types of the kernel and its arguments."""
        map_type = types.UniTuple(types.uint64, FIRST_MAP + MAP_WORDS) if self.map_is_parameter else types.uint64
        names = self.kernel().__code__.co_varnames[:self.kernel().__code__.co_argcount]
        return types.void(*[map_type if name == "tensor_map" else types.uint64 for name in names])

    def check(self, inputs: Arrays, results: Arrays) -> None:
        """Compare the arrays after the launch with what they must be."""
        expected = self.expected(inputs)
        for name, before in inputs.items():
            result, wanted = results[name], expected.get(name, before)
            if name in expected and self.bound is not None:
                ratio = worst_ratio(result, wanted, self.bound(wanted))
                assert ratio <= 1, f"{self.name}: {name} is off by {ratio} times the bound"
            else:
                bits = f"u{before.itemsize}"
                np.testing.assert_array_equal(result.view(bits), wanted.view(bits), f"{self.name}: {name}")


def _unset(count: int, dtype: Any = np.uint32) -> np.ndarray:
    """Memory that nobody has written; a NaN, as a float."""
    return np.full(count, 0xFFFFDEAD, np.uint32).view(dtype)


def _words(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 2 ** 32, count, np.uint32)


def _floats(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_normal(count).astype(np.float32)


def _small(rng: np.random.Generator, count: int) -> np.ndarray:
    """Floats of which sums are exact in any order."""
    return rng.integers(-8, 9, count).astype(np.float32)


def _next(words: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.roll(words, -1, axis)


# Arithmetic.


def _ex2_inputs(rng: np.random.Generator) -> Arrays:
    x = rng.uniform(-125, 127, 2 * WARP).astype(np.float32)
    x[:8] = -np.inf, np.inf, 0, -0.0, -1, -130, 128, 100
    return {"out": _unset(x.size, np.float32), "x": x}


def _ex2(inputs: Arrays) -> Arrays:
    with np.errstate(over="ignore"):
        exact = np.exp2(inputs["x"].astype(np.float64)).astype(np.float32)
    return {"out": np.where(exact < np.finfo(np.float32).tiny, 0, exact)}


def _lg2_inputs(rng: np.random.Generator) -> Arrays:
    x = np.exp2(rng.uniform(-125, 127, 2 * WARP)).astype(np.float32)
    x[:8] = 0, np.inf, 1, 2, 0.25, 0.999, 1.001, 1e-42
    return {"out": _unset(x.size, np.float32), "x": x}


def _lg2(inputs: Arrays) -> Arrays:
    x = inputs["x"].astype(np.float64)
    with np.errstate(divide="ignore"):
        return {"out": np.log2(np.where(x < np.finfo(np.float32).tiny, 0, x))}


def _rcp_inputs(rng: np.random.Generator) -> Arrays:
    x = (np.exp2(rng.uniform(-125, 125, 2 * WARP)) * rng.choice([-1, 1], 2 * WARP)).astype(np.float32)
    x[:8] = 0, -0.0, np.inf, 1, -2, 3, 1e-42, 3e38
    return {"out": _unset(x.size, np.float32), "x": x}


def _rcp(inputs: Arrays) -> Arrays:
    def flushed(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(0, x), x)

    with np.errstate(divide="ignore"):
        return {"out": flushed(1 / flushed(inputs["x"].astype(np.float64)))}


def _multiply_add_inputs(rng: np.random.Generator) -> Arrays:
    """Of which a b + c, a multiple of 2^-46 below 8, is exact in float64."""
    a, b = rng.uniform(1, 2, (2, WARP)).astype(np.float32)
    c = (rng.integers(-2 ** 25, 2 ** 25, WARP) * 2.0 ** -23).astype(np.float32)
    c[:WARP // 2] = -(a * b)[:WARP // 2]
    return {"products": _unset(WARP, np.float32), "sums": _unset(WARP, np.float32), "a": a, "b": b, "c": c}


def _multiply_add(inputs: Arrays) -> Arrays:
    a, b, c = inputs["a"], inputs["b"], inputs["c"]
    return {"products": a * b + c, "sums": (a.astype(np.float64) * b + c).astype(np.float32)}


def _convert_inputs(rng: np.random.Generator) -> Arrays:
    high, low = (rng.standard_normal((2, 2 * WARP)) * np.exp2(rng.integers(-20, 20, (2, 2 * WARP)))).astype(np.float32)
    # Halfway between two numbers of bfloat16, and of float16, below an even and an odd one; past float16's largest; infinite; zeros.
    high[:10] = 1 + 2 ** -8, 1 + 3 * 2 ** -8, 1 + 2 ** -11, 1 + 3 * 2 ** -11, 65519, 65520, -1e30, np.inf, 0, -0.0
    return {"out": _unset(high.size), "high": high, "low": low}


def _convert(dtype: Any) -> Callable[[Arrays], Arrays]:
    def expected(inputs: Arrays) -> Arrays:
        with np.errstate(over="ignore"):
            high, low = (inputs[name].astype(dtype).view(np.uint16).astype(np.uint32) for name in ("high", "low"))
        return {"out": high << 16 | low}

    return expected


# Each byte at each place, of either word.
_SELECTORS = (0x3210, 0x7654, 0x0123, 0x4567, 0x1302, 0x5746, 0x2051, 0x6435)


def _bytes(inputs: Arrays) -> Arrays:
    a, b = inputs["a"].view(np.uint32), inputs["b"].view(np.uint32)
    given = np.stack((a, b), 1).view(np.uint8)
    words = [np.ascontiguousarray(given[:, [selector >> 4 * i & 7 for i in range(4)]]).view(np.uint32)[:, 0] for selector in _SELECTORS]
    return {"words": np.concatenate(words), "floats": np.where(b >> 31 == 1, -inputs["a"], inputs["a"])}


# Memory. Words that are floats too, and no NaN.


def _opaque(inputs: Arrays) -> Arrays:
    x = inputs["x"]
    return {"floats": x, "words": x.view(np.uint32).reshape(-1, 4)[:, :2].reshape(-1)}


def _shared_memory(inputs: Arrays) -> Arrays:
    neighbours = _next(inputs["x"])
    return {"words": neighbours.view(np.uint32), "floats": neighbours,
            "quads": (neighbours.view(np.uint32)[:, None] ^ np.arange(4, dtype=np.uint32)).reshape(-1)}


def _global_memory(inputs: Arrays) -> Arrays:
    x, count = inputs["x"], inputs["words"].size
    quads = x.reshape(-1, 4)
    return {"words": x[:count].view(np.uint32), "floats": x[:count], "quads": quads[:, ::-1].reshape(-1),
            "pairs": quads[:, [2, 3, 3, 0]].reshape(-1).view(np.uint32)}


def _fragments(matrices: np.ndarray) -> np.ndarray:
    """(4, 8, 8) 16-bit elements as lanes hold them, (32, 4) words: lane l row l / 4, columns 2 (l % 4) and the next, of each matrix."""
    return np.ascontiguousarray(matrices.reshape(4, 32, 2).transpose(1, 0, 2)).view(np.uint32).reshape(-1)


def _matrices(fragments: np.ndarray) -> np.ndarray:
    """The reverse of `_fragments`."""
    return fragments.view(np.uint16).reshape(32, 4, 2).transpose(1, 0, 2).reshape(4, 8, 8)


def _ldmatrix(transposed: bool) -> Callable[[Arrays], Arrays]:
    def expected(inputs: Arrays) -> Arrays:
        matrices = inputs["x"].view(np.uint16).reshape(4, 8, 8)
        return {"out": _fragments(matrices.swapaxes(1, 2) if transposed else matrices)}

    return expected


def _stmatrix(transposed: bool) -> Callable[[Arrays], Arrays]:
    def expected(inputs: Arrays) -> Arrays:
        matrices = _matrices(inputs["x"])
        return {"out": np.ascontiguousarray(matrices.swapaxes(1, 2) if transposed else matrices).view(np.uint32).reshape(-1)}

    return expected


def _movmatrix(inputs: Arrays) -> Arrays:
    return {"out": np.ascontiguousarray(inputs["x"].view(np.uint16).reshape(8, 8).T).view(np.uint32).reshape(-1)}


def _reduction(inputs: Arrays) -> Arrays:
    threads = np.arange(inputs["x"].size, dtype=np.uint32) % 128
    return {"floats": inputs["floats"] + inputs["x"].reshape(-1, 4).sum(0),
            "words": inputs["words"] + threads.reshape(-1, 4).sum(0, dtype=np.uint32),
            # 128 times round 0 to 8; from 9 and more it goes to 0.
            "rounds": np.array([128, 8 + 128, 127, 127], np.uint32) % 9}


def _arrivals(inputs: Arrays) -> Arrays:
    written = inputs["data"].copy()
    written[:-WARP] = inputs["x"][:-WARP]
    return {"out": written, "data": written, "counter": np.array([3], np.uint32)}


# Copies. A box is (rows, 64) of 16-bit elements.


def _swizzled(box: np.ndarray) -> np.ndarray:
    """As it lies in shared memory with 128-byte swizzle: the 16-byte chunks of row r at their number xor r % 8. Its own reverse."""
    rows = np.arange(len(box))[:, None]
    return box.reshape(len(box), 8, 8)[rows, np.arange(8) ^ rows % 8].reshape(len(box), 64)


def _places(box: tuple[int, ...]) -> tuple[Any, np.ndarray]:
    """Indices into the tensor of the elements of a box of 64 rows, those outside brought in; which are inside."""
    x, y, z, w = box
    rows, columns = y + np.arange(64)[:, None], x + np.arange(64)
    _, num_z, num_rows, num_columns = TENSOR_SHAPE
    inside = (rows >= 0) & (rows < num_rows) & (columns >= 0) & (columns < num_columns) & (0 <= z < num_z) & (0 <= w < TENSOR_SHAPE[0])
    return (w % TENSOR_SHAPE[0], z, rows % num_rows, columns % num_columns), inside


def _tensor(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2 ** 16, TENSOR_SHAPE, np.uint16)


def _tensor_map(rows: int) -> dict[str, TensorMap]:
    num_w, num_z, num_y, num_x = TENSOR_SHAPE
    return {"tensor": TensorMap((num_x, num_y, num_z, num_w), (2 * num_x, 2 * num_x * num_y, 2 * num_x * num_y * num_z), (64, rows, 1, 1))}


def _tma_load(inputs: Arrays) -> Arrays:
    tiles = []
    for box in BOXES:
        places, inside = _places(box)
        tiles.append(_swizzled(np.where(inside, inputs["tensor"][places], 0)))
    return {"out": np.stack(tiles).view(np.uint32).reshape(-1), "held": np.zeros(1, np.uint32)}


def _tile_map(rows: int, tiles: int) -> dict[str, TensorMap]:
    """The same tensor, its columns as an axis of tiles of 64."""
    num_w, num_z, num_y, num_x = TENSOR_SHAPE
    return {"tensor": TensorMap((64, num_y, num_x // 64, num_z, num_w), (2 * num_x, 128, 2 * num_x * num_y, 2 * num_x * num_y * num_z),
                                (64, rows, tiles, 1, 1))}


def _tma_load_5d(inputs: Arrays) -> Arrays:
    tiles = []
    for _, y, tile, z, w in BOXES_5D:
        for column in (64 * tile, 64 * tile + 64):
            places, inside = _places((column, y, z, w))
            tiles.append(_swizzled(np.where(inside, inputs["tensor"][places], 0)))
    return {"out": np.stack(tiles).view(np.uint32).reshape(-1)}


def _tma_multicast(inputs: Arrays) -> Arrays:
    tiles = [_swizzled(inputs["tensor"][w, 1, :64, 64:]) for w in (0, 0, 1, 1)]
    return {"out": np.stack(tiles).view(np.uint32).reshape(-1)}


def _tma_multicast_turns(inputs: Arrays) -> Arrays:
    tiles = [_swizzled(inputs["tensor"][w, 1, :64, :64]) for _ in range(2) for w in range(TENSOR_SHAPE[0])]
    return {"out": np.stack(tiles).view(np.uint32).reshape(-1)}


def _tma_store(inputs: Arrays) -> Arrays:
    tensor = inputs["tensor"].copy()
    for box, tile in zip(STORE_BOXES, inputs["tiles"].view(np.uint16).reshape(-1, 64, 64), strict=True):
        (w, z, rows, columns), inside = _places(box)
        rows, columns = np.broadcast_arrays(rows, columns)
        tensor[w, z, rows[inside], columns[inside]] = _swizzled(tile)[inside]
    return {"tensor": tensor}


def _zfill(inputs: Arrays) -> Arrays:
    quads = inputs["x"].view(np.uint8).reshape(-1, 16)
    copied = np.arange(16) < np.arange(len(quads))[:, None] % 17
    return {"out": np.where(copied, quads, 0).astype(np.uint8).view(np.uint32).reshape(-1)}


# The tensor core: A is (64, 64), B (64, n), of integers small enough for every sum to be exact.


def _product_inputs(n: int, dtype: Any, a_transposed: bool, b_transposed: bool) -> Callable[[np.random.Generator], Arrays]:
    def inputs(rng: np.random.Generator) -> Arrays:
        a, b = (rng.integers(-4, 5, shape).astype(np.float32).astype(dtype).view(np.uint16) for shape in ((64, 64), (64, n)))
        # K-major: A's rows, and B's columns, are rows of a tile. Transposed: every k is one.
        a_tile, b_tiles = (a.T if a_transposed else a), [b.T]
        if b_transposed:
            # Tiles of 64 columns; those that there are not are NaN, in either type.
            padded = np.pad(b, ((0, 0), (0, -n % 64)), constant_values=0x7FFF)
            b_tiles = np.split(padded, padded.shape[1] // 64, axis=1)
        return {"out": _unset(64 * n, np.float32), "a": _swizzled(a_tile), "b": np.concatenate([_swizzled(tile) for tile in b_tiles])}

    return inputs


def _product(n: int, dtype: Any, a_transposed: bool, b_transposed: bool) -> Callable[[Arrays], Arrays]:
    def expected(inputs: Arrays) -> Arrays:
        a, b = _swizzled(inputs["a"]), _swizzled(inputs["b"])
        a = a.T if a_transposed else a
        b = np.concatenate(np.split(b, len(b) // 64), axis=1)[:, :n] if b_transposed else b.T
        a, b = (np.ascontiguousarray(bits).view(dtype).astype(np.float32) for bits in (a, b))
        return {"out": (a @ b).reshape(-1)}

    return expected


_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_POLICIES = {"evict_first": ptx.EVICT_FIRST, "evict_last": ptx.EVICT_LAST, "evict_normal": ptx.EVICT_NORMAL}

_ALL = [
    Effect("ex2", "make_unary", _ex2_inputs, _ex2, ("ex2",), num_threads=2 * WARP, bound=ex2_bound),
    Effect("lg2_approx", "make_unary", _lg2_inputs, _lg2, ("lg2_approx",), num_threads=2 * WARP, bound=lg2_bound),
    Effect("rcp_approx", "make_unary", _rcp_inputs, _rcp, ("rcp_approx",), num_threads=2 * WARP, bound=rcp_bound),
    Effect("multiply_add", "make_multiply_add", _multiply_add_inputs, _multiply_add),
    *(Effect(name, "make_convert", _convert_inputs, _convert(dtype), (name,), num_threads=2 * WARP)
      for name, dtype in (("cvt_bf16x2", ml_dtypes.bfloat16), ("cvt_f16x2", np.float16))),
    Effect("bytes", "make_bytes",
           lambda rng: {"words": _unset(len(_SELECTORS) * WARP), "floats": _unset(WARP, np.float32), "a": _floats(rng, WARP),
                        "b": _floats(rng, WARP)}, _bytes, (_SELECTORS,)),

    Effect("opaque", "make_opaque",
           lambda rng: {"floats": _unset(4 * WARP, np.float32), "words": _unset(2 * WARP), "x": _floats(rng, 4 * WARP)}, _opaque),
    Effect("shared_memory", "make_shared_memory",
           lambda rng: {"words": _unset(128), "floats": _unset(128, np.float32), "quads": _unset(4 * 128), "x": _floats(rng, 128)},
           _shared_memory, (128,), num_threads=128, smem_bytes=24 * 128 + ALIGNMENT),
    Effect("global_memory", "make_global_memory",
           lambda rng: {"words": _unset(128), "floats": _unset(128, np.float32), "pairs": _unset(4 * 128),
                        "quads": _unset(4 * 128, np.float32), "x": _floats(rng, 4 * 128)}, _global_memory, num_threads=128),
    *(Effect(f"{move}_x4{suffix}", f"make_{move}", lambda rng: {"out": _unset(4 * WARP), "x": _words(rng, 4 * WARP)},
             expected(bool(suffix)), (f"{move}_x4{suffix}",), smem_bytes=16 * WARP + ALIGNMENT)
      for move, expected in (("ldmatrix", _ldmatrix), ("stmatrix", _stmatrix)) for suffix in ("", "_trans")),
    Effect("movmatrix_trans", "make_movmatrix", lambda rng: {"out": _unset(WARP), "x": _words(rng, WARP)}, _movmatrix),

    *(Effect(f"tickets_{name}", "make_tickets", lambda rng: {"counter": np.zeros(1, np.uint32), "marks": _unset(4 * 64)},
             lambda inputs: {"counter": np.array([4 * 64], np.uint32), "marks": ~np.arange(4 * 64, dtype=np.uint32)}, (name,),
             num_threads=64, num_blocks=4) for name in ("atom_add_acq_rel", "atom_add_relaxed")),
    Effect("lock", "make_lock",
           lambda rng: {"lock": np.zeros(1, np.uint32), "count": np.zeros(1, np.float32), "other": np.array([5], np.uint32),
                        "seen": _unset(4)},
           lambda inputs: {"lock": np.zeros(1, np.uint32), "count": np.array([4 * 8], np.float32), "other": np.array([5], np.uint32),
                           "seen": np.full(4, 5, np.uint32)}, (8,), num_blocks=4),
    Effect("reduction", "make_reduction",
           lambda rng: {"floats": _small(rng, 4), "words": _words(rng, 4), "rounds": np.array([0, 8, 9, 1 << 31], np.uint32),
                        "x": _small(rng, 4 * 128)}, _reduction,
           num_threads=128, num_blocks=4),
    Effect("message", "make_message",
           lambda rng: {"out": _unset(WARP, np.float32), "data": _unset(WARP, np.float32), "flag": np.zeros(1, np.uint32),
                        "x": _floats(rng, WARP)},
           lambda inputs: {"out": inputs["x"], "data": inputs["x"], "flag": np.ones(1, np.uint32)}, num_blocks=2, cluster_size=2),
    Effect("arrivals", "make_arrivals",
           lambda rng: {"out": _unset(4 * WARP, np.float32), "data": _unset(4 * WARP, np.float32), "counter": np.zeros(1, np.uint32),
                        "x": _floats(rng, 4 * WARP)}, _arrivals, (4,), num_blocks=4, cluster_size=4),

    Effect("phases", "make_phases", lambda rng: {"seen": _unset(14)},
           # (even, odd) phase complete, after: init, 3 arrivals of 4, 4 of 4, 4 at once, wait, inval and init, 1 of 1.
           lambda inputs: {"seen": np.array([0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0], np.uint32)}, smem_bytes=8 + ALIGNMENT),
    *(Effect(name, f"make_{name}", lambda rng: {"out": _unset(TURNS * WARP), "x": _words(rng, TURNS * WARP)},
             lambda inputs: {"out": _next(inputs["x"].reshape(TURNS, WARP)).reshape(-1)}, num_threads=2 * WARP,
             smem_bytes=8 * WARP + 32 + ALIGNMENT) for name in ("pipeline", "named_barriers")),

    Effect("copy_groups", "make_copy_groups", lambda rng: {"out": _unset(2 * 4 * 128), "x": _words(rng, 2 * 4 * 128)},
           lambda inputs: {"out": _next(inputs["x"].reshape(2, 128, 4), 1).reshape(-1)}, (128,), num_threads=128,
           smem_bytes=2 * 16 * 128 + ALIGNMENT),
    Effect("copy_zfill", "make_copy_zfill", lambda rng: {"out": _unset(4 * 64), "x": _words(rng, 4 * 64)}, _zfill,
           num_threads=64, smem_bytes=16 * 64 + ALIGNMENT),
    Effect("copy_mbarrier", "make_copy_mbarrier", lambda rng: {"out": _unset(4 * 64), "x": _words(rng, 4 * 64)},
           lambda inputs: {"out": _next(inputs["x"].reshape(64, 4), 0).reshape(-1)}, (64,), num_threads=64,
           smem_bytes=16 * 64 + 8 + ALIGNMENT),

    *(Effect(name, "make_tma_load",
             lambda rng: {"out": _unset(len(BOXES) * TILE_BYTES // 4), "held": _unset(1), "tensor": _tensor(rng)}, _tma_load,
             (BOXES, expect_apart), num_threads=128, smem_bytes=len(BOXES) * TILE_BYTES + 8 + ALIGNMENT, tensor_maps=_tensor_map(64))
      for name, expect_apart in (("tma_load", False), ("tma_load_expect_tx", True))),
    *(Effect(name, "make_tma_load_5d",
             lambda rng: {"tensor": _tensor(rng), "out": _unset(len(BOXES_5D) * 2 * TILE_BYTES // 4)}, _tma_load_5d,
             (BOXES_5D, 2, parameter), num_threads=128, smem_bytes=len(BOXES_5D) * 2 * TILE_BYTES + 8 + ALIGNMENT,
             tensor_maps=_tile_map(64, 2), map_is_parameter=parameter is not None)
      for name, parameter in (("tma_load_5d", None), ("tma_load_by_parameter", FIRST_MAP))),
    Effect("tma_multicast", "make_tma_multicast", lambda rng: {"out": _unset(4 * TILE_BYTES // 4), "tensor": _tensor(rng)}, _tma_multicast,
           (2,), num_threads=128, num_blocks=4, cluster_size=2, smem_bytes=TILE_BYTES + 8 + ALIGNMENT, tensor_maps=_tensor_map(32)),
    Effect("tma_multicast_turns", "make_tma_multicast_turns",
           lambda rng: {"out": _unset(2 * TENSOR_SHAPE[0] * TILE_BYTES // 4), "tensor": _tensor(rng)}, _tma_multicast_turns,
           (TENSOR_SHAPE[0], 64), num_threads=64, num_blocks=2, cluster_size=2, smem_bytes=TILE_BYTES + 16 + ALIGNMENT,
           tensor_maps=_tile_map(32, 1)),
    *(Effect(f"tma_store_{fence}", "make_tma_store",
             lambda rng: {"tensor": _tensor(rng), "tiles": _words(rng, len(STORE_BOXES) * TILE_BYTES // 4)}, _tma_store,
             (STORE_BOXES, fence),
             num_threads=128, smem_bytes=TILE_BYTES + ALIGNMENT, tensor_maps=_tensor_map(64))
      for fence in ("fence_proxy_async_shared", "fence_proxy_async")),
    *(Effect(f"policy_{priority}", "make_policy", lambda rng: {"out": _unset(2)},
             lambda inputs, policy=policy: {"out": np.array([policy & ALL_BITS, policy >> 32], np.uint32)}, (priority,))
      for priority, policy in _POLICIES.items()),

    Effect("cluster_neighbours", "make_cluster_neighbours",
           lambda rng: {"ranks": _unset(8 * 64), "words": _unset(8 * 64), "floats": _unset(8 * 64, np.float32), "x": _floats(rng, 8 * 64)},
           lambda inputs: {"ranks": np.repeat(np.tile(np.arange(4, dtype=np.uint32), 2), 64),
                           "words": _next(inputs["x"].reshape(2, 4, 64), 1).reshape(-1).view(np.uint32),
                           "floats": _next(inputs["x"].reshape(2, 4, 64), 1).reshape(-1)},
           (4,), num_threads=64, num_blocks=8, cluster_size=4, smem_bytes=4 * 64 + ALIGNMENT),
    # Block b has what the block before it in its cluster sent.
    Effect("cluster_store", "make_cluster_store", lambda rng: {"out": _unset(8 * 64), "x": _words(rng, 8 * 64)},
           lambda inputs: {"out": np.roll(inputs["x"].reshape(2, 4, 64), 1, 1).reshape(-1)},
           (64, 4), num_threads=64, num_blocks=8, cluster_size=4, smem_bytes=4 * 64 + 8 + ALIGNMENT),
    Effect("cluster_arrivals", "make_cluster_arrivals", lambda rng: {"out": _unset(64), "x": _words(rng, 64)},
           lambda inputs: {"out": _next(inputs["x"])}, (64,), num_threads=64, num_blocks=2, cluster_size=2,
           smem_bytes=4 * 64 + 8 + ALIGNMENT),
    Effect("cluster_message", "make_cluster_message",
           lambda rng: {"out": _unset(WARP), "flag": np.zeros(1, np.uint32), "x": _words(rng, WARP)},
           lambda inputs: {"out": inputs["x"], "flag": np.ones(1, np.uint32)}, num_blocks=2, cluster_size=2,
           smem_bytes=4 * WARP + ALIGNMENT),

    Effect("dependent_grids", "make_dependent_grids", lambda rng: {"values": _small(rng, 4 * 128)},
           lambda inputs: {"values": inputs["values"] * 9 + 4}, num_threads=128, num_blocks=4, num_launches=2),
    # 168 registers a thread at the launch: 3 x 168 = 40 + 2 x 232.
    Effect("register_moves", "make_register_moves", lambda rng: {"out": _unset(384), "x": _words(rng, 384)},
           lambda inputs: {"out": inputs["x"] + np.arange(384, dtype=np.uint32) // 128}, (40, 232), num_threads=384),

    *(Effect(f"product_{n}_{dtype}_{a_form}_{'mn' if b_transposed else 'k'}_major", "make_product",
             _product_inputs(n, _DTYPES[dtype], a_form == "transposed", b_transposed),
             _product(n, _DTYPES[dtype], a_form == "transposed", b_transposed),
             (n, dtype, a_form == "registers", b_transposed, a_form == "transposed"), num_threads=128,
             smem_bytes=TILE_BYTES + 128 * max(n, 64 if b_transposed else 0) + ALIGNMENT)
      for n, b_transposed, a_forms in ((8, False, ("shared", "registers")), (16, False, ("shared", "transposed")),
                                       (32, False, ("shared", "transposed")), (64, False, ("shared", "registers")),
                                       (256, False, ("shared", "registers")), (64, True, ("shared", "registers")),
                                       (256, True, ("shared", "registers")))
      for dtype in _DTYPES for a_form in a_forms),
]
EFFECTS = {effect.name: effect for effect in _ALL}
