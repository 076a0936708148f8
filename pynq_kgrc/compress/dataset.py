"""Labelled videos for training: list them, decode each video once into a memory-mapped array.

A data set is a folder in one of two layouts:

- videos and an ``index.csv`` of the columns file, label and split. Labels are numbers from 0, or
  names. The optional columns `class` (the name of a numbered label) and `subject` (who acts) are
  read too.
- a folder for each class: ``class/video.mp4``, or ``train/class/video.mp4`` and
  ``test/class/video.mp4``.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pynq_kgrc.errors import DataError, VideoError
from pynq_kgrc.files import written_beside
from pynq_kgrc.graph import TRAINING_SAMPLING, ClipSpec
from pynq_kgrc.quant import Array
from pynq_kgrc.video import load_clip, load_windows

INDEX = "index.csv"
COLUMNS = ("file", "label", "split")
DELIMITERS = ",;\t|"
CACHE_VERSION = 2
CONTENTS = "contents"
"""In the folder of the cache: digests of files that were read before."""

SCRATCH = ".decoding-"
"""In the folder of the cache: the beginning of the names of folders of unfinished files."""

STALE_SECONDS = 7 * 24 * 3600
"""An unfinished file of this age is removed."""

ALL = "all"
"""The split that holds every video, unless an index has a split of this name."""

TEST_SHARE = 5
"""Of a folder of classes without train/ and test/, every fifth video of a class is for testing."""

MAX_LABEL = 99_999

VIDEOS = {
    *(".mp4", ".m4v", ".mov", ".3gp", ".avi", ".mkv", ".webm", ".gif", ".ts", ".mts", ".m2ts"),
    *(".mpg", ".mpeg", ".wmv", ".flv", ".ogv"),
}
"""Suffixes that are taken for videos in a folder of classes, readable or not."""

LAYOUTS = (
    "a data set is a folder with an index.csv of the columns file, label, split, or a folder for "
    "each class: CLASS/video.mp4, or train/CLASS/video.mp4 and test/CLASS/video.mp4"
)

Say = Callable[[str], None]


def _silent(message: str) -> None:
    pass


@dataclass(frozen=True)
class Sample:
    """One labelled video."""

    file: str
    """Path relative to the folder of the index."""
    label: int
    split: str
    subject: str = ""
    line: int = 0
    """Its line in the index; 0 if there is no index."""


@dataclass(frozen=True)
class VideoSet:
    """The videos of a folder, in the order of its index."""

    folder: Path
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    """Names by label; a label without a name has its number as its name."""

    def only(self, split: str) -> VideoSet:
        """The videos of one split; all videos for "all".

        Raises:
            DataError: there is no such split.
        """
        chosen = tuple(sample for sample in self.samples if sample.split == split)
        if not chosen and split == ALL:
            return self
        if not chosen:
            known = ", ".join(sorted({sample.split for sample in self.samples}))
            raise DataError(f"{self._place} has no split {split!r}; it has {known}")
        return replace(self, samples=chosen)

    def named_by(self, names: Sequence[str], owner: str) -> VideoSet:
        """The same videos with the labels of a network: matched by name where both have names.

        Args:
            names: the network's classes by number; numbers as text, or nothing, if it has no names.
            owner: the network or program, for messages.

        Raises:
            DataError: a name that the network does not have, or a set in which only some labels
                have names, which contradict its numbers.
        """
        target = [_normal(name) for name in names]
        used = {sample.label: sample for sample in reversed(self.samples)}  # the first of each
        named = [label for label in used if self.classes[label] != str(label)]
        if not names or all(name == str(i) for i, name in enumerate(target)) or not named:
            for label, sample in used.items():
                if names and label >= len(names):
                    raise DataError(
                        f"{self._where(sample)}: label {label} of {sample.file} is not one of the "
                        f"{len(names)} classes of {owner}; accepted are 0 to {len(names) - 1}"
                    )
            own = not names or (named and len(names) == len(self.classes))
            return replace(self, classes=self.classes if own else tuple(names))
        unknown = [label for label in named if self.classes[label] not in target]
        if unknown:
            raise DataError("; ".join(self._unknown(used[i], target, owner) for i in unknown[:5]))
        places = {label: target.index(self.classes[label]) for label in named}
        moved = [label for label in named if places[label] != label]
        for label, sample in used.items():
            if label in places:
                continue
            if moved or label >= len(names):
                raise DataError(
                    f"{self._where(sample)}: label {label} of {sample.file} has no name, and "
                    f"{self.classes[(moved or named)[0]]!r} has another number in {owner}; give "
                    f"every label its name in the column class"
                )
            places[label] = label
        samples = tuple(replace(s, label=places[s.label]) for s in self.samples)
        return replace(self, samples=samples, classes=tuple(names))

    def _unknown(self, sample: Sample, names: list[str], owner: str) -> str:
        name = self.classes[sample.label]
        close = difflib.get_close_matches(name, names, 3) or names[:3]
        return (
            f"{self._where(sample)}: the class {name!r} of {sample.file} is not one of the "
            f"{len(names)} classes of {owner}, which are {', '.join(map(repr, close))}, ..."
        )

    def _where(self, sample: Sample) -> str:
        return f"{self.folder / INDEX}, line {sample.line}" if sample.line else str(self.folder)

    @property
    def _place(self) -> Path:
        return self.folder / INDEX if any(s.line for s in self.samples) else self.folder


def read_index(
    folder: str | Path, classes: Sequence[str] = (), skip_bad: bool = False, say: Say = _silent
) -> VideoSet:
    """The data set of a folder. No video is decoded here.

    Args:
        folder: holds index.csv and the videos it names, or a folder for each class.
        classes: names of the labels; by default those of the column `class` or of the label
            column in alphabetical order, or the numbers from 0 to the largest label.
        skip_bad: go on without the videos that are not there.
        say: receives messages: how the videos were divided, which are not there.

    Raises:
        DataError: neither an index nor folders of classes, a missing column, videos that are
            missing or outside the folder, labels that are neither numbers in range nor names, or
            lines that contradict each other.
    """
    folder = Path(folder)
    path = folder / INDEX
    if not path.exists():
        return _read_folders(folder, classes, say)
    rows = _rows(path)
    samples, found = _labelled(path, rows, [_normal(name) for name in classes])
    _check_agreement(path, samples)
    missing = [s for s in samples if not os.path.isfile(folder / s.file)]  # also a name too long
    if missing:
        first = ", ".join(s.file for s in missing[:3]) + (", ..." if len(missing) > 3 else "")
        told = f"{path} names {len(missing)} videos that are not there: {first}"
        if not skip_bad or len(missing) == len(samples):
            raise DataError(told)
        say(f"{told}; going on without")
        gone = set(missing)
        samples = [s for s in samples if s not in gone]
    return VideoSet(folder, tuple(samples), found)


@dataclass(frozen=True)
class _Row:
    """A line of an index."""

    line: int
    file: str
    label: str
    split: str
    name: str
    subject: str


def _rows(path: Path) -> list[_Row]:
    """The lines of an index: comma, semicolon, tab or bar between cells; UTF-8 or UTF-16."""
    try:
        data = path.read_bytes()
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = data.decode("utf-16" if wide else "utf-8-sig")  # without the byte order mark
        first = text.lstrip().partition("\n")[0]
        delimiter = max(DELIMITERS, key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: no index of videos can be read ({error}); it has to be CSV in UTF-8"
        ) from error
    header = [name.strip().casefold() for name in lines[0][1]] if lines else []
    wanted = [c for c in COLUMNS if c not in header and not (c == "label" and "class" in header)]
    if wanted:
        raise DataError(f"{path} lacks the columns {', '.join(wanted)}; it has {header}")
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        raise DataError(f"{path} has the column {twice[0]!r} twice")
    if len(lines) == 1:
        raise DataError(f"{path} names no video")
    rows = []
    for line, cells in lines[1:]:
        if len(cells) > len(header):
            raise DataError(
                f"{path}, line {line}: {len(cells)} cells under {len(header)} columns; put a cell "
                f"that holds {delimiter!r} in double quotes"
            )
        row = dict(zip(header, cells, strict=False))
        label, name = row.get("label", "").strip(), _normal(row.get("class", ""))
        file, split = row.get("file", ""), row.get("split", "").strip()
        if "label" not in header:
            label, name = name, ""
        if not file or Path(file).is_absolute() or ".." in Path(file).parts:
            raise DataError(f"{path}, line {line}: {file!r} is not a file inside the folder")
        rows.append(_Row(line, file, label, split, name, row.get("subject", "").strip()))
    return rows


def _labelled(
    path: Path, rows: list[_Row], classes: list[str]
) -> tuple[list[Sample], tuple[str, ...]]:
    """The samples of an index, and the names of their classes."""
    for row in rows:
        if not row.label:
            raise DataError(f"{path}, line {row.line}: {row.file} has no label")
    numbered = [row for row in rows if _is_number(row.label)]
    # a class may be called "2" only where every label is a number
    if not numbered and not any(_looks_numeric(row.label) for row in rows):
        names = classes or sorted({_normal(row.label) for row in rows})
        for row in rows:
            if _normal(row.label) not in names:
                raise DataError(
                    f"{path}, line {row.line}: label {row.label!r} of {row.file} is not one of the "
                    f"classes {', '.join(names[:5])}"
                )
            if row.name and row.name != _normal(row.label):
                raise DataError(
                    f"{path}, line {row.line}: label {row.label!r} and class {row.name!r} differ"
                )
        labels = {name: i for i, name in enumerate(names)}
        found = [Sample(r.file, labels[_normal(r.label)], r.split, r.subject, r.line) for r in rows]
        return found, tuple(names)
    for row in rows:
        if not _is_number(row.label):
            raise DataError(
                f"{path}, line {row.line}: label {row.label!r} is not a number of 0 or more in the "
                f"digits 0 to 9; a label is such a number, or all labels are names"
            )
        if len(row.label) > 18 or int(row.label) > MAX_LABEL:
            raise DataError(
                f"{path}, line {row.line}: label {row.label} of {row.file} is out of range; "
                f"accepted are 0 to {MAX_LABEL}"
            )
    found = [Sample(r.file, int(r.label), r.split, r.subject, r.line) for r in rows]
    names = classes or _class_names(path, rows)
    for sample in found:
        if sample.label >= len(names):
            raise DataError(
                f"{path}, line {sample.line}: label {sample.label} of {sample.file} is out of "
                f"range; accepted are 0 to {len(names) - 1}"
            )
    return found, tuple(names)


def _class_names(path: Path, rows: list[_Row]) -> list[str]:
    """The column `class` by label.

    Raises:
        DataError: a label with two names, or a name with two labels.
    """
    names: dict[int, _Row] = {}
    labels: dict[str, _Row] = {}
    for row in rows:
        if not row.name:
            continue
        before = names.setdefault(int(row.label), row)
        if before.name != row.name:
            raise DataError(
                f"{path}: label {row.label} is {before.name!r} in line {before.line} and "
                f"{row.name!r} in line {row.line}"
            )
        before = labels.setdefault(row.name, row)
        if int(before.label) != int(row.label):
            raise DataError(
                f"{path}: the class {row.name!r} has label {before.label} in line {before.line} "
                f"and {row.label} in line {row.line}"
            )
    count = max(int(row.label) for row in rows) + 1
    found = [names[i].name if i in names else str(i) for i in range(count)]
    for i, name in enumerate(found):
        if i not in names and name in labels:
            raise DataError(
                f"{path}, line {labels[name].line}: the class {name!r} has label "
                f"{labels[name].label}, and label {i} has no name"
            )
    return found


def _check_agreement(path: Path, samples: Iterable[Sample]) -> None:
    """Refuse a file with two labels, and one that is in two splits."""
    seen: dict[str, Sample] = {}
    for sample in samples:
        before = seen.setdefault(os.path.normpath(sample.file), sample)
        for what, one, other in (
            ("the label", before.label, sample.label),
            ("the split", before.split, sample.split),
        ):
            if one != other:
                raise DataError(
                    f"{path}: {sample.file} has {what} {one} in line {before.line} and {other} in "
                    f"line {sample.line}"
                )


def _normal(name: str) -> str:
    """A name as it is compared: composed characters (NFC), no blanks around it."""
    return unicodedata.normalize("NFC", name).strip()


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _looks_numeric(text: str) -> bool:
    """Also " 1.0", "-1", "1e3", "nan", and digits of other scripts or raised ones."""
    try:
        float(unicodedata.normalize("NFKC", text))
    except ValueError:
        return False
    return True


def _read_folders(folder: Path, classes: Sequence[str], say: Say) -> VideoSet:
    """The data set of a folder for each class, below train/, test/, ... if there is a train/."""
    try:
        split_folders = _folders(folder) if (folder / "train").is_dir() else []
        if split_folders:
            places = [(part.name, one) for part in split_folders for one in _folders(part)]
        else:
            places = [("", one) for one in _folders(folder)]
        found: dict[Path, list[Path]] = {}
        others = 0
        for _, place in places:
            below = [f for f in sorted(place.rglob("*")) if f.is_file() and f.name[0] != "."]
            found[place] = [f for f in below if f.suffix.lower() in VIDEOS]
            others += len(below) - len(found[place])
    except OSError as error:
        raise DataError(f"{folder}: no videos can be listed ({error}); {LAYOUTS}") from error
    places = [(split, place) for split, place in places if found[place]]
    if not places:
        raise DataError(f"{folder}: no index of videos and no folder of videos; {LAYOUTS}")
    names = [_normal(n) for n in classes] or sorted({_normal(place.name) for _, place in places})
    samples = []
    for split, place in places:
        name = _normal(place.name)
        if name not in names:
            raise DataError(f"{place} is not one of the classes {', '.join(names[:5])}")
        files = [video.relative_to(folder).as_posix() for video in found[place]]
        tested = set() if split else _test_files(files)
        for file in files:
            part = split or ("test" if file in tested else "train")
            samples.append(Sample(file, names.index(name), part))
    counts = Counter(sample.split for sample in samples)
    told = ", ".join(f"{count} {split}" for split, count in sorted(counts.items()))
    how = (
        "" if split_folders else "; without train/ and test/, a fifth of each class is for testing"
    )
    ignored = f"; {others} files are not videos" if others else ""
    say(f"{folder}: {len(names)} classes by folder, videos: {told}{how}{ignored}")
    return VideoSet(folder, tuple(samples), tuple(names))


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _test_files(files: list[str]) -> set[str]:
    """A fifth of a class, chosen by digests of the names: the same in every run."""
    drawn = sorted(
        files, key=lambda file: hashlib.sha256(file.encode("utf-8", "surrogateescape")).digest()
    )
    count = -(-len(files) // TEST_SHARE) if len(files) > 1 else 0
    return set(drawn[:count])


@dataclass(frozen=True, eq=False)
class Clips:
    """Decoded clips and their labels."""

    frames: Array
    """[clips, D, H, W, 3] uint8 RGB, memory-mapped: only what is used is read."""
    labels: Array
    """[clips] int64."""
    digest: str = ""
    """SHA-256 of the frames, if it is known."""

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Array, int]]:
        for frames, label in zip(self.frames, self.labels, strict=True):
            yield np.ascontiguousarray(frames), int(label)

    @cached_property
    def identity(self) -> str:
        """A digest of frames and labels: a run resumes only on the same clips."""
        frames = self.digest or _sha256(self.frames)[0]
        return hashlib.sha256(frames.encode() + self.labels.tobytes()).hexdigest()[:16]


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
    say: Say = _silent,
    skip_bad: bool = False,
) -> Clips:
    """One clip of each video: decoded on the first call, memory-mapped from `cache` afterwards.

    The name of the cache file is a digest of the contents of the videos, of the clip and of the
    sampling. Clips that lie in another file of the cache, of a set that shares videos with this
    one, are copied from there. All bytes are checked against their SHA-256; a damaged file is
    reported and decoded again.

    Args:
        videos: what to decode.
        spec: frames and size of the clips.
        cache: a folder; it is created.
        sampling: "uniform" over each video, or "centre".
        workers: videos decoded at a time.
        say: receives messages: decoding starts, a file is damaged, a video cannot be decoded.
        skip_bad: go on without the videos that cannot be decoded. They are listed in any case.

    Raises:
        DataError: videos that cannot be decoded (the others stay in the cache), or a cache that
            cannot be written.
    """
    folder = Path(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _Cache(folder, spec, sampling, say).load(videos, workers, skip_bad)
    except OSError as error:
        raise DataError(f"{folder}: the cache cannot be written ({error})") from error


@dataclass
class _Cache:
    """Decoded clips of one size and sampling, in a folder: NAME.npy, and NAME.json beside it."""

    folder: Path
    spec: ClipSpec
    sampling: str
    say: Say
    reasons: dict[str, str] = field(default_factory=dict)
    """By file, why it cannot be decoded."""
    damaged: set[Path] = field(default_factory=set)
    """Files of the cache that are decoded again."""

    @property
    def window(self) -> dict[str, object]:
        """What decoding depends on: not how pixels and logits are scaled afterwards."""
        scaled = ("mean", "std", "temperature", "threshold", "sampling", "stride")
        return {k: v for k, v in asdict(self.spec).items() if k not in scaled}

    def load(self, videos: VideoSet, workers: int, skip_bad: bool) -> Clips:
        contents = self._contents(videos)
        good = [s for s in videos.samples if s.file in contents]
        path = self._path([contents[s.file] for s in good])
        digest = self._checked(path, len(good)) if not self.reasons else ""
        if not digest:
            good, path, digest = self._decode(videos, contents, workers)
        if self.reasons:
            told = "; ".join(f"{file}: {why}" for file, why in list(self.reasons.items())[:20])
            more = f"; and {len(self.reasons) - 20} more" if len(self.reasons) > 20 else ""
            told = f"{videos.folder}: {len(self.reasons)} videos cannot be decoded: {told}{more}"
            if not skip_bad or not good:
                raise DataError(f"{told}; --skip-bad goes on without them")
            self.say(f"{told}; going on without")
        labels = np.array([sample.label for sample in good], np.int64)
        return Clips(np.load(path, mmap_mode="r"), labels, digest)

    def _path(self, contents: list[str]) -> Path:
        """The file of these videos: its name is a digest, 20 hex digits."""
        document = json.dumps([CACHE_VERSION, self.window, self.sampling, contents])
        return self.folder / f"{hashlib.sha256(document.encode()).hexdigest()[:20]}.npy"

    def _shape(self, count: int) -> tuple[int, ...]:
        return (count, self.spec.frames, self.spec.height, self.spec.width, 3)

    def _checked(self, path: Path, count: int) -> str:
        """The digest of a whole file of the cache; empty if it is not there or damaged."""
        if not path.exists():
            return ""
        try:
            note = json.loads(path.with_suffix(".json").read_text("utf-8"))
            expected = note["sha256"]
            mapped = np.load(path, mmap_mode="r")
            fault = ""
            if mapped.shape != self._shape(count) or mapped.dtype != np.uint8:
                fault = f"{mapped.dtype} of {mapped.shape} instead of uint8 of {self._shape(count)}"
            elif _sha256(mapped)[0] != expected:
                fault = "its bytes do not match their SHA-256"
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            fault = str(error) or type(error).__name__
        if fault:
            self.say(f"{path} is damaged ({fault}); decoding again")
            self.damaged.add(path)
            return ""
        return str(expected)

    def _contents(self, videos: VideoSet) -> dict[str, str]:
        """By file, the SHA-256 of its bytes.

        A file is not read again if its size, its times of change in nanoseconds and its inode are
        those of the last reading. A file that changed within the two seconds before it was read
        may change again in the same tick of the file system's clock: it is always read.
        """
        memo_path = self.folder / CONTENTS
        try:
            memo = json.loads(memo_path.read_text("utf-8"))
            known = {k: v for k, v in memo.items() if len(v) == 2}
        except (OSError, ValueError, AttributeError, TypeError):
            known = {}
        found: dict[str, str] = {}
        fresh: dict[str, tuple[str, str]] = {}
        for file in dict.fromkeys(sample.file for sample in videos.samples):
            path = videos.folder / file
            try:
                status = path.stat()
                times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
                stamp, key = ",".join(map(str, times)), str(path.absolute())
                before = known.get(key)
                if before is not None and before[0] == stamp:
                    found[file] = before[1]
                    continue
                now = time.time_ns()
                found[file] = _digest_of_file(path)
                if now - max(status.st_mtime_ns, status.st_ctime_ns) > 2_000_000_000:
                    fresh[key] = (stamp, found[file])
            except OSError as error:
                self.reasons[file] = error.strerror or str(error)
        if fresh:
            with written_beside(memo_path) as beside:
                beside.write_text(json.dumps(known | fresh), "utf-8")
        return found

    def _decode(
        self, videos: VideoSet, contents: Mapping[str, str], workers: int
    ) -> tuple[list[Sample], Path, str]:
        """Decode what the cache does not have, and write the file of all that can be decoded."""
        tried = [sample for sample in videos.samples if sample.file in contents]
        stored = self._stored({contents[sample.file] for sample in tried})
        left = sum(contents[sample.file] not in stored for sample in tried)
        if left:
            self.say(f"decoding {left} videos of {videos.folder} into {self.folder}")

        def clip(sample: Sample) -> Array | None:
            content = contents[sample.file]
            if content in stored:
                frames, digest = stored[content]
                if hashlib.sha256(frames.data).hexdigest() == digest:
                    return frames
            try:
                return load_clip(videos.folder / sample.file, self.spec, self.sampling).frames
            except VideoError as error:
                place = str(videos.folder / sample.file)
                self.reasons[sample.file] = str(error).removeprefix(f"{place}: ")
                return None

        for stale in self.folder.glob(f"{SCRATCH}*"):  # of processes that were killed
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(stale, ignore_errors=True)
        good: list[Sample] = []
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=SCRATCH) as scratch:
            written = Path(scratch) / "clips.npy"
            mapped = _new_array(written, self._shape(len(tried)))
            pool = ThreadPoolExecutor(workers)
            try:
                for sample, frames in zip(tried, pool.map(clip, tried), strict=True):
                    if frames is not None:
                        mapped[len(good)] = frames
                        good.append(sample)
            finally:
                pool.shutdown(cancel_futures=True)
            if len(good) < len(tried):
                written = Path(scratch) / "fewer.npy"
                fewer = _new_array(written, self._shape(len(good)))
                fewer[:] = mapped[: len(good)]
                mapped = fewer
            mapped.flush()
            known = [contents[sample.file] for sample in good]
            path = self._path(known)
            digest, rows = _sha256(mapped)
            note = {
                "version": CACHE_VERSION,
                "sha256": digest,
                "shape": mapped.shape,
                "clip": self.window,
                "sampling": self.sampling,
                "folder": str(videos.folder),
                "contents": known,
                "rows": rows,
            }
            del mapped
            # the note first: a file of clips without a note would count as damaged
            with written_beside(path.with_suffix(".json")) as beside:
                beside.write_text(json.dumps(note, indent=1), "utf-8")
            written.replace(path)
        return good, path, digest

    def _stored(self, wanted: set[str]) -> dict[str, tuple[Array, str]]:
        """By content, the clip in another file of the cache, and its digest."""
        found: dict[str, tuple[Array, str]] = {}
        for path in self.folder.glob("*.json"):
            if path.with_suffix(".npy") in self.damaged or not wanted - found.keys():
                continue
            try:
                note = json.loads(path.read_text("utf-8"))
                same = (note["version"], note["clip"], note["sampling"])
                if same != (CACHE_VERSION, json.loads(json.dumps(self.window)), self.sampling):
                    continue
                mapped = np.load(path.with_suffix(".npy"), mmap_mode="r")
                if mapped.shape != self._shape(len(note["contents"])) or mapped.dtype != np.uint8:
                    continue
                for row, (content, digest) in enumerate(
                    zip(note["contents"], note["rows"], strict=True)
                ):
                    if content in wanted:
                        found[content] = (mapped[row], digest)
            except (OSError, ValueError, KeyError, TypeError, EOFError):
                continue  # another file's damage is told when that file is wanted
        return found


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.uint8]]:
    """A new file of clips, mapped to memory.

    Raises:
        OSError: the disk has no room. All of the file is allocated now, because a full disk would
            kill the process later, when it writes to the mapped memory (SIGBUS).
    """
    mapped: np.memmap[Any, np.dtype[np.uint8]] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
        path, "w+", np.uint8, shape
    )
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return mapped


def _sha256(frames: Array) -> tuple[str, list[str]]:
    """The digest of clips, and the digest of each clip, of which it is the digest."""
    rows = [hashlib.sha256(np.ascontiguousarray(clip).data).hexdigest() for clip in frames]
    return hashlib.sha256("".join(rows).encode()).hexdigest(), rows


def _digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
