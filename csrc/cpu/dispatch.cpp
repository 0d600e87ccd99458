// Chooses the kernels for the processor that runs, once.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace gate4d {

extern const Kernels portable;
#if defined(__x86_64__)
extern const Kernels avx512_bf16, avx512, avx2;
#endif

namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* cap = std::getenv("GATE4D_CPU_ISA");
  bool allowed = cap == nullptr || *cap == 0;
  const auto usable = [&](const Kernels& k, bool supported) {
    allowed = allowed || std::strcmp(cap, k.name) == 0;  // the cap and everything below it
    return allowed && supported;
  };
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (usable(avx512_bf16, has_avx512 && __builtin_cpu_supports("avx512bf16"))) return avx512_bf16;
  if (usable(avx512, has_avx512)) return avx512;
  if (usable(avx2, has_avx2)) return avx2;
#endif
  return portable;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace gate4d
