"""Fixtures shared by all tests, and the loud skip where ../shared/data is not there."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same random numbers for a test, whatever ran before it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


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


@pytest.fixture(scope="session")
def i3d(example_clips):
    """Pretrained I3D as (graph, program at 8 bits); skipped loudly without its weights."""
    from pynq_kgrc.accelerator.config import preset
    from pynq_kgrc.compiler.network import compile_graph
    from pynq_kgrc.errors import ModelError
    from pynq_kgrc.models.checkpoint import load_state
    from pynq_kgrc.models.i3d import CLIP
    from pynq_kgrc.models.i3d import i3d as build
    from pynq_kgrc.models.pretrained import pull
    from pynq_kgrc.models.trace import trace
    from pynq_kgrc.video import load_clip

    try:
        weights = pull("i3d-kinetics400")
    except ModelError as error:
        pytest.skip(f"I3D's weights cannot be had: {error}")
    network = build()
    load_state(network, weights)
    graph = trace(network, CLIP, name="i3d")
    calibration = sorted((example_clips / "calibration").glob("*.avi"))
    clips = [load_clip(path, CLIP).frames for path in calibration]
    return graph, compile_graph(graph, clips, preset("8-sparse"))
