"""From an ONNX file to a Graph, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pynq_kgrc.graph import ClipSpec, Graph
from pynq_kgrc.models.onnx_file import read_file
from pynq_kgrc.models.onnx_operators import read_nodes
from pynq_kgrc.models.steps import graph_of_steps


def trace_onnx(
    path: str | Path, clip: ClipSpec, labels: Sequence[str] = (), name: str = ""
) -> Graph:
    """The network of an ONNX file as plain data: `run_float` of it holds the file's results.

    The file's input is one clip [1, C, D, H, W] or, for a clip of one frame, [1, C, H, W]; its
    opset is 11 to the newest that the installed onnx knows. Layers are named by the paths of their
    weights or modules. `name` is by default that of the file.

    Raises:
        ModelError: the file cannot be read, or takes a clip of another shape.
        CompileError: operators that the accelerator lacks, all of them with their places; several
            inputs or results; a number of labels that is not the number of outputs.
    """
    path = Path(path)
    network = read_file(path, (1, clip.channels, clip.frames, clip.height, clip.width))
    steps, output = read_nodes(network)
    rank = len(network.shapes[network.input] or ())
    return graph_of_steps(name or path.stem, steps, output, clip, labels, rank)
