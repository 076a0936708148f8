"""The board backend over pynq's own EmbeddedDevice, on a board made of Python (`fake_xrt`)."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import fake_xrt
import numpy as np
import pytest
from fake_xrt import on_fake_board
from networks import Net, compiled, random_codes
from reference import run_program

pynq = pytest.importorskip("pynq", reason="pynq is not installed: the board backend is not tested")

import test_board  # noqa: E402
from pynq.overlay import DefaultIP  # noqa: E402

from pynq_kgrc.accelerator.config import preset  # noqa: E402
from pynq_kgrc.backends.base import open_backend  # noqa: E402
from pynq_kgrc.backends.board.backend import BoardBackend  # noqa: E402
from pynq_kgrc.backends.board.kernel import KgrcIp  # noqa: E402
from pynq_kgrc.errors import DeviceError  # noqa: E402
from pynq_kgrc.runtime import Session  # noqa: E402


def made():
    """A small program; its overlay is the board's."""
    net = Net(size=(3, 6, 7))
    net.dense(net.pool(net.conv(net.conv("clip", 6), 9)), 5)
    program = compiled(net)[0]
    supply_overlay(program.config)
    return program


def supply_overlay(config):
    folder = fake_xrt.folder() / "overlay"
    if not folder.is_dir():
        fake_xrt.write_overlay(folder, config)
    os.environ["KGRC_OVERLAY"] = str(folder)


def check_answers(board, program):
    board.load(program)
    last = program.tasks[-1]
    for seed in (0, 1):
        codes = random_codes(program, seed)
        board.write(program.source, codes)
        board.run()
        found = board.read(program.target, last.shape.out_channels, last.out_size)
        np.testing.assert_array_equal(found, run_program(program, codes)[last.name])


@on_fake_board
def test_programs_allocates_and_answers():
    program, hardware = made(), fake_xrt.board()
    for cacheable in (False, True):
        with BoardBackend(program.config, cacheable=cacheable) as board:
            assert type(board._device).__name__ == "EmbeddedDevice"
            assert hardware.downloads == 1 == len(hardware.loaded), "programmed once"
            check_answers(board, program)
            assert board._interrupts
            assert len(hardware.memory.buffers) == 4
            for held in hardware.memory.buffers.values():
                assert (held.host is held.logic) != cacheable
        assert not hardware.memory.buffers
    with BoardBackend(program.config, download=False) as board:
        assert hardware.downloads == 1
        check_answers(board, program)
    shape = (program.clip.frames, program.clip.height, program.clip.width, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    with Session(program, "emulate") as emulated, Session(program, "board") as board:
        assert board.classify(frames).labels == emulated.classify(frames).labels
        np.testing.assert_array_equal(board.run(frames).logits, emulated.run(frames).logits)


@on_fake_board
def test_opened_first_in_a_thread_after_asyncio_run_and_inside_a_loop():
    """pynq makes its device when it is first asked for, and asks asyncio for an event loop then."""
    program = made()

    def use():
        with open_backend("board", program.config) as board:
            check_answers(board, program)

    def in_a_thread():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(use).result()

    async def cell():
        use()

    for first in (in_a_thread, lambda: asyncio.run(asyncio.sleep(0)), lambda: asyncio.run(cell())):
        child = os.fork()  # a process in which pynq has no device yet
        if not child:
            with contextlib.suppress(BaseException):
                first()
                use()
                os._exit(0)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, first


@on_fake_board
def test_pynq_binds_the_driver_by_its_entry_point():
    made()
    overlay = pynq.Overlay(str(fake_xrt.folder() / "overlay" / "kgrc.bit"))
    assert type(overlay.kgrc_run_0) is KgrcIp is not DefaultIP
    assert overlay.is_loaded()
    assert abs(pynq.Clocks.fclk0_mhz - 150) < 0.1


@on_fake_board
def test_logic_that_is_empty_is_not_touched():
    """On a board an access to a register of logic that is not there may hang the processor."""
    program, hardware = made(), fake_xrt.board()
    hardware.has_uio = False
    with pytest.raises(DeviceError):
        BoardBackend(program.config, download=False)
    assert not hardware.touched_empty
    assert not hardware.downloads
    with BoardBackend(program.config) as board:
        check_answers(board, program)
        assert not board._interrupts, "it polls without a UIO device"


HOLDER = """
import sys, time, fake_xrt
fake_xrt.install()
import test_board_xrt
program = test_board_xrt.made()
board = test_board_xrt.BoardBackend(program.config, download=sys.argv[1] == "download")
test_board_xrt.check_answers(board, program)
print("ready", fake_xrt.board().downloads, flush=True)
time.sleep(120)
"""


@on_fake_board
def test_two_processes():
    """One drives the device at a time; the next finds what the one before it programmed."""
    program, hardware = made(), fake_xrt.board()
    for download, wanted in (("download", "ready 1\n"), ("attach", "ready 0\n")):
        holder = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", HOLDER, download],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert holder.stdout.readline() == wanted
            with pytest.raises(DeviceError, match=rf"in use by process {holder.pid};"):
                BoardBackend(program.config)
            assert not hardware.downloads
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait(30)
            holder.stdout.close()
    with BoardBackend(program.config) as board:
        check_answers(board, program)


@on_fake_board
def test_a_forked_child():
    """It is refused, frees nothing, and does not hold the device once its parent has closed it."""
    program = made()
    board = BoardBackend(program.config)
    check_answers(board, program)
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(tell)
        try:
            board.run()
        except DeviceError:
            board.close()
            os.read(told, 1)  # until the parent has reopened the board
            os._exit(len(fake_xrt.board().memory.buffers))
        os._exit(99)
    check_answers(board, program)
    board.close()
    with BoardBackend(program.config) as board:
        check_answers(board, program)
    os.close(tell)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("network", ["c3d", "r2plus1d_18", "i3d"])
@on_fake_board
def test_whole_networks(network):
    """What `test_board` compares on the simulated device, here on pynq's own."""
    supply_overlay(preset("8-sparse"))
    test_board.test_whole_networks(network)
