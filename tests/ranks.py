"""What the processes of test_distributed.py do: four of them are started once, and go through all tasks together."""
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hctrain import (
    PI,
    SSLALM,
    Lagrangian,
    MeanGap,
    PenaltyBarrier,
    RandomStreams,
    RateGap,
    Streams,
    SwitchingSubgradient,
    WeightedBCE,
    loss_rate,
    true_positive_rate,
)
from hctrain.compare import ALGORITHMS
from hctrain.distributed import MicroBatches, Team, load_sharded, save_sharded
from hctrain.train import together, train

TASKS = {}


def task(f):
    TASKS[f.__name__] = f
    return f


class Worst:
    "The largest error rate of a group: a maximum of ratios"
    m = 1

    def shares(self, out, batch):
        return loss_rate(out, batch.g, batch.y, 3)

    def from_sums(self, sums, counts):
        return (sums / counts).max().reshape(1) - .1

    def __call__(self, out, batch):
        return self.from_sums(*self.shares(out, batch))


def rows(dtype=torch.float64, n=300):
    gen = torch.Generator().manual_seed(0)
    x, g = torch.randn(n, 5, generator=gen).to(dtype), torch.arange(n) % 3
    x[:, 0] += 2. * (g == 1)
    return x, (x[:, 0] + torch.randn(n, generator=gen) > 0).to(dtype), g


def balanced():
    return Streams(*rows(), per_group=7)


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    with torch.no_grad():
        net[-1].weight *= 5  # gaps from the start
    return net


def wrapped(team, net):
    return DistributedDataParallel(net, process_group=team.group) if team.size > 1 else net


def run(team, make, constraints, streams=balanced, steps=50, model=lambda net: net, **options):
    "Weights, multipliers and the run of `train`, in the processes of a team"
    net, streams = network(), streams()
    gaps = constraints(3, .02, streams.weights)
    loss, opt = WeightedBCE(streams.weights), make(net.parameters(), gaps.m)
    done = train(wrapped(team, model(net)), opt, team.pool(loss), team.pool(gaps), team.shard(streams), steps=steps,
                 progress=False, **options)
    return [*(p.detach() for p in net.parameters()), getattr(opt, "y", torch.zeros(1))], done


def furthest(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a, b, strict=True))


def tpr(n_groups, bound, weights):
    return RateGap(true_positive_rate, n_groups, bound, reference=1, absent="carry")


CASES = {name: (lambda p, m, a=a: a.make(p, m, **a.options), a.constraints, {}) for name, a in ALGORITHMS.items()}
CASES |= {"ratios with a reference group": (SSLALM, tpr, {"draws": 1}),
          "a maximum": (SSLALM, lambda *_: Worst(), {"draws": 2}),
          "a switch and a maximum": (lambda p, m: SwitchingSubgradient(p, m, tol=.6, output="random"),
                                     lambda *_: Worst(), {}),
          "means": (SSLALM, lambda n, bound, _: MeanGap(true_positive_rate, n, bound, reference=.5), {"draws": 1}),
          "micro-batches": (SSLALM, tpr, {"draws": 1, "model": lambda net: MicroBatches(net, 4)}),
          "annealed, unbalanced": (lambda p, m: SSLALM(torch.optim.Adam(p), m), tpr, 
                                  {"anneal": True, "streams": lambda: RandomStreams(*rows(), batch_size=23)})}


@task
def same_numbers(alone, team, two, folder):
    "How far the weights and multipliers after 50 steps are from those of one process, for 2 and 4 processes"
    off = {}
    for i, (name, (make, constraints, options)) in enumerate(CASES.items()):
        end = lambda t, make=make, constraints=constraints, options=options: run(t, make, constraints, **options)[0]
        four = end(team)
        if i % 2 == dist.get_rank() // 2:  # each pair of processes takes half of them
            one, pair = end(alone), end(two)
            off[name] = furthest(one, pair), furthest(one, four), one[-1].abs().max().item()
    return off


@task
def exchanges(alone, team, two, folder):
    "Exchanges of a step besides DDP's own, and their bytes"
    found, real = {}, dist.all_reduce
    for name in ("sslalm", "ssw", "ghost"):
        for draws in (3, 2, 1) if name == "sslalm" else (3,):
            sent = []
            make, constraints, _ = CASES[name]
            dist.all_reduce = lambda t, *a, sent=sent, **kw: (sent.append((t.numel(), t.dtype)), real(t, *a, **kw))[1]
            try:
                run(team, make, constraints, steps=10, draws=draws, evaluations=1)
            finally:
                dist.all_reduce = real
            found[name, draws] = [n for n, dtype in sent if dtype == torch.float64 and n != 3]  # 3: a meeting
    return found


@task
def plain_loop(alone, team, two, folder):
    "Without `train`, with two passes through the network before one backward"
    def end(t):
        net, streams = network(), t.shard(balanced())
        model, opt = wrapped(t, net), SSLALM(net.parameters(), 3)
        loss, gaps = t.pool(WeightedBCE()), t.pool(RateGap(true_positive_rate, 3, .02, "batch", absent="skip"))
        t.watch(opt, every=4)
        for xi, z0, z1, z2 in (streams.draw() for _ in range(10)):
            f, c1 = loss(model(xi.x), xi), gaps(model(z1.x), z1)
            with torch.no_grad():
                c0, c2 = gaps(model(z0.x), z0), gaps(model(z2.x), z2)
            opt.zero_grad()
            opt.dual_step(c0)
            opt.lagrangian(f, c1, c2).backward()
            opt.step()
        return [*(p.detach() for p in net.parameters()), opt.y]
    return furthest(end(alone), end(team))


@task
def averages_drift(alone, team, two, folder):
    "Constraints of each process's own rows: the check says which state is not the same, and `train` refuses them"
    net, streams = network(), balanced()
    shard, gaps = team.shard(streams), RateGap(true_positive_rate, 3, .02, "batch", absent="skip")
    model, opt, loss = wrapped(team, net), SSLALM(net.parameters(), 3), team.pool(WeightedBCE())
    handle, said = team.watch(opt), []
    xi, = shard.draw(1)
    out = model(xi.x)
    f, c = loss(out, xi), gaps(out, xi)
    opt.dual_step(c.detach())
    opt.lagrangian(f, c).backward()
    for call in (opt.step, lambda: train(model, opt, loss, gaps, shard, steps=1),
                 lambda: team.check(SSLALM(net.parameters(), 3, rho=1. + team.rank))):
        try:
            call()
        except (RuntimeError, ValueError) as e:
            said.append(str(e))
        handle.remove()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        team.pool(lambda out, batch: gaps(out, batch))(out.detach(), xi)
    return [*said, str(told[0].message)]


@task
def nan_in_one_process(alone, team, two, folder):
    "A NaN in the rows of one process: refused by all with the same sentence, or skipped by all"
    def spoiled(t, at, seen):
        def f(net):
            def hook(module, args, out):
                seen.append(1)
                return out * float("nan") if len(seen) in at and t.rank == 1 else out
            net.register_forward_hook(hook)
            return net
        return f
    said = []
    for at in ({5}, {6}):  # in the pass with gradient, in the one without
        try:
            run(team, SSLALM, tpr, steps=10, model=spoiled(team, at, []))
        except FloatingPointError as e:
            said.append(str(e))
    end, done = run(team, SSLALM, tpr, steps=10, model=spoiled(team, {5, 8}, []), nonfinite="skip")
    return said, done.skipped, done.step, all(bool(t.isfinite().all()) for t in end)


@task
def a_common_end(alone, team, two, folder):
    "A budget in seconds, Ctrl-C in one process, evaluation by the first, an error there"
    seen = []
    def look():
        seen.append(team.rank)
        return {"n": float(len(seen))}
    _, timed = run(team, SSLALM, tpr, steps=None, seconds=.5, evaluate=look, evaluations=3)
    pressed = []
    def press(net):
        def hook(*_):
            pressed.append(1)
            if team.rank == 2 and len(pressed) == 9:
                os.kill(os.getpid(), signal.SIGTERM)
        net.register_forward_hook(hook)
        return net
    _, stopped = run(team, SSLALM, tpr, steps=100000, model=press)
    try:
        run(team, SSLALM, tpr, evaluate=lambda: 1 / 0)
        said = "nothing"
    except ZeroDivisionError as e:
        said = str(e)
    return timed.step, timed.record.rows, seen, stopped.step, stopped.interrupted, stopped.finished, said


@task
def elastic(alone, team, two, folder):
    "Saved by two processes, continued by two, one and four: how far from the end of two that were not stopped"
    rank, half = dist.get_rank(), lambda t, **kw: run(t, SSLALM, tpr, evaluations=2, **kw)[0]
    file, whole = Path(folder) / f"run{rank // 2}.pt", half(two, steps=40)
    half(two, steps=20, checkpoint=file)
    dist.barrier()
    copies = {"two": (two, f"two{rank // 2}"), "one": (alone, f"one{rank}"), "four": (team, "four")}
    for t, name in copies.values():
        if t.rank == 0:
            shutil.copy(file, Path(folder) / name)
    dist.barrier()
    return {k: furthest(half(t, steps=40, checkpoint=Path(folder) / name, resume=True), whole)
            for k, (t, name) in copies.items()}


METHODS = {"SSL-ALM over Adam": lambda p: SSLALM(torch.optim.Adam(p), 3),
           "switching": lambda p: SwitchingSubgradient(p, 3, tol=.01, output="random"),
           "PI control": lambda p: Lagrangian(torch.optim.Adam(p), 3, dual=PI(kp=1., nu=.5, start="first")),
           "barrier": lambda p: PenaltyBarrier(p, 3)}


def sharded_steps(team, net, opt, streams, n=2):
    loss, gaps, shard = team.pool(WeightedBCE()), team.pool(tpr(3, .01, None)), team.shard(streams)
    for xi, in (shard.draw(1) for _ in range(n)):
        out = net(xi.x)
        f, c = together((loss, out, xi), (gaps, out, xi))
        opt.zero_grad()
        opt.dual_step(c.detach())
        opt.lagrangian(f, c).backward()
        opt.step()
    whole = lambda t: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
    return [whole(t) for t in (*net.parameters(), *(getattr(opt, k) for k in opt.saved)) if isinstance(t, torch.Tensor)]


def sharded_parts(name, wide, cut):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, 1))
    for layer in (net[0], net[2], net[4], net) if cut else ():
        fully_shard(layer)
    return net, METHODS[name](net.parameters()), Streams(*rows(torch.float32), per_group=8)


def sharded_end(team, name, wide, folder, steps=2):
    "Where it goes from a checkpoint"
    net, opt, streams = sharded_parts(name, wide, team.size > 1)
    load_sharded(folder, net, opt, streams=streams)
    return sharded_steps(team, net, opt, streams, steps)


WIDE = {name: 2048 if name == "SSL-ALM over Adam" else 64 for name in METHODS}  # 4.2 million weights


def sharded(alone, team, folder):
    "FSDP2 in two processes: how far from a run of one process, and from the checkpoint how far from going on"
    found = {}
    for name, wide in WIDE.items():
        place, parts = f"{folder}/{name}", sharded_parts(name, wide, True)
        off = furthest(sharded_steps(team, *parts), sharded_steps(alone, *sharded_parts(name, wide, False)))
        net, opt, streams = parts
        save_sharded(place, net, opt, streams=streams)
        team.check(opt)
        end = sharded_steps(team, *parts)
        found[name] = off, furthest(end, sharded_end(team, name, wide, place))
        if team.rank == 0:
            torch.save(end, f"{place}.pt")
    return found


def work(rank, size, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    alone = Team()
    with Team(backend="gloo") as team:
        if size == 2:
            torch.save(sharded(alone, team, folder), Path(folder) / f"sharded-{rank}.pt")
            return
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        for name, f in TASKS.items():
            torch.save(f(alone, team, Team(pairs[rank // 2]), folder), Path(folder) / f"{name}-{rank}.pt")


if __name__ == "__main__":
    size, port, folder = sys.argv[1:]
    torch.multiprocessing.spawn(work, (int(size), int(port), folder), nprocs=int(size))
