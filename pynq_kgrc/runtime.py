"""A session: one program on one device. Clips go in, predictions come out.

The host encodes the clip and turns the last codes into probabilities; everything between runs on
the backend.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from pynq_kgrc.backends.base import Backend, Counters, open_backend
from pynq_kgrc.errors import ProgramError
from pynq_kgrc.program import Program
from pynq_kgrc.quant import Array
from pynq_kgrc.results import Label


@dataclass(frozen=True)
class Prediction:
    """What a clip shows: the best labels first, and what it took to find out."""

    labels: tuple[Label, ...]
    layers: tuple[Counters, ...]
    backend: str
    seconds: float
    """From frames to labels, on this host."""


class Session:
    """A program loaded on a backend; a context manager.

    Args:
        program: what to run.
        backend: a name ("emulate"), or a backend that is already open and then stays open.

    Raises:
        ProgramError: the program is for another accelerator than the backend.
        DeviceError: no such backend, or its device does not answer.
    """

    def __init__(self, program: Program, backend: str | Backend = "emulate") -> None:
        self.program = program
        self._owned = isinstance(backend, str)
        self.backend: Backend = (
            open_backend(backend, program.config) if isinstance(backend, str) else backend
        )
        self.backend_name = self.backend.name
        try:
            self.backend.load(program)
        except BaseException:
            self.close()
            raise

    def classify(self, frames: Array, top: int = 5) -> Prediction:
        """The `top` best labels of a clip.

        Args:
            frames: uint8 RGB [D, H, W, 3], as large as `program.clip` says.
            top: how many labels; all of them if there are fewer.

        Raises:
            ProgramError: frames of another shape or type.
            DeviceError: the device did not finish.
        """
        start = time.perf_counter()
        self.write(frames)
        layers = self.backend.run()
        scores = softmax(self.logits())
        labels = best_labels(scores, self.program.labels, top)
        seconds = time.perf_counter() - start
        return Prediction(labels, tuple(layers), self.backend_name, seconds)

    def trace(self, frames: Array) -> Iterator[tuple[str, Array, Counters]]:
        """Run task by task: the name, output codes [C, D, H, W] and counters of each."""
        self.write(frames)
        for i, task in enumerate(self.program.tasks):
            (counters,) = self.backend.run(i, i + 1)
            codes = self.backend.read(task.target, task.shape.out_channels, task.out_size)
            yield task.name, codes, counters

    def write(self, frames: Array) -> None:
        """Encode frames and hand them to the device."""
        self.backend.write(self.program.source, self.program.encode_clip(frames))

    def logits(self) -> Array:
        """The result of the last run as reals [classes]."""
        last = self.program.tasks[-1]
        codes = self.backend.read(last.target, last.shape.out_channels, last.out_size)
        return self.program.output.dequantize(codes).reshape(-1)

    def close(self) -> None:
        """Give the device back."""
        if self._owned:
            self.backend.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Difference:
    """The first element in which two backends disagree."""

    task: str
    index: tuple[int, int, int, int]
    """Channel, depth, height, width."""
    left: int
    right: int
    count: int
    """How many elements of that task differ."""


def compare(left: Session, right: Session, frames: Array) -> Difference | None:
    """Run a clip on two sessions of one program; the first differing task and element, or none.

    Raises:
        ProgramError: the sessions run different programs.
    """
    if left.program is not right.program:
        raise ProgramError("compare takes two sessions of the same program")
    for (name, ours, _), (_, theirs, _) in zip(
        left.trace(frames), right.trace(frames), strict=True
    ):
        differing = np.argwhere(ours != theirs)
        if differing.size:
            c, d, h, w = (int(i) for i in differing[0])
            at = (c, d, h, w)
            return Difference(name, at, int(ours[at]), int(theirs[at]), len(differing))
    return None


def best_labels(scores: Array, names: tuple[str, ...], top: int) -> tuple[Label, ...]:
    """The `top` best classes, one at least; without names they are called by their numbers."""
    order = np.argsort(-scores, kind="stable")[: max(1, top)]
    return tuple(Label(names[i] if names else str(i), float(scores[i])) for i in order)


def softmax(logits: Array) -> Array:
    """Probabilities [classes] of logits."""
    powers = np.exp(logits - logits.max())
    probabilities: Array = powers / powers.sum()
    return probabilities
