"""The convolution forms are exact: at the edge of the proof, beyond it, and for any input."""

import itertools

import numpy as np
import pytest

from pynq_kgrc.backends import exact
from pynq_kgrc.backends.exact import (
    GemmConvolution,
    PlanarConvolution,
    WinogradConvolution,
    choose_convolution,
    largest_sum,
)
from pynq_kgrc.graph import ConvShape

F32 = np.dtype(np.float32)


def by_hand(values, weight, shape):
    """Integer sums [D, H, W, M] of a padded channel-last map."""
    d, h, w = shape.out_size
    out = np.zeros((d, h, w, shape.filters), np.int64)
    for tap in itertools.product(*map(range, shape.kernel)):
        spans = [
            slice(t, t + (n - 1) * s + 1, s)
            for t, n, s in zip(tap, shape.out_size, shape.stride, strict=True)
        ]
        out += values[tuple(spans)].astype(np.int64) @ weight[(..., *tap)].T.astype(np.int64)
    return out


def run(convolution, values):
    """All sums of a convolution over a padded map of integers."""
    shape = convolution.shape
    found = np.full((*shape.out_size, shape.filters), np.nan)

    def finish(sums, region, filters):
        target = found[(*region, filters)]
        target[...] = sums[: target.shape[0], : target.shape[1], : target.shape[2]]

    padded = np.zeros((*convolution.in_size, shape.channels), convolution.map_dtype)
    d, h, w = (min(a, b) for a, b in zip(values.shape, padded.shape[:3], strict=False))
    padded[:d, :h, :w] = values[:d, :h, :w]
    if isinstance(convolution, PlanarConvolution):
        flat = np.empty_like(padded)
        split = convolution.map_view(flat)
        split[...] = padded.reshape(split.shape)
        padded = flat
    for job in convolution.jobs:
        if isinstance(convolution, WinogradConvolution):
            convolution.run(padded, job, finish, (1, 1, 1))
        else:
            convolution.run(padded, job, finish)
    return found


def extreme_weight(kind, filters, channels, kernel, rng):
    shape = (filters, channels, *kernel)
    return {
        "largest": np.full(shape, 127),
        "signs": rng.choice([-127, 127], shape),
        "normal": np.clip(np.rint(rng.normal(0, 40, shape)), -127, 127).astype(int),
    }[kind]


def extreme_values(kind, shape, weight, rng):
    size = tuple(o - 1 + k for o, k in zip(shape.out_size, shape.kernel, strict=True))
    if kind == "against":  # the largest input where the first filter is positive
        chosen = 255 * (weight[0].sum(axis=(1, 2, 3)) > 0)
        return np.broadcast_to(chosen, (*size, shape.channels)).copy()
    if kind == "stripes":  # differences between neighbours as large as they get
        place = np.indices(size).sum(axis=0) % 4 < 2
        return np.repeat(255 * place[..., None], shape.channels, axis=3)
    return rng.integers(0, 256, (*size, shape.channels)) * (rng.random() < 0.9)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1)])
@pytest.mark.parametrize("channels", [16, 64, 250, 512])
@pytest.mark.parametrize("kind", ["largest", "signs", "normal"])
def test_no_sum_is_ever_off_by_one(kernel, channels, kind):
    rng = np.random.default_rng(channels)
    shape = ConvShape(channels, (5, 5, 6), kernel, filters=6)
    weight = extreme_weight(kind, 6, channels, kernel, rng)
    forms = [
        GemmConvolution(weight, shape, (0, 255), F32, 1),
        WinogradConvolution(weight, shape, (0, 255), F32, 1),
    ]
    for values_kind in ("against", "stripes", "random"):
        values = extreme_values(values_kind, shape, weight, rng)
        wanted = by_hand(values, weight, shape)
        for form in forms:
            np.testing.assert_array_equal(run(form, values), wanted, err_msg=str(type(form)))


def test_the_measured_proof_refuses_and_float64_takes_over(monkeypatch):
    """Where float32 would be wrong the block is done again, and it would have been wrong."""
    rng = np.random.default_rng(0)
    shape = ConvShape(512, (4, 4, 4), (3, 3, 3), filters=4)
    weight = np.full((4, 512, 3, 3, 3), 127)
    weight[:, ::2] -= 1
    form = WinogradConvolution(weight, shape, (0, 255), F32, 1)
    assert not form.proved
    values = 255 - rng.integers(0, 3, (6, 6, 6, 512))
    values = values[: form.in_size[0], : form.in_size[1], : form.in_size[2]]
    kinds = []
    compute = exact._WinogradPlan.compute

    def watched(self, slab):
        kinds.append(self.dtype)
        return compute(self, slab)

    monkeypatch.setattr(exact._WinogradPlan, "compute", watched)
    np.testing.assert_array_equal(run(form, values), by_hand(values, weight, shape))
    assert np.dtype(np.float64) in kinds
    kinds.clear()
    monkeypatch.setattr(exact._WinogradPlan, "_later_sums", lambda self: 0.0)
    monkeypatch.setattr(exact._WinogradPlan, "_parts", lambda self, values, position: 1)
    assert (run(form, values) != by_hand(values, weight, shape)).any()


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 3)])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 7, 7), (7, 7, 7), (2, 4, 1)])
def test_the_planar_form(stride, kernel):
    rng = np.random.default_rng(1)
    shape = ConvShape(3, (15, 17, 40), kernel, stride, filters=5)
    weight = rng.integers(-127, 128, (5, 3, *kernel))
    values = rng.integers(-128, 128, (15, 17, 40, 3))
    form = PlanarConvolution(weight, shape, (-128, 127), F32, 1)
    np.testing.assert_array_equal(run(form, values), by_hand(values, weight, shape))


def test_the_bound_is_reached_and_never_passed():
    rng = np.random.default_rng(2)
    weight = rng.integers(-5, 6, (7, 3)).astype(np.float32)
    bound = largest_sum(weight, (-3, 4), 0)
    values = np.array(list(itertools.product((-3, 4), repeat=7)))
    subsets = np.array(list(itertools.product((0, 1), repeat=7)))
    reached = np.zeros(3)
    for keep in subsets:
        reached = np.maximum(reached, np.abs((values * keep) @ weight).max(axis=0))
    assert (reached <= bound).all()
    np.testing.assert_allclose(reached, bound, rtol=0.2)


def test_the_forms_are_chosen_where_they_pay():
    def chosen(channels, size, kernel, stride=(1, 1, 1), filters=64):
        shape = ConvShape(channels, size, kernel, stride, filters=filters)
        weight = np.random.default_rng(0).integers(-9, 10, (filters, channels, *kernel))
        return type(choose_convolution(weight, shape, (0, 255), F32, 1))

    assert chosen(3, (5, 40, 40), (3, 3, 3)) is PlanarConvolution
    assert chosen(64, (6, 20, 20), (3, 3, 3)) is WinogradConvolution
    assert chosen(64, (6, 20, 20), (3, 3, 3), (2, 2, 2)) is GemmConvolution
    assert chosen(64, (6, 20, 20), (1, 1, 1)) is GemmConvolution
    assert chosen(64, (1, 1, 1), (1, 1, 1)) is GemmConvolution


def test_a_plan_is_laid_out_once_and_again_when_its_scratch_has_moved(monkeypatch):
    """A later block uses the calls of an earlier one; scratch that grew in between is not used."""
    made = []
    lay = exact._WinogradPlan.__init__

    def watched(self, *arguments):
        made.append(self)
        lay(self, *arguments)

    monkeypatch.setattr(exact._WinogradPlan, "__init__", watched)
    rng = np.random.default_rng(2)
    kernel = (1, 3, 3)
    shape = ConvShape(16, (6, 32, 32), kernel, filters=8)  # a block for each of the depths
    weight = extreme_weight("normal", 8, 16, kernel, rng)
    form = WinogradConvolution(weight, shape, (0, 255), F32, 1)
    values = extreme_values("random", shape, weight, rng)
    wanted = by_hand(values, weight, shape)
    np.testing.assert_array_equal(run(form, values), wanted)
    assert len(form.jobs) > 1
    assert len(made) == 1
    exact.scratch("phases", (2 * made[0].phases.size,), F32)
    np.testing.assert_array_equal(run(form, values), wanted)
    assert len(made) == 2
    assert not np.shares_memory(made[0].phases, made[1].phases)
