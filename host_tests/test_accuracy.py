"""The accuracy of a program, and the input that it is refused for."""

import numpy as np
import pytest
from networks import Net, compiled

from pynq_kgrc.analysis.accuracy import (
    accuracy_of,
    calibration_error,
    measure_accuracy,
    wilson_interval,
)
from pynq_kgrc.analysis.plots import plot_confusion
from pynq_kgrc.errors import ProgramError
from pynq_kgrc.runtime import Session


@pytest.fixture(scope="module")
def program():
    net = Net(size=(2, 6, 6))
    net.dense(net.conv("clip", 8), 7)
    return compiled(net)[0]


def clips(count=30):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (2, 6, 6, 3), dtype=np.uint8) for _ in range(count)]


def test_counts_are_those_of_the_session(program):
    with Session(program) as session:
        ranks = [[int(each.label) for each in session.classify(c, 7).labels] for c in clips()]
    labels = [rank[i % 7] for i, rank in enumerate(ranks)]  # the right label is at place i % 7
    found = measure_accuracy(program, zip(clips(), labels, strict=True))
    assert found.clips == 30
    assert found.top1 == pytest.approx(sum(i % 7 == 0 for i in range(30)) / 30)
    assert found.top5 == pytest.approx(sum(i % 7 < 5 for i in range(30)) / 30)
    for i, rank in enumerate(ranks):
        assert found.confusion[labels[i], rank[0]] >= 1
    assert found.confusion.sum() == 30


def test_nothing_to_measure_and_labels_of_others(program):
    with pytest.raises(ProgramError, match="there is no clip to measure on"):
        measure_accuracy(program, [])
    with pytest.raises(ProgramError, match="label 7 is not one of the 7 of net"):
        measure_accuracy(program, [(clips(1)[0], 7)])
    with pytest.raises(ProgramError, match="clip 1, of class 3, has no window"):
        measure_accuracy(program, [(clips(1)[0], 2), ([], 3), (clips(1)[0], 2)])


@pytest.mark.parametrize(
    ("right", "count", "expected"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (20, 20, (0.8389, 1.0)),
    ],
)
def test_the_interval_is_wilsons(right, count, expected):
    assert wilson_interval(right, count) == pytest.approx(expected, abs=6e-5)


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    """Two bins: 4 clips of confidence 0.9, half right; 2 of confidence 0.5, all right."""
    confidences = np.array([0.9, 0.9, 0.9, 0.9, 0.5, 0.5])
    right = np.array([1, 1, 0, 0, 1, 1], bool)
    assert calibration_error(confidences, right) == pytest.approx((4 * 0.4 + 2 * 0.5) / 6)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.1, 1, 100_000)
    assert calibration_error(confidences, rng.uniform(size=100_000) < confidences) < 0.01
    assert calibration_error(confidences, rng.uniform(size=100_000) < confidences**2) > 0.1


def test_classes_are_counted_one_by_one():
    labels = np.array([0, 0, 0, 1, 1, 2])
    best = np.array([0, 1, 1, 1, 0, 1])
    found = accuracy_of(3.0 * np.eye(4)[best], labels)
    assert (found.right, found.clips, found.top1, found.top5) == (2, 6, 2 / 6, 1.0)
    assert found.confusion.tolist() == [[1, 2, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    one = found.of_class(0)
    assert (one.clips, one.right, one.predicted, one.taken_for) == (3, 1, 2, 1)
    assert found.of_class(3).taken_for is None and found.of_class(3).clips == 0
    share = np.exp(3) / (np.exp(3) + 3)  # the confidence of every clip
    assert found.calibration_error == pytest.approx(abs(share - 2 / 6))


def test_a_measured_program_has_the_probabilities_of_its_session(program):
    with Session(program) as session:
        scores = [session.run(c) for c in clips()]
    found = measure_accuracy(program, [(c, 0) for c in clips()])
    confidences = np.array([s.probabilities.max() for s in scores])
    right = np.array([s.logits.argmax() == 0 for s in scores])
    assert found.calibration_error == pytest.approx(calibration_error(confidences, right))


@pytest.mark.parametrize("classes", [3, 100])
def test_the_confusion_is_drawn(tmp_path, classes):
    confusion = np.random.default_rng(0).integers(0, 9, (classes, classes))
    names = [f"$class_{i} of ^{{" for i in range(classes)]
    figure = plot_confusion(confusion, names)
    figure.savefig(tmp_path / "plot.svg")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ([str(n) for n in confusion.ravel() if n] if classes == 3 else [])
    shown = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shown.sum(axis=1), 1)
