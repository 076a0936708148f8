/* AVX2: 8 lanes. Codes of 8 bits are multiplied as pairs of 16 bits, because the byte instruction
   of AVX2 saturates. */

#include <immintrin.h>

enum { LANES = 8, ROWS_MAX = 4 };

typedef __m256i vec;

static inline vec vec_load(const void *from) { return _mm256_loadu_si256(from); }
static inline void vec_store(void *to, vec v) { _mm256_storeu_si256(to, v); }
static inline vec vec_all(int32_t value) { return _mm256_set1_epi32(value); }
static inline vec vec_add(vec a, vec b) { return _mm256_add_epi32(a, b); }
static inline vec vec_high(vec v) { return _mm256_srai_epi32(v, 16); }
static inline vec vec_pairs(vec x, vec w) { return _mm256_madd_epi16(x, w); }
static inline vec vec_add_pairs(vec sums, vec x, vec w) { return vec_add(sums, vec_pairs(x, w)); }

/* Vectors of sums in registers for 1, 2, ... rows, and functions for so many. */
#define VECTORS {0, 8, 6, 4, 3}
#define SHAPES(X) UP_TO_8(X, 1) UP_TO_6(X, 2) UP_TO_4(X, 3) UP_TO_3(X, 4)
#define LONG_VECTORS {0, 4, 3, 2, 1}
#define LONG_SHAPES(X) UP_TO_4(X, 1) UP_TO_3(X, 2) UP_TO_2(X, 3) UP_TO_1(X, 4)

#define HAS_BYTES 0
#define SET_VECTORS 0
#define HAS_SCALE 1

static inline vec vec_min(vec a, vec b) { return _mm256_min_epi32(a, b); }
static inline vec vec_max(vec a, vec b) { return _mm256_max_epi32(a, b); }
static inline vec vec_and(vec a, vec b) { return _mm256_and_si256(a, b); }
static inline vec vec_or(vec a, vec b) { return _mm256_or_si256(a, b); }
static inline vec vec_multiply(vec a, vec b) { return _mm256_mullo_epi32(a, b); }
static inline vec vec_left(vec a, int by) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(by)); }
static inline vec vec_right(vec a, int by) { return _mm256_sra_epi32(a, _mm_cvtsi32_si128(by)); }

/* (a * mult + added) >> shift, which fits 32 bits; shift 0 to 62. Up to 32 the products of odd
   lanes are shifted to the left, so that these bits end where their lane is. Above, they are all
   in the upper half. */
static inline vec vec_scale(vec a, vec mult, int64_t added, int shift) {
  __m256i all = _mm256_set1_epi64x(added);
  __m256i even = _mm256_add_epi64(_mm256_mul_epi32(a, mult), all);
  __m256i odd = _mm256_add_epi64(_mm256_mul_epi32(_mm256_srli_epi64(a, 32), mult), all);
  if (shift > 32) return vec_right(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA), shift - 32);
  even = _mm256_srl_epi64(even, _mm_cvtsi32_si128(shift));
  odd = _mm256_sll_epi64(odd, _mm_cvtsi32_si128(32 - shift));
  return _mm256_blend_epi32(even, odd, 0xAA);
}
