/* Vectors in portable C, by the vector extension of gcc and clang. */

#include <string.h>

enum { LANES = 4, ROWS_MAX = 4 };

typedef int32_t vec __attribute__((vector_size(4 * LANES)));

static inline vec vec_load(const void *from) {
  vec v;
  memcpy(&v, from, sizeof v);
  return v;
}
static inline void vec_store(void *to, vec v) { memcpy(to, &v, sizeof v); }
static inline vec vec_all(int32_t value) { return (vec){0} + value; }
static inline vec vec_add(vec a, vec b) {
  typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
  return (vec)((bits)a + (bits)b); /* a signed sum must not wrap in C */
}
static inline vec vec_high(vec v) { return v >> 16; }
static inline vec vec_low(vec v) {
  typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
  return (vec)((bits)v << 16) >> 16;
}
/* The sum of two products of 16 bits. */
static inline vec vec_pairs(vec x, vec w) {
  return vec_low(x) * vec_low(w) + vec_high(x) * vec_high(w);
}
static inline vec vec_add_pairs(vec sums, vec x, vec w) { return vec_add(sums, vec_pairs(x, w)); }

/* Vectors of sums in registers, for each number of rows. */
/* Vectors of sums in registers for 1, 2, ... rows, and functions for so many. */
#define VECTORS {0, 4, 4, 2, 2}
#define SHAPES(X) UP_TO_4(X, 1) UP_TO_4(X, 2) UP_TO_2(X, 3) UP_TO_2(X, 4)
#define LONG_VECTORS {0, 2, 1, 1, 1}
#define LONG_SHAPES(X) UP_TO_2(X, 1) UP_TO_1(X, 2) UP_TO_1(X, 3) UP_TO_1(X, 4)

#define HAS_BYTES 0
#define SET_VECTORS 0
#define HAS_SCALE 0
