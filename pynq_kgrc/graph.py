"""A network as plain data: layers in running order with their shapes, weights and formats.

Axes are always [channel, depth, height, width]. A 2-D map has depth 1. A fully connected layer is
a convolution whose kernel is as large as its input map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from pynq_kgrc.errors import CompileError, ConfigError
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

Bounds = tuple[float | None, float | None]
"""The lowest and highest real that a clamp lets through; None where it is open."""

CodeRange = tuple[int, int]
"""The lowest and the highest code of a tensor."""

ACTIVATIONS: dict[str, Bounds] = {
    "none": (None, None),
    "relu": (0.0, None),
    "relu6": (0.0, 6.0),
}
"""Every activation by name: a clamp of the reals to bounds.

The accelerator has no activation stage. The compiler turns the bounds into codes and makes them
the clamp (lo, hi) of the output, which every task has anyway. This is exact because scaling is
monotone: clamping the reals and then scaling and rounding gives the same codes as scaling and
rounding first. A function that is not a clamp, such as sigmoid, cannot be expressed so.

A new clamp needs one line here. The float graph, the compiler, training with codes and the tracer
read this table; the backends only see lo and hi.
"""


@dataclass(frozen=True)
class WindowShape:
    """The sliding window of a pool or a convolution, over a map of `channels` channels."""

    channels: int
    in_size: Size
    kernel: Size
    stride: Size = (1, 1, 1)
    pad_before: Size = (0, 0, 0)
    pad_after: Size = (0, 0, 0)

    @property
    def out_size(self) -> Size:
        """Depth, height, width of the output."""
        d, h, w = (
            (self.in_size[i] + self.pad_before[i] + self.pad_after[i] - self.kernel[i])
            // self.stride[i]
            + 1
            for i in range(3)
        )
        return d, h, w

    @property
    def taps(self) -> int:
        """Number of taps: positions in the window."""
        return math.prod(self.kernel)

    @property
    def out_channels(self) -> int:
        return self.channels


@dataclass(frozen=True)
class ConvShape(WindowShape):
    """A convolution: `channels` in, `filters` out. Padding may differ before and after."""

    filters: int = 1
    own_weights: int = 0
    """Weights of the layer as its author wrote it; 0: all filters x channels x taps. The others are
    zeros that the compiler put between groups, dilated taps or the channels of a copy."""

    @property
    def out_channels(self) -> int:
        return self.filters

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense layer, for one clip."""
        return self.filters * self.channels * self.taps * math.prod(self.out_size)

    @property
    def own_macs(self) -> int:
        """Multiply-accumulates of the layer as its author wrote it, as torch counts them."""
        return self.own_weights * math.prod(self.out_size) if self.own_weights else self.macs


@dataclass(frozen=True, eq=False)
class Layer:
    """One operation of a network. Its output is a tensor of the same name.

    Raises:
        CompileError: an unknown operation or activation.
    """

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
    code_range: CodeRange | None = None
    """The codes that the network's own quantizer limits the output to. With None they are those of
    the format, and the output need not be rounded before an add that is fused behind it."""

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise CompileError(f"{self.name}: no operation {self.op!r}; there are {', '.join(OPS)}")
        if self.activation not in ACTIVATIONS:
            raise CompileError(
                f"{self.name}: no activation {self.activation!r}; there are "
                f"{', '.join(ACTIVATIONS)}"
            )


MAX_PIXELS = 1 << 24
"""Pixels of a frame that are accepted where nothing else is said: 4096 x 4096, for 4K and 5.3K."""

MAX_SECONDS = 600.0
"""Seconds of an upload that are looked at where nothing else is said."""

SAMPLINGS = ("centre", "uniform", "windows")
"""How the frames of a video are chosen: one clip from its middle, one spread over all of it, or
clips one after the other over all of it."""

DEFAULT_SAMPLING = "windows"
"""The sampling of a program that does not say."""

TRAINING_SAMPLING = "uniform"
"""How `train`, `prune` and `quantize` sample the videos of a data set. `quantize` writes it into
the program, so that every command samples a video as in training."""


MAX_CHANNELS = 16
"""Most channels of a clip."""


@dataclass(frozen=True)
class ClipSpec:
    """The clip that a network takes, and how its pixels become the network's input.

    Frames are resized so that the short side is `short_side`, cropped at the centre to
    `height` x `width`, and normalised: ``(pixel / 255 - mean) / std`` for each of R, G, B. A clip
    of other channels (grey, optical flow, RGB and depth) has as many means and as many `std`, 1 to
    16; its frames [D, H, W, channels] come from the caller, because a video has R, G, B.
    Every `step`-th frame of the video is taken.
    """

    frames: int
    height: int
    width: int
    short_side: int
    step: int = 1
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    sampling: str = DEFAULT_SAMPLING
    """One of `SAMPLINGS`. Every command samples a video in this way unless it is told otherwise."""
    stride: int | None = None
    """For "windows": frames from one clip to the next; the length of a clip if None."""
    rate: float | None = None
    """Frames a second at which the network was trained. A video is resampled to this rate; its own
    frames are used if None."""
    temperature: float = 1.0
    """The logits are divided by it before soft-max, so that confidences are calibrated (Guo et al.,
    ICML 2017)."""
    threshold: float = 0.0
    """Below this confidence of the best label the answer is "unsure"."""

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLINGS:
            raise ConfigError(
                f"sampling={self.sampling!r} of a clip; accepted are {', '.join(SAMPLINGS)}"
            )
        for name in ("frames", "height", "width", "short_side", "step", "stride", "rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e6:
                raise ConfigError(f"{name}={value} of a clip; accepted is above 0, up to a million")
        if len(self.mean) != len(self.std) or not 1 <= self.channels <= MAX_CHANNELS:
            raise ConfigError(
                f"mean={self.mean} and std={self.std} of a clip; accepted are as many of the one "
                f"as of the other, one for each of its 1 to {MAX_CHANNELS} channels"
            )
        if not 0 < self.temperature < 1e6:
            raise ConfigError(f"temperature={self.temperature}; accepted is above 0")
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"threshold={self.threshold}; accepted is 0 to below 1")

    @property
    def channels(self) -> int:
        """Channels of a frame, 3 for R, G, B."""
        return len(self.mean)

    def chosen_sampling(self, sampling: str | None = None, stride: int | None = None) -> str:
        """How to sample a video: as asked; by windows if only a stride is asked; else `sampling`.

        Raises:
            ConfigError: an unknown sampling, or a stride beside one that has no windows.
        """
        if sampling is not None and sampling not in SAMPLINGS:
            raise ConfigError(f"sampling={sampling!r}; accepted are {', '.join(SAMPLINGS)}")
        if stride is None:
            return sampling or self.sampling
        if sampling not in (None, "windows"):
            raise ConfigError(
                f"stride={stride} beside sampling={sampling!r}; accepted with 'windows' only"
            )
        return "windows"

    def pixel_values(self) -> Array:
        """[C, 256] float64: the input value of each of the 256 levels of each channel."""
        levels = np.arange(256) / 255.0
        values: Array = (levels - np.array(self.mean)[:, None]) / np.array(self.std)[:, None]
        return values

    def normalise(self, frames: Array) -> Array:
        """[D, H, W, C] uint8 pixels to [C, D, H, W] float32 input values."""
        table = self.pixel_values().astype(np.float32)
        return np.stack([table[c][frames[..., c]] for c in range(self.channels)])


@dataclass(frozen=True, eq=False)
class Graph:
    """Layers in running order: the first is the input, `output` names that of the result."""

    name: str
    layers: tuple[Layer, ...]
    output: str
    clip: ClipSpec
    labels: tuple[str, ...] = field(default=())
    softmax: bool = False
    """Whether the network ends with a soft-max, which is left out: the result holds its logits."""

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
        """The convolutions, in running order."""
        return [layer for layer in self.layers if layer.op == CONV]

    def with_weights(self, weights: dict[str, Array]) -> Graph:
        """This graph with the weights of some layers replaced, for example by pruned ones.

        Raises:
            CompileError: a name of no convolution, or an array of another shape than its weight.
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


def moves_only(layer: Layer) -> bool:
    """Whether a layer is a convolution that copies elements: at most a one in each filter."""
    shape, weight = layer.shape, layer.weight
    if layer.op != CONV or not isinstance(shape, ConvShape) or weight is None:
        return False
    if shape.own_weights != shape.filters or layer.activation != "none":
        return False
    ones = weight.reshape(len(weight), -1)
    if layer.bias is not None and layer.bias.any():
        return False
    return bool(np.all((ones == 0) | (ones == 1)) and np.all(ones.sum(axis=1) <= 1))


def activate(values: Array, activation: str) -> Array:
    """Apply an activation of `ACTIVATIONS` to reals."""
    low, high = ACTIVATIONS[activation]
    if low is not None:
        values = np.maximum(values, low)
    if high is not None:
        values = np.minimum(values, high)
    return values


def pad_map(values: Array, shape: WindowShape, fill: float) -> Array:
    """Pad a map [C, D, H, W] as the window asks, with the value `fill`."""
    widths = [(0, 0), *zip(shape.pad_before, shape.pad_after, strict=True)]
    if not any(before or after for before, after in widths):
        return values
    return np.pad(values, widths, constant_values=fill)


def tap_views(padded: Array, shape: WindowShape) -> Iterator[Array]:
    """For each tap in order, the view [C, *out_size] of the inputs that it reads."""
    span = [(shape.out_size[i] - 1) * shape.stride[i] + 1 for i in range(3)]
    for tap in np.ndindex(*shape.kernel):
        yield padded[
            (slice(None), *(slice(tap[i], tap[i] + span[i], shape.stride[i]) for i in range(3)))
        ]


def taps_as_channels(padded: Array, shape: WindowShape) -> Array:
    """For each output of a window, the inputs that it reads, as channels (im2col).

    Args:
        padded: the map, padded and channel-last, [D, H, W, C] and contiguous.
        shape: the window.

    Returns:
        [taps * C, *out_size]: the channels of one tap side by side. A view of a channel-last array.
    """
    (kd, kh, kw), (sd, sh, sw) = shape.kernel, shape.stride
    depth, height, width = padded.strides[:3]
    # the taps of a row are neighbours in memory: we copy them as one item
    row = np.dtype((np.void, kw * padded.shape[3] * padded.itemsize))
    out = np.empty((*shape.out_size, kd, kh, kw * padded.shape[3]), padded.dtype)
    items = out.view(row)[..., 0]
    steps = (sd * depth, sh * height, sw * width)
    for d, h in np.ndindex(kd, kh):
        first = d * depth + h * height
        rows: Array = np.ndarray(shape.out_size, row, padded, first, steps)
        items[:, :, :, d, h] = rows
    return out.reshape(*shape.out_size, -1).transpose(3, 0, 1, 2)


def run_layer_float(layer: Layer, inputs: list[Array]) -> Array:
    """The output [C, D, H, W] of one layer in float32, from inputs [C, D, H, W]."""
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
    """Float32 convolution by im2col, one output depth at a time to bound the memory."""
    filters, channels = weight.shape[:2]
    out = np.empty((filters, *shape.out_size), np.float32)
    padded = pad_map(values.astype(np.float32, copy=False), shape, 0.0)
    # the unfolded input has a row for each (tap, channel), in this order
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
    """The network's output [C, D, H, W] in float32 for one clip [channels, D, H, W].

    `watch` is called with every layer and its output. An output is dropped after its last use, so
    that a whole I3D needs little more memory than its largest pair of layers.

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
