"""The interface of a backend (load, write, run, read, close) and the table of backends."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.cost import task_cost
from pynq_kgrc.accelerator.header import STATUS
from pynq_kgrc.errors import DeviceError, ProgramError, to_install
from pynq_kgrc.graph import Size
from pynq_kgrc.program import Program, Slot, Task
from pynq_kgrc.quant import Array, code_dtype


@dataclass(frozen=True)
class Counters:
    """What one task did. Bytes are memory traffic: data that is read twice counts twice."""

    task: str
    macs: int
    """Multiply-accumulates of the array, zero padding of groups included."""
    bytes_in: int
    bytes_weight: int
    bytes_out: int
    seconds: float
    """Time on this host. A backend that starts several tasks at once shares the time out."""
    trips: int | None = None
    """Trips of the array (iterations of its pipelined loop) that the kernel counted; None if no
    kernel ran. They do not depend on how fast it ran."""
    cycles: int | None = None
    """Clock cycles from the start of the task to its end that the kernel counted; None where there
    is no clock: in the emulation and in the C-simulation."""


def count_task(program: Program, task: Task) -> Counters:
    """The counters of a task by the cost model, with `seconds` 0."""
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
    """The counters of tasks from the kernel's status words.

    `status` [tasks, words] is in the order of accelerator.header.STATUS; `seconds` [tasks].
    """
    word = dict(zip(STATUS, status.astype(np.int64).T, strict=True))
    weight_bytes = word["weight_beats"] * (config.weight_port_words * 8)
    clocks = [count or None for count in word["clocks"].tolist()]
    columns = (
        word["macs"],
        (word["input_beats"] + word["shortcut_beats"]) * config.beat_bytes,
        weight_bytes + word["table_words"] * 8,
        word["output_beats"] * config.beat_bytes,
        seconds,
        word["array"],
    )
    return list(map(Counters, names, *(column.tolist() for column in columns), clocks))


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


@dataclass(frozen=True, eq=False)
class PackedMap:
    """The codes of a map as the bytes of the accelerator's memory, ready to be copied."""

    program: Program
    slot: Slot
    start: int
    """Where they go: byte in the memory of maps."""
    raw: Array
    """uint8 [bytes]."""


def check_codes(program: Program, slot: Slot, codes: Array | PackedMap) -> Array:
    """The codes, which must have the type and shape of a slot's buffer.

    Raises:
        ProgramError: names the type and shape of the buffer; or the map is packed.
    """
    if isinstance(codes, PackedMap):
        raise ProgramError(
            f"the map for {codes.slot} is packed for the accelerator's memory; this backend takes "
            f"its codes [C, D, H, W]"
        )
    buffer = program.buffers[slot.buffer]
    dtype, shape = code_dtype(buffer.bits), (codes.shape[0], *buffer.size)
    if codes.shape != shape or codes.dtype != dtype:
        raise ProgramError(
            f"buffer {slot.buffer} takes {dtype} codes of shape {shape}, "
            f"not {codes.dtype} of {codes.shape}"
        )
    return codes


def check_size(program: Program, slot: Slot, size: Size) -> None:
    """Refuse to read a map of another size than a slot's buffer holds.

    Raises:
        ProgramError: names both sizes.
    """
    held = program.buffers[slot.buffer].size
    if held != size:
        raise ProgramError(f"buffer {slot.buffer} holds maps of {held}, not {size}")


class Loaded:
    """What every backend shares: the loaded program, its lock, and the checks that need them."""

    name = ""
    _program: Program | None = None
    _maps_lost: str | None = None
    """What left the maps undefined; None once a clip has been written since."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.clip: object | None = None
        self._pid = os.getpid()
        _OPEN.add(self)

    def after_fork(self) -> None:
        """In the child of a fork: another thread of the parent may have held the lock."""
        self.lock = threading.RLock()
        self.clip = None

    def enter_child(self) -> None:
        """The first call in the child of a fork; what was opened belongs to the parent.

        Raises:
            DeviceError: this backend cannot go on here.
        """
        raise DeviceError(
            f"process {os.getpid()} is a fork of process {self._pid}, which opened the backend "
            f"{self.name}; open a backend in this process"
        )

    def pack(self, program: Program, slot: Slot, codes: Array) -> Array | PackedMap:
        """Nothing to prepare: `write` takes the codes as they are."""
        return codes

    def check_maps(self) -> None:
        """Refuse to run or read when the maps hold no clip.

        Raises:
            DeviceError: what happened to them.
        """
        if self._maps_lost is not None:
            raise DeviceError(f"there is no result; write the clip again after: {self._maps_lost}")

    @property
    def clock_mhz(self) -> float | None:
        """No clock: what runs here is a simulation."""
        return None

    @property
    def program(self) -> Program:
        """The loaded program.

        Raises:
            ProgramError: no program is loaded.
        """
        if self._program is None:
            raise ProgramError("no program is loaded")
        return self._program

    def task_range(self, first: int, last: int | None) -> tuple[int, int]:
        """The range [first, last) of `Backend.run`; without `last`, to the end of the program.

        Raises:
            ProgramError: no program is loaded, or not 0 <= first <= last <= number of tasks.
        """
        count = len(self.program.tasks)
        end = count if last is None else last
        if not 0 <= first <= end <= count:
            raise ProgramError(
                f"run({first}, {last}): {self.program.name} has {count} tasks; accepted are "
                f"0 <= first <= last <= {count}"
            )
        return first, end


Verb = TypeVar("Verb", bound=Callable[..., Any])


def locked(verb: Verb) -> Verb:
    """A verb of a backend that waits for its lock, and that a forked child enters on its own.

    `load` and `write` also make the backend forget which clip its maps hold.
    """

    @wraps(verb)
    def alone(self: Loaded, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            if os.getpid() != self._pid:
                self.enter_child()
            if verb.__name__ in ("load", "write"):
                self.clip = None
            return verb(self, *args, **kwargs)

    return cast(Verb, alone)


_OPEN: weakref.WeakSet[Loaded] = weakref.WeakSet()


def _after_fork() -> None:
    for backend in list(_OPEN):
        backend.after_fork()


os.register_at_fork(after_in_child=_after_fork)


class Backend(Protocol):
    """Runs programs that are compiled for one accelerator.

    A map is an array of codes [C, D, H, W]: channel, depth, height, width. Its numpy type is that
    of `quant.code_dtype` for the bits of its buffer. How a backend lays maps out in memory is
    private to it.

    **Order of calls.** `load` first; then any number of `write`, `run`, `read`; `close` last.
    `pack` may be called at any time, or not at all.
    `write`, `run` and `read` before a `load` raise ProgramError. After `close` only `close` may
    be called: open another backend instead.

    **Threads.** Each call is safe by itself: it takes `lock`. But `write`, `run` and `read` of one
    clip belong together; who shares a backend between threads holds `lock` from the first to the
    last, as `Session` does. Use one process for each backend that shall run at the same time.
    `pack` alone takes no lock: it prepares the next clip while `run` works on the present one.

    **Forks.** In the child of a fork a backend holds no clip. The emulation and the C-simulation
    load the program again there, and need the clip to be written; until then, and on a board
    always, calls raise DeviceError. The parent goes on undisturbed.

    **Failure.** A ProgramError means that the arguments were refused: nothing has changed, and
    the backend goes on with the program and the maps that it had. A DeviceError from `run`, or an
    interrupt during it, loses the contents of all maps but not the program: `write` the clip
    again, then `run`. A DeviceError from `load` leaves no program loaded. The backend restarts
    what has to be restarted (worker processes, the device) in the next call by itself.
    """

    name: str
    """Its key in `BACKENDS`."""

    exclusive: bool
    """Whether only one process of a host can hold the device at a time."""

    config: AcceleratorConfig
    """The accelerator that this backend is."""

    lock: threading.RLock
    """Held during each call, and by who needs several calls without others in between."""

    @property
    def clock_mhz(self) -> float | None:
        """The clock of the array in MHz, as the device reads it back; None where there is none."""

    clip: object | None
    """Names the clip whose maps the backend holds; set after a `write`, under `lock`."""

    @property
    def program(self) -> Program:
        """The loaded program; ProgramError if there is none."""

    def load(self, program: Program) -> None:
        """Allocate the maps and transfer all weights.

        May be called again at any time outside of `run`: the new program replaces the old one,
        and the contents of all maps are undefined until they are written. The backend keeps a
        reference to `program` and never changes it.

        Raises:
            ProgramError: the program is for another accelerator, or one that it cannot address.
                The program that was loaded stays.
            DeviceError: the device has not enough memory, or does not answer.
        """

    def pack(self, program: Program, slot: Slot, codes: Array) -> Array | PackedMap:
        """The host's work of a `write`: codes [C, D, H, W] as `write` copies them to the device.

        Takes no lock and touches neither the device nor what is loaded. The result may share memory
        with `codes`, which must not change before it is written.

        Args:
            program: need not be the one that is loaded.
            slot: where in `program` the map will be written.
            codes: are not changed.

        Raises:
            ProgramError: the program is for another accelerator, or the codes have another type or
                shape than the slot's buffer. A backend that has nothing to prepare leaves this to
                `write`.
        """

    def write(self, slot: Slot, codes: Array | PackedMap) -> None:
        """Host to device: copy codes [C, D, H, W], or what `pack` made of them, into a slot.

        The caller keeps `codes` and may change it as soon as `write` returns.

        Raises:
            ProgramError: no program is loaded, the codes have another type or shape than the slot's
                buffer, or they were packed for another slot or program.
            DeviceError: the device does not answer.
        """

    def run(self, first: int = 0, last: int | None = None) -> list[Counters]:
        """Run the tasks [first, last) in order and wait until they are done.

        `last` defaults to the number of tasks; an empty range (first == last) runs nothing. A run
        from the middle reads the maps that earlier runs left.

        Returns:
            The counters of each task of the range, in order.

        Raises:
            ProgramError: no program is loaded, or not 0 <= first <= last <= number of tasks.
            DeviceError: the device did not finish within its time limit, or reported a fault.
        """

    def read(self, slot: Slot, channels: int, size: Size) -> Array:
        """Device to host: the codes [C, D, H, W] of `channels` channels from a slot on.

        Returns:
            A copy, which later calls do not change.

        Raises:
            ProgramError: no program is loaded, or the slot's buffer holds maps of another size.
            DeviceError: the last run failed, or the device does not answer.
        """

    def close(self) -> None:
        """Release the device, its memory and all processes; closing twice is no error."""


AUTO = "auto"
"""In place of a backend's name: the best that there is (backends/chosen.py)."""

BACKENDS = {
    "emulate": "pynq_kgrc.backends.emulation.backend:Emulation",
    "native": "pynq_kgrc.backends.native.backend:Native",
    "csim": "pynq_kgrc.backends.csim:CSimulation",
    "timed": "pynq_kgrc.backends.timed:TimedSimulation",
    "board": "pynq_kgrc.backends.board.backend:BoardBackend",
}
"""Name of a backend -> module:class. A new backend needs one line here and no other change."""


def backend_class(name: str) -> Any:
    """The class of the backend of that name, not opened: its `name` and `exclusive` can be read.

    Raises:
        DeviceError: there is no backend of that name, or a package that it needs is missing.
    """
    if name not in BACKENDS:
        raise DeviceError(f"no backend named {name!r}; there are {', '.join(BACKENDS)}")
    module, _, kind = BACKENDS[name].partition(":")
    try:
        return getattr(import_module(module), kind)
    except (ImportError, OSError) as error:
        raise DeviceError(
            f"the backend {name} cannot be used here: {error}; on a PYNQ image run in its own "
            f"environment, elsewhere {to_install('board')}"
        ) from error


def open_backend(name: str, config: AcceleratorConfig) -> Backend:
    """Open the backend of that name for the accelerator `config`.

    Raises:
        DeviceError: there is no backend of that name, or a package that it needs is missing.
    """
    backend: Backend = backend_class(name)(config)
    return backend
