"""Masks of pruned weights: what pruning set to zero is zero after each optimizer step.

A mask is made by pruning and is stored with the weights (`compress/weights.py`). It is never read
off the zeros of a network: a layer that is initialised with zeros has to learn.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pynq_kgrc.errors import ConfigError
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.models.trace import trace
from pynq_kgrc.quant import Array

Pruned = Mapping[str, Tensor]
"""By layer, bool like its weight: True where the weight is pruned."""


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weight of every convolution and fully connected layer, by the layer's name."""
    found = {}
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        # the scale of a batch norm has one axis
        if isinstance(weight, nn.Parameter) and weight.ndim > 1:
            found[name] = weight
    return found


def chosen_weights(module: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    """The weights of these layers.

    Raises:
        ConfigError: no convolution or fully connected layer has that name, or its weight is not a
            parameter.
    """
    own = weights_of(module)
    chosen = {}
    for name in names:
        weight = own.get(name)
        layer = dict(module.named_modules()).get(name) if weight is None else None
        if isinstance(getattr(layer, "weight", None), Tensor):
            raise ConfigError(
                f"the weight of {name!r} is computed from other parameters, as by "
                f"torch.nn.utils.prune or weight_norm; make it permanent first (prune.remove, "
                f"parametrize.remove_parametrizations)"
            )
        if weight is None:
            known = ", ".join(list(own)[:6])
            kind = type(module).__name__
            raise ConfigError(f"the recipe names {name!r}; {kind} has {known}, ...")
        chosen[name] = weight
    return chosen


def zero_places(module: nn.Module) -> dict[str, Tensor]:
    """Where the weights of a module are zero now; layers without a zero are left out.

    This is a mask only if it is known that pruning made all of these zeros.
    """
    return {
        name: (weight.detach() == 0).cpu()
        for name, weight in weights_of(module).items()
        if bool((weight == 0).any())
    }


def merged(*masks: Pruned) -> dict[str, Tensor]:
    """The places that any of these masks prunes."""
    found: dict[str, Tensor] = {}
    for mask in masks:
        for name, places in mask.items():
            found[name] = found[name] | places.cpu() if name in found else places.cpu()
    return found


def list_pruned(pruned: Pruned) -> str:
    """The list that is printed when a training starts: each pruned layer and its share of zeros."""
    parts = [
        # the layers of a `FakeQuantNetwork` have this prefix, and slashes for dots
        f"{name.removeprefix('convolutions.').replace('/', '.')} {float(places.float().mean()):.1%}"
        for name, places in pruned.items()
    ]
    if not parts:
        return "pruned weights, which stay zero: none"
    return f"pruned weights, which stay zero: {', '.join(parts)} of the weights"


def traced_zeros(module: nn.Module, spec: ClipSpec, pruned: Pruned) -> dict[str, Array]:
    """By layer of the traced graph, bool like its weight: what has to stay zero there.

    That is what is pruned, and what the tracer fills in for grouped and dilated convolutions. It is
    found with a copy of the module whose other weights are all above zero.

    Raises:
        ConfigError: as `Masks`.
        CompileError: a module that cannot be traced.
    """
    filled = copy.deepcopy(module).cpu()
    with torch.no_grad():
        for parameter in filled.parameters():
            size = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.fill_(1 / size)  # so that no sum of many inputs overflows
        for buffer in filled.buffers():
            if buffer.is_floating_point():
                buffer.fill_(1)
    Masks(filled, pruned).apply()
    return {
        layer.name: layer.weight == 0
        for layer in trace(filled, spec).convolutions()
        if layer.weight is not None and (layer.weight == 0).any()
    }


class Masks:
    """The pruned weights of a module, which training keeps at zero.

    >>> layer = nn.Linear(2, 1)
    >>> masks = Masks(nn.Sequential(layer), {"0": torch.tensor([[True, False]])})
    >>> layer.weight.data = torch.tensor([[5.0, 6.0]])
    >>> masks.apply()
    >>> layer.weight.data
    tensor([[0., 6.]])

    Raises:
        ConfigError: a layer that the module does not have, or a mask of another shape.
    """

    def __init__(self, module: nn.Module, pruned: Pruned) -> None:
        self._weights = chosen_weights(module, list(pruned))
        for name, weight in self._weights.items():
            if pruned[name].shape != weight.shape:
                raise ConfigError(
                    f"the mask of {name} has the shape {list(pruned[name].shape)}; its weight has "
                    f"{list(weight.shape)}"
                )
        self.zeros = {name: pruned[name].to(w.device) for name, w in self._weights.items()}
        """By layer, bool like the weight, on its device: kept at zero."""

    def apply(self) -> None:
        """Set the masked weights to zero, also where they are -0, infinite or NaN."""
        with torch.no_grad():
            for name, zeros in self.zeros.items():
                self._weights[name].masked_fill_(zeros, 0.0)

    def apply_after(self, optimizer: Optimizer) -> None:
        """Call `apply` after each step of the optimizer.

        KRP paper, equation (3), with the mask on the weight rather than on its gradient: the
        optimizer still keeps momentum for a pruned weight, which has no effect.
        """
        optimizer.register_step_post_hook(lambda *_: self.apply())

    @property
    def kept(self) -> float:
        """The fraction of the weights of the masked layers that is not masked."""
        total = sum(zeros.numel() for zeros in self.zeros.values())
        masked = sum(int(zeros.sum()) for zeros in self.zeros.values())
        return 1 - masked / total if total else 1.0
