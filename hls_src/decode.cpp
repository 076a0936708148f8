// From beats to the words of the array: where each input position lies in the region, and which
// weights, taps and rows make up a weight word.
#include "design.h"

namespace kgrc {

// Walks along an axis of a region or of a window: through the phases of an index, then to the next
// index.
struct Walk {
  Place at, first;  // of the present position, and of phase 0 of its index
  UInt<kStrideBits> phase;

  void begin(const Place& origin) {
#pragma HLS INLINE
    at = first = origin;
    phase = 0;
  }
  void advance(bool wraps, const Place& to_phase, const Place& to_index) {
#pragma HLS INLINE
    const Place index = moved(first, to_index), next = moved(at, to_phase);
    at = wraps ? index : next;
    if (wraps) first = index;
    phase = wraps ? 0 : int(phase) + 1;
  }
};

// The place of the position that is `of` addresses before the origin.
static inline Place before(const Place& of) {
#pragma HLS INLINE
  const bool whole = of.bank == 0;
  Place place;
  place.bank = whole ? 0 : kPf - int(of.bank);
  place.row = (-int(of.row) - (whole ? 0 : 1)) & ((1 << kRegionRowBits) - 1);
  return place;
}

// Gives each position of a region its bank and row. Positions outside the map get the fill value
// here, so that padding costs no memory access. Plane n of the task is taken from port n % 2.
void place_input(const Task& task, Stream<Layout>& tiles, Stream<Item>& items,
                 Stream<Beat>& beats_0, Stream<Beat>& beats_1, Stream<RegionWord>& region_words,
                 long& trips) {
  typedef Int<kLengthBits + 2> Position;
  typedef UInt<kStrideBits> Phase;
  const Position in_d = task[kInD], in_h = task[kInH], in_w = task[kInW];
  const int count = tile_count(task);
  const Phase last_phase_d = smaller(task[kKernelD], task[kStrideD]) - 1;
  const Phase last_phase_h = smaller(task[kKernelH], task[kStrideH]) - 1;
  const Phase phases_w = smaller(task[kKernelW], task[kStrideW]), stride_w = task[kStrideW];
  bool odd = false;  // of the present plane; its port
  Vector fill;
  for (int n = 0; n < kTn; ++n) fill.code[n] = Code(task[kFill]);
tiles:
  for (int number = 0; number < count; ++number) {
    const Layout layout = tiles.read();
    const Region region = make_region(task, layout.span);
    const UInt<kBeatShift + 1> parts = parts_of_beat(region);
    const UInt<kLengthBits> last_a = region.rows[0] - 1, last_b = region.rows[1] - 1;
    const UInt<kLengthBits> last_j = region.beats - 1;
    const Position begin_d = region.begin[0], begin_h = region.begin[1], width = region.width;
    const Position first_beat = region.first_beat, row_beats = region.row_beats;
    // positions between the windows of an axis are left out
    const Position gap_d = larger(region.stride[0] - region.kernel[0], 0) + 1;
    const Position gap_h = larger(region.stride[1] - region.kernel[1], 0) + 1;
    // the first beat begins `head` positions before the region
    const UInt<kBeatShift + 1> head = region.begin[2] & (kPortPositions - 1);
    // phase and place of the first P positions along the width, then from a beat to the next
    Phase phase_of[kPortPositions + 1];
    Place place_of[kPortPositions + 1];
    const Place round = before(layout.round);
    Phase phase = 0;
    Place place = {0, 0};
  width_positions:
    for (int i = 0; i <= kPortPositions; ++i) {
      phase_of[i] = phase;
      place_of[i] = place;
      const bool wraps = phase + 1 == stride_w;
      phase = wraps ? 0 : int(phase) + 1;
      place = moved(place, layout.phase[2]);
      if (wraps) place = moved(moved(place, round), layout.column);
    }
    const Place beat_step = place_of[kPortPositions];
    const Place beat_wrap = moved(moved(beat_step, round), layout.column);
    const Phase phase_step = phase_of[kPortPositions], phase_limit = stride_w - phase_step;
    // where each lane begins; the lanes before the region begin with the second beat
    Phase begin_phase[kPortPositions], lane_phase[kPortPositions];
    Place begin_place[kPortPositions], lane_place[kPortPositions];
#pragma HLS ARRAY_PARTITION variable = begin_phase complete
#pragma HLS ARRAY_PARTITION variable = lane_phase complete
#pragma HLS ARRAY_PARTITION variable = begin_place complete
#pragma HLS ARRAY_PARTITION variable = lane_place complete
  begin_lanes:
    for (int lane = 0; lane < kPortPositions; ++lane) {
      const int position = (lane - int(head)) & (kPortPositions - 1);
      begin_phase[lane] = lane_phase[lane] = phase_of[position];
      begin_place[lane] = lane_place[lane] = place_of[position];
    }
    const Place origin = {0, 0};
    Walk depth, height;
    depth.begin(origin);
    height.begin(origin);
    UInt<kLengthBits> a = 0, b = 0, j = 0;
    UInt<kBeatShift + 1> part = 0;
    Position d = begin_d, h = begin_h, beat_at = first_beat, along = -int(head);
    UInt<kItemCountBits> items_left = task[kItemCount];
    bool active = false;
    Beat beat = Beat();
  region_words:
    while (items_left > 0 || active) {
      // II = 1: counters, and places that step by constants of the tile
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      ++trips;
      if (!active) {
        const Item item = items.read();
        items_left -= 1;
        active = item.new_region;
      }
      if (active) {
        const bool inside_d = d >= 0 && d < in_d, inside_h = h >= 0 && h < in_h;
        const bool inside = inside_d && inside_h && beat_at >= 0 && beat_at < row_beats;
        if (inside && part == 0) beat = odd ? beats_1.read() : beats_0.read();
        const bool ends_beat = part == parts - 1, ends_row = ends_beat && j == last_j;
        const bool ends_plane = ends_row && b == last_b, ends_region = ends_plane && a == last_a;
        RegionWord out;
        out.last = ends_region;
      positions:
        for (int lane = 0; lane < kPortPositions; ++lane) {
#pragma HLS UNROLL
          const int position = int(along) + lane;
          const bool mine = parts == 1 || part == lane / 2;
          out.valid[lane] = mine && position >= 0 && position < int(width) &&
                            lane_phase[lane] < phases_w;
          out.place[lane] = moved(height.at, lane_place[lane]);
          const bool known = inside && int(beat_at) * kPortPositions + lane < int(in_w);
          for (int n = 0; n < kTn; ++n)
            out.vector[lane].code[n] = known ? code_of(beat.word64, lane * kTn + n) : fill.code[n];
          // a lane before the region waits for the second beat
          const bool steps = ends_beat && (j != 0 || lane >= int(head));
          const bool wraps = lane_phase[lane] >= phase_limit;
          const int next_phase = int(lane_phase[lane]) + int(phase_step) -
                                 (wraps ? int(stride_w) : 0);
          const Place next_place = moved(lane_place[lane], wraps ? beat_wrap : beat_step);
          lane_phase[lane] = ends_row ? begin_phase[lane]
                             : steps  ? Phase(next_phase)
                                      : lane_phase[lane];
          lane_place[lane] = ends_row ? begin_place[lane] : steps ? next_place : lane_place[lane];
        }
        region_words.write(out);
        part = ends_beat ? 0 : int(part) + 1;
        if (ends_beat) {
          j = ends_row ? 0 : int(j) + 1;
          beat_at = ends_row ? int(first_beat) : int(beat_at) + 1;
          along = ends_row ? -int(head) : int(along) + kPortPositions;
        }
        if (ends_plane) {
          const bool wraps = depth.phase == last_phase_d;
          if (inside_d) odd = !odd;
          a = ends_region ? 0 : int(a) + 1;
          d = ends_region ? int(begin_d) : int(d) + (wraps ? int(gap_d) : 1);
          depth.advance(wraps, layout.phase[0], layout.plane);
          if (ends_region) depth.begin(origin);
          b = 0;
          h = begin_h;
          height.begin(depth.at);
        } else if (ends_row) {
          const bool wraps = height.phase == last_phase_h;
          b += 1;
          h += wraps ? int(gap_h) : 1;
          height.advance(wraps, layout.phase[1], layout.pitch);
        }
        active = !ends_region;
      }
    }
  }
}

// The groups of a weight word that pass one of the two streams.
static inline WeightHalf half_of(const WeightWord& word, int number) {
#pragma HLS INLINE
  WeightHalf half;
groups:
  for (int i = 0; i < kHalfGroups; ++i) {
#pragma HLS UNROLL
    const int group = number * kHalfGroups + i;
    const bool exists = group < kGroups;
    const int from = exists ? group : 0;
    if (i < kHalfPlaces)
      for (int k = 0; k < kPk; ++k) half.offset[i][k] = word.offset[kSparse ? from : 0][k];
    for (int r = 0; r < kRows; ++r) {
      half.row[i][r] = word.row[from][r];
      for (int k = 0; k < kPk; ++k)
        for (int n = 0; n < kTn; ++n)
          half.code[i][r][k][n] = exists ? word.code[from][r][k][n] : Code(0);
    }
  }
  return half;
}

// The beats of each chunk of a weight port side by side. The chunks of a tile are shared out to the
// two ports: the even ones to the first.
void gather_chunks(const Task& task, bool odd, Stream<WeightBeat>& beats, Stream<Chunk>& chunks) {
  const UInt<8> last_beat = task[kChunkBeats] - 1;
  const int of_tile = (task[kChunks] + (odd ? 0 : 1)) / 2;
  UInt<8> beat = 0;
  Chunk chunk = Chunk();
#pragma HLS ARRAY_PARTITION variable = chunk.word64 complete
weight_beats:
  for (int left = tile_count(task) * of_tile * task[kChunkBeats]; left > 0; --left) {
    // II = 1: a beat a trip, into registers
#pragma HLS PIPELINE II = 1
    KGRC_TRIP();
    const WeightBeat read = beats.read();
  words:
    for (int i = 0; i < kChunkWords; ++i) {
#pragma HLS UNROLL
      if (i / kWeightPortWords == beat) chunk.word64[i] = read.word64[i % kWeightPortWords];
      else if (beat == 0) chunk.word64[i] = 0;
    }
    if (beat == last_beat) chunks.write(chunk);
    beat = beat == last_beat ? 0 : int(beat) + 1;
  }
}

// Makes the weight words of each item, for every tap tile, column step and row step: the weights
// of the enabled groups, the places of their taps, and their rows. A chunk takes a trip. A pool has
// words without weights, one for each tap. Chunk c of a tile is taken from port c % 2.
void make_words(const Task& task, Stream<Layout>& tiles, Stream<Item>& items,
                Stream<Chunk>& chunks_0, Stream<Chunk>& chunks_1, Stream<Index>& indices,
                Stream<WeightHalf>& words_0, Stream<WeightHalf>& words_1, long& trips) {
  typedef UInt<kKernelBits> Tap;
  typedef UInt<kWordCountBits> Count;
  // where the input of a tap lies, from the place of an output; a copy for each column
  static Ram<Place, kMaxTaps> offset[kPk];
#pragma HLS ARRAY_PARTITION variable = offset complete dim = 1
  const bool convolves = is_convolution(task);
  const Tap taps = taps_of(task);
  const Tap columns = smaller(taps, kTk);  // taps of a tap tile
  const Tap last_h = task[kKernelH] - 1, last_w = task[kKernelW] - 1;
  const Tap last_phase_d = smaller(task[kKernelD], task[kStrideD]) - 1;
  const Tap last_phase_h = smaller(task[kKernelH], task[kStrideH]) - 1;
  const Tap last_phase_w = smaller(task[kKernelW], task[kStrideW]) - 1;
  const Count last_word = item_words(task) - 1;
  const Tap last_row_step = task[kRowSteps] - 1, last_col_step = task[kColSteps] - 1;
  const int count = tile_count(task);
tiles:
  for (int number = 0; number < count; ++number) {
    const Layout layout = tiles.read();
    const Place origin = {0, 0};
    Walk depth, height, width;
    depth.begin(origin);
    height.begin(origin);
    width.begin(origin);
    Tap at_h = 0, at_w = 0;
  tap_places:
    for (int tap = 0; tap < int(taps); ++tap) {
      // II = 1: counters, and places that step by constants of the tile
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      for (int k = 0; k < kPk; ++k) offset[k].write(tap, width.at);
      const bool ends_row = at_w == last_w, ends_plane = ends_row && at_h == last_h;
      if (ends_plane) {
        depth.advance(depth.phase == last_phase_d, layout.phase[0], layout.plane);
        height.begin(depth.at);
      } else if (ends_row) {
        height.advance(height.phase == last_phase_h, layout.phase[1], layout.pitch);
      }
      if (ends_row) width.begin(height.at);
      else width.advance(width.phase == last_phase_w, layout.phase[2], layout.column);
      at_w = ends_row ? 0 : int(at_w) + 1;
      if (ends_row) at_h = ends_plane ? 0 : int(at_h) + 1;
      ++trips;
    }
    UInt<kItemCountBits> items_left = task[kItemCount];
    UInt<kGroups> mask = 0;  // enabled groups of the item
    UInt<kGroups> left = 0;  // those whose chunks of the weight word are still to come
    Count word = 0;
    Tap row_step = 0, col_step = 0;
    // the first row of the step, the first tap of the tap tile, and of the step in it
    UInt<kGroupRowBits> first_row = 0;
    Tap tile_tap = 0, step_tap = 0;
    // odd: the number of the chunk in the tile; its port
    bool active = false, odd = false, more = items_left > 0;
    WeightWord out = WeightWord();
#pragma HLS ARRAY_PARTITION variable = out.code complete dim = 0
#pragma HLS ARRAY_PARTITION variable = out.offset complete dim = 0
#pragma HLS ARRAY_PARTITION variable = out.row complete dim = 0
  chunks:
    while (more) {
      // II = 1: a chunk a trip; what is carried is which groups are left, and counters
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      ++trips;
      if (!active) {
        const Item item = items.read();
        items_left -= 1;
        // of a pool: that of the first group, so that a trip makes a word
        mask = item.mask;
        left = mask;
        active = mask != 0;
      }
      const UInt<kGroups> rest = left & (left - 1);
      const bool ends_word = rest == 0;
      const bool ends_item = ends_word & (word == last_word);
      if (active) {
        Chunk chunk = Chunk();
        if (convolves) chunk = odd ? chunks_1.read() : chunks_0.read();
        odd = !odd;
        Index index = Index();
        if (kSparse && convolves) index = indices.read();
        Place places[kPk];
      columns:
        for (int k = 0; k < kPk; ++k) {
#pragma HLS UNROLL
          const int kept = index_byte(index, k), dense = int(step_tap) + k;
          const int tap = !convolves ? int(word) : int(tile_tap) + (kSparse ? kept : dense);
          // A column that pads P_K or the last tap tile has zero weights: any tap will do.
          places[k] = offset[k].read(tap < int(taps) ? tap : 0);
        }
      groups:
        for (int group = 0; group < kGroups; ++group) {
#pragma HLS UNROLL
          // the first of those that are left
          const bool mine = (left >> group & 1) && (left & ((1 << group) - 1)) == 0;
          // a dense design reads the same taps for all groups, whichever are enabled
          if (kSparse ? mine : group == 0)
            for (int k = 0; k < kPk; ++k) out.offset[group][k] = places[k];
          if (!mine) continue;
        rows:
          for (int r = 0; r < kRows; ++r) {
#pragma HLS UNROLL
            out.row[group][r] = kSparse && convolves ? index_byte(index, kPk + r)
                                                     : int(first_row) + r;
            for (int k = 0; k < kPk; ++k)
              for (int n = 0; n < kTn; ++n)
                out.code[group][r][k][n] = code_of(chunk.word64, (k * kRows + r) * kTn + n);
          }
        }
        left = ends_word ? mask : rest;
        if (ends_word) {
          words_0.write(half_of(out, 0));
          words_1.write(half_of(out, 1));
          const bool ends_rows = row_step == last_row_step;
          const bool ends_columns = ends_rows && col_step == last_col_step;
          row_step = ends_rows ? 0 : int(row_step) + 1;
          first_row = ends_rows ? 0 : int(first_row) + kRows;
          if (ends_rows) {
            col_step = ends_columns ? 0 : int(col_step) + 1;
            step_tap = ends_columns ? 0 : int(step_tap) + kPk;
          }
          if (ends_columns) tile_tap += columns;
          word += 1;
        }
        if (ends_item) {
          word = 0;
          tile_tap = 0;
        }
      }
      active = ends_item ? false : active;
      more = items_left > 0 ? true : active;
    }
  }
}

}  // namespace kgrc
