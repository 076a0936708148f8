// Compares mac_array.v with the array of ../schedule.cpp and ../compute.cpp on the same streams, for
// each convolution of a program: the sums and the number of trips have to be equal.
//
//   Vmac_array MAPS WEIGHTS TABLES TASKS SEED STALL EXTREME
//
// The three files are the memory of a program. The processes of ../memory.cpp and ../decode.cpp
// fill the streams; with EXTREME, weights and inputs are then set to the ends of their range. A
// stream is not ready in STALL of 8 clocks, on average. Prints for each convolution: task, trips of
// the Verilog, trips of the C++, clocks, sums.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "Vmac_array.h"
#include "array.h"
#include "bits.h"

using namespace kgrc;

namespace {

std::mt19937 rng;
int chance(int among) { return int(rng() % unsigned(among)); }

template <class Value>
std::vector<Value> file(const char* name) {
  std::FILE* in = std::fopen(name, "rb");
  if (!in) std::abort();
  std::fseek(in, 0, SEEK_END);
  std::vector<Value> values(std::ftell(in) / sizeof(Value));
  std::rewind(in);
  if (std::fread(values.data(), sizeof(Value), values.size(), in) != values.size()) std::abort();
  std::fclose(in);
  return values;
}

// A port that reads a whole file.
template <class Value>
class FilePort {
 public:
  explicit FilePort(std::vector<Value>& values)
      : values(values), requests(0, "file", values.size()) {}
  MemoryPort<Value> port() { return MemoryPort<Value>(values.data(), &requests); }

 private:
  std::vector<Value>& values;
  Requests requests;
};

template <class Value>
std::vector<Value> take_all(Stream<Value>& stream) {
  std::vector<Value> values;
  while (!stream.empty()) values.push_back(stream.read());
  return values;
}

template <class Value>
void give_all(const std::vector<Value>& values, Stream<Value>& stream) {
  for (const Value& value : values) stream.write(value);
}

// ---- words in the layout of mac_array.v ------------------------------------------------------

const int kRow = bits_for(kRegionRows - 1), kBank = bits_for(kPf - 1);
const int kFeature = bits_for(kFeatureRows + kMinFeatureRows);
const int kSize = bits_for(kPf * (kFeatureRows + 8));
const int kFilter = bits_for(kGm - 1), kHeldTile = bits_for(kFilterTiles - 1);
const int kHanded = bits_for(kFilterTiles * kTileVectors);

void put(Bits& bits, const Place& place) {
  bits.put(place.row, kRow);
  bits.put(place.bank, kBank);
}

Bits bits_of(const Tile& tile) {
  Bits bits;
  for (int axis = 0; axis < 3; ++axis) bits.put(tile.size[axis], kSize);
  bits.put(tile.feature_rows, kFeature);
  for (int axis = 0; axis < 3; ++axis) bits.put(tile.step[axis], kSize);
  bits.put(tile.row_step, kRow);
  bits.put(tile.row_wrap_w, kRow);
  bits.put(tile.row_wrap_h, kRow);
  for (int lane = 0; lane < kPf; ++lane)
    for (int axis = 0; axis < 3; ++axis) bits.put(tile.lane_at[lane][axis], kSize);
  for (int lane = 0; lane < kPf; ++lane) bits.put(tile.lane_row[lane], kRow);
  return bits;
}

Bits bits_of(const Item& item) {
  Bits bits;
  bits.put(item.held_tile, kHeldTile);
  bits.put(item.mask, kGroups);
  bits.put(item.new_region, 1);
  bits.put(item.end_block, 1);
  bits.put(item.first, 1);
  bits.put(item.vectors, kHanded);
  return bits;
}

Bits bits_of(const RegionWord& word) {
  Bits bits;
  bits.put(word.last, 1);
  for (int i = 0; i < kPortPositions; ++i) bits.put(word.valid[i], 1);
  for (int i = 0; i < kPortPositions; ++i) put(bits, word.place[i]);
  for (int i = 0; i < kPortPositions; ++i)
    for (int n = 0; n < kTn; ++n) bits.put(word.vector[i].code[n], kBits);
  return bits;
}

Bits bits_of(const WeightWord& word) {
  Bits bits;
  for (int g = 0; g < kGroups; ++g)
    for (int r = 0; r < kRows; ++r)
      for (int k = 0; k < kPk; ++k)
        for (int n = 0; n < kTn; ++n) bits.put(word.code[g][r][k][n], kBits);
  for (int g = 0; g < (kSparse ? kGroups : 1); ++g)
    for (int k = 0; k < kPk; ++k) put(bits, word.offset[g][k]);
  for (int g = 0; g < kGroups; ++g)
    for (int r = 0; r < kRows; ++r) bits.put(word.row[g][r], kFilter);
  return bits;
}

// ---- streams with pauses ---------------------------------------------------------------------

// A word that is offered stays on the port until it is taken.
template <class Value>
class Source {
 public:
  explicit Source(const std::vector<Value>& values) : values(values) {}
  template <class Port>
  bool offer(Port& port, int stall) {
    if (!offered && at < values.size() && chance(8) >= stall) {
      offered = true;
      bits_of(values[at]).show(port);
    }
    return offered;
  }
  void taken() {
    offered = false;
    ++at;
  }
  bool empty() const { return at == values.size(); }

 private:
  const std::vector<Value>& values;
  size_t at = 0;
  bool offered = false;
};

Code extreme(bool weight) {
  const int most = (1 << (kBits - 1)) - 1;
  const int least = weight ? -most : -most - 1;
  switch (chance(4)) {
    case 0: return Code(most);
    case 1: return Code(least + chance(most - least + 1));
    default: return Code(least);
  }
}

void clock(Vmac_array& top) {
  top.clk = 0;
  top.eval();
  top.clk = 1;
  top.eval();
}

}  // namespace

int main(int, char** given) {
  std::vector<Beat> maps = file<Beat>(given[1]);
  std::vector<WeightBeat> weights = file<WeightBeat>(given[2]);
  std::vector<Word64> tables = file<Word64>(given[3]);
  const int tasks = std::atoi(given[4]), stall = std::atoi(given[6]);
  const bool at_extremes = std::atoi(given[7]) != 0;
  rng.seed(unsigned(std::atoi(given[5])));

  FilePort<Beat> map_port_0(maps), map_port_1(maps);
  FilePort<WeightBeat> weight_port_0(weights), weight_port_1(weights);
  FilePort<Word64> table_port(tables), index_port(tables);
  clear_sums();
  Vmac_array top;
  top.start = 0;
  top.tile_valid = top.item_valid = top.region_valid = top.word_valid = top.sums_ready = 0;
  top.rst = 1;
  for (int i = 0; i < 40; ++i) clock(top);
  top.rst = 0;
  clock(top);
  for (int i = 0; top.busy; ++i) {
    if (i > kSumRows + 40) return std::printf("the sums are never cleared\n"), 1;
    clock(top);
  }

  for (int number = 0; number < tasks; ++number) {
    Task task;
    for (int i = 0; i < kFields; i += 2) {
      task.field[i] = int(tables[number * (kFields / 2) + i / 2] & 0xffffffff);
      task.field[i + 1] = int(tables[number * (kFields / 2) + i / 2] >> 32);
    }
    if (!is_convolution(task)) continue;

    long trips = 0, unused = 0;
    Stream<Word64> item_words("item_words");
    Stream<TileSpan> to_list("to_list"), to_scale("to_scale"), to_pack("to_pack");
    Stream<Layout> to_place("to_place"), to_decode("to_decode");
    Stream<Tile> to_inputs("to_inputs");
    Stream<Item> items_to_list("items_to_list"), items_to_place("items_to_place"),
        items_to_decode("items_to_decode"), items_to_schedule("items_to_schedule"),
        items_to_inputs("items_to_inputs");
    Stream<Run> input_runs_0("input_runs_0"), input_runs_1("input_runs_1");
    Stream<Beats> lengths_0("lengths_0"), lengths_1("lengths_1");
    Stream<Beat> beats_0("beats_0"), beats_1("beats_1");
    Stream<WeightBeat> weights_0("weights_0"), weights_1("weights_1");
    Stream<Chunk> chunks_0("chunks_0"), chunks_1("chunks_1");
    Stream<Index> indices("indices");
    Stream<RegionWord> region("region");
    Stream<WeightHalf> words_0("words_0"), words_1("words_1");
    Stream<ArrayRun> runs("runs");
    Stream<DrainOrder> orders("orders");
    Stream<InputStep> input_steps("input_steps");
    Stream<SumStep> sum_steps("sum_steps");
    Stream<SumWord> sums("sums");
    read_items(task, table_port.port(), item_words);
    read_plan(task, item_words, to_list, to_place, to_decode, to_inputs, to_scale, to_pack,
              items_to_list, items_to_place, items_to_decode, items_to_schedule, items_to_inputs,
              unused);
    list_input(task, to_list, items_to_list, input_runs_0, lengths_0, input_runs_1, lengths_1);
    read_input(map_port_0.port(), input_runs_0, lengths_0, beats_0, unused, unused);
    read_input(map_port_1.port(), input_runs_1, lengths_1, beats_1, unused, unused);
    place_input(task, to_place, items_to_place, beats_0, beats_1, region, unused);
    read_weights(task, weight_port_0.port(), false, weights_0, unused, unused);
    read_weights(task, weight_port_1.port(), true, weights_1, unused, unused);
    read_indices(task, index_port.port(), indices, unused);
    gather_chunks(task, false, weights_0, chunks_0);
    gather_chunks(task, true, weights_1, chunks_1);
    make_words(task, to_decode, items_to_decode, chunks_0, chunks_1, indices, words_0, words_1,
               unused);
    const std::vector<Tile> tiles = take_all(to_inputs);
    const std::vector<Item> items = take_all(items_to_inputs);
    std::vector<RegionWord> region_words = take_all(region);
    std::vector<WeightHalf> low = take_all(words_0), high = take_all(words_1);
    if (at_extremes) {
      for (RegionWord& word : region_words)
        for (Vector& vector : word.vector)
          for (Code& code : vector.code) code = extreme(false);
      for (std::vector<WeightHalf>* halves : {&low, &high})
        for (WeightHalf& half : *halves)
          for (auto& group : half.code)
            for (auto& row : group)
              for (auto& column : row)
                for (Code& code : column) code = extreme(true);
    }
    give_all(tiles, to_inputs);
    give_all(items, items_to_inputs);
    give_all(region_words, region);
    give_all(low, words_0);
    give_all(high, words_1);
    std::vector<WeightWord> weight_words;
    for (size_t i = 0; i < low.size(); ++i) weight_words.push_back(joined(low[i], high[i]));
    schedule(task, items_to_schedule, runs, orders);
    address_inputs(task, to_inputs, items_to_inputs, input_steps, unused);
    address_sums(orders, sum_steps);
    multiply(task, runs, input_steps, sum_steps, region, words_0, words_1, sums, trips);
    const std::vector<SumWord> wanted = take_all(sums);

    Source<Tile> tile_source(tiles);
    Source<Item> item_source(items);
    Source<RegionWord> region_source(region_words);
    Source<WeightWord> word_source(weight_words);
    top.words_of_item = task[kTapTiles] * task[kColSteps] * task[kRowSteps];
    top.item_count = unsigned(items.size());
    top.region_count = task[kRegions] * tile_count(task);
    top.start = 1;
    clock(top);
    top.start = 0;
    long clocks = 0;
    size_t found = 0;
    bool taking = false;
    while (top.busy) {
      if (++clocks > 1000 + 100 * trips) return std::printf("task %d hangs\n", number), 1;
      top.tile_valid = tile_source.offer(top.tile, stall);
      top.item_valid = item_source.offer(top.item, stall);
      top.region_valid = region_source.offer(top.region, stall);
      top.word_valid = word_source.offer(top.word, stall);
      taking = taking || chance(8) >= stall;
      top.sums_ready = taking;
      top.clk = 0;
      top.eval();
      const bool tile_taken = top.tile_valid && top.tile_ready;
      const bool item_taken = top.item_valid && top.item_ready;
      const bool region_taken = top.region_valid && top.region_ready;
      const bool word_taken = top.word_valid && top.word_ready;
      if (top.sums_valid && top.sums_ready) {
        if (found == wanted.size()) return std::printf("task %d: a sum too many\n", number), 1;
        for (int i = 0; i < kPortPositions; ++i)
          for (int n = 0; n < kTn; ++n) {
            const long long sum = field(top.sums, (i * kTn + n) * kSumBits, kSumBits);
            if (sum != (long long)(wanted[found].sum[i][n]))
              return std::printf("task %d: sum %zu[%d][%d] is %lld, not %lld\n", number, found, i,
                                 n, sum, (long long)(wanted[found].sum[i][n])),
                     1;
          }
        ++found;
        taking = false;
      }
      top.clk = 1;
      top.eval();
      if (tile_taken) tile_source.taken();
      if (item_taken) item_source.taken();
      if (region_taken) region_source.taken();
      if (word_taken) word_source.taken();
    }
    if (found != wanted.size() || !tile_source.empty() || !item_source.empty() ||
        !region_source.empty() || !word_source.empty())
      return std::printf("task %d: %zu of %zu sums, or words left\n", number, found, wanted.size()),
             1;
    std::printf("%d %u %ld %ld %zu\n", number, top.trips, trips, clocks, found);
  }
  return 0;
}
