"""Which backend is used, for which design, and why: the board, else native, else the emulation.

Jupyter on a board is a system service. It has no shell, so its environment may lack XILINX_XRT,
without which pynq looks for no device. The reason then says what was found without it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from pynq_kgrc.accelerator.config import DEFAULT_DESIGN, AcceleratorConfig, preset
from pynq_kgrc.backends.base import AUTO
from pynq_kgrc.backends.board import SIMULATE, simulation_requested
from pynq_kgrc.backends.board.machine import is_board
from pynq_kgrc.backends.board.overlays import OVERLAY, FoundOverlay, list_overlays
from pynq_kgrc.backends.native.library import built_library
from pynq_kgrc.errors import DeviceError
from pynq_kgrc.files import find_folder

BACKEND = "PYNQ_KGRC_BACKEND"
"""Environment variable that names the backend to use, whatever there is."""

RECOMMENDED = "8-zcu102"
"""The preset that is used of several installed overlays: the fastest (docs/hardware.md)."""

MODEL = Path("/proc/device-tree/model")
MANAGERS = Path("/sys/class/fpga_manager")


@dataclass(frozen=True)
class Chosen:
    """A backend, the design to compile for, and the reason for both."""

    backend: str
    config: AcceleratorConfig
    reason: str

    @property
    def title(self) -> str:
        """The backend as pictures and figures name it: a simulated board is never just a board."""
        simulated = self.backend == "board" and simulation_requested()
        return "simulated board" if simulated else self.backend

    def __str__(self) -> str:
        return f"backend {self.title}, design {self.config.name}: {self.reason}"


def installed_overlays() -> list[FoundOverlay]:
    """The overlays with a bitstream, the recommended design first.

    They are searched for in KGRC_OVERLAY, else in the folder `overlays` of the package.

    Raises:
        DeviceError: a manifest is invalid.
    """
    named = os.environ.get(OVERLAY)
    found = list_overlays(Path(named) if named else find_folder("overlays"))
    best = preset(RECOMMENDED).digest
    return sorted((o for o in found if o.manifest.built), key=lambda o: o.manifest.digest != best)


def installed_design() -> AcceleratorConfig:
    """The design of the installed overlay; `DEFAULT_DESIGN` where there is none.

    Raises:
        DeviceError: a manifest is invalid.
    """
    found = installed_overlays()
    return found[0].manifest.config if found else preset(DEFAULT_DESIGN)


def software_backend() -> str:
    """The fastest backend without a device: native where its kernels are built, else emulate."""
    return "emulate" if built_library() is None else "native"


def resolve_backend(name: str) -> str:
    """The name of a backend; in place of "auto" what there is: board, native, emulate.

    A board is looked for where this machine is one, simulates one or has XRT: elsewhere importing
    pynq would take seconds for nothing.

    Raises:
        DeviceError: the manifest of an overlay is invalid.
    """
    if name != AUTO:
        return name
    if BACKEND in os.environ or is_board() or "XILINX_XRT" in os.environ:
        return choose_backend().backend
    return software_backend()


def choose_backend(fallback: str | None = None) -> Chosen:
    """The board if there is one with an overlay, else `fallback`; the reason is one sentence.

    Without `fallback` it is `software_backend`. PYNQ_KGRC_BACKEND and PYNQ_KGRC_SIMULATE decide
    instead where they are set. No device is programmed or opened here.

    Raises:
        DeviceError: the manifest of an overlay is invalid.
    """
    config = installed_design()
    fallback = fallback or software_backend()
    named = os.environ.get(BACKEND)
    if named:
        return Chosen(named, config, f"{BACKEND} says so")
    if simulation_requested():
        return Chosen("board", config, f"{SIMULATE} asks for a simulated board, no hardware")
    overlays = installed_overlays()
    try:
        import_module("pynq_kgrc.backends.board.device").find_device()
    except ImportError as error:
        return Chosen(fallback, config, f"no board can be opened, because {_missing(error)}")
    except DeviceError as error:
        return Chosen(fallback, config, f"{error}{_signs()}")
    if not overlays:
        return Chosen(
            fallback,
            config,
            "a PYNQ device is here, but no bitstream: build one as overlays/README.md says, or "
            f"set {OVERLAY} to its folder",
        )
    others = ", ".join(overlay.manifest.config.name for overlay in overlays[1:])
    also = f" ({others} would be there, too)" if others else ""
    return Chosen("board", config, f"a PYNQ device and an overlay of this design are here{also}")


def _missing(error: ImportError) -> str:
    return f"{error.name or error} is not installed{_signs()}"


def _signs() -> str:
    """What says that this machine is a board although pynq finds no device."""
    try:
        model = MODEL.read_bytes().rstrip(b"\0").decode("utf-8", "replace")
    except OSError:
        model = ""
    managed = MANAGERS.is_dir() and any(MANAGERS.iterdir())
    if not (model and managed):
        return ""
    cure = (
        ""
        if "XILINX_XRT" in os.environ
        else (
            "; Jupyter runs as a system service: put XILINX_XRT=/usr into /etc/environment, and "
            "restart the service jupyter"
        )
    )
    return f". This machine is a board ({model}) with an FPGA manager{cure}"
