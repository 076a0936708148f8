"""Recipes, the patterns and rates of each layer: published, from a file, or searched for a cost.

A recipe is a TOML file with a table of layers::

    [layers]
    conv2 = { pattern = "kgrc", rows = "1/2", cols = "2/3" }
    conv3a = { pattern = "blockwise", rate = "1/2" }
    fc = { pattern = "unstructured", rate = "3/4" }
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.compress.patterns import (
    DEFAULT_GROUP,
    Blocks,
    Filters,
    KernelGroups,
    KernelRows,
    Pattern,
    Rates,
    Units,
    Weights,
    keep_mask,
    recipe,
)
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.files import written_beside
from pynq_kgrc.graph import ConvShape, Graph, Layer
from pynq_kgrc.quant import Array

Recipe = Mapping[str, Pattern]
"""The pattern of each layer that is pruned, by name."""

Algorithm = Literal["one-shot", "heuristic", "lasso", "reweighted", "admm"]
ALGORITHMS = get_args(Algorithm)
"""How the weights of a recipe are brought to zero (`compress/pruning.py`)."""

GROUPED = ("kgr", "kgc", "kgrc")
RATED = ("vanilla", "blockwise", "filter", "unstructured")
NAMES = (*GROUPED, *RATED, "krp")


class LayerRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How one layer is pruned: an entry of a recipe file. Fractions are text, such as "2/3"."""

    pattern: str
    rows: str = "0"
    cols: str = "0"
    rate: str = "0"
    keep: int = 1


class RecipeFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recipe file."""

    layers: dict[str, LayerRecipe]


def build_patterns(
    layers: Mapping[str, LayerRecipe], config: AcceleratorConfig | None = None
) -> dict[str, Pattern]:
    """The patterns of a recipe, by layer.

    Raises:
        ConfigError: as `build_pattern`; the layer is named.
    """
    patterns = {}
    for name, layer in layers.items():
        try:
            patterns[name] = build_pattern(layer, config)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return patterns


def build_pattern(layer: LayerRecipe, config: AcceleratorConfig | None = None) -> Pattern:
    """The pattern of a layer, in the groups and blocks of an accelerator.

    Raises:
        ConfigError: an unknown pattern, a rate that is no fraction in 0 to below 1, or rows and
            columns that are no multiples of the accelerator's P_M and P_K (eq. (9)).
    """
    size = DEFAULT_GROUP if config is None else config.group_size
    if layer.pattern in GROUPED:
        rates = Rates(
            _fraction(layer.rows) if "r" in layer.pattern[2:] else Fraction(0),
            _fraction(layer.cols) if "c" in layer.pattern[2:] else Fraction(0),
        )
        if config is not None:
            check_eq9(rates, config)
        return KernelGroups(rates, size)
    if layer.pattern == "krp":
        return KernelRows(layer.keep)
    rate = _fraction(layer.rate)
    if layer.pattern == "vanilla":
        return Blocks(rate, size.gm, size.gn)
    if layer.pattern == "blockwise":
        tm = size.gm if config is None else config.tm
        return Blocks(rate, tm, size.gn)
    if layer.pattern == "filter":
        return Filters(rate)
    if layer.pattern == "unstructured":
        return Weights(rate)
    raise ConfigError(f"no pattern {layer.pattern!r}; there are {', '.join(NAMES)}")


def _fraction(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{text!r} is no rate; write a fraction such as 2/3") from error
    if not 0 <= value < 1:
        raise ConfigError(f"a rate of {text}; accepted is 0 to below 1")
    return value


def check_eq9(rates: Rates, config: AcceleratorConfig) -> None:
    """Refuse rates whose kept rows or columns would leave a part of the array idle.

    Eq. (9) of the KGRC paper: T_M (1 - R_R) % P_M = 0 and T_K (1 - R_C) % P_K = 0.

    Raises:
        ConfigError: a rate does not satisfy it; the accepted rates are named.
    """
    for what, rate, count, step in (
        ("rows", rates.rows, config.gm, config.rows_per_cycle),
        ("columns", rates.cols, config.tk, config.pk),
    ):
        kept = (1 - Fraction(rate)) * count
        if kept % step:
            fit = ", ".join(
                str(1 - Fraction(k, count)) for k in range(count, 0, -1) if not k % step
            )
            raise ConfigError(
                f"a rate of {rate} keeps {kept} {what} of {count}, which {config.name} works on "
                f"{step} at a time (eq. 9); use {fit}"
            )


def read_recipe(path: str | Path) -> dict[str, LayerRecipe]:
    """The layers of a recipe file.

    Raises:
        ConfigError: no such file, no TOML, an unknown field, or a value of another type.
    """
    try:
        return msgspec.toml.decode(Path(path).read_bytes(), type=RecipeFile).layers
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path}: {error}") from error


def published_recipe(network: str, pattern: str) -> dict[str, LayerRecipe]:
    """The published rates of a network.

    KGR, KGC and KGRC as `patterns.recipe` gives them; "blockwise" for R(2+1)D-18: 90 % of the
    blocks of its second residual block, 80 % of those of its third (Sun, Zhao et al., section V).

    Raises:
        ConfigError: a network or pattern that no paper has rates for.
    """
    if (network, pattern) == ("r2plus1d_18", "blockwise"):
        return {
            f"layer{stage}.{block}.conv{conv}.0.{part}": LayerRecipe(pattern, rate=rate)
            for stage, rate in ((1, "9/10"), (2, "4/5"))
            for block, conv, part in product((0, 1), (1, 2), (0, 3))
        }
    rates = recipe(network, pattern)
    return {name: LayerRecipe(pattern, str(r.rows), str(r.cols)) for name, r in rates.items()}


def write_recipe(layers: Mapping[str, LayerRecipe], path: Path) -> None:
    """Write the file that `read_recipe` reads, atomically."""
    with written_beside(path) as beside:
        beside.write_bytes(msgspec.toml.encode(RecipeFile(dict(layers))))


Cost = Callable[[Layer, Array], float]
"""What a layer costs if only some of its weights are kept (bool, shaped as the weight)."""


def operations(layer: Layer, kept: Array) -> float:
    """MACs of the kept weights for one clip."""
    assert isinstance(layer.shape, ConvShape)
    return layer.shape.macs * float(kept.mean())


def options(layer: Layer, pattern: str, config: AcceleratorConfig) -> list[LayerRecipe]:
    """All ways to apply a pattern to a layer that satisfy eq. (9), the densest first.

    A kernel with fewer taps than T_K has no columns to prune. The caller decides whether a first
    layer of few channels, or a classifier, is pruned at all.
    """
    assert isinstance(layer.shape, ConvShape)
    size = config.group_size
    if pattern not in GROUPED:
        if pattern == "krp":
            width = layer.shape.kernel[2]
            return [LayerRecipe(pattern, keep=k) for k in range(layer.shape.taps // width, 0, -1)]
        return [LayerRecipe(pattern, rate=str(Fraction(i, 8))) for i in range(8)]
    gk = size.columns(layer.shape.taps)
    rows = [r for r in range(size.gm, 0, -1) if not r % config.rows_per_cycle]
    cols = [c for c in range(gk, 0, -1) if not c % config.pk] if gk == size.tk else [gk]
    rows = rows if "r" in pattern[2:] else [size.gm]
    cols = cols if "c" in pattern[2:] else [gk]
    return [
        LayerRecipe(pattern, str(1 - Fraction(r, size.gm)), str(1 - Fraction(c, gk)))
        for r in rows
        for c in cols
    ]


@dataclass(frozen=True)
class Option:
    """One way to prune a layer."""

    recipe: LayerRecipe
    lost: float
    """The fraction of the sum of the layer's squared weights that is pruned."""
    cost: float


NEARER = (1.0, 0.99, 0.98, 0.97)
"""Fractions of the wanted reduction that are tried where the first one overshoots."""

TOLERANCE = 0.03


def choose_rates(
    graph: Graph,
    names: Iterable[str],
    pattern: str,
    reduction: float,
    config: AcceleratorConfig,
    cost: Cost = operations,
    rest: float = 0.0,
    nearer: Sequence[float] = NEARER[:1],
) -> dict[str, LayerRecipe]:
    """Rates that make the network `reduction` times cheaper and lose least of its weights.

    The loss of a layer is the fraction of the sum of its squared weights that is pruned. Each
    layer takes the option with the least (loss + price * cost), and the price rises until the
    target is met.

    Args:
        graph: traced and dense.
        names: layers that may be pruned.
        pattern: one of `NAMES`.
        reduction: how many times cheaper the whole network has to be.
        config: the accelerator; only rates that satisfy its eq. (9) are tried.
        cost: of a layer; operations, or cycles of the compiled program (compiler/latency.py).
        rest: what the network costs beside its convolutions.
        nearer: fractions of `reduction`, tried in this order until the cost is within `TOLERANCE`
            of what was asked. If none is, the nearest counts.

    Raises:
        ConfigError: an unknown pattern, or a target that even the sparsest rates do not meet.
    """
    if pattern not in NAMES:
        raise ConfigError(f"no pattern {pattern!r}; there are {', '.join(NAMES)}")
    if not reduction > 0:
        raise ConfigError(f"a reduction of {reduction}; accepted is any number above 0")
    wanted = set(names)
    dense = {
        layer.name: cost(layer, np.ones_like(layer.weight, dtype=bool))
        for layer in graph.convolutions()
    }
    total = rest + sum(dense.values())
    fixed = rest + sum(value for name, value in dense.items() if name not in wanted)
    tables = {
        layer.name: _table(layer, pattern, config, cost)
        for layer in graph.convolutions()
        if layer.name in wanted
    }
    least = fixed + sum(min(option.cost for option in table) for table in tables.values())
    if total / least < reduction:
        raise ConfigError(
            f"{pattern} makes {graph.name} at most {total / least:.2f}x cheaper, not {reduction}x "
            f"({fixed / total:.0%} of its cost is in layers that are not pruned); prune more "
            f"layers, or ask for less"
        )
    best: dict[str, Option] = {}
    smallest_miss = math.inf
    for fraction in nearer:
        chosen = _search(tables, total / (reduction * fraction) - fixed)
        spent = fixed + sum(option.cost for option in chosen.values())
        miss = abs(total / spent / reduction - 1)
        if miss < smallest_miss:
            best, smallest_miss = chosen, miss
        if miss <= TOLERANCE:
            break
    return {name: option.recipe for name, option in best.items() if option.lost > 0}


def sparsest_recipe(
    graph: Graph, names: Iterable[str], pattern: str, config: AcceleratorConfig
) -> dict[str, LayerRecipe]:
    """The sparsest rates of a pattern that satisfy eq. (9), of the layers it can prune."""
    wanted = set(names)
    layers = [layer for layer in graph.convolutions() if layer.name in wanted]
    found = {layer.name: options(layer, pattern, config) for layer in layers}
    return {name: rates[-1] for name, rates in found.items() if len(rates) > 1}


def rates_by_threshold(
    graph: Graph,
    weights: Mapping[str, Array],
    pattern: str,
    threshold: float,
    config: AcceleratorConfig,
) -> dict[str, LayerRecipe]:
    """Rates that prune the units weaker than a threshold, as many in each group (RT3D, section 4).

    After a penalty has driven units to zero, their share decides: a unit is weak if its root mean
    square (KRP: its mean magnitude) is below `threshold` times that of the layer. A layer gets the
    sparsest rates that satisfy eq. (9) and prune no larger share of its rows, its columns or its
    blocks than is weak. So the rates are known only afterwards; RT3D prunes each weak unit, here
    all groups keep as many.

    Args:
        graph: traced; its shapes count.
        weights: of the layers that may be pruned, by name.
        pattern: one of `NAMES`.
        threshold: above 0.
        config: the accelerator.

    Raises:
        ConfigError: an unknown pattern, a threshold that is not above 0, or one below which no
            layer has enough weak units.
    """
    if pattern not in NAMES:
        raise ConfigError(f"no pattern {pattern!r}; there are {', '.join(NAMES)}")
    if not threshold > 0:
        raise ConfigError(f"a threshold of {threshold}; accepted is any number above 0")
    found = {}
    for name, sparsest in sparsest_recipe(graph, weights, pattern, config).items():
        weight = weights[name].reshape(weights[name].shape[0], weights[name].shape[1], -1)
        units = build_pattern(sparsest, config).units(weights[name].shape)
        weak = [_weak_share(weight, unit, threshold) for unit in units]
        choices = options(graph[name], pattern, config)[1:]
        # the sparsest of those that prune no more than is weak
        for choice in reversed(choices):
            shares = _pruned_shares(choice, sparsest, graph[name])
            if all(share <= most for share, most in zip(shares, weak, strict=True)):
                found[name] = choice
                break
    if not found:
        raise ConfigError(
            f"no layer has enough units of {pattern} below {threshold} times its mean strength; "
            f"train longer with the penalty, or use a higher threshold"
        )
    return found


def _weak_share(weight: Array, units: Units, threshold: float) -> Fraction:
    """The share of the units of a weight [M, N, K] that are weaker than `threshold` x the mean."""
    values = np.abs(weight.astype(np.float64)) ** units.norm
    size = units.strength(np.ones(weight.shape))
    strength = units.strength(values)[size > 0] / size[size > 0]
    weak = strength < threshold**units.norm * values.mean()
    return Fraction(int(weak.sum()), len(weak))


def _pruned_shares(choice: LayerRecipe, sparsest: LayerRecipe, layer: Layer) -> list[Fraction]:
    """The shares that a recipe prunes of each of the `units` of the sparsest one."""
    assert isinstance(layer.shape, ConvShape)
    if choice.pattern == "krp":
        return [1 - Fraction(choice.keep, layer.shape.taps // layer.shape.kernel[2])]
    shares = [(choice.rows, sparsest.rows), (choice.cols, sparsest.cols)]
    if choice.pattern not in GROUPED:
        shares = [(choice.rate, sparsest.rate)]
    return [Fraction(own) for own, most in shares if Fraction(most)]


def _search(tables: dict[str, list[Option]], allowed: float) -> dict[str, Option]:
    """An option for each layer: together they cost at most `allowed`, and lose little."""
    low, high = 0.0, 1e6 / max(option.cost for table in tables.values() for option in table)
    for _ in range(60):
        price = (low + high) / 2
        chosen = {name: _cheapest(table, price) for name, table in tables.items()}
        spent = sum(option.cost for option in chosen.values())
        low, high = (price, high) if spent > allowed else (low, price)
    return _relaxed(tables, {n: _cheapest(t, high) for n, t in tables.items()}, allowed)


def _relaxed(
    tables: dict[str, list[Option]], chosen: dict[str, Option], allowed: float
) -> dict[str, Option]:
    """Spend what is left of the allowed cost where it saves most of the weights.

    One price for all layers cannot reach every combination; single layers fill the gap.
    """
    while True:
        left = allowed - sum(option.cost for option in chosen.values())
        better = [
            (chosen[name].lost - option.lost, name, option)
            for name, table in tables.items()
            for option in table
            if option.lost < chosen[name].lost and option.cost - chosen[name].cost <= left
        ]
        if not better:
            return chosen
        _, name, option = max(better, key=lambda found: found[0])
        chosen = chosen | {name: option}


def _table(layer: Layer, pattern: str, config: AcceleratorConfig, cost: Cost) -> list[Option]:
    weight = layer.weight
    assert weight is not None
    squares = weight.astype(np.float64) ** 2
    table = []
    for choice in options(layer, pattern, config):
        kept = keep_mask(weight, build_pattern(choice, config))
        lost = 1 - float(squares[kept].sum() / max(squares.sum(), 1e-30))
        table.append(Option(choice, 0.0 if kept.all() else lost, cost(layer, kept)))
    return table


def _cheapest(table: list[Option], price: float) -> Option:
    return min(table, key=lambda option: option.lost + price * option.cost)
