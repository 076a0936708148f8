"""Scale-out: batches through Ray Data, and many devices behind Ray Serve.

What needs no Ray runs everywhere; the rest in an environment of its own (`make cluster`), where
every process that Ray is part of is a child, so that it can be killed like any other.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("av", reason="PyAV is not installed: scale-out not tested")

from serving import THREADS, write_program, write_video

from pynq_kgrc.backends.emulate import Emulation
from pynq_kgrc.cli import main
from pynq_kgrc.cluster.archive import (
    File,
    Journal,
    Question,
    Row,
    failed,
    find_files,
    look,
)
from pynq_kgrc.errors import ConfigError, DataError, DeviceError, KgrcError
from pynq_kgrc.runtime import Session
from pynq_kgrc.video import load_clip, load_windows

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed: run make cluster"
)

VIDEOS = 12
BAD = {
    "a/empty.mp4": b"",
    "notes.txt": b"no video at all",
    "cut.mp4": None,
}
"""None: the beginning of a video."""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The path of a small program."""
    path = tmp_path_factory.mktemp("program") / "tiny.kgrc"
    write_program(path)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Videos that differ, in folders, and three files that are none."""
    folder = tmp_path_factory.mktemp("archive")
    for i in range(VIDEOS):
        path = folder / "abc"[i % 3] / f"video {i:02}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, frames=10 + 5 * i, size=(64, 48 + 2 * i))
    whole = (folder / "a" / "video 00.mp4").read_bytes()
    for name, body in BAD.items():
        (folder / name).write_bytes(whole[: len(whole) // 2] if body is None else body)
    (folder / ".hidden").write_bytes(b"x")
    return folder


def one_process(archive, path, stride=None):
    """What a single session says of each file, as (path, labels, scores) or (path, error)."""
    from pynq_kgrc.program import load

    program = load(path)
    found = {}
    with Session(program) as session:
        for file in sorted(p for p in archive.rglob("*") if p.is_file()):
            name = str(file.relative_to(archive))
            if name.startswith("."):
                continue
            try:
                if stride:
                    clips = list(load_windows(file, program.clip, stride=stride))
                else:
                    clips = [load_clip(file, program.clip)]
                found[name] = [session.classify(clip.frames, 5).labels for clip in clips]
            except KgrcError:
                found[name] = None
    return found


def check_rows(rows, expected):
    """As many rows as files, sorted, with exactly the numbers of one process."""
    assert [row["path"] for row in rows] == sorted(expected)
    for row in rows:
        labels = expected[row["path"]]
        if labels is None:
            assert row["error"] and not row["labels"] and not row["windows"], row
            continue
        assert row["error"] is None, row
        windows = [list(zip(w["labels"], w["scores"], strict=True)) for w in row["windows"]]
        assert windows == [[tuple(label) for label in clip] for clip in labels]
        if len(windows) == 1:
            assert list(zip(row["labels"], row["scores"], strict=True)) == windows[0]


# ---------------------------------------------------------------- without Ray


def test_every_file_is_found_once_and_hidden_ones_are_not(archive, tmp_path):
    files = find_files(archive)
    assert len(files) == VIDEOS + len(BAD)
    assert [f.path for f in files] == sorted(f.path for f in files)
    assert len(find_files(archive, [archive / "notes.txt"])) == len(files) - 1
    with pytest.raises(DataError, match="no such folder"):
        find_files(tmp_path / "none")
    with pytest.raises(DataError, match="holds no file"):
        find_files(tmp_path)


def test_a_name_that_is_no_text_and_a_link_to_nowhere_have_rows_too(tmp_path, program):
    from pynq_kgrc.program import load

    (tmp_path / os.fsdecode(b"\xff.mp4")).write_bytes(b"")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere")
    odd, gone = sorted(find_files(tmp_path), key=lambda file: file.path)
    assert odd.path == "\\xff.mp4"
    with Session(load(program)) as session:
        rows = [look(session, file, Question("")) for file in (odd, gone)]
    assert "empty" in rows[0].error and "no such file" in rows[1].error
    assert msgspec.json.decode(msgspec.json.encode(rows), type=list[Row]) == rows


@pytest.mark.parametrize("stride", [None, 5])
def test_a_row_is_what_a_session_says(archive, program, stride):
    from pynq_kgrc.program import load

    with Session(load(program)) as session:
        question = Question("", stride=stride)
        rows = [look(session, file, question) for file in find_files(archive)]
    documents = [msgspec.to_builtins(row) for row in rows]
    check_rows(documents, one_process(archive, program, stride))
    if stride:
        assert max(len(row["windows"]) for row in documents) > 3
        row = next(row for row in documents if len(row["windows"]) > 1)
        scores = [dict(zip(w["labels"], w["scores"], strict=True)) for w in row["windows"]]
        mean = sum(window[row["labels"][0]] for window in scores) / len(scores)
        assert row["scores"][0] == pytest.approx(mean, abs=1e-12)


def test_a_device_at_fault_is_no_fault_of_the_file(archive, program, monkeypatch):
    from pynq_kgrc.program import load

    def broken(*_):
        raise DeviceError("hung")

    with Session(load(program)) as session:
        monkeypatch.setattr(Emulation, "run", broken)
        with pytest.raises(DeviceError):
            look(session, find_files(archive)[1], Question(""))


def test_whatever_a_decoder_raises_becomes_a_row(archive, program, monkeypatch):
    from pynq_kgrc.program import load

    def broken(*_, **__):
        raise MemoryError("too large")

    monkeypatch.setattr("pynq_kgrc.cluster.archive.load_clip", broken)
    with Session(load(program)) as session:
        row = look(session, find_files(archive)[1], Question(""))
    assert row.error == "cannot be decoded: MemoryError: too large"


def file_of(name, size=1, modified=1):
    return File(name, size, modified, name.encode())


def test_the_journal_keeps_each_row_once_and_forgets_changed_files(tmp_path):
    question = Question("p")
    files = [file_of(name) for name in "abc"]
    path = tmp_path / "x.partial"
    with Journal(path, question) as journal:
        journal.add(failed(files[0], "first"))
        journal.add(failed(files[0], "second"))
        journal.add(failed(files[1], "b"))
    with Journal(path, question) as journal:
        assert [row.error for row in journal.rows(files)] == ["second", "b"]
        changed = [files[0], file_of("b", modified=2), files[2]]
        assert [row.path for row in journal.rows(changed)] == ["a"]
        journal.delete()
    assert not path.exists()


def test_the_journal_refuses_other_questions_and_a_second_run(tmp_path):
    path = tmp_path / "x.partial"
    with Journal(path, Question("p")) as journal:
        journal.add(failed(file_of("a"), "kept"))
        with pytest.raises(ConfigError, match="another run"):
            Journal(path, Question("p"))
    for other in (Question("q"), Question("p", top=3), Question("p", stride=8)):
        with pytest.raises(ConfigError, match="another question"):
            Journal(path, other)
    with Journal(path, Question("p")) as journal:
        assert [row.error for row in journal.rows([file_of("a")])] == ["kept"]
    (tmp_path / "y").write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="no journal"):
        Journal(tmp_path / "y", Question("p"))
    assert (tmp_path / "y").read_bytes() == b"no database" * 100


KILLED = """
import os, sys
from pathlib import Path
from pynq_kgrc.cluster.archive import File, Journal, Question, failed
journal = Journal(Path(sys.argv[1]), Question("p"))
for i in range(100):
    journal.add(failed(File(str(i), 1, 1, b""), "x" * 5000))
    print(i, flush=True)
    if i == 57:
        os.kill(os.getpid(), 9)
"""


def test_a_killed_process_leaves_every_row_it_spoke_of(tmp_path):
    path = tmp_path / "x.partial"
    command = [sys.executable, "-c", KILLED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Journal(path, Question("p")) as journal:
        assert len(list(journal.rows([file_of(str(i)) for i in range(100)]))) == 58


@pytest.mark.parametrize(
    "arguments", [["batch", ".", "--out", "x.parquet"], ["cluster", "--emulators", "1"]]
)
def test_without_ray_a_person_hears_what_to_install(arguments, monkeypatch, capsys, tmp_path):
    for name in ("ray", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("pynq_kgrc.cluster.")]:
        if name != "pynq_kgrc.cluster.archive":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert "pip install pynq_kgrc[cluster,serve]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- Ray Data

DRIVER = """
import sys
from pathlib import Path
from pynq_kgrc.cluster.batch import Batch, classify_archive

def watch(rows, total):
    for row in rows:
        yield row
        print(row.path, file=said, flush=True)

said = sys.stdout
folder, program, out, seconds, stride = sys.argv[1:]
print(classify_archive(Batch(
    Path(folder), Path(program), Path(out), workers=2,
    file_seconds=int(seconds), stride=int(stride) or None,
), watch))
"""


def batch(folder, program, out, *more, **options):
    """`pynq-kgrc batch` to its end; the process."""
    command = [sys.executable, "-m", "pynq_kgrc.cli", "batch", str(folder), "--out", str(out)]
    command += ["--program", str(program), "--workers", "2", "--json", *map(str, more)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **THREADS},
        **options,
    )


def rows_of(out):
    """The rows of a table, read by somebody else's program."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(out).to_pylist()


@contextlib.contextmanager
def driver(folder, program, out, seconds=60, stride=0):
    """A run that says each file's name once its row is safe."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *map(str, (folder, program, out, seconds, stride))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **THREADS},
    )
    timer = threading.Timer(200, process.kill)
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        process.kill()
        process.communicate()


def descendants(pid):
    """All processes below one, as (pid, command)."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            )
            command = (folder / "cmdline").read_bytes().decode("utf-8", "replace")
            commands[int(folder.name)] = command
    found, more = [], [pid]
    while more:
        parent = more.pop()
        children = [child for child, its in parents.items() if its == parent]
        found += [(child, commands.get(child, "")) for child in children]
        more += children
    return found


def until(check, seconds):
    """What `check` says once it says something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := check():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {check}")


def gone(pids):
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@needs_ray
def test_a_batch_is_bit_equal_to_one_process_and_knows_what_it_did(archive, program, tmp_path):
    out = tmp_path / "results.parquet"
    done = batch(archive, program, out)
    assert done.returncode == 0, done.stderr
    files = VIDEOS + len(BAD)
    assert json.loads(done.stdout) == {
        "out": str(out),
        "rows": files,
        "errors": len(BAD),
        "kept": 0,
    }
    check_rows(rows_of(out), one_process(archive, program))
    assert [path.name for path in tmp_path.iterdir()] == ["results.parquet"]

    before = out.read_bytes()
    again = batch(archive, program, out)  # nothing to do: Ray is not even started
    assert json.loads(again.stdout)["kept"] == files
    assert out.read_bytes() == before
    other = batch(archive, program, out, "--top", 2)
    assert other.returncode == 2 and "top 5 there, 2 here" in other.stderr
    assert out.read_bytes() == before


@needs_ray
def test_windows_and_a_new_file_and_a_changed_one(archive, program, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "videos" / "results.parquet"
    folder.mkdir()
    for name in ("one.mp4", "two.mp4"):
        (folder / name).write_bytes((archive / "b" / "video 10.mp4").read_bytes())
    assert batch(folder, program, out, "--stride", 5).returncode == 0
    (folder / "two.mp4").write_bytes((archive / "a" / "video 00.mp4").read_bytes())
    (folder / "three.mp4").write_bytes((archive / "c" / "video 11.mp4").read_bytes())
    done = batch(folder, program, out, "--stride", 5)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kept"] == 1
    rows = rows_of(out)
    out.rename(tmp_path / "results.parquet")  # it lay in the archive, and is no part of it
    check_rows(rows, one_process(folder, program, 5))


@needs_ray
def test_a_table_of_somebody_else_is_not_touched(archive, program, tmp_path):
    import pyarrow
    import pyarrow.parquet

    out = tmp_path / "results.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), out)
    for body in (out.read_bytes(), b"text"):
        out.write_bytes(body)
        done = batch(archive, program, out)
        assert done.returncode == 2 and "is no table of" in done.stderr
        assert out.read_bytes() == body


@needs_ray
def test_a_killed_run_goes_on_where_it_was(archive, program, tmp_path):
    out = tmp_path / "results.parquet"
    with driver(archive, program, out) as run:
        said = {run.stdout.readline().strip() for _ in range(4)}
        # two agents of Ray see only after a minute that they are alone
        below = [pid for pid, command in descendants(run.pid) if "Agent" not in command]
        assert len(below) > 4
        run.kill()
        until(lambda: gone(below), 30)
    assert not out.exists() and len(said) == 4
    done = batch(archive, program, out)
    assert done.returncode == 0, done.stderr
    assert 4 <= json.loads(done.stdout)["kept"] < VIDEOS + len(BAD)
    check_rows(rows_of(out), one_process(archive, program))


@needs_ray
def test_a_killed_worker_loses_and_doubles_nothing(archive, program, tmp_path):
    out = tmp_path / "results.parquet"
    with driver(archive, program, out) as run:
        said = [run.stdout.readline().strip()]
        workers = [pid for pid, command in descendants(run.pid) if "ray::MapWorker" in command]
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        rest, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    *names, outcome = rest.splitlines()
    assert sorted(said + names) == sorted(one_process(archive, program))
    assert outcome == f"Outcome(rows={VIDEOS + len(BAD)}, errors={len(BAD)}, kept=0)"
    check_rows(rows_of(out), one_process(archive, program))


@needs_ray
def test_a_file_that_takes_for_ever_is_given_up_and_the_others_are_not(program, archive, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "results.parquet"
    folder.mkdir()
    good = (archive / "b" / "video 10.mp4").read_bytes()
    for name in ("a.mp4", "z.mp4"):
        (folder / name).write_bytes(good)

    write_video(folder / "m.mp4", frames=3000)  # a window each: seconds
    with driver(folder, program, out, seconds=2, stride=1) as run:
        said, errors = run.communicate(timeout=150)
        assert run.returncode == 0, errors
    assert sorted(said.splitlines()[:-1]) == ["a.mp4", "m.mp4", "z.mp4"]
    errors = {row["path"]: row["error"] for row in rows_of(out)}
    assert errors["a.mp4"] is None and errors["z.mp4"] is None
    assert errors["m.mp4"].startswith("given up: 3 workers ended")


@needs_ray
def test_a_device_that_fails_ends_the_run_and_is_named(archive, program, tmp_path):
    out = tmp_path / "results.parquet"
    done = batch(archive, program, out, "--backend", "csim")
    assert done.returncode == 2 and not done.stdout
    assert "conv3: 1024 taps; the accelerator has 512" in done.stderr
    assert not out.exists()
