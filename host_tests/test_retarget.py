"""A program for another design from the program alone: the same codes, checked, nothing lost."""

import numpy as np
import pytest
from networks import Net, compiled, small_config

from pynq_kgrc.accelerator.config import preset
from pynq_kgrc.compiler.retarget import retarget
from pynq_kgrc.errors import CompileError
from pynq_kgrc.files import shipped_programs
from pynq_kgrc.program import load
from pynq_kgrc.runtime import Session


@pytest.fixture(scope="module")
def net():
    """A pool, a concat and a shortcut, with pruned weights."""
    net = Net(size=(4, 8, 8))
    first = net.conv("clip", 16, kept=0.4)
    pooled = net.pool(first, 2, 2)
    left, right = net.conv(pooled, 8, kept=0.3), net.conv(pooled, 16, kernel=1, pad=0)
    joined = net.concat(left, right)
    added = net.add(net.conv(joined, 24, act="none"), joined)
    net.conv(added, 5, kernel=(2, 4, 4), pad=0, act="none")
    return net


def test_to_its_own_design_it_is_the_same_file(net, tmp_path):
    for i, program in enumerate([compiled(net)[0], *map(load, shipped_programs())]):
        program.save(tmp_path / f"{i}.kgrc")
        retarget(program, program.config).save(tmp_path / "again.kgrc")
        assert (tmp_path / "again.kgrc").read_bytes() == (tmp_path / f"{i}.kgrc").read_bytes()


@pytest.mark.parametrize(
    "numbers",
    [{"beat": 8, "pf": 9}, {"tn": 8}, {"sparse": False}, {"gm": 8, "pm": 8}],
    ids=str,
)
def test_every_code_is_the_same(net, numbers):
    program, _ = compiled(net)
    found = retarget(program, small_config(**numbers))
    assert found.config != program.config
    frames = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    with Session(program) as before, Session(found) as after:
        for (name, codes, _), (same, others, _) in zip(
            before.trace(frames), after.trace(frames), strict=True
        ):
            assert name == same
            np.testing.assert_array_equal(others, codes, name)


def test_the_shipped_program_on_the_recommended_design():
    """Buffers are laid out for the longer beats of the design; the emulation runs its plan."""
    (shipped,) = shipped_programs()
    program = load(shipped)
    found = retarget(program, preset("8-zcu102"))
    assert found.labels == program.labels
    spans = [(b.offset, b.offset + b.nbytes(found.config)) for b in found.buffers]
    assert max(end for _, end in spans) == found.arena_bytes
    for task in found.tasks:
        read, written = spans[task.source.buffer], spans[task.target.buffer]
        assert read[1] <= written[0] or written[1] <= read[0], task.name


def test_what_does_not_fit(net):
    program, _ = compiled(net)
    with pytest.raises(CompileError, match=r"has codes of 8 bits, 16-sparse works on 16"):
        retarget(program, preset("16-sparse"))
    with pytest.raises(CompileError, match=r"does not fit small-8: .*modulo the width of its pool"):
        retarget(compiled(pooled_by_four())[0], small_config(beat=1, tn=8))


def pooled_by_four():
    net = Net(size=(4, 8, 8))
    first = net.conv("clip", 16)
    pooled = net.pool(first, (1, 1, 4), (1, 1, 4))
    net.conv(pooled, 5, kernel=(4, 8, 2), pad=0, act="none")
    return net
