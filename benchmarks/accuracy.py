"""The table of docs/accuracy.md: dense, pruned and quantized networks on people never seen.

Each row is a command of pynq-kgrc in a folder of its own; what is done already is not done again,
and what was killed goes on. Top-1 of programs is that of the compiled integers, emulated.

    python benchmarks/accuracy.py DATA --seeds 0 1 2       # DATA holds index.csv, see docs
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

SETTINGS = Path(__file__).with_name("accuracy")
NETWORK = "thin_c3d"
LAYERS = "conv1,conv2,conv3a,conv3b,conv4a,conv4b"
"""The first one too: with three frames to a kernel it is a quarter of the operations."""

PRUNED = {
    "kgrc": ["--recipe", "kgrc"],
    "kgr": ["--recipe", "kgr"],
    "kgc": ["--recipe", "kgc"],
    "kgrc-3x": ["--pattern", "kgrc", "--reduction", "3", "--layers", LAYERS],
}
"""The paper's rates for the layers that bear C3D's names; and rates searched for 3x in all."""

EQUAL = {
    **{f"{p}, one-shot": (p, "one-shot") for p in ("kgrc", "vanilla", "blockwise", "filter")},
    **{f"kgrc, {a}": ("kgrc", a) for a in ("heuristic", "lasso", "reweighted", "admm")},
}
"""At equal operations: patterns by one algorithm, and algorithms on one pattern."""

SECONDS = 6 * 3600


def run(folder, command, *arguments):
    """The JSON of a command of pynq-kgrc, from its folder if it ran before."""
    done = folder / "result.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        whole = [sys.executable, "-m", "pynq_kgrc.cli", command, *map(str, arguments), "--json"]
        output = subprocess.run(
            whole, check=True, stdout=subprocess.PIPE, text=True, timeout=SECONDS
        )
        done.write_text(output.stdout)
        print(folder, output.stdout.replace("\n", " "), flush=True)
    return json.loads(done.read_text())


class Study:
    """The runs of one seed."""

    def __init__(self, options, seed):
        self.folder, self.seed = options.out / f"seed{seed}", seed
        self.data = ["--data", options.data, "--cache", options.out / "cache"]

    def train(self):
        folder = self.folder / "dense"
        settings = ["--config", SETTINGS / "train.toml", "--seed", self.seed]
        return folder, run(folder, "train", NETWORK, *self.data, "-o", folder, *settings)

    def prune(self, dense, name, *how):
        folder = self.folder / name.replace(", ", "-")
        settings = ["--config", SETTINGS / "prune.toml", "--seed", self.seed]
        weights = ["--weights", dense / "weights.safetensors"]
        return folder, run(
            folder, "prune", NETWORK, *self.data, "-o", folder, *weights, *settings, *how
        )

    def quantize(self, source, bits, epochs=None):
        folder = source / (f"{bits}-bit" + ("-after" if epochs == 0 else ""))
        settings = ["--config", SETTINGS / "quantize.toml", "--seed", self.seed]
        settings += [] if epochs is None else ["--epochs", epochs]
        weights = ["--weights", source / "weights.safetensors"]
        return run(
            folder,
            *("quantize", NETWORK, *self.data, "-o", folder, *weights, *settings),
            *("--accelerator", f"{bits}-sparse"),
        )


def first_table(options):
    """Rows of the first table: name, reduction, float top-1, then 16, 8, 8 after and 4 bits."""
    rows = {}
    for seed in options.seeds:
        study = Study(options, seed)
        dense, found = study.train()
        sources = {"dense": (dense, 1.0, found["test_top1"])}
        for name in options.patterns:
            folder, pruned = study.prune(dense, name, *PRUNED[name])
            sources[name] = (folder, pruned["reduction"], pruned["test_top1"])
        for name, (folder, reduction, top1) in sources.items():
            row = rows.setdefault(name, {"reduction": reduction, "float": [], "bytes": {}})
            row["float"].append(top1)
            for key, bits, epochs in (("8 after", 8, 0), ("8", 8, None), ("4", 4, None)):
                coded = study.quantize(folder, bits, epochs)
                row.setdefault(key, []).append(coded["emulated_top1"])
                row["bytes"][key] = coded["bytes"]
    return rows


def second_table(options):
    """Rows of the second table: name, reduction, float top-1 by seed."""
    rows = {}
    for seed in options.seeds:
        study = Study(options, seed)
        dense, _ = study.train()
        for name, (pattern, algorithm) in EQUAL.items():
            how = ["--pattern", pattern, "--reduction", "3", "--layers", LAYERS]
            how += ["--algorithm", algorithm]
            _, pruned = study.prune(dense, f"equal-{name}", *how)
            row = rows.setdefault(name, {"reduction": pruned["reduction"], "float": []})
            row["float"].append(pruned["test_top1"])
    return rows


def spread(values):
    """Mean and, of several seeds, the standard deviation, in per cent."""
    mean = 100 * statistics.mean(values)
    return f"{mean:.1f}" + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def write(rows, columns):
    """A table in Markdown."""
    lines = [
        "| network | operations | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name, row in rows.items():
        cells = [spread(row[c]) for c in columns]
        lines.append(f"| {name} | {row['reduction']:.2f}x fewer | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/accuracy"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--patterns", nargs="+", default=list(PRUNED), choices=PRUNED)
    parser.add_argument("--equal", action="store_true", help="the second table too")
    options = parser.parse_args()
    print(write(first_table(options), ["float", "8 after", "8", "4"]))
    if options.equal:
        print(write(second_table(options), ["float"]))


if __name__ == "__main__":
    main()
