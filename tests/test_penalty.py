"""Penalties and barriers: what a chapter cell shows badly."""
import io
import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from hctrain import Penalty, PenaltyBarrier, SmoothedPenalty, check_optimizer
from hctrain.penalty import BARRIERS, P_RULES, PENALTIES

METHODS = {
    "quadratic": partial(Penalty, growth=2., every=5, rho_max=6., tol=.05),
    "hinge": partial(Penalty, penalty="hinge", growth=3., every=4, rho_max=9., tol=.05),
    "smoothed": partial(SmoothedPenalty, rho=.5, growth=2., every=5, rho_max=6., tol=.05),
    "barrier": partial(PenaltyBarrier, epoch=6, y0=.5)}
by_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def weights(n=3):
    return torch.linspace(-1, 1, n, dtype=torch.float64).requires_grad_()


def step(opt, w, k):
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    c = lambda z: torch.stack([w.sum() + .1 * z[0] + .2, w.square().sum() + .1 * z[1] - 9])
    opt.zero_grad()
    if k % 2 == 0:                                                    # every other step keeps what it has
        opt.dual_step(c(z[0]).detach())
    opt.lagrangian((w - 1 - .1 * z[3, 0]).square().sum() / 2, c(z[1]), c(z[2]).detach()).backward()
    opt.step()


def everything(opt, w):
    return [w.detach().clone(), *(torch.as_tensor(getattr(opt, name)).clone() for name in opt.saved
                                  if isinstance(getattr(opt, name), (torch.Tensor, int, float)))]


@by_method
def test_resumes_wherever_it_was_saved(make):
    "Between two looks, across growth and its stop, across an epoch"
    w = weights()
    opt, saved = make([w], 2), {}
    for k in range(40):
        if k in (3, 11, 27):
            file = io.BytesIO()
            torch.save({"w": w.detach(), "opt": opt.state_dict()}, file)
            saved[k] = file.getvalue()
        step(opt, w, k)
    for k, file in saved.items():
        state, v = torch.load(io.BytesIO(file), weights_only=True), weights()
        twin = make([v], 2)
        v.data.copy_(state["w"])
        twin.load_state_dict(state["opt"])
        for j in range(k, 40):
            step(twin, v, j)
        assert all(torch.equal(a, b) for a, b in zip(everything(opt, w), everything(twin, v), strict=True)), k


@pytest.mark.parametrize("make, start, top", [(METHODS["quadratic"], 1., 6.), (METHODS["smoothed"], .5, 6.)])
def test_weights_grow_where_violated_and_stop(make, start, top):
    w = weights()
    opt, seen = make([w], 2), []
    for _ in range(60):
        opt.dual_step(torch.tensor([.3, -.3], dtype=torch.float64))   # x does not respond
        seen.append(opt.rho[0].item())
    assert seen == sorted(seen) and seen[:9] == [start] * 9 and seen[9] == 2 * start   # the first look only records
    assert opt.rho.tolist() == [top, start]


def test_growth_waits_while_the_violation_falls():
    opt = Penalty([weights()], 1, growth=2., every=1, gamma=1., tol=.05)
    rhos = []
    for c in (1., .8, .6, .58, .04, .04):
        opt.dual_step(torch.tensor([c], dtype=torch.float64))
        rhos.append(opt.rho.item())
    assert rhos == [1., 1., 1., 2., 2., 2.]


def test_growth_never_lowers_a_weight():
    opt = Penalty([weights()], 1, rho=1000., growth=2., every=1, rho_max=100.)
    for _ in range(3):
        opt.dual_step(torch.tensor([1.], dtype=torch.float64))
    assert opt.rho.item() == 1000.


@pytest.mark.parametrize("make", [partial(Penalty, rho=0.), partial(SmoothedPenalty, rho=0., growth=2., every=1)])
def test_weight_zero_is_plain_descent(make):
    w, v = weights(), weights()
    opt, sgd = make([w], 2, lr=.05), torch.optim.SGD([v], lr=.05)
    for k in range(5):
        step(opt, w, k)
        z = torch.randn(4, 2, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        sgd.zero_grad()
        ((v - 1 - .1 * z[3, 0]).square().sum() / 2).backward()
        sgd.step()
    assert_close(w, v, atol=1e-15, rtol=0)


@pytest.mark.parametrize("barrier, joint", [("log", -1 / 2), ("reciprocal", -1 / 3)])
def test_barriers_are_twice_differentiable(barrier, joint):
    "φ′ and its slope agree from both sides of the joint; φ′(0) = 1; φ′ is positive and increasing"
    slope, h = BARRIERS[barrier], 1e-6
    at = lambda t: slope(torch.tensor(t, dtype=torch.float64)).item()
    left, right = math.nextafter(joint, -1), math.nextafter(joint, 1)
    assert abs(at(right) - at(left)) < 1e-15
    assert abs((at(right + h) - at(right)) / h - (at(left) - at(left - h)) / h) < 1e-5
    assert at(0.) == 1
    values = slope(torch.linspace(-1e3, 1e3, 100_001, dtype=torch.float64))
    assert (values > 0).all() and (values.diff() > 0).all()


@pytest.mark.parametrize("p_rule", P_RULES)
def test_multipliers_and_widths_stay_in_their_ranges(p_rule):
    opt = PenaltyBarrier([weights()], 3, p_rule=p_rule, epoch=3, y_range=(1e-6, 10.), p_range=(.2, .9), y0=1e-6)
    gen = torch.Generator().manual_seed(0)
    for _ in range(100):
        opt.dual_step(torch.tensor([5., -5., 0.], dtype=torch.float64) + torch.randn(3, generator=gen).double())
        assert (opt.y >= 1e-6).all() and (opt.y <= 10).all() and (opt.p >= .2).all() and (opt.p <= .9).all()
    assert opt.y[0] == 10 and opt.y[1] == 1e-6


def test_the_barrier_weighs_with_multipliers_from_before():
    w = weights()
    opt = PenaltyBarrier([w], 1, y0=2., epoch=0)
    opt.dual_step(torch.tensor([3.], dtype=torch.float64))
    opt.lagrangian(w.sum(), w[:1] * 0)
    assert opt.w.item() == 2. and opt.y.item() > 2.


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_bad_values_are_not_read_as_feasible(penalty, bad):
    "NaN > 0 is False, and so a hinge's weight would be 0"
    w = weights()
    opt = Penalty([w], 2, penalty=penalty)
    with pytest.raises(FloatingPointError, match="got NaN or infinity in c2"):
        opt.lagrangian(w.sum(), w[:2], torch.tensor([0., bad], dtype=torch.float64))
    assert opt.w.tolist() == [0., 0.]


@by_method
def test_masks_on_a_device(make):
    "Deferred, as on an accelerator: what is not finite is left out and remembered"
    w = weights()
    opt = make([w], 2)
    opt.deferred = True
    for k in range(2):
        step(opt, w, k)
    opt.check()
    k, before = opt.k, [t for t in everything(opt, w) if t.dim()]
    bad = torch.tensor([math.nan, 1.], dtype=torch.float64)
    opt.zero_grad()
    opt.dual_step(bad)
    opt.lagrangian(w.sum(), w[:2], bad).backward()
    opt.step()
    after = [t for t in everything(opt, w) if t.dim()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and opt.k == k + 1
    with pytest.raises(FloatingPointError, match="since the last check"):
        opt.check()


@pytest.mark.parametrize("make, name, value", [
    (Penalty, "rho", -1.), (Penalty, "rho", math.nan), (Penalty, "growth", .9), (Penalty, "every", 0),
    (Penalty, "gamma", 1.1), (Penalty, "tol", -1.), (SmoothedPenalty, "width", -1.), (SmoothedPenalty, "rho_max", -1.),
    (PenaltyBarrier, "gamma", -.1), (PenaltyBarrier, "shrink", 1.5), (PenaltyBarrier, "epoch", -1),
    (PenaltyBarrier, "barrier", "augmented_lagrangian"), (PenaltyBarrier, "p_rule", "aimd"),
    (PenaltyBarrier, "y0", 101.), (PenaltyBarrier, "y_range", (0., 1.)), (PenaltyBarrier, "p_range", (1., .5)),
    (PenaltyBarrier, "mu", -1.)])
def test_settings_that_make_no_sense_are_refused(make, name, value):
    with pytest.raises(ValueError, match=rf"expected .*{name}.*got"):
        make([weights()], 2, **{name: value})


def test_an_equality_is_weighed_from_both_sides():
    w, eq = weights(), torch.tensor([False, True])
    for penalty, expected in (("hinge", [0., -1.]), ("quadratic", [0., -.5])):
        opt = Penalty([w], 2, penalty=penalty, equality=eq)
        opt.lagrangian(w.sum(), w[:2], torch.tensor([-.5, -.5], dtype=torch.float64))
        assert opt.w.tolist() == expected
    opt = SmoothedPenalty([w], 2, rho=3., width=1., equality=eq, growth=2., every=1)
    for _ in range(2):
        opt.dual_step(torch.tensor([-.5, -.5], dtype=torch.float64))
    assert opt.rho.tolist() == [3., 6.]
    opt.lagrangian(w.sum(), w[:2])
    assert opt.y.tolist() == [0., -3.]


def test_the_bracket_follows_without_lag():
    opt = SmoothedPenalty([weights()], 1)
    for k in range(50):
        opt.dual_step(torch.tensor([float(k)]), torch.tensor([float(k - 1)]) if k else None)
    assert_close(opt.u, torch.tensor([49.], dtype=torch.float64))


def test_a_heavy_quadratic_penalty_keeps_the_contract():
    check_optimizer(partial(Penalty, rho=20.))
