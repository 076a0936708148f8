"""Profiles of a program, and the power of a board's rails."""

import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from networks import Net, compiled

from pynq_kgrc import runtime
from pynq_kgrc.analysis import plots, profile
from pynq_kgrc.analysis.profile import PARTS, measure_profile
from pynq_kgrc.analysis.timing import time_layers
from pynq_kgrc.backends.base import count_task
from pynq_kgrc.backends.board import machine, power
from pynq_kgrc.cli import main
from pynq_kgrc.errors import ConfigError, ProgramError
from pynq_kgrc.program import Program
from pynq_kgrc.runtime import Session


@pytest.fixture(scope="module")
def program():
    net = Net(size=(4, 7, 7))
    net.dense(net.conv(net.conv("clip", 8), 8), 5)
    return compiled(net)[0]


def frames_of(program, seed=0):
    shape = (program.clip.frames, program.clip.height, program.clip.width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---- profiles -------------------------------------------------------------------------------


def test_each_part_is_measured_apart(program, monkeypatch):
    """Each call advances a clock of the test by another number of seconds."""
    now, lock = 0.0, threading.Lock()

    def advance(seconds):
        nonlocal now
        with lock:
            now += seconds

    def delayed(call, seconds):
        def late(*arguments):
            advance(seconds)
            return call(*arguments)

        return late

    def source():
        advance(32)
        yield frames_of(program)

    clock = SimpleNamespace(perf_counter=lambda: now, sleep=time.sleep)
    with Session(program) as session:
        monkeypatch.setattr(runtime, "time", clock)
        monkeypatch.setattr(profile, "time", clock)
        monkeypatch.setattr(Program, "encode_clip", delayed(Program.encode_clip, 1))
        for verb, seconds in (("pack", 16), ("write", 2), ("run", 4), ("read", 8)):
            call = getattr(session.backend, verb)
            monkeypatch.setattr(session.backend, verb, delayed(call, seconds))
        found = measure_profile(session, source, 3)
    wanted = dict(zip(PARTS, (32, 1, 16, 2, 4, 8), strict=True))
    assert found.parts_ms == {part: 1000 * seconds for part, seconds in wanted.items()}
    assert found.host_ms == 59_000
    assert found.clips_per_s == found.clips_per_s_overlapped == pytest.approx(1 / 63)


def test_clips_are_overlapped_in_the_second_pass_only(program):
    """A source of two clips is asked again for more; the warm-up takes one."""
    threads, asked = [], 0

    def source():
        nonlocal asked
        asked += 1
        for seed in (0, 1):
            threads.append(threading.current_thread().name)
            yield frames_of(program, seed)

    with Session(program) as session:
        found = measure_profile(session, source, 3)
    here = threading.current_thread().name
    assert threads == [here] * 4 + ["next clip"] * 3
    assert asked == 1 + 2 + 2
    assert found.clips == 3
    assert found.clips_per_s > 0 < found.clips_per_s_overlapped


def test_layers_on_the_emulation(program):
    with Session(program) as session:
        found = measure_profile(session, lambda: [frames_of(program)], 2)
    assert found.figures == "measured on this host (emulation), not on an FPGA"
    assert "modelled with memory" in found.modelled
    assert [layer.name for layer in found.layers] == [task.name for task in program.tasks]
    for layer, task, time_ in zip(found.layers, program.tasks, time_layers(program), strict=True):
        counted = count_task(program, task)
        assert layer.ms > 0
        assert layer.macs == counted.macs
        assert layer.bytes_read == counted.bytes_in + counted.bytes_weight
        assert layer.bytes_written == counted.bytes_out
        assert layer.modelled_clocks == time_.time.cycles
        assert layer.modelled_ms == pytest.approx(time_.time.cycles / 150e3)
        # no kernel ran: nothing of an FPGA is derived from this computer's time
        nothing = (layer.read_mb_per_s, layer.written_mb_per_s, layer.trips, layer.clocks)
        assert nothing == (None,) * 4
        assert layer.waiting is layer.slowdown is None
    assert found.modelled_ms == pytest.approx(sum(layer.modelled_ms for layer in found.layers))


def test_layers_on_a_board_beside_the_model(program):
    pytest.importorskip("pynq", reason="pynq is not installed: no profile of a board")
    from pynq_kgrc.backends.board import simulated

    device = simulated.shared_device()
    before, device.clocks_per_trip = device.clocks_per_trip, 4.0
    try:
        with Session(program, "board") as session:
            found = measure_profile(session, lambda: [frames_of(program)], 2)
    finally:
        device.clocks_per_trip = before
    assert found.figures.startswith("simulated board: the times are this computer's")
    assert found.clock_mhz == pytest.approx(150, rel=1e-3)
    for layer in found.layers:
        assert layer.clocks == 4 * layer.trips
        assert layer.waiting == pytest.approx(0.75)
        assert layer.slowdown == layer.clocks / layer.modelled_clocks
        assert layer.modelled_ms == pytest.approx(layer.modelled_clocks / found.clock_mhz / 1e3)
        assert layer.read_mb_per_s == pytest.approx(layer.bytes_read / layer.ms / 1e3)
        assert layer.written_mb_per_s == pytest.approx(layer.bytes_written / layer.ms / 1e3)
    assert found.parts_ms["device"] >= 0.99 * sum(layer.ms for layer in found.layers)


def test_what_cannot_be_profiled(program):
    with Session(program) as session:
        with pytest.raises(ConfigError, match="a profile of 0 clips; use 1 or more"):
            measure_profile(session, lambda: [frames_of(program)], 0)
        with pytest.raises(ConfigError, match="the video has none"):
            measure_profile(session, list)
        with pytest.raises(ProgramError, match="takes uint8 frames"):
            measure_profile(session, lambda: [frames_of(program)[:2]])


def test_rails_at_rest_and_at_work(program, monkeypatch):
    monkeypatch.setattr(profile, "IDLE_SECONDS", 0.01)
    with Session(program) as session:
        run = session.backend.run

        def noted(*arguments):
            nonlocal working
            working = True
            return run(*arguments)

        working = False
        monkeypatch.setattr(session.backend, "run", noted)
        rails = {"VCCINT": lambda: 3.0 if working else 1.0, "VCCAUX": lambda: 0.5}
        original = power.record_power

        def record(rails, work):
            nonlocal working
            working = False
            return original(rails, work, interval=1e-4)

        monkeypatch.setattr(profile, "record_power", record)
        found = measure_profile(session, lambda: [frames_of(program)], 30, rails)
    first, second = found.power
    assert (first.rail, first.idle_watts) == ("VCCINT", 1.0)
    assert 1 < first.work_watts <= 3
    assert first.clip_joules > first.added_joules > 0
    assert (second.rail, second.idle_watts, second.added_joules) == ("VCCAUX", 0.5, 0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    pytest.importorskip("av", reason="videos are written with PyAV: no profile by the command")
    from serving import write_program, write_video

    folder = tmp_path_factory.mktemp("profile")
    write_program(folder / "net.kgrc")
    write_video(folder / "video.mp4", frames=40)
    return [str(folder / "video.mp4"), "-p", str(folder / "net.kgrc"), "--clips", "2"]


def test_the_command_prints_a_table(files, capsys):
    assert main(["profile", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "net on small-8, backend emulate, 2 clips"
    assert lines[1] == "times: measured on this host (emulation), not on an FPGA"
    assert lines[2].startswith("'modelled' is an FPGA: modelled with memory: ")
    assert [line.split()[0] for line in lines[4:11]] == [*PARTS, "a"]
    assert lines[12].endswith(" clips/s one after the other")
    assert "clips/s overlapped, " in lines[13]
    rows = [line.split() for line in lines[15:]]
    assert rows[0][:3] == ["layer", "ms", "modelled"]
    assert [row[0] for row in rows[1:]] == ["conv1", "conv3.unfold", "conv3", "all"]
    assert all(row[3:] == ["-"] * 5 for row in rows[1:-1])


def test_the_command_on_the_simulated_board_with_power(files, capsys, tmp_path, monkeypatch):
    pytest.importorskip("pynq", reason="pynq is not installed: no profile of a board")
    monkeypatch.setattr(profile, "IDLE_SECONDS", 0.01)
    plot = tmp_path / "new" / "profile.png"
    more = ["--backend", "board", "--power", "--plot", str(plot), "--stride", "4"]
    assert main(["profile", *files, *more]) == 0
    text = capsys.readouterr().out
    assert "times: simulated board: the times are this computer's, not those of an FPGA" in text
    rails = text[text.index("\nrail ") :].splitlines()[2:]
    assert len(rails) == 18
    assert rails[0].startswith("VCCINT (simulated)  ")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_commands_of_a_board_take_the_name_of_a_program(capsys, monkeypatch, tmp_path):
    """docs/board.md gives the program that ships by its name."""
    assert main(["profile", str(tmp_path / "none.mp4"), "-p", "utd_mhad27"]) == 2
    assert "none.mp4" in capsys.readouterr().err
    monkeypatch.setenv("PYNQ_KGRC_SIMULATE", "0")
    for name in ("IMAGE", "MANAGER"):
        monkeypatch.setattr(machine, name, tmp_path / name)
    assert main(["selftest", "-p", "utd_mhad27"]) == 3
    assert "no board to test here" in capsys.readouterr().err


def test_the_command_as_json(files, capsys):
    assert main(["profile", *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figures"] == "measured on this host (emulation), not on an FPGA"
    assert list(found["parts_ms"]) == list(PARTS)
    assert {"modelled_ms", "modelled_clocks", "clocks", "ms"} <= found["layers"][0].keys()
    assert found["power"] == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--clips", "0"], "use a whole number from 1"),
        (["--plot", "profile.bmp"], "use a name that ends in .png"),
        (["--backend", "gpu"], "no backend named 'gpu'"),
        (["--power"], "no sensors of power rails"),
    ],
)
def test_the_command_refuses(files, capsys, monkeypatch, arguments, complaint):
    monkeypatch.setattr(power, "find_rails", dict)
    try:
        status = main(["profile", *files, *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert complaint in capsys.readouterr().err


# ---- power ----------------------------------------------------------------------------------


@pytest.fixture
def sysfs(tmp_path, monkeypatch):
    """A folder of sensor chips, and a function that adds one."""
    monkeypatch.delenv("PYNQ_KGRC_SIMULATE")

    def no_pynq(name):
        raise ImportError(name)

    monkeypatch.setattr(power, "import_module", no_pynq)
    folder = tmp_path / "hwmon"

    def add(number, name, microwatts, **others):
        chip = folder / f"hwmon{number}"
        chip.mkdir(parents=True)
        (chip / "name").write_text(f"{name}\n")
        files = {"power1_input": microwatts, "in1_input": 3, "in2_input": 850, "curr1_input": 1600}
        for file, value in (files | others).items():
            if value is not None:
                (chip / file).write_text(f"{value}\n")
        return chip

    return folder, add


ZCU102 = (76, 77, 78, 87, 85, 86, 93, 88, 15, 92, 79, 81, 80, 84, 16, 65, 74, 75)
"""The INA226 of a ZCU102 in the order of its device tree."""


def test_the_rails_of_a_zcu102_by_name(sysfs):
    folder, add = sysfs
    for number, place in enumerate(ZCU102):
        add(number, f"ina226_u{place}", 1000 * place)
    add(30, "ams", None)  # the temperature sensors of the chip
    rails = power.find_rails(folder)
    assert len(rails) == 18
    assert list(rails)[:3] == ["VCCINT", "VCCBRAM", "VCCAUX"]
    watts = {name: rail() for name, rail in rails.items()}
    known = {"VCCINT": 79, "VCCBRAM": 81, "VCCPSINTFP": 76, "VCCO_PSDDR_504": 93, "VCC3V3": 16}
    for name, place in known.items():
        assert watts[name] == pytest.approx(place / 1000)
        assert rails[name].source.startswith(f"ina226_u{place}, ")
    assert sorted(round(1000 * value) for value in watts.values()) == sorted(ZCU102)
    assert all(rail.feeds and "simulated" not in rail.name for rail in rails.values())


def test_a_rail_is_read_anew_each_time(sysfs):
    folder, add = sysfs
    chip = add(0, "ina226_u79", 1_500_000)
    rail = power.find_rails(folder)["VCCINT"]
    assert rail() == 1.5
    (chip / "power1_input").write_text("2000000\n")
    assert rail() == 2.0
    (chip / "power1_input").unlink()
    with pytest.raises(power.DeviceError, match="a power sensor fails"):
        power.record_power({"VCCINT": rail}, lambda: None)


def test_a_kria_module_and_boards_without_a_table(sysfs):
    folder, add = sysfs
    add(0, "ina260_u14", 4_850_000)
    assert [rail() for rail in power.find_rails(folder).values()] == [4.85]
    assert list(power.find_rails(folder)) == ["SOM_5V0"]
    (folder / "hwmon0" / "name").write_text("ina226\n")  # named by no table, and twice
    add(1, "ina226", 2_000_000)
    add(2, "BAT0", 9_000_000)  # the battery of a laptop is no rail
    found = power.find_rails(folder)
    assert {name: rail() for name, rail in found.items()} == {
        "ina226 (hwmon0)": 4.85,
        "ina226 (hwmon1)": 2.0,
    }


def test_pynq_names_rails_only_by_labels_that_are_unique(sysfs, monkeypatch):
    """libsensors calls the sensors of every chip power1: of 18 chips pynq keeps the last."""
    folder, add = sysfs

    def named(*names):
        rails = {
            name: SimpleNamespace(power=SimpleNamespace(value=3.0), voltage=None, current=None)
            for name in names
        }
        module = SimpleNamespace(get_rails=lambda: rails)
        monkeypatch.setattr(power, "import_module", lambda _: module)
        return list(power.find_rails(folder))

    assert named("curr1", "in1", "in2", "power1") == []
    assert named("pin", "pout1", "pout4", "vout2") == []  # of a PMBus chip; a ZCU104 has two
    assert named("12V", "INT", "power1") == ["12V", "INT"]
    add(0, "ina226_u79", 1)
    assert named("12V", "power1") == ["VCCINT"]


def test_the_energy_of_a_clip():
    def recording(seconds, **watts):
        rails = {name: lambda value=value: value for name, value in watts.items()}
        found = power.record_power(rails, lambda: time.sleep(0.02))
        return power.Recording(found.seconds, found.watts, seconds)

    idle = recording(3.0, VCCINT=1.0, VCCAUX=0.5)
    work = recording(10.0, VCCINT=2.5, VCCAUX=0.25)
    first, second = power.clip_energy(idle, work, 20)
    assert (first.rail, first.idle_watts, first.work_watts) == ("VCCINT", 1.0, 2.5)
    assert (first.clip_joules, first.added_joules) == (1.25, 0.75)
    assert (second.clip_joules, second.added_joules) == (0.125, -0.125)
    assert not idle.simulated


def test_simulated_rails_say_so_wherever_they_are_shown():
    pytest.importorskip("pynq", reason="pynq is not installed: the simulated rails are not tested")
    rails = power.find_rails()
    assert len(rails) == 18
    assert all(name.endswith("(simulated)") for name in rails)
    assert {rail.source for rail in rails.values()} == {"simulated: made up"}
    recording = power.record_power(rails, lambda: None)
    assert recording.simulated
    labels = plots.plot_power({"idle": recording}).axes[0].get_ylabel()
    assert labels == "W, simulated"
    measured = power.record_power({"VCCINT": lambda: 1.0}, lambda: None)
    assert plots.plot_power({"idle": measured}).axes[0].get_ylabel() == "W, measured"
