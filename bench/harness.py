"""Paired timing in CPU seconds, fresh interpreters for memory and imports, and what a figure is."""
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent


# One thread, and a compiler that this process waits for
ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


class Work(NamedTuple):
    "Something to time"
    step: Callable[[], object]  # Does it once
    count: int = 1              # How many model-steps that is


class Effort(NamedTuple):
    "How much to measure"
    rounds: int = 11      # Pairs of chunks; a third of them where one step fills a chunk
    chunk: float = 0.02   # CPU seconds of a chunk
    repeats: int = 3      # Fresh interpreters for each memory figure and each import
    seeds: int = 3        # Seeds of the runs to the target
    full: bool = False    # Also what takes minutes: tuning, slow peers, one run after another
    tiny: bool = False    # Small sizes: does it work?


EFFORTS = {"tiny": Effort(2, 0.0005, 1, 1, tiny=True), "quick": Effort(), "full": Effort(25, 0.02, 7, 5, full=True)}


def figure(values: list[float], unit: str, **more) -> dict:
    "Median and quartiles"
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"value": mid, "low": low, "high": high, "unit": unit, "n": len(values), **more}


def cpu(step: Callable, times: int) -> float:
    "CPU seconds of one call, mean over some"
    t = time.process_time()
    for _ in range(times):
        step()
    return (time.process_time() - t) / times


def spent() -> float:
    "CPU seconds of this process and of those that it has waited for, such as a compiler"
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def calibrate(step: Callable, chunk: float) -> int:
    "How many calls fill a chunk, after some that warm up, or compile"
    for _ in range(5):
        step()
    times = 1
    while (t := cpu(step, times) * times) < chunk / 3:
        times *= 4
    return max(1, round(times * chunk / t))


def interleave(variants: dict[str, Work], unit: str, effort: Effort, seed: int = 0) -> dict[str, dict]:
    "Cost of each variant in units: a chunk of the unit right before each of its chunks, in shuffled order"
    one = variants[unit]
    times = {name: calibrate(w.step, effort.chunk) for name, w in variants.items()}
    ratios, seconds = {n: [] for n in variants}, {n: [] for n in variants}
    order, rng = list(variants), random.Random(seed)
    for i in range(effort.rounds):
        rng.shuffle(order)
        for name in order:
            if times[name] == 1 and i % 3:
                continue                                # a long step: a third of the rounds
            base, w = cpu(one.step, times[unit]) / one.count, variants[name]
            seconds[name].append(cpu(w.step, times[name]) / w.count)
            ratios[name].append(seconds[name][-1] / base)
    return {n: figure(ratios[n], "Adam", seconds=statistics.median(seconds[n])) for n in variants}


def fresh(code: str, **env: str) -> float:
    "Run code in a new interpreter; the number it prints last"
    env = {**os.environ, **ALONE, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"expected a number from a fresh interpreter, got {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])


def machine() -> dict:
    "What the figures were measured on"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", info)
    wide = [f for f in ("avx2", "avx512f") if f" {f} " in info]
    return {"cpu": model[1] if model else platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "vector units": wide, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "system": platform.system()}
