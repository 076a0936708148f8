"""From a torch network and a few clips to a program, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compress.calibrate import DEFAULT_METHOD, choose_quant
from pynq_kgrc.compress.patterns import Rates, prune
from pynq_kgrc.graph import ClipSpec, Graph
from pynq_kgrc.models.trace import trace
from pynq_kgrc.program import Program
from pynq_kgrc.quant import Array


def compile_network(
    network: Any,
    clip: ClipSpec,
    clips: Iterable[Array],
    config: AcceleratorConfig,
    rates: Mapping[str, Rates] | None = None,
    labels: Sequence[str] = (),
    method: str = DEFAULT_METHOD,
) -> Program:
    """Trace, prune, quantize on the clips and lower a torch network.

    Args:
        network: a torch module that takes [1, C, D, H, W], C being the channels of the clip.
        clip: the clip that it takes.
        clips: a few real clips to calibrate on, uint8 frames [D, H, W, C].
        config: the accelerator to compile for.
        rates: by the name of a layer, the rates to prune it at; without, nothing is pruned.
        labels: names of the outputs, in order.
        method: how ranges are chosen: "minmax", "percentile" or "mse".

    Raises:
        CompileError: the accelerator cannot run an operator or a layer.
        ConfigError: the rates do not keep whole rows and columns.
    """
    graph = trace(network, clip, labels)
    return compile_graph(graph, clips, config, rates, method)


def compile_graph(
    graph: Graph,
    clips: Iterable[Array],
    config: AcceleratorConfig,
    rates: Mapping[str, Rates] | None = None,
    method: str = DEFAULT_METHOD,
) -> Program:
    """As `compile_network`, from a graph that has been traced."""
    graph = prune(graph, dict(rates or {}), config.group_size)
    normalised = (graph.clip.normalise(frames) for frames in clips)
    return lower(choose_quant(graph, normalised, config.bits, method), config)
