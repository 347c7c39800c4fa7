"""The site builds without Quarto, its links hold, it needs no network, and README.md is current."""
import os
import re
import subprocess
import sys

import pytest
import yaml
from chapters import NOTEBOOKS, ROOT

sys.path.insert(0, str(ROOT / "tools"))
import build_site  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, ROOT / "tools/build_site.py", out], cwd=ROOT, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (ROOT / "README.md").read_text(encoding="utf-8") == before, "README.md was not up to date; it is now"
    return out


def test_every_notebook_has_a_page(site):
    assert len(list(site.glob("*.html"))) == len(NOTEBOOKS)


def test_pages_are_whole(site):
    "No script, nothing fetched from elsewhere, no formula, label or cell option left as it was typed"
    assert not list(build_site.broken_links(site))
    for p in site.glob("*.html"):
        page = p.read_text(encoding="utf-8")
        assert "<script" not in page and "@import" not in page
        assert not re.findall(r'<(?:img|link|iframe)[^>]*(?:src|href)="(?:https?:)?//', page)
        prose = re.sub(r"<(pre|code|annotation)\b.*?</\1>", "", page, flags=re.S)
        assert not re.findall(r"\$\$|#\||(?<!\w)@(?:fig|tbl|eq|sec)-|:::", prose), p.name


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#no">x</a> <a href="c.html">y</a> <a href="https://z.org">z</a>')
    (tmp_path / "b.html").write_text('<p id="yes"><a href="a.html">x</a> <a href="#yes">y</a> <img src="no.png">')
    found = [line.split(" links to ")[1].split(",")[0] for line in sorted(build_site.broken_links(tmp_path))]
    assert found == ["b.html#no", "c.html", "no.png"]


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match="does not exist"):
        list(build_site.sidebar(["99_none.ipynb"], {}))
    page = object.__new__(build_site.Page)
    page.stem, page.href, page.refs, page.site, page.parts = "a", "a.html", {}, {}, ["see @fig-none"]
    with pytest.raises(SystemExit, match="nothing is labelled 'fig-none'"):
        page.source({})
    with pytest.raises(SystemExit, match="cell options"):
        list(page.cell({"cell_type": "code", "source": "#| ech: false\n1"}, {}))


def test_sidebar_reads_in_order():
    "Chapters follow each other by number, and every notebook is named once"
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    sections = quarto["website"]["sidebar"]["contents"]
    names = [e if isinstance(e, str) else e["href"] for s in sections for e in s["contents"]]
    assert names == ["index.ipynb"] + [p.name for p in NOTEBOOKS if p.stem != "index"]
