"""The convolution forms are exact: at the limit of the proof, beyond it, and for any input."""

import itertools

import numpy as np
import pytest

from pynq_kgrc.backends.emulation import exact, winograd
from pynq_kgrc.backends.emulation.choice import choose_convolution
from pynq_kgrc.backends.emulation.exact import GemmConvolution, PlanarConvolution, largest_sum
from pynq_kgrc.backends.emulation.winograd import WinogradConvolution
from pynq_kgrc.graph import ConvShape

F32 = np.dtype(np.float32)


def by_hand(values, weight, shape):
    """Integer sums [D, H, W, M] of a padded channel-last map [D, H, W, N]."""
    d, h, w = shape.out_size
    out = np.zeros((d, h, w, shape.filters), np.int64)
    for tap in itertools.product(*map(range, shape.kernel)):
        spans = [
            slice(t, t + (n - 1) * s + 1, s)
            for t, n, s in zip(tap, shape.out_size, shape.stride, strict=True)
        ]
        out += values[tuple(spans)].astype(np.int64) @ weight[(..., *tap)].T.astype(np.int64)
    return out


def run(convolution, values, pool=(1, 1, 1)):
    """All sums of a convolution over a padded map of integers, max-pooled by `pool`."""
    shape = convolution.shape
    size = (n // p for n, p in zip(shape.out_size, pool, strict=True))
    found = np.full((*size, shape.filters), np.nan)

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
            convolution.run(padded, job, finish, pool)
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
    if kind == "against":  # the largest input for channels with a positive sum in filter 0
        chosen = 255 * (weight[0].sum(axis=(1, 2, 3)) > 0)
        return np.broadcast_to(chosen, (*size, shape.channels)).copy()
    if kind == "stripes":  # the largest possible differences between neighbours
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
    if kernel[1:] == (3, 3):  # also without transforming the width
        axes = [axis for axis in (0, 1) if kernel[axis] == 3]
        forms.append(WinogradConvolution(weight, shape, (0, 255), F32, 1, axes))
    for values_kind in ("against", "stripes", "random"):
        values = extreme_values(values_kind, shape, weight, rng)
        wanted = by_hand(values, weight, shape)
        for form in forms:
            np.testing.assert_array_equal(run(form, values), wanted, err_msg=str(type(form)))


def test_a_block_that_fails_the_run_time_proof_is_computed_in_float64(monkeypatch):
    """And without the proof float32 would be wrong."""
    rng = np.random.default_rng(0)
    shape = ConvShape(512, (4, 4, 4), (3, 3, 3), filters=4)
    weight = np.full((4, 512, 3, 3, 3), 127)
    weight[:, ::2] -= 1
    form = WinogradConvolution(weight, shape, (0, 255), F32, 1)
    assert not form.proved
    values = 255 - rng.integers(0, 3, (6, 6, 6, 512))
    values = values[: form.in_size[0], : form.in_size[1], : form.in_size[2]]
    kinds = []
    compute = winograd._CallSequence.compute

    def watched(self, slab):
        kinds.append(self.dtype)
        return compute(self, slab)

    monkeypatch.setattr(winograd._CallSequence, "compute", watched)
    np.testing.assert_array_equal(run(form, values), by_hand(values, weight, shape))
    assert np.dtype(np.float64) in kinds
    kinds.clear()
    monkeypatch.setattr(winograd._CallSequence, "_output_transform_bound", lambda self: 0.0)
    monkeypatch.setattr(winograd._CallSequence, "_count_parts", lambda self, values, position: 1)
    assert (run(form, values) != by_hand(values, weight, shape)).any()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kernel", [(3, 1, 1), (1, 3, 3)])
def test_exact_products_with_an_inexact_sum_are_detected(kernel, turned):
    """m0 and m1 are just below the limit, m0 + m1 is above; if turned, m1 and m3.

    With two transformed axes the sums of the innermost one are added up by the outer one.
    """
    rng = np.random.default_rng(4)
    shape = ConvShape(512, (4, 1, 1) if kernel[0] == 3 else (1, 4, 4), kernel, filters=16)
    taps, values = np.zeros((3, 16, 512), int), np.zeros((4, 512), int)
    taps[:2] = rng.integers(126, 128, (2, 16, 512))
    values[0], values[1] = 255 - rng.integers(0, 2, 512), 127 - rng.integers(0, 2, 512)
    if turned:
        taps, values = taps[::-1], values[::-1]
    weight = np.zeros((16, 512, *kernel), int)
    if kernel[0] == 3:
        weight[..., 0, 0] = taps.transpose(1, 2, 0)
        values = values[:, None, None]
    else:
        weight[..., 0, 0, :] = taps.transpose(1, 2, 0)
        values = np.concatenate([values[None, None], np.zeros((1, 3, 4, 512), int)], axis=1)
    wanted = by_hand(values, weight, shape)
    assert (wanted % 2 * wanted > 1 << 24).any()  # which a float32 cannot hold
    form = WinogradConvolution(weight, shape, (0, 255), F32, 1)
    np.testing.assert_array_equal(run(form, values), wanted)


@pytest.mark.parametrize("size", [(5, 5, 6), (6, 8, 9), (4, 7, 12)])
@pytest.mark.parametrize("pool", [(2, 2, 2), (1, 2, 2), (1, 1, 2), (2, 2, 1)])
@pytest.mark.parametrize("axes", [[0, 1, 2], [0, 1]])
def test_pools_within_winograd_tiles_and_rows(axes, pool, size):
    rng = np.random.default_rng(5)
    shape = ConvShape(16, tuple(n + 2 for n in size), (3, 3, 3), filters=6)
    weight = extreme_weight("normal", 6, 16, (3, 3, 3), rng)
    values = extreme_values("random", shape, weight, rng)
    form = WinogradConvolution(weight, shape, (0, 255), F32, 1, axes)
    assert form.can_pool(pool)
    assert not form.can_pool((1, 3, 1))
    found = run(form, values, pool)
    d, h, w, _ = found.shape
    windows = by_hand(values, weight, shape)[: d * pool[0], : h * pool[1], : w * pool[2]]
    windows = windows.reshape(d, pool[0], h, pool[1], w, pool[2], 6)
    np.testing.assert_array_equal(found, windows.max(axis=(1, 3, 5)))


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)])
def test_channel_parts_whose_running_sum_is_inexact_are_detected(kernel):
    """Each part of the channels is exact, and their total, but not the sum after half of them."""
    rng = np.random.default_rng(3)
    shape = ConvShape(512, (4, 4, 4), kernel, filters=4)
    weight = rng.integers(125, 128, (4, 512, *kernel))
    weight[:, 256:] *= -1
    form = WinogradConvolution(weight, shape, (0, 255), F32, 1)
    values = 255 - rng.integers(0, 3, (*form.in_size, 512))
    np.testing.assert_array_equal(run(form, values), by_hand(values, weight, shape))


@pytest.mark.parametrize("largest", [3, 127])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (2, 3, 1), (5, 1, 1)])
@pytest.mark.parametrize("depth", [1, 2, 3, 7])
def test_depth_taps_that_read_padding_only_are_skipped(monkeypatch, depth, kernel, largest):
    """With one chunk and several, blocks of one depth and of all."""
    rng = np.random.default_rng(depth)
    before = (kernel[0] // 2, 0, 0)
    after = ((kernel[0] - 1) // 2, 0, 0)
    shape = ConvShape(512, (depth, 5, 6), kernel, (1, 1, 1), before, after, filters=4)
    weight = rng.integers(-largest, largest + 1, (4, 512, *kernel))
    values = np.zeros((depth + sum(before + after), 5, 6, 512), np.int64)
    values[before[0] : before[0] + depth] = rng.integers(0, 256, (depth, 5, 6, 512))
    wanted = by_hand(values, weight, shape)
    for block in (1 << 10, 1 << 22):
        monkeypatch.setattr(exact, "BLOCK_BYTES", block)
        monkeypatch.setattr(exact, "MIN_BLOCK_ROWS", 1)
        form = GemmConvolution(weight, shape, (0, 255), F32, 1)
        np.testing.assert_array_equal(run(form, values), wanted)
    if depth < 3:
        assert form.depth_chunks


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 3)])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 7, 7), (7, 7, 7), (2, 4, 1)])
def test_the_planar_form(stride, kernel):
    rng = np.random.default_rng(1)
    shape = ConvShape(3, (15, 17, 40), kernel, stride, filters=5)
    weight = rng.integers(-127, 128, (5, 3, *kernel))
    values = rng.integers(-128, 128, (15, 17, 40, 3))
    form = PlanarConvolution(weight, shape, (-128, 127), F32, 1)
    np.testing.assert_array_equal(run(form, values), by_hand(values, weight, shape))


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(
    ("rows", "channels", "filters"), [(784, 64, 144), (97, 64, 144), (8, 3, 5)]
)
def test_products_in_parts_of_their_rows(monkeypatch, small, rows, channels, filters):
    """With contiguous rows or channels and a strided output: nothing is copied."""
    monkeypatch.setattr(exact, "has_small_matrix_kernels", lambda: small)
    monkeypatch.setattr(exact, "SMALL_MATRIX_MACS", 100 * channels * filters)
    rng = np.random.default_rng(6)
    values = rng.integers(-99, 99, (3, rows, channels)).astype(np.float32)
    matrix = rng.integers(-99, 99, (channels, filters)).astype(np.float32)
    weights = exact.lay_out_weights(matrix)
    np.testing.assert_array_equal(weights, matrix)
    for given in (values, values.transpose(2, 0, 1).copy().transpose(1, 2, 0), values[0]):
        room = np.full((rows, 3, filters), np.nan, np.float32)
        out = room.transpose(1, 0, 2) if given.ndim == 3 else room[:, 1]
        call = exact.multiply(given, weights, out)
        assert (call.args[0].ndim > given.ndim) == (small and rows == 784)
        call()
        np.testing.assert_array_equal(out, given.astype(int) @ matrix.astype(int))


def test_the_bound_of_partial_sums_is_tight_and_never_exceeded():
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


def test_the_form_with_the_least_work_is_chosen():
    def chosen(channels, size, kernel, stride=(1, 1, 1), filters=64):
        shape = ConvShape(channels, size, kernel, stride, filters=filters)
        weight = np.random.default_rng(0).integers(-9, 10, (filters, channels, *kernel))
        return type(choose_convolution(weight, shape, (0, 255), F32, 1))

    assert chosen(3, (5, 40, 40), (3, 3, 3)) is PlanarConvolution
    assert chosen(64, (6, 20, 20), (3, 3, 3)) is WinogradConvolution
    assert chosen(64, (6, 20, 20), (3, 3, 3), (2, 2, 2)) is GemmConvolution
    assert chosen(64, (6, 20, 20), (1, 1, 1)) is GemmConvolution
    assert chosen(64, (1, 1, 1), (1, 1, 1)) is GemmConvolution


def test_calls_are_prepared_once_and_again_when_scratch_is_reallocated(monkeypatch):
    """Blocks share prepared calls, until a scratch array grows and moves in memory."""
    made = []
    lay = winograd._CallSequence.__init__

    def watched(self, *arguments):
        made.append(self)
        lay(self, *arguments)

    monkeypatch.setattr(winograd._CallSequence, "__init__", watched)
    rng = np.random.default_rng(2)
    kernel = (1, 3, 3)
    shape = ConvShape(16, (6, 32, 32), kernel, filters=8)  # one block per depth
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
