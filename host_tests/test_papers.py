"""docs/papers.md: each claim has a verdict, and each name that it gives is one of the package."""

import json
import re
from importlib import import_module

import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "papers.md"
SAME, DEVIATES = "same", "works, deviation documented"
IMPOSSIBLE, ABSENT = "not possible here, because", "absent"
HEAD = ["claim", "verdict", "where", "note"]


def claims(text):
    """Claim, verdict, where and note of each row of the tables of claims."""
    found, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().split("|")[1:-1]]
        if not line.startswith("|"):
            inside = False
        elif cells == HEAD:
            inside = True
        elif inside and not line.startswith("|---"):
            found.append((line, cells))
    return found


def find(name):
    """What `name` is: a module of the package, or something in it; raises AttributeError."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(["pynq_kgrc", *parts[:count]]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AttributeError(f"no module of pynq_kgrc is called {parts[0]}")


def faults(text):
    """What is wrong with the claims of a page."""
    for line, cells in claims(text):
        if len(cells) != len(HEAD):
            yield f"{line}: {len(cells)} cells"
            continue
        _, verdict, where, note = cells
        names = re.findall(r"`([\w.]+)`", where)
        if verdict not in (SAME, DEVIATES, IMPOSSIBLE, ABSENT):
            yield f"{line}: no verdict"
        if verdict in (SAME, DEVIATES) and not names and "](" not in where:
            yield f"{line}: says not where"
        if verdict in (DEVIATES, IMPOSSIBLE) and not note:
            yield f"{line}: says not how it deviates, or why not"
        for name in names:
            try:
                find(name)
            except AttributeError as error:
                yield f"{name}: {error}"


def test_every_claim_is_answered_by_what_there_is():
    text = PAGE.read_text("utf-8")
    assert list(faults(text)) == []
    assert len(claims(text)) > 50
    assert text.count("\n## ") == 5


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("| a | same | `compress.patterns.KernelGroup` | |", "no attribute 'KernelGroup'"),
        ("| a | same | `compress.pattern.Blocks` | |", "no attribute 'pattern'"),
        ("| a | same | `nowhere.Blocks` | |", "no module of pynq_kgrc is called nowhere"),
        ("| a | the same | `groups.split` | |", "no verdict"),
        ("| a | same | | |", "says not where"),
        (f"| a | {DEVIATES} | `groups.split` | |", "says not how it deviates"),
        (f"| a | {IMPOSSIBLE} | | |", "or why not"),
        ("| a | same | `groups.split` |", "3 cells"),
    ],
)
def test_faults_are_found(row, fault):
    page = f"# x\n\n| claim | verdict | where | note |\n|---|---|---|---|\n{row}\n"
    assert [fault in each for each in faults(page)] == [True]
    right = "| a | same | `groups.split` | |"
    assert list(faults(page.replace(row, right))) == []


def test_the_tables_of_patterns_are_those_of_the_results(monkeypatch):
    """docs/accuracy.md shows what benchmarks/patterns.py wrote."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    patterns = import_module("patterns")
    results = json.loads(patterns.RESULTS.read_text("utf-8"))
    rows = [patterns.Row(**row) for row in results["rows"]]
    lines = list(patterns.tables(rows))
    page = patterns.RESULTS.with_suffix(".md").read_text("utf-8")
    assert page == "\n".join((*patterns.HEAD, *lines)) + "\n"
    shown = (ROOT / "docs" / "accuracy.md").read_text("utf-8").splitlines()
    tables = [line for line in lines if line.startswith("| ")]
    assert len(tables) > 20
    assert [line for line in tables if line not in shown] == []
    # the array cannot use KRP: as many MACs as dense, and no time saved
    krp = [row for row in rows if row.pattern == "krp" and row.macs is not None]
    assert krp and all(row.macs == row.latency == 1 for row in krp)
