"""The house rules: which way imports point, how long a cell may be, lint."""
import ast
import subprocess
import sys

import numpy as np
import pytest
from chapters import NOTEBOOKS, ROOT, cells, modules

LAZY = {"pandas", "sklearn", "matplotlib", "scipy", "tqdm", "fairret", "folktables", "IPython", "ipywidgets", "joblib",
        "distributed"}
ALGORITHMS = range(5, 19)


def imports(path):
    "(level, module) of every import, and whether it stands at the top of the module"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((0, a.name, top) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [a.name for a in node.names]
            yield from ((node.level, name, top) for name in names)


def ours(path):
    "The modules of hctrain that a module imports"
    for level, name, _ in imports(path):
        if level:
            yield name.split(".")[0]
        elif name.split(".")[0] == "hctrain":
            yield name.removeprefix("hctrain").lstrip(".").split(".")[0]


@pytest.mark.parametrize("name", modules())
def test_arrows(name):
    "A module imports smaller numbers only, and an algorithm no other algorithm"
    number = modules()
    for other in ours(ROOT / f"hctrain/{name}.py"):
        assert other in number, f"{name} imports {other!r}: name a module, as in `from hctrain.sampling import Batch`"
        assert number[other] < number[name], f"{name} ({number[name]}) imports {other} ({number[other]})"
        assert not {number[other], number[name]} <= set(ALGORITHMS), f"algorithm {name} imports algorithm {other}"


@pytest.mark.parametrize("name", modules())
def test_third_parties(name):
    "torch, numpy and the standard library at the top of a module; what the experiment needs, inside functions"
    for level, other, top in imports(ROOT / f"hctrain/{name}.py"):
        other = other.split(".")[0]
        if not level and other not in {"hctrain", "torch", "numpy"} | sys.stdlib_module_names:
            assert other in LAZY, f"{name} imports {other}, which is no dependency"
            assert not top or (name, other) == ("plotting", "matplotlib"), f"{name} imports {other} outside a function"


def test_numbers_differ():
    numbers = [p.stem.split("_")[0] for p in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers)


def test_exported_cells_are_short():
    lengths = {c.name: c.lines for p in NOTEBOOKS for c in cells(p) if c.exported}
    if lengths:
        longest = max(lengths, key=lengths.get)
        assert lengths[longest] <= 60, f"{longest} has {lengths[longest]} lines, of 60"
        p90 = np.quantile(list(lengths.values()), 0.9)
        worst = {k: v for k, v in lengths.items() if v > 25}
        assert p90 <= 25, f"one exported cell in ten has more than {p90:.0f} lines, of 25: {worst}"


def test_lint():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--output-format=concise"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
