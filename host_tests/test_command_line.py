"""The command line under wrong input, odd names and terminals, full disks and signals.

Each command ends with a status that its help lists, and says in plain words what is wrong with
which argument: no traceback, whatever the input is.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av", reason="videos are written with PyAV: pip install pynq_kgrc[serve]")

from serving import write_program, write_video

from pynq_kgrc.cli import main
from pynq_kgrc.cli.arguments import draw_bar, printable

STATUSES = {0, 1, 2, 130}

NETWORK = '''
"""Networks of someone's own, and functions that fail."""
from torch import nn

from pynq_kgrc.graph import ClipSpec

CLIP = ClipSpec(frames=8, height=32, width=32, short_side=32)


def small():
    layers = nn.Conv3d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, 4))


def broken():
    return {}["no such key"]


def no_module():
    return 5
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("command-line")


@pytest.fixture(scope="module")
def program(folder):
    write_program(folder / "tiny.kgrc")
    return str(folder / "tiny.kgrc")


@pytest.fixture(scope="module")
def video(folder):
    write_video(folder / "good.mp4", frames=20)
    return str(folder / "good.mp4")


@pytest.fixture(scope="module", autouse=True)
def network(folder):
    """`own:small` and others, on the import path."""
    (folder / "own").mkdir()
    (folder / "own" / "own_networks.py").write_text(NETWORK)
    (folder / "own" / "own_syntax.py").write_text("def (:\n")
    sys.path.insert(0, str(folder / "own"))
    yield "own_networks:small"
    sys.path.remove(str(folder / "own"))


def run(capsys, *arguments):
    """Run a command in this process: status, output, errors. Any other exception fails the test."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status in STATUSES, (status, err)
    assert "Traceback" not in err
    return status, out, err


def start(*arguments, env=None, **more):
    """Start a command in a process of its own."""
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.Popen(
        [sys.executable, "-m", "pynq_kgrc.cli", *map(os.fsencode, map(str, arguments))],
        env={**os.environ, **(env or {})},
        **more,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert b"Traceback" not in err, err.decode()
    return process.returncode, (out or b"").decode("utf-8", "replace"), err.decode()


# ---- wrong files -----------------------------------------------------------------------------


def nested_json(path):
    path.write_bytes(b'{"name": ' + b"[" * 100_000)


WRONG_FILES = {
    "missing": lambda path: None,
    "a folder": Path.mkdir,
    "empty": Path.touch,
    "garbage": lambda path: path.write_bytes(bytes(np.random.default_rng(0).bytes(5000))),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "json": lambda path: path.write_text('{"name": ["best"]}'),
    "nested": nested_json,
    "a loop of links": lambda path: path.symlink_to(path),
    "a failing read": lambda path: path.symlink_to("/proc/self/mem"),
    "unreadable": lambda path: path.touch(0),
}

NAMES = ("plain", "two\nlines", "esc\x1b[31m", "caf\udce9", "caf\u00e9 \u6f22", "-", "x" * 240)


@pytest.fixture(scope="module")
def read_slots(program, video, network, folder):
    """Command and option -> a command line with a place for a file, and the file's suffix."""
    build = ("compile", network, "-o", folder / "none" / "out.kgrc")
    return {
        "classify video": ("{}.mp4", "classify", "-p", program, "--", "{}"),
        "classify program": ("{}.kgrc", "classify", video, "-p={}"),
        "compare video": ("{}.mp4", "compare", "-p", program, "--", "{}"),
        "compare program": ("{}.kgrc", "compare", video, "-p={}"),
        "info": ("{}.kgrc", "info", "--", "{}"),
        "explore": ("{}.kgrc", "explore", "-p={}"),
        "simulate": ("{}.kgrc", "simulate", "--", "{}"),
        "compile clips": ("{}.mp4", *build, "--clips", video, "{}"),
        "compile labels": ("{}.txt", *build, "--clips", video, "--labels={}"),
        "compile weights": ("{}.pt", *build, "--clips", video, "--weights={}"),
        "compile design": ("{}.json", *build, "--clips", video, "--design={}"),
        "doctor design": ("{}.json", "doctor", "--design={}"),
        "serve keys": ("{}.txt", "serve", "-p", program, "--api-key-file={}"),
        "cluster keys": ("{}.txt", "cluster", "--emulators=1", "-p", program, "--api-key-file={}"),
        "batch program": ("{}.kgrc", "batch", folder, "-o", folder / "none.parquet", "-p={}"),
        "train index": ("{}", "train", network, "-o", folder / "none" / "run", "--data={}"),
    }


READ_SLOTS = (
    "classify video", "classify program", "compare video", "compare program", "info", "explore",
    "simulate",
    "compile clips", "compile labels", "compile weights", "compile design", "doctor design",
    "serve keys", "cluster keys", "batch program", "train index",
)  # fmt: skip


@pytest.mark.parametrize("slot", READ_SLOTS)
@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_wrong_file_is_named_in_the_error(slot, kind, read_slots, tmp_path, capsys):
    if kind == "unreadable" and os.geteuid() == 0:
        pytest.skip("root may read every file")
    if kind in ("json", "nested") and slot in ("compile labels", "serve keys", "cluster keys"):
        pytest.skip("any text is a list of labels, and a key")
    if slot in ("batch program", "cluster keys"):
        pytest.importorskip("ray", reason="needs pynq_kgrc[cluster]")
    name, *arguments = read_slots[slot]
    for number, text in enumerate(NAMES if kind in ("missing", "garbage") else NAMES[:1]):
        place = tmp_path / str(number)
        place.mkdir()
        path = place / name.format(text)
        WRONG_FILES[kind](path)
        filled = [str(argument).format(path) for argument in arguments]
        status, out, err = run(capsys, *filled)
        assert status == 2, (status, out, err)
        assert out == "" or json.loads(out)
        assert err.count("\n") == 1, err
        shown = printable(path)
        assert shown in err or shown[-40:] in err, err
    assert not (tmp_path / "none").exists()


# ---- wrong values ----------------------------------------------------------------------------

WHOLE = ("0", "-1", "+5", "1_0", "5.0", " 5", "", "\u0665", "nan", "inf", "1e2", "true", "9" * 5000)

WRONG_VALUES = {
    ("classify", "x.mp4", "-p", "x.kgrc"): {
        "--top": (*WHOLE, "1001"),
        "--stride": (*WHOLE, "1000001"),
        "--sampling": ("", "Centre", "windows "),
    },
    ("compile", "c3d", "--clips", "x.mp4", "-o", "x.kgrc"): {"--classes": WHOLE},
    ("explore", "-p", "x.kgrc"): {
        "--effort": WHOLE,
        "--top": WHOLE,
        "--clock": ("0", "-1", "nan", "inf", "1_0", "\u0665", "", "1e999", "1001"),
        "--share": ("0", "-1", "nan", "1.1", "true"),
    },
    ("simulate", "x.kgrc"): {
        "--clock": ("0", "-1", "nan", "inf", "1_0", "", "1e999", "2000000"),
        "--latency": ("-1", "nan", "", "2000000"),
        "--port-bytes": ("0", "-1", "inf", "1_0"),
        "--ddr-bytes": ("0", "-1", "inf", "1_0"),
        "--outstanding": (*WHOLE, "257"),
        "--depth": (*WHOLE[1:], "1001"),
    },
    ("serve", "-p", "x.kgrc"): {
        "--workers": WHOLE,
        "--port": (*WHOLE[1:], "65536"),
        "--max-bytes": WHOLE,
        "--queue": WHOLE,
        "--wait": WHOLE,
        "--clip-limit": WHOLE,
        "--grace": WHOLE,
    },
    ("batch", ".", "-o", "x.parquet"): {
        "--top": (*WHOLE, "1001"),
        "--stride": WHOLE,
        "--workers": WHOLE,
        "--file-limit": (*WHOLE, "10000000000"),
    },
    ("cluster",): {
        "--emulators": WHOLE[1:],
        "--port": (*WHOLE, "65536"),
        "--max-bytes": WHOLE,
        "--queue": WHOLE,
        "--wait": WHOLE,
        "--limit": WHOLE,
    },
}


@pytest.mark.parametrize(
    ("command", "option"), [(c, o) for c, options in WRONG_VALUES.items() for o in options]
)
def test_a_value_out_of_bounds_is_refused_by_name(command, option, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for value in WRONG_VALUES[command][option]:
        status, out, err = run(capsys, *command, f"{option}={value}")
        assert (status, out) == (2, ""), (value, err)
        assert option in err, (value, err)
        assert value[:30].strip() in err or repr(value)[1:-1] in err, err
    assert not list(tmp_path.iterdir())


def test_options_that_exclude_each_other(program, video, capsys):
    """One clip spread over the video, or clips one after the other: not both."""
    for command in (("classify", video, "-p", program), ("batch", ".", "-o", "x.parquet")):
        status, out, err = run(capsys, *command, "--stride=4", "--sampling=uniform")
        assert (status, out) == (2, "")
        assert "--sampling" in err
        assert "not allowed with argument --stride" in err


def test_output_is_checked_before_the_work(program, video, network, tmp_path, capsys):
    (tmp_path / "file").touch()
    for target in (tmp_path, "/dev/null", "/dev/stdout", tmp_path / "file" / "x", ""):
        for command in (
            ("compile", network, "--clips", video),
            ("explore", "-p", program),
            ("batch", tmp_path),
        ):
            status, out, err = run(capsys, *command, "-o", target)
            assert (status, out) == (2, "")
            assert "-o/--out" in err
            assert repr(str(target)) in err
    assert Path("/dev/null").is_char_device()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["own_networks:broken", "own_networks:no_module", "own_syntax:x"])
def test_a_network_that_fails_is_named(name, video, tmp_path, capsys):
    """The function is the user's: the error says what it raised, and where."""
    out = tmp_path / "x.kgrc"
    status, _, err = run(capsys, "compile", name, "--clips", video, "-o", out)
    assert status == 2
    assert name in err or name.partition(":")[2] in err
    if name.endswith("broken"):
        assert "KeyError: 'no such key'" in err
        assert "own_networks.py, line 16" in err
    assert not out.exists()


def test_labels_with_a_byte_order_mark(network, video, tmp_path, capsys):
    """As Windows' editors write them (inspect_ai#5353)."""
    labels = tmp_path / "labels.txt"
    labels.write_bytes("run\u2028fast\r\njump\r\n\r\nwave\r\nwalk\r\n".encode("utf-8-sig"))
    out = tmp_path / "x.kgrc"
    arguments = ("--clips", video, "--labels", labels, "-o", out)
    status, printed, err = run(capsys, "compile", network, *arguments)
    assert status == 0, err
    assert "the weights are random" in printed
    _, printed, _ = run(capsys, "classify", video, "-p", out, "--json")
    found = json.loads(printed)["videos"][0]["labels"]
    assert {label["label"] for label in found} == {"run\u2028fast", "jump", "wave", "walk"}


def test_a_key_file_with_a_byte_order_mark(tmp_path):
    from pynq_kgrc.service.keys import read_keys

    (tmp_path / "plain.txt").write_text("0123456789abcdef\n")
    (tmp_path / "marked.txt").write_text("\ufeff0123456789abcdef\r\n", "utf-8")
    assert read_keys(tmp_path / "marked.txt") == read_keys(tmp_path / "plain.txt")


def test_a_state_folder_of_another_kind(program, tmp_path, capsys):
    (tmp_path / "jobs.sqlite").mkdir()
    status, _, err = run(capsys, "serve", "-p", program, "--port=0", "--state", tmp_path)
    assert status == 2
    assert "jobs.sqlite: cannot be used as the database of jobs" in err


# ---- one wrong file among many ---------------------------------------------------------------


@pytest.fixture
def damaged(video, tmp_path):
    path = tmp_path / "bad.mp4"
    path.write_bytes(Path(video).read_bytes()[:500])
    return str(path)


def test_one_bad_video_costs_only_its_own_results(program, video, damaged, capsys):
    """The results of the others are those that they have alone (vision#1271, mmaction2#893)."""
    _, out, _ = run(capsys, "classify", video, "-p", program, "--json")
    (alone,) = json.loads(out)["videos"]
    status, out, err = run(capsys, "classify", video, damaged, video, "-p", program, "--json")
    assert status == 2
    first, bad, last = json.loads(out)["videos"]
    for found in (first, last):
        assert "error" not in found
        assert found["labels"] == alone["labels"]
        assert found["windows"] == alone["windows"]
    assert (bad["video"], bad["windows"]) == (damaged, [])
    assert "labels" not in bad
    assert damaged in bad["error"] or "MP4" in bad["error"]
    assert err.count("pynq-kgrc: ") == 1

    status, out, err = run(capsys, "classify", video, damaged, video, "-p", program)
    assert status == 2
    assert out.count(video) == 2
    assert damaged not in out
    assert err.startswith(f"pynq-kgrc: {damaged}: ")
    assert err.count("\n") == 1


def test_json_is_whole_if_the_device_fails(program, video, capsys, monkeypatch):
    from pynq_kgrc.backends.emulation.backend import Emulation
    from pynq_kgrc.errors import DeviceError

    calls = []

    def run_clip(self, *tasks):
        calls.append(tasks)
        if len(calls) > 1:
            raise DeviceError("it does not answer")
        return original(self, *tasks)

    original = Emulation.run
    monkeypatch.setattr(Emulation, "run", run_clip)
    status, out, err = run(
        capsys, "classify", video, video, "-p", program, "--json", "--sampling=centre"
    )
    document = json.loads(out)
    assert (status, document["error"]) == (2, "it does not answer")
    assert [len(each["windows"]) for each in document["videos"]] == [1, 0]
    assert err == "pynq-kgrc: it does not answer\n"


def test_all_bad_clips_of_a_calibration_are_named_at_once(
    network, video, damaged, tmp_path, capsys
):
    out = tmp_path / "x.kgrc"
    arguments = ("--clips", damaged, video, tmp_path / "gone.mp4", "-o", out)
    status, _, err = run(capsys, "compile", network, *arguments)
    assert status == 2
    assert "2 of 3 clips cannot be read: " in err
    assert damaged in err
    assert f"{tmp_path / 'gone.mp4'}: there is no such file" in err
    assert not out.exists()


def test_names_that_are_no_line_of_text(program, folder, video, capsys):
    """Text output has a line for each clip; JSON has the name as valid Unicode."""
    for name in ("two\nlines.mp4", "esc\x1b[31m.mp4"):
        path = folder / name
        path.write_bytes(Path(video).read_bytes())
        status, out, err = run(capsys, "classify", path, "-p", program)
        assert (status, err) == (0, "")
        assert out.splitlines()[0].startswith(printable(path) + "  0.")
        _, out, _ = run(capsys, "classify", path, "-p", program, "--json")
        assert json.loads(out)["videos"][0]["video"] == str(path)
    missing = folder / "caf\udce9.mp4"
    status, out, err = run(capsys, "classify", missing, "-p", program, "--json")
    assert status == 2
    assert json.loads(out)["videos"][0]["video"] == str(folder) + "/caf\\xe9.mp4"


# ---- memory ----------------------------------------------------------------------------------

PEAK = """
import sys
from pynq_kgrc.cli import main
status = main(sys.argv[1:])
# not ru_maxrss, which a process inherits from the one that started it
peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
print(status, peak, file=sys.stderr)
"""


def test_memory_does_not_grow_with_the_video(folder, tmp_path):
    """A clip at a time is held, also if all labels are printed (mmaction2#1192)."""
    write_program(tmp_path / "wide.kgrc", size=(16, 40, 40))
    peaks = []
    for frames in (300, 1200):
        path = tmp_path / f"{frames}.mp4"
        write_video(path, frames=frames, size=(96, 64))
        command = ["classify", path, "-p", tmp_path / "wide.kgrc", "--stride", "2", "--json"]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, command)],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        status, peak = done.stderr.split()[-2:]
        assert status == "0"
        windows = json.loads(done.stdout)["videos"][0]["windows"]
        assert len(windows) == (frames - 16) // 2 + 1
        peaks.append(int(peak) / 1024)
    assert peaks[1] - peaks[0] < 15, peaks


def test_windows_are_printed_as_they_are_done(program, video, monkeypatch):
    """Each line is there before the next clip is run, while which the clip after it is decoded."""
    from pynq_kgrc import recognition

    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    lines = []

    def watched(*arguments, **more):
        for clip in load_windows(*arguments, **more):
            lines.append(out.buffer.getvalue().count(b'{"start_ms": '))
            yield clip

    load_windows = recognition.load_windows
    monkeypatch.setattr(recognition, "load_windows", watched)
    assert main(["classify", video, "-p", program, "--stride", "4", "--json"]) == 0
    assert len(lines) > 3
    for number, count in enumerate(lines):
        assert max(0, number - 1) <= count <= number, lines


# ---- terminals, pipes and disks --------------------------------------------------------------

ENCODINGS = [
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "cp437"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "C"},
    {"PYTHONIOENCODING": "utf-8"},
]


@pytest.mark.parametrize("env", ENCODINGS, ids=lambda env: " ".join(f"{k}={env[k]}" for k in env))
def test_a_terminal_of_any_encoding(env, video, tmp_path):
    """The bar is drawn in characters that it has; others are escaped (fastprogress#37)."""
    labels = ("\u8dd1", "caf\u00e9", "wave", "walk")
    write_program(tmp_path / "tiny.kgrc", labels=labels)
    process = start(
        *("classify", video, "gone \u8dd1.mp4", "-p", tmp_path / "tiny.kgrc"),
        "--sampling=centre",
        env=env,
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert b"Traceback" not in err
    encoding = env.get("PYTHONIOENCODING", "utf-8" if len(env) == 1 else "ascii")
    text = out.decode(encoding)
    assert text.count("%") == 4
    assert ("\u2588" in text or "#" not in text) if encoding in ("utf-8", "cp437") else "#" in text
    assert "wave" in text
    assert ("\u8dd1" if encoding == "utf-8" else "\\u8dd1") in text
    assert b"there is no such file" in err


def test_a_bar_has_one_width(monkeypatch):
    for encoding, full in (("utf-8", "\u2588"), ("latin-1", "#"), ("ascii", "#"), ("none", "#")):
        monkeypatch.setattr(sys, "stdout", _Terminal(encoding))
        assert draw_bar(0.5) == full * 10 + " " * 10
        assert draw_bar(0) == " " * 20


class _Terminal(io.StringIO):
    def __init__(self, encoding):
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self):
        return self._encoding


def test_a_full_disk(program, video, network, tmp_path):
    """Standard output and an output file on a full device."""
    for command in (
        ("classify", video, "-p", program),
        ("classify", video, "-p", program, "--json"),
        ("info", program),
        ("--help",),
        ("doctor",),
    ):
        with open("/dev/full", "w") as full:
            status, _, err = finish(start(*command, stdout=full))
        assert status == 2, (command, err)
        assert "standard output: No space left on device" in err, (command, err)


def test_an_output_file_on_a_full_disk(program, tmp_path, capsys, monkeypatch):
    def full(self, data, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    out = tmp_path / "best.json"
    status, _, err = run(capsys, "explore", "-p", program, "--effort=1", "-o", out)
    assert status == 2
    assert err == f"pynq-kgrc: {out}: No space left on device\n"
    assert not list(tmp_path.iterdir())


def test_a_closed_pipe_is_no_error(program, video):
    """As `pynq-kgrc classify ... | head -1`."""
    for command in (("classify", video, "-p", program, "--stride=1"), ("info", program)):
        read, write = os.pipe()
        os.close(read)
        status, _, err = finish(start(*command, stdout=write))
        os.close(write)
        assert (status, err) == (0, "")


def test_closed_standard_streams(program, video):
    """Results that nobody can get are an error; closed standard error changes nothing."""
    shell = f'exec "{sys.executable}" -m pynq_kgrc.cli classify "{video}" -p "{program}" --json '
    done = subprocess.run(["sh", "-c", shell + ">&-"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("pynq-kgrc: standard output is closed")
    done = subprocess.run(["sh", "-c", shell + "2>&-"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert json.loads(done.stdout)["videos"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError("Unable to allocate 3 GiB"), "not enough memory. Unable to allocate 3 GiB"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "text that cannot be read"),
        (RecursionError("too deep"), "nested too deeply"),
        (PermissionError(13, "Permission denied", "/some/file"), "/some/file: Permission denied"),
        (OSError("odd"), "odd"),
    ],
)
def test_errors_of_the_system_are_one_line(error, text, program, capsys, monkeypatch):
    import pynq_kgrc.program

    def fail(path):
        raise error

    monkeypatch.setattr(pynq_kgrc.program, "load", fail)
    status, out, err = run(capsys, "info", program)
    assert (status, out) == (2, "")
    assert text in err
    assert err.count("\n") == 1


# ---- signals ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def interruptible():
    """SIGINT is not ignored, as it is in what a shell starts in the background, children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def slow(folder):
    """A program and a video that take many seconds together."""
    write_program(folder / "slow.kgrc", size=(8, 64, 64), filters=64)
    write_video(folder / "long.mp4", frames=600)
    return ("classify", folder / "long.mp4", "-p", folder / "slow.kgrc", "--stride", "1")


@pytest.mark.parametrize("wait", [0.05, 0.15, 0.3, 0.6, "result"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_without_a_traceback(slow, wait, number):
    """Ctrl-C reaches all processes of the terminal's group, `kill` the command alone."""
    process = start(*slow, "--json", start_new_session=True)
    if wait == "result":
        for _ in range(3):
            assert process.stdout.readline()
    else:
        time.sleep(wait)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if wait == "result":
        assert process.returncode == (130 if number == signal.SIGINT else 143), err
        assert b"Traceback" not in err
        assert err == (b"pynq-kgrc: interrupted\n" if number == signal.SIGINT else b"")
    elif process.returncode not in (130, 143, -signal.SIGINT, -signal.SIGTERM):
        # before `main` runs, the interpreter itself ends with its own traceback
        assert b"pynq_kgrc" not in err.split(b"KeyboardInterrupt")[0].splitlines()[-1], err
    with pytest.raises(ProcessLookupError):  # no child of the emulation is left
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_output_file_is_whole_or_absent_at_any_moment(network, video, folder, tmp_path, number):
    """`compile` is stopped while its file is being written; an older file stays."""
    out = tmp_path / "x.kgrc"
    out.write_bytes(b"older")
    code = (
        "import sys, time, pathlib\n"
        "write = pathlib.Path.write_bytes\n"
        "def slowly(self, data):\n"
        "    write(self, data[:100]); print('writing', flush=True); time.sleep(60)\n"
        "pathlib.Path.write_bytes = slowly\n"
        "from pynq_kgrc.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = ["compile", network, "--clips", video, "-o", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{folder / 'own'}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert process.stdout.readline() == b"writing\n", process.stderr.read()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert b"Traceback" not in err
    assert out.read_bytes() == b"older"
    if number != signal.SIGKILL:
        assert [path.name for path in tmp_path.iterdir()] == ["x.kgrc"]
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
