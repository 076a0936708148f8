"""Power of a board's supply rails while something runs, from the sensors that Linux lists.

Where the names come from: a chip's name in /sys/class/hwmon, by `CHIPS`; else pynq, whose
configuration of libsensors names the rails of a ZCU104. With PYNQ_KGRC_SIMULATE=1 the rails are
simulated, and each has "(simulated)" in its name.
"""

from __future__ import annotations

import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pynq_kgrc.backends.board import simulation_requested
from pynq_kgrc.errors import DeviceError
from pynq_kgrc.quant import Array

INTERVAL = 0.02
"""Seconds between two readings. The sensors of a ZCU102 average over some milliseconds."""

LIMIT = 120.0
"""Seconds after which a recording ends, even if the work has not."""

SYSFS = Path("/sys/class/hwmon")
"""Where Linux lists its sensor chips, a folder each; `power1_input` is in microwatts."""

CHIPS = {
    "ina226_u79": ("VCCINT", "logic of the FPGA: the accelerator's array"),
    "ina226_u81": ("VCCBRAM", "block RAM of the FPGA"),
    "ina226_u80": ("VCCAUX", "auxiliary circuits of the FPGA"),
    "ina226_u84": ("VCC1V2", "1.2 V of the FPGA's pins"),
    "ina226_u16": ("VCC3V3", "3.3 V of the FPGA's pins"),
    "ina226_u65": ("VADJ_FMC", "FMC cards"),
    "ina226_u74": ("MGTAVCC", "transceivers of the FPGA"),
    "ina226_u75": ("MGTAVTT", "termination of the FPGA's transceivers"),
    "ina226_u76": ("VCCPSINTFP", "processor: A53 cores, DDR controller"),
    "ina226_u77": ("VCCPSINTLP", "processor: R5 cores, peripherals"),
    "ina226_u78": ("VCCPSAUX", "auxiliary circuits of the processor"),
    "ina226_u87": ("VCCPSPLL", "clocks of the processor"),
    "ina226_u85": ("MGTRAVCC", "transceivers of the processor"),
    "ina226_u86": ("MGTRAVTT", "termination of the processor's transceivers"),
    "ina226_u93": ("VCCO_PSDDR_504", "DDR4 pins of the processor"),
    "ina226_u88": ("VCCOPS", "pins of the processor"),
    "ina226_u15": ("VCCOPS3", "3.3 V pins of the processor"),
    "ina226_u92": ("VCCPSDDRPLL", "clocks of the DDR controller"),
    "ina260_u14": ("SOM_5V0", "the whole module of a KV260 or KR260"),
}
"""Name of a chip in sysfs -> its rail, and what the rail feeds; in this order.

The INA226 are a ZCU102's, named by their place on the board ("u79") in Linux's device tree
(zynqmp-zcu102-revA.dts). The rails are those that public power monitors for this board name; AMD's
UG1182, which has the tables, was not at hand. The INA260 is that of a Kria K26 module."""

SIMULATED = "(simulated)"
"""Ends the name of each simulated rail."""

DEFAULT_LABEL = re.compile(r"(in|curr|power|temp|fan|[piv]in|[piv]out)\d*")
"""What libsensors and drivers of PMBus chips call a sensor that has no name: the same on each
chip."""


@dataclass(frozen=True)
class Rail:
    """A supply rail; called, it reads the rail's power in watts."""

    name: str
    feeds: str
    """What it feeds, for a reader; "" if unknown."""
    source: str
    """Where the reading comes from: a chip of sysfs, pynq, or that it is simulated."""
    read: Callable[[], float]

    def __call__(self) -> float:
        return self.read()


@dataclass(frozen=True)
class Recording:
    """Power of all rails over time; the rails of a reading are read one after the other."""

    seconds: Array
    """[readings]: when each was begun, from the start."""
    watts: Mapping[str, Array]
    """Rail -> [readings]."""
    duration: float
    """Seconds that the work took."""

    @property
    def simulated(self) -> bool:
        """Whether the figures are made up, and nothing was measured."""
        return any(name.endswith(SIMULATED) for name in self.watts)

    @property
    def mean_watts(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.watts.items()}


@dataclass(frozen=True)
class RailEnergy:
    """The energy of one clip on one rail, from a recording at rest and one at work."""

    rail: str
    idle_watts: float
    work_watts: float
    clip_joules: float
    """All energy of the rail for the time of a clip."""
    added_joules: float
    """What of it is beyond the rail's power at rest; below 0 where noise is all there is."""


def clip_energy(idle: Recording, work: Recording, clips: int) -> list[RailEnergy]:
    """The energy of a clip on each rail, from a recording of `work` that ran `clips` of them.

    Do not add rails up: some feed others. Host and accelerator share rails, such as the DDR's.
    """
    each = work.duration / clips
    rest = idle.mean_watts
    return [
        RailEnergy(name, rest[name], watts, watts * each, (watts - rest[name]) * each)
        for name, watts in work.mean_watts.items()
    ]


def find_rails(sysfs: Path = SYSFS) -> dict[str, Rail]:
    """The rails that can be read here, by name, VCCINT first; empty on most computers.

    They are the chips of sysfs that `CHIPS` names; where there is none, what pynq names; where that
    is nothing either, other INA chips by their own names. A name stands for one rail only.
    With PYNQ_KGRC_SIMULATE=1 they are a ZCU102's, named "VCCINT (simulated)" and so on, and what
    they read is made up (`simulated_rails`).

    Args:
        sysfs: the folder of the sensor chips.
    """
    if simulation_requested():
        found = simulated_rails()
    else:
        chips = dict(_chips(sysfs))
        found = [_sysfs_rail(chips[chip], *CHIPS[chip], chip) for chip in CHIPS if chip in chips]
        found = (
            found
            or _pynq_rails()
            or [
                _sysfs_rail(folder, chip, "", chip)
                for chip, folder in chips.items()
                if chip.startswith("ina")
            ]
        )
    return {rail.name: rail for rail in found}


def _chips(sysfs: Path) -> Iterator[tuple[str, Path]]:
    """The name and the folder of each chip that measures power; equal names get their folder's."""
    folders = sorted(path.parent for path in sysfs.glob("*/power1_input"))
    names = [_name(folder) for folder in folders]
    counts = Counter(names)
    for name, folder in zip(names, folders, strict=True):
        yield name if counts[name] == 1 else f"{name} ({folder.name})", folder


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text().strip()
    except OSError:
        return folder.name


def _sysfs_rail(folder: Path, name: str, feeds: str, chip: str) -> Rail:
    path = folder / "power1_input"
    return Rail(name, feeds, f"{chip}, {path}", lambda: 1e-6 * int(path.read_text()))


def _pynq_rails() -> list[Rail]:
    """What pynq names. It keeps one rail for each label, so that default labels are useless."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rails: Mapping[str, Any] = import_module("pynq.pmbus").get_rails()
        except (ImportError, OSError):
            return []
    readers = {
        name: _reader(rail) for name, rail in rails.items() if not DEFAULT_LABEL.fullmatch(name)
    }
    return [
        Rail(name, "", "pynq.get_rails()", reader)
        for name, reader in readers.items()
        if reader is not None
    ]


def _reader(rail: Any) -> Callable[[], float] | None:
    """Reads watts from the rail's power sensor, else voltage x current; None if it has neither."""
    if rail.power is not None:
        return lambda: float(rail.power.value)
    if rail.voltage is not None and rail.current is not None:
        return lambda: float(rail.voltage.value * rail.current.value)
    return None


def simulated_rails() -> list[Rail]:
    """A ZCU102's rails with figures that are made up: to try notebooks and commands, no model.

    Each reads 1 W. Those that the accelerator uses read 1.5 W if the simulated kernel was started
    since their last reading. None without pynq.
    """
    try:
        kernel = import_module("pynq_kgrc.backends.board.simulated").shared_device().kernel
    except ImportError:
        return []

    def reader(varies: bool) -> Callable[[], float]:
        starts = kernel.starts

        def read() -> float:
            nonlocal starts
            before, starts = starts, kernel.starts
            return 1.5 if varies and starts != before else 1.0

        return read

    varying = ("VCCINT", "VCCBRAM", "VCCO_PSDDR_504")
    return [
        Rail(f"{name} {SIMULATED}", feeds, "simulated: made up", reader(name in varying))
        for chip, (name, feeds) in CHIPS.items()
        if chip.startswith("ina226")
    ]


def record_power(
    rails: Mapping[str, Callable[[], float]],
    work: Callable[[], object],
    interval: float = INTERVAL,
) -> Recording:
    """Read the rails every `interval` seconds while `work` runs; at least once.

    Raises:
        DeviceError: `rails` is empty, or a sensor fails.
    """
    if not rails:
        raise DeviceError("power is not measured: there are no sensors here")
    times: list[float] = []
    readings: list[list[float]] = []
    failed: list[Exception] = []
    done = threading.Event()
    began = time.perf_counter()

    def sample() -> None:
        try:
            while True:
                times.append(time.perf_counter() - began)
                readings.append([read() for read in rails.values()])
                if done.wait(interval) or times[-1] > LIMIT:
                    return
        except Exception as error:  # raised below, in the calling thread
            failed.append(error)

    sampler = threading.Thread(target=sample, name="power", daemon=True)
    sampler.start()
    try:
        work()
    finally:
        done.set()
        duration = time.perf_counter() - began
        sampler.join(LIMIT)
    if failed or not readings:
        cause = failed[0] if failed else f"no reading within {LIMIT:g} s"
        raise DeviceError(f"a power sensor fails: {cause}")
    columns = np.array(readings).T
    watts = dict(zip(rails, columns, strict=True))
    return Recording(np.array(times[: len(readings)]), watts, duration)
