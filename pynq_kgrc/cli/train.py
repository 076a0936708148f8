"""Commands of training: train, prune, quantize and evaluate."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pynq_kgrc.cli.arguments import (
    PROGRAM_HELP,
    Declare,
    Run,
    add_design,
    add_weights,
    load_weights,
    positive,
    program_file,
    progress,
    weights_file,
    whole,
)
from pynq_kgrc.compress.recipes import ALGORITHMS, NAMES
from pynq_kgrc.errors import ConfigError, to_install
from pynq_kgrc.graph import TRAINING_SAMPLING

if TYPE_CHECKING:
    from msgspec import Struct
    from torch import Tensor, nn

    from pynq_kgrc.accelerator.config import AcceleratorConfig
    from pynq_kgrc.analysis.accuracy import Accuracy, LabelledClip
    from pynq_kgrc.compiler.latency import LatencySearch
    from pynq_kgrc.compress.dataset import Clips, VideoSet
    from pynq_kgrc.compress.recipes import LayerRecipe, Recipe
    from pynq_kgrc.compress.training import EpochRecord, TrainConfig, TrainingSetup
    from pynq_kgrc.graph import ClipSpec, Graph
    from pynq_kgrc.program import Program

T = TypeVar("T", bound="Struct")

WEIGHTS = "weights.safetensors"
RECIPE = "recipe.toml"

LAYOUT = """\
DATA is a folder with an index.csv of the columns file, label and split ("train" or "test"). Labels
are numbers from 0, to which a column `class` gives names, or names. Without an index.csv, DATA has
a folder for each class: CLASS/video.mp4, or train/CLASS/video.mp4 and test/CLASS/video.mp4.
Without train/ and test/, a fifth of each class, always the same, is for testing. Each video is
decoded once, into --cache. Classes are matched to those of the network by name, where both have
names."""

DATA = f"""\
{LAYOUT}

A run keeps its settings (config.toml), log (log.csv) and a checkpoint in its folder. A run that
was killed resumes when it is started again, and ends with the same weights, bit for bit. The file
of weights says which weights are pruned: those stay zero, all others learn."""


def declare(command: Declare) -> None:
    """Add this file's commands."""
    train = command(
        "train",
        _resumable(run_train),
        "train a network on a folder of labelled videos",
        f"{DATA}\n\n"
        "From published weights to your own classes, with a new classifier:\n\n"
        "  pynq-kgrc train i3d --weights i3d-kinetics400 --classes 27 --data DATA -o run\n\n"
        "Several processes or GPUs: torchrun --nproc-per-node N -m pynq_kgrc.cli train ...",
    )
    _learning(train, "folder of the run; gets weights.safetensors")
    add_weights(train, "weights to start from (default: seeded random weights)", partial=True)
    train.add_argument(
        "--classes",
        type=whole(1, 100_000),
        help="number of classes, which DATA has to have too; if WEIGHTS are for another number, "
        "their classifier is left out",
    )
    _schedule(train)
    _keep_zeros(train)

    prune = command(
        "prune",
        _resumable(run_prune),
        "prune a trained network and train what is left",
        f"{DATA}\n\n"
        "--recipe says what is pruned: kgr, kgc, kgrc or blockwise for the published rates of the\n"
        "network, or a TOML file with lines such as\n\n"
        '  [layers]\n  conv2 = { pattern = "kgrc", rows = "1/2", cols = "2/3" }\n\n'
        "--pattern and --reduction search the rates instead: of those that satisfy eq. (9) of the\n"
        "paper, the ones that keep most of the weights while the cost falls by that factor. The\n"
        "cost is operations, or with --target latency the cycles of the whole compiled program on\n"
        "--design (modelled with memory by accelerator/latency.py).",
    )
    _learning(prune, "folder of the run; gets weights.safetensors and recipe.toml")
    add_weights(prune, "weights of the dense network", required=True)
    how = prune.add_mutually_exclusive_group(required=True)
    how.add_argument("--recipe", help="kgr, kgc, kgrc, blockwise, or a TOML file")
    how.add_argument("--pattern", help=", ".join(NAMES))
    prune.add_argument(
        "--reduction", type=float, default=3.0, help="factor by which the cost falls (default: 3)"
    )
    prune.add_argument(
        "--threshold", type=float, metavar="T",
        help="with --pattern, instead of --reduction: prune the units that are weaker than T times "
        "their layer's mean after the preparation; the rates are known afterwards",
    )  # fmt: skip
    prune.add_argument(
        "--target", choices=("operations", "latency"), default="operations",
        help="the cost that --reduction divides (default: operations)",
    )  # fmt: skip
    prune.add_argument(
        "--layers", help="comma-separated (default: all convolutions but the first and the last)"
    )
    add_design(prune, "the accelerator whose groups and cycles count", "--accelerator")
    prune.add_argument("--algorithm", choices=ALGORITHMS, help="overrides the settings")
    _schedule(
        prune,
        "settings of pruning, a TOML file with algorithm, factor, ... and the tables [prepare] and "
        "[retrain], each with settings as train --config takes them",
        "overrides the settings of both trainings",
    )
    _keep_zeros(prune)

    quantize = command(
        "quantize",
        _resumable(run_quantize),
        "quantize a network to the width of a design, and compile it",
        f"{DATA}\n\n"
        "The ranges of all tensors are chosen on clips of the training set. Then weights, biases\n"
        "and scales are trained with the accelerator's integer arithmetic in the forward pass\n"
        "(quantization-aware training); pruned weights stay zero. --epochs 0 trains nothing\n"
        "(post-training quantization).",
    )
    _learning(quantize, "folder of the run; gets program.kgrc")
    add_weights(quantize, "weights, pruned or dense", required=True)
    add_design(quantize, "the accelerator to compile for", "--accelerator")
    quantize.add_argument("--method", default=None, help="ranges: minmax, percentile or mse")
    quantize.add_argument(
        "--admm", type=positive, metavar="EPOCHS",
        help="before that, pull the float weights to the codes by ADMM: 16 bits, then 8, then 4",
    )  # fmt: skip
    quantize.add_argument(
        "--powers", action="store_true",
        help="weights of 0 and powers of two only, frozen group after group: 3 bits on a 4-bit "
        "design, 4 bits on an 8-bit design",
    )  # fmt: skip
    quantize.add_argument(
        "--thresholds", type=float, metavar="DROP",
        help="at the end set small weights to zero, layer by layer, while the fraction of training "
        "clips that are right falls by at most DROP in all; the array multiplies these zeros, so "
        "that the program is not faster",
    )  # fmt: skip
    _schedule(quantize)
    _keep_zeros(quantize)

    evaluate = command(
        "evaluate",
        _resumable(run_evaluate),
        "measure the accuracy of a program or of a float network",
        "--program runs on a backend, bit for bit as on the accelerator; videos are sampled as\n"
        "the program says. --network and --weights name a float network, which runs in torch;\n"
        "of each video it gets one clip that is spread over all of it, as in training. The 95 %\n"
        f"interval is Wilson's, the expected calibration error has 15 bins.\n\n{LAYOUT}",
    )
    evaluate.add_argument("--data", type=Path, required=True, help="folder of labelled videos")
    evaluate.add_argument("-p", "--program", type=Path, help=PROGRAM_HELP)
    evaluate.add_argument(
        "--backend", default="emulate", help="what runs the program (default: emulate)"
    )
    evaluate.add_argument("--network", help="a float network, instead of a program")
    add_weights(evaluate, "its weights")
    evaluate.add_argument(
        "--split", default="test", help="which clips; all: every clip (default: test)"
    )
    evaluate.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the confusion matrix (.png, .svg, .pdf)"
    )
    _cache(evaluate)


def _learning(command: argparse.ArgumentParser, out: str) -> None:
    command.add_argument("network", metavar="NETWORK", help="as for pynq-kgrc compile")
    command.add_argument("--data", type=Path, required=True, help="folder of labelled videos")
    command.add_argument("-o", "--out", type=Path, required=True, help=out)
    command.add_argument(
        "--tensorboard", action="store_true", help="also write events for TensorBoard"
    )
    command.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    _cache(command)


def _cache(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cache", type=Path, default=None,
        help="folder of decoded clips (default: clips/ in pynq_kgrc's cache folder)",
    )  # fmt: skip
    command.add_argument(
        "--skip-bad", action="store_true",
        help="list the videos that cannot be read, and go on without them",
    )  # fmt: skip


def _schedule(
    command: argparse.ArgumentParser,
    text: str = "settings, a TOML file with epochs, batch, lr, ...",
    override: str = "overrides the settings",
) -> None:
    command.add_argument("--config", type=Path, help=f"{text} (default: built-in settings)")
    command.add_argument("--epochs", type=int, help=override)
    command.add_argument("--seed", type=int, help=override)


def _keep_zeros(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--keep-zeros", action="store_true",
        help="every weight that is zero in --weights is pruned, and stays zero (for files that do "
        "not say what is pruned)",
    )  # fmt: skip


def _resumable(run: Run) -> Run:
    """A command whose interruption and full disks end in one line instead of a traceback."""

    def resumable(options: argparse.Namespace) -> int:
        try:
            return run(options)
        except KeyboardInterrupt:
            _say("pynq-kgrc: interrupted; the same command goes on from the last whole epoch")
            return 130
        except BrokenPipeError:
            raise
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise ConfigError(f"{place}{error.strerror or error}") from error

    return resumable


# ---- commands -------------------------------------------------------------------------------


def run_train(options: argparse.Namespace) -> int:
    import copy

    import torch

    from pynq_kgrc.compress.training import TRAINED, TrainConfig, measure_top1
    from pynq_kgrc.models.checkpoint import load_state

    for name in ("keep_zeros", "partial", "entry"):
        if getattr(options, name) and not options.weights:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} says how --weights is read, which is not given")
    config = _changed(_settings(options, TrainConfig()), options)
    setup, videos = _setup(options)
    torch.manual_seed(config.seed)
    network, spec, pruned = _network(options, videos)
    records = setup.train(network, config, options.out, pruned=pruned)
    _keep(network, options.out / WEIGHTS, setup, pruned, videos)
    found: dict[str, Any] = {"epochs": len(records), "test_top1": records[-1].test_top1}
    if config.average and (options.out / TRAINED).exists():
        trained = copy.deepcopy(network)
        load_state(trained, options.out / TRAINED)
        found["test_top1_without_average"] = measure_top1(trained, setup.test, spec)
        found["path_without_average"] = str(options.out / TRAINED)
    return _report(options, found, WEIGHTS)


def run_prune(options: argparse.Namespace) -> int:
    import copy

    import msgspec

    from pynq_kgrc.accelerator.config import read_design
    from pynq_kgrc.compress.patterns import kept_operations
    from pynq_kgrc.compress.pruning import PruneConfig, prune_network
    from pynq_kgrc.compress.recipes import build_patterns, write_recipe
    from pynq_kgrc.compress.training import measure_top1
    from pynq_kgrc.models.trace import trace

    design = read_design(options.design)
    config = _settings(options, PruneConfig())
    if options.algorithm is not None:
        config = msgspec.structs.replace(config, algorithm=options.algorithm)
    config = msgspec.structs.replace(
        config,
        prepare=_changed(config.prepare, options),
        retrain=_changed(config.retrain, options),
    )
    setup, videos = _setup(options)
    network, spec, pruned = _network(options, videos)
    compile_graph = partial(_compile, setup=setup, design=design)
    dense = trace(network, spec, name=options.network)
    layers, search = _recipe(options, dense, design, compile_graph)
    recipe = build_patterns(layers, design)
    find = None
    if options.threshold is None:
        write_recipe(layers, options.out / RECIPE)
    else:
        find = _by_threshold(options, list(layers), dense, design)
    teacher = copy.deepcopy(network)
    pruned = prune_network(network, recipe, config, setup, options.out, teacher, pruned, find)
    _keep(network, options.out / WEIGHTS, setup, pruned, videos)
    graph = trace(network.cpu(), spec, name=options.network)
    macs_dense, macs_kept = kept_operations(graph)
    found: dict[str, Any] = {
        "macs_dense": macs_dense,
        "macs_kept": macs_kept,
        "reduction": round(macs_dense / macs_kept, 3),
        "test_top1": measure_top1(network, setup.test, spec),
        "test_top1_dense": measure_top1(teacher, setup.test, spec),
    }
    found |= _latency(design, search, dense, graph, compile_graph)
    return _report(options, found, WEIGHTS)


def _by_threshold(
    options: argparse.Namespace, names: list[str], graph: Graph, design: AcceleratorConfig
) -> Callable[[nn.Module], Recipe]:
    """Gives the rates below the threshold of a network, and writes them to recipe.toml."""
    from pynq_kgrc.compress.masks import chosen_weights
    from pynq_kgrc.compress.recipes import build_patterns, rates_by_threshold, write_recipe

    known: dict[str, LayerRecipe] = {}

    def find(module: nn.Module) -> Recipe:
        own = chosen_weights(module, names)
        weights = {name: weight.detach().cpu().numpy() for name, weight in own.items()}
        found = rates_by_threshold(graph, weights, options.pattern, options.threshold, design)
        known.update(found)
        write_recipe(known, options.out / RECIPE)
        return build_patterns(found, design)

    return find


def _latency(
    design: AcceleratorConfig,
    search: LatencySearch | None,
    dense: Graph,
    pruned: Graph,
    compile_graph: Callable[[Graph], Program],
) -> dict[str, Any]:
    """MACs and modelled cycles of the compiled programs before and after pruning."""
    from pynq_kgrc.analysis.description import describe
    from pynq_kgrc.compiler.latency import program_cycles
    from pynq_kgrc.errors import CompileError

    try:
        programs = compile_graph(dense), compile_graph(pruned)
    except CompileError as error:
        _say(f"the latency is not modelled: {error}")
        return {}
    before, after = map(program_cycles, programs)
    array_dense, array_macs = (describe(each).macs_array for each in programs)
    return {
        "design": design.name,
        "array_macs_dense": array_dense,
        "array_macs": array_macs,
        "modelled_cycles_dense": before,
        "modelled_cycles": after,
        **({} if search is None else {"latency_reduction_asked": search.asked}),
        "latency_reduction": round(before / after, 3),
    }


def run_quantize(options: argparse.Namespace) -> int:
    import copy
    from dataclasses import replace

    import msgspec

    from pynq_kgrc.accelerator.config import read_design
    from pynq_kgrc.analysis.accuracy import measure_accuracy
    from pynq_kgrc.compiler.lower import lower
    from pynq_kgrc.compress.augment import calibration_clips
    from pynq_kgrc.compress.calibrate import DEFAULT_METHOD, choose_quant
    from pynq_kgrc.compress.masks import traced_zeros
    from pynq_kgrc.compress.patterns import kept_operations
    from pynq_kgrc.compress.train_quantized import QUANTIZE, approach_codes, train_quantized
    from pynq_kgrc.models.trace import trace

    design = read_design(options.design)
    config = _settings(options, QUANTIZE)
    trains = options.epochs != 0
    if trains:
        config = _changed(config, options)
    elif options.powers:
        raise ConfigError("--powers quantizes in training; --epochs has to be 1 or more")
    elif options.seed is not None:
        config = msgspec.structs.replace(config, seed=options.seed)
    setup, videos = _setup(options)
    network, spec, pruned = _network(options, videos, quiet=not (trains or options.admm))
    teacher = copy.deepcopy(network)
    if options.admm:
        settings = msgspec.structs.replace(config, epochs=options.admm)
        approach_codes(
            network, design.bits, settings, setup, options.out / "admm", teacher, pruned=pruned
        )
    spec = replace(spec, sampling=TRAINING_SAMPLING)
    graph = trace(network.cpu(), spec, videos.classes, options.network)
    few = calibration_clips(setup.clips, spec)
    graph = choose_quant(graph, few, design.bits, options.method or DEFAULT_METHOD)
    if trains:
        zeros = traced_zeros(network, spec, pruned)
        graph = train_quantized(
            graph, config, setup, options.out, teacher, options.device, options.powers, zeros
        )
    thresholds: dict[str, float] = {}
    if options.thresholds is not None:
        graph, thresholds = _tune_thresholds(options, graph, videos)
    program = lower(graph, design)
    path = options.out / "program.kgrc"
    program.save(path)
    clips = list(progress(setup.test, "emulate", len(setup.test)))
    accuracy = measure_accuracy(program, clips)
    found = {
        "bits": design.bits,
        "emulated_top1": accuracy.top1,
        "emulated_top5": accuracy.top5,
        "clips": accuracy.clips,
        "bytes": path.stat().st_size,
    }
    if options.thresholds is not None:
        dense, kept = kept_operations(graph)
        found |= {"thresholds": thresholds, "operations_by_zero": 1 - kept / dense}
    return _report(options, found, path.name)


def _tune_thresholds(
    options: argparse.Namespace, graph: Graph, videos: VideoSet
) -> tuple[Graph, dict[str, float]]:
    """The graph with small weights set to zero; accuracy is that of codes on training clips."""
    from pynq_kgrc.compress.fake_quant import FakeQuantNetwork
    from pynq_kgrc.compress.importance import tune_thresholds
    from pynq_kgrc.compress.training import measure_top1

    clips = _clips(options, videos.only("train"), graph.clip)
    names = [layer.name for layer in graph.convolutions()]

    def measure(attempt: Graph) -> float:
        return measure_top1(FakeQuantNetwork(attempt), clips, attempt.clip)

    graph, found = tune_thresholds(graph, measure, options.thresholds, names)
    for name, threshold in found.items():
        _say(f"{name}: weights below {threshold:.3g} are zero")
    return graph, found


def run_evaluate(options: argparse.Namespace) -> int:
    from pynq_kgrc.compress.dataset import read_index

    if (options.program is None) == (options.network is None):
        raise ConfigError("evaluate takes either --program or --network")
    kind = "" if options.plot is None else options.plot.suffix.lower()
    if options.plot is not None and kind not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {options.plot}: accepted are names in .png, .svg and .pdf")
    videos = read_index(options.data, skip_bad=options.skip_bad, say=_say).only(options.split)
    run = _evaluate_network if options.program is None else _evaluate_program
    found, accuracy, names = run(options, videos)
    if options.plot is not None:
        try:
            from pynq_kgrc.analysis.plots import plot_confusion
        except ImportError as error:
            raise ConfigError(f"--plot needs matplotlib: {to_install('plots')}") from error
        from pynq_kgrc.files import written_beside

        with written_beside(options.plot) as beside:
            plot_confusion(accuracy.confusion, names).savefig(beside, format=kind[1:])
        found["plot"] = str(options.plot)
    if options.json:
        print(json.dumps(found | _measured(accuracy, names), indent=2))
    else:
        _print_accuracy(found, accuracy, names)
    return 0


def _evaluate_program(
    options: argparse.Namespace, videos: VideoSet
) -> tuple[dict[str, Any], Accuracy, tuple[str, ...]]:
    from pynq_kgrc.analysis.accuracy import measure_accuracy
    from pynq_kgrc.compress.dataset import video_windows
    from pynq_kgrc.program import load

    program = load(program_file(options.program))
    videos = videos.named_by(_names(program), str(options.program))
    clips: Iterable[LabelledClip]
    if program.clip.sampling == "windows":  # not cached: there may be many of a video
        clips, count = video_windows(videos, program.clip), len(videos.samples)
    else:
        cached = _clips(options, videos, program.clip, program.clip.sampling)
        clips, count = cached, len(cached)
    accuracy = measure_accuracy(
        program, clips, options.backend, lambda c: progress(c, "evaluate", count)
    )
    found = {"program": program.name, "backend": options.backend}
    return found, accuracy, videos.classes


def _names(program: Program) -> tuple[str, ...]:
    """The classes of a program by number; their numbers if they have no names."""
    classes = program.tasks[-1].shape.out_channels
    return program.labels or tuple(map(str, range(classes)))


def _evaluate_network(
    options: argparse.Namespace, videos: VideoSet
) -> tuple[dict[str, Any], Accuracy, tuple[str, ...]]:
    from pynq_kgrc.analysis.accuracy import accuracy_of
    from pynq_kgrc.compress.training import predict

    videos = _matched(options, videos)
    network, spec, _ = _network(options, videos, quiet=True)
    clips = _clips(options, videos, spec)
    logits = predict(network, clips, spec).double().numpy()
    names = videos.classes
    if logits.shape[1] != len(names):
        raise ConfigError(
            f"{options.network} has {logits.shape[1]} classes; {options.data} has {len(names)}"
        )
    return {"network": options.network}, accuracy_of(logits, clips.labels), names


def _measured(accuracy: Accuracy, names: tuple[str, ...]) -> dict[str, Any]:
    """The accuracy as JSON."""
    classes = []
    for label, name in enumerate(names):
        one = accuracy.of_class(label)
        taken_for = None if one.taken_for is None else names[one.taken_for]
        classes.append(
            {
                "label": name,
                "clips": one.clips,
                "right": one.right,
                "predicted": one.predicted,
                "taken_for": taken_for,
            }
        )
    return {
        "clips": accuracy.clips,
        "top1": accuracy.top1,
        "top1_right": accuracy.right,
        "top1_interval_95": list(accuracy.interval),
        "top5": accuracy.top5,
        "top5_right": accuracy.among_five,
        "expected_calibration_error": accuracy.calibration_error,
        "classes": classes,
        "confusion": accuracy.confusion.tolist(),
    }


def _print_accuracy(found: dict[str, Any], accuracy: Accuracy, names: tuple[str, ...]) -> None:
    for key, value in found.items():
        print(f"{key}: {value}")
    low, high = accuracy.interval
    few = f"; there are only {len(names)} classes" if len(names) <= 5 else ""
    print(
        f"clips: {accuracy.clips}\n"
        f"top1: {accuracy.top1:.1%} ({accuracy.right} of {accuracy.clips}; 95% interval "
        f"{low:.1%} to {high:.1%})\n"
        f"top5: {accuracy.top5:.1%} ({accuracy.among_five} of {accuracy.clips}{few})\n"
        f"expected calibration error: {accuracy.calibration_error:.3f}\n"
    )
    width = max(5, *map(len, names))
    print(f"{'class':{width}}  clips  right         predicted  others taken for")
    for label, name in enumerate(names):
        one = accuracy.of_class(label)
        if not (one.clips or one.predicted):
            continue
        share = f"{one.right / one.clips:6.1%}" if one.clips else "     -"
        taken_for = "" if one.taken_for is None else names[one.taken_for]
        line = (
            f"{name:{width}}  {one.clips:5}  {one.right:5} {share}  {one.predicted:9}  {taken_for}"
        )
        print(line.rstrip())


# ---- shared by the commands -----------------------------------------------------------------


def _setup(options: argparse.Namespace) -> tuple[TrainingSetup, VideoSet]:
    """The decoded clips of the data folder, and this process's share of the work."""
    from pynq_kgrc.compress.augment import wide_spec
    from pynq_kgrc.compress.dataset import read_index
    from pynq_kgrc.compress.training import TrainingSetup, join_processes
    from pynq_kgrc.models import find_network

    videos = read_index(options.data, skip_bad=options.skip_bad, say=_say)
    videos = _matched(options, videos)
    _, spec = find_network(options.network)
    share = join_processes(options.device)
    clips = _clips(options, videos.only("train"), wide_spec(spec))
    test = _clips(options, videos.only("test"), spec)
    quiet = options.json or share[0] != 0
    say = _say if share[0] == 0 else _say_nothing
    return TrainingSetup(clips, test, spec, progress, _watch(options, quiet), share, say), videos


def _matched(options: argparse.Namespace, videos: VideoSet) -> VideoSet:
    """The videos with the labels of --weights, where it names its classes and they are kept.

    Raises:
        ConfigError: --classes is not the number of classes that the videos have.
        DataError: a class of the videos is not one of --weights.
    """
    from pynq_kgrc.compress.weights import load_notes
    from pynq_kgrc.errors import DataError
    from pynq_kgrc.models.pretrained import RELEASES, read_labels

    release = RELEASES.get(options.weights or "")
    names: tuple[str, ...] = ()
    if release:
        names = read_labels(release.labels)
    elif options.weights:
        names = load_notes(options.weights).classes
    classes = getattr(options, "classes", None)
    if getattr(options, "partial", False) or classes not in (None, len(names)):
        names = ()
    try:
        named = videos.named_by(names, str(options.weights)) if options.weights else videos
    except DataError as error:
        cure = "; --partial trains a new classifier" if hasattr(options, "partial") else ""
        raise DataError(f"{error}{cure}") from error
    if classes not in (None, len(named.classes)):
        raise ConfigError(f"--classes {classes}: {options.data} has {len(named.classes)} classes")
    return named


def _clips(
    options: argparse.Namespace,
    videos: VideoSet,
    spec: ClipSpec,
    sampling: str = TRAINING_SAMPLING,
) -> Clips:
    from pynq_kgrc.compress.dataset import load_clips

    cache = _clip_cache(options)
    return load_clips(videos, spec, cache, sampling, say=_say, skip_bad=options.skip_bad)


def _network(
    options: argparse.Namespace, videos: VideoSet, quiet: bool = False
) -> tuple[nn.Module, ClipSpec, dict[str, Tensor]]:
    """The network of the command line on its device, with its weights; what of them is pruned.

    `quiet`: nothing is trained, so nothing is said of zeros.
    """
    from pynq_kgrc.compress.masks import merged, zero_places
    from pynq_kgrc.compress.training import to_device
    from pynq_kgrc.compress.weights import check_pruned, load_notes
    from pynq_kgrc.models import find_network

    build, spec = find_network(options.network)
    network = build(len(videos.classes))
    pruned: dict[str, Tensor] = {}
    if options.weights:
        another = getattr(options, "classes", None) is not None
        partial = getattr(options, "partial", False)
        told = load_weights(options, network, False if partial else None if another else True)
        if not quiet:
            _say(told)
        notes = load_notes(weights_file(options.weights))
        pruned = merged(notes.pruned or {})
        check_pruned(options.weights, pruned, network)
        zeros = zero_places(network)
        if getattr(options, "keep_zeros", False):
            pruned = zeros
        elif notes.pruned is None and zeros and not quiet:
            shares = ", ".join(f"{n} {float(z.float().mean()):.1%}" for n, z in zeros.items())
            _say(
                f"{options.weights} does not say what is pruned, so its zeros learn ({shares} of "
                f"the weights are zero); --keep-zeros keeps them at zero"
            )
    to_device(network, getattr(options, "device", "cpu"))
    return network, spec, pruned


def _compile(graph: Graph, setup: TrainingSetup, design: AcceleratorConfig) -> Program:
    """The program of a float graph; its cycles do not depend on how ranges are chosen."""
    from pynq_kgrc.compiler.lower import lower
    from pynq_kgrc.compress.augment import calibration_clips
    from pynq_kgrc.compress.calibrate import choose_quant

    clips = calibration_clips(setup.clips, setup.spec, 1)
    return lower(choose_quant(graph, clips, design.bits, "minmax"), design)


def _recipe(
    options: argparse.Namespace,
    graph: Graph,
    design: AcceleratorConfig,
    compile_graph: Callable[[Graph], Program],
) -> tuple[dict[str, LayerRecipe], LatencySearch | None]:
    """The recipe of the command line: published, from a file, or searched."""
    from pynq_kgrc.compiler.latency import choose_rates_by_latency
    from pynq_kgrc.compress.patterns import PATTERNS
    from pynq_kgrc.compress.recipes import (
        choose_rates,
        published_recipe,
        read_recipe,
        sparsest_recipe,
    )

    if options.threshold is not None and (options.recipe or options.target == "latency"):
        raise ConfigError("--threshold finds the rates itself; it goes with --pattern alone")
    if options.recipe in (*PATTERNS, "blockwise"):
        return published_recipe(options.network, options.recipe), None
    if options.recipe:
        return read_recipe(options.recipe), None
    names = [layer.name for layer in graph.convolutions()]
    names = options.layers.split(",") if options.layers else names[1:-1]
    if options.threshold is not None:
        return sparsest_recipe(graph, names, options.pattern, design), None
    if options.target == "operations":
        return choose_rates(graph, names, options.pattern, options.reduction, design), None
    search = choose_rates_by_latency(
        graph, names, options.pattern, options.reduction, compile_graph
    )
    _say(str(search))
    return search.layers, search


def _settings(options: argparse.Namespace, default: T) -> T:
    """The settings file of the command line.

    Raises:
        ConfigError: as `read_config`; a file for another command is named as such.
    """
    from pynq_kgrc.compress.pruning import PruneConfig
    from pynq_kgrc.compress.training import TrainConfig, read_config

    if not options.config:
        return default
    own, prune = type(default), isinstance(default, PruneConfig)
    try:
        return read_config(options.config, own)
    except ConfigError as error:
        try:
            read_config(options.config, TrainConfig if prune else PruneConfig)
        except ConfigError:
            raise error from None
    theirs, more = (
        ("train and quantize", "; the settings of training go under [prepare] and [retrain]")
        if prune
        else ("prune", "")
    )
    raise ConfigError(
        f"{options.config} holds settings for {theirs}; this command takes a TOML file with the "
        f"fields {', '.join(own.__struct_fields__)}{more}"
    )


def _changed(config: TrainConfig, options: argparse.Namespace) -> TrainConfig:
    """The settings with --epochs and --seed, where they are given."""
    import msgspec

    given = {key: getattr(options, key) for key in ("epochs", "seed")}
    changes = {key: value for key, value in given.items() if value is not None}
    changed: TrainConfig = msgspec.structs.replace(config, **changes)
    return changed


def _keep(
    network: nn.Module,
    path: Path,
    setup: TrainingSetup,
    pruned: dict[str, Tensor],
    videos: VideoSet,
) -> None:
    """Save the weights, what is pruned and the classes; of several processes, the first does it."""
    from pynq_kgrc.compress.weights import save_weights

    if setup.share[0] == 0:
        save_weights(network, path, pruned, videos.classes)


def _clip_cache(options: argparse.Namespace) -> Path:
    from pynq_kgrc.files import user_cache

    return options.cache or user_cache() / "clips"


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _say_nothing(text: str) -> None:
    pass


def _watch(options: argparse.Namespace, quiet: bool) -> Callable[[EpochRecord], None]:
    """Passes each epoch's record to the terminal, and to TensorBoard with --tensorboard."""
    events: Any = None
    if options.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "--tensorboard needs the package tensorboard: pip install tensorboard"
            ) from error
        events = SummaryWriter(options.out / "events")

    def watch(record: EpochRecord) -> None:
        if not quiet:
            _print_record(record)
        for name in record.__struct_fields__[1:] if events is not None else ():
            if getattr(record, name) is not None:
                events.add_scalar(name, getattr(record, name), record.epoch)

    return watch


def _print_record(record: EpochRecord) -> None:
    measured = "" if record.test_top1 is None else f"  test {record.test_top1:6.1%}"
    print(
        f"epoch {record.epoch + 1:3}  loss {record.loss:.3f}  penalty {record.penalty:.3g}  "
        f"train {record.train_top1:6.1%}{measured}  {record.seconds:.0f} s"
    )


def _report(options: argparse.Namespace, found: dict[str, Any], file: str) -> int:
    """Print the results, as text or as JSON; of several processes, the first one prints."""
    if file:
        found["path"] = str(options.out / file)
    if int(os.environ.get("RANK", "0")) != 0:
        return 0
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for key, value in found.items():
        shown = f"{value:.1%}" if "top" in key and isinstance(value, float) else value
        print(f"{key.replace('_', ' ')}: {shown}")
    return 0
