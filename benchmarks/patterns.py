"""What each pattern saves on the accelerator: operations, MACs of the array, modelled latency.

Every pattern prunes the same layers of a network (all convolutions but the first and the last), at
equal operations and at equal modelled latency. The weights are seeded and random: the rates of rows
and columns and what they save do not depend on them; which blocks or filters are left does. All
figures are modelled with memory (`accelerator/latency.py`) or counted from the plan of the array;
nothing is measured, and nothing depends on this computer. What is in the results is not made again,
so that an interrupted run goes on.

    python benchmarks/patterns.py --networks thin_c3d c3d r2plus1d_18 --design 8-sparse
"""

import argparse
import json
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from reports import ROOT, write

from pynq_kgrc.accelerator.boards import CLOCK_MHZ, REFERENCE
from pynq_kgrc.accelerator.config import read_design
from pynq_kgrc.accelerator.cost import task_cost
from pynq_kgrc.accelerator.latency import task_time
from pynq_kgrc.compiler.latency import PrunedCycles, compile_shapes
from pynq_kgrc.compress.patterns import keep_mask
from pynq_kgrc.compress.recipes import NAMES, build_pattern, choose_rates, options
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.models import NETWORKS

RESULTS = ROOT / "benchmarks" / "results" / "patterns.json"
OPERATIONS = (2.0, 3.0, 4.5, 6.0)
LATENCY = (1.3, 1.5, 2.0, 3.0, 4.5)


HEAD = (
    "# What a pattern saves on the array",
    "",
    "Modelled with memory on 8-sparse by `python benchmarks/patterns.py`; nothing was measured.",
    "docs/accuracy.md says how to read the tables.",
)


@dataclass(frozen=True)
class Row:
    """A network pruned by a pattern. Factors over the dense network; None: it is not reached."""

    network: str
    pattern: str
    target: str
    """"operations" or "latency": what `asked` divides."""
    asked: float
    most: float
    """The largest factor of the target that the pattern reaches."""
    operations: float | None = None
    macs: float | None = None
    """Of the array."""
    latency: float | None = None
    ms: float | None = None
    """Modelled milliseconds of a clip, the whole network."""


class Pruned:
    """Operations, MACs of the array and cycles of a network's layers at each rate of a pattern."""

    def __init__(self, network, design):
        import torch

        from pynq_kgrc.models.trace import trace

        name, build = NETWORKS[network]
        module = import_module(name)
        torch.manual_seed(0)
        self.graph = trace(getattr(module, build)(classes=101), module.CLIP, name=network)
        self.config = read_design(design)
        program = compile_shapes(self.graph, self.config)
        self.cycles = PrunedCycles(program)
        layers = self.graph.convolutions()
        self.names = [layer.name for layer in layers][1:-1]
        self.rest = self.cycles.rest(layers)
        self.rest_macs = 0
        self.known = {}
        self.dense = {
            layer.name: self.cost(layer, np.ones_like(layer.weight, dtype=bool)) for layer in layers
        }
        works = map(program.work, program.tasks)
        total = sum(task_cost(self.config, work).macs for work in works)
        self.rest_macs = total - sum(macs for _, macs, _ in self.dense.values())

    def cost(self, layer, kept):
        """Operations, MACs of the array, cycles."""
        work = self.cycles.work(layer, kept)
        operations = layer.shape.macs * float(kept.mean())
        return (
            operations,
            task_cost(self.config, work).macs,
            task_time(self.config, work).cycles,
        )

    def tabulate(self, pattern):
        """The costs of every layer at every rate of a pattern, by layer and fraction kept."""
        self.known = {}
        for layer in self.graph.convolutions():
            if layer.name in self.names:
                for choice in options(layer, pattern, self.config):
                    kept = keep_mask(layer.weight, build_pattern(choice, self.config))
                    self.known[layer.name, choice] = self.cost(layer, kept)
                    self.known[layer.name, kept.tobytes()] = self.known[layer.name, choice]

    def choose(self, pattern, target, asked):
        """The totals at the rates that reach what is asked."""

        def cost(layer, kept):
            place = (layer.name, kept.tobytes())
            found = self.dense[layer.name] if kept.all() else self.known[place]
            return found[0 if target == "operations" else 2]

        rest = 0.0 if target == "operations" else self.rest
        recipe = choose_rates(
            self.graph, self.names, pattern, asked, self.config, cost, rest, (1.0, 0.99, 0.98, 0.97)
        )
        return self.total({name: self.known[name, choice] for name, choice in recipe.items()})

    def total(self, pruned):
        sums = [sum(column) for column in zip(*(self.dense | pruned).values(), strict=True)]
        return sums[0], sums[1] + self.rest_macs, sums[2] + self.rest

    def most(self, target):
        """The largest factor of the target: each layer at its cheapest rate."""
        place = 0 if target == "operations" else 2
        least = dict(self.dense)
        for (name, _), costs in self.known.items():
            least[name] = min(least[name], costs, key=lambda each: each[place])
        return self.total({})[place] / self.total(least)[place]


def rows_of(network, design, patterns):
    """The rows of each pattern of a network, pattern by pattern; first that of the dense one."""
    if not patterns:
        return
    pruned = Pruned(network, design)
    dense = pruned.total({})
    ms = 1e3 * CLOCK_MHZ
    yield [Row(network, "dense", "operations", 1, 1, 1, 1, 1, dense[2] / ms)]
    for pattern in patterns:
        pruned.tabulate(pattern)
        rows = []
        for target, factors in (("operations", OPERATIONS), ("latency", LATENCY)):
            most = pruned.most(target)
            for asked in factors:
                try:
                    found = pruned.choose(pattern, target, asked)
                except ConfigError:
                    rows.append(Row(network, pattern, target, asked, most))
                    continue
                factors_found = (before / after for before, after in zip(dense, found, strict=True))
                rows.append(
                    Row(network, pattern, target, asked, most, *factors_found, found[2] / ms)
                )
        yield rows


def tables(rows):
    """Lines of Markdown: for each network a table at equal latency, and one at equal operations."""
    for network in dict.fromkeys(row.network for row in rows):
        own = [row for row in rows if row.network == network]
        dense = next(row.ms for row in own if row.pattern == "dense")
        for target, factors in (("latency", LATENCY), ("operations", OPERATIONS)):
            yield from ("", f"{network}, at equal {target}; dense {dense:.2f} ms:", "")
            unit = "faster" if target == "latency" else "fewer operations"
            yield f"| pattern | {' | '.join(f'{each:g}x {unit}' for each in factors)} | most |"
            yield "|---" * (len(factors) + 2) + "|"
            for pattern in dict.fromkeys(row.pattern for row in own if row.pattern != "dense"):
                found = [r for r in own if r.pattern == pattern and r.target == target]
                cells = " | ".join(map(cell, found))
                yield f"| {pattern} | {cells} | {found[0].most:.2f}x |"


def cell(row):
    if row.ms is None:
        return "-"
    first = row.operations if row.target == "latency" else row.latency
    if row.target == "latency":
        return f"{first:.2f}x operations, {row.macs:.2f}x MACs, {row.ms:.2f} ms"
    return f"{row.macs:.2f}x MACs, {first:.2f}x faster, {row.ms:.2f} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["thin_c3d", "c3d", "r2plus1d_18"])
    parser.add_argument("--patterns", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--design", default="8-sparse")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    rows = []
    if chosen.out.is_file():
        known = json.loads(chosen.out.read_text("utf-8"))
        if known["design"] != chosen.design or known["setting"] != REFERENCE.describe():
            raise SystemExit(f"{chosen.out} is of another design or memory; give another --out")
        rows = [Row(**row) for row in known["rows"]]
    for network in chosen.networks:
        done = {row.pattern for row in rows if row.network == network}
        left = [pattern for pattern in chosen.patterns if pattern not in done]
        for found in rows_of(network, chosen.design, left):
            rows += [row for row in found if row.pattern not in done]
            print(network, found[0].pattern, flush=True)
            write_results(chosen, rows)


def write_results(chosen, rows):
    order = {name: place for place, name in enumerate(("dense", *NAMES))}
    rows.sort(key=lambda row: (list(NETWORKS).index(row.network), order[row.pattern]))
    document = {
        "design": chosen.design,
        "setting": REFERENCE.describe(),
        "rows": [asdict(each) for each in rows],
    }
    write(chosen.out.parent, chosen.out.name, json.dumps(document, indent=1) + "\n")
    lines = "\n".join((*HEAD, *tables(rows))) + "\n"
    write(chosen.out.parent, chosen.out.with_suffix(".md").name, lines)


if __name__ == "__main__":
    main()
