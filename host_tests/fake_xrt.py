"""A board made of Python under pynq's own EmbeddedDevice: XRT, /dev/mem, FPGA manager and UIO.

Unlike the simulated device, which replaces pynq's device class, this runs pynq's own code for a
board: its device, buffers, parsers, caches and interrupts. Replaced is only what a board has and
this host has not: the module `pyxrt` (pynq 3.1 on) or `libxrt_core.so` (pynq 3.0), `xclbinutil`,
/dev/mem, /lib/firmware, /sys/class/fpga_manager and the UIO device. The registers and the kernel
behind them are those of the simulated device.

It patches modules for good, before pynq is imported, so it runs in a process of its own:
`on_fake_board` runs a test function there.
"""

import asyncio
import builtins
import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import numpy as np

HERE = Path(__file__).resolve().parent
FOLDER = "FAKE_XRT"
"""Environment variable: the folder of the board's files. Set in the processes that have a board."""

BOARDS = []
"""The board of this process, once `install` has made it."""

FPGA_MANAGER, FIRMWARE = "/sys/class/fpga_manager/fpga0", "/lib/firmware"
CACHEABLE = 1 << 24
IRQ = 121
"""As the simulated overlay's: GIC number of pl_ps_irq0."""

WIDTHS = {"C_MAXIGP0_DATA_WIDTH": 32, "C_SAXIGP2_DATA_WIDTH": 128, "C_SAXIGP3_DATA_WIDTH": 128}
"""Widths of the processor's ports in the .hwh, which pynq writes to registers at a download."""


# ---- a test function in a process that has the board ------------------------------------------


def on_fake_board(test):
    """Run a test function in a process of its own, on a fresh fake board.

    Its arguments must be JSON. The process fails if a buffer is left at its end.
    """
    if FOLDER in os.environ:
        return test

    @functools.wraps(test)
    def run(*arguments, **named):
        module = Path(test.__code__.co_filename).stem
        call = json.dumps([module, test.__name__, arguments, named])
        code = "import sys, fake_xrt; fake_xrt.call(*__import__('json').loads(sys.argv[1]))"
        done = run_on_board(["-c", code, call])
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def call(module, name, arguments, named):
    """Call a function in the process of `on_fake_board`."""
    install()
    getattr(importlib.import_module(module), name)(*arguments, **named)
    assert not board().memory.buffers, "buffers are left"


def folder():
    """The folder of this process's board."""
    return Path(os.environ[FOLDER])


def board():
    """The board of this process."""
    return BOARDS[0]


def run_on_board(arguments, timeout=3000):
    """Run this Python with `arguments` in an environment that has a fresh board."""
    with tempfile.TemporaryDirectory(prefix="fake-xrt-") as place:
        return subprocess.run(
            [sys.executable, "-W", "ignore", *arguments],
            env={
                **os.environ,
                FOLDER: place,
                "PATH": f"{place}/bin{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent))),
                "XILINX_XRT": place,
                "PYNQ_KGRC_SIMULATE": "0",
            },
            cwd=place,
            capture_output=True,
            text=True,
            timeout=timeout,
        )


# ---- the board --------------------------------------------------------------------------------


def place(path):
    """Where a path of the board lies on this host."""
    return folder() / str(path)[1:] if str(path).startswith((FPGA_MANAGER, FIRMWARE)) else path


def make_files():
    """The board's files, unless an earlier process has made them."""
    manager, tools, state = place(FPGA_MANAGER), folder() / "bin", folder() / "state"
    if manager.is_dir():
        return
    for path in (manager, place(FIRMWARE), tools, state):
        path.mkdir(parents=True)
    for name, text in {"firmware": "", "flags": "0", "state": "unknown"}.items():
        (manager / name).write_text(text)
    pynq = Path(importlib.util.find_spec("pynq").submodule_search_locations[0])
    xclbin, maker = pynq / "_3rdparty" / "xclbin.py", HERE / "fake_xclbinutil.py"
    scripts = {
        "xclbinutil": f'exec "{sys.executable}" -IS "{maker}" "{xclbin}"',
        "xbutil": "echo 'Version : 2.13.479'",
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)


def write_overlay(folder, config, clock_mhz=150.0):
    """An overlay as Vivado leaves it: a .bit with a header, a .hwh; returns the .bit."""
    from pynq_kgrc.backends.board import simulated_overlay

    bit = simulated_overlay.write_overlay(folder, config, clock_mhz)
    data = bit.read_bytes()
    data += b" " * (-len(data) % 4)
    header = struct.pack(">h", 9) + bytes(9) + struct.pack(">h", 1)
    fields = {b"a": "kgrc;Version=2022.1", b"b": "xczu9eg", b"c": "2026/01/01", b"d": "00:00:00"}
    for key, text in fields.items():
        header += key + struct.pack(">h", len(text) + 1) + text.encode() + b"\0"
    bit.write_bytes(header + b"e" + struct.pack(">i", len(data)) + data)
    hwh = bit.with_suffix(".hwh")
    widths = "".join(f'<PARAMETER NAME="{n}" VALUE="{v}"/>' for n, v in WIDTHS.items())
    hwh.write_text(hwh.read_text().replace("<PARAMETERS>", f"<PARAMETERS>{widths}"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for path in (bit, hwh):
        manifest["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return bit


class BufferObject:
    """Contiguous memory, mapped into this process.

    Without `cacheable` the processor's view is the memory itself, as with zocl on a ZynqMP; with
    it, `host` and `logic` differ until they are synchronized.
    """

    def __init__(self, libc, address, size, cacheable):
        self.address, self.size, self.span = address, size, -(-size // 4096) * 4096
        read_write, private_anonymous = 3, 0x22
        self.pointer = libc.mmap(None, self.span, read_write, private_anonymous, -1, 0)
        self.view = (ctypes.c_ubyte * size).from_address(self.pointer)
        self.host = np.frombuffer(self.view, np.uint8)
        self.logic = np.zeros(size, np.uint8) if cacheable else self.host


class Interrupt:
    """The UIO device /dev/uio0 as a file: writing unmasks the interrupt, reading waits for it."""

    def __init__(self):
        self.event = os.eventfd(0)

    def fileno(self):
        return self.event

    def read(self, _count):
        return os.eventfd_read(self.event).to_bytes(4, "little")

    def write(self, _one):
        self._deliver(asyncio.get_running_loop())

    def _deliver(self, loop):
        controller = board().controller
        if controller.read(controller.PENDING) and controller.read(controller.MASTER) == 3:
            os.eventfd_write(self.event, 1)
        else:
            loop.call_later(5e-4, self._deliver, loop)

    def close(self):
        os.close(self.event)


def install():
    """Put the board under pynq, which must not have been imported; returns the board.

    None where pynq would find no device whatever the board has.
    """
    assert "pynq" not in sys.modules, "pynq was imported before the board was there"
    make_files()
    libc = ctypes.CDLL("libc.so.6", use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    sys.modules["pyxrt"] = pyxrt()
    uname = os.uname_result((*os.uname()[:4], "aarch64"))
    isfile, library = os.path.isfile, ctypes.CDLL
    node = "/proc/device-tree/chosen/pynq_board"
    # pynq asks for the machine again when it makes a device and its clocks
    platform.machine = lambda: "aarch64"
    with (
        mock.patch.object(os, "uname", return_value=uname),
        mock.patch.object(os.path, "isfile", lambda path: str(path) == node or isfile(path)),
        mock.patch.object(
            ctypes,
            "CDLL",
            lambda name, *rest, **named: (
                libxrt_core()
                if str(name).endswith("libxrt_core.so")
                else library(name, *rest, **named)
            ),
        ),
    ):
        import pynq
        import pynq.interrupt
        import pynq.uio

        if not hasattr(pynq.pl_server, "EmbeddedDevice"):
            return None  # XILINX_XRT is not set: pynq itself finds no device
        from pynq.pl_server import embedded_device, global_state
    BOARDS.append(make_board(libc))
    from pynq_kgrc.backends.board import lock

    lock.FOLDERS = (str(folder()),)  # this host may test several boards at once

    def opened(path, mode="r", *rest, **named):
        """`open` on the board."""
        if str(path) == embedded_device.EmbeddedDevice.BS_FPGA_MAN and "w" in mode:
            return Firmware()
        if str(path) == "/dev/uio0":
            return Interrupt()
        if str(path) == "/proc/interrupts":
            line = f" 50: 0 0 0 0 GICv2 {IRQ} Level fabric\n"
            return contextlib.nullcontext([line] * board().has_uio)
        if str(path) == "/sys/class/uio/uio0/name":
            return contextlib.nullcontext(types.SimpleNamespace(read=lambda: "fabric\n"))
        return builtins.open(place(path), mode, *rest, **named)

    for module in (embedded_device, global_state, pynq.interrupt, pynq.uio):
        module.open = opened
    embedded_device.Path = lambda *parts: Path(place(Path(*parts)))
    # pynq keeps the state of the device beside these two modules
    embedded_device.__file__ = str(folder() / "state" / "embedded_device.py")
    global_state.STATE_DIR = str(folder() / "state")
    pynq.uio.os = types.SimpleNamespace(listdir=lambda _: ["uio0"])
    for attribute, name in {"BS_FPGA_MAN": "firmware", "BS_FPGA_MAN_FLAGS": "flags"}.items():
        setattr(embedded_device.EmbeddedDevice, attribute, str(place(f"{FPGA_MANAGER}/{name}")))
    embedded_device.EmbeddedDevice.mmap = lambda _, *where: board().map_registers(*where)
    return board()


class Firmware:
    """The FPGA manager's attribute `firmware`: writing a name programs the device."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, name):
        place(f"{FPGA_MANAGER}/firmware").write_text(name)
        board().program_from_firmware()


def make_board(libc):
    """The hardware: the simulated device's registers and kernel, memory of its own."""
    import pynq
    from pynq._3rdparty import tinynumpy
    from pynq.interrupt import _InterruptController

    from pynq_kgrc.backends.board import simulated

    class Kept(simulated.Registers):
        """Registers whose values outlive a process, as a board's do."""

        def __init__(self, values):
            self.file = place(FPGA_MANAGER) / "clocks.json"
            super().__init__(values)
            if self.file.is_file():
                self.values = {int(k): v for k, v in json.loads(self.file.read_text()).items()}

        def write(self, offset, value):
            super().write(offset, value)
            self.file.write_text(json.dumps(self.values))

    class Hardware(simulated.SimulatedDevice):
        """What lies behind pynq's device. It is no device of pynq itself."""

        def __init__(self):
            super().__init__(tag="hardware")
            self.loaded = []
            """The xclbin files that XRT was given."""
            self.has_uio = True
            """Whether the device tree has a UIO device for the interrupt."""
            self.empty = True
            """Whether the logic has never been programmed."""
            self.touched_empty = []
            """Accesses to registers of the logic while it was empty: on a board they hang."""
            size, clocks = self._blocks[simulated.CRL_AT]
            self._blocks[simulated.CRL_AT] = (size, Kept(clocks.values))
            for base in (0xFD61_5000, 0xFF41_9000, 0xFD38_0000, 0xFD39_0000):
                self._blocks[base] = (0x1000, simulated.Registers())

        def program_from_firmware(self):
            """Program the logic with the file that the FPGA manager names."""
            name = place(f"{FPGA_MANAGER}/firmware").read_text()
            raw = place(f"{FIRMWARE}/{name}").read_bytes()
            self.program(np.frombuffer(raw, "i4").byteswap().tobytes().rstrip(b" "))
            self.empty = False
            place(f"{FPGA_MANAGER}/state").write_text("operating\n")

        def find_firmware(self):
            """Hold what another process has programmed."""
            if place(f"{FPGA_MANAGER}/state").read_text() == "operating\n":
                self.program_from_firmware()
                self.downloads -= 1

        def map_registers(self, base, length):
            """EmbeddedDevice.mmap: the registers in /dev/mem, for root only."""
            if os.geteuid():
                raise OSError("Root permissions required.")
            hook = simulated.RegisterHook(self, base)
            return tinynumpy.ndarray(shape=(length // 4,), dtype="u4", hook=hook)

        def _block(self, address):
            if self.empty and 0xA000_0000 <= address < 0xB000_0000:
                self.find_firmware()
                if self.empty:
                    self.touched_empty.append(address)
            return super()._block(address)

        def allocate(self, size, cacheable):
            """A buffer object at the first gap that is large enough."""
            if self.take("cma_full"):
                raise RuntimeError("Cannot allocate memory")
            at = self.memory.base_address
            for held in sorted(self.memory.buffers.values(), key=lambda held: held.address):
                if held.address - at >= size:
                    break
                at = held.address + held.span
            if at + size > self.memory.base_address + self.memory.size:
                raise RuntimeError("Cannot allocate memory")
            made = self.memory.buffers[at] = BufferObject(libc, at, size, cacheable)
            return made

        def release(self, buffer):
            self.memory.buffers.pop(buffer.address, None)

        def sync_to_device(self, buffer):
            if buffer.logic is not buffer.host:
                buffer.logic[:] = buffer.host

        def sync_from_device(self, buffer):
            if buffer.logic is not buffer.host:
                buffer.host[:] = buffer.logic

    made = Hardware()
    # undo what the simulated device does to pynq: here pynq finds its device and clocks itself
    _InterruptController._uio_devices.clear()
    if "_active_device" in vars(pynq.Device):
        del pynq.Device._active_device
    if "_real_instance" in vars(pynq.Clocks):
        del pynq.Clocks._real_instance
    return made


# ---- XRT --------------------------------------------------------------------------------------


def synchronize(buffer, from_device):
    (board().sync_from_device if from_device else board().sync_to_device)(buffer)


def pyxrt():
    """The module `pyxrt`, as far as pynq uses it (from 3.1 on)."""
    module = types.ModuleType("pyxrt")

    class flags:  # the names are pyxrt's
        normal, cacheable = 0, CACHEABLE

    class bo:
        def __init__(self, _device, size, kind, _bank):
            self.buffer = board().allocate(size, kind == CACHEABLE)

        def map(self):
            return memoryview(self.buffer.view).cast("B")

        def size(self):
            return self.buffer.size

        def address(self):
            return self.buffer.address

        def sync(self, direction):
            synchronize(self.buffer, direction)

        def __del__(self):
            if hasattr(self, "buffer"):
                board().release(self.buffer)

    class device:
        def __init__(self, index):
            assert index == 0

        def get_info(self, kind):
            return "edge" if kind == "name" else ""

        def load_xclbin(self, path):
            assert Path(path).read_bytes().startswith(b"xclbin2")
            board().loaded.append(path)

    names = "bdf dynamic_regions electrical host m2m max_clock_frequency_mhz mechanical memory name"
    kinds = (*names.split(), "pcie_info", "thermal", "vmr")
    bo.flags = flags
    module.bo, module.device = bo, device
    module.xrt_info_device = types.SimpleNamespace(**{kind: kind for kind in kinds})
    module.xclBOSyncDirection = types.SimpleNamespace(
        XCL_BO_SYNC_BO_TO_DEVICE=0, XCL_BO_SYNC_BO_FROM_DEVICE=1
    )
    return module


def libxrt_core():
    """The functions of libxrt_core.so that pynq 3.0 calls."""
    held = {}

    def allocate(_handle, size, _kind, bank):
        number = len(held) + 1
        held[number] = board().allocate(size, bool(bank & CACHEABLE))
        return number

    def properties(_handle, number, found):
        found.size, found.paddr = held[number].size, held[number].address
        return 0

    def sync(_handle, number, direction, _size, _offset):
        synchronize(held[number], direction)
        return 0

    def information(_handle, found):
        found.mName = b"edge"
        return 0

    def free(_handle, number):
        board().release(held[number])

    def load(_handle, raw):
        assert bytes(raw).startswith(b"xclbin2")
        board().loaded.append("xclbin")
        return 0

    def map_buffer(_handle, number, _write):
        return ctypes.c_void_p(held[number].pointer)

    return types.SimpleNamespace(
        xclOpen=lambda *_: 1,
        xclClose=lambda *_: None,
        xclGetDeviceInfo2=information,
        xclLockDevice=lambda *_: 0,
        xclUnlockDevice=lambda *_: 0,
        xclLoadXclBin=load,
        xclAllocBO=allocate,
        xclGetBOProperties=properties,
        xclMapBO=map_buffer,
        xclSyncBO=sync,
        xclFreeBO=free,
    )
