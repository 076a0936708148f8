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

// The scales of the filters of each vector side by side.
void gather_scales(const Task& task, Stream<Word64>& scales, Stream<VectorScale>& vectors) {
  const int count = tile_count(task) * task[kVectors];
  UInt<bits_for(kTn)> filters_left = kTn - 1;
  bool is_bias = true;
  Sum bias = 0;
  VectorScale vector = VectorScale();
#pragma HLS ARRAY_PARTITION variable = vector.of complete
scale_words:
  for (int word = 0; word < count * 2 * kTn; ++word) {
    // II = 1: a 64-bit word a trip; the filters move up from register to register
#pragma HLS PIPELINE II = 1
    KGRC_TRIP();
    const Word64 word64 = scales.read();
    if (is_bias) {
      bias = Sum(Int<64>(word64));
    } else {
      for (int n = 0; n < kTn - 1; ++n) vector.of[n] = vector.of[n + 1];
      vector.of[kTn - 1].bias = bias;
      vector.of[kTn - 1].mult = bit_field(word64, kScaleMultFirst, kScaleMultBits);
      vector.of[kTn - 1].shift = bounded_shift<kProductBits>(
          bit_field(word64, kScaleShiftFirst, kScaleShiftBits));
      if (filters_left == 0) vectors.write(vector);
      filters_left = filters_left == 0 ? kTn - 1 : int(filters_left) - 1;
    }
    is_bias = !is_bias;
  }
}

void scale(const Task& task, Stream<TileSpan>& tiles, Stream<VectorScale>& scales,
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
    const UInt<kTileBits> words = rows * UInt<kSizeBits>(beats_of_row(span.size[2]));
    const UInt<kTileBits> last_word = words - 1;
    UInt<kTileBits> word = 0;
    VectorScale vector = VectorScale();
#pragma HLS ARRAY_PARTITION variable = vector.of complete
  sum_words:
    for (int left = task[kVectors] * int(words); left > 0; --left) {
      // II = 1: a word does not depend on another
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      if (word == 0) vector = scales.read();
      word = word == last_word ? 0 : int(word) + 1;
      const SumWord in = sums.read();
      Beat beat = Beat();
      if (has_shortcut) beat = shortcut.read();
      CodeWord out;
    positions:
      for (int i = 0; i < kPortPositions; ++i)
        for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
          const Sum sum = in.sum[i][n] + vector.of[n].bias;
          const Int<kProductBits> product = Int<kProductBits>(sum) * vector.of[n].mult;
          Int<64> value = rounded_shift<kProductBits>(product, vector.of[n].shift);
          if (has_shortcut) {
            const Int<kZeroBits> code = int(code_of(beat.word64, i * kTn + n)) - int(shortcut_zero);
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

}  // namespace kgrc
