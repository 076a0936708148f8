"""The C-simulation: the HLS sources, built with g++ as a shared library and run on this host.

The sources come from `hls_src` in or beside the package, or from the folder that KGRC_HLS_SRC
names. A library is cached under a digest of sources, design and flags.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.header import (
    ADDRESSES,
    MAP_PORTS,
    STATUS,
    TABLE_PORTS,
    WEIGHT_PORTS,
    config_header,
)
from pynq_kgrc.backends.base import (
    Counters,
    Loaded,
    PackedMap,
    check_design,
    check_size,
    locked,
    reported_counters,
)
from pynq_kgrc.backends.image import (
    Image,
    build_image,
    decode_map,
    map_bytes,
    pack_map,
    packed_map,
    slot_beat,
)
from pynq_kgrc.errors import DeviceError
from pynq_kgrc.files import find_folder, user_cache
from pynq_kgrc.graph import Size
from pynq_kgrc.program import Program, Slot
from pynq_kgrc.quant import Array, ceil_div

SOURCES = (
    *("top.cpp", "plan.cpp", "memory.cpp", "decode.cpp"),
    *("schedule.cpp", "compute.cpp", "post.cpp", "pool.cpp", "clock.cpp"),
)

FAST = ("-O3", "-march=native", "-DKGRC_PLAIN")
"""Flags for plain integer types and all instructions of this host."""

BUILD_SECONDS = 600


def source_folder() -> Path:
    """The folder of the HLS sources.

    Raises:
        DeviceError: there are none; the message says how to name their folder.
    """
    named = os.environ.get("KGRC_HLS_SRC")
    folder = Path(named) if named else find_folder("hls_src")
    if not (folder / "top.cpp").is_file():
        raise DeviceError(
            f"{folder}: no HLS sources there (top.cpp); set KGRC_HLS_SRC to the folder hls_src "
            f"of the project"
        )
    return folder


def build_library(
    config: AcceleratorConfig,
    flags: tuple[str, ...] = FAST,
    change: Callable[[str], str] | None = None,
    more: tuple[str, ...] = (),
) -> Path:
    """The shared library of a design, from the cache or built now.

    Args:
        config: the design.
        flags: of the compiler.
        change: is applied to each source and header before they are compiled.
        more: sources besides `SOURCES`.

    Raises:
        DeviceError: no compiler, or it fails; the message begins with what it printed.
    """
    folder = source_folder()
    header = config_header(config)
    state = hashlib.sha256(f"{header}\0{flags}\0{_processor()}".encode())
    paths = [path for path in sorted(folder.glob("*.[ch]*")) if path.name != "config.h"]
    texts = {path.name: path.read_text() for path in paths}
    if change is not None:
        texts = {name: change(text) for name, text in texts.items()}
    for text in texts.values():
        state.update(text.encode())
    cache = user_cache() / "csim"
    library = cache / f"{config.name}-{state.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise DeviceError("no C++ compiler (g++): the C-simulation builds the HLS sources with it")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        (Path(scratch) / "config.h").write_text(header)
        if change is not None:
            folder = Path(scratch)
            for name, text in texts.items():
                (folder / name).write_text(text)
        beside = Path(scratch) / library.name
        command = [compiler, "-std=c++14", "-shared", "-fPIC", "-Wno-unknown-pragmas", *flags]
        command += [
            "-I",
            scratch,
            *(str(folder / name) for name in (*SOURCES, *more)),
            "-o",
            str(beside),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"{compiler} took more than {BUILD_SECONDS} s") from error
        if done.returncode:
            raise DeviceError(f"{compiler} refuses {config.name}:\n{done.stderr[:2000]}")
        beside.replace(library)
    return library


_LOCKS: dict[Path, threading.Lock] = {}
os.register_at_fork(after_in_child=_LOCKS.clear)  # another thread of the parent may hold one


def library_lock(path: Path) -> threading.Lock:
    """The lock of a library: its memories are static, one set for the whole process."""
    return _LOCKS.setdefault(path, threading.Lock())


def _processor() -> str:
    """The processor's features: a library built with -march=native depends on them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def simulate(
    library: ctypes.CDLL,
    ports: Sequence[tuple[int, int]],
    digest: ctypes.c_uint64,
    first: int,
    count: int,
) -> str:
    """Run `count` tasks from number `first` on; the caller holds the library's lock.

    `ports` are the address and the bytes of each port's memory, in the order of
    `accelerator.header.ADDRESSES`. The result is "", or what the hardware would not forgive: a wait
    without end, a read without a request, a request past the end of a memory.
    """
    memory = (ctypes.c_void_p * len(ports))(*(address for address, _ in ports))
    sizes = (ctypes.c_uint64 * len(ports))(*(size for _, size in ports))
    library.kgrc_simulate.restype = ctypes.c_char_p
    fault = library.kgrc_simulate(memory, sizes, ctypes.byref(digest), first, count)
    return fault.decode() if fault else ""


class CSimulation(Loaded):
    """The accelerator `config`, simulated by its own C++ sources.

    A forked child has its own copy of the memory; it goes on once a clip is written.
    """

    name = "csim"
    exclusive = False

    def __init__(self, config: AcceleratorConfig, flags: tuple[str, ...] = FAST) -> None:
        super().__init__()
        self.config = config
        self._path = self._build(flags)
        self._library = ctypes.CDLL(str(self._path))

    def _build(self, flags: tuple[str, ...]) -> Path:
        return build_library(self.config, flags)

    @locked
    def load(self, program: Program) -> None:
        """Lay out the program's memory, in place of any program loaded before.

        Raises:
            ProgramError: it was compiled for another design, or the hardware cannot address it.
        """
        check_design(program, self.config)
        image = build_image(program)
        self._program = None  # until the last step: Ctrl-C leaves no program
        self._image: Image = image
        self._maps = np.zeros(ceil_div(program.arena_bytes, 64) * 64 + 64, np.uint8)
        self._status = np.zeros((len(program.tasks), len(STATUS)), np.uint64)
        self._maps_lost = None
        self._program = program

    def pack(self, program: Program, slot: Slot, codes: Array) -> PackedMap:
        """Codes [C, D, H, W] as the bytes that `write` copies."""
        return pack_map(self.config, program, slot, codes)

    @locked
    def write(self, slot: Slot, codes: Array | PackedMap) -> None:
        """Copy codes [C, D, H, W], packed or not, to a slot."""
        packed = packed_map(self.program, slot, codes)
        self._maps[packed.start : packed.start + packed.raw.size] = packed.raw
        self._maps_lost = None

    @locked
    def read(self, slot: Slot, channels: int, size: Size) -> Array:
        """The codes [C, D, H, W] in a slot."""
        check_size(self.program, slot, size)
        self.check_maps()
        bits = self.program.buffers[slot.buffer].bits
        start = slot_beat(self.program, slot, "read") * self.config.beat_bytes
        raw = self._maps[start : start + map_bytes(self.config, channels, size, bits)]
        return decode_map(self.config, raw, channels, size, bits)

    @locked
    def run(self, first: int = 0, last: int | None = None) -> list[Counters]:
        """Run the tasks [first, last) in order; the counters of each.

        Raises:
            ProgramError: no program is loaded, or the range is not within it.
            DeviceError: the simulated kernel would hang, because one of its processes waits for a
                stream that is empty.
        """
        first, last = self.task_range(first, last)
        self.check_maps()
        found = []
        for number in range(first, last):
            began = time.perf_counter()
            try:
                self._call(number, 1)
                seconds = time.perf_counter() - began
                found.append(self._counters(number, seconds))
            except KeyboardInterrupt:
                self._maps_lost = "a run that did not end"
                raise
        return found

    def enter_child(self) -> None:
        """The first call in the child of a fork: the maps may be those of an unfinished run."""
        self._pid = os.getpid()
        self._maps_lost = f"a fork of process {os.getppid()}"

    def status(self, number: int) -> dict[str, int]:
        """The status words of a task by name (accelerator.header.STATUS)."""
        return dict(zip(STATUS, map(int, self._status[number]), strict=True))

    def _call(self, first: int, count: int) -> None:
        digest = ctypes.c_uint64()
        memory: dict[str, Array] = {"status": self._status}
        memory |= dict.fromkeys(MAP_PORTS, self._maps)
        memory |= dict.fromkeys(WEIGHT_PORTS, self._image.weights)
        memory |= dict.fromkeys(TABLE_PORTS, self._image.tables)
        ports = [(memory[name].ctypes.data, memory[name].nbytes) for name in ADDRESSES]
        with library_lock(self._path):
            text = self._simulate(ports, digest, first, count)
        if text:
            raise DeviceError(f"{self.program.name}, task {first}: {text}")
        if f"{digest.value:016x}" != self.config.digest:
            raise DeviceError(
                f"the library is of design {digest.value:016x}, not {self.config.digest}"
            )

    def _simulate(
        self, ports: Sequence[tuple[int, int]], digest: ctypes.c_uint64, first: int, count: int
    ) -> str:
        return simulate(self._library, ports, digest, first, count)

    def _counters(self, number: int, seconds: float) -> Counters:
        status = self._status[number : number + 1]
        names = (self.program.tasks[number].name,)
        return reported_counters(self.config, names, status, np.array([seconds]))[0]

    def close(self) -> None:
        """Release the program's memory."""
        with self.lock:
            self._program = None
