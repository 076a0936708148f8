"""The README is right: its Python runs, its commands parse, its targets exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from pynq_kgrc.cli import _parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


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
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = re.findall(r"^(?:\| `)?make ([\w-]+)", README + contributing, re.MULTILINE)
    assert len(named) > 6
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_workflows_call_the_three_targets():
    workflows = [path.read_text("utf-8") for path in (ROOT / ".github/workflows").glob("*.yml")]
    called = re.findall(r"run: make (\S+)$", "".join(workflows), re.MULTILINE)
    assert sorted(called) == ["demo", "test", "test-all"]


def test_the_first_command_is_on_the_first_screen():
    lines = README.splitlines()
    assert next(i for i, line in enumerate(lines) if line.startswith("make ")) < 30


def test_functions_named_in_equations_exist():
    """Each `module.name` on the page of equations exists."""
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
