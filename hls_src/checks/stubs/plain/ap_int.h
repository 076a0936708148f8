// A stand-in for the vendor's header, beside KGRC_PLAIN: the wide integer of a memory port. Whole 64-bit
// words of it can be reached.
#pragma once

#include <cstdint>

template <int kBits>
struct ap_uint {
  uint64_t word64[(kBits + 63) / 64];
  uint64_t& range(int, int low) { return word64[low / 64]; }
  uint64_t range(int, int low) const { return word64[low / 64]; }
};
