"""A network as plain data: layers in running order with their shapes, weights and formats.

Axes are always [channel, depth, height, width]. 2-D is depth 1, a fully connected layer is a
convolution whose kernel is its whole input map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from pynq_kgrc.errors import CompileError
from pynq_kgrc.quant import Array, QuantParams, WeightQuant

Size = tuple[int, int, int]
"""Depth, height, width."""

CONV = "conv"
MAX_POOL = "max_pool"
AVERAGE_POOL = "average_pool"
ADD = "add"
CONCAT = "concat"
INPUT = "input"
OPS = (INPUT, CONV, MAX_POOL, AVERAGE_POOL, ADD, CONCAT)

ACTIVATIONS = ("none", "relu", "relu6")


@dataclass(frozen=True)
class WindowShape:
    """A window that slides over a map of `channels` channels: what pools and convolutions share."""

    channels: int
    in_size: Size
    kernel: Size
    stride: Size = (1, 1, 1)
    pad_before: Size = (0, 0, 0)
    pad_after: Size = (0, 0, 0)

    @property
    def out_size(self) -> Size:
        d, h, w = (
            (self.in_size[i] + self.pad_before[i] + self.pad_after[i] - self.kernel[i])
            // self.stride[i]
            + 1
            for i in range(3)
        )
        return d, h, w

    @property
    def taps(self) -> int:
        """Positions in the window; a tap is one of them."""
        return math.prod(self.kernel)

    @property
    def out_channels(self) -> int:
        return self.channels


@dataclass(frozen=True)
class ConvShape(WindowShape):
    """A convolution: `channels` in, `filters` out. Padding may differ before and after."""

    filters: int = 1

    @property
    def out_channels(self) -> int:
        return self.filters

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense layer, for one clip."""
        return self.filters * self.channels * self.taps * math.prod(self.out_size)


@dataclass(frozen=True, eq=False)
class Layer:
    """One step of a network. Its output is a tensor of the same name."""

    name: str
    op: str
    inputs: tuple[str, ...]
    channels: int
    """Channels of the output."""
    size: Size
    """Depth, height, width of the output."""
    shape: WindowShape | None = None
    """The window of a convolution or pool."""
    weight: Array | None = None
    """[M, N, kd, kh, kw] float32, batch norm folded in; zeros are pruned weights."""
    bias: Array | None = None
    """[M] float64."""
    activation: str = "none"
    weight_quant: WeightQuant | None = None
    out_quant: QuantParams | None = None


SAMPLINGS = ("centre", "uniform", "windows")
"""Ways to choose frames: one clip from the middle, one spread over the whole video, or clips one
after the other."""


@dataclass(frozen=True)
class ClipSpec:
    """The clip that a network looks at, and how pixels become its input.

    Frames are resized so that the short side is `short_side`, cropped at the centre to
    `height` x `width`, and normalised: ``(pixel / 255 - mean) / std`` for each of R, G, B.
    `step` frames of the video pass from one frame of the clip to the next.
    """

    frames: int
    height: int
    width: int
    short_side: int
    step: int = 1
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    sampling: str = "centre"
    """Which frames of a video, unless the caller says otherwise; one of `SAMPLINGS`."""
    stride: int | None = None
    """Frames from one window to the next, for "windows"; the length of a clip if none."""
    rate: float | None = None
    """Frames a second at which the network was trained; as the file has them if none."""
    temperature: float = 1.0
    """Logits are divided by it before soft-max, so that a confidence of 80 % is right 80 times in
    100; fitted on held-in clips."""
    threshold: float = 0.0
    """The answer is "unsure" where the best confidence is below it."""

    def pixel_values(self) -> Array:
        """[3, 256] float64: the network's input value of each pixel level of R, G, B."""
        levels = np.arange(256) / 255.0
        values: Array = (levels - np.array(self.mean)[:, None]) / np.array(self.std)[:, None]
        return values

    def normalise(self, frames: Array) -> Array:
        """[D, H, W, 3] uint8 pixels to [3, D, H, W] float32 input values."""
        table = self.pixel_values().astype(np.float32)
        return np.stack([table[c][frames[..., c]] for c in range(3)])


@dataclass(frozen=True, eq=False)
class Graph:
    """Layers in running order; the first is the input, `output` names the last one that counts."""

    name: str
    layers: tuple[Layer, ...]
    output: str
    clip: ClipSpec
    labels: tuple[str, ...] = field(default=())

    def __getitem__(self, name: str) -> Layer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        known = ", ".join(layer.name for layer in self.layers[:8])
        raise CompileError(f"{self.name} has no layer {name!r}; it has {known}, ...")

    def consumers(self, name: str) -> list[Layer]:
        """The layers that read the tensor `name`, in running order."""
        return [layer for layer in self.layers if name in layer.inputs]

    def convolutions(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.op == CONV]

    def with_weights(self, weights: dict[str, Array]) -> Graph:
        """This graph with some weights replaced (after pruning, say); shapes must agree.

        Raises:
            CompileError: a name that is not a convolution here, or an array of another shape.
        """
        for name, weight in weights.items():
            old = self[name].weight
            if old is None or old.shape != weight.shape:
                wants = "no weight" if old is None else f"a weight of shape {old.shape}"
                raise CompileError(f"{name} takes {wants}, not one of shape {weight.shape}")
        return replace(
            self,
            layers=tuple(
                replace(layer, weight=weights[layer.name]) if layer.name in weights else layer
                for layer in self.layers
            ),
        )


def activate(values: Array, activation: str) -> Array:
    """Apply "none", "relu" or "relu6" to reals."""
    if activation == "relu":
        return np.maximum(values, 0)
    if activation == "relu6":
        return np.clip(values, 0, 6)
    return values


def pad_map(values: Array, shape: WindowShape, fill: float) -> Array:
    """[C, D, H, W] with the window's padding around it, filled with `fill`."""
    widths = [(0, 0), *zip(shape.pad_before, shape.pad_after, strict=True)]
    if not any(before or after for before, after in widths):
        return values
    return np.pad(values, widths, constant_values=fill)


def tap_views(padded: Array, shape: WindowShape) -> Iterator[Array]:
    """For each tap in order, the [C, *out_size] view of what that tap of the window sees."""
    span = [(shape.out_size[i] - 1) * shape.stride[i] + 1 for i in range(3)]
    for tap in np.ndindex(*shape.kernel):
        yield padded[
            (slice(None), *(slice(tap[i], tap[i] + span[i], shape.stride[i]) for i in range(3)))
        ]


def run_layer_float(layer: Layer, inputs: list[Array]) -> Array:
    """The layer's output [C, D, H, W] in float32, from its inputs of the same layout."""
    if layer.op == ADD:
        return activate(inputs[0] + inputs[1], layer.activation)
    if layer.op == CONCAT:
        return activate(np.concatenate(inputs), layer.activation)
    shape = layer.shape
    assert shape is not None
    if layer.op == CONV:
        assert layer.weight is not None and layer.bias is not None
        values = _convolve(inputs[0], layer.weight, shape)
        values += layer.bias.astype(np.float32)[:, None, None, None]
        return activate(values, layer.activation)
    fill = -np.inf if layer.op == MAX_POOL else 0.0
    views = tap_views(pad_map(inputs[0], shape, fill), shape)
    pooled = next(views).astype(np.float32)
    combine = np.maximum if layer.op == MAX_POOL else np.add
    for view in views:
        combine(pooled, view, out=pooled)
    if layer.op == AVERAGE_POOL:
        pooled /= shape.taps
    return activate(pooled, layer.activation)


def _convolve(values: Array, weight: Array, shape: WindowShape) -> Array:
    """Plain float32 convolution, one output depth slice at a time to bound the scratch."""
    filters, channels = weight.shape[:2]
    out = np.empty((filters, *shape.out_size), np.float32)
    padded = pad_map(values.astype(np.float32, copy=False), shape, 0.0)
    # [taps, channels] are the rows of the unfolded input, in this order
    matrix = weight.transpose(0, 2, 3, 4, 1).reshape(filters, -1).astype(np.float32)
    slab = replace(shape, pad_before=(0, 0, 0), pad_after=(0, 0, 0))
    for d in range(shape.out_size[0]):
        start = d * shape.stride[0]
        rows = padded[:, start : start + shape.kernel[0]]
        slab = replace(slab, in_size=(shape.kernel[0], padded.shape[2], padded.shape[3]))
        unfolded = np.stack([view[:, 0] for view in tap_views(rows, slab)])
        out[:, d] = (matrix @ unfolded.reshape(matrix.shape[1], -1)).reshape(
            filters, *out.shape[2:]
        )
    return out


def run_float(
    graph: Graph, clip: Array, watch: Callable[[Layer, Array], None] | None = None
) -> Array:
    """The network's output [C, D, H, W] in float32 for one clip [3, D, H, W].

    `watch` sees every layer and its output as it is made. Outputs are dropped after their last
    use, so a whole I3D needs little more than its widest pair of layers.

    Raises:
        CompileError: the clip has another shape than the graph's input.
    """
    first = graph.layers[0]
    if clip.shape != (first.channels, *first.size):
        raise CompileError(
            f"{graph.name} takes a clip of shape {(first.channels, *first.size)}, not {clip.shape}"
        )
    last_use = {name: i for i, layer in enumerate(graph.layers) for name in layer.inputs}
    values: dict[str, Array] = {}
    for i, layer in enumerate(graph.layers):
        if layer.op == INPUT:
            values[layer.name] = clip.astype(np.float32, copy=False)
        else:
            values[layer.name] = run_layer_float(layer, [values[n] for n in layer.inputs])
        if watch is not None:
            watch(layer, values[layer.name])
        for name in layer.inputs:
            if last_use[name] == i:
                values.pop(name, None)
    return values[graph.output]
