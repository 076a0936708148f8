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

// The maxima of windows of `width` neighbouring positions, a power of two up to B. They come to lie
// in the part `turn` of the B lanes; the others keep what `held` has of the beats before.
static void pool_width(const CodeWord& in, int width, int turn, CodeWord& held) {
#pragma HLS INLINE
  CodeWord widest = in;
widths:
  for (int window = 1; window <= kPortPositions; window *= 2) {
#pragma HLS UNROLL
    const int lanes = kPortPositions / window;
  lanes:
    for (int lane = 0; lane < kPortPositions; ++lane)
      for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
        if (width == window && turn == lane / lanes)
          held.code[lane][n] = widest.code[lane % lanes][n];
      }
  pairs:
    for (int lane = 0; lane < lanes / 2; ++lane)
      for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
        const Int<16> a = widest.code[2 * lane][n], b = widest.code[2 * lane + 1][n];
        widest.code[lane][n] = a > b ? a : b;
      }
  }
}

// Takes the finished codes of a tile; gives the beats of its output map.
//
// A pool's windows do not overlap and lie within the tile; along the width they lie within a beat.
// `held` collects the maxima along the width until they fill a beat, or the row ends. `kept` holds
// the maxima of a row of windows from one row of codes to the next. Two rows are kPoolDistance
// trips apart or more: narrow maps have trips without codes at the end of a row.
void pack_output(const Task& task, Stream<Tile>& tiles, Stream<CodeWord>& codes,
                 Stream<Beat>& beats, long& trips) {
  static Ram<Int<16>, kStoreRows, kPoolDistance> kept[kPortPositions][kTn];
#pragma HLS ARRAY_PARTITION variable = kept complete dim = 1
#pragma HLS ARRAY_PARTITION variable = kept complete dim = 2
  typedef UInt<16> Count;
  const Count pool_d = task[kPoolD], pool_h = task[kPoolH], pool_w = task[kPoolW];
  const bool pools = task[kPoolD] * task[kPoolH] * task[kPoolW] > 1;
  // codes of 16 bits in a design with fewer take more than one beat
  const UInt<3> parts = task[kWide] ? kWidePerBeat : 1;
  const int count = tile_count(task);
tiles:
  for (int number = 0; number < count; ++number) {
    const Tile tile = tiles.read();
    const Count rows = tile.size[1], row_beats = beats_of_row(tile.size[2]);
    const int row_words = int(row_beats) * int(parts);
    const int idle = pools ? larger(0, kPoolDistance - row_words) : 0;
    const int words = task[kVectors] * tile.size[0] * tile.size[1] * (row_words + idle);
    // of the present code: row of the tile, beat of the row, part of the beat; of its window: plane
    // and row, the first row of `kept` of this row of windows, and the present one
    Count h = 0, beat = 0, in_d = 0, in_h = 0, turn = 0, first_row = 0, row = 0;
    Count idle_left = idle;
    UInt<3> part = 0;
    bool waits = false, complete = false;
    CodeWord in, held, out;
#pragma HLS ARRAY_PARTITION variable = in.code complete dim = 0
#pragma HLS ARRAY_PARTITION variable = held.code complete dim = 0
#pragma HLS ARRAY_PARTITION variable = out.code complete dim = 0
    for (int lane = 0; lane < kPortPositions; ++lane)
      for (int n = 0; n < kTn; ++n) in.code[lane][n] = held.code[lane][n] = out.code[lane][n] = 0;
  code_words:
    for (int word = 0; word < words; ++word) {
      // II = 1: counters that go up by one. A row of `kept` is read kPoolDistance trips after it
      // was written, or later.
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = kept inter RAW distance = kPoolDistance true
      KGRC_TRIP();
      ++trips;
      const bool last_beat = beat == row_beats - 1, last_part = part == parts - 1;
      const bool last_turn = turn == pool_w - 1 || last_beat;
      if (!waits) {
        if (part == 0) {
          in = codes.read();
          out = in;
          complete = true;
          if (pools) {
            pool_width(in, pool_w, turn, held);
            const bool starts = in_d == 0 && in_h == 0;
            const bool ends = in_d == pool_d - 1 && in_h == pool_h - 1;
            complete = ends && last_turn;
          lanes:
            for (int lane = 0; lane < kPortPositions; ++lane)
              for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
                Int<16> most = held.code[lane][n];
                if (last_turn) {
                  const Int<16> old = starts ? most : kept[lane][n].read(row);
                  if (old > most) most = old;
                  if (!ends) kept[lane][n].write(row, most);
                }
                out.code[lane][n] = most;
              }
          }
        }
        if (complete) beats.write(pack(out, parts > 1, part));
      }
      // the next code
      const bool ends_codes = !waits && last_beat && last_part;
      const bool ends_row = waits ? idle_left == 1 : ends_codes && idle == 0;
      idle_left = waits && !ends_row ? int(idle_left) - 1 : idle;
      waits = !ends_row && (waits || ends_codes);
      if (!waits && !ends_row) {
        if (last_part) {
          row += last_turn;
          turn = last_turn ? 0 : int(turn) + 1;
          beat += 1;
        }
        part = last_part ? 0 : int(part) + 1;
      }
      if (ends_row) {
        const bool ends_window = in_h == pool_h - 1, ends_plane = h == rows - 1;
        const int next_row = int(row) + 1;
        row = first_row = ends_plane ? 0 : ends_window ? next_row : int(first_row);
        in_d = !ends_plane ? int(in_d) : in_d == pool_d - 1 ? 0 : int(in_d) + 1;
        in_h = ends_window || ends_plane ? 0 : int(in_h) + 1;
        h = ends_plane ? 0 : int(h) + 1;
        turn = 0;
        beat = 0;
        part = 0;
      }
    }
  }
}

}  // namespace kgrc
