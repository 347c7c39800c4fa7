"""Runs that are killed, run out of disk or find their checkpoint damaged: what is left, and how they end."""
import io
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hctrain.train import Checkpoint, Record, write_atomically

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and reads /proc")
ENV = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
KILLED = -9


@contextmanager
def in_memory():
    "A folder whose files need not reach a disk: what a killed process has written, the system keeps"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path():
    with in_memory() as folder:
        yield folder


@pytest.fixture(scope="module")
def attempt():
    "A function that starts a job in a fork and says how it ended"
    with subprocess.Popen([sys.executable, "-W", "error", Path(__file__).with_name("survivor.py")], env=ENV, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        def attempt(folder, **job):
            server.stdin.write(json.dumps({"folder": str(folder), **job}) + "\n")
            server.stdin.flush()
            code, alone = json.loads(server.stdout.readline())
            assert alone, "a process that forks has one thread"
            return code
        with in_memory() as folder:
            assert attempt(folder) == 0, said(folder)
        yield attempt
        server.stdin.close()


def said(folder):
    return (folder / "said.txt").read_text().strip()


def leaves(value):
    "All that a state holds, tensors as bytes"
    if isinstance(value, torch.Tensor):
        yield str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    elif isinstance(value, dict):
        for k in sorted(value, key=str):
            yield k
            yield from leaves(value[k])
    elif isinstance(value, list | tuple):
        yield len(value)
        for v in value:
            yield from leaves(v)
    else:
        yield repr(value)


def ending(folder):
    "The bytes of a finished run: metrics, and weights, optimizer, streams, schedule, random state, step and record"
    state = torch.load(folder / "run.pt", weights_only=True)
    assert {"model", "opt", "streams", "scheduler0", "rng", "step", "rows"} <= state.keys()
    return (folder / "metrics.csv").read_bytes(), list(leaves({k: v for k, v in state.items() if k not in
                                                               ("seconds", "times")}))


def litter(folder):
    return sorted(f.name for f in folder.iterdir() if f.name.endswith(".part"))


@pytest.fixture(scope="module")
def undisturbed(attempt):
    "The short run that most tests disturb: 40 steps, a checkpoint after each ten"
    with in_memory() as folder:
        assert attempt(folder) == 0, said(folder)
        return ending(folder)


# Killed

@pytest.mark.parametrize("method", ["sslalm", "switching", "adam"])
def test_killed_at_twenty_random_moments(method, attempt, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    size = {"method": method, "steps": 200, "evaluations": 40}
    start = time.perf_counter()
    assert attempt(whole, run=size) == 0, said(whole)
    seconds, rng, kills, steps = time.perf_counter() - start, random.Random(method), 0, []
    while kills < 20:
        code = attempt(folder, run=size, after=rng.uniform(0, seconds / 2))
        assert code in (KILLED, 0), said(folder)
        if code == 0:  # done before it was killed: from the start again
            assert ending(folder) == ending(whole)
            shutil.rmtree(folder)
            folder.mkdir()
        elif (folder / "run.pt").exists():
            steps.append(torch.load(folder / "run.pt", weights_only=True)["step"])
        kills += code == KILLED
    assert len(set(steps)) > 5, "most of the kills fell into the run"
    assert attempt(folder, run=size) == 0, said(folder)
    assert ending(folder) == ending(whole)
    assert not litter(folder)


@pytest.mark.parametrize("nth", [1, 4, 6])  # five checkpoints, metrics.csv
@pytest.mark.parametrize("stage", ["before", "half", "before fsync", "before replace", "after replace"])
def test_killed_while_writing(stage, nth, attempt, undisturbed, tmp_path):
    assert attempt(tmp_path, doom=[stage, nth]) == KILLED
    done = nth if stage == "after replace" else nth - 1
    assert len(litter(tmp_path)) == (stage not in ("before", "after replace"))
    assert (tmp_path / "run.pt").exists() == (done > 0)
    if done:
        step = torch.load(tmp_path / "run.pt", weights_only=True)["step"]
        assert step == 10 * (min(done, 5) - 1), "the last checkpoint that was moved into place"
    assert (tmp_path / "metrics.csv").exists() == (done == 6)
    assert attempt(tmp_path) == 0, said(tmp_path)
    assert ending(tmp_path) == undisturbed
    assert not litter(tmp_path)


def test_killed_again_and_again_while_writing(attempt, undisturbed, tmp_path):
    for nth in (3, 2, 2, 2):
        assert attempt(tmp_path, doom=["half", nth]) == KILLED
        assert len(litter(tmp_path)) == 1, "parts of dead writers do not pile up"
    assert attempt(tmp_path) == 0, said(tmp_path)
    assert ending(tmp_path) == undisturbed


def test_parts_of_living_writers_and_other_files_stay(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    others = [f".run.pt.{os.getppid()}.part", ".run.pt.old.part", ".run.pt.part", f".ran.pt.{dead.pid}.part"]
    for name in (*others, f".run.pt.{dead.pid}.part"):
        (tmp_path / name).write_bytes(b"half")
    write_atomically(tmp_path / "run.pt", b"whole")
    assert litter(tmp_path) == sorted(others)
    assert (tmp_path / "run.pt").read_bytes() == b"whole"


def test_bytes_then_name_reach_the_disk(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    kind = lambda fd: "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append((kind(fd), os.fstat(fd).st_size)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "a", b"12345")
    assert calls[:2] == [("file", 5), "replace"] and calls[2][0] == "folder"


ACS = ["--steps", "60", "--evaluations", "3", "--algorithms", "sslalm"]


@pytest.fixture(scope="module")
def acs(attempt):
    "metrics.csv and table.csv of an undisturbed `hctrain acs`"
    with in_memory() as folder:
        assert attempt(folder, acs=ACS) == 0, said(folder)
        return acs_files(folder)


def acs_files(folder):
    run, = folder.glob("runs/acs-*")
    assert not litter(run)
    return [(run / name).read_bytes() for name in ("metrics.csv", "table.csv")]


# files of a run: 1 configuration, 2 to 5 checkpoints, 6 metrics
def test_a_killed_command_is_resumed(attempt, acs, tmp_path):
    assert attempt(tmp_path, acs=ACS, doom=["between", 3]) == KILLED
    assert attempt(tmp_path, acs=["--resume"], doom=["half", 1]) == KILLED
    assert attempt(tmp_path, acs=["--resume"], doom=["half", 3]) == KILLED
    assert list(tmp_path.glob("runs/*/.metrics.csv.*.part")) and not list(tmp_path.glob("runs/*/metrics.csv"))
    assert attempt(tmp_path, acs=["--resume"]) == 0, said(tmp_path)
    assert acs_files(tmp_path) == acs


# No room

def stopped(folder, name="run.pt"):
    "Whether a run ended with the sentence, the last checkpoint is whole, and nothing else is left"
    sentence = f"expected to write {name} in {folder.name}, got '"
    assert said(folder).startswith(f"OSError: {sentence}") and len(said(folder).splitlines()) == 1, said(folder)
    assert not litter(folder)
    return torch.load(folder / "run.pt", weights_only=True)["step"]


@pytest.mark.parametrize("stage, code", [("half", "ENOSPC"), ("half", "EDQUOT"), ("before", "EACCES"),
                                         ("before", "EROFS"), ("before fsync", "EIO"), ("before replace", "EPERM")])
def test_an_error_of_the_system(stage, code, attempt, undisturbed, tmp_path):
    assert attempt(tmp_path, doom=[stage, 4, code]) == 1
    assert stopped(tmp_path) == 20
    assert attempt(tmp_path) == 0, said(tmp_path)
    assert ending(tmp_path) == undisturbed


def test_a_limit_on_the_size_of_files(attempt, undisturbed, tmp_path):
    assert attempt(tmp_path, doom=["before", 4]) == KILLED
    limit = (tmp_path / "run.pt").stat().st_size  # a checkpoint grows with its record
    assert attempt(tmp_path, limit=limit) == 1
    assert "got 'File too large'" in said(tmp_path) and stopped(tmp_path) == 20
    assert attempt(tmp_path) == 0, said(tmp_path)
    assert ending(tmp_path) == undisturbed


@pytest.fixture
def disk(tmp_path):
    "A disk of 64 kB"
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder]).returncode:
        pytest.skip("needs to mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(attempt, undisturbed, tmp_path, disk):
    here = {"run": {"folder": str(disk)}}
    assert attempt(tmp_path, doom=["before", 4], **here) == KILLED
    with open(disk / "other", "wb", buffering=0) as other, pytest.raises(OSError):
        while True:
            other.write(bytes(1024))
    assert attempt(tmp_path, **here) == 1
    assert said(tmp_path).startswith("OSError: expected to write run.pt in disk, got 'No space left on device': make")
    os.truncate(disk / "other", 0)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert attempt(tmp_path, **here) == 1
    assert said(tmp_path).startswith("OSError: expected to write run.pt in disk, got 'Read-only file system': make")
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert not litter(disk) and torch.load(disk / "run.pt", weights_only=True)["step"] == 20
    assert attempt(tmp_path, **here) == 0, said(tmp_path)
    assert ending(disk) == undisturbed


@pytest.mark.parametrize("nth, name", [(1, "config.json"), (4, "ssl-alm-0.pt"), (6, "metrics.csv")])
def test_a_command_without_room(nth, name, attempt, acs, tmp_path):
    assert attempt(tmp_path, acs=ACS, doom=["half", nth, "ENOSPC"]) == 2
    last = said(tmp_path).splitlines()[-1]
    assert last.startswith(f"hctrain: expected to write {name} in acs-VA-") and "got 'No space left" in last
    if nth == 4:
        assert attempt(tmp_path, acs=["--resume"]) == 0, said(tmp_path)
        assert acs_files(tmp_path) == acs


@pytest.mark.parametrize("place, cause", [("file/run.pt", NotADirectoryError), ("none/run.pt", FileNotFoundError),
                                          ("folder", IsADirectoryError), ("n" * 300, OSError),
                                          ("/proc/run.pt", OSError)])
def test_a_place_that_cannot_be_written(place, cause, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"^expected to write \S+ in \S+, got '[\w -]+': make room, or name") as error:
        write_atomically(tmp_path / place, b"bytes")
    assert isinstance(error.value.__cause__, cause) and error.value.__cause__.errno
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


def test_an_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(fd):
        raise KeyboardInterrupt
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", b"new")
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [b"old"]


# Damage

def checkpoint(file):
    torch.manual_seed(0)
    return Checkpoint(file, model=torch.nn.Linear(9, 9))


def damages(data):
    "Changed bits and cut files, by name"
    rng = random.Random(0)
    for i in rng.sample(range(len(data)), 150):
        yield f"bit in byte {i}", data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1:]
    for n in (0, 1, 31, 32, 33, len(data) // 2, len(data) - 33, len(data) - 32, len(data) - 1):
        yield f"{n} bytes", data[:n]
    yield "zeros at the end", data[:-512] + bytes(512)  # as a file system may leave them
    yield "more", data + b"\n"


def test_damage_is_refused(tmp_path):
    kept = checkpoint(tmp_path / "run.pt")
    kept.save(7, 0., Record())
    data = kept.path.read_bytes()
    assert checkpoint(kept.path).load()[0] == 7
    before = list(leaves(kept.parts["model"].state_dict()))
    for name, damaged in damages(data):
        kept.path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^expected a whole checkpoint in run.pt, got one that is damaged"):
            pytest.fail(f"{name} went unnoticed: {kept.load()}")
    assert list(leaves(kept.parts["model"].state_dict())) == before


def test_a_checkpoint_is_a_file_of_torch(tmp_path):
    kept = checkpoint(tmp_path / "run.pt")
    kept.save(7, 0., Record())
    for mmap in (False, True):
        state = torch.load(kept.path, weights_only=True, mmap=mmap)
        assert torch.equal(state["model"]["weight"], kept.parts["model"].weight)


def test_a_damaged_command_is_refused(attempt, tmp_path):
    assert attempt(tmp_path, acs=ACS, doom=["before", 4]) == KILLED
    file, = tmp_path.glob("runs/*/ssl-alm-0.pt")
    file.write_bytes(file.read_bytes()[:-1000])
    assert attempt(tmp_path, acs=["--resume"]) == 2
    assert said(tmp_path).splitlines()[-1].startswith("hctrain: expected a whole checkpoint in ssl-alm-0.pt, got")


def test_what_cannot_be_loaded_is_not_saved(tmp_path):
    kept = Checkpoint(tmp_path / "run.pt", odd=type("Odd", (), {"state_dict": lambda self: {"a": io.BytesIO()}})())
    with pytest.raises(ValueError, match="expected states that torch.load"):
        kept.save(0, 0., Record())
    assert not list(tmp_path.iterdir())


def test_streams_without_a_state_are_refused(tmp_path):
    with pytest.raises(TypeError, match="expected streams with state_dict, got list"):
        Checkpoint(tmp_path / "run.pt", streams=[1, 2], gaps=print)


def test_numbers_of_numpy_are_numbers(tmp_path):
    import numpy as np
    record = Record()
    record.add(0, 0., {"loss": np.float64(.5), "n": np.int64(3)})
    kept = checkpoint(tmp_path / "run.pt")
    kept.save(0, 0., record)
    assert kept.load()[2].rows == [{"step": 0, "loss": .5, "n": 3}]
