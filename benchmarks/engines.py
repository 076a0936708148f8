"""The engines that `emulation.py` compares: load one, then run it when told to.

`python engines.py JOB`, with JOB in JSON, is one engine in a process of its own, or one step of
preparation (compile, export, quantize). An engine's packages are imported in its own functions, so
that its memory holds nothing of the others.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

NETWORKS = ("c3d", "r2plus1d_18", "i3d")
WITH_RECIPE = ("c3d", "r2plus1d_18")
"""Networks for which the paper has pruning rates."""
DESIGN = "8-sparse"

Result = dict[str, Any]
"""What a run returns: `logits`, and `tasks` with the seconds of each; or facts of a preparation."""

Run = Callable[[], Result]


def work(job: dict[str, Any]) -> None:
    """Load an engine, warm it up, then run once for each line of stdin; answers are JSON lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print to stdout goes to stderr, not among the answers

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
    except Exception as error:  # each engine has errors of its own; the parent goes on without it
        first = (str(error).strip() or "no message").splitlines()[0]
        say(error=f"{type(error).__name__}: {first}")


def cpu_seconds() -> float:
    """Processor time of this process and of its children, which share its work."""
    total = time.process_time()
    for child in children():
        with suppress(OSError):  # the child has just ended
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def peak_rss() -> int:
    """Peak memory of this process in bytes, and the private memory that its children have now.

    VmHWM starts at exec; ru_maxrss of getrusage would include the parent's peak before it.
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
    """Process ids of the children of this process."""
    with suppress(OSError):
        lists = Path("/proc/self/task").glob("*/children")
        return [child for file in lists for child in file.read_text().split()]
    return []


def run_emulation(job: dict[str, Any]) -> Run:
    """A backend of this package, from frames to logits and probabilities."""
    from pynq_kgrc.backends.csim import CSimulation
    from pynq_kgrc.backends.emulation.backend import Emulation
    from pynq_kgrc.backends.native.backend import Native
    from pynq_kgrc.program import load
    from pynq_kgrc.runtime import Session

    program = load(job["program"])
    config, cores = program.config, job["threads"]
    kinds = {
        "emulation": lambda: Emulation(config, cores),
        "native": lambda: Native(config, cores),
        "csim": lambda: CSimulation(config),
    }
    session = Session(program, kinds[job["engine"].partition("_")[0]]())
    frames = noise(program.clip)

    def run() -> Result:
        scores = session.run(frames)
        tasks = [(task.task, task.seconds) for task in scores.layers]
        return {"tasks": tasks, "logits": scores.logits.tolist()}

    return run


def run_torch(job: dict[str, Any]) -> Run:
    """The original network in torch's eager mode."""
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
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # else its threads spin during the others' turns
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
    """The clip that every engine gets, normalised [1, 3, D, H, W]."""
    clip = clip_spec(job["network"])
    return clip.normalise(noise(clip))[None]


def prepare_programs(job: dict[str, Any]) -> Run:
    """Compile the network: dense, and pruned by the paper's recipe if there is one."""
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
    """Size of the clip and MACs of a program."""
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
    """Quantize the ONNX file: QDQ, static, uint8 activations, int8 weights, a scale per channel."""
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

        class NoiseClips(CalibrationDataReader):  # type: ignore[misc]
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
                NoiseClips(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
            beside.replace(path)
    return dict


def prepare_weights(job: dict[str, Any]) -> Run:
    """Download published weights if there are any; else, or if that fails, say why not."""
    if job["network"] != "i3d":
        return lambda: {"weights": "", "origin": "seeded random"}
    from pynq_kgrc.errors import ModelError
    from pynq_kgrc.models.pretrained import pull

    try:
        path = pull("i3d-kinetics400")
    except ModelError as error:
        origin = f"seeded random, the published ones cannot be had: {error}"
        return lambda: {"weights": "", "origin": origin}
    return lambda: {"weights": str(path), "origin": "published (Kinetics-400)"}


def prepare_frames(job: dict[str, Any]) -> Run:
    """Compile a network for several clip lengths, all with the number formats of the shortest."""
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
    """C3D up to its last pool: the fully connected layers after it take one clip length only."""
    from torch import nn

    relu = nn.ReLU()
    parts = [network.conv1, relu, network.pool1, network.conv2, relu, network.pool2]
    parts += [network.conv3a, relu, network.conv3b, relu, network.pool3]
    parts += [network.conv4a, relu, network.conv4b, relu, network.pool4]
    parts += [network.conv5a, relu, network.conv5b, relu, network.pool5]
    return nn.Sequential(*parts).eval()


def network_module(network: str) -> tuple[Any, str]:
    """The Python module of a network and the name of its function that builds the network."""
    from pynq_kgrc.models import NETWORKS as PLACES

    place, function = PLACES[network]
    return import_module(place), function


def clip_spec(network: str) -> Any:
    return network_module(network)[0].CLIP


def build(network: str, weights: str) -> tuple[Any, Any]:
    """The torch network in eval mode, and its clip."""
    import torch

    from pynq_kgrc.models.checkpoint import load_state

    module, function = network_module(network)
    torch.manual_seed(0)
    made = getattr(module, function)()
    if weights:
        load_state(made, weights)
    return made.eval(), module.CLIP


def noise(clip: Any, seed: int = 0) -> Any:
    """Frames of seeded noise, in squares of 8 x 8 pixels: convolutions average out finer noise."""
    import numpy as np

    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (clip.frames, clip.height // 8, clip.width // 8, 3), np.uint8)
    return small.repeat(8, 1).repeat(8, 2)


ENGINES: dict[str, Callable[[dict[str, Any]], Run]] = {
    "emulation": run_emulation,
    "emulation_kgrc": run_emulation,
    "native": run_emulation,
    "native_kgrc": run_emulation,
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


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
