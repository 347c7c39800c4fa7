"""What counts in the end: CPU seconds until loss and largest gap in scores, on all training rows, are small."""
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from hctrain import Lagrangian, RandomStreams, RateGap, Streams, WeightedBCE, positive_rate
from hctrain.acs import load_acs, network
from hctrain.compare import Algorithm, draws_of
from hctrain.train import train

from . import peers
from .harness import ROOT, fresh, spent

LOSS, GAP, BOUND = 0.46, 0.055, 0.05
OURS = "hctrain"


class Point(NamedTuple):
    "A setting that every library understands"
    method: str            # Of the library
    lr: float              # Adam's first step; it falls to 0 in a line
    dual_lr: float         # Multipliers' step
    rho: float             # Penalty weight
    batch: int             # Rows of a batch
    epochs: float          # Passes over the rows until the step is 0
    balanced: bool = False # Equal groups in a batch, and weights that undo it; otherwise plain random batches

    def steps(self, n: int) -> int:
        "Steps of a whole run"
        return max(1, round(self.epochs * n / self.batch))


# --------------------------------------------------------------- clock and data
class Stop(Exception):
    "The run need not go on"


class Looks:
    "Loss and largest gap on all training rows, twice an epoch, with the CPU clock stopped"
    def __init__(self, data, cap: float):
        self.data, self.cap, self.past, self.path, self.reached = data.train, cap, 0., [], None
        self.share = data.train.g.bincount().float()
        self.since = spent()

    def __call__(self, net) -> dict:
        "Look, and stop the run at the target or at the cap"
        self.past += spent() - self.since
        with torch.no_grad():
            z = net(self.data.x).squeeze(1)
            loss = F.binary_cross_entropy_with_logits(z, self.data.y).item()
            sums = torch.zeros_like(self.share).index_add_(0, self.data.g, p := z.sigmoid())
            gap = (sums / self.share - p.mean()).abs().max().item()
        self.path.append((self.past, loss, gap))
        if loss <= LOSS and gap <= GAP:
            self.reached = self.past
            raise Stop
        if self.past > self.cap:
            raise Stop
        self.since = spent()
        return {"loss": loss, "gap": gap}


def virginia():
    "Real Virginia where the census file is there, the synthetic one otherwise"
    places = [os.environ.get("HCTRAIN_ACS_ROOT"), ROOT.parent / "shared/data/acs", ROOT / "data"]
    found = [p for p in places if p and (Path(p) / "2018/1-Year/psam_p51.csv").exists()]
    return load_acs(found[0] if found else None)


# -------------------------------------------------------------------- libraries
METHODS: dict[str, tuple[str, ...]] = {
    OURS: ("ALM, HPR", "ALM, quadratic"),
    peers.HCT: ("ALM, HPR", "ALM, quadratic"),
    peers.COOPER: ("simultaneous", "alternating")}


def form(p: Point) -> str:
    "The name of the augmented Lagrangian, the same in both libraries"
    return p.method.removeprefix("ALM, ").lower()


def streams_of(data, p: Point, seed: int):
    "Batches of hctrain"
    if p.balanced:
        return Streams(*data.train, per_group=p.batch // data.n_groups, n=1, seed=seed)
    return RandomStreams(*data.train, batch_size=p.batch, n=1, seed=seed, replacement=False)


def ours(net, data, p: Point, seed: int, looks: Looks, **options) -> None:
    "hctrain: streams, own rates, `train`; two signed constraints a group, as everywhere here"
    streams = streams_of(data, p, seed)
    gaps = RateGap(positive_rate, data.n_groups, BOUND, "population" if p.balanced else "batch", two_sided=True,
                   absent="error" if p.balanced else "skip", weights=streams.weights)
    adam = torch.optim.Adam(net.parameters(), lr=p.lr)
    opt = Lagrangian(adam, gaps.m, dual_lr=p.dual_lr, rho=p.rho, form=form(p))
    train(net, opt, WeightedBCE(streams.weights), gaps, streams, steps=p.steps(len(data.train.y)), draws=1, anneal=True,
          evaluate=lambda: looks(net), evaluations=max(1, round(2 * p.epochs)), progress=False, **options)


def loader(data, p: Point, seed: int):
    "A peer's DataLoader, and the groups' shares where it balances"
    rows, rng = peers.dataset(*data.train, data.n_groups), torch.Generator().manual_seed(seed)
    if p.balanced:
        made = peers.balanced_loader(rows, p.batch - p.batch % data.n_groups, rng)
        return made, made.batch_sampler.group_weights / data.n_groups
    return DataLoader(rows, batch_size=p.batch, shuffle=True, drop_last=True, generator=rng), None


def gathered(data, p: Point, seed: int):
    "Batches of hctrain for a peer"
    streams = streams_of(data, p, seed)
    shares = None if streams.weights is None else streams.weights / data.n_groups
    return (peers.dataset(*b, data.n_groups).tensors for b, in iter(streams)), shares


def values_of(rate: Callable, shares: torch.Tensor | None) -> Callable:
    "Loss and constraints of a batch, with weights where the batch is balanced"
    def values(net, x, y, sens):
        out = net(x)
        p, weight = out.sigmoid(), None if shares is None else (sens @ shares)[:, None] * len(shares)
        r = rate(p, sens)
        d = r - (p.mean() if shares is None else r @ shares)
        return F.binary_cross_entropy_with_logits(out, y, weight=weight), torch.cat([d, -d]) - BOUND
    return values


def own_rate(p, sens):
    "Mean of each group"
    return (sens.T @ p).squeeze(1) / sens.sum(0).clamp(min=1)


def peer(library: str, net, data, p: Point, seed: int, looks: Looks, as_used: bool = True) -> None:
    "A peer's loop: its own DataLoader and Fairret, or our batches and rates; a scheduler of torch"
    from fairret.statistic import PositiveRate
    batches, shares = (loader if as_used else gathered)(data, p, seed)
    values = values_of(PositiveRate() if as_used else own_rate, shares)
    m, steps = 2 * data.n_groups, p.steps(len(data.train.y))
    adam = torch.optim.Adam(net.parameters(), lr=p.lr)
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1., 0., steps)
    batches = peers.forever(batches) if as_used else batches
    if library == peers.COOPER:
        step = peers.cooper(net, batches, values, m, adam, p.dual_lr, p.rho, p.method == "alternating")
    else:
        from humancompatible.train.dual_optim import ALM
        dual = ALM(m=m, lr=p.dual_lr, penalty=p.rho, is_ineq=True, augmentation=form(p))
        step = peers.humancompatible(net, batches, values, dual, adam)
    every = max(1, round(len(data.train.y) / p.batch / 2))
    for k in range(1, steps + 1):
        step()
        falling.step()
        if k % every == 0:
            looks(net)


def race(library: str, data, p: Point, seed: int, cap: float = 60., **options) -> Looks:
    "One run of a library until the target, the cap, or its last step"
    net = network(data.train.x.shape[1], seed=seed)
    looks = Looks(data, cap)
    try:
        if library == OURS:
            ours(net, data, p, seed, looks, **options)
        else:
            peer(library, net, data, p, seed, looks, **options)
    except Stop:
        pass
    return looks


ANEW = """
import torch
from bench import target
torch.set_num_threads(1)
torch.optim.Adam([torch.zeros(1, requires_grad=True)])
data = target.virginia()
print(target.race(target.OURS, data, target.Point(*{point!r}), {seed}, {cap}, compiled=True).reached or {cap})
"""


def seconds(row: str, data, p: Point, seed: int, cap: float = 60.) -> float:
    "CPU seconds of one reading until the target, at most the cap"
    library, options = READINGS[row]
    if row == NOTHING:                                     # no compiler in memory, and nothing that it made before
        with TemporaryDirectory() as cache:
            return fresh(ANEW.format(point=tuple(p), seed=seed, cap=cap), TORCHINDUCTOR_CACHE_DIR=cache)
    if "compiled" in options:
        race(library, data, p, seed, 0., **options)        # the cache is warm
    return race(library, data, p, seed, cap, **options).reached or cap


# ----------------------------------------------------------------------- tuning
USED, LENT, NOTHING = "as used", "our batches and rates", "hctrain, compiled from nothing"
READINGS: dict[str, tuple[str, dict]] = {  # row of the table: library, and how it is run
    "hctrain, eager": (OURS, {}),
    "hctrain, compiled": (OURS, {"compiled": True}),
    NOTHING: (OURS, {"compiled": True}),
    **{f"{library}, {how}": (library, {"as_used": how == USED})
       for library in (peers.HCT, peers.COOPER) for how in (USED, LENT)}}

WINNERS: dict[str, Point] = {              # what `tune` found on real Virginia; `make bench-full` looks again
    "hctrain, eager": Point("ALM, quadratic", 0.047, 0.047, 3.6, 2600, 64.),
    "hctrain, compiled": Point("ALM, quadratic", 0.047, 0.047, 3.6, 2600, 64.),
    NOTHING: Point("ALM, quadratic", 0.047, 0.047, 3.6, 2600, 64.),
    f"{peers.HCT}, {USED}": Point("ALM, quadratic", 0.025, 0.032, 1.1, 1300, 53.),
    f"{peers.HCT}, {LENT}": Point("ALM, quadratic", 0.047, 0.047, 3.6, 2600, 64.),
    f"{peers.COOPER}, {USED}": Point("alternating", 0.025, 0.032, 1.1, 1300, 53.),
    f"{peers.COOPER}, {LENT}": Point("alternating", 0.047, 0.047, 3.6, 2600, 64.),
}


def readings() -> list[str]:
    "The rows whose libraries are installed"
    return [row for row, (library, _) in READINGS.items() if library == OURS or peers.INSTALLED]


SPACE = {"lr": (0.015, 0.05), "dual_lr": (0.03, 0.2), "rho": (1., 8.), "batch": (700, 4000), "epochs": (45., 110.)}


def trials(library: str, count: int = 12) -> list[Point]:
    "The same settings for every library, in turn with each of its methods and kinds of batches"
    drawn = draws_of(Algorithm("target", None, space=SPACE), count + 1)[1:]
    methods, kinds = METHODS[library], (False,) if library == peers.COOPER else (False, True)
    return [Point(methods[i % 2], **{**a.options, "batch": round(a.options["batch"] / 10) * 10},
                  balanced=kinds[i // 2 % len(kinds)]) for i, a in enumerate(drawn)]


def tune(row: str, data, cap: float = 60., count: int = 12) -> tuple[Point, list[dict]]:
    "The quickest of all trials on seed 0, the best three again on seeds 1 and 2; the winner, and all trials"
    table = [{"point": p, "seconds": [seconds(row, data, p, 0, cap)]} for p in trials(READINGS[row][0], count)]
    for t in sorted(table, key=lambda t: t["seconds"][0])[:3]:
        t["seconds"] += [seconds(row, data, t["point"], seed, cap) for seed in (1, 2)]
    best = min(table, key=lambda t: (-len(t["seconds"]), sum(t["seconds"])))
    return best["point"], table
