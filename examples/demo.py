"""`make demo`: real clips, real trained networks at 8 bits, run bit for bit as on the board.

Fetches I3D's weights once (47 MB), compiles once (calibrating on two clips that are not recognized
here), then recognizes three clips through the numpy emulation. Where the depth videos that the
project's own program was trained for lie beside the checkout, it recognizes some of a person it has
not seen; they may not be shipped.
"""

import sys
from pathlib import Path

from pynq_kgrc.cli import main
from pynq_kgrc.errors import ProgramError
from pynq_kgrc.program import load

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parent / "out" / "i3d-kinetics400-8bit.kgrc"
CLIPS = sorted(
    str(path) for path in (HERE / "clips").glob("*.*") if path.suffix in (".mp4", ".avi", ".gif")
)
OWN = HERE.parent / "pynq_kgrc" / "programs" / "utd_mhad27.kgrc"
DEPTH = HERE.parent.parent / "shared" / "data" / "utd_mhad_depth"
UNSEEN = [DEPTH / f"a{action:02}_s6_t1.mp4" for action in (1, 9, 25)]
"""Swipe to the left, draw a circle, sit down; subject 6 was not learned from."""
CALIBRATION = sorted(str(path) for path in (HERE / "clips" / "calibration").glob("*.avi"))


def demo() -> int:
    """Every step as a person would type it; the first that fails ends the demo."""
    weights = "i3d-kinetics400"
    steps = [["pull", weights]]
    try:
        load(PROGRAM)
    except ProgramError:
        compile_ = ["compile", "i3d", "--weights", weights, "-o", str(PROGRAM)]
        steps.append([*compile_, "--clips", *CALIBRATION])
    steps.append(["classify", "--program", str(PROGRAM), *CLIPS])
    if all(path.is_file() for path in UNSEEN):
        unseen = [str(path) for path in UNSEEN]
        steps.append(
            ["classify", "--program", str(OWN), "--sampling", "uniform", "--top", "3", *unseen]
        )
    else:
        print(f"{DEPTH.name}: not beside this checkout, so {OWN.name} has nothing to look at")
    for step in steps:
        print("$ pynq-kgrc", *step, flush=True)
        status = main(step)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(demo())
