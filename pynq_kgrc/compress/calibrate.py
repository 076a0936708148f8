"""Post-training quantization: choose a format for each tensor from a few real clips.

`train_quantized.py` may train further from there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from pynq_kgrc.accelerator.cutting import cut_pools
from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import (
    ADD,
    CONCAT,
    CONV,
    INPUT,
    MAX_POOL,
    CodeRange,
    Graph,
    Layer,
    activate,
    moves_only,
    run_float,
)
from pynq_kgrc.quant import (
    ACCUMULATOR_BITS,
    BITS,
    Array,
    QuantParams,
    WeightQuant,
    choose_params,
    weight_limit,
)

Range = tuple[float, float]
"""The lowest and the highest real."""

METHODS = ("minmax", "percentile", "mse")
DEFAULT_METHOD = "mse"
"""The three methods are level on I3D (docs/accuracy.md); this has the best worst case."""

HEADROOM = 4.0
"""The logits may be this many times larger than in calibration; 16 bits leave room for it."""

LEAST_STEPS = {16: 24, 8: 24, 4: 4}
"""By bits, the fewest steps in which a part of a concat is coded without a warning. With 24 steps,
uniformly distributed values have a signal to noise of 28 dB."""

LEAST_SHARE = 2.0**-14
"""The least range of a tensor, as a share of what its layer could compute at most. With more, the
bias of a layer that reads a tensor of zeros would be coded too coarsely."""

LARGEST_RATIO = 2.0**14
"""The largest ratio of scales; a multiplier has to be below 2^15 (`quant.multiplier`)."""

SAMPLES_PER_CLIP = 1 << 15
PERCENTILE = 99.99
SHRINKS = np.linspace(1.0, 0.1, 37)
"""Fractions of the full range that the search for the least MSE tries."""


@dataclass
class Observed:
    """Range and samples of one tensor in calibration."""

    low: float
    high: float
    samples: list[Array]


def observe(graph: Graph, clips: Iterable[Array]) -> dict[str, Observed]:
    """Run clips [3, D, H, W] through the float graph and record each tensor's range and samples.

    Raises:
        CompileError: no clip was given, or a tensor is not finite.
    """
    seen: dict[str, Observed] = {}

    def watch(layer: Layer, values: Array) -> None:
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low + high):
            raise CompileError(f"{layer.name}: its output is not finite; check the weights")
        flat = values.reshape(-1)
        sample = flat[:: max(1, flat.size // SAMPLES_PER_CLIP)].copy()
        known = seen.setdefault(layer.name, Observed(low, high, []))
        known.low, known.high = min(low, known.low), max(high, known.high)
        known.samples.append(sample)

    for clip in clips:
        run_float(graph, clip, watch)
    if not seen:
        raise CompileError("calibration needs at least one clip; a handful of real ones is best")
    return seen


def choose_range(observed: list[Observed], bits: int, method: str) -> Range:
    """The range of reals that the codes of tensors with a common format cover.

    "minmax" covers the observed range, "percentile" cuts 0.01 % of the samples at each end, "mse"
    shrinks the range until the mean squared error of rounding and clipping is least.
    """
    low = min(0.0, *(seen.low for seen in observed))
    high = max(0.0, *(seen.high for seen in observed))
    if method == "minmax" or bits == 16:
        return low, high
    samples = np.concatenate([sample for seen in observed for sample in seen.samples])
    if method == "percentile":
        cut = np.percentile(samples, [100 - PERCENTILE, PERCENTILE])
        return max(low, float(min(cut[0], 0))), min(high, float(max(cut[1], 0)))
    errors = []
    for shrink in SHRINKS:
        params = choose_params(low * shrink, high * shrink, bits)
        errors.append(np.mean((params.dequantize(params.quantize(samples)) - samples) ** 2))
    best = float(SHRINKS[int(np.argmin(errors))])
    return low * best, high * best


def choose_weight_scale(weight: Array, bits: int, method: str) -> Array:
    """Scale of each filter [M] of a weight [M, ...]; "mse" at 4 bits shrinks the range if better.

    A filter of zeros gets scale 0; the caller has to replace it.
    """
    limit = weight_limit(bits)
    flat = weight.reshape(weight.shape[0], -1).astype(np.float64)
    full: Array = np.abs(flat).max(axis=1)
    if method != "mse" or bits != 4:  # at 8 bits shrinking gains next to nothing
        return np.asarray(full / limit)
    best: Array = full / limit
    least = np.full(full.shape, np.inf)
    for shrink in SHRINKS:
        scale = np.where(full > 0, full * shrink / limit, 1.0)[:, None]
        codes = np.clip(np.floor(flat / scale + 0.5), -limit, limit)
        error = ((codes * scale - flat) ** 2).sum(axis=1)
        better = error < least
        best, least = np.where(better, full * shrink / limit, best), np.minimum(error, least)
    return best


def tie(graph: Graph) -> dict[str, str]:
    """For each tensor the tensor whose format it shares.

    The parts of a concat are in one buffer and share a format. Input and output of a max pool
    share one too: the pool then selects codes, which is exact. So do those of a convolution that
    only moves elements.
    """
    parent = {layer.name: layer.name for layer in graph.layers}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for layer in graph.layers:
        if layer.op in (CONCAT, MAX_POOL) or moves_only(layer):
            for name in layer.inputs:
                parent[root(name)] = root(layer.name)
    return {name: root(name) for name in parent}


def widen_narrow_ranges(graph: Graph, ranges: dict[str, Range]) -> dict[str, Range]:
    """Ranges in which none is zero, or next to zero, beside what its layer could compute.

    A scale that is far smaller than those of the layer's input and weight would need a multiplier
    that the accelerator does not have. So a range has at least `LEAST_SHARE` of the largest
    magnitude that the layer could compute: for each filter the sum of |weights| times the largest
    input, plus |bias|.

    Args:
        graph: with the layers that compute the tensors.
        ranges: the lowest and highest real of each format, by the tensor that `tie` names it by.
    """
    ties, widened = tie(graph), dict(ranges)
    for layer in (*graph.layers, *graph.layers):  # twice: a later layer may share the format
        if layer.op == INPUT:
            continue
        inputs = [_largest(widened[ties[name]]) for name in layer.inputs]
        bound = sum(inputs) if layer.op == ADD else max(inputs)
        if layer.op == CONV:
            assert layer.weight is not None and layer.bias is not None
            sums = np.abs(layer.weight).sum(axis=(1, 2, 3, 4), dtype=np.float64)
            bound = float((sums * bound + np.abs(layer.bias)).max())
        low, high = widened[ties[layer.name]]
        found = _largest((low, high))
        least = bound * LEAST_SHARE or 1.0
        if found < least:
            ends = np.array([low / found, high / found]) if found else np.array([-1.0, 1.0])
            low, high = activate(ends * least, layer.activation).tolist()
            widened[ties[layer.name]] = low, high
    return widened


def warn_of_small_parts(concat: Layer, seen: dict[str, Range], ends: Range, bits: int) -> None:
    """Warn of parts of a concat that have next to no resolution in the format of all parts."""
    scale = choose_params(*ends, bits).scale
    for name in concat.inputs:
        low, high = min(seen[name][0], 0.0), max(seen[name][1], 0.0)
        steps = (high - low) / scale
        if 0 < steps < LEAST_STEPS[bits]:
            loss = 20 * math.log10((ends[1] - ends[0]) / (high - low))
            warnings.warn(
                f"{concat.name}: its part {name} lies within {low:.3g} to {high:.3g}, but the "
                f"parts of a concat share one format, here for {ends[0]:.3g} to {ends[1]:.3g}: "
                f"{name} is coded in {steps:.1f} of {(1 << bits) - 1} steps, {loss:.0f} dB less "
                f"than alone; multiply its filters and divide the weights that read it by the "
                f"same number, or use more bits",
                stacklevel=4,
            )


def _largest(ends: Range) -> float:
    return max(-ends[0], ends[1])


class Ranges(msgspec.Struct, frozen=True):
    """What calibration found: enough to quantize the same network again without a clip."""

    bits: int
    method: str
    observed: dict[str, Range]
    """Lowest and highest real of every tensor."""
    chosen: dict[str, Range]
    """The range that each format covers, by the tensor that `tie` names it by."""


def choose_quant(
    graph: Graph,
    clips: Iterable[Array],
    bits: int,
    method: str = DEFAULT_METHOD,
) -> Graph:
    """The graph with a format for every tensor and weight: `choose_ranges`, then `apply_ranges`.

    Args:
        graph: traced network.
        clips: normalised clips [3, D, H, W]; a few real ones.
        bits: 16, 8 or 4.
        method: "minmax", "percentile" or "mse".

    Warns:
        UserWarning: a part of a concat has next to no resolution beside the others.

    Raises:
        CompileError: unknown width or method, no clip, values that are not finite.
    """
    return apply_ranges(graph, choose_ranges(graph, clips, bits, method))


def choose_ranges(
    graph: Graph, clips: Iterable[Array], bits: int, method: str = DEFAULT_METHOD
) -> Ranges:
    """The ranges of all tensors, from the float network on some clips; as for `choose_quant`.

    Raises:
        CompileError: unknown width or method, no clip, values that are not finite.
    """
    if bits not in BITS or method not in METHODS:
        raise CompileError(f"bits={bits}, method={method!r}; accepted are {BITS} and {METHODS}")
    graph = cut_pools(graph)
    seen = observe(graph, clips)
    groups: dict[str, list[Observed]] = {}
    for name, root in tie(graph).items():
        groups.setdefault(root, []).append(seen[name])
    chosen = {root: choose_range(observed, bits, method) for root, observed in groups.items()}
    return Ranges(bits, method, {name: (x.low, x.high) for name, x in seen.items()}, chosen)


def apply_ranges(graph: Graph, found: Ranges) -> Graph:
    """The graph with a format for every tensor and weight, from ranges that were chosen before.

    Formats that the graph has already, those of a quantized ONNX file, are kept (`own_formats`).
    Activations are affine and per tensor, weights symmetric and per filter. The logits have 16
    bits: soft-max needs their resolution, and only the host reads them. Only a concat as the result
    keeps the bits of its parts. A pool with more taps than
    the accelerator has becomes several pools (`cutting.cut_pools`).

    Warns:
        UserWarning: a part of a concat has next to no resolution beside the others; some tensors of
            a graph with formats of its own have none.

    Raises:
        CompileError: the ranges are those of another network; formats of the graph's own that do
            not fit the bits.
    """
    graph = cut_pools(graph)
    bits, method, chosen, seen = found.bits, found.method, found.chosen, found.observed
    table = graph.clip.pixel_values()  # the input's range is known, whatever the clips contain
    pixels = float(table.min()), float(table.max())
    ties = tie(graph)
    if set(seen) != set(ties) or set(chosen) != set(ties.values()):
        odd = sorted(set(seen) ^ set(ties)) or sorted(set(chosen) ^ set(ties.values()))
        raise CompileError(
            f"{graph.name}: the ranges are of another network; only one of both has {odd[0]}"
        )
    # what shares the input's format, such as another part of a concat, may have a larger range
    clip, low, high = graph.layers[0].name, *pixels
    if sum(root == ties[clip] for root in ties.values()) > 1:
        low, high = min(low, chosen[ties[clip]][0]), max(high, chosen[ties[clip]][1])
    ranges = widen_narrow_ranges(graph, {**chosen, ties[clip]: (low, high)})
    pooled = any(layer.op == MAX_POOL and clip in layer.inputs for layer in graph.layers)
    formats = {root: choose_params(*ends, bits) for root, ends in ranges.items()}
    last = seen[graph.output]
    if last == (0, 0):
        last = ranges[ties[graph.output]]
    own = own_formats(graph, bits)
    warn_of_missing_formats(graph, own)
    layers: dict[str, Layer] = {}
    for layer in graph.layers:
        quant = formats[ties[layer.name]]
        if layer.name in own:
            quant, limits = own[layer.name]
            layers[layer.name] = replace(layer, out_quant=quant, code_range=limits)
            continue
        if layer.name == graph.output and layer.op != CONCAT:  # a concat copies its parts' codes
            quant = choose_params(last[0] * HEADROOM, last[1] * HEADROOM, 16)
            least = _largest_step(layer, layers, method) / LARGEST_RATIO
            quant = replace(quant, scale=max(quant.scale, least))
        elif layer.op == INPUT and not pooled:  # a copy into a concat changes the format
            quant = choose_params(*pixels, bits)
        layers[layer.name] = replace(layer, out_quant=quant)
    for layer in graph.layers:
        if layer.op == CONCAT and layer.name not in own:
            warn_of_small_parts(layer, seen, ranges[ties[layer.name]], bits)
    quantized = replace(graph, layers=tuple(layers.values()))
    return replace(
        quantized,
        layers=tuple(
            _with_weight_format(quantized, layer, bits, method) if layer.op == CONV else layer
            for layer in quantized.layers
        ),
    )


def own_formats(graph: Graph, bits: int) -> dict[str, tuple[QuantParams, CodeRange]]:
    """The formats and ranges of codes that a graph has of its own, for a design of some bits.

    A max pool without one has that of its input, because it selects codes. What a max pool or a
    concat alone reads has that of the pool or the concat.

    Raises:
        CompileError: a tensor has more codes than the design, or a zero point that is none.
    """
    found = {
        layer.name: _fitted(layer.name, layer.out_quant, layer.code_range, bits)
        for layer in graph.layers
        if layer.out_quant is not None and layer.code_range is not None
    }
    if not found:
        return found
    for layer in reversed(graph.layers):
        if layer.name not in found or layer.op not in (MAX_POOL, CONCAT):
            continue
        for name in layer.inputs:
            if len(graph.consumers(name)) == 1 and graph[name].op != INPUT:
                found.setdefault(name, found[layer.name])
    for layer in graph.layers:
        formats = {found.get(name) for name in layer.inputs}
        if layer.op in (MAX_POOL, CONCAT) and len(formats) == 1 and None not in formats:
            found.setdefault(layer.name, found[layer.inputs[0]])
    clip = graph.layers[0]
    if clip.name in found:
        _check_pixels(graph, *found[clip.name])
    return found


def _fitted(
    name: str, quant: QuantParams, limits: CodeRange, bits: int
) -> tuple[QuantParams, CodeRange]:
    """A format of fewer or equal bits as one of a design; at 16 bits the zero point becomes 0."""
    shift = quant.zero_point if bits == 16 else 0
    low, high = limits[0] - shift, limits[1] - shift
    fitted = QuantParams(bits, quant.scale, quant.zero_point - shift)
    if low < fitted.min or high > fitted.max or not fitted.min <= fitted.zero_point <= fitted.max:
        cure = "quantize it symmetric, with a zero point of 0" if shift else "use more bits"
        zero = " with zero point 0" if bits == 16 else ""
        raise CompileError(
            f"{name}: the network codes it as {limits[0]} to {limits[1]} with zero point "
            f"{quant.zero_point}, a design of {bits} bits has {fitted.min} to {fitted.max}{zero}; "
            f"{cure}"
        )
    return fitted, (low, high)


def _check_pixels(graph: Graph, quant: QuantParams, limits: CodeRange) -> None:
    """Refuse codes of the clip that are narrower than the pixels' values: the host clamps none."""
    table = graph.clip.pixel_values()
    codes = quant.quantize(np.array([table.min(), table.max()]))
    if codes[0] < limits[0] or codes[1] > limits[1]:
        raise CompileError(
            f"{graph.layers[0].name}: the network limits its input to codes {limits[0]} to "
            f"{limits[1]}, and pixels are coded as {codes[0]} to {codes[1]}; use a design of as "
            f"many bits as the input has, or a scale that covers all pixels"
        )


def own_weight_format(layer: Layer, bits: int) -> WeightQuant:
    """The format that the network has for a weight, for a design of some bits.

    Raises:
        CompileError: codes that the design does not have.
    """
    assert layer.weight is not None and layer.weight_quant is not None
    scale = layer.weight_quant.scale
    codes = layer.weight.reshape(layer.channels, -1) / scale[:, None]
    limit = weight_limit(bits)
    low, high = float(np.rint(codes).min()), float(np.rint(codes).max())
    if low < -limit or high > limit:
        raise CompileError(
            f"{layer.name}: its weight has codes from {low:g} to {high:g}, "
            f"a design of {bits} bits has -{limit} to {limit}; quantize weights with a narrow "
            f"range, symmetric, or use a design of more bits"
        )
    return WeightQuant(bits, scale)


def warn_of_missing_formats(graph: Graph, own: dict[str, tuple[QuantParams, CodeRange]]) -> None:
    """Warn of tensors and weights without a format in a graph that has some of its own."""
    if not own:
        return
    missing = [
        layer.name
        for layer in graph.layers
        if layer.name not in own
        and layer.name != graph.output
        and not (layer.op == CONV and [x.op for x in graph.consumers(layer.name)] == [ADD])
    ]
    weights = [
        layer.name
        for layer in graph.convolutions()
        if layer.weight_quant is None
        and layer.weight is not None
        and np.count_nonzero(layer.weight.reshape(layer.channels, -1), axis=1).max() > 1
    ]  # a single weight has the code of its own scale, whatever it is
    if weights:
        more = f" and {len(weights) - 4} more" if len(weights) > 4 else ""
        warnings.warn(
            f"{graph.name} is quantized, but the weights of {', '.join(weights[:4])}{more} are "
            f"not; their codes are chosen here",
            stacklevel=4,
        )
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        warnings.warn(
            f"{graph.name} is quantized, but {len(missing)} of its {len(graph.layers)} tensors "
            f"have no format of their own: {', '.join(missing[:4])}{more}; theirs are chosen from "
            f"the clips",
            stacklevel=4,
        )


def _largest_step(layer: Layer, before: dict[str, Layer], method: str) -> float:
    """The largest real of one code, among those that the sums of a layer are counted in.

    A result with 16 bits on a design of 4 bits could otherwise have a scale that is too small for
    the multiplier.
    """
    steps = []
    for name in layer.inputs:
        source = before[name]
        assert source.out_quant is not None
        steps.append(source.out_quant.scale)
        if layer.op == ADD and source.op == CONV:  # it may be fused
            steps.append(_largest_step(source, before, method))
    if layer.op == CONV:
        assert layer.weight is not None
        source = before[layer.inputs[0]]
        assert source.out_quant is not None
        bits = source.out_quant.bits
        steps = [steps[0] * float(choose_weight_scale(layer.weight, bits, method).max())]
    return max(steps)


def _with_weight_format(graph: Graph, layer: Layer, bits: int, method: str) -> Layer:
    """The layer with scales of its weight, large enough for bias and multiplier to fit."""
    assert layer.weight is not None
    assert layer.bias is not None
    source, out = graph[layer.inputs[0]].out_quant, _written_format(graph, layer)
    assert source is not None
    if layer.weight_quant is not None:
        return replace(layer, weight_quant=own_weight_format(layer, bits))
    scale = choose_weight_scale(layer.weight, bits, method)
    room = float(1 << (ACCUMULATOR_BITS[bits] - 3))
    floor = np.maximum(np.abs(layer.bias) / (source.scale * room), out.scale / source.scale / 2**20)
    return replace(layer, weight_quant=WeightQuant(bits, np.maximum(scale, floor)))


def _written_format(graph: Graph, layer: Layer) -> QuantParams:
    """The format that the task writes: that of the add which is fused into it, if there is one."""
    readers = graph.consumers(layer.name)
    writer = readers[0] if len(readers) == 1 and readers[0].op == ADD else layer
    assert writer.out_quant is not None
    return writer.out_quant
