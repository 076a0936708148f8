// Words of any width, as the ports of a Verilator model have them.
#pragma once

#include <verilated.h>

#include <cstdlib>
#include <vector>

// A word that is built from its lowest bits up.
class Bits {
 public:
  void put(long long value, int width) {
    for (int i = 0; i < width; ++i, ++size) {
      if (size % 32 == 0) words.push_back(0);
      words.back() |= unsigned(value >> i & 1) << (size % 32);
    }
  }
  template <size_t kWords>
  void show(VlWide<kWords>& port) const {
    if (words.size() != kWords) std::abort();
    for (size_t i = 0; i < kWords; ++i) port[i] = words[i];
  }
  template <class Port>
  void show(Port& port) const {
    unsigned long long value = 0;
    for (size_t i = 0; i < words.size(); ++i) value |= (unsigned long long)(words[i]) << (32 * i);
    port = Port(value);
  }

 private:
  std::vector<unsigned> words;
  int size = 0;
};

// A signed field of a word.
template <size_t kWords>
long long field(const VlWide<kWords>& port, int at, int width) {
  unsigned long long value = 0;
  for (int i = 0; i < width; ++i)
    value |= (unsigned long long)(port[(at + i) / 32] >> ((at + i) % 32) & 1) << i;
  return (long long)(value << (64 - width)) >> (64 - width);
}
template <class Port>
long long field(const Port& port, int at, int width) {
  return (long long)((unsigned long long)(port) << (64 - at - width)) >> (64 - width);
}
