"""Figures as JSON and as a table: what it was before, what it is now, what it should be."""
import json
import time
from collections.abc import Iterable
from pathlib import Path

from .harness import ROOT, machine

REFERENCE = ROOT / "bench/reference.json"          # what nbs/34_speed.ipynb shows
K = "5 x 8", "5 x 32", "5 x 128"

# (table, column, row): the largest value wanted
LIMITS: dict[tuple[str, str, str], float] = {
    **{("step", k, "SSL-ALM, 1 draw"): v for k, v in zip(K, (0.95, 0.95, 1.00), strict=True)},
    **{("step", k, "SSL-ALM, 3 draws"): v for k, v in zip(K, (1.20, 1.30, 1.60), strict=True)},
    **{("used", k, "SSL-ALM, 1 draw"): v for k, v in zip(K, (1.00, 1.05, 1.10), strict=True)},
    **{("used", k, "Switching, 3 draws"): v for k, v in zip(K, (0.85, 0.90, 0.95), strict=True)},
    **{("step", k, "SSL-ALM, 1 draw, compiled"): v for k, v in zip(K, (0.28, 0.36, 0.50), strict=True)},
    **{("step", k, "SSL-ALM, 3 draws, compiled"): v for k, v in zip(K, (0.40, 0.55, 0.95), strict=True)},
    **{("stacked", k, "SSL-ALM, 1 draw"): v for k, v in zip(K, (0.12, 0.20, 0.45), strict=True)},
    **{("stacked", k, "SSL-ALM, 1 draw, compiled"): v for k, v in zip(K, (0.07, 0.14, 0.30), strict=True)},
    ("runs", "3 x 5 x 6,000", "stacked"): 15.,
    **{("sampling", k, "hctrain, 1 draw"): 0.06 for k in K},
    ("constraints", "m = 200", "SSL-ALM, 1 draw"): 1.0,
    ("weights", "n = 10M", "SSL-ALM, 1 draw"): 0.65,
    ("memory", "n = 10M", "SSL-ALM, 1 draw"): 5., ("memory", "n = 10M", "SSL-ALM, 3 draws"): 5.,
    ("set-up", "1,000,000 rows, 5 groups", "hctrain"): 1., ("set-up", "1,000,000 rows, 500 groups", "hctrain"): 1.,
    ("ghost", "step", "Ghost"): 6.,
    ("subproblems", "n = 2.7k", "hctrain, both"): 0.6, ("subproblems", "n = 100k", "hctrain, both"): 10.,
}


def collect(figures: Iterable[tuple[str, str, str, dict]], effort: str) -> dict:
    "All figures with the machine, the day and the effort"
    tables: dict = {}
    for table, column, row, f in figures:
        tables.setdefault(table, {}).setdefault(column, {})[row] = f
    return {"date": time.strftime("%Y-%m-%d %H:%M"), "effort": effort, "machine": machine(), "tables": tables}


def save(result: dict, folder: Path) -> Path:
    "Write a result into a file named by its time"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"bench-{time.strftime('%Y%m%d-%H%M%S')}-{result['effort']}.json"
    file.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return file


def keep(result: dict) -> None:
    "Put the tables of a result into what the chapter shows"
    old = load(REFERENCE)["tables"] if REFERENCE.exists() else {}
    text = json.dumps({**result, "tables": old | result["tables"]}, indent=1)
    REFERENCE.write_text(text + "\n", encoding="utf-8")


def load(file: Path) -> dict:
    "Read a result"
    return json.loads(file.read_text(encoding="utf-8"))


def before(folder: Path) -> dict | None:
    "The newest result in a folder, else the one that the chapter shows"
    files = sorted(folder.glob("bench-*.json"))
    files = [f for f in files if not f.stem.endswith("-tiny")] or ([REFERENCE] if REFERENCE.exists() else [])
    return load(files[-1]) if files else None


def flat(result: dict | None) -> dict[tuple[str, str, str], dict]:
    "Figures by (table, column, row)"
    tables = result["tables"] if result else {}
    return {(t, c, r): f for t, cs in tables.items() for c, rs in cs.items() for r, f in rs.items()}


def number(v: float) -> str:
    "Three digits"
    return f"{v:,.0f}" if v >= 100 else f"{v:.1f}" if v >= 10 else f"{v:.2f}" if v >= 0.1 else f"{v:.3f}"


def lines(now: dict, old: dict | None) -> list[str]:
    "A line for each figure: before, now with its quartiles, their ratio, the largest value wanted"
    known = flat(old)
    out = [f"{'figure':<66}{'before':>9}{'now':>9}  {'quartiles':<15}{'ratio':>6}{'wanted':>9}"]
    for key, f in flat(now).items():
        b, limit = known.get(key), LIMITS.get(key)
        ratio = f"{f['value'] / b['value']:.2f}" if b and b["value"] else ""
        wanted = "" if limit is None else f"{number(limit)}{' ' if f['value'] <= limit else '!'}"
        spread = f"{number(f['low'])} to {number(f['high'])}"
        out.append(f"{' | '.join(key):<66}{number(b['value']) if b else '':>9}{number(f['value']):>9}  "
                   f"{spread:<15}{ratio:>6}{wanted:>9}")
    return out
