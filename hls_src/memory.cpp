// Loads and stores: beats and 64-bit words between memory and streams, without arithmetic on codes.
//
// Each memory port has one process, which accesses neighbouring addresses without a condition in
// its innermost loop, so that accesses can become bursts. The processes behind the streams decode
// and compute; the streams decouple them from memory.
//
// Known fault: the bursts are short. A row of a region is one burst, 3.4 beats on average in C3D
// with the design 8-zcu102, and the next one is not requested before this one has come. A timed
// simulation with a memory of 70 cycles latency gives 107 ms for C3D and 316 ms for R(2+1)D-18,
// where the cost model, which knows no memory latency, gives 28.1 and 29.7 ms.
#include "design.h"

namespace kgrc {

// The beats of the map that lie in the regions of the plan, in the order in which the array takes
// the regions. Padding is not read.
//
// A map lies in memory as [channels / T_N][D][H][W / B][B][T_N], its rows padded to whole beats of
// B positions. Where a region has whole rows of the map, they are read as one run.
void read_input(const Task& task, const Beat* maps, Stream<Tile>& tiles, Stream<Item>& items,
                Stream<Beat>& beats, long& trips) {
  const int in_d = task[kInD], in_h = task[kInH];
  const int count = tile_count(task);
tiles:
  for (int number = 0; number < count; ++number) {
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
            // II = 1: neighbouring addresses
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

// The weights of all chunks, once for each output tile.
void read_weights(const Task& task, const WeightBeat* weights, Stream<WeightBeat>& beats,
                  long& trips) {
  const int tiles = tile_count(task), count = task[kChunks] * task[kChunkBeats];
tiles:
  for (int number = 0; number < tiles; ++number)
  weight_beats:
    for (int beat = 0; beat < count; ++beat) {
    // II = 1: neighbouring addresses
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      beats.write(weights[task[kWeights] + beat]);
      ++trips;
    }
}

// The indices of all chunks, once for each output tile.
void read_indices(const Task& task, const Word64* words64, Stream<Index>& indices, long& trips) {
  const int tiles = tile_count(task), count = kSparse ? task[kChunks] : 0;
tiles:
  for (int number = 0; number < tiles; ++number)
  chunks:
    for (int chunk = 0; chunk < count; ++chunk) {
    // II = kIndexWords: neighbouring addresses, as many for a chunk
#pragma HLS PIPELINE II = kIndexWords
      KGRC_TRIP();
      Index index;
      for (int i = 0; i < kIndexWords; ++i)
        index.word64[i] = words64[task[kIndices] + chunk * kIndexWords + i];
      indices.write(index);
      trips += kIndexWords;
    }
}

// The scales of all filters, two 64-bit words each, once for each output tile.
void read_scales(const Task& task, const Word64* words64, Stream<Word64>& scales, long& trips) {
  const int tiles = tile_count(task), count = task[kVectors] * kTn * 2;
tiles:
  for (int number = 0; number < tiles; ++number)
  scale_words:
    for (int i = 0; i < count; ++i) {
    // II = 1: neighbouring addresses
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      scales.write(words64[task[kScales] + i]);
      ++trips;
    }
}

// The beats of the shortcut's map at the outputs of each tile, row by row.
void read_shortcut(const Task& task, const Beat* maps, Stream<Tile>& tiles, Stream<Beat>& beats,
                   long& trips) {
  const int count = tile_count(task);
  const int row_beats = beats_of_row(task[kShortcutW]);
tiles:
  for (int number = 0; number < count; ++number) {
    const Tile tile = tiles.read();
    const int run = beats_of_row(tile.size[2]);
    if (!task[kHasShortcut]) continue;
  vectors:
    for (int vector = 0; vector < task[kVectors]; ++vector)
    rows:
      for (int row = 0; row < tile.size[0] * tile.size[1]; ++row) {
        const int d = tile.first[0] + quotient(row, tile.size[1]);
        const int h = tile.first[1] + remainder(row, tile.size[1]);
        const int plane = (vector * task[kShortcutD] + d) * task[kShortcutH];
        const Beat* from = maps + task[kShortcut] + (plane + h) * row_beats +
                           tile.first[2] / kPortPositions;
      run:
        for (int beat = 0; beat < run; ++beat) {
        // II = 1: neighbouring addresses
#pragma HLS PIPELINE II = 1
          KGRC_TRIP();
          beats.write(from[beat]);
          ++trips;
        }
      }
  }
}

// The beats of finished codes to the outputs of each tile, after the fused max pool, row by row.
void write_output(const Task& task, Beat* maps, Stream<Tile>& tiles, Stream<Beat>& beats,
                  Stream<bool>& done, long& trips) {
  const int pool[3] = {task[kPoolD], task[kPoolH], task[kPoolW]};
  const int out_d = quotient(task[kOutD], pool[0]), out_h = quotient(task[kOutH], pool[1]);
  const int row_beats = beats_of_row(quotient(task[kOutW], pool[2]));
  // codes of 16 bits in a design with fewer take more than one beat
  const int parts = task[kWide] ? kWidePerBeat : 1;
  const int count = tile_count(task);
tiles:
  for (int number = 0; number < count; ++number) {
    const Tile tile = tiles.read();
    int first[3], size[3];
  axes:
    for (int axis = 0; axis < 3; ++axis) {
      first[axis] = quotient(tile.first[axis], pool[axis]);
      size[axis] = quotient(tile.size[axis], pool[axis]);
    }
    const int run = beats_of_row(size[2]) * parts;
  vectors:
    for (int vector = 0; vector < task[kVectors]; ++vector)
    rows:
      for (int row = 0; row < size[0] * size[1]; ++row) {
        const int d = first[0] + quotient(row, size[1]);
        const int h = first[1] + remainder(row, size[1]);
        const int plane = (vector * out_d + d) * out_h;
        Beat* to = maps + task[kTarget] +
                   ((plane + h) * row_beats + first[2] / kPortPositions) * parts;
      run:
        for (int beat = 0; beat < run; ++beat) {
        // II = 1: neighbouring addresses
#pragma HLS PIPELINE II = 1
          KGRC_TRIP();
          to[beat] = beats.read();
          ++trips;
        }
      }
  }
  done.write(true);  // to count_clocks
}

}  // namespace kgrc
