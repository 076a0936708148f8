"""Pruned weights stay exactly zero, whatever the optimizer."""

import pytest
import torch
import torch.nn.utils.prune
from safetensors.torch import load_file, save_file
from torch import nn

from pynq_kgrc.compress.masks import (
    Masks,
    chosen_weights,
    list_pruned,
    traced_zeros,
    zero_places,
)
from pynq_kgrc.compress.weights import check_pruned, load_notes, save_weights
from pynq_kgrc.errors import ConfigError, ModelError
from pynq_kgrc.graph import ClipSpec


def take_steps(module, inputs, labels, steps, lr, optimizer=torch.optim.Adam, **settings):
    """The losses of a few masked training steps."""
    optimizer = optimizer(module.parameters(), lr=lr, **settings)
    Masks(module, zero_places(module)).apply_after(optimizer)
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
    Masks(network, zero_places(network)).apply_after(optimizer)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (network[0].weight[:4] == 0).all()
    assert (network[0].weight[4:] != 0).any()


def test_a_weight_that_overflows_is_set_back():
    network = small_network()
    masks = Masks(network, zero_places(network))
    with torch.no_grad():
        network[0].weight.fill_(torch.inf)
    masks.apply()
    assert torch.isinf(network[0].weight).any()
    assert (network[0].weight == 0).sum() == masks.zeros["0"].sum()
    assert masks.kept == pytest.approx(0.5, abs=0.1)


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="the recipe names 'conv9'; Sequential has 0, 4"):
        chosen_weights(small_network(), ["conv9"])


def test_a_weight_that_torch_computes_is_told_apart():
    network = small_network()
    torch.nn.utils.prune.random_unstructured(network[4], "weight", 0.5)
    with pytest.raises(ConfigError, match="weight of '4' is computed from other parameters"):
        chosen_weights(network, ["4"])
    torch.nn.utils.prune.remove(network[4], "weight")
    assert chosen_weights(network, ["4"]).keys() == {"4"}


def test_zeros_that_nobody_pruned_learn():
    network = small_network()
    nn.init.zeros_(network[4].weight)
    pruned = {"0": zero_places(network)["0"]}
    before = network[0].weight.detach().clone()
    inputs, labels = torch.randn(8, 3, 4, 4, 4), torch.arange(8) % 4
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    masks = Masks(network, pruned)
    masks.apply_after(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
    assert (network[4].weight != 0).any()
    assert (network[0].weight[before == 0] == 0).all()
    assert list_pruned(masks.zeros) == (
        f"pruned weights, which stay zero: 0 {float(pruned['0'].float().mean()):.1%} of the weights"
    )
    assert list_pruned({}) == "pruned weights, which stay zero: none"


def test_a_mask_has_to_fit():
    with pytest.raises(
        ConfigError, match=r"mask of 0 has the shape \[8, 3\]; its weight has \[8, 3"
    ):
        Masks(small_network(), {"0": torch.zeros(8, 3, dtype=torch.bool)})
    with pytest.raises(ConfigError, match="the recipe names 'conv9'"):
        Masks(small_network(), {"conv9": torch.zeros(8, 3, dtype=torch.bool)})


class Grouped(nn.Module):
    """A grouped and a dilated convolution, batch norm, a head of zeros."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv3d(4, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm3d(8)
        self.dilated = nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 2, 2), dilation=(1, 2, 2))
        self.stem = nn.Conv3d(3, 4, 1)
        self.fc = nn.Linear(8 * 2 * 8 * 8, 3)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        x = torch.relu(self.norm(self.grouped(torch.relu(self.stem(x)))))
        return self.fc(torch.relu(self.dilated(x)).flatten(1))


def test_the_traced_graph_has_the_masks_and_what_tracing_fills_in():
    torch.manual_seed(0)
    network, spec = Grouped(), ClipSpec(2, 8, 8, 8)
    mask = torch.rand(network.dilated.weight.shape) < 0.5
    before = {n: v.clone() for n, v in network.state_dict().items()}
    found = traced_zeros(network, spec, {"dilated": mask})
    assert found.keys() == {"grouped", "dilated"}  # neither the head nor the norm's zeros
    assert found["grouped"].shape == (8, 4, 3, 3, 3)
    assert found["grouped"].mean() == 0.5
    dilated = found["dilated"][..., ::2, ::2]
    assert dilated.shape[2:] == (1, 3, 3) and (dilated == mask.numpy()).all()
    assert found["dilated"].sum() == 8 * 8 * (25 - 9) + int(mask.sum())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("shape", [(8, 4, 3, 3, 3), (3, 5), (1, 1)])
def test_a_file_of_weights_says_what_is_pruned(tmp_path, shape):
    torch.manual_seed(0)
    layer = nn.Linear(1, 1)
    layer.weight = nn.Parameter(torch.randn(shape))
    network = nn.Sequential(layer)
    places = torch.rand(shape) < 0.5
    with torch.no_grad():
        layer.weight[places] = 0
    path = tmp_path / "w.safetensors"
    save_weights(network, path, {"0": places}, ["run", "c\u00e1no"])
    assert load_file(path).keys() == {"0.weight", "0.bias"}
    notes = load_notes(path)
    assert torch.equal(notes.pruned["0"], places) and notes.classes == ("run", "c\u00e1no")
    check_pruned(path, notes.pruned, network)
    first = path.read_bytes()
    save_weights(network, path, {"0": places}, ["run", "c\u00e1no"])
    assert path.read_bytes() == first
    if places.any():
        nn.init.ones_(layer.weight)
        with pytest.raises(ModelError, match="the mask of 0 does not fit the weights"):
            check_pruned(path, notes.pruned, network)


def test_files_of_other_makers_say_nothing(tmp_path):
    network = small_network()
    save_file(network.state_dict(), tmp_path / "plain.safetensors")
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    for name in ("plain.safetensors", "plain.pt", "noise.safetensors", "gone.safetensors"):
        assert load_notes(tmp_path / name).pruned is None
    for damaged in ("{", '{"pruned": {"0": {"shape": [8], "bits": "x"}}}', '{"pruned": 3}'):
        save_file(network.state_dict(), tmp_path / "bad.safetensors", {"pynq_kgrc": damaged})
        with pytest.raises(ModelError, match="what it says of pruning cannot be read"):
            load_notes(tmp_path / "bad.safetensors")
