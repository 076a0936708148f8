"""Penalties that drive units of a weight to zero: group lasso, plain or reweighted.

KGRC paper, equations (1) to (8) and Algorithm 1; RT3D, equations (1) to (3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pynq_kgrc.compress.masks import chosen_weights
from pynq_kgrc.compress.patterns import Units
from pynq_kgrc.compress.recipes import Recipe
from pynq_kgrc.errors import ConfigError

Norm = Literal["l1", "l2", "mixed"]
NORMS = ("l1", "l2", "mixed")

EPSILON = 1e-3
"""Keeps eqs. (4) and (7) finite; relative to the mean square of the norms of a layer."""


class GroupLasso:
    """lambda * sum over layers and units of P * ||W_unit||_g; P is 1 (RT3D, eq. (2)).

    A pattern of rows and columns has both sums, each at half the factor (KGRC paper, eq. (8)).
    A norm is divided by the square root of the unit's size, so that units of all sizes count alike.

    Args:
        module: the network in training.
        recipe: the pattern of each layer, which defines its units.
        factor: lambda.
        norm: "l1" (g = 1), "l2" (g = 2) or "mixed", their mean.
        costs: MACs of each layer; the penalty of a layer is then proportional to them.

    Raises:
        ConfigError: a layer that the network does not have, or an unknown norm.
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        factor: float,
        norm: Norm = "l2",
        costs: Mapping[str, float] | None = None,
    ) -> None:
        if norm not in NORMS:
            raise ConfigError(f"norm={norm!r}; accepted are {', '.join(NORMS)}")
        weights = chosen_weights(module, list(recipe))
        mean = sum((costs or {}).get(name, 0.0) for name in recipe) / max(1, len(recipe))
        self.factor, self.norm = factor, norm
        self._terms = []
        for name, weight in weights.items():
            units = recipe[name].units(tuple(weight.shape))
            scale = (costs[name] / mean if costs else 1.0) / max(1, len(units))
            self._terms += [_Term(weight, unit, scale) for unit in units]

    def loss(self) -> Tensor:
        """The penalty of the present weights."""
        parts = [
            term.scale * (term.reweights * term.norms(self.norm)).sum() for term in self._terms
        ]
        return self.factor * torch.stack(parts).sum()

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Nothing changes."""

    def settled(self) -> bool:
        """False: the penalty acts in every epoch."""
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"reweights": [term.reweights for term in self._terms]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for term, reweights in zip(self._terms, state["reweights"], strict=True):
            term.reweights = reweights


class Reweighted(GroupLasso):
    """Group lasso with P = 1 / (||W_unit||^2 + epsilon), computed `updates` times (eqs. (4), (7)).

    Small units are penalized more, large ones less. P is divided by its mean over the layer, so
    that an update does not change the scale of lambda.
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        factor: float,
        norm: Norm = "l2",
        costs: Mapping[str, float] | None = None,
        updates: int = 4,
    ) -> None:
        super().__init__(module, recipe, factor, norm, costs)
        if updates < 1:
            raise ConfigError(f"updates={updates}; use 1 or more")
        self.updates = updates

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Algorithm 1, lines 4 to 6: at evenly spread epochs, the first one included."""
        if epoch * self.updates // epochs == (epoch - 1) * self.updates // epochs:
            return
        with torch.no_grad():
            for term in self._terms:
                squares = term.norms(self.norm) ** 2
                reweights = 1 / (squares + EPSILON * squares.mean().clamp_min(1e-12))
                term.reweights = reweights / reweights.mean()


class _Term:
    """One `Units` of one layer, as tensors on the weight's device."""

    def __init__(self, weight: nn.Parameter, units: Units, scale: float) -> None:
        self._weight = weight
        self._ids = torch.from_numpy(units.ids.ravel()).to(weight.device)
        self._count = units.count
        size = torch.bincount(self._ids, minlength=units.count).clamp_min(1)
        self._size = size.to(weight.dtype)
        self.scale = scale
        self.reweights = torch.ones(units.count, dtype=weight.dtype, device=weight.device)

    def norms(self, norm: str) -> Tensor:
        """[units], eq. (3) and (6): root mean square, mean magnitude, or the mean of both."""
        flat = self._weight.flatten()
        found = []
        if norm != "l1":
            # 1e-12: the derivative of the root is infinite at 0
            found.append((self._sum(flat**2) / self._size + 1e-12).sqrt())
        if norm != "l2":
            found.append(self._sum(flat.abs()) / self._size)
        return torch.stack(found).mean(0)

    def _sum(self, values: Tensor) -> Tensor:
        return torch.zeros_like(self.reweights).index_add(0, self._ids, values)
