// The kernel: one start runs the tasks of a program in order, from a table in memory.
#include "array.h"

namespace kgrc {

// What the processes count of a task. The names are those of STATUS in
// pynq_kgrc/accelerator/header.py; index_words and scale_words are parts of table_words.
struct Report {
  long array, input, weights, scale, store, plan;  // trips of pipelined loops
  long macs, index_words, scale_words;
  // of a port: beats and requests
  long input_beats_0, input_beats_1, shortcut_beats, output_beats, weight_beats_0, weight_beats_1;
  long input_requests_0, input_requests_1, shortcut_requests, output_requests, weight_requests_0,
      weight_requests_1;
  long clocks;  // clock cycles from the start of the task to its end
};

// The processes of one task. They run side by side; the streams between them decouple the loads,
// the array and the stores. Each memory port is accessed by one process.
static void run_task(const Task& task, MemoryPort<Beat> input0, MemoryPort<Beat> input1,
                     MemoryPort<Beat> shortcut, MemoryPort<Beat> output,
                     MemoryPort<WeightBeat> weights0, MemoryPort<WeightBeat> weights1,
                     MemoryPort<Word64> items, MemoryPort<Word64> indices,
                     MemoryPort<Word64> scales, Report& report) {
#pragma HLS DATAFLOW
#pragma HLS STABLE variable = task
  Stream<Word64> item_words("item_words");
  Stream<TileSpan> tiles_to_list("tiles_to_list");
  Stream<Layout> tiles_to_place("tiles_to_place");
  Stream<Layout> tiles_to_decode("tiles_to_decode");
  Stream<Tile> tiles_to_inputs("tiles_to_inputs");
  Stream<TileSpan> tiles_to_scale("tiles_to_scale");
  Stream<TileSpan> tiles_to_pack("tiles_to_pack");
  Stream<Item> items_to_list("items_to_list");
  Stream<Item> items_to_place("items_to_place");
  Stream<Item> items_to_decode("items_to_decode");
  Stream<Item> items_to_schedule("items_to_schedule");
  Stream<Item> items_to_inputs("items_to_inputs");
  Stream<Run> input_runs_0("input_runs_0");
  Stream<Run> input_runs_1("input_runs_1");
  Stream<Run> shortcut_runs("shortcut_runs");
  Stream<Run> output_runs("output_runs");
  Stream<Beats> input_lengths_0("input_lengths_0");
  Stream<Beats> input_lengths_1("input_lengths_1");
  Stream<Beats> shortcut_lengths("shortcut_lengths");
  Stream<Beat> input_beats_0("input_beats_0");
  Stream<Beat> input_beats_1("input_beats_1");
  Stream<Beat> shortcut_beats("shortcut_beats");
  Stream<Beat> output_beats("output_beats");
  Stream<WeightBeat> weight_beats_0("weight_beats_0");
  Stream<WeightBeat> weight_beats_1("weight_beats_1");
  Stream<Chunk> weight_chunks_0("weight_chunks_0");
  Stream<Chunk> weight_chunks_1("weight_chunks_1");
  Stream<Index> chunk_indices("chunk_indices");
  Stream<Word64> scale_words("scale_words");
  Stream<VectorScale> vector_scales("vector_scales");
  Stream<ArrayRun> array_runs("array_runs");
  Stream<DrainOrder> drain_orders("drain_orders");
  Stream<InputStep> input_steps("input_steps");
  Stream<SumStep> sum_steps("sum_steps");
  Stream<RegionWord> region_words("region_words");
  Stream<WeightHalf> weight_words_0("weight_words_0");
  Stream<WeightHalf> weight_words_1("weight_words_1");
  Stream<SumWord> sum_words("sum_words");
  Stream<CodeWord> code_words("code_words");
  Stream<bool> done("done");
  // Processes that follow the plan may be some tiles and items apart: the input ports are up to
  // kRunsAhead items and two tiles ahead of the array, and would hang with less room. More tiles are
  // apart where they are so small that several are in the pipelines behind the array.
#pragma HLS STREAM variable = item_words depth = 512
#pragma HLS STREAM variable = tiles_to_list depth = 16
#pragma HLS STREAM variable = tiles_to_place depth = 16
#pragma HLS STREAM variable = tiles_to_decode depth = 16
#pragma HLS STREAM variable = tiles_to_inputs depth = 16
#pragma HLS STREAM variable = tiles_to_scale depth = 16
#pragma HLS STREAM variable = tiles_to_pack depth = 16
#pragma HLS STREAM variable = items_to_list depth = 512
#pragma HLS STREAM variable = items_to_place depth = 512
#pragma HLS STREAM variable = items_to_decode depth = 512
#pragma HLS STREAM variable = items_to_schedule depth = 512
#pragma HLS STREAM variable = items_to_inputs depth = 512
  // as deep as a port is ahead: kRunsAhead
#pragma HLS STREAM variable = input_runs_0 depth = 32
#pragma HLS STREAM variable = input_runs_1 depth = 32
#pragma HLS STREAM variable = shortcut_runs depth = 32
#pragma HLS STREAM variable = output_runs depth = 32
#pragma HLS STREAM variable = input_lengths_0 depth = 32
#pragma HLS STREAM variable = input_lengths_1 depth = 32
#pragma HLS STREAM variable = shortcut_lengths depth = 32
#pragma HLS STREAM variable = input_beats_0 depth = 512
#pragma HLS STREAM variable = input_beats_1 depth = 512
#pragma HLS STREAM variable = shortcut_beats depth = 64
#pragma HLS STREAM variable = output_beats depth = 512
#pragma HLS STREAM variable = weight_beats_0 depth = 512
#pragma HLS STREAM variable = weight_beats_1 depth = 512
#pragma HLS STREAM variable = weight_chunks_0 depth = 16
#pragma HLS STREAM variable = weight_chunks_1 depth = 16
#pragma HLS STREAM variable = chunk_indices depth = 64
#pragma HLS STREAM variable = scale_words depth = 64
#pragma HLS STREAM variable = vector_scales depth = 16
  // what the array does is decided some runs and trips ahead
#pragma HLS STREAM variable = array_runs depth = 16
#pragma HLS STREAM variable = drain_orders depth = 4
#pragma HLS STREAM variable = input_steps depth = 32
#pragma HLS STREAM variable = sum_steps depth = 32
#pragma HLS STREAM variable = region_words depth = 16
#pragma HLS STREAM variable = weight_words_0 depth = 4
#pragma HLS STREAM variable = weight_words_1 depth = 4
#pragma HLS STREAM variable = sum_words depth = 64
#pragma HLS STREAM variable = code_words depth = 64
#pragma HLS STREAM variable = done depth = 2
  read_items(task, items, item_words);
  read_plan(task, item_words, tiles_to_list, tiles_to_place, tiles_to_decode, tiles_to_inputs,
            tiles_to_scale, tiles_to_pack, items_to_list, items_to_place, items_to_decode,
            items_to_schedule, items_to_inputs, report.plan);
  list_input(task, tiles_to_list, items_to_list, input_runs_0, input_lengths_0, input_runs_1,
             input_lengths_1);
  read_input(input0, input_runs_0, input_lengths_0, input_beats_0, report.input_beats_0,
             report.input_requests_0);
  read_input(input1, input_runs_1, input_lengths_1, input_beats_1, report.input_beats_1,
             report.input_requests_1);
  place_input(task, tiles_to_place, items_to_place, input_beats_0, input_beats_1, region_words,
              report.input);
  read_weights(task, weights0, false, weight_beats_0, report.weight_beats_0,
               report.weight_requests_0);
  read_weights(task, weights1, true, weight_beats_1, report.weight_beats_1,
               report.weight_requests_1);
  gather_chunks(task, false, weight_beats_0, weight_chunks_0);
  gather_chunks(task, true, weight_beats_1, weight_chunks_1);
  read_indices(task, indices, chunk_indices, report.index_words);
  make_words(task, tiles_to_decode, items_to_decode, weight_chunks_0, weight_chunks_1,
             chunk_indices, weight_words_0, weight_words_1, report.weights);
  schedule(task, items_to_schedule, array_runs, drain_orders);
  address_inputs(task, tiles_to_inputs, items_to_inputs, input_steps, report.macs);
  address_sums(drain_orders, sum_steps);
  multiply(task, array_runs, input_steps, sum_steps, region_words, weight_words_0, weight_words_1,
           sum_words, report.array);
  read_scales(task, scales, scale_words, report.scale_words);
  list_shortcut(task, shortcut_runs, shortcut_lengths);
  read_shortcut(shortcut, shortcut_runs, shortcut_lengths, shortcut_beats, report.shortcut_beats,
                report.shortcut_requests);
  gather_scales(task, scale_words, vector_scales);
  scale(task, tiles_to_scale, vector_scales, shortcut_beats, sum_words, code_words, report.scale);
  pack_output(task, tiles_to_pack, code_words, output_beats, report.store);
  list_output(task, output_runs);
  write_output(output, output_runs, output_beats, done, report.output_beats,
               report.output_requests);
  count_clocks(done, report.clocks);
}

}  // namespace kgrc

// The ports of maps see one memory; so do those of weights; tables, items, indices and scales are
// a third. Each is accessed by one process, so that none waits for another.
// `status` takes kStatusWords 64-bit words a task. `digest` is the design's: a driver refuses
// programs that were compiled for another.
extern "C" void kgrc_run(kgrc::MemoryPort<kgrc::Beat> input0, kgrc::MemoryPort<kgrc::Beat> input1,
                         kgrc::MemoryPort<kgrc::Beat> shortcut, kgrc::MemoryPort<kgrc::Beat> output,
                         kgrc::MemoryPort<kgrc::WeightBeat> weights0,
                         kgrc::MemoryPort<kgrc::WeightBeat> weights1, const kgrc::Word64* tables,
                         kgrc::MemoryPort<kgrc::Word64> items,
                         kgrc::MemoryPort<kgrc::Word64> indices,
                         kgrc::MemoryPort<kgrc::Word64> scales, kgrc::Word64* status,
                         kgrc::Word64* digest, int first_task, int task_count) {
  // clang-format off
#pragma HLS INTERFACE m_axi port = input0 offset = slave bundle = maps_in0 depth = 65536 \
    max_read_burst_length = 64 num_read_outstanding = 16
#pragma HLS INTERFACE m_axi port = input1 offset = slave bundle = maps_in1 depth = 65536 \
    max_read_burst_length = 64 num_read_outstanding = 16
#pragma HLS INTERFACE m_axi port = shortcut offset = slave bundle = maps_shortcut depth = 65536 \
    max_read_burst_length = 64 num_read_outstanding = 16
#pragma HLS INTERFACE m_axi port = output offset = slave bundle = maps_out depth = 65536 \
    max_write_burst_length = 64 num_write_outstanding = 16
#pragma HLS INTERFACE m_axi port = weights0 offset = slave bundle = weights0 depth = 65536 \
    max_read_burst_length = 64 num_read_outstanding = 16
#pragma HLS INTERFACE m_axi port = weights1 offset = slave bundle = weights1 depth = 65536 \
    max_read_burst_length = 64 num_read_outstanding = 16
#pragma HLS INTERFACE m_axi port = tables offset = slave bundle = tables depth = 65536 \
    max_read_burst_length = 64 num_read_outstanding = 4
#pragma HLS INTERFACE m_axi port = items offset = slave bundle = items depth = 65536 \
    max_read_burst_length = 16 num_read_outstanding = 16
#pragma HLS INTERFACE m_axi port = indices offset = slave bundle = indices depth = 65536 \
    max_read_burst_length = 16 num_read_outstanding = 16
#pragma HLS INTERFACE m_axi port = scales offset = slave bundle = scales depth = 65536 \
    max_read_burst_length = 16 num_read_outstanding = 16
#pragma HLS INTERFACE m_axi port = status offset = slave bundle = tables depth = 65536
  // clang-format on
#pragma HLS INTERFACE s_axilite port = input0
#pragma HLS INTERFACE s_axilite port = input1
#pragma HLS INTERFACE s_axilite port = shortcut
#pragma HLS INTERFACE s_axilite port = output
#pragma HLS INTERFACE s_axilite port = weights0
#pragma HLS INTERFACE s_axilite port = weights1
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
    run_task(task, input0, input1, shortcut, output, weights0, weights1, items, indices, scales,
             report);
    long counts[kStatusWords] = {};
    counts[kStatusDone] = 1;
    counts[kStatusArray] = report.array;
    counts[kStatusInput] = report.input;
    counts[kStatusWeights] = report.weights;
    counts[kStatusScale] = report.scale;
    counts[kStatusStore] = report.store;
    counts[kStatusPlan] = report.plan;
    counts[kStatusMacs] = report.macs;
    counts[kStatusInputBeats] = report.input_beats_0 + report.input_beats_1;
    counts[kStatusShortcutBeats] = report.shortcut_beats;
    counts[kStatusOutputBeats] = report.output_beats;
    counts[kStatusWeightBeats] = report.weight_beats_0 + report.weight_beats_1;
    counts[kStatusTableWords] = report.plan + report.index_words + report.scale_words;
    counts[kStatusInputRequests] = report.input_requests_0 + report.input_requests_1;
    counts[kStatusShortcutRequests] = report.shortcut_requests;
    counts[kStatusOutputRequests] = report.output_requests;
    counts[kStatusWeightRequests] = report.weight_requests_0 + report.weight_requests_1;
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

#if !defined(__SYNTHESIS__) && !defined(KGRC_VITIS)
// kgrc_run for a simulation. `memory` and `bytes` are in the order of kgrc::Port. Returns null, or
// what the hardware would not forgive, a wait without end for one.
extern "C" const char* kgrc_simulate(void* const* memory, const uint64_t* bytes,
                                     kgrc::Word64* digest, int first_task, int task_count) {
  using namespace kgrc;
  static std::string fault;
  try {
    SimulatedPort<Beat> input0("input0", kPortInput0, memory, bytes);
    SimulatedPort<Beat> input1("input1", kPortInput1, memory, bytes);
    SimulatedPort<Beat> shortcut("shortcut", kPortShortcut, memory, bytes);
    SimulatedPort<Beat> output("output", kPortOutput, memory, bytes);
    SimulatedPort<WeightBeat> weights0("weights0", kPortWeights0, memory, bytes);
    SimulatedPort<WeightBeat> weights1("weights1", kPortWeights1, memory, bytes);
    SimulatedPort<Word64> items("items", kPortItems, memory, bytes);
    SimulatedPort<Word64> indices("indices", kPortIndices, memory, bytes);
    SimulatedPort<Word64> scales("scales", kPortScales, memory, bytes);
    kgrc_run(input0.port(), input1.port(), shortcut.port(), output.port(), weights0.port(),
             weights1.port(), static_cast<Word64*>(memory[kPortTables]), items.port(),
             indices.port(), scales.port(), static_cast<Word64*>(memory[kPortStatus]), digest,
             first_task, task_count);
    input0.check_idle();
    input1.check_idle();
    shortcut.check_idle();
    output.check_idle();
    weights0.check_idle();
    weights1.check_idle();
    items.check_idle();
    indices.check_idle();
    scales.check_idle();
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
