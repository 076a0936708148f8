"""The command networks: what can be compiled, how large it is, and how fast it would be."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pynq_kgrc.cli.arguments import Declare, file_to_write, progress

if TYPE_CHECKING:
    from pynq_kgrc.analysis.networks import NetworkRow


def declare(command: Declare) -> None:
    """Add the command networks."""
    networks = command(
        "networks",
        run_networks,
        "list the networks, their sizes and their modelled times on presets",
        "Times are modelled with memory, for one clip with dense weights; nothing was measured.\n"
        "The table ships with the package. --compute makes rows anew, which takes seconds to\n"
        "minutes a network and needs torch.",
    )
    networks.add_argument(
        "names", nargs="*", metavar="NETWORK", help="which ones (default: all of them)"
    )
    networks.add_argument("--compute", action="store_true", help="make the rows anew")
    networks.add_argument(
        "-o", "--out", type=file_to_write, metavar="FILE",
        help="with --compute: write a table of these rows and the shipped others",
    )  # fmt: skip
    networks.add_argument("--markdown", action="store_true", help="print the page docs/networks.md")


def run_networks(options: argparse.Namespace) -> int:
    import msgspec

    from pynq_kgrc.analysis.networks import (
        FIGURES,
        NOT_YET,
        PUBLISHED,
        page,
        read_table,
        table_text,
    )
    from pynq_kgrc.errors import ConfigError, ModelError
    from pynq_kgrc.files import written_beside
    from pynq_kgrc.models import NETWORKS

    if options.out and not options.compute:
        raise ConfigError("-o writes rows that --compute makes; give both")
    unknown = [name for name in options.names if name not in NETWORKS]
    if unknown:
        raise ModelError(f"{unknown[0]!r} is no network; there are {', '.join(NETWORKS)}")
    table = read_table()
    if options.compute:
        wanted = options.names or [*NETWORKS]
        table |= {name: _compute(name) for name in progress(wanted, "model", len(wanted))}
    rows = {name: table[name] for name in NETWORKS if name in table}
    chosen = options.names or [*rows]
    lacking = [name for name in chosen if name not in rows]
    if lacking:
        raise ModelError(f"the table has no row of {lacking[0]}; --compute makes one")
    if options.out:
        with written_beside(options.out) as beside:
            beside.write_text(table_text(rows.values()), encoding="utf-8")
    if options.markdown:
        print(page(rows, NETWORKS), end="")
        return 0
    shown = {name: rows[name] for name in chosen}
    if options.json:
        found = [
            {**msgspec.to_builtins(row), "published": msgspec.to_builtins(PUBLISHED.get(name, ()))}
            for name, row in shown.items()
        ]
        document = {"figures": FIGURES, "networks": found, "not_yet": NOT_YET}
        print(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())
    else:
        _print(shown)
    return 0


def _compute(name: str) -> NetworkRow:
    """The row of a network with seeded random weights."""
    import torch

    from pynq_kgrc.analysis.networks import describe_network
    from pynq_kgrc.models import find_network
    from pynq_kgrc.models.trace import trace

    torch.manual_seed(0)
    build, clip = find_network(name)
    network = build()
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return describe_network(trace(network, clip, name=name), parameters)


def _print(rows: dict[str, NetworkRow]) -> None:
    from pynq_kgrc.analysis.networks import DESIGNS, FIGURES, NOT_YET, PUBLISHED, table_cells

    head = ["network", "clip", "M par.", "GMAC", "MB", *DESIGNS]
    table = [head, *(table_cells(row, DESIGNS) for row in rows.values())]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    print(f"milliseconds of one clip; {FIGURES}; nothing was measured")
    for line in table:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w)
                 for i, (cell, w) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
        print("  ".join(cells).rstrip())
    works = [(name, each) for name in rows for each in PUBLISHED.get(name, ())]
    if works:
        print("\npublished, measured by their authors:")
    for name, each in works:
        note = f", {each.note}" if each.note else ""
        print(f"{name}: {each.ms:g} ms on {each.device}, {each.bits} bits{note} ({each.work})")
    print("\nnot yet, for lack of operators:")
    for network, operators in NOT_YET.items():
        print(f"{network}: {', '.join(operators)}")
