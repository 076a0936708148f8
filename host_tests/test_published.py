"""The paper's model against the published figures: latencies, bars of figure 6, resources."""

import json
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from pynq_kgrc.accelerator import paper
from pynq_kgrc.accelerator.boards import BOARDS, board
from pynq_kgrc.accelerator.config import AcceleratorConfig, preset
from pynq_kgrc.accelerator.latency import layer_time
from pynq_kgrc.accelerator.paper_blocks import (
    BlockDesign,
    BlockPorts,
    block_bram36,
    block_cycles,
    block_dsp,
)
from pynq_kgrc.accelerator.resources import estimate_resources
from pynq_kgrc.compress.patterns import Rates, recipe
from pynq_kgrc.compress.recipes import published_recipe
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.graph import ConvShape
from pynq_kgrc.models import c3d, r2plus1d
from pynq_kgrc.models.trace import trace

PUBLISHED = json.loads((Path(__file__).parent / "kgrc_tables.json").read_text("utf-8"))
HARDWARE_PAGE = Path(__file__).resolve().parent.parent / "docs" / "hardware.md"

LATENCY_TOLERANCE = 0.022
BAR_TOLERANCE = 0.027
DSP_TOLERANCE = 0.08

PARTIAL_TAP_TILE = ("r2plus1d_18", "dense", "conv1")
"""The bar that the model puts 9.5 % too high: 49 taps are five tap tiles and four taps more.

The model counts six whole tiles. If the dense design skipped the five taps that the last tile
lacks, the model would give 4.06 ms for the published 4.09; the sparse one does not seem to.
"""

TITLES = {"c3d": "C3D", "r2plus1d_18": "R(2+1)D"}


def row_id(row):
    return f"{row['network']}-{row['sparsity']}-{row['bits']}"


def design(sparsity, bits):
    return preset(f"{bits}-{'dense' if sparsity == 'dense' else 'sparse'}")


def figure_6_group(network, layer):
    """The bar of figure 6 that a layer belongs to."""
    if network == "c3d":
        return "conv5a+b" if layer.startswith("conv5") else layer
    if layer.startswith("stem"):
        return "conv1"
    return f"conv{int(layer[len('layer')]) + 1}_x"


class Network:
    """Shapes of a network by layer name: convolutions and, apart, fully connected layers."""

    def __init__(self, name, graph):
        self.name = name
        self.convolutions, self.connected = {}, {}
        for layer in graph.convolutions():
            # a fully connected layer is a convolution with one output position
            one = layer.shape.out_size == (1, 1, 1)
            (self.connected if one else self.convolutions)[layer.name] = layer.shape

    def kept(self, sparsity, config, connected=False):
        """(name, (shape, kr, kc)) of each layer by the paper's recipe `sparsity`."""
        rates = {} if sparsity == "dense" else recipe(self.name, sparsity.lower())
        shapes = self.connected if connected else self.convolutions
        assert connected or rates.keys() <= shapes.keys()
        for name, shape in shapes.items():
            rate = rates.get(name, Rates())
            yield name, (shape, *rate.kept(config.group_size, shape.taps))

    def ms(self, row, ports=paper.HIDDEN_LOADS):
        config = design(row["sparsity"], row["bits"])
        return paper.network_ms(
            config, (kept for _, kept in self.kept(row["sparsity"], config)), ports
        )


@pytest.fixture(scope="session")
def networks():
    """The project's full-size networks with untrained weights: only shapes are read."""
    return {
        "c3d": Network("c3d", trace(c3d.c3d(), c3d.CLIP)),
        "r2plus1d_18": Network(
            "r2plus1d_18", trace(r2plus1d.r2plus1d_18(classes=101), r2plus1d.CLIP)
        ),
    }


@pytest.fixture(scope="session")
def bars(networks):
    """{(network, sparsity, group): modelled ms} of the bars of figure 6."""
    sums = defaultdict(float)
    for name, network in networks.items():
        for sparsity in ("dense", "KGR", "KGC", "KGRC"):
            config = design(sparsity, 8)
            for layer, kept in network.kept(sparsity, config):
                group = figure_6_group(name, layer)
                sums[name, sparsity, group] += paper.layer_ms(config, *kept, paper.HIDDEN_LOADS)
    return sums


# ---- latency ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", PUBLISHED["table_iv"], ids=row_id)
def test_modelled_latency_is_the_published_one(networks, row):
    assert networks[row["network"]].ms(row) == pytest.approx(
        row["latency_ms"], rel=LATENCY_TOLERANCE
    )


def published_bars():
    for network, figure in PUBLISHED["figure_6_ms_8bit"].items():
        for sparsity in ("dense", "KGR", "KGC", "KGRC"):
            for group, ms in zip(figure["layers"], figure[sparsity], strict=True):
                yield (network, sparsity, group), ms


@pytest.mark.parametrize(("bar", "ms"), list(published_bars()), ids=str)
def test_modelled_bar_is_the_published_one(bars, bar, ms):
    if bar == PARTIAL_TAP_TILE:
        assert bars[bar] / ms - 1 == pytest.approx(0.095, abs=0.002)
    else:
        assert bars[bar] == pytest.approx(ms, rel=BAR_TOLERANCE)


def test_all_published_figures_are_compared(bars):
    assert len(PUBLISHED["table_iv"]) == 24
    assert set(bars) == {bar for bar, _ in published_bars()}
    assert len(bars) == 48


# ---- the repairs and the equations, by hand ---------------------------------------------------

CONV = ConvShape(64, (16, 56, 56), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), filters=128)
"""C3D's conv2: 64 tiles of 4x14x14, 8 channel tiles, 3 tap tiles."""

SPARSE = preset("8-sparse")
ASSUMED = paper.ASSUMED_PORTS


def test_a_layer_by_hand():
    # T_F / P_F = 784 / 8, 3 of 9 columns in steps of 3, 4 of 8 rows in steps of 4; fill 21 + 42
    compute = 98 * 1 * 1 + 63
    assert paper.compute_cycles(SPARSE, CONV, 4, 3) == compute
    assert paper.load_compute_cycles(SPARSE, CONV, 4, 3, paper.HIDDEN_LOADS) == 3 * compute
    assert paper.store_cycles(SPARSE, CONV, 4, 3, paper.HIDDEN_LOADS) == 25 * compute
    # 32 / 8 words of 784 positions, four in a cycle; 64 x 128 / 32 output tiles
    assert paper.output_cycles(SPARSE, CONV, ASSUMED) == 784
    cycles = 256 * 25 * compute + 784
    assert paper.paper_layer_cycles(SPARSE, CONV, 4, 3, paper.HIDDEN_LOADS) == cycles
    assert paper.layer_ms(SPARSE, CONV, 4, 3, paper.HIDDEN_LOADS) == pytest.approx(cycles / 150e3)
    ms = paper.layer_ms(SPARSE, CONV, 4, 3, paper.HIDDEN_LOADS, clock_mhz=300.0)
    assert ms == pytest.approx(cycles / 300e3)


def test_loads_by_hand():
    # a region of 6x16x16 positions and 16 rows of 3 words, eight in a cycle
    assert paper.input_cycles(SPARSE, CONV, ASSUMED) == 192
    assert paper.weight_cycles(SPARSE, CONV, 4, 3, ASSUMED) == 16
    assert paper.weight_cycles(SPARSE, CONV, 8, 9, ASSUMED) == 64
    # T_N = 8 channels of 16 bits are two words
    assert paper.input_cycles(preset("16-sparse"), CONV, ASSUMED) == 384
    assert paper.input_cycles(SPARSE, CONV, paper.HIDDEN_LOADS) == 0
    assert paper.weight_cycles(SPARSE, CONV, 8, 9, paper.HIDDEN_LOADS) == 0


def test_a_small_map_is_not_padded_up_to_a_tile():
    small = ConvShape(512, (2, 7, 7), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), filters=512)
    assert paper.clipped_tile(SPARSE, small) == (2, 7, 7)
    assert paper.compute_cycles(SPARSE, small, 8, 9) == 13 * 3 * 2 + 21
    assert paper.input_cycles(SPARSE, small, ASSUMED) == -(-2 * 7 * 7 // 8)


def test_the_array_is_used_whole_where_the_factors_divide_what_is_kept():
    assert paper.utilisation(SPARSE, CONV, 8, 9) == 1
    assert paper.utilisation(SPARSE, CONV, 4, 3) == 1
    # 6 rows take two steps of 4, 4 columns two steps of 3
    assert paper.utilisation(SPARSE, CONV, 6, 4) == pytest.approx(6 * 4 / (8 * 6))


def test_the_largest_term_with_narrow_ports():
    narrow = paper.Ports
    assert paper.bound_by(SPARSE, CONV, 4, 3, ASSUMED) == "compute"
    assert paper.bound_by(SPARSE, CONV, 4, 3, narrow(b_in=1)) == "input"
    assert paper.bound_by(SPARSE, CONV, 8, 9, narrow(b_wgt=1, b_in=8)) == "compute"
    pointwise = ConvShape(4096, (1, 1, 1), (1, 1, 1), filters=4096)
    assert paper.bound_by(SPARSE, pointwise, 8, 1, ASSUMED) == "weight"
    first = ConvShape(3, (16, 112, 112), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), filters=64)
    assert paper.bound_by(SPARSE, first, 8, 9, narrow(b_out=1)) == "output"
    assert paper.store_cycles(SPARSE, first, 8, 9, narrow(b_out=1)) == 4 * 784


def test_equation_20_agrees_with_the_binding_term(networks):
    seen = set()
    for network in networks.values():
        for sparsity in ("dense", "KGRC"):
            config = design(sparsity, 8)
            for connected in (False, True):
                for _, kept in network.kept(sparsity, config, connected):
                    term = paper.bound_by(config, *kept, ASSUMED)
                    assert paper.compute_bound(config, *kept, ASSUMED) == (term == "compute")
                    seen.add(term)
    assert seen == {"compute", "input", "weight"}


def test_a_fully_connected_layer_waits_for_its_weights(networks):
    config = preset("8-sparse")
    kept = dict(networks["c3d"].kept("KGRC", config, connected=True))
    assert set(kept) == {"fc6", "fc7", "fc8"}
    assert {paper.bound_by(config, *layer, ASSUMED) for layer in kept.values()} == {"weight"}
    hidden = paper.network_ms(config, kept.values(), paper.HIDDEN_LOADS)
    assert paper.network_ms(config, kept.values(), ASSUMED) > hidden


@pytest.mark.parametrize(
    ("config", "kr", "kc", "text"),
    [
        (SPARSE, 0, 9, "8-sparse: kr=0 is not within 1 to 8"),
        (SPARSE, 9, 9, "8-sparse: kr=9 is not within 1 to 8"),
        (SPARSE, 8, 10, "8-sparse: kc=10 is not within 1 to 9"),
        (preset("8-dense"), 4, 9, "8-dense: kr=4 is not within 8 to 8"),
        (preset("8-dense"), 8, 3, "8-dense: kc=3 is not within 9 to 9"),
    ],
)
def test_kept_rows_and_columns_are_checked(config, kr, kc, text):
    for function, ports in (
        (paper.utilisation, ()),
        (paper.weight_cycles, (ASSUMED,)),
        (paper.compute_cycles, ()),
        (layer_time, ()),
    ):
        with pytest.raises(ConfigError, match=text):
            function(config, CONV, kr, kc, *ports)


# ---- resources --------------------------------------------------------------------------------


def design_id(row):
    return f"{row['bits']}-{row['design']}"


@pytest.mark.parametrize("row", PUBLISHED["table_v"], ids=design_id)
def test_modelled_resources_are_near_the_published_ones(row):
    config = preset(design_id(row))
    assert paper.dsp(config) == pytest.approx(row["dsp"], rel=DSP_TOLERANCE)
    assert paper.dsp_used(config) == pytest.approx(row["dsp"], rel=0.014)
    assert paper.lut(config) == pytest.approx(row["lut_k"] * 1000, rel=0.042)
    assert paper.bram36_banked(config) == pytest.approx(row["bram36"], rel=0.2)
    # equations (12) and (13) count the capacity for the data and no banks
    assert 5.6 <= row["bram36"] / paper.bram36(config) <= 10.3


def test_block_rams_by_hand():
    # 784 x 9 words of 64 bits, 32 x 9 of them, and four times 784, in banks of 18 kbit
    config = preset("8-sparse")
    counted = (paper.bram_input(config), paper.bram_weight(config), paper.bram_output(config))
    assert counted == (25, 1, 12)
    assert paper.bram36(config) == 38


def test_the_published_designs_fit_their_board_and_no_small_one():
    for row in PUBLISHED["table_v"]:
        assert paper.fits(preset(design_id(row)), board("zcu102"))
        assert not paper.fits(preset(design_id(row)), board("kv260"))
    assert not paper.fits(preset("8-sparse"), board("zcu102"), rho=0.6)
    zcu102 = board("zcu102")
    for scarce in (dict(dsp=2000), dict(bram36=350), dict(lut=160_000)):
        assert not paper.fits(preset("8-sparse"), replace(zcu102, **scarce)), scarce
    small = AcceleratorConfig("small", 8, True, tm=8, tn=8, pm=4, pk=3, pf=2)
    assert all(paper.fits(small, entry) for entry in BOARDS.values())


def test_boards_are_those_of_the_paper_and_the_vendor():
    zcu102, paper_zcu102 = board("zcu102"), PUBLISHED["zcu102"]
    assert (zcu102.dsp, zcu102.bram36) == (paper_zcu102["dsp"], paper_zcu102["bram36"])
    assert round(zcu102.lut / 1000) == paper_zcu102["lut_k"]
    assert round(zcu102.ff / 1000) == paper_zcu102["ff_k"]
    assert zcu102.ddr_bytes_per_second == pytest.approx(17.07e9, rel=1e-3)
    assert set(BOARDS) == {"zcu102", "zcu104", "zcu106", "kv260", "ultra96"}
    assert all(entry.ff == 2 * entry.lut for entry in BOARDS.values())
    with pytest.raises(ConfigError, match="no board named 'zcu999'; there are zcu102, zcu104"):
        board("zcu999")


# ---- the page ---------------------------------------------------------------------------------


def latency_lines(networks):
    """Rows of the table of docs/hardware.md that has table IV, published and modelled."""
    for row in PUBLISHED["table_iv"]:
        network, ms = networks[row["network"]], row["latency_ms"]
        modelled = network.ms(row)
        stated = network.ms(row, paper.ASSUMED_PORTS)
        yield (
            f"| {TITLES[row['network']]} | {row['sparsity'].replace('dense', 'Dense')} "
            f"| {row['bits']} | {ms:.2f} | {modelled:.2f} | {100 * (modelled / ms - 1):+.1f} "
            f"| {stated:.2f} |"
        )


def resource_lines():
    """Rows of the table of docs/hardware.md that has table V, published and modelled."""
    for row in PUBLISHED["table_v"]:
        config = preset(design_id(row))
        yield (
            f"| {row['bits']} {row['design'].title()} "
            f"| {row['dsp']} | {paper.dsp(config)} | {paper.dsp_used(config)} "
            f"| {row['bram36']} | {paper.bram36(config):.0f} | {paper.bram36_banked(config):.0f} "
            f"| {row['lut_k']} | {paper.lut(config) / 1000:.0f} |"
        )


def test_the_page_shows_what_the_model_says(networks):
    lines = set(HARDWARE_PAGE.read_text("utf-8").splitlines())
    for line in (*latency_lines(networks), *resource_lines()):
        assert line in lines, f"docs/hardware.md lacks or differs from: {line}"


# ---- throughput -------------------------------------------------------------------------------

MODELLED = json.loads(
    (HARDWARE_PAGE.parent.parent / "benchmarks" / "results" / "latency.json").read_text("utf-8")
)


def efficiencies(network, row):
    """GOPS, GOPS per watt and per DSP of a row of table IV: pruned and original operations."""
    config = design(row["sparsity"], row["bits"])
    kept = [layer for _, layer in network.kept(row["sparsity"], config)]
    dense = sum(shape.macs for shape, _, _ in kept)
    pruned = sum(
        shape.macs * kr * kc / (config.gm * config.group_size.columns(shape.taps))
        for shape, kr, kc in kept
    )
    dsp = next(
        used["dsp"]
        for used in PUBLISHED["table_v"]
        if used["bits"] == row["bits"] and (used["design"] == "sparse") == config.sparse
    )
    for macs in (pruned, dense):
        found = paper.gops(macs, row["latency_ms"])
        yield macs, found, found / row["power_w"], found / dsp


def table_iv(network, sparsity, bits):
    return next(
        row
        for row in PUBLISHED["table_iv"]
        if (row["network"], row["sparsity"], row["bits"]) == (network, sparsity, bits)
    )


def test_efficiencies_are_those_of_the_papers_text(networks):
    """Section VI-C: ratios to [39] (157.9 GOPS/W, 0.975 GOPS/DSP) and to E3DNet (9.60 GOPS/W)."""
    (_, _, pruned, _), (_, _, watt, dsp) = efficiencies(networks["c3d"], table_iv("c3d", "KGRC", 8))
    assert watt / 157.9 == pytest.approx(1.46, abs=0.01)
    assert dsp / 0.975 == pytest.approx(1.11, abs=0.01)
    assert pruned == pytest.approx(75.9, abs=0.5)
    of_r2plus1d = next(efficiencies(networks["r2plus1d_18"], table_iv("r2plus1d_18", "KGRC", 8)))
    assert of_r2plus1d[2] / 9.60 == pytest.approx(6.96, rel=0.02)
    # the upper end of the printed range is that of KGC, not of KGRC
    of_kgc = next(efficiencies(networks["c3d"], table_iv("c3d", "KGC", 8)))
    assert of_kgc[2] / 9.60 == pytest.approx(9.81, rel=0.01)


def throughput_lines(networks):
    """The rows of the table of docs/hardware.md."""
    ours = {
        (row["network"], row["pattern"], row["design"]): row["modelled"]["70"][0]
        for row in MODELLED["rows"]
    }
    for row in PUBLISHED["table_iv"]:
        config = design(row["sparsity"], row["bits"])
        (pruned, *first), (dense, *second) = efficiencies(networks[row["network"]], row)
        ms = ours[row["network"], row["sparsity"], config.name]
        used = estimate_resources(config).dsp
        modelled = [[paper.gops(m, ms), paper.gops(m, ms) / used] for m in (pruned, dense)]
        cells = [TITLES[row["network"]], row["sparsity"].replace("dense", "Dense"), config.name]
        for (a, b), digits in zip(
            [*zip(first, second, strict=True), *zip(*modelled, strict=True)],
            (0, 1, 2, 0, 2),
            strict=True,
        ):
            both = f"{a:.{digits}f} ({b:.{digits}f})"
            cells.append(f"{a:.{digits}f}" if pruned == dense else both)
        yield f"| {' | '.join(cells)} |"


def test_the_table_of_throughput_is_right(networks):
    lines = set(HARDWARE_PAGE.read_text("utf-8").splitlines())
    for line in throughput_lines(networks):
        assert line in lines, f"docs/hardware.md lacks or differs from: {line}"


# ---- the blockwise paper ----------------------------------------------------------------------

BLOCKS = BlockDesign(64, 8), BlockDesign(64, 16)


def test_block_cycles_by_hand():
    shape = ConvShape(32, (8, 28, 28), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), filters=128)
    design = BLOCKS[0]
    compute = 27 * 784
    assert block_cycles(design, shape) == 2 * 2 * 2 * 2 * (4 * compute + compute)
    # half of the 2 x 4 blocks
    assert block_cycles(design, shape, 0.5) == 16 * (2 * compute + compute)
    # one code a cycle: an input tile of 6 x 16 x 16 for 8 channels is less than the products
    slow = BlockPorts(weight=1, inputs=1, output=1)
    loaded = max(8 * 6 * 16 * 16, 64 * 8 * 27, compute)
    stored = 64 * 784
    assert block_cycles(design, shape, 1.0, slow) == 16 * (4 * loaded + compute) + stored
    assert block_bram36(design, [shape]) == pytest.approx(
        2 * (64 * 784 + 8 * 6 * 16 * 16 + 64 * 8 * 27) * 16 / 36864
    )
    assert [block_dsp(design) for design in BLOCKS] == [512, 1024]  # published: 695, 1215


def block_ms(network, design, pruned=False):
    """Convolutions of a network, in ms at 150 MHz; pruned as the paper's table II."""
    kept = published_recipe("r2plus1d_18", "blockwise") if pruned else {}
    return sum(
        block_cycles(design, shape, float(1 - Fraction(kept[name].rate)) if name in kept else 1.0)
        for name, shape in network.convolutions.items()
    ) / (paper.PUBLISHED_CLOCK_MHZ * 1e3)


def test_block_latencies_are_near_the_published_ones(networks):
    """Table IV in ms; as printed, with loads hidden, the model is off by 13 to 20 %."""
    for name, published in (("c3d", (826, 487)), ("r2plus1d_18", (1044, 609))):
        for design, ms in zip(BLOCKS, published, strict=True):
            assert -0.185 < block_ms(networks[name], design) / ms - 1 < -0.125
    for design, ms in zip(BLOCKS, (386, 234), strict=True):
        found = block_ms(networks["r2plus1d_18"], design, pruned=True)
        assert 0.165 < found / ms - 1 < 0.205
