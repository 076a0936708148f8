"""A ZCU102 made of Python, for the real pynq: memory, registers, interrupt, and faults on demand.

Its kernel is the C-simulation: it finds descriptors, weights and maps by physical address in the
accelerator's view of memory, which differs from the processor's until it is flushed. It keeps no
time: what it computes takes as long as this host needs, and shows as done `latency` seconds later.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import json
import os
import shutil
import struct
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

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
    KINDS,
    REGISTERS,
    START,
    STATUS,
    VLNV,
    register_of,
)
from pynq_kgrc.accelerator.plan import ITEM_BITS
from pynq_kgrc.accelerator.tiling import beats_of_row
from pynq_kgrc.backends.board.overlays import BIT, HWH, MANIFEST, Manifest
from pynq_kgrc.backends.csim import build_library
from pynq_kgrc.errors import DeviceError
from pynq_kgrc.quant import Array, ceil_div

MEMORY_BASE = 0x8_0000_0000
"""Above 4 GiB, so that a forgotten high word shows."""

MEMORY_BYTES = 512 << 20
PAGE = 4096

KERNEL_AT, CONTROLLER_AT = 0xA000_0000, 0xA001_0000
CRL_AT, CRF_AT = 0xFF5E_0000, 0xFD1A_0000

PS_INTERRUPT = 121
"""The processor's number of the first interrupt line of the programmable logic."""

FAULTS = (
    "never_done",  # the kernel hangs
    "late",  # done after `delay` seconds
    "error_status",  # a task reports something else than done
    "wrong_digest",  # hardware of another design
    "decode_error",  # a word of an address is lost
    "bad_table",  # a descriptor in memory points outside
    "interrupt_lost",
    "cma_full",
    "reprogrammed",  # somebody else loads the device while the kernel runs
    "power_cycle",  # the logic loses its power while the kernel runs
)


class BusError(RuntimeError):
    """An access that nothing answers."""


# ---- memory ---------------------------------------------------------------------------------


class Weak(np.ndarray):  # type: ignore[type-arg]
    """An array whose end can be watched for."""


class Buffer:
    """A piece of contiguous memory, as the processor sees it and as the logic does."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size
        self.span = ceil_div(size, PAGE) * PAGE
        self.host: Array = np.zeros(size, np.uint8).view(Weak)
        self.logic: Array = np.zeros(size, np.uint8)


class Memory:
    """Finite contiguous memory; plays the part of pynq's memory of a device."""

    def __init__(self, device: SimulatedDevice, size: int) -> None:
        self.device, self.size, self.base_address = device, size, MEMORY_BASE
        self.buffers: dict[int, Buffer] = {}

    @property
    def free(self) -> int:
        return self.size - sum(buffer.span for buffer in self.buffers.values())

    def allocate(self, shape: Any, dtype: Any = "u4", **_: Any) -> Any:
        """A pynq buffer at the first gap that is large enough."""
        kind = np.dtype(dtype)
        size = max(1, int(np.prod(shape)) * kind.itemsize)
        if self.device.take("cma_full"):
            raise RuntimeError("BO allocation failed: Cannot allocate memory")
        at = self.base_address
        for buffer in sorted(self.buffers.values(), key=lambda b: b.address):
            if buffer.address - at >= size:
                break
            at = buffer.address + buffer.span
        made = Buffer(at, size)
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
        # pynq's own way to give back what is kept in a pool; the other one unmaps memory
        array.memory, array.pointer, array.return_to, array.freed = self, made, self, True
        weakref.finalize(made.host, self.buffers.pop, made.address, None)
        return array

    def return_pointer(self, buffer: Buffer) -> None:
        """pynq gives a buffer back."""
        self.buffers.pop(buffer.address, None)

    def at(self, address: int) -> tuple[Buffer, int]:
        """The live buffer that holds an address, and how far in."""
        for buffer in self.buffers.values():
            if buffer.address <= address < buffer.address + buffer.size:
                return buffer, address - buffer.address
        raise BusError(f"no buffer at {address:#x}")

    def bytes_at(self, address: int, count: int) -> Array:
        """The bytes that the logic reads or writes there."""
        buffer, start = self.at(address)
        if start + count > buffer.size:
            raise BusError(f"{count} bytes at {address:#x} pass the end of their buffer")
        return buffer.logic[start : start + count]


# ---- registers ------------------------------------------------------------------------------


class Registers:
    """A block of registers that keep what is written."""

    def __init__(self, values: dict[int, int] | None = None) -> None:
        self.values = dict(values or {})

    def read(self, offset: int) -> int:
        return self.values.get(offset, 0)

    def write(self, offset: int, value: int) -> None:
        self.values[offset] = value


class Controller(Registers):
    """The AXI interrupt controller, and the file by which pynq hears of it.

    pynq disables a line that fired, and enables it when it is next waited for.
    """

    PENDING, ENABLED, ACKNOWLEDGE, ENABLE, DISABLE, MASTER = 0x04, 0x08, 0x0C, 0x10, 0x14, 0x1C

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel, self.enabled, self.seen = kernel, 0, 0
        self.waiting: list[Any] = []

    def read(self, offset: int) -> int:
        self.seen |= self.kernel.line()
        known = {0: self.seen, self.PENDING: self.seen & self.enabled, self.ENABLED: self.enabled}
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
            self.seen &= ~value

    def add_event(self, event: Any, _number: int) -> None:
        """pynq waits; called inside its loop."""
        self.waiting.append(event)
        self._look(asyncio.get_running_loop())

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        due = self.kernel.due
        if self.read(self.PENDING) and self.read(self.MASTER) == 3:
            events, self.waiting = self.waiting, []
            for event in events:
                loop.call_soon(event.set)
        elif self.waiting and due is not None:
            loop.call_later(max(1e-4, due - time.monotonic()), self._look, loop)


class Kernel(Registers):
    """The kernel's registers as Vitis HLS makes them, and what a start does."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self.device = device
        self.config: AcceleratorConfig | None = None
        self.due: float | None = None
        """When a run shows as done; none if none runs, or if it never will."""
        self.error = ""
        """What the bus refused in the last run."""
        self.starts = 0
        self.busy_seconds = 0.0
        """Time that starts took, which stands for the device's own."""
        self._control = 0
        self._library: Any = None
        self._quiet = False

    def program(self, config: AcceleratorConfig | None) -> None:
        """Become the kernel of a design; without one, nothing, as without power."""
        self.values.clear()
        self.due, self._quiet = None, False
        self.config, self._control = config, IDLE if config else 0
        if config is not None:
            try:
                library = build_library(config)
            except DeviceError as error:
                raise DeviceError(f"the simulated board runs the C-simulation: {error}") from error
            self._library = ctypes.CDLL(str(library))
            self._library.kgrc_run.restype = None

    def line(self) -> int:
        """The interrupt line."""
        self._settle()
        on = self.values.get(REGISTERS["GIER"], 0) & self.values.get(REGISTERS["IP_ISR"], 0)
        return on & 1 and not self._quiet

    def read(self, offset: int) -> int:
        self._settle()
        if offset == REGISTERS["CTRL"]:
            value = self._control
            self._control &= ~(DONE | 8)  # both clear on read
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

    def _settle(self) -> None:
        if self.due is not None and time.monotonic() >= self.due:
            self.due, self._control = None, DONE | IDLE | 8
            self.values[REGISTERS["IP_ISR"]] = self.values.get(REGISTERS["IP_IER"], 0) & 1

    def _start(self) -> None:
        device = self.device
        first, count = self._number("first_task"), self._number("task_count")
        self.starts += 1
        self._control, self.due, self.error, self._quiet = START, None, "", False
        # a start without tasks only asks for the digest
        take: Callable[[str], bool] = device.take if count else lambda _: False
        if take("decode_error"):
            self.values[REGISTERS["weights_2"]] = 0
        if take("bad_table"):
            self._words("tables")[first * len(FIELDS) // 2] |= np.uint64(
                0x7FFF_FFFF << 32
            )  # its source
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
        self._quiet = take("interrupt_lost")
        self.due = time.monotonic() + latency

    def _run(self, first: int, count: int) -> None:
        assert self.config is not None
        pointers = [ctypes.c_void_p()] * len(ADDRESSES)
        if count:
            self._check_reach(self.config, first, count)
            pointers = [self._pointer(name) for name in ADDRESSES]
        digest = ctypes.c_uint64()
        self._library.kgrc_run(*pointers, ctypes.byref(digest), first, count)
        found = digest.value ^ (1 if self.device.take("wrong_digest") else 0)
        self.values[REGISTERS["digest_1"]] = found & 0xFFFF_FFFF
        self.values[REGISTERS["digest_2"]] = found >> 32

    def _number(self, name: str) -> int:
        return self.values.get(REGISTERS[name], 0)

    def _address(self, name: str) -> int:
        register = register_of(name)
        return self._number(f"{register}_1") | self._number(f"{register}_2") << 32

    def _pointer(self, name: str) -> ctypes.c_void_p:
        buffer, start = self.device.memory.at(self._address(name))
        return ctypes.c_void_p(buffer.logic.ctypes.data + start)

    def _words(self, name: str) -> Array:
        """The words from an address to the end of its buffer."""
        buffer, start = self.device.memory.at(self._address(name))
        return buffer.logic[start : start + (buffer.size - start) // 8 * 8].view(np.uint64)

    def _check_reach(self, config: AcceleratorConfig, first: int, count: int) -> None:
        """Refuse what would leave its buffer; C++ would read on, the bus does not."""
        memory, tables, half = self.device.memory, self._words("tables"), len(FIELDS) // 2
        memory.bytes_at(self._address("status"), 8 * len(STATUS) * (first + count))
        for number in range(first, first + count):
            words = tables[number * half : (number + 1) * half]
            if words.size < half:
                raise BusError(f"no descriptor {number} in the tables")
            fields = words.view(np.int32).tolist()
            field = dict(zip(FIELDS, fields, strict=True))
            for name, start, size in _reach(config, field, self._words("items")):
                if start < 0:
                    raise BusError(f"task {number} reads {name} before its beginning")
                memory.bytes_at(self._address(name) + start, size)


def _reach(
    config: AcceleratorConfig, field: dict[str, int], items: Array
) -> list[tuple[str, int, int]]:
    """What a task touches: port, first byte and bytes; a descriptor without sense is refused."""
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
        raise BusError(f"{field['chunks']} chunks in a descriptor, {chunks} in its plan")
    stored = dict(field)
    for axis in "dhw":
        stored[f"out_{axis}"] = field[f"out_{axis}"] // field[f"pool_{axis}"]
    field, beat, port = stored, config.beat_bytes, config.weight_port_words * 8
    wide = 16 // config.bits if field["wide"] else 1
    found = [
        ("input", field["source"] * beat, beats("in", sources) * beat),
        ("output", field["target"] * beat, beats("out", targets) * wide * beat),
        ("weights", field["weights"] * port, chunks * field["chunk_beats"] * port),
        ("scales", field["scales"] * 8, 16 * config.tn * targets),
        ("indices", field["indices"] * 8, chunks * config.index_words * 8),
    ]
    if field["has_shortcut"]:
        found.append(("shortcut", field["shortcut"] * beat, beats("shortcut", targets) * beat))
    return [entry for entry in found if entry[2]]


# ---- the device -----------------------------------------------------------------------------


@dataclass
class Hook:
    """What pynq's array of registers reads and writes through."""

    device: SimulatedDevice
    base: int

    def read(self, offset: int, length: int) -> bytes:
        return self.device.read_registers(self.base + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        self.device.write_registers(self.base + offset, bytes(data))


class SimulatedDevice(pynq.Device):  # type: ignore[misc]
    """A board as a pynq device.

    Args:
        tag: its name; one process at a time can drive a device of a name.
        memory_bytes: contiguous memory.
        latency: seconds from the end of computing to where a run shows as done.
        interrupt: whether its overlays wire the interrupt.
        clears_on_read: IP_ISR of Vitis HLS from 2022.1 on; earlier ones toggle by a write.
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
        # what pynq's own device of such a board says, so that it takes the same ways
        self.capabilities = {"REGISTER_RW": False, "MEMORY_MAPPED": True, "CALLABLE": False}
        self.name, self.arch = "zcu102-simulated", "aarch64"
        self.latency, self.delay = latency, 0.05
        self.interrupt, self.clears_on_read = interrupt, clears_on_read
        self.faults: list[str] = []
        """Faults to happen, each once, at the first occasion (FAULTS)."""
        self.downloads = 0
        self.memory = Memory(self, memory_bytes)
        self.kernel = Kernel(self)
        self.controller = Controller(self.kernel)
        _InterruptController._uio_devices[PS_INTERRUPT] = self.controller
        # every PLL at 33.333 MHz * 90 / 2
        plls = dict.fromkeys((0x20, 0x24, 0x2C, 0x30, 0x38), 90 << 8 | 1 << 16)
        dividers = {0xC0 + 4 * i: 1 << 24 | 1 << 16 | 15 << 8 for i in range(4)}
        self._blocks: dict[int, tuple[int, Registers]] = {
            KERNEL_AT: (0x1_0000, self.kernel),
            CONTROLLER_AT: (0x1_0000, self.controller),
            CRL_AT: (0x1000, Registers({**plls, **dividers})),
            CRF_AT: (0x1000, Registers({**plls, 0x60: 0x100})),
        }
        self._overlays: Path | None = None
        # pynq keeps the clocks of the first device that it meets
        if "_real_instance" in vars(pynq.Clocks):
            del pynq.Clocks._real_instance
        if not hasattr(pynq.Clocks, "set_device"):
            # 3.0 looks at the processor that it runs on, and at the active device
            pynq.Device.active_device = self
            pynq.Clocks._real_instance = pynq.ps._ClocksUltrascale()

    def take(self, fault: str) -> bool:
        """Whether that fault happens now."""
        if fault not in self.faults:
            return False
        self.faults.remove(fault)
        return True

    @property
    def cma_free(self) -> int:
        """Bytes of contiguous memory that are free."""
        return self.memory.free

    def supply_overlay(self, config: AcceleratorConfig) -> Path:
        """The folder of an overlay of that design, made when it is first asked for."""
        if self._overlays is None:
            self._overlays = Path(tempfile.mkdtemp(prefix="pynq_kgrc-overlays-"))
            weakref.finalize(self, shutil.rmtree, self._overlays, ignore_errors=True)
        folder = self._overlays / f"{config.digest}-{int(self.interrupt)}"
        if not folder.is_dir():
            write_overlay(folder, config, interrupt=self.interrupt)
        return folder

    # registers

    def _block(self, address: int) -> tuple[Registers, int]:
        for base, (size, block) in self._blocks.items():
            if base <= address < base + size:
                return block, address - base
        raise BusError(f"no register at {address:#x}")

    def read_registers(self, address: int, length: int) -> bytes:
        """pynq reads registers."""
        words = [
            block.read(offset) & 0xFFFF_FFFF
            for block, offset in (self._block(a) for a in range(address, address + length, 4))
        ]
        return struct.pack(f"<{len(words)}I", *words)

    def write_registers(self, address: int, data: bytes) -> None:
        """pynq writes registers."""
        for i, (word,) in enumerate(struct.iter_unpack("<I", data)):
            block, offset = self._block(address + 4 * i)
            block.write(offset, word)

    def mmap(self, base_addr: int, length: int) -> Any:
        """Registers as an array."""
        return tinynumpy.ndarray(shape=(length // 4,), dtype="u4", hook=Hook(self, base_addr))

    # memory

    @property
    def default_memory(self) -> Memory:
        return self.memory

    def get_memory(self, _description: Any) -> Memory:
        return self.memory

    def flush(self, buffer: Buffer, _offset: int, _address: int, _size: int) -> None:
        """All of the buffer, whatever part is asked for: so does pynq since 3.1."""
        self._live(buffer).logic[:] = buffer.host

    def invalidate(self, buffer: Buffer, _offset: int, _address: int, _size: int) -> None:
        self._live(buffer).host[:] = buffer.logic

    def _live(self, buffer: Buffer) -> Buffer:
        if self.memory.buffers.get(buffer.address) is not buffer:
            raise BusError("not, or no longer, a buffer of pynq.allocate")
        return buffer

    # bitstreams

    def get_bitfile_metadata(self, bitfile_name: str, partial: bool = False) -> Any:
        """What the .hwh beside a bitstream says."""
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
        """Become what the bitstream says, which here is a design as JSON."""
        design = msgspec.json.decode(
            Path(bitstream.bitfile_name).read_bytes(), type=AcceleratorConfig
        )
        self.downloads += 1
        self.kernel.program(design)
        self.post_download(bitstream, parser, self.name)

    def gen_cache(self, bitstream: Any, parser: Any = None) -> None:
        """pynq wants it; there is nothing to keep."""

    def close(self) -> None:
        """pynq wants it."""


_shared: list[SimulatedDevice] = []


def shared_device() -> SimulatedDevice:
    """The one simulated board of this process, now pynq's active device."""
    if not _shared:
        _shared.append(SimulatedDevice())
    pynq.Device.active_device = _shared[0]
    return _shared[0]


# ---- overlays -------------------------------------------------------------------------------


def write_overlay(
    folder: Path, config: AcceleratorConfig, clock_mhz: float = 150.0, interrupt: bool = True
) -> Path:
    """An overlay for the simulated board; the path of its bitstream.

    The .hwh is the least that pynq needs, made from the driver's list of registers. It is no
    output of Vivado, and the bitstream is no bitstream.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BIT).write_text(json.dumps(asdict(config)))
    (folder / HWH).write_text(hardware_handoff(clock_mhz, interrupt))
    sums = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in (BIT, HWH)}
    manifest = Manifest(config, config.digest, clock_mhz, sums, "simulated, no bitstream")
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return folder / BIT


def hardware_handoff(clock_mhz: float, interrupt: bool) -> str:
    """The text of a .hwh with the kernel, the processor, and the interrupt between them."""
    registers = "".join(
        f'<REGISTER NAME="{name}"><PROPERTY NAME="ADDRESS_OFFSET" VALUE="{offset:#x}"/>'
        f'<PROPERTY NAME="SIZE" VALUE="32"/><PROPERTY NAME="ACCESS" VALUE="read-write"/></REGISTER>'
        for name, offset in REGISTERS.items()
    )
    block = f"""<ADDRESSBLOCKS><ADDRESSBLOCK ACCESS="read-write" INTERFACE="s_axi_control"
      NAME="Reg" RANGE="65536" USAGE="register"><REGISTERS>{registers}</REGISTERS></ADDRESSBLOCK>
      </ADDRESSBLOCKS>"""
    kernel = block + _ports("O", "interrupt", "xlconcat_0", "In0", interrupt) + _slave("control")
    modules = [_module("kgrc_run_0", "kgrc_run", VLNV, kernel)]
    ranges = [("kgrc_run_0", "s_axi_control", KERNEL_AT)]
    if interrupt:
        wires = _ports("I", "In0", "kgrc_run_0", "interrupt") + _ports(
            "O", "dout", "axi_intc_0", "intr"
        )
        lines = _ports("I", "intr", "xlconcat_0", "dout") + _ports(
            "O", "irq", "zynq_ultra_ps_e_0", "pl_ps_irq0"
        )
        both = (
            wires.replace("</PORTS><PORTS>", ""),
            lines.replace("</PORTS><PORTS>", ""),
        )
        modules += [
            _module("xlconcat_0", "xlconcat", "xilinx.com:ip:xlconcat:2.1", both[0]),
            _module(
                "axi_intc_0",
                "axi_intc",
                "xilinx.com:ip:axi_intc:4.1",
                both[1] + _slave(""),
                'MODCLASS="INTERRUPT_CNTLR"',
            ),
        ]
        ranges.append(("axi_intc_0", "s_axi", CONTROLLER_AT))
    modules.append(_processor(clock_mhz, ranges, interrupt))
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        "<!-- The least that pynq needs; for the simulated board only. -->\n"
        '<EDKSYSTEM EDWVERSION="1.2" TIMESTAMP="simulated" VIVADOVERSION="simulated">\n'
        '<SYSTEMINFO ARCH="zynquplus" DEVICE="xczu9eg" NAME="kgrc" PACKAGE="ffvb1156"/>\n'
        f"<EXTERNALPORTS/><EXTERNALINTERFACES/>\n<MODULES>\n{''.join(modules)}</MODULES>\n"
        "</EDKSYSTEM>\n"
    )


def _module(name: str, kind: str, vlnv: str, inside: str, more: str = "") -> str:
    return (
        f'<MODULE FULLNAME="/{name}" HWVERSION="1.0" INSTANCE="{name}" IPTYPE="PERIPHERAL" '
        f'IS_ENABLE="1" MODTYPE="{kind}" VLNV={quoteattr(vlnv)} {more}>\n{inside}\n</MODULE>\n'
    )


def _ports(direction: str, name: str, instance: str, port: str, wired: bool = True) -> str:
    wire = f'<CONNECTION INSTANCE="{instance}" PORT="{port}"/>' if wired else ""
    return (
        f'<PORTS><PORT DIR="{direction}" NAME="{name}" SIGIS="INTERRUPT">'
        f"<CONNECTIONS>{wire}</CONNECTIONS></PORT></PORTS>"
    )


def _slave(name: str) -> str:
    return (
        f'<BUSINTERFACES><BUSINTERFACE NAME="s_axi{"_" * bool(name)}{name}" TYPE="SLAVE" '
        f'VLNV="xilinx.com:interface:aximm:1.0"/></BUSINTERFACES>'
    )


def _processor(clock_mhz: float, ranges: list[tuple[str, str, int]], interrupt: bool) -> str:
    values: dict[str, object] = {}
    for i in range(4):
        values[f"PSU__FPGA_PL{i}_ENABLE"] = int(i == 0)
        clock = f"PSU__CRL_APB__PL{i}_REF_CTRL__"
        values |= {f"{clock}DIVISOR0": round(1500 / clock_mhz), f"{clock}DIVISOR1": 1}
        values[f"{clock}SRCSEL"] = "IOPLL"
        values[f"{clock}ACT_FREQMHZ"] = clock_mhz
    parameters = "".join(f'<PARAMETER NAME="{n}" VALUE="{v}"/>' for n, v in values.items())
    memory = "".join(
        f'<MEMRANGE ADDRESSBLOCK="Reg" BASENAME="C_BASEADDR" BASEVALUE="{base:#x}" '
        f'HIGHNAME="C_HIGHADDR" HIGHVALUE="{base + 0xFFFF:#x}" INSTANCE="{name}" '
        f'MASTERBUSINTERFACE="M_AXI_HPM0_FPD" MEMTYPE="REGISTER" SLAVEBUSINTERFACE="{port}"/>'
        for name, port, base in ranges
    )
    inside = (
        f"<PARAMETERS>{parameters}</PARAMETERS>"
        + _ports("I", "pl_ps_irq0", "axi_intc_0", "irq", interrupt)
        + '<BUSINTERFACES><BUSINTERFACE NAME="M_AXI_HPM0_FPD" TYPE="MASTER" '
        'VLNV="xilinx.com:interface:aximm:1.0"/></BUSINTERFACES>'
        f"<MEMORYMAP>{memory}</MEMORYMAP>"
    )
    vlnv = "xilinx.com:ip:zynq_ultra_ps_e:3.5"
    return _module("zynq_ultra_ps_e_0", "zynq_ultra_ps_e", vlnv, inside)
