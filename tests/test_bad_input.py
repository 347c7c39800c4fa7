"""What makes no sense is refused: the right exception, a sentence with expected, got and remedy; nothing changes."""
import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, Adam

from hctrain import (
    SSLALM,
    Box,
    MeanGap,
    Proxy,
    RateGap,
    SkipNonFinite,
    StochasticGhost,
    Streams,
    SwitchingSubgradient,
    WeightedBCE,
    kkt_residual,
    positive_rate,
    project_after,
    toys,
    true_positive_rate,
)
from hctrain.compare import ALGORITHMS, Setting, compare
from hctrain.problem import same
from hctrain.train import Checkpoint, train

NAN, INF = math.nan, math.inf


def weights(n=3):
    return torch.ones(n, dtype=torch.float64, requires_grad=True)


class Task:
    "A network of two weights with two constraints, after three steps, and everything that may not change"
    def __init__(self, make=SSLALM, **options):
        self.w = weights(2)
        self.opt = make([self.w], 2, **options)
        for _ in range(3):
            self.opt.zero_grad()
            self.opt.dual_step(self.c().detach() + .1)
            self.opt.lagrangian(self.f(), self.c()).backward()
            self.opt.step()
        self.opt.zero_grad()
        self.opt.dual_step(self.c().detach() + .1)

    def f(self):
        return (self.w ** 2).sum()

    def c(self):
        return self.w - .5

    def state(self):
        return copy.deepcopy([self.w.detach(), self.opt.state_dict()])

    def dual(self, c0):
        return lambda: self.opt.dual_step(c0(self.c().detach()))

    def lagrangian(self, f=lambda f: f, c1=lambda c: c, c2=lambda c: None):
        return lambda: self.opt.lagrangian(f(self.f()), c1(self.c()), c2(self.c().detach()))

    def gradient(self, g):
        self.opt.lagrangian(self.f(), self.c()).backward()
        self.w.grad[0] = g
        return self.opt.step

    def load(self, change):
        return lambda: self.opt.load_state_dict(change(self.opt.state_dict()))


def method(**changes):
    return lambda state: {**state, "method": {**state["method"], **changes}}


# --- hyper-parameters: arguments of the class, the exception
SETTINGS = {
    "lr below 0": (SSLALM, dict(lr=-.1), ValueError), "lr NaN": (SSLALM, dict(lr=NAN), ValueError),
    "lr infinite": (SSLALM, dict(lr=INF), ValueError), "lr a string": (SSLALM, dict(lr="0.1"), ValueError),
    "lr True": (SSLALM, dict(lr=True), ValueError), "lr of two": (SSLALM, dict(lr=torch.ones(2)), ValueError),
    "dual_lr below 0": (SSLALM, dict(dual_lr=-1.), ValueError), "dual_lr NaN": (SSLALM, dict(dual_lr=NAN), ValueError),
    "rho below 0": (SSLALM, dict(rho=-1.), ValueError), "rho NaN": (SSLALM, dict(rho=NAN), ValueError),
    "mu below 0": (SSLALM, dict(mu=-1.), ValueError), "mu infinite": (SSLALM, dict(mu=INF), ValueError),
    "beta above 1": (SSLALM, dict(beta=1.5), ValueError), "beta below 0": (SSLALM, dict(beta=-.1), ValueError),
    "dual_bound 0": (SSLALM, dict(dual_bound=0.), ValueError),
    "dual_bound below 0": (SSLALM, dict(dual_bound=-1), ValueError),
    "m 0": (SSLALM, dict(m=0), ValueError), "m below 0": (SSLALM, dict(m=-2), ValueError),
    "m not whole": (SSLALM, dict(m=2.), ValueError), "m a string": (SSLALM, dict(m="2"), ValueError),
    "m True": (SSLALM, dict(m=True), ValueError),
    "no parameters": (SSLALM, dict(params=[]), ValueError),
    "an empty generator": (SSLALM, dict(params=iter(())), ValueError),
    "a tensor as parameters": (SSLALM, dict(params=weights()), TypeError),
    "a module as parameters": (SSLALM, dict(params=nn.Linear(2, 1)), TypeError),
    "nested": (SSLALM, dict(params=SSLALM([weights()], 1)), TypeError),
    "an unknown option of a group": (SSLALM, dict(params=[dict(params=[weights()], decay=.1)]), ValueError),
    "a group with mu below 0": (SSLALM, dict(params=[dict(params=[weights()], mu=-1.)]), ValueError),
    "unknown inequality": (SSLALM, dict(inequality="hinge"), ValueError),
    "equality a list": (SSLALM, dict(equality=[True, False]), ValueError),
    "equality of numbers": (SSLALM, dict(equality=torch.ones(2)), ValueError),
    "equality too short": (SSLALM, dict(equality=torch.tensor([True])), ValueError),
    "project a number": (SSLALM, dict(project=3), TypeError), "project a class": (SSLALM, dict(project=Box), TypeError),
    "constraint_lr NaN": (SwitchingSubgradient, dict(constraint_lr=NAN), ValueError),
    "tol below 0": (SwitchingSubgradient, dict(tol=-.1), ValueError),
    "unknown schedule": (SwitchingSubgradient, dict(schedule="linear"), ValueError),
    "unknown output": (SwitchingSubgradient, dict(output="best"), ValueError),
    "other weights": (SwitchingSubgradient, dict(constraint_optimizer=Adam([weights()])), ValueError),
    "branchless and random": (SwitchingSubgradient, dict(branchless=True, output="random"), ValueError),
}

# --- values: what is called, with what, the exception
VALUES = {
    "c0 NaN": (lambda t: t.dual(lambda c: c * NAN), FloatingPointError),
    "c0 infinite": (lambda t: t.dual(lambda c: c + INF), FloatingPointError),
    "c0 (m, 1)": (lambda t: t.dual(lambda c: c[:, None]), ValueError),
    "c0 scalar": (lambda t: t.dual(lambda c: c.sum()), ValueError),
    "c0 too long": (lambda t: t.dual(lambda c: torch.cat([c, c])), ValueError),
    "c0 list": (lambda t: t.dual(lambda c: c.tolist()), TypeError),
    "c0 None": (lambda t: t.dual(lambda c: None), TypeError),
    "c0 integers": (lambda t: t.dual(lambda c: c.long()), TypeError),
    "c0 elsewhere": (lambda t: t.dual(lambda c: c.to("meta")), ValueError),
    "c1 detached": (lambda t: t.lagrangian(c1=lambda c: c.detach()), ValueError),
    "c1 NaN": (lambda t: t.lagrangian(c1=lambda c: c * NAN), FloatingPointError),
    "c1 (m, 1)": (lambda t: t.lagrangian(c1=lambda c: c[:, None]), ValueError),
    "c1 scalar": (lambda t: t.lagrangian(c1=lambda c: c.sum()), ValueError),
    "c1 list": (lambda t: t.lagrangian(c1=lambda c: [1., 2.]), TypeError),
    "c1 a function of nothing good": (lambda t: t.lagrangian(c1=lambda c: lambda: None), TypeError),
    "c2 NaN": (lambda t: t.lagrangian(c2=lambda c: c * NAN), FloatingPointError),
    "c2 too short": (lambda t: t.lagrangian(c2=lambda c: c[:1]), ValueError),
    "c2 a function": (lambda t: t.lagrangian(c2=lambda c: lambda: c), TypeError),
    "f NaN": (lambda t: t.lagrangian(f=lambda f: f * NAN), FloatingPointError),
    "f infinite": (lambda t: t.lagrangian(f=lambda f: f + INF), FloatingPointError),
    "f not reduced": (lambda t: t.lagrangian(f=lambda f: f[None]), ValueError),
    "f detached": (lambda t: t.lagrangian(f=lambda f: f.detach()), ValueError),
    "f a number": (lambda t: t.lagrangian(f=lambda f: f.item()), TypeError),
    "f a function of nothing": (lambda t: t.lagrangian(f=lambda f: lambda: None), TypeError),
    "gradient NaN": (lambda t: t.gradient(NAN), FloatingPointError),
    "gradient infinite": (lambda t: t.gradient(-INF), FloatingPointError),
    "a group as a list": (lambda t: lambda: t.opt.add_param_group([weights()]), TypeError),
    "a group with lr NaN": (lambda t: lambda: t.opt.add_param_group(dict(params=[weights()], lr=NAN)), ValueError),
    "a state that is none": (lambda t: t.load(lambda s: None), TypeError),
    "an empty state": (lambda t: t.load(lambda s: {}), ValueError),
    "a state of Adam": (lambda t: t.load(lambda s: Adam([t.w]).state_dict()), ValueError),
    "a state with another m": (lambda t: t.load(method(m=3)), ValueError),
    "a state of another class": (lambda t: t.load(method(**{"class": "SGD"})), ValueError),
    "a state with a number missing": (lambda t: t.load(
        lambda s: {**s, "method": {k: v for k, v in s["method"].items() if k != t.opt.saved[-1]}}), ValueError),
    "a state of other weights": (lambda t: t.load(method(shapes=[[[7]]])), ValueError),
    "a state of other groups": (lambda t: t.load(lambda s: {**s, "optimizers": s["optimizers"] * 2}), ValueError),
}
# the switching subgradient has no use for c2, nor for f where a constraint is violated
LAZY = {"c2 too short", "c2 a function", "f a function of nothing"}


def refused(call, error, state):
    before = state()
    with pytest.raises(error) as caught:
        call()
    said = str(caught.value)
    assert type(caught.value) is error
    assert "expected" in said and "got" in said and ": " in said, f"no sentence: {said}"
    assert same(before, state()), "refused, but something changed"


@pytest.mark.parametrize("what", SETTINGS)
def test_settings(what):
    cls, options, error = SETTINGS[what]
    given = {"params": [w := weights(2)], "m": 2} | options
    refused(lambda: cls(**given), error, w.detach().clone)


@pytest.mark.parametrize("make", [SSLALM, SwitchingSubgradient])
@pytest.mark.parametrize("what", VALUES)
def test_values(what, make):
    if not (make is SwitchingSubgradient and what in LAZY):
        task = Task(make)
        call, error = VALUES[what]
        refused(call(task), error, task.state)


def test_float64_into_float32():
    opt = SSLALM([torch.ones(2, requires_grad=True)], 2)
    refused(lambda: opt.dual_step(torch.ones(2).double()), TypeError, opt.state_dict)


def test_lagrangian_before_the_switch():
    w = weights(2)
    opt = SwitchingSubgradient([w], 2)
    refused(lambda: opt.lagrangian(w.sum(), w), RuntimeError, opt.state_dict)


# --- the loop, and what stands around it
def task(opt=SSLALM, m=2):
    gen = torch.Generator().manual_seed(0)
    x, g = torch.randn(60, 2, generator=gen), torch.arange(60) % 2
    model = nn.Linear(2, 1)
    streams = Streams(x, (x[:, 0] > 0).float(), g, per_group=4)
    return [model, opt(model.parameters(), m), WeightedBCE(), RateGap(positive_rate, 2, reference="batch"), streams]


def adam(params, m):
    return Adam(params)


AROUND = {
    "no budget": (dict(), ValueError), "two budgets": (dict(steps=3, seconds=1.), ValueError),
    "steps 0": (dict(steps=0), ValueError), "steps not whole": (dict(steps=2.5), ValueError),
    "seconds NaN": (dict(seconds=NAN), ValueError), "epochs below 0": (dict(epochs=-1), ValueError),
    "no evaluations": (dict(steps=3, evaluations=0), ValueError), "draws 4": (dict(steps=3, draws=4), ValueError),
    "resume from nothing": (dict(steps=3, resume=True), ValueError),
    "streams a list": (dict(steps=3, streams=[1]), TypeError), "gaps None": (dict(steps=3, gaps=None), ValueError),
    "another m": (dict(steps=3, opt=lambda p, m: SSLALM(p, 3)), ValueError),
    "L-BFGS": (dict(steps=3, opt=lambda p, m: LBFGS(p)), TypeError),
    "a NaN in the network": (dict(steps=3, nan=True), FloatingPointError),
    "a NaN in the network, under Adam": (dict(steps=3, nan=True, opt=adam), FloatingPointError),
    "a policy that is none": (dict(steps=3, nonfinite="ignore"), ValueError),
    "an optimizer of other weights": (dict(steps=3, opt=lambda p, m: SSLALM([weights()], m)), ValueError),
    "a torch optimizer of other weights": (dict(steps=3, opt=lambda p, m: Adam([weights()])), ValueError),
    "a class for an optimizer": (dict(steps=3, opt=lambda p, m: SSLALM), TypeError),
    "a name for an optimizer": (dict(steps=3, opt=lambda p, m: "adam"), TypeError),
    "an evaluation of nothing": (dict(steps=3, evaluate=lambda: None), TypeError),
    "an evaluation that is none": (dict(steps=3, evaluate="loss"), TypeError),
    "anneal a word": (dict(steps=3, anneal="yes"), TypeError), "schedulers 3": (dict(steps=3, schedulers=3), TypeError),
    "parts a list": (dict(steps=3, parts=[1]), TypeError),
    "parts without state": (dict(steps=3, parts={"a": 1}), TypeError),
    "parts of train's own": (dict(steps=3, parts={"model": nn.Linear(1, 1)}), ValueError),
}


@pytest.mark.parametrize("what", AROUND)
def test_train(what):
    given, error = AROUND[what]
    given = dict(given)
    model, opt, loss, gaps, streams = task(given.pop("opt", SSLALM))
    if given.pop("nan", False):
        with torch.no_grad():
            model.weight[0, 0] = NAN
    gaps, streams = given.pop("gaps", gaps), given.pop("streams", streams)
    refused(lambda: train(model, opt, loss, gaps, streams, progress=False, **given), error,
            lambda: [str(v) for v in model.state_dict().values()])


OTHERS = {
    "no seeds": (lambda: Setting(seeds=0), ValueError), "a bound below 0": (lambda: Setting(bound=-.1), ValueError),
    "half a row": (lambda: Setting(per_group=2.5), ValueError), "five draws": (lambda: Setting(draws=5), ValueError),
    "an odd reference": (lambda: Setting(reference="median"), ValueError),
    "a skip limit of 0": (lambda: SkipNonFinite(None, limit=0), ValueError),
    "a box upside down": (lambda: Box(1, 0), ValueError),
    "one tensor for a set": (lambda: Box(0, 1)(torch.ones(2)), TypeError),
    "a set for no optimizer": (lambda: project_after([weights()], Box(0, 1)), TypeError),
    "a Jacobian that does not fit": (lambda: kkt_residual(*[torch.ones(2)] * 4), ValueError),
    "a bound as text": (lambda: Setting(bound="0.05"), ValueError),
    "names to compare": (lambda: compare(None, None, ["adam"]), TypeError),
    "classes to compare": (lambda: compare(None, None, [SSLALM]), TypeError),
    "a dict to compare": (lambda: compare(None, None, ALGORITHMS), TypeError),
    "a box as text": (lambda: StochasticGhost([weights()], 1, box="1"), ValueError),
    "weights as text": (lambda: WeightedBCE("population"), ValueError),
    "functions for constraints": (lambda: Proxy(positive_rate, positive_rate), TypeError),
    "NumPy labels": (lambda: true_positive_rate(torch.zeros(2), torch.arange(2), torch.ones(2).numpy(), 2), ValueError),
    "a number for two means": (lambda: MeanGap(positive_rate, 2)(torch.zeros(2), None, .5), TypeError),
    "no such file": (lambda: Checkpoint("/nowhere/run.pt").load(), FileNotFoundError),
}


@pytest.mark.parametrize("what", OTHERS)
def test_others(what):
    call, error = OTHERS[what]
    refused(call, error, lambda: None)


def test_there_are_enough():
    assert len(SETTINGS) + len(VALUES) + len(AROUND) + len(OTHERS) >= 60


@pytest.mark.parametrize("make", [SSLALM, SwitchingSubgradient])
def test_a_skipped_step_is_no_step(make):
    toy = toys()["active"]

    def run(broken, never=()):
        x, gen = toy.x0.clone().requires_grad_(), torch.Generator().manual_seed(0)
        opt = make([x], toy.m)
        skip = SkipNonFinite(opt)
        for k in range(30):
            xi, z0, z1, z2 = toy.draw(gen)
            if k not in never:
                with skip:
                    nan = lambda part, k=k: NAN if broken.get(k) == part else 1.
                    opt.zero_grad()
                    opt.dual_step(toy.c(x.detach(), z0) * nan("c0"))
                    L = opt.lagrangian(toy.f(x, xi) * nan("f"), toy.c(x, z1) * nan("c1"), toy.c(x.detach(), z2))
                    L.backward()
                    x.grad.mul_(nan("gradient"))
                    opt.step()
        return x.detach(), opt.state_dict(), skip.count
    *seen, count = run({3: "c0", 9: "f", 15: "c1", 21: "gradient"})
    *unseen, _ = run({}, never=(3, 9, 15, 21))
    assert same(seen, unseen) and count == 4


def test_too_many_in_a_row_are_an_error():
    opt = SSLALM([weights(1)], 1)
    skip = SkipNonFinite(opt, limit=3)
    with pytest.raises(FloatingPointError):
        for _ in range(9):
            with skip:
                opt.dual_step(torch.tensor([NAN], dtype=torch.float64))
    assert skip.count == 3 and opt.y.item() == 0
