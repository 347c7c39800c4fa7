"""The benchmark: a miniature of it runs, its arithmetic is right, and every library gets the same problem."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from chapters import ROOT

from hctrain import RateGap, WeightedBCE, positive_rate

sys.path.insert(0, str(ROOT))
from bench import harness, ours, peers, report, target  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.tasks import Task, rows  # noqa: E402

with_peers = pytest.mark.skipif(not peers.INSTALLED, reason="the peers are not installed")


class Clock:
    "CPU time that passes only where it is told to"
    def __init__(self, monkeypatch):
        self.t = 0.
        monkeypatch.setattr("time.process_time", lambda: self.t)
        monkeypatch.setattr(target, "spent", lambda: self.t)

    def work(self, seconds):
        def step():
            self.t += seconds
        return step


@pytest.mark.filterwarnings("ignore:The default value of raise_error:PendingDeprecationWarning")    # of a peer's solver
def test_miniature(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HCTRAIN_ACS_ROOT", raising=False)
    file = main(["--effort", "tiny", "--out", str(tmp_path)])
    tables = json.loads(file.read_text(encoding="utf-8"))["tables"]
    assert {"step", "used", "anatomy", "constraints", "weights", "memory", "imports", "sampling", "set-up", "ghost",
            "subproblems", "runs", "target"} <= tables.keys()
    figures, shown = report.flat({"tables": tables}), capsys.readouterr().out
    for key, f in figures.items():
        assert 0 < f["low"] <= f["value"] <= f["high"] and " | ".join(key) in shown, key
    assert peers.INSTALLED == any(peers.COOPER in row for _, _, row in figures)


def test_pairs_give_the_ratio(monkeypatch):
    clock = Clock(monkeypatch)
    variants = {"Adam": harness.Work(clock.work(1e-3)), "eight at once": harness.Work(clock.work(2e-3), 8)}
    found = harness.interleave(variants, "Adam", harness.Effort(rounds=6))
    assert found["Adam"]["value"] == pytest.approx(1) and found["Adam"]["n"] == 6
    assert found["eight at once"]["value"] == pytest.approx(.25)
    assert found["eight at once"]["seconds"] == pytest.approx(.25e-3)


def test_looks_cost_nothing_and_stop_at_the_target(monkeypatch):
    clock, data = Clock(monkeypatch), SimpleNamespace(train=rows(n=500))
    looks, net = target.Looks(data, cap=10.), lambda x: clock.work(5.)() or torch.zeros(len(x), 1)
    clock.work(2.)()
    looks(net)
    clock.work(3.)()
    looks(net)
    assert [s for s, *_ in looks.path] == [2, 5] and looks.reached is None      # log 2 is no loss of 0.46
    monkeypatch.setattr(target, "LOSS", 1.)
    with pytest.raises(target.Stop):
        looks(net)
    assert looks.reached == 5


def test_compares_with_the_last_one(tmp_path):
    def result(value):
        f = {"value": value, "low": value, "high": value, "unit": "Adam", "n": 1}
        return {"effort": "quick", "tables": {"step": {"5 x 8": {"SSL-ALM, 1 draw": f}}}}
    report.save(result(2.), tmp_path)
    report.save({**result(7.), "effort": "tiny"}, tmp_path)                    # no measurement
    line = report.lines(result(1.5), report.before(tmp_path))[1].split()
    assert line[-7:] == ["2.00", "1.50", "1.50", "to", "1.50", "0.75", "0.95!"]
    assert report.lines(result(.9), None)[1].split()[-1] == "0.95"


def test_keeps_other_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "REFERENCE", tmp_path / "reference.json")
    report.keep({"date": "first", "tables": {"step": 1, "ghost": 2}})
    report.keep({"date": "then", "tables": {"step": 3}})
    assert report.load(report.REFERENCE) == {"date": "then", "tables": {"step": 3, "ghost": 2}}


@with_peers
@pytest.mark.parametrize("make", [peers.fairret_gaps, peers.own_gaps])
def test_peers_get_the_same_constraints(make):
    task = Task(per_group=8, count=2)
    for b, (x, y, sens) in zip(task.batches, peers.supplied(task)):
        out = task.net()(b.x)
        for signed in (False, True):
            torch.testing.assert_close(make(signed=signed)(out, sens), ours.gaps_of(task, signed)(out, b))


@with_peers
def test_peers_get_the_same_problem_in_the_race():
    "Loss and constraints of balanced batches are those of the population, as ours are; the DataLoader's too"
    from fairret.statistic import PositiveRate
    data = SimpleNamespace(train=rows(n=4_000), n_groups=5)
    p, net = target.Point("ALM, HPR", .03, .1, 2., 50, 1., balanced=True), Task().net()
    weights = data.train.g.bincount() / 4_000 * 5
    gaps, loss = RateGap(positive_rate, 5, two_sided=True, weights=weights), WeightedBCE(weights)
    for source in (target.loader, target.gathered):
        made, shares = source(data, p, seed=0)
        x, y, sens = next(iter(made))
        b, out = type(data.train)(x, y[:, 0], sens.argmax(1)), net(x)
        assert sens.sum(0).tolist() == [10] * 5
        for rate in (PositiveRate(), target.own_rate):
            f, c = target.values_of(rate, shares)(net, x, y, sens)
            torch.testing.assert_close(f, loss(out, b))
            torch.testing.assert_close(c, gaps(out, b))


@with_peers
def test_trials_are_the_same_for_all():
    numbers = {n: [p[1:6] for p in target.trials(n)] for n in target.METHODS}
    assert len(numbers[target.OURS]) == 12 and len({str(v) for v in numbers.values()}) == 1
    assert all({p.method for p in target.trials(n)} == set(methods) for n, methods in target.METHODS.items())
