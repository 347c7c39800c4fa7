"""Stochastic Ghost against solvers that know nothing of it, and the faults of other implementations."""
import copy
import io
import math

import numpy as np
import osqp
import pytest
import scipy.sparse as sp
import torch
from scipy.optimize import linprog
from torch import nn

from hctrain import RateGap, StochasticGhost, Streams, WeightedBCE, positive_rate
from hctrain.ghost import (
    Levels,
    LinearRows,
    backward_passes,
    ghost_direction,
    interior_point,
    least_violation,
    nonnegative_qp,
)
from hctrain.train import train

INNER, BOX = .8, 10.
KINDS = ("plain", "infeasible", "nearly dependent", "opposite", "box", "equal", "short")


def case(kind, seed, m):
    "Gradients Z = [g; J] and values c of one random problem in n dimensions"
    n, gen = (3, 10, 40, 60)[seed % 4], torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)
    g, c, J = r(n), r(m), r(m, n)
    if kind == "infeasible":
        J *= 10. ** -(1 + seed % 4)
    if kind == "nearly dependent":      # of rank m / 2 up to 1e-2 ... 1e-8, with rows of different length
        J = r(m, (m + 1) // 2) @ r((m + 1) // 2, n) + 10. ** -(2 + seed % 7) * J
        J *= 10. ** r(m, 1).clamp(-1, 1)
    if kind == "opposite":
        h = m // 2
        J[h:2 * h], c[h:2 * h] = -J[:h], -c[:h] - .1
    if kind == "equal":
        J[1::2], c[1::2] = J[:1], c[:1]
    if kind == "box":
        g *= 30
    if kind == "short":
        g, c, J = 20 * g, .3 * c, .02 * J
    return torch.cat([g[None], J]), c


def highs(c, J):
    "t*"
    m, n = J.shape
    bounds = [(-INNER, INNER)] * n + [(0, None)]
    return linprog(np.r_[np.zeros(n), 1], np.c_[J, -np.ones(m)], -c, bounds=bounds, method="highs").x[-1]


def by_osqp(g, c, J, kappa, tau):
    "The direction, or None where OSQP gives up"
    (m, n), length = J.shape, np.linalg.norm(J, axis=1)
    solver = osqp.OSQP()
    solver.setup(tau * sp.eye(n, format="csc"), g, sp.csc_matrix(np.r_[J / length[:, None], np.eye(n)]),
                 np.r_[np.full(m, -np.inf), np.full(n, -BOX)], np.r_[(kappa - c) / length, np.full(n, BOX)],
                 eps_abs=1e-10, eps_rel=1e-10, max_iter=100_000, verbose=False, polishing=True)
    answer = solver.solve(raise_error=False)
    return torch.tensor(answer.x) if answer.info.status == "solved" else None


def check_subproblem(kind, seed, m, tau=1., lam=.5):
    "Against HiGHS and OSQP; whether OSQP had an answer"
    Z, c = case(kind, seed, m)
    g, J = Z[0], Z[1:]
    d, y, kappa, t = (v[0] for v in ghost_direction(Z[None], c[None], INNER, BOX, tau, lam))
    assert abs(t - highs(c.numpy(), J.numpy())) < 1e-6 * (1 + t)                  # HiGHS's own tolerance is 1e-7
    assert math.isclose(kappa, (1 - lam) * c.max().clamp(min=0) + lam * t, abs_tol=1e-12)
    over = c + J @ d - kappa
    assert over.max() < 1e-8 and d.abs().max() <= BOX and y.min() >= 0
    stationary = ((-(g + y @ J) / tau).clamp(-BOX, BOX) - d).abs().max()
    assert max(stationary, (y * over).abs().max()) < 1e-9 * (1 + g.abs().max()) / min(tau, 1)
    expected = by_osqp(g.numpy(), c.numpy(), J.numpy(), kappa.item(), tau)
    assert expected is None or (d - expected).abs().max() < 1e-6, (seed, m)
    return expected is not None


@pytest.mark.parametrize("kind", KINDS)
def test_subproblems_against_highs_and_osqp(kind):
    solved = [check_subproblem(kind, seed, m) for seed in range(10) for m in (1, 2, 5, 10, 50)]
    assert solved.count(False) <= 2


@pytest.mark.parametrize(("lam", "tau"), [(.2, 3.), (.9, .5)])
def test_other_curvatures_and_weights(lam, tau):
    solved = [check_subproblem(kind, seed, 5, tau, lam) for kind in KINDS for seed in range(4)]
    assert solved.count(False) <= 2


def test_sample_sets_do_not_influence_each_other():
    pairs = [case(kind, 2, 5) for kind in KINDS]
    together = ghost_direction(*(torch.stack(v) for v in zip(*pairs, strict=True)), INNER, BOX)
    for i, (Z, c) in enumerate(pairs):
        for a, b in zip(ghost_direction(Z[None], c[None], INNER, BOX), together, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=1e-9, atol=1e-9)


def test_no_constraints():
    Z, c = torch.tensor([[[3., -30.]]]).double(), torch.zeros(1, 0).double()
    d, y, kappa, t = ghost_direction(Z, c)
    assert d.tolist() == [[-3., 10.]] and y.shape == (1, 0) and kappa.tolist() == t.tolist() == [0.]


def test_gradients_that_vanish():
    "A constraint whose gradient is 0 cannot be reduced: kappa is its value, and the objective is free"
    d, y, kappa, t = ghost_direction(torch.tensor([[[1., 2.], [0., 0.]]]).double(), torch.tensor([[3.]]).double())
    assert d.tolist() == [[-1., -2.]] and abs(t - 3) < 1e-9 and abs(kappa - 3) < 1e-9


def test_nonnegative_qp_is_optimal():
    for m in (1, 2, 5, 10, 50):
        gen = torch.Generator().manual_seed(m)
        A, b = torch.randn(8, m, m + 3, generator=gen).double(), torch.randn(8, m, generator=gen).double()
        K = A @ A.mT
        u = nonnegative_qp(K, b)
        w = b - (K @ u[..., None])[..., 0]
        assert u.min() >= 0 and w.max() < 1e-9 and (u * w).abs().max() < 1e-9


def test_linear_program_at_scale():
    c, J = torch.tensor([.3, .2]).double(), torch.randn(2, 3000, generator=torch.Generator().manual_seed(0)).double()
    for scale in (1e-2, 1e-4):                   # HiGHS drops entries below 1e-9
        J = J / J.abs().sum(1).max() * scale
        assert abs(least_violation(c, J, INNER) - highs(c.numpy(), J.numpy())) < 1e-7
    z, _ = interior_point(torch.ones(3).double(), 0., torch.zeros(1, 3).double(), torch.ones(1).double(),
                          -torch.ones(3).double(), torch.ones(3).double())
    torch.testing.assert_close(z, -torch.ones(3).double())


def ride(steps, debias, seed=0):
    "Steps from one point on the boundary, where the true direction is 0: f = -x, c = x + noise"
    x, gen = torch.zeros(1, dtype=torch.float64, requires_grad=True), torch.Generator().manual_seed(seed)
    opt, d = StochasticGhost([x], m=1, lr=1., decay=0., debias=debias, seed=seed), []
    for _ in range(steps):
        opt.step(lambda n: (-x.sum(), x + torch.randn(n, generator=gen, dtype=torch.float64).mean() / 2))
        d.append(x.item())
        x.data.zero_()
    return np.mean(d) / (np.std(d) / steps ** .5)


def test_the_direction_is_unbiased():
    "4.5 standard errors: a false alarm once in 150,000 seeds"
    assert abs(ride(2000, debias=True)) < 4.5
    assert ride(600, debias=False) > 5


def test_a_step_is_the_debiased_combination():
    "Direction, multipliers and loss from the samples of one step, with the subproblems solved one by one"
    for seed in range(4):
        w, seen = torch.zeros(3, dtype=torch.float64, requires_grad=True), []
        (closure, _), opt = quadratic(w), StochasticGhost([w], m=3, lr=.1, seed=seed)
        def kept(n, closure=closure, w=w, seen=seen):
            f, c = closure(n)
            rows = [torch.autograd.grad(t, w, retain_graph=True)[0] for t in (f, *c)]
            seen.append((f.detach(), torch.stack(rows), c.detach()))
            return f, c
        p = opt.levels.p(opt.level)
        loss = opt.step(kept)
        f, Z, c = (torch.stack(v) for v in zip(*seen, strict=True))
        solve = lambda Z, c: [v[0] for v in ghost_direction(Z[None], c[None])[:2]]
        coarse, left, right, whole = (solve(*v) for v in [*zip(Z, c, strict=True), (Z[1:].mean(0), c[1:].mean(0))])
        d, y = (a + (e - (b + r) / 2) / p for a, b, r, e in zip(coarse, left, right, whole, strict=True))
        torch.testing.assert_close((w.detach(), opt.y, loss), (.1 * d, y, f[1:].mean()), rtol=1e-9, atol=1e-9)
        assert len({round(v, 9) for v in (f[0].item(), f[1:].mean().item(), f.mean().item())}) == 3


def test_levels():
    "From 0 on, and their probabilities add up to one under a cap"
    for alpha, cap in ((.6, 10), (.3, 4), (.9, 0), (.5, 30)):
        law = Levels(alpha, cap)
        assert math.isclose(sum(law.p(N) for N in range(cap + 1)), 1)
        assert law.draw(0.) == 0 and law.draw(1 - 1e-16) == cap
        edges = np.cumsum([law.p(N) for N in range(cap + 1)])[:8]
        assert all(law.draw(edge - 1e-9) == N and (N == cap or law.draw(edge + 1e-9) == N + 1)
                   for N, edge in enumerate(edges))
    assert Levels(.6, 60).cost < 7.001 and Levels(.3, 60).cost > 1e6


def quadratic(w):
    "closure(n) whose noise depends on the calls before it alone"
    gen = torch.Generator().manual_seed(0)
    def closure(n):
        z = torch.randn(n, 3, generator=gen, dtype=w.dtype).mean(0)
        return ((w - 1 - z) ** 2).sum() / 2, torch.stack([w.sum() - 1 + z[0], w[0] - .5 + z[1], -w[1]])
    return closure, gen


def test_resume_is_exact_and_processes_draw_alike():
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (closure, gen), opt = quadratic(w), StochasticGhost([w], m=3, seed=5, schedule="damped", decay=.1)
    for _ in range(20):
        opt.step(closure)
    file = io.BytesIO()
    torch.save((opt.state_dict(), w.detach(), gen.get_state()), file)
    state, v, noise = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    v.requires_grad_()
    (other_closure, other_gen), other = quadratic(v), StochasticGhost([v], m=3)
    other_gen.set_state(noise)
    other.load_state_dict(state)
    sizes = []
    for _ in range(40):
        assert other.sizes == opt.sizes
        sizes.append(tuple(opt.sizes))
        opt.step(closure)
        other.step(other_closure)
    assert torch.equal(v, w) and torch.equal(other.y, opt.y) and other.s == opt.s and len(set(sizes)) > 2


def test_step_rules():
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for schedule, decay, factors in (("power", .5, [1, 2 ** -.5, 3 ** -.5]), ("damped", .5, [1, .5, .375])):
        (closure, _), opt = quadratic(w), StochasticGhost([w], m=3, lr=.1, schedule=schedule, decay=decay)
        for factor in factors:
            assert math.isclose(opt.s, factor)
            opt.step(closure)


def test_rows_are_as_good_as_means():
    results = []
    for rows in (True, False):
        w, gen = torch.zeros(2, requires_grad=True), torch.Generator().manual_seed(0)
        opt = StochasticGhost([w], m=1)
        def closure(n, w=w, gen=gen, rows=rows):
            z = torch.randn(n, 2, generator=gen)
            f, c = (w - 1 - z).square().sum(1), (w.sum() - 1 + z[:, :1])
            return (f, c) if rows else (f.mean(), c.mean(0))
        for _ in range(10):
            opt.step(closure)
        results.append(w.detach())
    torch.testing.assert_close(*results)


def test_a_refused_step_asks_for_the_same_again():
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (closure, _), opt = quadratic(w), StochasticGhost([w], m=3)
    opt.step(closure)
    before, sizes = copy.deepcopy(opt.state_dict()), opt.sizes
    calls = []
    def spoilt(n):
        calls.append(n)
        f, c = closure(n)
        return f, c * (math.nan if len(calls) == 3 else 1)
    w0 = w.detach().clone()
    with pytest.raises(FloatingPointError, match="expected finite values, got NaN or infinity in c"):
        opt.step(spoilt)
    assert calls == sizes == opt.sizes and torch.equal(w, w0)
    assert opt.state_dict()["method"]["k"] == before["method"]["k"]


def test_sets_larger_than_a_part():
    model, sizes = networks()["plain"][0], [7, 1500, 2300]
    params, x = list(model.parameters()), torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(2))
    with (rows := LinearRows(model)):
        terms = [(o.square().mean(), o.sigmoid().mean()[None]) for o in model(x).split(sizes)]
        rows.calls_made = 1                             # so that a wrong sum is not noticed and mended
        torch.testing.assert_close(rows.jacobian(terms, params, sizes), backward_passes(terms, params),
                                   rtol=1e-4, atol=1e-6)


class Doubled(torch.autograd.Function):
    "An operation that vmap cannot do"
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * grad.sum().item() ** 0


def networks():
    torch.manual_seed(0)
    L = nn.Linear
    plain = nn.Sequential(L(4, 6), nn.ReLU(inplace=True), L(6, 5), nn.Tanh(), L(5, 1))
    frozen, biasless = copy.deepcopy(plain), nn.Sequential(L(4, 6, bias=False), nn.Sigmoid(), L(6, 1))
    frozen[0].requires_grad_(False)
    frozen[2].bias.requires_grad_(False)
    one, layer = L(4, 1), L(4, 4)
    wrapped = nn.utils.parametrizations.weight_norm(L(4, 1))
    return {"plain": (plain, True), "frozen": (frozen, True), "without bias": (biasless, True),
            "one layer": (one, True),
            "dropout": (nn.Sequential(L(4, 6), nn.Dropout(.5), L(6, 1)), True),
            "shared": (nn.Sequential(layer, layer, L(4, 1)), False), "weight norm": (wrapped, False),
            "two outputs": (nn.Sequential(L(4, 6), L(6, 2)), False),
            "rows mixed": (nn.Sequential(L(4, 6), nn.BatchNorm1d(6, affine=False), L(6, 1)), False),
            "scaled": (nn.Sequential(L(4, 6), nn.BatchNorm1d(6), L(6, 1)).eval(), False)}


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("vmap", [True, False])
def test_gradients_agree(name, vmap):
    model, fast = networks()[name]
    params, sizes = [p for p in model.parameters() if p.requires_grad], [4, 8, 8]
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    with (rows := LinearRows(model)):
        outs = model(x).split(sizes)
        heads = [o if vmap else Doubled.apply(o) for o in outs]
        terms = [(o.square().mean(), torch.stack([o.sigmoid().mean(), (o.mean() - .1).abs()])) for o in heads]
        for _ in range(2):
            torch.testing.assert_close(rows.jacobian(terms, params, sizes), backward_passes(terms, params),
                                       rtol=1e-5, atol=1e-6)
    assert rows.usable == fast and (not fast or rows.batched == vmap) and not model._forward_hooks


def task(model, method=StochasticGhost, per_group=2, two_sided=True, **options):
    gen = torch.Generator().manual_seed(0)
    x, g = torch.randn(600, 4, generator=gen), torch.arange(600) % 3 // 2
    x[:, 0] += g
    streams = Streams(x, (x.sum(1) > .5).float(), g, per_group=per_group)
    gaps = RateGap(positive_rate, 2, two_sided=two_sided, weights=streams.weights)
    opt = method(model.parameters(), m=gaps.m, **options)
    return model, opt, WeightedBCE(streams.weights), gaps, streams


def test_frozen_layers():
    model, _ = networks()["frozen"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(*task(model), steps=5, progress=False)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"2.weight", "4.weight", "4.bias"}


def test_batch_normalisation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
    parts = task(model, per_group=1)
    assert train(*parts, steps=20, progress=False).finished
    opt, before = parts[1], [p.clone() for p in model.parameters()]
    k, x = opt.k, torch.ones(1, 4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        opt.step(lambda n: (model(x).sum(), model(x)[0].repeat(4)))
    assert opt.k == k and all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_one_pass_trains_like_many(monkeypatch):
    def trained(usable):
        monkeypatch.setattr(LinearRows, "_fits", lambda self, *args: usable)
        model = copy.deepcopy(networks()["plain"][0]).double()
        model, opt, loss, gaps, streams = task(model)
        streams = Streams(streams.data.x.double(), streams.data.y, streams.data.g, per_group=2)
        train(model, opt, loss, gaps, streams, steps=15, progress=False)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(trained(True), trained(False), rtol=1e-9, atol=1e-9)


def test_groups_project_and_late_layers():
    w, b = (torch.full((2,), .4, requires_grad=True) for _ in range(2))
    opt = StochasticGhost([{"params": [w]}, {"params": [b], "lr": .1}], m=1, lr=.2,
                          project=lambda x: [p.clamp_(max=.45) for p in x])
    opt.step(lambda n: (-(w + b).sum(), w[:1] - 9))
    torch.testing.assert_close((w.detach(), b.detach()), (torch.full((2,), .45), torch.full((2,), .45)))
    late = torch.zeros(2, requires_grad=True)
    opt.add_param_group({"params": [late], "lr": 1.})
    opt.step(lambda n: (late.sum(), late[:1] - 9))
    torch.testing.assert_close(late.detach(), torch.full((2,), -(2 ** -.75)))


def test_what_is_frozen_keeps_its_place_under_a_projection():
    frozen, w = torch.full((2,), .9), torch.full((2,), .4, requires_grad=True)
    seen = []
    def project(tensors):
        seen.append([t.shape for t in tensors])
        for t in tensors:
            t.clamp_(max=.45)
    opt = StochasticGhost([frozen, w], m=1, project=project)
    opt.step(lambda n: (-w.sum(), w[:1] - 9))
    assert seen == [[frozen.shape, w.shape]]
    torch.testing.assert_close((frozen, w.detach()), (torch.full((2,), .9), torch.full((2,), .45)))


def test_rules_of_the_step_that_make_no_sense_are_refused():
    w = torch.zeros(1, requires_grad=True)
    for options in (dict(decay=1.01), dict(decay=-.1), dict(schedule="damped", decay=1.), dict(schedule="linear")):
        with pytest.raises(ValueError, match="expected (decay|schedule)"):
            StochasticGhost([w], m=1, **options)
    StochasticGhost([w], m=1, decay=1.)


def test_all_options_are_saved():
    options = dict(inner=.7, box=3., tau=2., lam=.3, alpha=.7, cap=4, batch=2, debias=False, schedule="damped",
                   decay=.2, seed=9)
    w = torch.zeros(1, requires_grad=True)
    opt, other = StochasticGhost([w], m=1, **options), StochasticGhost([w], m=1)
    other.load_state_dict(opt.state_dict())
    assert {k: getattr(other, k) for k in options} == options


@pytest.mark.parametrize("m", [1, 2, 3, 7])
def test_any_number_of_constraints(m):
    "Released code counted two"
    w = torch.zeros(m, dtype=torch.float64, requires_grad=True)
    opt = StochasticGhost([w], m=m)
    for _ in range(300):
        opt.step(lambda n: (((w - 2) ** 2).sum() / 2, w - 1))
    torch.testing.assert_close((w.detach(), opt.y), (torch.ones(m).double(), torch.ones(m).double()), atol=.02, rtol=0)
