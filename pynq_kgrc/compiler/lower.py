"""Graph to Program: a visible list of steps, each a function that returns a new value.

``check_graph -> fuse -> place_tensors -> assign_buffers -> build_tasks``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.compiler.pack import pack
from pynq_kgrc.errors import CompileError, ProgramError
from pynq_kgrc.graph import (
    ACTIVATIONS,
    ADD,
    AVERAGE_POOL,
    CONCAT,
    CONV,
    INPUT,
    MAX_POOL,
    ConvShape,
    Graph,
    Layer,
    WindowShape,
)
from pynq_kgrc.program import (
    ALIGNMENT,
    Buffer,
    ConvTask,
    PoolTask,
    Program,
    Shortcut,
    Slot,
    Task,
    check,
)
from pynq_kgrc.quant import Array, QuantParams, ceil_div, code_dtype, multiplier, weight_limit

SlotOf = Callable[[str], Slot]
"""Where a tensor lies, by name."""


@dataclass(frozen=True, eq=False)
class Step:
    """One future task: a layer with what is fused into it. `output` is the tensor it writes."""

    layer: Layer
    output: Layer
    source: str
    activations: tuple[str, ...]
    """Applied to the output one after the other."""
    shortcut: str | None = None
    pool: WindowShape | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.source,) if self.shortcut is None else (self.source, self.shortcut)


@dataclass(frozen=True)
class Placement:
    """A tensor's place: the tensor whose buffer it shares, and its first channel there."""

    root: str
    channel: int


def lower(graph: Graph, config: AcceleratorConfig) -> Program:
    """Compile a quantized graph for an accelerator.

    Raises:
        CompileError: a layer that cannot run there; names it and what would be accepted.
    """
    check_graph(graph, config)
    steps, places = place_tensors(graph, fuse(graph, config), config.tn)
    buffers, index, arena_bytes = assign_buffers(graph, steps, places, config)

    def slot(tensor: str) -> Slot:
        place = places[tensor]
        return Slot(index[place.root], place.channel)

    tensors = {tensor.name: tensor for tensor in (*graph.layers, *(s.output for s in steps))}
    tasks = tuple(build_task(tensors, step, config, slot) for step in steps)
    program = Program(
        name=graph.name,
        config=config,
        clip=graph.clip,
        labels=graph.labels,
        input=_quant(graph.layers[0]),
        source=slot(graph.layers[0].name),
        target=tasks[-1].target,
        output=tasks[-1].out,
        buffers=buffers,
        arena_bytes=arena_bytes,
        tasks=tasks,
    )
    try:
        check(program)
    except ProgramError as error:
        raise CompileError(str(error)) from error
    return program


def check_graph(graph: Graph, config: AcceleratorConfig) -> None:
    """Refuse a graph that is not quantized, or for another width than the accelerator's."""
    for layer in graph.layers:
        quant = layer.out_quant
        if quant is None:
            raise CompileError(f"{layer.name} has no format of codes; run choose_quant first")
        if quant.bits != config.bits and layer.name != graph.output:
            raise CompileError(
                f"{layer.name} is quantized to {quant.bits} bits, {config.name} works on "
                f"{config.bits}; choose_quant with bits={config.bits}"
            )
        if layer.op == CONCAT and layer.activation != "none":
            raise CompileError(f"{layer.name}: put the activation before the concat")


def fuse(graph: Graph, config: AcceleratorConfig) -> list[Step]:
    """The tasks to be: an add rides on the convolution before it, and a max pool on that.

    A convolution takes a shortcut if nobody else reads it, it has no activation of its own and
    the other operand is made earlier. It takes a max pool if nobody else reads what goes in, the
    windows neither overlap nor are padded, and a memory port moves whole windows at once. An add
    that fits nowhere becomes an identity convolution with a shortcut.
    """
    order = {layer.name: i for i, layer in enumerate(graph.layers)}
    rides: dict[str, str] = {}
    """Name of an add, pool -> name of the layer it rides on; the first of a chain has the task."""
    for layer in graph.layers:
        if layer.op == ADD:
            last = max(layer.inputs, key=order.__getitem__)
            if layer.inputs[0] != layer.inputs[1] and _can_carry(graph, graph[last]):
                rides[layer.name] = last
        elif layer.op == MAX_POOL and _fits_on_convolution(graph, layer, config):
            rides[layer.name] = layer.inputs[0]

    carried = {host: rider for rider, host in rides.items()}
    steps = []
    for layer in graph.layers:
        if layer.op in (INPUT, CONCAT) or layer.name in rides:
            continue
        step = _single_step(layer)
        while step.output.name in carried:
            rider = graph[carried[step.output.name]]
            if rider.op == ADD:
                other = next(name for name in rider.inputs if name != step.output.name)
                # the convolution has no activation: _can_carry
                step = replace(step, output=rider, activations=(rider.activation,), shortcut=other)
            else:
                # the task clamps before it pools: clamps and the maximum are monotone, so that
                # their order does not matter
                activations = (*step.activations, rider.activation)
                step = replace(step, output=rider, activations=activations, pool=rider.shape)
        steps.append(step)
    # a task with a shortcut runs where its add stood, after both of its operands
    return sorted(steps, key=lambda step: order[step.output.name])


def _single_step(layer: Layer) -> Step:
    if layer.op != ADD:
        return Step(layer, layer, layer.inputs[0], (layer.activation,))
    step = identity_step(layer, layer.inputs[0], layer.activation)
    return replace(step, shortcut=layer.inputs[1])


def identity_step(output: Layer, source: str, activation: str = "none") -> Step:
    """A 1x1x1 convolution that copies `source`: only the groups on the diagonal are enabled."""
    channels = output.channels
    layer = Layer(
        name=output.name,
        op=CONV,
        inputs=(source,),
        channels=channels,
        size=output.size,
        shape=ConvShape(channels, output.size, (1, 1, 1), filters=channels),
        weight=np.eye(channels, dtype=np.float32)[:, :, None, None, None],
        bias=np.zeros(channels),
    )
    return Step(layer, output, source, (activation,))


def embedding_steps(graph: Graph, concat: Layer) -> list[Step]:
    """A concat as a sum: each part copied to its channels, on top of the parts before it."""
    steps: list[Step] = []
    channel = 0
    for i, name in enumerate(concat.inputs):
        last = i == len(concat.inputs) - 1
        output = replace(concat, name=concat.name if last else f"{concat.name}.copy{i}")
        step = identity_step(output, name)
        weight = np.zeros((concat.channels, graph[name].channels, 1, 1, 1), np.float32)
        at = np.arange(graph[name].channels)
        weight[channel + at, at] = 1
        assert step.layer.shape is not None
        shape = replace(step.layer.shape, channels=graph[name].channels)
        layer = replace(step.layer, weight=weight, shape=shape)
        before = steps[-1].output.name if steps else None
        steps.append(replace(step, layer=layer, shortcut=before))
        channel += graph[name].channels
    return steps


def _can_carry(graph: Graph, layer: Layer) -> bool:
    alone = len(graph.consumers(layer.name)) == 1 and layer.name != graph.output
    return layer.op == CONV and layer.activation == "none" and alone


def _fits_on_convolution(graph: Graph, pool: Layer, config: AcceleratorConfig) -> bool:
    source, shape = graph[pool.inputs[0]], pool.shape
    if source.op not in (CONV, ADD) or len(graph.consumers(source.name)) != 1 or shape is None:
        return False
    if source.out_quant != pool.out_quant or config.port_positions % shape.kernel[2]:
        return False
    return shape.kernel == shape.stride and not any(shape.pad_before + shape.pad_after)


def place_tensors(
    graph: Graph, steps: list[Step], tn: int
) -> tuple[list[Step], dict[str, Placement]]:
    """Where each tensor lies: parts of a concat lie in its buffer, at their channel offset.

    A part that cannot be written there (the clip itself, a part of two concats, or of another
    format) is copied by an identity convolution. So is a concat that is the network's output. A
    concat whose parts do not begin at whole vectors of T_N channels is added up instead.
    """
    made = {step.output.name for step in steps}
    places: dict[str, Placement] = {}
    copies: dict[str, list[Step]] = {}
    concats = [layer for layer in graph.layers if layer.op == CONCAT]
    for concat in reversed(concats):  # the outer one first, so that inner ones nest in it
        place = places.setdefault(concat.name, Placement(concat.name, 0))
        channel = place.channel
        counts = [graph[name].channels for name in concat.inputs]
        if any((channel + sum(counts[:i])) % tn for i in range(len(counts))):
            copies[concat.name] = embedding_steps(graph, concat)
            continue
        for i, name in enumerate(concat.inputs):
            part = graph[name]
            movable = name in made or part.op == CONCAT
            if movable and name not in places and part.out_quant == concat.out_quant:
                places[name] = Placement(place.root, channel)
            else:
                copy = replace(part, name=f"{concat.name}.copy{i}", out_quant=concat.out_quant)
                copies.setdefault(concat.name, []).append(identity_step(copy, name))
                places[copy.name] = Placement(place.root, channel)
            channel += part.channels
    order = {layer.name: i for i, layer in enumerate(graph.layers)}
    placed = [(order[step.output.name], step) for step in steps]
    placed += [(order[concat], copy) for concat, made_of in copies.items() for copy in made_of]
    placed.sort(key=lambda item: item[0])
    ordered = [step for _, step in placed]
    output = graph[graph.output]
    if output.op == CONCAT:
        copy = replace(output, name=f"{output.name}.copy")
        ordered.append(identity_step(copy, output.name))
    for name in (graph.layers[0].name, *(step.output.name for step in ordered)):
        places.setdefault(name, Placement(name, 0))
    return ordered, places


def assign_buffers(
    graph: Graph, steps: list[Step], places: dict[str, Placement], config: AcceleratorConfig
) -> tuple[tuple[Buffer, ...], dict[str, int], int]:
    """Buffers in one arena: those that are never alive together may overlap.

    Largest first, each at the lowest offset that is free over its whole life.

    Returns:
        The buffers, the index of each root tensor's buffer, and the bytes of the arena (its peak).
    """
    tensors = {layer.name: layer for layer in graph.layers}
    tensors.update((step.output.name, step.output) for step in steps)
    born: dict[str, int] = {places[graph.layers[0].name].root: -1}
    dies: dict[str, int] = {}
    for time, step in enumerate(steps):
        born.setdefault(places[step.output.name].root, time)
        dies[places[step.output.name].root] = time
        for name in step.reads:
            dies[places[name].root] = time
    dies[places[steps[-1].output.name].root] = len(steps)

    roots = list(born)
    wanted = {root: _buffer(tensors[root]) for root in roots}
    taken: dict[str, tuple[int, int]] = {}
    for root in sorted(roots, key=lambda r: -wanted[r].nbytes(config)):
        nbytes = wanted[root].nbytes(config)
        neighbours = sorted(
            span
            for other, span in taken.items()
            if born[root] <= dies[other] and born[other] <= dies[root]
        )
        offset = 0
        for start, end in neighbours:
            if offset + nbytes <= start:
                break
            offset = max(offset, ceil_div(end, ALIGNMENT) * ALIGNMENT)
        taken[root] = (offset, offset + nbytes)
    buffers = tuple(
        Buffer(wanted[r].channels, wanted[r].size, wanted[r].bits, taken[r][0]) for r in roots
    )
    arena_bytes = max(end for _, end in taken.values())
    return buffers, {root: i for i, root in enumerate(roots)}, arena_bytes


def _buffer(layer: Layer) -> Buffer:
    return Buffer(layer.channels, layer.size, _quant(layer).bits, 0)


def _quant(layer: Layer) -> QuantParams:
    assert layer.out_quant is not None, layer.name  # check_graph saw to it
    return layer.out_quant


def clamp_codes(out: QuantParams, *activations: str) -> tuple[int, int]:
    """lo and hi of the output codes: those of the type, clamped by each activation in turn."""
    lo, hi = out.min, out.max
    for activation in activations:
        low, high = ACTIVATIONS[activation]
        least = out.min if low is None else _code(low, out)
        most = out.max if high is None else _code(high, out)
        # to clamp every code of an interval, clamp its ends
        lo, hi = (min(max(end, least), most) for end in (lo, hi))
    return lo, hi


def _code(real: float, out: QuantParams) -> int:
    """The code of one real, as `QuantParams.quantize` rounds and clamps it."""
    return int(out.quantize(np.array(real)))


def build_task(
    tensors: Mapping[str, Layer], step: Step, config: AcceleratorConfig, slot: SlotOf
) -> Task:
    """The task of a step: its weights quantized and packed, its scales as multiplier and shift."""
    layer, name = step.layer, step.layer.name
    source, out = _quant(tensors[step.source]), _quant(step.output)
    lo, hi = clamp_codes(out, *step.activations)
    places = {"source": slot(step.source), "target": slot(step.output.name)}
    shape = layer.shape
    assert shape is not None
    if layer.op in (MAX_POOL, AVERAGE_POOL):
        average = layer.op == AVERAGE_POOL
        real = source.scale / out.scale / (shape.taps if average else 1)
        mult, shift = multiplier(real, name)
        return PoolTask(
            name=name,
            shape=shape,
            average=average,
            **places,
            in_zero=source.zero_point,
            out=out,
            lo=lo,
            hi=hi,
            mult=mult,
            shift=shift,
        )
    assert isinstance(shape, ConvShape)
    codes, scale = quantize_weight(layer, config.bits)
    scales = [multiplier(float(r), name) for r in source.scale * scale / out.scale]
    assert layer.bias is not None
    bias = np.floor(layer.bias / (source.scale * scale) + 0.5).astype(np.int64)
    bias -= source.zero_point * codes.astype(np.int64).sum(axis=(1, 2))
    shortcut = None
    if step.shortcut is not None:
        other = _quant(tensors[step.shortcut])
        mult, shift = multiplier(other.scale / out.scale, f"{name}: shortcut")
        shortcut = Shortcut(slot(step.shortcut), other.zero_point, mult, shift)
    return ConvTask(
        name=name,
        shape=shape,
        **places,
        in_zero=source.zero_point,
        out=out,
        lo=lo,
        hi=hi,
        weights=pack(codes, config),
        bias=bias,
        mult=np.array([m for m, _ in scales], np.int32),
        shift=np.array([s for _, s in scales], np.uint8),
        shortcut=shortcut,
        pool=step.pool,
    )


def quantize_weight(layer: Layer, bits: int) -> tuple[Array, Array]:
    """Codes [M, N, K] of a layer's weight, and the scale [M] of each filter.

    Zeros stay zeros. A layer made here (an identity) has no format yet: its largest weight gets
    the largest code.
    """
    assert layer.weight is not None
    weight = layer.weight.reshape(*layer.weight.shape[:2], -1).astype(np.float64)
    limit = weight_limit(bits)
    if layer.weight_quant is not None:
        scale = layer.weight_quant.scale
    else:
        largest = np.abs(weight).max(axis=(1, 2))
        scale = np.where(largest > 0, largest, 1) / limit  # a filter of zeros has any scale
    codes = np.floor(weight / scale[:, None, None] + 0.5)
    return np.clip(codes, -limit, limit).astype(code_dtype(bits)), scale
