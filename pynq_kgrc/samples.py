"""Samples: the clips that ship with the project, and a program that runs on them."""

from __future__ import annotations

import csv
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compiler.released import (
    WIDTHS,
    describe_ranges,
    ranges_file,
    released_graph,
    released_program,
)
from pynq_kgrc.compiler.retarget import retarget
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.errors import CompileError, ModelError, VideoError
from pynq_kgrc.files import find_folder, shipped_programs, written_beside
from pynq_kgrc.graph import (
    AVERAGE_POOL,
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
from pynq_kgrc.program import Program, load
from pynq_kgrc.quant import Array
from pynq_kgrc.video import load_clip

PROGRAM = "PYNQ_KGRC_PROGRAM"
"""Environment variable that names a compiled .kgrc to use instead of the sample program."""

CLIP = ClipSpec(frames=16, height=64, width=64, short_side=64)

CLASSES = 10

VIDEOS = (".mp4", ".avi", ".gif")


def sample_videos() -> list[Path]:
    """The videos that ship with the project.

    Raises:
        VideoError: there are none.
    """
    folder = find_folder("clips")
    found = sorted(path for path in folder.glob("*.*") if path.suffix in VIDEOS)
    if not found:
        raise VideoError(
            f"{folder}: no video there ({', '.join(VIDEOS)}); the project ships with some"
        )
    return found


def calibration_videos() -> list[Path]:
    """The videos that ship with the project to calibrate on; none of them is in `sample_videos`."""
    return sorted((find_folder("clips") / "calibration").glob("*.avi"))


def sample_frames(spec: ClipSpec) -> list[Array]:
    """One clip of each calibration video: uint8 frames [D, H, W, 3]."""
    return [load_clip(path, spec).frames for path in calibration_videos()]


def depth_video() -> Path:
    """A depth video for the program `utd_mhad27`, of a person whom it was not trained on.

    It ships in `examples/clips/depth`, with its label in `index.csv`.
    """
    return next(iter(sorted((find_folder("clips") / "depth").glob("*.mp4"))))


def true_label(video: Path) -> str:
    """The label of a video that ships, from the `index.csv` beside it."""
    with (video.parent / "index.csv").open(encoding="utf-8", newline="") as file:
        labels = {row["file"]: row["label"] for row in csv.DictReader(file)}
    return labels[video.name]


def sample_program(config: AcceleratorConfig) -> Program:
    """A program to try things with.

    The first of these that there is: the program that PYNQ_KGRC_PROGRAM names, whatever its
    design; a program that ships with the project, packed for the design `config`; an untrained
    network, compiled for `config` (its labels say so), for a design that cannot run the former.

    Raises:
        ProgramError: PYNQ_KGRC_PROGRAM names a file that is no program.
    """
    if os.environ.get(PROGRAM):
        return load(os.environ[PROGRAM])
    for path in shipped_programs():
        program = load(path)
        if program.config.digest == config.digest:
            return program
        try:
            return retarget(program, config)
        except CompileError:
            continue  # another width, or a design that cannot run it
    graph = sample_graph()
    clips = (graph.clip.normalise(frames) for frames in sample_frames(graph.clip))
    return lower(choose_quant(graph, clips, config.bits), config)


def action_program(
    config: AcceleratorConfig, name: str = "i3d-kinetics400", tell: Callable[[str], None] = print
) -> Program:
    """A program whose labels for the videos that ship mean something.

    PYNQ_KGRC_PROGRAM's; else the published network `name`, made in numpy on the first call; else,
    without a network connection or for a design of 4 bits, `sample_program`.

    Args:
        config: the design.
        name: one of `models.pretrained.RELEASES`, or empty: `sample_program`.
        tell: receives a line for each stage, and why the published network is not used.
    """
    if name and not os.environ.get(PROGRAM):
        try:
            return load(released_program(name, config, tell))
        except ModelError as error:
            tell(f"not {name}: {error}")
    return sample_program(config)


def videos_of(program: Program) -> list[Path]:
    """The videos that ship and show an action of the program's labels; else the colour videos."""
    videos = [depth_video(), *sample_videos()]
    found = [video for video in videos if true_label(video) in program.labels]
    return found or sample_videos()


def sample_graph(width: int = 16, seed: int = 0) -> Graph:
    """A thin C3D with seeded random weights, made without torch. Its labels mean nothing.

    Args:
        width: filters of the first convolution.
        seed: of the random weights.
    """
    rng = np.random.default_rng(seed)
    layers = [Layer("clip", INPUT, (), 3, (CLIP.frames, CLIP.height, CLIP.width))]

    def conv(name: str, filters: int, kernel: Size, stride: Size, pad: Size, act: str) -> None:
        last = layers[-1]
        shape = ConvShape(last.channels, last.size, kernel, stride, pad, pad, filters=filters)
        spread = math.sqrt(2 / (last.channels * shape.taps))
        weight = rng.normal(0, spread, (filters, last.channels, *kernel)).astype(np.float32)
        bias = np.zeros(filters)
        where = (last.name,)
        layers.append(Layer(name, CONV, where, filters, shape.out_size, shape, weight, bias, act))

    def pool(name: str, op: str, kernel: Size) -> None:
        last = layers[-1]
        shape = WindowShape(last.channels, last.size, kernel, kernel)
        layers.append(Layer(name, op, (last.name,), last.channels, shape.out_size, shape))

    ones, threes = (1, 1, 1), (3, 3, 3)
    conv("conv1", width, (3, 5, 5), (1, 2, 2), (1, 2, 2), "relu")
    pool("pool1", MAX_POOL, (1, 2, 2))
    conv("conv2", 2 * width, threes, ones, ones, "relu")
    pool("pool2", MAX_POOL, (2, 2, 2))
    conv("conv3a", 4 * width, threes, ones, ones, "relu")
    conv("conv3b", 4 * width, threes, ones, ones, "relu")
    pool("pool3", MAX_POOL, (2, 2, 2))
    conv("conv4a", 8 * width, threes, ones, ones, "relu")
    conv("conv4b", 8 * width, threes, ones, ones, "relu")
    pool("pool4", AVERAGE_POOL, (1, *layers[-1].size[1:]))
    conv("fc", CLASSES, layers[-1].size, ones, (0, 0, 0), "none")
    labels = tuple(f"untrained class {i}" for i in range(CLASSES))
    return Graph("untrained thin C3D", tuple(layers), "fc", CLIP, labels)


def write_ranges(name: str, graph: Graph, videos: list[Path], bits: tuple[int, ...]) -> Path:
    """Choose the ranges of a published network on one clip of each video, and store them."""
    clips = {video: load_clip(video, graph.clip).frames for video in videos}
    path = ranges_file(name)
    with written_beside(path) as beside:
        beside.write_bytes(describe_ranges(name, graph, clips, bits))
    return path


if __name__ == "__main__":
    for each in sys.argv[1:]:
        print(write_ranges(each, released_graph(each), calibration_videos(), WIDTHS))
