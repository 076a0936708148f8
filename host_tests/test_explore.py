"""The search for designs: which fit, which are fast, and the targets of the project."""

import json
import math
import re
from dataclasses import asdict, replace
from fractions import Fraction

import pytest
from networks import Net, compiled, small_config
from test_published import HARDWARE_PAGE

from pynq_kgrc.accelerator import paper
from pynq_kgrc.accelerator.boards import REFERENCE, board, board_of_design
from pynq_kgrc.accelerator.config import PRESETS, preset, read_design, write_design
from pynq_kgrc.accelerator.explore import (
    Candidate,
    Latency,
    Network,
    evaluate,
    least_cycles,
    least_ms,
    list_designs,
    macs_a_cycle,
    model_latency,
    pareto_front,
)
from pynq_kgrc.accelerator.latency import task_time
from pynq_kgrc.accelerator.resources import (
    Resources,
    bram36,
    estimate_resources,
    resource_parts,
    uram288,
    uram_parts,
)
from pynq_kgrc.cli import main
from pynq_kgrc.cli.explore import _networks
from pynq_kgrc.compiler.latency import list_work
from pynq_kgrc.compress.patterns import Rates, project, recipe
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.groups import GroupSize
from pynq_kgrc.models import c3d, r2plus1d
from pynq_kgrc.models.trace import trace
from pynq_kgrc.program import load

ZCU102 = board("zcu102")
OUR_DESIGNS = ("8-zcu102", "8-zcu104", "8-kv260")
"""Designs that the search found, each for the board in its name."""
RESULTS = HARDWARE_PAGE.parent.parent / "benchmarks" / "results" / "latency.json"
BOARDS_TABLE = RESULTS.with_name("boards.md")


def test_resources_of_the_published_arrays_by_hand():
    """8 Sparse of table V: 16 x 8 x 3 x 8 products, two in each DSP."""
    parts = resource_parts(preset("8-sparse"))
    assert parts["dot products"].dsp == 16 * 8 * 3 * 8 // 2
    assert (parts["scale"].dsp, parts["scale"].lut) == (4 * 8 * 3, 4 * 8 * 512)
    # 6 copies x 8 banks x 2 block RAMs, double; 32 x 8 banks of 490 sums, double
    assert parts["region"].bram36 == 2 * 6 * 8 * 2
    assert parts["sums"].bram36 == 2 * 32 * 8 * 0.5
    # 12 reads of 8 banks of 64-bit vectors; 8 banks that are loaded; rows of two ports of 96 banks
    assert parts["region"].lut == 12 * 8 * (64 + 10) * 3 + 8 * 235 + 96 * 2 * 6
    # 512 words of beats of 256 bits on two ports, and of weights
    assert parts["FIFOs"].bram36 >= 4 * 8 * 0.5
    found = estimate_resources(preset("8-sparse"))
    for name in ("dsp", "bram36", "lut"):
        assert getattr(found, name) == sum(getattr(part, name) for part in parts.values())
    # the published design has 1536 DSPs for products and others for scaling and addresses
    assert abs(found.dsp / 1651 - 1) < 0.05


@pytest.mark.parametrize(("name", "larger"), [
    ("pf", "dot products region sums"), ("pk", "dot products region"), ("tm", "sums"),
    ("beat", "scale place pool FIFOs"),
])  # fmt: skip
def test_a_larger_design_has_larger_parts(name, larger):
    base = preset("8-sparse")
    before = resource_parts(base)
    after = resource_parts(replace(base, **{name: 2 * getattr(base, name)}))
    for part in before:
        if (name, part) == ("tm", "FIFOs"):
            continue  # a group has half the rows a trip, so that chunks are narrower
        assert after[part].lut >= before[part].lut
        if part in larger:
            assert after[part].lut > before[part].lut, part


@pytest.mark.parametrize(
    ("bits", "rows", "both", "wanted"),
    [(64, 1024, True, 2), (32, 490, False, 0.5), (32, 513, False, 1), (48, 512, False, 1),
     (18, 1024, True, 0.5), (16, 64, True, 0), (32, 1024, True, 1)],
)  # fmt: skip
def test_block_rams_come_in_halves(bits, rows, both, wanted):
    assert bram36(bits, rows, both) == wanted


def test_odd_arrays_waste_half_a_dsp():
    even, odd = (estimate_resources(small_config(4, pf=pf)).dsp for pf in (6, 5))
    assert even == odd


def test_memories_move_to_ultraram_where_that_leaves_more_of_the_board():
    config, kv260 = preset("8-kv260"), board("kv260")
    parts = resource_parts(config)
    used = estimate_resources(config, kv260)
    assert uram_parts(config, kv260) == ("region", "memory ports")
    # 6 reads a trip at two ports make 3 copies of 3 banks, double; they are narrower than 72 bits
    banks = 2 * 3 * 3
    # four ports of 128 bits, two of 256 bits for the weights, four of 64 bits for the tables
    buffers = 4 * 2 + 2 * 4 + 4
    assert used.uram == banks + buffers
    saved = parts["region"].bram36 + parts["memory ports"].bram36
    in_block_ram = estimate_resources(config)
    assert used == replace(in_block_ram, bram36=in_block_ram.bram36 - saved, uram=used.uram)
    assert in_block_ram.share(kv260) > 1
    # a ZCU102 has none; a chip with few of them takes none
    assert estimate_resources(config, ZCU102) == in_block_ram
    assert uram_parts(config, ZCU102) == uram_parts(config, replace(kv260, uram=10)) == ()
    # where block RAM suffices for the buffers of the ports, the banks alone move
    assert uram_parts(preset("8-zcu104"), board("zcu104")) == ("region",)


@pytest.mark.parametrize(
    ("bits", "rows", "wanted"), [(72, 4096, 1), (73, 4096, 2), (64, 4097, 2), (512, 1024, 8)]
)
def test_ultrarams_are_72_bits_wide(bits, rows, wanted):
    assert uram288(bits, rows) == wanted


def test_designs_fit_and_keep_the_groups():
    base = preset("8-sparse")
    designs = list_designs(base, ZCU102, 0.8)
    assert len(designs) > 1000
    assert {(d.bits, d.gm, d.tn, d.tk) for d in designs} == {(8, 8, 8, 9)}
    assert max(estimate_resources(d).share(ZCU102) for d in designs) <= 0.8
    assert len({d.digest for d in designs}) == len({d.name for d in designs}) == len(designs)
    with pytest.raises(ConfigError, match=r"no design of 8 bits .* fits into 0% of zcu102"):
        list_designs(base, ZCU102, 0.001)


@pytest.fixture(scope="module")
def traced():
    """The project's full-size networks with untrained weights."""
    return {
        "c3d": trace(c3d.c3d(classes=101), c3d.CLIP),
        "r2plus1d_18": trace(r2plus1d.r2plus1d_18(101), r2plus1d.CLIP),
    }


@pytest.fixture(scope="module")
def targets(traced):
    """The networks of TARGETS, pruned by the paper's recipe; tasks as the compiler makes them."""
    return {name: network_by(traced[name], recipe(name, "kgrc")) for name in TARGETS}


def network_by(graph, rates):
    def kept(work, name):
        return work.shape, *rates.get(name, Rates()).kept(first.group_size, work.shape.taps)

    first = preset("8-zcu102")
    convolutions = [
        kept(work, name)
        for name, work in list_work(graph, first, rates)
        if work.columns and math.prod(work.out_size) > 1
    ]
    return Network(
        convolutions, lambda config: [work for _, work in list_work(graph, config, rates)]
    )


TARGETS = {"c3d": 30.0, "r2plus1d_18": 42.0}
"""The project's targets: ms of the convolutions, with memory of latency 70, KGRC, 150 MHz."""


def test_our_design_meets_the_targets_within_the_chip(targets):
    config = preset("8-zcu102")
    (found,) = evaluate([config], targets)
    for name, limit in TARGETS.items():
        assert found.latency[name].convolutions <= limit, name
    assert found.resources.dsp <= 0.8 * ZCU102.dsp
    assert found.resources.share(ZCU102) <= 0.8
    assert paper.fits(config, ZCU102)
    (published,) = evaluate([preset("8-sparse")], targets)
    assert found.mean_ms < published.mean_ms
    slow = replace(REFERENCE, port_bits=32)
    (starved,) = evaluate([config], targets, memory=slow)
    assert starved.mean_ms > 1.5 * found.mean_ms


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", OUR_DESIGNS)
def test_no_design_of_the_search_is_faster_than_ours(targets, name):
    """Of all that fit, those are evaluated whose lower bound is below the latency of ours."""
    target = board_of_design(name)
    designs = list_designs(preset("8-sparse"), target)
    assert preset(name).digest in {each.digest for each in designs}
    (ours,) = evaluate([preset(name)], targets, memory=target.memory, board=target)
    rivals = [each for each in designs if least_ms(each, targets) < ours.mean_ms]
    for each in evaluate(rivals, targets, memory=target.memory, board=target):
        assert least_ms(each.config, targets) <= each.mean_ms, each.config.name
        assert each.mean_ms >= ours.mean_ms, each.config.name
    # `explore` evaluates as many by default, so that it finds ours
    assert len(rivals) <= 40


def test_the_ranking_bound_is_a_lower_bound(targets):
    """`least_cycles`, which ranks designs, never exceeds the modelled cycles."""
    for config in (preset("8-sparse"), preset("8-zcu102")):
        for network in targets.values():
            works = [work for work in network.work(config) if work.columns]
            for layer, work in zip(network.convolutions, works, strict=False):
                assert work.shape == layer[0]
                assert least_cycles(config, *layer) <= task_time(config, work).cycles


def candidate(dsp, ms):
    return Candidate(small_config(), Resources(dsp, 1, 1), {"n": Latency(ms, ms)})


def test_no_design_on_the_pareto_front_is_beaten_by_another():
    points = [candidate(*p) for p in ((100, 5.0), (120, 5.5), (120, 4.0), (90, 9.0), (130, 4.0))]
    front = [(c.resources.dsp, round(c.mean_ms, 6)) for c in pareto_front(points)]
    assert front == [(90, 9.0), (100, 5.0), (120, 4.0)]


@pytest.fixture(scope="module")
def program_file(tmp_path_factory):
    net = Net(size=(4, 14, 14))
    name = net.conv(net.conv("clip", 32), 64)
    net.layers[name].weight[...] = project(
        net.layers[name].weight, Rates(rows=Fraction(1, 2)), GroupSize(8, 8, 9)
    )
    net.dense(name, 5)
    program, _ = compiled(net, preset("8-sparse"))
    path = tmp_path_factory.mktemp("explore") / "net.kgrc"
    program.save(path)
    return path


def test_command_prints_plots_and_writes_a_design(program_file, tmp_path, capsys):
    plot, out = tmp_path / "designs.svg", tmp_path / "best.json"
    arguments = ["explore", "-p", str(program_file), "--effort", "4", "--plot", str(plot)]
    assert main([*arguments, "-o", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["figures"] == REFERENCE.describe()
    assert "modelled with memory" in document["figures"] and "latency 70" in document["figures"]
    best = document["designs"][0]
    assert best["mean_ms"] < document["compiled_for"]["mean_ms"]
    assert best["latency_ms"]["net"]["whole"] > best["latency_ms"]["net"]["convolutions"]
    assert read_design(str(out)).digest
    assert json.loads(out.read_text()) == best["config"]
    assert "Pareto front" in plot.read_text() or plot.stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.json", "designs.svg"]
    assert main(["explore", "-p", str(program_file), "--effort", "2"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"for zcu102: ms of the convolutions, and of all tasks; {REFERENCE.describe()}" in printed
    )
    assert "the programs were compiled for:\n8-sparse" in printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--board", "pynq-z1"], "no board named 'pynq-z1'"),
        (["--share", "1.5"], "--share 1.5: use a share above 0, 1 at most"),
        (["--clock", "0"], r"--clock 0.0: use a clock above 0 MHz, 1000 MHz at most"),
        (["--plot", "designs.bmp"], r"use a name that ends in .png, .svg or .pdf"),
    ],
)
def test_command_refuses(program_file, capsys, arguments, text):
    assert main(["explore", "-p", str(program_file), *arguments]) == 2
    assert re.search(text, capsys.readouterr().err)


def test_programs_of_different_kinds_are_not_explored_together(program_file):
    net = Net()
    net.conv("clip", 4)
    small, _ = compiled(net, small_config(4))
    with pytest.raises(ConfigError, match="explore programs of one kind together"):
        _networks([load(program_file), small], [program_file, program_file])
    only = Net(size=(1, 3, 3))
    only.dense("clip", 4)
    dense, _ = compiled(only)
    with pytest.raises(ConfigError, match="has no convolution to explore designs for"):
        _networks([dense], [program_file])


def test_a_design_is_a_name_or_a_file(tmp_path):
    path = tmp_path / "design.json"
    write_design(preset("4-sparse"), path)
    assert read_design(str(path)) == preset("4-sparse")
    assert read_design("8-dense") == preset("8-dense")
    with pytest.raises(ConfigError, match=r"no accelerator named 'best'; .* or give a .json file"):
        read_design("best")
    assert macs_a_cycle(preset("8-zcu102")) == 3456


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(bits="eight"), r"bits='eight' is not accepted; use a whole number"),
        (dict(sparse=1), r"sparse=1 is not accepted; use true or false"),
        (dict(name=None), r"name=None is not accepted; use a string"),
        (dict(filter_tile=3), r"'filter_tile' is no field of a design; use name, bits, .*beat"),
        (dict(pf=0), r"pf=0 is not 1 or more"),
    ],
)
def test_a_bad_field_of_a_design_file_is_named(tmp_path, change, text):
    path = tmp_path / "design.json"
    path.write_text(json.dumps(asdict(preset("8-sparse")) | change))
    with pytest.raises(ConfigError, match=rf"design.json: {text}"):
        read_design(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a design"),
        ("[1]", r"cannot be read as a design \(Expected `object`"),
        ('{"name": "x"}', "missing required field `bits`"),
        (None, "cannot be read as a design .*No such file"),
    ],
)
def test_a_file_without_a_design_is_refused(tmp_path, text, message):
    path = tmp_path / "design.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf"design.json: .*{message}"):
        read_design(str(path))


# ---- the page ---------------------------------------------------------------------------------


def resource_rows():
    for name, config in PRESETS.items():
        if board_of_design(name) != ZCU102:
            continue
        found = estimate_resources(config)
        sizes = (config.tm, config.pm, config.tn, config.pk, config.pf, config.port_positions)
        cells = [name, *map(str, sizes), str(macs_a_cycle(config))]
        cells.append(f"{found.dsp} ({found.dsp / ZCU102.dsp:.0%})")
        cells.append(f"{found.bram36:.0f} ({found.bram36 / ZCU102.bram36:.0%})")
        cells.append(f"{found.lut / 1000:.0f} ({found.lut / ZCU102.lut:.0%})")
        yield f"| {' | '.join(cells)} |"


def part_rows():
    """Rows of the table of docs/hardware.md that has the parts of our design."""
    parts = resource_parts(preset("8-zcu102"))
    for name, part in parts.items():
        yield f"| {name} | {part.dsp} | {part.bram36:g} | {part.lut / 1000:.1f} |"


@pytest.mark.parametrize("name", TARGETS)
def test_the_tables_are_those_of_the_present_model(traced, name):
    """The row of KGRC on our design, made anew."""
    config = preset("8-zcu102")
    latency = model_latency(config, network_by(traced[name], recipe(name, "kgrc")))
    document = json.loads(RESULTS.read_text("utf-8"))
    assert document["setting"] == REFERENCE.describe()
    (row,) = (
        row
        for row in document["rows"]
        if (row["network"], row["pattern"], row["design"]) == (name, "KGRC", config.name)
    )
    assert row["modelled"]["70"] == pytest.approx([latency.convolutions, latency.whole], rel=0.01)


@pytest.mark.parametrize("name", OUR_DESIGNS)
def test_the_table_of_boards_is_that_of_the_present_model(traced, name):
    """Resources, and the latency of C3D."""
    (row,) = (
        line.strip("| ").split(" | ")
        for line in BOARDS_TABLE.read_text("utf-8").splitlines()
        if line.startswith(f"| {name} |")
    )
    config, target = preset(name), board_of_design(name)
    used = estimate_resources(config, target)
    assert row[1] == target.part
    shares = [cell.rpartition("(")[2].rstrip(")") for cell in row[2:6]]
    found = used.shares(target)
    wanted = [found.get(resource) for resource in ("dsp", "bram36", "uram", "lut")]
    assert shares == ["-" if share is None else f"{share:.0%}" for share in wanted]
    assert max(found.values()) <= 0.8
    network = network_by(traced["c3d"], recipe("c3d", "kgrc"))
    latency = model_latency(config, network, memory=target.memory)
    shown = [float(ms) for ms in row[6].split(" / ")]
    assert shown == pytest.approx([latency.convolutions, latency.whole], rel=0.01)


def test_the_page_shows_what_our_model_says():
    lines = set(HARDWARE_PAGE.read_text("utf-8").splitlines())
    latency_rows = RESULTS.with_suffix(".md").read_text("utf-8").splitlines()
    assert sum(line.startswith("| C3D | KGRC ") for line in latency_rows) == 4
    latency_rows += BOARDS_TABLE.read_text("utf-8").splitlines()
    for line in (*(row for row in latency_rows if row), *resource_rows(), *part_rows()):
        assert line in lines, f"docs/hardware.md lacks or differs from: {line}"
