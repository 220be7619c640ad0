"""The hopper backend without a GPU: what its kernels compile to, how shared memory is laid out, what the host decides.

Levels: l0. On a GPU the property suite covers the rest (`python -m verify --backend hopper`).
"""

import math
import shutil
import struct
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from numba import cuda

from mla_numba import BackendUnavailable, dispatch
from mla_numba.config import DecodeShape
from mla_numba.scheduler import NEVER_CUT

pytestmark = pytest.mark.l0
if cuda.config.ENABLE_CUDASIM:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

# After the skip: the simulator lacks what they import.
from mla_numba.host import compiler, cubin, hopper, hopper_cut, launch  # noqa: E402
from mla_numba.kernels import hopper_config  # noqa: E402
from perf.sass import VARIANTS, find_tool, inspect  # noqa: E402

# A thread block's on compute capability 9.0 (CUDA C++ Programming Guide, technical specifications).
SMEM_LIMIT = 227 * 1024
REGISTERS_PER_SM = 65536


needs_tools = pytest.mark.skipif(find_tool("nvdisasm") is None, reason="nvdisasm comes with the extra test")


@needs_tools
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def test_what_the_decode_kernel_compiles_to(variant):
    """One test, as compiling takes most of its time."""
    report = inspect(hopper.decode_spec(*variant))
    assert (report.stack_bytes, report.spill_bytes, report.opcodes["LDL"], report.opcodes["STL"]) == (0, 0, 0, 0)
    assert report.warnings == ()
    assert report.registers * hopper_config.NUM_THREADS <= REGISTERS_PER_SM
    assert report.opcodes["USETMAXREG"] == 2
    _, _, row_tiles, num_rows = variant
    # 36 wgmma a QK, 4 a PV. Stream: each warpgroup has one QK, and a PV of its own P and of the other one's. Seesaw: QK of the first and
    # the next even block and of an odd one; in either warpgroup a PV of its own P, and of the other one's in two arms. Few rows: as the
    # stream, but a PV is 16, of four tiles of V^T.
    assert report.opcodes["HGMMA"] == (3 * 36 + 6 * 4 if row_tiles > 1 else 2 * 36 + 4 * (4 if num_rows == 64 else 16))
    # A wait after each would be a serialised schedule.
    assert report.opcodes["WARPGROUP.DEPBAR"] < report.opcodes["HGMMA"] / 8
    # Q at 2 places, a side of a block at 4; the compiler may double some.
    assert report.opcodes["UTMALDG"] >= 2 + 4
    # Of two thread blocks each loads for both, arrives at the other one's barriers, and waits for it at its begin and end.
    assert (report.opcodes["UTMALDG.5D.MULTICAST"] >= 4) == (report.opcodes["UCGABAR_WAIT"] >= 2) == (row_tiles % 2 == 0)
    # Page ids; ten lines of 128 bytes and fewer are a row of the cache.
    assert report.opcodes["CCTL.E.PF2"] == 1 + (9 if row_tiles > 1 else 0)
    # P of 16 rows is one stmatrix, a tile's results of as many another one; Q's last tile stays in shared memory.
    least_stsm, least_ldsm = (8, 4) if num_rows == 64 else ((2 + 4) * num_rows // 16, 0)
    assert report.opcodes["STSM"] >= least_stsm and report.opcodes["LDSM"] >= least_ldsm
    assert (report.opcodes["LDSM"] == 0) == (num_rows < 64)


@needs_tools
@pytest.mark.parametrize(("dtype", "num_rows"), [("bfloat16", 64), ("float16", 16)])
def test_what_the_merge_kernel_compiles_to(dtype, num_rows):
    report = inspect(hopper.merge_spec(dtype, num_rows))
    assert (report.stack_bytes, report.spill_bytes, report.warnings) == (0, 0, ())


@needs_tools
def test_what_the_plan_s_kernel_compiles_to():
    report = inspect(hopper.schedule_spec())
    assert (report.stack_bytes, report.spill_bytes, report.warnings) == (0, 0, ())
    # A warp tries a share together, and no number became a float64, as Numba compares signed with unsigned ones.
    assert report.opcodes["VOTE"] > 0 and report.opcodes["DSETP"] == 0


def test_shared_memory_fits_and_nothing_overlaps():
    d = hopper_config
    regions = {
        "Q": (d.Q_SMEM, d.NUM_TILES * d.TILE_BYTES), "K0": (d.K0_SMEM, d.NUM_TILES * d.TILE_BYTES),
        "K1": (d.K1_SMEM, d.NUM_TILES * d.TILE_BYTES), "P0": (d.P0_SMEM, d.TILE_BYTES), "max": (d.MAX_SMEM, 4 * d.BLOCK_M),
        "scale0": (d.SCALE0_SMEM, 4 * d.BLOCK_M), "scale1": (d.SCALE1_SMEM, 4 * d.BLOCK_M), "sums": (d.SUM_SMEM, 8 * d.BLOCK_M),
        "pieces": (d.PIECE_SMEM, 2 * d.PIECE_BYTES), "full": (d.FULL_SMEM, 32), "empty": (d.EMPTY_SMEM, 32),
        "q_full": (d.Q_FULL_SMEM, 8), "q_empty": (d.Q_EMPTY_SMEM, 8)}
    ends = 0
    for name, (begin, size) in sorted(regions.items(), key=lambda item: item[1]):
        assert begin >= ends, name
        ends = begin + size
    # The base is brought to a multiple of 1,024.
    assert ends + 1023 <= d.SMEM_BYTES <= SMEM_LIMIT
    for name in ("Q", "K0", "K1", "P0"):
        assert regions[name][0] % 1024 == 0, f"{name}: 128-byte swizzle repeats every 1,024 bytes"
    assert d.P1_SMEM == d.Q_SMEM + 8 * d.TILE_BYTES
    # A piece's words are found by flipping one bit of their address, and its parity is that bit.
    assert d.PIECE_BYTES == 64 and d.PIECE_SMEM % 128 == 0 and d.PIECE_ROW_BEGIN < d.PIECE_BYTES
    assert all(begin % 8 == 0 for begin, _ in regions.values())


@pytest.mark.parametrize("num_rows", hopper_config.SWAPPED_ROWS)
def test_shared_memory_of_few_rows_fits_and_nothing_overlaps(num_rows):
    """What hopper_swapped has in the places of 64 rows' Q and P0, both of which are larger."""
    d, config = hopper_config, hopper_config.HopperConfig("bfloat16", 64, 1, num_rows)
    # Both P by turns of 128 bytes a row, as Q's tiles.
    assert 2 * config.q_tile_bytes <= d.TILE_BYTES and config.q_tile_bytes % 1024 == 0
    # 16 columns of four tiles of all rows, of each warp, in 16 bits.
    regions = {"Q": (d.Q_SMEM, d.NUM_TILES * config.q_tile_bytes), "warps' maxima": (d.WARP_MAX_SMEM, d.NUM_WARPS * num_rows * 4),
               "warps' sums": (d.WARP_SUM_SMEM, d.NUM_WARPS * num_rows * 4),
               "results": (d.SWAPPED_STAGE_SMEM, d.NUM_WARPS * num_rows * 4 * 16 * 2)}
    end = 0
    for name, (begin, size) in regions.items():
        assert begin >= end and begin % 128 == 0, name
        end = begin + size
    assert end <= d.K0_SMEM


def _shape(**changes):
    values = dict(batch=1, seq_len_q=1, total_q=1, num_heads_q=128, num_heads_kv=1, head_dim_qk=576, head_dim_v=512, page_size=64,
                  dtype="bfloat16", causal=True, batch_invariant=False)
    return DecodeShape(**{**values, **changes})


def test_arrays_of_a_gpu_that_numba_cannot_use_are_told_why(monkeypatch):
    monkeypatch.setattr("mla_numba.host.simt.unavailable", lambda device=None: ["no CUDA driver: the reason"])
    with pytest.raises(BackendUnavailable, match=r"(?s)no CUDA driver: the reason.*the arrays are on cuda:1"):
        dispatch.choose_backend("auto", _shape(), 1)


def test_of_gpus_that_differ_the_arrays_own_is_asked(monkeypatch):
    """An A100, which is current, and an H100."""
    gpus = [SimpleNamespace(compute_capability=(8, 0)), SimpleNamespace(compute_capability=(9, 0))]
    monkeypatch.setattr(hopper, "cuda", SimpleNamespace(gpus=gpus, get_current_device=lambda: gpus[0]))
    monkeypatch.setattr("mla_numba.host.simt.unavailable", lambda device=None: [])
    monkeypatch.setattr("mla_numba.host.simt._device_idx", lambda: 0)
    monkeypatch.setattr("mla_numba.host.simt._device_limits", lambda device: (108, [163 * 1024, 1024][device], 0))
    assert [dispatch.choose_backend("auto", _shape(), device) for device in (0, 1)] == ["simt", "hopper"]
    # Host arrays go to the current one.
    assert dispatch.choose_backend("auto", _shape(), None) == "simt"
    with pytest.raises(BackendUnavailable, match=r"compute capability 8\.0, and wgmma needs 9\.0"):
        dispatch.choose_backend("hopper", _shape(), 0)
    with pytest.raises(BackendUnavailable, match="more shared memory than the 1024 bytes"):
        dispatch.choose_backend("simt", _shape(), 1)


@pytest.mark.parametrize(("changes", "reason"), [
    (dict(), None), (dict(dtype="float16", page_size=8), None), (dict(page_size=192), None),
    (dict(dtype="float32"), "dtype float32"), (dict(head_dim_v=256), "head_dim_v=256"), (dict(page_size=1), "page_size=1"),
    (dict(page_size=48), "page_size=48"), (dict(page_size=96), "page_size=96")], ids=str)
def test_unsupported_shapes_have_a_reason(changes, reason):
    reasons = hopper.unsupported(_shape(**changes))
    assert (reasons == []) if reason is None else (reason in reasons[0])


@pytest.mark.parametrize(("pointer", "strides", "num_pages", "fits"), [
    (1024, (73728, 1152, 1152, 2), 4, True), (1026, (73728, 1152, 1152, 2), 4, False), (1024, (73728, 1154, 1152, 2), 4, False),
    (1024, (-73728, 1152, 1152, 2), 4, False), (1024, (73728, 1152, 0, 2), 4, True), (1024, (0, 1152, 1152, 2), 4, False),
    (1024, (0, 1152, 1152, 2), 1, True), (1024, (73728, 0, 1152, 2), 4, False), (0, (0, 0, 0, 0), 0, True)], ids=str)
def test_caches_that_tma_cannot_read_have_a_reason(pointer, strides, num_pages, fits):
    shape = (num_pages, 64, 1, 576)
    reasons = hopper.unsupported_layout(SimpleNamespace(pointer=pointer, shape=shape, strides=strides, size=math.prod(shape)))
    assert (reasons == []) == fits


def test_without_a_home_kernels_are_not_kept(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MLA_NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(cubin.pathlib.Path, "home", no_home)
    path = cubin.cache_dir() / "kernel.cubin"
    cubin._keep(path, b"code")
    with pytest.raises(OSError, match="Not a directory"):
        path.read_bytes()


@pytest.mark.parametrize(("rows", "team"), [(1, 1), (64, 1), (65, 2), (128, 2), (192, 3), (256, 4), (320, 3), (512, 4)])
def test_team_keeps_all_sms_busy(rows, team):
    """Of an H200's 132."""
    assert hopper_cut.team_size(-(-rows // 64), 1, 132) == team


@pytest.mark.parametrize(("kv_heads", "team"), [(1, 2), (2, 2), (66, 2), (200, 2)])
def test_team_with_kv_heads(kv_heads, team):
    assert hopper_cut.team_size(2, kv_heads, 132) == team


@pytest.mark.parametrize(("requests", "heads", "kv_heads", "blocks"), [
    (32, 16, 1, 5), (65, 64, 1, 5), (66, 64, 1, 3), (256, 16, 1, 3), (33, 32, 2, 3), (1, 65, 1, 4), (256, 128, 1, 4)])
def test_what_a_piece_costs_follows_from_row_tiles_and_requests(requests: int, heads: int, kv_heads: int, blocks: int) -> None:
    shape = _shape(batch=requests, total_q=requests, num_heads_q=heads, num_heads_kv=kv_heads)
    assert hopper_cut.schedule_config(shape, 132).overhead_blocks == blocks


@pytest.mark.parametrize(("heads", "seq_len_q", "blocks"), [(16, 1, 1), (64, 1, 1), (16, 4, 1), (65, 1, 2), (128, 1, 2), (64, 2, 2)])
def test_one_block_is_a_piece_only_where_one_row_tile_reads(heads: int, seq_len_q: int, blocks: int) -> None:
    shape = _shape(seq_len_q=seq_len_q, total_q=seq_len_q, num_heads_q=heads)
    assert hopper_cut.schedule_config(shape, 132).min_split_blocks == blocks


@pytest.mark.parametrize(("heads", "seq_len_q", "kv_heads", "tiles"), [
    (1, 1, 1, (1, 16)), (16, 1, 1, (1, 16)), (8, 2, 1, (1, 16)), (32, 1, 2, (1, 16)), (17, 1, 1, (1, 32)), (16, 2, 1, (1, 32)),
    (33, 1, 1, (1, 64)), (11, 3, 1, (1, 64)), (64, 1, 1, (1, 64)), (65, 1, 1, (2, 64)), (128, 2, 1, (4, 64))])
def test_tiles_have_as_many_rows_as_a_request(heads: int, seq_len_q: int, kv_heads: int, tiles: tuple[int, int]) -> None:
    shape = _shape(seq_len_q=seq_len_q, total_q=seq_len_q, num_heads_q=heads, num_heads_kv=kv_heads)
    config = hopper_cut.schedule_config(shape, 132)
    assert hopper_cut.tiles_of(config) == tiles and config.rows_per_job == tiles[0] * tiles[1]
    assert hopper_cut.is_for_kernels(config)


@pytest.mark.parametrize("heads", [1, 16, 32])
def test_tiles_of_a_ragged_batch_have_64_rows(heads: int) -> None:
    """A request may have more rows than another."""
    config = hopper_cut.schedule_config(_shape(batch=2, seq_len_q=0, total_q=3, num_heads_q=heads), 132)
    assert hopper_cut.tiles_of(config) == (1, 64)


@pytest.mark.parametrize(("requests", "queries", "heads", "kv_heads", "max_seq_len", "tiles", "workers"), [
    # Four blocks of 16 rows for each of 132 SMs: 66 of 128 heads. If three, all but some workers, for the merge.
    (1, 1, 128, 1, 66 * 64, (1, 16), 132), (1, 1, 128, 1, 66 * 64 + 1, (2, 64), 33), (1, 1, 128, 1, 1024, (1, 16), 66),
    (1, 1, 128, 1, 49 * 64, (1, 16), 106), (1, 1, 128, 1, 49 * 64 + 1, (1, 16), 132),
    (4, 1, 128, 2, 1024, (1, 16), 66), (4, 1, 128, 2, 1025, (1, 64), 33), (1, 2, 128, 1, 1024, (1, 16), 106),
    (1, 1, 64, 1, 1024, (1, 16), 66),
    # Jobs that nobody will cut: a worker each.
    (1, 1, 128, 1, 320, (1, 16), 8), (1, 1, 128, 1, 0, (1, 16), 8), (33, 1, 128, 1, 320, (2, 64), 33), (100, 1, 128, 1, 320, (2, 64), 66),
    (16, 1, 128, 1, 320, (1, 16), 128), (17, 1, 128, 1, 64, (2, 64), 17), (90, 1, 16, 1, 320, (1, 16), 90),
    (150, 1, 16, 1, 320, (1, 16), 132),
    # Any number of blocks of jobs of eight or fewer; a worker for each, if more than half of the workers have one.
    (8, 1, 128, 1, 512, (1, 16), 132), (9, 1, 128, 1, 512, (1, 16), 72), (16, 1, 128, 1, 512, (1, 16), 128),
    (9, 1, 128, 1, 513, (2, 64), 33), (17, 1, 128, 1, 512, (2, 64), 33), (64, 2, 16, 1, 512, (1, 16), 128),
    # Half of them where each would have three blocks, two of one row tile, one of 16 rows.
    (2, 1, 128, 1, 99 * 64, (2, 64), 33), (2, 1, 128, 1, 99 * 64 + 1, (2, 64), 64), (20, 1, 128, 1, 768, (2, 64), 66),
    # Four, if nearly all of that half have a job each.
    (33, 1, 128, 1, 512, (2, 64), 33), (33, 1, 128, 1, 513, (2, 64), 66), (24, 1, 128, 1, 640, (2, 64), 66),
    (25, 1, 128, 1, 640, (2, 64), 33), (40, 1, 128, 1, 384, (2, 64), 40),
    (4, 1, 64, 1, 66 * 64, (1, 64), 66), (4, 1, 64, 1, 66 * 64 + 1, (1, 64), 128), (2, 1, 64, 1, 66 * 64 + 1, (1, 64), 66),
    (22, 1, 16, 1, 384, (1, 16), 66), (1, 1, 16, 1, 8192, (1, 16), 66), (2, 1, 16, 1, 4225, (1, 16), 106),
    # Two thirds of one row tile alone.
    (1, 1, 16, 1, 8449, (1, 16), 88), (1, 1, 16, 1, 8 * 132 * 64, (1, 16), 88), (1, 1, 16, 1, 8 * 132 * 64 + 1, (1, 16), 106),
    (1, 2, 16, 1, 4 * 66 * 64 + 1, (1, 32), 88), (1, 1, 64, 1, 4 * 132 * 64, (1, 64), 88), (1, 1, 64, 1, 4 * 132 * 64 + 1, (1, 64), 128),
    (2, 1, 64, 1, 32768, (1, 64), 128),
    (1, 1, 128, 1, 32768, (2, 64), 64),
    # All, or all but some.
    (33, 1, 16, 1, 4096, (1, 16), 106), (33, 1, 16, 1, 4097, (1, 16), 132), (34, 1, 16, 1, 2048, (1, 16), 132),
    (33, 1, 64, 1, 4096, (1, 64), 128), (34, 1, 64, 1, 4096, (1, 64), 132), (8, 2, 128, 1, 65536, (4, 64), 32)])
def test_short_calls_are_cut_as_suits_them(requests: int, queries: int, heads: int, kv_heads: int, max_seq_len: int, tiles: tuple[int, int],
                                           workers: int) -> None:
    shape = _shape(batch=requests, seq_len_q=queries, total_q=requests * queries, num_heads_q=heads, num_heads_kv=kv_heads)
    config = hopper_cut.schedule_config(shape, 132, max_seq_len)
    assert (hopper_cut.tiles_of(config), config.num_workers) == (tiles, workers)
    assert hopper_cut.is_for_kernels(config)


@pytest.mark.parametrize(("requests", "heads", "max_seq_len", "batch_invariant", "is_never_cut"), [
    (1, 16, 320, False, True), (1, 16, 321, False, False), (1, 16, None, False, False), (1, 16, 320, True, False),
    (8, 128, 512, False, False), (9, 128, 512, False, True), (16, 128, 512, True, False), (100, 16, 512, False, False),
    (132, 16, 320, False, True), (133, 16, 320, False, False), (66, 128, 64, False, True), (67, 128, 64, False, False)])
def test_short_jobs_are_never_cut_if_there_is_a_worker_for_each(requests: int, heads: int, max_seq_len: int | None, batch_invariant: bool,
                                                                is_never_cut: bool) -> None:
    shape = _shape(batch=requests, total_q=requests, num_heads_q=heads, batch_invariant=batch_invariant)
    assert (hopper_cut.schedule_config(shape, 132, max_seq_len).uncut_blocks == NEVER_CUT) == is_never_cut


@pytest.mark.parametrize(("heads", "max_seq_len", "batch_invariant", "pieces"), [
    (16, 1024, False, 2), (128, 1024, False, 2), (16, 1024, True, 4), (16, None, False, 4), (16, 65536, False, 4), (32, 65536, False, 4),
    (64, 16384, False, 8), (128, 8192, False, 8)])
def test_a_merge_of_few_rows_is_shared_by_more(heads: int, max_seq_len: int | None, batch_invariant: bool, pieces: int) -> None:
    config = hopper_cut.schedule_config(_shape(num_heads_q=heads, batch_invariant=batch_invariant), 132, max_seq_len)
    assert (config.merge_alone_parts, config.merge_share_parts) == (8, pieces)


@pytest.mark.parametrize(("requests", "heads", "workers"), [
    (1, 16, 106), (33, 16, 106), (34, 16, 132), (1, 64, 128), (16, 128, 64), (17, 128, 66)])
def test_where_nobody_knows_the_lengths_the_merge_kernel_has_sms(requests: int, heads: int, workers: int) -> None:
    shape = _shape(batch=requests, total_q=requests, num_heads_q=heads)
    assert hopper_cut.schedule_config(shape, 132).num_workers == workers


@pytest.mark.parametrize("changes", [dict(batch_invariant=True), dict(seq_len_q=0, total_q=3)], ids=str)
def test_the_longest_request_changes_no_tiles(changes: dict[str, int]) -> None:
    """Other tiles are other bits; and of a ragged batch the host knows too little."""
    shape = _shape(batch=2, **changes)
    assert hopper_cut.schedule_config(shape, 132, 1).rows_per_job == hopper_cut.schedule_config(shape, 132).rows_per_job == 128


@pytest.mark.parametrize(("rows", "there_are"), [
    (8, False), (16, True), (32, True), (48, False), (64, True), (96, False), (128, True), (256, True), (320, False)])
def test_jobs_of_some_numbers_of_rows_have_kernels(rows: int, there_are: bool) -> None:
    """A plan that is only looked at (flash_mla) may have any."""
    assert hopper_cut.is_for_kernels(replace(hopper_cut.schedule_config(_shape(), 132), rows_per_job=rows)) == there_are


def test_arguments_are_packed_as_the_kernels_read_them():
    spec = hopper.decode_spec("bfloat16", 64, 1, 64)
    assert "".join(launch.formats(spec.types())) == "QQQQQQ128s128s128sQqqiiQqqqiQqqqQqqqiiiff"
    assert len(spec.types().args) == spec.kernel().__code__.co_argcount
    # Parameters begin here in constant bank 0 of sm_90, and TMA wants its maps at multiples of 64.
    assert (0x210 + 8 * hopper_config.FIRST_MAP) % 64 == 0


def test_arguments_that_are_set_later_lie_where_all_at_once_would():
    letters, values = ["Q", "16s", "i", "q", "Q", "f", "i", "Q"], [1, bytes(range(16)), 2, -3, 4, 0.5, 5, 6]
    arguments = launch.Arguments(letters, [None, None, 2, -3, None, 0.5, 5, None])
    for put, run in zip(arguments.setters, (values[:2], values[4:5], values[7:]), strict=True):
        put(*run)
    assert arguments.memory.tobytes() == struct.pack("@" + "".join(letters), *values)
    with pytest.raises(ValueError, match="must begin at a multiple of 8, not at 4"):
        launch.Arguments(["i", "i", "Q"], [1, None, 2])


def test_boxes_are_of_a_block_or_of_an_atom_of_a_page():
    configs = {size: hopper_config.HopperConfig("bfloat16", size, 1) for size in (8, 16, 32, 64, 128, 256)}
    boxes = {size: (config.box_rows, config.pages_per_block) for size, config in configs.items()}
    assert boxes == {8: (8, 8), 16: (8, 4), 32: (8, 2), 64: (64, 1), 128: (64, 1), 256: (64, 1)}


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128])
def test_boxes_of_a_side_fill_its_place(page_size):
    """Every atom of every tile of a side has a place of its own, and a box's are one behind the other."""
    config = hopper_config.HopperConfig("bfloat16", page_size, 1)
    atoms_of_box = config.box_rows // hopper_config.ATOM_ROWS
    for side, tiles in enumerate(hopper_config.SIDE_TILES):
        places = [tile * config.next_tile_bytes + atom * config.next_atom_bytes(side)
                  for box in range(hopper_config.BLOCK_N // config.box_rows) for tile in range(tiles)
                  for atom in range(box * atoms_of_box, (box + 1) * atoms_of_box)]
        assert places == list(range(0, tiles * hopper_config.TILE_BYTES, hopper_config.ATOM_BYTES))


def _compiled(monkeypatch, python: str) -> tuple[list[bytes], list[str]]:
    """What `compile_kernels` makes of a decode and a merge with this Python, and what it has this process compile, which makes nothing."""
    here: list[str] = []

    def compile_here(specs):
        here.extend(spec.module for spec in specs)
        return [(b"here", "")] * len(specs)

    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(compiler, "_compile_here", compile_here)
    specs = [hopper.decode_spec("bfloat16", 64, 2, 64), hopper.merge_spec("bfloat16", 16)]
    return [code for code, _ in compiler.compile_kernels(specs)], here


@pytest.mark.parametrize("at_its_start", ["", "print('hello')"])
def test_kernels_beside_the_first_are_compiled_by_another_process(monkeypatch, tmp_path, at_its_start: str) -> None:
    """Whatever a Python prints when it starts."""
    (tmp_path / "sitecustomize.py").write_text(at_its_start)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    codes, here = _compiled(monkeypatch, sys.executable)
    assert here == ["hopper_decode"]
    assert codes[0] == b"here"
    assert codes[1].startswith(b"\x7fELF")


@pytest.mark.parametrize("program", ["true", "false", "echo", None])
@pytest.mark.parametrize("name", ["python", "application"])
def test_kernels_are_compiled_here_where_there_is_no_python_to_run(monkeypatch, tmp_path, program: str | None, name: str) -> None:
    """It may not be there, fail, write nothing or something else; what is not called Python is not run."""
    python = tmp_path / name
    if program is not None:
        python.symlink_to(shutil.which(program) or "")
    codes, here = _compiled(monkeypatch, str(python))
    assert here == ["hopper_decode", "hopper_merge"]
    assert codes == [b"here", b"here"]
