"""deploy/Containerfile without a container engine: its pip line and command on what it copies."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path, PurePosixPath

import pytest
from conftest import ROOT

pytest.importorskip("fastapi", reason="the service needs pynq_kgrc[serve]")

from serving import THREADS, write_program

CONTAINERFILE = ROOT / "deploy" / "Containerfile"
KEY = "correct-horse-battery"


def instructions():
    """Each instruction of the Containerfile: its name and the rest of its line."""
    text = re.sub(r"^#.*\n", "", CONTAINERFILE.read_text("utf-8"), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, rest = line.split(maxsplit=1)
            yield name, rest


def copied():
    """Source -> destination of each COPY instruction, relative to the working directory."""
    found = {}
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                into = target.endswith("/")
                found[source] = PurePosixPath(target) / (source if into else "")
    return found


def patterns():
    """The lines of .dockerignore: each pattern, and whether it lets files in again."""
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            yield line.removeprefix("!"), line.startswith("!")


def is_sent(path):
    """Whether a file reaches the build, as Docker reads .dockerignore: the last match decides."""
    sent = True
    for pattern, again in patterns():
        expression = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(f"{expression}(/.*)?", str(path)):
            sent = again
    return sent


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """A folder with what the Containerfile copies, of what .dockerignore lets through."""
    folder = tmp_path_factory.mktemp("context")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout of git: which files it has is not known")
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    files = [PurePosixPath(name) for name in names.stdout.splitlines() if is_sent(name)]
    for source, target in copied().items():
        inside = [file for file in files if PurePosixPath(source) in (file, *file.parents)]
        assert inside, f"COPY {source}: .dockerignore lets nothing of it through"
        for file in inside:
            place = folder / target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, place)
    return folder


def pip_line():
    """The arguments of the `pip install` in the Containerfile, without what follows it."""
    (line,) = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    words = shlex.split(line.split("&&")[0])
    assert words[:2] == ["pip", "install"]
    return words[2:]


def command():
    """The words of CMD."""
    (words,) = [json.loads(rest) for name, rest in instructions() if name == "CMD"]
    return words


def serve(python, folder, path=""):
    """Start CMD with folders of ours in place of the container's; what it says, and its list."""
    (folder / "programs").mkdir(exist_ok=True)
    (folder / "keys").write_text(f"{KEY}\n")
    places = {name: str(folder / name.lstrip("/")) for name in ("/programs", "/state", "/keys")}
    words = [places.get(word, word) for word in command()]
    words[words.index("--host") + 1] = "127.0.0.1"
    assert words[0] == "pynq-kgrc"
    code = "import sys; from pynq_kgrc.cli import main; sys.exit(main())"
    variables = {**os.environ, **THREADS, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [python, "-c", code, *words[1:], "--port", "0", "--json"],
            cwd=folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    try:
        line = process.stdout.readline()
        assert line, (folder / "log").read_text()
        started = json.loads(line)
        ask = urllib.request.Request(
            f"http://127.0.0.1:{started['port']}/v1/programs",
            headers={"Authorization": f"Bearer {KEY}"},
        )
        with urllib.request.urlopen(ask, timeout=60) as answer:
            listed = [program["name"] for program in json.load(answer)["programs"]]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()
    assert listed == started["programs"]
    return listed


def test_the_ignore_file_lets_through_what_is_copied_and_no_more():
    again = {pattern for pattern, again in patterns() if again}
    assert again == {source.removeprefix("./") for source in copied()}
    assert not is_sent("host_tests/test_container.py")
    assert not is_sent("pynq_kgrc/service/__pycache__/app.cpython-311.pyc")
    assert not is_sent("overlays/8-zcu102/kgrc.bit")
    assert is_sent("overlays/8-zcu102/manifest.json")


def test_the_pip_line_installs_what_is_copied_and_the_command_serves_the_folder(context, tmp_path):
    """Without a network: the packages that it needs are those of this environment."""
    target = tmp_path / "target"
    words = [word.replace("[serve]", "") for word in pip_line() if word != "--no-cache-dir"]
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--target", str(target))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install"),
            *(*offline, *words),
        ],
        cwd=context,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "programs").mkdir()
    for name, seed in (("second", 1), ("first", 2)):
        write_program(tmp_path / "programs" / f"{name}.kgrc", seed=seed)
    (tmp_path / "programs" / "broken.kgrc").write_bytes(b"nothing")
    assert serve(sys.executable, tmp_path, str(target)) == ["first", "second"]
    log = (tmp_path / "log").read_text()
    assert '"program": "broken"' in log and "not a whole program file" in log


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1200)
def test_the_pip_line_as_it_is_in_an_environment_of_its_own(context, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "-q", "--disable-pip-version-check", "install", *pip_line()],
        cwd=context,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert (Path(python).parent / "pynq-kgrc").exists()
    assert serve(python, tmp_path) == ["utd_mhad27"]
