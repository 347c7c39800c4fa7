"""Run notebooks in a fresh Jupyter kernel and store their outputs in place.

    python tools/run_notebooks.py                 every notebook in nbs/
    python tools/run_notebooks.py nbs/02*.ipynb   only these
    python tools/run_notebooks.py --flags slow    also cells marked `#| slow`

Cells marked `#| eval: false`, or with a flag of settings.ini's tst_flags, keep the outputs they have.
"""
import argparse
import os
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from nbdev.config import get_config

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks of a few thousand weights are slower on more
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)$", re.M)


class Client(NotebookClient):
    skip = frozenset()

    async def async_execute_cell(self, cell, cell_index, **kw):
        d = dict(DIRECTIVE.findall(cell.source)) if cell.cell_type == "code" else {}
        if d.get("eval", "").lower() == "false" or self.skip & d.keys() or "nbdev_export(" in cell.source:
            return cell
        return await super().async_execute_cell(cell, cell_index, **kw)


def run(path, skip, timeout):
    nb = nbformat.read(path, as_version=4)
    before = nbformat.writes(nb)
    client = Client(nb, timeout=timeout, kernel_name="python3", record_timing=False, shutdown_kernel="immediate",
                    resources={"metadata": {"path": str(path.parent)}},
                    extra_arguments=["--log-level=CRITICAL"])  # the kernel's own messages, not those of the cells
    client.skip = skip
    client.execute()
    clean_nb(nb)
    if nbformat.writes(nb) != before:
        nbformat.write(nb, path)
        return "changed"
    return "same"


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("notebooks", nargs="*", type=Path)
    ap.add_argument("--flags", default="", help="flags of tst_flags to run all the same")
    ap.add_argument("--timeout", type=int, default=600, help="seconds per cell")
    a = ap.parse_args()
    cfg = get_config()
    skip = frozenset(cfg.tst_flags.split()) - frozenset(a.flags.split())
    for path in a.notebooks or sorted(cfg.nbs_path.glob("*.ipynb")):
        t = time.time()
        print(f"{path.name}: {run(path, skip, a.timeout)} ({time.time() - t:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
