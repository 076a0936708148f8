"""Random ONNX graphs, one for each seed: what exporters write, and what none of them would."""

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper, shape_inference

OPSETS = (11, 13, 17, 18, 21, 23)


class RandomGraph:
    """Up to nine random nodes over one clip, then a head; `model` is the file."""

    def __init__(self, seed: int, quantized: bool = False) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = int(self.rng.choice(OPSETS[1:] if quantized else OPSETS))
        self.quantized = quantized
        self.axes = int(self.rng.choice([2, 3, 3]))
        sides = [int(n) for n in self.rng.integers(4, 11, self.axes)]
        self.shape = (1, 3, *sides)
        self.nodes: list = []
        self.constants: dict[str, np.ndarray] = {}
        self.count = 0
        clip = helper.make_tensor_value_info("clip", TensorProto.FLOAT, self.shape)
        self.inputs = [clip]
        values = [self.coded("clip", 1.0)]
        for _ in range(int(self.rng.integers(1, 10))):
            source = values[-1] if self.rng.random() < 0.7 else str(self.rng.choice(values))
            made = self.step(source, values)
            if self.known(made):
                values.append(self.coded(made))
            else:
                self.nodes.pop()
        kept = list(self.nodes)
        last = self.head(values[-1])
        if not self.known(last):  # a head that does not fit
            self.nodes = kept
            last = self.node("Relu", values[-1])
        self.model = self.proto(last, self.known(last))

    def proto(self, last: str, shape: tuple[int, ...] | None = None) -> ModelProto:
        output = helper.make_tensor_value_info(last, TensorProto.FLOAT, shape)
        held = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "random", self.inputs, [output], held)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    def known(self, name: str) -> tuple[int, ...] | None:
        """The shape of a value, if the graph up to it is one."""
        try:
            found = shape_inference.infer_shapes(self.proto(name), strict_mode=True, data_prop=True)
        except shape_inference.InferenceError:
            return None
        dims = found.graph.output[0].type.tensor_type.shape.dim
        shape = tuple(d.dim_value for d in dims)
        return shape if shape and min(shape) > 0 else None

    def constant(self, value, kind=np.float32) -> str:
        """A constant, as an initializer or as a node."""
        self.count += 1
        name = f"constant_{self.count}"
        array = np.asarray(value, kind)
        if self.rng.random() < 0.2:
            tensor = numpy_helper.from_array(array, name)
            self.nodes.insert(0, helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.constants[name] = array
        return name

    def node(self, op: str, *inputs: str, **attributes) -> str:
        self.count += 1
        name = f"{op.lower()}_{self.count}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def some(self, *choices):
        return choices[int(self.rng.integers(len(choices)))]

    def step(self, source: str, values: list[str]) -> str:
        shape = self.known(source) or self.shape
        images = len(shape) == self.axes + 2
        kinds = ["relu", "clip", "identity", "add", "mul", "sigmoid", "transpose", "reshape"]
        if images:
            kinds = ["conv"] * 5 + ["pool"] * 4 + ["norm", "mean", "pad", "pad", "concat"]
            kinds += ["relu", "relu", "clip", "identity", "add", "add", "mul", "global"]
            kinds += self.some([], [], ["sigmoid", "transpose", "reshape"])
        if self.quantized:  # `quantized_onnx.compare` reads maps in the file's order
            kinds = [kind for kind in kinds if kind != "transpose"]
        kind = self.some(*kinds)
        return (
            self.globally(source)
            if kind == "global"
            else getattr(self, kind)(source, shape, values)
        )

    def window(self, sides, kernel) -> dict:
        """Strides and padding, of the pads or of auto_pad."""
        rng, axes = self.rng, self.axes
        given = {"strides": [int(n) for n in rng.choice([1, 1, 2, 3], axes)]}
        case = rng.random()
        if case < 0.15:
            given["auto_pad"] = self.some("SAME_UPPER", "SAME_LOWER", "VALID")
        elif case < 0.7:
            given["pads"] = [int(rng.integers(0, k // 2 + 1)) for k in (*kernel, *kernel)]
        return given

    def conv(self, source, shape, values):
        rng, channels = self.rng, shape[1]
        groups = self.some(1, 1, 1, channels, 2 if channels % 2 == 0 else 1)
        filters = groups * int(rng.integers(1, 7))
        kernel = [min(int(rng.choice([1, 2, 3, 5])), side) for side in shape[2:]]
        weight = rng.normal(0, 0.5, (filters, channels // groups, *kernel)).astype(np.float32)
        given = self.window(shape[2:], kernel)
        if rng.random() < 0.2 and "auto_pad" not in given:
            given["dilations"] = [int(n) for n in rng.choice([1, 2], self.axes)]
        if rng.random() < 0.5:
            given["kernel_shape"] = kernel
        held = self.coded_weight(weight) if self.quantized else self.constant(weight)
        if rng.random() < 0.1 and not self.quantized:
            held = self.before_all(held)
        inputs = [source, held]
        if rng.random() < 0.6:
            inputs.append(self.constant(rng.normal(0, 0.5, filters)))
        return self.node("Conv", *inputs, group=groups, **given)

    def before_all(self, held: str) -> str:
        """A weight that is computed from two constants."""
        factor = self.constant(self.rng.uniform(0.5, 2, 1))
        self.count += 1
        name = f"computed_{self.count}"
        at = sum(node.op_type == "Constant" for node in self.nodes)
        self.nodes.insert(at, helper.make_node("Mul", [held, factor], [name]))
        return name

    def coded(self, value: str, share: float = 0.85) -> str:
        """Most values of a quantized graph after a quantizer and its inverse, of some format."""
        rng = self.rng
        if not self.quantized or rng.random() > share:
            return value
        kind = self.some(np.int8, np.uint8, np.uint8)
        low, high = np.iinfo(kind).min, np.iinfo(kind).max
        zero = int(self.some(low, 0, rng.integers(low, high), low + 128))
        scale = self.constant(rng.uniform(0.01, 0.06))
        point = self.constant(zero, kind)
        codes = self.node("QuantizeLinear", value, scale, point)
        if rng.random() < 0.2 and value != "clip":
            ends = (
                self.constant(max(zero - 40, low), kind),
                self.constant(min(zero + 90, high), kind),
            )
            codes = self.node("Clip", codes, *ends)
        return self.node("DequantizeLinear", codes, scale, point)

    def coded_weight(self, weight) -> str:
        """A weight [M, ...] as int8 codes with one scale or one for each filter."""
        filters = len(weight)
        each = self.rng.random() < 0.7
        scale = np.abs(weight.reshape(filters, -1)).max(axis=1) / 127
        scale = (scale if each else scale.max()).astype(np.float32)
        spread = scale.reshape(-1, *[1] * (weight.ndim - 1))
        held = self.constant(np.rint(weight / spread), np.int8)
        zeros = self.constant(np.zeros_like(scale), np.int8)
        return self.node("DequantizeLinear", held, self.constant(scale), zeros, axis=0)

    def pool(self, source, shape, values):
        kernel = [min(int(self.rng.choice([1, 2, 3])), side) for side in shape[2:]]
        given = self.window(shape[2:], kernel)
        op = self.some("MaxPool", "AveragePool")
        if op == "AveragePool":
            given["count_include_pad"] = self.some(0, 1, 1)
        if self.rng.random() < 0.3 and "auto_pad" not in given:
            given["ceil_mode"] = 1
        return self.node(op, source, kernel_shape=kernel, **given)

    def norm(self, source, shape, values):
        rng, channels = self.rng, shape[1]
        held = [
            self.constant(rng.normal(1, 0.5, channels)),
            self.constant(rng.normal(size=channels)),
        ]
        held += [
            self.constant(rng.normal(size=channels)),
            self.constant(rng.uniform(0.2, 2, channels)),
        ]
        return self.node("BatchNormalization", source, *held, epsilon=1e-3)

    def mean(self, source, shape, values):
        axes = sorted({int(n) for n in self.rng.integers(2, len(shape), 2)})
        if self.rng.random() < 0.5:
            axes = list(range(2, len(shape)))
        if self.rng.random() < 0.5:
            axes = [axis - len(shape) for axis in axes]
        keep = self.some(0, 1)
        if self.opset < 18:
            return self.node("ReduceMean", source, axes=axes, keepdims=keep)
        return self.node("ReduceMean", source, self.constant(axes, np.int64), keepdims=keep)

    def pad(self, source, shape, values):
        rng = self.rng
        ends = [0, 0, *(int(n) for n in rng.integers(0, 3, self.axes))]
        ends += [0, 0, *(int(n) for n in rng.integers(0, 3, self.axes))]
        mode = self.some("constant", "constant", "constant", "reflect", "edge")
        inputs = [source, self.constant(ends, np.int64)]
        if mode == "constant" and rng.random() < 0.5:
            inputs.append(self.constant(self.some(0.0, 0.0, 1.0, -1.0, np.finfo(np.float32).min)))
        return self.node("Pad", *inputs, mode=mode)

    def concat(self, source, shape, values):
        alike = [v for v in values if (s := self.known(v)) and s[2:] == shape[2:]] or [source]
        axis = self.some(1, 1, 1, -len(shape) + 1, 2)
        return self.node("Concat", source, str(self.rng.choice(alike)), axis=axis)

    def relu(self, source, shape, values):
        return self.node("Relu", source)

    def clip(self, source, shape, values):
        low, high = self.some((0.0, 6.0), (0.0, 6.0), (0.0, None), (-1.0, 1.0), (None, None))
        inputs = [source, "" if low is None else self.constant(low)]
        return self.node("Clip", *inputs, *([] if high is None else [self.constant(high)]))

    def identity(self, source, shape, values):
        return self.node(self.some("Identity", "Dropout"), source)

    def add(self, source, shape, values):
        alike = [value for value in values if self.known(value) == shape]
        if self.rng.random() < 0.7 and alike:
            return self.node("Add", source, str(self.rng.choice(alike)))
        return self.by_constant("Add", source, shape)

    def mul(self, source, shape, values):
        return self.by_constant(self.some("Mul", "Sub", "Div"), source, shape)

    def by_constant(self, op, source, shape):
        each = (shape[1], *[1] * (len(shape) - 2))
        sides = self.some((), (1,), each, (1, *each), shape[-1:], shape)
        held = self.constant(self.rng.uniform(0.5, 2, sides))
        pair = (source, held) if self.rng.random() < 0.8 else (held, source)
        return self.node(op, *pair)

    def sigmoid(self, source, shape, values):
        return self.node(self.some("Sigmoid", "HardSwish", "Softmax", "Erf", "Exp"), source)

    def transpose(self, source, shape, values):
        return self.node(
            "Transpose", source, perm=[int(n) for n in self.rng.permutation(len(shape))]
        )

    def reshape(self, source, shape, values):
        case = int(self.rng.integers(4))
        if case == 0:
            return self.node("Flatten", source, axis=self.some(0, 1, 1, 2))
        if case == 1:
            return self.node(
                "Reshape", source, self.constant(self.some([0, -1], [1, -1, 2]), np.int64)
            )
        axes = [self.some(0, 1, len(shape) - 1)]
        if self.opset < 13:
            return self.node("Unsqueeze", source, axes=axes)
        return self.node("Unsqueeze", source, self.constant(axes, np.int64))

    def globally(self, source):
        return self.node(self.some("GlobalAveragePool", "GlobalMaxPool"), source)

    def head(self, source: str) -> str:
        """A linear over what is left, in one of the ways in which it is written."""
        rng = self.rng
        shape = self.known(source) or self.shape
        if len(shape) == self.axes + 2 and rng.random() < 0.5:
            source = self.globally(source)
            shape = self.known(source)
        if rng.random() < 0.15:
            return source if source != "clip" else self.node("Relu", source)
        if len(shape) != 2 and rng.random() < 0.4:  # x.view(x.size(0), -1)
            first = self.node("Gather", self.node("Shape", source), self.constant(0, np.int64))
            axes = self.constant([0], np.int64)
            alone = (
                self.node("Unsqueeze", first, axes=[0])
                if self.opset < 13
                else self.node("Unsqueeze", first, axes)
            )
            whole = self.node("Concat", alone, self.constant([-1], np.int64), axis=0)
            source = self.node("Reshape", source, whole)
        elif len(shape) != 2:
            source = self.node("Flatten", source)
        features, classes = int(np.prod(shape[1:])), int(rng.integers(2, 6))
        weight = rng.normal(0, 0.3, (features, classes))
        bias = self.constant(rng.normal(size=self.some((classes,), (1, classes), (1,), ())))
        if rng.random() < 0.4:
            return self.node("Add", self.node("MatMul", source, self.constant(weight)), bias)
        turned = self.some(0, 1)
        if self.quantized:
            held = self.coded_weight(np.ascontiguousarray(weight.T))
            return self.node("Gemm", source, held, bias, transB=1)
        held = self.constant(weight.T if turned else weight)
        given = {"alpha": 0.5, "beta": 2.0} if rng.random() < 0.3 else {}
        return self.node("Gemm", source, held, bias, transB=turned, **given)
