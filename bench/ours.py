"""Steps of hctrain through its public classes, as `hctrain.train.train` makes them, with all checks on."""
import torch

from hctrain import SSLALM, Lagrangian, RateGap, StochasticGhost, SwitchingSubgradient, WeightedBCE, positive_rate
from hctrain.train import choose_step

from .harness import Work
from .tasks import BOUND, Task


def over_adam(method, **options):
    "A method over Adam"
    return lambda params, m: method(torch.optim.Adam(params), m, **options)


METHODS = {  # name: (how it is made, draws a step)
    "SSL-ALM, 1 draw": (SSLALM, 1),
    "SSL-ALM, 3 draws": (SSLALM, 3),
    "ALM over Adam, 1 draw": (over_adam(Lagrangian), 1),
    "Switching, 3 draws": (SwitchingSubgradient, 3),
}


def gaps_of(task: Task, two_sided: bool = False) -> RateGap:
    "The gap of each group's rate to the overall one"
    return RateGap(positive_rate, task.n_groups, BOUND, "batch", two_sided=two_sided)


def step_of(task: Task, make, draws: int = 1, supplied: bool = True, two_sided: bool = False) -> Work:
    "One step, with batches drawn beforehand or as they are needed"
    net, gaps, loss = task.net(), gaps_of(task, two_sided), WeightedBCE()
    opt = make(net.parameters(), gaps.m)
    do, streams = choose_step(opt, draws), task.supplied if supplied else task.streams()
    return Work(lambda: do(net, opt, loss, gaps, streams, True))


def variants(task: Task, supplied: bool = True, names=METHODS) -> dict[str, Work]:
    "Steps of all methods"
    return {name: step_of(task, *METHODS[name], supplied) for name in names}


def ghost(task: Task) -> Work:
    "A step of Stochastic Ghost: four subproblems on 6.5 batches on average"
    return step_of(task, StochasticGhost, supplied=False, two_sided=True)
