"""The fake-quantized network: its codes equal the program's, and training works."""

import numpy as np
import pytest
import torch
from networks import Net, small_config
from test_masks import take_steps

from pynq_kgrc.analysis.fidelity import written_tensor
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.compress.fake_quant import FakeQuantNetwork, as_multiplier
from pynq_kgrc.compress.masks import zero_places
from pynq_kgrc.errors import CompileError
from pynq_kgrc.quant import multiplier
from pynq_kgrc.runtime import Session


def busy_net(gain=8):
    """Strides, paddings, both pools, concat, an add that is fused and one that is not, ReLU6."""
    net = Net(size=(4, 8, 8))
    first = net.conv("clip", 8, stride=(1, 2, 2), act="relu6")
    net.layers[first].weight[...] *= gain  # so that the 6 is reached
    left = net.conv(first, 8, kept=0.5)
    right = net.pool(net.conv(first, 8, act="none"), 3, stride=1, pad=1)
    joined = net.concat(left, right)
    branch = net.conv(joined, 16, act="none")
    summed = net.add(branch, joined)
    doubled = net.add(net.pool(summed, 1), summed)
    net.dense(net.pool(doubled, 2, op="average_pool"), 6)
    return net


def formats(net, bits):
    return choose_quant(net.graph(), net.clips(), bits)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("moved", [False, True], ids=["calibrated", "trained"])
def test_codes_are_those_of_the_program(bits, moved):
    graph = formats(busy_net(), bits)
    network = FakeQuantNetwork(graph)
    if moved:
        with torch.no_grad():
            torch.manual_seed(0)
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        graph = network.to_graph()
    program = lower(graph, small_config(bits))
    frames = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    exact = torch.from_numpy(graph.clip.pixel_values())
    clip = torch.stack([exact[c][torch.from_numpy(frames[..., c]).long()] for c in range(3)])
    codes = network.codes(clip[None])
    close = network.codes(clip[None].float())
    compared = 0
    with Session(program) as session:
        for task, (_, ours, _) in zip(program.tasks, session.trace(frames), strict=True):
            name = written_tensor(graph, task)
            if name is None or name not in codes:
                continue
            expected = ours.astype(np.int64) - graph[name].out_quant.zero_point
            np.testing.assert_array_equal(codes[name][0].detach().numpy(), expected, task.name)
            compared += 1
        logits = network(clip[None])[0].detach().numpy()
        np.testing.assert_allclose(logits, session.run(frames).logits, rtol=1e-12)
    assert compared >= 7
    if bits < 16:  # float32 does not hold a 16-bit design's sums
        for name, expected in codes.items():
            if name != graph.output:
                assert (close[name] - expected).abs().max() <= 1, name


def test_multipliers_are_those_of_the_compiler():
    ratios = np.exp(np.random.default_rng(0).uniform(-34, 10, 2000))
    ratios = np.concatenate([ratios, 2.0 ** np.arange(-52, 14), [1 - 2**-17, 2**-48.5, 2.0**-60]])
    ratios = np.concatenate([ratios, (1 - 2.0**-18) * 2.0 ** np.arange(-52, -40)])
    found = as_multiplier(torch.from_numpy(ratios)).numpy()
    exact = [mult * 2.0**-shift for mult, shift in (multiplier(r, "x") for r in ratios)]
    np.testing.assert_array_equal(found, exact)


def test_it_learns_and_zeros_stay():
    net = busy_net()
    graph = formats(net, 4)
    network = FakeQuantNetwork(graph)
    pruned = {n: v.clone() for n, v in zero_places(network).items()}
    assert pruned.keys() == {"convolutions.conv2"}
    clips = torch.from_numpy(np.stack(net.clips(6)))
    losses = take_steps(network, clips, torch.arange(6), steps=30, lr=5e-3)
    assert losses[-1] < 0.5 * losses[0]
    weight = network.to_graph()["conv2"].weight
    assert (weight[pruned["convolutions.conv2"].numpy()] == 0).all()
    for name, parameter in network.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def test_gradients_of_scales_are_slopes():
    """Gradients agree with finite differences at 16 bits, where rounding is negligible."""
    net = busy_net(gain=1)
    network = FakeQuantNetwork(formats(net, 16))
    clips = torch.from_numpy(np.stack(net.clips(4))).double()
    target = network(clips).detach()
    with torch.no_grad():
        network.convolutions["conv6"].log_scale -= 1.5
        network.log_scales["conv1"] -= 0.7

    def loss():
        return ((network(clips) - target) ** 2).mean()

    of_filters = network.convolutions["conv6"].log_scale
    of_format = network.log_scales["conv1"]
    found = torch.autograd.grad(loss(), [of_filters, of_format])
    slopes = [torch.zeros_like(of_filters), torch.zeros_like(of_format)]
    with torch.no_grad():
        for scale, slope in zip((of_filters, of_format), slopes, strict=True):
            for i in np.ndindex(*scale.shape):
                scale[i] += 0.005
                above = loss()
                scale[i] -= 0.01
                slope[i] = (above - loss()) / 0.01
                scale[i] += 0.005
    assert torch.corrcoef(torch.stack([found[0], slopes[0]]))[0, 1] > 0.97
    torch.testing.assert_close(found[0], slopes[0], rtol=0.1, atol=0.05)
    torch.testing.assert_close(found[1], slopes[1], rtol=0.3, atol=0.01)


def test_a_graph_without_formats_is_refused():
    with pytest.raises(CompileError, match="clip has no format of codes; run choose_quant first"):
        FakeQuantNetwork(busy_net().graph())
