"""Plots for notebooks and commands, with matplotlib. Every function returns a Figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pynq_kgrc.accelerator.boards import Board
from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.explore import Candidate, macs_a_cycle, pareto_front
from pynq_kgrc.analysis.fidelity import Fidelity
from pynq_kgrc.analysis.profile import Profile
from pynq_kgrc.analysis.simulation import ARRAY, SimulatedTask, SimulationReport
from pynq_kgrc.analysis.timing import LayerTime
from pynq_kgrc.backends.board.power import Recording
from pynq_kgrc.groups import GroupSize, split
from pynq_kgrc.quant import Array
from pynq_kgrc.results import Recognition, WindowLabels
from pynq_kgrc.runtime import Prediction

PROCESSES = {
    "array": "tab:blue",
    "input": "tab:orange",
    "weights": "tab:red",
    "scale": "tab:green",
    "shortcut": "tab:olive",
    "output": "tab:purple",
    "memory": "tab:gray",
}
"""Colour of each part of `TaskTime.busy` that can bound a task."""

MOST_GROUPS = (4, 6)
"""The most kernel groups that `plot_groups` shows, along filters and along channels."""


def plot_labels(prediction: Prediction | Recognition) -> Figure:
    """A bar for the probability of each label of a clip or a video."""
    names = [each.label for each in prediction.labels]
    confidences = [each.confidence for each in prediction.labels]
    figure = Figure(figsize=(6, 0.4 * len(names) + 0.8), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, confidences)
    axes.bar_label(bars, [f"{confidence:.1%}" for confidence in confidences], padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.set_xlabel(f"probability ({prediction.backend})")
    return figure


def plot_frames(frames: Sequence[Array], titles: Sequence[str], columns: int = 3) -> Figure:
    """Frames [H, W, 3] of videos, each below its title, `columns` side by side."""
    columns = min(columns, len(frames))
    rows = -(-len(frames) // columns)
    height, width = frames[0].shape[:2]
    side = 3.2
    figure = Figure(
        figsize=(side * columns, rows * (side * height / width + 0.5)), layout="constrained"
    )
    places = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axes in places:
        axes.axis("off")
    for axes, frame, title in zip(places, frames, titles, strict=False):
        axes.imshow(frame)
        axes.set_title(title, fontsize=9)
    return figure


MOST_MAPS = 6
"""The most channels that `plot_maps` shows."""


def plot_maps(found: Mapping[str, Array], title: str = "") -> Figure:
    """Output codes [C, D, H, W] of one task, a row for each backend, a column for each channel.

    The channels are those that vary most; of each the middle of the depth is shown. All pictures
    have one scale of colours.
    """
    first = next(iter(found.values()))
    depth = first.shape[1] // 2
    channels = np.sort(np.argsort(-first[:, depth].std(axis=(1, 2)), kind="stable")[:MOST_MAPS])
    figure = Figure(figsize=(1.6 * len(channels) + 1, 1.7 * len(found) + 0.6), layout="constrained")
    places = figure.subplots(len(found), len(channels), squeeze=False)
    low, high = int(first.min()), int(first.max())
    for row, (name, codes) in zip(places, found.items(), strict=True):
        for channel, axes in zip(channels, row, strict=True):
            picture = axes.imshow(codes[channel, depth], vmin=low, vmax=high, cmap="viridis")
            axes.set_xticks([])
            axes.set_yticks([])
            if name == next(iter(found)):
                axes.set_title(f"channel {channel}", fontsize=8)
        row[0].set_ylabel(name)
    figure.colorbar(picture, ax=places, label="code", shrink=0.8)
    figure.suptitle(title, fontsize=10)
    return figure


def plot_timeline(windows: Sequence[WindowLabels], top: int = 4) -> Figure:
    """Probabilities over the time of a video: a line per label, a step per window.

    Args:
        windows: in order, each with the probabilities of all labels.
        top: number of lines: the labels with the highest sum of probabilities.
    """
    confidences = [{e.label: e.confidence for e in window.labels} for window in windows]
    total: Counter[str] = Counter()
    for window in confidences:
        total.update(window)
    edges = [each.start_ms / 1e3 for each in windows] + [windows[-1].end_ms / 1e3]
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    for name in sorted(total, key=lambda name: -total[name])[:top]:
        axes.stairs(
            [window.get(name, 0.0) for window in confidences],
            edges,
            label=name,
            linewidth=2,
            baseline=None,
        )
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("seconds of the video")
    axes.set_ylabel("probability")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


MOST_NAMES = 60
"""The most classes whose names `plot_confusion` writes beside the matrix."""


def plot_confusion(confusion: Array, names: Sequence[str]) -> Figure:
    """A confusion matrix [true class, most probable class] of counts, coloured by row.

    A row is a true class; its colours are fractions of its clips. Counts are written in the cells
    of up to `MOST_NAMES` classes.
    """
    classes = len(confusion)
    names = [name.replace("$", r"\$") for name in names]  # a dollar sign begins a formula
    side = min(4 + 0.25 * classes, 18)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    totals = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(totals, 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="fraction of the clips of the true class", shrink=0.8)
    axes.set_xlabel("most probable class")
    axes.set_ylabel("true class (number of clips)")
    if classes <= MOST_NAMES:
        counts = [f"{name} ({total})" for name, total in zip(names, totals[:, 0], strict=True)]
        axes.set_xticks(range(classes), names, rotation=90)
        axes.set_yticks(range(classes), counts)
        for row, column in np.argwhere(confusion):
            color = "w" if shares[row, column] > 0.5 else "k"
            count = str(confusion[row, column])
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=7)
    return figure


def plot_layers(layers: Sequence[LayerTime]) -> Figure:
    """Modelled cycles of each task, coloured by what bounds it; what was counted."""
    figure = Figure(figsize=(8, 0.3 * len(layers) + 1.2), layout="constrained")
    axes = figure.subplots()
    for process, color in PROCESSES.items():
        bound = [(i, each) for i, each in enumerate(layers) if each.time.bound == process]
        if bound:
            rows, those = zip(*bound, strict=True)
            cycles = [each.time.cycles / 1e3 for each in those]
            axes.barh(rows, cycles, color=color, alpha=0.7, label=f"modelled, bound by {process}")
    for label, mark, counts in (
        ("trips of the array, counted", "k|", [each.trips for each in layers]),
        ("clock cycles, counted", "k>", [each.cycles for each in layers]),
    ):
        counted = [(i, count / 1e3) for i, count in enumerate(counts) if count is not None]
        if counted:
            rows, thousands = zip(*counted, strict=True)
            axes.plot(thousands, rows, mark, ms=12 if mark == "k|" else 4, label=label)
    axes.set_yticks(range(len(layers)), [each.name for each in layers])
    axes.invert_yaxis()
    axes.set_xlabel("thousand clock cycles, or trips of the array")
    axes.legend()
    return figure


NEAR = 0.08
"""Points of a roofline that differ by less than this share get one label."""


def plot_roofline(
    layers: Sequence[LayerTime], config: AcceleratorConfig, board: Board, clock_mhz: float = 150.0
) -> Figure:
    """A roofline: modelled rate against intensity, below the peaks of the array and the memory."""
    peak = macs_a_cycle(config)
    slope = board.ddr_bytes_per_second / (clock_mhz * 1e6)
    layers = [each for each in layers if each.cost.macs]  # pools multiply nothing
    reach = [each.intensity for each in layers] + [peak / slope]
    x = np.geomspace(min(reach) / 2, max(reach) * 2, 100)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, np.minimum(peak, slope * x), color="0.4")
    named: dict[tuple[float, float], list[str]] = {}
    """The names of the layers whose points lie on one another, by the first one's place."""
    for each in layers:
        place = each.intensity, each.rate
        axes.plot(*place, "o", color=PROCESSES[each.time.bound])
        same = (other for other in named if np.allclose(other, place, rtol=NEAR))
        named.setdefault(next(same, place), []).append(each.name)
    for i, (place, names) in enumerate(named.items()):
        aside = 4, -12 if i % 2 or place[1] > 0.7 * peak else 5  # not on the line of the peak
        axes.annotate(", ".join(names), place, aside, textcoords="offset points")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("multiply-accumulates for each byte of traffic")
    axes.set_ylabel(f"multiply-accumulates a cycle (of {peak})")
    axes.set_title(f"modelled: {config.name}, {board.name}'s memory at its peak, {clock_mhz:g} MHz")
    return figure


def plot_groups(weight: Array, size: GroupSize, title: str = "") -> Figure:
    """The rows and columns that the first kernel groups of a weight [M, N, ...] keep.

    Filters go down, taps go to the right, one channel tile after the other. White is pruned.
    """
    cut = split(weight.reshape(weight.shape[0], weight.shape[1], -1), size)
    kept = np.any(cut != 0, axis=4)[: MOST_GROUPS[0], : MOST_GROUPS[1], 0]
    p, q, gm, gk = kept.shape
    figure = Figure(figsize=(1.2 * q + 1, 1.1 * p + 0.8), layout="constrained")
    axes = figure.subplots()
    picture = kept.transpose(0, 2, 1, 3).reshape(p * gm, q * gk)
    axes.imshow(picture, cmap="Blues", vmin=0, vmax=1.4, aspect="auto", interpolation="nearest")
    for row in range(1, p):
        axes.axhline(row * gm - 0.5, color="k", lw=0.8)
    for column in range(1, q):
        axes.axvline(column * gk - 0.5, color="k", lw=0.8)
    axes.set_xlabel(f"taps, {gk} to a group, of channels in tiles of {size.gn}")
    axes.set_ylabel(f"filters, {gm} to a group")
    axes.set_title(title)
    return figure


def plot_fidelity(found: Mapping[str, Fidelity]) -> Figure:
    """Signal to noise of each task in dB, a line per program."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, report in found.items():
        tasks = [task.task for task in report.tasks]
        axes.plot(tasks, [task.snr_db for task in report.tasks], "o-", label=name)
    axes.set_ylabel("signal to noise, dB")
    axes.tick_params("x", rotation=45)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_speedups(milliseconds: Mapping[str, float]) -> Figure:
    """Modelled milliseconds of some programs, each with its speedup over the first."""
    first = next(iter(milliseconds.values()))
    figure = Figure(figsize=(6, 0.45 * len(milliseconds) + 0.9), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(milliseconds), list(milliseconds.values()))
    axes.bar_label(bars, [f"{first / ms:.2f}x" for ms in milliseconds.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("modelled ms a clip")
    return figure


def plot_designs(
    candidates: Sequence[Candidate],
    own: AcceleratorConfig,
    board: Board,
    clock_mhz: float,
    share: float,
) -> Figure:
    """Modelled latency against DSPs, with the Pareto front and the design of the programs."""
    front = pareto_front(c for c in candidates if c.resources.share(board) <= share)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    dsps, means = _places(candidates)
    axes.scatter(dsps, means, s=14, color="0.7")
    dsps, means = _places(front)
    axes.step(dsps, means, "o-", where="post", color="tab:blue", label="Pareto front")
    dsps, means = _places(c for c in candidates if c.config == own)
    axes.plot(dsps, means, "s", color="tab:orange", label=own.name)
    axes.axvline(share * board.dsp, color="tab:red", lw=1, ls="--")
    axes.set_xlabel(f"DSP48E2 of {board.name} (dashed: {share:.0%} of {board.dsp})")
    axes.set_ylabel(f"convolutions of a clip, ms at {clock_mhz:g} MHz")
    axes.set_title("modelled; geometric mean of " + ", ".join(candidates[0].latency))
    axes.legend()
    return figure


def _places(candidates: Iterable[Candidate]) -> tuple[list[int], list[float]]:
    found = list(candidates)
    return [c.resources.dsp for c in found], [c.mean_ms for c in found]


def plot_power(recordings: Mapping[str, Recording]) -> Figure:
    """Watts of every rail over time, one plot per recording; measured, or simulated if they are."""
    figure = Figure(figsize=(8, 2.6 * len(recordings)), layout="constrained")
    all_axes = figure.subplots(len(recordings), 1, squeeze=False)[:, 0]
    for axes, (name, recording) in zip(all_axes, recordings.items(), strict=True):
        for rail, watts in recording.watts.items():
            axes.plot(recording.seconds, watts, label=rail)
        axes.set_title(name)
        axes.set_ylabel("W, simulated" if recording.simulated else "W, measured")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    all_axes[-1].set_xlabel("seconds")
    return figure


def plot_profile(profile: Profile) -> Figure:
    """The parts of a clip's time, and the time of each layer beside its modelled time."""
    layers = profile.layers
    figure = Figure(figsize=(9, 2.4 + 0.25 * len(layers)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1.4, 0.25 * len(layers) + 1))
    start = 0.0
    for part, ms in profile.parts_ms.items():
        above.barh(0, ms, left=start, label=f"{part} {ms:.3g} ms")
        start += ms
    above.set_yticks([])
    above.set_xlabel("ms of a clip, one after the other")
    above.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    rows = range(len(layers))
    below.barh(rows, [layer.ms for layer in layers], color="tab:blue", label="this run")
    modelled = [layer.modelled_ms for layer in layers]
    below.plot(modelled, rows, "k|", ms=9, label="modelled, on an FPGA")
    below.set_yticks(rows, [layer.name for layer in layers], fontsize=7)
    below.invert_yaxis()
    below.set_xlabel("ms of a layer")
    below.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    figure.suptitle(f"{profile.program} on {profile.design}\n{profile.figures}", fontsize=8)
    return figure


STATES = {"busy": "tab:blue", "port": "tab:red", "empty": "0.85", "full": "tab:orange"}
"""Colour of what a process does in a simulation: it works, or waits for memory, for a word of a
stream, for room in one."""


def plot_simulation(report: SimulationReport, shown: SimulatedTask) -> Figure:
    """Simulated times: where each process of a task spends its time, and what the array waits for.

    Args:
        report: of the tasks whose waits are drawn below.
        shown: the task whose processes are drawn above, over its time.
    """
    processes, tasks = shown.time.processes, report.tasks
    heights = (0.28 * len(processes) + 1, 0.28 * len(tasks) + 1)
    figure = Figure(figsize=(10, sum(heights) + 0.8), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=heights)
    scale = report.timing.clock_mhz * 1e3
    _draw_processes(above, shown, scale)
    _draw_waits(below, tasks, scale)
    figure.suptitle(f"{report.program} on {report.design}\n{report.figures}", fontsize=7)
    return figure


def _draw_processes(axes: Axes, shown: SimulatedTask, scale: float) -> None:
    width = shown.time.bucket_cycles
    for row, process in enumerate(shown.time.processes):
        waits = {why: np.array(cycles) / width for why, cycles in process.timeline.items()}
        edges = np.minimum(np.arange(len(waits["port"]) + 1) * width, process.end) / scale
        rest = np.ones(len(waits["port"]))
        level = np.full(len(rest), row + 0.4)
        shares = {"busy": rest - sum(waits.values()), **waits}
        for state, color in STATES.items():
            # rows grow downward: each state is stacked upon the one before
            upper = level - 0.8 * np.clip(shares[state], 0, 1)
            axes.stairs(upper, edges, baseline=level, fill=True, color=color)
            level = upper
    names = [each.name for each in shown.time.processes]
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"{shown.name}, simulated ms")
    labels = {
        "busy": "works",
        "port": "waits for memory",
        "empty": "for a word",
        "full": "for room",
    }
    for state, color in STATES.items():
        axes.plot([], [], "s", color=color, label=labels[state])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)


def _draw_waits(axes: Axes, tasks: Sequence[SimulatedTask], scale: float) -> None:
    rows = range(len(tasks))
    parts: dict[str, list[float]] = {"the array works": [0.0] * len(tasks)}
    for row, task in enumerate(tasks):
        process = task.time.process(ARRAY)
        parts["the array works"][row] = process.busy / scale
        for wait in process.waits:
            name = wait.on if wait.why == "empty" else f"room in {wait.on}"
            parts.setdefault(name, [0.0] * len(tasks))[row] += wait.cycles / scale
        after = parts.setdefault("start and end", [0.0] * len(tasks))
        after[row] = (task.time.cycles - process.end) / scale
    left = np.zeros(len(tasks))
    for name, values in parts.items():
        axes.barh(rows, values, left=left, label=name)
        left += values
    axes.plot([task.ideal_ms for task in tasks], rows, "k|", ms=9, label="ideal, modelled")
    axes.set_yticks(rows, [task.name for task in tasks], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("simulated ms, and what the array waits for")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
