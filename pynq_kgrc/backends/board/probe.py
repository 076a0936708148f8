"""The board backend as the self-test opens it: it hands out what the driver only checks itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pynq

from pynq_kgrc.accelerator.header import DONE, STATUS
from pynq_kgrc.backends.board.backend import BoardBackend
from pynq_kgrc.backends.board.device import (
    cma_free,
    device_errors,
    interrupt_loop,
    warnings_ignored,
)
from pynq_kgrc.errors import DeviceError
from pynq_kgrc.quant import Array

LEAST_HELD = 1 << 20
"""Bytes of the smallest block that `memory_held` allocates."""

START_SECONDS = 1.0
"""How long a start without tasks may take; it takes microseconds."""


LOST_SECONDS = 0.1
"""How long an interrupt is awaited beyond its run; it takes some ten microseconds."""


class ProbedBoard(BoardBackend):
    """A board whose counts are kept in `words` instead of being compared with the cost model.

    A task that does not report done is an error as ever. The arguments are those of BoardBackend.
    """

    words: Array
    """uint64 [tasks, words] in the order of `header.STATUS`, after a run: what the kernel reported
    of the tasks that it ran since the program was loaded; zeros elsewhere."""

    arrived = lost = 0
    """Interrupts since `await_interrupts`; one that does not come within LOST_SECONDS, and twenty
    times the modelled time of its run, is lost."""
    _awaiting = False

    def __enter__(self) -> ProbedBoard:
        return self

    def _check_status(self, status: Array, first: int, last: int) -> None:
        if (status[first:last, STATUS.index("done")] != 1).any():
            super()._check_status(status, first, last)
        self.words = np.array(status)

    def program_again(self) -> None:
        """Program the device even if it holds this overlay, as opening it may leave out.

        Raises:
            DeviceError: it cannot be programmed, or does not answer as it should afterwards.
        """
        with device_errors("program"):
            self._resources.failure = "it was opened"
            self._restore_device()
            self._resources.failure = None

    @property
    def clock_hz(self) -> float:
        """The frequency of the kernel's clock, as it was read back."""
        return self._clock_hz

    @property
    def interrupts(self) -> bool:
        """Whether runs are awaited by interrupt."""
        return self._interrupts

    @property
    def tool(self) -> str:
        """The tool that built the overlay, by its manifest."""
        return self._found_overlay.manifest.tool

    def addresses(self) -> dict[str, tuple[int, int]]:
        """The first and last address of each buffer of the loaded program."""
        return {
            name: (int(buffer.device_address), int(buffer.device_address) + buffer.nbytes - 1)
            for name, buffer in self._resources.buffers.items()
        }

    def await_interrupts(self) -> None:
        """Await the interrupt of each run from here on, even if it has ended already.

        The driver looks at CTRL first, so that it awaits no interrupt of a short run. `arrived` and
        `lost` count from here on.
        """
        self.arrived = self.lost = 0
        self._awaiting = True
        if (loop := interrupt_loop()) is not None:
            self._wait_interrupt(loop, LOST_SECONDS)  # one that nobody took

    def _wait_until_done(self, limit: float, modelled: float) -> bool:
        loop = interrupt_loop() if self._awaiting and self._interrupts else None
        if loop is None:
            return super()._wait_until_done(limit, modelled)
        here = self._wait_interrupt(loop, min(limit, LOST_SECONDS + 20 * modelled))
        if not self._ip.get("CTRL") & DONE:  # the interrupt of another run, or the run is not done
            self.lost += 1
            return super()._wait_until_done(limit, modelled)
        self.arrived += here
        self.lost += not here
        return True

    def time_start(self, starts: int) -> float:
        """The median of the seconds from a start without tasks to its end, polled without a pause.

        Raises:
            DeviceError: it does not end within START_SECONDS.
        """
        return statistics.median(self._start_polled() for _ in range(starts))

    def time_interrupt(self, starts: int) -> float:
        """The same with the interrupt awaited, after `await_interrupts`.

        Raises:
            DeviceError: it does not end within START_SECONDS.
        """
        seconds = []
        for _ in range(starts):
            began = time.perf_counter()
            self._ip.start(0, 0)
            if not self._wait_until_done(START_SECONDS, 0.0):
                raise DeviceError(f"a start without tasks does not end within {START_SECONDS} s")
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def _start_polled(self) -> float:
        began = time.perf_counter()
        self._ip.start(0, 0)
        while not self._ip.get("CTRL") & DONE:
            if time.perf_counter() - began > START_SECONDS:
                raise DeviceError(f"a start without tasks does not end within {START_SECONDS} s")
        return time.perf_counter() - began


@contextmanager
def memory_held(device: Any, share: float) -> Iterator[int]:
    """Hold a share of the free contiguous memory: buffers allocated meanwhile lie elsewhere.

    Yields the bytes that are held: 0 if the free memory is unknown or nothing can be allocated.
    """
    left = round((cma_free(device) or 0) * share)
    held = 0
    with ExitStack() as stack, warnings_ignored():
        block = left
        while left >= LEAST_HELD and block >= LEAST_HELD:
            try:
                buffer = pynq.allocate((block // 8,), np.uint64, target=device)
            except (RuntimeError, OSError, MemoryError):  # no block of this size is left
                block //= 2
                continue
            stack.callback(buffer.freebuffer)
            held += block
            left -= block
            block = min(block, left)
        yield held
