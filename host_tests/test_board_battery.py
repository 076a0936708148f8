"""What the board backend makes of a device that fails: in each operation, at each call.

The judge is the reference (`reference.py`). Two devices are judged: the simulated one, and pynq's
own EmbeddedDevice over a board made of Python (`fake_xrt`). Each runs in a process of its own.

``python host_tests/test_board_battery.py`` prints the table of both, of the installed pynq.
"""

import argparse
import asyncio
import functools
import gc
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import fake_xrt
import numpy as np
import pytest
from networks import Net, compiled, random_codes
from reference import run_program

if os.environ.get(fake_xrt.FOLDER):
    fake_xrt.install()
pynq = pytest.importorskip("pynq", reason="pynq is not installed: the board backend is not tested")

from pynq.buffer import PynqBuffer  # noqa: E402
from pynq.interrupt import Interrupt  # noqa: E402

from pynq_kgrc.backends.board import simulated  # noqa: E402
from pynq_kgrc.backends.board.backend import BoardBackend  # noqa: E402
from pynq_kgrc.backends.board.lock import DeviceLock, lock_path  # noqa: E402
from pynq_kgrc.errors import DeviceError, KgrcError, ProgramError  # noqa: E402

DEVICES = ("simulated", "fake XRT")
ERRORS = (RuntimeError, OSError, KeyboardInterrupt)
QUICK = dict(floor_seconds=0.05, margin=1.0)
"""Short timeouts: the kernel behind both devices has computed before the driver begins to wait."""

WAIT = 2e-2
"""Seconds from a start to its end where the waiting itself shall fail; else 0."""


# ---- a call that fails ------------------------------------------------------------------------


class Fuse:
    """Fails the call number `at` of one operation of the device, once."""

    def __init__(self, owner, name):
        self.calls = self.at = 0
        self.error, self.fired = RuntimeError, False
        real = getattr(owner, name)

        def call(*arguments, **named):
            if sys._getframe(1).f_code.co_name != "__del__":  # Python ignores what is raised there
                self.count()
            return real(*arguments, **named)

        async def wait(*arguments, **named):
            self.count()
            return await real(*arguments, **named)

        setattr(owner, name, wait if asyncio.iscoroutinefunction(real) else call)

    def arm(self, at, error):
        """Let the call number `at` from now on raise; 0: none, but count them."""
        self.calls, self.at, self.error, self.fired = 0, at, error, False

    def count(self):
        self.calls += 1
        if self.calls == self.at:
            self.fired = True
            raise self.error("injected")


def fuses(hardware):
    """A fuse in each operation of the device."""
    simulated_one = not hasattr(hardware, "program_from_firmware")
    kind = type(hardware)
    return {
        "allocate": Fuse(simulated.Memory if simulated_one else kind, "allocate"),
        "register read": Fuse(kind, "read_registers"),
        "register write": Fuse(kind, "write_registers"),
        "flush": Fuse(kind, "flush" if simulated_one else "sync_to_device"),
        "invalidate": Fuse(kind, "invalidate" if simulated_one else "sync_from_device"),
        "free": Fuse(PynqBuffer, "freebuffer"),
        "download": Fuse(kind, "download" if simulated_one else "program_from_firmware"),
        "wait": Fuse(Interrupt, "wait"),
    }


# ---- a user of the board ----------------------------------------------------------------------


class WrongAnswer(AssertionError):
    pass


def program_of(filters, size=(3, 6, 7), seed=0):
    net = Net(size=size, seed=seed)
    net.dense(net.pool(net.conv(net.conv("clip", filters), 9)), 5)
    return compiled(net)[0]


@functools.cache
def programs():
    """Two programs of one layout, and one that needs larger buffers; their clips and answers."""
    made = [program_of(6), program_of(6, seed=1), program_of(20, (5, 12, 12), seed=2)]
    return [
        (
            program,
            [
                (codes, run_program(program, codes)[program.tasks[-1].name])
                for codes in (random_codes(program, seed) for seed in (0, 1))
            ],
        )
        for program in made
    ]


class User:
    """Who opens a board, loads programs and classifies clips, and compares each answer."""

    backend = BoardBackend

    def __init__(self, device, overlay):
        self.device, self.overlay = device, overlay
        self.board = None
        self.step = None
        """What was called last: `write`, `run`, `read` or None."""
        self.wanted = None
        """The answer of the clip that was given to `write` last."""

    def open(self):
        self.board = self.backend(
            programs()[0][0].config, self.overlay, device=self.device, cacheable=True, **QUICK
        )

    def load(self, number):
        self.step = None
        self.board.load(programs()[number][0])

    def write(self, number, clip):
        program, clips = programs()[number]
        self.step, (codes, self.wanted) = "write", clips[clip]
        self.board.write(program.source, codes)

    def run(self):
        self.step = "run"
        self.board.run()

    def read(self):
        self.step = "read"
        program = self.board.program
        last = program.tasks[-1]
        found = self.board.read(program.target, last.shape.out_channels, last.out_size)
        if not np.array_equal(found, self.wanted):
            raise WrongAnswer

    def classify(self, number, clip):
        self.write(number, clip)
        self.run()
        self.read()

    def loaded(self):
        """The number of the loaded program; None if there is none."""
        try:
            program = self.board.program
        except ProgramError:
            return None
        return next(number for number, (made, _) in enumerate(programs()) if made is program)

    def play(self):
        """The whole scenario, on a device that is not known to hold our overlay already."""
        vars(self.device).pop("kgrc_overlay", None)
        self.open()
        self.load(0)
        self.classify(0, 0)
        self.classify(0, 1)
        self.load(1)
        self.classify(1, 0)
        self.classify(1, 1)
        self.load(2)
        self.board.close()


@dataclass
class Outcome:
    """What came of one failing call."""

    operation: str
    call: int
    error: str
    ended: str = "went on"
    """typed, went on (no error, and every answer was right), untyped or wrong."""
    leaked: int = 0
    text: str = ""
    wrong: list[str] = field(default_factory=list)
    """Answers that were wrong, and calls that did not do what the documentation of Backend says."""


def attempt(outcome, what, call, allowed=()):
    """Make a call after the failure; what it raises beyond `allowed` is noted. True if it ends."""
    try:
        call()
    except allowed:
        return False
    except BaseException as error:
        outcome.wrong.append(f"{what}: {type(error).__name__} {error}"[:200])
        return False
    return True


def fail_once(device, hardware, overlay, fuse, outcome):
    """Play the scenario with an armed fuse, then judge what is left. False: it was not hit."""
    user = User(device, overlay)
    wanted = KeyboardInterrupt if fuse.error is KeyboardInterrupt else DeviceError
    try:
        user.play()
    except WrongAnswer:
        outcome.ended = "wrong"
        outcome.wrong.append("an answer of the scenario is wrong")
    except wanted as error:
        outcome.ended, outcome.text = "typed", str(error)[:120]
    except BaseException as error:
        outcome.ended = "untyped"
        outcome.text = f"{type(error).__name__}: {error}"[:120]
    fuse.at = 0
    if not fuse.fired:
        return False
    if user.board is not None:
        if user.board._resources.overlay is not None:
            recover(user, outcome)
        attempt(outcome, "close", user.board.close)
    del user
    gc.collect()
    outcome.leaked = len(hardware.memory.buffers)
    hardware.memory.buffers.clear()
    if not attempt(outcome, "lock", lambda: DeviceLock(device.tag).release()):
        close_lock(device.tag)
    user = User(device, overlay)
    attempt(outcome, "a new board", lambda: (user.open(), user.load(0), user.classify(0, 0)))
    if user.board is not None:
        user.board.close()
    return True


def recover(user, outcome):
    """Go on with the same board, as the documentation of Backend says."""
    number, refused = user.loaded(), (DeviceError, ProgramError)
    # without another write: the answer of the clip that was given to it, or an error
    goes_on = user.step != "write" or attempt(outcome, "run after a write", user.run, refused)
    if user.step is not None and goes_on:
        attempt(outcome, f"read after {user.step}", user.read, refused)
    if number is not None:
        attempt(outcome, "write, run, read", lambda: user.classify(number, 1))
    attempt(outcome, "load, write, run, read", lambda: (user.load(0), user.classify(0, 0)))


def close_lock(tag):
    """Close the files of a lock that nothing releases any more."""
    for file in Path("/proc/self/fd").iterdir():
        if file.is_symlink() and os.readlink(file) == str(lock_path(tag)):
            os.close(int(file.name))


# ---- the battery and the storm ----------------------------------------------------------------


def open_device(name):
    """(pynq's device, the hardware behind it, the overlay) of the process."""
    gc.freeze()  # each failing call is followed by a collection
    config = programs()[0][0].config
    if name == "simulated":
        device = simulated.SimulatedDevice(tag=f"battery-{os.getpid()}")
        pynq.Device.active_device = device
        return device, device, None
    folder = fake_xrt.folder() / "overlay"
    fake_xrt.write_overlay(folder, config)
    from pynq.pl_server import embedded_device  # only where XILINX_XRT is set

    # beside the .bit, so that pynq does not run xclbinutil for each board that is opened
    (folder / "kgrc.xclbin").write_bytes(embedded_device._create_xclbin({}))
    return pynq.Device.active_device, fake_xrt.board(), folder


def battery(name, sample=None, only=None):
    """Fail each call of each operation with each error, or `sample` calls of each with one."""
    device, hardware, overlay = open_device(name)
    armed = fuses(hardware)
    kinds = itertools.cycle(ERRORS)
    found = []
    for operation in armed if only is None else only:
        fuse = armed[operation]
        hardware.latency = WAIT if operation == "wait" else 0.0
        fuse.arm(0, RuntimeError)
        User(device, overlay).play()
        calls = fuse.calls
        assert calls, f"the scenario has no {operation}"
        if sample is None:
            chosen = [(call, error) for error in ERRORS for call in range(1, calls + 1)]
        else:
            places = np.unique(np.linspace(1, calls, sample).round().astype(int))
            chosen = [(int(call), next(kinds)) for call in places]
        for call, error in chosen:
            for _ in range(2):  # after a wait that failed, pynq may miss an interrupt: fewer waits
                outcome = Outcome(operation, call, error.__name__)
                fuse.arm(call, error)
                if fail_once(device, hardware, overlay, fuse, outcome):
                    found.append(outcome)
                    break
    return found


def storm(name, runs, seed):
    """Clips, loads and new boards at random, with failing calls and simulated faults at random."""
    rng = np.random.default_rng(seed)
    device, hardware, overlay = open_device(name)
    armed = list(fuses(hardware).values())
    threads, counts = threading.active_count(), Counter()
    user = User(device, overlay)

    def calm():
        hardware.faults, hardware.latency = [], 0.0
        for fuse in armed:
            fuse.arm(0, RuntimeError)

    for _ in range(runs):
        calm()
        hardware.latency = float(rng.choice([0, 0, 2e-3, 1e-2]))
        if rng.random() < 0.4:
            fuse = armed[rng.integers(len(armed))]
            fuse.arm(int(rng.integers(1, 40)), ERRORS[rng.integers(2)])
        if rng.random() < 0.3:
            hardware.faults = [str(rng.choice(simulated.FAULTS))]
        try:
            if user.board is None:
                user.open()
            if user.loaded() is None or rng.random() < 0.2:
                user.load(int(rng.integers(3)))
            user.classify(user.loaded(), int(rng.integers(2)))
            counts["right"] += 1
        except WrongAnswer:
            counts["wrong"] += 1
        except KgrcError:
            counts["typed"] += 1
        except Exception as error:
            counts[f"untyped: {type(error).__name__}: {error}"[:120]] += 1
        if user.board is not None and rng.random() < 0.05:
            calm()
            user.board.close()
            user.board = None
            gc.collect()
            counts["leaked"] += len(hardware.memory.buffers)
    calm()
    if user.board is None:
        user.open()
    user.load(0)
    user.classify(0, 0)
    user.board.close()
    del user
    gc.collect()
    counts["leaked"] += len(hardware.memory.buffers)
    counts["threads"] = threading.active_count() - threads
    DeviceLock(device.tag).release()
    return counts


def in_a_process(name, *arguments):
    """What `main` finds in a process that has the device of that name."""
    command = [__file__, "--device", name, *map(str, arguments)]
    if name == "simulated":
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *command],
            env={**os.environ, "PYTHONPATH": str(fake_xrt.HERE.parent)},
            capture_output=True,
            text=True,
        )
    else:
        done = fake_xrt.run_on_board(command)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def table(found):
    """Markdown: what came of the failing calls, by operation."""
    lines = [
        "| operation | calls | failed | typed | went on | untyped | leaked | wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for operation in dict.fromkeys(outcome["operation"] for outcome in found):
        mine = [outcome for outcome in found if outcome["operation"] == operation]
        ended = Counter(outcome["ended"] for outcome in mine)
        calls = max(outcome["call"] for outcome in mine)
        cells = (operation, calls, len(mine), *(ended[k] for k in ("typed", "went on", "untyped")))
        leaked, wrong = (sum(bool(outcome[k]) for outcome in mine) for k in ("leaked", "wrong"))
        lines.append(f"| {' | '.join(map(str, (*cells, leaked, wrong)))} |")
    return "\n".join(lines)


# ---- tests ------------------------------------------------------------------------------------


def bad(outcome):
    """Whether a call that failed has left anything that it should not."""
    known = outcome["ended"] in ("typed", "went on")
    return not known or outcome["leaked"] or outcome["wrong"]


@functools.cache
def sampled(name):
    """A sample of the battery and a small storm, in one process."""
    return in_a_process(name, "--sample", 4, "--storm", 30, 7)


@pytest.mark.parametrize("name", DEVICES)
def test_a_sample_of_failing_calls(name):
    found = sampled(name)["calls"]
    assert not list(filter(bad, found))
    assert len({outcome["operation"] for outcome in found}) == 8
    assert Counter(outcome["ended"] for outcome in found)["typed"] >= 15


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", DEVICES)
def test_every_failing_call(name):
    found = in_a_process(name)["calls"]
    assert not list(filter(bad, found))
    assert {outcome["error"] for outcome in found} == {error.__name__ for error in ERRORS}
    assert Counter(outcome["ended"] for outcome in found)["typed"] >= 700


def test_the_judge_sees_a_driver_that_is_broken():
    chosen = ("--only", "flush", "invalidate", "--sample", 7)
    found = in_a_process("simulated", "--broken", *chosen)["calls"]
    told = " ".join(str(outcome["wrong"]) for outcome in found)
    assert "read after run: WrongAnswer" in told
    assert "lock: DeviceError" in told
    assert any(outcome["leaked"] for outcome in found)
    assert any(outcome["ended"] == "untyped" for outcome in found)


class Broken(BoardBackend):
    """Keeps a clip that it could not write, keeps the device then, and lets errors through."""

    def write(self, slot, codes):
        try:
            super().write(slot, codes)
        except BaseException:
            self._maps_lost = None
            KEPT.append(self)
            raise

    def read(self, *arguments):
        try:
            return super().read(*arguments)
        except DeviceError as error:
            raise RuntimeError("planted") from error

    def close(self):
        if self not in KEPT:
            super().close()


KEPT = []


def check_storm(counts, least):
    assert set(counts) <= {"right", "typed", "leaked", "threads"}, counts
    assert counts["leaked"] == counts["threads"] == 0
    assert min(counts["right"], counts["typed"]) >= least


@pytest.mark.parametrize("name", DEVICES)
def test_a_small_storm(name):
    check_storm(sampled(name)["storm"], least=5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", DEVICES)
def test_a_storm(name, seed):
    found = in_a_process(name, "--only", "--storm", 1000, seed)
    check_storm(found["storm"], least=100)


def main():
    logging.disable(logging.CRITICAL)
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=DEVICES)
    parser.add_argument("--sample", type=int)
    parser.add_argument("--storm", type=int, nargs=2, metavar=("RUNS", "SEED"))
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--broken", action="store_true")
    chosen = parser.parse_args()
    if chosen.broken:
        User.backend = Broken
    if chosen.device:
        calls = battery(chosen.device, chosen.sample, chosen.only)
        found = {"calls": [vars(outcome) for outcome in calls]}
        if chosen.storm:
            found["storm"] = storm(chosen.device, *chosen.storm)
        print(json.dumps(found))
    else:
        for name in DEVICES:
            sample = ("--sample", chosen.sample) if chosen.sample else ()
            found = in_a_process(name, *sample)["calls"]
            print(f"\n{name}, pynq {pynq.__version__}:\n\n{table(found)}\n")
            for outcome in found:
                if bad(outcome):
                    print(outcome)


if __name__ == "__main__":
    main()
