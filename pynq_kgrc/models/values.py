"""Values of a network that is being read: the layer that makes each, and where its elements lie.

Slices, splits, transposes, channel shuffles and padded channels compute nothing. They are kept
beside the value as a view of the map [C, D, H, W] that its layer writes: an order of axes, or the
index of each element in that map. The operator that reads the value as a map finds its elements
where they are, or has them gathered by one convolution whose weights are ones (`find_selection`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np

from pynq_kgrc.graph import CodeRange, ConvShape, Size, WindowShape
from pynq_kgrc.quant import Array, QuantParams

Shape = tuple[int, ...]

MAX_WEIGHTS = 1 << 27
"""Most weights of a convolution that only moves elements: a crop of a large map needs a large
kernel."""

NO_PADDING: Size = (0, 0, 0)

FRAMES = (1, 0, 2, 3)
"""The order of axes of a map whose frames are a batch, [D, C, H, W]."""


@dataclass(frozen=True)
class Code:
    """A quantizer of the network: its format, and the codes that it limits a tensor to."""

    quant: QuantParams
    limits: CodeRange


@dataclass(eq=False)
class LayerDraft:
    """A layer before batch norms and activations are folded into it."""

    name: str
    op: str
    inputs: list[LayerDraft]
    channels: int
    size: Size
    shape: WindowShape | None = None
    weight: Array | None = None
    bias: Array | None = None
    gain: Array | None = None
    """[C] float64, of a SCALE, whose offset is `bias`; None if it is only an activation."""
    activation: str = "none"
    positive: bool = False
    """Whether no output is below zero."""
    picks: Array | None = None
    """[C] of a convolution that only chooses channels: which, or -1 for zeros."""
    code: Code | None = None
    """How the network itself quantizes the output; None if it does not."""
    weight_step: Array | None = None
    """[C] float64: the real of one code of each filter, if the network quantizes the weight."""

    @property
    def dims(self) -> Shape:
        """[C, D, H, W]."""
        return (self.channels, *self.size)


@dataclass(frozen=True, eq=False)
class Value:
    """The output of a layer, seen in a shape, with padding for the window that reads it."""

    draft: LayerDraft
    shape: Shape
    """As the network was written: [1, C, D, H, W], padding included, or a view of it."""
    order: Shape | None = None
    """The axis of the plain view (`base`) that each axis is; None if none moved."""
    index: Array | None = None
    """int32 of `shape`: where each element lies in the flat map, -1 for a zero; None if `order`
    says it."""
    before: Size = NO_PADDING
    after: Size = NO_PADDING
    fill: float = 0.0
    softmax: bool = False
    """Whether it is the soft-max of what the layer makes."""

    @property
    def padded(self) -> bool:
        return any(self.before + self.after)

    @property
    def size(self) -> Size:
        """Depth, height, width of the map with its padding."""
        d, h, w = (sum(n) for n in zip(self.draft.size, self.before, self.after, strict=True))
        return d, h, w

    @property
    def plain(self) -> bool:
        """Whether its elements are those of the map, in the map's order."""
        return self.order is None and self.index is None and not self.padded

    @property
    def base(self) -> Shape:
        """The shape before its axes were put in `order`; the elements are in the map's order."""
        if self.order is None:
            return self.shape
        return tuple(self.shape[self.order.index(axis)] for axis in range(len(self.shape)))

    @property
    def channel_axis(self) -> int | None:
        """The axis that is exactly the map's channels, where it is the second one; else None."""
        channels = self.draft.channels
        if self.index is not None or len(self.shape) < 2 or self.shape[1] != channels:
            return None
        if self.order is None:
            return 1 if self.shape[0] == 1 or (channels == 1 and len(self.shape) == 4) else None
        return 1 if self.order[:2] == (1, 0) or (self.order[1] == 1 and self.base[0] == 1) else None


def viewed(draft: LayerDraft, base: Shape, order: Sequence[int]) -> Value:
    """The map in the shape `base`, then its axes in this order."""
    shape = tuple(base[axis] for axis in order)
    long = [axis for axis in order if base[axis] > 1]
    if long == sorted(long):
        return Value(draft, shape)
    return Value(draft, shape, tuple(order))


def index_of(value: Value) -> Array:
    """int32 of the value's shape: where each element lies in the flat map, -1 for a zero."""
    if value.index is not None:
        return value.index
    flat = np.arange(math.prod(value.draft.dims), dtype=np.int32).reshape(value.draft.dims)
    if value.padded:
        widths = [(0, 0), *zip(value.before, value.after, strict=True)]
        flat = np.pad(flat, widths, constant_values=-1)
    order = range(len(value.shape)) if value.order is None else value.order
    return flat.reshape(value.base).transpose(order)


def indexed(draft: LayerDraft, index: Array) -> Value:
    """The value with this index: a plain view or an order of axes, if the index is one."""
    count = math.prod(draft.dims)
    if index.size == count and index.size and index.flat[0] == 0:
        steps = []
        for axis, length in enumerate(index.shape):
            at = [0] * index.ndim
            at[axis] = min(1, length - 1)
            steps.append(int(index[tuple(at)]) if length > 1 else 0)
        # the axes of the map's order: the slowest first; those of length 1 stay where they are
        slow = iter(sorted((a for a in range(index.ndim) if steps[a]), key=lambda a: -steps[a]))
        places = [next(slow) if steps[axis] else axis for axis in range(index.ndim)]
        straight = index.transpose(places)
        if np.array_equal(straight.reshape(-1), np.arange(count, dtype=np.int32)):
            order = [places.index(axis) for axis in range(index.ndim)]
            return viewed(draft, straight.shape, order)
    return Value(draft, index.shape, index=np.ascontiguousarray(index))


def moved(value: Value, move: Callable[[Array], Array]) -> Value:
    """The value after a movement of its elements, given as a function of an index."""
    return indexed(value.draft, move(index_of(value)))


def permuted(value: Value, order: Sequence[int]) -> Value:
    """The value with its axes in another order."""
    if value.index is not None or value.padded:
        return moved(value, lambda index: index.transpose(order))
    old = range(len(value.shape)) if value.order is None else value.order
    return viewed(value.draft, value.base, [old[axis] for axis in order])


def map_axes(base: Shape, draft: LayerDraft) -> list[set[int]] | None:
    """For each axis of a plain view, the axes of [C, D, H, W] that it runs over; None if a part."""
    dims = list(draft.dims)
    found, place = [], 0
    for length in base:
        over: set[int] = set()
        while math.prod(dims[axis] for axis in over) < length and place < 4:
            over.add(place)
            place += 1
        if math.prod(dims[axis] for axis in over) != length:
            return None
        found.append({axis for axis in over if dims[axis] > 1})
    return found


def window_axes(value: Value, axes: int) -> tuple[int, ...] | None:
    """The map's axes along the last `axes` axes of the value; None if it is no such map.

    It is one that a window can read where it lies: [1, C, ...], or frames as a batch.
    """
    size, shape = value.size, value.shape
    if value.index is not None or value.channel_axis is None or len(shape) != axes + 2:
        return None
    if value.order is not None or shape[0] != 1:
        there = axes == 2 and value.order in (None, FRAMES) and size == (shape[0], *shape[2:])
        return (1, 2) if there else None
    for places in placements(axes):
        rest = [size[axis] for axis in range(3) if axis not in places]
        if shape[2:] == tuple(size[axis] for axis in places) and math.prod(rest) == 1:
            return places
    return None


def placements(axes: int) -> Iterator[tuple[int, ...]]:
    """The ways to lay axes along depth, height, width: the last ones first."""
    return iter(list(combinations(range(3), axes))[::-1])


class Selection(NamedTuple):
    """A convolution that copies elements: each of its outputs reads one input, or none."""

    shape: ConvShape
    weight: Array
    picks: Array | None
    """The channels, if it only chooses channels."""


def find_selection(draft: LayerDraft, index: Array) -> Selection | None:
    """The convolution whose output [C', D', H', W'] has the elements of this index, if one has.

    Every output channel reads one input channel, at an offset of its own; the stride is common.
    Axes that go backwards, and axes that change places, are none.
    """
    flat = index.reshape(len(index), -1)
    some = (flat >= 0).any(axis=1)
    if not some.any() or index.size == 0:
        return None
    firsts = np.argmax(flat >= 0, axis=1)
    out: Size = (int(index.shape[1]), int(index.shape[2]), int(index.shape[3]))
    size = draft.size
    channels = np.flatnonzero(some)
    at = np.stack(np.unravel_index(firsts[channels], out))
    source = np.stack(np.unravel_index(flat[channels, firsts[channels]], draft.dims))
    strides = [1, 1, 1]
    for axis in range(3):
        for number, channel in enumerate(channels):
            place = list(at[:, number])
            place[axis] += 1
            if place[axis] < out[axis] and index[(channel, *place)] >= 0:
                there = np.unravel_index(int(index[(channel, *place)]), draft.dims)
                strides[axis] = int(there[axis + 1] - source[axis + 1, number])
                break
    if min(strides) < 1:
        return None
    offsets = source[1:] - np.array(strides)[:, None] * at
    if not _rebuilds(index, draft, channels, source[0], offsets, strides):
        return None
    kernel, before, after = [], [], []
    for axis in range(3):
        low, high = int(offsets[axis].min()), int(offsets[axis].max())
        first = max(0, -low)
        span = (out[axis] - 1) * strides[axis]
        while True:
            length = max(high + first + 1, first + 1, size[axis] + first - span)
            last = max(0, span + length - size[axis] - first)
            if last < length:
                break
            first += 1
        kernel.append(length)
        before.append(first)
        after.append(last)
    if len(index) * draft.channels * math.prod(kernel) > MAX_WEIGHTS:
        return None
    taps = offsets + np.array(before)[:, None]
    weight = np.zeros((len(index), draft.channels, *kernel), np.float32)
    weight[channels, source[0], taps[0], taps[1], taps[2]] = 1
    shape = ConvShape(
        draft.channels,
        size,
        (kernel[0], kernel[1], kernel[2]),
        (strides[0], strides[1], strides[2]),
        (before[0], before[1], before[2]),
        (after[0], after[1], after[2]),
        filters=len(index),
        own_weights=len(index),
    )
    picks = None
    if shape.taps == 1 and shape.stride == (1, 1, 1):
        picks = np.full(len(index), -1)
        picks[channels] = source[0]
    return Selection(shape, weight, picks)


def _rebuilds(
    index: Array,
    draft: LayerDraft,
    channels: Array,
    picks: Array,
    offsets: Array,
    strides: Sequence[int],
) -> bool:
    """Whether these channels, offsets and strides give the index, zeros where they leave the map.

    Channels without any element are zeros in the index.
    """
    plane = math.prod(draft.size)
    for offset in np.unique(offsets, axis=1).T:
        members = np.flatnonzero((offsets == offset[:, None]).all(axis=0))
        lines = [np.arange(index.shape[i + 1]) * strides[i] + offset[i] for i in range(3)]
        inside = np.ones(index.shape[1:], bool)
        place = np.zeros(index.shape[1:], np.int32)
        for axis, line in enumerate(lines):
            spread = line.reshape([-1 if i == axis else 1 for i in range(3)])
            inside &= (spread >= 0) & (spread < draft.size[axis])
            place = place * draft.size[axis] + spread.astype(np.int32)
        for member in members:
            wanted = np.where(inside, place + np.int32(picks[member] * plane), np.int32(-1))
            if not np.array_equal(wanted, index[channels[member]]):
                return False
    return True


def without_axes(value: Value, gone: set[int], keep: bool) -> tuple[Shape, list[int]]:
    """The plain view and the order of axes after some axes were reduced to length 1 or removed."""
    order = list(range(len(value.shape)) if value.order is None else value.order)
    base = [1 if axis in {order[g] for g in gone} else n for axis, n in enumerate(value.base)]
    if keep:
        return tuple(base), order
    dropped = {order[axis] for axis in gone}
    left = [axis for axis in range(len(base)) if axis not in dropped]
    kept = [axis for axis in order if axis not in dropped]
    return tuple(base[axis] for axis in left), [left.index(axis) for axis in kept]


def padded(value: Value, before: Size, after: Size, shape: Shape, fill: float) -> Value:
    """The value with more padding for the window that reads it."""
    firsts = [sum(n) for n in zip(value.before, before, strict=True)]
    lasts = [sum(n) for n in zip(value.after, after, strict=True)]
    return replace(
        value,
        shape=shape,
        before=(firsts[0], firsts[1], firsts[2]),
        after=(lasts[0], lasts[1], lasts[2]),
        fill=fill,
    )
