// What moves between memory and the array: regions of the input, compact weights, finished codes.
//
// Each port is read by a process of its own, in loops over neighbouring addresses without a
// condition, so that the reads become bursts; what is to be done with the beats is another
// process's business. So no read waits for the arithmetic, nor the arithmetic for one read.
#include "design.h"

namespace kgrc {

// What both processes of the input have to know of a tile's region.
struct Region {
  int stride[3], kernel[3];
  int begin[3];       // its first position on the map, in the padding perhaps
  int rows[2];        // along depth and height; some lie between the windows and are left out
  int width;
  int first_beat, beats;
  int row_beats;      // of the map
};

static Region make_region(const Task& task, const Tile& tile) {
  Region region;
axes:
  for (int axis = 0; axis < 3; ++axis) {
    region.stride[axis] = task[Field(kStrideD + axis)];
    region.kernel[axis] = task[Field(kKernelD + axis)];
    region.begin[axis] = tile.first[axis] * region.stride[axis] - task[Field(kPadD + axis)];
  }
  for (int axis = 0; axis < 2; ++axis)
    region.rows[axis] = region.kernel[axis] < region.stride[axis]
                            ? tile.size[axis] * region.kernel[axis]
                            : (tile.size[axis] - 1) * region.stride[axis] + region.kernel[axis];
  region.width = (tile.size[2] - 1) * region.stride[2] + region.kernel[2];
  region.first_beat = floor_div(region.begin[2], kPortPositions);
  region.beats =
      floor_div(region.begin[2] + region.width - 1, kPortPositions) - region.first_beat + 1;
  region.row_beats = beats_of_row(task[kInW]);
  return region;
}

// Where row number `row` of a region lies, from the region's first position.
static int row_offset(const Region& region, int axis, int row) {
#pragma HLS INLINE
  const int kernel = region.kernel[axis], stride = region.stride[axis];
  return kernel < stride ? quotient(row, kernel) * stride + remainder(row, kernel) : row;
}

// The beats of the map that lie in the regions of the plan, in the order of the array.
//
// A map lies in memory as [channels / T_N][D][H][W / B][B][T_N], W filled up to whole beats of B
// positions. Rows that are whole follow each other, and are read as one run.
void read_input(const Task& task, const Beat* maps, Stream<Tile>& tiles, Stream<Item>& items,
                Stream<Beat>& beats, long& trips) {
  const int in_d = task[kInD], in_h = task[kInH];
  const int count = tile_count(task);
tiles:
  for (int pass = 0; pass < count; ++pass) {
    const Region region = make_region(task, tiles.read());
    const int first = larger(region.first_beat, 0);
    const int length = smaller(region.first_beat + region.beats, region.row_beats) - first;
    const bool whole = length == region.row_beats && region.kernel[1] >= region.stride[1];
    const int top = larger(region.begin[1], 0);
    const int joined = smaller(region.begin[1] + region.rows[1], in_h) - top;
  plan:
    for (int i = 0; i < task[kItemCount]; ++i) {
      const Item item = items.read();
      if (!item.new_region || length <= 0) continue;
    depths:
      for (int a = 0; a < region.rows[0]; ++a) {
        const int d = region.begin[0] + row_offset(region, 0, a);
        if (d < 0 || d >= in_d) continue;
        const int plane = task[kSource] + (item.channel_tile * in_d + d) * in_h * region.row_beats;
      heights:
        for (int b = 0; b < (whole ? 1 : region.rows[1]); ++b) {
          const int h = whole ? top : region.begin[1] + row_offset(region, 1, b);
          if (h < 0 || h >= in_h) continue;
          const int run = whole ? joined * length : length;
          const Beat* from = maps + plane + h * region.row_beats + first;
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
  }
}

// Regions of the input, one for every new channel tile of the plan: each position gets its bank
// and row. What lies outside the map is filled here, so that padding costs no memory.
void place_input(const Task& task, Stream<Tile>& tiles, Stream<Item>& items, Stream<Beat>& beats,
                 Stream<RegionWord>& region_words, long& trips) {
  const int in_d = task[kInD], in_h = task[kInH], in_w = task[kInW];
  const int count = tile_count(task);
  Vector fill;
  for (int n = 0; n < kTn; ++n) fill.code[n] = Code(task[kFill]);
tiles:
  for (int pass = 0; pass < count; ++pass) {
    const Tile tile = tiles.read();
    const Region region = make_region(task, tile);
    // two ports a bank: with a stride of 3 or more a whole beat could meet one bank three times
    const int parts = region.stride[2] > 2 ? ceil_div(kPortPositions, 2) : 1;
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
        // II = 1: a, b, j and part count up by one add; banks are not read here
#pragma HLS PIPELINE II = 1
        KGRC_TRIP();
        const int x[2] = {row_offset(region, 0, a), row_offset(region, 1, b)};
        const int at[2] = {region.begin[0] + x[0], region.begin[1] + x[1]};
        const int beat_at = region.first_beat + j;
        const bool inside = at[0] >= 0 && at[0] < in_d && at[1] >= 0 && at[1] < in_h &&
                            beat_at >= 0 && beat_at < region.row_beats;
        if (inside && part == 0) beat = beats.read();
        const int sd = region.stride[0], sh = region.stride[1], sw = region.stride[2];
        const int phases =
            (remainder(x[0], sd) * tile.phases[1] + remainder(x[1], sh)) * tile.phases[2];
        const int row_address = phases * tile.block + quotient(x[0], sd) * tile.plane +
                                quotient(x[1], sh) * tile.pitch;
        RegionWord out;
        out.last = word == words - 1;
      positions:
        for (int lane = 0; lane < kPortPositions; ++lane) {
#pragma HLS UNROLL
          const int position = beat_at * kPortPositions + lane;
          const int along = position - region.begin[2];
          const bool seen = along >= 0 && along < region.width && lane / lanes == part;
          const int phase = seen ? remainder(along, sw) : 0;
          out.valid[lane] = seen && phase < tile.phases[2];
          const int address =
              out.valid[lane] ? row_address + phase * tile.block + quotient(along, sw) : 0;
          out.place[lane].row = address / kPf;
          out.place[lane].bank = address % kPf;
          const bool known = inside && position < in_w;
          for (int n = 0; n < kTn; ++n)
            out.vector[lane].code[n] = known ? code_of(beat, lane * kTn + n) : fill.code[n];
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
            }
          }
        }
      }
    }
  }
}

// The chunks of a pass over the plan: for each enabled group the weights of one word.
void read_weights(const Task& task, const WeightBeat* weights, Stream<WeightBeat>& beats,
                  long& trips) {
  const int tiles = tile_count(task), count = task[kChunks] * task[kChunkBeats];
passes:
  for (int pass = 0; pass < tiles; ++pass)
  weight_beats:
    for (int beat = 0; beat < count; ++beat) {
      // II = 1: neighbours in memory
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      beats.write(weights[task[kWeights] + beat]);
      ++trips;
    }
}

// The columns and rows of each chunk.
void read_indices(const Task& task, const Word* words, Stream<Index>& indices, long& trips) {
  const int tiles = tile_count(task), count = kSparse ? task[kChunks] : 0;
passes:
  for (int pass = 0; pass < tiles; ++pass)
  chunks:
    for (int chunk = 0; chunk < count; ++chunk) {
      // II = kIndexWords: neighbours in memory, and as many to a chunk
#pragma HLS PIPELINE II = kIndexWords
      KGRC_TRIP();
      Index index;
      for (int i = 0; i < kIndexWords; ++i)
        index.word[i] = words[task[kIndices] + chunk * kIndexWords + i];
      indices.write(index);
      trips += kIndexWords;
    }
}

// Where a tap's values lie, relative to an output's place in the region.
static Place place_of_tap(const Task& task, const Tile& tile, int tap) {
  const int kh = task[kKernelH], kw = task[kKernelW];
  const int at[3] = {quotient(quotient(tap, kw), kh), remainder(quotient(tap, kw), kh),
                     remainder(tap, kw)};
  const int stride[3] = {task[kStrideD], task[kStrideH], task[kStrideW]};
  const int phases =
      (remainder(at[0], stride[0]) * tile.phases[1] + remainder(at[1], stride[1])) *
          tile.phases[2] +
      remainder(at[2], stride[2]);
  const int address = phases * tile.block + quotient(at[0], stride[0]) * tile.plane +
                      quotient(at[1], stride[1]) * tile.pitch + quotient(at[2], stride[2]);
  Place place = {address / kPf, address % kPf};
  return place;
}

// The words that the array works with: for every column block and row block of an item the
// weights of its enabled groups, where their columns lie in the region, and their rows.
void make_words(const Task& task, Stream<Tile>& tiles, Stream<Item>& items,
                Stream<WeightBeat>& beats, Stream<Index>& indices, Stream<WeightWord>& words,
                long& trips) {
  static Place offset[kMaxTaps];
  const bool convolves = is_convolution(task);
  const int taps = task[kKernelD] * task[kKernelH] * task[kKernelW];
  const int columns = smaller(taps, kTk);
  const int blocks = convolves ? task[kTapTiles] * task[kColSteps] * task[kRowSteps] : taps;
  const int beats_of_chunk = convolves ? task[kChunkBeats] : 1;
  const int count = tile_count(task);
tiles:
  for (int pass = 0; pass < count; ++pass) {
    const Tile tile = tiles.read();
  tap_places:
    for (int tap = 0; tap < taps; ++tap) {
      // II = 1: each tap stands for itself
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      offset[tap] = place_of_tap(task, tile, tap);
      ++trips;
    }
    int items_left = task[kItemCount];
    int mask = 0;          // of the item
    int groups_left = 0;   // of the word
    int block = 0, beat = 0, row_step = 0, col_step = 0, tap_tile = 0;
    bool active = false;
    WeightWord out = WeightWord();
    Word chunk[kChunkWords];
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
        block = beat = row_step = col_step = tap_tile = 0;
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
          const WeightBeat read = beats.read();
        chunk_words:
          for (int i = 0; i < kChunkWords; ++i) {
#pragma HLS UNROLL
            if (i / kWeightPortWords == beat) chunk[i] = read.word[i % kWeightPortWords];
            else if (beat == 0) chunk[i] = 0;
          }
        }
        if (++beat == beats_of_chunk) {
          beat = 0;
          Index index = Index();
          if (kSparse && convolves) index = indices.read();
        codes:
          for (int k = 0; k < kPk; ++k)
            for (int r = 0; r < kRows; ++r)
              for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
                const int bit = ((k * kRows + r) * kTn + n) * kBits;
                out.code[group][r][k][n] =
                    Code(Int<64>(chunk[bit / 64] << (64 - kBits - bit % 64)) >> (64 - kBits));
              }
        columns:
          for (int k = 0; k < kPk; ++k) {
#pragma HLS UNROLL
            int column = block;
            if (convolves) {
              const int kept = int(index_byte(index, k));
              column = tap_tile * columns + (kSparse ? kept : col_step * kPk + k);
            }
            // one that fills up P_K, or the last tap tile, has zero weights: any tap will do
            // a dense design reads one set of columns for all groups, whichever are enabled
            out.offset[kSparse ? group : 0][k] = offset[column < taps ? column : 0];
          }
        rows:
          for (int r = 0; r < kRows; ++r) {
#pragma HLS UNROLL
            out.row[group][r] = kSparse && convolves ? int(index_byte(index, kPk + r))
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
            if (++block == blocks) active = false;
          }
        }
      }
    }
  }
}

// A beat of codes: all of them, or the part that has room where they are wider than the design's.
static Beat pack(const CodeWord& codes, bool wide, int part) {
#pragma HLS INLINE
  const int few = kPortPositions * kTn / kWidePerBeat;
  Beat beat;
  for (int i = 0; i < kBeatWords; ++i) beat.word[i] = 0;
narrow:
  for (int i = 0; i < kPortPositions * kTn; ++i) {
#pragma HLS UNROLL
    const Word code = Word(codes.code[i / kTn][i % kTn]) & ((Word(1) << kBits) - 1);
    beat.word[i * kBits / 64] |= code << (i * kBits % 64);
  }
  if (!wide) return beat;
  for (int i = 0; i < kBeatWords; ++i) beat.word[i] = 0;
wide:
  for (int i = 0; i < few; ++i) {
#pragma HLS UNROLL
    const int source = part * few + i;
    const Word code = Word(codes.code[source / kTn][source % kTn]) & 0xffff;
    beat.word[i / 4] |= code << (i % 4 * 16);
  }
  return beat;
}

// Finished codes to memory, and the max pool that rides on a task.
//
// The largest code of each window is kept until its last one has come; each lane of a beat has a
// memory of its own, so that the two halves of a beat are no hazard.
void store(const Task& task, Beat* maps, Stream<Tile>& tiles, Stream<CodeWord>& codes,
           long& trips, long& output_beats) {
  static Ram<Int<16>, kStoreRows> kept[kPortPositions][kTn];
#pragma HLS ARRAY_PARTITION variable = kept complete dim = 1
#pragma HLS ARRAY_PARTITION variable = kept complete dim = 2
  const int pd = task[kPoolD], ph = task[kPoolH], pw = task[kPoolW];
  const int out_d = quotient(task[kOutD], pd), out_h = quotient(task[kOutH], ph);
  const int row_beats = beats_of_row(quotient(task[kOutW], pw));
  const bool pools = pd * ph * pw > 1;
  // codes of 16 bits in a design of fewer fill more than one beat
  const int parts = task[kWide] ? kWidePerBeat : 1;
  const int count = tile_count(task);

tiles:
  for (int pass = 0; pass < count; ++pass) {
    const Tile tile = tiles.read();
    const int beats = ceil_div(tile.size[2], kPortPositions);
    const int words = tile.size[0] * tile.size[1] * beats * parts;
    const int first[3] = {quotient(tile.first[0], pd), quotient(tile.first[1], ph),
                          quotient(tile.first[2], pw)};
    const int pooled_rows = quotient(tile.size[1] + ph - 1, ph);
  blocks:
    for (int block = 0; block < task[kFilterBlocks]; ++block) {
      int d = 0, h = 0, j = 0, part = 0;
      CodeWord in;
    code_words:
      for (int word = 0; word < words; ++word) {
        // II = 1: the maxima of one place are visited a row of the tile apart, or in other lanes
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = kept inter false
        KGRC_TRIP();
        if (part == 0) in = codes.read();
        const int lanes_used = smaller(kPortPositions, tile.size[2] - j * kPortPositions);
        const int window[2] = {quotient(d, pd), quotient(h, ph)};
        CodeWord out = in;
        int position = j * kPortPositions;
        bool complete = true;
        if (pools) {
          // neighbours along the width lie within the beat
        neighbours:
          for (int lane = 0; lane < kPortPositions; ++lane) {
#pragma HLS UNROLL
            const int target = quotient(lane, pw);
            const bool starts = remainder(lane, pw) == 0;
            for (int n = 0; n < kTn; ++n)
              if (starts || in.code[lane][n] > out.code[target][n])
                out.code[target][n] = in.code[lane][n];
          }
          position = quotient(position, pw);
          const int lanes = quotient(lanes_used, pw), shift = position % kPortPositions;
          const int row = (window[0] * pooled_rows + window[1]) * ceil_div(beats, pw) +
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
          complete = ends && (shift + lanes == kPortPositions || j == beats - 1);
          position -= shift;
        }
        if (complete) {
          const int at = ((block * out_d + first[0] + window[0]) * out_h + first[1] + window[1]) *
                             row_beats +
                         (first[2] + position) / kPortPositions;
          maps[task[kTarget] + at * parts + part] = pack(out, parts > 1, part);
          ++output_beats;
        }
        ++trips;
        if (++part == parts) {
          part = 0;
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
}

}  // namespace kgrc
