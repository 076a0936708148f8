"""KGR, KGC, KGRC: balanced projections, and the paper's recipes against its figures."""

from fractions import Fraction

import numpy as np
import pytest
from networks import Net

from pynq_kgrc.compress.patterns import (
    PATTERNS,
    Rates,
    kept_operations,
    project,
    prune,
    recipe,
)
from pynq_kgrc.errors import CompileError, ConfigError
from pynq_kgrc.groups import GroupSize, kept_columns, kept_rows, split

HALF, THIRD = Fraction(1, 2), Fraction(1, 3)


@pytest.mark.parametrize("size", [GroupSize(8, 8, 9), GroupSize(4, 4, 9), GroupSize(8, 4, 3)])
@pytest.mark.parametrize("rates", [Rates(rows=HALF), Rates(cols=THIRD), Rates(HALF, 2 * THIRD)])
def test_every_group_keeps_the_same_count(size, rates):
    weight = np.random.default_rng(0).normal(size=(16, 16, 3, 3, 3))
    kept = project(weight, rates, size)
    groups = split(kept.reshape(16, 16, 27), size)
    kr, kc = rates.kept(size, 27)
    assert (kept_rows(groups).sum(axis=2) == kr).all()
    assert (kept_columns(groups).sum(axis=3) == kc).all()
    changed = kept != weight
    assert (kept[changed] == 0).all()
    # a projection is idempotent
    np.testing.assert_array_equal(project(kept, rates, size), kept)


def test_the_strongest_stay():
    weight = np.ones((8, 8, 1, 3, 3))
    weight[[1, 4, 6, 7]] *= 3
    weight[:, :, 0, 1, :] *= 5
    kept = project(weight, Rates(HALF, 2 * THIRD))
    assert np.flatnonzero(kept.any(axis=(1, 2, 3, 4))).tolist() == [1, 4, 6, 7]
    assert np.argwhere(kept.any(axis=(0, 1, 2))).tolist() == [[1, 0], [1, 1], [1, 2]]


def test_depth_slices_share_their_columns_unless_told_otherwise():
    weight = np.random.default_rng(1).normal(size=(8, 8, 3, 3, 3))
    for share in (True, False):
        kept = project(weight, Rates(cols=2 * THIRD), share_columns=share)
        masks = kept.any(axis=(0, 1)).reshape(3, 9)
        assert (masks == masks[0]).all() == share


@pytest.mark.parametrize(
    ("rates", "text"),
    [
        (Rates(rows=THIRD), r"a rate of 1/3 does not prune whole rows of 8; use 0, 1/8, 1/4"),
        (Rates(cols=HALF), r"a rate of 1/2 does not prune whole columns of 9; use 0, 1/9"),
        (Rates(rows=Fraction(1)), r"a rate of 1 does not prune whole rows"),
        (Rates(rows=-HALF), r"a rate of -1/2 does not prune"),
    ],
)
def test_rates_that_do_not_divide_are_refused(rates, text):
    with pytest.raises(ConfigError, match=text):
        project(np.ones((8, 8, 3, 3, 3)), rates)


PUBLISHED = {  # KGRC paper, tables II and III: how many times fewer operations
    ("c3d", "kgr"): 1.76,
    ("c3d", "kgc"): 1.93,
    ("c3d", "kgrc"): 3.04,
    ("r2plus1d_18", "kgr"): 1.84,
    ("r2plus1d_18", "kgc"): 1.75,
    ("r2plus1d_18", "kgrc"): 3.02,
}


@pytest.mark.parametrize("network", ["c3d", "r2plus1d_18"])
def test_recipes_reach_the_published_reduction(network):
    import torch

    from pynq_kgrc.models import c3d, r2plus1d
    from pynq_kgrc.models.trace import trace

    torch.manual_seed(0)
    module = c3d if network == "c3d" else r2plus1d
    build = module.c3d if network == "c3d" else module.r2plus1d_18
    graph = trace(build(101), module.CLIP)
    for pattern in PATTERNS:
        dense, kept = kept_operations(prune(graph, recipe(network, pattern)))
        assert dense / kept == pytest.approx(PUBLISHED[network, pattern], rel=0.015), pattern


def test_unknown_recipes_and_layers_are_refused():
    with pytest.raises(ConfigError, match="no recipe 'kgx' for 'c3d'; there are kgr, kgc, kgrc"):
        recipe("c3d", "kgx")
    net = Net()
    net.conv("clip", 8, name="conv1")
    with pytest.raises(ConfigError, match="names 'conv9'; net has conv1"):
        prune(net.graph(), {"conv9": Rates(HALF)})
    with pytest.raises(CompileError, match=r"conv1 takes a weight of shape \(8, 3, 3, 3, 3\), not"):
        net.graph().with_weights({"conv1": np.ones(3)})
    with pytest.raises(CompileError, match=r"clip takes no weight, not one of shape \(3,\)"):
        net.graph().with_weights({"clip": np.ones(3)})
