"""S3D: Inception-v1 with separable 3-D convolutions (Xie et al., ECCV 2018).

Names and sizes of the layers are those of torchvision's `s3d`: its state dicts load as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from pynq_kgrc.models import resnet3d
from pynq_kgrc.models.i3d import WIDTHS
from pynq_kgrc.models.i3d_graph import EPSILON

CLIP = replace(resnet3d.CLIP, height=224, width=224, short_side=256)
"""Torchvision publishes the accuracy of its weights for 128 frames at 15 frames a second, and its
number of operations for 16 frames, which are taken here."""


def s3d(classes: int = 400) -> S3D:
    """S3D at full size, with random weights; 400 classes are those of Kinetics-400."""
    return S3D(classes)


class S3D(nn.Module):
    """[N, 3, D, 224, 224] to logits [N, classes], the mean over time; D of 14 or more."""

    CLASSIFIER: ClassVar = "classifier.1"

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            _separable(3, 64, 7, stride=2),
            _pool(),
            _unit(64, 64),
            _separable(64, 192, 3),
            _pool(),
        ]
        channels = 192
        for name, widths in WIDTHS.items():
            if name == "Mixed_4b":
                layers.append(nn.MaxPool3d(3, stride=2, padding=1))
            elif name == "Mixed_5b":
                layers.append(nn.MaxPool3d(2))
            layers.append(Mixed(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AvgPool3d((2, 7, 7), stride=1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Conv3d(channels, classes, 1))

    def forward(self, clip: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.avgpool(self.features(clip)))
        return logits.mean((2, 3, 4))


class Mixed(nn.Module):
    """An Inception block: four branches on one input, concatenated on the channels."""

    def __init__(self, channels: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        self.branch0 = _unit(channels, widths[0])
        self.branch1 = nn.Sequential(
            _unit(channels, widths[1]), _separable(widths[1], widths[2], 3)
        )
        self.branch2 = nn.Sequential(
            _unit(channels, widths[3]), _separable(widths[3], widths[4], 3)
        )
        self.branch3 = nn.Sequential(
            nn.MaxPool3d(3, stride=1, padding=1), _unit(channels, widths[5])
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch0(x), self.branch1(x), self.branch2(x), self.branch3(x)], 1)


def _separable(channels: int, filters: int, size: int, stride: int = 1) -> nn.Sequential:
    """A spatial convolution, then a temporal one, each with batch norm and ReLU."""
    return nn.Sequential(
        _unit(channels, filters, (1, size, size), (1, stride, stride)),
        _unit(filters, filters, (size, 1, 1), (stride, 1, 1)),
    )


def _unit(
    channels: int,
    filters: int,
    kernel: tuple[int, int, int] = (1, 1, 1),
    stride: tuple[int, int, int] = (1, 1, 1),
) -> nn.Sequential:
    pad = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return nn.Sequential(
        nn.Conv3d(channels, filters, kernel, stride, pad, bias=False),
        nn.BatchNorm3d(filters, eps=EPSILON, momentum=1e-3),
        nn.ReLU(inplace=True),
    )


def _pool() -> nn.MaxPool3d:
    return nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
