"""Small networks as graphs, without torch, for tests of everything below it."""

from dataclasses import replace

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.graph import ADD, CONCAT, CONV, INPUT, ClipSpec, ConvShape, Graph, Layer, WindowShape


def triple(value):
    return (value,) * 3 if isinstance(value, int) else tuple(value)


class Net:
    """Builds a graph layer by layer; every method returns the name of its output tensor."""

    def __init__(self, size=(4, 7, 7), seed=0, channels=3):
        self.rng = np.random.default_rng(seed)
        clip = Layer("clip", INPUT, (), channels, size)
        self.layers = {"clip": clip}

    def _add(self, layer):
        self.layers[layer.name] = layer
        return layer.name

    def _window(self, source, kernel, stride, pad, pad_after):
        before = triple(pad)
        after = before if pad_after is None else triple(pad_after)
        layer = self.layers[source]
        return layer, (triple(kernel), triple(stride), before, after)

    def conv(
        self,
        source,
        filters,
        kernel=3,
        stride=1,
        pad=1,
        pad_after=None,
        act="relu",
        name=None,
        kept=1.0,
    ):
        layer, window = self._window(source, kernel, stride, pad, pad_after)
        shape = ConvShape(layer.channels, layer.size, *window, filters=filters)
        weight = self.rng.normal(0, 1, (filters, layer.channels, *shape.kernel))
        weight *= np.sqrt(2 / max(1, kept * layer.channels * shape.taps))
        if kept < 1:
            weight *= self.rng.random(weight.shape) < kept
        bias = self.rng.normal(0, 0.1, filters)
        name = name or f"conv{len(self.layers)}"
        made = Layer(
            name,
            CONV,
            (source,),
            filters,
            shape.out_size,
            shape,
            weight.astype(np.float32),
            bias,
            act,
        )
        return self._add(made)

    def pool(self, source, kernel=2, stride=None, pad=0, pad_after=None, op="max_pool", act="none"):
        stride = kernel if stride is None else stride
        layer, window = self._window(source, kernel, stride, pad, pad_after)
        shape = WindowShape(layer.channels, layer.size, *window)
        made = Layer(
            f"pool{len(self.layers)}",
            op,
            (source,),
            layer.channels,
            shape.out_size,
            shape,
            activation=act,
        )
        return self._add(made)

    def add(self, a, b, act="relu"):
        layer = self.layers[a]
        name = f"add{len(self.layers)}"
        return self._add(Layer(name, ADD, (a, b), layer.channels, layer.size, activation=act))

    def concat(self, *sources):
        parts = [self.layers[name] for name in sources]
        channels = sum(part.channels for part in parts)
        name = f"concat{len(self.layers)}"
        return self._add(Layer(name, CONCAT, tuple(sources), channels, parts[0].size))

    def dense(self, source, classes, act="none"):
        """A fully connected layer: its kernel is the whole map."""
        return self.conv(source, classes, self.layers[source].size, 1, 0, act=act)

    def graph(self, name="net"):
        layers = tuple(self.layers.values())
        depth, height, width = layers[0].size
        return Graph(name, layers, layers[-1].name, ClipSpec(depth, height, width, height))

    def clips(self, count=2):
        first = self.layers["clip"]
        low = self.rng.normal(0, 0.5, (count, first.channels, *first.size))
        return list(np.clip(low, -1, 1).astype(np.float32))


def small_config(bits=8, sparse=True, **numbers):
    """Small hardware: T_M = 8, G_M = T_N = 4, tiles of 2 x 3 x 3 (house rule)."""
    chosen = dict(tm=8, tn=4, gm=4, pm=4, pk=3, pf=5, td=2, th=3, tw=8, filter_tiles=2)
    if not sparse:
        chosen["pm"] = 8
    return AcceleratorConfig(f"small-{bits}", bits, sparse, **{**chosen, **numbers})


def compiled(net, config=None, bits=8, method="minmax", fold=True):
    """The network of a `Net` as (program, quantized graph)."""
    config = config or small_config(bits)
    graph = choose_quant(net.graph(), net.clips(), config.bits, method)
    return lower(graph, config, fold=fold), graph


def stretched(program, gain):
    """The program with every multiplier `gain` bits larger: its outputs saturate."""
    import msgspec

    tasks = tuple(
        msgspec.structs.replace(
            task, shift=np.maximum(task.shift.astype(int) - gain, 0).astype("u1")
        )
        if hasattr(task, "weights")
        else task
        for task in program.tasks
    )
    return msgspec.structs.replace(program, tasks=tasks)


def random_codes(program, seed=0):
    """Input codes [C, D, H, W] over the whole range of the type."""
    buffer = program.buffers[program.source.buffer]
    quant = program.input
    rng = np.random.default_rng(seed)
    channels = program.tasks[0].shape.channels
    shape = (channels, *buffer.size)
    return rng.integers(quant.min, quant.max + 1, shape).astype(quant.dtype)


__all__ = ["Net", "compiled", "random_codes", "replace", "small_config", "stretched"]
