"""The commands that run a program on videos: classify and compare."""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pynq_kgrc.cli.arguments import Declare, add_sampling, positive, progress

if TYPE_CHECKING:
    from pynq_kgrc.results import Recognition


def declare(command: Declare) -> None:
    """Add this file's commands."""
    classify = command(
        "classify",
        run_classify,
        "name the actions in videos",
        "A video is sampled as the program says: one clip, or clips one after the other, whose\n"
        "probabilities are averaged; then the timeline is printed, too. If the best label's\n"
        "confidence is below the program's threshold, the answer is marked as unsure.",
    )
    classify.add_argument("videos", nargs="+", metavar="VIDEO", help="MP4, MKV, AVI, TS or GIF")
    classify.add_argument("-p", "--program", type=Path, required=True, help="a compiled .kgrc")
    classify.add_argument(
        "--backend", default="emulate", help="emulate, csim or board (default: emulate)"
    )
    classify.add_argument("--top", type=positive, default=5, help="labels to print (default: 5)")
    add_sampling(classify)

    compare = command(
        "compare",
        run_compare,
        "run a video on two backends and name the first difference",
        "One clip is run: spread over the video if the program says so, else from its middle.\n"
        "Exit status 1 if the backends differ.",
    )
    compare.add_argument("video", metavar="VIDEO")
    compare.add_argument("-p", "--program", type=Path, required=True, help="a compiled .kgrc")
    compare.add_argument("--left", default="emulate", help="a backend (default: emulate)")
    compare.add_argument("--right", default="emulate", help="a backend (default: emulate)")


def run_classify(options: argparse.Namespace) -> int:
    from pynq_kgrc.program import load
    from pynq_kgrc.recognition import recognize
    from pynq_kgrc.runtime import Session

    program = load(options.program)
    documents = []
    with Session(program, options.backend) as session:
        for video in options.videos:
            began = time.perf_counter()
            bar = partial(progress, text=Path(video).name)
            found = recognize(
                session, video, options.sampling, options.stride, options.top, bar=bar
            )
            seconds = time.perf_counter() - began
            if options.json:
                document = {"video": str(video), "seconds": seconds}
                documents.append(document | msgspec.to_builtins(found))
            else:
                _print_recognition(video, found, seconds, program.clip.threshold)
    if options.json:
        print(json.dumps({"program": program.name, "videos": documents}, indent=2))
    return 0


def _print_recognition(video: str, found: Recognition, seconds: float, threshold: float) -> None:
    windows = found.windows
    span = f"{windows[0].start_ms / 1e3:.1f} to {windows[-1].end_ms / 1e3:.1f} s"
    count = f"{len(windows)} clips, " if len(windows) > 1 else ""
    print(f"{video}  {span}  ({count}{found.backend}, {seconds:.2f} s)")
    for note in found.notes:
        print(f"  note: {note}")
    if found.unsure:
        print(f"  unsure: the best label is below the program's threshold of {threshold:.1%}")
    for label in found.labels:
        bar = "█" * round(20 * label.confidence)
        print(f"  {label.confidence:6.1%} {bar:20} {label.label}")
    for segment in found.segments if len(windows) > 1 else ():
        span = f"{segment.start_ms / 1e3:8.1f} to {segment.end_ms / 1e3:6.1f} s"
        unsure = "  (unsure)" if segment.confidence < threshold else ""
        print(f"  {span}  {segment.confidence:6.1%} {segment.label}{unsure}")


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
