"""Fixtures shared by all tests, and the loud skip where ../shared/data is not there."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real labelled videos beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not beside this checkout: real labelled videos not tested")
    return folder


@pytest.fixture(scope="session")
def example_clips() -> Path:
    """The few clips that the project carries."""
    return ROOT / "examples" / "clips"


@pytest.fixture(autouse=True)
def simulated_board(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens the board gets the simulated one."""
    monkeypatch.setenv("PYNQ_KGRC_SIMULATE", "1")
