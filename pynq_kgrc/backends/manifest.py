"""Overlays on disk: a bitstream, what Vivado says about it, and a manifest that says what it is.

An overlay is a folder with `manifest.json`, `kgrc.bit` and `kgrc.hwh`. No bitstream is shipped.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.errors import ConfigError, DeviceError

OVERLAY = "KGRC_OVERLAY"
"""Environment variable: a bitstream, its folder, or a folder of such folders."""

BIT, HWH, MANIFEST = "kgrc.bit", "kgrc.hwh", "manifest.json"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bitstream is, written when it is built."""

    config: AcceleratorConfig
    digest: str
    """The config's own; also in the digest register of the hardware."""
    clock_mhz: float
    """What the timing was met at."""
    sha256: dict[str, str]
    """Hex SHA-256 of `kgrc.bit` and `kgrc.hwh`."""
    tool: str
    """Name and version of what built it."""
    board: str = "zcu102"
    program_version: int = 1
    """Version of the program format that the hardware reads."""
    pl_clock: int = 0
    """Which of the four clocks to the programmable logic drives it."""


@dataclass(frozen=True)
class FoundOverlay:
    """An overlay whose manifest was read."""

    folder: Path
    manifest: Manifest

    @property
    def bit(self) -> Path:
        return self.folder / BIT

    def check_files(self) -> None:
        """Refuse files that are missing or are not those of the manifest.

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
        DeviceError: no manifest, or one that does not hold together; names the field.
    """
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise DeviceError(
            f"{path} is missing; it lies beside each {BIT} and says what it is"
        ) from None
    except (msgspec.DecodeError, ConfigError, OSError) as error:
        raise DeviceError(f"{path}: {error}") from error
    if manifest.digest != manifest.config.digest:
        raise DeviceError(
            f"{path}: digest {manifest.digest} is not that of its config, {manifest.config.digest}"
        )
    if not manifest.clock_mhz > 0 or manifest.pl_clock not in range(4):
        raise DeviceError(
            f"{path}: clock_mhz={manifest.clock_mhz} of pl_clock={manifest.pl_clock}; "
            f"use more than 0 of one of the clocks 0 to 3"
        )
    return FoundOverlay(folder, manifest)


def overlays_folder() -> Path:
    """Where overlays lie if KGRC_OVERLAY does not say: in the package, or beside it."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "overlays"
    return inside if inside.is_dir() else package.parent / "overlays"


def list_overlays(place: Path) -> list[FoundOverlay]:
    """The overlay that a bitstream or folder is, or those in the folders of a folder.

    Raises:
        DeviceError: one of them is damaged.
    """
    if place.suffix == ".bit":
        place = place.parent
    if (place / MANIFEST).is_file():
        return [read_overlay(place)]
    return [read_overlay(path.parent) for path in sorted(place.glob(f"*/{MANIFEST}"))]


def find_overlay(config: AcceleratorConfig, place: Path | None = None) -> FoundOverlay:
    """The overlay of a design, its files checked.

    Args:
        config: the design; it is its digest that counts, not its name.
        place: a bitstream, its folder, or a folder of folders; else KGRC_OVERLAY; else `overlays`.

    Raises:
        DeviceError: there is none; names the designs that there are.
    """
    named = os.environ.get(OVERLAY)
    place = place or (Path(named) if named else overlays_folder())
    found = list_overlays(place)
    for overlay in found:
        if overlay.manifest.digest == config.digest:
            overlay.check_files()
            return overlay
    there = ", ".join(f"{o.manifest.config.name} ({o.manifest.digest})" for o in found) or "none"
    raise DeviceError(
        f"{place}: no overlay of {config.name} ({config.bits} bits, digest {config.digest}); "
        f"there is {there}. Build one as overlays/README.md says, or point {OVERLAY} at it"
    )
