"""The command doctor: checks whether this machine can run programs, emulated and on a board."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from pynq_kgrc.accelerator.config import DEFAULT_DESIGN, AcceleratorConfig, preset, read_design
from pynq_kgrc.backends.board import simulation_requested
from pynq_kgrc.backends.board.machine import (
    CHECKS,
    Asked,
    Check,
    Finding,
    MissingError,
    NotAskedError,
    run_checks,
)
from pynq_kgrc.backends.board.overlays import OVERLAY, list_overlays
from pynq_kgrc.cli.arguments import Declare, add_design
from pynq_kgrc.errors import ConfigError, DeviceError
from pynq_kgrc.files import find_folder

EMULATION, BOARD = "emulation", "board"


def declare(command: Declare) -> None:
    """Add this file's command."""
    doctor = command(
        "doctor",
        run_doctor,
        "check what this machine can run, and say what is missing",
        "Checks the emulation, which needs no board, and everything that a board needs.\n"
        "Marks: ok, -- for what is missing, ?? for what was not asked.\n"
        "Exit status 0 if the emulation works, 1 if it does not; with --open 0 only if the board\n"
        "works too. `pynq-kgrc selftest` checks a board thoroughly.",
    )
    add_board(doctor, "the accelerator whose overlay is checked")
    doctor.add_argument(
        "--open",
        action="store_true",
        help="program the device, allocate memory and run a small network whose answer is known; "
        "stops whatever runs on it",
    )


def add_board(command: argparse.ArgumentParser, purpose: str) -> None:
    """Add `--design` and `--overlay`; `board_design(options)` reads them."""
    add_design(command, purpose, default=None)
    command.add_argument(
        "--overlay",
        type=Path,
        help="a bitstream, its folder, or a folder of such folders (default: KGRC_OVERLAY, else "
        "the overlays that are installed)",
    )


def board_design(design: str | None, overlay: Path | None) -> AcceleratorConfig:
    """The design that is asked for: by name or file, else that of the one overlay there is.

    Raises:
        ConfigError: there is no such design, or there are overlays of several.
    """
    if design is not None:
        return read_design(design)
    place, named = overlay, os.environ.get(OVERLAY)
    if place is None and not simulation_requested():
        place = Path(named) if named else find_folder("overlays")
    try:
        there = [] if place is None else list_overlays(place)
    except DeviceError:  # the check of the overlay says what is wrong with it
        there = []
    built = [found.manifest.config for found in there if found.manifest.built]
    configs = {config.digest: config for config in built}
    if len(configs) == 1:
        return next(iter(configs.values()))
    default = preset(DEFAULT_DESIGN)
    if not configs or (overlay is None and default.digest in configs):
        return default
    names = ", ".join(config.name for config in configs.values())
    raise ConfigError(f"{place}: overlays of {names}; choose one with --design")


def run_doctor(options: argparse.Namespace) -> int:
    # Read before the checks: a wrong --design is a wrong argument, not a finding.
    asked = Asked(board_design(options.design, options.overlay), options.overlay)
    checks = {**CHECKS, "kernel": _kernel if options.open else _kernel_not_asked}
    findings = [
        *run_checks(EMULATION, EMULATION_CHECKS, asked),
        *run_checks(BOARD, checks, asked),
    ]
    works = {part: _works(findings, part) for part in (EMULATION, BOARD)}
    if options.json:
        print(json.dumps({**works, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        _print(findings, works)
    wanted = (EMULATION, BOARD) if options.open else (EMULATION,)
    return 0 if all(works[part] for part in wanted) else 1


def _works(findings: list[Finding], part: str) -> bool | None:
    """Whether a part works. None of a board that was not opened, if nothing is missing."""
    found = [f for f in findings if f.needed_by == part]
    if any(f.works is False for f in found):
        return False
    return found[-1].works  # the last check runs something


def _print(findings: list[Finding], works: dict[str, bool | None]) -> None:
    wide = max(len(f.name) for f in findings)
    marks = {True: "ok", False: "--", None: "??"}
    for part in (EMULATION, BOARD):
        print(f"{part}:")
        for finding in (f for f in findings if f.needed_by == part):
            print(f"  {marks[finding.works]}  {finding.name:{wide}}  {finding.found}")
            if finding.cure:
                print(f"      {'':{wide}}  -> {finding.cure}")
    missing = [f.name for f in findings if f.needed_by == BOARD and f.works is False]
    here = "run here, emulated bit for bit" if works[EMULATION] else "do not run here"
    kind = "the simulated board" if simulation_requested() else "a board"
    if missing:
        text = f"{kind} lacks {', '.join(missing)}"
    elif works[BOARD]:
        text = f"{kind} works"
    else:
        text = f"{kind} has all that was asked; --open runs something on it"
    print(f"\nPrograms {here}; {text}.")


# ---- emulation ------------------------------------------------------------------------------


def _python(_: Asked) -> str:
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        raise MissingError(platform.python_version(), "use Python 3.10, 3.11 or 3.12")
    return f"{platform.python_version()} on {platform.machine()}"


def _numpy(_: Asked) -> str:
    import numpy as np

    return np.__version__


def _video(_: Asked) -> str:
    import cv2

    return f"OpenCV {cv2.__version__}"


def _emulation(_: Asked) -> str:
    """Compile and run a small network; its error against float must be 5 % at most."""
    import numpy as np

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


def _native(_: Asked) -> str:
    """Nothing needs it: without it programs run slower, in numpy."""
    from pynq_kgrc.backends.native.library import built_library, choose_instructions, has_compiler

    if built_library() is None:
        way = "--backend native builds them" if has_compiler() else "that takes a C compiler (gcc)"
        raise NotAskedError(f"its kernels in C are not built: {way}; the emulation needs none")
    return f"kernels in C, {choose_instructions()[0]} instructions"


EMULATION_CHECKS: dict[str, Check] = {
    "Python": _python,
    "numpy": _numpy,
    "video": _video,
    "native": _native,
    "emulation": _emulation,
}


# ---- board ----------------------------------------------------------------------------------


def _kernel_not_asked(_: Asked) -> str:
    raise NotAskedError("not asked; --open programs the device and runs a small network")


def _kernel(asked: Asked) -> str:
    from pynq_kgrc.analysis.selftest import quick_test

    return quick_test(asked.config, asked.overlay)
