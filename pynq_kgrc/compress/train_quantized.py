"""Quantization-aware training: ADMM towards the codes, then training of a `FakeQuantNetwork`.

`calibrate.py` quantizes after training, and gives the formats that this starts from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn

from pynq_kgrc.compress.admm import Admm, quantize_to_powers, quantizing_projections, top_power
from pynq_kgrc.compress.augment import Augmentation
from pynq_kgrc.compress.fake_quant import CodedConvolution, FakeQuantNetwork
from pynq_kgrc.compress.masks import Pruned, weights_of
from pynq_kgrc.compress.training import TrainConfig, TrainingSetup
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.graph import Graph
from pynq_kgrc.quant import BITS, Array

QUANTIZE = TrainConfig(epochs=10, lr=2e-4, weight_decay=0.0, augment=Augmentation(erase=0.1))
"""Default settings of quantization-aware training."""

POWER_GROUPS = (0.5, 0.75, 0.875, 1.0)
"""The fraction of the weights that are frozen at powers of two after each group, as INQ has it
(incremental network quantization: Zhou et al., ICLR 2017)."""


def train_quantized(
    graph: Graph,
    config: TrainConfig,
    setup: TrainingSetup,
    folder: Path,
    teacher: nn.Module | None = None,
    device: str = "cpu",
    powers: bool = False,
    pruned: Mapping[str, Array] | None = None,
) -> Graph:
    """The graph after quantization-aware training; pruned weights stay zero.

    Args:
        graph: from `choose_quant`, which also chose the width.
        config: settings; few epochs at a low rate are enough.
        setup: training and test clips.
        folder: for this run alone.
        teacher: the float network, for distillation.
        device: where to train.
        powers: end with weights of 0 and powers of two only, frozen in groups, the largest first
            (INQ): 3-bit ones at a width of 4, 4-bit ones at a width of 8.
        pruned: by layer of the graph, bool like its weight: what stays zero
            (`masks.traced_zeros`). By default the zeros of the graph, except those of layers that
            are zero as a whole.

    Raises:
        ConfigError: a mask that does not fit the graph; powers of two at 16 bits.
        ModelError: the folder holds another run.
    """
    network = FakeQuantNetwork(graph).to(device)
    if pruned is None:
        pruned = {
            layer.name: layer.weight == 0
            for layer in graph.convolutions()
            if layer.weight is not None and layer.weight.any() and not layer.weight.all()
        }
    by_key = {name.replace(".", "/"): places for name, places in pruned.items()}
    masks = {f"convolutions.{key}": torch.from_numpy(places) for key, places in by_key.items()}
    if not powers:
        setup.train(network, config, folder, teacher=teacher, pruned=masks)
        return network.cpu().to_graph()
    bits = {4: 3, 8: 4}.get(graph.convolutions()[0].weight_quant.bits)  # type: ignore[union-attr]
    if bits is None:
        raise ConfigError("powers of two are for designs of 8 or 4 bits")
    part = msgspec.structs.replace(config, epochs=max(1, config.epochs // len(POWER_GROUPS)))
    for i, fraction in enumerate(POWER_GROUPS):
        freeze_powers(network, fraction, bits, by_key)
        setup.say(f"powers of two: {fraction:.1%} of the weights are frozen")
        # once all weights are frozen, biases and the scales of formats adapt to them
        group = folder / f"group{i + 1}"
        setup.train(network, part, group, teacher=teacher, pruned=masks)
    return network.cpu().to_graph()


def freeze_powers(
    network: FakeQuantNetwork, fraction: float, bits: int, pruned: Mapping[str, Array]
) -> None:
    """Freeze the largest `fraction` of each layer's weights at powers of two.

    `pruned`, by key of `network.convolutions`, is frozen at 0.
    """
    for name, layer in network.convolutions.items():
        assert isinstance(layer, CodedConvolution)
        weight = layer.weight.detach().cpu().numpy()
        if layer.frozen is None:  # the first group fixes the scale of each filter
            largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1)
            layer.fix_scale(np.where(largest > 0, largest, 1.0) / top_power(bits))
        size = np.abs(weight)
        gone = pruned.get(name, np.zeros(weight.shape, bool))
        kept = size[~gone]
        edge = np.quantile(kept, 1 - fraction) if kept.size and fraction < 1 else 0.0
        # zeros that are not pruned are the smallest weights: frozen last
        chosen = size >= edge if fraction == 1 or edge > 0 else size > 0
        scale = layer.scale().detach().cpu().numpy()
        layer.freeze(chosen | gone, quantize_to_powers(weight, bits, scale))


def approach_codes(
    module: nn.Module,
    bits: int,
    config: TrainConfig,
    setup: TrainingSetup,
    folder: Path,
    teacher: nn.Module | None = None,
    rho: float = 1e-2,
    pruned: Pruned | None = None,
) -> None:
    """Pull a float network's weights to codes by ADMM: 16 bits, then 8, then 4, down to `bits`.

    The learning rate halves from one width to the next (KGRC paper, section VI-A). At the end the
    weights are codes times one scale for each filter, which folding batch norm does not change.
    Pruned weights stay zero. Activations are not quantized here, but in `train_quantized`.

    Raises:
        ConfigError: a width that accelerators do not have.
    """
    if bits not in BITS:
        raise ConfigError(f"bits={bits}; accepted are {BITS}")
    widths = [width for width in BITS if width >= bits]
    names = list(weights_of(module))
    for i, width in enumerate(widths):
        part = msgspec.structs.replace(
            config, lr=config.lr / 2**i, epochs=max(1, config.epochs // len(widths))
        )
        admm = Admm(module, quantizing_projections(module, names, width, False, pruned), rho)
        setup.say(f"ADMM towards codes of {width} bits")
        setup.train(module, part, folder / f"{width}-bit", admm, teacher, f"rho {rho}", pruned)
        if width == bits:
            admm.settle()
