"""The formulas of docs/equations.md as plain loops over Python integers, for tiny shapes.

Nothing here is shared with the package's arithmetic: rounding, clamping, unpacking of compact
weights and placement are all written out again.
"""

import itertools

import numpy as np

from pynq_kgrc.program import ConvTask, Program


def shift_right(value, shift):
    return value if shift == 0 else (value + (1 << (shift - 1))) >> shift


def dense_weight(task, program):
    """{(filter, channel, tap): code} of the non-zero kept weights in enabled groups."""
    config, weights, found = program.config, task.weights, {}
    gk = min(task.shape.taps, config.tk)
    p, q, t, kr, gn, kc = weights.values.shape
    for i, j, u, r, n, c in itertools.product(*map(range, (p, q, t, kr, gn, kc))):
        value = int(weights.values[i, j, u, r, n, c])
        if value and weights.enabled[i, j]:
            m = i * config.gm + int(weights.rows[i, j, r])
            k = u * gk + int(weights.cols[i, j, u, c])
            found[m, j * config.tn + n, k] = value
    return found


def run_conv(task, program, source, shortcut):
    """Codes [M, D, H, W] before the pool."""
    shape = task.shape
    depth, height, width = shape.out_size
    out = np.zeros((shape.filters, depth, height, width), np.int64)
    acc = np.zeros(out.shape, np.int64)
    widths = [(0, 0), *zip(shape.pad_before, shape.pad_after, strict=True)]
    padded = np.pad(source.astype(np.int64), widths, constant_values=task.in_zero)
    taps = list(np.ndindex(*shape.kernel))
    for (m, n, k), weight in dense_weight(task, program).items():
        inputs = padded[n]
        for axis, (first, stride) in enumerate(zip(taps[k], shape.stride, strict=True)):
            places = [first + f * stride for f in range(shape.out_size[axis])]
            inputs = inputs.take(places, axis)
        acc[m] += weight * inputs
    for m, d, h, w in np.ndindex(*out.shape):
        total = int(acc[m, d, h, w])
        code = shift_right((total + int(task.bias[m])) * int(task.mult[m]), int(task.shift[m]))
        if task.shortcut is not None:
            r = task.shortcut
            code += shift_right((int(shortcut[m, d, h, w]) - r.zero_point) * r.mult, r.shift)
        out[m, d, h, w] = min(max(code + task.out.zero_point, task.lo), task.hi)
    return out


def windows(shape, source):
    """Yield for each output: its index, the codes in its window, the number of padded places."""
    for c, d, h, w in np.ndindex(shape.channels, *shape.out_size):
        inside, outside = [], 0
        for tap in np.ndindex(*shape.kernel):
            at = [
                f * s + k - b
                for f, s, k, b in zip((d, h, w), shape.stride, tap, shape.pad_before, strict=True)
            ]
            if all(0 <= a < size for a, size in zip(at, shape.in_size, strict=True)):
                inside.append(int(source[(c, *at)]))
            else:
                outside += 1
        yield (c, d, h, w), inside, outside


def run_max(shape, source):
    out = np.zeros((shape.channels, *shape.out_size), np.int64)
    for at, inside, _ in windows(shape, source):
        out[at] = max(inside)
    return out


def run_pool(task, source):
    out = np.zeros((task.shape.channels, *task.shape.out_size), np.int64)
    for at, inside, _ in windows(task.shape, source):
        if task.average:
            value = sum(code - task.in_zero for code in inside)
        else:
            value = max(inside) - task.in_zero
        code = shift_right(value * task.mult, task.shift) + task.out.zero_point
        out[at] = min(max(code, task.lo), task.hi)
    return out


def run_program(program: Program, clip):
    """The output codes of every task, by name, for input codes [C, D, H, W]."""
    maps = [np.zeros((b.channels, *b.size), np.int64) for b in program.buffers]

    def view(slot, channels):
        return maps[slot.buffer][slot.channel : slot.channel + channels]

    view(program.source, clip.shape[0])[...] = clip
    outputs = {}
    for task in program.tasks:
        source = view(task.source, task.shape.channels).copy()
        if isinstance(task, ConvTask):
            shortcut = None
            if task.shortcut is not None:
                shortcut = view(task.shortcut.source, task.shape.filters).copy()
            out = run_conv(task, program, source, shortcut)
            if task.pool is not None:
                out = run_max(task.pool, out)
        else:
            out = run_pool(task, source)
        view(task.target, out.shape[0])[...] = out
        outputs[task.name] = out
    return outputs
