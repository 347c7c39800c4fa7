"""The command line as a person uses it: its own process, synthetic and real data, wrong inputs, Ctrl-C."""
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chapters import ROOT

REAL = Path(os.environ.get("HCTRAIN_ACS_ROOT", ROOT.parent / "shared/data/acs"))
HCTRAIN = Path(sys.executable).with_name("hctrain")
ENV = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"OMP_NUM_THREADS": "1", "PATH": os.defpath}


def hctrain(*args, cwd):
    return subprocess.run([HCTRAIN, *args], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300)


def test_synthetic(tmp_path):
    done = hctrain("acs", "--seconds", "1", "--evaluations", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "synthetic" in done.stdout and "SSL-ALM" in done.stdout and "seed 0 (3 of 3)" in done.stderr
    run, = (tmp_path / "runs").iterdir()
    files = {"config.json", "metrics.csv", "seconds.csv", "table.csv", "figure.png", "figure.svg"}
    assert files <= {f.name for f in run.iterdir()}
    assert str(run.relative_to(tmp_path)) in done.stdout


@pytest.mark.skipif(not REAL.exists(), reason="needs census files")
def test_real(tmp_path):
    done = hctrain("acs", "--data", str(REAL), "--state", "WV", "--protected", "SEX", "--steps", "50", "--seeds", "2",
                   "--algorithms", "sslalm", "--evaluations", "2", "--out", "elsewhere", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "synthetic" not in done.stdout and "±" in done.stdout
    assert list(tmp_path.glob("elsewhere/acs-WV-*/metrics.csv"))


def test_sweep_in_one_stack(tmp_path):
    "A row for each combination of those options that an algorithm has"
    done = hctrain("acs", "--steps", "20", "--seeds", "2", "--evaluations", "1", "--algorithms", "adam", "sslalm",
                   "--sweep", "rho=0.1,1", "dual_lr=0.05,0.1", "--per-group", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table, = tmp_path.glob("runs/*/table.csv")
    rows = [row[0] for row in csv.reader(table.read_text().splitlines()[2:])]
    assert rows == ["Adam", *(f"SSL-ALM, rho={rho}, dual_lr={lr}" for rho in ("0.1", "1") for lr in ("0.05", "0.1"))]
    wrong = hctrain("acs", "--steps", "20", "--sweep", "depth=1,2", cwd=tmp_path)
    assert wrong.returncode == 2 and "got depth" in wrong.stderr


# chapter 50 tries more
@pytest.mark.parametrize("args", [(), ("acs", "--data", "nowhere"), ("acs", "--out", "/dev/null/x")])
def test_wrong_input_is_one_sentence(args, tmp_path):
    done = hctrain(*args, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert not list(tmp_path.iterdir())


def test_interrupt_and_resume(tmp_path):
    options = ("acs", "--steps", "600", "--evaluations", "5", "--algorithms", "sslalm", "ssw")
    assert hctrain(*options, "--out", "whole", cwd=tmp_path).returncode == 0
    with subprocess.Popen([HCTRAIN, *options], cwd=tmp_path, env=ENV, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as p:
        while not list(tmp_path.glob("runs/*/ssl-alm-0.pt")):
            assert p.poll() is None
            time.sleep(.02)
        p.send_signal(signal.SIGINT)
        said = p.communicate(timeout=100)[0]
    hint = said.split("Go on with: ")[1].split()
    assert p.returncode == 130 and hint[1:3] == ["acs", "--resume"] and hint[3].startswith("runs/")
    assert subprocess.run(hint, cwd=tmp_path, env=ENV, capture_output=True, timeout=300).returncode == 0    # as printed
    whole, again = (next(tmp_path.glob(f"{d}/*/metrics.csv")).read_bytes() for d in ("whole", "runs"))
    assert whole == again
