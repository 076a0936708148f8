// The kernel: one start runs the tasks of a program in order, from a table in memory.
#include "design.h"

namespace kgrc {

// The processes of one task. They run side by side; the streams between them are what decouples
// the loads, the array and the stores.
static void run_task(const Task& task, const Beat* input, const Beat* shortcut, Beat* output,
                     const WeightBeat* weights, const Word* tables, Trips& trips) {
#pragma HLS DATAFLOW
  Stream<Item> for_input, for_weights, for_array;
  Stream<RegionWord> region;
  Stream<WeightWord> words;
  Stream<SumWord> sums;
  Stream<CodeWord> codes;
#pragma HLS STREAM variable = for_input depth = 64
#pragma HLS STREAM variable = for_weights depth = 64
#pragma HLS STREAM variable = for_array depth = 64
#pragma HLS STREAM variable = region depth = 64
#pragma HLS STREAM variable = words depth = 4
#pragma HLS STREAM variable = sums depth = 64
#pragma HLS STREAM variable = codes depth = 64
  read_plan(task, tables, for_input, for_weights, for_array, trips);
  fetch_input(task, input, for_input, region, trips);
  fetch_weights(task, weights, tables, for_weights, words, trips);
  multiply(task, for_array, region, words, sums, trips);
  scale(task, tables, shortcut, sums, codes, trips);
  store(task, output, codes, trips);
}

}  // namespace kgrc

// input, shortcut and output are one memory, seen through three ports; `status` takes kStatusWords
// words a task; `digest` is the design's, so that a driver can refuse a program made for another.
extern "C" void kgrc_run(const kgrc::Beat* input, const kgrc::Beat* shortcut, kgrc::Beat* output,
                         const kgrc::WeightBeat* weights, const kgrc::Word* tables,
                         kgrc::Word* status, kgrc::Word* digest, int first_task, int task_count) {
#pragma HLS INTERFACE m_axi port = input offset = slave bundle = maps_in depth = 1024 max_read_burst_length = 64 num_read_outstanding = 32
#pragma HLS INTERFACE m_axi port = shortcut offset = slave bundle = maps_shortcut depth = 1024 max_read_burst_length = 64 num_read_outstanding = 16
#pragma HLS INTERFACE m_axi port = output offset = slave bundle = maps_out depth = 1024 max_write_burst_length = 64 num_write_outstanding = 16
#pragma HLS INTERFACE m_axi port = weights offset = slave bundle = weights depth = 1024 max_read_burst_length = 64 num_read_outstanding = 32
#pragma HLS INTERFACE m_axi port = tables offset = slave bundle = tables depth = 1024 max_read_burst_length = 64 num_read_outstanding = 16
#pragma HLS INTERFACE m_axi port = status offset = slave bundle = tables depth = 1024
#pragma HLS INTERFACE s_axilite port = input
#pragma HLS INTERFACE s_axilite port = shortcut
#pragma HLS INTERFACE s_axilite port = output
#pragma HLS INTERFACE s_axilite port = weights
#pragma HLS INTERFACE s_axilite port = tables
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
  fields:
    for (int i = 0; i < kFields; i += 2) {
      // II = 1: fields follow each other in memory, two a word
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      const Word word = tables[number * (kFields / 2) + i / 2];
      task.field[i] = int(word & 0xffffffff);
      task.field[i + 1] = int(word >> 32);
    }
    Trips trips = Trips();
    run_task(task, input, shortcut, output, weights, tables, trips);
    const long counts[kStatusWords] = {1, trips.array, trips.input, trips.weights, trips.scale,
                                       trips.store, trips.plan, trips.macs, trips.input_beats,
                                       trips.shortcut_beats, trips.output_beats,
                                       trips.weight_beats, trips.table_words};
  report:
    for (int i = 0; i < kStatusWords; ++i) {
      // II = 1: each word stands for itself
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      status[number * kStatusWords + i] = Word(counts[i]);
    }
  }
}

#ifdef KGRC_PORTS
extern "C" long kgrc_port_conflicts() { return kgrc::port_conflicts; }
#endif
