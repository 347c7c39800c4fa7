"""A comparison: what it seeds, whom it chooses, which checkpoints it takes."""
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hctrain import Batch, StochasticGhost
from hctrain import compare as chapter
from hctrain.compare import ALGORITHMS, Algorithm, Setting, What, pi_control, run_one, tune, winner

SETTING = Setting(seconds=None, steps=2, evaluations=1)


def data(n=200):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=gen)
    rows = Batch(x, (x[:, 0] > 0).float(), torch.arange(n) % 2)
    return SimpleNamespace(train=rows, test=rows, n_groups=2)


def test_a_seed_reaches_methods_that_draw():
    made = []

    class Kept(StochasticGhost):
        def __init__(self, params, m, seed=0):
            super().__init__(params, m, seed=seed)
            made.append(seed)
    for seed in (0, 3):
        run_one(data(), lambda seed: nn.Linear(2, 1), Algorithm("kept", Kept), seed, SETTING, progress=False)
    assert made == [0, 3]


def test_pi_control_starts_at_the_first_value():
    opt = pi_control([torch.ones(2, requires_grad=True)], 2, kp=3., nu=.5)
    assert opt.rho == 0 and opt.gains == "kp=3 ki=1 nu=0.5" and bool(opt.dual.state[opt.y]["xi"].isnan().all())


def test_the_winner():
    "Feasible before infeasible before failed; the lowest loss of the first, the smallest gap of the second"
    row = lambda gap, loss: {"gap": gap, "loss": loss}
    table = [row(.2, .1), row(.1, .9), row(math.inf, math.inf), row(.01, math.nan)]
    assert winner(table, .05) is table[1]
    assert winner([*table, near := row(.05, .8), row(.01, .85)], .05) is near
    assert winner(table[2:], .05) is table[2]


@pytest.mark.parametrize("other", [{"bound": .1}, {"draws": 2}, {"reference": "balanced"}, {"anneal": True}])
def test_a_run_is_of_one_setting(other):
    a = ALGORITHMS["alm"]
    What(a, SETTING).load_state_dict(What(a, replace(SETTING, steps=9, seeds=3)).state_dict())      # a budget may grow
    with pytest.raises(ValueError, match="choose another folder"):
        What(a, SETTING).load_state_dict(What(a, replace(SETTING, **other)).state_dict())


@pytest.mark.parametrize(("name", "gap"), [("alm", .25), ("decisions", .5)])
def test_trials_are_judged_by_what_they_were_trained_for(name, gap, monkeypatch):
    values = {"test_loss": np.array([9., 1.]), "test_gaps": np.array([[9., 9.], [.125, .25]]),
              "test_hard_gaps": np.array([[9., 9.], [.5, .25]])}
    monkeypatch.setattr(chapter, "run_one", lambda *args, **kw: (SimpleNamespace(record=values, finished=True), None))
    _, table = tune(data(), None, ALGORITHMS[name], SETTING, trials=2)
    assert [(row["loss"], row["gap"]) for row in table] == [(1., gap)] * 2
