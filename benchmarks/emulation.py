"""How fast the emulation and the native backend are, next to torch, ONNX Runtime and OpenVINO.

Every engine runs in a process of its own, loads its network and warms up. Then they take turns,
one run each per round, so that other load of the computer affects all of them alike. The figure
to trust is the median over the rounds of torch's time divided by the engine's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines import NETWORKS, Result
from reports import ROOT, circumstances, markdown_table, version, where, write
from tqdm import tqdm

from pynq_kgrc.files import user_cache

RESULTS = Path(__file__).resolve().parent / "results"
ENGINES = Path(__file__).with_name("engines.py")
SCALING_NETWORKS = ("c3d", "i3d")
FRAMES = (16, 32, 64, 128)
BASE = "torch"

LABELS = {
    "emulation": "pynq_kgrc emulation, int8, dense",
    "emulation_kgrc": "pynq_kgrc emulation, int8, KGRC recipe",
    "native": "pynq_kgrc native, int8, dense",
    "native_kgrc": "pynq_kgrc native, int8, KGRC recipe",
    "csim_kgrc": "pynq_kgrc C-simulation, int8, KGRC recipe",
    "torch": "torch eager, fp32",
    "ort_fp32": "ONNX Runtime, fp32",
    "ort_int8": "ONNX Runtime, int8 (QDQ, static)",
    "openvino_int8": "OpenVINO, int8 (same QDQ file)",
}
PACKAGES = ("pynq_kgrc", "numpy", "torch", "onnx", "onnxruntime", "openvino")

PREPARE_SECONDS, LOAD_SECONDS, RUN_SECONDS = 3600, 900, 600
PAUSE = 0.2
"""Seconds between two runs, in which idle threads of the last engine stop spinning."""

EPILOG = f"""\
examples:
  python benchmarks/emulation.py
      all networks, 7 rounds; writes {RESULTS.relative_to(ROOT)}/emulation.md and emulation.json
  python benchmarks/emulation.py --networks c3d --rounds 3 --tasks --out /tmp/c3d
      one network only, with the time of each task
  python benchmarks/emulation.py --scaling --networks i3d
      whether time grows in proportion to frames: I3D at {", ".join(map(str, FRAMES))} frames

how to read it:
  A ratio of 2 means: twice as fast as torch eager in fp32 with as many threads. On a busy computer
  ratios are still valid, seconds are not: the report gives the load average.
  The emulation and the native backend are timed from uint8 frames to probabilities; their peers
  from a prepared tensor to logits.

what is kept:
  Compiled programs and ONNX files are cached in ~/.cache/pynq_kgrc/bench (or $XDG_CACHE_HOME), in a
  folder named by a digest of the code that made them. C3D takes about 0.6 GB. The cache may be
  deleted at any time.
"""


# ---- engine processes -----------------------------------------------------------------------


class EngineError(Exception):
    """An engine does not load, fails, or takes too long; the message says which."""


class EngineProcess:
    """An engine in a process of its own.

    Raises:
        EngineError: it did not load within `seconds`.
    """

    def __init__(self, job: dict[str, Any], seconds: float) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by `close`
        command = [sys.executable, str(ENGINES), json.dumps(job)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.errors, bufsize=0, cwd=ROOT
        )
        try:
            self.ready: Result = self._answer(seconds)["ready"]
        except BaseException:
            self.close()
            raise

    def run(self) -> Result:
        """One run: seconds, processor seconds, peak memory, seconds of each task."""
        try:
            self.process.stdin.write(b"run\n")
        except OSError:
            raise EngineError(f"its process has ended; {self._last_error_line()}") from None
        return self._answer(RUN_SECONDS)

    def _answer(self, seconds: float) -> Result:
        found, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not found:
            raise EngineError(f"no answer in {seconds:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise EngineError(f"its process ended with status {status}; {self._last_error_line()}")
        answer: Result = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def _last_error_line(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "without a message"

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


@dataclass
class EngineRuns:
    """What was measured of one engine; lists hold one entry per round."""

    engine: str
    label: str
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    tasks: list[list[tuple[str, float]]] = field(default_factory=list)
    peak_rss: int = 0
    logits: list[float] = field(default_factory=list)


@dataclass
class Measurement:
    """The measured engines of one network, and those that were left out, with reasons."""

    network: str
    facts: dict[str, Any]
    engines: list[EngineRuns] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def leave_out(self, engine: str, reason: object) -> None:
        self.left_out.append({"engine": engine, "label": label(engine), "reason": str(reason)})
        say(f"  {label(engine)}: left out, {reason}")


def label(engine: str) -> str:
    return LABELS.get(engine, engine)


def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def once(job: dict[str, Any]) -> Result:
    """Run one step of preparation in a process of its own; its result."""
    engine = EngineProcess(job, PREPARE_SECONDS)
    engine.close()
    return engine.ready


def interleave(measurement: Measurement, jobs: dict[str, dict[str, Any]], rounds: int) -> None:
    """Start an engine for each job and let them take turns."""
    with ExitStack() as stack:
        live: dict[str, tuple[EngineProcess, EngineRuns]] = {}
        for name, job in tqdm(jobs.items(), "load", disable=None, leave=False):
            try:
                engine = EngineProcess(job, LOAD_SECONDS)
            except EngineError as error:
                measurement.leave_out(name, error)
                continue
            stack.callback(engine.close)
            measured = EngineRuns(name, label(name), logits=engine.ready.get("logits", []))
            live[name] = engine, measured
        bar = tqdm(total=rounds * len(live), desc=measurement.network, disable=None, leave=False)
        measurement.facts["load_average_before"] = os.getloadavg()
        for turn in range(rounds):
            names = list(live)
            first = turn % max(1, len(names))
            # the order rotates, so that no engine always follows the same other one
            for name in names[first:] + names[:first]:
                engine, measured = live[name]
                time.sleep(PAUSE)
                try:
                    answer = engine.run()
                except EngineError as error:
                    measurement.leave_out(name, error)
                    del live[name]
                    continue
                measured.seconds.append(answer["seconds"])
                measured.cpu.append(answer["cpu"])
                measured.peak_rss = answer["peak_rss"]
                if answer["tasks"]:
                    measured.tasks.append(answer["tasks"])
                bar.update()
        bar.close()
        measurement.facts["load_average_after"] = os.getloadavg()
        measurement.engines = [measured for _, measured in live.values()]


def compare_engines(network: str, rounds: int, threads: int, simulate: bool) -> Measurement:
    """Measure one network on all engines."""
    say(f"{network}: preparing (minutes on the first call)")
    folder = cache_folder()
    measurement = Measurement(network, {})
    common = {"network": network, "threads": threads, "warm": 1}
    weights = once({"engine": "prepare_weights", "network": network})
    measurement.facts["weights"] = weights["origin"]
    common["weights"] = weights["weights"]
    stem = f"{network}-{'published' if weights['weights'] else 'random'}"
    files = {
        "emulation": str(folder / f"{stem}-dense.kgrc"),
        "emulation_kgrc": str(folder / f"{stem}-kgrc.kgrc"),
        "onnx": str(folder / f"{stem}.onnx"),
        "int8": str(folder / f"{stem}-int8-ort{version('onnxruntime')}.onnx"),
    }
    jobs: dict[str, dict[str, Any]] = {"torch": {**common, "engine": "torch"}}
    try:
        made = once({**common, **files, "engine": "prepare_programs", "warm": 0})
        measurement.facts["programs"] = made["programs"]
        for engine in made["programs"]:
            jobs[engine] = {**common, "engine": engine, "program": files[engine]}
            native = engine.replace("emulation", "native")
            jobs[native] = {**jobs[engine], "engine": native}
        if simulate and "emulation_kgrc" in jobs:
            jobs["csim_kgrc"] = {**jobs["emulation_kgrc"], "engine": "csim_kgrc"}
    except EngineError as error:
        measurement.leave_out("emulation", error)
    try:
        once({**common, **files, "engine": "prepare_onnx", "warm": 0})
        jobs["ort_fp32"] = {**common, "engine": "ort_fp32", "onnx": files["onnx"]}
        once({**common, **files, "engine": "prepare_int8", "warm": 0})
        for engine in ("ort_int8", "openvino_int8"):
            jobs[engine] = {**common, "engine": engine, "onnx": files["int8"]}
    except EngineError as error:
        for engine in ("ort_fp32", "ort_int8", "openvino_int8"):
            if engine not in jobs:
                measurement.leave_out(engine, error)
    interleave(measurement, jobs, rounds)
    return measurement


def scale_frames(network: str, frames: list[int], rounds: int, threads: int) -> Measurement:
    """Measure the emulation of one network at several clip lengths."""
    say(f"{network}: preparing {', '.join(map(str, frames))} frames")
    folder = cache_folder()
    weights = once({"engine": "prepare_weights", "network": network})
    key = "-".join(map(str, sorted(frames)))
    programs = {str(f): str(folder / f"{network}-scaling-{key}" / f"{f}.kgrc") for f in frames}
    measurement = Measurement(network, {"weights": weights["origin"]})
    common = {"network": network, "threads": threads, "weights": weights["weights"]}
    try:
        made = once({**common, "engine": "prepare_frames", "programs": programs})
    except EngineError as error:
        measurement.leave_out("emulation", error)
        return measurement
    measurement.facts["programs"] = made["programs"]
    jobs = {
        name: {**common, "engine": "emulation", "program": path, "warm": 1}
        for name, path in programs.items()
    }
    interleave(measurement, jobs, rounds)
    return measurement


def cache_folder() -> Path:
    """The folder for programs and ONNX files made by the present code.

    Its name is a digest of that code. Folders of other digests are deleted after a day.
    """
    sources = [ENGINES, ENGINES.with_name("export_onnx.py")]
    package = ROOT / "pynq_kgrc"
    for room in ("models", "compress", "compiler", "accelerator"):
        sources += sorted((package / room).glob("*.py"))
    sources += [package / f"{name}.py" for name in ("graph", "groups", "program", "quant")]
    state = hashlib.sha256()
    for source in sources:
        state.update(source.read_bytes())
    base = user_cache() / "bench"
    folder = base / state.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    a_day_ago = time.time() - 86400
    for old in base.iterdir():
        if old.is_dir() and old != folder and old.stat().st_mtime < a_day_ago:
            shutil.rmtree(old, ignore_errors=True)
    return folder


# ---- figures --------------------------------------------------------------------------------


def ratios(base: EngineRuns | None, engine: EngineRuns) -> list[float]:
    """In each round: seconds of the base divided by seconds of the engine."""
    if base is None:
        return []
    return [b / e for b, e in zip(base.seconds, engine.seconds, strict=False)]


def distance(base: EngineRuns | None, engine: EngineRuns) -> float | None:
    """Relative L2 distance of the logits to those of the base: shows that both ran one network."""
    if base is None or len(base.logits) != len(engine.logits):
        return None
    norm = math.hypot(*base.logits)
    return math.dist(base.logits, engine.logits) / norm if norm else None


def engine_rows(measurement: Measurement) -> list[dict[str, Any]]:
    """The table of one network, the fastest first."""
    base = next((m for m in measurement.engines if m.engine == BASE), None)
    rows = []
    for measured in measurement.engines:
        found = ratios(base, measured)
        rows.append(
            {
                "engine": measured.engine,
                "label": measured.label,
                "ratio_median": statistics.median(found) if found else None,
                "ratio_min": min(found, default=None),
                "ratio_max": max(found, default=None),
                "seconds_median": statistics.median(measured.seconds),
                "seconds_min": min(measured.seconds),
                "cpu_seconds_median": statistics.median(measured.cpu),
                "peak_rss_bytes": measured.peak_rss,
                "logits_distance": distance(base, measured),
                "seconds": measured.seconds,
                "tasks": task_rows(measured),
            }
        )
    return sorted(rows, key=lambda row: -(row["ratio_median"] or 0))


def task_rows(measured: EngineRuns) -> list[dict[str, Any]]:
    """Median time of each task and its share of the total."""
    if not measured.tasks:
        return []
    names = [name for name, _ in measured.tasks[0]]
    times = [statistics.median(run[i][1] for run in measured.tasks) for i, _ in enumerate(names)]
    total = sum(times)
    return [
        {"task": name, "ms": 1e3 * seconds, "share": seconds / total}
        for name, seconds in zip(names, times, strict=True)
    ]


def scaling_rows(measurement: Measurement) -> list[dict[str, Any]]:
    """Time per frame for each clip length; 1 is the time per frame of the shortest clip."""
    rows = []
    ordered = sorted(measurement.engines, key=lambda m: int(m.engine))
    for measured in ordered:
        frames, first = int(measured.engine), int(ordered[0].engine)
        per_frame = [s / frames for s in measured.seconds]
        base = [s / first for s in ordered[0].seconds]
        rows.append(
            {
                "frames": frames,
                "proportion_median": statistics.median(
                    p / b for p, b in zip(per_frame, base, strict=False)
                ),
                "seconds_median": statistics.median(measured.seconds),
                "seconds_min": min(measured.seconds),
                "ms_per_frame": 1e3 * statistics.median(per_frame),
                "peak_rss_bytes": measured.peak_rss,
                "seconds": measured.seconds,
            }
        )
    return rows


def document(options: argparse.Namespace, measurements: list[Measurement]) -> dict[str, Any]:
    """Everything measured, as plain data."""
    table = scaling_rows if options.scaling else engine_rows
    return {
        "what": "scaling with frames" if options.scaling else "engines",
        **circumstances(__file__, PACKAGES),
        "threads": options.threads,
        "rounds": options.rounds,
        "networks": [
            {"network": o.network, **o.facts, "rows": table(o), "left_out": o.left_out}
            for o in measurements
        ],
    }


# ---- words ----------------------------------------------------------------------------------


def number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def engine_table(rows: list[dict[str, Any]]) -> list[str]:
    head = ["engine", "times as fast as torch", "over the rounds", "median s", "least s"]
    head += ["CPU s", "peak MB", "logits off torch's"]
    lines = []
    for row in rows:
        spread = "-"
        if row["ratio_min"] is not None:
            spread = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
        pruned = row["engine"].endswith("_kgrc")
        lines.append(
            [
                row["label"],
                number(row["ratio_median"], ".2f"),
                spread,
                number(row["seconds_median"], ".3f"),
                number(row["seconds_min"], ".3f"),
                number(row["cpu_seconds_median"], ".3f"),
                number(row["peak_rss_bytes"] / 1e6, ".0f"),
                "pruned" if pruned else number(row["logits_distance"], ".1%"),
            ]
        )
    return markdown_table(head, lines)


def scaling_table(rows: list[dict[str, Any]]) -> list[str]:
    head = [
        "frames",
        "time a frame, to the shortest",
        "median s",
        "least s",
        "ms a frame",
        "peak MB",
    ]
    lines = [
        [
            str(row["frames"]),
            number(row["proportion_median"], ".2f"),
            number(row["seconds_median"], ".3f"),
            number(row["seconds_min"], ".3f"),
            number(row["ms_per_frame"], ".1f"),
            number(row["peak_rss_bytes"] / 1e6, ".0f"),
        ]
        for row in rows
    ]
    return markdown_table(head, lines)


def task_tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The time of each task, for each program of the emulation."""
    for row in rows:
        if row.get("tasks"):
            yield f"\n{row['label']}, task by task (measured, median of the rounds):\n"
            body = [
                [task["task"], f"{task['ms']:.1f}", f"{task['share']:.1%}"] for task in row["tasks"]
            ]
            total = sum(task["ms"] for task in row["tasks"])
            body.append(["all tasks", f"{total:.1f}", "100.0%"])
            yield from markdown_table(["task", "ms", "share"], body)


def markdown(doc: dict[str, Any], tasks: bool) -> str:
    """The report: tables, then the computer and the versions."""
    scaling = doc["what"] != "engines"
    lines = ["# Emulation: " + ("time by frames" if scaling else "speed next to its peers"), ""]
    lines += [
        f"Every figure is measured, on {doc['when']}, by `{doc['command']}`: "
        f"{doc['rounds']} rounds, one run of each engine a round in turn, "
        f"{doc['threads']} threads each. "
        + (
            "1.00 means: time grows in proportion to frames."
            if scaling
            else "A ratio is torch's time divided by the engine's in the same round; shown is "
            "the median. Emulation and native are timed from uint8 frames to probabilities, their "
            "peers from a tensor to logits. Peak memory counts loading too."
        ),
    ]
    for found in doc["networks"]:
        lines += ["", f"## {found['network']}", ""]
        programs = list(found.get("programs", {}).items())
        if programs and not scaling:
            clip = " x ".join(map(str, programs[0][1]["clip"]))
            macs = ", ".join(
                f"{p['macs_kept'] / 1e9:.2f} GMAC kept ({label(engine).rpartition(', ')[2]})"
                for engine, p in programs
            )
            dense = programs[0][1]["macs_dense"] / 1e9
            lines += [f"Clip {clip}, {dense:.2f} GMAC: {macs}. Weights: {found['weights']}.", ""]
        elif programs:
            part = "convolutions and pools only" if found["network"] == "c3d" else "whole network"
            lines += [f"Emulation, int8, dense, {part}. Weights: {found['weights']}.", ""]
        lines += (scaling_table if scaling else engine_table)(found["rows"])
        lines += [f"\nLeft out: {out['label']}: {out['reason']}." for out in found["left_out"]]
        if "load_average_before" in found:
            before, after = found["load_average_before"][0], found["load_average_after"][0]
            lines += [
                "",
                f"Load average of the last minute {before:.1f} before, {after:.1f} after.",
            ]
        if tasks:
            lines += task_tables(found["rows"])
    lines += where(doc)
    return "\n".join(lines) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, metavar="NAME", help=f"of {', '.join(NETWORKS)}"
    )
    parser.add_argument("--rounds", type=_positive, default=7, help="runs of each engine (7)")
    parser.add_argument("--threads", type=_positive, default=2, help="of each engine (2)")
    parser.add_argument(
        "--tasks", action="store_true", help="also show the emulation's time task by task"
    )
    parser.add_argument(
        "--csim", action="store_true", help="also time the C-simulation: some ten seconds a run"
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="time the emulation alone at several clip lengths: C3D's convolutions, or I3D",
    )
    parser.add_argument(
        "--frames",
        nargs="+",
        type=_positive,
        default=list(FRAMES),
        metavar="N",
        help=f"lengths for --scaling, multiples of 8 from 16 on ({' '.join(map(str, FRAMES))})",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the reports")
    options = parser.parse_args(arguments)
    if options.scaling:
        options.networks = options.networks or ["c3d"]
        if not set(options.networks) <= set(SCALING_NETWORKS):
            parser.error(f"--scaling takes {' and '.join(SCALING_NETWORKS)}")
        if any(frames % 8 or frames < 16 for frames in options.frames):
            parser.error("--frames takes multiples of 8, from 16 on")
    options.networks = options.networks or list(NETWORKS)
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    measurements = [
        scale_frames(network, sorted(set(options.frames)), options.rounds, options.threads)
        if options.scaling
        else compare_engines(network, options.rounds, options.threads, options.csim)
        for network in options.networks
    ]
    doc = document(options, measurements)
    text = markdown(doc, options.tasks)
    print(text)
    name = "emulation-scaling" if options.scaling else "emulation"
    write(options.out, f"{name}.json", json.dumps(doc, indent=1) + "\n")
    write(options.out, f"{name}.md", text)
    say(f"written: {options.out / name}.md and .json")
    return 0 if any(measurement.engines for measurement in measurements) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
