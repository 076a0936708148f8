// The kernel: one start runs the tasks of a program in order, from a table in memory.
#include "design.h"

namespace kgrc {

// What the processes report of a task: trips of their pipelined loops, then counts.
struct Report {
  long array, place, words, scale, store, plan;
  long macs, input_beats, shortcut_beats, output_beats, weight_beats, index_words, scale_words;
};

// The processes of one task. They run side by side; the streams between them are what decouples
// the loads, the array and the stores. Each memory port has one reader.
static void run_task(const Task& task, const Beat* input, const Beat* shortcut, Beat* output,
                     const WeightBeat* weights, const Word* items, const Word* indices,
                     const Word* scales, Report& report) {
#pragma HLS DATAFLOW
#pragma HLS STABLE variable = task
  Stream<Tile> tiles_to_read, tiles_to_place, tiles_to_word, tiles_to_multiply, tiles_to_scale,
      tiles_to_add, tiles_to_store;
  Stream<Item> items_to_read, items_to_place, items_to_word, items_to_multiply;
  Stream<Beat> input_beats, shortcut_beats;
  Stream<WeightBeat> weight_beats;
  Stream<Index> index;
  Stream<Word> scale_words;
  Stream<RegionWord> region;
  Stream<WeightWord> words;
  Stream<SumWord> sums;
  Stream<CodeWord> codes;
  // processes that follow the plan may be some tiles and items apart
#pragma HLS STREAM variable = tiles_to_read depth = 4
#pragma HLS STREAM variable = tiles_to_place depth = 4
#pragma HLS STREAM variable = tiles_to_word depth = 4
#pragma HLS STREAM variable = tiles_to_multiply depth = 4
#pragma HLS STREAM variable = tiles_to_scale depth = 4
#pragma HLS STREAM variable = tiles_to_add depth = 4
#pragma HLS STREAM variable = tiles_to_store depth = 4
#pragma HLS STREAM variable = items_to_read depth = 64
#pragma HLS STREAM variable = items_to_place depth = 64
#pragma HLS STREAM variable = items_to_word depth = 64
#pragma HLS STREAM variable = items_to_multiply depth = 64
#pragma HLS STREAM variable = input_beats depth = 512
#pragma HLS STREAM variable = shortcut_beats depth = 64
#pragma HLS STREAM variable = weight_beats depth = 512
#pragma HLS STREAM variable = index depth = 64
#pragma HLS STREAM variable = scale_words depth = 64
#pragma HLS STREAM variable = region depth = 16
#pragma HLS STREAM variable = words depth = 4
#pragma HLS STREAM variable = sums depth = 64
#pragma HLS STREAM variable = codes depth = 64
  read_plan(task, items, tiles_to_read, tiles_to_place, tiles_to_word, tiles_to_multiply,
            tiles_to_scale, tiles_to_add, tiles_to_store, items_to_read, items_to_place,
            items_to_word, items_to_multiply, report.plan);
  read_input(task, input, tiles_to_read, items_to_read, input_beats, report.input_beats);
  place_input(task, tiles_to_place, items_to_place, input_beats, region, report.place);
  read_weights(task, weights, weight_beats, report.weight_beats);
  read_indices(task, indices, index, report.index_words);
  make_words(task, tiles_to_word, items_to_word, weight_beats, index, words, report.words);
  multiply(task, tiles_to_multiply, items_to_multiply, region, words, sums, report.array,
           report.macs);
  read_scales(task, scales, scale_words, report.scale_words);
  read_shortcut(task, shortcut, tiles_to_add, shortcut_beats, report.shortcut_beats);
  scale(task, tiles_to_scale, scale_words, shortcut_beats, sums, codes, report.scale);
  store(task, output, tiles_to_store, codes, report.store, report.output_beats);
}

}  // namespace kgrc

// input, shortcut and output are one memory, seen through three ports, and tables, items, indices
// and scales another; each port has one reader, so that none waits for another's. `status` takes
// kStatusWords words a task; `digest` is the design's: a driver refuses programs made for another.
extern "C" void kgrc_run(const kgrc::Beat* input, const kgrc::Beat* shortcut, kgrc::Beat* output,
                         const kgrc::WeightBeat* weights, const kgrc::Word* tables,
                         const kgrc::Word* items, const kgrc::Word* indices,
                         const kgrc::Word* scales, kgrc::Word* status, kgrc::Word* digest,
                         int first_task, int task_count) {
#pragma HLS INTERFACE m_axi port = input offset = slave bundle = maps_in depth = 65536 max_read_burst_length = 64 num_read_outstanding = 16
#pragma HLS INTERFACE m_axi port = shortcut offset = slave bundle = maps_shortcut depth = 65536 max_read_burst_length = 64 num_read_outstanding = 8
#pragma HLS INTERFACE m_axi port = output offset = slave bundle = maps_out depth = 65536 max_write_burst_length = 64 num_write_outstanding = 8
#pragma HLS INTERFACE m_axi port = weights offset = slave bundle = weights depth = 65536 max_read_burst_length = 64 num_read_outstanding = 16
#pragma HLS INTERFACE m_axi port = tables offset = slave bundle = tables depth = 65536 max_read_burst_length = 64 num_read_outstanding = 4
#pragma HLS INTERFACE m_axi port = items offset = slave bundle = items depth = 65536 max_read_burst_length = 64 num_read_outstanding = 4
#pragma HLS INTERFACE m_axi port = indices offset = slave bundle = indices depth = 65536 max_read_burst_length = 64 num_read_outstanding = 4
#pragma HLS INTERFACE m_axi port = scales offset = slave bundle = scales depth = 65536 max_read_burst_length = 64 num_read_outstanding = 4
#pragma HLS INTERFACE m_axi port = status offset = slave bundle = tables depth = 65536
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
      // II = 1: fields follow each other in memory, two a word
#pragma HLS PIPELINE II = 1
      KGRC_TRIP();
      const Word word = tables[number * (kFields / 2) + i / 2];
      task.field[i] = int(word & 0xffffffff);
      task.field[i + 1] = int(word >> 32);
    }
    Report report = Report();
    run_task(task, input, shortcut, output, weights, items, indices, scales, report);
    const long counts[kStatusWords] = {
        1, report.array, report.place, report.words, report.scale, report.store, report.plan,
        report.macs, report.input_beats, report.shortcut_beats, report.output_beats,
        report.weight_beats, report.plan + report.index_words + report.scale_words};
  status_words:
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
extern "C" long kgrc_early_reads() { return kgrc::early_reads; }
#endif
