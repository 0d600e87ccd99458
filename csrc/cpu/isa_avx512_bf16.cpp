#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif
#define GATE4D_AVX512
#define GATE4D_AVX512_BF16
#include "isa.h"

GATE4D_DEFINE_KERNELS(avx512_bf16, "avx512_bf16")
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
