"""What the documents say can be done: snippets run, links and paths lead somewhere, commands exist, the demo prints what README quotes."""

import importlib.util
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from mla_numba import demo
from reference.mla import mla_decode_ref
from verify.tolerances import float64_error

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [path.relative_to(ROOT) for pattern in ("*.md", "docs/*.md", "*/README.md", "mla_numba/data/README.md")
             for path in sorted(ROOT.glob(pattern))]
SNIPPETS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
SMALL = ["--lens", "65,0,3,64", "--heads", "4", "--page-size", "16"]

pytestmark = pytest.mark.l0


def has_gpu(library: str) -> bool:
    module = pytest.importorskip(library)
    return module.cuda.is_available()


@pytest.mark.parametrize("source", [pytest.param(text, id=text.partition("\n")[0]) for text in SNIPPETS])
def test_readme_snippet_runs(source):
    if "import cupy" in source and not has_gpu("cupy"):
        pytest.skip("CuPy needs a GPU")
    if "import torch" in source and not has_gpu("torch"):
        source = source.replace('device = "cuda"', 'device = "cpu"')
    exec(compile(source, "README.md", "exec"), {})


def test_readme_has_a_snippet_per_library():
    assert [re.search(r"import (cupy|torch)|flash_mla|numpy", text).group() for text in SNIPPETS] == [
        "numpy", "import cupy", "import torch", "numpy"]
    assert "from mla_numba import flash_mla" in SNIPPETS[-1]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example_runs(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_and_paths_lead_somewhere(document):
    text = (ROOT / document).read_text()
    links = [ROOT / document.parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
    paths = [ROOT / path for path in re.findall(r"`((?:mla_numba|reference|verify|docs|examples)/[\w./-]*)`", text)]
    assert [path for path in links + paths if not path.exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_make_targets_exist(document):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z]+)", (ROOT / document).read_text(), re.MULTILINE)) <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_modules_run_with_m_exist(document):
    modules = set(re.findall(r"python -m ([a-z_.]+)", (ROOT / document).read_text()))
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def headings(text: str) -> list[str]:
    """First word of each line that does not go on from the one before, after the first line."""
    return [line.split()[0] for line in text.splitlines()[1:] if line and not line.startswith(" ")]


def test_demo_prints_what_readme_quotes(capsys):
    # As where there is no GPU, on whatever machine this is.
    assert demo.main([*SMALL, "--backend", "cpu"]) == 0
    printed = capsys.readouterr().out
    quoted = re.search(r"<!-- demo -->\n```text\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL).group(1)
    assert headings(printed) == headings(quoted)
    assert len(quoted.splitlines()) <= 40


@pytest.mark.parametrize("options", [["--seq-len-q", "3"], ["--dtype", "float16"], ["--dtype", "float32"]], ids=" ".join)
def test_demo_options(options, capsys):
    assert demo.main([*SMALL, *options]) == 0
    assert "right: " in capsys.readouterr().out


def test_demo_takes_a_backend_that_can_run_the_call(capsys, monkeypatch):
    """Not the first one of the machine."""
    monkeypatch.setattr("mla_numba.dispatch.unavailable", lambda name, device=None: ["not today"] if name == "simt" else [])
    assert demo.main([*SMALL, "--dtype", "float32"]) == 0
    assert "a decode on cpu" in capsys.readouterr().out


def test_demo_says_so_when_the_result_is_wrong(capsys, monkeypatch):
    right = demo.mla_decode

    def wrong(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        out[0] = out[1]
        return out, lse

    monkeypatch.setattr(demo, "mla_decode", wrong)
    assert demo.main([*SMALL, "--backend", "cpu"]) == 1
    assert "WRONG: " in capsys.readouterr().out


def test_demo_says_why_it_cannot_run(capsys, monkeypatch):
    monkeypatch.setattr("mla_numba.dispatch.unavailable", lambda name, device=None: [f"no {name} today"])
    assert demo.main([*SMALL, "--backend", "hopper"]) == 2
    assert "backend='hopper' cannot run this call: hopper: no hopper today" in capsys.readouterr().err
    monkeypatch.setattr(np, "__version__", "2.5.1")
    assert demo.main(SMALL) == 2
    assert "NumPy is 2.5.1, but must be 2.2 to 2.4" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--lens", "5,x"], ["--lens", "99999999999"], ["--lens", "5,-1"], ["--heads", "0"], ["--seed=-1"]],
                         ids=" ".join)
def test_demo_refuses_numbers_that_cannot_be(options, capsys):
    with pytest.raises(SystemExit):
        demo.main(options)
    assert re.search(r"argument --\w+: '.+' must be an integer from [01] to 2147483647", capsys.readouterr().err)


def test_demo_lists_the_batches(capsys):
    assert demo.main(["--list"]) == 0
    assert capsys.readouterr().out.count("requests of") == len(demo.load_batches()) == 9


@pytest.mark.parametrize("seq_len_q", [1, 3])
@pytest.mark.parametrize("seq_len", [0, 1, 2, 65])
def test_float64_of_the_demo_is_the_reference(seq_len, seq_len_q):
    rng = np.random.default_rng(0)
    q, kv = rng.standard_normal((seq_len_q, 2, 576)), rng.standard_normal((seq_len, 576))
    pages = np.arange(max(seq_len, 1), dtype=np.int32)[None]
    cache = kv.reshape(seq_len, 1, 1, 576)
    right, right_lse = mla_decode_ref(q[None], cache, pages, np.array([seq_len]))
    out, lse = demo.float64_rows(q, kv)
    np.testing.assert_allclose(out, right[0], rtol=float64_error(8000), atol=float64_error(8000))
    np.testing.assert_allclose(lse, right_lse[0], rtol=float64_error(8000), atol=float64_error(8000))


@pytest.mark.parametrize("page_size", [16, 48, 64, 1024])
def test_requests_of_the_demo_share_whole_prefix_blocks(page_size):
    batch = demo.Batch("two", "", [1100, 1030], [[7, 8, 9], [7, 8]], 512)
    table, num_pages = demo._block_table(batch, page_size, np.random.default_rng(0))
    columns = [-(-length // page_size) for length in batch.seq_lens]
    common = 1024 // page_size
    assert (table[0, :common] == table[1, :common]).all()
    assert len(set(table[0, :columns[0]]) | set(table[1, :columns[1]])) == num_pages == sum(columns) - common
    assert (table[1, columns[1]:] == demo.POISON_PAGE).all()
