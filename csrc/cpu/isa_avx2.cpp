#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define GATE4D_AVX2
#include "isa.h"

GATE4D_DEFINE_KERNELS(avx2, "avx2")
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
