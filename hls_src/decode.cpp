// From beats to the words of the array: where each input position lies in the region, and which
// weights, taps and rows make up a weight word.
#include "design.h"

namespace kgrc {

// Gives each position of a region its bank and row. Positions outside the map get the fill value
// here, so that padding costs no memory access.
void place_input(const Task& task, Stream<Tile>& tiles, Stream<Item>& items, Stream<Beat>& beats_0,
                 Stream<Beat>& beats_1, Stream<RegionWord>& region_words, long& trips) {
  const int in_d = task[kInD], in_h = task[kInH], in_w = task[kInW];
  const int count = tile_count(task);
  bool odd = false;  // of the present plane; its port
  Vector fill;
  for (int n = 0; n < kTn; ++n) fill.code[n] = Code(task[kFill]);
tiles:
  for (int number = 0; number < count; ++number) {
    const Tile tile = tiles.read();
    const Region region = make_region(task, tile);
    const int parts = parts_of_beat(region);
    const int lanes = kPortPositions / parts;
    const int words = region.rows[0] * region.rows[1] * region.beats * parts;
  plan:
    for (int i = 0; i < task[kItemCount]; ++i) {
      const Item item = items.read();
      if (!item.new_region) continue;
      int a = 0, b = 0, j = 0, part = 0;
      Beat beat;
    region_words:
      for (int word = 0; word < words; ++word) {
        // II = 1: a, b, j and part count up by one; no bank is read
#pragma HLS PIPELINE II = 1
        KGRC_TRIP();
        const int x[2] = {row_offset(region, 0, a), row_offset(region, 1, b)};
        const int at[2] = {region.begin[0] + x[0], region.begin[1] + x[1]};
        const int beat_at = region.first_beat + j;
        const bool inside = at[0] >= 0 && at[0] < in_d && at[1] >= 0 && at[1] < in_h &&
                            beat_at >= 0 && beat_at < region.row_beats;
        if (inside && part == 0) beat = odd ? beats_1.read() : beats_0.read();
        const int sd = region.stride[0], sh = region.stride[1], sw = region.stride[2];
        const int phases = (remainder(x[0], sd) * tile.phases[1] + remainder(x[1], sh)) *
                           tile.phases[2];
        const int row_address = phases * tile.phase_size + quotient(x[0], sd) * tile.plane +
                                quotient(x[1], sh) * tile.pitch;
        RegionWord out;
        out.last = word == words - 1;
      positions:
        for (int lane = 0; lane < kPortPositions; ++lane) {
#pragma HLS UNROLL
          const int position = beat_at * kPortPositions + lane;
          const int along = position - region.begin[2];
          const bool needed = along >= 0 && along < region.width && lane / lanes == part;
          const int phase = needed ? remainder(along, sw) : 0;
          out.valid[lane] = needed && phase < tile.phases[2];
          const int address = out.valid[lane]
                                  ? row_address + phase * tile.phase_size + quotient(along, sw)
                                  : 0;
          out.place[lane].row = address / kPf;
          out.place[lane].bank = address % kPf;
          const bool known = inside && position < in_w;
          for (int n = 0; n < kTn; ++n)
            out.vector[lane].code[n] = known ? code_of(beat.word64, lane * kTn + n) : fill.code[n];
        }
        region_words.write(out);
        ++trips;
        if (++part == parts) {
          part = 0;
          if (++j == region.beats) {
            j = 0;
            if (++b == region.rows[1]) {
              b = 0;
              ++a;
              if (at[0] >= 0 && at[0] < in_d) odd = !odd;
            }
          }
        }
      }
    }
  }
}

// Where the input of a tap lies, relative to the place of an output in the region.
static Place place_of_tap(const Task& task, const Tile& tile, int tap) {
  const int kh = task[kKernelH], kw = task[kKernelW];
  const int at[3] = {quotient(quotient(tap, kw), kh), remainder(quotient(tap, kw), kh),
                     remainder(tap, kw)};
  const int stride[3] = {task[kStrideD], task[kStrideH], task[kStrideW]};
  const int phases = (remainder(at[0], stride[0]) * tile.phases[1] + remainder(at[1], stride[1])) *
                         tile.phases[2] +
                     remainder(at[2], stride[2]);
  const int address = phases * tile.phase_size + quotient(at[0], stride[0]) * tile.plane +
                      quotient(at[1], stride[1]) * tile.pitch + quotient(at[2], stride[2]);
  Place place = {address / kPf, address % kPf};
  return place;
}

// Makes the weight words of each item, for every tap tile, column step and row step: the weights
// of the enabled groups, the places of their taps, and their rows. A beat of the weight port takes
// a trip. A pool has words without weights, one for each tap.
//
// Known fault: in each trip P_K places are read from `offset`, a memory with two ports. With
// P_K = 3 that is II = 2 at best.
void make_words(const Task& task, Stream<Tile>& tiles, Stream<Item>& items,
                Stream<WeightBeat>& beats_0, Stream<WeightBeat>& beats_1, Stream<Index>& indices,
                Stream<WeightWord>& words, long& trips) {
  static Place offset[kMaxTaps];
  const bool convolves = is_convolution(task);
  const int taps = taps_of(task);
  const int columns = smaller(taps, kTk);  // taps of a tap tile
  const int words_of_item = item_words(task);
  const int beats_of_chunk = convolves ? task[kChunkBeats] : 1;
  const int count = tile_count(task);
tiles:
  for (int number = 0; number < count; ++number) {
    const Tile tile = tiles.read();
  tap_places:
    for (int tap = 0; tap < taps; ++tap) {
      // II = 1: a tap does not depend on another
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      offset[tap] = place_of_tap(task, tile, tap);
      ++trips;
    }
    int items_left = task[kItemCount];
    int mask = 0;         // enabled groups of the item
    int groups_left = 0;  // of the weight word
    int word = 0, beat = 0, row_step = 0, col_step = 0, tap_tile = 0;
    bool active = false, odd = false;  // odd: the number of the chunk in the tile; its port
    WeightWord out = WeightWord();
    Word64 chunk[kChunkWords];
#pragma HLS ARRAY_PARTITION variable = out.code complete dim = 0
#pragma HLS ARRAY_PARTITION variable = out.offset complete dim = 0
#pragma HLS ARRAY_PARTITION variable = out.row complete dim = 0
#pragma HLS ARRAY_PARTITION variable = chunk complete dim = 0
    for (int i = 0; i < kChunkWords; ++i) chunk[i] = 0;
  chunks:
    while (items_left > 0 || active) {
      // II = 1: a beat a trip; counters that go up by one, and registers
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      ++trips;
      if (!active) {
        const Item item = items.read();
        --items_left;
        // a pool has no groups: one trip makes a word
        mask = convolves || item.mask == 0 ? item.mask : 1;
        groups_left = mask;
        word = beat = row_step = col_step = tap_tile = 0;
        active = mask != 0;
      }
      if (active) {
        int group = 0;
      first_group:
        for (int i = kGroups - 1; i >= 0; --i) {
#pragma HLS UNROLL
          if (groups_left >> i & 1) group = i;
        }
        if (convolves) {
          const WeightBeat read = odd ? beats_1.read() : beats_0.read();
        chunk_words:
          for (int i = 0; i < kChunkWords; ++i) {
#pragma HLS UNROLL
            if (i / kWeightPortWords == beat) chunk[i] = read.word64[i % kWeightPortWords];
            else if (beat == 0) chunk[i] = 0;
          }
        }
        if (++beat == beats_of_chunk) {
          beat = 0;
          odd = !odd;
          Index index = Index();
          if (kSparse && convolves) index = indices.read();
        codes:
          for (int k = 0; k < kPk; ++k)
            for (int r = 0; r < kRows; ++r)
              for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
                out.code[group][r][k][n] = code_of(chunk, (k * kRows + r) * kTn + n);
              }
        columns:
          for (int k = 0; k < kPk; ++k) {
#pragma HLS UNROLL
            int tap = word;
            if (convolves) {
              const int kept = index_byte(index, k);
              tap = tap_tile * columns + (kSparse ? kept : col_step * kPk + k);
            }
            // A column that pads P_K or the last tap tile has zero weights: any tap will do.
            // A dense design reads the same taps for all groups, whichever are enabled.
            out.offset[kSparse ? group : 0][k] = offset[tap < taps ? tap : 0];
          }
        rows:
          for (int r = 0; r < kRows; ++r) {
#pragma HLS UNROLL
            out.row[group][r] = kSparse && convolves ? index_byte(index, kPk + r)
                                                     : row_step * kRows + r;
          }
          groups_left &= groups_left - 1;
          if (groups_left == 0) {
            words.write(out);
            groups_left = mask;
            if (++row_step == task[kRowSteps]) {
              row_step = 0;
              if (++col_step == task[kColSteps]) {
                col_step = 0;
                ++tap_tile;
              }
            }
            if (++word == words_of_item) active = false;
          }
        }
      }
    }
  }
}

}  // namespace kgrc
