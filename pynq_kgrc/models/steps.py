"""From operators with their weights to a Graph, whatever door read them; torch is not needed.

A door (`trace` for torch modules) turns a network into a list of `Step`s, and `graph_of_steps`
makes layers of them and folds batch norms and activations into their neighbours. To add an
operator, add a function to the table `OPERATORS`.

No operator here reorders elements in memory, so the elements of a value always have the order of
the [C, D, H, W] map that its layer writes. A view only changes the shape that the next operator is
checked against.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import (
    ACTIVATIONS,
    ADD,
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

CLIP = "clip"
"""The name of the value that holds the clip, [1, 3, D, H, W]."""

SCALE = "scale"
"""A gain and an offset for each channel, then an activation: a batch norm, or a ReLU alone."""

LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True, eq=False)
class Step:
    """One operator of a network, as a door reads it."""

    name: str
    """Of the value that it makes, unlike all others; `CLIP` is taken."""
    op: str
    """A name of `OPERATORS`, which says what it reads. Any other is refused by name."""
    inputs: tuple[str | Array | None, ...]
    """Names of values, constants, and None for a constant that is left out, such as a bias."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    layer: str = ""
    """The name of the layer that it becomes, if it becomes one and no other has the name; by
    default `name`."""
    place: str = "top level"
    """Where it stands in the network, for messages: "layer1.0 (Net > Block)"."""
    shape: tuple[int, ...] | None = None
    """Of the value, where the door knows it; another one is refused."""
    spoken: str = ""
    """The operator's name where it was written, for messages; by default `op`."""


def graph_of_steps(
    name: str,
    steps: Sequence[Step],
    output: str,
    clip: ClipSpec,
    labels: Sequence[str] = (),
    rank: int = 5,
) -> Graph:
    """The network as plain data, its batch norms and activations folded.

    Args:
        name: of the network.
        steps: the operators in running order.
        output: name of the value that is the result.
        clip: the clip that it takes.
        labels: names of the outputs, in order.
        rank: axes of the value `CLIP`: 5, or 4 for [1, 3, H, W] of a clip of one frame.

    Raises:
        CompileError: an operator that the accelerator lacks (the message has its place in the
            network and what to use instead); an output that does not depend on the clip; a number
            of labels that is not the number of outputs.
    """
    reader = Reader(name, clip, rank)
    for step in steps:
        reader.read(step)
    if output not in reader.values:
        raise CompileError(f"{name}: the output has to be one tensor that depends on the clip")
    drafts, last = _fold(reader.drafts, reader.result(output))
    outputs = last.channels * math.prod(last.size)
    if labels and len(labels) != outputs:
        raise CompileError(f"{name} has {outputs} outputs, but {len(labels)} labels were given")
    layers = tuple(_layer(draft) for draft in drafts)
    return average_first(Graph(name, layers, last.name, clip, tuple(labels)))


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


@dataclass(frozen=True)
class Value:
    """The output of a layer in a shape, with padding for the window that reads it."""

    draft: LayerDraft
    shape: tuple[int, ...]
    """As the network was written: [1, C, D, H, W], padding included, or a view of it."""
    before: Size = (0, 0, 0)
    after: Size = (0, 0, 0)
    fill: float = 0.0

    @property
    def padded(self) -> bool:
        return any(self.before + self.after)

    @property
    def size(self) -> Size:
        return _sum(_sum(self.draft.size, self.before), self.after)


class Reader:
    """Reads steps in order: the values so far, and the layers that make them."""

    def __init__(self, name: str, clip: ClipSpec, rank: int) -> None:
        self.name = name
        size = (clip.frames, clip.height, clip.width)
        self.drafts = [LayerDraft("clip", INPUT, [], 3, size)]
        shape = (1, 3, *size) if rank == 5 else (1, 3, *size[1:])
        self.values = {CLIP: Value(self.drafts[0], shape)}
        self.steps: dict[str, Step] = {}

    def read(self, step: Step) -> None:
        """Read one operator."""
        if step.op not in OPERATORS:
            word = step.spoken or step.op
            raise self.refusal(step, f"the accelerator has no {word}", instead_of(word))
        self.steps[step.name] = step
        value = OPERATORS[step.op](self, step)
        if step.shape is not None and value.shape != step.shape:
            what = f"{_word(step)} gives {list(value.shape)} where {list(step.shape)} is expected"
            raise self.refusal(step, what)
        self.values[step.name] = value

    def result(self, output: str) -> LayerDraft:
        """The layer that makes the result."""
        value = self.values[output]
        if value.padded:
            raise self.padding(self.steps[output])
        if value.draft.op == INPUT:
            raise CompileError(
                f"{self.name}: the output is the clip itself; there is nothing to compute"
            )
        return value.draft

    def add(
        self, step: Step, op: str, inputs: list[LayerDraft], viewed: tuple[int, ...], **parts: Any
    ) -> Value:
        """Append the layer that `step` computes, seen in a shape; `parts` are its other fields."""
        if op in (ADD, CONCAT, MAX_POOL, AVERAGE_POOL):
            parts["positive"] = all(draft.positive for draft in inputs)
        base = step.layer or step.name
        taken = {draft.name for draft in self.drafts}
        name = next(n for n in (base, *(f"{base}_{i}" for i in range(2, 9999))) if n not in taken)
        self.drafts.append(LayerDraft(name, op, inputs, **parts))
        return Value(self.drafts[-1], viewed)

    def add_window(
        self, step: Step, op: str, value: Value, window: WindowShape, **parts: Any
    ) -> Value:
        """Append a window over `value`, which has as many axes afterwards."""
        axes = len(value.shape) - 2
        return self.add(
            step,
            op,
            [value.draft],
            (1, window.out_channels, *window.out_size[3 - axes :]),
            channels=window.out_channels,
            size=window.out_size,
            shape=window,
            **parts,
        )

    def value(self, step: Step, number: int = 0) -> Value:
        """The value that is input `number` of `step`."""
        read = step.inputs[number]
        if not isinstance(read, str):
            raise self.refusal(step, f"{_word(step)} takes a constant", "a bias or weight for it")
        return self.values[read]

    def whole(self, step: Step, number: int = 0) -> Value:
        """An input of a step that cannot take padding."""
        value = self.value(step, number)
        if value.padded:
            raise self.padding(step)
        return value

    def window(self, step: Step, axes: int) -> Value:
        """The first input, of a window over its last `axes` axes, checked to be [1, C, ...]."""
        value = self.value(step)
        wanted = (1, value.draft.channels, *value.size[3 - axes :])
        if value.shape != wanted or math.prod(value.size[: 3 - axes]) != 1:
            whole = [1, value.draft.channels, *value.size]
            what = f"{_word(step)} reads {whole} as {list(value.shape)}"
            raise self.refusal(step, what, "one clip, channels first, then depth, height, width")
        return value

    def constant(self, step: Step, number: int) -> Array | None:
        """A copy of a constant as float32; None if it is left out."""
        read = step.inputs[number] if number < len(step.inputs) else None
        if isinstance(read, str):
            raise self.refusal(step, f"{_word(step)} has weights that depend on the clip")
        return None if read is None else np.array(read, np.float32)

    def weight(self, step: Step, number: int) -> Array:
        """A copy of a constant that cannot be left out, as float32."""
        found = self.constant(step, number)
        if found is None:
            raise self.refusal(step, f"{_word(step)} has no input {number}")
        return found

    def padding(self, step: Step) -> CompileError:
        """The refusal of a `step` that cannot take padding."""
        what = f"padding goes into {_word(step)}"
        return self.refusal(step, what, "padding right before a convolution or pool only")

    def refusal(self, step: Step, what: str, instead: str | None = None) -> CompileError:
        """A CompileError that names the place of `step` in the network."""
        hint = f"; use {instead}" if instead else ""
        return CompileError(f"{self.name}: {what} at {step.place}{hint}")


def _word(step: Step) -> str:
    return step.spoken or step.op


def instead_of(word: str) -> str | None:
    """What to use instead of an operator, by any of its names; None if nothing is known."""
    return INSTEAD.get(_plain(word))


def _plain(word: str) -> str:
    """An operator's name as `INSTEAD` spells it: "leakyrelu" for leaky_relu and LeakyRelu."""
    return word.replace("_", "").lower()


def _sum(a: Size, b: Size) -> Size:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _size(values: Sequence[int], axes: int, rest: int) -> Size:
    """One or `axes` numbers as depth, height, width; `rest` for missing axes."""
    spread = [int(value) for value in values] * (axes if len(values) == 1 else 1)
    d, h, w = [rest] * (3 - axes) + spread
    return d, h, w


def _convolve(reader: Reader, step: Step) -> Value:
    """Reads a map, its weight [M, N / groups, ...], its bias.

    Attributes: stride, before and after (padding), dilation, each a number or one for each axis;
    groups.
    """
    weight = reader.weight(step, 1)
    axes = weight.ndim - 2
    if axes not in (2, 3):
        raise reader.refusal(step, f"a convolution over {axes} axes", "two or three")
    value = reader.window(step, axes)
    if value.padded and value.fill != 0:
        raise reader.refusal(step, f"a convolution over padding with {value.fill:g}", "zeros")
    weight = weight.reshape(*weight.shape[:2], *(1,) * (3 - axes), *weight.shape[2:])
    own_weights = weight.size
    weight = _ungrouped(weight, step.attributes.get("groups", 1))
    weight = _dilated(weight, _size(step.attributes.get("dilation", [1]), axes, 1))
    _, _, kd, kh, kw = weight.shape
    before, after = (_size(step.attributes.get(k, [0]), axes, 0) for k in ("before", "after"))
    shape = ConvShape(
        channels=value.draft.channels,
        in_size=value.draft.size,
        kernel=(kd, kh, kw),
        stride=_size(step.attributes.get("stride", [1]), axes, 1),
        pad_before=_sum(value.before, before),
        pad_after=_sum(value.after, after),
        filters=weight.shape[0],
        own_weights=0 if own_weights == weight.size else own_weights,
    )
    bias = reader.constant(step, 2)
    return reader.add_window(step, CONV, value, shape, weight=weight, bias=bias)


def _ungrouped(weight: Array, groups: int) -> Array:
    """[M, N / groups, ...] to the dense [M, N, ...], zero between the groups."""
    if groups == 1:
        return weight
    filters, channels = weight.shape[0] // groups, weight.shape[1]
    dense = np.zeros((weight.shape[0], channels * groups, *weight.shape[2:]), weight.dtype)
    for g in range(groups):
        rows = slice(g * filters, (g + 1) * filters)
        dense[rows, g * channels : (g + 1) * channels] = weight[rows]
    return dense


def _dilated(weight: Array, dilation: Size) -> Array:
    """The equal kernel without dilation: larger, with zeros between the taps."""
    if dilation == (1, 1, 1):
        return weight
    kernel = [(k - 1) * step + 1 for k, step in zip(weight.shape[2:], dilation, strict=True)]
    dense = np.zeros((*weight.shape[:2], *kernel), weight.dtype)
    dense[:, :, :: dilation[0], :: dilation[1], :: dilation[2]] = weight
    return dense


def _linear(reader: Reader, step: Step) -> Value:
    """A convolution whose kernel is the whole input map. Reads it, a weight [M, N], a bias."""
    value = reader.whole(step)
    source = value.draft
    whole = (source.channels, *source.size)
    if value.shape[-1] != math.prod(whole):
        what = f"{_word(step)} reads {[1, *whole]} as {list(value.shape)}"
        raise reader.refusal(step, what, "flatten(1) before it, or a 1x1x1 convolution")
    weight = reader.weight(step, 1)
    filters = weight.shape[0]
    return reader.add(
        step,
        CONV,
        [source],
        (*value.shape[:-1], filters),
        channels=filters,
        size=(1, 1, 1),
        shape=ConvShape(source.channels, source.size, source.size, filters=filters),
        weight=weight.reshape(filters, *whole),
        bias=reader.constant(step, 2),
    )


def _pool(reader: Reader, step: Step, op: str) -> Value:
    """Attributes: kernel, one number for each axis; stride, before, after, dilation; ceil_mode.

    For an average pool also count_include_pad and divisor.
    """
    given = step.attributes
    axes = len(given["kernel"])
    value = reader.window(step, axes)
    kernel = _size(given["kernel"], axes, 1)
    stride = _size(given.get("stride", given["kernel"]), axes, 1)
    pads = _size(given.get("before", [0]), axes, 0), _size(given.get("after", [0]), axes, 0)
    if any(count != 1 for count in given.get("dilation", ())):
        raise reader.refusal(step, "a dilated max pool", "a plain one")
    before, after = _sum(value.before, pads[0]), _sum(value.after, pads[1])
    if op == MAX_POOL:
        zeros = value.fill == 0 and value.draft.positive
        if value.padded and not zeros and value.fill > LOWEST:
            what = f"padding with {value.fill:g} before a max pool of values that may be negative"
            raise reader.refusal(step, what, "the pool's own padding, or put a ReLU before it")
        if any(max(before[i], after[i]) >= kernel[i] for i in range(3)):
            raise reader.refusal(step, "a max pool with windows that see padding only")
    elif value.padded and value.fill != 0:
        raise reader.refusal(step, f"an average pool over padding with {value.fill:g}", "zeros")
    elif not given.get("count_include_pad", True) and any(pads[0] + pads[1]):
        what = "an average pool that leaves padding out of its mean"
        raise reader.refusal(step, what, "count_include_pad=True")
    elif given.get("divisor") not in (None, math.prod(kernel)):
        raise reader.refusal(step, "an average pool with a divisor of its own", "the plain one")
    if given.get("ceil_mode"):  # the last window may extend beyond the padding
        out = [
            _ceil_length(value.draft.size[i], kernel[i], stride[i], before[i], after[i])
            for i in range(3)
        ]
        reach = [(out[i] - 1) * stride[i] + kernel[i] - before[i] for i in range(3)]
        d, h, w = (max(after[i], reach[i] - value.draft.size[i]) for i in range(3))
        if op == AVERAGE_POOL and (d, h, w) != after:
            what = "an average pool in ceil_mode, whose last window is not full,"
            raise reader.refusal(step, what, "padding, or a size that fits")
        after = (d, h, w)
    shape = WindowShape(value.draft.channels, value.draft.size, kernel, stride, before, after)
    return reader.add_window(step, op, value, shape)


def _ceil_length(length: int, kernel: int, stride: int, before: int, after: int) -> int:
    """Windows of a pool in ceil_mode: the last one begins within the input or its padding."""
    windows = -(-(length + before + after - kernel) // stride) + 1
    return windows - ((windows - 1) * stride >= length + before)


def _adaptive_pool(reader: Reader, step: Step, op: str) -> Value:
    """Attribute: size of the output, one number for each axis, None for that of the input."""
    wanted = step.attributes["size"]
    axes = len(wanted)
    value = reader.window(step, axes)
    size = value.size
    found = [s if n is None else n for s, n in zip(size[3 - axes :], wanted, strict=True)]
    out = _size(found, axes, 1)
    if value.padded or any(size[i] % out[i] for i in range(3)):
        what = f"{_word(step)} from {size} to {out}"
        raise reader.refusal(step, what, "an output size that divides the input size, such as 1")
    d, h, w = (size[i] // out[i] for i in range(3))
    return reader.add_window(
        step, op, value, WindowShape(value.draft.channels, size, (d, h, w), (d, h, w))
    )


def _mean(reader: Reader, step: Step) -> Value:
    """An average pool over whole axes of the map. Attributes: axes (all if None), keepdim."""
    value = reader.whole(step)
    source, found = value.draft, value.shape
    gone = {axis % len(found) for axis in step.attributes.get("axes") or range(len(found))}
    long = [axis for axis in range(2, len(found)) if found[axis] > 1]
    axes = [i for i in range(3) if source.size[i] > 1]
    if found[:2] != (1, source.channels) or gone & {0, 1}:
        what = f"a mean over axes {sorted(gone)} of {list(found)}"
        raise reader.refusal(step, what, "a mean over depth, height or width")
    if not long or gone.issuperset(long):
        kernel = source.size
    elif [found[axis] for axis in long] == [source.size[i] for i in axes]:
        pairs = zip(axes, long, strict=True)
        over = {i for i, axis in pairs if axis in gone}
        d, h, w = (source.size[i] if i in over else 1 for i in range(3))
        kernel = (d, h, w)
    else:
        what = f"a mean over a part of [1, {source.channels}, *{source.size}] seen as {list(found)}"
        raise reader.refusal(step, what, "a mean before the view")
    keep = step.attributes.get("keepdim", False)
    shape = tuple(
        1 if axis in gone else count for axis, count in enumerate(found) if keep or axis not in gone
    )
    if kernel == (1, 1, 1):
        return Value(source, shape)
    window = WindowShape(source.channels, source.size, kernel)
    parts = {"channels": source.channels, "size": window.out_size}
    return reader.add(step, AVERAGE_POOL, [source], shape, shape=window, **parts)


def _pad(reader: Reader, step: Step) -> Value:
    """No layer: the window that reads the value takes the padding over.

    Attributes: widths, (before, after) of every axis of the value; fill; mode.
    """
    mode = step.attributes.get("mode", "constant")
    if mode != "constant":
        raise reader.refusal(step, f"{mode} padding", "zeros")
    given = reader.value(step)
    pairs = [(int(b), int(a)) for b, a in step.attributes["widths"]]
    axes = len(pairs) - 2
    if axes not in (2, 3) or any(b or a for b, a in pairs[:2]) or min(map(min, pairs)) < 0:
        what = f"padding by {pairs} of {list(given.shape)}"
        raise reader.refusal(step, what, "widths of 0 or more, on depth, height and width only")
    value = reader.window(step, axes)
    fill = float(step.attributes.get("fill", 0))
    if value.padded and value.fill != fill:
        raise reader.refusal(step, f"padding with {value.fill} and then with {fill}", "one value")
    (d0, d1), (h0, h1), (w0, w1) = [(0, 0)] * (3 - axes) + pairs[2:]
    return Value(
        value.draft,
        tuple(n + b + a for n, (b, a) in zip(value.shape, pairs, strict=True)),
        _sum(value.before, (d0, h0, w0)),
        _sum(value.after, (d1, h1, w1)),
        fill,
    )


def _batch_norm(reader: Reader, step: Step) -> Value:
    """Reads a map, then its mean, variance, gain and offset, the last two may be left out.

    Attribute: eps, which is added to the variance.
    """
    value = reader.whole(step)
    source, found = value.draft, value.shape
    if found[:2] != (1, source.channels):
        what = f"batch norm reads [1, {source.channels}, *{source.size}] as {list(found)}"
        raise reader.refusal(step, what, "the channels as they come")
    mean, variance = reader.weight(step, 1), reader.weight(step, 2)
    weight, bias = reader.constant(step, 3), reader.constant(step, 4)
    gain = 1.0 / np.sqrt(variance.astype(np.float64) + step.attributes["eps"])
    if weight is not None:
        gain *= weight
    offset = -gain * mean + (0.0 if bias is None else bias)
    return _scale(reader, step, value, gain=gain, bias=offset)


def _gain_and_offset(reader: Reader, step: Step) -> Value:
    """Reads a map, a gain and an offset: a number, one for each channel, or None for neither."""
    value = reader.whole(step)
    gain, offset = (
        np.full(value.draft.channels, rest, np.float64) if read is None else read.astype(np.float64)
        for read, rest in ((reader.constant(step, 1), 1), (reader.constant(step, 2), 0))
    )
    each = np.ones(value.draft.channels)
    return _scale(reader, step, value, gain=gain * each, bias=offset * each)


def _scale(reader: Reader, step: Step, value: Value, **parts: Any) -> Value:
    source = value.draft
    sizes = {"channels": source.channels, "size": source.size}
    return reader.add(step, SCALE, [source], value.shape, **sizes, **parts)


def _clamp(reader: Reader, step: Step) -> Value:
    """The clamps of `graph.ACTIVATIONS`. Attributes: low and high, None where it is open."""
    bounds = step.attributes.get("low"), step.attributes.get("high")
    activation = {known: name for name, known in ACTIVATIONS.items()}.get(bounds, "none")
    if activation == "none":
        raise reader.refusal(step, f"a clamp to {bounds[0]}..{bounds[1]}", "ReLU or ReLU6")
    positive = bounds[0] is not None and bounds[0] >= 0
    return _scale(reader, step, reader.whole(step), activation=activation, positive=positive)


def _add(reader: Reader, step: Step) -> Value:
    """Reads two maps of the same shape. Attribute: alpha, a factor of the second."""
    alpha = step.attributes.get("alpha", 1)
    if alpha != 1:
        raise reader.refusal(step, f"an addition with alpha={alpha}", "alpha=1")
    a, b = reader.whole(step, 0), reader.whole(step, 1)
    sizes = [(value.draft.channels, value.draft.size) for value in (a, b)]
    if a.shape != b.shape or sizes[0] != sizes[1]:
        what = f"an addition of {list(a.shape)} and {list(b.shape)}"
        raise reader.refusal(step, what, "two maps of the same shape")
    parts = {"channels": a.draft.channels, "size": a.draft.size}
    return reader.add(step, ADD, [a.draft, b.draft], a.shape, **parts)


def _concat(reader: Reader, step: Step) -> Value:
    """Reads any number of maps. Attribute: axis."""
    values = [reader.whole(step, number) for number in range(len(step.inputs))]
    drafts, shapes = [value.draft for value in values], [value.shape for value in values]
    axis = step.attributes["axis"] % len(shapes[0])
    whole = [(1, s.channels, *shape[2:]) for s, shape in zip(drafts, shapes, strict=True)]
    if axis != 1 or whole != shapes or len({s.size for s in drafts}) != 1:
        what = f"a concatenation of {', '.join(str(list(s)) for s in shapes)} on axis {axis}"
        raise reader.refusal(step, what, "the channels (axis 1) of maps of the same size")
    channels = sum(s.channels for s in drafts)
    shape = (1, channels, *shapes[0][2:])
    return reader.add(step, CONCAT, drafts, shape, channels=channels, size=drafts[0].size)


def _reshape(reader: Reader, step: Step) -> Value:
    """Another shape over the same elements in the same order. Attribute: shape, without -1."""
    return Value(reader.whole(step).draft, tuple(map(int, step.attributes["shape"])))


def _identity(reader: Reader, step: Step) -> Value:
    """The value itself, such as what a dropout makes."""
    return reader.value(step)


def _convert(reader: Reader, step: Step) -> Value:
    """Between floating-point types the reals stay the same, up to rounding. Attributes: to, real.

    `to` is the name of the type, `real` says whether it is a floating-point type.
    """
    if not step.attributes["real"]:
        what = f"a conversion to {step.attributes['to']}"
        raise reader.refusal(step, what, "floating-point types only")
    return reader.value(step)


def _permute(reader: Reader, step: Step) -> Value:
    """A view, if only axes of length 1 are moved. Attribute: order."""
    value = reader.whole(step)
    order = [axis % len(value.shape) for axis in step.attributes["order"]]
    moved = [axis for axis in order if value.shape[axis] > 1]
    if moved != sorted(moved):
        what = f"{_word(step)}({list(step.attributes['order'])})"
        raise reader.refusal(step, what, INSTEAD["permute"])
    return Value(value.draft, tuple(value.shape[axis] for axis in order))


OPERATORS: dict[str, Callable[[Reader, Step], Value]] = {
    "conv": _convolve,
    "linear": _linear,
    "max_pool": partial(_pool, op=MAX_POOL),
    "average_pool": partial(_pool, op=AVERAGE_POOL),
    "adaptive_max_pool": partial(_adaptive_pool, op=MAX_POOL),
    "adaptive_average_pool": partial(_adaptive_pool, op=AVERAGE_POOL),
    "mean": _mean,
    "pad": _pad,
    "batch_norm": _batch_norm,
    "scale": _gain_and_offset,
    "clamp": _clamp,
    "add": _add,
    "concat": _concat,
    "reshape": _reshape,
    "permute": _permute,
    "identity": _identity,
    "convert": _convert,
}
"""The function that reads each operator; its docstring has the inputs and the attributes."""

INSTEAD = {
    _plain(op): instead
    for instead, ops in {
        "ReLU or ReLU6": "sigmoid silu gelu tanh elu celu selu mish softplus leaky_relu prelu "
        "hardswish hardsigmoid threshold",
        "BatchNorm": "layer_norm group_norm instance_norm",
        "BatchNorm with running statistics": "native_batch_norm_legit",
        "the logits as they are: the runtime applies soft-max": "softmax log_softmax",
        "convolutions with stride; maps cannot grow": "conv_transpose2d conv_transpose3d "
        "upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_trilinear3d",
        "the 3-D layer with a window of (k, 1, 1)": "conv1d avg_pool1d max_pool1d",
        "weights that hold the factor; gates have no counterpart": "mul div",
        "an addition, with the sign in the weights": "sub",
        "a Linear or a convolution with fixed weights": "matmul bmm mm einsum "
        "scaled_dot_product_attention",
        "channels first from the clip to the logits": "permute transpose movedim",
        "strides or pools; ClipSpec chooses frames and crop": "slice select",
        "one convolution for each part": "split split_with_sizes",
        "torch.cat on the channels": "stack",
        "a mean": "sum",
        "MaxPool3d": "amax max",
        "convolutions over time": "lstm gru rnn_tanh rnn_relu",
        "nn.Dropout, or training=self.training": "native_dropout",
    }.items()
    for op in ops.split()
}
"""What to use instead of operators that are not supported, by their plain names."""


def _fold(drafts: list[LayerDraft], output: LayerDraft) -> tuple[list[LayerDraft], LayerDraft]:
    """Merge each SCALE into the layer before it, unless that layer has another reader."""
    readers = Counter(source for draft in drafts for source in draft.inputs)
    merged: dict[LayerDraft, LayerDraft] = {}
    kept = []
    for draft in drafts:
        draft.inputs = [merged.get(source, source) for source in draft.inputs]
        if draft.op == SCALE and _absorbs(draft.inputs[0], draft, readers[draft.inputs[0]] == 1):
            merged[draft] = draft.inputs[0]
            readers[draft.inputs[0]] += readers[draft] - 1
        else:
            kept.append(draft)
    return kept, merged.get(output, output)


def _absorbs(before: LayerDraft, scale: LayerDraft, alone: bool) -> bool:
    """Merge `scale` into `before` if possible; `alone`: no other layer reads `before`."""
    plain = scale.gain is None
    if plain and scale.activation == "relu" and before.positive:
        return True
    if plain and scale.activation == before.activation:
        return True
    if not alone or before.activation != "none" or before.op in (INPUT, CONCAT):
        return False
    if not plain:
        if before.op not in (CONV, SCALE):
            return False
        _rescale(before, scale)
    before.activation = scale.activation
    before.positive = scale.positive
    return True


def _rescale(before: LayerDraft, scale: LayerDraft) -> None:
    """Fold gain and offset (float64) into the convolution or SCALE before."""
    assert scale.gain is not None and scale.bias is not None
    gain = scale.gain
    if before.weight is not None:
        before.weight = (before.weight * gain[:, None, None, None, None]).astype(np.float32)
    else:
        before.gain = gain * (1.0 if before.gain is None else before.gain)
    before.bias = scale.bias + gain * (0.0 if before.bias is None else before.bias)


def _layer(draft: LayerDraft) -> Layer:
    """The finished layer; a SCALE that was not merged becomes a diagonal 1x1x1 convolution."""
    if draft.op == SCALE:
        channels = draft.channels
        gain = np.ones(channels) if draft.gain is None else draft.gain
        draft.weight = np.diag(gain).astype(np.float32).reshape(channels, channels, 1, 1, 1)
        draft.shape = ConvShape(
            channels, draft.size, (1, 1, 1), filters=channels, own_weights=channels
        )
        draft.op = CONV
    bias = draft.bias
    if draft.op == CONV:
        bias = np.zeros(draft.channels) if bias is None else bias.astype(np.float64)
    return Layer(
        name=draft.name,
        op=draft.op,
        inputs=tuple(source.name for source in draft.inputs),
        channels=draft.channels,
        size=draft.size,
        shape=draft.shape,
        weight=draft.weight,
        bias=bias,
        activation=draft.activation,
    )


def average_first(graph: Graph) -> Graph:
    """Swap an average pool with the 1x1x1 convolution before it: same values, less work.

    Both are linear, so their order does not matter. A classifier's logits are then written by the
    last layer, whose output is the one tensor with 16 bits.
    """
    layers = list(graph.layers)
    output = graph.output
    for i, pool in enumerate(layers):
        if pool.op != AVERAGE_POOL or pool.activation != "none" or pool.shape is None:
            continue
        at, conv = next((j, x) for j, x in enumerate(layers) if x.name == pool.inputs[0])
        alone = sum(conv.name in layer.inputs for layer in layers) == 1
        padded = any(pool.shape.pad_before + pool.shape.pad_after)
        if not alone or padded or conv.activation != "none" or not _is_pointwise(conv):
            continue
        assert isinstance(conv.shape, ConvShape)
        source = replace(pool.shape, channels=conv.shape.channels)
        layers[at] = replace(
            pool, inputs=conv.inputs, channels=source.channels, shape=source, size=pool.size
        )
        layers[i] = replace(
            conv,
            inputs=(pool.name,),
            size=pool.size,
            shape=replace(conv.shape, in_size=pool.size),
        )
        for j, layer in enumerate(layers):
            if j > i:
                inputs = tuple(conv.name if x == pool.name else x for x in layer.inputs)
                layers[j] = replace(layer, inputs=inputs)
        output = conv.name if output == pool.name else output
    return replace(graph, layers=tuple(layers), output=output)


def _is_pointwise(layer: Layer) -> bool:
    shape = layer.shape
    if layer.op != CONV or shape is None or any(shape.pad_before + shape.pad_after):
        return False
    return shape.taps == 1 and max(shape.stride) == 1
