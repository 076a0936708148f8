"""The commands that make a program: pull and compile."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pynq_kgrc.cli.arguments import Declare, add_design, positive, progress
from pynq_kgrc.cli.info import print_description, summary
from pynq_kgrc.errors import ModelError

if TYPE_CHECKING:
    from pynq_kgrc.graph import Graph


def declare(command: Declare) -> None:
    """Add this file's commands."""
    pull = command("pull", run_pull, "fetch pretrained weights into the cache")
    pull.add_argument("name", metavar="NAME", help="i3d-kinetics400")

    compile_ = command(
        "compile",
        run_compile,
        "compile a PyTorch network to a program",
        "The network is traced, pruned if a recipe is given, quantized on the clips and lowered\n"
        "to tasks of the accelerator. It is calibrated on one clip of consecutive frames from the\n"
        "middle of each video.\n"
        "NETWORK is c3d, r2plus1d_18 or i3d, or MODULE:FUNCTION for your own: the function\n"
        "returns a torch module, and the module has a ClipSpec named CLIP.",
    )
    compile_.add_argument("network", metavar="NETWORK", help="the network; see above")
    compile_.add_argument("-o", "--out", type=Path, required=True, help="program to write")
    compile_.add_argument(
        "--weights",
        help="state dict (.safetensors, .pt) or the NAME of pull; without, seeded random weights",
    )
    compile_.add_argument("--classes", type=positive, help="classes of the network")
    compile_.add_argument("--labels", type=Path, help="text file, one class a line")
    compile_.add_argument(
        "--clips",
        nargs="+",
        required=True,
        metavar="VIDEO",
        help="a few real videos to calibrate on",
    )
    add_design(compile_, "the accelerator to compile for", "--config")
    compile_.add_argument("--recipe", help="prune at the paper's rates: kgr, kgc or kgrc")
    compile_.add_argument(
        "--method", default=None, help="how ranges are chosen: minmax, percentile or mse"
    )
    compile_.add_argument(
        "--report", action="store_true", help="measure the program against float on the clips"
    )


def run_pull(options: argparse.Namespace) -> int:
    from pynq_kgrc.models.pretrained import pull

    path = pull(options.name, progress=lambda text: print(text, file=sys.stderr))
    print(json.dumps({"name": options.name, "path": str(path)}) if options.json else path)
    return 0


def run_compile(options: argparse.Namespace) -> int:
    from msgspec.structs import replace

    from pynq_kgrc.accelerator.config import read_design
    from pynq_kgrc.analysis.description import describe, describe_fidelity
    from pynq_kgrc.compiler.lower import lower
    from pynq_kgrc.compress.calibrate import DEFAULT_METHOD, choose_quant
    from pynq_kgrc.compress.patterns import prune, recipe
    from pynq_kgrc.video import load_clip

    config = read_design(options.design)
    rates = recipe(options.network, options.recipe) if options.recipe else {}
    graph = _trace(options)
    frames = [load_clip(video, graph.clip).frames for video in options.clips]
    graph = prune(graph, rates, config.group_size)
    clips = (graph.clip.normalise(f) for f in progress(frames, "calibrate", len(frames)))
    method = options.method or DEFAULT_METHOD
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        quantized = choose_quant(graph, clips, config.bits, method)
    for warning in warned:
        print(f"warning: {warning.message}", file=sys.stderr)
    program = lower(quantized, config)
    program.save(options.out)
    document = replace(describe(program), path=str(options.out))
    if options.report:
        from pynq_kgrc.analysis.fidelity import measure_fidelity

        report = measure_fidelity(graph, program, progress(frames, "measure", len(frames)))
        document = replace(document, fidelity=describe_fidelity(report))
    if options.json or options.report:
        print_description(document, options.json)
    else:
        print(f"{summary(document)}\nwritten to {options.out}; pynq-kgrc info shows its layers")
    return 0


def _trace(options: argparse.Namespace) -> Graph:
    """Build the network, load its weights, and trace it to a graph."""
    import torch

    from pynq_kgrc.models import find_network
    from pynq_kgrc.models.checkpoint import load_state
    from pynq_kgrc.models.pretrained import RELEASES, pull
    from pynq_kgrc.models.trace import trace

    build, clip = find_network(options.network)
    torch.manual_seed(0)
    network = build(options.classes) if options.classes else build()
    if options.weights:
        pulled = options.weights in RELEASES
        load_state(network, pull(options.weights) if pulled else Path(options.weights))
    elif ":" not in options.network:
        print(f"no --weights: {options.network} has seeded random weights", file=sys.stderr)
    release = RELEASES.get(options.weights)
    labels = _labels(options.labels or (release.labels if release else None))
    return trace(network, clip, labels, options.network)


def _labels(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        return tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: no list of labels, one a line ({error})") from error
