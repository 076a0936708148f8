"""How fast the emulation is, next to torch, ONNX Runtime and OpenVINO on the same computer.

Every engine lives in a process of its own, loads its network and warms up. Then they take turns,
one run each a round, so that whatever else the computer does falls on all of them alike. The
figure to trust is the median over the rounds of torch's time divided by the engine's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reports import ROOT, circumstances, markdown_table, version, where, write

# What an engine needs is imported in its own process, so that its memory is its own.

RESULTS = Path(__file__).resolve().parent / "results"
NETWORKS = ("c3d", "r2plus1d_18", "i3d")
SCALING_NETWORKS = ("c3d", "i3d")
WITH_RECIPE = ("c3d", "r2plus1d_18")
FRAMES = (16, 32, 64, 128)
DESIGN = "8-sparse"
BASE = "torch"

LABELS = {
    "emulation": "pynq_kgrc emulation, int8, dense",
    "emulation_kgrc": "pynq_kgrc emulation, int8, KGRC recipe",
    "csim_kgrc": "pynq_kgrc C-simulation, int8, KGRC recipe",
    "torch": "torch eager, fp32",
    "ort_fp32": "ONNX Runtime, fp32",
    "ort_int8": "ONNX Runtime, int8 (QDQ, static)",
    "openvino_int8": "OpenVINO, int8 (same QDQ file)",
}
PACKAGES = ("pynq_kgrc", "numpy", "torch", "onnx", "onnxruntime", "openvino")

PREPARE_SECONDS, LOAD_SECONDS, RUN_SECONDS = 3600, 900, 600
PAUSE = 0.2
"""Seconds between two runs: idle threads of the last engine stop spinning."""

EPILOG = f"""\
examples:
  python benchmarks/emulation.py
      all networks, 7 rounds; writes {RESULTS.relative_to(ROOT)}/emulation.md and emulation.json
  python benchmarks/emulation.py --networks c3d --rounds 3 --tasks --out /tmp/c3d
      a quick look at one network, and where its time goes, task by task
  python benchmarks/emulation.py --scaling --networks i3d
      does time grow in proportion to frames? I3D at {", ".join(map(str, FRAMES))} frames

how to read it:
  A ratio of 2 means: twice as fast as torch eager in fp32 on the same threads. Ratios hold on a
  busy computer, seconds do not: look at the load average that is written down with them.
  The emulation is timed from uint8 frames to labels; its peers from a prepared tensor to logits.

what is kept:
  Compiled programs and ONNX files lie in ~/.cache/pynq_kgrc/bench (or $XDG_CACHE_HOME), by a
  digest of the code that made them. C3D takes about 0.6 GB there. Delete the folder at any time.
"""


# ---- in a worker process --------------------------------------------------------------------


def work(job: dict[str, Any]) -> None:
    """Load an engine, warm it up, then run once for each line of stdin; answers are JSON lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not an answer

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        run = ENGINES[job["engine"]](job)
        for _ in range(job.get("warm", 0)):
            run()
        say(ready=run())
        for _ in sys.stdin:
            cpu, start = cpu_seconds(), time.perf_counter()
            result = run()
            seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
            say(seconds=seconds, cpu=cpu, peak_rss=peak_rss(), tasks=result.get("tasks"))
    except Exception as error:  # any engine may fail in its own way; the parent goes on without it
        first = (str(error).strip() or "no message").splitlines()[0]
        say(error=f"{type(error).__name__}: {first}")


def cpu_seconds() -> float:
    """Of this process and of those it forked, which share its work."""
    total = time.process_time()
    for child in children():
        with suppress(OSError):  # it has just ended
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def peak_rss() -> int:
    """Bytes: this process at its peak, and what those it forked do not share with it now.

    The kernel's mark of this very program: getrusage also counts the parent's.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    for child in children():
        with suppress(OSError):
            for line in Path(f"/proc/{child}/smaps_rollup").read_text().splitlines():
                peak += int(line.split()[1]) << 10 if line.startswith("Private_") else 0
    return peak


def children() -> list[str]:
    """The processes that this one has forked."""
    with suppress(OSError):
        lists = Path("/proc/self/task").glob("*/children")
        return [child for file in lists for child in file.read_text().split()]
    return []


Result = dict[str, Any]
Run = Callable[[], Result]


def run_emulation(job: dict[str, Any]) -> Run:
    """The emulation, or the C-simulation: frames in, labels out."""
    from pynq_kgrc.backends.csim import CSimulation
    from pynq_kgrc.backends.emulation.backend import Emulation
    from pynq_kgrc.program import load
    from pynq_kgrc.runtime import Session

    program = load(job["program"])
    simulates = job["engine"].startswith("csim")
    config, cores = program.config, job["threads"]
    session = Session(program, CSimulation(config) if simulates else Emulation(config, cores))
    frames = noise(program.clip)

    def run() -> Result:
        scores = session.run(frames)
        tasks = [(task.task, task.seconds) for task in scores.layers]
        return {"tasks": tasks, "logits": scores.logits.tolist()}

    return run


def run_torch(job: dict[str, Any]) -> Run:
    """The network as it was written, in eager mode."""
    import torch

    torch.set_num_threads(job["threads"])
    network, clip = build(job["network"], job["weights"])
    values = torch.from_numpy(clip.normalise(noise(clip)))[None]

    def run() -> Result:
        with torch.inference_mode():
            return {"logits": network(values).ravel().tolist()}

    return run


def run_onnxruntime(job: dict[str, Any]) -> Run:
    """An ONNX file on ONNX Runtime's CPU kernels."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    options.add_session_config_entry("session.force_spinning_stop", "1")  # not in others' turns
    session = ort.InferenceSession(job["onnx"], options, ["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: onnx_input(job)}
    return lambda: {"logits": session.run(None, feed)[0].ravel().tolist()}


def run_openvino(job: dict[str, Any]) -> Run:
    """An ONNX file compiled by OpenVINO for the CPU."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": job["threads"], "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(job["onnx"], "CPU", settings).create_infer_request()
    values = onnx_input(job)
    return lambda: {"logits": request.infer([values])[0].ravel().tolist()}


def onnx_input(job: dict[str, Any]) -> Any:
    """The same clip for every peer [1, 3, D, H, W]."""
    clip = clip_spec(job["network"])
    return clip.normalise(noise(clip))[None]


def prepare_programs(job: dict[str, Any]) -> Run:
    """Compile the network, dense and by the paper's recipe if it has one."""
    from pynq_kgrc.compiler.network import compile_graph
    from pynq_kgrc.compress.patterns import recipe

    network = job["network"]
    wanted = {"emulation": {}}
    if network in WITH_RECIPE:
        wanted["emulation_kgrc"] = recipe(network, "kgrc")
    missing = {e: rates for e, rates in wanted.items() if not Path(job[e]).exists()}
    if missing:
        from pynq_kgrc.accelerator.config import preset
        from pynq_kgrc.models.trace import trace

        module, clip = build(network, job["weights"])
        graph = trace(module, clip, name=network)
        for engine, rates in missing.items():
            compile_graph(graph, [noise(clip)], preset(DESIGN), rates, "minmax").save(job[engine])
    return lambda: {"programs": {engine: describe(job[engine]) for engine in wanted}}


def describe(path: str) -> dict[str, Any]:
    """What a program asks of an engine."""
    from pynq_kgrc.program import ConvTask, load

    program = load(path)
    convolutions = [task for task in program.tasks if isinstance(task, ConvTask)]
    clip = program.clip
    return {
        "clip": [clip.frames, clip.height, clip.width],
        "macs_dense": sum(task.shape.macs for task in convolutions),
        "macs_kept": sum(task.kept_macs for task in convolutions),
    }


def prepare_onnx(job: dict[str, Any]) -> Run:
    """Write the float network as ONNX."""
    path = Path(job["onnx"])
    if not path.exists():
        from export_onnx import export

        from pynq_kgrc.models.trace import trace

        module, clip = build(job["network"], job["weights"])
        export(trace(module, clip, name=job["network"]), path)
    return dict


def prepare_int8(job: dict[str, Any]) -> Run:
    """Quantize the ONNX file: QDQ, static, u8 activations, s8 weights for each channel."""
    path = Path(job["int8"])
    if not path.exists():
        from onnxruntime.quantization import (
            CalibrationDataReader,
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )

        clip = clip_spec(job["network"])

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                clips = [clip.normalise(noise(clip, seed))[None] for seed in (0, 1)]
                self.feeds = iter([{"clip": values} for values in clips])

            def get_next(self) -> dict[str, Any] | None:
                return next(self.feeds, None)

        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            beside = Path(scratch) / path.name
            quantize_static(
                job["onnx"],
                beside,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
            beside.replace(path)
    return dict


def prepare_weights(job: dict[str, Any]) -> Run:
    """Published weights if there are any and they can be had; else say why not."""
    if job["network"] != "i3d":
        return lambda: {"weights": "", "words": "seeded random"}
    from pynq_kgrc.errors import ModelError
    from pynq_kgrc.models.pretrained import pull

    try:
        path = pull("i3d-kinetics400")
    except ModelError as error:
        words = f"seeded random, the published ones cannot be had: {error}"
        return lambda: {"weights": "", "words": words}
    return lambda: {"weights": str(path), "words": "published (Kinetics-400)"}


def prepare_frames(job: dict[str, Any]) -> Run:
    """Compile a network for clips of several lengths, all with the formats of the shortest."""
    programs: dict[str, str] = job["programs"]
    if not all(Path(path).exists() for path in programs.values()):
        from pynq_kgrc.accelerator.config import preset
        from pynq_kgrc.compiler.lower import lower
        from pynq_kgrc.compress.calibrate import choose_quant
        from pynq_kgrc.models.trace import trace

        module, clip = build(job["network"], job["weights"])
        module = convolutions_of_c3d(module) if job["network"] == "c3d" else module
        formats: dict[str, Any] = {}
        for frames, path in sorted(programs.items(), key=lambda item: int(item[0])):
            spec = replace(clip, frames=int(frames))
            graph = trace(module, spec, name=job["network"])
            if not formats:
                graph = choose_quant(graph, [spec.normalise(noise(spec))], 8, "minmax")
                formats = {layer.name: layer for layer in graph.layers}
            layers = tuple(
                replace(
                    layer,
                    out_quant=formats[layer.name].out_quant,
                    weight_quant=formats[layer.name].weight_quant,
                )
                for layer in graph.layers
            )
            lower(replace(graph, layers=layers), preset(DESIGN)).save(path)
    return lambda: {"programs": {frames: describe(path) for frames, path in programs.items()}}


def convolutions_of_c3d(network: Any) -> Any:
    """C3D up to its last pool: its fully connected layers fix the length of the clip."""
    from torch import nn

    relu = nn.ReLU()
    parts = [network.conv1, relu, network.pool1, network.conv2, relu, network.pool2]
    parts += [network.conv3a, relu, network.conv3b, relu, network.pool3]
    parts += [network.conv4a, relu, network.conv4b, relu, network.pool4]
    parts += [network.conv5a, relu, network.conv5b, relu, network.pool5]
    return nn.Sequential(*parts).eval()


def network_module(network: str) -> tuple[Any, str]:
    """The module of a network, and the name of the function there that builds it."""
    from importlib import import_module

    from pynq_kgrc.models import NETWORKS as PLACES

    place, function = PLACES[network]
    return import_module(place), function


def clip_spec(network: str) -> Any:
    return network_module(network)[0].CLIP


def build(network: str, weights: str) -> tuple[Any, Any]:
    """The torch network, ready to infer, and its clip."""
    import torch

    from pynq_kgrc.models.checkpoint import load_state

    module, function = network_module(network)
    torch.manual_seed(0)
    made = getattr(module, function)()
    if weights:
        load_state(made, weights)
    return made.eval(), module.CLIP


def noise(clip: Any, seed: int = 0) -> Any:
    """Frames of seeded noise, coarse enough to pass through convolutions."""
    import numpy as np

    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (clip.frames, clip.height // 8, clip.width // 8, 3), np.uint8)
    return small.repeat(8, 1).repeat(8, 2)


ENGINES: dict[str, Callable[[dict[str, Any]], Run]] = {
    "emulation": run_emulation,
    "emulation_kgrc": run_emulation,
    "csim_kgrc": run_emulation,
    "torch": run_torch,
    "ort_fp32": run_onnxruntime,
    "ort_int8": run_onnxruntime,
    "openvino_int8": run_openvino,
    "prepare_weights": prepare_weights,
    "prepare_programs": prepare_programs,
    "prepare_onnx": prepare_onnx,
    "prepare_int8": prepare_int8,
    "prepare_frames": prepare_frames,
}


# ---- in the parent --------------------------------------------------------------------------


class EngineError(Exception):
    """An engine that does not load, fails, or takes too long; the message says which."""


class Worker:
    """An engine in a process of its own."""

    def __init__(self, job: dict[str, Any], seconds: float) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the worker
        command = [sys.executable, __file__, "--worker", json.dumps(job)]
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
        """One run; its answer."""
        try:
            self.process.stdin.write(b"run\n")
        except OSError:
            raise EngineError(f"its process has ended; {self._last_words()}") from None
        return self._answer(RUN_SECONDS)

    def _answer(self, seconds: float) -> Result:
        found, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not found:
            raise EngineError(f"no answer in {seconds:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise EngineError(f"its process ended with status {status}; {self._last_words()}")
        answer: Result = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

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
class Measured:
    """What was measured of one engine; lists hold one entry a round."""

    engine: str
    label: str
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    tasks: list[list[tuple[str, float]]] = field(default_factory=list)
    peak_rss: int = 0
    logits: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """The measured engines of one network, and those that were left out, with the reason."""

    network: str
    facts: dict[str, Any]
    engines: list[Measured] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def leave_out(self, engine: str, reason: object) -> None:
        self.left_out.append({"engine": engine, "label": label(engine), "reason": str(reason)})
        say(f"  {label(engine)}: left out, {reason}")


def label(engine: str) -> str:
    return LABELS.get(engine, engine)


def say(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def once(job: dict[str, Any]) -> Result:
    """Do a piece of preparation in a process of its own; its result."""
    worker = Worker(job, PREPARE_SECONDS)
    worker.close()
    return worker.ready


def interleave(outcome: Outcome, jobs: dict[str, dict[str, Any]], rounds: int) -> None:
    """Start an engine for each job and let them take turns."""
    from tqdm import tqdm

    with ExitStack() as stack:
        live: dict[str, tuple[Worker, Measured]] = {}
        for name, job in tqdm(jobs.items(), "load", disable=None, leave=False):
            try:
                worker = Worker(job, LOAD_SECONDS)
            except EngineError as error:
                outcome.leave_out(name, error)
                continue
            stack.callback(worker.close)
            measured = Measured(name, label(name), logits=worker.ready.get("logits", []))
            live[name] = worker, measured
        bar = tqdm(total=rounds * len(live), desc=outcome.network, disable=None, leave=False)
        outcome.facts["load_average_before"] = os.getloadavg()
        for turn in range(rounds):
            names = list(live)
            first = turn % max(1, len(names))
            for name in names[first:] + names[:first]:  # nobody always follows the same one
                worker, measured = live[name]
                time.sleep(PAUSE)
                try:
                    answer = worker.run()
                except EngineError as error:
                    outcome.leave_out(name, error)
                    del live[name]
                    continue
                measured.seconds.append(answer["seconds"])
                measured.cpu.append(answer["cpu"])
                measured.peak_rss = answer["peak_rss"]
                if answer["tasks"]:
                    measured.tasks.append(answer["tasks"])
                bar.update()
        bar.close()
        outcome.facts["load_average_after"] = os.getloadavg()
        outcome.engines = [measured for _, measured in live.values()]


def compare_engines(network: str, rounds: int, threads: int, simulate: bool) -> Outcome:
    """One network on all engines."""
    say(f"{network}: preparing (minutes on the first call)")
    folder = cache_folder()
    outcome = Outcome(network, {})
    common = {"network": network, "threads": threads, "warm": 1}
    held = once({"engine": "prepare_weights", "network": network})
    outcome.facts["weights"] = held["words"]
    common["weights"] = held["weights"]
    stem = f"{network}-{'published' if held['weights'] else 'random'}"
    files = {
        "emulation": str(folder / f"{stem}-dense.kgrc"),
        "emulation_kgrc": str(folder / f"{stem}-kgrc.kgrc"),
        "onnx": str(folder / f"{stem}.onnx"),
        "int8": str(folder / f"{stem}-int8-ort{version('onnxruntime')}.onnx"),
    }
    jobs: dict[str, dict[str, Any]] = {"torch": {**common, "engine": "torch"}}
    try:
        made = once({**common, **files, "engine": "prepare_programs", "warm": 0})
        outcome.facts["programs"] = made["programs"]
        for engine in made["programs"]:
            jobs[engine] = {**common, "engine": engine, "program": files[engine]}
        if simulate and "emulation_kgrc" in jobs:
            jobs["csim_kgrc"] = {**jobs["emulation_kgrc"], "engine": "csim_kgrc"}
    except EngineError as error:
        outcome.leave_out("emulation", error)
    try:
        once({**common, **files, "engine": "prepare_onnx", "warm": 0})
        jobs["ort_fp32"] = {**common, "engine": "ort_fp32", "onnx": files["onnx"]}
        once({**common, **files, "engine": "prepare_int8", "warm": 0})
        for engine in ("ort_int8", "openvino_int8"):
            jobs[engine] = {**common, "engine": engine, "onnx": files["int8"]}
    except EngineError as error:
        for engine in ("ort_fp32", "ort_int8", "openvino_int8"):
            if engine not in jobs:
                outcome.leave_out(engine, error)
    interleave(outcome, jobs, rounds)
    return outcome


def scale_frames(network: str, frames: list[int], rounds: int, threads: int) -> Outcome:
    """The emulation of one network at several lengths of the clip."""
    say(f"{network}: preparing {', '.join(map(str, frames))} frames")
    folder = cache_folder()
    held = once({"engine": "prepare_weights", "network": network})
    key = "-".join(map(str, sorted(frames)))
    programs = {str(f): str(folder / f"{network}-scaling-{key}" / f"{f}.kgrc") for f in frames}
    outcome = Outcome(network, {"weights": held["words"]})
    common = {"network": network, "threads": threads, "weights": held["weights"]}
    try:
        made = once({**common, "engine": "prepare_frames", "programs": programs})
    except EngineError as error:
        outcome.leave_out("emulation", error)
        return outcome
    outcome.facts["programs"] = made["programs"]
    jobs = {
        name: {**common, "engine": "emulation", "program": path, "warm": 1}
        for name, path in programs.items()
    }
    interleave(outcome, jobs, rounds)
    return outcome


def cache_folder() -> Path:
    """Where programs and ONNX files of this very code are kept; those of old code go."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    sources = [Path(__file__), Path(__file__).with_name("export_onnx.py")]
    package = ROOT / "pynq_kgrc"
    for place in ("models", "compress", "compiler", "accelerator"):
        sources += sorted((package / place).glob("*.py"))
    sources += [package / f"{name}.py" for name in ("graph", "groups", "program", "quant")]
    state = hashlib.sha256()
    for source in sources:
        state.update(source.read_bytes())
    base = home / "pynq_kgrc" / "bench"
    folder = base / state.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    a_day_ago = time.time() - 86400
    for old in base.iterdir():
        if old.is_dir() and old != folder and old.stat().st_mtime < a_day_ago:
            import shutil

            shutil.rmtree(old, ignore_errors=True)
    return folder


# ---- figures --------------------------------------------------------------------------------


def ratios(base: Measured | None, engine: Measured) -> list[float]:
    """How many times as fast as the base, in each round."""
    if base is None:
        return []
    return [b / e for b, e in zip(base.seconds, engine.seconds, strict=False)]


def distance(base: Measured | None, engine: Measured) -> float | None:
    """Relative L2 distance of the logits to those of the base: did both run the same network?"""
    if base is None or len(base.logits) != len(engine.logits):
        return None
    norm = math.hypot(*base.logits)
    return math.dist(base.logits, engine.logits) / norm if norm else None


def engine_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """The table of one network, the fastest first."""
    base = next((m for m in outcome.engines if m.engine == BASE), None)
    rows = []
    for measured in outcome.engines:
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


def task_rows(measured: Measured) -> list[dict[str, Any]]:
    """Median time of each task and its share."""
    if not measured.tasks:
        return []
    names = [name for name, _ in measured.tasks[0]]
    times = [statistics.median(run[i][1] for run in measured.tasks) for i, _ in enumerate(names)]
    total = sum(times)
    return [
        {"task": name, "ms": 1e3 * seconds, "share": seconds / total}
        for name, seconds in zip(names, times, strict=True)
    ]


def scaling_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Time by frames; 1 means exactly in proportion to the shortest clip."""
    rows = []
    ordered = sorted(outcome.engines, key=lambda m: int(m.engine))
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


def document(options: argparse.Namespace, outcomes: list[Outcome]) -> dict[str, Any]:
    """Everything measured, as plain data."""
    table = scaling_rows if options.scaling else engine_rows
    return {
        "what": "scaling with frames" if options.scaling else "engines",
        **circumstances(__file__, PACKAGES),
        "threads": options.threads,
        "rounds": options.rounds,
        "networks": [
            {"network": o.network, **o.facts, "rows": table(o), "left_out": o.left_out}
            for o in outcomes
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
    """Where the time of the emulation goes, for each of its programs."""
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
    """The report: tables first, then what is needed to repeat it."""
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
            "the median. The emulation is timed from uint8 frames to labels, its peers from a "
            "tensor to logits. Peak memory counts loading too."
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
    outcomes = [
        scale_frames(network, sorted(set(options.frames)), options.rounds, options.threads)
        if options.scaling
        else compare_engines(network, options.rounds, options.threads, options.csim)
        for network in options.networks
    ]
    doc = document(options, outcomes)
    text = markdown(doc, options.tasks)
    print(text)
    name = "emulation-scaling" if options.scaling else "emulation"
    write(options.out, f"{name}.json", json.dumps(doc, indent=1) + "\n")
    write(options.out, f"{name}.md", text)
    say(f"written: {options.out / name}.md and .json")
    return 0 if any(outcome.engines for outcome in outcomes) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
    else:
        sys.exit(main(sys.argv[1:]))
