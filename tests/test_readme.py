"""What README.md and CONTRIBUTING.md say can be done, can be done."""
import os
import re
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from chapters import ROOT

import hctrain
from hctrain import ConstrainedOptimizer

PAGES = pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_python_runs(tmp_path):
    "All Python of the README, in one go and from top to bottom"
    code = "\n".join(re.findall(r"^``` ?python\n(.*?)^```", read("README.md"), flags=re.M | re.S))
    script = tmp_path / "readme.py"
    script.write_text(code, encoding="utf-8")
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # small networks; more threads only wait for each other
    command = [sys.executable, "-W", "error", script]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, code + done.stderr


@PAGES
def test_make_targets_exist(name):
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), flags=re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", read(name), flags=re.M)) <= targets


@PAGES
def test_links(name):
    "Links to files of the repository; tests/test_site.py checks those of the site"
    for link in re.findall(r"\]\(([^)\s]+)\)", read(name)) + re.findall(r'(?:src|href)="([^"]+)"', read(name)):
        u = urlsplit(link)
        if not u.scheme and u.path:
            assert (ROOT / u.path).exists(), f"{name} links to {link}"


def test_table_of_algorithms():
    "The table names every algorithm, and says of each what the class claims"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in read("README.md").splitlines()
            if re.match(r"\| \[?`\w+`", line) and line.count("|") == 10]
    assert len(rows) == len({row[0] for row in rows}) > 5
    named = set()
    for name, _, _, _, equalities, over, _, _, chapter in rows:
        name = re.search(r"`(\w+)`", name)[1]
        cls = getattr(hctrain, name)
        named.add(cls)
        assert equalities == ("yes" if "equality" in cls.claims else "no"), name
        assert over == ("yes" if "optimizer" in cls.claims else "no"), name
        assert cls.__module__.split(".")[-1] in chapter, name
    exported = [v for v in vars(hctrain).values() if isinstance(v, type) and issubclass(v, ConstrainedOptimizer)]
    assert named == {*exported} - {ConstrainedOptimizer}


def test_names_are_linked_once():
    "nbdev links a name in backticks by itself; a link around it would be a link in a link"
    assert r"[\[" not in read("README.md")
