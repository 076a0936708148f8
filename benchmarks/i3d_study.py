"""Patterns on a real network: pretrained I3D, pruned by each pattern and taught by the dense one.

The 3x3x3 convolutions of I3D (Kinetics-400) are pruned one-shot by every pattern, at equal
operations and at equal modelled latency of these layers (for a clip of 64 x 224 x 224). The dense
network then teaches on unlabelled clips of surveillance_fight (16 x 80 x 80): the same steps, order
and seed for all. Clips that were not used judge: error of the pooled features, correlation of the
centred logits, and how often the dense network's first label is the first, or among five. Batch
norm is made anew on training clips before judging, of the dense network too. Labels are never used.

Hours: with 300 steps a variant takes minutes to tens of minutes on one core. A finished variant is
not run again; an interrupted one goes on from its last checkpoint, and ends with the same weights.

    python benchmarks/i3d_study.py WEIGHTS DATA --out out/i3d --seeds 0 1 2
"""

import argparse
import copy
import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from reports import write
from torch import nn
from torch.nn import functional

from pynq_kgrc.accelerator.config import read_design
from pynq_kgrc.accelerator.latency import task_time
from pynq_kgrc.compiler.latency import PrunedCycles, compile_shapes
from pynq_kgrc.compress.masks import Masks, weights_of
from pynq_kgrc.compress.patterns import keep_mask
from pynq_kgrc.compress.pruning import prune_weights
from pynq_kgrc.compress.recipes import NAMES, build_pattern, build_patterns, choose_rates
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.files import written_beside
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.models.checkpoint import load_state
from pynq_kgrc.models.i3d import CLIP, i3d
from pynq_kgrc.models.trace import trace
from pynq_kgrc.video import load_clip

SPEC = ClipSpec(
    frames=16, height=80, width=80, short_side=92, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
RATE, BATCH, WARMUP = 5e-4, 8, 8
EVERY = 10
"""Steps between two checkpoints."""
TARGETS = {"operations": (2.0, 3.0, 4.5, 6.0), "latency": (1.5, 2.0, 3.0)}
HEAD = ("AvgPool3d", "dropout", "Logits")
"""Children of I3D that come after its features."""

SUFFIXES = (".mp4", ".avi", ".gif")


def decoded(paths, cache):
    """Normalised clips [N, 3, D, H, W]; decoded once."""
    if not cache.exists():
        frames = np.stack([load_clip(path, SPEC).frames for path in paths])
        with written_beside(cache) as beside, open(beside, "wb") as file:
            np.save(file, frames)
    frames = torch.from_numpy(np.load(cache)).permute(0, 4, 1, 2, 3).float()
    return (frames / 255 - 0.5) / 0.5


def features(net, clips):
    """Pooled features and logits."""
    parts = nn.Sequential(*(child for name, child in net.named_children() if name not in HEAD))
    pooled = parts(clips).mean((2, 3, 4))
    return pooled, net.Logits(pooled[:, :, None, None, None]).flatten(1)


def answers(net, clips):
    with torch.no_grad():
        parts = [features(net, clips[i : i + 10]) for i in range(0, len(clips), 10)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def renew_batch_norm(net, clips):
    """Statistics of batch norm at this size of clip, as a mean over all batches."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm3d)]
    net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    answers(net, clips)
    for norm in norms:
        norm.momentum = 0.1
    net.eval()


class Study:
    """The dense network, its answers, the clips and what each layer costs."""

    def __init__(self, options):
        data, self.out = options.data, options.out
        self.out.mkdir(parents=True, exist_ok=True)
        with open(data / "surveillance_fight" / "index.csv", newline="") as file:
            index = list(csv.DictReader(file))
        videos = {"train": [], "test": []}
        for row in index:
            videos[row["split"]].append(data / "surveillance_fight" / row["file"])
        others = sorted(p for p in (data / "clips").iterdir() if p.suffix in SUFFIXES)
        self.clips = decoded(videos["train"], self.out / "train.npy")
        self.judges = decoded(others + videos["test"], self.out / "test.npy")
        self.net = i3d(400)
        load_state(self.net, options.weights)
        renew_batch_norm(self.net, self.clips[:50])
        known = self.out / "teacher.pt"
        if not known.exists():
            found = [answers(self.net, x) for x in (self.clips, self.clips.flip(-1), self.judges)]
            with written_beside(known) as beside:
                torch.save(found, beside)
        self.taught, self.mirrored, self.judged = torch.load(known, weights_only=True)
        features_, _ = self.taught
        self.scale = ((features_ - features_.mean(0)) ** 2).sum() / len(features_)
        self.graph = trace(self.net, CLIP, name="i3d")
        self.config = read_design(options.design)
        own = weights_of(self.net)
        self.names = [name for name, w in own.items() if tuple(w.shape[2:]) == (3, 3, 3)]
        self.cycles = PrunedCycles(compile_shapes(self.graph, self.config))

    def cost(self, target):
        """Of the pruned layers alone."""

        def of(layer, kept):
            if layer.name not in self.names:
                return 0.0
            if target == "operations":
                return layer.shape.macs * float(kept.mean())
            return task_time(self.config, self.cycles.work(layer, kept)).cycles

        return of

    def rates(self, pattern, target, asked):
        """The recipe, and by how much it divides operations and modelled cycles of these layers."""
        recipe = choose_rates(
            *(self.graph, self.names, pattern, asked, self.config, self.cost(target)),
            nearer=(1.0, 0.99, 0.98, 0.97),
        )
        found = {}
        for kind in TARGETS:
            cost, before, after = self.cost(kind), 0.0, 0.0
            for name in self.names:
                layer = self.graph[name]
                dense = np.ones_like(layer.weight, dtype=bool)
                kept = dense
                if name in recipe:
                    kept = keep_mask(layer.weight, build_pattern(recipe[name], self.config))
                before += cost(layer, dense)
                after += cost(layer, kept)
            found[kind] = before / after
        return build_patterns(recipe, self.config), found

    def judge(self, net):
        """How near a network is to the dense one on clips that were not used."""
        net = copy.deepcopy(net)
        renew_batch_norm(net, self.clips[:50])
        pooled, logits = answers(net, self.judges)
        wanted, label = self.judged
        first, five = label.argmax(1), logits.topk(5, 1).indices
        centred = [x - x.mean(1, keepdim=True) for x in (logits, label)]
        return {
            "feature_error": float(
                ((pooled - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum()
            ),
            "correlation": float(functional.cosine_similarity(*centred).mean()),
            "same_label": int((logits.argmax(1) == first).sum()),
            "among_five": int((five == first[:, None]).any(1).sum()),
            "clips": len(first),
        }


def teach(study, folder, recipe, steps, seed):
    """A pruned copy of the network, before and after it was taught; resumes."""
    torch.manual_seed(seed)
    net = copy.deepcopy(study.net)
    masks = Masks(net, prune_weights(net, recipe))
    before = study.judge(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.0)
    masks.apply_after(optimizer)
    generator, order, done = torch.Generator().manual_seed(1 + seed), [], 0
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        order, done = state["order"], state["done"]
        print(f"{folder.name}: goes on after step {done} of {steps}", flush=True)
    for step in range(done, steps):
        if len(order) < BATCH:
            order = torch.randperm(len(study.clips), generator=generator).tolist()
        picked, order = order[:BATCH], order[BATCH:]
        mirrored = bool(torch.rand(1, generator=generator) < 0.5)
        x = study.clips[picked].flip(-1) if mirrored else study.clips[picked]
        pooled, logits = (y[picked] for y in (study.mirrored if mirrored else study.taught))
        for group in optimizer.param_groups:
            fall = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * fall
        net.train()
        net.dropout.eval()
        own_pooled, own_logits = features(net, x)
        loss = ((own_pooled - pooled) ** 2).sum() / study.scale / len(picked)
        loss = loss + functional.kl_div(
            *(own_logits.log_softmax(1), logits.log_softmax(1)),
            log_target=True,
            reduction="batchmean",
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"generator": generator.get_state(), "order": order, "done": step + 1}
            with written_beside(checkpoint) as beside:
                torch.save(state, beside)
            print(f"{folder.name}: step {step + 1}, loss {loss.item():.3f}", flush=True)
    return before, study.judge(net)


def run(study, pattern, target, asked, options, seed):
    """The result of a variant, made or read."""
    folder = study.out / f"{pattern}-{target}-{asked:g}x-seed{seed}-{options.steps}"
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text("utf-8"))
    folder.mkdir(exist_ok=True)
    found = {"pattern": pattern, "target": target, "asked": asked, "seed": seed}
    try:
        recipe, factors = study.rates(pattern, target, asked)
    except ConfigError as error:
        found["refused"] = str(error)
    else:
        before, after = teach(study, folder, recipe, options.steps, seed)
        found |= {"factors": factors, "steps": options.steps, "before": before, "after": after}
        (folder / "checkpoint.pt").unlink()
    write(folder, done.name, json.dumps(found, indent=1) + "\n")
    return found


def table(results):
    """Lines of Markdown; the last column is how many seeds a row has."""
    yield (
        "| pattern | asked | fewer operations | fewer cycles, modelled "
        "| correlation, before -> after | same label | in five | seeds |"
    )
    yield "|---" * 8 + "|"
    rows = {}
    for result in results:
        if "after" in result:
            key = result["pattern"], result["target"], result["asked"]
            rows.setdefault(key, []).append(result)
    for (pattern, target, asked), found in rows.items():

        def mean(place, name, found=found):
            return sum(each[place][name] for each in found) / len(found)

        yield (
            f"| {pattern} | {asked:g}x {target} | {mean('factors', 'operations'):.2f}x "
            f"| {mean('factors', 'latency'):.2f}x | {mean('before', 'correlation'):.2f} -> "
            f"{mean('after', 'correlation'):.2f} | {mean('after', 'same_label'):.0f} of "
            f"{found[0]['after']['clips']} | {mean('after', 'among_five'):.0f} | {len(found)} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, help="I3D, Kinetics-400")
    parser.add_argument("data", type=Path, help="folder with surveillance_fight/ and clips/")
    parser.add_argument("--out", type=Path, default=Path("out/i3d"))
    parser.add_argument("--design", default="8-zcu102")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--patterns", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--factors", type=float, nargs="+", help="instead of those of the targets")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.nice(10)
    study, results = Study(options), []
    for seed in options.seeds:
        for target in options.targets:
            for asked in options.factors or TARGETS[target]:
                for pattern in options.patterns:
                    results.append(run(study, pattern, target, asked, options, seed))
                    write(study.out, "table.md", "\n".join(table(results)) + "\n")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
