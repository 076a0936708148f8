"""The one road from a video to labels: sample its clips, run each, add up their probabilities.

`classify`, `batch`, `evaluate` and the notebooks call `recognize`. The service decodes uploads in a
process of its own, and adds their windows up by the same `results.WindowSum`. So each samples a
video as the program says, and gives the same labels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from pynq_kgrc.errors import KgrcError, VideoError
from pynq_kgrc.results import Recognition, WindowLabels, WindowSum
from pynq_kgrc.runtime import Scores, Session
from pynq_kgrc.video import Clip, Limits, load_clip, load_windows

Source = str | bytes | os.PathLike[str]
"""A local file, or the contents of one."""

LOCAL = Limits(max_bytes=1 << 40, max_seconds=1e6)
"""Limits for files that are trusted: memory does not grow with the length of a video."""

Bar = Callable[[Iterable[tuple[Clip, Scores]]], Iterable[tuple[Clip, Scores]]]
"""Passes on each clip of a video with its scores, and may show progress."""


def recognize(
    session: Session,
    source: Source,
    sampling: str | None = None,
    stride: int | None = None,
    top: int = 5,
    limits: Limits = LOCAL,
    bar: Bar = lambda clips: clips,
    watch: Callable[[WindowLabels], None] = lambda window: None,
) -> Recognition:
    """The labels of a video, sampled as the program says.

    While a clip runs, the next one is decoded and encoded in a thread, and no other. So memory does
    not grow with the length of the video, but for the labels of each window.

    Args:
        session: runs the clips.
        source: a local file, or the contents of one as bytes.
        sampling: "centre", "uniform" or "windows", instead of what the program says.
        stride: frames from one window to the next, instead of what the program says; implies
            "windows".
        top: labels to give for the video and for each window.
        limits: what to refuse.
        bar: wraps the clips that were run to show progress.
        watch: receives the labels of each window before the next one is run.

    Raises:
        VideoError: what is wrong with the source.
        ConfigError: an unknown sampling, or a stride beside a sampling without windows.
        DeviceError: the device did not finish.
    """
    program = session.program
    found = WindowSum(program.labels, top, program.clip.threshold)
    notes: list[str] = []
    clips = sample_clips(session, source, sampling, stride, limits)
    for clip, scores in bar(session.run_many(clips, lambda clip: clip.frames)):
        watch(found.add(clip.start_ms, clip.end_ms, scores.probabilities))
        notes += [note for note in clip.notes if note not in notes]
    return found.result(notes, session.backend_name)


def sample_clips(
    session: Session,
    source: Source,
    sampling: str | None = None,
    stride: int | None = None,
    limits: Limits = LOCAL,
) -> Iterator[Clip]:
    """The clips of a video that `recognize` runs; arguments and errors are its."""
    spec = session.program.clip
    chosen = spec.chosen_sampling(sampling, stride)
    try:
        if chosen == "windows":
            yield from load_windows(source, spec, stride, limits)
        else:
            yield load_clip(source, spec, chosen, limits)
    except KgrcError:
        raise
    except Exception as error:  # whatever a decoder raises is an error of this file
        name = "the video" if isinstance(source, bytes) else os.fspath(source)
        why = f"cannot be decoded: {type(error).__name__}: {error}"
        raise VideoError(f"{name}: {why}") from error
