"""A folded first convolution: the host writes its taps as channels, and every code stays."""

import shutil
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from networks import Net, compiled, small_config
from reference import run_program
from test_program import outputs, set_in, with_all_groups, with_document

from pynq_kgrc.accelerator.boards import REFERENCE
from pynq_kgrc.accelerator.config import preset
from pynq_kgrc.accelerator.latency import layer_time
from pynq_kgrc.analysis.description import describe
from pynq_kgrc.backends.csim import CSimulation
from pynq_kgrc.backends.emulation.backend import Emulation
from pynq_kgrc.backends.emulation.choice import choose_convolution
from pynq_kgrc.backends.emulation.exact import FLOAT32, GemmConvolution
from pynq_kgrc.cli import main
from pynq_kgrc.compiler import fold, lower
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.errors import ProgramError
from pynq_kgrc.graph import CONV, ConvShape, Layer, WindowShape, pad_map, tap_views
from pynq_kgrc.program import load

ONE, NONE = (1, 1, 1), (0, 0, 0)
ZERO_POINTS = {16: 300, 8: -37, 4: 3}

WINDOWS = {
    "C3D": dict(kernel=3, stride=1, pad=1),
    "R(2+1)D": dict(kernel=(1, 7, 7), stride=(1, 2, 2), pad=(0, 3, 3)),
    "I3D": dict(kernel=(5, 5, 5), stride=2, pad=(1, 2, 1), pad_after=(2, 1, 2)),
    "kernels below and at their stride": dict(kernel=(1, 2, 2), stride=(2, 2, 3), pad=0),
    "padding on one side": dict(kernel=(2, 3, 4), stride=(1, 2, 1), pad=(1, 0, 3), pad_after=0),
}


def quantized(net, bits):
    """The graph of a net with a zero point of its clip that padding cannot hide behind."""
    graph = choose_quant(net.graph(), net.clips(), bits, "minmax")
    clip = graph.layers[0]
    format_ = replace(clip.out_quant, zero_point=ZERO_POINTS[bits])
    return replace(graph, layers=(replace(clip, out_quant=format_), *graph.layers[1:]))


def frames_of(program, seed=5):
    clip = program.clip
    shape = (clip.frames, clip.height, clip.width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def traced(program, backend=None):
    """The output codes of each task for a random clip."""
    emulation = backend or Emulation(program.config)
    emulation.load(program)
    emulation.write(program.source, program.encode_clip(frames_of(program)))
    found = {}
    for number, task in enumerate(program.tasks):
        emulation.run(number, number + 1)
        found[task.name] = emulation.read(task.target, task.shape.out_channels, task.out_size)
    emulation.close()
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, codes in wanted.items():
        np.testing.assert_array_equal(found[name], codes, name)


# ---- codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("window", WINDOWS)
def test_every_folding_gives_the_same_codes(window, bits, monkeypatch):
    """Folded along any of its axes, at each width, whatever the judge would say."""
    net = Net(size=(5, 9, 11), seed=len(window))
    net.dense(net.conv("clip", 6, **WINDOWS[window]), 3)
    graph, config = quantized(net, bits), small_config(bits)
    first = graph.convolutions()[0]
    wanted = traced(lower.lower(graph, config, fold=False))
    free = sum(k > 1 or s > 1 for k, s in zip(first.shape.kernel, first.shape.stride, strict=True))
    windows = set()
    for place in range(1, 2**free):
        monkeypatch.setattr(lower, "choose_folding", lambda *_, place=place, **__: place)
        program = lower.lower(graph, config)
        assert program.tasks[0].shape.channels == 3 * program.fold.taps
        assert program.tasks[0].shape.macs == first.shape.macs
        windows.add((program.fold.kernel, program.fold.stride))
        assert_same(traced(program), wanted)
    assert len(windows) == 2**free - 1


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_encoded_clip_is_the_padded_clip_tap_by_tap(bits):
    net = Net(size=(3, 8, 9))
    net.conv("clip", 8, (3, 4, 5), (1, 2, 2), (1, 2, 0), pad_after=(0, 3, 4))
    graph = quantized(net, bits)
    plain = lower.lower(graph, small_config(bits), fold=False)
    frames = frames_of(plain)
    kernel, stride, before, after = (2, 3, 5), (2, 1, 3), (1, 2, 0), (1, 0, 4)
    window = WindowShape(3, (3, 8, 9), kernel, stride, before, after)
    codes = msgspec.structs.replace(plain, fold=window).encode_clip(frames)
    padded = pad_map(plain.encode_clip(frames), window, ZERO_POINTS[bits])
    assert codes.dtype == plain.input.dtype
    np.testing.assert_array_equal(codes, np.concatenate(list(tap_views(padded, window))))
    with pytest.raises(ProgramError, match=r"takes uint8 frames of shape \(3, 8, 9, 3\)"):
        msgspec.structs.replace(plain, fold=window).encode_clip(frames[:2])


def network_of_tasks():
    """A folded layer with a pool in it, and a shortcut and a pool of their own after it."""
    net = Net(size=(4, 12, 16))
    stem = net.pool(net.conv("clip", 8, 3), (1, 2, 2))
    body = net.conv(stem, 8, act="none")
    net.dense(net.pool(net.add(stem, body), 3, 2, 1), 5)
    return net


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(("bits", "sparse"), [(16, True), (8, True), (8, False), (4, True)])
def test_a_folded_network_is_the_same_on_every_backend(bits, sparse, monkeypatch):
    # the judge may find no gain with memory: then the first axis is folded
    judged = lower.choose_folding
    monkeypatch.setattr(
        lower, "choose_folding", lambda *layer, **more: max(1, judged(*layer, **more))
    )
    graph, config = quantized(network_of_tasks(), bits), small_config(bits, sparse)
    folded, plain = lower.lower(graph, config), lower.lower(graph, config, fold=False)
    assert folded.fold is not None and plain.fold is None
    assert "pool" in describe(folded).tasks[0].rides
    wanted = traced(plain)
    assert_same(traced(folded), wanted)
    assert_same(traced(folded, CSimulation(config, ("-O0", "-DKGRC_PLAIN"))), wanted)
    assert_same(run_program(folded, folded.encode_clip(frames_of(folded))), wanted)


def test_a_layer_that_is_the_whole_network_folds():
    """Its output has 16 bits."""
    net = Net(size=(2, 8, 8))
    net.conv("clip", 4, 3, act="none")
    graph = quantized(net, 8)
    folded = lower.lower(graph, small_config())
    assert folded.fold is not None and folded.output.bits == 16
    assert_same(traced(folded), traced(lower.lower(graph, small_config(), fold=False)))


# ---- the choice -----------------------------------------------------------------------------

FIRST_LAYERS = {
    "c3d": (ConvShape(3, (16, 112, 112), (3, 3, 3), ONE, ONE, ONE, 64), (1, 2, 2), (1, 3, 3)),
    "r2plus1d_18": (
        ConvShape(3, (16, 112, 112), (1, 7, 7), (1, 2, 2), (0, 3, 3), (0, 3, 3), 45),
        ONE,
        (1, 1, 7),
    ),
    "i3d": (
        ConvShape(3, (64, 224, 224), (7, 7, 7), (2, 2, 2), (2, 2, 2), (3, 3, 3), 64),
        ONE,
        (1, 1, 7),
    ),
}


def layer_of(shape, codes=None):
    if codes is None:
        codes = np.ones((shape.filters, shape.channels, *shape.kernel), np.int8)
    return Layer("conv1", CONV, ("clip",), shape.filters, shape.out_size, shape, codes)


@pytest.mark.parametrize("design", ["8-sparse", "8-zcu102"])
@pytest.mark.parametrize("network", FIRST_LAYERS)
def test_first_layers_of_the_networks_fold_as_docs_format_md_says(network, design):
    shape, pool, kernel = FIRST_LAYERS[network]
    config, layer = preset(design), layer_of(shape)
    foldings = list(fold.foldings(layer))
    folding = foldings[fold.choose_folding(config, layer, pool)]
    assert folding.window.kernel == kernel
    before = fold.folded_cycles(config, foldings[0], pool)
    whole = layer_time(config, shape, 8, min(9, shape.taps), pool)
    assert before == max(whole.busy.values()) < whole.cycles
    assert fold.folded_cycles(config, folding, pool) < 0.55 * before
    assert folding.layer.shape.own_macs == shape.macs


def test_a_gain_too_small_for_the_host_is_not_taken(monkeypatch):
    shape, pool, _ = FIRST_LAYERS["c3d"]
    counts = {(1, 1, 1): 1000.0, (1, 1, 3): 985.0}

    def cycles(_, folding, *__, **___):
        return counts.get(folding.window.kernel, 2000.0)

    monkeypatch.setattr(fold, "folded_cycles", cycles)
    assert fold.choose_folding(preset("8-sparse"), layer_of(shape), pool) == 0
    counts[1, 1, 3] = 900.0
    assert fold.choose_folding(preset("8-sparse"), layer_of(shape), pool) == 1


def test_input_that_memory_cannot_bring_counts(monkeypatch):
    shape, pool, _ = FIRST_LAYERS["c3d"]
    layer = layer_of(shape)
    folded = next(f for f in fold.foldings(layer) if f.window.kernel == (1, 3, 3))
    fast = fold.folded_cycles(preset("8-sparse"), folded, pool)
    monkeypatch.setattr(fold, "MEMORY", replace(REFERENCE, port_bits=16))
    slow = fold.folded_cycles(preset("8-sparse"), folded, pool)
    assert slow > 2 * fast


def test_a_pruned_layer_keeps_its_pattern():
    """One column of nine is kept: folding would mix the kept taps with all others."""
    shape, pool, _ = FIRST_LAYERS["c3d"]
    codes = np.zeros((64, 3, 3, 3, 3), np.int8)
    codes[:, :, :, 1, 1] = 1
    assert fold.choose_folding(preset("8-sparse"), layer_of(shape, codes), pool) == 0
    assert fold.choose_folding(preset("8-sparse"), layer_of(shape, codes + 1), pool) > 0


def test_a_clip_is_not_folded_beyond_its_limits(monkeypatch):
    layer = layer_of(ConvShape(3, (8, 16, 16), (3, 5, 5), (1, 2, 2), NONE, NONE, 8))
    foldings = list(fold.foldings(layer))

    def finite():
        found = [fold.folded_cycles(preset("8-sparse"), f) for f in foldings]
        return {f.window.taps for f, cycles in zip(foldings, found, strict=True) if cycles < np.inf}

    assert finite() == {1, 3, 5, 15, 25, 75}
    with monkeypatch.context() as patch:
        patch.setattr(fold, "MAX_TAPS", 25)
        assert finite() == {1, 3, 5, 15, 25}
    monkeypatch.setattr(fold, "MAX_GROWTH", 4)
    assert finite() == {1, 3, 5, 25}


def branches(net):
    net.add(net.conv("clip", 4), net.conv("clip", 4, act="none"))


def concatenated(net):
    net.concat("clip", net.conv("clip", 4))


def as_a_shortcut(net):
    net.add(net.conv("clip", 3, act="none"), "clip")


def pooled(net):
    net.conv(net.pool("clip", 2), 4)


def one_tap(net):
    net.conv("clip", 4, 1, pad=0)


@pytest.mark.parametrize("build", [branches, concatenated, as_a_shortcut, pooled, one_tap])
def test_a_clip_that_is_read_otherwise_is_written_as_it_is(build):
    net = Net(size=(4, 8, 8))
    build(net)
    program, _ = compiled(net)
    assert program.fold is None
    assert program.encode_clip(frames_of(program)).shape == (3, 4, 8, 8)


def test_a_clip_of_other_channels_is_not_folded():
    net = Net(size=(4, 8, 8), channels=4)
    net.conv("clip", 4)
    assert compiled(net)[0].fold is None


def test_the_emulation_takes_the_form_that_pools_sums():
    """Winograd along one axis with few channels is no faster, and pools the codes afterwards."""
    shape = ConvShape(27, (16, 56, 56), (3, 1, 1), ONE, (1, 0, 0), (1, 0, 0), 64)
    weight = np.ones((64, 27, 3, 1, 1), np.int8)
    found = choose_convolution(weight, shape, (-128, 127), FLOAT32, 1)
    assert isinstance(found, GemmConvolution)


# ---- files ----------------------------------------------------------------------------------


def folded_program():
    program, _ = compiled(network_of_tasks())
    assert program.fold is not None
    return program


def test_a_folded_program_is_saved_and_loaded(tmp_path):
    program, path = folded_program(), tmp_path / "net.kgrc"
    program.save(path)
    found = load(path)
    assert (found.fold, found.version) == (program.fold, 4)
    assert_same(traced(found), traced(program))


@pytest.mark.parametrize("version", [1, 2])
def test_files_without_folding_run_as_before(version, tmp_path):
    program, _ = compiled(network_of_tasks(), fold=False)
    path = tmp_path / "old.kgrc"
    program.save(path)

    def to_old(document, tensors):
        document["version"] = version
        del document["fold"], document["softmax"]
        with_all_groups(program, tensors)

    with_document(path, to_old)
    old = load(path)
    assert old.version == version and old.fold is None
    np.testing.assert_array_equal(outputs(old), outputs(program))


FORGED = {
    "channels": (set_in("fold", "channels", value=4), "fold: channels of the clip is 4"),
    "size": (set_in("fold", "in_size", value=[4, 12, 15]), "fold: size of the clip is "),
    "kernel": (set_in("fold", "kernel", value=[1, 1, 1]), "fold: padding .* exceeds kernel"),
    "padding": (set_in("fold", "pad_before", value=[0, 0, -1]), "fold: padding .* exceeds kernel"),
    "stride": (set_in("fold", "stride", value=[0, 1, 1]), "fold: kernel .* must be positive"),
    "taps": (
        set_in("fold", value=dict(channels=3, in_size=[4, 12, 16], kernel=[4, 12, 16])),
        "fold: taps of its window .* is 768, accepted are 1 to 512",
    ),
    "another fold": (
        set_in("fold", value=dict(channels=3, in_size=[4, 12, 16], kernel=[1, 1, 1])),
        "conv1: channels of the folded clip is",
    ),
    "more channels": (
        set_in("fold", value=dict(channels=3, in_size=[4, 12, 16], kernel=[4, 9, 1])),
        "input: channel offset is 0, accepted are 0 to -",
    ),
    "type": (set_in("fold", value="1x3x3"), r"Expected `object \| null`, got `str` - at `\$.fold`"),
    "missing": (set_in("fold", value=dict(channels=3)), "missing required field `in_size`"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_fold_is_refused(name, tmp_path):
    change, message = FORGED[name]
    path = tmp_path / "net.kgrc"
    folded_program().save(path)
    with_document(path, change)
    with pytest.raises(ProgramError, match=message):
        load(path)


def test_info_says_what_is_folded(tmp_path, capsys):
    program, path = folded_program(), tmp_path / "net.kgrc"
    program.save(path)
    assert main(["info", str(path)]) == 0
    taps = "x".join(map(str, program.fold.kernel))
    wanted = f"clip 4 x 12 x 16, unnamed classes; {taps} taps of conv1 are written as channels\n"
    assert wanted in capsys.readouterr().out
    assert describe(program).folded == list(program.fold.kernel)
    plain, _ = compiled(network_of_tasks(), fold=False)
    assert describe(plain).folded is msgspec.UNSET
