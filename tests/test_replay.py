"""Recorded steps are the steps as written: every kind of step, batches of two shapes, schedules, resumed runs."""
import random
import shutil

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hctrain import SSLALM, Lagrangian, RateGap, Streams, SwitchingSubgradient, WeightedBCE, positive_rate
from hctrain.constraints import Proxy, Sharpened
from hctrain.problem import leaves, same
from hctrain.replay import Given, Replay, draws_of_step, record
from hctrain.sampling import RandomStreams
from hctrain.train import choose_step, one_draw_step, plain_step, three_draw_step, train

compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def rows(n=600):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=gen, dtype=torch.float64)
    g = torch.randint(3, (n,), generator=gen)
    return x, (x[:, 0] + .5 * g > 0).double(), g


def task(make=lambda p, m: SSLALM(p, m), streams=None, gaps=None):
    streams = Streams(*rows(), per_group=6, seed=1) if streams is None else streams()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    weights = streams.weights
    gaps = gaps or RateGap(positive_rate, 3, .02, "batch" if weights is None else "population", weights=weights)
    return model, make(model.parameters(), gaps.m), WeightedBCE(weights), gaps, streams


def states(model, opt):
    both = leaves([model.state_dict(), opt.state_dict()])
    return [torch.as_tensor(v, dtype=torch.float64) for v in both if isinstance(v, (torch.Tensor, int, float))]


def runs(do_step, *args, steps=60, change=lambda opt, k: None, **kw):
    "The ends of a run as written and of its replay"
    ends = []
    for step in (do_step, Replay(do_step, compiled=False)):
        parts = model, opt, *_ = task(*args, **kw)
        for k in range(steps):
            change(opt, k)
            step(*parts, True)
        if step is not do_step:
            step.close()
            assert not opt.deferred
        ends.append(states(model, opt))
    return ends


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_kinds_of_steps(draws):
    a, b = runs(choose_step(task()[1], draws))
    assert_close(b, a, rtol=0, atol=1e-12)


@pytest.mark.parametrize("draws", [1, 3])
def test_switching(draws):
    make = lambda p, m: SwitchingSubgradient(p, m, constraint_lr=.03, branchless=True)
    a, b = runs(choose_step(task(make)[1], draws), make)
    assert_close(b, a, rtol=0, atol=1e-12)


def test_lets_switching_branch_again():
    model, opt, *rest = task(lambda p, m: SwitchingSubgradient(p, m))
    replay = Replay(choose_step(opt, 3), compiled=False)
    for _ in range(4):
        replay(model, opt, *rest, True)
    assert opt.branchless
    replay.close()
    assert not opt.branchless and opt.k == 4 and isinstance(opt.k, int)


def test_plain_step():
    make = lambda p, m: torch.optim.Adam(p, lr=.01)
    ends = []
    for step in (plain_step, Replay(plain_step, compiled=False)):
        parts = task(make)
        for _ in range(60):
            step(*parts, True)
        ends.append(list(parts[0].parameters()))
    assert_close(*ends, rtol=0, atol=1e-12)


def test_codes_that_differ():
    "Batches that are not balanced have other group codes each time"
    for draws in (1, 3):
        gaps = RateGap(positive_rate, 3, .02, "batch", absent="skip")
        a, b = runs(choose_step(task()[1], draws), gaps=gaps, streams=lambda: RandomStreams(*rows(), batch_size=20))
        assert_close(b, a, rtol=0, atol=1e-12)


def test_proxy():
    sharp = RateGap(Sharpened(positive_rate, .3), 3, .02, "batch", two_sided=True)
    gaps = Proxy(sharp, RateGap(positive_rate, 3, .02, "batch", two_sided=True, hard=True))
    make = lambda p, m: Lagrangian(torch.optim.Adam(p), m)
    a, b = runs(three_draw_step, make, gaps=gaps)
    assert_close(b, a, rtol=0, atol=1e-12)


class TwoSizes:
    "Large and small batches in turn"
    def __init__(self):
        self.all, self.t = [Streams(*rows(), per_group=k) for k in (6, 3)], 0
        self.weights = self.all[0].weights

    def draw(self, k):
        self.t += 1
        return self.all[self.t % 2].draw(k)


def test_two_shapes():
    ends = []
    for step in (one_draw_step, Replay(one_draw_step, compiled=False)):
        model, opt, *rest = task(lambda p, m: SSLALM(torch.optim.Adam(p), m), streams=TwoSizes)
        for _ in range(40):
            step(model, opt, *rest, True)
        getattr(step, "close", bool)()
        ends.append(states(model, opt))
    assert_close(*ends, rtol=0, atol=1e-12)


def test_follows_numbers_from_outside():
    def change(opt, k):
        if k == 20:
            opt.rho, opt.dual_lr, opt.param_groups[0]["mu"] = 3., .5, .1
    a, b = runs(one_draw_step, change=change)
    assert_close(b, a, rtol=0, atol=1e-12)
    plain, _ = runs(one_draw_step)
    assert not torch.equal(plain[0], a[0])


def test_recording_changes_nothing():
    parts = model, opt, loss, gaps, streams = task(lambda p, m: Lagrangian(torch.optim.Adam(p), m))
    for _ in range(2):
        one_draw_step(*parts, True)
    opt.defer()
    batches = streams.draw(1)
    before = [t.clone() for t in states(model, opt)], torch.get_rng_state()
    recording = record(one_draw_step, model, opt, loss, gaps, batches)
    assert same((states(model, opt), torch.get_rng_state()), before) and draws_of_step(one_draw_step, *parts[:4]) == 1
    assert {k for _, k in recording.numbers} >= {"lr", "rho", "dual_bound", "bound", "step", "kp", "nu"}


def test_a_nan_is_told():
    model, opt, loss, gaps, streams = task()
    replay = Replay(one_draw_step, compiled=False)
    for k in range(6):
        xi, = streams.draw(1)
        w = model[0].weight.clone()
        replay(model, opt, loss, gaps, Given([xi._replace(x=xi.x * torch.nan) if k == 4 else xi]), True)
        assert torch.equal(w, model[0].weight) == (k == 4)
    with pytest.raises(FloatingPointError, match="since the last check"):
        opt.check()


@compiler
def test_compiled_training():
    "The numbers of the loop as written; a clock that stands still while it compiles; a resumed run to the same bytes"
    ends, kw = [], dict(steps=60, evaluations=4, progress=False, anneal=True)
    for compiled in (False, True):
        parts = task()
        run = train(*parts, compiled=compiled, **kw)
        ends.append(states(*parts[:2]))
        assert (run.compiling > 0) == compiled and ("compiling" in repr(run)) == compiled
        assert run.seconds < max(run.compiling, 10)
    assert_close(ends[1], ends[0], rtol=0, atol=1e-12)


@compiler
def test_compiled_runs_resume(tmp_path):
    kw = dict(steps=60, evaluations=4, progress=False, compiled=True)
    whole = task()
    train(*whole, **kw)
    stopped = task()

    def press():
        if stopped[-1].t >= 29:
            raise KeyboardInterrupt
        return {}
    with pytest.raises(KeyboardInterrupt):
        train(*stopped, evaluate=press, checkpoint=tmp_path / "run.pt", **kw)
    again = task()
    train(*again, evaluate=dict, checkpoint=tmp_path / "run.pt", resume=True, **kw)
    assert same(states(*again[:2]), states(*whole[:2]))


@compiler
def test_a_compiled_torch_optimizer_tells_of_nan():
    "Nobody masks it there; the loss explodes after the steps that are made as written"
    model, opt, _, _, streams = task(lambda p, m: torch.optim.SGD(p, lr=1.))
    with pytest.raises(FloatingPointError, match="weights"):
        train(model, opt, lambda out, batch: -out.exp().mean(), None, streams, steps=40, progress=False, compiled=True)


def losses():
    "Losses of which a part does not come from torch"
    generator, calls = random.Random(0), iter(range(10**6))
    return {"numpy": lambda f, out, b: f * float(b.x.detach().numpy().mean() + 2),
            "tolist": lambda f, out, b: f * sum(out.flatten().tolist()),
            "random": lambda f, out, b: f * generator.random(),
            "counter": lambda f, out, b: f * (1 + next(calls))}


@pytest.mark.parametrize("name", losses())
def test_what_leaves_torch_is_refused(name):
    model, opt, loss, gaps, streams = task()
    mine = losses()[name]
    replay = Replay(one_draw_step, compiled=False)
    with pytest.raises(TypeError, match="expected a step that does not look at values"):
        for _ in range(3):
            replay(model, opt, lambda out, b: mine(loss(out, b), out, b), gaps, streams, True)


def test_other_schedules_are_told():
    model, opt, loss, gaps, streams = task(lambda p, m: Lagrangian(torch.optim.Adam(p), m))
    replay = Replay(one_draw_step, compiled=False)
    for k in range(5):
        replay(model, opt, loss, gaps, streams, True)
        opt.param_groups[0]["betas"] = (.9 - .01 * k, .999)
    with pytest.raises(ValueError, match="nothing but lr to change"):
        replay.settle()


def test_a_step_size_that_is_a_tensor():
    ends = []
    for step in (one_draw_step, Replay(one_draw_step, compiled=False)):
        parts = task(lambda p, m: Lagrangian(torch.optim.Adam(p, lr=torch.tensor(.01), foreach=False), m))
        for _ in range(20):
            step(*parts, True)
            parts[1].param_groups[0]["lr"].mul_(.9)
        ends.append(list(parts[0].parameters()))
    assert_close(*ends, rtol=0, atol=1e-7)


def test_a_plain_optimizer_cannot_skip_where_nobody_masks():
    model, opt, loss, _, streams = task(lambda p, m: torch.optim.Adam(p))
    with pytest.raises(ValueError, match="expected nonfinite='raise' for a compiled Adam"):
        train(model, opt, loss, None, streams, steps=5, progress=False, compiled=True, nonfinite="skip")
