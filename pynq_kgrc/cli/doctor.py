"""The command doctor: checks whether this machine can run programs, emulated and on a board."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path

from pynq_kgrc.accelerator.header import VLNV
from pynq_kgrc.backends.board import simulation_requested
from pynq_kgrc.cli.arguments import Declare, add_design
from pynq_kgrc.errors import KgrcError

EMULATION, BOARD = "emulation", "board"

PYNQ_IMAGE = Path("/proc/device-tree/chosen/pynq_board")

MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    needed_by: str
    """EMULATION or BOARD."""
    name: str
    works: bool
    found: str
    cure: str = ""
    """What to do where it does not work."""


def declare(command: Declare) -> None:
    """Add this file's command."""
    doctor = command(
        "doctor",
        run_doctor,
        "check what this machine can run, and say what is missing",
        "Checks the emulation, which needs no board, and everything that a board needs.\n"
        "Exit status 0 if the emulation works, 1 if it does not.",
    )
    add_design(doctor, "the accelerator whose overlay is checked")
    doctor.add_argument(
        "--overlay",
        type=Path,
        help="a bitstream, its folder, or a folder of such folders (default: KGRC_OVERLAY, else "
        "the overlays that are installed)",
    )
    doctor.add_argument(
        "--open",
        action="store_true",
        help="program the device and read the digest of its kernel; stops whatever runs on it",
    )


def run_doctor(options: argparse.Namespace) -> int:
    from pynq_kgrc.accelerator.config import read_design

    # Read before the checks: a wrong --design is a wrong argument, not a finding.
    options.config = read_design(options.design)
    findings = [
        *_run_checks(EMULATION, EMULATION_CHECKS, options),
        *_run_checks(BOARD, BOARD_CHECKS, options),
    ]
    works = {
        part: all(f.works for f in findings if f.needed_by == part) for part in (EMULATION, BOARD)
    }
    if options.json:
        print(json.dumps({**works, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        _print(findings, works)
    return 0 if works[EMULATION] else 1


Check = Callable[[argparse.Namespace], str]
"""Returns what it found. Raises MissingError with the cure, or any other exception."""


class MissingError(KgrcError):
    """MissingError(found, cure): something that this machine lacks."""


def _run_checks(
    needed_by: str, checks: dict[str, Check], options: argparse.Namespace
) -> Iterator[Finding]:
    for name, check in checks.items():
        try:
            yield Finding(needed_by, name, True, check(options))
        except MissingError as error:
            found, cure = error.args
            yield Finding(needed_by, name, False, found, cure)
        except KgrcError as error:
            yield Finding(needed_by, name, False, "refused", str(error))
        except Exception as error:  # a check that crashes is a finding too
            yield Finding(needed_by, name, False, f"{type(error).__name__}: {error}")


def _print(findings: list[Finding], works: dict[str, bool]) -> None:
    wide = max(len(f.name) for f in findings)
    for part in (EMULATION, BOARD):
        print(f"{part}:")
        for finding in (f for f in findings if f.needed_by == part):
            mark = "ok" if finding.works else "--"
            print(f"  {mark}  {finding.name:{wide}}  {finding.found}")
            if finding.cure:
                print(f"      {'':{wide}}  -> {finding.cure}")
    missing = [f.name for f in findings if f.needed_by == BOARD and not f.works]
    here = "run here, emulated bit for bit" if works[EMULATION] else "do not run here"
    kind = "the simulated board" if simulation_requested() else "a board"
    lacks = f"{kind} lacks {', '.join(missing)}" if missing else f"{kind} is ready"
    print(f"\nPrograms {here}; {lacks}.")


# ---- emulation ------------------------------------------------------------------------------


def _python(_: argparse.Namespace) -> str:
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        raise MissingError(platform.python_version(), "use Python 3.10, 3.11 or 3.12")
    return f"{platform.python_version()} on {platform.machine()}"


def _numpy(_: argparse.Namespace) -> str:
    import numpy as np

    return np.__version__


def _video(_: argparse.Namespace) -> str:
    import cv2

    return f"OpenCV {cv2.__version__}"


def _emulation(_: argparse.Namespace) -> str:
    """Compile and run a small network; its error against float must be 5 % at most."""
    import numpy as np

    from pynq_kgrc.accelerator.config import preset
    from pynq_kgrc.backends.emulation.backend import Emulation
    from pynq_kgrc.compiler.lower import lower
    from pynq_kgrc.compress.calibrate import choose_quant
    from pynq_kgrc.graph import CONV, INPUT, ClipSpec, ConvShape, Graph, Layer, run_float

    rng = np.random.default_rng(0)
    ones = (1, 1, 1)
    shape = ConvShape(3, (2, 8, 8), (3, 3, 3), ones, ones, ones, filters=8)
    weight = rng.normal(0, 0.1, (8, 3, 3, 3, 3)).astype(np.float32)
    layers = (
        Layer("clip", INPUT, (), 3, shape.in_size),
        Layer("conv", CONV, ("clip",), 8, shape.out_size, shape, weight, np.zeros(8), "none"),
    )
    clip = rng.uniform(-1, 1, (3, 2, 8, 8)).astype(np.float32)
    graph = choose_quant(Graph("doctor", layers, "conv", ClipSpec(2, 8, 8, 8)), [clip], 8)
    program = lower(graph, preset("8-sparse"), fold=False)
    emulation = Emulation(program.config)
    try:
        emulation.load(program)
        emulation.write(program.source, program.input.quantize(clip))
        emulation.run()
        found = program.output.dequantize(emulation.read(program.target, 8, shape.out_size))
    finally:
        emulation.close()
    wanted = run_float(graph, clip)
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if error > 0.05:
        raise MissingError(
            f"a small network is {error:.0%} off float", "report it, with numpy.show_config()"
        )
    return f"a small network was compiled and run, within {error:.1%} of float"


EMULATION_CHECKS: dict[str, Check] = {
    "Python": _python,
    "numpy": _numpy,
    "video": _video,
    "emulation": _emulation,
}


# ---- board ----------------------------------------------------------------------------------


def _pynq(_: argparse.Namespace) -> str:
    try:
        version = metadata.version("pynq")
    except metadata.PackageNotFoundError:
        raise MissingError(
            "not installed",
            "on a PYNQ image use the image's Python; else pip install pynq_kgrc[board]",
        ) from None
    import numpy as np

    if int(np.__version__.split(".")[0]) > 1:
        raise MissingError(f"{version} with numpy {np.__version__}", "pip install 'numpy<2'")
    import_module("pynq_kgrc.backends.board.backend")
    return f"{version}; the driver is for {VLNV}"


def _image(_: argparse.Namespace) -> str:
    if simulation_requested():
        return "simulated"
    if not PYNQ_IMAGE.exists():
        raise MissingError(
            f"no {PYNQ_IMAGE}",
            "run on a PYNQ image; without a board PYNQ_KGRC_SIMULATE=1 simulates one",
        )
    return PYNQ_IMAGE.read_bytes().rstrip(b"\0").decode("ascii", "replace")


def _xrt(_: argparse.Namespace) -> str:
    if simulation_requested():
        return "simulated"
    if "XILINX_XRT" not in os.environ:
        raise MissingError(
            "XILINX_XRT is not set",
            "source /etc/profile.d/xrt_setup.sh, and keep it with sudo -E",
        )
    if shutil.which("xclbinutil") is None:
        raise MissingError("no xclbinutil", "add the directory bin of XRT to PATH")
    return os.environ["XILINX_XRT"]


def _root(_: argparse.Namespace) -> str:
    if simulation_requested():
        return "not needed"
    if os.geteuid():
        raise MissingError(
            f"user {os.geteuid()}", "only root may access the registers: use sudo -E"
        )
    return "root"


def _device(_: argparse.Namespace) -> str:
    from pynq_kgrc.backends.board.device import find_device
    from pynq_kgrc.backends.board.lock import DeviceLock

    device = find_device()
    DeviceLock(str(device.tag)).release()
    return f"{device.name}, not in use"


def _memory(_: argparse.Namespace) -> str:
    if simulation_requested():
        return "simulated"
    lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines() if ":" in line)
    total, free = (int(lines.get(n, "0").split()[0]) >> 10 for n in ("CmaTotal", "CmaFree"))
    if not total:
        raise MissingError("no contiguous memory (CMA)", "boot with the kernel argument cma=512M")
    return f"{free} of {total} MiB contiguous memory are free"


def _overlay(options: argparse.Namespace) -> str:
    name = options.config.name
    if simulation_requested() and options.overlay is None:
        return f"simulated, {name}"
    from pynq_kgrc.backends.board.overlays import find_overlay

    found = find_overlay(options.config, options.overlay)
    manifest = found.manifest
    return f"{found.bit}: {name} at {manifest.clock_mhz:g} MHz, by {manifest.tool}"


def _kernel(options: argparse.Namespace) -> str:
    if not options.open:
        return "not checked; --open programs the device and checks it"
    from pynq_kgrc.backends.board.backend import BoardBackend

    with BoardBackend(options.config, options.overlay) as board:
        return board.describe()


BOARD_CHECKS: dict[str, Check] = {
    "pynq": _pynq,
    "image": _image,
    "XRT": _xrt,
    "root": _root,
    "device": _device,
    "memory": _memory,
    "overlay": _overlay,
    "kernel": _kernel,
}
