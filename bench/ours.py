"""Steps of hctrain through its public classes, as `hctrain.train.train` makes them, with all checks on."""
from collections.abc import Callable
from typing import NamedTuple

import torch

from hctrain import SSLALM, Lagrangian, RateGap, StochasticGhost, Streams, SwitchingSubgradient, WeightedBCE
from hctrain.acs import network
from hctrain.constraints import positive_rate
from hctrain.ensemble import FIRST, ROWS, Member, Stack, recipe_of
from hctrain.replay import Replay
from hctrain.train import choose_step

from .harness import Work
from .tasks import BOUND, FEATURES, HIDDEN, Task


def over_adam(method, **options):
    "A method over Adam"
    return lambda params, m: method(torch.optim.Adam(params), m, **options)


class Method(NamedTuple):
    "What to time"
    make: Callable          # `make(params, m)` gives the optimizer
    draws: int              # Independent constraint draws a step
    compiled: bool = False  # The whole step as machine code


METHODS = {
    "SSL-ALM, 1 draw": Method(SSLALM, 1),
    "SSL-ALM, 3 draws": Method(SSLALM, 3),
    "ALM over Adam, 1 draw": Method(over_adam(Lagrangian), 1),
    "Switching, 3 draws": Method(SwitchingSubgradient, 3)}
EAGER, ONE = list(METHODS), "SSL-ALM, 1 draw, compiled"
METHODS |= {f"{name}, compiled": m._replace(compiled=True) for name, m in METHODS.items()}


def gaps_of(task: Task, two_sided: bool = False) -> RateGap:
    "The gap of each group's rate to the overall one"
    return RateGap(positive_rate, task.n_groups, BOUND, "batch", two_sided=two_sided)


def step_of(task: Task, method: Method, supplied: bool = True, two_sided: bool = False) -> Work:
    "One step, with batches drawn beforehand or as they are needed"
    net, gaps, loss = task.net(), gaps_of(task, two_sided), WeightedBCE()
    opt, streams = method.make(net.parameters(), gaps.m), task.supplied if supplied else task.streams()
    do = choose_step(opt, method.draws)
    do = Replay(do) if method.compiled else do
    return Work(lambda: do(net, opt, loss, gaps, streams, True))


def variants(task: Task, supplied: bool = True, names=METHODS) -> dict[str, Work]:
    "Steps of all methods"
    return {name: step_of(task, METHODS[name], supplied) for name in names}


def stacked(task: Task, method: Method, members: int = 16) -> Work:
    "One step of many runs as one, or of as many of them as go together, with sampling"
    runs = []
    for seed in range(members):
        net, gaps = network(FEATURES, HIDDEN[task.size], seed), gaps_of(task)
        streams = Streams(*task.data.train, per_group=task.per_group, seed=seed)
        runs.append(Member(net, method.make(net.parameters(), gaps.m), WeightedBCE(), gaps, streams))
    recipe = recipe_of(runs[0], method.draws)
    runs = runs[:max(2, ROWS // recipe.rows)]
    for m in runs * FIRST:
        recipe.do_step(m.model, m.opt, m.loss, m.gaps, m.streams, recipe.joint)
    return Work(Stack(runs, recipe, method.compiled).step, len(runs))


def ghost(task: Task) -> Work:
    "A step of Stochastic Ghost: four subproblems on 6.5 batches on average"
    return step_of(task, Method(StochasticGhost, 1), supplied=False, two_sided=True)
