"""The seam: what a backend is. Five verbs, and a table of those there are."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.errors import DeviceError
from pynq_kgrc.graph import Size
from pynq_kgrc.program import Program, Slot
from pynq_kgrc.quant import Array


@dataclass(frozen=True)
class Counters:
    """What one task did. Bytes are traffic to and from memory, weights counted at each reading."""

    task: str
    macs: int
    """Multiply-accumulates of the array, zero padding of groups included."""
    bytes_in: int
    bytes_weight: int
    bytes_out: int
    seconds: float
    """Time on this host."""
    cycles: int | None = None
    """Cycles that a device reported, or none."""


class Backend(Protocol):
    """Whatever can run a program. Maps are [channel, depth, height, width] codes.

    The memory layout of the maps is the backend's own business.
    """

    config: AcceleratorConfig
    """The accelerator that this backend is."""

    def load(self, program: Program) -> None:
        """Place the buffers, write all weights once. A second call replaces the first program."""

    def write(self, slot: Slot, codes: Array) -> None:
        """Host to device: codes [C, D, H, W] into a slot."""

    def run(self, first: int = 0, last: int | None = None) -> list[Counters]:
        """Run the tasks [first, last) in order, in one start; blocking, with a time limit."""

    def read(self, slot: Slot, channels: int, size: Size) -> Array:
        """Device to host: a copy of the codes [C, D, H, W] in a slot."""

    def close(self) -> None:
        """Give everything back; closing twice is no error."""


BACKENDS = {"emulate": "pynq_kgrc.backends.emulate:Emulation"}
"""Name of a backend -> where its class is. Adding one touches no other line."""


def open_backend(name: str, config: AcceleratorConfig) -> Backend:
    """The backend of that name, as the accelerator `config`.

    Raises:
        DeviceError: there is no such backend.
    """
    if name not in BACKENDS:
        raise DeviceError(f"no backend named {name!r}; there are {', '.join(BACKENDS)}")
    module, _, kind = BACKENDS[name].partition(":")
    backend: Backend = getattr(import_module(module), kind)(config)
    return backend
