"""Zeros that stay: whatever an optimizer does, a pruned weight is exactly zero after each step."""

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
        if (
            isinstance(weight, nn.Parameter) and weight.ndim > 1
        ):  # a gain of batch norm has one axis
            found[name] = weight
    return found


def chosen_weights(module: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    """The weights of these layers.

    Raises:
        ConfigError: a name that no convolution or fully connected layer bears.
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
    """Where the weights of a module are zero now, to hold them there in training.

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
        """By layer, where its weight is held at zero; layers without a zero are not in it."""

    def apply(self) -> None:
        """Set the weights to zero again, negative zeros and overflows included."""
        with torch.no_grad():
            for name, zeros in self.zeros.items():
                self._weights[name].masked_fill_(zeros, 0.0)

    def hold(self, optimizer: Optimizer) -> None:
        """Do so after each of the optimizer's steps.

        Momentum and weight decay of a pruned weight go on inside the optimizer, and come to
        nothing: KRP paper, equation (3), with the mask on the weight rather than its gradient.
        """
        optimizer.register_step_post_hook(lambda *_: self.apply())

    @property
    def kept(self) -> float:
        """The fraction of the weights of the pruned layers that is not held at zero."""
        total = sum(zeros.numel() for zeros in self.zeros.values())
        held = sum(int(zeros.sum()) for zeros in self.zeros.values())
        return 1 - held / total if total else 1.0
