// Sums to codes: bias, multiplier and shift, shortcut, clamp (numerics.md, "One convolution task").
#include "design.h"

namespace kgrc {

// (v + (1 << (s - 1))) >> s for s > 0, v for s = 0: a division that rounds half up.
static Int<64> rounded_shift(Int<64> value, int shift) {
#pragma HLS INLINE
  return shift > 0 ? Int<64>((value + (Int<64>(1) << (shift - 1))) >> shift) : value;
}

void scale(const Task& task, const Word* tables, const Beat* maps, Stream<SumWord>& sums,
           Stream<CodeWord>& codes, Trips& trips) {
  const int row_beats = beats_of_row(task[kShortcutW]);
tiles_d:
  for (int td = 0; td < tiles_along(task, 0); ++td)
  tiles_h:
    for (int th = 0; th < tiles_along(task, 1); ++th)
    tiles_w:
      for (int tw = 0; tw < tiles_along(task, 2); ++tw) {
        const Tile tile = make_tile(task, td, th, tw);
        const int beats = ceil_div(tile.size[2], kPortPositions);
        const int words = tile.size[0] * tile.size[1] * beats;
      blocks:
        for (int block = 0; block < task[kFilterBlocks]; ++block) {
          Scale scales[kTn];
        filters:
          for (int n = 0; n < kTn; ++n) {
            // II = 2: a filter's scale is two words of one port
#pragma HLS PIPELINE II = 2
            KGRC_TRIP();
            const int at = task[kScales] + 2 * (block * kTn + n);
            const Word numbers = tables[at + 1];
            scales[n].bias = Int<64>(tables[at]);
            scales[n].mult = int(numbers & 0xffff);
            scales[n].shift = int(numbers >> 16 & 0xff);
            ++trips.scale;
            trips.table_words += 2;
          }
          int d = 0, h = 0, j = 0;
        sum_words:
          for (int word = 0; word < words; ++word) {
            // II = 1: every word stands for itself
#pragma HLS PIPELINE II = 1
            KGRC_TRIP();
            const SumWord in = sums.read();
            Beat beat;
            for (int i = 0; i < kBeatWords; ++i) beat.word[i] = 0;
            if (task[kHasShortcut]) {
              const int plane = (block * task[kShortcutD] + tile.first[0] + d) * task[kShortcutH];
              beat = maps[task[kShortcut] + (plane + tile.first[1] + h) * row_beats +
                          tile.first[2] / kPortPositions + j];
              ++trips.shortcut_beats;
            }
            CodeWord out;
          positions:
            for (int i = 0; i < kPortPositions; ++i)
              for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
                Int<64> value = rounded_shift(
                    (Int<64>(in.sum[i][n]) + scales[n].bias) * Int<64>(scales[n].mult),
                    scales[n].shift);
                if (task[kHasShortcut]) {
                  const Int<64> r = Int<64>(code_of(beat, i * kTn + n)) - task[kShortcutZero];
                  value += rounded_shift(r * Int<64>(task[kShortcutMult]), task[kShortcutShift]);
                }
                value += task[kOutZero];
                if (value < task[kLow]) value = task[kLow];
                if (value > task[kHigh]) value = task[kHigh];
                out.code[i][n] = Int<16>(value);
              }
            codes.write(out);
            ++trips.scale;
            if (++j == beats) {
              j = 0;
              if (++h == tile.size[1]) {
                h = 0;
                ++d;
              }
            }
          }
        }
      }
}

}  // namespace kgrc
