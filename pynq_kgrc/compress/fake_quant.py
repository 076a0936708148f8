"""Fake quantization: a quantized graph as a torch network, with straight-through gradients.

The forward pass computes docs/equations.md in floating point. With a float64 clip it gives the
codes of the compiled program bit for bit; with float32 a tie may round the other way. Ranges come
from `calibrate.py`; `train_quantized.py` trains this network.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynq_kgrc.compress.calibrate import tie
from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import (
    ACTIVATIONS,
    ADD,
    CONCAT,
    CONV,
    INPUT,
    MAX_POOL,
    ConvShape,
    Graph,
    Layer,
    WindowShape,
)
from pynq_kgrc.quant import (
    MAX_SHIFT,
    MULT_BITS,
    Array,
    QuantParams,
    WeightQuant,
    identity_code,
    weight_limit,
)


class _Straight(torch.autograd.Function):
    """Straight-through estimator: the second value forward, the gradient of the first backward."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, coded: Tensor) -> Tensor:
        return coded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight(real: Tensor, coded: Tensor) -> Tensor:
    """`coded`, with the gradient of `real`."""
    found: Tensor = _Straight.apply(real, coded)  # type: ignore[no-untyped-call]
    return found


def round_half_up(value: Tensor) -> Tensor:
    """floor(v + 1/2), with the gradient of v."""
    return straight(value, torch.floor(value.detach() + 0.5))


def as_multiplier(ratio: Tensor) -> Tensor:
    """mult * 2^-shift of `quant.multiplier`, with the gradient of the ratio; float64."""
    mantissa, exponent = torch.frexp(ratio.detach())
    places = 1 << MULT_BITS
    exact = torch.ldexp(torch.floor(mantissa * places + 0.5) / places, exponent)
    # a mantissa that rounds up to 1 is renormalised: its shift is one less
    shift = MULT_BITS - exponent - (torch.floor(mantissa * places + 0.5) == places).int()
    return straight(ratio, torch.where(shift > MAX_SHIFT, torch.zeros_like(exact), exact))


class FakeQuantNetwork(nn.Module):
    """[N, 3, D, H, W] input values to logits [N, classes], computed as the program does.

    Parameters are the weights, the biases and the scales of all formats, except the scales of the
    clip and of the result. Zero points stay as calibration chose them.

    Args:
        graph: from `choose_quant`; its weights are where training starts.

    Raises:
        CompileError: a graph without formats.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self._fused_into = _fused_adds(graph)
        ties = tie(graph)
        fixed = {graph.layers[0].name, graph.output}
        self._formats = {
            layer.name: layer.name if layer.name in fixed else ties[layer.name]
            for layer in graph.layers
        }
        first = _format(graph.layers[0])
        table = first.quantize(graph.clip.pixel_values()).astype(np.float64) - first.zero_point
        self._pixel_codes = torch.from_numpy(table)
        self.convolutions = nn.ModuleDict()
        self.log_scales = nn.ParameterDict()
        for layer in graph.layers:
            key = _key(self._formats[layer.name])
            if layer.name not in fixed and key not in self.log_scales:
                scale = torch.tensor(math.log(_format(layer).scale), dtype=torch.float64)
                self.log_scales[key] = nn.Parameter(scale)
            if layer.op == CONV:
                self.convolutions[_key(layer.name)] = CodedConvolution(layer)

    def scale(self, name: str) -> Tensor:
        """The scale of a tensor's format, float64; those of the clip and the result are fixed."""
        key = _key(self._formats[name])
        if key not in self.log_scales:
            return torch.tensor(_format(self.graph[name]).scale, dtype=torch.float64)
        return torch.exp(self.log_scales[key])

    def forward(self, clip: Tensor) -> Tensor:
        """The logits; float64 in, float64 inside."""
        last = self.codes(clip)[self.graph.output]
        return (last * self.scale(self.graph.output).to(last.dtype)).flatten(1)

    def codes(self, clip: Tensor) -> dict[str, Tensor]:
        """By name, the codes less zero point of every tensor that the program writes."""
        fused = set(self._fused_into.values())
        values: dict[str, Tensor] = {}
        for layer in self.graph.layers:
            if layer.name in fused:
                continue
            if layer.op == INPUT:
                values[layer.name] = self._encoded(clip)
            elif layer.op == CONCAT:
                parts = [self._copied(values[n], n, layer.name) for n in layer.inputs]
                values[layer.name] = torch.cat(parts, 1)
            else:
                sums = self._sums(layer, values)
                scale = self.scale(layer.name).to(sums)
                values[layer.name] = _clamp(sums, _format(layer), layer.activation, scale)
        return values

    def _encoded(self, clip: Tensor) -> Tensor:
        """Input values to codes, through the pixels they came from, as `Program.encode_clip`."""
        spec = self.graph.clip
        codes = []
        for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
            pixels = ((clip[:, channel] * std + mean) * 255).round().clamp(0, 255).long()
            codes.append(self._pixel_codes.to(clip)[channel][pixels])
        return torch.stack(codes, 1)

    def _sums(self, layer: Layer, values: dict[str, Tensor]) -> Tensor:
        """What a task computes before its clamp."""
        if layer.op == CONV:
            return self._convolved(layer, values, layer.name)
        if layer.op == ADD:
            convolution = self._fused_into.get(layer.name)
            source = layer.inputs[0] if convolution is None else convolution
            other = next((n for n in layer.inputs if n != source), source)
            ratio = as_multiplier(self.scale(other) / self.scale(layer.name))
            shortcut = round_half_up(values[other] * ratio.to(values[other].dtype))
            if convolution is None:
                return self._copied(values[source], source, layer.name) + shortcut
            return self._convolved(self.graph[convolution], values, layer.name) + shortcut
        return self._pooled(layer, values)

    def _convolved(self, layer: Layer, values: dict[str, Tensor], written: str) -> Tensor:
        """rshift((acc + bias) * mult, shift) in the format of the tensor `written`."""
        source = layer.inputs[0]
        module = self.convolutions[_key(layer.name)]
        found: Tensor = module(values[source], self.scale(source), self.scale(written))
        return found

    def _copied(self, codes: Tensor, source: str, written: str) -> Tensor:
        """The identity convolution that the compiler inserts where formats differ."""
        if self._formats[source] == self._formats[written]:
            return codes
        one = identity_code(_format(self.graph[source]).bits)
        ratio = self.scale(source) * (1 / one) / self.scale(written)
        return round_half_up(codes * one * as_multiplier(ratio).to(codes.dtype))

    def _pooled(self, layer: Layer, values: dict[str, Tensor]) -> Tensor:
        source, shape = layer.inputs[0], layer.shape
        assert shape is not None
        average = layer.op != MAX_POOL
        codes = _padded(values[source], shape, 0.0 if average else -math.inf)
        same = self._formats[source] == self._formats[layer.name]
        if not average:
            pooled = F.max_pool3d(codes, shape.kernel, shape.stride)
            if same:
                return pooled
            ratio = self.scale(source) / self.scale(layer.name)
        else:
            pooled = F.avg_pool3d(codes, shape.kernel, shape.stride, divisor_override=1)
            ratio = self.scale(source) / self.scale(layer.name) / shape.taps
        return round_half_up(pooled * as_multiplier(ratio).to(pooled.dtype))

    def to_graph(self) -> Graph:
        """The graph with the weights and formats as they are now, ready for `lower`."""
        with torch.no_grad():
            layers = []
            for layer in self.graph.layers:
                quant = replace(_format(layer), scale=float(self.scale(layer.name)))
                changed = replace(layer, out_quant=quant)
                if layer.op == CONV:
                    changed = self.convolutions[_key(layer.name)].fill(changed)  # type: ignore[operator]
                layers.append(changed)
        return replace(self.graph, layers=tuple(layers))


class CodedConvolution(nn.Module):
    """A convolution of codes with its own weight, bias and scales of filters."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        weight, bias, quant = layer.weight, layer.bias, layer.weight_quant
        if weight is None or bias is None or quant is None:
            raise CompileError(f"{layer.name} has no format of codes; run choose_quant first")
        assert isinstance(layer.shape, ConvShape)
        self._shape, self._limit = layer.shape, weight_limit(quant.bits)
        self.weight = nn.Parameter(torch.from_numpy(np.array(weight, np.float32)))
        self.bias = nn.Parameter(torch.from_numpy(np.array(bias, np.float32)))
        scale = np.maximum(np.asarray(quant.scale, np.float64), 1e-30)
        self.log_scale = nn.Parameter(torch.from_numpy(np.log(scale)))
        self._bits = quant.bits
        self.frozen: Tensor | None = None
        """Bool, like the weight: True where it no longer changes."""
        self._frozen_weight: Tensor | None = None

    def scale(self) -> Tensor:
        """[M] float64: the real value of one step of the codes, for each filter."""
        return torch.exp(self.log_scale)

    def fix_scale(self, scale: Array) -> None:
        """Set the scale of each filter [M]; it is no longer trained."""
        with torch.no_grad():
            self.log_scale.copy_(torch.from_numpy(np.log(scale)))
        self.log_scale.requires_grad_(False)

    def freeze(self, where: Array, weight: Array) -> None:
        """Set the weight to `weight` where `where` is true; it is no longer trained there."""
        device = self.weight.device
        self.frozen = torch.from_numpy(where).to(device)
        self._frozen_weight = torch.from_numpy(weight).to(device, self.weight.dtype)
        with torch.no_grad():
            self.weight.copy_(self._real())

    def _real(self) -> Tensor:
        if self.frozen is None or self._frozen_weight is None:
            return self.weight
        return torch.where(self.frozen, self._frozen_weight, self.weight)

    def coded(self) -> Tensor:
        """[M, N, kd, kh, kw] codes, float64; zeros stay zeros."""
        real = self._real().double() / self.scale().view(-1, 1, 1, 1, 1)
        return round_half_up(real).clamp(-self._limit, self._limit)

    def forward(self, codes: Tensor, source: Tensor, written: Tensor) -> Tensor:
        """Codes before the shortcut and the clamp; `source`, `written`: scales of the formats."""
        scale = self.scale()
        bias = round_half_up(self.bias.double() / (source * scale))
        sums = F.conv3d(
            _padded(codes, self._shape, 0.0),
            self.coded().to(codes.dtype),
            bias.to(codes.dtype),
            self._shape.stride,
        )
        ratio = as_multiplier(source * scale / written).to(codes.dtype)
        return round_half_up(sums * ratio.view(1, -1, 1, 1, 1))

    def fill(self, layer: Layer) -> Layer:
        """The layer with this weight, bias and scale."""
        return replace(
            layer,
            weight=np.ascontiguousarray(self._real().numpy(), np.float32),
            bias=self.bias.double().numpy(),
            weight_quant=WeightQuant(self._bits, self.scale().numpy()),
        )


def _key(name: str) -> str:
    """A layer's name as a key of torch's dictionaries, which allow no dots."""
    return name.replace(".", "/")


def _format(layer: Layer) -> QuantParams:
    if layer.out_quant is None:
        raise CompileError(f"{layer.name} has no format of codes; run choose_quant first")
    return layer.out_quant


def _clamp(sums: Tensor, quant: QuantParams, activation: str, scale: Tensor) -> Tensor:
    """Clamp codes less their zero point to the type and the activation (`lower.clamp_codes`)."""
    low, high = ACTIVATIONS[activation]
    least, most = quant.min - quant.zero_point, quant.max - quant.zero_point
    if high is not None:
        sums = torch.minimum(sums, round_half_up(high / scale))
    if low == 0:
        least = 0  # at every scale: no gradient of the scale
    elif low is not None:
        sums = torch.maximum(sums, round_half_up(low / scale))
    return sums.clamp(least, most)


def _padded(codes: Tensor, shape: WindowShape, fill: float) -> Tensor:
    """The map with its padding; a code less its zero point is 0 there."""
    widths = [w for axis in (2, 1, 0) for w in (shape.pad_before[axis], shape.pad_after[axis])]
    return F.pad(codes, widths, value=fill) if any(widths) else codes


def _fused_adds(graph: Graph) -> dict[str, str]:
    """For each add, the convolution that it is fused with in one task, as `lower.fuse` chooses."""
    order = {layer.name: i for i, layer in enumerate(graph.layers)}
    fused = {}
    for layer in graph.layers:
        if layer.op != ADD or layer.inputs[0] == layer.inputs[1]:
            continue
        last = graph[max(layer.inputs, key=order.__getitem__)]
        alone = len(graph.consumers(last.name)) == 1 and last.name != graph.output
        if last.op == CONV and last.activation == "none" and alone:
            fused[layer.name] = last.name
    return fused
