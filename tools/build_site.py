"""Build the documentation site without Quarto, from the same notebooks and the same _quarto.yml.

    python tools/build_site.py [OUT]        (default: _site)

Quarto (`nbdev_docs`) is the official way.  This one needs only PyPI: nbdev prepares the notebooks,
pandoc (the wheel pypandoc_binary) renders them to plain HTML with MathML, no script and no network.
It knows the subset of Quarto that our notebooks use, and stops at what it does not know:
cell options echo, output, code-fold, label, fig-cap, tbl-cap; cross references to fig-, tbl-, eq-, sec-;
divs such as ::: {.callout-note}; citations, where _quarto.yml names a bibliography.
It stops as well at a formula that pandoc cannot read, at an unknown label and at a link that leads nowhere.
README.md is made from the index notebook on the way.
"""
import base64
import html
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pypandoc
import yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs

OPTIONS = {"echo", "output", "code-fold", "code-summary", "label", "fig-cap", "fig-alt", "tbl-cap", "warning", "eval"}
NAMES = {"fig": "Figure", "tbl": "Table", "eq": "Equation", "sec": "Section"}
PANDOC = ["--mathml", "--toc", "--toc-depth=3", "--wrap=preserve", "--fail-if-warnings"]
CFG = get_config()
ROOT = CFG.config_path
OPTIONS |= set(CFG.tst_flags.split())
SITE = CFG.doc_host + CFG.doc_baseurl.rstrip("/")


def text(x):
    return x if isinstance(x, str) else "".join(x or "")


def options(src):
    "Split `#| key: value` lines from the code of a cell."
    opts, code = {}, []
    for line in src.splitlines():
        m = re.match(r"#\|\s*([\w-]+)\s*(?::\s*(.*))?$", line)
        if m and not code:
            opts[m[1]] = yaml.safe_load(m[2]) if m[2] else True
        else:
            code.append(line)
    return opts, "\n".join(code).strip("\n")


def fence(body, attrs):
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", body)), default=0))
    return f"{ticks} {{{attrs}}}\n{body}\n{ticks}"


def terminal(s):
    "What a terminal would show: no colours, and of a line that was rewritten its last state."
    s = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", s)
    return fence("\n".join(line.rstrip("\r").split("\r")[-1] for line in s.rstrip().split("\n")), ".output")


class Page:
    def __init__(self, path, out):
        self.nb = json.loads(path.read_text(encoding="utf-8"))
        self.out, self.stem, self.n, self.refs = out, path.stem, 0, {}
        self.meta = yaml.safe_load(text(self.nb["cells"][0]["source"]).strip().strip("-"))
        self.href, self.title = self.meta["output-file"], self.meta["title"]
        cells = self.nb["cells"][1:]
        self.parts = [p for c, following in zip(cells, cells[1:] + [{}]) for p in self.cell(c, following)]

    def number(self, label):
        kind = label.split("-")[0]
        if label in self.refs or kind not in NAMES:
            raise SystemExit(f"{self.stem}: label {label!r} is given twice or is of no known kind")
        self.refs[label] = 1 + sum(k.startswith(kind + "-") for k in self.refs)
        return self.refs[label]

    def markdown(self, md):
        def equation(m):
            return f"[$${m[1]}$$[({self.number(m[2])})]{{.eqno}}]{{#{m[2]} .eq}}"
        def caption(m):
            return f": Table {self.number(m[2])}: [{m[1]}]{{#{m[2]}}}"
        def figure(m):
            return f"![Figure {self.number(m[3])}: {m[1]}]({m[2]}){{#{m[3]}{m[4]}}}"
        for m in re.finditer(r"^#+ .*\{#(sec-[\w-]+)\}", md, re.M):
            self.number(m[1])
        md = re.sub(r"^: (.+?) *\{#(tbl-[\w-]+)\} *$", caption, md, flags=re.M)
        md = re.sub(r"^!\[(.*)\]\((\S+)\)\{#(fig-[\w-]+)(.*)\}$", figure, md, flags=re.M)
        return re.sub(r"\$\$(.+?)\$\$\s*\{#(eq-[\w-]+)\}", equation, md, flags=re.S)

    def cell(self, c, following):
        src = text(c.get("source"))
        if c["cell_type"] == "markdown":
            yield self.markdown(src)
        if c["cell_type"] != "code":
            return
        opts, code = options(src)
        if unknown := opts.keys() - OPTIONS:
            raise SystemExit(f"{self.stem}: cell options {sorted(unknown)} are not known here\n{src}")
        if code and opts.get("echo", True):
            block = fence(code, ".python")
            if opts.get("code-fold") in (True, "true"):
                block = f"<details><summary>{opts.get('code-summary', 'Code')}</summary>\n\n{block}\n\n</details>"
            yield block
        if opts.get("output", True):
            for o in c.get("outputs", []):
                # Where the source follows, signature and docstring would be shown twice: keep the heading alone.
                whole = not (code.startswith("show_doc(") and "Exported source" in text(following.get("source")))
                yield self.output(o, opts) if whole else self.output(o, opts).split("\n```")[0]

    def output(self, o, opts):
        if o["output_type"] == "stream":
            return terminal(text(o["text"]))
        if o["output_type"] == "error":
            return fence(f"{o['ename']}: {o['evalue']}", ".output")
        data = o["data"]
        for mime, suffix in (("image/svg+xml", "svg"), ("image/png", "png")):
            if image := text(data.get(mime)):
                return self.image(image.encode() if suffix == "svg" else base64.b64decode(image), suffix, opts)
        if md := text(data.get("text/markdown")):
            return self.caption(opts) + self.markdown(md)
        if raw := text(data.get("text/html")):
            raw = re.sub(r"<style.*?</style>", "", raw, flags=re.S)
            return self.caption(opts) + f"```{{=html}}\n{raw}\n```"
        return terminal(text(data["text/plain"]))

    def image(self, image, suffix, opts):
        self.n += 1
        d = self.out / f"{self.stem}_files"
        d.mkdir(exist_ok=True)
        (d / f"{self.n}.{suffix}").write_bytes(image)
        cap, label = opts.get("fig-cap", ""), opts.get("label")
        if label:
            cap = f"Figure {self.number(label)}: {cap}"
        alt = html.escape(opts.get("fig-alt", opts.get("fig-cap", "")))
        ident = f"#{label}" if label else ""
        return f'![{cap}]({d.name}/{self.n}.{suffix}){{{ident} alt="{alt}"}}'

    def caption(self, opts):
        "Of a table that is an output"
        if "tbl-cap" not in opts:
            return ""
        label = opts.get("label")
        number = f"Table {self.number(label)}: " if label else ""
        return f"::: {{{'#' + label if label else ''} .caption}}\n{number}{opts['tbl-cap']}\n:::\n\n"

    def source(self, where):
        "Markdown of the whole page; `where` tells every label's page and number."
        def ref(m):
            label = m[1]
            if label not in where:
                raise SystemExit(f"{self.stem}: nothing is labelled {label!r}")
            href, n = where[label]
            return f"[{NAMES[label.split('-')[0]]} {n}]({'' if href == self.href else href}#{label})"
        md = "\n\n".join(self.parts).replace("<!-- WARNING: THIS FILE WAS AUTOGENERATED! DO NOT EDIT! -->", "")
        for name, p in self.site.items():
            md = re.sub(rf"\]\((?:\./)?{re.escape(name)}(?=[)#])", f"]({p.href}", md)
        md = re.sub(r"(?<![\w`])@((?:fig|tbl|eq|sec)-[\w-]*\w)", ref, md)
        return md.replace(SITE + "/", "")


def sidebar(items, pages):
    "The sidebar of _quarto.yml with pages in place of names: (text, page or list)"
    for it in items:
        it = {"href": it} if isinstance(it, str) else it
        if "section" in it:
            yield it["section"], list(sidebar(it["contents"], pages))
        elif it["href"] in pages:
            p = pages[it["href"]]
            yield it.get("text") or p.title, p
        else:
            raise SystemExit(f"_quarto.yml: the sidebar names {it['href']}, which does not exist")


def navigation(items, here):
    out = []
    for label, it in items:
        if isinstance(it, list):
            out.append(f"<li><span>{html.escape(label)}</span>{navigation(it, here)}</li>")
        else:
            cls = ' class="here" aria-current="page"' if it is here else ""
            number = "".join(f"<i>{n}</i>" for n in re.findall(r"^\d+", it.stem))
            out.append(f'<li><a{cls} href="{it.href}">{number}{html.escape(label)}</a></li>')
    return "<ul>" + "".join(out) + "</ul>"


def flat(items):
    for _, it in items:
        yield from flat(it) if isinstance(it, list) else [it]


def neighbours(order, here):
    "Links to the pages before and after this one"
    i, out = order.index(here), []
    for j, rel in ((i - 1, "prev"), (i + 1, "next")):
        if 0 <= j < len(order):
            arrow = "← {}" if rel == "prev" else "{} →"
            out.append(f'<a rel="{rel}" href="{order[j].href}">{arrow.format(html.escape(order[j].title))}</a>')
    return "".join(out)


class Scan(HTMLParser):
    "Names and links of a page"
    def __init__(self, source):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a["id"]} if "id" in a else set()
        self.links += [a[k] for k in ("href", "src") if k in a]


def broken_links(out):
    "Every link within the site that leads nowhere"
    pages = {p.name: Scan(p.read_text(encoding="utf-8")) for p in out.glob("*.html")}
    for name, page in pages.items():
        for link in page.links:
            u = urlsplit(link)
            target = unquote(u.path) or name
            if not u.scheme and not u.netloc and (
                    not (out / target).exists() or u.fragment and unquote(u.fragment) not in pages[target].ids):
                yield f"{name} links to {link}, which is not there"


def readme(page, pages, where):
    "README.md at the top level, from the index notebook: links go to the notebooks, equations keep no number."
    if page.n:
        raise SystemExit("index: README.md cannot show a picture that is an output; store it in nbs/images")
    md = re.sub(r"\[(\$\$.+?\$\$)\[\(\d+\)\]\{\.eqno\}\]\{#[\w-]+ \.eq\}", r"\1", page.source(where), flags=re.S)
    md = re.sub(r"\[((?:Figure|Table|Equation|Section) \d+)\]\(#[\w-]+\)", r"\1", md)
    md = re.sub(r'::: \{\.callout-\w+ title="(.*?)"\}\n(.*?)\n:::', lambda m: "> **" + m[1] + "**\n>\n" + re.sub(
        r"^", "> ", m[2].strip("\n"), flags=re.M), md, flags=re.S)
    md = re.sub(r"\]\(images/", "](nbs/images/", md)
    md = re.sub(r"^!\[((Figure \d+): .*)\]\((\S+)\)\{#[^}]*\}$", r"![\2](\3)\n\n*\1*", md, flags=re.M)
    for name, p in pages.items():
        md = re.sub(rf"\]\({re.escape(p.href)}(#[^)]*)?\)", f"](nbs/{name})", md)
    md = pypandoc.convert_text(md, "gfm-tex_math_gfm+tex_math_dollars", format="markdown-smart-implicit_figures",
                               extra_args=["--wrap=preserve"])
    head = f"<!-- Made from nbs/index.ipynb by tools/build_site.py: edit the notebook. -->\n# {page.title}\n\n"
    (ROOT / "README.md").write_text(f"{head}> {page.meta['description']}\n\n{md}", encoding="utf-8")


def render(page, pages, where, side, args):
    order = list(flat(side))
    if page not in order:
        raise SystemExit(f"_quarto.yml: the sidebar does not name {page.stem}.ipynb")
    description = page.meta.get("description", "")
    meta = {"title": page.title, "description": description.replace("$", ""),
            "pagetitle": CFG.title if page.stem == "index" else f"{page.title} – {CFG.title}"}
    variables = {"site": CFG.title, "nav": navigation(side, page), "neighbours": neighbours(order, page)}
    args = args + [f"--metadata={k}:{v}" for k, v in meta.items()]
    args += [f"--variable={k}:{v}" for k, v in variables.items()]
    md = f"::: description\n{description}\n:::\n\n{page.source(where)}"
    body = pypandoc.convert_text(md, "html", format="markdown", extra_args=args)
    body = re.sub(r"<colgroup>.*?</colgroup>", "", body, flags=re.S)  # columns as wide as what they hold
    body = re.sub(r"<table.*?</table>", r'<div class="wide">\g<0></div>', body, flags=re.S)
    (page.out / page.href).write_text(body, encoding="utf-8")


def main(out):
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    cache = proc_nbs(force=True)
    pages = {p.name: Page(p, out) for p in sorted(cache.glob("*.ipynb"))}
    Page.site = pages
    where = {label: (p.href, n) for p in pages.values() for label, n in p.refs.items()}
    side = list(sidebar(quarto["website"]["sidebar"]["contents"], pages))
    args = PANDOC + [f"--template={ROOT / 'tools/page.html'}"]
    if bib := quarto.get("bibliography"):
        args += ["--citeproc", f"--bibliography={CFG.nbs_path / bib}"]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda p: render(p, pages, where, side, args), pages.values()))
    shutil.copy(ROOT / "tools/site.css", out)
    if (CFG.nbs_path / "images").exists():
        shutil.copytree(CFG.nbs_path / "images", out / "images")
    readme(pages["index.ipynb"], pages, where)
    if broken := list(broken_links(out)):
        raise SystemExit("\n".join(broken))
    print(f"{len(pages)} pages in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "_site").absolute())
