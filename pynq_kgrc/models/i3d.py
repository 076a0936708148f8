"""I3D: Inception-v1 inflated to three dimensions, RGB stream (Carreira and Zisserman, CVPR 2017).

Padding is TensorFlow's SAME, as in the authors' release: an odd amount has its larger half after
the map. Batch norm has no scale, and an epsilon of 1e-3.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

import torch
from torch import Tensor, nn

from pynq_kgrc.models.i3d_graph import AVERAGE, BLOCKS, CLIP, EPSILON, POOLS, clip, same_padding

__all__ = ("CLIP", "I3D", "clip", "i3d")


WIDTHS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
"""Filters of each Inception block, by branch: 1x1x1; 1x1x1 and 3x3x3; the same; after the pool."""

ENDS = (0, 2, 4, 5)
"""Those of the widths that a block's output has, one of each branch."""


def i3d(classes: int = 400) -> I3D:
    """I3D at full size, with random weights; 400 classes are those of Kinetics-400."""
    return I3D(classes)


class I3D(nn.Module):
    """[N, 3, D, 224, 224] to logits [N, classes], the mean over time."""

    CLASSIFIER: ClassVar = "Logits"
    OTHER_NAMES: ClassVar = {
        "pytorch-i3d": (
            (r"^logits\.conv3d\.", "Logits."),
            (r"\.conv3d\.", ".conv."),
            (r"\.bn\.", ".norm."),
            (r"^(Mixed_\w+)\.b0\.", r"\1.Branch_0.Conv3d_0a_1x1."),
            (r"^(Mixed_\w+)\.b([12])a\.", r"\1.Branch_\2.Conv3d_0a_1x1."),
            (r"^(Mixed_\w+)\.b([12])b\.", r"\1.Branch_\2.Conv3d_0b_3x3."),
            (r"^(Mixed_\w+)\.b3b\.", r"\1.Branch_3.Conv3d_0b_1x1."),
        ),
        "kinetics_i3d_pytorch (its batch norm's epsilon is 1e-5, here it is 1e-3)": (
            (r"^conv3d_0c_1x1\.conv3d\.", "Logits."),
            (r"\.conv3d\.", ".conv."),
            (r"\.batch3d\.", ".norm."),
            (r"^conv3d_([12])", r"Conv3d_\1"),
            (r"^mixed_(\w+)\.branch_0\.", r"Mixed_\1.Branch_0.Conv3d_0a_1x1."),
            (r"^mixed_(\w+)\.branch_([12])\.0\.", r"Mixed_\1.Branch_\2.Conv3d_0a_1x1."),
            (r"^mixed_(\w+)\.branch_([12])\.1\.", r"Mixed_\1.Branch_\2.Conv3d_0b_3x3."),
            (r"^mixed_(\w+)\.branch_3\.1\.", r"Mixed_\1.Branch_3.Conv3d_0b_1x1."),
        ),
    }
    """By library (piergiaj's and hassony2's): rules that turn its names of the tensors into ours.

    Both libraries pad as this module does and take input from -1 to 1. The second one converted
    DeepMind's weights, which were trained with an epsilon of 1e-3.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, stride=2)
        self.MaxPool3d_2a_3x3 = _max_pool("MaxPool3d_2a_3x3")
        self.Conv3d_2b_1x1 = Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        channels = 192
        for name in BLOCKS:
            if name in POOLS:
                self.add_module(name, _max_pool(name))
                continue
            self.add_module(name, Mixed(channels, WIDTHS[name]))
            channels = sum(WIDTHS[name][i] for i in ENDS)
        self.AvgPool3d = nn.AvgPool3d(AVERAGE, stride=1)
        self.dropout = nn.Dropout(0.5)
        self.Logits = nn.Conv3d(channels, classes, 1)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.MaxPool3d_2a_3x3(self.Conv3d_1a_7x7(clip))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.Logits(self.dropout(self.AvgPool3d(x)))
        return logits.mean((2, 3, 4))


class Unit(nn.Module):
    """Convolution with SAME padding, batch norm without a scale, ReLU."""

    def __init__(self, channels: int, filters: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        before, after = same_padding(kernel, stride)
        self.pad = nn.ConstantPad3d((before, after) * 3, 0.0)
        self.conv = nn.Conv3d(channels, filters, kernel, stride=stride, bias=False)
        self.norm = nn.BatchNorm3d(filters, eps=EPSILON, momentum=1e-3)
        self.norm.weight.requires_grad_(False)  # stays 1
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.norm(self.conv(self.pad(x))))
        return out


class Mixed(nn.Module):
    """An Inception block: four branches on one input, concatenated on the channels."""

    def __init__(self, channels: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        self.Branch_0 = nn.Sequential(OrderedDict({"Conv3d_0a_1x1": Unit(channels, widths[0], 1)}))
        self.Branch_1 = _reduced(channels, widths[1], widths[2])
        self.Branch_2 = _reduced(channels, widths[3], widths[4])
        self.Branch_3 = nn.Sequential(
            OrderedDict(
                {
                    "MaxPool3d_0a_3x3": nn.MaxPool3d(3, stride=1, padding=1),
                    "Conv3d_0b_1x1": Unit(channels, widths[5], 1),
                }
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [self.Branch_0(x), self.Branch_1(x), self.Branch_2(x), self.Branch_3(x)], 1
        )


def _reduced(channels: int, middle: int, filters: int) -> nn.Sequential:
    """1x1x1 to fewer channels, then 3x3x3."""
    return nn.Sequential(
        OrderedDict(
            {"Conv3d_0a_1x1": Unit(channels, middle, 1), "Conv3d_0b_3x3": Unit(middle, filters, 3)}
        )
    )


def _max_pool(name: str) -> nn.MaxPool3d:
    """SAME for even sizes: one element of padding after the map, which `ceil_mode` adds."""
    return nn.MaxPool3d(*POOLS[name], ceil_mode=True)
