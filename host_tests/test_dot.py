"""The dot products of the array: packed (Dot), direct (DotDirect) and numpy's are equal."""

import ctypes
import importlib.util
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

HLS = Path(__file__).resolve().parents[1] / "hls_src"
CHANNELS = (1, 4, 8, 12)

HARNESS = """
#include "dot.h"
using namespace kgrc;
template <class Element, int kBits, int kTn>
static void run(const int* w, const int* x, long* out, int count) {
  Int<kBits> weights[Element::kWeights][kTn], inputs[Element::kFeatures][kTn];
  typename Element::Out sums[Element::kWeights][Element::kFeatures];
  for (int i = 0; i < count; ++i) {
    for (auto& filter : weights) for (auto& code : filter) code = Int<kBits>(*w++);
    for (auto& place : inputs) for (auto& code : place) code = Int<kBits>(*x++);
    Element::run(weights, inputs, sums);
    for (auto& filter : sums) for (auto& sum : filter) *out++ = long(sum);
  }
}
"""


def include_folders():
    """Compiler flags for each set of types; ap_int only if the package hls4ml is installed."""
    found = {"plain": ["-DKGRC_PLAIN"]}
    spec = importlib.util.find_spec("hls4ml")
    if spec is not None:
        folder = Path(spec.submodule_search_locations[0]) / "templates/vivado/ap_types"
        found["ap_int"] = ["-isystem", str(folder)]
    return found


@pytest.fixture(scope="module", params=["plain", "ap_int"])
def dots(request, tmp_path_factory):
    """A library of the dot products, for one set of types."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    flags = include_folders().get(request.param)
    if flags is None:
        pytest.skip("the headers of ap_int are not here: pip install --no-deps hls4ml")
    folder = tmp_path_factory.mktemp("dot")
    exports = "".join(
        f'extern "C" void {name.lower()}_{bits}_{tn}(const int* w, const int* x, long* out, int n)'
        f"{{ run<{name}<{bits}, {tn}>, {bits}, {tn}>(w, x, out, n); }}\n"
        for name, bits, tn in itertools.product(("Dot", "DotDirect"), (16, 8, 4), CHANNELS)
    )
    (folder / "dots.cpp").write_text(HARNESS + exports)
    command = ["g++", "-std=c++14", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas", *flags]
    command += ["-I", str(HLS), str(folder / "dots.cpp"), "-o", str(folder / "dots.so")]
    subprocess.run(command, check=True, timeout=300)
    return ctypes.CDLL(str(folder / "dots.so"))


def codes(bits, shape, rng):
    """Weights or inputs over the whole range; the first two trials are all at one end."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    found = rng.integers(low, high + 1, shape).astype(np.int32)
    found[0], found[1] = low, high
    return found


@pytest.mark.parametrize("tn", CHANNELS)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", ["dot", "dotdirect"])
def test_sums_are_exact(dots, name, bits, tn):
    packed = {16: (1, 1), 8: (2, 1), 4: (2, 2)}[bits] if name == "dot" else (1, 1)
    rng = np.random.default_rng(bits + tn)
    count = 3000
    least = -(1 << (bits - 1)) + 1
    w = np.maximum(codes(bits, (count, packed[0], tn), rng), least)
    x = codes(bits, (count, packed[1], tn), rng)
    w[2::4, 0] = least  # a low field that is as negative as can be borrows from the next
    x[3::4] = -least
    out = np.zeros((count, *packed), np.int64)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (w, x, out)]
    getattr(dots, f"{name}_{bits}_{tn}")(*pointers, count)
    np.testing.assert_array_equal(out, np.einsum("iwn,ixn->iwx", w.astype(int), x.astype(int)))
