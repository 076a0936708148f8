"""The accelerator in numpy: the reference for the codes and the counters of every backend.

The arithmetic is that of docs/equations.md, element by element. This module holds the maps, scales
sums to codes, pools and counts. Fast exact convolutions are in `exact` and `winograd`, the choice
between them is in `choice`, and the sharing of work among cores is in `crew`.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import replace
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.backends.base import (
    Counters,
    Loaded,
    PackedMap,
    check_codes,
    check_design,
    check_size,
    count_task,
    locked,
)
from pynq_kgrc.backends.cores import useful_cores
from pynq_kgrc.backends.emulation.choice import ExactConvolution, choose_convolution
from pynq_kgrc.backends.emulation.crew import (
    Crew,
    ParallelFor,
    ProcessCrew,
    ThreadCrew,
    may_fork,
    shared_array,
)
from pynq_kgrc.backends.emulation.exact import (
    FLOAT32,
    FLOAT64,
    Interval,
    OutputSlices,
    PlanarConvolution,
    forget_scratch,
    scratch,
    split_evenly,
)
from pynq_kgrc.backends.emulation.winograd import WinogradConvolution
from pynq_kgrc.graph import Size, WindowShape
from pynq_kgrc.program import ConvTask, PoolTask, Program, Slot
from pynq_kgrc.quant import Array, code_dtype, rshift

ONE_CORE_MACS = 1 << 27
"""A program with fewer MACs runs on one core: it takes some milliseconds, and a second core would
save no time."""


class Emulation(Loaded):
    """The accelerator `config`, emulated bit for bit on this host.

    Args:
        config: the emulated design; programs for another one are refused.
        cores: how many cores share the work. The default is all cores, at most 4, and 1 for a
            small program.
        fork: True to share the work among forked processes, which is faster; False for threads.
            By default `crew.may_fork` decides at each `load`.
    """

    name = "emulate"
    exclusive = False

    def __init__(
        self, config: AcceleratorConfig, cores: int | None = None, fork: bool | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self._requested_cores, self._fork = cores, fork
        self.cores = 1
        self._blas = ThreadpoolController()
        self._crew: Crew | None = None
        self._steps: list[ConvStep | PoolStep] = []
        self._maps: list[Array] = []

    @locked
    def load(self, program: Program) -> None:
        """Allocate the maps in one arena and prepare the weights of every task.

        Raises:
            ProgramError: the program is for another accelerator.
        """
        check_design(program, self.config)
        self._stop_crew()
        self._maps_lost = None
        self._program = None  # until all of it is prepared: Ctrl-C leaves no program
        # the program packs two 4-bit codes a byte, a numpy map holds one: twice the bytes
        bytes_per_byte = 2 if self.config.bits == 4 else 1
        arena = shared_array(program.arena_bytes * bytes_per_byte)
        self._maps = []
        for buffer in program.buffers:
            start, count = buffer.offset * bytes_per_byte, buffer.channels * math.prod(buffer.size)
            dtype = code_dtype(buffer.bits)
            raw = arena[start : start + count * dtype.itemsize].view(dtype)
            self._maps.append(raw.reshape(*buffer.size, buffer.channels))
        self.cores = self._requested_cores or min(4, useful_cores(program, ONE_CORE_MACS))
        workspace = Workspace()
        steps: dict[int, ConvStep | PoolStep] = {}

        def prepare(number: int) -> None:
            task = program.tasks[number]
            if isinstance(task, ConvTask):
                steps[number] = ConvStep(task, program, self._maps, workspace, self.cores)
            else:
                steps[number] = PoolStep(task, program, self._maps)

        threads = ThreadCrew(self.cores)
        try:
            with self._blas.limit(limits=1):
                threads.parallel_for(prepare, range(len(program.tasks)))
        finally:
            threads.close()
        workspace.allocate()
        self._steps = [steps[number] for number in sorted(steps)]
        self._crew = self._start_crew()
        self._program = program

    @locked
    def write(self, slot: Slot, codes: Array | PackedMap) -> None:
        """Copy codes [C, D, H, W] into a slot.

        Raises:
            ProgramError: no program is loaded, or the codes have another type or shape than the
                slot's buffer.
        """
        codes = check_codes(self.program, slot, codes)
        target = _slot_view(self._maps, slot, codes.shape[0]).transpose(3, 0, 1, 2)
        target[...] = codes
        self._maps_lost = None

    @locked
    def read(self, slot: Slot, channels: int, size: Size) -> Array:
        """A copy of the codes [C, D, H, W] in a slot.

        Raises:
            ProgramError: no program is loaded, or the slot's buffer has another size.
        """
        check_size(self.program, slot, size)
        self.check_maps()
        view = _slot_view(self._maps, slot, channels)
        return view.transpose(3, 0, 1, 2).copy()

    @locked
    def run(self, first: int = 0, last: int | None = None) -> list[Counters]:
        """Run the tasks [first, last) in order.

        Raises:
            ProgramError: no program is loaded, or the range is not within it.
            DeviceError: a child process that shares the work has ended or hangs. The next run
                starts new ones.
        """
        first, last = self.task_range(first, last)
        self.check_maps()
        if first == last:
            return []
        crew = self._crew = self._crew or self._start_crew()
        self._maps_lost = "a run that did not end"
        counters = []
        try:
            with self._blas.limit(limits=1):  # one BLAS thread: the crew already uses every core
                crew.begin(first, last)
                for step in self._steps[first:last]:
                    start = time.perf_counter()
                    step.run(crew.parallel_for)
                    seconds = time.perf_counter() - start
                    counters.append(replace(step.counters, seconds=seconds))
        except BaseException:
            self._stop_crew()  # its other processes may be in the middle of any step
            raise
        self._maps_lost = None
        return counters

    def close(self) -> None:
        """Release memory, threads and processes."""
        with self.lock:
            self._stop_crew()
            self._program, self._steps, self._maps = None, [], []
            forget_scratch()

    def enter_child(self) -> None:
        """The first call in the child of a fork: the crew and the maps are the parent's.

        The program is loaded again, with a crew and maps of this process.
        """
        self._pid, self._crew = os.getpid(), None
        if self._program is not None:
            self.load(self._program)
        self._maps_lost = f"a fork of process {os.getppid()}"

    def _start_crew(self) -> Crew:
        """Forked processes, or threads if forking is not wanted, not safe or not possible."""
        if self.cores > 1 and (may_fork() if self._fork is None else self._fork):
            with contextlib.suppress(OSError), self._blas.limit(limits=1):
                return ProcessCrew(self._steps, self.cores)
        return ThreadCrew(self.cores)

    def _stop_crew(self) -> None:
        if self._crew is not None:
            self._crew.close()
            self._crew = None


class Workspace:
    """Memory for padded inputs. The tasks use it one after the other; the largest sets its size."""

    def __init__(self) -> None:
        self._size = 0
        self._bytes = shared_array(0)

    def reserve(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Announce, before `allocate`, an array that `take` will return."""
        self._size = max(self._size, math.prod(shape) * dtype.itemsize)

    def allocate(self) -> None:
        """Allocate the size of the largest reservation."""
        self._bytes = shared_array(self._size)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An uninitialised array, valid until the next call."""
        return self._bytes[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


INT32 = np.dtype(np.int32)

REPEAT = 8
"""Scales and offsets [M] are tiled this often: numpy is slow at broadcasting short rows."""


class Scaling:
    """Sums to codes: ``clamp(rshift((acc + bias) * mult, shift) + shortcut + Z_y, lo, hi)``.

    In float64, where it is exact: a shift is a scaling by a power of two, and rounding half up is
    a floor after 0.5 is added. We add an offset that makes every value positive, so truncation
    equals floor. Exact if value and fraction together need at most 52 bits; otherwise, and at 16
    bits, we use int64. The truncated values fit int16 in nearly every network, else int32.

    Args:
        task: the convolution.
        bits: width of the design's codes.
        weight: its codes [M, N, K].
        interval: lowest and highest input, zero point removed.
    """

    def __init__(self, task: ConvTask, bits: int, weight: Array, interval: Interval) -> None:
        self.task = task
        weight_sums = weight.sum(axis=(1, 2), dtype=np.int64)
        # the sums here are of w * (x - Z_x), the task's bias is for sums of w * x
        self.bias = task.bias + task.in_zero * weight_sums
        self.dtype = code_dtype(task.out.bits)
        self.unsigned_dtype = np.dtype(f"u{self.dtype.itemsize}")
        scale = task.mult.astype(np.float64) * np.exp2(-task.shift.astype(np.float64))
        half = np.where(task.shift > 0, 0.5, 0.0)
        offset = self.bias * scale + half + task.out.zero_point
        # the range of the result, for any input of the interval and any shortcut
        low, high = interval
        centre = weight_sums * (low + high) / 2
        radius = np.abs(weight).sum(axis=(1, 2), dtype=np.int64) * (high - low) / 2
        shortcut = 0.0
        if task.shortcut is not None:
            shortcut = (task.shortcut.mult << bits) / (1 << task.shortcut.shift) + 1
        smallest = float(((centre - radius) * scale + offset).min()) - shortcut
        largest = float(((centre + radius) * scale + offset).max()) + shortcut
        # a multiple of 2^8 (2^16): it vanishes when only the low byte (two bytes) is stored
        width = 8 * self.dtype.itemsize
        self.positive_offset = max(1, math.ceil(-smallest / (1 << width)) + 1) << width
        largest = max(largest, task.hi) + self.positive_offset
        self.integer_dtype = np.dtype(np.int16 if largest < 1 << 15 else np.int32)
        fits = largest < 1 << 30 and int(task.shift.max()) + int(largest).bit_length() <= 52
        self.in_float = bits != 16 and fits and (task.shortcut is None or task.shortcut.shift < 30)
        self.scale = np.tile(scale, (REPEAT, 1))
        self.offset = np.tile(offset + self.positive_offset, (REPEAT, 1))

    def store(self, sums: Array, target: Array, filters: slice, shortcut: Array | None) -> None:
        """Write the codes of the exact sums [..., M] of `filters` to `target`, of the same shape.

        `shortcut` holds the codes that are added, of the same shape too.
        """
        if not self.in_float:
            target[...] = self._in_integers(sums, filters, shortcut)
            return
        values = scratch("scaled", sums.shape, FLOAT64)
        np.copyto(values, sums)
        repeat = math.gcd(REPEAT, math.prod(sums.shape[:-1]))
        rows = values.reshape(-1, repeat * sums.shape[-1])
        rows *= self.scale[:repeat, filters].reshape(-1)
        rows += self.offset[:repeat, filters].reshape(-1)
        codes = scratch("codes", sums.shape, self.integer_dtype)
        np.copyto(codes, values, casting="unsafe")
        if shortcut is not None:
            np.add(codes, self._scaled_shortcut(shortcut), out=codes, casting="unsafe")
        low, high = self.task.lo + self.positive_offset, self.task.hi + self.positive_offset
        np.clip(codes, low, high, out=codes)
        np.copyto(target.view(self.unsigned_dtype), codes, casting="unsafe")

    def _scaled_shortcut(self, codes: Array) -> Array:
        """``rshift((r - Z_r) * mult, shift)`` in int32.

        An 8-bit code less its zero point has 9 bits, `mult` has 15: with the half that is added
        for rounding the value still fits.
        """
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
        return clamped.astype(self.dtype)


class ConvStep:
    """A convolution task prepared to run: its exact convolution, its scaling, and its maps."""

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
        self.source = _slot_view(maps, task.source, shape.channels)
        self.target = _slot_view(maps, task.target, shape.filters)
        self.shortcut: Array | None = None
        if task.shortcut is not None:
            self.shortcut = _slot_view(maps, task.shortcut.source, shape.filters)
        self.counters = count_task(program, task)
        limit = 1 << (config.bits - 1)
        interval = (-limit - task.in_zero, limit - 1 - task.in_zero)
        dtype = FLOAT64 if config.bits == 16 else FLOAT32
        weight = task.weights.expand(shape, config.gm, program.group_columns(task))
        self.scaling = Scaling(task, config.bits, weight, interval)
        weight = weight.reshape(shape.filters, shape.channels, *shape.kernel)
        self.convolution: ExactConvolution = choose_convolution(
            weight, shape, interval, dtype, cores
        )
        self.pool_size: Size = (1, 1, 1) if task.pool is None else task.pool.kernel
        # Scaling is monotone: the largest sum gives the largest code, so sums can be pooled before
        # they are scaled, which is less work. Not with a shortcut, which differs within a window,
        # and not if a window crosses the edge of a Winograd tile. Then codes are pooled.
        self.pools_sums = task.pool is None or task.shortcut is None
        if isinstance(self.convolution, WinogradConvolution):
            self.pools_sums = self.pools_sums and self.convolution.can_pool(self.pool_size)
        elif self.pools_sums:
            self.convolution.align_blocks(self.pool_size[0], self.pool_size[1])
        self.codes = self.target
        if not self.pools_sums:
            size = (*shape.out_size, shape.filters)
            codes = shared_array(math.prod(size) * self.target.itemsize)
            self.codes = codes.view(self.target.dtype).reshape(size)
        self.padded_shape = (*self.convolution.in_size, shape.channels)
        workspace.reserve(self.padded_shape, self.convolution.map_dtype)

    def run(self, parallel_for: ParallelFor) -> None:
        """Read the source, write the target."""
        padded = self._pad(parallel_for)
        convolution, pool = self.convolution, self.pool_size
        if isinstance(convolution, WinogradConvolution):
            pooled = pool if self.pools_sums else (1, 1, 1)
            parallel_for(
                lambda job: convolution.run(padded, job, self._store, pooled), convolution.jobs
            )
        else:
            parallel_for(
                lambda job: convolution.run(padded, job, self._pool_and_store), convolution.jobs
            )
        if not self.pools_sums:
            depths = split_evenly(self.target.shape[0], self.target.shape[0])
            parallel_for(self._pool_codes, depths)

    def _pool_and_store(self, sums: Array, outputs: OutputSlices, filters: slice) -> None:
        """Pool the sums if `pools_sums`, then store them. A block of sums holds whole windows."""
        if self.pools_sums and self.task.pool is not None:
            sums = _max_windows(sums, self.pool_size)
            d, h, w = (
                slice(s.start // p, s.start // p + n)
                for s, p, n in zip(outputs, self.pool_size, sums.shape, strict=False)
            )
            outputs = (d, h, w)
        self._store(sums, outputs, filters)

    def _store(self, sums: Array, outputs: OutputSlices, filters: slice) -> None:
        """Scale sums to codes; sums past the end of the map are dropped."""
        target = self.codes[(*outputs, filters)]
        depth, height, width = target.shape[:3]
        shortcut = None
        if self.shortcut is not None:
            shortcut = np.ascontiguousarray(self.shortcut[(*outputs, filters)])
        self.scaling.store(sums[:depth, :height, :width], target, filters, shortcut)

    def _pool_codes(self, depths: slice) -> None:
        """Pool the stored codes into some depths of the target."""
        step = self.pool_size[0]
        codes = self.codes[depths.start * step : depths.stop * step]
        self.target[depths] = _max_windows(codes, self.pool_size)

    def _pad(self, parallel_for: ParallelFor) -> Array:
        """The input less its zero point, padded with zeros to the convolution's `in_size`."""
        convolution = self.convolution
        padded = self.workspace.take(self.padded_shape, convolution.map_dtype)
        if isinstance(convolution, PlanarConvolution):
            # [D / sd, sd, H / sh, sh, W / sw, sw, N], a strided view of the planar layout
            phases = convolution.map_view(padded)
            parallel_for(
                lambda d: _fill_phases(phases, d, self.source, self.task), range(phases.shape[0])
            )
            return padded
        parallel_for(
            lambda depths: _fill_padded(padded[depths], depths.start, self.source, self.task),
            split_evenly(len(padded), 4 * self.cores),
        )
        return padded


def _fill_padded(slab: Array, first: int, source: Array, task: ConvTask) -> None:
    """Fill depths of a padded map, from `first` on: the source less its zero point, zeros around.

    Rows and columns of the source that the padded map has no room for are dropped: no output
    reads them.
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
    inside = source[offset : offset + end - begin]
    np.subtract(
        inside[:, : rows.stop - rows.start, : columns.stop - columns.start],
        slab.dtype.type(task.in_zero),
        out=body[:, rows, columns],
        casting="unsafe",
        dtype=slab.dtype,
    )


def _fill_phases(phases: Array, block: int, source: Array, task: ConvTask) -> None:
    """Fill `sd` depths of a planar map, viewed as [D / sd, sd, H / sh, sh, W / sw, sw, N].

    The depths are filled in a contiguous copy first: the view's axes cannot be merged.
    """
    _, sd, h, sh, w, sw, n = phases.shape
    slab = scratch("planar slab", (sd, h * sh, w * sw, n), phases.dtype)
    _fill_padded(slab, block * sd, source, task)
    phases[block] = slab.reshape(sd, h, sh, w, sw, n)


def _max_windows(values: Array, size: Size) -> Array:
    """The largest of each window of `size` outputs [D, H, W, M]; a rest of a window is dropped."""
    for axis, window in enumerate(size):
        if window == 1:
            continue
        count = values.shape[axis] // window
        lead = (slice(None),) * axis
        views = [values[(*lead, slice(i, count * window, window))] for i in range(window)]
        largest = np.maximum(views[0], views[1])
        for view in views[2:]:
            np.maximum(largest, view, out=largest)
        values = largest
    return values


class PoolStep:
    """A pool task prepared to run. A window is reduced along one axis after the other."""

    def __init__(self, task: PoolTask, program: Program, maps: list[Array]) -> None:
        self.task = task
        self.source = _slot_view(maps, task.source, task.shape.channels)
        self.target = _slot_view(maps, task.target, task.shape.channels)
        self.counters = count_task(program, task)
        factor_is_one = (task.mult, task.shift) == (1 << 14, 14)
        self.rescales = not factor_is_one or task.in_zero != task.out.zero_point

    def run(self, parallel_for: ParallelFor) -> None:
        """Read the source, write the target."""
        depth = self.task.shape.out_size[0]
        pool = self._mean if self.task.average else self._largest
        parallel_for(pool, split_evenly(depth, depth))

    def _largest(self, depths: slice) -> None:
        """Some depths of a max pool. Padding never is the largest."""
        task, lowest = self.task, int(np.iinfo(self.source.dtype).min)
        codes = self._reduce(self.source, depths, np.maximum, lowest)
        if self.rescales:
            self._store(codes.astype(np.int64) - task.in_zero, depths)
        else:
            np.clip(codes, task.lo, task.hi, out=self.target[depths])

    def _mean(self, depths: slice) -> None:
        """Some depths of an average pool. The multiplier divides by the size of a window."""
        values = self.source.astype(np.int64) - self.task.in_zero
        self._store(self._reduce(values, depths, np.add, 0), depths)

    def _reduce(self, values: Array, depths: slice, combine: np.ufunc, padding: int) -> Array:
        """Some depths of the output, combined from `values` [D, H, W, C]."""
        shape = self.task.shape
        for axis in range(3):
            # depth first, which leaves only the depths that are needed to the other axes
            outputs = range(shape.out_size[axis])
            if axis == 0:
                outputs = outputs[depths]
            values = _reduce_axis(values, shape, axis, outputs, combine, padding)
        return values

    def _store(self, values: Array, depths: slice) -> None:
        """Scale int64 values (zero point removed) to codes of the target."""
        task = self.task
        codes = rshift(values * np.int64(task.mult), task.shift) + task.out.zero_point
        np.clip(codes, task.lo, task.hi, out=self.target[depths], casting="unsafe")


def _reduce_axis(
    values: Array, shape: WindowShape, axis: int, outputs: range, combine: np.ufunc, padding: int
) -> Array:
    """Combine the windows of some outputs along one axis of [D, H, W, C]."""
    kernel, stride, before = shape.kernel[axis], shape.stride[axis], shape.pad_before[axis]
    first, last = outputs[0] * stride - before, outputs[-1] * stride - before + kernel
    size = values.shape[axis]
    lead = (slice(None),) * axis
    inside = values[(*lead, slice(max(first, 0), min(last, size)))]
    if kernel == 1 and stride == 1:
        return inside
    if first < 0 or last > size:
        widths = [(0, 0)] * 4
        widths[axis] = (max(-first, 0), max(last - size, 0))
        inside = np.pad(inside, widths, constant_values=padding)
    span = (len(outputs) - 1) * stride + 1
    result: Array = inside[(*lead, slice(0, span, stride))].copy()
    for tap in range(1, kernel):
        combine(result, inside[(*lead, slice(tap, tap + span, stride))], out=result)
    return result


def _slot_view(maps: list[Array], slot: Slot, channels: int) -> Array:
    """The channels of a slot [D, H, W, channels]: a view of its map."""
    return maps[slot.buffer][..., slot.channel : slot.channel + channels]
