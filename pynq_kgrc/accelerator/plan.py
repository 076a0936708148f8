"""The order of work within an output tile: which filter tile meets which channel tile, and when.

Filter tiles are taken `filter_tiles` at a time; their sums are held together, so that the input
region of a channel tile is loaded once for all of them. What is switched off is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.quant import Array, ceil_div


@dataclass(frozen=True)
class Item:
    """A filter tile times a channel tile."""

    channel_tile: int
    filter_tile: int
    slot: int
    """Which of the filter tiles whose sums are held."""
    mask: int
    """One bit for each kernel group of the filter tile: those that are enabled."""
    new_region: bool
    """The first item with this input region."""
    end_block: bool
    """The last item before the sums are handed on."""
    blocks: int
    """Vectors of T_N filters that are handed on, at the end of a block."""

    @property
    def word(self) -> int:
        """The 64 bits of the item in memory."""
        return (
            self.channel_tile
            | self.slot << 16
            | self.mask << 24
            | self.new_region << 40
            | self.end_block << 41
            | self.blocks << 48
        )


def plan_convolution(config: AcceleratorConfig, enabled: Array, filters: int) -> list[Item]:
    """The items of one pass; `enabled` [P, Q] says which kernel groups are not switched off."""
    groups = config.groups_per_tile
    tiles, channel_tiles = ceil_div(enabled.shape[0], groups), enabled.shape[1]
    padded = np.zeros((tiles * groups, channel_tiles), bool)
    padded[: enabled.shape[0]] = enabled
    bits = padded.reshape(tiles, groups, channel_tiles) << np.arange(groups)[:, None]
    masks = bits.sum(axis=1)
    vectors, per_tile = ceil_div(filters, config.tn), config.tm // config.tn
    items: list[Item] = []
    for first in range(0, tiles, config.filter_tiles):
        block = range(first, min(first + config.filter_tiles, tiles))
        work = [(q, m) for q in range(channel_tiles) for m in block if masks[m, q]]
        handed_on = min(vectors, block.stop * per_tile) - first * per_tile
        seen = -1
        for i, (q, m) in enumerate(work or [(0, first)]):
            mask = int(masks[m, q])
            last = i == max(len(work), 1) - 1
            new = bool(work) and q != seen
            items.append(Item(q, m, m - first, mask, new, last, handed_on if last else 0))
            seen = q
    return items


def plan_pool(config: AcceleratorConfig, channels: int) -> list[Item]:
    """The items of one pass of a pool: every channel tile by itself."""
    return [Item(q, 0, 0, 1, True, True, 1) for q in range(ceil_div(channels, config.tn))]
