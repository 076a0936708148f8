// The words between the processes of the array. `schedule` decides ahead of time what each trip
// does, `address_inputs` and `address_sums` where in the memories it does it, and `multiply` does
// it: its loop decides nothing.
#pragma once

#include "design.h"

namespace kgrc {

enum ArrayBits {
  kSumRowBits = bits_for(kSumRows - 1),
  kVectorBits = bits_for(kTileVectors - 1),
  kDrainBits = bits_for(kFilterTiles * kTileVectors * kStoreRows),
  kRunBits = 20
};

typedef UInt<kSumRowBits> SumRow;

// Consecutive trips in which the same of the three engines work.
struct ArrayRun {
  UInt<kRunBits> more;          // trips after the first
  bool load;                    // takes a word of a region in each trip
  bool accumulate;              // adds the products of P_F outputs
  bool drain;                   // hands on a word of sums
  bool load_half, region_half;  // of the region memory: the half that is written, that is read
  bool sums_half;  // of the sum memory: the half that is added to; the other is handed on
  bool last;       // the last run of a task
};

// A trip of the accumulating engine.
struct InputStep {
  bool begins;          // takes a weight word; the trips after it use the same
  bool works;           // not so in the trips that only wait for the sums of a small tile
  bool first;           // of the trips of an item: with its first weight word
  UInt<kGroups> mask;   // enabled groups
  SumRow row;           // of the sums
  bool exists[kPf];     // lanes past the last output of the tile add to nothing
  RegionRow rows[kPf];  // of the outputs of the lanes, in the region
};

// The sums of a block, to be handed on.
struct DrainOrder {
  UInt<kDrainBits> words;
  UInt<kTileBits> rows, width;  // of the output tile: rows of its depth and height, outputs in each
  bool last;                    // the last block of a task
};

// A trip of the draining engine: neighbouring outputs lie in neighbouring lanes.
struct SumStep {
  UInt<kVectorBits> vector;  // of the filter tile
  UInt<kLaneBits> lane;      // of the first output; lanes before it are in the next row
  SumRow row;
  bool handed[kPf];  // the lanes that are handed on, and cleared
};

// A weight word from its halves.
inline WeightWord joined(const WeightHalf& low, const WeightHalf& high) {
#pragma HLS INLINE
  WeightWord word;
groups:
  for (int group = 0; group < kGroups; ++group) {
#pragma HLS UNROLL
    const bool is_low = group < kHalfGroups;
    const int in_half = is_low ? group : group - kHalfGroups, place = kSparse ? in_half : 0;
    const WeightHalf& half = is_low ? low : high;
    for (int k = 0; k < kPk; ++k) word.offset[group][k] = half.offset[place][k];
    for (int r = 0; r < kRows; ++r) {
      word.row[group][r] = half.row[in_half][r];
      for (int k = 0; k < kPk; ++k)
        for (int n = 0; n < kTn; ++n) word.code[group][r][k][n] = half.code[in_half][r][k][n];
    }
  }
  return word;
}

// schedule.cpp
void schedule(const Task& task, Stream<Item>& items, Stream<ArrayRun>& runs,
              Stream<DrainOrder>& orders);
void address_inputs(const Task& task, Stream<Tile>& tiles, Stream<Item>& items,
                    Stream<InputStep>& steps, long& macs);
void address_sums(Stream<DrainOrder>& orders, Stream<SumStep>& steps);
// compute.cpp
void multiply(const Task& task, Stream<ArrayRun>& runs, Stream<InputStep>& input_steps,
              Stream<SumStep>& sum_steps, Stream<RegionWord>& region, Stream<WeightHalf>& words_0,
              Stream<WeightHalf>& words_1, Stream<SumWord>& sums, long& trips);
void clear_sums();

}  // namespace kgrc
