// The one matrix product of all kernels: C[row][lanes] += A[row][k] * B[k][lanes].
//
// A is read one scalar at a time and broadcast, B and C are rows of vectors. Queries (or features) lie along
// the lanes, so that keys and values are read as they are stored and softmax needs no horizontal reductions.
#pragma once

#include "simd.h"

namespace {

// One step of k per element.
struct Float {
  using Elem = float;
  static constexpr int pack = 1;  // numbers per element
  GATE4D_INLINE static vf step(const float* a, vf b, vf c) { return fma(set1(*a), b, c); }
  GATE4D_INLINE static float part(float x, int) { return x; }
  GATE4D_INLINE static vf part(vf x, int) { return x; }
};

#if defined(GATE4D_AVX512_BF16)
// Two steps of k per element: a pair of bf16 numbers multiplied with fp32 accumulation.
struct Bf16Pair {
  using Elem = uint32_t;
  static constexpr int pack = 2;
  GATE4D_INLINE static vf step(const uint32_t* a, vu b, vf c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32((int)*a), (__m512bh)b);
  }
  // One number of a pair: the first in the low half.
  GATE4D_INLINE static float part(uint32_t x, int i) { return to_float(bf16{(uint16_t)(x >> 16 * i)}); }
  GATE4D_INLINE static vf part(vu x, int i) { return (vf)(i ? x & 0xffff0000u : x << 16); }
};
#endif

// J rows by R vectors, held in registers over all k. What is there already is added last: a sum of tile sums
// loses far less than one running sum over a long sequence.
template <class M, int R>
GATE4D_INLINE void gemm_tile(const typename M::Elem* a, int64_t a_row, int64_t a_k,  // A[J][k]
                             const typename M::Elem* b, int64_t b_k,                 // B[k][R * W]
                             float* c, int64_t c_row,                                // C[J][R * W]
                             int k, bool accumulate) {
  vf acc[J][R];
  GATE4D_UNROLL for (int j = 0; j < J; ++j) { GATE4D_UNROLL for (int r = 0; r < R; ++r) acc[j][r] = vf{}; }
  for (int i = 0; i < k; ++i) {
    decltype(load(b)) row[R];
    GATE4D_UNROLL for (int r = 0; r < R; ++r) row[r] = load(b + i * b_k + r * W);
    GATE4D_UNROLL for (int j = 0; j < J; ++j) {
      GATE4D_UNROLL for (int r = 0; r < R; ++r) acc[j][r] = M::step(a + j * a_row + i * a_k, row[r], acc[j][r]);
    }
  }
  GATE4D_UNROLL for (int j = 0; j < J; ++j) {
    GATE4D_UNROLL for (int r = 0; r < R; ++r) {
      float* const to = c + j * c_row + r * W;
      store(to, accumulate ? load(to) + acc[j][r] : acc[j][r]);
    }
  }
}

// `rows` (a multiple of J) rows by R vectors.
template <class M, int R>
void gemm_rows(const typename M::Elem* a, int64_t a_row, int64_t a_k, const typename M::Elem* b, int64_t b_k, float* c,
               int64_t c_row, int rows, int k, bool accumulate) {
  for (int j = 0; j < rows; j += J)
    gemm_tile<M, R>(a + j * a_row, a_row, a_k, b, b_k, c + j * c_row, c_row, k, accumulate);
}

}  // namespace
