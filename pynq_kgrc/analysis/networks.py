"""The table of networks: sizes, times on presets of 16 and 8 bits, and what is published of them.

Times are modelled with memory, for one clip, with dense weights; nothing was measured. The table
ships as networks.json. `pynq-kgrc networks --compute` makes it anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from pynq_kgrc.accelerator.boards import CLOCK_MHZ, REFERENCE
from pynq_kgrc.accelerator.config import DEFAULT_DESIGN, PRESETS, preset
from pynq_kgrc.accelerator.latency import task_time
from pynq_kgrc.analysis.timing import modelled_ms
from pynq_kgrc.compiler.latency import compile_shapes, list_work
from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import Graph

TABLE = Path(__file__).with_suffix(".json")
"""The table that ships with the package."""

DESIGNS = tuple(name for name, config in PRESETS.items() if config.bits > 4)
"""Presets of the table. At 4 bits the time depends on training, which makes many codes zero."""


class NetworkRow(msgspec.Struct, frozen=True, kw_only=True):
    """One network at full size, dense, with seeded random weights."""

    network: str
    clip: tuple[int, int, int]
    """Frames, height, width."""
    classes: int
    parameters: int
    """Weights that are trained."""
    macs: int
    """Multiply-accumulates of one clip, as torch counts them."""
    file_mb: float
    """The compiled program for the default design, in millions of bytes, to one decimal place."""
    ms: dict[str, float]
    """Modelled milliseconds of one clip, by preset, with memory."""
    refused: dict[str, str]
    """By preset that cannot run the network: why."""


class Published(msgspec.Struct, frozen=True):
    """What a paper reports for a network on an FPGA, measured by its authors."""

    work: str
    device: str
    bits: int
    ms: float
    note: str = ""


KGRC = "Mengshu Sun et al., TCAD 2024, table IV"
SUN = "Mengshu Sun et al., ISCAS 2021, table IV"
LIU = "Zhengyan Liu et al., TRETS 2024"

PUBLISHED: dict[str, tuple[Published, ...]] = {
    "c3d": (
        Published(KGRC, "ZCU102", 8, 104.80, "dense, convolutions only"),
        Published(KGRC, "ZCU102", 8, 43.10, "pruned 3.0x, convolutions only"),
        Published(SUN, "ZCU102", 16, 487.0),
        Published("Fan et al., FPL 2017, by TCAD 2024, table VI", "ZC706", 16, 542.5),
        Published("Shen et al., FPGA 2018, by ISCAS 2021, table IV", "VUS440", 16, 49.1),
    ),
    "r2plus1d_18": (
        Published(KGRC, "ZCU102", 8, 108.38, "dense, convolutions only"),
        Published(KGRC, "ZCU102", 8, 52.33, "pruned 3.0x, convolutions only"),
        Published(SUN, "ZCU102", 16, 609.0),
        Published(SUN, "ZCU102", 16, 234.0, "pruned 3.2x"),
    ),
    "mobilenet_v2": (Published(f"{LIU}, table 2", "XC7VX690T", 8, 3.31),),
    "resnet_50": (Published(f"{LIU}, table 4", "XC7VX690T", 8, 30.64),),
    "resnet_152": (Published(f"{LIU}, table 4", "XC7VX690T", 8, 80.45),),
}
"""Of networks of the table. Where nothing stands here, no figure was found in a source that could
be read; HARFLOW3D and fpgaHART have some for SlowOnly, R(2+1)D and X3D-M."""

NOT_YET: dict[str, tuple[str, ...]] = {
    "X3D-XS, X3D-S, X3D-M": ("sigmoid", "mul"),
    "S3D-G": ("sigmoid", "mul"),
    "RegNet-Y": ("sigmoid", "mul"),
    "MoViNet-A0": ("silu", "sigmoid", "mul"),
    "EfficientNet-B0": ("silu", "sigmoid", "mul"),
    "MobileNetV3": ("hardswish", "hardsigmoid", "mul"),
    "GhostNet": ("hardsigmoid", "mul"),
}
"""Networks that do not compile: operators that the accelerator has not. `mul` is the product of a
map and a gate that depends on the clip."""


def describe_network(graph: Graph, parameters: int, designs: Sequence[str] = ()) -> NetworkRow:
    """The row of a traced network.

    Args:
        graph: dense, in float.
        parameters: its trained weights.
        designs: presets to model; `DESIGNS` by default.

    Raises:
        CompileError: the default design cannot run the network.
    """
    program = compile_shapes(graph, preset(DEFAULT_DESIGN))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.kgrc"
        program.save(path)
        size = path.stat().st_size
    # layers in groups are mostly zeros, which the compiler leaves out of the work
    sparse = any(getattr(layer.shape, "own_weights", 0) for layer in graph.layers)
    ms: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name in designs or DESIGNS:
        config = preset(name)
        try:
            if name == DEFAULT_DESIGN:
                found = modelled_ms(program)
            elif sparse:
                found = modelled_ms(compile_shapes(graph, config))
            else:
                work = [each for _, each in list_work(graph, config, {})]
                found = sum(task_time(config, each).cycles for each in work) / (CLOCK_MHZ * 1e3)
        except CompileError as error:
            refused[name] = str(error)
        else:
            ms[name] = round(found, 2)
    clip = graph.clip
    return NetworkRow(
        network=graph.name,
        clip=(clip.frames, clip.height, clip.width),
        classes=next(layer.channels for layer in graph.layers if layer.name == graph.output),
        parameters=parameters,
        macs=sum(getattr(layer.shape, "own_macs", 0) for layer in graph.layers),
        file_mb=round(size / 1e6, 1),
        ms=ms,
        refused=refused,
    )


def read_table(path: Path = TABLE) -> dict[str, NetworkRow]:
    """The rows of a table, by network."""
    rows = msgspec.json.decode(path.read_bytes(), type=list[NetworkRow])
    return {row.network: row for row in rows}


def table_text(rows: Iterable[NetworkRow]) -> str:
    """The file that `read_table` reads: JSON, a row a line."""
    lines = ",\n".join(msgspec.json.encode(row).decode() for row in rows)
    return f"[\n{lines}\n]\n"


FIGURES = REFERENCE.describe()
"""What the modelled times assume."""


def table_cells(row: NetworkRow, designs: Sequence[str]) -> list[str]:
    """The cells of a row as text: network, clip, parameters, GMAC, megabytes, ms by design."""
    times = [f"{row.ms[name]:.1f}" if name in row.ms else "-" for name in designs]
    frames, height, width = row.clip
    return [
        row.network,
        f"{frames}x{height}x{width}",
        f"{row.parameters / 1e6:.1f}",
        f"{row.macs / 1e9:.2f}",
        f"{row.file_mb:.1f}",
        *times,
    ]


def page(rows: Mapping[str, NetworkRow], networks: Iterable[str]) -> str:
    """The document docs/networks.md; `networks` are the names of all, with or without a row."""
    names = [*DESIGNS]
    head = ["network", "clip", "M parameters", "GMAC", f"MB, {DEFAULT_DESIGN}", *names]
    lines = [
        HEAD.format(figures=FIGURES),
        _line(head),
        _line(["---"] * 2 + ["--:"] * (3 + len(names))),
    ]
    lines += [_line(table_cells(row, names)) for row in rows.values()]
    refused = [
        f"- `{row.network}` on {name}: {why}"
        for row in rows.values()
        for name, why in row.refused.items()
    ]
    if refused:
        lines += ["", "A dash: the design cannot run the network.", "", *refused]
    without = [f"`{name}`" for name in networks if name not in rows]
    if without:
        lines += ["", f"Without a row, until --compute makes one: {', '.join(without)}."]
    lines += ["", PEERS, _line(["network", "work", "device", "bits", "ms", "", "ours, 8 bits"])]
    lines.append(_line(["---", "---", "---", "--:", "--:", "---", "--:"]))
    for name, works in PUBLISHED.items():
        if name not in rows:
            continue
        ours = min(ms for design, ms in rows[name].ms.items() if preset(design).bits == 8)
        lines += [
            _line([name, each.work, each.device, str(each.bits), f"{each.ms:.2f}", each.note,
                   f"{ours:.1f}"])
            for each in works
        ]  # fmt: skip
    lines += ["", LACKING, _line(["network", "operators"]), _line(["---", "---"])]
    lines += [_line([name, ", ".join(operators)]) for name, operators in NOT_YET.items()]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


HEAD = """\
# Networks

Made by `pynq-kgrc networks --markdown > docs/networks.md`; do not edit. The rows are those of
`pynq_kgrc/analysis/networks.json`, which `pynq-kgrc networks --compute -o FILE` writes.

Each network compiles at full size, dense, with seeded random weights. Milliseconds are for one
clip and all tasks on each preset of 16 and 8 bits, with the memory of the ZCU102 (at 4 bits they
depend on training, which makes many codes zero). They are not measured:
{figures}.
Megabytes are the file of the program at 8 bits.

`pynq-kgrc compile NETWORK` takes each name. The networks have the names of torchvision, mmaction2,
PyTorchVideo or Efficient-3DCNNs, so that their checkpoints load (`--weights`). Networks for images
take clips of one frame.
"""

PEERS = """\
## What is published for them on FPGAs

Measured by their authors, on other chips, clocks and widths; the last column is the best of our
8-bit presets, modelled, dense. Where a network has no row, no figure was found in a source that
could be read.
"""

LACKING = """\
## Not yet

These networks do not compile, because the accelerator lacks an operator. `mul` is the product of a
map and a gate that depends on the clip (squeeze and excite).
"""
