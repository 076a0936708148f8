"""R(2+1)D-18: each 3-D convolution is a spatial one, then a temporal one (Tran et al., CVPR 2018).

Names and sizes of the layers are those of torchvision's `r2plus1d_18`: its state dicts load as is.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pynq_kgrc.graph import ClipSpec

CLIP = ClipSpec(
    frames=16,
    height=112,
    width=112,
    short_side=128,
    mean=(0.43216, 0.394666, 0.37645),
    std=(0.22803, 0.22145, 0.216989),
    sampling="windows",
    rate=15.0,
)
"""Torchvision publishes the accuracy of its weights for clips of 16 frames at 15 frames a second,
averaged over the clips of a video."""


def r2plus1d_18(classes: int = 400) -> R2Plus1D:
    """R(2+1)D-18 at full size, with random weights; 400 classes are those of Kinetics-400."""
    return R2Plus1D(classes)


class R2Plus1D(nn.Module):
    """[N, 3, D, H, W] to logits [N, classes]."""

    OTHER_NAMES: ClassVar = {
        "mmaction2": (
            (r"^cls_head\.fc_cls\.", "fc."),
            (r"^backbone\.", ""),
            (r"^conv1\.conv\.conv_s\.", "stem.0."),
            (r"^conv1\.conv\.bn_s\.", "stem.1."),
            (r"^conv1\.conv\.conv_t\.", "stem.3."),
            (r"^conv1\.bn\.", "stem.4."),
            (r"^(layer\d\.\d\.conv\d)\.conv\.conv_s\.", r"\1.0.0."),
            (r"^(layer\d\.\d\.conv\d)\.conv\.bn_s\.", r"\1.0.1."),
            (r"^(layer\d\.\d\.conv\d)\.conv\.conv_t\.", r"\1.0.3."),
            (r"^(layer\d\.\d\.conv\d)\.bn\.", r"\1.1."),
            (r"^(layer\d\.\d)\.downsample\.conv\.", r"\1.downsample.0."),
            (r"^(layer\d\.\d)\.downsample\.bn\.", r"\1.downsample.1."),
        )
    }
    """By library: rules that turn its names of the tensors into ours.

    mmaction2 holds torchvision's network as `backbone` with its own head. Its own R(2+1)D has other
    widths (83 filters in the stem instead of 45): its names are known, its shapes are refused.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 45, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
            nn.BatchNorm3d(45),
            nn.ReLU(inplace=True),
            nn.Conv3d(45, 64, (3, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(64),
            nn.ReLU(inplace=True),
        )
        self.layer1 = _stage(64, 64, stride=1)
        self.layer2 = _stage(64, 128, stride=2)
        self.layer3 = _stage(128, 256, stride=2)
        self.layer4 = _stage(256, 512, stride=2)
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(512, classes)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.stem(clip)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class Block(nn.Module):
    """Two factorised convolutions and a shortcut."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        # gives the pair as many weights as one 3x3x3 convolution; both pairs use this width
        middle = (channels * filters * 27) // (channels * 9 + 3 * filters)
        self.conv1 = nn.Sequential(
            _factorised(channels, middle, filters, stride),
            nn.BatchNorm3d(filters),
            nn.ReLU(inplace=True),
        )
        self.conv2 = nn.Sequential(
            _factorised(filters, middle, filters, stride=1), nn.BatchNorm3d(filters)
        )
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != filters:
            self.downsample = nn.Sequential(
                nn.Conv3d(channels, filters, 1, stride=stride, bias=False), nn.BatchNorm3d(filters)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.conv2(self.conv1(x)) + shortcut)
        return out


def _factorised(channels: int, middle: int, filters: int, stride: int) -> nn.Sequential:
    """1x3x3, batch norm, ReLU, 3x1x1."""
    return nn.Sequential(
        nn.Conv3d(
            channels, middle, (1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1), bias=False
        ),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, filters, (3, 1, 1), stride=(stride, 1, 1), padding=(1, 0, 0), bias=False),
    )


def _stage(channels: int, filters: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(channels, filters, stride), Block(filters, filters, stride=1))
