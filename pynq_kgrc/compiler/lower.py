"""Compile a Graph to a Program, in functions that each return a new value.

``check_graph -> fuse -> fold_clip -> place_tensors -> cut_drafts -> assign_buffers -> build_task``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from msgspec.structs import replace as replace_fields

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.cutting import cut_convolution
from pynq_kgrc.accelerator.header import MAX_TAPS
from pynq_kgrc.accelerator.tiling import NO_POOL, tile_size
from pynq_kgrc.compiler.fold import choose_folding, foldings
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
    CodeRange,
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
from pynq_kgrc.quant import (
    Array,
    QuantParams,
    ceil_div,
    code_dtype,
    identity_code,
    multiplier,
    weight_limit,
)

Name = TypeVar("Name", str, int)

SlotOf = Callable[[str], Slot]
"""Finds the slot of a tensor by its name."""


@dataclass(frozen=True, eq=False)
class TaskDraft:
    """A task before it has codes: a layer, and the add and pool that are fused into it."""

    layer: Layer
    output: Layer
    """The layer whose tensor the task writes: the last one that is fused."""
    source: str
    activations: tuple[str, ...]
    """Applied to the output one after the other."""
    shortcut: str | None = None
    """The tensor that a fused add reads beside the convolution's sums."""
    pool: WindowShape | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The tensors that the task reads."""
        return (self.source,) if self.shortcut is None else (self.source, self.shortcut)


@dataclass(frozen=True)
class Placement:
    """Where a tensor lies: in the buffer of the tensor `root`, from channel `channel` on."""

    root: str
    channel: int


def lower(graph: Graph, config: AcceleratorConfig, *, fold: bool = True) -> Program:
    """Compile a quantized graph for an accelerator.

    Args:
        graph: the network, with the formats of its codes.
        config: the design.
        fold: whether the taps of the first convolution may become channels of the clip, where that
            is faster on the design (`fold_clip`). The codes of every layer are the same either way.

    Raises:
        CompileError: the accelerator cannot run a layer; names it and what would be accepted.
    """
    check_graph(graph, config)
    drafts = fuse(graph, config)
    window = None
    if fold:
        graph, drafts, window = fold_clip(graph, drafts, config)
    drafts, places = place_tensors(graph, drafts, config.tn)
    drafts, places = cut_drafts(graph, drafts, places)
    buffers, index, arena_bytes = assign_buffers(graph, drafts, places, config)

    def slot(tensor: str) -> Slot:
        place = places[tensor]
        return Slot(index[place.root], place.channel)

    tensors = {tensor.name: tensor for tensor in (*graph.layers, *(s.output for s in drafts))}
    tasks = tuple(build_task(tensors, draft, config, slot) for draft in drafts)
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
        fold=window,
        softmax=graph.softmax,
    )
    try:
        check(program)
    except ProgramError as error:
        raise CompileError(str(error)) from error
    return program


def check_graph(graph: Graph, config: AcceleratorConfig) -> None:
    """Refuse a graph that is not quantized, or quantized to other bits than the accelerator's.

    Raises:
        CompileError: names the layer and what to do.
    """
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
            raise CompileError(
                f"{layer.name}: an activation after a concat; put it before the concat"
            )


def fuse(graph: Graph, config: AcceleratorConfig) -> list[TaskDraft]:
    """Group the layers into tasks: adds and max pools are fused into convolutions.

    An add is fused into the later of the two layers that it reads, as its shortcut, if that layer
    is a convolution without an activation whose output nothing else reads. A max pool is fused
    into the convolution (or the add) before it if nothing else reads that output, the windows
    neither overlap nor are padded, and a memory port moves whole windows at once. An add that
    cannot be fused becomes an identity convolution with a shortcut.
    """
    order = {layer.name: i for i, layer in enumerate(graph.layers)}
    host_of: dict[str, str] = {}
    """Name of a fused add or pool -> name of the layer before it in the same task."""
    for layer in graph.layers:
        if layer.op == ADD:
            last = max(layer.inputs, key=order.__getitem__)
            if layer.inputs[0] != layer.inputs[1] and _can_carry(graph, graph[last]):
                host_of[layer.name] = last
        elif layer.op == MAX_POOL and _fits_on_convolution(graph, layer, config):
            host_of[layer.name] = layer.inputs[0]

    fused_into = {host: fused for fused, host in host_of.items()}
    drafts = []
    for layer in graph.layers:
        if layer.op in (INPUT, CONCAT) or layer.name in host_of:
            continue
        draft = _single_draft(layer)
        while draft.output.name in fused_into:
            fused = graph[fused_into[draft.output.name]]
            if fused.op == ADD:
                other = next(name for name in fused.inputs if name != draft.output.name)
                # the convolution has no activation: _can_carry
                draft = replace(
                    draft, output=fused, activations=(fused.activation,), shortcut=other
                )
            else:
                # the task clamps before it pools: clamps and the maximum are monotone, so that
                # their order does not matter
                activations = (*draft.activations, fused.activation)
                draft = replace(draft, output=fused, activations=activations, pool=fused.shape)
        drafts += _without_large_pool(graph, draft, config)
    # a task runs at the place of its last layer: after both operands of a fused add
    return sorted(drafts, key=lambda draft: order[draft.output.name])


def _single_draft(layer: Layer) -> TaskDraft:
    if layer.op != ADD:
        return TaskDraft(layer, layer, layer.inputs[0], (layer.activation,))
    draft = identity_draft(layer, layer.inputs[0], layer.activation)
    return replace(draft, shortcut=layer.inputs[1])


def identity_draft(output: Layer, source: str, activation: str = "none") -> TaskDraft:
    """A 1x1x1 convolution that copies `source`: only the groups on the diagonal are enabled."""
    channels = output.channels
    layer = Layer(
        name=output.name,
        op=CONV,
        inputs=(source,),
        channels=channels,
        size=output.size,
        shape=ConvShape(channels, output.size, (1, 1, 1), filters=channels, own_weights=channels),
        weight=np.eye(channels, dtype=np.float32)[:, :, None, None, None],
        bias=np.zeros(channels),
    )
    return TaskDraft(layer, output, source, (activation,))


def embedding_drafts(graph: Graph, concat: Layer) -> list[TaskDraft]:
    """A concat as a sum: each part is copied to its channels and added to the parts before it."""
    drafts: list[TaskDraft] = []
    channel = 0
    for i, name in enumerate(concat.inputs):
        last = i == len(concat.inputs) - 1
        output = replace(concat, name=concat.name if last else f"{concat.name}.copy{i}")
        draft = identity_draft(output, name)
        weight = np.zeros((concat.channels, graph[name].channels, 1, 1, 1), np.float32)
        at = np.arange(graph[name].channels)
        weight[channel + at, at] = 1
        assert isinstance(draft.layer.shape, ConvShape)
        copied = graph[name].channels
        shape = replace(draft.layer.shape, channels=copied, own_weights=copied)
        layer = replace(draft.layer, weight=weight, shape=shape)
        before = drafts[-1].output.name if drafts else None
        drafts.append(replace(draft, layer=layer, shortcut=before))
        channel += graph[name].channels
    return drafts


def _can_carry(graph: Graph, layer: Layer) -> bool:
    alone = len(graph.consumers(layer.name)) == 1 and layer.name != graph.output
    free = layer.activation == "none" and layer.code_range is None
    return layer.op == CONV and free and alone


def _fits_on_convolution(graph: Graph, pool: Layer, config: AcceleratorConfig) -> bool:
    source, shape = graph[pool.inputs[0]], pool.shape
    if source.op not in (CONV, ADD) or len(graph.consumers(source.name)) != 1 or shape is None:
        return False
    same = (source.out_quant, source.code_range) == (pool.out_quant, pool.code_range)
    if not same or config.port_positions % shape.kernel[2]:
        return False
    return shape.kernel == shape.stride and not any(shape.pad_before + shape.pad_after)


def _without_large_pool(
    graph: Graph, draft: TaskDraft, config: AcceleratorConfig
) -> list[TaskDraft]:
    """The draft; or, if the buffers do not hold a window of its pool, the pool as its own draft."""
    shape = cut_convolution(draft.layer)[-1].shape if draft.pool is not None else None
    if shape is None or draft.pool is None:
        return [draft]
    try:
        tile_size(config, shape, draft.pool.kernel)
    except CompileError:
        source = graph[draft.output.inputs[0]]
        alone = replace(draft, output=source, activations=draft.activations[:-1], pool=None)
        return [alone, _single_draft(draft.output)]
    return [draft]


def fold_clip(
    graph: Graph, drafts: list[TaskDraft], config: AcceleratorConfig
) -> tuple[Graph, list[TaskDraft], WindowShape | None]:
    """Fold the convolution that reads the clip, if that is faster (`fold.choose_folding`).

    Not if anything else reads the clip as well, or if the graph reads other channels than it has.

    Returns:
        The graph, whose input has the folded channels and size; the drafts; and the window whose
        taps the host writes as channels, or None.
    """
    clip = graph.layers[0]
    readers = [draft for draft in drafts if clip.name in draft.reads]
    concats = [layer for layer in graph.consumers(clip.name) if layer.op == CONCAT]
    other = clip.channels != graph.clip.channels or clip.name == graph.output
    if len(readers) != 1 or concats or other:
        return graph, drafts, None
    (reader,) = readers
    if reader.layer.op != CONV or reader.shortcut is not None:
        return graph, drafts, None
    assert reader.layer.weight is not None
    codes, _ = quantize_weight(reader.layer, config.bits)
    place = choose_folding(
        config,
        replace(reader.layer, weight=codes.reshape(reader.layer.weight.shape)),
        NO_POOL if reader.pool is None else reader.pool.kernel,
        wide=_quant(reader.output).bits > config.bits,
    )
    if place == 0:
        return graph, drafts, None
    window, layer = list(foldings(reader.layer))[place]
    assert layer.shape is not None
    folded = replace(clip, channels=layer.shape.channels, size=window.out_size)
    graph = replace(graph, layers=(folded, *graph.layers[1:]))
    drafts = [replace(draft, layer=layer) if draft is reader else draft for draft in drafts]
    return graph, drafts, window


def place_tensors(
    graph: Graph, drafts: list[TaskDraft], tn: int
) -> tuple[list[TaskDraft], dict[str, Placement]]:
    """Choose the buffer and channel of each tensor: a part of a concat lies in the concat's buffer.

    A part that cannot be written there directly (the clip, a part of two concats, a part of
    another format) is copied there by an identity convolution. A concat whose parts already lie one
    after the other in a larger one, as those of DenseNet do, lies there as well. An output of the
    network that is a concat is copied as well. A concat whose parts do not all begin at whole
    vectors of T_N channels is computed as a sum instead (`embedding_drafts`).

    Returns:
        The drafts with the copies, in running order, and the placement of each tensor by name.
    """
    made = {draft.output.name for draft in drafts}
    places: dict[str, Placement] = {}
    copies: dict[str, list[TaskDraft]] = {}
    """Name of a concat -> the copies that fill it."""
    concats = [layer for layer in graph.layers if layer.op == CONCAT]
    for concat in reversed(concats):  # the outer first, so that inner ones lie in its buffer
        inside = _inside_another(graph, concat, places)
        if inside is not None and concat.name not in places:
            places[concat.name] = inside
            continue
        place = places.setdefault(concat.name, Placement(concat.name, 0))
        channel = place.channel
        counts = [graph[name].channels for name in concat.inputs]
        if any((channel + sum(counts[:i])) % tn for i in range(len(counts))):
            copies[concat.name] = embedding_drafts(graph, concat)
            continue
        for i, name in enumerate(concat.inputs):
            part = graph[name]
            movable = name in made or part.op == CONCAT
            same = (part.out_quant, part.code_range) == (concat.out_quant, concat.code_range)
            if movable and name not in places and same:
                places[name] = Placement(place.root, channel)
            else:
                copy = replace(
                    part,
                    name=f"{concat.name}.copy{i}",
                    out_quant=concat.out_quant,
                    code_range=concat.code_range,
                )
                copies.setdefault(concat.name, []).append(identity_draft(copy, name))
                places[copy.name] = Placement(place.root, channel)
            channel += part.channels
    order = {layer.name: i for i, layer in enumerate(graph.layers)}
    placed = [(order[draft.output.name], draft) for draft in drafts]
    placed += [(order[concat], copy) for concat, made_of in copies.items() for copy in made_of]
    placed.sort(key=lambda item: item[0])
    ordered = [draft for _, draft in placed]
    output = graph[graph.output]
    if output.op == CONCAT:
        copy = replace(output, name=f"{output.name}.copy")
        ordered.append(identity_draft(copy, output.name))
    for name in (graph.layers[0].name, *(draft.output.name for draft in ordered)):
        places.setdefault(name, Placement(name, 0))
    return ordered, places


def _inside_another(
    graph: Graph, concat: Layer, places: Mapping[str, Placement]
) -> Placement | None:
    """Where a concat lies if all its parts lie there, one after the other; None if they do not."""
    first = places.get(concat.inputs[0])
    if first is None:
        return None
    channel = first.channel
    for name in concat.inputs:
        part = graph[name]
        if places.get(name) != Placement(first.root, channel):
            return None
        if part.out_quant != concat.out_quant:
            return None
        channel += part.channels
    return first


def cut_drafts(
    graph: Graph, drafts: list[TaskDraft], places: dict[str, Placement]
) -> tuple[list[TaskDraft], dict[str, Placement]]:
    """Cut each convolution with more taps than the accelerator has into several (`cutting`).

    Returns:
        The drafts with those of the copies, and the placement of each tensor by name.

    Raises:
        CompileError: a convolution or a pool has too many taps and cannot be cut.
    """
    tensors = {tensor.name: tensor for tensor in (*graph.layers, *(d.output for d in drafts))}
    found: list[TaskDraft] = []
    places = dict(places)
    for draft in drafts:
        layer = draft.layer
        *copies, last = cut_convolution(layer) if layer.op == CONV else [layer]
        if last.shape is not None and last.shape.taps > MAX_TAPS:
            raise CompileError(
                f"{layer.name}: its window {last.shape.kernel} has {last.shape.taps} taps, the "
                f"accelerator has {MAX_TAPS} and it cannot be cut into smaller windows; put a "
                f"pool or a stride before it, or use sizes that have divisors"
            )
        source = draft.source
        for copy in copies:
            output = replace(copy, out_quant=_quant(tensors[source]), code_range=None)
            tensors[copy.name] = output
            places[copy.name] = Placement(copy.name, 0)
            found.append(TaskDraft(copy, output, source, ("none",)))
            source = copy.name
        found.append(replace(draft, layer=last, source=source))
    return found, places


def assign_buffers(
    graph: Graph, drafts: list[TaskDraft], places: dict[str, Placement], config: AcceleratorConfig
) -> tuple[tuple[Buffer, ...], dict[str, int], int]:
    """Lay the buffers out in one arena; buffers that are never alive together may overlap.

    Returns:
        The buffers, the index of the buffer of each root tensor, and the bytes of the arena.
    """
    tensors = {layer.name: layer for layer in graph.layers}
    tensors.update((draft.output.name, draft.output) for draft in drafts)
    born: dict[str, int] = {places[graph.layers[0].name].root: -1}
    dies: dict[str, int] = {}
    for time, draft in enumerate(drafts):
        born.setdefault(places[draft.output.name].root, time)
        dies[places[draft.output.name].root] = time
        for name in draft.reads:
            dies[places[name].root] = time
    dies[places[drafts[-1].output.name].root] = len(drafts)

    roots = list(born)
    wanted = {root: _buffer(tensors[root]) for root in roots}
    offsets, arena_bytes = lay_out(wanted, born, dies, config)
    buffers = tuple(replace_fields(wanted[root], offset=offsets[root]) for root in roots)
    return buffers, {root: i for i, root in enumerate(roots)}, arena_bytes


def lay_out(
    buffers: Mapping[Name, Buffer],
    born: Mapping[Name, int],
    dies: Mapping[Name, int],
    config: AcceleratorConfig,
) -> tuple[dict[Name, int], int]:
    """The offset of each buffer, and the bytes of the arena.

    A greedy allocation: largest first, each at the lowest offset that is free while it is alive.

    Args:
        buffers: by any name; their offsets are not read.
        born: number of the task that first writes each, -1 for the clip.
        dies: number of the last task that reads or writes each.
        config: the design.
    """
    taken: dict[Name, tuple[int, int]] = {}
    for name in sorted(born, key=lambda each: -buffers[each].nbytes(config)):
        nbytes = buffers[name].nbytes(config)
        neighbours = sorted(
            span
            for other, span in taken.items()
            if born[name] <= dies[other] and born[other] <= dies[name]
        )
        offset = 0
        for start, end in neighbours:
            if offset + nbytes <= start:
                break
            offset = max(offset, ceil_div(end, ALIGNMENT) * ALIGNMENT)
        taken[name] = (offset, offset + nbytes)
    return {name: start for name, (start, _) in taken.items()}, max(e for _, e in taken.values())


def _buffer(layer: Layer) -> Buffer:
    return Buffer(layer.channels, layer.size, _quant(layer).bits, 0)


def _quant(layer: Layer) -> QuantParams:
    assert layer.out_quant is not None, layer.name  # check_graph has refused it
    return layer.out_quant


def clamp_codes(
    out: QuantParams, *activations: str, limits: CodeRange | None = None
) -> tuple[int, int]:
    """lo and hi of the output codes: `limits` or those of the type, clamped by each activation."""
    lo, hi = limits or (out.min, out.max)
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
    tensors: Mapping[str, Layer], draft: TaskDraft, config: AcceleratorConfig, slot: SlotOf
) -> Task:
    """Turn a draft into a task: weights as compact codes, scales as multiplier and shift."""
    layer, name = draft.layer, draft.layer.name
    source, out = _quant(tensors[draft.source]), _quant(draft.output)
    lo, hi = clamp_codes(out, *draft.activations, limits=draft.output.code_range)
    places = {"source": slot(draft.source), "target": slot(draft.output.name)}
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
    if draft.shortcut is not None:
        other = _quant(tensors[draft.shortcut])
        mult, shift = multiplier(other.scale / out.scale, f"{name}: shortcut")
        shortcut = Shortcut(slot(draft.shortcut), other.zero_point, mult, shift)
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
        pool=draft.pool,
    )


def quantize_weight(layer: Layer, bits: int) -> tuple[Array, Array]:
    """Codes [M, N, K] of a layer's weight, and the scale [M] of each filter.

    Zeros stay zeros. A copy (`identity_draft`) has no format of weights: its ones get the code
    `identity_code`.
    """
    assert layer.weight is not None
    weight = layer.weight.reshape(*layer.weight.shape[:2], -1).astype(np.float64)
    limit = weight_limit(bits)
    if layer.weight_quant is not None:
        scale = layer.weight_quant.scale
    else:
        scale = np.full(len(weight), 1 / identity_code(bits))
    codes = np.floor(weight / scale[:, None, None] + 0.5)
    return np.clip(codes, -limit, limit).astype(code_dtype(bits)), scale
