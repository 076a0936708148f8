"""Every task of the emulation agrees with ONNX Runtime within one code, given the same codes."""

import msgspec
import numpy as np
import pytest
import torch
from networks import Net, compiled, random_codes, small_config, stretched
from onnx_oracle import agreements

from pynq_kgrc.accelerator.config import preset
from pynq_kgrc.compiler.network import compile_network
from pynq_kgrc.errors import ModelError
from pynq_kgrc.models.c3d import CLIP as C3D_CLIP
from pynq_kgrc.models.c3d import c3d
from pynq_kgrc.models.checkpoint import load_state
from pynq_kgrc.models.i3d import clip as i3d_clip
from pynq_kgrc.models.i3d import i3d
from pynq_kgrc.models.pretrained import pull
from pynq_kgrc.models.r2plus1d import CLIP as R2PLUS1D_CLIP
from pynq_kgrc.models.r2plus1d import r2plus1d_18
from pynq_kgrc.program import ConvTask, PoolTask
from pynq_kgrc.video import load_clip

TIES = 0.01
"""Largest fraction of a task's codes that may differ: those whose reals are close to a half."""

TWO_ROUNDINGS = 0.3
"""The same with a shortcut, which is rounded separately: 1/4 if fractions are uniform."""


def assert_agrees(program, codes):
    """Assert that few codes differ, by one at most. Prints the fractions (see pytest -rP)."""
    elements = differing = 0
    for task, found in zip(program.tasks, agreements(program, codes), strict=True):
        print(f"{found.task}: {found.differing} of {found.elements} ({found.fraction:.4%}) differ")
        assert found.worst <= 1, f"{found.task}: codes differ by up to {found.worst}"
        most = TWO_ROUNDINGS if getattr(task, "shortcut", None) is not None else TIES
        assert found.differing <= 1 + most * found.elements, found
        elements += found.elements
        differing += found.differing
    print(f"{program.name}: {differing} of {elements} ({differing / elements:.4%}) differ by one")


def with_shortcut(net):
    """A residual block with a pooled sum, and a second block with strides."""
    a = net.conv("clip", 6)
    b = net.add(net.conv(a, 6, act="none"), a)
    c = net.pool(b, (1, 2, 2))
    d = net.add(net.conv(c, 9, stride=2, act="none"), net.conv(c, 9, 1, 2, 0, act="none"))
    return net.dense(d, 5)


def with_concat(net):
    """An Inception block: pools and convolutions that write to different channels of one buffer."""
    a = net.conv("clip", 5)
    parts = [
        net.conv(a, 4, 1, 1, 0),
        net.conv(net.conv(a, 4, 1, 1, 0), 8),
        net.conv(net.pool(a, 3, 1, 1), 2, 1, 1, 0),
    ]
    return net.dense(net.pool(net.concat(*parts), 3, 3, 1), 5)


def with_pools(net):
    """Overlapping, padded on one side, fused and average pools; ReLU6 and strides."""
    a = net.conv("clip", 8, (3, 5, 5), (1, 2, 2), 1, (1, 2, 2), act="relu6")
    b = net.pool(a, 3, 2, 0, 1)
    c = net.conv(b, 9, (1, 3, 3), 1, (0, 1, 1), act="none")
    d = net.pool(c, 2, 1, 0, op="average_pool")
    e = net.pool(net.conv(d, 7, (2, 1, 1), 1, 0), (1, 2, 2))
    f = net.pool(e, net.layers[e].size, 1, op="average_pool")
    return net.dense(f, 5)


NETWORKS = {make.__name__: make for make in (with_shortcut, with_concat, with_pools)}


def small_program(name, bits):
    net = Net(size=(6, 17, 17), seed=3)
    NETWORKS[name](net)
    return compiled(net, small_config(bits))[0]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_small_networks(name, bits):
    program = small_program(name, bits)
    assert_agrees(program, random_codes(program))


def test_the_small_networks_have_every_feature_of_a_task():
    tasks = [task for name in NETWORKS for task in small_program(name, 8).tasks]
    convolutions = [task for task in tasks if isinstance(task, ConvTask)]
    assert any(task.shortcut is not None for task in convolutions)
    assert any(task.pool is not None for task in convolutions)
    assert any(task.shortcut is not None and task.pool is not None for task in convolutions)
    assert any(task.source.channel or task.target.channel for task in tasks)
    assert {task.average for task in tasks if isinstance(task, PoolTask)} == {True, False}


@pytest.mark.parametrize("kept", [0.5, 1 / 9, 0.0])
def test_pruned_weights(kept):
    net = Net(size=(5, 9, 9))
    net.conv(net.conv(net.conv("clip", 9), 17, kept=kept), 4)
    program, _ = compiled(net)
    assert_agrees(program, random_codes(program))


def test_saturation_at_both_ends():
    net = Net(size=(5, 9, 9))
    net.conv(net.conv(net.conv("clip", 9, act="none"), 17, act="none"), 4, act="none")
    program, _ = compiled(net)
    assert_agrees(stretched(program, 3), random_codes(program))


def changed(program, **edit):
    """The program with fields of each convolution replaced: `edit` maps a field to a function."""
    tasks = tuple(
        msgspec.structs.replace(task, **{k: f(task) for k, f in edit.items()})
        if isinstance(task, ConvTask)
        else task
        for task in program.tasks
    )
    return msgspec.structs.replace(program, tasks=tasks)


def two_codes(task):
    """A bias that is larger by two codes of the output."""
    step = np.exp2(task.shift.astype(np.float64)) / np.maximum(task.mult, 1)
    return task.bias + np.ceil(2 * step).astype(np.int64)


FAULTS = {
    "bias": two_codes,
    "in_zero": lambda task: task.in_zero + 20,
    "mult": lambda task: (task.mult * 1.1).astype(np.int32),
    "hi": lambda task: task.out.zero_point + 5,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_detects_a_fault(fault):
    net = Net(size=(4, 9, 9))
    net.conv(net.conv("clip", 6, act="none"), 5, act="none")
    program, _ = compiled(net)
    wrong = changed(program, **{fault: FAULTS[fault]})
    found = list(agreements(program, random_codes(program), oracle=wrong))
    assert all(task.worst > 1 for task in found), found


def test_the_oracle_detects_a_wrong_shortcut():
    program = small_program("with_shortcut", 8)
    wrong = changed(
        program,
        shortcut=lambda task: (
            task.shortcut
            and msgspec.structs.replace(task.shortcut, zero_point=task.shortcut.zero_point + 9)
        ),
    )
    worst = {
        task.name: found.worst
        for task, found in zip(
            program.tasks, agreements(program, random_codes(program), oracle=wrong), strict=True
        )
        if isinstance(task, ConvTask) and task.shortcut is not None
    }
    assert len(worst) == 2 and min(worst.values()) > 1, worst


def noise(clip):
    """Frames of seeded noise, in squares of 8 x 8 pixels: convolutions average out finer noise."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (clip.frames, clip.height // 8, clip.width // 8, 3), np.uint8)
    return small.repeat(8, 1).repeat(8, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "clip"),
    [(c3d, C3D_CLIP), (r2plus1d_18, R2PLUS1D_CLIP)],
    ids=["c3d", "r2plus1d_18"],
)
def test_whole_networks_with_seeded_weights(build, clip):
    torch.manual_seed(0)
    frames = noise(clip)
    program = compile_network(build(), clip, [frames], preset("8-sparse"))
    assert_agrees(program, program.encode_clip(frames))


@pytest.mark.slow
@pytest.mark.network
def test_whole_i3d_with_published_weights(example_clips):
    network, clip = i3d(), i3d_clip(16)
    try:
        load_state(network, pull("i3d-kinetics400"))
    except ModelError as error:
        pytest.skip(f"I3D's published weights cannot be had, so it is not tested: {error}")
    frames = load_clip(example_clips / "arm_wrestling_k400.mp4", clip).frames
    program = compile_network(network, clip, [frames], preset("8-sparse"))
    assert_agrees(program, program.encode_clip(frames))
