"""Threads and processes that share the emulation's work: same codes, no process lost or left."""

import fcntl
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from networks import Net, compiled, random_codes, small_config
from reference import run_program

from pynq_kgrc.backends.cores import available_cores
from pynq_kgrc.backends.emulation import backend as engine
from pynq_kgrc.backends.emulation import choice, crew
from pynq_kgrc.backends.emulation.backend import Emulation
from pynq_kgrc.errors import DeviceError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="processes are forked on Linux only"
)


def children():
    """Process ids of the children of this process that were not reaped yet."""
    lists = Path("/proc/self/task").glob("*/children")
    return {int(child) for file in lists for child in file.read_text().split()}


def ends(process, seconds=20.0):
    """Whether a process ends within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":  # a zombie: it has ended and was not reaped
            return True
        time.sleep(0.02)
    return False


def a_program(bits=8):
    """Winograd and GEMM layers, a shortcut, pools within a tile, across tiles and as a task."""
    net = Net(size=(3, 6, 6))
    first = net.conv(net.conv("clip", 16), 24)
    joined = net.add(first, net.conv(first, 24, (1, 3, 3), pad=(0, 1, 1)))
    pooled = net.pool(net.conv(joined, 18), (1, 3, 2))
    net.conv(net.pool(pooled, 3, stride=1, pad=1), 9, 1, pad=0)
    return compiled(net, small_config(bits))[0]


@pytest.fixture(scope="module")
def program():
    return a_program()


@pytest.fixture(autouse=True)
def memory_traffic_is_free(monkeypatch):
    """So that small convolutions use Winograd, too."""
    monkeypatch.setattr(choice, "ELEMENT_COST", 0)
    monkeypatch.setattr(choice, "WEIGHT_COST", 0)


def run(emulation, program, seed=0):
    codes = random_codes(program, seed)
    emulation.write(program.source, codes)
    emulation.run()
    last = program.tasks[-1]
    found = emulation.read(last.target, last.shape.out_channels, last.out_size)
    np.testing.assert_array_equal(found, run_program(program, codes)[last.name])


def run_often(emulation):
    """So often that every process gets a job."""
    for _ in range(100):
        emulation.run()


@pytest.fixture
def team(program):
    emulation = Emulation(program.config, cores=2, fork=True)
    before = children()
    emulation.load(program)
    (emulation.child,) = children() - before
    yield emulation
    emulation.close()
    assert not children() - before


@pytest.mark.parametrize("fork", [True, False])
@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_any_number_of_cores_gives_the_same_codes(bits, cores, fork):
    program = a_program(bits)
    before = children()
    emulation = Emulation(program.config, cores=cores, fork=fork)
    emulation.load(program)
    convolutions = [step for step in emulation._steps if isinstance(step, engine.ConvStep)]
    assert len({type(step.convolution) for step in convolutions}) == 2
    assert {step.pools_sums for step in convolutions} == {True, False}
    assert len(children() - before) == (cores - 1 if fork else 0)
    for seed in range(3):
        run(emulation, program, seed)
    emulation.close()
    assert not children() - before


def test_each_job_is_done_once():
    """More jobs than processes, fewer, and none."""
    counts = (100, 1, 0, 2, 7)
    done = crew.shared_array(8 * sum(counts)).view(np.int64)

    class Count:
        def run(self, parallel_for):
            start = 0
            for count in counts:
                parallel_for(self.note, range(start, start + count))
                start += count

        def note(self, job):
            time.sleep(0.001)
            done[job] += os.getpid()

    step = Count()
    team = crew.ProcessCrew([step], 3)
    team.begin(0, 1)
    step.run(team.parallel_for)
    forked = set(team._children)
    team.close()
    assert set(done.tolist()) <= forked | {os.getpid()}
    assert len(set(done[:100].tolist())) > 1


def test_a_second_load_replaces_the_children(team):
    run(team, team.program)
    other = a_program(8)
    first = team.child
    team.load(other)
    assert ends(first)
    run(team, other)


@pytest.mark.parametrize("when", ["before a run", "in a run"])
def test_a_killed_process_is_an_error_and_the_next_run_is_right(team, program, monkeypatch, when):
    run(team, program)
    if when == "before a run":
        os.kill(team.child, signal.SIGKILL)
        assert ends(team.child)
    else:
        parallel_for = crew.ProcessCrew.parallel_for

        def deadly(self, work, jobs):
            os.kill(team.child, signal.SIGKILL)
            parallel_for(self, work, jobs)

        monkeypatch.setattr(crew.ProcessCrew, "parallel_for", deadly)
    with pytest.raises(
        DeviceError, match=f"lost a child process: process {team.child} has ended.*cores=1"
    ):
        team.run()
    monkeypatch.undo()
    run(team, program)


def test_a_process_that_hangs_is_an_error(team, program, monkeypatch):
    monkeypatch.setattr(crew, "STALL_SECONDS", 0.5)
    os.kill(team.child, signal.SIGSTOP)
    with pytest.raises(DeviceError, match=r"lost a child process: no answer in 0\.5 s"):
        team.run()
    run(team, program)


def test_a_fault_in_a_process_is_printed_and_an_error_here(program, monkeypatch, capfd):
    ours = os.getpid()
    store = engine.ConvStep._store

    def faulty(self, *arguments):
        if os.getpid() != ours:
            raise ZeroDivisionError("planted")
        store(self, *arguments)

    monkeypatch.setattr(engine.ConvStep, "_store", faulty)
    emulation = Emulation(program.config, cores=2, fork=True)
    emulation.load(program)
    with pytest.raises(DeviceError, match="has ended"):
        run_often(emulation)
    emulation.close()
    assert "ZeroDivisionError: planted" in capfd.readouterr().err


def test_an_interrupted_run_ends_the_children(team, program, monkeypatch):
    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        engine.ConvStep, "_store", interrupted
    )  # in this process only: the child was forked before
    with pytest.raises(KeyboardInterrupt):
        run_often(team)
    assert ends(team.child)
    monkeypatch.undo()
    run(team, program)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_children_ignore_sigint_and_sigterm(team, program, number):
    """Ctrl-C and the stop of a service reach all processes; the parent decides."""
    os.kill(team.child, number)
    time.sleep(0.2)
    run(team, program)
    assert team.child in children()


def test_cores_are_counted_where_linux_is_not(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == os.cpu_count()
    assert not crew.may_fork()


def test_children_end_when_the_emulation_is_garbage_collected(program):
    before = children()
    emulation = Emulation(program.config, cores=3, fork=True)
    emulation.load(program)
    started = children() - before
    del emulation
    gc.collect()
    assert len(started) == 2
    assert all(map(ends, started))


def test_children_end_when_the_parent_is_killed(program, tmp_path):
    path = tmp_path / "small.kgrc"
    program.save(path)
    code = (
        "import sys, time\n"
        "from pynq_kgrc.backends.emulation.backend import Emulation\n"
        "from pynq_kgrc.program import load\n"
        "program = load(sys.argv[1])\n"
        "emulations = [Emulation(program.config, cores=2, fork=True) for _ in range(2)]\n"
        "for emulation in emulations: emulation.load(program)\n"
        "print(*[e._crew._children[0] for e in emulations], flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
    forked = list(map(int, parent.stdout.readline().split()))
    parent.kill()
    parent.wait(20)
    parent.stdout.close()
    assert len(forked) == 2
    assert all(map(ends, forked))


def test_children_close_inherited_files(program):
    """Else a connection that the parent closes would stay open."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    sockets[1].close()  # so that the pipe may get a number between two sockets
    emulation = Emulation(program.config, cores=2, fork=True)
    before = children()
    emulation.load(program)
    (other,) = children() - before
    run(emulation, program)  # the child has closed them before its first step
    held = {os.readlink(f"/proc/{other}/fd/{fd}") for fd in os.listdir(f"/proc/{other}/fd")}
    assert not [name for name in held if name.startswith("socket")]
    emulation.close()
    for one in sockets:
        one.close()


def test_a_pipe_above_the_limit_of_select(program, monkeypatch):
    pipe, (soft, hard) = os.pipe, resource.getrlimit(resource.RLIMIT_NOFILE)

    def high_pipe():
        theirs, ours = pipe()
        high = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 1100)
        os.close(theirs)
        return high, ours

    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    monkeypatch.setattr(os, "pipe", high_pipe)
    emulation = Emulation(program.config, cores=2, fork=True)
    emulation.load(program)
    run(emulation, program)
    emulation.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_with_threads_is_not_forked():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    alone = crew.may_fork()
    thread.start()
    assert not crew.may_fork()
    stop.set()
    thread.join()
    assert crew.may_fork() is alone


def test_threads_replace_processes_if_fork_fails(program, monkeypatch):
    def refused():
        raise BlockingIOError(11, "planted")

    monkeypatch.setattr(os, "fork", refused)
    before = children()
    emulation = Emulation(program.config, cores=2, fork=True)
    emulation.load(program)
    run(emulation, program)
    emulation.close()
    assert children() == before


def test_a_small_program_runs_on_one_core(program):
    emulation = Emulation(program.config)
    emulation.load(program)
    assert emulation.cores == 1
    emulation.close()
