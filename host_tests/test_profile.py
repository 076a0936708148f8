"""Profiles of a program, and the power of a board's rails."""

import time
from types import SimpleNamespace

import pytest

from pynq_kgrc.analysis import plots
from pynq_kgrc.backends.board import power

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
