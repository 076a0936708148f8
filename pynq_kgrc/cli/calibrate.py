"""The command that makes a program's confidences mean something: calibrate."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pynq_kgrc.cli.arguments import Declare, add_backend, progress
from pynq_kgrc.errors import ConfigError


def declare(command: Declare) -> None:
    """Add this file's command."""
    calibrate = command(
        "calibrate",
        run_calibrate,
        "fit a program's temperature and its threshold for unsure answers",
        "The videos of a data folder (see train) are sampled as the program says and run. The\n"
        "temperature, by which the logits are divided before soft-max, minimises the negative log\n"
        "likelihood of their labels (Guo et al., ICML 2017). Below the threshold fewer than\n"
        "--share of the answers are right. Both are written into OUT; weights and answers stay.\n"
        "Use videos that the network was not trained on: on others it is right too often.",
    )
    calibrate.add_argument("program", type=Path, metavar="PROGRAM", help="a compiled .kgrc")
    calibrate.add_argument("--data", type=Path, required=True, help="folder with index.csv")
    calibrate.add_argument("--split", required=True, help="which videos of the index")
    calibrate.add_argument("-o", "--out", type=Path, required=True, help="program to write")
    calibrate.add_argument(
        "--share",
        type=float,
        default=0.5,
        help="of the answers below the threshold, fewer than this share are right (default: 0.5)",
    )
    add_backend(calibrate)


def run_calibrate(options: argparse.Namespace) -> int:
    from dataclasses import replace

    import msgspec
    import numpy as np

    from pynq_kgrc.analysis.confidence import fit_temperature, fit_threshold
    from pynq_kgrc.compress.dataset import read_index
    from pynq_kgrc.program import load
    from pynq_kgrc.recognition import sample_clips
    from pynq_kgrc.runtime import Session

    if not 0 <= options.share <= 1:
        raise ConfigError(f"--share {options.share}; accepted is 0 to 1")
    program = load(options.program)
    videos = read_index(options.data).only(options.split)
    classes = program.tasks[-1].shape.out_channels
    names = program.labels or tuple(map(str, range(classes)))
    videos = videos.named_by(names, str(options.program))
    logits, labels = [], [sample.label for sample in videos.samples]
    with Session(program, options.backend) as session:
        for sample in progress(videos.samples, "calibrate", len(labels)):
            clips = sample_clips(session, videos.folder / sample.file)
            runs = session.run_many(clips, lambda clip: clip.frames)
            logits.append(np.stack([scores.logits for _, scores in runs]))
    temperature = fit_temperature(logits, labels)
    before = _measure(logits, labels, program.clip.temperature)
    after = _measure(logits, labels, temperature)
    threshold = fit_threshold(after["confidences"], after["right"], options.share)
    clip = replace(program.clip, temperature=temperature, threshold=threshold)
    msgspec.structs.replace(program, clip=clip).save(options.out)
    below = after["confidences"] < threshold
    found = {
        "program": program.name,
        "split": options.split,
        "videos": len(labels),
        "right": int(after["right"].sum()),
        "temperature": temperature,
        "threshold": threshold,
        "unsure": int(below.sum()),
        "unsure_right": int(after["right"][below].sum()),
        **{f"{name}_before": before[name] for name in MEASURES},
        **{f"{name}_after": after[name] for name in MEASURES},
        "path": str(options.out),
    }
    print(json.dumps(found, indent=2) if options.json else _text(found))
    return 0


MEASURES = ("negative_log_likelihood", "calibration_error")


def _measure(logits: list[Any], labels: list[int], temperature: float) -> dict[str, Any]:
    """Confidences [N], whether each is right [N], and how well both agree."""
    import numpy as np

    from pynq_kgrc.analysis.accuracy import calibration_error
    from pynq_kgrc.analysis.confidence import negative_log_likelihood, video_probabilities

    probabilities = np.stack([video_probabilities(each, temperature) for each in logits])
    confidences = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == np.array(labels)
    return {
        "confidences": confidences,
        "right": right,
        "negative_log_likelihood": negative_log_likelihood(logits, labels, temperature),
        "calibration_error": calibration_error(confidences, right),
    }


def _text(found: dict[str, Any]) -> str:
    right, videos = found["right"], found["videos"]
    return (
        f"{found['program']}: right on {right} of {videos} videos of {found['split']!r} "
        f"({right / videos:.1%})\n"
        f"temperature {found['temperature']:.3f}: negative log likelihood "
        f"{found['negative_log_likelihood_before']:.3f} before, "
        f"{found['negative_log_likelihood_after']:.3f} after; expected calibration error "
        f"{found['calibration_error_before']:.1%} before, "
        f"{found['calibration_error_after']:.1%} after\n"
        f"threshold {found['threshold']:.3f}: {found['unsure']} videos are below it, "
        f"{found['unsure_right']} of them right\n"
        f"written to {found['path']}"
    )
