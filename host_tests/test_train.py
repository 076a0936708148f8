"""Training learns and resumes; the commands, from videos to the accuracy of a program."""

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from movies import MOVES, write_movies
from safetensors.torch import load_file, save_file
from torch import nn

from pynq_kgrc.accelerator.config import preset, write_design
from pynq_kgrc.cli import main
from pynq_kgrc.compiler.latency import program_cycles
from pynq_kgrc.compress.admm import Admm, pruning_projections
from pynq_kgrc.compress.augment import PLAIN, Augmentation, varied_batches, wide_spec
from pynq_kgrc.compress.dataset import Clips, VideoSet, load_clips, read_index
from pynq_kgrc.compress.masks import zero_places
from pynq_kgrc.compress.patterns import KernelGroups, Rates, Weights, project_pattern
from pynq_kgrc.compress.pruning import PruneConfig, prune_network
from pynq_kgrc.compress.recipes import ALGORITHMS, read_recipe
from pynq_kgrc.compress.reweighted import Reweighted
from pynq_kgrc.compress.train_quantized import approach_codes
from pynq_kgrc.compress.training import (
    TrainConfig,
    TrainingSetup,
    average_decay,
    learning_rate,
    measure_top1,
    predict,
    read_config,
    train,
    write_config,
)
from pynq_kgrc.compress.weights import load_notes
from pynq_kgrc.errors import ConfigError, ModelError
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.models import pretrained
from pynq_kgrc.models.checkpoint import load_state
from pynq_kgrc.models.pretrained import RELEASES
from pynq_kgrc.program import load

HALF, THIRD = Fraction(1, 2), Fraction(1, 3)
CLIP = ClipSpec(frames=8, height=24, width=24, short_side=24)
SHORT = TrainConfig(epochs=3, batch=8, augment=Augmentation(erase=0))


class Small(nn.Module):
    """[N, 3, 8, 24, 24] to logits; a checkpoint must hold its batch norms and dropout states."""

    def __init__(self, classes=4):
        super().__init__()
        self.conv1 = nn.Conv3d(3, 8, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2), bias=False)
        self.norm1 = nn.BatchNorm3d(8)
        self.conv2 = nn.Conv3d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm3d(16)
        self.conv3 = nn.Conv3d(16, 16, 3, stride=2, padding=1, bias=False)
        self.norm3 = nn.BatchNorm3d(16)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(2 * 3 * 3 * 16, classes)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        x = torch.relu(self.norm3(self.conv3(x)))
        return self.fc(self.dropout(x.flatten(1)))


def small(classes=4):
    return Small(classes)


def network(seed=0):
    torch.manual_seed(seed)
    return Small()


@pytest.fixture(scope="module")
def movies(tmp_path_factory):
    return write_movies(tmp_path_factory.mktemp("movies"))


@pytest.fixture(scope="module")
def clips(movies):
    videos = read_index(movies)
    cache = movies / "cache"
    learn = load_clips(videos.only("train"), wide_spec(CLIP), cache)
    return learn, load_clips(videos.only("test"), CLIP, cache)


def parameters(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, msg=name)


class Killed(Exception):
    pass


def penalties():
    recipe = {"conv2": KernelGroups(Rates(cols=Fraction(2, 3)))}
    return {
        "plain": lambda module: None,
        "reweighted": lambda module: Reweighted(module, recipe, 1e-2, updates=2),
        "admm": lambda module: Admm(module, pruning_projections(recipe), rho=0.1, rounds=1),
    }


@pytest.mark.parametrize(
    "kind",
    [
        *("plain", "reweighted", "admm"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("average", "sgd")),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(clips, tmp_path, kind):
    config = msgspec.structs.replace(
        SHORT,
        average=0.8 if kind == "average" else 0.0,
        optimizer="sgd" if kind == "sgd" else "adamw",
        epochs=4,
    )
    make = penalties().get(kind, penalties()["plain"])
    whole = network()
    rows = train(whole, *clips, CLIP, config, tmp_path / "whole", make(whole))

    def kill(row):
        if row.epoch == 2:
            raise Killed

    first = network()
    with pytest.raises(Killed):
        train(first, *clips, CLIP, config, tmp_path / "killed", make(first), watch=kill)
    second = network()
    again = train(second, *clips, CLIP, config, tmp_path / "killed", make(second))
    assert_same(parameters(whole), parameters(second))
    assert len(again) == 4
    for one, other in zip(rows, again, strict=True):
        changed = msgspec.structs.replace(other, seconds=one.seconds)
        assert one == changed
    with (tmp_path / "killed" / "log.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert [row["epoch"] for row in logged] == ["0", "1", "2", "3"]
    assert float(logged[-1]["test_top1"]) == rows[-1].test_top1
    # a finished run does not train again
    third = network()
    train(third, *clips, CLIP, config, tmp_path / "killed", make(third), watch=kill)
    assert_same(parameters(whole), parameters(third))


@pytest.mark.slow
def test_another_seed_is_another_run(clips, tmp_path):
    one, other = network(), network()
    train(one, *clips, CLIP, SHORT, tmp_path / "0")
    train(other, *clips, CLIP, msgspec.structs.replace(SHORT, seed=1), tmp_path / "1")
    assert (one.fc.weight != other.fc.weight).any()


def test_checkpoints_of_others_and_damaged_ones_are_refused(clips, tmp_path):
    train(network(), *clips, CLIP, SHORT, tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    with pytest.raises(
        ModelError, match=r"belongs to another run: its lr is 0.002, not 0.1; use an"
    ):
        train(network(), *clips, CLIP, msgspec.structs.replace(SHORT, lr=0.1), tmp_path)
    with pytest.raises(ModelError, match="its network and its first weights is '"):
        train(network(seed=5), *clips, CLIP, SHORT, tmp_path)
    for damaged in (whole[: len(whole) // 2], b"", whole.replace(b"rows", b"sowr")):
        path.write_bytes(damaged)
        module = network()
        before = parameters(module)
        with pytest.raises(ModelError, match=r"is no whole checkpoint .*; remove it to start over"):
            train(module, *clips, CLIP, SHORT, tmp_path)
        assert_same(before, parameters(module))
        assert path.read_bytes() == damaged


def test_a_loss_that_is_not_finite_stops_the_run(clips, tmp_path):
    module = network()
    with torch.no_grad():
        module.fc.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="epoch 1: the loss is not finite; use a lower lr"):
        train(module, *clips, CLIP, SHORT, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_what_is_pruned_stays_zero_and_other_zeros_learn(clips, tmp_path):
    module = network()
    pruned = {"conv2": torch.zeros(module.conv2.weight.shape, dtype=torch.bool)}
    pruned["conv2"][:, :, 1] = True
    with torch.no_grad():
        module.conv2.weight[:, :, 1] = 0
        module.conv3.weight[:, :4] = 0
        nn.init.zeros_(module.fc.weight)
    config = msgspec.structs.replace(SHORT, average=0.9)
    said = []
    train(module, *clips, CLIP, config, tmp_path, pruned=pruned, say=said.append)
    assert (module.conv2.weight[:, :, 1] == 0).all()
    assert (module.conv2.weight[:, :, [0, 2]] != 0).all()
    assert (module.conv3.weight != 0).all()
    assert (module.fc.weight != 0).float().mean() > 0.9  # some inputs are 0 for every clip
    assert said == [f"{tmp_path}: pruned weights, which stay zero: conv2 33.3% of the weights"]


def test_a_run_resumes_on_its_own_clips_teacher_and_mask_only(clips, tmp_path):
    learn, test = clips
    teacher = network(seed=9)
    mask = {"conv2": torch.zeros(16, 8, 3, 3, 3, dtype=torch.bool)}
    mask["conv2"][0] = True

    def again(learn=learn, test=test, teacher=teacher, mask=mask, clip=CLIP):
        return train(network(), learn, test, clip, SHORT, tmp_path, teacher=teacher, pruned=mask)

    again()
    again()
    changed = np.array(learn.frames)
    changed[3, 0, 0, 0, 0] ^= 1
    others = np.array(test.frames)
    others[0, 0, 0, 0, 0] ^= 1
    for text, different in {
        "its clips is": {"learn": Clips(changed, learn.labels)},
        "its test clips is": {"test": Clips(others, test.labels)},
        "its teacher is": {"teacher": network(seed=8)},
        "its mask of pruned weights is": {"mask": {}},
        "its clip is": {"clip": replace(CLIP, mean=(0.4, 0.5, 0.5))},
    }.items():
        with pytest.raises(ModelError, match=f"belongs to another run: {text}"):
            again(**different)
    # the same bytes, loaded or handed over
    again(learn=Clips(np.array(learn.frames), learn.labels))


def test_labels_beyond_the_network_are_refused(clips, tmp_path):
    torch.manual_seed(0)
    with pytest.raises(
        ConfigError, match="has 3 classes; a clip has the label 3; accepted are 0 t"
    ):
        train(Small(3), *clips, CLIP, SHORT, tmp_path)


@pytest.mark.slow
def test_an_average_of_few_epochs_is_of_trained_weights(clips, tmp_path):
    """Ten epochs: without a warm-up the average is mostly of the initial weights (chance, 1/4)."""
    config = msgspec.structs.replace(SHORT, epochs=10, augment=PLAIN, lr=5e-3)
    plain = network()
    rows = train(plain, *clips, CLIP, config, tmp_path / "plain")
    averaged = network()
    config = msgspec.structs.replace(config, average=0.99)
    found = train(averaged, *clips, CLIP, config, tmp_path / "averaged")
    assert rows[-1].test_top1 > 0.6
    assert found[-1].test_top1 > 0.6
    # the trained weights are kept: those of the run without an average
    trained = network()
    load_state(trained, tmp_path / "averaged" / "trained.safetensors")
    assert_same(parameters(trained), parameters(plain))
    assert (averaged.fc.weight != plain.fc.weight).any()
    assert not (tmp_path / "plain" / "trained.safetensors").exists()
    assert [average_decay(0.99, t) for t in (0, 1, 10, 10**6)] == [0.1, 2 / 11, 11 / 20, 0.99]


def test_a_full_disk_leaves_the_last_checkpoint(clips, tmp_path, monkeypatch):
    whole = network()
    train(whole, *clips, CLIP, SHORT, tmp_path / "whole")
    saves = []
    save = torch.save

    def full(state, path):
        saves.append(path)
        if len(saves) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    folder = tmp_path / "run"
    with pytest.raises(ModelError, match=r"cannot be written .*No space left.*goes on from there"):
        train(network(), *clips, CLIP, SHORT, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", "config.toml", "log.csv"]
    assert len((folder / "log.csv").read_text().splitlines()) == 2
    (folder / ".checkpoint.pt.abc").write_bytes(b"of a process that was killed in writing")
    said = []
    again = network()
    train(again, *clips, CLIP, SHORT, folder, say=said.append)
    assert f"{folder}: resumes after epoch 1 of 3" in said
    assert_same(parameters(whole), parameters(again))
    assert not list(folder.glob(".*"))


def test_a_teacher_is_followed(clips, tmp_path):
    teacher = network(seed=9)
    nn.init.normal_(teacher.fc.weight, std=0.3)
    config = msgspec.structs.replace(SHORT, epochs=12, distill=1.0, augment=PLAIN)
    opinion = predict(teacher, clips[1], CLIP).log_softmax(1)
    distance = []
    for name, master in (("alone", None), ("taught", teacher)):
        module = network()
        train(module, *clips, CLIP, config, tmp_path / name, teacher=master)
        ours = predict(module, clips[1], CLIP).log_softmax(1)
        distance.append(float((opinion.exp() * (opinion - ours)).sum(1).mean()))
    assert distance[1] < 0.5 * distance[0]


def test_the_rate_rises_falls_and_starts_over():
    config = TrainConfig(lr=1.0, warmup=0.25)
    rates = [learning_rate(config, done / 100) for done in range(101)]
    assert rates[0] == 0 and max(rates) == rates[25] == 1.0 and rates[100] == pytest.approx(0)
    assert rates[:26] == sorted(rates[:26]) and rates[25:] == sorted(rates[25:], reverse=True)
    staged = TrainConfig(lr=1.0, warmup=0.25, stages=2)
    assert learning_rate(staged, 0.125) == learning_rate(staged, 0.625) == 1.0
    assert learning_rate(staged, 0.499) < 0.01 and learning_rate(staged, 1.0) == pytest.approx(0)
    tracked = TrainConfig(lr=1.0, warmup=0.25, start=0.5)  # KRP: from the middle of the schedule on
    assert learning_rate(tracked, 0.0) == learning_rate(config, 0.5)
    assert learning_rate(tracked, 0.5) == learning_rate(config, 0.75)


def test_a_tracked_run_has_the_last_rates_of_another():
    """KRP paper, figure 4: the dense run's rates from epoch T - t on."""
    dense = TrainConfig(lr=0.1, epochs=180, warmup=0.1)
    tracked = TrainConfig(lr=0.1, epochs=63, warmup=0.1, track=180)
    for epoch in range(64):
        theirs = learning_rate(dense, (117 + epoch) / 180)
        assert learning_rate(tracked, epoch / 63) == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    assert learning_rate(tracked, 0) < 0.35 * dense.lr
    for wrong in ({"track": 62}, {"track": 180, "start": 0.5}):
        with pytest.raises(ConfigError, match="a tracked run has at least as many epochs"):
            TrainConfig(epochs=63, **wrong)


def test_the_rate_falls_in_steps():
    """KRP paper, figure 11(a); in stages and tracked as well."""
    config = TrainConfig(lr=1.0, warmup=0.0, epochs=160, steps=(0.5, 0.75))
    rates = [learning_rate(config, epoch / 160) for epoch in (0, 79, 80, 119, 120, 160)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    tracked = TrainConfig(lr=1.0, warmup=0.0, epochs=80, track=160, steps=(0.5, 0.75))
    assert learning_rate(tracked, 0) == pytest.approx(0.1)
    for steps in ((0.75, 0.5), (0.5, 1.0), (0.0,)):
        with pytest.raises(ConfigError, match="accepted are rising numbers in 0 to 1"):
            TrainConfig(steps=steps)


def test_a_checkpoint_from_before_a_setting_existed_is_resumed(clips, tmp_path):
    train(network(), *clips, CLIP, SHORT, tmp_path)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    identity = json.loads(state["identity"])
    for later in ("track", "steps"):
        del identity["config"][later]
    state["identity"] = json.dumps(identity)
    del state["finished"]
    torch.save(state, path)
    assert len(train(network(), *clips, CLIP, SHORT, tmp_path)) == SHORT.epochs
    changed = msgspec.structs.replace(SHORT, steps=(0.5,))
    with pytest.raises(ModelError, match=r"its steps is \[\], not \[0.5\]"):
        train(network(), *clips, CLIP, changed, tmp_path)


class SettlesAfterTwo(Reweighted):
    def start_epoch(self, epoch, epochs):
        super().start_epoch(epoch, epochs)
        self.epoch = epoch

    def settled(self):
        return self.epoch == 1


def test_a_run_ends_when_its_penalty_has_settled(clips, tmp_path):
    """A finished run does not go on when it is started again, whatever its penalty then says."""
    config = msgspec.structs.replace(SHORT, average=0.9, measure_every=3)
    recipe = {"conv2": KernelGroups(Rates(cols=THIRD))}

    def run(penalty):
        module, said = network(), []
        rows = train(
            module, *clips, CLIP, config, tmp_path, penalty(module, recipe, 1e-2), say=said.append
        )
        return module, rows, said

    module, rows, said = run(SettlesAfterTwo)
    assert len(rows) == 2 and rows[-1].test_top1 is not None
    assert said[-1] == f"{tmp_path}: settled after epoch 2 of 3"
    again, more, said = run(SettlesAfterTwo)
    assert more == rows and len(said) == 1
    assert_same(parameters(again), parameters(module))


def test_settings_are_a_file(tmp_path):
    path = tmp_path / "config.toml"
    config = TrainConfig(epochs=7, optimizer="sgd", augment=Augmentation(degrees=3))
    write_config(config, path)
    assert read_config(path, TrainConfig) == config
    for text, message in {
        "epochs = 0": "epochs = 0 has to be 1 or more",
        "epoch = 1": "unknown field `epoch`",
        "lr = 'x'": "Expected `float`, got `str` - at `\\$.lr`",
        "lr = -1.0": "lr and temperature have to be above 0",
        "warmup = 1.5": "warmup = 1.5; accepted is 0 to below 1",
        "distill = 2.0": "distill = 2.0; accepted is 0 to 1",
        "lr = = 1": "config.toml",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_config(path, TrainConfig)
    with pytest.raises(ConfigError, match=r"gone\.toml"):
        read_config(tmp_path / "gone.toml", TrainConfig)


def test_unvaried_clips_are_what_the_network_is_tested_on(movies):
    """Cropped from the wide clip, they resemble those decoded at the network's size."""
    videos = read_index(movies).only("test")
    wide = load_clips(videos, wide_spec(CLIP), movies / "cache")
    plain = load_clips(videos, CLIP, movies / "cache")
    generator = torch.Generator().manual_seed(3)
    ((values, labels),) = varied_batches(wide, CLIP, PLAIN, len(wide), generator)
    order = torch.randperm(len(wide), generator=torch.Generator().manual_seed(3)).numpy()
    np.testing.assert_array_equal(labels.numpy(), plain.labels[order])
    for ours, clip in zip(values.numpy(), order, strict=True):
        theirs = CLIP.normalise(plain.frames[clip])
        assert ours.shape == theirs.shape
        assert abs(ours.mean() - theirs.mean()) < 0.1
        likeness = np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]
        others = [
            np.corrcoef(ours.ravel(), CLIP.normalise(plain.frames[i]).ravel())[0, 1]
            for i in range(len(plain))
            if i != clip
        ]
        assert likeness > 0.6 and np.mean(others) < 0.3


def test_variation_differs_by_draw_and_is_shared_out(clips):
    learn, _ = clips

    def epoch(seed, share=(0, 1)):
        generator = torch.Generator().manual_seed(seed)
        return list(varied_batches(learn, CLIP, Augmentation(), 8, generator, share))

    one, same, other = epoch(1), epoch(1), epoch(2)
    assert len(one) == 3
    assert all((a[0] == b[0]).all() for a, b in zip(one, same, strict=True))
    assert (one[0][0] != other[0][0]).any()
    halves = [epoch(1, (rank, 2)) for rank in (0, 1)]
    for whole, left, right in zip(one, *halves, strict=True):
        assert torch.equal(whole[0][0::2], left[0]) and torch.equal(whole[0][1::2], right[0])
        assert torch.equal(whole[1][1::2], right[1])


@pytest.fixture(scope="module")
def trained(movies):
    """The folder of a run of the command train."""
    folder = movies / "dense"
    settings = movies / "train.toml"
    settings.write_text("epochs = 25\nbatch = 8\nmeasure_every = 25\n[augment]\nerase = 0.0\n")
    arguments = ["--data", str(movies), "--cache", str(movies / "cache"), "-o", str(folder)]
    assert main(["train", "test_train:small", *arguments, "--config", str(settings)]) == 0
    return folder


def test_from_videos_to_the_accuracy_of_a_program(movies, trained, capsys):
    """The documented sequence: train, prune, quantize, evaluate (docs/accuracy.md)."""
    data = ["--data", str(movies), "--cache", str(movies / "cache"), "--json"]
    short = movies / "short.toml"
    short.write_text("epochs = 8\nbatch = 8\nlr = 1e-3\n[augment]\nerase = 0.0\n")

    def run(*arguments):
        assert main([*arguments, *data]) == 0
        return json.loads(capsys.readouterr().out)

    weights = str(trained / "weights.safetensors")
    network = ["test_train:small", "--weights"]
    dense = run("evaluate", "--network", *network, weights)
    assert dense["clips"] == 12 and dense["top1"] > 0.7  # a quarter is chance

    settings = movies / "prune.toml"
    retrain = short.read_text().replace("[augment]", "[retrain.augment]")
    settings.write_text(f"[retrain]\n{retrain}")
    folder = movies / "pruned"
    pruned = run(
        *("prune", *network, weights, "-o", str(folder), "--config", str(settings)),
        *("--algorithm", "one-shot", "--pattern", "kgrc", "--reduction", "2.8"),
        *("--layers", "conv1,conv2,conv3"),
    )
    assert pruned["reduction"] >= 2.8
    assert pruned["design"] == "8-sparse" and pruned["latency_reduction"] > 1
    assert 0 < pruned["array_macs"] < pruned["array_macs_dense"]
    cycles = pruned["modelled_cycles_dense"] / pruned["modelled_cycles"]
    assert pruned["latency_reduction"] == pytest.approx(cycles, abs=1e-3)
    assert pruned["test_top1"] >= dense["top1"] - 0.2
    assert {entry.pattern for entry in read_recipe(folder / "recipe.toml").values()} == {"kgrc"}

    weights = str(folder / "weights.safetensors")
    out = movies / "codes"
    coded = run("quantize", *network, weights, "-o", str(out), "--config", str(short))
    assert coded["emulated_top1"] >= dense["top1"] - 0.2
    program = run("evaluate", "-p", str(out / "program.kgrc"))
    assert program["top1"] == coded["emulated_top1"]
    assert np.array(program["confusion"]).sum() == 12
    # what is pruned is stored beside the weights, and stays zero in the program
    notes = load_notes(weights)
    assert (
        notes.classes == MOVES and notes.pruned.keys() == read_recipe(folder / "recipe.toml").keys()
    )
    for layer, places in load_pruned(out / "program.kgrc", notes.pruned).items():
        assert not places.any(), layer
    assert coded["bytes"] < 0.95 * dense_bytes(movies, trained, network, data, capsys)
    assert main(["info", str(out / "program.kgrc"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["macs_dense"] / info["macs_kept"] > 2.5
    # folding regroups the first layer's columns, so that KGRC need not be seen: a pattern is
    assert {task["mode"] for task in info["tasks"]} & {"KGR", "KGC", "KGRC"}


def load_pruned(path, pruned):
    """By layer, the weights of a program at the places that are pruned."""
    program = load(path)
    config, tasks = program.config, {task.name: task for task in program.tasks}
    found = {}
    for name, places in pruned.items():
        weight = tasks[name].weights.expand(tasks[name].shape, config.gm, config.tk)
        if program.fold is not None and tasks[name].source == program.source:
            # [M, taps that the host writes, N, ...] back to [M, N, kd, kh, kw]
            kernels = (*program.fold.kernel, program.fold.channels, *tasks[name].shape.kernel)
            weight = weight.reshape(-1, *kernels).transpose(0, 4, 1, 5, 2, 6, 3, 7)
        found[name] = weight.reshape(places.shape)[places.numpy()]
    return found


def dense_bytes(movies, trained, network, data, capsys):
    """The size of the program of the dense network."""
    arguments = [*network, str(trained / "weights.safetensors"), "-o", str(movies / "dense8")]
    assert main(["quantize", *arguments, *data, "--epochs", "0"]) == 0
    return json.loads(capsys.readouterr().out)["bytes"]


def test_zeros_without_a_mask_learn_unless_they_are_kept(movies, trained, tmp_path, capsys):
    """A file of another maker does not say what is pruned: that is told; --keep-zeros decides."""
    state = load_file(trained / "weights.safetensors")
    state["conv2.weight"][:, :, 1] = 0
    plain = tmp_path / "plain.safetensors"
    save_file(state, plain)
    short = tmp_path / "short.toml"
    short.write_text("epochs = 1\nbatch = 8\n")
    data = ["--data", str(movies), "--cache", str(movies / "cache"), "--config", str(short)]
    learn = ["test_train:small", *data, "--weights", str(plain), "--json"]
    assert main(["train", *learn, "-o", str(tmp_path / "a")]) == 0
    told = capsys.readouterr().err
    assert "plain.safetensors does not say what is pruned, so its zeros learn (conv2 33.3%" in told
    assert "pruned weights, which stay zero: none" in told
    found = load_file(tmp_path / "a" / "weights.safetensors")
    assert (found["conv2.weight"][:, :, 1] != 0).all()
    assert main(["train", *learn, "-o", str(tmp_path / "b"), "--keep-zeros"]) == 0
    assert "pruned weights, which stay zero: conv2 33.3% of the weights" in capsys.readouterr().err
    kept = tmp_path / "b" / "weights.safetensors"
    assert (load_file(kept)["conv2.weight"][:, :, 1] == 0).all()
    # the next command knows it from the file
    for command in ("train", "quantize"):
        again = [command, *learn, "-o", str(tmp_path / command)]
        again[again.index(str(plain))] = str(kept)
        assert main(again) == 0
        assert "which stay zero: conv2 33.3%" in capsys.readouterr().err
    weight = load_file(tmp_path / "train" / "weights.safetensors")["conv2.weight"]
    assert (weight[:, :, 1] == 0).all()
    program = load(tmp_path / "quantize" / "program.kgrc")
    (task,) = [t for t in program.tasks if t.name == "conv2"]
    assert not task.weights.expand(task.shape, program.config.gm, 9)[:, :, 9:18].any()
    assert main(["train", *learn[:-3], "-o", str(tmp_path / "c"), "--keep-zeros"]) == 2
    assert "--keep-zeros says how --weights is read, which is not given" in capsys.readouterr().err


def permuted(movies, folder):
    """The same videos, their classes numbered in alphabetical order."""
    folder.mkdir()
    names = sorted(MOVES)
    with (movies / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["label"] = names.index(row["class"])
        (folder / row["file"]).write_bytes((movies / row["file"]).read_bytes())
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_accuracy_is_judged_by_the_names_of_classes(movies, trained, tmp_path, capsys):
    cache = ["--cache", str(movies / "cache"), "--json"]
    weights = str(trained / "weights.safetensors")
    network = ["test_train:small", "--weights", weights]
    out = ["-o", str(tmp_path / "ptq"), "--epochs", "0", "--data"]
    assert main(["quantize", *network, *out, str(movies), *cache]) == 0
    coded = json.loads(capsys.readouterr().out)
    program = str(tmp_path / "ptq" / "program.kgrc")
    other = permuted(movies, tmp_path / "permuted")

    def evaluate(*what):
        assert main(["evaluate", *what, *cache]) == 0
        return json.loads(capsys.readouterr().out)

    for what in (["-p", program], ["--network", *network]):
        ours = evaluate(*what, "--data", str(movies))
        assert ours["top1"] > 0.6
        theirs = evaluate(*what, "--data", str(other))
        assert theirs["confusion"] == ours["confusion"]
        assert [each["label"] for each in theirs["classes"]] == list(MOVES)
    # a program that is compiled on the other index keeps the classes of its weights
    out[1] = str(tmp_path / "other")
    assert main(["quantize", *network, *out, str(other), *cache]) == 0
    assert json.loads(capsys.readouterr().out)["emulated_top1"] == coded["emulated_top1"]
    assert load(tmp_path / "other" / "program.kgrc").labels == MOVES


def test_evaluate_tells_counts_interval_classes_and_draws(movies, trained, tmp_path, capsys):
    weights = str(trained / "weights.safetensors")
    what = ["evaluate", "--network", "test_train:small", "--weights", weights]
    what += ["--data", str(movies), "--cache", str(movies / "cache")]
    plot = tmp_path / "confusion.png"
    assert main([*what, "--json", "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert plot.read_bytes().startswith(b"\x89PNG") and found["plot"] == str(plot)
    right = sum(each["right"] for each in found["classes"])
    assert found["top1"] == right / 12 and found["top1_right"] == right
    assert [each["clips"] for each in found["classes"]] == [3, 3, 3, 3]
    low, high = found["top1_interval_95"]
    assert 0 < low < found["top1"] and high <= 1
    assert 0 <= found["expected_calibration_error"] <= 1
    assert main(what) == 0
    text = capsys.readouterr().out
    assert f"({right} of 12; 95% interval {low:.1%} to {high:.1%})" in text
    assert "(12 of 12; there are only 4 classes)" in text and "expected calibration error" in text
    assert sum(line.startswith(MOVES) for line in text.splitlines()) == 4
    assert main([*what, "--plot", "x.xyz"]) == 2
    assert "--plot x.xyz: accepted are names in .png, .svg" in capsys.readouterr().err


def test_videos_as_people_have_them(movies, tmp_path, capsys):
    """A folder for each class, one of the files broken: train, prune and evaluate."""
    folder = tmp_path / "mine"
    for sample in read_index(movies).samples:
        place = folder / sample.split / f"{MOVES[sample.label]} \u00e9"
        place.mkdir(parents=True, exist_ok=True)
        (place / sample.file).write_bytes((movies / sample.file).read_bytes())
    (folder / "train" / "left \u00e9" / "bad.mpg").write_bytes(b"bad")
    short = tmp_path / "short.toml"
    short.write_text("epochs = 1\nbatch = 8\n")
    data = ["--data", str(folder), "--cache", str(tmp_path / "cache")]
    run = ["train", "test_train:small", *data, "-o", str(tmp_path / "run"), "--config", str(short)]
    assert main(run) == 2
    told = capsys.readouterr().err
    assert "1 videos cannot be decoded: train/left \u00e9/bad.mpg: " in told
    assert main([*run, "--skip-bad"]) == 0
    assert "decoding 24 videos" not in capsys.readouterr().err  # they were not thrown away
    weights = str(tmp_path / "run" / "weights.safetensors")
    assert load_notes(weights).classes == tuple(sorted(f"{move} \u00e9" for move in MOVES))
    what = ["evaluate", "--network", "test_train:small", "--weights", weights, *data, "--json"]
    assert main(what) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == 12
    what[what.index(str(folder))] = str(folder / "test")
    assert main([*what, "--split", "all"]) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == 12


def test_the_settings_of_another_command_are_named(movies, trained, tmp_path, capsys):
    weights = ["--weights", str(trained / "weights.safetensors")]
    data = ["test_train:small", "--data", str(movies), "-o", str(tmp_path / "x")]
    settings = tmp_path / "x.toml"
    settings.write_text("epochs = 3\n")
    prune = ["prune", *data, *weights, "--pattern", "kgr", "--config", str(settings)]
    assert main(prune) == 2
    told = capsys.readouterr().err
    assert "x.toml holds settings for train and quantize; this command takes a TOML file wi" in told
    assert "algorithm, incremental" in told and "go under [prepare] and [retrain]" in told
    settings.write_text("[retrain]\nepochs = 3\n")
    assert main(["train", *data, "--config", str(settings)]) == 2
    assert "x.toml holds settings for prune; this command takes a" in capsys.readouterr().err


def test_an_interruption_is_one_line(movies, trained, tmp_path, capsys, monkeypatch):
    run = ["train", "test_train:small", "--data", str(movies), "--cache", str(movies / "cache")]

    def interrupted(*rest, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("pynq_kgrc.compress.training.TrainingSetup.train", interrupted)
    assert main([*run, "-o", str(tmp_path / "run")]) == 130
    assert "interrupted; the same command goes on from the last whole" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    prune = ["prune", *run[1:], "--weights", str(trained / "weights.safetensors")]
    prune += ["--pattern", "kgr", "--reduction", "1.1", "-o", str(tmp_path / "file" / "run")]
    assert main(prune) == 2
    assert "Not a directory" in capsys.readouterr().err


def command(*arguments):
    """A process of the command line, for which this folder holds the network."""
    folder = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-m", "pynq_kgrc.cli", *map(str, arguments), "--json"],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([folder, *filter(None, map(os.path.abspath, sys.path))]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "prune", "quantize"])
def test_a_command_that_is_killed_at_any_moment_ends_with_the_same_bytes(
    movies, trained, tmp_path, name
):
    """SIGKILL after random times; each start goes on, and no file is half written."""
    settings = tmp_path / "settings.toml"
    text = "epochs = 40\nbatch = 8\naverage = 0.9\n"
    settings.write_text(
        text if name != "prune" else "".join(f"[{part}]\n{text}" for part in ("prepare", "retrain"))
    )
    what = [name, "test_train:small", "--data", movies, "--cache", tmp_path / "cache"]
    what += ["--config", settings]
    if name != "train":
        what += ["--weights", trained / "weights.safetensors"]
    if name == "prune":
        what += ["--pattern", "kgrc", "--reduction", "1.2"]
    if name == "quantize":
        what += ["--admm", "9"]
    begun = time.monotonic()
    whole = command(*what, "-o", tmp_path / "whole")
    output, told = whole.communicate(timeout=300)
    assert whole.returncode == 0, told
    needed = time.monotonic() - begun
    random = np.random.default_rng()
    folder = tmp_path / "killed"
    kills = 0
    for _ in range(4):
        process = command(*what, "-o", folder)
        try:
            process.communicate(timeout=random.uniform(0.3, 0.9) * needed)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        for file in folder.rglob("*"):
            if file.name == "checkpoint.pt":
                torch.load(file, weights_only=True)
            elif file.suffix == ".safetensors" and not file.name.startswith("."):
                load_file(file)
    assert kills
    last = command(*what, "-o", folder)
    found, told = last.communicate(timeout=300)
    assert last.returncode == 0, told
    assert found.replace(str(folder), str(tmp_path / "whole")) == output
    for file in (tmp_path / "whole").rglob("*"):
        if file.suffix in (".safetensors", ".kgrc", ".toml"):
            place = folder / file.relative_to(tmp_path / "whole")
            assert place.read_bytes() == file.read_bytes(), place


def test_post_training_quantization_and_powers(movies, trained, capsys):
    arguments = ["test_train:small", "--weights", str(trained / "weights.safetensors")]
    arguments += ["--data", str(movies), "--cache", str(movies / "cache"), "--json"]
    assert main(["quantize", *arguments, "-o", str(movies / "ptq"), "--epochs", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["emulated_top1"] > 0.6
    short = movies / "four.toml"
    short.write_text("epochs = 4\nbatch = 8\nlr = 1e-3\n")
    assert main(["quantize", *arguments, "-o", str(movies / "powers"), "--config", str(short),
                 "--design", "4-sparse", "--powers"]) == 0  # fmt: skip
    document = json.loads(capsys.readouterr().out)
    assert document["emulated_top1"] > 0.4
    for task in load(movies / "powers" / "program.kgrc").tasks:
        assert set(np.unique(np.abs(task.weights.values))) <= {0, 1, 2, 4}


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "incremental"])
def test_each_algorithm_ends_on_the_pattern_and_still_works(trained, clips, tmp_path, algorithm):
    module = Small()
    load_state(module, trained / "weights.safetensors")
    recipe = {"conv2": KernelGroups(Rates(Fraction(1, 2), Fraction(2, 3))), "fc": Weights(HALF)}
    config = PruneConfig(
        algorithm="one-shot" if algorithm == "incremental" else algorithm,
        incremental=algorithm == "incremental",
        factor=0.05,
        rho=1.0,
        prepare=msgspec.structs.replace(SHORT, epochs=4, lr=1e-3),
        retrain=msgspec.structs.replace(SHORT, epochs=6, lr=1e-3),
    )
    prune_network(module, recipe, config, TrainingSetup(*clips, CLIP), tmp_path)
    for name, pattern in recipe.items():
        weight = getattr(module, name).weight.detach().numpy()
        np.testing.assert_array_equal(project_pattern(weight, pattern), weight)
        kept = np.count_nonzero(weight) / weight.size
        assert kept == pytest.approx(1 / 6 if name == "conv2" else 1 / 2, abs=0.01)
    assert measure_top1(module, clips[1], CLIP) > 0.5
    folders = {path.name for path in tmp_path.iterdir()}
    prepared = algorithm in ("lasso", "reweighted", "admm")
    expected = {"retrain"} | ({"prepare"} if prepared else set())
    assert folders == ({"00-conv2", "01-fc"} if algorithm == "incremental" else expected)


def test_weights_are_drawn_to_codes(movies, trained, clips):
    """ADMM at 16, 8, 4 bits: at most 15 values per filter, and accuracy is kept."""
    module = Small()
    load_state(module, trained / "weights.safetensors")
    with torch.no_grad():
        module.conv2.weight[:, :, 1] = 0
    config = msgspec.structs.replace(SHORT, epochs=9, lr=1e-3)
    setup = TrainingSetup(*clips, CLIP)
    before = measure_top1(module, clips[1], CLIP)
    pruned = {"conv2": zero_places(module)["conv2"]}
    approach_codes(module, 4, config, setup, movies / "admm", pruned=pruned)
    assert (movies / "admm" / "16-bit").is_dir() and (movies / "admm" / "4-bit").is_dir()
    for name in ("conv1", "conv2", "conv3", "fc"):
        for row in getattr(module, name).weight.detach().numpy():
            assert len(np.unique(np.round(row / np.abs(row).max(), 5))) <= 15
    assert (module.conv2.weight[:, :, 1] == 0).all()
    assert measure_top1(module, clips[1], CLIP) >= before - 0.2


def test_a_zero_on_the_command_line_overrides_the_settings(movies, trained, tmp_path, capsys):
    """--seed 0 is a seed, and --epochs 0 is refused rather than ignored."""
    settings = tmp_path / "train.toml"
    settings.write_text("epochs = 1\nbatch = 8\nseed = 5\n")
    data = ["test_train:small", "--data", str(movies), "--cache", str(movies / "cache"), "--json"]
    run = [*data, "--config", str(settings), "-o", str(tmp_path / "run")]
    assert main(["train", *run, "--seed", "0"]) == 0
    assert read_config(tmp_path / "run" / "config.toml", TrainConfig).seed == 0
    capsys.readouterr()
    assert main(["train", *run, "--epochs", "0"]) == 2
    assert "epochs = 0 has to be 1 or more" in capsys.readouterr().err
    weights = ["--weights", str(trained / "weights.safetensors")]
    settings.write_text("[retrain]\nepochs = 1\nbatch = 8\nseed = 5\n")
    prune = [*run[:-1], str(tmp_path / "pruned"), *weights, "--algorithm", "one-shot"]
    assert main(["prune", *prune, "--pattern", "kgr", "--reduction", "1.1", "--seed", "0"]) == 0
    assert read_config(tmp_path / "pruned" / "retrain" / "config.toml", TrainConfig).seed == 0


def test_prune_and_quantize_take_the_file_that_explore_writes(movies, trained, tmp_path, capsys):
    """Rates are searched for a latency on that design, and the program is compiled for it."""
    design = tmp_path / "mine.json"
    write_design(replace(preset("8-sparse"), name="mine", pf=4), design)
    weights = ["--weights", str(trained / "weights.safetensors"), "--design", str(design)]
    data = ["test_train:small", "--data", str(movies), "--cache", str(movies / "cache"), "--json"]
    short = tmp_path / "prune.toml"
    short.write_text("[retrain]\nepochs = 1\nbatch = 8\n")
    pruned = [*data, *weights, "-o", str(tmp_path / "pruned"), "--config", str(short)]
    how = ["--algorithm", "one-shot", "--pattern", "kgrc", "--target", "latency"]
    how += ["--reduction", "1.05", "--layers", "conv1,conv2,conv3"]
    assert main(["prune", *pruned, *how]) == 0
    found = capsys.readouterr()
    report = json.loads(found.out)
    assert report["design"] == "mine" and report["latency_reduction_asked"] == 1.05
    # conv1 stays dense, so that 1.07 is the most that these layers give
    assert report["latency_reduction"] == pytest.approx(1.05, rel=0.01)
    reached = f"reached {report['latency_reduction']:.2f}x on mine (modelled"
    assert f"asked for 1.05x fewer cycles, {reached}" in found.err
    assert "; conv1 stays dense, as the host folds its taps into channels" in found.err
    assert "retraining: epochs 1 to 1, of the weights that are kept" in found.err
    assert "preparation" not in found.err
    weights[1] = str(tmp_path / "pruned" / "weights.safetensors")
    out = tmp_path / "codes"
    assert main(["quantize", *data, *weights, "-o", str(out), "--epochs", "0"]) == 0
    program = load(out / "program.kgrc")
    assert program.config.name == "mine" and program.config.pf == 4
    assert program_cycles(program) == report["modelled_cycles"]


@pytest.fixture
def published(trained, tmp_path, monkeypatch):
    """The trained weights under the name "moves", as if `pull` had fetched them."""
    labels = tmp_path / "moves.txt"
    labels.write_text("\n".join(MOVES))
    monkeypatch.setitem(RELEASES, "moves", replace(RELEASES["i3d-kinetics400"], labels=labels))
    path = trained / "weights.safetensors"
    plain = tmp_path / "moves.safetensors"
    save_file(load_file(path), plain)  # without notes, as a release
    monkeypatch.setattr(pretrained, "pull", lambda name: plain)
    return plain


def test_published_weights_have_their_name_in_every_command(movies, published, tmp_path, capsys):
    data = ["--data", str(movies), "--cache", str(movies / "cache"), "--json"]
    start = ["test_train:small", *data, "--weights", "moves"]
    assert main(["evaluate", "--network", *start]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] > 0.7
    for command, more in {
        "quantize": ["--epochs", "0"],
        "prune": ["--pattern", "kgr", "--reduction", "1.1", "--algorithm", "one-shot"],
    }.items():
        if command == "prune":
            settings = tmp_path / "prune.toml"
            settings.write_text("[retrain]\nepochs = 1\nbatch = 8\n")
            more += ["--config", str(settings)]
        assert main([command, *start, "-o", str(tmp_path / command), *more]) == 0
        if command == "prune":
            assert "moves: 20 tensors, classifier 'fc' of 4 classes kept" in capsys.readouterr().err


def two_moves(movies, folder):
    """A data set of the videos of two of the moves, under other names."""
    names = {"left": "west", "right": "east"}
    rows = (movies / "index.csv").read_text().splitlines()
    folder.mkdir()
    kept = [rows[0]]
    for row in rows[1:]:
        file, label, name, subject, split = row.split(",")
        if name in names:
            shutil.copy(movies / file, folder)
            kept.append(f"{file},{1 - int(label)},{names[name]},{subject},{split}")
    (folder / "index.csv").write_text("\n".join(kept))
    return folder


def test_other_classes_are_learned_from_published_weights(movies, published, tmp_path, capsys):
    folder = two_moves(movies, tmp_path / "two")
    out = tmp_path / "run"
    data = ["--data", str(folder), "--cache", str(tmp_path / "cache"), "-o", str(out)]
    start = ["train", "test_train:small", *data, "--weights", "moves", "--epochs", "1"]
    assert main([*start, "--classes", "3"]) == 2
    assert "--classes 3: " in capsys.readouterr().err
    assert main(start) == 2
    refused = capsys.readouterr().err
    assert "the class 'west'" in refused or "the class 'east'" in refused
    assert refused.endswith("; --partial trains a new classifier\n")
    settings = tmp_path / "slow.toml"
    settings.write_text("epochs = 1\nbatch = 4\nlr = 1e-9\n")
    for option in (["--classes", "2"], ["--partial"]):
        shutil.rmtree(out, ignore_errors=True)
        assert main([*start, "--config", str(settings), *option]) == 0
        told = capsys.readouterr().err
        assert "moves: 18 tensors, classifier 'fc' of 4 classes left out" in told
        before, after = load_file(published), load_file(out / "weights.safetensors")
        torch.testing.assert_close(before["conv2.weight"], after["conv2.weight"])
        assert after["fc.weight"].shape == (2, before["fc.weight"].shape[1])
        assert load_notes(out / "weights.safetensors").classes == ("east", "west")
    # the same command takes its own result, classifier included
    own = str(out / "weights.safetensors")
    again = ["--weights", own, "--classes", "2", "--config", str(settings)]
    assert main(["train", "test_train:small", *data[:-1], str(tmp_path / "on"), *again]) == 0
    assert "classifier 'fc' of 2 classes kept" in capsys.readouterr().err


def test_rates_are_found_below_a_threshold(movies, trained, tmp_path, capsys):
    """RT3D: the penalty comes first, the rates afterwards; a second start finds the same ones."""
    settings = tmp_path / "prune.toml"
    part = "epochs = 1\nbatch = 8\n"
    settings.write_text(f'algorithm = "lasso"\nfactor = 1.0\n[prepare]\n{part}[retrain]\n{part}')
    data = ["test_train:small", "--data", str(movies), "--cache", str(movies / "cache"), "--json"]
    weights = ["--weights", str(trained / "weights.safetensors"), "--config", str(settings)]
    out = tmp_path / "pruned"
    run = ["prune", *data, *weights, "-o", str(out), "--pattern", "kgc"]
    run += ["--layers", "conv2,conv3", "--threshold"]
    assert main([*run, "1.0"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = read_recipe(out / "recipe.toml")
    assert found and all(Fraction(layer.cols) in (THIRD, 2 * THIRD) for layer in found.values())
    assert report["reduction"] > 1.05
    assert main([*run, "1.0"]) == 0
    assert json.loads(capsys.readouterr().out) == report
    assert main([*run, "1e-6"]) == 2
    assert "no layer has enough units of kgc below 1e-06 times" in capsys.readouterr().err
    assert main([*run, "1", "--target", "latency"]) == 2
    assert "--threshold finds the rates itself" in capsys.readouterr().err


def test_thresholds_are_tuned_after_quantization(movies, trained, tmp_path, capsys):
    data = ["test_train:small", "--data", str(movies), "--cache", str(movies / "cache"), "--json"]
    weights = ["--weights", str(trained / "weights.safetensors"), "--epochs", "0"]
    assert main(["quantize", *data, *weights, "-o", str(tmp_path), "--thresholds", "0.1"]) == 0
    found = capsys.readouterr()
    report = json.loads(found.out)
    assert report["thresholds"] and report["operations_by_zero"] > 0.05
    zeros = {
        task.name: float((task.weights.values == 0).mean())
        for task in load(tmp_path / "program.kgrc").tasks
        if task.name in report["thresholds"]
    }
    assert all(0.09 < share < 0.95 for share in zeros.values()), zeros
    assert all(f"{name}: weights below" in found.err for name in report["thresholds"])
    assert main(["quantize", *data, *weights, "-o", str(tmp_path), "--thresholds", "1"]) == 2
    assert "a drop of 1.0; accepted is 0 to below 1" in capsys.readouterr().err


def test_mistakes_are_one_line_and_leave_nothing(movies, trained, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[layers]\nconv9 = { pattern = "kgrc", rows = "1/2" }\n')
    odd = tmp_path / "odd.toml"
    odd.write_text('[layers]\nconv2 = { pattern = "kgc", cols = "1/9" }\n')
    out = tmp_path / "out"
    data = ["--data", str(movies), "--cache", str(movies / "cache")]
    start = ["test_train:small", *data, "-o", str(out)]
    weights = ["--weights", str(trained / "weights.safetensors")]
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    cases = {
        "the recipe names 'conv9'; Small has conv1": [
            "prune",
            *start,
            *weights,
            "--recipe",
            recipe,
        ],
        "conv2: a rate of 1/9 keeps 8 columns of 9": ["prune", *start, *weights, "--recipe", odd],
        "at most 1.24x cheaper, not 50.0x": [
            "prune",
            *start,
            *weights,
            "--pattern",
            "kgrc",
            "--reduction",
            "50",
        ],
        "no pattern 'kg'": ["prune", *start, *weights, "--pattern", "kg"],
        "no recipe 'kgr' for": ["prune", *start, *weights, "--recipe", "kgr"],
        "does not fit Small": ["quantize", *start, "--weights", other],
        "no index of videos": ["train", "thin_c3d", "--data", tmp_path, "-o", out],
        "'vgg' is no network": ["train", "vgg", *data, "-o", out],
        "device 'warp' is not there": ["train", *start, "--device", "warp"],
        "evaluate takes either": ["evaluate", *data],
        "there is no such program": ["evaluate", *data, "-p", "gone.kgrc"],
        "has no split 'val'": ["evaluate", *data, "-p", "gone.kgrc", "--split", "val"],
    }
    for text, arguments in cases.items():
        assert main([str(argument) for argument in arguments]) == 2, text
        found = capsys.readouterr()
        assert text in found.err
        assert "Traceback" not in found.err and found.out == ""
        assert not (out / "weights.safetensors").exists()


@pytest.mark.data
def test_it_learns_real_actions_of_people_it_has_not_seen(shared_data, tmp_path):
    """Nine of the 27 actions, small clips: far above the chance of one in nine."""
    videos = read_index(shared_data / "utd_mhad_depth")
    some = (0, 3, 5, 7, 15, 17, 20, 22, 25)
    samples = tuple(
        type(s)(s.file, some.index(s.label), s.split) for s in videos.samples if s.label in some
    )
    videos = VideoSet(videos.folder, samples, tuple(videos.classes[i] for i in some))
    learn = load_clips(videos.only("train"), wide_spec(CLIP), tmp_path)
    test = load_clips(videos.only("test"), CLIP, tmp_path)
    torch.manual_seed(0)
    module = Small(len(some))
    config = TrainConfig(epochs=20, average=0.95, measure_every=20)
    rows = train(module, learn, test, CLIP, config, tmp_path / "run")
    assert len(test) == 107
    assert rows[-1].test_top1 == measure_top1(module, test, CLIP)
    assert rows[-1].test_top1 > 0.5


@pytest.mark.slow
@pytest.mark.data
def test_i3d_is_fine_tuned_on_real_clips_in_one_command(shared_data, tmp_path, capsys):
    """Few steps from Kinetics-400 to two classes: the features stay near, the classifier is new."""
    try:
        weights = pretrained.pull("i3d-kinetics400")
    except ModelError as error:
        pytest.skip(f"I3D's weights cannot be fetched: {error}")
    source = shared_data / "surveillance_fight"
    rows = list(csv.DictReader((source / "index.csv").open()))
    folder = tmp_path / "data"
    folder.mkdir()
    with (folder / "index.csv").open("w", newline="") as file:
        index = csv.writer(file)
        index.writerow(("file", "label", "split"))
        for label in ("0", "1"):
            for split in ("train", "test"):
                for row in [r for r in rows if (r["label"], r["split"]) == (label, split)][:1]:
                    name = Path(row["file"]).name
                    shutil.copy(source / row["file"], folder / name)
                    index.writerow((name, label, split))
    settings = tmp_path / "few.toml"
    settings.write_text("epochs = 1\nbatch = 1\nlr = 1e-4\n")
    arguments = ["--data", str(folder), "--cache", str(tmp_path / "cache"), "--json"]
    arguments += ["--classes", "2", "--config", str(settings), "-o", str(tmp_path / "run")]
    assert main(["train", "i3d", "--weights", "i3d-kinetics400", *arguments]) == 0
    found = capsys.readouterr()
    assert "classifier 'Logits' of 400 classes left out" in found.err
    before = load_file(weights)
    after = load_file(json.loads(found.out)["path"])
    assert after["Logits.weight"].shape == (2, 1024, 1, 1, 1)
    name = "Mixed_5c.Branch_0.Conv3d_0a_1x1.conv.weight"
    change = (after[name] - before[name]).norm() / before[name].norm()
    assert 0 < change < 0.05


@pytest.mark.slow
def test_two_processes_train_one_network(movies, tmp_path):
    """Under torchrun: one process writes, and the network learns."""
    settings = tmp_path / "train.toml"
    settings.write_text("epochs = 25\nbatch = 8\n[augment]\nerase = 0.0\n")
    folder = Path(__file__).parent
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
            ),
            *("-m", "pynq_kgrc.cli", "train", "test_train:small", "--json"),
            *("--data", str(movies), "--cache", str(movies / "cache"), "-o", str(tmp_path / "run")),
            *("--config", str(settings)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test_top1"] > 0.5
