"""The accuracy of a program, and the input that it is refused for."""

import numpy as np
import pytest
from networks import Net, compiled

from pynq_kgrc.analysis.accuracy import measure_accuracy
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
