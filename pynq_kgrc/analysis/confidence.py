"""Confidences that mean something: the temperature of a program, and its threshold for "unsure".

A network's soft-max is not the probability that it is right. Dividing the logits by one number, the
temperature, leaves every answer as it is and brings both together (Guo et al., "On calibration of
modern neural networks", ICML 2017, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pynq_kgrc.errors import DataError
from pynq_kgrc.quant import Array

RANGE = (0.05, 20.0)
"""Temperatures that are searched."""


def video_probabilities(windows: Array, temperature: float) -> Array:
    """The probabilities [classes] of a video: the mean over its windows' logits [W, classes]."""
    scaled = windows / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    mean: Array = (powers / powers.sum(axis=1, keepdims=True)).mean(axis=0)
    return mean


def negative_log_likelihood(
    videos: Sequence[Array], labels: Sequence[int], temperature: float
) -> float:
    """Mean over videos of -log p(label); each video is the logits [W, classes] of its windows."""
    return _Likelihood(videos, labels)(temperature)


class _Likelihood:
    """The negative log likelihood as a function of the temperature, over all windows at once."""

    def __init__(self, videos: Sequence[Array], labels: Sequence[int]) -> None:
        self._counts = np.array([len(windows) for windows in videos])
        self._starts = np.cumsum(self._counts) - self._counts
        rows = np.concatenate(videos)
        # relative to the right class: its probability is 1 / sum(exp(differences / temperature))
        right = rows[np.arange(len(rows)), np.repeat(labels, self._counts)]
        self._differences = rows - right[:, None]

    def __call__(self, temperature: float) -> float:
        with np.errstate(over="ignore"):  # a probability of 0
            windows = 1 / np.exp(self._differences / temperature).sum(axis=1)
        found = np.add.reduceat(windows, self._starts) / self._counts
        return float(-np.log(np.maximum(found, 1e-300)).mean())


def fit_temperature(videos: Sequence[Array], labels: Sequence[int]) -> float:
    """The temperature with the smallest negative log likelihood.

    Args:
        videos: of each video the logits [W, classes] of its windows.
        labels: the right class of each.

    Raises:
        DataError: there is no video, or no temperature of `RANGE` is the best. So it is where every
            answer is right, as on the clips that a network was trained on: then a smaller
            temperature is always better.
    """
    if not len(videos):
        raise DataError("there is no clip to fit a temperature on")

    likelihood = _Likelihood(videos, labels)

    def loss(log_temperature: float) -> float:
        return likelihood(float(np.exp(log_temperature)))

    grid = np.linspace(np.log(RANGE[0]), np.log(RANGE[1]), 49)
    best = int(np.argmin([loss(each) for each in grid]))
    if best in (0, len(grid) - 1):
        raise DataError(
            f"no temperature fits: the likelihood grows up to {np.exp(grid[best]):g}, the end of "
            f"what is searched. With all answers right or all wrong there is none; use clips that "
            f"the network was not trained on"
        )
    low, high = grid[best - 1], grid[best + 1]
    shrink = (np.sqrt(5) - 1) / 2
    for _ in range(40):  # golden section
        left, right = high - shrink * (high - low), low + shrink * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def fit_threshold(confidences: Array, right: Array, share: float = 0.5) -> float:
    """The largest confidence below which less than `share` of the answers are right; 0 if none is.

    Args:
        confidences: [N] of the best label of each video.
        right: [N] bool, whether it is right.
        share: 0 to 1.
    """
    order = np.argsort(confidences, kind="stable")
    ordered = confidences[order]
    rights = np.cumsum(right[order])
    for count in range(len(order), 0, -1):
        above = ordered[count] if count < len(order) else 1.0
        if ordered[count - 1] < above and rights[count - 1] < share * count:
            return float((ordered[count - 1] + above) / 2)
    return 0.0
