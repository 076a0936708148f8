"""One road from a video to labels: every command and the service sample it as the program says."""

import csv
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import nbformat
import numpy as np
import pytest
from conftest import ROOT
from serving import LABELS, Serving, write_program, write_video

from pynq_kgrc import Session, load_clip, load_program, recognition, recognize
from pynq_kgrc.analysis.accuracy import measure_accuracy
from pynq_kgrc.backends.chosen import choose_backend
from pynq_kgrc.cli import main
from pynq_kgrc.cluster.archive import ArchiveSettings, classify_file, find_files
from pynq_kgrc.compress.dataset import read_index
from pynq_kgrc.errors import ConfigError, VideoError
from pynq_kgrc.graph import SAMPLINGS, ClipSpec
from pynq_kgrc.results import Label, WindowLabels, WindowSum, best_labels, merge_windows
from pynq_kgrc.runtime import softmax
from pynq_kgrc.video import load_windows

SHIPPED = ROOT / "pynq_kgrc" / "programs" / "utd_mhad27.kgrc"


def with_clip(path, **changes):
    """Change the clip of a program's file; its path."""
    program = load_program(path)
    msgspec.structs.replace(program, clip=replace(program.clip, **changes)).save(path)
    return path


# ---- all roads ------------------------------------------------------------------------------


def by_recognize(session, video, **_):
    return recognize(session, video)


def by_python(session, video, **_):
    """Without `recognize`: the functions of the API that it uses, with their defaults."""
    if session.program.clip.sampling == "windows":
        clips = load_windows(video, session.program.clip)
    else:
        clips = [load_clip(video, session.program.clip)]
    names = session.program.labels
    found = WindowSum(names, 5, session.program.clip.threshold)
    for clip in clips:
        prediction = session.classify(clip.frames, len(names))
        shares = {label.label: label.confidence for label in prediction.labels}
        probabilities = np.array([shares[name] for name in names])
        found.add(clip.start_ms, clip.end_ms, probabilities)
    return found.result(clip.notes, session.backend_name)


def by_classify(session, video, program, capsys, **_):
    capsys.readouterr()
    assert main(["classify", str(video), "-p", str(program), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["videos"][0]


def by_batch(session, video, **_):
    (file,) = [f for f in find_files(Path(video).parent) if f.path == Path(video).name]
    return classify_file(session, file, ArchiveSettings("any"))


def by_notebook(session, video, program, **_):
    """The code of the notebook's cell that shows the best labels."""
    book = nbformat.read(ROOT / "notebooks" / "01_classify.ipynb", as_version=4)
    (cell,) = [c.source for c in book.cells if c.cell_type == "code" and "plot_labels" in c.source]
    chosen = replace(choose_backend(), backend="emulate")
    names = {"program": load_program(program), "video": video, "chosen": chosen}
    exec(cell, names)
    return names["found"]


def by_service(session, video, serving, **_):
    answer = serving.classify(Path(video).read_bytes())
    assert answer.status == 200, answer.body
    return answer.json


ROADS = [by_recognize, by_python, by_classify, by_batch, by_notebook, by_service]


def check_roads(program, videos, serving, capsys):
    """Compare the documents of all roads for each video; the first labels of the videos."""
    first = []
    with Session(load_program(program)) as session:
        for video in videos:
            found = {}
            for road in ROADS:
                document = road(session, video, program=program, capsys=capsys, serving=serving)
                found[road.__name__] = msgspec.to_builtins(document)
            wanted = found["by_recognize"]
            for name, document in found.items():
                assert document["unsure"] == wanted["unsure"], (video, name)
                assert len(document["windows"]) == len(wanted["windows"]), (video, name)
                pairs = [
                    (document, wanted),
                    *zip(document["windows"], wanted["windows"], strict=True),
                ]
                for ours, theirs in pairs:
                    assert [x["label"] for x in ours["labels"]] == [
                        x["label"] for x in theirs["labels"]
                    ], (video, name)
                    assert [x["confidence"] for x in ours["labels"]] == pytest.approx(
                        [x["confidence"] for x in theirs["labels"]], abs=2e-6
                    ), (video, name)
                for ours, theirs in zip(document["segments"], wanted["segments"], strict=True):
                    assert ours["label"] == theirs["label"]
                    assert ours["start_ms"] == pytest.approx(theirs["start_ms"], abs=0.1)
            first.append(wanted["labels"][0]["label"])
    return first


def evaluated(program, folder, videos, labels, tmp_path, capsys):
    """The top-1 that `evaluate` finds where `labels` are the right ones of `videos`."""
    names = load_program(program).labels
    data = tmp_path / "data"
    data.mkdir()
    with (data / "index.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "class", "split"))
        for video, label in zip(videos, labels, strict=True):
            writer.writerow((video, names.index(label), label, "test"))
    for video in {*videos}:
        shutil.copy(folder / video, data / video)
    capsys.readouterr()
    arguments = ["evaluate", "--data", str(data), "-p", str(program), "--json"]
    assert main([*arguments, "--cache", str(tmp_path / "cache")]) == 0
    return json.loads(capsys.readouterr().out)["top1"]


@contextmanager
def three_videos(folder):
    """Videos whose frames all differ: of several clips, of less than one, of two and a part."""
    for name, frames in (("long.mp4", 45), ("short.mp4", 5), ("odd.mp4", 19)):
        write_video(folder / name, frames=frames)
    yield [folder / name for name in ("long.mp4", "short.mp4", "odd.mp4")]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_road_gives_the_same_labels_of_generated_videos(sampling, tmp_path, capsys):
    """The network is random; with this seed each sampling of the first video has another label."""
    program, folder = tmp_path / "net.kgrc", tmp_path / "videos"
    folder.mkdir()
    write_program(program, seed=5)
    stride = 3 if sampling == "windows" else None
    with_clip(program, sampling=sampling, stride=stride, temperature=0.2, threshold=0.5, rate=20.0)
    with three_videos(folder) as videos:
        with Serving(state=tmp_path / "state", program=program) as serving:
            first = check_roads(program, videos, serving, capsys)
        names = [path.name for path in videos]
        assert evaluated(program, folder, names, first, tmp_path, capsys) == 1
        with Session(load_program(program)) as session:
            found = {name: recognize(session, videos[0], name) for name in SAMPLINGS}
            as_program = recognize(session, videos[0])
    assert as_program == found[sampling]
    labels = {each.labels[0].label for each in found.values()}
    assert len(labels) == 3, "samplings that give the same labels prove nothing"


@pytest.mark.data
def test_every_road_gives_the_same_labels_of_real_videos(shared_data, tmp_path, capsys):
    """Twelve videos of unseen people, from first to last by what the program's card is about."""
    videos = read_index(shared_data / "utd_mhad_depth").only("test")
    chosen = videos.samples[::27]
    assert len(chosen) == 12
    files = [videos.folder / sample.file for sample in chosen]
    with Serving(state=tmp_path / "state", program=SHIPPED) as serving:
        first = check_roads(SHIPPED, files, serving, capsys)
    names = [sample.file for sample in chosen]
    assert evaluated(SHIPPED, videos.folder, names, first, tmp_path, capsys) == 1
    right = [videos.classes[s.label] == label for s, label in zip(chosen, first, strict=True)]
    assert sum(right) >= 8  # of a program that is right on 86 %: fewer in one of 200 cases


@pytest.mark.data
def test_the_road_gives_the_accuracy_of_the_card(shared_data):
    """On every fourth video of unseen people: within four standard deviations of 86.1 %."""
    videos = read_index(shared_data / "utd_mhad_depth").only("test")
    chosen = videos.samples[::4]
    with Session(load_program(SHIPPED)) as session:
        right = [
            recognize(session, videos.folder / s.file).labels[0].label == videos.classes[s.label]
            for s in chosen
        ]
    spread = (0.861 * 0.139 / len(right)) ** 0.5
    assert abs(np.mean(right) - 0.861) < 4 * spread


# ---- recognize ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    folder = tmp_path_factory.mktemp("net")
    write_program(folder / "net.kgrc")
    write_video(folder / "video.mp4", frames=40)
    return folder


def test_one_clip_is_decoded_while_one_runs(net, monkeypatch):
    """Otherwise an hour of video with a small stride would not fit into memory."""
    order = []

    def decoded(*arguments):
        for clip in load_windows(*arguments):
            order.append("decode")
            yield clip

    monkeypatch.setattr(recognition, "load_windows", decoded)
    with Session(load_program(net / "net.kgrc")) as session:
        write = session.backend.write
        monkeypatch.setattr(
            session.backend, "write", lambda *codes: (order.append("write"), write(*codes))
        )
        found = recognize(session, net / "video.mp4", stride=4)
    assert order == ["decode", "write"] * len(found.windows) and len(found.windows) > 5


def test_a_video_may_be_longer_than_an_upload(net):
    """The limits of `Limits` are those of uploads; a local file is read whatever its length."""
    assert recognition.LOCAL.max_seconds >= 24 * 3600
    with Session(load_program(net / "net.kgrc")) as session:
        short = replace(recognition.LOCAL, max_seconds=0.1)
        found = recognize(session, net / "video.mp4", limits=short)
        assert "only 0.1 s of a video are looked at" in found.notes[0]
        assert recognize(session, (net / "video.mp4").read_bytes()).labels


def test_what_contradicts_itself_is_refused(net):
    with Session(load_program(net / "net.kgrc")) as session:
        for sampling in ("uniform", "centre"):
            with pytest.raises(ConfigError, match=f"stride=4 beside sampling='{sampling}'"):
                recognize(session, net / "video.mp4", sampling, stride=4)
        with pytest.raises(ConfigError, match=r"sampling='all'; accepted are centre, uniform, w"):
            recognize(session, net / "video.mp4", "all")
        with pytest.raises(VideoError, match="stride=0"):
            recognize(session, net / "video.mp4", stride=0)


def test_whatever_a_decoder_raises_names_the_file(net, monkeypatch):
    def broken(*_):
        raise RuntimeError("of a library")

    monkeypatch.setattr(recognition, "load_clip", broken)
    text = r"video.mp4: cannot be decoded: RuntimeError: of a"
    with (
        Session(load_program(net / "net.kgrc")) as session,
        pytest.raises(VideoError, match=text),
    ):
        recognize(session, net / "video.mp4", "centre")


def test_a_stride_implies_windows_in_every_road(net, tmp_path, capsys):
    program = shutil.copy(net / "net.kgrc", tmp_path / "uniform.kgrc")
    with_clip(program, sampling="uniform")
    arguments = ["classify", str(net / "video.mp4"), "-p", str(program), "--json"]
    counts = []
    for more in ([], ["--stride", "8"], ["--sampling", "windows"]):
        assert main([*arguments, *more]) == 0
        (video,) = json.loads(capsys.readouterr().out)["videos"]
        counts.append(len(video["windows"]))
    assert counts == [1, 5, 5]
    with Serving(state=tmp_path / "state", program=program) as serving:
        data = (net / "video.mp4").read_bytes()
        queries = ("", "?stride=8", "?sampling=windows", "?window=20", "?sampling=centre")
        answers = [serving.classify(data, query).json for query in queries]
        assert [len(answer["windows"]) for answer in answers] == [1, 5, 5, 2, 1]
        centre = load_clip(net / "video.mp4", load_program(program).clip, "centre")
        assert answers[4]["windows"][0]["start_ms"] == pytest.approx(centre.start_ms, abs=0.1)
        refused = serving.classify(data, "?sampling=centre&stride=8")
        assert (
            refused.status == 422 and "stride=8 beside sampling='centre'" in refused.json["error"]
        )


# ---- temperature and threshold --------------------------------------------------------------


def test_the_temperature_changes_confidences_and_nothing_else(net):
    program = load_program(net / "net.kgrc")
    frames = load_clip(net / "video.mp4", program.clip).frames
    with Session(program) as session:
        plain = session.run(frames)
        best = session.classify(frames)
    np.testing.assert_array_equal(plain.probabilities, softmax(plain.logits))
    assert not best.unsure
    clip = replace(program.clip, temperature=0.25)
    with Session(msgspec.structs.replace(program, clip=clip)) as session:
        sharp = session.run(frames)
        sharper = session.classify(frames)
    np.testing.assert_array_equal(sharp.logits, plain.logits)
    np.testing.assert_allclose(sharp.probabilities, softmax(4 * plain.logits), rtol=1e-12)
    assert sharper.labels[0].label == best.labels[0].label
    assert sharper.labels[0].confidence > best.labels[0].confidence + 1e-3


@pytest.mark.parametrize(("above", "unsure"), [(-1e-6, False), (1e-6, True)])
def test_an_answer_below_the_threshold_is_unsure(net, tmp_path, capsys, above, unsure):
    with Session(load_program(net / "net.kgrc")) as session:
        wanted = recognize(session, net / "video.mp4")
    program = shutil.copy(net / "net.kgrc", tmp_path / "net.kgrc")
    with_clip(program, threshold=wanted.labels[0].confidence + above)
    with Session(load_program(program)) as session:
        found = recognize(session, net / "video.mp4")
        frames = load_clip(net / "video.mp4", session.program.clip).frames
        prediction = session.classify(frames)
    assert found.labels == wanted.labels and found.unsure == unsure
    confidence = prediction.labels[0].confidence
    assert prediction.unsure == (confidence < session.program.clip.threshold)
    assert main(["classify", str(net / "video.mp4"), "-p", str(program)]) == 0
    assert ("unsure: the best label is below" in capsys.readouterr().out) == unsure


# ---- adding windows up ----------------------------------------------------------------------


def test_a_video_has_the_mean_of_its_windows():
    windows = [np.array([0.6, 0.4, 0.0]), np.array([0.1, 0.5, 0.4])]
    found = WindowSum(["a", "b", "c"], top=2, threshold=0.46)
    for i, probabilities in enumerate(windows):
        found.add(100.0 * i, 100.0 * (i + 1), probabilities)
    result = found.result(["note", "other", "note"], "emulate")
    assert result.labels == (Label("b", pytest.approx(0.45)), Label("a", pytest.approx(0.35)))
    assert result.unsure
    assert [window.labels[0].label for window in result.windows] == ["a", "b"]
    assert [(s.label, s.start_ms, s.end_ms) for s in result.segments] == [
        ("a", 0, 100),
        ("b", 100, 200),
    ]
    assert result.notes == ("note", "other")


def test_overlapping_windows_give_segments_that_meet_in_the_middle():
    def window(start, end, label, confidence):
        return WindowLabels(start, end, (Label(label, confidence),))

    windows = [window(0, 100, "a", 0.9), window(50, 150, "a", 0.7), window(100, 200, "b", 0.8)]
    assert msgspec.to_builtins(merge_windows(windows)) == (
        {"label": "a", "confidence": pytest.approx(0.8), "start_ms": 0, "end_ms": 125.0},
        {"label": "b", "confidence": 0.8, "start_ms": 125.0, "end_ms": 200},
    )
    gap = merge_windows([window(0, 100, "a", 1.0), window(300, 400, "b", 1.0)])
    assert [(s.start_ms, s.end_ms) for s in gap] == [(0, 100), (300, 400)]


def test_classes_without_names_are_called_by_number_and_confidences_rounded():
    found = best_labels(np.array([0.1, 0.7654321, 0.2]), (), 2, digits=3)
    assert found == (Label("1", 0.765), Label("2", 0.2))


def test_measure_accuracy_takes_the_windows_of_a_video(net):
    program = load_program(net / "net.kgrc")
    with Session(program) as session:
        wanted = recognize(session, net / "video.mp4")
    label = LABELS.index(wanted.labels[0].label)
    clips = [clip.frames for clip in load_windows(net / "video.mp4", program.clip)]
    assert len(clips) == 5
    assert measure_accuracy(program, [(iter(clips), label)]).top1 == 1
    assert measure_accuracy(program, [(iter(clips), (label + 1) % 4)]).top1 == 0


def test_spec_of_a_program_decides_unless_told_otherwise():
    spec = ClipSpec(8, 8, 8, 8, sampling="uniform")
    assert spec.chosen_sampling() == "uniform"
    assert spec.chosen_sampling("centre") == "centre"
    assert spec.chosen_sampling(stride=3) == "windows"
    assert spec.chosen_sampling("windows", 3) == "windows"
