"""The program that ships: it loads, is small, and is as accurate as its README says."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import pynq_kgrc
from pynq_kgrc.analysis.accuracy import measure_accuracy
from pynq_kgrc.compress.dataset import load_clips, read_index
from pynq_kgrc.compress.recipes import build_patterns, read_recipe
from pynq_kgrc.program import load

FOLDER = Path(pynq_kgrc.__file__).parent / "programs"
PROGRAM = FOLDER / "utd_mhad27.kgrc"


@pytest.fixture(scope="module")
def card():
    return (FOLDER / "README.md").read_text()


def test_it_is_whole_small_and_pruned_as_its_recipe_says(card):
    program = load(PROGRAM)
    assert PROGRAM.stat().st_size < 8e6
    assert len(program.labels) == 27
    assert program.config.name == "8-sparse"
    dense = sum(task.shape.macs for task in program.tasks if hasattr(task, "weights"))
    kept = sum(task.kept_macs for task in program.tasks if hasattr(task, "weights"))
    assert dense / kept >= 3
    assert f"{dense / kept:.2f}x fewer" in card
    patterns = build_patterns(read_recipe(FOLDER / "utd_mhad27.recipe.toml"), program.config)
    tasks = {task.name: task for task in program.tasks}
    for name, pattern in patterns.items():
        shape = tasks[name].shape
        taps = program.group_columns(tasks[name])
        rows, cols = pattern.rates.kept(pattern.size, shape.taps)
        assert tasks[name].weights.kept == (rows, cols)
        assert cols <= taps


@pytest.mark.data
def test_it_knows_people_it_has_not_seen(shared_data, tmp_path):
    """Every twelfth clip of the test set: quick, and enough to be far above chance."""
    program = load(PROGRAM)
    videos = read_index(shared_data / "utd_mhad_depth").only("test")
    few = replace(videos, samples=videos.samples[::12])
    found = measure_accuracy(program, load_clips(few, program.clip, tmp_path))
    assert found.clips == 27
    assert found.top1 > 0.7


@pytest.mark.data
@pytest.mark.slow
def test_its_card_tells_its_accuracy_on_unseen_subjects(shared_data, tmp_path, card):
    program = load(PROGRAM)
    videos = read_index(shared_data / "utd_mhad_depth").only("test")
    assert program.labels == videos.classes
    found = measure_accuracy(program, load_clips(videos, program.clip, tmp_path))
    stated = re.search(r"top-1 \| \*\*([\d.]+) %\*\*", card)
    assert stated is not None
    assert f"{100 * found.top1:.1f}" == stated[1]
    assert found.clips == 323
