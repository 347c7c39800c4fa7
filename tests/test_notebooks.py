"""The notebooks run, their modules match them, and they are clean."""
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbdev.test
import pytest
from nbdev.clean import clean_nb

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


@by_name
def test_runs(path, request, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")  # nbdev sets it and leaves it set; nbdev_export does nothing under it
    monkeypatch.setattr(sys, "path", sys.path[:])
    slow = request.config.getoption("--slow")
    ok, _ = nbdev.test.test_nb(path, skip_flags=["slow"], force_flags=["slow"] if slow else [], basepath=ROOT)
    assert ok, f"{path.name} failed, see the captured stderr below"


@by_name
def test_clean(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    cleaned = copy.deepcopy(nb)
    clean_nb(cleaned)
    assert cleaned == nb, "run nbdev_clean"
    assert not [o for c in nb["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert str(ROOT) not in path.read_text(encoding="utf-8") and "/home/" not in path.read_text(encoding="utf-8")


def test_modules_match_notebooks(tmp_path):
    for name in ("settings.ini", "setup.py", "nbs"):
        src = ROOT / name
        shutil.copytree(src, tmp_path / name) if src.is_dir() else shutil.copy(src, tmp_path)
    nbdev_export = Path(sys.executable).parent / "nbdev_export"
    subprocess.run([nbdev_export], cwd=tmp_path, check=True)

    def tree(d):
        return {p.relative_to(d).as_posix(): p.read_text(encoding="utf-8") for p in (d / "hctrain").rglob("*.py")}
    assert tree(tmp_path) == tree(ROOT), "run nbdev_export"
