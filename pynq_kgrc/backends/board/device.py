"""A PYNQ device as this process uses it: which one, its memory, and what must be given back."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import logging
import os
import re
import threading
import warnings
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pynq

from pynq_kgrc.accelerator.boards import BOARDS
from pynq_kgrc.backends.board import SIMULATE, simulation_requested
from pynq_kgrc.backends.board.kernel import KgrcOverlay
from pynq_kgrc.backends.board.lock import DeviceLock
from pynq_kgrc.backends.board.overlays import FoundOverlay
from pynq_kgrc.errors import DeviceError, KgrcError

MIB = 1 << 20

DEVICE_TREE = Path("/proc/device-tree")

log = logging.getLogger(__name__)


def find_device() -> Any:
    """The device to use: the simulated one if PYNQ_KGRC_SIMULATE selects it, else pynq's.

    Raises:
        DeviceError: there is none; says what is missing.
    """
    if simulation_requested():
        return import_module("pynq_kgrc.backends.board.simulated").shared_device()
    devices = _probe()
    if not devices:
        if not os.environ.get("XILINX_XRT"):
            raise DeviceError(
                "no PYNQ device: XILINX_XRT is not set, so pynq does not look for one. On a "
                "board: source /etc/profile.d/xrt_setup.sh, and keep it with sudo -E. Without "
                f"a board: {SIMULATE}=1 simulates one"
            )
        raise DeviceError(
            f"no PYNQ device: no FPGA manager on this machine. {SIMULATE}=1 simulates a board"
        )
    if os.geteuid() != 0:
        raise DeviceError(
            "the registers of the device are for root only; start Python or Jupyter with sudo -E"
        )
    if not getattr(pynq.ps, "ON_TARGET", True):
        raise DeviceError(
            "/proc/device-tree/chosen/pynq_board is missing: pynq then allocates nothing. Use a "
            "PYNQ image, or add that node to the device tree"
        )
    return pynq.Device.active_device


_probing = threading.Lock()


def _probe() -> list[Any]:
    """pynq's devices, in whatever thread.

    Raises:
        DeviceError: pynq fails to look for them.
    """
    with _probing, warnings_ignored(), _event_loop():
        # pynq keeps an empty list from before it probes, also where that fails
        if not vars(pynq.Device).get("_devices", True):
            del pynq.Device._devices
        try:
            return list(pynq.Device.devices)
        except BaseException as error:
            with suppress(AttributeError):
                del pynq.Device._devices
            if not isinstance(error, Exception):
                raise
            raise DeviceError(
                f"no PYNQ device: pynq fails to look for one: {error_text(error)}"
            ) from error


@contextmanager
def _event_loop() -> Iterator[None]:
    """Give this thread an event loop, which pynq's device asks for; most threads have none."""
    try:
        asyncio.get_event_loop()
    except RuntimeError:
        asyncio.set_event_loop(interrupt_loop())
        try:
            yield
        finally:
            asyncio.set_event_loop(None)
    else:
        yield


def board_names(device: Any) -> list[str]:
    """What the board is called: by the device tree and by pynq; the simulated one by its name."""
    if hasattr(device, "supply_overlay"):
        return [str(device.name)]
    names = []
    for name in ("chosen/pynq_board", "model"):
        with suppress(OSError):
            names.append(
                (DEVICE_TREE / name).read_bytes().decode("utf-8", "replace").strip("\0 \n")
            )
    return names


def check_board(device: Any, built_for: str) -> None:
    """Refuse an overlay that was built for another board, as far as the board's name is known.

    Raises:
        DeviceError: names both boards.
    """
    there = board_names(device)
    plain = [re.sub("[^a-z0-9]", "", name.lower()) for name in there]
    known = [board for board in BOARDS if any(board in name for name in plain)]
    if known and built_for not in known:
        raise DeviceError(
            f"the overlay is built for {built_for}, this board is {', '.join(there)}; build it "
            f"with BOARD={known[0]}, as overlays/README.md says"
        )


class DeviceResources:
    """What this process must give back: the lock, the buffers, and a kernel that may be running.

    `release` is the finalizer of the backend, so this object holds no reference to the backend.
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        self.pid = os.getpid()
        self.found: FoundOverlay | None = None
        self.overlay: KgrcOverlay | None = None
        self.buffers: dict[str, Any] = {}
        self.running = False
        """Whether the kernel may be running, and so writing to the buffers."""
        self.failure: str | None = "it was not opened"
        """Why the device must be programmed again; None while it is as after opening."""
        self.lock: DeviceLock | None = None

    def acquire(self) -> None:
        """Lock the device.

        Raises:
            DeviceError: another process holds it.
        """
        self.lock = DeviceLock(str(self.device.tag))

    def allocate(self, sizes: dict[str, int], cacheable: bool) -> None:
        """Have a contiguous buffer of at least `sizes` bytes under each name.

        Buffers that are large enough are kept with their contents.

        Raises:
            DeviceError: not enough contiguous memory; all buffers are freed then.
        """
        total, free = sum(sizes.values()), cma_free(self.device)
        parts = ", ".join(f"{name} {size / MIB:.1f}" for name, size in sizes.items())
        left = "unknown" if free is None else f"{free / MIB:.1f}"
        log.info("contiguous memory: %.1f MiB needed (%s), %s MiB free", total / MIB, parts, left)
        self.free(sizes)
        try:
            for name, size in sizes.items():
                if name not in self.buffers:
                    self.buffers[name] = pynq.allocate(
                        (size // 8,), np.uint64, target=self.device, cacheable=cacheable
                    )
        except Exception as error:
            self.free()
            if not isinstance(error, (RuntimeError, OSError, MemoryError)):  # not pynq's words
                raise
            raise DeviceError(
                f"not enough contiguous memory (CMA): {total / MIB:.1f} MiB are needed ({parts}), "
                f"{left} MiB were free: {error_text(error)}. Close other sessions and overlays, "
                f"boot with a larger pool (kernel argument cma=512M), or compile for a design "
                f"of fewer bits or a smaller clip"
            ) from error

    def free(self, sizes: dict[str, int] | None = None) -> None:
        """Free the buffers smaller than `sizes` bytes, or all of them. The kernel must be idle.

        A buffer that pynq fails to free is logged; the others are freed all the same.
        """
        with ExitStack() as each:  # calls all of them, whatever one of them raises
            for name in tuple(self.buffers):
                if sizes is None or self.buffers[name].nbytes < sizes[name]:
                    each.callback(self._free_buffer, name)

    def _free_buffer(self, name: str) -> None:
        try:
            self.buffers.pop(name).freebuffer()
        except Exception as error:
            log.warning("pynq fails to free the buffer of %s: %s", name, error_text(error))

    def stop(self) -> None:
        """Stop a kernel that may be running, by programming the device again."""
        if self.running and self.overlay is not None:
            with warnings_ignored():
                self.overlay.download()
        self.running = False

    def release(self) -> None:
        """Stop the kernel, free the buffers, release the lock. A second call does nothing.

        What fails is logged, and the rest is released all the same. In a forked child this does
        nothing at all: the resources belong to the parent.
        """
        if os.getpid() != self.pid:
            return
        with ExitStack() as steps:  # calls the last one first, and all of them
            steps.callback(self._unlock)
            steps.callback(self._leave_overlay)
            steps.callback(self.free)
            steps.callback(self._stop_at_last)

    def _stop_at_last(self) -> None:
        try:
            self.stop()
        except Exception as error:
            log.warning("the device cannot be programmed again: %s", error_text(error))

    def _leave_overlay(self) -> None:
        """Keep the overlay for the next backend of this process, if the device is sound."""
        if self.overlay is not None and self.failure is None and not self.running:
            self.device.kgrc_overlay = (self.pid, self.found, self.overlay)
        self.overlay = None

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def left_overlay(self, found: FoundOverlay) -> KgrcOverlay | None:
        """The same overlay, of the same files, if a backend of this process left it loaded."""
        pid, left, overlay = vars(self.device).pop("kgrc_overlay", (0, None, None))
        same = pid == self.pid and left == found and overlay.holds_device()
        return overlay if same else None

    def keep_in_child(self) -> None:
        """In a forked child: keep the buffers as long as the process lives.

        The child shares the parent's handle of the device, so that to free a buffer here would
        free the parent's.
        """
        for buffer in self.buffers.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(buffer))


def cma_free(device: Any) -> int | None:
    """Free contiguous memory (CMA) in bytes; None if it cannot be determined."""
    if hasattr(device, "cma_free"):
        return int(device.cma_free)
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) << 10 for line in lines if line.startswith("CmaFree:")]
    return sizes[0] if sizes else None


def error_text(error: BaseException) -> str:
    """An exception's type and message, without the exceptions it is chained to.

    pynq often chains a harmless exception before the one that matters.
    """
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextmanager
def device_errors(verb: str) -> Iterator[None]:
    """Turn every exception but a KgrcError into a DeviceError that begins with `verb`."""
    try:
        yield
    except KgrcError:
        raise
    except Exception as error:
        raise DeviceError(f"{verb}: the device fails: {error_text(error)}") from error


@contextmanager
def warnings_ignored() -> Iterator[None]:
    """Ignore warnings: pynq issues some on every machine that is not a board."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_loops: list[asyncio.AbstractEventLoop] = []


def interrupt_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop in which interrupts are awaited; None inside a running loop (a notebook).

    There is one per process: pynq binds its interrupt file to the first loop that uses it.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        return None
    if not _loops:
        _loops.append(asyncio.new_event_loop())
        atexit.register(_loops[0].close)
    loop = _loops[0]
    return None if loop.is_running() else loop


Result = TypeVar("Result")


def run_in(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in the loop; whatever ends it, nothing of it is left there.

    Ctrl-C ends the loop and not the coroutine: the rest of it would end a later one.
    """
    task = loop.create_task(work)
    try:
        return loop.run_until_complete(task)
    except BaseException:
        task.cancel()
        for _ in range(3):  # the cancellation, what awaits it, and a request to stop the loop
            loop.call_soon(loop.stop)
            loop.run_forever()
        raise
