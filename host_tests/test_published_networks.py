"""Our networks are those of other libraries: names and shapes as they are, and equal logits.

The file published_networks.json holds what the libraries gave; published_networks.py wrote it.
"""

import json
from functools import cache

import pytest
import torch
from published_networks import CLASSES, FILE, SOURCES, clip_of, describe, logits_of, values_of

from pynq_kgrc.models import NETWORKS, find_network
from pynq_kgrc.models.checkpoint import load_state

ROWS = {(row["network"], row["source"]): row for row in json.loads(FILE.read_text("utf-8"))}

LIGHT = {"mc3_18", "resnet_18", "mobilenet_v2", "csn_50"}
"""One of each family; the others take seconds each, and run on make test-all only."""


@cache
def ours(name):
    build, clip = find_network(name)
    return build(CLASSES).eval(), clip


def test_every_source_has_a_row():
    assert list(ROWS) == list(SOURCES)
    assert {name for name, _ in ROWS} < set(NETWORKS)


def own_shapes(module):
    return {
        name: list(value.shape)
        for name, value in module.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize(("name", "source"), [k for k in ROWS if k[1].startswith("torchvision")])
def test_names_and_shapes_are_torchvisions(name, source):
    with torch.device("meta"):
        module = find_network(name)[0](CLASSES)
    assert own_shapes(module) == ROWS[name, source]["tensors"]


@pytest.mark.parametrize(
    ("name", "source"),
    [pytest.param(*key, marks=[pytest.mark.slow] * (key[0] not in LIGHT)) for key in ROWS],
)
def test_a_checkpoint_of_the_library_gives_the_librarys_logits(name, source, tmp_path):
    row = ROWS[name, source]
    module, clip = ours(name)
    state = {key: values_of(key, tuple(shape)) for key, shape in row["tensors"].items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": state, "epoch": 1}, path)
    told = load_state(module, path)
    assert f"{len(state)} tensors from entry 'state_dict'" in told
    library = source.partition(" ")[0]
    assert (f"names of {library} translated" in told) == (library != "torchvision")
    logits = logits_of(module, clip_of(name, clip.frames))
    wanted = torch.tensor(row["logits"], dtype=torch.float64)
    assert float((logits - wanted).abs().max() / wanted.abs().max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_the_file_is_what_the_library_gives(name, source):
    package = {"torchvision": "torchvision", "PyTorchVideo": "pytorchvideo"}
    pytest.importorskip(package.get(source.partition(" ")[0], "mmengine"), exc_type=ImportError)
    row = ROWS[name, source]
    found = json.loads(json.dumps(describe(name, source)))
    assert found["tensors"] == row["tensors"]
    assert found["logits"] == pytest.approx(row["logits"], rel=1e-3, abs=1e-3)
