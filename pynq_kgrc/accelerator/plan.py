"""The plan of a task: its items (filter tile x channel tile) in the order of the accelerator.

The sums of `filter_tiles` filter tiles are held together, so that the input region of a channel
tile is loaded once for all of them. Items without an enabled kernel group are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.errors import ProgramError
from pynq_kgrc.quant import Array, ceil_div


class BitField(NamedTuple):
    """The bits of a 64-bit word that hold one unsigned number."""

    shift: int
    width: int

    def get(self, words64: Array) -> Array:
        """The number that each 64-bit word holds in these bits, uint64.

        >>> BitField(16, 8).get(np.array([0x12_3456], np.uint64)).tolist()
        [18]
        """
        shifted: Array = words64 >> np.uint64(self.shift) & np.uint64((1 << self.width) - 1)
        return shifted


def pack_fields(fields: Mapping[str, BitField], numbers: Mapping[str, npt.ArrayLike]) -> Array:
    """64-bit words [N], each with one number per field; `numbers` has N for each name.

    Raises:
        ProgramError: a number is negative or does not fit its bits.
    """
    columns = {name: np.asarray(numbers[name], np.int64) for name in fields}
    words64 = np.zeros(next(iter(columns.values())).shape, np.uint64)
    for name, field in fields.items():
        most = (1 << field.width) - 1
        outside = columns[name][(columns[name] < 0) | (columns[name] > most)]
        if outside.size:
            raise ProgramError(
                f"{name}={outside[0]} does not fit the {field.width} bits that the accelerator "
                f"has for it; use 0 to {most}"
            )
        words64 |= columns[name].astype(np.uint64) << np.uint64(field.shift)
    return words64


ITEM_BITS = {
    "channel_tile": BitField(0, 16),
    "held_tile": BitField(16, 8),
    "mask": BitField(24, 16),
    "new_region": BitField(40, 1),
    "end_block": BitField(41, 1),
    "vectors": BitField(48, 16),
}
"""Fields of `Item` -> their bits in memory. `config.h` gives the same bits to the C++ sources."""


@dataclass(frozen=True)
class Item:
    """A filter tile times a channel tile."""

    channel_tile: int
    filter_tile: int
    held_tile: int
    """Index of the filter tile among those whose sums are held together."""
    mask: int
    """One bit for each kernel group of the filter tile, set if the group is enabled."""
    new_region: bool
    """Whether this is the first item of its block with this channel tile: its input region has to
    be loaded."""
    end_block: bool
    """Whether this is the last item of its block. A block is the run of items that add to the same
    held sums."""
    vectors: int
    """At the end of a block, how many vectors of T_N sums are handed on; 0 elsewhere."""


def item_words64(items: Sequence[Item]) -> Array:
    """The items as they lie in memory: one 64-bit word each.

    Raises:
        ProgramError: a number does not fit its bits (ITEM_BITS).
    """
    numbers = {name: [int(getattr(item, name)) for item in items] for name in ITEM_BITS}
    return pack_fields(ITEM_BITS, numbers)


def plan_convolution(config: AcceleratorConfig, enabled: Array, filters: int) -> list[Item]:
    """The items of one output tile; `enabled` [P, Q] says which kernel groups are enabled."""
    groups = config.groups_per_tile
    tiles, channel_tiles = ceil_div(enabled.shape[0], groups), enabled.shape[1]
    padded = np.zeros((tiles * groups, channel_tiles), bool)
    padded[: enabled.shape[0]] = enabled
    bits = padded.reshape(tiles, groups, channel_tiles) << np.arange(groups)[:, None]
    masks = bits.sum(axis=1)
    vectors, per_tile = ceil_div(filters, config.tn), config.tm // config.tn
    items: list[Item] = []
    for first in range(0, tiles, config.filter_tiles):
        held = range(first, min(first + config.filter_tiles, tiles))
        pairs = [(q, m) for q in range(channel_tiles) for m in held if masks[m, q]]
        # a block without an enabled group still hands on its sums, which are zero
        pairs_or_one = pairs or [(0, first)]
        handed_on = min(vectors, held.stop * per_tile) - first * per_tile
        previous = -1
        for i, (q, m) in enumerate(pairs_or_one):
            last = i == len(pairs_or_one) - 1
            new_region = bool(pairs) and q != previous
            mask = int(masks[m, q])
            items.append(Item(q, m, m - first, mask, new_region, last, handed_on if last else 0))
            previous = q
    return items


def plan_pool(config: AcceleratorConfig, channels: int) -> list[Item]:
    """The items of one output tile of a pool: each channel tile is a block of its own."""
    return [Item(q, 0, 0, 1, True, True, 1) for q in range(ceil_div(channels, config.tn))]
