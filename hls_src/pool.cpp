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
  for (int i = 0; i < kPortPositions * kTn; ++i) {
#pragma HLS UNROLL
    const Word64 code = Word64(codes.code[i / kTn][i % kTn]) & 0xffff;
    if (part == i / few) beat.word64[i % few / 4] |= code << (i % 4 * 16);
  }
  return beat;
}

// The largest codes of windows of `kWidth` neighbours that lie within a beat.
template <int kWidth>
struct Neighbours {
  static void largest(const CodeWord& codes, CodeWord& out) {
#pragma HLS INLINE
    CodeWord half;
    Neighbours<kWidth / 2>::largest(codes, half);
  windows:
    for (int i = 0; i < kPortPositions / kWidth; ++i)
      for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
        const Int<16> a = half.code[2 * i][n], b = half.code[2 * i + 1][n];
        out.code[i][n] = a > b ? a : b;
      }
  }
  // Puts beat number `number` of a row's `width` beats into its part of a beat of windows.
  static void place(const CodeWord& codes, int width, int number, CodeWord& out) {
#pragma HLS INLINE
    Neighbours<kWidth / 2>::place(codes, width, number, out);
    CodeWord windows;
    largest(codes, windows);
    const int few = kPortPositions / kWidth;
  positions:
    for (int i = 0; i < kPortPositions; ++i) {
#pragma HLS UNROLL
      if (width == kWidth && number == i / few)
        for (int n = 0; n < kTn; ++n) out.code[i][n] = windows.code[i % few][n];
    }
  }
};
template <>
struct Neighbours<1> {
  static void largest(const CodeWord& codes, CodeWord& out) {
#pragma HLS INLINE
    out = codes;
  }
  static void place(const CodeWord& codes, int width, int, CodeWord& out) {
#pragma HLS INLINE
    if (width == 1) out = codes;
  }
};

// Takes the finished codes of a tile; gives the beats of its output map.
//
// A beat of windows is made of the beats of a row, as many as windows are wide, in a register.
// `kept` then holds the largest code of each window until the window's last row has come; each
// position of a beat has a memory of its own. A word of it is read kStoreDistance trips after it
// was written at the earliest: what was written since is taken from registers.
void pack_output(const Task& task, Stream<TileSpan>& tiles, Stream<CodeWord>& codes,
                 Stream<Beat>& beats, long& trips) {
  typedef UInt<kSizeBits> Length;
  typedef UInt<kStoreRowBits> StoreRow;
  static Ram<Int<16>, kStoreRows, kStoreDistance> kept[kPortPositions][kTn];
#pragma HLS ARRAY_PARTITION variable = kept complete dim = 1
#pragma HLS ARRAY_PARTITION variable = kept complete dim = 2
  const Length last_in_d = task[kPoolD] - 1, last_in_h = task[kPoolH] - 1;
  const Length width = task[kPoolW], last_in_w = task[kPoolW] - 1;
  // codes of 16 bits in a design with fewer take more than one beat
  const UInt<4> last_part = (task[kWide] ? int(kWidePerBeat) : 1) - 1;
  const bool wide = task[kWide] && kWidePerBeat > 1;
  const UInt<kItemVectorsBits> vectors = task[kVectors];
  const int count = tile_count(task);
tiles:
  for (int number = 0; number < count; ++number) {
    const TileSpan span = tiles.read();
    const Length last_d = span.size[0] - 1, last_h = span.size[1] - 1;
    const Length last_j = beats_of_row(span.size[2]) - 1;
    // beats of windows in a row
    const Length pooled_beats = quotient(last_j, width) + 1;
    Length d = 0, h = 0, j = 0, in_d = 0, in_h = 0, in_w = 0;
    UInt<4> part = 0;
    // in `kept`: the first word of the plane of windows, of their row, and the present one
    StoreRow plane = 0, first = 0, row = 0;
    UInt<kItemVectorsBits> vectors_left = vectors;
    CodeWord in = CodeWord(), gathered = CodeWord(), out = CodeWord();
#pragma HLS ARRAY_PARTITION variable = in.code complete dim = 0
#pragma HLS ARRAY_PARTITION variable = gathered.code complete dim = 0
#pragma HLS ARRAY_PARTITION variable = out.code complete dim = 0
    // what was written last; the latest first
    StoreRow recent_row[kStoreDistance - 1];
    CodeWord recent[kStoreDistance - 1];
#pragma HLS ARRAY_PARTITION variable = recent_row complete
#pragma HLS ARRAY_PARTITION variable = recent complete
    for (int i = 0; i < kStoreDistance - 1; ++i) {
      recent_row[i] = 0;
      recent[i] = CodeWord();
    }
  code_words:
    while (vectors_left != 0) {
      // II = 1: counters, and a comparison with what was written last
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = kept inter RAW distance = kStoreDistance true
#pragma HLS DEPENDENCE variable = kept intra RAW false
      KGRC_TRIP();
      if (part == 0) {
        in = codes.read();
        Neighbours<kPortPositions>::place(in, width, in_w, gathered);
      }
      const bool ends_part = part == last_part, ends_row = j == last_j;
      const bool ends_beat = in_w == last_in_w || ends_row;
      const bool starts = in_d == 0 && in_h == 0;
      const bool ends_window_h = in_h == last_in_h;
      const bool ends = in_d == last_in_d && ends_window_h;
      bool is_recent = false, is[kStoreDistance - 1];
      for (int i = 0; i < kStoreDistance - 1; ++i) {
#pragma HLS UNROLL
        is[i] = recent_row[i] == row;
        is_recent = is_recent || is[i];
      }
      if (part == 0 && ends_beat) {
      lanes:
        for (int lane = 0; lane < kPortPositions; ++lane)
          for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
            Int<16> value = gathered.code[lane][n];
            if (!starts) {
              Int<16> old = 0;
              if (!is_recent) old = kept[lane][n].read(row);
              for (int i = kStoreDistance - 2; i >= 0; --i) {
                const Int<16> written = recent[i].code[lane][n];
                old = is[i] ? written : old;
              }
              if (old > value) value = old;
            }
            if (!ends) kept[lane][n].write(row, value);
            out.code[lane][n] = value;
          }
        if (!ends) {
        recent_words:
          for (int i = kStoreDistance - 2; i > 0; --i) {
#pragma HLS UNROLL
            recent_row[i] = recent_row[i - 1];
            recent[i] = recent[i - 1];
          }
          recent_row[0] = row;
          recent[0] = out;
        }
      }
      if (ends && ends_beat) beats.write(pack(out, wide, part));
      ++trips;
      part = ends_part ? 0 : int(part) + 1;
      if (ends_part) {
        const bool ends_plane = ends_row && h == last_h, ends_vector = ends_plane && d == last_d;
        j = ends_row ? 0 : int(j) + 1;
        in_w = ends_beat ? 0 : int(in_w) + 1;
        if (ends_row) {
          h = ends_plane ? 0 : int(h) + 1;
          in_h = ends_window_h ? 0 : int(in_h) + 1;
        }
        if (ends_plane) {
          d = ends_vector ? 0 : int(d) + 1;
          in_d = in_d == last_in_d ? 0 : int(in_d) + 1;
        }
        const StoreRow next_first = first + pooled_beats;
        if (ends_vector) plane = 0;
        else if (ends_plane && ends) plane = next_first;
        if (ends_plane) first = plane;
        else if (ends_row && ends_window_h) first = next_first;
        row = ends_row ? int(first) : int(row) + ends_beat;
        if (ends_vector) vectors_left -= 1;
      }
    }
  }
}

}  // namespace kgrc
