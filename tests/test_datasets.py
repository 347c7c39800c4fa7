"""The real files of Adult, COMPAS and law school, where they are; chapter 36 tests the rest on made-up tables."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from chapters import ROOT

from hctrain.compare import ALGORITHMS, Setting, run_one
from hctrain.datasets import SOURCES, load_table, make_up, published

BESIDE = Path(os.environ.get("HCTRAIN_ACS_ROOT", ROOT.parent / "shared/data/acs")).parent
FOLDERS = {"adult": BESIDE / "adult", "compas": BESIDE, "law": BESIDE}
cases = pytest.mark.parametrize("name", SOURCES)


def real(name):
    if not all((FOLDERS[name] / f).is_file() for f in SOURCES[name].files):
        pytest.skip("needs the published files")
    return FOLDERS[name]


@cases
def test_real(name):
    for protected in SOURCES[name].protected:
        t = load_table(name, real(name), protected)
        assert len(t.train.y) + len(t.test.y) == {"adult": 48_842, "compas": 6_172, "law": 20_798}[name]
        assert not t.synthetic and t.train.x.isfinite().all() and t.test.x.isfinite().all()
        assert not [n for n in t.feature_names if n.startswith(f"{protected}=")]


def test_propublicas_filter():
    "The counts that ProPublica's notebook prints"
    table, = published(SOURCES["compas"], real("compas"))
    kept = SOURCES["compas"].keep(table)
    race = dict(zip(*np.unique(table["race"][kept], return_counts=True), strict=True))
    assert race == {"African-American": 3175, "Asian": 31, "Caucasian": 2103, "Hispanic": 509, "Native American": 11,
                    "Other": 343}


@cases
def test_made_up(name):
    "Deterministic, no two groups alike, and the filter has something to drop"
    a, b, other = make_up(name), make_up(name), make_up(name, seed=1)
    assert all((a[c] == b[c]).all() for c in a) and any((a[c] != other[c]).any() for c in a)
    for protected in SOURCES[name].protected:
        t = load_table(name, protected=protected)
        assert t.synthetic and t.name.startswith("made-up") and t.train.g.unique().tolist() == list(range(t.n_groups))
    assert (name == "compas") == (len(load_table(name).train.y) < 2_100)


def test_groups_and_split():
    t = load_table("compas", groups={"African-American": ["African-American"],
                                     "Everybody else": ["Caucasian", "Hispanic", "Other", "Asian"]})
    assert t.group_names == ("African-American", "Everybody else")
    same, other = load_table("law"), load_table("law", seed=1)
    assert torch.equal(load_table("law").test.x, same.test.x) and not torch.equal(other.test.x, same.test.x)


def test_random_numbers_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    load_table("adult")
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


def test_trains():
    "A table goes into the harness as the census does"
    t = load_table("law")
    network = lambda seed: torch.nn.Linear(len(t.feature_names), 1)
    run, _ = run_one(t, network, ALGORITHMS["alm"], 0, Setting(seconds=None, steps=5, evaluations=1), progress=False)
    assert run.finished and run.record["test_gaps"].shape == (2, 2)
