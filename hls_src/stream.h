// The streams between processes: FIFOs of the hardware in synthesis; in a C-simulation, which runs
// the processes one after the other, FIFOs without a bound; with KGRC_TIMED (timed.h) FIFOs of the
// depth of their STREAM pragma, between processes that run side by side.
#pragma once

#if defined(__SYNTHESIS__)

#include <hls_stream.h>
namespace kgrc {
template <class Value>
using Stream = hls::stream<Value>;
}  // namespace kgrc

#elif defined(KGRC_TIMED)

#include "timed.h"

#else

#include <cstddef>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

namespace kgrc {

// A FIFO without a bound: a simulation runs the processes one after the other, so that a stream
// has to hold all that its writer writes.
template <class Value>
class Stream {
 public:
  explicit Stream(const char* name) : name(name), cells(0), size(0), first(0), last(0) {}
  ~Stream() { std::free(cells); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void write(const Value& value) {
    if (last == size) grow();
    cells[last++] = value;
  }
  // Throws std::runtime_error if the stream is empty: hardware would wait for ever.
  Value read() {
    if (first == last) fail();
    Value value = cells[first++];
    if (first == last) first = last = 0;
    return value;
  }
  bool empty() const { return first == last; }

 private:
  [[noreturn]] void fail() const {
    throw std::runtime_error("the stream " + std::string(name) +
                             " is empty where it is read; hardware would hang");
  }
  void grow() {
    size = size ? 2 * size : 256;
    void* moved = std::realloc(static_cast<void*>(cells), size * sizeof(Value));
    if (!moved) throw std::bad_alloc();
    cells = static_cast<Value*>(moved);
  }
  const char* name;
  Value* cells;
  size_t size, first, last;
};

}  // namespace kgrc

#endif
