"""The README tells the truth: its Python runs, its commands parse, its links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pynq_kgrc.cli import _parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert blocks("python")
    for block in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "Label(label=" in done.stdout
    assert (tmp_path / "out" / "mine.kgrc").is_file()


def test_commands_parse():
    lines = "".join(blocks("bash")).splitlines()
    assert len(lines) > 4
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "pynq-kgrc"
        assert _parser().parse_args(arguments).run


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_file_names_lead_somewhere(page):
    text = page.read_text("utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_functions_named_in_equations_exist():
    """Each `module.name` in the equations page is there."""
    import importlib

    package = ROOT / "pynq_kgrc"
    places = {}
    for path in package.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        # a folder a backend: its class is in backend.py
        places[path.parent.name if path.stem == "backend" else path.stem] = module
        for kind in re.findall(r"^class (\w+)", path.read_text("utf-8"), re.MULTILINE):
            places[kind] = module
    text = (ROOT / "docs" / "equations.md").read_text("utf-8")
    named = re.findall(r"`(\w+)\.(\w+)`", text)
    assert len(named) > 10
    for owner, name in named:
        assert owner in places, f"{owner}.{name}: no module or class of that name"
        module = importlib.import_module(places[owner])
        holder = getattr(module, owner) if owner[0].isupper() else module
        assert hasattr(holder, name), f"{owner}.{name}"
