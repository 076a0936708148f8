"""From a dense network to a pruned one: choose, prune, and train what is left.

One way through, several algorithms: what differs is how the network is prepared (not at all, by a
penalty, by ADMM) and what a weight is worth when the hard pruning comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn

from pynq_kgrc.compress.admm import Admm, pruning_projections
from pynq_kgrc.compress.importance import propagate_importance
from pynq_kgrc.compress.masks import chosen_weights
from pynq_kgrc.compress.patterns import project_pattern
from pynq_kgrc.compress.recipes import Algorithm, Recipe
from pynq_kgrc.compress.reweighted import GroupLasso, Norm, Reweighted
from pynq_kgrc.compress.training import Penalty, TrainConfig, TrainingSetup
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.graph import ConvShape, Graph
from pynq_kgrc.models.trace import trace
from pynq_kgrc.quant import Array

GENTLE = TrainConfig(epochs=20, lr=5e-4)


class PruneConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a network is pruned; a TOML file of these fields."""

    algorithm: Algorithm = "reweighted"
    incremental: bool = False
    """One layer after the other, each with its share of the epochs (KRP paper, figure 5)."""
    factor: float = 1e-2
    """lambda of lasso and reweighted."""
    norm: Norm = "l2"
    by_operations: bool = True
    """Layers are penalized in proportion to their operations."""
    updates: int = 4
    """Times the reweighting is made anew."""
    rho: float = 1e-2
    rounds: int = 3
    growth: float = 3.0
    prepare: TrainConfig = GENTLE
    """Training with the penalty; one-shot and heuristic have none."""
    retrain: TrainConfig = GENTLE
    """Training of what is left."""


def prune_network(
    module: nn.Module,
    recipe: Recipe,
    config: PruneConfig,
    setup: TrainingSetup,
    folder: Path,
    teacher: nn.Module | None = None,
) -> None:
    """Prune a trained network in place and train what is left.

    Each part of the way has its own folder, so that a run that was killed goes on where it was.

    Args:
        module: trained and dense.
        recipe: what is pruned of which layer.
        config: how.
        setup: clips to learn from and to measure on.
        folder: gets prepare/ and retrain/, of each layer where it is incremental.
        teacher: the dense network, for distillation in retraining.

    Raises:
        ConfigError: a layer that is not there, or a pattern that does not fit its weight.
        ModelError: the folder holds another run.
    """
    chosen_weights(module, list(recipe))  # refuses a wrong name before anything is trained
    if not recipe:
        raise ConfigError("the recipe prunes no layer")
    if not config.incremental:
        _prune_once(module, recipe, config, setup, folder, teacher)
        return
    order = list(recipe)
    shorter = msgspec.structs.replace(
        config,
        prepare=_shortened(config.prepare, len(order)),
        retrain=_shortened(config.retrain, len(order)),
    )
    for i, name in enumerate(order):
        part = {name: recipe[name]}
        _prune_once(module, part, shorter, setup, folder / f"{i:02}-{name}", teacher)


def _shortened(config: TrainConfig, parts: int) -> TrainConfig:
    return msgspec.structs.replace(config, epochs=max(1, config.epochs // parts))


def _prune_once(
    module: nn.Module,
    recipe: Recipe,
    config: PruneConfig,
    setup: TrainingSetup,
    folder: Path,
    teacher: nn.Module | None,
) -> None:
    scores: Mapping[str, Array] | None = None
    if config.algorithm == "heuristic":
        scores = propagate_importance(trace(module, setup.spec))
    elif config.algorithm != "one-shot":
        penalty = _penalty(module, recipe, config, setup)
        setup.train(module, config.prepare, folder / "prepare", penalty, note=f"{config}{recipe}")
    prune_weights(module, recipe, scores)
    setup.train(module, config.retrain, folder / "retrain", teacher=teacher)


def _penalty(
    module: nn.Module, recipe: Recipe, config: PruneConfig, setup: TrainingSetup
) -> Penalty:
    if config.algorithm == "admm":
        return Admm(module, pruning_projections(recipe), config.rho, config.rounds, config.growth)
    costs = layer_costs(trace(module, setup.spec)) if config.by_operations else None
    if config.algorithm == "lasso":
        return GroupLasso(module, recipe, config.factor, config.norm, costs)
    return Reweighted(module, recipe, config.factor, config.norm, costs, config.updates)


def prune_weights(
    module: nn.Module, recipe: Recipe, scores: Mapping[str, Array] | None = None
) -> None:
    """Hard pruning in place: every weight of the recipe onto its pattern.

    `scores` says what each weight is worth, by layer; its magnitude unless given.
    """
    with torch.no_grad():
        for name, weight in chosen_weights(module, list(recipe)).items():
            dense = weight.cpu().numpy()
            worth = None if scores is None else scores[name].reshape(dense.shape)
            pruned = project_pattern(dense, recipe[name], worth)
            weight.copy_(torch.from_numpy(np.ascontiguousarray(pruned)))


def layer_costs(graph: Graph) -> dict[str, float]:
    """MACs of each convolution of a graph, dense."""
    return {
        layer.name: float(layer.shape.macs)
        for layer in graph.convolutions()
        if isinstance(layer.shape, ConvShape)
    }
