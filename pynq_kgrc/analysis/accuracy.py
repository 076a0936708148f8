"""The accuracy of a compiled program on labelled clips."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from pynq_kgrc.errors import ProgramError
from pynq_kgrc.program import Program
from pynq_kgrc.quant import Array
from pynq_kgrc.runtime import Session

LabelledClip = tuple[Array | Iterable[Array], int]
"""uint8 frames [D, H, W, 3], or the windows of a video, and the number of their class."""


@dataclass(frozen=True, eq=False)
class Accuracy:
    """How often a program was right on labelled clips."""

    clips: int
    top1: float
    """Fraction of the clips whose most probable class is right."""
    top5: float
    """Fraction of the clips whose class is among the five most probable."""
    confusion: Array
    """[true class, most probable class] counts of clips."""


def measure_accuracy(
    program: Program,
    clips: Iterable[LabelledClip],
    backend: str = "emulate",
    bar: Callable[[Iterable[LabelledClip]], Iterable[LabelledClip]] = lambda clips: clips,
) -> Accuracy:
    """Run every clip through the compiled integer program (not the float network).

    Args:
        program: the program to measure.
        clips: labelled clips, each of the size of `program.clip`.
        backend: the name of the backend that runs it.
        bar: wraps the clips to show progress.

    Raises:
        ProgramError: there is no clip, a clip has another size than the program's, or a label is
            not one of its classes.
        DeviceError: the backend did not answer.
    """
    with Session(program, backend) as session:
        classes = program.tasks[-1].shape.out_channels
        confusion = np.zeros((classes, classes), np.int64)
        among_five = 0
        for frames, label in bar(clips):
            if not 0 <= label < classes:
                raise ProgramError(f"label {label} is not one of the {classes} of {program.name}")
            order = np.argsort(-_scores(session, frames), kind="stable")
            confusion[label, order[0]] += 1
            among_five += int(label in order[:5])
    count = int(confusion.sum())
    if not count:
        raise ProgramError("there is no clip to measure on")
    return Accuracy(count, float(np.trace(confusion) / count), among_five / count, confusion)


def _scores(session: Session, frames: Array | Iterable[Array]) -> Array:
    """The logits [classes] of a clip; the mean of the windows' probabilities of a video."""
    if isinstance(frames, np.ndarray):
        return session.run(frames).logits
    mean: Array = np.mean([session.run(window).probabilities for window in frames], axis=0)
    return mean
