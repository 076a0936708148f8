// A memory bank with two ports, and the streams between processes.
//
// With KGRC_PORTS a simulation counts the accesses of every bank in each trip of the pipelined
// loop around it, and remembers when there were more than two: then II = 1 would be a lie.
#pragma once

#include "types.h"

#ifndef __SYNTHESIS__
#include <cstddef>
#include <cstdlib>
#endif

namespace kgrc {

#ifdef KGRC_PORTS
extern long current_trip;    // of whichever pipelined loop is running
extern long port_conflicts;  // banks asked for more than two accesses in one trip
#define KGRC_TRIP() (++current_trip)
#else
#define KGRC_TRIP() ((void)0)
#endif

template <class Value, int kDepth>
class Ram {
 public:
  Value read(int address) {
#pragma HLS INLINE
    count();
    return cells[address];
  }
  void write(int address, const Value& value) {
#pragma HLS INLINE
    count();
    cells[address] = value;
  }

 private:
  Value cells[kDepth];
#ifdef KGRC_PORTS
  long trip;
  int accesses;
  void count() {
    if (trip != current_trip) {
      trip = current_trip;
      accesses = 0;
    }
    if (++accesses == 3) ++port_conflicts;
  }
#else
  void count() {}
#endif
};

#if defined(__SYNTHESIS__)

#include <hls_stream.h>
template <class Value> using Stream = hls::stream<Value>;

#else

// What a simulation needs of a stream: processes run one after the other, so that it must hold
// whatever one of them writes. Reading from an empty one ends the simulation: hardware would hang.
template <class Value>
class Stream {
 public:
  Stream() : cells(0), size(0), first(0), last(0) {}
  ~Stream() { std::free(cells); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void write(const Value& value) {
    if (last == size) grow();
    cells[last++] = value;
  }
  Value read() {
    if (first == last) std::abort();
    Value value = cells[first++];
    if (first == last) first = last = 0;
    return value;
  }
  bool empty() const { return first == last; }

 private:
  void grow() {
    size = size ? 2 * size : 256;
    void* moved = std::realloc(static_cast<void*>(cells), size * sizeof(Value));
    if (!moved) std::abort();
    cells = static_cast<Value*>(moved);
  }
  Value* cells;
  size_t size, first, last;
};

#endif

}  // namespace kgrc
