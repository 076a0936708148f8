// A memory bank with two ports.
//
// With KGRC_PORTS a simulation counts the accesses of every bank in each trip of a pipelined loop.
// Two faults are counted that II = 1 would not forgive: more than two accesses to a bank in a trip,
// and a read of a cell fewer than kDistance trips after it was written.
#pragma once

#include "types.h"

namespace kgrc {

#ifdef KGRC_PORTS
extern long current_trip;    // of the pipelined loop that runs; counts on through all loops
extern long port_conflicts;  // more than two accesses to a bank in a trip
extern long early_reads;     // reads fewer than kDistance trips after the write
#define KGRC_TRIP() (++current_trip)
#else
#define KGRC_TRIP() ((void)0)
#endif

template <class Value, int kDepth, int kDistance = 0>
class Ram {
 public:
  Value read(int address) {
#pragma HLS INLINE
    count_access();
    check_read(address);
    return cells[address];
  }
  void write(int address, const Value& value) {
#pragma HLS INLINE
    count_access();
    cells[address] = value;
    note_write(address);
  }

 private:
  Value cells[kDepth];
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
