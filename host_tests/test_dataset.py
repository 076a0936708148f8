"""Labelled videos: checks of the index, and a cache that is made again if damaged."""

import errno
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from movies import MOVES, write_movies

from pynq_kgrc.compress import dataset
from pynq_kgrc.compress.dataset import load_clips, read_index
from pynq_kgrc.errors import DataError
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.video import load_clip

SPEC = ClipSpec(frames=6, height=16, width=16, short_side=16)


@pytest.fixture(scope="module")
def movies(tmp_path_factory):
    return write_movies(tmp_path_factory.mktemp("movies"), train=8, test=4)


@pytest.fixture
def copied(movies, tmp_path):
    for file in movies.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_an_index_is_read(movies):
    videos = read_index(movies)
    assert len(videos.samples) == 12
    assert videos.classes == MOVES
    assert [s.label for s in videos.only("test").samples] == [0, 1, 2, 3]
    assert {s.subject for s in videos.only("train").samples} == {"1", "2", "3"}


def test_clips_are_those_of_the_video(movies, tmp_path):
    videos = read_index(movies).only("test")
    said = []
    clips = load_clips(videos, SPEC, tmp_path, say=said.append)
    assert clips.frames.shape == (4, 6, 16, 16, 3)
    assert isinstance(clips.frames, np.memmap)
    assert not clips.frames.flags.writeable
    for sample, (frames, label) in zip(videos.samples, clips, strict=True):
        np.testing.assert_array_equal(
            frames, load_clip(movies / sample.file, SPEC, "uniform").frames
        )
        assert label == sample.label
    assert len(said) == 1 and said[0].startswith("decoding 4 videos")
    again = load_clips(videos, SPEC, tmp_path, say=said.append)
    np.testing.assert_array_equal(again.frames, clips.frames)
    assert len(said) == 1
    other = ClipSpec(frames=6, height=16, width=16, short_side=16, step=2)
    load_clips(videos, other, tmp_path, sampling="centre", say=said.append)
    assert len(said) == 2


@pytest.mark.parametrize("harm", ["flip", "cut", "shape", "no note", "empty"])
def test_a_damaged_cache_is_said_and_made_again(movies, tmp_path, harm):
    videos = read_index(movies).only("test")
    whole = np.array(load_clips(videos, SPEC, tmp_path).frames)
    (path,) = tmp_path.glob("*.npy")
    if harm == "flip":
        data = bytearray(path.read_bytes())
        data[-7] ^= 1
        path.write_bytes(data)
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif harm == "shape":
        np.save(path, whole.reshape(8, 3, 16, 16, 3))  # the same bytes
    elif harm == "empty":
        path.write_bytes(b"")
    else:
        path.with_suffix(".json").unlink()
    said = []
    clips = load_clips(videos, SPEC, tmp_path, say=said.append)
    np.testing.assert_array_equal(clips.frames, whole)
    assert "is damaged (" in said[0] and said[0].endswith("decoding again")
    assert load_clips(videos, SPEC, tmp_path, say=said.append) and len(said) == 2


def decoded(monkeypatch):
    """The names of the files that are decoded from now on."""
    names = []

    def count(path, *rest):
        names.append(Path(path).name)
        return load_clip(path, *rest)

    monkeypatch.setattr("pynq_kgrc.compress.dataset.load_clip", count)
    return names


def test_one_bad_video_costs_no_other(copied, tmp_path, monkeypatch):
    """It is listed with its reason; what was decoded stays, and --skip-bad goes on without it."""
    (copied / "m02.avi").write_bytes(b"no video")
    (copied / "m09.avi").write_bytes(b"")
    cache, names, said = tmp_path / "cache", decoded(monkeypatch), []
    whole = read_index(copied)
    with pytest.raises(DataError) as caught:
        load_clips(whole, SPEC, cache)
    text = str(caught.value)
    assert "2 videos cannot be decoded: m02.avi: not a video that can be read" in text
    assert "; m09.avi: " in text and text.endswith("--skip-bad goes on without them")
    assert len(names) == 12
    names.clear()
    clips = load_clips(whole, SPEC, cache, say=said.append, skip_bad=True)
    assert sorted(names) == ["m02.avi", "m09.avi"]  # tried again, the others are in the cache
    assert "m02.avi: not a video" in said[-1] and said[-1].endswith("going on without")
    good = [s for s in whole.samples if s.file not in ("m02.avi", "m09.avi")]
    assert clips.labels.tolist() == [s.label for s in good]
    for frames, sample in zip(clips.frames, good, strict=True):
        np.testing.assert_array_equal(
            frames, load_clip(copied / sample.file, SPEC, "uniform").frames
        )
    # the mended video is the only one to be decoded
    (copied / "m02.avi").write_bytes((copied / "m03.avi").read_bytes())
    (copied / "m09.avi").write_bytes((copied / "m10.avi").read_bytes())
    names.clear()
    mended = load_clips(whole, SPEC, cache)
    assert names == [] and len(mended) == 12  # even those are known: they are copies
    np.testing.assert_array_equal(mended.frames[2], mended.frames[3])
    for file in copied.glob("*.avi"):
        file.write_bytes(b"no video")
    with pytest.raises(DataError, match="12 videos cannot be decoded"):
        load_clips(whole, SPEC, cache, skip_bad=True)


@pytest.mark.parametrize("when", ["at once", "later, with the old time"])
def test_the_cache_knows_videos_by_their_bytes(copied, tmp_path, monkeypatch, when):
    """Another video of as many bytes under the same name, within a tick of the clock or not."""
    old, new = (copied / name for name in ("m00.avi", "m01.avi"))
    size = max(old.stat().st_size, new.stat().st_size)
    for file in (old, new):  # AVI players ignore what follows the last chunk
        file.write_bytes(file.read_bytes().ljust(size, b"\0"))
    videos = read_index(copied)
    names = decoded(monkeypatch)
    first = np.array(load_clips(videos, SPEC, tmp_path / "cache").frames)
    assert len(names) == 12
    if when != "at once":
        past = time.time_ns() - 10**10
        for file in copied.glob("*.avi"):
            os.utime(file, ns=(past, past))
        time.sleep(2.1)  # so that the digests are remembered
        load_clips(videos, SPEC, tmp_path / "cache")
        assert str(old) in (tmp_path / "cache" / "contents").read_text()
    names.clear()
    times = old.stat()
    old.write_bytes(new.read_bytes())
    os.utime(old, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert old.stat().st_size == times.st_size and old.stat().st_mtime_ns == times.st_mtime_ns
    again = load_clips(videos, SPEC, tmp_path / "cache").frames
    np.testing.assert_array_equal(again[0], first[1])
    np.testing.assert_array_equal(again[1:], first[1:])
    assert names == []
    # a file that only moved is not decoded again
    new.rename(copied / "moved.avi")
    text = (copied / "index.csv").read_text().replace("m01.avi", "moved.avi")
    (copied / "index.csv").write_text(text)
    moved = load_clips(read_index(copied), SPEC, tmp_path / "cache").frames
    np.testing.assert_array_equal(moved, again)
    assert names == []


def test_unchanged_videos_are_not_read_again(copied, tmp_path, monkeypatch):
    time.sleep(2.1)
    read = []
    whole = dataset._digest_of_file
    monkeypatch.setattr(dataset, "_digest_of_file", lambda p: read.append(p.name) or whole(p))
    for _ in range(2):
        load_clips(read_index(copied), SPEC, tmp_path / "cache")
    assert len(read) == 12
    (tmp_path / "cache" / "contents").write_text("[1, {")
    load_clips(read_index(copied), SPEC, tmp_path / "cache")
    assert len(read) == 24


def test_rates_and_sizes_have_files_of_their_own(movies, tmp_path):
    videos = read_index(movies).only("test")
    for changed in (SPEC, replace(SPEC, step=2), replace(SPEC, width=12)):
        load_clips(videos, changed, tmp_path)
    load_clips(videos, replace(SPEC, mean=(0, 0, 0)), tmp_path)  # pixels, not input values
    assert len(list(tmp_path.glob("*.npy"))) == 3


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (None, "no index of videos and no folder of videos; a data set is a folder with an index"),
        ("file,label\nm00.avi,0\n", r"lacks the columns split; it has \['file', 'label'\]"),
        ("file,label,split\n", "names no video"),
        (
            "file,label,split\nm00.avi,0,train\nm01.avi,x,train\n",
            "line 3: label 'x' is not a number of 0 or more",
        ),
        ("file,label,split\nm00.avi,1.0,train\n", "line 2: label '1.0' is not a number of 0"),
        ("file,label,split\n\nm00.avi,\xb2,train\n", "line 3: label '\xb2' is not a number"),
        ("file,label,split\nm00.avi,nan,train\n", "line 2: label 'nan' is not a number"),
        ("file,label,split\nm00.avi,1_0,train\n", "line 2: label '1_0' is not a number"),
        (
            "file,label,split\nm00.avi,99999999999,train\n",
            "label 99999999999 of m00.avi is out of range; accepted are 0 to 99999",
        ),
        (
            "file,label,class,split\nm00.avi,0,run, fast,train\n",
            "line 2: 5 cells under 4 columns; put a cell that holds ',' in double quotes",
        ),
        ("file,label,split,label\nm00.avi,0,train,1\n", "has the column 'label' twice"),
        (
            "file,label,class,split\nm00.avi,0,a,train\nm01.avi,0,b,train\n",
            "label 0 is 'a' in line 2 and 'b' in line 3",
        ),
        (
            "file,label,class,split\nm00.avi,0,a,train\nm01.avi,1,a,train\n",
            "the class 'a' has label 0 in line 2 and 1 in line 3",
        ),
        (
            "file,label,class,split\nm00.avi,a,a,train\nm01.avi,b,a,train\n",
            "line 3: label 'b' and class 'a' differ",
        ),
        (
            "file,label,split\nm00.avi,0,train\n./m00.avi,1,train\n",
            "m00.avi has the label 0 in line 2 and 1 in line 3",
        ),
        (
            "file,label,split\nm00.avi,0,train\nm00.avi,0,test\n",
            "m00.avi has the split train in line 2 and test in line 3",
        ),
        ("file,label,split\nm00.avi,-1,train\n", "line 2: label '-1' is not a number"),
        ("file,label,split\n../m00.avi,0,train\n", r"'../m00.avi' is not a file inside the folder"),
        ("file,label,split\n/m00.avi,0,train\n", "'/m00.avi' is not a file inside the folder"),
        ("file,label,split\nm00.avi\n", "line 2: m00.avi has no label"),
        (f"file,label,split\n{'x' * 300}.avi,0,test\n", "names 1 videos that are not there: xxx"),
        ("", r"lacks the columns file, label, split; it has \[\]"),
        (
            "file,label,split\nm00.avi,0,train\nxx.avi,1,train\nyy.avi,1,train\n",
            "names 2 videos that are not there: xx.avi, yy.avi",
        ),
        ("file,label,split\nm00.avi,0,tr\xe4in", None),
    ],
)
def test_a_bad_index_is_refused(copied, index, text):
    path = copied / "index.csv"
    path.unlink()
    if index is not None:
        path.write_bytes(index.encode("utf-8" if "\xb2" in index else "latin-1"))
    with pytest.raises(DataError, match=text or "can't decode byte"):
        read_index(copied)


SPREADSHEETS = {
    "mark": ("utf-8-sig", ","),
    "semicolons": ("utf-8", ";"),
    "tabs": ("utf-8", "\t"),
    "Unicode text of Excel": ("utf-16", "\t"),
}


@pytest.mark.parametrize("kind", SPREADSHEETS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_an_index_as_spreadsheets_write_it(copied, kind, newline):
    encoding, delimiter = SPREADSHEETS[kind]
    expected = read_index(copied)
    text = (copied / "index.csv").read_text().replace(",", delimiter).replace("\n", newline)
    header, rest = text.split(newline, 1)
    text = f"{header.title()}{newline}{newline}{rest}"  # blank lines are no videos
    (copied / "index.csv").write_bytes(text.encode(encoding))
    found = read_index(copied)
    assert [replace(s, line=0) for s in found.samples] == [
        replace(s, line=0) for s in expected.samples
    ]
    assert found.classes == expected.classes
    assert found.samples[0].line == 3


@pytest.mark.parametrize("column", ["label", "class"])
def test_labels_may_be_names(copied, column):
    rows = ["m00.avi, run ,train", "m01.avi,ca\u0301no,train", "m02.avi,c\u00e1no,test"]
    text = "\n".join([f"file,{column},split", *rows])
    (copied / "index.csv").write_text(text, "utf-8")
    videos = read_index(copied)
    assert videos.classes == ("c\u00e1no", "run")  # composed characters, whoever wrote them
    assert [s.label for s in videos.samples] == [1, 0, 0]
    assert read_index(copied, ["run", "x", "c\u00e1no"]).samples[1].label == 2
    with pytest.raises(
        DataError, match=r"line 2: label 'run' of m00.avi is not one of the classes"
    ):
        read_index(copied, ["x", "c\u00e1no"])


def index_of(folder, *rows):
    (folder / "index.csv").write_text("\n".join(["file,label,class,split", *rows]))
    return read_index(folder)


def test_labels_are_matched_by_name(copied):
    """Numbers in another order, fewer classes than the network has, or none named."""
    rows = ["m00.avi,0,down,test", "m01.avi,1,left,test", "m02.avi,2,up,test"]
    found = index_of(copied, *rows).named_by(MOVES, "x.kgrc")
    assert [s.label for s in found.samples] == [3, 0, 2]
    assert found.classes == MOVES
    numbers = ["m00.avi,1,,test", "m01.avi,3,,test"]
    for names in (MOVES, tuple("0123"), ()):
        assert [s.label for s in index_of(copied, *numbers).named_by(names, "x").samples] == [1, 3]
    # the network's classes have no names: the numbers count
    unnamed = index_of(copied, *rows).named_by(tuple("012"), "x")
    assert unnamed.samples[0].label == 0 and unnamed.classes == ("down", "left", "up")
    assert index_of(copied, *rows).named_by(tuple("0123"), "x").classes == tuple("0123")
    with pytest.raises(DataError, match=r"csv, line 3: label 3 of m01.avi is not one of the 2 cl"):
        index_of(copied, *numbers).named_by(("a", "b"), "x.kgrc")
    with pytest.raises(
        DataError,
        match=r"line 3: the class 'lefft' of m01.avi is not one of the 4 classes of x.kgrc, which "
        r"are 'left'",
    ):
        index_of(copied, rows[0], "m01.avi,1,lefft,test").named_by(MOVES, "x.kgrc")
    with pytest.raises(DataError, match=r"line 3: label 2 of m01.avi has no name, and 'down' has"):
        index_of(copied, rows[0], "m01.avi,2,,test").named_by(MOVES, "x.kgrc")


def by_class(source, folder, splits):
    """The movies as a folder for each class."""
    for sample in read_index(source).samples:
        place = folder / (sample.split if splits else "") / MOVES[sample.label]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / sample.file, place)
    (folder / "README.txt").write_text("whose they are")
    return folder


def test_a_folder_for_each_class(movies, tmp_path):
    folder = by_class(movies, tmp_path, splits=True)
    (folder / "train" / "left" / "notes.txt").write_text("x")
    said = []
    videos = read_index(folder, say=said.append)
    assert videos.classes == tuple(sorted(MOVES))
    assert (len(videos.only("train").samples), len(videos.only("test").samples)) == (8, 4)
    for sample in videos.samples:
        assert sample.file.split("/")[:2] == [sample.split, videos.classes[sample.label]]
    assert "4 classes by folder, videos: 4 test, 8 train; 1 files are not videos" in said[0]
    assert [s.label for s in videos.named_by(MOVES, "x").only("test").samples] == [3, 0, 1, 2]
    with pytest.raises(DataError, match="has no split 'val'; it has test, train"):
        videos.only("val")
    assert len(load_clips(videos.only("test"), SPEC, tmp_path / "cache")) == 4
    with pytest.raises(DataError, match="down is not one of the classes left, right"):
        read_index(folder, ["left", "right"])


def test_a_folder_for_each_class_without_splits(movies, tmp_path):
    """A fifth of each class is for testing, always the same; "all" takes every video."""
    folder = by_class(movies, tmp_path, splits=False)
    said = []
    videos = read_index(folder, say=said.append)
    assert "a fifth of each class is for testing" in said[0]
    tested = videos.only("test").samples
    assert sorted(s.label for s in tested) == [0, 1, 2, 3]  # of three a class
    assert len(videos.only("train").samples) == 8 and len(videos.only("all").samples) == 12
    (folder / "left" / "zz.mp4").write_bytes((movies / "m00.avi").read_bytes())
    again = {s.file for s in read_index(folder).only("test").samples}
    assert len(again & {s.file for s in tested}) >= 3


def test_missing_videos_can_be_skipped(copied):
    (copied / "m03.avi").unlink()
    said = []
    videos = read_index(copied, skip_bad=True, say=said.append)
    assert len(videos.samples) == 11 and "names 1 videos that are not there: m03.avi" in said[0]


def test_labels_have_to_be_in_range(movies):
    with pytest.raises(DataError, match=r"line 5: label 3 of m03.avi is out of range; .* 0 to 2"):
        read_index(movies, ["a", "b", "c"])


def test_a_split_that_is_not_there(movies):
    videos = read_index(movies)
    with pytest.raises(DataError, match="has no split 'val'; it has test, train"):
        videos.only("val")


def test_a_full_disk_leaves_nothing_half_written(movies, tmp_path, monkeypatch):
    def full(*rest):
        raise OSError(errno.ENOSPC, "No space left on device")

    stale = tmp_path / ".decoding-1"
    stale.mkdir()
    os.utime(stale, (0, 0))  # of a process that was killed long ago
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DataError, match=r"the cache cannot be written .*No space left on device"):
        load_clips(read_index(movies), SPEC, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"contents"}


def test_a_cache_that_cannot_be_written(movies, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the cache cannot be written"):
        load_clips(read_index(movies), SPEC, tmp_path / "file")


@pytest.mark.data
def test_utd_mhad_is_split_by_person(shared_data):
    """The cross-subject protocol, 1, 3, 5, 7 against 2, 4, 6; subject 8 is in neither split."""
    videos = read_index(shared_data / "utd_mhad_depth")
    assert len(videos.classes) == 27
    assert (len(videos.only("train").samples), len(videos.only("test").samples)) == (431, 323)
    train = {s.subject for s in videos.only("train").samples}
    assert train == {"1", "3", "5", "7"}
    assert {s.subject for s in videos.only("test").samples} == {"2", "4", "6"}


@pytest.mark.data
def test_surveillance_clips_decode(shared_data, tmp_path):
    videos = read_index(shared_data / "surveillance_fight", ["no fight", "fight"]).only("test")
    few = type(videos)(videos.folder, videos.samples[::20], videos.classes)
    clips = load_clips(few, SPEC, tmp_path)
    assert set(clips.labels.tolist()) == {0, 1}
    (path,) = tmp_path.glob("*.json")
    note = json.loads(path.read_text())
    assert note["shape"] == list(clips.frames.shape)
    assert clips.frames.std() > 10
