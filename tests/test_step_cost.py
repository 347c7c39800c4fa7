"What a step costs, counted and not timed: calls of the tensor library, memory, entries in the profiler"

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from hctrain import SSLALM, Batch, RateGap, Streams, SwitchingSubgradient, WeightedBCE, positive_rate
from hctrain.train import choose_step, rows_are_independent


class Calls(TorchDispatchMode):
    "The calls of the tensor library, and the largest tensor that one of them made"
    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        known = {t.data_ptr() for a in args for t in (a if isinstance(a, (list, tuple)) else [a])
                 if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, torch.Tensor) and t.data_ptr() not in known:
                self.largest = max(self.largest, t.numel())
        return out


def a_step(method, draws, groups=5):
    "A function that makes one step of the paper's network, and its optimizer; caches are filled"
    gen = torch.Generator().manual_seed(0)
    x, g = torch.randn(2000, 9, generator=gen), torch.arange(2000) % groups
    streams = Streams(x, (x.sum(1) > 0).float(), g, per_group=40 // groups)
    model = nn.Sequential(nn.Linear(9, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    opt, loss = method(model.parameters()), WeightedBCE(streams.weights)
    gaps = RateGap(positive_rate, groups, bound=.05, weights=streams.weights)
    step, joint = choose_step(opt, draws), rows_are_independent(model)
    run = lambda: step(model, opt, loss, gaps, streams, joint)
    run(), run()
    return run, opt


def count(run) -> int:
    with Calls() as calls:
        run()
    return len(calls.names)


@pytest.mark.parametrize("method, draws, most", [
    (lambda p, m=5: SSLALM(p, m=m), 1, 105), (lambda p, m=5: SSLALM(p, m=m), 3, 135),
    (lambda p, m=5: SwitchingSubgradient(p, m=m), 3, 85)])
def test_a_step_makes_few_calls_however_many_constraints(method, draws, most):
    few, many = a_step(method, draws)[0], a_step(lambda p: method(p, m=20), draws, groups=20)[0]
    assert count(few) <= most
    assert count(many) == count(few)


def test_a_step_makes_no_copy_of_the_weights():
    w = torch.ones(100_000, requires_grad=True)
    opt = SSLALM([w], m=1)
    for _ in range(2):
        opt.zero_grad()
        opt.lagrangian(w.square().mean(), w[:1] - 1).backward()
        with Calls() as calls:
            opt.step()
    assert 0 < calls.largest < 1000


def test_the_profiler_sees_step_and_zero_grad():
    run, opt = a_step(lambda p: SSLALM(p, m=5), 1)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    names = {e.key for e in seen.key_averages()}
    assert {"Optimizer.step#SSLALM.step", "Optimizer.zero_grad#SSLALM.zero_grad"} <= names


def test_hooks_are_called_around_a_step():
    run, opt = a_step(lambda p: SSLALM(p, m=5), 1)
    seen = []
    note = lambda name: lambda *args: seen.append(name)
    hooks = [opt.register_step_pre_hook(note("before")), opt.register_step_post_hook(note("after")),
             torch_optimizer.register_optimizer_step_pre_hook(note("before all")),
             torch_optimizer.register_optimizer_step_post_hook(note("after all"))]
    try:
        for hook in hooks:
            run()
            hook.remove()
    finally:
        for hook in hooks:
            hook.remove()
    run()
    assert [seen.count(name) for name in ("before", "after", "before all", "after all")] == [1, 2, 3, 4]


def test_gradients_that_are_set_to_zero_keep_their_memory():
    run, opt = a_step(lambda p: SSLALM(p, m=5), 1)
    p = opt.param_groups[0]["params"][0]
    place = p.grad.data_ptr()
    opt.zero_grad(set_to_none=False)
    assert p.grad.data_ptr() == place and not p.grad.any()
    opt.zero_grad()
    assert p.grad is None


def test_kept_weights_follow_codes_and_dtype():
    z, y, g = torch.tensor([.3, -1., 2.]), torch.tensor([1., 0., 0.]), torch.tensor([0, 1, 1])
    g.comes_again = True
    loss, fresh = WeightedBCE([.5, 1.5]), lambda: WeightedBCE([.5, 1.5])
    first = loss(z, Batch(z, y, g))
    assert_close(loss(z.double(), Batch(z, y, g)), fresh()(z.double(), Batch(z, y, g)), rtol=0, atol=0)
    g[1] = 0
    assert_close(loss(z, Batch(z, y, g)), fresh()(z, Batch(z, y, g)), rtol=0, atol=0)
    assert loss(z, Batch(z, y, g)) != first
    with pytest.raises(ValueError, match="group codes of shape"):
        loss(z[:2], Batch(z, y[:2], g))
