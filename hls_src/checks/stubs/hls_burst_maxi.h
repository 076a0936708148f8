// A stand-in for the vendor's header: requests and data of a memory port are calls that stay in the
// LLVM IR.
#pragma once

#include <ap_int.h>

#include <cstddef>

extern "C" void kgrc_port_request(const void* port, int kind, long offset, long length);
extern "C" int kgrc_port_read(const void* port, int word);
extern "C" void kgrc_port_write(const void* port, int word, int value);

namespace hls {

template <class Value>
class burst_maxi {
 public:
  burst_maxi(Value* of) : memory(of) {}

  void read_request(size_t offset, size_t length) {
    kgrc_port_request(memory, 0, long(offset), long(length));
  }
  __attribute__((always_inline)) Value read() {
    Words words;
    for (int i = 0; i < kWords; ++i) words.of[i] = kgrc_port_read(memory, i);
    return words.value;
  }
  void write_request(size_t offset, size_t length) {
    kgrc_port_request(memory, 1, long(offset), long(length));
  }
  __attribute__((always_inline)) void write(const Value& value) {
    Words words;
    words.value = value;
    for (int i = 0; i < kWords; ++i) kgrc_port_write(memory, i, words.of[i]);
  }
  void write_response() { kgrc_port_request(memory, 2, 0, 0); }

 private:
  enum { kWords = (sizeof(Value) + 3) / 4 };
  union Words {
    Value value;
    int of[kWords];
    __attribute__((always_inline)) Words() {
      for (int i = 0; i < kWords; ++i) of[i] = 0;
    }
  };
  Value* memory;
};

}  // namespace hls
