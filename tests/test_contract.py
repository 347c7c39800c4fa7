"""The batteries find what is broken: each variant below breaks one promise, and the sentence names it."""
import os

import pytest
import torch
from torch import Tensor

from hctrain import SSLALM, BalancedSampler, Streams, SwitchingSubgradient, check_optimizer, check_sampler
from hctrain.optimizer import RULES, Descent


class ForgetsMultiplier(SSLALM):
    saved = tuple(name for name in SSLALM.saved if name != "y")


class AliasesState(SSLALM):
    def state_dict(self):
        return {**super().state_dict(), "method": {**super().state_dict()["method"], "y": self.y}}


class TakesNaN(SSLALM):
    def finite(self, **tensors):
        return None


class WrongSign(SSLALM):
    def dual_step(self, c0):
        super().dual_step(-c0 if isinstance(c0, Tensor) else c0)


class SlackNotProjected(SSLALM):
    @torch.no_grad()
    def step_slack(self):
        if self.weights:
            self.s.sub_(self.slack_gradient(), alpha=self.param_groups[0]["lr"])
        self.weights.clear()


class IgnoresLateGroups(SSLALM):
    def add_param_group(self, group):
        if not hasattr(self, "device"):
            super().add_param_group(group)


class MovesTwice(SSLALM):
    def lagrangian(self, f, c1, c2=None):
        L = super().lagrangian(f, c1, c2)
        self.y.add_(c1.detach(), alpha=self.dual_lr)
        return L


class KeepsState(SSLALM):
    "A part of the state that lives outside of the optimizer"
    steps = 0

    def step(self, closure=None):
        type(self).steps += 1
        self.param_groups[0]["mu"] = 1 + type(self).steps % 3
        return super().step(closure)


class StepsFromItsOwnGradient(SSLALM):
    def lagrangian(self, f, c1, c2=None):
        L = super().lagrangian(f, c1, c2)
        params = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        self.mine = torch.autograd.grad(L, params, retain_graph=True, allow_unused=True)
        return L

    def step(self, closure=None):
        params = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        for p, mine in zip(params, self.mine, strict=True):
            p.grad = None if mine is None else mine.clone()
        return super().step(closure)


class HalfRefused(SSLALM):
    def load_state_dict(self, state):
        self.y.zero_()
        super().load_state_dict(state)


class DeafToDualSchedules(SSLALM):
    def dual_step(self, c0):
        super().dual_step(c0)
        self.y.add_(c0.detach(), alpha=.1)


class HidesItsNumbers(SSLALM):
    def __repr__(self):
        return f"HidesItsNumbers(m={self.m}, lr=0.05)"


class DependsOnTheProcess(SSLALM):
    def step(self, closure=None):
        self.param_groups[0]["mu"] = 1 + 1e-6 * os.getpid()
        return super().step(closure)


class NoGroupsAfterLoading(SSLALM):
    loaded = False

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.loaded = True

    def add_param_group(self, group):
        if not self.loaded:
            super().add_param_group(group)


class MovesWhatIsFrozen(SSLALM):
    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for g in self.param_groups for p in g["params"] if not p.requires_grad):
            p.mul_(1 - self.param_groups[0]["lr"])
        return super().step(closure)


class ProjectsTheFirst(SSLALM):
    def keep_in_set(self):
        if self.project is not None:
            self.project(self.param_groups[0]["params"][:1])


class WritesIntoValues(SSLALM):
    def dual_step(self, c0):
        super().dual_step(c0)
        c0.zero_()


class DeafToSchedules(SSLALM):
    def step(self, closure=None):
        for g in self.param_groups:
            g["lr"] = g.get("initial_lr", g["lr"])
        return super().step(closure)


class KeepsTheLoss(SSLALM):
    def step(self, closure=None):
        super().step(closure)


class DoublePrecisionOnly(SSLALM):
    def dual_step(self, c0):
        super().dual_step(c0.double())


class StepsByItself(SSLALM):
    "Whatever torch optimizer it is given"
    @torch.no_grad()
    def step(self, closure=None):
        if isinstance(self.primal, Descent):
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for p in (p for g in self.param_groups for p in g["params"]):
            p.sub_(p.grad, alpha=.05)
        return loss


class ReducesTheLoss(SSLALM):
    def lagrangian(self, f, c1, c2=None):
        return super().lagrangian(f.sum() if isinstance(f, Tensor) else f, c1, c2)


class TakesNaNGradients(SSLALM):
    def finite_gradients(self, grads):
        return None


class SkipsHalf(SSLALM):
    "A step that is skipped leaves the multipliers where they went; loading puts them back"
    def put_back(self, own):
        super().put_back(own if hasattr(self, "taking") else {k: v for k, v in own.items() if k != "y"})

    def _take(self, state):
        self.taking = True
        super()._take(state)
        del self.taking


class TakesAnySetting(SSLALM):
    def __init__(self, params, m, lr: float = .05, **options):
        super().__init__(params, m, abs(lr), **options)


class MasksNothing(SSLALM):
    "Tells of a NaN, but keeps it"
    def finite(self, **tensors):
        super().finite(**tensors)


@pytest.mark.parametrize(("broken", "rule"), [
    (ForgetsMultiplier, "resumes bit for bit from a state"), (AliasesState, "saves snapshots"),
    (TakesNaN, "refuses constraint values"), (WrongSign, "finds the known solutions"),
    (SlackNotProjected, "finds the known solutions"), (IgnoresLateGroups, "treats parameter groups as torch does"),
    (MovesTwice, "from parts whose gradients add up"), (KeepsState, "resumes bit for bit"),
    (StepsFromItsOwnGradient, "after clipping"), (HalfRefused, "refuses a state that does not fit"),
    (DeafToDualSchedules, "lets a scheduler drive its dual step"), (HidesItsNumbers, "shows its class"),
    (DependsOnTheProcess, "resumes bit for bit in a new process"),
    (NoGroupsAfterLoading, "added after loading and copying"), (MovesWhatIsFrozen, "leaves frozen"),
    (ProjectsTheFirst, "projects onto X"), (WritesIntoValues, "leaves the values that it is given alone"),
    (DeafToSchedules, "follows a learning-rate scheduler"), (KeepsTheLoss, "same step with a closure"),
    (DoublePrecisionOnly, "works in float64, float32"), (StepsByItself, "with any torch optimizer"),
    (ReducesTheLoss, "refuses losses and gradients"), (TakesNaNGradients, "refuses losses and gradients"),
    (SkipsHalf, "goes back to where it was"), (TakesAnySetting, "refuses hyper-parameters"),
    (MasksNothing, "where refusals wait")])
def test_broken_optimizers_are_named(broken, rule, monkeypatch):
    slow = {"finds the known solutions", "resumes bit for bit in a new process"} - {rule}
    monkeypatch.setattr(RULES, "rules", {k: v for k, v in RULES.rules.items() if k not in slow})
    with pytest.raises(AssertionError, match=f"the optimizer breaks the rule '[^']*{rule}"):
        check_optimizer(broken)


class NotRestored(BalancedSampler):
    def load_state_dict(self, state):
        super().load_state_dict({**state, "t": 0})


class SharedDraws(Streams):
    def draw(self, k=None):
        return super().draw(1) * (k or self.n)


class OneStepBehind(Streams):
    "The second stream gets what the first one had in the draw before"
    def draw(self, k=None):
        batches = super().draw(k)
        batches[1], self.last = getattr(self, "last", batches[1]), batches[0]
        return batches


class SharesItsState(BalancedSampler):
    def state_dict(self):
        self.saved = super().state_dict()
        return self.saved

    def draw(self):
        if hasattr(self, "saved"):
            self.saved["t"] += 1
        return super().draw()


class TakesAnyState(BalancedSampler):
    def load_state_dict(self, state):
        self.t = state["t"]


class Favours(BalancedSampler):
    "The first row of a batch is always the same"
    def draw(self):
        rows = super().draw()
        rows[0] = int(self.table._order[0])
        return rows


class Global(BalancedSampler):
    def draw(self):
        torch.rand(1)
        return super().draw()


class Swaps(Streams):
    def draw(self, k=None):
        return [b._replace(y=b.y.flip(0)) for b in super().draw(k)]


class Repeats(BalancedSampler):
    "Draws with replacement, and says the opposite"
    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.replacement = False


@pytest.mark.parametrize(("broken", "rule"), [
    (NotRestored, "goes on with the same draws"), (SharedDraws, "independent of each other"),
    (OneStepBehind, "goes on with the same draws|independent of each other"), (SharesItsState, "goes on with the same"),
    (TakesAnyState, "refuses the state of other data"), (Favours, "reaches every row"), (Global, "leaves all other"),
    (Swaps, "with their own labels"), (Repeats, "before the others had their turn")])
def test_broken_samplers_are_named(broken, rule):
    def make(x, y, g, seed):
        return broken(x, y, g, 3, seed=seed) if issubclass(broken, Streams) else broken(g, 3, seed=seed)
    with pytest.raises(AssertionError, match=f"the sampler breaks the rule '[^']*({rule})"):
        check_sampler(make)


def projected(params, m, **options):
    return SSLALM(params, m, inequality="projected", **options)


def random_output(params, m, **options):
    return SwitchingSubgradient(params, m, output="random", **options)


def test_every_rule_can_fail():
    "But for the one that needs a GPU"
    tried = [mark.args[1] for mark in test_broken_optimizers_are_named.pytestmark if mark.name == "parametrize"]
    named = [rule for _, rule in tried[0]]
    assert {rule for rule in RULES.rules if not any(part in rule for part in named)} == {
        "makes the same steps on a GPU, where there is one"}


@pytest.mark.parametrize("make", [projected, random_output])
def test_other_forms_keep_the_contract(make):
    assert len(check_optimizer(make)) >= len(RULES.rules) - 2      # no GPU; no dual step to schedule

