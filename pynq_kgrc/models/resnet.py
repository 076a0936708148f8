"""Networks for images, as clips of one frame: ResNet, VGG-16 and AlexNet.

Names and sizes of the layers are those of torchvision: its state dicts load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from pynq_kgrc.graph import ClipSpec

CLIP = ClipSpec(
    frames=1,
    height=224,
    width=224,
    short_side=256,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
"""One frame of the video, normalised as for ImageNet."""


def resnet_18(classes: int = 1000) -> ResNet:
    """ResNet-18 with random weights; 1000 classes are those of ImageNet."""
    return ResNet(classes, (2, 2, 2, 2), expansion=1)


def resnet_50(classes: int = 1000) -> ResNet:
    """ResNet-50 with random weights."""
    return ResNet(classes, (3, 4, 6, 3), expansion=4)


def resnet_152(classes: int = 1000) -> ResNet:
    """ResNet-152 with random weights."""
    return ResNet(classes, (3, 8, 36, 3), expansion=4)


def as_image(clip: Tensor) -> Tensor:
    """[N, 3, 1, H, W] as [N, 3, H, W], which is taken as it is."""
    return clip.flatten(1, 2) if clip.dim() == 5 else clip


class ResNet(nn.Module):
    """[N, 3, 1, H, W] to logits [N, classes] (He et al., CVPR 2016)."""

    def __init__(self, classes: int, depths: Sequence[int], expansion: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                stride = 2 if i and not j else 1
                blocks.append(Block(channels, 64 << i, stride, expansion))
                channels = (64 << i) * expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(as_image(clip)))))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class Block(nn.Module):
    """Two convolutions 3x3 (`expansion` 1), or 1x1, 3x3 and 1x1 to 4 times the width."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        filters = width * expansion
        kernels = (3, 3) if expansion == 1 else (1, 3, 1)
        widths = (channels, *(width,) * (len(kernels) - 1), filters)
        steps = (stride, 1) if expansion == 1 else (1, stride, 1)
        self.units = len(kernels)
        for i, (size, step) in enumerate(zip(kernels, steps, strict=True)):
            conv = nn.Conv2d(widths[i], widths[i + 1], size, step, size // 2, bias=False)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != filters:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        for i in range(1, self.units + 1):
            x = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x))
            x = self.relu(x if i < self.units else x + shortcut)
        return x


def vgg_16(classes: int = 1000) -> Plain:
    """VGG-16 without batch norm, with random weights (Simonyan and Zisserman, ICLR 2015)."""
    layers: list[nn.Module] = []
    channels = 3
    for filters, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(inplace=True)]
            channels = filters
        layers.append(nn.MaxPool2d(2))
    dense = [nn.Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True), nn.Dropout()]
    dense += [nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout()]
    return Plain(layers, [*dense, nn.Linear(4096, classes)])


def alexnet(classes: int = 1000) -> Plain:
    """AlexNet on one tower, with random weights (Krizhevsky, arXiv:1404.5997)."""
    layers: list[nn.Module] = []
    for channels, filters, size, stride, pad, pooled in (
        (3, 64, 11, 4, 2, True),
        (64, 192, 5, 1, 2, True),
        (192, 384, 3, 1, 1, False),
        (384, 256, 3, 1, 1, False),
        (256, 256, 3, 1, 1, True),
    ):
        layers += [nn.Conv2d(channels, filters, size, stride, pad), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(3, stride=2)] if pooled else []
    dense = [nn.Dropout(), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(inplace=True)]
    dense += [nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(inplace=True)]
    return Plain(layers, [*dense, nn.Linear(4096, classes)])


class Plain(nn.Module):
    """[N, 3, 1, 224, 224] to logits [N, classes]: convolutions, then fully connected layers."""

    CLASSIFIER: ClassVar = "classifier.6"

    def __init__(self, layers: Sequence[nn.Module], dense: Sequence[nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(*dense)

    def forward(self, clip: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(as_image(clip)).flatten(1))
        return logits
