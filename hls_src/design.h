// What follows from the numbers of config.h: derived sizes, the refusal of designs that cannot be
// built, and the types that pass between the processes.
//
// Words of the project, in all sources: a *vector* is the T_N codes of neighbouring channels at one
// position; a *map* is a feature map in memory; a *beat* is what a memory port moves in one
// transfer; a *trip* is one iteration of a pipelined loop; an *item* of the plan is a filter tile
// times a channel tile; a *block* is the run of items that add to the same sums; a *region* is the
// input that one output tile needs of one channel tile; a *weight word* is what the array takes of
// the weights for one trip, and a *chunk* is one kernel group's share of a weight word in memory.
#pragma once

#include <config.h>

#include "port.h"
#include "ram.h"
#include "types.h"

namespace kgrc {

enum Derived {
  kGroups = kTm / kGm,       // kernel groups along the filters of a tile
  kRows = kPm / kGroups,     // rows (filters) of one group that a trip works on
  kTileVectors = kTm / kTn,  // output vectors of a filter tile
  kSumRows = kFilterTiles * kFeatureRows,
  // reads of a region in one trip. A bank has two ports, so that a copy of the region serves two.
  kReads = (kSparse ? kGroups : 1) * kPk,
  kCopies = (kReads + 1) / 2,
  kBeatWords = kPortPositions * kTn * kBits / 64,
  kWidePerBeat = 16 / kBits,  // beats that the 16-bit codes of one beat of codes take
  kStoreDistance = 4          // trips from a write of a fused pool's memory to a read that sees it
};

static_assert(kBits == 16 || kBits == 8 || kBits == 4, "a code has 16, 8 or 4 bits");
static_assert(kTm % kGm == 0, "a filter tile (T_M) has to be made of whole kernel groups (G_M)");
static_assert(kPm % kGroups == 0, "P_M has to share out over the T_M / G_M groups of a tile");
static_assert(kGm % kRows == 0, "the rows of a group (G_M) have to be a multiple of those a trip");
static_assert(kTm % kTn == 0, "a filter tile (T_M) has to be made of whole output vectors (T_N)");
static_assert(kPk <= kTk, "P_K cannot exceed the taps of a tile (T_K)");
static_assert(int(kGroups) <= int(kItemMaskBits),
              "an item's mask has a bit for each group of a filter tile");
static_assert(kFilterTiles <= 1 << kItemHeldTileBits, "an item has no room for its held tile");
static_assert(kPortPositions * kTn * kBits % 64 == 0, "a beat has to be made of 64-bit words");
static_assert((kPortPositions & (kPortPositions - 1)) == 0,
              "tiles begin at whole beats: by a shift");
static_assert(kPortPositions <= kPf, "a beat of sums would access a bank more than once");
static_assert(kWeightPortWords >= 1 && kChunkWords % kWeightPortWords == 0,
              "a chunk of weights has to be made of whole beats of the weight port");

// Bits of a number from 0 to `most`.
constexpr int bits_for(int most) {
  int bits = 1;
  while (most >> bits) ++bits;
  return bits;
}

enum Widths {
  kLengthBits = 16,  // positions along an axis of a padded map: MAX_LENGTH in pynq_kgrc/program.py
  kStrideBits = 10,  // MAX_STRIDE in pynq_kgrc/program.py
  kKernelBits = bits_for(kMaxTaps),
  kSizeBits = bits_for(kStoreRows),  // outputs of a tile along an axis
  kFeatureRowBits = bits_for(kFeatureRows + kMinFeatureRows),
  // coordinates within a tile; lanes past its last output run on for some rows
  kTileBits = bits_for(kPf * (kFeatureRows + 2 * kMinFeatureRows)),
  kRegionRowBits = bits_for(kRegionRows - 1),
  kLaneBits = bits_for(kPf - 1),
  kPlaceBits = kRegionRowBits + kLaneBits,
  kRegionBits = bits_for(kRegionRows * kPf),  // positions of a region
  kGroupRowBits = bits_for(kGm - 1),
  kStoreRowBits = bits_for(kStoreRows),
  kBeatShift = bits_for(kPortPositions) - 1,
  kItemCountBits = 31,
  kWordCountBits = 18,  // weight words of an item
  kHalfGroups = (kGroups + 1) / 2,
  kHalfPlaces = kSparse ? kHalfGroups : 1,
  kMostStreamBits = 4096  // Vitis HLS refuses streams of wider structs
};

typedef Int<kBits> Code;
typedef Int<kSumBits> Sum;
typedef UInt<kRegionRowBits> RegionRow;

typedef Words<kBeatWords> Beat;
typedef Words<kWeightPortWords> WeightBeat;

// A number of beats, or the place of one in its memory.
typedef UInt<32> Beats;

// Neighbouring beats of a map, none if `beats` is 0; or, if `last`, the end of a list of runs.
struct Run {
  Beats first, beats;
  bool last;
};

// The T_N channels of one position.
struct Vector {
  Code code[kTn];
};

// A task's descriptor; FIELDS in pynq_kgrc/accelerator/header.py says what the fields hold.
struct Task {
  int field[kFields];
  int operator[](Field name) const { return field[name]; }
};

// An item of the plan; Item in pynq_kgrc/accelerator/plan.py.
struct Item {
  UInt<kItemChannelTileBits> channel_tile;
  UInt<kItemHeldTileBits> held_tile;  // index of the filter tile among those whose sums are held
  UInt<kItemMaskBits> mask;           // a bit for each kernel group, set if the group is enabled
  bool new_region;                    // the first item of its block with this channel tile
  bool end_block;                     // the last item of its block: the sums are handed on after it
  bool first;                         // the first item of an output tile
  UInt<kItemVectorsBits> vectors;     // output vectors to hand on, at the end of a block
};

// A place in a region. Address a of a region lies in row a / P_F of bank a % P_F.
struct Place {
  RegionRow row;
  UInt<kLaneBits> bank;
};

// An output tile.
struct TileSpan {
  UInt<kLengthBits> first[3];  // its first output along depth, height, width
  UInt<kSizeBits> size[3];     // outputs along each axis
};

// Where the positions of a tile's regions lie. Positions whose coordinates leave the same remainders
// modulo the stride form a phase; the phases of a region follow each other. The rows of a phase are
// padded so that output f of the tile reads, at each tap, bank (f + a constant of the tap) % P_F:
// the P_F outputs of a trip read from P_F different banks.
struct Layout {
  TileSpan span;
  // from a position to the next of its phase, along depth, height and width
  Place plane, pitch, column;
  // from a phase to the next, along the same axes
  Place phase[3];
  Place round;  // all phases along the width, those between the windows included
};

// How the outputs of a tile pass by the lanes: P_F of them in each trip.
struct Tile {
  UInt<kSizeBits> size[3];
  UInt<kFeatureRowBits> feature_rows;  // ceil(outputs / P_F): trips for one weight word
  UInt<kTileBits> step[3];  // coordinates of output P_F of the tile: from one trip to the next
  // rows of a bank from one trip to the next; more where the width or the height wraps around
  RegionRow row_step, row_wrap_w, row_wrap_h;
  // of each lane in the first trip: the coordinates of its output, and the row in its bank
  UInt<kTileBits> lane_at[kPf][3];
  RegionRow lane_row[kPf];
};

// The part of a map that one output tile reads of one channel tile, padding included.
struct Region {
  int stride[3], kernel[3];
  int begin[3];  // its first position on the map; negative in the padding
  int rows[2];   // rows along depth and height; those between the windows are left out
  int width;
  int first_beat, beats;  // along the width, counted from the start of the map's row
  int row_beats;          // beats in a row of the map
};

// A beat of a region with the place of each position.
struct RegionWord {
  bool last;
  bool valid[kPortPositions];
  Place place[kPortPositions];
  Vector vector[kPortPositions];
};

struct Chunk {
  Word64 word64[kChunkWords];
};

struct WeightWord {
  Code code[kGroups][kRows][kPk][kTn];
  Place offset[kGroups][kPk];  // of the tap of each column, from the place of an output
  UInt<kGroupRowBits> row[kGroups][kRows];  // filter of the group
};

// The groups of a weight word travel in two streams: the whole word is too wide for one. In a dense
// design all groups have the places of the first.
struct WeightHalf {
  Code code[kHalfGroups][kRows][kPk][kTn];
  Place offset[kHalfPlaces][kPk];
  UInt<kGroupRowBits> row[kHalfGroups][kRows];
};

struct SumWord {
  Sum sum[kPortPositions][kTn];
};
struct CodeWord {
  Int<16> code[kPortPositions][kTn];
};

// The indices of a chunk, a byte each: first the taps of its P_K columns, then its rows.
struct Index {
  Word64 word64[kIndexWords];
};

struct Scale {
  Sum bias;
  UInt<kScaleMultBits> mult;
  UInt<kScaleShiftBits> shift;
};
// Those of the filters of a vector.
struct VectorScale {
  Scale of[kTn];
};

enum StreamBits {
  kItemWordBits = kItemChannelTileBits + kItemHeldTileBits + kItemMaskBits + 3 + kItemVectorsBits,
  kSpanBits = 3 * (kLengthBits + kSizeBits),
  kLayoutBits = kSpanBits + 7 * kPlaceBits,
  kTileWordBits = 3 * kSizeBits + kFeatureRowBits + 3 * kTileBits + 3 * kRegionRowBits +
      kPf * (3 * kTileBits + kRegionRowBits),
  kRegionWordBits = 1 + kPortPositions * (1 + kPlaceBits + kTn * kBits),
  kWeightHalfBits = kHalfGroups * kRows * (kPk * kTn * kBits + kGroupRowBits) +
      kHalfPlaces * kPk * kPlaceBits,
  kSumWordBits = kPortPositions * kTn * kSumBits,
  kCodeWordBits = kPortPositions * kTn * 16,
  kChunkBits = 64 * kChunkWords,
  kVectorScaleBits = kTn * (kSumBits + kScaleMultBits + kScaleShiftBits)
};
static_assert(int(kItemWordBits) <= kMostStreamBits && int(kLayoutBits) <= kMostStreamBits &&
                  int(kTileWordBits) <= kMostStreamBits,
              "a word of the plan is too wide for a stream");
static_assert(int(kRegionWordBits) <= kMostStreamBits, "a beat of a region is too wide");
static_assert(int(kWeightHalfBits) <= kMostStreamBits && int(kChunkBits) <= kMostStreamBits,
              "half a weight word or a chunk is too wide");
static_assert(int(kSumWordBits) <= kMostStreamBits && int(kCodeWordBits) <= kMostStreamBits &&
                  int(kVectorScaleBits) <= kMostStreamBits,
              "a beat of sums is too wide");

// ---- small functions that the processes share ------------------------------------------------

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int smaller(int a, int b) { return a < b ? a : b; }
inline int larger(int a, int b) { return a > b ? a : b; }

// Dividers for lengths of an axis: 17 by 10 bits suffice.
inline int quotient(int a, int b) { return int(UInt<kLengthBits + 1>(a) / UInt<kStrideBits>(b)); }

inline int tiles_along(const Task& task, int axis) {
  const int size = task[Field(kTileD + axis)];
  return int(UInt<kLengthBits + 1>(task[Field(kOutD + axis)] + size - 1) / UInt<kSizeBits>(size));
}
inline int tile_count(const Task& task) {
  return tiles_along(task, 0) * tiles_along(task, 1) * tiles_along(task, 2);
}
inline bool is_convolution(const Task& task) { return task[kKind] == kConvolution; }
inline int taps_of(const Task& task) { return task[kKernelD] * task[kKernelH] * task[kKernelW]; }
// Weight words of an item; a pool has a word without weights for each tap.
inline int item_words(const Task& task) {
  return is_convolution(task) ? task[kTapTiles] * task[kColSteps] * task[kRowSteps] : taps_of(task);
}
// Beats that hold `width` positions.
inline int beats_of_row(int width) {
  return int(UInt<kLengthBits + 1>(width + kPortPositions - 1) / kPortPositions);
}

// The place `by` further.
inline Place moved(const Place& place, const Place& by) {
#pragma HLS INLINE
  const int bank = int(place.bank) + int(by.bank);
  const bool wraps = bank >= kPf;
  // rows are counted modulo a power of two
  const int row = int(place.row) + int(by.row) + (wraps ? 1 : 0);
  Place sum;
  sum.bank = wraps ? bank - kPf : bank;
  sum.row = row & ((1 << kRegionRowBits) - 1);
  return sum;
}

// The number in `bits` bits of a 64-bit word, from bit `first` on.
inline int bit_field(const Word64& word64, int first, int bits) {
#pragma HLS INLINE
  return int(word64 >> first & ((Word64(1) << bits) - 1));
}

// Byte i of the indices of a chunk.
inline int index_byte(const Index& index, int i) {
#pragma HLS INLINE
  return bit_field(index.word64[i / 8], i % 8 * 8, 8);
}

// Code i of an array of 64-bit words.
template <int kCount>
inline Code code_of(const Word64 (&words64)[kCount], int i) {
#pragma HLS INLINE
  const int bit = i * kBits;
  // sign extension: the code at the top of the word, then an arithmetic shift
  return Code(Int<64>(words64[bit / 64] << (64 - kBits - bit % 64)) >> (64 - kBits));
}

// A bank has two ports. With a stride of 3 or more a whole beat could access one bank three times:
// it is cut into parts of two positions.
inline int parts_of_beat(const Region& region) {
  return region.stride[2] > 2 ? ceil_div(kPortPositions, 2) : 1;
}

Region make_region(const Task& task, const TileSpan& span);

// ---- the processes ---------------------------------------------------------------------------

// `trips` counts the trips of a process's pipelined loops.

// plan.cpp
void read_plan(const Task& task, Stream<Word64>& item_words, Stream<TileSpan>& tiles_to_list,
               Stream<Layout>& tiles_to_place, Stream<Layout>& tiles_to_decode,
               Stream<Tile>& tiles_to_inputs, Stream<TileSpan>& tiles_to_scale,
               Stream<TileSpan>& tiles_to_pack, Stream<Item>& items_to_list,
               Stream<Item>& items_to_place, Stream<Item>& items_to_decode,
               Stream<Item>& items_to_schedule, Stream<Item>& items_to_inputs, long& trips);
// memory.cpp
void list_input(const Task& task, Stream<TileSpan>& tiles, Stream<Item>& items, Stream<Run>& runs_0,
                Stream<Beats>& lengths_0, Stream<Run>& runs_1, Stream<Beats>& lengths_1);
void list_shortcut(const Task& task, Stream<Run>& runs, Stream<Beats>& lengths);
void list_output(const Task& task, Stream<Run>& runs);
void read_input(MemoryPort<Beat> maps, Stream<Run>& runs, Stream<Beats>& lengths,
                Stream<Beat>& beats, long& trips, long& requests);
void read_shortcut(MemoryPort<Beat> maps, Stream<Run>& runs, Stream<Beats>& lengths,
                   Stream<Beat>& beats, long& trips, long& requests);
void write_output(MemoryPort<Beat> maps, Stream<Run>& runs, Stream<Beat>& beats, Stream<bool>& done,
                  long& trips, long& requests);
void read_weights(const Task& task, MemoryPort<WeightBeat> weights, bool odd,
                  Stream<WeightBeat>& beats, long& trips, long& requests);
void read_items(const Task& task, MemoryPort<Word64> tables, Stream<Word64>& items);
void read_indices(const Task& task, MemoryPort<Word64> tables, Stream<Index>& indices, long& trips);
void read_scales(const Task& task, MemoryPort<Word64> tables, Stream<Word64>& scales, long& trips);
// clock.cpp
void count_clocks(Stream<bool>& done, long& clocks);
// decode.cpp
void place_input(const Task& task, Stream<Layout>& tiles, Stream<Item>& items,
                 Stream<Beat>& beats_0, Stream<Beat>& beats_1, Stream<RegionWord>& region_words,
                 long& trips);
void gather_chunks(const Task& task, bool odd, Stream<WeightBeat>& beats, Stream<Chunk>& chunks);
void make_words(const Task& task, Stream<Layout>& tiles, Stream<Item>& items,
                Stream<Chunk>& chunks_0, Stream<Chunk>& chunks_1, Stream<Index>& indices,
                Stream<WeightHalf>& words_0, Stream<WeightHalf>& words_1, long& trips);
// post.cpp
void gather_scales(const Task& task, Stream<Word64>& scales, Stream<VectorScale>& vectors);
void scale(const Task& task, Stream<TileSpan>& tiles, Stream<VectorScale>& scales,
           Stream<Beat>& shortcut, Stream<SumWord>& sums, Stream<CodeWord>& codes, long& trips);
// pool.cpp
void pack_output(const Task& task, Stream<TileSpan>& tiles, Stream<CodeWord>& codes,
                 Stream<Beat>& beats, long& trips);

}  // namespace kgrc
