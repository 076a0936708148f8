"""R(2+1)D: each 3-D convolution is a spatial one, then a temporal one (Tran et al., CVPR 2018).

Names and sizes of the layers are those of torchvision: its state dicts load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import nn

from pynq_kgrc.models.resnet3d import CLIP, WIDTHS, Block, ResNet3D, factorised, middle_width

__all__ = ("CLIP", "CLIP_34", "R2Plus1D", "r2plus1d_18", "r2plus1d_34")

CLIP_34 = replace(CLIP, frames=8, rate=None)
"""The weights of R(2+1)D-34 are published for 8 and for 32 frames at the video's own rate."""


def r2plus1d_18(classes: int = 400) -> R2Plus1D:
    """R(2+1)D-18 at full size, with random weights; 400 classes are those of Kinetics-400."""
    return R2Plus1D(classes, (2, 2, 2, 2))


def r2plus1d_34(classes: int = 400) -> R2Plus1D:
    """R(2+1)D-34 at full size, with random weights.

    The weights that ig65m-pytorch converted from the authors' Caffe2 files fit: they have
    torchvision's names, the authors' widths, and an epsilon of 1e-3.
    """
    network = R2Plus1D(classes, (3, 4, 6, 3), OwnWidths)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.eps = 1e-3
    return network


class R2Plus1D(ResNet3D):
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

    def __init__(self, classes: int, depths: Sequence[int], block: type[Block] = Block) -> None:
        super().__init__(classes, depths, (factorised,) * 4, _stem(), block)


class OwnWidths(Block):
    """A block whose second pair of convolutions has a middle width of its own (Caffe2)."""

    @staticmethod
    def second_middle(first: int, filters: int) -> int:
        return middle_width(filters, filters)


def _stem() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(3, 45, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
        nn.BatchNorm3d(45),
        nn.ReLU(inplace=True),
        nn.Conv3d(45, WIDTHS[0], (3, 1, 1), padding=(1, 0, 0), bias=False),
        nn.BatchNorm3d(WIDTHS[0]),
        nn.ReLU(inplace=True),
    )
