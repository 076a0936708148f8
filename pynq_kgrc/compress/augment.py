"""Batches of clips: augmented ones to train on, plain ones to test on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pynq_kgrc.compress.dataset import Clips
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.quant import Array


class Augmentation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of the random changes of a training clip; each is drawn from -limit to +limit."""

    shift: float = 0.08
    """Translation, as a fraction of the frame."""
    scale: float = 0.12
    """Zoom, as a fraction."""
    stretch: float = 0.06
    """Aspect ratio: the width grows by this fraction, the height shrinks by it."""
    degrees: float = 8.0
    """Rotation."""
    gain: float = 0.15
    """Contrast: pixels are multiplied by 1 + gain."""
    offset: float = 0.1
    """Brightness, added to every pixel that is not 0: in depth videos 0 means unknown."""
    trim: float = 0.12
    """Largest fraction of the video that is cut off at each end; this also varies the speed."""
    erase: float = 0.3
    """Probability that a box is set to black (random erasing)."""


PLAIN = Augmentation(0, 0, 0, 0, 0, 0, 0, 0)


def wide_spec(spec: ClipSpec) -> ClipSpec:
    """The clip to decode for training: twice the frames, and an eighth more on each axis.

    A video of fewer frames is repeated from its start, as in `load_clip`.
    """
    return replace(
        spec,
        frames=2 * spec.frames,
        height=spec.height + spec.height // 8,
        width=spec.width + spec.width // 8,
        short_side=spec.short_side + spec.short_side // 8,
    )


def normalise(pixels: Tensor, spec: ClipSpec) -> Tensor:
    """[N, 3, D, H, W] pixels of 0..1 as the network's input values."""
    mean = torch.tensor(spec.mean).view(1, 3, 1, 1, 1)
    std = torch.tensor(spec.std).view(1, 3, 1, 1, 1)
    return (pixels - mean) / std


def plain_batches(clips: Clips, spec: ClipSpec, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Input values [N, 3, D, H, W] and labels [N] of clips decoded at `spec`, in order."""
    for start in range(0, len(clips), size):
        part = slice(start, start + size)
        pixels = torch.from_numpy(np.array(clips.frames[part])).permute(0, 4, 1, 2, 3)
        yield normalise(pixels.float() / 255, spec), torch.from_numpy(clips.labels[part])


def varied_batches(
    clips: Clips,
    spec: ClipSpec,
    vary: Augmentation,
    size: int,
    generator: torch.Generator,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of augmented clips in random order; an incomplete last batch is dropped.

    Args:
        clips: decoded at `wide_spec(spec)`.
        spec: the clip that the network takes.
        vary: limits of the random changes.
        size: clips in a batch, over all processes.
        generator: source of all random numbers: the same seed gives the same epoch.
        share: rank and number of processes; each takes its part of every batch.
    """
    order = torch.randperm(len(clips), generator=generator)
    rank, world = share
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        draws = torch.rand((size, 12 + spec.frames), generator=generator)
        chosen, draws = chosen[rank::world], draws[rank::world]
        yield (
            _vary(clips, spec, vary, chosen, draws),
            torch.from_numpy(clips.labels[chosen.numpy()]),
        )


def calibration_clips(clips: Clips, spec: ClipSpec, count: int = 32) -> list[Array]:
    """Up to `count` training clips [3, D, H, W] as input values, drawn with a fixed seed.

    Nothing but their order is random: they are not augmented.
    """
    size = min(count, len(clips))
    batches = varied_batches(clips, spec, PLAIN, size, torch.Generator().manual_seed(0))
    values, _ = next(iter(batches))
    return [clip.numpy() for clip in values]


def _vary(
    clips: Clips, spec: ClipSpec, vary: Augmentation, chosen: Tensor, draws: Tensor
) -> Tensor:
    """Input values [N, 3, D, H, W]; `draws` [N, 12 + D] are uniform in 0..1."""
    count, frames = len(chosen), spec.frames
    available = clips.frames.shape[1]
    times = _times(draws[:, 12:], draws[:, 0:2] * vary.trim, available, vary.trim > 0)
    picked = np.stack(
        [
            clips.frames[clip][time]
            for clip, time in zip(chosen.tolist(), times.numpy(), strict=True)
        ]
    )
    pixels = torch.from_numpy(picked).permute(0, 1, 4, 2, 3).flatten(0, 1).float() / 255
    signed = draws * 2 - 1
    grid = F.affine_grid(
        _placement(signed[:, 2:7], vary, spec, clips).repeat_interleave(frames, 0),
        [count * frames, 3, spec.height, spec.width],
        align_corners=False,
    )
    pixels = F.grid_sample(pixels, grid, mode="bilinear", align_corners=False)
    pixels = pixels.view(count, frames, 3, spec.height, spec.width).transpose(1, 2)
    gain = (1 + signed[:, 7] * vary.gain).view(-1, 1, 1, 1, 1)
    offset = (signed[:, 8] * vary.offset).view(-1, 1, 1, 1, 1)
    pixels = (pixels * gain + offset * (pixels > 0)).clamp_(0, 1)
    for i in torch.nonzero(draws[:, 9] < vary.erase).flatten().tolist():
        top, left = int(draws[i, 10] * spec.height), int(draws[i, 11] * spec.width)
        pixels[i, :, :, top : top + spec.height // 4, left : left + spec.width // 4] = 0
    return normalise(pixels, spec)


def _times(jitter: Tensor, trims: Tensor, available: int, jitters: bool) -> Tensor:
    """Frame numbers [N, D], increasing: one of each of D equal parts of the trimmed video."""
    frames = jitter.shape[1]
    first, last = trims[:, :1] * available, (1 - trims[:, 1:2]) * available
    within = jitter if jitters else torch.full_like(jitter, 0.5)
    places = first + (last - first) * (torch.arange(frames) + within) / frames
    return places.long().clamp_(0, available - 1)


def _placement(signed: Tensor, vary: Augmentation, spec: ClipSpec, clips: Clips) -> Tensor:
    """[N, 2, 3] affine maps from the network's frame to the decoded frame (torch's theta)."""
    angle = torch.deg2rad(signed[:, 0] * vary.degrees)
    zoom = spec.width / clips.frames.shape[3] * (1 + signed[:, 1] * vary.scale)
    across, down = (
        zoom * (1 + signed[:, 2] * vary.stretch),
        zoom * (1 - signed[:, 2] * vary.stretch),
    )
    theta = torch.zeros(len(signed), 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = across * angle.cos(), -down * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = across * angle.sin(), down * angle.cos()
    theta[:, :, 2] = signed[:, 3:5] * 2 * vary.shift
    return theta
