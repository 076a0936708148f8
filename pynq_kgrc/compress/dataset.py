"""Labelled videos for training: read an index, decode every video once into a mapped array.

A data set is a folder of videos with an ``index.csv``: columns file, label (0-based) and split;
`class` (the label's name) and `subject` (who acts) are read where they are there.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from pynq_kgrc.errors import DataError, VideoError
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.quant import Array
from pynq_kgrc.storage import written_beside
from pynq_kgrc.video import load_clip

INDEX = "index.csv"
COLUMNS = ("file", "label", "split")
CACHE_VERSION = 1

TRAIN_SUBJECTS = ("1", "3", "5", "7")
TEST_SUBJECTS = ("2", "4", "6")
"""UTD-MHAD's cross-subject protocol, without subject 8, who is kept back."""


@dataclass(frozen=True)
class Sample:
    """One labelled video."""

    file: str
    """Relative to the folder of the index."""
    label: int
    split: str
    subject: str = ""


@dataclass(frozen=True)
class VideoSet:
    """The videos of a folder, in the order of its index."""

    folder: Path
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    """Names by label; numbers where the index has no column `class`."""

    def only(self, split: str) -> VideoSet:
        """The videos of one split.

        Raises:
            DataError: there is none.
        """
        chosen = tuple(sample for sample in self.samples if sample.split == split)
        if not chosen:
            known = ", ".join(sorted({sample.split for sample in self.samples}))
            raise DataError(f"{self.folder / INDEX} has no split {split!r}; it has {known}")
        return replace(self, samples=chosen)

    def by_subject(self, train: Collection[str], test: Collection[str]) -> VideoSet:
        """The videos of these people, split by person; those of others are left out.

        Raises:
            DataError: the index names no subjects, or a person is in both.
        """
        both = sorted(set(train) & set(test))
        if both:
            raise DataError(f"subjects {', '.join(both)} are both in train and in test")
        sides = dict.fromkeys(train, "train") | dict.fromkeys(test, "test")
        samples = tuple(
            replace(s, split=sides[s.subject]) for s in self.samples if s.subject in sides
        )
        if not samples:
            raise DataError(f"{self.folder / INDEX} has no video of a subject in {sorted(sides)}")
        return replace(self, samples=samples)


def read_index(folder: str | Path, classes: Sequence[str] = ()) -> VideoSet:
    """The data set of a folder.

    Args:
        folder: holds index.csv and the videos it names.
        classes: names of the labels; from the column `class` if there is one, else as many as
            the largest label asks for.

    Raises:
        DataError: no index, a column that it lacks, videos that are missing or lie outside the
            folder, labels that are no numbers or out of range. Nothing is decoded here.
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


def utd_mhad(folder: str | Path) -> VideoSet:
    """UTD-MHAD depth videos, cross-subject: 1, 3, 5, 7 to train and 2, 4, 6, never seen, to test.

    Raises:
        DataError: as `read_index`.
    """
    return read_index(folder).by_subject(TRAIN_SUBJECTS, TEST_SUBJECTS)


@dataclass(frozen=True, eq=False)
class Clips:
    """Decoded clips and what they show."""

    frames: Array
    """[clips, D, H, W, 3] uint8 RGB, mapped from a file: read only what you touch."""
    labels: Array
    """[clips] int64."""

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Array, int]]:
        for frames, label in zip(self.frames, self.labels, strict=True):
            yield np.ascontiguousarray(frames), int(label)


def load_clips(
    videos: VideoSet,
    spec: ClipSpec,
    cache: str | Path,
    sampling: str = "uniform",
    workers: int = 2,
    say: Callable[[str], None] = lambda message: None,
) -> Clips:
    """One clip of every video, decoded on the first call and mapped from `cache` after that.

    The file bears a digest of the index, the sizes of the videos, the clip and the sampling; a
    changed video set is another file. Its bytes are checked against their SHA-256; a damaged file
    is said so and made again.

    Args:
        videos: what to decode.
        spec: frames and size of the clips.
        cache: a folder; it is made.
        sampling: "uniform" over each video, or "centre".
        workers: videos decoded at a time.
        say: receives what takes time or went wrong.

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
    """20 hex digits: normalisation is no part of it, the cache holds pixels."""
    window = (spec.frames, spec.height, spec.width, spec.short_side, spec.step)
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
    """What is wrong with a cache file; nothing if it is whole."""
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
