"""Build the documentation site without Quarto, from the same notebooks and the same _quarto.yml.

    python tools/build_site.py [OUT]        (default: _site)

Quarto (`nbdev_docs`) is the official way.  This one needs only PyPI: nbdev prepares the notebooks,
pandoc (the wheel pypandoc_binary) renders them to plain HTML with MathML, no script and no network.
It knows the subset of Quarto that our notebooks use, and stops at what it does not know:
cell options echo, output, code-fold, label, fig-cap, tbl-cap; cross references to fig-, tbl-, eq-, sec-;
divs such as ::: {.callout-note}; citations, where _quarto.yml names a bibliography.
"""
import base64
import html
import json
import re
import shutil
import sys
from pathlib import Path

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


class Page:
    def __init__(self, path, out):
        self.nb = json.loads(path.read_text(encoding="utf-8"))
        self.out, self.stem, self.n, self.refs = out, path.stem, 0, {}
        self.meta = yaml.safe_load(text(self.nb["cells"][0]["source"]).strip().strip("-"))
        self.href = self.meta["output-file"]
        self.parts = [p for c in self.nb["cells"][1:] for p in self.cell(c)]

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
        for m in re.finditer(r"^#+ .*\{#(sec-[\w-]+)\}", md, re.M):
            self.number(m[1])
        md = re.sub(r"^: (.+?) *\{#(tbl-[\w-]+)\} *$", caption, md, flags=re.M)
        return re.sub(r"\$\$(.+?)\$\$\s*\{#(eq-[\w-]+)\}", equation, md, flags=re.S)

    def cell(self, c):
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
            if opts.get("code-fold") in (True, "true", "show"):
                tag = "<details open>" if opts["code-fold"] == "show" else "<details>"
                block = f"{tag}<summary>{opts.get('code-summary', 'Code')}</summary>\n\n{block}\n\n</details>"
            yield block
        if opts.get("output", True):
            for o in c.get("outputs", []):
                yield self.output(o, opts)

    def output(self, o, opts):
        if o["output_type"] == "stream":
            return fence(text(o["text"]).rstrip(), ".output")
        if o["output_type"] == "error":
            return fence(f"{o['ename']}: {o['evalue']}", ".output")
        data = o["data"]
        if png := text(data.get("image/png")):
            self.n += 1
            d = self.out / f"{self.stem}_files"
            d.mkdir(exist_ok=True)
            (d / f"{self.n}.png").write_bytes(base64.b64decode(png))
            cap, label = opts.get("fig-cap", ""), opts.get("label")
            if label:
                cap = f"Figure {self.number(label)}: {cap}"
            alt = html.escape(opts.get("fig-alt", opts.get("fig-cap", "")))
            ident = f"#{label}" if label else ""
            return f'![{cap}]({d.name}/{self.n}.png){{{ident} alt="{alt}"}}'
        if md := text(data.get("text/markdown")):
            return self.markdown(md)
        if raw := text(data.get("text/html")):
            return f"```{{=html}}\n{raw}\n```"
        return fence(text(data["text/plain"]).rstrip(), ".output")

    def source(self, where):
        "Markdown of the whole page; `where` tells every label's page and number."
        def ref(m):
            label = m[1]
            if label not in where:
                raise SystemExit(f"{self.stem}: nothing is labelled {label!r}")
            href, n = where[label]
            return f"[{NAMES[label.split('-')[0]]} {n}]({'' if href == self.href else href}#{label})"
        md = "\n\n".join(self.parts)
        for name, p in self.site.items():
            md = re.sub(rf"\]\((?:\./)?{re.escape(name)}(?=[)#])", f"]({p.href}", md)
        md = re.sub(r"(?<![\w`])@((?:fig|tbl|eq|sec)-[\w-]*\w)", ref, md)
        return md.replace(SITE + "/", "")


def navigation(items, pages, here):
    out = []
    for it in items:
        it = {"href": it} if isinstance(it, str) else it
        if "section" in it:
            out.append(f"<li><span>{it['section']}</span>{navigation(it['contents'], pages, here)}</li>")
            continue
        if it["href"] not in pages:
            raise SystemExit(f"_quarto.yml: the sidebar names {it['href']}, which does not exist")
        p = pages[it["href"]]
        cls = ' class="here"' if p is here else ""
        out.append(f'<li><a{cls} href="{p.href}">{html.escape(it.get("text") or p.meta["title"])}</a></li>')
    return "<ul>" + "".join(out) + "</ul>"


def readme(page, pages):
    "README.md at the top level, from the index notebook: links go to the notebooks, equations keep no number."
    md = "\n\n".join(page.parts).replace("<!-- WARNING: THIS FILE WAS AUTOGENERATED! DO NOT EDIT! -->", "")
    md = re.sub(r"\[(\$\$.+?\$\$)\[\(\d+\)\]\{\.eqno\}\]\{#[\w-]+ \.eq\}", r"\1", md, flags=re.S)
    for name, p in pages.items():
        md = re.sub(rf"\({re.escape(SITE)}/{re.escape(p.href)}(#[^)]*)?\)|\({re.escape(name)}(#[^)]*)?\)", f"(nbs/{name})", md)
    md = pypandoc.convert_text(md, "gfm-tex_math_gfm+tex_math_dollars", format="markdown-smart", extra_args=["--wrap=preserve"])
    head = f"<!-- Made from nbs/index.ipynb by tools/build_site.py: edit the notebook. -->\n# {page.meta['title']}\n\n"
    (ROOT / "README.md").write_text(f"{head}> {page.meta['description']}\n\n{md}", encoding="utf-8")


def main(out):
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    sidebar = quarto["website"]["sidebar"]["contents"]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    cache = proc_nbs(force=True)
    pages = {p.name: Page(p, out) for p in sorted(cache.glob("*.ipynb"))}
    where = {}
    Page.site = pages
    for p in pages.values():
        for label, n in p.refs.items():
            where[label] = p.href, n
    args = PANDOC + [f"--template={ROOT / 'tools/page.html'}"]
    if bib := quarto.get("bibliography"):
        args += ["--citeproc", f"--bibliography={CFG.nbs_path / bib}"]
    for p in pages.values():
        meta = [f"--metadata=title:{p.meta['title']}", f"--metadata=description:{p.meta.get('description', '')}",
                f"--variable=site:{CFG.title}", f"--variable=nav:{navigation(sidebar, pages, p)}"]
        pypandoc.convert_text(p.source(where), "html", format="markdown-smart", extra_args=args + meta,
                              outputfile=str(out / p.href))
    shutil.copy(ROOT / "tools/site.css", out)
    readme(pages["index.ipynb"], pages)
    print(f"{len(pages)} pages in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "_site").absolute())
