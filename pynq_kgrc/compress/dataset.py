"""Labelled videos for training: read an index, decode each video once into a memory-mapped array.

A data set is a folder of videos with an ``index.csv``: columns file, label (0-based) and split;
the optional columns `class` (the label's name) and `subject` (who acts) are read too.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from pynq_kgrc.errors import DataError, VideoError
from pynq_kgrc.graph import TRAINING_SAMPLING, ClipSpec
from pynq_kgrc.quant import Array
from pynq_kgrc.storage import written_beside
from pynq_kgrc.video import load_clip, load_windows

INDEX = "index.csv"
COLUMNS = ("file", "label", "split")
CACHE_VERSION = 1


@dataclass(frozen=True)
class Sample:
    """One labelled video."""

    file: str
    """Path relative to the folder of the index."""
    label: int
    split: str
    subject: str = ""


@dataclass(frozen=True)
class VideoSet:
    """The videos of a folder, in the order of its index."""

    folder: Path
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    """Names by label; the labels themselves if the index has no column `class`."""

    def only(self, split: str) -> VideoSet:
        """The videos of one split.

        Raises:
            DataError: the index has no such split.
        """
        chosen = tuple(sample for sample in self.samples if sample.split == split)
        if not chosen:
            known = ", ".join(sorted({sample.split for sample in self.samples}))
            raise DataError(f"{self.folder / INDEX} has no split {split!r}; it has {known}")
        return replace(self, samples=chosen)


def read_index(folder: str | Path, classes: Sequence[str] = ()) -> VideoSet:
    """The data set of a folder.

    Args:
        folder: holds index.csv and the videos it names.
        classes: names of the labels; by default those of the column `class`, or the numbers from
            0 to the largest label.

    Raises:
        DataError: no index, a missing column, videos that are missing or outside the folder,
            labels that are no numbers or out of range. No video is decoded here.
    """
    folder = Path(folder)
    path = folder / INDEX
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: no index of videos can be read ({error})") from error
    lacking = [name for name in COLUMNS if name not in columns]
    if lacking:
        raise DataError(f"{path} lacks the columns {', '.join(lacking)}; it has {list(columns)}")
    if not rows:
        raise DataError(f"{path} names no video")
    samples = tuple(_sample(path, number, row) for number, row in enumerate(rows, 2))
    names = tuple(classes) or _class_names(rows, samples)
    for number, sample in enumerate(samples, 2):
        if not 0 <= sample.label < len(names):
            raise DataError(
                f"{path}, line {number}: label {sample.label} of {sample.file} is out of range; "
                f"accepted are 0 to {len(names) - 1}"
            )
    missing = [s.file for s in samples if not (folder / s.file).is_file()]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(f"{path} names {len(missing)} videos that are not there: {first}")
    return VideoSet(folder, samples, names)


def _sample(path: Path, number: int, row: dict[str, str]) -> Sample:
    file, label = row["file"] or "", row["label"] or ""
    if not label.strip().isdigit():
        raise DataError(f"{path}, line {number}: label {label!r} is not a number of 0 or more")
    if not file or Path(file).is_absolute() or ".." in Path(file).parts:
        raise DataError(f"{path}, line {number}: {file!r} is not a file inside the folder")
    return Sample(file, int(label), row["split"] or "", row.get("subject") or "")


def _class_names(rows: list[dict[str, str]], samples: tuple[Sample, ...]) -> tuple[str, ...]:
    count = max(sample.label for sample in samples) + 1
    named = {s.label: row["class"] for s, row in zip(samples, rows, strict=True) if "class" in row}
    return tuple(named.get(label, str(label)) for label in range(count))


@dataclass(frozen=True, eq=False)
class Clips:
    """Decoded clips and their labels."""

    frames: Array
    """[clips, D, H, W, 3] uint8 RGB, memory-mapped: only what is used is read."""
    labels: Array
    """[clips] int64."""

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Array, int]]:
        for frames, label in zip(self.frames, self.labels, strict=True):
            yield np.ascontiguousarray(frames), int(label)


def video_windows(videos: VideoSet, spec: ClipSpec) -> Iterator[tuple[Iterator[Array], int]]:
    """The windows of each video, as frames [D, H, W, 3] that are decoded one by one, and its label.

    Raises:
        VideoError: while the windows are taken: a video that cannot be decoded.
    """
    for sample in videos.samples:
        windows = load_windows(videos.folder / sample.file, spec)
        yield (clip.frames for clip in windows), sample.label


def load_clips(
    videos: VideoSet,
    spec: ClipSpec,
    cache: str | Path,
    sampling: str = TRAINING_SAMPLING,
    workers: int = 2,
    say: Callable[[str], None] = lambda message: None,
) -> Clips:
    """One clip of each video: decoded on the first call, memory-mapped from `cache` afterwards.

    The name of the cache file is a digest of the index, the sizes of the videos, the clip and the
    sampling, so that a changed video set gets another file. Its bytes are checked against their
    SHA-256; a damaged file is reported and decoded again.

    Args:
        videos: what to decode.
        spec: frames and size of the clips.
        cache: a folder; it is created.
        sampling: "uniform" over each video, or "centre".
        workers: videos decoded at a time.
        say: receives messages: decoding starts, a file is damaged.

    Raises:
        DataError: a video that cannot be decoded, or a cache that cannot be written.
    """
    path = Path(cache) / f"{_key(videos, spec, sampling)}.npy"
    shape = (len(videos.samples), spec.frames, spec.height, spec.width, 3)
    labels = np.array([sample.label for sample in videos.samples], np.int64)
    if path.exists():
        fault = _fault(path, shape)
        if not fault:
            return Clips(np.load(path, mmap_mode="r"), labels)
        say(f"{path} is damaged ({fault}); decoding again")
    say(f"decoding {shape[0]} videos of {videos.folder} into {path}")
    try:
        _decode(videos, spec, sampling, workers, path, shape)
    except OSError as error:
        raise DataError(f"{path}: the cache cannot be written ({error})") from error
    return Clips(np.load(path, mmap_mode="r"), labels)


def _key(videos: VideoSet, spec: ClipSpec, sampling: str) -> str:
    """The cache file's name, 20 hex digits; without mean and std: the cache holds pixels."""
    window = (spec.frames, spec.height, spec.width, spec.short_side, spec.step, spec.rate)
    listing = [(s.file, (videos.folder / s.file).stat().st_size) for s in videos.samples]
    document = json.dumps([CACHE_VERSION, str(videos.folder.resolve()), window, sampling, listing])
    return hashlib.sha256(document.encode()).hexdigest()[:20]


def _decode(
    videos: VideoSet,
    spec: ClipSpec,
    sampling: str,
    workers: int,
    path: Path,
    shape: tuple[int, ...],
) -> None:
    def clip(sample: Sample) -> Array:
        try:
            return load_clip(videos.folder / sample.file, spec, sampling).frames
        except VideoError as error:
            raise DataError(f"{videos.folder / INDEX}: {error}") from error

    with written_beside(path) as beside, ThreadPoolExecutor(workers) as pool:
        mapped = np.lib.format.open_memmap(beside, "w+", np.uint8, shape)  # type: ignore[no-untyped-call]
        try:
            for i, frames in enumerate(pool.map(clip, videos.samples)):
                mapped[i] = frames
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        mapped.flush()
        digest = hashlib.sha256(mapped.data).hexdigest()
        del mapped
    note = {"sha256": digest, "shape": shape, "clip": asdict(spec), "folder": str(videos.folder)}
    with written_beside(path.with_suffix(".json")) as beside:
        beside.write_text(json.dumps(note, indent=1), "utf-8")


def _fault(path: Path, shape: tuple[int, ...]) -> str:
    """What is wrong with a cache file; empty if it is whole."""
    try:
        expected = json.loads(path.with_suffix(".json").read_text("utf-8"))["sha256"]
        mapped = np.load(path, mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        return str(error) or type(error).__name__
    if mapped.shape != shape or mapped.dtype != np.uint8:
        return f"{mapped.dtype} of {mapped.shape} instead of uint8 of {shape}"
    if hashlib.sha256(np.ascontiguousarray(mapped).data).hexdigest() != expected:
        return "its bytes do not match their SHA-256"
    return ""
