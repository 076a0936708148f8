"""Reads each node of an ONNX file as a step (`steps.py`).

To add an operator, add a function to the table `OPERATORS`. The meaning of a node is that of its
opset from 11 on: https://onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from onnx import helper

from pynq_kgrc.errors import CompileError
from pynq_kgrc.models.onnx_file import DAMAGED, Network, Node, Shape, quant_bounds
from pynq_kgrc.models.steps import CLIP, LOWEST, Step
from pynq_kgrc.models.values import Code
from pynq_kgrc.quant import BITS, Array, QuantParams

Parts = tuple[str, tuple[Any, ...], dict[str, Any]]
"""A step's operator, what it reads (names of tensors, arrays, None), and its attributes."""

Read = Callable[["Reader", Node], "Parts | None"]
"""Reads a node as the parts of a step; None if it appended steps itself or needs none."""


def read_nodes(network: Network) -> tuple[list[Step], str]:
    """The steps in running order, and the name of the value that is the result.

    Raises:
        CompileError: nodes that the accelerator has no counterpart of, all of them with their
            names; more than one result.
    """
    reader = Reader(network)
    wrong: list[str] = []
    for node in network.nodes:
        try:
            reader.read(node)
        except CompileError as error:
            wrong.append(str(error).removeprefix(f"{network.name}: "))
    if wrong:
        raise CompileError(f"{network.name}: {'; '.join(wrong)}")
    if len(network.outputs) != 1 or network.outputs[0] not in reader.names:
        what = ", ".join(network.outputs)
        raise CompileError(
            f"{network.name}: the outputs are {what}; accepted is one that depends on the clip"
        )
    return reader.steps, reader.names[network.outputs[0]]


@dataclass(frozen=True)
class Codes:
    """Integers of a file: what was quantized to them, and how."""

    source: str
    scale: float
    zero: int
    low: int
    high: int


class Reader:
    """Reads nodes in order: the steps so far, and the names of their values."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.steps: list[Step] = []
        self.names = {network.input: CLIP}
        self.codes: dict[str, Codes] = {}

    def read(self, node: Node) -> None:
        """Read one node. One that is none of `OPERATORS` becomes a step that is refused by name."""
        coded = [name for name in node.inputs if name in self.codes]
        if coded and node.op not in ("Clip", "DequantizeLinear"):
            what = f"{node.op} of the integers {coded[0]}"
            raise self.refusal(node, what, "QuantizeLinear and DequantizeLinear around reals")
        for name in node.outputs:
            self.names[name] = f"{CLIP} of {node.op}" if name == CLIP else name
        if node.op not in OPERATORS:
            self.append(node, node.op, node.inputs, {}, known=False)
            for name in node.outputs[1:]:
                self.names[name] = self.names[node.outputs[0]]
            return
        try:
            parts = OPERATORS[node.op](self, node)
        except DAMAGED as error:
            # an attribute or constant of another kind than the operator has
            what = f"{node.op} that cannot be read ({type(error).__name__}: {error})"
            raise self.refusal(node, what) from error
        if parts is not None:
            unread = [name for name in node.outputs[1:] if name and self._is_read(name)]
            if unread:
                raise self.refusal(node, f"{node.op} whose output {unread[0]} is read", "the first")
            self.append(node, *parts)

    def append(
        self,
        node: Node,
        op: str,
        inputs: tuple[Any, ...],
        given: dict[str, Any],
        name: str = "",
        known: bool = True,
    ) -> None:
        """Append a step that makes `name`, or the first output of a node.

        Its shape has to be that of the file if that is `known`.
        """
        output = name or node.outputs[0]
        found = self.network.shapes.get(output)
        if known and not name and found is None:
            raise self.refusal(node, f"a shape of {output} that depends on the clip's values")
        self.steps.append(
            Step(
                name=self.names.setdefault(output, output),
                op=op,
                inputs=tuple(self._input(read, node) for read in inputs),
                attributes=given,
                layer=node.layer,
                place=node.place,
                spoken=node.op,
                shape=found if known else None,
            )
        )

    def _is_read(self, name: str) -> bool:
        readers = any(name in node.inputs for node in self.network.nodes)
        return readers or name in self.network.outputs

    def _input(self, read: str | Array | None, node: Node) -> str | Array | None:
        if isinstance(read, np.ndarray):
            return read
        if not read:
            return None
        if read in self.names:
            return self.names[read]
        if read not in self.network.constants:
            raise self.refusal(node, f"{node.op} reads {read}, which no node before it makes")
        return self.network.constants[read]

    def shape(self, name: str, node: Node) -> Shape:
        """The shape of a tensor."""
        if name in self.network.constants:
            return self.network.constants[name].shape
        found = self.network.shapes.get(name)
        if found is None:
            raise self.refusal(node, f"a shape of {name} that depends on the clip's values")
        return found

    def constant(self, node: Node, number: int) -> Array | None:
        """Input `number` of a node as a constant; None if it is left out."""
        name = node.inputs[number] if number < len(node.inputs) else ""
        if not name:
            return None
        if name not in self.network.constants:
            raise self.refusal(node, f"{node.op} whose input {name} depends on the clip")
        return self.network.constants[name]

    def weight(self, node: Node, number: int, rank: int | None = None) -> Array:
        """Input `number` as a constant that cannot be left out, of `rank` axes."""
        found = self.constant(node, number)
        if found is None or found.dtype.kind != "f" or rank not in (None, found.ndim):
            what = "none" if found is None else f"{found.dtype} {list(found.shape)}"
            raise self.refusal(node, f"{node.op} with a constant {number} of {what}")
        return found

    def refusal(self, node: Node, what: str, instead: str | None = None) -> CompileError:
        """A CompileError that names the place of `node` in the file."""
        hint = f"; use {instead}" if instead else ""
        return CompileError(f"{self.network.name}: {what} at {node.place}{hint}")


def _window(reader: Reader, node: Node, kernel: list[int]) -> dict[str, Any]:
    """Stride, dilation and padding of a window over the last axes."""
    given, axes = node.attributes, len(kernel)
    sides = reader.shape(node.inputs[0], node)[2:]
    if len(sides) != axes:
        raise reader.refusal(node, f"a window over {axes} axes of {len(sides)}")
    stride = [int(n) for n in given.get("strides", [1] * axes)]
    dilation = [int(n) for n in given.get("dilations", [1] * axes)]
    pads = [int(n) for n in given.get("pads", [0] * 2 * axes)]
    auto = str(given.get("auto_pad", "NOTSET"))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = _same(sides, kernel, stride, dilation, auto)
    elif auto == "VALID":
        pads = [0] * 2 * axes
    elif auto != "NOTSET":
        raise reader.refusal(node, f"auto_pad {auto}", "NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    if len(stride) != axes or len(dilation) != axes or len(pads) != 2 * axes:
        raise reader.refusal(node, f"strides {stride}, dilations {dilation}, pads {pads}")
    if min(pads) < 0 or min(*stride, *dilation, *kernel) < 1:
        raise reader.refusal(
            node, f"kernel {kernel}, strides {stride}, pads {pads}", "padding of 0 or more"
        )
    return {
        "stride": stride,
        "dilation": dilation,
        "before": pads[:axes],
        "after": pads[axes:],
    }


def _same(
    sides: Shape, kernel: list[int], stride: list[int], dilation: list[int], auto: str
) -> list[int]:
    """Padding for as many outputs as inputs divided by the stride; an odd one at the named end."""
    before, after = [], []
    for side, k, step, reach in zip(sides, kernel, stride, dilation, strict=True):
        whole = max(0, (-(-side // step) - 1) * step + (k - 1) * reach + 1 - side)
        first = whole // 2 if auto == "SAME_UPPER" else whole - whole // 2
        before.append(first)
        after.append(whole - first)
    return before + after


def _convolve(reader: Reader, node: Node) -> Parts:
    weight = reader.weight(node, 1)
    groups = int(node.attributes.get("group", 1))
    channels = reader.shape(node.inputs[0], node)[1]
    kernel = list(weight.shape[2:])
    declared = list(node.attributes.get("kernel_shape", kernel))
    bias = reader.constant(node, 2)
    fits = groups > 0 and weight.ndim > 2 and channels == weight.shape[1] * groups
    fits = fits and weight.shape[0] % groups == 0 and declared == kernel
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        what = f"a weight {list(weight.shape)} in {groups} groups for {channels} channels"
        raise reader.refusal(node, what)
    inputs = (node.inputs[0], weight, bias)
    step = _weight_step(reader, node, weight.shape)
    return "conv", inputs, {**_window(reader, node, kernel), "groups": groups, "weight_step": step}


def _weight_step(
    reader: Reader, node: Node, shape: Shape, turned: bool = False, alpha: float = 1.0
) -> Array | None:
    """[M] float64: the real of one code of each filter of a weight [M, ...]; None if it has none.

    `turned`: the file has the weight [N, M].
    """
    name = node.inputs[1]
    if name not in reader.network.steps:
        return None
    step = reader.network.steps[name]
    if step is None:
        what = f"{node.op} whose weight {name} is changed after it was dequantized"
        raise reader.refusal(node, what, "DequantizeLinear right before it")
    step = (step.T if turned else step) * alpha
    if step.size > 1 and step.shape != (shape[0], *[1] * (step.ndim - 1)):
        what = f"{node.op} with scales {list(step.shape)} of its weight"
        raise reader.refusal(node, what, "one for each filter, or one")
    if not (np.isfinite(step) & (step > 0)).all():
        raise reader.refusal(node, f"{node.op} with a scale of {step.min():g} of its weight")
    return np.broadcast_to(step.reshape(-1), shape[:1]).copy()


def _gemm(reader: Reader, node: Node) -> Parts:
    given = node.attributes
    weight = reader.weight(node, 1, rank=2)
    if given.get("transA", 0):
        raise reader.refusal(node, "Gemm with transA=1", "transA=0")
    turned, alpha = not given.get("transB", 0), float(given.get("alpha", 1.0))
    weight = (weight.T if turned else weight) * np.float32(alpha)
    step = _weight_step(reader, node, weight.shape, turned, abs(alpha))
    bias = reader.constant(node, 2)
    return _product(reader, node, weight, bias, given.get("beta", 1.0), step)


def _matmul(reader: Reader, node: Node) -> Parts:
    weight = reader.weight(node, 1, rank=2).T
    step = _weight_step(reader, node, weight.shape, turned=True)
    return _product(reader, node, weight, None, 1.0, step)


def _product(
    reader: Reader,
    node: Node,
    weight: Array,
    bias: Array | None,
    beta: float,
    step: Array | None,
) -> Parts:
    """A linear of weight [M, N] and what broadcasts to a bias [M]."""
    if bias is not None:
        if max((*bias.shape[:-1], 1)) > 1 or bias.shape[-1:] not in ((), (1,), weight.shape[:1]):
            raise reader.refusal(node, f"a bias of shape {list(bias.shape)}", "one for each output")
        bias = np.broadcast_to(bias.reshape(-1), weight.shape[:1]) * np.float32(beta)
    if reader.shape(node.inputs[0], node)[-1] != weight.shape[1]:
        raise reader.refusal(node, f"a weight {list(weight.shape[::-1])} that does not fit")
    return "linear", (node.inputs[0], weight, bias), {"weight_step": step}


def _pool(reader: Reader, node: Node, op: str) -> Parts:
    given = node.attributes
    kernel = [int(n) for n in given["kernel_shape"]]
    attributes = _window(reader, node, kernel)
    attributes |= {"kernel": kernel, "ceil_mode": bool(given.get("ceil_mode", 0))}
    if op == "average_pool":
        attributes["count_include_pad"] = bool(given.get("count_include_pad", 0))
    return op, node.inputs[:1], attributes


def _global_pool(reader: Reader, node: Node, op: str) -> Parts:
    return op, node.inputs[:1], {"size": [1] * (len(reader.shape(node.inputs[0], node)) - 2)}


def _mean(reader: Reader, node: Node) -> Parts:
    """The axes are an attribute up to opset 17, then an input."""
    found = node.attributes.get("axes", reader.constant(node, 1))
    axes = [] if found is None else [int(axis) for axis in np.ravel(found)]
    if not axes and node.attributes.get("noop_with_empty_axes", 0):
        return "identity", node.inputs[:1], {}
    keep = bool(node.attributes.get("keepdims", 1))
    return "mean", node.inputs[:1], {"axes": axes or None, "keepdim": keep}


def _clip(reader: Reader, node: Node) -> Parts | None:
    """A clamp; of integers between a quantizer and its inverse, a narrower range of codes."""
    least, most = reader.constant(node, 1), reader.constant(node, 2)
    if any(end is not None and end.size != 1 for end in (least, most)):
        raise reader.refusal(node, "Clip with bounds that are no numbers")
    low = None if least is None else float(least.reshape(()))
    high = None if most is None else float(most.reshape(()))
    codes = reader.codes.get(node.inputs[0])
    if codes is not None:
        first = codes.low if low is None else max(codes.low, int(low))
        last = codes.high if high is None else min(codes.high, int(high))
        reader.codes[node.outputs[0]] = replace(codes, low=first, high=last)
        return None
    low = None if low is None or low <= LOWEST else low
    high = None if high is None or high >= -LOWEST else high
    if (low, high) == (None, None):
        return "identity", node.inputs[:1], {}
    return "clamp", node.inputs[:1], {"low": low, "high": high}


def _quantize(reader: Reader, node: Node) -> None:
    """QuantizeLinear: kept until its inverse reads the integers."""
    scale, zero = reader.constant(node, 1), reader.constant(node, 2)
    if scale is None or scale.size != 1:
        what = f"QuantizeLinear with scales {[] if scale is None else list(scale.shape)} of a map"
        raise reader.refusal(node, what, "one scale for each tensor")
    kind = np.dtype(np.uint8) if zero is None else zero.dtype
    if zero is None and node.attributes.get("output_dtype", 0):
        kind = helper.tensor_dtype_to_np_dtype(int(node.attributes["output_dtype"]))
    if str(kind) not in INTEGERS:
        raise reader.refusal(node, f"QuantizeLinear to {kind}", f"{', '.join(INTEGERS)}")
    low, high = INTEGERS[str(kind)]
    point = 0 if zero is None else int(np.ravel(zero)[0])
    source = node.inputs[0]
    reader.codes[node.outputs[0]] = Codes(source, float(scale.reshape(())), point, low, high)


INTEGERS = {
    **{f"int{bits}": (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) for bits in (4, 8, 16)},
    **{f"uint{bits}": (0, (1 << bits) - 1) for bits in (4, 8, 16)},
}
"""The lowest and the highest code of each type that QuantizeLinear writes."""


def _dequantize(reader: Reader, node: Node) -> Parts:
    """DequantizeLinear: the reals of codes, with the scale that they were made with."""
    codes = reader.codes.get(node.inputs[0])
    if codes is None:
        what = f"DequantizeLinear of {node.inputs[0]}, which no QuantizeLinear makes"
        raise reader.refusal(node, what, "a clip of reals: its pixels are quantized here")
    scale, zero = reader.constant(node, 1), reader.constant(node, 2)
    point = 0 if zero is None else int(np.ravel(zero)[0])
    if (
        scale is None
        or scale.size != 1
        or (float(scale.reshape(())), point)
        != (
            codes.scale,
            codes.zero,
        )
    ):
        what = "DequantizeLinear with another scale or zero point than QuantizeLinear before it"
        raise reader.refusal(node, what, "the same")
    return _coded(reader, node, codes)


def _quant(reader: Reader, node: Node) -> Parts:
    """Quant of QONNX: a quantizer and its inverse."""
    found = [value for n in (1, 2, 3) if (value := reader.constant(node, n)) is not None]
    if [value.size for value in found] != [1, 1, 1]:
        what = f"Quant with scales {[list(value.shape) for value in found]} of a map"
        raise reader.refusal(node, what, "one scale for each tensor")
    scale, zero, bits = (float(np.ravel(value)[0]) for value in found)
    if zero % 1:
        raise reader.refusal(node, f"Quant with a zero point of {zero:g}", "a whole number")
    low, high = quant_bounds(
        np.array(bits), node.attributes, f"{reader.network.name}: {node.place}"
    )
    return _coded(reader, node, Codes(node.inputs[0], scale, int(zero), low, high))


def _coded(reader: Reader, node: Node, codes: Codes) -> Parts:
    """A step that limits a value to codes, which are shifted to be signed."""
    if not (np.isfinite(codes.scale) and codes.scale > 0) or codes.low >= codes.high:
        what = f"a scale of {codes.scale:g} and codes {codes.low} to {codes.high}"
        raise reader.refusal(node, what, "a scale above 0")
    if not codes.low <= codes.zero <= codes.high:
        what = f"a zero point of {codes.zero} outside of the codes {codes.low} to {codes.high}"
        raise reader.refusal(node, what, "one within, so that padding with zeros has a code")
    bits = next(bits for bits in sorted(BITS) if codes.high - codes.low < 1 << bits)
    half = 1 << (bits - 1)
    shift = 0 if codes.low >= -half and codes.high < half else codes.low + half
    quant = QuantParams(bits, codes.scale, codes.zero - shift)
    limits = codes.low - shift, codes.high - shift
    return "code", (codes.source,), {"code": Code(quant, limits)}


def _relu(reader: Reader, node: Node) -> Parts:
    return "clamp", node.inputs[:1], {"low": 0.0, "high": None}


def _batch_norm(reader: Reader, node: Node) -> Parts:
    if node.attributes.get("training_mode", 0):
        raise reader.refusal(node, "BatchNormalization in training", "a network in eval()")
    scale, bias, mean, variance = (reader.weight(node, n, rank=1) for n in range(1, 5))
    channels = reader.shape(node.inputs[0], node)[1:2]
    if any(part.shape != channels for part in (scale, bias, mean, variance)):
        raise reader.refusal(node, f"BatchNormalization of {list(scale.shape)} for {channels[0]}")
    inputs = (node.inputs[0], mean, variance, scale, bias)
    return "batch_norm", inputs, {"eps": float(node.attributes.get("epsilon", 1e-5))}


def _pad(reader: Reader, node: Node) -> Parts:
    rank = len(reader.shape(node.inputs[0], node))
    pads, axes, fill = (reader.constant(node, number) for number in (1, 3, 2))
    over = list(range(rank)) if axes is None else [int(axis) % rank for axis in np.ravel(axes)]
    ends = [] if pads is None else [int(n) for n in np.ravel(pads)]
    if len(ends) != 2 * len(over):
        raise reader.refusal(node, f"Pad with pads {ends} of {len(over)} axes")
    widths = [(0, 0)] * rank
    for place, axis in enumerate(over):
        widths[axis] = ends[place], ends[place + len(over)]
    mode = str(node.attributes.get("mode", "constant"))
    value = 0.0 if fill is None else float(np.ravel(fill)[0])
    return "pad", node.inputs[:1], {"widths": widths, "fill": value, "mode": mode}


def _reshape(reader: Reader, node: Node) -> Parts:
    """Another shape over the same elements in the same order."""
    return "reshape", node.inputs[:1], {"shape": reader.shape(node.outputs[0], node)}


def _identity(reader: Reader, node: Node) -> Parts:
    return "identity", node.inputs[:1], {}


def _dropout(reader: Reader, node: Node) -> Parts:
    training = reader.constant(node, 2)
    if training is not None and training.any():
        raise reader.refusal(node, "Dropout in training", "a network in eval()")
    return "identity", node.inputs[:1], {}


def _pair(reader: Reader, node: Node, op: str) -> Parts:
    """Two inputs, each a map or a constant."""
    if len(node.inputs) != 2:
        raise reader.refusal(node, f"{node.op} of {len(node.inputs)} inputs", "two")
    return op, node.inputs, {}


def _negate(reader: Reader, node: Node) -> Parts:
    return "mul", (node.inputs[0], np.array(-1.0, np.float32)), {}


def _sum(reader: Reader, node: Node) -> Parts:
    """The axes are an attribute up to opset 12, then an input; the rest as of a mean."""
    op, inputs, given = _mean(reader, node)
    return ("sum" if op == "mean" else op), inputs, given


def _softmax(reader: Reader, node: Node) -> Parts:
    """Up to opset 12 over all axes from `axis` on: equal, where the others have length 1."""
    return "softmax", node.inputs[:1], {"axis": int(node.attributes.get("axis", -1))}


def _cast(reader: Reader, node: Node) -> Parts:
    kind = helper.tensor_dtype_to_np_dtype(int(node.attributes["to"]))
    return "convert", node.inputs[:1], {"to": str(kind), "real": kind.kind == "f"}


def _expand(reader: Reader, node: Node) -> Parts:
    return "expand", node.inputs[:1], {"shape": reader.shape(node.outputs[0], node)}


def _slice(reader: Reader, node: Node) -> None:
    """One step for each axis."""
    sides = reader.shape(node.inputs[0], node)
    starts, ends, axes, strides = (reader.constant(node, number) for number in (1, 2, 3, 4))
    if starts is None or ends is None:
        raise reader.refusal(node, "Slice without starts or ends")
    over = range(len(starts)) if axes is None else [int(axis) % len(sides) for axis in axes]
    by = [1] * len(starts) if strides is None else strides.tolist()
    cuts = [
        (axis, np.arange(sides[axis])[slice(int(start), int(end), int(step))])
        for axis, start, end, step in zip(over, starts, ends, by, strict=True)
    ]
    read = node.inputs[0]
    for number, (axis, indices) in enumerate(cuts):
        last = number == len(cuts) - 1
        name = "" if last else f"{node.outputs[0]} of axis {axis}"
        given = {"axis": axis, "indices": indices}
        reader.append(node, "take", (read,), given, name)
        read = name


def _split(reader: Reader, node: Node) -> None:
    """One step for each output; its part is as long as the shape of the output says."""
    axis = int(node.attributes.get("axis", 0)) % len(reader.shape(node.inputs[0], node))
    first = 0
    for name in node.outputs:
        length = reader.shape(name, node)[axis]
        given = {"axis": axis, "indices": np.arange(first, first + length)}
        reader.append(node, "take", node.inputs[:1], given, name)
        first += length


def _gather(reader: Reader, node: Node) -> Parts:
    axis = int(node.attributes.get("axis", 0)) % len(reader.shape(node.inputs[0], node))
    indices = reader.constant(node, 1)
    if indices is None or indices.ndim > 1:
        raise reader.refusal(node, "Gather with indices of several axes", "a list of indices")
    given = {"axis": axis, "indices": indices.reshape(-1), "drop": indices.ndim == 0}
    return "take", node.inputs[:1], given


def _concat(reader: Reader, node: Node) -> Parts:
    return "concat", node.inputs, {"axis": int(node.attributes["axis"])}


def _permute(reader: Reader, node: Node) -> Parts:
    rank = len(reader.shape(node.inputs[0], node))
    order = node.attributes.get("perm", list(range(rank))[::-1])
    return "permute", node.inputs[:1], {"order": [int(axis) for axis in order]}


OPERATORS: dict[str, Read] = {
    "Conv": _convolve,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MaxPool": partial(_pool, op="max_pool"),
    "AveragePool": partial(_pool, op="average_pool"),
    "GlobalMaxPool": partial(_global_pool, op="adaptive_max_pool"),
    "GlobalAveragePool": partial(_global_pool, op="adaptive_average_pool"),
    "ReduceMean": _mean,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Quant": _quant,
    "Relu": _relu,
    "Clip": _clip,
    "BatchNormalization": _batch_norm,
    "Pad": _pad,
    **{op: partial(_pair, op=op.lower()) for op in ("Add", "Sub", "Mul", "Div")},
    "Sum": partial(_pair, op="add"),
    "Neg": _negate,
    "ReduceSum": _sum,
    "Concat": _concat,
    "Transpose": _permute,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "Expand": _expand,
    "Cast": _cast,
    "Softmax": _softmax,
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshape),
    "Identity": _identity,
    "Dropout": _dropout,
}
"""The function that reads each operator, by its name in ONNX."""
