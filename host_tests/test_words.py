"""docs/words.md: every name it gives is there, and no term has two entries."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = {
    "Python": sorted((ROOT / "pynq_kgrc").rglob("*.py")),
    "C++": sorted((ROOT / "hls_src").glob("*.[ch]*")),
    "Verilog": sorted((ROOT / "hls_src" / "rtl").glob("*.v")),
}


def entries():
    """(term, language, name) for each name that the page gives."""
    header = []
    for line in (ROOT / "docs" / "words.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("| word"):
            header = [cell.split(" (")[0] for cell in cells]
        elif not line.startswith("|"):
            header = []
        elif header and not line.startswith("|--") and len(cells) == len(header):
            for language, cell in zip(header, cells, strict=True):
                for name in re.findall(r"`([\w.]+)`", cell) if language in LANGUAGES else ():
                    yield cells[0], language, name


@pytest.fixture(scope="module")
def sources():
    return {
        language: "\n".join(path.read_text("utf-8") for path in paths)
        for language, paths in LANGUAGES.items()
    }


def test_every_name_is_there(sources):
    found = list(entries())
    assert len(found) > 100
    missing = [
        f"{term}: no {part} in {language}"
        for term, language, name in found
        for part in filter(None, name.split("."))
        if part != "h" and not re.search(rf"\b{part}\b", sources[language])
    ]
    assert not missing, "\n".join(missing)


def test_one_entry_a_word():
    page = (ROOT / "docs" / "words.md").read_text("utf-8")
    terms = re.findall(r"^\| ([^|`]+?) \|", page.split("## One index")[0], re.MULTILINE)
    terms = [term for term in terms if term != "word"]
    assert len(terms) > 50
    assert len(terms) == len(set(terms)), sorted(t for t in terms if terms.count(t) > 1)
