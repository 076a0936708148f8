"""Fixtures that all tests share. A test that needs ../shared/data is skipped without it."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed torch, so that a test does not depend on the tests before it."""
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
    """The folder of the clips that ship with the project."""
    return ROOT / "examples" / "clips"


@pytest.fixture(autouse=True)
def simulated_board(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the backend "board" open the simulated board."""
    monkeypatch.setenv("PYNQ_KGRC_SIMULATE", "1")


@pytest.fixture(scope="session")
def i3d(example_clips):
    """Pretrained I3D as (graph, program at 8 bits); the test is skipped without its weights."""
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
        pytest.skip(f"I3D's weights cannot be fetched: {error}")
    network = build()
    load_state(network, weights)
    graph = trace(network, CLIP, name="i3d")
    calibration = sorted((example_clips / "calibration").glob("*.avi"))
    clips = [load_clip(path, CLIP).frames for path in calibration]
    return graph, compile_graph(graph, clips, preset("8-sparse"))
