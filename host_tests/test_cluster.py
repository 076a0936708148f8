"""Scale-out: batches through Ray Data, and many devices behind Ray Serve.

The tests without Ray run everywhere; the others in an environment of their own (`make cluster`).
There every process that uses Ray is a child process, so that a test can kill it.
"""

import base64
import contextlib
import gzip
import http.client
import http.server
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import pytest

pytest.importorskip("av", reason="PyAV is not installed: scale-out not tested")

from serving import THREADS, Reply, Serving, write_program, write_video

from pynq_kgrc.backends.emulation.backend import Emulation
from pynq_kgrc.cli import main
from pynq_kgrc.cluster.archive import (
    ArchiveSettings,
    File,
    FileResult,
    Journal,
    classify_file,
    failed,
    find_files,
)
from pynq_kgrc.errors import ConfigError, DataError, DeviceError, KgrcError
from pynq_kgrc.runtime import Session
from pynq_kgrc.video import load_windows

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed: run make cluster"
)

VIDEOS = 12
BAD = {
    "a/empty.mp4": b"",
    "notes.txt": b"no video at all",
    "cut.mp4": None,
}
"""File -> content; None: the first half of a video."""


@pytest.fixture(scope="module", autouse=True)
def short_folder():
    """A temporary folder with a short path for Ray's sockets; pytest's paths are too long."""
    made = tempfile.TemporaryDirectory(prefix="kg", dir="/tmp", ignore_cleanup_errors=True)
    with made as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        yield


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The path of a small program."""
    path = tmp_path_factory.mktemp("program") / "tiny.kgrc"
    write_program(path)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Videos in folders, and three files that are not videos."""
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
    """File -> the labels of each of its clips from a single session; None if it is not a video."""
    from pynq_kgrc.program import load

    program = load(path)
    found = {}
    with Session(program) as session:
        for file in sorted(p for p in archive.rglob("*") if p.is_file()):
            name = str(file.relative_to(archive))
            if name.startswith("."):
                continue
            try:
                assert program.clip.sampling == "windows"
                clips = list(load_windows(file, program.clip, stride=stride))
                found[name] = [session.classify(clip.frames, 5).labels for clip in clips]
            except KgrcError:
                found[name] = None
    return found


def check_rows(rows, expected):
    """Check that there is a row per file, sorted, with exactly the numbers of one process."""
    assert [row["path"] for row in rows] == sorted(expected)
    for row in rows:
        labels = expected[row["path"]]
        if labels is None:
            assert row["error"] and not row["labels"] and not row["windows"], row
            continue
        assert row["error"] is None, row
        windows = [window["labels"] for window in row["windows"]]
        assert [list(window) for window in windows] == [
            list(msgspec.to_builtins(c)) for c in labels
        ]
        if len(windows) == 1:
            assert row["labels"] == windows[0]


# ---------------------------------------------------------------- without Ray


def test_every_file_is_found_once_and_hidden_ones_are_not(archive, tmp_path):
    files = find_files(archive)
    assert len(files) == VIDEOS + len(BAD)
    assert [f.path for f in files] == sorted(f.path for f in files)
    assert len(find_files(archive, [archive / "notes.txt"])) == len(files) - 1
    with pytest.raises(DataError, match="no such folder"):
        find_files(tmp_path / "none")
    with pytest.raises(DataError, match="contains no file"):
        find_files(tmp_path)


def test_a_name_that_is_not_utf8_and_a_dangling_link_have_rows(tmp_path, program):
    from pynq_kgrc.program import load

    (tmp_path / os.fsdecode(b"\xff.mp4")).write_bytes(b"")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere")
    odd, gone = sorted(find_files(tmp_path), key=lambda file: file.path)
    assert odd.path == "\\xff.mp4"
    with Session(load(program)) as session:
        rows = [classify_file(session, file, ArchiveSettings("")) for file in (odd, gone)]
    assert "empty" in rows[0].error and "no such file" in rows[1].error
    assert msgspec.json.decode(msgspec.json.encode(rows), type=list[FileResult]) == rows


@pytest.mark.parametrize("stride", [None, 5])
def test_a_row_is_what_a_session_says(archive, program, stride):
    from pynq_kgrc.program import load

    with Session(load(program)) as session:
        settings = ArchiveSettings("", stride=stride)
        rows = [classify_file(session, file, settings) for file in find_files(archive)]
    documents = [msgspec.to_builtins(row) for row in rows]
    check_rows(documents, one_process(archive, program, stride))
    if stride:
        assert max(len(row["windows"]) for row in documents) > 3
        row = next(row for row in documents if len(row["windows"]) > 1)
        scores = [{x["label"]: x["confidence"] for x in w["labels"]} for w in row["windows"]]
        best = row["labels"][0]
        mean = sum(window[best["label"]] for window in scores) / len(scores)
        assert best["confidence"] == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("fault", [DeviceError("hung"), ValueError("a fault of ours")])
def test_a_failure_of_the_device_is_not_an_error_of_the_file(archive, program, monkeypatch, fault):
    from pynq_kgrc.program import load

    def broken(*_):
        raise fault

    with Session(load(program)) as session:
        monkeypatch.setattr(Emulation, "run", broken)
        with pytest.raises(type(fault), match=str(fault)):
            classify_file(session, find_files(archive)[1], ArchiveSettings(""))


def test_whatever_a_decoder_raises_becomes_a_row(archive, program, monkeypatch):
    from pynq_kgrc.program import load

    def broken(*_, **__):
        raise MemoryError("too large")

    monkeypatch.setattr("pynq_kgrc.recognition.load_windows", broken)
    with Session(load(program)) as session:
        row = classify_file(session, find_files(archive)[1], ArchiveSettings(""))
    assert row.error == "cannot be decoded: MemoryError: too large"


def file_of(name, size=1, modified=1):
    return File(name, size, modified, name.encode())


def test_the_journal_keeps_each_row_once_and_forgets_changed_files(tmp_path):
    settings = ArchiveSettings("p")
    files = [file_of(name) for name in "abc"]
    path = tmp_path / "x.partial"
    with Journal(path, settings) as journal:
        journal.add(failed(files[0], "first"))
        journal.add(failed(files[0], "second"))
        journal.add(failed(files[1], "b"))
    with Journal(path, settings) as journal:
        assert [row.error for row in journal.results(files)] == ["second", "b"]
        changed = [files[0], file_of("b", modified=2), files[2]]
        assert [row.path for row in journal.results(changed)] == ["a"]
        journal.delete()
    assert not path.exists()


def test_the_journal_refuses_other_settings_and_a_second_run(tmp_path):
    path = tmp_path / "x.partial"
    with Journal(path, ArchiveSettings("p")) as journal:
        journal.add(failed(file_of("a"), "kept"))
        with pytest.raises(ConfigError, match="another run"):
            Journal(path, ArchiveSettings("p"))
    for other in (
        ArchiveSettings("q"),
        ArchiveSettings("p", top=3),
        ArchiveSettings("p", stride=8),
    ):
        with pytest.raises(ConfigError, match="other settings"):
            Journal(path, other)
    with Journal(path, ArchiveSettings("p")) as journal:
        assert [row.error for row in journal.results([file_of("a")])] == ["kept"]
    (tmp_path / "y").write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="is not a journal"):
        Journal(tmp_path / "y", ArchiveSettings("p"))
    assert (tmp_path / "y").read_bytes() == b"no database" * 100


KILLED = """
import os, sys
from pathlib import Path
from pynq_kgrc.cluster.archive import File, Journal, ArchiveSettings, failed
journal = Journal(Path(sys.argv[1]), ArchiveSettings("p"))
for i in range(100):
    journal.add(failed(File(str(i), 1, 1, b""), "x" * 5000))
    print(i, flush=True)
    if i == 57:
        os.kill(os.getpid(), 9)
"""


def test_a_killed_process_leaves_every_row_that_it_reported(tmp_path):
    path = tmp_path / "x.partial"
    command = [sys.executable, "-c", KILLED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Journal(path, ArchiveSettings("p")) as journal:
        assert len(list(journal.results([file_of(str(i)) for i in range(100)]))) == 58


@pytest.mark.parametrize(
    "arguments", [["batch", ".", "--out", "x.parquet"], ["cluster", "--emulators", "1"]]
)
def test_without_ray_the_error_names_the_extra_to_install(arguments, monkeypatch, capsys, tmp_path):
    for name in ("ray", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("pynq_kgrc.cluster.")]:
        if name != "pynq_kgrc.cluster.archive":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert "pip install '.[cluster,serve]'" in capsys.readouterr().err
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
    """Run `pynq-kgrc batch` to its end; the completed process."""
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
    """The rows of a table, read with pyarrow."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(out).to_pylist()


@contextlib.contextmanager
def driver(folder, program, out, seconds=60, stride=0):
    """A run that prints each file's name after its row is written."""
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
            commands[int(folder.name)] = command.rstrip("\0 ")
    found, more = [], [pid]
    while more:
        parent = more.pop()
        children = [child for child, its in parents.items() if its == parent]
        found += [(child, commands.get(child, "")) for child in children]
        more += children
    return found


def until(check, seconds):
    """Wait until `check` returns something true; that."""
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
    assert done.returncode == 2, done.stderr  # three files cannot be read; the others have rows
    assert f"{len(BAD)} of {VIDEOS + len(BAD)} files could not be read" in done.stderr
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
    out.rename(tmp_path / "results.parquet")  # not a file of the archive
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
        assert done.returncode == 2 and "is not a table of" in done.stderr
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
    assert done.returncode == 2, done.stderr  # as for every archive with files that are no videos
    assert 4 <= json.loads(done.stdout)["kept"] < VIDEOS + len(BAD)
    check_rows(rows_of(out), one_process(archive, program))


@needs_ray
def test_a_run_that_is_interrupted_says_so_and_leaves_nothing_running(program, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "table" / "results.parquet"
    folder.mkdir()
    out.parent.mkdir()
    write_video(folder / "long.mp4", frames=3000)  # a window each: it does not end by itself
    command = [sys.executable, "-m", "pynq_kgrc.cli", "batch", str(folder), "--out", str(out)]
    command += ["--program", str(program), "--workers", "1", "--stride", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        try:
            until(lambda: any("ray::MapWorker" in its for _, its in descendants(run.pid)), 60)
            below = [pid for pid, _ in descendants(run.pid)]
            run.send_signal(signal.SIGINT)
            _, errors = run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == 130 and "kept for the next run" in errors, errors
    until(lambda: gone(below), 30)
    assert [path.name for path in out.parent.iterdir()] == ["results.parquet.partial"]


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
    assert outcome == f"BatchSummary(rows={VIDEOS + len(BAD)}, errors={len(BAD)}, kept=0)"
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
def test_a_device_that_fails_ends_the_run_and_is_named(archive, program, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    out = tmp_path / "results.parquet"
    done = batch(archive, program, out, "--backend", "csim")
    assert done.returncode == 2 and not done.stdout
    assert "no C++ compiler" in done.stderr
    assert not out.exists()


# ---------------------------------------------------------------- Ray Serve

KEY = "a key of the cluster's clients"


class FakeBoard:
    """An HTTP server with settable behaviour that records its requests."""

    def __init__(self):
        self.mode, self.ready, self.seconds = "good", True, 0.0
        self.asked, self.busy, self.most = [], 0, 0
        self.lock = threading.Lock()
        board = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, status, document, **headers):
                body = json.dumps(document).encode()
                self.send_response(status)
                heads = {"content-type": "application/json", "content-length": len(body)}
                for name, value in {**heads, **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                if self.path == "/v2/health/ready":
                    self.answer(200 if board.ready else 503, {"ready": board.ready})
                elif board.mode == "job":
                    board.mode = "good"
                    self.answer(200, {"state": "running", "result": None, "error": None})
                else:
                    self.answer(200, {"state": "done", "result": {"job": True}, "error": None})

            def do_POST(self):
                with board.lock:
                    board.busy += 1
                    board.most = max(board.most, board.busy)
                body = self.rfile.read(int(self.headers["content-length"]))
                board.asked.append((self.path, dict(self.headers), body))
                try:
                    time.sleep(board.seconds)
                    if board.mode == "silent":
                        self.close_connection = True
                    elif board.mode == "job":
                        self.answer(202, {}, location="/v1/jobs/x")
                    elif board.mode == "good":
                        self.answer(200, {"bytes": len(body), "path": self.path})
                    else:
                        self.answer(int(board.mode), {"error": "as told"})
                finally:
                    with board.lock:
                        board.busy -= 1

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self, **changes):
        self.mode, self.ready, self.seconds = "good", True, 0.0
        self.asked.clear()
        self.most = 0
        vars(self).update(changes)


class Cluster:
    """`pynq-kgrc cluster`; a context manager."""

    def __init__(self, log, *arguments, key=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.headers = {"x-api-key": key} if key else {}
        command = [sys.executable, "-m", "pynq_kgrc.cli", "cluster", "--json"]
        command += ["--port", str(self.port), *map(str, arguments)]
        self.log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **THREADS}
            )
        timer = threading.Timer(120, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            self.stop()
            raise RuntimeError(log.read_text())
        assert json.loads(line) == {"url": f"http://127.0.0.1:{self.port}"}

    def ask(self, method, path, body=None, headers=None, timeout=60):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, self.headers if headers is None else headers)
            answer = connection.getresponse()
            heads = {k.lower(): v for k, v in answer.getheaders()}
            return Reply(answer.status, heads, answer.read())
        finally:
            connection.close()

    def classify(self, body=b"video", query="?top_k=2"):
        heads = {**self.headers, "content-type": "video/mp4"}
        return self.ask("POST", f"/v1/videos:classify{query}", body, heads)

    def crowd(self, count, body=b"video"):
        """Send `count` requests at the same time; the replies."""
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda _: self.classify(body), range(count)))

    def states(self):
        return [d["state"] for d in self.ask("GET", "/v1/devices").json["devices"]]

    def settle(self):
        """Wait until every device is in the rotation."""
        until(lambda: set(self.states()) == {"idle"}, 60)

    def replica(self, name):
        """The process id of a replica."""
        below = descendants(self.process.pid)  # at work, a process adds .METHOD to its title
        found = [pid for pid, its in below if "ServeReplica" in its and f"{name}." in its + "."]
        return found[0] if found else None

    def stop(self):
        """Send SIGTERM, then SIGKILL; the exit status."""
        self.process.terminate()
        try:
            return self.process.wait(90)
        finally:
            self.process.kill()
            self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()


@pytest.fixture(scope="module")
def boards():
    made = [FakeBoard(), FakeBoard()]
    yield made
    for board in made:
        board.server.shutdown()
        board.server.server_close()


@pytest.fixture(scope="module")
def two_boards(boards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "keys").write_text(KEY + "\n")
    arguments = [part for board in boards for part in ("--board", board.url)]
    arguments += ["--limit", 3, "--queue", 8, "--max-bytes", 100_000]
    arguments += ["--api-key-file", folder / "keys"]
    with Cluster(folder / "log", *arguments, key=KEY) as cluster:
        yield cluster


@pytest.fixture
def cluster(two_boards, boards):
    """The two boards behind one endpoint, both in the rotation."""
    for board in boards:
        board.reset()
    two_boards.settle()
    return two_boards


@needs_ray
def test_boards_share_work_and_each_has_one_video_at_a_time(cluster, boards):
    for board in boards:
        board.seconds = 0.3
    replies = cluster.crowd(6)
    assert [reply.status for reply in replies] == [200] * 6
    assert replies[0].json == {"bytes": 5, "path": "/v1/videos:classify?top_k=2"}
    assert [board.most for board in boards] == [1, 1]
    assert sum(len(board.asked) for board in boards) == 6
    path, headers, body = boards[0].asked[0]
    heads = {name.lower(): value for name, value in headers.items()}
    assert heads["content-type"] == "video/mp4" and heads["x-api-key"] == KEY


@needs_ray
@pytest.mark.parametrize("mode", ["503", "429", "silent"])
def test_a_board_in_trouble_leaves_and_returns(cluster, boards, mode):
    bad, good = boards
    bad.reset(mode=mode, ready=False)
    replies = [cluster.classify() for _ in range(6)]  # one of them meets it, and is sent on
    assert [reply.status for reply in replies] == [200] * 6
    assert (len(bad.asked), len(good.asked)) == (1, 6)
    assert sorted(cluster.states()) == ["idle", "resting"]
    assert cluster.ask("GET", "/v2/health/ready").status == 200

    bad.reset()
    cluster.settle()
    assert [cluster.classify().status for _ in range(4)] == [200] * 4
    assert len(bad.asked) == 2


@needs_ray
def test_a_board_that_hangs_leaves_and_its_video_goes_elsewhere(cluster, boards):
    bad, good = boards
    bad.reset(seconds=6, ready=False)
    began = time.monotonic()
    replies = cluster.crowd(3)
    assert [reply.status for reply in replies] == [200] * 3
    assert 2.5 < time.monotonic() - began < 15
    assert (len(bad.asked), len(good.asked)) == (1, 3)
    assert sorted(cluster.states()) == ["idle", "resting"]


@needs_ray
def test_without_a_ready_board_the_answer_is_503(cluster, boards):
    for board in boards:
        board.reset(mode="503", ready=False)
    reply = cluster.classify()  # meets both, and no third
    assert reply.status == 503 and reply.json == {"error": "as told"}
    assert reply.headers["retry-after"]
    assert [len(board.asked) for board in boards] == [1, 1]
    began = time.monotonic()
    reply = cluster.classify()
    assert reply.status == 503 and reply.json == {"error": "no device is ready"}
    assert time.monotonic() - began < 5
    assert cluster.ask("GET", "/v2/health/ready").status == 503
    assert cluster.ask("GET", "/v2/health/live").status == 200


@needs_ray
def test_what_is_the_clients_fault_is_tried_once_and_costs_no_board(cluster, boards):
    for board in boards:
        board.mode = "422"
    reply = cluster.classify(query="?top_k=%ff&x=%0d%0a&stride=" + "9" * 500)
    assert reply.status == 422 and reply.json == {"error": "as told"}
    assert sum(len(board.asked) for board in boards) == 1
    assert cluster.states() == ["idle", "idle"]


@needs_ray
def test_a_long_video_is_waited_for(cluster, boards):
    for board in boards:
        board.mode = "job"
    assert cluster.classify().json == {"job": True}


@needs_ray
def test_the_endpoint_has_the_limits_of_the_service(cluster, boards):
    assert cluster.ask("POST", "/v1/videos:classify", b"x", headers={}).status == 401
    assert cluster.classify(b"x" * 100_001).status == 413
    assert cluster.ask("GET", "/v1/jobs/x").status == 404
    for board in boards:
        board.seconds = 1.0
    replies = cluster.crowd(16)
    counts = Counter(reply.status for reply in replies)
    assert counts.keys() == {200, 429} and counts[200] >= 8, counts
    refused = next(reply for reply in replies if reply.status == 429)
    assert refused.headers["retry-after"] and "at a time" in refused.json["error"]


@needs_ray
def test_a_killed_replica_loses_and_doubles_no_answer(cluster, boards):
    for board in boards:
        board.seconds = 0.5
    with ThreadPoolExecutor(1) as pool:
        crowd = pool.submit(cluster.crowd, 6)
        until(lambda: boards[0].busy, 10)
        victim = cluster.replica("board-0")
        os.kill(victim, signal.SIGKILL)
        replies = crowd.result(60)
    assert [reply.status for reply in replies] == [200] * 6
    cluster.settle()
    assert cluster.replica("board-0") not in (None, victim)


CLASSIFIER = "a key that may classify only"


@pytest.fixture(scope="module")
def real_boards(program, tmp_path_factory):
    """Two services with keys; the second one serves one more program."""
    folder = tmp_path_factory.mktemp("boards")
    keys = folder / "keys"
    keys.write_text(f"boss manage {KEY}\nguest classify {CLASSIFIER}\n")
    write_program(folder / "more.kgrc", seed=1)
    more = ["--program", program, "--program", folder / "more.kgrc"]
    options = ["--api-key-file", keys, "--backend", "emulate"]
    with (
        Serving(*options, "--program", program, state=folder / "a") as first,
        Serving(*options, *more, state=folder / "b") as second,
    ):
        yield keys, first, second


@pytest.fixture(scope="module")
def front(real_boards, tmp_path_factory):
    """A cluster in front of two real boards."""
    keys, *services = real_boards
    boards = [f"--board=http://127.0.0.1:{service.port}" for service in services]
    log = tmp_path_factory.mktemp("front") / "log"
    with Cluster(log, *boards, "--api-key-file", keys, key=KEY) as cluster:
        cluster.settle()
        yield cluster


@needs_ray
@pytest.mark.parametrize(
    "path",
    ["/", "/docs", "/page/page.js", "/openapi.json", "/v2", "/v2/models/tiny", "/nothing"],
)
def test_the_front_answers_as_a_board_does(front, real_boards, path):
    board = real_boards[1].get(path, headers=front.headers)
    reply = front.ask("GET", path)
    assert (reply.status, reply.body) == (board.status, board.body)
    assert reply.headers["content-type"] == board.headers["content-type"]
    assert front.ask("HEAD", path).status == board.status
    assert front.ask("GET", path, headers={}).status == (
        200 if path in ("/", "/docs", "/page/page.js", "/openapi.json") else 401
    )


@needs_ray
def test_programs_that_differ_are_named_and_not_offered(front, real_boards):
    document = front.ask("GET", "/v1/programs").json
    assert [program["name"] for program in document["programs"]] == ["tiny"]
    (odd,) = document["differing"]
    assert odd["name"] == "more"
    assert odd["devices"] == [f"http://127.0.0.1:{real_boards[2].port}"]
    reply = front.ask("POST", "/v2/repository/models/more/unload")
    assert reply.status == 409 and str(real_boards[1].port) in reply.json["error"]
    assert front.ask("GET", "/v1/programs").json["differing"] == []
    assert front.ask("GET", "/v2/models/tiny/stats").status == 404


@needs_ray
def test_inference_is_passed_with_its_tensors(front, real_boards):
    frames = np.random.default_rng(0).integers(0, 256, (24, 8, 32, 32, 3), np.uint8)
    tensor = {"name": "frames", "shape": list(frames.shape), "datatype": "UINT8"}
    tensor["parameters"] = {"binary_data_size": frames.nbytes}
    asked = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    head = json.dumps(asked).encode()
    headers = {**front.headers, "Inference-Header-Content-Length": str(len(head))}
    question = ("POST", "/v2/models/tiny/infer", head + frames.tobytes())
    board = real_boards[1].ask(*question, headers)
    reply = front.ask(*question, headers)
    assert board.status == reply.status == 200, reply.body
    length = "inference-header-content-length"
    assert reply.headers[length] == board.headers[length]
    assert reply.body == board.body and len(reply.body) > int(reply.headers[length])
    packed = (*question[:2], gzip.compress(question[2]))
    heads = {**headers, "Content-Encoding": "gzip", "Accept-Encoding": "gzip"}
    board, reply = real_boards[1].ask(*packed, heads), front.ask(*packed, heads)
    assert board.status == reply.status == 200, reply.body
    assert reply.headers["content-encoding"] == board.headers["content-encoding"] == "gzip"
    assert reply.headers["vary"] == board.headers["vary"]
    assert gzip.decompress(reply.body) == gzip.decompress(board.body)


@needs_ray
def test_a_jobs_address_leads_to_its_board(front, archive):
    video = (archive / "c" / "video 11.mp4").read_bytes()
    heads = {"content-type": "video/mp4", "prefer": "respond-async"}
    guest = {"x-api-key": CLASSIFIER}
    places = []
    for key in (front.headers, front.headers, guest, guest):
        reply = front.ask("POST", "/v1/videos:classify", video, {**heads, **key})
        assert reply.status == 202, reply.body
        assert reply.headers["location"] == f"/v1/jobs/{reply.json['id']}"
        places.append(reply.headers["location"])
    assert {place.split(".")[0] for place in places} == {"/v1/jobs/board-0", "/v1/jobs/board-1"}
    for place in places:
        stream = front.ask("GET", f"{place}/events")
        assert stream.headers["content-type"].startswith("text/event-stream")
        last = stream.body.decode().strip().split("\n\n")[-1]
        assert last.startswith("event: done\ndata: ")
        document = front.ask("GET", place).json
        assert json.loads(last.split("data: ")[1]) == document
        assert document["id"] == place.removeprefix("/v1/jobs/") and document["result"]["labels"]
    ids = [place.removeprefix("/v1/jobs/") for place in places]
    listed = front.ask("GET", "/v1/jobs").json
    assert [job["id"] for job in listed["jobs"]] == ids[::-1] and listed["missing"] == []
    theirs = front.ask("GET", "/v1/jobs", headers=guest).json["jobs"]
    assert [job["id"] for job in theirs] == ids[:1:-1]
    assert front.ask("GET", places[0], headers=guest).status == 404
    assert front.ask("DELETE", places[0]).json["id"] == ids[0]
    for gone_place in (places[0], "/v1/jobs/board-7.x", "/v1/jobs/x", f"{places[0]}/events"):
        assert front.ask("GET", gone_place).status == 404


@needs_ray
def test_events_arrive_while_the_job_runs(front, archive):
    video = (archive / "c" / "video 11.mp4").read_bytes()
    heads = {**front.headers, "content-type": "video/mp4", "prefer": "respond-async"}
    for _ in range(6):  # the last of them waits behind the others
        reply = front.ask("POST", "/v1/videos:classify?stride=1", video, heads)
    line = http.client.HTTPConnection("127.0.0.1", front.port, timeout=30)
    line.request("GET", f"{reply.headers['location']}/events", headers=front.headers)
    with line.getresponse() as answer:
        first = answer.readline() + answer.readline()
        assert b"event: progress" in first and reply.json["id"].encode() in first
    line.close()
    assert front.ask("DELETE", reply.headers["location"]).status == 200


def gauges(front):
    """Metric of a device -> its values, in the order of the boards."""
    found = {}
    for line in front.ask("GET", "/metrics").body.decode().splitlines():
        if line.startswith("kgrc_device_"):
            name, _, value = line.partition("{")
            found.setdefault(name, []).append(float(value.rsplit(" ", 1)[1]))
    return found


@needs_ray
def test_metrics_count_what_each_device_did(front, archive):
    before = gauges(front)
    assert before["kgrc_device_up"] == [1, 1] and before["kgrc_device_live"] == [0, 0]
    video = (archive / "a" / "video 00.mp4").read_bytes()
    for _ in range(2):
        assert front.classify(video).status == 200
    after = gauges(front)
    name = "kgrc_device_served_total"
    assert sum(after[name]) == sum(before[name]) + 2
    assert after["kgrc_device_failures_total"] == before["kgrc_device_failures_total"]
    text = front.ask("GET", "/metrics").body.decode()
    assert 'kgrc_requests_total{method="POST",route="/v1/videos:classify",status="200"}' in text
    assert front.ask("GET", "/metrics", headers={}).status == 401


@contextlib.contextmanager
def live(front, query="?top_k=2"):
    """A live session, with the key as a browser gives it."""
    from websockets.sync.client import connect

    names = []
    if front.headers:
        coded = base64.urlsafe_b64encode(KEY.encode()).decode().rstrip("=")
        names = [f"kgrc.key.{coded}"]
    place = f"ws://127.0.0.1:{front.port}/v1/live{query}"
    with connect(place, subprotocols=names or None) as client:
        yield client


def jpeg():
    """A JPEG image."""
    import av

    made = io.BytesIO()
    with av.open(made, "w", format="mjpeg") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        picture = np.full((48, 64, 3), 128, np.uint8)
        for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
            container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return made.getvalue()


@needs_ray
def test_live_sessions_are_shared_out_and_passed_through(front):
    with live(front) as one, live(front) as two:
        assert gauges(front)["kgrc_device_live"] == [1, 1]
        for client in (one, two):
            assert json.loads(client.recv(10))["program"] == "tiny"
        kinds = []
        while "prediction" not in kinds:
            one.send(jpeg())
            document = json.loads(one.recv(10))
            kinds.append(document["type"])
        assert kinds[0] == "filling" and len(document["labels"]) == 2
        two.send("text")
        document = json.loads(two.recv(10))
        assert (document["type"], document["status"]) == ("error", 400)
        with pytest.raises(Exception, match="1008"):
            two.recv(10)
    until(lambda: gauges(front)["kgrc_device_live"] == [0, 0], 20)
    with live(front, "?program=none") as client:
        assert json.loads(client.recv(10))["status"] == 404


@needs_ray
def test_a_board_that_dies_takes_only_what_was_its_own(front, real_boards, archive):
    video = (archive / "a" / "video 00.mp4").read_bytes()
    heads = {**front.headers, "content-type": "video/mp4", "prefer": "respond-async"}
    place = front.ask("POST", "/v1/videos:classify", video, heads).headers["location"]
    until(lambda: front.ask("GET", place).json["state"] == "done", 20)
    number = int(place.split("board-")[1].split(".")[0])
    dying = real_boards[1 + number]
    with contextlib.ExitStack() as held:
        sessions = [held.enter_context(live(front)) for _ in range(2)]
        for session in sessions:
            session.recv(10)
        dying.process.kill()
        dying.process.wait(30)
        reply = front.ask("GET", place)
        assert reply.status == 503 and str(dying.port) in reply.json["error"]
        assert front.ask("GET", f"{place}/events").status == 503
        assert front.ask("GET", "/").status == 200
        assert [front.classify(video).status for _ in range(3)] == [200] * 3
        listed = front.ask("GET", "/v1/jobs").json
        assert listed["missing"] == [f"http://127.0.0.1:{dying.port}"]
        assert front.ask("POST", "/v2/repository/models/tiny/unload").status == 503
        with live(front) as client:
            assert json.loads(client.recv(10))["type"] == "ready"
        texts = []
        for session in sessions:
            with contextlib.suppress(TimeoutError):
                texts.append(json.loads(session.recv(2)))
        assert [(t["type"], t["status"]) for t in texts] == [("error", 503)]
    up = [0.0 if i == number else 1.0 for i in range(2)]
    assert gauges(front)["kgrc_device_up"] == up


def steady(document):
    """An answer without the times, which differ from run to run."""
    layers = [{**layer, "ms": 0} for layer in document["layers"]]
    return {**document, "timings_ms": 0, "layers": layers}


@needs_ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Serve's own imports
def test_a_program_of_the_package_is_found_by_its_name(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("pynq_kgrc.cluster.serving.run_cluster", lambda *given: asked.append(given))
    assert main(["cluster", "--emulators", "1", "-p", "utd_mhad27"]) == 0
    layout = asked[0][0]
    assert (layout.name, Path(layout.program).is_file()) == ("utd_mhad27", True)

    def classify(batch, report):
        asked.append(batch)
        raise KeyboardInterrupt

    monkeypatch.setattr("pynq_kgrc.cluster.batch.classify_archive", classify)
    out = str(tmp_path / "x.parquet")
    assert main(["batch", str(tmp_path), "-o", out, "-p", "utd_mhad27"]) == 130
    assert Path(asked[1].program).is_file()


@needs_ray
def test_emulators_answer_as_one_service_does_and_survive_a_kill(archive, program, tmp_path):
    video = (archive / "c" / "video 11.mp4").read_bytes()
    with Serving(state=tmp_path / "state", program=program) as alone:
        expected = steady(alone.classify(video, "?top_k=2").json)
        refused = alone.classify(b"no video", "?top_k=2")
    with Cluster(tmp_path / "log", "--emulators", 2, "--program", program) as cluster:
        cluster.settle()
        bad = cluster.classify(b"no video")
        assert (bad.status, bad.body) == (refused.status, refused.body)
        assert b"<title>" in cluster.ask("GET", "/").body
        heads = {"content-type": "video/mp4", "prefer": "respond-async"}
        place = cluster.ask("POST", "/v1/videos:classify?top_k=2", video, heads).headers["location"]
        assert place.startswith("/v1/jobs/emulator-")
        last = cluster.ask("GET", f"{place}/events").body.decode().split("data: ")[-1]
        assert steady(json.loads(last)["result"]) == expected
        with live(cluster) as client:
            assert json.loads(client.recv(10))["type"] == "ready"
        with ThreadPoolExecutor(1) as pool:
            crowd = pool.submit(lambda: [cluster.crowd(4, video) for _ in range(4)])
            time.sleep(0.3)
            os.kill(cluster.replica("emulator-0"), signal.SIGKILL)
            replies = [reply for group in crowd.result(120) for reply in group]
        assert [reply.status for reply in replies] == [200] * 16, cluster.ask("GET", "/v1/devices")
        assert all(steady(reply.json) == expected for reply in replies)
        cluster.settle()
        below = [pid for pid, _ in descendants(cluster.process.pid)]
        assert cluster.stop() == 0, cluster.log.read_text()
        until(lambda: gone(below), 30)


@needs_ray
def test_bad_settings_are_refused(tmp_path, capsys):
    for arguments, text in (
        ((), "no device"),
        (("--board", "ftp://x"), "not an address"),
        (("--emulators", "1", "--program", str(tmp_path / "x.kgrc")), "no such program file"),
        (("--board", "http://x", "--host", "0.0.0.0"), "--api-key-file"),
    ):
        command = [sys.executable, "-m", "pynq_kgrc.cli", "cluster", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and text in done.stderr, done.stderr
