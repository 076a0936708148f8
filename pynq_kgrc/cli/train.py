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

from pynq_kgrc.cli.arguments import Declare, add_design, positive, progress
from pynq_kgrc.compress.recipes import ALGORITHMS, NAMES
from pynq_kgrc.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from pynq_kgrc.accelerator.config import AcceleratorConfig
    from pynq_kgrc.analysis.accuracy import LabelledClip
    from pynq_kgrc.compiler.latency import LatencySearch
    from pynq_kgrc.compress.dataset import VideoSet
    from pynq_kgrc.compress.recipes import LayerRecipe
    from pynq_kgrc.compress.training import EpochRecord, TrainConfig, TrainingSetup
    from pynq_kgrc.graph import ClipSpec, Graph
    from pynq_kgrc.program import Program

T = TypeVar("T")

WEIGHTS = "weights.safetensors"
RECIPE = "recipe.toml"

DATA = """\
DATA is a folder with an index.csv of the columns file, label (from 0) and split ("train" or
"test"). A column `class` gives the labels their names. Each video is decoded once, into --cache.
A run keeps its settings (config.toml), log (log.csv) and a checkpoint in its folder. A run that
was killed resumes when it is started again, and ends with the same weights, bit for bit."""


def declare(command: Declare) -> None:
    """Add this file's commands."""
    train = command(
        "train",
        run_train,
        "train a network on a folder of labelled videos",
        f"{DATA}\n\n"
        "Several processes or GPUs: torchrun --nproc-per-node N -m pynq_kgrc.cli train ...",
    )
    _learning(train, "folder of the run; gets weights.safetensors")
    train.add_argument(
        "--weights", help="state dict to start from (default: seeded random weights)"
    )
    _schedule(train)

    prune = command(
        "prune",
        run_prune,
        "prune a trained network and train what is left",
        f"{DATA}\n\n"
        "--recipe says what is pruned: kgr, kgc or kgrc for the paper's rates of the network, or\n"
        "a TOML file with lines such as\n\n"
        '  [layers]\n  conv2 = { pattern = "kgrc", rows = "1/2", cols = "2/3" }\n\n'
        "--pattern and --reduction search the rates instead: of those that satisfy eq. (9) of the\n"
        "paper, the ones that keep most of the weights while the cost falls by that factor. The\n"
        "cost is operations, or with --target latency the cycles of the whole compiled program on\n"
        "--design (modelled by accelerator/cost.py, without memory stalls).",
    )
    _learning(prune, "folder of the run; gets weights.safetensors and recipe.toml")
    prune.add_argument("--weights", required=True, help="state dict of the dense network")
    how = prune.add_mutually_exclusive_group(required=True)
    how.add_argument("--recipe", help="kgr, kgc, kgrc, or a TOML file")
    how.add_argument("--pattern", help=", ".join(NAMES))
    prune.add_argument(
        "--reduction", type=float, default=3.0, help="factor by which the cost falls (default: 3)"
    )
    prune.add_argument(
        "--target", choices=("operations", "latency"), default="operations",
        help="the cost that --reduction divides (default: operations)",
    )  # fmt: skip
    prune.add_argument(
        "--layers", help="comma-separated (default: all convolutions but the first and the last)"
    )
    add_design(prune, "the accelerator whose groups and cycles count", "--accelerator")
    prune.add_argument("--algorithm", choices=ALGORITHMS, help="overrides the settings")
    _schedule(prune, "settings of pruning, a TOML file; [prepare] and [retrain] set the training")

    quantize = command(
        "quantize",
        run_quantize,
        "quantize a network to the width of a design, and compile it",
        f"{DATA}\n\n"
        "The ranges of all tensors are chosen on clips of the training set. Then weights, biases\n"
        "and scales are trained with the accelerator's integer arithmetic in the forward pass\n"
        "(quantization-aware training); pruned weights stay zero. --epochs 0 trains nothing\n"
        "(post-training quantization).",
    )
    _learning(quantize, "folder of the run; gets program.kgrc")
    quantize.add_argument("--weights", required=True, help="state dict, pruned or dense")
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
    _schedule(quantize)

    evaluate = command(
        "evaluate",
        run_evaluate,
        "measure the accuracy of a program or of a float network",
        "--program runs on a backend, bit for bit as on the accelerator; videos are sampled as\n"
        "the program says. --network and --weights name a float network, which runs in torch;\n"
        "of each video it gets one clip that is spread over all of it, as in training.",
    )
    evaluate.add_argument("--data", type=Path, required=True, help="folder with index.csv")
    evaluate.add_argument("-p", "--program", type=Path, help="a compiled .kgrc")
    evaluate.add_argument(
        "--backend", default="emulate", help="what runs the program (default: emulate)"
    )
    evaluate.add_argument("--network", help="a float network, instead of a program")
    evaluate.add_argument("--weights", help="its state dict")
    evaluate.add_argument("--split", default="test", help="which clips (default: test)")
    _cache(evaluate)


def _learning(command: argparse.ArgumentParser, out: str) -> None:
    command.add_argument("network", metavar="NETWORK", help="as for pynq-kgrc compile")
    command.add_argument("--data", type=Path, required=True, help="folder with index.csv")
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


def _schedule(command: argparse.ArgumentParser, text: str = "settings, a TOML file") -> None:
    command.add_argument("--config", type=Path, help=f"{text} (default: built-in settings)")
    command.add_argument("--epochs", type=int, help="overrides the settings")
    command.add_argument("--seed", type=int, help="overrides the settings")


# ---- commands -------------------------------------------------------------------------------


def run_train(options: argparse.Namespace) -> int:
    import torch

    from pynq_kgrc.compress.training import TrainConfig

    config = _changed(_settings(options, TrainConfig()), options)
    setup, videos = _setup(options)
    torch.manual_seed(config.seed)
    network, _ = _network(options, len(videos.classes))
    records = setup.train(network, config, options.out)
    _keep(network, options.out / WEIGHTS, setup)
    return _report(options, {"epochs": len(records), "test_top1": records[-1].test_top1}, WEIGHTS)


def run_prune(options: argparse.Namespace) -> int:
    import copy

    import msgspec

    from pynq_kgrc.accelerator.config import read_design
    from pynq_kgrc.compiler.latency import program_cycles
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
    network, spec = _network(options, len(videos.classes))
    compile_graph = partial(_compile, setup=setup, design=design)
    graph = trace(network, spec, name=options.network)
    layers, search = _recipe(options, graph, design, compile_graph)
    recipe = build_patterns(layers, design)
    write_recipe(layers, options.out / RECIPE)
    teacher = copy.deepcopy(network)
    prune_network(network, recipe, config, setup, options.out, teacher)
    _keep(network, options.out / WEIGHTS, setup)
    pruned = trace(network.cpu(), spec, name=options.network)
    macs_dense, macs_kept = kept_operations(pruned)
    found: dict[str, Any] = {
        "macs_dense": macs_dense,
        "macs_kept": macs_kept,
        "reduction": round(macs_dense / macs_kept, 3),
        "test_top1": measure_top1(network, setup.test, spec),
        "test_top1_dense": measure_top1(teacher, setup.test, spec),
    }
    if search is not None:
        cycles = program_cycles(compile_graph(pruned))
        found |= {
            "design": design.name,
            "modelled_cycles_dense": search.dense_cycles,
            "modelled_cycles": cycles,
            "latency_reduction_asked": search.asked,
            "latency_reduction": round(search.dense_cycles / cycles, 3),
        }
    return _report(options, found, WEIGHTS)


def run_quantize(options: argparse.Namespace) -> int:
    import copy
    from dataclasses import replace

    import msgspec

    from pynq_kgrc.accelerator.config import read_design
    from pynq_kgrc.analysis.accuracy import measure_accuracy
    from pynq_kgrc.compiler.lower import lower
    from pynq_kgrc.compress.augment import calibration_clips
    from pynq_kgrc.compress.calibrate import DEFAULT_METHOD, choose_quant
    from pynq_kgrc.compress.train_quantized import QUANTIZE, approach_codes, train_quantized
    from pynq_kgrc.graph import TRAINING_SAMPLING
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
    network, spec = _network(options, len(videos.classes))
    teacher = copy.deepcopy(network)
    if options.admm:
        settings = msgspec.structs.replace(config, epochs=options.admm)
        approach_codes(network, design.bits, settings, setup, options.out / "admm", teacher)
    spec = replace(spec, sampling=TRAINING_SAMPLING)
    graph = trace(network.cpu(), spec, videos.classes, options.network)
    few = calibration_clips(setup.clips, spec)
    graph = choose_quant(graph, few, design.bits, options.method or DEFAULT_METHOD)
    if trains:
        graph = train_quantized(
            graph, config, setup, options.out, teacher, options.device, options.powers
        )
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
    return _report(options, found, path.name)


def run_evaluate(options: argparse.Namespace) -> int:
    from pynq_kgrc.compress.dataset import read_index

    if (options.program is None) == (options.network is None):
        raise ConfigError("evaluate takes either --program or --network")
    videos = read_index(options.data).only(options.split)
    run = _evaluate_network if options.program is None else _evaluate_program
    return _report(options, run(options, videos), "")


def _evaluate_program(options: argparse.Namespace, videos: VideoSet) -> dict[str, Any]:
    from pynq_kgrc.analysis.accuracy import measure_accuracy
    from pynq_kgrc.compress.dataset import load_clips, video_windows
    from pynq_kgrc.program import load

    program = load(options.program)
    clips: Iterable[LabelledClip]
    if program.clip.sampling == "windows":  # not cached: there may be many of a video
        clips = video_windows(videos, program.clip)
    else:
        clips = load_clips(
            videos, program.clip, _clip_cache(options), program.clip.sampling, say=_say
        )
    count = len(videos.samples)
    accuracy = measure_accuracy(
        program, clips, options.backend, lambda c: progress(c, "evaluate", count)
    )
    found: dict[str, Any] = {
        "program": program.name,
        "backend": options.backend,
        "clips": accuracy.clips,
        "top1": accuracy.top1,
        "top5": accuracy.top5,
    }
    if options.json:
        found["confusion"] = accuracy.confusion.tolist()
    return found


def _evaluate_network(options: argparse.Namespace, videos: VideoSet) -> dict[str, Any]:
    from pynq_kgrc.compress.dataset import load_clips
    from pynq_kgrc.compress.training import measure_top

    network, spec = _network(options, len(videos.classes))
    clips = load_clips(videos, spec, _clip_cache(options), say=_say)
    top1, top5 = measure_top(network, clips, spec, (1, 5))
    return {"network": options.network, "clips": len(clips), "top1": top1, "top5": top5}


# ---- shared by the commands -----------------------------------------------------------------


def _setup(options: argparse.Namespace) -> tuple[TrainingSetup, VideoSet]:
    """The decoded clips of the data folder, and this process's share of the work."""
    from pynq_kgrc.compress.augment import wide_spec
    from pynq_kgrc.compress.dataset import load_clips, read_index
    from pynq_kgrc.compress.training import TrainingSetup, join_processes
    from pynq_kgrc.models import find_network

    videos = read_index(options.data)
    _, spec = find_network(options.network)
    cache = _clip_cache(options)
    share = join_processes(options.device)
    clips = load_clips(videos.only("train"), wide_spec(spec), cache, say=_say)
    test = load_clips(videos.only("test"), spec, cache, say=_say)
    quiet = options.json or share[0] != 0
    return TrainingSetup(clips, test, spec, progress, _watch(options, quiet), share), videos


def _network(options: argparse.Namespace, classes: int) -> tuple[nn.Module, ClipSpec]:
    """The network of the command line on its device, with its weights."""
    from pynq_kgrc.compress.training import to_device
    from pynq_kgrc.models import find_network
    from pynq_kgrc.models.checkpoint import load_state

    build, spec = find_network(options.network)
    network = build(classes)
    if options.weights:
        load_state(network, Path(options.weights))
    to_device(network, getattr(options, "device", "cpu"))
    return network, spec


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
    from pynq_kgrc.compress.recipes import choose_rates, published_recipe, read_recipe

    if options.recipe in PATTERNS:
        return published_recipe(options.network, options.recipe), None
    if options.recipe:
        return read_recipe(options.recipe), None
    names = [layer.name for layer in graph.convolutions()]
    names = options.layers.split(",") if options.layers else names[1:-1]
    if options.target == "operations":
        return choose_rates(graph, names, options.pattern, options.reduction, design), None
    search = choose_rates_by_latency(
        graph, names, options.pattern, options.reduction, compile_graph
    )
    _say(str(search))
    return search.layers, search


def _settings(options: argparse.Namespace, default: T) -> T:
    """The settings file of the command line."""
    from pynq_kgrc.compress.training import read_config

    return read_config(options.config, type(default)) if options.config else default


def _changed(config: TrainConfig, options: argparse.Namespace) -> TrainConfig:
    """The settings with --epochs and --seed, where they are given."""
    import msgspec

    given = {key: getattr(options, key) for key in ("epochs", "seed")}
    changes = {key: value for key, value in given.items() if value is not None}
    changed: TrainConfig = msgspec.structs.replace(config, **changes)
    return changed


def _keep(network: nn.Module, path: Path, setup: TrainingSetup) -> None:
    """Save the weights; of several processes, the first one does."""
    from pynq_kgrc.models.checkpoint import save_state

    if setup.share[0] == 0:
        save_state(network, path)


def _clip_cache(options: argparse.Namespace) -> Path:
    from pynq_kgrc.places import user_cache

    return options.cache or user_cache() / "clips"


def _say(text: str) -> None:
    print(text, file=sys.stderr)


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
