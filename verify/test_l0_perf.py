"""perf's arithmetic and its files: work counted by hand, the schema, verdicts on samples whose truth is known, pictures of a stored result.

No time is asserted. `data/perf_sample.json` has the peers' medians of one H200; ours in it are invented (its device.note says so).
"""

import argparse
import copy
import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mla_numba.config import DecodeShape, ScheduleConfig
from mla_numba.host.schedule import make_host_schedule
from mla_numba.scheduler import JOB_NUM_BLOCKS
from perf import cases, compare, datasheet, explain, report, results, sanitize, traffic
from perf.cases import Case

pytestmark = pytest.mark.l0

SAMPLE = Path(__file__).parent / "data" / "perf_sample.json"
RESULTS = Path(compare.__file__).parent / "results"
H200 = datasheet.MEASURED_H200


@pytest.fixture
def document():
    return results.load(SAMPLE)


def text_of(print_to, width=100):
    console = Console(width=width, file=io.StringIO())
    print_to(console)
    return console.file.getvalue()


# Bytes and FLOPs.

def test_work_of_one_request_by_hand():
    work = traffic.work(Case("by hand", (100,), num_heads_q=128))
    assert work.kv_bytes == work.unique_kv_bytes == 100 * 1152
    assert work.q_bytes == 128 * 576 * 2
    assert work.out_bytes == 128 * 512 * 2
    assert work.lse_bytes == 128 * 4
    assert work.flops == 100 * 128 * 2 * (576 + 512)
    assert work.bytes == 115200 + 147456 + 131072 + 512
    assert work.intensity == 27852800 / 394240


def test_causal_mask_is_discounted():
    # Three queries of a request of two tokens see 0, 1 and 2 of them; of five tokens 3, 4 and 5.
    flops_per_token = 2 * (576 + 512) * 16
    case = Case("causal", (2, 5, 0, -7), seq_len_q=3, num_heads_q=16)
    assert traffic.work(case).flops == (3 + 12) * flops_per_token
    full = dataclasses.replace(case, causal=False)
    assert traffic.work(full).flops == (6 + 15) * flops_per_token
    # The last query sees all tokens either way.
    assert traffic.work(case).kv_bytes == traffic.work(full).kv_bytes == 7 * 1152


def test_kv_heads_and_dtype_count():
    one, four = (traffic.work(Case("", (10,), num_heads_q=8, num_heads_kv=heads, head_dim_qk=64, head_dim_v=32, dtype="float32"))
                 for heads in (1, 4))
    assert (one.kv_bytes, four.kv_bytes) == (10 * 64 * 4, 4 * 10 * 64 * 4)
    assert one.flops == four.flops == 10 * 8 * 2 * 96


def test_partials_are_written_and_read():
    case = Case("split", (4096,))
    assert traffic.work(case).partial_bytes == 0
    work = traffic.work(case, split_pieces=3)
    assert work.partial_bytes == 2 * 3 * 64 * (512 + 1) * 4
    assert work.bytes == traffic.work(case).bytes + work.partial_bytes


def test_flashmla_formulas():
    # 2 b h s_q mean_sk (d + dv), and b (2 s_q h d + 2 mean_sk d + 2 s_q h dv), for b = 2, s_q = 2, mean 150.
    case = Case("flashmla", (100, 200), seq_len_q=2, num_heads_q=128)
    work = traffic.work(case, flashmla_formulas=True)
    assert work.flops == 2 * 2 * 128 * 2 * 150 * (576 + 512)
    assert work.bytes == 2 * (2 * 2 * 128 * 576 + 2 * 150 * 576 + 2 * 2 * 128 * 512)
    assert traffic.work(case).flops < work.flops


def test_shared_pages_count_once():
    # 512 tokens in 8 pages that both share; the rest, and what a part-filled block begins with, is each one's own.
    case = Case("shared", (1100, 600), prefix_blocks=((7, 8, 9), (7, 5)))
    work = traffic.work(case)
    assert work.kv_bytes == 1700 * 1152
    assert work.unique_kv_bytes == 1188 * 1152
    assert work.bytes == work.unique_kv_bytes + work.q_bytes + work.out_bytes + work.lse_bytes


@pytest.mark.parametrize("name", ["mooncake_32_h128", "mooncake_256_h16", "azure_code_32_h64"])
@pytest.mark.parametrize("page_size", [48, 64, 1024])
def test_unique_tokens_are_those_of_the_block_table(name, page_size):
    case = dataclasses.replace(cases.find(name), page_size=page_size)
    table, _ = cases.block_table(case, np.random.default_rng(0))
    seen: dict[int, int] = {}
    for length, pages in zip(case.seq_lens, table, strict=True):
        for column in range(-(-length // page_size)):
            seen[pages[column]] = max(seen.get(pages[column], 0), min(page_size, length - column * page_size))
    assert traffic.work(case).unique_kv_bytes == sum(seen.values()) * 1152


def test_bound_and_ridge():
    memory = traffic.Work(flops=10**9, kv_bytes=0, unique_kv_bytes=4 * 10**9, q_bytes=0, out_bytes=0, lse_bytes=0)
    assert traffic.bound(memory, read_gbs=4000, tflops=500) == ("memory", 1000.0)
    compute = dataclasses.replace(memory, flops=10**12)
    assert traffic.bound(compute, read_gbs=4000, tflops=500) == ("compute", 2000.0)
    assert traffic.ridge(4000, 500) == 125
    assert (memory.gbs(1000), compute.tflops(2000)) == (4000, 500)


def test_dense_decode_turns_compute_bound_where_facts_say():
    """About 94 rows on a measured H200, in the limit of long requests."""
    assert [traffic.bound(traffic.work(Case("", (10**6,), num_heads_q=heads)), H200.read_gbs, H200.tflops)[0]
            for heads in (92, 96)] == ["memory", "compute"]


@pytest.mark.parametrize(("heads", "queries", "padding"), [(128, 1, 1), (64, 1, 1), (16, 1, 4), (16, 5, 1.6), (128, 3, 1)])
def test_tile_padding(heads, queries, padding):
    assert traffic.tile_padding(Case("", (1,), queries, heads)) == padding


@pytest.mark.parametrize(("name", "found"), [("NVIDIA H200", "H200 SXM"), ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H20", "H20"),
                                             ("NVIDIA H100 PCIe", None), ("NVIDIA H200 NVL", None), ("AMD EPYC 9654", None)])
def test_datasheet_by_name(name, found):
    sheet = datasheet.datasheet_of(name)
    assert (sheet and sheet.name) == found


# The results file.

def change(document, path, value):
    """A copy with `value` at `path`; ... removes the key."""
    document = copy.deepcopy(document)
    *parents, last = path
    target = document
    for key in parents:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return document


@pytest.mark.parametrize(("path", "value", "message"), [
    (("rows", 1, "sol"), ..., "rows[1].sol is missing"),
    (("rows", 0, "colour"), 1, "rows[0].colour is not a key"),
    (("rows", 2, "bound"), "cache", "rows[2].bound is 'cache', but must be memory or compute"),
    (("rows", 0, "ours_us"), 0, "rows[0].ours_us is 0, but must be a number above 0"),
    (("rows", 0, "ours_us"), float("nan"), "rows[0].ours_us is nan"),
    (("rows", 0, "batch"), True, "rows[0].batch is True, but must be an integer from 1"),
    (("rows", 0, "batch"), 2, "rows[0].seq_lens has 128 lengths"),
    (("rows", 0, "ours_us_p10"), 1e9, "rows[0].ours_us is"),
    (("rows", 0, "samples_us", 1), "5", "rows[0].samples_us[1] is '5'"),
    (("rows", 0, "peers_us", "fa3"), -1.0, "rows[0].peers_us.fa3 is -1.0"),
    (("rows", 0, "kernel_us", "scan_us"), 1.0, "rows[0].kernel_us.scan_us is not a key"),
    (("rows",), {}, "rows is {}, but must be a list"),
    (("ceilings", "read_gbs"), "fast", "ceilings.read_gbs is 'fast'"),
    (("device", "name"), ..., "device.name is missing"),
    (("commit",), ..., "commit is missing"),
    (("host",), "me", "host is not a key"),
])
def test_schema_names_the_offending_key(document, path, value, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        results.validate(change(document, path, value))


@pytest.mark.parametrize(("path", "value"), [
    (("rows", 0, "peers_us", "fa3"), None), (("rows", 0, "host_us"), None), (("rows", 0, "rel_err"), None), (("rows", 0, "peers_us"), {}),
    (("rows", 0, "kernel_us"), ...), (("rows", 0, "compile_s"), 1.5), (("ceilings", "bf16_matmul_tflops"), None),
    (("device", "sms"), None), (("device", "clocks"), {"before": {"sm_mhz": 1980}}), (("rows",), []),
])
def test_schema_takes_what_may_be_absent(document, path, value):
    results.validate(change(document, path, value))


def test_every_append_leaves_a_valid_file(tmp_path, document):
    path = tmp_path / "deep" / "run.json"
    rows = document["rows"][:3]
    results.write(path, {**document, "rows": []})
    for count, row in enumerate(rows, 1):
        results.append(path, row)
        assert results.load(path)["rows"] == rows[:count]
    with pytest.raises(ValueError, match="backend is missing"):
        results.append(path, {name: value for name, value in rows[0].items() if name != "backend"})
    assert results.load(path) == {**document, "rows": rows}
    assert [entry.name for entry in path.parent.iterdir()] == ["run.json"]
    # A row is a line.
    assert sum('"case"' in line for line in path.read_text().splitlines()) == 3


def test_a_killed_write_leaves_the_file_before_it(tmp_path, document, monkeypatch):
    path = tmp_path / "run.json"
    results.write(path, {**document, "rows": document["rows"][:1]})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        results.append(path, document["rows"][1])
    assert len(results.load(path)["rows"]) == 1


def test_load_says_which_file(tmp_path):
    path = tmp_path / "broken.json"
    for text, message in (('{"rows": [', ""), ("[1]", r"the document is \[1\], but must be an object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"broken\.json: {message}"):
            results.load(path)


# Verdicts on samples whose truth is known.

def measured(document, seed, sigma=0.01, slower=1.0, noisy=(), noisy_slower=1.0, drift=0.0):
    """A run whose samples are drawn about the sample's medians; the rows `noisy` with thirty times the spread."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, row in enumerate(document["rows"]):
        spread, factor = (30 * sigma, slower * noisy_slower) if i in noisy else (sigma, slower)
        factor *= 1 + drift * rng.standard_normal()
        samples = row["ours_us"] * factor * np.maximum(1 + spread * rng.standard_normal(20), 0.05)
        p10, median, p90 = (float(value) for value in np.percentile(samples, (10, 50, 90)))
        rows.append({**row, "ours_us": median, "ours_us_p10": p10, "ours_us_p90": p90, "samples_us": samples.tolist()})
    return {**document, "rows": rows}


@pytest.mark.parametrize("sigma", [0.001, 0.01, 0.03])
@pytest.mark.parametrize("seed", range(8))
def test_two_draws_of_one_distribution_are_no_change(document, sigma, seed):
    result = compare.compare(measured(document, seed, sigma), measured(document, 1000 + seed, sigma))
    assert result.verdict == "no change"
    assert {row.verdict for _, _, row in result.rows} == {"no change"}


@pytest.mark.parametrize(("slower", "verdict"), [(1.05, "slower"), (1 / 1.05, "faster"), (1.005, "no change")])
@pytest.mark.parametrize("sigma", [0.001, 0.01, 0.03])
@pytest.mark.parametrize("seed", range(4))
def test_five_percent_count(document, sigma, seed, slower, verdict):
    result = compare.compare(measured(document, seed, sigma), measured(document, 1000 + seed, sigma, slower))
    assert result.verdict == verdict
    if sigma == 0.001:
        assert {row.verdict for _, _, row in result.rows} == {verdict}


@pytest.mark.parametrize("seed", range(8))
def test_noisy_rows_do_not_flip_the_verdict(document, seed):
    noisy = range(4)
    same = compare.compare(measured(document, seed, noisy=noisy), measured(document, 1000 + seed, noisy=noisy, noisy_slower=1.3))
    assert same.verdict == "no change"
    slower = compare.compare(measured(document, seed, noisy=noisy),
                             measured(document, 1000 + seed, slower=1.05, noisy=noisy, noisy_slower=0.7))
    assert slower.verdict == "slower"


@pytest.mark.parametrize("seed", range(8))
def test_rows_that_drift_apart_from_run_to_run_are_no_change(document, seed):
    """Clocks move each row by 1%, which the quiet samples within a run do not show."""
    result = compare.compare(measured(document, seed, 0.001, drift=0.01), measured(document, 1000 + seed, 0.001, drift=0.01))
    assert result.verdict == "no change"


def test_one_row_that_got_slower_is_named(document):
    before = measured(document, 0)
    after = copy.deepcopy(before)
    for name in ("ours_us", "ours_us_p10", "ours_us_p90"):
        after["rows"][3][name] *= 1.2
    result = compare.compare(before, after)
    assert [row["case"] for row, _, found in result.rows if found.verdict == "slower"] == [before["rows"][3]["case"]]
    assert "1 slower" in text_of(lambda console: compare.print_comparison(before, after, console))


def test_rows_match_by_what_they_measure(document):
    after = copy.deepcopy(document)
    after["rows"] = after["rows"][::-1]
    after["rows"][0]["backend"] = "hopper"
    after["rows"][1]["seq_lens"][0] += 1
    result = compare.compare(document, after)
    assert all(a["case"] == b["case"] for a, b, _ in result.rows)
    assert (len(result.rows), len(result.only_first), len(result.only_second)) == (len(document["rows"]) - 2, 2, 2)
    with pytest.raises(ValueError, match="no row in common"):
        compare.compare(document, {**document, "rows": []})


def test_peers_are_controls(document):
    after = copy.deepcopy(document)
    for row in after["rows"]:
        for name in ("peers_us", "peers_us_p10", "peers_us_p90"):
            row[name]["flashmla"] *= 1.1
    result = compare.compare(document, after)
    assert (result.verdict, result.peers["flashmla"].verdict, result.peers["fa3"].verdict) == ("no change", "slower", "no change")
    text = text_of(lambda console: compare.print_comparison(document, after, console))
    assert "control flashmla: 1.100" in text
    assert "changed too" in text


# What is printed.

@pytest.mark.parametrize("peers", [("flashmla",), ("flashmla", "fa3"), ("flashmla", "fa3", "triton", "flashinfer", "sdpa")])
@pytest.mark.parametrize("backends", [("simt",), ("simt", "hopper")])
def test_the_table_fits_a_terminal(document, peers, backends):
    for i, row in enumerate(document["rows"]):
        row["peers_us"] = dict.fromkeys(peers, 31407.8)
        row["backend"] = backends[i % len(backends)]
        row["page_size"] = 64 if i else 128
    text = text_of(lambda console: console.print(report.table(document)), width=200)
    assert max(map(len, map(str.rstrip, text.splitlines()))) <= 120
    assert all(f"{row['ours_us']:.1f}" in text for row in document["rows"])
    assert "…" not in text_of(lambda console: report.print_report(document, console), width=120)


def test_a_line_carries_its_verdict(document):
    row = change(document, ("rows", 0), {**document["rows"][0], "case": "one"})["rows"][0]
    row.update(batch=128, seq_len_q=1, num_heads_q=128, seq_len_k_mean=8192, ours_us=430.0, ours_us_p10=427.0, ours_us_p90=436.0,
               gbs=2892.0, tflops=679.0, bound="compute", sol=0.86, peers_us={"flashmla": 518.7, "fa3": None}, rel_err=0.0021)
    assert report.line(row, document) == (
        "dense b=128 sq=1 h=128 len=8192 bf16 p64 simt | 430.0 us (p10 427.0, p90 436.0) | 2892 GB/s 65% of 4437 | "
        "679 TFLOPS 86% of 790 | AI 235, ridge 178: compute-bound, 86% of the limit | 1.21x flashmla | err 2.1e-03 | cold L2")


def test_legend_has_the_datasheet_beside_the_ceilings_and_doubts_what_passes_them(document):
    text = "\n".join(report.legend(change(document, ("device", "name"), "NVIDIA H200")))
    assert "read gbs 4437" in text and "datasheet of H200 SXM: read gbs 4800, bf16 matmul tflops 989.4" in text
    assert "over 100%" not in text
    text = "\n".join(report.legend(change(change(document, ("rows", 0, "sol"), 1.1), ("device", "name"), "AMD EPYC")))
    assert "datasheet" not in text and "over 100% of a limit" in text


def test_report_of_an_empty_run(document):
    assert "ceilings" in text_of(lambda console: report.print_report({**document, "rows": []}, console))


# Pictures.

def test_pictures_of_a_stored_result(tmp_path, document):
    plots = pytest.importorskip("perf.plots", reason="matplotlib comes with the extra perf")
    made = plots.plot_all(document, tmp_path, "sample")
    assert [path.name for path in made] == ["sample-roofline.png", "sample-bandwidth.png", "sample-tflops.png"]
    for path in made:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 20_000
    # One row has a place under the roof, but makes no line; without ceilings there is no roof.
    few = {**document, "rows": document["rows"][:1], "ceilings": dict.fromkeys(document["ceilings"])}
    assert [path.name for path in plots.plot_all(few, tmp_path, "few")] == ["few-roofline.png"]
    with pytest.raises(ValueError, match="no rows"):
        plots.plot_all({**document, "rows": []}, tmp_path, "none")


# explain.

def explained(*options, document=None):
    parser = argparse.ArgumentParser()
    explain.add_arguments(parser)
    case = explain.case_from(parser.parse_args(options))
    return text_of(lambda console: explain.explain(case, console, document), width=110)


def test_explain_by_hand():
    text = explained("--batch", "128", "--len", "4096", "--heads", "128")
    # 128 x 4096 x 1152 B; over 4437 GB/s and 790 TFLOPS.
    assert "603.98" in text
    assert "146.03 GFLOP: 228.3 FLOP per byte" in text
    measured_h200 = next(line for line in text.splitlines() if line.startswith("H200, measured")).split()
    assert measured_h200[2:9] == ["4437", "790", "178", "144.2", "184.8", "184.8", "com"]
    assert "256 row tiles, 1.94 waves" in text


def test_explain_takes_cases_of_the_grid():
    text = explained("mooncake_32_h128")
    assert "counted per request" in text
    with pytest.raises(ValueError, match="no case"):
        explained("nonesuch")


@pytest.mark.parametrize(("options", "message"), [(["--heads", "6", "--kv-heads", "4"], "--heads is 6"),
                                                  (["--queries", "0"], "--queries is 0"), (["--len", "-5"], "a request has -5 tokens"),
                                                  (["--lens", "7,3000000000"], "a request has 3000000000 tokens")])
def test_explain_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        explained(*options)


def test_explain_takes_a_measured_time_apart(document):
    row = document["rows"][0]
    case = Case("", tuple(row["seq_lens"]), row["seq_len_q"], row["num_heads_q"])
    found = explain.parts(case, row, document)
    assert sum(part.us for part in found) == pytest.approx(row["ours_us"])
    by_name = {part.name: part.us for part in found}
    assert by_name["merge"] == row["kernel_us"]["merge_us"]
    assert by_name["launch"] == document["ceilings"]["launch_us"]
    assert by_name["floor"] == pytest.approx(row["sol"] * row["ours_us"], rel=1e-3)
    options = ["--batch", str(row["batch"]), "--len", str(row["seq_lens"][0]), "--heads", str(row["num_heads_q"]), "--queries",
               str(row["seq_len_q"])]
    row.update(host_us=12.5, compile_s=2.0)
    text = explained(*options, document=document)
    assert f"where {row['ours_us']:.1f} us go" in text
    assert re.search(r"^host +12\.5 ", text, re.MULTILINE) and re.search(r"^first call +2000000\.0 ", text, re.MULTILINE)
    with pytest.raises(ValueError, match="no row of this case"):
        explained("--len", "77", document=document)


def test_full_row_tiles_cost_only_where_compute_binds(document):
    document["rows"][0].update(batch=1, seq_lens=[65536], seq_len_q=1, num_heads_q=80)
    parts = {part.name: part.us for part in explain.parts(Case("", (65536,), num_heads_q=80), document["rows"][0], document)}
    # 80 rows are computed as 128: compute-bound then, and memory-bound on paper.
    flops, kv_bytes = 2 * 1088 * 80 * 65536, 65536 * 1152 + 80 * (1088 * 2 + 4)
    assert parts["floor"] == pytest.approx(kv_bytes / 4437e3)
    assert parts["row tiles not full"] == pytest.approx(flops * 1.6 / 790e6 - kv_bytes / 4437e3)


@pytest.mark.parametrize("seq_lens", [(0,), (4096,) * 5, (17, 0, 90000, 3, 640), (64,) * 300])
def test_workers_walk_all_blocks(seq_lens):
    config = ScheduleConfig(rows_per_job=64, block_n=64, num_workers=7, overhead_blocks=2, min_split_blocks=2)
    shape = DecodeShape(len(seq_lens), 1, len(seq_lens), 128, 1, 576, 512, 64, "bfloat16", True, False)
    schedule = make_host_schedule(config, shape, np.array(seq_lens), None)
    walked = explain.worker_blocks(schedule)
    assert walked.min() >= 0
    assert walked.sum() == schedule.jobs[:, JOB_NUM_BLOCKS].sum()


def test_cut_of_equal_requests():
    # 3 requests x 2 row tiles on 4 SMs: whole, two SMs take two tiles of 10 blocks each.
    found = explain.cut(Case("", (640,) * 3), num_sms=4)
    assert (found.num_jobs, found.waves) == (6, 1.5)
    assert found.whole_balance == 20 / 15
    assert 1 <= found.split_balance < found.whole_balance
    assert found.split_pieces > 0
    # One worker asked for on two SMs leaves one idle.
    assert explain.cut(Case("", (640,), num_heads_q=64, num_workers=1), num_sms=2).split_balance == 2


# The checkers' shapes.

def test_sanitized_shapes_are_right_on_the_cpu(capsys):
    sanitize.decode_all("cpu")
    assert capsys.readouterr().out.count("of the bound") == len(sanitize.shapes())


def test_sanitize_without_the_checker(monkeypatch, capsys):
    monkeypatch.setattr(sanitize.shutil, "which", lambda *_, **__: None)
    assert sanitize.main([]) == 2
    assert "not on PATH" in capsys.readouterr().err


@pytest.mark.parametrize(("codes", "status"), [((0, 0, 0), 0), ((0, 1, 0), 1)])
def test_sanitize_runs_every_tool(monkeypatch, capsys, codes, status):
    ran = []

    def run(command, **_):
        ran.append(command)
        return argparse.Namespace(returncode=codes[len(ran) - 1])

    monkeypatch.setattr(sanitize.shutil, "which", lambda *_, **__: "/opt/compute-sanitizer")
    monkeypatch.setattr(sanitize.subprocess, "run", run)
    assert sanitize.main(["--backend", "simt"]) == status
    assert [command[2] for command in ran] == list(sanitize.TOOLS)
    assert all(command[:1] == ["/opt/compute-sanitizer"] and "kns=mla_numba" in command for command in ran)
    assert ("racecheck" in capsys.readouterr().out.splitlines()[-1]) or status == 0


def test_sample_says_that_it_is_one():
    assert "invented" in json.loads(SAMPLE.read_text())["device"]["note"]


def test_runs_on_an_h200_compare_as_they_should():
    """Two runs of one suite; and one with simt told of 125 SMs instead of 132, which makes it 5% slower, one small batch by half."""
    first, second, slowed = (results.load(RESULTS / f"h200_quick_{name}.json") for name in ("1", "2", "slow"))
    assert compare.compare(first, second).verdict == "no change"
    comparison = compare.compare(first, slowed)
    assert comparison.verdict == "slower" and comparison.peers["flashmla"].verdict == "no change"


def test_stored_results_keep_the_schema():
    stored = sorted(RESULTS.glob("*.json"))
    assert stored
    for path in stored:
        results.validate(results.load(path))


def test_stored_results_say_where_they_were_measured():
    for path in RESULTS.glob("h200_*.json"):
        document = results.load(path)
        device = document["device"]
        assert document["commit"] and device["sms"] and device["driver"] and device["power_limit_w"]
        assert all(device[when][name] for when in ("before", "after") for name in ("sm_mhz", "power_w"))
