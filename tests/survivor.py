"""Runs that may be killed, for test_survival: a process that imports torch once and forks for each of them.

It reads jobs as lines of JSON and answers each with an exit code, below 0 for a signal. Forks are safe as long as it
has one thread, which it checks each time.
"""
import errno
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  (here and below: imported once for all forks)
import pandas  # noqa: F401
import torch
import torch._dynamo
import tqdm.auto  # noqa: F401
from torch import nn

import hctrain.acs
import hctrain.plotting  # noqa: F401
from hctrain import SSLALM, RateGap, Streams, SwitchingSubgradient, WeightedBCE, cli, positive_rate, train

METHODS = {"sslalm": lambda p: SSLALM(p, m=4), "switching": lambda p: SwitchingSubgradient(p, m=4, output="random"),
           "adam": lambda p: SSLALM(torch.optim.Adam(p, lr=.01), m=4)}


def run(folder, method="adam", steps=40, evaluations=4):
    "A run with dropout and a schedule, begun or gone on with, and its metrics"
    gen = torch.Generator().manual_seed(0)
    x, g = torch.randn(400, 5, generator=gen), (torch.rand(400, generator=gen) < .3).long()
    y = (x.sum(1) + g > .5).float()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(.2), nn.Linear(16, 1))
    streams = Streams(x, y, g, per_group=8, replacement=False)
    opt = METHODS[method](model.parameters())
    gaps = RateGap(positive_rate, 2, bound=.05, two_sided=True, weights=streams.weights)
    file = Path(folder) / "run.pt"
    done = train.train(model, opt, WeightedBCE(streams.weights), gaps, streams, steps=steps, evaluations=evaluations,
                       evaluate=lambda: {"out": model(x).mean().item(), "y": gaps(model(x), streams.data)},
                       schedulers=[torch.optim.lr_scheduler.ExponentialLR(opt, gamma=.999)],
                       checkpoint=file, resume=file.exists(), progress=False)
    done.record.save(folder)


class Half:
    "A file that does only half of what it is told"
    def __init__(self, file, act):
        self.file, self.act = file, act

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(data[:len(data) // 2])
        self.file.flush()
        self.act()


def doom(stage, nth, code=None):
    "Die, or fail with an error of the system, at this stage of writing the nth file, or between it and the next"
    written = 0

    def act():
        if code:
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        os.kill(os.getpid(), signal.SIGKILL)

    def opened(path, mode):
        nonlocal written
        written += 1
        if written == nth and stage == "before":
            act()
        return Half(open(path, mode), act) if written == nth and stage == "half" else open(path, mode)

    def around(name):
        real = getattr(os, name)
        def wrapper(*args):
            if written == nth and stage == f"before {name}":
                act()
            real(*args)
            if written == nth and stage == f"after {name}":
                act()
        setattr(os, name, wrapper)

    def dual_step(*args, real=SSLALM.dual_step):
        if written == nth and stage == "between":
            act()
        return real(*args)

    train.open, SSLALM.dual_step = opened, dual_step
    around("fsync")
    around("replace")


def child(job):
    "What a fork does: its exit code"
    said = os.open(Path(job["folder"]) / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if "doom" in job:
        doom(*job["doom"])
    if "limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    if "acs" in job:
        os.chdir(job["folder"])
        return cli.main(["acs", *job["acs"]])
    run(**{"folder": job["folder"], **job.get("run", {})})
    return 0


def attempt(job):
    "Fork, kill after a while if asked to, and wait: the exit code, and whether this process may fork"
    alone = not Path("/proc/self/task").exists() or len(os.listdir("/proc/self/task")) == 1
    if (pid := os.fork()) == 0:
        code = 1
        try:
            code = child(job)
        except BaseException as e:
            sys.stdout.write(f"{type(e).__name__}: {e}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if "after" in job:
        time.sleep(job["after"])
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), alone


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = hctrain.acs.load_acs()
    hctrain.acs.load_acs = lambda *args, **kw: data
    for line in sys.stdin:
        sys.stdout.write(json.dumps(attempt(json.loads(line))) + "\n")
        sys.stdout.flush()
