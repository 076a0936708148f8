"""Programs of published networks, made without torch: on a board, and without a clip.

The graph comes from the weights alone (`models.pretrained`), the ranges of its tensors from a file
that ships with the package. They were chosen on the two calibration videos of `examples/clips`, so
the program is the one that ``pynq-kgrc compile`` makes of the same weights and videos with torch.

``python -m pynq_kgrc.samples i3d-kinetics400`` chooses the ranges again, for a release.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import safetensors.numpy

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compiler.retarget import retarget
from pynq_kgrc.compress.calibrate import Ranges, apply_ranges, choose_ranges
from pynq_kgrc.errors import ModelError, ProgramError
from pynq_kgrc.graph import Graph
from pynq_kgrc.models.pretrained import RELEASES, pull, read_labels
from pynq_kgrc.program import Program, cached_program, load, named_programs
from pynq_kgrc.quant import Array
from pynq_kgrc.version import VERSION

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
    return (*named_programs(), *RELEASES)


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
    shipped = named_programs()
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
    cached = cached_release(name, config)
    if cached is not None:
        return cached
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
    path = cached_program(f"{name}-{config.digest}-{VERSION}")
    lower(quantized, config).save(path)
    return path


def cached_release(name: str, config: AcceleratorConfig) -> Path | None:
    """The program of `released_program` if it is in the cache and whole, else None."""
    path = cached_program(f"{name}-{config.digest}-{VERSION}")
    return path if _is_for(path, config) else None


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
    path = ranges_file(name)
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


def describe_ranges(
    name: str, graph: Graph, videos: Mapping[Path, Array], bits: Sequence[int]
) -> bytes:
    """The contents of `ranges_file`: ranges chosen on one clip of each video.

    Args:
        name: one of `models.pretrained.RELEASES`.
        graph: its float graph (`released_graph`).
        videos: each video, and the frames [D, H, W, 3] of a clip of it.
        bits: the widths.
    """
    clips = [graph.clip.normalise(frames) for frames in videos.values()]
    stored = StoredRanges(
        RELEASES[name].member_sha256,
        {video.name: hashlib.sha256(video.read_bytes()).hexdigest() for video in videos},
        f"pynq_kgrc {VERSION}, numpy {np.__version__}",
        tuple(choose_ranges(graph, clips, width) for width in bits),
    )
    return msgspec.json.format(msgspec.json.encode(stored), indent=1) + b"\n"


def ranges_file(name: str) -> Path:
    """The file of the stored ranges of a published network."""
    release = RELEASES[name]
    return release.ranges or release.labels.parent.with_name("programs") / f"{name}.ranges.json"


def _is_for(path: Path, config: AcceleratorConfig) -> bool:
    """Whether the file is a whole program for the design."""
    try:
        program: Program = load(path)
    except ProgramError:
        return False
    return program.config.digest == config.digest
