// The multipliers of the array: dot products over the T_N channels of a tap.
//
// Dot packs narrow products into one DSP48E2 (a signed multiplier of 27 x 18 bits):
//
//   16 bit   one product
//    8 bit   two:  (w1 << 18 | w0) * x            two filters, one output position
//    4 bit   four: (w1 << 22 | w0) * (x1 << 11 | x0)  two filters, two output positions
//
// Each product lies in a field of the multiplier's result. The results of 8 channels are added
// before the fields are separated (a cascade of DSPs adds them without LUTs). A field has room for
// that: 8 * 127 * 128 < 2^17 and 8 * 7 * 8 < 2^10, because weights are symmetric
// (|w| <= 2^(bits-1) - 1).
// A negative field has borrowed 1 from the field above; take_field returns it.
//
// DotDirect computes the same sums without packing (host_tests/test_dot.py).
#pragma once

#include "types.h"

namespace kgrc {

enum { kChannelsPerField = 8 };

// Removes the lowest field, kWidth bits, from the sum and returns it as a signed number.
template <int kWidth>
inline Int<kWidth> take_field(Int<48>& sum) {
#pragma HLS INLINE
  // sign extension: the field at the top of a word, then an arithmetic shift
  const Int<64> field = Int<64>(UInt<64>(sum) << (64 - kWidth)) >> (64 - kWidth);
  sum = Int<48>(sum - field) >> kWidth;
  return Int<kWidth>(field);
}

template <int kBits, int kTn>
struct DotDirect {
  enum { kWeights = 1, kFeatures = 1 };
  typedef Int<2 * kBits + 8> Out;
  static_assert(kTn <= 256, "a dot product has room for 256 channels");

  static void run(const Int<kBits> w[kWeights][kTn], const Int<kBits> x[kFeatures][kTn],
                  Out out[kWeights][kFeatures]) {
#pragma HLS INLINE
    Out sum = 0;
  channels:
    for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
      sum += Out(Out(w[0][n]) * Out(x[0][n]));
    }
    out[0][0] = sum;
  }
};

template <int kBits, int kTn>
struct Dot;

template <int kTn>
struct Dot<16, kTn> : DotDirect<16, kTn> {};

template <int kTn>
struct Dot<8, kTn> {
  enum { kWeights = 2, kFeatures = 1 };
  typedef Int<24> Out;
  static_assert(kTn <= 256, "a dot product has room for 256 channels");

  static void run(const Int<8> w[kWeights][kTn], const Int<8> x[kFeatures][kTn],
                  Out out[kWeights][kFeatures]) {
#pragma HLS INLINE
    out[0][0] = out[1][0] = 0;
  cascades:
    for (int first = 0; first < kTn; first += kChannelsPerField) {
#pragma HLS UNROLL
      Int<48> sum = 0;
    channels:
      for (int n = first; n < kTn && n < first + kChannelsPerField; ++n) {
#pragma HLS UNROLL
        const Int<27> weights = Int<27>(w[1][n]) * (1 << 18) + Int<27>(w[0][n]);
        Int<45> product = Int<45>(weights) * Int<45>(x[0][n]);
#pragma HLS BIND_OP variable = product op = mul impl = dsp
        sum += product;
      }
      out[0][0] += take_field<18>(sum);
      out[1][0] += Out(sum);
    }
  }
};

template <int kTn>
struct Dot<4, kTn> {
  enum { kWeights = 2, kFeatures = 2 };
  typedef Int<16> Out;
  static_assert(kTn <= 256, "a dot product has room for 256 channels");

  static void run(const Int<4> w[kWeights][kTn], const Int<4> x[kFeatures][kTn],
                  Out out[kWeights][kFeatures]) {
#pragma HLS INLINE
    for (int a = 0; a < kWeights; ++a)
      for (int b = 0; b < kFeatures; ++b) out[a][b] = 0;
  cascades:
    for (int first = 0; first < kTn; first += kChannelsPerField) {
#pragma HLS UNROLL
      Int<48> sum = 0;
    channels:
      for (int n = first; n < kTn && n < first + kChannelsPerField; ++n) {
#pragma HLS UNROLL
        const Int<27> weights = Int<27>(w[1][n]) * (1 << 22) + Int<27>(w[0][n]);
        const Int<18> inputs = Int<18>(x[1][n]) * (1 << 11) + Int<18>(x[0][n]);
        Int<45> product = Int<45>(weights) * Int<45>(inputs);
#pragma HLS BIND_OP variable = product op = mul impl = dsp
        sum += product;
      }
      out[0][0] += take_field<11>(sum);
      out[0][1] += take_field<11>(sum);
      out[1][0] += take_field<11>(sum);
      out[1][1] += Out(sum);
    }
  }
};

}  // namespace kgrc
