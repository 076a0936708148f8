"""Labelled videos: checks of the index, and a cache that is made again if damaged."""

import json

import numpy as np
import pytest
from movies import MOVES, write_movies

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


def test_a_broken_video_leaves_no_cache(copied, tmp_path):
    (copied / "m09.avi").write_bytes(b"no video")
    cache = tmp_path / "cache"
    with pytest.raises(
        DataError, match=r"m09\.avi: not a video that can be read .*accepted are MP4"
    ):
        load_clips(read_index(copied), SPEC, cache)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (None, "no index of videos can be read"),
        ("file,label\nm00.avi,0\n", r"lacks the columns split; it has \['file', 'label'\]"),
        ("file,label,split\n", "names no video"),
        ("file,label,split\nm00.avi,x,train\n", "line 2: label 'x' is not a number of 0 or more"),
        ("file,label,split\nm00.avi,-1,train\n", "line 2: label '-1' is not a number"),
        ("file,label,split\n../m00.avi,0,train\n", r"'../m00.avi' is not a file inside the folder"),
        ("file,label,split\n/m00.avi,0,train\n", "'/m00.avi' is not a file inside the folder"),
        ("file,label,split\nm00.avi\n", "line 2: label '' is not a number"),
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
        path.write_bytes(index.encode("latin-1"))
    with pytest.raises(DataError, match=text or "can't decode byte"):
        read_index(copied)


def test_labels_have_to_be_in_range(movies):
    with pytest.raises(DataError, match=r"line 5: label 3 of m03.avi is out of range; .* 0 to 2"):
        read_index(movies, ["a", "b", "c"])


def test_a_split_that_is_not_there(movies):
    videos = read_index(movies)
    with pytest.raises(DataError, match="has no split 'val'; it has test, train"):
        videos.only("val")


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
    note = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert note["shape"] == list(clips.frames.shape)
    assert clips.frames.std() > 10
