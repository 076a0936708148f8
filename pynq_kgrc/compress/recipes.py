"""What is pruned of which layer: read from a file, or searched for a number of operations.

A recipe is a TOML file with a table of layers::

    [layers]
    conv2 = { pattern = "kgrc", rows = "1/2", cols = "2/3" }
    conv3a = { pattern = "blockwise", rate = "1/2" }
    fc = { pattern = "unstructured", rate = "3/4" }
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path

import msgspec
import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.paper import ASSUMED_PORTS, paper_layer_cycles
from pynq_kgrc.compress.patterns import (
    DEFAULT_GROUP,
    Blocks,
    Filters,
    KernelGroups,
    KernelRows,
    Pattern,
    Rates,
    Weights,
    keep_mask,
)
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.graph import ConvShape, Graph, Layer
from pynq_kgrc.storage import written_beside

Recipe = Mapping[str, Pattern]
"""For each layer that is pruned, its pattern."""

GROUPED = ("kgr", "kgc", "kgrc")
RATED = ("vanilla", "blockwise", "filter", "unstructured")
NAMES = (*GROUPED, *RATED, "krp")


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One layer of a recipe file; fractions are text, such as "2/3"."""

    pattern: str
    rows: str = "0"
    cols: str = "0"
    rate: str = "0"
    keep: int = 1


class RecipeFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recipe file."""

    layers: dict[str, Entry]


def build_patterns(
    entries: Mapping[str, Entry], config: AcceleratorConfig | None = None
) -> dict[str, Pattern]:
    """The patterns of a recipe, by layer.

    Raises:
        ConfigError: as `build_pattern`; the layer is named.
    """
    patterns = {}
    for name, entry in entries.items():
        try:
            patterns[name] = build_pattern(entry, config)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return patterns


def build_pattern(entry: Entry, config: AcceleratorConfig | None = None) -> Pattern:
    """The pattern of an entry, in the groups and blocks of an accelerator.

    Raises:
        ConfigError: an unknown pattern, a rate that is no fraction in 0 to below 1, or rows and
            columns that the accelerator's P_M and P_K do not divide (eq. (9)).
    """
    size = DEFAULT_GROUP if config is None else config.group_size
    if entry.pattern in GROUPED:
        rates = Rates(
            _fraction(entry.rows) if "r" in entry.pattern[2:] else Fraction(0),
            _fraction(entry.cols) if "c" in entry.pattern[2:] else Fraction(0),
        )
        if config is not None:
            check_eq9(rates, config)
        return KernelGroups(rates, size)
    if entry.pattern == "krp":
        return KernelRows(entry.keep)
    rate = _fraction(entry.rate)
    if entry.pattern == "vanilla":
        return Blocks(rate, size.gm, size.gn)
    if entry.pattern == "blockwise":
        tm = size.gm if config is None else config.tm
        return Blocks(rate, tm, size.gn)
    if entry.pattern == "filter":
        return Filters(rate)
    if entry.pattern == "unstructured":
        return Weights(rate)
    raise ConfigError(f"no pattern {entry.pattern!r}; there are {', '.join(NAMES)}")


def _fraction(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{text!r} is no rate; write a fraction such as 2/3") from error
    if not 0 <= value < 1:
        raise ConfigError(f"a rate of {text}; accepted is 0 to below 1")
    return value


def check_eq9(rates: Rates, config: AcceleratorConfig) -> None:
    """Refuse rates whose kept rows or columns leave the array partly idle.

    Eq. (9) of the KGRC paper: T_M (1 - R_R) % P_M = 0 and T_K (1 - R_C) % P_K = 0.

    Raises:
        ConfigError: names the rate and those that are accepted.
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


def read_entries(path: str | Path) -> dict[str, Entry]:
    """The entries of a recipe file.

    Raises:
        ConfigError: no such file, no TOML, or a field that is unknown or of another type.
    """
    try:
        return msgspec.toml.decode(Path(path).read_bytes(), type=RecipeFile).layers
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path}: {error}") from error


def write_recipe(entries: Mapping[str, Entry], path: Path) -> None:
    """The file that `read_recipe` reads."""
    with written_beside(path) as beside:
        beside.write_bytes(msgspec.toml.encode(RecipeFile(dict(entries))))


Cost = Callable[[Layer, Entry, float], float]
"""What a layer costs with an entry that keeps this fraction of its weights."""

DENSE = Entry("kgrc")


def operations(layer: Layer, entry: Entry, kept: float) -> float:
    """MACs for one clip."""
    assert isinstance(layer.shape, ConvShape)
    return layer.shape.macs * kept


def options(layer: Layer, pattern: str, config: AcceleratorConfig) -> list[Entry]:
    """All ways to apply a pattern to a layer that satisfy eq. (9), the densest first.

    Layers whose kernel is one tap have no columns to prune, and those of a first layer's few
    channels or a classifier are left to the caller.
    """
    assert isinstance(layer.shape, ConvShape)
    size = config.group_size
    if pattern not in GROUPED:
        if pattern == "krp":
            width = layer.shape.kernel[2]
            return [Entry(pattern, keep=k) for k in range(layer.shape.taps // width, 0, -1)]
        return [Entry(pattern, rate=str(Fraction(i, 8))) for i in range(8)]
    gk = size.columns(layer.shape.taps)
    rows = [r for r in range(size.gm, 0, -1) if not r % config.rows_per_cycle]
    cols = [c for c in range(gk, 0, -1) if not c % config.pk] if gk == size.tk else [gk]
    rows = rows if "r" in pattern[2:] else [size.gm]
    cols = cols if "c" in pattern[2:] else [gk]
    return [
        Entry(pattern, str(1 - Fraction(r, size.gm)), str(1 - Fraction(c, gk)))
        for r in rows
        for c in cols
    ]


def choose_rates(
    graph: Graph,
    names: Iterable[str],
    pattern: str,
    reduction: float,
    config: AcceleratorConfig,
    cost: Cost | None = None,
) -> dict[str, Entry]:
    """Rates for which the network costs `reduction` times less and loses least of its weights.

    What a layer loses is the part of the sum of its squared weights that goes. Each layer takes
    the option with the least (loss + price * cost), and the price rises until the target is met.

    Args:
        graph: traced and dense.
        names: layers that may be pruned.
        pattern: one of `NAMES`.
        reduction: how many times cheaper the whole network has to be.
        config: the accelerator; only rates that satisfy its eq. (9) are tried.
        cost: operations, unless given; `modelled_cycles(config)` is the other one.

    Raises:
        ConfigError: an unknown pattern, or a target that even the sparsest rates do not meet.
    """
    if pattern not in NAMES:
        raise ConfigError(f"no pattern {pattern!r}; there are {', '.join(NAMES)}")
    cost = cost or operations
    wanted = set(names)
    total = sum(cost(layer, DENSE, 1.0) for layer in graph.convolutions())
    fixed = sum(
        cost(layer, DENSE, 1.0) for layer in graph.convolutions() if layer.name not in wanted
    )
    tables = {
        layer.name: _table(layer, pattern, config, cost)
        for layer in graph.convolutions()
        if layer.name in wanted
    }
    least = fixed + sum(min(row[2] for row in table) for table in tables.values())
    if total / least < reduction:
        raise ConfigError(
            f"{pattern} makes {graph.name} at most {total / least:.2f}x cheaper, not {reduction}x; "
            f"prune more layers, or ask for less"
        )
    low, high = 0.0, 1e6 / total
    for _ in range(60):
        price = (low + high) / 2
        chosen = {name: _cheapest(table, price) for name, table in tables.items()}
        spent = fixed + sum(row[2] for row in chosen.values())
        low, high = (price, high) if spent * reduction > total else (low, price)
    chosen = {name: _cheapest(table, high) for name, table in tables.items()}
    chosen = _relaxed(tables, chosen, total / reduction - fixed)
    return {name: entry for name, (entry, lost, _) in chosen.items() if lost > 0}


def _relaxed(
    tables: dict[str, list[Row]], chosen: dict[str, Row], allowed: float
) -> dict[str, Row]:
    """Spend what is left of the allowed cost where it saves most of the weights.

    A price for all layers leaves gaps between what it can choose; single layers fill them.
    """
    while True:
        left = allowed - sum(row[2] for row in chosen.values())
        better = [
            (chosen[name][1] - row[1], name, row)
            for name, table in tables.items()
            for row in table
            if row[1] < chosen[name][1] and row[2] - chosen[name][2] <= left
        ]
        if not better:
            return chosen
        _, name, row = max(better, key=lambda found: found[0])
        chosen = chosen | {name: row}


Row = tuple[Entry, float, float]
"""An option, what it loses of the weights, what it costs."""


def _table(layer: Layer, pattern: str, config: AcceleratorConfig, cost: Cost) -> list[Row]:
    weight = layer.weight
    assert weight is not None
    squares = weight.astype(np.float64) ** 2
    rows = []
    for entry in options(layer, pattern, config):
        kept = keep_mask(weight, build_pattern(entry, config))
        lost = 1 - float(squares[kept].sum() / max(squares.sum(), 1e-30))
        rows.append(
            (entry, lost if not kept.all() else 0.0, cost(layer, entry, float(kept.mean())))
        )
    return rows


def _cheapest(table: list[Row], price: float) -> Row:
    return min(table, key=lambda row: row[1] + price * row[2])


def modelled_cycles(config: AcceleratorConfig) -> Cost:
    """The cycles that the KGRC paper's model gives a layer, as a cost (accelerator/paper.py)."""

    def cycles(layer: Layer, entry: Entry, kept: float) -> float:
        assert isinstance(layer.shape, ConvShape)
        gk = config.group_size.columns(layer.shape.taps)
        if entry.pattern not in GROUPED:
            return paper_layer_cycles(config, layer.shape, config.gm, gk, ASSUMED_PORTS) * kept
        kr = (1 - Fraction(entry.rows)) * config.gm
        kc = (1 - Fraction(entry.cols)) * gk
        return paper_layer_cycles(config, layer.shape, int(kr), int(kc), ASSUMED_PORTS)

    return cycles
