"""Programs of published networks, made without torch: on a board, and without a clip.

The graph comes from the weights alone (`models.pretrained`), the ranges of its tensors from a file
that ships with the package. They were chosen on the two calibration videos of `examples/clips`, so
the program is the one that ``pynq-kgrc compile`` makes of the same weights and videos with torch.

``python -m pynq_kgrc.compiler.released`` chooses the ranges again, for a release; it needs the
videos and about two minutes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import safetensors.numpy

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compiler.retarget import retarget
from pynq_kgrc.compress.calibrate import Ranges, apply_ranges, choose_ranges
from pynq_kgrc.errors import ModelError, ProgramError
from pynq_kgrc.files import cached_program, find_folder, shipped_programs, written_beside
from pynq_kgrc.graph import Graph
from pynq_kgrc.models.pretrained import RELEASES, Release, pull, read_labels
from pynq_kgrc.program import Program, load
from pynq_kgrc.version import VERSION
from pynq_kgrc.video import load_clip

WIDTHS = (8, 16)
"""Bits of the stored ranges. At 4 bits a network has to be trained to keep its labels."""

STAGES = 3
"""How often `released_program` calls `progress` at most: weights, ranges, tasks."""


class StoredRanges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ranges of a published network, and where they come from."""

    weights_sha256: str
    """SHA-256 of the published checkpoint (`Release.member_sha256`)."""
    clips: dict[str, str]
    """File name -> SHA-256 of each video; of each, one clip from the middle was run."""
    made_with: str
    """Versions of this package and of numpy."""
    ranges: tuple[Ranges, ...]
    """One for each of `WIDTHS`."""


def program_names() -> tuple[str, ...]:
    """The names that `find_program` knows: programs that ship, and published networks."""
    return (*(path.stem for path in shipped_programs()), *RELEASES)


def find_program(
    name: str | Path,
    config: AcceleratorConfig,
    progress: Callable[[str], None] = lambda message: None,
) -> Path:
    """The path of a program: a file, or one of `program_names`.

    A file of that name comes first. A program that ships for another design of the same width is
    packed again for `config` (`retarget`); a published network is compiled for `config`.

    Raises:
        ModelError: as `released_program`.
        CompileError: the design cannot run the program.
    """
    path = Path(name)
    shipped = {each.stem: each for each in shipped_programs()}
    if path.suffix == ".kgrc" or path.exists() or str(name) not in program_names():
        return path
    if str(name) in RELEASES:
        return released_program(str(name), config, progress)
    program = load(shipped[str(name)])
    if program.config.digest == config.digest:
        return shipped[str(name)]
    path = cached_program(f"{name}-{config.digest}-{VERSION}")
    if not _is_for(path, config):
        progress(f"packing {name} for {config.name}")
        retarget(program, config).save(path)
    return path


def released_program(
    name: str,
    config: AcceleratorConfig,
    progress: Callable[[str], None] = lambda message: None,
) -> Path:
    """The path of a published network compiled for a design, made on the first call.

    The file is kept in the user's cache, by the design's digest and the package's version. It is
    used without a network; so are the weights, once they are in the cache.

    Args:
        name: one of `models.pretrained.RELEASES`.
        config: the design.
        progress: called with a line before each stage.

    Raises:
        ModelError: an unknown name, weights that cannot be fetched, no stored ranges for the
            design's bits; ranges of other weights.
        CompileError: the design cannot run the network.
    """
    if name not in RELEASES:
        raise ModelError(f"no published network {name!r}; there are {', '.join(RELEASES)}")
    path = cached_program(f"{name}-{config.digest}-{VERSION}")
    if _is_for(path, config):
        return path
    stored = read_ranges(name)
    found = {ranges.bits: ranges for ranges in stored.ranges}
    if config.bits not in found:
        raise ModelError(
            f"{name} has stored ranges for {' and '.join(map(str, found))} bits, and {config.name} "
            f"works on {config.bits}: at 4 bits a network has to be trained to keep its labels; "
            f"use a design of {' or '.join(map(str, found))} bits"
        )
    progress(f"weights of {name}")
    graph = released_graph(name, progress)
    progress("quantizing with stored ranges")
    quantized = apply_ranges(graph, found[config.bits])
    progress(f"compiling for {config.name}")
    lower(quantized, config).save(path)
    return path


def released_graph(name: str, progress: Callable[[str], None] = lambda message: None) -> Graph:
    """The float graph of a published network, with its weights and labels.

    Raises:
        ModelError: the weights cannot be fetched, are not the published ones, or are of a network
            that has no graph without torch.
    """
    release = RELEASES[name]
    if release.graph is None:
        raise ModelError(f"{name} has no graph without torch; use pynq-kgrc compile")
    state = safetensors.numpy.load_file(pull(name, progress=progress))
    return release.graph(state, read_labels(release.labels))


def read_ranges(name: str) -> StoredRanges:
    """The ranges that ship for a published network.

    Raises:
        ModelError: there are none, or they were chosen for other weights.
    """
    release = RELEASES[name]
    path = _ranges_file(name, release)
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=StoredRanges)
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelError(f"{path}: no ranges of {name} ({error}); install the package again") from (
            error
        )
    if stored.weights_sha256 != release.member_sha256:
        raise ModelError(
            f"{path}: the ranges were chosen for weights of sha256 {stored.weights_sha256}, not "
            f"for {release.member_sha256}; install the package again"
        )
    return stored


def write_ranges(name: str, graph: Graph, videos: list[Path], bits: tuple[int, ...]) -> Path:
    """Choose the ranges of a published network on one clip of each video, and store them."""
    release = RELEASES[name]
    frames = [load_clip(video, graph.clip).frames for video in videos]
    stored = StoredRanges(
        release.member_sha256,
        {video.name: hashlib.sha256(video.read_bytes()).hexdigest() for video in videos},
        f"pynq_kgrc {VERSION}, numpy {np.__version__}",
        tuple(choose_ranges(graph, map(graph.clip.normalise, frames), width) for width in bits),
    )
    path = _ranges_file(name, release)
    with written_beside(path) as beside:
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(stored), indent=1) + b"\n")
    return path


def _ranges_file(name: str, release: Release) -> Path:
    return release.ranges or release.labels.parent.with_name("programs") / f"{name}.ranges.json"


def _is_for(path: Path, config: AcceleratorConfig) -> bool:
    """Whether the file is a whole program for the design."""
    try:
        program: Program = load(path)
    except ProgramError:
        return False
    return program.config.digest == config.digest


if __name__ == "__main__":
    for each in RELEASES:
        clips = sorted((find_folder("clips") / "calibration").glob("*.avi"))
        print(write_ranges(each, released_graph(each), clips, WIDTHS))
