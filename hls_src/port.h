// A memory port: runs of neighbouring beats are requested, and their beats come later, in order.
//
// For Vitis HLS a port is hls::burst_maxi (UG1399, "Using Manual Burst"), which moves one wide
// integer a beat. For every other compiler it is the class below, with the same calls. It checks
// what hardware would not forgive, and throws std::runtime_error: a beat that was not requested, a
// request of no beats or past the end of the memory, more than kRequestsAhead requests at a time,
// and requests that are left at the end. A kernel's argument and a process take a port by value.
#pragma once

#include <config.h>

#include "types.h"

#if defined(__SYNTHESIS__) || defined(KGRC_VITIS)
#include <hls_burst_maxi.h>
#else
#include <cstddef>
#include <deque>
#include <stdexcept>
#include <string>
#endif

namespace kgrc {

typedef UInt<64> Word64;

// What a port moves at once.
template <int kCount>
struct Words {
  static_assert(kCount >= 1 && kCount <= 16 && (kCount & (kCount - 1)) == 0,
                "a memory port is a power of two bits wide, and 1024 bits at most");
  Word64 word64[kCount];
};

#if defined(__SYNTHESIS__) || defined(KGRC_VITIS)

// The type of a beat on the wires, and its conversion.
template <class Value>
struct Raw {
  typedef Value Type;
  static Value unpack(const Type& raw) { return raw; }
  static Type pack(const Value& value) { return value; }
};
template <int kCount>
struct Raw<Words<kCount>> {
  typedef ap_uint<64 * kCount> Type;
  static Words<kCount> unpack(const Type& raw) {
#pragma HLS INLINE
    Words<kCount> value;
    for (int i = 0; i < kCount; ++i) {
#pragma HLS UNROLL
      value.word64[i] = raw.range(64 * i + 63, 64 * i);
    }
    return value;
  }
  static Type pack(const Words<kCount>& value) {
#pragma HLS INLINE
    Type raw;
    for (int i = 0; i < kCount; ++i) {
#pragma HLS UNROLL
      raw.range(64 * i + 63, 64 * i) = value.word64[i];
    }
    return raw;
  }
};

template <class Value>
using MemoryPort = hls::burst_maxi<typename Raw<Value>::Type>;

#else

template <class Value>
struct Raw {
  typedef Value Type;
  static const Value& unpack(const Type& raw) { return raw; }
  static const Type& pack(const Value& value) { return value; }
};

// A simulation of time defines these: when a request is made, when each of its beats is taken or
// given, when a write has ended. Each may let the calling process wait.
#ifdef KGRC_TIMED
void port_requested(int port, long beats, int beat_bytes, bool writes);
void port_moved(int port, bool writes);
void port_responded(int port);
#else
inline void port_requested(int, long, int, bool) {}
inline void port_moved(int, bool) {}
inline void port_responded(int) {}
#endif

// The requests of a port, shared by its copies.
class Requests {
 public:
  Requests(int port, const char* name, size_t beats)
      : port(port), name(name), beats(beats), responses(0) {}

  void request(bool writes, size_t first, size_t count, int beat_bytes) {
    std::deque<Open>& queue = writes ? to_write : to_read;
    if (count == 0) fail("a request of no beats");
    if (first > beats || count > beats - first)
      fail("a request of " + std::to_string(count) + " beats from beat " + std::to_string(first) +
           " on passes the end of its memory of " + std::to_string(beats) + " beats");
    if (queue.size() + (writes ? responses : 0) == kRequestsAhead)
      fail("more than " + std::to_string(kRequestsAhead) + " requests at a time");
    queue.push_back(Open{first, count});
    port_requested(port, long(count), beat_bytes, writes);
  }
  // The place of the next beat.
  size_t move(bool writes) {
    std::deque<Open>& queue = writes ? to_write : to_read;
    if (queue.empty()) fail(writes ? "written without a request" : "read without a request");
    Open& open = queue.front();
    const size_t place = open.next++;
    if (--open.left == 0) {
      queue.pop_front();
      if (writes) ++responses;
    }
    port_moved(port, writes);
    return place;
  }
  void respond() {
    if (responses == 0) fail("no write has ended of which a response could tell");
    --responses;
    port_responded(port);
  }
  void check_idle() const {
    if (!to_read.empty()) fail("requested beats were not read");
    if (!to_write.empty()) fail("requested beats were not written");
    if (responses) fail("responses to writes were not taken");
  }

 private:
  struct Open {
    size_t next, left;
  };
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("the port " + std::string(name) + ": " + what);
  }
  int port;
  const char* name;
  size_t beats, responses;
  std::deque<Open> to_read, to_write;
};

template <class Value>
class MemoryPort {
 public:
  MemoryPort(Value* memory, Requests* requests) : memory(memory), requests(requests) {}
  void read_request(size_t first, size_t count) {
    requests->request(false, first, count, sizeof(Value));
  }
  Value read() { return memory[requests->move(false)]; }
  void write_request(size_t first, size_t count) {
    requests->request(true, first, count, sizeof(Value));
  }
  void write(const Value& value) { memory[requests->move(true)] = value; }
  // Waits until the oldest write is in memory.
  void write_response() { requests->respond(); }

 private:
  Value* memory;
  Requests* requests;
};

// A port of a simulation: the memory of port number `port`, and its requests.
template <class Value>
class SimulatedPort {
 public:
  SimulatedPort(const char* name, int port, void* const* memory, const uint64_t* bytes)
      : memory(static_cast<Value*>(memory[port])),
        requests(port, name, size_t(bytes[port] / sizeof(Value))) {}
  MemoryPort<Value> port() { return MemoryPort<Value>(memory, &requests); }
  void check_idle() const { requests.check_idle(); }

 private:
  Value* memory;
  Requests requests;
};

#endif

}  // namespace kgrc
