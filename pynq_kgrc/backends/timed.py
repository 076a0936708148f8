"""The timed simulation: the HLS sources with the depths, IIs and processes of their pragmas.

The sources are those of the C-simulation. A copy is built in which the pragmas are code: STREAM
bounds a stream, PIPELINE makes a trip take II cycles, the calls under DATAFLOW run side by side
(hls_src/timed.h). Memory has a latency and a bandwidth, by `Timing`.

What it gives is simulated: it assumes that a tool reaches each II and the clock, and it assumes the
memory. Nothing here was measured on an FPGA.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.header import ADDRESSES, FIELDS, STATUS
from pynq_kgrc.accelerator.tiling import MAKE_REGION, MAKE_TILE
from pynq_kgrc.backends.base import Counters, locked
from pynq_kgrc.backends.csim import FAST, CSimulation, build_library
from pynq_kgrc.errors import ConfigError, DeviceError
from pynq_kgrc.program import Program

SETUPS = ("make_tile", "make_region")
"""Functions of multiplications one after the other, outside of pipelined loops."""


@dataclass(frozen=True)
class Timing:
    """What a timed simulation assumes. A cycle is one of the array's clock.

    The defaults are the setting in which this project states its times: 80 % of a port of 128 bits
    at 300 MHz beside an array at 150 MHz, 75 % of the 17.07 GB/s of a ZCU102's DDR4.
    """

    clock_mhz: float = 150.0
    """Clock of the array: turns cycles into milliseconds."""
    latency: float = 70.0
    """Cycles from the request of a burst to its first beat, and from the last beat that is written
    to the response."""
    port_bytes: float = 25.6
    """Bytes a cycle of each port and direction."""
    ddr_bytes: float = 85.0
    """Bytes a cycle of all ports together."""
    outstanding: int = 16
    """Bursts that each port has under way."""
    burst_beats: int = 64
    """Longest burst; a longer request is cut."""
    depth: int = 25
    """Depth of each pipelined loop: cycles from a trip's start to its writes."""
    flush: bool = False
    """Whether all pipelines go on while they wait for input, so that finished words come out. If
    not, only loops whose PIPELINE pragma says so (style = flp or frp) do."""
    start_cycles: int = 20
    """To start a task, besides the reading of its descriptor."""
    setups: Mapping[str, int] = field(
        default_factory=lambda: {"make_tile": MAKE_TILE, "make_region": MAKE_REGION}
    )
    """Cycles of each of `SETUPS`: estimated. "make_tile" stands for all that a tile of the plan
    takes beside its items."""
    depths: Mapping[str, int] = field(default_factory=dict)
    """Depth of the pipelines of single processes, instead of `depth`."""
    streams: Mapping[str, int] = field(default_factory=dict)
    """Depth of single streams, instead of that of their STREAM pragma."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that is not accepted."""
        numbers = {name: getattr(self, name) for name in ("clock_mhz", "port_bytes", "ddr_bytes")}
        for name, value in numbers.items():
            if not (math.isfinite(value) and 0 < value <= 1e6):
                raise ConfigError(f"{name}={value}: use a number above 0, 1e6 at most")
        if not 0 <= self.latency <= 1e6:
            raise ConfigError(f"latency={self.latency}: use 0 to 1e6 cycles")
        whole = {"outstanding": (1, 256), "burst_beats": (1, 256), "depth": (0, 1000)}
        whole["start_cycles"] = (0, 1_000_000)
        for name, (least, most) in whole.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)}: use {least} to {most}")
        for kind, least in (("setups", 0), ("depths", 0), ("streams", 1)):
            for name, value in getattr(self, kind).items():
                if not least <= value <= 1_000_000:
                    raise ConfigError(f"{kind}: {name}={value}: use {least} to 1000000")
        if self.setups.keys() != set(SETUPS):
            raise ConfigError(f"setups of {', '.join(self.setups)}: use {', '.join(SETUPS)}")

    def describe(self) -> str:
        """The assumptions in a line, for what stands beside a figure."""
        return (
            f"simulated, not measured: II as in the sources, {self.clock_mhz:g} MHz, pipelines "
            f"{self.depth} deep{', flushing' if self.flush else ''}, memory latency "
            f"{self.latency:g} cycles, {self.port_bytes:g} B a cycle and port, "
            f"{self.ddr_bytes:g} B of all, {self.outstanding} bursts under way"
        )


class Wait(msgspec.Struct, frozen=True):
    """Cycles for which a process waited."""

    on: str
    """The stream, or the memory port."""
    why: str
    """"empty": for a word of the stream; "full": for room in it; "port": for the memory."""
    cycles: float


class ProcessTime(msgspec.Struct, frozen=True):
    """Where the cycles of one process of a task went."""

    name: str
    end: float
    """When it had ended."""
    trips: int
    """Of its pipelined loops."""
    setup: float
    """Cycles of `SETUPS`."""
    waits: tuple[Wait, ...]
    """Longest first."""
    timeline: dict[str, tuple[float, ...]]
    """Cycles of waiting in each bucket of `TaskTime.bucket_cycles`, by `Wait.why`."""

    @property
    def waited(self) -> float:
        return sum(wait.cycles for wait in self.waits)

    @property
    def busy(self) -> float:
        """Cycles in which it did not wait, those to fill and empty its pipelines included."""
        return self.end - self.waited


class StreamUse(msgspec.Struct, frozen=True):
    """A stream's depth, the words that passed, and the most that it held at a time."""

    name: str
    depth: int
    words: int
    most: int


class PortUse(msgspec.Struct, frozen=True):
    """What passed through a memory port in one direction."""

    number: int
    writes: bool
    beats: int
    beat_bytes: int
    requests: int

    @property
    def name(self) -> str:
        return ADDRESSES[self.number]


class TaskTime(msgspec.Struct, frozen=True):
    """The simulated time of one task."""

    cycles: float
    """From the start of the task to its end, descriptor and status words included."""
    bucket_cycles: float
    processes: tuple[ProcessTime, ...]
    streams: tuple[StreamUse, ...]
    ports: tuple[PortUse, ...]

    def process(self, name: str) -> ProcessTime:
        """A process by its name.

        Raises:
            ConfigError: there is no such process.
        """
        for each in self.processes:
            if each.name == name:
                return each
        names = ", ".join(each.name for each in self.processes)
        raise ConfigError(f"no process {name!r}; there are {names}")

    @property
    def bound(self) -> ProcessTime:
        """The process that bounds the task: the one that waited least for others."""

        def own(process: ProcessTime) -> float:
            memory = sum(wait.cycles for wait in process.waits if wait.why == "port")
            return process.busy + memory

        return max(self.processes, key=own)


# ---- what the pragmas say, as code -------------------------------------------------------------

_II = re.compile(r"#pragma HLS PIPELINE\b.*\bII = (\w+)")
_STYLE = re.compile(r"\bstyle = (\w+)")
_STREAM = re.compile(r"#pragma HLS STREAM variable = (\w+) depth = (\w+)$", re.MULTILINE)
_CALL = re.compile(r"^  (\w+)\(([^;]*)\);$", re.MULTILINE)


def timed_source(text: str) -> str:
    """A source file of hls_src with what its pragmas say as code; lines keep their numbers.

    Raises:
        DeviceError: a pipelined loop has no label or no II, or a DATAFLOW region no call.
    """
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if "#pragma HLS PIPELINE" not in line:
            continue
        found, style = _II.search(line), _STYLE.search(line)
        label = next((n for n in range(number, -1, -1) if re.fullmatch(r"\s*\w+:", lines[n])), None)
        if found is None or label is None:
            raise DeviceError(f"{line.strip()}: no II = NUMBER, or no label before its loop")
        flushes = str(style is not None and style[1] in ("flp", "frp")).lower()
        lines[label] += f" KGRC_LOOP({found[1]}, {flushes})"
    text = _STREAM.sub(r"\1.set_depth(\2);", "\n".join(lines))
    for name in SETUPS:
        begins = re.compile(rf"^((?:static )?\w+ {name}\([^;{{]*\) {{)$", re.MULTILINE)
        text = begins.sub(rf'\1 KGRC_SPEND("{name}");', text)
    before, pragma, region = text.partition("#pragma HLS DATAFLOW")
    if not pragma:
        return text
    body, end, after = region.partition("\n}\n")
    names = Counter(call[1] for call in _CALL.finditer(body))
    if not names:
        raise DeviceError("#pragma HLS DATAFLOW: no call of a process follows")
    seen: Counter[str] = Counter()

    def started(call: re.Match[str]) -> str:
        name = call[1]
        if names[name] > 1:
            name, seen[call[1]] = f"{name}_{seen[call[1]]}", seen[call[1]] + 1
        return f'  start_process("{name}", [&] {{ {call[1]}({call[2]}); }});'

    return f"{before}{pragma}{_CALL.sub(started, body)} run_processes();{end}{after}"


# ---- the backend -------------------------------------------------------------------------------


class TimedSimulation(CSimulation):
    """The accelerator `config`, simulated with clocks by its own C++ sources.

    `timing` may be changed between runs. `Counters.cycles` are simulated clock cycles.
    """

    name = "timed"

    def __init__(
        self,
        config: AcceleratorConfig,
        timing: Timing | None = None,
        flags: tuple[str, ...] = FAST,
    ) -> None:
        super().__init__(config, (*flags, "-DKGRC_TIMED"))
        self.timing = timing or Timing()
        self._times: dict[int, TaskTime] = {}
        self._library.kgrc_timed_set.argtypes = (ctypes.c_char_p, ctypes.c_double)
        self._library.kgrc_timed_set.restype = None
        self._library.kgrc_timed_clear.restype = None
        self._library.kgrc_timed_report.restype = ctypes.c_char_p

    def _build(self, flags: tuple[str, ...]) -> Path:
        return build_library(self.config, flags, timed_source, ("timed.cpp",))

    @locked
    def load(self, program: Program) -> None:
        """Lay out the program's memory, in place of any program loaded before.

        Raises:
            ProgramError: it was compiled for another design, or the hardware cannot address it.
        """
        super().load(program)
        self._times = {}

    def task_time(self, number: int) -> TaskTime:
        """The time of a task in its last run.

        Raises:
            DeviceError: the task has not run, or its run failed.
        """
        with self.lock:
            if number not in self._times:
                raise DeviceError(f"task {number} has no simulated time: it has not run to its end")
            return self._times[number]

    def _simulate(
        self, ports: Sequence[tuple[int, int]], digest: ctypes.c_uint64, first: int, count: int
    ) -> str:
        self._times.pop(first, None)
        library = self._library
        library.kgrc_timed_clear()
        for name, value in _settings(self.timing):
            library.kgrc_timed_set(name.encode(), value)
        fault = super()._simulate(ports, digest, first, count)
        if not fault:
            self._times[first] = self._read_report()
        return fault

    def _read_report(self) -> TaskTime:
        found = msgspec.json.decode(self._library.kgrc_timed_report(), type=TaskTime)
        known = {stream.name for stream in found.streams}
        names = {process.name for process in found.processes}
        for kind, given, there in (
            ("stream", self.timing.streams, known),
            ("process", self.timing.depths, names),
        ):
            if unknown := set(given) - there:
                raise DeviceError(
                    f"no {kind} {', '.join(sorted(unknown))}; there are {', '.join(sorted(there))}"
                )
        return _completed(found, self.timing)

    def _counters(self, number: int, seconds: float) -> Counters:
        cycles = round(self._times[number].cycles)
        return replace(super()._counters(number, seconds), cycles=cycles)


def _settings(timing: Timing) -> Iterator[tuple[str, float]]:
    """The settings of timed.cpp."""
    for name in ("latency", "port_bytes", "ddr_bytes", "outstanding", "burst_beats", "depth"):
        yield name, float(getattr(timing, name))
    yield "flush", float(timing.flush)
    for prefix, values in (
        ("setup", timing.setups),
        ("depth", timing.depths),
        ("stream", timing.streams),
    ):
        for name, value in values.items():
            yield f"{prefix}.{name}", float(value)


def _completed(found: TaskTime, timing: Timing) -> TaskTime:
    """Give waits for ports the ports' names, and add what the task takes beside its processes."""
    processes = tuple(
        msgspec.structs.replace(
            each,
            waits=tuple(
                sorted(
                    (
                        msgspec.structs.replace(wait, on=ADDRESSES[int(wait.on)])
                        if wait.why == "port"
                        else wait
                        for wait in each.waits
                    ),
                    key=lambda wait: -wait.cycles,
                )
            ),
        )
        for each in found.processes
    )
    descriptor = timing.start_cycles + timing.latency + len(FIELDS) / 2
    status = timing.latency + len(STATUS)
    cycles = found.cycles + descriptor + status
    return msgspec.structs.replace(found, processes=processes, cycles=cycles)
