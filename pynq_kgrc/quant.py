"""The integers of the accelerator: ranges, rounding, multipliers and the packing of 4-bit values.

docs/equations.md lists the formulas; every backend computes exactly these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pynq_kgrc.errors import CompileError

BITS = (16, 8, 4)
"""Widths of weights and activations that an accelerator can be built for."""

ACCUMULATOR_BITS = {16: 48, 8: 32, 4: 32}
"""Width of the signed accumulator for each width of the operands."""

MULT_BITS = 15
"""Bits of a multiplier: it lies in [2^14, 2^15), or is 0."""

MAX_SHIFT = 62
"""Largest right shift after the multiplication."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class QuantParams:
    """The format of one tensor: ``real = scale * (code - zero_point)``.

    >>> QuantParams(bits=8, scale=0.5, zero_point=-128).min
    -128
    """

    bits: int
    scale: float
    zero_point: int = 0

    @property
    def min(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1))

    @property
    def max(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of the codes."""
        return code_dtype(self.bits)

    def quantize(self, real: Array) -> Array:
        """Codes of reals: rounded half up, clamped to the lowest and highest code."""
        codes = np.floor(np.asarray(real, np.float64) / self.scale + 0.5) + self.zero_point
        clamped: Array = np.clip(codes, self.min, self.max).astype(self.dtype)
        return clamped

    def dequantize(self, codes: Array) -> Array:
        """Reals of codes, float64."""
        return self.scale * (codes.astype(np.float64) - self.zero_point)


@dataclass(frozen=True)
class WeightQuant:
    """Symmetric codes of a weight: ``real = scale[m] * code``, one scale per filter."""

    bits: int
    scale: Array


def code_dtype(bits: int) -> np.dtype[Any]:
    """The numpy type of a code. A 4-bit code takes a whole byte until it is packed."""
    return np.dtype(np.int16 if bits == 16 else np.int8)


def weight_limit(bits: int) -> int:
    """The highest code of a weight; the lowest is its negative, because weights are symmetric."""
    return (1 << (bits - 1)) - 1


def identity_code(bits: int) -> int:
    """The code of the weight 1 in a convolution that copies: a power of two.

    A multiplier times a power of two is the same multiplier with another shift. So a copy within
    one format is exact, and a copy to another format computes what a shortcut computes.
    """
    return 1 << (bits - 2)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes in memory: 2 each at 16 bits, half a byte each at 4 bits."""
    return -(-count * bits // 8)


def choose_params(low: float, high: float, bits: int) -> QuantParams:
    """The affine format that covers the reals [low, high], with a code for exactly zero.

    The range is widened to include zero, because padding is zero. At 16 bits the zero point is 0.

    >>> choose_params(0.0, 25.5, 8)
    QuantParams(bits=8, scale=0.1, zero_point=-128)
    """
    low, high = float(min(low, 0.0)), float(max(high, 0.0))
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if bits == 16:
        return QuantParams(bits, max(-low, high, 1e-12) / highest, 0)
    scale = max(high - low, 1e-12) / (highest - lowest)
    zero_point = int(np.clip(math.floor(lowest - low / scale + 0.5), lowest, highest))
    return QuantParams(bits, scale, zero_point)


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient of two integers, rounded up.

    >>> ceil_div(7, 3)
    3
    """
    return -(-dividend // divisor)


def rshift(value: Array, shift: Array | int) -> Array:
    """Divide by 2^s and round half up: ``(v + (1 << (s-1))) >> s`` for s > 0, v for s = 0.

    >>> rshift(np.array([-3, -2, 1, 2, 3]), 1).tolist()
    [-1, -1, 1, 1, 2]
    """
    shift = np.asarray(shift, np.int64)
    half = np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), 0)
    rounded: Array = (np.asarray(value, np.int64) + half) >> shift
    return rounded


def multiplier(real: float, what: str) -> tuple[int, int]:
    """`mult` in [2^14, 2^15) and `shift` in 0..62 so that ``mult / 2^shift`` is close to `real`.

    The relative error is at most 2^-15. A factor below 2^-48 gives (0, 0): every product is 0.

    >>> multiplier(1.0, "layer")
    (16384, 14)

    Raises:
        CompileError: the factor is not finite, negative, or 2^15 or more. `what` names the layer
            in the message.
    """
    if not math.isfinite(real) or real < 0:
        raise CompileError(f"{what}: scale factor {real} is not a finite number >= 0")
    mantissa, exponent = math.frexp(real)
    mult = math.floor(mantissa * (1 << MULT_BITS) + 0.5)
    if mult == 1 << MULT_BITS:
        mult, exponent = mult >> 1, exponent + 1
    shift = MULT_BITS - exponent
    if real == 0 or shift > MAX_SHIFT:
        return 0, 0
    if shift < 0:
        raise CompileError(
            f"{what}: scale factor {real:g} is too large; the ratio of input, weight and output "
            f"scales has to be below {1 << MULT_BITS}"
        )
    return mult, shift


def pack_int4(codes: Array) -> npt.NDArray[np.uint8]:
    """Pack two 4-bit codes into a byte, low nibble first; an odd count is padded with a zero.

    >>> pack_int4(np.array([1, -1, 7], np.int8)).tolist()
    [241, 7]
    """
    flat = np.ascontiguousarray(codes).reshape(-1).view(np.uint8) & 15
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)


def unpack_int4(packed: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int8]:
    """The first `count` codes of an array that `pack_int4` packed, with sign extension."""
    codes = np.empty(packed.size * 2, np.uint8)
    codes[0::2] = packed & 15
    codes[1::2] = packed >> 4
    return ((codes[:count] ^ 8).astype(np.int8)) - np.int8(8)


POWER_BITS = {8: 4, 4: 3}
"""Bits in which a weight of 0 or a power of two is stored, by the width of its code."""


def are_powers(codes: Array, bits: int) -> bool:
    """Whether all codes of this width are 0 or +- a power of two: what `pack_powers` takes."""
    if bits not in POWER_BITS:
        return False
    values = _power_values(bits)
    return bool((values[_power_places(values, codes)] == codes).all())


def pack_powers(codes: Array, bits: int) -> npt.NDArray[np.uint8]:
    """Pack codes of 0 and powers of two in 3 bits (width 4) or 4 bits (width 8), lowest bit first.

    A code is its exponent + 1, or 0 for 0; the top bit says that it is negative.

    >>> pack_powers(np.array([1, -1, 0, 64], np.int8), 8).tolist()
    [145, 112]
    """
    places = _power_places(_power_values(bits), codes).reshape(-1, 1)
    each = places >> np.arange(POWER_BITS[bits]) & 1
    return np.packbits(each.astype(np.uint8), bitorder="little")


def unpack_powers(packed: npt.NDArray[np.uint8], count: int, bits: int) -> npt.NDArray[np.int8]:
    """The first `count` codes of an array that `pack_powers` packed."""
    width = POWER_BITS[bits]
    each = np.unpackbits(packed, count=count * width, bitorder="little").reshape(count, width)
    return _power_values(bits)[each @ (1 << np.arange(width))]


def _power_values(bits: int) -> npt.NDArray[np.int8]:
    """The code that each number of `POWER_BITS` bits stands for."""
    positive = 1 << np.arange((1 << POWER_BITS[bits] - 1) - 1)
    return np.concatenate([[0], positive, [0], -positive]).astype(np.int8)


def _power_places(values: npt.NDArray[np.int8], codes: Array) -> npt.NDArray[np.int64]:
    """The place of each code among `values`; 0 for one that is not there."""
    places = np.zeros(256, np.int64)
    places[values.astype(np.int64) & 255] = np.arange(len(values))
    places[0] = 0
    found: npt.NDArray[np.int64] = places[codes.astype(np.int64) & 255]
    return found
