/* AVX-512 with VNNI: 16 lanes, and four products of a byte and a signed byte a lane. */

#include <immintrin.h>

enum { LANES = 16, ROWS_MAX = 8 };

typedef __m512i vec;

static inline vec vec_load(const void *from) { return _mm512_loadu_si512(from); }
static inline void vec_store(void *to, vec v) { _mm512_storeu_si512(to, v); }
static inline vec vec_all(int32_t value) { return _mm512_set1_epi32(value); }
static inline vec vec_add(vec a, vec b) { return _mm512_add_epi32(a, b); }
static inline vec vec_high(vec v) { return _mm512_srai_epi32(v, 16); }
static inline vec vec_pairs(vec x, vec w) { return _mm512_madd_epi16(x, w); }
static inline vec vec_add_pairs(vec sums, vec x, vec w) { return _mm512_dpwssd_epi32(sums, x, w); }
static inline vec vec_add_bytes(vec sums, vec x, vec w) { return _mm512_dpbusd_epi32(sums, x, w); }

/* Vectors of sums in registers for 1, 2, ... rows, and functions for so many. */
#define VECTORS {0, 8, 8, 8, 6, 4, 4, 3, 3}
#define SHAPES(X)          \
  UP_TO_8(X, 1) UP_TO_8(X, 2) UP_TO_8(X, 3) UP_TO_6(X, 4) \
  UP_TO_4(X, 5) UP_TO_4(X, 6) UP_TO_3(X, 7) UP_TO_3(X, 8)
#define LONG_VECTORS {0, 8, 6, 4, 3, 2, 2, 1, 1}
#define LONG_SHAPES(X)          \
  UP_TO_8(X, 1) UP_TO_6(X, 2) UP_TO_4(X, 3) UP_TO_3(X, 4) \
  UP_TO_2(X, 5) UP_TO_2(X, 6) UP_TO_1(X, 7) UP_TO_1(X, 8)

#define HAS_BYTES 1
#define SET_VECTORS 3
#define HAS_SCALE 1

static inline vec vec_min(vec a, vec b) { return _mm512_min_epi32(a, b); }
static inline vec vec_max(vec a, vec b) { return _mm512_max_epi32(a, b); }
static inline vec vec_and(vec a, vec b) { return _mm512_and_si512(a, b); }
static inline vec vec_or(vec a, vec b) { return _mm512_or_si512(a, b); }
static inline vec vec_multiply(vec a, vec b) { return _mm512_mullo_epi32(a, b); }
static inline vec vec_left(vec a, int by) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(by)); }
static inline vec vec_right(vec a, int by) { return _mm512_sra_epi32(a, _mm_cvtsi32_si128(by)); }

/* (a * mult + added) >> shift, which fits 32 bits; shift 0 to 62. Up to 32 the products of odd
   lanes are shifted to the left, so that these bits end where their lane is. Above, they are all
   in the upper half. */
static inline vec vec_scale(vec a, vec mult, int64_t added, int shift) {
  __m512i all = _mm512_set1_epi64(added);
  __m512i even = _mm512_add_epi64(_mm512_mul_epi32(a, mult), all);
  __m512i odd = _mm512_add_epi64(_mm512_mul_epi32(_mm512_srli_epi64(a, 32), mult), all);
  if (shift > 32) return vec_right(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd), shift - 32);
  even = _mm512_srl_epi64(even, _mm_cvtsi32_si128(shift));
  odd = _mm512_sll_epi64(odd, _mm_cvtsi32_si128(32 - shift));
  return _mm512_mask_blend_epi32(0xAAAA, even, odd);
}
