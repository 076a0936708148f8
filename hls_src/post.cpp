// Sums to codes: bias, multiplier and shift, shortcut, clamp (numerics.md, "One convolution task").
#include "design.h"

namespace kgrc {

// (v + (1 << (s - 1))) >> s for s > 0, v for s = 0: a division that rounds half up.
static Int<64> rounded_shift(Int<64> value, int shift) {
#pragma HLS INLINE
  return shift > 0 ? Int<64>((value + (Int<64>(1) << (shift - 1))) >> shift) : value;
}

// The scales of every block of outputs: two words a filter.
void read_scales(const Task& task, const Word* words, Stream<Word>& scales, long& trips) {
  const int tiles = tile_count(task), count = task[kFilterBlocks] * kTn * 2;
passes:
  for (int pass = 0; pass < tiles; ++pass)
  scale_words:
    for (int word = 0; word < count; ++word) {
      // II = 1: neighbours in memory
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      scales.write(words[task[kScales] + word]);
      ++trips;
    }
}

// The beats of the shortcut that lie on each tile, row by row.
void read_shortcut(const Task& task, const Beat* maps, Stream<Tile>& tiles, Stream<Beat>& beats,
                   long& trips) {
  const int count = tile_count(task);
  const int row_beats = beats_of_row(task[kShortcutW]);
tiles:
  for (int pass = 0; pass < count; ++pass) {
    const Tile tile = tiles.read();
    const int run = ceil_div(tile.size[2], kPortPositions);
    if (!task[kHasShortcut]) continue;
  blocks:
    for (int block = 0; block < task[kFilterBlocks]; ++block)
    rows:
      for (int row = 0; row < tile.size[0] * tile.size[1]; ++row) {
        const int d = tile.first[0] + quotient(row, tile.size[1]);
        const int h = tile.first[1] + remainder(row, tile.size[1]);
        const int plane = (block * task[kShortcutD] + d) * task[kShortcutH];
        const Beat* from = maps + task[kShortcut] + (plane + h) * row_beats +
                           tile.first[2] / kPortPositions;
      run:
        for (int beat = 0; beat < run; ++beat) {
          // II = 1: neighbours in memory
#pragma HLS PIPELINE II = 1
          KGRC_TRIP();
          beats.write(from[beat]);
          ++trips;
        }
      }
  }
}

void scale(const Task& task, Stream<Tile>& tiles, Stream<Word>& scales, Stream<Beat>& shortcut,
           Stream<SumWord>& sums, Stream<CodeWord>& codes, long& trips) {
  const int count = tile_count(task);
tiles:
  for (int pass = 0; pass < count; ++pass) {
    const Tile tile = tiles.read();
    const int words =
        tile.size[0] * tile.size[1] * ceil_div(tile.size[2], kPortPositions);
  blocks:
    for (int block = 0; block < task[kFilterBlocks]; ++block) {
      Scale of[kTn];
    filters:
      for (int i = 0; i < 2 * kTn; ++i) {
        // II = 1: a word a trip, into registers
#pragma HLS PIPELINE II = 1
        KGRC_TRIP();
        const Word word = scales.read();
        if (i % 2 == 0) {
          of[i / 2].bias = Int<64>(word);
        } else {
          of[i / 2].mult = int(word & 0xffff);
          of[i / 2].shift = int(word >> 16 & 0xff);
        }
        ++trips;
      }
    sum_words:
      for (int word = 0; word < words; ++word) {
        // II = 1: every word stands for itself
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
            Int<64> value =
                rounded_shift((Int<64>(in.sum[i][n]) + of[n].bias) * Int<64>(of[n].mult),
                              of[n].shift);
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
        ++trips;
      }
    }
  }
}

}  // namespace kgrc
