"""Copy a bitstream to its overlay, and write the manifest that describes it.

``python manifest.py --design 8-sparse --build build/8-sparse -o ../overlays/8-sparse``
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec

from pynq_kgrc.accelerator.config import read_design
from pynq_kgrc.accelerator.header import IMAGE_VERSION, REGISTERS, VLNV
from pynq_kgrc.accelerator.reports import SYNTHESIS, read_synthesis
from pynq_kgrc.backends.board.overlays import BIT, HWH, MANIFEST, Manifest
from pynq_kgrc.errors import DeviceError, KgrcError


def check_handoff(path: Path) -> None:
    """Check that a .hwh has the kernel and every register that the driver uses.

    Raises:
        DeviceError: one of them is missing; the message names it.
    """
    try:
        modules = ElementTree.parse(path).iter("MODULE")
        kernel = next((module for module in modules if module.get("VLNV") == VLNV), None)
    except ElementTree.ParseError as error:
        raise DeviceError(f"{path}: no .hwh, {error}") from error
    if kernel is None:
        raise DeviceError(f"{path}: no {VLNV}; was the kernel exported by hls.tcl?")
    found = {register.get("NAME") for register in kernel.iter("REGISTER")}
    missing = [name for name in REGISTERS if name not in found]
    if missing:
        raise DeviceError(f"{path}: no register {', '.join(missing)} of {VLNV}")


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
    parser.add_argument("--board", default="zcu102")
    parser.add_argument("--clock", type=float, required=True, help="MHz at which timing was met")
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    config = read_design(chosen.design)
    check_handoff(chosen.build / HWH)
    files = {name: (chosen.build / name).read_bytes() for name in (BIT, HWH)}
    synthesis = read_synthesis(chosen.build / "reports" / SYNTHESIS)
    vivado = (chosen.build / "vivado.version").read_text().strip()
    manifest = Manifest(
        config=config,
        digest=config.digest,
        clock_mhz=chosen.clock,
        sha256={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        tool=f"Vitis HLS {synthesis.version}, {vivado}",
        board=chosen.board,
        program_version=IMAGE_VERSION,
    )
    chosen.output.mkdir(parents=True, exist_ok=True)
    encoded = msgspec.json.format(msgspec.json.encode(manifest))
    files = {HWH: files[HWH], MANIFEST: encoded + b"\n", BIT: files[BIT]}
    # The bitstream last: after an interruption make runs this again, because its target is missing,
    # and meanwhile the checksums of the manifest do not match an old bitstream.
    for name, content in files.items():
        write_file(chosen.output / name, content)


if __name__ == "__main__":
    try:
        main()
    except KgrcError as error:
        sys.exit(str(error))
