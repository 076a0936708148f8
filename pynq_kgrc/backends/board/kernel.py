"""The accelerator's kernel under PYNQ: the driver of its registers, and its overlay.

pynq imports this file by the entry point `pynq.lib`, which binds `KgrcIp` to the kernel's VLNV.
"""

from __future__ import annotations

from typing import Any

import pynq

from pynq_kgrc.accelerator.header import REGISTERS, START, VLNV
from pynq_kgrc.errors import DeviceError


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

    def bind(self) -> KgrcIp:
        """A new driver of the kernel; after a download the old driver's interrupt is dead."""
        return KgrcIp(self.ip_dict[self.kernel_name])
