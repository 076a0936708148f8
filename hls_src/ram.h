// A memory bank with two ports, and the streams between processes.
//
// With KGRC_PORTS a simulation counts the accesses of every bank in each trip of the pipelined
// loop around it, and remembers when there were more than two: then II = 1 would be a lie. So would
// it be if a cell were read fewer than kDistance trips after it was written; that is counted too.
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
extern long early_reads;     // cells read before what was written to them can be there
#define KGRC_TRIP() (++current_trip)
#else
#define KGRC_TRIP() ((void)0)
#endif

template <class Value, int kDepth, int kDistance = 0>
class Ram {
 public:
  Value read(int address) {
#pragma HLS INLINE
    count();
    look(address);
    return cells[address];
  }
  void write(int address, const Value& value) {
#pragma HLS INLINE
    count();
    cells[address] = value;
    note(address);
  }

 private:
  Value cells[kDepth];
#ifdef KGRC_PORTS
  long trip;
  int accesses;
  long written[kDepth];  // the trip after it
  void look(int address) {
    if (written[address] > 0 && current_trip < written[address] - 1 + kDistance) ++early_reads;
  }
  void note(int address) { written[address] = current_trip + 1; }
  void count() {
    if (trip != current_trip) {
      trip = current_trip;
      accesses = 0;
    }
    if (++accesses == 3) ++port_conflicts;
  }
#else
  void count() {}
  void look(int) {}
  void note(int) {}
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
