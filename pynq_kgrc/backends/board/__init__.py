"""The backend "board": a PYNQ board, real or simulated, and all that surrounds it.

This file imports nothing heavy: `cli.doctor` asks it on machines without pynq.
"""

import os

SIMULATE = "PYNQ_KGRC_SIMULATE"
"""Environment variable: anything but 0 or an empty text selects the simulated board."""


def simulation_requested() -> bool:
    """Whether PYNQ_KGRC_SIMULATE selects the simulated board."""
    return os.environ.get(SIMULATE, "0") not in ("", "0")
