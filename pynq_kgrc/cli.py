"""The command `pynq-kgrc`: thin, no logic of its own. Each command imports what it needs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pynq_kgrc.errors import KgrcError, ModelError

if TYPE_CHECKING:
    from pynq_kgrc.graph import ClipSpec, Graph
    from pynq_kgrc.program import Program
    from pynq_kgrc.runtime import Prediction
    from pynq_kgrc.video import Clip

T = TypeVar("T")

DESCRIPTION = """\
Recognize actions in videos with 3-D CNNs compiled for an FPGA accelerator with balanced kernel
group sparsity (KGRC), on the accelerator or on its bit-exact emulation on any computer.

The road from a network to labels:

  pynq-kgrc pull i3d-kinetics400            fetch pretrained weights (47 MB, once)
  pynq-kgrc compile i3d --weights i3d-kinetics400 --clips clips/*.mp4 -o i3d.kgrc
                                            quantize to 8 bits on those clips, and compile
  pynq-kgrc info i3d.kgrc                   layers, modes, sizes, operations
  pynq-kgrc classify video.mp4 -p i3d.kgrc  the five best labels
"""

EPILOG = """\
Exit status: 0 done, 1 compare found a difference, 2 a mistake in the input; what was wrong goes to
standard error. With --json every command prints one JSON document on standard output and nothing
else there. Figures of operations and bytes are emulated counts; nothing here was measured on an
FPGA. Files: programs (.kgrc) are safetensors containers; weights are cached in
$XDG_CACHE_HOME/pynq_kgrc, or ~/.cache/pynq_kgrc.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except KgrcError as error:
        print(f"pynq-kgrc: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "pynq-kgrc", description=DESCRIPTION, epilog=EPILOG, formatter_class=style
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str, more: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=f"{text}\n\n{more}", formatter_class=style
        )
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON for a script to read")
        return added

    classify = command(
        "classify",
        _classify,
        "name the action in videos",
        "By default one clip from the middle of each video is looked at. With --stride the whole\n"
        "video is, in overlapping or adjoining windows, and a timeline is printed.",
    )
    classify.add_argument("videos", nargs="+", metavar="VIDEO", help="MP4, MKV, AVI, TS or GIF")
    classify.add_argument("-p", "--program", type=Path, required=True, help="a compiled .kgrc")
    classify.add_argument("--backend", default="emulate", help="what runs it (default: emulate)")
    classify.add_argument("--top", type=_positive, default=5, help="labels to print (default: 5)")
    classify.add_argument(
        "--stride", type=_positive, metavar="FRAMES", help="look every FRAMES frames of the video"
    )
    classify.add_argument(
        "--sampling",
        choices=("centre", "uniform"),
        default="centre",
        help="frames of the middle, or spread over the whole video (default: centre)",
    )

    pull = command("pull", _pull, "fetch pretrained weights into the cache")
    pull.add_argument("name", help="i3d-kinetics400")

    compile_ = command(
        "compile",
        _compile,
        "turn a PyTorch network into a program",
        "The network is traced, pruned if a recipe is given, quantized on the clips and lowered.\n"
        "NETWORK is c3d, r2plus1d_18 or i3d, or MODULE:FUNCTION for your own: the function\n"
        "returns a torch module, and the module has a ClipSpec named CLIP.",
    )
    compile_.add_argument("network", metavar="NETWORK", help="the network; see above")
    compile_.add_argument("-o", "--out", type=Path, required=True, help="program to write")
    compile_.add_argument(
        "--weights",
        help="state dict (.safetensors, .pt) or a name that was pulled; seeded random without",
    )
    compile_.add_argument("--classes", type=_positive, help="classes of the network")
    compile_.add_argument("--labels", type=Path, help="text file, one class a line")
    compile_.add_argument(
        "--clips", nargs="+", required=True, metavar="VIDEO", help="a few real videos to calibrate"
    )
    compile_.add_argument("--config", default="8-sparse", help="accelerator (default: 8-sparse)")
    compile_.add_argument("--recipe", help="prune as the paper does: kgr, kgc or kgrc")
    compile_.add_argument("--method", default=None, help="ranges: minmax, percentile or mse")
    compile_.add_argument(
        "--report", action="store_true", help="measure the program against float on the clips"
    )

    info = command("info", _info, "show what a program holds")
    info.add_argument("program", type=Path)

    compare = command(
        "compare",
        _compare,
        "run a video on two backends and name the first difference",
        "Exit status 1 if they differ.",
    )
    compare.add_argument("video")
    compare.add_argument("-p", "--program", type=Path, required=True)
    compare.add_argument("--left", default="emulate")
    compare.add_argument("--right", default="emulate")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _progress(items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar on a terminal."""
    from tqdm import tqdm

    yield from tqdm(items, desc=text, total=total, disable=None, leave=False)


def _classify(options: argparse.Namespace) -> int:
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
                for clip in _progress(clips, Path(video).name)
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
        "labels": [label._asdict() for label in prediction.labels],
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
            print(f"  {label.score:6.1%} {'█' * round(20 * label.score):20} {label.name}")


def _pull(options: argparse.Namespace) -> int:
    from pynq_kgrc.models.pretrained import pull

    path = pull(options.name, progress=lambda text: print(text, file=sys.stderr))
    print(json.dumps({"name": options.name, "path": str(path)}) if options.json else path)
    return 0


def _compile(options: argparse.Namespace) -> int:
    from pynq_kgrc.accelerator.config import preset
    from pynq_kgrc.compiler.lower import lower
    from pynq_kgrc.compress.patterns import prune, recipe
    from pynq_kgrc.compress.quantize import DEFAULT_METHOD, choose_quant
    from pynq_kgrc.video import load_clip

    config = preset(options.config)
    rates = recipe(options.network, options.recipe) if options.recipe else {}
    graph = _trace(options)
    frames = [load_clip(video, graph.clip).frames for video in options.clips]
    graph = prune(graph, rates, config.group_size)
    clips = (graph.clip.normalise(f) for f in _progress(frames, "calibrate", len(frames)))
    method = options.method or DEFAULT_METHOD
    program = lower(choose_quant(graph, clips, config.bits, method), config)
    program.save(options.out)
    document = describe(program)
    if options.report:
        from pynq_kgrc.fidelity import measure_fidelity

        report = measure_fidelity(graph, program, _progress(frames, "measure", len(frames)))
        document["fidelity"] = {
            "clips": report.clips,
            "agreeing": report.agreeing,
            "snr_db": {task.task: round(task.snr_db, 1) for task in report.tasks},
        }
    document["path"] = str(options.out)
    if options.json or options.report:
        _print_description(document, options.json)
    else:
        print(f"{summary(document)}\nwritten to {options.out}; pynq-kgrc info shows its layers")
    return 0


def _trace(options: argparse.Namespace) -> Graph:
    """The network of the command line, with its weights, as a graph."""
    import torch

    from pynq_kgrc.models import NETWORKS
    from pynq_kgrc.models.checkpoint import load_state
    from pynq_kgrc.models.pretrained import RELEASES, pull
    from pynq_kgrc.models.trace import trace

    place = NETWORKS.get(options.network) or tuple(options.network.split(":"))
    try:
        module = import_module(place[0])
        build, clip = getattr(module, place[1]), _clip_spec(module)
    except (ImportError, AttributeError, IndexError, ValueError) as error:
        raise ModelError(
            f"{options.network!r} is no network ({error}); use {', '.join(NETWORKS)}, "
            f"or MODULE:FUNCTION of a module with a ClipSpec named CLIP"
        ) from error
    torch.manual_seed(0)
    network = build(options.classes) if options.classes else build()
    if options.weights:
        pulled = options.weights in RELEASES
        load_state(network, pull(options.weights) if pulled else Path(options.weights))
    labels = _labels(options, options.weights == "i3d-kinetics400")
    return trace(network, clip, labels, options.network)


def _clip_spec(module: Any) -> ClipSpec:
    spec: ClipSpec = module.CLIP
    return spec


def _labels(options: argparse.Namespace, kinetics: bool) -> tuple[str, ...]:
    path = options.labels
    if path is None and kinetics:
        path = Path(__file__).with_name("labels") / "kinetics400.txt"
    if path is None:
        return ()
    try:
        return tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: no list of labels, one a line ({error})") from error


def _info(options: argparse.Namespace) -> int:
    from pynq_kgrc.program import load

    _print_description(describe(load(options.program)), options.json)
    return 0


def describe(program: Program) -> dict[str, Any]:
    """What a program holds, as plain data: sizes in bytes, operations in MACs."""
    from pynq_kgrc.program import ConvTask

    tasks = []
    for task in program.tasks:
        row: dict[str, Any] = {
            "name": task.name,
            "in": [task.shape.channels, *task.shape.in_size],
            "out": [task.shape.out_channels, *task.out_size],
            "kernel": list(task.shape.kernel),
            "stride": list(task.shape.stride),
        }
        if isinstance(task, ConvTask):
            config = program.config
            kr, kc = task.weights.kept
            row["mode"] = task.weights.mode(config.gm, program.group_columns(task))
            row["kept_rows"], row["kept_columns"] = kr, kc
            row["macs_dense"], row["macs_kept"] = task.shape.macs, task.kept_macs
            row["weight_bytes"] = program.weight_bytes(task)
            row["rides"] = [w for w in ("shortcut", "pool") if getattr(task, w) is not None]
        else:
            row["mode"] = "average pool" if task.average else "max pool"
        tasks.append(row)
    dense = sum(row.get("macs_dense", 0) for row in tasks)
    kept = sum(row.get("macs_kept", 0) for row in tasks)
    clip = program.clip
    return {
        "name": program.name,
        "format_version": program.version,
        "accelerator": program.config.name,
        "accelerator_digest": program.config.digest,
        "bits": program.config.bits,
        "clip": {"frames": clip.frames, "height": clip.height, "width": clip.width},
        "classes": len(program.labels),
        "activation_peak_bytes": program.arena_bytes,
        "weight_bytes": sum(row.get("weight_bytes", 0) for row in tasks),
        "macs_dense": dense,
        "macs_kept": kept,
        "tasks": tasks,
    }


def _print_description(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(document, indent=2))
        return
    print(f"{summary(document)}\n")
    wide = max(len(row["name"]) for row in document["tasks"])
    snr = document.get("fidelity", {}).get("snr_db", {})
    for row in document["tasks"]:
        print(_task_line(row, wide, snr))
    if "fidelity" in document:
        report = document["fidelity"]
        print(f"\nfirst label as in float on {report['agreeing']} of {report['clips']} clips")


def summary(document: dict[str, Any]) -> str:
    """A description in four lines."""
    clip = document["clip"]
    return (
        f"{document['name']} for {document['accelerator']} ({document['bits']} bits, "
        f"digest {document['accelerator_digest']})\n"
        f"clip {clip['frames']} x {clip['height']} x {clip['width']}, "
        f"{document['classes'] or 'unnamed'} classes\n"
        f"weights {document['weight_bytes'] / 1e6:.1f} MB, activations at their peak "
        f"{document['activation_peak_bytes'] / 1e6:.1f} MB\n"
        f"operations {document['macs_dense'] / 1e9:.2f} GMAC dense, "
        f"{document['macs_kept'] / 1e9:.2f} kept: "
        f"{document['macs_dense'] / max(1, document['macs_kept']):.2f}x fewer"
    )


def _task_line(row: dict[str, Any], wide: int, snr: dict[str, float]) -> str:
    shape = " x ".join(map(str, row["in"])) + " -> " + " x ".join(map(str, row["out"]))
    kernel = "x".join(map(str, row["kernel"]))
    line = f"{row['name']:{wide}}  {row['mode']:12} {kernel:7} {shape}"
    if "macs_kept" in row:
        line += f"  {row['macs_kept'] / 1e6:.0f} of {row['macs_dense'] / 1e6:.0f} MMAC"
        line += f"  {row['weight_bytes'] / 1e3:.0f} kB"
        line += "".join(f"  +{rider}" for rider in row["rides"])
    if row["name"] in snr:
        line += f"  {snr[row['name']]:.1f} dB"
    return line


def _compare(options: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
