/* What the kernels and Python share: the tasks of a program, laid out for one set of vector
   instructions. layout.py fills these structures; the order of the fields is the same there.

   A map is stored in quads: [ceil(C / 4)][D * H * W][4] codes, of 1 or 2 bytes. */

#ifndef KGRC_NATIVE_H
#define KGRC_NATIVE_H

#include <stdint.h>

enum { BLOCK = 8, QUAD = 4 };
/* Filters that are computed together, and channels of a quad. */

struct scaling {
  const int64_t *bias;  /* [filters in whole blocks] */
  const int32_t *mult;  /* the same */
  const int32_t *shift; /* the same */
  int32_t zero, lo, hi;
  int32_t has_shortcut, shortcut_zero, shortcut_mult, shortcut_shift;
  int32_t out_bytes; /* of a code of the output */
};

/* The input of a convolution, copied with its padding into a workspace of 4-byte elements: 4 codes
   as unsigned bytes, or 2 codes of 16 bits. Along an axis of stride s the input is split into s
   phases, so that neighbouring outputs read neighbouring elements:
   [plane][phase D][phase H][phase W][length D][length H][length W]. */
struct padded {
  const uint8_t *source;
  uint8_t *elements;
  int32_t code_bytes; /* of a code of the source */
  int32_t pairs;      /* 1: two codes of 16 bits in an element; 0: four unsigned bytes */
  int32_t quads;
  int32_t padding; /* an element of the padding */
  int32_t size[3], stride[3], lead[3], length[3];
  int64_t tail; /* elements of padding behind the last plane */
};

/* A convolution whose vectors hold neighbouring outputs. The outputs of a region have positions in
   the padded input; those between the end of a row and the next row are computed, then dropped.
   Or the elements of a region are gathered first, a row for each plane and tap: then only outputs
   are computed, and the loads are aligned. */
struct convolution {
  struct padded in;
  struct scaling scaling;
  uint8_t *target;
  const uint8_t *shortcut; /* a map of the size `whole` */
  int32_t filters, blocks, blocks_per_job;
  int32_t out[3], pool[3]; /* outputs in whole windows of the pool, and its window */
  int32_t whole[3];        /* size of the map of the shortcut */
  int32_t region_rows;     /* rows of outputs of a job, a multiple of pool[1] */
  int32_t tile;            /* positions whose sums are held at a time: whole vectors */
  int32_t long_sums;       /* 1: sums of 64 bits */
  int32_t height;          /* outputs of one depth along the height: `out` counts all depths' rows */
  int32_t gathered;        /* rows of elements that are gathered for a region; 0: none */
  int32_t gather_pitch;    /* elements of such a row, whole vectors */
  const int32_t *gather;   /* [gathered]: what is gathered, in elements from the output's position */
  /* A block has calls; a call has rows (filters of the block) and steps. A step adds the products
     of one element, `offset` elements from the output's position, with a weight for each row. */
  const int32_t *block_calls; /* [blocks + 1]: the first call of each block */
  const int64_t *call_steps;  /* [calls + 1]: the first step of each call */
  const int64_t *call_weights; /* [calls]: where its weights start */
  const uint8_t *call_rows;   /* [calls][1 + BLOCK]: their number, and which */
  const uint8_t *call_sets;   /* [calls]: bit r: row r is one of them; NULL: not all have 4 rows */
  const int32_t *offsets;     /* [steps] */
  const int32_t *weights;     /* for each step of each call: one of 4 bytes for each row */
};

/* A fully connected layer: each filter's weights lie in the order of the map. */
struct connected {
  const uint8_t *source;
  uint8_t *operand; /* [length] unsigned bytes, or codes of 16 bits */
  struct scaling scaling;
  uint8_t *target;
  const uint8_t *shortcut;
  const uint8_t *weights; /* [filters in whole blocks][length] of 1 or 2 bytes */
  int64_t count;          /* codes of the source, whole quads */
  int64_t length;         /* count, rounded up to whole vectors */
  int32_t filters, code_bytes;
};

struct pool {
  const uint8_t *source;
  uint8_t *target;
  int32_t quads, code_bytes, out_bytes, average;
  int32_t size[3], out[3], kernel[3], stride[3], lead[3];
  int32_t in_zero, zero, lo, hi, mult, shift, rescales;
};

/* What one set of vector instructions offers. A worker's scratch is its own memory. */
struct instructions {
  void (*pad)(const struct padded *, long job);
  void (*convolve)(const struct convolution *, long job, uint8_t *scratch);
  void (*spread)(const struct connected *, long job);
  void (*connect)(const struct connected *, long job);
  void (*pool)(const struct pool *, long job, uint8_t *scratch);
  int32_t lanes;
  int32_t bytes; /* 1: elements of 8 and 4 bits are four unsigned bytes; 0: pairs of 16 bits */
  int32_t vectors[BLOCK + 1];      /* vectors of sums in registers, by rows; 0: too many rows */
  int32_t long_vectors[BLOCK + 1]; /* the same for sums of 64 bits */
  int32_t set_vectors;             /* vectors of the sums of all 8 rows, if it adds sets; else 0 */
};

/* The sets of 4 of 8 rows, as bits. */
#define FOUR_OF_EIGHT(X) \
  X(15) X(23) X(27) X(29) X(30) X(39) X(43) X(45) X(46) X(51) \
  X(53) X(54) X(57) X(58) X(60) X(71) X(75) X(77) X(78) X(83) \
  X(85) X(86) X(89) X(90) X(92) X(99) X(101) X(102) X(105) X(106) \
  X(108) X(113) X(114) X(116) X(120) X(135) X(139) X(141) X(142) X(147) \
  X(149) X(150) X(153) X(154) X(156) X(163) X(165) X(166) X(169) X(170) \
  X(172) X(177) X(178) X(180) X(184) X(195) X(197) X(198) X(201) X(202) \
  X(204) X(209) X(210) X(212) X(216) X(225) X(226) X(228) X(232) X(240)

/* The numbers of vectors 1 to N for a number of rows: see SHAPES of each set. */
#define UP_TO_1(X, rows) X(rows, 1)
#define UP_TO_2(X, rows) UP_TO_1(X, rows) X(rows, 2)
#define UP_TO_3(X, rows) UP_TO_2(X, rows) X(rows, 3)
#define UP_TO_4(X, rows) UP_TO_3(X, rows) X(rows, 4)
#define UP_TO_6(X, rows) UP_TO_4(X, rows) X(rows, 5) X(rows, 6)
#define UP_TO_8(X, rows) UP_TO_6(X, rows) X(rows, 7) X(rows, 8)

extern const struct instructions kgrc_plain;
#if defined(__x86_64__)
extern const struct instructions kgrc_avx2, kgrc_vnni;
#endif

#endif
