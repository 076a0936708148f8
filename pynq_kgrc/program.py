"""A compiled network: the tasks of the accelerator, their compact weights, and the container.

The compiler makes a `Program`, and every backend runs it. Its file is a safetensors container
(docs/format.md): arrays, and one JSON document in the metadata.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.header import FIELDS, MAX_TAPS
from pynq_kgrc.accelerator.plan import ITEM_BITS
from pynq_kgrc.accelerator.tiling import (
    NO_POOL,
    Work,
    convolution_work,
    map_beats,
    pool_work,
    weight_bytes,
)
from pynq_kgrc.errors import CompileError, ConfigError, ProgramError
from pynq_kgrc.files import shipped_programs, user_cache, written_beside
from pynq_kgrc.graph import ClipSpec, ConvShape, Size, WindowShape, taps_as_channels
from pynq_kgrc.groups import join
from pynq_kgrc.quant import (
    ACCUMULATOR_BITS,
    BITS,
    MAX_SHIFT,
    MULT_BITS,
    POWER_BITS,
    Array,
    QuantParams,
    are_powers,
    ceil_div,
    code_dtype,
    pack_int4,
    pack_powers,
    unpack_int4,
    unpack_powers,
    weight_limit,
)

VERSION = 4
"""Version of the container that this module writes. The hardware does not depend on it: what that
reads has a version of its own, `accelerator.header.IMAGE_VERSION`."""

OF_POWERS = 5
"""Version of a container whose weights are all 0 or powers of two: they take 3 bits each at a width
of 4, and 4 bits at 8. Otherwise it is as version 4."""

READABLE = (1, 2, 3, VERSION, OF_POWERS)
"""Versions that `load` reads. Version 1 does not say how a video is sampled and how confidences are
calibrated: such a program has the defaults of `ClipSpec`. Neither 1 nor 2 folds its clip. Before
version 4, the file has the values of groups that are off as well."""

DOCUMENT_KEY = "pynq_kgrc"
DIGEST_KEY = "sha256"
ALIGNMENT = 64

MAX_LENGTH, MAX_STRIDE = (1 << 16) - 1, (1 << 10) - 1
"""Largest coordinate within a region and largest divisor of one: `quotient` of hls_src/design.h."""

MAX_WEIGHT_BYTES = 1 << 32
"""Most bytes that the weights of a program take in the host's memory, groups that are off
included: a small file with few groups may not fill it."""

MAX_INT32 = (1 << 31) - 1
"""Largest number in a field of a descriptor, and largest count of a loop in hls_src."""


class KgrcWeights(msgspec.Struct, frozen=True, eq=False, forbid_unknown_fields=True):
    """The kept weights of a layer, in the format of the KGRC paper.

    P, Q, T are the numbers of groups of filters, channels and taps. kr, kc are the numbers of rows
    and columns that every kernel group of the layer keeps (balanced sparsity). Indices are
    relative to their group and increase.
    """

    values: Array
    """[P, Q, T, kr, G_N, kc] codes."""
    rows: Array
    """[P, Q, kr] uint8: indices of the kept rows (filters of the group)."""
    cols: Array
    """[P, Q, T, kc] uint8: indices of the kept columns (taps of the group)."""
    enabled: Array
    """[P, Q] bool: a disabled group is neither loaded nor computed."""

    @property
    def kept(self) -> tuple[int, int]:
        """kr, kc: kept rows and columns of each group."""
        return int(self.values.shape[3]), int(self.values.shape[5])

    def mode(self, gm: int, gk: int) -> str:
        """dense, KGR, KGC or KGRC: by the axes that are pruned, rows (R) and columns (C)."""
        kr, kc = self.kept
        return {(0, 0): "dense", (1, 0): "KGR", (0, 1): "KGC", (1, 1): "KGRC"}[kr < gm, kc < gk]

    def expand(self, shape: ConvShape, gm: int, gk: int) -> Array:
        """Unpack to the dense weight [M, N, K], with zeros where it is pruned."""
        p, q, t, kr, gn, kc = self.values.shape
        groups = np.zeros((p, q, t, gm, gn, gk), self.values.dtype)
        values = np.where(self.enabled[:, :, None, None, None, None], self.values, 0)
        if (kr, kc) == (gm, gk):
            groups[...] = values
        else:
            at_p, at_q, at_t, _, at_n, _ = np.ogrid[:p, :q, :t, :1, :gn, :1]
            rows = self.rows[:, :, None, :, None, None]
            cols = self.cols[:, :, :, None, None, :]
            groups[at_p, at_q, at_t, rows, at_n, cols] = values
        return join(groups, shape.filters, shape.channels, shape.taps)


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a tensor lies: in a buffer, from a channel on. So a concat needs no copy."""

    buffer: int
    channel: int


class Buffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A map in the arena of activations. Buffers that are never alive together may overlap."""

    channels: int
    size: Size
    bits: int
    offset: int
    """Bytes from the start of the arena, a multiple of 64."""

    def nbytes(self, config: AcceleratorConfig) -> int:
        """Bytes of the map in memory: channels padded to vectors of T_N, rows to whole beats."""
        wide = self.bits // config.bits
        return map_beats(config, self.channels, self.size) * config.beat_bytes * wide


class Shortcut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor r that is added before the clamp: ``rshift((r - zero_point) * mult, shift)``."""

    source: Slot
    zero_point: int
    mult: int
    shift: int


class ConvTask(msgspec.Struct, frozen=True, eq=False, tag="conv", forbid_unknown_fields=True):
    """One convolution with what is fused into it: bias, scaling, shortcut, clamp, max pool."""

    name: str
    shape: ConvShape
    source: Slot
    target: Slot
    in_zero: int
    """Zero point of the input, which is also the code of its padding."""
    out: QuantParams
    lo: int
    hi: int
    """Clamp of the output codes, from `lo` to `hi`: the type and the activation."""
    weights: KgrcWeights
    bias: Array
    """[M] int64."""
    mult: Array
    """[M] int32, in [2^14, 2^15) or 0."""
    shift: Array
    """[M] uint8, 0..62."""
    shortcut: Shortcut | None = None
    pool: WindowShape | None = None
    """A max pool with windows that do not overlap, applied to the clamped output."""

    @property
    def out_size(self) -> Size:
        return self.shape.out_size if self.pool is None else self.pool.out_size

    @property
    def kept_macs(self) -> int:
        """Multiply-accumulates whose weight is not zero, for one clip; at most `own_macs`."""
        return int(np.count_nonzero(self.weights.values)) * math.prod(self.shape.out_size)


class PoolTask(msgspec.Struct, frozen=True, eq=False, tag="pool", forbid_unknown_fields=True):
    """A max or average pool that is not fused: windows may overlap and be padded."""

    name: str
    shape: WindowShape
    average: bool
    source: Slot
    target: Slot
    in_zero: int
    out: QuantParams
    lo: int
    hi: int
    mult: int
    shift: int

    @property
    def out_size(self) -> Size:
        return self.shape.out_size


Task = ConvTask | PoolTask


class Program(msgspec.Struct, frozen=True, eq=False, forbid_unknown_fields=True, dict=True):
    """A network compiled for one accelerator."""

    name: str
    config: AcceleratorConfig
    clip: ClipSpec
    labels: tuple[str, ...]
    input: QuantParams
    source: Slot
    """Where the clip is written."""
    target: Slot
    """Where the result is read."""
    output: QuantParams
    buffers: tuple[Buffer, ...]
    arena_bytes: int
    tasks: tuple[Task, ...]
    fold: WindowShape | None = None
    """The window over the clip whose taps are written as channels, for a first convolution that is
    folded (`compiler.fold`); None if the clip is written as it is."""
    softmax: bool = False
    """Whether the network ended with a soft-max, which was left out: the result holds its logits,
    and the runtime applies soft-max to them once, as it does for every program."""
    format: str = DOCUMENT_KEY
    version: int = VERSION
    """Version of the file that it was read from."""

    @cached_property
    def input_codes(self) -> Array:
        """[C, 256]: the input code of each level of each channel. Encoding needs no float clip."""
        return self.input.quantize(self.clip.pixel_values())

    @property
    def clip_window(self) -> WindowShape:
        """The window over the clip whose taps are written to `source`; one tap if not folded."""
        size = (self.clip.frames, self.clip.height, self.clip.width)
        return self.fold or WindowShape(self.clip.channels, size, (1, 1, 1))

    def encode_clip(self, frames: Array) -> Array:
        """Encode uint8 frames [D, H, W, N] as the input codes [C, D', H', W'] of `source`.

        N are the clip's channels, such as the three of RGB. C is N and the size is that of the
        clip. If the clip is folded, C is N * taps of the window, [tap, channel], and the size is
        that of the window's output; padding has the code of the zero point.

        Raises:
            ProgramError: frames of another shape or type than the program's clip.
        """
        wanted = (self.clip.frames, self.clip.height, self.clip.width, self.clip.channels)
        if frames.shape != wanted or frames.dtype != np.uint8:
            raise ProgramError(
                f"{self.name} takes uint8 frames of shape {wanted}, "
                f"not {frames.dtype} of {frames.shape}"
            )
        if self.fold is None:
            codes = np.empty((wanted[3], *wanted[:3]), self.input.dtype)
            self._look_up(frames, codes)
            return codes
        before, after = self.fold.pad_before, self.fold.pad_after
        size = [sum(lengths) for lengths in zip(before, wanted, after, strict=False)]
        padded = np.full((*size, wanted[3]), self.input.zero_point, self.input.dtype)
        d, h, w = (slice(b, b + n) for b, n in zip(before, wanted, strict=False))
        self._look_up(frames, padded[d, h, w].transpose(3, 0, 1, 2))
        return taps_as_channels(padded, self.fold)

    def _look_up(self, frames: Array, codes: Array) -> None:
        """Write the codes of frames [D, H, W, N] to `codes` [N, D, H, W].

        A plane at a time, whose indices fit the cache. With a mode, `take` checks no index; a level
        of 8 bits is always one of the 256.
        """
        for number, frame in enumerate(frames):
            for channel, table in enumerate(self.input_codes):
                codes[channel, number] = table.take(frame[..., channel], mode="clip")

    def group_columns(self, task: ConvTask) -> int:
        """G_K: taps in one kernel group of a task."""
        return self.config.group_size.columns(task.shape.taps)

    def weight_bytes(self, task: ConvTask) -> int:
        """Bytes of a task's compact weights in memory, with indices and enable bits."""
        kr, kc = task.weights.kept
        enabled = int(np.count_nonzero(task.weights.enabled))
        return weight_bytes(self.config, task.shape, kr, kc, enabled)

    @cached_property
    def _works(self) -> dict[Task, Work]:
        return {}

    def work(self, task: Task) -> Work:
        """The tile and the plan of one of the program's tasks, computed once for each task.

        Raises:
            CompileError: the buffers do not hold the smallest tile.
        """
        if task not in self._works:
            self._works[task] = self._plan(task)
        return self._works[task]

    def _plan(self, task: Task) -> Work:
        """The tile and the plan of a task.

        Raises:
            CompileError: the buffers do not hold the smallest tile.
        """
        wide = task.out.bits > self.config.bits
        if not isinstance(task, ConvTask):
            return pool_work(self.config, task.shape, wide=wide, name=task.name)
        return convolution_work(
            self.config,
            task.shape,
            *task.weights.kept,
            task.weights.enabled,
            NO_POOL if task.pool is None else task.pool.kernel,
            shortcut=task.shortcut is not None,
            wide=wide,
            name=task.name,
        )

    def array_macs(self, task: ConvTask) -> int:
        """Multiply-accumulates that the array computes for one clip, zeros included."""
        work, config = self.work(task), self.config
        chunk = config.rows_per_cycle * config.pk * config.tn
        return work.chunks * chunk * math.prod(work.out_size)

    def save(self, path: str | Path) -> None:
        """Write the container atomically: to a temporary file that is renamed to `path`.

        The same program gives the same bytes, in every process. Of whatever version the file was
        that it was read from, version `VERSION` is written, or `OF_POWERS` if all weights are 0 or
        powers of two.
        """
        tensors = self._tensors()
        names = {id(array): name for name, array in tensors.items()}
        powers = all(
            are_powers(task.weights.values, self.config.bits)
            for task in self.tasks
            if isinstance(task, ConvTask)
        )
        version = OF_POWERS if powers else VERSION
        written = msgspec.structs.replace(self, version=version)
        document = msgspec.json.encode(written, enc_hook=lambda array: names[id(array)])
        kept = self._on(tensors)
        stored = {name: self._store(array, powers) for name, array in kept.items()}
        metadata = {
            DOCUMENT_KEY: document.decode(),
            DIGEST_KEY: _digest(document, stored),
        }
        payload = _sorted_metadata(to_safetensors(stored, metadata))
        with written_beside(Path(path)) as beside:
            beside.write_bytes(payload)

    def _tensors(self) -> dict[str, Array]:
        tensors: dict[str, Array] = {}
        for task in self.tasks:
            if isinstance(task, ConvTask):
                for part in ("values", "rows", "cols", "enabled"):
                    tensors[f"{task.name}/{part}"] = getattr(task.weights, part)
                for part in ("bias", "mult", "shift"):
                    tensors[f"{task.name}/{part}"] = getattr(task, part)
        return tensors

    def _on(self, tensors: dict[str, Array]) -> dict[str, Array]:
        """The arrays without the values, rows and columns of groups that are off."""
        kept = dict(tensors)
        for task in self.tasks:
            if isinstance(task, ConvTask):
                for part in ("values", "rows", "cols"):
                    name = f"{task.name}/{part}"
                    kept[name] = tensors[name][task.weights.enabled]
        return kept

    def _store(self, array: Array, powers: bool) -> Array:
        """An array as it is stored: powers of two and 4-bit codes are packed."""
        if powers and array.dtype == np.int8:
            return pack_powers(array, self.config.bits)
        if self.config.bits == 4 and array.dtype == np.int8:
            return pack_int4(array)
        return np.ascontiguousarray(array)


def _sorted_metadata(payload: bytes) -> bytes:
    """A safetensors file with its metadata in order; safetensors writes them in a random order.

    Format: 8 bytes, the length of the header; the header, JSON; the tensors.
    """
    end = 8 + int.from_bytes(payload[:8], "little")
    header = msgspec.json.decode(payload[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + payload[end:]


def cached_program(name: str) -> Path:
    """The path of a program of that name in the user's cache; the file need not exist."""
    return user_cache() / "programs" / f"{name}.kgrc"


def named_programs() -> dict[str, Path]:
    """The programs that come with this package, by name."""
    return {path.stem: path for path in shipped_programs()}


def load(path: str | Path) -> Program:
    """Read and check a container.

    Raises:
        ProgramError: there is no such file; it is no container, damaged or of another version;
            or its contents do not fit together (`check`).
    """
    path = Path(path)
    if not path.is_file():
        raise ProgramError(f"{path}: there is no such program file")
    try:
        with safe_open(path, framework="numpy") as container:
            metadata = container.metadata() or {}
            document = metadata.get(DOCUMENT_KEY, "").encode()
            if not document:
                raise ProgramError(
                    f"{path}: a safetensors file, but no program (no {DOCUMENT_KEY!r} metadata)"
                )
            _check_version(path, document)
            stored = {name: container.get_tensor(name) for name in container.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise ProgramError(f"{path}: not a whole program file ({error})") from error
    if _digest(document, stored) != metadata.get(DIGEST_KEY):
        raise ProgramError(
            f"{path}: damaged, its contents do not match its SHA-256; compile or copy it again"
        )
    try:
        program = _decode(document, stored)
        check(program)
    except (msgspec.MsgspecError, ConfigError, KeyError) as error:
        raise ProgramError(f"{path}: {error}") from error
    except ProgramError as error:
        raise ProgramError(f"{path}: {error}") from None
    return program


class _Header(msgspec.Struct):
    format: str
    version: int


def _check_version(path: Path, document: bytes) -> None:
    try:
        header = msgspec.json.decode(document, type=_Header)
    except msgspec.MsgspecError as error:
        raise ProgramError(f"{path}: its document cannot be read ({error})") from error
    if header.format != DOCUMENT_KEY or header.version not in READABLE:
        raise ProgramError(
            f"{path}: format {header.format!r} version {header.version}; this release reads "
            f"{DOCUMENT_KEY!r} of the versions {', '.join(map(str, READABLE))}: compile the "
            f"network again, or use a newer release"
        )


def _digest(document: bytes, tensors: dict[str, Array]) -> str:
    """SHA-256 over the document and, in order of their names, every array with type and shape."""
    state = hashlib.sha256(document)
    for name in sorted(tensors):
        array = tensors[name]
        state.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        state.update(np.ascontiguousarray(array).data if array.size else b"")
    return state.hexdigest()


def _decode(document: bytes, stored: dict[str, Array]) -> Program:
    def tensor(kind: type, name: Any) -> Array:
        if not isinstance(name, str) or name not in stored:
            raise ProgramError(f"its document names an array {name!r} that is not in the file")
        return stored[name]

    program = msgspec.json.decode(document, type=Program, dec_hook=tensor)
    tasks: list[Task] = []
    nbytes = 0
    for task in program.tasks:
        if isinstance(task, ConvTask):
            _check_window(task.shape, task.name)
            _within(task.shape.taps, 1, MAX_TAPS, f"{task.name}: taps of its window")
            if program.config.bits == 4 or program.version == OF_POWERS:
                task = _unpacked(program, task)
            if program.version >= 4:
                task, more = _with_groups_that_are_off(program, task, MAX_WEIGHT_BYTES - nbytes)
                nbytes += more
        tasks.append(task)
    return msgspec.structs.replace(program, tasks=tuple(tasks))


def _groups(program: Program, task: ConvTask) -> tuple[int, int, int]:
    """P, Q, T of a task."""
    shape = task.shape
    return program.config.group_size.counts(shape.filters, shape.channels, shape.taps)


def _unpacked(program: Program, task: ConvTask) -> ConvTask:
    """The task with its packed values unpacked to one per byte."""
    weights = task.weights
    p, q, t = _groups(program, task)
    kr, kc = weights.rows.shape[-1], weights.cols.shape[-1]
    groups = (int(np.count_nonzero(weights.enabled)),) if program.version >= 4 else (p, q)
    wanted = (*groups, t, kr, program.config.tn, kc)
    count = math.prod(wanted)
    bits, powers = program.config.bits, program.version == OF_POWERS
    if powers and bits not in POWER_BITS:
        raise ProgramError(f"bits={bits}; version {OF_POWERS} is for designs of 8 or 4 bits")
    each = POWER_BITS[bits] if powers else 4
    if weights.values.dtype != np.uint8 or weights.values.shape != (ceil_div(count * each, 8),):
        kind = "powers of two" if powers else "codes"
        raise ProgramError(f"{task.name}: values are not {count} packed {each}-bit {kind}")
    values = (
        unpack_powers(weights.values, count, bits) if powers else unpack_int4(weights.values, count)
    )
    unpacked = msgspec.structs.replace(weights, values=values.reshape(wanted))
    return msgspec.structs.replace(task, weights=unpacked)


def _with_groups_that_are_off(program: Program, task: ConvTask, limit: int) -> tuple[ConvTask, int]:
    """The task with zeros for the groups that the file leaves out, and the bytes of its values.

    Raises:
        ProgramError: the arrays do not fit together, or take more than `limit` bytes.
    """
    weights, name = task.weights, task.name
    (p, q, t), tn = _groups(program, task), program.config.tn
    _expect(weights.enabled.shape, (p, q), f"{name}: shape of enabled")
    _expect(weights.enabled.dtype, np.dtype(np.bool_), f"{name}: type of enabled")
    on = int(np.count_nonzero(weights.enabled))
    kr, kc = (int(part.shape[-1]) if part.ndim else 0 for part in (weights.rows, weights.cols))
    wanted = {"values": (on, t, kr, tn, kc), "rows": (on, kr), "cols": (on, t, kc)}
    for part, shape in wanted.items():
        _expect(getattr(weights, part).shape, shape, f"{name}: shape of {part}")
    _within(kr, 1, program.config.gm, f"{name}: kept rows")
    _within(kc, 1, program.group_columns(task), f"{name}: kept columns")
    nbytes = p * q * t * kr * tn * kc * weights.values.itemsize
    _within(nbytes, 0, limit, f"{name}: bytes of its weights with all groups")
    if on == p * q:
        whole = {part: getattr(weights, part).reshape(p, q, *s[1:]) for part, s in wanted.items()}
        return msgspec.structs.replace(
            task, weights=KgrcWeights(**whole, enabled=weights.enabled)
        ), nbytes
    values = np.zeros((p, q, t, kr, tn, kc), weights.values.dtype)
    rows = np.broadcast_to(np.arange(kr, dtype=weights.rows.dtype), (p, q, kr)).copy()
    cols = np.broadcast_to(np.arange(kc, dtype=weights.cols.dtype), (p, q, t, kc)).copy()
    for whole_array, array in (
        (values, weights.values),
        (rows, weights.rows),
        (cols, weights.cols),
    ):
        whole_array[weights.enabled] = array
    expanded = KgrcWeights(values=values, rows=rows, cols=cols, enabled=weights.enabled)
    return msgspec.structs.replace(task, weights=expanded), nbytes


T = TypeVar("T")


def _expect(found: T, wanted: T, what: str) -> None:
    if found != wanted:
        raise ProgramError(f"{what} is {found}, expected {wanted}")


def _within(found: int, low: int, high: int, what: str) -> None:
    if not low <= found <= high:
        raise ProgramError(f"{what} is {found}, accepted are {low} to {high}")


def check(program: Program) -> None:
    """Refuse a program that could access memory outside its buffers, or overflow.

    Raises:
        ProgramError: names the task and field, the value, and what is accepted.
    """
    if not program.tasks:
        raise ProgramError("the program has no task")
    for i, buffer in enumerate(program.buffers):
        _check_buffer(program, i, buffer)
    seen: set[str] = set()
    for task in program.tasks:
        if task.name in seen:
            raise ProgramError(f"two tasks are named {task.name!r}")
        seen.add(task.name)
        _check_window(task.shape, task.name)
        _check_slot(program, task.source, task.shape.channels, task.shape.in_size, task.name)
        channels = task.shape.out_channels
        target = _check_slot(program, task.target, channels, task.out_size, task.name)
        _check_quant(task.out, f"{task.name}: output")
        _expect(target.bits, task.out.bits, f"{task.name}: bits of its target buffer")
        _within(task.lo, task.out.min, task.out.max, f"{task.name}: lo")
        _within(task.hi, task.lo, task.out.max, f"{task.name}: hi")
        source_bits = program.buffers[task.source.buffer].bits
        _expect(source_bits, program.config.bits, f"{task.name}: bits of its source buffer")
        limit = 1 << (source_bits - 1)
        _within(task.in_zero, -limit, limit - 1, f"{task.name}: in_zero")
        if isinstance(task, ConvTask):
            _check_conv(program, task)
        else:
            _check_scale(task.mult, task.shift, task.name)
        _check_reach(task)
        try:
            work = program.work(task)
        except CompileError as error:
            raise ProgramError(str(error)) from error
        _check_counts(program.config, task, work)
    _check_memory(program)
    _check_quant(program.input, "input")
    _check_quant(program.output, "output")
    clip = program.clip
    if not 1 <= clip.frames <= 4096 or min(clip.height, clip.width, clip.step) < 1:
        raise ProgramError(
            f"a clip of {clip.frames} frames, {clip.height} x {clip.width}, step {clip.step}; "
            f"accepted are 1 to 4096 frames, and a size and step of 1 or more"
        )
    if any(not math.isfinite(v) for v in (*clip.mean, *clip.std)) or min(clip.std) <= 0:
        raise ProgramError(f"clip mean {clip.mean} and std {clip.std} do not normalise")
    source = _check_source(program)
    _expect(source.bits, program.input.bits, "bits of the input buffer")
    last = program.tasks[-1]
    _expect(program.target, last.target, "target of the program")
    _expect(program.output, last.out, "format of the output")
    if program.labels and len(program.labels) != math.prod(last.out_size) * last.shape.out_channels:
        raise ProgramError(f"{len(program.labels)} labels for {last.shape.out_channels} outputs")


def _check_source(program: Program) -> Buffer:
    """Check that the clip, folded or not, is what its buffer and its first task take."""
    window, clip = program.clip_window, program.clip
    if program.fold is not None:
        _expect(window.channels, clip.channels, "fold: channels of the clip")
        _expect(window.in_size, (clip.frames, clip.height, clip.width), "fold: size of the clip")
        _check_window(window, "fold")
        _within(window.taps, 1, MAX_TAPS, f"fold: taps of its window {window.kernel}")
    channels = window.channels * window.taps
    source = _check_slot(program, program.source, channels, window.out_size, "input")
    for task in program.tasks:
        if program.fold is not None and task.source == program.source:
            _expect(task.shape.channels, channels, f"{task.name}: channels of the folded clip")
    return source


def _check_quant(quant: QuantParams, what: str) -> None:
    if quant.bits not in BITS or not (math.isfinite(quant.scale) and quant.scale > 0):
        raise ProgramError(f"{what}: {quant} is not a format of codes")
    _within(quant.zero_point, quant.min, quant.max, f"{what}: zero point")


def _check_buffer(program: Program, i: int, buffer: Buffer) -> None:
    if buffer.bits not in BITS or buffer.channels < 1 or min(buffer.size) < 1:
        raise ProgramError(f"buffer {i}: {buffer} holds nothing")
    if buffer.offset % ALIGNMENT or buffer.offset < 0:
        raise ProgramError(f"buffer {i}: offset {buffer.offset} is not a multiple of {ALIGNMENT}")
    end = buffer.offset + buffer.nbytes(program.config)
    _within(end, 0, program.arena_bytes, f"buffer {i}: its end")
    _within(program.arena_bytes, 0, 1 << 33, "arena_bytes")


def _check_window(shape: WindowShape, name: str) -> None:
    if shape.channels < 1 or shape.out_channels < 1 or min(shape.in_size) < 1:
        raise ProgramError(f"{name}: {shape} has an empty axis")
    if isinstance(shape, ConvShape):
        _within(shape.own_weights, 0, 1 << 48, f"{name}: own_weights")
    if min(shape.kernel) < 1 or min(shape.stride) < 1:
        raise ProgramError(f"{name}: kernel {shape.kernel}, stride {shape.stride} must be positive")
    pads = zip(shape.pad_before, shape.pad_after, shape.kernel, strict=True)
    if any(not (0 <= before < k and 0 <= after < k) for before, after, k in pads):
        raise ProgramError(f"{name}: padding {shape.pad_before}, {shape.pad_after} exceeds kernel")
    if min(shape.out_size) < 1:
        raise ProgramError(f"{name}: kernel {shape.kernel} is larger than its padded input")


def _check_slot(program: Program, slot: Slot, channels: int, size: Size, what: str) -> Buffer:
    _within(slot.buffer, 0, len(program.buffers) - 1, f"{what}: buffer")
    buffer = program.buffers[slot.buffer]
    _within(slot.channel, 0, buffer.channels - channels, f"{what}: channel offset")
    tn = program.config.tn
    _expect(slot.channel % tn, 0, f"{what}: channel offset {slot.channel} modulo {tn}")
    _expect(size, buffer.size, f"{what}: size of the map in buffer {slot.buffer}")
    return buffer


def _check_reach(task: Task) -> None:
    """Check a task's windows against the sizes that the accelerator counts with."""
    shape, name = task.shape, task.name
    _within(shape.taps, 1, MAX_TAPS, f"{name}: taps of its window {shape.kernel}")
    pool = NO_POOL
    if isinstance(task, ConvTask) and task.pool is not None:
        pool = task.pool.kernel
    sides = zip(shape.in_size, shape.pad_before, shape.pad_after, strict=True)
    for axis, padded in zip(("depth", "height", "width"), map(sum, sides), strict=True):
        _within(padded, 1, MAX_LENGTH, f"{name}: {axis} of its input with padding")
    for axis, stride, width in zip(("depth", "height", "width"), shape.stride, pool, strict=True):
        _within(stride, 1, MAX_STRIDE, f"{name}: stride along the {axis}")
        _within(width, 1, MAX_STRIDE, f"{name}: {axis} of its fused pool")


def _check_counts(config: AcceleratorConfig, task: Task, work: Work) -> None:
    """Check that the numbers in a task's plan and its loop counts have room."""
    name = task.name
    for field, bits in ITEM_BITS.items():
        most = max(int(getattr(item, field)) for item in work.items)
        _within(most, 0, (1 << bits.width) - 1, f"{name}: {field} of its plan")
    tiles = math.prod(map(ceil_div, work.out_size, work.tile))
    counts = {
        "items": len(work.items) * tiles,
        "beats of weights": work.chunks * work.chunk_beats(config),
        "weight words of an item": work.weight_words,
    }
    for what, count in counts.items():
        _within(count, 0, MAX_INT32, f"{name}: {what}")


def _check_memory(program: Program) -> None:
    """Check that every address of weights and tables fits the 32 bits of a descriptor's field."""
    config = program.config
    weight_beats, table_words = 0, len(program.tasks) * len(FIELDS) // 2
    for task in program.tasks:
        work, channels = program.work(task), task.shape.out_channels
        # the even and the odd chunks are stored equally long
        weight_beats += 2 * ceil_div(work.chunks, 2) * work.chunk_beats(config)
        table_words += len(work.items) + 2 * ceil_div(channels, config.tn) * config.tn
        table_words += work.chunks * config.index_words
        _within(weight_beats, 0, MAX_INT32, f"{task.name}: beats of weights up to it")
        _within(table_words, 0, MAX_INT32, f"{task.name}: 64-bit words of tables up to it")


def _check_scale(mult: int, shift: int, what: str) -> None:
    if mult != 0:
        _within(mult, 1 << (MULT_BITS - 1), (1 << MULT_BITS) - 1, f"{what}: mult")
    _within(shift, 0, MAX_SHIFT, f"{what}: shift")


def _check_conv(program: Program, task: ConvTask) -> None:
    config, shape, weights = program.config, task.shape, task.weights
    p, q, t = config.group_size.counts(shape.filters, shape.channels, shape.taps)
    gk = program.group_columns(task)
    if weights.values.ndim != 6:
        raise ProgramError(f"{task.name}: values have {weights.values.ndim} axes, expected 6")
    kr, kc = weights.kept
    wanted: dict[str, tuple[Array, tuple[int, ...], Any]] = {
        "values": (weights.values, (p, q, t, kr, config.tn, kc), code_dtype(config.bits)),
        "rows": (weights.rows, (p, q, kr), np.uint8),
        "cols": (weights.cols, (p, q, t, kc), np.uint8),
        "enabled": (weights.enabled, (p, q), np.bool_),
        "bias": (task.bias, (shape.filters,), np.int64),
        "mult": (task.mult, (shape.filters,), np.int32),
        "shift": (task.shift, (shape.filters,), np.uint8),
    }
    for part, (array, array_shape, dtype) in wanted.items():
        _expect(array.shape, array_shape, f"{task.name}: shape of {part}")
        _expect(array.dtype, np.dtype(dtype), f"{task.name}: type of {part}")
    _within(kr, 1, config.gm, f"{task.name}: kept rows")
    _within(kc, 1, gk, f"{task.name}: kept columns")
    if not config.sparse and ((kr, kc) != (config.gm, gk)):
        raise ProgramError(f"{task.name}: sparse weights for the dense design {config.name}")
    for part, index, end in (("rows", weights.rows, config.gm), ("cols", weights.cols, gk)):
        increasing = np.all(index[..., 1:] > index[..., :-1])
        if not increasing or int(index.max(initial=0)) >= end:
            raise ProgramError(f"{task.name}: {part} do not increase within 0 to {end - 1}")
    largest = max(int(weights.values.max()), -int(weights.values.min()))
    if largest > weight_limit(config.bits):
        raise ProgramError(f"{task.name}: a weight exceeds {weight_limit(config.bits)}")
    for mult, shift in {*zip(task.mult.tolist(), task.shift.tolist(), strict=True)}:
        _check_scale(mult, shift, task.name)
    check_accumulator(task, config)
    if task.shortcut is not None:
        r = task.shortcut
        buffer = _check_slot(program, r.source, shape.filters, shape.out_size, task.name)
        _expect(buffer.bits, config.bits, f"{task.name}: bits of its shortcut")
        _check_scale(r.mult, r.shift, f"{task.name}: shortcut")
        _within(r.zero_point, -(1 << 15), (1 << 15) - 1, f"{task.name}: shortcut zero point")
    if task.pool is not None:
        _check_window(task.pool, f"{task.name}: pool")
        _expect(task.pool.in_size, shape.out_size, f"{task.name}: input of its pool")
        _expect(task.pool.channels, shape.filters, f"{task.name}: channels of its pool")
        _expect(task.pool.kernel, task.pool.stride, f"{task.name}: stride of its fused pool")
        _expect(task.pool.pad_before + task.pool.pad_after, (0,) * 6, f"{task.name}: pool padding")
        along = config.port_positions % task.pool.kernel[2]
        _expect(along, 0, f"{task.name}: {config.port_positions} modulo the width of its pool")


def check_accumulator(task: ConvTask, config: AcceleratorConfig) -> None:
    """Prove that no partial sum of the task can leave the accumulator.

    The bound is the sum over kept weights of |w| times the largest |code|, plus |bias|.

    Raises:
        ProgramError: a filter could overflow the accumulator; names it, its bound and the limit.
    """
    weights, gm = task.weights, config.gm
    p, q, t, kr, gn, kc = weights.values.shape
    sums = np.abs(weights.values).sum(axis=(2, 4, 5), dtype=np.int64)
    sums = np.where(weights.enabled[:, :, None], sums, 0)
    at = (np.arange(p)[:, None, None], weights.rows.astype(np.intp))
    per_filter = np.zeros((p, gm), np.int64)
    np.add.at(per_filter, at, sums)
    bound = per_filter.reshape(-1)[: task.shape.filters] << (config.bits - 1)
    bound = bound + np.abs(task.bias)
    limit = 1 << (ACCUMULATOR_BITS[config.bits] - 1)
    worst = int(bound.argmax())
    if int(bound[worst]) >= limit:
        raise ProgramError(
            f"{task.name}: filter {worst} could reach {int(bound[worst])} in the "
            f"{ACCUMULATOR_BITS[config.bits]}-bit accumulator; it holds less than {limit}"
        )
