// The array: one pipelined loop over all the trips of a task, so that it fills and drains once.
//
// Each trip of the loop does up to three things: it multiplies a weight word with the inputs of P_F
// outputs, it loads a word of the next region, and it hands on a word of finished sums. Which of
// them is decided before, in schedule.cpp: a run says it for a number of trips, a step gives the
// rows. Here every bank of a memory asks what it has to do, so that a bank is named by constants:
// a bank of regions has two addresses in a trip, a bank of sums has one.
#include "array.h"
#include "dot.h"

namespace kgrc {

#if defined(KGRC_PORTS) || defined(KGRC_LATE)
long current_trip = 0;
#endif
#ifdef KGRC_PORTS
long port_conflicts = 0;
long early_reads = 0;
#endif

#ifdef KGRC_DIRECT
#ifdef __SYNTHESIS__
static_assert(int(kBits) == 16, "without packing, each product of 8 or 4 bits takes a DSP");
#endif
typedef DotDirect<kBits, kTn> Element;
#else
typedef Dot<kBits, kTn> Element;
#endif
typedef Int<2 * kBits + 8 + bits_for(kPk)> Total;

// A vector as one word of a memory. The calls are in a pipelined loop, which unrolls their loops.
#ifdef KGRC_PLAIN
typedef Vector PackedVector;
static inline PackedVector pack(const Vector& vector) { return vector; }
static inline Vector unpack(const PackedVector& word) { return word; }
#else
typedef UInt<kTn * kBits> PackedVector;
static inline PackedVector pack(const Vector& vector) {
  PackedVector word = 0;
  for (int n = 0; n < kTn; ++n)
    word.range(n * kBits + kBits - 1, n * kBits) = vector.code[n].range(kBits - 1, 0);
  return word;
}
static inline Vector unpack(const PackedVector& word) {
  Vector vector;
  for (int n = 0; n < kTn; ++n)
    vector.code[n].range(kBits - 1, 0) = word.range(n * kBits + kBits - 1, n * kBits);
  return vector;
}
#endif

typedef Ram<PackedVector, kRegionRows, kRegionDistance> RegionBank;
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

// Place number `read` among those of a weight word, as the lanes see it: a constant after unrolling.
static inline Place place_of(const WeightWord& word, int read) {
#pragma HLS INLINE
  return word.offset[read / kPk][read % kPk];
}

// Loads a word of a region, and reads the inputs of P_F outputs at each tap of a weight word. Output
// f of the tile has its input in bank (f + the place's bank) % P_F, one row on where that wraps.
static inline void access_regions(const ArrayRun& run, bool works, const InputStep& step,
                                  const WeightWord& word, const RegionWord& in,
                                  Vector (&inputs)[kReads][kPf]) {
#pragma HLS INLINE
  Vector zero;
  for (int n = 0; n < kTn; ++n) zero.code[n] = 0;
  // Each value begins at zero: what a trip does not set is not carried on from the trip before.
  RegionRow read_rows[kReads][kPf];
  PackedVector found[kReads][kPf];
places:
  for (int read = 0; read < kReads; ++read) {
#pragma HLS UNROLL
    const Place place = place_of(word, read);
    for (int bank = 0; bank < kPf; ++bank) {
      read_rows[read][bank] = 0;
      found[read][bank] = pack(zero);
      inputs[read][bank] = zero;
    }
  to_banks:
    for (int shift = 0; shift < kPf; ++shift) {
#pragma HLS UNROLL
      if (place.bank != shift) continue;
      for (int lane = 0; lane < kPf; ++lane) {
        const int end = lane + shift, wraps = end >= kPf ? 1 : 0;
        const int row = int(step.rows[lane]) + int(place.row) + wraps;
        read_rows[read][end - wraps * kPf] = RegionRow(row & ((1 << kRegionRowBits) - 1));
      }
    }
  }
banks:
  for (int bank = 0; bank < kPf; ++bank) {
#pragma HLS UNROLL
    // at most two positions of a beat lie in a bank
    bool first = false, second = false;
    RegionRow first_row = 0, second_row = 0;
    Vector first_vector = zero, second_vector = zero;
  positions:
    for (int i = 0; i < kPortPositions; ++i) {
#pragma HLS UNROLL
      const bool here = run.load && in.valid[i] && in.place[i].bank == bank;
      if (here && first) {
        second = true;
        second_row = in.place[i].row;
        second_vector = in.vector[i];
      }
      if (here && !first) {
        first = true;
        first_row = in.place[i].row;
        first_vector = in.vector[i];
      }
    }
    const PackedVector first_word = pack(first_vector), second_word = pack(second_vector);
  halves:
    for (int half = 0; half < 2; ++half)
      for (int copy = 0; copy < kCopies; ++copy) {
#pragma HLS UNROLL
        const int a = 2 * copy, b = 2 * copy + 1 < kReads ? 2 * copy + 1 : 2 * copy;
        const bool reads = works && run.region_half == (half != 0);
        const bool loads = run.load && run.load_half == (half != 0);
        const RegionRow row_a = reads ? read_rows[a][bank] : first_row;
        const RegionRow row_b = reads ? read_rows[b][bank] : second_row;
        RegionBank& ram = region_ram[half][copy][bank];
        if (reads) {
          found[a][bank] = ram.read(row_a);
          if (a != b) found[b][bank] = ram.read(row_b);
        } else if (loads) {
          if (first) ram.write(row_a, first_word);
          if (second) ram.write(row_b, second_word);
        }
      }
  }
reads:
  for (int read = 0; read < kReads; ++read) {
#pragma HLS UNROLL
    const Place place = place_of(word, read);
  to_lanes:
    for (int shift = 0; shift < kPf; ++shift) {
#pragma HLS UNROLL
      if (place.bank != shift) continue;
      for (int lane = 0; lane < kPf; ++lane)
        inputs[read][lane] = unpack(
            found[read][lane + shift < kPf ? lane + shift : lane + shift - kPf]);
    }
  }
}

// The dot products of a weight word with the inputs of P_F outputs.
static inline void multiply_word(const WeightWord& word, const Vector (&inputs)[kReads][kPf],
                                 Total (&totals)[kGroups][kRows][kPf]) {
#pragma HLS INLINE
groups:
  for (int group = 0; group < kGroups; ++group) {
#pragma HLS UNROLL
    const int first_read = kSparse ? group * kPk : 0;
  rows:
    for (int r = 0; r < kRows; r += Element::kWeights) {
#pragma HLS UNROLL
    features:
      for (int lane = 0; lane < kPf; lane += Element::kFeatures) {
#pragma HLS UNROLL
        Total total[Element::kWeights][Element::kFeatures];
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
              x[i][n] = lane + i < kPf ? inputs[first_read + k][lane + i].code[n] : Code(0);
          Element::run(w, x, products);
          for (int a = 0; a < Element::kWeights; ++a)
            for (int b = 0; b < Element::kFeatures; ++b) total[a][b] += products[a][b];
        }
        for (int a = 0; a < Element::kWeights; ++a)
          for (int b = 0; b < Element::kFeatures; ++b)
            if (r + a < kRows && lane + b < kPf) totals[group][r + a][lane + b] = total[a][b];
      }
    }
  }
}

// Adds to the sums of one half, and hands on and clears sums of the other.
static inline void access_sums(const ArrayRun& run, bool works, const InputStep& step,
                               const WeightWord& word, const SumStep& hand, bool convolves,
                               bool largest, const Vector (&inputs)[kReads][kPf],
                               const Total (&totals)[kGroups][kRows][kPf], Sum (&out)[kPf][kTn]) {
#pragma HLS INLINE
filters:
  for (int filter = 0; filter < kTm; ++filter) {
#pragma HLS UNROLL
    const int group = filter / kGm, n = filter % kTn;
    // the row of the weight word that is this filter, if there is one
    bool has_row = false;
    Total total[kPf];
    for (int lane = 0; lane < kPf; ++lane) total[lane] = 0;
  rows:
    for (int r = 0; r < kRows; ++r) {
#pragma HLS UNROLL
      if (word.row[group][r] != filter % kGm) continue;
      has_row = true;
      for (int lane = 0; lane < kPf; ++lane) total[lane] = totals[group][r][lane];
    }
    const bool adds = works && (convolves ? has_row && (step.mask >> group & 1) : filter < kTn);
    const bool hands = run.drain && hand.vector == filter / kTn;
  halves:
    for (int half = 0; half < 2; ++half) {
#pragma HLS UNROLL
      const bool added_to = run.sums_half == (half != 0);
      if (added_to ? !adds : !hands) continue;
      for (int lane = 0; lane < kPf; ++lane) {
#pragma HLS UNROLL
        if (added_to ? !step.exists[lane] : !hand.handed[lane]) continue;
        const SumRow next_row = hand.row + (hand.lane > lane ? 1 : 0);
        const SumRow row = added_to ? step.row : next_row;
        SumBank& bank = sum_ram[half][filter][lane];
        const Sum old = bank.read(row);
        Sum value = Sum(old + total[lane]);
        if (filter < kTn && !convolves) {
          const Sum code = inputs[0][lane].code[n];
          const Sum both = largest ? (old > code ? old : code) : Sum(old + code);
          value = step.first ? code : both;
        }
        if (!added_to) {
          out[lane][n] = old;
          value = 0;
        }
        bank.write(row, value);
      }
    }
  }
}

void multiply(const Task& task, Stream<ArrayRun>& runs, Stream<InputStep>& input_steps,
              Stream<SumStep>& sum_steps, Stream<RegionWord>& region, Stream<WeightHalf>& words_0,
              Stream<WeightHalf>& words_1, Stream<SumWord>& sums, long& trips) {
  // the arrays of banks, not the rows within a bank
#pragma HLS ARRAY_PARTITION variable = region_ram complete dim = 1
#pragma HLS ARRAY_PARTITION variable = region_ram complete dim = 2
#pragma HLS ARRAY_PARTITION variable = region_ram complete dim = 3
#pragma HLS ARRAY_PARTITION variable = sum_ram complete dim = 1
#pragma HLS ARRAY_PARTITION variable = sum_ram complete dim = 2
#pragma HLS ARRAY_PARTITION variable = sum_ram complete dim = 3
#ifdef KGRC_REGION_URAM
  // two ports a bank, each of which reads or writes: an UltraRAM instead of two block RAMs
#pragma HLS BIND_STORAGE variable = region_ram type = ram_t2p impl = uram
#endif
  const bool convolves = is_convolution(task), largest = task[kKind] == kMaxPool;
  ArrayRun run = ArrayRun();
  WeightWord word = WeightWord();
  UInt<kRunBits> left = 0;
  bool takes_run = true, ended = false;
flattened:
  while (!ended) {
    // II = 1: what is carried from trip to trip is the run, a count that goes down, and the weight
    // word. A sum is read kMinFeatureRows trips after it was written at the earliest, a region
    // kRegionDistance trips: schedule() waits that long. In a trip, a bank of regions is either read
    // or written, and a bank of sums is read before it is written.
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = sum_ram inter RAW distance = kMinFeatureRows true
#pragma HLS DEPENDENCE variable = sum_ram intra RAW false
#pragma HLS DEPENDENCE variable = region_ram inter RAW distance = kRegionDistance true
#pragma HLS DEPENDENCE variable = region_ram intra false
    KGRC_TRIP();
    ++trips;
    if (takes_run) run = runs.read();
    left = takes_run ? run.more : UInt<kRunBits>(left - 1);
    takes_run = left == 0;
    ended = takes_run && run.last;
    InputStep step = InputStep();
    if (run.accumulate) step = input_steps.read();
    if (run.accumulate && step.begins) {
      const WeightHalf low = words_0.read(), high = words_1.read();
      word = joined(low, high);
    }
    RegionWord in = RegionWord();
    if (run.load) in = region.read();
    SumStep hand = SumStep();
    if (run.drain) hand = sum_steps.read();
    const bool works = run.accumulate && step.works;
    Vector inputs[kReads][kPf];
    access_regions(run, works, step, word, in, inputs);
    Total totals[kGroups][kRows][kPf];
    multiply_word(word, inputs, totals);
    Sum handed[kPf][kTn];
    for (int lane = 0; lane < kPf; ++lane)
      for (int n = 0; n < kTn; ++n) handed[lane][n] = 0;
    access_sums(run, works, step, word, hand, convolves, largest, inputs, totals, handed);
    if (run.drain) {
      SumWord out;
      for (int i = 0; i < kPortPositions; ++i)
        for (int n = 0; n < kTn; ++n) out.sum[i][n] = 0;
    to_positions:
      for (int shift = 0; shift < kPf; ++shift) {
#pragma HLS UNROLL
        if (hand.lane != shift) continue;
        for (int i = 0; i < kPortPositions; ++i)
          for (int n = 0; n < kTn; ++n)
            out.sum[i][n] = handed[i + shift < kPf ? i + shift : i + shift - kPf][n];
      }
      sums.write(out);
    }
  }
}

}  // namespace kgrc
