"""Whole networks at full size: compiled, saved, loaded, run, and checked in two ways."""

import csv
from importlib import import_module

import numpy as np
import pytest

from pynq_kgrc.accelerator.config import preset
from pynq_kgrc.backends.emulation import backend as emulation
from pynq_kgrc.backends.emulation.exact import FLOAT64, GemmConvolution
from pynq_kgrc.compiler.network import compile_graph
from pynq_kgrc.compress.patterns import recipe
from pynq_kgrc.graph import run_float
from pynq_kgrc.models import NETWORKS
from pynq_kgrc.program import ConvTask, load
from pynq_kgrc.runtime import Session
from pynq_kgrc.video import load_clip


def seeded_graph(network):
    """A network with seeded weights and, in batch norms, seeded statistics."""
    import torch

    from pynq_kgrc.models.trace import trace

    name, build = NETWORKS[network]
    module = import_module(name)
    torch.manual_seed(0)
    built = getattr(module, build)(classes=101)
    for part in built.modules():
        if isinstance(part, torch.nn.BatchNorm3d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    return trace(built, module.CLIP, name=network)


CASES = [
    pytest.param(network, pattern, bits, marks=() if quick else pytest.mark.slow)
    for network in ("c3d", "r2plus1d_18")
    for pattern in ("dense", "kgrc")
    for bits in (16, 8, 4)
    for quick in [(pattern, bits) == ("kgrc", 8)]
]


@pytest.mark.parametrize(("network", "pattern", "bits"), CASES)
def test_compile_save_load_run(network, pattern, bits, example_clips, tmp_path, monkeypatch):
    graph = seeded_graph(network)
    clips = [
        load_clip(path, graph.clip).frames
        for path in sorted((example_clips / "calibration").glob("*.avi"))
    ]
    rates = {} if pattern == "dense" else recipe(network, pattern)
    config = preset(f"{bits}-sparse")
    program = compile_graph(graph, clips[:1], config, rates)
    path = tmp_path / "net.kgrc"
    program.save(path)
    program = load(path)
    modes = {
        task.weights.mode(config.gm, program.group_columns(task))
        for task in program.tasks
        if isinstance(task, ConvTask)
    }
    assert ("KGRC" in modes) == (pattern == "kgrc")
    with Session(program) as session:
        fast = {name: codes for name, codes, _ in session.trace(clips[1])}
        last = program.output.dequantize(fast[program.tasks[-1].name]).reshape(101)
        np.testing.assert_array_equal(session.run(clips[1]).logits, last)

    # again with float64 GEMMs only, whose sums are far below 2^53: no Winograd, no float32
    def plain(weight, shape, interval, dtype, threads):
        return GemmConvolution(weight, shape, interval, FLOAT64, threads)

    monkeypatch.setattr(emulation, "choose_convolution", plain)
    with Session(program) as session:
        for name, codes, _ in session.trace(clips[1]):
            np.testing.assert_array_equal(codes, fast[name], err_msg=name)
    if bits == 16:
        from pynq_kgrc.compress.patterns import prune

        wanted = run_float(prune(graph, rates), graph.clip.normalise(clips[1])).ravel()
        found = program.output.dequantize(fast[program.tasks[-1].name]).ravel()
        assert np.corrcoef(found, wanted)[0, 1] > 0.999


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.network
def test_i3d_is_right_wherever_float_is(i3d, shared_data):
    """On every real clip with a known nearest Kinetics class; float is right on 4 of 6."""
    graph, program = i3d
    labels = (shared_data / "labels" / "kinetics400.txt").read_text().split("\n")
    right = 0
    with Session(program) as session, (shared_data / "clips" / "index.csv").open() as index:
        for row in csv.DictReader(index):
            nearest = row["nearest_kinetics400_class"]
            if not nearest:
                continue
            frames = load_clip(shared_data / "clips" / row["file"], graph.clip).frames
            best = int(run_float(graph, graph.clip.normalise(frames)).argmax())
            if labels[best] == nearest:
                right += 1
                label = session.classify(frames).labels[0].label
                assert labels[int(label)] == nearest, row["file"]
    assert right == 4
