"""The accuracy of a compiled program, or of a float network's logits, on labelled clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from pynq_kgrc.errors import ProgramError
from pynq_kgrc.program import Program
from pynq_kgrc.quant import Array
from pynq_kgrc.runtime import Scores, Session

LabelledClip = tuple[Array | Iterable[Array], int]
"""uint8 frames [D, H, W, 3], or the windows of a video, and the number of their class."""


class Video(NamedTuple):
    """What a labelled clip is, besides its frames."""

    number: int
    label: int
    windows: bool
    """Whether its windows are averaged; else it is one clip."""


Bar = Callable[[Iterable[tuple[Video, list[Scores]]]], Iterable[tuple[Video, list[Scores]]]]
"""Passes on each labelled clip with its scores, and may show progress."""

BINS = 15
"""Of the expected calibration error, as Guo et al. (ICML 2017) take them."""

Z_95 = 1.959964
"""The quantile of the normal distribution for an interval of 95 %."""


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
    calibration_error: float
    """Expected calibration error: the mean distance between confidence and accuracy, 0 to 1.

    Clips are put into `BINS` bins of equal width by the probability of their best class; each bin
    counts by its clips (Guo et al., "On calibration of modern neural networks", eq. (3))."""

    @property
    def right(self) -> int:
        """Clips whose most probable class is right."""
        return int(np.trace(self.confusion))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of top-1, for clips that are drawn independently of each other."""
        return wilson_interval(self.right, self.clips)

    @property
    def among_five(self) -> int:
        """Clips whose class is among the five most probable."""
        return round(self.top5 * self.clips)

    def of_class(self, label: int) -> ClassAccuracy:
        """The accuracy on the clips of one class."""
        row = self.confusion[label]
        others = np.array(row)
        others[label] = 0
        worst = int(others.argmax())
        return ClassAccuracy(
            int(row.sum()),
            int(row[label]),
            int(self.confusion[:, label].sum()),
            worst if others[worst] else None,
        )


@dataclass(frozen=True)
class ClassAccuracy:
    """The accuracy on the clips of one class."""

    clips: int
    right: int
    """Of its clips, those whose most probable class it is."""
    predicted: int
    """Clips of any class whose most probable class it is."""
    taken_for: int | None
    """The class that most of its other clips are taken for; None if there is none."""


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a fraction: Wilson's score interval (JASA 1927).

    >>> low, high = wilson_interval(278, 323)
    >>> f"{low:.1%} to {high:.1%}"
    '81.9% to 89.4%'
    """
    fraction, z2 = right / count, Z_95**2
    middle = (fraction + z2 / (2 * count)) / (1 + z2 / count)
    spread = fraction * (1 - fraction) / count + z2 / (4 * count**2)
    half = Z_95 * math.sqrt(spread) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration_error(confidences: Array, right: Array) -> float:
    """Expected calibration error of confidences [N] in 0 to 1, and whether each is right [N]."""
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, right.astype(float) - confidences, BINS)
    return float(np.abs(gaps).sum() / len(confidences))


def accuracy_of(logits: Array, labels: Array, probabilities: Array | None = None) -> Accuracy:
    """The accuracy of logits [N, classes] on labels [N].

    `probabilities` are by default the soft-max of the logits.

    Raises:
        ProgramError: there is no clip.
    """
    if not len(logits):
        raise ProgramError("there is no clip to measure on")
    if probabilities is None:
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
    order = np.argsort(-logits, axis=1, kind="stable")
    hits = order == labels[:, None]
    classes = logits.shape[1]
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, order[:, 0]), 1)
    return Accuracy(
        len(logits),
        float(hits[:, 0].mean()),
        float(hits[:, :5].any(axis=1).mean()),
        confusion,
        calibration_error(probabilities.max(axis=1), hits[:, 0]),
    )


def measure_accuracy(
    program: Program,
    clips: Iterable[LabelledClip],
    backend: str = "emulate",
    bar: Bar = lambda runs: runs,
) -> Accuracy:
    """Run every clip through the compiled integer program (not the float network).

    Args:
        program: the program to measure.
        clips: labelled clips, each of the size of `program.clip`.
        backend: the name of the backend that runs it.
        bar: wraps the clips that were run to show progress.

    Raises:
        ProgramError: there is no clip, a clip has another size than the program's or no window, or
            a label is not one of its classes.
        DeviceError: the backend did not answer.
    """
    logits, probabilities, labels = [], [], []
    with Session(program, backend) as session:
        for video, runs in bar(_run_videos(session, clips)):
            scores, mean = _scores(video, runs)
            logits.append(scores)
            probabilities.append(mean)
            labels.append(video.label)
    if not labels:
        raise ProgramError("there is no clip to measure on")
    return accuracy_of(np.stack(logits), np.array(labels), np.stack(probabilities))


def _run_videos(
    session: Session, clips: Iterable[LabelledClip]
) -> Iterator[tuple[Video, list[Scores]]]:
    """Each labelled clip with the scores of its windows."""
    runs = session.run_many(_windows(session.program, clips), lambda window: window[1])
    for video, group in groupby(runs, lambda run: run[0][0]):
        yield video, [scores for _, scores in group]


def _windows(program: Program, clips: Iterable[LabelledClip]) -> Iterator[tuple[Video, Array]]:
    classes = program.tasks[-1].shape.out_channels
    for number, (frames, label) in enumerate(clips):
        if not 0 <= label < classes:
            raise ProgramError(f"label {label} is not one of the {classes} of {program.name}")
        windows = (frames,) if isinstance(frames, np.ndarray) else frames
        video, count = Video(number, label, windows is frames), 0
        for window in windows:
            count += 1
            yield video, window
        if not count:
            raise ProgramError(f"clip {number}, of class {label}, has no window")


def _scores(video: Video, runs: list[Scores]) -> tuple[Array, Array]:
    """What orders the classes, and their probabilities; of windows the mean of probabilities."""
    if not video.windows:
        return runs[0].logits, runs[0].probabilities
    mean: Array = np.mean([scores.probabilities for scores in runs], axis=0)
    return np.log(np.maximum(mean, 1e-300)), mean
