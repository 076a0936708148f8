// From sums to codes: bias, multiplier and shift, shortcut, clamp (docs/equations.md).
#include "design.h"

namespace kgrc {

// The sum and its bias fit the accumulator together, and a multiplier is less than 2^15
// (check_accumulator and the checks of scales in pynq_kgrc/program.py).
enum ScaleWidths {
  kScaledBits = kSumBits + 15,
  kDifferenceBits = 17,  // a code of the shortcut less its zero point
  kAddedBits = kDifferenceBits + 15,
  kTotalBits = kSumBits + 16  // with the shortcut and the output's zero point
};
typedef UInt<kScaleShiftBits> Shift;

// The scale of a filter in registers.
struct FilterScale {
  Int<kSumBits> bias;
  Int<16> mult;
  Shift shift;
};

// (v + (1 << (s - 1))) >> s for s > 0, v for s = 0: a division that rounds half up. The bit below
// the result decides, so that nothing wider than v is added. The shift is less than 64.
template <int kWidth>
static inline Int<kWidth> rounded_shift(const Int<kWidth>& value, Shift shift) {
#pragma HLS INLINE
  // in C++ a shift by the width or more is undefined; it leaves the sign, as one less does
  const int most = kWidth - 1;
  const int half = smaller(larger(int(shift) - 1, 0), most);
  const Int<kWidth> doubled = Int<kWidth>(value >> half);
  return shift == 0 ? value : Int<kWidth>((doubled >> 1) + (doubled & 1));
}

void scale(const Task& task, Stream<Tile>& tiles, Stream<Word64>& scales, Stream<Beat>& shortcut,
           Stream<SumWord>& sums, Stream<CodeWord>& codes, long& trips) {
  const int count = tile_count(task);
  const bool adds = task[kHasShortcut] != 0;
  const Int<16> shortcut_zero = task[kShortcutZero];
  const Int<16> shortcut_mult = task[kShortcutMult];
  const Shift shortcut_shift = task[kShortcutShift];
  const Int<16> out_zero = task[kOutZero], low = task[kLow], high = task[kHigh];
tiles:
  for (int number = 0; number < count; ++number) {
    const Tile tile = tiles.read();
    const int words = tile.size[0] * tile.size[1] * beats_of_row(tile.size[2]);
  vectors:
    for (int vector = 0; vector < task[kVectors]; ++vector) {
      FilterScale of[kTn];
#pragma HLS ARRAY_PARTITION variable = of complete
    filters:
      for (int i = 0; i < 2 * kTn; ++i) {
        // II = 1: a 64-bit word a trip, shifted through the registers of the filters
#pragma HLS PIPELINE II = 1
        KGRC_TRIP();
        const Word64 word64 = scales.read();
        if (i % 2 == 0) {
        registers:
          for (int n = 0; n < kTn - 1; ++n) {
#pragma HLS UNROLL
            of[n] = of[n + 1];
          }
          of[kTn - 1].bias = Int<kSumBits>(Int<64>(word64));
        } else {
          of[kTn - 1].mult = bit_field(word64, kScaleMultFirst, kScaleMultBits);
          of[kTn - 1].shift = bit_field(word64, kScaleShiftFirst, kScaleShiftBits);
        }
        ++trips;
      }
    sum_words:
      for (int word = 0; word < words; ++word) {
        // II = 1: a word does not depend on another
#pragma HLS PIPELINE II = 1
        KGRC_TRIP();
        const SumWord in = sums.read();
        Beat beat;
        if (adds) beat = shortcut.read();
        CodeWord out;
      positions:
        for (int i = 0; i < kPortPositions; ++i)
          for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
            const Int<kSumBits> sum = Int<kSumBits>(in.sum[i][n] + of[n].bias);
            const Int<kScaledBits> product = Int<kScaledBits>(Int<kScaledBits>(sum) *
                                                              Int<kScaledBits>(of[n].mult));
            Int<kTotalBits> value = rounded_shift<kScaledBits>(product, of[n].shift);
            if (adds) {
              const Int<kDifferenceBits> code = Int<kDifferenceBits>(
                                                    code_of(beat.word64, i * kTn + n)) -
                                                shortcut_zero;
              const Int<kAddedBits> added = Int<kAddedBits>(Int<kAddedBits>(code) *
                                                            Int<kAddedBits>(shortcut_mult));
              value += rounded_shift<kAddedBits>(added, shortcut_shift);
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
