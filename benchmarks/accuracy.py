"""The tables of docs/accuracy.md: dense, pruned and quantized networks on people not trained on.

Each row is a command of pynq-kgrc in a folder of its own. A finished command is not run again, an
interrupted one continues. Top-1 of programs is that of the compiled integers, emulated.

    python benchmarks/accuracy.py DATA --seeds 0 1 2       # DATA holds index.csv, see docs
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from pynq_kgrc.analysis.timing import modelled_ms
from pynq_kgrc.program import load

SETTINGS = Path(__file__).with_name("accuracy")
ONE_COLUMN = str(Path(__file__).with_name("designs") / "8-sparse-one-column.json")
"""A design with P_K = 1: any number of columns may be kept."""

LAYERS = {
    "thin_c3d": ["--layers", "conv1,conv2,conv3a,conv3b,conv4a,conv4b"],
    "thin_r2plus1d": [],
}
"""Layers to prune. In thin_c3d also the first: its kernels of three frames are 1/4 of the MACs."""

REDUCTION = {"thin_c3d": "3", "thin_r2plus1d": "2.9"}
"""Of `kgrc-3x`. Eq. (9) allows thin_r2plus1d at most 2.97."""

EQUAL_REDUCTION = "2.5"
"""`kgc` allows at most 2.94, blocks 2.35, `kgr` 2: the last two are in `patterns` only."""

PATTERNS = {
    p: (p, "one-shot") for p in ("kgr", "kgc", "kgrc", "vanilla", "blockwise", "filter", "krp")
}
PATTERNS_REDUCTION = {"thin_c3d": "1.9", "thin_r2plus1d": "1.7"}
"""A reduction that every pattern can reach."""

CLAIM = (
    *((f"{p}, 1.95x", p, "1.95", "8-sparse") for p in ("kgr", "kgc", "kgrc")),
    *((f"{p}, 2.9x", p, "2.9", "8-sparse") for p in ("kgc", "kgrc")),
    *((f"kgrc, {r}x", "kgrc", r, "8-sparse") for r in ("4.5", "5.9")),
    *((f"{p}, {r}x, P_K = 1", p, r, ONE_COLUMN) for r in ("4.5", "5.9") for p in ("kgc", "kgrc")),
)
"""Row, pattern, reduction of the operations, design. The KGRC paper prefers KGR or KGC below 2x
and KGRC above 3x (section VI-C). On 8-sparse KGR ends at 1.998x and KGC at 2.94x, by eq. (9)."""

LATENCY = (
    *((f"{p}, 1.3x", p, "1.3") for p in ("kgr", "kgc", "kgrc", "vanilla", "blockwise", "filter")),
    *((f"{p}, 1.49x", p, "1.49") for p in ("kgc", "kgrc", "blockwise")),
)
"""Row, pattern, reduction of the modelled cycles on 8-sparse. KRP and single weights reduce
nothing; KGR ends at 1.33x, filters at 1.33x, whole groups at 1.38x, KGC at 1.50x, blocks at 1.61x
and KGRC at 1.64x, since the host folds the first layer, which then stays dense."""

METHODS = {
    "4 bits, ADMM then codes": (4, None, ("--admm", 3)),
    "8 bits, ADMM then codes": (8, None, ("--admm", 3)),
    "powers of two, 3 bits": (4, None, ("--powers",)),
    "powers of two, 4 bits": (8, None, ("--powers",)),
    "8 bits, thresholds of 1 point": (8, 0, ("--thresholds", 0.01)),
}
"""Row: bits of the design, epochs of training with codes (None: of the settings), options."""

RETRAINED = {
    "own rates": "one-shot.toml",
    "tracked rates": "tracked.toml",
    "layer by layer": "incremental.toml",
}
"""Retraining of the KRP paper: row and settings."""

PAPER = ("kgr", "kgc", "kgrc")
"""Recipes: the paper's rates, for the layers with the same names as in C3D."""

EQUAL = {
    **{f"kgrc, {a}": ("kgrc", a) for a in ("one-shot", "heuristic", "lasso", "reweighted", "admm")},
    **{f"{p}, one-shot": (p, "one-shot") for p in ("kgc", "vanilla", "filter", "krp")},
}
"""Compared at equal operations: patterns with one algorithm, algorithms with one pattern."""

FACTORS = {
    "operations": "fewer operations",
    "array": "fewer MACs of the array",
    "latency": "faster, modelled with memory",
}
"""Columns that are factors over the dense network, and their titles."""

SECONDS = 6 * 3600


def run(folder, command, *arguments):
    """The JSON result of a pynq-kgrc command; from its folder if it ran before."""
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
        self.network, self.seed = options.network, seed
        of_network = "" if options.network == "thin_c3d" else f"{options.network}-"
        self.folder = options.out / f"{of_network}seed{seed}"
        self.data = ["--data", options.data, "--cache", options.out / "cache"]

    def train(self):
        folder = self.folder / "dense"
        settings = ["--config", SETTINGS / "train.toml", "--seed", self.seed]
        return folder, run(folder, "train", self.network, *self.data, "-o", folder, *settings)

    def prune(self, dense, name, settings, *how):
        folder = self.folder / name.replace(", ", "-")
        settings = ["--config", SETTINGS / settings, "--seed", self.seed]
        weights = ["--weights", dense / "weights.safetensors"]
        return folder, run(
            folder, "prune", self.network, *self.data, "-o", folder, *weights, *settings, *how
        )

    def quantize(self, source, bits, epochs=None, name=None, more=()):
        folder = source / (name or f"{bits}-bit" + ("-after" if epochs == 0 else ""))
        settings = ["--config", SETTINGS / "quantize.toml", "--seed", self.seed]
        settings += [] if epochs is None else ["--epochs", epochs]
        weights = ["--weights", source / "weights.safetensors"]
        return run(
            folder,
            *("quantize", self.network, *self.data, "-o", folder, *weights, *settings),
            *("--design", f"{bits}-sparse", *more),
        )


def add(rows, name, reduction, top1, more):
    """Add the results of one more seed to a row; a column holds one value per seed.

    `more` maps the name of a column to a factor, or to the result of `quantize`.
    """
    row = rows.setdefault(name, {})
    found = {"operations": reduction}
    found |= {column: value for column, value in more.items() if column in FACTORS}
    found["float"] = 100 * top1
    for column, result in more.items():
        if column in FACTORS:
            continue
        found[column] = 100 * result["emulated_top1"]
        found[f"{result['bits']} bits: kB"] = result["bytes"] / 1000
        found[f"{result['bits']} bits: ms"] = modelled_ms(load(result["path"]))
    for column, value in found.items():
        row.setdefault(column, []).append(value)


def searched(options, pattern, reduction):
    """Arguments of `prune` that search the rates."""
    return ["--pattern", pattern, "--reduction", reduction, *LAYERS[options.network]]


def long_table(options):
    """Dense and KGRC with 1/3 of the operations, fully trained; then 8 and 4 bits, also trained."""
    rows = {}
    for seed in options.seeds:
        study = Study(options, seed)
        dense, found = study.train()
        how = searched(options, "kgrc", REDUCTION[options.network])
        folder, pruned = study.prune(dense, "kgrc-3x", "prune.toml", *how)
        sources = {
            "dense": (dense, 1.0, found["test_top1"]),
            "kgrc-3x": (folder, pruned["reduction"], pruned["test_top1"]),
        }
        for name, (source, reduction, top1) in sources.items():
            coded = {"8 after": study.quantize(source, 8, 0)}
            coded |= {f"{bits}": study.quantize(source, bits) for bits in (8, 4)}
            add(rows, name, reduction, top1, coded)
    return rows


def rates_table(options):
    """The paper's rates, few epochs of training; 16, 8 and 4 bits without training."""
    rows = {}
    for seed in options.seeds:
        study = Study(options, seed)
        dense, found = study.train()
        sources = {"dense": (dense, 1.0, found["test_top1"])}
        for name in PAPER:
            folder, pruned = study.prune(dense, name, "short.toml", "--recipe", name)
            sources[name] = (folder, pruned["reduction"], pruned["test_top1"])
        for name, (source, reduction, top1) in sources.items():
            coded = {f"{bits} after": study.quantize(source, bits, 0) for bits in (16, 8, 4)}
            add(rows, name, reduction, top1, coded)
    return rows


def compare_briefly(options, kind, reduction, runs):
    """Each of `runs` (name -> pattern, algorithm) at one reduction, few epochs of training."""
    rows = {}
    for seed in options.seeds:
        study = Study(options, seed)
        dense, _ = study.train()
        for name, (pattern, algorithm) in runs.items():
            how = [*searched(options, pattern, reduction), "--algorithm", algorithm]
            _, pruned = study.prune(dense, f"{kind}-{name}", "short.toml", *how)
            add(rows, name, pruned["reduction"], pruned["test_top1"], {})
    return rows


def equal_table(options):
    """Patterns and algorithms with 1/2.5 of the operations, few epochs of training."""
    return compare_briefly(options, "equal", EQUAL_REDUCTION, EQUAL)


def patterns_table(options):
    """Every pattern at a reduction that all can reach, one-shot, few epochs of training."""
    return compare_briefly(options, "patterns", PATTERNS_REDUCTION[options.network], PATTERNS)


def compare_on_array(options, kind, runs):
    """Each of `runs` (row, pattern, design, further arguments of prune), with what it costs."""
    rows = {}
    for seed in options.seeds:
        study = Study(options, seed)
        dense, found = study.train()
        add(rows, "dense", 1.0, found["test_top1"], {"array": 1.0, "latency": 1.0})
        for name, pattern, reduction, design, more in runs:
            how = [*searched(options, pattern, reduction), "--design", design, *more]
            _, pruned = study.prune(
                dense, f"{kind}-{name}", "short.toml", *how, "--algorithm", "one-shot"
            )
            costs = {
                "array": pruned["array_macs_dense"] / pruned["array_macs"],
                "latency": pruned["latency_reduction"],
            }
            add(rows, name, pruned["reduction"], pruned["test_top1"], costs)
    return rows


def claim_table(options):
    """The KGRC paper's claim: KGR or KGC below 2x fewer operations, KGRC above 3x."""
    return compare_on_array(options, "claim", [(*run, ()) for run in CLAIM])


def latency_table(options):
    """Patterns at equal modelled latency (with memory, on 8-sparse)."""
    runs = [(*run, "8-sparse", ("--target", "latency")) for run in LATENCY]
    return compare_on_array(options, "latency", runs)


def methods_table(options):
    """What has no row elsewhere: ADMM and powers of two, thresholds, tracked rates, one by one."""
    rows = {}
    for seed in options.seeds:
        study = Study(options, seed)
        dense, found = study.train()
        add(rows, "dense", 1.0, found["test_top1"], {})
        for name, (bits, epochs, more) in METHODS.items():
            result = study.quantize(dense, bits, epochs, name.replace(" ", "-"), more)
            add(rows, f"{name} (emulated)", 1.0, result["emulated_top1"], {})
        how = searched(options, "krp", EQUAL_REDUCTION)
        for name, settings in RETRAINED.items():
            _, pruned = study.prune(dense, f"methods-{name}", settings, *how)
            add(rows, f"KRP, {name}", pruned["reduction"], pruned["test_top1"], {})
    return rows


TABLES = {
    "latency": latency_table,
    "claim": claim_table,
    "methods": methods_table,
    "long": long_table,
    "rates": rates_table,
    "equal": equal_table,
    "patterns": patterns_table,
}


def spread(values):
    """Mean and, for several seeds, standard deviation."""
    text = f"{statistics.mean(values):.1f}"
    return text + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def write(rows):
    """A Markdown table; sizes and modelled latencies are of the first seed."""
    every = list(next(iter(rows.values())))
    factors = [name for name in FACTORS if name in every]
    columns = [name for name in every if name not in FACTORS and ":" not in name]
    sizes = list(dict.fromkeys(name.partition(":")[0] for name in every if ":" in name))
    lines = [
        "| " + " | ".join(["network", *map(FACTORS.get, factors), *columns, *sizes]) + " |",
        "|---" * (1 + len(factors) + len(columns) + len(sizes)) + "|",
    ]
    for name, row in rows.items():
        cells = [f"{statistics.mean(row[factor]):.2f}x" for factor in factors]
        cells += [spread(row[column]) for column in columns]
        cells += [f"{row[f'{s}: kB'][0]:.0f} kB, {row[f'{s}: ms'][0]:.2f} ms" for s in sizes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--network", default="thin_c3d", choices=LAYERS)
    parser.add_argument("--out", type=Path, default=Path("out/accuracy"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    options = parser.parse_args()
    for name in options.tables:
        print(f"{TABLES[name].__doc__}\n\n{write(TABLES[name](options))}\n", flush=True)


if __name__ == "__main__":
    main()
