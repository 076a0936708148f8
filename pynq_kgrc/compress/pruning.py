"""From a dense network to a pruned one: prepare, prune, retrain.

The algorithms differ in how the network is prepared (not at all, with a penalty, with ADMM) and in
the scores that decide which weights are pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from pynq_kgrc.compress.admm import Admm, pruning_projections
from pynq_kgrc.compress.importance import propagate_importance
from pynq_kgrc.compress.masks import Pruned, chosen_weights, merged
from pynq_kgrc.compress.patterns import keep_mask
from pynq_kgrc.compress.recipes import Algorithm, Recipe
from pynq_kgrc.compress.reweighted import GroupLasso, Norm, Reweighted
from pynq_kgrc.compress.training import Penalty, TrainConfig, TrainingSetup
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.graph import ConvShape, Graph
from pynq_kgrc.models.trace import trace
from pynq_kgrc.quant import Array

LOW_RATE = TrainConfig(epochs=20, lr=5e-4)
"""Default of both trainings: the network is trained already."""


class PruneConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a network is pruned; a TOML file of these fields."""

    algorithm: Algorithm = "reweighted"
    incremental: bool = False
    """Prune layer after layer, each with its share of the epochs (KRP paper, figure 5)."""
    factor: float = 1e-2
    """lambda of the algorithms lasso and reweighted."""
    norm: Norm = "l2"
    by_operations: bool = True
    """The penalty of a layer is proportional to its operations."""
    updates: int = 4
    """How many times the reweighting factors are computed."""
    rho: float = 1e-2
    """rho of ADMM in its first round."""
    rounds: int = 3
    growth: float = 3.0
    """Factor by which rho grows from round to round."""
    stop: float = 0.0
    """epsilon of ADMM's stopping rule, as a fraction of ||W|| (`Admm.settled`); 0: no rule."""
    prepare: TrainConfig = LOW_RATE
    """Training with the penalty; the algorithms one-shot and heuristic skip it."""
    retrain: TrainConfig = LOW_RATE
    """Training of the weights that are kept."""


def prune_network(
    module: nn.Module,
    recipe: Recipe,
    config: PruneConfig,
    setup: TrainingSetup,
    folder: Path,
    teacher: nn.Module | None = None,
    pruned: Pruned | None = None,
    find: Callable[[nn.Module], Recipe] | None = None,
) -> dict[str, Tensor]:
    """Prune a trained network in place, train what is kept, and return what is pruned.

    Each training has its own folder; a run that was killed resumes in the one it was in.

    Args:
        module: trained and dense.
        recipe: the pattern of each layer.
        config: algorithm and schedules.
        setup: training and test clips.
        folder: gets prepare/ and retrain/; with `incremental`, both for each layer.
        teacher: the dense network, for distillation in retraining.
        pruned: what was pruned before; it stays pruned.
        find: gives the rates after the preparation (RT3D's threshold); `recipe` then only says
            which units of which layers the penalty is for.

    Raises:
        ConfigError: an unknown layer, a pattern that does not fit its weight, or nothing to prune.
        ModelError: the folder holds another run.
    """
    chosen_weights(module, list(recipe))  # refuse a wrong name before training
    if not recipe:
        raise ConfigError("the recipe prunes no layer")
    found = merged(pruned or {})
    if not config.incremental:
        return _prune_once(module, recipe, config, setup, folder, teacher, found, find)
    order = list(recipe)
    shorter = msgspec.structs.replace(
        config,
        prepare=_shortened(config.prepare, len(order)),
        retrain=_shortened(config.retrain, len(order)),
    )
    for i, name in enumerate(order):
        part = {name: recipe[name]}
        part_folder = folder / f"{i:02}-{name}"
        setup.say(f"layer {i + 1} of {len(order)}: {name}")
        found = _prune_once(module, part, shorter, setup, part_folder, teacher, found, find)
    return found


def _shortened(config: TrainConfig, parts: int) -> TrainConfig:
    return msgspec.structs.replace(config, epochs=max(1, config.epochs // parts))


def _prune_once(
    module: nn.Module,
    recipe: Recipe,
    config: PruneConfig,
    setup: TrainingSetup,
    folder: Path,
    teacher: nn.Module | None,
    pruned: Pruned,
    find: Callable[[nn.Module], Recipe] | None,
) -> dict[str, Tensor]:
    scores: Mapping[str, Array] | None = None
    if config.algorithm == "heuristic":
        scores = propagate_importance(trace(module, setup.spec))
    elif config.algorithm != "one-shot":
        penalty = _penalty(module, recipe, config, setup)
        setup.say(
            f"preparation: epochs 1 to {config.prepare.epochs}, with the penalty of "
            f"{config.algorithm}; nothing more is pruned yet"
        )
        note = f"{config}{recipe}"
        setup.train(module, config.prepare, folder / "prepare", penalty, note=note, pruned=pruned)
    if find is not None:
        recipe = {name: pattern for name, pattern in find(module).items() if name in recipe}
    found = merged(pruned, prune_weights(module, recipe, scores))
    setup.say(f"retraining: epochs 1 to {config.retrain.epochs}, of the weights that are kept")
    setup.train(module, config.retrain, folder / "retrain", teacher=teacher, pruned=found)
    return found


def _penalty(
    module: nn.Module, recipe: Recipe, config: PruneConfig, setup: TrainingSetup
) -> Penalty:
    if config.algorithm == "admm":
        return Admm(
            module,
            pruning_projections(recipe),
            config.rho,
            config.rounds,
            config.growth,
            stop=config.stop,
        )
    costs = layer_costs(trace(module, setup.spec)) if config.by_operations else None
    if config.algorithm == "lasso":
        return GroupLasso(module, recipe, config.factor, config.norm, costs)
    return Reweighted(module, recipe, config.factor, config.norm, costs, config.updates)


def prune_weights(
    module: nn.Module, recipe: Recipe, scores: Mapping[str, Array] | None = None
) -> dict[str, Tensor]:
    """Hard pruning in place: project each weight of the recipe onto its pattern.

    `scores`, by layer, replace the magnitudes of the weights. Returns what is pruned, as
    `masks.Pruned`.
    """
    found = {}
    with torch.no_grad():
        for name, weight in chosen_weights(module, list(recipe)).items():
            dense = weight.cpu().numpy()
            layer_scores = None if scores is None else scores[name].reshape(dense.shape)
            places = torch.from_numpy(~keep_mask(dense, recipe[name], layer_scores))
            weight.masked_fill_(places.to(weight.device), 0.0)
            found[name] = places
    return found


def layer_costs(graph: Graph) -> dict[str, float]:
    """MACs of each convolution of a graph, zeros included."""
    return {
        layer.name: float(layer.shape.macs)
        for layer in graph.convolutions()
        if isinstance(layer.shape, ConvShape)
    }
