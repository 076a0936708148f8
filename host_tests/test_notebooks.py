"""The notebooks have no outputs in git, and run from top to bottom without a board."""

import os
import re
import shutil
import time
from types import SimpleNamespace as Made

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from pynq_kgrc.analysis import plots
from pynq_kgrc.backends.board import power
from pynq_kgrc.backends.chosen import software_backend

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}

MOST_LINES = 16

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++: notebooks on the C-simulation not run"
)


def test_all_seven_are_there():
    assert [name[:2] for name in NOTEBOOKS] == [f"{number:02}" for number in range(1, 8)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_in_git(name):
    book = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbformat.validate(book)
    title, sentences = book.cells[0].source.split("\n\n")[:2]
    assert title.startswith("# ")
    assert len(re.findall(r"\.(?:\s|$)", sentences)) == 2, "say in two sentences what it does"
    for cell in book.cells:
        assert "execution" not in cell.metadata
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|mnt|opt|Users)/", cell.source)
        assert not re.search(r"[A-Z]:\\", cell.source)
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, "clear the outputs"
            assert len(cell.source.splitlines()) <= MOST_LINES
    settings = set(re.findall(r"PYNQ_KGRC_\w+", "".join(c.source for c in book.cells[1:])))
    assert all(f"| `{setting}` |" in book.cells[0].source for setting in settings)


def run(name, folder, monkeypatch, seconds=120, **environment):
    """Run a notebook; the text that it printed, and the number of pictures that it showed."""
    book = nbformat.read(NOTEBOOKS[name], as_version=4)
    return execute(book, folder, monkeypatch, seconds, **environment)


def execute(book, folder, monkeypatch, seconds=120, **environment):
    for variable in ("QUICK", "BACKEND", "PROGRAM", "SIMULATE", "CAMERA"):
        monkeypatch.delenv(f"PYNQ_KGRC_{variable}", raising=False)
    for variable, value in {
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        **environment,
    }.items():
        monkeypatch.setenv(variable, value)
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(book, timeout=seconds, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    streams = [output for output in outputs if output.output_type == "stream"]
    assert [output.text for output in streams if output.name == "stderr"] == []
    kinds = [kind for output in outputs for kind in output.get("data", ())]
    if book.cells[0].source.startswith("# Classify"):
        players = [output.data.get("text/html", "") for output in outputs if "data" in output]
        assert "<video controls poster=" in "".join(players), "no player that shows a frame"
    if folder_of_outputs := os.environ.get("KEEP_NOTEBOOKS"):
        nbformat.write(book, f"{folder_of_outputs}/{folder.name}.ipynb")
    return "".join(output.text for output in streams), kinds.count("image/png")


QUICK = {"PYNQ_KGRC_QUICK": "1"}


SIMULATED = {"PYNQ_KGRC_SIMULATE": "1"}


def board_of(environment):
    """The backend that a notebook says it takes: the simulated board if it is asked for."""
    if environment:
        pytest.importorskip("pynq", reason="no pynq: notebooks on a simulated board not run")
    return "simulated board" if environment else software_backend()


@pytest.mark.parametrize("where", [{}, pytest.param(SIMULATED, marks=pytest.mark.slow)], ids=str)
def test_classify(tmp_path, monkeypatch, where):
    """The label of the depth video is right, on either backend, and the backend is named."""
    backend = board_of(where)
    text, pictures = run("01_classify", tmp_path, monkeypatch, **QUICK, **where)
    assert f"backend {backend}, design 8-sparse: " in text
    assert "a01_s2_t1.mp4 shows: right arm swipe to the left" in text
    assert re.search(r"^right arm swipe to the left, [\d.]+%$", text, re.MULTILINE)
    assert f"s on {backend} with decoding, measured on this computer" in text
    assert pictures == 2


@needs_compiler
@pytest.mark.parametrize("where", [{}, SIMULATED], ids=str)
def test_where_the_time_goes(tmp_path, monkeypatch, where):
    backend = "board" if board_of(where) == "simulated board" else "csim"
    text, pictures = run("02_where_the_time_goes", tmp_path, monkeypatch, **where)
    rows = re.findall(r"^\S+ +(\d+) +(\d+) +(\d+) +none  (\w+)$", text, re.MULTILINE)
    assert len(rows) > 5
    for modelled, array, counted, bound in rows:
        assert array == counted
        assert int(modelled) > int(array)
        assert bound in plots.PROCESSES
    assert f"run on {backend}" in text
    assert pictures == 2


@needs_compiler
@pytest.mark.parametrize("where", [pytest.param({}, marks=pytest.mark.slow), SIMULATED], ids=str)
def test_inside_the_overlay(tmp_path, monkeypatch, where):
    """Registers, buffers and one start by hand give the label; every task equals the emulation."""
    backend = board_of(where)
    text, pictures = run("06_overlay", tmp_path, monkeypatch, **where)
    rows = re.findall(r"^(\S+) +[\d x]+ +\d+ +none  (.+)$", text, re.MULTILINE)
    assert len(rows) > 5
    assert pictures == 1
    if backend != "simulated board":
        assert {verdict for _, verdict in rows} == {"emulation only"}
        assert "no board is used here" in text
        return
    assert {verdict for _, verdict in rows} == {"equal"}
    found, ours = re.search(r"^digest (\w+) - ours is (\w+)$", text, re.MULTILINE).groups()
    assert found == ours
    assert "the simulated board says: right arm swipe to the left" in text


@pytest.mark.parametrize("where", [{}, pytest.param(SIMULATED, marks=pytest.mark.slow)], ids=str)
def test_live(tmp_path, monkeypatch, where):
    """Without a camera, on the file that ships; the label appears over the frames."""
    said_to_be = board_of(where)
    text, pictures = run("07_live", tmp_path, monkeypatch, **QUICK, **where)
    assert f"backend {said_to_be}, design" in text
    assert pictures == 1
    said = re.search(r"^(\d+) clips on \w+: (.*)$", text, re.MULTILINE)
    assert int(said[1]) >= 1
    assert "right arm swipe to the left" in said[2]


@pytest.mark.slow
def test_live_stops_cleanly(tmp_path, monkeypatch):
    """Interrupted in a clip, it says so, and camera and device are given back."""
    text = run_live_interrupted(tmp_path, monkeypatch)
    assert "stopped" in text
    assert "released True, closed True" in text


def run_live_interrupted(folder, monkeypatch):
    """The text of the live notebook whose second clip is interrupted, as the button does it."""
    book = nbformat.read(NOTEBOOKS["07_live"], as_version=4)
    trap = (
        "from pynq_kgrc.runtime import Session as Real\n"
        "class Session(Real):\n"
        "    def classify(self, frames):\n"
        "        raise KeyboardInterrupt\n"
        "    def close(self):\n"
        "        super().close()\n"
        "        closed.append(True)\n"
        "closed, released = [], []\n"
        "def frames_of(source, real=frames_of):\n"
        "    try:\n"
        "        yield from real(source)\n"
        "    finally:\n"
        "        released.append(True)\n"
    )
    last = [i for i, cell in enumerate(book.cells) if cell.cell_type == "code"][-1]
    book.cells.insert(last, nbformat.v4.new_code_cell(trap))
    book.cells.append(
        nbformat.v4.new_code_cell("print(f'released {bool(released)}, closed {bool(closed)}')")
    )
    return execute(book, folder, monkeypatch, 120, **QUICK)[0]


def test_prune_quantize_compile(tmp_path, monkeypatch):
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    text, pictures = run("03_prune_quantize_compile", tmp_path, monkeypatch, **QUICK, **cache)
    kept = {name: float(macs) for name, macs in re.findall(r"^(\w+) +([\d.]+) of", text, re.M)}
    assert kept["dense"] > max(kept["KGR"], kept["KGC"]) > kept["KGRC"]
    assert len(list((tmp_path / "cache").rglob("*.kgrc"))) == 1
    assert pictures == 5


def test_explore(tmp_path, monkeypatch):
    text, pictures = run("04_explore_accelerators", tmp_path, monkeypatch, **QUICK)
    designs = re.findall(r"^8-sparse-\S+ +([\d.]+) ms +(\d+) DSP", text, re.MULTILINE)
    assert len(designs) == 5
    assert pictures == 1


def test_power_without_sensors(tmp_path, monkeypatch):
    monkeypatch.delenv("PYNQ_KGRC_SIMULATE")
    if power.find_rails():
        pytest.skip("this computer has power sensors: the notebook without sensors is not tested")
    text, pictures = run("05_power", tmp_path, monkeypatch, **QUICK)
    assert text.count("not measured: no sensors here") == 3
    said = rf"^\d+ clips in [\d.]+ s on {software_backend()}; power not measured"
    assert re.search(said, text, re.MULTILINE)
    assert not re.search(r"\d W\b", text)
    assert pictures == 0


# ---- slow: without the shortcuts of PYNQ_KGRC_QUICK -----------------------------------------


@pytest.mark.slow
@pytest.mark.network
def test_classify_with_i3d(tmp_path, monkeypatch, i3d):
    """The notebook makes I3D itself. The fixture downloads the weights, or skips the test."""
    text, pictures = run("01_classify", tmp_path, monkeypatch, seconds=900)
    assert re.search(r"^arm wrestling, (9\d|100)\.\d%", text, re.MULTILINE)
    assert re.search(r"^arm wrestling, then playing cricket$", text, re.MULTILINE)
    assert pictures == 3


@pytest.mark.slow
@needs_compiler
def test_power_on_the_simulated_board(tmp_path, monkeypatch):
    """Each rail and each figure says that it is simulated."""
    backend = board_of(SIMULATED)
    text, pictures = run("05_power", tmp_path, monkeypatch, **SIMULATED, **QUICK)
    assert f"backend {backend}, design" in text
    rows = re.findall(r"^(.+?) +[\d.]+ W, .* mJ a clip, .* mJ beyond idle, (\w+)$", text, re.M)
    assert len(rows) == 18
    assert all(rail.endswith("(simulated)") and kind == "simulated" for rail, kind in rows)
    assert "measured" not in text
    assert pictures == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["03_prune_quantize_compile", "04_explore_accelerators"])
def test_in_full(tmp_path, monkeypatch, name):
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    _, pictures = run(name, tmp_path, monkeypatch, seconds=300, **cache)
    assert pictures


# ---- power ----------------------------------------------------------------------------------


def test_power_is_recorded_while_something_runs():
    readings = iter(range(1000))
    rails = {"VCCINT": lambda: float(next(readings)), "flat": lambda: 2.0}
    recording = power.record_power(rails, lambda: time.sleep(0.3), interval=0.01)
    watts = recording.watts["VCCINT"]
    assert 3 < watts.size == recording.seconds.size <= 32
    assert watts.tolist() == list(range(watts.size))
    assert 0.1 < recording.seconds[-1] < 1
    assert recording.mean_watts == {"VCCINT": (watts.size - 1) / 2, "flat": 2.0}
    assert len(plots.plot_power({"idle": recording, "work": recording}).axes) == 2


def test_power_that_cannot_be_read():
    def broken():
        if next(readings):
            raise OSError("the chip is gone")
        return 1.0

    readings = iter((0, 1))
    with pytest.raises(power.DeviceError, match="no sensors here"):
        power.record_power({}, lambda: None)
    with pytest.raises(power.DeviceError, match="a power sensor fails: the chip is gone"):
        power.record_power({"VCCINT": broken}, lambda: time.sleep(0.2), interval=0.01)
    with pytest.raises(ZeroDivisionError):
        power.record_power({"flat": lambda: 2.0}, lambda: 1 / 0)


def test_rails_of_every_kind(monkeypatch, tmp_path):
    """Rails of pynq.pmbus have a power sensor, voltage and current sensors, or neither."""
    monkeypatch.delenv("PYNQ_KGRC_SIMULATE")

    def rail(**sensors):
        values = {kind: Made(value=value) for kind, value in sensors.items()}
        return Made(**{"power": None, "voltage": None, "current": None, **values})

    rails = {"a": rail(power=3.0), "b": rail(voltage=2.0, current=0.5), "c": rail(voltage=12.0)}
    monkeypatch.setattr(power, "import_module", lambda _: Made(get_rails=lambda: rails))
    found = power.find_rails(tmp_path)
    assert {name: read() for name, read in found.items()} == {"a": 3.0, "b": 1.0}


def test_no_rails_without_pynq(monkeypatch, tmp_path):
    monkeypatch.delenv("PYNQ_KGRC_SIMULATE")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(power, "import_module", missing)
    assert power.find_rails(tmp_path) == {}
