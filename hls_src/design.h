// What follows from the numbers of config.h: derived sizes, the refusal of tilings that cannot be
// built, and the words that pass between the processes.
#pragma once

#include <config.h>

#include "ram.h"
#include "types.h"

namespace kgrc {

enum Derived {
  kGroups = kTm / kGm,      // kernel groups along the filters of a tile
  kRows = kPm / kGroups,    // rows of one group worked on at once
  kBlocks = kTm / kTn,      // output vectors of a filter tile
  kSumRows = kFilterTiles * kFeatureRows,
  // a bank has two ports, so a copy of the region serves two reads a trip
  kReads = (kSparse ? kGroups : 1) * kPk,
  kCopies = (kReads + 1) / 2,
  kSumBits = kBits == 16 ? 48 : 32,
  kMinFeatureRows = 4,      // trips between two visits of a sum, for its read, add and write
  kBeatWords = kPortPositions * kTn * kBits / 64,
  kWidePerBeat = 16 / kBits // beats of 16-bit codes for one beat of codes
};

static_assert(kBits == 16 || kBits == 8 || kBits == 4, "a code has 16, 8 or 4 bits");
static_assert(kTm % kGm == 0, "a filter tile (T_M) has to be made of whole kernel groups (G_M)");
static_assert(kPm % kGroups == 0, "P_M has to share out over the T_M / G_M groups of a tile");
static_assert(kGm % kRows == 0, "the rows of a group (G_M) have to be a multiple of those a trip");
static_assert(kTm % kTn == 0, "a filter tile (T_M) has to be made of whole output vectors (T_N)");
static_assert(kPk <= kTk, "P_K cannot exceed the taps of a tile (T_K)");
static_assert(kGroups <= 16, "an item of the plan has room for 16 groups in a filter tile");
static_assert(kPortPositions * kTn * kBits % 64 == 0, "a beat has to be made of 64-bit words");
static_assert(kPortPositions <= kPf, "a beat of sums would meet a bank more than once");
static_assert(kWeightPortWords >= 1 && kChunkWords % kWeightPortWords == 0,
              "a chunk of weights has to be made of whole beats of the weight port");

typedef UInt<64> Word;
typedef Int<kBits> Code;
typedef Int<kSumBits> Sum;

struct Beat { Word word[kBeatWords]; };
struct WeightBeat { Word word[kWeightPortWords]; };

// The T_N channels of one position.
struct Vector { Code code[kTn]; };

// A task as it is worked on; see pynq_kgrc/accelerator/layout.py for the fields.
struct Task {
  int field[kFields];
  int operator[](Field name) const { return field[name]; }
};

// One entry of the plan: a filter tile times a channel tile.
struct Item {
  int channel_tile;   // q
  int slot;           // which of the filter tiles whose sums are held
  int mask;           // groups that are enabled
  bool new_region;    // the first with this channel tile
  bool end_block;     // the last before the sums are handed on
  bool first;         // the first of a pass over the plan
  int blocks;         // output vectors to hand on, at the end of a block
};

// An output tile and the addresses of the input region it sees. The region lies in P_F banks, cut
// into phases of the stride, its rows so long that output f reads bank f mod P_F plus a constant
// of the tap: so P_F neighbouring outputs never meet in a bank.
struct Tile {
  int first[3];       // its first output along depth, height, width
  int size[3];        // outputs along each axis
  int feature_rows;   // ceil(outputs / P_F)
  int phases[3];      // min(kernel, stride)
  int pitch, plane, block;
  int step[3];        // P_F outputs further, along each axis
  int row_step, row_wrap_w, row_wrap_h;
  int lane_at[kPf][3];
  int lane_row[kPf];
};

struct Place { int row, bank; };

struct RegionWord {
  bool last;
  bool valid[kPortPositions];
  Place place[kPortPositions];
  Vector vector[kPortPositions];
};

struct WeightWord {
  Code code[kGroups][kRows][kPk][kTn];
  Place offset[kGroups][kPk];
  int row[kGroups][kRows];
};

struct SumWord { Sum sum[kPortPositions][kTn]; };
struct CodeWord { Int<16> code[kPortPositions][kTn]; };

struct Index { Word word[kIndexWords]; };

struct Scale {
  Int<64> bias;
  int mult, shift;
};

// ---- small things shared by the processes --------------------------------------------------

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int smaller(int a, int b) { return a < b ? a : b; }
inline int larger(int a, int b) { return a > b ? a : b; }
// floor(a / b) for any sign of a
inline int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

inline int tiles_along(const Task& task, int axis) {
  return ceil_div(task[Field(kOutD + axis)], task[Field(kTileD + axis)]);
}
inline int tile_count(const Task& task) {
  return tiles_along(task, 0) * tiles_along(task, 1) * tiles_along(task, 2);
}
inline bool is_convolution(const Task& task) { return task[kKind] == kConvolution; }
inline int beats_of_row(int width) { return ceil_div(width, kPortPositions); }

// Dividers are as wide as their operands: 16 by 10 bits will do for places within a tile.
inline int quotient(int a, int b) { return int(UInt<16>(a) / UInt<10>(b)); }
inline int remainder(int a, int b) { return int(UInt<16>(a) % UInt<10>(b)); }

// Byte number i of an index: first the P_K columns, then the rows.
inline Word index_byte(const Index& index, int i) {
#pragma HLS INLINE
  return index.word[i / 8] >> (i % 8 * 8) & 0xff;
}

// Takes code number i of a beat.
inline Code code_of(const Beat& beat, int i) {
#pragma HLS INLINE
  const int bit = i * kBits;
  return Code(Int<64>(beat.word[bit / 64] << (64 - kBits - bit % 64)) >> (64 - kBits));
}

Tile make_tile(const Task& task, int d, int h, int w);

// ---- the processes -------------------------------------------------------------------------

// `trips` are those of the pipelined loop of a process.

void read_plan(const Task& task, const Word* words, Stream<Tile>& tiles_to_read,
               Stream<Tile>& tiles_to_place, Stream<Tile>& tiles_to_word,
               Stream<Tile>& tiles_to_multiply, Stream<Tile>& tiles_to_scale,
               Stream<Tile>& tiles_to_add, Stream<Tile>& tiles_to_store,
               Stream<Item>& items_to_read,
               Stream<Item>& items_to_place, Stream<Item>& items_to_word,
               Stream<Item>& items_to_multiply, long& trips);
void read_input(const Task& task, const Beat* maps, Stream<Tile>& tiles, Stream<Item>& items,
                Stream<Beat>& beats, long& trips);
void place_input(const Task& task, Stream<Tile>& tiles, Stream<Item>& items, Stream<Beat>& beats,
                 Stream<RegionWord>& region_words, long& trips);
void read_weights(const Task& task, const WeightBeat* weights, Stream<WeightBeat>& beats,
                  long& trips);
void read_indices(const Task& task, const Word* words, Stream<Index>& indices, long& trips);
void make_words(const Task& task, Stream<Tile>& tiles, Stream<Item>& items,
                Stream<WeightBeat>& beats, Stream<Index>& indices, Stream<WeightWord>& words,
                long& trips);
void multiply(const Task& task, Stream<Tile>& tiles, Stream<Item>& items,
              Stream<RegionWord>& region, Stream<WeightWord>& words, Stream<SumWord>& sums,
              long& trips, long& macs);
void read_scales(const Task& task, const Word* words, Stream<Word>& scales, long& trips);
void read_shortcut(const Task& task, const Beat* maps, Stream<Tile>& tiles, Stream<Beat>& beats,
                   long& trips);
void scale(const Task& task, Stream<Tile>& tiles, Stream<Word>& scales, Stream<Beat>& shortcut,
           Stream<SumWord>& sums, Stream<CodeWord>& codes, long& trips);
void store(const Task& task, Beat* maps, Stream<Tile>& tiles, Stream<CodeWord>& codes, long& trips,
           long& output_beats);

void clear_sums();

}  // namespace kgrc
