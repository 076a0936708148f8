"""Residual networks of 3-D convolutions (Tran et al., CVPR 2018): R3D-18 and MC3-18.

Names and sizes of the layers are those of torchvision's `VideoResNet`: its state dicts load as
they are. R(2+1)D is in `r2plus1d.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

WIDTHS = (64, 128, 256, 512)
"""Filters of the four stages."""

Convolution = Callable[[int, int, int, int], nn.Module]
"""Makes what stands for a 3x3x3 convolution: of channels, middle, filters and stride."""


def r3d_18(classes: int = 400) -> ResNet3D:
    """R3D-18 at full size, with random weights; 400 classes are those of Kinetics-400."""
    return ResNet3D(classes, (2, 2, 2, 2), (full,) * 4, _stem())


def mc3_18(classes: int = 400) -> ResNet3D:
    """MC3-18: 3-D convolutions in the stem and the first stage, 2-D ones after it."""
    return ResNet3D(classes, (2, 2, 2, 2), (full, spatial, spatial, spatial), _stem())


class ResNet3D(nn.Module):
    """[N, 3, D, H, W] to logits [N, classes]."""

    def __init__(
        self,
        classes: int,
        depths: Sequence[int],
        convolutions: Sequence[Convolution],
        stem: nn.Sequential,
        block: type[Block] | None = None,
    ) -> None:
        """`depths` and `convolutions` are of the four stages."""
        super().__init__()
        self.stem = stem
        channels = WIDTHS[0]
        for i, (filters, depth, make) in enumerate(zip(WIDTHS, depths, convolutions, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i and not j else 1
                blocks.append((block or Block)(channels, filters, stride, make))
                channels = filters
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.stem(clip)
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int, filters: int, stride: int, make: Convolution) -> None:
        super().__init__()
        middle = middle_width(channels, filters)
        self.conv1 = nn.Sequential(
            make(channels, middle, filters, stride),
            nn.BatchNorm3d(filters),
            nn.ReLU(inplace=True),
        )
        self.conv2 = nn.Sequential(
            make(filters, self.second_middle(middle, filters), filters, 1),
            nn.BatchNorm3d(filters),
        )
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != filters:
            step = (1, stride, stride) if make is spatial else stride
            self.downsample = nn.Sequential(
                nn.Conv3d(channels, filters, 1, stride=step, bias=False), nn.BatchNorm3d(filters)
            )

    @staticmethod
    def second_middle(first: int, filters: int) -> int:
        """The middle width of the second convolution; in torchvision that of the first."""
        return first

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.conv2(self.conv1(x)) + shortcut)
        return out


def middle_width(channels: int, filters: int) -> int:
    """Filters of 1x3x3 that give the pair 1x3x3, 3x1x1 as many weights as one 3x3x3."""
    return (channels * filters * 27) // (channels * 9 + 3 * filters)


def full(channels: int, middle: int, filters: int, stride: int) -> nn.Module:
    """3x3x3; `middle` is not used."""
    return nn.Conv3d(channels, filters, 3, stride=stride, padding=1, bias=False)


def spatial(channels: int, middle: int, filters: int, stride: int) -> nn.Module:
    """1x3x3, which keeps the number of frames; `middle` is not used."""
    step, pad = (1, stride, stride), (0, 1, 1)
    return nn.Conv3d(channels, filters, (1, 3, 3), stride=step, padding=pad, bias=False)


def factorised(channels: int, middle: int, filters: int, stride: int) -> nn.Sequential:
    """1x3x3, batch norm, ReLU, 3x1x1: R(2+1)D."""
    return nn.Sequential(
        spatial(channels, 0, middle, stride),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, filters, (3, 1, 1), stride=(stride, 1, 1), padding=(1, 0, 0), bias=False),
    )


def _stem() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(3, WIDTHS[0], (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False),
        nn.BatchNorm3d(WIDTHS[0]),
        nn.ReLU(inplace=True),
    )
