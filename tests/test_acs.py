"""Census data: the table that ships, files of one's own, downloads, and the real tables where they are."""
import http.server
import io
import os
import random
import runpy
import sys
import threading
import zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from chapters import ROOT
from sklearn.model_selection import train_test_split
from torch.testing import assert_close

from hctrain.acs import ACS, PROTECTED, download_pums, load_acs, network, pums_path, read_pums, synthetic_root

REAL = Path(os.environ.get("HCTRAIN_ACS_ROOT", ROOT.parent / "shared/data/acs"))
SHIPPED = files("hctrain") / "data" / "synthetic_va_2018.zip"
MARRIED, WIDOWED, DIVORCED, SEPARATED, NEVER = PROTECTED["MAR"]
real_data = pytest.mark.skipif(not pums_path(REAL).is_file(), reason="needs the real census files")


@pytest.fixture(scope="module")
def data():
    return load_acs()


@pytest.fixture
def folder(tmp_path):
    "A root with a small person file of Maryland in the form of 2016"
    path = pums_path(tmp_path, "MD", 2016)
    path.parent.mkdir(parents=True)
    read_pums().drop(columns="SERIALNO").head(500).to_csv(path, index=False)
    return tmp_path


def tree(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*"))


# The table that ships

def test_ships_as_a_resource():
    content = SHIPPED.read_bytes()
    assert len(content) <= 600_000
    with zipfile.ZipFile(io.BytesIO(content)) as z:
        assert z.namelist() == ["psam_p51.csv"] and z.testzip() is None


def test_synthetic_table():
    df = read_pums()
    assert len(df) == 46_144 and (df["SERIALNO"] == "synthetic").all()
    assert set(df["PINCP"]) == {50_000, 50_001} and set(df["ST"]) == {51} and set(df["PWGTP"]) == {1}
    assert not df.isna().any(axis=None)
    assert not ((df["RELP"] == 1) & (df["MAR"] != 1)).any()  # the householder's husband or wife is married
    counts = df.drop(columns=["AGEP"]).apply(lambda c: c.value_counts().min())
    assert (counts >= 5).all()  # at least 20 real people have each value, and a draw of them came out


def test_synthetic_batches(data):
    assert isinstance(data, ACS) and data.synthetic and data.name == "synthetic VA 2018 1-Year"
    assert "synthetic" in repr(data)
    assert data.feature_names == ("AGEP", "COW", "SCHL", "OCCP", "POBP", "RELP", "WKHP", "SEX", "RAC1P")
    assert data.group_names == (MARRIED, WIDOWED, DIVORCED, SEPARATED, NEVER) and data.n_groups == 5
    for part, n in (data.train, 36_915), (data.test, 9_229):
        assert part.x.shape == (n, 9) and part.y.shape == part.g.shape == (n,)
        assert (part.x.dtype, part.y.dtype, part.g.dtype) == (torch.float32, torch.float32, torch.int64)
        assert set(part.y.tolist()) == {0.0, 1.0} and part.g.unique().tolist() == [0, 1, 2, 3, 4]
    summary = data.summary()
    assert list(summary.index) == [*data.group_names, "population"]
    assert summary[["train", "test"]].iloc[:5].sum().tolist() == [36_915, 9_229]
    assert summary["share"].iloc[:5].sum() == pytest.approx(1)


def test_shares_and_rates(data):
    "Within a point of the real ones, as the data's README prints them"
    rows = pd.Series({MARRIED: 26_061, WIDOWED: 931, DIVORCED: 4_485, SEPARATED: 903, NEVER: 13_764})
    rates = pd.Series({MARRIED: 0.5549, WIDOWED: 0.3921, DIVORCED: 0.4700, SEPARATED: 0.3455, NEVER: 0.2121})
    s = data.summary()
    assert ((s["share"] - rows / 46_144).abs().dropna() < 0.01).all()
    assert ((s["positive rate"] - rates).abs().dropna() < 0.01).all()
    assert abs(s["positive rate"]["population"] - 0.4370) < 0.01


def test_split_is_scikit_learns(data):
    "The same numbers by hand, from the csv file"
    df = read_pums()
    train, test = train_test_split(df, test_size=0.2, random_state=42)
    u = train[list(data.feature_names)].to_numpy(float)
    for part, rows in (data.train, train), (data.test, test):
        x = (rows[list(data.feature_names)].to_numpy(float) - u.mean(0)) / u.std(0)
        assert_close(part.x, torch.tensor(x, dtype=torch.float32))
        assert part.y.tolist() == (rows["PINCP"] > 50_000).astype(float).tolist()
        assert part.g.tolist() == (rows["MAR"] - 1).tolist()


def test_seed_and_size(data):
    again, other, half = load_acs(), load_acs(seed=1), load_acs(test_size=0.5)
    assert torch.equal(again.train.x, data.train.x)
    assert not torch.equal(other.train.x, data.train.x) and len(half.test.y) == 23_072


def test_random_numbers_are_left_alone():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    random.seed("not the seed that folktables sets")
    before = states()
    load_acs()
    network(seed=1)
    assert states() == before


@pytest.mark.parametrize("protected", PROTECTED)
def test_protected(protected):
    d = load_acs(protected=protected)
    assert protected not in d.feature_names and len(d.feature_names) == d.train.x.shape[1] == 9
    assert d.n_groups == len(PROTECTED[protected])
    assert d.train.g.unique().tolist() == d.test.g.unique().tolist() == list(range(d.n_groups))


def test_own_groups():
    d = load_acs(protected="SCHL", groups={"No degree": range(1, 20), "None of these": [99], "Degree": range(20, 25)})
    assert d.group_names == ("No degree", "Degree") and d.n_groups == 2
    assert d.summary()["positive rate"]["Degree"] > 2 * d.summary()["positive rate"]["No degree"]


def test_temporary_folder_goes():
    with pytest.raises(KeyError), synthetic_root() as root:
        assert pums_path(root).is_file()
        raise KeyError
    assert not root.exists()


# Files of one's own

def test_file_of_another_state(folder):
    assert tree(folder)[-1] == "2016/1-Year/ss16pmd.csv"
    d = load_acs(folder, "MD", year=2016, min_rows=1)
    assert not d.synthetic and d.name == "MD 2016 1-Year" and len(d.train.y) == 400


def test_raw_file(tmp_path):
    "As the Bureau publishes it: more columns, blanks, children, people without work, incomes in dollars"
    rng = np.random.default_rng(0)
    df = read_pums().head(300).drop(columns="SERIALNO")
    df["PINCP"] = np.where(df["PINCP"] > 50_000, 73_000, 21_000)
    rest = df.head(60).copy()
    rest["AGEP"] = [8] * 20 + [30] * 20 + [40] * 20
    rest["WKHP"] = [None] * 40 + [35] * 20
    rest["PINCP"] = [None] * 20 + [900_000.0] * 20 + [100.0] * 20
    raw = pd.concat([df, rest]).sample(frac=1, random_state=0)
    raw.insert(0, "RT", "P")
    raw.insert(1, "SERIALNO", [f"2018HU{i:07d}" for i in range(len(raw))])
    raw["NAICSP"], raw["JWMNP"] = "62 M", rng.integers(90, size=len(raw))
    pums_path(tmp_path).parent.mkdir(parents=True)
    raw.to_csv(pums_path(tmp_path), index=False)
    d = load_acs(tmp_path, min_rows=1)
    assert len(d.train.y) + len(d.test.y) == 300 and not d.synthetic
    assert torch.cat([d.train.y, d.test.y]).sum() == (df["PINCP"] > 50_000).sum()


def test_copied_synthetic_file_is_called_synthetic(tmp_path):
    pums_path(tmp_path).parent.mkdir(parents=True)
    with zipfile.ZipFile(io.BytesIO(SHIPPED.read_bytes())) as z:
        z.extract("psam_p51.csv", pums_path(tmp_path).parent)
    assert load_acs(tmp_path).synthetic


@pytest.mark.parametrize("kwargs, error, parts", [
    (dict(root="nowhere"), FileNotFoundError, ["nowhere", "psam_p51.csv", "download=True", "leave root out"]),
    (dict(root="nowhere", state="MD", year=2015), FileNotFoundError, ["ss15pmd.csv"]),
    (dict(state="MD"), ValueError, ["expected root= for MD 2018 1-Year", "synthetic VA"]),
    (dict(year=2017), ValueError, ["expected root= for VA 2017"]),
    (dict(horizon="5-Year"), ValueError, ["expected root= for VA 2018 5-Year"]),
    (dict(download=True), ValueError, ["expected root=", "downloaded"]),
    (dict(root="nowhere", state="XX"), ValueError, ["'XX'", "VA"]),
    (dict(state=51), ValueError, ["got 51"]),
    (dict(year=2019), ValueError, ["got 2019", "RELP"]),
    (dict(year="2018"), ValueError, ["got '2018'"]),
    (dict(horizon="2-Year"), ValueError, ["'1-Year' or '5-Year'"]),
    (dict(test_size=0), ValueError, ["test_size", "got 0"]),
    (dict(protected="COLOUR"), ValueError, ["MAR, SEX, RAC1P, AGEP", "'COLOUR'"]),
    (dict(protected="COLOUR", groups={"a": [1]}), ValueError, ["AGEP, COW", "'COLOUR'"]),
    (dict(groups={"a": [1, 2, 3, 4]}), ValueError, ["rows with 5"]),
    (dict(groups={"a": [1, 2, 3], "b": [3, 4, 5]}), ValueError, ["overlap", "'b'"]),
    (dict(min_rows=1000), ValueError, ["1000 training rows", "Widowed (", "Separated (", "groups="]),
])
def test_refused(kwargs, error, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as e:
        load_acs(**kwargs)
    assert all(p in str(e.value) for p in parts), str(e.value)
    assert "\n" not in str(e.value) and not tree(tmp_path)


def test_bad_files(folder):
    path = pums_path(folder, "MD", 2016)
    good = pd.read_csv(path)
    good.drop(columns=["PWGTP", "SEX"]).to_csv(path, index=False)
    with pytest.raises(ValueError, match="without SEX, PWGTP"):
        load_acs(folder, "MD", year=2016)
    good.assign(AGEP=12).to_csv(path, index=False)
    with pytest.raises(ValueError, match="got none"):
        load_acs(folder, "MD", year=2016)
    good.head(0).to_csv(path, index=False)
    with pytest.raises(ValueError, match="got none"):
        load_acs(folder, "MD", year=2016)
    path.write_text("")
    with pytest.raises(ValueError, match="that is empty"):
        load_acs(folder, "MD", year=2016)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "folktables", None)
    with pytest.raises(ImportError, match=r"need folktables.*pip install \"hctrain\[acs\]\""):
        load_acs()


# Downloads

class Census(http.server.BaseHTTPRequestHandler):
    "Answers as the census server does on its good and bad days"
    status, body, promised = 200, b"", None

    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(self.status)
        self.send_header("Content-Length", str(self.promised or len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args):
        pass


@pytest.fixture
def census(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = type("Handler", (Census,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked, server.handler = [], handler
        server.url = f"http://127.0.0.1:{server.server_port}/pums"
        thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("progress", [True, False])
def test_download(census, tmp_path, capsys, progress):
    census.handler.body = SHIPPED.read_bytes()
    path = download_pums(tmp_path / "new", server=census.url, progress=progress)
    assert census.asked == ["/pums/2018/1-Year/csv_pva.zip"]
    assert tree(tmp_path) == ["new", "new/2018", "new/2018/1-Year", "new/2018/1-Year/psam_p51.csv"]
    assert path == pums_path(tmp_path / "new") and len(read_pums(tmp_path / "new")) == 46_144
    assert ("VA 2018: 100%" in capsys.readouterr().err) == progress


def test_load_downloads_what_is_missing(census, tmp_path, monkeypatch):
    monkeypatch.setattr("hctrain.acs.download_pums", lambda *a: download_pums(*a, progress=False, server=census.url))
    census.handler.body = SHIPPED.read_bytes()
    assert load_acs(tmp_path, download=True).synthetic and len(census.asked) == 1
    assert load_acs(tmp_path, download=True).synthetic and len(census.asked) == 1


def small_zip(name, content=b"1,2\n" * 1000):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(name, content)
    return buffer.getvalue()


DAMAGED = bytearray(SHIPPED.read_bytes())
DAMAGED[1000:1200] = bytes(200)


@pytest.mark.parametrize("answer, why", [
    (dict(status=403, body=b"no"), "403"),
    (dict(status=404), "404"),
    (dict(body=b"<html>Request rejected</html>"), "zip"),
    (dict(body=SHIPPED.read_bytes()[:100_000]), "zip"),
    (dict(body=SHIPPED.read_bytes()[:100_000], promised=374_000), "100000 of 374000 bytes"),
    (dict(body=small_zip("readme.txt")), "psam_p51.csv"),
    (dict(body=bytes(DAMAGED)), "rror|Bad"),
], ids=["forbidden", "not found", "page", "half a zip", "cut off", "other zip", "damaged"])
@pytest.mark.parametrize("progress", [True, False])
def test_download_refused(census, tmp_path, answer, why, progress):
    for key, value in answer.items():
        setattr(census.handler, key, value)
    with pytest.raises(ConnectionError, match=why) as e:
        download_pums(tmp_path / "new", server=census.url, progress=progress)
    for part in (f"{census.url}/2018/1-Year/csv_pva.zip", "in a browser", str(pums_path(tmp_path / "new"))):
        assert part in str(e.value)
    assert tree(tmp_path) == []


def test_no_server(tmp_path, census):
    census.server_close()
    with pytest.raises(ConnectionError, match="in a browser"):
        download_pums(tmp_path, server="http://127.0.0.1:1")
    assert tree(tmp_path) == []


def test_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    class Answer(io.BytesIO):
        headers = {"Content-Length": "1000000"}

        def read(self, n):
            if self.tell() >= 200_000:
                raise KeyboardInterrupt
            return super().read(n)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **kw: Answer(bytes(1_000_000)))
    with pytest.raises(KeyboardInterrupt):
        download_pums(tmp_path, progress=False)
    assert tree(tmp_path) == []


def test_bad_request_asks_no_server(census, tmp_path):
    with pytest.raises(ValueError, match="'ZZ'"):
        download_pums(tmp_path, "ZZ", server=census.url)
    assert not census.asked


# The network

def test_network():
    net = network()
    assert sum(p.numel() for p in net.parameters()) == 2753
    assert net(torch.zeros(3, 9)).shape == (3, 1)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), network(seed=0).parameters()))
    assert not torch.equal(net[0].weight, network(seed=1)[0].weight)
    linear = network(4, hidden=())
    assert len(linear) == 1 and linear[0].weight.shape == (1, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        usual = [torch.nn.Linear(a, b) for a, b in [(9, 64), (64, 32), (32, 1)]]
    for mine, theirs in zip(net[::2], usual, strict=True):
        assert_close(mine.weight, theirs.weight)
        assert_close(mine.bias, theirs.bias)


@pytest.mark.parametrize("kwargs", [dict(n_features=0), dict(hidden=(64, -1)), dict(hidden=(1.5,))])
def test_network_refused(kwargs):
    with pytest.raises(ValueError, match="positive whole numbers"):
        network(**kwargs)


# The generator, on the synthetic table: what it does does not depend on who is in it

@pytest.fixture(scope="module")
def make():
    return runpy.run_path(str(ROOT / "tools/make_synthetic.py"))


def test_pool(make):
    pooled = make["pool"](pd.Series([10] * 5 + [12] + [20] * 4 + [19]), 3)
    assert pooled.tolist() == [10] * 6 + [20] * 5


def test_generator(make):
    table = make["income_table"](read_pums()).head(4000)
    fake, again = (make["synthesise"](table, trees=2, seed=3) for _ in range(2))
    assert fake.equals(again) and list(fake) == list(table) and len(fake) == len(table)
    joint = [t.value_counts(["MAR", "PINCP"]).sort_index() for t in (fake, table.apply(make["pool"], least=20))]
    assert joint[0].equals(joint[1])
    for c in table:
        counts = table[c].value_counts()
        assert set(fake[c]) <= set(counts.index[counts >= 20])
    assert make["found_in"](fake, table) < 0.02 and make["found_in"](table, table) == 1
    assert make["pack"](fake) == make["pack"](again)


# The real tables

@real_data
def test_real_virginia():
    d = load_acs(REAL)
    assert not d.synthetic and (len(d.train.y), len(d.test.y)) == (36_915, 9_229)
    s = d.summary()
    assert s[["train", "test"]].sum(axis=1).tolist() == [26_061, 931, 4_485, 903, 13_764, 46_144]
    assert s["positive rate"].round(4).tolist() == [0.5549, 0.3921, 0.4700, 0.3455, 0.2121, 0.4370]
    assert s["train"].tolist() == [20_854, 737, 3_603, 707, 11_014, 36_915]  # as in the authors' saved runs


@real_data
@pytest.mark.parametrize("state, rows", [("MD", 33_042), ("WV", 8_103)])
def test_real_neighbours(state, rows):
    if not pums_path(REAL, state).is_file():
        pytest.skip(f"no file of {state}")
    d = load_acs(REAL, state)
    assert len(d.train.y) + len(d.test.y) == rows and d.n_groups == 5 and d.name == f"{state} 2018 1-Year"


@real_data
def test_few_rows_are_the_same(make):
    "Synthetic rows occur among half of the real ones less often than the other half's rows do"
    real, fake = make["income_table"](read_pums(REAL)), make["income_table"](read_pums())
    half = np.random.default_rng(0).permutation(len(real)) < len(real) // 2
    home = [t[t["RELP"] < 16] for t in (real[half], fake, real[~half])]
    assert make["found_in"](home[1], home[2]) < make["found_in"](home[0], home[2])
