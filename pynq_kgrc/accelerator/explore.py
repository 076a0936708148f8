"""Search for designs: which fit a board, and what whole networks would take on them.

Everything here is modelled: latency by `cost`, resources by `resources`. There are some ten
thousand designs, so they are ranked by a bound that takes microseconds, and only the best are
walked through in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from pynq_kgrc.accelerator.boards import Board
from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.cost import task_cost
from pynq_kgrc.accelerator.paper import KeptConv
from pynq_kgrc.accelerator.resources import PACKED, Resources, estimate_resources
from pynq_kgrc.accelerator.tiling import Work, conv_words
from pynq_kgrc.errors import CompileError, ConfigError
from pynq_kgrc.graph import ConvShape
from pynq_kgrc.quant import ceil_div


@dataclass(frozen=True)
class Network:
    """What has to be known of a network to find a design for it."""

    convolutions: Sequence[KeptConv]
    """Shapes, kept rows and columns: enough to rank designs."""
    work: Callable[[AcceleratorConfig], Sequence[Work]]
    """Its tasks as a design would work on them; raises CompileError where it cannot."""


MOST_GROUPS = 8
"""Kernel groups along the filters of a tile that are tried."""

MOST_POSITIONS = 32
"""P_F that is tried."""

FEATURES = ((4, 14, 14), (4, 7, 14))
"""T_D, T_H, T_W that are tried; only their product matters."""

FILTER_TILES = (2, 3, 4, 5, 6, 8)
BEATS = (4, 8)
"""Positions that the port of a map moves at once; 8 are 512 bits at 8 bits and T_N = 8."""

SHARE = 0.8
"""Of each resource that a design may take: beyond that routing fails (eq. 14, rho)."""


@dataclass(frozen=True)
class Latency:
    """Modelled milliseconds of one clip."""

    convolutions: float
    """Without fully connected layers and pools: what the KGRC paper publishes."""
    whole: float


@dataclass(frozen=True)
class Candidate:
    """A design that fits, and what it would do."""

    config: AcceleratorConfig
    resources: Resources
    latency: Mapping[str, Latency]

    @property
    def mean_ms(self) -> float:
        """Geometric mean of the networks' convolutions, which favours none of them."""
        return math.exp(
            sum(math.log(each.convolutions) for each in self.latency.values()) / len(self.latency)
        )


def list_designs(
    base: AcceleratorConfig, board: Board, share: float = SHARE
) -> list[AcceleratorConfig]:
    """Designs with the kernel groups and width of `base` that take most of a board.

    Of each array the largest P_F that fits is listed, and the next: more positions are faster,
    but may divide a network's maps worse.

    Raises:
        ConfigError: nothing fits.
    """
    found: list[AcceleratorConfig] = []
    groups = range(1, MOST_GROUPS + 1)
    rows = [r for r in range(1, base.gm + 1) if base.gm % r == 0]
    for count, each, pk, tile, filter_tiles, beat in product(
        groups, rows, range(1, base.tk + 1), FEATURES, FILTER_TILES, BEATS
    ):
        if count * base.gm % base.tn:
            continue
        filters, positions = PACKED[base.bits]
        each_position = count * ceil_div(each, filters) * pk * base.tn / positions
        most = min(MOST_POSITIONS, int(share * board.dsp / each_position))
        fitting = 0
        for pf in range(most, 0, -1):
            try:
                config = replace(
                    base,
                    tm=count * base.gm,
                    pm=count * each,
                    pk=pk,
                    pf=pf,
                    td=tile[0],
                    th=tile[1],
                    tw=tile[2],
                    filter_tiles=filter_tiles,
                    beat=beat,
                )
            except ConfigError:
                continue
            if config.port_positions != beat or estimate_resources(config).share(board) > share:
                continue
            found.append(replace(config, name=design_name(config)))
            fitting += 1
            if fitting == 2:
                break
    if not found:
        raise ConfigError(
            f"no design of {base.bits} bits with groups of {base.gm} x {base.tn} fits into "
            f"{share:.0%} of {board.name}; use a larger board or smaller groups"
        )
    return found


def design_name(config: AcceleratorConfig) -> str:
    """A name that tells the array, such as "8-sparse-m32-k3-f8-r4-t5x784-b4"."""
    kind = "sparse" if config.sparse else "dense"
    return (
        f"{config.bits}-{kind}-m{config.tm}-k{config.pk}-f{config.pf}-r{config.rows_per_cycle}"
        f"-t{config.filter_tiles}x{config.features}-b{config.port_positions}"
    )


def macs_a_cycle(config: AcceleratorConfig) -> int:
    """P_M P_K P_F T_N."""
    return config.pm * config.pk * config.pf * config.tn


def rank_designs(
    configs: Iterable[AcceleratorConfig], networks: Mapping[str, Network]
) -> list[AcceleratorConfig]:
    """The designs, those first whose networks are bound to the fewest cycles (geometric mean)."""

    def bound(config: AcceleratorConfig) -> float:
        return sum(
            math.log(sum(least_cycles(config, *layer) for layer in network.convolutions))
            for network in networks.values()
        )

    return sorted(configs, key=bound)


def least_cycles(config: AcceleratorConfig, shape: ConvShape, kr: int, kc: int) -> int:
    """Cycles that a convolution takes at least: to compute it as one tile, or to load its input.

    The input is loaded once for `filter_tiles` filter tiles, B positions a cycle.
    """
    channel_tiles, passes = ceil_div(shape.channels, config.tn), ceil_div(shape.filters, config.tm)
    rows = ceil_div(math.prod(shape.out_size), config.pf)
    compute = passes * channel_tiles * conv_words(config, shape, kr, kc) * rows
    loads = ceil_div(passes, config.filter_tiles) * channel_tiles
    # rows that lie between the windows are not loaded
    seen = shape.in_size[2]
    for axis in (0, 1):
        between = shape.kernel[axis] < shape.stride[axis]
        used = shape.out_size[axis] * shape.kernel[axis]
        seen *= used if between else shape.in_size[axis]
    return max(compute, loads * seen // config.port_positions)


def evaluate(
    configs: Iterable[AcceleratorConfig], networks: Mapping[str, Network], clock_mhz: float
) -> Iterator[Candidate]:
    """The candidates among the designs; one that a network does not fit is left out."""
    for config in configs:
        try:
            latency = {
                name: measure_latency(config, network, clock_mhz)
                for name, network in networks.items()
            }
        except CompileError:
            continue
        yield Candidate(config, estimate_resources(config), latency)


def measure_latency(config: AcceleratorConfig, network: Network, clock_mhz: float) -> Latency:
    """The modelled latency of a network: its tasks one after the other."""
    convolutions = whole = 0
    for work in network.work(config):
        cycles = task_cost(config, work).cycles
        whole += cycles
        convolutions += cycles if work.columns and math.prod(work.out_size) > 1 else 0
    return Latency(convolutions / (clock_mhz * 1e3), whole / (clock_mhz * 1e3))


def pareto_front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that are faster than every one that takes no more DSPs."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.resources.dsp, c.mean_ms)):
        if not front or candidate.mean_ms < front[-1].mean_ms:
            front.append(candidate)
    return front
