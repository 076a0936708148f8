"""Sparsity patterns as projections: set the weakest parts of a weight to zero.

KGR prunes rows (filters) of each kernel group, KGC columns (taps), KGRC both (KGRC paper, section
III), the same number in each group (balanced). The other patterns are for comparison. A projection
returns a weight of the same shape, whose zeros are the pattern; no mask is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from pynq_kgrc.errors import ConfigError
from pynq_kgrc.graph import Graph
from pynq_kgrc.groups import GroupSize
from pynq_kgrc.quant import Array, ceil_div

DEFAULT_GROUP = GroupSize(gm=8, gn=8, tk=9)


@dataclass(frozen=True)
class Rates:
    """Pruning rates of each kernel group: the fraction R_R of its rows, R_C of its columns.

    >>> Rates(rows=Fraction(1, 2)).kept(GroupSize(8, 8, 9), taps=27)
    (4, 9)
    """

    rows: Fraction = Fraction(0)
    cols: Fraction = Fraction(0)

    def kept(self, size: GroupSize, taps: int) -> tuple[int, int]:
        """Rows and columns that a group keeps.

        Raises:
            ConfigError: a rate outside [0, 1), or one that does not give whole rows and columns.
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


@dataclass(frozen=True, eq=False)
class Units:
    """Parts of a weight (units) that are pruned as a whole, and how many of them are kept.

    Units compete: of each `per` units, the strongest `keep` are kept. A pattern consists of one or
    two `Units`; projections, penalties and scores are computed from them.
    """

    ids: Array
    """[M, N, K] int64: the unit of each weight. Competition i has the units i * per to
    (i + 1) * per - 1."""
    per: int
    keep: int
    competitions: int
    norm: int = 2
    """1 or 2: a unit's strength is its sum of magnitudes, or of squares."""

    @property
    def count(self) -> int:
        return self.per * self.competitions

    def strength(self, scores: Array) -> Array:
        """[units]: the sum over each unit of `scores` [M, N, K]."""
        return np.bincount(self.ids.ravel(), scores.ravel().astype(np.float64), self.count)

    def kept(self, scores: Array) -> Array:
        """Bool [M, N, K]: True in the units that are kept; of equal units, the first is kept."""
        strength = self.strength(scores).reshape(self.competitions, self.per)
        order = np.argsort(-strength, axis=1, kind="stable")
        keep = np.zeros(strength.shape, bool)
        np.put_along_axis(keep, order[:, : self.keep], True, axis=1)
        kept: Array = keep.ravel()[self.ids]
        return kept


Shape = tuple[int, ...]
"""[M, N, kernel...] for a convolution's weight, [M, N] for a fully connected layer's."""


class Pattern(Protocol):
    """Which parts of a weight may be pruned."""

    def units(self, shape: Shape) -> tuple[Units, ...]:
        """The units of a weight of this shape; a value is kept if all of them keep it."""


@dataclass(frozen=True)
class KernelGroups:
    """KGR, KGC and KGRC: prunes the weakest rows and columns of each kernel group, balanced.

    The strength of a row is its L2 norm over channels and taps, that of a column its L2 norm over
    the kernels of the group; both on the unpruned weight (KGRC paper, section III-B).
    """

    rates: Rates
    size: GroupSize = DEFAULT_GROUP
    share_columns: bool = True
    """All tap tiles of a kernel keep the same columns, as in the paper's 3x3x3 kernels. No effect
    where the tap tiles do not divide the kernel evenly."""

    def units(self, shape: Shape) -> tuple[Units, ...]:
        m, n, k = _indices(shape)
        taps = math.prod(shape[2:])
        p, q, t = self.size.counts(shape[0], shape[1], taps)
        gm, gk = self.size.gm, self.size.columns(taps)
        kr, kc = self.rates.kept(self.size, taps)
        group = m // gm * q + n // self.size.gn
        found = []
        if kr < gm:
            found.append(Units(group * gm + m % gm + 0 * k, gm, kr, p * q))
        if kc < gk:
            shared = self.share_columns and taps % gk == 0
            tile = group if shared else group * t + k // gk
            found.append(Units(tile * gk + k % gk, gk, kc, p * q * (1 if shared else t)))
        return tuple(found)


@dataclass(frozen=True)
class Blocks:
    """Prunes the weakest blocks of filters x channels of the layer.

    With the kernel group's size this is RT3D's vanilla sparsity, with T_m x T_n the blockwise
    pruning of Sun, Zhao et al., eq. (1): at most (1 - rate) of the blocks stay.
    """

    rate: Fraction
    filters: int = 8
    channels: int = 8

    def units(self, shape: Shape) -> tuple[Units, ...]:
        m, n, k = _indices(shape)
        across = ceil_div(shape[1], self.channels)
        blocks = ceil_div(shape[0], self.filters) * across
        ids = m // self.filters * across + n // self.channels + 0 * k
        return (Units(ids, blocks, _kept(self.rate, blocks), 1),)


@dataclass(frozen=True)
class Filters:
    """Prunes the weakest filters of the layer."""

    rate: Fraction

    def units(self, shape: Shape) -> tuple[Units, ...]:
        m, n, k = _indices(shape)
        return (Units(m + 0 * n + 0 * k, shape[0], _kept(self.rate, shape[0]), 1),)


@dataclass(frozen=True)
class KernelRows:
    """KRP: keeps the `keep` strongest rows of each kernel, by L1 norm (Sui et al. 2023, eq. (1)).

    A row here is a line of taps along the width; a 3-D kernel has depth x height of them.
    """

    keep: int = 1

    def units(self, shape: Shape) -> tuple[Units, ...]:
        m, n, k = _indices(shape)
        width = shape[-1] if len(shape) > 2 else 1
        rows = math.prod(shape[2:]) // width
        if not 1 <= self.keep <= rows:
            raise ConfigError(f"keep={self.keep} rows of a kernel of {rows}; use 1 to {rows}")
        ids = (m * shape[1] + n) * rows + k // width
        return (Units(ids, rows, self.keep, shape[0] * shape[1], norm=1),)


@dataclass(frozen=True)
class Weights:
    """Prunes the smallest weights of the layer: unstructured, for fully connected layers."""

    rate: Fraction

    def units(self, shape: Shape) -> tuple[Units, ...]:
        size = math.prod(shape)
        ids = np.arange(size).reshape(shape[0], shape[1], -1)
        return (Units(ids, size, _kept(self.rate, size), 1),)


@dataclass(frozen=True)
class Together:
    """Several patterns, each computed on the unpruned weight; a value is kept if all keep it."""

    patterns: tuple[Pattern, ...]

    def units(self, shape: Shape) -> tuple[Units, ...]:
        return tuple(unit for pattern in self.patterns for unit in pattern.units(shape))


def _indices(shape: Shape) -> tuple[Array, Array, Array]:
    """Filter, channel and tap of each weight, as open grids of [M, N, K]."""
    m, n, k = np.ogrid[: shape[0], : shape[1], : math.prod(shape[2:])]
    return m, n, k


def _kept(rate: Fraction, count: int) -> int:
    """Units that are kept at a pruning rate: at most (1 - rate) of them, at least one."""
    if not 0 <= rate < 1:
        raise ConfigError(f"a rate of {rate}; accepted is 0 to below 1")
    return max(1, math.floor((1 - Fraction(rate)) * count))


def keep_mask(weight: Array, pattern: Pattern, scores: Array | None = None) -> Array:
    """Bool, shaped as `weight`: what the pattern keeps.

    `scores`, shaped as `weight`, replace the magnitudes.
    """
    flat = weight.reshape(weight.shape[0], weight.shape[1], -1).astype(np.float64)
    keep = np.ones(flat.shape, bool)
    for units in pattern.units(weight.shape):
        values = np.abs(flat) ** units.norm if scores is None else scores.reshape(flat.shape)
        keep &= units.kept(values)
    return keep.reshape(weight.shape)


def project(
    weight: Array, rates: Rates, size: GroupSize = DEFAULT_GROUP, share_columns: bool = True
) -> Array:
    """The weight [M, N, kd, kh, kw] with the weakest rows and columns of each group set to zero.

    Any float or integer type; the weight itself is not changed. See `KernelGroups`.

    Raises:
        ConfigError: rates that do not give whole rows and columns.
    """
    return project_pattern(weight, KernelGroups(rates, size, share_columns))


def project_pattern(weight: Array, pattern: Pattern, scores: Array | None = None) -> Array:
    """The nearest weight with the pattern: zero where `keep_mask` is False."""
    return np.where(keep_mask(weight, pattern, scores), weight, np.zeros((), weight.dtype))


PATTERNS = ("kgr", "kgc", "kgrc")
_HALF = Fraction(1, 2)
_KEEP_3_OF_9 = Fraction(2, 3)
_KEEP_6_OF_9 = Fraction(1, 3)


def recipe(network: str, pattern: str) -> dict[str, Rates]:
    """The paper's pruning rates by layer name; layers that are not listed stay dense.

    Source: KGRC paper, tables II (C3D) and III (R(2+1)D-18). Published reductions of operations:
    1.76x, 1.93x, 3.04x for KGR, KGC, KGRC of C3D, and 1.84x, 1.75x, 3.02x for R(2+1)D-18.

    Raises:
        ConfigError: an unknown network or pattern.
    """
    if network not in PUBLISHED_RATES or pattern not in PATTERNS:
        raise ConfigError(
            f"no recipe {pattern!r} for {network!r}; there are "
            f"{', '.join(PATTERNS)} for {', '.join(PUBLISHED_RATES)}"
        )
    chosen = {
        name: Rates(
            rates.rows if "r" in pattern[2:] else Fraction(0),
            rates.cols if "c" in pattern[2:] else Fraction(0),
        )
        for name, rates in PUBLISHED_RATES[network]().items()
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


PUBLISHED_RATES = {
    "c3d": _c3d_rates,
    "r2plus1d_18": _r2plus1d_rates,
    "thin_c3d": _c3d_rates,  # its layers have C3D's names
}
"""KGRC rates by network, as published; a network that shares a table has layers of those names."""


def prune(
    graph: Graph,
    rates: Mapping[str, Rates | Pattern],
    size: GroupSize = DEFAULT_GROUP,
    scores: Mapping[str, Array] | None = None,
) -> Graph:
    """The graph with every named layer projected: one-shot pruning.

    Args:
        graph: not changed.
        rates: by layer: its rates in groups of `size`, or any pattern.
        size: G_M, G_N, T_K.
        scores: by layer, importance of each weight; by default its magnitude.

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
        pattern = KernelGroups(rate, size) if isinstance(rate, Rates) else rate
        weights[name] = project_pattern(weight, pattern, (scores or {}).get(name))
    return graph.with_weights(weights)


def kept_operations(graph: Graph) -> tuple[int, int]:
    """MACs of all convolutions of a graph: of all weights, and of the non-zero ones."""
    dense = kept = 0
    for layer in graph.convolutions():
        assert layer.weight is not None
        assert layer.shape is not None
        positions = math.prod(layer.shape.out_size)
        dense += layer.weight.size * positions
        kept += int(np.count_nonzero(layer.weight)) * positions
    return dense, kept
