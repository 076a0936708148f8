"""From a torch module to a Graph: export it, read its operators, make layers of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.export import ExportedProgram

from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import ClipSpec, Graph
from pynq_kgrc.models.operators import read_operators
from pynq_kgrc.models.steps import graph_of_steps


def trace(module: nn.Module, clip: ClipSpec, labels: Sequence[str] = (), name: str = "") -> Graph:
    """The network as plain data: `run_float(trace(m, clip), x)` holds the values of `m(x[None])`.

    The module is called with one clip [1, C, D, H, W], C being 3 for R, G, B; with a clip of one
    frame, it may also take [1, C, H, W]. It is traced in evaluation mode; its training flags are
    restored. The weights are copied, as float32 from a module of any precision; conversions between
    floating-point types are left out. A soft-max at the end is left out, and `Graph.softmax` says
    so: the graph then holds the values before it. `name` is by default the module's class.

    Raises:
        CompileError: an unsupported operator (the message has its place in the module and what to
            use instead); a module that torch cannot export, or with several output tensors; a
            number of labels that is not the number of outputs.
    """
    name = name or type(module).__name__
    steps, output, rank = read_operators(_export(module, clip, name), module, name)
    return graph_of_steps(name, steps, output, clip, labels, rank)


def _export(module: nn.Module, clip: ClipSpec, name: str) -> ExportedProgram:
    parameter = next(module.parameters(), None)
    device = None if parameter is None else parameter.device
    example = torch.zeros((1, clip.channels, clip.frames, clip.height, clip.width), device=device)
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
    inputs = [
        parameter.name
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(inputs) > 1:
        raise CompileError(
            f"{name}: its forward takes {len(inputs)} inputs ({', '.join(inputs)}); wrap it in a "
            f"module that takes one clip and slices it, such as net(x[:, :, ::4], x)"
        )
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
