"""Kernel groups of a weight array: how it is cut, and which rows and columns hold anything.

A weight [M, N, K] (K taps, the kernel flattened) is cut into groups of G_M filters x G_N input
channels x G_K taps. Inside a group a *row* is a filter and a *column* is a tap, shared by all
G_N kernels of the group (KGRC paper, section III). The weights are their own mask: a row or a
column is kept if it holds a non-zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pynq_kgrc.quant import Array, ceil_div


@dataclass(frozen=True)
class GroupSize:
    """G_M filters, G_N input channels and (at most) T_K taps to a group."""

    gm: int
    gn: int
    tk: int

    def columns(self, taps: int) -> int:
        """G_K = min(K, T_K): taps in one group of a layer with `taps` taps."""
        return min(taps, self.tk)

    def counts(self, filters: int, channels: int, taps: int) -> tuple[int, int, int]:
        """P, Q, T: groups of filters, of channels and of taps."""
        gk = self.columns(taps)
        return ceil_div(filters, self.gm), ceil_div(channels, self.gn), ceil_div(taps, gk)


def split(weight: Array, size: GroupSize) -> Array:
    """[M, N, K] -> [P, Q, T, G_M, G_N, G_K], zero-padded up to whole groups.

    >>> split(np.ones((3, 2, 5)), GroupSize(gm=2, gn=2, tk=3)).shape
    (2, 1, 2, 2, 2, 3)
    """
    filters, channels, taps = weight.shape
    p, q, t = size.counts(filters, channels, taps)
    gk = size.columns(taps)
    padded = np.zeros((p * size.gm, q * size.gn, t * gk), weight.dtype)
    padded[:filters, :channels, :taps] = weight
    cut = padded.reshape(p, size.gm, q, size.gn, t, gk)
    return np.ascontiguousarray(cut.transpose(0, 2, 4, 1, 3, 5))


def join(groups: Array, filters: int, channels: int, taps: int) -> Array:
    """[P, Q, T, G_M, G_N, G_K] -> [M, N, K], the padding cut off: the inverse of `split`."""
    p, q, t, gm, gn, gk = groups.shape
    whole = groups.transpose(0, 3, 1, 4, 2, 5).reshape(p * gm, q * gn, t * gk)
    return np.ascontiguousarray(whole[:filters, :channels, :taps])


def kept_rows(groups: Array) -> Array:
    """bool [P, Q, G_M]: rows (filters) of each group that hold a non-zero in any tap tile."""
    kept: Array = np.any(groups != 0, axis=(2, 4, 5))
    return kept


def kept_columns(groups: Array) -> Array:
    """bool [P, Q, T, G_K]: columns (taps) of each group that hold a non-zero."""
    kept: Array = np.any(groups != 0, axis=(3, 4))
    return kept
