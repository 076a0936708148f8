// A stand-in for the vendor's header: each access to a FIFO is a call that stays in the LLVM IR.
// The words of a value are 32 bits apart, so that each field comes from one call.
#pragma once

extern "C" int kgrc_fifo_read(const void* stream, int word);
extern "C" void kgrc_fifo_write(const void* stream, int word, int value);

namespace hls {

template <class Value>
class stream {
 public:
  stream() : tag(0) {}
  explicit stream(const char*) : tag(0) {}

  __attribute__((always_inline)) Value read() {
    Words words;
    for (int i = 0; i < kWords; ++i) words.of[i] = kgrc_fifo_read(this, i);
    return words.value;
  }
  __attribute__((always_inline)) void read(Value& value) { value = read(); }
  __attribute__((always_inline)) void write(const Value& value) {
    Words words;
    words.value = value;
    for (int i = 0; i < kWords; ++i) kgrc_fifo_write(this, i, words.of[i]);
  }
  bool empty() const { return kgrc_fifo_read(this, -1) != 0; }
  bool full() const { return kgrc_fifo_read(this, -2) != 0; }
  bool read_nb(Value& value) {
    if (empty()) return false;
    value = read();
    return true;
  }

 private:
  enum { kWords = (sizeof(Value) + 3) / 4 };
  union Words {
    Value value;
    int of[kWords];
    __attribute__((always_inline)) Words() {
      for (int i = 0; i < kWords; ++i) of[i] = 0;
    }
  };
  int tag;
};

}  // namespace hls
