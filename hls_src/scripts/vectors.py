"""Write test vectors of a design for bench.cpp: a small random program and its expected results.

``python vectors.py --design 8-sparse -o build/8-sparse/vectors.bin``

The program has a convolution in several tiles with a fused pool, strides, pruned groups, a
shortcut, an overlapping pool and a fully connected layer. The expected outputs are the emulation's,
the expected status the cost model's. The file is an array of 64-bit words; bench.cpp gives their
order.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig, read_design
from pynq_kgrc.accelerator.cost import task_cost
from pynq_kgrc.accelerator.header import STATUS
from pynq_kgrc.backends.emulation.backend import Emulation
from pynq_kgrc.backends.image import build_image, encode_map, slot_beat
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.compress.patterns import Rates, project
from pynq_kgrc.graph import (
    ADD,
    CONV,
    INPUT,
    MAX_POOL,
    ClipSpec,
    ConvShape,
    Graph,
    Layer,
    Size,
    WindowShape,
)
from pynq_kgrc.program import Program
from pynq_kgrc.quant import Array, ceil_div

MAGIC = int.from_bytes(b"KGRCVEC1", "little")

ONE = (1, 1, 1)
CLIP = (5, 15, 15)


def random_graph(config: AcceleratorConfig, rng: np.random.Generator) -> Graph:
    """A network with a layer of each kind, its weights pruned in the design's kernel groups."""
    layers = [Layer("clip", INPUT, (), 3, CLIP)]
    size = config.group_size

    def convolve(
        name: str,
        filters: int,
        kernel: Size,
        stride: Size = ONE,
        pad: Size = (0, 0, 0),
        rates: Rates | None = None,
    ) -> None:
        source = layers[-1]
        shape = ConvShape(source.channels, source.size, kernel, stride, pad, pad, filters)
        weight = rng.normal(0, 1, (filters, source.channels, *kernel)).astype(np.float32)
        if rates is not None:
            weight = project(weight, rates, size)
            weight[: size.gm, : size.gn] = 0  # a group that is not enabled
        bias = rng.normal(0, 1, filters)
        layers.append(
            Layer(name, CONV, (source.name,), filters, shape.out_size, shape, weight, bias, "relu")
        )

    def pool(name: str, *window: Size) -> None:
        source = layers[-1]
        shape = WindowShape(source.channels, source.size, *window)
        layers.append(Layer(name, MAX_POOL, (source.name,), source.channels, shape.out_size, shape))

    rows, cols = Rates(rows=Fraction(1, 2)), Rates(cols=Fraction(2, 3))
    both = Rates(rows=Fraction(1, 2), cols=Fraction(2, 3))
    convolve("tiles", 17, (3, 3, 3), pad=ONE, rates=cols)
    pool("fused", (1, 2, 2), (1, 2, 2))
    convolve("strided", 24, (3, 3, 3), (2, 2, 2), ONE, both)
    body = layers[-1]
    convolve("thin", 24, (3, 1, 1), pad=(1, 0, 0), rates=rows)
    layers.append(Layer("sum", ADD, ("thin", body.name), 24, body.size, activation="relu"))
    pool("overlapping", (3, 3, 3), (1, 1, 1), ONE, ONE)
    convolve("wide", 2 * config.tm + 1, ONE)
    convolve("classes", 11, layers[-1].size)
    clip = ClipSpec(CLIP[0], CLIP[1], CLIP[2], CLIP[1])
    return Graph("vectors", tuple(layers), "classes", clip)


def random_program(config: AcceleratorConfig, seed: int) -> Program:
    """The random network compiled for a design."""
    rng = np.random.default_rng(seed)
    graph = random_graph(config, rng)
    clips = [np.clip(rng.normal(0, 0.5, (3, *CLIP)), -1, 1).astype(np.float32) for _ in range(2)]
    return lower(choose_quant(graph, clips, config.bits, "minmax"), config, fold=False)


def vectors(config: AcceleratorConfig, seed: int = 0) -> Array:
    """The 64-bit words of the file, uint64."""
    program = random_program(config, seed)
    image = build_image(program)
    maps = np.zeros(ceil_div(program.arena_bytes, 64) * 64 + 64, np.uint8)
    codes = np.random.default_rng(seed).integers(
        program.input.min, program.input.max + 1, (3, *CLIP)
    )
    codes = codes.astype(program.input.dtype)
    raw = encode_map(config, codes, program.buffers[program.source.buffer].bits)
    start = slot_beat(program, program.source, "clip") * config.beat_bytes
    maps[start : start + raw.size] = raw
    memory = [maps.view(np.uint64), image.weights, image.tables]
    head = [MAGIC, int(config.digest, 16), len(program.tasks), *(part.size for part in memory)]
    parts = [np.array(head, np.uint64), *memory]
    emulation = Emulation(config)
    emulation.load(program)
    emulation.write(program.source, codes)
    for number, task in enumerate(program.tasks):
        emulation.run(number, number + 1)
        found = emulation.read(task.target, task.shape.out_channels, task.out_size)
        bits = program.buffers[task.target.buffer].bits
        wanted = encode_map(config, found, bits).view(np.uint64)
        # the padding of a map to whole vectors and beats may hold any value
        known = encode_map(config, np.full_like(found, -1), bits).view(np.uint64)
        words = {"done": 1, "clocks": 0, **asdict(task_cost(config, program.work(task)))}
        status = [words[name] for name in STATUS]
        at = slot_beat(program, task.target, task.name) * config.beat_bytes // 8
        parts += [np.array([*status, at, wanted.size], np.uint64), wanted, known]
    emulation.close()
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--design", default="8-sparse", help="a name, or the JSON file of a design")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    words = vectors(read_design(chosen.design), chosen.seed)
    beside = chosen.output.with_name(f".{chosen.output.name}.part")
    beside.write_bytes(words.astype("<u8").tobytes())
    beside.replace(chosen.output)


if __name__ == "__main__":
    main()
