"""The seam: what a backend is. Five verbs, and a table of those there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.cost import task_cost
from pynq_kgrc.accelerator.header import STATUS
from pynq_kgrc.errors import DeviceError, ProgramError
from pynq_kgrc.graph import Size
from pynq_kgrc.program import Program, Slot, Task
from pynq_kgrc.quant import Array, code_dtype


@dataclass(frozen=True)
class Counters:
    """What one task did. Bytes are traffic to and from memory, counted at each reading."""

    task: str
    macs: int
    """Multiply-accumulates of the array, zero padding of groups included."""
    bytes_in: int
    bytes_weight: int
    bytes_out: int
    seconds: float
    """Time on this host."""
    cycles: int | None = None
    """Trips of the array that a device reported, one a cycle of its clock; or none."""


def count_task(program: Program, task: Task) -> Counters:
    """What a task does by the cost model; the C-simulation counts it while it runs."""
    config = program.config
    cost = task_cost(config, program.work(task))
    return Counters(
        task=task.name,
        macs=cost.macs,
        bytes_in=(cost.input_beats + cost.shortcut_beats) * config.beat_bytes,
        bytes_weight=cost.weight_beats * config.weight_port_words * 8 + cost.table_words * 8,
        bytes_out=cost.output_beats * config.beat_bytes,
        seconds=0.0,
    )


def reported_counters(
    config: AcceleratorConfig, names: Sequence[str], status: Array, seconds: Array
) -> list[Counters]:
    """What tasks did by the kernel's own report.

    `status` [tasks, words] is in the order of accelerator.header.STATUS; `seconds` [tasks].
    """
    word = dict(zip(STATUS, status.astype(np.int64).T, strict=True))
    weight_bytes = word["weight_beats"] * (config.weight_port_words * 8)
    columns = (
        word["macs"],
        (word["input_beats"] + word["shortcut_beats"]) * config.beat_bytes,
        weight_bytes + word["table_words"] * 8,
        word["output_beats"] * config.beat_bytes,
        seconds,
        word["array"],
    )
    return list(map(Counters, names, *(column.tolist() for column in columns)))


def check_design(program: Program, config: AcceleratorConfig) -> None:
    """Refuse a program for another accelerator.

    Raises:
        ProgramError: names both designs and their digests.
    """
    if program.config.digest != config.digest:
        raise ProgramError(
            f"{program.name} is made for {program.config.name} ({program.config.digest}), "
            f"this is {config.name} ({config.digest}); compile it for this one"
        )


def check_codes(program: Program, slot: Slot, codes: Array) -> None:
    """Refuse codes that are not what a slot's buffer takes.

    Raises:
        ProgramError: names the type and shape that it takes.
    """
    buffer = program.buffers[slot.buffer]
    dtype, shape = code_dtype(buffer.bits), (codes.shape[0], *buffer.size)
    if codes.shape != shape or codes.dtype != dtype:
        raise ProgramError(
            f"buffer {slot.buffer} takes {dtype} codes of shape {shape}, "
            f"not {codes.dtype} of {codes.shape}"
        )


def check_size(program: Program, slot: Slot, size: Size) -> None:
    """Refuse to read a map of another size than a slot's buffer holds.

    Raises:
        ProgramError: names both sizes.
    """
    held = program.buffers[slot.buffer].size
    if held != size:
        raise ProgramError(f"buffer {slot.buffer} holds maps of {held}, not {size}")


class Loaded:
    """What every backend has: a program, or the refusal that there is none."""

    _program: Program | None = None

    @property
    def program(self) -> Program:
        """The loaded program.

        Raises:
            ProgramError: none is.
        """
        if self._program is None:
            raise ProgramError("no program is loaded")
        return self._program


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


BACKENDS = {
    "emulate": "pynq_kgrc.backends.emulation.backend:Emulation",
    "csim": "pynq_kgrc.backends.csim:CSimulation",
    "board": "pynq_kgrc.backends.board.backend:BoardBackend",
}
"""Name of a backend -> where its class is. Adding one touches no other line."""


def open_backend(name: str, config: AcceleratorConfig) -> Backend:
    """The backend of that name, as the accelerator `config`.

    Raises:
        DeviceError: there is no such backend, or what it needs is not installed.
    """
    if name not in BACKENDS:
        raise DeviceError(f"no backend named {name!r}; there are {', '.join(BACKENDS)}")
    module, _, kind = BACKENDS[name].partition(":")
    try:
        made = getattr(import_module(module), kind)
    except (ImportError, OSError) as error:
        raise DeviceError(
            f"the backend {name} cannot be used here: {error}; on a PYNQ image run in its own "
            f"environment, elsewhere install pynq_kgrc[board]"
        ) from error
    backend: Backend = made(config)
    return backend
