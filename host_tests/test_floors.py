"""The house stands: who may import whom, and what stays asleep."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "pynq_kgrc"

FLOORS = {
    "errors": 1,
    "version": 1,
    "quant": 2,
    "graph": 2,
    "groups": 2,
    "files": 2,
    "models": 3,
    "results": 3,
    "accelerator": 3,
    "video": 3,
    "compress": 4,
    "program": 4,
    "compiler": 5,
    "backends": 5,
    "runtime": 6,
    "samples": 6,
    "analysis": 7,
    "recognition": 7,
    "service": 8,
    "cluster": 9,
    "cli": 10,
    "__init__": 11,
}
"""A file imports from its own room and from floors below; on floor 2 graph may use quant."""

WALLS = {
    "torch": ("models", "compress"),
    "onnx": ("models",),
    "pynq": ("backends",),
    "cv2": ("video",),
    "matplotlib": ("analysis",),
    "fastapi": ("service",),
    "starlette": ("service", "cluster"),
    "uvicorn": ("service",),
    "av": ("video", "service"),
    "prometheus_client": ("service", "cluster"),
    "ray": ("cluster",),
    "pyarrow": ("cluster",),
    "aiohttp": ("cluster",),
}

INSIDE_FUNCTIONS = {"cli", "__init__"}
"""May import in a function's body: what a command needs, when it runs."""

FILES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path):
    """(module, whether at the top) for every import of a file."""
    tree = ast.parse(path.read_text("utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            top.update(map(id, node.body))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
        for name in names:
            yield name, id(node) in top


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_imports_go_down(path):
    here = room(path)
    for name, at_top in imports(path):
        wall = WALLS.get(name.split(".")[0])
        if wall is not None and here != "cli":
            assert here in wall, f"{path}: only {wall} import {name}"
        assert at_top or here in INSIDE_FUNCTIONS, f"{path}: {name} is imported inside a function"
        if not name.startswith("pynq_kgrc"):
            continue
        there = name.split(".")[1] if "." in name else "__init__"
        same_floor = (here, there) == ("graph", "quant") or (here, there) == ("groups", "quant")
        if here != there and not same_floor:
            assert FLOORS[there] < FLOORS[here], f"{path}: floor {here} imports {there}"


BACKEND_FOLDERS = ("backends.emulation", "backends.native", "backends.board")
"""A folder a backend: neither knows the other. What both need lies in `backends/` itself."""


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_a_backend_knows_no_other(path):
    here = ".".join(path.relative_to(PACKAGE).parts[:2])
    for name, _ in imports(path):
        for folder in BACKEND_FOLDERS:
            if here in BACKEND_FOLDERS and name.startswith(f"pynq_kgrc.{folder}"):
                assert here == folder, f"{path} imports {name}"


def import_graph():
    """The rooms of the package (its folders and top-level files) and the arrows between them."""
    rooms = {room(path) for path in FILES}
    arrows = set()
    for path in FILES:
        for name, _ in imports(path):
            package, _, rest = name.partition(".")
            there = rest.split(".")[0]
            if package == "pynq_kgrc" and there in rooms and there != room(path):
                arrows.add((room(path), there))
    return rooms, arrows


def test_the_import_graph_stays_small():
    """Fewer rooms and arrows than at revision bb9fb60 (24 and 117), none upward, no circle."""
    rooms, arrows = import_graph()
    print(f"{len(rooms)} rooms, {len(arrows)} arrows between them")
    assert rooms == set(FLOORS), "FLOORS names every room, and no other"
    assert len(rooms) < 24
    assert len(arrows) < 117
    upward = [(here, there) for here, there in arrows if FLOORS[here] < FLOORS[there]]
    assert not upward
    level = {(here, there) for here, there in arrows if FLOORS[here] == FLOORS[there]}
    assert level <= {("graph", "quant"), ("groups", "quant")}  # one way: so there is no circle


ASLEEP = ("torch", "onnx", "pynq", "cv2", "av", "fastapi", "matplotlib", "ray")


@pytest.mark.parametrize(
    "module",
    [
        "pynq_kgrc",
        "pynq_kgrc.runtime",
        "pynq_kgrc.backends.emulation.backend",
        "pynq_kgrc.cli",
        "pynq_kgrc.models.steps",
    ],
)
def test_the_runtime_wakes_nothing_heavy(module):
    """In a fresh process where none of those can be imported at all."""
    code = (
        f"import sys\n"
        f"for name in {ASLEEP}: sys.modules[name] = None\n"
        f"import {module}\n"
        f"import pynq_kgrc\n"
        f"assert pynq_kgrc.Session and pynq_kgrc.Program\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
