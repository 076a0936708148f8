"""Checkpoints in local files: save a state dict, or load one into a network, whole or not at all.

`load_state` reads what PyTorch users have: state dicts alone or inside a training checkpoint, with
a prefix that a wrapper put before every name, in half precision, or with the layer names of another
library. Names are never matched by order or by shape: either exactly one rule maps the file's names
one to one to the network's, or the file is refused.

A state dict says nothing about the input or the layout of its maps. Two files with equal names and
shapes cannot be told apart here, though one of them gives wrong answers:

- trained on B, G, R input or with another normalisation than the network's ClipSpec;
- C3D's `fc6` for maps flattened as D, H, W, C (Keras, TensorFlow) rather than C, D, H, W;
- kernels stored as D, H, W, I, O have other shapes and are refused, unless all sizes are equal.

Files converted from another framework need their converter's word on these.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from pynq_kgrc.errors import ModelError

COUNTER = "num_batches_tracked"
"""Batch norm's count of batches: older files lack it, and inference does not read it."""

AVERAGE_COUNTERS = ("n_averaged", "steps")
"""Update counts of averaged weights: of torch's AveragedModel and of mmengine's."""

TRAINED = ("state_dict", "model", "model_state", "model_state_dict", "module", "network", "net",
           "net_state_dict", "weights", "params")  # fmt: skip
"""Entries of a training checkpoint that hold the weights as the optimizer left them."""

AVERAGED = ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "model_ema_state_dict",
            "ema", "averaged_model", "average", "swa_state_dict", "swa_model")  # fmt: skip
"""Entries of a training checkpoint that hold a running average (EMA, SWA) of the weights."""

DEPTH = 3
"""Entries within entries that are searched for weights."""

NUMPY = (np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"))
"""What arrays of numbers are made of in a file, beside two functions of numpy (`_unpickle`)."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Rules = tuple[tuple[str, str], ...]
"""Pairs of a regular expression and its replacement; all are applied to a name, in order."""


def load_state(
    module: nn.Module,
    path: str | Path,
    *,
    entry: str | None = None,
    classifier: bool | None = True,
) -> str:
    """Fill `module` with the weights of a file, and say in one line what was taken.

    The content decides how the file is read, not its suffix: safetensors, or a file of torch.save
    that torch reads with ``weights_only=True``. Accepted are names that equal the module's after at
    most one common prefix (`module.`, `backbone.`, ...) is removed, and the names listed in the
    module's `OTHER_NAMES` (by library: `Rules`). Floats of 16 and 64 bits become the module's type,
    arrays of numpy become tensors, and what torch.nn.utils.prune stores as two tensors
    (`weight_orig`, `weight_mask`) becomes their product. See the module docstring for what a file
    does not tell.

    Args:
        module: is unchanged if an error is raised.
        path: the file.
        entry: which entry of a training checkpoint to take. Needed only if it holds more than one
            set of weights, as with a running average beside the trained ones.
        classifier: False leaves the module's last fully connected layer (or the layer that its
            attribute `CLASSIFIER` names) as it is, whatever the file holds for it. None does so
            only if the file's is for another number of classes.

    Returns:
        A summary such as "187 tensors from entry 'state_dict', prefix 'module.' removed,
        classifier 'fc' of 51 classes kept".

    Raises:
        ModelError: a file that cannot be read or is of another format; several sets of weights, or
            more than one way to match the names; names that do not match, with the prefix or entry
            that was found; tensors of another shape or type; values that are not finite.
    """
    path = Path(path)
    state, place = _weights(_with_tensors(_read(path)), path, entry)
    masks = _multiply_masks(state, path)
    head = _classifier(module)
    if classifier is False and head is None:
        raise ModelError(f"{type(module).__name__} has no classifier to leave out")
    own = module.state_dict()
    heads = {k for k in own if head and k.startswith(head + ".")}
    left_out = heads if classifier is False else set()
    match = _match(module, own, state, path, left_out, heads if classifier is None else set())
    if classifier is None and _misshapen(match, state, own, left_out):
        left_out = heads
    kept = {ours: theirs for theirs, ours in match.names.items() if ours not in left_out}
    loaded = {k: _converted(state[theirs], own[k], theirs, path) for k, theirs in kept.items()}
    module.load_state_dict(loaded, strict=False)
    told = [f"{len(loaded)} tensors" + (f" from entry {place!r}" if place else "")]
    told += [f"prefix {match.prefix!r} removed"] if match.prefix else []
    told += [f"names of {match.library} translated"] if match.library else []
    types = sorted(
        {str(state[t].dtype)[6:] for k, t in kept.items() if _narrowed(state[t], own[k])}
    )
    told += [f"{' and '.join(types)} converted"] if types else []
    told += [f"{masks} pruned by their masks"] if masks else []
    if head:
        theirs = {ours: t for t, ours in match.names.items()}.get(f"{head}.weight")
        classes = f" of {len(state[theirs])} classes" if theirs else ""
        told.append(f"classifier {head!r}{classes} {'left out' if left_out else 'kept'}")
    return ", ".join(told)


# --- the file -------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """What the file holds; its first bytes tell the format."""
    if path.is_dir():
        raise ModelError(f"{path} is a folder, not a checkpoint file")
    try:
        with path.open("rb") as file:
            start, size = file.read(512), path.stat().st_size
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if start[:2] == b"PK":
        _check_archive(path)
        return _unpickle(path)
    if start[:1] == b"\x80":  # a pickle of protocol 2 or later
        return _unpickle(path)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # a damaged header raises several kinds
            raise ModelError(f"{path} is no whole safetensors file: {_line(error)}") from error
    raise ModelError(
        f"{path} {_strange(start)}; a checkpoint is a file of torch.save or a safetensors file"
    )


def _strange(start: bytes) -> str:
    """What a file is that is no checkpoint, by its first bytes."""
    text = start.lstrip().lower()
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer without the weights (git lfs pull fetches them)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not the file behind it"
    if start.startswith(b"\x1f\x8b") or start[257:262] == b"ustar":
        return "is a packed archive; unpack it first"
    if start.startswith(b"\x89HDF"):
        return "is an HDF5 file"
    return f"is of an unknown format or cut short: it begins with the bytes {start[:8].hex(' ')}"


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that torch.save did not write, or that is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            members = {name.partition("/")[2] for name in names}
            whole = "data.pkl" in members and "constants.pkl" not in members
            damaged = archive.testzip() if whole else None  # torch.load checks no checksums
    except Exception as error:  # zip and its decompressors raise different errors
        raise ModelError(f"{path} is a zip archive cut short or damaged: {_line(error)}") from error
    if "constants.pkl" in members:
        raise ModelError(
            f"{path} is a TorchScript archive, which holds code; "
            f"save the state dict of the module: torch.save(module.state_dict(), PATH)"
        )
    if "data.pkl" not in members:
        raise ModelError(
            f"{path} is a zip archive of another kind (it holds {_first(names) or 'nothing'}), "
            f"not a file of torch.save"
        )
    if damaged:
        raise ModelError(f"{path} is damaged: the checksum of its part {damaged} is wrong")


def _unpickle(path: Path) -> Any:
    """Tensors and plain values only: torch refuses any other class.

    argparse.Namespace, which torchvision's training scripts save, only holds plain values; arrays
    and numbers of numpy hold no code either.
    """
    known: list[Any] = [argparse.Namespace, *NUMPY]
    functions: tuple[Any, Any] = (np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0])
    for function in functions:
        # numpy 2 moved numpy.core to numpy._core; a file has the name of its writer's version
        known += [
            (function, f"numpy.{core}.multiarray.{function.__name__}") for core in ("core", "_core")
        ]
    try:
        # an open file: given a path, torch reads one that ends in .safetensors by its suffix
        with torch.serialization.safe_globals(known), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zip and pickle raise different errors
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise ModelError(
                f"{path} holds an object of {found[1]}; only tensors and plain values "
                f"are read. Save the state dict alone: torch.save(module.state_dict(), PATH)"
            ) from error
        reason = "" if "weights_only" in str(error) else f": {_line(error)}"
        raise ModelError(
            f"{path} is not a whole file of torch.save with tensors and plain values{reason}"
        ) from error


def _line(error: Exception) -> str:
    """The first line of an error, without a terminal's escape codes."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\x1b\[[0-9;]*m|[\x00-\x1f]", "", first)


# --- the entry with the weights -------------------------------------------------------------------


def _with_tensors(content: Any, depth: int = DEPTH) -> Any:
    """The content of a file with tensors for its arrays of numbers."""
    if isinstance(content, np.ndarray) and content.dtype.kind in "fiub":
        # a copy: arrays of a file may have another byte order, or be read-only
        return torch.from_numpy(content.astype(content.dtype.newbyteorder("="), copy=True))
    if isinstance(content, Mapping) and depth >= 0:
        return {key: _with_tensors(value, depth - 1) for key, value in content.items()}
    return content


def _weights(content: Any, path: Path, entry: str | None) -> tuple[dict[str, Tensor], str]:
    """The one state dict in a file, and the entry that holds it ("" if it is the whole file)."""
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a state dict")
    if entry is not None and not isinstance(content.get(entry), Mapping):
        raise ModelError(f"{path} has no entry {entry!r} of weights; it has {_first([*content])}")
    held = _entries(content) if entry is None else [entry]
    if not held and any(isinstance(value, Tensor) for value in content.values()):
        return _only_tensors(content, path, ""), ""
    place = ""
    for _ in range(DEPTH):
        if len(held) != 1:
            break
        place += f".{held[0]}" if place else held[0]
        content = content[held[0]]
        held = _entries(content)
        if not held:
            return _only_tensors(content, path, place), place
    if len(held) > 1:
        raise ModelError(
            f"{path} holds more than one set of weights: entries "
            f"{' and '.join(map(repr, held))}, which may differ; choose one with --entry "
            f"(load_state's `entry`), or save it alone"
        )
    if not content:
        raise ModelError(f"{path} holds no tensors")
    raise ModelError(
        f"{path} is not a state dict of names and tensors, and none of its entries "
        f"({_first([*content])}) is known to hold one; known are "
        f"{', '.join(TRAINED + AVERAGED)}. Save module.state_dict() alone"
    )


def _entries(content: Mapping[Any, Any], depth: int = DEPTH) -> list[str]:
    """The known entries that hold tensors, themselves or in a known entry of theirs."""
    return [
        key
        for key in TRAINED + AVERAGED
        if isinstance(inner := content.get(key), Mapping)
        and (
            any(isinstance(value, Tensor) for value in inner.values())
            or (depth > 1 and _entries(inner, depth - 1))
        )
    ]


def _only_tensors(content: Mapping[Any, Any], path: Path, place: str) -> dict[str, Tensor]:
    strange = [k for k, v in content.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if strange:
        where = f"entry {place!r} of {path}" if place else str(path)
        raise ModelError(
            f"{where} is not a state dict of names and tensors: {len(strange)} of its entries are "
            f"something else ({_first(strange)}); save module.state_dict() alone"
        )
    for name, value in content.items():
        odd = (value.is_nested and "nested") or (value.is_quantized and "quantized")
        odd = odd or (value.layout is not torch.strided and "sparse")
        odd = odd or (value.device.type == "meta" and "empty (meta)")
        if odd:
            raise ModelError(
                f"{path}: {_first([name])} is a {odd} tensor; dense ones with values are accepted"
            )
    if not content:
        raise ModelError(f"entry {place!r} of {path} holds no tensors")
    return dict(content)


def _multiply_masks(state: dict[str, Tensor], path: Path) -> int:
    """Replace each NAME_orig and NAME_mask (torch.nn.utils.prune) by their product; their number.

    Raises:
        ModelError: a mask that is not of zeros and ones, or has another shape than its tensor.
    """
    pairs = [
        name
        for name in (key.removesuffix("_mask") for key in state if key.endswith("_mask"))
        if f"{name}_orig" in state and name not in state
    ]
    for name in pairs:
        values, mask = state.pop(f"{name}_orig"), state.pop(f"{name}_mask")
        if mask.shape != values.shape or not bool(((mask == 0) | (mask == 1)).all()):
            raise ModelError(
                f"{path}: {_first([name])}_mask is no mask of {_first([name])}_orig: accepted are "
                f"zeros and ones of the shape {list(values.shape)}"
            )
        state[name] = values * mask.to(values.dtype)
    return len(pairs)


# --- the names ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Match:
    """One way to read a file's names."""

    prefix: str
    library: str
    names: dict[str, str]
    """By name in the file: the module's name."""
    missing: list[str]
    extra: list[str]
    doubled: list[str]
    """Names in the file that map to a name that another one maps to."""

    @property
    def fits(self) -> bool:
        return not (self.missing or self.extra or self.doubled)

    @property
    def way(self) -> str:
        """What was done to the names, for messages."""
        done = [f"prefix {self.prefix!r} removed"] if self.prefix else []
        done += [f"read as names of {self.library}"] if self.library else []
        return " and ".join(done)


def _match(
    module: nn.Module,
    own: dict[str, Tensor],
    state: dict[str, Tensor],
    path: Path,
    left_out: set[str],
    may_differ: set[str],
) -> _Match:
    """The one way to map the file's names one to one to the module's.

    Tensors of `left_out` may be missing; those of `may_differ` may have another shape.

    Raises:
        ModelError: none or several fit.
    """
    kind = type(module).__name__
    wanted = [k for k in own if not k.endswith(COUNTER) and k not in left_out]
    tables: dict[str, Rules] = {"": (), **getattr(module, "OTHER_NAMES", {})}
    tried = [
        _attempt(prefix, library, rules, own, wanted, state)
        for library, rules in tables.items()
        for prefix in _prefixes(state, len(wanted))
    ]
    fitting = {tuple(m.names.items()): m for m in reversed(tried) if m.fits}
    if len(fitting) == 1:
        match = next(iter(fitting.values()))
        wrong = _misshapen(match, state, own, left_out | may_differ)
        if not wrong:
            return match
        raise ModelError(
            f"{path} does not fit {kind}: tensors {len(wanted) - len(wrong)} fit, "
            f"{len(wrong)} of another shape ({_first(wrong)}){_after(match)}"
            f"{_class_hint(module, match, state, own)}"
        )
    if fitting:
        ways = "; ".join(m.way or "names as they are" for m in fitting.values())
        raise ModelError(f"{path} fits {kind} in more than one way ({ways}): it is ambiguous")
    whole = [m for m in tried if not (m.missing or m.doubled)]
    prefixes = list(dict.fromkeys(m.prefix for m in whole))
    if len(prefixes) > 1:
        raise ModelError(
            f"{path} holds more than one set of weights for {kind}: the prefixes "
            f"{' and '.join(map(repr, prefixes))} both fit; save one of them alone"
        )
    best = max(tried, key=lambda m: (len(set(m.names.values())), -len(m.prefix)))
    wrong = _misshapen(best, state, own, left_out)
    faults = {
        "missing": best.missing,
        "extra": best.extra,
        "with the name of another": best.doubled,
        "of another shape": wrong,
    }
    told = [f"{len(names)} {what} ({_first(names)})" for what, names in faults.items() if names]
    common = _common_prefix(state)
    found = f"; all names begin with the prefix {common!r}" if common and not best.prefix else ""
    others = [library for library in tables if library]
    accepted = f", or the names of {' or '.join(others)}" if others else ""
    raise ModelError(
        f"{path} does not fit {kind}: tensors {', '.join(told)}{_after(best)}{found}. Accepted: "
        f"{kind}'s own names, at most with one prefix before all of them{accepted}"
    )


def _misshapen(
    match: _Match, state: dict[str, Tensor], own: dict[str, Tensor], left_out: set[str]
) -> list[str]:
    return [
        f"{_first([theirs])} {list(state[theirs].shape)} instead of {list(own[ours].shape)}"
        for theirs, ours in match.names.items()
        if ours not in left_out and state[theirs].shape != own[ours].shape
    ]


def _attempt(
    prefix: str,
    library: str,
    rules: Rules,
    own: dict[str, Tensor],
    wanted: list[str],
    state: dict[str, Tensor],
) -> _Match:
    names: dict[str, str] = {}
    extra, doubled = [], []
    taken: set[str] = set()
    for theirs, value in state.items():
        if theirs.rpartition(".")[2] in AVERAGE_COUNTERS and value.ndim == 0 and theirs not in own:
            continue
        ours = theirs.removeprefix(prefix)
        for pattern, replacement in rules:
            ours = re.sub(pattern, replacement, ours)
        if not theirs.startswith(prefix) or ours not in own:
            extra.append(theirs)
        elif ours in taken:
            doubled.append(theirs)
        else:
            names[theirs] = ours
            taken.add(ours)
    missing = [k for k in wanted if k not in taken]
    return _Match(prefix, library, names, missing, extra, doubled)


def _prefixes(state: dict[str, Tensor], wanted: int) -> list[str]:
    """Prefixes, each up to a dot, of enough names to be one network's; the empty one is first."""
    counts = Counter(name[: dot.end()] for name in state for dot in re.finditer(r"\.", name))
    return ["", *(p for p, count in counts.items() if 2 * count >= wanted)]


def _common_prefix(state: dict[str, Tensor]) -> str:
    names = [k for k in state if k not in AVERAGE_COUNTERS]
    first = names[0] if names else ""
    dots = [first[: dot.end()] for dot in re.finditer(r"\.", first)]
    return next((p for p in reversed(dots) if all(k.startswith(p) for k in names)), "")


def _after(match: _Match) -> str:
    return f"; with {match.way}" if match.way else ""


def _class_hint(
    module: nn.Module, match: _Match, state: dict[str, Tensor], own: dict[str, Tensor]
) -> str:
    """Advice if the number of classes is all that differs."""
    head = _classifier(module)
    if head is None:
        return ""
    differing = {o for t, o in match.names.items() if state[t].shape != own[o].shape}
    weight = next((t for t, o in match.names.items() if o == f"{head}.weight"), None)
    if weight is None or any(not k.startswith(head + ".") for k in differing):
        return ""
    if state[weight].shape[1:] != own[f"{head}.weight"].shape[1:]:
        return ""
    return (
        f". The file is for {len(state[weight])} classes, the network for "
        f"{len(own[f'{head}.weight'])}: build it for as many, or leave the classifier out "
        f"(--partial of compile and train, load_state's `classifier`)"
    )


def _classifier(module: nn.Module) -> str | None:
    """The name of the layer whose outputs are the classes."""
    named = getattr(module, "CLASSIFIER", None)
    if named is not None:
        return str(named)
    last = None
    for name, child in module.named_modules():
        if any(True for _ in child.parameters(recurse=False)):
            last = name if name and isinstance(child, nn.Linear) else None
    return last


# --- the values -----------------------------------------------------------------------------------


def _converted(value: Tensor, own: Tensor, name: str, path: Path) -> Tensor:
    """A tensor of the file in the module's type.

    Raises:
        ModelError: it has another kind of numbers, or values that no weight can have.
    """
    name = _first([name])
    if name.endswith(COUNTER) and value.dtype in FLOATS:  # a whole state dict was converted
        value = value.double().nan_to_num().round().long()
    if not own.is_floating_point():
        plain = value.dtype == own.dtype or not (
            value.is_floating_point()
            or value.is_complex()
            or torch.bool in (value.dtype, own.dtype)
        )
        if not plain:
            raise ModelError(f"{path}: {name} is of {value.dtype} instead of {own.dtype}")
        return value.detach()
    if value.dtype not in FLOATS:
        raise ModelError(
            f"{path}: {name} is of {value.dtype}; accepted are {', '.join(map(str, FLOATS))}"
        )
    real = value.detach().to(own.dtype)
    if not torch.isfinite(real).all():
        count = int((~torch.isfinite(real)).sum())
        raise ModelError(
            f"{path}: {name} has {count} of {real.numel()} values that are NaN or infinite"
            + ("" if count == int((~torch.isfinite(value)).sum()) else f" as {own.dtype}")
        )
    if name.endswith("running_var") and bool((real < 0).any()):
        raise ModelError(f"{path}: {name} has the negative variance {float(real.min()):.3g}")
    return real


def _narrowed(value: Tensor, own: Tensor) -> bool:
    """Whether a float tensor changes its type."""
    return own.is_floating_point() and value.dtype != own.dtype


def _first(names: list[Any]) -> str:
    shown = [str(n) if str(n).isprintable() else repr(n) for n in names[:3]]
    return ", ".join(shown) + (", ..." if len(names) > 3 else "")
