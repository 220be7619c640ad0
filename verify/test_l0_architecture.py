"""Imports point one way, and what is foreign stays in its folder (picture: docs/map.md). Planted sources show that the rules bite."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports from its own line and those above. A folder stands for all that is in it.
LAYERS = (
    ("contract", "errors", "scheduler"),
    ("dtypes", "config"),
    ("ptx",),
    ("kernels",),
    ("host",),
    ("validate", "arrays"),
    ("dispatch",),
    ("api",),
    ("flash_mla",),
    ("__init__",),
    ("demo",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
STDLIB_ONLY = ("contract", "errors", "scheduler", "config")
# Third-party packages, and the parts of mla_numba that may import each; None: all but STDLIB_ONLY.
THIRD_PARTY = {"numba": None, "numpy": None, "ml_dtypes": None, "scipy": None, "llvmlite": ("ptx",), "cuda": ("host",),
               "torch": ("arrays",), "cupy": ("arrays",)}
LAZY = ("torch", "cupy")
PRINTS = ("demo", "__main__")


def imports(tree: ast.Module, package: list[str]) -> Iterator[tuple[ast.stmt, str]]:
    """(statement, absolute name) of every import; `from a import b` gives a.b, as b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node, ".".join([*base, *([node.module] if node.module else []), alias.name])


def broken_rules(path: str, source: str) -> list[str]:
    """What the file at `path` (relative to the checkout) breaks."""
    tree = ast.parse(source)
    parts = list(Path(path).with_suffix("").parts)
    return [f"{path}:{node.lineno} {rule}" for node, rule in _broken(tree, parts)]


def _broken(tree: ast.Module, parts: list[str]) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    top, part = parts[0], parts[1]
    in_functions = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                    for inner in ast.walk(node)}
    for node, name in imports(tree, parts[:-1]):
        package, _, rest = name.partition(".")
        if package in sys.stdlib_module_names:
            continue
        if top == "reference":
            if package not in ("reference", "numpy"):
                yield node, f"reference imports {package}: NumPy and the standard library only"
        elif package == "mla_numba":
            target = rest.partition(".")[0]
            # A name that is no module is one of the package itself.
            level = LEVEL.get(target, LEVEL["__init__"])
            if level > LEVEL[part]:
                yield node, f"{part} imports {target}, which lies above it"
        elif package not in THIRD_PARTY:
            yield node, f"imports {package}: not a dependency of mla_numba"
        elif part in STDLIB_ONLY:
            yield node, f"imports {package}: {part} uses the standard library only"
        elif part not in (THIRD_PARTY[package] or LEVEL):
            yield node, f"imports {package}: only {', '.join(THIRD_PARTY[package] or ())} may"
        elif package in LAZY and id(node) not in in_functions:
            yield node, f"imports {package} when loaded: only functions may"
        elif name.endswith(".intrinsic") and part != "ptx":
            yield node, "imports intrinsic: only ptx may"
    if top == "mla_numba":
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                yield node, "asserts: raise an error that names the argument"
            elif isinstance(node, ast.Attribute) and node.attr == "intrinsic" and part != "ptx":
                yield node, "uses intrinsic: only ptx may"
            elif isinstance(node, ast.Name) and node.id == "print" and part not in PRINTS:
                yield node, f"prints: only {' and '.join(PRINTS)} may"


FILES = [str(path.relative_to(ROOT)) for folder in ("mla_numba", "reference") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.l0
@pytest.mark.parametrize("path", FILES)
def test_file_keeps_the_rules(path):
    assert broken_rules(path, (ROOT / path).read_text()) == []


@pytest.mark.l0
def test_every_part_has_a_layer():
    parts = {Path(path).with_suffix("").parts[1] for path in FILES if path.startswith("mla_numba")}
    assert parts <= set(LEVEL)


@pytest.mark.l0
@pytest.mark.parametrize(("path", "source", "rule"), [
    ("mla_numba/kernels/cpu.py", "from ..host import cpu", "kernels imports host, which lies above it"),
    ("mla_numba/host/cpu.py", "import mla_numba.api", "host imports api, which lies above it"),
    ("mla_numba/config.py", "def f():\n    from .arrays import view", "config imports arrays, which lies above it"),
    ("mla_numba/api.py", "from . import __version__", "api imports __version__, which lies above it"),
    ("mla_numba/__init__.py", "from . import demo", "__init__ imports demo, which lies above it"),
    ("mla_numba/scheduler.py", "import numpy as np", "scheduler uses the standard library only"),
    ("mla_numba/kernels/simt.py", "from llvmlite import ir", "imports llvmlite: only ptx may"),
    ("mla_numba/kernels/simt.py", "from numba.cuda.extending import intrinsic", "imports intrinsic: only ptx may"),
    ("mla_numba/host/simt.py", "from numba.cuda import extending\n@extending.intrinsic\ndef f(): ...", "uses intrinsic: only ptx may"),
    ("mla_numba/api.py", "from cuda.bindings import driver", "imports cuda: only host may"),
    ("mla_numba/arrays.py", "import torch", "imports torch when loaded"),
    ("mla_numba/api.py", "def f():\n    import torch", "imports torch: only arrays may"),
    ("mla_numba/dispatch.py", "def f():\n    import cupy as cp", "imports cupy: only arrays may"),
    ("mla_numba/api.py", "from reference.mla import softmax", "imports reference: not a dependency"),
    ("mla_numba/demo.py", "def f():\n    import verify", "imports verify: not a dependency"),
    ("mla_numba/demo.py", "import rich.progress", "imports rich: not a dependency"),
    ("mla_numba/validate.py", "assert True", "asserts"),
    ("mla_numba/host/cpu.py", "print('hello')", "prints"),
    ("reference/mla.py", "from mla_numba.contract import HEAD_DIM_V", "reference imports mla_numba"),
    ("reference/mla.py", "import ml_dtypes", "reference imports ml_dtypes"),
])
def test_rule_bites(path, source, rule):
    found = broken_rules(path, source)
    assert len(found) == 1
    assert rule in found[0]


@pytest.mark.l0
def test_every_test_has_a_level():
    """As CONTRIBUTING.md names them: by none of them is a test left out."""
    levels = "not l0 and not l1 and not l2 and not sim"
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", levels, "verify"]
    run = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "no tests collected" in run.stdout, run.stdout[-2000:]


@pytest.mark.l0
@pytest.mark.parametrize(("path", "source"), [
    ("mla_numba/ptx/mma.py", "from llvmlite import ir\nfrom numba.cuda.extending import intrinsic\nfrom ..contract import LOG2_E"),
    ("mla_numba/host/hopper.py", "from cuda.bindings import driver\nfrom ..kernels import hopper\nfrom .schedule import Schedule"),
    ("mla_numba/arrays.py", "def f():\n    import torch\n    import cupy"),
    ("mla_numba/__main__.py", "import sys\nfrom .demo import main\nprint(main)"),
    ("reference/mla.py", "import numpy as np\nfrom reference.paged import gather_tokens\nfrom . import rounding"),
])
def test_rule_lets_pass(path, source):
    assert broken_rules(path, source) == []
