"""Networks in plain torch, their weights, and the trace of a torch module to a Graph."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from pynq_kgrc.errors import ModelError
from pynq_kgrc.graph import ClipSpec

HERE = "pynq_kgrc.models"

NETWORKS = {
    "c3d": (f"{HERE}.c3d", "c3d"),
    "r2plus1d_18": (f"{HERE}.r2plus1d", "r2plus1d_18"),
    "r2plus1d_34": (f"{HERE}.r2plus1d", "r2plus1d_34"),
    "r3d_18": (f"{HERE}.resnet3d", "r3d_18"),
    "mc3_18": (f"{HERE}.resnet3d", "mc3_18"),
    "i3d": (f"{HERE}.i3d", "i3d"),
    "s3d": (f"{HERE}.s3d", "s3d"),
    "i3d_r50": (f"{HERE}.bottleneck3d", "i3d_r50"),
    "slowonly_r50": (f"{HERE}.bottleneck3d", "slowonly_r50"),
    "c2d_r50": (f"{HERE}.bottleneck3d", "c2d_r50"),
    "csn_50": (f"{HERE}.bottleneck3d", "csn_50"),
    "mobilenet3d_v1": (f"{HERE}.mobilenet", "mobilenet3d_v1"),
    "mobilenet3d_v2": (f"{HERE}.mobilenet", "mobilenet3d_v2"),
    "resnet_18": (f"{HERE}.resnet", "resnet_18"),
    "resnet_50": (f"{HERE}.resnet", "resnet_50"),
    "resnet_152": (f"{HERE}.resnet", "resnet_152"),
    "vgg_16": (f"{HERE}.resnet", "vgg_16"),
    "alexnet": (f"{HERE}.resnet", "alexnet"),
    "mobilenet_v2": (f"{HERE}.mobilenet", "mobilenet_v2"),
    "thin_c3d": (f"{HERE}.thin", "thin_c3d"),
    "thin_r2plus1d": (f"{HERE}.thin", "thin_r2plus1d"),
}
"""By network: its module, which also defines CLIP, and the function there that takes `classes`.

Names only, so that a board without torch can import the table.
"""

CLIPS = {
    "r2plus1d_34": "CLIP_34",
    "i3d_r50": "I3D_CLIP",
    "slowonly_r50": "SLOW_CLIP",
    "c2d_r50": "SLOW_CLIP",
    "csn_50": "I3D_CLIP",
    "mobilenet_v2": "IMAGE_CLIP",
}
"""The name of a network's ClipSpec in its module, where it is not CLIP."""


def find_network(name: str) -> tuple[Callable[..., Any], ClipSpec]:
    """The function that builds a network, given its number of classes, and the clip it takes.

    `name` is one of `NETWORKS`, or MODULE:FUNCTION of a module with a ClipSpec named CLIP.

    Raises:
        ModelError: no network has that name.
    """
    own, _, function = name.partition(":")
    place = NETWORKS.get(name, (own, function))
    try:
        module = import_module(place[0])
        build, clip = getattr(module, place[1]), getattr(module, CLIPS.get(name, "CLIP"))
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(
            f"{name!r} is no network ({error}); use {', '.join(NETWORKS)}, "
            f"or MODULE:FUNCTION of a module with a ClipSpec named CLIP"
        ) from error
    return build, clip
