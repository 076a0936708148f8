"""The process that owns the device: `python -m pynq_kgrc.service.worker BACKEND`.

It reads commands from standard input and writes an answer to each on standard output, one after
the other, until standard input ends. If it dies, the operating system releases the device, and
`pool.py` starts another worker.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from pynq_kgrc.accelerator.latency import task_time
from pynq_kgrc.accelerator.paper import PUBLISHED_CLOCK_MHZ
from pynq_kgrc.analysis.description import describe
from pynq_kgrc.errors import KgrcError, ProgramError
from pynq_kgrc.program import Program, load
from pynq_kgrc.quant import Array
from pynq_kgrc.runtime import Session
from pynq_kgrc.service import wire
from pynq_kgrc.service.wire import Answer, Command, LayerRun, ProgramDocument, TimedTask


class DeviceSessions:
    """The loaded programs, and their open sessions on the one device.

    A backend that is not exclusive is opened for each program. An exclusive one is opened once for
    all programs of a design, which take turns on it; another design's is opened in its place.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.programs: dict[str, Program] = {}
        self.sessions: dict[str, Session] = {}
        self.opener: Session | None = None
        """The session that opened the exclusive backend, which the others use too."""

    def execute(self, command: Command, payload: bytes) -> tuple[Answer, bytes]:
        """Execute one command; its answer and payload.

        Raises:
            KgrcError: why it could not be executed.
        """
        if command.verb == "load":
            return Answer(program=self.load(command.key, Path(command.path))), b""
        if command.verb == "run":
            return self.run(command.key, payload)
        if command.verb == "drop":
            self.drop(command.key)
        elif command.verb != "ping":
            raise ProgramError(f"no command {command.verb!r}; there are load, run, drop and ping")
        return Answer(), b""

    def load(self, key: str, path: Path) -> ProgramDocument:
        """Load a program and run a clip of zeros through it; its description."""
        program = load(path)
        self.programs[key] = program
        try:
            clip = program.clip
            shape = (clip.frames, clip.height, clip.width, clip.channels)
            self.session(key).run(np.zeros(shape, np.uint8))
            return describe_for_clients(program)
        except BaseException:
            self.drop(key)
            raise

    def session(self, key: str) -> Session:
        """The session of a program; it is opened if it is not open.

        Raises:
            ProgramError: no program of that key is loaded.
        """
        if key not in self.sessions:
            if key not in self.programs:
                raise ProgramError(f"no program {key!r} is loaded")
            program = self.programs[key]
            if self.opener and self.opener.program.config.digest != program.config.digest:
                self._close_exclusive()
            session = Session(program, self.opener.backend if self.opener else self.backend)
            if self.opener is None and session.backend.exclusive:
                self.opener = session
            self.sessions[key] = session
        return self.sessions[key]

    def _close_exclusive(self) -> None:
        if self.opener is not None:
            self.sessions.clear()  # all of them use its backend
            opener, self.opener = self.opener, None
            opener.close()

    def run(self, key: str, payload: bytes) -> tuple[Answer, bytes]:
        """Run a clip, uint8 [D, H, W, C]; logits and probabilities as float32 [2, classes]."""
        session = self.session(key)
        clip = session.program.clip
        shape = (clip.frames, clip.height, clip.width, clip.channels)
        if len(payload) != np.prod(shape):
            raise ProgramError(f"a clip of {len(payload)} bytes; {key} takes uint8 {shape}")
        start = time.perf_counter()
        frames: Array = np.frombuffer(payload, np.uint8).reshape(shape)
        scores = session.run(frames)
        result = np.stack([scores.logits, scores.probabilities]).astype("<f4")
        layers = [
            LayerRun(
                task=counters.task,
                macs=counters.macs,
                bytes=counters.bytes_in + counters.bytes_weight + counters.bytes_out,
                ms=round(1e3 * counters.seconds, 3),
            )
            for counters in scores.layers
        ]
        return Answer(seconds=time.perf_counter() - start, layers=layers), result.tobytes()

    def drop(self, key: str) -> None:
        """Forget a program; a key that is not loaded is no error."""
        session = self.sessions.pop(key, None)
        if session is not None and session is not self.opener:
            session.close()
        self.programs.pop(key, None)
        if not self.programs:
            self._close_exclusive()

    def close(self) -> None:
        """Drop all programs and release the device."""
        for key in list(self.programs):
            self.drop(key)


def describe_for_clients(program: Program) -> ProgramDocument:
    """A description with labels, the sampling of frames, and modelled latencies in ms."""
    description = describe(program)
    tasks = []
    for task, row in zip(program.tasks, description.tasks, strict=True):
        cycles = task_time(program.config, program.work(task)).cycles
        modelled_ms = round(cycles / (PUBLISHED_CLOCK_MHZ * 1e3), 4)
        tasks.append(TimedTask(**msgspec.structs.asdict(row), modelled_ms=modelled_ms))
    fields = {
        **msgspec.structs.asdict(description),
        "classes": program.tasks[-1].shape.out_channels,
        "tasks": tuple(tasks),
    }
    return ProgramDocument(
        **fields,
        labels=list(program.labels),
        modelled_ms=round(sum(task.modelled_ms for task in tasks), 3),
        modelled_clock_mhz=PUBLISHED_CLOCK_MHZ,
    )


def serve(sessions: DeviceSessions, commands: BinaryIO, answers: BinaryIO) -> None:
    """Execute commands until their stream ends."""
    while (message := wire.receive(commands, Command)) is not None:
        command, payload = message
        try:
            answer, body = sessions.execute(command, payload)
        except (KgrcError, MemoryError) as error:
            text = str(error) or "out of memory"
            answer, body = Answer(error=text, kind=type(error).__name__), b""
        wire.send(answers, answer, body)
    sessions.close()


def main() -> None:
    # answers go to a copy of descriptor 1; prints of any library go to standard error
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # Ctrl-C reaches the whole process group; the service itself ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(DeviceSessions(sys.argv[1]), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
