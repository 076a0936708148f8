"""C3D: eight plain 3x3x3 convolutions and three fully connected layers (Tran et al., ICCV 2015)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pynq_kgrc.graph import ClipSpec

CLIP = ClipSpec(frames=16, height=112, width=112, short_side=128, sampling="windows", rate=25.0)
"""16 consecutive frames, averaged over the clips of a video (section 3 of the paper). UCF101, whose
classes are the default, has 25 frames a second."""


def c3d(classes: int = 101) -> C3D:
    """C3D at full size, with random weights; 101 classes are those of UCF101."""
    return C3D(classes)


class C3D(nn.Module):
    """[N, 3, 16, 112, 112] to logits [N, classes].

    The layers have the names of the authors' Caffe model, so that its weights map one to one.
    """

    OTHER_NAMES: ClassVar = {
        "mmaction2": (
            (r"^(?:backbone\.)?(conv[345][ab])\.conv\.", r"\1."),
            (r"^(?:backbone\.)?(conv[12])a\.conv\.", r"\1."),
            (r"^backbone\.(fc[67])\.", r"\1."),
            (r"^cls_head\.fc_cls\.", "fc8."),
        )
    }
    """By library: rules that turn its names of the tensors into ours.

    The values are the same, and fc6 reads its input in the same order (C, D, H, W). mmaction2's
    input is not: pixels of 0 to 255 minus 104, 117 and 128, which the caller's ClipSpec has to say.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 64, 3, padding=1)
        self.pool1 = nn.MaxPool3d((1, 2, 2))
        self.conv2 = nn.Conv3d(64, 128, 3, padding=1)
        self.pool2 = nn.MaxPool3d(2)
        self.conv3a = nn.Conv3d(128, 256, 3, padding=1)
        self.conv3b = nn.Conv3d(256, 256, 3, padding=1)
        self.pool3 = nn.MaxPool3d(2)
        self.conv4a = nn.Conv3d(256, 512, 3, padding=1)
        self.conv4b = nn.Conv3d(512, 512, 3, padding=1)
        self.pool4 = nn.MaxPool3d(2)
        self.conv5a = nn.Conv3d(512, 512, 3, padding=1)
        self.conv5b = nn.Conv3d(512, 512, 3, padding=1)
        self.pool5 = nn.MaxPool3d(2, padding=(0, 1, 1))
        self.fc6 = nn.Linear(512 * 4 * 4, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, classes)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.pool1(self.relu(self.conv1(clip)))
        x = self.pool2(self.relu(self.conv2(x)))
        x = self.relu(self.conv3a(x))
        x = self.pool3(self.relu(self.conv3b(x)))
        x = self.relu(self.conv4a(x))
        x = self.pool4(self.relu(self.conv4b(x)))
        x = self.relu(self.conv5a(x))
        x = self.pool5(self.relu(self.conv5b(x)))
        x = self.dropout(self.relu(self.fc6(x.flatten(1))))
        x = self.dropout(self.relu(self.fc7(x)))
        logits: Tensor = self.fc8(x)
        return logits
