"""Networks in plain torch, their weights, and the trace of a torch module to a Graph."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from pynq_kgrc.errors import ModelError
from pynq_kgrc.graph import ClipSpec

NETWORKS = {
    "c3d": ("pynq_kgrc.models.c3d", "c3d"),
    "r2plus1d_18": ("pynq_kgrc.models.r2plus1d", "r2plus1d_18"),
    "thin_c3d": ("pynq_kgrc.models.thin", "thin_c3d"),
    "thin_r2plus1d": ("pynq_kgrc.models.thin", "thin_r2plus1d"),
    "i3d": ("pynq_kgrc.models.i3d", "i3d"),
}
"""By network: its module, which also defines CLIP, and the function there that takes `classes`.

Names only, so that a board without torch can import the table.
"""


def find_network(name: str) -> tuple[Callable[..., Any], ClipSpec]:
    """The function that builds a network, given its number of classes, and the clip it takes.

    `name` is one of `NETWORKS`, or MODULE:FUNCTION of a module with a ClipSpec named CLIP.

    Raises:
        ModelError: no network has that name.
    """
    place = NETWORKS.get(name) or tuple(name.split(":"))
    try:
        module = import_module(place[0])
        build, clip = getattr(module, place[1]), module.CLIP
    except (ImportError, AttributeError, IndexError, ValueError) as error:
        raise ModelError(
            f"{name!r} is no network ({error}); use {', '.join(NETWORKS)}, "
            f"or MODULE:FUNCTION of a module with a ClipSpec named CLIP"
        ) from error
    return build, clip
