// Loads and stores: beats and 64-bit words between memory and streams, without arithmetic on codes.
//
// Each memory port has one process. Its loop requests runs of neighbouring beats up to
// kRequestsAhead requests before it takes their beats, so that the latency of memory is hidden; the
// port cuts a long run into bursts. Where the runs lie is listed by processes of their own, so that
// these loops only count. They are flushable (flp): beats that have come move on while a request
// waits for its place in the port's queue.
#include "design.h"

namespace kgrc {

// ---- lists of runs ---------------------------------------------------------------------------

// An input port gets a run, the other one an empty run in its place.
static void give_input(const Run& run, bool odd, Stream<Run>& runs_0, Stream<Beats>& lengths_0,
                       Stream<Run>& runs_1, Stream<Beats>& lengths_1) {
#pragma HLS INLINE
  const Run none = {0, 0, run.last};
  const Run even_run = odd ? none : run, odd_run = odd ? run : none;
  runs_0.write(even_run);
  runs_1.write(odd_run);
  if (!run.last) {
    lengths_0.write(even_run.beats);
    lengths_1.write(odd_run.beats);
  }
}

// The runs of the map that lie in the regions of the plan, in the order in which the array takes
// the regions. Padding is not read.
//
// A map lies in memory as [channels / T_N][D][H][W / B][B][T_N], its rows padded to whole beats of
// B positions. Where a region has whole rows of the map, those of a plane are one run. Plane n of
// the task, counted over all regions, is read by port n % 2.
//
// A port takes up to kRunsAhead runs before their beats are taken; it would wait for ever if these
// runs needed a part of the plan that waits for the beats. So each trip gives a run to both ports,
// each item has a run, though it be empty, and each tile has at least kRunsAhead / 2: a port is
// never ahead by more than kRunsAhead items and two tiles, for which the streams of the plan have
// room.
void list_input(const Task& task, Stream<TileSpan>& tiles, Stream<Item>& items, Stream<Run>& runs_0,
                Stream<Beats>& lengths_0, Stream<Run>& runs_1, Stream<Beats>& lengths_1) {
  const int in_d = task[kInD], in_h = task[kInH];
  const int count = tile_count(task);
  bool odd = false;  // of the present plane
tiles:
  for (int number = 0; number < count; ++number) {
    const Region region = make_region(task, tiles.read());
    const int first = larger(region.first_beat, 0);
    const int length = smaller(region.first_beat + region.beats, region.row_beats) - first;
    // rows between the windows of an axis are left out: `gap` of them after `window` rows
    int window[2], gap[2];
    for (int axis = 0; axis < 2; ++axis) {
      const bool apart = region.kernel[axis] < region.stride[axis];
      window[axis] = apart ? region.kernel[axis] : region.rows[axis];
      gap[axis] = apart ? region.stride[axis] - region.kernel[axis] : 0;
    }
    const bool whole = length == region.row_beats && region.kernel[1] >= region.stride[1];
    const int top = larger(region.begin[1], 0);
    const int joined = smaller(region.begin[1] + region.rows[1], in_h) - top;
    const int beats = larger(whole ? joined * length : length, 0);
    const int rows = whole ? 1 : region.rows[1];
    const int begin_d = region.begin[0], begin_h = whole ? top : region.begin[1];
    const int row_step = region.row_beats, plane_step = in_h * row_step;
    const int row_gap = gap[1] * row_step, plane_gap = gap[0] * plane_step;
    const int channel_step = in_d * plane_step;
    const int plane_begin = begin_d * plane_step + begin_h * row_step + first;
    int items_left = task[kItemCount], given = 0;
    bool active = false;
    int channel = 0;  // address of the first plane of the region's channels
    // the present row: number of its plane and its own, place in the window, position, address
    int a = 0, b = 0, in_window[2] = {0, 0}, d = begin_d, h = begin_h;
    int plane_at = plane_begin, row_at = plane_begin;
#pragma HLS ARRAY_PARTITION variable = in_window complete dim = 0
  runs:
    while (items_left > 0 || active || given < kRunsAhead / 2) {
      // II = 1: counters and sums, which an item does not change. Flushing: runs that stay inside
      // while this waits for an item would starve the array, whose items are then not taken either.
#pragma HLS PIPELINE II = 1 style = flp
      KGRC_TRIP();
      if (given < kRunsAhead / 2) ++given;
      if (!active && items_left > 0) {
        const Item item = items.read();
        --items_left;
        active = item.new_region;
        channel = task[kSource] + int(item.channel_tile) * channel_step;
      }
      const bool d_inside = d >= 0 && d < in_d, h_inside = h >= 0 && h < in_h;
      const bool inside = active && d_inside && h_inside && beats > 0;
      const Run run = {Beats(inside ? channel + row_at : 0), Beats(inside ? beats : 0), false};
      give_input(run, odd, runs_0, lengths_0, runs_1, lengths_1);
      if (active) {
        const bool last_row = b == rows - 1, last_plane = a == region.rows[0] - 1;
        const bool gap_h = in_window[1] == window[1] - 1, gap_d = in_window[0] == window[0] - 1;
        if (!last_row) {
          ++b;
          in_window[1] = gap_h ? 0 : in_window[1] + 1;
          h += gap_h ? 1 + gap[1] : 1;
          row_at += gap_h ? row_step + row_gap : row_step;
        } else {
          b = in_window[1] = 0;
          h = begin_h;
          if (d_inside) odd = !odd;
          a = last_plane ? 0 : a + 1;
          in_window[0] = last_plane || gap_d ? 0 : in_window[0] + 1;
          const int d_next = d + (gap_d ? 1 + gap[0] : 1);
          const int plane_next = plane_at + (gap_d ? plane_step + plane_gap : plane_step);
          d = last_plane ? begin_d : d_next;
          plane_at = last_plane ? plane_begin : plane_next;
          row_at = plane_at;
          active = !last_plane;
        }
      }
    }
  }
  const Run end = {0, 0, true};
  give_input(end, false, runs_0, lengths_0, runs_1, lengths_1);
}

// The runs of an output tile in a map: a row each, or all rows of a plane, or all planes of a
// vector, or all vectors, where the tile covers the map's whole rows, planes, depth.
struct MapRuns {
  int beats;                              // of each run
  int rows, planes, vectors;              // how many runs
  int row_step, plane_step, vector_step;  // beats from a run to the next
  int row, plane, vector;                 // the present run, and the first beat
  int at, plane_at, vector_at;            // of it, of its plane, of its vector
  bool done;

  Run run() const {
#pragma HLS INLINE
    const Run present = {Beats(at), Beats(beats), false};
    return present;
  }
  void advance() {
#pragma HLS INLINE
    const bool last_row = row == rows - 1, last_plane = plane == planes - 1;
    const bool next_vector = last_row && last_plane;
    done = next_vector && vector == vectors - 1;
    vector += next_vector;
    plane = last_row ? (last_plane ? 0 : plane + 1) : plane;
    row = last_row ? 0 : row + 1;
    const int vector_next = vector_at + vector_step, plane_next = plane_at + plane_step;
    at = next_vector ? vector_next : last_row ? plane_next : at + row_step;
    if (last_row) plane_at = at;
    if (next_vector) vector_at = at;
  }
};

// Those of tile (d, h, w) in a map of `map` positions that begins at beat `begin` and has `parts`
// beats for B positions. The tiles have `step` outputs of `out`, along depth, height and width.
static MapRuns map_runs(const Task& task, int begin, const int map[3], const int out[3],
                        const int step[3], int d, int h, int w, int parts) {
  const int number[3] = {d, h, w};
  int first[3], size[3];
axes:
  for (int axis = 0; axis < 3; ++axis) {
    first[axis] = number[axis] * step[axis];
    size[axis] = smaller(step[axis], out[axis] - first[axis]);
  }
  MapRuns runs;
  runs.row_step = beats_of_row(map[2]) * parts;
  runs.plane_step = map[1] * runs.row_step;
  runs.vector_step = map[0] * runs.plane_step;
  runs.rows = size[1];
  runs.planes = size[0];
  runs.vectors = task[kVectors];
  runs.beats = beats_of_row(size[2]) * parts;
  if (runs.beats == runs.row_step) {
    runs.rows = 1;
    runs.beats *= size[1];
    if (size[1] == map[1]) {
      runs.planes = 1;
      runs.beats *= size[0];
      if (size[0] == map[0]) {
        runs.vectors = 1;
        runs.beats *= task[kVectors];
      }
    }
  }
  runs.row = runs.plane = runs.vector = 0;
  runs.at = begin + first[0] * runs.plane_step + first[1] * runs.row_step +
            first[2] / kPortPositions * parts;
  runs.plane_at = runs.vector_at = runs.at;
  runs.done = task[kVectors] == 0 || runs.beats == 0;
  return runs;
}

// The runs of the shortcut's map at the outputs of each tile.
void list_shortcut(const Task& task, Stream<Run>& runs, Stream<Beats>& lengths) {
  const int count = task[kHasShortcut] ? tiles_along(task, 0) : 0;
  const int map[3] = {task[kShortcutD], task[kShortcutH], task[kShortcutW]};
  const int out[3] = {task[kOutD], task[kOutH], task[kOutW]};
  const int step[3] = {task[kTileD], task[kTileH], task[kTileW]};
tiles_d:
  for (int d = 0; d < count; ++d)
  tiles_h:
    for (int h = 0; h < tiles_along(task, 1); ++h)
    tiles_w:
      for (int w = 0; w < tiles_along(task, 2); ++w) {
        MapRuns tile = map_runs(task, task[kShortcut], map, out, step, d, h, w, 1);
      runs:
        while (!tile.done) {
      // II = 1: counters and sums
#pragma HLS PIPELINE II = 1
          KGRC_TRIP();
          runs.write(tile.run());
          lengths.write(tile.run().beats);
          tile.advance();
        }
      }
  const Run end = {0, 0, true};
  runs.write(end);
}

// The runs of the output map that each tile has, after the fused max pool.
void list_output(const Task& task, Stream<Run>& runs) {
  int map[3], step[3];
axes:
  for (int axis = 0; axis < 3; ++axis) {
    map[axis] = quotient(task[Field(kOutD + axis)], task[Field(kPoolD + axis)]);
    step[axis] = quotient(task[Field(kTileD + axis)], task[Field(kPoolD + axis)]);
  }
  // codes of 16 bits in a design with fewer take more than one beat
  const int parts = task[kWide] ? kWidePerBeat : 1;
tiles_d:
  for (int d = 0; d < tiles_along(task, 0); ++d)
  tiles_h:
    for (int h = 0; h < tiles_along(task, 1); ++h)
    tiles_w:
      for (int w = 0; w < tiles_along(task, 2); ++w) {
        MapRuns tile = map_runs(task, task[kTarget], map, map, step, d, h, w, parts);
      runs:
        while (!tile.done) {
      // II = 1: counters and sums
#pragma HLS PIPELINE II = 1
          KGRC_TRIP();
          runs.write(tile.run());
          tile.advance();
        }
      }
  const Run end = {0, 0, true};
  runs.write(end);
}

// ---- ports of maps ---------------------------------------------------------------------------

// Requests the runs of a list, and passes on their beats. Beats are taken when no further request
// may be made, so that no request waits for beats.
static void read_runs(MemoryPort<Beat> maps, Stream<Run>& runs, Stream<Beats>& lengths,
                      Stream<Beat>& beats, long& trips, long& requests) {
#pragma HLS INLINE
  bool more = true;                // the list has not ended
  UInt<6> ahead = 0, waiting = 0;  // runs taken, and requests made, whose beats have to come
  bool begun = false;              // the present run has been taken from `lengths`
  Beats left = 0;                  // its beats
  // what a trip does, decided a trip before: one run more may have been taken since
  bool may_ask = true, may_take = false, ended = false;
runs:
  while (!ended) {
    // II = 1: counters; a beat a trip, and a request. The length of a run is taken with the last
    // beat of the run before, so that what it decides is decided a trip later.
#pragma HLS PIPELINE II = 1 style = flp
    KGRC_TRIP();
    ended = !more && ahead == 0;
    const bool ask = may_ask && more, take = may_take && !ended;
    may_ask = ahead < kRunsAhead - 1 && waiting < kRequestsAhead - 1;
    may_take = !more || ahead >= kRunsAhead - 2 || waiting >= kRequestsAhead - 2;
    const bool moves = take && begun && left > 0, ends = take && begun && left <= 1;
    const bool next = (take && !begun) || (ends && ahead > 1);
    bool asked = false, listed = false;
    if (ask) {
      const Run run = runs.read();
      more = !run.last;
      listed = more;
      asked = run.beats > 0;
      if (asked) {
        maps.read_request(int(run.first), int(run.beats));
        ++requests;
      }
    }
    if (moves) {
      beats.write(Raw<Beat>::unpack(maps.read()));
      ++trips;
    }
    ahead = int(ahead) + listed - ends;
    waiting = int(waiting) + asked - (moves && left == 1);
    if (next) left = lengths.read();
    else if (moves) left -= 1;
    begun = next || (begun && !ends);
  }
}

void read_input(MemoryPort<Beat> maps, Stream<Run>& runs, Stream<Beats>& lengths,
                Stream<Beat>& beats, long& trips, long& requests) {
  read_runs(maps, runs, lengths, beats, trips, requests);
}

void read_shortcut(MemoryPort<Beat> maps, Stream<Run>& runs, Stream<Beats>& lengths,
                   Stream<Beat>& beats, long& trips, long& requests) {
  read_runs(maps, runs, lengths, beats, trips, requests);
}

// The beats of finished codes to the runs of a list. A response says that a run is in memory;
// responses are taken when kRequestsAhead of them are due, and at the end.
void write_output(MemoryPort<Beat> maps, Stream<Run>& runs, Stream<Beat>& beats, Stream<bool>& done,
                  long& trips, long& requests) {
  bool more = true;
  int waiting = 0;
  Beats left = 0;
runs:
  while (more) {
    // II = 1: counters; a beat a trip, and a request
#pragma HLS PIPELINE II = 1 style = flp
    KGRC_TRIP();
    if (left == 0) {
      const Run run = runs.read();
      more = !run.last;
      left = run.beats;
      if (more) {
        if (waiting == kRequestsAhead) maps.write_response();
        else ++waiting;
        maps.write_request(int(run.first), int(run.beats));
        ++requests;
      }
    }
    if (left > 0) {
      maps.write(Raw<Beat>::pack(beats.read()));
      ++trips;
      --left;
    }
  }
responses:
  for (int i = 0; i < waiting; ++i) maps.write_response();
  done.write(true);  // to count_clocks
}

// ---- ports of weights and tables: the same beats once for each output tile --------------------

inline void put(WeightBeat& to, int, const WeightBeat& beat) { to = beat; }
inline void put(Word64& to, int, const Word64& word64) { to = word64; }
inline void put(Index& to, int part, const Word64& word64) { to.word64[part] = word64; }

// Reads `count` beats from beat `first` on, `times` times. `parts` of them make an element of the
// stream.
template <class Value, class Out>
static void read_again(MemoryPort<Value> memory, int first, int count, int times, int parts,
                       Stream<Out>& out, long& trips, long& requests) {
#pragma HLS INLINE
  int to_ask = count > 0 ? times : 0, waiting = 0;
  int left = count, part = 0;
  Out element = Out();
beats:
  while (to_ask > 0 || waiting > 0) {
    // II = 1: counters; a beat a trip, and a request
#pragma HLS PIPELINE II = 1 style = flp
    KGRC_TRIP();
    const bool ask = to_ask > 0 && waiting < kRequestsAhead;
    const bool take = to_ask == 0 || waiting >= kRequestsAhead - 1;
    if (ask) {
      memory.read_request(first, count);
      --to_ask;
      ++waiting;
      ++requests;
    }
    if (take) {
      put(element, part, Raw<Value>::unpack(memory.read()));
      ++trips;
      if (++part == parts) {
        out.write(element);
        part = 0;
      }
      if (--left == 0) {
        left = count;
        --waiting;
      }
    }
  }
}

// The weights of the even chunks of a tile, or of the odd ones.
void read_weights(const Task& task, MemoryPort<WeightBeat> weights, bool odd,
                  Stream<WeightBeat>& beats, long& trips, long& requests) {
  const int chunks = (task[kChunks] + (odd ? 0 : 1)) / 2;
  read_again<WeightBeat>(weights, task[odd ? kOddWeights : kEvenWeights],
                         chunks * task[kChunkBeats], tile_count(task), 1, beats, trips, requests);
}

void read_items(const Task& task, MemoryPort<Word64> tables, Stream<Word64>& items) {
  long trips = 0, requests = 0;
  read_again<Word64>(tables, task[kItems], task[kItemCount], tile_count(task), 1, items, trips,
                     requests);
}

// The indices of all chunks.
void read_indices(const Task& task, MemoryPort<Word64> tables, Stream<Index>& indices,
                  long& trips) {
  long requests = 0;
  read_again<Word64>(tables, task[kIndices], kSparse ? task[kChunks] * kIndexWords : 0,
                     tile_count(task), kIndexWords, indices, trips, requests);
}

// The scales of all filters, two 64-bit words each.
void read_scales(const Task& task, MemoryPort<Word64> tables, Stream<Word64>& scales, long& trips) {
  long requests = 0;
  read_again<Word64>(tables, task[kScales], task[kVectors] * kTn * 2, tile_count(task), 1, scales,
                     trips, requests);
}

}  // namespace kgrc
