"""What `pip install .` installs: mla_numba alone, whole, and of the version that it says."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import mla_numba

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.l0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel built from a copy of the tree, by the setuptools that is installed (pyproject.toml names its least version)."""
    pytest.importorskip("setuptools", minversion="77")
    tree, target = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("mla_numba", "reference", "verify"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    script = f"from setuptools import build_meta; build_meta.build_wheel({str(target)!r})"
    done = subprocess.run([sys.executable, "-c", script], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(target.glob("*.whl"))) as archive:
        yield archive


def test_wheel_holds_mla_numba_alone_and_whole(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    in_tree = {str(path.relative_to(ROOT)) for path in (ROOT / "mla_numba").rglob("*")
               if path.is_file() and "__pycache__" not in path.parts}
    assert packed == in_tree
    assert {"mla_numba/py.typed", "mla_numba/data/serving_batches.json", "mla_numba/data/README.md"} <= packed


def test_metadata(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Version"] == mla_numba.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"cu12", "cu13", "test", "perf", "dev"}
    needs = {re.split(r"[^\w-]", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert needs == {"numba", "numba-cuda", "numpy", "ml_dtypes", "scipy"}


def test_changelog_has_the_version():
    assert f"\n## [{mla_numba.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
