"""Importance of weights: scores propagated from the logits backwards, and tuned thresholds.

RT3D's heuristic algorithm scores kernel groups by the importance of the layers that read them.
The depthwise-separable paper tunes one threshold for each layer after training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from pynq_kgrc.errors import ConfigError
from pynq_kgrc.graph import ADD, CONCAT, CONV, Graph
from pynq_kgrc.quant import Array


def propagate_importance(graph: Graph) -> dict[str, Array]:
    """The importance of each weight, by convolution, shaped as the weight.

    Each output of the network has importance 1. The importance of a channel is the sum, over the
    filters that read it, of the filter's importance times the sum of |w| that connects the two.
    The importance of a weight is |w| times that of its filter. Values compare within a layer only.
    """
    importance = {layer.name: np.zeros(layer.channels) for layer in graph.layers}
    importance[graph.output] += 1.0
    scores = {}
    for layer in reversed(graph.layers):
        own = importance[layer.name]
        own = own / max(float(own.mean()), 1e-30)
        if layer.op == CONV:
            assert layer.weight is not None
            size = np.abs(layer.weight.astype(np.float64))
            scores[layer.name] = size * own[:, None, None, None, None]
            importance[layer.inputs[0]] += scores[layer.name].sum(axis=(0, 2, 3, 4))
        elif layer.op == CONCAT:
            start = 0
            for name in layer.inputs:
                count = graph[name].channels
                importance[name] += own[start : start + count]
                start += count
        else:
            for name in layer.inputs if layer.op == ADD else layer.inputs[:1]:
                importance[name] += own
    return scores


SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def tune_thresholds(
    graph: Graph,
    measure: Callable[[Graph], float],
    drop: float,
    names: Iterable[str],
    sparsities: Iterable[float] = SPARSITIES,
) -> tuple[Graph, dict[str, float]]:
    """Set small weights to zero, layer by layer, within a loss of accuracy. Nothing is trained.

    The layers with most operations come first. Each takes the largest threshold Th_l at which
    `measure` stays within its share of `drop`; the shares are equal, so that the first layers do
    not use it up (depthwise-separable paper, section 5).

    Args:
        graph: trained; not changed.
        measure: accuracy of a graph, 0 to 1.
        drop: accuracy that may be lost in all.
        names: layers that may be pruned.
        sparsities: fractions of a layer's weights to prune, in rising order.

    Returns:
        The pruned graph, and the threshold of each layer that got one.

    Raises:
        ConfigError: a drop outside 0 to below 1.
    """
    if not 0 <= drop < 1:
        raise ConfigError(f"a drop of {drop}; accepted is 0 to below 1, as 0.01 for one point")
    wanted = set(names)
    layers = [layer for layer in graph.convolutions() if layer.name in wanted]
    layers.sort(key=lambda layer: -getattr(layer.shape, "macs", 0))
    floor, thresholds = measure(graph), {}
    for layer in layers:
        floor -= drop / len(layers)
        weight = layer.weight
        assert weight is not None
        for sparsity in sparsities:
            threshold = float(np.quantile(np.abs(weight), sparsity))
            small = np.abs(weight) < threshold
            attempt = graph.with_weights({layer.name: np.where(small, np.float32(0), weight)})
            if measure(attempt) < floor:
                break
            best = attempt
            thresholds[layer.name] = threshold
        if layer.name in thresholds:
            graph = best
    return graph, thresholds
