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
    number,
    printable,
    progress,
    readable,
    stages,
    whole,
)
from pynq_kgrc.cli.info import print_description, summary
from pynq_kgrc.errors import ConfigError, KgrcError, ModelError, to_install
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
        "compile a network of PyTorch or an ONNX file to a program",
        "The network is traced, pruned if a recipe is given, quantized on the clips and lowered\n"
        "to tasks of the accelerator. It is calibrated on one clip of each video: spread over the\n"
        "video for --sampling uniform, else from its middle.\n"
        "NETWORK is one that `pynq-kgrc networks` lists, or MODULE:FUNCTION for your own: the\n"
        "function returns a torch module, and the module has a ClipSpec named CLIP.\n"
        "Or it is a FILE.onnx, opset 11 to the newest; that needs no torch. Its weights, frames,\n"
        "height and width are in the file. How pixels become its input is not: say --mean and\n"
        "--std, those of its training. Values are (pixel / 255 - mean) / std, of R, G, B:\n"
        "  pynq-kgrc compile net.onnx --mean 0.45 0.45 0.45 --std 0.225 0.225 0.225 \\\n"
        "      --short-side 128 --clips *.mp4 -o net.kgrc",
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
    of_file = compile_.add_argument_group("of an ONNX file")
    for name, text in (("mean", "mean"), ("std", "standard deviation")):
        of_file.add_argument(
            f"--{name}",
            type=number,
            nargs=3,
            metavar=("R", "G", "B"),
            help=f"{text} of pixels / 255 in its training (required); 0 0 0 and 1 1 1 if the file "
            f"takes pixels / 255",
        )
    of_file.add_argument(
        "--short-side",
        type=whole(1, 100_000),
        metavar="PIXELS",
        help="frames are resized to it, then cropped (default: the longer side of the crop)",
    )
    of_file.add_argument(
        "--step",
        type=whole(1, 100_000),
        help="take every STEP-th frame of a video (default: 1)",
    )
    of_file.add_argument(
        "--size",
        type=whole(1, 100_000),
        nargs=3,
        metavar=("FRAMES", "HEIGHT", "WIDTH"),
        help="the clip, if the file leaves it open",
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
    graph = _trace_file(options) if _is_file(options.network) else _trace(options)
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
        given = options.weights or _is_file(options.network)
        random = "" if given else "the weights are random: no --weights were given\n"
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


def _is_file(network: str) -> bool:
    return network.lower().endswith(".onnx")


def _trace_file(options: argparse.Namespace) -> Graph:
    """Read an ONNX file as a graph.

    Raises:
        ConfigError: options that belong to a network of torch, or none that says how pixels
            become the input.
    """
    from pynq_kgrc.models.pretrained import read_labels

    try:
        from pynq_kgrc.models.onnx_trace import trace_onnx
    except ImportError as error:
        raise ConfigError(f"ONNX files need more ({error}): {to_install('onnx')}") from error
    odd = [name for name in ("weights", "entry", "classes", "partial") if getattr(options, name)]
    if odd:
        raise ConfigError(
            f"--{odd[0]} beside {printable(options.network)}; accepted with a network of torch: "
            f"an ONNX file holds its weights and classes"
        )
    missing = [f"--{name} R G B" for name in ("mean", "std") if getattr(options, name) is None]
    if missing:
        raise ConfigError(
            f"{printable(options.network)} does not say how pixels become its input: give "
            f"{' and '.join(missing)} of its training, for example 0.45 0.45 0.45 and "
            f"0.225 0.225 0.225 (0 0 0 and 1 1 1 if it takes pixels / 255)"
        )
    if min(options.std) <= 0:
        raise ConfigError(f"--std {' '.join(map(str, options.std))}; accepted is above 0")
    path = Path(options.network)
    labels = () if options.labels is None else read_labels(options.labels)
    return trace_onnx(path, _clip_of_file(options, path), labels)


def _clip_of_file(options: argparse.Namespace, path: Path) -> ClipSpec:
    """The clip that an ONNX file takes, from its input and the options.

    Raises:
        ConfigError: the file leaves frames, height or width open, and --size is not given.
    """
    from pynq_kgrc.graph import ClipSpec
    from pynq_kgrc.models.onnx_file import clip_shape

    found = clip_shape(path)[2:]
    sides = options.size or ([1] * (3 - len(found)) + list(found))
    if len(sides) != 3 or None in sides:
        raise ConfigError(
            f"{path}: its input leaves frames, height or width open {list(found)}; give --size "
            f"FRAMES HEIGHT WIDTH"
        )
    frames, height, width = sides
    more = {} if options.sampling is None else {"sampling": options.sampling}
    return ClipSpec(
        frames,
        height,
        width,
        short_side=options.short_side or max(height, width),
        step=options.step or 1,
        mean=tuple(options.mean),
        std=tuple(options.std),
        rate=options.rate or None,
        **more,
    )


def _trace(options: argparse.Namespace) -> Graph:
    """Build the network, load its weights, and trace it to a graph."""
    for name in ("mean", "std", "short_side", "step", "size"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} beside {printable(options.network)}; accepted with an "
                f"ONNX file: the CLIP of a network of torch says it"
            )
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
