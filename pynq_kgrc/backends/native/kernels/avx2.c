#include "native.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#include "vectors_avx2.h"

#define INSTRUCTIONS kgrc_avx2
#include "tasks.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
