"""Steps of humancompatible-train and Cooper, written as their documentation shows; they are imported, never copied."""
import importlib.util
import itertools

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from .harness import Work
from .tasks import BOUND, Task

INSTALLED = all(importlib.util.find_spec(n) for n in ("humancompatible", "cooper", "fairret", "qpsolvers"))
HCT, COOPER = "humancompatible-train", "Cooper"


# ---------------------------------------------------------------- constraints
def fairret_gaps(bound: float = BOUND, signed: bool = False):
    "Gaps by Fairret's statistic, as a user of either library writes them; `sens` is one-hot"
    from fairret.statistic import PositiveRate
    rate = PositiveRate()

    def gaps(out, sens):
        p = torch.sigmoid(out)
        d = rate(p, sens) - rate(p, None)
        return (torch.cat([d, -d]) if signed else d.abs()) - bound
    return gaps


def own_gaps(bound: float = BOUND, signed: bool = False):
    "The same in one matrix product, to see a library's own cost"
    def gaps(out, sens):
        p = torch.sigmoid(out)
        d = (sens.T @ p).squeeze(1) / sens.sum(0).clamp(min=1) - p.mean()
        return (torch.cat([d, -d]) if signed else d.abs()) - bound
    return gaps


# -------------------------------------------------------------------- batches
def forever(loader):
    "A DataLoader without end"
    while True:
        yield from loader


def dataset(x, y, g, n_groups: int) -> TensorDataset:
    "Rows with their labels and one-hot groups"
    return TensorDataset(x, y[:, None], F.one_hot(g, n_groups).float())


def balanced_loader(data: TensorDataset, batch_size: int, generator=None) -> DataLoader:
    "humancompatible-train's sampler in a DataLoader"
    from humancompatible.train.fairness.utils import BalancedBatchSampler
    sampler = BalancedBatchSampler(group_onehot=data.tensors[2], batch_size=batch_size, extend_groups=True,
                                   generator=generator)
    return DataLoader(data, batch_sampler=sampler)


def as_used(task: Task):
    "Batches through a DataLoader"
    data = dataset(*task.data.train, task.n_groups)
    return forever(balanced_loader(data, task.n_groups * task.per_group))


def supplied(task: Task):
    "Batches drawn beforehand"
    return itertools.cycle([dataset(*b, task.n_groups).tensors for b in task.batches])


# ------------------------------------------------------------------ libraries
def problem(gaps):
    "Loss and constraints of a batch"
    def values(net, x, y, sens):
        out = net(x)
        return F.binary_cross_entropy_with_logits(out, y), gaps(out, sens)
    return values


def humancompatible(net, batches, values, dual, primal):
    "A step of humancompatible-train: a dual optimizer beside the primal one"
    def step():
        dual.forward_update(*values(net, *next(batches))).backward()
        primal.step()
        primal.zero_grad()
    return step


def cooper_problem(net, values, m: int, rho: float):
    "A constrained problem with an augmented Lagrangian"
    import cooper

    class Problem(cooper.ConstrainedMinimizationProblem):
        def __init__(self):
            super().__init__()
            self.gap = cooper.Constraint(
                constraint_type=cooper.ConstraintType.INEQUALITY,
                formulation_type=cooper.formulations.AugmentedLagrangian,
                multiplier=cooper.multipliers.DenseMultiplier(num_constraints=m),
                penalty_coefficient=cooper.penalty_coefficients.DensePenaltyCoefficient(init=torch.full((m,), rho)))

        def compute_cmp_state(self, batch):
            f, c = values(net, *batch)
            state = cooper.ConstraintState(violation=c)
            return cooper.CMPState(loss=f, observed_constraints={self.gap: state})
    return Problem()


def cooper(net, batches, values, m: int, primal, dual_lr: float = 0.1, rho: float = 1., alternating: bool = False):
    "A step of Cooper: its `roll`"
    import cooper
    cmp = cooper_problem(net, values, m, rho)
    dual = torch.optim.SGD(cmp.dual_parameters(), lr=dual_lr, maximize=True)
    kind = cooper.optim.AlternatingDualPrimalOptimizer if alternating else cooper.optim.SimultaneousOptimizer
    opt = kind(cmp=cmp, primal_optimizers=primal, dual_optimizers=dual)
    return lambda: opt.roll(compute_cmp_state_kwargs={"batch": next(batches)})


def humancompatible_parts(net, m: int, dual: str = "ALM", primal: str = "Adam", smooth: bool = False):
    "Its optimizers with the settings of the unit"
    from humancompatible.train import dual_optim as d
    duals = {"ALM": lambda: d.ALM(m=m, lr=0.1, penalty=1., is_ineq=True), "SSG": lambda: d.SSG(m=m)}
    p = torch.optim.Adam(net.parameters()) if primal == "Adam" else torch.optim.SGD(net.parameters(), lr=0.01)
    return duals[dual](), d.MoreauEnvelope(p, mu=2., beta=0.5) if smooth else p


# ------------------------------------------------------------------- variants
STEPS = {  # name: (library, dual method, primal optimizer, smoothing)
    f"{HCT}, ALM + smoothing": (HCT, "ALM", "SGD", True),
    f"{HCT}, ALM over Adam": (HCT, "ALM", "Adam", False),
    f"{HCT}, switching over Adam": (HCT, "SSG", "Adam", False),
    f"{COOPER}, ALM over Adam": (COOPER, "ALM", "Adam", False),
}


def step_of(task: Task, name: str, gaps, batches) -> Work:
    "One step of a peer"
    library, dual, primal, smooth = STEPS[name]
    net, m = task.net(), task.n_groups
    if library == COOPER:
        return Work(cooper(net, batches, problem(gaps), m, torch.optim.Adam(net.parameters())))
    return Work(humancompatible(net, batches, problem(gaps), *humancompatible_parts(net, m, dual, primal, smooth)))


def variants(task: Task, source=supplied, gaps=fairret_gaps, names=STEPS) -> dict[str, Work]:
    "Steps of the peers, where they are installed"
    return {name: step_of(task, name, gaps(), source(task)) for name in names} if INSTALLED else {}


# ------------------------------------------------------------------------- ghost
class BalancedBatches:
    "Batches as GhostSQP asks for them: J of them as one, and its two halves"
    def __init__(self, task: Task):
        self.streams, self.size, self.n_groups = task.streams(), task.n_groups * task.per_group, task.n_groups

    def draw(self, J: int, rng):
        "J fresh balanced batches as one"
        return dataset(*self.streams.join([J])[0], self.n_groups).tensors

    def split_even_odd(self, batch):
        "Every other batch, and the rest"
        parts = [t.view(-1, 2, self.size, t.shape[1]) for t in batch]
        return tuple([t[:, i].flatten(0, 1) for t in parts] for i in (0, 1))


def ghost(task: Task) -> Work:
    "A step of GhostSQP on batches of the same size, levels drawn by the law that ours uses"
    from humancompatible.train.sqp.ghost import GhostConfig, GhostSQP
    gaps = fairret_gaps(signed=True)

    def constraint(i):
        return lambda net, batch: gaps(net(batch[0]), batch[2])[i]

    def loss(net, batch):
        return F.binary_cross_entropy_with_logits(net(batch[0]), batch[1])
    constraints = [constraint(i) for i in range(2 * task.n_groups)]
    return Work(GhostSQP(task.net(), loss, constraints, BalancedBatches(task), GhostConfig(alpha=0.6)).step)


def subproblems(Z, c) -> dict:
    "GhostSQP's linear and quadratic program for gradients of f and of c, numpy arrays"
    from humancompatible.train.sqp.ghost.subproblems import compute_kappa, solve_subproblem
    kappa = compute_kappa(c, Z[1:], 0.5, 0.8)
    return {f"{HCT}, LP": lambda: compute_kappa(c, Z[1:], 0.5, 0.8),
            f"{HCT}, QP": lambda: solve_subproblem(Z[0], c, Z[1:], kappa, 10., 1.)}
