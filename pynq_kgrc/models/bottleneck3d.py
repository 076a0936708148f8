"""ResNet-50 with kernels inflated over time: I3D-R50, SlowOnly, C2D and CSN.

Layers have the names of mmaction2's `ResNet3d`, without its `backbone.` and `cls_head.`. Where
PyTorchVideo has the same network, its checkpoints load, too; their input is normalised otherwise
(mean 0.45 and deviation 0.225 of each colour), which the caller's ClipSpec has to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from pynq_kgrc.graph import ClipSpec, Size

I3D_CLIP = ClipSpec(
    frames=32,
    height=224,
    width=224,
    short_side=256,
    step=2,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    sampling="windows",
)
"""mmaction2 samples 32 frames, every second one, and normalises as for ImageNet; so does its
CSN-50."""

SLOW_CLIP = ClipSpec(
    frames=8,
    height=224,
    width=224,
    short_side=256,
    step=8,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    sampling="windows",
)
"""8 frames, every eighth one."""

DEPTHS = (3, 4, 6, 3)
"""Blocks of the four stages of ResNet-50."""

MMACTION2: tuple[tuple[str, str], ...] = ((r"^backbone\.", ""), (r"^cls_head\.", ""))


def _pytorchvideo(pooled: bool) -> tuple[tuple[str, str], ...]:
    """Rules for PyTorchVideo's names; `pooled`: a pool is a block of its own after stage 1."""
    stages = (1, 3, 4, 5) if pooled else (1, 2, 3, 4)
    return (
        (r"^blocks\.0\.conv\.", "conv1.conv."),
        (r"^blocks\.0\.norm\.", "conv1.bn."),
        (rf"^blocks\.{stages[-1] + 1}\.proj\.", "fc_cls."),
        *(
            (rf"^blocks\.{theirs}\.res_blocks\.", f"layer{i + 1}.")
            for i, theirs in enumerate(stages)
        ),
        (r"\.branch1_conv\.", ".downsample.conv."),
        (r"\.branch1_norm\.", ".downsample.bn."),
        *((rf"\.branch2\.conv_{x}\.", f".conv{i + 1}.conv.") for i, x in enumerate("abc")),
        *((rf"\.branch2\.norm_{x}\.", f".conv{i + 1}.bn.") for i, x in enumerate("abc")),
    )


@dataclass(frozen=True)
class Shape:
    """What tells the networks of this file apart."""

    stem: tuple[int, int]
    """Taps over time of the first convolution, and its stride over time."""
    temporal: tuple[Sequence[int], ...]
    """By stage, taps over time of the first convolution of its blocks, in turn."""
    pool_step: int = 1
    """Stride over time of the first pool."""
    pooled: bool = False
    """Whether a pool after the first stage halves the frames."""
    separated: bool = False
    """CSN: the middle convolutions are 3x3x3, one filter a channel, with a stride over time."""
    epsilon: float = 1e-5


def i3d_r50(classes: int = 400) -> Bottleneck3D:
    """I3D on ResNet-50 as in mmaction2, with random weights. PyTorchVideo's has other strides."""
    temporal = ((3,), (3, 1), (3, 1), (1, 3))
    return Bottleneck3D(classes, Shape((5, 2), temporal, pool_step=2, pooled=True))


def slowonly_r50(classes: int = 400) -> Bottleneck3D:
    """SlowOnly on ResNet-50, the slow pathway of SlowFast alone (PyTorchVideo: slow_r50)."""
    return Bottleneck3D(classes, Shape((1, 1), ((1,), (1,), (3,), (3,))), _pytorchvideo(False))


def c2d_r50(classes: int = 400) -> Bottleneck3D:
    """C2D on ResNet-50 as in PyTorchVideo: 2-D convolutions and a pool over time."""
    return Bottleneck3D(classes, Shape((1, 1), ((1,),) * 4, pooled=True), _pytorchvideo(True))


def csn_50(classes: int = 400) -> Bottleneck3D:
    """Interaction-reduced CSN on ResNet-50 as in mmaction2 (Tran et al., ICCV 2019)."""
    shape = Shape((3, 1), ((1,),) * 4, separated=True, epsilon=1e-3)
    return Bottleneck3D(classes, shape)


class Bottleneck3D(nn.Module):
    """[N, 3, D, H, W] to logits [N, classes]."""

    CLASSIFIER: ClassVar = "fc_cls"

    def __init__(
        self, classes: int, shape: Shape, pytorchvideo: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__()
        others = {"mmaction2": MMACTION2, "PyTorchVideo": pytorchvideo}
        self.OTHER_NAMES = {library: rules for library, rules in others.items() if rules}
        taps, step = shape.stem
        self.conv1 = Unit(3, 64, (taps, 7, 7), (step, 2, 2), epsilon=shape.epsilon)
        self.maxpool = nn.MaxPool3d((1, 3, 3), (shape.pool_step, 2, 2), (0, 1, 1))
        self.pool2 = nn.MaxPool3d((2, 1, 1)) if shape.pooled else nn.Identity()
        channels = 64
        for i, depth in enumerate(DEPTHS):
            blocks = []
            for j in range(depth):
                side = 2 if i and not j else 1
                stride = (side if shape.separated else 1, side, side)
                temporal = shape.temporal[i][j % len(shape.temporal[i])]
                blocks.append(Block(channels, 64 << i, stride, temporal, shape))
                channels = 256 << i
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.dropout = nn.Dropout(0.5)
        self.fc_cls = nn.Linear(channels, classes)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.pool2(self.get_submodule("layer1")(self.maxpool(self.conv1(clip))))
        for i in range(2, 5):
            x = self.get_submodule(f"layer{i}")(x)
        logits: Tensor = self.fc_cls(self.dropout(self.avgpool(x).flatten(1)))
        return logits


class Block(nn.Module):
    """Tx1x1 to fewer channels, 1x3x3 (CSN: 3x3x3), 1x1x1 to more, and a shortcut."""

    def __init__(
        self, channels: int, width: int, stride: Size, temporal: int, shape: Shape
    ) -> None:
        super().__init__()
        epsilon = shape.epsilon
        self.conv1 = Unit(channels, width, (temporal, 1, 1), epsilon=epsilon)
        self.conv2: nn.Module
        if shape.separated:
            self.conv2 = nn.Sequential(
                Unit(width, width, (3, 3, 3), stride, groups=width, epsilon=epsilon)
            )
        else:
            self.conv2 = Unit(width, width, (1, 3, 3), stride, epsilon=epsilon)
        self.conv3 = Unit(width, 4 * width, (1, 1, 1), active=False, epsilon=epsilon)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: Unit | None = None
        if channels != 4 * width or max(stride) > 1:
            self.downsample = Unit(
                channels, 4 * width, (1, 1, 1), stride, active=False, epsilon=epsilon
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.conv3(self.conv2(self.conv1(x))) + shortcut)
        return out


class Unit(nn.Module):
    """Convolution, batch norm and, if `active`, ReLU."""

    def __init__(
        self,
        channels: int,
        filters: int,
        kernel: Size,
        stride: Size = (1, 1, 1),
        groups: int = 1,
        active: bool = True,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        pad = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(channels, filters, kernel, stride, pad, groups=groups, bias=False)
        self.bn = nn.BatchNorm3d(filters, eps=epsilon)
        self.activate = nn.ReLU(inplace=True) if active else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activate(self.bn(self.conv(x)))
        return out
