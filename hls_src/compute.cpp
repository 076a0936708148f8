// The array: one pipelined loop over all the work of a task, so that it fills and drains once.
//
// Each trip of the loop does three things at once: it multiplies a weight word with the inputs of
// P_F outputs, it loads a word of the next region, and it hands on a word of finished sums. Regions
// and sums are double-buffered; the loop waits only where one of the three is late.
//
// Known faults, not yet mended; the C-simulation shows none of them:
// - The banks of sums and regions are selected by values (word.row, offset.bank, in_use...). Vitis
//   HLS assigns ports at compile time and has to assume that all accesses of a trip meet in one
//   bank: II = 1 is not to be had this way.
// - The decision what a trip does is a chain from stream to counter to decision, longer than a
//   clock of 150 MHz by an estimate from published delays.
// - AGGREGATE of region_ram packs a whole bank into one scalar, or is refused.
// - KGRC_PACKED is not defined for synthesis: it would take a multiplier for each product, more
//   than the chip has.
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

typedef Ram<Vector, kRegionRows> RegionBank;
typedef Ram<Sum, kSumRows, kMinFeatureRows> SumBank;
static RegionBank region_ram[2][kCopies][kPf];
static SumBank sum_ram[2][kTm][kPf];

// Sums are cleared as they are handed on. This clears them before the first task, also after a
// run that was broken off.
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

// What the loop keeps from one trip to the next.
struct State {
  // of the task
  bool convolves, largest;  // neither: the sum of a pool's window
  int words_of_item;
  int items_left, regions_left;

  // multiply
  Tile tile;
  Item item, next;
  bool have_next;     // `next` has been read, but waits for its region or for the sums
  bool active;        // `item` has weight words left
  bool block_done;    // the last item of a block is done; its sums wait to be handed on
  int in_use;         // the region buffer that is read
  bool holds_region;  // a region has been taken into use
  int sums_in_use;    // the sum buffer that is added to
  int words_left, words_done;
  int feature_row, feature_rows;  // trip within the weight word, and how many trips it takes
  WeightWord word;
  int lane_at[kPf][3], lane_row[kPf];  // as in Tile, of the current trip

  // load
  bool full[2];  // whether a region buffer holds a whole region
  int load_into;

  // drain
  bool draining;
  int vectors_left;
  int settling;  // trips still to wait after the last word
  int vector, depth, height, beat;
  int sum_row, sum_lane;  // of the next sum within its vector
  int drain_size[3];      // outputs of the tile along each axis
};

static inline bool has_work(const State& s) {
#pragma HLS INLINE
  return s.items_left > 0 || s.active || s.block_done || s.draining;
}

// Swaps the sum buffers when a block is done and the block before it is handed on.
static inline void begin_drain(State& s) {
#pragma HLS INLINE
  if (!s.block_done || s.draining) return;
  s.draining = true;
  s.block_done = false;
  s.sums_in_use ^= 1;
  s.vectors_left = s.item.vectors;
  // Handing on clears a row at least rows - 2 - r trips before its last trip, and the next block
  // reads row r at least r trips after it. Wait so that no row is read within kMinFeatureRows trips
  // of being cleared.
  s.settling = larger(0, kMinFeatureRows + 1 - s.tile.feature_rows);
  s.vector = s.depth = s.height = s.beat = s.sum_row = s.sum_lane = 0;
  for (int axis = 0; axis < 3; ++axis) s.drain_size[axis] = s.tile.size[axis];
}

// Reads the next item, and begins it once its region is loaded and a sum buffer is free.
static inline void begin_item(State& s, Stream<Tile>& tiles, Stream<Item>& items) {
#pragma HLS INLINE
  if (!s.have_next && s.items_left > 0 && !s.active) {
    s.next = items.read();
    s.have_next = true;
  }
  if (!s.have_next || s.active || s.block_done) return;
  if (s.next.new_region && !s.full[s.in_use ^ 1]) return;
  s.item = s.next;
  s.have_next = false;
  --s.items_left;
  if (s.item.first) {
    s.tile = tiles.read();
    s.feature_rows = larger(s.tile.feature_rows, kMinFeatureRows);
  }
  if (s.item.new_region) {
    // Before the first region is used, the other buffer may hold the second one already: the load
    // runs ahead where a task begins with blocks without enabled groups.
    if (s.holds_region) s.full[s.in_use] = false;
    s.holds_region = true;
    s.in_use ^= 1;
  }
  s.words_left = s.item.mask ? s.words_of_item : 0;
  s.feature_row = s.words_done = 0;
  s.active = s.words_left > 0;
  s.block_done = !s.active && s.item.end_block;
}

// The inputs of P_F outputs at one tap: bank b of the region has that of output b - offset.bank.
static inline void read_region(RegionBank (&banks)[kPf], const int (&rows)[kPf],
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

// One trip of a convolution: adds the dot products of a weight word to the sums of P_F outputs.
static inline void convolve(State& s, int row, const int (&rows)[kPf], const bool (&exists)[kPf],
                            long& macs) {
#pragma HLS INLINE
  const Tile& tile = s.tile;
  const int outputs = smaller(kPf,
                              tile.size[0] * tile.size[1] * tile.size[2] - s.feature_row * kPf);
  Vector inputs[kReads][kPf];
columns:
  for (int read = 0; read < kReads; ++read) {
#pragma HLS UNROLL
    read_region(region_ram[s.in_use][read / 2], rows, s.word.offset[read / kPk][read % kPk],
                inputs[read]);
  }
groups:
  for (int group = 0; group < kGroups; ++group) {
#pragma HLS UNROLL
    if (!(s.item.mask >> group & 1)) continue;
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
              w[i][n] = r + i < kRows ? s.word.code[group][r + i][k][n] : Code(0);
          for (int i = 0; i < Element::kFeatures; ++i)
            for (int n = 0; n < kTn; ++n)
              x[i][n] = lane + i < kPf ? inputs[first_read + k][lane + i].code[n] : Code(0);
          Element::run(w, x, products);
          for (int a = 0; a < Element::kWeights; ++a)
            for (int b = 0; b < Element::kFeatures; ++b) total[a][b] += products[a][b];
        }
        for (int a = 0; a < Element::kWeights; ++a)
          for (int b = 0; b < Element::kFeatures; ++b) {
            if (r + a >= kRows || lane + b >= kPf || !exists[lane + b]) continue;
            const int filter = group * kGm + s.word.row[group][r + a];
            SumBank& bank = sum_ram[s.sums_in_use][filter][lane + b];
            bank.write(row, Sum(bank.read(row) + total[a][b]));
          }
      }
    }
  }
}

// One trip of a pool: the largest or the sum of the codes at a tap and those before it.
static inline void pool(State& s, int row, const int (&rows)[kPf], const bool (&exists)[kPf]) {
#pragma HLS INLINE
  Vector inputs[kPf];
  read_region(region_ram[s.in_use][0], rows, s.word.offset[0][0], inputs);
windows:
  for (int lane = 0; lane < kPf; ++lane)
    for (int n = 0; n < kTn; ++n) {
#pragma HLS UNROLL
      if (!exists[lane]) continue;
      const Sum value = inputs[lane].code[n];
      const Sum old = sum_ram[s.sums_in_use][n][lane].read(row);
      const Sum both = s.largest ? (old > value ? old : value) : Sum(old + value);
      sum_ram[s.sums_in_use][n][lane].write(row, s.words_done == 0 ? value : both);
    }
}

// Moves each lane to the output that it has in the next trip.
static inline void step_lanes(State& s) {
#pragma HLS INLINE
  const Tile& tile = s.tile;
lanes_step:
  for (int lane = 0; lane < kPf; ++lane) {
#pragma HLS UNROLL
    int* at = s.lane_at[lane];
    s.lane_row[lane] += tile.row_step;
    at[2] += tile.step[2];
    if (at[2] >= tile.size[2]) {
      at[2] -= tile.size[2];
      at[1] += 1;
      s.lane_row[lane] += tile.row_wrap_w;
    }
    at[1] += tile.step[1];
    if (at[1] >= tile.size[1]) {
      at[1] -= tile.size[1];
      at[0] += 1;
      s.lane_row[lane] += tile.row_wrap_h;
    }
    at[0] += tile.step[0];
  }
}

// One trip with a weight word.
static inline void accumulate(State& s, Stream<WeightWord>& words, long& macs) {
#pragma HLS INLINE
  if (!s.active) return;
  if (s.feature_row == 0) {
    s.word = words.read();
    for (int lane = 0; lane < kPf; ++lane) {
      s.lane_row[lane] = s.tile.lane_row[lane];
      for (int axis = 0; axis < 3; ++axis) s.lane_at[lane][axis] = s.tile.lane_at[lane][axis];
    }
  }
  if (s.feature_row < s.tile.feature_rows) {
    int rows[kPf];
    bool exists[kPf];
    // lanes past the last output of the tile read row 0 and add to nothing
    for (int lane = 0; lane < kPf; ++lane) {
      exists[lane] = s.lane_at[lane][0] < s.tile.size[0];
      rows[lane] = exists[lane] ? s.lane_row[lane] : 0;
    }
    const int row = s.item.held_tile * kFeatureRows + s.feature_row;
    if (s.convolves) convolve(s, row, rows, exists, macs);
    else pool(s, row, rows, exists);
  }
  step_lanes(s);
  if (++s.feature_row == s.feature_rows) {
    s.feature_row = 0;
    ++s.words_done;
    if (--s.words_left == 0) {
      s.active = false;
      s.block_done = s.item.end_block;
    }
  }
}

// Hands on a word of finished sums and clears them, or waits for the last ones to settle.
static inline void drain(State& s, Stream<SumWord>& sums) {
#pragma HLS INLINE
  if (!s.draining) return;
  if (s.vectors_left == 0) {
    s.draining = --s.settling > 0;
    return;
  }
  SumWord out;
  const int count = smaller(kPortPositions, s.drain_size[2] - s.beat * kPortPositions);
  const int filter = s.vector % kTileVectors * kTn;
  const int row = s.vector / kTileVectors * kFeatureRows + s.sum_row;
handed_on:
  for (int i = 0; i < kPortPositions; ++i) {
#pragma HLS UNROLL
    if (i >= count) {
      for (int n = 0; n < kTn; ++n) out.sum[i][n] = 0;
      continue;
    }
    // neighbouring outputs lie in neighbouring lanes; past the last lane the next row begins
    const int wraps = (s.sum_lane + i) / kPf, lane = (s.sum_lane + i) % kPf;
    for (int n = 0; n < kTn; ++n) {
      SumBank& bank = sum_ram[s.sums_in_use ^ 1][filter + n][lane];
      out.sum[i][n] = bank.read(row + wraps);
      bank.write(row + wraps, Sum(0));
    }
  }
  sums.write(out);
  s.sum_lane += count;
  s.sum_row += s.sum_lane / kPf;
  s.sum_lane %= kPf;
  if (++s.beat == ceil_div(s.drain_size[2], kPortPositions)) {
    s.beat = 0;
    if (++s.height == s.drain_size[1]) {
      s.height = 0;
      if (++s.depth == s.drain_size[0]) {
        s.depth = s.sum_row = s.sum_lane = 0;
        ++s.vector;
        if (--s.vectors_left == 0) s.draining = s.settling > 0;
      }
    }
  }
}

// Loads a word of the next region, if a region buffer is free.
static inline void load(State& s, Stream<RegionWord>& region) {
#pragma HLS INLINE
  if (s.regions_left == 0 || s.full[s.load_into]) return;
  const RegionWord in = region.read();
loaded:
  for (int i = 0; i < kPortPositions; ++i) {
#pragma HLS UNROLL
    if (!in.valid[i]) continue;
    for (int copy = 0; copy < kCopies; ++copy)
      region_ram[s.load_into][copy][in.place[i].bank].write(in.place[i].row, in.vector[i]);
  }
  if (in.last) {
    s.full[s.load_into] = true;
    s.load_into ^= 1;
    --s.regions_left;
  }
}

void multiply(const Task& task, Stream<Tile>& tiles, Stream<Item>& items,
              Stream<RegionWord>& region, Stream<WeightWord>& words, Stream<SumWord>& sums,
              long& trips, long& macs) {
  // the arrays of banks, not the rows within a bank; meant: a vector is one wide word of it
#pragma HLS AGGREGATE variable = region_ram
#pragma HLS ARRAY_PARTITION variable = region_ram complete dim = 1
#pragma HLS ARRAY_PARTITION variable = region_ram complete dim = 2
#pragma HLS ARRAY_PARTITION variable = region_ram complete dim = 3
#pragma HLS ARRAY_PARTITION variable = sum_ram complete dim = 1
#pragma HLS ARRAY_PARTITION variable = sum_ram complete dim = 2
#pragma HLS ARRAY_PARTITION variable = sum_ram complete dim = 3
  State state = State();
#pragma HLS ARRAY_PARTITION variable = state.word.code complete dim = 0
#pragma HLS ARRAY_PARTITION variable = state.word.offset complete dim = 0
#pragma HLS ARRAY_PARTITION variable = state.word.row complete dim = 0
  state.convolves = is_convolution(task);
  state.largest = task[kKind] == kMaxPool;
  state.words_of_item = item_words(task);
  state.items_left = task[kItemCount] * tile_count(task);
  state.regions_left = task[kRegions] * tile_count(task);
  state.in_use = 1;  // the first region is loaded into buffer 0

flattened:
  while (has_work(state)) {
    // II = 1 is asked for; see the known faults above. A sum is read kMinFeatureRows trips after
    // it was written at the earliest: DEPENDENCE says so. A region may be read one trip after its
    // last write; there is no DEPENDENCE pragma for it, the tool has to find that hazard.
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = sum_ram inter RAW distance = kMinFeatureRows true
    KGRC_TRIP();
    ++trips;
    begin_drain(state);
    begin_item(state, tiles, items);
    accumulate(state, words, macs);
    drain(state, sums);
    load(state, region);
  }
}

}  // namespace kgrc
