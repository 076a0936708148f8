// Two sets of number types: the arbitrary-precision integers of Vitis HLS, and with KGRC_PLAIN
// those of <cstdint>, for a simulation that is some 60 times faster. Both must give the same codes
// (host_tests/test_csim.py). The constructor of ap_int does not initialize the value: after
// `T x = T()` x need not be zero, so that zeros are always assigned.
#pragma once

#include <cstdint>

#ifdef KGRC_PLAIN

namespace kgrc {

template <bool kCondition, class Then, class Else>
struct Select {
  typedef Then type;
};
template <class Then, class Else>
struct Select<false, Then, Else> {
  typedef Else type;
};

// The smallest plain integer of at least kBits bits.
template <int kBits>
struct Plain {
  static_assert(kBits >= 1 && kBits <= 64, "a plain integer has 1 to 64 bits");
  typedef typename Select<
      (kBits <= 8), int8_t,
      typename Select<(kBits <= 16), int16_t,
                      typename Select<(kBits <= 32), int32_t, int64_t>::type>::type>::type Signed;
  typedef typename Select<
      (kBits <= 8), uint8_t,
      typename Select<(kBits <= 16), uint16_t,
                      typename Select<(kBits <= 32), uint32_t, uint64_t>::type>::type>::type
      Unsigned;
};
template <int kBits>
using Int = typename Plain<kBits>::Signed;
template <int kBits>
using UInt = typename Plain<kBits>::Unsigned;

}  // namespace kgrc

#else

#include <ap_int.h>

namespace kgrc {
template <int kBits>
using Int = ap_int<kBits>;
template <int kBits>
using UInt = ap_uint<kBits>;
}  // namespace kgrc

#endif
