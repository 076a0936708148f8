"""A file of weights that also says what is pruned and which classes it was trained on.

It is a safetensors file of the state dict. One entry of its metadata, a JSON document, holds the
rest; a file of another maker lacks it.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pynq_kgrc.compress.masks import Pruned, weights_of
from pynq_kgrc.errors import ModelError
from pynq_kgrc.files import written_beside

KEY = "pynq_kgrc"


class _Mask(msgspec.Struct, frozen=True):
    """The mask of one layer."""

    shape: tuple[int, ...]
    bits: str
    """Base64 of the deflated bits, eight to a byte (`numpy.packbits`); 1 is pruned."""


class _Document(msgspec.Struct, frozen=True):
    pruned: dict[str, _Mask]
    classes: tuple[str, ...] = ()


class Notes(msgspec.Struct, frozen=True):
    """What a file of weights says beside the state dict."""

    pruned: dict[str, Tensor] | None = None
    """As `masks.Pruned`; None if the file does not say what is pruned."""
    classes: tuple[str, ...] = ()
    """The names of the classes by number; empty if the file does not say."""


def save_weights(
    module: nn.Module, path: Path, pruned: Pruned, classes: Sequence[str] = ()
) -> None:
    """Write the state dict, the masks and the names of the classes, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    masks = {name: _Mask(tuple(places.shape), _packed(places)) for name, places in pruned.items()}
    document = msgspec.json.encode(_Document(masks, tuple(classes))).decode()
    state = {name: value.cpu().contiguous() for name, value in module.state_dict().items()}
    try:
        with written_beside(path) as beside:
            safetensors.torch.save_file(state, beside, {KEY: document})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error})") from error


def load_notes(path: str | Path) -> Notes:
    """What a file of weights says beside the state dict; nothing if it is of another maker.

    Raises:
        ModelError: the document is damaged.
    """
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return Notes()
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(KEY)
    except (OSError, SafetensorError):
        return Notes()  # whoever reads the tensors says what is wrong
    if text is None:
        return Notes()
    try:
        document = msgspec.json.decode(text, type=_Document)
        pruned = {name: _unpacked(mask) for name, mask in document.pruned.items()}
    except (msgspec.MsgspecError, binascii.Error, zlib.error, ValueError) as error:
        raise ModelError(f"{path}: what it says of pruning cannot be read ({error})") from error
    return Notes(pruned, document.classes)


def check_pruned(path: str | Path, pruned: Pruned, module: nn.Module) -> None:
    """Refuse masks that do not fit the weights that were read from the same file.

    Raises:
        ModelError: a mask of an unknown layer, of another shape, or of weights that are not zero.
    """
    own = weights_of(module)
    for name, places in pruned.items():
        weight = own.get(name)
        if weight is None or weight.shape != places.shape or bool(weight.cpu()[places].any()):
            raise ModelError(f"{path}: the mask of {name} does not fit the weights")


def _packed(places: Tensor) -> str:
    bits = np.packbits(places.cpu().numpy().ravel())
    return base64.b64encode(zlib.compress(bits.tobytes())).decode()


def _unpacked(mask: _Mask) -> Tensor:
    bits = np.frombuffer(zlib.decompress(base64.b64decode(mask.bits)), np.uint8)
    count = int(np.prod(mask.shape))
    flat = np.unpackbits(bits, count=count).astype(bool)
    return torch.from_numpy(flat.reshape(mask.shape))
