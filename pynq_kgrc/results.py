"""What a network says about a video: the one schema of the command line, service and tables.

Each is a msgspec struct, so `msgspec.to_builtins` and `msgspec.json.encode` give the documents
that `classify --json` prints and the service answers with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from pynq_kgrc.quant import Array


class Label(msgspec.Struct, frozen=True):
    """A class and its probability.

    >>> msgspec.to_builtins(Label("run", 0.75))
    {'label': 'run', 'confidence': 0.75}
    """

    label: str
    confidence: float
    """Probability of the class, 0 to 1."""


class Segment(msgspec.Struct, frozen=True):
    """A stretch of a video in which one label is the best of every window."""

    label: str
    confidence: float
    """Mean probability over the windows of the stretch, 0 to 1."""
    start_ms: float
    end_ms: float
    """Milliseconds from the start of the video."""


class WindowLabels(msgspec.Struct, frozen=True):
    """The best labels of one clip of a video, the most probable first."""

    start_ms: float
    end_ms: float
    """Milliseconds from the start of the video."""
    labels: tuple[Label, ...]


class Recognition(msgspec.Struct, frozen=True, kw_only=True):
    """What a program says about a whole video."""

    labels: tuple[Label, ...]
    """The best labels by the mean of the windows' probabilities, the most probable first."""
    unsure: bool = False
    """Whether the best label's confidence is below the program's threshold."""
    segments: tuple[Segment, ...] = ()
    """Consecutive windows with the same best label."""
    windows: tuple[WindowLabels, ...] = ()
    """The clips that were sampled from the video, in order."""
    notes: tuple[str, ...] = ()
    """What the reader should know about the video: it is repeated, or cut off."""
    backend: str = ""
    """Name of the backend that ran the clips."""


class WindowSum:
    """Adds up the windows of a video. Memory grows by the best labels of each, not by classes.

    Args:
        names: a name for each class; empty if the program has none.
        top: number of labels to keep, at least 1.
        threshold: `ClipSpec.threshold` of the program.
        digits: decimals to which confidences are rounded; not at all if None.
    """

    def __init__(
        self, names: Sequence[str], top: int, threshold: float = 0.0, digits: int | None = None
    ) -> None:
        self._names, self._top, self._threshold, self._digits = names, top, threshold, digits
        self._sum: Array | None = None
        self.windows: list[WindowLabels] = []

    def add(self, start_ms: float, end_ms: float, probabilities: Array) -> WindowLabels:
        """Add a window with its probabilities [classes]; its labels."""
        values = np.asarray(probabilities, np.float64)
        self._sum = values.copy() if self._sum is None else self._sum + values
        labels = best_labels(values, self._names, self._top, self._digits)
        self.windows.append(WindowLabels(start_ms, end_ms, labels))
        return self.windows[-1]

    def result(self, notes: Iterable[str] = (), backend: str = "") -> Recognition:
        """The labels of the video; at least one window has been added."""
        assert self._sum is not None
        mean = self._sum / len(self.windows)
        return Recognition(
            labels=best_labels(mean, self._names, self._top, self._digits),
            unsure=is_unsure(mean, self._threshold),
            segments=merge_windows(self.windows, self._digits),
            windows=tuple(self.windows),
            notes=tuple(dict.fromkeys(notes)),
            backend=backend,
        )


def best_labels(
    probabilities: Array, names: Sequence[str], top: int, digits: int | None = None
) -> tuple[Label, ...]:
    """The `top` (at least 1) most probable classes of [classes] probabilities, in that order.

    Without `names` a class is called by its number. Confidences are rounded to `digits` decimals.
    """
    order = np.argsort(-probabilities, kind="stable")[: max(1, top)]
    return tuple(
        Label(names[i] if names else str(i), _rounded(float(probabilities[i]), digits))
        for i in order
    )


def is_unsure(probabilities: Array, threshold: float) -> bool:
    """Whether the best of [classes] probabilities is below the threshold of the program."""
    return bool(probabilities.max() < threshold)


def merge_windows(
    windows: Sequence[WindowLabels], digits: int | None = None
) -> tuple[Segment, ...]:
    """Merge consecutive windows with the same best label into one segment.

    Where the windows of two segments overlap, the border is the middle of the overlap.
    Confidences are rounded to `digits` decimals.
    """
    runs: list[list[WindowLabels]] = []
    for window in windows:
        if not runs or runs[-1][0].labels[0].label != window.labels[0].label:
            runs.append([])
        runs[-1].append(window)
    segments = []
    for i, run in enumerate(runs):
        start, end = run[0].start_ms, run[-1].end_ms
        if i > 0:
            start = max(start, (start + runs[i - 1][-1].end_ms) / 2)
        if i + 1 < len(runs):
            end = min(end, (end + runs[i + 1][0].start_ms) / 2)
        mean = sum(window.labels[0].confidence for window in run) / len(run)
        segments.append(Segment(run[0].labels[0].label, _rounded(mean, digits), start, end))
    return tuple(segments)


def _rounded(value: float, digits: int | None) -> float:
    return value if digits is None else round(value, digits)
