"""The networks have the sizes, names and paddings of the published ones.

They are built on torch's meta device where shapes are all that counts.
"""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from pynq_kgrc.models import NETWORKS, find_network
from pynq_kgrc.models.c3d import c3d
from pynq_kgrc.models.i3d import I3D, clip, i3d
from pynq_kgrc.models.r2plus1d import r2plus1d_18


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("build", "classes", "count"),
    [
        (c3d, 101, 78_409_573),  # UCF101 head, as quoted for C3D's reimplementations
        (c3d, 487, 79_991_015),  # Sports-1M head
        (r2plus1d_18, 400, 31_505_325),  # torchvision's own figure
        (i3d, 400, 12_689_984),  # the 12.7 M values of the published checkpoint
    ],
)
def test_parameter_counts_are_the_published_ones(build, classes, count):
    with torch.device("meta"):
        assert trainable(build(classes)) == count


@pytest.mark.parametrize("name", NETWORKS)
def test_the_table_names_networks_that_take_their_own_clip(name):
    build, spec = find_network(name)
    with torch.device("meta"):
        network = build(classes=5).eval()
        logits = network(torch.zeros(1, 3, spec.frames, spec.height, spec.width))
    assert logits.shape == (1, 5)


def test_the_table_wakes_no_torch():
    code = (
        "import sys, pynq_kgrc.models, pynq_kgrc.models.pretrained; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("stem.0.weight", (45, 3, 1, 7, 7)),
        ("stem.1.running_mean", (45,)),
        ("stem.3.weight", (64, 45, 3, 1, 1)),
        ("stem.4.bias", (64,)),
        ("layer1.0.conv1.0.0.weight", (144, 64, 1, 3, 3)),
        ("layer1.0.conv1.0.1.weight", (144,)),
        ("layer1.0.conv1.0.3.weight", (64, 144, 3, 1, 1)),
        ("layer1.0.conv1.1.running_var", (64,)),
        ("layer1.1.conv2.0.3.weight", (64, 144, 3, 1, 1)),
        ("layer2.0.conv1.0.0.weight", (230, 64, 1, 3, 3)),
        ("layer2.0.conv2.0.0.weight", (230, 128, 1, 3, 3)),
        ("layer2.0.downsample.0.weight", (128, 64, 1, 1, 1)),
        ("layer2.0.downsample.1.num_batches_tracked", ()),
        ("layer2.1.conv1.0.0.weight", (288, 128, 1, 3, 3)),
        ("layer3.0.conv1.0.0.weight", (460, 128, 1, 3, 3)),
        ("layer4.0.conv1.0.0.weight", (921, 256, 1, 3, 3)),
        ("layer4.1.conv2.1.weight", (512,)),
        ("fc.weight", (400, 512)),
        ("fc.bias", (400,)),
    ],
)
def test_r2plus1d_names_are_torchvisions(r2plus1d_state, name, shape):
    assert tuple(r2plus1d_state[name].shape) == shape


def test_r2plus1d_has_no_tensors_beyond_torchvisions(r2plus1d_state):
    # 37 convolutions, 37 batch norms of 5 tensors, and the head
    assert len(r2plus1d_state) == 37 + 37 * 5 + 2


@pytest.fixture(scope="module")
def r2plus1d_state():
    with torch.device("meta"):
        return r2plus1d_18().state_dict()


@pytest.fixture(scope="module")
def network() -> I3D:
    with torch.device("meta"):
        return i3d().eval()


def test_i3d_pads_as_tensorflow_does(network):
    sizes: dict[nn.Module, tuple[int, ...]] = {}
    units = [
        m
        for m in network.modules()
        if isinstance(m, nn.MaxPool3d) or (hasattr(m, "conv") and hasattr(m, "pad"))
    ]
    for unit in units:
        unit.register_forward_hook(
            lambda m, inputs, out: sizes.__setitem__(
                m, (tuple(inputs[0].shape[2:]), tuple(out.shape[2:]))
            )
        )
    network(torch.zeros(1, 3, 16, 224, 224, device="meta"))
    assert len(sizes) == 57 + 13
    for unit, (before, after) in sizes.items():
        window = unit if isinstance(unit, nn.MaxPool3d) else unit.conv
        kernel, stride = (
            (v,) * 3 if isinstance(v, int) else v for v in (window.kernel_size, window.stride)
        )
        for axis in range(3):
            out = math.ceil(before[axis] / stride[axis])
            total = max((out - 1) * stride[axis] + kernel[axis] - before[axis], 0)
            assert after[axis] == out
            if window is not unit:
                low, high = unit.pad.padding[4 - 2 * axis : 6 - 2 * axis]
                assert (low, high) == (total // 2, total - total // 2)


def test_i3d_max_pools_see_one_more_element_after_and_none_before():
    with torch.device("meta"):
        pool = i3d(1).MaxPool3d_4a_3x3
    values = torch.zeros(1, 1, 4, 4, 4)
    values[..., -1] = 1
    values[..., 0] = 2
    assert pool(values)[0, 0, 0, 0].tolist() == [2, 1]


def test_i3d_norm_has_no_scale(network):
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm3d)]
    assert len(norms) == 57
    assert {m.eps for m in norms} == {1e-3}
    assert not any(m.weight.requires_grad for m in norms)


def test_i3d_takes_more_frames(network):
    assert (clip(32).frames, clip().frames) == (32, 64)
    assert network(torch.zeros(1, 3, 24, 224, 224, device="meta")).shape == (1, 400)
