"""The commands that make a program: pull and compile."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pynq_kgrc.cli.arguments import (
    Declare,
    add_design,
    add_weights,
    file_to_write,
    load_weights,
    printable,
    progress,
    readable,
    stages,
    whole,
)
from pynq_kgrc.cli.info import print_description, summary
from pynq_kgrc.errors import KgrcError, ModelError
from pynq_kgrc.graph import SAMPLINGS

if TYPE_CHECKING:
    from pynq_kgrc.graph import ClipSpec, Graph
    from pynq_kgrc.quant import Array


def declare(command: Declare) -> None:
    """Add this file's commands."""
    pull = command(
        "pull",
        run_pull,
        "fetch pretrained weights, or make a program of them",
        "Without --design: the weights as a state dict, for compile --weights.\n"
        "With --design: a program for that accelerator, made in numpy from the weights and from\n"
        "ranges that ship with the package. It needs no torch and no clip, so a board can do it.\n"
        "It is kept in the cache: later calls need no network.",
    )
    pull.add_argument("name", metavar="NAME", help="i3d-kinetics400, or a program that ships")
    pull.add_argument(
        "--design",
        metavar="DESIGN",
        help="make a program for it: the name of a preset, or a .json that explore -o wrote",
    )

    compile_ = command(
        "compile",
        run_compile,
        "compile a PyTorch network to a program",
        "The network is traced, pruned if a recipe is given, quantized on the clips and lowered\n"
        "to tasks of the accelerator. It is calibrated on one clip of each video: spread over the\n"
        "video for --sampling uniform, else from its middle.\n"
        "NETWORK is one that `pynq-kgrc networks` lists, or MODULE:FUNCTION for your own: the\n"
        "function returns a torch module, and the module has a ClipSpec named CLIP.",
    )
    compile_.add_argument("network", metavar="NETWORK", help="the network; see above")
    compile_.add_argument("-o", "--out", type=file_to_write, required=True, help="program to write")
    add_weights(compile_, "weights (default: seeded random weights)", partial=True)
    compile_.add_argument("--classes", type=whole(1, 100_000), help="classes of the network")
    compile_.add_argument("--labels", type=Path, help="text file, one class a line")
    compile_.add_argument(
        "--clips",
        nargs="+",
        required=True,
        metavar="VIDEO",
        help="a few real videos to calibrate on",
    )
    add_design(compile_, "the accelerator to compile for", "--config")
    compile_.add_argument(
        "--sampling",
        choices=SAMPLINGS,
        help="how the program samples a video: one clip of consecutive frames from its middle "
        "(centre), one spread over all of it (uniform), or clips one after the other (windows); "
        "default: as CLIP says. For weights of train or prune: uniform",
    )
    compile_.add_argument(
        "--rate",
        type=float,
        metavar="FPS",
        help="frames a second to which the program resamples a video, 0 for the video's own "
        "(default: as CLIP says)",
    )
    compile_.add_argument("--recipe", help="prune at the paper's rates: kgr, kgc or kgrc")
    compile_.add_argument(
        "--method", default=None, help="how ranges are chosen: minmax, percentile or mse"
    )
    compile_.add_argument(
        "--no-fold",
        action="store_true",
        help="write the clip as it is; by default the host writes taps of the first convolution "
        "as channels, where that is faster on the design",
    )
    compile_.add_argument(
        "--report", action="store_true", help="measure the program against float on the clips"
    )


def run_pull(options: argparse.Namespace) -> int:
    from pynq_kgrc.models.pretrained import pull

    if options.design is None:
        path = pull(options.name, progress=lambda text: print(text, file=sys.stderr))
    else:
        path = _pull_program(options)
    document = {"name": options.name, "path": readable(path)}
    print(json.dumps(document) if options.json else printable(path))
    return 0


def _pull_program(options: argparse.Namespace) -> Path:
    """A program for a design, of published weights or of one that ships.

    Raises:
        ModelError: there is nothing of that name.
    """
    from pynq_kgrc.accelerator.config import read_design
    from pynq_kgrc.compiler.released import find_program, program_names

    if options.name not in program_names():
        there = ", ".join(program_names())
        raise ModelError(f"no program {options.name!r}; there are {there}")
    with stages() as stage:
        return find_program(options.name, read_design(options.design), stage)


def run_compile(options: argparse.Namespace) -> int:
    from msgspec.structs import replace

    from pynq_kgrc.accelerator.config import read_design
    from pynq_kgrc.analysis.description import describe, describe_fidelity
    from pynq_kgrc.compiler.lower import lower
    from pynq_kgrc.compress.calibrate import DEFAULT_METHOD, choose_quant
    from pynq_kgrc.compress.patterns import prune, recipe

    config = read_design(options.design)
    rates = recipe(options.network, options.recipe) if options.recipe else {}
    graph = _trace(options)
    frames = _load_clips(options.clips, graph.clip)
    graph = prune(graph, rates, config.group_size)
    clips = (graph.clip.normalise(f) for f in progress(frames, "calibrate", len(frames)))
    method = options.method or DEFAULT_METHOD
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        quantized = choose_quant(graph, clips, config.bits, method)
    for warning in warned:
        print(f"warning: {printable(warning.message)}", file=sys.stderr)
    program = lower(quantized, config, fold=not options.no_fold)
    program.save(options.out)
    document = replace(describe(program), path=readable(options.out))
    if options.report:
        from pynq_kgrc.analysis.fidelity import measure_fidelity

        report = measure_fidelity(graph, program, progress(frames, "measure", len(frames)))
        document = replace(document, fidelity=describe_fidelity(report))
    if options.json or options.report:
        print_description(document, options.json)
    else:
        random = "" if options.weights else "the weights are random: no --weights were given\n"
        written = f"written to {printable(options.out)}; pynq-kgrc info shows its layers"
        print(f"{summary(document)}\n{random}{written}")
    return 0


def _load_clips(videos: list[str], spec: ClipSpec) -> list[Array]:
    """The frames [D, H, W, 3] of a clip of each video.

    Raises:
        VideoError: names every video that cannot be read, with the reason.
    """
    from pynq_kgrc.errors import VideoError
    from pynq_kgrc.video import load_clip

    frames, unreadable = [], []
    for video in progress(videos, "read", len(videos)):
        try:
            frames.append(load_clip(video, spec).frames)
        except VideoError as error:
            unreadable.append(str(error))
    if unreadable:
        count = f"{len(unreadable)} of {len(videos)} clips cannot be read: "
        raise VideoError((count if len(videos) > 1 else "") + "; ".join(unreadable))
    return frames


def _trace(options: argparse.Namespace) -> Graph:
    """Build the network, load its weights, and trace it to a graph."""
    from dataclasses import replace

    import torch

    from pynq_kgrc.models import find_network
    from pynq_kgrc.models.pretrained import RELEASES, read_labels
    from pynq_kgrc.models.trace import trace

    torch.manual_seed(0)
    try:
        build, clip = find_network(options.network)
        network = build(options.classes) if options.classes else build()
        if not isinstance(network, torch.nn.Module):
            kind = type(network).__name__
            raise ModelError(f"{options.network!r} gave {kind}; accepted is a torch.nn.Module")
    except KgrcError:
        raise
    except Exception as error:  # of the user's own module, which runs here
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelError(
            f"{options.network!r} cannot be built: {type(error).__name__}: {error} "
            f"({place.filename}, line {place.lineno})"
        ) from error
    if options.weights:
        print(load_weights(options, network, not options.partial), file=sys.stderr)
    elif ":" not in options.network:
        print(f"no --weights: {options.network} has seeded random weights", file=sys.stderr)
    release = None if options.partial else RELEASES.get(options.weights)
    names = options.labels or (release.labels if release else None)
    labels = () if names is None else read_labels(names)
    if options.sampling is not None:
        clip = replace(clip, sampling=options.sampling)
    if options.rate is not None:
        clip = replace(clip, rate=options.rate or None)
    return trace(network, clip, labels, options.network)
