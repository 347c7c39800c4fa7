"""The site builds without Quarto, and its links, formulas and figures are whole."""
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Scan(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.stack = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a["id"]} if "id" in a else set()
        self.links += [a[k] for k in ("href", "src") if k in a]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    subprocess.run([sys.executable, ROOT / "tools/build_site.py", out], cwd=ROOT, env=env, check=True)
    assert (ROOT / "README.md").read_text(encoding="utf-8") == before, "README.md was not up to date"
    return {p.name: Scan(p) for p in out.glob("*.html")}, out


def test_every_notebook_has_a_page(site):
    assert len(site[0]) == len(list((ROOT / "nbs").glob("*.ipynb")))


def test_links(site):
    pages, out = site
    for name, page in pages.items():
        for link in page.links:
            u = urlsplit(link)
            if u.scheme or link.startswith("//"):
                continue
            target = unquote(u.path) or name
            assert (out / target).exists(), f"{name} links to {link}"
            if u.fragment:
                assert unquote(u.fragment) in pages[target].ids, f"{name} links to {link}"


def test_needs_no_network(site):
    for p in site[1].rglob("*.html"):
        html = p.read_text(encoding="utf-8")
        assert "<script" not in html and "$$" not in html and "@import" not in html
