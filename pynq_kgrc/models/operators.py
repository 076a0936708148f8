"""Translates each operator of an exported torch module to a layer of the accelerator.

To add an operator, add a function to the table `OPERATORS`. `torch.export` gives a flat list of
ATen operators. No operator here reorders elements in memory, so the elements of a torch value
always have the order of the [C, D, H, W] map that its layer writes. A view only changes the shape
that the next operator is checked against.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

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
    Size,
    WindowShape,
)
from pynq_kgrc.quant import Array

SCALE = "scale"
"""A gain and an offset for each channel, then an activation: a batch norm, or a ReLU alone."""

LOWEST = float(np.finfo(np.float32).min)


@dataclass(eq=False)
class LayerDraft:
    """A layer before batch norms and activations are folded into it (`trace.py`)."""

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
    """A torch value: the output of a layer, and padding for the window that reads it."""

    draft: LayerDraft
    before: Size = (0, 0, 0)
    after: Size = (0, 0, 0)
    fill: float = 0.0

    @property
    def padded(self) -> bool:
        return any(self.before + self.after)

    @property
    def size(self) -> Size:
        return _sum(_sum(self.draft.size, self.before), self.after)


Args = dict[str, Any]
"""An operator's arguments by their names in its schema, defaults included."""


def read_operators(
    program: ExportedProgram, module: nn.Module, clip: ClipSpec, name: str
) -> tuple[list[LayerDraft], LayerDraft]:
    """The layers in running order, the input first, and the one that makes the output.

    Raises:
        CompileError: an unsupported operator, or an output that is not one tensor.
    """
    reader = Reader(name, module)
    signature = program.graph_signature
    held = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    nodes = {node.name: node for node in program.graph.nodes}
    for node in nodes.values():
        if node.name in held:
            key = held[node.name]
            stored: Any = program.state_dict.get(key, program.constants.get(key))
            reader.constants[node] = stored.detach()
        elif node.op == "placeholder":
            size = (clip.frames, clip.height, clip.width)
            reader.drafts.append(LayerDraft("clip", INPUT, [], 3, size))
            reader.values[node] = Value(reader.drafts[0])
        elif node.op == "call_function":
            reader.call(node)
    out_spec = program.call_spec.out_spec
    single = out_spec is not None and out_spec.is_leaf()
    last = nodes.get(str(signature.user_outputs[0])) if single else None
    if last is None or last not in reader.values:
        raise CompileError(f"{name}: the output has to be one tensor that depends on the clip")
    output = reader.draft(last, last)
    if output.op == INPUT:
        raise CompileError(f"{name}: the output is the clip itself; there is nothing to compute")
    return reader.drafts, output


class Reader:
    """Reads operators in order: the torch values so far, and the layers that make them."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.drafts: list[LayerDraft] = []
        self.values: dict[Any, Value] = {}
        self.constants: dict[Any, torch.Tensor] = {}

    def call(self, node: Node) -> None:
        """Read one operator."""
        target: Any = node.target
        reads = node.all_input_nodes
        if target is operator.getitem and reads[0] in self.values and node.args[1] == 0:
            self.values[node] = self.values[reads[0]]  # the other outputs are indices or statistics
        elif reads and all(read in self.constants for read in reads):
            # constant folding: a weight that is computed from parameters, such as masked or scaled
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.constants.get)
            with torch.no_grad():
                self.constants[node] = target(*args, **kwargs)
        elif _op(node) in OPERATORS:
            named: Args = {a.name: a.default_value for a in target._schema.arguments}
            named.update(zip(named, node.args, strict=False))
            named.update(node.kwargs)
            self.values[node] = OPERATORS[_op(node)](self, node, named)
        elif _op(node) != "_assert_tensor_metadata":
            instead = INSTEAD.get(_op(node).strip("_"))
            raise self.refusal(node, f"the accelerator has no {_op(node)}", instead)

    def add(self, node: Node, op: str, inputs: list[LayerDraft], **parts: Any) -> Value:
        """Append the layer that `node` computes; `parts` are its other fields."""
        if op in (ADD, CONCAT, MAX_POOL, AVERAGE_POOL):
            parts["positive"] = all(draft.positive for draft in inputs)
        path, _ = _place(node)
        leaf = path and next(self.module.get_submodule(path).children(), None) is None
        base = path if leaf else f"{path}.{WORDS.get(_op(node), _op(node))}".lstrip(".")
        taken = {draft.name for draft in self.drafts}
        name = next(n for n in (base, *(f"{base}_{i}" for i in range(2, 9999))) if n not in taken)
        self.drafts.append(LayerDraft(name, op, inputs, **parts))
        return Value(self.drafts[-1])

    def add_window(
        self, node: Node, op: str, source: LayerDraft, shape: WindowShape, **parts: Any
    ) -> Value:
        return self.add(
            node,
            op,
            [source],
            channels=shape.out_channels,
            size=shape.out_size,
            shape=shape,
            **parts,
        )

    def value(self, read: Any, node: Node) -> Value:
        """The value of an argument `read` of `node`."""
        if read not in self.values:
            raise self.refusal(node, f"{_op(node)} takes a constant", "a bias or weight for it")
        return self.values[read]

    def draft(self, read: Any, node: Node) -> LayerDraft:
        """The layer that makes an argument of a `node` that cannot take padding."""
        value = self.value(read, node)
        if value.padded:
            what = f"padding goes into {_op(node)}"
            raise self.refusal(node, what, "padding right before a convolution or pool only")
        return value.draft

    def window(self, read: Any, node: Node, axes: int) -> Value:
        """The argument of a window over the last `axes` axes, checked to be [1, C, ...]."""
        value = self.value(read, node)
        found = _shape(read)
        wanted = (1, value.draft.channels, *value.size[3 - axes :])
        if found != wanted or math.prod(value.size[: 3 - axes]) != 1:
            whole = [1, value.draft.channels, *value.size]
            what = f"{_op(node)} reads {whole} as {list(found)}"
            raise self.refusal(node, what, "one clip, channels first, then depth, height, width")
        return value

    def array(self, read: Any, node: Node) -> Array | None:
        """A copy of a weight as float32; None if the argument is None."""
        if read is None:
            return None
        if read not in self.constants:
            raise self.refusal(node, f"{_op(node)} has weights that depend on the clip")
        copied: Array = self.constants[read].cpu().float().numpy().copy()
        return copied

    def refusal(self, node: Node, what: str, instead: str | None = None) -> CompileError:
        """A CompileError that names the place of `node` in the module."""
        path, kinds = _place(node)
        hint = f"; use {instead}" if instead else ""
        return CompileError(f"{self.name}: {what} at {path or 'top level'} ({kinds}){hint}")


def _op(node: Node) -> str:
    """An operator's bare name: "conv3d" for torch.ops.aten.conv3d.default."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", node.target))
    return str(schema.name.split("::")[1])


def _place(node: Node) -> tuple[str, str]:
    """The path of the module that calls the operator, and the classes from the outside in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    classes = (kind if isinstance(kind, str) else kind.__name__ for _, kind in stack)
    return (stack[-1][0] if stack else ""), " > ".join(kind.rsplit(".", 1)[-1] for kind in classes)


def _shape(node: Node) -> tuple[int, ...]:
    held = node.meta["val"]
    return tuple((held[0] if isinstance(held, (tuple, list)) else held).shape)


def _sum(a: Size, b: Size) -> Size:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _size(values: Sequence[int], axes: int, rest: int) -> Size:
    """torch's one or `axes` numbers as depth, height, width; `rest` for missing axes."""
    spread = list(values) * (axes if len(values) == 1 else 1)
    d, h, w = [rest] * (3 - axes) + spread
    return d, h, w


def _convolve(reader: Reader, node: Node, args: Args, axes: int) -> Value:
    value = reader.window(args["input"], node, axes)
    if value.padded and value.fill != 0:
        raise reader.refusal(node, f"a convolution over padding with {value.fill:g}", "zeros")
    weight = reader.array(args["weight"], node)
    assert weight is not None
    weight = weight.reshape(*weight.shape[:2], *(1,) * (3 - axes), *weight.shape[2:])
    own_weights = weight.size
    weight = _dilated(_ungrouped(weight, args["groups"]), _size(args["dilation"], axes, 1))
    _, _, kd, kh, kw = weight.shape
    if args["padding"] == "same":
        before: Size = ((kd - 1) // 2, (kh - 1) // 2, (kw - 1) // 2)
        after: Size = (kd // 2, kh // 2, kw // 2)
    else:
        before = after = _size([0] if args["padding"] == "valid" else args["padding"], axes, 0)
    shape = ConvShape(
        channels=value.draft.channels,
        in_size=value.draft.size,
        kernel=(kd, kh, kw),
        stride=_size(args["stride"], axes, 1),
        pad_before=_sum(value.before, before),
        pad_after=_sum(value.after, after),
        filters=weight.shape[0],
        own_weights=0 if own_weights == weight.size else own_weights,
    )
    bias = reader.array(args["bias"], node)
    return reader.add_window(node, CONV, value.draft, shape, weight=weight, bias=bias)


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


def _linear(reader: Reader, node: Node, args: Args) -> Value:
    """A convolution whose kernel is the whole input map."""
    source = reader.draft(args["input"], node)
    found = _shape(args["input"])
    whole = (source.channels, *source.size)
    if found[-1] != math.prod(whole):
        what = f"linear reads {[1, *whole]} as {list(found)}"
        raise reader.refusal(node, what, "flatten(1) before it, or a 1x1x1 convolution")
    weight = reader.array(args["weight"], node)
    assert weight is not None
    filters = weight.shape[0]
    shape = ConvShape(source.channels, source.size, source.size, filters=filters)
    weight = weight.reshape(filters, *whole)
    bias = reader.array(args["bias"], node)
    return reader.add_window(node, CONV, source, shape, weight=weight, bias=bias)


def _pool(reader: Reader, node: Node, args: Args, op: str, axes: int) -> Value:
    value = reader.window(args["self"], node, axes)
    kernel = _size(args["kernel_size"], axes, 1)
    stride = _size(args["stride"], axes, 1) if args["stride"] else kernel
    padding = _size(args["padding"], axes, 0)
    if any(step != 1 for step in args.get("dilation", ())):
        raise reader.refusal(node, "a dilated max pool", "a plain one")
    before, after = _sum(value.before, padding), _sum(value.after, padding)
    if op == MAX_POOL:
        zeros = value.fill == 0 and value.draft.positive
        if value.padded and not zeros and value.fill > LOWEST:
            what = f"padding with {value.fill:g} before a max pool of values that may be negative"
            raise reader.refusal(node, what, "the pool's own padding, or put a ReLU before it")
        if any(max(before[i], after[i]) >= kernel[i] for i in range(3)):
            raise reader.refusal(node, "a max pool with windows that see padding only")
    elif value.padded and value.fill != 0:
        raise reader.refusal(node, f"an average pool over padding with {value.fill:g}", "zeros")
    elif not args["count_include_pad"] and any(padding):
        what = "an average pool that leaves padding out of its mean"
        raise reader.refusal(node, what, "count_include_pad=True")
    elif args["divisor_override"] not in (None, math.prod(kernel)):
        raise reader.refusal(node, "an average pool with a divisor of its own", "the plain one")
    # in ceil_mode the last window may extend beyond the padding
    out = _size(_shape(node)[-axes:], axes, 1)
    reach = [(out[i] - 1) * stride[i] + kernel[i] - before[i] for i in range(3)]
    d, h, w = (max(after[i], reach[i] - value.draft.size[i]) for i in range(3))
    if op == AVERAGE_POOL and (d, h, w) != after:
        what = "an average pool in ceil_mode, whose last window is not full,"
        raise reader.refusal(node, what, "padding, or a size that fits")
    shape = WindowShape(
        value.draft.channels, value.draft.size, kernel, stride, before, pad_after=(d, h, w)
    )
    return reader.add_window(node, op, value.draft, shape)


def _adaptive_pool(reader: Reader, node: Node, args: Args, op: str, axes: int) -> Value:
    value = reader.window(args["self"], node, axes)
    size, out = value.size, _size(_shape(node)[-axes:], axes, 1)
    if value.padded or any(size[i] % out[i] for i in range(3)):
        what = f"{_op(node)} from {size} to {out}"
        raise reader.refusal(node, what, "an output size that divides the input size, such as 1")
    d, h, w = (size[i] // out[i] for i in range(3))
    shape = WindowShape(value.draft.channels, size, (d, h, w), (d, h, w))
    return reader.add_window(node, op, value.draft, shape)


def _mean(reader: Reader, node: Node, args: Args) -> Value:
    """An average pool over whole axes of the map."""
    source = reader.draft(args["self"], node)
    found = _shape(args["self"])
    gone = {axis % len(found) for axis in args.get("dim") or range(len(found))}
    long = [axis for axis in range(2, len(found)) if found[axis] > 1]
    axes = [i for i in range(3) if source.size[i] > 1]
    if found[:2] != (1, source.channels) or gone & {0, 1}:
        what = f"a mean over axes {sorted(gone)} of {list(found)}"
        raise reader.refusal(node, what, "a mean over depth, height or width")
    if not long or gone.issuperset(long):
        kernel = source.size
    elif [found[axis] for axis in long] == [source.size[i] for i in axes]:
        pairs = zip(axes, long, strict=True)
        over = {i for i, axis in pairs if axis in gone}
        d, h, w = (source.size[i] if i in over else 1 for i in range(3))
        kernel = (d, h, w)
    else:
        what = f"a mean over a part of [1, {source.channels}, *{source.size}] seen as {list(found)}"
        raise reader.refusal(node, what, "a mean before the view")
    if kernel == (1, 1, 1):
        return Value(source)
    shape = WindowShape(source.channels, source.size, kernel)
    return reader.add_window(node, AVERAGE_POOL, source, shape)


def _pad(reader: Reader, node: Node, args: Args) -> Value:
    """No layer: the window that reads the value takes the padding over."""
    if args.get("mode", "constant") != "constant":
        raise reader.refusal(node, f"{args['mode']} padding", "zeros")
    axes = len(_shape(args["self"])) - 2
    widths = list(args["pad"])
    pairs = [(widths[i], widths[i + 1]) for i in range(0, len(widths), 2)][::-1]  # last axis first
    if axes not in (2, 3) or any(b or a for b, a in pairs[:-axes]) or min(widths) < 0:
        what = f"padding by {widths} of {list(_shape(args['self']))}"
        raise reader.refusal(node, what, "widths of 0 or more, on depth, height and width only")
    value = reader.window(args["self"], node, axes)
    pairs = [(0, 0)] * (3 - len(pairs[-axes:])) + pairs[-axes:]
    fill = float(args["value"] or 0)
    if value.padded and value.fill != fill:
        raise reader.refusal(node, f"padding with {value.fill} and then with {fill}", "one value")
    (d0, d1), (h0, h1), (w0, w1) = pairs
    return Value(
        value.draft, _sum(value.before, (d0, h0, w0)), _sum(value.after, (d1, h1, w1)), fill
    )


def _batch_norm(reader: Reader, node: Node, args: Args) -> Value:
    source = reader.draft(args["input"], node)
    found = _shape(args["input"])
    if found[:2] != (1, source.channels):
        what = f"batch norm reads [1, {source.channels}, *{source.size}] as {list(found)}"
        raise reader.refusal(node, what, "the channels as they come")
    mean, var, weight, bias = (
        reader.array(args[name], node) for name in ("running_mean", "running_var", "weight", "bias")
    )
    assert mean is not None and var is not None
    gain = 1.0 / np.sqrt(var.astype(np.float64) + args["eps"])
    if weight is not None:
        gain *= weight
    offset = -gain * mean + (0.0 if bias is None else bias)
    return _scale(reader, node, source, gain=gain, bias=offset)


def _scale(reader: Reader, node: Node, source: LayerDraft, **parts: Any) -> Value:
    return reader.add(node, SCALE, [source], channels=source.channels, size=source.size, **parts)


def _activate(reader: Reader, node: Node, args: Args) -> Value:
    """The clamps of `graph.ACTIVATIONS`, under any of torch's names for them."""
    low, high = args.get("min", args.get("min_val")), args.get("max", args.get("max_val"))
    given = (low, high) != (None, None)
    bounds = (low, high) if given else ACTIVATIONS.get(_op(node), (None, None))
    activation = {known: name for name, known in ACTIVATIONS.items()}.get(bounds, "none")
    if activation == "none":
        raise reader.refusal(node, f"a clamp to {low}..{high}", "ReLU or ReLU6")
    source = reader.draft(args["self"], node)
    positive = bounds[0] is not None and bounds[0] >= 0
    return _scale(reader, node, source, activation=activation, positive=positive)


def _add(reader: Reader, node: Node, args: Args) -> Value:
    if args["alpha"] != 1:
        raise reader.refusal(node, f"an addition with alpha={args['alpha']}", "alpha=1")
    a, b = reader.draft(args["self"], node), reader.draft(args["other"], node)
    shapes = _shape(args["self"]), _shape(args["other"])
    if shapes[0] != shapes[1] or (a.channels, a.size) != (b.channels, b.size):
        what = f"an addition of {list(shapes[0])} and {list(shapes[1])}"
        raise reader.refusal(node, what, "two maps of the same shape")
    return reader.add(node, ADD, [a, b], channels=a.channels, size=a.size)


def _concat(reader: Reader, node: Node, args: Args) -> Value:
    drafts = [reader.draft(tensor, node) for tensor in args["tensors"]]
    shapes = [_shape(tensor) for tensor in args["tensors"]]
    axis = args["dim"] % len(shapes[0])
    whole = [(1, s.channels, *shape[2:]) for s, shape in zip(drafts, shapes, strict=True)]
    if axis != 1 or whole != shapes or len({s.size for s in drafts}) != 1:
        what = f"a concatenation of {', '.join(str(list(s)) for s in shapes)} on axis {axis}"
        raise reader.refusal(node, what, "the channels (axis 1) of maps of the same size")
    channels = sum(s.channels for s in drafts)
    return reader.add(node, CONCAT, drafts, channels=channels, size=drafts[0].size)


def _view(reader: Reader, node: Node, args: Args) -> Value:
    """Another shape over the same elements in the same order."""
    read = args.get("self", args.get("input"))
    return Value(reader.draft(read, node))


def _convert(reader: Reader, node: Node, args: Args) -> Value:
    """A view: between floating-point types the reals stay the same, up to rounding."""
    kind = node.meta["val"].dtype
    if not kind.is_floating_point:
        raise reader.refusal(node, f"a conversion to {kind}", "floating-point types only")
    return _view(reader, node, args)


def _permute(reader: Reader, node: Node, args: Args) -> Value:
    """A view, if only axes of length 1 are moved."""
    found = _shape(args["self"])
    order = [axis % len(found) for axis in args["dims"] if found[axis] > 1]
    if order != sorted(order):
        raise reader.refusal(node, f"permute({args['dims']})", INSTEAD["permute"])
    return _view(reader, node, args)


OPERATORS: dict[str, Callable[[Reader, Node, Args], Value]] = {
    "conv3d": partial(_convolve, axes=3),
    "conv2d": partial(_convolve, axes=2),
    "linear": _linear,
    "max_pool3d": partial(_pool, op=MAX_POOL, axes=3),
    "max_pool2d": partial(_pool, op=MAX_POOL, axes=2),
    "max_pool3d_with_indices": partial(_pool, op=MAX_POOL, axes=3),
    "max_pool2d_with_indices": partial(_pool, op=MAX_POOL, axes=2),
    "avg_pool3d": partial(_pool, op=AVERAGE_POOL, axes=3),
    "avg_pool2d": partial(_pool, op=AVERAGE_POOL, axes=2),
    "adaptive_avg_pool3d": partial(_adaptive_pool, op=AVERAGE_POOL, axes=3),
    "adaptive_avg_pool2d": partial(_adaptive_pool, op=AVERAGE_POOL, axes=2),
    "adaptive_max_pool3d": partial(_adaptive_pool, op=MAX_POOL, axes=3),
    "adaptive_max_pool2d": partial(_adaptive_pool, op=MAX_POOL, axes=2),
    "mean": _mean,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "relu": _activate,
    "relu6": _activate,
    "hardtanh": _activate,
    "clamp": _activate,
    "clip": _activate,
    "clamp_min": _activate,
    "add": _add,
    "cat": _concat,
    **dict.fromkeys(("to", "_to_copy", "type_as"), _convert),
    "permute": _permute,
    **dict.fromkeys(
        ("view", "reshape", "flatten", "squeeze", "unsqueeze", "clone", "alias", "dropout"), _view
    ),
}
"""The function that reads each operator, by ATen name."""

WORDS = {
    "cat": "concat",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "max_pool3d_with_indices": "max_pool3d",
    "max_pool2d_with_indices": "max_pool2d",
}
"""Layer names for operators whose ATen name is not what users call them."""

INSTEAD = {
    op: instead
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
"""What to use instead of operators that are not supported."""
