"""The accelerator in numpy: the definition of what every backend computes, and its counters.

The arithmetic is that of docs/equations.md, element by element. How it is made fast is in
`exact`, `winograd` and `crew`; here are the buffers, the scaling of sums to codes, the pools, and
the counting.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.backends.base import (
    Counters,
    Loaded,
    check_codes,
    check_design,
    check_size,
    count_task,
)
from pynq_kgrc.backends.emulation.choice import ExactConvolution, choose_convolution
from pynq_kgrc.backends.emulation.crew import (
    Crew,
    Each,
    Team,
    Threads,
    available_cores,
    may_fork,
    shared_array,
)
from pynq_kgrc.backends.emulation.exact import (
    WIDE,
    PlanarConvolution,
    Region,
    forget_scratch,
    scratch,
    split_evenly,
)
from pynq_kgrc.backends.emulation.winograd import WinogradConvolution
from pynq_kgrc.graph import Size, WindowShape
from pynq_kgrc.program import ConvTask, PoolTask, Program, Slot
from pynq_kgrc.quant import Array, rshift

ALONE_MACS = 1 << 27
"""Of a program with fewer MACs another core has nothing to gain: some milliseconds on one."""


class Emulation(Loaded):
    """The accelerator `config`, emulated bit for bit on this host.

    Args:
        config: the design to be; programs made for another are refused.
        cores: blocks worked on at once; by default as many as there are, 4 at most, and 1 for a
            small program.
        fork: let forked processes share the work, which is faster, rather than threads; by
            default where `may_fork` says so when a program is loaded.
    """

    name = "emulate"
    exclusive = False

    def __init__(
        self, config: AcceleratorConfig, cores: int | None = None, fork: bool | None = None
    ) -> None:
        self.config = config
        self._wanted_cores, self._fork = cores, fork
        self.cores = 1
        self._blas = ThreadpoolController()
        self._crew: Crew | None = None
        self._steps: list[ConvStep | PoolStep] = []
        self._maps: list[Array] = []

    def load(self, program: Program) -> None:
        """Place the buffers in one arena and prepare every task's weights.

        Raises:
            ProgramError: the program is for another accelerator.
        """
        check_design(program, self.config)
        self._dismiss()
        self._program = program
        # a 4-bit code takes a whole byte here, so the arena is twice as large
        stretch = 2 if self.config.bits == 4 else 1
        arena = shared_array(program.arena_bytes * stretch)
        self._maps = []
        for buffer in program.buffers:
            start, count = buffer.offset * stretch, buffer.channels * math.prod(buffer.size)
            dtype = np.dtype(np.int16 if buffer.bits == 16 else np.int8)
            raw = arena[start : start + count * dtype.itemsize].view(dtype)
            self._maps.append(raw.reshape(*buffer.size, buffer.channels))
        self.cores = self._wanted_cores or _useful_cores(program)
        workspace = Workspace()
        steps: dict[int, ConvStep | PoolStep] = {}

        def prepare(place: int) -> None:
            task = program.tasks[place]
            if isinstance(task, ConvTask):
                steps[place] = ConvStep(task, program, self._maps, workspace, self.cores)
            else:
                steps[place] = PoolStep(task, program, self._maps)

        threads = Threads(self.cores)
        try:
            with self._blas.limit(limits=1):
                threads.each(prepare, range(len(program.tasks)))
        finally:
            threads.close()
        workspace.allocate()
        self._steps = [steps[place] for place in sorted(steps)]
        self._crew = self._gather()

    def write(self, slot: Slot, codes: Array) -> None:
        """Codes [C, D, H, W] into a slot.

        Raises:
            ProgramError: nothing is loaded, or the codes have another type or shape than the slot.
        """
        check_codes(self.program, slot, codes)
        target = self._slot(slot, codes.shape[0]).transpose(3, 0, 1, 2)
        target[...] = codes

    def read(self, slot: Slot, channels: int, size: Size) -> Array:
        """A copy of the codes [C, D, H, W] in a slot."""
        check_size(self.program, slot, size)
        view = self._slot(slot, channels)
        return view.transpose(3, 0, 1, 2).copy()

    def run(self, first: int = 0, last: int | None = None) -> list[Counters]:
        """Run the tasks [first, last) in order.

        Raises:
            ProgramError: no program is loaded, or the range is not within it.
            DeviceError: a process that shares the work was killed; the next run starts it anew.
        """
        first, last = self.task_range(first, last)
        if first == last:
            return []
        crew = self._crew = self._crew or self._gather()
        counters = []
        try:
            with self._blas.limit(limits=1):  # the cores are shared out here: one to each call
                crew.begin(first, last)
                for step in self._steps[first:last]:
                    start = time.perf_counter()
                    step.run(crew.each)
                    seconds = time.perf_counter() - start
                    counters.append(replace(step.counters, seconds=seconds))
        except BaseException:  # the others are at another step
            self._dismiss()
            raise
        return counters

    def close(self) -> None:
        """Give memory, threads and processes back."""
        self._dismiss()
        self._program, self._steps, self._maps = None, [], []
        forget_scratch()

    def _slot(self, slot: Slot, channels: int) -> Array:
        return self._maps[slot.buffer][..., slot.channel : slot.channel + channels]

    def _gather(self) -> Crew:
        """Those who share the work: processes, or threads where none can be forked."""
        if self.cores > 1 and (may_fork() if self._fork is None else self._fork):
            with contextlib.suppress(OSError), self._blas.limit(limits=1):
                return Team(self._steps, self.cores)
        return Threads(self.cores)

    def _dismiss(self) -> None:
        if self._crew is not None:
            self._crew.close()
            self._crew = None


def _useful_cores(program: Program) -> int:
    macs = sum(task.shape.macs for task in program.tasks if isinstance(task, ConvTask))
    return 1 if macs < ALONE_MACS else min(4, available_cores())


class Workspace:
    """One piece of memory that the tasks use in turn, as large as the largest wish."""

    def __init__(self) -> None:
        self._wanted = 0
        self._bytes = shared_array(0)

    def reserve(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Say before `allocate` what will be taken."""
        self._wanted = max(self._wanted, math.prod(shape) * dtype.itemsize)

    def allocate(self) -> None:
        """Make room for the largest reservation."""
        self._bytes = shared_array(self._wanted)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An uninitialised array, valid until the next call."""
        return self._bytes[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


INT32 = np.dtype(np.int32)
REPEAT = 8


class Scaling:
    """Sums to codes: ``clamp(rshift((acc + bias) * mult, shift) + shortcut + Z_y, lo, hi)``.

    In float64, where it is exact: a shift is a scaling by a power of two, a floor rounds half up
    once 0.5 is added, and a lift above all values makes them positive, so that truncation is the
    floor. From their largest down to 2^-shift there must be no more than 52 bits; where there are,
    and at 16 bits, in int64. Truncated, they fit int16 in nearly every network.
    """

    def __init__(self, task: ConvTask, bits: int, weight: Array, interval: tuple[int, int]) -> None:
        self.task = task
        signed = weight.sum(axis=(1, 2), dtype=np.int64)
        # the sums here are of x - Z_x, the task's bias is for sums of x
        self.bias = task.bias + task.in_zero * signed
        self.codes = np.dtype(np.int16 if task.out.bits == 16 else np.int8)
        self.unsigned = np.dtype(np.uint16 if task.out.bits == 16 else np.uint8)
        scale = task.mult.astype(np.float64) * np.exp2(-task.shift.astype(np.float64))
        half = np.where(task.shift > 0, 0.5, 0.0)
        offset = self.bias * scale + half + task.out.zero_point
        # what any input of the interval and any shortcut can come to
        low, high = interval
        centre = signed * (low + high) / 2
        reach = np.abs(weight).sum(axis=(1, 2), dtype=np.int64) * (high - low) / 2
        added = 0.0
        if task.shortcut is not None:
            added = (task.shortcut.mult << bits) / (1 << task.shortcut.shift) + 1
        least = float(((centre - reach) * scale + offset).min()) - added
        most = float(((centre + reach) * scale + offset).max()) + added
        # 0 modulo a code, so that it falls away when codes are cut out
        width = 8 * self.unsigned.itemsize
        self.lift = max(1, math.ceil(-least / (1 << width)) + 1) << width
        most = max(most, task.hi) + self.lift
        self.whole = np.dtype(np.int16 if most < 1 << 15 else np.int32)
        fits = most < 1 << 30 and int(task.shift.max()) + int(most).bit_length() <= 52
        self.in_float = bits != 16 and fits and (task.shortcut is None or task.shortcut.shift < 30)
        # as often as REPEAT in a row: numpy is slow to go round a short row again
        self.scale = np.tile(scale, (REPEAT, 1))
        self.offset = np.tile(offset + self.lift, (REPEAT, 1))

    def store(self, sums: Array, target: Array, filters: slice, shortcut: Array | None) -> None:
        """Write the codes of exact sums [..., M] of some filters to `target` of that shape."""
        if not self.in_float:
            target[...] = self._in_integers(sums, filters, shortcut)
            return
        values = scratch("scaled", sums.shape, WIDE)
        np.copyto(values, sums)
        repeat = math.gcd(REPEAT, math.prod(sums.shape[:-1]))
        rows = values.reshape(-1, repeat * sums.shape[-1])
        rows *= self.scale[:repeat, filters].reshape(-1)
        rows += self.offset[:repeat, filters].reshape(-1)
        codes = scratch("codes", sums.shape, self.whole)
        np.copyto(codes, values, casting="unsafe")
        if shortcut is not None:
            np.add(codes, self._scaled_shortcut(shortcut), out=codes, casting="unsafe")
        np.clip(codes, self.task.lo + self.lift, self.task.hi + self.lift, out=codes)
        np.copyto(target.view(self.unsigned), codes, casting="unsafe")

    def _scaled_shortcut(self, codes: Array) -> Array:
        """``rshift((r - Z_r) * mult, shift)`` of 8-bit codes: 9 + 15 bits and a half fit int32."""
        r = self.task.shortcut
        assert r is not None
        scaled = scratch("shortcut", codes.shape, INT32)
        np.copyto(scaled, codes)
        scaled *= r.mult
        scaled += (1 << r.shift >> 1) - r.zero_point * r.mult
        scaled >>= r.shift
        return scaled

    def _in_integers(self, sums: Array, filters: slice, shortcut: Array | None) -> Array:
        task = self.task
        acc = sums.astype(np.int64) + self.bias[filters]
        codes = rshift(acc * task.mult[filters].astype(np.int64), task.shift[filters])
        if shortcut is not None and task.shortcut is not None:
            r = task.shortcut
            codes += rshift((shortcut.astype(np.int64) - r.zero_point) * r.mult, r.shift)
        clamped: Array = np.clip(codes + task.out.zero_point, task.lo, task.hi)
        return clamped.astype(self.codes)


class ConvStep:
    """A convolution task made ready: its exact form, its scaling, and views of its maps."""

    def __init__(
        self,
        task: ConvTask,
        program: Program,
        maps: list[Array],
        workspace: Workspace,
        cores: int,
    ) -> None:
        config, shape = program.config, task.shape
        self.task, self.workspace, self.cores = task, workspace, cores
        self.source = _view(maps, task.source, shape.channels)
        self.target = _view(maps, task.target, shape.filters)
        self.shortcut: Array | None = None
        if task.shortcut is not None:
            self.shortcut = _view(maps, task.shortcut.source, shape.filters)
        self.counters = count_task(program, task)
        limit = 1 << (config.bits - 1)
        interval = (-limit - task.in_zero, limit - 1 - task.in_zero)
        dtype = np.dtype(np.float64 if config.bits == 16 else np.float32)
        weight = task.weights.expand(shape, config.gm, program.group_columns(task))
        self.scaling = Scaling(task, config.bits, weight, interval)
        weight = weight.reshape(shape.filters, shape.channels, *shape.kernel)
        self.exact: ExactConvolution = choose_convolution(weight, shape, interval, dtype, cores)
        self.pool_size: Size = (1, 1, 1) if task.pool is None else task.pool.kernel
        # scaling is monotone, so the largest sum gives the largest code; a shortcut breaks that,
        # and a window that does not lie within a tile cannot be pooled there
        self.pools_sums = task.pool is None or task.shortcut is None
        if isinstance(self.exact, WinogradConvolution):
            self.pools_sums = self.pools_sums and self.exact.pools(self.pool_size)
        elif self.pools_sums:
            self.exact.align(self.pool_size[0], self.pool_size[1])
        self.codes = self.target
        if not self.pools_sums:
            size = (*shape.out_size, shape.filters)
            codes = shared_array(math.prod(size) * self.target.itemsize)
            self.codes = codes.view(self.target.dtype).reshape(size)
        self.padded_shape = (*self.exact.in_size, shape.channels)
        workspace.reserve(self.padded_shape, self.exact.map_dtype)

    def run(self, each: Each) -> None:
        """Read the source, write the target."""
        padded = self._pad(each)
        exact, pool = self.exact, self.pool_size
        if isinstance(exact, WinogradConvolution):
            within = pool if self.pools_sums else (1, 1, 1)
            each(lambda job: exact.run(padded, job, self._store, within), exact.jobs)
        else:
            each(lambda job: exact.run(padded, job, self._store_windows), exact.jobs)
        if not self.pools_sums:
            depths = split_evenly(self.target.shape[0], self.target.shape[0])
            each(self._pool_codes, depths)

    def _store_windows(self, sums: Array, region: Region, filters: slice) -> None:
        """Pool the sums of whole windows, then store them."""
        if self.pools_sums and self.task.pool is not None:
            sums = _max_windows(sums, self.pool_size)
            d, h, w = (
                slice(s.start // p, s.start // p + n)
                for s, p, n in zip(region, self.pool_size, sums.shape, strict=False)
            )
            region = (d, h, w)
        self._store(sums, region, filters)

    def _store(self, sums: Array, region: Region, filters: slice) -> None:
        """Scale sums to codes; what lies past the end of the map is left out."""
        target = self.codes[(*region, filters)]
        depth, height, width = target.shape[:3]
        shortcut = None
        if self.shortcut is not None:
            shortcut = np.ascontiguousarray(self.shortcut[(*region, filters)])
        self.scaling.store(sums[:depth, :height, :width], target, filters, shortcut)

    def _pool_codes(self, depths: slice) -> None:
        """Pool some slices of finished codes."""
        step = self.pool_size[0]
        codes = self.codes[depths.start * step : depths.stop * step]
        self.target[depths] = _max_windows(codes, self.pool_size)

    def _pad(self, each: Each) -> Array:
        """The input as floats without its zero point, in zeros as wide as the exact form wants."""
        exact = self.exact
        padded = self.workspace.take(self.padded_shape, exact.map_dtype)
        if isinstance(exact, PlanarConvolution):
            # [D / sd, sd, H / sh, sh, W / sw, sw, N]: axes can only be merged in a copy
            split = exact.map_view(padded)
            each(lambda d: _fill_split(split, d, self.source, self.task), range(split.shape[0]))
            return padded
        each(
            lambda depths: _fill(padded[depths], depths.start, self.source, self.task),
            split_evenly(len(padded), 4 * self.cores),
        )
        return padded


def _fill(slab: Array, first: int, source: Array, task: ConvTask) -> None:
    """Depths of the padded map from `first` on: the source less its zero point, zeros around it.

    A map that is narrower than the padded input (its last rows are never looked at) is cut off.
    """
    before, depth = task.shape.pad_before, slab.shape[0]
    begin = max(0, before[0] - first)
    end = max(begin, min(depth, before[0] + source.shape[0] - first))
    slab[:begin] = 0
    slab[end:] = 0
    if begin == end:
        return
    body = slab[begin:end]
    rows, columns = (
        slice(b, min(b + n, total))
        for b, n, total in zip(before[1:], source.shape[1:], body.shape[1:], strict=False)
    )
    body[:, : rows.start] = 0
    body[:, rows.stop :] = 0
    body[:, :, : columns.start] = 0
    body[:, :, columns.stop :] = 0
    offset = first + begin - before[0]
    seen = source[offset : offset + end - begin]
    np.subtract(
        seen[:, : rows.stop - rows.start, : columns.stop - columns.start],
        slab.dtype.type(task.in_zero),
        out=body[:, rows, columns],
        casting="unsafe",
        dtype=slab.dtype,
    )


def _fill_split(split: Array, block: int, source: Array, task: ConvTask) -> None:
    """One step of depths of a planar map [D / sd, sd, H / sh, sh, W / sw, sw, N]."""
    _, sd, h, sh, w, sw, n = split.shape
    plain = scratch("split", (sd, h * sh, w * sw, n), split.dtype)
    _fill(plain, block * sd, source, task)
    split[block] = plain.reshape(sd, h, sh, w, sw, n)


def _max_windows(sums: Array, size: Size) -> Array:
    """The largest of each window of `size` outputs; what does not fill a window is dropped."""
    for axis, window in enumerate(size):
        if window == 1:
            continue
        count = sums.shape[axis] // window
        lead = (slice(None),) * axis
        views = [sums[(*lead, slice(i, count * window, window))] for i in range(window)]
        largest = np.maximum(views[0], views[1])
        for view in views[2:]:
            np.maximum(largest, view, out=largest)
        sums = largest
    return sums


class PoolStep:
    """A pool task made ready. Windows are reduced one axis after the other."""

    def __init__(self, task: PoolTask, program: Program, maps: list[Array]) -> None:
        self.task = task
        self.source = _view(maps, task.source, task.shape.channels)
        self.target = _view(maps, task.target, task.shape.channels)
        self.counters = count_task(program, task)

    def run(self, each: Each) -> None:
        """Read the source, write the target."""
        shape = self.task.shape
        each(self._reduce, split_evenly(shape.out_size[0], shape.out_size[0]))

    def _reduce(self, depths: slice) -> None:
        """Some slices of the output along depth."""
        task, shape = self.task, self.task.shape
        combine: Any = np.maximum
        values, fill = self.source, int(np.iinfo(self.source.dtype).min)
        if task.average:
            values, fill, combine = values.astype(np.int64) - task.in_zero, 0, np.add
        for axis in range(3):
            # depth first: it is cut to the slices that are wanted here
            outs = range(*depths.indices(shape.out_size[0])) if axis == 0 else None
            values = _reduce_axis(values, shape, axis, outs, combine, fill)
        if task.average:
            pass
        elif (task.mult, task.shift) == (1 << 14, 14) and task.in_zero == task.out.zero_point:
            np.clip(values, task.lo, task.hi, out=self.target[depths])
            return
        else:
            values = values.astype(np.int64) - task.in_zero
        codes = rshift(values * np.int64(task.mult), task.shift) + task.out.zero_point
        np.clip(codes, task.lo, task.hi, out=self.target[depths], casting="unsafe")


def _reduce_axis(
    values: Array,
    shape: WindowShape,
    axis: int,
    outs: range | None,
    combine: Any,
    fill: int,
) -> Array:
    """Windows along one axis of [D, H, W, C] combined; `outs` are the outputs wanted."""
    kernel, stride, before = shape.kernel[axis], shape.stride[axis], shape.pad_before[axis]
    outs = outs if outs is not None else range(shape.out_size[axis])
    first, last = outs[0] * stride - before, outs[-1] * stride - before + kernel
    size = values.shape[axis]
    lead = (slice(None),) * axis
    inside = values[(*lead, slice(max(first, 0), min(last, size)))]
    if kernel == 1 and stride == 1:
        return inside
    if first < 0 or last > size:
        widths = [(0, 0)] * 4
        widths[axis] = (max(-first, 0), max(last - size, 0))
        inside = np.pad(inside, widths, constant_values=fill)
    span = (len(outs) - 1) * stride + 1
    result: Array = inside[(*lead, slice(0, span, stride))].copy()
    for tap in range(1, kernel):
        combine(result, inside[(*lead, slice(tap, tap + span, stride))], out=result)
    return result


def _view(maps: list[Array], slot: Slot, channels: int) -> Array:
    return maps[slot.buffer][..., slot.channel : slot.channel + channels]
