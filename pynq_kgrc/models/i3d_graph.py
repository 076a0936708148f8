"""I3D as a Graph, from a state dict in numpy: what `trace` makes of the torch module.

A board has no torch, but can build this graph from published weights, quantize it with stored
ranges, and compile it. host_tests/test_i3d_graph.py compares it with the trace, value by value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pynq_kgrc.errors import ModelError
from pynq_kgrc.graph import (
    AVERAGE_POOL,
    CONCAT,
    CONV,
    INPUT,
    MAX_POOL,
    ClipSpec,
    ConvShape,
    Graph,
    Layer,
    Size,
    WindowShape,
)
from pynq_kgrc.quant import Array

EPSILON = 1e-3
"""Added to the variance by batch norm."""

BLOCKS = (
    *("MaxPool3d_3a_3x3", "Mixed_3b", "Mixed_3c"),
    *("MaxPool3d_4a_3x3", "Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"),
    *("MaxPool3d_5a_2x2", "Mixed_5b", "Mixed_5c"),
)
"""Max pools and Inception blocks after the three convolutions of the stem, in running order."""

POOLS: dict[str, tuple[Size, Size]] = {
    "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
}
"""Kernel and stride of each max pool between blocks."""

AVERAGE: Size = (2, 7, 7)
"""Window of the average pool before the classifier."""


def clip(frames: int = 64) -> ClipSpec:
    """The clip of I3D: any multiple of 8 frames from 16 on; it was trained with 64.

    The authors sampled videos at 25 frames a second, and averaged over the whole video in tests
    (section 3 of the paper); here over windows of it.
    """
    return ClipSpec(
        frames=frames, height=224, width=224, short_side=256, sampling="windows", rate=25.0
    )


CLIP = clip()


def same_padding(kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding before and after, for a size that is a multiple of the stride."""
    return (kernel - stride) // 2, (kernel - stride + 1) // 2


def i3d_graph(
    state: Mapping[str, Array], spec: ClipSpec = CLIP, labels: Sequence[str] = ()
) -> Graph:
    """The graph of I3D with the weights of a state dict of `models.i3d.I3D`.

    Args:
        state: float32 arrays by the names of the module's parameters and buffers.
        spec: the clip, 224 x 224 pixels.
        labels: names of the classes, in order.

    Raises:
        ModelError: an array is missing or has a shape that does not fit; a clip of another size; a
            number of labels that is not the number of classes.
    """
    if (
        (spec.height, spec.width) != (CLIP.height, CLIP.width)
        or spec.frames % 8
        or spec.frames < 16
    ):
        raise ModelError(
            f"I3D takes clips of {CLIP.height} x {CLIP.width} pixels and a multiple of 8 frames "
            f"from 16 on, not {spec.frames} x {spec.height} x {spec.width}"
        )
    network = _Layers(state, spec)
    last = network.unit("Conv3d_1a_7x7", "clip", stride=2)
    last = network.max_pool("MaxPool3d_2a_3x3", last)
    last = network.unit("Conv3d_2b_1x1", last)
    last = network.unit("Conv3d_2c_3x3", last)
    for name in BLOCKS:
        last = network.max_pool(name, last) if name in POOLS else network.mixed(name, last)
    last = network.average_pool("AvgPool3d", last, AVERAGE)
    # the mean of the logits over time is the logits of the mean: as `trace.average_first` writes it
    if network[last].size != (1, 1, 1):
        last = network.average_pool("mean", last, network[last].size)
    last = network.classifier("Logits", last)
    classes = network[last].channels
    if labels and len(labels) != classes:
        raise ModelError(f"I3D has {classes} classes here, but {len(labels)} labels were given")
    return Graph("i3d", tuple(network.layers.values()), last, spec, tuple(labels))


class _Layers:
    """The layers so far, by name; each method appends some and returns the name of the last."""

    def __init__(self, state: Mapping[str, Array], spec: ClipSpec) -> None:
        self._state = state
        size = (spec.frames, spec.height, spec.width)
        self.layers = {"clip": Layer("clip", INPUT, (), 3, size)}

    def __getitem__(self, name: str) -> Layer:
        return self.layers[name]

    def unit(self, path: str, source: str, stride: int = 1) -> str:
        """Convolution with SAME padding, batch norm without a scale, ReLU."""
        weight = self._weight(f"{path}.conv.weight", source)
        filters = weight.shape[:1]
        mean, variance, scale, offset = (
            self._array(f"{path}.norm.{name}", filters)
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        gain = 1.0 / np.sqrt(variance.astype(np.float64) + EPSILON) * scale
        padding = same_padding(weight.shape[2], stride)
        return self._convolution(
            f"{path}.conv",
            source,
            (weight * gain[:, None, None, None, None]).astype(np.float32),
            offset - gain * mean,
            stride,
            padding,
            "relu",
        )

    def classifier(self, path: str, source: str) -> str:
        """A 1x1x1 convolution with a bias."""
        weight = self._weight(f"{path}.weight", source)
        bias = self._array(f"{path}.bias", weight.shape[:1])
        return self._convolution(path, source, weight, bias.astype(np.float64))

    def mixed(self, path: str, source: str) -> str:
        """An Inception block: four branches on one input, concatenated on the channels."""
        ends = [self.unit(f"{path}.Branch_0.Conv3d_0a_1x1", source)]
        for branch in (1, 2):
            middle = self.unit(f"{path}.Branch_{branch}.Conv3d_0a_1x1", source)
            ends.append(self.unit(f"{path}.Branch_{branch}.Conv3d_0b_3x3", middle))
        threes, ones = (3, 3, 3), (1, 1, 1)
        shape = WindowShape(self[source].channels, self[source].size, threes, ones, ones, ones)
        pooled = self._pool(f"{path}.Branch_3.MaxPool3d_0a_3x3", MAX_POOL, source, shape)
        ends.append(self.unit(f"{path}.Branch_3.Conv3d_0b_1x1", pooled))
        channels = sum(self[end].channels for end in ends)
        return self._add(Layer(f"{path}.concat", CONCAT, tuple(ends), channels, self[source].size))

    def max_pool(self, path: str, source: str) -> str:
        """A max pool of `POOLS`; the padding that SAME needs lies after the map."""
        kernel, stride = POOLS[path]
        size = self[source].size
        d, h, w = (max(0, kernel[i] - stride[i]) for i in range(3))
        shape = WindowShape(self[source].channels, size, kernel, stride, pad_after=(d, h, w))
        return self._pool(path, MAX_POOL, source, shape)

    def average_pool(self, path: str, source: str, kernel: Size) -> str:
        shape = WindowShape(self[source].channels, self[source].size, kernel)
        return self._pool(path, AVERAGE_POOL, source, shape)

    def _convolution(
        self,
        name: str,
        source: str,
        weight: Array,
        bias: Array,
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
        activation: str = "none",
    ) -> str:
        filters, channels, kd, kh, kw = weight.shape
        (before, after), steps = padding, (stride, stride, stride)
        shape = ConvShape(
            channels,
            self[source].size,
            (kd, kh, kw),
            steps,
            (before, before, before),
            (after, after, after),
            filters=filters,
        )
        inputs, size = (source,), shape.out_size
        return self._add(Layer(name, CONV, inputs, filters, size, shape, weight, bias, activation))

    def _pool(self, name: str, op: str, source: str, shape: WindowShape) -> str:
        return self._add(Layer(name, op, (source,), shape.channels, shape.out_size, shape))

    def _add(self, layer: Layer) -> str:
        self.layers[layer.name] = layer
        return layer.name

    def _weight(self, name: str, source: str) -> Array:
        found = self._state.get(name)
        channels = self[source].channels
        if found is None or found.ndim != 5 or found.shape[1] != channels:
            shape = "nothing" if found is None else f"shape {found.shape}"
            raise ModelError(f"I3D needs {name} with {channels} channels; there is {shape}")
        return np.asarray(found, np.float32)

    def _array(self, name: str, shape: tuple[int, ...]) -> Array:
        found = self._state.get(name)
        if found is None or found.shape != shape:
            there = "nothing" if found is None else f"shape {found.shape}"
            raise ModelError(f"I3D needs {name} of shape {shape}; there is {there}")
        return np.asarray(found, np.float32)
