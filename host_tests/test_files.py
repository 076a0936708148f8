"""Folders: what ships with the package, and one cache for everything that is cached."""

import argparse
from pathlib import Path

import pytest
from networks import small_config

from pynq_kgrc.backends import csim
from pynq_kgrc.cli import train
from pynq_kgrc.errors import ModelError
from pynq_kgrc.files import find_folder, shipped_programs, user_cache
from pynq_kgrc.models import pretrained
from pynq_kgrc.program import cached_program, load


def cached_paths(monkeypatch):
    """Where each part of the project caches, by its name. Nothing is fetched or compiled."""
    found = {
        "programs": cached_program("x"),
        "clips": train._clip_cache(argparse.Namespace(cache=None)),
    }

    def build(command, **_):
        Path(command[command.index("-o") + 1]).write_bytes(b"")
        return csim.subprocess.CompletedProcess(command, 0)

    with monkeypatch.context() as patch:
        patch.setattr(csim.subprocess, "run", build)
        patch.setattr(csim.shutil, "which", lambda name: name)
        found["csim"] = csim.build_library(small_config())

    def fetch(release, scratch, folder):
        found["weights"] = folder / release.archive
        raise ModelError("not fetched")

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "_fetch", fetch)
        with pytest.raises(ModelError, match="not fetched"):
            pretrained.pull("i3d-kinetics400")
    return found


@pytest.mark.parametrize("value", ["", None, "elsewhere"])
def test_everything_is_cached_below_one_folder(value, tmp_path, monkeypatch):
    """An empty XDG_CACHE_HOME is as if it were not set: nothing goes below the current folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "home" / ".cache"
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    elif value:
        cache = tmp_path / value
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert user_cache() == cache / "pynq_kgrc"
    found = cached_paths(monkeypatch)
    assert sorted(found) == ["clips", "csim", "programs", "weights"]
    for path in found.values():
        assert path.is_relative_to(cache / "pynq_kgrc")
    below = "elsewhere" if value == "elsewhere" else "home"
    assert [path.name for path in tmp_path.iterdir()] == [below]


def test_what_ships_is_found():
    programs = shipped_programs()
    assert programs
    assert [load(path).name for path in programs]
    for name in ("clips", "hls_src", "overlays", "notebooks"):
        assert any(find_folder(name).iterdir()), name
