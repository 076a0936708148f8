"""Sparsity patterns as projections: set the least of a weight to zero, balanced over its groups.

KGR prunes rows (filters) of each kernel group, KGC columns (taps), KGRC both (KGRC paper, section
III). A projection returns a weight of the same shape whose zeros are the pattern; no mask is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pynq_kgrc.errors import ConfigError
from pynq_kgrc.graph import Graph
from pynq_kgrc.groups import GroupSize, join, split
from pynq_kgrc.quant import Array

DEFAULT_GROUP = GroupSize(gm=8, gn=8, tk=9)


@dataclass(frozen=True)
class Rates:
    """What is pruned of each kernel group: R_R of its rows and R_C of its columns.

    >>> Rates(rows=Fraction(1, 2)).kept(GroupSize(8, 8, 9), taps=27)
    (4, 9)
    """

    rows: Fraction = Fraction(0)
    cols: Fraction = Fraction(0)

    def kept(self, size: GroupSize, taps: int) -> tuple[int, int]:
        """Rows and columns that a group keeps.

        Raises:
            ConfigError: a rate outside [0, 1), or that does not give whole rows and columns.
        """
        kept = []
        for what, rate, count in (
            ("rows", self.rows, size.gm),
            ("columns", self.cols, size.columns(taps)),
        ):
            rest = (1 - Fraction(rate)) * count
            if not 0 <= rate < 1 or rest.denominator != 1:
                choices = ", ".join(str(Fraction(i, count)) for i in range(min(count, 9)))
                raise ConfigError(
                    f"a rate of {rate} does not prune whole {what} of {count}; use {choices}"
                )
            kept.append(int(rest))
        return kept[0], kept[1]


def project(
    weight: Array, rates: Rates, size: GroupSize = DEFAULT_GROUP, share_columns: bool = True
) -> Array:
    """The weight [M, N, kd, kh, kw] with the weakest rows and columns of each group at zero.

    Strength is the L2 norm, of a row over its channels and taps and of a column over its kernels;
    both are judged on the same weights, and both prunings apply (KGRC paper, section III-B).

    Args:
        weight: any float or integer type; not changed.
        rates: R_R and R_C.
        size: G_M, G_N, T_K.
        share_columns: let all tap tiles of a kernel keep the same columns, as the paper's
            3x3x3 kernels do; only where the tiles divide the kernel evenly.

    Raises:
        ConfigError: rates that do not give whole rows and columns.
    """
    filters, channels, *kernel = weight.shape
    taps = math.prod(kernel)
    kr, kc = rates.kept(size, taps)
    groups = split(weight.reshape(filters, channels, taps), size)
    squares = groups.astype(np.float64) ** 2
    rows = _strongest(squares.sum(axis=(2, 4, 5)), kr)
    by_column = squares.sum(axis=(3, 4))
    if share_columns and taps % groups.shape[5] == 0:
        by_column = np.broadcast_to(by_column.sum(axis=2, keepdims=True), by_column.shape)
    cols = _strongest(by_column, kc)
    keep = rows[:, :, None, :, None, None] & cols[:, :, :, None, None, :]
    pruned = join(np.where(keep, groups, np.zeros((), groups.dtype)), filters, channels, taps)
    return pruned.reshape(weight.shape)


def _strongest(strength: Array, count: int) -> Array:
    """Bool of the `count` largest along the last axis; of equals, the first."""
    order = np.argsort(-strength, axis=-1, kind="stable")
    keep = np.zeros(strength.shape, bool)
    np.put_along_axis(keep, order[..., :count], True, axis=-1)
    return keep


PATTERNS = ("kgr", "kgc", "kgrc")
NETWORKS_WITH_RECIPE = ("c3d", "r2plus1d_18")

_HALF = Fraction(1, 2)
_KEEP_3_OF_9 = Fraction(2, 3)
_KEEP_6_OF_9 = Fraction(1, 3)


def recipe(network: str, pattern: str) -> dict[str, Rates]:
    """The paper's pruning rates by layer name; layers that are not in it stay dense.

    Source: KGRC paper, tables II (C3D) and III (R(2+1)D-18). Published reductions of operations:
    1.76x, 1.93x, 3.04x for KGR, KGC, KGRC of C3D, and 1.84x, 1.75x, 3.02x for R(2+1)D-18.

    Raises:
        ConfigError: an unknown network or pattern.
    """
    if network not in NETWORKS_WITH_RECIPE or pattern not in PATTERNS:
        raise ConfigError(
            f"no recipe {pattern!r} for {network!r}; there are "
            f"{', '.join(PATTERNS)} for {' and '.join(NETWORKS_WITH_RECIPE)}"
        )
    both = _c3d_rates() if network == "c3d" else _r2plus1d_rates()
    chosen = {
        name: Rates(
            rates.rows if "r" in pattern[2:] else Fraction(0),
            rates.cols if "c" in pattern[2:] else Fraction(0),
        )
        for name, rates in both.items()
    }
    return {name: rates for name, rates in chosen.items() if rates != Rates()}


def _c3d_rates() -> dict[str, Rates]:
    cols = {
        "conv2": _KEEP_3_OF_9,
        "conv3a": _KEEP_6_OF_9,
        "conv3b": _KEEP_3_OF_9,
        "conv4b": _KEEP_6_OF_9,
    }
    return {name: Rates(_HALF, rate) for name, rate in cols.items()}


def _r2plus1d_rates() -> dict[str, Rates]:
    rates = {}
    for stage, cols in ((1, _KEEP_3_OF_9), (2, _KEEP_3_OF_9), (3, _KEEP_6_OF_9)):
        for block in (0, 1):
            for conv in ("conv1", "conv2"):
                name = f"layer{stage}.{block}.{conv}.0"
                rates[f"{name}.0"] = Rates(_HALF, cols)  # 1x3x3
                rates[f"{name}.3"] = Rates(_HALF)  # 3x1x1: three taps are not column-pruned
    return rates


def prune(graph: Graph, rates: dict[str, Rates], size: GroupSize = DEFAULT_GROUP) -> Graph:
    """The graph with every named layer projected: one-shot magnitude pruning.

    Raises:
        ConfigError: a layer that is not a convolution of the graph, or rates that do not fit.
    """
    weights = {}
    layers = {layer.name: layer for layer in graph.convolutions()}
    for name, rate in rates.items():
        if name not in layers:
            known = ", ".join(list(layers)[:6])
            raise ConfigError(f"the recipe names {name!r}; {graph.name} has {known}, ...")
        weight = layers[name].weight
        assert weight is not None
        weights[name] = project(weight, rate, size)
    return graph.with_weights(weights)


def kept_operations(graph: Graph) -> tuple[int, int]:
    """MACs of the dense convolutions of a graph, and those whose weight is not zero."""
    dense = kept = 0
    for layer in graph.convolutions():
        assert layer.weight is not None
        assert layer.shape is not None
        positions = math.prod(layer.shape.out_size)
        dense += layer.weight.size * positions
        kept += int(np.count_nonzero(layer.weight)) * positions
    return dense, kept
