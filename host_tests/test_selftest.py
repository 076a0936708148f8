"""The self-test of a board: each step is seen to pass, and to fail by a fault of its own."""

import ctypes
import itertools
import json
import subprocess
import sys
from functools import lru_cache

import fake_xrt
import numpy as np
import pytest
from fake_xrt import on_fake_board
from networks import Net, compiled, small_config

pynq = pytest.importorskip("pynq", reason="pynq is not installed: the board backend is not tested")

from pynq_kgrc.accelerator.config import PRESETS, preset, write_design  # noqa: E402
from pynq_kgrc.accelerator.header import FIELDS, STATUS  # noqa: E402
from pynq_kgrc.analysis import known_answers, selftest  # noqa: E402
from pynq_kgrc.analysis.selftest import FAILED, OK, SKIPPED, SelfTest  # noqa: E402
from pynq_kgrc.backends.board import machine, simulated  # noqa: E402
from pynq_kgrc.backends.csim import build_library, simulate  # noqa: E402
from pynq_kgrc.backends.image import build_image, encode_map, map_bytes  # noqa: E402
from pynq_kgrc.cli import main  # noqa: E402
from pynq_kgrc.errors import DeviceError  # noqa: E402

CONFIG = small_config()

ALL_RIGHT = {
    "machine": OK,
    "programming": OK,
    "memory": OK,
    "known answers": OK,
    "counters": OK,
    "speed": SKIPPED,
    "interrupts": OK,
    "repeats": OK,
    "power": SKIPPED,
}
"""The states of the steps on the simulated board."""


ports, answers = map(lru_cache, (known_answers.port_answers, known_answers.known_answers))


@pytest.fixture(autouse=True)
def computed_once(monkeypatch):
    monkeypatch.setattr(selftest, "port_answers", ports)
    monkeypatch.setattr(selftest, "known_answers", answers)


@pytest.fixture
def device(monkeypatch):
    before = vars(pynq.Device).get("_active_device")
    made = simulated.SimulatedDevice()
    monkeypatch.setattr(simulated, "_shared", [made])
    yield made
    assert not made.memory.buffers, "memory is still allocated"
    pynq.Device.active_device = before


def run(*numbers, config=CONFIG, at=None, **options):
    """The results by name of steps 1, 2 and those given; `at` maps a step to a call before it."""
    test = SelfTest(config, **{"repeats": 4, **options})
    results = {}
    steps = (1, 2, *numbers) if numbers else range(1, 10)
    for number in steps:
        if at and number in at:
            at[number]()
        for result in test.run([number]):
            results[result.name] = result
    return results


def failed(results):
    return [name for name, result in results.items() if result.state == FAILED]


def wrong_parts(result):
    return "\n".join(part.found for part in result.parts if part.state == FAILED)


# ---- all is right ---------------------------------------------------------------------------


def test_all_steps_of_the_simulated_board(device):
    results = run()
    assert {name: result.state for name, result in results.items()} == ALL_RIGHT, results
    assert results["memory"].found.startswith(
        "input0, input1, output, shortcut, weights0, weights1"
    )
    assert results["speed"].found == "simulated: no clock"
    for mode in ("dense", "KGR", "KGC", "KGRC"):
        assert mode in results["known answers"].found.split("modes ")[1].replace(",", "").split()
    skipped = {part.name for part in results["memory"].parts if part.state == SKIPPED}
    assert skipped == {"cached", "below 4 GiB"}
    assert results["counters"].found == "16 counters of 26 tasks as modelled, exactly"


def test_the_device_is_programmed_even_if_it_holds_the_overlay(device):
    run(2)
    before = device.downloads
    assert run(2)["programming"].state == OK
    assert device.downloads > before


def test_a_dense_design_of_four_bits(device):
    results = run(3, 4, 5, config=small_config(4, sparse=False))
    assert not failed(results), results
    assert results["known answers"].found.endswith("modes dense, 4 bits")


@pytest.mark.slow
@pytest.mark.parametrize("design", sorted(PRESETS))
def test_every_preset(device, design):
    config = preset(design)
    results = run(3, 4, 5, config=config)
    assert not failed(results), results
    modes = results["known answers"].found.split("modes ")[1]
    assert all(mode in modes for mode in ("KGR,", "KGC", "KGRC")) == config.sparse
    assert modes.endswith(f"{config.bits} bits")


def test_the_command(device, capsys, tmp_path):
    write_design(CONFIG, tmp_path / "small.json")
    arguments = ["selftest", "--design", str(tmp_path / "small.json"), "--repeats", "2"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "3  memory         ok" in text
    assert "passes all steps that apply; skipped: 6 speed, 9 power." in text
    for line in ("board      simulated", "pynq_kgrc  ", "tool       simulated, no bitstream"):
        assert f"\n{line}" in text
    device.faults += ["wrong_digest"] * 2  # after the first the driver programs the device again
    assert main([*arguments, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["works"] is False
    assert document["digest"] == CONFIG.digest
    states = [step["state"] for step in document["steps"]]
    assert states == [OK, FAILED, *[SKIPPED] * 7]
    assert document["steps"][2]["found"] == "the device was not opened"


def test_a_program_of_ones_own(device, capsys, tmp_path):
    net = Net(size=(3, 6, 7))
    net.dense(net.pool(net.conv(net.conv("clip", 6), 9)), 5)
    program = compiled(net)[0]
    program.save(tmp_path / "mine.kgrc")
    arguments = ["selftest", "-p", str(tmp_path / "mine.kgrc"), "--repeats", "2"]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["design"] == CONFIG.name
    assert document["steps"][3]["parts"][-1]["found"].startswith(
        f"{len(program.tasks)} tasks right"
    )
    assert f"of {program.name}," in document["steps"][7]["found"]
    assert main([*arguments, "--design", "8-sparse"]) == 2
    assert "is compiled for small-8" in capsys.readouterr().err


def test_the_manifest_says_the_design(device, capsys, tmp_path):
    simulated.write_overlay(tmp_path / "small", CONFIG)
    arguments = ["selftest", "--overlay", str(tmp_path), "--repeats", "1", "--json"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["design"] == CONFIG.name
    overlay = {part["name"]: part for part in document["steps"][0]["parts"]}["overlay"]
    assert overlay["state"] == OK and str(tmp_path / "small" / "kgrc.bit") in overlay["found"]
    simulated.write_overlay(tmp_path / "four", preset("4-dense"))
    assert main(arguments) == 2


def test_no_board_is_told_apart(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("PYNQ_KGRC_SIMULATE")
    for name in ("IMAGE", "MANAGER"):
        monkeypatch.setattr(machine, name, tmp_path / name)
    assert main(["selftest"]) == 3
    out, err = capsys.readouterr()
    assert not out
    assert "there is no board to test here: no PYNQ image" in err
    assert main(["selftest", "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["works"] is False and not document["steps"]
    assert document["error"].startswith("there is no board to test here")


def test_a_board_without_pynq(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pynq_kgrc.analysis.selftest", None)
    assert main(["selftest"]) == 1
    assert "pynq: " in capsys.readouterr().err


def test_it_needs_neither_torch_nor_the_sources():
    """On a board with a wheel there is no torch, and the known answers are in the package."""
    code = (
        "import sys\n"
        "for name in ('torch', 'cv2', 'matplotlib', 'vectors'): sys.modules[name] = None\n"
        "import pynq_kgrc.files, pynq_kgrc.backends.csim as csim\n"
        "def refuse(*_): raise SystemExit('the sources were looked for')\n"
        "pynq_kgrc.files.find_folder = csim.find_folder = refuse\n"
        "from pynq_kgrc.accelerator.config import preset\n"
        "import pynq_kgrc.analysis.selftest as test\n"
        "design = preset('8-sparse')\n"
        "print(len(test.known_answers(design)), len(test.port_answers(design)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["6", "6"], done.stderr


# ---- the patterns -----------------------------------------------------------------------------


DESIGNS = [CONFIG, *map(preset, ("8-sparse", "8-zcu102", "4-dense", "16-sparse"))]


@pytest.mark.parametrize("config", DESIGNS, ids=lambda config: config.name)
def test_every_bit_of_the_weight_ports_and_every_pair_is_told_apart(config):
    """Each line carries both values, and no two lines always the same or always opposite ones."""
    check = known_answers._weight_answer(config)
    program = check.answer.program
    weights = build_image(program).weights.view(np.uint8)
    chunks = program.work(program.tasks[0]).chunks
    count = chunks // 2 * program.work(program.tasks[0]).chunk_beats(config)
    port = 8 * config.weight_port_words
    for half in (weights[: count * port], weights[count * port : 2 * count * port]):
        beats = half.reshape(count, port)
        lines = np.unpackbits(beats, axis=1, bitorder="little").T.astype(np.float32) * 2 - 1
        assert len(lines) == check.lines
        alike = np.abs(lines @ lines.T) / count
        np.fill_diagonal(alike, np.abs(lines.mean(axis=1)))
        assert alike.max() < 1


@pytest.mark.parametrize("config", DESIGNS, ids=lambda config: config.name)
def test_every_bit_of_the_map_ports_is_set_alone_and_clear_alone(config):
    check = known_answers._copies(config, "walking bits", known_answers._walking_beats(config))
    codes = check.answer.clips[0]
    beats = encode_map(config, codes, config.bits).reshape(-1, config.beat_bytes)
    port = check.port[..., :: config.port_positions].ravel()
    for number in (0, 1):
        bits = np.unpackbits(beats[port == number], axis=1, bitorder="little")
        for value in (1, 0):
            alone = bits[(bits == value).sum(axis=1) == 1]
            assert (alone == value).any(axis=0).all()


def test_which_port_reads_a_position_is_as_in_the_sources():
    """The C-simulation gets memory of zeros at the port input1: what it read there is zero."""
    check = known_answers._copies(CONFIG, "copy", known_answers._walking_beats(CONFIG))
    program = check.answer.program
    image = build_image(program)
    codes = np.full_like(check.answer.clips[0], 1)
    raw = encode_map(CONFIG, codes, CONFIG.bits)
    maps = np.zeros(program.arena_bytes + 128, np.uint8)
    maps[: raw.size] = raw
    nothing, status = np.zeros_like(maps), np.zeros((1, len(STATUS)), np.uint64)
    memory = dict.fromkeys(("input0", "shortcut", "output"), maps) | {"input1": nothing}
    memory |= dict.fromkeys(("weights0", "weights1"), image.weights) | {"status": status}
    names = simulated.ADDRESSES
    arrays = [memory.get(name, image.tables) for name in names]
    ports = [(array.ctypes.data, array.nbytes) for array in arrays]
    library = ctypes.CDLL(str(build_library(CONFIG)))
    assert not simulate(library, ports, ctypes.c_uint64(), 0, 1)
    target, size = program.buffers[1], check.answer.outputs[0][0].shape
    made = maps[target.offset :][: map_bytes(CONFIG, size[0], size[1:], CONFIG.bits)]
    found = known_answers.decode_map(CONFIG, made, size[0], size[1:], CONFIG.bits)
    assert np.array_equal(found == 0, np.broadcast_to(check.port == 1, size))
    assert 0.3 < check.port.mean() < 0.7


# ---- planted faults -------------------------------------------------------------------------


@pytest.fixture
def plant(monkeypatch):
    """Replace a method of the simulated kernel by one that gets the real one first."""

    def replaced(name, make):
        monkeypatch.setattr(simulated.Kernel, name, make(getattr(simulated.Kernel, name)))

    return replaced


def faulty_port(kernel, real, port, damage):
    """The memory of `port` as the kernel sees it: a damaged copy."""
    address, size = real(kernel, port)
    copy = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).copy()
    damage(copy)
    kernel.kept = copy
    return copy.ctypes.data, size


@pytest.mark.parametrize(
    ("port", "bit", "value"),
    [
        ("input0", 3, 1),
        ("input1", 60, 0),
        ("shortcut", 21, 1),
        ("weights0", 17, 1),
        ("weights1", 40, 0),
    ],
)
def test_a_bit_of_a_port_that_is_stuck(device, plant, port, bit, value):
    wide = CONFIG.weight_port_words * 8 if port.startswith("weights") else CONFIG.beat_bytes

    def damage(copy):
        beats = copy[: len(copy) // wide * wide].reshape(-1, wide)
        mask = np.uint8(1 << bit % 8)
        beats[:, bit // 8] = beats[:, bit // 8] | mask if value else beats[:, bit // 8] & ~mask

    def make(real):
        return lambda self, name: (
            faulty_port(self, real, name, damage) if name == port else real(self, name)
        )

    plant("_memory_of", make)
    bit = bit % (8 * wide)
    results = run(3)
    assert failed(results) == ["memory"]
    text = wrong_parts(results["memory"])
    alone = f"{port}: " if port != "shortcut" else "shortcut or output: "
    assert f"{alone}element [" in text
    assert f"bits {bit} of a beat of {8 * wide}" in text
    if port.startswith("input"):
        assert f"walking bits: {port}: " in text and f"addresses: {port}: " in text
        assert "weights:" not in text or "weights: input" not in text


def test_a_bit_of_the_output_that_is_stuck(device, plant):
    def make(real):
        def run_(self, first, count):
            real(self, first, count)
            if count:
                buffer, start = self.device.memory.at(self._address("output"))
                buffer.logic[start : start + 4096 : CONFIG.beat_bytes] |= 0x20
                buffer.logic[start + 4096 :][:: CONFIG.beat_bytes] |= 0x20

        return run_

    plant("_run", make)
    text = wrong_parts(run(3)["memory"])
    assert "walking bits: input0 or input1 or output: element [" in text
    assert "shortcut: shortcut or output: " in text
    assert f"bits 5 of a beat of {8 * CONFIG.beat_bytes}" in text


def test_a_port_that_reads_the_memory_of_another(device, plant):
    """As if two ports were swapped in the block design."""

    def make(real):
        def memory_of(self, name):
            if name != "shortcut":
                return real(self, name)
            tables = self._words64("tables").view(np.uint8)
            return faulty_port(self, real, name, lambda copy: copy.put(range(999), tables[:999]))

        return memory_of

    plant("_memory_of", make)
    results = run(3)
    assert failed(results) == ["memory"]
    assert "shortcut: shortcut or output: element [" in wrong_parts(results["memory"])


def idle_kernel(most):
    """A kernel that leaves its output as it was where it is to run more than `most` tasks."""

    def make(real):
        def run_(self, first, count):
            maps = {b.address: b.logic.copy() for b in self.device.memory.buffers.values()}
            real(self, first, count)
            if count > most:
                buffer, _ = self.device.memory.at(self._address("output"))
                buffer.logic[:] = maps[buffer.address]

        return run_

    return make


def test_a_kernel_that_computes_nothing(device, plant):
    """It ends, and its counters are right."""
    plant("_run", idle_kernel(most=0))
    results = run(3, 4, 5)
    assert failed(results) == ["memory", "known answers"]
    assert results["counters"].state == SKIPPED
    assert "task tiles (1 of 7): element [0, " in wrong_parts(results["known answers"])


def test_a_kernel_that_runs_one_task_only(device, plant):
    """What the tasks left one by one must not pass for the answer in one start."""
    plant("_run", idle_kernel(most=1))
    results = run(3, 4, 8)
    assert failed(results) == ["known answers", "repeats"]
    text = wrong_parts(results["known answers"])
    assert text.count("all tasks in one start: element [") == len(results["known answers"].parts)


def damaged_output(real, applies):
    """A kernel that writes a wrong byte where `applies(descriptor fields)`."""

    def run_(self, first, count):
        real(self, first, count)
        tables, half = self._words64("tables") if count else None, len(FIELDS) // 2
        for number in range(first, first + count):
            words = tables[number * half : (number + 1) * half].view(np.int32)
            fields = dict(zip(FIELDS, words.tolist(), strict=True))
            if applies(fields):
                buffer, start = self.device.memory.at(self._address("output"))
                buffer.logic[start + fields["target"] * CONFIG.beat_bytes] ^= 0x40

    return run_


def test_a_mode_that_is_wrong_is_named_with_its_task_and_element(device, plant):
    plant("_run", lambda real: damaged_output(real, lambda task: task["stride_d"] == 2))
    results = run(3, 4, 5)
    assert failed(results) == ["known answers"]
    (part,) = [part for part in results["known answers"].parts if part.state == FAILED]
    assert part.name == "every kind of layer"
    assert part.found.startswith("task strided (2 of 7): element [0, 0, 0, 0] is ")
    assert results["counters"].state == OK


def test_a_wrong_result_now_and_then(device, plant):
    counted = itertools.count()

    def applies(task):
        return task["wide"] and next(counted) == 2

    results = run(8, at={8: lambda: plant("_run", lambda real: damaged_output(real, applies))})
    assert failed(results) == ["repeats"]
    assert results["repeats"].found.startswith("run 3 of 4: element [0, 0, 0, 0] is ")


@pytest.mark.parametrize("counter", ["input_beats", "weights"])
def test_a_counter_that_differs(device, plant, counter):
    def make(real):
        def run_(self, first, count):
            real(self, first, count)
            for number in range(first, first + count):
                status = self._words64("status").reshape(-1, len(STATUS))
                status[number, STATUS.index(counter)] += np.uint64(number == 1)

        return run_

    plant("_run", make)
    results = run(3, 4, 5)
    assert failed(results) == ["counters"]
    part = results["counters"].parts[0]
    assert part.name == "every kind of layer, strided"
    name, found, modelled, wanted = part.found.replace(",", "").split()
    assert (name, modelled, int(found)) == (counter, "modelled", int(wanted) + 1)


@pytest.mark.parametrize(
    ("fault", "step", "wanted"),
    [
        ("wrong_digest", "programming", "the device is of the design"),
        ("cma_full", "memory", "not enough contiguous memory"),
        ("error_status", "memory", "reports 0xdead"),
        ("never_done", "memory", "did not finish"),
        ("interrupt_lost", "interrupts", "1 of 100 interrupts were lost"),
        ("power_cycle", "repeats", "without power while it ran"),
        ("reprogrammed", "known answers", "re-programmed"),
    ],
)
def test_a_fault_that_the_driver_reports(device, fault, step, wanted):
    number = SelfTest.steps.index(step) + 1
    later = () if number < 3 else (number,)
    results = run(*later, at={number: lambda: device.faults.append(fault)})
    assert failed(results) == [step]
    assert wanted in results[step].found + wrong_parts(results[step])


def test_a_step_that_takes_too_long(device):
    results = run(3, limit=0)
    assert results["memory"].found == "the step was stopped at its limit of 0 s"
    assert failed(results) == ["memory"]


# ---- speed and power ------------------------------------------------------------------------


def test_speed_of_a_clock(device):
    """The simulated device counts so many clock cycles for each trip of the array."""
    device.clocks_per_trip = 1.5
    result = run(6)["speed"]
    assert result.state == OK, result
    data = result.data
    clocks = sum(task["clocks"] for task in data["tasks"])
    assert data["clocks"] == clocks
    assert data["waiting"] == pytest.approx(1 / 3, abs=0.01)
    assert 1 <= data["initiation_interval"] <= 1.51
    assert "wall_seconds" not in data  # the host's time says nothing
    task = data["tasks"][1]
    seconds = task["clocks"] / (1e6 * data["clock_mhz"])
    for kind, rate in task["megabytes_per_second"].items():
        assert rate == pytest.approx(1e-6 * task["bytes"][kind] / seconds)


@pytest.mark.parametrize(
    ("rate", "wanted"), [(0.4, "one trip a cycle at most"), (9.0, "x modelled, accepted is 1.5")]
)
def test_clock_cycles_that_cannot_be_or_are_too_many(device, rate, wanted):
    device.clocks_per_trip = rate
    result = run(6)["speed"]
    assert result.state == FAILED
    assert wanted in result.found + wrong_parts(result)


def test_a_wall_clock_that_contradicts():
    program = known_answers.random_program(CONFIG, 0)
    words = np.zeros((len(program.tasks), len(STATUS)), np.uint64)
    words[:, STATUS.index("clocks")] = [
        selftest.task_time(CONFIG, program.work(task)).cycles for task in program.tasks
    ]
    seconds = int(words.sum()) / 150e6
    assert selftest._speed(program, words, 150e6, 1.2 * seconds).data["ratio"] == pytest.approx(
        1, abs=0.2
    )
    with pytest.raises(DeviceError, match="the kernel has another clock"):
        selftest._speed(program, words, 150e6, 0.5 * seconds)


def test_a_board_must_count_clock_cycles(device, monkeypatch):
    monkeypatch.setattr(selftest, "simulation_requested", lambda: False)
    result = run(6)["speed"]
    assert (result.state, result.found) == (FAILED, "the kernel counts no clock cycles")


def test_power(device, monkeypatch):
    monkeypatch.setattr(selftest, "simulation_requested", lambda: False)
    monkeypatch.setattr(selftest, "POWER_SECONDS", 0.05)
    monkeypatch.setattr(selftest, "find_rails", dict)
    result = run(9)["power"]
    assert (result.state, result.found) == (SKIPPED, "no sensors of supply rails here")
    rails = {"VCCINT": lambda: 1.5, "VCC1V2": lambda: 0.25}
    monkeypatch.setattr(selftest, "find_rails", lambda: rails)
    result = run(9)["power"]
    assert result.state == OK
    assert result.found == "2 rails read at rest and at work (measured)"
    assert result.parts[0].found == "1.500 W at rest, 1.500 W at work"
    assert result.data["work_watts"] == {"VCCINT": 1.5, "VCC1V2": 0.25}

    def broken():
        raise OSError("Remote I/O error")

    rails["VCCINT"] = broken
    result = run(9)["power"]
    assert result.state == FAILED and "Remote I/O error" in result.found


# ---- pynq's own device ------------------------------------------------------------------------


@on_fake_board
def test_on_the_device_of_pynq():
    """Nothing is simulated as far as pynq and the package know: all but the power is tested."""
    folder, hardware = fake_xrt.folder(), fake_xrt.board()
    fake_xrt.write_overlay(folder / "overlay", CONFIG)
    hardware.clocks_per_trip = 1.5
    files = {"image": b"ZCU102\0", "meminfo": b"CmaTotal: 524288 kB\nCmaFree: 524288 kB\n"}
    for name, text in files.items():
        (folder / name).write_bytes(text)
    machine.IMAGE, machine.MEMORY = folder / "image", folder / "meminfo"
    machine.FIRMWARE = fake_xrt.place(machine.FIRMWARE)
    machine.MANAGER = fake_xrt.place(machine.MANAGER)
    test = SelfTest(CONFIG, folder / "overlay", repeats=2)
    results = {result.name: result for result in test.run()}
    wanted = {**ALL_RIGHT, "speed": OK}
    assert {name: result.state for name, result in results.items()} == wanted, results
    parts = {part.name: part.state for part in results["machine"].parts}
    assert set(parts.values()) == {OK}, results["machine"]
    parts = {part.name: part.state for part in results["memory"].parts}
    assert parts["cached"] == OK
    assert results["speed"].data["wall_seconds"] > 0
    assert results["interrupts"].data["interrupt_seconds"] > 0
    assert hardware.downloads == 2


def test_without_an_interrupt_the_step_is_skipped(device):
    device.interrupt = False
    result = run(7)["interrupts"]
    assert result.state == SKIPPED
    assert result.found.startswith("runs are polled")
