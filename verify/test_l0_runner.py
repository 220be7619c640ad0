"""`python -m verify` itself: what it says, and its exit status, on targets that are right, wrong, refusing, crashing and flaky."""

import itertools
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from reference import mla_decode_emulated
from verify import runner, suite
from verify.__main__ import main, verdict
from verify.cases import Inputs, MLACase
from verify.properties import PROPERTIES
from verify.targets import external, to_kind

pytestmark = pytest.mark.l0

CALLS = itertools.count()


def right(q, kv_cache, block_table, seq_lens, head_dim_v, softmax_scale, causal):
    """An honest decode with the seven arguments and no knobs."""
    out, lse = mla_decode_emulated(q, kv_cache, block_table, seq_lens, dtype=str(q.dtype), head_dim_v=head_dim_v,
                                   softmax_scale=softmax_scale, causal=causal)
    return out.astype(q.dtype), lse


def wrong(*arguments):
    out, lse = right(*arguments)
    return out, lse + np.float32(0.01)


def misshapen(*arguments):
    out, lse = right(*arguments)
    return out, lse.swapaxes(1, 2)[..., None]


def crashing(q, *arguments):
    if q.shape[2] > 1:
        raise RuntimeError("more than one head")
    return right(q, *arguments)


def choosy(q, *arguments):
    if q.dtype != ml_dtypes.bfloat16:
        raise NotImplementedError("bfloat16 only")
    return right(q, *arguments)


def refusing(*arguments):
    raise NotImplementedError("nothing at all")


def racing(*arguments):
    out, lse = right(*arguments)
    return out, lse if next(CALLS) % 5 else lse * np.float32(1 + 1e-6)


def minus_inf(*arguments):
    out, lse = right(*arguments)
    return out, np.where(np.isinf(lse), np.float32(-np.inf), lse)


def verify(name: str, *options: str) -> int:
    return main(["--target", f"verify.test_l0_runner:{name}", "--profile", "quick", "--dims", "small", *options])


def test_a_right_target_passes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert verify("right", "--json", str(file)) == 0
    report = json.loads(file.read_text())
    assert report["holds"] and report["seed"] == 0 and report["machine"]
    by_name = {row["property"]: row for row in report["results"]}
    assert by_name.keys() == PROPERTIES.keys()
    assert by_name["equals_float64"]["status"] == "passed" and 0 < by_name["equals_float64"]["worst"] <= 1
    assert by_name["batch_invariant"]["status"] == "not applicable" and by_name["batch_invariant"]["cases"] == 0
    text = capsys.readouterr().out
    assert "all properties hold" in text and "not applicable" in text


def test_processes_share_the_properties(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows in the same order, drawn in parts. (What Hypothesis draws depends on the modules that a process has loaded, too.)"""
    monkeypatch.setattr(suite, "PART_EXAMPLES", 15)
    before = os.environ.get("NUMBA_NUM_THREADS")
    some = [option for name in ("equals_float64", "poison", "batch_invariant") for option in ("--property", name)]
    rows = []
    for jobs in ("1", "2"):
        assert verify("right", *some, "--jobs", jobs, "--json", str(tmp_path / jobs)) == 0
        report = json.loads((tmp_path / jobs).read_text())
        rows.append([{key: value for key, value in row.items() if key not in ("seconds", "worst")} for row in report["results"]])
    assert rows[0] == rows[1] and [row["cases"] for row in rows[0]] == [120, 40, 0]
    # As a program, whose __main__ its processes do not have.
    program = [sys.executable, "-m", "verify", "--target", "verify.test_l0_runner:right", "--profile", "quick", "--dims", "small"]
    assert subprocess.run([*program, *some, "--jobs", "2"], cwd=Path(__file__).parents[1], check=False, capture_output=True).returncode == 0
    assert verify("wrong", *some, "--jobs", "2") == 1
    assert "FAILED verify.test_l0_runner:wrong equals_float64" in capsys.readouterr().out
    assert os.environ.get("NUMBA_NUM_THREADS") == before, "Numba refuses to compile after such a change"


def test_a_row_is_cut_into_parts_of_other_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    target, prop = external("verify.test_l0_runner:right"), PROPERTIES["poison"]
    parts = suite.parts_of([target], [(target, "small", prop, 3000), (target, "small", prop, 1)])
    assert [part.examples for part in parts] == [200] * 15 + [1] and [part.row for part in parts] == [0] * 15 + [1]
    seeds = []
    monkeypatch.setattr(runner, "run_property", lambda *args, seed, **kwargs: seeds.append(seed))
    for part in parts[:15]:
        part.run(SimpleNamespace(seed=7, profile="deep"), [target])
    assert seeds[0] == 7 and len(set(seeds)) == 15


def test_parts_together_fail_if_one_fails() -> None:
    done = [runner.Result("t", "small", "p", "passed", 20, 1, 0.5, 2.0), runner.Result("t", "small", "p", "refused", 0, 30, 0.0, 1.0)]
    assert runner.together(done[::-1]) == runner.Result("t", "small", "p", "passed", 20, 31, 0.5, 3.0)
    failed = runner.Result("t", "small", "p", "failed", 3, 0, 0.7, 1.0, "message", "case")
    assert runner.together([*done, failed]) == runner.Result("t", "small", "p", "failed", 23, 31, 0.7, 4.0, "message", "case")


@pytest.mark.parametrize("name", ["wrong", "misshapen", "crashing", "racing"])
def test_a_bad_target_fails_and_its_reproducer_replays(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    prop = "reruns" if name == "racing" else "equals_float64"
    assert verify(name, "--property", prop) == 1
    text = capsys.readouterr().out
    assert f"FAILED verify.test_l0_runner:{name} {prop}" in text
    command = next(line for line in text.splitlines() if line.strip().startswith("python -m verify"))
    if name != "racing":
        assert main(shlex.split(command)[3:]) == 1


def test_failures_are_made_smaller() -> None:
    target = external("verify.test_l0_runner:crashing", dims=("small",))
    result = runner.run_property(target, PROPERTIES["equals_float64"], "small", examples=40, seed=0, shrink_s=20)
    assert result.status == "failed" and "RuntimeError: more than one head" in result.message
    assert MLACase.parse(result.case) == MLACase(seq_lens=(0,), num_heads_q=2, head_dim_qk=24, head_dim_v=16, page_size=4, causal=False,
                                                spare_pages=0)


def test_refused_cases_are_counted_and_a_target_must_run_some(capsys: pytest.CaptureFixture[str]) -> None:
    target = external("verify.test_l0_runner:choosy", dims=("small",))
    result = runner.run_property(target, PROPERTIES["equals_float64"], "small", examples=40, seed=0)
    assert result.status == "passed" and result.cases >= 10 and result.refused >= 10
    assert verify("refusing", "--property", "equals_float64") == 1
    assert "a target ran no case at all" in capsys.readouterr().out


def test_the_verdict_tells_what_was_not_seen() -> None:
    passed, refused, failed = (runner.Result("t", "small", "p", status, cases, 9) for status, cases in
                               (("passed", 5), ("refused", 0), ("failed", 1)))
    assert verdict([passed, passed]) == "all properties hold"
    assert verdict([passed, refused]) == "nothing failed, but of 1 of 2 every case was refused"
    assert verdict([refused]) == "a target ran no case at all"
    assert verdict([passed, refused, failed]) == "1 of 3 failed"


def test_the_other_sentinel_can_be_asked_for() -> None:
    assert verify("minus_inf", "--property", "empty_rows") == 1
    assert verify("minus_inf", "--empty-lse=-inf", "--property", "empty_rows", "--property", "equals_float64",
                  "--property", "merge_of_halves") == 0


@pytest.mark.parametrize(("arguments", "says"), [
    (["--target", "verify.test_l0_runner"], "must be of the form pkg.module:callable"),
    (["--target", "no_such_module:f"], "No module named 'no_such_module'"),
    (["--target", "verify.test_l0_runner:nobody"], "has no attribute 'nobody'"),
    (["--target", "math:pi"], "is 3.14"),
    (["--target", "verify.test_l0_runner:right", "--json", "/no/such/folder/file.json"], "No such file or directory"),
    (["--target", "verify.test_l0_runner:right", "--property", "nothing"], "--property nothing must be of"),
    (["--target", "verify.test_l0_runner:right", "--replay", "MLACase("], "is not a case like"),
    (["--backend", "tpu"], "tpu"),
])
def test_wrong_arguments_say_what_is_wrong(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert says in capsys.readouterr().out.replace("\n", " ")


def test_torch_arrays_keep_their_strides() -> None:
    torch = pytest.importorskip("torch")
    inputs = MLACase(seq_lens=(5, 9), num_heads_q=4, head_dim_qk=24, head_dim_v=16, page_size=4, layout="unaligned").build()
    moved = to_kind(inputs.kv_cache, "torch")
    assert moved.dtype is torch.bfloat16
    assert [stride * 2 for stride in moved.stride()] == list(inputs.kv_cache.strides)
    assert np.array_equal(moved.float().cpu().numpy(), inputs.kv_cache.astype(np.float32), equal_nan=True)


def test_taking_requests_takes_their_rows() -> None:
    for case in (MLACase(seq_lens=(5, 9, 0), seq_len_q=2, head_dim_qk=24, head_dim_v=16),
                 MLACase(seq_lens=(5, 9, 0), q_lens=(3, 0, 2), head_dim_qk=24, head_dim_v=16)):
        inputs: Inputs = case.build()
        taken = inputs.take([2, 0, 2])
        assert taken.seq_lens.tolist() == [0, 5, 0]
        assert np.array_equal(taken.flat_q, inputs.flat_q[inputs.taken_rows([2, 0, 2])])
        assert math.prod(taken.lse_shape) == len(taken.flat_q)
