"""Every pattern as a projection, recipes and their search, and each pruning algorithm at work."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import ROOT
from networks import Net
from torch import nn

from pynq_kgrc.accelerator.config import preset, read_design
from pynq_kgrc.analysis.timing import modelled_ms
from pynq_kgrc.compiler.latency import (
    PrunedCycles,
    choose_rates_by_latency,
    compile_shapes,
    list_work,
    program_cycles,
)
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compress.admm import (
    Admm,
    pruning_projections,
    quantize_to,
    quantize_to_powers,
    quantizing_projections,
)
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.compress.importance import propagate_importance, tune_thresholds
from pynq_kgrc.compress.patterns import (
    Blocks,
    Filters,
    KernelGroups,
    KernelRows,
    Rates,
    Together,
    Weights,
    keep_mask,
    kept_operations,
    project_pattern,
    prune,
)
from pynq_kgrc.compress.pruning import prune_weights
from pynq_kgrc.compress.recipes import (
    ALGORITHMS,
    TOLERANCE,
    LayerRecipe,
    build_pattern,
    build_patterns,
    choose_rates,
    published_recipe,
    rates_by_threshold,
    read_recipe,
    write_recipe,
)
from pynq_kgrc.compress.reweighted import GroupLasso, Reweighted
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.groups import GroupSize
from pynq_kgrc.models import find_network
from pynq_kgrc.models.trace import trace

HALF, THIRD = Fraction(1, 2), Fraction(1, 3)
SIZE = GroupSize(4, 4, 9)
SHAPES = [(16, 8, 3, 3, 3), (8, 12, 1, 3, 3), (12, 8, 3, 1, 1), (9, 5, 3, 3, 3), (8, 3, 1, 7, 7)]

PATTERNS = {
    "kgrc": KernelGroups(Rates(HALF), SIZE),
    "vanilla": Blocks(HALF, 4, 4),
    "blockwise": Blocks(Fraction(3, 4), 8, 4),
    "filter": Filters(HALF),
    "krp": KernelRows(),
    "unstructured": Weights(Fraction(9, 10)),
    "together": Together((Blocks(HALF, 4, 4), Weights(HALF))),
}


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_projection_keeps_or_zeroes_and_is_idempotent(name, shape):
    weight = draw(shape)
    kept = project_pattern(weight, PATTERNS[name])
    assert ((kept == weight) | (kept == 0)).all()
    prunes = any(units.keep < units.per for units in PATTERNS[name].units(shape))
    assert 0 < np.count_nonzero(kept) <= weight.size - prunes
    np.testing.assert_array_equal(project_pattern(kept, PATTERNS[name]), kept)


@pytest.mark.parametrize("name", ["vanilla", "blockwise", "filter", "unstructured"])
def test_what_goes_is_the_weakest(name):
    """No pruned unit was stronger than a kept one: the result is the nearest weight."""
    weight = draw((16, 8, 3, 3, 3))
    (units,) = PATTERNS[name].units(weight.shape)
    keep = keep_mask(weight, PATTERNS[name]).reshape(16, 8, 27)
    strength = units.strength(weight.reshape(16, 8, 27) ** 2)
    stayed = np.zeros(units.count, bool)
    stayed[units.ids[keep]] = True
    assert strength[stayed].min() >= strength[~stayed].max()
    assert stayed.sum() == units.keep


def test_counts_of_each_pattern():
    weight = draw((16, 8, 3, 3, 3))
    blocks = project_pattern(weight, PATTERNS["vanilla"]).reshape(4, 4, 2, 4, 27)
    assert blocks.any(axis=(1, 3, 4)).sum() == 4
    large = project_pattern(weight, PATTERNS["blockwise"]).reshape(2, 8, 2, 4, 27)
    assert large.any(axis=(1, 3, 4)).sum() == 1
    filters = project_pattern(weight, PATTERNS["filter"])
    assert filters.any(axis=(1, 2, 3, 4)).sum() == 8
    rows = project_pattern(weight, PATTERNS["krp"]).reshape(16, 8, 9, 3)
    assert (rows.any(axis=3).sum(axis=2) == 1).all()
    strongest = np.abs(weight).reshape(16, 8, 9, 3).sum(axis=3).argmax(axis=2)
    np.testing.assert_array_equal(rows.any(axis=3).argmax(axis=2), strongest)
    assert np.count_nonzero(project_pattern(weight, PATTERNS["unstructured"])) == 345
    linear = project_pattern(draw((27, 64)), Weights(Fraction(3, 4)))
    assert np.count_nonzero(linear) == 432
    wide = project_pattern(draw((4, 2, 5, 5, 5)), KernelRows(keep=2)).reshape(4, 2, 25, 5)
    assert (wide.any(axis=3).sum(axis=2) == 2).all()


def test_krp_judges_by_magnitude_not_squares():
    weight = np.zeros((1, 1, 1, 2, 3))
    weight[0, 0, 0] = [[2.0, 2.0, 2.0], [5.0, 0.0, 0.0]]  # squares say the second, sums the first
    assert project_pattern(weight, KernelRows())[0, 0, 0, 1].tolist() == [0, 0, 0]
    assert project_pattern(weight, Filters(Fraction(0))).any()


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (Weights(Fraction(1)), "a rate of 1; accepted is 0 to below 1"),
        (Filters(Fraction(-1, 2)), "a rate of -1/2; accepted"),
        (KernelRows(10), "keep=10 rows of a kernel of 9; use 1 to 9"),
        (KernelRows(0), "keep=0 rows of a kernel of 9"),
    ],
)
def test_wrong_numbers_are_refused(pattern, text):
    with pytest.raises(ConfigError, match=text):
        project_pattern(draw((8, 8, 3, 3, 3)), pattern)


# ---- recipes --------------------------------------------------------------------------------


def test_a_recipe_is_a_file(tmp_path):
    entries = {
        "conv2": LayerRecipe("kgrc", "1/2", "2/3"),
        "conv3": LayerRecipe("blockwise", rate="1/2"),
        "layer1.0.conv1": LayerRecipe("krp", keep=2),
    }
    path = tmp_path / "recipe.toml"
    write_recipe(entries, path)
    assert read_recipe(path) == entries
    patterns = build_patterns(entries, preset("8-sparse"))
    assert patterns["conv2"] == KernelGroups(Rates(HALF, 2 * THIRD))
    assert patterns["conv3"] == Blocks(HALF, 32, 8)
    assert patterns["layer1.0.conv1"] == KernelRows(2)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (LayerRecipe("kgx"), "c: no pattern 'kgx'; there are kgr, kgc, kgrc, vanilla"),
        (LayerRecipe("kgr", rows="half"), "c: 'half' is no rate; write a fraction such as 2/3"),
        (LayerRecipe("kgr", rows="1/0"), "c: '1/0' is no rate"),
        (LayerRecipe("filter", rate="1"), "c: a rate of 1; accepted is 0 to below 1"),
        (
            LayerRecipe("kgc", cols="1/9"),
            r"c: a rate of 1/9 keeps 8 columns of 9, which 8-sparse works on 3 at a time "
            r"\(eq. 9\); use 0, 1/3, 2/3",
        ),
        (
            LayerRecipe("kgr", rows="1/4"),
            r"keeps 6 rows of 8, which 8-sparse works on 4 at a time \(eq. 9\); use 0, 1/2$",
        ),
    ],
)
def test_rates_that_do_not_fit_are_refused(entry, text):
    with pytest.raises(ConfigError, match=text):
        build_patterns({"c": entry}, preset("8-sparse"))


def net_to_prune():
    net = Net(size=(4, 10, 10), seed=2)
    first = net.conv("clip", 16)
    second = net.conv(first, 32)
    net.dense(net.pool(net.conv(second, 32, stride=2), 2), 10)
    return net.graph()


@pytest.mark.parametrize("pattern", ["kgr", "kgc", "kgrc", "vanilla", "filter", "krp"])
def test_the_search_meets_its_target_and_takes_little_more(pattern):
    graph, config = net_to_prune(), preset("8-sparse")
    names = [layer.name for layer in graph.convolutions()][1:3]
    entries = choose_rates(graph, names, pattern, 1.5, config)
    dense, kept = kept_operations(prune(graph, build_patterns(entries, config)))
    assert dense / kept >= 1.5
    assert set(entries) <= set(names)
    # no layer is superfluous: without it, the target is missed
    for name in entries:
        fewer = {n: e for n, e in entries.items() if n != name}
        dense, kept = kept_operations(prune(graph, build_patterns(fewer, config)))
        assert dense / kept < 1.5


def traced(name):
    torch.manual_seed(0)
    build, clip = find_network(name)
    return trace(build(), clip, name=name)


def compiler(design):
    """Float graph to program, with ranges from one clip of noise."""

    def compile_graph(graph):
        size = graph.layers[0].size
        frames = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
        clips = [graph.clip.normalise(frames)]
        return lower(choose_quant(graph, clips, design.bits, "minmax"), design)

    return compile_graph


def judged(graph, layers, design):
    """The reduction of the compiled program's cycles, by the model that `info` reports."""
    pruned = prune(graph, build_patterns(layers, design), design.group_size)
    compile_graph = compiler(design)
    return modelled_ms(compile_graph(graph)) / modelled_ms(compile_graph(pruned))


@pytest.mark.parametrize(
    ("name", "design", "asked"),
    [
        ("thin_c3d", "8-sparse", 1.3),
        ("thin_r2plus1d", "8-sparse", 1.2),
        ("thin_c3d", "8-zcu102", 1.25),
        ("thin_c3d", "4-sparse", 1.2),
        *(
            pytest.param(name, design, asked, marks=pytest.mark.slow)
            for name in ("c3d", "r2plus1d_18")
            for design in ("8-zcu102", "8-sparse")
            for asked in (1.5, 2.0)
        ),
    ],
)
def test_a_latency_that_is_asked_for_is_that_of_the_compiled_program(name, design, asked):
    """The paper's cycle model, by which rates were searched before, gave 2.5 to 2.7x for 2x."""
    graph, design = traced(name), preset(design)
    names = [layer.name for layer in graph.convolutions()][1:-1]
    found = choose_rates_by_latency(graph, names, "kgrc", asked, compiler(design))
    reached = judged(graph, found.layers, design)
    missed = (name, design.name, asked) == ("c3d", "8-sparse", 2.0)  # 2.08, and it is said
    assert reached == pytest.approx(asked, rel=0.05 if missed else TOLERANCE)
    assert found.reached == pytest.approx(reached, rel=1e-9)
    said = (
        f"asked for {asked:.2f}x fewer cycles, reached {reached:.2f}x on {design.name} "
        f"(modelled with memory by accelerator/latency.py)"
    )
    assert said in str(found)
    assert str(found).endswith("the search found no rates nearer" if missed else said)


def test_a_latency_that_the_rates_do_not_give_is_said():
    """KGR halves a layer or leaves it dense: nothing is near the target."""
    graph, design = traced("thin_c3d"), preset("8-sparse")
    found = choose_rates_by_latency(graph, ["conv2"], "kgr", 1.05, compiler(design))
    assert found.reached == pytest.approx(judged(graph, found.layers, design))
    assert abs(found.reached / 1.05 - 1) > TOLERANCE
    assert "asked for 1.05x fewer cycles, reached 1.08x on 8-sparse" in str(found)
    assert str(found).endswith("the search found no rates nearer")
    with pytest.raises(
        ConfigError, match=r"at most 1\.08x cheaper, not 2x \(83% of its cost is in"
    ):
        choose_rates_by_latency(graph, ["conv2"], "kgr", 2, compiler(design))


def test_a_first_layer_that_is_folded_stays_dense():
    """What packing would gain there depends on each weight that training keeps."""
    graph, design = traced("thin_c3d"), preset("8-sparse")
    names = ["conv1", "conv2", "conv3b"]
    found = choose_rates_by_latency(graph, names, "kgrc", 1.2, compiler(design))
    assert found.layers and "conv1" not in found.layers
    assert found.left == "conv1" and "; conv1 stays dense, as the host folds its taps" in str(found)
    with pytest.raises(ConfigError, match=r"at most 1\.00x cheaper, .*; conv1 stays dense"):
        choose_rates_by_latency(graph, ["conv1"], "kgr", 1.1, compiler(design))
    # the program of other weights of these layers is as fast
    rng = np.random.default_rng(1)
    others = {name: rng.normal(0, 0.1, graph[name].weight.shape) for name in names}
    other = judged(graph.with_weights(others), found.layers, design)
    assert other == pytest.approx(found.reached, rel=0.01)
    assert choose_rates_by_latency(graph, names[1:], "kgrc", 1.2, compiler(design)).left is None


def test_the_cost_of_a_pruned_layer_is_that_of_its_task():
    """With shortcuts, pools and copies, the predicted cycles equal the compiled program's."""
    net = Net(size=(4, 12, 12), seed=3)
    first = net.conv("clip", 16)
    left = net.conv(first, 24, name="left")
    right = net.conv(net.conv(first, 24, name="right"), 24, act="none", name="end")
    joined = net.add(left, right)
    pooled = net.pool(net.conv(joined, 32, name="last"), 2)
    net.dense(net.pool(pooled, 3, 1, 1), 10)
    graph, design = net.graph(), preset("8-sparse")

    def compile_graph(graph):
        return lower(choose_quant(graph, net.clips(), 8, "minmax"), design)

    program = compile_graph(graph)
    cost = PrunedCycles(program)
    for pattern in (Rates(HALF), Rates(HALF, 2 * THIRD), Blocks(HALF), Filters(HALF)):
        for name in ("left", "end", "last"):
            layer = graph[name]
            projection = KernelGroups(pattern) if isinstance(pattern, Rates) else pattern
            kept = keep_mask(layer.weight, projection)
            pruned = compile_graph(prune(graph, {name: projection}))
            others = [other for other in graph.convolutions() if other.name != name]
            found = cost.rest(graph.convolutions()) + cost(layer, kept)
            found += sum(cost(other, np.ones_like(other.weight, bool)) for other in others)
            assert found == program_cycles(pruned)
    assert cost.rest(graph.convolutions()) > 0
    stranger = replace(graph["left"], name="gone")
    with pytest.raises(ConfigError, match="net has no convolution 'gone'"):
        cost(stranger, np.ones_like(stranger.weight, bool))


def test_small_weights_and_large_pools_take_their_time():
    """A pool of 1152 taps is cut as calibration cuts it; weights that are small are no zeros."""
    net = Net(size=(8, 12, 12), seed=4)
    net.dense(net.pool(net.conv("clip", 16, name="first"), (8, 12, 12), op="average_pool"), 10)
    graph, design = net.graph(), preset("8-sparse")
    weight = graph["first"].weight
    assert len(list_work(graph, design, {})) == len(compile_shapes(graph, design).tasks) == 4
    program = compile_shapes(graph.with_weights({"first": 1e-9 * weight}), design)
    assert program.tasks[0].weights.enabled.all()
    assert program_cycles(program) == program_cycles(compile_shapes(graph, design))


@pytest.mark.parametrize("name", ["16-blocks-8", "16-blocks-16"])
def test_a_block_of_a_whole_filter_tile_is_skipped(name):
    """Of 2 x 8 or 2 x 4 blocks a quarter stays, and the array runs a quarter of the products."""
    design = read_design(str(ROOT / "benchmarks" / "designs" / f"{name}.json"))
    net = Net(size=(2, 8, 8), seed=4)
    net.dense(net.pool(net.conv(net.conv("clip", 64), 128, name="wide"), 2), 10)
    graph = net.graph()
    pattern = build_pattern(LayerRecipe("blockwise", rate="3/4"), design)
    assert pattern == Blocks(Fraction(3, 4), 64, design.tn)

    def macs(graph):
        program = compile_shapes(graph, design)
        return program.array_macs(next(task for task in program.tasks if task.name == "wide"))

    assert macs(graph) == 4 * macs(prune(graph, {"wide": pattern}))
    few = prune(graph, {"wide": Blocks(Fraction(3, 4), 8, 8)})  # blocks that a tile does not skip
    assert macs(few) > macs(graph) / 2


def test_published_blocks_are_of_layers_that_there_are():
    """R(2+1)D-18: all 16 convolutions of its second and third residual block but the shortcut."""
    graph = traced("r2plus1d_18")
    recipe = build_patterns(published_recipe("r2plus1d_18", "blockwise"))
    assert len(recipe) == 16 and recipe.keys() <= {layer.name for layer in graph.convolutions()}
    kept = sum(graph[name].shape.macs for name in recipe if name.startswith("layer1"))
    assert 2 * kept == pytest.approx(44.39e9, rel=0.001)  # table II counts a MAC as two operations
    with pytest.raises(ConfigError, match="no recipe 'blockwise' for 'c3d'"):
        published_recipe("c3d", "blockwise")


def test_targets_out_of_reach_are_refused():
    graph, config = net_to_prune(), preset("8-sparse")
    with pytest.raises(
        ConfigError, match=r"kgr makes net at most 1\.\d\dx cheaper, not 9x \(.*; prune more"
    ):
        choose_rates(graph, ["conv2"], "kgr", 9, config)
    with pytest.raises(ConfigError, match="no pattern 'best'"):
        choose_rates(graph, ["conv2"], "best", 2, config)


# ---- penalties ------------------------------------------------------------------------------


def layer_of(weight):
    layer = nn.Conv3d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False)
    layer.weight.data = torch.from_numpy(weight).float()
    return nn.Sequential(layer)


@pytest.mark.parametrize("norm", ["l1", "l2", "mixed"])
def test_group_lasso_is_its_formula(norm):
    weight = draw((8, 4, 1, 3, 3))
    recipe = {"0": KernelGroups(Rates(HALF, THIRD), SIZE)}
    found = float(GroupLasso(layer_of(weight), recipe, 0.1, norm).loss().detach())
    expected = 0.0
    for p in range(2):  # eq. (8): rows and columns, each at half the factor
        group = weight[4 * p : 4 * p + 4].reshape(4, 4, 9)
        for unit in [group[m] for m in range(4)] + [group[:, :, k] for k in range(9)]:
            l1, l2 = np.abs(unit).mean(), np.sqrt((unit**2).mean())
            expected += {"l1": l1, "l2": l2, "mixed": (l1 + l2) / 2}[norm]
    assert found == pytest.approx(0.1 / 2 * expected, rel=1e-5)


def test_operations_weigh_the_layers():
    weight = draw((8, 8, 3, 3, 3))
    network = nn.Sequential(layer_of(weight)[0], layer_of(weight)[0])
    recipe = {"0": Filters(HALF), "1": Filters(HALF)}
    plain = GroupLasso(network, recipe, 1.0).loss()
    weighted = GroupLasso(network, recipe, 1.0, costs={"0": 3.0, "1": 1.0}).loss()
    assert float(weighted.detach()) == pytest.approx(float(plain.detach()))
    weighted.backward()
    assert network[0].weight.grad.norm() == pytest.approx(3 * float(network[1].weight.grad.norm()))


def test_reweighting_presses_the_weak_and_lets_the_strong_go():
    weight = draw((8, 4, 3, 3, 3))
    weight[:4] *= 0.1
    network = layer_of(weight)
    penalty = Reweighted(network, {"0": Filters(HALF)}, 1.0, updates=2)
    norms = np.sqrt((weight**2).mean(axis=(1, 2, 3, 4)))
    penalty.start_epoch(0, 10)
    (reweights,) = penalty.state_dict()["reweights"]
    expected = 1 / (norms**2 + 1e-3 * (norms**2).mean())  # eq. (4)
    np.testing.assert_allclose(reweights.numpy(), expected / expected.mean(), rtol=1e-4)
    assert reweights[:4].min() > 20 * reweights[4:].max()
    network[0].weight.data.fill_(1.0)
    penalty.start_epoch(1, 10)
    assert penalty.state_dict()["reweights"][0] is reweights  # Algorithm 1, line 4: not every epoch
    penalty.start_epoch(5, 10)
    (again,) = penalty.state_dict()["reweights"]
    np.testing.assert_allclose(again.numpy(), 1.0, rtol=1e-5)


def descend(network, penalty, steps=300, epochs=10, lr=0.01):
    """Gradient descent on a penalty plus the squared distance to the initial weight."""
    start = network[0].weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    for step in range(steps):
        if step % (steps // epochs) == 0:
            penalty.start_epoch(step // (steps // epochs), epochs)
        loss = ((network[0].weight - start) ** 2).sum() / 2 + penalty.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network[0].weight.detach().numpy()


def test_reweighting_separates_what_fixed_lasso_shrinks():
    """At the same factor, reweighting ends with smaller weak units and larger strong ones."""
    weight = draw((8, 4, 3, 3, 3))
    weight[:4] *= 0.3
    ends = {}
    for kind in (GroupLasso, Reweighted):
        network = layer_of(weight.copy())
        ends[kind] = descend(network, kind(network, {"0": Filters(HALF)}, 20.0), lr=0.02)
    size = {kind: np.abs(end).mean(axis=(1, 2, 3, 4)) for kind, end in ends.items()}
    assert np.median(size[Reweighted][:4]) < 0.3 * np.median(size[GroupLasso][:4])
    assert size[Reweighted][4:].min() > size[GroupLasso][4:].max()


def test_admm_ends_on_the_pattern():
    weight = draw((8, 8, 1, 3, 3))
    recipe = {"0": KernelGroups(Rates(HALF, 2 * THIRD), SIZE)}
    network = layer_of(weight.copy())
    admm = Admm(network, pruning_projections(recipe), rho=0.5, rounds=3, growth=10, every=1)
    before = admm.distance()
    # Z starts as W, so that the first epoch has no penalty (Algorithm 1)
    assert float(admm.loss().detach()) == 0
    end = descend(network, admm)
    assert admm.distance() < 0.1 * before
    admm.settle()
    settled = network[0].weight.detach().numpy()
    np.testing.assert_array_equal(settled, project_pattern(end, recipe["0"]))
    assert admm.distance() == 0


def test_admm_follows_its_equations():
    weight = draw((4, 4, 1, 1, 1))
    network = layer_of(weight.copy())
    pattern = Filters(HALF)
    admm = Admm(network, pruning_projections({"0": pattern}), rho=2.0, rounds=2, growth=5)
    admm.start_epoch(0, 4)
    w0 = network[0].weight.detach().numpy().copy()
    z1 = project_pattern(w0, pattern)  # eq. (13) with V = 0
    v1 = w0 - z1  # eq. (9)
    network[0].weight.data += 0.25
    w1 = network[0].weight.detach().numpy().copy()
    assert float(admm.loss().detach()) == pytest.approx(
        ((w1 - z1 + v1) ** 2).sum(), rel=1e-5
    )  # rho / 2 = 1
    admm.start_epoch(1, 4)
    z2 = project_pattern(w1 + v1, pattern)
    v2 = v1 + w1 - z2
    assert float(admm.loss().detach()) == pytest.approx(((w1 - z2 + v2) ** 2).sum(), rel=1e-5)
    admm.start_epoch(2, 4)  # a new rho: V starts over
    z3 = project_pattern(w1, pattern)
    v3 = w1 - z3
    assert float(admm.loss().detach()) == pytest.approx(5 * ((w1 - z3 + v3) ** 2).sum(), rel=1e-5)


def test_admm_settles_by_its_rule():
    """Eq. (10): W near Z and Z near the next Z, in the last round."""
    network = layer_of(draw((4, 4, 1, 1, 1)))
    admm = Admm(network, pruning_projections({"0": Filters(HALF)}), rounds=2, stop=0.01)
    admm.start_epoch(0, 4)
    admm.settle()
    assert not admm.settled()  # the first of two rounds
    admm.start_epoch(2, 4)
    assert admm.settled()
    network[0].weight.data[admm._z["0"] == 0] += 0.5  # now W is far from any allowed weight
    assert not admm.settled()
    admm.settle()
    network[0].weight.data *= 1.1  # allowed, but another Z
    assert not admm.settled()
    never = Admm(network, pruning_projections({"0": Filters(HALF)}), rounds=1)
    never.start_epoch(0, 4)
    assert not never.settled()
    with pytest.raises(ConfigError, match=r"stop=1\.5"):
        Admm(network, {}, stop=1.5)


@pytest.mark.parametrize(
    ("pattern", "weak", "found"),
    [
        ("kgr", np.s_[::2], LayerRecipe("kgr", rows="1/2")),
        ("kgr", np.s_[::3], None),  # three of eight: eq. (9) allows a half or none
        ("kgc", np.s_[:, :, :, :1], LayerRecipe("kgc", cols="1/3")),
        ("kgrc", np.s_[::2], LayerRecipe("kgrc", rows="1/2")),
        ("filter", np.s_[:3], LayerRecipe("filter", rate="1/8")),
        ("vanilla", np.s_[:8, :8], LayerRecipe("vanilla", rate="1/4")),
        ("krp", np.s_[:, :, 1:], LayerRecipe("krp", keep=3)),
        ("unstructured", np.s_[:, :6], LayerRecipe("unstructured", rate="3/8")),
    ],
)
def test_rates_are_those_of_the_weak(pattern, weak, found):
    graph = net_to_prune()
    weight = np.ones((16, 16, 3, 3, 3))
    weight[weak] = 1e-3
    name = graph.convolutions()[1].name
    if found is None:
        with pytest.raises(ConfigError, match=r"no layer has enough units of kgr below 0\.5 times"):
            rates_by_threshold(graph, {name: weight}, pattern, 0.5, preset("8-sparse"))
        return
    rates = rates_by_threshold(graph, {name: weight}, pattern, 0.5, preset("8-sparse"))
    assert rates == {name: found}
    # what goes is what is weak
    kept = keep_mask(weight, build_pattern(found, preset("8-sparse")))
    assert (weight[~kept] < 0.5).all()


def test_mistakes_are_refused_before_training():
    network = layer_of(draw((8, 4, 3, 3, 3)))
    with pytest.raises(ConfigError, match="the recipe names 'conv9'; Sequential has 0"):
        Reweighted(network, {"conv9": Filters(HALF)}, 1.0)
    with pytest.raises(ConfigError, match="norm='l3'; accepted are l1, l2, mixed"):
        GroupLasso(network, {"0": Filters(HALF)}, 1.0, "l3")
    with pytest.raises(ConfigError, match="updates=0; use 1 or more"):
        Reweighted(network, {"0": Filters(HALF)}, 1.0, updates=0)
    with pytest.raises(ConfigError, match="rho=0"):
        Admm(network, {}, rho=0)
    with pytest.raises(ConfigError, match=r"bits=5; accepted are \(16, 8, 4\)"):
        quantizing_projections(network, ["0"], 5)
    with pytest.raises(ConfigError, match="powers of two take 3 or 4 bits, not 8"):
        quantizing_projections(network, ["0"], 8, powers=True)


# ---- codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_quantized_weights_are_codes(bits):
    weight = draw((8, 4, 3, 3, 3))
    weight[2] = 0
    weight[0, 0] = 0
    found = quantize_to(weight, bits)
    assert (found[weight == 0] == 0).all()
    error = np.abs(found - weight).max() / np.abs(weight).max()
    assert error < {16: 1e-4, 8: 1e-2, 4: 0.4}[bits]
    for row in found:
        levels = np.unique(np.abs(row))
        assert len(levels) <= 2 ** (bits - 1)


@pytest.mark.parametrize(("bits", "codes"), [(3, {0, 1, 2, 4}), (4, {0, 1, 2, 4, 8, 16, 32, 64})])
def test_powers_of_two_are_the_nearest(bits, codes):
    weight = draw((3, 40))
    weight[:, 0] = np.abs(weight).max(axis=1) * 1.5
    weight[1, 5] = 0
    found = quantize_to_powers(weight, bits)
    scale = weight[:, :1] / max(codes)
    values = np.array(sorted({-c for c in codes} | codes))
    nearest = np.abs((weight / scale)[..., None] - values).min(axis=2)
    np.testing.assert_allclose(np.abs((weight - found) / scale), nearest, atol=1e-9)
    assert found[1, 5] == 0


def test_admm_quantization_leaves_pruned_weights_alone():
    weight = draw((8, 4, 1, 3, 3))
    weight[:, :, :, 1] = 0
    network = layer_of(weight.copy())
    assert quantizing_projections(network, ["0"], 4)["0"](np.ones_like(weight)).all()
    pruned = {"0": torch.from_numpy(weight == 0)}
    projections = quantizing_projections(network, ["0"], 4, pruned=pruned)
    assert (projections["0"](np.ones_like(weight)) == np.where(weight == 0, 0, 1)).all()
    admm = Admm(network, projections, rho=1.0)
    end = descend(network, admm)
    admm.settle()
    settled = network[0].weight.detach().numpy()
    assert (settled[:, :, :, 1] == 0).all()
    assert np.abs(end - settled).max() < 0.1


# ---- importance -----------------------------------------------------------------------------


def test_importance_comes_back_from_the_result():
    """A large filter that the classifier does not read has no importance."""
    net = Net(size=(2, 4, 4))
    hidden = net.conv("clip", 8, name="hidden")
    joined = net.concat(hidden, net.conv("clip", 4, name="beside"))
    net.dense(joined, 5)
    dense = net.layers["conv4"].weight
    dense[:, 2] = 0
    dense[:, 8:] = 0
    net.layers["hidden"].weight[2] *= 100
    scores = propagate_importance(net.graph())
    assert (scores["hidden"][2] == 0).all()
    assert (scores["hidden"][[0, 1, 3, 4, 5, 6, 7]] > 0).all()
    assert (scores["beside"] == 0).all()
    by_score = prune(net.graph(), {"hidden": Filters(Fraction(7, 8))}, scores=scores)
    by_size = prune(net.graph(), {"hidden": Filters(Fraction(7, 8))})
    assert not by_score["hidden"].weight[2].any()
    assert by_size["hidden"].weight[2].any()


def test_importance_passes_adds_and_pools():
    net = Net(size=(2, 4, 4))
    first = net.conv("clip", 8, name="first")
    second = net.conv(first, 8, name="second", act="none")
    net.dense(net.pool(net.add(second, first), 2), 3)
    scores = propagate_importance(net.graph())
    weight = net.layers["conv5"].weight
    of_filter = np.abs(weight).sum(axis=(0, 2, 3, 4))
    found = scores["second"].sum(axis=(1, 2, 3, 4))
    size = np.abs(net.layers["second"].weight).sum(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(found / size, of_filter / of_filter.mean())
    # the first convolution is read twice: by the second and by the add
    assert np.corrcoef(scores["first"].sum(axis=(1, 2, 3, 4)), of_filter)[0, 1] != pytest.approx(1)


def test_thresholds_rise_as_far_as_accuracy_allows():
    graph = net_to_prune()
    names = [layer.name for layer in graph.convolutions()][:2]

    def measure(attempt):  # conv1 may lose nothing, conv2 up to half
        lost = [np.mean(attempt[name].weight == 0) for name in names]
        return 1.0 - (lost[0] > 0.01) - (lost[1] > 0.55)

    pruned, thresholds = tune_thresholds(graph, measure, 0.1, names)
    assert list(thresholds) == [names[1]]
    assert np.mean(pruned[names[1]].weight == 0) == pytest.approx(0.5, abs=0.01)
    assert (np.abs(pruned[names[1]].weight[pruned[names[1]].weight != 0])).min() >= thresholds[
        names[1]
    ]


def test_hard_pruning_of_a_module():
    network = nn.Sequential(nn.Conv3d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    pruned = prune_weights(network, {"0": PATTERNS["kgrc"], "2": Weights(HALF)})
    assert pruned.keys() == {"0", "2"}
    assert torch.equal(pruned["0"], network[0].weight == 0)
    assert torch.equal(pruned["2"], network[2].weight == 0)
    assert (network[0].weight == 0).float().mean() == pytest.approx(0.5)
    assert (network[2].weight == 0).float().mean() == pytest.approx(0.5)
    network = nn.Sequential(nn.Conv3d(8, 8, 3))
    scores = {"0": np.zeros((8, 8, 3, 3, 3))}
    scores["0"][3] = 1
    prune_weights(network, {"0": Filters(Fraction(7, 8))}, scores)
    left = np.flatnonzero(network[0].weight.detach().numpy().any(axis=(1, 2, 3, 4)))
    assert left.tolist() == [3]


def test_the_command_line_knows_the_algorithms():
    from pynq_kgrc.cli.train import ALGORITHMS as KNOWN

    assert KNOWN == ALGORITHMS
    assert build_pattern(LayerRecipe("vanilla", rate="1/2")) == Blocks(HALF)
