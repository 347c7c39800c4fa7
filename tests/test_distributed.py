"""Two and four processes make the steps of one; refusals, the end of a run, checkpoints, lost workers."""
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch

from hctrain.distributed import Team

pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or os.name != "posix", reason="needs gloo")
HERE = Path(__file__).parent
ENV = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}


def start(size, folder):
    "What each task gave in each process, in a function"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    done = subprocess.run([sys.executable, HERE / "ranks.py", str(size), str(port), folder], env=ENV, text=True,
                          capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return lambda name: [torch.load(folder / f"{name}-{r}.pt", weights_only=False) for r in range(size)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return start(4, tmp_path_factory.mktemp("four"))


def test_every_algorithm_makes_the_steps_of_one_process(found):
    off = {name: values for process in found("same_numbers") for name, values in process.items()}
    assert off.keys() == ranks.CASES.keys()
    for name, (two, four, _) in off.items():
        assert max(two, four) < 1e-10, f"{name}: {two:.1e} with two processes, {four:.1e} with four"
    assert sum(y > 1e-2 for *_, y in off.values()) >= 12, "the constraints are at work"


def test_one_exchange_for_each_draw(found):
    sums, loss = 6, 2  # of three groups sums and counts; of the loss the sum and the rows
    for sent in found("exchanges"):
        assert sent["sslalm", 3] == [sums + loss, sums, sums] * 10
        assert sent["sslalm", 2] == [sums + loss, sums] * 10
        assert sent["sslalm", 1] == [sums + loss] * 10
        assert sent["ssw", 3][::2] == [sums] * 10 and set(sent["ssw", 3][1::2]) <= {sums, loss}
        jacobian = 3 * 7 * 57  # three sets of rows, the loss and six constraints, 57 weights
        assert sent["ghost", 3] == [*[sums + loss] * 3, jacobian] * 10


def test_a_loop_of_ones_own(found):
    assert all(off < 1e-12 for off in found("plain_loop"))


def test_averages_are_told(found):
    for said in found("averages_drift"):
        assert said == found("averages_drift")[0][:3] + said[3:]
        drift, refused, settings, warned = said
        assert re.match("expected the same y.* in all 4 processes, got others: use constraints of all rows", drift)
        assert refused.startswith("expected gaps of the rows of all 4 processes, got RateGap(true_positive_rate")
        assert settings.startswith("expected the same rho in all 4 processes")
        assert "got finished averages from" in warned


def test_a_nan_in_one_process_is_refused_by_all(found):
    first = found("nan_in_one_process")[0]
    for result in found("nan_in_one_process"):
        said, skipped, step, finite = result
        assert result == first and len(said) == 2 and all("expected finite values" in s for s in said)
        assert (skipped, step, finite) == (2, 10, True)


def test_all_stop_after_the_same_step(found):
    results = found("a_common_end")
    for r, (timed, rows, seen, stopped, interrupted, finished, said) in enumerate(results):
        assert (timed, rows, stopped) == (results[0][0], results[0][1], results[0][3]) and timed > 3
        assert seen == [0] * len(seen) and bool(seen) == (r == 0), "the first process evaluates for all"
        assert 3 < stopped < 100000 and interrupted and not finished
        assert said == "division by zero"


def test_saved_by_two_continued_by_others(found):
    for off in found("elastic"):
        assert off["two"] == 0 and off["one"] < 1e-12 and off["four"] < 1e-12, off


def test_sharded_weights_and_state(tmp_path):
    results = start(2, tmp_path)("sharded")
    for found in results:
        for name, (one, again) in found.items():
            assert one < 1e-5, f"{name}: {one:.1e} from the steps of one process, in float32"
            assert again == 0, f"{name}: {again:.1e} off after loading"
    for name, wide in ranks.WIDE.items():
        end = ranks.sharded_end(Team(), name, wide, tmp_path / name)
        assert ranks.furthest(end, torch.load(tmp_path / f"{name}.pt")) < 1e-5, f"{name}, continued by one process"


SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {here!r})
import ranks
from hctrain import SSLALM
from hctrain.distributed import Team

torch.set_num_threads(1)
file, die, passes = Path(sys.argv[1]), sys.argv[2] == "die", []
def deadly(net):
    def hook(*_):
        passes.append(1)
        if die and team.rank == 1 and len(passes) == 55:
            os.kill(os.getpid(), signal.SIGKILL)
    net.register_forward_hook(hook)
    return net
with Team(backend="gloo") as team:
    ranks.run(team, SSLALM, ranks.tpr, model=deadly, steps=40, evaluations=4, checkpoint=file, resume=file.exists())
"""


def torchrun(folder, *args):
    script = folder / "script.py"
    script.write_text(SCRIPT.format(here=str(HERE)))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run([*start, script, *args], env=ENV, text=True, capture_output=True, timeout=300)


def test_a_worker_killed_in_the_middle(tmp_path):
    whole, broken = tmp_path / "whole.pt", tmp_path / "broken.pt"
    assert torchrun(tmp_path, whole, "live").returncode == 0
    dead = torchrun(tmp_path, broken, "die")
    assert dead.returncode != 0 and "exitcode  : -9" in dead.stderr
    assert "process 0: expected 2 processes, got a broken connection: one was killed or failed; start" in dead.stderr
    load = lambda path: torch.load(path, weights_only=True)
    assert load(broken)["step"] == 20, "killed in step 28"
    assert torchrun(tmp_path, broken, "live").returncode == 0
    a, b = load(whole), load(broken)
    assert a["rows"] == b["rows"] and a["step"] == 40
    for name in ("model", "opt", "streams", "gaps"):
        assert repr(a[name]) == repr(b[name])
    assert all(map(torch.equal, a["model"].values(), b["model"].values()))
    assert torch.equal(a["opt"]["method"]["y"], b["opt"]["method"]["y"])
