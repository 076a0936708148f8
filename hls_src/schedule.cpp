// What the array does in each trip, and where in its memories.
//
// Three engines share the array's trips: one loads words of regions, one adds products to sums, one
// hands on the sums of the block before. There are two halves of the region memory and two of the
// sum memory. `_array_trips` in pynq_kgrc/accelerator/cost.py walks the same schedule.
#include "array.h"

namespace kgrc {

// What the schedule has to know of a tile.
struct Extent {
  int region_words;  // of one region
  int item_trips;    // of an item with enabled groups
  int rows, width;   // of the outputs: rows of depth and height, outputs in each
  int drain_words;   // of one vector
  int settling;      // trips to wait after the last word that is handed on
};

// A product of two numbers below 2^16.
static inline int product(int a, int b) { return int(UInt<16>(a)) * int(UInt<16>(b)); }

static Extent measure(const Task& task, const int (&number)[3]) {
  TileSpan tile;
  for (int axis = 0; axis < 3; ++axis) {
    const int size = task[Field(kTileD + axis)], out = task[Field(kOutD + axis)];
    tile.first[axis] = product(number[axis], size);
    tile.size[axis] = smaller(size, out - tile.first[axis]);
  }
  const Region region = make_region(task, tile);
  Extent extent;
  extent.region_words = product(product(region.rows[0], region.rows[1]),
                                product(region.beats, parts_of_beat(region)));
  extent.rows = product(tile.size[0], tile.size[1]);
  extent.width = tile.size[2];
  const int feature_rows = ceil_div(product(extent.rows, extent.width), kPf);
  extent.item_trips = product(item_words(task), larger(feature_rows, kMinFeatureRows));
  extent.drain_words = product(extent.rows, beats_of_row(extent.width));
  // Handing on clears a row at least rows - 2 - r trips before its last trip, and the next block
  // reads row r at least r trips after it. Wait so that no row is read within kMinFeatureRows trips
  // of being cleared.
  extent.settling = larger(0, kMinFeatureRows + 1 - feature_rows);
  return extent;
}

// Cuts the trips of a task into runs: each ends where an engine begins or ends something.
void schedule(const Task& task, Stream<Item>& items, Stream<ArrayRun>& runs,
              Stream<DrainOrder>& orders) {
  const int count = tile_count(task);
  int at[3] = {0, 0, 0};
  Extent now, next = measure(task, at);
  // Loading runs ahead of use by one region, so by one tile at most.
  int loads_left = 0, loads_left_next = task[kRegions];
  int load_left = 0;          // words of the region that is being loaded
  int ahead = 0;              // regions that are loaded or being loaded, and not used yet
  int ready = 0, ready2 = 0;  // trips until the first of them may be read, and the second
  bool uses_region = false;
  bool load_half = false, region_half = true, sums_half = true;
  Item item = Item();
  bool have_item = false;   // `item` has been read, but waits for its region or for the sums
  bool active = false;      // `item` has trips left
  bool block_done = false;  // `block` is complete, and waits to be handed on
  DrainOrder block = DrainOrder();
  int block_settling = 0;
  int item_left = 0, drain_left = 0, settle_left = 0;
  bool ended = false;
tiles:
  for (int number = 0; number < count && !ended; ++number) {
    now = next;
    const bool last_tile = number == count - 1;
    loads_left = loads_left_next;
    loads_left_next = last_tile ? 0 : task[kRegions];
    for (int axis = 2, carry = 1; axis >= 0; --axis) {
      at[axis] += carry;
      carry = at[axis] == tiles_along(task, axis);
      if (carry) at[axis] = 0;
    }
    if (!last_tile) next = measure(task, at);
    int items_left = task[kItemCount];
    bool tile_done = false;
  runs:
    while (!tile_done) {
      // II = 4: a pass depends on the one before. An item takes 4 trips or more (kMinFeatureRows),
      // so that the array waits only where other engines cut its run short.
#pragma HLS PIPELINE II = 4
      KGRC_TRIP();
      if (block_done && drain_left == 0 && settle_left == 0) {
        block_done = false;
        sums_half = !sums_half;
        drain_left = int(block.words);
        settle_left = block_settling;
        orders.write(block);
      }
      if (!have_item && !active && !block_done && items_left > 0) {
        item = items.read();
        have_item = true;
        --items_left;
      }
      const bool late = have_item && item.new_region && (ahead == 0 || ready > 0);
      if (have_item && !late) {
        have_item = false;
        active = true;
        // an item without enabled groups takes one trip
        item_left = item.mask ? now.item_trips : 1;
        if (item.new_region) {
          region_half = !region_half;
          uses_region = true;
          --ahead;
          ready = ready2;
        }
      }
      // Two halves hold two regions: one in use and one ahead, or before the first use two ahead.
      if (load_left == 0 && ahead + uses_region < 2 && (loads_left > 0 || loads_left_next > 0)) {
        load_left = loads_left > 0 ? now.region_words : next.region_words;
        if (loads_left > 0) --loads_left;
        else --loads_left_next;
        ready2 = load_left + kRegionDistance - 1;
        if (ahead == 0) ready = ready2;
        ++ahead;
      }
      ArrayRun run;
      run.load = load_left > 0;
      run.accumulate = active && item.mask;
      run.drain = drain_left > 0;
      run.load_half = load_half;
      run.region_half = region_half;
      run.sums_half = sums_half;
      const int drains = drain_left > 0 ? drain_left : settle_left;
      const bool waits = late && ready > 0;
      const int most = 1 << kRunBits;
      int trips = smaller(smaller(load_left > 0 ? load_left : most, drains > 0 ? drains : most),
                          smaller(active ? item_left : most, waits ? ready : most));
      // a plan that uses a region that it does not load ends here, and not never
      const bool stuck = load_left == 0 && !active && drains == 0 && !waits;
      if (stuck) trips = 1;
      ready = larger(0, ready - trips);
      ready2 = larger(0, ready2 - trips);
      if (load_left > 0) {
        load_left -= trips;
        if (load_left == 0) load_half = !load_half;
      }
      if (drain_left > 0) drain_left -= trips;
      else if (settle_left > 0) settle_left -= trips;
      if (active) {
        item_left -= trips;
        active = item_left > 0;
        block_done = !active && item.end_block;
        block.words = product(int(item.vectors), now.drain_words);
        block.rows = now.rows;
        block.width = now.width;
        block.last = last_tile && items_left == 0;
        block_settling = now.settling;
      }
      const bool idle = items_left == 0 && !have_item && !active;
      const bool drained = !block_done && drain_left == 0 && settle_left == 0;
      tile_done = stuck || (idle && (!last_tile || drained));
      ended = stuck || (tile_done && last_tile);
      run.more = trips - 1;
      run.last = ended;
      runs.write(run);
    }
  }
}

// The rows of the sums and of the region's banks for each trip of the accumulating engine.
void address_inputs(const Task& task, Stream<Tile>& tiles, Stream<Item>& items,
                    Stream<InputStep>& steps, long& macs) {
  typedef UInt<kTileBits> Coordinate;
  const int count = tile_count(task);
  const UInt<16> words_of_item = item_words(task);
  const bool convolves = is_convolution(task);
tiles:
  for (int number = 0; number < count; ++number) {
    const Tile tile = tiles.read();
    // From one trip to the next a lane steps by a constant of the tile. A coordinate at or past
    // its limit wraps around.
    const Coordinate size_d = tile.size[0], size_w = tile.size[2], size_h = tile.size[1];
    const Coordinate step_d = tile.step[0], step_h = tile.step[1], step_w = tile.step[2];
    const Coordinate limit_h = tile.size[1] - tile.step[1], carried_h = limit_h - 1;
    const Coordinate limit_w = tile.size[2] - tile.step[2];
    const UInt<kFeatureRowBits> feature_rows = tile.feature_rows;
    const UInt<kFeatureRowBits> last_row = larger(tile.feature_rows, kMinFeatureRows) - 1;
    Coordinate at_d[kPf], at_h[kPf], at_w[kPf];
    RegionRow rows[kPf];
#pragma HLS ARRAY_PARTITION variable = at_d complete
#pragma HLS ARRAY_PARTITION variable = at_h complete
#pragma HLS ARRAY_PARTITION variable = at_w complete
#pragma HLS ARRAY_PARTITION variable = rows complete
    for (int lane = 0; lane < kPf; ++lane) {
#pragma HLS UNROLL
      at_d[lane] = tile.lane_at[lane][0];
      at_h[lane] = tile.lane_at[lane][1];
      at_w[lane] = tile.lane_at[lane][2];
      rows[lane] = tile.lane_row[lane];
    }
    Item item = Item();
    SumRow first_row = 0;
    int items_left = task[kItemCount];
    bool takes_item = true, first = true;
    UInt<16> words_left = words_of_item;
    UInt<kFeatureRowBits> row = 0;
  steps:
    while (!(takes_item && items_left == 0)) {
      // II = 1: counters that step by one, and coordinates that wrap at a limit
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      if (takes_item) {
        item = items.read();
        --items_left;
        first_row = 0;
      held_tiles:
        for (int i = 0; i < kFilterTiles; ++i) {
#pragma HLS UNROLL
          if (item.held_tile == i) first_row = i * kFeatureRows;
        }
      }
      takes_item = true;
      if (item.mask) {
        const bool ends_word = row == last_row, ends_item = ends_word && words_left == 1;
        InputStep step;
        step.begins = row == 0;
        step.works = row < feature_rows;
        step.first = first;
        step.mask = item.mask;
        step.row = first_row + row;
        int outputs = 0;
      lanes:
        for (int lane = 0; lane < kPf; ++lane) {
#pragma HLS UNROLL
          const bool exists = at_d[lane] < size_d;
          step.exists[lane] = exists;
          // a lane without an output reads row 0
          step.rows[lane] = exists ? rows[lane] : RegionRow(0);
          outputs += exists;
          const bool wraps_w = at_w[lane] >= limit_w;
          const bool wraps_h = at_h[lane] >= (wraps_w ? carried_h : limit_h);
          const int moved = int(rows[lane]) + int(tile.row_step) +
                            (wraps_w ? int(tile.row_wrap_w) : 0) +
                            (wraps_h ? int(tile.row_wrap_h) : 0);
          const int w = int(at_w[lane]) + int(step_w) - (wraps_w ? int(size_w) : 0);
          const int h = int(at_h[lane]) + int(step_h) + wraps_w - (wraps_h ? int(size_h) : 0);
          const int d = int(at_d[lane]) + int(step_d) + wraps_h;
          at_w[lane] = ends_word ? Coordinate(tile.lane_at[lane][2]) : Coordinate(w);
          at_h[lane] = ends_word ? Coordinate(tile.lane_at[lane][1]) : Coordinate(h);
          at_d[lane] = ends_word ? Coordinate(tile.lane_at[lane][0]) : Coordinate(d);
          rows[lane] = ends_word ? RegionRow(tile.lane_row[lane]) : RegionRow(moved);
        }
        steps.write(step);
        if (convolves && step.works) {
          int groups = 0;
        enabled:
          for (int i = 0; i < kGroups; ++i) {
#pragma HLS UNROLL
            groups += item.mask >> i & 1;
          }
          macs += groups * outputs * (kRows * kPk * kTn);
        }
        if (ends_item) {
          first = true;
          words_left = words_of_item;
        } else if (ends_word) {
          first = false;
          words_left -= 1;
        }
        row = ends_word ? 0 : int(row) + 1;
        takes_item = ends_item;
      }
    }
  }
}

// Lane and row of the sums that each trip hands on.
void address_sums(Stream<DrainOrder>& orders, Stream<SumStep>& steps) {
  bool last = false;
blocks:
  while (!last) {
    const DrainOrder order = orders.read();
    last = order.last;
    UInt<kVectorBits> vector = 0;
    SumRow first_row = 0, row = 0;
    UInt<kLaneBits> lane = 0;
    UInt<kTileBits> rows_left = order.rows, left = order.width;
  words:
    for (int word = 0; word < int(order.words); ++word) {
      // II = 1: counters, and a lane that wraps at P_F
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      const bool ends_row = left <= kPortPositions;
      const bool ends_vector = ends_row && rows_left == 1;
      const int begin = lane, end = begin + (ends_row ? int(left) : int(kPortPositions));
      SumStep step;
      step.vector = vector;
      step.lane = lane;
      step.row = first_row + row;
    lanes:
      for (int i = 0; i < kPf; ++i) {
#pragma HLS UNROLL
        step.handed[i] = (i >= begin && i < end) || i + kPf < end;
      }
      steps.write(step);
      left = ends_row ? int(order.width) : int(left) - kPortPositions;
      rows_left = ends_vector ? int(order.rows) : int(rows_left) - ends_row;
      const bool wraps = end >= kPf;
      lane = ends_vector ? 0 : wraps ? end - kPf : end;
      row = ends_vector ? 0 : int(row) + wraps;
      if (ends_vector) {
        const bool ends_tile = vector == kTileVectors - 1;
        vector = ends_tile ? 0 : int(vector) + 1;
        if (ends_tile) first_row += kFeatureRows;
      }
    }
  }
}

}  // namespace kgrc
