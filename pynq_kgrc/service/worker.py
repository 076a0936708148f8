"""The process that owns the device: `python -m pynq_kgrc.service.worker BACKEND`.

It reads orders on standard input and answers each on standard output, one after the other, until
standard input ends. If it dies, the device is free again, and `pool.py` starts another.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from pynq_kgrc.accelerator.cost import task_cost
from pynq_kgrc.accelerator.paper import PUBLISHED_CLOCK_MHZ
from pynq_kgrc.analysis.description import describe
from pynq_kgrc.errors import KgrcError, ProgramError
from pynq_kgrc.program import Program, load
from pynq_kgrc.quant import Array
from pynq_kgrc.runtime import Session
from pynq_kgrc.service import wire
from pynq_kgrc.service.wire import Answer, Order


class Owner:
    """The programs that are loaded, and the one device they run on.

    The emulation keeps a session for each program. A device holds one program at a time, so that
    there the session changes with the program asked for.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.programs: dict[str, Program] = {}
        self.sessions: dict[str, Session] = {}

    def obey(self, order: Order, payload: bytes) -> tuple[Answer, bytes]:
        """Carry out one order.

        Raises:
            KgrcError: what stood in the way.
        """
        if order.verb == "load":
            return Answer(program=self.load(order.key, Path(order.path))), b""
        if order.verb == "run":
            return self.run(order.key, payload)
        if order.verb == "drop":
            self.drop(order.key)
        elif order.verb != "ping":
            raise ProgramError(f"no order {order.verb!r}; there are load, run, drop and ping")
        return Answer(), b""

    def load(self, key: str, path: Path) -> dict[str, Any]:
        """Load a program and run a clip of zeros through it; its description."""
        program = load(path)
        self.programs[key] = program
        try:
            clip = program.clip
            frames = np.zeros((clip.frames, clip.height, clip.width, 3), np.uint8)
            self.session(key).run(frames)
            return describe_for_clients(program)
        except BaseException:
            self.drop(key)
            raise

    def session(self, key: str) -> Session:
        """The session of a program, opened if need be."""
        if key not in self.sessions:
            if key not in self.programs:
                raise ProgramError(f"no program {key!r} is loaded")
            if self.backend != "emulate":
                for other in list(self.sessions):
                    self.sessions.pop(other).close()
            self.sessions[key] = Session(self.programs[key], self.backend)
        return self.sessions[key]

    def run(self, key: str, payload: bytes) -> tuple[Answer, bytes]:
        """Logits and probabilities, float32 [2, classes], of one clip."""
        session = self.session(key)
        clip = session.program.clip
        shape = (clip.frames, clip.height, clip.width, 3)
        if len(payload) != np.prod(shape):
            raise ProgramError(f"a clip of {len(payload)} bytes; {key} takes uint8 {shape}")
        start = time.perf_counter()
        frames: Array = np.frombuffer(payload, np.uint8).reshape(shape)
        scores = session.run(frames)
        result = np.stack([scores.logits, scores.probabilities]).astype("<f4")
        layers = [
            {
                "task": counters.task,
                "macs": counters.macs,
                "bytes": counters.bytes_in + counters.bytes_weight + counters.bytes_out,
                "ms": round(1e3 * counters.seconds, 3),
            }
            for counters in scores.layers
        ]
        return Answer(seconds=time.perf_counter() - start, layers=layers), result.tobytes()

    def drop(self, key: str) -> None:
        """Forget a program; one that is not there is no error."""
        if key in self.sessions:
            self.sessions.pop(key).close()
        self.programs.pop(key, None)

    def close(self) -> None:
        """Give the device back."""
        for key in list(self.programs):
            self.drop(key)


def describe_for_clients(program: Program) -> dict[str, Any]:
    """A description with the labels, how frames are chosen, and modelled latency in ms."""
    document: dict[str, Any] = msgspec.to_builtins(describe(program))
    clip = program.clip
    chosen = ("frames", "height", "width", "short_side", "step")
    document["clip"] = {name: getattr(clip, name) for name in chosen}
    document["classes"] = program.tasks[-1].shape.out_channels
    document["labels"] = list(program.labels)
    for task, row in zip(program.tasks, document["tasks"], strict=True):
        cycles = task_cost(program.config, program.work(task)).cycles
        row["modelled_ms"] = round(cycles / (PUBLISHED_CLOCK_MHZ * 1e3), 4)
    document["modelled_ms"] = round(sum(row["modelled_ms"] for row in document["tasks"]), 3)
    document["modelled_clock_mhz"] = PUBLISHED_CLOCK_MHZ
    return document


def serve(owner: Owner, orders: BinaryIO, answers: BinaryIO) -> None:
    """Obey until there are no more orders."""
    while (message := wire.receive(orders, Order)) is not None:
        order, payload = message
        try:
            answer, body = owner.obey(order, payload)
        except (KgrcError, MemoryError) as error:
            text = str(error) or "out of memory"
            answer, body = Answer(error=text, kind=type(error).__name__), b""
        wire.send(answers, answer, body)
    owner.close()


def main() -> None:
    # a print somewhere must not end up among the answers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # Ctrl-C reaches the whole group; the service asks when it is time to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(Owner(sys.argv[1]), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
