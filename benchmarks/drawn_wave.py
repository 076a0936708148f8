"""Draws `pynq_kgrc/programs/right_hand_wave.mp4`, the example of the shipped depth program.

None of the clips that the program was trained on may be shipped, so this draws one: a figure of
discs and lines, as a depth camera would see it (near is bright, nothing is black), waves.

    python benchmarks/drawn_wave.py OUT.mp4
"""

import sys

import av
import cv2
import numpy as np

FRAMES, SIZE, FINE = 60, 128, 4
"""Frames, pixels, and drawn pixels per pixel."""
HANGING = {1: ((72, 44, 135), (76, 58, 140), (75, 72, 145)),
           -1: ((48, 44, 135), (44, 58, 140), (45, 72, 145))}  # fmt: skip
"""Shoulder, elbow and hand of the arm on each side of the picture: x, y, brightness."""


def limb(canvas, start, end, radius):
    """A line of discs from one joint to another."""
    for share in np.linspace(0, 1, 21):
        x, y, bright = (1 - share) * np.array(start) + share * np.array(end)
        cv2.circle(canvas, (round(x * FINE), round(y * FINE)), round(radius * FINE), bright, -1)


def draw(time, rng):
    """The frame [H, W] at a time from 0 to 1; the arm goes up, waves, and goes down."""
    canvas = np.zeros((SIZE * FINE, SIZE * FINE), np.float32)
    for side in (-1, 1):
        limb(canvas, (60 + 5 * side, 74, 130), (60 + 6 * side, 95, 125), 5.5)
        limb(canvas, (60 + 6 * side, 95, 125), (60 + 5 * side, 117, 120), 4)
    cv2.rectangle(canvas, (49 * FINE, 40 * FINE), (71 * FINE, 78 * FINE), 138, -1)
    limb(canvas, (53, 42, 136), (67, 42, 136), 5)
    limb(canvas, (60, 36, 128), (60, 40, 128), 3.5)
    cv2.ellipse(canvas, (60 * FINE, 28 * FINE), (6 * FINE, 9 * FINE), 0, 0, 360, 132, -1)
    raised = np.array(((72, 42, 140), (82, 38, 190), (77 + 6 * np.sin(8 * np.pi * time), 18, 205)))
    share = min(1.0, 4 * min(time, 1 - time))
    share = share * share * (3 - 2 * share)
    arms = {**HANGING, 1: (1 - share) * np.array(HANGING[1]) + share * raised}
    for shoulder, elbow, hand in arms.values():
        limb(canvas, shoulder, elbow, 4.2)
        limb(canvas, elbow, hand, 3.4)
        limb(canvas, hand, hand, 4)
    small = cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_NEAREST)
    noise = rng.normal(0, 3, small.shape)
    return np.where(small > 0, np.clip(small + noise, 0, 255), 0).astype(np.uint8)


def main():
    """Write the video."""
    rng = np.random.default_rng(0)
    with av.open(sys.argv[1], "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "18"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for i in range(FRAMES):
            frame = np.repeat(draw(i / (FRAMES - 1), rng)[..., None], 3, 2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
