"""Which programs `serve` loads: those that are named, published ones of the cache, what ships."""

import shutil

import pytest

from pynq_kgrc.backends.chosen import installed_design
from pynq_kgrc.cli import _parser
from pynq_kgrc.cli.serve import choose_programs
from pynq_kgrc.compiler.released import find_program
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.files import shipped_programs
from pynq_kgrc.program import cached_program
from pynq_kgrc.version import VERSION

NAME = "i3d-kinetics400"
(SHIPPED,) = shipped_programs()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no package index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path


def chosen(*arguments):
    """The names in their order, the files, and the notes."""
    programs, notes = choose_programs(_parser().parse_args(["serve", *map(str, arguments)]))
    return list(programs), list(programs.values()), notes


def test_without_a_published_program_the_shipped_one_is_served_and_the_other_offered(cache):
    names, files, (note,) = chosen()
    assert (names, files) == ([SHIPPED.stem], [SHIPPED])
    assert f"400 everyday actions: pynq-kgrc serve -p {NAME} (fetches 47 MB once)" in note


def test_a_published_program_of_the_cache_is_the_default(cache):
    """Which program the file holds does not matter here, only that it is for the design."""
    design = installed_design()
    path = cached_program(f"{NAME}-{design.digest}-{VERSION}")
    path.parent.mkdir(parents=True)
    shutil.copy(find_program(SHIPPED.stem, design), path)
    names, files, (note,) = chosen()
    assert (names, files) == ([NAME, SHIPPED.stem], [path, SHIPPED])
    assert "is in the cache" in note and "default" in note
    assert chosen("-p", NAME) == ([NAME], [path], [])
    assert chosen("-p", SHIPPED, "-p", NAME)[0] == [SHIPPED.stem, NAME]
    assert chosen("--backend", "csim")[0] == [SHIPPED.stem]
    path.write_bytes(path.read_bytes()[:1000])
    assert chosen()[0] == [SHIPPED.stem], "a damaged file of the cache counts as none"


def test_a_published_program_says_what_it_knows(cache):
    pytest.importorskip("av", reason="the service needs pynq_kgrc[serve]")
    pytest.importorskip("fastapi", reason="the service needs pynq_kgrc[serve]")
    from serving import Serving

    path = cached_program(f"{NAME}-{installed_design().digest}-{VERSION}")
    path.parent.mkdir(parents=True)
    shutil.copy(find_program(SHIPPED.stem, installed_design()), path)
    shutil.copy(SHIPPED, cache / f"{NAME}x.kgrc")
    arguments = ["-p", NAME, "-p", SHIPPED.stem, "-p", cache / f"{NAME}x.kgrc"]
    with Serving(*arguments, state=cache / "state") as serving:
        about = {p["name"]: p["about"] for p in serving.get("/v1/programs").json["programs"]}
    assert list(about) == [NAME, SHIPPED.stem, f"{NAME}x"]
    assert "400 everyday actions" in about[NAME]
    assert "depth camera" in about[SHIPPED.stem]
    assert about[f"{NAME}x"] == "", "a file of somebody else"


def test_without_a_network_the_shipped_one_is_served_and_the_reason_said(cache):
    names, files, (note,) = chosen("-p", NAME)
    assert (names, files) == ([SHIPPED.stem], [SHIPPED])
    assert note.startswith(f"{NAME} cannot be served, {SHIPPED.stem} is served instead: ")
    assert "cannot be fetched" in note


def test_two_programs_of_one_name_are_refused(cache):
    with pytest.raises(ConfigError, match="another program is named x; rename the file"):
        chosen("-p", "x.kgrc", "-p", "folder/x.kgrc")


def test_the_programs_of_the_folder_take_the_place_of_the_shipped_one(cache):
    options = ("--load-all", "--repository", cache)
    assert chosen(*options)[0] == [SHIPPED.stem]
    shutil.copy(SHIPPED, cache / "mine.kgrc")
    assert chosen(*options) == ([], [], [])
    assert chosen(*options, "-p", SHIPPED)[0] == [SHIPPED.stem]
