"""Where the time of a clip goes on a backend: host and device, layer by layer; measured.

The times are those of the machine that ran it. Only on a board, and on none that is simulated, are
they times of the accelerator. What is modelled stands in fields of its own whose names say so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import msgspec

from pynq_kgrc.accelerator.boards import CLOCK_MHZ, REFERENCE
from pynq_kgrc.analysis.timing import LayerTime, time_layers
from pynq_kgrc.backends.board import simulation_requested
from pynq_kgrc.backends.board.power import Rail, RailEnergy, clip_energy, record_power
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.quant import Array
from pynq_kgrc.runtime import Scores, Session

PARTS = ("decode", "encode", "pack", "copy", "device", "read")
"""The parts of a clip's time, in order: video to frames; then those of `runtime.Seconds`."""


IDLE_SECONDS = 2.0
"""How long the rails are read before the clips, with nothing to do."""


class LayerProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One task. Times and counts are medians over the clips; bytes and counts are of one clip."""

    name: str
    ms: float
    """Measured where the profile says. Of a board that starts all tasks at once: the task's share
    by the clocks that it counted, or by its trips where none were counted."""
    macs: int
    """Multiply-accumulates of the array."""
    bytes_read: int
    """From memory: maps, weights and tables."""
    bytes_written: int
    read_mb_per_s: float | None
    written_mb_per_s: float | None
    """Bytes by `ms`; None where no kernel moves them."""
    trips: int | None
    """Trips of the array that were counted; None if no kernel ran."""
    clocks: int | None
    """Clock cycles that were counted; None where there is no clock."""
    modelled_clocks: int
    """Of the accelerator, by the cost model with memory."""
    modelled_ms: float
    """`modelled_clocks` at the clock of the profile."""

    @property
    def waiting(self) -> float | None:
        """The share of the counted clocks in which the array made no trip."""
        if not self.clocks or self.trips is None:
            return None
        return max(0.0, 1 - self.trips / self.clocks)

    @property
    def slowdown(self) -> float | None:
        """Counted over modelled clocks."""
        return None if self.clocks is None else self.clocks / self.modelled_clocks


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """The times of a program on a backend."""

    figures: str
    """What the times are, and where they were measured."""
    modelled: str
    """What the modelled figures assume."""
    program: str
    design: str
    backend: str
    clips: int
    clock_mhz: float
    """Of the array: the board's own, else the one that is assumed for the model."""
    parts_ms: dict[str, float]
    """Milliseconds of each of `PARTS`, one clip after the other; medians."""
    layers: tuple[LayerProfile, ...]
    clips_per_s: float
    """One clip after the other, from the video to its probabilities."""
    clips_per_s_overlapped: float
    """The next clip decoded, encoded and packed while one runs (`Session.run_many`)."""
    modelled_ms: float
    """All tasks, modelled."""
    power: tuple[RailEnergy, ...] = ()
    """The rails that were asked for, at rest and while clips overlap; the name of a simulated rail
    says so."""

    @property
    def host_ms(self) -> float:
        """All parts but the device."""
        return sum(ms for part, ms in self.parts_ms.items() if part != "device")


def measure_profile(
    session: Session,
    source: Callable[[], Iterable[Array]],
    clips: int = 8,
    rails: Mapping[str, Rail] | None = None,
) -> Profile:
    """Run clips one after the other, then again with the next one prepared while one runs.

    One more clip is run before, which is not measured. With rails they are read at rest and while
    the clips run once more.

    Args:
        session: runs the clips.
        source: gives the clips of a video, uint8 [D, H, W, 3]; asked again when they are used up.
            What it takes to give one is the part "decode".
        clips: how many to run.
        rails: what to read the power of (`power.find_rails`); None for no power.

    Raises:
        ConfigError: `clips` is below 1, or the source gives none.
        ProgramError: a clip has another size than the program's.
        DeviceError: the device did not finish, or a sensor fails.
    """
    if clips < 1:
        raise ConfigError(f"a profile of {clips} clips; use 1 or more")

    def run_all() -> None:
        for _ in session.run_many(islice(_timed_clips(source), clips), lambda clip: clip[0]):
            pass

    for frames, _ in islice(_timed_clips(source), 1):
        session.run(frames)
    decode, runs = [], []
    began = time.perf_counter()
    for frames, seconds in islice(_timed_clips(source), clips):
        decode.append(seconds)
        runs.append(session.run(frames))
    alone = time.perf_counter() - began
    began = time.perf_counter()
    run_all()
    overlapped = time.perf_counter() - began
    power: list[RailEnergy] = []
    if rails:
        idle = record_power(rails, lambda: time.sleep(IDLE_SECONDS))
        power = clip_energy(idle, record_power(rails, run_all), clips)
    program, clock = session.program, session.backend.clock_mhz or CLOCK_MHZ
    layers = _layers(session, runs, time_layers(program), clock)
    parts = {part: [getattr(run.seconds, part) for run in runs] for part in PARTS[1:]}
    return Profile(
        figures=_figures(session.backend_name),
        modelled=REFERENCE.describe(clock),
        program=program.name,
        design=program.config.name,
        backend=session.backend_name,
        clips=clips,
        clock_mhz=clock,
        parts_ms={
            part: 1e3 * statistics.median(seconds)
            for part, seconds in ({"decode": decode} | parts).items()
        },
        layers=layers,
        clips_per_s=clips / alone,
        clips_per_s_overlapped=clips / overlapped,
        modelled_ms=sum(layer.modelled_ms for layer in layers),
        power=tuple(power),
    )


def _timed_clips(source: Callable[[], Iterable[Array]]) -> Iterator[tuple[Array, float]]:
    """The clips of the source over and over, each with the seconds that it took to give it."""
    while True:
        began, count = time.perf_counter(), 0
        for frames in source():
            count += 1
            yield frames, time.perf_counter() - began
            began = time.perf_counter()
        if not count:
            raise ConfigError("a profile needs a clip; the video has none")


def _layers(
    session: Session, runs: Sequence[Scores], modelled: Sequence[LayerTime], clock_mhz: float
) -> tuple[LayerProfile, ...]:
    found = []
    for number, layer in enumerate(modelled):
        counters = [run.layers[number] for run in runs]
        first, seconds = counters[0], statistics.median(each.seconds for each in counters)
        clocks = [each.cycles for each in counters if each.cycles is not None]
        moved = session.backend_name == "board"  # by a kernel, in that time
        read = first.bytes_in + first.bytes_weight
        found.append(
            LayerProfile(
                name=layer.name,
                ms=1e3 * seconds,
                macs=first.macs,
                bytes_read=read,
                bytes_written=first.bytes_out,
                read_mb_per_s=read / seconds / 1e6 if moved else None,
                written_mb_per_s=first.bytes_out / seconds / 1e6 if moved else None,
                trips=first.trips,
                clocks=int(statistics.median(clocks)) if clocks else None,
                modelled_clocks=layer.time.cycles,
                modelled_ms=layer.time.cycles / (clock_mhz * 1e3),
            )
        )
    return tuple(found)


def _figures(backend: str) -> str:
    """What the times of a backend are."""
    if backend == "board":
        if simulation_requested():
            return "simulated board: the times are this computer's, not those of an FPGA"
        return "measured on this board"
    how = {"emulate": "emulation", "csim": "C-simulation", "timed": "timed simulation"}
    return f"measured on this host ({how.get(backend, backend)}), not on an FPGA"
