"""ADMM: pull weights to an allowed set in training, pruned or quantized.

Blockwise ADMM paper (Sun, Zhao et al.), equations (2) to (13) and Algorithm 1, with several
rho. The same iteration quantizes if the allowed weights are codes (KGRC paper, section IV-C).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pynq_kgrc.compress.calibrate import choose_weight_scale
from pynq_kgrc.compress.masks import Pruned, chosen_weights
from pynq_kgrc.compress.patterns import Pattern, project_pattern
from pynq_kgrc.compress.recipes import Recipe
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.quant import BITS, Array, weight_limit

Projection = Callable[[Array], Array]
"""A weight to the nearest allowed weight (eq. (13))."""


class Admm:
    """rho / 2 * sum of ||W - Z + V||^2 (eq. (11)); Z and V are updated between epochs.

    Args:
        module: the network in training.
        projections: by layer, the projection onto the allowed weights.
        rho: the penalty parameter of the first round.
        rounds: number of values of rho (multi-rho).
        growth: factor from one rho to the next.
        every: epochs between two updates of Z (eq. (13)) and V (eq. (9)).
        stop: epsilon of eq. (10), as a fraction of ||W||: in the last round the training ends when
            ||W - Z|| and the change of Z are at most that; 0: never before its last epoch.

    Raises:
        ConfigError: a layer that the network does not have.
    """

    def __init__(
        self,
        module: nn.Module,
        projections: Mapping[str, Projection],
        rho: float = 1e-3,
        rounds: int = 3,
        growth: float = 10.0,
        every: int = 1,
        stop: float = 0.0,
    ) -> None:
        if rho <= 0 or growth < 1 or rounds < 1 or every < 1 or not 0 <= stop < 1:
            raise ConfigError(
                f"rho={rho}, growth={growth}, rounds={rounds}, every={every}, stop={stop}; rho has "
                f"to be above 0, stop 0 to below 1, the others 1 or more"
            )
        self._weights = chosen_weights(module, list(projections))
        self._projections = dict(projections)
        self.rho, self.rounds, self.growth, self.every = rho, rounds, growth, every
        self.stop = stop
        self._now, self._last_round = rho, False
        self._z = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._v = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}

    def loss(self) -> Tensor:
        """Eq. (11) of the present weights."""
        parts = [((w - self._z[n] + self._v[n]) ** 2).sum() for n, w in self._weights.items()]
        return self._now / 2 * torch.stack(parts).sum()

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Z <- nearest allowed (W + V), V <- V + W - Z; V is reset where rho grows."""
        before = (epoch - 1) * self.rounds // epochs if epoch else -1
        now = epoch * self.rounds // epochs
        self._last_round = now == self.rounds - 1
        self._now = self.rho * self.growth**now
        if now != before:
            self._v = {name: torch.zeros_like(v) for name, v in self._v.items()}
        if epoch % self.every and now == before:
            return
        with torch.no_grad():
            for name, weight in self._weights.items():
                self._z[name] = self._project(name, weight + self._v[name])
                self._v[name] = self._v[name] + weight - self._z[name]

    def distance(self) -> float:
        """The largest ||W - nearest allowed|| / ||W|| of all layers: a measure of convergence."""
        with torch.no_grad():
            return max(
                float(
                    (weight - self._project(name, weight)).norm() / weight.norm().clamp_min(1e-12)
                )
                for name, weight in self._weights.items()
            )

    def settled(self) -> bool:
        """Eq. (10), in the last round: W is as near to Z, and Z to the next Z, as `stop` says."""
        if not self.stop or not self._last_round:
            return False
        with torch.no_grad():
            for name, weight in self._weights.items():
                z = self._project(name, weight + self._v[name])
                far = max(float((weight - z).norm()), float((z - self._z[name]).norm()))
                if far > self.stop * float(weight.norm()):
                    return False
        return True

    def settle(self) -> None:
        """Replace each weight by the nearest allowed one: the hard pruning of Algorithm 1."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(self._project(name, weight))

    def _project(self, name: str, weight: Tensor) -> Tensor:
        nearest = self._projections[name](weight.detach().cpu().numpy())
        return torch.from_numpy(nearest).to(weight.device, weight.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"z": self._z, "v": self._v}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._z, self._v = state["z"], state["v"]


def pruning_projections(recipe: Recipe) -> dict[str, Projection]:
    """By layer of a recipe, the projection onto its pattern."""
    return {name: partial(_pruned, pattern) for name, pattern in recipe.items()}


def _pruned(pattern: Pattern, weight: Array) -> Array:
    return project_pattern(weight, pattern)


def quantize_to(weight: Array, bits: int) -> Array:
    """The nearest weight of integer codes times a scale for each filter; zeros stay zero.

    Raises:
        ConfigError: a width that accelerators do not have.
    """
    if bits not in BITS:
        raise ConfigError(f"bits={bits}; accepted are {BITS}")
    limit = weight_limit(bits)
    scale = _column(choose_weight_scale(weight, bits, "mse"), weight)
    codes: Array = np.clip(np.floor(weight / scale + 0.5), -limit, limit)
    return np.asarray(codes * scale, weight.dtype)


def top_power(bits: int) -> int:
    """The largest code that is a power of two: 4 at 3 bits, 64 at 4 bits.

    Raises:
        ConfigError: another number of bits.
    """
    if bits not in (3, 4):
        raise ConfigError(f"powers of two take 3 or 4 bits, not {bits}")
    return 1 << ((1 << (bits - 1)) - 2)


def quantize_to_powers(weight: Array, bits: int, scale: Array | None = None) -> Array:
    """The nearest weight of 0 and powers of two times a scale; zeros stay zero.

    At 3 bits the codes are 0, +-1, +-2, +-4, which a 4-bit accelerator runs; at 4 bits 0 and
    +-1 to +-64, which an 8-bit one runs. The scale [M] of each filter is by default such that its
    largest weight has the largest code. The range is the same for both signs, as in INQ (Zhou et
    al., ICLR 2017); GSNQ (Sui et al., Sensors 2022) has a range for each sign.

    Raises:
        ConfigError: another number of bits.
    """
    top = top_power(bits)
    if scale is None:
        scale = np.abs(weight.reshape(weight.shape[0], -1)).max(axis=1) / top
    column = _column(scale, weight)
    codes = np.abs(weight / column)
    # three quarters of a power is the midpoint between it and the next smaller one
    exponent = np.clip(np.floor(np.log2(np.maximum(codes, 0.5) / 0.75)), 0, np.log2(top))
    powers = np.where(codes < 0.5, 0.0, 2.0**exponent)
    return np.asarray(np.sign(weight) * powers * column, weight.dtype)


def _column(scale: Array, weight: Array) -> Array:
    """[M] as [M, 1, ...]; the scale of a filter of zeros, which has no effect, is 1."""
    safe = np.where(scale > 0, scale, 1.0)
    return safe.reshape(-1, *[1] * (weight.ndim - 1))


def quantizing_projections(
    module: nn.Module,
    names: list[str],
    bits: int,
    powers: bool = False,
    pruned: Pruned | None = None,
) -> dict[str, Projection]:
    """By layer, the projection onto codes; pruned weights stay zero.

    Raises:
        ConfigError: an unknown layer or width.
    """
    quantizer: Callable[[Array, int], Array] = quantize_to_powers if powers else quantize_to
    quantizer(np.ones((1, 1)), bits)  # refuse a wrong width before training
    masks = pruned or {}
    return {
        name: partial(
            _on_kept, quantizer, bits, masks[name].cpu().numpy() if name in masks else None
        )
        for name in chosen_weights(module, names)
    }


def _on_kept(
    quantizer: Callable[[Array, int], Array], bits: int, zeros: Array | None, weight: Array
) -> Array:
    if zeros is None:
        return quantizer(weight, bits)
    return quantizer(np.where(zeros, np.zeros((), weight.dtype), weight), bits)
