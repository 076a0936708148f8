// The C test bench: runs the vectors of vectors.py and compares every code and every status word.
//
//   bench FILE           first each task by itself, with a memory of its own for each port; then
//                        all tasks in one start, where ports share a memory as on the board
//   bench FILE apart     only the first part: in co-simulation no two ports share a memory
//
// Returns 0 if there is no difference. `make csim`, csim_design and cosim_design (hls.tcl) run it.
// It is not synthesized: the standard library may be used.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "../design.h"

extern "C" void kgrc_run(kgrc::MemoryPort<kgrc::Beat> input0, kgrc::MemoryPort<kgrc::Beat> input1,
                         kgrc::MemoryPort<kgrc::Beat> shortcut, kgrc::MemoryPort<kgrc::Beat> output,
                         kgrc::MemoryPort<kgrc::WeightBeat> weights0,
                         kgrc::MemoryPort<kgrc::WeightBeat> weights1, const kgrc::Word64* tables,
                         kgrc::MemoryPort<kgrc::Word64> items,
                         kgrc::MemoryPort<kgrc::Word64> indices,
                         kgrc::MemoryPort<kgrc::Word64> scales, kgrc::Word64* status,
                         kgrc::Word64* digest, int first_task, int task_count);
#ifndef KGRC_VITIS
extern "C" const char* kgrc_simulate(void* const* memory, const uint64_t* bytes,
                                     kgrc::Word64* digest, int first_task, int task_count);
#endif

namespace {

using kgrc::Beat;
using kgrc::kBeatWords;
using kgrc::kDigest;
using kgrc::kStatusWords;
using kgrc::kWeightPortWords;
using kgrc::Raw;
using kgrc::WeightBeat;
using kgrc::Word64;

typedef std::vector<Raw<Beat>::Type> Maps;
typedef std::vector<Raw<WeightBeat>::Type> Weights;
typedef std::vector<Word64> Tables;

typedef std::vector<uint64_t> Words;

// `depth` of every m_axi port in top.cpp: co-simulation copies this many elements
const size_t kDepth = 65536;

// The expected results of a task.
struct Wanted {
  Words status;
  size_t at;  // first 64-bit word of its output in the memory of maps
  Words codes;
  Words known;  // mask of the bits that are codes, not padding
};

// The file, in 64-bit words: magic, digest, number of tasks, sizes of maps, weights and tables;
// then these three memories; then for each task its status, the place and size of its output, the
// output, and its mask.
struct Vectors {
  Words maps, weights, tables;
  std::vector<Wanted> tasks;
};

class Reader {
 public:
  explicit Reader(const char* path) : place(0) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> bytes((std::istreambuf_iterator<char>(file)),
                            std::istreambuf_iterator<char>());
    words.resize(bytes.size() / 8);
    if (!words.empty()) std::memcpy(words.data(), bytes.data(), words.size() * 8);
    good = file.good() || file.eof();
  }
  Words take(size_t count) {
    if (count > words.size() - place) {
      good = false;
      return Words(count < kDepth ? count : 0);
    }
    place += count;
    return Words(words.begin() + place - count, words.begin() + place);
  }
  bool ended() const { return place == words.size(); }
  bool good;

 private:
  Words words;
  size_t place;
};

bool read_vectors(const char* path, Vectors* vectors) {
  Reader reader(path);
  const Words head = reader.take(6);
  uint64_t magic;
  std::memcpy(&magic, "KGRCVEC1", 8);
  if (!reader.good || head[0] != magic) {
    std::printf("%s: not a file of vectors\n", path);
    return false;
  }
  if (head[1] != kDigest) {
    std::printf("%s: made for the design %016llx, this is %016llx\n", path,
                static_cast<unsigned long long>(head[1]), kDigest);
    return false;
  }
  vectors->maps = reader.take(head[3]);
  vectors->weights = reader.take(head[4]);
  vectors->tables = reader.take(head[5]);
  for (uint64_t i = 0; reader.good && i < head[2]; ++i) {
    Wanted wanted;
    wanted.status = reader.take(kStatusWords);
    const Words where = reader.take(2);
    wanted.at = where[0];
    wanted.codes = reader.take(where[1]);
    wanted.known = reader.take(where[1]);
    vectors->tasks.push_back(wanted);
    if (wanted.at + wanted.codes.size() > vectors->maps.size()) reader.good = false;
  }
  if (!reader.good || !reader.ended() || vectors->tasks.empty()) {
    std::printf("%s: cut short or too long\n", path);
    return false;
  }
  if (vectors->maps.size() / kBeatWords > kDepth ||
      vectors->weights.size() / kWeightPortWords > kDepth || vectors->tables.size() > kDepth ||
      vectors->tasks.size() * kStatusWords > kDepth) {
    std::printf("%s: more than the %zu elements that a port shows to co-simulation\n", path,
                kDepth);
    return false;
  }
  return true;
}

// The memory of a port, as long as the port is deep.
template <class Element>
std::vector<typename Raw<Element>::Type> memory_of(const Words& words) {
  const size_t count = sizeof(Element) / sizeof(uint64_t);
  std::vector<typename Raw<Element>::Type> memory(kDepth);
  for (size_t at = 0; at < kDepth; ++at) {
    Element element;
    for (size_t i = 0; i < count; ++i)
      element.word64[i] = Word64(at * count + i < words.size() ? words[at * count + i] : 0);
    memory[at] = Raw<Element>::pack(element);
  }
  return memory;
}

Tables words_of(const Words& words) {
  Tables memory(kDepth);
  for (size_t i = 0; i < kDepth; ++i) memory[i] = Word64(i < words.size() ? words[i] : 0);
  return memory;
}

Word64 word_at(const Maps& maps, size_t at) {
  return Raw<Beat>::unpack(maps[at / kBeatWords]).word64[at % kBeatWords];
}

void set_word(Maps* maps, size_t at, const Word64& word64) {
  Beat beat = Raw<Beat>::unpack((*maps)[at / kBeatWords]);
  beat.word64[at % kBeatWords] = word64;
  (*maps)[at / kBeatWords] = Raw<Beat>::pack(beat);
}

// Runs `count` tasks from number `first` on; returns 1 if a port or a stream was misused.
int run(Maps& input0, Maps& input1, Maps& shortcut, Maps& output, Weights& weights0,
        Weights& weights1, Tables& tables, Tables& items, Tables& indices, Tables& scales,
        Tables& status, Word64* digest, int first, int count) {
#ifdef KGRC_VITIS
  kgrc_run(input0.data(), input1.data(), shortcut.data(), output.data(), weights0.data(),
           weights1.data(), tables.data(), items.data(), indices.data(), scales.data(),
           status.data(), digest, first, count);
#else
  void* memory[kgrc::kPorts];
  uint64_t bytes[kgrc::kPorts];
  const auto give = [&](kgrc::Port port, void* data, size_t size) {
    memory[port] = data;
    bytes[port] = kDepth * size;
  };
  give(kgrc::kPortInput0, input0.data(), sizeof(Beat));
  give(kgrc::kPortInput1, input1.data(), sizeof(Beat));
  give(kgrc::kPortShortcut, shortcut.data(), sizeof(Beat));
  give(kgrc::kPortOutput, output.data(), sizeof(Beat));
  give(kgrc::kPortWeights0, weights0.data(), sizeof(WeightBeat));
  give(kgrc::kPortWeights1, weights1.data(), sizeof(WeightBeat));
  give(kgrc::kPortTables, tables.data(), sizeof(Word64));
  give(kgrc::kPortItems, items.data(), sizeof(Word64));
  give(kgrc::kPortIndices, indices.data(), sizeof(Word64));
  give(kgrc::kPortScales, scales.data(), sizeof(Word64));
  give(kgrc::kPortStatus, status.data(), sizeof(Word64));
  if (const char* fault = kgrc_simulate(memory, bytes, digest, first, count)) {
    std::printf("%s\n", fault);
    return 1;
  }
#endif
  return 0;
}

// How many 64-bit words of a task's output differ; prints the first.
int compare_codes(const char* how, size_t task, const Wanted& wanted, const Maps& maps) {
  int wrong = 0;
  for (size_t i = 0; i < wanted.codes.size(); ++i) {
    const uint64_t found = uint64_t(word_at(maps, wanted.at + i));
    if (((found ^ wanted.codes[i]) & wanted.known[i]) == 0) continue;
    if (wrong++ == 0)
      std::printf("%s: task %zu: word %zu of its output is %016llx, not %016llx\n", how, task, i,
                  static_cast<unsigned long long>(found & wanted.known[i]),
                  static_cast<unsigned long long>(wanted.codes[i]));
  }
  return wrong;
}

int compare_status(const char* how, size_t task, const Wanted& wanted, const Tables& status) {
  int wrong = 0;
  for (int i = 0; i < kStatusWords; ++i) {
    const uint64_t found = uint64_t(status[task * kStatusWords + i]);
    if (found == wanted.status[i]) continue;
    // Clock cycles are counted in co-simulation only. A trip of the array takes one at least.
    if (i == kgrc::kStatusClocks && found >= wanted.status[kgrc::kStatusArray]) {
      std::printf("%s: task %zu: %llu clock cycles, %llu trips of the array\n", how, task,
                  static_cast<unsigned long long>(found),
                  static_cast<unsigned long long>(wanted.status[kgrc::kStatusArray]));
      continue;
    }
    ++wrong;
    std::printf("%s: task %zu: status word %d is %llu, not %llu\n", how, task, i,
                static_cast<unsigned long long>(found),
                static_cast<unsigned long long>(wanted.status[i]));
  }
  return wrong;
}

int compare_digest(const char* how, const Word64& digest) {
  if (uint64_t(digest) == kDigest) return 0;
  std::printf("%s: the digest is %016llx, not %016llx\n", how,
              static_cast<unsigned long long>(uint64_t(digest)), kDigest);
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::printf("usage: bench FILE [apart]\n");
    return 2;
  }
  const bool apart = argc > 2 && std::string(argv[2]) == "apart";
  Vectors vectors;
  if (!read_vectors(argv[1], &vectors)) return 2;
  const Maps first_maps = memory_of<Beat>(vectors.maps);
  Weights weights0 = memory_of<WeightBeat>(vectors.weights), weights1 = weights0;
  Tables tables = words_of(vectors.tables), items = tables, indices = tables, scales = tables;
  const int count = int(vectors.tasks.size());
  int wrong = 0;

  Maps maps = first_maps;
  for (int task = 0; task < count; ++task) {
    const Wanted& wanted = vectors.tasks[task];
    Maps input0 = maps, input1 = maps, shortcut = maps, output = maps;
    Tables status = words_of(Words());
    Word64 digest = 0;
    wrong += run(input0, input1, shortcut, output, weights0, weights1, tables, items, indices,
                 scales, status, &digest, task, 1);
    wrong += compare_codes("apart", task, wanted, output);
    wrong += compare_status("apart", task, wanted, status);
    wrong += compare_digest("apart", digest);
    // only the task's own output: co-simulation does not return the rest
    for (size_t i = wanted.at; i < wanted.at + wanted.codes.size(); ++i)
      set_word(&maps, i, word_at(output, i));
  }

  if (!apart) {
    maps = first_maps;
    Tables status = words_of(Words());
    Word64 digest = 0;
    wrong += run(maps, maps, maps, maps, weights0, weights0, tables, tables, tables, tables, status,
                 &digest, 0, count);
    for (int task = 0; task < count; ++task)
      wrong += compare_status("together", task, vectors.tasks[task], status);
    wrong += compare_codes("together", count - 1, vectors.tasks[count - 1], maps);
    wrong += compare_digest("together", digest);
  }

  std::printf("%d tasks, %d differences\n", count, wrong);
  return wrong ? 1 : 0;
}
