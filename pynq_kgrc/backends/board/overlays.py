"""Overlays on disk: folders with `manifest.json`, `kgrc.bit` and Vivado's `kgrc.hwh`.

The manifest says which design and clock the bitstream was built for. No bitstream is shipped: the
folder `overlays` has only manifests, of designs that can be built.

``python -m pynq_kgrc.backends.board.overlays overlays`` writes those that are missing or stale.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pynq_kgrc.accelerator.boards import Board, board, board_of_design, board_of_image
from pynq_kgrc.accelerator.config import PRESETS, AcceleratorConfig
from pynq_kgrc.accelerator.header import IMAGE_VERSION
from pynq_kgrc.errors import ConfigError, DeviceError
from pynq_kgrc.files import find_folder, written_beside

OVERLAY = "KGRC_OVERLAY"
"""Environment variable: a bitstream, its folder, or a folder of such folders."""

BOARD = "BOARD"
"""Environment variable of PYNQ's images, and of Kria-PYNQ: the name of the board."""

DEVICE_TREE = Path("/proc/device-tree/chosen/pynq_board")
"""The same in the device tree of PYNQ's images."""

BIT, HWH, MANIFEST, REPORT = "kgrc.bit", "kgrc.hwh", "manifest.json", "report.md"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The design, clock and files of an overlay; written when it is built."""

    config: AcceleratorConfig
    digest: str
    """`config.digest`, which the kernel also reports in its digest register."""
    clock_mhz: float
    """Clock in MHz for which timing was met; if nothing is built, the target."""
    sha256: dict[str, str]
    """File name -> hex SHA-256, of `kgrc.bit` and `kgrc.hwh`; empty if nothing is built."""
    tool: str
    """Name and version of the tool that built it."""
    board: str = "zcu102"
    """Name of the board that it was built for (accelerator/boards.py)."""
    program_version: int = 1
    """Version of the memory image that the hardware reads (`header.IMAGE_VERSION`). The key is
    older than that name; it is no version of the program's file."""
    pl_clock: int = 0
    """Which of the clocks pl_clk0 to pl_clk3 drives the kernel."""
    port_clock_mhz: float = 300.0
    """Clock in MHz of the ports of the processing system that access memory."""
    port_pl_clock: int = 1
    """Which of the clocks pl_clk0 to pl_clk3 drives them."""
    loops: dict[str, int] = msgspec.field(default_factory=dict)
    """Pipelined loop (module/label) -> its initiation interval in cycles, as Vitis HLS reports it
    after synthesis; empty if nothing is built."""
    setup_slack_ns: float | None = None
    """The worst slack of setup (WNS) after placement and routing; None if nothing is built."""
    cosimulated: bool = False
    """Whether the co-simulation of Vitis HLS passed before the bitstream was made."""

    @property
    def built(self) -> bool:
        """Whether the manifest was written for a bitstream."""
        return bool(self.sha256)

    @property
    def part(self) -> str:
        """The part of the board: only there the bitstream can be loaded."""
        return board(self.board).part


@dataclass(frozen=True)
class FoundOverlay:
    """An overlay's folder and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def bit(self) -> Path:
        return self.folder / BIT

    def check_files(self) -> None:
        """Check that both files exist and have the SHA-256 of the manifest.

        Raises:
            DeviceError: names the file, and what to do.
        """
        cures = {
            BIT: "build it from hls_src, as overlays/README.md says",
            HWH: "copy it from the Vivado project that made the bitstream",
        }
        for name, cure in cures.items():
            path = self.folder / name
            if not path.is_file():
                raise DeviceError(f"{path} is missing; {cure}")
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            wanted = self.manifest.sha256.get(name, "none")
            if found != wanted:
                raise DeviceError(
                    f"{path} has SHA-256 {found[:16]}..., its manifest says {wanted[:16]}...; "
                    f"copy the whole overlay again"
                )


def read_overlay(folder: Path) -> FoundOverlay:
    """The overlay in a folder.

    Raises:
        DeviceError: there is no manifest, or it is invalid; names the field or the value.
    """
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise DeviceError(
            f"{path} is missing; each {BIT} needs one beside it, which says how it was built"
        ) from None
    except (msgspec.DecodeError, ConfigError, OSError) as error:
        raise DeviceError(f"{path}: {error}") from error
    if manifest.digest != manifest.config.digest:
        raise DeviceError(
            f"{path}: digest {manifest.digest} is not that of its config, {manifest.config.digest}"
        )
    try:
        board(manifest.board)
    except ConfigError as error:
        raise DeviceError(f"{path}: {error}") from error
    for name in ("", "port_"):
        mhz, clock = getattr(manifest, f"{name}clock_mhz"), getattr(manifest, f"{name}pl_clock")
        if not mhz > 0 or clock not in range(4):
            raise DeviceError(
                f"{path}: {name}clock_mhz={mhz}, {name}pl_clock={clock}; "
                f"use a {name}clock_mhz above 0 and a {name}pl_clock of 0 to 3"
            )
    return FoundOverlay(folder, manifest)


def list_overlays(place: Path) -> list[FoundOverlay]:
    """The overlay of a bitstream or of its folder, or all overlays in the folders of a folder.

    Raises:
        DeviceError: a manifest is invalid, or a bitstream has another name than an overlay's.
    """
    if place.suffix == ".bit":
        if place.name != BIT:
            raise DeviceError(
                f"{place}: accepted is a bitstream named {BIT}, with {HWH} and {MANIFEST} beside "
                f"it; put each overlay into a folder of its own, with those names"
            )
        place = place.parent
    if (place / MANIFEST).is_file():
        return [read_overlay(place)]
    return [read_overlay(path.parent) for path in sorted(place.glob(f"*/{MANIFEST}"))]


def this_board() -> Board | None:
    """The board that this computer is, as its image says; None on a PC, or if the name is unknown.

    The device tree is asked first, then the environment variable BOARD.
    """
    try:
        text = DEVICE_TREE.read_bytes().decode("utf-8", "replace")
    except OSError:
        text = os.environ.get(BOARD, "")
    return board_of_image(text)


def find_overlay(config: AcceleratorConfig, place: Path | None = None) -> FoundOverlay:
    """The overlay of a design for this board, with its files checked.

    A bitstream is loaded only on the part that it was built for. Where the image does not say
    which board it is, and on a PC, the first overlay of the design is taken.

    Args:
        config: the design; overlays are matched by its digest, not by its name.
        place: a bitstream, its folder, or a folder of such folders; default KGRC_OVERLAY, else
            the folder `overlays`.

    Raises:
        DeviceError: there is none (names the designs and boards found), or its files are not as
            built.
    """
    named = os.environ.get(OVERLAY)
    place = place or (Path(named) if named else find_folder("overlays"))
    found = [overlay for overlay in list_overlays(place) if overlay.manifest.built]
    here = this_board()
    for overlay in found:
        fits = here is None or overlay.manifest.part == here.part
        if overlay.manifest.digest == config.digest and fits:
            overlay.check_files()
            return overlay
    there = ", ".join(
        f"{o.manifest.config.name} for {o.manifest.board} ({o.manifest.digest})" for o in found
    )
    for_here = "" if here is None else f" for this {here.name}"
    raise DeviceError(
        f"{place}: no overlay of {config.name} ({config.bits} bits, digest {config.digest})"
        f"{for_here}; there is {there or 'none'}. Build one as overlays/README.md says, or point "
        f"{OVERLAY} at it"
    )


def describe_unbuilt(config: AcceleratorConfig, clock_mhz: float = 150.0) -> bytes:
    """The manifest of a design that is not built, for its board, as the bytes of its file."""
    manifest = Manifest(
        config,
        config.digest,
        clock_mhz,
        {},
        "none: not built",
        board=board_of_design(config.name).name,
        program_version=IMAGE_VERSION,
    )
    return msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"


def write_manifests(place: Path) -> None:
    """Write a manifest for each preset, one folder each; manifests of built overlays stay."""
    for config in PRESETS.values():
        path = place / config.name / MANIFEST
        if path.is_file() and read_overlay(path.parent).manifest.built:
            continue
        with written_beside(path) as beside:
            beside.write_bytes(describe_unbuilt(config))


if __name__ == "__main__":
    write_manifests(Path(sys.argv[1]))
