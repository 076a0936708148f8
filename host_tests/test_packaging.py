"""The wheel is complete: package, licence, metadata, sources, overlays, notebooks and clips."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from importlib import metadata
from importlib.util import find_spec

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pynq_kgrc import files
from pynq_kgrc.accelerator.config import PRESETS, preset
from pynq_kgrc.backends.board.overlays import (
    BIT,
    HWH,
    MANIFEST,
    describe_unbuilt,
    find_overlay,
    list_overlays,
    read_overlay,
    write_manifests,
)
from pynq_kgrc.backends.native import library
from pynq_kgrc.errors import DeviceError
from pynq_kgrc.models.pretrained import RELEASES
from pynq_kgrc.version import VERSION

LIMIT = 300

KERNELS = "pynq_kgrc/backends/native/_kernels.so"

PLACES_OF_PYNQ = {
    "pynq.overlays": "overlays/__init__.py",
    "pynq.notebooks": "notebooks/__init__.py",
    "pynq.lib": "backends/board/kernel.py",
}

LICENCES = ("LICENSE", "LICENSES.md")

NEEDED = (
    *("setup.py", "pyproject.toml", "README.md", *LICENCES),
    *("pynq_kgrc", *files.BESIDE.values()),
)

NOT_SHIPPED = shutil.ignore_patterns(
    "__pycache__", ".*", "build", "*.orig", "*.rej", "*.so", "kgrc.bit", "kgrc.hwh"
)


def call(*command, **options):
    """What a command prints; it must exit with 0."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, so that building leaves nothing in it."""
    copy = tmp_path_factory.mktemp("source")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=NOT_SHIPPED)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def archive(source, tmp_path_factory):
    """The source distribution."""
    out = tmp_path_factory.mktemp("dist")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    call("-c", code, cwd=source)
    (built,) = out.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(archive):
    """The wheel, built from the source distribution without a network."""
    out = archive.parent
    building = ("--no-index", "--no-deps", "--no-build-isolation", "-w", out)
    call(*PIP, "wheel", *building, archive, cwd=out)
    (built,) = out.glob("*.whl")
    assert "-py3-none-" in built.name, "one for every Python 3"
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder into which the wheel is installed."""
    target = tmp_path_factory.mktemp("elsewhere") / "target"
    call(*PIP, "install", "--no-index", "--no-deps", "--target", target, wheel)
    return target


def ask(installed, folder, code, **environment):
    """The JSON document that `code` prints, with the installed copy first on the path."""
    variables = {**os.environ, "PYTHONPATH": str(installed), **environment}
    variables.pop("KGRC_HLS_SRC", None)
    variables.pop("KGRC_OVERLAY", None)
    return json.loads(call("-W", "ignore", "-c", code, cwd=folder, env=variables).splitlines()[-1])


def test_nothing_is_left_behind(source, wheel):
    """The wheel holds every file of the package and of the four folders, and no other."""
    wanted = set()
    for name, place in {"": "pynq_kgrc", **files.BESIDE}.items():
        for path in (source / place).rglob("*"):
            if path.is_file():
                inside = path.relative_to(source / place)
                wanted.add(str("pynq_kgrc" / (name / inside if name else inside)))
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found - wanted <= {KERNELS}
    assert wanted <= found


@pytest.mark.skipif(not library.has_compiler(), reason="no C compiler: no kernels are built")
def test_the_kernels_are_built_and_used(installed, tmp_path):
    """The native backend of the installed copy needs no compiler."""
    code = """
import json
from pynq_kgrc.backends.native import library
library.has_compiler = lambda: False
print(json.dumps([str(library.find_library()), library.choose_instructions("plain")[0]]))
"""
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    assert ask(installed, tmp_path, code, **cache) == [str(installed / KERNELS), "plain"]


def test_without_a_compiler_it_is_installed_too(source, tmp_path):
    """The emulation needs none."""
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    building = ("--no-index", "--no-deps", "--no-build-isolation", "--target", tmp_path / "target")
    variables = {**os.environ, "CC": "/nowhere/cc"}
    call(*PIP, "install", *building, copy, cwd=tmp_path, env=variables)
    assert (tmp_path / "target" / "pynq_kgrc" / "runtime.py").is_file()
    assert not (tmp_path / "target" / KERNELS).exists()


def test_the_licence_travels(archive, wheel):
    with tarfile.open(archive) as packed, zipfile.ZipFile(wheel) as built:
        for licence in LICENCES:
            text = (ROOT / licence).read_bytes()
            (name,) = (n for n in packed.getnames() if n.split("/")[1:] == [licence])
            assert packed.extractfile(name).read() == text
            (name,) = (n for n in built.namelist() if n.endswith(f".dist-info/licenses/{licence}"))
            assert built.read(name) == text
    assert "Copyright (c) 2026, pynq_kgrc contributors" in (ROOT / "LICENSE").read_text("utf-8")


def test_metadata_is_complete(wheel):
    with zipfile.ZipFile(wheel) as built:
        (name,) = (n for n in built.namelist() if n.endswith(".dist-info/METADATA"))
        found = message_from_bytes(built.read(name))
    assert found["Version"] == VERSION
    assert found["License-Expression"] == "BSD-3-Clause"
    assert found.get_all("License-File") == list(LICENCES)
    assert found["Author"] == "pynq_kgrc contributors"
    assert found["Summary"] and found["Keywords"]
    assert found["Project-URL"] is None, "there is none yet"
    classifiers = found.get_all("Classifier")
    for minor in (10, 11, 12):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    assert "Typing :: Typed" in classifiers
    assert not [c for c in classifiers if c.startswith("License ::")]  # PEP 639 forbids both


def test_every_licence_is_in_the_table():
    """Each clip, label list and program that ships, and each release that `pull` fetches."""
    table = (ROOT / "LICENSES.md").read_text("utf-8")
    for folder in ("pynq_kgrc/programs/", "pynq_kgrc/labels/kinetics400.txt", "examples/clips/",
                   "examples/clips/calibration/", "examples/clips/depth/",
                   "pynq_kgrc/service/page/"):  # fmt: skip
        assert f"`{folder}`" in table
        assert (ROOT / folder).exists()
    assert {p.name for p in (ROOT / "pynq_kgrc" / "labels").iterdir()} == {"kinetics400.txt"}
    for program in (ROOT / "pynq_kgrc" / "programs").glob("*.kgrc"):
        assert f"`{program.stem}`" in table
    for release in RELEASES.values():
        assert f"{release.package} {release.version}" in table
    counts = {"one": 1, "two": 2}
    rows = re.findall(r"^\| (one|two) clips? of .*?`(examples/clips/\S*)`", table, re.MULTILINE)
    for place in ("examples/clips/", "examples/clips/calibration/", "examples/clips/depth/"):
        videos = [p for p in (ROOT / place).iterdir() if p.suffix in (".mp4", ".gif", ".avi")]
        assert sum(counts[number] for number, folder in rows if folder == place) == len(videos)


def test_the_container_copies_what_setup_needs():
    text = (ROOT / "deploy" / "Containerfile").read_text("utf-8")
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
              for name in line.split()}  # fmt: skip
    assert {name.split("/")[0] for name in NEEDED} <= copied


@pytest.mark.parametrize("where", ["a checkout", "installed"])
def test_version(where, request, tmp_path):
    """`--version` of this very copy, though another one may be installed."""
    place = ROOT if where == "a checkout" else request.getfixturevalue("installed")
    variables = {**os.environ, "PYTHONPATH": str(place)}
    printed = call("-m", "pynq_kgrc.cli", "--version", cwd=tmp_path, env=variables)
    assert printed == f"pynq-kgrc {VERSION}\n"
    code = "import pynq_kgrc; print(pynq_kgrc.__version__, pynq_kgrc.__file__)"
    version, file = call("-c", code, cwd=tmp_path, env=variables).split(" ", 1)
    assert version == VERSION
    assert file.strip() == str(place / "pynq_kgrc" / "__init__.py")


def test_setup_and_places_agree():
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    (folders,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FOLDERS"
    )
    assert folders == {f"pynq_kgrc.{name}": place for name, place in files.BESIDE.items()}


def test_the_installed_copy_finds_its_folders(installed, tmp_path):
    code = """
import json, pynq_kgrc
from pynq_kgrc import files, samples
from pynq_kgrc.backends.csim import source_folder
from pynq_kgrc.backends.board.overlays import list_overlays
print(json.dumps({
    "package": pynq_kgrc.__file__,
    "folders": {name: str(files.find_folder(name)) for name in files.BESIDE},
    "sources": str(source_folder()),
    "overlays": [o.manifest.config.name for o in list_overlays(files.find_folder("overlays"))],
    "videos": len(samples.sample_videos()) + len(samples.calibration_videos()),
}))
"""
    found = ask(installed, tmp_path, code)
    assert found["package"] == str(installed / "pynq_kgrc" / "__init__.py")
    assert found["folders"] == {name: str(installed / "pynq_kgrc" / name) for name in files.BESIDE}
    assert found["sources"] == str(installed / "pynq_kgrc" / "hls_src")
    assert sorted(found["overlays"]) == sorted(PRESETS)
    assert found["videos"] == 5


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: installed sources are not built")
def test_the_installed_sources_build(installed, tmp_path):
    code = """
import json
from pynq_kgrc.accelerator.config import preset
from pynq_kgrc.backends.csim import CSimulation
simulation = CSimulation(preset("4-sparse"), ("-O0", "-DKGRC_PLAIN"))
print(json.dumps(simulation._library._name))
"""
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    assert ask(installed, tmp_path, code, **cache).startswith(str(tmp_path))


def test_entry_points_lead_somewhere(installed, tmp_path):
    pytest.importorskip("pynq", reason="no pynq: its entry points are not tested")
    code = """
import json
from importlib import metadata
(ours,) = [d for d in metadata.distributions(path=[INSTALLED]) if d.name == "pynq_kgrc"]
points = {p.group: p for p in ours.entry_points if p.group.startswith("pynq.")}
import pynq.overlay
drivers = points["pynq.lib"].load()
print(json.dumps({
    **{group: list(points[group].load().__path__) for group in ("pynq.overlays", "pynq.notebooks")},
    "driver": pynq.overlay._ip_drivers[drivers.VLNV].__module__,
    "file": drivers.__file__,
}))
"""
    found = ask(installed, tmp_path, code.replace("INSTALLED", repr(str(installed))))
    package = installed / "pynq_kgrc"
    assert found == {
        "pynq.overlays": [str(package / "overlays")],
        "pynq.notebooks": [str(package / "notebooks")],
        "driver": "pynq_kgrc.backends.board.kernel",
        "file": str(package / "backends" / "board" / "kernel.py"),
    }


def test_entry_points_of_this_very_installation():
    """Holds for an editable installation too: pynq imports them to find an overlay."""
    ours = [d for d in metadata.distributions() if d.metadata["Name"] == "pynq_kgrc"]
    points = [point for point in ours[0].entry_points if point.group in PLACES_OF_PYNQ]
    assert {point.group for point in points} == set(PLACES_OF_PYNQ)
    for point in points:
        assert find_spec(point.value).origin.endswith(PLACES_OF_PYNQ[point.group])


def test_pynq_delivers_the_notebooks(installed, tmp_path):
    pytest.importorskip("pynq", reason="no pynq: pynq get-notebooks is not run")
    code = """
import json, sys
from pynq._cli.get_notebooks import main
sys.argv = ["pynq get-notebooks", "pynq_kgrc", "--path", "here", "--ignore-overlays"]
main()
print(json.dumps(None))
"""
    ask(installed, tmp_path, code)
    delivered = {path.name for path in (tmp_path / "here" / "pynq_kgrc").glob("*.ipynb")}
    assert delivered == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_pynq_finds_an_overlay_by_its_name(installed, tmp_path):
    pytest.importorskip("pynq", reason="no pynq: its search for bitstreams is not run")
    copy = tmp_path / "target"
    shutil.copytree(installed, copy)
    built = copy / "pynq_kgrc" / "overlays" / "8-sparse" / BIT
    built.write_bytes(b"not really")
    code = """
import json
from pynq.bitstream import Bitstream
print(json.dumps(Bitstream("8-sparse/kgrc.bit", device=object()).bitfile_name))
"""
    assert ask(copy, tmp_path, code) == str(built)


# ---- overlays -------------------------------------------------------------------------------


def test_the_manifests_are_those_of_the_designs():
    folder = ROOT / "overlays"
    assert {path.parent.name for path in folder.glob(f"*/{MANIFEST}")} == set(PRESETS)
    for config in PRESETS.values():
        found = read_overlay(folder / config.name)
        assert found.manifest.config == config
        if not found.manifest.built:
            text = (found.folder / MANIFEST).read_bytes()
            assert text == describe_unbuilt(config), (
                "stale: python -m pynq_kgrc.backends.board.overlays overlays"
            )


def test_an_overlay_that_is_not_built_is_none(tmp_path):
    write_manifests(tmp_path)
    assert len(list_overlays(tmp_path)) == len(PRESETS)
    with pytest.raises(DeviceError, match=r"no overlay of 8-sparse .*there is none. Build one"):
        find_overlay(preset("8-sparse"), tmp_path)


def test_the_manifest_of_a_built_overlay_stays(tmp_path):
    simulated = pytest.importorskip(
        "pynq_kgrc.backends.board.simulated", reason="no pynq: not tested"
    )
    simulated.write_overlay(tmp_path / "8-sparse", preset("8-sparse"))
    before = (tmp_path / "8-sparse" / MANIFEST).read_bytes()
    write_manifests(tmp_path)
    assert (tmp_path / "8-sparse" / MANIFEST).read_bytes() == before
    assert find_overlay(preset("8-sparse"), tmp_path).folder == tmp_path / "8-sparse"
    assert sorted(path.name for path in (tmp_path / "8-dense").iterdir()) == [MANIFEST]


def test_git_has_no_bitstream():
    done = subprocess.run(
        ["git", "ls-files", "overlays"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        pytest.skip("no git checkout: committed files are not checked")
    assert not [name for name in done.stdout.split() if name.endswith((BIT, HWH))]


# ---- what pip installs ----------------------------------------------------------------------

IMAGES = {
    "PYNQ 3": {"python": "3.10", "numpy": "1.21.5", "tqdm": "4.64.0", "pynq": "3.0.1"},
    "PYNQ 4": {"python": "3.12", "numpy": "1.26.4", "tqdm": "4.68.4", "pynq": "4.0.0"},
}
"""What images have (sdbuild's requirements.txt and Ubuntu's python3-numpy). Both need numpy 1."""

INDEX = {
    "numpy": {"1.21.5": [], "1.26.4": [], "2.4.6": []},
    "opencv-python-headless": {"4.11.0.86": ["numpy>=1.21.2"], "5.0.0.93": ["numpy>=2"]},
    "pynq": {"3.0.1": ["numpy"], "4.0.0": ["numpy<2.0", "pycparser<3"]},
    "pycparser": {"2.23": [], "3.0": []},
    "setuptools": {"80.0.0": [], "83.0.0": []},
    "msgspec": {"0.22.0": []},
    "safetensors": {"0.8.0": []},
    "threadpoolctl": {"3.8.0": []},
    "tqdm": {"4.70.1": []},
    "av": {"17.1.0": [], "18.1.0": []},
}
"""Packages, versions and what they require, as on the package index."""


def metadata_of(name, version, requires=()):
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    return "\n".join([*lines, *(f"Requires-Dist: {each}" for each in requires), ""])


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A folder of empty wheels with the names, versions and requirements of INDEX."""
    folder = tmp_path_factory.mktemp("index")
    for name, versions in INDEX.items():
        for version, requires in versions.items():
            stem = f"{name.replace('-', '_')}-{version}"
            with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
                about = metadata_of(name, version, requires)
                archive.writestr(f"{stem}.dist-info/METADATA", about)
                archive.writestr(
                    f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
                )
                archive.writestr(f"{stem}.dist-info/RECORD", "")
    return folder


def chosen(index, folder, wanted, installed=()):
    """The versions that pip would install into an environment that has `installed`."""
    venv.create(folder, with_pip=False)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    for name, version in dict(installed).items():
        about = packages / f"{name}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(metadata_of(name, version, INDEX[name].get(version, ())))
    offline = ("--dry-run", "--no-index", "--find-links", index, "--report", folder / "report")
    call("-m", "pip", "--python", folder / "bin" / "python", *PIP[2:], "install", *offline, wanted)
    report = json.loads((folder / "report").read_text())["install"]
    return {each["metadata"]["name"]: each["metadata"]["version"] for each in report}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_keeps_its_packages(wheel, index, tmp_path, image):
    """With numpy 2, pynq.allocate fails in every program on the board."""
    packages = {name: version for name, version in IMAGES[image].items() if name != "python"}
    found = chosen(index, tmp_path, wheel, packages)
    assert not set(packages) & set(found)
    assert found["opencv-python-headless"] == "4.11.0.86"


def test_an_empty_environment_gets_what_is_right_together(wheel, index, tmp_path):
    found = chosen(index, tmp_path / "laptop", wheel)
    assert found["numpy"] == "2.4.6" and "pynq" not in found
    found = chosen(index, tmp_path / "board", f"{wheel}[board]")
    wanted = {"pynq": "4.0.0", "numpy": "1.26.4", "setuptools": "80.0.0", "pycparser": "2.23"}
    assert {name: found[name] for name in wanted} == wanted


def pins(python):
    """Names and versions in constraints.txt for a version of Python."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line := line.split("#")[0].strip():
            asked = Requirement(line)
            if asked.marker is None or asked.marker.evaluate({"python_version": python}):
                assert asked.name not in found, f"{asked.name} is there twice for {python}"
                found[asked.name] = asked.specifier
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_the_pins_are_within_the_bounds(wheel, python):
    with zipfile.ZipFile(wheel) as built:
        (name,) = (n for n in built.namelist() if n.endswith(".dist-info/METADATA"))
        about = message_from_bytes(built.read(name))
    found = pins(python)
    for line in about.get_all("Requires-Dist"):
        asked = Requirement(line)
        (pin,) = found.get(asked.name, SpecifierSet(">=0"))
        assert pin.operator != "==" or asked.specifier.contains(pin.version), line


# ---- the board ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("python", ["3.10", "3.12"])
@pytest.mark.parametrize("extra", ["", "[serve]"])
def test_a_board_needs_no_compiler_and_no_torch(wheel, tmp_path, python, extra):
    """Every package that an aarch64 board with that Python would install has a wheel."""
    # pip takes the tags of another Python, but asks the running one for markers
    lines = [f"{name}{bounds}\n" for name, bounds in pins(python).items()]
    (tmp_path / "constraints").write_text("".join(lines))
    resolve = [
        *(sys.executable, *PIP, "install", "--dry-run", "--only-binary=:all:"),
        *("--python-version", python, "--implementation", "cp", "--target", str(tmp_path / "none")),
        *("--platform", "manylinux2014_aarch64", "--platform", "manylinux_2_28_aarch64"),
        *("--constraint", str(tmp_path / "constraints"), "--report", str(tmp_path / "report")),
    ]
    probe = subprocess.run([*resolve, "tqdm"], capture_output=True, text=True, timeout=LIMIT)
    if probe.returncode:
        pytest.skip("no package index: the wheels for aarch64 are not resolved")
    # the native backend is built where the package is installed, so a wheel is for one machine
    copy = tmp_path / f"pynq_kgrc-{VERSION}-py3-none-any.whl"
    shutil.copy(wheel, copy)
    wanted = f"{copy}{extra}"
    done = subprocess.run([*resolve, wanted], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report").read_text())["install"]
    files = {each["metadata"]["name"]: each["download_info"]["url"] for each in report}
    assert {"pynq_kgrc", "numpy", "opencv-python-headless", "safetensors"} <= set(files)
    assert all(url.endswith(".whl") for url in files.values())
    native = [url for url in files.values() if not url.endswith("-any.whl")]
    assert native and all("aarch64" in url for url in native)
    assert not {"torch", "pynq"} & set(files)
    assert ("fastapi" in files) == bool(extra)


ALLOCATE = """
import pynq
from pynq_kgrc.backends.board import simulated
buffer = pynq.allocate((4,), "u4", target=simulated.shared_device())
buffer[:] = 7
buffer.flush()
print(type(buffer).__name__, buffer.device_address > 0, int(buffer.sum()))
"""


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("image", IMAGES)
def test_pynq_works_after_installing(wheel, tmp_path, image):
    """A plain installation changes no package of an image; the service has its own environment."""
    about = IMAGES[image]
    python = os.environ.get(f"PYTHON{about['python'].replace('.', '')}", f"python{about['python']}")
    probe = subprocess.run([python, "--version"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"no {python} that runs here: {image} not tested")

    def run(*command, **variables):
        environment = {**os.environ, **variables}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=900, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def packages(python):
        listed = json.loads(run(python, *PIP[:-1], "list", "--format", "json"))
        return {each["name"]: each["version"] for each in listed}

    run(python, "-m", "venv", tmp_path / "image")
    image_python = tmp_path / "image" / "bin" / "python"
    older = ("pynqmetadata==0.1.2", "pynqutils==0.1.1") if about["pynq"] < "3.1" else ()
    asked = [f"{name}=={about[name]}" for name in ("numpy", "tqdm")]
    asked += ["pydantic==1.9.1", "ipython", "psutil", "pycparser<3", "wheel", *older]
    run(image_python, *PIP, "install", "setuptools<=80", *asked)
    run(image_python, *PIP, "install", "--no-build-isolation", f"pynq=={about['pynq']}", *asked)
    before = packages(image_python)
    run(image_python, *PIP, "install", wheel)
    assert before.items() <= packages(image_python).items()
    simulated = {"PYNQ_KGRC_SIMULATE": "1"}
    quiet = ("-W", "ignore", "-c")
    assert run(image_python, *quiet, ALLOCATE, **simulated).endswith("PynqBuffer True 28\n")

    run(python, "-m", "venv", "--system-site-packages", tmp_path / "own")
    own_python = tmp_path / "own" / "bin" / "python"
    (seen,) = (tmp_path / "image" / "lib").glob("python*/site-packages")
    (place,) = (tmp_path / "own" / "lib").glob("python*/site-packages")
    # the folder's .pth files count too: by one of them setuptools gives Python 3.12 a distutils
    (place / "image.pth").write_text(f"import site; site.addsitedir({str(seen)!r})\n")
    run(own_python, *PIP, "install", f"{wheel}[serve]")
    assert before.items() <= packages(image_python).items()
    imported = "import numpy, pynq, pynq_kgrc.service\n" + ALLOCATE + "print(numpy.__version__)"
    printed = run(own_python, *quiet, imported, **simulated).splitlines()
    assert printed[-2:] == ["PynqBuffer True 28", about["numpy"]]
