"""What the PYNQ driver costs beside the device's own time, over the simulated board.

The board is simulated on this computer: its kernel is the C-simulation, whose own time is
subtracted. What remains is the time of the driver, of pynq, and of the simulated registers, which
are Python. Each figure is the median over the rounds. Nothing here was measured on a ZCU102.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "host_tests"))

LIMIT_MS = 2.0


def measure(program, rounds):
    """Median milliseconds of each call: run (without the device's time), write and read."""
    from pynq_kgrc.backends.board.backend import BoardBackend
    from pynq_kgrc.backends.board.simulated import shared_device

    rng = np.random.default_rng(0)
    buffer = program.buffers[program.source.buffer]
    shape = (program.tasks[0].shape.channels, *buffer.size)
    codes = rng.integers(-100, 100, shape).astype(program.input.dtype)
    last = program.tasks[-1]
    times = {"run": [], "write": [], "read": []}
    device = shared_device()
    with BoardBackend(program.config, device=device, floor_seconds=600) as board:
        board.load(program)
        for _ in range(rounds + 1):
            began = time.perf_counter()
            board.write(program.source, codes)
            written = time.perf_counter()
            busy = device.kernel.busy_seconds
            board.run()
            ran = time.perf_counter()
            board.read(program.target, last.shape.out_channels, last.out_size)
            times["write"].append(written - began)
            times["run"].append(ran - written - (device.kernel.busy_seconds - busy))
            times["read"].append(time.perf_counter() - ran)
    return {name: 1e3 * statistics.median(found[1:]) for name, found in times.items()}


def chain(layers):
    """A program of `layers` small convolutions in a row."""
    from networks import Net, compiled

    net = Net(size=(2, 4, 4))
    name = "clip"
    for _ in range(layers):
        name = net.conv(name, 4)
    return compiled(net)[0]


def c3d():
    """C3D at 8 bits with the KGRC recipe, on random frames."""
    from test_networks import seeded_graph

    from pynq_kgrc.accelerator.config import preset
    from pynq_kgrc.compiler.network import compile_graph
    from pynq_kgrc.compress.patterns import recipe

    graph = seeded_graph("c3d")
    clip = graph.clip
    shape = (clip.frames, clip.height, clip.width, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    return compile_graph(graph, [frames], preset("8-sparse"), recipe("c3d", "kgrc"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--no-c3d", action="store_true", help="only chains of small layers")
    options = parser.parse_args()
    os.environ["PYNQ_KGRC_SIMULATE"] = "1"
    print("network       tasks  run less device, ms   write, ms   read, ms")
    worst = 0.0
    programs = [(f"chain of {n}", lambda n=n: chain(n), options.rounds) for n in options.layers]
    if not options.no_c3d:
        programs.append(("C3D, KGRC", c3d, min(5, options.rounds)))
    for name, make, rounds in programs:
        program = make()
        found = measure(program, rounds)
        worst = max(worst, found["run"])
        print(
            f"{name:12}  {len(program.tasks):5}  {found['run']:19.2f}  {found['write']:10.2f}  "
            f"{found['read']:9.2f}",
            flush=True,
        )
    print(
        f"write and read include the encoding of maps, and copies in place of cache flushes;\n"
        f"limit for run: {LIMIT_MS} ms"
    )
    return int(worst > LIMIT_MS)


if __name__ == "__main__":
    raise SystemExit(main())
