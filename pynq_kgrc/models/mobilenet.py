"""MobileNets: V1 and V2 of 3-D convolutions (Kopuklu et al., ICCVW 2019), and V2 for images.

Names and sizes of the layers are those of the authors' Efficient-3DCNNs, and of torchvision's
`mobilenet_v2`: their state dicts load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.models.resnet import CLIP as IMAGE_CLIP
from pynq_kgrc.models.resnet import as_image

__all__ = ("CLIP", "IMAGE_CLIP", "mobilenet3d_v1", "mobilenet3d_v2", "mobilenet_v2")

CLIP = ClipSpec(
    frames=16,
    height=112,
    width=112,
    short_side=112,
    mean=(114.7748 / 255, 107.7354 / 255, 99.4750 / 255),
    std=(1 / 255, 1 / 255, 1 / 255),
    sampling="windows",
)
"""Efficient-3DCNNs takes 16 frames of 112 x 112 pixels and subtracts ActivityNet's mean of each
colour from levels of 0 to 255, without a division."""

SETTINGS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
            (6, 160, 3, 2), (6, 320, 1, 1))  # fmt: skip
"""V2, by stage: factor of the widening, filters, blocks, stride of the first block."""


def mobilenet3d_v1(classes: int = 600) -> MobileNet:
    """3-D MobileNetV1 at full size, with random weights; 600 classes are Kinetics-600's."""
    layers: list[nn.Module] = [nn.Sequential(*_unit(3, 3, 32, 3, (1, 2, 2), act=nn.ReLU))]
    channels = 32
    for filters, depth, stride in ((64, 1, 2), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 1)):
        for i in range(depth):
            layers.append(Separable(channels, filters, 1 if i else stride))
            channels = filters
    return MobileNet(layers, channels, classes, axes=3)


def mobilenet3d_v2(classes: int = 600) -> MobileNet:
    """3-D MobileNetV2 at full size, with random weights; 600 classes are Kinetics-600's."""
    return _second(classes, axes=3)


def mobilenet_v2(classes: int = 1000) -> MobileNet:
    """MobileNetV2 for images, with random weights; 1000 classes are those of ImageNet."""
    return _second(classes, axes=2)


class MobileNet(nn.Module):
    """[N, 3, D, H, W] to logits [N, classes]; with 2 axes, D is 1."""

    CLASSIFIER: ClassVar = "classifier.1"

    def __init__(self, layers: Sequence[nn.Module], channels: int, classes: int, axes: int) -> None:
        super().__init__()
        self.axes = axes
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(channels, classes))

    def forward(self, clip: Tensor) -> Tensor:
        x = self.features(clip if self.axes == 3 else as_image(clip))
        logits: Tensor = self.classifier(x.mean(tuple(range(2, x.dim()))))
        return logits


class Separable(nn.Module):
    """V1: 3x3x3, one filter a channel, then 1x1x1."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm3d(channels)
        self.conv2 = nn.Conv3d(channels, filters, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(filters)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(x)))
        return out


class Inverted(nn.Module):
    """V2: 1x1x1 to more channels, 3x3x3 with one filter a channel, 1x1x1 to fewer."""

    def __init__(self, axes: int, channels: int, filters: int, stride: int, widen: int) -> None:
        super().__init__()
        width = channels * widen
        # torchvision nests the layers of a convolution with its norm, the 3-D repository does not
        nest = axes == 2
        parts = [_unit(axes, channels, width, 1)] if widen != 1 else []
        parts.append(_unit(axes, width, width, 3, stride, groups=width))
        layers = (
            [nn.Sequential(*part) for part in parts]
            if nest
            else [x for part in parts for x in part]
        )
        self.conv = nn.Sequential(*layers, *_unit(axes, width, filters, 1)[:2])
        self.same = stride == 1 and channels == filters

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.same else out


def _second(classes: int, axes: int) -> MobileNet:
    stride: int | tuple[int, ...] = 2 if axes == 2 else (1, 2, 2)
    layers: list[nn.Module] = [nn.Sequential(*_unit(axes, 3, 32, 3, stride))]
    channels = 32
    for widen, filters, depth, step in SETTINGS:
        for i in range(depth):
            layers.append(Inverted(axes, channels, filters, 1 if i else step, widen))
            channels = filters
    layers.append(nn.Sequential(*_unit(axes, channels, 1280, 1)))
    return MobileNet(layers, 1280, classes, axes)


def _unit(
    axes: int,
    channels: int,
    filters: int,
    size: int,
    stride: int | tuple[int, ...] = 1,
    groups: int = 1,
    act: type[nn.Module] = nn.ReLU6,
) -> list[nn.Module]:
    """Convolution, batch norm and activation."""
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if axes == 2 else (nn.Conv3d, nn.BatchNorm3d)
    made = conv(channels, filters, size, stride, size // 2, groups=groups, bias=False)  # type: ignore[arg-type]
    return [made, norm(filters), act()]
