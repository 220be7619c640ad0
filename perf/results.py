"""The file of a measurement, perf/results/NAME.json: one run, its machine, and a row per case and backend. Checked on every write.

A row is added by replacing the file as a whole, so that a run which is killed leaves all the rows it had measured.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Results = dict[str, Any]
Row = dict[str, Any]
Check = Callable[[Any, str], None]


def _refuse(path: str, value: Any, need: str) -> None:
    text = repr(value)
    raise ValueError(f"{path or 'the document'} is {text if len(text) < 60 else text[:57] + '...'}, but must be {need}")


def _of(need: str, accepts: Callable[[Any], bool]) -> Check:
    def check(value: Any, path: str) -> None:
        if not accepts(value):
            _refuse(path, value, need)
    return check


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


TEXT = _of("text", lambda value: isinstance(value, str) and value != "")
FLAG = _of("true or false", lambda value: isinstance(value, bool))
COUNT = _of("an integer from 1", lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1)
LENGTH = _of("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool))
NUMBER = _of("a number from 0", lambda value: _is_number(value) and value >= 0)
TIME = _of("a number above 0", lambda value: _is_number(value) and value > 0)
ANYTHING = _of("JSON", lambda value: value is None or isinstance(value, bool | int | float | str | list | dict))


def _or_null(check: Check) -> Check:
    return lambda value, path: None if value is None else check(value, path)


def _one_of(*values: str) -> Check:
    return _of(" or ".join(values), lambda value: value in values)


def _list_of(check: Check) -> Check:
    def check_list(value: Any, path: str) -> None:
        if not isinstance(value, list):
            _refuse(path, value, "a list")
        for i, item in enumerate(value):
            check(item, f"{path}[{i}]")
    return check_list


def _object(keys: dict[str, Check], optional: dict[str, Check] | None = None, others: Check | None = None) -> Check:
    """`keys` must be there, `optional` may; any other key is checked by `others`, or refused."""
    known = {**keys, **(optional or {})}

    def check_object(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            _refuse(path, value, "an object")
        prefix = f"{path}." if path else ""
        for name in keys:
            if name not in value:
                raise ValueError(f"{prefix}{name} is missing")
        for name, item in value.items():
            check = known.get(name, others)
            if check is None:
                raise ValueError(f"{prefix}{name} is not a key that a results file has")
            check(item, prefix + name)
    return check_object


_BY_PEER = _object({}, others=_or_null(TIME))

ROW = _object({
    "case": TEXT, "suite": TEXT, "kernel": _one_of("dense_decode"), "backend": TEXT,
    "batch": COUNT, "seq_len_q": COUNT, "num_heads_q": COUNT, "seq_len_k_mean": NUMBER, "seq_lens": _list_of(LENGTH), "varlen": FLAG,
    "causal": FLAG, "page_size": COUNT, "dtype": _one_of("bfloat16", "float16", "float32"),
    "ours_us": TIME, "ours_us_p10": TIME, "ours_us_p90": TIME, "samples_us": _list_of(TIME), "host_us": _or_null(NUMBER),
    "tflops": NUMBER, "gbs": NUMBER, "bound": _one_of("memory", "compute"), "sol": NUMBER, "rel_err": _or_null(NUMBER),
    "peers_us": _BY_PEER,
}, optional={
    "num_workers": _or_null(COUNT), "compile_s": _or_null(NUMBER),
    # Each kernel by itself, and the call that makes its own plan; `ours_us` is that of a call with a plan.
    "kernel_us": _object({}, dict.fromkeys(("plan_us", "decode_us", "merge_us", "unplanned_us"), _or_null(NUMBER))),
    "peers_us_p10": _BY_PEER, "peers_us_p90": _BY_PEER, "peers_host_us": _BY_PEER, "peers_rel_err": _object({}, others=_or_null(NUMBER)),
    "peers_version": _object({}, others=_or_null(TEXT)), "peers_note": _object({}, others=_or_null(TEXT)),
})

DOCUMENT = _object({
    "device": _object({"name": TEXT, "sms": _or_null(COUNT), "driver": _or_null(TEXT)}, others=ANYTHING),
    "versions": _object({}, others=_or_null(TEXT)),
    "commit": _or_null(TEXT),
    "date": TEXT,
    "ceilings": _object({"read_gbs": _or_null(TIME), "copy_gbs": _or_null(TIME), "bf16_matmul_tflops": _or_null(TIME)},
                        others=_or_null(NUMBER)),
    "rows": _list_of(ROW),
})


def validate(document: Results) -> None:
    """Raise ValueError, naming the path of the key, where `document` is not what a results file holds."""
    DOCUMENT(document, "")
    for i, row in enumerate(document["rows"]):
        if len(row["seq_lens"]) != row["batch"]:
            raise ValueError(f"rows[{i}].seq_lens has {len(row['seq_lens'])} lengths, but rows[{i}].batch is {row['batch']}")
        if not row["ours_us_p10"] <= row["ours_us"] <= row["ours_us_p90"]:
            raise ValueError(f"rows[{i}].ours_us is {row['ours_us']}, but must lie between ours_us_p10 and ours_us_p90")


def limits(document: Results) -> tuple[float | None, float | None]:
    """Measured GB/s of reading, and TFLOPS of a matmul: bfloat16, or float32 where that is what the machine has (a CPU)."""
    ceilings = document["ceilings"]
    return ceilings["read_gbs"], ceilings["bf16_matmul_tflops"] or ceilings.get("f32_matmul_tflops")


def load(path: str | Path) -> Results:
    """Read and check a results file."""
    try:
        document = json.loads(Path(path).read_text())
        validate(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return document


def write(path: str | Path, document: Results) -> None:
    """Check `document` and put it in place of the file, in one step. A row is a line, so that a diff shows rows."""
    validate(document)
    head = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in document.items() if name != "rows"]
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in document["rows"])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("{\n" + ",\n".join([*head, f'"rows": [\n{rows}\n]']) + "\n}\n")
    os.replace(partial, path)


def append(path: str | Path, row: Row) -> None:
    """Add a row to a file that `write` made."""
    document = load(path)
    document["rows"].append(row)
    write(path, document)
