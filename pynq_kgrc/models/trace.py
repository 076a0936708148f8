"""From a torch module to a Graph: export, read the operators, fold batch norm and activations."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import AVERAGE_POOL, CONCAT, CONV, INPUT, ClipSpec, ConvShape, Graph, Layer
from pynq_kgrc.models.operators import SCALE, LayerDraft, read_operators


def trace(module: nn.Module, clip: ClipSpec, labels: Sequence[str] = (), name: str = "") -> Graph:
    """The network as plain data: `run_float(trace(m, clip), x)` holds the values of `m(x[None])`.

    The module is called with one clip [1, 3, D, H, W]; with a clip of one frame, it may also take
    [1, 3, H, W]. It is traced in evaluation mode; its training flags are restored. The weights are
    copied, as float32 from a module of any precision; conversions between floating-point types are
    left out. `name` is by default the module's class.

    Raises:
        CompileError: an unsupported operator (the message has its place in the module and what to
            use instead); a module that torch cannot export, or with several output tensors; a
            number of labels that is not the number of outputs.
    """
    name = name or type(module).__name__
    drafts, output = read_operators(_export(module, clip, name), module, clip, name)
    drafts, output = _fold(drafts, output)
    outputs = output.channels * math.prod(output.size)
    if labels and len(labels) != outputs:
        raise CompileError(f"{name} has {outputs} outputs, but {len(labels)} labels were given")
    layers = tuple(_layer(draft) for draft in drafts)
    return average_first(Graph(name, layers, output.name, clip, tuple(labels)))


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
        if not alone or padded or conv.activation != "none" or not _is_pointwise(conv):
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


def _export(module: nn.Module, clip: ClipSpec, name: str) -> ExportedProgram:
    parameter = next(module.parameters(), None)
    device = None if parameter is None else parameter.device
    example = torch.zeros((1, 3, clip.frames, clip.height, clip.width), device=device)
    # in the module's own precision first; it may also convert a float32 clip itself
    kinds = [p.dtype for p in module.parameters() if p.is_floating_point()][:1]
    examples = [example.to(kind) for kind in dict.fromkeys((*kinds, torch.float32))]
    if clip.frames == 1:
        examples = [view for e in examples for view in (e, e[:, :, 0])]
    with _evaluation(module), torch.no_grad(), warnings.catch_warnings():
        # torch.nn.utils.prune sets the masked weight in each forward: harmless here
        warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")
        # torch pads a copy for padding="same" with an even kernel; nothing is computed here
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        # torch itself uses what it deprecates
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
        reasons = []
        for attempt in examples:
            try:
                exported = torch.export.export(module, (attempt,))
                # decomposes nothing, but replaces in-place operators and removes dead code
                functional: ExportedProgram = exported.run_decompositions({})
                return functional
            except Exception as error:  # whatever the module's forward raised
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                kind = "" if attempt.dtype == torch.float32 else f" ({attempt.dtype})"
                reasons.append(f"for an input of {list(attempt.shape)}{kind}: {first}")
    hint = (
        "" if kinds in ([], [torch.float32]) else f"; try {name}.float(), which has one precision"
    )
    raise CompileError(f"{name}: torch.export fails {'; '.join(reasons)}{hint}")


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each submodule has its own training flag again."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def _fold(drafts: list[LayerDraft], output: LayerDraft) -> tuple[list[LayerDraft], LayerDraft]:
    """Merge each SCALE into the layer before it, unless that layer has another reader."""
    readers = Counter(source for draft in drafts for source in draft.inputs)
    merged: dict[LayerDraft, LayerDraft] = {}
    kept = []
    for draft in drafts:
        draft.inputs = [merged.get(source, source) for source in draft.inputs]
        if draft.op == SCALE and _absorbs(draft.inputs[0], draft, readers[draft.inputs[0]] == 1):
            merged[draft] = draft.inputs[0]
            readers[draft.inputs[0]] += readers[draft] - 1
        else:
            kept.append(draft)
    return kept, merged.get(output, output)


def _absorbs(before: LayerDraft, scale: LayerDraft, alone: bool) -> bool:
    """Merge `scale` into `before` if possible; `alone`: no other layer reads `before`."""
    plain = scale.gain is None
    if plain and scale.activation == "relu" and before.positive:
        return True
    if plain and scale.activation == before.activation:
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
    if before.weight is not None:
        before.weight = (before.weight * gain[:, None, None, None, None]).astype(np.float32)
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
    )
