// From sums to codes: bias, multiplier and shift, shortcut, clamp (docs/equations.md).
#include "design.h"

namespace kgrc {

enum ScaleWidths {
  kMultBits = kScaleMultBits,
  // image.py refuses a bias that could leave the accumulator, so that sum + bias has its width
  kProductBits = kSumBits + kMultBits,
  kZeroBits = 17,                        // a code less its zero point
  kShortcutBits = kZeroBits + kMultBits  // of a shortcut's product
};
static_assert(int(kProductBits) <= 63, "a product and its rounding have to fit 64 bits");

typedef UInt<kMultBits> Mult;
typedef UInt<kScaleShiftBits> Shift;

// (v + (1 << (s - 1))) >> s for s > 0, v for s = 0: a division that rounds half up. One bit more
// than the result has is kept, and 1 is added to it.
template <int kWidth>
static inline Int<kWidth + 1> rounded_shift(const Int<kWidth>& value, const Shift& shift) {
#pragma HLS INLINE
  const Int<kWidth + 1> kept = Int<kWidth + 1>(Int<kWidth + 1>(value) * 2) >> shift;
  return Int<kWidth + 1>((kept + 1) >> 1);
}

// All bits of a number of `kWidth` bits are gone after a shift by kWidth: a larger one does the
// same.
template <int kWidth>
static inline Shift bounded_shift(int shift) {
#pragma HLS INLINE
  return smaller(shift, kWidth);
}

void scale(const Task& task, Stream<TileSpan>& tiles, Stream<Word64>& scales,
           Stream<Beat>& shortcut, Stream<SumWord>& sums, Stream<CodeWord>& codes, long& trips) {
  const int count = tile_count(task);
  const bool has_shortcut = task[kHasShortcut] != 0;
  const Int<16> shortcut_zero = task[kShortcutZero], out_zero = task[kOutZero];
  const Int<16> low = task[kLow], high = task[kHigh];
  const Mult shortcut_mult = task[kShortcutMult];
  const Shift shortcut_shift = bounded_shift<kShortcutBits>(task[kShortcutShift]);
tiles:
  for (int number = 0; number < count; ++number) {
    const TileSpan span = tiles.read();
    const UInt<kTileBits> rows = span.size[0] * span.size[1];
    const int words = int(rows * UInt<kSizeBits>(beats_of_row(span.size[2])));
  vectors:
    for (int vector = 0; vector < task[kVectors]; ++vector) {
      Scale of[kTn];
#pragma HLS ARRAY_PARTITION variable = of complete
      for (int n = 0; n < kTn; ++n) {
        of[n].bias = 0;
        of[n].mult = 0;
        of[n].shift = 0;
      }
      Sum bias = 0;
      bool is_bias = true;
    filters:
      for (int i = 0; i < 2 * kTn; ++i) {
        // II = 1: a word a trip; the filters move from register to register
#pragma HLS PIPELINE II = 1
        KGRC_TRIP();
        const Word64 word64 = scales.read();
        if (is_bias) {
          bias = Sum(Int<64>(word64));
        } else {
          for (int n = 0; n < kTn - 1; ++n) of[n] = of[n + 1];
          of[kTn - 1].bias = bias;
          of[kTn - 1].mult = bit_field(word64, kScaleMultFirst, kScaleMultBits);
          of[kTn - 1].shift = bounded_shift<kProductBits>(
              bit_field(word64, kScaleShiftFirst, kScaleShiftBits));
        }
        is_bias = !is_bias;
        ++trips;
      }
    sum_words:
      for (int word = 0; word < words; ++word) {
        // II = 1: a word does not depend on another
#pragma HLS PIPELINE II = 1
        KGRC_TRIP();
        const SumWord in = sums.read();
        Beat beat = Beat();
        if (has_shortcut) beat = shortcut.read();
        CodeWord out;
      positions:
        for (int i = 0; i < kPortPositions; ++i)
          for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
            const Sum sum = in.sum[i][n] + of[n].bias;
            const Int<kProductBits> product = Int<kProductBits>(sum) * of[n].mult;
            Int<64> value = rounded_shift<kProductBits>(product, of[n].shift);
            if (has_shortcut) {
              const Int<kZeroBits> code = int(code_of(beat.word64, i * kTn + n)) -
                                          int(shortcut_zero);
              const Int<kShortcutBits> r = Int<kShortcutBits>(code) * shortcut_mult;
              value += rounded_shift<kShortcutBits>(r, shortcut_shift);
            }
            value += out_zero;
            if (value < low) value = low;
            if (value > high) value = high;
            out.code[i][n] = Int<16>(value);
          }
        codes.write(out);
        ++trips;
      }
    }
  }
}

}  // namespace kgrc
