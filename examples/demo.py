"""`make demo`: classifies real clips with trained networks at 8 bits, as the accelerator does.

Fetches I3D's weights once (47 MB), makes a program of them, without torch, and classifies three
clips. Then the program that ships, which knows 27 actions seen by a depth camera, classifies a
depth video of a person who is not in its training set. The backend is the best that there is here,
usually native; each answer names it.
"""

import sys
from pathlib import Path

from pynq_kgrc.cli import main

HERE = Path(__file__).resolve().parent
DESIGN = "8-sparse"
CLIPS = sorted(
    str(path) for path in (HERE / "clips").glob("*.*") if path.suffix in (".mp4", ".avi", ".gif")
)
DEPTH = str(HERE / "clips" / "depth" / "a01_s2_t1.mp4")


def demo() -> int:
    """Run each command as a person would type it; stop at the first that fails."""
    steps = [
        ["pull", "i3d-kinetics400", "--design", DESIGN],
        ["classify", "--program", "i3d-kinetics400", "--backend", "auto", *CLIPS],
        ["classify", "--program", "utd_mhad27", "--backend", "auto", "--top", "3", DEPTH],
    ]
    for step in steps:
        print("$ pynq-kgrc", *step, flush=True)
        status = main(step)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(demo())
