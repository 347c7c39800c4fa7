"""The measurements, a function each: `suite(effort)` yields (table, column, row, figure)."""
import itertools
import time
from collections.abc import Iterator
from functools import partial
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from torch.utils.data import DataLoader

from hctrain import SSLALM, Batch, Streams, WeightedBCE
from hctrain.acs import network
from hctrain.compare import PAPER, Setting, compare
from hctrain.ensemble import train_many
from hctrain.ghost import backward_passes, ghost_direction

from . import ours, peers, target
from .harness import Effort, Work, calibrate, cpu, figure, fresh, interleave, spent
from .tasks import Task, plain, rows

Figures = Iterator[tuple[str, str, str, dict]]
UNIT, SGD = "Adam", "SGD"


def floor(task: Task) -> dict[str, Work]:
    "The unit, which paired with itself shows the bias of a pair, and the cheapest step there is"
    return {UNIT: plain(task), SGD: plain(task, torch.optim.SGD)}


def named(prefix: str, variants: dict[str, Work]) -> dict[str, Work]:
    "Variants under another name, to be timed together and told apart"
    return {f"{prefix}|{name}": w for name, w in variants.items()}


# ------------------------------------------------------------------------- steps
def step(effort: Effort) -> Figures:
    "A step with the batch supplied, a peer's with our rates, and a step with sampling as it is used"
    names = [*ours.EAGER, ours.ONE] if effort.tiny else ours.METHODS
    for per_group in (8,) if effort.tiny else (8, 32, 128):
        task = Task(per_group=per_group)
        variants = {**floor(task), **named("step", ours.variants(task, True, names) | peers.variants(task)),
                    **named("own", peers.variants(task, gaps=peers.own_gaps)),
                    **named("used", ours.variants(task, False, names) | peers.variants(task, peers.as_used))}
        for name, f in interleave(variants, UNIT, effort).items():
            table, _, row = name.rpartition("|")
            yield table or "step", f"5 x {per_group}", row, f


def pieces(task: Task) -> Iterator[str]:
    "A step of SSL-ALM with one draw, for ever; says what it has just done"
    net, gaps, loss, streams = task.net(), ours.gaps_of(task), WeightedBCE(), task.streams()
    opt = SSLALM(net.parameters(), gaps.m)
    while True:
        b, = streams.draw(1)
        yield "batch"
        f = loss(out := net(b.x), b)
        yield "network, loss"
        c = gaps(out, b)
        yield "constraints"
        opt.zero_grad()
        opt.dual_step(c.detach())
        yield "dual_step"
        L = opt.lagrangian(f, c)
        yield "lagrangian"
        L.backward()
        yield "backward"
        opt.step()
        yield "step"


def anatomy(effort: Effort) -> Figures:
    "Where the time of a step goes"
    for per_group in (8, 128):
        task = Task(per_group=per_group)
        unit, walk, parts = plain(task).step, pieces(task), {}
        for _ in range(7 * 40):
            next(walk)
        for _ in range(effort.rounds):
            one = cpu(unit, 20)
            for _ in range(7 * 20):
                t = time.process_time()
                parts.setdefault(next(walk), []).append((time.process_time() - t) / one)
        for row, values in parts.items():
            yield "anatomy", f"5 x {per_group}", row, figure(values, "Adam")


def constraints(effort: Effort) -> Figures:
    "Growth with the number of constraints, on batches of 2,000 rows whatever that number"
    for m in (5, 50, 200, 500):
        task = Task(m, 2000 // m, count=8)
        names = ours.EAGER if effort.tiny else [*ours.EAGER, ours.ONE]
        variants = {**floor(task), **ours.variants(task, True, names), **peers.variants(task)}
        for row, f in interleave(variants, UNIT, effort).items():
            yield "constraints", f"m = {m}", row, f


def weights(effort: Effort) -> Figures:
    "Growth with the number of weights, on batches of 5 x 8 rows"
    for size in ("2.7k",) if effort.tiny else ("2.7k", "100k", "10M"):
        task = Task(size=size, count=8)
        names = ours.EAGER if effort.tiny else [*ours.EAGER, ours.ONE]
        variants = {**floor(task), **ours.variants(task, True, names), **peers.variants(task, gaps=peers.own_gaps)}
        for row, f in interleave(variants, UNIT, effort).items():
            yield "weights", f"n = {size}", row, f


# ------------------------------------------------------------ fresh interpreters
COMPILE = """
from bench import ours
from bench.harness import spent
from bench.tasks import Task
work = ours.step_of(Task(), ours.METHODS[{name!r}])
work.step(), work.step()
t = spent()
work.step()
print(spent() - t)
"""


def compiling(effort: Effort) -> Figures:
    "CPU seconds of the first compiled step in a fresh interpreter, without and with what an earlier one has kept"
    names = [n for n in ours.METHODS if n not in ours.EAGER] if effort.full else [] if effort.tiny else [ours.ONE]
    for row in names:
        times = {"from nothing": [], "from the cache": []}
        for _ in range(effort.repeats if effort.full else 1):
            with TemporaryDirectory() as cache:
                for column in times:
                    times[column].append(fresh(COMPILE.format(name=row), TORCHINDUCTOR_CACHE_DIR=cache))
        for column, values in times.items():
            yield "compiling", column, row, figure(values, "s")


BUILD = {  # how to make a step, in a fresh interpreter
    UNIT: "plain(task)", SGD: "plain(task, torch.optim.SGD)",
    **{n: f"ours.step_of(task, ours.METHODS[{n!r}])" for n in [*ours.EAGER, ours.ONE]},
    **{n: f"peers.step_of(task, {n!r}, peers.own_gaps(), peers.supplied(task))" for n in peers.STEPS}}
MEMORY = """
import re, torch
from bench import ours, peers
from bench.tasks import Task, plain
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.optim.Adam([torch.zeros(1, requires_grad=True)])
task = Task(size={size!r}, count=2)
open("/proc/self/clear_refs", "w").write("5")
before, work = peak(), {build}
for _ in range(4):
    work.step()
print((peak() - before) * 256 / sum(p.numel() for p in task.net().parameters()))
"""


def memory(effort: Effort) -> Figures:
    "Peak floats for each weight of a network of 10 million, the weights themselves included"
    size, wanted = ("100k", [SGD]) if effort.tiny else ("10M", list(BUILD))
    for row in (r for r in wanted if peers.INSTALLED or r not in peers.STEPS):
        code = MEMORY.format(size=size, build=BUILD[row])
        values = [fresh(code) for _ in range(3 if effort.full else 1)]
        yield "memory", f"n = {size}", row, figure(values, "floats")


IMPORTS = {"torch": "torch", "hctrain": "hctrain", "hctrain.train": "hctrain.train"}
THEIRS = {peers.HCT: "humancompatible.train.dual_optim", peers.COOPER: "cooper", "Fairret": "fairret.statistic"}


def imports(effort: Effort) -> Figures:
    "CPU seconds of an import in a fresh interpreter"
    names = {"torch": "torch"} if effort.tiny else {**IMPORTS, **(THEIRS if peers.INSTALLED else {})}
    code = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"
    times = {row: [] for row in names}
    for _ in range(effort.repeats):
        for row, module in names.items():
            times[row].append(fresh(code.format(module)))
    for row, values in times.items():
        yield "imports", "import", row, figure(values, "s")


# ---------------------------------------------------------------------- sampling
def batches(task: Task) -> dict[str, Work]:
    "A batch and nothing else"
    streams, size = task.streams(), task.n_groups * task.per_group
    found = {"hctrain, 1 draw": Work(lambda: streams.draw(1)), "hctrain, 4 draws": Work(lambda: streams.draw(4))}
    data = peers.dataset(*task.data.train, task.n_groups)
    shuffled = peers.forever(DataLoader(data, batch_size=size, shuffle=True))
    found["DataLoader, shuffled"] = Work(lambda: next(shuffled))
    if peers.INSTALLED:
        balanced = peers.as_used(task)
        found[f"{peers.HCT}, DataLoader"] = Work(lambda: next(balanced))
    return found


def set_up(n: int, n_groups: int, theirs: bool) -> Iterator[tuple[str, float]]:
    "CPU seconds from tensors to the first balanced batch"
    x, y, g = rows(n_groups, n)
    t = time.process_time()
    Streams(x, y, g, per_group=8).draw()
    yield "hctrain", time.process_time() - t
    if theirs:
        data, t = peers.dataset(x, y, g, n_groups), time.process_time()
        next(iter(peers.balanced_loader(data, 8 * n_groups)))
        yield peers.HCT, time.process_time() - t


def sampling(effort: Effort) -> Figures:
    "A balanced batch, and what comes before the first one"
    for per_group in (8, 32, 128):
        task = Task(per_group=per_group)
        for row, f in interleave({UNIT: plain(task), **batches(task)}, UNIT, effort).items():
            yield "sampling", f"5 x {per_group}", row, f
    n = 20_000 if effort.tiny else 1_000_000
    for n_groups in (5, 500):
        for row, seconds in set_up(n, n_groups, peers.INSTALLED and (effort.full or effort.tiny)):
            yield "set-up", f"{n:,} rows, {n_groups} groups", row, figure([seconds], "s")


# ------------------------------------------------------------------------- ghost
def subproblem(size: str):
    "Gradients and constraint values as Stochastic Ghost meets them"
    task = Task(size=size, count=2)
    net, gaps, b = task.net(), ours.gaps_of(task, True), task.batches[0]
    out = net(b.x)
    c = gaps(out, b)
    f = torch.nn.functional.binary_cross_entropy_with_logits(out.squeeze(1), b.y)
    return backward_passes([(f, c)], list(net.parameters())), c.detach()[None].double()


def timed(step, effort: Effort) -> dict:
    "CPU milliseconds of a call"
    times = calibrate(step, effort.chunk)
    return figure([1e3 * cpu(step, times) for _ in range(effort.rounds if times > 1 else effort.repeats)], "ms")


def ghost(effort: Effort) -> Figures:
    "A step of Stochastic Ghost, and its two subproblems, a linear and a quadratic program"
    task = Task()
    theirs = {f"{peers.HCT}, GhostSQP": peers.ghost(task)} if peers.INSTALLED else {}
    for row, f in interleave({UNIT: plain(task), "Ghost": ours.ghost(task), **theirs}, UNIT, effort).items():
        yield "ghost", "step", row, f
    for size in ("2.7k", "100k"):
        Z, c = subproblem(size)
        yield "subproblems", f"n = {size}", "hctrain, both", timed(partial(ghost_direction, Z, c), effort)
        if peers.INSTALLED and (size == "2.7k" or effort.full):
            for row, solve in peers.subproblems(Z[0].numpy(), c[0].numpy()).items():
                yield "subproblems", f"n = {size}", row, timed(solve, effort)


# -------------------------------------------------------------------- whole runs
def stacked(effort: Effort) -> Figures:
    "A step of each of 16 runs at once, with sampling, for one of them"
    names = [n for n in ours.METHODS if n.startswith("SSL-ALM") and not (effort.tiny and n not in ours.EAGER)]
    for per_group in (8,) if effort.tiny else (8, 32, 128):
        task = Task(per_group=per_group)
        variants = {UNIT: plain(task)} | {n: ours.stacked(task, ours.METHODS[n]) for n in names}
        for row, f in interleave(variants, UNIT, effort).items():
            yield "stacked", f"5 x {per_group}", row, f


def runs(effort: Effort) -> Figures:
    "CPU seconds of three algorithms from five seeds, stacked; compiled from what an earlier run has kept"
    n, steps, seeds = (2_000, 20, 1) if effort.tiny else (36_915, 6_000, 5)
    all_rows = rows(n=n + n // 4)
    train, test = (Batch(*(t[part] for t in all_rows)) for part in (slice(n), slice(n, None)))
    data = SimpleNamespace(train=train, test=test, n_groups=5)
    many = {"stacked": train_many, "stacked, compiled": partial(train_many, compiled=True)}
    if effort.full or effort.tiny:
        many = {"one after another": None} | ({} if effort.tiny else many)

    def run(together, steps):
        setting, t = Setting(seconds=None, steps=steps, seeds=seeds, per_group=8, evaluations=1), spent()
        compare(data, lambda seed: network(9, seed=seed), PAPER, setting, progress=False, many=together)
        return spent() - t
    for row, together in many.items():
        run(together, 3)                                                        # imports and compiles
        yield "runs", f"3 x {seeds} x {steps:,}", row, figure([run(together, steps)], "s")


def to_target(effort: Effort) -> Figures:
    "CPU seconds until the target on real Virginia, with the winner of a library's trials, on seeds of their own"
    data, points, times = target.virginia(), target.WINNERS, {}
    rows = [r for r in target.readings() if not effort.tiny or "compiled" not in r]
    if effort.full:
        found = {r: target.tune(r, data)[0] for r in rows if r != target.NOTHING}
        points = {**found, target.NOTHING: found["hctrain, compiled"]}
    cap = 0.1 if effort.tiny else 60.
    for seed, row in itertools.product(range(100, 100 + effort.seeds), rows):
        if effort.full or row != target.NOTHING or row not in times:        # a minute each: once is enough
            times.setdefault(row, []).append(target.seconds(row, data, points[row], seed, cap))
    for row, values in times.items():
        more = {"point": points[row]._asdict(), "missed": sum(v == cap for v in values)}
        yield "target", "synthetic" if data.synthetic else "Virginia", row, figure(values, "s", **more)


SUITES = {f.__name__: f for f in
          (step, anatomy, compiling, constraints, weights, memory, imports, sampling, ghost, stacked, runs, to_target)}
