"""The accelerator in C: the codes and counters of the emulation, computed as fast as this CPU can.

What a task computes is in kernels/tasks.inc, how its weights and its input lie in memory is in
`layout`. Threads of the library share the jobs of a task (kernels/crew.c). A call of the library
runs one task, so that Ctrl-C is seen between two.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.backends.base import (
    Counters,
    Loaded,
    PackedMap,
    check_codes,
    check_design,
    check_size,
    count_task,
    locked,
)
from pynq_kgrc.backends.cores import useful_cores
from pynq_kgrc.backends.native.layout import (
    QUAD,
    Connected,
    Convolution,
    LaidOut,
    Pool,
    lay_out,
    map_bytes,
    map_shape,
)
from pynq_kgrc.backends.native.library import choose_instructions, load_library
from pynq_kgrc.errors import DeviceError
from pynq_kgrc.graph import Size
from pynq_kgrc.program import Program, Slot
from pynq_kgrc.quant import Array, ceil_div, code_dtype

ONE_CORE_MACS = 1 << 23
"""A program with fewer MACs runs on one core: a second one would only wait."""

CACHE_LINE = 64
HUGE_PAGE = 1 << 21


class Native(Loaded):
    """The accelerator `config`, computed by kernels in C on this host.

    Args:
        config: the design; programs for another one are refused.
        cores: how many threads share the work. The default is all cores that this process may
            use, and 1 for a small program.
        instructions: "vnni", "avx2" or "plain"; by default what PYNQ_KGRC_NATIVE names, else the
            best of this processor.

    Raises:
        DeviceError: the kernels are not built and cannot be; this processor lacks the
            instructions; or T_N of the design is not a multiple of 4.
    """

    name = "native"
    exclusive = False

    def __init__(
        self, config: AcceleratorConfig, cores: int | None = None, instructions: str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        if config.tn % QUAD:
            raise DeviceError(
                f"{config.name}: T_N is {config.tn}; the native backend takes multiples of {QUAD}; "
                f"use the backend emulate"
            )
        self._library = load_library()
        self.instructions, self._with = choose_instructions(instructions)
        self._requested_cores = cores
        self.cores = 1
        self._maps: list[Array] = []
        self._tasks: list[LaidOut] = []
        self._counters: list[Counters] = []
        self._scratch = _lines(0)
        self._operand = _lines(0)
        self._crew: int | None = None
        self._end_crew: weakref.finalize[..., Native] | None = None

    @locked
    def load(self, program: Program) -> None:
        """Allocate the maps and bring the weights of every task into the order of the kernels.

        Raises:
            ProgramError: the program is for another accelerator, or could overflow it.
            DeviceError: there is no memory for the threads.
        """
        check_design(program, self.config)
        self._stop_crew()
        self._maps_lost = None
        self._program = None  # until all of it is prepared: Ctrl-C leaves no program
        self.cores = self._requested_cores or useful_cores(program, ONE_CORE_MACS)
        with ThreadPoolExecutor(self.cores, "lay out") as threads:
            self._tasks = list(
                threads.map(
                    lambda task: lay_out(program, task, self._with, self.cores), program.tasks
                )
            )
        self._counters = [count_task(program, task) for task in program.tasks]
        self._operand = _lines(max(task.operand_bytes for task in self._tasks))
        self._maps = _allocate_maps(program)
        for task in self._tasks:
            task.place(self._addresses(task), self._operand.ctypes.data)
        self._start_crew()
        self._program = program

    @locked
    def write(self, slot: Slot, codes: Array | PackedMap) -> None:
        """Copy codes [C, D, H, W] into a slot.

        Raises:
            ProgramError: no program is loaded, or the codes have another type or shape than the
                slot's buffer.
        """
        codes = check_codes(self.program, slot, codes)
        view = self._channels(slot, ceil_div(codes.shape[0], QUAD))
        for channel, plane in enumerate(codes):
            view[channel // QUAD, ..., channel % QUAD] = plane
        self._maps_lost = None

    @locked
    def read(self, slot: Slot, channels: int, size: Size) -> Array:
        """A copy of the codes [C, D, H, W] in a slot.

        Raises:
            ProgramError: no program is loaded, or the slot's buffer has another size.
        """
        check_size(self.program, slot, size)
        self.check_maps()
        view = self._channels(slot, ceil_div(channels, QUAD))
        whole = view.transpose(0, 4, 1, 2, 3).reshape(-1, *size)
        return whole[:channels].copy()

    @locked
    def run(self, first: int = 0, last: int | None = None) -> list[Counters]:
        """Run the tasks [first, last) in order.

        Raises:
            ProgramError: no program is loaded, or the range is not within it.
        """
        first, last = self.task_range(first, last)
        self.check_maps()
        if first == last:
            return []
        self._maps_lost = "a run that did not end"
        counters = []
        for task, counted in zip(self._tasks[first:last], self._counters[first:last], strict=True):
            start = time.perf_counter()
            self._call(task.structure)
            counters.append(replace(counted, seconds=time.perf_counter() - start))
        self._maps_lost = None
        return counters

    def close(self) -> None:
        """Release memory and threads."""
        with self.lock:
            self._stop_crew()
            self._program, self._tasks, self._maps, self._counters = None, [], [], []
            self._scratch, self._operand = _lines(0), _lines(0)

    def enter_child(self) -> None:
        """The first call in the child of a fork: it has no threads, and may have half a map.

        The weights need not be laid out again: the child shares their memory with its parent.
        """
        self._pid = os.getpid()
        if self._end_crew is not None:
            self._end_crew.detach()  # the threads are the parent's
        self._crew = None
        if self._program is not None:
            self._start_crew()
        self._maps_lost = f"a fork of process {os.getppid()}"

    def _call(self, structure: Convolution | Connected | Pool) -> None:
        names = {Convolution: "kgrc_convolve", Connected: "kgrc_connect", Pool: "kgrc_pool"}
        function = getattr(self._library, names[type(structure)])
        function(self._crew, ctypes.byref(self._with), ctypes.byref(structure))

    def _channels(self, slot: Slot, quads: int) -> Array:
        """The quads [quads, D, H, W, 4] of a map from a slot on: a view."""
        first = slot.channel // QUAD
        return self._maps[slot.buffer][first : first + quads]

    def _addresses(self, task: LaidOut) -> dict[Slot, int]:
        return {slot: self._channels(slot, 1).ctypes.data for slot in task.maps.values()}

    def _start_crew(self) -> None:
        each = ceil_div(max(task.scratch_bytes for task in self._tasks), CACHE_LINE) + 1
        self._scratch = _lines(self.cores * each * CACHE_LINE)
        crew = self._library.kgrc_crew_new(self.cores, self._scratch.ctypes.data, each * CACHE_LINE)
        if not crew:
            raise DeviceError("there is no memory for the threads of the native backend")
        self._crew = crew
        free = self._library.kgrc_crew_free
        self._end_crew = weakref.finalize(self, _end_crew, os.getpid(), free, crew, self._scratch)

    def _stop_crew(self) -> None:
        if self._end_crew is not None:
            self._end_crew()
        self._crew = self._end_crew = None


def _end_crew(pid: int, free: ctypes._FuncPointer, crew: int, _: Array) -> None:
    """End the threads, whose scratch is kept until here. In a fork they are not this process's."""
    if os.getpid() == pid:
        free(crew)


def _lines(count: int) -> Array:
    """At least `count` zero bytes that begin at a cache line; many of them in huge pages.

    The planes of a padded input are far apart: in small pages each would need its own entry of the
    processor's translation buffer.
    """
    memory = mmap.mmap(-1, count + CACHE_LINE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if count >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the kernel has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _allocate_maps(program: Program) -> list[Array]:
    """The map of each buffer [quads, D, H, W, 4], in one arena.

    In the program a row fills whole beats, and two codes of 4 bits share a byte. Here they do not:
    offsets are doubled for the latter.
    """
    factor = 2 if program.config.bits == 4 else 1
    arena = _lines(program.arena_bytes * factor)
    maps = []
    for buffer in program.buffers:
        start = buffer.offset * factor
        raw = arena[start : start + map_bytes(buffer.channels, buffer.size, buffer.bits)]
        shape = map_shape(buffer.channels, buffer.size)
        maps.append(raw.view(code_dtype(buffer.bits)).reshape(shape))
    return maps
