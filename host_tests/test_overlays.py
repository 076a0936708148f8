"""Overlays and the board: which one is taken where, and what is refused."""

import hashlib

import msgspec
import pytest

from pynq_kgrc.accelerator.boards import (
    BOARDS,
    SYSTEM_PORTS,
    board,
    board_of_design,
    board_of_image,
    overlay_name,
)
from pynq_kgrc.accelerator.config import PRESETS, preset
from pynq_kgrc.accelerator.header import IMAGE_VERSION, memory_ports
from pynq_kgrc.backends.board import overlays
from pynq_kgrc.errors import DeviceError


@pytest.mark.parametrize(
    ("text", "name"),
    [("ZCU104\0", "zcu104"), ("ZCU102", "zcu102"), ("KV260\n", "kv260"), ("Ultra96v2", "ultra96"),
     ("Ultra96", "ultra96"), ("Pynq-Z1", None), ("", None), ("KR260", None), ("ZCU10", None)],
)  # fmt: skip
def test_an_image_names_its_board(text, name):
    found = board_of_image(text)
    assert (found and found.name) == name


def test_a_design_is_for_the_board_that_its_name_ends_in():
    assert {name: board_of_design(name).name for name in PRESETS if name[0] == "8"} == {
        "8-dense": "zcu102",
        "8-sparse": "zcu102",
        "8-zcu102": "zcu102",
        "8-zcu104": "zcu104",
        "8-kv260": "kv260",
    }
    assert board_of_design("mine").name == board_of_design("kv260-mine").name == "zcu102"
    assert overlay_name("8-sparse", board("zcu102")) == "8-sparse"
    assert overlay_name("8-sparse", board("kv260")) == "8-sparse-kv260"
    assert overlay_name("8-kv260", board("zcu102")) == "8-kv260-zcu102"


def test_the_kernel_uses_ports_that_every_board_has():
    for each in BOARDS.values():
        assert set(memory_ports()) <= set(each.ports) <= set(SYSTEM_PORTS)


def write_built(folder, name, board_name):
    """An overlay as the build leaves it, with files that are no bitstream."""
    folder.mkdir(parents=True)
    files = {overlays.BIT: b"bits of " + board_name.encode(), overlays.HWH: b"handoff"}
    for file, content in files.items():
        (folder / file).write_bytes(content)
    config = preset(name)
    manifest = overlays.Manifest(
        config,
        config.digest,
        150.0,
        {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
        "a test",
        board=board_name,
        program_version=IMAGE_VERSION,
    )
    (folder / overlays.MANIFEST).write_bytes(msgspec.json.encode(manifest))


@pytest.fixture
def two_boards(tmp_path, monkeypatch):
    """Overlays of 8-sparse for two boards; gives the function that says what board this is."""
    write_built(tmp_path / "overlays/8-sparse", "8-sparse", "zcu102")
    write_built(tmp_path / "overlays/8-sparse-zcu104", "8-sparse", "zcu104")
    monkeypatch.setattr(overlays, "DEVICE_TREE", tmp_path / "pynq_board")
    monkeypatch.delenv(overlays.BOARD, raising=False)
    monkeypatch.delenv(overlays.OVERLAY, raising=False)

    def find(tree="", variable="", place=tmp_path / "overlays"):
        (tmp_path / "pynq_board").unlink(missing_ok=True)
        if tree:
            (tmp_path / "pynq_board").write_text(tree + "\0")
        if variable:
            monkeypatch.setenv(overlays.BOARD, variable)
        return overlays.find_overlay(preset("8-sparse"), place)

    return find


@pytest.mark.parametrize(
    ("tree", "variable", "folder"),
    [
        ("ZCU102", "", "8-sparse"),
        ("ZCU104", "", "8-sparse-zcu104"),
        ("", "ZCU104", "8-sparse-zcu104"),
        ("ZCU102", "ZCU104", "8-sparse"),
        # the same chip
        ("ZCU106", "", "8-sparse-zcu104"),
        # a PC, and an image that names no board of ours
        ("", "", "8-sparse"),
        ("my own board", "", "8-sparse"),
    ],
)
def test_the_overlay_of_this_board_is_taken(two_boards, tree, variable, folder):
    assert two_boards(tree, variable).folder.name == folder


def test_an_overlay_for_another_chip_is_refused(two_boards, tmp_path):
    says = r"no overlay of 8-sparse .* for this kv260; there is 8-sparse for zcu102 \(.*for zcu104"
    with pytest.raises(DeviceError, match=says):
        two_boards("KV260")
    place = tmp_path / "overlays/8-sparse" / overlays.BIT
    with pytest.raises(DeviceError, match="for this zcu104; there is 8-sparse for zcu102"):
        two_boards("ZCU104", place=place)


def test_a_manifest_for_an_unknown_board_is_refused(tmp_path):
    write_built(tmp_path / "8-sparse", "8-sparse", "zcu999")
    with pytest.raises(DeviceError, match=r"manifest.json: no board named 'zcu999'"):
        overlays.read_overlay(tmp_path / "8-sparse")


def test_a_manifest_of_a_design_that_is_not_built_names_its_board():
    for name, config in PRESETS.items():
        text = overlays.describe_unbuilt(config)
        manifest = msgspec.json.decode(text, type=overlays.Manifest)
        assert manifest.board == board_of_design(name).name
