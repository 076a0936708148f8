"""The accelerator's kernel under PYNQ: the driver of its registers, and its overlay.

pynq imports this file by the entry point `pynq.lib`, which binds `KgrcIp` to the kernel's VLNV.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import msgspec
import pynq
from pynq.pl_server import global_state

from pynq_kgrc.accelerator.header import MANAGER, REGISTERS, START, VLNV
from pynq_kgrc.errors import DeviceError

SHUTDOWN_SECONDS = 0.1
"""How long the open bursts of a memory port may take to end; a burst takes microseconds."""

log = logging.getLogger(__name__)


# ---- what the device holds, without an access to its logic ------------------------------------


def has_manager(device: Any) -> bool:
    """Whether the device is programmed by Linux' FPGA manager; the simulated board is not."""
    return hasattr(device, "BS_FPGA_MAN")


def manager_state(device: Any) -> str | None:
    """What the FPGA manager says of the logic, such as "operating"; None if there is none."""
    if not has_manager(device):
        return None
    return Path(device.BS_FPGA_MAN).with_name("state").read_text("ascii").strip()


def check_bitstream(device: Any, bitstream: str, found: str = "") -> None:
    """Raise unless the device holds the bitstream of that file; accesses no register.

    It asks the FPGA manager, and the record that pynq keeps for all processes.

    Args:
        device: a pynq.Device; one without an FPGA manager passes.
        bitstream: path of the .bit.
        found: how the error begins.

    Raises:
        DeviceError: what the device holds, as far as it is known.
    """
    state = manager_state(device)
    if state is None:
        return
    if state != "operating":
        raise DeviceError(f"{found}its logic is not programmed (FPGA manager: {state})")
    record = _record()
    if record is None:
        raise DeviceError(f"{found}pynq has no record of the bitstream that is loaded")
    if record.bitfile_hash != global_state.bitstream_hash(bitstream):
        raise DeviceError(
            f"{found}it holds {record.bitfile_name}, loaded {record.timestamp}, not {bitstream}"
        )


class Record(msgspec.Struct):
    """What pynq keeps, for all processes, of the bitstream that it loaded last."""

    bitfile_name: str
    timestamp: str
    bitfile_hash: str = ""
    """SHA-1 of the file when it was loaded, hexadecimal."""
    shutdown_ips: dict[str, dict[str, Any]] = {}
    """Name of a shutdown manager -> its `base_addr`."""

    def ports(self) -> dict[str, int]:
        """The shutdown managers: name -> physical address."""
        return {name: int(port["base_addr"]) for name, port in self.shutdown_ips.items()}


def _record_path() -> Path | None:
    """The file of pynq's record, if it exists."""
    names = ("global_pl_state_.json", "global_pl_state.json")  # pynq 3.1 and later; pynq 3.0
    paths = (Path(global_state.STATE_DIR) / name for name in names)
    return next((path for path in paths if path.is_file()), None)


def _record() -> Record | None:
    """pynq's record; None if there is none or it cannot be understood.

    pynq's own function is not used: that of pynq 3.0 takes the hash of the file as it is now, and
    fails where it is gone.
    """
    path = _record_path()
    try:
        return None if path is None else msgspec.json.decode(path.read_bytes(), type=Record)
    except msgspec.DecodeError:
        return None


def _record_stamp(device: Any) -> tuple[int, ...]:
    """Changes when a process of this machine loads another bitstream by pynq."""
    path = _record_path() if has_manager(device) else None
    if path is None:
        return ()
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


# ---- the kernel and its overlay -------------------------------------------------------------


class KgrcIp(pynq.DefaultIP):  # type: ignore[misc]
    """The driver of the kernel, bound by its VLNV; register names are `header.REGISTERS`.

    Raises:
        DeviceError: the overlay's .hwh lacks one of the registers.
    """

    bindto = [VLNV]  # noqa: RUF012 pynq reads a list

    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__(description=description)
        known = description.get("registers") or {}
        missing = [name for name in REGISTERS if name not in known]
        if missing:
            raise DeviceError(
                f"kgrc.hwh has no register {', '.join(missing)} of {VLNV}; it was made from "
                f"another version of hls_src. Copy the .hwh of this overlay's Vivado project"
            )
        # The offsets of the .hwh describe the hardware; those of REGISTERS are only expected.
        self._offsets = {name: int(known[name]["address_offset"]) for name in REGISTERS}

    def get(self, name: str) -> int:
        """The value of a register, 32 bits. Reading CTRL clears its DONE bit.

        Reading IP_ISR may clear it (see `clear_interrupt`).
        """
        return int(self.mmio.read(self._offsets[name]))

    def put(self, name: str, value: int) -> None:
        """Write 32 bits to a register."""
        self.mmio.write(self._offsets[name], int(value) & 0xFFFFFFFF)

    def start(self, first: int, count: int) -> None:
        """Start the kernel on `count` tasks from number `first` on."""
        self.put("first_task", first)
        self.put("task_count", count)
        self.put("CTRL", START)

    def digest(self) -> str:
        """The digest of the hardware's design, 16 hex digits; valid after a start."""
        return f"{self.get('digest_2') << 32 | self.get('digest_1'):016x}"

    def enable_interrupt(self) -> None:
        """Make the kernel raise its interrupt line when a run ends."""
        self.put("IP_IER", 1)
        self.put("GIER", 1)

    def clear_interrupt(self) -> None:
        """Acknowledge the interrupt in IP_ISR.

        With Vitis HLS from 2022.1 on a read clears it; with earlier versions a write toggles it.
        """
        if self.get("IP_ISR") & 1 and self.get("IP_ISR") & 1:
            self.put("IP_ISR", 1)


class KgrcOverlay(pynq.Overlay):  # type: ignore[misc]
    """An overlay that contains the kernel; `kernel_name` is the kernel's instance name.

    Raises:
        DeviceError: the .hwh lists no kernel with our VLNV.
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
            raise DeviceError(f"{bitfile_name}: no {VLNV} in its .hwh; it lists {there}")
        self.kernel_name = names[0]
        if not download:
            self._attach()

    _programmed = False
    """Whether the device held this overlay when it was last programmed or attached to."""

    def download(self, dtbo: str | None = None) -> None:
        """Program the device, once no memory port has a burst open.

        To program the logic while a kernel reads or writes memory may hang the processing system.

        Raises:
            DeviceError: a memory port does not come to rest; the device is not programmed.
        """
        state = manager_state(self.device)
        record = _record() if state == "operating" else None
        ports = {} if record is None else record.ports()
        if state in (None, "operating") and self.holds_device():
            ports = self.memory_ports()
        answers = bool(ports) and self.stop_memory_ports(ports)
        if state is not None and not (record and answers and os.path.isfile(record.bitfile_name)):
            # pynq would ask the ports of its record, which are not there, or fail to read it
            global_state.clear_global_state()
            record = None
        self._programmed = False  # until the last step of what follows
        if record is None or record.bitfile_hash != global_state.bitstream_hash(self.bitfile_name):
            # else pynq makes no record of a bitstream whose metadata it took from its cache
            with contextlib.suppress(AttributeError):
                del self.parser._from_cache
        with warnings.catch_warnings():
            # pynq stops the ports of the overlay loaded before, but programs even if they go on
            warnings.filterwarnings("error", message="Timeout for shutdown manager")
            try:
                super().download(dtbo)
            except UserWarning as warning:
                raise DeviceError(
                    f"the memory ports of the overlay that is loaded do not come to rest "
                    f"({warning}); to program the device now could hang the board. Turn the "
                    f"board off and on"
                ) from warning
        self._attach()

    def _attach(self) -> None:
        self._programmed, self._record = True, _record_stamp(self.device)

    def check_device(self) -> None:
        """Raise if the device no longer holds this overlay; accesses no register of it.

        Raises:
            DeviceError: says who programmed the device, or that its programming failed.
        """
        if not self.is_loaded():
            raise DeviceError(
                "the device was re-programmed: this process loaded another overlay; use one at "
                "a time"
            )
        if not self._programmed:
            raise DeviceError("the device is not programmed: the last attempt did not end")
        stamp = _record_stamp(self.device)
        if stamp != self._record:
            check_bitstream(self.device, self.bitfile_name, "the device was re-programmed: ")
            self._record = stamp

    def holds_device(self) -> bool:
        """Whether the device holds this overlay, as far as pynq and the FPGA manager know."""
        try:
            self.check_device()
        except DeviceError:
            return False
        return True

    def memory_ports(self) -> dict[str, int]:
        """The shutdown managers of this overlay's memory ports: name -> physical address."""
        entries = self.ip_dict.items()
        return {name: e["phys_addr"] for name, e in entries if e.get("type") == MANAGER}

    def stop_memory_ports(self, ports: dict[str, int]) -> bool:
        """Have the shutdown managers end all open bursts and take no new ones.

        Only programming the device lets bursts through again.

        Args:
            ports: the managers, as `memory_ports` names them.

        Returns:
            Whether any of them answers: the logic is there.

        Raises:
            DeviceError: a burst is still open after SHUTDOWN_SECONDS; names the memory port.
        """
        managers = {n: pynq.MMIO(a, 0x1000, device=self.device) for n, a in ports.items()}
        answers = False
        for manager in managers.values():
            manager.write(0, 1)
        end = time.monotonic() + SHUTDOWN_SECONDS
        for name, manager in managers.items():
            # the time is taken before the state is read: after a long sleep it is read once more
            late = False
            while (state := manager.read(0) & 0xF) != 0xF and not late:
                late = time.monotonic() > end
            answers |= state != 0
            if state == 0:
                # A manager keeps the request; what does not is no longer there.
                log.warning("%s does not answer: the logic was reset or lost its power", name)
            elif state != 0xF:
                raise DeviceError(
                    f"{name} has a burst open after {SHUTDOWN_SECONDS} s (state {state:#x}, not "
                    f"0xf); to program the device now could hang the board. Turn the board off "
                    f"and on"
                )
        return answers

    def bind(self) -> KgrcIp:
        """A new driver of the kernel; after a download the old driver's interrupt is dead."""
        return KgrcIp(self.ip_dict[self.kernel_name])
