"""Commands of training: train, prune, quantize and evaluate."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pynq_kgrc.cli.arguments import Declare, positive, progress
from pynq_kgrc.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from pynq_kgrc.accelerator.config import AcceleratorConfig
    from pynq_kgrc.compress.dataset import Clips, VideoSet
    from pynq_kgrc.compress.pruning import Ground
    from pynq_kgrc.compress.recipes import Recipe
    from pynq_kgrc.compress.training import Row, TrainConfig
    from pynq_kgrc.graph import ClipSpec

T = TypeVar("T")

ALGORITHMS = ("one-shot", "heuristic", "lasso", "reweighted", "admm")
"""As `compress.pruning.ALGORITHMS`; written here so that --help wakes no torch."""

WEIGHTS = "weights.safetensors"
RECIPE = "recipe.toml"

DATA = """\
DATA is a folder with an index.csv of columns file, label (from 0) and split ("train" or "test");
a column `class` names the labels. Videos are decoded once, into --cache. A run keeps its settings
(config.toml), log (log.csv) and a checkpoint in its folder; started again, it goes on where it was
killed and ends with the same bits."""


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
    train.add_argument("--weights", help="state dict to start from; seeded random without")
    _schedule(train)

    prune = command(
        "prune",
        run_prune,
        "prune a trained network and train what is left",
        f"{DATA}\n\n"
        "What goes is told by --recipe: kgr, kgc or kgrc for the paper's rates of the network, or\n"
        "a TOML file with lines such as\n\n"
        '  [layers]\n  conv2 = { pattern = "kgrc", rows = "1/2", cols = "2/3" }\n\n'
        "Or by --pattern and --reduction: the rates that keep most of the weights\n"
        "while operations fall that many times, of those that satisfy eq. (9) of the paper.",
    )
    _learning(prune, "folder of the run; gets weights.safetensors and recipe.toml")
    prune.add_argument("--weights", required=True, help="state dict of the dense network")
    how = prune.add_mutually_exclusive_group(required=True)
    how.add_argument("--recipe", help="kgr, kgc, kgrc, or a TOML file")
    how.add_argument("--pattern", help="kgr, kgc, kgrc, vanilla, blockwise, filter, krp")
    prune.add_argument(
        "--reduction", type=float, default=3.0, help="times fewer operations (default: 3)"
    )
    prune.add_argument(
        "--target", choices=("operations", "latency"), default="operations",
        help="what --reduction counts: operations, or modelled cycles of --accelerator",
    )  # fmt: skip
    prune.add_argument(
        "--layers", help="comma-separated; all convolutions but the first and last without"
    )
    prune.add_argument("--accelerator", default="8-sparse", help="design (default: 8-sparse)")
    prune.add_argument("--algorithm", choices=ALGORITHMS, help="instead of the settings'")
    _schedule(prune, "settings of pruning, a TOML file; [prepare] and [retrain] are of training")

    quantize = command(
        "quantize",
        run_quantize,
        "train a network at the accelerator's width, and compile it",
        f"{DATA}\n\n"
        "Formats are chosen on clips of the training set; then weights, biases and scales are\n"
        "trained with the accelerator's own arithmetic in the forward pass, zeros staying zeros.\n"
        "With --epochs 0 nothing is trained: quantization after training.",
    )
    _learning(quantize, "folder of the run; gets program.kgrc")
    quantize.add_argument("--weights", required=True, help="state dict, pruned or dense")
    quantize.add_argument("--accelerator", default="8-sparse", help="design (default: 8-sparse)")
    quantize.add_argument("--method", default=None, help="ranges: minmax, percentile or mse")
    quantize.add_argument(
        "--admm", type=positive, metavar="EPOCHS",
        help="first draw the float weights towards codes by ADMM, width after width",
    )  # fmt: skip
    quantize.add_argument(
        "--powers", action="store_true",
        help="weights of 0 and powers of two, quantized in groups: 3 bits on a 4-bit design, "
        "4 bits on an 8-bit one",
    )  # fmt: skip
    _schedule(quantize)

    evaluate = command(
        "evaluate",
        run_evaluate,
        "count how often a program, or a float network, is right",
        "A program runs on a backend, bit for bit as on the accelerator. A float network is named\n"
        "with --network and --weights.",
    )
    evaluate.add_argument("--data", type=Path, required=True, help="folder with index.csv")
    evaluate.add_argument("-p", "--program", type=Path, help="a compiled .kgrc")
    evaluate.add_argument("--backend", default="emulate", help="what runs it (default: emulate)")
    evaluate.add_argument("--network", help="a float network instead")
    evaluate.add_argument("--weights", help="its state dict")
    evaluate.add_argument("--split", default="test", help="which clips (default: test)")
    _cache(evaluate)


def _learning(command: argparse.ArgumentParser, out: str) -> None:
    command.add_argument("network", metavar="NETWORK", help="as for pynq-kgrc compile")
    command.add_argument("--data", type=Path, required=True, help="folder with index.csv")
    command.add_argument("-o", "--out", type=Path, required=True, help=out)
    command.add_argument(
        "--tensorboard", action="store_true", help="write its events too, where it is installed"
    )
    command.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    _cache(command)


def _cache(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cache", type=Path, default=None,
        help="folder of decoded clips (default: clips in the user's cache of pynq_kgrc)",
    )  # fmt: skip


def _schedule(command: argparse.ArgumentParser, text: str = "settings, a TOML file") -> None:
    command.add_argument("--config", type=Path, help=f"{text}; defaults without")
    command.add_argument("--epochs", type=int, help="instead of the settings'")
    command.add_argument("--seed", type=int, help="instead of the settings'")


# ---- commands -------------------------------------------------------------------------------


def run_train(options: argparse.Namespace) -> int:
    import torch

    from pynq_kgrc.compress.training import TrainConfig

    config = _changed(_settings(options, TrainConfig()), options)
    ground, videos = _ground(options)
    torch.manual_seed(config.seed)
    network, _ = _network(options, len(videos.classes))
    rows = ground.train(network, config, options.out)
    _keep(network, options.out / WEIGHTS, ground)
    return _report(options, {"epochs": len(rows), "test_top1": rows[-1].test_top1}, WEIGHTS)


def run_prune(options: argparse.Namespace) -> int:
    import copy

    import msgspec

    from pynq_kgrc.accelerator.config import preset
    from pynq_kgrc.compress.patterns import kept_operations
    from pynq_kgrc.compress.pruning import PruneConfig, prune_network
    from pynq_kgrc.compress.training import measure_top1
    from pynq_kgrc.models.trace import trace

    config = _settings(options, PruneConfig())
    if options.algorithm:
        config = msgspec.structs.replace(config, algorithm=options.algorithm)
    config = msgspec.structs.replace(
        config,
        prepare=_changed(config.prepare, options),
        retrain=_changed(config.retrain, options),
    )
    ground, videos = _ground(options)
    network, spec = _network(options, len(videos.classes))
    recipe = _recipe(options, network, spec, preset(options.accelerator))
    teacher = copy.deepcopy(network)
    prune_network(network, recipe, config, ground, options.out, teacher)
    _keep(network, options.out / WEIGHTS, ground)
    dense, kept = kept_operations(trace(network.cpu(), spec))
    found = {
        "macs_dense": dense,
        "macs_kept": kept,
        "reduction": round(dense / kept, 3),
        "test_top1": measure_top1(network, ground.test, spec),
        "test_top1_dense": measure_top1(teacher, ground.test, spec),
    }
    return _report(options, found, WEIGHTS)


def run_quantize(options: argparse.Namespace) -> int:
    import copy

    import msgspec

    from pynq_kgrc.accelerator.config import preset
    from pynq_kgrc.analysis.accuracy import measure_accuracy
    from pynq_kgrc.compiler.lower import lower
    from pynq_kgrc.compress.calibrate import DEFAULT_METHOD, choose_quant
    from pynq_kgrc.compress.train_quantized import QUANTIZE, approach_codes, train_quantized
    from pynq_kgrc.models.trace import trace

    accelerator = preset(options.accelerator)
    config = _changed(_settings(options, QUANTIZE), options)
    ground, videos = _ground(options)
    network, spec = _network(options, len(videos.classes))
    teacher = copy.deepcopy(network)
    if options.admm:
        settings = msgspec.structs.replace(config, epochs=options.admm)
        approach_codes(network, accelerator.bits, settings, ground, options.out / "admm", teacher)
    graph = trace(network.cpu(), spec, videos.classes, options.network)
    few = _calibration(ground.clips, spec)
    graph = choose_quant(graph, few, accelerator.bits, options.method or DEFAULT_METHOD)
    if options.epochs != 0:
        graph = train_quantized(
            graph, config, ground, options.out, teacher, options.device, options.powers
        )
    elif options.powers:
        raise ConfigError("--powers quantizes in training; --epochs has to be 1 or more")
    program = lower(graph, accelerator)
    path = options.out / "program.kgrc"
    program.save(path)
    clips = list(progress(ground.test, "emulate", len(ground.test)))
    accuracy = measure_accuracy(program, clips)
    found = {
        "bits": accelerator.bits,
        "emulated_top1": accuracy.top1,
        "emulated_top5": accuracy.top5,
        "clips": accuracy.clips,
        "bytes": path.stat().st_size,
    }
    return _report(options, found, path.name)


def run_evaluate(options: argparse.Namespace) -> int:
    from pynq_kgrc.analysis.accuracy import measure_accuracy
    from pynq_kgrc.compress.dataset import load_clips, read_index
    from pynq_kgrc.program import load

    if (options.program is None) == (options.network is None):
        raise ConfigError("evaluate takes either --program or --network")
    videos = read_index(options.data).only(options.split)
    cache = options.cache or _clip_cache()
    if options.program is not None:
        program = load(options.program)
        clips = load_clips(videos, program.clip, cache, say=_say)
        accuracy = measure_accuracy(
            program, clips, options.backend, lambda c: progress(c, "evaluate", len(clips))
        )
        found = {
            "program": program.name,
            "backend": options.backend,
            "clips": accuracy.clips,
            "top1": accuracy.top1,
            "top5": accuracy.top5,
        }
        if options.json:
            found["confusion"] = accuracy.confusion.tolist()
        return _report(options, found, "")
    from pynq_kgrc.compress.training import predict

    network, spec = _network(options, len(videos.classes))
    clips = load_clips(videos, spec, cache, say=_say)
    order = (-predict(network, clips, spec)).argsort(dim=1, stable=True).numpy()
    right = order[:, :5] == clips.labels[:, None]
    found = {
        "network": options.network,
        "clips": len(clips),
        "top1": float(right[:, 0].mean()),
        "top5": float(right.any(axis=1).mean()),
    }
    return _report(options, found, "")


# ---- what they share ------------------------------------------------------------------------


def _ground(options: argparse.Namespace) -> tuple[Ground, VideoSet]:
    """The clips of the data folder, decoded, and this process's share of the work."""
    from pynq_kgrc.compress.augment import wide_spec
    from pynq_kgrc.compress.dataset import load_clips, read_index
    from pynq_kgrc.compress.pruning import Ground
    from pynq_kgrc.models import find_network

    videos = read_index(options.data)
    _, spec = find_network(options.network)
    cache = options.cache or _clip_cache()
    share = _join(options.device)
    clips = load_clips(videos.only("train"), wide_spec(spec), cache, say=_say)
    test = load_clips(videos.only("test"), spec, cache, say=_say)
    quiet = options.json or share[0] != 0
    watch = _watch(options, quiet)
    return Ground(clips, test, spec, progress, watch, share), videos


def _join(device: str) -> tuple[int, int]:
    """Rank and number of processes; several ones meet here under torchrun."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    import torch.distributed

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.distributed.get_rank(), world


def _network(options: argparse.Namespace, classes: int) -> tuple[nn.Module, ClipSpec]:
    """The network of the command line on its device, with its weights."""
    import torch

    from pynq_kgrc.models import find_network
    from pynq_kgrc.models.checkpoint import load_state

    build, spec = find_network(options.network)
    network = build(classes)
    if options.weights:
        load_state(network, Path(options.weights))
    device = getattr(options, "device", "cpu")
    try:
        if device == "cuda" and "LOCAL_RANK" in os.environ:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        network.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} is not there ({error}); use cpu") from error
    return network, spec


def _recipe(
    options: argparse.Namespace, network: nn.Module, spec: ClipSpec, config: AcceleratorConfig
) -> Recipe:
    """The recipe of the command line, kept in the run's folder."""
    from pynq_kgrc.compress.patterns import PATTERNS, recipe
    from pynq_kgrc.compress.recipes import (
        Entry,
        build_patterns,
        choose_rates,
        modelled_cycles,
        operations,
        read_entries,
        write_recipe,
    )
    from pynq_kgrc.models.trace import trace

    if options.recipe in PATTERNS:
        # thin networks bear the layers of the ones that the paper has rates for
        known = {"thin_c3d": "c3d"}.get(options.network, options.network)
        rates = recipe(known, options.recipe)
        entries = {n: Entry(options.recipe, str(r.rows), str(r.cols)) for n, r in rates.items()}
    elif options.recipe:
        entries = read_entries(options.recipe)
    else:
        graph = trace(network, spec)
        names = [layer.name for layer in graph.convolutions()]
        chosen = options.layers.split(",") if options.layers else names[1:-1]
        cost = modelled_cycles(config) if options.target == "latency" else operations
        entries = choose_rates(graph, chosen, options.pattern, options.reduction, config, cost)
    patterns = build_patterns(entries, config)
    write_recipe(entries, options.out / RECIPE)
    return patterns


def _settings(options: argparse.Namespace, default: T) -> T:
    """The settings file of the command line."""
    from pynq_kgrc.compress.training import read_config

    return read_config(options.config, type(default)) if options.config else default


def _changed(config: TrainConfig, options: argparse.Namespace) -> TrainConfig:
    """The settings with what the command line says instead."""
    import msgspec

    given = {key: getattr(options, key) for key in ("epochs", "seed")}
    changes = {key: value for key, value in given.items() if value}
    changed: TrainConfig = msgspec.structs.replace(config, **changes)
    return changed


def _calibration(clips: Clips, spec: ClipSpec, count: int = 32) -> Any:
    """Some training clips as the network sees them, without variation."""
    import torch

    from pynq_kgrc.compress.augment import PLAIN, varied_batches

    size = min(count, len(clips))
    batches = varied_batches(clips, spec, PLAIN, size, torch.Generator().manual_seed(0))
    values, _ = next(iter(batches))
    return [clip.numpy() for clip in values]


def _keep(network: nn.Module, path: Path, ground: Ground) -> None:
    """The weights as a safetensors file, written by one process."""
    from safetensors.torch import save_file

    from pynq_kgrc.storage import written_beside

    if ground.share[0] == 0:
        state = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
        with written_beside(path) as beside:
            save_file(state, beside)


def _clip_cache() -> Path:
    from pynq_kgrc.places import user_cache

    return user_cache() / "clips"


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _watch(options: argparse.Namespace, quiet: bool) -> Callable[[Row], None]:
    """What sees every row of a log: the terminal, and TensorBoard if asked for."""
    events: Any = None
    if options.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("--tensorboard needs it: pip install tensorboard") from error
        events = SummaryWriter(options.out / "events")

    def watch(row: Row) -> None:
        if not quiet:
            _print_row(row)
        for name in row.__struct_fields__[1:] if events is not None else ():
            if getattr(row, name) is not None:
                events.add_scalar(name, getattr(row, name), row.epoch)

    return watch


def _print_row(row: Row) -> None:
    measured = "" if row.test_top1 is None else f"  test {row.test_top1:6.1%}"
    print(
        f"epoch {row.epoch + 1:3}  loss {row.loss:.3f}  penalty {row.penalty:.3g}  "
        f"train {row.train_top1:6.1%}{measured}  {row.seconds:.0f} s"
    )


def _report(options: argparse.Namespace, found: dict[str, Any], file: str) -> int:
    """Print what was found, for a person or for a script."""
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
