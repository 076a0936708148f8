"""The table of networks is what the cost model gives, and docs/networks.md is that table."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional

from pynq_kgrc.accelerator.config import PRESETS, preset
from pynq_kgrc.analysis.networks import (
    DESIGNS,
    NOT_YET,
    PUBLISHED,
    TABLE,
    describe_network,
    page,
    read_table,
)
from pynq_kgrc.analysis.timing import modelled_ms
from pynq_kgrc.cli import main
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.models import NETWORKS
from pynq_kgrc.models.trace import trace

CHEAP = ("thin_c3d",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in CHEAP)) for n in NETWORKS]
)
def test_a_row_is_what_the_model_gives_today(name, tmp_path, capsys):
    """`pynq-kgrc networks --compute -o pynq_kgrc/analysis/networks.json` brings it up to date."""
    out = tmp_path / "table.json"
    assert main(["networks", name, "--compute", "-o", str(out)]) == 0
    assert capsys.readouterr().out.count(name) >= 1
    assert out.read_text("utf-8") == TABLE.read_text("utf-8")


def test_the_table_has_the_networks_on_every_preset_of_16_and_8_bits():
    table = read_table()
    assert list(table) == list(NETWORKS)
    assert set(DESIGNS) == {name for name in PRESETS if preset(name).bits > 4}
    for row in table.values():
        assert {*row.ms, *row.refused} == set(DESIGNS)
        assert row.ms["8-sparse"] > 0


def test_the_page_is_the_table(capsys):
    shown = (ROOT / "docs" / "networks.md").read_text("utf-8")
    assert page(read_table(), NETWORKS) == shown, (
        "make it anew: pynq-kgrc networks --markdown > docs/networks.md"
    )
    assert main(["networks", "--markdown"]) == 0
    assert capsys.readouterr().out == shown


def test_known_counts_of_operations():
    """torchvision's own figures (`_ops`, `num_params` of its weights), and the papers'."""
    table = read_table()
    known = {
        "r3d_18": (40.697, 33371472),
        "mc3_18": (43.343, 11695440),
        "r2plus1d_18": (40.519, 31505325),
        "s3d": (17.979, 8320048),
        "resnet_18": (1.814, 11689512),
        "resnet_50": (4.089, 25557032),
        "resnet_152": (11.514, 60192808),
        "vgg_16": (15.47, 138357544),
        "alexnet": (0.714, 61100840),
        "mobilenet_v2": (0.301, 3504872),
    }
    for name, (gmac, parameters) in known.items():
        if name not in table:
            continue
        assert table[name].parameters == parameters
        assert table[name].macs / 1e9 == pytest.approx(gmac, rel=2e-3, abs=2e-3), name


class Mixed(nn.Module):
    """A convolution, an addition, a depthwise convolution and a classifier."""

    def __init__(self, groups):
        super().__init__()
        self.first = nn.Conv3d(3, 16, 3, padding=1)
        self.second = nn.Conv3d(16, 16, 3, padding=1, groups=groups)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.fc((x + self.second(x)).mean((2, 3, 4)))


@pytest.mark.parametrize("groups", [1, 16])
def test_a_row_has_the_times_of_the_compiled_program(groups):
    graph = trace(Mixed(groups), ClipSpec(4, 12, 12, 12), name="mixed")
    row = describe_network(graph, 7, ["8-sparse", "8-dense", "16-sparse"])
    clips = [np.zeros((3, 4, 12, 12), np.float32), np.ones((3, 4, 12, 12), np.float32)]
    for name, ms in row.ms.items():
        config = preset(name)
        program = lower(choose_quant(graph, clips, config.bits, "minmax"), config)
        assert ms == pytest.approx(modelled_ms(program), abs=0.006), name
    assert (row.parameters, row.classes, row.clip) == (7, 5, (4, 12, 12))
    assert row.macs == 576 * (16 * 3 * 27 + 16 * 16 // groups * 27) + 16 * 5


def gate(x):
    return x * x.mean((2, 3, 4), keepdim=True)


OPERATORS = {
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "mul": gate,
}


def test_every_lacking_operator_is_tried():
    assert {each for operators in NOT_YET.values() for each in operators} == set(OPERATORS)
    assert set(PUBLISHED) <= set(NETWORKS)


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_said_to_be_lacking_is(name):
    """Once it is there, its networks leave `NOT_YET`."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(3, 4, 1)

        def forward(self, x):
            return OPERATORS[name](self.conv(x))

    with pytest.raises(CompileError, match=name):
        trace(Gated(), ClipSpec(2, 8, 8, 8))


def test_a_network_without_a_row(monkeypatch, capsys):
    monkeypatch.setitem(NETWORKS, "waving", ("waving", "waving"))
    assert main(["networks", "waving"]) == 2
    assert "the table has no row of waving; --compute makes one" in capsys.readouterr().err
    assert main(["networks"]) == 0


def test_the_command_prints_text_and_json(capsys):
    assert main(["networks", "c3d", "resnet_50"]) == 0
    shown = capsys.readouterr().out
    assert "nothing was measured" in shown
    assert "c3d: 43.1 ms on ZCU102, 8 bits, pruned 3.0x, convolutions only (Mengshu Sun" in shown
    assert main(["networks", "c3d", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["network"] for row in document["networks"]] == ["c3d"]
    assert document["networks"][0]["published"][0]["ms"] == 104.8
    assert main(["networks", "resnet"]) == 2
    assert "'resnet' is no network; there are c3d," in capsys.readouterr().err
    assert main(["networks", "-o", "x.json"]) == 2
    assert "give both" in capsys.readouterr().err
