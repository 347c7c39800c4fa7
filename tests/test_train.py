"""What a step of the loop is made of, and what a checkpoint carries."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hctrain import SSLALM, Proxy, RandomStreams, RateGap, Streams, WeightedBCE, positive_rate
from hctrain.problem import same
from hctrain.train import lazy_step, one_draw_step, three_draw_step, train, two_draw_step


class Spy:
    "An optimizer that writes down what it is given: values, and whether they have a graph"
    def __init__(self):
        self.seen = {}

    def note(self, **terms):
        terms = {k: v() if callable(v) else v for k, v in terms.items()}
        self.seen |= {k: v if v is None else (v.item(), v.requires_grad) for k, v in terms.items()}
        return terms

    def dual_step(self, c0):
        self.note(c0=c0)

    def lagrangian(self, f, c1, c2=None):
        terms = self.note(f=f, c1=c1, c2=c2)
        return terms["f"] + terms["c1"].sum()

    def zero_grad(self):
        pass

    def step(self):
        pass


class Gaps:
    "The number of the batch, times a factor; the output has to be that of the batch"
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, out, batch):
        assert torch.equal(out.detach(), batch.x), "the output of another batch"
        return self.factor * out[:1, 0]


class Identity(nn.Module):
    "Output = features, with a gradient"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.w * x


G, V = True, False                                           # with a graph, values alone
WANTED = {                                                   # the number of the batch that each term is from
    one_draw_step: dict(f=(1, G), c0=(1, V), c1=(1, G), c2=None),
    two_draw_step: dict(f=(1, G), c0=(1, V), c1=(1, G), c2=(2, V)),
    three_draw_step: dict(f=(1, G), c0=(2, V), c1=(3, G), c2=(4, V)),
    lazy_step: dict(f=(1, G), c0=(2, V), c1=(3, G), c2=None)}


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("proxy", [True, False])
@pytest.mark.parametrize("step", WANTED, ids=lambda step: step.__name__)
def test_each_term_is_from_its_own_draw(step, proxy, joint):
    "A proxy's true values, a hundred times as large, go to c0 and c2, and to nothing else"
    draw = lambda k: [SimpleNamespace(x=torch.full((2, 1), float(i + 1))) for i in range(k)]
    gaps = Gaps(1.)
    if proxy:
        gaps.true = Gaps(100.)
    step(Identity(), spy := Spy(), lambda out, b: Gaps(1.)(out, b).sum(), gaps, SimpleNamespace(draw=draw), joint)
    wanted = dict(WANTED[step])
    if proxy:
        wanted["c2"] = (1, V) if step is one_draw_step else wanted["c2"]     # for the penalty's values
        wanted |= {k: (100 * wanted[k][0], V) for k in ("c0", "c2") if wanted[k]}
    assert spy.seen == wanted


def rows(n=200):
    "A second group of one row in twenty"
    gen = torch.Generator().manual_seed(0)
    x, g = torch.randn(n, 2, generator=gen), (torch.arange(n) % 20 == 0).long()
    return x, (x[:, 0] > 0).float(), g


def test_a_checkpoint_keeps_the_rates_that_are_carried(tmp_path):
    def go(steps, **kw):
        torch.manual_seed(0)
        model, streams = nn.Linear(2, 1), RandomStreams(*rows(), batch_size=4)
        gaps = RateGap(positive_rate, 2, bound=.01, reference="batch", absent="carry")
        gaps(model(streams.data.x).detach(), streams.data)                   # as at the start
        train(model, SSLALM(model.parameters(), 2), WeightedBCE(), gaps, streams, steps=steps, progress=False, **kw)
        return model.state_dict(), gaps.state_dict()
    whole = go(40)
    go(25, checkpoint=tmp_path / "run.pt")
    assert same(go(40, checkpoint=tmp_path / "run.pt", resume=True), whole)


def test_a_proxy_carries_both():
    x, y, g = rows()
    batch, make = SimpleNamespace(y=y, g=g), lambda: Proxy(*(
        RateGap(positive_rate, 2, reference="batch", absent="carry", hard=hard) for hard in (False, True)))
    used, fresh = make(), make()
    used(x[:, :1], batch), used.true(x[:, :1], batch)
    state = used.state_dict()
    assert not same(state["surrogate"], state["true"])
    fresh.load_state_dict(state)
    assert same(fresh.state_dict(), state)
    before = {"surrogate": {}, "true": {}}
    for bad in ({**state, "true": {"sums": y}}, {**state, "surrogate": None}, {"true": state["true"]}, state["true"]):
        with pytest.raises(ValueError, match="expected a state"):
            (fresh := make()).load_state_dict(bad)
        assert fresh.state_dict() == before


def test_batches_join_across_blocks():
    "Random numbers are made in blocks, here of four draws; every third join crosses an edge"
    make = lambda: Streams(*rows(), per_group=4096)
    joined, one_by_one = make(), make()
    assert joined._block == 4
    for _ in range(4):
        for whole, n in zip(joined.join((1, 2)), (1, 2), strict=True):
            parts = [one_by_one.draw(1)[0] for _ in range(n)]
            for t, ts in zip(whole, zip(*parts, strict=True), strict=True):
                assert torch.equal(t, torch.cat(ts))
    assert joined.t == one_by_one.t == 12
