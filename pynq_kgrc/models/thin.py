"""Thin networks for small data sets and computers, with batch norm and widths of whole groups.

The layers of `thin_c3d` have C3D's names, so that C3D's recipes fit.
"""

from __future__ import annotations

from torch import Tensor, nn

from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.models.resnet3d import Block, factorised

CLIP = ClipSpec(frames=16, height=64, width=64, short_side=64, sampling="uniform")
"""There are no published weights: these networks see what `train` gives them, one clip that is
spread over the whole video (`graph.TRAINING_SAMPLING`)."""


def thin_c3d(classes: int = 27, width: int = 16) -> ThinC3D:
    """Six 3-D convolutions and one fully connected layer; `width` filters in the first."""
    return ThinC3D(classes, width)


class ThinC3D(nn.Module):
    """[N, 3, 16, 64, 64] to logits [N, classes].

    The first convolution spans three frames: on small maps, motion tells more than appearance.
    The last map keeps its four time steps, so that the fully connected layer sees their order;
    sitting down and standing up differ in nothing else.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, width, (3, 5, 5), (1, 2, 2), (1, 2, 2), bias=False)
        self.norm1 = nn.BatchNorm3d(width)
        self.pool1 = nn.MaxPool3d((1, 2, 2))
        self.conv2 = nn.Conv3d(width, 2 * width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm3d(2 * width)
        self.pool2 = nn.MaxPool3d(2)
        self.conv3a = nn.Conv3d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.norm3a = nn.BatchNorm3d(4 * width)
        self.conv3b = nn.Conv3d(4 * width, 4 * width, 3, padding=1, bias=False)
        self.norm3b = nn.BatchNorm3d(4 * width)
        self.pool3 = nn.MaxPool3d(2)
        self.conv4a = nn.Conv3d(4 * width, 8 * width, 3, padding=1, bias=False)
        self.norm4a = nn.BatchNorm3d(8 * width)
        self.conv4b = nn.Conv3d(8 * width, 8 * width, 3, padding=1, bias=False)
        self.norm4b = nn.BatchNorm3d(8 * width)
        self.pool4 = nn.AvgPool3d((1, 4, 4))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4 * 8 * width, classes)
        self.relu = nn.ReLU()

    def forward(self, clip: Tensor) -> Tensor:
        x = self.pool1(self.relu(self.norm1(self.conv1(clip))))
        x = self.pool2(self.relu(self.norm2(self.conv2(x))))
        x = self.relu(self.norm3a(self.conv3a(x)))
        x = self.pool3(self.relu(self.norm3b(self.conv3b(x))))
        x = self.relu(self.norm4a(self.conv4a(x)))
        x = self.pool4(self.relu(self.norm4b(self.conv4b(x))))
        logits: Tensor = self.fc(self.dropout(x.flatten(1)))
        return logits


def thin_r2plus1d(classes: int = 27, width: int = 16) -> ThinR2Plus1D:
    """R(2+1)D with one block a stage, and `width` filters in the first."""
    return ThinR2Plus1D(classes, width)


class ThinR2Plus1D(nn.Module):
    """[N, 3, D, H, W] to logits [N, classes]; stages are named as in R(2+1)D-18."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, width, (1, 7, 7), stride=(1, 4, 4), padding=(0, 3, 3), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
            nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )
        self.layer1 = nn.Sequential(Block(width, width, 1, factorised))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2, factorised))
        self.layer3 = nn.Sequential(Block(2 * width, 4 * width, 2, factorised))
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(clip))))
        logits: Tensor = self.fc(self.dropout(self.avgpool(x).flatten(1)))
        return logits
