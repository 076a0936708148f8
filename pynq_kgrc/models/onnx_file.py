"""An ONNX file as plain data: its nodes in order, the shape of every tensor, constants computed.

Shapes are inferred node by node from the input's shape and from constants, so that what a file says
about its own tensors is not trusted. Needs the package onnx, not torch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TypeProto,
    checker,
    helper,
    inliner,
    numpy_helper,
)
from onnx import shape_inference as inference
from onnx.defs import SchemaError, get_schema, onnx_opset_version
from onnx.reference import ReferenceEvaluator

from pynq_kgrc.errors import CompileError, ModelError
from pynq_kgrc.quant import Array

Shape = tuple[int, ...]

OLDEST_OPSET = 11
"""Earlier versions of Pad, Clip and Slice have other inputs; exporters have left them in 2019."""

STANDARD = ("", "ai.onnx")
"""Names of the domain of ONNX itself."""

QONNX = ("qonnx.custom_op.general", "finn.custom_op.general", "onnx.brevitas")
"""Domains of the node Quant, which quantizes and dequantizes."""

MICROSOFT = "com.microsoft"
"""ONNX Runtime's domain. Its QuantizeLinear and DequantizeLinear are those of ONNX."""

LARGEST_CONSTANT = 1 << 28
"""Elements of a constant that a node computes: 1 GiB as float32."""

FOLDED = {
    op
    for ops in (
        "Abs Add And BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Equal Exp",
        "DequantizeLinear Div Expand Flatten Floor Gather Greater GreaterOrEqual Identity Less",
        "LessOrEqual Log MatMul Max Min Mod Mul Neg Not Or Pow QuantizeLinear Range Reciprocal",
        "ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Round Shape Sigmoid",
        "Sign Size Slice Split Sqrt Squeeze Sub Sum Tanh Tile Transpose Unsqueeze Where Xor",
    )
    for op in ops.split()
}
"""Operators that are computed where they read constants only: no random numbers, no subgraphs."""

SMALL = 1024
"""Elements of a constant that may be a shape, axes or bounds."""


@dataclass(frozen=True, eq=False)
class Node:
    """One node that depends on the clip."""

    op: str
    inputs: tuple[str, ...]
    """Names of tensors; empty for one that is left out."""
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    layer: str
    """What its layer is called: the path of its weight or of its module, with dots."""
    place: str
    """For messages: its name in the file."""


@dataclass(eq=False)
class Network:
    """What a file holds, without what its result does not depend on."""

    name: str
    opset: int
    input: str
    """Name of the tensor that is the clip."""
    outputs: tuple[str, ...]
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    shapes: dict[str, Shape | None] = field(default_factory=dict)
    """Of the tensors that depend on the clip; None where it is not known before a run."""
    steps: dict[str, Array | None] = field(default_factory=dict)
    """Of a constant that was dequantized: the real of one code, to be broadcast to the constant.
    None if an operator followed after which that is not known."""
    origins: dict[str, str] = field(default_factory=dict)
    """Of a constant that was computed: the initializer that it comes from."""


def read_file(path: Path, shape: Shape | None = None) -> Network:
    """Read a file for one clip.

    Args:
        path: an ONNX file; weights that it keeps in other files lie beside it.
        shape: of the input, [1, C, D, H, W] or [1, C, H, W]; for axes that the file leaves open.

    Raises:
        ModelError: the file cannot be read, is damaged, of an opset that is not accepted, or has
            an input of another shape.
        CompileError: more than one input.
    """
    model = _load(path)
    try:
        return _read_model(model, path, shape)
    except DAMAGED as error:
        raise _unreadable(path, error) from error


DAMAGED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What the package onnx raises on fields of a damaged file that its checker does not look at: names
that are no text, tensors of another size or type than they say."""


def _read_model(model: ModelProto, path: Path, shape: Shape | None) -> Network:
    graph, name = model.graph, path.name
    opset = _opset(model, name)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    if graph.sparse_initializer:
        raise ModelError(f"{name}: sparse initializers; accepted are dense ones")
    feed = _input(graph, name)
    network = Network(name, opset, feed.name, tuple(value.name for value in graph.output))
    network.constants = constants
    network.shapes[network.input] = _input_shape(feed, shape, name)
    types = {key: _type(value.shape, _element(value)) for key, value in constants.items()}
    types[network.input] = _type(network.shapes[network.input] or (), _input_element(feed))
    for number, proto in enumerate(_needed(graph.node, network.outputs)):
        _read_node(network, model, proto, types, number)
    return network


def clip_shape(path: Path) -> tuple[int | None, ...]:
    """The shape of the file's input; None for an axis that is left open.

    Raises:
        ModelError: the file cannot be read.
        CompileError: more than one input.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise _unreadable(path, error) from error
    return tuple(_lengths(_input(model.graph, path.name)))


def _input(graph: GraphProto, name: str) -> Any:
    """The one input that no initializer fills."""
    held = {str(tensor.name) for tensor in graph.initializer}
    feeds = [value for value in graph.input if value.name not in held]
    if len(feeds) != 1:
        what = ", ".join(value.name for value in feeds) or "none"
        raise CompileError(f"{name}: the inputs are {what}; accepted is one, the clip")
    return feeds[0]


def _lengths(value: Any) -> list[int | None]:
    """The axes of a tensor; None for one that is left open."""
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]


def _unreadable(path: Path, error: Exception) -> ModelError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError):
        return ModelError(f"{path}: cannot be read ({error.strerror or first})")
    return ModelError(f"{path}: not a whole ONNX file ({first}); export it again")


def _load(path: Path) -> ModelProto:
    try:
        model = onnx.load(path)
    except OSError as error:
        missing = getattr(error, "filename", None)
        if missing is not None and Path(missing) != path:
            raise ModelError(
                f"{path}: its weights lie in {missing}, which cannot be read; put that file beside "
                f"it, or export with external_data=False"
            ) from error
        raise _unreadable(path, error) from error
    except checker.ValidationError as error:
        first = str(error).splitlines()[0]
        raise ModelError(
            f"{path}: weights in another file cannot be read ({first}); put that file beside it, "
            f"or export with external_data=False"
        ) from error
    except (DecodeError, ValueError) as error:
        raise _unreadable(path, error) from error
    try:
        checker.check_model(model if model.ByteSize() < 1 << 31 else str(path))
        if model.functions:
            model = inliner.inline_local_functions(model)
    except (checker.ValidationError, RuntimeError, ValueError) as error:
        raise _unreadable(path, error) from error
    return model


def _opset(model: ModelProto, name: str) -> int:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    found = next((versions[domain] for domain in STANDARD if domain in versions), None)
    newest = onnx_opset_version()
    if found is None or not OLDEST_OPSET <= found <= newest:
        raise ModelError(
            f"{name}: opset {found}; accepted is {OLDEST_OPSET} to {newest}, the newest that the "
            f"installed onnx {onnx.__version__} knows"
        )
    return int(found)


def _input_shape(value: Any, wanted: Shape | None, name: str) -> Shape:
    """The shape of the input; open axes from `wanted`, an open batch is 1."""
    dims = _lengths(value)
    if not value.type.HasField("tensor_type") or len(dims) not in (4, 5):
        raise ModelError(
            f"{name}: input {value.name} of shape {dims}; accepted is [1, C, D, H, W], or "
            f"[1, C, H, W] for one frame"
        )
    if wanted is not None and len(wanted) == 5 and len(dims) == 4 and wanted[2] == 1:
        wanted = (*wanted[:2], *wanted[3:])
    if dims[0] not in (None, 1):
        raise ModelError(f"{name}: a batch of {dims[0]}; accepted is 1: export with one clip")
    dims[0] = 1
    if wanted is None and None in dims:
        raise ModelError(
            f"{name}: input {value.name} has open axes {dims}; say frames, height and width"
        )
    if wanted is not None:
        if len(wanted) != len(dims):
            raise ModelError(f"{name}: input of shape {dims}; the clip is {list(wanted)}")
        dims = [w if d is None else d for d, w in zip(dims, wanted, strict=True)]
        if dims != list(wanted):
            raise ModelError(f"{name}: input of shape {dims}; the clip is {list(wanted)}")
    return tuple(int(d) for d in dims if d is not None)


def _input_element(value: Any) -> int:
    return int(value.type.tensor_type.elem_type)


def _element(array: Array) -> int:
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))


def _type(shape: Sequence[int], element: int) -> TypeProto:
    return helper.make_tensor_type_proto(element, tuple(shape))


def _needed(nodes: Iterable[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """The nodes that the outputs depend on, in the order of the file."""
    wanted, kept = set(outputs), []
    for node in reversed(list(nodes)):
        if wanted & set(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _read_node(
    network: Network, model: ModelProto, proto: NodeProto, types: dict[str, Any], number: int
) -> None:
    """Compute a node of constants, or append it and infer the shapes of what it makes."""
    constants = network.constants
    reads = [name for name in proto.input if name]
    values = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
    attributes = {
        key: value.decode(errors="replace") if isinstance(value, bytes) else value
        for key, value in values.items()
    }
    place = f"node {proto.name or proto.output[0] or number}"
    if proto.op_type == "Shape" and network.shapes.get(reads[0]) is not None:
        whole = np.array(network.shapes[reads[0]], np.int64)
        ends = attributes.get("start", 0), attributes.get("end", len(whole))
        found: list[Array] | None = [whole[slice(*ends)]]
    elif all(name in constants for name in reads):
        found = _compute(network, model, proto, attributes, types, place)
    else:
        found = None
    if found is not None:
        for name, value in zip(proto.output, found, strict=False):
            constants[name] = np.asarray(value)
            types[name] = _type(constants[name].shape, _element(constants[name]))
            if reads:
                network.origins[name] = network.origins.get(reads[0], reads[0])
        return
    shapes = _infer(network, model, proto, types, place)
    for name in proto.output:
        network.shapes[name] = shapes.get(name)
    domain = "" if proto.domain in (*STANDARD, *QONNX) else f"{proto.domain}."
    if proto.domain == MICROSOFT and proto.op_type in ("QuantizeLinear", "DequantizeLinear"):
        domain = ""
    layer = layer_name(proto, [network.origins.get(name, name) for name in reads[1:2]])
    inputs, outputs = tuple(proto.input), tuple(proto.output)
    network.nodes.append(Node(domain + proto.op_type, inputs, outputs, attributes, layer, place))


def layer_name(proto: NodeProto, weights: Sequence[str]) -> str:
    """The path of its weight, else that of the module that called it and the operator.

    torch's exporters write the path of a module into the name of the node ("/layer1/layer1.0/Add")
    or into a property of it.
    """
    op = proto.op_type.lower()
    for name in weights:
        name = name.removesuffix("_quantized")  # as ONNX Runtime calls it
        if name.endswith(".weight"):
            return name.removesuffix(".weight")
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    path: list[str] = []
    if "pkg.torch.onnx.name_scopes" in properties:
        try:
            path = [
                str(part) for part in ast.literal_eval(properties["pkg.torch.onnx.name_scopes"])
            ]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            path = []
        path = path[-2:-1]
    elif proto.name.startswith("/"):
        parts = proto.name.strip("/").split("/")[:-1]
        for part in parts:  # "layer1", "layer1.0": the second says the first again
            if path and part.startswith(f"{path[-1]}."):
                path.pop()
            path.append(part)
    if not any(path):
        bare = (proto.name or proto.output[0]).strip("/").removeprefix("node_")
        return bare.replace("/", ".") or op
    whole = ".".join(part for part in path if part)
    weighted = proto.op_type in ("Conv", "Gemm", "MatMul", "BatchNormalization")
    return whole if weighted or whole.split(".")[-1] in op else f"{whole}.{op}"


def _infer(
    network: Network,
    model: ModelProto,
    proto: NodeProto,
    types: dict[str, Any],
    place: str,
) -> dict[str, Shape | None]:
    """The shapes of what a node makes; without those that are not known before a run."""
    if proto.domain in QONNX:
        first = proto.input[0] if proto.input else ""
        if first in types:
            types[proto.output[0]] = types[first]
        return {proto.output[0]: network.shapes.get(first)}
    domain = "" if proto.domain in (*STANDARD, MICROSOFT) else proto.domain
    reads = {name for name in proto.input if name}
    if not reads.issubset(types):
        return {}
    data = {
        name: numpy_helper.from_array(network.constants[name], name)
        for name in reads
        if name in network.constants and network.constants[name].size <= SMALL
    }
    try:
        schema = get_schema(proto.op_type, network.opset, domain)
        made = inference.infer_node_outputs(
            schema,
            proto,
            {name: types[name] for name in reads},
            data,
            opset_imports=list(model.opset_import),
            ir_version=model.ir_version,
        )
    except SchemaError:
        return {}
    except (inference.InferenceError, RuntimeError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(f"{network.name}: shapes that do not fit at {place} ({first_line})") from (
            error
        )
    shapes: dict[str, Shape | None] = {}
    for name, kind in made.items():
        dims = kind.tensor_type.shape.dim
        known = kind.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims)
        if known:
            types[name] = kind
            shapes[name] = tuple(d.dim_value for d in dims)
    return shapes


def _compute(
    network: Network,
    model: ModelProto,
    proto: NodeProto,
    attributes: dict[str, Any],
    types: dict[str, Any],
    place: str,
) -> list[Array] | None:
    """The values of a node that reads constants only; None if it is none of `FOLDED`."""
    values = {name: network.constants[name] for name in proto.input if name}
    if proto.op_type == "Quant" and proto.domain in QONNX:
        return [_quantized(network, proto, attributes, place)]
    quantizes = proto.op_type in ("QuantizeLinear", "DequantizeLinear")
    standard = proto.domain in STANDARD or (quantizes and proto.domain == MICROSOFT)
    if proto.op_type not in FOLDED or not standard:
        return None
    for name, shape in _infer(network, model, proto, dict(types), place).items():
        if shape is not None and np.prod(shape, dtype=np.float64) > LARGEST_CONSTANT:
            raise ModelError(
                f"{network.name}: constant {name} of shape {list(shape)} at {place}; accepted are "
                f"{LARGEST_CONSTANT} elements"
            )
    _follow_steps(network, proto, attributes, place)
    plain = NodeProto()
    plain.CopyFrom(proto)
    plain.domain = ""
    # the evaluator has newer ones of these only, which have more types and mean the same
    opset = max(network.opset, 21) if quantizes else network.opset
    inputs = [helper.make_value_info(name, types[name]) for name in values]
    outputs = [helper.make_empty_tensor_value_info(name) for name in proto.output if name]
    alone = helper.make_model(
        helper.make_graph([plain], "constant", inputs, outputs),
        opset_imports=[helper.make_opsetid("", opset)],
    )
    try:
        found: Any = ReferenceEvaluator(alone).run(None, values)
    except Exception as error:  # whatever a damaged node makes the evaluator raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{network.name}: no constant can be computed at {place} ({first})") from (
            error
        )
    return list(found)


def _follow_steps(
    network: Network, proto: NodeProto, attributes: dict[str, Any], place: str
) -> None:
    """Keep the real of one code through what moves a dequantized constant."""
    first = proto.input[0] if proto.input else ""
    known = [name for name in proto.input if name in network.steps]
    if proto.op_type == "DequantizeLinear":
        rank = network.constants[first].ndim
        if attributes.get("block_size", 0):
            raise CompileError(
                f"{network.name}: scales for blocks at {place}; use one for each filter"
            )
        network.steps[proto.output[0]] = _along(
            network.constants[proto.input[1]], rank, attributes.get("axis", 1)
        )
    elif known:
        step = network.steps[known[0]]
        if proto.op_type == "Transpose" and step is not None:
            order = attributes.get("perm", list(range(step.ndim))[::-1])
            step = step.transpose(order) if step.ndim else step
        elif proto.op_type == "Reshape":
            step = step if step is not None and step.ndim == 0 else None
        elif proto.op_type != "Identity":
            step = None
        for name in proto.output:
            network.steps[name] = step


def _along(values: Array, rank: int, axis: int) -> Array:
    """Scales or zero points [n] of an axis, to be broadcast; one alone has no axes."""
    if values.size == 1:
        return values.reshape(()).astype(np.float64)
    if values.ndim == rank:
        return values.astype(np.float64)
    sides = [1] * rank
    sides[axis] = -1
    return values.reshape(sides).astype(np.float64)


def _quantized(network: Network, proto: NodeProto, attributes: dict[str, Any], place: str) -> Array:
    """The reals of a constant after the node Quant of QONNX; notes the real of one code."""
    value, scale, zero, bits = (network.constants[name] for name in proto.input[:4])
    low, high = quant_bounds(bits, attributes, f"{network.name}: {place}")
    codes = np.clip(np.rint(value / scale + zero), low, high) - zero
    network.steps[proto.output[0]] = scale.astype(np.float64).reshape(
        () if scale.size == 1 else scale.shape
    )
    return np.asarray(codes * scale, np.float32)


def quant_bounds(bits: Array, attributes: dict[str, Any], place: str) -> tuple[int, int]:
    """The lowest and the highest code of a Quant node of QONNX.

    Raises:
        CompileError: bits that are not one whole number from 2 to 16, or a rounding that is not
            to the nearest.
    """
    mode = str(attributes.get("rounding_mode", "ROUND"))
    if mode.upper() not in ("ROUND", "HALF_EVEN"):
        raise CompileError(f"{place}: rounding mode {mode}; accepted is ROUND")
    if np.size(bits) != 1 or not 2 <= float(np.ravel(bits)[0]) <= 16 or np.ravel(bits)[0] % 1:
        raise CompileError(f"{place}: {np.ravel(bits)[:4]} bits; accepted is one number, 2 to 16")
    count = 1 << int(np.ravel(bits)[0])
    narrow = int(bool(attributes.get("narrow", 0)))
    if attributes.get("signed", 1):
        return -count // 2 + narrow, count // 2 - 1
    return 0, count - 1 - narrow
