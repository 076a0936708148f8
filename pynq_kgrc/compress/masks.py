"""Masks of pruned weights: a weight that is zero at the start is zero after each optimizer step."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from pynq_kgrc.errors import ConfigError


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
        ConfigError: no convolution or fully connected layer has that name.
    """
    own = weights_of(module)
    chosen = {}
    for name in names:
        weight = own.get(name)
        if weight is None:
            known = ", ".join(list(own)[:6])
            kind = type(module).__name__
            raise ConfigError(f"the recipe names {name!r}; {kind} has {known}, ...")
        chosen[name] = weight
    return chosen


class Masks:
    """The places where the weights of a module are zero now; training keeps them at zero.

    >>> layer = nn.Linear(2, 1)
    >>> layer.weight.data = torch.tensor([[0.0, 1.0]])
    >>> masks = Masks(nn.Sequential(layer))
    >>> layer.weight.data += 5
    >>> masks.apply()
    >>> layer.weight.data
    tensor([[0., 6.]])
    """

    def __init__(self, module: nn.Module) -> None:
        self._weights = weights_of(module)
        self.zeros = {
            name: weight.detach() == 0
            for name, weight in self._weights.items()
            if bool((weight == 0).any())
        }
        """By layer, bool like the weight: kept at zero. Layers without a zero are left out."""

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
