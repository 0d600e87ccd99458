// The instructions of Hopper that hopper_forward.cuh is written in, as functions: copy engine, barriers in shared
// memory, matrix products of a warpgroup. The tests put functions of the same names in their place that do on the CPU
// what the PTX manual says of each.

#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define GATE4D_DEVICE __device__ __forceinline__

namespace gate4d::hopper {

using TensorMap = CUtensorMap;
using bf16 = __nv_bfloat16;
using fp16 = __half;

// Barriers in shared memory.

GATE4D_DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// The barriers that one thread has made are seen by all, the copy engine included.
GATE4D_DEVICE void barriers_made() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

GATE4D_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

GATE4D_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Until the phase of that parity is complete; the phase before the first counts as complete, with parity 1.
GATE4D_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

GATE4D_DEVICE void block_sync() { __syncthreads(); }
GATE4D_DEVICE void warp_sync() { __syncwarp(); }

// Copies into shared memory, which add their bytes to the barrier when they are there.

GATE4D_DEVICE void copy_box(uint32_t to, const TensorMap& map, uint32_t barrier, int feature, int token, int head,
                            int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(feature), "r"(token), "r"(head), "r"(batch)
      : "memory");
}

GATE4D_DEVICE void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
      : "memory");
}

GATE4D_DEVICE float2 load_pair(uint32_t from) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
  return x;
}

// Registers move from the producer's warpgroup to the consumers'.

template <int Registers>
GATE4D_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
GATE4D_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Matrix products of a warpgroup, d[64 x N] += a[64 x 16] b[16 x N], asynchronous: groups of them are closed, then
// awaited.

GATE4D_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
GATE4D_DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All but the latest `Pending` groups are done.
template <int Pending>
GATE4D_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// The compiler moves no use of x across: what was in flight until now is in these registers.
template <int N>
GATE4D_DEVICE void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#define GATE4D_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define GATE4D_32(d, i) GATE4D_8(d, i), GATE4D_8(d, i + 8), GATE4D_8(d, i + 16), GATE4D_8(d, i + 24)
#define GATE4D_D32                                                                                                 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23," \
  " %24, %25, %26, %27, %28, %29, %30, %31"
#define GATE4D_D64                                                                                                 \
  GATE4D_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50,"    \
  " %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// a and b in shared memory, features first in both (K-major). `add` 0: d is overwritten.
#define GATE4D_PRODUCT_SHARED(type, ptx)                                                                        \
  GATE4D_DEVICE void product(type, float (&d)[64], uint64_t a, uint64_t b, int add) {                           \
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %66, 0;\n\t"                                         \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." ptx "." ptx " " GATE4D_D64                      \
                 "}, %64, %65, add, 1, 1, 0, 0;\n\t}"                                                           \
                 : GATE4D_32(d, 0), GATE4D_32(d, 32)                                                            \
                 : "l"(a), "l"(b), "r"(add));                                                                   \
  }

// a in registers, b in shared memory with its columns first (N-major).
#define GATE4D_PRODUCT_REGISTERS(type, ptx)                                                                     \
  GATE4D_DEVICE void product(type, float (&d)[64], const uint32_t* a, uint64_t b) {                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." ptx "." ptx " " GATE4D_D64                      \
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                                    \
                 : GATE4D_32(d, 0), GATE4D_32(d, 32)                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                         \
  }                                                                                                             \
  GATE4D_DEVICE void product(type, float (&d)[32], const uint32_t* a, uint64_t b) {                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." ptx "." ptx " " GATE4D_D32                       \
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                                    \
                 : GATE4D_32(d, 0)                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                         \
  }

GATE4D_PRODUCT_SHARED(bf16, "bf16")
GATE4D_PRODUCT_SHARED(fp16, "f16")
GATE4D_PRODUCT_REGISTERS(bf16, "bf16")
GATE4D_PRODUCT_REGISTERS(fp16, "f16")

// Arithmetic of one thread.

GATE4D_DEVICE float exp2_approx(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

GATE4D_DEVICE float of_quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

GATE4D_DEVICE float of_quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

GATE4D_DEVICE uint32_t pack(bf16, float low, float high) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(x);
}

GATE4D_DEVICE uint32_t pack(fp16, float low, float high) {
  const __half2 x = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(x);
}

}  // namespace gate4d::hopper
