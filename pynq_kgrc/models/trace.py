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

    The module sees one clip [1, 3, D, H, W]; a network of 2-D layers, with a clip of one frame, may
    take [1, 3, H, W]. It is traced as in evaluation, and its training flags stay as they were. The
    weights are copied. `name` is the module's class unless given.

    Raises:
        CompileError: an operator the accelerator lacks, with its place in the module and what to
            use instead; a module that torch cannot export, or with more than one output tensor;
            labels that are not one for each output.
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
    """Average before a 1x1x1 convolution rather than after it: the same values for less work.

    Both are linear. It lets a classifier's logits be the last thing computed, which is the one
    tensor that is kept at 16 bits.
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
    examples = [example, example[:, :, 0]] if clip.frames == 1 else [example]
    with _evaluation(module), torch.no_grad(), warnings.catch_warnings():
        # a pruned module sets its masked weight anew in each forward, which is harmless here
        warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")
        # a copy that torch makes for padding="same" with an even kernel; nothing is computed here
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        # torch's own use of what torch deprecates
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
        reasons = []
        for attempt in examples:
            try:
                exported = torch.export.export(module, (attempt,))
                # no decompositions, but in-place operators become plain ones and dead ones go
                functional: ExportedProgram = exported.run_decompositions({})
                return functional
            except Exception as error:  # torch passes on whatever the module's forward raised
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                reasons.append(f"for an input of {list(attempt.shape)}: {first}")
    raise CompileError(f"{name}: torch.export fails {'; '.join(reasons)}")


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and every submodule's own flag again after."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def _fold(drafts: list[LayerDraft], output: LayerDraft) -> tuple[list[LayerDraft], LayerDraft]:
    """Merge each scale into the draft before it where that has no other reader."""
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
    """Let `before` do the work of `scale` if it can; `alone`: nothing else reads it."""
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
    """Fold gain and offset, which are float64, into the convolution or scale before."""
    assert scale.gain is not None and scale.bias is not None
    gain = scale.gain
    if before.weight is not None:
        before.weight = (before.weight * gain[:, None, None, None, None]).astype(np.float32)
    else:
        before.gain = gain * (1.0 if before.gain is None else before.gain)
    before.bias = scale.bias + gain * (0.0 if before.bias is None else before.bias)


def _layer(draft: LayerDraft) -> Layer:
    """The finished layer; a scale on its own is a diagonal 1x1x1 convolution."""
    if draft.op == SCALE:
        channels = draft.channels
        gain = np.ones(channels) if draft.gain is None else draft.gain
        draft.weight = np.diag(gain).astype(np.float32).reshape(channels, channels, 1, 1, 1)
        draft.shape = ConvShape(channels, draft.size, (1, 1, 1), filters=channels)
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
