"""The kernel on a PYNQ device: its registers, its overlay, and what a process holds of a device."""

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

import pynq

from pynq_kgrc.accelerator.header import REGISTERS, START, VLNV
from pynq_kgrc.backends.board.lock import DeviceLock
from pynq_kgrc.errors import DeviceError, KgrcError

SIMULATE = "PYNQ_KGRC_SIMULATE"
"""Environment variable: use a simulated board."""

log = logging.getLogger(__name__)


class KgrcIp(pynq.DefaultIP):  # type: ignore[misc]
    """The driver of the kernel, bound by its VLNV; registers by name (accelerator.header)."""

    bindto = [VLNV]  # noqa: RUF012 the form that pynq reads

    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__(description=description)
        known = description.get("registers") or {}
        missing = [name for name in REGISTERS if name not in known]
        if missing:
            raise DeviceError(
                f"kgrc.hwh has no register {', '.join(missing)} of {VLNV}; it is of another "
                f"version of hls_src"
            )
        # what Vivado wrote is what the hardware has
        self._offsets = {name: int(known[name]["address_offset"]) for name in REGISTERS}

    def get(self, name: str) -> int:
        """The value of a register, 32 bits. CTRL and IP_ISR change by being read."""
        return int(self.mmio.read(self._offsets[name]))

    def put(self, name: str, value: int) -> None:
        """Write 32 bits to a register."""
        self.mmio.write(self._offsets[name], int(value) & 0xFFFFFFFF)

    def place(self, addresses: dict[str, int]) -> None:
        """Write the registers of addresses, both words of each."""
        for name, value in addresses.items():
            self.put(name, value)

    def start(self, first: int, count: int) -> None:
        """Run `count` tasks from `first` on."""
        self.put("first_task", first)
        self.put("task_count", count)
        self.put("CTRL", START)

    def digest(self) -> str:
        """The design's digest, 16 hex digits; valid after a start."""
        return f"{self.get('digest_2') << 32 | self.get('digest_1'):016x}"

    def enable_interrupt(self) -> None:
        """Let the end of a run raise the interrupt."""
        self.put("IP_IER", 1)
        self.put("GIER", 1)

    def settle_interrupt(self) -> None:
        """Take the interrupt back: older tools clear it by a write, newer ones by a read."""
        if self.get("IP_ISR") & 1 and self.get("IP_ISR") & 1:
            self.put("IP_ISR", 1)


class KgrcOverlay(pynq.Overlay):  # type: ignore[misc]
    """An overlay with one kernel in it; `kernel_name` says under which name.

    Raises:
        DeviceError: there is no kernel in it.
    """

    def __init__(
        self,
        bitfile_name: str,
        dtbo: str | None = None,
        download: bool = True,
        ignore_version: bool = False,
        device: Any = None,
    ) -> None:
        super().__init__(
            bitfile_name,
            dtbo=dtbo,
            download=download,
            ignore_version=ignore_version,
            device=device,
        )
        kinds = {name: str(entry.get("type")) for name, entry in self.ip_dict.items()}
        names = [name for name, kind in kinds.items() if kind == VLNV]
        if not names:
            there = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "nothing"
            raise DeviceError(f"{bitfile_name}: no {VLNV} in its .hwh; there is {there}")
        self.kernel_name = names[0]

    def bind(self) -> KgrcIp:
        """A new driver of the kernel; after a download the old one's interrupt is dead."""
        return KgrcIp(self.ip_dict[self.kernel_name])


class Held:
    """What has to be given back, whatever happens: the running kernel, buffers and the lock."""

    def __init__(self, device: Any) -> None:
        self.pid = os.getpid()
        self.overlay: KgrcOverlay | None = None
        self.buffers: dict[str, Any] = {}
        self.running = False
        self.lock = DeviceLock(str(device.tag))

    def stop(self) -> None:
        """Stop a kernel that may be running, by programming the device again."""
        if self.running and self.overlay is not None:
            with quiet():
                self.overlay.download()
        self.running = False

    def free(self, least: dict[str, int] | None = None) -> None:
        """Free the buffers of fewer bytes than `least`, or all; the device has to be idle."""
        for name in tuple(self.buffers):
            if least is None or self.buffers[name].nbytes < least[name]:
                self.buffers.pop(name).freebuffer()

    def release(self) -> None:
        """Give everything back; twice is no error, and a forked child gives back nothing."""
        if os.getpid() != self.pid:
            return
        try:
            self.stop()
        except Exception as error:
            log.warning("the device cannot be programmed again: %s", last_cause(error))
        finally:
            self.free()
            self.overlay = None
            self.lock.release()


def find_device() -> Any:
    """The device to use: a simulated one if PYNQ_KGRC_SIMULATE says so, else pynq's.

    Raises:
        DeviceError: there is none; says what is missing.
    """
    if os.environ.get(SIMULATE, "0") not in ("", "0"):
        return import_module("pynq_kgrc.backends.board.simulated").shared_device()
    with quiet():
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


def cma_free(device: Any) -> int | None:
    """Bytes of contiguous memory that are free, or none if it cannot be known."""
    if hasattr(device, "cma_free"):
        return int(device.cma_free)
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) << 10 for line in lines if line.startswith("CmaFree:")]
    return sizes[0] if sizes else None


def last_cause(error: BaseException) -> str:
    """The text of an error. pynq chains a harmless one before the one that counts: the last."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextmanager
def device_errors(verb: str) -> Iterator[None]:
    """Whatever pynq raises becomes a DeviceError."""
    try:
        yield
    except KgrcError:
        raise
    except Exception as error:
        raise DeviceError(f"{verb}: the device fails: {last_cause(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that pynq has for every machine that is not a board."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_loops: list[asyncio.AbstractEventLoop] = []


def waiting_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that interrupts are waited for in; none inside another loop, as in a notebook.

    There is one to a process, since pynq binds its interrupt file to the first that asks.
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
