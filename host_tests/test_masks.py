"""Pruned weights stay exactly zero, whatever the optimizer."""

import pytest
import torch
from torch import nn

from pynq_kgrc.compress.masks import Masks, chosen_weights
from pynq_kgrc.errors import ConfigError


def take_steps(module, inputs, labels, steps, lr, optimizer=torch.optim.Adam, **settings):
    """The losses of a few masked training steps."""
    optimizer = optimizer(module.parameters(), lr=lr, **settings)
    Masks(module).apply_after(optimizer)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(module(inputs).flatten(1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def small_network():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
    )
    with torch.no_grad():
        for layer in (network[0], network[4]):
            layer.weight[torch.rand_like(layer.weight) < 0.5] = 0
    return network


OPTIMIZERS = {
    "sgd, momentum and decay": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.1)),
    "nesterov": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    "adam": (torch.optim.Adam, dict(lr=0.01, weight_decay=0.1)),
    "adamw": (torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1)),
    "rmsprop": (torch.optim.RMSprop, dict(lr=0.01, momentum=0.9)),
    "adagrad": (torch.optim.Adagrad, dict(lr=0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_under_any_optimizer(name):
    network = small_network()
    before = {n: w.detach().clone() for n, w in chosen_weights(network, ["0", "4"]).items()}
    kind, settings = OPTIMIZERS[name]
    inputs, labels = torch.randn(8, 3, 4, 4, 4), torch.arange(8) % 4
    take_steps(network, inputs, labels, 20, optimizer=kind, **settings)
    for layer, weight in chosen_weights(network, ["0", "4"]).items():
        zeros = before[layer] == 0
        assert 0.3 < zeros.float().mean() < 0.7
        assert (weight[zeros] == 0).all()
        assert not torch.signbit(weight[zeros]).any()
        assert (weight[~zeros] != before[layer][~zeros]).float().mean() > 0.9


def test_momentum_from_before_the_pruning_moves_nothing():
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.99)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.no_grad():
        network[0].weight[:4] = 0
    Masks(network).apply_after(optimizer)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (network[0].weight[:4] == 0).all()
    assert (network[0].weight[4:] != 0).any()


def test_a_weight_that_overflows_is_set_back():
    network = small_network()
    masks = Masks(network)
    with torch.no_grad():
        network[0].weight.fill_(torch.inf)
    masks.apply()
    assert torch.isinf(network[0].weight).any()
    assert (network[0].weight == 0).sum() == masks.zeros["0"].sum()
    assert masks.kept == pytest.approx(0.5, abs=0.1)


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="the recipe names 'conv9'; Sequential has 0, 4"):
        chosen_weights(small_network(), ["conv9"])
