"""The Makefile says what it can do, and refuses a machine that it cannot use in one sentence."""
import os
import re
import shutil
import subprocess

import pytest
from chapters import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def make(*args):
    "As by hand, also where `make test` runs the tests"
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *args], cwd=ROOT, env=env, capture_output=True, text=True)


def test_help_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1].split()
    listed = re.findall(r"^  make ([a-z-]+)  ", make().stdout, re.M)
    assert set(listed) == set(targets) - {"FORCE"}


@pytest.mark.parametrize(("script", "message"), [
    ("exit 1", "needs Python 3.11 or newer"),
    ('case "$*" in *ensurepip*) exit 1;; *) exit 0;; esac', "has no venv module"),
], ids=["old", "no venv"])
def test_unusable_python_is_refused(tmp_path, script, message):
    python = tmp_path / "python3"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    done = make("run", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    first, *rest = done.stderr.splitlines()
    assert done.returncode == 2 and message in first and str(python) in first
    assert all(line.startswith("make: *** ") for line in rest) and not (tmp_path / "venv").exists()
