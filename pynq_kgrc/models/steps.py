"""From operators with their weights to a Graph, whatever door read them; torch is not needed.

A door (`trace` for torch modules) turns a network into a list of `Step`s, and `graph_of_steps`
makes layers of them and folds batch norms and activations into their neighbours. To add an
operator, add a function to the table `OPERATORS`.

What only moves elements (slices, transposes, views) becomes no layer: it stays beside the value
(`values.py`) until an operator reads it as a map.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
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
from pynq_kgrc.models.values import (
    FRAMES,
    LayerDraft,
    Value,
    find_selection,
    index_of,
    indexed,
    map_axes,
    moved,
    padded,
    permuted,
    placements,
    viewed,
    window_axes,
    without_axes,
)
from pynq_kgrc.quant import Array, WeightQuant

CLIP = "clip"
"""The name of the value that holds the clip, [1, C, D, H, W]."""

SCALE = "scale"
"""A gain and an offset for each channel, then an activation: a batch norm, or a ReLU alone."""

SOFTMAX_INSIDE = "a soft-max inside the network"

MAX_UNREAD = 4
"""A fully connected layer may read a map with this many times the elements that it needs."""

MAX_LINES = 20
"""Different refusals that one message names."""

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
        rank: axes of the value `CLIP`: 5, or 4 for [1, C, H, W] of a clip of one frame.

    Raises:
        CompileError: an operator that the accelerator lacks (the message has its place in the
            network and what to use instead); an output that does not depend on the clip; a number
            of labels that is not the number of outputs.
    """
    reader = Reader(name, clip, rank)
    refused = []
    for step in _needed(steps, output):
        try:
            reader.read(step)
        except _Refused as refusal:
            refused.append(refusal)
            reader.lost.add(step.name)
        except _Lost:
            reader.lost.add(step.name)
    if refused:
        raise _refusals(name, refused)
    if output not in reader.values:
        raise CompileError(f"{name}: the output has to be one tensor that depends on the clip")
    result = reader.result(output)
    drafts, last = _fold(reader.drafts, result.draft)
    outputs = last.channels * math.prod(last.size)
    if labels and len(labels) != outputs:
        raise CompileError(f"{name} has {outputs} outputs, but {len(labels)} labels were given")
    layers = tuple(_layer(draft) for draft in drafts)
    graph = Graph(name, layers, last.name, clip, tuple(labels), softmax=result.softmax)
    return average_first(graph)


def _needed(steps: Sequence[Step], output: str) -> list[Step]:
    """The steps that the output depends on, in the same order."""
    wanted = {output}
    found = []
    for step in reversed(steps):
        if step.name in wanted:
            wanted.update(read for read in step.inputs if isinstance(read, str))
            found.append(step)
    return found[::-1]


class _Refused(CompileError):
    """An operator that the accelerator lacks."""

    def __init__(self, name: str, step: Step, what: str, instead: str | None) -> None:
        hint = f"; use {instead}" if instead else ""
        super().__init__(f"{name}: {what} at {step.place}{hint}")
        self.what, self.place, self.hint = what, step.place, hint


class _Lost(Exception):
    """A step reads what a refused one would make."""


class Reader:
    """Reads steps in order: the values so far, and the layers that make them."""

    def __init__(self, name: str, clip: ClipSpec, rank: int) -> None:
        self.name = name
        size = (clip.frames, clip.height, clip.width)
        self.drafts = [LayerDraft("clip", INPUT, [], clip.channels, size)]
        shape = (1, clip.channels, *(size if rank == 5 else size[1:]))
        self.values = {CLIP: Value(self.drafts[0], shape)}
        self.steps: dict[str, Step] = {}
        self.lost: set[str] = set()
        self.gathers: dict[Value, Value] = {}

    def read(self, step: Step) -> None:
        """Read one operator."""
        self.steps[step.name] = step
        if step.op not in OPERATORS:
            raise self.refusal(step, f"the accelerator has no {_word(step)}", _instead(step))
        value = OPERATORS[step.op](self, step)
        if step.shape is not None and value.shape != step.shape:
            what = f"{_word(step)} gives {list(value.shape)} where {list(step.shape)} is expected"
            raise self.refusal(step, what)
        named = [read for read in step.inputs if isinstance(read, str)]
        soft = [read for read in named if self.values[read].softmax]
        if soft:  # only views of a soft-max are its soft-max
            same = value.draft is self.values[soft[0]].draft and step.op != "softmax"
            if not same or value.index is not None or value.padded:
                raise self.refusal(self.steps[soft[0]], SOFTMAX_INSIDE, INSTEAD["softmax"])
            value = replace(value, softmax=True)
        self.values[step.name] = value

    def result(self, output: str) -> Value:
        """The value that is the result, without padding or movement."""
        value = self.values[output]
        if (value.index is not None or value.padded) and value.shape[0] == 1:
            value = self.gathered(self.steps[output], value)
        if not value.plain:
            what = f"an output {list(value.shape)} whose axes are in another order"
            raise self.refusal(self.steps[output], what, "[1, channels, ...] as the output")
        if value.draft.op == INPUT:
            raise CompileError(
                f"{self.name}: the output is the clip itself; there is nothing to compute"
            )
        return value

    def add(
        self,
        step: Step,
        op: str,
        inputs: list[LayerDraft],
        name: str = "",
        **parts: Any,
    ) -> LayerDraft:
        """Append the layer that `step` computes; `parts` are its other fields."""
        if op in (ADD, CONCAT, MAX_POOL, AVERAGE_POOL):
            parts["positive"] = all(draft.positive for draft in inputs)
        base = name or step.layer or step.name
        taken = {draft.name for draft in self.drafts}
        name = next(n for n in (base, *(f"{base}_{i}" for i in range(2, 9999))) if n not in taken)
        self.drafts.append(LayerDraft(name, op, inputs, **parts))
        return self.drafts[-1]

    def add_window(
        self,
        step: Step,
        op: str,
        value: Value,
        places: Sequence[int],
        window: WindowShape,
        **parts: Any,
    ) -> Value:
        """Append a window over `value`, which has as many axes afterwards, at these `places`."""
        sizes: dict[str, Any] = {"channels": window.out_channels, "size": window.out_size}
        draft = self.add(step, op, [value.draft], shape=window, **sizes, **parts)
        out = tuple(draft.size[axis] for axis in places)
        if value.shape[0] != 1:  # frames as a batch
            return viewed(draft, draft.dims, FRAMES)
        return Value(draft, (1, draft.channels, *out))

    def value(self, step: Step, number: int = 0) -> Value:
        """The value that is input `number` of `step`."""
        read = step.inputs[number]
        if not isinstance(read, str):
            raise self.refusal(step, f"{_word(step)} takes a constant", "a bias or weight for it")
        if read in self.lost:
            raise _Lost
        return self.values[read]

    def whole(self, step: Step, number: int = 0) -> Value:
        """An input of a step that cannot take padding: it is computed where there is any."""
        value = self.value(step, number)
        return self.gathered(step, value) if value.padded else value

    def window(self, step: Step, axes: int) -> tuple[Value, tuple[int, ...]]:
        """The first input of a window over its last `axes` axes, and those axes of the map."""
        value = self.value(step)
        places = window_axes(value, axes)
        if places is None and len(value.shape) == axes + 2:
            value = self.gathered(step, value)
            places = window_axes(value, axes)
        if places is None:
            raise self.unreadable(step, value)
        return value, places

    def gathered(self, step: Step, value: Value) -> Value:
        """The value as a map [1, C, ...], or frames as a batch, that has its elements in order.

        If they were moved, one convolution puts them there.
        """
        shape = value.shape
        if not value.padded and ((value.plain and shape[0] == 1) or self._lies(value)):
            return value
        if value in self.gathers:
            return self.gathers[value]
        _zeros_only(self, step, value)
        if len(shape) not in (2, 3, 4, 5):
            raise self.unreadable(step, value)
        index = index_of(value)
        batch = shape[0] != 1
        if batch and len(shape) not in (2, 4):
            raise self.unreadable(step, value)
        if batch:
            forms = [(shape[1], shape[0], *((1, 1) if len(shape) == 2 else shape[2:]))]
            index = index.swapaxes(0, 1)
        else:
            forms = []
            for places in placements(len(shape) - 2):
                size = [1, 1, 1]
                for axis, length in zip(places, shape[2:], strict=True):
                    size[axis] = length
                forms.append((shape[1], *size))
        for form in forms:
            found = find_selection(value.draft, index.reshape(form))
            if found is None:
                continue
            draft = self.add(
                step,
                CONV,
                [value.draft],
                f"{value.draft.name}.moved",
                channels=form[0],
                size=found.shape.out_size,
                shape=found.shape,
                weight=found.weight,
                positive=value.draft.positive,
                picks=found.picks,
                code=value.draft.code,
            )
            base = (shape[1], shape[0], *shape[2:]) if batch else shape
            order = (1, 0, *range(2, len(shape))) if batch else range(len(shape))
            made = viewed(draft, base, order)
            self.gathers[value] = made
            return made
        raise self.unreadable(step, value)

    def _lies(self, value: Value) -> bool:
        """Whether a window, or for [N, C] any reader, can read the value where it lies."""
        return len(value.shape) > 2 and window_axes(value, len(value.shape) - 2) is not None

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

    def unreadable(
        self,
        step: Step,
        value: Value,
        instead: str = "one clip, channels first, then depth, height, width",
    ) -> CompileError:
        """The refusal of a `step` that reads a value in an order or shape that is none of a map."""
        whole = [1, *value.draft.dims]
        return self.refusal(step, f"{_word(step)} reads {whole} as {list(value.shape)}", instead)

    def refusal(self, step: Step, what: str, instead: str | None = None) -> CompileError:
        """A CompileError that names the place of `step` in the network."""
        return _Refused(self.name, step, what, instead)


def _refusals(name: str, refused: list[_Refused]) -> CompileError:
    """One message about all that is refused: each once, with its count and first place."""
    if len(refused) == 1:
        return refused[0]
    counts = Counter(refusal.what for refusal in refused)
    firsts = {refusal.what: refusal for refusal in reversed(refused)}
    lines = [
        f"{what}{f', {count} times, first' if count > 1 else ''} at {firsts[what].place}"
        f"{firsts[what].hint}"
        for what, count in counts.items()
    ]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"and {len(lines) - MAX_LINES} others"]
    return CompileError(
        f"{name}: {len(refused)} operators do not run on the accelerator:\n  " + "\n  ".join(lines)
    )


def _word(step: Step) -> str:
    return step.spoken or step.op


def _instead(step: Step) -> str | None:
    """What to use instead of an operator that the accelerator lacks."""
    return INSTEAD.get(_plain(_word(step)))


def _plain(word: str) -> str:
    """An operator's name as `INSTEAD` spells it: "leakyrelu" for leaky_relu and LeakyRelu."""
    return word.replace("_", "").lower()


def _sum(a: Size, b: Size) -> Size:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _sizes(values: Sequence[int], places: Sequence[int], rest: int) -> Size:
    """One number, or one for each of these axes, as depth, height, width; `rest` elsewhere."""
    spread = [int(value) for value in values] * (len(places) if len(values) == 1 else 1)
    sizes = [rest] * 3
    for axis, value in zip(places, spread, strict=True):
        sizes[axis] = value
    return _three(sizes)


def _three(sizes: Sequence[int]) -> Size:
    d, h, w = sizes
    return d, h, w


def _convolve(reader: Reader, step: Step) -> Value:
    """Reads a map, its weight [M, N / groups, ...], its bias.

    Attributes: stride, before and after (padding), dilation, each a number or one for each axis;
    groups; weight_step, [M] or None, the real of one code of a quantized weight.
    """
    weight = reader.weight(step, 1)
    axes = weight.ndim - 2
    if axes not in (1, 2, 3):
        raise reader.refusal(step, f"a convolution over {axes} axes", "one, two or three")
    value, places = reader.window(step, axes)
    if value.padded and value.fill != 0:
        raise reader.refusal(step, f"a convolution over padding with {value.fill:g}", "zeros")
    weight = weight.reshape(*weight.shape[:2], *_sizes(weight.shape[2:], places, 1))
    own_weights = weight.size
    weight = _ungrouped(weight, step.attributes.get("groups", 1))
    weight = _dilated(weight, _sizes(step.attributes.get("dilation", [1]), places, 1))
    _, _, kd, kh, kw = weight.shape
    before, after = (_sizes(step.attributes.get(k, [0]), places, 0) for k in ("before", "after"))
    shape = ConvShape(
        channels=value.draft.channels,
        in_size=value.draft.size,
        kernel=(kd, kh, kw),
        stride=_sizes(step.attributes.get("stride", [1]), places, 1),
        pad_before=_sum(value.before, before),
        pad_after=_sum(value.after, after),
        filters=weight.shape[0],
        own_weights=0 if own_weights == weight.size else own_weights,
    )
    bias = reader.constant(step, 2)
    parts = {"weight": weight, "bias": bias, "weight_step": step.attributes.get("weight_step")}
    return reader.add_window(step, CONV, value, places, shape, **parts)


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
    """Reads a map, a weight [M, N], a bias. Attribute: weight_step, as of a convolution.

    It is a convolution over the whole map, or one over its channels where they are the last axis.
    """
    value = reader.whole(step)
    weight = reader.weight(step, 1)
    bias = reader.constant(step, 2)
    filters, features = weight.shape
    draft = value.draft
    rows = value.shape[:-1]
    if value.plain and features == math.prod(draft.dims):
        kernel = draft.size
    elif math.prod(rows) == 1 and math.prod(draft.dims) <= MAX_UNREAD * features:
        kernel, weight = draft.size, _reordered(weight, value)
    else:
        kernel = (1, 1, 1)
        channels_last = value.index is None and value.order == (*range(1, len(value.shape)), 0)
        if features == draft.channels and channels_last and value.base[0] == features:
            pass  # [..., C] of the map itself
        elif value.index is not None and _frames_in_rows(value):
            kernel = (1, *draft.size[1:])
        else:
            draft = _rows_gathered(reader, step, value)
    shape = ConvShape(draft.channels, draft.size, kernel, filters=filters)
    made = reader.add(
        step,
        CONV,
        [draft],
        channels=filters,
        size=shape.out_size,
        shape=shape,
        weight=weight.reshape(filters, draft.channels, *kernel),
        bias=bias,
        weight_step=step.attributes.get("weight_step"),
    )
    return viewed(made, (filters, *rows), (*range(1, len(value.shape)), 0))


def _reordered(weight: Array, value: Value) -> Array:
    """[M, N] weights of the elements of a value as those of the whole map, zero for the others."""
    index = index_of(value).reshape(-1)
    whole = np.zeros((math.prod(value.draft.dims), len(weight)), weight.dtype)
    np.add.at(whole, index[index >= 0], weight.T[index >= 0])
    return whole.T


def _frames_in_rows(value: Value) -> bool:
    """Whether the value is [D, C * H * W] of the map: each frame flattened."""
    channels, depth = value.draft.dims[:2]
    if value.shape[-1] * depth != math.prod(value.draft.dims) or value.shape[:-1].count(1) < (
        len(value.shape) - 2
    ):
        return False
    whole = index_of(Value(value.draft, value.draft.dims))
    rows = whole.swapaxes(0, 1).reshape(depth, -1)
    return np.array_equal(index_of(value).reshape(-1), rows.reshape(-1))


def _rows_gathered(reader: Reader, step: Step, value: Value) -> LayerDraft:
    """A map whose channels are the last axis of the value, its other axes the positions."""
    rows = [length for length in value.shape[:-1] if length > 1]
    if len(rows) > 3:
        raise reader.unreadable(step, value)
    channels_first = indexed(value.draft, np.moveaxis(index_of(value), -1, 0))
    base = (1, value.shape[-1], *rows)
    plain = indexed(value.draft, index_of(channels_first).reshape(base))
    if plain.plain and window_axes(plain, len(rows)) is not None:
        return plain.draft
    refusal = reader.unreadable(step, value, "flatten(1) before it, or a 1x1x1 convolution")
    try:
        draft = reader.gathered(step, plain).draft
    except _Refused:
        raise refusal from None
    if draft.channels != value.shape[-1]:  # a plain view, which lies in other channels
        raise refusal
    return draft


def _pool(reader: Reader, step: Step, op: str) -> Value:
    """Attributes: kernel, one number for each axis; stride, before, after, dilation; ceil_mode.

    For an average pool also count_include_pad and divisor.
    """
    given = step.attributes
    value, places = reader.window(step, len(given["kernel"]))
    kernel = _sizes(given["kernel"], places, 1)
    stride = _sizes(given.get("stride", given["kernel"]), places, 1)
    pads = _sizes(given.get("before", [0]), places, 0), _sizes(given.get("after", [0]), places, 0)
    size = value.draft.size
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
    elif given.get("divisor") not in (None, math.prod(kernel)):
        raise reader.refusal(step, "an average pool with a divisor of its own", "the plain one")
    elif not given.get("count_include_pad", True) and any(pads[0] + pads[1]):
        if value.padded:
            value = reader.gathered(step, value)
            size, before, after = value.draft.size, *pads
        axes = zip(size, kernel, stride, before, after, strict=True)
        windows = [_without_padding(*axis) for axis in axes]
        if None in windows:
            what = "an average pool that leaves padding out of its mean"
            raise reader.refusal(step, what, "count_include_pad=True")
        found = [window for window in windows if window is not None]
        kernel, stride = _three([k for k, _ in found]), _three([s for _, s in found])
        before = after = (0, 0, 0)
    if given.get("ceil_mode"):  # the last window may extend beyond the padding
        out = [_ceil_length(size[i], kernel[i], stride[i], before[i], after[i]) for i in range(3)]
        reach = [(out[i] - 1) * stride[i] + kernel[i] - before[i] for i in range(3)]
        d, h, w = (max(after[i], reach[i] - size[i]) for i in range(3))
        if op == AVERAGE_POOL and (d, h, w) != after:
            what = "an average pool in ceil_mode, whose last window is not full,"
            raise reader.refusal(step, what, "padding, or a size that fits")
        after = (d, h, w)
    shape = WindowShape(value.draft.channels, size, kernel, stride, before, after)
    if shape.out_size == size and shape.taps == 1:
        return value
    return reader.add_window(step, op, value, places, shape)


def _without_padding(
    size: int, kernel: int, stride: int, before: int, after: int
) -> tuple[int, int] | None:
    """Kernel and stride of the same windows without their padding; None if they are unequal."""
    last = (size + before + after - kernel) // stride
    if last == 0:
        return min(size, kernel - before), size
    return (kernel, stride) if before == 0 and last * stride + kernel <= size else None


def _ceil_length(length: int, kernel: int, stride: int, before: int, after: int) -> int:
    """Windows of a pool in ceil_mode: the last one begins within the input or its padding."""
    windows = -(-(length + before + after - kernel) // stride) + 1
    return windows - ((windows - 1) * stride >= length + before)


def _adaptive_pool(reader: Reader, step: Step, op: str) -> Value:
    """Attribute: size of the output, one number for each axis, None for that of the input."""
    wanted = step.attributes["size"]
    value, places = reader.window(step, len(wanted))
    value = reader.gathered(step, value) if value.padded else value
    size = value.size
    out = list(size)
    for axis, count in zip(places, wanted, strict=True):
        out[axis] = size[axis] if count is None else count
    kernel, stride = [], []
    for length, count in zip(size, out, strict=True):
        starts = [i * length // count for i in range(count)]
        lengths = {-(-(i + 1) * length // count) - start for i, start in enumerate(starts)}
        steps = {b - a for a, b in pairwise(starts)} or {length}
        if len(lengths) > 1 or len(steps) > 1:
            what = f"{_word(step)} from {size} to {_three(out)}"
            hint = "an output size that divides the input size, such as 1"
            raise reader.refusal(step, what, hint)
        kernel.append(lengths.pop())
        stride.append(steps.pop())
    window = WindowShape(value.draft.channels, size, _three(kernel), _three(stride))
    if window.taps == 1 and window.out_size == size:
        return value
    return reader.add_window(step, op, value, places, window)


def _mean(reader: Reader, step: Step) -> Value:
    """An average pool over whole axes of the map. Attributes: axes (all if None), keepdim."""
    value = reader.whole(step)
    if value.index is not None:
        value = reader.gathered(step, value)
    source, found = value.draft, value.shape
    given = step.attributes.get("axes")
    gone = {axis % len(found) for axis in (given or range(len(found)))}
    order = range(len(found)) if value.order is None else value.order
    over = map_axes(value.base, source)
    if over is None:
        what = f"a mean over a part of {[1, *source.dims]} seen as {list(found)}"
        raise reader.refusal(step, what, "a mean before the view")
    reduced = {axis for place in gone for axis in over[order[place]]}
    if 0 in reduced:
        what = f"a mean over axes {sorted(gone)} of {list(found)}"
        raise reader.refusal(step, what, "a mean over depth, height or width")
    base, after = without_axes(value, gone, step.attributes.get("keepdim", False))
    kernel = _three([n if axis + 1 in reduced else 1 for axis, n in enumerate(source.size)])
    if kernel == (1, 1, 1):
        return viewed(source, base, after)
    window = WindowShape(source.channels, source.size, kernel)
    sizes: dict[str, Any] = {"channels": source.channels, "size": window.out_size}
    return viewed(reader.add(step, AVERAGE_POOL, [source], shape=window, **sizes), base, after)


def _sum_over(reader: Reader, step: Step) -> Value:
    """A mean times the number of elements. Attributes as those of a mean."""
    before = math.prod(reader.whole(step).shape)
    value = _mean(reader, step)
    count = before / math.prod(value.shape)
    gain = np.full(value.draft.channels, count)
    return value if count == 1 else _scale(reader, step, value, gain=gain, bias=0 * gain)


def _pad(reader: Reader, step: Step) -> Value:
    """No layer, where the window that reads the value takes the padding over.

    Attributes: widths, (before, after) of every axis of the value, negative where it is cropped;
    fill; mode.
    """
    mode = step.attributes.get("mode", "constant")
    if mode != "constant":
        raise reader.refusal(step, f"{mode} padding", "zeros")
    value = reader.value(step)
    pairs = [(int(b), int(a)) for b, a in step.attributes["widths"]]
    shape = tuple(n + b + a for n, (b, a) in zip(value.shape, pairs, strict=True))
    fill = float(step.attributes.get("fill", 0))
    if value.padded and value.fill != fill:
        raise reader.refusal(step, f"padding with {value.fill} and then with {fill}", "one value")
    places = window_axes(value, len(pairs) - 2) if len(pairs) > 2 else None
    if places is not None and not any(b or a for b, a in pairs[:2]) and min(map(min, pairs)) >= 0:
        befores = _sizes([b for b, _ in pairs[2:]], places, 0)
        afters = _sizes([a for _, a in pairs[2:]], places, 0)
        return padded(value, befores, afters, shape, fill)
    if fill and any(n > 0 for pair in pairs for n in pair):
        what = f"padding by {pairs} of {list(value.shape)} with {fill:g}"
        raise reader.refusal(step, what, "zeros")
    widths = [(max(b, 0), max(a, 0)) for b, a in pairs]
    kept = tuple(
        slice(max(-b, 0), n - max(-a, 0)) for n, (b, a) in zip(value.shape, pairs, strict=True)
    )
    return moved(value, lambda index: np.pad(index[kept], widths, constant_values=-1))


def _take(reader: Reader, step: Step) -> Value:
    """Some places along one axis. Attributes: axis, indices, drop (whether the axis goes).

    The indices may also be the second input.
    """
    value = reader.value(step)
    axis = step.attributes["axis"]
    given = step.attributes.get("indices")
    indices = np.asarray(reader.weight(step, 1) if given is None else given).astype(np.intp)
    if indices.ndim != 1:
        what = f"{_word(step)} with indices of {indices.ndim} axes"
        raise reader.refusal(step, what, "a list of indices")
    indices = indices % value.shape[axis]
    if len(indices) == value.shape[axis] and np.array_equal(indices, np.arange(len(indices))):
        found = value
    else:
        _zeros_only(reader, step, value)
        found = moved(value, lambda index: np.take(index, indices, axis))
    if step.attributes.get("drop"):
        shape = list(found.shape)
        del shape[axis]
        return _seen_as(reader, step, found, tuple(shape))
    return found


def _put(reader: Reader, step: Step) -> Value:
    """The first value, with the second at some places. Attributes: axis, indices."""
    values = _of_one_map(reader, step)
    if values is None:
        raise reader.refusal(step, f"{_word(step)} of two maps", "torch.cat of slices")
    draft, (whole, part) = values
    index = whole.copy()
    places: list[Any] = [slice(None)] * index.ndim
    places[step.attributes["axis"]] = np.asarray(step.attributes["indices"], np.intp)
    index[tuple(places)] = part
    return indexed(draft, index)


def _of_one_map(reader: Reader, step: Step) -> tuple[LayerDraft, list[Array]] | None:
    """The one map of which all inputs are views, zeros apart, and their indices; or None."""
    drafts: dict[LayerDraft, None] = {}
    found: list[Array] = []
    for number, read in enumerate(step.inputs):
        if isinstance(read, str):
            value = reader.value(step, number)
            _zeros_only(reader, step, value)
            drafts[value.draft] = None
            found.append(index_of(value))
        elif read is None or np.any(read):
            raise reader.refusal(step, f"{_word(step)} takes a constant", "zeros")
        else:
            found.append(np.full(np.shape(read), -1, np.int32))
    return (next(iter(drafts)), found) if len(drafts) == 1 else None


def _zeros_only(reader: Reader, step: Step, value: Value) -> None:
    if value.padded and value.fill:
        what = f"padding with {value.fill:g} goes into {_word(step)}"
        raise reader.refusal(step, what, "zeros, or padding right before a pool only")


def _expand(reader: Reader, step: Step) -> Value:
    """The same elements again along axes of length 1. Attribute: shape."""
    value = reader.whole(step)
    shape = tuple(step.attributes["shape"])
    if shape == value.shape:
        return value
    return moved(value, lambda index: np.broadcast_to(index, shape))


def _batch_norm(reader: Reader, step: Step) -> Value:
    """Reads a map, then its mean, variance, gain and offset, the last two may be left out.

    Attribute: eps, which is added to the variance.
    """
    value = reader.value(step)
    mean, variance = reader.weight(step, 1), reader.weight(step, 2)
    weight, bias = reader.constant(step, 3), reader.constant(step, 4)
    gain = 1.0 / np.sqrt(variance.astype(np.float64) + step.attributes["eps"])
    if weight is not None:
        gain *= weight
    offset = -gain * mean + (0.0 if bias is None else bias)
    spread = (-1, *(1 for _ in value.shape[2:]))
    return _linear_map(reader, step, value, gain.reshape(spread), offset.reshape(spread))


def _gain_and_offset(reader: Reader, step: Step) -> Value:
    """Reads a map, a gain and an offset, which broadcast to it, or None for neither."""
    gain, offset = reader.constant(step, 1), reader.constant(step, 2)
    return _linear_map(
        reader,
        step,
        reader.value(step),
        1.0 if gain is None else gain,
        0.0 if offset is None else offset,
    )


def _linear_map(
    reader: Reader, step: Step, value: Value, gain: Array | float, offset: Array | float
) -> Value:
    """value * gain + offset; both broadcast to the value and are one number for each channel."""
    gain, offset = np.asarray(gain, np.float64), np.asarray(offset, np.float64)
    try:
        whole = np.broadcast_shapes(gain.shape, offset.shape, value.shape)
    except ValueError:  # no common shape, or a larger one than numpy has
        whole = ()
    if whole != value.shape:
        what = f"{_word(step)} of {list(value.shape)} with {list(gain.shape or offset.shape)}"
        raise reader.refusal(step, what, "constants that broadcast to the map")
    if offset.any() or value.fill:
        value = reader.whole(step) if value.padded else value
        if value.index is not None and value.index.min() < 0:
            value = reader.gathered(step, value)
    parts = [_per_channel(value, array) for array in (gain, offset)]
    if any(part is None for part in parts) and value.index is not None:
        value = reader.gathered(step, value)
        parts = [_per_channel(value, array) for array in (gain, offset)]
    if parts[0] is None or parts[1] is None:
        raise reader.unreadable(step, value, "one number for each channel, channels as they come")
    return _scale(reader, step, value, gain=parts[0], bias=parts[1])


def _per_channel(value: Value, array: Array) -> Array | None:
    """[C] float64 of an array that broadcasts to a value; None if it changes within a channel."""
    channels = value.draft.channels
    if array.size == 1:
        return np.full(channels, float(array.reshape(())))
    spread = array.reshape((1,) * (len(value.shape) - array.ndim) + array.shape)
    axis = value.channel_axis
    if axis is not None and spread.size == spread.shape[axis]:
        return spread.reshape(-1).astype(np.float64)
    if value.index is not None or value.padded:
        return None
    order = range(len(value.shape)) if value.order is None else value.order
    inverse = [list(order).index(axis) for axis in range(len(value.shape))]
    rows = np.broadcast_to(spread, value.shape).transpose(inverse).reshape(channels, -1)
    return rows[:, 0].astype(np.float64) if (rows == rows[:, :1]).all() else None


def _scale(reader: Reader, step: Step, value: Value, **parts: Any) -> Value:
    """The value with every element scaled or clamped, wherever it lies."""
    source = value.draft
    sizes: dict[str, Any] = {"channels": source.channels, "size": source.size}
    return replace(value, draft=reader.add(step, SCALE, [source], **sizes, **parts))


def _clamp(reader: Reader, step: Step) -> Value:
    """The clamps of `graph.ACTIVATIONS`. Attributes: low and high, None where it is open."""
    value = reader.value(step)
    low, high = step.attributes.get("low"), step.attributes.get("high")
    if low is None and high is not None and value.draft.positive and high > 0:
        low = 0.0
    activation = {known: name for name, known in ACTIVATIONS.items()}.get((low, high), "none")
    if activation == "none":
        raise reader.refusal(step, f"a clamp to {low}..{high}", "ReLU or ReLU6")
    zero_moves = (low is not None and low > 0) or (high is not None and high < 0)
    if value.fill or (zero_moves and (value.padded or value.index is not None)):
        value = reader.gathered(step, value)
    positive = low is not None and low >= 0
    return _scale(reader, step, value, activation=activation, positive=positive)


def _code(reader: Reader, step: Step) -> Value:
    """The value after a quantizer and its inverse. Attribute: code, a `Code`.

    No layer, where the layer that makes the value can write these codes. A lowest code of zero or
    more is a ReLU, which exporters leave to the quantizer. A second format of one value is a copy.
    """
    value, code = reader.value(step), step.attributes["code"]
    _zeros_only(reader, step, value)
    draft = value.draft
    cuts = code.limits[0] >= code.quant.zero_point and not draft.positive
    if draft.code == code:
        return value
    if draft.code is not None or (cuts and draft.op != INPUT):
        activation = "relu" if cuts else "none"
        parts: dict[str, Any] = {"activation": activation, "positive": cuts or draft.positive}
        value = _scale(reader, step, value, **parts)
    value.draft.code = code
    return value


def _add(reader: Reader, step: Step) -> Value:
    """Reads two maps of the same shape, or one and a constant.

    Attribute: alpha, a factor of the second.
    """
    return _sum_of(reader, step, step.attributes.get("alpha", 1))


def _subtract(reader: Reader, step: Step) -> Value:
    """Reads two maps of the same shape, or one and a constant. Attribute: alpha, as of add."""
    return _sum_of(reader, step, -step.attributes.get("alpha", 1))


def _sum_of(reader: Reader, step: Step, factor: float) -> Value:
    """The first input and `factor` times the second."""
    named = [isinstance(read, str) for read in step.inputs[:2]]
    if named == [True, False]:
        return _linear_map(reader, step, reader.value(step), 1.0, factor * reader.weight(step, 1))
    if named == [False, True]:
        return _linear_map(reader, step, reader.value(step, 1), factor, reader.weight(step, 0))
    a, b = reader.whole(step, 0), reader.whole(step, 1)
    if a.shape != b.shape:
        what = f"an addition of {list(a.shape)} and {list(b.shape)}"
        raise reader.refusal(step, what, "two maps of the same shape")
    if factor != 1:
        scaled = np.full(b.draft.channels, float(factor))
        b = _scale(reader, step, b, gain=scaled, bias=0 * scaled)
    same = a.index is None and b.index is None and a.order == b.order
    if not same or a.draft.dims != b.draft.dims:
        a, b = reader.gathered(step, a), reader.gathered(step, b)
    if a.order != b.order or a.draft.dims != b.draft.dims:
        raise reader.unreadable(step, b)
    parts: dict[str, Any] = {"channels": a.draft.channels, "size": a.draft.size}
    return replace(a, draft=reader.add(step, ADD, [a.draft, b.draft], **parts))


def _multiply(reader: Reader, step: Step) -> Value:
    """Reads a map and a constant, in any order."""
    named = [isinstance(read, str) for read in step.inputs[:2]]
    if all(named):
        raise reader.refusal(step, "a product of two maps", INSTEAD["product"])
    place = named.index(True)
    return _linear_map(reader, step, reader.value(step, place), reader.weight(step, 1 - place), 0.0)


def _divide(reader: Reader, step: Step) -> Value:
    """Reads a map and a constant."""
    if isinstance(step.inputs[1], str):
        raise reader.refusal(step, "a division by a map", INSTEAD["product"])
    divisor = reader.weight(step, 1).astype(np.float64)
    if not np.all(divisor):
        raise reader.refusal(step, "a division by zero")
    return _linear_map(reader, step, reader.value(step), 1 / divisor, 0.0)


def _concat(reader: Reader, step: Step) -> Value:
    """Reads any number of maps. Attributes: axis; stack, whether it is a new one."""
    values: list[Value | None] = [
        reader.whole(step, number) if isinstance(read, str) else None
        for number, read in enumerate(step.inputs)
    ]
    shapes = [
        tuple(np.asarray(read).shape) if value is None else value.shape
        for value, read in zip(values, step.inputs, strict=True)
    ]
    stack = step.attributes.get("stack", False)
    axis = step.attributes["axis"] % (len(shapes[0]) + stack)
    maps = [value for value in values if value is not None]
    orders = {value.order for value in maps}
    plain = len(maps) == len(values) and not stack and axis == 1 and len(orders) == 1
    sizes = {value.draft.size for value in maps}
    if plain and all(value.channel_axis == 1 for value in maps) and len(sizes) == 1:
        return _channels_joined(reader, step, maps)
    one = _of_one_map(reader, step) if len({value.draft for value in maps}) == 1 else None
    if one is not None:
        draft, found = one
        joined = np.stack(found, axis) if stack else np.concatenate(found, axis)
        return indexed(draft, joined)
    lying = [reader.gathered(step, value) for value in maps]
    if stack or axis != 1 or len(lying) != len(values):
        what = f"a concatenation of {', '.join(str(list(s)) for s in shapes)} on axis {axis}"
        raise reader.refusal(step, what, "the channels (axis 1) of maps of the same size")
    same = len({value.order for value in lying}) == 1 and len({v.draft.size for v in lying}) == 1
    if not same or any(value.channel_axis != 1 for value in lying):
        what = f"a concatenation of {', '.join(str(list(s)) for s in shapes)} on axis {axis}"
        raise reader.refusal(step, what, "the channels (axis 1) of maps of the same size")
    return _channels_joined(reader, step, lying)


def _channels_joined(reader: Reader, step: Step, values: list[Value]) -> Value:
    """The concat of maps of one size, in one order of axes, along their channels."""
    drafts = [value.draft for value in values]
    channels = sum(draft.channels for draft in drafts)
    made = reader.add(step, CONCAT, drafts, channels=channels, size=drafts[0].size)
    first = values[0]
    shape = (first.shape[0], channels, *first.shape[2:])
    if first.order is None and first.shape[0] != 1:  # one channel, frames as a batch
        return viewed(made, made.dims, FRAMES)
    return Value(made, shape, first.order)


def _reshape(reader: Reader, step: Step) -> Value:
    """Another shape over the same elements in the same order. Attribute: shape, without -1."""
    return _seen_as(reader, step, reader.value(step), tuple(map(int, step.attributes["shape"])))


def _seen_as(reader: Reader, step: Step, value: Value, shape: tuple[int, ...]) -> Value:
    if shape == value.shape:
        return value
    if value.plain:
        return Value(value.draft, shape)
    _zeros_only(reader, step, value)
    return moved(value, lambda index: index.reshape(shape))


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
    """The axes in another order. Attribute: order."""
    value = reader.value(step)
    _zeros_only(reader, step, value)
    return permuted(value, [axis % len(value.shape) for axis in step.attributes["order"]])


def _softmax(reader: Reader, step: Step) -> Value:
    """The last step of a network: it is left out, and the graph says so. Attribute: axis."""
    value = reader.whole(step)
    if value.shape[step.attributes["axis"]] != math.prod(value.shape):
        raise reader.refusal(step, SOFTMAX_INSIDE, INSTEAD["softmax"])
    return replace(value, softmax=True)


OPERATORS: dict[str, Callable[[Reader, Step], Value]] = {
    "conv": _convolve,
    "linear": _linear,
    "max_pool": partial(_pool, op=MAX_POOL),
    "average_pool": partial(_pool, op=AVERAGE_POOL),
    "adaptive_max_pool": partial(_adaptive_pool, op=MAX_POOL),
    "adaptive_average_pool": partial(_adaptive_pool, op=AVERAGE_POOL),
    "mean": _mean,
    "sum": _sum_over,
    "pad": _pad,
    "batch_norm": _batch_norm,
    "scale": _gain_and_offset,
    "clamp": _clamp,
    "code": _code,
    "add": _add,
    "sub": _subtract,
    "mul": _multiply,
    "div": _divide,
    "concat": _concat,
    "reshape": _reshape,
    "expand": _expand,
    "permute": _permute,
    "take": _take,
    "put": _put,
    "identity": _identity,
    "convert": _convert,
    "softmax": _softmax,
}
"""The function that reads each operator; its docstring has the inputs and the attributes."""

INSTEAD = {
    _plain(op): instead
    for instead, ops in {
        "ReLU or ReLU6, and train again": "silu swish gelu tanh elu celu selu mish softplus "
        "leaky_relu prelu hardswish threshold thresholded_relu",
        "ReLU or ReLU6 if it is an activation, and train again; a gate (squeeze-excite) has no "
        "counterpart, so train the network without it": "sigmoid hardsigmoid",
        "a network without gates and attention, trained again; maps are multiplied by constants "
        "only": "product",
        "BatchNorm, and train again": "layer_norm group_norm instance_norm "
        "layer_normalization group_normalization instance_normalization",
        "BatchNorm with running statistics": "native_batch_norm_legit",
        "no soft-max but the last step of the network, over all of its outputs": "softmax "
        "log_softmax",
        "the map before it as the output, and enlarge that on the host; no layer makes a map "
        "larger": "conv_transpose2d conv_transpose3d convtranspose upsample_nearest2d "
        "upsample_nearest3d upsample_bilinear2d upsample_trilinear3d resize upsample",
        "the 3-D layer with a window of (k, 1, 1)": "avg_pool1d max_pool1d",
        "a Linear or a convolution with fixed weights; attention has no counterpart": "matmul bmm "
        "mm einsum scaled_dot_product_attention",
        "MaxPool3d": "amax max reducemax",
        "convolutions over time; recurrence has no counterpart": "lstm gru rnn rnn_tanh rnn_relu",
        "nn.Dropout, or training=self.training": "native_dropout",
        "quant_format=QuantFormat.QDQ when ONNX Runtime quantizes": "QLinearConv QLinearMatMul "
        "ConvInteger MatMulInteger com.microsoft.QLinearAdd com.microsoft.QLinearConcat "
        "com.microsoft.QLinearGlobalAveragePool com.microsoft.QLinearAveragePool "
        "com.microsoft.QGemm",
        "quantize_static, whose ranges are in the file": "DynamicQuantizeLinear",
        "two bits or more": "BipolarQuant",
        "an average pool with a quantizer behind it": "Trunc",
        "shapes and conditions that are fixed at export": "If Loop Scan NonZero Where",
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
        if draft.op == CONV and draft.picks is None:
            _choose_channels(draft)
        if draft.op == SCALE and _absorbs(draft.inputs[0], draft, readers[draft.inputs[0]] == 1):
            merged[draft] = draft.inputs[0]
            readers[draft.inputs[0]] += readers[draft] - 1
        else:
            kept.append(draft)
    output = merged.get(output, output)
    needed = {drafts[0], output}
    for draft in reversed(kept):
        if draft in needed:
            needed.update(draft.inputs)
    return [draft for draft in kept if draft in needed], output


def _choose_channels(draft: LayerDraft) -> None:
    """Let a convolution read the map of which one before it only chooses channels, if cheaper."""
    (before,), shape = draft.inputs, draft.shape
    if before.picks is None or before.activation != "none" or before.code is not None:
        return
    assert isinstance(shape, ConvShape) and draft.weight is not None
    source = before.inputs[0]
    more = draft.channels * shape.taps * (source.channels - before.channels)
    if shape.own_weights or more > before.channels * source.channels:
        return
    weight: Array = np.zeros((source.channels, draft.channels, *shape.kernel), np.float32)
    chosen = before.picks >= 0
    np.add.at(weight, before.picks[chosen], draft.weight.swapaxes(0, 1)[chosen])
    weight = np.ascontiguousarray(weight.swapaxes(0, 1))
    draft.inputs, draft.weight = [source], weight
    draft.shape = replace(
        shape, channels=source.channels, own_weights=shape.filters * before.channels * shape.taps
    )


def _absorbs(before: LayerDraft, scale: LayerDraft, alone: bool) -> bool:
    """Merge `scale` into `before` if possible; `alone`: no other layer reads `before`."""
    plain = scale.gain is None
    if before.code is not None and not (plain and scale.code in (None, before.code)):
        return False  # what is rounded to codes is not rounded again in the same layer
    if _absorbs_reals(before, scale, alone):
        before.code = scale.code or before.code
        return True
    return False


def _absorbs_reals(before: LayerDraft, scale: LayerDraft, alone: bool) -> bool:
    plain = scale.gain is None
    if plain and scale.activation == "relu" and before.positive:
        return True
    if plain and scale.activation == before.activation:
        return True
    if plain and alone and (before.activation, scale.activation) == ("relu", "relu6"):
        before.activation = "relu6"
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
    before.picks = None
    if before.weight is not None:
        before.weight = (before.weight * gain[:, None, None, None, None]).astype(np.float32)
        if before.weight_step is not None:
            before.weight_step = before.weight_step * np.where(gain == 0, 1, np.abs(gain))
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
        weight_quant=None if draft.weight_step is None else WeightQuant(8, draft.weight_step),
        out_quant=None if draft.code is None else draft.code.quant,
        code_range=None if draft.code is None else draft.code.limits,
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
        coded = conv.out_quant is not None or pool.out_quant is not None
        if not alone or padded or coded or conv.activation != "none" or not _is_pointwise(conv):
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
