"""Make the synthetic Virginia that ships with hctrain, from the real table.

    python tools/make_synthetic.py --root ../shared/data/acs          write hctrain/data/synthetic_va_2018.zip
    python tools/make_synthetic.py --root ../shared/data/acs --check  compare, write nothing

Sequential CART: marital status and label keep their real joint counts; then each further column is drawn, row by row,
from the real people who sit in the same leaf of a tree that predicts this column from the columns drawn before it.
Two rules keep single people out of sight: a leaf holds at least LEAF people, and a value that fewer than LEAST people
have is first replaced by the nearest value that more people have.  This is no differential privacy.
The chapter nbs/30_acs.ipynb measures how close the outcome is.
"""
import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from folktables.acs import ACSIncome, adult_filter
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from hctrain.acs import read_pums

OUT = Path(__file__).resolve().parent.parent / "hctrain" / "data" / "synthetic_va_2018.zip"
START = ["MAR", "PINCP"]                                                     # drawn first, with their real counts
ORDER = ["AGEP", "RELP", "SEX", "SCHL", "WKHP", "COW", "RAC1P", "POBP", "OCCP"]
NOMINAL = {"MAR", "RELP", "COW", "RAC1P"}                                    # short code lists: one column a code
NUMBERS = {"AGEP", "SCHL", "WKHP"}                                           # predicted by regression trees
LEAF, TREES, LEAST, SEED = 100, 10, 20, 0


def income_table(df):
    """The ten features and the label (50001 or 50000) of the people whom ACSIncome keeps."""
    df = adult_filter(df)
    df = df[ACSIncome.features + ["PINCP"]].astype(int)
    return df.assign(PINCP=np.where(df["PINCP"] > 50000, 50001, 50000)).reset_index(drop=True)


def pool(column, least):
    """Replace each value that fewer than `least` people have by the nearest value that more people have."""
    n = column.value_counts().sort_index()
    kept = n.index[n >= least].to_numpy()
    nearest = np.abs(column.to_numpy()[:, None] - kept).argmin(1)
    return pd.Series(kept[nearest], index=column.index)


def encode(table, columns, levels):
    """Predictors for the trees: codes of short lists as indicators, everything else as a number."""
    out = []
    for c in columns:
        v = table[c].to_numpy()
        out += [v == k for k in levels[c]] if c in NOMINAL else [v]
    return np.stack(out, axis=1).astype(np.float32)


def donors(tree, real, fake, rng):
    """For each row of `fake`, the index of a random row of `real` in the same leaf."""
    home, seat = tree.apply(real), tree.apply(fake)
    order = np.argsort(home, kind="stable")
    first = np.searchsorted(home[order], seat, "left")
    size = np.searchsorted(home[order], seat, "right") - first
    return order[first + (rng.random(len(seat)) * size).astype(int)]


def synthesise(table, leaf=LEAF, trees=TREES, least=LEAST, seed=SEED):
    """As many synthetic rows as `table` has, in random order."""
    rng = np.random.default_rng(seed)
    table = table.apply(pool, least=least)
    levels = {c: np.unique(table[c]) for c in NOMINAL}
    fake, done = table[START].copy(), list(START)
    for c in ORDER:
        kind = DecisionTreeRegressor if c in NUMBERS else DecisionTreeClassifier
        x, new, y = encode(table, done, levels), encode(fake, done, levels), table[c].to_numpy()
        drawn, which = np.empty_like(y), rng.integers(trees, size=len(fake))
        for k in range(trees):                                               # each row asks one tree of several
            ask = which == k
            tree = kind(min_samples_leaf=leaf, max_features=0.5, random_state=int(rng.integers(2**31))).fit(x, y)
            drawn[ask] = y[donors(tree, x, new[ask], rng)]
        fake[c] = drawn
        done.append(c)
    return fake[table.columns].iloc[rng.permutation(len(fake))].reset_index(drop=True)


def pack(fake):
    """A zip file that holds what folktables looks for: psam_p51.csv, each row marked as synthetic."""
    csv = fake.assign(SERIALNO="synthetic", ST=51, PWGTP=1)
    csv = csv[["SERIALNO", "ST", *fake.columns, "PWGTP"]].to_csv(index=False, lineterminator="\n")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:                                  # a fixed date: same rows, same bytes
        z.writestr(zipfile.ZipInfo("psam_p51.csv", (2018, 1, 1, 0, 0, 0)), csv, zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def found_in(a, b):
    """Share of the rows of `a` that occur, in every column, among the rows of `b`."""
    rows = set(b[a.columns].itertuples(index=False, name=None))
    return float(np.mean([row in rows for row in a.itertuples(index=False, name=None)]))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--root", required=True, help="folder of the real census files, as folktables lays them out")
    ap.add_argument("--out", type=Path, default=OUT)
    ap.add_argument("--check", action="store_true", help="say whether the file at --out is what this script makes")
    a = ap.parse_args()
    real = income_table(read_pums(a.root, "VA"))
    fake = synthesise(real)
    data = pack(fake)
    print(f"{len(fake)} rows, {len(data) / 1000:.0f} kB, found among the real rows: {found_in(fake, real):.4f}")
    if a.check:
        raise SystemExit(0 if a.out.read_bytes() == data else f"{a.out} differs")
    a.out.parent.mkdir(exist_ok=True)
    a.out.write_bytes(data)


if __name__ == "__main__":
    main()
