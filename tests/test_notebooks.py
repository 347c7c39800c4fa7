"""The notebooks run, their modules match them, and they are clean."""
import ast
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbdev.test
import pytest
import torch
from chapters import NOTEBOOKS, ROOT, cells, module
from nbdev.clean import clean_nb

CHECKS = re.compile(r"\bassert|\btest_\w+\(|\bcheck_\w+\(|\bexpect_fail\(|\bshow_doc\(")
PLACES = re.compile(r"(?<![\w/.])(?:/home/|/root/|/tmp/|/work/|/Users/|/var/folders/|[A-Z]:\\)[^\s'\"]*|ipykernel_\d+")
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


@pytest.fixture(autouse=True)
def as_new():
    "What notebooks in one process could hand to each other"
    yield
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if plt := sys.modules.get("matplotlib.pyplot"):
        plt.close("all")
        plt.rcdefaults()


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
    assert path.stat().st_size < 400_000, "a notebook is smaller than 400 kB: draw figures at a lower dpi"


@by_name
def test_outputs(path):
    "No error, no warning and no place of somebody's machine was stored"
    for c in cells(path):
        for o in c.outputs:
            assert o["output_type"] != "error", f"{c.name} failed when it was stored"
            data = o.get("data", {})
            parts = [o.get("text", "")] + [v for k, v in data.items() if k.startswith("text/")]
            shown = "".join("".join(p) for p in parts)
            assert not (m := PLACES.search(shown)), f"{c.name} stores {m[0]!r}"
            assert "Warning: " not in shown, f"{c.name} stores a warning"


@by_name
def test_cells_teach(path):
    "A shown cell has a stored output or an assertion, be it in a helper; imports and exported cells need neither"
    code = [c for c in cells(path) if c.kind == "code"]
    functions = [n for c in code for n in c.tree if isinstance(n, ast.FunctionDef)]
    helpers = {f.name for f in functions if CHECKS.search(ast.unparse(f))}
    silent = []
    for c in code:
        calls = [n.func for n in ast.walk(ast.Module(c.tree, [])) if isinstance(n, ast.Call)]
        called = {f.id for f in calls if isinstance(f, ast.Name)}
        imports_only = all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in c.tree)
        if not (c.hidden or c.exported or imports_only or c.outputs or CHECKS.search(c.code) or called & helpers):
            silent.append(f"{c.name} shows nothing and asserts nothing:\n{c.code}")
    assert not silent, "\n".join(silent)


@by_name
def test_imports_stand_alone(path):
    "nbdev runs imports and exported cells alone when it makes the documentation"
    for c in cells(path):
        if c.kind == "code":
            kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in c.tree}
            assert len(kinds) < 2, f"{c.name} holds imports and other code:\n{c.code}"


@by_name
def test_annotations_stay_as_written(path):
    if module(path):
        first = next(c for c in cells(path) if c.exported)
        assert first.code.startswith("from __future__ import annotations"), f"{first.name}, the first exported one"


def test_modules_match_notebooks(tmp_path):
    for name in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path / "hctrain").mkdir()
    shutil.copy(ROOT / "hctrain/__init__.py", tmp_path / "hctrain")  # written by hand, but for the version
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, env=env, check=True)

    def tree(d):
        return {p.relative_to(d).as_posix(): p.read_text(encoding="utf-8") for p in (d / "hctrain").rglob("*.py")}
    new, old = tree(tmp_path), tree(ROOT)
    assert new.keys() == old.keys(), "a module without a notebook, or the other way round: run nbdev_export"
    assert not [name for name in new if new[name] != old[name]], "run nbdev_export"
