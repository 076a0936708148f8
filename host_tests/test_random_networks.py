"""Random torch networks: each is compiled or refused by name, and what is compiled is right."""

import shutil
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from networks import small_config
from random_networks import RandomNetwork
from torch import nn

from pynq_kgrc.backends.csim import CSimulation
from pynq_kgrc.backends.emulation.backend import Emulation
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compiler.network import compile_network
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.errors import CompileError, ConfigError, ProgramError
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.models.trace import trace

QUICK = ("-O1", "-DKGRC_PLAIN")

SHARE = 0.01
"""Largest error of the logits at 16 bits, as a share of the largest float logit."""


def outputs(backend, program, frames):
    """The codes that each task writes, by its name."""
    backend.load(program)
    backend.write(program.source, program.encode_clip(frames))
    found = {}
    for number, task in enumerate(program.tasks):
        backend.run(number, number + 1)
        found[task.name] = backend.read(task.target, task.shape.out_channels, task.out_size)
    return found


def check_refusal(error: Exception, names: list[str]) -> None:
    """The message of a refusal has one of these names."""
    assert any(name in str(error) for name in names), error


def assert_right(seed: int, moving: bool = False) -> str:
    """Compile the network of a seed at each width and compare; "refused" or "right"."""
    network = RandomNetwork(seed, moving)
    clip = network.clip
    shape = (clip.frames, clip.height, clip.width, 3)
    frames = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    reals = clip.normalise(frames)
    with torch.no_grad():
        wanted = network(torch.from_numpy(reals)[None]).numpy().ravel()
    try:
        graph = trace(network, clip)
    except CompileError as error:
        check_refusal(error, [" at "])  # the place in the module
        return "refused"
    outcome = "right"
    for bits in (16, 8, 4):
        config = small_config(bits, sparse=seed % 2 == 0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a small part of a concat
                quantized = choose_quant(graph, [reals], bits)
            program = lower(quantized, config)
        except (CompileError, ConfigError) as error:
            check_refusal(error, [f"{layer.name}:" for layer in graph.layers])
            outcome = "refused"
            continue
        codes = outputs(Emulation(config, cores=1), program, frames)
        for name, simulated in outputs(CSimulation(config, QUICK), program, frames).items():
            np.testing.assert_array_equal(codes[name], simulated, f"{seed}, {bits} bits: {name}")
        if bits == 16:
            logits = program.output.dequantize(codes[program.tasks[-1].name]).ravel()
            error = np.abs(logits - wanted).max()
            assert error <= SHARE * np.abs(wanted).max() + 1e-6, (seed, error, wanted)
    return outcome


def assert_most_compile(seeds, moving: bool = False) -> None:
    """At least nine of ten; of those that move elements at least eight.

    A crop whose side is padded again, for example, is no selection, and is refused by name.
    """
    outcomes = Counter(assert_right(seed, moving) for seed in seeds)
    assert outcomes["right"] > (0.8 if moving else 0.9) * len(seeds), outcomes


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("start", [0, 6])
def test_a_dozen_random_networks(start):
    """Tracing takes a second or more for each; `make test-all` takes 2,000."""
    assert_most_compile(range(start, start + 6))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_two_random_networks_that_move_elements():
    """Slices, shuffles, shifts, padding and frames as a batch, between the other steps."""
    assert_most_compile(range(2), moving=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("channels", [1, 2, 4, 16])
def test_clips_of_other_channels(channels):
    """Grey, optical flow, RGB and depth, heat maps: as torch, and as in the C-simulation."""
    clip = ClipSpec(4, 8, 9, 8, mean=(0.4,) * channels, std=(0.3,) * channels)
    torch.manual_seed(channels)
    network = nn.Sequential(
        nn.Conv3d(channels, 8, 3, (1, 2, 2), 1), nn.ReLU(), nn.Conv3d(8, 5, 3), nn.Flatten()
    ).eval()
    rng = np.random.default_rng(channels)
    frames = rng.integers(0, 256, (4, 8, 9, channels), dtype=np.uint8)
    reals = clip.normalise(frames)
    with torch.no_grad():
        wanted = network(torch.from_numpy(reals)[None]).numpy().ravel()
    config = small_config(16)
    program = compile_network(network, clip, [frames], config)
    codes = outputs(Emulation(config, cores=1), program, frames)
    for name, simulated in outputs(CSimulation(config, QUICK), program, frames).items():
        np.testing.assert_array_equal(codes[name], simulated)
    logits = program.output.dequantize(codes[program.tasks[-1].name]).ravel()
    assert np.abs(logits - wanted).max() <= SHARE * np.abs(wanted).max()
    with pytest.raises(ProgramError, match=rf"takes uint8 frames of shape \(4, 8, 9, {channels}\)"):
        program.encode_clip(np.zeros((4, 8, 9, 3), np.uint8))


def test_a_clip_has_one_to_sixteen_channels():
    for mean, std in (((), ()), ((0.5,) * 17, (0.5,) * 17), ((0.5,) * 3, (0.5,) * 4)):
        with pytest.raises(ConfigError, match="one for each of its 1 to 16 channels"):
            ClipSpec(4, 8, 8, 8, mean=mean, std=std)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_region_that_is_loaded_before_the_first_is_used_is_kept():
    """Two blocks without enabled groups come first: both regions are loaded meanwhile."""
    assert assert_right(1012) == "right"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_concat_of_the_clip_and_larger_values_covers_both():
    """The parts of a concat share a format: the range of pixels alone cut the other part off."""
    assert assert_right(1240) == "right"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("start", range(0, 1000, 500))
def test_a_thousand_random_networks_that_move_elements(start):
    assert_most_compile(range(start, start + 500), moving=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("start", range(1000, 3000, 500))
def test_two_thousand_random_networks(start):
    assert_most_compile(range(start, start + 500))
