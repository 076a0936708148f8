"""Batches: clips varied as cameras and people vary, to learn from; plain ones, to test on."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pynq_kgrc.compress.dataset import Clips
from pynq_kgrc.graph import ClipSpec


class Augmentation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a training clip may be moved from what was filmed; each number is a half range."""

    shift: float = 0.08
    """Of the frame's size."""
    scale: float = 0.12
    stretch: float = 0.06
    """Width against height."""
    degrees: float = 8.0
    gain: float = 0.15
    offset: float = 0.1
    """Added to every pixel but those at 0, which are unknown in depth videos."""
    trim: float = 0.12
    """Of the video, cut off at either end: the speed varies with it."""
    erase: float = 0.3
    """Chance that a box is blotted out."""


PLAIN = Augmentation(0, 0, 0, 0, 0, 0, 0, 0)


def wide_spec(spec: ClipSpec) -> ClipSpec:
    """What to decode for training: twice the frames and an eighth more around a network's clip.

    A video of fewer frames than that starts over, as in `load_clip`.
    """
    return ClipSpec(
        frames=2 * spec.frames,
        height=spec.height + spec.height // 8,
        width=spec.width + spec.width // 8,
        short_side=spec.short_side + spec.short_side // 8,
        step=spec.step,
        mean=spec.mean,
        std=spec.std,
    )


def normalise(pixels: Tensor, spec: ClipSpec) -> Tensor:
    """[N, 3, D, H, W] pixels in 0..1 to the network's input values."""
    mean = torch.tensor(spec.mean).view(1, 3, 1, 1, 1)
    std = torch.tensor(spec.std).view(1, 3, 1, 1, 1)
    return (pixels - mean) / std


def plain_batches(clips: Clips, spec: ClipSpec, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Input values [N, 3, D, H, W] and labels [N] of clips as large as `spec`, in order."""
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
    """One epoch of varied clips in random order; an incomplete last batch is left out.

    Args:
        clips: decoded at `wide_spec(spec)`.
        spec: what the network looks at.
        vary: how far.
        size: clips to a batch, of all processes together.
        generator: draws everything, so that a seed gives the same epoch.
        share: this process and how many there are; each takes its part of every batch.
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
    """Frame numbers [N, D], increasing: one from each of D equal parts of what trimming leaves."""
    frames = jitter.shape[1]
    first, last = trims[:, :1] * available, (1 - trims[:, 1:2]) * available
    within = jitter if jitters else torch.full_like(jitter, 0.5)
    places = first + (last - first) * (torch.arange(frames) + within) / frames
    return places.long().clamp_(0, available - 1)


def _placement(signed: Tensor, vary: Augmentation, spec: ClipSpec, clips: Clips) -> Tensor:
    """[N, 2, 3] affine maps from the network's frame into the decoded one."""
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
