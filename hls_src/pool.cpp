// From codes to beats of the output map, with the max pool that is fused with a task.
#include "design.h"

namespace kgrc {

// A beat of codes: all of them, or the part that has room where they are wider than the design's.
static Beat pack(const CodeWord& codes, bool wide, int part) {
#pragma HLS INLINE
  const int few = kPortPositions * kTn / kWidePerBeat;
  Beat beat;
  for (int i = 0; i < kBeatWords; ++i) beat.word64[i] = 0;
narrow:
  for (int i = 0; i < kPortPositions * kTn; ++i) {
#pragma HLS UNROLL
    const Word64 code = Word64(codes.code[i / kTn][i % kTn]) & ((Word64(1) << kBits) - 1);
    beat.word64[i * kBits / 64] |= code << (i * kBits % 64);
  }
  if (!wide) return beat;
  for (int i = 0; i < kBeatWords; ++i) beat.word64[i] = 0;
wide:
  for (int i = 0; i < few; ++i) {
#pragma HLS UNROLL
    const int source = part * few + i;
    const Word64 code = Word64(codes.code[source / kTn][source % kTn]) & 0xffff;
    beat.word64[i / 4] |= code << (i % 4 * 16);
  }
  return beat;
}

// Takes the finished codes of a tile; gives the beats of its output map.
//
// `kept` holds the largest code so far of each pooling window until the window's last code has
// come. Each position of a beat has a memory of its own.
//
// Known fault: II = 1 is not to be had. With a pool of width 2, or on maps that are at most one beat
// wide, a maximum is read one trip after it was written, but reading, comparing and writing a block
// RAM takes two.
void pack_output(const Task& task, Stream<Tile>& tiles, Stream<CodeWord>& codes,
                 Stream<Beat>& beats, long& trips) {
  static Ram<Int<16>, kStoreRows> kept[kPortPositions][kTn];
#pragma HLS ARRAY_PARTITION variable = kept complete dim = 1
#pragma HLS ARRAY_PARTITION variable = kept complete dim = 2
  const int pd = task[kPoolD], ph = task[kPoolH], pw = task[kPoolW];
  const bool pools = pd * ph * pw > 1;
  // codes of 16 bits in a design with fewer take more than one beat
  const int parts = task[kWide] ? kWidePerBeat : 1;
  const int count = tile_count(task);
tiles:
  for (int number = 0; number < count; ++number) {
    const Tile tile = tiles.read();
    const int beats_in = beats_of_row(tile.size[2]);
    const int words = tile.size[0] * tile.size[1] * beats_in * parts;
    const int pooled_rows = quotient(tile.size[1] + ph - 1, ph);
  vectors:
    for (int vector = 0; vector < task[kVectors]; ++vector) {
      int d = 0, h = 0, j = 0, part = 0;
      CodeWord in;
    code_words:
      for (int word = 0; word < words; ++word) {
        // II = 1 is asked for; see the known fault above
#pragma HLS PIPELINE II = 1
        KGRC_TRIP();
        if (part == 0) in = codes.read();
        CodeWord out = in;
        bool complete = true;
        if (pools) {
          // windows that lie within the beat along the width
        neighbours:
          for (int lane = 0; lane < kPortPositions; ++lane) {
#pragma HLS UNROLL
            const int target = quotient(lane, pw);
            const bool starts = remainder(lane, pw) == 0;
            for (int n = 0; n < kTn; ++n)
              if (starts || in.code[lane][n] > out.code[target][n])
                out.code[target][n] = in.code[lane][n];
          }
          const int window[2] = {quotient(d, pd), quotient(h, ph)};
          const int lanes_used = smaller(kPortPositions, tile.size[2] - j * kPortPositions);
          const int position = quotient(j * kPortPositions, pw);
          const int lanes = quotient(lanes_used, pw), shift = position % kPortPositions;
          const int row = (window[0] * pooled_rows + window[1]) * ceil_div(beats_in, pw) +
                          position / kPortPositions;
          const bool starts = window[0] * pd == d && window[1] * ph == h;
          const bool ends = (window[0] + 1) * pd == d + 1 && (window[1] + 1) * ph == h + 1;
          CodeWord merged;
        lanes:
          for (int lane = 0; lane < kPortPositions; ++lane) {
#pragma HLS UNROLL
            for (int n = 0; n < kTn; ++n) {
              const bool mine = lane >= shift && lane < shift + lanes;
              Int<16> value = mine ? out.code[lane - shift][n] : Int<16>(0);
              if (!mine || !starts) {
                const Int<16> old = kept[lane][n].read(row);
                if (!mine || old > value) value = old;
              }
              if (mine) kept[lane][n].write(row, value);
              merged.code[lane][n] = value;
            }
          }
          out = merged;
          complete = ends && (shift + lanes == kPortPositions || j == beats_in - 1);
        }
        if (complete) beats.write(pack(out, parts > 1, part));
        ++trips;
        if (++part == parts) {
          part = 0;
          if (++j == beats_in) {
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
}

}  // namespace kgrc
