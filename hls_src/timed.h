// A simulation of time: the processes of a task run side by side, each with a clock of its own, and
// every stream has the depth of its STREAM pragma.
//
// The processes and streams form a Kahn process network: a process reads from a stream only by
// waiting for it. So the order in which a simulation takes the processes changes neither codes nor
// times, and no list of events is kept. A word in a stream carries the time from which on it can be
// read; a place in a stream carries the time from which on it is free. A process runs on until its
// partner at the other end of a stream has not been simulated far enough.
//
// The build (pynq_kgrc/backends/timed.py) puts into a copy of the sources what their pragmas say:
// set_depth() for STREAM, KGRC_LOOP for PIPELINE, start_process() for each call under DATAFLOW.
// Assumed, not shown by this: that a tool reaches each II, and the depths of the pipelines.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

namespace kgrc {

struct Process;
extern Process* running;  // null outside of the processes

// ---- pipelined loops ---------------------------------------------------------------------------

void trip();
// The processes' clock advances by II with each trip. ram.h has the one of other simulations.
#undef KGRC_TRIP
#define KGRC_TRIP() kgrc::trip()

// Around a pipelined loop: leaving it takes the depth of its pipeline. What a trip writes comes out
// that many cycles later; in a pipeline that does not flush, only as further trips push it out.
class LoopScope {
 public:
  LoopScope(int ii, bool flushes);
  ~LoopScope() noexcept(false);
  bool once() { return entered ? false : (entered = true); }

 private:
  bool entered;
  long began;  // trips of the process before it
};
#define KGRC_LOOP(ii, flushes) for (kgrc::LoopScope kgrc_scope((ii), (flushes)); kgrc_scope.once();)

// Cycles that a function takes beside its loops, by a setting: multiplications one after the other.
struct Setup {
  explicit Setup(const char* function);
  const char* function;
};
void spend(const Setup& setup);
#define KGRC_SPEND(function)                     \
  static const kgrc::Setup kgrc_setup(function); \
  kgrc::spend(kgrc_setup)

// ---- streams -----------------------------------------------------------------------------------

// The times of a stream. Words are numbered from 0 on. A process holds words that are still in its
// pipeline: `stored` counts those, too, `entered` those that are in the stream.
class StreamClock {
 public:
  explicit StreamClock(const char* name);
  ~StreamClock();
  StreamClock(const StreamClock&) = delete;
  StreamClock& operator=(const StreamClock&) = delete;
  void set_depth(int depth);
  void enter(double at);  // the next of the stored words, at this time or when there is room

 protected:
  size_t take();  // the number of the word that is read
  void give();    // the word that was stored last
  bool is_full() const { return stored - taken == ready.size(); }
  size_t stored, taken;
  std::vector<double> ready;  // of a word; as many as there are cells, a power of two

 private:
  friend class Network;
  const char* name;
  size_t depth, entered;
  std::vector<double> freed;  // the time from which on the place of a word is free
  Process *reader, *writer;   // that wait for it
  size_t counted, most;       // words whose entry `most` knows; the most words at a time
};

template <class Value>
class Stream : public StreamClock {
 public:
  explicit Stream(const char* name) : StreamClock(name), cells(ready.size()) {}
  void write(const Value& value) {
    if (is_full()) grow();
    cells[stored++ & (cells.size() - 1)] = value;
    give();
  }
  Value read() {
    const size_t number = take();
    return cells[number & (cells.size() - 1)];
  }

 private:
  void grow() {
    const size_t before = cells.size();
    std::vector<Value> more(2 * before);
    std::vector<double> times(2 * before);
    for (size_t i = taken; i < stored; ++i) {
      more[i & (2 * before - 1)] = cells[i & (before - 1)];
      times[i & (2 * before - 1)] = ready[i & (before - 1)];
    }
    cells.swap(more);
    ready.swap(times);
  }
  std::vector<Value> cells;
};

// ---- processes ---------------------------------------------------------------------------------

void start_process(const char* name, std::function<void()> body);
// Runs the processes that were started until all have ended. Throws std::runtime_error if they wait
// for each other, with the streams that they wait for, and what a process has thrown.
void run_processes();

}  // namespace kgrc
