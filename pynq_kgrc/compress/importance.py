"""Which weights matter to the result: scores passed back through the network, and thresholds.

RT3D's heuristic algorithm scores kernel groups by the importance of what they feed, passed back
from the next layer; the depthwise-separable paper tunes one threshold a layer after training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from pynq_kgrc.graph import ADD, CONCAT, CONV, Graph
from pynq_kgrc.quant import Array


def propagate_importance(graph: Graph) -> dict[str, Array]:
    """For each convolution what each of its weights is worth, as an array like the weight.

    The outputs of the network are worth 1 each. A channel is worth what the layers that read it
    make of it: the sum over their filters of the filter's worth times the sum of |w| that connects
    the two. A weight is worth |w| times its filter's worth. Values are relative within a layer.
    """
    worth = {layer.name: np.zeros(layer.channels) for layer in graph.layers}
    worth[graph.output] += 1.0
    scores = {}
    for layer in reversed(graph.layers):
        own = worth[layer.name]
        own = own / max(float(own.mean()), 1e-30)
        if layer.op == CONV:
            assert layer.weight is not None
            size = np.abs(layer.weight.astype(np.float64))
            scores[layer.name] = size * own[:, None, None, None, None]
            worth[layer.inputs[0]] += scores[layer.name].sum(axis=(0, 2, 3, 4))
        elif layer.op == CONCAT:
            start = 0
            for name in layer.inputs:
                count = graph[name].channels
                worth[name] += own[start : start + count]
                start += count
        else:
            for name in layer.inputs if layer.op == ADD else layer.inputs[:1]:
                worth[name] += own
    return scores


SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def tune_thresholds(
    graph: Graph,
    measure: Callable[[Graph], float],
    drop: float,
    names: Iterable[str],
    sparsities: Iterable[float] = SPARSITIES,
) -> tuple[Graph, dict[str, float]]:
    """Set small weights to zero, layer by layer, as long as accuracy allows; nothing is trained.

    Layers with most operations come first; each takes the largest threshold Th_l with which
    `measure` stays within its share of `drop`, so that the first ones do not use all of it
    (depthwise-separable paper, section 5).

    Args:
        graph: trained; not changed.
        measure: accuracy of a graph, 0 to 1.
        drop: how much of it may be lost in all.
        names: layers that may be pruned.
        sparsities: fractions of a layer's weights to try, in rising order.

    Returns:
        The pruned graph, and the threshold of each layer that got one.
    """
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
