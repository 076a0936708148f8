"""The command doctor on a laptop, on a board, and on machines that lack something."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from pynq_kgrc.accelerator.config import preset, write_design
from pynq_kgrc.backends.board import lock, machine
from pynq_kgrc.cli import main
from pynq_kgrc.errors import DeviceError


def examine(capsys, *arguments):
    """Exit status, and the findings by name."""
    status = main(["doctor", "--json", *arguments])
    document = json.loads(capsys.readouterr().out)
    return status, document, {f["name"]: f for f in document["findings"]}


@pytest.fixture
def laptop(monkeypatch):
    """Hide a board that this computer may have."""
    monkeypatch.delenv("PYNQ_KGRC_SIMULATE")
    monkeypatch.delenv("XILINX_XRT", raising=False)
    monkeypatch.delenv("KGRC_OVERLAY", raising=False)


def test_a_laptop(laptop, capsys, monkeypatch, tmp_path):
    for name in ("IMAGE", "MANAGER", "FIRMWARE", "UIO"):
        monkeypatch.setattr(machine, name, tmp_path / name)
    monkeypatch.setattr(machine.os, "geteuid", lambda: 1000)
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\n")
    monkeypatch.setattr(machine, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setenv("KGRC_OVERLAY", str(tmp_path))
    status, document, found = examine(capsys)
    assert status == 0
    assert document["emulation"] is True and document["board"] is False
    lacking = [name for name, finding in found.items() if finding["works"] is False]
    assert {"image", "XRT", "root", "device", "memory", "firmware", "state", "overlay"} <= set(
        lacking
    )
    for name in lacking:
        assert found[name]["cure"], name
    assert "xrt_setup.sh" in found["XRT"]["cure"]
    assert "sudo -E" in found["root"]["cure"]
    assert "cma=512M" in found["memory"]["cure"]
    assert "no overlay of 8-sparse" in found["overlay"]["cure"]
    assert "runs are polled" in found["interrupts"]["found"]
    assert found["kernel"]["works"] is None and found["clocks"]["works"] is None
    # asked to open a board that is not there, it is no success
    status, document, found = examine(capsys, "--open")
    assert status == 1
    assert found["kernel"]["works"] is False


def test_a_board_as_far_as_files_go(laptop, capsys, monkeypatch, tmp_path):
    (tmp_path / "pynq_board").write_bytes(b"ZCU102\0")
    monkeypatch.setattr(machine, "IMAGE", tmp_path / "pynq_board")
    (tmp_path / "meminfo").write_text("CmaTotal: 524288 kB\nCmaFree: 262144 kB\n")
    monkeypatch.setattr(machine, "MEMORY", tmp_path / "meminfo")
    (tmp_path / "fpga0").mkdir()
    (tmp_path / "fpga0" / "state").write_text("operating\n")
    monkeypatch.setattr(machine, "MANAGER", tmp_path / "fpga0")
    monkeypatch.setattr(machine, "FIRMWARE", tmp_path)
    (tmp_path / "uio0").mkdir()
    (tmp_path / "uio0" / "name").write_text("fabric\n")
    monkeypatch.setattr(machine, "UIO", tmp_path)
    monkeypatch.setattr(machine.os, "geteuid", lambda: 0)
    monkeypatch.setenv("XILINX_XRT", "/usr")
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    clocks = SimpleNamespace(**{f"fclk{i}_mhz": 100.0 + i for i in range(4)})
    load = machine.import_module
    monkeypatch.setattr(
        machine,
        "import_module",
        lambda name: SimpleNamespace(Clocks=clocks) if name == "pynq" else load(name),
    )
    _, _, found = examine(capsys)
    assert found["image"]["found"] == "ZCU102"
    assert found["memory"]["found"] == "256 of 512 MiB contiguous memory are free"
    assert found["XRT"]["works"] and found["root"]["works"]
    assert found["interrupts"]["found"] == "UIO devices fabric"
    assert found["firmware"]["works"]
    assert found["clocks"]["found"] == (
        "now pl_clk0 100, pl_clk1 101, pl_clk2 102, pl_clk3 103 MHz"
    )
    if "pynq" in found and found["pynq"]["works"]:
        assert found["state"]["found"] == "logic operating; pynq's state file can be written"
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    _, _, found = examine(capsys)
    assert "xclbinutil" in found["XRT"]["found"]
    for name in ("firmware", "state"):
        assert "ReadWritePaths" in found[name]["cure"] or name == "state"
        assert found[name]["works"] is False


@pytest.mark.parametrize(
    ("version", "works"), [("3.0.1", True), ("3.1.2", False), ("4.0.0", False)]
)
def test_a_kria_has_no_node_of_the_image(laptop, capsys, monkeypatch, tmp_path, version, works):
    """Its pynq 3.0.1 looks for none; later ones then allocate nothing."""
    monkeypatch.setattr(machine, "IMAGE", tmp_path / "pynq_board")
    (tmp_path / "model").write_bytes(b"ZynqMP SMK-K26 Rev1/B/A\0")
    monkeypatch.setattr(machine, "MODEL", tmp_path / "model")
    monkeypatch.setattr(machine, "MANAGER", tmp_path)
    monkeypatch.setattr(machine.metadata, "version", lambda name: version)
    finding = examine(capsys)[2]["image"]
    assert finding["works"] is works
    if works:
        assert finding["found"].startswith("ZynqMP SMK-K26 Rev1/B/A, no ")


def test_every_pynq_needs_the_variable_of_xrt(laptop, capsys, monkeypatch):
    """pynq takes an empty one for none."""
    pytest.importorskip("pynq", reason="pynq is not installed: what it needs is not asked")
    code = "import pynq; print(sorted(c.__name__ for c in type(pynq.Device)._subclasses.values()))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", "this pynq finds a device without XILINX_XRT"
    monkeypatch.setenv("XILINX_XRT", "")
    assert examine(capsys)[2]["XRT"]["found"] == "XILINX_XRT is not set"


def test_numpy_2_breaks_pynq(capsys, monkeypatch):
    pytest.importorskip("pynq", reason="pynq is not installed: its numpy is not tested")
    monkeypatch.setattr(machine.np, "__version__", "2.1.0")
    finding = examine(capsys)[2]["pynq"]
    assert finding["works"] is False
    assert "numpy<2" in finding["cure"]


def test_the_simulated_board(capsys):
    pytest.importorskip("pynq", reason="pynq is not installed: the board backend is not tested")
    status, document, found = examine(capsys, "--open", "--design", "4-dense")
    assert status == 0
    assert document["board"], found
    assert found["kernel"]["found"].startswith("4-dense (digest ")
    assert "MHz, interrupt" in found["kernel"]["found"]


def test_an_overlay_that_is_damaged(capsys, tmp_path):
    simulated = pytest.importorskip(
        "pynq_kgrc.backends.board.simulated", reason="pynq is not installed"
    )
    simulated.write_overlay(tmp_path, preset("8-sparse"))
    assert examine(capsys, "--overlay", str(tmp_path))[2]["overlay"]["works"]
    (tmp_path / "kgrc.hwh").write_text("")
    finding = examine(capsys, "--overlay", str(tmp_path))[2]["overlay"]
    assert not finding["works"]
    assert "kgrc.hwh has SHA-256" in finding["cure"]


def test_a_design_that_explore_writes(capsys, tmp_path):
    """--design takes the JSON of `explore -o`: its overlay is looked for by its digest."""
    path = tmp_path / "best.json"
    config = replace(preset("8-zcu102"), name="best", pf=8, beat=4)
    write_design(config, path)
    status, _, found = examine(capsys, "--design", str(path), "--overlay", str(tmp_path))
    assert status == 0
    assert f"no overlay of best (8 bits, digest {config.digest})" in found["overlay"]["cure"]


def test_a_design_that_explore_writes_on_the_simulated_board(capsys, tmp_path):
    pytest.importorskip("pynq", reason="pynq is not installed: the board backend is not tested")
    write_design(replace(preset("8-zcu102"), name="best"), tmp_path / "best.json")
    _, document, found = examine(capsys, "--open", "--design", str(tmp_path / "best.json"))
    assert document["board"], found
    assert found["overlay"]["found"] == "not asked: simulated, best"
    assert found["overlay"]["works"] is None
    assert found["kernel"]["found"].startswith(f"best (digest {preset('8-zcu102').digest})")


def test_a_device_in_use(capsys):
    simulated = pytest.importorskip(
        "pynq_kgrc.backends.board.simulated", reason="pynq is not installed"
    )
    from pynq_kgrc.backends.board.lock import DeviceLock

    lock = DeviceLock(simulated.shared_device().tag)
    finding = examine(capsys)[2]["device"]
    lock.release()
    assert not finding["works"]
    assert "in use by process" in finding["cure"]


def test_without_pynq(laptop, capsys, monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "version", version)
    status, _, found = examine(capsys)
    assert status == 0
    assert "pip install '.[board]'" in found["pynq"]["cure"]


def test_a_broken_emulation_is_told_by_the_exit_status(capsys, monkeypatch):
    from pynq_kgrc.backends.emulation.backend import Emulation

    read = Emulation.read
    monkeypatch.setattr(Emulation, "read", lambda *arguments: read(*arguments) // 2)
    status, document, found = examine(capsys)
    assert status == 1
    assert not document["emulation"]
    assert "% off float" in found["emulation"]["found"]


def test_a_module_that_is_missing_is_no_crash(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    status, _, found = examine(capsys)
    assert status == 1
    assert not found["video"]["works"]


def test_the_table(capsys):
    pytest.importorskip("pynq", reason="pynq is not installed: the board backend is not tested")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "  ok  emulation" in text
    assert "  ??  kernel      not asked; --open" in text
    assert "the simulated board has all that was asked; --open runs something on it." in text
    assert main(["doctor", "--open"]) == 0
    text = capsys.readouterr().out
    assert "Programs run here, emulated bit for bit; the simulated board works." in text


def test_what_was_not_asked_is_neither_right_nor_wrong(capsys):
    pytest.importorskip("pynq", reason="pynq is not installed: the board backend is not tested")
    status, document, found = examine(capsys)
    assert status == 0
    assert document["board"] is None
    assert found["kernel"]["works"] is None and found["image"]["works"] is None


@pytest.mark.parametrize(
    ("fault", "wanted"),
    [("no memory", "not enough contiguous memory"), ("computes nothing", "reports 0x0 instead")],
)
def test_a_board_that_opens_but_does_nothing(capsys, monkeypatch, fault, wanted):
    """Its registers and its digest are right."""
    simulated = pytest.importorskip(
        "pynq_kgrc.backends.board.simulated", reason="pynq is not installed"
    )
    if fault == "no memory":

        def allocate(*_, **__):
            raise RuntimeError("BO allocation failed: Cannot allocate memory")

        monkeypatch.setattr(simulated.Memory, "allocate", allocate)
    else:
        run = simulated.Kernel._run
        monkeypatch.setattr(
            simulated.Kernel,
            "_run",
            lambda self, first, count: None if count else run(self, first, count),
        )
    status, document, found = examine(capsys, "--open")
    assert status == 1
    assert document["board"] is False
    assert wanted in found["kernel"]["found"]


def test_the_overlay_says_the_design(capsys, tmp_path):
    simulated = pytest.importorskip(
        "pynq_kgrc.backends.board.simulated", reason="pynq is not installed"
    )
    simulated.write_overlay(tmp_path / "four", preset("4-dense"))
    found = examine(capsys, "--overlay", str(tmp_path / "four"))[2]
    assert "4-dense at 150 MHz" in found["overlay"]["found"]
    simulated.write_overlay(tmp_path / "eight", preset("8-dense"))
    assert main(["doctor", "--overlay", str(tmp_path)]) == 2
    assert "overlays of 8-dense, 4-dense; choose one" in capsys.readouterr().err
    found = examine(capsys, "--overlay", str(tmp_path), "--design", "8-dense")[2]
    assert "8-dense at 150 MHz" in found["overlay"]["found"]


def test_an_unknown_design(capsys):
    assert main(["doctor", "--design", "2-sparse"]) == 2
    assert "no accelerator named '2-sparse'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, "cannot be read as a design"),
        ("{}", "missing required field `name`"),
        ('{"name": "best"', "truncated"),
    ],
)
def test_a_file_that_is_no_design(capsys, tmp_path, text, wanted):
    path = tmp_path / "best.json"
    if text is not None:
        path.write_text(text)
    assert main(["doctor", "--design", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pynq-kgrc: {path}: ")
    assert wanted in said


def test_a_bitstream_of_another_name_is_not_replaced_by_the_one_beside_it(laptop, capsys, tmp_path):
    """`kgrc.bit` beside it may be of another design."""
    (tmp_path / "mine.bit").write_bytes(b"bits")
    (tmp_path / "kgrc.bit").write_bytes(b"bits")
    _, _, found = examine(capsys, "--overlay", str(tmp_path / "mine.bit"))
    assert not found["overlay"]["works"]
    assert (
        f"{tmp_path / 'mine.bit'}: accepted is a bitstream named kgrc.bit"
        in (found["overlay"]["cure"])
    )


# ---- the lock on the device -----------------------------------------------------------------


@pytest.fixture
def lock_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "FOLDERS", (str(tmp_path),))
    return tmp_path


def test_a_lock_file_is_for_all_users(lock_folder):
    before = os.umask(0o022)
    try:
        held = lock.DeviceLock("card")
    finally:
        os.umask(before)
    path = lock.lock_path("card")
    assert path.stat().st_mode & 0o777 == 0o666
    assert path.read_text() == f"{os.getpid()}\n"
    held.release()
    assert not list(lock_folder.iterdir()), "a lock file is left"


@pytest.mark.parametrize("first", [0, 1])
def test_a_process_that_may_not_write_to_the_first_folder(tmp_path, monkeypatch, caplog, first):
    """A systemd unit may see /run/lock read-only: it and a notebook must not both drive a board."""
    folders = [tmp_path / "run", tmp_path / "tmp"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(lock, "FOLDERS", tuple(map(str, folders)))
    paths = [folder / "pynq_kgrc-card.lock" for folder in folders]
    monkeypatch.setattr(lock, "lock_path", lambda _: paths[first])
    held = lock.DeviceLock("card")
    monkeypatch.setattr(lock, "lock_path", lambda _: paths[1 - first])
    with pytest.raises(
        DeviceError, match=f"card is in use by process {os.getpid()}.*{paths[first]}"
    ):
        lock.DeviceLock("card")
    assert f"{paths[1]}: {folders[0]} cannot be written to" in caplog.text
    assert [path.exists() for path in paths] == [not first, bool(first)]
    held.release()
    lock.DeviceLock("card").release()
    assert not any(path.exists() for path in paths)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_lock_file_of_another_user(tmp_path_factory):
    """filelock#70, vllm#2179: it names the file and its owner."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "pynq_kgrc-card.lock"
        path.touch(0o644)
        path.chmod(0o644)
        code = (
            "import os, sys; os.setgid(65534); os.setuid(65534)\n"
            "lock.FOLDERS = sys.argv[1:]\n"
            "try: lock.DeviceLock('card')\n"
            "except DeviceError as error: print(error)\n"
        )
        imports = (
            "from pynq_kgrc.backends.board import lock; from pynq_kgrc.errors import DeviceError\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", imports + code, folder],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.stdout.startswith(f"card cannot be locked: {path} of user root: Permission denied")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Path.mkdir, "Is a directory"),
        (lambda path: path.symlink_to("/nowhere/at/all"), "symbolic links"),
        (lambda path: path.parent.rmdir(), "No such file or directory"),
    ],
)
def test_a_lock_file_that_cannot_be_opened(tmp_path, monkeypatch, make, text):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(lock, "lock_path", lambda _: tmp_path / "temporary" / "card.lock")
    make(lock.lock_path("card"))
    with pytest.raises(DeviceError, match=f"card cannot be locked: .*{text}"):
        lock.DeviceLock("card")


@pytest.mark.parametrize("name", ["flock", "ftruncate"])
def test_a_file_system_without_locks_or_space(lock_folder, monkeypatch, name):
    def fail(*_):
        raise OSError(errno.ENOLCK if name == "flock" else errno.ENOSPC, "it fails")

    monkeypatch.setattr(lock.fcntl if name == "flock" else lock.os, name, fail)
    if name == "ftruncate":  # the process id is for messages only
        lock.DeviceLock("card").release()
        return
    with pytest.raises(DeviceError, match=r"card cannot be locked: .*: it fails"):
        lock.DeviceLock("card")


def test_the_holder_of_a_lock_is_a_number_or_unknown(lock_folder):
    held = lock.DeviceLock("card")
    with pytest.raises(DeviceError, match=rf"in use by process {os.getpid()} \(this one"):
        lock.DeviceLock("card")
    lock.lock_path("card").write_bytes(b"\x1b[31m\xff")
    with pytest.raises(DeviceError, match="in use by process unknown;"):
        lock.DeviceLock("card")
    held.release()
