"""Temperature and threshold: fitted on logits whose right values are known."""

import csv
import json
import shutil
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from serving import LABELS, write_program, write_video

from pynq_kgrc import load_program, recognize
from pynq_kgrc.analysis.accuracy import calibration_error
from pynq_kgrc.analysis.confidence import (
    fit_temperature,
    fit_threshold,
    negative_log_likelihood,
    video_probabilities,
)
from pynq_kgrc.cli import main
from pynq_kgrc.errors import DataError
from pynq_kgrc.runtime import Session


def drawn(temperature, count=4000, classes=6, windows=1, seed=0):
    """Logits [windows, classes] and labels that are drawn with the probabilities they mean."""
    rng = np.random.default_rng(seed)
    logits = list(rng.normal(0, 3, (count, windows, classes)))
    labels = [rng.choice(classes, p=video_probabilities(each, temperature)) for each in logits]
    return logits, labels


def confidences_of(logits, labels, temperature):
    probabilities = np.stack([video_probabilities(each, temperature) for each in logits])
    return probabilities.max(1), probabilities.argmax(1) == np.array(labels)


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_of_drawn_labels_is_found(temperature, windows):
    logits, labels = drawn(temperature, windows=windows)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.1)
    best = negative_log_likelihood(logits, labels, found)
    for other in (0.97 * found, 1.03 * found):
        assert best < negative_log_likelihood(logits, labels, other)
    error = calibration_error(*confidences_of(logits, labels, found))
    assert error < 0.03
    if temperature != 1:
        assert calibration_error(*confidences_of(logits, labels, 1.0)) > 2 * error


def test_where_all_are_right_there_is_no_temperature():
    logits, _ = drawn(1.0, 50)
    with pytest.raises(DataError, match="With all answers right or all wrong there is none"):
        fit_temperature(logits, [int(each.argmax()) for each in logits])
    with pytest.raises(DataError, match="With all answers right or all wrong there is none"):
        fit_temperature(logits, [int(each.argmin()) for each in logits])
    with pytest.raises(DataError, match="no clip"):
        fit_temperature([], [])


def test_extreme_logits_are_finite():
    logits = [np.array([[1e4, -1e4]]), np.array([[-1e4, 1e4]]), np.array([[1e4, -1e4]])]
    assert np.isfinite(negative_log_likelihood(logits, [0, 1, 1], 1.0))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_below_the_threshold_fewer_are_right_than_the_share(share):
    rng = np.random.default_rng(1)
    confidences = rng.uniform(0, 1, 3000)
    right = rng.uniform(0, 1, 3000) < confidences
    found = fit_threshold(confidences, right, share)
    assert right[confidences < found].mean() < share
    # below t, the mean of confidences that are uniform is t / 2
    assert found == pytest.approx(min(2 * share, 1.0), abs=0.08)
    above = np.sort(confidences[confidences > found])[20:]
    assert all(right[confidences < edge].mean() >= share for edge in above)


def test_a_threshold_may_be_nothing_and_is_never_all():
    confidences = np.array([0.5, 0.5, 0.9])
    assert fit_threshold(confidences, np.array([True, False, True])) == 0
    more = np.array([0.5, 0.5, 0.9, 0.95, 0.96])
    right = np.array([False, False, True, True, True])
    assert fit_threshold(more, right) == pytest.approx(0.925)  # one of three is right below
    assert fit_threshold(more, right, 0.3) == pytest.approx(0.7)
    assert 0.9 < fit_threshold(confidences, np.array([False, False, False])) < 1


# ---- the command ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A program, and 30 videos of which two in three are labelled as it answers."""
    folder = tmp_path_factory.mktemp("calibrate")
    program = write_program(folder / "net.kgrc")
    clip = replace(program.clip, sampling="uniform")
    program = msgspec.structs.replace(program, clip=clip)
    program.save(folder / "net.kgrc")
    with (folder / "index.csv").open("w", newline="") as file, Session(program) as session:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "class", "split"))
        for i in range(30):
            write_video(folder / f"v{i}.mp4", frames=10 + i)
            label = LABELS.index(recognize(session, folder / f"v{i}.mp4").labels[0].label)
            label = (label + (i % 3 == 0)) % len(LABELS)
            writer.writerow((f"v{i}.mp4", label, LABELS[label], "held"))
    return folder


def test_calibrate_writes_a_program_with_the_same_answers(data, tmp_path, capsys):
    out = tmp_path / "out.kgrc"
    arguments = ["calibrate", str(data / "net.kgrc"), "--data", str(data), "-o", str(out)]
    assert main([*arguments, "--split", "held", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    old, new = load_program(data / "net.kgrc"), load_program(out)
    assert (found["videos"], found["right"]) == (30, 20)
    assert new.clip.temperature == found["temperature"] != 1
    assert new.clip.threshold == found["threshold"]
    assert replace(new.clip, temperature=1.0, threshold=0.0) == old.clip
    assert found["negative_log_likelihood_after"] < found["negative_log_likelihood_before"]
    assert found["unsure_right"] <= found["unsure"] / 2
    for ours, theirs in zip(new.tasks, old.tasks, strict=True):
        if hasattr(ours, "weights"):
            np.testing.assert_array_equal(ours.weights.values, theirs.weights.values)
    with Session(old) as before, Session(new) as after:
        for i in (0, 7, 29):
            one, two = (recognize(s, data / f"v{i}.mp4") for s in (before, after))
            assert one.labels[0].label == two.labels[0].label
            assert two.unsure == (two.labels[0].confidence < new.clip.threshold)
    assert main([*arguments, "--split", "held"]) == 0
    text = capsys.readouterr().out
    assert "right on 20 of 30 videos of 'held' (66.7%)" in text
    assert f"temperature {found['temperature']:.3f}" in text
    # again from what it has written: the same temperature, which is then that of before
    again = ["calibrate", str(out), "--data", str(data), "--split", "held", "-o", str(out)]
    assert main([*again, "--json"]) == 0
    twice = json.loads(capsys.readouterr().out)
    assert twice["temperature"] == pytest.approx(found["temperature"])
    assert twice["calibration_error_before"] == pytest.approx(found["calibration_error_after"])


def test_calibrate_refuses_what_it_cannot_use(data, tmp_path, capsys):
    shutil.copy(data / "v1.mp4", tmp_path / "v1.mp4")
    (tmp_path / "index.csv").write_text("file,label,class,split\nv1.mp4,0,fly,held\n")
    out = tmp_path / "out.kgrc"
    for folder, more, text in (
        (tmp_path, ["--split", "held"], "the class 'fly' of v1.mp4 is not one of the"),
        (data, ["--split", "none"], "has no split 'none'"),
        (data, ["--split", "held", "--share", "2"], "--share 2.0; accepted is 0 to 1"),
    ):
        arguments = ["calibrate", str(data / "net.kgrc"), "--data", str(folder), "-o", str(out)]
        assert main([*arguments, *more]) == 2
        assert text in capsys.readouterr().err
        assert not out.exists()
