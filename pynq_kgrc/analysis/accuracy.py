"""How often a compiled program is right, counted on labelled clips."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from pynq_kgrc.errors import ProgramError
from pynq_kgrc.program import Program
from pynq_kgrc.quant import Array
from pynq_kgrc.runtime import Session

LabelledClip = tuple[Array, int]
"""uint8 frames [D, H, W, 3], and the number of the class they show."""


@dataclass(frozen=True, eq=False)
class Accuracy:
    """What a program made of labelled clips."""

    clips: int
    top1: float
    """Fraction of clips whose first label is right."""
    top5: float
    confusion: Array
    """[true class, first label] counts."""


def measure_accuracy(
    program: Program,
    clips: Iterable[LabelledClip],
    backend: str = "emulate",
    bar: Callable[[Iterable[LabelledClip]], Iterable[LabelledClip]] = lambda clips: clips,
) -> Accuracy:
    """Run every clip on a backend: this is the compiled integer program, not a float network.

    Raises:
        ProgramError: there is no clip, one of another size than the program's, or a label that is
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
            session.write(frames)
            session.backend.run()
            order = np.argsort(-session.logits(), kind="stable")
            confusion[label, order[0]] += 1
            among_five += int(label in order[:5])
    count = int(confusion.sum())
    if not count:
        raise ProgramError("there is no clip to measure on")
    return Accuracy(count, float(np.trace(confusion) / count), among_five / count, confusion)
