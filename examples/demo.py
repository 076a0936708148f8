"""`make demo`: classifies real clips with trained networks at 8 bits, in the bit-exact emulation.

Fetches I3D's weights once (47 MB) and compiles it once, calibrated on two clips. Then it classifies
three other clips. If the depth videos on which the shipped program was trained lie beside the
checkout, it also classifies three videos of a person who is not in the training set. The
project may not ship those videos.
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
"""Swipe to the left, draw a circle, sit down. Subject 6 is not in the training set."""
CALIBRATION = sorted(str(path) for path in (HERE / "clips" / "calibration").glob("*.avi"))


def demo() -> int:
    """Run each command as a person would type it; stop at the first that fails."""
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
        steps.append(["classify", "--program", str(OWN), "--top", "3", *unseen])
    else:
        print(f"{DEPTH} does not exist, so {OWN.name} is not run")
    for step in steps:
        print("$ pynq-kgrc", *step, flush=True)
        status = main(step)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(demo())
