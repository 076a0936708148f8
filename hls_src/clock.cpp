// The clock cycles of a task: a counter that runs beside the processes that do the work.
#include "design.h"

namespace kgrc {

// Counts clock cycles until write_output has handed on its last beat. A counter cannot wait for its
// token as the other processes wait for words: `done` is the only stream that is polled.
void count_clocks(Stream<bool>& done, long& clocks) {
#ifdef __SYNTHESIS__
  long count = 0;
  bool ended = false, token;
clocks:
  while (!ended) {
    // II = 1: one trip a clock cycle, whether or not there is a token. A trip carries an add, and
    // whether the stream has a token.
#pragma HLS PIPELINE II = 1
    ended = done.read_nb(token);
    ++count;
  }
  clocks = count;
#else
  done.read();
  clocks = 0;  // the C-simulation runs one process after the other: it has no clock
#endif
}

}  // namespace kgrc
