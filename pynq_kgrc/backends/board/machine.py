"""What a board needs of the machine that it is: one check each, with its cure.

The commands doctor and selftest both run these checks. Nothing here imports pynq before a check
needs it: doctor runs on machines without it. Nothing is programmed, and no memory is allocated.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.header import VLNV
from pynq_kgrc.backends.board import SIMULATE, simulation_requested
from pynq_kgrc.backends.board.overlays import find_overlay
from pynq_kgrc.errors import KgrcError, to_install

IMAGE = Path("/proc/device-tree/chosen/pynq_board")

MODEL = Path("/proc/device-tree/model")

MEMORY = Path("/proc/meminfo")

FIRMWARE = Path("/lib/firmware")
"""pynq writes a bitstream here, from where Linux loads it into the logic."""

MANAGER = Path("/sys/class/fpga_manager/fpga0")
"""Linux' driver that programs the logic."""

UIO = Path("/sys/class/uio")

CLOCKS = 4
"""Clocks of the processing system for the logic: pl_clk0 to pl_clk3."""


@dataclass(frozen=True)
class Asked:
    """What a check is about."""

    config: AcceleratorConfig
    overlay: Path | None
    """Where its overlay is looked for (`find_overlay`)."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    needed_by: str
    name: str
    works: bool | None
    """None if it was not asked: then nothing is known."""
    found: str
    cure: str = ""
    """What to do where it does not work."""


Check = Callable[[Asked], str]
"""Returns what it found. Raises MissingError, NotAskedError, or any other exception."""


class MissingError(KgrcError):
    """MissingError(found, cure): something that this machine lacks."""


class NotAskedError(KgrcError):
    """NotAskedError(why): the check does not apply here, or was not requested."""


def run_checks(needed_by: str, checks: Mapping[str, Check], asked: Asked) -> Iterator[Finding]:
    """The finding of each check; a check that crashes is a finding too."""
    for name, check in checks.items():
        try:
            yield Finding(needed_by, name, True, check(asked))
        except NotAskedError as error:
            yield Finding(needed_by, name, None, str(error))
        except MissingError as error:
            found, cure = error.args
            yield Finding(needed_by, name, False, found, cure)
        except KgrcError as error:
            yield Finding(needed_by, name, False, "refused", str(error))
        except Exception as error:
            yield Finding(needed_by, name, False, f"{type(error).__name__}: {error}")


def is_board() -> bool:
    """Whether this machine is a board, or simulates one: it has a PYNQ image or an FPGA manager."""
    return simulation_requested() or IMAGE.exists() or MANAGER.exists()


def _not_if_simulated() -> None:
    if simulation_requested():
        raise NotAskedError("not asked: simulated")


def check_pynq(_: Asked) -> str:
    try:
        version = metadata.version("pynq")
    except metadata.PackageNotFoundError:
        raise MissingError(
            "not installed",
            f"on a PYNQ image use the image's Python; elsewhere {to_install('board')}",
        ) from None
    if int(np.__version__.split(".")[0]) > 1:
        raise MissingError(
            f"{version} with numpy {np.__version__}, which it cannot allocate memory with",
            "pip install 'numpy<2', and what else pip then names",
        )
    import_module("pynq_kgrc.backends.board.backend")
    return f"{version}; the driver is for {VLNV}"


def check_image(_: Asked) -> str:
    """The name that the image has for the board; without it pynq from 3.1 on allocates nothing."""
    _not_if_simulated()
    if IMAGE.exists():
        return _device_tree(IMAGE)
    version = _pynq_version()
    if MANAGER.exists() and version is not None and version < (3, 1):
        model = _device_tree(MODEL) if MODEL.exists() else "a board"
        return f"{model}, no {IMAGE}, which pynq before 3.1 does not need"
    raise MissingError(
        f"no {IMAGE}",
        f"run on a PYNQ image, or add that node to the device tree; without a board {SIMULATE}=1 "
        f"simulates one",
    )


def _device_tree(path: Path) -> str:
    return path.read_bytes().rstrip(b"\0").decode("ascii", "replace")


def _pynq_version() -> tuple[int, int] | None:
    """Major and minor version of pynq; None if it is not installed or of no plain version."""
    try:
        found = re.match(r"(\d+)\.(\d+)", metadata.version("pynq"))
    except metadata.PackageNotFoundError:
        return None
    return None if found is None else (int(found[1]), int(found[2]))


def check_xrt(_: Asked) -> str:
    """No pynq, 3.0.1 to 4.0.0, looks for a device unless XILINX_XRT is set (`pynq.pl_server`)."""
    _not_if_simulated()
    if not os.environ.get("XILINX_XRT"):
        raise MissingError(
            "XILINX_XRT is not set",
            "source /etc/profile.d/xrt_setup.sh, and keep it with sudo -E",
        )
    if shutil.which("xclbinutil") is None:
        raise MissingError("no xclbinutil", "add the directory bin of XRT to PATH")
    return os.environ["XILINX_XRT"]


def check_root(_: Asked) -> str:
    _not_if_simulated()
    if os.geteuid():
        raise MissingError(
            f"user {os.geteuid()}", "only root may access the registers: use sudo -E"
        )
    return "root"


def check_interrupts(_: Asked) -> str:
    """Without a UIO device the driver polls, so that this is never missing."""
    _not_if_simulated()
    names = sorted(path.read_text().strip() for path in UIO.glob("uio*/name"))
    if not names:
        return "no UIO device: runs are polled, which works as well"
    return f"UIO devices {', '.join(names)}"


def check_firmware(_: Asked) -> str:
    _not_if_simulated()
    if not os.access(FIRMWARE, os.W_OK):
        raise MissingError(
            f"{FIRMWARE} cannot be written",
            "pynq puts the bitstream there: make it, be root, or name it in the ReadWritePaths of "
            "the systemd unit",
        )
    return f"{FIRMWARE} can be written"


def check_state(_: Asked) -> str:
    _not_if_simulated()
    if not MANAGER.exists():
        raise MissingError(
            f"no {MANAGER}", "use a kernel with an FPGA manager: a PYNQ image has it"
        )
    state = (MANAGER / "state").read_text().strip()
    spec = find_spec("pynq")
    if spec is None or not spec.submodule_search_locations:
        raise MissingError("pynq is not installed", "use the Python of the PYNQ image")
    folder = Path(next(iter(spec.submodule_search_locations))) / "pl_server"
    files = [folder, *folder.glob("global_pl_state_*.json"), *folder.glob("_current_metadata.pkl")]
    for path in files:
        if not os.access(path, os.W_OK):
            raise MissingError(
                f"{path} cannot be written",
                "pynq keeps there what is loaded: be root, or name it in the ReadWritePaths of the "
                "systemd unit",
            )
    return f"logic {state}; pynq's state file can be written"


def check_device(_: Asked) -> str:
    device = import_module("pynq_kgrc.backends.board.device").find_device()
    lock = import_module("pynq_kgrc.backends.board.lock")
    lock.DeviceLock(str(device.tag)).release()
    return f"{device.name}, not in use"


def check_memory(_: Asked) -> str:
    _not_if_simulated()
    lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines() if ":" in line)
    total, free = (int(lines.get(n, "0").split()[0]) >> 10 for n in ("CmaTotal", "CmaFree"))
    if not total:
        raise MissingError("no contiguous memory (CMA)", "boot with the kernel argument cma=512M")
    return f"{free} of {total} MiB contiguous memory are free"


def check_clocks(_: Asked) -> str:
    _not_if_simulated()
    if os.geteuid() or not is_board():
        raise NotAskedError("not asked: only root may read them, on a board")
    clocks = import_module("pynq").Clocks
    found = (float(getattr(clocks, f"fclk{number}_mhz")) for number in range(CLOCKS))
    return "now " + ", ".join(f"pl_clk{i} {mhz:.6g}" for i, mhz in enumerate(found)) + " MHz"


def check_overlay(asked: Asked) -> str:
    name = asked.config.name
    if simulation_requested() and asked.overlay is None:
        raise NotAskedError(f"not asked: simulated, {name}")
    found = find_overlay(asked.config, asked.overlay)
    manifest = found.manifest
    return f"{found.bit}: {name} at {manifest.clock_mhz:g} MHz, by {manifest.tool}"


CHECKS: dict[str, Check] = {
    "pynq": check_pynq,
    "image": check_image,
    "XRT": check_xrt,
    "root": check_root,
    "device": check_device,
    "memory": check_memory,
    "interrupts": check_interrupts,
    "firmware": check_firmware,
    "state": check_state,
    "clocks": check_clocks,
    "overlay": check_overlay,
}
"""All that can be checked before the device is opened."""
