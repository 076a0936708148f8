"""The temperature and threshold of the program that ships, as its card says they were fitted.

On the clips that a network was trained on it is right too often to fit a temperature. Clips of
people who are neither in the training set nor in the test set do not exist here. So the training
clips are varied by twice the limits of the augmentation in training, which makes them as hard as
people who were not trained on. The test set is only measured, before and after.

    python benchmarks/confidence.py DATA PROGRAM -o OUT.kgrc
"""

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import numpy as np
import torch

from pynq_kgrc.analysis.accuracy import calibration_error
from pynq_kgrc.analysis.confidence import (
    fit_temperature,
    fit_threshold,
    negative_log_likelihood,
    video_probabilities,
)
from pynq_kgrc.compress.augment import Augmentation, varied_batches, wide_spec
from pynq_kgrc.compress.dataset import load_clips, read_index
from pynq_kgrc.graph import TRAINING_SAMPLING
from pynq_kgrc.program import load
from pynq_kgrc.recognition import sample_clips
from pynq_kgrc.runtime import Session

TIMES = 2.0
DIGITS = 2


def vary_twice() -> Augmentation:
    """Twice the limits of training; at most 0.45 of a video is cut off at each end."""
    limits = {name: TIMES * value for name, value in msgspec.structs.asdict(Augmentation()).items()}
    return Augmentation(**{**limits, "trim": min(0.45, limits["trim"])})


def varied_logits(session, videos):
    """Logits [1, classes] and label of each training clip, varied."""
    spec = session.program.clip
    mean, std = (np.reshape(v, (3, 1, 1, 1)) for v in (spec.mean, spec.std))
    with tempfile.TemporaryDirectory() as cache:
        clips = load_clips(videos, wide_spec(spec), cache)
        source = torch.Generator().manual_seed(0)
        for values, label in varied_batches(clips, spec, vary_twice(), 1, source):
            pixels = np.clip(np.rint(255 * (values[0].numpy() * std + mean)), 0, 255)
            frames = np.ascontiguousarray(pixels.astype(np.uint8).transpose(1, 2, 3, 0))
            yield session.run(frames).logits[None], int(label)


def plain_logits(session, videos):
    """Logits [windows, classes] and label of each video, sampled as the program says."""
    for sample in videos.samples:
        clips = sample_clips(session, videos.folder / sample.file)
        yield np.stack([session.run(clip.frames).logits for clip in clips]), sample.label


def measure(name, found, temperature, threshold):
    """Print how well confidences and answers agree."""
    logits, labels = zip(*found, strict=True)
    probabilities = np.stack([video_probabilities(each, temperature) for each in logits])
    confidences, right = probabilities.max(1), probabilities.argmax(1) == np.array(labels)
    below = confidences < threshold
    print(
        f"{name}, temperature {temperature:.2f}: {right.sum()} of {len(labels)} right, "
        f"negative log likelihood {negative_log_likelihood(logits, labels, temperature):.3f}, "
        f"calibration error {calibration_error(confidences, right):.1%}; "
        f"{below.sum()} below {threshold:.2f}, {right[below].sum()} of them right"
    )
    return confidences, right


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("program", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    chosen = parser.parse_args()
    program, videos = load(chosen.program), read_index(chosen.data)
    program = msgspec.structs.replace(
        program, clip=replace(program.clip, sampling=TRAINING_SAMPLING)
    )
    with Session(program) as session:
        varied = list(varied_logits(session, videos.only("train")))
        test = list(plain_logits(session, videos.only("test")))
    temperature = round(fit_temperature(*zip(*varied, strict=True)), DIGITS)
    threshold = round(fit_threshold(*measure("varied", varied, temperature, 0)), DIGITS)
    for name, found in (("varied", varied), ("test", test)):
        for each in (1.0, temperature):
            measure(name, found, each, threshold)
    clip = replace(program.clip, temperature=temperature, threshold=threshold)
    print({key: value for key, value in asdict(clip).items() if key not in ("mean", "std")})
    msgspec.structs.replace(program, clip=clip).save(chosen.out)


if __name__ == "__main__":
    main()
