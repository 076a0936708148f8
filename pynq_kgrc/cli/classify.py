"""The commands that run a program on videos: classify and compare."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from pynq_kgrc.cli.arguments import (
    PROGRAM_HELP,
    Declare,
    add_backend,
    add_sampling,
    add_top,
    draw_bar,
    printable,
    program_file,
    progress,
    readable,
    say,
)

if TYPE_CHECKING:
    from pynq_kgrc.results import Recognition, WindowLabels
    from pynq_kgrc.runtime import Session


def declare(command: Declare) -> None:
    """Add this file's commands."""
    classify = command(
        "classify",
        run_classify,
        "name the actions in videos",
        "A video is sampled as the program says: one clip, or clips one after the other, whose\n"
        "probabilities are averaged; then the timeline is printed, too. If the best label's\n"
        "confidence is below the program's threshold, the answer is marked as unsure.\n"
        "A video that cannot be read does not keep the others from being classified; the exit\n"
        "status is then 2.",
    )
    classify.add_argument("videos", nargs="+", metavar="VIDEO", help="MP4, MKV, AVI, TS or GIF")
    classify.add_argument("-p", "--program", type=Path, required=True, help=PROGRAM_HELP)
    add_backend(classify)
    add_top(classify, "labels to print")
    add_sampling(classify)

    compare = command(
        "compare",
        run_compare,
        "run a video on two backends and name the first difference",
        "One clip is run: spread over the video if the program says so, else from its middle.\n"
        "Exit status 1 if the backends differ.",
    )
    compare.add_argument("video", metavar="VIDEO")
    compare.add_argument("-p", "--program", type=Path, required=True, help=PROGRAM_HELP)
    compare.add_argument("--left", default="emulate", help="a backend (default: emulate)")
    compare.add_argument("--right", default="emulate", help="a backend (default: emulate)")


def run_classify(options: argparse.Namespace) -> int:
    from pynq_kgrc.program import load
    from pynq_kgrc.runtime import Session

    program = load(program_file(options.program))
    report = _JsonReport() if options.json else _TextReport(program.clip.threshold)
    unreadable = 0
    with Session(program, options.backend) as session, report.document(program.name):
        for video in options.videos:
            with report.video(readable(video)):
                unreadable += not _classify_video(session, video, options, report)
    return 2 if unreadable else 0


def _classify_video(
    session: Session, video: str, options: argparse.Namespace, report: _Report
) -> bool:
    """Report a video; whether it could be read."""
    from pynq_kgrc.errors import VideoError
    from pynq_kgrc.recognition import recognize

    spec = session.program.clip
    single = spec.chosen_sampling(options.sampling, options.stride) != "windows"
    bar = partial(progress, text=Path(video).name, total=1 if single else None)
    began = time.perf_counter()
    try:
        found = recognize(
            session,
            video,
            options.sampling,
            options.stride,
            options.top,
            bar=bar,
            watch=report.window,
        )
    except VideoError as error:
        report.error(readable(error))
        say(f"pynq-kgrc: {printable(error)}", sys.stderr)
        return False
    report.result(found, time.perf_counter() - began)
    return True


class _Report(Protocol):
    """Prints results as soon as they are there."""

    def document(self, program: str) -> AbstractContextManager[None]:
        """Around all videos."""

    def video(self, name: str) -> AbstractContextManager[None]:
        """Around the results of a video."""

    def window(self, window: WindowLabels) -> None:
        """Called with the labels of each clip, in order."""

    def result(self, found: Recognition, seconds: float) -> None:
        """Print the labels of the video."""

    def error(self, text: str) -> None:
        """Print why the video, or the rest of it, cannot be read."""


class _TextReport:
    """Results as lines of text. Errors go to standard error only."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    @contextlib.contextmanager
    def document(self, program: str) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def video(self, name: str) -> Iterator[None]:
        self._name = printable(name)
        yield

    def window(self, window: WindowLabels) -> None:
        pass

    def result(self, found: Recognition, seconds: float) -> None:
        windows = found.windows
        span = f"{windows[0].start_ms / 1e3:.1f} to {windows[-1].end_ms / 1e3:.1f} s"
        count = f"{len(windows)} clips, " if len(windows) > 1 else ""
        lines = [f"{self._name}  {span}  ({count}{found.backend}, {seconds:.2f} s)"]
        lines += [f"  note: {printable(note)}" for note in found.notes]
        if found.unsure:
            lines.append(
                f"  unsure: the best label is below the threshold of {self._threshold:.1%}"
            )
        lines += [
            f"  {label.confidence:6.1%} {draw_bar(label.confidence)} {printable(label.label)}"
            for label in found.labels
        ]
        for segment in found.segments if len(windows) > 1 else ():
            span = f"{segment.start_ms / 1e3:8.1f} to {segment.end_ms / 1e3:6.1f} s"
            unsure = "  (unsure)" if segment.confidence < self._threshold else ""
            name = printable(segment.label)
            lines.append(f"  {span}  {segment.confidence:6.1%} {name}{unsure}")
        say("\n".join(lines))

    def error(self, text: str) -> None:
        pass


class _JsonReport:
    """Results as one JSON document, written piece by piece with a line for each clip.

    It is closed even if the command fails: `error` then says why, as it does for a video.
    """

    def __init__(self) -> None:
        self._first_video = self._first_window = True
        self._rest = ""

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
        self._first_video, self._first_window, self._rest = False, True, ""
        say(f'{comma}{{"video": {json.dumps(name)}, "windows": [')
        try:
            yield
        finally:
            say(f"]{self._rest}}}")

    def window(self, window: WindowLabels) -> None:
        say(("" if self._first_window else ",") + json.dumps(msgspec.to_builtins(window)))
        self._first_window = False

    def result(self, found: Recognition, seconds: float) -> None:
        for name in found.__struct_fields__:
            if name != "windows":
                self._add(name, msgspec.to_builtins(getattr(found, name)))
        self._add("seconds", seconds)

    def error(self, text: str) -> None:
        self._add("error", text)

    def _add(self, name: str, value: Any) -> None:
        self._rest += f", {json.dumps(name)}: {json.dumps(value)}"


def run_compare(options: argparse.Namespace) -> int:
    from pynq_kgrc.program import load
    from pynq_kgrc.runtime import Session, compare
    from pynq_kgrc.video import load_clip

    program = load(program_file(options.program))
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
