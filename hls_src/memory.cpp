// What moves between memory and the array: regions of the input, compact weights, finished codes.
#include "design.h"

namespace kgrc {

// Regions of the input, one for every new channel tile of the plan, in the order of the array.
//
// A map lies in memory as [channels / T_N][D][H][W / B][B][T_N], W filled up to whole beats of B
// positions. Positions outside the map are filled here, so that padding costs no memory.
void fetch_input(const Task& task, const Beat* maps, Stream<Item>& items,
                 Stream<RegionWord>& region, Trips& trips) {
  const int size[3] = {task[kInD], task[kInH], task[kInW]};
  const int row_beats = beats_of_row(size[2]);
  const int stride[3] = {task[kStrideD], task[kStrideH], task[kStrideW]};
  const int kernel[3] = {task[kKernelD], task[kKernelH], task[kKernelW]};
  const int pad[3] = {task[kPadD], task[kPadH], task[kPadW]};
  // two ports a bank: with a stride of 3 or more a whole beat could meet one bank three times
  const int parts = stride[2] > 2 ? ceil_div(kPortPositions, 2) : 1;
  const int lanes = ceil_div(kPortPositions, parts);
  Vector fill;
  for (int n = 0; n < kTn; ++n) fill.code[n] = Code(task[kFill]);

tiles_d:
  for (int td = 0; td < tiles_along(task, 0); ++td)
  tiles_h:
    for (int th = 0; th < tiles_along(task, 1); ++th)
    tiles_w:
      for (int tw = 0; tw < tiles_along(task, 2); ++tw) {
        const Tile tile = make_tile(task, td, th, tw);
        int rows[2], begin[3];
        for (int axis = 0; axis < 3; ++axis) begin[axis] = tile.first[axis] * stride[axis] - pad[axis];
        // with a stride beyond the kernel some rows are never looked at
        for (int axis = 0; axis < 2; ++axis)
          rows[axis] = kernel[axis] < stride[axis]
                           ? tile.size[axis] * kernel[axis]
                           : (tile.size[axis] - 1) * stride[axis] + kernel[axis];
        const int width = (tile.size[2] - 1) * stride[2] + kernel[2];
        const int first_beat = floor_div(begin[2], kPortPositions);
        const int beats = floor_div(begin[2] + width - 1, kPortPositions) - first_beat + 1;
      plan:
        for (int i = 0; i < task[kItemCount]; ++i) {
          const Item item = items.read();
          if (!item.new_region) continue;
          const int base = task[kSource] + item.channel_tile * size[0] * size[1] * row_beats;
          int a = 0, b = 0, j = 0, part = 0;
          const int words = rows[0] * rows[1] * beats * parts;
        region_words:
          for (int word = 0; word < words; ++word) {
            // II = 1: a, b, j count up by one add; the read of memory does not depend on another
#pragma HLS PIPELINE II = 1
            KGRC_TRIP();
            const int x[2] = {kernel[0] < stride[0] ? a / kernel[0] * stride[0] + a % kernel[0] : a,
                              kernel[1] < stride[1] ? b / kernel[1] * stride[1] + b % kernel[1] : b};
            const int at[2] = {begin[0] + x[0], begin[1] + x[1]};
            const int beat_at = first_beat + j;
            const bool inside = at[0] >= 0 && at[0] < size[0] && at[1] >= 0 && at[1] < size[1] &&
                                beat_at >= 0 && beat_at < row_beats;
            Beat beat;
            if (inside) {
              beat = maps[base + (at[0] * size[1] + at[1]) * row_beats + beat_at];
              if (part == 0) ++trips.input_beats;
            }
            const int row_address =
                (x[0] % stride[0] * tile.phases[1] + x[1] % stride[1]) * tile.phases[2] * tile.block +
                x[0] / stride[0] * tile.plane + x[1] / stride[1] * tile.pitch;
            RegionWord out;
            out.last = word == words - 1;
          positions:
            for (int lane = 0; lane < kPortPositions; ++lane) {
#pragma HLS UNROLL
              const int position = beat_at * kPortPositions + lane;
              const int along = position - begin[2];
              const int phase = along % stride[2];
              out.valid[lane] = along >= 0 && along < width && phase < tile.phases[2] &&
                                lane / lanes == part;
              const int address =
                  out.valid[lane] ? row_address + phase * tile.block + along / stride[2] : 0;
              out.place[lane].row = address / kPf;
              out.place[lane].bank = address % kPf;
              const bool known = inside && position < size[2];
              for (int n = 0; n < kTn; ++n)
                out.vector[lane].code[n] = known ? code_of(beat, lane * kTn + n) : fill.code[n];
            }
            region.write(out);
            ++trips.input;
            if (++part == parts) {
              part = 0;
              if (++j == beats) {
                j = 0;
                if (++b == rows[1]) {
                  b = 0;
                  ++a;
                }
              }
            }
          }
        }
      }
}

// Where a tap's values lie, relative to an output's place in the region.
static Place place_of_tap(const Task& task, const Tile& tile, int tap) {
  const int kh = task[kKernelH], kw = task[kKernelW];
  const int at[3] = {tap / kw / kh, tap / kw % kh, tap % kw};
  const int stride[3] = {task[kStrideD], task[kStrideH], task[kStrideW]};
  const int phase = (at[0] % stride[0] * tile.phases[1] + at[1] % stride[1]) * tile.phases[2] +
                    at[2] % stride[2];
  const int address = phase * tile.block + at[0] / stride[0] * tile.plane +
                      at[1] / stride[1] * tile.pitch + at[2] / stride[2];
  Place place = {address / kPf, address % kPf};
  return place;
}

// The words that the array works with: for every column block and row block of an item the
// weights of its enabled groups, where their columns lie in the region, and their rows.
void fetch_weights(const Task& task, const WeightBeat* weights, const Word* tables,
                   Stream<Item>& items, Stream<WeightWord>& words, Trips& trips) {
  static Place offset[kMaxTaps];
  const int taps = task[kKernelD] * task[kKernelH] * task[kKernelW];
  const int columns = smaller(taps, kTk);
  const int blocks = is_convolution(task) ? task[kTapTiles] * task[kColSteps] * task[kRowSteps] : taps;

tiles_d:
  for (int td = 0; td < tiles_along(task, 0); ++td)
  tiles_h:
    for (int th = 0; th < tiles_along(task, 1); ++th)
    tiles_w:
      for (int tw = 0; tw < tiles_along(task, 2); ++tw) {
        const Tile tile = make_tile(task, td, th, tw);
      tap_places:
        for (int tap = 0; tap < taps; ++tap) {
          // II = 1: each tap stands for itself
#pragma HLS PIPELINE II = 1
          KGRC_TRIP();
          offset[tap] = place_of_tap(task, tile, tap);
          ++trips.weights;
        }
        int at_weights = task[kWeights], at_indices = task[kIndices];
      plan:
        for (int i = 0; i < task[kItemCount]; ++i) {
          const Item item = items.read();
          if (item.mask == 0) continue;
        blocks:
          for (int block = 0; block < blocks; ++block) {
            WeightWord out = WeightWord();
            const int row_step = is_convolution(task) ? block % task[kRowSteps] : 0;
            const int col_step = is_convolution(task) ? block / task[kRowSteps] % task[kColSteps] : 0;
            const int tap_tile =
                is_convolution(task) ? block / task[kRowSteps] / task[kColSteps] : 0;
          groups:
            for (int group = 0; group < kGroups; ++group) {
              int col[kPk];
              for (int k = 0; k < kPk; ++k) col[k] = tap_tile * columns + col_step * kPk + k;
              for (int r = 0; r < kRows; ++r) out.row[group][r] = row_step * kRows + r;
              if (!is_convolution(task)) {
                for (int k = 0; k < kPk; ++k) col[k] = block;
              } else if (item.mask >> group & 1) {
                Word chunk[kChunkWords];
              chunk_beats:
                for (int beat = 0; beat < kChunkWords / kWeightPortWords; ++beat) {
                  // II = 1: beats follow each other in memory
#pragma HLS PIPELINE II = 1
                  KGRC_TRIP();
                  const WeightBeat read = weights[at_weights++];
                  for (int i = 0; i < kWeightPortWords; ++i)
                    chunk[beat * kWeightPortWords + i] = read.word[i];
                  ++trips.weights;
                  ++trips.weight_beats;
                }
                for (int r = 0; r < kRows; ++r)
                  for (int k = 0; k < kPk; ++k)
                    for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
                      const int bit = ((r * kPk + k) * kTn + n) * kBits;
                      out.code[group][r][k][n] =
                          Code(Int<64>(chunk[bit / 64] << (64 - kBits - bit % 64)) >> (64 - kBits));
                    }
                if (kSparse) {
                  Word index[kIndexWords];
                  for (int word = 0; word < kIndexWords; ++word) {
                    // II = 1, beside the weights on a port of its own
#pragma HLS PIPELINE II = 1
                    index[word] = tables[at_indices++];
                    ++trips.table_words;
                  }
                  for (int k = 0; k < kPk; ++k)
                    col[k] = tap_tile * columns + int(index[k / 8] >> (k % 8 * 8) & 0xff);
                  for (int r = 0; r < kRows; ++r)
                    out.row[group][r] = int(index[(kPk + r) / 8] >> ((kPk + r) % 8 * 8) & 0xff);
                }
              }
              // a column that fills up P_K, or the last tap tile, has zero weights: any tap will do
              for (int k = 0; k < kPk; ++k) out.offset[group][k] = offset[col[k] < taps ? col[k] : 0];
            }
            words.write(out);
          }
        }
      }
}

// Finished codes to memory, and the max pool that rides on a task.
//
// The largest code of each window is kept until its last one has come; each lane of a beat has a
// memory of its own, so that the two halves of a beat are no hazard.
void store(const Task& task, Beat* maps, Stream<CodeWord>& codes, Trips& trips) {
  static Ram<Int<16>, kStoreRows> kept[kPortPositions][kTn];
  const int pd = task[kPoolD], ph = task[kPoolH], pw = task[kPoolW];
  const int out_d = task[kOutD] / pd, out_h = task[kOutH] / ph;
  const int row_beats = beats_of_row(task[kOutW] / pw);
  const bool pools = pd * ph * pw > 1;
  const int wide = task[kWide] ? kWidePerBeat : 1;

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
          int d = 0, h = 0, j = 0;
        code_words:
          for (int word = 0; word < words; ++word) {
            // II = 1: the maxima of one place are visited a row of the tile apart, or in other lanes
#pragma HLS PIPELINE II = 1
            KGRC_TRIP();
            CodeWord in = codes.read();
            const int count = smaller(kPortPositions, tile.size[2] - j * kPortPositions);
            CodeWord out = in;
            int position = j * kPortPositions;
            bool complete = true;
            if (pools) {
              // neighbours along the width lie within the beat
            pairs:
              for (int lane = 0; lane < kPortPositions / pw; ++lane)
                for (int n = 0; n < kTn; ++n) {
                  Int<16> largest = in.code[lane * pw][n];
                  for (int i = 1; i < pw; ++i)
                    if (in.code[lane * pw + i][n] > largest) largest = in.code[lane * pw + i][n];
                  out.code[lane][n] = largest;
                }
              position /= pw;
              const int lanes = count / pw, shift = position % kPortPositions;
              const int row = ((d / pd * ceil_div(tile.size[1], ph) + h / ph) *
                                   ceil_div(beats, pw) + position / kPortPositions);
              const bool starts = d % pd == 0 && h % ph == 0;
              const bool ends = d % pd == pd - 1 && h % ph == ph - 1;
              CodeWord merged;
            lanes:
              for (int lane = 0; lane < kPortPositions; ++lane)
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
              out = merged;
              complete = ends && (shift + lanes == kPortPositions || j == beats - 1);
              position -= shift;
            }
            if (complete) {
              const int at = ((block * out_d + tile.first[0] / pd + d / pd) * out_h +
                              tile.first[1] / ph + h / ph) * row_beats +
                             (tile.first[2] / pw + position) / kPortPositions;
            parts:
              for (int part = 0; part < wide; ++part) {
                Beat beat;
                for (int i = 0; i < kBeatWords; ++i) beat.word[i] = 0;
                const int bits = task[kWide] ? 16 : int(kBits);
                for (int i = 0; i < kPortPositions * kTn / wide; ++i) {
                  const int source = part * (kPortPositions * kTn / wide) + i;
                  const Word code = Word(out.code[source / kTn][source % kTn]) & ((Word(1) << bits) - 1);
                  beat.word[i * bits / 64] |= code << (i * bits % 64);
                }
                maps[task[kTarget] + at * wide + part] = beat;
                ++trips.output_beats;
              }
            }
            ++trips.store;
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
