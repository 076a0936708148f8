"""The commands that run a program on videos: classify and compare."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from pynq_kgrc.cli.arguments import (
    Declare,
    add_sampling,
    add_top,
    draw_bar,
    printable,
    progress,
    readable,
    say,
)

if TYPE_CHECKING:
    from pynq_kgrc.runtime import Prediction, Session
    from pynq_kgrc.video import Clip


def declare(command: Declare) -> None:
    """Add this file's commands."""
    classify = command(
        "classify",
        run_classify,
        "name the actions in videos",
        "By default one clip of consecutive frames from the middle of each video is classified.\n"
        "With --stride the whole video is covered with clips, and each is printed with its time.\n"
        "A video that cannot be read does not keep the others from being classified; the exit\n"
        "status is then 2.",
    )
    classify.add_argument("videos", nargs="+", metavar="VIDEO", help="MP4, MKV, AVI, TS or GIF")
    classify.add_argument("-p", "--program", type=Path, required=True, help="a compiled .kgrc")
    classify.add_argument(
        "--backend", default="emulate", help="emulate, csim or board (default: emulate)"
    )
    add_top(classify, "labels to print")
    add_sampling(classify)

    compare = command(
        "compare",
        run_compare,
        "run a video on two backends and name the first difference",
        "One clip of consecutive frames from the middle of the video is run. Exit status 1 if the\n"
        "backends differ.",
    )
    compare.add_argument("video", metavar="VIDEO")
    compare.add_argument("-p", "--program", type=Path, required=True, help="a compiled .kgrc")
    compare.add_argument("--left", default="emulate", help="a backend (default: emulate)")
    compare.add_argument("--right", default="emulate", help="a backend (default: emulate)")


def run_classify(options: argparse.Namespace) -> int:
    from pynq_kgrc.program import load
    from pynq_kgrc.runtime import Session

    program = load(options.program)
    report = _JsonReport() if options.json else _TextReport()
    unreadable = 0
    with Session(program, options.backend) as session, report.document(program.name):
        for video in options.videos:
            with report.video(readable(video)):
                unreadable += not _classify_video(session, video, options, report)
    return 2 if unreadable else 0


def _classify_video(
    session: Session, video: str, options: argparse.Namespace, report: _Report
) -> bool:
    """Report the clips of a video, one by one as they are decoded; whether it could be read."""
    from pynq_kgrc.cluster.archive import read_clips
    from pynq_kgrc.errors import VideoError

    clips = read_clips(Path(video), session.program.clip, options.stride, options.sampling)
    try:
        for clip in progress(clips, Path(video).name, None if options.stride else 1):
            report.clip(clip, session.classify(clip.frames, options.top))
    except VideoError as error:
        report.error(readable(error))
        say(f"pynq-kgrc: {printable(error)}", sys.stderr)
        return False
    return True


class _Report(Protocol):
    """Prints results as soon as they are there, so that memory does not grow with the video."""

    def document(self, program: str) -> AbstractContextManager[None]:
        """Around all videos."""

    def video(self, name: str) -> AbstractContextManager[None]:
        """Around the clips of a video."""

    def clip(self, clip: Clip, prediction: Prediction) -> None:
        """Print a clip of the video."""

    def error(self, text: str) -> None:
        """Print why the video, or the rest of it, cannot be read."""


class _TextReport:
    """Results as lines of text. Errors go to standard error only."""

    @contextlib.contextmanager
    def document(self, program: str) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def video(self, name: str) -> Iterator[None]:
        self._name = printable(name)
        yield

    def clip(self, clip: Clip, prediction: Prediction) -> None:
        span = f"{clip.start_ms / 1e3:.1f} to {clip.end_ms / 1e3:.1f} s"
        lines = [f"{self._name}  {span}  ({prediction.backend}, {prediction.seconds:.2f} s)"]
        lines += [f"  note: {printable(note)}" for note in clip.notes]
        lines += [
            f"  {label.confidence:6.1%} {draw_bar(label.confidence)} {printable(label.label)}"
            for label in prediction.labels
        ]
        say("\n".join(lines))

    def error(self, text: str) -> None:
        pass


class _JsonReport:
    """Results as one JSON document, written piece by piece with a line for each clip.

    It is closed even if the command fails: `error` then says why, as it does for a video.
    """

    def __init__(self) -> None:
        self._first_video = self._first_clip = True
        self._error = ""

    @contextlib.contextmanager
    def document(self, program: str) -> Iterator[None]:
        say(f'{{"program": {json.dumps(program)}, "videos": [')
        try:
            yield
        except BaseException as error:
            text = readable(error) or type(error).__name__
            say(f'], "error": {json.dumps(text)}}}')
            raise
        say("]}")

    @contextlib.contextmanager
    def video(self, name: str) -> Iterator[None]:
        comma = "" if self._first_video else ","
        self._first_video, self._first_clip, self._error = False, True, ""
        say(f'{comma}{{"video": {json.dumps(name)}, "clips": [')
        try:
            yield
        finally:
            say(f'], "error": {json.dumps(self._error)}}}' if self._error else "]}")

    def clip(self, clip: Clip, prediction: Prediction) -> None:
        say(("" if self._first_clip else ",") + json.dumps(_document(clip, prediction)))
        self._first_clip = False

    def error(self, text: str) -> None:
        self._error = text


def _document(clip: Clip, prediction: Prediction) -> dict[str, Any]:
    return {
        "start_ms": clip.start_ms,
        "end_ms": clip.end_ms,
        "notes": list(clip.notes),
        "labels": [msgspec.to_builtins(label) for label in prediction.labels],
        "backend": prediction.backend,
        "seconds": prediction.seconds,
    }


def run_compare(options: argparse.Namespace) -> int:
    from pynq_kgrc.program import load
    from pynq_kgrc.runtime import Session, compare
    from pynq_kgrc.video import load_clip

    program = load(options.program)
    frames = load_clip(options.video, program.clip).frames
    with Session(program, options.left) as left, Session(program, options.right) as right:
        difference = compare(left, right, frames)
    if options.json:
        print(json.dumps(None if difference is None else vars(difference)))
    elif difference is None:
        print(f"{options.left} and {options.right} agree on all {len(program.tasks)} tasks")
    else:
        print(
            f"{difference.task}: {difference.count} elements differ, the first at "
            f"{difference.index}: {difference.left} on {options.left}, "
            f"{difference.right} on {options.right}"
        )
    return int(difference is not None)
