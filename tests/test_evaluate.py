"""Intervals that cover, one pass for several networks, NaN that stays in its group, candidates, advice, the page."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.testing import assert_close

from hctrain.candidates import Iterates, Mixture, best_mixture, candidates, choose, two_halves
from hctrain.constraints import loss_rate, positive_rate, true_positive_rate
from hctrain.evaluate import (
    Evaluator,
    GroupRates,
    bootstrap,
    evaluate,
    evaluate_many,
    gap_covariance,
    max_quantile,
    moments,
    rows_in_all,
    rows_to_decide,
    share_interval,
    student,
    verdicts,
)
from hctrain.report import by_group, record_advice, report
from hctrain.sampling import Batch


def draw(shares, mu, n, gen):
    g = torch.multinomial(shares, n, replacement=True, generator=gen)
    return mu[g] + 1.5 * torch.randn(n, generator=gen, dtype=torch.float64), g


def some(n=400, groups=3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=gen)
    return Batch(x, (x[:, 0] > 0).float(), torch.arange(n) % groups)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("shares, mu, n", [([.2] * 5, [.3, -.4, .1, -.6, -.9], 200),
                                           ([.92, .027, .053], [-2, -2.5, -2.5], 1500)])
def test_intervals_cover_one_by_one_and_together(shares, mu, n, hard):
    "400 samples: a coverage of 0.95 is seen to ±0.022 (two standard errors)"
    shares, mu, gen = torch.tensor(shares).double(), torch.tensor(mu).double(), torch.Generator().manual_seed(1)
    nodes, w = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(60))
    soft = (torch.sigmoid(mu[:, None] + 1.5 * nodes) * w).sum(1) / w.sum()
    p = torch.as_tensor(stats.norm.cdf(mu / 1.5)) if hard else soft
    d = p - shares @ p / shares.sum()
    seen = []
    for _ in range(400):
        z, g = draw(shares, mu, n, gen)
        r = GroupRates(moments(positive_rate, z, z, g, len(mu), hard))
        holds = [(a <= t) & (t <= b) for (a, b), t in ((r.interval(), p), (r.deviation_interval(), d),
                                                       (r.interval(True), p), (r.deviation_interval(True), d))]
        seen.append([*holds[0].double().tolist(), *holds[1].double().tolist(), *(float(h.all()) for h in holds[2:])])
    coverage = np.mean(seen, 0)
    assert coverage.min() > .92 and coverage.max() < .985, coverage


def test_two_groups_have_one_gap():
    "The gaps of two groups are nearly one number, so joint intervals are hardly wider; Sidak's would be by a seventh"
    data = some(groups=2)
    r = evaluate(lambda x: x[:, 0], data).soft
    C = gap_covariance(r.sums)
    assert C[0, 1] / (C[0, 0] * C[1, 1]).sqrt() < -.98
    assert abs(r.joint_gap - r.single) < .1 < r.joint - r.single


def test_quantile_of_the_largest():
    "Independent: Sidak's; a group that is everybody: the single one"
    sidak = stats.norm.ppf((1 + .95**(1 / 8)) / 2)
    assert abs(max_quantile(torch.eye(8, dtype=torch.float64), .95) - sidak) < .04
    assert max_quantile(torch.zeros(1, 1, dtype=torch.float64), .95) == pytest.approx(1.959964)


@pytest.mark.parametrize("df", [10, 40, 200])
def test_students_quantile(df):
    got = student(1.959964, torch.tensor(float(df))).item()
    assert got == pytest.approx(stats.t.ppf(.975, df), rel=2e-3)


def test_share_interval_is_symmetric_and_inside():
    k = torch.arange(41.).double()
    low, high = share_interval(k, torch.full_like(k, 40.))
    assert_close(low, 1 - high.flip(0))
    assert (low >= 0).all() and (high <= 1).all() and (low <= k / 40).all() and (high.diff() >= 0).all()


def test_bootstrap_and_closed_form_agree():
    gen = torch.Generator().manual_seed(0)
    z, g = draw(torch.tensor([.6, .1, .3]), torch.tensor([.3, -.5, -1.]).double(), 4000, gen)
    for hard in (False, True):
        a = (z > 0).double() if hard else z.sigmoid()
        closed = GroupRates(moments(positive_rate, z, z, g, 3, hard)).deviation_interval(joint=True)
        for ours, theirs in zip(closed, bootstrap(a, torch.ones_like(a), g, 3)):
            assert (ours - theirs).abs().max() < .004


@pytest.mark.parametrize("statistic", [positive_rate, true_positive_rate, loss_rate])
def test_several_networks_in_one_pass(statistic):
    data, nets = some(), [nn.Linear(2, 1) for _ in range(4)]
    together = evaluate_many(lambda x: torch.stack([m(x) for m in nets]), data, statistic, chunk=97)
    for one, m in zip(together, nets, strict=True):
        alone = evaluate(m, data, statistic)
        for kind in ("soft", "hard"):
            assert_close(getattr(one, kind).sums, getattr(alone, kind).sums)
        assert_close((one.loss, one.accuracy), (alone.loss, alone.accuracy))


def test_nan_stays_in_its_group():
    "A product with a matrix of memberships would carry it to all groups"
    data, bad = some(), torch.nan
    e = Evaluator(data)(lambda x: torch.where(torch.arange(len(x)) % 3 == 1, bad, x[:, 0]))
    assert e.soft.values.isnan().tolist() == [False, True, False]
    assert math.isnan(e.max_gap()) and e.verdict() == "undecided"


def test_an_evaluator_can_be_used_again():
    data = some()
    ev, net = Evaluator(data), nn.Linear(2, 1)
    first = ev(net)
    assert_close(ev(net).soft.sums, first.soft.sums)
    assert_close(Evaluator([data], n_groups=3)(net).soft.sums, first.soft.sums)


def test_large_tables_are_read_in_chunks(tmp_path):
    "Memory-mapped features: no more than a chunk at a time reaches the network"
    data, seen = some(3000), []
    mapped = torch.from_file(str(tmp_path / "x"), shared=True, size=6000).view(3000, 2)
    mapped.copy_(data.x)
    e = evaluate(lambda x: (seen.append(len(x)), x[:, 0])[1], data._replace(x=mapped), chunk=256)
    assert max(seen) == 256 and sum(seen) == 3000
    assert_close(e.soft.sums, evaluate(lambda x: x[:, 0], data).soft.sums)


def test_rows_that_would_decide_do():
    "As many rows as were said, with the same estimates, and a few more: decided; a few less: not"
    k, n = torch.tensor([270., 50]).double(), torch.tensor([480., 120]).double()
    sums = torch.stack([k, n, k, k, n, k, k, k, n])
    r = GroupRates(sums)
    bound = r.max_gap * 1.2
    assert "undecided" in verdicts(r, bound)
    times = rows_in_all(r, bound) / 600
    assert_close(times, (rows_to_decide(r, bound) / r.counts).max().item())
    assert set(verdicts(GroupRates(sums * times * 1.1), bound)) == {"holds"}
    assert "undecided" in verdicts(GroupRates(sums * times * .8), bound)


def made_up(loss, d, bound=.05):
    rates = SimpleNamespace(deviations=torch.tensor([d, -d], dtype=torch.float64), counts=torch.ones(2))
    return SimpleNamespace(loss=loss, soft=rates, hard=rates, bound=bound, max_gap=lambda hard: abs(d))


def test_mixture_and_choice():
    three = [made_up(.4, .1), made_up(.5, -.1), made_up(.6, .01)]
    assert choose(three) == 2
    p = best_mixture(three)
    assert_close(p, torch.tensor([.75, .25, 0], dtype=torch.float64))
    share = (Mixture([lambda x: x[:, 0], lambda x: -x[:, 0]], p[:2])(torch.ones(20_000, 1)) > 0).double().mean()
    assert abs(share - .75) < .015


def test_candidates_leave_the_network_alone():
    data, net = some(), nn.Linear(2, 1)
    kept = Iterates(net)
    for _ in range(3):
        kept.keep()
        with torch.no_grad():
            net.weight += 1
    before = net.weight.clone()
    found = candidates(kept, two_halves(data)[0])
    assert list(found) == ["last", "best feasible", "average", "random", "mixture"]
    assert_close(found["last"](data.x), net(data.x) - data.x.sum(1, keepdim=True))
    assert_close(net.weight, before)


def test_the_mixed_up_case_is_flagged():
    gen = torch.Generator().manual_seed(0)
    g = torch.multinomial(torch.tensor([.7, .3]), 12_000, replacement=True, generator=gen)
    wide, narrow = 2.1 * torch.randn(12_000, generator=gen), .26 * torch.randn(12_000, generator=gen) - .115
    z = torch.where(g == 0, wide, narrow)
    page = report(lambda x: x, rows=Batch(z[:, None], (z > 0).float(), g))
    assert page.evaluations["rows"].max_gap() < .025 and page.evaluations["rows"].max_gap(hard=True) > .11
    assert [a.sign for a in page.advice] == ["scores hold, decisions do not"]
    text = page._repr_html_()
    assert "scores hold, decisions do not" in text and "<svg" in text and "violated" in text


LOOKS = np.arange(20.)


@pytest.mark.parametrize("gaps, sign", [
    (np.where(LOOKS > 9, np.nan, .1), "NaN"), (.12 + 0 * LOOKS, "plateau, infeasible"),
    (.05 + .04 * np.sin(2 * LOOKS), "oscillation"), (.04 + 0 * LOOKS, None), (.4 - .015 * LOOKS, None),
    (LOOKS[:4], None)])
def test_signatures(gaps, sign):
    assert [a.sign for a in record_advice(gaps[:, None], .05)] == ([] if sign is None else [sign])


def test_any_metric_by_group():
    data = some()
    frame = by_group(lambda x: x[:, 0], data, ["a", "b", "c"], metrics={"rate": lambda y, p: p.mean()})
    right = [(data.x[data.g == i, 0] > 0).double().mean().item() for i in range(3)]
    assert_close(frame["rate"].tolist()[:3], right)
    assert frame.loc["difference", "rate"] == pytest.approx(max(right) - min(right))
