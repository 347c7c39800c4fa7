"""Rates and samplers under groupings that nobody chose: drawn by hypothesis, checked against plain counting."""
import copy
import pickle
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import assume, given, settings
from torch.testing import assert_close

from hctrain.constraints import (
    MeanGap,
    RateGap,
    Sharpened,
    WeightedBCE,
    accuracy,
    false_positive_rate,
    loss_rate,
    positive_rate,
    smoothed_step,
    true_positive_rate,
)
from hctrain.evaluate import moments
from hctrain.sampling import BalancedSampler, BalancedTable, RandomStreams, Streams

quick = settings(max_examples=60, deadline=None, derandomize=True)
# name: values and mask of each row from score p, decision d, label y and logit z
BY_HAND = {
    positive_rate: (lambda p, y, z: p, lambda y: 1 + 0 * y),
    true_positive_rate: (lambda p, y, z: p, lambda y: y),
    false_positive_rate: (lambda p, y, z: p, lambda y: 1 - y),
    accuracy: (lambda p, y, z: y * p + (1 - y) * (1 - p), lambda y: 1 + 0 * y),
    loss_rate: (lambda p, y, z: np.log1p(np.exp(-np.abs(z))) + np.maximum(z, 0) - y * z, lambda y: 1 + 0 * y),
}
# the score of a logit divided by the temperature
BY_HAND_TOO = {
    torch.sigmoid: lambda u: 1 / (1 + np.exp(-u)),
    smoothed_step: lambda u: np.select([u < -3, u > 3], [0, 1], 0.5 + u / 4 - u**3 / 108),
}
temperatures = st.sampled_from([0.05, 0.3, 1.0, 4.0])


@st.composite
def rows(draw, least=0, most=60):
    "Number of groups, and logits, labels and codes of some rows; groups may be empty"
    n_groups, n = draw(st.integers(1, 6)), draw(st.integers(least, most))
    def column(values):
        return draw(st.lists(values, min_size=n, max_size=n))
    z = np.array(column(st.floats(-30, 30, width=32)), dtype=np.float64)
    y = np.array(column(st.integers(0, 1)), dtype=np.float64)
    return n_groups, z, y, np.array(column(st.integers(0, n_groups - 1)), dtype=np.int64)


@st.composite
def populations(draw):
    "Codes of a population in which every group has rows, in any order"
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    return draw(st.permutations(np.repeat(np.arange(len(sizes)), sizes).tolist()))


def by_hand(statistic, z, y, g, n_groups, hard, surrogate=torch.sigmoid, temperature=1.0):
    value, mask = BY_HAND[statistic]
    p = (z > 0).astype(float) if hard else BY_HAND_TOO[surrogate](z / temperature)
    v = np.abs(y - p) if hard and statistic is loss_rate else value(p, y, z)
    k = mask(y)
    return np.array([[part[g == j].sum() for j in range(n_groups)] for part in (k * v, k)])


@quick
@given(rows(), st.sampled_from(list(BY_HAND)), st.booleans(), st.data())
def test_rates_are_counts_under_any_grouping_and_cut(case, statistic, hard, data):
    n_groups, z, y, g = case
    cut = data.draw(st.integers(0, len(z)))
    halves = slice(cut), slice(cut, None)
    parts = [statistic(*map(torch.tensor, (z[s], g[s], y[s])), n_groups, hard=hard) for s in halves]
    want = torch.tensor(by_hand(statistic, z, y, g, n_groups, hard))
    assert_close(torch.stack(list(sum(parts))), want, rtol=1e-12, atol=1e-12)


@quick
@given(rows(), st.sampled_from(list(BY_HAND)[:4]), st.sampled_from(list(BY_HAND_TOO)), temperatures, st.booleans())
def test_sharp_rates_are_counts_too(case, statistic, surrogate, temperature, hard):
    n_groups, z, y, g = case
    sharp = Sharpened(statistic, temperature, surrogate)
    twin = pickle.loads(pickle.dumps(sharp))
    if len(z):
        row_by_row = moments(sharp, *map(torch.tensor, (z, y, g)), n_groups, hard)  # refuses what does not add up
        assert row_by_row.isfinite().all()
    want = torch.tensor(by_hand(statistic, z, y, g, n_groups, hard, surrogate, temperature))
    for s in (sharp, twin):
        got = s(*map(torch.tensor, (z, g, y)), n_groups, hard=hard)
        assert_close(torch.stack(list(got)), want, rtol=1e-12, atol=1e-12)
        if hasattr(statistic, "rows"):
            v = s.rows(torch.tensor(z), torch.tensor(y), hard)
            sums = torch.stack([v[torch.tensor(g) == j].sum() for j in range(n_groups)])
            assert_close(sums, want[0], rtol=1e-12, atol=1e-12)


@quick
@given(rows(least=1), st.sampled_from([*list(BY_HAND)[:4], Sharpened(positive_rate, 0.3), Sharpened(accuracy, 0.3)]),
       st.sampled_from(["batch", 0, 0.3]), st.integers(2, 4))
def test_c_of_all_is_the_mean_of_c_where_it_says_so(case, statistic, reference, n):
    n_groups, z, y, g = case
    zs, ys = (torch.tensor(np.stack([np.roll(v, 7 * i) for i in range(n)])) for v in (z, y))  # other rows, same groups
    g, together = torch.tensor(g), SimpleNamespace(g=torch.tensor(g).repeat(n), y=ys.flatten())
    plain = RateGap(statistic, n_groups, reference=reference, two_sided=True, absent="skip")
    for gaps in (plain, MeanGap(statistic, n_groups, reference=0.3)):
        if gaps.is_mean:
            mean = torch.stack([gaps(z, SimpleNamespace(g=g, y=y)) for z, y in zip(zs, ys, strict=True)]).mean(0)
            assert_close(mean, gaps(zs.flatten(), together), rtol=1e-10, atol=1e-12)
    counts = statistic(zs.flatten(), together.g, together.y, n_groups).counts
    fixed = RateGap(statistic, n_groups, reference=0.3, two_sided=True, absent="skip")(zs.flatten(), together)
    assert_close(gaps(zs.flatten(), together), (n_groups * counts / zs.numel()).repeat(2) * fixed)


@quick
@given(rows(least=1), st.sampled_from(list(BY_HAND)), st.sampled_from(["batch", 0, 0.3]), st.booleans())
def test_gaps_under_skip(case, statistic, reference, two_sided):
    n_groups, z, y, g = case
    out = torch.tensor(z, requires_grad=True)
    gaps = RateGap(statistic, n_groups, reference=reference, two_sided=two_sided, absent="skip")
    c = gaps(out, SimpleNamespace(g=torch.tensor(g), y=torch.tensor(y)))
    sums, counts = by_hand(statistic, z, y, g, n_groups, False)
    there = counts > 0
    r = np.divide(sums, counts, out=np.zeros(n_groups), where=there)
    if reference == 0 and isinstance(reference, int):
        ref, there = r[0], there & there[0]
    else:
        ref = reference if reference != "batch" else sums.sum() / max(counts.sum(), 1)
    d = r - ref
    want = np.where(there, np.stack([d, -d]) if two_sided else np.abs(d), 0.05) - 0.05
    assert_close(c.detach(), torch.tensor(want.ravel()), rtol=1e-10, atol=1e-12)
    (grad,) = torch.autograd.grad(c.sum(), out)
    assert grad.isfinite().all()


@quick
@given(rows(least=1), st.permutations(range(6)))
def test_gaps_do_not_depend_on_the_names_of_groups_or_the_order_of_rows(case, names):
    n_groups, z, y, g = case
    names = np.argsort(np.argsort(names[:n_groups]))
    turn = np.random.default_rng(0).permutation(len(z))
    gaps = RateGap(positive_rate, n_groups, reference="batch", absent="skip")
    a = gaps(torch.tensor(z), SimpleNamespace(g=torch.tensor(g), y=None))
    b = gaps(torch.tensor(z[turn]), SimpleNamespace(g=torch.tensor(names[g][turn]), y=None))
    assert_close(b[torch.tensor(names)], a, rtol=1e-12, atol=1e-12)


@quick
@given(populations(), st.integers(1, 8))
def test_weights_of_one_full_pass_give_the_population_back(codes, k):
    g = torch.tensor(codes)
    counts = g.bincount()
    lcm = int(np.lcm.reduce(counts.numpy()))
    assume(lcm < 20_000)
    rows = torch.cat([(g == j).nonzero().flatten().repeat(lcm // n) for j, n in enumerate(counts.tolist())])
    z, y = torch.linspace(-2, 2, len(g), dtype=torch.float64), (torch.arange(len(g)) % 3 == 0).double()
    sampler = BalancedSampler(codes, k)
    loss, everyone = WeightedBCE(sampler.weights.double()), SimpleNamespace(y=y, g=g)
    got = loss(z[rows], SimpleNamespace(y=y[rows], g=g[rows]))
    assert_close(got, WeightedBCE()(z, everyone), rtol=1e-6, atol=0)


@quick
@given(populations(), st.integers(1, 8), st.booleans(), st.integers(0, 2**70))
def test_batches_are_balanced_and_reproduced(codes, k, replacement, seed):
    g = np.array(codes)
    counts = np.bincount(g)
    k = k if replacement else min(k, counts.min())
    before = torch.get_rng_state()
    table = BalancedTable(codes, int(k), replacement, seed)
    whole = table.rows(1, 0, 40)
    assert (g[whole] == np.arange(len(counts)).repeat(k)).all()
    again = BalancedTable(codes, int(k), replacement, seed)
    assert (np.concatenate([again.rows(1, t, t + 1) for t in range(39, -1, -1)]) == whole[::-1]).all()
    if not replacement:
        for j, n in enumerate(counts):
            per_epoch, mine = n // k, whole[:, j * k:(j + 1) * k]
            for e in range(40 // per_epoch):
                seen = mine[e * per_epoch:(e + 1) * per_epoch].ravel()
                assert len(set(seen.tolist())) == len(seen) == n // k * k
    assert (torch.get_rng_state() == before).all()


@quick
@given(populations(), st.integers(0, 300), st.integers(1, 4), st.booleans())
def test_streams_resume_bit_for_bit(codes, steps, k, balanced):
    g = torch.tensor(codes)
    x, y = torch.arange(len(g), dtype=torch.float32).unsqueeze(1), (torch.arange(len(g)) % 2).float()
    def make():
        return Streams(x, y, g, 2, seed=3) if balanced else RandomStreams(x, y, g, 5, seed=3)
    here, there = make(), make()
    for _ in range(steps):
        here.draw(k)
    there.load_state_dict(copy.deepcopy(here.state_dict()))
    twins = [there, copy.deepcopy(here), pickle.loads(pickle.dumps(here))]
    for _ in range(3):
        batch = here.draw(k)
        rows = [b.x[:, 0].long() for b in batch]
        assert_close(batch, [(x[i], y[i], g[i]) for i in rows], rtol=0, atol=0)
        for twin in twins:
            assert_close(twin.draw(k), batch, rtol=0, atol=0)
