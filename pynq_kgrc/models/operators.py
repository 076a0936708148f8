"""Reads each operator of an exported torch module as a step (`steps.py`).

To add an operator, add a function to the table `OPERATORS`. `torch.export` gives a flat list of
ATen operators.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import ACTIVATIONS
from pynq_kgrc.models.steps import CLIP, Step
from pynq_kgrc.quant import Array

Args = dict[str, Any]
"""An operator's arguments by their names in its schema, defaults included."""

Parts = tuple[str, tuple[Any, ...], dict[str, Any]]
"""A step's operator, what it reads (nodes, numbers, None), and its attributes."""


def read_operators(
    program: ExportedProgram, module: nn.Module, name: str
) -> tuple[list[Step], str, int]:
    """The steps in running order, the name of the result, and the number of axes of the clip.

    Operators on constants alone are computed here: weights that are masked or scaled, for example.

    Raises:
        CompileError: an output that is not one tensor.
    """
    reader = Reader(name, module)
    rank = 5
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
            reader.names[node] = CLIP
            rank = len(_shape(node))
        elif node.op == "call_function":
            reader.call(node)
    out_spec = program.call_spec.out_spec
    single = out_spec is not None and out_spec.is_leaf()
    last = nodes.get(str(signature.user_outputs[0])) if single else None
    if last is None or last not in reader.names:
        raise CompileError(
            f"{name}: the output has to be one tensor that depends on the clip; return one of "
            f"several, or torch.cat of maps of one size on axis 1"
        )
    return reader.steps, reader.names[last], rank


class Reader:
    """Reads operators in order: the steps so far, and the names of the values."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.steps: list[Step] = []
        self.names: dict[Any, str] = {}
        self.constants: dict[Any, torch.Tensor] = {}
        self.pieces: dict[Any, list[Parts]] = {}
        """The step that makes each part of what an operator splits."""

    def call(self, node: Node) -> None:
        """Read one operator."""
        target: Any = node.target
        reads = node.all_input_nodes
        if target is operator.getitem and reads[0] in self.pieces:
            self._append(node, *self.pieces[reads[0]][int(str(node.args[1]))])
        elif target is operator.getitem and reads[0] in self.names and node.args[1] == 0:
            self.names[node] = self.names[reads[0]]  # the other outputs are indices or statistics
        elif _op(node) in ("zeros_like", "new_zeros"):
            self.constants[node] = torch.zeros(_shape(node))
        elif all(read in self.constants for read in reads):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.constants.get)
            with torch.no_grad():
                self.constants[node] = target(*args, **kwargs)
        elif _op(node) != "_assert_tensor_metadata":
            named: Args = {}
            if hasattr(target, "_schema"):
                named.update((a.name, a.default_value) for a in target._schema.arguments)
            named.update(zip(named, node.args, strict=False))
            named.update(node.kwargs)
            if _op(node) in PIECES:
                self.pieces[node] = PIECES[_op(node)](node, named)
                return
            read = OPERATORS.get(_op(node))
            parts = read(node, named) if read else (_op(node), tuple(reads), {})
            self._append(node, *parts)

    def _append(self, node: Node, op: str, inputs: tuple[Any, ...], given: dict[str, Any]) -> None:
        path, kinds = _place(node)
        leaf = path and next(self.module.get_submodule(path).children(), None) is None
        layer = path if leaf else f"{path}.{WORDS.get(_op(node), _op(node))}".lstrip(".")
        name = node.name if node.name != CLIP else f"{CLIP} of {op}"
        step = Step(
            name=name,
            op=op,
            inputs=tuple(map(self._input, inputs)),
            attributes=given,
            layer=layer,
            place=f"{path or 'top level'} ({kinds})",
            spoken=_op(node),
        )
        self.steps.append(step)
        self.names[node] = name

    def _input(self, read: Any) -> str | Array | None:
        if read in self.names:
            return self.names[read]
        if read in self.constants:
            array: Array = self.constants[read].cpu().float().numpy()
            return array
        return None if read is None else np.array(read, np.float32)


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


def _convolve(node: Node, args: Args) -> Parts:
    kernel = _shape(args["weight"])[2:]
    if args["padding"] == "same":
        reach = [(k - 1) * d for k, d in zip(kernel, _each(args["dilation"], kernel), strict=True)]
        before, after = [n // 2 for n in reach], [n - n // 2 for n in reach]
    else:
        before = after = [0] if args["padding"] == "valid" else args["padding"]
    given = {key: args[key] for key in ("stride", "dilation", "groups")}
    inputs = args["input"], args["weight"], args["bias"]
    return "conv", inputs, {**given, "before": before, "after": after}


def _each(values: Any, axes: Any) -> list[int]:
    """One number for each axis, where torch takes a single one for all."""
    return list(values) * (len(axes) if len(values) == 1 else 1)


def _linear(node: Node, args: Args) -> Parts:
    return "linear", (args["input"], args["weight"], args["bias"]), {}


def _pool(node: Node, args: Args, op: str, axes: int) -> Parts:
    kernel = _each(args["kernel_size"], range(axes))
    padding = args["padding"]
    given = {"kernel": kernel, "stride": args["stride"] or kernel, "ceil_mode": args["ceil_mode"]}
    if op == "max_pool":
        given["dilation"] = args["dilation"]
    else:
        given["count_include_pad"] = args["count_include_pad"]
        given["divisor"] = args["divisor_override"]
    return op, (args["self"],), {**given, "before": padding, "after": padding}


def _adaptive_pool(node: Node, args: Args, op: str, axes: int) -> Parts:
    return op, (args["self"],), {"size": _shape(node)[-axes:]}


def _mean(node: Node, args: Args) -> Parts:
    return "mean", (args["self"],), {"axes": args.get("dim"), "keepdim": args.get("keepdim", False)}


def _pad(node: Node, args: Args) -> Parts:
    found = list(args["pad"])
    pairs = [(found[i], found[i + 1]) for i in range(0, len(found), 2)][::-1]  # last axis first
    widths = [(0, 0)] * (len(_shape(args["self"])) - len(pairs)) + pairs
    given = {"widths": widths, "fill": args["value"] or 0, "mode": args.get("mode", "constant")}
    return "pad", (args["self"],), given


def _batch_norm(node: Node, args: Args) -> Parts:
    names = "input", "running_mean", "running_var", "weight", "bias"
    return "batch_norm", tuple(args[name] for name in names), {"eps": args["eps"]}


def _clamp(node: Node, args: Args) -> Parts:
    """A clamp of `graph.ACTIVATIONS`, under any of torch's names for it."""
    low, high = args.get("min", args.get("min_val")), args.get("max", args.get("max_val"))
    if (low, high) == (None, None):
        low, high = ACTIVATIONS.get(_op(node), (None, None))
    return "clamp", (args["self"],), {"low": low, "high": high}


def _two(node: Node, args: Args, op: str) -> Parts:
    if args.get("rounding_mode") is not None:
        return _op(node), (args["self"],), {}
    return op, (args["self"], args["other"]), {"alpha": args.get("alpha", 1)}


def _reversed_sub(node: Node, args: Args) -> Parts:
    alpha = args["alpha"]
    return ("sub", (args["other"], args["self"]), {}) if alpha == 1 else ("rsub", (), {})


def _concat(node: Node, args: Args) -> Parts:
    return "concat", tuple(args["tensors"]), {"axis": args["dim"], "stack": _op(node) == "stack"}


def _view(node: Node, args: Args) -> Parts:
    """Another shape over the same elements in the same order."""
    return "reshape", (args.get("self", args.get("input")),), {"shape": _shape(node)}


def _convert(node: Node, args: Args) -> Parts:
    kind = node.meta["val"].dtype
    return "convert", (args["self"],), {"to": str(kind), "real": kind.is_floating_point}


def _permute(node: Node, args: Args) -> Parts:
    return "permute", (args["self"],), {"order": args["dims"]}


def _transpose(node: Node, args: Args) -> Parts:
    axes = list(range(len(_shape(args["self"]))))
    first, second = (args.get("dim0", -2), args.get("dim1", -1)) if len(axes) > 1 else (0, 0)
    axes[first], axes[second] = axes[second], axes[first]
    return "permute", (args["self"],), {"order": axes}


def _move_axes(node: Node, args: Args) -> Parts:
    places = np.arange(len(_shape(args["self"])))
    spread = np.empty([1 + n for n in places], np.int8)  # numpy moves axes as torch does
    moved = np.moveaxis(spread, args["source"], args["destination"])
    return "permute", (args["self"],), {"order": [n - 1 for n in moved.shape]}


def _taken(node: Any, axis: int, indices: Any, *, drop: bool = False) -> Parts:
    return "take", (node,), {"axis": axis % len(_shape(node)), "indices": indices, "drop": drop}


def _slice(node: Node, args: Args) -> Parts:
    source, axis = args["self"], args["dim"]
    places = range(_shape(source)[axis])[args["start"] : args["end"] : args["step"]]
    return _taken(source, axis, places)


def _narrow(node: Node, args: Args) -> Parts:
    start = args["start"]
    return _taken(args["self"], args["dim"], range(start, start + args["length"]))


def _select(node: Node, args: Args) -> Parts:
    length = _shape(args["self"])[args["dim"]]
    return _taken(args["self"], args["dim"], [args["index"] % length], drop=True)


def _index(node: Node, args: Args) -> Parts:
    """x[:, [2, 0]], with indices along one axis."""
    given = args["indices"]
    axes = [axis for axis, indices in enumerate(given) if indices is not None]
    if len(axes) != 1 or len(_shape(given[axes[0]])) != 1:
        return "index", (args["self"],), {}
    return "take", (args["self"], given[axes[0]]), {"axis": axes[0]}


def _index_select(node: Node, args: Args) -> Parts:
    return "take", (args["self"], args["index"]), {"axis": args["dim"] % len(_shape(args["self"]))}


def _flip(node: Node, args: Args) -> Parts:
    if len(args["dims"]) != 1:
        return "flip", (args["self"],), {}
    axis = args["dims"][0]
    return _taken(args["self"], axis, range(_shape(args["self"])[axis])[::-1])


def _roll(node: Node, args: Args) -> Parts:
    if len(args["dims"]) != 1:
        return "roll", (args["self"],), {}
    axis = args["dims"][0]
    places = np.roll(np.arange(_shape(args["self"])[axis]), args["shifts"][0])
    return _taken(args["self"], axis, places)


def _put(node: Node, args: Args) -> Parts:
    axis = args["dim"]
    length = _shape(args["self"])[axis]
    if "index" in args:
        return _put_one(args, axis, args["index"] % length)
    places = range(length)[args["start"] : args["end"] : args["step"]]
    return "put", (args["self"], args["src"]), {"axis": axis, "indices": places}


def _put_one(args: Args, axis: int, index: int) -> Parts:
    return "put", (args["self"], args["src"]), {"axis": axis, "indices": index}


def _copy(node: Node, args: Args) -> Parts:
    """The source in the shape of the target."""
    return "expand", (args["src"],), {"shape": _shape(node)}


def _expand(node: Node, args: Args) -> Parts:
    return "expand", (args["self"],), {"shape": _shape(node)}


def _view_of(node: Node, args: Args) -> Parts:
    return "identity", (args["self"],), {}


def _softmax(node: Node, args: Args) -> Parts:
    return "softmax", (args["self"],), {"axis": args["dim"]}


def _negate(node: Node, args: Args) -> Parts:
    return "mul", (args["self"], -1.0), {}


def _sum(node: Node, args: Args) -> Parts:
    _, inputs, given = _mean(node, args)
    return "sum", inputs, given


def _split(node: Node, args: Args) -> list[Parts]:
    """The pieces of a split or a chunk along an axis."""
    axis = args["dim"]
    pieces, start = [], 0
    for value in node.meta["val"]:
        length = value.shape[axis]
        pieces.append(_taken(args["self"], axis, range(start, start + length)))
        start += length
    return pieces


def _unbind(node: Node, args: Args) -> list[Parts]:
    axis = args["dim"]
    places = range(_shape(args["self"])[axis])
    return [_taken(args["self"], axis, [place], drop=True) for place in places]


PIECES: dict[str, Callable[[Node, Args], list[Parts]]] = {
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    "unbind": _unbind,
}
"""The function that reads each operator that makes several values, by ATen name."""


OPERATORS: dict[str, Callable[[Node, Args], Parts]] = {
    "conv3d": _convolve,
    "conv2d": _convolve,
    "linear": _linear,
    "max_pool3d": partial(_pool, op="max_pool", axes=3),
    "max_pool2d": partial(_pool, op="max_pool", axes=2),
    "max_pool3d_with_indices": partial(_pool, op="max_pool", axes=3),
    "max_pool2d_with_indices": partial(_pool, op="max_pool", axes=2),
    "avg_pool3d": partial(_pool, op="average_pool", axes=3),
    "avg_pool2d": partial(_pool, op="average_pool", axes=2),
    "adaptive_avg_pool3d": partial(_adaptive_pool, op="adaptive_average_pool", axes=3),
    "adaptive_avg_pool2d": partial(_adaptive_pool, op="adaptive_average_pool", axes=2),
    "adaptive_max_pool3d": partial(_adaptive_pool, op="adaptive_max_pool", axes=3),
    "adaptive_max_pool2d": partial(_adaptive_pool, op="adaptive_max_pool", axes=2),
    "mean": _mean,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "_native_batch_norm_legit_no_training": _batch_norm,
    **dict.fromkeys(("relu", "relu6", "hardtanh", "clamp", "clip", "clamp_min"), _clamp),
    "conv1d": _convolve,
    "add": partial(_two, op="add"),
    "sub": partial(_two, op="sub"),
    "mul": partial(_two, op="mul"),
    "div": partial(_two, op="div"),
    "rsub": _reversed_sub,
    "neg": _negate,
    "sum": _sum,
    **dict.fromkeys(("cat", "stack"), _concat),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _convert),
    "permute": _permute,
    **dict.fromkeys(("transpose", "t", "swapaxes"), _transpose),
    "movedim": _move_axes,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "index": _index,
    "index_select": _index_select,
    "flip": _flip,
    "roll": _roll,
    **dict.fromkeys(("slice_scatter", "select_scatter"), _put),
    "copy": _copy,
    "expand": _expand,
    "detach": _view_of,
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    **dict.fromkeys(
        (
            *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "clone"),
            *("contiguous", "alias", "dropout", "_unsafe_view"),
        ),
        _view,
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
