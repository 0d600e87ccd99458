#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define GATE4D_AVX512
#include "isa.h"

GATE4D_DEFINE_KERNELS(avx512, "avx512")
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
