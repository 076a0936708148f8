"""A PYNQ device as this process uses it: which one, its memory, and what must be given back."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pynq

from pynq_kgrc.backends.board import SIMULATE, simulation_requested
from pynq_kgrc.backends.board.kernel import KgrcOverlay
from pynq_kgrc.backends.board.lock import DeviceLock
from pynq_kgrc.errors import DeviceError, KgrcError

MIB = 1 << 20

log = logging.getLogger(__name__)


def find_device() -> Any:
    """The device to use: the simulated one if PYNQ_KGRC_SIMULATE selects it, else pynq's.

    Raises:
        DeviceError: there is none; says what is missing.
    """
    if simulation_requested():
        return import_module("pynq_kgrc.backends.board.simulated").shared_device()
    with warnings_ignored():
        devices = pynq.Device.devices
    if not devices:
        if "XILINX_XRT" not in os.environ:
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


class DeviceResources:
    """What this process must give back: the lock, the buffers, and a kernel that may be running.

    `release` is the finalizer of the backend, so this object holds no reference to the backend.

    Raises:
        DeviceError: another process holds the device.
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        self.pid = os.getpid()
        self.overlay: KgrcOverlay | None = None
        self.buffers: dict[str, Any] = {}
        self.running = False
        """Whether the kernel may be running, and so writing to the buffers."""
        self.lock = DeviceLock(str(device.tag))

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
            raise DeviceError(
                f"not enough contiguous memory (CMA): {total / MIB:.1f} MiB are needed ({parts}), "
                f"{left} MiB were free: {error_text(error)}. Close other sessions and overlays, "
                f"boot with a larger pool (kernel argument cma=512M), or compile for a design "
                f"of fewer bits or a smaller clip"
            ) from error

    def free(self, sizes: dict[str, int] | None = None) -> None:
        """Free the buffers smaller than `sizes` bytes, or all of them. The kernel must be idle."""
        for name in tuple(self.buffers):
            if sizes is None or self.buffers[name].nbytes < sizes[name]:
                self.buffers.pop(name).freebuffer()

    def stop(self) -> None:
        """Stop a kernel that may be running, by programming the device again."""
        if self.running and self.overlay is not None:
            with warnings_ignored():
                self.overlay.download()
        self.running = False

    def release(self) -> None:
        """Stop the kernel, free the buffers, release the lock. A second call does nothing.

        In a forked child this does nothing at all: the resources belong to the parent.
        """
        if os.getpid() != self.pid:
            return
        try:
            self.stop()
        except Exception as error:
            log.warning("the device cannot be programmed again: %s", error_text(error))
        finally:
            self.free()
            self.overlay = None
            self.lock.release()


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
