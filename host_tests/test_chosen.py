"""Notebooks take the board where there is one, and say which backend they use and why."""

import pytest

from pynq_kgrc.accelerator.config import preset
from pynq_kgrc.backends import chosen
from pynq_kgrc.backends.board import simulated_overlay
from pynq_kgrc.backends.chosen import choose_backend, installed_design, resolve_backend
from pynq_kgrc.errors import DeviceError


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    """No variable, no overlay, no sign of a board."""
    for variable in ("PYNQ_KGRC_BACKEND", "PYNQ_KGRC_SIMULATE", "XILINX_XRT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("KGRC_OVERLAY", str(tmp_path))
    monkeypatch.setattr(chosen, "MODEL", tmp_path / "model")
    monkeypatch.setattr(chosen, "MANAGERS", tmp_path / "managers")
    monkeypatch.setattr(chosen, "is_board", lambda: False)
    kernels(monkeypatch, None)
    return tmp_path


def kernels(monkeypatch, library):
    """The kernels of the native backend are built as `library`, or None: are not built."""
    monkeypatch.setattr(chosen, "built_library", lambda: library)


class Finder:
    """Stands for backends.board.device, which needs pynq."""

    def __init__(self, error=None):
        self.error = error

    def find_device(self):
        if self.error is not None:
            raise self.error


def device(monkeypatch, error=None):
    def find(name):
        if isinstance(error, ImportError):
            raise error
        return Finder(error)

    monkeypatch.setattr(chosen, "import_module", find)


def put(folder, *designs):
    for name in designs:
        simulated_overlay.write_overlay(folder / name, preset(name))


def test_a_laptop(monkeypatch):
    device(monkeypatch, ModuleNotFoundError("No module named 'pynq'", name="pynq"))
    found = choose_backend()
    assert (found.backend, found.config) == ("emulate", preset("8-sparse"))
    assert found.reason == "no board can be opened, because pynq is not installed"
    assert str(found).startswith("backend emulate, design 8-sparse: no board can")
    assert choose_backend("csim").backend == "csim"


def test_native_where_its_kernels_are_built(monkeypatch):
    device(monkeypatch, ModuleNotFoundError("No module named 'pynq'", name="pynq"))
    kernels(monkeypatch, "kernels.so")
    assert choose_backend().backend == "native"
    assert choose_backend("csim").backend == "csim"
    assert str(choose_backend()).startswith("backend native, design 8-sparse: no board can")


def test_auto_is_the_first_of_board_native_and_emulate(nothing_set, monkeypatch):
    device(monkeypatch)
    put(nothing_set, "8-zcu102")
    assert resolve_backend("csim") == "csim"
    assert resolve_backend("auto") == "emulate", "this machine is no board"
    kernels(monkeypatch, "kernels.so")
    assert resolve_backend("auto") == "native"
    monkeypatch.setenv("XILINX_XRT", "/usr")
    assert resolve_backend("auto") == "board"
    device(monkeypatch, DeviceError("no PYNQ device"))
    assert resolve_backend("auto") == "native"
    monkeypatch.setenv("PYNQ_KGRC_BACKEND", "csim")
    assert resolve_backend("auto") == "csim"


def test_a_variable_decides(monkeypatch):
    device(monkeypatch)
    monkeypatch.setenv("PYNQ_KGRC_SIMULATE", "1")
    assert choose_backend().backend == "board"
    assert choose_backend().title == "simulated board"
    assert "a simulated board, no hardware" in choose_backend().reason
    monkeypatch.setenv("PYNQ_KGRC_BACKEND", "csim")
    assert choose_backend().backend == "csim"
    assert choose_backend().title == "csim"
    assert choose_backend().reason == "PYNQ_KGRC_BACKEND says so"


def test_a_board(nothing_set, monkeypatch):
    """The design is that of the installed overlay; of several, the recommended one."""
    device(monkeypatch)
    found = choose_backend()
    assert found.backend == "emulate"
    assert "a PYNQ device is here, but no bitstream" in found.reason
    put(nothing_set, "16-sparse")
    assert choose_backend() == chosen.Chosen(
        "board", preset("16-sparse"), "a PYNQ device and an overlay of this design are here"
    )
    put(nothing_set, "8-zcu102")
    assert choose_backend().config == installed_design() == preset("8-zcu102")
    assert "(16-sparse would be there, too)" in choose_backend().reason


def test_a_board_whose_jupyter_has_no_xrt(nothing_set, monkeypatch):
    device(monkeypatch, DeviceError("no PYNQ device: XILINX_XRT is not set"))
    put(nothing_set, "8-zcu102")
    assert choose_backend().reason == "no PYNQ device: XILINX_XRT is not set"
    (nothing_set / "managers" / "fpga0").mkdir(parents=True)
    (nothing_set / "model").write_bytes(b"ZynqMP ZCU102 Rev1.0\0")
    reason = choose_backend().reason
    assert "This machine is a board (ZynqMP ZCU102 Rev1.0) with an FPGA manager" in reason
    assert "put XILINX_XRT=/usr into /etc/environment" in reason
    monkeypatch.setenv("XILINX_XRT", "/usr")
    assert "/etc/environment" not in choose_backend().reason


def test_the_real_search_on_this_computer(nothing_set):
    """Whatever pynq says here, a reason is given and nothing is raised."""
    put(nothing_set, "8-sparse")
    found = choose_backend()
    assert found.backend in ("emulate", "board")
    assert found.reason


def test_a_damaged_manifest_is_no_reason_to_emulate(nothing_set):
    (nothing_set / "mine").mkdir()
    (nothing_set / "mine" / "manifest.json").write_text("{")
    with pytest.raises(DeviceError, match=r"manifest\.json"):
        choose_backend()
