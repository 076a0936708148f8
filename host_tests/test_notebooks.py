"""The notebooks have no outputs in git, and run from top to bottom without a board."""

import re
import shutil
import time
from types import SimpleNamespace as Made

import msgspec
import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from pynq_kgrc.analysis import plots
from pynq_kgrc.backends.board import power

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}

MOST_LINES = 16

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++: notebooks on the C-simulation not run"
)


def test_all_five_are_there():
    assert [name[:2] for name in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


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
    for variable in ("QUICK", "BACKEND", "PROGRAM"):
        monkeypatch.delenv(f"PYNQ_KGRC_{variable}", raising=False)
    for variable, value in {
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        **environment,
    }.items():
        monkeypatch.setenv(variable, value)
    book = nbformat.read(NOTEBOOKS[name], as_version=4)
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(book, timeout=seconds, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    streams = [output for output in outputs if output.output_type == "stream"]
    assert [output.text for output in streams if output.name == "stderr"] == []
    kinds = [kind for output in outputs for kind in output.get("data", ())]
    if name == "01_classify":
        assert "text/html" in kinds, "no player"
    return "".join(output.text for output in streams), kinds.count("image/png")


QUICK = {"PYNQ_KGRC_QUICK": "1"}


def test_classify(tmp_path, monkeypatch):
    text, pictures = run("01_classify", tmp_path, monkeypatch, **QUICK)
    assert "mean nothing" in text
    assert "measured on this computer" in text
    assert pictures == 2


@needs_compiler
@pytest.mark.parametrize("backend", ["csim", "board"])
def test_where_the_time_goes(tmp_path, monkeypatch, backend):
    if backend == "board":
        pytest.importorskip("pynq", reason="no pynq: the notebook is not run on a simulated board")
    text, pictures = run("02_where_the_time_goes", tmp_path, monkeypatch, PYNQ_KGRC_BACKEND=backend)
    rows = re.findall(r"^\S+ +(\d+) +(\d+) +(\d+) +none  (\w+)$", text, re.MULTILINE)
    assert len(rows) > 5
    for modelled, array, counted, bound in rows:
        assert array == counted
        assert int(modelled) > int(array)
        assert bound in plots.PROCESSES
    assert f"run on {backend}" in text
    assert pictures == 2


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
    assert re.search(r"^\d+ clips in [\d.]+ s on emulate; power not measured", text, re.MULTILINE)
    assert " W" not in text
    assert pictures == 0


# ---- slow: without the shortcuts of PYNQ_KGRC_QUICK -----------------------------------------


@pytest.mark.slow
@pytest.mark.network
def test_classify_with_i3d(tmp_path, monkeypatch, i3d):
    """The fixture i3d downloads the weights, or skips the test."""
    names = (ROOT / "pynq_kgrc/labels/kinetics400.txt").read_text("utf-8").splitlines()
    msgspec.structs.replace(i3d[1], labels=tuple(names)).save(tmp_path / "i3d.kgrc")
    program = {"PYNQ_KGRC_PROGRAM": str(tmp_path / "i3d.kgrc")}
    text, pictures = run("01_classify", tmp_path, monkeypatch, seconds=900, **program)
    assert re.search(r"^arm wrestling, (9\d|100)\.\d%", text, re.MULTILINE)
    assert "mean nothing" not in text
    assert pictures == 2


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["01_classify", "05_power"])
def test_on_the_simulated_board(tmp_path, monkeypatch, name):
    pytest.importorskip("pynq", reason="no pynq: notebooks on a simulated board not run")
    text, _ = run(name, tmp_path, monkeypatch, PYNQ_KGRC_BACKEND="board", **QUICK)
    assert text


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
