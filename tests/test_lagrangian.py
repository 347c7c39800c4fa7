"""Lagrangians: what the chapter's cells do not show, and faults that other toolkits have."""
import copy
import io
import math

import pytest
import torch

from hctrain import PI, SSLALM, Lagrangian, check_optimizer, toys
from hctrain.lagrangian import SAFEGUARDS

MEMORIES = {"ascent": PI(), "first": PI(kp=10., nu=.5, start="first"), "zeros": PI(kp=10., nu=.5),
            "momentum": PI.momentum(.8)}
vector = lambda *v: torch.tensor(v, dtype=torch.float64)


def weights(n=3, dtype=torch.float64):
    return torch.ones(n, dtype=dtype, requires_grad=True)


def run(opt, x, toy, steps=200, seed=0):
    "The loop with three draws, from any state"
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        xi, z0, z1, z2 = toy.draw(gen)
        opt.zero_grad()
        opt.dual_step(toy.c(x.detach(), z0))
        opt.lagrangian(toy.f(x, xi), toy.c(x, z1), toy.c(x.detach(), z2)).backward()
        opt.step()
    return x.detach().clone(), opt.y.clone()


def made(make, name, **options):
    "A run of 200 noisy steps on a toy"
    toy = toys()[name]
    x = toy.x0.clone().requires_grad_()
    return run(make([x], m=toy.m, equality=toy.equality, **options), x, toy)


def test_contract():
    "The plain Lagrangian with momentum; the chapter has the augmented forms, control and tracking"
    check_optimizer(lambda params, m, **more: Lagrangian(params, m, rho=0., dual=PI.momentum(.5), **more))


# equivalences

@pytest.mark.parametrize("name", ["active", "mixed", "nonsmooth"])
def test_without_smoothing_sslalm_is_hpr(name):
    torch.testing.assert_close(made(Lagrangian, name), made(SSLALM, name, mu=0., inequality="projected"),
                               rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["active", "equality"])
def test_without_penalty_both_forms_are_descent_ascent(name):
    toy, gen = toys()[name], torch.Generator().manual_seed(0)
    x, y = toy.x0.clone().requires_grad_(), vector(0.)
    for _ in range(200):
        xi, z0, z1, _ = toy.draw(gen)
        y = y + .1 * toy.c(x.detach(), z0)
        y = y if toy.equality else y.clamp(min=0)
        g, = torch.autograd.grad(toy.f(x, xi) + y @ toy.c(x, z1), x)
        x.data.sub_(.05 * g)
    for form in ("hpr", "quadratic"):
        torch.testing.assert_close(made(Lagrangian, name, rho=0., form=form), (x.detach(), y), rtol=0, atol=1e-12)


def test_without_proportional_gain_the_memory_plays_no_part():
    runs = [made(Lagrangian, "mixed", dual=PI(nu=nu, start=start)) for nu in (0., .9) for start in ("zeros", "first")]
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=0, atol=0)


def test_tracking_is_an_average_that_starts_at_zero():
    opt = Lagrangian([weights()], m=1, track=.25, dual_lr=0., rho=1.)
    for value in (1., 2.):
        opt.dual_step(vector(value))
    seen = .75 * .25 * 1 + .25 * 2
    w, = torch.autograd.grad(opt.lagrangian(weights().sum(), c1 := weights(1), vector(4.)), c1)
    torch.testing.assert_close((opt.seen, w), (vector(seen), vector(.75 * seen + .25 * 4)))


# faults of other toolkits

def test_no_penalty_is_no_nan():
    "Cooper #106"
    w = weights()
    opt = Lagrangian([w], m=1, rho=0.)
    for _ in range(3):
        opt.zero_grad()
        opt.dual_step(vector(1.))
        opt.lagrangian(w.square().sum(), w.sum()[None]).backward()
        opt.step()
    assert w.isfinite().all() and opt.y.isfinite().all()


@pytest.mark.parametrize("start, wanted", [("zeros", [6., 9.5, 11.75]), ("first", [1., 2., 3.])])
@pytest.mark.parametrize("saved_after", [0, 1, 2])
def test_three_steps_of_pi_control_with_a_file_between(start, wanted, saved_after):
    "Cooper #107, and a first value that has to survive saving"
    make = lambda: Lagrangian([weights()], m=1, dual_lr=1., dual=PI(kp=10., nu=.5, start=start))
    opt, ys = make(), []
    for k in range(3):
        if k == saved_after:
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            opt = make()
            opt.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        opt.dual_step(vector(1.))
        ys.append(opt.y.item())
    assert ys == wanted


@pytest.mark.parametrize("dtype, kept", [(torch.float64, torch.float64), (torch.float32, torch.float32),
                                         (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("safeguard", ["clamp", "restart", "feasible"])
def test_a_safeguard_keeps_the_type(dtype, kept, safeguard):
    opt = Lagrangian([weights(dtype=dtype)], m=2, dual_lr=1., dual_bound=2., safeguard=safeguard, dual=PI(kp=1.))
    for value in ([9., 1.], [-9., 1.], [.1, .1]):
        opt.dual_step(torch.tensor(value, dtype=kept))
    twin = Lagrangian([weights(dtype=dtype)], m=2)
    twin.load_state_dict(opt.state_dict())
    assert {t.dtype for o in (opt, twin) for t in o.memory()} == {kept}


def test_what_the_safeguards_do():
    "A restart looks at the norm; clamped is in both directions, also where what is feasible goes to 0"
    low, go = vector(0., 0.), lambda name, y, c=vector(1., 1.): SAFEGUARDS[name](vector(*y), c, low, 5.).tolist()
    assert go("restart", (3., 3.9)) == [3., 3.9] and go("restart", (3., 4.)) == [0., 0.]
    assert go("clamp", (9., -9.)) == [5., -5.]
    assert go("feasible", (9., 1.), vector(1., -1.)) == [5., 0.] and go("feasible", (-9., 2.)) == [-5., 2.]


def test_an_equality_beside_an_inequality_has_no_floor():
    "0.4.2: an equality group added after an inequality takes over its bound 0"
    opt = Lagrangian([weights()], m=2, dual_lr=1., dual_bound=2., equality=torch.tensor([False, True]))
    opt.dual_step(vector(-1., -1.))
    assert opt.y.tolist() == [0., -1.]
    opt.dual_step(vector(-5., -5.))
    assert opt.y.tolist() == [0., -2.]


@pytest.mark.parametrize("form, weight", [("hpr", [0., -4.]), ("quadratic", [1., -4.])])
def test_a_satisfied_constraint_is_not_rewarded(form, weight):
    opt = Lagrangian([weights()], m=2, form=form, rho=1., equality=torch.tensor([False, True]))
    opt.y.fill_(1.)
    c1 = weights(2)
    w, = torch.autograd.grad(opt.lagrangian(weights().sum(), c1, vector(-5., -5.)), c1)
    assert w.tolist() == weight


def test_momentum_has_the_gain_of_torch():
    "A constant violation moves y by c / (1 - beta) in the end; dampened, by c"
    for gains, gain in ((PI.momentum(.9), 10.), (PI.momentum(.9, dampening=.9), 1.), (PI.averaging(.9), 1.)):
        opt = Lagrangian([weights()], m=1, dual_lr=1., dual=gains, dual_bound=1e9)
        for _ in range(300):
            before = opt.y.clone()
            opt.dual_step(vector(1.))
        torch.testing.assert_close(opt.y - before, vector(gain))


@pytest.mark.parametrize("gains", MEMORIES.values(), ids=MEMORIES)
def test_states_and_copies_share_nothing(gains):
    make = lambda: Lagrangian([weights()], m=1, dual=gains, track=.5)
    opt = make()
    opt.dual_step(vector(1.))
    state = opt.state_dict()
    others = [copy.deepcopy(opt), make(), make()]
    for other in others[1:]:
        other.load_state_dict(state)
    before = [t.clone() for t in opt.memory()]
    opt.dual_step(vector(3.))
    others[1].dual_step(vector(5.))
    for other in (others[0], others[2]):
        assert all(torch.equal(a, b) for a, b in zip(other.memory(), before, strict=True))
    others[2].dual_step(vector(3.))
    assert all(torch.equal(a, b) for a, b in zip(others[2].memory(), opt.memory(), strict=True))


def test_gains_and_dual_step_are_saved():
    opt, other = Lagrangian([weights()], m=1, dual=PI(kp=3., nu=.7)), Lagrangian([weights()], m=1)
    torch.optim.lr_scheduler.StepLR(opt.dual, 1, gamma=.5)
    opt.dual_lr = .03
    other.load_state_dict(opt.state_dict())
    group, = other.dual.param_groups
    assert (other.dual_lr, group["kp"], group["ki"], group["nu"]) == (.03, 3., 1., .7)
    other.dual_step(vector(1.))
    assert other.dual.param_groups[0]["params"][0] is other.y


@pytest.mark.parametrize("gains", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("first", [True, False])
def test_a_device_puts_back_what_nan_has_moved(gains, first):
    opt = Lagrangian([weights()], m=2, dual=gains, track=.5)
    opt.deferred = True
    assert any(t is opt.dual.state[opt.y]["xi"] for t in opt.memory())
    if not first:
        opt.dual_step(vector(1., 2.))
    before = [t.clone() for t in opt.memory()]
    opt.dual_step(vector(1., math.nan))
    for now, old in zip(opt.memory(), before, strict=True):
        torch.testing.assert_close(now, old, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(FloatingPointError, match="since the last check"):
        opt.check()


@pytest.mark.parametrize("gains", MEMORIES.values(), ids=MEMORIES)
def test_multipliers_survive_an_overflow(gains):
    opt = Lagrangian([weights(dtype=torch.float32)], m=2, dual=gains, equality=torch.tensor([False, True]))
    for value in (3e38, -3e38, 3e38, -3e38, 0.):
        opt.dual_step(torch.tensor([value, value]))
        assert opt.y.isfinite().all() and opt.seen.isfinite().all()
    assert opt.y.abs().max() <= opt.dual_bound


def test_a_lagrangian_that_is_looked_at_changes_nothing():
    w = weights()
    opt = Lagrangian([w], m=1, track=.3, dual=PI(kp=2., nu=.5))
    opt.dual_step(vector(1.))
    before = [t.clone() for t in opt.memory()]
    for _ in range(3):
        opt.lagrangian(w.sum(), w.sum()[None], vector(7.))
    assert all(torch.equal(a, b) for a, b in zip(opt.memory(), before, strict=True))


def test_lbfgs_takes_the_primal_step():
    toy = toys(sigma=0.)["active"]
    x = toy.x0.clone().requires_grad_()
    opt, none = Lagrangian(torch.optim.LBFGS([x], max_iter=10), m=1, dual_lr=1.), 0 * toy.y_star

    def closure():
        opt.zero_grad()
        loss = opt.lagrangian(toy.f(x, 0 * x), toy.c(x, none))
        loss.backward()
        return loss
    for _ in range(60):
        opt.dual_step(toy.c(x.detach(), none))
        opt.step(closure)
    torch.testing.assert_close((x.detach(), opt.y), (toy.x_star, toy.y_star), rtol=0, atol=1e-4)


def test_a_refused_setting_leaves_the_torch_optimizer_alone():
    inner = torch.optim.Adam([weights()])
    groups = copy.deepcopy(inner.state_dict())
    for bad in (dict(rho=-1.), dict(track=1.1), dict(dual_bound=0.), dict(form="max"), dict(safeguard="none"),
                dict(equality=torch.tensor([True, False]))):
        with pytest.raises(ValueError, match="expected .*, got"):
            Lagrangian(inner, m=1, **bad)
    with pytest.raises(TypeError, match="expected dual as gains"):
        Lagrangian(inner, m=1, dual=.5)
    assert inner.state_dict() == groups
