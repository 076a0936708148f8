"""The integers: rounding, multipliers, ranges, packing."""

import numpy as np
import pytest

from pynq_kgrc.errors import CompileError
from pynq_kgrc.quant import (
    QuantParams,
    are_powers,
    choose_params,
    multiplier,
    pack_int4,
    pack_powers,
    packed_bytes,
    rshift,
    unpack_int4,
    unpack_powers,
)


def test_rshift_rounds_half_up_like_floor_division():
    values = np.arange(-40, 41)
    for shift in range(6):
        wanted = np.floor(values / 2**shift + 0.5)
        np.testing.assert_array_equal(rshift(values, shift), wanted)


def test_rshift_takes_a_shift_for_each_value():
    assert rshift(np.array([3, 3, 3]), np.array([0, 1, 2], np.uint8)).tolist() == [3, 2, 1]


def test_rshift_is_exact_far_beyond_a_float():
    value = (1 << 61) + 1
    assert int(rshift(np.array([value]), 1)[0]) == (value + 1) >> 1


@pytest.mark.parametrize("real", [1.0, 0.5, 1 / 3, 2e-9, 12345.6, 0.99999, 2**-20 * 0.999999])
def test_multiplier_is_normalised_and_close(real):
    mult, shift = multiplier(real, "layer")
    assert 2**14 <= mult < 2**15
    assert 0 <= shift <= 62
    assert abs(mult * 2.0**-shift / real - 1) <= 2**-15


def test_multiplier_limits():
    assert multiplier(0.0, "layer") == (0, 0)
    assert multiplier(1e-15, "layer") == (0, 0)
    with pytest.raises(CompileError, match=r"conv1: scale factor 40000 is too large"):
        multiplier(40000.0, "conv1")
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(CompileError, match=r"conv1: scale factor .* is not a finite number"):
            multiplier(bad, "conv1")


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("span", [(0, 3.7), (-1, 1), (-5, 0.1), (2, 3), (-3, -2), (0, 0)])
def test_params_hold_zero_exactly_and_cover_the_range(bits, span):
    params = choose_params(*span, bits)
    zero = params.quantize(np.zeros(1))
    assert params.dequantize(zero)[0] == 0
    reals = np.array([min(span[0], 0), max(span[1], 0)], float)
    error = np.abs(params.dequantize(params.quantize(reals)) - reals)
    assert (error <= params.scale).all()
    if bits == 16:
        assert params.zero_point == 0
    elif span[0] >= 0:
        assert params.zero_point == params.min


def test_quantize_saturates():
    params = QuantParams(8, 0.1, 0)
    assert params.quantize(np.array([-99.0, 99.0, 0.05])).tolist() == [-128, 127, 1]


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_int4_packs_two_a_byte_and_back(count):
    codes = np.random.default_rng(0).integers(-8, 8, count).astype(np.int8)
    packed = pack_int4(codes)
    assert packed.nbytes == packed_bytes(count, 4) == (count + 1) // 2
    np.testing.assert_array_equal(unpack_int4(packed, count), codes)


def test_int4_low_nibble_first():
    assert pack_int4(np.array([1, 2], np.int8)).tolist() == [0x21]


@pytest.mark.parametrize(("bits", "top"), [(8, 64), (4, 4)])
def test_powers_of_two_are_packed_and_unpacked(bits, top):
    powers = [1 << i for i in range(top.bit_length())]
    codes = np.array([0, *powers, *(-power for power in powers)], np.int8)
    for count in (1, 2, 8, 1001):
        some = np.random.default_rng(count).choice(codes, count)
        packed = pack_powers(some, bits)
        assert packed.dtype == np.uint8
        assert len(packed) == -(-count * {8: 4, 4: 3}[bits] // 8)
        np.testing.assert_array_equal(unpack_powers(packed, count, bits), some)
    assert are_powers(codes, bits) and not are_powers(codes, 16)
    others = set(range(-2 * top + 1, 2 * top)) - set(codes.tolist())
    assert not any(are_powers(np.array([0, code, 1], np.int8), bits) for code in others)
