"""Many runs at once: each is what it would be alone, whatever goes wrong in the others."""
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hctrain import (
    PI,
    SSLALM,
    Box,
    Lagrangian,
    Penalty,
    PenaltyBarrier,
    RandomStreams,
    RateGap,
    SmoothedPenalty,
    StochasticGhost,
    Streams,
    SwitchingSubgradient,
    WeightedBCE,
    positive_rate,
)
from hctrain.compare import ALGORITHMS, Setting, compare, long_table, tune
from hctrain.ensemble import Budget, Going, Member, plan, train_many
from hctrain.problem import leaves
from hctrain.train import train

GEN = torch.Generator().manual_seed(0)
X = torch.randn(600, 4, generator=GEN, dtype=torch.float64)
G = torch.randint(3, (600,), generator=GEN)
Y = (X.sum(1) + torch.randn(600, generator=GEN) > 0).double()
QUIET = {"steps": 12, "evaluations": 3, "draws": 1, "progress": False}


def member(make=SSLALM, seed=0, bound=.05, layer=None, streams=Streams, file=None, two_sided=False, **kw):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)]
    model = nn.Sequential(*(layers if layer is None else [layers[0], layer, *layers[1:]])).double()
    draws = streams(X, Y, G, 5, seed=seed)
    gaps = RateGap(positive_rate, 3, bound, "population" if draws.weights is not None else "batch",
                   weights=draws.weights, two_sided=two_sided)
    opt = make(model.parameters(), gaps.m, **kw)
    return Member(model, opt, WeightedBCE(draws.weights), gaps, draws, lambda: {"w": model[0].weight.sum()}, file,
                  name=f"seed {seed}", seed=seed)


def alone(m, **kw):
    "The same with `train`"
    return train(m.model, m.opt, m.loss, m.gaps, m.streams, evaluate=m.evaluate, checkpoint=m.checkpoint, **QUIET | kw)


def numbers(m):
    return [torch.as_tensor(t, dtype=torch.float64) for t in leaves([p.state_dict() for p in m.stateful()])
            if isinstance(t, (torch.Tensor, float, int))]


def assert_same(a, b):
    for x, y in zip(numbers(a), numbers(b), strict=True):
        assert_close(x, y, rtol=1e-9, atol=1e-9)


def stacks_of(members, **kw):
    goings = [Going(m, Budget(steps=10), False, False, "raise") for m in members]
    stacks, left = plan(goings, 1, **kw)
    return [part for _, part in stacks], left


METHODS = {
    "adam": lambda p, m: torch.optim.Adam(p),
    "sslalm": lambda p, m, **kw: SSLALM(p, m, **{"lr": .1, "rho": 3., "mu": 1.} | kw),
    "projected": lambda p, m: SSLALM(p, m, inequality="projected", project=Box(-.5, .5)),
    "max, equality": lambda p, m: SSLALM(torch.optim.Adam(p), m, inequality="max", equality=torch.arange(m) == 0),
    "switching": SwitchingSubgradient,
    "literal": lambda p, m: SwitchingSubgradient(p, m, schedule="literal"),
    "alm": lambda p, m: Lagrangian(torch.optim.AdamW(p), m),
    "pi": lambda p, m: Lagrangian(torch.optim.SGD(p, .05, .9), m, rho=0., dual=PI(kp=2., nu=.5, start="first")),
    "penalty": lambda p, m: Penalty(p, m, growth=2., every=3),
    "smoothed": lambda p, m: SmoothedPenalty(torch.optim.RMSprop(p), m),
    "barrier": lambda p, m: PenaltyBarrier(torch.optim.Adagrad(p), m)}


@pytest.mark.parametrize("name", METHODS)
def test_same_as_alone(name):
    "Weights, multipliers, counters, streams and records, with step sizes that fall"
    draws = 3 if name in ("sslalm", "alm") else 2 if name == "switching" else 1
    stacked, single = ([member(METHODS[name], s) for s in range(2)] for _ in range(2))
    assert stacks_of(stacked) == ([[0, 1]], {})
    runs = train_many(stacked, **QUIET | {"draws": draws}, anneal=True)
    for m, other, run in zip(stacked, single, runs, strict=True):
        expected = alone(other, draws=draws, anneal=True)
        assert_same(m, other)
        assert_close(run.record["w"], expected.record["w"])
        assert run.record["step"].tolist() == expected.record["step"].tolist() and run.finished


def test_a_sweep_is_one_stack():
    "Step sizes, rho, mu, beta and the bound differ; each run is what it would be alone"
    options = [{}, {"lr": .2}, {"rho": .1, "dual_lr": .5}, {"mu": .1, "beta": .9}, {"bound": .2, "dual_bound": .05}]
    stacked, single = ([member(seed=i, **o) for i, o in enumerate(options)] for _ in range(2))
    assert stacks_of(stacked) == ([[0, 1, 2, 3, 4]], {})
    train_many(stacked, **QUIET)
    for m, other in zip(stacked, single, strict=True):
        alone(other)
        assert_same(m, other)


def test_sweep_of_two_steps():
    "The ratio of the steps is an attribute, which the recordings show to be of no account"
    assert stacks_of([member(SwitchingSubgradient, lr=lr) for lr in (.01, .1)])[0] == [[0, 1]]


def at_random(x, y, g, per_group, seed):
    return RandomStreams(x, y, g, 90, seed=seed)


@pytest.mark.parametrize("other", [{"inequality": "max"}, {"project": Box(-1, 1)}, {"two_sided": True},
                                   {"streams": at_random}, {"make": SwitchingSubgradient}, {"layer": nn.Tanh()}])
def test_what_differs_is_not_stacked(other):
    stacks, left = stacks_of([member(), member(seed=1), member(**other), member(seed=1, **other)])
    assert stacks == [[0, 1], [2, 3]] and not left


def test_constants_differ():
    "Two losses of one kind with other weights"
    a, b = member(), member(seed=1)
    b.loss = WeightedBCE(torch.tensor([1., 2., 3.]).double())
    assert stacks_of([a, b]) == ([], {0: "", 1: ""})


def test_chunks():
    members = [member(seed=s) for s in range(5)]
    assert stacks_of(members, rows=3 * 15)[0] == [[0, 1, 2], [3, 4]]
    assert stacks_of(members, rows=1) == ([], dict.fromkeys(range(5), ""))
    single = [member(seed=s) for s in range(5)]
    train_many(members, **QUIET, rows=3 * 15)
    for m, other in zip(members, single, strict=True):
        alone(other)
        assert_same(m, other)


def test_what_cannot_be_stacked_trains_alone():
    "Ghost in silence, dropout and a look at values with a reason; the others are stacked"
    def makes():
        peeks = member(seed=5)
        loss = peeks.loss
        peeks.loss = lambda out, b: loss(out, b) * (1 if out.sum() > 0 else 2)
        return [member(StochasticGhost, two_sided=True), member(layer=nn.Dropout(.5)), member(seed=1), member(seed=2),
                peeks]
    members, others = makes(), makes()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        runs = train_many(members, **QUIET)
    assert len(said) == 2 and "seed 0 is trained on its own" in str(said[0].message)
    assert "does not look at values" in str(said[1].message) and all(r.finished for r in runs)
    for m, other in zip(members, others, strict=True):
        torch.manual_seed(other.seed)
        alone(other)
        assert_same(m, other)


def test_batch_norm_is_stacked():
    stacked, single = ([member(seed=s, layer=nn.BatchNorm1d(8)) for s in range(2)] for _ in range(2))
    assert stacks_of(stacked)[0] == [[0, 1]]
    train_many(stacked, **QUIET | {"draws": 3})
    for m, other in zip(stacked, single, strict=True):
        alone(other, draws=3)
        assert_same(m, other)


def test_tensors_of_their_own_afterwards():
    members = [member(seed=s) for s in range(3)]
    train_many(members, **QUIET)
    for m in members:
        assert m.model[0].weight.untyped_storage().nbytes() == 4 * 8 * 8
        assert m.opt.y.untyped_storage().nbytes() == 3 * 8 and not m.opt.deferred


def test_resume_from_either(tmp_path):
    "A file that a stack wrote is gone on with alone, and the reverse; streams and numbers are in it"
    files = [tmp_path / f"{i}.pt" for i in range(2)]
    whole = [member(seed=s) for s in range(2)]
    for m in whole:
        alone(m)
    for first, then in ((train_many, alone), (alone, train_many)):
        for act, steps, resume in ((first, 6, False), (then, 12, True)):
            members = [member(seed=s, file=f) for s, f in enumerate(files)]
            options = {"steps": steps, "evaluations": 1, "resume": resume}
            train_many(members, **QUIET | options) if act is train_many else [alone(m, **options) for m in members]
        for m, other in zip(members, whole, strict=True):
            assert_same(m, other)
    assert max(f.stat().st_size for f in files) < 20_000


def test_an_undisturbed_stack_and_a_resumed_one_are_the_same_bytes(tmp_path):
    def run(name, **kw):
        members = [member(make, s, file=tmp_path / f"{name}{i}{s}.pt")
                   for i, make in enumerate((SSLALM, SwitchingSubgradient)) for s in range(2)]
        return members, train_many(members, **QUIET | kw)
    (a, runs), _ = run("a"), run("b", steps=8, evaluations=2)
    b, again = run("b", resume=True)
    for m, other in zip(a, b, strict=True):
        assert all(map(torch.equal, numbers(m), numbers(other)))
    assert [r.record.rows for r in runs] == [r.record.rows for r in again]


class Spoilt:
    "Streams of which one batch has a NaN in it"
    def __init__(self, streams, t):
        self.streams, self.at = streams, t

    def draw(self, k):
        batches = self.streams.draw(k)
        return [b._replace(x=b.x * math.nan) for b in batches] if self.streams.t == self.at else batches

    def state_dict(self):
        return self.streams.state_dict()

    def load_state_dict(self, state):
        self.streams.load_state_dict(state)


@pytest.mark.parametrize("at", [2, 8])
@pytest.mark.parametrize("make", [SSLALM, METHODS["adam"]])
def test_a_nan_in_one_run(make, at):
    "It is named, or ends that run, or a step of it is left out; the others do not notice"
    def makes():
        members = [member(make, s) for s in range(3)]
        members[1].streams = Spoilt(members[1].streams, at)
        return members
    with pytest.raises(FloatingPointError, match="^seed 1: expected finite"):
        train_many(makes(), **QUIET)
    other = member(make, 2)
    alone(other)
    for nonfinite in ("drop", "skip"):
        members = makes()
        runs = train_many(members, **QUIET, nonfinite=nonfinite)
        assert [r.finished for r in runs] == [True, nonfinite == "skip", True]
        assert runs[1].skipped == (nonfinite == "skip") and not runs[0].skipped
        assert_same(members[2], other)


def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    "Runs that have not begun say so; what was begun goes on to the same end"
    import os
    import signal
    files = [tmp_path / f"{i}.pt" for i in range(4)]
    def makes():
        return [member(make, s, file=files[2 * i + s])
                for i, make in enumerate((SSLALM, SwitchingSubgradient)) for s in range(2)]
    members, count = makes(), [0]
    def evaluate():
        count[0] += 1
        if count[0] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return {"w": members[0].model[0].weight.sum()}
    members[0].evaluate = evaluate
    runs = train_many(members, **QUIET)
    assert [r.interrupted for r in runs] == [True] * 4 and [f.exists() for f in files] == [True, True, False, False]
    members, others = makes(), [member(make, s) for make in (SSLALM, SwitchingSubgradient) for s in range(2)]
    assert all(r.finished for r in train_many(members, **QUIET, resume=True))
    for m, other in zip(members, others, strict=True):
        alone(other)
        assert_same(m, other)


def test_seconds_are_for_single_runs():
    runs = train_many([member(seed=s) for s in range(2)], seconds=.05, evaluations=2, progress=False)
    assert all(r.finished and r.seconds >= .05 for r in runs)


def test_processes():
    pytest.importorskip("joblib")
    members, others = ([member(make, s) for make in (SSLALM, SwitchingSubgradient) for s in range(2)] for _ in range(2))
    runs = train_many(members, **QUIET, jobs=2)
    assert all(r.finished for r in runs)
    for m, other in zip(members, others, strict=True):
        alone(other)
        assert_same(m, other)


def test_compiled():
    members, others = ([member(seed=s) for s in range(2)] for _ in range(2))
    assert all(r.compiling > 0 for r in train_many(members, **QUIET, compiled=True))
    for m, other in zip(members, others, strict=True):
        alone(other)
        assert_same(m, other)


def test_compare_and_tune():
    "With `many` the table is the same but for rounding"
    from types import SimpleNamespace

    from hctrain import Batch
    data = SimpleNamespace(train=Batch(X[:500].float(), Y[:500].float(), G[:500]), n_groups=3,
                           test=Batch(X[500:].float(), Y[500:].float(), G[500:]))
    def network(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    setting = Setting(seconds=None, steps=20, seeds=2, evaluations=2, per_group=8)
    algorithms = [ALGORITHMS[name] for name in ("adam", "sslalm", "ghost")]
    tables = [compare(data, network, algorithms, setting, progress=False, many=many) for many in (None, train_many)]
    a, b = ([line.split(",") for line in long_table(t).splitlines()[1:]] for t in tables)
    assert [row[:3] for row in a] == [row[:3] for row in b]
    np.testing.assert_allclose(*(np.array([row[3:] for row in t], dtype=float) for t in (a, b)), atol=1e-4)
    chosen = [tune(data, network, ALGORITHMS["alm"], setting, 3, many=many)[0].options for many in (None, train_many)]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("what", ["model", "opt", "streams", "checkpoint"])
def test_runs_share_nothing(what, tmp_path):
    a, b = member(), member(seed=1)
    setattr(b, what, getattr(a, what))
    if what == "checkpoint":
        a.checkpoint = b.checkpoint = tmp_path / "run.pt"
    with pytest.raises(ValueError, match=f"expected runs with a {what} of their own"):
        train_many([a, b], **QUIET)
    assert a.streams.t == 0


@pytest.mark.parametrize("members", [[], "runs", {"model": None}])
def test_lists_of_runs(members):
    with pytest.raises(TypeError, match="expected a list of runs"):
        train_many(members, **QUIET)
