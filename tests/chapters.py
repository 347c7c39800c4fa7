"""What the tests read from the notebooks."""
import ast
import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
DIRECTIVE = re.compile(r"^#\s*\|\s*([\w-]+)\s*:?\s*(.*)$")


class Cell(NamedTuple):
    name: str  # notebook and position, as ruff counts
    kind: str
    options: dict
    code: str
    outputs: list

    @property
    def exported(self):
        return bool(self.options.keys() & {"export", "exports", "exporti"})

    @property
    def hidden(self):
        return bool(self.options.keys() & {"hide", "default_exp"}) or self.options.get("include") == "false"

    @property
    def tree(self):
        return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", self.code, flags=re.M)).body

    @property
    def lines(self):
        return sum(bool(line.strip()) for line in self.code.splitlines())


@cache
def cells(path):
    "All cells of a notebook, directives apart from the code"
    out = []
    for i, c in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"], 1):
        lines, options = "".join(c["source"]).splitlines(), {}
        while c["cell_type"] == "code" and lines and (m := DIRECTIVE.match(lines[0])):
            options[m[1]] = m[2].strip()
            lines.pop(0)
        out.append(Cell(f"{path.stem} cell {i}", c["cell_type"], options, "\n".join(lines), c.get("outputs", [])))
    return out


def module(path):
    "The name that a notebook exports to, or None"
    return next((c.options["default_exp"] for c in cells(path) if "default_exp" in c.options), None)


def modules():
    "Module name -> number of its chapter"
    return {module(p): int(p.stem.split("_")[0]) for p in NOTEBOOKS if module(p)}
