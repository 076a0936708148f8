// A memory bank with two ports.
//
// With KGRC_PORTS a simulation counts the accesses of every bank in each trip of a pipelined loop.
// Two faults are counted that II = 1 would not forgive: more than two accesses to a bank in a trip,
// and a read of a cell fewer than kDistance trips after it was written.
//
// With KGRC_LATE a cell that is written keeps its old value for kDistance trips, as long as a
// pipeline of II = 1 may let a write take where a DEPENDENCE pragma gives that distance.
#pragma once

#include "types.h"

#ifndef __SYNTHESIS__
#include <cstddef>
#include <cstdlib>
#include <deque>
#include <new>
#include <stdexcept>
#include <string>
#endif

namespace kgrc {

#if defined(KGRC_PORTS) || defined(KGRC_LATE)
extern long current_trip;  // of the pipelined loop that runs; counts on through all loops
#define KGRC_TRIP() (++current_trip)
#else
#define KGRC_TRIP() ((void)0)
#endif
#ifdef KGRC_PORTS
extern long port_conflicts;  // more than two accesses to a bank in a trip
extern long early_reads;     // reads fewer than kDistance trips after the write
#endif

template <class Value, int kDepth, int kDistance = 0>
class Ram {
 public:
  Value read(int address) {
#pragma HLS INLINE
    count_access();
    check_read(address);
    finish_writes();
    return cells[address];
  }
  void write(int address, const Value& value) {
#pragma HLS INLINE
    count_access();
    begin_write(address, value);
    note_write(address);
  }

 private:
  Value cells[kDepth];
#ifdef KGRC_LATE
  struct Write {
    long done;  // the first trip that sees it
    int address;
    Value value;
  };
  std::deque<Write> writes;
  void begin_write(int address, const Value& value) {
    finish_writes();
    writes.push_back(Write{current_trip + kDistance, address, value});
    finish_writes();
  }
  void finish_writes() {
    for (; !writes.empty() && writes.front().done <= current_trip; writes.pop_front())
      cells[writes.front().address] = writes.front().value;
  }
#else
  void begin_write(int address, const Value& value) {
#pragma HLS INLINE
    cells[address] = value;
  }
  void finish_writes() {}
#endif
#ifdef KGRC_PORTS
  long trip;
  int accesses;
  long written[kDepth];  // the trip of the last write, plus 1
  void check_read(int address) {
    if (written[address] > 0 && current_trip < written[address] - 1 + kDistance) ++early_reads;
  }
  void note_write(int address) { written[address] = current_trip + 1; }
  void count_access() {
    if (trip != current_trip) {
      trip = current_trip;
      accesses = 0;
    }
    if (++accesses == 3) ++port_conflicts;
  }
#else
  void count_access() {}
  void check_read(int) {}
  void note_write(int) {}
#endif
};

}  // namespace kgrc

#include "stream.h"
