"""The board backend over pynq's own EmbeddedDevice, on a board made of Python (`fake_xrt`)."""

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import fake_xrt
import numpy as np
import pytest
from fake_xrt import on_fake_board
from networks import Net, compiled, random_codes
from reference import run_program

pynq = pytest.importorskip("pynq", reason="pynq is not installed: the board backend is not tested")

from pynq_kgrc.backends.board.backend import BoardBackend  # noqa: E402
from pynq_kgrc.errors import DeviceError  # noqa: E402


def made():
    net = Net(size=(3, 6, 7))
    net.dense(net.pool(net.conv(net.conv("clip", 6), 9)), 5)
    program = compiled(net)[0]
    overlay = Path(os.environ[fake_xrt.FOLDER]) / "overlay"
    if not overlay.is_dir():
        fake_xrt.write_overlay(overlay, program.config)
    return program, overlay


def opened(program, overlay, **options):
    return BoardBackend(program.config, overlay, **options)


def check_answer(board, program, seed=0):
    codes, last = random_codes(program, seed), program.tasks[-1]
    board.write(program.source, codes)
    board.run()
    found = board.read(program.target, last.shape.out_channels, last.out_size)
    np.testing.assert_array_equal(found, run_program(program, codes)[last.name])


@on_fake_board
def test_first():
    program, overlay = made()
    with opened(program, overlay) as board:
        board.load(program)
        check_answer(board, program)
        print(board.describe())
