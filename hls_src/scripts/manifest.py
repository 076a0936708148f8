"""Copy a bitstream to its overlay, with the manifest and the report that describe it.

The Makefile runs this. It refuses a build with a loop of a larger II than the sources ask
for, or with a clock that is not met.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import msgspec

from pynq_kgrc.accelerator import reports
from pynq_kgrc.accelerator.boards import board
from pynq_kgrc.accelerator.config import read_design
from pynq_kgrc.accelerator.header import (
    IMAGE_VERSION,
    MANAGER,
    REGISTERS,
    VLNV,
    memory_ports,
)
from pynq_kgrc.accelerator.resources import estimate_resources, uram_parts
from pynq_kgrc.backends.board.overlays import BIT, HWH, MANIFEST, REPORT, Manifest
from pynq_kgrc.errors import DeviceError, KgrcError

SOURCES = Path(__file__).resolve().parents[1]


def check_handoff(path: Path) -> None:
    """Check that a .hwh has all that the driver uses.

    That is the kernel with every register, and a shutdown manager for each memory port.

    Raises:
        DeviceError: one of them is missing; the message names it.
    """
    try:
        modules = list(ElementTree.parse(path).iter("MODULE"))
    except ElementTree.ParseError as error:
        raise DeviceError(f"{path}: no .hwh, {error}") from error
    kernel = next((module for module in modules if module.get("VLNV") == VLNV), None)
    if kernel is None:
        raise DeviceError(f"{path}: no {VLNV}; was the kernel exported by hls.tcl?")
    found = {register.get("NAME") for register in kernel.iter("REGISTER")}
    missing = [name for name in REGISTERS if name not in found]
    if missing:
        raise DeviceError(f"{path}: no register {', '.join(missing)} of {VLNV}")
    managers = Counter(module.get("VLNV") for module in modules)[MANAGER]
    if managers != len(memory_ports()):
        raise DeviceError(
            f"{path}: {managers} of {MANAGER}, one for each of {', '.join(memory_ports())} is "
            f"needed; was the block design made by overlay.tcl?"
        )


def write_file(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--design", required=True, help="a name, or the JSON file of a design")
    parser.add_argument("--board", required=True, help="the board that it was built for")
    parser.add_argument("--clock", type=float, required=True, help="MHz of the kernel")
    parser.add_argument("--port-clock", type=float, required=True, help="MHz of the memory ports")
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    config, target = read_design(chosen.design), board(chosen.board)
    check_handoff(chosen.build / HWH)
    folder = chosen.build / "reports"
    synthesis = reports.read_synthesis(folder / reports.SYNTHESIS)
    timing = reports.read_timing(folder / reports.TIMING)
    asked = reports.read_asked(SOURCES, chosen.build / "config.h")
    loops = reports.pipelined_loops(synthesis, asked)
    reports.check_build(loops, timing)
    files = {name: (chosen.build / name).read_bytes() for name in (BIT, HWH)}
    vivado = (chosen.build / "vivado.version").read_text().strip()
    manifest = Manifest(
        config=config,
        digest=config.digest,
        clock_mhz=chosen.clock,
        sha256={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        tool=f"Vitis HLS {synthesis.version}, {vivado}",
        board=target.name,
        program_version=IMAGE_VERSION,
        port_clock_mhz=chosen.port_clock,
        loops={loop.name: loop.reached for loop in loops if loop.reached is not None},
        setup_slack_ns=timing.setup_ns,
        cosimulated=(chosen.build / "cosim.passed").is_file(),
    )
    rows = reports.compare(
        reports.ChipResources(**asdict(estimate_resources(config, target))),
        synthesis.resources,
        reports.read_utilization(folder / reports.UTILIZATION),
    )
    facts = (
        f"design: {config.name}, digest {config.digest}, on {synthesis.part} ({target.name})",
        f"tools: {manifest.tool}",
        f"clocks: {chosen.clock:g} MHz (kernel), {chosen.port_clock:g} MHz (memory ports)",
        f"memories in UltraRAM: {', '.join(uram_parts(config, target)) or 'none'}",
        f"co-simulation: {'passed' if manifest.cosimulated else 'not run'}",
    )
    page = reports.build_report(
        f"Build report of {config.name}", synthesis, loops, rows, timing, facts
    )
    chosen.output.mkdir(parents=True, exist_ok=True)
    encoded = msgspec.json.format(msgspec.json.encode(manifest))
    files = {
        HWH: files[HWH],
        REPORT: page.encode(),
        MANIFEST: encoded + b"\n",
        BIT: files[BIT],
    }
    # The bitstream last: after an interruption make runs this again, because its target is missing,
    # and meanwhile the checksums of the manifest do not match an old bitstream.
    for name, content in files.items():
        write_file(chosen.output / name, content)
    print(page, f"kept as {chosen.output / REPORT}", sep="\n")


if __name__ == "__main__":
    try:
        main()
    except KgrcError as error:
        sys.exit(str(error))
