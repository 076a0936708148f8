// The kernel: one start runs the tasks of a program in order, from a table in memory.
#include "design.h"

namespace kgrc {

// What the processes count of a task. The names are those of STATUS in
// pynq_kgrc/accelerator/header.py; index_words and scale_words are parts of table_words.
struct Report {
  long array, input, weights, scale, store, plan;  // trips of pipelined loops
  long macs, input_beats, shortcut_beats, output_beats, weight_beats, index_words, scale_words;
  long clocks;  // clock cycles from the start of the task to its end
};

// The processes of one task. They run side by side; the streams between them decouple the loads,
// the array and the stores. Each memory port is accessed by one process.
static void run_task(const Task& task, const Beat* input, const Beat* shortcut, Beat* output,
                     const WeightBeat* weights, const Word64* items, const Word64* indices,
                     const Word64* scales, Report& report) {
#pragma HLS DATAFLOW
#pragma HLS STABLE variable = task
  Stream<Tile> tiles_to_read("tiles_to_read");
  Stream<Tile> tiles_to_place("tiles_to_place");
  Stream<Tile> tiles_to_decode("tiles_to_decode");
  Stream<Tile> tiles_to_multiply("tiles_to_multiply");
  Stream<Tile> tiles_to_scale("tiles_to_scale");
  Stream<Tile> tiles_to_add("tiles_to_add");
  Stream<Tile> tiles_to_pack("tiles_to_pack");
  Stream<Tile> tiles_to_write("tiles_to_write");
  Stream<Item> items_to_read("items_to_read");
  Stream<Item> items_to_place("items_to_place");
  Stream<Item> items_to_decode("items_to_decode");
  Stream<Item> items_to_multiply("items_to_multiply");
  Stream<Beat> input_beats("input_beats");
  Stream<Beat> shortcut_beats("shortcut_beats");
  Stream<Beat> output_beats("output_beats");
  Stream<WeightBeat> weight_beats("weight_beats");
  Stream<Index> chunk_indices("chunk_indices");
  Stream<Word64> scale_words("scale_words");
  Stream<RegionWord> region_words("region_words");
  Stream<WeightWord> weight_words("weight_words");
  Stream<SumWord> sum_words("sum_words");
  Stream<CodeWord> code_words("code_words");
  Stream<bool> done("done");
  // processes that follow the plan may be some tiles and items apart
#pragma HLS STREAM variable = tiles_to_read depth = 4
#pragma HLS STREAM variable = tiles_to_place depth = 4
#pragma HLS STREAM variable = tiles_to_decode depth = 4
#pragma HLS STREAM variable = tiles_to_multiply depth = 4
#pragma HLS STREAM variable = tiles_to_scale depth = 4
#pragma HLS STREAM variable = tiles_to_add depth = 4
#pragma HLS STREAM variable = tiles_to_pack depth = 4
#pragma HLS STREAM variable = tiles_to_write depth = 4
#pragma HLS STREAM variable = items_to_read depth = 64
#pragma HLS STREAM variable = items_to_place depth = 64
#pragma HLS STREAM variable = items_to_decode depth = 64
#pragma HLS STREAM variable = items_to_multiply depth = 64
#pragma HLS STREAM variable = input_beats depth = 512
#pragma HLS STREAM variable = shortcut_beats depth = 64
#pragma HLS STREAM variable = output_beats depth = 64
#pragma HLS STREAM variable = weight_beats depth = 512
#pragma HLS STREAM variable = chunk_indices depth = 64
#pragma HLS STREAM variable = scale_words depth = 64
#pragma HLS STREAM variable = region_words depth = 16
#pragma HLS STREAM variable = weight_words depth = 4
#pragma HLS STREAM variable = sum_words depth = 64
#pragma HLS STREAM variable = code_words depth = 64
#pragma HLS STREAM variable = done depth = 2
  read_plan(task, items, tiles_to_read, tiles_to_place, tiles_to_decode, tiles_to_multiply,
            tiles_to_scale, tiles_to_add, tiles_to_pack, tiles_to_write, items_to_read,
            items_to_place, items_to_decode, items_to_multiply, report.plan);
  read_input(task, input, tiles_to_read, items_to_read, input_beats, report.input_beats);
  place_input(task, tiles_to_place, items_to_place, input_beats, region_words, report.input);
  read_weights(task, weights, weight_beats, report.weight_beats);
  read_indices(task, indices, chunk_indices, report.index_words);
  make_words(task, tiles_to_decode, items_to_decode, weight_beats, chunk_indices, weight_words,
             report.weights);
  multiply(task, tiles_to_multiply, items_to_multiply, region_words, weight_words, sum_words,
           report.array, report.macs);
  read_scales(task, scales, scale_words, report.scale_words);
  read_shortcut(task, shortcut, tiles_to_add, shortcut_beats, report.shortcut_beats);
  scale(task, tiles_to_scale, scale_words, shortcut_beats, sum_words, code_words, report.scale);
  pack_output(task, tiles_to_pack, code_words, output_beats, report.store);
  write_output(task, output, tiles_to_write, output_beats, done, report.output_beats);
  count_clocks(done, report.clocks);
}

}  // namespace kgrc

// input, shortcut and output are one memory, seen through three ports; tables, items, indices and
// scales are another. Each port is accessed by one process, so that none waits for another.
// `status` takes kStatusWords 64-bit words a task. `digest` is the design's: a driver refuses
// programs that were compiled for another.
extern "C" void kgrc_run(const kgrc::Beat* input, const kgrc::Beat* shortcut, kgrc::Beat* output,
                         const kgrc::WeightBeat* weights, const kgrc::Word64* tables,
                         const kgrc::Word64* items, const kgrc::Word64* indices,
                         const kgrc::Word64* scales, kgrc::Word64* status, kgrc::Word64* digest,
                         int first_task, int task_count) {
  // clang-format off
#pragma HLS INTERFACE m_axi port = input offset = slave bundle = maps_in depth = 65536 \
    max_read_burst_length = 64 num_read_outstanding = 16
#pragma HLS INTERFACE m_axi port = shortcut offset = slave bundle = maps_shortcut depth = 65536 \
    max_read_burst_length = 64 num_read_outstanding = 8
#pragma HLS INTERFACE m_axi port = output offset = slave bundle = maps_out depth = 65536 \
    max_write_burst_length = 64 num_write_outstanding = 8
#pragma HLS INTERFACE m_axi port = weights offset = slave bundle = weights depth = 65536 \
    max_read_burst_length = 64 num_read_outstanding = 16
#pragma HLS INTERFACE m_axi port = tables offset = slave bundle = tables depth = 65536 \
    max_read_burst_length = 64 num_read_outstanding = 4
#pragma HLS INTERFACE m_axi port = items offset = slave bundle = items depth = 65536 \
    max_read_burst_length = 64 num_read_outstanding = 4
#pragma HLS INTERFACE m_axi port = indices offset = slave bundle = indices depth = 65536 \
    max_read_burst_length = 64 num_read_outstanding = 4
#pragma HLS INTERFACE m_axi port = scales offset = slave bundle = scales depth = 65536 \
    max_read_burst_length = 64 num_read_outstanding = 4
#pragma HLS INTERFACE m_axi port = status offset = slave bundle = tables depth = 65536
  // clang-format on
#pragma HLS INTERFACE s_axilite port = input
#pragma HLS INTERFACE s_axilite port = shortcut
#pragma HLS INTERFACE s_axilite port = output
#pragma HLS INTERFACE s_axilite port = weights
#pragma HLS INTERFACE s_axilite port = tables
#pragma HLS INTERFACE s_axilite port = items
#pragma HLS INTERFACE s_axilite port = indices
#pragma HLS INTERFACE s_axilite port = scales
#pragma HLS INTERFACE s_axilite port = status
#pragma HLS INTERFACE s_axilite port = digest
#pragma HLS INTERFACE s_axilite port = first_task
#pragma HLS INTERFACE s_axilite port = task_count
#pragma HLS INTERFACE s_axilite port = return
  using namespace kgrc;
  *digest = kDigest;
  clear_sums();
tasks:
  for (int number = first_task; number < first_task + task_count; ++number) {
    Task task;
#pragma HLS ARRAY_PARTITION variable = task.field complete
  fields:
    for (int i = 0; i < kFields; i += 2) {
      // II = 1: neighbouring addresses, two fields in a 64-bit word
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      const Word64 word64 = tables[number * (kFields / 2) + i / 2];
      task.field[i] = int(word64 & 0xffffffff);
      task.field[i + 1] = int(word64 >> 32);
    }
    Report report = Report();
    run_task(task, input, shortcut, output, weights, items, indices, scales, report);
    long counts[kStatusWords] = {};
    counts[kStatusDone] = 1;
    counts[kStatusArray] = report.array;
    counts[kStatusInput] = report.input;
    counts[kStatusWeights] = report.weights;
    counts[kStatusScale] = report.scale;
    counts[kStatusStore] = report.store;
    counts[kStatusPlan] = report.plan;
    counts[kStatusMacs] = report.macs;
    counts[kStatusInputBeats] = report.input_beats;
    counts[kStatusShortcutBeats] = report.shortcut_beats;
    counts[kStatusOutputBeats] = report.output_beats;
    counts[kStatusWeightBeats] = report.weight_beats;
    counts[kStatusTableWords] = report.plan + report.index_words + report.scale_words;
    counts[kStatusClocks] = report.clocks;
  status_words:
    for (int i = 0; i < kStatusWords; ++i) {
      // II = 1: a word does not depend on another
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      status[number * kStatusWords + i] = Word64(counts[i]);
    }
  }
}

#ifndef __SYNTHESIS__
// kgrc_run for a simulation. Returns null, or why the kernel would have hung.
extern "C" const char* kgrc_simulate(const kgrc::Beat* input, const kgrc::Beat* shortcut,
                                     kgrc::Beat* output, const kgrc::WeightBeat* weights,
                                     const kgrc::Word64* tables, const kgrc::Word64* items,
                                     const kgrc::Word64* indices, const kgrc::Word64* scales,
                                     kgrc::Word64* status, kgrc::Word64* digest, int first_task,
                                     int task_count) {
  static std::string fault;
  try {
    kgrc_run(input, shortcut, output, weights, tables, items, indices, scales, status, digest,
             first_task, task_count);
  } catch (const std::exception& error) {
    fault = error.what();
    return fault.c_str();
  }
  return nullptr;
}
#endif

#ifdef KGRC_PORTS
extern "C" long kgrc_port_conflicts() { return kgrc::port_conflicts; }
extern "C" long kgrc_early_reads() { return kgrc::early_reads; }
#endif
