"""Search for designs: which ones fit a board, and the latency of whole networks on them.

Everything here is modelled: latency by `latency`, with memory; resources by `resources`. There are
some ten thousand designs. A lower bound that takes microseconds ranks them, and the full
cost model evaluates only the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import msgspec

from pynq_kgrc.accelerator.boards import CLOCK_MHZ, REFERENCE, Board, Memory
from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.latency import task_time
from pynq_kgrc.accelerator.paper import KeptConv
from pynq_kgrc.accelerator.resources import PACKED, Resources, estimate_resources
from pynq_kgrc.accelerator.tiling import PORTS, Work, conv_words
from pynq_kgrc.errors import CompileError, ConfigError
from pynq_kgrc.graph import ConvShape
from pynq_kgrc.quant import ceil_div


@dataclass(frozen=True)
class Network:
    """What the search needs to know about a network."""

    convolutions: Sequence[KeptConv]
    """Shapes, kept rows and columns: enough to rank designs."""
    work: Callable[[AcceleratorConfig], Sequence[Work]]
    """The network's tasks on a design; raises CompileError if the design cannot run them."""


MOST_GROUPS = 8
"""Largest T_M / G_M (kernel groups along the filters of a tile) to try."""

MOST_POSITIONS = 32
"""Largest P_F to try."""

FEATURES = ((4, 14, 14), (4, 7, 14))
"""T_D, T_H, T_W to try; only their product matters."""

FILTER_TILES = (2, 3, 4, 5, 6, 8)
"""Numbers of filter tiles whose sums are held at the same time, to try."""

BEATS = (2, 4, 8)
"""Positions in a beat of a map port, to try; 8 are 512 bits at 8 bits and T_N = 8. Narrow ports
take less block RAM, which small boards lack."""

SHARE = 0.8
"""Largest share of each resource that a design may use: above it routing fails (eq. 14, rho)."""


@dataclass(frozen=True)
class Latency:
    """Modelled milliseconds of one clip, with memory."""

    convolutions: float
    """Without fully connected layers and pools, as the KGRC paper counts latency."""
    whole: float
    """All tasks."""


@dataclass(frozen=True)
class Candidate:
    """A design with its modelled resources and latencies."""

    config: AcceleratorConfig
    resources: Resources
    latency: Mapping[str, Latency]
    """By the name of the network."""

    @property
    def mean_ms(self) -> float:
        """Geometric mean of the networks' convolutions: no network weighs more than another."""
        return math.exp(
            sum(math.log(each.convolutions) for each in self.latency.values()) / len(self.latency)
        )


def list_designs(
    base: AcceleratorConfig, board: Board, share: float = SHARE
) -> list[AcceleratorConfig]:
    """Designs with the kernel groups and bit width of `base` that use most of a board.

    For each array the two largest P_F that fit are listed: a larger P_F is faster, but may divide
    the networks' maps with a larger remainder.

    Raises:
        ConfigError: no design fits.
    """
    found: list[AcceleratorConfig] = []
    divisors = [rows for rows in range(1, base.gm + 1) if base.gm % rows == 0]
    for groups, rows, pk, tile, filter_tiles, beat in product(
        range(1, MOST_GROUPS + 1), divisors, range(1, base.tk + 1), FEATURES, FILTER_TILES, BEATS
    ):
        if groups * base.gm % base.tn:
            continue
        filters, positions = PACKED[base.bits]
        dsp_per_position = groups * ceil_div(rows, filters) * pk * base.tn / positions
        most = min(MOST_POSITIONS, int(share * board.dsp / dsp_per_position))
        fitting = 0
        for pf in range(most, 0, -1):
            try:
                config = replace(
                    base,
                    tm=groups * base.gm,
                    pm=groups * rows,
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
            used = estimate_resources(config, board)
            if config.port_positions != beat or used.share(board) > share:
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
    """A name made of the design's numbers, such as "8-sparse-m32-k3-f8-r4-t5x784-b4"."""
    kind = "sparse" if config.sparse else "dense"
    return (
        f"{config.bits}-{kind}-m{config.tm}-k{config.pk}-f{config.pf}-r{config.rows_per_cycle}"
        f"-t{config.filter_tiles}x{config.features}-b{config.port_positions}"
    )


def macs_a_cycle(config: AcceleratorConfig) -> int:
    """Multiply-accumulates per cycle at full use: P_M P_K P_F T_N."""
    return config.pm * config.pk * config.pf * config.tn


def rank_designs(
    configs: Iterable[AcceleratorConfig], networks: Mapping[str, Network]
) -> list[AcceleratorConfig]:
    """The designs, sorted by `least_ms`."""
    return sorted(configs, key=lambda config: least_ms(config, networks))


def least_ms(config: AcceleratorConfig, networks: Mapping[str, Network]) -> float:
    """A lower bound of `Candidate.mean_ms` at the default clock."""
    cycles = [
        sum(least_cycles(config, *layer) for layer in network.convolutions)
        for network in networks.values()
    ]
    return math.exp(sum(map(math.log, cycles)) / len(cycles)) / (CLOCK_MHZ * 1e3)


def least_cycles(config: AcceleratorConfig, shape: ConvShape, kr: int, kc: int) -> int:
    """A lower bound of a convolution's cycles: computing it as one tile, or loading its input.

    The input is loaded once for `filter_tiles` filter tiles, B positions a cycle, or what the ports
    of the memory `boards.REFERENCE` bring.
    """
    channel_tiles = ceil_div(shape.channels, config.tn)
    filter_tiles = ceil_div(shape.filters, config.tm)
    sum_rows = ceil_div(math.prod(shape.out_size), config.pf)
    compute = filter_tiles * channel_tiles * conv_words(config, shape, kr, kc) * sum_rows
    loads = ceil_div(filter_tiles, config.filter_tiles) * channel_tiles
    # rows between two windows (kernel smaller than stride) are not loaded
    loaded = shape.in_size[2]
    for axis in (0, 1):
        skips = shape.kernel[axis] < shape.stride[axis]
        used = shape.out_size[axis] * shape.kernel[axis]
        loaded *= used if skips else shape.in_size[axis]
    beats = loads * loaded / config.port_positions
    port = config.beat_bytes / REFERENCE.port_bytes(CLOCK_MHZ) / PORTS
    return int(max(compute, beats, beats * port))


def evaluate(
    configs: Iterable[AcceleratorConfig],
    networks: Mapping[str, Network],
    clock_mhz: float = CLOCK_MHZ,
    memory: Memory = REFERENCE,
    board: Board | None = None,
) -> Iterator[Candidate]:
    """Candidates of the designs; a design that cannot run one of the networks is left out.

    Resources are those on `board`, whose UltraRAMs take some memories; without it, block RAMs.
    """
    for config in configs:
        try:
            latency = {
                name: model_latency(config, network, clock_mhz, memory)
                for name, network in networks.items()
            }
        except CompileError:
            continue
        yield Candidate(config, estimate_resources(config, board), latency)


def model_latency(
    config: AcceleratorConfig,
    network: Network,
    clock_mhz: float = CLOCK_MHZ,
    memory: Memory = REFERENCE,
) -> Latency:
    """Modelled latency, with memory, of a network: its tasks one after the other."""
    convolutions = whole = 0
    for work in network.work(config):
        cycles = task_time(config, work, memory, clock_mhz).cycles
        whole += cycles
        convolutions += cycles if work.columns and math.prod(work.out_size) > 1 else 0
    return Latency(convolutions / (clock_mhz * 1e3), whole / (clock_mhz * 1e3))


def pareto_front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates that are faster than all others with as many or fewer DSPs."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.resources.dsp, c.mean_ms)):
        if not front or candidate.mean_ms < front[-1].mean_ms:
            front.append(candidate)
    return front


class ResourceShares(msgspec.Struct, frozen=True):
    """Shares of a board's DSPs, block RAMs, LUTs and UltraRAMs, from 0 to 1."""

    dsp: float
    bram36: float
    lut: float
    uram: float = 0.0


class DesignReport(msgspec.Struct, frozen=True):
    """A candidate as the command `explore` reports it; every number is modelled."""

    name: str
    macs_a_cycle: int
    mean_ms: float
    latency_ms: dict[str, Latency]
    """By the name of the network."""
    resources: Resources
    share: ResourceShares
    pareto: bool
    """Whether the design is on the Pareto front of latency and DSPs."""
    config: AcceleratorConfig


class SearchReport(msgspec.Struct, frozen=True):
    """What the command `explore` found; ``--json`` prints it."""

    board: str
    clock_mhz: float
    compiled_for: DesignReport
    """The design of the programs that were given."""
    designs: list[DesignReport]
    """Designs that fit the board, the fastest first."""
    figures: str
    """What the latencies are: `Memory.describe`."""


def report_design(candidate: Candidate, board: Board, pareto: bool) -> DesignReport:
    """A candidate on a board, its latencies and shares rounded to three digits."""
    used = candidate.resources
    return DesignReport(
        name=candidate.config.name,
        macs_a_cycle=macs_a_cycle(candidate.config),
        mean_ms=round(candidate.mean_ms, 3),
        latency_ms={
            name: Latency(round(each.convolutions, 3), round(each.whole, 3))
            for name, each in candidate.latency.items()
        },
        resources=used,
        share=ResourceShares(
            **{name: round(share, 3) for name, share in used.shares(board).items()}
        ),
        pareto=pareto,
        config=candidate.config,
    )
