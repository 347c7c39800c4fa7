"""The task that all are timed on: synthetic rows, unbalanced groups, a bound on the gap of each group's rate."""
import itertools
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from hctrain import Batch, Streams
from hctrain.acs import network

from .harness import Work

ROWS, FEATURES, BOUND = 36_915, 9, 0.05            # as many as Virginia has
SHARES = 0.52, 0.02, 0.10, 0.02, 0.34
HIDDEN = {"2.7k": (64, 32), "100k": (256, 384), "10M": (3072, 3200)}


def rows(n_groups: int = 5, n: int = ROWS, seed: int = 0) -> Batch:
    "Features, labels that depend on features and group, and group codes"
    rng = torch.Generator().manual_seed(seed)
    share = torch.tensor(SHARES) if n_groups == 5 else 0.2 + torch.rand(n_groups, generator=rng) ** 3
    g = torch.multinomial(share, n, replacement=True, generator=rng)
    g[:n_groups] = torch.arange(n_groups)                                       # no group is empty
    x = torch.randn(n, FEATURES, generator=rng) + 0.4 * torch.randn(n_groups, FEATURES, generator=rng)[g]
    x = (x - x.mean(0)) / x.std(0)
    z = 0.6 * x @ torch.randn(FEATURES, generator=rng) + 0.7 * torch.randn(n_groups, generator=rng)[g] - 0.3
    return Batch(x, (torch.rand(n, generator=rng) < z.sigmoid()).float(), g)


class Supplied:
    "Batches drawn beforehand, again and again: a step with these costs no sampling"
    def __init__(self, streams, count: int):
        self.drawn = [streams.draw() for _ in range(count)]
        self.again = itertools.cycle(self.drawn)

    def draw(self, k: int):
        "k independent batches"
        return next(self.again)[:k]


class Task:
    "Groups, rows of each group in a batch, network"
    def __init__(self, n_groups: int = 5, per_group: int = 8, size: str = "2.7k", count: int = 64, n: int = ROWS):
        self.n_groups, self.per_group, self.size = n_groups, per_group, size
        self.data = SimpleNamespace(train=rows(n_groups, n), n_groups=n_groups)
        self.supplied = Supplied(self.streams(), count)

    def net(self):
        "A new network"
        return network(FEATURES, HIDDEN[self.size])

    def streams(self):
        "Balanced batches, drawn as they are needed"
        return Streams(*self.data.train, per_group=self.per_group)

    @property
    def batches(self) -> list:
        "The supplied batches that a method with one draw sees"
        return [draw[0] for draw in self.supplied.drawn]


def plain(task: Task, make=torch.optim.Adam, **options) -> Work:
    "The unit: a step of a torch optimizer on the loss alone, batch supplied"
    net, batches = task.net(), itertools.cycle(task.batches)
    opt = make(net.parameters(), **options)

    def step():
        b = next(batches)
        opt.zero_grad()
        F.binary_cross_entropy_with_logits(net(b.x).squeeze(1), b.y).backward()
        opt.step()
    return Work(step)
