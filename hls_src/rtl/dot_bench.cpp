// Compares dot.v with Dot of ../dot.h on random codes, many of them at the ends of their range.
// Clocks without a step and words that are not valid come in between. variants.h lists the
// instances of dot in the module `dots`, as VARIANTS(X) with X(bits, channels, packed); the ports
// of an instance have these three in their names.
//
//   Vdots SEED WORDS
#include <cstdio>
#include <deque>
#include <random>

#include "Vdots.h"
#include "bits.h"
#include "dot.h"
#include "variants.h"

namespace {

std::mt19937 rng;

int code(int bits, bool weight, int kind) {
  const int most = (1 << (bits - 1)) - 1, least = weight ? -most : -most - 1;
  switch (kind) {
    case 0: return least;
    case 1: return most;
    case 2: return rng() % 2 ? least : most;
    default: return least + int(rng() % unsigned(most - least + 1));
  }
}

template <int kBits, int kTn>
class Check {
 public:
  typedef kgrc::Dot<kBits, kTn> Dot;
  enum { kOutBits = 2 * kBits + 8, kLatency = (kTn < 8 ? kTn : 8) + 3 };

  // Codes for the next step; keeps the expected result.
  template <class Weights, class Inputs>
  void give(Weights& w, Inputs& x, unsigned char& valid) {
    kgrc::Int<kBits> weights[Dot::kWeights][kTn], inputs[Dot::kFeatures][kTn];
    Expected next;
    Bits w_bits, x_bits;
    for (auto& filter : weights) {
      const int kind = int(rng() % 6);
      for (auto& value : filter)
        w_bits.put(value = kgrc::Int<kBits>(code(kBits, true, kind)), kBits);
    }
    for (auto& place : inputs) {
      const int kind = int(rng() % 6);
      for (auto& value : place)
        x_bits.put(value = kgrc::Int<kBits>(code(kBits, false, kind)), kBits);
    }
    Dot::run(weights, inputs, next.out);
    next.valid = valid = rng() % 4 != 0;
    w_bits.show(w);
    x_bits.show(x);
    under_way.push_back(next);
  }

  // Whether the output after a step is the expected one of kLatency steps before.
  template <class Out>
  bool take(const Out& out, bool valid, const char* name) {
    if (under_way.size() < kLatency) return true;
    const Expected wanted = under_way.front();
    under_way.pop_front();
    bool same = valid == wanted.valid;
    if (!same) std::printf("%s: valid is %d\n", name, valid);
    for (int a = 0; a < Dot::kWeights && wanted.valid; ++a)
      for (int b = 0; b < Dot::kFeatures; ++b) {
        const long long found = field(out, (a * Dot::kFeatures + b) * kOutBits, kOutBits);
        if (found == (long long)(wanted.out[a][b])) continue;
        std::printf("%s: out[%d][%d] is %lld, not %lld\n", name, a, b, found,
                    (long long)(wanted.out[a][b]));
        same = false;
      }
    return same;
  }

 private:
  struct Expected {
    typename Dot::Out out[Dot::kWeights][Dot::kFeatures];
    bool valid;
  };
  std::deque<Expected> under_way;
};

}  // namespace

int main(int, char** given) {
  rng.seed(unsigned(std::atoi(given[1])));
  const int words = std::atoi(given[2]);
  Vdots top;
#define DECLARE(bits, tn, packed) Check<bits, tn> check_##bits##_##tn##_##packed;
  VARIANTS(DECLARE)
  for (int word = 0; word < words; ++word) {
#define GIVE(bits, tn, packed)                                        \
  check_##bits##_##tn##_##packed.give(top.w_##bits##_##tn##_##packed, \
                                      top.x_##bits##_##tn##_##packed, \
                                      top.valid_in_##bits##_##tn##_##packed);
    VARIANTS(GIVE)
    do {
      top.step = rng() % 4 != 0;
      top.clk = 0;
      top.eval();
      top.clk = 1;
      top.eval();
    } while (!top.step);
#define TAKE(bits, tn, packed)                                                     \
  if (!check_##bits##_##tn##_##packed.take(top.out_##bits##_##tn##_##packed,       \
                                           top.valid_out_##bits##_##tn##_##packed, \
                                           "dot " #bits " " #tn " " #packed))      \
    return 1;
    VARIANTS(TAKE)
  }
  return 0;
}
