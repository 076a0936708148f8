"""A traced network computes what torch computes; an unsupported operator is named."""

import copy
import math
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import small_config
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from pynq_kgrc.accelerator.cost import task_cost
from pynq_kgrc.analysis.description import describe
from pynq_kgrc.cli import build
from pynq_kgrc.cli.info import summary
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compiler.network import compile_graph
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import ClipSpec, Graph, run_float
from pynq_kgrc.models import c3d, i3d, r2plus1d
from pynq_kgrc.models.trace import trace
from pynq_kgrc.program import load
from pynq_kgrc.runtime import Session

CLIP = ClipSpec(frames=4, height=7, width=6, short_side=8)
FLAT = replace(CLIP, frames=1)


class Net(nn.Module):
    """`forward(self, clip)` as a function, with `parts` as its submodules."""

    def __init__(self, function, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, clip):
        return self.function(self, clip)


def chain(*parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(*parts)


def randomise(module: nn.Module) -> nn.Module:
    """Give batch norms statistics that change the output."""
    torch.manual_seed(7)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 2)
            if part.affine:
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.uniform_(part.bias, -0.3, 0.3)
    return module


def same_as_torch(module: nn.Module, clip: ClipSpec = CLIP, rank: int = 5) -> Graph:
    """The graph; its output is checked to be torch's within 1e-4 of the largest value."""
    randomise(module)
    graph = trace(module, clip)
    values = torch.randn(1, 3, clip.frames, clip.height, clip.width)
    with torch.no_grad():
        wanted = module.eval()(values if rank == 5 else values[:, :, 0]).numpy().reshape(-1)
    found = run_float(graph, values[0].numpy()).reshape(-1)
    assert found.shape == wanted.shape
    assert np.abs(wanted).max() > 1e-3
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert_well_formed(graph)
    return graph


def assert_well_formed(graph: Graph) -> None:
    first = graph.layers[0]
    size = (graph.clip.frames, graph.clip.height, graph.clip.width)
    assert (first.name, first.op, first.inputs, first.channels, first.size) == (
        "clip", "input", (), 3, size
    )  # fmt: skip
    seen: dict[str, tuple[int, tuple[int, int, int]]] = {}
    for layer in graph.layers:
        assert layer.name not in seen
        assert all(name in seen for name in layer.inputs)
        seen[layer.name] = (layer.channels, layer.size)
        if layer.shape is not None:
            assert seen[layer.inputs[0]] == (layer.shape.channels, layer.shape.in_size)
            assert (layer.channels, layer.size) == (layer.shape.out_channels, layer.shape.out_size)
        if layer.op == "conv":
            assert layer.weight.dtype == np.float32
            assert layer.weight.shape == (layer.channels, layer.shape.channels, *layer.shape.kernel)
            assert layer.bias.dtype == np.float64
            assert layer.bias.shape == (layer.channels,)
    used = {name for layer in graph.layers for name in layer.inputs} | {graph.output}
    assert used >= {layer.name for layer in graph.layers if layer.op != "input"}


def ops(graph: Graph) -> list[str]:
    """`name: op` of each layer after the input, with its activation if there is one."""
    return [
        f"{layer.name}: {layer.op}" + f" {layer.activation}" * (layer.activation != "none")
        for layer in graph.layers[1:]
    ]


def conv(channels=3, filters=4, kernel=3, **options) -> nn.Conv3d:
    return nn.Conv3d(channels, filters, kernel, **options)


def residual(self, x):
    x = self.stem(x)
    return self.relu(self.norm(self.conv(x)) + x)


def branches(self, x):
    x = F.relu(self.a(x))
    return torch.cat([self.b(x), self.pool(x), x], 1)


CASES = {
    "plain": (chain(conv()), ["0: conv"]),
    "no bias": (chain(conv(bias=False)), ["0: conv"]),
    "stride, padding": (chain(conv(stride=(1, 2, 3), padding=(0, 1, 2))), ["0: conv"]),
    "same": (chain(conv(kernel=(2, 4, 3), padding="same")), ["0: conv"]),
    "valid": (chain(conv(padding="valid")), ["0: conv"]),
    "grouped": (chain(conv(3, 6, groups=3)), ["0: conv"]),
    "depthwise": (chain(conv(3, 4, 1), conv(4, 4, groups=4, padding=1)), ["0: conv", "1: conv"]),
    "dilated": (chain(conv(kernel=(2, 3, 2), dilation=(3, 2, 1))), ["0: conv"]),
    "dilated, same": (chain(conv(kernel=2, dilation=2, padding="same")), ["0: conv"]),
    "norm, relu": (chain(conv(bias=False), nn.BatchNorm3d(4), nn.ReLU()), ["0: conv relu"]),
    "norm without affine": (chain(conv(), nn.BatchNorm3d(4, affine=False)), ["0: conv"]),
    "two norms": (chain(conv(), nn.BatchNorm3d(4), nn.BatchNorm3d(4)), ["0: conv"]),
    "norm first": (chain(nn.BatchNorm3d(3), conv()), ["0: conv", "1: conv"]),
    "norm, relu first": (chain(nn.BatchNorm3d(3), nn.ReLU(), conv()), ["0: conv relu", "2: conv"]),
    "relu first": (chain(nn.ReLU(), conv()), ["0: conv relu", "1: conv"]),
    "norm after relu": (chain(conv(), nn.ReLU(), nn.BatchNorm3d(4)), ["0: conv relu", "2: conv"]),
    "norm after pool": (
        chain(conv(), nn.MaxPool3d(2), nn.BatchNorm3d(4)),
        ["0: conv", "1: max_pool", "2: conv"],
    ),
    "relu twice": (chain(conv(), nn.ReLU(), nn.ReLU(inplace=True)), ["0: conv relu"]),
    "relu6": (chain(conv(), nn.ReLU6()), ["0: conv relu6"]),
    "relu after relu6": (chain(conv(), nn.ReLU6(), nn.ReLU()), ["0: conv relu6"]),
    "relu6 after relu": (chain(conv(), nn.ReLU(), nn.ReLU6()), ["0: conv relu6"]),
    "clamp from above after relu": (
        Net(lambda s, x: F.relu(s.a(x)).clamp(max=6), a=conv()), ["a: conv relu6"]
    ),
    "hardtanh": (chain(conv(), nn.Hardtanh(0, 6)), ["0: conv relu6"]),
    "clamp": (Net(lambda s, x: s.a(x).clamp(0, 6), a=conv()), ["a: conv relu6"]),
    "clamp from below": (Net(lambda s, x: s.a(x).clamp(min=0), a=conv()), ["a: conv relu"]),
    "clamp_min": (Net(lambda s, x: s.a(x).clamp_min(0), a=conv()), ["a: conv relu"]),
    "relu in place": (Net(lambda s, x: s.a(x).relu_(), a=conv()), ["a: conv relu"]),
    "relu after pool": (
        chain(conv(), nn.MaxPool3d(2), nn.ReLU()),
        ["0: conv", "1: max_pool relu"],
    ),
    "relu after pool after relu": (
        chain(conv(), nn.ReLU(), nn.MaxPool3d(2), nn.ReLU()),
        ["0: conv relu", "2: max_pool"],
    ),
    "overlapping max pool": (chain(conv(), nn.MaxPool3d(3, 2, 1)), ["0: conv", "1: max_pool"]),
    "max pool in ceil_mode": (
        chain(conv(padding=1), nn.MaxPool3d((3, 2, 2), 2, (1, 0, 0), ceil_mode=True)),
        ["0: conv", "1: max_pool"],
    ),
    "max pool with its indices": (
        Net(lambda s, x: F.max_pool3d(s.a(x), 2, return_indices=True)[0], a=conv()),
        ["a: conv", "max_pool3d: max_pool"],
    ),
    "average pool": (
        chain(conv(), nn.AvgPool3d((1, 3, 2), (1, 2, 1))),
        ["0: conv", "1: average_pool"],
    ),
    "padded average pool": (chain(conv(), nn.AvgPool3d(2, 2, 1)), ["0: conv", "1: average_pool"]),
    "average pool in ceil_mode that fits": (
        chain(nn.AvgPool3d((2, 7, 2), ceil_mode=True)),
        ["0: average_pool"],
    ),
    "global average pool": (chain(nn.AdaptiveAvgPool3d(1)), ["0: average_pool"]),
    "adaptive average pool": (chain(nn.AdaptiveAvgPool3d((2, None, 3))), ["0: average_pool"]),
    "adaptive max pool": (chain(conv(), nn.AdaptiveMaxPool3d(1)), ["0: conv", "1: max_pool"]),
    "mean over all": (
        Net(lambda s, x: s.a(x).mean((-1, -2, -3)), a=conv()),
        ["a: conv", "mean: average_pool"],
    ),
    "mean over time": (
        Net(lambda s, x: s.a(x).mean(2, keepdim=True), a=conv()),
        ["a: conv", "mean: average_pool"],
    ),
    "mean after mean": (
        Net(lambda s, x: s.a(x).mean((3, 4)).mean(2), a=conv()),
        ["a: conv", "mean: average_pool", "mean_2: average_pool"],
    ),
    "mean over pixels in a row": (
        Net(lambda s, x: s.a(x).flatten(2).mean(-1), a=conv()),
        ["a: conv", "mean: average_pool"],
    ),
    "mean over nothing": (
        Net(lambda s, x: s.a(x.mean((2, 3, 4), keepdim=True)).mean((2, 3, 4)), a=conv(kernel=1)),
        ["mean: average_pool", "a: conv"],
    ),
    "mean over time of a 1x1x1 convolution goes first": (
        Net(lambda s, x: s.b(s.a(x).mean(2, keepdim=True)), a=conv(kernel=1), b=conv(4, 2, 1)),
        ["mean: average_pool", "a: conv", "b: conv"],
    ),
    "mean of one of two readers": (
        Net(lambda s, x: (y := s.a(x)).mean((2, 3, 4)) + s.b(y).mean((2, 3, 4)),
            a=conv(kernel=1), b=conv(4, 4, 3)),
        ["a: conv", "mean: average_pool", "b: conv", "mean_2: average_pool", "add: add"],
    ),
    "mean of a 1x1x1 convolution with a ReLU": (
        Net(lambda s, x: F.relu(s.a(x)).mean(2), a=conv(kernel=1)),
        ["a: conv relu", "mean: average_pool"],
    ),
    "mean over time of a padded 1x1x1 convolution": (
        Net(lambda s, x: s.a(x).mean(2), a=conv(kernel=1, padding=1)),
        ["a: conv", "mean: average_pool"],
    ),
    "explicit padding": (
        chain(nn.ConstantPad3d((1, 0, 2, 1, 0, 3), 0.0), conv(padding=1)),
        ["1: conv"],
    ),
    "padding twice": (
        Net(lambda s, x: s.a(F.pad(F.pad(x, (1, 2)), (0, 1, 3, 0))), a=conv()),
        ["a: conv"],
    ),
    "padding for two": (
        Net(lambda s, x: s.a(p := F.pad(x, (1, 2))) + s.b(p), a=conv(), b=conv()),
        ["a: conv", "b: conv", "add: add"],
    ),
    "padding before a max pool after relu": (
        chain(conv(), nn.ReLU(), nn.ConstantPad3d((0, 1, 1, 0, 0, 0), 0.0), nn.MaxPool3d(2)),
        ["0: conv relu", "3: max_pool"],
    ),
    "padding with -inf before a max pool": (
        chain(conv(), nn.ConstantPad3d((0, 1) * 3, -torch.inf), nn.MaxPool3d(2)),
        ["0: conv", "2: max_pool"],
    ),
    "padding before an average pool": (
        chain(nn.ConstantPad3d((0, 1) * 3, 0.0), nn.AvgPool3d(2, count_include_pad=False)),
        ["1: average_pool"],
    ),
    "residual": (
        Net(residual, stem=conv(), conv=conv(4, 4, padding=1), norm=nn.BatchNorm3d(4),
            relu=nn.ReLU(inplace=True)),
        ["stem: conv", "conv: conv", "add: add relu"],
    ),
    "added in place": (
        Net(lambda s, x: (y := s.a(x)).add_(s.b(x)) + y, a=conv(), b=conv()),
        ["a: conv", "b: conv", "add: add", "add_2: add"],
    ),
    "relu in place for all readers": (
        Net(lambda s, x: F.relu(y := s.a(x), inplace=True) + y, a=conv()),
        ["a: conv relu", "add: add"],
    ),
    "relu for one of two readers": (
        Net(lambda s, x: F.relu(y := s.a(x)) + y, a=conv()),
        ["a: conv", "relu: conv relu", "add: add"],
    ),
    "norm for one of two readers": (
        Net(lambda s, x: s.n(y := s.a(x)) + y, a=conv(), n=nn.BatchNorm3d(4)),
        ["a: conv", "n: conv", "add: add"],
    ),
    "norm, then relu for one of two readers": (
        Net(lambda s, x: F.relu(y := s.n(s.a(x))) + y, a=conv(), n=nn.BatchNorm3d(4)),
        ["a: conv", "relu: conv relu", "add: add"],
    ),
    "relu, then norm for one of two readers": (
        Net(lambda s, x: s.n(y := F.relu(s.a(x))) + y, a=conv(), n=nn.BatchNorm3d(4)),
        ["a: conv relu", "n: conv", "add: add"],
    ),
    "twice the same": (Net(lambda s, x: (y := s.a(x)) + y, a=conv()), ["a: conv", "add: add"]),
    "concat": (
        Net(branches, a=conv(), b=conv(4, 2, padding=1), pool=nn.MaxPool3d(3, 1, 1)),
        ["a: conv relu", "b: conv", "pool: max_pool", "concat: concat"],
    ),
    "concat of one channel each": (
        Net(lambda s, x: torch.cat([s.a(x), s.b(x)], -4), a=conv(3, 1), b=conv(3, 1)),
        ["a: conv", "b: conv", "concat: concat"],
    ),
    "norm, relu after concat": (
        Net(lambda s, x: F.relu(s.n(torch.cat([x, x], 1))), n=nn.BatchNorm3d(6)),
        ["concat: concat", "n: conv relu"],
    ),
    "linear over the map": (
        chain(conv(), nn.Flatten(), nn.Linear(4 * 2 * 5 * 4, 5)),
        ["0: conv", "2: conv"],
    ),
    "linear, norm, relu, linear": (
        chain(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 5, bias=False),
              nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 2)),
        ["0: average_pool", "2: conv relu", "6: conv"],
    ),
    "linear, channels last on one pixel": (
        Net(lambda s, x: s.a(s.p(x).permute(0, 2, 3, 4, 1)).flatten(1), a=nn.Linear(3, 2),
            p=nn.AdaptiveAvgPool3d(1)),
        ["p: average_pool", "a: conv"],
    ),
    "views": (
        Net(lambda s, x: s.b(s.a(x).squeeze(0).unsqueeze(0).view(1, 4, -1).reshape(1, 4, 2, 5, 4)
                             .contiguous()), a=conv(), b=conv(4, 2, 2)),
        ["a: conv", "b: conv"],
    ),
    "dropouts": (
        chain(nn.Dropout3d(), conv(), nn.AlphaDropout(), nn.Identity(), conv(4, 2, 1)),
        ["1: conv", "4: conv"],
    ),
    "dead code": (
        Net(lambda s, x: (s.a(x), F.gelu(s.b(F.relu(x))))[0], a=conv(), b=conv()),
        ["a: conv"],
    ),
    "one module twice": (
        Net(lambda s, x: s.a(s.a(x)), a=conv(3, 3, 2)),
        ["a: conv", "a_2: conv"],
    ),
    "a module named clip": (Net(lambda s, x: s.clip(x), clip=conv()), ["clip_2: conv"]),
    "without gradients": (
        Net(lambda s, x: torch.no_grad()(s.a)(x), a=conv()),
        ["a: conv"],
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CASES)
def test_the_graph_computes_what_torch_does(name):
    module, wanted = CASES[name]
    assert ops(same_as_torch(module)) == wanted


FLAT_CASES = {
    "conv, norm, pools": chain(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ),
    "padding, groups": chain(
        nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(3, 6, 3, groups=3, dilation=2, stride=2)
    ),
    "max": chain(nn.Conv2d(3, 4, 3, padding="same"), nn.AdaptiveMaxPool2d(1), nn.Flatten(0)),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAT_CASES)
def test_a_network_of_2d_layers_sees_one_frame(name):
    graph = same_as_torch(FLAT_CASES[name], FLAT, rank=4)
    assert all(layer.size[0] == 1 for layer in graph.layers)


def test_a_network_of_2d_layers_may_squeeze_the_clip_itself():
    network = Net(lambda s, x: s.a(x.squeeze(2)), a=nn.Conv2d(3, 4, 3))
    assert same_as_torch(network, FLAT)["a"].shape.kernel == (1, 3, 3)


def test_a_grouped_convolution_is_dense_with_zeros_between_groups():
    weight = trace(chain(conv(4 - 1, 6, groups=3)), CLIP)["0"].weight
    kept = np.abs(weight).sum((2, 3, 4)) > 0
    assert kept.tolist() == [[m // 2 == n for n in range(3)] for m in range(6)]


def test_a_dilated_kernel_is_larger_with_zeros_between_taps():
    layer = trace(chain(conv(kernel=(1, 2, 1), dilation=(1, 3, 1))), CLIP)["0"]
    assert layer.shape.kernel == (1, 4, 1)
    assert (np.abs(layer.weight[0, 0, 0, :, 0]) > 0).tolist() == [True, False, False, True]


def test_padding_of_a_graph_is_uneven_where_the_modules_is():
    shape = trace(chain(nn.ConstantPad3d((1, 0, 2, 1, 0, 3), 0.0), conv(padding=1)), CLIP)[
        "1"
    ].shape
    assert (shape.pad_before, shape.pad_after) == ((1, 3, 2), (4, 2, 1))


def test_batch_norm_is_folded_in_float64():
    module = randomise(chain(conv(bias=False), nn.BatchNorm3d(4))).eval()
    layer = trace(module, CLIP)["0"]
    norm = module[1]
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    exact = (module[0].weight.double() * gain[:, None, None, None, None]).detach()
    assert np.array_equal(layer.weight, exact.numpy().astype(np.float32))
    bias = norm.bias.double() - norm.running_mean.double() * gain
    assert np.allclose(layer.bias, bias.detach().numpy(), rtol=1e-14)


def test_a_lone_relu_is_an_identity_convolution():
    layer = trace(chain(nn.ReLU(), conv()), CLIP)["0"]
    assert np.array_equal(layer.weight[:, :, 0, 0, 0], np.eye(3))
    assert layer.bias.tolist() == [0, 0, 0]


def test_a_pruned_module_brings_its_zeros():
    module = chain(conv())
    prune.random_unstructured(module[0], "weight", 0.5)
    weight = same_as_torch(module)["0"].weight
    assert (weight == 0).mean() == 0.5


def test_the_weights_are_copies():
    module = chain(conv())
    graph = trace(module, CLIP)
    before = graph["0"].weight.copy()
    nn.init.zeros_(module[0].weight)
    assert np.array_equal(graph["0"].weight, before)


def test_training_flags_stay_as_they_were():
    module = chain(conv(), nn.BatchNorm3d(4), nn.Dropout())
    module[1].eval()
    mean = module[1].running_mean.clone()
    trace(module, CLIP)
    assert [m.training for m in (module, *module)] == [True, True, False, True]
    assert torch.equal(module[1].running_mean, mean)
    with pytest.raises(CompileError):
        trace(chain(module, nn.GELU()), CLIP)
    assert [m.training for m in (module, *module)] == [True, True, False, True]


def test_name_and_labels():
    module = chain(conv(3, 2), nn.AdaptiveAvgPool3d(1))
    graph = trace(module, CLIP, ["walk", "run"], name="gait")
    assert (graph.name, graph.labels, graph.output, graph.clip) == (
        "gait",
        ("walk", "run"),
        "1",
        CLIP,
    )
    assert trace(module, CLIP).name == "Sequential"
    with pytest.raises(CompileError, match="gait has 2 outputs, but 3 labels were given"):
        trace(module, CLIP, ["walk", "run", "hop"], name="gait")


class Gate(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class TwoInputs(nn.Module):
    def forward(self, slow, fast):
        return slow + fast


def data_dependent(self, x):
    return self.a(x) if x.sum() > 0 else x


def varied_norm(channels):
    """A batch norm that is another map for each channel."""
    norm = nn.BatchNorm1d(channels).eval()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


class Shift(nn.Module):
    """A quarter of the channels sees the next frame, a quarter the one before (TSM), in place."""

    def forward(self, x):
        n = x.shape[1] // 4
        out = torch.zeros_like(x)
        out[:, :n, :-1] = x[:, :n, 1:]
        out[:, n : 2 * n, 1:] = x[:, n : 2 * n, :-1]
        out[:, 2 * n :] = x[:, 2 * n :]
        return out


class ShiftOfFrames(nn.Module):
    """The same on frames that are a batch [D, C, H, W], as in TSM's own code."""

    def forward(self, x):
        clips = x.view(1, *x.shape)
        n = x.shape[1] // 4
        out = torch.zeros_like(clips)
        out[:, :-1, :n] = clips[:, 1:, :n]
        out[:, 1:, n : 2 * n] = clips[:, :-1, n : 2 * n]
        out[:, :, 2 * n :] = clips[:, :, 2 * n :]
        return out.view(x.shape)


def as_frames(self, clip):
    """[1, 3, D, H, W] through 2-D layers, as TSN and TSM do, and the mean of the frames' logits."""
    n, c, d, h, w = clip.shape
    x = self.body(clip.transpose(1, 2).reshape(n * d, c, h, w))
    return self.head(x.flatten(1)).view(n, d, -1).mean(1)


def shuffled(x, groups=2):
    n, c, *size = x.shape
    return x.view(n, groups, c // groups, *size).transpose(1, 2).reshape(n, c, *size)


def shuffle_unit(self, x):
    a, b = self.stem(x).chunk(2, 1)
    a, b = shuffled(torch.cat([a, self.b(b)], 1)).chunk(2, dim=1)
    return shuffled(torch.cat((a, self.c(b)), 1))


def option_a(self, x):
    """A shortcut of ResNet for CIFAR: every other pixel, and channels of zeros."""
    x = self.stem(x)
    short = F.pad(x[:, :, :, ::2, ::2], (0, 0, 0, 0, 0, 0, 1, 3))
    return F.relu(self.body(x) + short)


def two_paths(self, x):
    """SlowFast from one clip."""
    slow, fast = self.slow(x[:, :, ::2]), self.fast(x)
    joined = torch.cat([slow, self.lateral(fast)], 1)
    return self.head(torch.cat([joined.mean((2, 3, 4)), fast.mean((2, 3, 4))], 1))


BODY = chain(
    nn.Conv2d(3, 8, 3, padding=1, bias=False),
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.MaxPool2d(2),
    ShiftOfFrames(),
    nn.Conv2d(8, 4, 3),
    nn.AdaptiveAvgPool2d(1),
)

MOVED = {
    "every other frame": (
        Net(lambda s, x: s.a(x[:, :, ::2]), a=conv(kernel=(2, 3, 3))),
        ["clip.moved: conv", "a: conv"],
    ),
    "a crop": (
        Net(lambda s, x: s.a(x[:, :, 1:3, 2:, :-1]), a=conv(kernel=2)),
        ["clip.moved: conv", "a: conv"],
    ),
    "a crop by padding": (
        chain(nn.ConstantPad3d((-1, 0, 0, 2, -2, 0), 0.0), conv(kernel=2)),
        ["clip.moved: conv", "1: conv"],
    ),
    "one frame": (
        Net(lambda s, x: s.a(x[:, :, 1]), a=nn.Conv2d(3, 4, 3)),
        ["clip.moved: conv", "a: conv"],
    ),
    "channels": (
        Net(lambda s, x: s.a(x[:, [2, 1, 0]]), a=conv()),
        ["a: conv"],
    ),
    "two of three channels": (
        Net(lambda s, x: s.a(x[:, 1:]), a=conv(2, 4)),
        ["clip.moved: conv", "a: conv"],
    ),
    "shuffle": (
        Net(shuffle_unit, stem=conv(3, 8), b=conv(4, 4, 1), c=conv(4, 4, padding=1)),
        ["stem: conv", "b: conv", "stem.moved_2: conv", "concat: concat", "concat.moved: conv",
         "c: conv", "concat.moved_2: conv", "concat_2: concat", "concat_2.moved: conv"],
    ),
    "shift": (
        chain(conv(3, 8, padding=1), nn.ReLU(), Shift(), conv(8, 4)),
        ["0: conv relu", "1.moved: conv", "3: conv"],
    ),
    "shift on frames as a batch": (
        Net(as_frames, body=BODY, head=nn.Linear(4, 3)),
        ["body.0: conv relu", "body.3: max_pool", "body.3.moved: conv", "body.5: conv",
         "mean: average_pool", "head: conv"],
    ),
    "shift by roll": (
        Net(lambda s, x: s.a(F.pad(s.b(x), (0, 0, 0, 0, 1, 0))[:, :, :-1]), a=conv(4, kernel=2),
            b=conv()),
        ["b: conv", "b.moved: conv", "a: conv"],
    ),
    "shortcut A": (
        Net(option_a, stem=conv(3, 4), body=conv(4, 8, 3, padding=1, stride=(1, 2, 2))),
        None,
    ),
    "two paths": (
        Net(two_paths, slow=conv(3, 8, 3, padding=1), fast=conv(3, 4, 3, padding=1),
            lateral=conv(4, 4, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0)),
            head=nn.Linear(16, 3)),
        None,
    ),
    "frames side by side as channels": (
        Net(lambda s, x: s.a(x.transpose(1, 2).reshape(1, 12, 7, 6)), a=nn.Conv2d(12, 4, 3)),
        ["clip.moved: conv", "a: conv"],
    ),
    "pixels to channels": (
        Net(lambda s, x: s.a(x[:, :, :, :6].reshape(1, 12, 3, 2, 3, 2).permute(0, 1, 3, 5, 2, 4)
                             .reshape(1, 48, 3, 3)),
            a=nn.Conv2d(48, 4, 1)),
        None,
    ),
    "frames flattened": (
        Net(lambda s, x: s.a(x.transpose(1, 2).reshape(4, -1)).mean(0, keepdim=True),
            a=nn.Linear(3 * 7 * 6, 5)),
        ["a: conv", "mean: average_pool"],
    ),
    "channels last and back": (
        Net(lambda s, x: s.b(s.a(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)),
            a=nn.Linear(3, 5), b=conv(5, 2)),
        ["a: conv", "b: conv"],
    ),
    "linear over channels last, then a mean": (
        Net(lambda s, x: s.a(x.permute(0, 2, 3, 4, 1)).mean((1, 2, 3)), a=nn.Linear(3, 5)),
        ["mean: average_pool", "a: conv"],
    ),
    "linear over flattened channels last": (
        Net(lambda s, x: s.a(s.p(x).permute(0, 2, 3, 4, 1).flatten(1)), a=nn.Linear(24, 5),
            p=nn.AdaptiveAvgPool3d(2)),
        None,
    ),
    "split, and each part used": (
        Net(lambda s, x: (p := s.a(x).split([1, 3], 1)) and s.b(p[1]) + p[0], a=conv(),
            b=conv(3, 1, 1)),
        None,
    ),
    "unbound": (
        Net(lambda s, x: torch.cat(x.unbind(2)[1:3], 1), ),
        ["clip.moved: conv"],
    ),
    "stacked": (
        Net(lambda s, x: s.a(torch.stack([x[:, :, 1], x[:, :, 3]], 2)), a=conv(kernel=2)),
        ["clip.moved: conv", "a: conv"],
    ),
    "convolution over time": (
        Net(lambda s, x: s.a(s.b(x).mean((3, 4))), a=nn.Conv1d(4, 5, 2, padding=1), b=conv()),
        ["b: conv", "mean: average_pool", "a: conv"],
    ),
    "padding before a sum": (
        Net(lambda s, x: F.pad(s.a(x), (1, 1, 1, 1, 1, 1)) + x, a=conv(3, 3)),
        ["a: conv", "a.moved: conv", "add: add"],
    ),
    "padding before a mean": (
        Net(lambda s, x: F.pad(s.a(x), (0, 1)).mean((2, 3, 4)), a=conv()),
        None,
    ),
    "padding before a relu": (
        chain(conv(), nn.ConstantPad3d(1, 0.0), nn.ReLU(), conv(4, 2)),
        ["0: conv relu", "3: conv"],
    ),
    "padding before a norm": (
        chain(conv(), nn.ConstantPad3d(1, 0.0), nn.BatchNorm3d(4), conv(4, 2)),
        ["0: conv", "0.moved: conv", "3: conv"],
    ),
    "a padded output": (chain(conv(), nn.ConstantPad3d(1, 0.0)), ["0: conv", "0.moved: conv"]),
    "more padding than the kernel": (
        chain(conv(3, 4, 1), nn.ConstantPad3d((0, 9, 8, 0, 0, 5), 0.0)),
        None,
    ),
    "grey to three colours": (
        Net(lambda s, x: s.a(x[:, :1].expand(-1, 3, -1, -1, -1)), a=conv()),
        ["a: conv"],
    ),
    "nothing moved": (
        Net(lambda s, x: s.a(x.expand(1, 3, 4, 7, 6)[:, :, :].transpose(0, 0)).detach(), a=conv()),
        ["a: conv"],
    ),
    "channels and a number": (
        Net(lambda s, x: (s.a(x) * s.g - 2) / 4 + s.h, a=conv(),
            ),
        ["a: conv"],
    ),
    "constants first": (
        Net(lambda s, x: 1 - 2 * s.a(x) + torch.sub(1.5, s.a(x), alpha=3) * -s.g, a=conv()),
        None,
    ),
    "pixels normalised inside": (
        Net(lambda s, x: s.a((x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1, 1))
                             / torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1, 1)), a=conv()),
        ["sub: conv", "a: conv"],
    ),
    "differences of frames": (
        Net(lambda s, x: s.a(x[:, :, 1:] - x[:, :, :-1]), a=conv()),
        None,
    ),
    "added multiple": (
        Net(lambda s, x: torch.add(s.a(x), s.b(x), alpha=2), a=conv(), b=conv()),
        ["a: conv", "b: conv", "add_2: add"],
    ),
    "negative": (Net(lambda s, x: -s.a(x), a=conv()), ["a: conv"]),
    "sum over pixels": (
        Net(lambda s, x: s.a(x).sum((3, 4)), a=conv()),
        None,
    ),
    "average without padding that it sees": (
        chain(conv(), nn.AvgPool3d((2, 4, 2), (3, 6, 2), (1, 2, 0), count_include_pad=False)),
        None,
    ),
    "uneven adaptive pool of equal windows": (
        chain(nn.AdaptiveAvgPool3d((2, 3, 3))),
        ["0: average_pool"],
    ),
    "pools that do nothing": (chain(conv(), nn.MaxPool3d(1), nn.AdaptiveAvgPool3d((None,) * 3)),
                              ["0: conv"]),
}  # fmt: skip
for network, _ in MOVED.values():
    network.g = nn.Parameter(torch.linspace(-1, 2, 4).view(1, 4, 1, 1, 1), requires_grad=False)
    network.h = torch.linspace(1, 2, 4).view(4, 1, 1, 1)


SLOW = (
    *("a crop", "one frame", "two of three channels", "unbound", "padding before a norm"),
    *("padding before a mean", "a padded output", "negative", "pools that do nothing"),
    *("linear over channels last, then a mean", "split, and each part used", "constants first"),
    *("sum over pixels", "uneven adaptive pool of equal windows", "channels last and back"),
)
"""Cases whose code others go through as well."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MOVED]
)
def test_what_moves_elements_or_holds_constants_computes_what_torch_does(name):
    module, wanted = MOVED[name]
    found = ops(same_as_torch(module))
    assert wanted is None or found == wanted


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_moved_as_they_are(bits, method):
    """A shift, and half of the channels: the same codes at other places, zeros apart."""
    torch.manual_seed(1)
    shift = Shift()
    network = Net(lambda s, x: s.b(shift(s.a(x))[:, :4]), a=conv(3, 8, padding=1), b=conv(4, 4))
    with torch.no_grad():
        network.a.weight[4:] *= 3
    frames = np.random.default_rng(0).integers(0, 256, (4, 7, 6, 3), dtype=np.uint8)
    program = compile_graph(
        trace(network.eval(), CLIP), [frames], small_config(bits), method=method
    )
    with Session(program) as session:
        codes = {name: found for name, found, _ in session.trace(frames)}
    zero = program.tasks[1].in_zero
    shifted = np.full_like(codes["a"][:4], zero)
    shifted[:2, :-1] = codes["a"][:2, 1:]
    shifted[2:4, 1:] = codes["a"][2:4, :-1]
    assert int(shifted.max()) - int(shifted.min()) >= 3
    np.testing.assert_array_equal(codes["a.moved"], shifted)


@pytest.mark.parametrize("kind", [nn.Softmax, nn.LogSoftmax])
def test_a_softmax_at_the_end_is_left_out_and_the_graph_says_so(kind, tmp_path):
    head = chain(conv(), nn.AdaptiveAvgPool3d(1), kind(1), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    graph = trace(head, CLIP)
    assert graph.softmax
    assert ops(graph) == ["0: conv", "1: average_pool"]
    logits = trace(head[:2], CLIP)
    assert not logits.softmax
    values = np.random.default_rng(0).normal(size=(3, 4, 7, 6)).astype(np.float32)
    assert np.array_equal(run_float(graph, values), run_float(logits, values))
    frames = np.random.default_rng(0).integers(0, 256, (4, 7, 6, 3), dtype=np.uint8)
    for traced in (graph, logits):
        program = compile_graph(traced, [frames], small_config(16))
        program.save(tmp_path / "net.kgrc")
        assert load(tmp_path / "net.kgrc").softmax == traced.softmax
        assert (
            "; the runtime applies its soft-max" in summary(describe(program))
        ) == traced.softmax
        with Session(program) as session, torch.no_grad():
            found = session.run(frames).probabilities
            network = head if kind is nn.Softmax else chain(*head[:2], nn.Softmax(1), nn.Flatten())
            wanted = network(torch.from_numpy(CLIP.normalise(frames))[None]).numpy().ravel()
        np.testing.assert_allclose(found, wanted, atol=1e-3)


REFUSALS = {
    "operator, place, advice": (
        Net(lambda s, x: torch.sigmoid(s.blocks(x)), blocks=chain(conv(), nn.ELU())),
        r"Net: 2 operators do not run on the accelerator:\n"
        r"  the accelerator has no elu at blocks\.1 \(Net > Sequential > ELU\); "
        r"use ReLU or ReLU6, and train again\n"
        r"  the accelerator has no sigmoid at top level \(Net\); use ReLU or ReLU6 if .* a gate",
    ),
    "all of them, with their counts": (
        Net(
            lambda s, x: s.head(s.blocks(x)),
            blocks=chain(conv(), Gate(), Gate()),
            head=nn.LayerNorm(4),
        ),
        r"Net: 5 operators .*:\n"
        r"  the accelerator has no sigmoid, 2 times, first at blocks\.1 \(.*Gate\); use .*\n"
        r"  a product of two maps, 2 times, first at blocks\.1 \(.*\); use a network without .*\n"
        r"  the accelerator has no layer_norm at head \(Net > LayerNorm\); use BatchNorm",
    ),
    "silu": (chain(conv(), nn.SiLU()), r"no silu at 1 \(Sequential > SiLU\); use ReLU or"),
    "gelu": (chain(conv(), nn.GELU()), "no gelu at 1 .*use ReLU or ReLU6"),
    "leaky relu": (chain(nn.LeakyReLU()), "no leaky_relu at 0 .*use ReLU or ReLU6"),
    "unknown": (Net(lambda s, x: torch.erf(x)), r"no erf at top level \(Net\)$"),
    "softmax inside": (
        chain(nn.AdaptiveAvgPool3d(1), nn.Softmax(1), conv(kernel=1)),
        "a soft-max inside the network at 1 .*the last step of the network",
    ),
    "softmax twice": (
        chain(nn.AdaptiveAvgPool3d(1), nn.Softmax(1), nn.Softmax(1)),
        "a soft-max inside the network at 1",
    ),
    "softmax, then padding": (
        Net(lambda s, x: F.pad(s.a(x).mean((2, 3, 4)).softmax(1), (0, 2)), a=conv()),
        "a soft-max inside the network at top level",
    ),
    "softmax, then some of its classes": (
        Net(lambda s, x: s.a(x).mean((2, 3, 4)).softmax(1)[:, :2], a=conv()),
        "a soft-max inside the network at top level",
    ),
    "softmax of each pixel": (chain(conv(), nn.Softmax(1)), "a soft-max inside the network at 1"),
    "layer norm": (chain(nn.LayerNorm(6)), "no layer_norm at 0 .*use BatchNorm"),
    "group norm": (chain(nn.GroupNorm(1, 3)), "no group_norm at 0 .*use BatchNorm"),
    "instance norm": (chain(nn.InstanceNorm3d(3)), "no instance_norm at 0 .*use BatchNorm"),
    "batch norm of the batch": (
        chain(nn.BatchNorm3d(3, track_running_stats=False)),
        "no _native_batch_norm_legit at 0 .*use BatchNorm with running statistics",
    ),
    "transposed": (chain(nn.ConvTranspose3d(3, 2, 2)), "no conv_transpose3d .*no layer makes"),
    "resized": (
        Net(lambda s, x: F.interpolate(x, scale_factor=2)),
        "no upsample_nearest3d .*larger",
    ),
    "multiplied": (Net(lambda s, x: x * s.a(x), a=conv(3, 3, 1)), "a product of two maps at top"),
    "multiplied by pixels": (
        Net(lambda s, x: x * torch.arange(6.0)),
        r"mul reads .* as .*one number for each channel",
    ),
    "divided by a map": (Net(lambda s, x: 2 / s.a(x), a=conv(3, 3, 1)), "no reciprocal"),
    "dropout left on": (
        Net(lambda s, x: F.dropout(s.a(x)), a=conv()),
        "no native_dropout .*training=self.training",
    ),
    "permuted": (
        Net(lambda s, x: s.a(x.permute(0, 1, 3, 2, 4)), a=conv()),
        r"conv3d reads \[1, 3, 4, 7, 6\] as \[1, 3, 7, 4, 6\] at a .*channels first",
    ),
    "transposed axes": (
        Net(lambda s, x: x.transpose(1, 2)),
        r"an output \[1, 4, 3, 7, 6\] whose axes are in another order",
    ),
    "backwards": (Net(lambda s, x: s.a(x.flip(2)), a=conv()), "conv3d reads .* at a "),
    "multiplied by itself": (Net(lambda s, x: x @ x.mT), "no (matmul|transpose) "),
    "clamped elsewhere": (
        Net(lambda s, x: x.clamp(-1, 1)),
        r"a clamp to -1..1 at top level .*use ReLU or ReLU6",
    ),
    "reflected": (
        chain(conv(padding=1, padding_mode="reflect")),
        r"reflect padding at 0 .*use zeros",
    ),
    "padded with ones": (
        chain(nn.ConstantPad3d(1, 1.0), conv()),
        "a convolution over padding with 1 at 1 .*use zeros",
    ),
    "padded with ones, averaged": (
        chain(nn.ConstantPad3d(1, 1.0), nn.AvgPool3d(2)),
        "an average pool over padding with 1 at 1 .*use zeros",
    ),
    "padded with two values": (
        chain(nn.ConstantPad3d(1, 1.0), nn.ConstantPad3d(1, 0.0), conv()),
        r"padding with 1.* and then with 0",
    ),
    "padded before max pool": (
        chain(conv(), nn.ConstantPad3d(1, 0.0), nn.MaxPool3d(2)),
        "padding with 0 before a max pool of values that may be negative at 2 .*a ReLU before it",
    ),
    "windows of padding": (
        chain(nn.ReLU(), nn.ConstantPad3d(2, 0.0), nn.MaxPool3d(2)),
        "a max pool with windows that see padding only at 2",
    ),
    "dilated max pool": (chain(nn.MaxPool3d(2, dilation=2)), "a dilated max pool at 0"),
    "average without padding": (
        chain(nn.AvgPool3d(3, padding=1, count_include_pad=False)),
        "leaves padding out of its mean at 0 .*use count_include_pad=True",
    ),
    "average in ceil_mode": (
        chain(nn.AvgPool3d(2, ceil_mode=True)),
        "an average pool in ceil_mode, whose last window is not full, at 0",
    ),
    "average over another count": (
        chain(nn.AvgPool3d(2, divisor_override=3)),
        "an average pool with a divisor of its own at 0",
    ),
    "uneven adaptive pool": (
        chain(nn.AdaptiveAvgPool3d(4)),
        r"adaptive_avg_pool3d from \(4, 7, 6\) to \(4, 4, 4\) .*divides the input size",
    ),
    "padded with ones, then added": (
        Net(lambda s, x: s.a(F.pad(x, (1, 1), value=1)[..., 1:]), a=conv()),
        "padding with 1 goes into slice",
    ),
    "norm over another view": (
        Net(lambda s, x: s.n(x.flatten(1)), n=varied_norm(3 * 4 * 7 * 6)),
        r"_native_batch_norm_legit_no_training reads \[1, 3, 4, 7, 6\] as \[1, 504\]",
    ),
    "mean over channels": (
        Net(lambda s, x: x.mean(1)),
        r"a mean over axes \[1\] of \[1, 3, 4, 7, 6\]",
    ),
    "mean over everything": (Net(lambda s, x: x.mean()), r"a mean over axes \[0, 1, 2, 3, 4\]"),
    "mean over part of a view": (
        Net(lambda s, x: x.reshape(1, 3, 8, 21).mean(2)),
        r"a mean over a part of .* seen as \[1, 3, 8, 21\]",
    ),
    "mean over an axis of another view": (
        Net(lambda s, x: x.reshape(1, 3, 6, 7, 4).mean(2)),
        r"a mean over a part of .* seen as \[1, 3, 6, 7, 4\]",
    ),
    "linear over width": (
        chain(nn.Linear(6, 2)),
        r"linear reads \[1, 3, 4, 7, 6\] as \[1, 3, 4, 7, 6\] .*use flatten\(1\)",
    ),
    "frames as a batch": (
        Net(lambda s, x: s.a(x.view(3, 4, 7, 6)), a=nn.Conv2d(4, 2, 3)),
        r"conv2d reads \[1, 3, 4, 7, 6\] as \[3, 4, 7, 6\] .*one clip, channels first",
    ),
    "broadcast": (
        Net(lambda s, x: x + x.mean((2, 3, 4), keepdim=True)),
        r"an addition of \[1, 3, 4, 7, 6\] and \[1, 3, 1, 1, 1\]",
    ),
    "concat over time": (
        Net(lambda s, x: torch.cat([x, s.a(x)], 2), a=conv(3, 3, 1)),
        r"a concatenation of .* on axis 2 .*the channels \(axis 1\)",
    ),
    "weights from the clip": (
        Net(lambda s, x: F.conv3d(x, s.a(x)), a=conv(3, 3, (4, 5, 4))),
        "conv3d has weights that depend on the clip at top level",
    ),
    "two outputs": (Net(lambda s, x: (s.a(x), x), a=conv()), "the output has to be one tensor"),
    "two inputs": (
        TwoInputs(),
        r"TwoInputs: its forward takes 2 inputs \(slow, fast\); wrap it in a module that takes one",
    ),
    "a dict": (Net(lambda s, x: {"logits": s.a(x)}, a=conv()), "the output has to be one tensor"),
    "a constant": (
        Net(lambda s, x: s.a.weight * 2, a=conv()),
        "the output has to be one tensor that depends on the clip",
    ),
    "nothing": (nn.Identity(), "Identity: the output is the clip itself"),
    "data-dependent": (
        Net(data_dependent, a=conv()),
        r"Net: torch.export fails for an input of \[1, 3, 4, 7, 6\]: ",
    ),
    "channels that do not fit": (
        chain(conv(5, 2)),
        r"torch.export fails for an input of \[1, 3, 4, 7, 6\]: .*expected input",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_traced_is_refused(name):
    module, message = REFUSALS[name]
    with pytest.raises(CompileError, match=message):
        trace(module, CLIP)


def test_a_2d_network_that_fails_says_so_for_both_inputs():
    with pytest.raises(
        CompileError, match=r"\[1, 3, 1, 7, 6\]: .*; for an input of \[1, 3, 7, 6\]"
    ):
        trace(nn.Conv2d(5, 2, 3), FLAT)


@pytest.mark.parametrize(
    ("module", "clip", "gigamacs", "layers"),
    [
        (c3d, c3d.CLIP, 38.547, 11),
        (r2plus1d, r2plus1d.CLIP, 40.519, 38),
        (i3d, i3d.clip(16), 27.788, 58),
    ],
    ids=["c3d", "r2plus1d_18", "i3d"],
)
def test_the_networks_at_full_size(module, clip, gigamacs, layers):
    build = {c3d: "c3d", r2plus1d: "r2plus1d_18", i3d: "i3d"}[module]
    graph = same_as_torch(getattr(module, build)(400 if module is i3d else 101), clip)
    convolutions = graph.convolutions()
    assert len(convolutions) == layers
    assert round(sum(layer.shape.macs for layer in convolutions) / 1e9, 3) == gigamacs


@pytest.mark.slow
def test_i3d_on_its_64_frames():
    graph = same_as_torch(i3d.i3d(), i3d.CLIP)
    assert round(sum(layer.shape.macs for layer in graph.convolutions()) / 1e9, 3) == 111.151
    assert graph.output == graph.layers[-1].name == "Logits"


class Converting(nn.Module):
    """Converts its clip to its own precision, and its logits back, as mixed-precision code does."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, clip):
        maps = self.features(clip.to(self.head.weight.dtype))
        return self.head(maps.float().mean((2, 3, 4)).type_as(self.head.weight)).float()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_modules_of_every_precision_are_traced_in_float32(kind):
    module = Converting().eval()
    converted = copy.deepcopy(module).to(kind)
    rounded = copy.deepcopy(converted).float()
    clip = ClipSpec(4, 6, 6, 6)
    graph = trace(converted, clip)
    assert {layer.weight.dtype for layer in graph.convolutions()} == {np.dtype(np.float32)}
    assert {parameter.dtype for parameter in converted.parameters()} == {kind}
    values = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        wanted = rounded(values[None])[0].numpy()
    np.testing.assert_allclose(
        run_float(graph, values.numpy()).ravel(), wanted, rtol=1e-4, atol=1e-5
    )


def test_a_module_that_mixes_precisions_wrongly_is_refused_with_advice():
    class Mixed(nn.Sequential):
        def forward(self, clip):
            return super().forward(clip.float())

    module = Mixed(nn.Conv3d(3, 4, 3)).half()
    with pytest.raises(CompileError, match=r"should be the same; try Mixed.float\(\), which has"):
        trace(module, ClipSpec(4, 6, 6, 6))

    class Whole(nn.Sequential):
        def forward(self, clip):
            return super().forward(clip).int()

    with pytest.raises(CompileError, match=r"a conversion to torch\.int32 at top level"):
        trace(Whole(nn.Conv3d(3, 4, 3)), ClipSpec(4, 6, 6, 6))


def test_operations_are_counted_as_torch_counts_them():
    """Groups, dilation, a batch norm alone, an add and a concat that become copies."""

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv3d(3, 32, 1)
            self.depthwise = nn.Conv3d(32, 32, 3, padding=1, groups=32)
            self.grouped = nn.Conv3d(32, 16, 3, stride=2, padding=1, groups=4)
            self.dilated = nn.Conv3d(16, 5, 3, padding=2, dilation=2)
            self.head = nn.Linear(21 * 24, 5)

        def forward(self, clip):
            grouped = self.grouped(F.relu(self.depthwise(self.stem(clip))))
            joined = torch.cat([self.dilated(grouped), grouped], 1)
            return self.head((joined + joined).flatten(1))

    module, clip = Counted().eval(), ClipSpec(4, 6, 8, 6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, 3, 4, 6, 8))
    wanted = counter.get_total_flops() // 2
    graph = trace(module, clip)
    assert sum(layer.shape.own_macs for layer in graph.convolutions()) == wanted
    config = small_config(8)
    frames = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    program = lower(choose_quant(graph, [clip.normalise(frames)], 8), config)
    document = describe(program)
    copies = [t for t in program.tasks if t.name not in {x.name for x in graph.convolutions()}]
    assert len(copies) == 3
    copied = sum(t.shape.out_channels * math.prod(t.out_size) for t in copies)
    assert document.macs_dense <= wanted + copied
    assert 0.97 < document.macs_kept / document.macs_dense <= 1
    assert document.macs_array == sum(
        task_cost(config, program.work(task)).macs for task in program.tasks
    )
    assert f"operations {document.macs_dense / 1e6:.2f} MMAC dense" in summary(document)


def test_random_weights_are_told(monkeypatch, capsys, tmp_path):
    module = nn.Sequential(nn.Conv3d(3, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    monkeypatch.setattr("pynq_kgrc.models.find_network", lambda name: (lambda: module, CLIP))
    unset = ["classes", "weights", "labels", "sampling", "rate", "partial", "mean", "std"]
    unset += ["short_side", "step", "size"]
    options = Namespace(network="c3d", **dict.fromkeys(unset))
    build._trace(options)
    assert capsys.readouterr().err == "no --weights: c3d has seeded random weights\n"
    build._trace(Namespace(**vars(options) | {"network": "mine:network"}))
    assert capsys.readouterr().err == ""  # its function may have loaded weights
    for count in (3, 5):
        labels = tmp_path / "labels.txt"
        labels.write_text("".join(f"label {i}\n" for i in range(count)))
        with pytest.raises(CompileError, match=f"c3d has 4 outputs, but {count} labels were given"):
            build._trace(Namespace(**vars(options) | {"labels": labels}))
