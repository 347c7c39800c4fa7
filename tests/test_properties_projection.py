"""Projections are feasible, idempotent and closest, on drawn points of drawn shapes."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hctrain.projection import Around, Ball, Box, Each, GroupSoftThreshold, L1Ball, Simplex, SoftThreshold

sizes = st.floats(0.05, 20)
entries = st.floats(-30, 30, allow_subnormal=False)
dims = st.sampled_from([None, -1, 0])


@st.composite
def points(draw):
    "Two or one tensors, as one drawn vector would fill them"
    shapes = draw(st.sampled_from([((3,),), ((1,),), ((2, 3),), ((4,), (2, 2)), ((3, 1), (2,))]))
    return [torch.tensor(draw(st.lists(entries, min_size=n, max_size=n)), dtype=torch.float64).view(s)
            for s in shapes for n in [torch.Size(s).numel()]]


def slices(xs, dim):
    "The vectors that a set with this `dim` projects, as rows"
    if dim is None:
        return [torch.cat([x.flatten() for x in xs])[None]]
    return [x.movedim(dim, -1).reshape(-1, x.shape[dim]) for x in xs]


MEMBER = {  # written as the set is defined, not as it is projected on
    Ball: lambda v, r: (v.square().sum(-1) <= r**2 * (1 + 1e-9)).all(),
    L1Ball: lambda v, r: (v.abs().sum(-1) <= r * (1 + 1e-9)).all(),
    Simplex: lambda v, r: (v >= 0).all() and ((v.sum(-1) - r).abs() <= 1e-9 * max(r, 30)).all(),
}


def inside(make, r, vectors):
    "A point of the set for each vector, made from it without the projection"
    if make is Simplex:
        return [r * v.softmax(-1) for v in vectors]
    return [r * v / v.abs().sum(-1, keepdim=True).clamp(min=1e-3) for v in vectors]


@pytest.mark.parametrize("make", MEMBER)
@settings(max_examples=60, deadline=None)
@given(xs=points(), other=st.randoms(use_true_random=False), r=sizes, dim=dims)
def test_feasible_idempotent_closest(make, xs, other, r, dim):
    project = make(r, dim)
    x, p = slices(xs, dim), slices(project([x.clone() for x in xs]), dim)
    assert all(MEMBER[make](v, r) for v in p)
    again = slices(project(project([x.clone() for x in xs])), dim)
    torch.testing.assert_close(again, p, atol=1e-9, rtol=1e-9)
    z = [torch.tensor([[other.uniform(-30, 30) for _ in row] for row in v], dtype=torch.float64) for v in x]
    for v, q, u in zip(x, p, inside(make, r, z)):
        assert MEMBER[make](u, r)
        assert ((v - q).norm(dim=-1) <= (v - u).norm(dim=-1) + 1e-8).all(), "another point of the set is closer"
        assert (((v - q) * (u - q)).sum(-1) <= 1e-7 * (1 + v.square().sum(-1))).all(), "the angle is not obtuse"


@settings(max_examples=40, deadline=None)
@given(xs=points(), low=entries, width=st.floats(0, 10))
def test_box(xs, low, width):
    got = Box(low, low + width)([x.clone() for x in xs])
    for x, p in zip(xs, got):
        want = [sorted((low, v, low + width))[1] for v in x.flatten().tolist()]
        assert p.flatten().tolist() == want


@settings(max_examples=40, deadline=None)
@given(xs=points(), t=sizes, dim=dims)
def test_moreau(xs, t, dim):
    "A proximal map and the projection on the ball of the dual norm add up to the point"
    for prox, ball in ((SoftThreshold(t), Box(-t, t)), (GroupSoftThreshold(t, dim), Ball(t, dim))):
        total = torch._foreach_add(prox([x.clone() for x in xs]), ball([x.clone() for x in xs]))
        torch.testing.assert_close(total, xs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("make", [Ball, L1Ball, Simplex])
@settings(max_examples=30, deadline=None)
@given(xs=points(), r=sizes, dim=dims)
def test_each_is_one_call_a_tensor_and_around_is_a_shift(make, xs, r, dim):
    whole = Each(make(r, dim))([x.clone() for x in xs])
    single = [make(r, dim)([x.clone()])[0] for x in xs]
    torch.testing.assert_close(whole, single, atol=0, rtol=0)
    centre = [torch.full_like(x, 0.5) for x in xs]
    moved = Around(centre, make(r, dim))([x + c for x, c in zip(xs, centre)])
    torch.testing.assert_close(moved, [p + 0.5 for p in make(r, dim)([x.clone() for x in xs])], atol=1e-9, rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(xs=points(), r=sizes, dim=dims)
def test_float32_stays_close(xs, r, dim):
    for make in (Ball, L1Ball, Simplex):
        got = make(r, dim)([x.float() for x in xs])
        want = make(r, dim)([x.clone() for x in xs])
        assert all(p.dtype == torch.float32 for p in got)
        torch.testing.assert_close([p.double() for p in got], want, atol=5e-5, rtol=1e-5)
