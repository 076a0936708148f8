// From sums to codes: bias, multiplier and shift, shortcut, clamp (docs/equations.md).
#include "design.h"

namespace kgrc {

// (v + (1 << (s - 1))) >> s for s > 0, v for s = 0: a division that rounds half up.
static Int<64> rounded_shift(Int<64> value, int shift) {
#pragma HLS INLINE
  return shift > 0 ? Int<64>((value + (Int<64>(1) << (shift - 1))) >> shift) : value;
}

void scale(const Task& task, Stream<Tile>& tiles, Stream<Word64>& scales, Stream<Beat>& shortcut,
           Stream<SumWord>& sums, Stream<CodeWord>& codes, long& trips) {
  const int count = tile_count(task);
tiles:
  for (int number = 0; number < count; ++number) {
    const Tile tile = tiles.read();
    const int words = tile.size[0] * tile.size[1] * beats_of_row(tile.size[2]);
  vectors:
    for (int vector = 0; vector < task[kVectors]; ++vector) {
      Scale of[kTn];
    filters:
      for (int i = 0; i < 2 * kTn; ++i) {
        // II = 1: a 64-bit word a trip, into registers
#pragma HLS PIPELINE II = 1
        KGRC_TRIP();
        const Word64 word64 = scales.read();
        if (i % 2 == 0) {
          of[i / 2].bias = Int<64>(word64);
        } else {
          of[i / 2].mult = bit_field(word64, kScaleMultFirst, kScaleMultBits);
          of[i / 2].shift = bit_field(word64, kScaleShiftFirst, kScaleShiftBits);
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
        if (task[kHasShortcut]) beat = shortcut.read();
        CodeWord out;
      positions:
        for (int i = 0; i < kPortPositions; ++i)
          for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
            Int<64> value = rounded_shift(
                (Int<64>(in.sum[i][n]) + of[n].bias) * Int<64>(of[n].mult), of[n].shift);
            if (task[kHasShortcut]) {
              const Int<64> r = Int<64>(code_of(beat.word64, i * kTn + n)) - task[kShortcutZero];
              value += rounded_shift(r * Int<64>(task[kShortcutMult]), task[kShortcutShift]);
            }
            value += task[kOutZero];
            if (value < task[kLow]) value = task[kLow];
            if (value > task[kHigh]) value = task[kHigh];
            out.code[i][n] = Int<16>(value);
          }
        codes.write(out);
        ++trips;
      }
    }
  }
}

}  // namespace kgrc
