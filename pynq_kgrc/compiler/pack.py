"""Integer weights to the compact format: the kept rows and columns, and their values."""

from __future__ import annotations

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.groups import kept_columns, kept_rows, split
from pynq_kgrc.program import KgrcWeights
from pynq_kgrc.quant import Array, ceil_div


def pack(codes: Array, config: AcceleratorConfig) -> KgrcWeights:
    """The compact weights of an integer weight [M, N, K]; its zeros are the mask.

    Every group keeps as many rows and columns as the fullest one, rounded up so that P_M and P_K
    divide them (eq. 9); groups with fewer are filled up with zeros. A group of zeros is switched
    off. A dense design keeps everything.
    """
    groups = split(codes, config.group_size)
    p, q, t, gm, gn, gk = groups.shape
    has_row, has_col = kept_rows(groups), kept_columns(groups)
    enabled = has_row.any(axis=2)
    if config.sparse:
        kr = _round_up(int(has_row.sum(axis=2).max()), config.rows_per_cycle, gm)
        kc = _round_up(int(has_col.sum(axis=3).max()), config.pk, gk)
    else:
        kr, kc = gm, gk
    rows, cols = _places(has_row, kr), _places(has_col, kc)
    at_p, at_q, at_t, _, at_n, _ = np.ogrid[:p, :q, :t, :1, :gn, :1]
    at_rows, at_cols = rows[:, :, None, :, None, None], cols[:, :, :, None, None, :]
    values = groups[at_p, at_q, at_t, at_rows, at_n, at_cols]
    return KgrcWeights(np.ascontiguousarray(values), rows, cols, enabled)


def _round_up(count: int, step: int, limit: int) -> int:
    return min(limit, max(1, ceil_div(count, step)) * step)


def _places(kept: Array, count: int) -> Array:
    """Indices of `count` kept places along the last axis, increasing; others fill up a shortage."""
    first = np.argsort(~kept, axis=-1, kind="stable")[..., :count]
    places: Array = np.sort(first, axis=-1).astype(np.uint8)
    return places
