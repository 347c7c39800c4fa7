"""Measure, print what it is beside what it was, and write it under runs/bench."""
import argparse
import os
import sys
import time
from pathlib import Path

import torch

from . import peers, report
from .harness import ALONE, EFFORTS, Effort
from .suites import SUITES


def measure(names: list[str], effort: Effort):
    "The figures of some suites, with a word on the way; those that there are after Ctrl-C"
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])     # the first one imports a good deal
    try:
        for name in names:
            t = time.time()
            yield from SUITES[name](effort)
            print(f"{name}: {time.time() - t:.0f} s", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)


def main(argv: list[str] | None = None) -> Path:
    "The command"
    ap = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    ap.add_argument("suites", nargs="*", help=f"some of {', '.join(SUITES)}; all by default")
    ap.add_argument("--effort", choices=EFFORTS, default="quick")
    ap.add_argument("--out", type=Path, default=Path("runs/bench"))
    ap.add_argument("--keep", action="store_true", help="also put these tables into what chapter 34 shows")
    a = ap.parse_args(argv)
    if unknown := set(a.suites) - set(SUITES):
        ap.error(f"expected suites out of {', '.join(SUITES)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    os.environ.update(ALONE)
    if not peers.INSTALLED:
        print("The peers are not installed, and left out: pip install -e '.[peers]'", file=sys.stderr)
    old = report.before(a.out)
    result = report.collect(measure(a.suites or list(SUITES), EFFORTS[a.effort]), a.effort)
    print("\n".join(report.lines(result, old)))
    file = report.save(result, a.out)
    if a.keep:
        report.keep(result)
    print(f"\n{file}; CPU seconds, 1 thread, {result['machine']['cpu']}")
    return file


if __name__ == "__main__":
    main()
