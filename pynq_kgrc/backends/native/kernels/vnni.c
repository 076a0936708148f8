#include "native.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif
#include "vectors_vnni.h"

#define INSTRUCTIONS kgrc_vnni
#include "tasks.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
