"""Write test vectors of a design for bench.cpp: a small random program and its expected results.

``python vectors.py --design 8-sparse -o build/8-sparse/vectors.bin``

The program is `known_answers.random_program`, with a layer of each kind. The expected outputs are
the emulation's, the expected status the cost model's. The file is an array of 64-bit words;
bench.cpp gives their order.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig, read_design
from pynq_kgrc.accelerator.cost import task_cost
from pynq_kgrc.accelerator.header import STATUS
from pynq_kgrc.analysis.known_answers import answer, random_codes, random_program
from pynq_kgrc.backends.image import build_image, encode_map, slot_beat
from pynq_kgrc.quant import Array, ceil_div

MAGIC = int.from_bytes(b"KGRCVEC1", "little")


def vectors(config: AcceleratorConfig, seed: int = 0) -> Array:
    """The 64-bit words of the file, uint64."""
    program = random_program(config, seed)
    image = build_image(program)
    maps = np.zeros(ceil_div(program.arena_bytes, 64) * 64 + 64, np.uint8)
    codes = random_codes(program, seed)
    raw = encode_map(config, codes, program.buffers[program.source.buffer].bits)
    start = slot_beat(program, program.source, "clip") * config.beat_bytes
    maps[start : start + raw.size] = raw
    memory = [maps.view(np.uint64), image.weights, image.tables]
    head = [MAGIC, int(config.digest, 16), len(program.tasks), *(part.size for part in memory)]
    parts = [np.array(head, np.uint64), *memory]
    (outputs,) = answer("vectors", program, [codes]).outputs
    for task, found in zip(program.tasks, outputs, strict=True):
        bits = program.buffers[task.target.buffer].bits
        wanted = encode_map(config, found, bits).view(np.uint64)
        # the padding of a map to whole vectors and beats may hold any value
        known = encode_map(config, np.full_like(found, -1), bits).view(np.uint64)
        words = {"done": 1, "clocks": 0, **asdict(task_cost(config, program.work(task)))}
        status = [words[name] for name in STATUS]
        at = slot_beat(program, task.target, task.name) * config.beat_bytes // 8
        parts += [np.array([*status, at, wanted.size], np.uint64), wanted, known]
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
