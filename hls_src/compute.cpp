// The array: one pipelined loop over everything a task does, without fill and drain in between.
//
// Each trip of the loop does three things at once: it multiplies one word of weights with P_F
// outputs' inputs, it takes one word of the next region, and it hands on one word of finished
// sums. Regions and sums are double-buffered; the loop waits only where one of the three is late.
#include "design.h"
#include "dot.h"

namespace kgrc {

#ifdef KGRC_PORTS
long current_trip = 0;
long port_conflicts = 0;
long early_reads = 0;
#endif

#ifdef KGRC_PACKED
typedef Dot<kBits, kTn> Element;
#else
typedef DotDirect<kBits, kTn> Element;
#endif

static Ram<Vector, kRegionRows> region_ram[2][kCopies][kPf];
typedef Ram<Sum, kSumRows, kMinFeatureRows> SumBank;
static SumBank sum_ram[2][kTm][kPf];

// Sums are cleared as they are handed on; this is for the first time, and after a reset.
void clear_sums() {
rows:
  for (int row = 0; row < kSumRows; ++row) {
    // II = 1: every bank is written once
#pragma HLS PIPELINE II = 1
    KGRC_TRIP();
    for (int half = 0; half < 2; ++half)
      for (int filter = 0; filter < kTm; ++filter)
        for (int lane = 0; lane < kPf; ++lane) sum_ram[half][filter][lane].write(row, Sum(0));
  }
}

// What P_F outputs see at a column: bank b of the region holds the value of output b - offset.
static void read_region(Ram<Vector, kRegionRows> (&banks)[kPf], const int (&rows)[kPf],
                        const Place& offset, Vector (&out)[kPf]) {
#pragma HLS INLINE
lanes:
  for (int lane = 0; lane < kPf; ++lane) {
#pragma HLS UNROLL
    const int sum = lane + offset.bank;
    const int bank = sum >= kPf ? sum - kPf : sum;
    out[lane] = banks[bank].read(rows[lane] + offset.row + (sum >= kPf ? 1 : 0));
  }
}

void multiply(const Task& task, Stream<Tile>& tiles, Stream<Item>& items,
              Stream<RegionWord>& region, Stream<WeightWord>& words, Stream<SumWord>& sums,
              long& trips, long& macs) {
  // the dimensions of the arrays, not the rows within a bank; a vector is one wide word of it
#pragma HLS AGGREGATE variable = region_ram
#pragma HLS ARRAY_PARTITION variable = region_ram complete dim = 1
#pragma HLS ARRAY_PARTITION variable = region_ram complete dim = 2
#pragma HLS ARRAY_PARTITION variable = region_ram complete dim = 3
#pragma HLS ARRAY_PARTITION variable = sum_ram complete dim = 1
#pragma HLS ARRAY_PARTITION variable = sum_ram complete dim = 2
#pragma HLS ARRAY_PARTITION variable = sum_ram complete dim = 3
  const bool convolves = is_convolution(task);
  const bool largest = task[kKind] == kMaxPool;
  const int taps = task[kKernelD] * task[kKernelH] * task[kKernelW];
  const int words_of_item =
      convolves ? task[kTapTiles] * task[kColSteps] * task[kRowSteps] : taps;
  int items_left = task[kItemCount] * tile_count(task);
  int regions_left = task[kRegions] * tile_count(task);
  Tile tile = Tile();

  // compute
  Item item = Item(), next = Item();
  bool have_next = false, active = false, block_done = false;
  int in_use = 1, sums_in_use = 0, words_left = 0, feature_row = 0, feature_rows = 0, word_number = 0;
  WeightWord word = WeightWord();
#pragma HLS ARRAY_PARTITION variable = word.code complete dim = 0
#pragma HLS ARRAY_PARTITION variable = word.offset complete dim = 0
#pragma HLS ARRAY_PARTITION variable = word.row complete dim = 0
  int lane_at[kPf][3], lane_row[kPf];
  // load
  bool full[2] = {false, false};
  int load_into = 0;
  // hand on
  bool draining = false;
  int blocks_left = 0, settling = 0, block = 0, d = 0, h = 0, j = 0, sum_row = 0, sum_lane = 0;
  int drain_size[3] = {1, 1, 1};

flattened:
  while (items_left > 0 || active || block_done || draining) {
    // II = 1. A sum is visited again after kMinFeatureRows trips at the earliest, so that a read
    // meets the write before it; the state is a few counters, each one add a trip. Of a region the
    // first read may follow the last write in the next trip: that is left to the tool to see.
    // A sum that was cleared is as far from being read: where a tile has few rows, the array waits
    // after the last was handed on (`settling`) before it adds to those sums again.
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = sum_ram inter RAW distance = 4 true
    KGRC_TRIP();
    ++trips;

    if (block_done && !draining) {
      draining = true;
      block_done = false;
      sums_in_use ^= 1;
      blocks_left = item.blocks;
      // row r is cleared rows - 2 - r trips before the last, or earlier, and read r trips later
      settling = larger(0, kMinFeatureRows + 1 - tile.feature_rows);
      block = d = h = j = sum_row = sum_lane = 0;
      for (int axis = 0; axis < 3; ++axis) drain_size[axis] = tile.size[axis];
    }

    if (!have_next && items_left > 0 && !active) {
      next = items.read();
      have_next = true;
    }
    if (have_next && !active && !block_done && (!next.new_region || full[in_use ^ 1])) {
      item = next;
      have_next = false;
      --items_left;
      if (item.first) {
        tile = tiles.read();
        feature_rows = larger(tile.feature_rows, kMinFeatureRows);
      }
      if (item.new_region) {
        full[in_use] = false;
        in_use ^= 1;
      }
      words_left = item.mask ? words_of_item : 0;
      feature_row = word_number = 0;
      active = words_left > 0;
      block_done = !active && item.end_block;
    }

    if (active) {
      if (feature_row == 0) {
        word = words.read();
        for (int lane = 0; lane < kPf; ++lane) {
          lane_row[lane] = tile.lane_row[lane];
          for (int axis = 0; axis < 3; ++axis) lane_at[lane][axis] = tile.lane_at[lane][axis];
        }
      }
      if (feature_row < tile.feature_rows) {
        int rows[kPf];
        bool exists[kPf];
        // outputs past the end of the tile read some place that is there, and add to nothing
        for (int lane = 0; lane < kPf; ++lane) {
          exists[lane] = lane_at[lane][0] < tile.size[0];
          rows[lane] = exists[lane] ? lane_row[lane] : 0;
        }
        const int row = item.slot * kFeatureRows + feature_row;
        const int outputs = smaller(
            kPf, tile.size[0] * tile.size[1] * tile.size[2] - feature_row * kPf);
        if (convolves) {
          Vector seen[kReads][kPf];
        columns:
          for (int read = 0; read < kReads; ++read) {
#pragma HLS UNROLL
            read_region(region_ram[in_use][read / 2], rows, word.offset[read / kPk][read % kPk],
                        seen[read]);
          }
        groups:
          for (int group = 0; group < kGroups; ++group) {
#pragma HLS UNROLL
            if (!(item.mask >> group & 1)) continue;
            macs += long(kRows) * kPk * kTn * outputs;
            const int first_read = kSparse ? group * kPk : 0;
          rows:
            for (int r = 0; r < kRows; r += Element::kWeights) {
#pragma HLS UNROLL
            features:
              for (int lane = 0; lane < kPf; lane += Element::kFeatures) {
#pragma HLS UNROLL
                Sum total[Element::kWeights][Element::kFeatures];
                for (int a = 0; a < Element::kWeights; ++a)
                  for (int b = 0; b < Element::kFeatures; ++b) total[a][b] = 0;
              taps:
                for (int k = 0; k < kPk; ++k) {
#pragma HLS UNROLL
                  typename Element::Out products[Element::kWeights][Element::kFeatures];
                  Code w[Element::kWeights][kTn], x[Element::kFeatures][kTn];
                  for (int i = 0; i < Element::kWeights; ++i)
                    for (int n = 0; n < kTn; ++n)
                      w[i][n] = r + i < kRows ? word.code[group][r + i][k][n] : Code(0);
                  for (int i = 0; i < Element::kFeatures; ++i)
                    for (int n = 0; n < kTn; ++n)
                      x[i][n] = lane + i < kPf ? seen[first_read + k][lane + i].code[n] : Code(0);
                  Element::run(w, x, products);
                  for (int a = 0; a < Element::kWeights; ++a)
                    for (int b = 0; b < Element::kFeatures; ++b) total[a][b] += products[a][b];
                }
                for (int a = 0; a < Element::kWeights; ++a)
                  for (int b = 0; b < Element::kFeatures; ++b) {
                    if (r + a >= kRows || lane + b >= kPf || !exists[lane + b]) continue;
                    SumBank& bank =
                        sum_ram[sums_in_use][group * kGm + word.row[group][r + a]][lane + b];
                    bank.write(row, Sum(bank.read(row) + total[a][b]));
                  }
              }
            }
          }
        } else {
          Vector seen[kPf];
          read_region(region_ram[in_use][0], rows, word.offset[0][0], seen);
        windows:
          for (int lane = 0; lane < kPf; ++lane)
            for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
              if (!exists[lane]) continue;
              const Sum value = seen[lane].code[n];
              const Sum old = sum_ram[sums_in_use][n][lane].read(row);
              const Sum kept = largest ? (old > value ? old : value) : Sum(old + value);
              sum_ram[sums_in_use][n][lane].write(row, word_number == 0 ? value : kept);
            }
        }
      }
    lanes_step:
      for (int lane = 0; lane < kPf; ++lane) {
#pragma HLS UNROLL
        int* at = lane_at[lane];
        lane_row[lane] += tile.row_step;
        at[2] += tile.step[2];
        if (at[2] >= tile.size[2]) {
          at[2] -= tile.size[2];
          at[1] += 1;
          lane_row[lane] += tile.row_wrap_w;
        }
        at[1] += tile.step[1];
        if (at[1] >= tile.size[1]) {
          at[1] -= tile.size[1];
          at[0] += 1;
          lane_row[lane] += tile.row_wrap_h;
        }
        at[0] += tile.step[0];
      }
      if (++feature_row == feature_rows) {
        feature_row = 0;
        ++word_number;
        if (--words_left == 0) {
          active = false;
          block_done = item.end_block;
        }
      }
    }

    if (draining && blocks_left == 0) {
      draining = --settling > 0;
    } else if (draining) {
      SumWord out;
      const int count = smaller(kPortPositions, drain_size[2] - j * kPortPositions);
      const int filter = block % kBlocks * kTn;
      const int row = block / kBlocks * kFeatureRows + sum_row;
    handed_on:
      for (int i = 0; i < kPortPositions; ++i) {
#pragma HLS UNROLL
        if (i >= count) {
          for (int n = 0; n < kTn; ++n) out.sum[i][n] = 0;
          continue;
        }
        // sums of B neighbours lie in B lanes; the lanes that come round belong to the next row
        const int turns = (sum_lane + i) / kPf, lane = (sum_lane + i) % kPf;
        for (int n = 0; n < kTn; ++n) {
          SumBank& bank = sum_ram[sums_in_use ^ 1][filter + n][lane];
          out.sum[i][n] = bank.read(row + turns);
          bank.write(row + turns, Sum(0));
        }
      }
      sums.write(out);
      sum_lane += count;
      sum_row += sum_lane / kPf;
      sum_lane %= kPf;
      if (++j == ceil_div(drain_size[2], kPortPositions)) {
        j = 0;
        if (++h == drain_size[1]) {
          h = 0;
          if (++d == drain_size[0]) {
            d = sum_row = sum_lane = 0;
            ++block;
            if (--blocks_left == 0) draining = settling > 0;
          }
        }
      }
    }

    if (regions_left > 0 && !full[load_into]) {
      const RegionWord in = region.read();
    loaded:
      for (int i = 0; i < kPortPositions; ++i) {
#pragma HLS UNROLL
        if (!in.valid[i]) continue;
        for (int copy = 0; copy < kCopies; ++copy)
          region_ram[load_into][copy][in.place[i].bank].write(in.place[i].row, in.vector[i]);
      }
      if (in.last) {
        full[load_into] = true;
        load_into ^= 1;
        --regions_left;
      }
    }
  }
}

}  // namespace kgrc
