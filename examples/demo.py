"""`make demo`: real clips, a real pretrained I3D at 8 bits, run bit for bit as on the board.

Fetches the weights once (47 MB), compiles once (calibrating on two clips that are not recognized
here), then recognizes three clips through the numpy emulation.
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
    for step in steps:
        print("$ pynq-kgrc", *step, flush=True)
        status = main(step)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(demo())
