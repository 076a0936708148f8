"""Small synthetic data sets for tests of training: the label is the direction of a movement."""

import csv

import cv2
import numpy as np

MOVES = ("left", "right", "up", "down")


def write_video(path, label, seed, size=32, frames=24):
    """Write a video of a bright square that moves in the direction of its label over noise."""
    rng = np.random.default_rng(seed)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 15, (size, size))
    assert writer.isOpened()
    across, wide = rng.integers(4, size - 12), int(rng.integers(6, 10))
    for i in range(frames):
        frame = rng.integers(0, 40, (size, size, 3), dtype=np.uint8)
        along = int((size - wide) * i / (frames - 1))
        along = along if label in (1, 3) else size - wide - along
        y, x = (across, along) if label in (0, 1) else (along, across)
        frame[y : y + wide, x : x + wide] = 200 + rng.integers(0, 50)
        writer.write(frame)
    writer.release()


def write_movies(folder, train=24, test=12):
    """Write a folder with index.csv: four classes; subjects 1 to 3 in train, 4 in test."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [("file", "label", "class", "subject", "split")]
    for i in range(train + test):
        label, name = i % 4, f"m{i:02}.avi"
        write_video(folder / name, label, seed=i)
        subject, split = (4, "test") if i >= train else (1 + i % 3, "train")
        rows.append((name, label, MOVES[label], subject, split))
    with (folder / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder
