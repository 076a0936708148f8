// The clocks of processes, streams and memory ports. Times are in clock cycles of the array.
#include "timed.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

namespace kgrc {

enum { kStackBytes = 1 << 20, kBuckets = 256 };

// ---- settings ----------------------------------------------------------------------------------

static std::map<std::string, double>& settings() {
  static std::map<std::string, double> values;
  return values;
}

static double setting(const std::string& name) {
  const auto found = settings().find(name);
  if (found == settings().end()) throw std::runtime_error("the setting " + name + " is missing");
  return found->second;
}

static double setting(const std::string& name, const std::string& otherwise) {
  return settings().count(name) ? setting(name) : setting(otherwise);
}

// ---- processes ---------------------------------------------------------------------------------

enum Reason { kEmpty, kFull, kPort, kReasons };

// Where the cycles of a process go, in buckets of equal width that grow with the task.
struct Timeline {
  double waits[kReasons][kBuckets];
};

struct Process {
  std::string name;
  std::function<void()> body;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::exception_ptr fault;
  bool done;

  double now;    // its clock
  double setup;  // cycles outside of pipelined loops
  long trips;
  int depth;  // of its pipelines
  bool in_loop, flushes;
  int ii, lag;  // a word comes out `lag` trips after the one that wrote it
  struct Late {
    StreamClock* stream;
    long due;  // the trip with which it comes out
  };
  std::deque<Late> inside;

  StreamClock* waits_for;
  Reason reason;
  std::map<std::pair<const char*, int>, double> waited;
  Timeline timeline;

  void wait(const char* what, Reason why, double until);
};

Process* running = nullptr;
struct Cancelled {};

// ---- memory ------------------------------------------------------------------------------------

// The memory behind all ports: so many bytes in each span of cycles, which holds many beats.
class Ddr {
 public:
  void clear(double bytes_a_cycle) {
    span = std::max(64.0, 4096 / bytes_a_cycle);
    room = span * bytes_a_cycle;
    used.clear();
    next.clear();
  }
  // When `bytes` are moved that a port could move at `at`.
  double move(double at, double bytes) {
    const size_t wanted = size_t(at / span);
    size_t bucket = free_from(wanted);
    while (used[bucket] > 0 && used[bucket] + bytes > room) {
      next[bucket] = bucket + 1;
      bucket = free_from(bucket + 1);
    }
    used[bucket] += bytes;
    return bucket == wanted ? at : double(bucket) * span;
  }

 private:
  size_t free_from(size_t bucket) {
    size_t found = bucket;
    for (;;) {
      if (found >= used.size()) {
        const size_t before = used.size();
        used.resize(std::max(found + 1, 2 * before), 0);
        next.resize(used.size());
        for (size_t i = before; i < next.size(); ++i) next[i] = i;
      }
      if (next[found] == found) break;
      found = next[found];
    }
    while (next[bucket] != found) {  // shorten the way for the next search
      const size_t after = next[bucket];
      next[bucket] = found;
      if (after == found) break;
      bucket = after;
    }
    return found;
  }
  double span, room;         // cycles; bytes
  std::vector<double> used;  // bytes
  std::vector<size_t> next;  // the next bucket that may have room
};

// One direction of a memory port. A request is cut into bursts; `outstanding` of them are under
// way at most. A burst that is read has room in the port's buffer until it is taken.
struct Direction {
  struct Burst {
    long left;         // beats
    double requested;  // time
    bool first, ends;  // first beat of it; it ends a request
  };
  std::deque<Burst> bursts;
  std::deque<double> ended;      // of the last `outstanding` bursts
  std::deque<double> buffered;   // when the last beats that were written went out
  std::deque<double> responses;  // when writes have ended
  int beat_bytes;
  double issued, last, arrives;
  long beats, requests;
  std::string name;
};

// ---- the network of a task ---------------------------------------------------------------------

class Network {
 public:
  std::vector<StreamClock*> streams;
  std::vector<std::unique_ptr<Process>> processes;
  std::deque<Process*> ready;
  ucontext_t home;
  Ddr ddr;
  std::map<int, Direction> ports;  // 2 * port + 1 for writes
  double bucket_cycles;
  double latency, port_bytes;
  bool flushes;
  size_t outstanding;
  long burst_beats;
  std::string report;

  void start(const char* name, std::function<void()> body);
  void run();
  void block(StreamClock& stream, Reason why);
  void wake(Process*& waiting) {
    if (!waiting) return;
    ready.push_back(waiting);
    waiting = nullptr;
  }
  void note(Process& process, Reason why, double from, double to);
  Direction& direction(int port, bool writes) { return ports[2 * port + (writes ? 1 : 0)]; }

 private:
  void resume(Process& process);
  void make_room(double to);
  void describe();
};

static Network& network() {
  static Network* const only = new Network();
  return *only;
}

void Process::wait(const char* what, Reason why, double until) {
  if (until <= now) return;
  waited[std::make_pair(what, int(why))] += until - now;
  network().note(*this, why, now, until);
  now = until;
}

// Makes the buckets so wide that they reach to a time.
void Network::make_room(double to) {
  while (to >= bucket_cycles * kBuckets) {
    bucket_cycles *= 2;
    for (auto& each : processes)
      for (auto& waits : each->timeline.waits)
        for (int i = 0; i < kBuckets; ++i)
          waits[i] = 2 * i + 1 < kBuckets ? waits[2 * i] + waits[2 * i + 1] : 0;
  }
}

void Network::note(Process& process, Reason why, double from, double to) {
  make_room(to);
  for (int i = int(from / bucket_cycles); from < to; ++i) {
    const double end = std::min(to, (i + 1) * bucket_cycles);
    process.timeline.waits[why][i] += end - from;
    from = end;
  }
}

static void enter_process() {
  Process* const process = running;
  try {
    process->body();
  } catch (const Cancelled&) {
  } catch (...) {
    process->fault = std::current_exception();
  }
  process->done = true;
  swapcontext(&process->context, &network().home);
}

void Network::start(const char* name, std::function<void()> body) {
  std::unique_ptr<Process> process(new Process());
  process->name = name;
  process->body = body;
  process->depth = int(setting(std::string("depth.") + name, "depth"));
  process->stack.reset(new char[kStackBytes]);
  getcontext(&process->context);
  process->context.uc_stack.ss_sp = process->stack.get();
  process->context.uc_stack.ss_size = kStackBytes;
  process->context.uc_link = &home;
  makecontext(&process->context, enter_process, 0);
  ready.push_back(process.get());
  processes.push_back(std::move(process));
}

void Network::resume(Process& process) {
  running = &process;
  swapcontext(&home, &process.context);
  running = nullptr;
}

// Waits until the other end of a stream has been simulated further.
void Network::block(StreamClock& stream, Reason why) {
  Process* const process = running;
  process->waits_for = &stream;
  process->reason = why;
  (why == kEmpty ? stream.reader : stream.writer) = process;
  swapcontext(&process->context, &home);
  process->waits_for = nullptr;
  if (process->done) throw Cancelled();
}

void Network::run() {
  latency = setting("latency");
  port_bytes = setting("port_bytes");
  flushes = setting("flush") != 0;
  outstanding = size_t(setting("outstanding"));
  burst_beats = long(setting("burst_beats"));
  ddr.clear(setting("ddr_bytes"));
  ports.clear();
  bucket_cycles = 1;
  std::exception_ptr fault;
  while (!ready.empty() && !fault) {
    Process* const process = ready.front();
    ready.pop_front();
    resume(*process);
    fault = process->fault;
  }
  std::string waiting;
  for (auto& process : processes) {
    if (process->done) continue;
    if (process->waits_for)
      waiting += (waiting.empty() ? "" : "; ") + process->name + " waits for " +
                 (process->reason == kEmpty ? "a word of " : "room in ") +
                 process->waits_for->name + " since cycle " + std::to_string(long(process->now));
  }
  describe();
  for (auto& process : processes)  // ends those that wait, so that they free what they hold
    if (!process->done) {
      process->done = true;
      if (process->waits_for) resume(*process);
    }
  ready.clear();
  processes.clear();
  if (fault) std::rethrow_exception(fault);
  if (!waiting.empty()) throw std::runtime_error("deadlock: " + waiting);
}

static std::string number(double value) {
  char text[40];
  snprintf(text, sizeof text, "%.17g", value);
  return text;
}

// Writes the report of a task: JSON, read by pynq_kgrc/backends/timed.py.
void Network::describe() {
  static const char* const kNames[kReasons] = {"empty", "full", "port"};
  double end = 0;
  for (auto& process : processes) end = std::max(end, process->now);
  make_room(end);
  report = "{\"cycles\":" + number(end) + ",\"bucket_cycles\":" + number(bucket_cycles) +
           ",\"processes\":[";
  const char* comma = "";
  for (auto& process : processes) {
    report += comma + std::string("{\"name\":\"") + process->name +
              "\",\"end\":" + number(process->now) + ",\"trips\":" + number(process->trips) +
              ",\"setup\":" + number(process->setup) + ",\"waits\":[";
    comma = "";
    for (auto& each : process->waited) {
      report += comma + std::string("{\"on\":\"") + each.first.first + "\",\"why\":\"" +
                kNames[each.first.second] + "\",\"cycles\":" + number(each.second) + "}";
      comma = ",";
    }
    report += "],\"timeline\":{";
    comma = "";
    for (int why = 0; why < kReasons; ++why) {
      report += comma + std::string("\"") + kNames[why] + "\":[";
      comma = "";
      for (int i = 0; i * bucket_cycles < end && i < kBuckets; ++i) {
        report += comma + number(process->timeline.waits[why][i]);
        comma = ",";
      }
      report += "]";
      comma = ",";
    }
    report += "}}";
  }
  report += "],\"streams\":[";
  comma = "";
  for (StreamClock* stream : streams) {
    report += comma + std::string("{\"name\":\"") + stream->name +
              "\",\"depth\":" + number(double(stream->depth)) +
              ",\"words\":" + number(double(stream->taken)) +
              ",\"most\":" + number(double(stream->most)) + "}";
    comma = ",";
  }
  report += "],\"ports\":[";
  comma = "";
  for (auto& each : ports) {
    report += comma + std::string("{\"number\":") + number(each.first / 2) +
              ",\"writes\":" + (each.first % 2 ? "true" : "false") +
              ",\"beats\":" + number(double(each.second.beats)) +
              ",\"beat_bytes\":" + number(each.second.beat_bytes) +
              ",\"requests\":" + number(double(each.second.requests)) + "}";
    comma = ",";
  }
  report += "]}";
}

void start_process(const char* name, std::function<void()> body) { network().start(name, body); }
void run_processes() { network().run(); }

// ---- pipelined loops ---------------------------------------------------------------------------

LoopScope::LoopScope(int ii, bool flushes) : entered(false), began(0) {
  if (!running) return;
  began = running->trips;
  running->in_loop = true;
  running->flushes = flushes || network().flushes;
  running->ii = ii;
  running->lag = (running->depth + ii - 1) / ii;
}

LoopScope::~LoopScope() noexcept(false) {
  if (!running || std::uncaught_exception()) return;
  Process& p = *running;
  p.in_loop = false;
  const long last = p.trips;
  if (last == began) return;
  long pushed = last;  // the trip up to which the pipeline has moved on
  while (!p.inside.empty()) {
    const Process::Late late = p.inside.front();
    p.inside.pop_front();
    p.now += double(late.due - pushed) * p.ii;
    pushed = late.due;
    late.stream->enter(p.now);
  }
  p.now += double(p.lag - (pushed - last)) * p.ii;
}

void trip() {
  if (!running) return;
  Process& p = *running;
  p.now += p.ii;
  ++p.trips;
  while (!p.inside.empty() && p.inside.front().due <= p.trips) {
    StreamClock* const stream = p.inside.front().stream;
    p.inside.pop_front();
    stream->enter(p.now);
  }
}

Setup::Setup(const char* function) : function(function) {}

void spend(const Setup& setup) {
  if (!running) return;
  const double cycles = setting(std::string("setup.") + setup.function);
  running->now += cycles;
  running->setup += cycles;
}

// ---- streams -----------------------------------------------------------------------------------

StreamClock::StreamClock(const char* name)
    : stored(0),
      taken(0),
      ready(16),
      name(name),
      depth(0),
      entered(0),
      reader(nullptr),
      writer(nullptr),
      counted(0),
      most(0) {
  network().streams.push_back(this);
}

StreamClock::~StreamClock() {
  auto& all = network().streams;
  all.erase(std::remove(all.begin(), all.end(), this), all.end());
}

void StreamClock::set_depth(int given) {
  const std::string chosen = std::string("stream.") + name;
  depth = settings().count(chosen) ? size_t(setting(chosen)) : size_t(given);
  freed.assign(depth, 0);
}

void StreamClock::give() {
  if (!running || depth == 0)
    throw std::runtime_error("the stream " + std::string(name) +
                             " has no depth, or is written outside of a process");
  Process& p = *running;
  if (!p.in_loop || p.lag == 0) enter(p.now);
  else if (p.flushes) enter(p.now + double(p.lag) * p.ii);
  else p.inside.push_back(Process::Late{this, p.trips + p.lag});
}

void StreamClock::enter(double at) {
  Process& p = *running;
  while (entered - taken >= depth) network().block(*this, kFull);
  if (entered >= depth) {
    const double room = freed[entered % depth];
    if (room > at) {
      p.wait(name, kFull, p.now + room - at);
      at = room;
    }
  }
  ready[entered & (ready.size() - 1)] = at + 1;
  ++entered;
  if (taken > 0 && freed[(taken - 1) % depth] - 1 > at) {  // reads after `at` are known already
    size_t left = taken;
    while (left > 0 && entered - left < depth && freed[(left - 1) % depth] - 1 > at) --left;
    most = std::max(most, entered - left);
    counted = entered;
  }
  network().wake(reader);
}

size_t StreamClock::take() {
  if (!running) throw std::runtime_error("a stream is read outside of a process");
  Process& p = *running;
  while (taken == entered) network().block(*this, kEmpty);
  p.wait(name, kEmpty, ready[taken & (ready.size() - 1)]);
  freed[taken % depth] = p.now + 1;
  for (; counted < entered && ready[counted & (ready.size() - 1)] - 1 < p.now; ++counted)
    most = std::max(most, counted + 1 - taken);
  const size_t number = taken++;
  network().wake(writer);
  return number;
}

// ---- memory ports (port.h) ---------------------------------------------------------------------

void port_requested(int port, long beats, int beat_bytes, bool writes) {
  if (!running) return;
  Network& net = network();
  Direction& side = net.direction(port, writes);
  if (side.name.empty()) side.name = std::to_string(port);
  side.beat_bytes = beat_bytes;
  ++side.requests;
  for (; beats > 0; beats -= net.burst_beats)
    side.bursts.push_back(Direction::Burst{std::min(beats, net.burst_beats), running->now, true,
                                           beats <= net.burst_beats});
}

void port_moved(int port, bool writes) {
  if (!running) return;
  Network& net = network();
  Process& p = *running;
  Direction& side = net.direction(port, writes);
  Direction::Burst& burst = side.bursts.front();
  if (burst.first) {
    burst.first = false;
    double issue = std::max(burst.requested, side.issued + 1);
    if (side.ended.size() >= net.outstanding) {
      issue = std::max(issue, side.ended.front());
      side.ended.pop_front();
    }
    side.issued = issue;
    side.arrives = issue + (writes ? 0 : net.latency);
  }
  ++side.beats;
  double at = std::max(side.last + side.beat_bytes / net.port_bytes, side.arrives);
  if (writes) at = std::max(at, p.now);
  at = net.ddr.move(at, side.beat_bytes);
  side.last = at;
  if (writes) {
    side.buffered.push_back(at);
    if (side.buffered.size() > size_t(net.burst_beats)) {
      p.wait(side.name.c_str(), kPort, side.buffered.front());
      side.buffered.pop_front();
    }
  } else {
    p.wait(side.name.c_str(), kPort, at);
  }
  if (--burst.left > 0) return;
  side.ended.push_back(writes ? at + net.latency : p.now);
  if (writes && burst.ends) side.responses.push_back(at + net.latency);
  side.bursts.pop_front();
}

void port_responded(int port) {
  if (!running) return;
  Direction& side = network().direction(port, true);
  running->wait(side.name.c_str(), kPort, side.responses.front());
  side.responses.pop_front();
}

}  // namespace kgrc

extern "C" void kgrc_timed_set(const char* name, double value) { kgrc::settings()[name] = value; }
extern "C" void kgrc_timed_clear() { kgrc::settings().clear(); }
// What the last task did, as JSON.
extern "C" const char* kgrc_timed_report() { return kgrc::network().report.c_str(); }
