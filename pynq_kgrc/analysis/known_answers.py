"""Programs with known answers, for every mode of a design and for every port to its memory.

The self-test of a board (`selftest`) runs them, and the test bench of the HLS sources gets one of
them (hls_src/scripts/vectors.py). The answers are the emulation's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.tiling import Work, tiles
from pynq_kgrc.backends.emulation.backend import Emulation
from pynq_kgrc.backends.image import decode_map
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compiler.pack import pack
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.compress.patterns import Rates, project
from pynq_kgrc.graph import (
    ADD,
    AVERAGE_POOL,
    CONV,
    INPUT,
    MAX_POOL,
    ClipSpec,
    ConvShape,
    Graph,
    Layer,
    Size,
    WindowShape,
)
from pynq_kgrc.program import (
    ALIGNMENT,
    Buffer,
    ConvTask,
    PoolTask,
    Program,
    Shortcut,
    Slot,
    Task,
)
from pynq_kgrc.quant import (
    ACCUMULATOR_BITS,
    Array,
    QuantParams,
    ceil_div,
    code_dtype,
    multiplier,
    weight_limit,
)

ONE = (1, 1, 1)

CLIP = (5, 15, 15)
"""Size of the clip of `random_program`."""

ONE_MULT, ONE_SHIFT = multiplier(1.0, "a copy")


@dataclass(frozen=True, eq=False)
class KnownAnswer:
    """A program, some clips, and what each task makes of them."""

    name: str
    program: Program
    clips: tuple[Array, ...]
    """Codes [C, D, H, W] of `program.source`."""
    outputs: tuple[tuple[Array, ...], ...]
    """For each clip and each task the codes [C, D, H, W] that it writes."""


@dataclass(frozen=True, eq=False)
class PortAnswer:
    """A known answer of one task, whose bits show which port carried them wrongly."""

    answer: KnownAnswer
    ports: tuple[str, ...]
    """What may have carried an element wrongly: ports of `header.ADDRESSES`."""
    port: Array
    """The index in `ports` for each element of the output, as far as it is known: an array that
    broadcasts to [C, D, H, W]."""
    line: Array | None
    """The bit of that port's beat that carries bit 0 of the element; broadcasts as `port`. None if
    an element of the output does not show bits of a beat."""
    lines: int
    """Bits of a beat of those ports."""


def answer(name: str, program: Program, clips: Sequence[Array]) -> KnownAnswer:
    """The emulation's answer of every task to every clip."""
    outputs = []
    emulation = Emulation(program.config)
    try:
        emulation.load(program)
        for codes in clips:
            emulation.write(program.source, codes)
            found = []
            for number, task in enumerate(program.tasks):
                emulation.run(number, number + 1)
                found.append(emulation.read(task.target, task.shape.out_channels, task.out_size))
            outputs.append(tuple(found))
    finally:
        emulation.close()
    return KnownAnswer(name, program, tuple(clips), tuple(outputs))


def random_codes(program: Program, seed: int) -> Array:
    """Codes of the program's input over the whole range of their type, [C, D, H, W]."""
    window = program.clip_window
    shape = (window.channels * window.taps, *window.out_size)
    rng = np.random.default_rng(seed)
    low, high = program.input.min, program.input.max
    return rng.integers(low, high + 1, shape).astype(program.input.dtype)


def random_answer(name: str, program: Program) -> KnownAnswer:
    """A program's answers to two clips of random codes."""
    return answer(name, program, [random_codes(program, seed) for seed in (0, 1)])


# ---- networks -------------------------------------------------------------------------------


class _Network:
    """A random network, grown layer by layer; each layer reads the one before."""

    def __init__(self, size: Size, rng: np.random.Generator) -> None:
        self.size, self.rng = size, rng
        self.layers = [Layer("clip", INPUT, (), 3, size)]

    def convolve(
        self,
        name: str,
        filters: int,
        kernel: Size,
        stride: Size = ONE,
        pad: Size = (0, 0, 0),
        pruned: tuple[AcceleratorConfig, Rates] | None = None,
    ) -> None:
        source = self.layers[-1]
        shape = ConvShape(source.channels, source.size, kernel, stride, pad, pad, filters)
        weight = self.rng.normal(0, 1, (filters, source.channels, *kernel)).astype(np.float32)
        if pruned is not None:
            config, rates = pruned
            weight = project(weight, rates, config.group_size)
            weight[: config.gm, : config.tn] = 0  # a group that is not enabled
        bias = self.rng.normal(0, 1, filters)
        self.layers.append(
            Layer(name, CONV, (source.name,), filters, shape.out_size, shape, weight, bias, "relu")
        )

    def pool(self, name: str, *window: Size, op: str = MAX_POOL) -> None:
        source = self.layers[-1]
        shape = WindowShape(source.channels, source.size, *window)
        self.layers.append(Layer(name, op, (source.name,), source.channels, shape.out_size, shape))

    def graph(self, name: str) -> Graph:
        clip = ClipSpec(self.size[0], self.size[1], self.size[2], self.size[1])
        return Graph(name, tuple(self.layers), self.layers[-1].name, clip)

    def program(self, name: str, config: AcceleratorConfig, *, fold: bool = False) -> Program:
        clips = [
            np.clip(self.rng.normal(0, 0.5, (3, *self.size)), -1, 1).astype(np.float32)
            for _ in range(2)
        ]
        graph = choose_quant(self.graph(name), clips, config.bits, "minmax")
        return lower(graph, config, fold=fold)


def mode_rates(config: AcceleratorConfig, taps: int) -> dict[str, Rates]:
    """Rates that keep half of the rows, a third of the columns, and both, by mode."""
    gm, gk = config.gm, config.group_size.columns(taps)
    rows, cols = Fraction(gm - ceil_div(gm, 2), gm), Fraction(gk - ceil_div(gk, 3), gk)
    return {"KGR": Rates(rows=rows), "KGC": Rates(cols=cols), "KGRC": Rates(rows=rows, cols=cols)}


def random_program(config: AcceleratorConfig, seed: int) -> Program:
    """A network with a layer of each kind, its weights pruned in the design's kernel groups.

    It has a convolution in several tiles with a fused pool, strides, pruned groups, a shortcut, an
    overlapping pool and a fully connected layer with wide outputs.
    """
    net = _Network(CLIP, np.random.default_rng(seed))
    rates = mode_rates(config, 27)
    net.convolve("tiles", 17, (3, 3, 3), pad=ONE, pruned=(config, rates["KGC"]))
    net.pool("fused", (1, 2, 2), (1, 2, 2))
    net.convolve("strided", 24, (3, 3, 3), (2, 2, 2), ONE, (config, rates["KGRC"]))
    body = net.layers[-1]
    net.convolve("thin", 24, (3, 1, 1), pad=(1, 0, 0), pruned=(config, rates["KGR"]))
    net.layers.append(Layer("sum", ADD, ("thin", body.name), 24, body.size, activation="relu"))
    net.pool("overlapping", (3, 3, 3), (1, 1, 1), ONE, ONE)
    net.convolve("wide", 2 * config.tm + 1, ONE)
    net.convolve("classes", 11, net.layers[-1].size)
    return net.program("every kind of layer", config)


def mode_programs(config: AcceleratorConfig) -> dict[str, Program]:
    """For each mode that a design has, a program of one layer in this mode after a dense one."""
    programs = {}
    rates = mode_rates(config, 27) if config.sparse else {}
    for mode in ("dense", *rates):
        net = _Network((3, 8, 9), np.random.default_rng(3))
        net.convolve("first", 2 * config.tn, (1, 3, 3), pad=(0, 1, 1))
        pruned = (config, rates[mode]) if mode in rates else None
        net.convolve(mode, config.tm + config.gm, (3, 3, 3), pad=ONE, pruned=pruned)
        net.convolve("last", config.tn, ONE)
        programs[mode] = net.program(mode, config)
    return programs


def pool_program(config: AcceleratorConfig) -> Program:
    """Averages and maxima in windows that overlap and are padded."""
    net = _Network((4, 9, 10), np.random.default_rng(4))
    net.convolve("first", config.tn + 1, ONE)
    net.pool("average", (2, 3, 3), (1, 2, 2), op=AVERAGE_POOL)
    net.pool("maximum", (3, 3, 3), (1, 1, 1), ONE, ONE)
    net.pool("mean", net.layers[-1].size, ONE, op=AVERAGE_POOL)
    net.convolve("last", 5, ONE)
    return net.program("pools", config)


def folded_program(config: AcceleratorConfig) -> Program:
    """A first convolution whose taps the host writes as channels, where that pays on the design."""
    net = _Network((6, 24, 24), np.random.default_rng(5))
    net.convolve("first", config.tm, (3, 7, 7), (1, 2, 2), (1, 3, 3))
    net.convolve("last", 5, ONE)
    return net.program("folded", config, fold=True)


def timing_program(config: AcceleratorConfig) -> Program:
    """Layers of the sizes that networks have: bound by the array, by the weights, by the maps."""
    net = _Network((8, 28, 28), np.random.default_rng(6))
    net.convolve("entry", 2 * config.tn, (1, 3, 3), pad=(0, 1, 1))
    net.convolve("array", 2 * config.tm, (3, 3, 3), pad=ONE)
    net.convolve("maps", 2 * config.tn, ONE)
    net.pool("pool", (2, 4, 4), (2, 4, 4))
    net.convolve("weights", 4 * config.tm, (3, 3, 3), pad=ONE)
    net.pool("mean", net.layers[-1].size, ONE, op=AVERAGE_POOL)
    net.convolve("classes", 101, ONE)
    return net.program("timing", config)


def known_answers(config: AcceleratorConfig) -> list[KnownAnswer]:
    """The known answers of all modes of a design, of pools, and of a folded clip."""
    programs = [*mode_programs(config).values(), pool_program(config), folded_program(config)]
    return [random_answer(program.name, program) for program in programs]


# ---- ports to memory ------------------------------------------------------------------------


def port_answers(config: AcceleratorConfig) -> list[PortAnswer]:
    """Tasks whose answers show each bit that a port to memory carries.

    Maps (two input ports, output, shortcut) get beats with one bit set, with one bit clear,
    alternating and random bits, and 64-bit words that depend on their address. The weight ports
    get codes with one bit set or clear and random codes. Scales get a bias, multiplier and shift
    of one bit.
    """
    answers = [
        _copies(config, "walking bits", _walking_beats(config)),
        _copies(config, "addresses", _address_beats(config)),
        _shortcut_answer(config),
        _weight_answer(config),
        _scale_answer(config),
    ]
    if config.sparse:
        answers.append(_index_answer(config))
    return answers


def _map_lines(config: AcceleratorConfig, channels: int, width: int) -> Array:
    """The bit of its beat that carries bit 0 of each code, [C, 1, 1, W]."""
    within = np.arange(width) % config.port_positions * config.tn
    places = within[None] + (np.arange(channels) % config.tn)[:, None]
    lines: Array = (places * config.bits)[:, None, None, :]
    return lines


def _walking_beats(config: AcceleratorConfig) -> Array:
    """Beats with one bit set, one clear, alternating and random bits: uint8 [N, bytes]."""
    count = config.beat_bytes
    ones = np.packbits(np.eye(8 * count, dtype=np.uint8), axis=1, bitorder="little")
    alternating = np.array([[0xAA], [0x55]], np.uint8).repeat(count, axis=1)
    noise = np.random.default_rng(7).integers(0, 256, ones.shape).astype(np.uint8)
    return np.concatenate([ones, ~ones, alternating, noise])


def _address_beats(config: AcceleratorConfig) -> Array:
    """Beats whose 64-bit words are hashes of their own address: uint8 [N, bytes], 64 KiB."""
    words = np.arange((1 << 16) // 8, dtype=np.uint64)
    # the finalizer of splitmix64 (Steele et al., OOPSLA 2014): neighbours differ in half the bits
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ words >> np.uint64(shift)) * np.uint64(factor)
    words = words ^ words >> np.uint64(31)
    return words.view(np.uint8).reshape(-1, config.beat_bytes)


PLANES, ROW_BEATS = 4, 4
"""Depth of the maps that are copied, and beats of their rows."""


def _copies(config: AcceleratorConfig, name: str, beats: Array) -> PortAnswer:
    """A map that a task reads by both input ports and writes; each port carries all `beats`."""
    height = ceil_div(2 * len(beats), PLANES * ROW_BEATS) + 1
    size = (PLANES, height, ROW_BEATS * config.port_positions)
    shape = WindowShape(config.tn, size, ONE)
    out = QuantParams(config.bits, 1.0)
    task = PoolTask(
        name=name,
        shape=shape,
        average=False,
        source=Slot(0, 0),
        target=Slot(1, 0),
        in_zero=0,
        out=out,
        lo=out.min,
        hi=out.max,
        mult=ONE_MULT,
        shift=ONE_SHIFT,
    )
    program = _program(config, [task], [(config.tn, size)] * 2, [config.bits] * 2)
    port = input_ports(program.work(task), size)
    of_beat = port[..., :: config.port_positions].ravel()
    rank = np.where(of_beat, np.cumsum(of_beat), np.cumsum(1 - of_beat)) - 1
    raw = beats[rank % len(beats)].ravel()
    codes = decode_map(config, raw, config.tn, size, config.bits)
    return PortAnswer(
        answer(name, program, [codes]),
        ("input0", "input1", "output"),
        port[None],
        _map_lines(config, config.tn, size[2]),
        8 * config.beat_bytes,
    )


def input_ports(work: Work, size: Size) -> Array:
    """Which input port reads each position [D, H, W] of one vector, for windows of one position.

    Plane n of a task, counted over all its regions, is read by port n % 2 (hls_src/memory.cpp).
    """
    port = np.zeros(size, np.int64)
    count = 0
    for first, extent in tiles(work.out_size, work.tile):
        (d, h, w), (planes, rows, width) = first, extent
        for plane in range(planes):
            port[d + plane, h : h + rows, w : w + width] = count % 2
            count += 1
    return port


def _shortcut_answer(config: AcceleratorConfig) -> PortAnswer:
    """A map that is added to sums of zero: what is read by the port `shortcut` is written."""
    beats = _walking_beats(config)
    size = (1, ceil_div(len(beats), ROW_BEATS), ROW_BEATS * config.port_positions)
    count = size[1] * ROW_BEATS
    codes = decode_map(
        config, np.resize(beats, (count, config.beat_bytes)).ravel(), config.tn, size, config.bits
    )
    shape = ConvShape(config.tn, size, ONE, filters=config.tn)
    task = _convolution(
        config,
        "shortcut",
        shape,
        np.zeros((config.tn, config.tn, 1), np.int64),
        shortcut=Shortcut(Slot(0, 0), 0, ONE_MULT, ONE_SHIFT),
    )
    program = _program(config, [task], [(config.tn, size)] * 2, [config.bits] * 2)
    return PortAnswer(
        answer("shortcut", program, [codes]),
        ("shortcut", "output"),
        np.zeros((1, 1, 1, 1), np.int64),
        _map_lines(config, config.tn, size[2]),
        8 * config.beat_bytes,
    )


def _weight_answer(config: AcceleratorConfig) -> PortAnswer:
    """A convolution whose outputs are its weights: output j sees input 1 at one channel and tap."""
    filters, channels, taps = 4 * config.tm, 2 * config.tn, 3 * config.pk
    outputs = channels * taps
    shape = ConvShape(channels, (1, 1, outputs * taps), (1, 1, taps), (1, 1, taps), filters=filters)
    columns = config.group_size.columns(taps)
    m, n, k = np.ogrid[:filters, :channels, :taps]
    row_steps, col_steps = ceil_div(config.gm, config.rows_per_cycle), ceil_div(columns, config.pk)
    row_step, row = np.divmod(m % config.gm, config.rows_per_cycle)
    col_step, col = np.divmod(k % columns, config.pk)
    place = (col * config.rows_per_cycle + row) * config.tn + n % config.tn
    word = (k // columns * col_steps + col_step) * row_steps + row_step
    lines = 64 * config.weight_port_words
    line = place * config.bits % lines

    limit = weight_limit(config.bits)
    bits = 1 << np.arange(config.bits - 1)
    walk = np.concatenate([bits, -1 - bits, [limit, -limit, 0, -1]])
    walking = walk[(place + word + m // config.gm + n // config.tn) % len(walk)]
    noise = np.random.default_rng(8).integers(-limit, limit + 1, (filters, channels, taps))
    codes = np.where(m < filters // 2, walking, noise)
    task = _convolution(config, "weights", shape, codes)
    program = _program(
        config,
        [task],
        [(channels, shape.in_size), (filters, shape.out_size)],
        [config.bits] * 2,
    )
    clip = np.zeros((channels, 1, 1, outputs * taps), code_dtype(config.bits))
    at = np.arange(outputs)
    clip[at // taps, 0, 0, at * taps + at % taps] = 1
    # chunks are counted as the ports read them: items, their weight words, their kernel groups
    work = program.work(task)
    first = np.zeros((ceil_div(filters, config.gm), channels // config.tn), np.int64)
    step = np.zeros_like(first)
    count = 0
    for item in work.items:
        on = [g for g in range(config.groups_per_tile) if item.mask >> g & 1]
        for i, group in enumerate(on):
            at_group = item.filter_tile * config.groups_per_tile + group, item.channel_tile
            first[at_group], step[at_group] = count + i, len(on)
        count += len(on) * work.weight_words
    groups = m // config.gm, n // config.tn
    chunk = first[groups] + word * step[groups]

    def by_output(array: Array) -> Array:
        full: Array = np.broadcast_to(array, (filters, channels, taps))
        return full.reshape(filters, 1, 1, outputs)

    return PortAnswer(
        answer("weights", program, [clip]),
        ("weights0", "weights1", "output"),
        by_output(chunk % 2),
        by_output(line),
        lines,
    )


def _scale_answer(config: AcceleratorConfig) -> PortAnswer:
    """Sums of zero with a bias, a multiplier and a shift of one bit set or clear per filter."""
    one = 1 << 14
    scales = [(1, one | 1 << b, 0) for b in range(14)]
    scales += [(1, (2 * one - 1) ^ 1 << b, 0) for b in range(14)]
    for b in range(ACCUMULATOR_BITS[config.bits] - 1):
        shift = 14 + max(0, b - 13)
        scales += [(1 << b, one, shift), (~(1 << b), one, shift)]
    scales += [(1 << min(30, max(0, s - 1)), one, s) for s in range(45)]
    bias, mult, shift = np.array(scales).T
    shape = ConvShape(config.tn, ONE, ONE, filters=len(scales))
    task = _convolution(
        config,
        "scales",
        shape,
        np.zeros((len(scales), config.tn, 1), np.int64),
        out_bits=16,
        scales=(bias, mult, shift),
    )
    program = _program(config, [task], [(config.tn, ONE), (len(scales), ONE)], [config.bits, 16])
    return PortAnswer(
        answer("scales", program, [np.zeros((config.tn, 1, 1, 1), code_dtype(config.bits))]),
        ("scales", "output"),
        np.zeros((1, 1, 1, 1), np.int64),
        None,
        64,
    )


def _index_answer(config: AcceleratorConfig) -> PortAnswer:
    """A convolution in the mode KGRC: a wrong index multiplies another input."""
    shape = ConvShape(2 * config.tn, (3, 6, 8), (3, 3, 3), ONE, ONE, ONE, filters=2 * config.tm)
    rng = np.random.default_rng(9)
    weight = rng.normal(0, 1, (shape.filters, shape.channels, 3, 3, 3))
    weight = project(weight, mode_rates(config, 27)["KGRC"], config.group_size)
    limit = weight_limit(config.bits)
    codes = np.clip(np.round(weight * limit / 3), -limit, limit).reshape(*weight.shape[:2], 27)
    real = 1 / (limit * math.sqrt(shape.channels * 27 / 6))
    mult, shift = multiplier(real, "indices")
    ones = np.ones(shape.filters, np.int64)
    task = _convolution(
        config,
        "indices",
        shape,
        codes.astype(np.int64),
        scales=(0 * ones, mult * ones, shift * ones),
    )
    sizes = [(shape.channels, shape.in_size), (shape.filters, shape.out_size)]
    program = _program(config, [task], sizes, [config.bits] * 2)
    quant = program.input
    clip = rng.integers(quant.min, quant.max + 1, (shape.channels, *shape.in_size))
    return PortAnswer(
        answer("indices", program, [clip.astype(quant.dtype)]),
        ("indices", "items"),
        np.zeros((1, 1, 1, 1), np.int64),
        None,
        64,
    )


def _convolution(
    config: AcceleratorConfig,
    name: str,
    shape: ConvShape,
    weight: Array,
    *,
    out_bits: int | None = None,
    scales: tuple[Array, Array, Array] | None = None,
    shortcut: Shortcut | None = None,
) -> ConvTask:
    """A convolution of codes [M, N, K] from buffer 0 to buffer 1; copies its sums by default."""
    out = QuantParams(out_bits or config.bits, 1.0)
    ones = np.ones(shape.filters, np.int64)
    bias, mult, shift = scales or (0 * ones, ONE_MULT * ones, ONE_SHIFT * ones)
    return ConvTask(
        name=name,
        shape=shape,
        source=Slot(0, 0),
        target=Slot(1, 0),
        in_zero=0,
        out=out,
        lo=out.min,
        hi=out.max,
        weights=pack(weight.astype(code_dtype(config.bits)), config),
        bias=bias.astype(np.int64),
        mult=mult.astype(np.int32),
        shift=shift.astype(np.uint8),
        shortcut=shortcut,
    )


def _program(
    config: AcceleratorConfig,
    tasks: Sequence[Task],
    maps: Sequence[tuple[int, Size]],
    bits: Sequence[int],
) -> Program:
    """A program without a network: the buffers lie one behind the other, the first is the input."""
    buffers: list[Buffer] = []
    end = 0
    for (channels, size), each in zip(maps, bits, strict=True):
        buffer = Buffer(channels, size, each, ceil_div(end, ALIGNMENT) * ALIGNMENT)
        end = buffer.offset + buffer.nbytes(config)
        buffers.append(buffer)
    return Program(
        name=tasks[-1].name,
        config=config,
        clip=ClipSpec(1, 1, 1, 1),
        labels=(),
        input=QuantParams(config.bits, 1.0),
        source=tasks[0].source,
        target=tasks[-1].target,
        output=tasks[-1].out,
        buffers=tuple(buffers),
        arena_bytes=end,
        tasks=tuple(tasks),
    )
