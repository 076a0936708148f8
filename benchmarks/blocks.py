"""Blockwise pruning where a block is a whole filter tile: published and modelled.

R(2+1)D-18, 16 bits, 90 % of the blocks of layer1 and 80 % of those of layer2 pruned ("3D CNN
Acceleration on FPGA using Hardware-Aware Pruning", Sun, Zhao et al., tables II and IV), on
`designs/16-blocks-8.json` and `-16.json`, and on `8-sparse` for comparison. The weights are seeded
and random. Latency is modelled with memory; the published one was measured on a ZCU102.

    python benchmarks/blocks.py
"""

from importlib import import_module
from pathlib import Path

import torch

from pynq_kgrc.accelerator.config import read_design
from pynq_kgrc.analysis.timing import modelled_ms
from pynq_kgrc.compiler.latency import compile_shapes
from pynq_kgrc.compress.patterns import kept_operations, prune
from pynq_kgrc.compress.recipes import build_patterns, published_recipe
from pynq_kgrc.models import NETWORKS
from pynq_kgrc.models.trace import trace

DESIGNS = Path(__file__).with_name("designs")
NETWORK = "r2plus1d_18"
PUBLISHED = {"16-blocks-8": (1044, 386), "16-blocks-16": (609, 234)}
"""Milliseconds, dense and pruned (table IV)."""


def row(graph, design, published=None):
    """A line of the table of docs/hardware.md."""
    recipe = build_patterns(published_recipe(NETWORK, "blockwise"), design)
    pruned = prune(graph, recipe, design.group_size)
    dense_macs, kept = kept_operations(pruned)
    before, after = (modelled_ms(compile_shapes(each, design)) for each in (graph, pruned))
    told = ""
    if published:
        told = f"{published[0]} / {published[1]} ms, {published[0] / published[1]:.2f}x"
    return (
        f"| {design.name} | {dense_macs / kept:.2f}x | {told} "
        f"| {before:.1f} / {after:.1f} ms, {before / after:.2f}x |"
    )


def main():
    name, build = NETWORKS[NETWORK]
    module = import_module(name)
    torch.manual_seed(0)
    graph = trace(getattr(module, build)(classes=101), module.CLIP, name=NETWORK)
    print("| design | fewer operations | published, dense / pruned | modelled, dense / pruned |")
    print("|---|---|---|---|")
    for design, published in PUBLISHED.items():
        print(row(graph, read_design(str(DESIGNS / f"{design}.json")), published), flush=True)
    print(row(graph, read_design("8-sparse")), flush=True)


if __name__ == "__main__":
    main()
