"""A simulated ZCU102 under the real pynq: memory, registers, interrupt, and fault injection.

Its kernel is the C-simulation. It reads descriptors, weights and maps by physical address from the
accelerator's copy of memory, which differs from the processor's copy until a flush. Time is not
simulated: a run takes as long as this host computes, and CTRL shows DONE `latency` seconds later.
The kernel counts no clock cycles, unless a test sets `clocks_per_trip`.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import struct
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pynq
from pynq._3rdparty import tinynumpy
from pynq.buffer import PynqBuffer
from pynq.interrupt import _InterruptController
from pynq.metadata.runtime_metadata_parser import RuntimeMetadataParser
from pynqmetadata.frontends import Metadata

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.header import (
    ADDRESSES,
    DONE,
    FIELDS,
    IDLE,
    INPUT_PORTS,
    KINDS,
    REGISTERS,
    START,
    STATUS,
    register_of,
)
from pynq_kgrc.accelerator.plan import ITEM_BITS
from pynq_kgrc.accelerator.tiling import beats_of_row
from pynq_kgrc.backends.board.simulated_overlay import (
    CONTROLLER_AT,
    KERNEL_AT,
    MANAGERS_AT,
    write_overlay,
)
from pynq_kgrc.backends.csim import build_library, library_lock, simulate
from pynq_kgrc.errors import DeviceError
from pynq_kgrc.quant import Array, ceil_div

MEMORY_BASE = 0x8_0000_0000
"""Above 4 GiB, so that a driver that forgets the high half of an address fails."""

MEMORY_BYTES = 512 << 20
PAGE = 4096

CRL_AT, CRF_AT = 0xFF5E_0000, 0xFD1A_0000
"""Physical addresses of the clock registers: CRL_APB and CRF_APB."""

READY = 8
"""Bit of CTRL: the kernel accepts a new start; the driver does not use it. Clears on read."""

PS_INTERRUPT = 121
"""Interrupt number (GIC) of pl_ps_irq0, the first line from the programmable logic."""

FAULTS = (
    "never_done",  # the kernel hangs
    "late",  # done after `delay` seconds
    "error_status",  # the status of a task is not 1 (done)
    "wrong_digest",  # hardware of another design
    "decode_error",  # the high half of an address register is lost
    "bad_table",  # a descriptor in memory points outside its buffer
    "interrupt_lost",
    "cma_full",
    "reprogrammed",  # another user programs the device while the kernel runs
    "power_cycle",  # the logic loses its power while the kernel runs
    "open_burst",  # a memory port does not come to rest when it is asked to, once
)


class BusError(RuntimeError):
    """A bus decode error: no register or buffer at the address."""


# ---- memory ---------------------------------------------------------------------------------


class SimulatedBuffer:
    """Contiguous memory: the processor's copy (`host`) and the accelerator's copy (`logic`)."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size
        self.span = ceil_div(size, PAGE) * PAGE
        self.host: Array = np.zeros(size, np.uint8)
        self.logic: Array = np.zeros(size, np.uint8)


class Memory:
    """Contiguous memory of a fixed size; has the interface of pynq's memory of a device."""

    def __init__(self, device: SimulatedDevice, size: int) -> None:
        self.device, self.size, self.base_address = device, size, MEMORY_BASE
        self.buffers: dict[int, SimulatedBuffer] = {}

    @property
    def free(self) -> int:
        return self.size - sum(buffer.span for buffer in self.buffers.values())

    def allocate(self, shape: Any, dtype: Any = "u4", **_: Any) -> Any:
        """A PynqBuffer at the first gap that is large enough (first fit)."""
        kind = np.dtype(dtype)
        size = max(1, int(np.prod(shape)) * kind.itemsize)
        if self.device.take("cma_full"):
            raise RuntimeError("BO allocation failed: Cannot allocate memory")
        at = self.base_address
        for buffer in sorted(self.buffers.values(), key=lambda b: b.address):
            if buffer.address - at >= size:
                break
            at = buffer.address + buffer.span
        made = SimulatedBuffer(at, size)
        if at + made.span > self.base_address + self.size:
            raise RuntimeError("BO allocation failed: Cannot allocate memory")
        self.buffers[at] = made
        array = PynqBuffer(
            shape,
            kind,
            buffer=made.host,
            bo=made,
            device=self.device,
            device_address=made.address,
            coherent=False,
        )
        # With `return_to` set, freebuffer() calls our return_pointer; else it would unmap memory.
        array.memory, array.pointer, array.return_to, array.freed = self, made, self, True
        weakref.finalize(made.host, self.buffers.pop, made.address, None)
        return array

    def return_pointer(self, buffer: SimulatedBuffer) -> None:
        """Free a buffer; called by pynq."""
        self.buffers.pop(buffer.address, None)

    def at(self, address: int) -> tuple[SimulatedBuffer, int]:
        """The allocated buffer that contains an address, and the offset within it."""
        for buffer in self.buffers.values():
            if buffer.address <= address < buffer.address + buffer.size:
                return buffer, address - buffer.address
        raise BusError(f"no buffer at {address:#x}")

    def bytes_at(self, address: int, count: int) -> Array:
        """The accelerator's copy of `count` bytes, as a view."""
        buffer, start = self.at(address)
        if start + count > buffer.size:
            raise BusError(f"{count} bytes at {address:#x} pass the end of their buffer")
        return buffer.logic[start : start + count]


# ---- registers ------------------------------------------------------------------------------


class Registers:
    """A block of read-write registers; offset -> value."""

    def __init__(self, values: dict[int, int] | None = None) -> None:
        self.values = dict(values or {})

    def read(self, offset: int) -> int:
        return self.values.get(offset, 0)

    def write(self, offset: int, value: int) -> None:
        self.values[offset] = value


class Controller(Registers):
    """The AXI interrupt controller, and the UIO device by which pynq waits for its interrupt.

    pynq disables a line after its interrupt, and enables it again when it next waits for it.
    """

    PENDING, ENABLED, ACKNOWLEDGE, ENABLE, DISABLE, MASTER = 0x04, 0x08, 0x0C, 0x10, 0x14, 0x1C

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel, self.enabled, self.latched = kernel, 0, 0
        self.waiting: list[Any] = []
        """asyncio.Events of pynq to set at the next interrupt."""
        self._loop: asyncio.AbstractEventLoop | None = None
        """The event loop in which they wait."""

    def read(self, offset: int) -> int:
        self.latched |= self.kernel.line()
        known = {
            0: self.latched,
            self.PENDING: self.latched & self.enabled,
            self.ENABLED: self.enabled,
        }
        return known.get(offset, super().read(offset))

    def write(self, offset: int, value: int) -> None:
        super().write(offset, value)
        if offset == self.ENABLED:
            self.enabled = value
        elif offset == self.ENABLE:
            self.enabled |= value
        elif offset == self.DISABLE:
            self.enabled &= ~value
        elif offset == self.ACKNOWLEDGE:
            self.latched &= ~value
        elif offset == self.MASTER:
            self.look_again()

    def add_event(self, event: Any, _number: int) -> None:
        """Set `event` at the next interrupt; called by pynq inside its event loop."""
        self.waiting.append(event)
        self._loop = asyncio.get_running_loop()
        self._deliver(self._loop)

    def look_again(self) -> None:
        """Deliver what is pending to events that wait already, in their loop."""
        if self.waiting and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon(self._deliver, self._loop)

    def _deliver(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the waiting events if an interrupt is pending, else try again when a run is due."""
        due = self.kernel.due
        if self.read(self.PENDING) and self.read(self.MASTER) == 3:
            events, self.waiting = self.waiting, []
            for event in events:
                loop.call_soon(event.set)
        elif self.waiting and due is not None:
            loop.call_later(max(1e-4, due - time.monotonic()), self._deliver, loop)


class Manager(Registers):
    """A shutdown manager: lets no burst of its memory port through once it is asked to."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel, self.state = kernel, 0

    def read(self, offset: int) -> int:
        return self.state

    def write(self, offset: int, value: int) -> None:
        if self.kernel.config is None:
            return
        self.state = 0xF if value & 1 else 0
        if self.state and self.kernel.is_running() and self.kernel.device.take("open_burst"):
            self.state = 1


class Kernel(Registers):
    """The kernel: its control registers as Vitis HLS makes them, and its runs."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self.device = device
        self.config: AcceleratorConfig | None = None
        self.due: float | None = None
        """time.monotonic() at which CTRL shows DONE; None if nothing runs or the run never ends."""
        self.error = ""
        """The bus decode error of the last run, or ""."""
        self.starts = 0
        self.busy_seconds = 0.0
        """Seconds that this host spent computing runs; benchmarks subtract them."""
        self._control = 0
        self._library: Any = None
        self._interrupt_lost = False

    def program(self, config: AcceleratorConfig | None) -> None:
        """Become the kernel of a design; with None, registers that keep nothing (no power)."""
        self.values.clear()
        self.due, self._interrupt_lost = None, False
        self.config, self._control = config, IDLE if config else 0
        if config is not None:
            try:
                self._library_path = library = build_library(config)
            except DeviceError as error:
                raise DeviceError(f"the simulated board runs the C-simulation: {error}") from error
            self._library = ctypes.CDLL(str(library))

    def is_running(self) -> bool:
        """Whether a run has been started and has not ended: bursts may be open."""
        self._finish_if_due()
        return bool(self._control & START) and not self._control & DONE

    def line(self) -> int:
        """The level of the interrupt line."""
        self._finish_if_due()
        on = self.values.get(REGISTERS["GIER"], 0) & self.values.get(REGISTERS["IP_ISR"], 0)
        return on & 1 and not self._interrupt_lost

    def read(self, offset: int) -> int:
        self._finish_if_due()
        if offset == REGISTERS["CTRL"]:
            value = self._control
            self._control &= ~(DONE | READY)  # both clear on read
            return value
        if offset == REGISTERS["IP_ISR"] and self.device.clears_on_read:
            return self.values.pop(offset, 0)
        return super().read(offset)

    def write(self, offset: int, value: int) -> None:
        if self.config is None:
            return
        if offset == REGISTERS["CTRL"]:
            if value & START and not self._control & START:
                began = time.perf_counter()
                self._start()
                self.busy_seconds += time.perf_counter() - began
        elif offset == REGISTERS["IP_ISR"]:
            self.values[offset] = self.values.get(offset, 0) ^ value
        else:
            super().write(offset, value)

    def _finish_if_due(self) -> None:
        if self.due is not None and time.monotonic() >= self.due:
            self.due, self._control = None, DONE | IDLE | READY
            self.values[REGISTERS["IP_ISR"]] = self.values.get(REGISTERS["IP_IER"], 0) & 1

    def _start(self) -> None:
        device = self.device
        first, count = self._number("first_task"), self._number("task_count")
        self.starts += 1
        self._control, self.due, self.error, self._interrupt_lost = START, None, "", False
        # No fault happens in a start without tasks, by which the driver asks for the digest.
        take: Callable[[str], bool] = device.take if count else lambda _: False
        if take("decode_error"):
            self.values[REGISTERS["weights0_2"]] = 0
        if take("bad_table"):
            # The high half of a descriptor's first 64-bit word is its field `source`.
            self._words64("tables")[first * len(FIELDS) // 2] |= np.uint64(0x7FFF_FFFF << 32)
        if take("never_done"):
            return
        latency = device.latency + (device.delay if take("late") else 0.0)
        losing_power = take("power_cycle")
        try:
            self._run(first, count // 2 if losing_power else count)
        except BusError as error:
            self.error = str(error)
            return
        if losing_power:
            for buffer in device.memory.buffers.values():
                buffer.logic[:] = 0xA5
            self.program(None)
            return
        if take("reprogrammed"):
            self.program(self.config)
            return
        if take("error_status"):
            status = device.memory.bytes_at(self._address("status"), 8 * len(STATUS) * count)
            status.view(np.uint64)[(count // 2) * len(STATUS)] = 0xDEAD
        self._interrupt_lost = take("interrupt_lost")
        self.due = time.monotonic() + latency
        device.controller.look_again()

    def _run(self, first: int, count: int) -> None:
        assert self.config is not None
        ports = [(0, 0)] * len(ADDRESSES)
        if count:
            self._check_accesses(self.config, first, count)
            ports = [self._memory_of(name) for name in ADDRESSES]
        digest = ctypes.c_uint64()
        with library_lock(self._library_path):
            fault = simulate(self._library, ports, digest, first, count)
        if fault:
            raise BusError(fault)
        if count and self.device.clocks_per_trip:
            size = 8 * len(STATUS)
            status = self.device.memory.bytes_at(
                self._address("status") + first * size, count * size
            )
            words = status.view(np.uint64).reshape(count, len(STATUS))
            trips = words[:, STATUS.index("array")]
            words[:, STATUS.index("clocks")] = np.ceil(trips * self.device.clocks_per_trip)
        found = digest.value ^ (1 if self.device.take("wrong_digest") else 0)
        self.values[REGISTERS["digest_1"]] = found & 0xFFFF_FFFF
        self.values[REGISTERS["digest_2"]] = found >> 32

    def _number(self, name: str) -> int:
        return self.values.get(REGISTERS[name], 0)

    def _address(self, name: str) -> int:
        register = register_of(name)
        return self._number(f"{register}_1") | self._number(f"{register}_2") << 32

    def _memory_of(self, name: str) -> tuple[int, int]:
        """Where a port's memory lies on this host, and its bytes."""
        buffer, start = self.device.memory.at(self._address(name))
        return buffer.logic.ctypes.data + start, buffer.size - start

    def _words64(self, name: str) -> Array:
        """The 64-bit words from a port's address to the end of its buffer."""
        buffer, start = self.device.memory.at(self._address(name))
        return buffer.logic[start : start + (buffer.size - start) // 8 * 8].view(np.uint64)

    def _check_accesses(self, config: AcceleratorConfig, first: int, count: int) -> None:
        """Raise BusError if a task leaves its buffers; the C-simulation itself does not check."""
        memory, tables, half = self.device.memory, self._words64("tables"), len(FIELDS) // 2
        memory.bytes_at(self._address("status"), 8 * len(STATUS) * (first + count))
        for number in range(first, first + count):
            descriptor = tables[number * half : (number + 1) * half]
            if descriptor.size < half:
                raise BusError(f"no descriptor {number} in the tables")
            field = dict(zip(FIELDS, descriptor.view(np.int32).tolist(), strict=True))
            for name, start, size in _accesses(config, field, self._words64("items")):
                if start < 0:
                    raise BusError(f"task {number} accesses {name} before its start")
                memory.bytes_at(self._address(name) + start, size)


def _accesses(
    config: AcceleratorConfig, field: dict[str, int], items: Array
) -> list[tuple[str, int, int]]:
    """The memory that a task accesses: port, first byte and number of bytes.

    Raises:
        BusError: the fields of the descriptor or its plan are out of range.
    """
    positive = [n for n in FIELDS if n[-2:] in ("_d", "_h", "_w") and n[:3] not in ("pad", "sho")]
    wrong = [name for name in positive if field[name] < 1]
    if wrong or not 0 <= field["kind"] < len(KINDS):
        raise BusError(f"a descriptor with {', '.join(wrong) or 'kind'} out of range")

    def beats(what: str, vectors: int) -> int:
        depth, height, width = (field[f"{what}_{axis}"] for axis in "dhw")
        return vectors * depth * height * beats_of_row(config, width)

    start, count = field["items"], field["item_count"]
    if start < 0 or count < 1 or start + count > items.size:
        raise BusError("a plan outside the tables")
    items = items[start : start + count]
    sources = int(ITEM_BITS["channel_tile"].get(items).max()) + 1
    targets = int(ITEM_BITS["vectors"].get(items).sum())
    groups = sum(mask.bit_count() for mask in ITEM_BITS["mask"].get(items).tolist())
    steps = field["tap_tiles"] * field["col_steps"] * field["row_steps"]
    chunks = groups * steps if KINDS[field["kind"]] == "convolution" else 0
    if field["chunks"] != chunks:
        raise BusError(f"{field['chunks']} chunks in the descriptor, {chunks} in its plan")
    # The max pool is fused into the task, so the output in memory is smaller by it.
    stored = dict(field)
    for axis in "dhw":
        stored[f"out_{axis}"] = field[f"out_{axis}"] // field[f"pool_{axis}"]
    field, beat, port = stored, config.beat_bytes, config.weight_port_words * 8
    chunk = field["chunk_beats"] * port
    wide = 16 // config.bits if field["wide"] else 1
    found = [
        *((name, field["source"] * beat, beats("in", sources) * beat) for name in INPUT_PORTS),
        ("output", field["target"] * beat, beats("out", targets) * wide * beat),
        ("weights0", field["even_weights"] * port, ceil_div(chunks, 2) * chunk),
        ("weights1", field["odd_weights"] * port, chunks // 2 * chunk),
        ("scales", field["scales"] * 8, 16 * config.tn * targets),
        ("indices", field["indices"] * 8, chunks * config.index_words * 8),
    ]
    if field["has_shortcut"]:
        found.append(("shortcut", field["shortcut"] * beat, beats("shortcut", targets) * beat))
    return [entry for entry in found if entry[2]]


# ---- the device -----------------------------------------------------------------------------


@dataclass
class RegisterHook:
    """Redirects the accesses of pynq's register array (tinynumpy) to the simulated registers."""

    device: SimulatedDevice
    base: int

    def read(self, offset: int, length: int) -> bytes:
        return self.device.read_registers(self.base + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        self.device.write_registers(self.base + offset, bytes(data))


class SimulatedDevice(pynq.Device):  # type: ignore[misc]
    """A simulated board as a pynq device.

    Args:
        tag: the device's name; one process at a time can hold the device of a name.
        memory_bytes: size of the contiguous memory.
        latency: seconds from the end of computing until CTRL shows DONE.
        interrupt: whether its overlays connect the kernel's interrupt.
        clears_on_read: a read clears IP_ISR (Vitis HLS from 2022.1 on); else a write toggles it.
    """

    def __init__(
        self,
        tag: str | None = None,
        memory_bytes: int = MEMORY_BYTES,
        latency: float = 0.0,
        interrupt: bool = True,
        clears_on_read: bool = True,
    ) -> None:
        super().__init__(tag or f"simulated-{os.getpid()}")
        # The capabilities of pynq's own embedded device, so that pynq runs the same code.
        self.capabilities = {"REGISTER_RW": False, "MEMORY_MAPPED": True, "CALLABLE": False}
        self.name, self.arch = "zcu102-simulated", "aarch64"
        self.latency, self.delay = latency, 0.05
        self.interrupt, self.clears_on_read = interrupt, clears_on_read
        self.faults: list[str] = []
        """Faults (of FAULTS) to inject, each once, at the next opportunity."""
        self.clocks_per_trip = 0.0
        """Clock cycles that the kernel reports for a trip of the array, as if its loop had that II;
        0 reports none, as the C-simulation does."""
        self.downloads = 0
        self.hung = False
        """Whether the device was programmed while the kernel had a burst open; stays so."""
        self.memory = Memory(self, memory_bytes)
        self.kernel = Kernel(self)
        self.controller = Controller(self.kernel)
        _InterruptController._uio_devices[PS_INTERRUPT] = self.controller
        # Every PLL runs at 33.333 MHz * 90 / 2 = 1500 MHz.
        plls = dict.fromkeys((0x20, 0x24, 0x2C, 0x30, 0x38), 90 << 8 | 1 << 16)
        dividers = {0xC0 + 4 * i: 1 << 24 | 1 << 16 | 15 << 8 for i in range(4)}
        self.managers = {address: Manager(self.kernel) for address in MANAGERS_AT.values()}
        self._blocks: dict[int, tuple[int, Registers]] = {
            **{address: (0x1_0000, manager) for address, manager in self.managers.items()},
            KERNEL_AT: (0x1_0000, self.kernel),
            CONTROLLER_AT: (0x1_0000, self.controller),
            CRL_AT: (0x1000, Registers({**plls, **dividers})),
            CRF_AT: (0x1000, Registers({**plls, 0x60: 0x100})),
        }
        self._overlays: Path | None = None
        # pynq caches the clocks of the first device: drop that cache.
        if "_real_instance" in vars(pynq.Clocks):
            del pynq.Clocks._real_instance
        if not hasattr(pynq.Clocks, "set_device"):
            # pynq 3.0 chooses the class by the host's processor; it reads the active device.
            pynq.Device.active_device = self
            pynq.Clocks._real_instance = pynq.ps._ClocksUltrascale()

    def take(self, fault: str) -> bool:
        """Whether to inject that fault now; it is removed from `faults`."""
        if fault not in self.faults:
            return False
        self.faults.remove(fault)
        return True

    @property
    def cma_free(self) -> int:
        """Free contiguous memory in bytes."""
        return self.memory.free

    def supply_overlay(self, config: AcceleratorConfig) -> Path:
        """The folder of an overlay of that design; written on first use, deleted at exit."""
        if self._overlays is None:
            self._overlays = Path(tempfile.mkdtemp(prefix="pynq_kgrc-overlays-"))
            weakref.finalize(self, shutil.rmtree, self._overlays, ignore_errors=True)
        folder = self._overlays / f"{config.digest}-{int(self.interrupt)}"
        if not folder.is_dir():
            write_overlay(folder, config, interrupt=self.interrupt)
        return folder

    # ---- registers (called by pynq)

    def _block(self, address: int) -> tuple[Registers, int]:
        if self.hung:
            raise BusError("a memory port hangs: the device was programmed with a burst open")
        for base, (size, block) in self._blocks.items():
            if base <= address < base + size:
                return block, address - base
        raise BusError(f"no register at {address:#x}")

    def read_registers(self, address: int, length: int) -> bytes:
        """Read 32-bit registers at a physical address, little-endian."""
        words = [
            block.read(offset) & 0xFFFF_FFFF
            for block, offset in (self._block(a) for a in range(address, address + length, 4))
        ]
        return struct.pack(f"<{len(words)}I", *words)

    def write_registers(self, address: int, data: bytes) -> None:
        """Write 32-bit registers at a physical address, little-endian."""
        for i, (word,) in enumerate(struct.iter_unpack("<I", data)):
            block, offset = self._block(address + 4 * i)
            block.write(offset, word)

    def mmap(self, base_addr: int, length: int) -> Any:
        """The registers from a physical address on, as an array."""
        return tinynumpy.ndarray(
            shape=(length // 4,), dtype="u4", hook=RegisterHook(self, base_addr)
        )

    # ---- memory (called by pynq)

    @property
    def default_memory(self) -> Memory:
        return self.memory

    def get_memory(self, _description: Any) -> Memory:
        return self.memory

    def flush(self, buffer: SimulatedBuffer, _offset: int, _address: int, _size: int) -> None:
        """Copy the whole buffer to the accelerator: pynq since 3.1 ignores offset and size."""
        self._allocated(buffer).logic[:] = buffer.host

    def invalidate(self, buffer: SimulatedBuffer, _offset: int, _address: int, _size: int) -> None:
        self._allocated(buffer).host[:] = buffer.logic

    def _allocated(self, buffer: SimulatedBuffer) -> SimulatedBuffer:
        if self.memory.buffers.get(buffer.address) is not buffer:
            raise BusError("not a buffer of pynq.allocate, or already freed")
        return buffer

    # ---- bitstreams (called by pynq)

    def get_bitfile_metadata(self, bitfile_name: str, partial: bool = False) -> Any:
        """The parsed .hwh beside a bitstream, with the simulated memory added."""
        path = Path(bitfile_name).with_suffix(".hwh")
        if not path.is_file():
            raise RuntimeError("Unable to find metadata for bitstream")
        parser = RuntimeMetadataParser(Metadata(input=str(path)))
        parser.mem_dict["PSDDR"] = {
            "used": 1,
            "idx": 0,
            "base_address": self.memory.base_address,
            "size": self.memory.size,
            "streaming": False,
            "raw_type": 1,
            "tag": "PSDDR",
            "state": None,
        }
        return parser

    def download(self, bitstream: Any, parser: Any = None) -> None:
        """Become the design in the "bitstream" (its JSON)."""
        self.shutdown()
        self.program(Path(bitstream.bitfile_name).read_bytes())
        self.post_download(bitstream, parser, self.name)

    def program(self, bitstream: bytes) -> None:
        """Become the design in a "bitstream": the part of a download that the logic does."""
        design = msgspec.json.decode(bitstream, type=AcceleratorConfig)
        self.downloads += 1
        if self.kernel.is_running():
            self.hung = any(manager.state != 0xF for manager in self.managers.values())
        for manager in self.managers.values():
            manager.state = 0
        self.kernel.program(design)

    def shutdown(self) -> None:
        """Stop the memory ports as `pynq.Device.shutdown` does: a timeout is only a warning."""
        for address in self.managers if self.kernel.config is not None else ():
            self.write_registers(address, struct.pack("<I", 1))
            for _ in range(16000):
                if self.read_registers(address, 4)[0] == 0xF:
                    break
            else:
                warnings.warn(
                    "Timeout for shutdown manager. It's likely the configured bitstream and "
                    "metadata don't match.",
                    stacklevel=2,
                )

    def gen_cache(self, bitstream: Any, parser: Any = None) -> None:
        """Required by pynq; nothing to cache."""

    def close(self) -> None:
        """Required by pynq; nothing to close."""


_shared: list[SimulatedDevice] = []


def shared_device() -> SimulatedDevice:
    """The simulated board of this process, made pynq's active device."""
    if not _shared:
        _shared.append(SimulatedDevice())
    pynq.Device.active_device = _shared[0]
    return _shared[0]
