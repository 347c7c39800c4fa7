"""Faults that were once there, each held down by a test."""
import copy
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hctrain import (
    SSLALM,
    Batch,
    Box,
    Lagrangian,
    Penalty,
    Proxy,
    RateGap,
    Simplex,
    StochasticGhost,
    Streams,
    SwitchingSubgradient,
    WeightedBCE,
    kkt_residual,
    positive_rate,
    project_after,
)
from hctrain.compare import ALGORITHMS, Setting, compare, hold_out
from hctrain.evaluate import evaluate
from hctrain.optimizer import Descent
from hctrain.projection import Around, Intersection
from hctrain.train import train


def weights(n=3):
    return torch.ones(n, dtype=torch.float64, requires_grad=True)


def step(opt, w, looked_at=0):
    f, c = lambda: w.square().sum(), lambda: w.sum()[None] - 9   # with room to spare: the slack moves
    opt.zero_grad()
    opt.dual_step(c().detach())
    for _ in range(looked_at):
        opt.lagrangian(f(), c() + 5)
    opt.lagrangian(f(), c()).backward()
    opt.step()


def test_a_closure_leaves_no_graph():
    w = weights()
    opt = SSLALM([w], m=1)

    def closure():
        opt.zero_grad()
        loss = opt.lagrangian(w.square().sum(), w.sum()[None] - 1)
        loss.backward()
        return loss
    opt.step(closure)
    copy.deepcopy(w)
    assert not w.grad.requires_grad


def test_a_multiplier_that_overflows_restarts():
    opt = SSLALM([torch.ones(2, requires_grad=True)], m=1, dual_lr=10.)
    opt.dual_step(torch.tensor([1e38]))
    assert opt.y.item() == 0
    with pytest.raises(ValueError, match="expected dual_lr"):
        opt.dual_lr = math.nan


def test_a_lagrangian_that_is_looked_at_changes_nothing():
    a, b = weights(), weights()
    one, two = SSLALM([a], m=1), SSLALM([b], m=1)
    for _ in range(3):
        step(one, a)
        step(two, b, looked_at=2)
    assert torch.equal(a, b) and torch.equal(one.s, two.s)


@pytest.mark.parametrize("other", [lambda w: SSLALM(torch.optim.Adam([w]), m=1),
                                   lambda w: SwitchingSubgradient([w], m=1)])
def test_a_state_over_another_optimizer_is_refused(other):
    w = weights()
    with pytest.raises(ValueError, match="expected the state of"):
        SSLALM([w], m=1).load_state_dict(other(w).state_dict())


@pytest.mark.parametrize("project", [5, "x", Box])
def test_what_cannot_project_is_refused(project):
    with pytest.raises(TypeError, match="expected project"):
        SSLALM([weights()], m=1, project=project)


def test_a_frozen_tensor_keeps_its_place_in_a_projection():
    w, v = weights(), weights()
    centre = [torch.zeros(3, dtype=torch.float64), torch.full((3,), 9., dtype=torch.float64)]
    opt = SSLALM([w, v], m=1, project=Around(centre, Box(-.1, .1)))
    v.requires_grad_(False)
    step(opt, w)
    assert (w.abs() <= .1).all() and (v == 1).all()


def test_options_of_a_group_are_checked():
    with pytest.raises(ValueError, match="expected constraint_lr"):
        SwitchingSubgradient([{"params": [weights()], "constraint_lr": -1.}], m=1)
    with pytest.raises(ValueError, match="got weight_decay"):
        SSLALM([{"params": [weights()], "weight_decay": .1}], m=1)


def test_one_cycle_finds_the_momentum():
    w = weights()
    opt = SSLALM(torch.optim.SGD([w], lr=.1, momentum=.9), m=1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=.1, total_steps=5)
    step(opt, w)
    schedule.step()
    assert opt.param_groups[0]["momentum"] < .95


def task(opt, per_group=4):
    gen = torch.Generator().manual_seed(0)
    x, g = torch.randn(60, 2, generator=gen), torch.arange(60) % 2
    model = nn.Linear(2, 1)
    streams = Streams(x, (x[:, 0] > 0).float(), g, per_group=per_group)
    return model, opt(model.parameters()), WeightedBCE(), RateGap(positive_rate, 2, reference="batch"), streams


def test_a_refused_resume_changes_nothing(tmp_path):
    file, quiet = tmp_path / "run.pt", dict(steps=3, progress=False)
    train(*task(lambda p: SSLALM(p, m=2)), checkpoint=file, **quiet)
    parts = task(lambda p: SwitchingSubgradient(p, m=2))
    before = copy.deepcopy(parts[0].state_dict())
    with pytest.raises(ValueError, match="expected the state of Switching"):
        train(*parts, checkpoint=file, resume=True, **quiet)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), parts[0].state_dict().values(), strict=True))


def test_train_says_what_it_cannot_take():
    model, opt, loss, gaps, streams = task(lambda p: SSLALM(p, m=2))
    with pytest.raises(TypeError, match="expected streams with draw"):
        train(model, opt, loss, gaps, [1, 2], steps=1, progress=False)
    with pytest.raises(ValueError, match="expected gaps for SSLALM"):
        train(model, opt, loss, None, streams, steps=1, progress=False)
    with pytest.raises(TypeError, match="got LBFGS"):
        train(model, torch.optim.LBFGS(model.parameters()), loss, gaps, streams, steps=1, progress=False)


def test_labels_of_a_comparison_differ():
    with pytest.raises(ValueError, match="different labels"):
        compare(None, None, [ALGORITHMS["adam"]] * 2)


def test_a_residual_with_nan_is_nan():
    one = torch.ones(1)
    assert math.isnan(kkt_residual(torch.ones(2), torch.ones(1, 2), torch.tensor([math.nan]), one).worst)
    with pytest.raises(ValueError, match="expected equality"):
        kkt_residual(torch.ones(2), torch.ones(2, 2), torch.ones(2), torch.ones(2), torch.tensor([True]))


@pytest.mark.parametrize(("dtype", "n", "value"), [(torch.bfloat16, 1000, .5), (torch.float16, 10_000, 8.)])
def test_projections_hold_in_half_precision(dtype, n, value):
    x = torch.full((n,), value, dtype=dtype)
    Simplex(1.)([x])
    assert abs(x.double().sum() - 1) < .05


def test_sets_may_return_nothing():
    def halve(tensors):
        for t in tensors:
            t.mul_(.5)
    x = torch.ones(2)
    Intersection((halve,), sweeps=1)([x])
    assert (x == .5).all()


def test_an_optimizer_without_hooks_is_refused():
    with pytest.raises(TypeError, match="expected an optimizer with step hooks"):
        project_after(Descent([weights()], lr=.1), Box(0, 1))


def test_evaluation_counts_every_row():
    with pytest.raises(ValueError, match="as many rows in x, y and g"):
        evaluate(nn.Linear(2, 1), Batch(torch.ones(9, 2), torch.ones(3), torch.zeros(3, dtype=torch.int64)))


@pytest.mark.parametrize("method", [lambda p: SSLALM(p, m=2), lambda p: SwitchingSubgradient(p, m=2, tol=9.),
                                    lambda p: SSLALM(torch.optim.Adam(p), m=2), lambda p: StochasticGhost(p, m=4)])
def test_annealed_runs_resume_bit_for_bit(method, tmp_path):
    "Ctrl-C half-way, and the rest later; no warning about a torch optimizer that has not stepped yet"
    def go(pressing=False, resume=False):
        torch.manual_seed(0)
        parts, times = list(task(method)), []
        if isinstance(parts[1], StochasticGhost):
            parts[3] = RateGap(positive_rate, 2, reference="batch", two_sided=True)
        streams, loss = parts[4], parts[2]

        def pressed(out, batch):
            if pressing and streams.t > 20 and not times:
                times.append(signal.raise_signal(signal.SIGINT))
            return loss(out, batch)
        parts[2] = pressed
        run = train(*parts, steps=40, anneal=True, checkpoint=tmp_path / "run.pt", resume=resume, progress=False)
        return [p.detach() for p in parts[0].parameters()], parts[1].param_groups[0]["lr"], run.finished
    whole, lr, _ = go()
    assert not go(pressing=True)[2]
    again, _, finished = go(resume=True)
    assert finished and lr == 0 and all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_a_proxy_reaches_the_weights():
    "Decisions as true values change multipliers and penalties; Stochastic Ghost has no use for them and says so"
    def go(method, bound, draws):
        torch.manual_seed(0)
        model, opt, loss, gaps, streams = task(method)
        hard = RateGap(positive_rate, 2, bound, reference="batch", hard=True)
        train(model, opt, loss, Proxy(gaps, hard), streams, steps=20, draws=draws, progress=False)
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    for method in (lambda p: Lagrangian(p, m=2), lambda p: Penalty(p, m=2)):
        for draws in (1, 2, 3):
            assert not torch.equal(go(method, .01, draws), go(method, .9, draws))
    with pytest.raises(ValueError, match="got a Proxy"):
        go(lambda p: StochasticGhost(p, m=2), .01, 3)


def test_a_comparison_goes_on_with_its_own_runs_only(tmp_path):
    gen = torch.Generator().manual_seed(0)
    x, g = torch.randn(200, 2, generator=gen), torch.arange(200) % 2
    rows = Batch(x, (x[:, 0] > 0).float(), g)
    data = SimpleNamespace(train=rows, test=rows, n_groups=2)
    setting, a = Setting(seconds=None, steps=5, evaluations=1), ALGORITHMS["alm"]
    go = lambda a: compare(data, lambda seed: nn.Linear(2, 1), [a], setting, tmp_path, resume=True, progress=False)
    go(a), go(a)
    with pytest.raises(ValueError, match="choose another folder"):
        go(a._replace(options={"lr": .01}))


def test_tuning_sets_aside_rows_of_every_group():
    g = torch.tensor([0] * 100 + [1] * 5)
    rows = Batch(torch.zeros(105, 1), torch.zeros(105), g)
    part = hold_out(SimpleNamespace(train=rows, test=None, n_groups=2))
    assert part.test.g.bincount().tolist() == [20, 1] and part.train.g.bincount().tolist() == [80, 4]
    with pytest.raises(ValueError, match="expected groups of which"):
        hold_out(SimpleNamespace(train=Batch(*(t[:101] for t in rows)), test=None, n_groups=2))


def test_schedulers_and_annealing_do_not_meet():
    model, opt, *rest = task(lambda p: SSLALM(p, m=2))
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, .9)
    with pytest.raises(ValueError, match="got both"):
        train(model, opt, *rest, steps=2, schedulers=[schedule], anneal=True, progress=False)
