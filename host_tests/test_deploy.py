"""The systemd unit opens a board: its paths and variables in a mount namespace, pynq's own code.

The board is made of Python (`fake_xrt`). The paths that the unit opens for writing are opened at
their counterparts in the folder of that board; all else in it is read-only, as ProtectSystem=strict
makes it on a board.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("pynq", reason="pynq is not installed: the unit's board is not tested")

import fake_xrt
from networks import Net, compiled

UNIT = ROOT / "deploy" / "pynq-kgrc.service"

VENV = "/usr/local/share/pynq-venv"
"""Where the images and Kria-PYNQ have pynq."""

STATE = "/var/lib/pynq_kgrc"

OPENED = """
import os, sys
import fake_xrt
board = fake_xrt.install()
from pathlib import Path
from networks import Net, compiled
from test_board_xrt import check_answers
from pynq_kgrc.backends.board.backend import BoardBackend
from pynq_kgrc.backends.board import lock
from pynq_kgrc.errors import KgrcError
lock.FOLDERS = (f"{fake_xrt.folder()}/run/lock", f"{fake_xrt.folder()}/tmp")
net = Net(size=(3, 6, 7))
net.dense(net.pool(net.conv(net.conv("clip", 6), 9)), 5)
program = compiled(net)[0]
try:
    with BoardBackend(program.config, Path(os.environ["KGRC_OVERLAY"])) as board:
        check_answers(board, program)
        print("right", lock.lock_path("embedded_xrt0"))
except KgrcError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def settings(unit):
    """The settings of a unit's [Service]: name to values, in their order."""
    found = {}
    for line in unit.split("[Service]")[1].split("[Install]")[0].splitlines():
        if line.strip() and not line.startswith("#"):
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value)
    return found


def counterparts(board):
    """Paths of a board and where `fake_xrt` has them."""
    return {
        "/lib/firmware": board / "lib" / "firmware",
        f"{VENV}/lib/python3.10/site-packages/pynq/pl_server": board / "state",
        f"{VENV}/bin": board / "bin",
        STATE: board / "service",
        "/run/lock": board / "run" / "lock",
    }


def run_as_unit(unit, board):
    """Open the board and run a program as the unit's process would; the finished process."""
    service, places = settings(unit), counterparts(board)
    writable = [path.lstrip("-") for paths in service["ReadWritePaths"] for path in paths.split()]
    writable += [f"/var/lib/{name}" for name in service.get("StateDirectory", [])]
    opened = [places.get(path, Path(path)) for path in writable]
    variables = dict(line.split("=", 1) for line in service.get("Environment", []))
    path = variables.get("PATH", "/usr/local/bin:/usr/bin:/bin").split(":")
    variables["PATH"] = ":".join(str(places.get(each, each)) for each in path)
    if variables.get("XILINX_XRT"):
        variables["XILINX_XRT"] = str(board)
    variables |= {
        "KGRC_OVERLAY": str(board / "overlay"),
        fake_xrt.FOLDER: str(board),
        "PYTHONPATH": os.pathsep.join((str(ROOT / "host_tests"), str(ROOT))),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    (folder,) = service.get("WorkingDirectory", ["/"])
    python = (sys.executable, "-W", "ignore", "-c", OPENED)
    # the folder of the board may lie in one of the others, so it and its folders come last
    mounts = [path for path in sorted(opened) if path.is_dir() and board not in path.parents]
    mounts += [board, board / "sys", *(path for path in opened if board in path.parents)]
    script = [
        "mount --bind / /",  # a mount of our own, in our own namespace
        *(shlex.join(["mount", "--bind", str(path), str(path)]) for path in mounts),
        "mount -o remount,bind,ro /",
        shlex.join(["mount", "-o", "remount,bind,ro", str(board)]),
        f"cd {shlex.quote(str(places.get(folder, Path(folder))))}",
        shlex.join(["exec", "env", "-i", *(f"{k}={v}" for k, v in variables.items()), *python]),
    ]
    return subprocess.run(
        ["unshare", "--mount", "bash", "-ec", "\n".join(script)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def may_mount():
    """Whether this process may make a mount namespace and mount in it."""
    if shutil.which("unshare") is None:
        return False
    made = ["unshare", "--mount", "mount", "--bind", "/", "/"]
    return subprocess.run(made, capture_output=True, timeout=60).returncode == 0


@pytest.fixture
def board(tmp_path, monkeypatch):
    """The folder of a board with an overlay. Its logic is empty."""
    if not may_mount():
        pytest.skip("no right to mount: the unit's paths are not tested")
    folder = tmp_path / "board"
    with monkeypatch.context() as environment:
        environment.setenv(fake_xrt.FOLDER, str(folder))
        fake_xrt.make_files()
    for place in counterparts(folder).values():
        place.mkdir(parents=True, exist_ok=True)
    net = Net(size=(3, 6, 7))
    net.dense(net.pool(net.conv(net.conv("clip", 6), 9)), 5)
    fake_xrt.write_overlay(folder / "overlay", compiled(net)[0].config)
    return folder


def test_the_unit_opens_a_board(board):
    done = run_as_unit(UNIT.read_text("utf-8"), board)
    assert done.returncode == 0, done.stdout + done.stderr
    # the lock of a notebook on the same board, which runs outside the unit
    lock = counterparts(board)["/run/lock"] / "pynq_kgrc-embedded_xrt0.lock"
    assert done.stdout.split() == ["right", str(lock)]


NEEDED = {
    "XRT": ("Environment=XILINX_XRT=/usr\n", "XILINX_XRT is not set|no attribute 'xclOpen'"),
    "xclbinutil": (f"Environment=PATH={VENV}/bin:", "xclbinutil|xbutil"),
    "firmware": ("ReadWritePaths=-/lib/firmware -/usr/lib/firmware\n", "Read-only file system"),
    "state of pynq": (
        f"ReadWritePaths=-{VENV}/lib/python3.10/site-packages/pynq/pl_server\n",
        "Read-only file system",
    ),
    "working directory": (f"WorkingDirectory={STATE}\n", "Read-only file system"),
}
"""Lines of the unit without which no board opens, and what the error says then."""


@pytest.mark.slow
@pytest.mark.parametrize("lacking", NEEDED)
def test_the_unit_has_nothing_to_spare(board, lacking):
    version = metadata.version("pynq")
    if lacking == "working directory" and version < "3.1":
        pytest.skip(f"pynq {version} does not need it")
    line, error = NEEDED[lacking]
    unit = UNIT.read_text("utf-8")
    assert line in unit
    without = unit.replace(line, "Environment=PATH=" if lacking == "xclbinutil" else "")
    done = run_as_unit(without, board)
    assert done.returncode != 0
    assert re.search(error, done.stderr), done.stderr


CONFINED = """
import os
from pynq_kgrc.service.confine import confine
confine()
status = dict(line.split(":\\t", 1) for line in open(3).read().splitlines())
print(status["Uid"].split()[1], status["Gid"].split()[1], int(status["CapEff"], 16))
"""


def test_a_decoder_child_of_the_unit_is_not_root():
    """With the unit's capabilities a root process may become nobody, as a decoder child does."""
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv: the unit's capabilities are not tested")
    (bounds,) = settings(UNIT.read_text("utf-8"))["CapabilityBoundingSet"]
    wanted = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in bounds.split())
    # confined, it can open no file: its own status is opened before
    opened = f"exec 3</proc/$$/status; exec {shlex.join([sys.executable, '-c', CONFINED])}"
    done = subprocess.run(
        ["setpriv", f"--bounding-set=-all,{wanted}", "--no-new-privs", "bash", "-c", opened],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    user, group, capabilities = map(int, done.stdout.split())
    assert user and group and not capabilities


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze: not verified")
def test_systemd_accepts_the_unit(tmp_path):
    text = UNIT.read_text("utf-8").replace("/opt/pynq_kgrc/.venv/bin/pynq-kgrc", "/bin/true")
    unit = tmp_path / UNIT.name
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
