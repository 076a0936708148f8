"""The documents hold together: links, anchors, tables, file names, and the site made of them."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT
from markdown_it import MarkdownIt

SUFFIXES = (".py", ".md", ".cpp", ".h", ".v", ".tcl")
SKIPPED = {"build", "dist", "out"}
PARSER = MarkdownIt("commonmark").enable("table")


def checkout(*patterns):
    """Files of the checkout; hidden folders, environments and what is built are left out."""
    for pattern in patterns:
        for path in sorted(ROOT.rglob(pattern)):
            parts = path.relative_to(ROOT).parts
            if not SKIPPED & set(parts) and not any(part.startswith(".") for part in parts):
                yield path


PAGES = list(checkout("*.md"))


def name(path):
    return str(path.relative_to(ROOT))


def inline(text):
    """Every inline token of a page, with those inside links and images."""
    waiting = PARSER.parse(text)
    while waiting:
        token = waiting.pop()
        yield token
        waiting += token.children or []


def links(text):
    """What a page links to or shows, in Markdown or in HTML."""
    for token in inline(text):
        if target := token.attrGet("href") or token.attrGet("src"):
            yield target
        if token.type in ("html_inline", "html_block"):
            yield from re.findall(r'(?:href|src|srcset)="([^"]+)"', token.content)


def anchors(text):
    """The anchors that GitHub gives the headings of a page."""
    tokens = PARSER.parse(text)
    for opening, heading in pairwise(tokens):
        if opening.type == "heading_open":
            shown = (t.content for t in heading.children if t.type in ("text", "code_inline"))
            words = "".join(shown)
            yield re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")


def broken_links(page):
    """Relative links of a page to a file or an anchor that does not exist."""
    text = page.read_text("utf-8")
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target.read_text("utf-8")):
            yield f"{link}: no such heading in {target.name}"


def cut_tables(text):
    """Rows of a table that show as text, because a blank line parts them from their head."""
    for token in inline(text):
        if token.type == "inline" and token.level == 1 and token.content.lstrip().startswith("|"):
            yield token.content.splitlines()[0]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_are_whole(page):
    assert list(cut_tables(page.read_text("utf-8"))) == []


def test_broken_links_are_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# The *words*, `code` and all\n\n## Ends here\n")
    page.write_text(
        "[a](other.md) [b](other.md#the-words-code-and-all) [c](https://example.com/none.md)\n\n"
        "# Here\n\n[d](#here) `[e](none.md)`\n\n    [f](none.md)\n\n"
        "[g][ref]\n\n[ref]: other.md#ends-here\n"
    )
    assert list(broken_links(page)) == []
    for planted in ("[x](none.md)", "![x](none.png)", '<img src="none.svg">', "[x](other.md#none)",
                    "[x](#none)", "[x][r]\n\n[r]: none.md"):  # fmt: skip
        page.write_text(f"# Here\n\n{planted}\n")
        assert len(list(broken_links(page))) == 1, planted


def test_cut_tables_are_found():
    whole = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert list(cut_tables(whole)) == []
    assert list(cut_tables(f"{whole}\n| 3 | 4 |\n")) == ["| 3 | 4 |"]


# ---- names of files -------------------------------------------------------------------------

FILES = {name(path) for path in checkout("*") if path.is_file()}

OTHERS = {
    "ap_int.h",
    "hls_burst_maxi.h",
    "hls_stream.h",
    "verilated.h",
    "immintrin.h",
    "stddef.h",
    "stdint.h",
    "string.h",
    "ucontext.h",
    "variants.h",
    "waving.py",
    "report.md",
}
"""Files that tools bring, or that a test, a recipe or a build writes."""


def dangling_names(text):
    """Names of files in a text that no file of the checkout ends with."""
    text = re.sub(r"\$\{?\w+\}?/", "", text)  # a variable of a script
    for found in re.findall(rf"[\w./-]+(?:{'|'.join(map(re.escape, SUFFIXES))})\b", text):
        tail = re.sub(r"^(\.{0,2}/)+", "", found)
        known = any(path == tail or path.endswith("/" + tail) for path in FILES)
        # Verilator names its headers after a module, with a V in front; _x.cpp is a suffix of names
        generated = Path(tail).name in OTHERS or re.match(r"V\w+\.h$|_", Path(tail).name)
        if not known and not generated:
            yield found


NAMING = [
    path
    for path in checkout("*")
    if path.suffix in (*SUFFIXES, ".toml", ".txt", ".yml") or path.name == "Makefile"
    if name(path).startswith(("pynq_kgrc/", "hls_src/", "docs/", "deploy/", "examples/"))
    or path.parent == ROOT
]


@pytest.mark.parametrize("path", NAMING, ids=name)
def test_files_that_are_named_exist(path):
    assert list(dangling_names(path.read_text("utf-8"))) == []


def test_dangling_names_are_found():
    assert list(dangling_names("see docs/format.md, `graph.py` and ../hls_src/top.cpp")) == []
    text = "as accelerator/layout.py (numerics.md) and wrong/graph.py"
    assert list(dangling_names(text)) == ["accelerator/layout.py", "numerics.md", "wrong/graph.py"]


# ---- the site -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built with warnings as errors."""
    pytest.importorskip("mkdocs", reason="pip install pynq_kgrc[docs]: the site was not built")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_page(site):
    for page in PAGES:
        place = page.relative_to(ROOT).with_suffix("")
        folder = place.parent if place.name == "README" else place
        assert (site / folder / "index.html").is_file(), page


def test_the_site_has_the_docstrings(site):
    text = (site / "docs" / "api" / "run" / "index.html").read_text("utf-8")
    assert 'id="pynq_kgrc.runtime.Session.classify"' in text
    assert 'id="pynq_kgrc.program.load"' in text


def test_the_site_needs_no_network(site):
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]*\bsrc=\"?(?:https?:)?//"
        r"|<link[^>]*rel=\"?(?:stylesheet|preconnect|preload)\"?[^>]*href=\"?(?:https?:)?//"
    )
    for page in site.rglob("*.html"):
        assert not loads.findall(page.read_text("utf-8")), page
