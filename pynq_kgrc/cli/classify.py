"""The commands that run a program on videos: classify and compare."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pynq_kgrc.cli.arguments import Declare, add_sampling, positive, progress

if TYPE_CHECKING:
    from pynq_kgrc.runtime import Prediction
    from pynq_kgrc.video import Clip


def declare(command: Declare) -> None:
    """Add this file's commands."""
    classify = command(
        "classify",
        run_classify,
        "name the actions in videos",
        "By default one clip of consecutive frames from the middle of each video is classified.\n"
        "With --stride the whole video is covered with clips, and each is printed with its time.",
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
    from pynq_kgrc.video import load_clip, load_windows

    program = load(options.program)
    documents = []
    with Session(program, options.backend) as session:
        for video in options.videos:
            if options.stride:
                clips = list(load_windows(video, program.clip, stride=options.stride))
            else:
                clips = [load_clip(video, program.clip, sampling=options.sampling)]
            found = [
                (clip, session.classify(clip.frames, options.top))
                for clip in progress(clips, Path(video).name)
            ]
            if options.json:
                documents.append({"video": str(video), "clips": [_document(*f) for f in found]})
            else:
                _print_predictions(video, found)
    if options.json:
        print(json.dumps({"program": program.name, "videos": documents}, indent=2))
    return 0


def _document(clip: Clip, prediction: Prediction) -> dict[str, Any]:
    return {
        "start_ms": clip.start_ms,
        "end_ms": clip.end_ms,
        "notes": list(clip.notes),
        "labels": [msgspec.to_builtins(label) for label in prediction.labels],
        "backend": prediction.backend,
        "seconds": prediction.seconds,
    }


def _print_predictions(video: str, found: list[tuple[Clip, Prediction]]) -> None:
    for clip, prediction in found:
        span = f"{clip.start_ms / 1e3:.1f} to {clip.end_ms / 1e3:.1f} s"
        print(f"{video}  {span}  ({prediction.backend}, {prediction.seconds:.2f} s)")
        for note in clip.notes:
            print(f"  note: {note}")
        for label in prediction.labels:
            bar = "█" * round(20 * label.confidence)
            print(f"  {label.confidence:6.1%} {bar:20} {label.label}")


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
