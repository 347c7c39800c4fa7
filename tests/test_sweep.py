"""A sweep survives: SIGKILL in the middle, Ctrl-C, workers that die, and a run on a cluster."""
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress

import pytest
import torch
from chapters import ROOT

from hctrain.compare import ALGORITHMS
from hctrain.sweep import Census, configurations, key_of, plan, read, sweep, takes

# 48 configurations, one of which fails; each that is over is a line in a file
SWEEP = """
import os, sys, time
from hctrain.sweep import sweep
folder = sys.argv[1]

def tiny(a, b):
    time.sleep(.2)
    with open(f"{folder}/log", "a") as f:
        f.write(f"{a} {b}\\n")
    return {"ratio": a / b}

if __name__ == "__main__":
    sweep(tiny, [{"a": a, "b": b} for a in range(8) for b in range(1, 7)] + [{"a": 1, "b": 0}], folder, n_jobs=2)
"""
ENV = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@contextmanager
def started(folder, script):
    "A sweep in a session of its own, whose workers do not outlive the test"
    with open(folder / "said", "w") as said, subprocess.Popen([sys.executable, script, folder], env=ENV, stderr=said,
                                                              start_new_session=True) as p:
        try:
            yield p
        finally:
            with suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)


def stop(process, sign, rows, table):
    "Send a signal once the table has so many rows"
    while not (table.exists() and len(table.read_text().splitlines()) >= rows):
        assert process.poll() is None
        time.sleep(.01)
    process.send_signal(sign)
    assert process.wait(timeout=60) != 0


def test_restart_runs_none_of_the_finished_again(tmp_path):
    "Ctrl-C in the middle, later SIGKILL, then the end: what has a row has run once"
    script, folder = tmp_path / "tiny.py", tmp_path / "table"
    script.write_text(SWEEP)
    folder.mkdir()
    lines = lambda name: (folder / name).read_text().splitlines()
    done, logs = [set()], []
    for sign, rows in ((signal.SIGINT, 10), (signal.SIGKILL, 25)):
        with started(folder, script) as p:
            stop(p, sign, rows, folder / "results.jsonl")
        assert f"{49 - len(done[-1])} of 49 runs" in (folder / "said").read_text()
        done.append({tuple(json.loads(line)["config"].values()) for line in lines("results.jsonl")})
        logs.append(Counter(lines("log")))
        assert rows <= len(done[-1]) < 49
    with started(folder, script) as p:
        assert p.wait(timeout=120) == 0, lines("said")
    runs = Counter(lines("log"))
    for before, log in zip(done[1:], logs, strict=True):
        assert all(runs[f"{a} {b}"] == log[f"{a} {b}"] for a, b in before)
    assert len(runs) == 49 and sum(runs.values()) - 49 <= 2 * 4        # twice, each worker lost at most two jobs
    table = read(folder)
    assert len(table) == 49 and table.error.notna().sum() == 1 and table.error[key_of({"a": 1, "b": 0})]


def test_keys_are_those_of_next_year():
    assert key_of({"algorithm": "sslalm", "rho": 1, "seed": 0}) == "59a2e397a40d7e95"
    assert key_of({"rho": 1.}) == key_of({"rho": torch.tensor(1)}) != key_of({"rho": True})
    assert key_of({"a": [1, 2]}) == key_of({"a": (1, 2)}) != key_of({"a": [2, 1]})


def dies(i):
    if i == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"threads": torch.get_num_threads()}


def test_a_worker_that_is_killed_leaves_a_table(tmp_path):
    with pytest.raises(RuntimeError, match="expected workers that live"):
        sweep(dies, [{"i": i} for i in range(8)], tmp_path, n_jobs=2, progress=False)
    rest = [{"i": i} for i in range(8) if i != 2]
    table = sweep(dies, rest, tmp_path, n_jobs=2, progress=False)
    assert (table.threads == 1).all() and len(table) == 7


def test_a_full_disk_leaves_a_table(tmp_path, monkeypatch):
    written = []

    def write(path, data, real=sys.modules["hctrain.sweep"].write_atomically):
        written.append(path)
        if len(written) == 3:
            raise OSError("expected to write, got 'No space left on device'")
        real(path, data)
    monkeypatch.setattr("hctrain.sweep.write_atomically", write)
    with pytest.raises(OSError, match="No space"):
        sweep(threads, [{"i": i} for i in range(8)], tmp_path, n_jobs=2, progress=False)
    assert len(read(tmp_path)) == 2
    assert len(sweep(threads, [{"i": i} for i in range(8)], tmp_path, progress=False)) == 8


def threads(i):
    return {"threads": torch.get_num_threads()}


def test_one_thread_a_worker(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert (sweep(threads, [{"i": 0}], tmp_path, progress=False).threads == 1).all()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_every_option_is_known():
    for name, algorithm in ALGORITHMS.items():
        assert {*algorithm.space} <= takes(algorithm), name
    assert "dual_bound" in takes(ALGORITHMS["sslalm-adam"]) and "rho" not in takes(ALGORITHMS["adam"])
    axes = {"algorithm": ["adam", "alm"], "rho": [1., 2.], "bound": [.1]}
    assert configurations(axes) == [{"algorithm": "adam", "bound": .1}, {"algorithm": "alm", "rho": 1., "bound": .1},
                                    {"algorithm": "alm", "rho": 2., "bound": .1}]


@pytest.mark.filterwarnings("default")                        # those of distributed are not ours
def test_dask(tmp_path):
    distributed = pytest.importorskip("distributed")
    from joblib import parallel_config
    configs = configurations({"algorithm": ["adam", "sslalm"], "seed": [0, 1], "steps": [20], "rho": [1., -1.]})
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, distributed.Client(cluster), parallel_config("dask"):
        table = sweep(Census(), configs, tmp_path, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert not any(row["worker"].endswith(f":{os.getpid()}") for row in rows)
    assert table.error.notna().tolist() == (table.rho == -1).tolist() and "rho" in table.error.dropna().iloc[0]
    assert (plan(configs, tmp_path).state != "to run").all()
    here = sweep(Census(), configs[:1], tmp_path / "here", progress=False)
    assert here.train_loss.iloc[0] == table.train_loss.iloc[0]
