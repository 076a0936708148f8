"""What a network says about a video: the one schema of the command line, service and tables.

Each is a msgspec struct, so `msgspec.to_builtins` and `msgspec.json.encode` give the documents
that `classify --json` prints and the service answers with.
"""

from __future__ import annotations

import msgspec


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
