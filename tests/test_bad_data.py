"""Data and constraints that cannot be meant: the right class, a sentence that says what to do, and nothing changed."""
import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from hctrain.constraints import (
    MeanGap,
    RateGap,
    Rates,
    Sharpened,
    WeightedBCE,
    accuracy,
    loss_rate,
    positive_rate,
    true_positive_rate,
)
from hctrain.sampling import BalancedSampler, RandomStreams, Streams

NAN = math.nan
Z = torch.tensor([1.0, -2.0, 0.5, -0.5])
Y, G, X = torch.tensor([0.0, 1, 1, 0]), torch.tensor([0, 1, 0, 1]), torch.zeros(4, 2)


def batch(g=G, y=Y, comes_again=False):
    if comes_again:
        g = g.clone()
        g.comes_again = True
    return SimpleNamespace(g=g, y=y)


def plain(v):
    "Copy of a state as lists and dicts of numbers, which `==` compares"
    if isinstance(v, dict):
        return {k: plain(u) for k, u in v.items()}
    return [plain(u) for u in v] if isinstance(v, list) else v.tolist() if isinstance(v, torch.Tensor) else v


class World:
    "Everything with a state, each part past its first use"
    def __init__(self):
        self.gaps = {p: RateGap(true_positive_rate, 2, reference="batch", absent=p) for p in ("error", "skip", "carry")}
        self.fresh = RateGap(true_positive_rate, 2, reference="batch", absent="carry")
        self.by_group = RateGap(positive_rate, 2, reference=1)
        self.sharp = RateGap(Sharpened(positive_rate, 0.1), 2, reference="batch")
        self.right = RateGap(accuracy, 2, reference="batch")
        self.mean = MeanGap(true_positive_rate, 2)
        self.loss, self.weighted = WeightedBCE(), WeightedBCE([1.0, 1.0])
        self.sampler, self.streams = BalancedSampler(G, 2, seed=1), Streams(X, Y, G, 2, seed=1)
        self.random = RandomStreams(X, Y, G, 3, seed=1)
        for gaps in (*self.gaps.values(), self.by_group, self.sharp, self.right):
            gaps(Z, batch())
        self.sampler.draw(), self.random.draw()
        self.first = self.streams.draw()[0]

    def state(self):
        parts = [v for v in (*self.__dict__.values(), *self.gaps.values()) if hasattr(v, "state_dict")]
        return plain([v.state_dict() for v in parts] + [Z, Y, G, X, torch.get_rng_state()])

    def spoil(self):
        "Write into the codes that all batches share, and draw"
        self.first.g[0] = 1
        return self.streams.draw()


class Case(NamedTuple):
    what: str
    call: object       # What is done to a world
    wanted: str        # After "expected"
    given: str         # After "got"
    remedy: str        # After ":"
    error: type = ValueError


def memory(**state):
    return {"sums": torch.ones(2), "counts": torch.ones(2), **state}


def gap(**k):
    return RateGap(k.pop("statistic", positive_rate), k.pop("n_groups", 2), reference=k.pop("reference", "batch"), **k)


EMPTY, ROWS = "at least one row", "draw one with rows"
CODES, ONE = "group codes of shape (4,)", "pass one integer code a row"
CASES = [
    # a group that is absent from a batch, or has nobody who counts
    Case("absent group", lambda w: w.gaps["error"](Z, batch(0 * G)), "rows of every group", "[1]", 'absent="skip"'),
    Case("absent since the start", lambda w: w.fresh(Z, batch(0 * G)),
         "rows of every group", "since the start", "draw"),
    Case("no positives", lambda w: w.gaps["error"](Z, batch(y=1 - G.float())),
         "every group", "that count", "larger batches"),
    Case("absent reference", lambda w: w.by_group(Z, batch(0 * G)), "rows of every group", "[1]", "balanced"),
    Case("absent, codes come again", lambda w: w.sharp(Z, batch(0 * G, comes_again=True)), "rows of", "[1]", "draw"),
    # no rows at all
    *(Case(f"empty batch, {p}", lambda w, p=p: w.gaps[p](Z[:0], batch(G[:0], Y[:0])), EMPTY, "empty batch", ROWS)
      for p in ("error", "skip", "carry")),
    Case("empty batch, loss", lambda w: w.loss(Z[:0], batch(G[:0], Y[:0])), EMPTY, "an empty batch", ROWS),
    Case("empty batch, mean", lambda w: w.mean.reference_of(Z[:0], batch(G[:0], Y[:0])), EMPTY, "empty batch", ROWS),
    # groups that overlap, and other codes that are not one whole number a row
    Case("one-hot groups", lambda w: w.sharp(Z, batch(torch.eye(2)[G])), CODES, "(4, 2)", "one RateGap for each"),
    Case("two attributes", lambda w: w.weighted(Z, batch(torch.stack([G, G], 1))), CODES, "(4, 2)", "overlap"),
    Case("codes as floats", lambda w: w.sharp(Z, batch(G.float())), "dtype int64", "torch.float32", ONE),
    Case("codes as booleans", lambda w: w.sharp(Z, batch(G > 0)), "dtype int64", "torch.bool", ONE),
    Case("codes as a list", lambda w: w.sharp(Z, batch([0, 1, 0, 1])), CODES, "got list", ONE),
    Case("no codes", lambda w: w.gaps["carry"](Z, batch(None)), CODES, "got NoneType", ONE),
    Case("fewer codes", lambda w: w.gaps["carry"](Z, batch(G[:3])), CODES, "(3,)", ONE),
    Case("one code for all", lambda w: w.weighted(Z, batch(G[:1])), CODES, "(1,)", ONE),
    Case("unknown group", lambda w: w.gaps["carry"](Z, batch(G + 1)), "in 0..1", "from 1 to 2", "correct n_groups"),
    Case("negative code", lambda w: w.gaps["skip"](Z, batch(G - 1)), "in 0..1", "from -1 to 0", "recode the groups"),
    Case("unknown, come again", lambda w: w.sharp(Z, batch(2 * G, comes_again=True)), "in 0..1", "to 2", "recode"),
    Case("negative, come again", lambda w: w.right(Z, batch(-G, comes_again=True)), "in 0..1", "from -1", "recode"),
    Case("group without weight", lambda w: w.weighted(Z, batch(G + 1)), "in 0..1", "from 1 to 2", "as many weights"),
    # labels
    Case("labels 0 and 2", lambda w: w.gaps["carry"](Z, batch(y=2 * Y)), "labels 0 or 1", "got 2", "recode the labels"),
    Case("labels -1 and 1", lambda w: w.loss(Z, batch(y=2 * Y - 1)), "labels 0 or 1", "got -1", "recode the labels"),
    Case("half a label", lambda w: w.right(Z, batch(y=Y / 2, comes_again=True)), "labels 0 or 1", "got 0.5", "recode"),
    Case("missing label", lambda w: w.gaps["skip"](Z, batch(y=Y * NAN)), "labels 0 or 1", "nan", "drop rows without"),
    Case("column of labels", lambda w: w.right(Z, batch(y=Y[:, None])), "shape (4,)", "(4, 1)", "as a vector"),
    Case("no labels", lambda w: w.loss(Z, batch(y=None)), "one a logit", "got none", "pass batch.y"),
    Case("fewer labels", lambda w: w.gaps["carry"](Z, batch(y=Y[:3])), "shape (4,)", "shape (3,)", "as a vector"),
    # logits
    Case("two outputs", lambda w: w.sharp(torch.zeros(4, 2), batch()),
         "(n,) or (n, 1)", "(4, 2)", "before any sigmoid"),
    Case("NaN logits, carry", lambda w: w.gaps["carry"](Z * NAN, batch()), "finite values", "[0, 1]", "lower the step",
         FloatingPointError),
    Case("NaN logits, sharp", lambda w: w.sharp(Z * NAN, batch()), "finite values", "Sharpened(pos", "look at the log",
         FloatingPointError),
    Case("NaN logits, mean", lambda w: w.mean.means(Z * NAN, batch()),
         "finite values", "NaN or inf", "look at the log", FloatingPointError),
    # arguments of constraints
    Case("bound below 0", lambda w: gap(bound=-0.1), "bound of at least 0", "got -0.1", "largest gap that is allowed"),
    Case("bound NaN", lambda w: gap(bound=NAN), "finite bound", "got nan", "largest gap that is allowed"),
    Case("bound infinite", lambda w: gap(bound=math.inf), "finite bound", "got inf", "largest gap that is allowed"),
    Case("bound a string", lambda w: gap(bound="0.05"), "finite bound", "got '0.05'", "largest gap that is allowed"),
    Case("mean, bound below 0", lambda w: MeanGap(positive_rate, 2, -1), "bound of at", "got -1", "that is allowed"),
    Case("no groups", lambda w: gap(n_groups=0), "n_groups of at least 1", "got 0", "pass the number of groups"),
    Case("unknown policy", lambda w: gap(absent="ignore"), '"skip" or "carry"', "'ignore'", "choose one of the three"),
    Case("reference to no group", lambda w: gap(reference=2), "in 0..1", "got 2", "write 2.0 for a fixed value"),
    Case("empty group's weight", lambda w: gap(reference="population", weights=[2, 0]),
         "positive", "0.0]", "sampler.w"),
    Case("weights of one group", lambda w: gap(reference="population", weights=[1]),
         "shape (2,)", "[1.0]", "sampler.w"),
    Case("no weights", lambda w: gap(reference="population"), "expected weights", "got none", 'or reference="batch"'),
    Case("temperature 0", lambda w: Sharpened(positive_rate, 0), "temperature above 0", "got 0", "start with 0.1"),
    Case("temperature NaN", lambda w: Sharpened(positive_rate, NAN),
         "temperature above 0", "got nan", "start with 0.1"),
    Case("a loss is no decision", lambda w: Sharpened(loss_rate),
         "a rate of decisions", "loss_rate", "pass a function"),
    Case("surrogate by name", lambda w: Sharpened(positive_rate, 1, "step"), "of z/T", "'step'", "or smoothed_step"),
    Case("mean without reference", lambda w: w.mean(Z, batch()), "one reference", "got none", "gaps.reference_of"),
    Case("reference NaN", lambda w: MeanGap(positive_rate, 2, reference=NAN), "finite reference", "nan", "pass a rate"),
    Case("other groups' rates", lambda w: w.gaps["carry"].from_rates(Rates(Z, Z)), "2 groups", "got 4", "correct n_gr"),
    Case("adding other groups", lambda w: Rates(Z, Z) + Rates(Z[:2], Z[:2]), "4 groups", "2 groups", "add", TypeError),
    # the memory of carry
    Case("memory of others", lambda w: w.gaps["carry"].load_state_dict(memory(sums=Z)), "(2,)", "(4,)", "same groups"),
    Case("memory with NaN", lambda w: w.gaps["carry"].load_state_dict(memory(sums=Z[:2] * NAN)),
         "finite", "nan", "load"),
    Case("memory below 0", lambda w: w.gaps["carry"].load_state_dict(memory(counts=-Z[:2])),
         "at least 0", "-1", "load"),
    Case("memory missing", lambda w: w.gaps["carry"].load_state_dict(None),
         "sums and counts", "NoneType", "load the st"),
    Case("half a memory", lambda w: w.gaps["carry"].load_state_dict({"sums": Z[:2]}),
         "sums and counts", "(2,)", "load"),
    # groups of a data set
    Case("empty group", lambda w: BalancedSampler(2 * G, 1), "every group 0..2", "none of [1]", "drop those that are"),
    Case("group that never came", lambda w: BalancedSampler(G, 1, n_groups=3), "every group", "[2]", "without gaps"),
    Case("more groups than said", lambda w: BalancedSampler(G, 1, n_groups=1),
         "in 0..0", "0 to 1", "recode the groups"),
    Case("groups below 0", lambda w: Streams(X, Y, G - 1, 1), "of at least 0", "-1 to 0", "recode the groups"),
    Case("overlapping groups", lambda w: BalancedSampler(torch.eye(2)[G].long(), 1), "a row", "(4, 2)", "overlap"),
    Case("NaN as a group", lambda w: BalancedSampler(G * NAN, 1), "integer", "float32", "such as g.long()"),
    Case("no rows", lambda w: Streams(X[:0], Y[:0], G[:0], 1), "one row or more", "(0,)", "pass a vector"),
    Case("singleton, no replacement", lambda w: BalancedSampler([0, 0, 1], 2, False),
         "at most 1", "got 2", "draw fewer"),
    # sizes of batches
    Case("no rows a group", lambda w: Streams(X, Y, G, 0), "per_group to be a whole number", "got 0", "pass an int"),
    Case("5 rows for 2 groups", lambda w: Streams(X, Y, G, 5 / 2), "per_group to be a whole", "got 2.5", "pass an int"),
    Case("batch of 0", lambda w: RandomStreams(X, Y, G, 0), "batch_size to be a whole", "got 0", "pass an int"),
    Case("batch beyond the data", lambda w: RandomStreams(X, Y, G, 5, replacement=False),
         "4 rows of the data", "5", "dr"),
    Case("no batches", lambda w: w.streams.draw(0), "k to be a whole number of at least 1", "got 0", "pass an int"),
    Case("half a batch", lambda w: w.random.draw(1.5), "k to be a whole number", "got 1.5", "pass an int"),
    Case("more streams than made", lambda w: w.streams.draw(5), "1 to 4 batches", "got 5", "with a larger n"),
    # tensors that do not belong together
    Case("data without labels", lambda w: Streams(X, None, G, 1), "tensors x, y and g", "NoneType", "torch.as_tensor"),
    Case("data, fewer labels", lambda w: Streams(X, Y[:3], G, 1), "y (n,)", "(3,)", "one label"),
    Case("data, labels missing", lambda w: RandomStreams(X, Y * NAN, G, 1),
         "finite values in y", "NaN", "drop or fill"),
    Case("data, features infinite", lambda w: Streams(X + math.inf, Y, G, 1), "finite values in x", "inf", "drop or"),
    # positions
    Case("codes written into", lambda w: w.spoil(), "as drawn", "changed in place", "clone batch.g"),
    Case("no position", lambda w: w.streams.load_state_dict(None), "a dict", "NoneType", "state_dict() gave"),
    Case("empty position", lambda w: w.sampler.load_state_dict({}), "a state with", "None", "give the arguments"),
    Case("position of another", lambda w: w.sampler.load_state_dict(w.streams.state_dict()),
         "Balanced", "Streams", "give"),
    Case("position below 0", lambda w: w.random.load_state_dict({**w.random.state_dict(), "t": -1}),
         "t to", "-1", "pass"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.what)
def test_refused_in_a_sentence_and_nothing_changed(case):
    world = World()
    before = world.state()
    with pytest.raises(case.error) as caught:
        case.call(world)
    assert type(caught.value) is case.error
    start, _, rest = str(caught.value).partition(", got ")
    given, _, remedy = rest.partition(": ")
    assert start.startswith("expected ") and case.wanted in start, str(caught.value)
    assert case.given.removeprefix("got ") in rest and case.remedy in remedy, str(caught.value)
    assert given and remedy
    assert world.state() == before


def test_nothing_legal_is_refused():
    alone = Streams(X, Y, torch.tensor([0, 0, 0, 1]), 2)                                # a group of one, drawn again
    assert (alone.draw()[0].y[2:] == Y[3]).all()
    odd = BalancedSampler([0] * 5 + [1] * 4, 2, replacement=False)                      # 5 rows in batches of 2
    assert {i for _ in range(40) for i in odd.draw().tolist()} == set(range(9))
    assert gap(bound=0)(Z, batch()).shape == (2,)
    skip = RateGap(positive_rate, 2, reference="batch", absent="skip")
    assert not skip(Z, batch(0 * G))[1]
    two = [RateGap(positive_rate, 2, reference="batch")(Z, batch(g)) for g in (G, G.flip(0))]  # two attributes
    assert torch.cat(two).shape == (4,)
