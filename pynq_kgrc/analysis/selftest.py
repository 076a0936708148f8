"""The self-test of a board: nine steps from its Linux to its power, each with its own verdict.

Each step says ok, failed or skipped, with what it found. What was skipped has a reason and is no
success. A step that fails names what it found wrong; the later ones run all the same, unless the
device cannot be opened. Nothing in this module needs torch, the sources in hls_src or a network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.header import STATUS
from pynq_kgrc.accelerator.latency import task_time
from pynq_kgrc.analysis.known_answers import (
    KnownAnswer,
    PortAnswer,
    known_answers,
    port_answers,
    random_answer,
    random_codes,
    random_program,
    timing_program,
)
from pynq_kgrc.backends.board import simulation_requested
from pynq_kgrc.backends.board.backend import SLOW
from pynq_kgrc.backends.board.device import find_device
from pynq_kgrc.backends.board.machine import CHECKS, Asked, MissingError, run_checks
from pynq_kgrc.backends.board.power import find_rails, record_power
from pynq_kgrc.backends.board.probe import ProbedBoard, memory_held
from pynq_kgrc.errors import DeviceError, KgrcError
from pynq_kgrc.program import ConvTask, Program, Task
from pynq_kgrc.quant import Array

OK, FAILED, SKIPPED = "ok", "failed", "skipped"

REPEATS = 100

LIMIT = 300.0
"""Seconds that a step may take. It is looked at between runs, each of which has its own limit."""

STARTS = 50
"""Starts by which interrupts are timed, and runs in which they are counted."""

POWER_SECONDS = 2.0
"""How long the power is read at rest, and at work."""

LISTED = 8
"""Wrong bits, counters or tasks that a message names at most."""

HIGH = 1 << 32
"""Addresses from here on need the high word of an address register. A ZCU102 has half of its memory
there; in which half contiguous memory lies is the choice of Linux."""

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Passes items on, and shows under a text how many there have been."""


@dataclass(frozen=True)
class Part:
    """One check of a step."""

    name: str
    state: str
    found: str


@dataclass(frozen=True)
class Outcome:
    """What a step found; it failed if one of its parts did."""

    found: str
    parts: tuple[Part, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    """Numbers, for a program to read."""


@dataclass(frozen=True)
class StepResult:
    """The verdict of one step."""

    number: int
    name: str
    state: str
    """OK, FAILED or SKIPPED."""
    found: str
    parts: tuple[Part, ...]
    seconds: float
    """Measured on this host."""
    data: dict[str, Any]


class SkippedError(KgrcError):
    """SkippedError(reason): a step does not apply here."""


def _no_progress(items: Iterable[Any], _: str) -> Iterable[Any]:
    return items


class SelfTest:
    """The steps for one design on the board of this machine, or on the simulated one.

    Args:
        config: the design that the overlay is of.
        overlay: where the overlay is looked for (`overlays.find_overlay`).
        program: a program of this design that is run as well; its emulation on this host is the
            known answer, so a large one takes minutes on a board's processor.
        repeats: how often the same clips are run, at least 1.
        limit: seconds for each step.
        progress: shows how far a step is.
        short: only the first memory, and one known answer.
    """

    def __init__(
        self,
        config: AcceleratorConfig,
        overlay: Path | None = None,
        program: Program | None = None,
        *,
        repeats: int = REPEATS,
        limit: float = LIMIT,
        progress: Progress = _no_progress,
        short: bool = False,
    ) -> None:
        self.config, self.overlay, self.program = config, overlay, program
        self.repeats, self.limit, self.short = repeats, limit, short
        self._progress = progress
        self._end = 0.0
        self._opened = False
        self._counted: list[tuple[Program, Array]] = []
        """Programs that ran, and the kernel's status words of all their tasks."""
        self.tool = ""
        """The tool that built the overlay, once it has been opened."""

    steps = (
        "machine",
        "programming",
        "memory",
        "known answers",
        "counters",
        "speed",
        "interrupts",
        "repeats",
        "power",
    )

    def run(self, numbers: Sequence[int] = range(1, 10)) -> Iterator[StepResult]:
        """Run the steps of these numbers, in order; yields each as it ends."""
        for number in numbers:
            name = self.steps[number - 1]
            step = getattr(self, f"_{name.replace(' ', '_')}")
            began = time.monotonic()
            self._end = began + self.limit
            parts: tuple[Part, ...] = ()
            data: dict[str, Any] = {}
            try:
                if number > 2 and not self._opened:
                    raise SkippedError("the device was not opened")
                outcome = step()
                found, parts, data = outcome.found, outcome.parts, outcome.data
                state = FAILED if any(part.state == FAILED for part in parts) else OK
            except SkippedError as error:
                state, found = SKIPPED, str(error)
            except KgrcError as error:
                state, found = FAILED, str(error)
            except Exception as error:  # a step that crashes has failed
                state, found = FAILED, f"{type(error).__name__}: {error}"
            yield StepResult(number, name, state, found, parts, time.monotonic() - began, data)

    def _tick(self) -> None:
        if time.monotonic() > self._end:
            raise DeviceError(f"the step was stopped at its limit of {self.limit:g} s")

    def _each(self, items: Iterable[Any], text: str) -> Iterator[Any]:
        """The items, with progress and with the step's limit looked at before each."""
        for item in self._progress(items, text):
            self._tick()
            yield item

    @cached_property
    def _network(self) -> KnownAnswer:
        """A layer of each kind."""
        return random_answer("every kind of layer", random_program(self.config, 0))

    @cached_property
    def _own(self) -> KnownAnswer:
        """The program that was given."""
        assert self.program is not None
        return random_answer(self.program.name, self.program)

    def _open(self, **options: Any) -> ProbedBoard:
        return ProbedBoard(self.config, self.overlay, **options)

    # ---- 1, 2: machine and programming ------------------------------------------------------

    def _machine(self) -> Outcome:
        found = run_checks("board", CHECKS, Asked(self.config, self.overlay))
        states = {True: OK, False: FAILED, None: SKIPPED}
        parts = tuple(
            Part(f.name, states[f.works], f"{f.found} -> {f.cure}" if f.cure else f.found)
            for f in found
        )
        return Outcome(_count(parts, "checks"), parts)

    def _programming(self) -> Outcome:
        with self._open() as board:
            board.program_again()
            text, self.tool = board.describe(), board.tool
            data = {"digest": self.config.digest, "clock_mhz": board.clock_hz / 1e6}
        self._opened = True
        return Outcome(text, data=data)

    # ---- 3: memory --------------------------------------------------------------------------

    def _memory(self) -> Outcome:
        answers = port_answers(self.config)
        places = [("not cached", False, 0.0), ("cached", True, 0.0), ("other half", False, 0.5)]
        parts: list[Part] = []
        ranges: list[tuple[int, int]] = []
        for name, cacheable, share in places[: 1 if self.short else None]:
            if cacheable and simulation_requested():
                parts.append(Part(name, SKIPPED, "simulated: all memory needs flushes alike"))
                continue
            with memory_held(find_device(), share) as held:
                if share and not held:
                    parts.append(Part(name, SKIPPED, "the free memory is unknown, or is none"))
                    continue
                with self._open(cacheable=cacheable) as board:
                    wrong = []
                    for check in self._each(answers, f"memory, {name}"):
                        try:
                            wrong += self._carry(board, check)
                        except DeviceError as error:
                            wrong.append(f"{check.answer.name}: {error}")
                        ranges += board.addresses().values()
            text = "; ".join(wrong) or f"{len(answers)} tasks right"
            parts.append(Part(name, FAILED if wrong else OK, text))
        ports = ", ".join(dict.fromkeys(port for check in answers for port in check.ports))
        if not ranges:
            return Outcome(f"{ports}: no memory to test them with", tuple(parts))
        low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
        for name, reached in (("below 4 GiB", low < HIGH), ("above 4 GiB", high >= HIGH)):
            if not reached and not self.short:
                parts.append(Part(name, SKIPPED, "no memory was allocated there"))
        where = f"{ports} at {low:#x} to {high:#x}"
        return Outcome(where, tuple(parts), {"lowest": low, "highest": high})

    def _carry(self, board: ProbedBoard, check: PortAnswer) -> list[str]:
        """What the answer of a task says about the ports; nothing if it is right."""
        answer = check.answer
        program = answer.program
        board.load(program)
        board.write(program.source, answer.clips[0])
        board.run()
        found = _read(board, program.tasks[-1])
        wanted = answer.outputs[0][-1]
        return [] if np.array_equal(found, wanted) else [blame(check, found)]

    # ---- 4, 5: known answers and counters -----------------------------------------------------

    def _known_answers(self) -> Outcome:
        answers = [self._network] if self.short else [self._network, *known_answers(self.config)]
        if self.program is not None:
            answers.append(self._own)
        parts = []
        self._counted = []
        with self._open() as board:
            for answer in self._each(answers, "known answers"):
                try:
                    wrong = self._compare(board, answer)
                except DeviceError as error:
                    wrong = str(error)
                count = len(answer.program.tasks)
                text = wrong or f"{count} tasks right, one by one and in one start"
                parts.append(Part(answer.name, FAILED if wrong else OK, text))
        modes = dict.fromkeys(
            task.weights.mode(self.config.gm, answer.program.group_columns(task))
            for answer in answers
            for task in answer.program.tasks
            if isinstance(task, ConvTask)
        )
        return Outcome(
            f"{_count(parts, 'programs')}; modes {', '.join(modes)}, {self.config.bits} bits",
            tuple(parts),
        )

    def _compare(self, board: ProbedBoard, answer: KnownAnswer) -> str:
        """The first task and element that differ; "" if all are right."""
        program = answer.program
        board.load(program)
        board.write(program.source, answer.clips[0])
        for number, task in enumerate(program.tasks):
            self._tick()
            board.run(number, number + 1)
            if differ := _difference(_read(board, task), answer.outputs[0][number]):
                return f"task {task.name} ({number + 1} of {len(program.tasks)}): {differ}"
        self._counted.append((program, board.words))
        # another clip: what the first one left cannot pass for the answer
        board.write(program.source, answer.clips[1])
        board.run()
        differ = _difference(_read(board, program.tasks[-1]), answer.outputs[1][-1])
        return f"all tasks in one start: {differ}" if differ else ""

    def _counters(self) -> Outcome:
        """All status words but `done` and `clocks`, which the cost model gives exactly."""
        if not self._counted:
            raise SkippedError("no known answer was right")
        names = [name for name in STATUS if name not in ("done", "clocks")]
        places = [STATUS.index(name) for name in names]
        wrong, tasks = [], 0
        for program, words in self._counted:
            for task, row in zip(program.tasks, words, strict=True):
                cost = task_time(self.config, program.work(task)).cost
                wanted = [getattr(cost, name) for name in names]
                found = row[places].tolist()
                tasks += 1
                wrong += [
                    Part(f"{program.name}, {task.name}", FAILED, f"{n} {f}, modelled {w}")
                    for n, f, w in zip(names, found, wanted, strict=True)
                    if f != w
                ]
        text = f"{len(names)} counters of {tasks} tasks"
        if not wrong:
            return Outcome(f"{text} as modelled, exactly")
        return Outcome(f"{text}: {len(wrong)} differ", tuple(wrong[:LISTED]))

    # ---- 6: speed -----------------------------------------------------------------------------

    def _speed(self) -> Outcome:
        """Counted clock cycles against the modelled ones, per task and per kind of port."""
        first = self._network
        with self._open() as board:
            board.load(first.program)
            board.write(first.program.source, first.clips[0])
            board.run()
            if not board.words[:, STATUS.index("clocks")].all():
                if simulation_requested():
                    raise SkippedError("simulated: no clock")
                raise DeviceError("the kernel counts no clock cycles")
            program = self.program or timing_program(self.config)
            board.load(program)
            board.write(program.source, random_codes(program, 0))
            board.run()  # once before it counts: caches and page tables are filled
            seconds = sum(counters.seconds for counters in board.run())
            words, hz = board.words, board.clock_hz
        return _speed(program, words, hz, None if simulation_requested() else seconds)

    # ---- 7, 8, 9: interrupts, repeats, power --------------------------------------------------

    def _interrupts(self) -> Outcome:
        answer = self._network
        with self._open() as board:
            if not board.interrupts:
                raise SkippedError("runs are polled: no interrupt is connected, or no UIO device")
            board.load(answer.program)
            board.write(answer.program.source, answer.clips[0])
            board.await_interrupts()
            for _ in self._each(range(STARTS), "interrupts"):
                board.run()
            awaited = board.time_interrupt(STARTS)
            arrived, lost = board.arrived, board.lost
            polled = board.time_start(STARTS)
        if lost:
            raise DeviceError(f"{lost} of {2 * STARTS} interrupts were lost")
        text = f"{arrived} of {2 * STARTS} interrupts arrived"
        if simulation_requested():
            return Outcome(f"{text}; their latency is not told: simulated, no clock")
        data = {"interrupt_seconds": awaited, "polled_seconds": polled}
        return Outcome(
            f"{text}; a start without tasks takes {1e6 * awaited:.0f} us, polled "
            f"{1e6 * polled:.0f} us (medians, measured)",
            data=data,
        )

    def _repeats(self) -> Outcome:
        """Two clips in turn, so that a result that was left behind is no right answer."""
        answer = self._network if self.program is None else self._own
        program, last = answer.program, answer.program.tasks[-1]
        with self._open() as board:
            board.load(program)
            for number in self._each(range(self.repeats), "repeats"):
                clip = number % 2
                board.write(program.source, answer.clips[clip])
                board.run()
                if differ := _difference(_read(board, last), answer.outputs[clip][-1]):
                    raise DeviceError(f"run {number + 1} of {self.repeats}: {differ}")
        return Outcome(f"{self.repeats} runs of {program.name}, the same bits")

    def _power(self) -> Outcome:
        if simulation_requested():
            raise SkippedError("simulated: no power")
        rails = find_rails()
        if not rails:
            raise SkippedError("no sensors of supply rails here")
        program = self.program or timing_program(self.config)
        with self._open() as board:
            board.load(program)
            board.write(program.source, random_codes(program, 0))

            def work() -> None:
                end = time.monotonic() + POWER_SECONDS
                while time.monotonic() < end:
                    board.run()

            rest = record_power(rails, lambda: time.sleep(POWER_SECONDS)).mean_watts
            busy = record_power(rails, work).mean_watts
        parts = tuple(
            Part(name, OK, f"{rest[name]:.3f} W at rest, {busy[name]:.3f} W at work")
            for name in rails
        )
        # no sum: some rails feed others
        text = f"{len(rails)} rails read at rest and at work (measured)"
        return Outcome(text, parts, {"rest_watts": rest, "work_watts": busy})


def quick_test(config: AcceleratorConfig, overlay: Path | None) -> str:
    """Steps 2 to 4 in short: the device is opened, its memory carries bits, a network is right.

    Raises:
        MissingError: what failed.
    """
    test = SelfTest(config, overlay, short=True)
    texts = []
    for result in test.run((2, 3, 4)):
        if result.state != OK:
            wrong = next((p.found for p in result.parts if p.state == FAILED), result.found)
            raise MissingError(
                f"{result.name}: {wrong}", "pynq-kgrc selftest names all that is wrong"
            )
        texts.append(result.found)
    return f"{texts[0]}; memory and a network of every kind of layer are right"


def as_data(result: StepResult) -> dict[str, Any]:
    """A result as plain data, for JSON."""
    return asdict(result)


def blame(check: PortAnswer, found: Array) -> str:
    """Which port, and which bits of its beats, a wrong answer points at."""
    answer = check.answer
    wanted = answer.outputs[0][-1]
    bits = answer.program.output.bits
    port = np.broadcast_to(check.port, wanted.shape)
    changed = (found.astype(np.int64) ^ wanted.astype(np.int64)) & ((1 << bits) - 1)
    wrong: dict[int, frozenset[int]] = {}
    for number in np.unique(port[changed != 0]).tolist():
        if check.line is None:
            wrong[number] = frozenset()
            continue
        line = np.broadcast_to(check.line, wanted.shape)
        here = [
            np.unique(line[(port == number) & (changed >> bit & 1 == 1)] + bit)
            for bit in range(bits)
        ]
        wrong[number] = frozenset(np.concatenate(here).tolist())
    told = int(np.asarray(check.port).max()) > 0  # whether the places differ by port
    named = check.ports[min(wrong)] if told and len(wrong) == 1 else " or ".join(check.ports)
    lines = sorted(frozenset().union(*wrong.values()))
    some = f"bits {', '.join(map(str, lines[:LISTED]))}{' ...' * (len(lines) > LISTED)}"
    which = f", {some} of a beat of {check.lines}" if lines else ""
    return f"{answer.name}: {named}: {_difference(found, wanted)}{which}"


def _difference(found: Array, wanted: Array) -> str:
    """The first element that differs, and how many do; "" if none does."""
    differ = np.argwhere(found != wanted)
    if not len(differ):
        return ""
    at = tuple(differ[0].tolist())
    return (
        f"element {list(at)} is {int(found[at])}, not {int(wanted[at])} "
        f"({len(differ)} of {wanted.size} differ)"
    )


def _read(board: ProbedBoard, task: Task) -> Array:
    return board.read(task.target, task.shape.out_channels, task.out_size)


def _count(parts: Sequence[Part], what: str) -> str:
    """How many parts are ok, failed and skipped, as far as there are any."""
    counts = {state: sum(p.state == state for p in parts) for state in (OK, FAILED, SKIPPED)}
    told = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    return f"{len(parts)} {what}: {told}"


def _speed(program: Program, words: Array, hz: float, seconds: float | None) -> Outcome:
    """What the clock cycles of a run say; `seconds` of the wall clock, where there is one.

    Raises:
        DeviceError: the counts contradict each other.
    """
    config = program.config
    parts, tasks = [], []
    for task, row in zip(program.tasks, words, strict=True):
        word = dict(zip(STATUS, row.tolist(), strict=True))
        time_ = task_time(config, program.work(task), clock_mhz=hz / 1e6)
        clocks = word["clocks"]
        if clocks < time_.ideal:
            raise DeviceError(
                f"task {task.name} counted {clocks} clock cycles for {time_.ideal} trips of its "
                f"slowest process; there can be one trip a cycle at most"
            )
        traffic = {
            "input": word["input_beats"] * config.beat_bytes,
            "shortcut": word["shortcut_beats"] * config.beat_bytes,
            "output": word["output_beats"] * config.beat_bytes,
            "weights": word["weight_beats"] * config.weight_port_words * 8,
            "tables": word["table_words"] * 8,
        }
        tasks.append(
            {
                "task": task.name,
                "clocks": clocks,
                "modelled": time_.cycles,
                "waiting": 1 - word["array"] / clocks,
                "trips": time_.ideal,
                "megabytes_per_second": {
                    kind: 1e-6 * count / clocks * hz for kind, count in traffic.items()
                },
                "bytes": traffic,
            }
        )
        parts.append(
            Part(
                task.name,
                OK,
                f"{1e3 * clocks / hz:.3f} ms, {clocks / time_.cycles:.2f} x modelled, array waits "
                f"{tasks[-1]['waiting']:.0%}",
            )
        )
    clocks = sum(each["clocks"] for each in tasks)
    ratio = clocks / sum(each["modelled"] for each in tasks)
    interval = min(each["clocks"] / each["trips"] for each in tasks)
    rates = {
        kind: 1e-6 * sum(each["bytes"][kind] for each in tasks) / clocks * hz
        for kind in tasks[0]["bytes"]
    }
    array = sum(int(row[STATUS.index("array")]) for row in words)
    text = (
        f"{1e3 * clocks / hz:.3f} ms of clock cycles, {ratio:.2f} x modelled (with memory); array "
        f"waits {1 - array / clocks:.0%}; II at most {interval:.2f}; MB/s "
        + ", ".join(f"{kind} {rate:.0f}" for kind, rate in rates.items())
    )
    data: dict[str, Any] = {
        "clocks": clocks,
        "clock_mhz": hz / 1e6,
        "ratio": ratio,
        "waiting": 1 - array / clocks,
        "initiation_interval": interval,
        "megabytes_per_second": rates,
        "tasks": tasks,
    }
    if seconds is not None:
        data["wall_seconds"] = seconds
        text += f"; wall clock {1e3 * seconds:.3f} ms (measured)"
        if seconds < 0.99 * clocks / hz:
            raise DeviceError(
                f"{clocks} clock cycles take {1e3 * clocks / hz:.3f} ms at {hz / 1e6:.6g} MHz, but "
                f"the wall clock says {1e3 * seconds:.3f} ms: the kernel has another clock"
            )
    if ratio > SLOW:
        parts.append(Part("all tasks", FAILED, f"{ratio:.2f} x modelled, accepted is {SLOW}"))
    return Outcome(text, tuple(parts), data)
