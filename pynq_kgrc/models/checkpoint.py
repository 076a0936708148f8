"""State dicts in local files: save one, or load one into a network, all of it or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pynq_kgrc.errors import ModelError
from pynq_kgrc.storage import written_beside

COUNTER = "num_batches_tracked"
"""Batch norm's count of batches: older files lack it, and inference does not read it."""


def load_state(module: nn.Module, path: str | Path) -> None:
    """Fill `module` with the state dict in a .safetensors, .pt or .pth file.

    Raises:
        ModelError: a file that cannot be read, is of another format, or does not fit: missing,
            extra and misshapen tensors are named. The module is then as it was.
    """
    path = Path(path)
    state = _read(path)
    own = module.state_dict()
    faults = {
        "missing": [k for k in own if k not in state and not k.endswith(COUNTER)],
        "extra": [k for k in state if k not in own],
        "of another shape": [
            f"{k} {list(state[k].shape)} instead of {list(own[k].shape)}"
            for k in own
            if k in state and state[k].shape != own[k].shape
        ],
    }
    told = [f"{len(names)} {what} ({_first(names)})" for what, names in faults.items() if names]
    if told:
        kind = type(module).__name__
        raise ModelError(f"{path} does not fit {kind}: tensors {', '.join(told)}")
    module.load_state_dict(state, strict=False)


def save_state(module: nn.Module, path: Path) -> None:
    """Write the state dict as a safetensors file, atomically."""
    state = {name: value.cpu().contiguous() for name, value in module.state_dict().items()}
    with written_beside(path) as beside:
        safetensors.torch.save_file(state, beside)


def _read(path: Path) -> dict[str, Tensor]:
    readers: dict[str, Callable[[Path], Any]] = {
        ".safetensors": safetensors.torch.load_file,
        ".pt": _unpickle,
        ".pth": _unpickle,
    }
    if path.suffix not in readers:
        raise ModelError(f"{path}: a checkpoint ends in {', '.join(readers)}, not {path.suffix!r}")
    try:
        state = readers[path.suffix](path)
    except Exception as error:  # each format raises different errors
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path} cannot be read as {path.suffix}: {first}") from error
    if not isinstance(state, dict):
        raise ModelError(f"{path} holds a {type(state).__name__}, not a state dict")
    strange = [k for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if strange:
        raise ModelError(
            f"{path} is not a state dict of names and tensors: {len(strange)} of its entries are "
            f"something else ({_first(strange)}); save module.state_dict() alone"
        )
    return state


def _unpickle(path: Path) -> Any:
    """Tensors and plain values only: torch refuses any other class."""
    return torch.load(path, map_location="cpu", weights_only=True)


def _first(names: list[Any]) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
