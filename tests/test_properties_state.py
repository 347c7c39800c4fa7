"""A state goes round: whatever was drawn, saved and loaded, the next steps are the same to the last bit."""
import copy
import io

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from hctrain import SSLALM, SkipNonFinite, SwitchingSubgradient
from hctrain.problem import same
from hctrain.sslalm import INEQUALITIES
from hctrain.switching import SCHEDULES

quick = settings(max_examples=40, deadline=None, derandomize=True)
rates = st.floats(0, 2, allow_subnormal=False)
INNER = {"plain": lambda ps: ps, "SGD": lambda ps: torch.optim.SGD(ps, lr=.02, momentum=.9, nesterov=True),
         "Adam": lambda ps: torch.optim.Adam(ps, amsgrad=True), "Rprop": torch.optim.Rprop}


@st.composite
def optimizers(draw):
    "A function that makes an optimizer on some parameters, with drawn options; and m"
    m, inner = draw(st.integers(1, 4)), INNER[draw(st.sampled_from(list(INNER)))]
    if draw(st.booleans()):
        mask = draw(st.none() | st.lists(st.booleans(), min_size=m, max_size=m).map(torch.tensor))
        options = {"rho": draw(rates), "mu": draw(rates), "beta": draw(st.floats(0, 1)), "dual_lr": draw(rates),
                   "dual_bound": draw(st.floats(.1, 50)), "inequality": draw(st.sampled_from(list(INEQUALITIES)))}
        return lambda ps: SSLALM(inner(ps), m, lr=.05, equality=mask, **options), m
    options = {"tol": draw(rates), "schedule": draw(st.sampled_from(list(SCHEDULES))),
               "output": draw(st.sampled_from(["last", "random"])), "constraint_lr": draw(st.floats(0, .1))}
    return lambda ps: SwitchingSubgradient(inner(ps), m, **options), m


class Run:
    "Weights in two shapes under m constraints; step k sees noise that depends on k alone"
    def __init__(self, make, m):
        self.ps = [torch.ones(2, 2, dtype=torch.float64, requires_grad=True),
                   torch.full((3,), .5, dtype=torch.float64, requires_grad=True)]
        self.m, self.opt = m, make(self.ps)

    def c(self, z):
        return z * .3 + (self.ps[0].sum() * z[0] + self.ps[1].square().sum() - 1) / (1 + torch.arange(self.m))

    def go(self, ks, draws=3):
        for k in ks:
            noise = torch.randn(4, self.m, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
            c1 = self.c(noise[1])
            self.opt.zero_grad()
            self.opt.dual_step(self.c(noise[0]).detach() if draws == 3 else c1.detach())
            f = sum((p - 2).square().sum() for p in self.ps) / 20
            self.opt.lagrangian(f, c1, self.c(noise[2]).detach() if draws > 1 else None).backward()
            torch.nn.utils.clip_grad_norm_(self.ps, 1.)
            self.opt.step()
        return self

    def all(self):
        return copy.deepcopy([[p.detach() for p in self.ps], self.opt.state_dict()])


@quick
@given(optimizers(), st.integers(0, 12), st.sampled_from([1, 2, 3]))
def test_states_go_round(case, steps, draws):
    make, m = case
    a, b = Run(make, m).go(range(steps), draws), Run(make, m).go(range(100, 103), draws)
    file = io.BytesIO()
    torch.save(a.all(), file)
    weights, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    with torch.no_grad():
        torch._foreach_copy_(b.ps, weights)
    b.opt.load_state_dict(state)
    assert same(a.all(), b.all())
    twin, later = copy.deepcopy(a), range(steps, steps + 5)
    assert same(a.go(later, draws).all(), b.go(later, draws).all()) and same(a.all(), twin.go(later, draws).all())


@quick
@given(optimizers(), st.integers(0, 5), st.sampled_from(["c0", "f", "gradient"]))
def test_skipped_steps_leave_the_state_alone(case, steps, part):
    make, m = case
    run = Run(make, m).go(range(steps))
    before, skip = run.all(), SkipNonFinite(run.opt)
    nan = {name: float("nan") if name == part else 1. for name in ("c0", "f", "gradient")}
    with skip:
        run.opt.zero_grad()
        run.opt.dual_step(torch.full((m,), nan["c0"], dtype=torch.float64))
        total = sum(p.sum() for p in run.ps)
        run.opt.lagrangian(total * nan["f"], total.expand(m) * 1.).backward()
        run.ps[0].grad.mul_(nan["gradient"])
        run.opt.step()
    assert skip.count == 1 and same(before, run.all())
