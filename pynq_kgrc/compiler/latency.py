"""What pruning a layer saves: cycles of the compiled program, with fewer weights kept.

The cycles are those of `accelerator/latency.py`, which also judges the finished program. They are
modelled with memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.cost import layer_work
from pynq_kgrc.accelerator.cutting import cut_convolution, cut_pools
from pynq_kgrc.accelerator.latency import task_time
from pynq_kgrc.accelerator.tiling import NO_POOL, Work, pool_work
from pynq_kgrc.compiler.lower import cut_drafts, fold_clip, fuse, lower, place_tensors
from pynq_kgrc.compiler.pack import pack
from pynq_kgrc.compress.patterns import Rates, prune
from pynq_kgrc.compress.recipes import (
    NEARER,
    TOLERANCE,
    LayerRecipe,
    build_patterns,
    choose_rates,
)
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.graph import ConvShape, Graph, Layer
from pynq_kgrc.program import ConvTask, Program, Task
from pynq_kgrc.quant import Array, QuantParams


def program_cycles(program: Program) -> int:
    """Modelled cycles of one clip: all tasks, pools and copies included, one after the other."""
    return sum(_cycles(program, task) for task in program.tasks)


def compile_shapes(graph: Graph, config: AcceleratorConfig) -> Program:
    """The program of a float graph whose tensors all have one format of codes.

    Its answers mean nothing, but it takes as long as the program of the calibrated graph, and no
    clip has to run in float.

    Raises:
        CompileError: the accelerator cannot run a layer.
    """
    return lower(_of_one_format(graph, config), config)


def list_work(
    graph: Graph, config: AcceleratorConfig, rates: Mapping[str, Rates]
) -> list[tuple[str, Work]]:
    """The tasks of a dense graph, by name, if its layers were pruned by `rates`.

    No weight is looked at but the first layer's: every kernel group is taken as enabled. It takes
    a moment where `compile_shapes` takes a minute.

    Raises:
        CompileError: the accelerator cannot run a layer.
    """
    graph = _of_one_format(graph, config)
    graph, drafts, _ = fold_clip(graph, fuse(graph, config), config)
    drafts, places = place_tensors(graph, drafts, config.tn)
    drafts, _ = cut_drafts(graph, drafts, places)
    found = []
    for draft in drafts:
        shape, name, out = draft.layer.shape, draft.layer.name, draft.output.out_quant
        assert shape is not None and out is not None
        wide = out.bits > config.bits
        if isinstance(shape, ConvShape):
            kr, kc = rates.get(name, Rates()).kept(config.group_size, shape.taps)
            pool = NO_POOL if draft.pool is None else draft.pool.kernel
            shortcut = draft.shortcut is not None
            work = layer_work(config, shape, kr, kc, pool, shortcut=shortcut, wide=wide)
        else:
            work = pool_work(config, shape, wide=wide, name=name)
        found.append((name, work))
    return found


def _of_one_format(graph: Graph, config: AcceleratorConfig) -> Graph:
    """The graph as calibration would leave it, but for its formats and weights.

    Weights are at least half the largest of their layer, zeros apart: small random ones, as a layer
    with many inputs has them, would become codes of zero and take neither time nor space.
    """
    layers = []
    for layer in cut_pools(graph).layers:
        bits = 16 if layer.name == graph.output else config.bits
        weight = layer.weight
        if weight is not None and weight.any():
            weight = np.sign(weight) * (1 + np.abs(weight) / np.abs(weight).max()) / 2
            weight = weight.astype(np.float32)
        layers.append(
            dataclasses.replace(layer, weight=weight, out_quant=QuantParams(bits, 1 / 16))
        )
    return dataclasses.replace(graph, layers=tuple(layers))


@dataclass(frozen=True, eq=False)
class PrunedCycles:
    """A cost for `compress.recipes.choose_rates`: cycles of the task that a layer becomes.

    The task keeps what the compiler fused into it: its max pool, its shortcut.
    """

    program: Program
    """The network before pruning, compiled for the design."""

    @property
    def folded(self) -> str | None:
        """The first layer, if the host folds it. It costs the same whatever is kept of it: folding
        mixes the columns of a group, so that what packing gains depends on each single weight.
        """
        if self.program.fold is None:
            return None
        return next(task.name for task in self.program.tasks if task.source == self.program.source)

    def __call__(self, layer: Layer, kept: Array) -> float:
        """Cycles of `layer` if the weights `kept` (bool, as its weight) are all it has.

        Raises:
            ConfigError: the program has no convolution of that name.
        """
        return task_time(self.program.config, self.work(layer, kept)).cycles

    def work(self, layer: Layer, kept: Array) -> Work:
        """What the array does for `layer` if the weights `kept` are all it has.

        Raises:
            ConfigError: the program has no convolution of that name.
        """
        for task in self.program.tasks:
            if isinstance(task, ConvTask) and task.name == layer.name:
                if task.name == self.folded:
                    return self.program.work(task)
                masked = dataclasses.replace(layer, weight=kept.astype(np.int8))
                # as the compiler cuts a layer with too many taps
                cut = cut_convolution(masked)[-1]
                assert cut.weight is not None
                codes = cut.weight.reshape(*cut.weight.shape[:2], -1)
                weights = pack(codes, self.program.config)
                changed = msgspec.structs.replace(task, shape=cut.shape, weights=weights)
                return self.program.work(changed)
        raise ConfigError(f"{self.program.name} has no convolution {layer.name!r}")

    def rest(self, layers: list[Layer]) -> float:
        """Cycles of the tasks that none of these layers becomes: pools and copies."""
        names = {layer.name for layer in layers}
        return sum(_cycles(self.program, t) for t in self.program.tasks if t.name not in names)


_FOLDED = "stays dense, as the host folds its taps into channels"


@dataclass(frozen=True)
class LatencySearch:
    """Rates that were searched for a latency, and what the compiled program gains by them."""

    layers: dict[str, LayerRecipe]
    design: str
    asked: float
    """Wanted reduction of the modelled cycles."""
    dense_cycles: int
    cycles: int
    left: str | None = None
    """A first layer that might have been pruned, but is folded and stays dense."""

    @property
    def reached(self) -> float:
        """The reduction at these rates. With patterns of rows and columns it does not depend on
        which weights training keeps.
        """
        return self.dense_cycles / self.cycles

    def __str__(self) -> str:
        """What was asked and reached, in one sentence."""
        told = (
            f"asked for {self.asked:.2f}x fewer cycles, reached {self.reached:.2f}x on "
            f"{self.design} (modelled with memory by accelerator/latency.py)"
        )
        if self.left:
            told += f"; {self.left} {_FOLDED}"
        if abs(self.reached / self.asked - 1) <= TOLERANCE:
            return told
        return f"{told}; the search found no rates nearer"


def choose_rates_by_latency(
    graph: Graph,
    names: Iterable[str],
    pattern: str,
    reduction: float,
    compile_graph: Callable[[Graph], Program],
) -> LatencySearch:
    """As `choose_rates`, for `reduction` times fewer modelled cycles of the whole program.

    All tasks count: pools, copies, and the layers that are not pruned. The pruned graph is
    compiled at the end, so that `reached` is a count and not a prediction.

    Args:
        graph: traced and dense.
        names: layers that may be pruned.
        pattern: one of `recipes.NAMES`.
        reduction: how many times fewer cycles.
        compile_graph: gives the program of a float graph on the design; called twice.

    Raises:
        ConfigError: as `choose_rates`.
    """
    dense = compile_graph(graph)
    cost = PrunedCycles(dense)
    rest = cost.rest(graph.convolutions())
    design, names = dense.config, list(names)
    left = cost.folded if cost.folded in names else None
    try:
        layers = choose_rates(graph, names, pattern, reduction, design, cost, rest, NEARER)
    except ConfigError as error:
        if left is None:
            raise
        raise ConfigError(f"{error}; {left} {_FOLDED}") from None
    pruned = compile_graph(prune(graph, build_patterns(layers, design), design.group_size))
    return LatencySearch(
        layers, design.name, reduction, program_cycles(dense), program_cycles(pruned), left
    )


def _cycles(program: Program, task: Task) -> int:
    return task_time(program.config, program.work(task)).cycles
