"""The batteries find what is broken: each variant below breaks one promise, and the sentence names it."""
import pytest
import torch
from torch import Tensor

from hctrain import SSLALM, BalancedSampler, Streams, SwitchingSubgradient, check_optimizer, check_sampler
from hctrain.optimizer import RULES


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


@pytest.mark.parametrize(("broken", "rule"), [
    (ForgetsMultiplier, "resumes bit for bit from a state"), (AliasesState, "saves snapshots"),
    (TakesNaN, "refuses constraint values"), (WrongSign, "finds the known solutions"),
    (SlackNotProjected, "finds the known solutions"), (IgnoresLateGroups, "treats parameter groups as torch does"),
    (MovesTwice, "from parts whose gradients add up"), (KeepsState, "resumes bit for bit"),
    (StepsFromItsOwnGradient, "after clipping"), (HalfRefused, "refuses a state that does not fit"),
    (DeafToDualSchedules, "lets a scheduler drive its dual step"), (HidesItsNumbers, "shows its class")])
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


@pytest.mark.parametrize("make", [projected, random_output])
def test_other_forms_keep_the_contract(make):
    assert len(check_optimizer(make)) >= len(RULES.rules) - 2      # no GPU; no dual step to schedule

